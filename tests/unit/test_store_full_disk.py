"""A full disk: a bundle is refused whole, what was there stays, and all goes on when space returns."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from commands import shell
from finished import RETURNS, Finished
from sender import DAY, NAME, Sender, assert_tree, give, tree_of
from serving import SECONDS, until

from deltasync.core import bundle, wire
from deltasync.core.errors import NoSpace, NotFound
from deltasync.core.hashing import digest_of
from deltasync.core.jobs import State
from deltasync.core.manifest import EMPTY_ROOT
from deltasync.core.names import WorkspaceName
from deltasync.core.part import Part
from deltasync.disk import Folder
from deltasync_server.collect import Collection
from deltasync_server.config import StoreConfig
from deltasync_server.jobs import returns
from deltasync_server.jobs.desk import Jobs
from deltasync_server.jobs.leftovers import MARK
from deltasync_server.receive import Store
from deltasync_server.room import space_of
from deltasync_server.state import blob_rows
from deltasync_server.tenants import DEFAULT

PIECE = 1 << 16
pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs needs root")]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 MiB and 3,000 inodes."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m,nr_inodes=3000", "tmpfs", str(mounted)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this system mounts no tmpfs")
    yield mounted
    subprocess.run(["umount", "--lazy", str(mounted)], check=True)


@pytest.fixture
def store(disk: Path) -> Iterator[Store]:
    with Store(StoreConfig(disk / "data", low_disk_bytes=0)) as opened:
        opened.recover()
        yield opened


def fill(disk: Path, leave_bytes: int) -> Path:
    """Use up the disk but for so many bytes."""
    ballast = disk / "ballast"
    free = os.statvfs(disk)
    with ballast.open("wb") as out:
        out.write(bytes(max(0, free.f_bavail * free.f_frsize - leave_bytes)))
    return ballast


def noise(seed: int, size: int) -> bytes:
    return b"".join((seed * 1_000_003 + number).to_bytes(8, "little") * 2 for number in range(size // 16))


@pytest.mark.parametrize("leave_bytes", [0, 4096, 100_000, 400_000, 1_500_000, 3_200_000, 3_600_000])
def test_a_bundle_that_does_not_fit_changes_nothing(store: Store, disk: Path, leave_bytes: int) -> None:
    """Wherever the space ends, the bundle is refused whole; the same bundle is taken when space returns."""
    sender = Sender()
    sender.send(store, sender.tree(a=b"first"))
    assert_tree(store, sender)
    ballast = fill(disk, leave_bytes)
    flat = sender.tree(a=b"second", **{f"f{n}": noise(n, 100_000) for n in range(30)})
    metadata, sealed = sender.seal(flat)
    try:
        receipt = give(store, metadata, sealed)
    except NoSpace:
        assert store.workspace(NAME).sequence == 1
        assert not list((store.config.data / "staging").iterdir())
        ballast.unlink()
        receipt = give(store, metadata, sealed)
        assert not receipt.duplicate
    ballast.unlink(missing_ok=True)
    sender.move_on(flat)
    assert_tree(store, sender)
    assert store.figures()["blobs"] == len({entry.digest for entry in flat.values()}) + 1


def begin(store: Store, sender: Sender, **files: bytes) -> tuple[str, list[bytes]]:
    """Begin the upload of a bundle; returns its id and its pieces."""
    metadata, sealed = sender.seal(sender.tree(**files))
    request = wire.UploadRequest(kind="bundle", workspace=NAME, identity=metadata.identity.hex(), chunk_size=PIECE)
    upload_id = store.uploads.initiate(DEFAULT, request, NAME).upload_id
    return upload_id, [sealed[at : at + PIECE] for at in range(0, len(sealed), PIECE)]


def put_all(store: Store, upload_id: str, pieces: list[bytes]) -> int:
    """Send pieces until the disk has no room; returns how many it took."""
    number = 0
    try:
        for number, piece in enumerate(pieces):
            store.uploads.put(DEFAULT, upload_id, number, io.BytesIO(piece))
    except NoSpace:
        return number
    return len(pieces)


def free(disk: Path) -> int:
    found = os.statvfs(disk)
    return found.f_bavail * found.f_frsize


def test_a_file_that_does_not_fit_goes_on_when_space_returns(store: Store, disk: Path) -> None:
    """The piece that found no room does not count, those before it stay, and nothing is sent twice but that one."""
    content = os.urandom(6_000_000)
    request = wire.UploadRequest(
        kind="file",
        filepath="/a",
        hostname="desk",
        file_size=len(content),
        chunk_size=PIECE,
        blake3=digest_of(content).hex(),
    )
    upload_id = store.uploads.initiate(DEFAULT, request).upload_id
    cut = [content[at : at + PIECE] for at in range(0, len(content), PIECE)]
    ballast = fill(disk, len(content) // 2)
    number = put_all(store, upload_id, cut)
    ballast.unlink()
    assert store.uploads.state(DEFAULT, upload_id).present == [(0, number - 1)]
    for late in range(number, len(cut)):
        store.uploads.put(DEFAULT, upload_id, late, io.BytesIO(cut[late]))
    stored = store.complete_upload(DEFAULT, upload_id, wire.UploadComplete())
    assert isinstance(stored, wire.StoredFile) and stored.file_size == len(content)


def test_a_file_that_is_larger_than_the_disk_is_not_begun(store: Store) -> None:
    """What was announced is compared with what is free, and the refusal names both (spec ST-89)."""
    request = wire.UploadRequest(kind="file", filepath="/a", hostname="d", file_size=1 << 30, sha256="0" * 64)
    with pytest.raises(NoSpace, match=r"1\.0 GiB to write, 2.\.. MiB free") as caught:
        store.uploads.initiate(DEFAULT, request)
    assert caught.value.facts["needed_bytes"] == 1 << 30


def test_an_upload_that_does_not_fit_gives_its_space_back(disk: Path) -> None:
    """No piece touches the reserve, the bundle is refused with the figures, and a small one is taken at once."""
    with Store(StoreConfig(disk / "data")) as store:
        store.recover()
        before = free(disk)
        sender = Sender()
        upload_id, pieces = begin(store, sender, a=os.urandom(30_000_000))
        for number, piece in enumerate(pieces):
            try:
                store.uploads.put(DEFAULT, upload_id, number, io.BytesIO(piece))
            except NoSpace as error:
                refusal = error
                break
            assert free(disk) >= space_of(store.config)[1]
        free_bytes, reserve_bytes = refusal.facts["free_bytes"], refusal.facts["reserve_bytes"]
        assert isinstance(free_bytes, int) and isinstance(reserve_bytes, int)
        assert refusal.facts["needed_bytes"] == PIECE and free_bytes - PIECE < reserve_bytes <= free_bytes
        assert "64.0 KiB to write" in refusal.sentence and "the reserve of 1.2 MiB" in refusal.sentence
        with pytest.raises(NotFound):
            store.uploads.state(DEFAULT, upload_id)
        assert free(disk) > before - 100_000
        sender.send(store, sender.tree(b=b"small"))
        assert_tree(store, sender)


def test_an_upload_that_cannot_be_applied_gives_its_space_back(store: Store, disk: Path) -> None:
    """All of its pieces fit, and then what it carries does not: the bundle is refused and nothing of it stays."""
    sender = Sender()
    upload_id, pieces = begin(store, sender, **{f"f{n}": os.urandom(700_000) for n in range(20)})
    assert put_all(store, upload_id, pieces) == len(pieces)
    told = wire.UploadComplete(total_chunks=len(pieces), file_size=sum(map(len, pieces)))
    with pytest.raises(NoSpace):
        store.complete_upload(DEFAULT, upload_id, told)
    assert not list((disk / "data/uploads").iterdir())
    sender.send(store, sender.tree(b=b"small"))
    assert_tree(store, sender)


def test_uploads_that_nobody_sends_give_way(disk: Path) -> None:
    """Where a bundle needs space, what an earlier process left goes; what is being sent stays (spec ST-89)."""
    sender = Sender()
    config = StoreConfig(disk / "data")
    content = {"a": os.urandom(8_000_000)}
    with Store(config) as store:
        store.recover()
        old, pieces = begin(store, sender, **content)
        put_all(store, old, pieces)
    with Store(config) as store:
        store.recover()
        assert store.uploads.state(DEFAULT, old).uploaded_chunks == len(pieces)
        young, _ = begin(store, sender, **content)
        put_all(store, young, pieces[:10])
        ballast = fill(disk, 500_000)
        sender.send(store, sender.tree(b=b"small"))
        assert os.listdir(disk / "data/uploads") == [young]
        ballast.unlink()
        assert_tree(store, sender)


def test_uploads_that_would_not_be_enough_stay(disk: Path) -> None:
    """Nothing is taken from a sender in vain."""
    sender = Sender()
    config = StoreConfig(disk / "data")
    with Store(config) as store:
        store.recover()
        upload_id, pieces = begin(store, sender, a=b"one")
        put_all(store, upload_id, pieces)
    with Store(config) as store:
        store.recover()
        fill(disk, 500_000)
        with pytest.raises(NoSpace):
            give(store, *sender.seal(sender.tree(b=b"small")))
        assert os.listdir(disk / "data/uploads") == [upload_id]


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that is not in use right now is one that nobody uses."""
    monkeypatch.setattr("deltasync_server.streams.GIVES_WAY_SECONDS", -1.0)


