"""Uploads: bundles that come in pieces, in any order and over several connections, and outlive a restart."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import NamedTuple

import msgspec

from deltasync.core import wire
from deltasync.core.bundle import Source
from deltasync.core.errors import (
    DeltasyncError,
    HostBusy,
    LimitExceeded,
    NoSpace,
    NotFound,
    UploadIncomplete,
    UsageError,
)
from deltasync.core.hashing import digest_of
from deltasync.core.names import WorkspaceName, shown
from deltasync.decoding import decoded
from deltasync.disk import Folder, make_private, space_guard
from deltasync_server.config import StoreConfig
from deltasync_server.intake import Arrival, Arrivals
from deltasync_server.journal import Assembled
from deltasync_server.room import Room
from deltasync_server.state import State
from deltasync_server.tenants import Tenant

PIECE_BYTES = 2 << 20
"""The size of a piece when the sender does not choose one."""
PIECES_MAX = 1 << 20
IDLE_SECONDS = 60.0
"""An upload that no piece came of for so long gives way when space is needed."""
SYNC_SECONDS = 5.0
"""A slow upload's pieces are made durable at least this often."""
_log = logging.getLogger(__name__)


Answer = wire.Receipt | wire.StoredFile


class _Piece(NamedTuple):
    """A piece that is in the file."""

    size: int
    etag: bytes


class _Held(NamedTuple):
    """What a session holds in all."""

    chunks: int
    received_bytes: int


_NOTHING = _Held(0, 0)


