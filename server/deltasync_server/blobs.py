"""Blobs: content named by its digest; staged while it arrives, published by rename, verified before each use."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import secrets
import stat
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from deltasync.core.errors import Corrupt, DeltasyncError
from deltasync.core.hashing import hasher
from deltasync.core.manifest import Operation
from deltasync.disk import (
    FILE_FLAGS,
    FULL,
    Folder,
    fsync_each,
    fsync_folder,
    make_private,
    open_regular,
    pieces,
    remove_tree,
    settle_each,
    start_writeback,
    write_piece,
)
from deltasync_server.state import BlobRow, split_digests
from deltasync_server.tenants import Tenant

PLAIN_MODE, EXECUTABLE_MODE = 0o444, 0o555
_WRITABLE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH
_BUFFER_BYTES = 1 << 20
_WRITEBACK_BYTES = 16 << 20
_PLAIN_FROM, _PLAIN_TO = 0, 2**31 * 10**9
_TOKEN_BYTES = 8
_PREFIX_DIGITS = 2
_OURS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""What says nothing of a blob: the process or the system has no descriptor or memory left."""
_LINK = "link"
"""A name that no content has."""
_log = logging.getLogger(__name__)


def says_nothing(error: OSError) -> bool:
    """Tell whether an error is of want of room, descriptors or memory, and says nothing of what is read."""
    return error.errno in _OURS | FULL


def is_executable(status: os.stat_result) -> bool:
    """Tell whether a file has the executable bit that entries carry."""
    return bool(status.st_mode & stat.S_IXUSR)


def is_unchanged(row: BlobRow, status: os.stat_result) -> bool:
    """Compare a blob's inode with its fingerprint (spec ST-24); ctime is no part of it, because link() changes it."""
    return (
        stat.S_ISREG(status.st_mode)
        and status.st_size == row.size
        and status.st_mtime_ns == row.mtime_ns
        and is_executable(status) == row.executable
        and not status.st_mode & _WRITABLE
    )


def hash_of(descriptor: int) -> bytes:
    """Return the digest of an open file's bytes, from its beginning; holes are not read."""
    found = hasher()
    for piece in pieces(descriptor, memoryview(bytearray(_BUFFER_BYTES))):
        found.update(piece)
    return found.digest()


class Attributes:
    """What this file system makes of a modification time, and the operator's umask of a mode."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        probe = 1_234_567_891_123_456_789
        status = self._probed(probe)
        self._has_nanoseconds = status.st_mtime_ns == probe
        self._granted = status.st_mode & 0o777

    def mtime_of(self, mtime_ns: int) -> int:
        """Return what a file's mtime reads as after it was set to this: it may be cut short, or be out of reach."""
        if self._has_nanoseconds and _PLAIN_FROM <= mtime_ns < _PLAIN_TO:
            return mtime_ns
        return self._remembered(mtime_ns)

    def mode_of(self, *, executable: bool) -> int:
        """Return the mode of a blob or tree file that was created here."""
        return self._granted & (EXECUTABLE_MODE if executable else PLAIN_MODE)

    @functools.lru_cache(maxsize=4096)  # noqa: B019  one of these lives as long as its store
    def _remembered(self, mtime_ns: int) -> int:
        return self._probed(mtime_ns).st_mtime_ns

    def _probed(self, mtime_ns: int) -> os.stat_result:
        name = f".probe-{secrets.token_hex(_TOKEN_BYTES)}"
        descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o777, dir_fd=self._folder.fd)
        try:
            os.utime(descriptor, ns=(mtime_ns, mtime_ns))
            return os.fstat(descriptor)
        finally:
            os.close(descriptor)
            os.unlink(name, dir_fd=self._folder.fd)


