"""A large new file is sent in parts while it is first read; whatever happens meanwhile, it arrives as it is."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import folders
import pytest
from desk import Desk, assert_in_step
from lossy import Fault, lossy
from narrow import LIMIT, Narrow, assert_arrived, cut_off, edit, fine, streams_of
from serving import Served, serving
from watching import at_home, inside

from deltasync.client import ahead, digest, ledger, parts
from deltasync.client.push import Progress, Pusher, PushOptions
from deltasync.client.transport import open_transport
from deltasync.core import wire
from deltasync.core.errors import DeltasyncError, HostUnreachable, NotFound

SIZES = itertools.count(5 * LIMIT + 4321, 1000)
BIG = "clips/big.mov"


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have files of some MiB be large, and read in pieces that do not end where parts do."""
    monkeypatch.setattr(ahead, "AHEAD_BYTES", LIMIT)
    monkeypatch.setattr(digest, "BUFFER_BYTES", 300_000)
    monkeypatch.setattr(ledger, "_FLUSH_HASHED_BYTES", LIMIT)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served") / "data") as running:
        yield running


@pytest.fixture
def size() -> int:
    """A size that no content has yet."""
    return next(SIZES)


@pytest.fixture
def desk(tmp_path: Path, served: Served, size: int) -> Desk:
    made = Desk(tmp_path / tmp_path.name, served.url)
    folders.write(made.root, BIG, random.Random(tmp_path.name).randbytes(size))
    folders.write(made.root, "small.txt", os.urandom(5))
    return made


