"""Streams: large contents that arrive in parts, each written once, where it stays (spec ST-90 to ST-96)."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Self

from deltasync.core.errors import ContentMissing, Corrupt, DeltasyncError, HostBusy, Refused
from deltasync.core.hashing import Hasher, hasher
from deltasync.core.manifest import Operation
from deltasync.core.part import Part
from deltasync.disk import Folder, make_private, remove_tree, start_writeback
from deltasync_server.blobs import EXECUTABLE_MODE, PLAIN_MODE
from deltasync_server.state import State
from deltasync_server.tenants import Tenant, tenant_of

IDLE_SECONDS = 7 * 24 * 3600.0
"""A stream that no part came of for so long is removed."""
GIVES_WAY_SECONDS = 60.0
"""One that nobody uses for so long is removed where its space is needed."""
_HASHES_MAX = 16
_BUFFER_BYTES = 1 << 20
_WRITEBACK_BYTES = 16 << 20
_log = logging.getLogger(__name__)


class StreamRow(NamedTuple):
    """What is durable of a stream."""

    id: bytes
    workspace: str
    size: int
    touched: int
    """When its last part came, in seconds since 1970: it must outlast the process."""


class _Hashed(NamedTuple):
    """The hash of a stream up to an offset, as a bundle left it."""

    offset: int
    content: Hasher
    sequence: int


@dataclass(eq=False)
class _Live:
    """What this process knows of a stream: who writes it, and the hash up to where it was written last."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    hashed: _Hashed | None = None
    writers: list[Writer] = field(default_factory=list)
    begun: int = 0
    """How often somebody began to write."""
    readers: int = 0
    used: float = -math.inf
    """When a bundle wrote to it or named it last, by the clock of this process."""