class Staging:
    """One folder that takes the content of one bundle in bundle order.

    Creating files straight in the cache's folders would scatter their inodes and take twice as long.
    """

    def __init__(self, parent: Folder) -> None:
        self._parent = parent
        self._name = secrets.token_hex(_TOKEN_BYTES)
        os.mkdir(self._name, 0o700, dir_fd=parent.fd)
        self.folder = parent.enter(self._name)
        self.staged: dict[bytes, Operation] = {}
        self.assembled: set[bytes] = set()
        """What of that was made by a recipe: no journal file can give it again."""
        self.content_bytes = 0
        """What arrived of it."""
        self.is_durable = False
        """Content is fsynced here, because no journal file stands for it."""

    def write(self, operation: Operation, views: Iterable[memoryview]) -> None:
        """Store one content with the mode and time of its operation; nothing is flushed here (spec ST-12).

        views: the holes among `pieces` of a file stay holes.
        """
        descriptor = self.create(operation)
        try:
            unstarted, is_at_hole = 0, False
            for view in views:
                is_at_hole = write_piece(descriptor, view)
                unstarted += 0 if is_at_hole else len(view)
                if self.is_durable and unstarted >= _WRITEBACK_BYTES:
                    start_writeback(descriptor)
                    unstarted = 0
            if is_at_hole:
                os.ftruncate(descriptor, operation.size)
            os.utime(descriptor, ns=(operation.mtime_ns, operation.mtime_ns))
        finally:
            os.close(descriptor)
        self.take(operation)

    def create(self, operation: Operation) -> int:
        """Make an empty file for one content and return its descriptor; nothing is staged before `take`."""
        mode = EXECUTABLE_MODE if operation.executable else PLAIN_MODE
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        return os.open(operation.digest or "", flags, mode, dir_fd=self.folder.fd)

    def take(self, operation: Operation, *, new_bytes: int | None = None) -> None:
        """Count a content that lies in the folder, complete, under its digest. new_bytes: what arrived of it."""
        digest = bytes.fromhex(operation.digest or "")
        self.staged[digest] = operation
        if new_bytes is not None:
            self.assembled.add(digest)
        self.content_bytes += operation.size if new_bytes is None else new_bytes

    def takes_link(self, target: str) -> bool:
        """Tell whether this file system holds a link with such a target."""
        try:
            os.symlink(target, _LINK, dir_fd=self.folder.fd)
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            return False
        os.unlink(_LINK, dir_fd=self.folder.fd)
        return True

    def drop(self, operation: Operation) -> None:
        """Remove the file of a content that was not taken."""
        os.unlink(operation.digest or "", dir_fd=self.folder.fd)

    def unjournalled(self) -> Collection[bytes]:
        """Return the contents for which no journal file stands."""
        return self.staged.keys() if self.is_durable else self.assembled

    def make_durable(self) -> None:
        """Fsync what no journal file stands for (spec ST-16, ST-17)."""
        for _, error in fsync_each(self.folder, [digest.hex() for digest in self.unjournalled()]):
            raise error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.folder.close()
        try:
            remove_tree(self._parent, self._name)
        except OSError as failed:  # what was committed out of it is, and the next start clears the rest away
            _log.warning("staged content could not be removed: %s", failed)