@dataclass(slots=True, eq=False)
class Session:
    """One upload; its rows name the pieces that are durable, `fresh` has the others."""

    id: str
    tenant: Tenant
    request: wire.UploadRequest
    touched: float
    arrival: Arrival | None = None
    """Its place among the bundles on their way in; a session of an earlier process has none."""
    answer: Answer | None = None
    held: _Held = field(default=_NOTHING)
    sent: float = -math.inf
    """When a piece of it last came, or when it was begun, in this process."""
    senders: int = 0
    """Pieces that are arriving."""
    fresh: dict[int, _Piece] = field(default_factory=dict)
    partial: dict[int, int] = field(default_factory=dict)
    """Pieces whose sender broke off, and how many of their first bytes are in the file; forgotten by a restart."""
    synced: float = 0.0
    unsynced_bytes: int = 0
    is_gone: bool = False
    is_closed: bool = False
    """Its pieces are being read; no other one is taken."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while its file or its figures change."""
    sync_lock: threading.Lock = field(default_factory=threading.Lock)
    completing: threading.Lock = field(default_factory=threading.Lock)

    @property
    def chunk_size(self) -> int:
        """The size of every piece but the last."""
        return self.request.chunk_size or PIECE_BYTES

    @property
    def total_chunks(self) -> int | None:
        """The number of pieces, where the size was announced."""
        size = self.request.file_size
        return None if size is None else -(-size // self.chunk_size)


Receive = Callable[[Assembled, Session], Answer]


class Uploads:
    """DATA/uploads: a sparse file for each upload; every piece of it is verified before it is written."""

    def __init__(self, config: StoreConfig, state: State, arrivals: Arrivals, room: Room) -> None:
        data = config.data
        make_private(data / "uploads")
        self._config = config
        self._state = state
        self._arrivals = arrivals
        self._room = room
        self._folder = Folder.open(data / "uploads")
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()
        self._syncs = ThreadPoolExecutor(1, "deltasync-uploads")

    def recover(self) -> None:
        """Take up the sessions of an earlier process, with the pieces whose rows say that they are durable."""
        with self._state.read() as db:
            rows = db.execute("SELECT id, tenant, request, answer FROM uploads").fetchall()
            held = "SELECT count(*), coalesce(sum(size), 0) FROM upload_pieces WHERE upload = ?"
            counts = {name: _Held(*db.execute(held, (name,)).fetchone()) for name, *_ in rows}
        names = set(self._folder.names())
        now = time.monotonic()
        self._sessions = {}
        for name, tenant, request, answer in rows:
            session = Session(name, tenant, decoded(request, wire.UploadRequest), now, held=counts[name])
            if answer:
                kind: type[Answer] = wire.Receipt if session.request.kind == "bundle" else wire.StoredFile
                session.answer = decoded(answer, kind)
            if session.answer is None and name not in names:
                self._delete_rows(session)
                continue
            self._sessions[name] = session
        for name in names - {each.id for each in self._sessions.values() if each.answer is None}:
            os.unlink(name, dir_fd=self._folder.fd)

    def close(self) -> None:
        """Make every piece durable that came, so that the next start has it, and let the folder go."""
        self._syncs.shutdown(cancel_futures=True)
        for session in list(self._sessions.values()):
            self._sync(session)
        self._folder.close()

    def figures(self) -> dict[str, float]:
        """Return how many uploads are unfinished and what they take on the disk."""
        with self._lock:
            held = [_bytes_of(each) for each in self._unfinished()]
        return {"uploads": float(len(held)), "upload_bytes": float(sum(held))}

    def size_bytes(self) -> int:
        """Return what the unfinished ones take on the disk."""
        with self._lock:
            return sum(_bytes_of(each) for each in self._unfinished())

    def _unfinished(self) -> list[Session]:
        return [each for each in self._sessions.values() if each.answer is None]

    # --- a session's life ---

    def initiate(
        self, tenant: Tenant, request: wire.UploadRequest, workspace: WorkspaceName | None = None
    ) -> wire.UploadState:
        """Begin an upload (spec H-70). workspace: as the store keeps it, for a bundle."""
        self._check(request)
        self.expire()
        if request.resume:
            request = msgspec.structs.replace(request, resume=False)
            if (found := self._resumed(tenant, request, workspace)) is not None:
                return self.state(tenant, found.id)
        if request.kind == "file":
            self._room.require_share(tenant, request.file_size or 0)
        self._room.require(request.file_size or 0)
        now = time.monotonic()
        session = Session(str(uuid.uuid4()), tenant, request, now, synced=now, sent=now)
        with self._lock:
            own = [each for each in self._unfinished() if each.tenant == tenant]  # no tenant takes another's places
            if len(own) >= self._config.limits.upload_sessions:
                raise HostBusy("the server holds as many unfinished uploads as it can; try again")
            self._sessions[session.id] = session
        session.arrival = self._arrivals.enter(workspace) if workspace is not None else None
        try:
            with space_guard(self._config.data):
                self._create(session)
        except BaseException:
            self._forget(session)
            raise
        return self.state(tenant, session.id)

    def _resumed(self, tenant: Tenant, request: wire.UploadRequest, workspace: WorkspaceName | None) -> Session | None:
        """Return the newest unfinished upload that was begun with the same words; it counts as arriving again."""
        with self._lock:
            own = [each for each in self._unfinished() if each.tenant == tenant]
            found = [each for each in own if each.request == request and not each.is_closed]
        if not found:
            return None
        session = found[-1]
        with session.lock:
            if session.is_gone:
                return None
            session.touched = session.sent = time.monotonic()
            if session.arrival is not None:
                self._arrivals.leave(session.arrival)
            session.arrival = self._arrivals.enter(workspace) if workspace is not None else None
        return session

    def _create(self, session: Session) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        os.close(os.open(session.id, flags, 0o600, dir_fd=self._folder.fd))
        with self._state.write() as db:
            body = msgspec.json.encode(session.request)
            db.execute("INSERT INTO uploads VALUES (?, ?, NULL, ?)", (session.id, body, session.tenant))

    def _check(self, request: wire.UploadRequest) -> None:
        limits = self._config.limits
        chunk_size = PIECE_BYTES if request.chunk_size is None else request.chunk_size
        if not 0 < chunk_size <= limits.upload_piece_bytes:
            raise UsageError(f"chunk_size is 1 to {limits.upload_piece_bytes} bytes")
        if request.file_size is None:
            if request.total_chunks is not None:
                raise UsageError("total_chunks comes with file_size")
            return
        most = min(limits.bundle_bytes, PIECES_MAX * chunk_size)
        if request.file_size > most:
            raise LimitExceeded("H-70", f"the upload is larger than {most} bytes", limit_bytes=most)
        chunks = -(-request.file_size // chunk_size)
        if request.file_size < 0 or request.total_chunks not in (None, chunks):
            raise UsageError(f"{request.file_size} bytes in pieces of {chunk_size} are {max(0, chunks)} pieces")

    def state(self, tenant: Tenant, upload_id: str) -> wire.UploadState:
        """Return what is there of an upload (spec H-74)."""
        session = self._found(tenant, upload_id)
        with session.lock:
            numbers = sorted({*self._durable_numbers(session), *session.fresh})
            partial = [wire.UploadPartial(chunk_num=n, received_bytes=size) for n, size in session.partial.items()]
            return wire.UploadState(
                upload_id=session.id,
                expires_at=self._expires_at(session),
                status="initiated" if session.answer is None else "completed",
                chunk_size=session.chunk_size,
                total_chunks=session.total_chunks,
                uploaded_chunks=session.held.chunks,
                received_bytes=session.held.received_bytes,
                present=_ranges(numbers),
                partial=partial,
            )

    def parts(self, tenant: Tenant, upload_id: str) -> wire.UploadParts:
        """Return every piece that is there, with its digest (spec H-74)."""
        session = self._found(tenant, upload_id)
        with session.lock:
            with self._state.read() as db:
                rows = db.execute("SELECT number, etag FROM upload_pieces WHERE upload = ?", (session.id,))
                etags = dict(rows.fetchall())
            etags |= {number: piece.etag for number, piece in session.fresh.items()}
        found = [wire.UploadPart(chunk_num=number, etag=etags[number].hex()) for number in sorted(etags)]
        return wire.UploadParts(parts=found)

    def _expires_at(self, session: Session) -> str:
        left = self._config.upload_seconds - (time.monotonic() - session.touched)
        return (datetime.now(UTC) + timedelta(seconds=left)).isoformat(timespec="seconds").replace("+00:00", "Z")

    def _durable_numbers(self, session: Session) -> list[int]:
        with self._state.read() as db:
            rows = db.execute("SELECT number FROM upload_pieces WHERE upload = ? ORDER BY number", (session.id,))
            return [number for (number,) in rows]

    def _found(self, tenant: Tenant, upload_id: str) -> Session:
        with self._lock:
            session = self._sessions.get(upload_id)
        if session is None or session.tenant != tenant or self._is_expired(session):
            raise _gone(upload_id)
        return session

    def _is_expired(self, session: Session) -> bool:
        is_idle = time.monotonic() - session.touched >= self._config.upload_seconds
        return is_idle and not session.completing.locked()

    def expire(self) -> None:
        """Remove the uploads whose time is over (spec H-76)."""
        with self._lock:
            expired = [each for each in self._sessions.values() if self._is_expired(each)]
        for session in expired:
            self._forget(session)

    def release(self, size_bytes: int) -> None:
        """Forget uploads that nobody is sending, the oldest first, where that frees so many bytes (spec ST-89)."""
        idle = sorted((each for each in self._unfinished_now() if _is_idle(each)), key=lambda each: each.touched)
        if sum(map(_bytes_of, idle)) < size_bytes:
            return
        for session in idle:
            if size_bytes <= 0:
                return
            size_bytes -= self._release(session)

    def release_older(self, seconds: float, *, is_dry_run: bool) -> list[int]:
        """Forget the uploads that no piece came of for so long by the host's clock, which outlasts the process.

        Returns how many bytes each had. Nobody may be sending.
        """
        released: list[int] = []
        for session in self._unfinished_now():
            with contextlib.suppress(FileNotFoundError):
                if time.time() - self._folder.stat(session.id).st_mtime >= seconds:
                    released.append(_bytes_of(session) if is_dry_run else self._release(session))
        return released

    def _unfinished_now(self) -> list[Session]:
        with self._lock:
            return self._unfinished()

    def _release(self, session: Session) -> int:
        """Forget an upload, unless it is being completed, or a piece of it has come; returns how many bytes it had."""
        if not session.completing.acquire(blocking=False):
            return 0
        try:
            if session.answer is not None or not _is_idle(session):
                return 0
            size_bytes = _bytes_of(session)
            _log.warning("upload %s is removed: its %d bytes of space are needed", session.id, size_bytes)
            self._discard(session)
            return size_bytes
        finally:
            session.completing.release()

    def abort(self, tenant: Tenant, upload_id: str) -> wire.UploadAborted:
        """End an unfinished upload and remove what is there of it (spec H-75)."""
        session = self._found(tenant, upload_id)
        if not session.completing.acquire(blocking=False):
            raise HostBusy("the upload is being completed; ask again")
        try:
            if session.answer is not None:
                raise UsageError("the upload is complete; nothing of it is left to abort")
            chunks = session.held.chunks
            self._forget(session)
        finally:
            session.completing.release()
        return wire.UploadAborted(upload_id=upload_id, status="aborted", chunks_uploaded=chunks, chunks_deleted=chunks)

    def _forget(self, session: Session) -> None:
        """Remove the file, then its rows: a disk may be too full for them to go before (spec ST-88).

        Rows that stay, as a kill in between leaves them, go at the next start.
        """
        with self._lock:
            self._sessions.pop(session.id, None)
        with session.sync_lock, session.lock:
            session.is_gone = True
            if session.arrival is not None:
                self._arrivals.leave(session.arrival)
                session.arrival = None
            with contextlib.suppress(FileNotFoundError):
                os.unlink(session.id, dir_fd=self._folder.fd)
            self._delete_rows(session)

    def _delete_rows(self, session: Session) -> None:
        try:
            with self._state.write() as db:
                db.execute("DELETE FROM upload_pieces WHERE upload = ?", (session.id,))
                db.execute("DELETE FROM uploads WHERE id = ?", (session.id,))
        except DeltasyncError:
            _log.exception("the rows of upload %s could not be removed; the next start does it", session.id)

    # --- pieces ---

    def put(
        self,
        tenant: Tenant,
        upload_id: str,
        number: int,
        source: Source,
        *,
        etag: bytes | None = None,
        offset: int = 0,
    ) -> wire.UploadedChunk:
        """Take one piece (spec H-71, H-72); offset: how much of it an attempt that broke off has left here."""
        session = self._found(tenant, upload_id)
        self._check_number(session, number)
        with _sending(session):
            try:
                return self._put(session, number, source, etag=etag, offset=offset)
            except _DiskFull as error:
                if session.request.kind == "bundle":  # its sender does not wait for space with half of a bundle here
                    self._discard(session)
                raise error.shortage from error

    def _put(
        self, session: Session, number: int, source: Source, *, etag: bytes | None, offset: int
    ) -> wire.UploadedChunk:
        content = self._prefix(session, number, offset, etag)
        try:
            while part := source.read(1 << 20):
                content += part
                if len(content) > session.chunk_size:
                    raise UsageError(f"a piece of this upload has at most {session.chunk_size} bytes")
        except (DeltasyncError, OSError):
            self._keep_partial(session, number, content)
            raise
        found = digest_of(content)
        self._check_content(session, number, content, found, etag)
        self._make_room(session, number, len(content))
        with session.lock:
            self._store(session, number, content, found)
        self._sync_when_due(session)
        return wire.UploadedChunk(
            chunk_num=number,
            etag=found.hex(),
            received_bytes=len(content),
            uploaded_chunks=session.held.chunks,
            total_chunks=session.total_chunks,
        )

    def _check_number(self, session: Session, number: int) -> None:
        end = session.total_chunks
        if end is None:
            end = min(PIECES_MAX, -(-self._config.limits.bundle_bytes // session.chunk_size))
        if number >= end:
            raise UsageError(f"piece {number} lies beyond the end: this upload has at most {end} pieces")

    def _prefix(self, session: Session, number: int, offset: int, etag: bytes | None) -> bytearray:
        if not offset:
            return bytearray()
        with session.lock, self._opened(session) as descriptor:
            if session.partial.get(number) != offset or etag is None:
                raise UsageError(f"piece {number} does not go on at byte {offset}; send it from its beginning")
            return bytearray(os.pread(descriptor, offset, number * session.chunk_size))

    def _keep_partial(self, session: Session, number: int, content: bytearray) -> None:
        """Leave what came of a piece in the file, for the rest to follow; it is no piece before it is verified."""
        if not content or len(content) > session.chunk_size:
            return
        with contextlib.suppress(OSError, DeltasyncError, _DiskFull):
            self._make_room(session, number, len(content))
            with session.lock:
                if not (session.is_gone or session.is_closed or self._piece(session, number)):
                    self._write(session, number, content)
                    session.partial[number] = len(content)

    def _make_room(self, session: Session, number: int, size_bytes: int) -> None:
        """See to it that a piece which is not there finds its place on the disk, before any of it is written."""
        if self._piece(session, number) is not None:
            return
        if self.figures()["upload_bytes"] + size_bytes > self._config.upload_bytes:
            raise NoSpace("the unfinished uploads hold as many bytes as they may; try again later")
        try:
            self._room.require(size_bytes)
        except NoSpace as error:
            raise _DiskFull(error) from error

    def _check_content(
        self, session: Session, number: int, content: bytearray, found: bytes, etag: bytes | None
    ) -> None:
        expected, size = session.chunk_size, session.request.file_size
        if size is not None:
            expected = min(expected, size - number * session.chunk_size)
        is_right = len(content) == expected if size is not None else 0 < len(content) <= expected
        if not is_right:
            raise UsageError(f"piece {number} has {len(content)} bytes, not {expected}")
        if etag not in (None, found):
            raise UsageError(f"piece {number} has the digest {found.hex()}, not the one announced; send it again")

    def _store(self, session: Session, number: int, content: bytearray, etag: bytes) -> None:
        """Write a verified piece; one that is there already is never written again."""
        if session.is_gone:
            raise _gone(session.id)
        there = self._piece(session, number)
        if there is None:
            if session.is_closed:
                raise UsageError("the upload is being completed; no other piece is taken")
            session.partial.pop(number, None)
            self._write(session, number, content)
            session.fresh[number] = _Piece(len(content), etag)
            session.held = _Held(session.held.chunks + 1, session.held.received_bytes + len(content))
            session.unsynced_bytes += len(content)
        elif there != _Piece(len(content), etag):
            raise UsageError(f"piece {number} is here with other bytes; abort the upload and begin anew")
        session.touched = time.monotonic()
        if session.arrival is not None:
            self._arrivals.touch(session.arrival)

    def _piece(self, session: Session, number: int) -> _Piece | None:
        if number in session.fresh:
            return session.fresh[number]
        with self._state.read() as db:
            select = "SELECT size, etag FROM upload_pieces WHERE upload = ? AND number = ?"
            row = db.execute(select, (session.id, number)).fetchone()
        return _Piece(*row) if row else None

    def _write(self, session: Session, number: int, content: bytearray) -> None:
        try:
            with space_guard(self._config.data), self._opened(session) as descriptor:
                view, offset = memoryview(content), number * session.chunk_size
                while view:
                    count = os.pwrite(descriptor, view, offset)
                    view, offset = view[count:], offset + count
        except NoSpace as error:
            raise _DiskFull(error) from error

    @contextmanager
    def _opened(self, session: Session) -> Iterator[int]:
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor = os.open(session.id, flags, dir_fd=self._folder.fd)
        except FileNotFoundError:
            raise _gone(session.id) from None
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _sync_when_due(self, session: Session) -> None:
        with session.lock:
            is_old = time.monotonic() - session.synced >= SYNC_SECONDS
            if session.unsynced_bytes < self._config.upload_sync_bytes and not is_old:
                return
            session.synced, session.unsynced_bytes = time.monotonic(), 0
        self._syncs.submit(self._sync, session)

    def _sync(self, session: Session) -> None:
        """Make pieces durable, then the rows that name them: a row is never ahead of its bytes (spec ST-82)."""
        with session.sync_lock:
            with session.lock:
                fresh = {} if session.is_gone or session.is_closed else dict(session.fresh)
            if not fresh:
                return
            try:
                with self._opened(session) as descriptor:
                    os.fsync(descriptor)
                self._folder.fsync()
                with self._state.write() as db:
                    rows = [(session.id, number, *piece) for number, piece in fresh.items()]
                    db.executemany("INSERT OR REPLACE INTO upload_pieces VALUES (?, ?, ?, ?)", rows)
            except (OSError, DeltasyncError):
                _log.exception("the pieces of upload %s could not be made durable", session.id)
                is_failed = True
            else:
                is_failed = False
            with session.lock:
                session.is_gone |= is_failed  # before anyone else has `sync_lock`: the file is never asked again
                for number in () if is_failed else fresh:
                    del session.fresh[number]
        if is_failed:
            self._discard(session)

    def _discard(self, session: Session) -> None:
        """Forget an upload whose file is of no use any more."""
        try:
            self._forget(session)
        except OSError:
            _log.exception("upload %s could not be removed; it is not used any more", session.id)

    # --- the end ---

    def complete(self, tenant: Tenant, upload_id: str, request: wire.UploadComplete, receive: Receive) -> Answer:
        """Hand the whole file on and keep the answer: completing again gives it again (spec H-73)."""
        session = self._found(tenant, upload_id)
        with session.completing:
            with session.sync_lock, session.lock:
                if session.is_gone:
                    raise _gone(upload_id)
                if session.answer is not None:
                    return session.answer
                session.touched = time.monotonic()
                size = self._whole_size(session, request)
                session.is_closed = True
            try:
                answer = self._handed_on(session, size, receive)
                self._finish(session, answer)
            except BaseException as error:
                self._reopen(session, error)
                raise
            return answer

    def _handed_on(self, session: Session, size: int, receive: Receive) -> Answer:
        with self._opened(session) as descriptor:
            os.ftruncate(descriptor, size)
            whole = Assembled(self._folder, session.id, descriptor, size)
            try:
                return receive(whole, session)
            finally:
                session.is_gone |= whole.has_failed

    def _reopen(self, session: Session, error: BaseException) -> None:
        """Let an upload go on after a refusal; one whose file was lost on the way is begun anew (spec ST-87)."""
        if isinstance(error, NoSpace) and session.request.kind == "bundle":
            session.is_gone = True
        try:
            self._folder.stat(session.id)
        except FileNotFoundError:
            session.is_gone = True
        if session.is_gone:
            self._discard(session)
        session.is_closed = False

    def _finish(self, session: Session, answer: Answer) -> None:
        """Keep the answer; the file goes after the row that no longer needs it."""
        with session.sync_lock, session.lock:
            with self._state.write() as db:
                db.execute("UPDATE uploads SET answer = ? WHERE id = ?", (msgspec.json.encode(answer), session.id))
                db.execute("DELETE FROM upload_pieces WHERE upload = ?", (session.id,))
            session.answer = answer
            session.fresh.clear()
            session.partial.clear()
            session.touched = time.monotonic()
            if session.arrival is not None:
                self._arrivals.leave(session.arrival)
                session.arrival = None
            with contextlib.suppress(FileNotFoundError):  # it may have become the journal's
                os.unlink(session.id, dir_fd=self._folder.fd)

    def _whole_size(self, session: Session, request: wire.UploadComplete) -> int:
        """Return the size of the whole, or raise what is wrong with its pieces."""
        total, size = session.total_chunks, session.request.file_size
        if total is None or size is None:
            total, size = request.total_chunks, request.file_size
        if total is None or size is None:
            raise UsageError("the size of this upload was not announced: complete it with total_chunks and file_size")
        if {request.total_chunks, request.file_size} - {None, total, size} or total != -(-size // session.chunk_size):
            raise UsageError(f"{size} bytes in pieces of {session.chunk_size} are not {total} pieces")
        for part in request.parts or ():
            there = self._piece(session, part.chunk_num)
            if there is None or there.etag.hex() != part.etag:
                raise UsageError(f"piece {part.chunk_num} is not the one with the etag {shown(part.etag[:64])}")
        held = session.held
        if held.chunks < total:
            raise UploadIncomplete(
                f"{total - held.chunks} piece(s) of {total} are missing; ask for the upload and send them",
                missing_chunks=total - held.chunks,
            )
        if not total and held == _NOTHING:
            return 0
        # As many pieces as there are numbers below the last; with the last as long as it must be, all others are full.
        last = _Held(self._last_number(session) + 1, size - (total - 1) * session.chunk_size)
        if held != _Held(total, size) or last != (total, self._size_of(session, total - 1)):
            raise UsageError(f"the pieces here are no whole of {total} pieces with {size} bytes; begin anew")
        return size

    def _last_number(self, session: Session) -> int:
        return max((*self._durable_numbers(session)[-1:], *session.fresh), default=-1)

    def _size_of(self, session: Session, number: int) -> int:
        there = self._piece(session, number)
        return there.size if there else 0


def _gone(upload_id: str) -> NotFound:
    name = shown(upload_id[:80])
    return NotFound(f"there is no upload {name}: it expired, was aborted or never began; begin it anew")


class _DiskFull(Exception):
    """The disk, and not a limit of ours, has no room for a piece."""

    def __init__(self, shortage: NoSpace) -> None:
        super().__init__(shortage.sentence)
        self.shortage = shortage


@contextmanager
def _sending(session: Session) -> Iterator[None]:
    """Count a piece as arriving for the length of a block."""
    with session.lock:
        session.senders += 1
    try:
        yield
    finally:
        with session.lock:
            session.senders -= 1
            session.sent = time.monotonic()


def _is_idle(session: Session) -> bool:
    return not session.senders and time.monotonic() - session.sent >= IDLE_SECONDS


def _bytes_of(session: Session) -> int:
    return session.held.received_bytes + _partial_bytes(session)


def _partial_bytes(session: Session) -> int:
    return sum(list(session.partial.values()))


def _ranges(numbers: list[int]) -> list[tuple[int, int]]:
    """Return sorted numbers as ranges, each with its first and its last."""
    if not numbers:
        return []
    gaps = [(before, after) for before, after in pairwise(numbers) if after != before + 1]
    firsts = [numbers[0], *(after for _, after in gaps)]
    lasts = [*(before for before, _ in gaps), numbers[-1]]
    return list(zip(firsts, lasts, strict=True))
