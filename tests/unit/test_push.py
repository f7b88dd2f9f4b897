"""Pushing a real folder to a real server, through everything that can go wrong on the way."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import folders
import msgspec
import pytest
from desk import Desk, Meddler
from lossy import Fault, Proxy, lossy
from serving import Served, serving

from deltasync.client import outbox
from deltasync.client.push import Progress, Pusher, PushOptions, PushReport
from deltasync.client.transport import open_transport
from deltasync.core import wire
from deltasync.core.errors import (
    GuardStopped,
    HostBusy,
    HostUnreachable,
    NotOwner,
    Refused,
    RootMismatch,
    SequenceFork,
    UsageError,
)
from deltasync.core.hashing import digest_of, directory_digest
from deltasync.core.manifest import EMPTY_ROOT, Entry, Kind, encode_directory

BUNDLES = b"/bundles"
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")


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
    """A desk with a name of its own, whose server is behind the proxy."""
    return Desk(tmp_path / tmp_path.name, proxy.url)


@pytest.fixture
def meddler(desk: Desk) -> Iterator[Meddler]:
    assert desk.url
    inner = open_transport(desk.url, timeout=20, max_retries=2)
    yield Meddler(inner)
    inner.close()


def tree_of(served: Served, desk: Desk) -> Path:
    return served.data / "workspaces" / desk.root.name / "tree"


def head_of(served: Served, desk: Desk) -> dict[str, Any]:
    found: dict[str, Any] = served.get(f"/api/v1/workspaces/{desk.root.name}").json
    return found


def limited(meddler: Meddler, limits: wire.Limits) -> None:
    """Have the server advertise limits."""
    state = meddler.inner.workspace
    meddler.workspace = lambda *a, **o: msgspec.structs.replace(state(*a, **o), limits=limits)  # type: ignore[attr-defined]


def assert_in_step(served: Served, desk: Desk, report: PushReport) -> None:
    """Fail unless both sides state one root and the plain tree is the folder, byte by byte."""
    head = head_of(served, desk)
    assert (head["root"], head["sequence"], head["tree_sequence"]) == (report.root, report.sequence, report.sequence)
    folders.assert_same(desk.root, tree_of(served, desk))


# The good days


def test_a_push_brings_the_folder_over_and_a_second_one_asks_once(served: Served, desk: Desk, proxy: Proxy) -> None:
    """After a push both roots and trees are equal; with nothing changed the next one is one request under 2 KiB."""
    folders.life(desk.root)
    report = desk.push()
    assert_in_step(served, desk, report)
    assert (report.sequence, report.bundles, report.problems) == (1, 1, [])
    assert report.operations.created == 14
    assert (report.content_bytes, report.avoided_bytes) == (177_420, 70_000)
    passed = proxy.passed_bytes
    again = desk.push()
    assert (again.sequence, again.bundles, again.sent_bytes, again.root) == (1, 0, 0, report.root)
    assert proxy.passed_bytes - passed < 2048


def test_every_kind_of_change_arrives(served: Served, desk: Desk) -> None:
    """Edits, touches, moves of files and directories, deletions and changes of kind end with equal trees."""
    folders.life(desk.root)
    desk.push()
    folders.later(desk.root)
    report = desk.push()
    assert_in_step(served, desk, report)
    assert (report.sequence, report.bundles) == (2, 1)
    assert report.operations.moved == 2
    assert report.content_bytes < 100


def test_moves_and_copies_send_no_content(served: Served, desk: Desk) -> None:
    """A renamed directory and a copied one cost names alone, however much they hold."""
    for number in range(40):
        folders.write(desk.root, f"a/d/{number}", os.urandom(50_000))
    desk.push()
    (desk.root / "a").rename(desk.root / "b")
    moved = desk.push()
    assert (moved.operations.moved, moved.content_bytes, moved.avoided_bytes) == (1, 0, 2_000_000)
    assert moved.sent_bytes < 1500
    shutil.copytree(desk.root / "b", desk.root / "c")
    copied = desk.push()
    assert (copied.content_bytes, copied.avoided_bytes) == (0, 2_000_000)
    assert_in_step(served, desk, copied)


def test_content_that_another_workspace_brought_is_not_sent(served: Served, desk: Desk, tmp_path: Path) -> None:
    """The cache belongs to the host: what it has ever seen does not travel again."""
    folders.write(desk.root, "x", os.urandom(300_000))
    desk.push()
    other = Desk(tmp_path / f"{tmp_path.name}-other", desk.url)
    shutil.copy2(desk.root / "x", other.root / "y")
    report = other.push()
    assert (report.content_bytes, report.avoided_bytes) == (0, 300_000)
    assert_in_step(served, other, report)


def test_a_delta_is_cut_where_the_server_says(served: Served, desk: Desk, meddler: Meddler) -> None:
    """Small limits make many bundles, two under way at a time, and the trees are equal in the end."""
    limited(meddler, wire.Limits(bundle_content_bytes=10_000, bundle_operations=7))
    for number in range(60):
        folders.write(desk.root, f"d{number % 5}/f{number}", bytes([number]) * 3000)
    under_way, most = 0, 0
    send = meddler.inner.send_bundle
    lock = threading.Lock()

    def counted(*arguments: Any, **options: Any) -> wire.Receipt:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        try:
            return send(*arguments, **options)
        finally:
            with lock:
                under_way -= 1

    meddler.inner.send_bundle = counted  # type: ignore[method-assign]
    report = desk.push(transport=meddler)
    assert report.bundles == report.sequence >= 20
    assert most == 2
    assert_in_step(served, desk, report)
    (desk.root / "d1").rename(desk.root / "moved")
    for number in range(30):
        folders.write(desk.root, f"moved/g{number}", bytes([number]) * 2000)
    assert_in_step(served, desk, desk.push(transport=meddler))


def test_progress_ends_where_the_report_does(desk: Desk) -> None:
    """What is told on the way adds up to what was sent."""
    for number in range(20):
        folders.write(desk.root, f"f{number}", bytes([number]) * 10_000)
    told: list[Progress] = []
    transport = open_transport(desk.url or "")
    with desk.open() as state:
        desk.observe(state)
        report = Pusher(state, transport, PushOptions(), progress=told.append).run()
    transport.close()
    assert told[-1] == Progress(1, report.content_bytes, report.content_bytes)
    assert [each.content_bytes for each in told] == sorted(each.content_bytes for each in told)


def test_a_rehearsal_says_what_a_push_then_does(served: Served, desk: Desk) -> None:
    """A dry run counts operations, bundles and content as the push does, and changes nothing on either side."""
    folders.life(desk.root)
    dry = desk.push(dry_run=True)
    assert head_of(served, desk)["sequence"] == 0
    with desk.open() as state:
        assert outbox.head(state).url is None
        assert outbox.pending(state) == []
    wet = desk.push()
    assert (dry.operations, dry.bundles, dry.content_bytes, dry.avoided_bytes) == (
        wet.operations,
        wet.bundles,
        wet.content_bytes,
        wet.avoided_bytes,
    )
    assert dry.dry_run
    assert dry.sequence == 0


def test_a_tree_that_cannot_be_made_is_no_success(tmp_path: Path) -> None:
    """The server has everything and cannot complete its folder: the report says it, also when nobody waits."""
    with serving(tmp_path / "data") as running:
        desk = Desk(tmp_path / "behind", running.url)
        folders.write(desk.root, "a", b"1")
        assert not desk.push().tree_behind
        aside = tmp_path / "data/workspaces/behind/aside"
        shutil.rmtree(aside)
        aside.write_bytes(b"in the way")
        folders.write(desk.root, "b", b"2")
        for wait in (0.0, 0.5):
            report = desk.push(wait=wait)
            assert report.tree_behind and report.sequence == 2


def test_content_that_the_server_lost_and_did_not_get_is_told(served: Served, desk: Desk) -> None:
    """What it asks for and this folder does not have is counted, so that the push is no plain success."""
    folders.write(desk.root, "a", b"1")
    inner = open_transport(desk.url or "", timeout=20)

    class Asking(Meddler):
        def workspace(self, *arguments: Any, **options: Any) -> wire.WorkspaceState:
            return msgspec.structs.replace(self.inner.workspace(*arguments, **options), wanted=["ab" * 32])

    try:
        assert desk.push().still_wanted == 0
        assert desk.push(transport=Asking(inner)).still_wanted == 1
    finally:
        inner.close()


def test_the_workspace_is_named_after_the_folder_or_as_asked(served: Served, desk: Desk, tmp_path: Path) -> None:
    """The name is the option, or the folder's; one that cannot be a name is refused with the option's name."""
    named = Desk(tmp_path / "folder", desk.url)
    folders.write(named.root, "a", b"x")
    assert named.push(workspace=f"{tmp_path.name}-named").workspace == f"{tmp_path.name}-named"
    assert named.push().workspace == f"{tmp_path.name}-named"
    with pytest.raises(UsageError):
        named.push(workspace="another")
    odd = Desk(tmp_path / ".odd", desk.url)
    with pytest.raises(UsageError, match="--workspace"):
        odd.push()


# The guard


def test_a_mass_deletion_waits_for_the_flag(served: Served, desk: Desk) -> None:
    """More than half of the entries and over 100, or all of them: nothing is sealed until the flag allows it."""
    for number in range(240):
        folders.write(desk.root, f"d{number // 60}/{number}", str(number))
    desk.push()
    for name in ("d0", "d1", "d2"):
        shutil.rmtree(desk.root / name)
    with pytest.raises(GuardStopped) as caught:
        desk.push()
    assert caught.value.exit_code == 6
    assert (caught.value.facts["deleted"], caught.value.facts["entries"]) == (183, 244)
    assert "--allow-mass-delete" in caught.value.sentence
    assert head_of(served, desk)["sequence"] == 1
    report = desk.push(allow_mass_delete=True)
    assert report.operations.deleted == 3
    assert_in_step(served, desk, report)


def test_an_emptied_folder_waits_for_the_flag(served: Served, desk: Desk) -> None:
    """The deletion of everything is held back even when it is little."""
    folders.write(desk.root, "a", b"x")
    folders.write(desk.root, "b", b"y")
    desk.push()
    (desk.root / "a").unlink()
    (desk.root / "b").unlink()
    with pytest.raises(GuardStopped):
        desk.push()
    report = desk.push(allow_mass_delete=True)
    assert report.root == EMPTY_ROOT.hex()
    assert_in_step(served, desk, report)


def test_replacing_the_only_file_is_no_mass_deletion(served: Served, desk: Desk) -> None:
    """A change of kind under one name is not taken for a deletion."""
    folders.write(desk.root, "a", b"x")
    desk.push()
    (desk.root / "a").unlink()
    folders.write(desk.root, "a/b", b"y")
    assert_in_step(served, desk, desk.push())


# Lost connections, answers and processes


def test_a_lost_answer_does_not_send_anything_twice(served: Served, desk: Desk, proxy: Proxy) -> None:
    """When the receipt is lost after the commit, the head tells, and the content crosses the wire once."""
    content = os.urandom(400_000)
    folders.write(desk.root, "x", content)
    fault = Fault(BUNDLES, swallow=True)
    proxy.faults.append(fault)
    report = desk.push()
    assert fault.has_happened.is_set()
    assert (report.sequence, report.bundles, report.content_bytes) == (1, 1, len(content))
    assert proxy.passed_bytes < 1.2 * len(content)
    assert_in_step(served, desk, report)


@pytest.mark.parametrize("cut_after", [0, 1, 500, 200_000])
def test_a_connection_that_is_cut_is_tried_again(served: Served, desk: Desk, proxy: Proxy, cut_after: int) -> None:
    """A reset before, at the start of, or in the middle of the body costs a repetition and nothing else."""
    folders.write(desk.root, "x", os.urandom(400_000))
    fault = Fault(BUNDLES, cut_after=cut_after)
    proxy.faults.append(fault)
    report = desk.push()
    assert fault.has_happened.is_set()
    assert report.sequence == 1
    assert_in_step(served, desk, report)


@pytest.mark.parametrize("swallow", [True, False])
def test_trouble_in_the_middle_of_a_row_of_bundles_heals(
    served: Served, desk: Desk, meddler: Meddler, proxy: Proxy, swallow: bool
) -> None:
    """With several bundles on their way, one that is cut or whose answer is lost is sorted out by the head."""
    limited(meddler, wire.Limits(bundle_content_bytes=20_000))
    for number in range(12):
        folders.write(desk.root, f"f{number}", os.urandom(15_000))
    proxy.faults.append(Fault(BUNDLES, swallow=swallow, cut_after=None if swallow else 9000, skip=4))
    proxy.faults.append(Fault(BUNDLES, swallow=swallow, cut_after=None if swallow else 9000, skip=2))
    report = desk.push(transport=meddler)
    assert report.bundles == report.sequence == 12
    assert_in_step(served, desk, report)


def test_a_server_that_stays_away_ends_the_push_and_loses_nothing(served: Served, desk: Desk, proxy: Proxy) -> None:
    """Exit 4; a bundle that was sealed before is sent by the next push, under its number."""
    folders.write(desk.root, "x", os.urandom(1000))
    proxy.faults += [Fault(BUNDLES, cut_after=300) for _ in range(10)]
    with pytest.raises(HostUnreachable) as caught:
        desk.push()
    assert caught.value.exit_code == 4
    with desk.open() as state:
        (row,) = outbox.pending(state)
    proxy.faults.clear()
    report = desk.push()
    assert (report.sequence, report.bundles) == (1, 1)
    assert head_of(served, desk)["epoch"] == row.epoch
    assert_in_step(served, desk, report)


class Killed(BaseException):
    """Stands for SIGKILL: no code of ours handles it."""


def kill(*_: object) -> Any:
    raise Killed


def test_a_push_killed_before_sending_is_continued(served: Served, desk: Desk, meddler: Meddler) -> None:
    """What was sealed is sent by the next push as it was sealed."""
    folders.life(desk.root)
    meddler.on_send.append(kill)
    with pytest.raises(Killed):
        desk.push(transport=meddler)
    with desk.open() as state:
        (row,) = outbox.pending(state)
    report = desk.push()
    assert (report.bundles, report.sequence) == (1, 1)
    receipts = served.get(f"/api/v1/workspaces/{desk.root.name}/sequences").json["sequences"]
    assert receipts[0]["identity"] == row.identity.hex()
    assert_in_step(served, desk, report)


def test_a_push_killed_after_the_commit_sends_nothing_again(
    served: Served, desk: Desk, meddler: Meddler, proxy: Proxy
) -> None:
    """A receipt that was never recorded is made good by the head, without a byte of content."""
    folders.write(desk.root, "x", os.urandom(200_000))
    meddler.receipts.append(kill)
    with pytest.raises(Killed):
        desk.push(transport=meddler)
    passed = proxy.passed_bytes
    report = desk.push()
    assert (report.sequence, report.sent_bytes) == (1, 0)
    assert proxy.passed_bytes - passed < 2048
    assert_in_step(served, desk, report)


def test_a_bundle_that_was_taken_back_too_early_is_recognised(served: Served, desk: Desk, meddler: Meddler) -> None:
    """If a bundle we discarded was applied after all, its head is known: no resync, no guard, no new epoch."""
    folders.write(desk.root, "a", b"1")
    folders.write(desk.root, "b", b"1")
    desk.push()
    folders.write(desk.root, "a", b"2")
    meddler.receipts.append(kill)
    with pytest.raises(Killed):
        desk.push(transport=meddler)
    with desk.open() as state:
        epoch = outbox.head(state).epoch
        outbox.discard_from(state, 2)
    (desk.root / "b").unlink()
    report = desk.push()
    assert (report.sequence, report.operations.deleted) == (3, 1)
    assert head_of(served, desk)["epoch"] == epoch
    assert_in_step(served, desk, report)


# Files that change on the way


def test_a_file_that_changes_after_sealing_arrives_as_it_is_now(served: Served, desk: Desk, meddler: Meddler) -> None:
    """Old digest, new bytes: the bundle is taken back, the file observed again, and one bundle is sent."""
    folders.write(desk.root, "d/x", b"before")
    folders.write(desk.root, "y", b"y")
    meddler.on_send.append(lambda: folders.write(desk.root, "d/x", b"after it was sealed") and None)
    report = desk.push(transport=meddler)
    assert (report.sequence, report.bundles, report.problems) == (1, 1, [])
    assert_in_step(served, desk, report)


@pytest.mark.parametrize("kind", ["gone", "directory", "link", "fifo", "shorter", "longer"])
def test_whatever_a_file_turns_into_the_rest_goes_on(served: Served, desk: Desk, meddler: Meddler, kind: str) -> None:
    """A file that vanishes or turns into something else while it is sent blocks nothing and leaks nothing."""
    victim = folders.write(desk.root, "d/x", b"before" * 1000)
    folders.write(desk.root, "secret", b"never by this name")
    folders.write(desk.root, "y", b"y")

    def change() -> None:
        victim.unlink()
        if kind == "directory":
            folders.write(desk.root, "d/x/inside", b"1")
        elif kind == "link":
            victim.symlink_to("../secret")
        elif kind == "fifo":
            os.mkfifo(victim)
        elif kind in ("shorter", "longer"):
            victim.write_bytes(b"before" * (999 if kind == "shorter" else 1001))

    meddler.on_send.append(change)
    report = desk.push(transport=meddler)
    if kind == "fifo":
        assert [problem.path for problem in report.problems] == ["d/x"]
        victim.unlink()
    else:
        assert report.problems == []
    assert head_of(served, desk)["root"] == report.root
    folders.assert_same(desk.root, tree_of(served, desk))


def test_a_file_that_keeps_changing_is_left_out_and_the_rest_arrives(
    served: Served, desk: Desk, meddler: Meddler
) -> None:
    """After a few attempts the file is a problem of this push, and comes with a later one."""
    folders.write(desk.root, "log", os.urandom(10))
    folders.write(desk.root, "d/y", b"y")
    numbers = iter(range(100))
    meddler.on_send += [lambda: folders.write(desk.root, "log", f"line {next(numbers)}") and None] * 3
    report = desk.push(transport=meddler)
    assert [(problem.path, problem.reason) for problem in report.problems] == [
        ("log", "changed while it was being sent")
    ]
    assert (tree_of(served, desk) / "d/y").read_bytes() == b"y"
    assert not (tree_of(served, desk) / "log").exists()
    assert head_of(served, desk)["root"] == report.root
    later = desk.push()
    assert later.problems == []
    assert_in_step(served, desk, later)


def test_without_a_rescan_a_changed_file_is_left_out_as_it_was(served: Served, desk: Desk, meddler: Meddler) -> None:
    """The server keeps the former content of a file whose new content could not be read."""
    folders.write(desk.root, "x", b"first")
    desk.push()
    folders.write(desk.root, "x", b"second")
    folders.write(desk.root, "new", b"new")
    meddler.on_send.append(lambda: folders.write(desk.root, "x", b"third") and None)
    report = desk.push(transport=meddler, rescans=False)
    assert [problem.path for problem in report.problems] == ["x"]
    assert (tree_of(served, desk) / "x").read_bytes() == b"first"
    assert (tree_of(served, desk) / "new").read_bytes() == b"new"


def test_a_pending_bundle_whose_content_is_gone_is_sealed_anew(served: Served, desk: Desk, meddler: Meddler) -> None:
    """A bundle sealed by a push that was killed gives way, under its number, to the folder as it is now."""
    folders.write(desk.root, "x", b"first" * 100)
    meddler.on_send.append(kill)
    with pytest.raises(Killed):
        desk.push(transport=meddler)
    folders.write(desk.root, "x", b"second")
    report = desk.push()
    assert (report.sequence, report.problems) == (1, [])
    assert_in_step(served, desk, report)


def test_a_file_that_the_server_never_takes_is_a_problem_of_its_own(
    served: Served, desk: Desk, meddler: Meddler
) -> None:
    """A file beyond the server's limit is left out and named, and everything else arrives."""
    limited(meddler, wire.Limits(bundle_bytes=50_000))
    folders.write(desk.root, "huge", os.urandom(60_000))
    folders.write(desk.root, "small", os.urandom(1000))
    report = desk.push(transport=meddler)
    assert [problem.path for problem in report.problems] == ["huge"]
    assert "50000 bytes" in report.problems[0].reason
    assert [path.name for path in tree_of(served, desk).iterdir()] == ["small"]


