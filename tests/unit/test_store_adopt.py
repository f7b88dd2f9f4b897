"""Adoption: files that are on the host already become blobs, whole and durable, and stay for their time."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sparse
from folders import write
from sender import NAME, Sender, assert_tree, blob_of, tree_of, zero

from deltasync.core.errors import Cancelled, ContentMissing, NoSpace, UsageError
from deltasync.core.hashing import digest_of
from deltasync_server import adopt
from deltasync_server.adopt import Adopted, Adoption, AdoptOptions
from deltasync_server.check import check
from deltasync_server.config import StoreConfig
from deltasync_server.durable import stage_again
from deltasync_server.receive import Store
from deltasync_server.state import blob_row

NOW = 1_800_000_000.0
DAY_SECONDS = 86_400


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def store(data: Path) -> Iterator[Store]:
    with Store(StoreConfig(data, keep_sequences=1)) as opened:
        opened.recover()
        yield opened


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """A folder with a small file, one that needs several reads, one twice, a script, and what is no file."""
    root = tmp_path / "media"
    write(root, "a", b"small")
    write(root, "sub/large", bytes(range(256)) * 20_000)
    write(root, "sub/deep/again", b"small")
    write(root, "run.sh", b"#!/bin/sh\n", executable=True)
    write(root, "empty")
    (root / "link").symlink_to("a")
    os.mkfifo(root / "fifo")
    return root


def run(store: Store, *folders: Path, **options: Any) -> Adopted:
    return Adoption(store, AdoptOptions(**options), clock=lambda: NOW).run(folders)


def held(store: Store) -> dict[bytes, tuple[int, int, bool]]:
    """Return the fingerprint of every blob by its digest; the bytes of each are right."""
    with store.state.read() as db:
        rows = {row[0]: (row[1], row[2], bool(row[3])) for row in db.execute("SELECT * FROM blobs")}
    assert all(store.cache.holds_right_bytes(digest) for digest in rows)
    return rows


def listing(root: Path) -> dict[str, tuple[int, int, int]]:
    return {str(p): ((s := p.lstat()).st_mode, s.st_ino, s.st_mtime_ns) for p in sorted(root.rglob("*"))}


def test_every_content_is_stored_once_with_the_files_own_time_and_bit(store: Store, media: Path) -> None:
    """Regular files become blobs that a tree can link to; the originals and everything else stay as they were."""
    before = listing(media)
    done = run(store, media)
    assert (done.files, done.stored, done.present, done.linked, done.left_out) == (5, 4, 1, 0, [])
    assert (done.bytes, done.stored_bytes) == (5_120_020, 5_120_015)
    status = (media / "run.sh").stat()
    assert held(store)[digest_of(b"#!/bin/sh\n")] == (10, status.st_mtime_ns, True)
    assert len(held(store)) == 4
    assert listing(media) == before
    store.stop()
    assert check(store.config).findings == []


def test_a_second_run_reads_and_stores_nothing(store: Store, media: Path) -> None:
    """What the cache has is only leased again."""
    run(store, media)
    again = run(store, media)
    assert (again.files, again.bytes, again.stored, again.present) == (5, 5_120_020, 0, 5)


def test_a_push_of_the_same_files_needs_no_content_and_links(store: Store, media: Path) -> None:
    """A bundle without content is taken after an adoption, and its files share the inodes of the blobs."""
    sender = Sender()
    status = (media / "sub/large").stat()
    flat = sender.tree(a=b"small")
    flat["large"] = sender.file("large", (media / "sub/large").read_bytes(), mtime_ns=status.st_mtime_ns)
    run(store, media)
    assert store.missing(NAME, [entry.digest.hex() for entry in flat.values()]).missing == []
    sender.send(store, flat, is_thin=True)
    assert_tree(store, sender)
    assert (tree_of(store) / "large").samefile(blob_of(store.config.data, flat["large"]))


def test_adopted_content_stays_for_its_time_and_goes_with_the_next_collection(store: Store, media: Path) -> None:
    """Nothing names adopted content: collections spare it until its time is over, and say so."""
    run(store, media, keep_seconds=DAY_SECONDS)
    for is_rehearsal in (True, False):
        found = store.collect(dry_run=is_rehearsal, now=NOW + DAY_SECONDS - 1)
        assert (found.blobs, found.kept_blobs, found.kept_adopted, found.released) == (0, 4, 4, 0)
    would = store.collect(dry_run=True, now=NOW + DAY_SECONDS)
    assert (would.blobs, would.released, len(held(store))) == (4, 4, 4)
    assert (would.blob_bytes, would.kept_adopted) == (5_120_015, 0)
    done = store.collect(now=NOW + DAY_SECONDS)
    assert (done.blobs, done.released, held(store)) == (4, 4, {})
    assert store.collect(now=NOW + DAY_SECONDS).released == 0


def test_an_adoption_outlives_the_process_and_is_never_made_shorter(data: Path, media: Path) -> None:
    """The lease is in the database; adopting again with less time does not end it sooner."""
    with Store(StoreConfig(data)) as store:
        store.recover()
        run(store, media, keep_seconds=10 * DAY_SECONDS)
    with Store(StoreConfig(data)) as store:
        store.recover()
        run(store, media, keep_seconds=1)
        assert store.collect(now=NOW + 9 * DAY_SECONDS).blobs == 0


def test_adopted_content_that_a_head_names_stays_after_its_time(store: Store, media: Path) -> None:
    """When the time is over an adopted blob is like any other."""
    run(store, media, keep_seconds=1)
    sender = Sender()
    sender.send(store, sender.tree(a=b"small"), is_thin=True)
    store.catch_up()
    assert store.collect(now=NOW + 2).blobs == 3
    assert set(held(store)) == {digest_of(b"small")}


def test_content_that_a_workspace_had_comes_under_the_lease_too(store: Store, tmp_path: Path) -> None:
    """What was there before is kept as well: the push that is meant may come when the workspace has let go of it."""
    sender = Sender()
    sender.send(store, sender.tree(a=b"kept"))
    run(store, write(tmp_path / "media", "a", b"kept").parent)
    sender.send(store, sender.tree(b=b"next"))
    store.catch_up()
    assert store.collect(now=NOW).kept_adopted == 1


def test_what_a_workspace_lacks_is_healed(store: Store, tmp_path: Path) -> None:
    """A damaged blob is published again from a file on the host, and the tree gets its file back."""
    sender = Sender()
    flat = sender.tree(a=b"precious")
    sender.send(store, flat)
    assert_tree(store, sender)
    zero(blob_of(store.config.data, flat["a"]))
    store.trees.quarantine([flat["a"].digest])
    assert store.workspace(NAME).wanted == [flat["a"].digest.hex()]
    run(store, write(tmp_path / "media", "old/copy", b"precious").parent)
    assert_tree(store, sender)
    assert store.workspace(NAME).wanted == []


# Batches, and their ends


def test_memory_and_loss_are_bounded_by_batches(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With batches of three, ten files are recorded in four steps, and a stop in the third loses nothing before it."""
    monkeypatch.setattr(adopt, "BATCH_FILES", 3)
    root = tmp_path / "media"
    for number in range(10):
        write(root, f"{number}", b"%d" % number)
    read: list[int] = []
    adoption = Adoption(
        store, AdoptOptions(), should_stop=lambda: (read.append(1), len(held(store)) >= 6)[1], clock=lambda: NOW
    )
    with pytest.raises(Cancelled, match="the same command goes on"):
        adoption.run([root])
    assert read and 6 <= len(held(store)) < 10
    done = run(store, root)
    assert done.stored == 10 - done.present and len(held(store)) == 10
    assert os.listdir(store.config.data / "staging") == []


