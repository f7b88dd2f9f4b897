"""A first push sends what it has read while it reads on; whatever happens then, it ends as if it had waited."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import folders
import pytest
from desk import Desk, Meddler, assert_in_step
from lossy import Fault, Proxy, lossy
from serving import Served, serving

from deltasync.client import ahead, ledger
from deltasync.client.push import Pusher, PushOptions, PushReport
from deltasync.client.transport import open_transport
from deltasync.core.errors import HostUnreachable, RootUnavailable

FILES = 40
BUNDLES = b"/bundles"


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a few files be enough to go ahead."""
    monkeypatch.setattr(ahead, "AHEAD_FILES", 4)
    monkeypatch.setattr(ledger, "_FLUSH_FILES", 2)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served") / "data") as running:
        yield running


@pytest.fixture
def proxy(served: Served) -> Iterator[Proxy]:
    with lossy(served.port) as running:
        yield running


@pytest.fixture
def desk(tmp_path: Path, proxy: Proxy) -> Desk:
    made = Desk(tmp_path / tmp_path.name, proxy.url)
    for number in range(FILES):
        folders.write(made.root, f"d{number % 4}/f{number}", b"%d" % number * 500)
    return made


@pytest.fixture
def meddler(desk: Desk) -> Iterator[Meddler]:
    inner = open_transport(desk.url or "", timeout=20, max_retries=2)
    yield Meddler(inner)
    inner.close()


def assert_all_is_sent(served: Served, desk: Desk, report: PushReport) -> None:
    assert_in_step(served, desk, report)
    with desk.open() as state:
        assert state.observed_root() == state.sealed_root()


def test_a_first_push_sends_before_it_has_read_everything(served: Served, desk: Desk, meddler: Meddler) -> None:
    """Bundles are on their way while the scan goes on; each content is sent once, and the count is of everything."""
    folders.write(desk.root, "d3/copy", (desk.root / "d0/f0").read_bytes())
    sequences: list[int] = []

    def look_at_head() -> None:
        sequences.append(served.get(f"/api/v1/workspaces/{desk.root.name}").json["sequence"])

    with desk.open() as state, Pusher(state, meddler, PushOptions()) as pusher:
        desk.observe(state, recorded=pusher.ahead.send_recorded)
        look_at_head()
        report = pusher.run()
    assert sequences[0] > 0
    assert report.bundles == report.sequence > 3
    assert report.operations.created == FILES + 1 + 4
    assert report.content_bytes == sum(len(b"%d" % number) * 500 for number in range(FILES))
    assert report.sent_bytes == meddler.inner.sent_bytes > 0
    assert_all_is_sent(served, desk, report)
    again = desk.push()
    assert (again.bundles, again.sent_bytes) == (0, 0)


def test_a_later_push_waits_for_its_scan(served: Served, desk: Desk, meddler: Meddler) -> None:
    """Once there is a history a scan must end first: a renamed folder is one move, and nothing is sent again."""
    desk.push()
    (desk.root / "d1").rename(desk.root / "moved")
    report = desk.push(transport=meddler)
    assert (report.operations.moved, report.content_bytes, report.bundles) == (1, 0, 1)
    assert_all_is_sent(served, desk, report)


def test_a_server_that_has_the_workspace_is_met_at_the_end(served: Served, desk: Desk, meddler: Meddler) -> None:
    """A client that lost its state finds its files on the server: it sends nothing of them, ahead or later."""
    desk.push()
    (desk.root / ".deltasync/state.db").unlink()
    report = desk.push(transport=meddler, allow_mass_delete=True)
    assert (report.bundles, report.content_bytes) == (0, 0)
    assert_all_is_sent(served, desk, report)


def test_a_file_that_changes_on_the_way_arrives_as_it_is_then(served: Served, desk: Desk, meddler: Meddler) -> None:
    """Content that changed between reading and sending is read again; what changed later is for the next push."""

    def change() -> None:
        for number in range(FILES):
            folders.write(desk.root, f"d{number % 4}/f{number}", b"%d" % (number + 1) * 600)

    meddler.on_send = [lambda: None, change]
    report = desk.push(transport=meddler)
    assert report.problems == []
    assert served.get(f"/api/v1/workspaces/{desk.root.name}").json["root"] == report.root
    assert_all_is_sent(served, desk, desk.push())


@pytest.mark.parametrize("swallow", [True, False])
def test_trouble_ahead_is_met_later(served: Served, desk: Desk, proxy: Proxy, swallow: bool) -> None:
    """A bundle that is cut, or whose receipt is lost, while the scan goes on is sorted out after it."""
    fault = Fault(BUNDLES, swallow=swallow, cut_after=None if swallow else 100, skip=1)
    proxy.faults.append(fault)
    report = desk.push()
    assert fault.has_happened.is_set()
    assert_all_is_sent(served, desk, report)


def test_a_server_that_is_not_there_costs_nothing_but_the_answer(desk: Desk, tmp_path: Path) -> None:
    """Without a server the scan is made and recorded all the same, and the push says that nobody answered."""
    desk.url = "http://127.0.0.1:1"
    with pytest.raises(HostUnreachable):
        desk.push()
    with desk.open() as state:
        assert state.counts()[0] == FILES


def test_a_scan_that_fails_stops_what_was_sent_ahead(served: Served, desk: Desk, meddler: Meddler) -> None:
    """When the root is gone in the middle, nothing goes on in the background, and the next push finishes the work."""
    hidden = desk.root.with_name("hidden")

    def hide() -> None:
        desk.root.rename(hidden)
        desk.root.mkdir()

    with desk.open() as state, pytest.raises(RootUnavailable), Pusher(state, meddler, PushOptions()) as pusher:
        calls = iter([pusher.ahead.send_recorded, hide])
        desk.observe(state, recorded=lambda: next(calls, pusher.ahead.send_recorded)())
        desk.observe(state)
    assert not [thread for thread in threading.enumerate() if thread.name == "courier"]
    desk.root.rmdir()
    hidden.rename(desk.root)
    assert_all_is_sent(served, desk, desk.push())


def test_a_killed_push_goes_on_where_it_was(served: Served, desk: Desk) -> None:
    """A process that dies while the scan goes on has recorded each bundle first: the next one sends the rest."""
    if not (child := os.fork()):
        try:
            transport = open_transport(desk.url or "")
            with desk.open() as state:
                pusher = Pusher(state, transport, PushOptions())
                calls = iter([pusher.ahead.send_recorded] * 6)
                desk.observe(state, recorded=lambda: next(calls, lambda: os._exit(9))())
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert_all_is_sent(served, desk, desk.push())