def test_a_folder_that_never_rests_ends_the_push(desk: Desk, meddler: Meddler) -> None:
    """When every attempt meets another changed file the push ends in bounded time, to be tried again."""
    for number in range(60):
        folders.write(desk.root, f"f{number}", os.urandom(50))
    names = iter(sorted(path.name for path in desk.root.iterdir() if path.is_file()))
    meddler.on_send += [lambda: folders.write(desk.root, next(names), os.urandom(51)) and None] * 60
    with pytest.raises(HostBusy, match="changes faster"):
        desk.push(transport=meddler)
    assert len(meddler.on_send) >= 15


# What the server lacks, has lost, or asks for


def test_content_that_the_server_turns_out_to_lack_is_sent(served: Served, desk: Desk, meddler: Meddler) -> None:
    """A `missing` answer that was wrong, or is stale, is made good by a second sending of the same bundle."""
    folders.write(desk.root, "x", os.urandom(1000))
    folders.write(desk.root, "y", os.urandom(1000))
    answers = iter([[]])
    ask = meddler.inner.missing
    meddler.inner.missing = lambda name, digests: next(answers, None) or ask(name, digests)  # type: ignore[method-assign]
    answers = iter([["0" * 64]])
    report = desk.push(transport=meddler)
    assert (report.sequence, report.bundles, report.content_bytes) == (1, 1, 2000)
    assert_in_step(served, desk, report)