def test_a_stop_in_the_middle_of_a_file_leaves_nothing_of_it(store: Store, media: Path) -> None:
    """A large file that was half read when the end was asked for is neither stored nor listed."""
    asked: list[int] = []
    adoption = Adoption(store, AdoptOptions(), should_stop=lambda: (asked.append(1), len(asked) > 12)[1])
    with pytest.raises(Cancelled):
        adoption.run([media / "sub"])
    assert digest_of((media / "sub/large").read_bytes()) not in held(store)
    assert os.listdir(store.config.data / "staging") == []


def test_progress_is_told(store: Store, media: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line is said whenever so much was read, also within one file."""
    monkeypatch.setattr(adopt, "TOLD_BYTES", 1 << 20)
    lines: list[str] = []
    Adoption(store, AdoptOptions(), say=lines.append).run([media])
    assert len(lines) == 4 and lines[0].endswith("contents stored")


# What is left out


def test_a_file_that_changes_while_it_is_read_is_left_out_and_named(store: Store, media: Path) -> None:
    """Its content would be that of no moment; the others are adopted."""
    large = media / "sub/large"

    def touch() -> bool:
        os.utime(large)
        return False

    done = Adoption(store, AdoptOptions(), should_stop=touch).run([media])
    assert [(each.path, each.reason) for each in done.left_out] == [(str(large), "changed while it was read")]
    assert (done.files, done.left_out_count, len(held(store))) == (4, 1, 3)


def test_a_file_that_changes_between_reading_and_copying_is_left_out(store: Store, media: Path) -> None:
    """The copy is hashed as it is written: other bytes than those that were read first never enter the cache."""
    (media / "sub/deep/again").unlink()
    pieces = 6  # of the large file, with its end
    asked: list[int] = []

    def write_now() -> bool:
        asked.append(1)
        if len(asked) == pieces + 1:
            with (media / "sub/large").open("r+b") as file:
                file.write(b"other")
        return False

    done = Adoption(store, AdoptOptions(), should_stop=write_now).run([media / "sub"])
    assert [each.reason for each in done.left_out] == ["changed while it was copied"]
    assert held(store) == {}
    assert os.listdir(store.config.data / "staging") == []


def test_the_store_itself_is_never_adopted(store: Store, data: Path, media: Path) -> None:
    """A folder around the store is read without it; one inside of it is refused."""
    run(store, media)
    done = run(store, data.parent)
    assert (done.files, done.stored) == (5, 0)
    assert [(each.path, each.reason) for each in done.left_out] == [(str(data), "is the store itself")]
    for inside in (data, data / "cache"):
        with pytest.raises(UsageError, match="lies in the store itself"):
            run(store, inside)


def test_folders_that_are_not_there_are_named_before_anything_is_read(store: Store, media: Path) -> None:
    """A wrong name stops the run before it begins."""
    with pytest.raises(UsageError, match=r"no folder .*/gone"):
        run(store, media, media / "gone")
    with pytest.raises(UsageError, match="is no folder that can be read"):
        run(store, media, media / "a")
    assert held(store) == {}


def test_odd_names_and_times_are_no_trouble(store: Store, tmp_path: Path) -> None:
    """Names that are not UTF-8, and times before 1970 and far ahead, only matter to a push."""
    root = tmp_path / "media"
    root.mkdir()
    Path(os.fsdecode(os.fsencode(root) + b"/\xff\n")).write_bytes(b"odd")
    for number, mtime_ns in enumerate((-(10**18), 2**62)):
        os.utime(write(root, f"{number}", b"%d" % number), ns=(mtime_ns, mtime_ns))
    assert (run(store, root).stored, len(held(store))) == (3, 3)
    store.stop()
    assert check(store.config).findings == []


# Trust


def test_trusted_files_become_the_blobs(store: Store, media: Path) -> None:
    """With trust a blob is the file itself: read-only from then on, with its owner and time."""
    (media / "run.sh").chmod(0o4750)
    before = {name: (media / name).stat() for name in ("a", "run.sh")}
    done = run(store, media, trust=True)
    assert (done.stored, done.linked, done.present) == (4, 4, 1)
    for name, mode in (("a", 0o444), ("run.sh", 0o555)):
        now = (media / name).stat()
        assert (now.st_mode & 0o7777, now.st_mtime_ns, now.st_uid) == (
            mode,
            before[name].st_mtime_ns,
            before[name].st_uid,
        )
        assert (media / name).samefile(blob_at(store, (media / name).read_bytes()))
    assert run(store, media, trust=True).stored == 0
    store.stop()
    assert check(store.config).findings == []


def test_a_write_through_a_trusted_file_is_found(store: Store, media: Path) -> None:
    """Another size or time is noticed before the blob is used: it is taken out, and the original is left alone."""
    run(store, media, trust=True)
    sender = Sender()
    sender.send(store, sender.tree(a=b"small"), is_thin=True)
    (media / "a").chmod(0o644)
    (media / "a").write_bytes(b"edited")
    store.catch_up()
    assert store.workspace(NAME).wanted == [digest_of(b"small").hex()]
    assert not (tree_of(store) / "a").exists()
    assert (media / "a").read_bytes() == b"edited"


def test_content_that_a_trusted_file_has_no_more_is_sent(store: Store, media: Path) -> None:
    """What was written over since is asked for, and what comes replaces the blob, not the original."""
    run(store, media, trust=True)
    (media / "a").chmod(0o644)
    (media / "a").write_bytes(b"edited")
    sender = Sender()
    with pytest.raises(ContentMissing):
        sender.send(store, sender.tree(a=b"small"), is_thin=True)
    sender.send(store, sender.tree(a=b"small"))
    assert_tree(store, sender)
    assert (media / "a").read_bytes() == b"edited"


def test_a_trusted_file_keeps_its_time_when_a_tree_wants_another(store: Store, media: Path) -> None:
    """An inode that has a name outside of the store is never given a new time by a tree (spec ST-33)."""
    before = (media / "a").stat().st_mtime_ns
    run(store, media, trust=True)
    sender = Sender()
    sender.send(store, sender.tree(a=b"small"), is_thin=True)
    assert_tree(store, sender)
    assert (media / "a").stat().st_mtime_ns == before


def test_a_collection_leaves_trusted_originals(store: Store, media: Path) -> None:
    """Only the cache's own name goes."""
    run(store, media, trust=True, keep_seconds=0)
    assert store.collect(now=NOW).blobs == 4
    assert (media / "a").read_bytes() == b"small" and (media / "a").stat().st_nlink == 1


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Another file system, of 8 MiB."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(mounted)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield mounted
    subprocess.run(["umount", "--lazy", str(mounted)], check=True)


@pytest.mark.root
def test_trust_across_file_systems_is_a_copy_or_refused(store: Store, disk: Path) -> None:
    """No hard link crosses: the files are copied and that is said; with --no-copy the folder is refused."""
    write(disk, "a", b"far")
    lines: list[str] = []
    with pytest.raises(UsageError, match="leave out --no-copy"):
        run(store, disk, trust=True, may_copy=False)
    done = Adoption(store, AdoptOptions(trust=True), say=lines.append).run([disk])
    assert (done.stored, done.linked) == (1, 0)
    assert "its files are copied" in lines[0]
    assert (disk / "a").stat().st_mode & 0o777 == 0o644


@pytest.mark.root
def test_a_mount_below_the_folder_is_left_out_without_copies(store: Store, disk: Path) -> None:
    """Only what is on another file system is left out."""
    write(disk, "far", b"far")
    write(disk.parent / "disks", "near", b"near")
    os.rename(disk.parent / "disks/near", disk.parent / "near")
    done = run(store, disk.parent, trust=True, may_copy=False)
    reasons = {each.path: each.reason for each in done.left_out}
    assert "Invalid cross-device link" in reasons[str(disk / "far")]
    assert (done.stored, done.linked) == (1, 1)


# Disks


@pytest.mark.root
@pytest.mark.parametrize("leave_bytes", [0, 20_000, 1_000_000, 3_000_000])
def test_a_full_disk_ends_the_run_and_leaves_nothing_half(disk: Path, tmp_path: Path, leave_bytes: int) -> None:
    """Wherever the space ends, the store is sound; with space the same command finishes."""
    with Store(StoreConfig(disk / "data", low_disk_bytes=0)) as store:
        store.recover()
        root = tmp_path / "media"
        for number in range(40):
            write(root, f"{number}", number.to_bytes(8, "little") * 16_000)
        free = os.statvfs(disk)
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - leave_bytes)))
        with pytest.raises(NoSpace, match=r"no space left|reserve"):
            run(store, root)
        ballast.unlink()
        assert os.listdir(store.config.data / "staging") == []
        assert all(store.cache.has_unchanged(row) for row in rows(store))
        assert run(store, root).files == 40
        assert len(held(store)) == 40
    assert check(store.config).findings == []