class Streams:
    """DATA/parts: one file for each stream; its row says how much of it is durable."""

    def __init__(self, data: Path, state: State, require_space: Callable[[int], None]) -> None:
        make_private(data / "parts")
        self.folder = Folder.open(data / "parts")
        self._state, self._require_space = state, require_space
        self._lives: dict[bytes, _Live] = {}
        self._lock = threading.Lock()

    def recover(self) -> None:
        """Forget rows without a whole file, and remove files without a row (spec ST-94); nobody may be receiving."""
        lost, strays = self._compared()
        if lost:
            with self._state.write() as db:
                forget(db, lost)
        for name in (*strays, *(stream.hex() for stream in lost)):
            remove_tree(self.folder, name)

    def troubles(self) -> Iterator[tuple[str, str]]:
        """Yield what `recover` would see to, and why."""
        lost, strays = self._compared()
        yield from ((stream.hex(), "its file is gone, or shorter than its row says") for stream in lost)
        yield from ((name, "no row names it") for name in strays)

    def _compared(self) -> tuple[list[bytes], list[str]]:
        """Return the streams that are not as their rows say, and the names that no row explains."""
        with self._state.read() as db:
            rows = stream_rows(db)
        lost = [row.id for row in rows if not self._is_there(row)]
        return lost, sorted(set(self.folder.names()) - {row.id.hex() for row in rows})

    def _is_there(self, row: StreamRow) -> bool:
        try:
            status = self.folder.stat(row.id.hex())
        except FileNotFoundError:
            return False
        return stat.S_ISREG(status.st_mode) and status.st_size >= row.size

    def close(self) -> None:
        """Let the folder go."""
        self.folder.close()

    def figures(self) -> dict[str, float]:
        """Return how many contents are arriving in parts, and what they take on the disk."""
        with self._state.read() as db:
            rows = stream_rows(db)
        return {"streams": float(len(rows)), "stream_bytes": float(sum(row.size for row in rows))}

    def size_bytes(self) -> int:
        """Return how many bytes are there of all of them."""
        with self._state.read() as db:
            return sum(row.size for row in stream_rows(db))

    def size_of(self, workspace: str) -> int:
        """Return how many bytes are there of the streams of a workspace."""
        with self._state.read() as db:
            return sum(row.size for row in stream_rows(db) if row.workspace == workspace)

    def is_next(self, part: Part, sequence: int) -> bool:
        """Tell whether the bundle before this one has written what comes before its part, be it durable or not."""
        hashed = self._live(part.stream).hashed
        return hashed is not None and (hashed.offset, hashed.sequence) == (part.offset, sequence - 1)

    def _durable_size(self, stream: bytes) -> int:
        with self._state.read() as db:
            row = stream_row(db, stream)
        return row.size if row else 0

    def begin(
        self, workspace: str, part: Part, sequence: int, require_due: Callable[[], None] = lambda: None
    ) -> Writer:
        """Begin to write the part of a bundle; whoever writes the same place of the stream now loses it (spec ST-92).

        require_due: raises where the bundle was committed meanwhile; called while none can be.
        Raises ContentMissing, with the stream's id, where what comes before the part is not here (spec B-67).
        """
        hashed = self._hashed(part)
        with self._state.hold():
            require_due()
            live = self._live(part.stream)
            with live.lock, self._state.read() as db:
                row, known = stream_row(db, part.stream), live.hashed
                is_behind = known is not None and known.offset == part.offset
                if row is not None and row.workspace != workspace:
                    raise ContentMissing([part.stream.hex()])
                if part.offset > (row.size if row else 0) and not is_behind:
                    raise ContentMissing([part.stream.hex()])
                if row is not None and row.size > part.offset:
                    self._cut_off(row, part.offset)
                if known is not None and known.offset > part.offset:
                    live.hashed = None
                for writer in live.writers:
                    writer.is_overtaken |= writer.end > part.offset
                descriptor = self._open_at(part.stream, part.offset)
                live.begun += 1
                live.used = time.monotonic()
                writer = Writer(live, part, sequence, descriptor, hashed, self._require_space, self._end)
                live.writers.append(writer)
        return writer

    def _hashed(self, part: Part) -> Hasher:
        """Return the hash of what comes before a part: as the part before left it, else read again."""
        hashed = self._live(part.stream).hashed
        if hashed is not None and hashed.offset == part.offset:
            return hashed.content.copy()
        if part.offset > self._durable_size(part.stream):
            raise ContentMissing([part.stream.hex()])
        return self._read(part.stream, part.offset) if part.offset else hasher()

    def _end(self, writer: Writer, descriptor: int, *, is_open: bool) -> None:
        """Let a writer go; what was written and not recorded takes no space.

        is_open: it may have been recorded, which the next start finds out.
        """
        live, stream = writer.live, writer.part.stream
        try:
            with self._state.hold(), live.lock:
                live.writers.remove(writer)
                is_its_file = self._lives.get(stream) is live  # else that is another one, or gone
                if is_its_file and not (live.writers or is_open):
                    self._keep_recorded(live, stream, descriptor)
        finally:
            os.close(descriptor)

    def _keep_recorded(self, live: _Live, stream: bytes, descriptor: int) -> None:
        with self._state.read() as db:
            row = stream_row(db, stream)
        size = row.size if row else 0
        if live.hashed is not None and live.hashed.offset > size:
            live.hashed = None
        if not size:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(stream.hex(), dir_fd=self.folder.fd)
        elif (status := os.fstat(descriptor)).st_size > size and status.st_nlink == 1:
            os.ftruncate(descriptor, size)
        if row and not size:
            with contextlib.suppress(DeltasyncError), self._state.write() as db:  # a full disk may not take it
                forget(db, [stream])

    def _cut_off(self, row: StreamRow, size: int) -> None:
        """Record that a stream is shorter, before its bytes from there on are written anew."""
        with self._state.write() as db:
            db.execute("UPDATE streams SET size = ? WHERE id = ?", (size, row.id))

    def _read(self, stream: bytes, size: int) -> Hasher:
        content, buffer, at = hasher(), memoryview(bytearray(_BUFFER_BYTES)), 0
        descriptor = os.open(stream.hex(), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.folder.fd)
        live = self._live(stream)
        with self._lock:
            live.readers += 1
        try:
            while at < size and (count := os.preadv(descriptor, [buffer[: size - at]], at)):
                content.update(buffer[:count])
                at += count
        finally:
            os.close(descriptor)
            live.used = time.monotonic()
            with self._lock:
                live.readers -= 1
        if at < size:
            raise ContentMissing([stream.hex()])
        return content

    def _open_at(self, stream: bytes, offset: int) -> int:
        """Return a descriptor to write a stream from an offset on, whose file is no blob and has all before it."""
        if not offset and self._is_lent(stream):
            os.unlink(stream.hex(), dir_fd=self.folder.fd)
        descriptor = self._open(stream, create=not offset)
        status = os.fstat(descriptor)
        if status.st_nlink == 1 and status.st_size >= offset:
            return descriptor
        os.close(descriptor)
        raise ContentMissing([stream.hex()])

    def _is_lent(self, stream: bytes) -> bool:
        """Tell whether a stream's file has another name: it is a blob, or may become one."""
        try:
            return self.folder.stat(stream.hex()).st_nlink > 1
        except FileNotFoundError:
            return False

    def _open(self, stream: bytes, *, create: bool = False) -> int:
        flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        try:
            with contextlib.suppress(PermissionError):
                return os.open(stream.hex(), flags, 0o600, dir_fd=self.folder.fd)
            os.chmod(stream.hex(), 0o600, dir_fd=self.folder.fd)  # it was given a blob's mode for a commit that failed
            return os.open(stream.hex(), flags, 0o600, dir_fd=self.folder.fd)
        except FileNotFoundError as error:
            raise ContentMissing([stream.hex()]) from error

    def opened(self, workspace: str, stream: bytes) -> tuple[int, int] | None:
        """Return a descriptor to read a stream of this workspace, and its durable size; None where there is none."""
        with self._state.read() as db:
            row = stream_row(db, stream)
        if row is None or row.workspace != workspace:
            return None
        self._live(stream).used = time.monotonic()
        with contextlib.suppress(FileNotFoundError):
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
            return os.open(stream.hex(), flags, dir_fd=self.folder.fd), row.size
        return None

    def take_whole(self, workspace: str, stream: bytes, operation: Operation, staging: Folder) -> bool:
        """Take a stream as it lies for the content of an operation, if it is that (spec ST-93); OSError: no links here.

        Its file gets a second name in a staging folder, and is written no more.
        """
        live = self._live(stream)
        begun = live.begun
        digest = self._digest_of_whole(live, workspace, stream, operation)
        if digest is None or digest.hex() != operation.digest:
            return False
        with live.lock:
            if live.begun != begun:
                return False  # what was hashed may be other bytes by now
            self._lend(live, stream, operation, staging)
        return True

    def _digest_of_whole(self, live: _Live, workspace: str, stream: bytes, operation: Operation) -> bytes | None:
        with live.lock, self._state.read() as db:
            row, hashed = stream_row(db, stream), live.hashed
            if row is None or (row.workspace, row.size) != (workspace, operation.size):
                return None
        try:
            is_known = hashed is not None and hashed.offset == operation.size
            return (hashed.content if hashed and is_known else self._read(stream, operation.size)).digest()
        except FileNotFoundError:
            return None

    def _lend(self, live: _Live, stream: bytes, operation: Operation, staging: Folder) -> None:
        for writer in live.writers:
            writer.is_overtaken = True
        descriptor = self._open(stream)  # another name that it has already is that of this content, not committed
        try:
            if os.fstat(descriptor).st_size < operation.size:
                raise ContentMissing([stream.hex()])
            os.ftruncate(descriptor, operation.size)
            os.fchmod(descriptor, EXECUTABLE_MODE if operation.executable else PLAIN_MODE)
            os.utime(descriptor, ns=(operation.mtime_ns, operation.mtime_ns))
        finally:
            os.close(descriptor)
        os.link(stream.hex(), operation.digest or "", src_dir_fd=self.folder.fd, dst_dir_fd=staging.fd)

    def expire(self, now: float) -> int:
        """Remove the streams that no part came of for a week; returns how many (spec ST-95)."""
        with self._state.hold():
            with self._state.read() as db:
                rows = stream_rows(db)
            old = [row.id for row in rows if row.touched < now - IDLE_SECONDS and not self._is_used(row)]
            if old or any(row.touched > now for row in rows):
                with self._state.write() as db:
                    forget(db, old)
                    # A clock that was ahead once must not keep a stream for as long.
                    db.execute("UPDATE streams SET touched = ?1 WHERE touched > ?1", (int(now),))
        self.remove(old)
        return len(old)

    def release(self, size_bytes: int, tenant: Tenant | None = None) -> None:
        """Remove streams that nobody uses, the oldest first, where that frees so many bytes (spec ST-96).

        tenant: only its own.
        """
        before = time.time() - GIVES_WAY_SECONDS
        with self._state.hold():
            with self._state.read() as db:
                rows = [row for row in stream_rows(db) if row.touched < before and not self._is_used(row)]
            rows = [row for row in rows if tenant in (None, tenant_of(row.workspace))]
            if sum(row.size for row in rows) < size_bytes:
                return
            for row in sorted(rows, key=lambda row: row.touched):
                if size_bytes <= 0:
                    return
                _log.warning("stream %s is removed: its %d bytes of space are needed", row.id.hex(), row.size)
                self.remove([row.id])  # first: a disk may be too full for the row to go, which names nothing then
                with contextlib.suppress(DeltasyncError), self._state.write() as db:
                    forget(db, [row.id])
                size_bytes -= row.size

    def _is_live(self, row: StreamRow) -> bool:
        live = self._lives.get(row.id)
        return live is not None and bool(live.writers or live.readers)

    def _is_used(self, row: StreamRow) -> bool:
        live = self._lives.get(row.id)
        is_recent = live is not None and time.monotonic() - live.used < GIVES_WAY_SECONDS
        return is_recent or self._is_live(row)

    def remove(self, streams: Iterable[bytes]) -> None:
        """Remove the files of streams whose rows are gone."""
        for stream in streams:
            with self._lock:
                live = self._lives.pop(stream, None)
            with live.lock if live else contextlib.nullcontext():
                for writer in live.writers if live else ():
                    writer.is_overtaken = True
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(stream.hex(), dir_fd=self.folder.fd)

    def _live(self, stream: bytes) -> _Live:
        with self._lock:
            live = self._lives.setdefault(stream, _Live())
            held = [each for each in self._lives.values() if each.hashed is not None and not each.writers]
            for other in held[: max(0, len(held) - _HASHES_MAX)]:
                other.hashed = None  # it is read again when it is needed
            return live


