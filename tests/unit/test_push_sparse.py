"""A sparse file sends what is no hole, and stays sparse on the host; whatever happens, the content is the right one."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import folders
import msgspec
import pytest
import sparse
from desk import Desk, Meddler, assert_in_step
from serving import Served, serving
from user import User

from deltasync.client import holes, pack, ranges, replay
from deltasync.client.pieces import SLOWEST_HASH_BYTES_PER_SECOND, making_seconds
from deltasync.client.seal import Writer, composed
from deltasync.client.transport import open_transport
from deltasync.core.delta import diff
from deltasync.core.errors import HostUnreachable
from deltasync.core.hashing import digest_of
from deltasync.core.manifest import EMPTY_ROOT

MIB = 1 << 20
SIZE = 48 * MIB
DATA = {0: b"head", 9 * MIB: random.Random(1).randbytes(300_000), 47 * MIB: b"behind"}
DISK = "vm/disk.img"
SOME = 500_000
"""More than the data, and far less than the holes."""


@pytest.fixture(autouse=True)
def _holes(tmp_path: Path) -> None:
    sparse.require_holes(tmp_path)


@pytest.fixture(scope="module", params=["auto", "copy"])
def served(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served") / "data", "--link", request.param) as running:
        yield running


@pytest.fixture
def desk(tmp_path: Path, served: Served) -> Desk:
    """A workspace that the server holds, with a sparse file that it lacks; no two tests have the same."""
    made = Desk(tmp_path / tmp_path.name, served.url)
    folders.write(made.root, "small", tmp_path.name)
    made.push()
    sparse.write(made.root / DISK, SIZE, DATA | {20 * MIB: tmp_path.name.encode()})
    return made


@pytest.fixture
def way(served: Served) -> Iterator[Meddler]:
    inner = open_transport(served.url, timeout=20, max_retries=2)
    yield Meddler(inner)
    inner.close()


def blob_of(served: Served, content: bytes) -> Path:
    name = digest_of(content).hex()
    return served.data / "cache" / name[:2] / name


def assert_sparse(served: Served, desk: Desk, path: str = DISK) -> None:
    tree = served.data / "workspaces" / desk.root.name / "tree"
    for place in (tree / path, blob_of(served, (desk.root / path).read_bytes())):
        with place.open("rb") as file:
            os.fsync(file.fileno())
        assert sparse.space(place) < 3 * MIB


def test_a_sparse_file_sends_its_data_and_stays_sparse(served: Served, desk: Desk) -> None:
    """Holes are neither read nor sent nor written, in the cache and in the tree."""
    report = desk.push(explain=True)
    assert report.content_bytes < SOME and report.sent_bytes < SOME
    assert report.content_bytes + report.avoided_bytes == SIZE
    assert report.reasons is not None and "bytes are no holes" in report.reasons[-1].reason
    assert_in_step(served, desk, report)
    assert_sparse(served, desk)


def test_a_fetched_file_is_sparse_as_well(served: Served, desk: Desk, tmp_path: Path) -> None:
    """Long zeros are left out of a new file."""
    desk.push()
    dest, user = tmp_path / "dest", User(tmp_path / "home")
    done = user.run("fetch", "--from", served.url, "--workspace", desk.root.name, dest)
    assert done.code == 0, done.err
    folders.assert_same(desk.root, dest)
    with (dest / DISK).open("rb") as file:
        os.fsync(file.fileno())
    assert sparse.space(dest / DISK) < 3 * MIB


def test_a_rehearsal_counts_holes_as_the_push_does(desk: Desk) -> None:
    """A dry run looks at the file as well."""
    dry, wet = desk.push(dry_run=True), desk.push()
    assert (dry.content_bytes, dry.avoided_bytes) == (wet.content_bytes, wet.avoided_bytes)


def test_a_file_that_is_one_hole_sends_nothing(served: Served, desk: Desk) -> None:
    """A recipe may be zeros alone."""
    sparse.write(desk.root / DISK, SIZE + len(served.url), {})
    report = desk.push()
    assert report.content_bytes == 0
    assert_in_step(served, desk, report)
    assert_sparse(served, desk)


def test_what_was_written_into_a_hole_is_sent(served: Served, desk: Desk) -> None:
    """A later version of a sparse file is cut: what it holds already is taken from there, holes stay holes."""
    desk.push()
    with (desk.root / DISK).open("r+b") as out:
        out.seek(30 * MIB)
        out.write(b"new" * 1000)
        out.truncate(SIZE + 5 * MIB)
    report = desk.push()
    assert report.content_bytes < 200_000
    assert_in_step(served, desk, report)
    assert_sparse(served, desk)


def test_small_holes_are_not_worth_a_segment(desk: Desk) -> None:
    """From 64 KiB on they are; of a file with very many the largest count."""
    sparse.write(desk.root / DISK, 4 * MIB, {0: b"x" * 8192, 65536: b"y" * 4096, 2 * MIB: b"z" * (2 * MIB)})
    desk.push()
    with desk.open() as state:
        created = {each.path: each for each in diff(EMPTY_ROOT, state.observed_root(), state.load)}
    operation = created[DISK]
    assert holes.holes_of(desk.root, operation) == [(65536 + 4096, 2 * MIB)]
    assert holes.holes_of(desk.root, msgspec.structs.replace(operation, size=operation.size + 1)) == []
    assert holes.holes_of(desk.root, msgspec.structs.replace(operation, path="vm")) == []
    assert holes.holes_of(desk.root, msgspec.structs.replace(operation, path="gone/disk.img")) == []


def test_of_very_many_holes_the_largest_count(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe has room for so many."""
    monkeypatch.setattr(holes, "HOLES_MAX", 3)
    sparse.write(desk.root / DISK, 4 * MIB, dict.fromkeys((0, 100000, 200000, 300000, 2 * MIB, 3 * MIB), b"x"))
    with desk.open() as state:
        desk.observe(state)
        created = {each.path: each for each in diff(EMPTY_ROOT, state.observed_root(), state.load)}
    found = holes.holes_of(desk.root, created[DISK])
    assert len(found) == 3 and all(end - start > MIB // 2 for start, end in found)


def written(path: Path, where: int, *, is_hidden: bool = False) -> None:
    """Write a few bytes into a file; is_hidden: its time says nothing of it."""
    before = path.stat()
    with path.open("r+b") as out:
        out.seek(where)
        out.write(b"meanwhile")
    if is_hidden:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("is_hidden", [False, True])
def test_data_that_changes_on_the_way_is_read_again(
    served: Served, desk: Desk, way: Meddler, *, is_hidden: bool
) -> None:
    """Behind a time that was set back the server finds it out, and asks for the whole: that is another content now."""
    way.on_send = [lambda: written(desk.root / DISK, 9 * MIB, is_hidden=is_hidden)]
    report = desk.push(transport=way)
    assert report.problems == []
    assert_in_step(served, desk, report)
    assert_sparse(served, desk)


@pytest.mark.parametrize("is_hidden", [False, True])
def test_a_hole_that_is_filled_on_the_way_is_for_the_next_push(
    served: Served, desk: Desk, way: Meddler, *, is_hidden: bool
) -> None:
    """What was sealed arrives, for a hole was zeros then; the next push brings what came after."""
    sealed = digest_of((desk.root / DISK).read_bytes()).hex()
    way.on_send = [lambda: written(desk.root / DISK, 40 * MIB, is_hidden=is_hidden)]
    report = desk.push(transport=way)
    assert served.get(f"/api/v1/blobs/{sealed}").status == 200
    assert served.get(f"/api/v1/workspaces/{desk.root.name}").json["root"] == report.root
    assert_in_step(served, desk, desk.push())
    assert_sparse(served, desk)


def test_a_file_that_was_only_touched_since_is_proven_here(served: Served, desk: Desk, way: Meddler) -> None:
    """It goes out as it was sealed, and its new time with the next push."""
    way.on_send = [lambda: os.utime(desk.root / DISK, ns=(5, 5))]
    report = desk.push(transport=way)
    assert report.content_bytes < SOME
    assert_sparse(served, desk)
    assert_in_step(served, desk, desk.push())


def test_what_a_server_lost_is_sent_again_as_a_sparse_file(served: Served, desk: Desk) -> None:
    """The bundle that heals has zeros as well."""
    desk.push()
    content = (desk.root / DISK).read_bytes()
    blob_of(served, content).unlink()
    served.get(f"/api/v1/blobs/{digest_of(content).hex()}")  # it sees that the file is gone, and wants it back
    assert served.get(f"/api/v1/workspaces/{desk.root.name}").json["wanted"] == [digest_of(content).hex()]
    report = desk.push()
    assert report.bundles == 1 and report.sent_bytes < SOME
    assert_in_step(served, desk, report)
    assert_sparse(served, desk)


def test_a_base_that_fails_is_replaced_by_the_whole_file(served: Served, desk: Desk, way: Meddler) -> None:
    """A version with a base and with holes: without the base the server asks for the whole, holes and all."""
    desk.push()
    blob = blob_of(served, (desk.root / DISK).read_bytes())
    with (desk.root / DISK).open("r+b") as out:
        out.seek(30 * MIB)
        out.write(b"new" * 1000)
    way.on_send = [blob.unlink]
    report = desk.push(transport=way)
    assert report.content_bytes == SIZE
    assert_in_step(served, desk, report)


def test_a_bundle_that_did_not_arrive_goes_again(served: Served, desk: Desk, way: Meddler) -> None:
    """A sealed bundle with zeros is sent again, by another process, as one."""

    def fail() -> None:
        raise HostUnreachable("the test cut it")

    way.on_send = [fail] * 4
    way.inner.max_retries = 0
    with pytest.raises(HostUnreachable):
        desk.push(transport=way)
    report = desk.push()
    assert report.content_bytes < SOME
    assert_in_step(served, desk, report)
    assert_sparse(served, desk)


def test_bundle_files_have_zeros_and_replay(served: Served, desk: Desk) -> None:
    """What was sealed without a server is small, proven, and makes a sparse file wherever it is applied."""
    alone = Desk(desk.root.with_name(desk.root.name + "-alone"))
    sparse.write(alone.root / DISK, SIZE, DATA | {20 * MIB: alone.root.name.encode()})
    report = alone.push()
    assert report.content_bytes < SOME and report.sent_bytes < SOME
    assert pack.carried_digests(alone.outbox()[0])[1] == {digest_of((alone.root / DISK).read_bytes()).hex()}
    alone.url = served.url
    sent = alone.push()
    assert_in_step(served, alone, sent)
    assert_sparse(served, alone)


def test_a_change_behind_the_time_of_the_file_gets_into_no_bundle_file(desk: Desk) -> None:
    """Nobody may check a bundle file for long: all of the file is hashed while it is sealed, its zeros as well."""
    alone = Desk(desk.root.with_name("alone"))
    sparse.write(alone.root / DISK, SIZE, DATA)

    alone.push(before=lambda _: written(alone.root / DISK, 9 * MIB, is_hidden=True))
    (bundle,) = alone.outbox()
    assert pack.carried_digests(bundle)[1] == {digest_of((alone.root / DISK).read_bytes()).hex()}


def test_an_export_and_a_folder_carry_sparse_files(served: Served, desk: Desk, tmp_path: Path) -> None:
    """`bundle export --full` and `--to file://` write a few bytes, which make the same tree."""
    usb, exported = tmp_path / "usb", tmp_path / "exported"
    usb.mkdir()
    desk.push()
    with desk.open() as state:
        replay.export(state, exported, full=True)
    carried = Desk(tmp_path / (tmp_path.name + "-carried"), usb.as_uri())
    sparse.write(carried.root / DISK, SIZE, DATA)
    carried.push()
    for folder in (exported, usb):
        assert sum(file.stat().st_size for file in folder.iterdir()) < SOME
    with serving(tmp_path / "data") as other:
        transport = open_transport(other.url, timeout=20)
        for folder, where in ((exported, desk), (usb, carried)):
            (found,) = replay.replay(folder, transport)
            path = f"/api/v1/workspaces/{found.workspace}?tree_sequence={found.sequence}&wait=20"
            assert other.get(path).json["root"] == found.root
            assert_sparse(other, where)
        transport.close()


def test_a_server_is_waited_for_by_what_it_makes() -> None:
    """A tebibyte of zeros is a few bytes on the wire and minutes of hashing."""
    plan = ranges.sparse(1 << 40, [(0, 1 << 40)])
    assert plan is not None
    writer = Writer("w", "/w", "a" * 32, "1" * 32)
    manifest = composed((), writer, sequence=1, parent_root=EMPTY_ROOT, root=EMPTY_ROOT).manifest
    assert making_seconds(manifest) == 0
    assert making_seconds(manifest, [plan.recipe]) == (1 << 40) / SLOWEST_HASH_BYTES_PER_SECOND > 3600


def test_a_layout_becomes_exactly_its_segments() -> None:
    """Holes at both ends, side by side with data, and none."""
    for found, body in (
        ([(0, 10)], [(255, 10), (0, 90)]),
        ([(90, 100)], [(0, 90), (255, 10)]),
        ([(5, 10), (20, 30)], [(0, 5), (255, 5), (0, 10), (255, 10), (0, 70)]),
    ):
        plan = ranges.sparse(100, found)
        assert plan is not None and [(each.base, each.size) for each in plan.recipe.segments()] == body
        assert (plan.recipe.size, plan.recipe.zero_bytes) == (100, sum(end - start for start, end in found))
    assert ranges.sparse(100, []) is None


def test_zeros_at_an_end_make_no_file_like_another(desk: Desk, served: Served) -> None:
    """Sparse files of several sizes are no bases of each other, though all of them end in zeros."""
    for number in range(3):
        data = {MIB: random.Random(number).randbytes(100_000)}
        sparse.write(desk.root / f"vm/{number}.img", (6 + number) * MIB, data)
    report = desk.push()
    with desk.open() as state:
        assert state.db.execute("SELECT count(*) FROM recipes").fetchone() == (0,)
    assert_in_step(served, desk, report)
