"""Every durable file write and every confined path operation."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import secrets
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, Self

from deltasync.core.errors import AlreadyRunning, DeltasyncError, Fact, NoSpace, UsageError
from deltasync.core.names import bytes_text

try:
    import fcntl
except ModuleNotFoundError:  # Windows: importable, and `require_confinement` says what is missing
    fcntl = None  # type: ignore[assignment]

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_REFUSALS = frozenset(
    {
        errno.EIO,
        errno.EROFS,
        errno.EMFILE,
        errno.ENFILE,
        errno.EACCES,
        errno.EPERM,
        errno.ESTALE,
        errno.ENODEV,
        errno.ENXIO,
        errno.ENOMEM,
    }
)
"""What a system says for reasons of its own: no traceback of ours explains it."""
_CLOEXEC = getattr(os, "O_CLOEXEC", 0)
DIRECTORY_FLAGS = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0) | _CLOEXEC
"""To hold a folder: never through a link."""
PASSING_FLAGS = DIRECTORY_FLAGS | getattr(os, "O_PATH", 0)
"""To hold a folder on the way to another one, which needs no leave to list it."""
FILE_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | _CLOEXEC
"""To read a file: never through a link, never blocking on a FIFO."""
FSYNC_THREADS, MANY_FILES = 16, 32
"""How many fsync at once, and of how many files on."""
HOLE_BYTES_MIN = 64 << 10
"""A smaller hole is not worth the trouble of keeping it."""
_ZERO_BYTES = bytes(1 << 20)
ZEROS = memoryview(_ZERO_BYTES)
"""What a hole holds; `pieces` yields views of this, and nothing else, for holes."""
_COPY_BYTES = 1 << 20
_COPY_STEP_BYTES = 256 << 20
_BLOCK_BYTES = 512
"""What st_blocks counts, whatever the file system's own blocks are."""
_ANNOUNCED_BYTES = 512 << 10
"""Linux takes no more of one announcement than the device takes of one request."""
_FICLONE = 0x40049409
_WRITE_NOW = 2


class DiskFull(NoSpace):
    """A disk that takes no more, and how much is free on it."""

    def __init__(self, sentence: str, free_bytes: int, **facts: Fact) -> None:
        """Make the error; sentence: what is free stands where it has `{free}`."""
        super().__init__(sentence.replace("{free}", bytes_text(free_bytes)), free_bytes=free_bytes, **facts)
        self._sentence, self._free_bytes = sentence, free_bytes

    def coarse(self, unit_bytes: int) -> DiskFull:
        """Return the same for who may not know to the byte what is free: in whole units."""
        free_bytes = self._free_bytes // unit_bytes * unit_bytes
        sentence, facts = self._sentence, {name: fact for name, fact in self.facts.items() if name != "free_bytes"}
        if not free_bytes:
            sentence = sentence.replace("{free}", f"less than {bytes_text(unit_bytes)}")
        return DiskFull(sentence, free_bytes, **facts)


def require_confinement() -> None:
    """Raise UsageError where the system cannot name files below a held folder, as every path operation here does."""
    if fcntl is None or os.open not in os.supports_dir_fd:
        raise UsageError("this system cannot confine file access to a folder; run deltasync on Linux, macOS or in WSL")