@dataclass(eq=False)
class Writer:
    """Writes one part into its stream; what it wrote counts once its row says so."""

    live: _Live
    part: Part
    _sequence: int
    _descriptor: int
    _content: Hasher
    _require_space: Callable[[int], None]
    _close: Callable[..., None]
    is_overtaken: bool = False
    """Another one writes the same place, or the stream is over: this part must not be recorded."""
    end: int = 0
    _unstarted: int = 0
    _is_recording: bool = False

    def __post_init__(self) -> None:
        self.end = self.part.offset

    def take(self, views: Iterator[memoryview], read_digest: Callable[[], bytes]) -> None:
        """Write the bytes of the part and verify the stream up to its end; raises Refused B-66."""
        for view in views:
            with self.live.lock:
                self._require_mine()
                self._write(view)
            self._content.update(view)
            self._unstarted += len(view)
            if self._unstarted >= _WRITEBACK_BYTES:
                start_writeback(self._descriptor)
                self._require_space(0)
                self._unstarted = 0
        if read_digest() != self._content.digest():
            raise Refused("B-66", "the stream is not of the digest that its part has behind it")
        with self.live.lock:
            self._require_mine()
            self.live.hashed = _Hashed(self.end, self._content, self._sequence)

    def _write(self, view: memoryview) -> None:
        while view:
            count = os.pwrite(self._descriptor, view, self.end)
            view = view[count:]
            self.end += count

    def _require_mine(self) -> None:
        if self.is_overtaken:
            raise HostBusy("another upload writes the same part of the stream; it is sent again")

    def make_durable(self, folder: Folder) -> None:
        """Make the bytes durable, and the file's name (spec ST-91)."""
        os.fsync(self._descriptor)
        if not self.part.offset:  # the name of what was recorded before is durable
            folder.fsync()

    def record(self, db: sqlite3.Connection, workspace: str, now: float) -> None:
        """Record what was written; nobody else can begin to write while the transaction is open."""
        with self.live.lock:
            self._require_mine()
            for other in self.live.writers:
                other.is_overtaken |= other is not self and other.part.offset < self.end
        self._is_recording = True
        row = StreamRow(self.part.stream, workspace, self.end, int(now))
        db.execute("INSERT OR REPLACE INTO streams VALUES (?, ?, ?, ?)", row)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._close(self, self._descriptor, is_open=self._is_recording and isinstance(error, Corrupt))


def stream_row(db: sqlite3.Connection, stream: bytes) -> StreamRow | None:
    """Return the row of a stream, or None."""
    row = db.execute(f"SELECT {_STREAM} FROM streams WHERE id = ?", (stream,)).fetchone()
    return StreamRow._make(row) if row else None


def stream_rows(db: sqlite3.Connection) -> list[StreamRow]:
    """Return every stream."""
    return [StreamRow._make(row) for row in db.execute(f"SELECT {_STREAM} FROM streams")]


def forget(db: sqlite3.Connection, streams: Collection[bytes]) -> None:
    """Remove the rows of streams; their files are removed after the commit."""
    db.executemany("DELETE FROM streams WHERE id = ?", [(stream,) for stream in streams])


_STREAM = ", ".join(StreamRow._fields)