class Behind(Narrow):
    """It also counts the questions, and remembers how many parts were there when each content was asked for."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.asked_sizes: list[list[int]] = []
        self.sent_at: list[int] = []

    def sizes(self, name: str, sizes: list[int]) -> list[int]:
        self.asked_sizes.append(list(sizes))
        return self.inner.sizes(name, sizes)

    def missing(self, name: str, digests: list[str]) -> list[str]:
        self.sent_at.append(len(self.sent))
        return super().missing(name, digests)


@pytest.fixture
def way(served: Served) -> Iterator[Behind]:
    inner = open_transport(served.url, timeout=20, max_retries=2)
    yield Behind(inner)
    inner.close()


def ahead_of(way: Behind) -> int:
    """Return how many bundles began before the receiver was asked for any content."""
    return way.sent_at[0] if way.sent_at else 0


def test_parts_are_sent_while_the_file_is_read(served: Served, desk: Desk, way: Behind, size: int) -> None:
    """All but the last part are under way before its digest is known; each byte goes once, and progress tells of it."""
    told: list[Progress] = []
    with desk.open() as state, Pusher(state, way, PushOptions(explain=True), progress=told.append) as pusher:
        desk.observe(state, recorded=pusher.ahead.send_recorded, follow=pusher.ahead.follow)
        report = pusher.run()
    assert (way.asked_sizes, ahead_of(way)) == ([[size]], 5)
    assert report.bundles == 6 + 2
    assert len([each for each in way.sent if each > LIMIT]) == 5  # a small one that overtakes goes again
    assert max(way.sent) < LIMIT + 10_000
    assert (report.content_bytes, report.avoided_bytes) == (size + 5, 0)
    assert [f"{BIG} part {number} of 6" for number in range(1, 7)] == list(
        dict.fromkeys(each.part for each in told if each.part)
    )
    assert told[-1].content_bytes == told[-1].total_bytes == size + 5
    assert all(each.total_bytes >= size for each in told)
    assert_arrived(served, desk, report)
    assert desk.push(transport=way).bundles == 0


def test_a_size_that_the_receiver_has_waits_for_the_digest(served: Served, desk: Desk, way: Behind, size: int) -> None:
    """What was adopted, or came with another workspace, never travels again; nor does a file that might be it."""
    other = Desk(desk.root.with_name("other"), served.url)
    folders.write(other.root, "same", (desk.root / BIG).read_bytes())
    other.push()
    folders.write(desk.root, "as-large", os.urandom(size))
    report = desk.push(transport=way)
    assert (way.asked_sizes, ahead_of(way)) == ([[size]], 0)
    assert report.content_bytes == size + 5
    assert_arrived(served, desk, report)


def test_a_copy_goes_once_and_another_of_the_same_size_too(served: Served, desk: Desk, way: Behind, size: int) -> None:
    """A file that begins and ends as one that was read waits; one that only is as large does not."""
    folders.write(desk.root, "copy.mov", (desk.root / BIG).read_bytes())
    folders.write(desk.root, "other.mov", os.urandom(size))
    report = desk.push(transport=way)
    assert len(way.asked_sizes) == 1
    assert report.content_bytes == 2 * size + 5
    assert_arrived(served, desk, report)


def test_a_server_that_tells_no_sizes_is_met_as_before(served: Served, desk: Desk, way: Behind) -> None:
    """An older server has no such route: the file is sent when its digest is known."""
    real = way.inner._once

    def older(method: str, path: str, **options: Any) -> Any:
        if path.endswith("/sizes"):
            raise NotFound("there is no such route")
        return real(method, path, **options)

    way.inner._once = older
    report = desk.push(transport=way)
    assert ahead_of(way) == 0
    assert_arrived(served, desk, report)


@pytest.mark.parametrize("state_of", ["history", "server", "rehearsal", "no-parts", "holes"])
def test_everything_else_waits_for_the_digest(
    served: Served, desk: Desk, way: Behind, state_of: str, size: int
) -> None:
    """Nothing goes early where something may be moved, guarded or left out: the scan must end first."""
    options: dict[str, Any] = {}
    if state_of == "history":
        (desk.root / BIG).rename(desk.root.with_name("elsewhere"))
        desk.push()
        desk.root.with_name("elsewhere").rename(desk.root / BIG)
    elif state_of == "server":
        desk.push()
        (desk.root / ".deltasync/state.db").unlink()
    elif state_of == "rehearsal":
        options["dry_run"] = True
    elif state_of == "no-parts":
        way.features = []
    else:
        with open(desk.root / BIG, "r+b") as out:
            out.truncate(2 * size)
        if (desk.root / BIG).stat().st_blocks * 512 >= 2 * size:
            pytest.skip("this file system has no holes")
    report = desk.push(transport=way, **options)
    assert (way.asked_sizes, ahead_of(way)) == ([], 0)
    if state_of == "rehearsal":
        assert (way.sent, streams_of(served)) == ([], [])
        report = desk.push()
    assert_arrived(served, desk, report)


@pytest.mark.parametrize("after", [0, 2, 5])
@pytest.mark.parametrize("fault", ["before", "receipt"])
def test_trouble_on_the_way_is_met_after_the_scan(
    served: Served, desk: Desk, way: Behind, after: int, fault: str, size: int
) -> None:
    """A part that does not get through, or whose receipt is lost, costs no more than it does at any other time."""

    def lose(receipt: Any) -> Any:
        raise HostUnreachable("the answer is lost")

    if fault == "before":
        way.on_send = [fine] * after + [cut_off]
    else:
        way.receipts = [lambda receipt: receipt] * after + [lose]
    report = desk.push(transport=way)
    assert (len(way.asked_sizes), ahead_of(way) > 0) == (1, True)
    assert sum(way.sent) < size + 3 * LIMIT
    assert_arrived(served, desk, report)


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(path.read_bytes()[: 2 * LIMIT] + b"later" + path.read_bytes()[2 * LIMIT :]),
        lambda path: path.write_bytes(path.read_bytes() + b"longer"),
        lambda path: os.truncate(path, LIMIT // 2),
        lambda path: path.unlink(),
        lambda path: path.rename(path.with_name("renamed")),
    ],
    ids=["changed", "longer", "shorter", "gone", "renamed"],
)
@pytest.mark.parametrize(("after", "rescans"), [(1, True), (4, False)])
def test_a_file_that_changes_while_it_is_read_arrives_as_it_is(
    served: Served, desk: Desk, way: Behind, change: Callable[[Path], None], after: int, rescans: bool
) -> None:
    """The parts stop, the file goes the ordinary way from what is there, and nothing of it is left on the server."""
    way.on_send = [fine] * after + [lambda: change(desk.root / BIG)]
    report = desk.push(transport=way, rescans=rescans)
    assert len(way.asked_sizes) == 1
    if report.problems:
        report = desk.push(transport=way)
    assert_in_step(served, desk, desk.push())
    assert_arrived(served, desk, desk.push())


def test_what_arrived_of_a_file_that_grew_counts(served: Served, desk: Desk, way: Behind, size: int) -> None:
    """A recording that grows while it is read is gone on with behind the parts that arrived."""
    way.on_send = [fine] * 3 + [lambda: edit(desk, BIG, lambda old: old + os.urandom(LIMIT))]
    first = desk.push(transport=way)
    second = desk.push(transport=way)
    assert first.content_bytes + second.content_bytes <= size + 5 + 3 * LIMIT
    assert_arrived(served, desk, second)


def test_bytes_that_change_unseen_are_found_by_the_digest(served: Served, desk: Desk, way: Behind) -> None:
    """What was sent is not what was hashed, under the same size and time: the content is refused, and sent anew."""
    path = desk.root / BIG

    def change() -> None:
        before = path.stat()
        with path.open("r+b") as out:
            out.seek(2 * LIMIT)
            out.write(b"unseen")
        os.utime(path, ns=(before.st_mtime_ns, before.st_mtime_ns))

    way.on_send = [fine, fine, change]
    report = desk.push(transport=way)
    assert_in_step(served, desk, desk.push() if report.problems else report)


def test_a_scan_that_fails_leaves_parts_to_the_next_push(served: Served, desk: Desk, way: Behind, size: int) -> None:
    """What was sent of the file is known, and not sent again."""

    class Stop(DeltasyncError):
        """The scan ends here."""

    def stop() -> None:
        raise Stop("stop")

    with desk.open() as state, pytest.raises(Stop), Pusher(state, way, PushOptions()) as pusher:
        desk.observe(state, recorded=stop, follow=pusher.ahead.follow)
    with desk.open() as state:
        arrived = sum(each.parts_sent for each in parts.sent(state))
    assert arrived >= 3
    way.sent = []
    report = desk.push(transport=way)
    assert sum(way.sent) < size + 50_000 - arrived * LIMIT
    assert_arrived(served, desk, report)


@pytest.mark.parametrize("after", [0, 3])
def test_a_killed_push_goes_on_behind_what_arrived(served: Served, desk: Desk, after: int, size: int) -> None:
    """A process that dies while it reads the file has recorded each part first; the next one sends the rest."""
    if not (child := os.fork()):
        try:
            way = Behind(open_transport(desk.url or ""))
            way.receipts = [lambda receipt: receipt] * after + [lambda _: os._exit(9)]
            desk.push(transport=way)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    with desk.open() as state:
        arrived = sum(each.parts_sent for each in parts.sent(state))
    way = Narrow(open_transport(desk.url or ""))
    report = desk.push(transport=way)
    assert sum(way.sent) < size + 50_000 - arrived * LIMIT
    assert_arrived(served, desk, report)


def test_a_watcher_sends_what_it_first_reads(
    served: Served, desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A watcher's first look asks for sizes as well; an answer that is lost is asked for again."""
    monkeypatch.setattr("deltasync.client.seal.Limits", lambda: wire.Limits(bundle_content_bytes=LIMIT))
    os.utime(desk.root / BIG, ns=(0, 10**18))  # it has settled
    with lossy(served.port) as proxy, at_home(tmp_path):
        fault = Fault(b"/sizes", swallow=True)
        proxy.faults.append(fault)
        with inside(desk.root, to=proxy.url) as watcher:
            watcher.until_same()
        assert fault.has_happened.is_set()