def send_half(store: Store, sender: Sender, size: int) -> None:
    """Send the first part of a content."""
    content = os.urandom(size)
    metadata = sender.compose([], sender.root, "parts")

    def read(_: Part) -> Generator[bytes, None, bytes]:
        yield content
        return digest_of(content)

    give(store, metadata, b"".join(bundle.seal_part(metadata, Part(b"\x01" * 32, 0, size), read)))
    sender.sequence += 1


def test_half_a_content_fills_no_disk_for_good(disk: Path, late: None) -> None:
    """Where a bundle needs space, parts that nobody goes on with give way (spec ST-96)."""
    sender = Sender()
    with Store(StoreConfig(disk / "data")) as store:
        store.recover()
        send_half(store, sender, 8_000_000)
        fill(disk, 500_000)
        sender.send(store, sender.tree(b=b"small"))
        assert os.listdir(disk / "data/parts") == [] and store.figures()["streams"] == 0
        assert_tree(store, sender)


def test_parts_that_would_not_be_enough_stay(disk: Path, late: None) -> None:
    """Nothing is taken from a sender in vain."""
    sender = Sender()
    with Store(StoreConfig(disk / "data")) as store:
        store.recover()
        send_half(store, sender, 1_000)
        fill(disk, 500_000)
        with pytest.raises(NoSpace):
            give(store, *sender.seal(sender.tree(b=b"small")))
        assert len(os.listdir(disk / "data/parts")) == 1