@contextmanager
def space_guard(where: Path | str) -> Iterator[None]:
    """Turn "no space", "quota" and "file too large" of the operating system into NoSpace."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise full(where) from error
        raise


def refusal(error: Exception) -> DeltasyncError | None:
    """Return what a disk or a limit of the system refused as one sentence, or None for what needs looking into."""
    if isinstance(error, MemoryError):
        return DeltasyncError("the system gives no more memory; when some is free, run it again")
    if lacks_threads(error):
        return DeltasyncError("the system starts no more threads; when a limit is raised or some end, run it again")
    if not isinstance(error, OSError):
        return None
    if error.errno in FULL:
        return full(error.filename or "the disk")
    if error.errno not in _REFUSALS:
        return None
    at = f" at {error.filename}" if error.filename else ""
    return DeltasyncError(f"the system refused{at}: {os.strerror(error.errno or 0)}; when that is mended, run it again")


def lacks_threads(error: Exception) -> bool:
    """Tell whether an error says that the system starts no more threads; Python has no type for it."""
    return isinstance(error, RuntimeError) and "start new thread" in str(error)


def full(where: Path | str) -> NoSpace:
    """Return the error of a disk that takes no more, with how much is free there: a quota may end earlier."""
    from shutil import disk_usage  # imported here: it is slow, and needed when things are

    for place in (Path(where), *Path(where).absolute().parents):
        with contextlib.suppress(OSError):
            free_bytes = disk_usage(place).free
            return DiskFull(f"no space left at {where} ({{free}} free); free some and try again", free_bytes)
    return NoSpace(f"no space left at {where}; free some and try again")


@contextmanager
def staged(final: Path, *, durable: bool = True, mode: int = 0o600) -> Iterator[BinaryIO]:
    """Write a file that appears at `final` whole or not at all.

    durable: fsync the bytes before and the folder after the rename.
    """
    temporary = final.with_name(f".{final.name[:80]}.{secrets.token_hex(6)}.tmp")
    with space_guard(final):
        out = open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _CLOEXEC, mode), "wb")
        try:
            with out:
                yield out
                out.flush()
                if durable:
                    os.fsync(out.fileno())
            os.rename(temporary, final)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        if durable:
            fsync_folder(final.parent)


def fsync_folder(path: Path | str) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, DIRECTORY_FLAGS)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path, *, durable: bool) -> None:
    """Make a folder with those above it that are not there. durable: their names are so when this returns."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for each in dict.fromkeys((*reversed(missing), path)) if durable else ():
        try:
            fsync_folder(each.parent.resolve())  # also of one that is there: who made it may have been killed
        except PermissionError:
            if each in missing:
                raise


def make_private(folder: Path) -> None:
    """Make a folder that its owner alone may enter, or see to it that it is so (spec ST-5)."""
    folder.mkdir(0o700, exist_ok=True)
    if folder.stat().st_mode & 0o077:
        folder.chmod(0o700)


def write_all(descriptor: int, content: bytes | memoryview) -> None:
    """Write every byte, also when the kernel takes only some at a time."""
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def start_writeback(descriptor: int) -> None:
    """Ask the kernel to begin writing a file's bytes, where it can be asked.

    Many files started first and fsynced then cost half of fsyncing each from cold: the journal of the file system is
    committed once instead of once a file.
    """
    start = _writeback()
    if start is not None:
        start(descriptor)


@functools.cache
def _writeback() -> Callable[[int], object] | None:
    import ctypes

    sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None) if os.name == "posix" else None
    if sync_file_range is None:
        return None
    everything = (ctypes.c_int64(0), ctypes.c_int64(0))
    return lambda descriptor: sync_file_range(descriptor, *everything, _WRITE_NOW)