def test_digests_are_asked_for_as_many_as_the_server_takes(served: Served, desk: Desk, meddler: Meddler) -> None:
    """The server's limit on one question is kept."""
    limited(meddler, wire.Limits(missing_digests=7))
    for number in range(20):
        folders.write(desk.root, f"f{number}", os.urandom(50))
    report = desk.push(transport=meddler)
    assert [len(digests) for digests in meddler.asked] == [7, 7, 6]
    assert_in_step(served, desk, report)


def test_content_that_the_server_lost_is_sent_again(served: Served, desk: Desk, meddler: Meddler) -> None:
    """Digests in `wanted` travel in a bundle that changes nothing; one that we do not have does not."""
    content = os.urandom(5000)
    folders.write(desk.root, "x", content)
    first = desk.push()
    wanted = [digest_of(content).hex(), "0" * 64]
    state = meddler.inner.workspace
    meddler.workspace = lambda *a, **o: msgspec.structs.replace(state(*a, **o), wanted=wanted)  # type: ignore[attr-defined]
    report = desk.push(transport=meddler)
    assert (report.sequence, report.content_bytes, report.root) == (2, 5000, first.root)
    assert report.operations.updated == 1
    assert_in_step(served, desk, report)


def test_a_server_that_lost_everything_gets_everything(desk: Desk, proxy: Proxy, tmp_path: Path) -> None:
    """An emptied server is met with a new epoch and the whole folder."""
    folders.life(desk.root)
    desk.push()
    with desk.open() as state:
        epoch = outbox.head(state).epoch
    with serving(tmp_path / "data") as fresh:
        proxy._upstream = fresh.port
        report = desk.push()
        assert report.sequence == 1
        assert head_of(fresh, desk)["epoch"] != epoch
        assert_in_step(fresh, desk, report)