def test_parts_that_somebody_uses_stay(disk: Path) -> None:
    """A minute must pass: the next part may be on its way."""
    sender = Sender()
    with Store(StoreConfig(disk / "data")) as store:
        store.recover()
        send_half(store, sender, 8_000_000)
        fill(disk, 500_000)
        with pytest.raises(NoSpace):
            give(store, *sender.seal(sender.tree(b=b"small")))
        assert store.figures()["stream_bytes"] == 8_000_000


@pytest.mark.parametrize("leave_bytes", [0, 4096, 40_000])
def test_a_store_starts_on_a_disk_that_parts_have_filled(disk: Path, leave_bytes: int) -> None:
    """Streams are given up before a store is not opened (spec ST-96)."""
    sender = Sender()
    config = StoreConfig(disk / "data")
    with Store(config) as store:
        store.recover()
        sender.send(store, sender.tree(a=b"first"))
        send_half(store, sender, 8_000_000)
    fill(disk, leave_bytes)
    with Store(config) as store:
        store.recover()
        sender.send(store, sender.tree(c=b"second"))
        assert_tree(store, sender)
        assert not os.listdir(disk / "data/parts")


def test_parts_that_nobody_can_send_again_stay_on_a_full_disk(disk: Path, late: None) -> None:
    """A replay that finds no room goes on when there is some: the numbers of its parts are spent (spec ST-96)."""
    sender = Sender()
    config = StoreConfig(disk / "data", keeps_streams=True)
    with Store(config) as store:
        store.recover()
        send_half(store, sender, 8_000_000)
    ballast = fill(disk, 0)
    with pytest.raises(NoSpace), Store(config) as store:
        store.recover()
        give(store, *sender.seal(sender.tree(b=b"small")))
    ballast.unlink()
    with Store(config) as store:
        store.recover()
        assert store.figures()["stream_bytes"] == 8_000_000


