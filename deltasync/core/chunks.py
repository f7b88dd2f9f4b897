"""Content-defined chunks of large files: where a cut lies depends on the bytes around it alone.

What is inserted or removed therefore moves the cuts behind it along, and the chunks there are the same as before. The
one module that imports pyfastcdc.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from deltasync.core.hashing import digest_of

CHUNK_FROM_BYTES = 4 << 20
"""Smaller files are not cut, unless the user says so."""
AVERAGE_BYTES = 16 << 10
AVERAGE_BYTES_MAX = 1 << 20
CHUNKS_MAX = 300_000
KEY_BYTES = 16
"""So much of a chunk's BLAKE3 tells it apart; what is built from chunks is proven by the digest of the whole."""
_LISTED = struct.Struct(f">I{KEY_BYTES}s")
LISTED_BYTES = _LISTED.size


class Chunk(NamedTuple):
    """A chunk of a list: its bytes, and the beginning of their BLAKE3."""

    size: int
    key: bytes


def average_for(size_bytes: int) -> int | None:
    """Return how large the chunks of a file are on average, so that no list has too many; None: it is not cut."""
    average = AVERAGE_BYTES
    while size_bytes > CHUNKS_MAX * average:
        average *= 2
    return average if average <= AVERAGE_BYTES_MAX else None


def is_average(average_bytes: int) -> bool:
    """Tell whether `average_for` may return this."""
    return AVERAGE_BYTES <= average_bytes <= AVERAGE_BYTES_MAX and not average_bytes & (average_bytes - 1)


def chunks(listed: bytes) -> Iterator[Chunk]:
    """Yield the chunks of a packed list, in the order of the file."""
    return map(Chunk._make, _LISTED.iter_unpack(listed))


class Chunker:
    """Cuts content that comes in parts of any size, and lists its chunks."""

    def __init__(self, average_bytes: int, found: Callable[[bytes, memoryview], None] | None = None) -> None:
        """Begin with nothing. average_bytes: a power of two. found: told how each chunk is listed, and its bytes."""
        from pyfastcdc import FastCDC  # few commands cut anything

        fast = FastCDC(avg_size=average_bytes)
        self._cut, self._max = fast.cut_buf, fast.max_size
        self._tail = b""
        """The last chunk so far: it may go on."""
        self._listed = bytearray()
        self._found = found

    def update(self, part: memoryview) -> None:
        """Take the next bytes; the view is of no use to this afterwards."""
        while self._tail and part:
            more = part[: self._max - len(self._tail)]
            joined = self._tail + more
            first = next(iter(self._cut(joined))).length
            if first == len(joined) < self._max:
                self._tail, part = joined, part[len(more) :]
            else:
                self._list(memoryview(joined)[:first])
                part = part[first - len(self._tail) :]
                self._tail = b""
        last: memoryview | None = None
        for chunk in self._cut(part) if part else ():
            if last is not None:
                self._list(last)
            last = chunk.data
        if last is not None:
            self._tail = bytes(last)

    def take(self) -> bytes:
        """Return the list of the chunks since it was last taken, without the last one, which may go on."""
        listed = bytes(self._listed)
        self._listed.clear()
        return listed

    def finish(self) -> bytes:
        """Return the list of the chunks since it was last taken, to the end."""
        if self._tail:
            self._list(memoryview(self._tail))
            self._tail = b""
        return self.take()

    def _list(self, chunk: memoryview) -> None:
        listed = _LISTED.pack(len(chunk), digest_of(chunk)[:KEY_BYTES])
        self._listed += listed
        if self._found is not None:
            self._found(listed, chunk)