class Lock:
    """An exclusive advisory lock on a file, held until closed or until the process ends."""

    def __init__(self, path: Path | str, sentence: str, *, at: int | None = None, wait: bool = False) -> None:
        """Take the lock at once or raise AlreadyRunning with the sentence; or wait for it.

        at: descriptor of the folder that holds the file; then a link of its name is not followed.
        """
        no_link = 0 if at is None else getattr(os, "O_NOFOLLOW", 0)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | no_link | _CLOEXEC, 0o600, dir_fd=at)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            os.close(self._descriptor)
            raise AlreadyRunning(sentence) from error

    def is_named(self, path: Path | str, *, at: int | None = None) -> bool:
        """Tell whether the locked file has its name; who waited for a lock may have got that of a removed file."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(path, dir_fd=at, follow_symlinks=False))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Release the lock."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_regular(name: str, *, at: int | None = None) -> int:
    """Open a regular file for reading; never follows a link, never blocks on a FIFO.

    at: descriptor of the folder that holds it. Raises OSError ELOOP for a link and EINVAL for what is no file.
    """
    descriptor = os.open(name, FILE_FLAGS, dir_fd=at)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", name)
    return descriptor


class Folder:
    """A held folder: every operation below it names one component, or walks components without following links."""

    __slots__ = ("fd",)

    def __init__(self, descriptor: int) -> None:
        self.fd = descriptor

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Hold the folder at a path that the operator or user named (the last component may not be a link)."""
        return cls(os.open(path, DIRECTORY_FLAGS))

    def enter(self, name: str) -> Folder:
        """Hold a folder directly inside this one."""
        return Folder(os.open(name, DIRECTORY_FLAGS, dir_fd=self.fd))

    def walk_to(self, path: str, *, create: bool = False) -> Folder:
        """Hold the folder at a relative path below this one ('' is this folder itself), one component at a time."""
        here = Folder(os.dup(self.fd))
        parts = [part for part in path.split("/") if part]
        for depth, part in enumerate(parts, start=1):
            if part in (".", ".."):
                here.close()
                raise OSError(errno.EINVAL, "not a plain component", path)
            try:
                if create:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, 0o755, dir_fd=here.fd)
                flags = DIRECTORY_FLAGS if depth == len(parts) else PASSING_FLAGS
                there = Folder(os.open(part, flags, dir_fd=here.fd))
            finally:
                here.close()
            here = there
        return here

    def names(self) -> list[str]:
        """Return the names in this folder."""
        return os.listdir(self.fd)

    def stat(self, name: str) -> os.stat_result:
        """Stat an entry of this folder without following it."""
        return os.stat(name, dir_fd=self.fd, follow_symlinks=False)

    def fsync(self) -> None:
        """Make the names in this folder durable."""
        os.fsync(self.fd)

    def close(self) -> None:
        """Let the folder go."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def remove_tree(parent: Folder, name: str) -> None:
    """Remove an entry of a held folder, with everything below it; links are removed, never followed."""
    try:
        os.unlink(name, dir_fd=parent.fd)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno not in (errno.EISDIR, errno.EPERM):
            raise
        with contextlib.suppress(FileNotFoundError):  # somebody else removes it as well
            with parent.enter(name) as folder:
                for child in folder.names():
                    remove_tree(folder, child)
            os.rmdir(name, dir_fd=parent.fd)


def reflink(source: int, target: int) -> bool:
    """Make `target` share the blocks of `source` (both descriptors); False where the file system cannot."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EPERM):
            return False
        raise
    return True


class Extent(NamedTuple):
    """A run of a file's bytes: data, or a hole, which holds zeros and takes no space."""

    start: int
    end: int
    is_hole: bool


def has_holes(status: os.stat_result) -> bool:
    """Tell whether a file may have holes that this system can tell from data: it takes less space than it has bytes."""
    return hasattr(os, "SEEK_DATA") and status.st_blocks * _BLOCK_BYTES < status.st_size


def extents(descriptor: int) -> Iterator[Extent]:
    """Yield the extents of an open file in order, each looked up when its turn comes; moves the file's position.

    A file that takes as much space as it has bytes is one of data, and so is any file of a system that knows no holes.
    """
    status = os.fstat(descriptor)
    size = status.st_size
    if not has_holes(status):
        yield Extent(0, size, is_hole=False)
        return
    at = 0
    while at < size:
        start = min(size, _sought(descriptor, at, os.SEEK_DATA, otherwise=at))
        if start > at:
            yield Extent(at, start, is_hole=True)
        if start < size:
            end = max(start + 1, min(size, _sought(descriptor, start, os.SEEK_HOLE, otherwise=size)))
            yield Extent(start, end, is_hole=False)
            start = end
        at = start


def _sought(descriptor: int, at: int, what: int, *, otherwise: int) -> int:
    """Return where data or a hole begins; `otherwise`: where the file system cannot say."""
    try:
        return os.lseek(descriptor, at, what)
    except OSError as error:
        if error.errno == errno.ENXIO:  # nothing but a hole from here on
            return sys.maxsize
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            return otherwise
        raise


def data_bytes(descriptor: int) -> int:
    """Return how many bytes of an open file are no holes."""
    return sum(end - start for start, end, is_hole in extents(descriptor) if not is_hole)