@pytest.mark.parametrize("leave_bytes", [0, 4096, 40_000])
def test_a_store_starts_on_a_disk_that_sessions_have_filled(disk: Path, leave_bytes: int) -> None:
    """The sessions of a server that died are given up before a store is not opened (spec J-42)."""
    sender, config = Sender(), StoreConfig(disk / "data", keeps_streams=True)
    with Store(config) as store:
        store.recover()
        sender.send(store, sender.tree(a=b"first"))
    work = disk / "data/sessions/ds_1_00000001/work"
    work.mkdir(parents=True)
    fill(disk, leave_bytes).rename(work / "file")
    with Store(config) as store:
        store.recover()
        sender.send(store, sender.tree(c=b"second"))
        assert_tree(store, sender)
        assert not os.listdir(disk / "data/sessions")


def test_what_was_fetched_is_let_go_on_a_low_disk(disk: Path) -> None:
    """Below the reserve nothing is taken, but that what was acknowledged gives way to nothing, and its content goes."""
    with Store(StoreConfig(disk / "data")) as store:
        store.recover()
        job = Finished(disk / "data/sessions/ds_1_00000001")
        job.out("x", noise(1, 100_000))
        returned = job.collect(store)
        store.upkeep()
        fill(disk, 600_000)
        assert store.room.is_low()
        with pytest.raises(NoSpace):
            give(store, *Sender().seal({}))
        returns.release(store, job.tenant, returned)
        assert store.workspace(WorkspaceName(RETURNS)).root == EMPTY_ROOT.hex()
        store.upkeep()
        assert store.collect().blobs == 1


def test_the_end_of_a_command_that_fills_the_disk_is_recorded(disk: Path) -> None:
    """Its session goes first, which is what fills it; then its row says that it failed, and why."""
    with Store(StoreConfig(disk / "data", low_disk_bytes=0)) as store:
        store.recover()
        with Jobs(store, list) as jobs:
            jobs.start()
            job_id = jobs.submit(DEFAULT, shell("cat /dev/zero > file"))[0].id
            until(lambda: jobs.job(DEFAULT, job_id).state.is_over)
            found = jobs.job(DEFAULT, job_id)
            assert found.state is State.FAILED and "space" in found.reason
            until(lambda: free(disk) > 10_000_000 and not jobs.is_busy)
            assert os.listdir(disk / "data/sessions") == [".lock"]


def test_a_store_starts_on_a_disk_that_a_command_of_its_last_life_fills(disk: Path) -> None:
    """It holds what it has written also when its session is removed: it is killed before that, and the store opens."""
    config, job_id = StoreConfig(disk / "data"), "ds_1_00000001"
    with Store(config) as store:
        store.recover()
    work = disk / "data/sessions" / job_id / "work"
    work.mkdir(parents=True)
    script = "exec 3> fill; cat /dev/zero >&3 2>/dev/null; touch full; exec sleep 1000"
    environment = {**os.environ, MARK: job_id}
    with subprocess.Popen(["sh", "-c", script], cwd=work, env=environment, start_new_session=True) as process:
        try:
            until((work / "full").exists)
            assert free(disk) == 0
            with Store(config) as store:
                store.recover()
                assert process.wait(SECONDS) == -9
                assert free(disk) > 10_000_000
        finally:
            process.kill()