def test_a_server_restored_from_yesterday_is_brought_forward(desk: Desk, proxy: Proxy, tmp_path: Path) -> None:
    """A server that went back gets one delta from its old tree, under the number after its own."""
    data = tmp_path / "data"
    folders.life(desk.root)
    with serving(data) as first:
        proxy._upstream = first.port
        desk.push()
    shutil.copytree(data, tmp_path / "yesterday", symlinks=True)
    with serving(data) as second:
        proxy._upstream = second.port
        folders.write(desk.root, "new", b"new")
        desk.push()
        folders.write(desk.root, "newer", b"newer")
        desk.push()
    with serving(tmp_path / "yesterday") as restored:
        proxy._upstream = restored.port
        report = desk.push()
        assert (report.sequence, report.operations.created) == (2, 2)
        assert_in_step(restored, desk, report)


# Lost and restored states, and other clients


def test_a_lost_state_is_rebuilt_from_the_server_without_content(served: Served, desk: Desk) -> None:
    """Without its state the client fetches the server's tree, sends nothing that is there, and goes on."""
    folders.life(desk.root)
    first = desk.push()
    shutil.rmtree(desk.root / ".deltasync")
    again = desk.push()
    assert (again.sequence, again.bundles, again.sent_bytes) == (1, 0, 0)
    folders.write(desk.root, "new", os.urandom(3000))
    report = desk.push()
    assert (report.sequence, report.operations.created, report.content_bytes) == (2, 1, 3000)
    assert report.root != first.root
    assert_in_step(served, desk, report)


