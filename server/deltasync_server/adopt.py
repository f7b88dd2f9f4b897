"""Adoption: files that lie on the host already become blobs, so that a first push need not send their content."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import msgspec

from deltasync.core.errors import Cancelled, UsageError
from deltasync.core.hashing import hasher
from deltasync.core.manifest import MTIME_MAX, MTIME_MIN, Kind, Operation, Verb
from deltasync.core.names import shown
from deltasync.disk import Folder, data_bytes, open_regular, pieces, reflink, space_guard
from deltasync_server.blobs import Staging, hash_of, is_executable
from deltasync_server.intake import LEASE_SECONDS
from deltasync_server.receive import Store
from deltasync_server.state import blob_row, blob_rows, grant, lease_adopted, write_blobs
from deltasync_server.tenants import DEFAULT, Tenant

KEEP_SECONDS = 30 * 86_400.0
KEEP_MAX = 1e11
"""Three thousand years: beyond any use, and still a number that the database holds."""
BATCH_FILES, BATCH_BYTES = 1_000, 256 << 20
"""A batch of content is made durable and recorded at once; so much is lost at most when a run is cut short."""
TOLD_FILES, TOLD_BYTES = 10_000, 4 << 30
"""How much is read between two lines that say how far it is."""
LEFT_OUT_MAX = 1_000
"""How many of the files that were left out an answer names."""
_BUFFER_BYTES = 1 << 20
_CANNOT_LINK = frozenset({errno.EXDEV, errno.EMLINK, errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOSYS})


class LeftOut(msgspec.Struct, frozen=True, kw_only=True):
    """A file or folder that was not adopted; its path is safe to print."""

    path: str
    reason: str


class Adopted(msgspec.Struct, kw_only=True):
    """What an adoption read, and what became of it: the members of `adopt --json`."""

    files: int = 0
    """Files that were read to their end."""
    bytes: int = 0
    stored: int = 0
    """Contents that the cache lacked."""
    stored_bytes: int = 0
    linked: int = 0
    """How many of those share their inode with the original."""
    present: int = 0
    """Files whose content the cache had, or got from a file before."""
    left_out: list[LeftOut] = []
    left_out_count: int = 0
    """How many were left out, also those beyond the list."""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class AdoptOptions:
    """How files are adopted."""

    trust: bool = False
    """Blobs are hard links of the files, where that is possible."""
    may_copy: bool = True
    """With trust: what cannot be linked is copied instead of left out."""
    keep_seconds: float = KEEP_SECONDS
    """How long a collection spares what nothing names yet."""
    tenant: Tenant = DEFAULT
    """Who holds the content from then on."""


class _Skipped(Exception):
    """A file is left out, for this reason; it never leaves this module."""


class _Stopped(Exception):
    """The user wants an end; it never leaves this module."""


@dataclass(frozen=True, slots=True)
class _File:
    """A regular file that is open to be read."""

    folder: Folder
    name: str
    path: str
    descriptor: int
    status: os.stat_result


class Adoption:
    """Reads folders and stores what the cache lacks, batch by batch; each batch is whole, whatever happens after it."""

    def __init__(
        self,
        store: Store,
        options: AdoptOptions,
        *,
        say: Callable[[str], None] = lambda line: None,
        should_stop: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Read nothing yet. say: told how far it is; should_stop: asked between two pieces; clock: for the lease."""
        self._store, self._options = store, options
        self._say, self._should_stop, self._clock = say, should_stop, clock
        self._result = Adopted()
        self._buffer = bytearray(_BUFFER_BYTES)
        self._present: dict[bytes, int] = {}
        """What is here already, each leased until its row says that it was adopted."""
        """Digests of this batch that the cache has already: the lease covers them as well."""
        self._without_reflink: set[int] = set()
        self._told_files = self._told_bytes = 0
        self._own = _identity(store.config.data.stat())
        self._device = os.fstat(store.cache.folder.fd).st_dev

    def run(self, folders: Sequence[Path]) -> Adopted:
        """Adopt every regular file below these folders; raises UsageError before any work.

        Cancelled and NoSpace come later: what was recorded before them stays.
        """
        began = time.monotonic()
        for folder in folders:
            self._require_usable(folder)
        with space_guard(self._store.config.data), closing(self._files(folders)) as files:
            while self._adopt_batch(files):
                pass
        self._result.seconds = time.monotonic() - began
        if self._should_stop():
            raise Cancelled(
                f"stopped after {self._result.files} files; what was read of them is kept, and the same command goes on"
            )
        return self._result

    # Where it reads

    def _require_usable(self, path: Path) -> None:
        name = shown(str(path))
        try:
            top = path.resolve(strict=True)
            with Folder.open(top) as folder:
                device = os.fstat(folder.fd).st_dev
        except FileNotFoundError as error:
            raise UsageError(f"there is no folder {name}") from error
        except OSError as error:
            raise UsageError(f"{name} is no folder that can be read: {error.strerror}") from error
        if self._own in {_identity(above.stat()) for above in (top, *top.parents)}:
            raise UsageError(f"{name} lies in the store itself; name a folder outside of it")
        if self._options.trust and device != self._device:
            sentence = f"{name} is on another file system than the store, which no hard link crosses"
            if not self._options.may_copy:
                raise UsageError(f"{sentence}; leave out --no-copy to have its files copied")
            self._say(f"{sentence}: its files are copied")

    def _files(self, folders: Sequence[Path]) -> Generator[_File, None, None]:
        """Yield every regular file, open; no link is followed below the folders, and the store itself is left out."""
        for path in folders:
            with Folder.open(path.resolve(strict=True)) as top:
                yield from self._walk(top, str(path))

    def _walk(self, top: Folder, path: str) -> Iterator[_File]:
        """Walk down with one held folder for each level, so that memory follows the largest folder alone."""
        levels = [(Folder(os.dup(top.fd)), path, self._listed(top, path))]
        try:
            while levels:
                folder, path, names = levels[-1]
                if not names:
                    levels.pop()[0].close()
                    continue
                name = names.pop()
                found = self._opened(folder, name, f"{path}/{name}")
                if isinstance(found, Folder):
                    levels.append((found, f"{path}/{name}", self._listed(found, f"{path}/{name}")))
                elif found is not None:
                    try:
                        yield found
                    finally:
                        os.close(found.descriptor)
        finally:
            for folder, _, _ in levels:
                folder.close()

    def _listed(self, folder: Folder, path: str) -> list[str]:
        """Return the names in a folder, the last one first."""
        try:
            return sorted(folder.names(), reverse=True)
        except OSError as error:
            self._leave_out(path, f"cannot be read ({error.strerror})")
            return []

    def _opened(self, folder: Folder, name: str, path: str) -> Folder | _File | None:
        """Open a folder or a regular file; None for anything else, and for what cannot be opened."""
        try:
            status = folder.stat(name)
            if stat.S_ISDIR(status.st_mode):
                if _identity(status) != self._own:
                    return folder.enter(name)
                self._leave_out(path, "is the store itself")
            elif stat.S_ISREG(status.st_mode):
                descriptor = open_regular(name, at=folder.fd)
                return _File(folder, name, path, descriptor, os.fstat(descriptor))
        except OSError as error:
            self._leave_out(path, f"cannot be read ({error.strerror})")
        return None

    def _leave_out(self, path: str, reason: str) -> None:
        self._result.left_out_count += 1
        if len(self._result.left_out) < LEFT_OUT_MAX:
            self._result.left_out.append(LeftOut(path=shown(path), reason=reason))

    # What it does with a file

    def _adopt_batch(self, files: Iterator[_File]) -> bool:
        """Adopt files until a batch is full, and record it; False when there are no more."""
        is_full = False
        with self._store.cache.staging() as staging:
            staging.is_durable = True
            for file in files:
                try:
                    self._adopt(staging, file)
                except _Skipped as skipped:
                    self._leave_out(file.path, str(skipped))
                except _Stopped:
                    break
                count = len(staging.staged) + len(self._present)
                is_full = count >= BATCH_FILES or staging.content_bytes >= BATCH_BYTES
                if is_full or self._should_stop():
                    break
            self._record(staging)
        return is_full and not self._should_stop()

    def _adopt(self, staging: Staging, file: _File) -> None:
        digest, content = self._read(file)
        self._result.files += 1
        self._tell()
        if digest in staging.staged or self._has_blob(digest):
            self._result.present += 1
            self._present[digest] = self._store.leases.add([digest], LEASE_SECONDS)
            return
        operation = Operation(
            operation=Verb.CREATED,
            kind=Kind.FILE,
            path=digest.hex(),
            digest=digest.hex(),
            size=file.status.st_size,
            executable=is_executable(file.status),
            mtime_ns=max(MTIME_MIN, min(file.status.st_mtime_ns, MTIME_MAX)),
        )
        self._stage(staging, operation, file, content)
        self._result.stored += 1
        self._result.stored_bytes += operation.size

    def _read(self, file: _File) -> tuple[bytes, memoryview | None]:
        """Return the digest of a file that held still, and its content where that came in one piece."""
        found, content, size = hasher(), None, 0
        for piece in self._pieces(file):
            content = piece if size == 0 else None
            found.update(piece)
            size += len(piece)
            self._result.bytes += len(piece)
            self._tell()
        status, before = os.fstat(file.descriptor), file.status
        if size != before.st_size or (status.st_mtime_ns, status.st_ctime_ns) != (
            before.st_mtime_ns,
            before.st_ctime_ns,
        ):
            raise _Skipped("changed while it was read")
        return found.digest(), content

    def _pieces(self, file: _File) -> Iterator[memoryview]:
        """Yield a file's bytes from its beginning; each piece is valid until the next."""
        found = pieces(file.descriptor, memoryview(self._buffer))
        while True:
            if self._should_stop():
                raise _Stopped
            try:
                piece = next(found, None)
            except OSError as error:
                raise _Skipped(f"cannot be read ({error.strerror})") from error
            if piece is None:
                return
            yield piece

    def _has_blob(self, digest: bytes) -> bool:
        with self._store.state.read() as db:
            row = blob_row(db, digest)
        return row is not None and self._store.cache.has_unchanged(row)

    # How content comes into the cache

    def _stage(self, staging: Staging, operation: Operation, file: _File, content: memoryview | None) -> None:
        """Store a content under its digest; nothing enters that was not hashed as it lies there (spec ST-71)."""
        if self._options.trust:
            reason = self._link(staging, operation, file)
            if reason is None:
                staging.take(operation)
                self._result.linked += 1
                return
            if not self._options.may_copy:
                raise _Skipped(reason)
        self._store.room.require()
        if self._reflink(staging, operation, file):
            staging.take(operation)
            return
        self._store.room.require(data_bytes(file.descriptor))
        try:
            staging.write(operation, self._hashed_again(file, operation) if content is None else [content])
        except _Skipped:
            staging.drop(operation)
            raise

    def _hashed_again(self, file: _File, operation: Operation) -> Iterator[memoryview]:
        found = hasher()
        for piece in self._pieces(file):
            found.update(piece)
            yield piece
        if found.digest().hex() != operation.digest:
            raise _Skipped("changed while it was copied")

    def _reflink(self, staging: Staging, operation: Operation, file: _File) -> bool:
        """Share the file's blocks; a file system that cannot once is not asked again."""
        if file.status.st_dev in self._without_reflink:
            return False
        descriptor = staging.create(operation)
        try:
            if not reflink(file.descriptor, descriptor):
                self._without_reflink.add(file.status.st_dev)
                staging.drop(operation)
                return False
            os.utime(descriptor, ns=(operation.mtime_ns, operation.mtime_ns))
        finally:
            os.close(descriptor)
        if self._hash_staged(staging, operation) != operation.digest:
            staging.drop(operation)
            raise _Skipped("changed while it was copied")
        return True

    def _hash_staged(self, staging: Staging, operation: Operation) -> str:
        descriptor = open_regular(operation.digest or "", at=staging.folder.fd)
        try:
            return hash_of(descriptor).hex()
        finally:
            os.close(descriptor)

    def _link(self, staging: Staging, operation: Operation, file: _File) -> str | None:
        """Make the blob another name of the file, and both read-only; else say why that cannot be."""
        name = operation.digest or ""
        if operation.mtime_ns != file.status.st_mtime_ns:
            return "has a time that no blob can have"
        try:
            os.link(file.name, name, src_dir_fd=file.folder.fd, dst_dir_fd=staging.folder.fd, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _CANNOT_LINK:
                raise
            return f"cannot be linked ({error.strerror})"
        try:
            linked, before = staging.folder.stat(name), file.status
            if not os.path.samestat(linked, before) or (linked.st_size, linked.st_mtime_ns) != (
                before.st_size,
                before.st_mtime_ns,
            ):
                raise _Skipped("changed while it was linked")
            mode = self._store.cache.attributes.mode_of(executable=operation.executable)
            os.fchmod(file.descriptor, mode)
        except PermissionError as error:
            staging.drop(operation)
            return f"cannot be made read-only ({error.strerror})"
        except BaseException:
            staging.drop(operation)
            raise
        return None

    def _record(self, staging: Staging) -> None:
        """Make a batch durable, bring it into the cache and write its rows, in this order (spec ST-70)."""
        if not (staging.staged or self._present):
            return
        staging.make_durable()
        state = self._store.state
        until = int(self._clock() + min(self._options.keep_seconds, KEEP_MAX))
        with state.hold():
            with state.read() as db:
                kept = blob_rows(db, staging.staged)
            with self._store.cache.published(staging, kept) as rows, state.write() as db:
                write_blobs(db, rows, kept)
                adopted = {*self._present, *staging.staged}
                grant(db, self._options.tenant, adopted)
                lease_adopted(db, adopted, until)
        for lease in self._present.values():
            self._store.leases.drop(lease)
        self._present.clear()

    def _tell(self) -> None:
        result = self._result
        if result.files - self._told_files >= TOLD_FILES or result.bytes - self._told_bytes >= TOLD_BYTES:
            self._told_files, self._told_bytes = result.files, result.bytes
            self._say(f"{result.files} files read ({result.bytes} bytes), {result.stored} contents stored")


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