class Cache:
    """DATA/cache: 256 folders of blobs; rows say what is in them, and only a held writer lock changes either."""

    def __init__(self, data: Path) -> None:
        (data / "cache").mkdir(0o755, exist_ok=True)
        for name in ("staging", "quarantine"):
            make_private(data / name)
        self._data = data
        self._doubtful: set[str] = set()
        """Names of blobs that the disk failed when they were made durable; an fsync would say yes now."""
        self.folder = Folder.open(data / "cache")
        self._staging = Folder.open(data / "staging")
        self._quarantine = Folder.open(data / "quarantine")
        self._make_folders()
        self.attributes = Attributes(self._staging)

    def _make_folders(self) -> None:
        present = set(self.folder.names())
        missing = [name for name in (f"{number:02x}" for number in range(256)) if name not in present]
        for name in missing:
            os.mkdir(name, 0o755, dir_fd=self.folder.fd)
        if missing:
            self.folder.fsync()
            fsync_folder(self._data)

    def staging(self) -> Staging:
        """Return a fresh staging folder; it is removed when its block ends."""
        return Staging(self._staging)

    def clear_staging(self) -> None:
        """Remove what an interrupted receipt left; nobody may be receiving."""
        for name in self._staging.names():
            remove_tree(self._staging, name)

    def home_of(self, digest: bytes) -> Folder:
        """Hold the folder that a blob lies in, under its digest (spec ST-3)."""
        return self.folder.enter(digest.hex()[:_PREFIX_DIGITS])

    def status(self, digest: bytes) -> os.stat_result | None:
        """Return the stat of a blob's file, or None when there is none."""
        try:
            with self.home_of(digest) as home:
                return home.stat(digest.hex())
        except FileNotFoundError:
            return None

    def open(self, digest: bytes) -> int:
        """Return a descriptor to read a blob."""
        with self.home_of(digest) as home:
            return open_regular(digest.hex(), at=home.fd)

    def open_unchanged(self, row: BlobRow) -> int | None:
        """Return a descriptor to read a blob whose file has its fingerprint; None when it is another or none."""
        try:
            with self.home_of(row.digest) as home:
                descriptor = os.open(row.digest.hex(), FILE_FLAGS, dir_fd=home.fd)
        except OSError:
            return None  # who proves the blob meets that again
        if is_unchanged(row, os.fstat(descriptor)):
            return descriptor
        os.close(descriptor)
        return None

    def has_unchanged(self, row: BlobRow) -> bool:
        """Tell whether a blob's file is there and still has its fingerprint."""
        status = self.status(row.digest)
        return status is not None and is_unchanged(row, status)

    def holds_right_bytes(self, digest: bytes) -> bool:
        """Read a blob and compare its digest; an unreadable or missing file is not right.

        Raises OSError where descriptors or memory are used up: that is no reason to give a blob up.
        """
        try:
            descriptor = self.open(digest)
        except OSError as error:
            if says_nothing(error):
                raise
            return False
        try:
            return hash_of(descriptor) == digest
        except OSError as error:
            if says_nothing(error):
                raise
            return False
        finally:
            os.close(descriptor)

    @contextmanager
    def published(
        self, staging: Staging, kept: Mapping[bytes, BlobRow], *, renews: bool = False
    ) -> Iterator[list[BlobRow]]:
        """Move staged content into the cache and yield its rows; taken back when the block fails.

        The caller holds the writer lock and commits the rows in the block (spec ST-13, ST-21). If that leaves open
        whether they are there, content stays that no journal gives again: a stray at worst (spec ST-14).
        kept: rows that the cache had before; their blob stays, unless it lost its fingerprint, or `renews`.
        """
        rows: list[BlobRow] = []
        fresh: list[bytes] = []
        mtime_of, unjournalled = self.attributes.mtime_of, staging.unjournalled()
        is_complete = False
        try:
            for digest, operation in staging.staged.items():
                row = kept.get(digest)
                if row is not None and not renews and self.has_unchanged(row):
                    continue
                self._publish(staging, digest)
                if row is None:
                    fresh.append(digest)
                actual = mtime_of(operation.mtime_ns)
                rows.append(BlobRow(digest, operation.size, actual, operation.executable))
            self.make_names_durable(row.digest for row in rows if row.digest in unjournalled)
            is_complete = True
            yield rows
        except BaseException as error:
            is_open = is_complete and (isinstance(error, Corrupt) or not isinstance(error, DeltasyncError))
            for digest in fresh:
                if not (is_open and digest in unjournalled):
                    with contextlib.suppress(OSError):  # a stray at worst, and the first error is what is told
                        self.remove(digest)
            raise

    def make_names_durable(self, digests: Iterable[bytes]) -> None:
        """Fsync the folders that these blobs are in."""
        for _, error in settle_each(self._fsync_home, sorted({digest.hex()[:_PREFIX_DIGITS] for digest in digests})):
            raise error

    def _fsync_home(self, name: str) -> None:
        with self.folder.enter(name) as entered:
            try:
                entered.fsync()
            except OSError:
                self._doubtful.update(entered.names())  # also names that other bundles count on
                raise

    def doubt(self, digest: bytes) -> None:
        """Remember that the disk failed a blob, until it is published again."""
        self._doubtful.add(digest.hex())

    def is_doubtful(self, digest: bytes) -> bool:
        """Tell whether the disk failed a blob or its folder, so that only another file under its name is durable."""
        return digest.hex() in self._doubtful

    def _publish(self, staging: Staging, digest: bytes) -> None:
        name = digest.hex()
        self._doubtful.discard(name)
        with self.home_of(digest) as home:
            try:
                os.rename(name, name, src_dir_fd=staging.folder.fd, dst_dir_fd=home.fd)
            except IsADirectoryError:
                self.quarantine(digest)
                os.rename(name, name, src_dir_fd=staging.folder.fd, dst_dir_fd=home.fd)

    def restamp(self, digest: bytes, mtime_ns: int, *, executable: bool) -> None:
        """Give a blob's inode another time and executable bit."""
        descriptor = self.open(digest)
        try:
            wanted = self.attributes.mode_of(executable=executable)
            if os.fstat(descriptor).st_mode & 0o777 != wanted:
                os.fchmod(descriptor, wanted)
            os.utime(descriptor, ns=(mtime_ns, mtime_ns))
        finally:
            os.close(descriptor)

    def remove(self, digest: bytes) -> None:
        """Remove a blob's file."""
        with contextlib.suppress(FileNotFoundError), self.home_of(digest) as home:
            os.unlink(digest.hex(), dir_fd=home.fd)

    def move_to(self, waste: Staging, digest: bytes) -> None:
        """Take a blob's file out of the cache, to be removed when the staging folder is."""
        name = digest.hex()
        with contextlib.suppress(FileNotFoundError), self.home_of(digest) as home:
            os.rename(name, name, src_dir_fd=home.fd, dst_dir_fd=waste.folder.fd)

    def quarantine(self, digest: bytes) -> None:
        """Take a blob whose bytes are wrong out of the cache; an operator may want to look at it."""
        name = f"{digest.hex()}.{secrets.token_hex(_TOKEN_BYTES)}"
        with contextlib.suppress(FileNotFoundError), self.home_of(digest) as home:
            os.rename(digest.hex(), name, src_dir_fd=home.fd, dst_dir_fd=self._quarantine.fd)

    def strays(self, known: Iterable[bytes]) -> list[str]:
        """Return what lies in the cache's folders without a row."""
        names = {digest.hex() for digest in known}
        return [
            f"{folder}/{name}"
            for folder in sorted(self.folder.names())
            for name in self._listed(folder)
            if name not in names or not name.startswith(folder)
        ]

    def _listed(self, folder: str) -> list[str]:
        try:
            with self.folder.enter(folder) as entered:
                return sorted(entered.names())
        except NotADirectoryError:
            return [""]

    def remove_stray(self, place: str) -> None:
        """Remove something that `strays` returned."""
        folder, _, name = place.partition("/")
        if not name:
            remove_tree(self.folder, folder)
            return
        with self.folder.enter(folder) as entered:
            remove_tree(entered, name)

    def close(self) -> None:
        """Let the folders go."""
        for folder in (self.folder, self._staging, self._quarantine):
            folder.close()


