"""Digests of files on disk: one reused buffer, no hole read, no link followed, no FIFO waited for, no change missed."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass

from deltasync.client.observation import Follower
from deltasync.core.chunks import Chunker
from deltasync.core.hashing import Hasher, digest_of, hasher
from deltasync.disk import FILE_FLAGS, announce, pieces

BUFFER_BYTES = 1 << 20
AHEAD_FILES, AHEAD_BYTES = 16, 8 << 20
"""How far ahead of the reading a disk is told what comes: so many files, and so much of one large file."""
_SMALL_BYTES = 128 << 10
_SLOW_READS = 64
"""After one read that was waited for, so many more are taken for reads from a disk."""
_CAN_TELL = hasattr(os, "RWF_NOWAIT")

Following = Callable[[os.stat_result], Follower | None]
"""Returns who follows the reading of a large file that is not cut, if somebody does."""
Cutting = Callable[[int, int], int | None]
"""Says of an open file and its size how large its chunks are to be on average; None: it is not cut."""


class FileChanging(Exception):
    """A file changed while it was read; `status` is how it looked at the end."""

    def __init__(self, status: os.stat_result) -> None:
        super().__init__("the file changed while it was read")
        self.status = status


@dataclass(frozen=True, slots=True)
class Digested:
    """What a file holds, and its stat, equal before and after it was read."""

    digest: bytes
    status: os.stat_result
    listed: bytes | None = None
    """The packed list of its chunks, if it was cut."""


class Ahead:
    """What is read next, announced to the kernel while reads wait for a disk, so that the disk has a queue.

    Where everything lies in memory nothing is announced, and nothing is opened early.
    """

    def __init__(self) -> None:
        """Take everything to lie in memory."""
        self._slow_reads = 0
        self._opened: dict[str, int] = {}
        self._announced_to = 0

    @property
    def files(self) -> int:
        """How many files beyond the one that is read are to be announced."""
        return AHEAD_FILES if self._slow_reads else 0

    def announce(self, name: str, size: int, *, at: int) -> None:
        """Open a file and have the kernel begin to read it; trouble is left to whoever reads it.

        at: descriptor of the folder that holds it; `opened` or `clear` comes before another folder's files.
        """
        if len(self._opened) >= AHEAD_FILES:
            self.clear()  # not all that was announced is read: some has not settled
        with contextlib.suppress(OSError):
            self._opened[name] = descriptor = os.open(name, FILE_FLAGS, dir_fd=at)
            announce(descriptor, 0, min(size, AHEAD_BYTES // AHEAD_FILES))

    def opened(self, name: str, *, at: int | None) -> int:
        """Return a descriptor of the file that has a name now, announced or not; raises OSError."""
        self._announced_to = 0
        descriptor = self._opened.pop(name, None)
        if descriptor is not None:
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(descriptor), os.stat(name, dir_fd=at, follow_symlinks=False)):
                    return descriptor
            os.close(descriptor)  # another file took the name since, or none has it
        try:
            return os.open(name, FILE_FLAGS, dir_fd=at)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._opened:
                raise
        self.clear()
        return os.open(name, FILE_FLAGS, dir_fd=at)

    def read(self, descriptor: int, buffer: memoryview, start: int, end: int) -> int:
        """Read into a buffer as preadv does, and announce what follows up to `end` while the disk is waited for."""
        if not _CAN_TELL:
            return os.preadv(descriptor, [buffer], start)
        try:
            count = os.preadv(descriptor, [buffer], start, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
                raise
            count = -1
        is_slow = count < min(len(buffer), end - start)
        self._slow_reads = _SLOW_READS if is_slow else max(0, self._slow_reads - 1)
        if self._slow_reads:
            first, self._announced_to = max(start, self._announced_to), min(end, start + len(buffer) + AHEAD_BYTES)
            announce(descriptor, first, self._announced_to)
        return os.preadv(descriptor, [buffer], start) if is_slow else count

    def clear(self) -> None:
        """Close what was opened early."""
        while self._opened:
            os.close(self._opened.popitem()[1])


class Digester:
    """Hashes files one after another through one buffer, which is made when first needed.

    progress is told the bytes read so far of a file that does not fit into a part of the buffer. ahead: what is told
    to the disk of the files to come.
    """

    def __init__(self, progress: Callable[[int], None] | None = None) -> None:
        """Begin without a large buffer."""
        self._small = memoryview(bytearray(_SMALL_BYTES))
        self._large: memoryview | None = None
        self._progress = progress
        self.ahead = Ahead()

    def digest_file(
        self, name: str, *, at: int | None = None, cutting: Cutting | None = None, following: Following | None = None
    ) -> Digested:
        """Return the digest of a regular file; at: descriptor of the folder that holds it.

        cutting: says of a large file whether it is to be cut into chunks in the same read. following: says who hears
        how far the reading of a large file is that is not; how it ended is for the caller to say.
        Raises FileChanging, and OSError when it cannot be read or is no regular file (see disk.open_regular).
        """
        # disk.open_regular, with one fstat for both purposes: this runs for every file of a first scan.
        descriptor = self.ahead.opened(name, at=at)
        chunker: Chunker | None = None
        try:
            before = os.fstat(descriptor)
            if not stat.S_ISREG(before.st_mode):
                raise OSError(errno.EINVAL, "not a regular file", name)
            size = before.st_size
            count = self.ahead.read(descriptor, self._small, 0, size) if size < _SMALL_BYTES else 0
            if count == size:
                digest = digest_of(self._small[:count])
            else:
                average = cutting(descriptor, size) if cutting is not None else None
                chunker = Chunker(average) if average else None
                follower = following(before) if following is not None and chunker is None else None
                count, digest = self._digest_large(descriptor, before, chunker, follower)
            after = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        if count != size or not is_same(before, after):
            raise FileChanging(after)
        return Digested(digest, after, chunker.finish() if chunker else None)

    def _digest_large(
        self, descriptor: int, before: os.stat_result, chunker: Chunker | None, follower: Follower | None
    ) -> tuple[int, bytes]:
        content = hasher()
        total = 0
        if self._large is None:
            self._large = memoryview(bytearray(BUFFER_BYTES))
        for part in pieces(descriptor, self._large, self.ahead.read):
            if follower is None:
                content.update(part)
            else:
                _update(content, part, total, follower)
            if chunker is not None:
                chunker.update(part)
            total += len(part)
            # A file that grows without end, or was changed early, is not read to its end in vain.
            now = os.fstat(descriptor)
            if not is_same(before, now):
                raise FileChanging(now)
            if self._progress is not None:
                self._progress(total)
        return total, content.digest()


def _update(content: Hasher, part: memoryview, total: int, follower: Follower) -> None:
    """Hash a part of a file that begins at an offset, and stop wherever the follower wants the hash."""
    while total + len(part) >= follower.at:
        before, part = part[: follower.at - total], part[follower.at - total :]
        content.update(before)
        total += len(before)
        follower.reach(content)
    content.update(part)


def is_same(before: os.stat_result, after: os.stat_result) -> bool:
    """Tell whether two stats show one file that did not change between them."""
    return (
        before.st_size == after.st_size
        and before.st_mtime_ns == after.st_mtime_ns
        and before.st_ctime_ns == after.st_ctime_ns
        and before.st_ino == after.st_ino
    )