@pytest.mark.root
def test_the_reserve_is_left_free(disk: Path, tmp_path: Path) -> None:
    """A file that would use up the reserve is not begun; the sentence says what is the matter."""
    with Store(StoreConfig(disk / "data", low_disk_bytes=400_000)) as store:
        store.recover()
        write(tmp_path / "media", "a", b"fits")
        write(tmp_path / "media", "b", bytes(7_900_000))
        with pytest.raises(NoSpace, match="less than the reserve"):
            run(store, tmp_path / "media")
        assert held(store) == {}


@pytest.mark.root
def test_a_file_system_with_reflinks_shares_the_blocks(tmp_path: Path) -> None:
    """On xfs a file of 40 MB is adopted in a few blocks; its blob is another inode with the file's time."""
    image, mounted = tmp_path / "image", tmp_path / "xfs"
    mounted.mkdir()
    image.touch()
    os.truncate(image, 400 << 20)
    if os.geteuid() != 0 or shutil.which("mkfs.xfs") is None:
        pytest.skip("needs root and mkfs.xfs")
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", image], check=True)
    if subprocess.run(["mount", "-o", "loop", image, mounted], capture_output=True, check=False).returncode:
        pytest.skip("this system mounts no image")
    try:
        large = write(mounted / "media", "large", os.urandom(40_000_000))
        os.sync()
        before = os.statvfs(mounted)
        with Store(StoreConfig(mounted / "data")) as store:
            store.recover()
            assert run(store, mounted / "media").stored == 1
            blob = blob_at(store, large.read_bytes())
            assert not blob.samefile(large) and blob.stat().st_mtime_ns == large.stat().st_mtime_ns
            assert len(held(store)) == 1
            os.sync()
            used = (before.f_bfree - os.statvfs(mounted).f_bfree) * before.f_frsize
        assert used < 20_000_000
    finally:
        subprocess.run(["umount", "--lazy", str(mounted)], check=True)


