"""A large file that changed sends what the server has nowhere; whatever happens on the way, it arrives as it is."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import folders
import msgspec
import pytest
from desk import Desk, Meddler, assert_in_step
from serving import Served, serving

from deltasync.client import outbox, recipes
from deltasync.client.ignore import IgnoreRules
from deltasync.client.push import Pusher, PushOptions
from deltasync.client.scan import ScanOptions, scan
from deltasync.client.state import State
from deltasync.client.transport import open_transport
from deltasync.core import wire
from deltasync.core.chunks import AVERAGE_BYTES, Chunker, chunks
from deltasync.core.errors import Corrupt, DeltasyncError, HostBusy, HostUnreachable, NotADeltasyncServer, NotFound
from deltasync.core.hashing import digest_of
from deltasync.core.names import parse_workspace
from deltasync_server.config import StoreConfig
from deltasync_server.receive import Store

SIZE = 6_000_000
SOME = 1 << 20
"""More than the chunks around one small change are."""
BIG = "models/big.bin"


class Counting(Meddler):
    """Counts the recipes that are asked for, and may be an older server."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.recipes: list[str] = []
        self.has_features = True

    def recipe(self, name: str, digest: bytes, average_bytes: int) -> bytes:
        self.recipes.append(digest.hex())
        return self.inner.recipe(name, digest, average_bytes)

    def workspace(self, *arguments: Any, **options: Any) -> wire.WorkspaceState:
        state = self.inner.workspace(*arguments, **options)
        return state if self.has_features else msgspec.structs.replace(state, features=[])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served") / "data") as running:
        yield running


@pytest.fixture
def desk(tmp_path: Path, served: Served) -> Desk:
    """A workspace whose one large file is on the server."""
    made = Desk(tmp_path / tmp_path.name, served.url)
    folders.write(made.root, BIG, random.Random(tmp_path.name).randbytes(SIZE))
    assert made.push().content_bytes == SIZE
    return made


@pytest.fixture
def way(served: Served) -> Iterator[Counting]:
    inner = open_transport(served.url, timeout=20, max_retries=2)
    yield Counting(inner)
    inner.close()


def content(desk: Desk, path: str = BIG) -> bytes:
    return (desk.root / path).read_bytes()


def edited(old: bytes) -> bytes:
    """Insert near the front, overwrite in the middle, append."""
    return old[:50_000] + b"inserted" * 400 + old[50_000:3_000_000] + bytes(5_000) + old[3_005_000:] + b"appended" * 500


def blob_of(served: Served, content: bytes) -> Path:
    name = digest_of(content).hex()
    return served.data / "cache" / name[:2] / name


def test_a_changed_file_sends_what_is_new(served: Served, desk: Desk, way: Counting) -> None:
    """The recipe of the first version is asked for; of later ones the client has its own."""
    before = content(desk)
    folders.write(desk.root, BIG, edited(before))
    report = desk.push(transport=way, explain=True)
    assert 12_000 < report.content_bytes < SOME
    assert report.reasons is not None and "chunks are new to the server)" in report.reasons[0].reason
    assert report.content_bytes + report.avoided_bytes == len(content(desk))
    assert report.avoided_by_chunks_bytes == report.avoided_bytes
    assert report.sent_bytes < report.content_bytes + 2_000
    assert way.recipes == [digest_of(before).hex()]
    assert_in_step(served, desk, report)
    folders.write(desk.root, BIG, content(desk)[:-1_000_000])
    again = desk.push(transport=way)
    assert again.content_bytes < SOME and len(way.recipes) == 1
    assert_in_step(served, desk, again)


@pytest.mark.parametrize("change", ["header", "longer header", "appended", "both ends"])
def test_a_file_under_another_name_finds_its_sibling(served: Served, desk: Desk, change: str) -> None:
    """A copy with another header, or a log that grew under a new name, sends little more than that."""
    old = content(desk)
    new = {
        "header": b"h" * 1024 + old[1024:],
        "longer header": b"h" * 3000 + old[1024:],
        "appended": old + b"a" * 9000,
        "both ends": b"h" * 3000 + old[1024:-500] + b"tail" * 20_000,
    }
    folders.write(desk.root, "models/other.bin", new[change])
    report = desk.push()
    assert report.content_bytes < SOME // 4
    assert_in_step(served, desk, report)


