"""A file too large for one bundle goes in parts; whatever happens between them, it arrives, and nothing goes twice."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import folders
import pytest
from desk import Desk
from narrow import LIMIT, Narrow, assert_arrived, cut_off, edit, fine, streams_of
from serving import Served, serving

from deltasync.client import outbox, parts, replay
from deltasync.client import status as halves
from deltasync.client.push import Progress, Pusher, PushOptions, PushReport
from deltasync.client.transport import open_transport
from deltasync.core import wire
from deltasync.core.errors import HostUnreachable, SequenceConflict
from deltasync.core.hashing import digest_of

SIZE = 5 * LIMIT + 4321
BIG = "clips/big.mov"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served") / "data") as running:
        yield running


@pytest.fixture
def desk(tmp_path: Path, served: Served) -> Desk:
    made = Desk(tmp_path / tmp_path.name, served.url)
    folders.write(made.root, BIG, random.Random(tmp_path.name).randbytes(SIZE))
    folders.write(made.root, "small.txt", os.urandom(5))
    return made


@pytest.fixture
def way(served: Served) -> Iterator[Narrow]:
    inner = open_transport(served.url, timeout=20, max_retries=2)
    yield Narrow(inner)
    inner.close()


def cut_after(way: Narrow, count: int) -> None:
    """Let so many bundles through, and then none for as long as a push tries."""
    way.on_send = [fine] * count + [cut_off] * 20


def interrupted(desk: Desk, way: Narrow, after: int) -> int:
    """Push until so many bundles began; return how many parts are known to have arrived: the last may be cut."""
    cut_after(way, after)
    with pytest.raises(HostUnreachable):
        desk.push(transport=way)
    way.on_send, way.sent = [], []
    with desk.open() as state:
        return sum(each.parts_sent for each in parts.sent(state))


def test_a_large_file_goes_in_bundles_of_the_usual_size(served: Served, desk: Desk, way: Narrow) -> None:
    """No bundle is larger than the limit, each byte goes once, and the file lies in the cache and in the tree."""
    told: list[Progress] = []
    with desk.open() as state, Pusher(state, way, PushOptions(explain=True), progress=told.append) as pusher:
        desk.observe(state)
        report = pusher.run()
    assert report.bundles == 6 + 2
    assert max(way.sent) < LIMIT + 10_000
    assert (report.content_bytes, report.avoided_bytes) == (SIZE + 5, 0)
    assert report.reasons is not None and [each.reason for each in report.reasons] == ["new"] * 3
    assert [f"{BIG} part {number} of 6" for number in range(1, 7)] == list(
        dict.fromkeys(each.part for each in told if each.part)
    )
    assert told[-1].content_bytes == told[-1].total_bytes
    assert SIZE + 5 <= told[-1].total_bytes <= SIZE + 5 + 2 * LIMIT  # on a busy machine one may overtake the one before
    assert_arrived(served, desk, report)
    assert desk.push(transport=way).bundles == 0


def test_a_receiver_without_parts_gets_the_whole(served: Served, desk: Desk, way: Narrow) -> None:
    """An older server takes the file in one bundle."""
    way.features = []
    report = desk.push(transport=way)
    assert max(way.sent) > SIZE
    assert_arrived(served, desk, report)


def test_what_was_sent_is_not_sent_again(served: Served, desk: Desk, way: Narrow) -> None:
    """A push that was cut off in the midst of a file is gone on with by another process, from the part that lacked."""
    arrived = interrupted(desk, way, 3)
    assert arrived in (2, 3)
    with desk.open() as state:
        here = halves.local(state)
        assert here.in_parts == [(BIG, arrived, 6)]
    assert len(streams_of(served)) == 1
    told: list[Progress] = []
    with desk.open() as state, Pusher(state, way, PushOptions(), progress=told.append) as pusher:
        desk.observe(state)
        report = pusher.run()
    assert report.content_bytes == SIZE + 5 - arrived * LIMIT
    assert told[-1].content_bytes == told[-1].total_bytes
    assert_arrived(served, desk, report)


def test_a_lost_answer_costs_at_most_its_parts(served: Served, desk: Desk, way: Narrow) -> None:
    """Receipts that are lost, and the process with them: the next push learns of the parts from the head."""

    def lose(receipt: wire.Receipt) -> wire.Receipt:
        raise HostUnreachable("the answer is lost")

    way.receipts = [lambda receipt: receipt] * 2 + [lose] * 20
    way.on_send = [fine] * 3 + [cut_off] * 20
    with pytest.raises(HostUnreachable):
        desk.push(transport=way)
    way.receipts, way.on_send = [], []
    report = desk.push(transport=way)
    assert report.content_bytes <= SIZE + 5 - LIMIT
    assert_arrived(served, desk, report)


@pytest.mark.parametrize("after", range(1, 7))
def test_an_answer_that_is_lost_is_asked_for_again(served: Served, desk: Desk, way: Narrow, after: int) -> None:
    """Within one push no part goes twice although its receipt was lost."""

    def lose(receipt: wire.Receipt) -> wire.Receipt:
        raise HostUnreachable("the answer is lost")

    way.receipts = [lambda receipt: receipt] * after + [lose]
    report = desk.push(transport=way)
    assert sum(way.sent) < SIZE + 3 * LIMIT
    assert_arrived(served, desk, report)


@pytest.mark.parametrize("whose", ["another client", "a copy"])
def test_a_part_of_a_history_that_ended_is_taken_for_no_bundle_of_the_next(
    served: Served, desk: Desk, way: Narrow, whose: str
) -> None:
    """Parts that wait when the machine changes, or the folder is copied, go with the bundles that carry them."""
    interrupted(desk, way, 0)
    if whose == "another client":
        desk.client = "bob"
    else:
        copy = desk.root.with_name(f"{desk.root.name}-copy")
        shutil.copytree(desk.root, copy)
        desk.root = copy
        with desk.open(workspace=copy.name) as state:
            outbox.bind(state, copy.name, served.url)
    with desk.open() as state:
        assert outbox.pending(state) == []
    (desk.root / BIG).unlink()
    interrupted(desk, way, 0)  # an ordinary bundle has the number of the part now
    assert_arrived(served, desk, desk.push(transport=way))


def test_a_file_that_grew_meanwhile_goes_on(served: Served, desk: Desk, way: Narrow) -> None:
    """A recording that was sent in part and is longer now sends what is new of it."""
    arrived = interrupted(desk, way, 4)
    edit(desk, BIG, lambda old: old + os.urandom(3 * LIMIT))
    report = desk.push(transport=way)
    assert report.content_bytes == SIZE + 5 + 3 * LIMIT - arrived * LIMIT
    assert_arrived(served, desk, report)


@pytest.mark.parametrize(("at", "kept"), [(0, 0), (LIMIT + 5, 1), (3 * LIMIT, 3)])
def test_a_file_that_changed_meanwhile_keeps_what_it_still_begins_with(
    served: Served, desk: Desk, way: Narrow, at: int, kept: int
) -> None:
    """The parts before the change count; those behind it are replaced."""
    arrived = interrupted(desk, way, 4)
    edit(desk, BIG, lambda old: old[:at] + b"changed" + old[at + 7 :])
    report = desk.push(transport=way)
    assert report.content_bytes == SIZE + 5 - min(kept, arrived) * LIMIT
    assert_arrived(served, desk, report)


@pytest.mark.parametrize("change", [lambda old: old[: 2 * LIMIT], lambda old: old[:100]], ids=["shorter", "tiny"])
def test_a_file_that_shrank_meanwhile_arrives(
    served: Served, desk: Desk, way: Narrow, change: Callable[[bytes], bytes]
) -> None:
    """A file that needs fewer parts, or none any more."""
    interrupted(desk, way, 4)
    edit(desk, BIG, change)
    report = desk.push(transport=way)
    assert_arrived(served, desk, report)


def test_the_parts_of_a_file_that_is_gone_are_released(served: Served, desk: Desk, way: Narrow) -> None:
    """A file that is deleted between its parts leaves nothing on the server."""
    interrupted(desk, way, 4)
    (desk.root / BIG).unlink()
    report = desk.push(transport=way)
    assert_arrived(served, desk, report)


@pytest.mark.parametrize("rescans", [True, False])
@pytest.mark.parametrize("size", [None, LIMIT])
def test_a_file_that_is_gone_before_its_next_part_stops_no_push(
    served: Served, desk: Desk, way: Narrow, size: int | None, rescans: bool
) -> None:
    """What becomes of a file between the scan and its next part is trouble with this file alone."""
    interrupted(desk, way, 4)
    folders.write(desk.root, "also.txt", b"goes")

    def lose(_: object) -> None:
        (desk.root / BIG).unlink() if size is None else os.truncate(desk.root / BIG, size)

    report = desk.push(transport=way, before=lose, rescans=rescans)
    assert [each.path for each in report.problems] == ([] if rescans else [BIG])
    tree = served.data / "workspaces" / desk.root.name / "tree"
    assert (tree / "also.txt").read_bytes() == b"goes"
    assert_arrived(served, desk, desk.push(transport=way))


def test_a_file_that_was_renamed_meanwhile_goes_on(served: Served, desk: Desk, way: Narrow) -> None:
    """Parts belong to the content, not to the name that it had."""
    arrived = interrupted(desk, way, 4)
    (desk.root / BIG).rename(desk.root / "other.mov")
    report = desk.push(transport=way)
    assert report.content_bytes == SIZE + 5 - arrived * LIMIT
    assert_arrived(served, desk, report)


def test_a_file_that_changes_while_it_is_sent_arrives_as_it_is(served: Served, desk: Desk, way: Narrow) -> None:
    """The rest of its parts stop, it is read again, and goes on."""
    way.on_send = [fine, fine, lambda: edit(desk, BIG, lambda old: old[: 2 * LIMIT] + b"later" + old[2 * LIMIT :])]
    report = desk.push(transport=way)
    assert report.problems == []
    assert_arrived(served, desk, report)


@pytest.mark.parametrize("change", [Path.unlink, lambda path: os.truncate(path, LIMIT // 2)], ids=["gone", "shorter"])
def test_a_file_that_changes_before_it_is_gone_on_with_is_looked_at_again(
    served: Served, desk: Desk, way: Narrow, change: Callable[[Path], None]
) -> None:
    """What of a file was sent is compared when the next parts are planned; it may be gone by then."""
    interrupted(desk, way, 3)
    report = desk.push(transport=way, before=lambda _: change(desk.root / BIG))
    assert_arrived(served, desk, desk.push(transport=way) if report.problems else report)


def test_a_change_that_no_time_shows_is_refused_by_the_digest(served: Served, desk: Desk, way: Narrow) -> None:
    """Bytes that changed under the same size and time are found when the last part is read; the file is left out."""
    path = desk.root / BIG

    def change() -> None:
        before = path.stat()
        with path.open("r+b") as out:
            out.seek(4 * LIMIT)
            out.write(b"unseen")
        os.utime(path, ns=(before.st_mtime_ns, before.st_mtime_ns))

    way.on_send = [fine, fine, change]
    report = desk.push(transport=way)
    assert_arrived(served, desk, report)


def test_a_sparse_file_whose_change_no_time_shows_is_read_again(served: Served, desk: Desk, way: Narrow) -> None:
    """Nothing proves its runs here; once the receiver has found out, the file is not sent again and again."""
    path = desk.root / "disk.img"
    with path.open("wb") as out:
        out.write(os.urandom(3 * LIMIT))
        out.truncate(8 * LIMIT)

    def change(_: object) -> None:
        before = path.stat()
        with path.open("r+b") as out:
            out.write(b"unseen")
        os.utime(path, ns=(before.st_mtime_ns, before.st_mtime_ns))

    report = desk.push(transport=way, before=change)
    assert sum(way.sent) < SIZE + 7 * LIMIT
    assert_arrived(served, desk, report)


@contextmanager
def restarted(tmp_path: Path, desk: Desk, after: int) -> Iterator[tuple[Served, int]]:
    """Send some parts to a server of its own, stop it, and tell how many it has."""
    with serving(tmp_path / "own") as first:
        way = Narrow(open_transport(first.url, timeout=20, max_retries=2))
        arrived = interrupted(desk, way, after)
        way.inner.close()
    yield first, arrived


def pushed_again(tmp_path: Path, desk: Desk, first: Served) -> tuple[PushReport, list[int]]:
    with serving(tmp_path / "own") as second:
        way = Narrow(open_transport(second.url, timeout=20, max_retries=2))
        way.url = first.url  # it is the same server to the workspace
        report = desk.push(transport=way)
        assert_arrived(second, desk, report)
        way.inner.close()
    return report, way.sent


def test_a_server_that_lost_the_parts_gets_them_again(tmp_path: Path, desk: Desk) -> None:
    """Parts that are gone on the server, by time or by loss, begin anew."""
    with restarted(tmp_path, desk, 4) as (first, _):
        shutil.rmtree(first.data / "parts")
    report, sent = pushed_again(tmp_path, desk, first)
    assert report.content_bytes == SIZE + 5
    assert max(sent) < LIMIT + 10_000


def test_parts_that_rot_on_the_server_are_found_and_sent_anew(tmp_path: Path, desk: Desk) -> None:
    """Bytes of a stream that changed on the host's disk do not become a file."""
    with restarted(tmp_path, desk, 4) as (first, _):
        (stream,) = streams_of(first)
        with (first.data / "parts" / stream).open("r+b") as out:
            out.write(b"rotten")
    report, _ = pushed_again(tmp_path, desk, first)
    assert report.content_bytes >= SIZE


