"""Digests of files on disk: one reused buffer, no hole read, no link followed, nothing waited for, no change missed."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass

from deltasync.core.chunks import Chunker
from deltasync.core.hashing import digest_of, hasher
from deltasync.disk import FILE_FLAGS, pieces

BUFFER_BYTES = 8 << 20
_SMALL_BYTES = 128 << 10

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


class Digester:
    """Hashes files one after another through one buffer, which is made when first needed.

    progress is told the bytes read so far of a file that does not fit into a part of the buffer.
    """

    def __init__(self, progress: Callable[[int], None] | None = None) -> None:
        """Begin without a large buffer."""
        self._small = memoryview(bytearray(_SMALL_BYTES))
        self._large: memoryview | None = None
        self._progress = progress

    def digest_file(self, name: str, *, at: int | None = None, cutting: Cutting | None = None) -> Digested:
        """Return the digest of a regular file; at: descriptor of the folder that holds it.

        cutting: says of a large file whether it is to be cut into chunks in the same read.
        Raises FileChanging, and OSError when it cannot be read or is no regular file (see disk.open_regular).
        """
        # disk.open_regular, with one fstat for both purposes: this runs for every file of a first scan.
        descriptor = os.open(name, FILE_FLAGS, dir_fd=at)
        chunker: Chunker | None = None
        try:
            before = os.fstat(descriptor)
            if not stat.S_ISREG(before.st_mode):
                raise OSError(errno.EINVAL, "not a regular file", name)
            size = before.st_size
            count = os.readv(descriptor, [self._small]) if size < _SMALL_BYTES else 0
            if count == size:
                digest = digest_of(self._small[:count])
            else:
                average = cutting(descriptor, size) if cutting is not None else None
                chunker = Chunker(average) if average else None
                count, digest = self._digest_large(descriptor, before, chunker)
            after = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        if count != size or not is_same(before, after):
            raise FileChanging(after)
        return Digested(digest, after, chunker.finish() if chunker else None)

    def _digest_large(self, descriptor: int, before: os.stat_result, chunker: Chunker | None) -> tuple[int, bytes]:
        content = hasher()
        total = 0
        if self._large is None:
            self._large = memoryview(bytearray(BUFFER_BYTES))
        for part in pieces(descriptor, self._large):
            content.update(part)
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


def is_same(before: os.stat_result, after: os.stat_result) -> bool:
    """Tell whether two stats show one file that did not change between them."""
    return (
        before.st_size == after.st_size
        and before.st_mtime_ns == after.st_mtime_ns
        and before.st_ctime_ns == after.st_ctime_ns
        and before.st_ino == after.st_ino
    )