class _Lease(NamedTuple):
    until: float
    packed: bytes
    tenant: Tenant | None


class Leases:
    """Digests that no collection may remove for a while, by a clock that no one can set."""

    def __init__(self) -> None:
        self.guard = threading.RLock()
        """Held while digests are looked up and leased, and while unleased ones are removed: neither comes between."""
        self._held: dict[int, _Lease] = {}
        self._next = 0

    def add(self, digests: Iterable[bytes], seconds: float, tenant: Tenant | None = None) -> int:
        """Lease digests; returns the lease's number. tenant: for whom; None is for all."""
        with self.guard:
            self._drop_expired()
            self._next += 1
            self._held[self._next] = _Lease(time.monotonic() + seconds, b"".join(digests), tenant)
            return self._next

    def drop(self, number: int) -> None:
        """End a lease before its time."""
        with self.guard:
            self._held.pop(number, None)

    def digests(self, tenant: Tenant | None = None) -> set[bytes]:
        """Return every digest that is leased now. tenant: only what is leased for this one, or for all."""
        with self.guard:
            self._drop_expired()
            of = [each for each in self._held.values() if None in (tenant, each.tenant) or each.tenant == tenant]
            return {digest for each in of for digest in split_digests(each.packed)}

    def _drop_expired(self) -> None:
        now = time.monotonic()
        for number in [number for number, each in self._held.items() if each.until <= now]:
            del self._held[number]