def test_a_resync_that_would_delete_anything_waits_for_the_flag(served: Served, desk: Desk) -> None:
    """With a lost state not even one deletion is taken for granted, and the next push asks again."""
    folders.life(desk.root)
    desk.push()
    shutil.rmtree(desk.root / ".deltasync")
    (desk.root / "readme.txt").unlink()
    for _ in range(2):
        with pytest.raises(GuardStopped, match="1 of"):
            desk.push()
    with pytest.raises(GuardStopped, match="1 of"):
        desk.push(dry_run=True)
    assert head_of(served, desk)["sequence"] == 1
    report = desk.push(allow_mass_delete=True)
    assert (report.sequence, report.operations.deleted) == (2, 1)
    assert_in_step(served, desk, report)


def push_as_nobody(desk: Desk, **options: Any) -> PushReport:
    """Push as a user without privileges, who owns the desk and everything on it."""
    desk.root.with_name("home").mkdir(exist_ok=True)
    for path in (desk.root.parent, *desk.root.parent.rglob("*")):
        os.chown(path, 65534, 65534, follow_symlinks=False)
    for folder in desk.root.parent.parents:
        folder.chmod(folder.stat().st_mode | 0o111)
    os.setegid(65534)
    os.seteuid(65534)
    try:
        return desk.push(**options)
    finally:
        os.seteuid(0)
        os.setegid(0)