def _read_at(descriptor: int, buffer: memoryview, start: int, _: int) -> int:
    return os.preadv(descriptor, [buffer], start)


def pieces(
    descriptor: int, buffer: memoryview, read: Callable[[int, memoryview, int, int], int] = _read_at
) -> Iterator[memoryview]:
    """Yield an open file's bytes from its beginning; each piece is valid until the next one.

    Holes are not read. What is written behind the end meanwhile is not seen; where the file ends earlier, so does this.
    read: reads from an offset, as preadv does, where there are data up to another one.
    """
    for start, end, is_hole in extents(descriptor):
        while start < end:
            count = min(end - start, len(ZEROS if is_hole else buffer))
            piece = ZEROS[:count] if is_hole else buffer[: read(descriptor, buffer[:count], start, end)]
            if not piece:
                return
            start += len(piece)
            yield piece


def announce(descriptor: int, start: int, end: int) -> None:
    """Have the kernel begin to read a stretch of an open file, so that reading it waits less; a hint, and no more."""
    if hasattr(os, "posix_fadvise"):
        for at in range(start, end, _ANNOUNCED_BYTES):
            os.posix_fadvise(descriptor, at, min(_ANNOUNCED_BYTES, end - at), os.POSIX_FADV_WILLNEED)


def is_zeros(content: bytes) -> bool:
    """Tell whether bytes are zeros alone, enough of them to be left out of a new file as a hole."""
    return len(content) >= HOLE_BYTES_MIN and _ZERO_BYTES.startswith(content)


def write_piece(descriptor: int, piece: memoryview) -> bool:
    """Write one of `pieces`, or leave a hole as one (True): behind a last one the caller sets the size."""
    is_hole = piece.obj is ZEROS.obj
    if is_hole:
        os.lseek(descriptor, len(piece), os.SEEK_CUR)
    else:
        write_all(descriptor, piece)
    return is_hole


def fsync_each(folder: Folder, names: Sequence[str]) -> Iterator[tuple[str, OSError]]:
    """Make files of a held folder durable; yields those that the disk failed."""

    def settle(name: str) -> None:
        descriptor = open_regular(name, at=folder.fd)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    return settle_each(settle, names)


def settle_each(settle: Callable[[str], None], names: Sequence[str]) -> Iterator[tuple[str, OSError]]:
    """Have each name made durable; yields those that the disk failed.

    Many go at once, from several threads: a disk makes those durable together, and takes little longer than for one.
    """

    def failed(share: Sequence[str]) -> list[tuple[str, OSError]]:
        found = []
        for name in share:
            try:
                settle(name)
            except OSError as error:
                found.append((name, error))
        return found

    if len(names) < MANY_FILES:
        yield from failed(names)
        return
    from concurrent.futures import ThreadPoolExecutor

    shares = [names[first::FSYNC_THREADS] for first in range(FSYNC_THREADS)]  # not one task each
    with ThreadPoolExecutor(FSYNC_THREADS, "deltasync-fsync") as pool:
        for found in pool.map(failed, shares):
            yield from found


def copy_bytes(source: int, target: int, go_on: Callable[[], None] = lambda: None) -> None:
    """Copy everything from one descriptor to an empty file, inside the kernel where it can; holes stay holes.

    go_on: called again and again; it raises to break off.
    """
    end = 0
    is_hole = False
    for start, end, is_hole in extents(source):
        at = start
        while at < end and not is_hole:
            go_on()
            _copy_range(source, target, at, min(end, at + _COPY_STEP_BYTES))
            at += _COPY_STEP_BYTES
    if is_hole:
        os.ftruncate(target, end)


def _copy_range(source: int, target: int, start: int, end: int) -> None:
    while start < end:
        try:
            count = os.copy_file_range(source, target, end - start, start, start)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            break
        if not count:
            return
        start += count
    while start < end and (chunk := os.pread(source, min(_COPY_BYTES, end - start), start)):
        start += os.pwrite(target, chunk, start)
