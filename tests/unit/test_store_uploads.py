"""Uploads in the store: pieces in any order, torn, twice, wrong or late, and what a restart keeps of them."""

from __future__ import annotations

import errno
import io
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
from sender import NAME, Sender, assert_tree, give

from deltasync.core import wire
from deltasync.core.bundle import Metadata
from deltasync.core.errors import (
    Cancelled,
    ContentMissing,
    Corrupt,
    DeltasyncError,
    HostBusy,
    LimitExceeded,
    NoSpace,
    NotFound,
    Refused,
    SequenceGap,
    UploadIncomplete,
    UsageError,
)
from deltasync.core.hashing import digest_of
from deltasync_server.config import StoreConfig
from deltasync_server.receive import Store
from deltasync_server.tenants import DEFAULT, Tenant

PIECE = 700
SECONDS = 20.0


class Torn:
    """A body whose sender goes away after some bytes."""

    def __init__(self, content: bytes) -> None:
        self._content = io.BytesIO(content)

    def read(self, size: int, /) -> bytes:
        found = self._content.read(size)
        if not found:
            raise Cancelled("the client went away")
        return found


class Sending:
    """One upload by hand."""

    def __init__(self, store: Store, metadata: Metadata, sealed: bytes, **options: int) -> None:
        self.store, self.sealed = store, sealed
        request = wire.UploadRequest(
            kind="bundle", workspace=NAME, identity=metadata.identity.hex(), **{"chunk_size": PIECE, **options}
        )
        self.id = store.uploads.initiate(DEFAULT, request, NAME).upload_id
        self.count = -(-len(sealed) // PIECE)

    def piece(self, number: int) -> bytes:
        return self.sealed[number * PIECE : (number + 1) * PIECE]

    def put(self, number: int, content: bytes | None = None, **options: object) -> wire.UploadedChunk:
        content = self.piece(number) if content is None else content
        return self.store.uploads.put(DEFAULT, self.id, number, io.BytesIO(content), **options)  # type: ignore[arg-type]

    def put_all(self) -> None:
        for number in range(self.count):
            self.put(number)

    def state(self) -> wire.UploadState:
        return self.store.uploads.state(DEFAULT, self.id)

    def complete(self, **options: int) -> wire.Receipt:
        told = {"total_chunks": self.count, "file_size": len(self.sealed), **options}
        return self.store.complete_upload(DEFAULT, self.id, wire.UploadComplete(**told))  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(StoreConfig(tmp_path, upload_sync_bytes=1)) as opened:
        opened.recover()
        yield opened


def sealed(sender: Sender, **files: bytes) -> tuple[Metadata, bytes]:
    """Seal a tree and move on."""
    flat = sender.tree(**files)
    made = sender.seal(flat)
    sender.move_on(flat)
    return made


def noise(size: int) -> bytes:
    return b"".join(digest_of(number.to_bytes(4, "little")) for number in range(-(-size // 32)))[:size]


def left(store: Store) -> list[str]:
    """Return what lies in DATA/uploads."""
    return sorted(os.listdir(store.config.data / "uploads"))


def test_pieces_in_any_order_and_twice_make_one_bundle(store: Store) -> None:
    """The receipt is the bundles' route's, completing again gives the same one, and nothing is left over."""
    sender = Sender()
    sending = Sending(store, *sealed(sender, a=noise(9_000), sub__b=b"two"))
    for number in [*reversed(range(sending.count)), *range(sending.count)]:
        told = sending.put(number, etag=digest_of(sending.piece(number)))
        assert (told.chunk_num, told.etag) == (number, digest_of(sending.piece(number)).hex())
        assert (told.received_bytes, told.total_chunks) == (len(sending.piece(number)), None)
    assert sending.state().present == [(0, sending.count - 1)]
    assert store.figures()["upload_bytes"] == len(sending.sealed) == sending.state().received_bytes
    receipt = sending.complete()
    assert (receipt.sequence, receipt.root, receipt.duplicate) == (1, sender.root.hex(), False)
    assert sending.complete() == receipt and sending.state().status == "completed"
    assert not left(store) and store.figures()["uploads"] == 0 == store.figures()["upload_bytes"]
    assert_tree(store, sender)


def test_a_bundle_that_came_in_pieces_is_the_journal_file(tmp_path: Path) -> None:
    """It is not copied, and what it carries can be made again from it."""
    sender = Sender()
    with Store(StoreConfig(tmp_path)) as store:
        store.recover()
        sending = Sending(store, *sealed(sender, a=noise(9_000)))
        sending.put_all()
        inode = (tmp_path / "uploads" / sending.id).stat().st_ino
        sending.complete()
        (kept,) = (tmp_path / "journal").iterdir()
        assert kept.stat().st_ino == inode and kept.read_bytes() == sending.sealed
        (blob,) = (each for each in (tmp_path / "cache").rglob("*") if each.is_file())
        blob.chmod(0o644)
        blob.write_bytes(bytes(9_000))
    with Store(StoreConfig(tmp_path)) as store:
        store.recover()
        store.catch_up()
        assert_tree(store, sender)


def test_the_same_piece_from_many_senders_at_once_is_one_piece(store: Store) -> None:
    """Whoever is first writes it; all are told that it is there."""
    sender = Sender()
    sending = Sending(store, *sealed(sender, a=noise(30_000)))
    with ThreadPoolExecutor(8) as pool:
        numbers = [number for number in range(sending.count) for _ in range(4)]
        list(pool.map(sending.put, numbers))
    assert sending.state().uploaded_chunks == sending.count
    assert store.figures()["upload_bytes"] == len(sending.sealed)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: sending.complete(), range(4)))
    assert all(answer == answers[0] for answer in answers)
    assert_tree(store, sender)


BAD: dict[str, tuple[Callable[[Sending], object], type[DeltasyncError]]] = {
    "beyond the end": (lambda s: s.put(s.count, b"x"), UsageError),
    "too long": (lambda s: s.put(0, bytes(PIECE + 1)), UsageError),
    "too short": (lambda s: s.put(0, bytes(PIECE - 1)), UsageError),
    "empty": (lambda s: s.put(0, b""), UsageError),
    "last too long": (lambda s: s.put(s.count - 1, bytes(PIECE)), UsageError),
    "wrong etag": (lambda s: s.put(0, etag=bytes(32)), UsageError),
    "offset of nothing": (lambda s: s.put(0, b"x", offset=3, etag=bytes(32)), UsageError),
    "other bytes": (lambda s: s.put(1, bytes(PIECE)), UsageError),
    "other totals": (lambda s: s.complete(total_chunks=s.count - 1), UsageError),
    "incomplete": (lambda s: s.complete(), UploadIncomplete),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_refused_and_changes_nothing(store: Store, case: str) -> None:
    """The pieces that are there stay, and the upload can go on to its end."""
    sender = Sender()
    metadata, content = sealed(sender, a=noise(5_000))
    sending = Sending(store, metadata, content, file_size=len(content), total_chunks=-(-len(content) // PIECE))
    sending.put(1)
    before = msgspec.structs.replace(sending.state(), expires_at="")
    act, kind = BAD[case]
    with pytest.raises(kind):
        act(sending)
    assert msgspec.structs.replace(sending.state(), expires_at="") == before
    sending.put_all()
    sending.complete()
    assert_tree(store, sender)


@pytest.mark.parametrize("sizes", [(PIECE - 1, PIECE, PIECE), (PIECE, PIECE - 1, PIECE), (PIECE, PIECE, PIECE, 5)])
def test_pieces_that_leave_holes_are_no_whole(store: Store, sizes: tuple[int, ...]) -> None:
    """Without an announced size a short piece is seen at the end: nothing is read from a file with a hole."""
    sending = Sending(store, Sender().seal({})[0], bytes(PIECE * 3 - 1))
    for number, size in enumerate(sizes):
        sending.put(number, bytes(size))
    with pytest.raises(UsageError):
        sending.complete()


REQUESTS: dict[str, tuple[dict[str, int], type[DeltasyncError]]] = {
    "no piece size": ({"chunk_size": 0}, UsageError),
    "pieces too large": ({"chunk_size": (8 << 20) + 1}, UsageError),
    "negative": ({"file_size": -1}, UsageError),
    "not that many": ({"file_size": 1401, "total_chunks": 2}, UsageError),
    "a count alone": ({"total_chunks": 2}, UsageError),
    "larger than a bundle": ({"chunk_size": 8 << 20, "file_size": 1 << 41}, LimitExceeded),
    "too many pieces": ({"chunk_size": 1, "file_size": 1 << 30}, LimitExceeded),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_an_upload_that_cannot_be_is_not_begun(store: Store, case: str) -> None:
    """It is refused before anything is there."""
    options, kind = REQUESTS[case]
    with pytest.raises(kind):
        Sending(store, Sender().seal({})[0], b"", **options)
    assert not left(store)


def test_a_piece_goes_on_where_it_broke_off(store: Store) -> None:
    """What came is kept until the rest comes and the whole has its digest; a wrong rest spoils nothing."""
    sender = Sender()
    sending = Sending(store, *sealed(sender, a=noise(5_000)))
    piece = sending.piece(2)
    etag = digest_of(piece)
    for first in (100, 400):
        with pytest.raises(Cancelled):
            store.uploads.put(DEFAULT, sending.id, 2, Torn(piece[:first]), etag=etag)
    assert sending.state().partial == [wire.UploadPartial(chunk_num=2, received_bytes=400)]
    assert store.figures()["upload_bytes"] == 400 and sending.state().uploaded_chunks == 0
    with pytest.raises(UsageError):
        sending.put(2, bytes(len(piece) - 400), etag=etag, offset=400)
    with pytest.raises(UsageError):
        sending.put(2, piece[100:], etag=etag, offset=100)
    with pytest.raises(UsageError):
        sending.put(2, piece[400:], offset=400)
    assert sending.put(2, piece[400:], etag=etag, offset=400).received_bytes == len(piece)
    assert not sending.state().partial
    with pytest.raises(Cancelled):
        store.uploads.put(DEFAULT, sending.id, 2, Torn(bytes(50)), etag=etag)
    sending.put_all()
    sending.complete()
    assert_tree(store, sender)


def test_a_refused_bundle_keeps_its_pieces_until_they_are_aborted(store: Store) -> None:
    """The refusal is the same again; aborting counts what goes."""
    sender = Sender()
    metadata, content = sealed(sender, a=noise(5_000))
    sending = Sending(store, Sender(epoch="2" * 32).seal({})[0], content)
    sending.put_all()
    for _ in range(2):
        with pytest.raises(Refused):
            sending.complete()
    aborted = store.uploads.abort(DEFAULT, sending.id)
    assert (aborted.chunks_uploaded, aborted.chunks_deleted) == (sending.count, sending.count)
    for gone in (
        sending.state,
        sending.complete,
        lambda: sending.put(0),
        lambda: store.uploads.abort(DEFAULT, sending.id),
    ):
        with pytest.raises(NotFound):
            gone()
    assert not left(store)
    give(store, metadata, content)


def test_a_bundle_that_lacks_content_goes_back_from_the_journal(store: Store) -> None:
    """Whatever stops it before the commit, the upload is whole again and the journal knows nothing of it."""
    sender = Sender()
    flat = sender.tree(a=noise(5_000), b=b"absent")
    metadata, content = sender.seal(flat, without=[digest_of(b"absent")])
    sending = Sending(store, metadata, content)
    sending.put_all()
    for _ in range(2):
        with pytest.raises(ContentMissing):
            sending.complete()
        assert left(store) == [sending.id] and not list((store.config.data / "journal").iterdir())


def test_a_bundle_in_pieces_may_be_early(store: Store) -> None:
    """A gap is told as it is on the bundles' route; once the one before is there, completing goes through."""
    sender = Sender()
    first = sealed(sender, a=b"one")
    sending = Sending(store, *sealed(sender, a=noise(5_000)))
    sending.put_all()
    with pytest.raises(SequenceGap):
        sending.complete()
    give(store, *first)
    assert sending.complete().sequence == 2
    assert_tree(store, sender)


def test_the_next_bundle_waits_for_one_that_comes_in_pieces(store: Store) -> None:
    """An upload that began before counts as arriving, so that its successor is told of no gap."""
    sender = Sender()
    sending = Sending(store, *sealed(sender, a=noise(5_000)))
    sending.put(0)
    second = sealed(sender, a=b"two")
    answers: list[wire.Receipt] = []
    follower = threading.Thread(target=lambda: answers.append(give(store, *second)))
    follower.start()
    tick = threading.Event()
    while store.figures()["bundles_arriving"] < 2:
        tick.wait(0.01)
    sending.put_all()
    sending.complete()
    follower.join(SECONDS)
    assert [answer.sequence for answer in answers] == [2]
    assert_tree(store, sender)


def test_a_restart_keeps_what_is_durable(tmp_path: Path) -> None:
    """After a clean end that is every piece; answers are kept as well, and files that nobody knows are removed."""
    sender = Sender()
    with Store(StoreConfig(tmp_path)) as store:
        store.recover()
        done = Sending(store, *sealed(sender, a=noise(3_000)))
        done.put_all()
        receipt = done.complete()
        sending = Sending(store, *sealed(sender, a=noise(6_000)))
        for number in (1, 2, 4):
            sending.put(number)
        with pytest.raises(Cancelled):
            store.uploads.put(DEFAULT, sending.id, 0, Torn(b"torn"))
    (tmp_path / "uploads/stray").write_bytes(b"?")
    with Store(StoreConfig(tmp_path)) as store:
        store.recover()
        sending.store = done.store = store
        assert left(store) == [sending.id]
        assert sending.state().present == [(1, 2), (4, 4)] and not sending.state().partial
        assert store.figures()["upload_bytes"] == 3 * PIECE
        assert done.complete() == receipt
        sending.put_all()
        assert sending.complete().sequence == 2
        assert_tree(store, sender)


def test_an_upload_is_resumed_by_the_same_words(store: Store) -> None:
    """A sender that lost its place is given the pieces with their digests; other words begin another upload."""
    sender = Sender()
    metadata, content = sealed(sender, a=noise(5_000))
    sending = Sending(store, metadata, content)
    sending.put(0)
    sending.put(2)
    assert Sending(store, metadata, content).id != sending.id
    other = Sending(store, metadata, content, chunk_size=PIECE + 1, resume=True)
    assert other.state().uploaded_chunks == 0
    store.uploads.abort(DEFAULT, other.id)
    newest = Sending(store, metadata, content, resume=True)
    store.uploads.abort(DEFAULT, newest.id)
    again = Sending(store, metadata, content, resume=True)
    assert again.id == sending.id
    etags = {part.chunk_num: part.etag for part in store.uploads.parts(DEFAULT, again.id).parts}
    assert etags == {number: digest_of(sending.piece(number)).hex() for number in (0, 2)}
    again.put_all()
    assert again.complete().root == sender.root.hex()
    assert Sending(store, metadata, content, resume=True).id != sending.id
    assert_tree(store, sender)


def test_an_upload_whose_file_is_gone_is_forgotten(tmp_path: Path) -> None:
    """Its sender is told so and begins anew."""
    with Store(StoreConfig(tmp_path)) as store:
        store.recover()
        sending = Sending(store, *sealed(Sender(), a=noise(3_000)))
        sending.put_all()
    (tmp_path / "uploads" / sending.id).unlink()
    with Store(StoreConfig(tmp_path)) as store:
        store.recover()
        with pytest.raises(NotFound):
            store.uploads.state(DEFAULT, sending.id)


def test_an_upload_expires(tmp_path: Path) -> None:
    """Once its time is over it is gone for its sender at once, and from the disk at the next upkeep."""
    with Store(StoreConfig(tmp_path, upload_seconds=0.0)) as store:
        store.recover()
        request = wire.UploadRequest(kind="bundle", workspace=NAME, identity="0" * 64)
        with pytest.raises(NotFound):
            store.uploads.initiate(DEFAULT, request, NAME)
        assert len(left(store)) == 1
        store.upkeep()
        assert not left(store) and store.figures()["uploads"] == 0


def test_uploads_are_bounded_in_number_and_bytes(tmp_path: Path) -> None:
    """Beyond either a sender is told to come again, and a finished or aborted one makes room."""
    config = StoreConfig(tmp_path, limits=wire.Limits(upload_sessions=1), upload_bytes=2 * PIECE)
    with Store(config) as store:
        store.recover()
        sender = Sender()
        metadata, content = sealed(sender, a=noise(5_000))
        sending = Sending(store, metadata, content)
        with pytest.raises(HostBusy):
            Sending(store, metadata, content)
        other = Tenant("other")
        file = wire.UploadRequest(kind="file", filepath="/a", hostname="b", sha256="0" * 64, file_size=PIECE)
        store.uploads.abort(other, store.uploads.initiate(other, file).upload_id)  # its places are its own
        sending.put(0)
        sending.put(1)
        with pytest.raises(NoSpace):
            sending.put(2)
        store.uploads.abort(DEFAULT, sending.id)
        again = Sending(store, metadata, content)
        again.put(3)
        assert again.state().present == [(3, 3)]


class FailingDisk:
    """Fails the first fsync of one file with EIO and counts how often it is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, meanwhile: Callable[[], object] = bool) -> None:
        self.asked, self._name, self._real, self._meanwhile = 0, name, os.fsync, meanwhile
        monkeypatch.setattr(os, "fsync", self._fsync)

    def _fsync(self, descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(self._name):
            self.asked += 1
            if self.asked == 1:
                self._meanwhile()
                raise OSError(errno.EIO, "the disk failed")
        self._real(descriptor)


def begin_file(store: Store, content: bytes, path: str = "/a") -> str:
    """Begin a plain file and send all of it in one piece."""
    request = wire.UploadRequest(
        kind="file",
        filepath=path,
        hostname="desk",
        file_size=len(content),
        chunk_size=1 << 20,
        blake3=digest_of(content).hex(),
    )
    upload_id = store.uploads.initiate(DEFAULT, request).upload_id
    store.uploads.put(DEFAULT, upload_id, 0, io.BytesIO(content))
    return upload_id


@pytest.mark.parametrize("kind", ["bundle", "file"])
def test_an_upload_that_the_disk_failed_is_never_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Completing fails, and again: the file is gone, and the upload is begun anew (spec ST-87)."""
    with Store(StoreConfig(tmp_path)) as store:
        store.recover()
        sender = Sender()
        metadata, content = sealed(sender, a=b"one", b=b"two")
        sending = Sending(store, metadata, content, file_size=len(content))
        sending.put_all()
        upload_id = sending.id if kind == "bundle" else begin_file(store, b"plain")
        disk = FailingDisk(monkeypatch, upload_id)
        with pytest.raises((Corrupt, OSError)):
            store.complete_upload(DEFAULT, upload_id, wire.UploadComplete())
        with pytest.raises(NotFound):
            store.complete_upload(DEFAULT, upload_id, wire.UploadComplete())
        assert disk.asked == 1 and upload_id not in left(store)
        give(store, metadata, content)
        assert_tree(store, sender)


def test_completing_waits_for_the_fsync_of_the_pieces_and_believes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A complete that came while the pieces were made durable does not ask the file again (spec ST-87)."""
    with Store(StoreConfig(tmp_path)) as store:
        store.recover()
        upload_id = begin_file(store, b"plain")
        session = store.uploads._sessions[upload_id]
        errors: list[DeltasyncError] = []

        def complete() -> None:
            try:
                store.complete_upload(DEFAULT, upload_id, wire.UploadComplete())
            except DeltasyncError as error:
                errors.append(error)

        completing = threading.Thread(target=complete)

        def meanwhile() -> None:
            completing.start()
            tick = threading.Event()
            while not session.completing.locked():
                tick.wait(0.01)

        disk = FailingDisk(monkeypatch, upload_id, meanwhile)
        discard = store.uploads._discard
        # The upload is discarded outside of the lock that `complete` waits for: let it be late.
        monkeypatch.setattr(store.uploads, "_discard", lambda each: (completing.join(SECONDS), discard(each)))
        store.uploads._sync(session)
        assert [type(error) for error in errors] == [NotFound]
        assert disk.asked == 1 and not left(store)


def test_a_file_whose_commit_fails_is_begun_anew(store: Store) -> None:
    """Its bytes went with the blob that was taken back: the upload does not say that they are there (spec ST-87)."""
    content = noise(50_000)
    upload_id = begin_file(store, content, path="/" + "a" * 3_000)
    with store.state.hold():
        (pages,) = store.state._writer.execute("PRAGMA page_count").fetchone()
        store.state._writer.execute(f"PRAGMA max_page_count={pages}")
    with pytest.raises(NoSpace):
        store.complete_upload(DEFAULT, upload_id, wire.UploadComplete())
    with pytest.raises(NotFound):
        store.uploads.state(DEFAULT, upload_id)
    assert not left(store)
    with store.state.hold():
        store.state._writer.execute(f"PRAGMA max_page_count={1 << 30}")
    stored = store.complete_upload(DEFAULT, begin_file(store, content), wire.UploadComplete())
    assert isinstance(stored, wire.StoredFile) and stored.file_size == len(content)


def test_a_bundle_that_finds_the_database_busy_leaves_nothing(store: Store, tmp_path: Path) -> None:
    """Busy is no open outcome: an upload goes on, and no journal file stays that nobody names (spec ST-14)."""
    sender = Sender()
    metadata, content = sealed(sender, a=b"one", b=b"two")
    sending = Sending(store, metadata, content)
    sending.put_all()
    with store.state.hold():
        store.state._writer.execute("PRAGMA busy_timeout=1")
    other = sqlite3.connect(tmp_path / "state.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    for attempt in (sending.complete, lambda: give(store, metadata, content)):
        with pytest.raises(sqlite3.OperationalError):
            attempt()
        assert not list((tmp_path / "journal").iterdir())
    other.close()
    assert sending.complete().sequence == 1
    assert_tree(store, sender)


def test_collect_removes_uploads_that_nobody_went_on_with(tmp_path: Path) -> None:
    """By the time of the last piece, as the host's clock tells it; a dry run only counts."""
    with Store(StoreConfig(tmp_path)) as store:
        store.recover()
        sender = Sender()
        old, young = (Sending(store, *sealed(sender, a=noise(3_000))) for _ in range(2))
        old.put(0)
    os.utime(tmp_path / "uploads" / old.id, (1, 1))
    with Store(StoreConfig(tmp_path)) as store:
        store.recover()
        counted = store.collect(dry_run=True)
        assert (counted.uploads, counted.upload_bytes) == (1, PIECE) and len(left(store)) == 2
        assert store.collect().uploads == 1
        assert left(store) == [young.id]