@pytest.mark.parametrize("leave_bytes", [0, 4096, 40_000, 80_000])
def test_a_store_starts_on_a_disk_that_uploads_have_filled(disk: Path, leave_bytes: int) -> None:
    """Unfinished uploads are given up before a store is not opened (spec ST-89)."""
    sender = Sender()
    config = StoreConfig(disk / "data")
    with Store(config) as store:
        store.recover()
        sender.send(store, sender.tree(a=b"first"))
        upload_id, pieces = begin(store, sender, b=os.urandom(8_000_000))
        put_all(store, upload_id, pieces)
    fill(disk, leave_bytes)
    with Store(config) as store:
        store.recover()
        sender.send(store, sender.tree(c=b"second"))
        assert_tree(store, sender)
        assert not os.listdir(disk / "data/uploads")


def test_a_tree_that_does_not_fit_comes_forward_later(store: Store, disk: Path) -> None:
    """Copies need space of their own: the receipt stands, and the tree follows when there is room."""
    sender = Sender()
    content = noise(1, 2_000_000)
    flat = {f"f{n}": sender.file(f"f{n}", content, mtime_ns=(n + 1) * DAY) for n in range(5)}
    metadata, sealed = sender.seal(flat)
    ballast = fill(disk, 6_000_000 + len(sealed))
    give(store, metadata, sealed)
    sender.move_on(flat)
    with pytest.raises(NoSpace):
        store.catch_up()
    assert store.workspace(NAME).tree_sequence is None
    ballast.unlink()
    assert_tree(store, sender)


def test_running_out_of_inodes_is_a_full_disk(store: Store) -> None:
    """Space for bytes is no space for names."""
    sender = Sender()
    sender.send(store, sender.tree(a=b"first"))
    flat = sender.tree(**{f"f{number}": b"%d" % number for number in range(4000)})
    with pytest.raises(NoSpace):
        give(store, *sender.seal(flat))
    assert store.workspace(NAME).sequence == 1
    sender.send(store, sender.tree(**{f"f{number}": b"%d" % number for number in range(200)}))
    assert_tree(store, sender)


def test_below_the_reserve_nothing_is_taken(disk: Path) -> None:
    """A bundle may not use the last of a disk: what is left belongs to the database and to recovery."""
    sender = Sender()
    with Store(StoreConfig(disk / "data")) as store:
        store.recover()
        ballast = fill(disk, 500_000)
        with pytest.raises(NoSpace, match="reserve"):
            give(store, *sender.seal(sender.tree(a=b"one")))
        assert store.health().status == "low disk"
        ballast.unlink()
        sender.send(store, sender.tree(a=b"one"))
        assert store.health().status == "ok"
        assert tree_of(store).parent.parent.is_dir()


def fill_inodes(disk: Path, leave: int) -> None:
    """Use up the disk's inodes but for so many."""
    ballast = disk / "names"
    ballast.mkdir()
    for number in range(os.statvfs(disk).f_favail - leave):
        (ballast / str(number)).touch()


def idle_store(disk: Path, **files: int) -> tuple[Store, Sender]:
    """Return a store with content of so many files that nothing needs any more, the first kind idle for longest."""
    store, sender = Store(StoreConfig(disk / "data", keep_sequences=1, evict_after_seconds=0.0)), Sender()
    store.recover()
    for second, (kind, count) in enumerate(files.items()):
        sender.send(
            store, sender.tree(**{f"{kind}{number}": b"%s %d" % (kind.encode(), number) for number in range(count)})
        )
        store.catch_up()
        Collection(store.state, store.cache, store.leases, 1).note_idle(second)
    store.upkeep()
    return store, sender


def held(store: Store, kind: str, count: int) -> int:
    """Return of how many files of a kind the cache has the content."""
    with store.state.read() as db:
        return len(blob_rows(db, [digest_of(b"%s %d" % (kind.encode(), number)) for number in range(count)]))