def test_a_server_that_restarts_between_parts_goes_on(tmp_path: Path, desk: Desk) -> None:
    """What was acknowledged of a stream is durable, and its hash is made again from the file."""
    with restarted(tmp_path, desk, 4) as (first, arrived):
        assert arrived >= 3
    report, _ = pushed_again(tmp_path, desk, first)
    assert report.content_bytes == SIZE + 5 - arrived * LIMIT


def test_chunks_that_are_too_many_for_a_bundle_go_in_parts(served: Served, desk: Desk, way: Narrow) -> None:
    """A large file of which much is new sends that in parts, and takes the rest from what it was before."""
    desk.push(transport=way)
    edit(desk, BIG, lambda old: old[:LIMIT] + os.urandom(2 * LIMIT) + old[LIMIT : 4 * LIMIT] + os.urandom(LIMIT))
    way.sent = []
    report = desk.push(transport=way, explain=True)
    assert 3 * LIMIT <= report.content_bytes < 3 * LIMIT + LIMIT // 2
    assert max(way.sent) < LIMIT + 10_000
    assert report.reasons is not None and "chunks are new to the server" in report.reasons[0].reason
    assert report.content_bytes + report.avoided_by_chunks_bytes == (desk.root / BIG).stat().st_size
    assert_arrived(served, desk, report)