def test_a_file_that_was_moved_and_changed_has_its_source_as_base(served: Served, desk: Desk) -> None:
    """What it was under its former name is its base."""
    (desk.root / "elsewhere").mkdir()
    (desk.root / BIG).rename(desk.root / "elsewhere/big.bin")
    folders.write(desk.root, "elsewhere/big.bin", edited(content(desk, "elsewhere/big.bin")))
    report = desk.push()
    assert report.content_bytes < SOME or report.operations.moved == 0
    assert_in_step(served, desk, report)


def test_a_file_with_nothing_in_common_travels_whole(served: Served, desk: Desk) -> None:
    """Other content under the same name has no recipe."""
    folders.write(desk.root, BIG, random.Random(1).randbytes(SIZE))
    report = desk.push()
    assert (report.content_bytes, report.avoided_by_chunks_bytes) == (SIZE, 0)
    assert_in_step(served, desk, report)


def test_a_copy_or_a_touch_is_not_cut(served: Served, desk: Desk, way: Counting) -> None:
    """What seems to be known is hashed first; where it turns out to be another content it is cut all the same."""
    folders.write(desk.root, "copy.bin", content(desk))
    os.utime(desk.root / BIG, ns=(5, 5))
    report = desk.push(transport=way)
    assert (report.content_bytes, way.recipes) == (0, [])
    with desk.open() as state:
        assert recipes.recipe_of(state, digest_of(content(desk))) is None
    middle = content(desk)[:3_000_000] + b"same size" + content(desk)[3_000_009:]
    folders.write(desk.root, "copy.bin", middle)
    report = desk.push(transport=way)
    assert 0 < report.content_bytes < SOME
    assert_in_step(served, desk, report)


def test_the_user_says_from_which_size_on(served: Served, desk: Desk) -> None:
    """Smaller files are cut when the user wants it, larger ones are not when he does not."""
    small = random.Random(7).randbytes(400_000)
    folders.write(desk.root, "small.bin", small)
    desk.push()
    for least, most in ((SIZE * 2, SIZE + 400_000), (200_000, SOME)):
        desk.scan_options = {"chunk_from_bytes": least}
        folders.write(desk.root, BIG, edited(content(desk)))
        folders.write(desk.root, "small.bin", b"new" + content(desk, "small.bin"))
        report = desk.push()
        assert (report.avoided_by_chunks_bytes == 0) == (least > SIZE) and report.content_bytes < most + 50_000
        assert_in_step(served, desk, report)


def test_a_server_that_knows_no_recipes_gets_whole_files(served: Served, desk: Desk, way: Counting) -> None:
    """The feature is used only where it was announced."""
    folders.write(desk.root, BIG, edited(content(desk)))
    way.has_features = False
    report = desk.push(transport=way)
    assert report.content_bytes == len(content(desk))
    assert_in_step(served, desk, report)


@pytest.mark.parametrize("trouble", ["gone", "damaged unseen", "damaged"])
def test_a_base_that_fails_is_replaced_by_the_whole_file(
    served: Served, desk: Desk, way: Counting, trouble: str
) -> None:
    """A base that vanished or rotted after it was leased: the server asks for the whole, and has what it should."""
    old = content(desk)
    folders.write(desk.root, BIG, edited(old))
    blob = blob_of(served, old)

    def spoil() -> None:
        before = blob.stat()
        if trouble == "gone":
            blob.unlink()
            return
        blob.chmod(0o644)
        with blob.open("r+b") as file:
            file.seek(4_000_000)
            file.write(b"rot")
        if trouble == "damaged unseen":
            blob.chmod(0o444)
            os.utime(blob, ns=(before.st_atime_ns, before.st_mtime_ns))

    way.on_send = [spoil]
    report = desk.push(transport=way)
    assert report.content_bytes == len(content(desk))
    assert_in_step(served, desk, report)
    assert not blob.exists() or digest_of(blob.read_bytes()) == digest_of(old)