def test_idle_content_makes_way_for_inodes(disk: Path) -> None:
    """Below the reserve of inodes the longest idle goes, and no more than must; the bundle is taken (spec ST-134)."""
    store, sender = idle_store(disk, old=400, young=100, head=10)
    with store:
        fill_inodes(disk, 100)
        sender.send(store, sender.tree(head0=b"head 0", fresh=b"fresh"))
        assert (held(store, "old", 400), held(store, "young", 100), held(store, "head", 10)) == (50, 100, 10)
        assert os.statvfs(disk).f_favail >= 3 * 150 - 20
        assert_tree(store, sender)


def test_idle_content_that_would_not_give_inodes_enough_stays(disk: Path) -> None:
    """No cache is emptied in vain; the refusal says what is lacking."""
    store, sender = idle_store(disk, old=20, head=10)
    with store:
        fill_inodes(disk, 100)
        with pytest.raises(NoSpace, match="fewer than the reserve of 150 inodes are free"):
            sender.send(store, sender.tree(head0=b"head 0", fresh=b"fresh"))
        assert held(store, "old", 20) == 20


def test_inodes_are_freed_beforehand_in_a_quiet_moment(disk: Path) -> None:
    """Below twice the reserve idle content goes without anyone asking, until three times the reserve is free."""
    store, _ = idle_store(disk, old=400, head=10)
    with store:
        fill_inodes(disk, 250)
        store.upkeep()
        assert (held(store, "old", 400), held(store, "head", 10)) == (200, 10)


@pytest.mark.parametrize("gives_way", [False, True])
def test_a_start_without_room_gives_nothing_up(disk: Path, gives_way: bool) -> None:
    """A torn blob that cannot be rebuilt for want of room stays in its journal, and is rebuilt when there is room."""
    sender, body = Sender(), noise(1, 700_000)
    with Store(StoreConfig(disk / "data", low_disk_bytes=0)) as store:
        store.recover()
        sender.send(store, sender.tree(a=body, **{f"f{n}": b"%d" % n for n in range(40)}))
        assert_tree(store, sender)
        if gives_way:
            request = wire.UploadRequest(kind="bundle", workspace=NAME, identity="00" * 32)
            upload_id = store.uploads.initiate(DEFAULT, request).upload_id
            store.uploads.put(DEFAULT, upload_id, 0, io.BytesIO(noise(2, 2 << 20)))
    blob = disk / "data/cache" / digest_of(body).hex()[:2] / digest_of(body).hex()
    times = blob.stat().st_mtime_ns
    blob.chmod(0o644)
    os.truncate(blob, 0)
    os.utime(blob, ns=(times, times))
    ballast = fill(disk, 300_000)
    journal = {path.name: path.read_bytes() for path in (disk / "data/journal").iterdir()}
    with Store(StoreConfig(disk / "data", low_disk_bytes=0)) as store:
        if gives_way:
            store.recover()
        else:
            with pytest.raises(NoSpace):
                store.recover()
            assert {path.name: path.read_bytes() for path in (disk / "data/journal").iterdir()} == journal
            ballast.unlink()
            store.recover()
        assert_tree(store, sender)
        assert store.workspace(NAME).wanted == []


def test_a_blob_that_cannot_be_made_anew_for_want_of_room_stays(disk: Path, store: Store) -> None:
    """Its bytes are right: it is made anew when there is room, before a tree that is linked to it counts as durable."""
    sender, body = Sender(), noise(1, 700_000)
    sender.send(store, sender.tree(a=body))
    assert_tree(store, sender)
    blob = disk / "data/cache" / digest_of(body).hex()[:2] / digest_of(body).hex()
    inode, ballast = blob.stat().st_ino, fill(disk, 300_000)
    with Folder.open(tree_of(store)) as folder, pytest.raises((OSError, NoSpace)):
        store.trees._renew_if_linked(folder, sender.flat["a"])
    assert blob.stat().st_ino == inode and store.workspace(NAME).wanted == []
    ballast.unlink()
    for _ in range(2):  # the first attempt meets the doubt and places the file again
        with contextlib.suppress(OSError):
            store.upkeep()
    assert blob.stat().st_ino != inode and blob.read_bytes() == body
    assert_tree(store, sender)
    assert os.path.samefile(tree_of(store) / "a", blob)