def rows(store: Store) -> list[Any]:
    from deltasync_server.state import blob_rows

    with store.state.read() as db:
        return list(blob_rows(db, [digest for (digest,) in db.execute("SELECT digest FROM blobs")]).values())


def blob_at(store: Store, content: bytes) -> Path:
    name = digest_of(content).hex()
    return store.config.data / "cache" / name[:2] / name


def test_a_sparse_file_becomes_a_sparse_blob_and_stays_one(store: Store, data: Path, tmp_path: Path) -> None:
    """A hole is neither read nor written, at an end or in the middle; making the blob once more keeps it."""
    sparse.require_holes(tmp_path)
    image = tmp_path / "media" / "disk.img"
    sparse.write(image, 64 << 20, {5 << 20: b"data" * 50_000, 30 << 20: b"more"})
    assert run(store, image.parent).stored == 1
    ((digest, (size, _, _)),) = held(store).items()
    assert (digest, size) == (digest_of(image.read_bytes()), 64 << 20)
    assert sparse.space(data / "cache" / digest.hex()[:2] / digest.hex()) < 3 << 20
    with store.state.read() as db:
        row = blob_row(db, digest)
    assert row is not None
    with store.cache.staging() as staging:
        stage_again(store.cache, staging, row)
        (made,) = (data / "staging").glob(f"*/{digest.hex()}")
        assert made.read_bytes() == image.read_bytes()
        assert sparse.space(made) < 3 << 20