@pytest.fixture
def half_read(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """A desk that was pushed and lost its state; some of it cannot be read, and old.txt is gone."""
    monkeypatch.setenv("DELTASYNC_HOME", str(desk.root.with_name("home")))
    for path in ("keep.txt", "old.txt", "badsector.bin", "photos/one.jpg", "photos/two.jpg", "away/deep/three.jpg"):
        folders.write(desk.root, path, path.encode())
    desk.push()
    shutil.rmtree(desk.root / ".deltasync")
    (desk.root / "old.txt").unlink()
    for path in ("photos", "badsector.bin", "away/deep/three.jpg"):
        (desk.root / path).chmod(0)
    return desk


def files_of(served: Served, desk: Desk) -> set[str]:
    top = tree_of(served, desk)
    return {str(path.relative_to(top)) for path in top.rglob("*") if not path.is_dir()}


UNREAD = {"badsector.bin", "photos/one.jpg", "photos/two.jpg", "away/deep/three.jpg"}


@as_root
def test_without_a_state_what_cannot_be_read_is_not_deleted(served: Served, half_read: Desk) -> None:
    """Only what is gone is deleted, by that push and by those after it, and the guard names what it cannot see."""
    desk = half_read
    with pytest.raises(GuardStopped, match=r"1 of 9 .*; 3 that cannot.*: away/deep/three.jpg, badsector.bin, photos;"):
        push_as_nobody(desk)
    assert push_as_nobody(desk, allow_mass_delete=True).operations.deleted == 1
    assert files_of(served, desk) == UNREAD | {"keep.txt"}
    folders.write(desk.root, "new", b"new")
    push_as_nobody(desk)
    assert files_of(served, desk) == UNREAD | {"keep.txt", "new"}
    (desk.root / "badsector.bin").unlink()
    (desk.root / "photos").chmod(0o755)
    (desk.root / "photos/one.jpg").unlink()
    (desk.root / "away").rename(desk.root / "afar")
    push_as_nobody(desk)
    assert files_of(served, desk) == {"afar/deep/three.jpg", "photos/two.jpg", "keep.txt", "new"}
    (desk.root / "afar/deep/three.jpg").chmod(0o644)
    assert_in_step(served, desk, desk.push())


@as_root
def test_without_a_state_a_copy_does_not_take_the_place_of_what_cannot_be_read(served: Served, half_read: Desk) -> None:
    """A new file of the same content is no rename while the unreadable one is still there."""
    folders.write(half_read.root, "copy.bin", b"badsector.bin")
    push_as_nobody(half_read, allow_mass_delete=True)
    assert files_of(served, half_read) == UNREAD | {"keep.txt", "copy.bin"}


@as_root
def test_without_a_state_what_is_ignored_goes_only_when_that_is_wanted(served: Served, half_read: Desk) -> None:
    """What is ignored and was sent stays until --delete-excluded; what cannot be read stays even then."""
    desk = half_read
    folders.write(desk.root, ".deltasyncignore", b"keep.txt\n")
    push_as_nobody(desk, allow_mass_delete=True)
    assert files_of(served, desk) == UNREAD | {"keep.txt", ".deltasyncignore"}
    desk.scan_options = {"delete_excluded": True}
    push_as_nobody(desk, delete_excluded=True)
    assert files_of(served, desk) == UNREAD | {".deltasyncignore"}


def test_a_state_restored_from_yesterday_is_noticed(served: Served, desk: Desk, tmp_path: Path) -> None:
    """An old state meets a head that it does not know, opens a new epoch, and both sides agree again."""
    folders.life(desk.root)
    desk.push()
    shutil.copytree(desk.root / ".deltasync", tmp_path / "backup")
    folders.write(desk.root, "new", b"new")
    desk.push()
    epoch = head_of(served, desk)["epoch"]
    shutil.rmtree(desk.root / ".deltasync")
    shutil.copytree(tmp_path / "backup", desk.root / ".deltasync")
    folders.write(desk.root, "newer", b"newer")
    report = desk.push()
    assert report.sequence == 3
    assert head_of(served, desk)["epoch"] != epoch
    assert_in_step(served, desk, report)


def test_a_rehearsal_without_a_state_sees_what_the_server_has(served: Served, desk: Desk) -> None:
    """A dry run after a lost state compares with the server's tree and keeps nothing of it."""
    folders.life(desk.root)
    desk.push()
    shutil.rmtree(desk.root / ".deltasync")
    folders.write(desk.root, "new", os.urandom(3000))
    dry = desk.push(dry_run=True)
    assert (dry.operations.created, dry.bundles, dry.content_bytes) == (1, 1, 3000)
    assert head_of(served, desk)["sequence"] == 1
    wet = desk.push()
    assert (wet.operations, wet.sequence) == (dry.operations, 2)


def test_a_rehearsal_counts_what_is_sealed_already(served: Served, desk: Desk) -> None:
    """Pending bundles are part of what would be sent."""
    url, desk.url = desk.url, None
    folders.write(desk.root, "a", os.urandom(1000))
    desk.push()
    folders.write(desk.root, "b", os.urandom(2000))
    desk.url = url
    dry = desk.push(dry_run=True)
    assert (dry.bundles, dry.content_bytes, dry.operations.created) == (2, 3000, 2)
    assert head_of(served, desk)["sequence"] == 0


def test_another_client_is_refused_until_it_takes_over(served: Served, desk: Desk, tmp_path: Path) -> None:
    """The workspace has one writer; the one that lost it stops with exit 5 and changes nothing."""
    folders.life(desk.root)
    desk.push()
    other = Desk(tmp_path / "elsewhere", desk.url, client="bob")
    shutil.copytree(
        desk.root, other.root, symlinks=True, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".deltasync")
    )
    folders.write(other.root, "bob", b"was here")
    name = desk.root.name
    with pytest.raises(NotOwner, match="--take-over") as caught:
        other.push(workspace=name)
    assert caught.value.exit_code == 5
    report = other.push(workspace=name, take_over=True)
    assert report.sequence == 2
    folders.assert_same(other.root, tree_of(served, desk))
    folders.write(desk.root, "late", b"late")
    with pytest.raises(NotOwner):
        desk.push()
    folders.assert_same(other.root, tree_of(served, desk))


def test_taking_over_without_a_difference_makes_the_workspace_ours(served: Served, desk: Desk, tmp_path: Path) -> None:
    """A bundle without operations moves the ownership when the trees are equal already."""
    folders.write(desk.root, "a", b"x")
    desk.push()
    other = Desk(tmp_path / "elsewhere", desk.url, client="bob")
    shutil.copy2(desk.root / "a", other.root / "a")
    report = other.push(workspace=desk.root.name, take_over=True)
    assert (report.sequence, report.operations.created) == (2, 0)
    folders.write(other.root, "b", b"y")
    assert other.push().sequence == 3
    with pytest.raises(NotOwner):
        desk.push()