def test_a_file_that_changes_on_the_way_is_read_again(served: Served, desk: Desk) -> None:
    """New chunks are proven as they are read; what they were sealed as never mixes with what they are now."""
    old = content(desk)
    folders.write(desk.root, BIG, edited(old))

    def change(_: State) -> None:
        folders.write(desk.root, BIG, edited(old).replace(b"inserted", b"another!"))

    report = desk.push(before=change)
    assert report.problems == []
    assert_in_step(served, desk, report)


def test_a_change_outside_of_what_is_sent_is_for_the_next_push(served: Served, desk: Desk) -> None:
    """The server makes the version that was read, of what it holds; the next push brings what came after."""
    old = content(desk)
    folders.write(desk.root, BIG, edited(old))
    sealed = digest_of(content(desk)).hex()

    def change(_: State) -> None:
        folders.write(desk.root, BIG, b"X" * 10 + edited(old)[10:])

    report = desk.push(before=change)
    assert served.get(f"/api/v1/blobs/{sealed}").status == 200
    assert served.get(f"/api/v1/workspaces/{desk.root.name}").json["root"] == report.root
    assert_in_step(served, desk, desk.push())


def test_a_bundle_that_did_not_arrive_goes_again_as_a_recipe(served: Served, desk: Desk, way: Counting) -> None:
    """A sealed bundle is sent again, later and by another process, with the same identity."""
    folders.write(desk.root, BIG, edited(content(desk)))

    def fail() -> None:
        raise HostUnreachable("the test cut it")

    way.on_send = [fail] * 4
    way.inner.max_retries = 0
    with pytest.raises(HostUnreachable):
        desk.push(transport=way)
    with desk.open() as state:
        (row,) = outbox.pending(state)
        assert outbox.metadata_of(state, row.sequence).manifest.requires == ["recipes"]
        assert row.content_bytes < SOME
    report = desk.push()
    assert report.content_bytes < SOME
    assert_in_step(served, desk, report)


@pytest.mark.parametrize("error", [HostBusy("busy"), NotADeltasyncServer("odd"), Corrupt("rot"), NotFound("none")])
def test_a_recipe_that_cannot_be_had_only_costs_bytes(
    served: Served, desk: Desk, way: Counting, error: DeltasyncError
) -> None:
    """Whatever the server answers instead of a recipe, the file travels whole, and all others with it."""
    folders.write(desk.root, BIG, edited(content(desk)))
    folders.write(desk.root, "small", desk.root.name)

    def fail(*_: object) -> bytes:
        raise error

    way.recipe = fail  # type: ignore[method-assign]
    report = desk.push(transport=way)
    assert report.content_bytes == len(content(desk)) + len(desk.root.name)
    assert_in_step(served, desk, report)


def test_an_empty_recipe_is_not_remembered(served: Served, desk: Desk, way: Counting) -> None:
    """The next push asks again."""
    old = content(desk)
    folders.write(desk.root, BIG, edited(old))
    way.recipe = lambda *_: b""  # type: ignore[method-assign]
    assert desk.push(transport=way).avoided_by_chunks_bytes == 0
    with desk.open() as state:
        assert recipes.recipe_of(state, digest_of(old)) is None


def test_a_bundle_with_recipes_is_sealed_anew_for_a_server_without(served: Served, desk: Desk, way: Counting) -> None:
    """A server that went back to an older release does not hold the workspace up."""
    folders.write(desk.root, BIG, edited(content(desk)))

    def fail() -> None:
        raise HostUnreachable("the test cut it")

    way.on_send = [fail] * 4
    way.inner.max_retries = 0
    with pytest.raises(HostUnreachable):
        desk.push(transport=way)
    way.on_send, way.has_features = [], False
    report = desk.push(transport=way)
    assert report.content_bytes == len(content(desk))
    assert_in_step(served, desk, report)


