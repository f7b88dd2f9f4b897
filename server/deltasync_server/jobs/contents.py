"""Contents of a session: files that a dead command left become blobs, by hard link, reflink or copy (spec J-61)."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from deltasync.core.errors import Corrupt
from deltasync.core.hashing import hasher
from deltasync.core.manifest import MTIME_MAX, MTIME_MIN, Entry, Kind, Operation, Verb
from deltasync.disk import Folder, copy_bytes, data_bytes, open_regular, pieces, reflink, space_guard, start_writeback
from deltasync_server.adopt import BATCH_BYTES
from deltasync_server.blobs import Staging, hash_of
from deltasync_server.config import LinkMode
from deltasync_server.intake import ARRIVAL_SECONDS
from deltasync_server.receive import Store
from deltasync_server.state import blob_rows, grant, held_row, write_blobs
from deltasync_server.tenants import Tenant

_BATCH_FILES = 2_000
"""Each batch makes up to 256 folders of the cache durable."""
_BUFFER_BYTES = 1 << 20
_COPY = "copy"
"""A name that no content has."""


class Spoiled(Exception):
    """A file cannot be taken, for this reason."""


class Contents:
    """Takes files into the cache, some at a time; each batch is durable before its rows, and leased until the end."""

    def __init__(self, store: Store, tenant: Tenant, should_stop: Callable[[], None] = lambda: None) -> None:
        """should_stop: called between two pieces; it may raise an error of its own."""
        self._store, self._tenant, self._check = store, tenant, should_stop
        self._may_link = LinkMode(store.config.link) in (LinkMode.AUTO, LinkMode.HARDLINK)
        self._device = os.fstat(store.cache.folder.fd).st_dev
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._leases: list[int] = []
        """Of contents of this batch that the cache has."""
        self._batches: list[int] = []
        self._present: set[bytes] = set()
        """What the cache has of this batch."""
        self._staging = self._staged()

    def _staged(self) -> Staging:
        staging = self._store.cache.staging()
        staging.is_durable = True
        return staging

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._staging.__exit__(kind, error, trace)
        self._leases += self._batches
        self._drop_leases()

    def _drop_leases(self) -> None:
        while self._leases:
            self._store.leases.drop(self._leases.pop())

    def take(self, folder: Folder, name: str, *, but: bytes | None = None) -> Entry | None:
        """Make a blob of a file and return its entry; None where its digest is `but`. Raises Spoiled, and NoSpace."""
        try:
            descriptor = open_regular(name, at=folder.fd)
        except OSError as error:
            raise Spoiled(f"cannot be read ({error.strerror})") from error
        try:
            is_alone = self._is_alone(descriptor)
            status = os.fstat(descriptor)
            digest = self._digest(descriptor, status)
            mtime_ns = max(MTIME_MIN, min(status.st_mtime_ns, MTIME_MAX))
            entry = Entry(name, Kind.FILE, status.st_size, mtime_ns, bool(status.st_mode & 0o111), digest)
            if digest == but:
                return None
            if not (digest in self._staging.staged or self._has(digest)):
                with self._guarded():
                    self._stage(folder, entry, descriptor, may_link=is_alone and mtime_ns == status.st_mtime_ns)
        finally:
            os.close(descriptor)
        if len(self._staging.staged) + len(self._present) >= _BATCH_FILES or self._staging.content_bytes >= BATCH_BYTES:
            self.record()
        return entry

    def _is_alone(self, descriptor: int) -> bool:
        """Take away the mode to write a file; tell whether it has one name, is ours, and nobody can write it."""
        status = os.fstat(descriptor)
        if not self._may_link or status.st_nlink != 1 or status.st_dev != self._device:
            return False  # with another name it may be a blob
        try:
            if status.st_uid != os.geteuid():
                os.fchown(descriptor, os.geteuid(), os.getegid())
            os.fchmod(descriptor, self._store.cache.attributes.mode_of(executable=bool(status.st_mode & 0o111)))
        except OSError:
            return False
        return _has_no_writer(descriptor)

    def _digest(self, descriptor: int, before: os.stat_result) -> bytes:
        """Return the digest of a file that held still."""
        found = hasher()
        try:
            for piece in pieces(descriptor, self._buffer):
                self._check()
                found.update(piece)
        except OSError as error:
            raise Spoiled(f"cannot be read ({error.strerror})") from error
        after = os.fstat(descriptor)
        if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise Spoiled("changed while it was collected: something still writes it")
        return found.digest()

    def _has(self, digest: bytes) -> bool:
        """Tell whether the tenant holds a content, which is leased then."""
        with self._store.leases.guard, self._store.state.read() as db:
            row = held_row(db, self._tenant, digest)
            if row is None or not self._store.cache.has_unchanged(row):
                return False
            self._leases.append(self._store.leases.add([digest], ARRIVAL_SECONDS, self._tenant))
        self._present.add(digest)
        return True

    def _stage(self, folder: Folder, entry: Entry, descriptor: int, *, may_link: bool) -> None:
        operation = Operation(
            operation=Verb.CREATED,
            kind=Kind.FILE,
            path=entry.digest.hex(),
            digest=entry.digest.hex(),
            size=entry.size,
            executable=entry.executable,
            mtime_ns=entry.mtime_ns,
        )
        if not (may_link and self._link(folder, entry, descriptor)):
            self._store.room.require(data_bytes(descriptor))
            self._copy(operation, descriptor)
        start_writeback(descriptor)
        self._staging.take(operation)

    def _link(self, folder: Folder, entry: Entry, descriptor: int) -> bool:
        """Make the file itself the blob; False where no link can be made."""
        digest, staged = entry.digest.hex(), self._staging.folder
        try:
            os.link(entry.name, digest, src_dir_fd=folder.fd, dst_dir_fd=staged.fd, follow_symlinks=False)
        except OSError:
            return False
        if os.path.samestat(staged.stat(digest), os.fstat(descriptor)):
            return True
        os.unlink(digest, dir_fd=staged.fd)  # another file has the name by now: what was read is copied
        return False

    def _copy(self, operation: Operation, descriptor: int) -> None:
        """Write what an open file has; it is hashed as it lies there, and nothing else gets the name of its digest."""
        staged, mode = self._staging.folder, self._store.cache.attributes.mode_of(executable=operation.executable)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(_COPY, dir_fd=staged.fd)  # of one that was spoiled
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        copy = os.open(_COPY, flags, mode, dir_fd=staged.fd)
        try:
            if not reflink(descriptor, copy):
                copy_bytes(descriptor, copy)
            if hash_of(copy).hex() != operation.digest:
                raise Spoiled("changed while it was collected: something still writes it")
            os.utime(copy, ns=(operation.mtime_ns, operation.mtime_ns))
        finally:
            os.close(copy)
        os.rename(_COPY, operation.digest or "", src_dir_fd=staged.fd, dst_dir_fd=staged.fd)

    def record(self) -> None:
        """Make a batch durable, bring it into the cache and write its rows, in this order (spec ST-70)."""
        if self._staging.staged or self._present:
            with self._guarded():
                self._record(self._staging)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Have trouble with the store's disk end the collection: it is none of the file at hand."""
        try:
            with space_guard(self._store.config.data):
                yield
        except OSError as error:
            raise Corrupt(f"the store's disk failed ({error}); nothing was returned") from error

    def _record(self, staging: Staging) -> None:
        store = self._store
        staging.make_durable()
        lease = store.leases.add({*self._present, *staging.staged}, ARRIVAL_SECONDS, self._tenant)
        self._drop_leases()  # of single contents: this one has them all
        self._batches.append(lease)
        # Here, and not with the bundle: by then the tenant holds all of it (spec ST-131, H-108).
        with store.room.reserved(self._tenant, sum(each.size for each in staging.staged.values())), store.state.hold():
            with store.state.read() as db:
                kept = blob_rows(db, staging.staged)
            with store.cache.published(staging, kept) as rows, store.state.write() as db:
                write_blobs(db, rows, kept)
                grant(db, self._tenant, {*self._present, *staging.staged})
        self._present.clear()
        staging.__exit__(None, None, None)
        self._staging = self._staged()


def _has_no_writer(descriptor: int) -> bool:
    """Tell whether nobody has a file open to write, or in memory: only then the kernel gives a lease to read it."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)  # one that nobody hears, should a writer come at once
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except (OSError, AttributeError):
        return False
    return True