def test_a_moved_folder_goes_on(served: Served, desk: Desk, tmp_path: Path) -> None:
    """A folder that was moved continues its workspace in a new epoch."""
    folders.life(desk.root)
    desk.push()
    desk.root.rename(tmp_path / "moved")
    moved = Desk(tmp_path / "moved", desk.url)
    folders.write(moved.root, "new", b"new")
    report = moved.push()
    assert (report.sequence, report.operations.created) == (2, 1)
    folders.assert_same(moved.root, tree_of(served, desk))


# A server that lies (T6)


def test_a_receipt_with_another_root_is_an_integrity_error(desk: Desk, meddler: Meddler) -> None:
    """Equal roots are the proof; another one stops with exit 8 and is not recorded."""
    folders.write(desk.root, "x", b"x")
    meddler.receipts.append(lambda receipt: msgspec.structs.replace(receipt, root="0" * 64))
    with pytest.raises(RootMismatch) as caught:
        desk.push(transport=meddler)
    assert caught.value.exit_code == 8
    with desk.open() as state:
        assert outbox.head(state).acknowledged_sequence == 0


def test_a_receipt_for_another_bundle_is_not_taken(desk: Desk, meddler: Meddler) -> None:
    """A receipt must name the bundle that was sent."""
    folders.write(desk.root, "x", b"x")
    meddler.receipts.append(lambda receipt: msgspec.structs.replace(receipt, identity="0" * 64))
    with pytest.raises(RootMismatch, match="not for bundle 1"):
        desk.push(transport=meddler)


def test_a_head_that_goes_back_on_its_receipt_is_noticed(served: Served, desk: Desk, meddler: Meddler) -> None:
    """A server that acknowledges and drops is found out by the next push, which sends everything again."""
    folders.write(desk.root, "x", b"x")
    desk.push()
    state = meddler.inner.workspace
    asked: list[int] = []

    def emptied(*arguments: Any, **options: Any) -> wire.WorkspaceState:
        asked.append(1)
        real = state(*arguments, **options)
        if len(asked) > 1:
            return real
        return msgspec.structs.replace(real, sequence=0, root=EMPTY_ROOT.hex(), client_id="", epoch="")

    meddler.workspace = emptied  # type: ignore[attr-defined]
    report = desk.push(transport=meddler)
    assert report.sequence == 1
    assert_in_step(served, desk, report)


class Hostile(Meddler):
    """A server whose head is a tree that it serves itself."""

    def __init__(self, inner: Any, root: bytes, bodies: dict[bytes, bytes]) -> None:
        super().__init__(inner)
        self.root, self.bodies = root, bodies

    def workspace(self, *arguments: Any, **options: Any) -> wire.WorkspaceState:
        return msgspec.structs.replace(self.inner.workspace(*arguments, **options), sequence=9, root=self.root.hex())

    def directory(self, name: str, digest: bytes) -> bytes:
        return self.bodies[digest]


def nested(entries: Sequence[Entry], bodies: dict[bytes, bytes]) -> bytes:
    body = encode_directory(entries)
    bodies[directory_digest(body)] = body
    return directory_digest(body)


def exploding() -> tuple[bytes, dict[bytes, bytes]]:
    bodies: dict[bytes, bytes] = {}
    digest = nested([Entry("f", Kind.FILE, 1, 0, False, b"\1" * 32)], bodies)
    for _ in range(60):
        digest = nested([Entry(name, Kind.DIRECTORY, digest=digest) for name in "abcd"], bodies)
    return digest, bodies


def bottomless() -> tuple[bytes, dict[bytes, bytes]]:
    bodies: dict[bytes, bytes] = {}
    digest = EMPTY_ROOT
    for _ in range(5000):
        digest = nested([Entry("d", Kind.DIRECTORY, digest=digest)], bodies)
    return digest, bodies


def forged() -> tuple[bytes, dict[bytes, bytes]]:
    return b"\2" * 32, {b"\2" * 32: encode_directory([Entry("f", Kind.FILE, 1, 0, False, b"\1" * 32)])}


def escaping() -> tuple[bytes, dict[bytes, bytes]]:
    bodies: dict[bytes, bytes] = {}
    return nested([Entry("..", Kind.FILE, 1, 0, False, b"\1" * 32)], bodies), bodies


@pytest.mark.parametrize("make", [exploding, bottomless, forged, escaping])
def test_a_hostile_tree_is_refused(
    desk: Desk, meddler: Meddler, make: Callable[[], tuple[bytes, dict[bytes, bytes]]]
) -> None:
    """A tree without end, too deep, of other digests or with names that escape: refused in bounded time and memory."""
    folders.life(desk.root)
    before = folders.listing(desk.root)
    with pytest.raises(Refused):
        desk.push(transport=Hostile(meddler.inner, *make()))
    assert folders.listing(desk.root) == before


@pytest.mark.parametrize("root", ["", "zz" * 32, "AB" * 32, "ab"])
def test_a_malformed_head_is_no_head(desk: Desk, meddler: Meddler, root: str) -> None:
    """A root that is none is an error of the server's, not a reason to send anything."""
    state = meddler.inner.workspace
    meddler.workspace = lambda *a, **o: msgspec.structs.replace(state(*a, **o), root=root)  # type: ignore[attr-defined]
    folders.write(desk.root, "x", b"x")
    with pytest.raises(Exception, match="malformed"):
        desk.push(transport=meddler)


def test_only_named_content_is_ever_sent(served: Served, desk: Desk, meddler: Meddler) -> None:
    """A `missing` answer with digests that were not asked for sends nothing more."""
    folders.write(desk.root, "mine", b"mine")
    secret = folders.write(desk.root.parent, "secret", os.urandom(9000))
    ask = meddler.inner.missing
    wanted = digest_of(secret.read_bytes()).hex()
    meddler.inner.missing = lambda name, digests: [*ask(name, digests), wanted]  # type: ignore[method-assign]
    report = desk.push(transport=meddler)
    assert report.content_bytes == 4
    assert report.sent_bytes < 3000