def test_few_recipes_are_asked_for_early(desk: Desk, way: Counting) -> None:
    """Files that were only touched cost the server at most a few recipes that nobody wants."""
    for number in range(6):
        folders.write(desk.root, f"more/{number}", random.Random(number).randbytes(200_000))
    desk.scan_options = {"chunk_from_bytes": 150_000}
    desk.push()
    for number in range(6):
        os.utime(desk.root / f"more/{number}", ns=(1, 1))
    with desk.open() as state, Pusher(state, way, PushOptions()) as pusher:
        options = ScanOptions(ignore=IgnoreRules(desk.root), settle_seconds=0.0, chunk_from_bytes=150_000)
        scan(state, options, expect=pusher.expect)
        assert pusher.run().content_bytes == 0
    assert len(way.recipes) <= 2


def test_a_rehearsal_says_how_much_would_travel(desk: Desk) -> None:
    """A dry run counts new chunks as the push does."""
    folders.write(desk.root, BIG, edited(content(desk)))
    dry, wet = desk.push(dry_run=True), desk.push()
    assert (dry.content_bytes, dry.avoided_by_chunks_bytes) == (wet.content_bytes, wet.avoided_by_chunks_bytes)


def test_without_a_server_whole_files_are_sealed(tmp_path: Path) -> None:
    """A bundle file must be good for any receiver."""
    alone = Desk(tmp_path / "alone")
    folders.write(alone.root, BIG, random.Random(2).randbytes(SIZE))
    alone.push()
    folders.write(alone.root, BIG, edited(content(alone)))
    assert alone.push().content_bytes == len(content(alone))
    with alone.open() as state:
        for row in outbox.pending(state):
            assert outbox.metadata_of(state, row.sequence).manifest.requires == []


def test_kept_bundles_with_recipes_lead_another_server_there(tmp_path: Path) -> None:
    """A server that keeps bundles survives a kill without a journal for what was made, and they replay elsewhere."""
    desk = Desk(tmp_path / "kept")
    folders.write(desk.root, BIG, random.Random(3).randbytes(SIZE))
    with serving(tmp_path / "data", "--keep-bundles") as server:
        desk.url = server.url
        desk.push(wait=0)
        folders.write(desk.root, BIG, edited(content(desk)))
        report = desk.push(wait=0)
        assert report.content_bytes < SOME
        server.process.kill()
    with serving(tmp_path / "data", "--keep-bundles") as server:
        assert server.get("/api/v1/workspaces/kept").json["wanted"] == []
        desk.url = server.url
        assert_in_step(server, desk, report)
    with Store(StoreConfig(data=tmp_path / "data", keep_bundles=True)) as store:
        assert store.journal.checkpoint() == 2
    kept = sorted((tmp_path / "data/bundles/kept").iterdir())
    with Store(StoreConfig(data=tmp_path / "other")) as store:
        store.recover()
        for file in kept:
            with file.open("rb") as sealed:
                receipt = store.receive(parse_workspace("kept"), sealed, expected_identity=None)
        store.trees.bring_forward("kept")
        folders.assert_same(desk.root, store.trees.path("kept"))
    assert len(kept) == 2 and receipt.root == report.root


@pytest.mark.parametrize("size", [0, 4096, 65_536])
def test_a_file_of_no_byte_or_of_exactly_one_chunk_grows_and_shrinks(served: Served, desk: Desk, size: int) -> None:
    """The smallest chunk, the largest one, and none: as a file of its own, and as the base of a larger one."""
    desk.scan_options = {"chunk_from_bytes": 1}
    one = b"1" * 65_536
    chunker = Chunker(AVERAGE_BYTES)
    chunker.update(memoryview(one[:size]))
    assert len(list(chunks(chunker.finish()))) == (1 if size else 0)
    folders.write(desk.root, BIG, one[:size])
    assert_in_step(served, desk, desk.push())
    folders.write(desk.root, BIG, one[:size] + content(desk, BIG)[::-1] + random.Random(size).randbytes(200_000))
    report = desk.push()
    assert report.content_bytes <= 200_000 + 2 * size
    assert_in_step(served, desk, report)
    folders.write(desk.root, BIG, one[:size])
    assert desk.push().content_bytes == 0