@pytest.mark.parametrize("after", [1, 2, 3])
def test_chunks_in_parts_go_on_after_a_cut(served: Served, desk: Desk, way: Narrow, after: int) -> None:
    """The same after a cut between their parts."""
    desk.push(transport=way)
    edit(desk, BIG, lambda old: old[:LIMIT] + os.urandom(2 * LIMIT) + old[LIMIT : 4 * LIMIT] + os.urandom(LIMIT))
    arrived = interrupted(desk, way, after)
    report = desk.push(transport=way)
    assert report.content_bytes < (3 - arrived) * LIMIT + 2 * (LIMIT // 2)
    assert_arrived(served, desk, report)


def test_content_that_the_server_asks_for_again_goes_in_parts(served: Served, desk: Desk, way: Narrow) -> None:
    """A large blob that was lost is healed by bundles of the usual size."""
    desk.push(transport=way)
    digest = digest_of((desk.root / BIG).read_bytes()).hex()
    (served.data / "cache" / digest[:2] / digest).unlink()
    assert served.get(f"/api/v1/blobs/{digest}").status == 404  # that is how the server learns of it
    way.sent = []
    report = desk.push(transport=way)
    assert max(way.sent) < LIMIT + 10_000
    assert (report.content_bytes, report.still_wanted) == (SIZE, 0)
    assert_arrived(served, desk, report)


def test_two_large_files_and_a_copy_go_once_each(served: Served, desk: Desk, way: Narrow) -> None:
    """Each content has a stream of its own; a copy needs none."""
    folders.write(desk.root, "other.mov", os.urandom(2 * LIMIT))
    folders.write(desk.root, "copy.mov", (desk.root / BIG).read_bytes())
    report = desk.push(transport=way)
    assert report.content_bytes == SIZE + 2 * LIMIT + 5
    assert_arrived(served, desk, report)


def test_parts_take_no_place_among_the_kept_sequences(served: Served, desk: Desk, way: Narrow) -> None:
    """What was there before a large file came can still be fetched, however many parts it had."""
    folders.write(desk.root, BIG, b"not large yet")
    first = desk.push(transport=way)
    folders.write(desk.root, BIG, os.urandom(15 * LIMIT))
    last = desk.push(transport=way)
    kept = way.inner.sequences(desk.root.name)
    assert [(each.sequence, each.root) for each in kept] == [(1, first.root), (17, last.root)]


@pytest.mark.parametrize("after", [None, 2])
def test_what_is_no_hole_of_a_sparse_file_goes_in_parts(
    served: Served, desk: Desk, way: Narrow, after: int | None
) -> None:
    """A sparse file with much in it sends that in parts, and stays sparse on the host."""
    path = desk.root / "disk.img"
    with path.open("wb") as out:
        for at in (0, 20 * LIMIT, 21 * LIMIT, 50 * LIMIT):
            out.seek(at)
            out.write(os.urandom(LIMIT - 1000))
        out.truncate(64 * LIMIT)
    (desk.root / BIG).unlink()
    if path.stat().st_blocks * 512 > 8 * LIMIT:
        pytest.skip("this file system has no holes")
    arrived = interrupted(desk, way, after) if after else 0
    report = desk.push(transport=way, explain=True)
    assert report.content_bytes < (4 - arrived) * LIMIT + 50_000
    assert max(way.sent) < LIMIT + 10_000
    assert any("bytes are no holes" in each.reason for each in report.reasons or ())
    assert_arrived(served, desk, report)
    tree = served.data / "workspaces" / desk.root.name / "tree"
    assert (tree / "disk.img").stat().st_blocks * 512 < 8 * LIMIT


@pytest.mark.parametrize("after", [0, 3, 6])
def test_moves_are_known_after_the_bundle_that_said_so_was_taken_back(
    served: Served, desk: Desk, way: Narrow, after: int
) -> None:
    """A folder that moved and changed is a move, also where another process sealed it and was killed before it went."""
    for number in range(120):
        folders.write(desk.root, f"a/deep/{number}", os.urandom(20))
    folders.write(desk.root, BIG, b"not large yet")
    desk.push(transport=way)
    (desk.root / "a").rename(desk.root / "b")
    for number in range(120):
        os.utime(desk.root / f"b/deep/{number}", ns=(0, number))
    folders.write(desk.root, BIG, os.urandom(SIZE))
    interrupted(desk, way, after)
    (desk.root / "b").rename(desk.root / "c")
    interrupted(desk, way, max(0, 6 - after))
    (desk.root / "c/deep").rename(desk.root / "deep")
    report = desk.push(transport=way)
    assert report.operations.moved in (1, 2)  # the emptied folder may have stayed one
    assert_arrived(served, desk, report)


# Without a server


def sealed_apart(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Seal into files of a small size, without a server."""
    limits = wire.Limits(bundle_content_bytes=LIMIT)
    monkeypatch.setattr("deltasync.client.seal.Limits", lambda: limits)
    desk.url = None
    desk.push()
    return desk.outbox()


def test_parts_are_sealed_without_a_server(
    served: Served, desk: Desk, way: Narrow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bundle files are of the usual size, sound, and bring the file over when a server is there."""
    files = sealed_apart(desk, monkeypatch)
    assert len(files) == 6 + 2
    assert max(file.stat().st_size for file in files) < LIMIT + 10_000
    assert all(each.reason is None for each in replay.bundle_verify(files))
    report = desk.push(transport=way)
    assert_arrived(served, desk, report)


def test_a_file_that_changes_between_parts_that_are_files(
    served: Served, desk: Desk, way: Narrow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changes between two seals without a server end in the file as it is."""
    sealed_apart(desk, monkeypatch)
    edit(desk, BIG, lambda old: old + os.urandom(2 * LIMIT))
    desk.push()
    report = desk.push(transport=way)
    assert_arrived(served, desk, report)


def assert_replayed(served: Served, desk: Desk, way: Narrow, target: Path) -> None:
    """Carry the files of the outbox to another workspace; it has the same tree then."""
    name = f"{desk.root.name}-copy"
    with desk.open() as state:
        replay.export(state, target)
    (result,) = replay.replay(target, way, workspace=name)
    way.workspace(name, tree_sequence=result.sequence, wait=60.0)
    folders.assert_same(desk.root, served.data / "workspaces" / name / "tree")
    with desk.open() as state:
        outbox.discard_from(state, 1)


def test_a_stream_that_a_bundle_file_names_gets_no_more_parts(
    served: Served, desk: Desk, way: Narrow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that grew since goes in parts of its own: whoever applies the files has the former stream no more."""
    sealed_apart(desk, monkeypatch)
    edit(desk, BIG, lambda old: old + os.urandom(2 * LIMIT))
    desk.push()
    assert_replayed(served, desk, way, tmp_path / "out")


@pytest.mark.parametrize("at", [0, LIMIT + 5])
def test_parts_that_are_files_and_of_no_use_are_replaced(
    served: Served, desk: Desk, way: Narrow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """A file that changed before the outbox had room for all its parts goes on where it is still the same."""
    limits = wire.Limits(bundle_content_bytes=LIMIT)
    monkeypatch.setattr("deltasync.client.seal.Limits", lambda: limits)
    desk.url = None
    assert desk.push(outbox_limit=3 * LIMIT + LIMIT // 2).waiting
    first = len(desk.outbox())
    for _ in range(2):
        edit(desk, BIG, lambda old: old[:at] + os.urandom(7) + old[at + 7 :])
        assert desk.push(outbox_limit=6 * LIMIT).waiting
    desk.push()
    assert len(desk.outbox()) > first
    assert_replayed(served, desk, way, tmp_path / "out")


def test_parts_that_were_files_are_gone_on_with(
    served: Served, desk: Desk, way: Narrow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was sealed without a server, as far as the outbox took it, and has arrived, is not sent again."""
    limits = wire.Limits(bundle_content_bytes=LIMIT)
    monkeypatch.setattr("deltasync.client.seal.Limits", lambda: limits)
    desk.url = None
    assert desk.push(outbox_limit=3 * LIMIT + LIMIT // 2).waiting
    assert interrupted(desk, way, 2) == 3
    with desk.open() as state:
        assert outbox.head(state).acknowledged_sequence in (1, 2)
    assert interrupted(desk, way, 2) >= 3
    report = desk.push(transport=way)
    assert report.content_bytes <= SIZE + 5 - 3 * LIMIT
    assert_arrived(served, desk, report)


def test_an_export_is_in_parts_and_can_be_replayed(
    served: Served, desk: Desk, way: Narrow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`bundle export --full` writes no bundle above the limit, and an empty server takes them all."""
    monkeypatch.setattr("deltasync.client.seal.Limits", lambda: wire.Limits(bundle_content_bytes=LIMIT))
    with desk.open() as state:
        desk.observe(state)
        done = replay.export(state, tmp_path / "out", full=True)
    assert len(done.paths) == 6 + 2
    assert max(path.stat().st_size for path in done.paths) < LIMIT + 10_000
    (result,) = replay.replay(tmp_path / "out", way, workspace=f"{desk.root.name}-copy")
    assert (result.applied, result.root) == (8, done.root)
    way.workspace(f"{desk.root.name}-copy", tree_sequence=8, wait=60.0)
    folders.assert_same(desk.root, served.data / "workspaces" / f"{desk.root.name}-copy" / "tree")


def test_a_part_that_is_missing_is_named(
    desk: Desk, way: Narrow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay stops where a part is not there, as for any bundle, and says which one is needed."""
    monkeypatch.setattr("deltasync.client.seal.Limits", lambda: wire.Limits(bundle_content_bytes=LIMIT))
    with desk.open() as state:
        desk.observe(state)
        done = replay.export(state, tmp_path / "out", full=True)
    done.paths[2].unlink()
    name = f"{desk.root.name}-gap"
    with pytest.raises(SequenceConflict, match=r"bundle 3 of .* is missing"):
        replay.replay(tmp_path / "out", way, workspace=name)
    assert way.workspace(name).sequence == 2