# Without a server


def test_without_a_server_bundles_wait_as_files_and_are_sent_in_order(served: Served, desk: Desk) -> None:
    """Sealed files carry what the tree before them lacks; they arrive later, even when the folder has moved on."""
    url, desk.url = desk.url, None
    folders.life(desk.root)
    first = desk.push()
    assert (first.bundles, first.pending, first.sequence) == (1, 1, 1)
    folders.later(desk.root)
    desk.push()
    shutil.rmtree(desk.root / "sources")
    third = desk.push()
    assert len(desk.outbox()) == 3
    desk.url = url
    report = desk.push()
    assert (report.bundles, report.sequence, report.root, report.pending) == (3, 3, third.root, 0)
    assert desk.outbox() == []
    assert_in_step(served, desk, report)


def test_a_watched_folder_is_sealed_while_the_server_is_away(served: Served, desk: Desk, proxy: Proxy) -> None:
    """With `seal_offline` an unreachable server is news, not a failure, and everything is sent when it is back."""
    folders.life(desk.root)
    upstream, proxy._upstream = proxy._upstream, 1
    away = desk.push(seal_offline=True)
    assert away.unreachable
    assert (away.bundles, away.pending) == (1, 1)
    proxy._upstream = upstream
    folders.later(desk.root)
    report = desk.push(seal_offline=True)
    assert (report.unreachable, report.sequence) == (None, 2)
    assert_in_step(served, desk, report)


def test_a_full_outbox_makes_sealing_wait(served: Served, desk: Desk) -> None:
    """At the limit nothing more is sealed and the report says so; later everything arrives."""
    url, desk.url = desk.url, None
    folders.write(desk.root, "a", os.urandom(50_000))
    desk.push(outbox_limit=80_000)
    folders.write(desk.root, "b", os.urandom(50_000))
    full = desk.push(outbox_limit=80_000)
    assert full.waiting and "--outbox-limit" in full.waiting
    assert (full.bundles, full.pending) == (0, 1)
    desk.url = url
    report = desk.push(outbox_limit=80_000)
    assert (report.waiting, report.sequence) == (None, 2)
    assert_in_step(served, desk, report)


@pytest.mark.parametrize("damage", ["lost", "flipped", "truncated"])
def test_a_damaged_outbox_file_is_replaced_by_the_folder_as_it_is(served: Served, desk: Desk, damage: str) -> None:
    """A sealed file that is gone or broken is taken back, and a new epoch sends the present tree."""
    url, desk.url = desk.url, None
    folders.life(desk.root)
    desk.push()
    with desk.open() as state:
        epoch = outbox.head(state).epoch
    (path,) = desk.outbox()
    sealed = bytearray(path.read_bytes())
    path.unlink()
    if damage == "flipped":
        sealed[len(sealed) // 2] ^= 1
        path.write_bytes(sealed)
    elif damage == "truncated":
        path.write_bytes(sealed[:-5])
    folders.later(desk.root)
    desk.url = url
    report = desk.push()
    assert report.sequence == 1
    assert head_of(served, desk)["epoch"] != epoch
    assert_in_step(served, desk, report)


def test_a_file_that_changes_while_it_is_sealed_offline_is_sealed_as_it_is_now(desk: Desk) -> None:
    """Without a server, too, no bundle ever holds bytes that are not of their digest."""
    desk.url = None
    folders.write(desk.root, "x", b"before")
    report = desk.push(before=lambda state: folders.write(desk.root, "x", b"after the scan") and None)
    assert (report.problems, report.bundles) == ([], 1)
    assert report.content_bytes == len(b"after the scan")


def test_sent_bundles_are_kept_when_asked_for(served: Served, desk: Desk, proxy: Proxy) -> None:
    """`--keep-sent` leaves what was sent as files, lost answers or not, until the time that was said last is over."""
    folders.write(desk.root, "x", os.urandom(10_000))
    proxy.faults.append(Fault(BUNDLES, swallow=True))
    desk.push(keep_sent_seconds=3600.0)
    folders.write(desk.root, "y", os.urandom(10_000))
    report = desk.push(keep_sent_seconds=3600.0)
    assert len(desk.outbox()) == 2
    assert report.pending == 0
    desk.push()
    assert len(desk.outbox()) == 2
    desk.push(keep_sent_seconds=1e-6)
    assert desk.outbox() == []


# The state


def test_a_fork_that_nobody_understands_ends(desk: Desk, meddler: Meddler) -> None:
    """A server that refuses every bundle as a fork is told apart from one that is behind: the push ends."""
    folders.write(desk.root, "x", b"x")

    def fork() -> None:
        raise SequenceFork("no")

    meddler.on_send += [fork] * 20
    with pytest.raises(SequenceFork):
        desk.push(transport=meddler)
    assert len(meddler.on_send) >= 15


def test_old_directory_objects_are_swept(served: Served, desk: Desk) -> None:
    """The state does not grow with the history: trees that nothing needs any more go."""
    for name in ("a", "b", "c"):
        folders.write(desk.root, f"{name}/x", name)
    desk.push()
    for number in range(5):
        folders.write(desk.root, "a/x", str(number))
        desk.push()
    with desk.open() as state:
        state.sweep_objects(outbox.roots(state), always=True)
        count = state.db.execute("SELECT count(*) FROM objects").fetchone()[0]
    assert count <= 5
