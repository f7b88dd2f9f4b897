"""One zstd frame: written whole with its size and checksum, read strictly and within limits (spec B-1 to B-8)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import zstandard
from xxhash import xxh64

from deltasync.core.errors import LimitExceeded, Refused
from deltasync.core.wire import Limits

MAGIC = b"\x28\xb5\x2f\xfd"
LEVEL_MAX = 19
"""Higher levels of zstd need a larger window than a reader accepts."""
STORED = 0
"""In place of a level: content that does not compress travels in raw blocks, and no encoder sees it."""
WINDOW_MAX = 8 * 2**20
RATIO_FREE_BYTES = 16 * 2**20
"""The expansion ratio is judged beyond this many decompressed bytes."""

_BLOCK_MAX = 128 * 1024
_STORED_HEADER = MAGIC + b"\xc4\x38"
"""Says of a frame: eight bytes of content size, a checksum, and a window of one block, as nothing refers back."""
_CONTENT_SIZE_BYTES = (0, 2, 4, 8)
_RLE, _RESERVED = 1, 3
_READ_BYTES = 256 * 1024
"""As much as a server gets from a socket at a time, and then passes on without a copy."""
_WINDOW_BYTES = 1 << 20
_CHUNK_BYTES = 256 * 1024
_STAGE_BYTES = 256 * 1024
_DENSE_RATIO = 1_000
_DENSE_STEP_BYTES = 4 * 1024


class Source(Protocol):
    """Where compressed bytes come from."""

    def read(self, size: int, /) -> bytes:
        """Return at most `size` bytes, b'' at the end."""


def compress(
    pieces: Iterable[bytes | memoryview], size_bytes: int, *, level: int = 1, threads: int = 0
) -> Iterator[bytes]:
    """Yield the frame that holds the pieces, in chunks of at least 256 KiB but the last.

    size_bytes: the sum of all pieces; it is declared in the frame's header (spec B-2). Raises ValueError when the
    pieces do not add up to it.
    """
    compressor = zstandard.ZstdCompressor(
        level=min(level, LEVEL_MAX), threads=threads, write_checksum=True, write_content_size=True
    ).compressobj(size=size_bytes)
    taken, given = 0, 0
    chunks: list[bytes] = []
    held = 0
    for batch in _batches(pieces):
        taken += len(batch)
        if taken > size_bytes:
            break
        is_dense = taken > RATIO_FREE_BYTES // 2 and taken > _DENSE_RATIO * (given + held)
        if is_dense:  # what the compressor still holds back counts as well
            chunks.append(compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
            held += len(chunks[-1])
            is_dense = taken > _DENSE_RATIO * (given + held)
        chunks.append(_compress_dense(compressor, batch) if is_dense else compressor.compress(batch))
        held += len(chunks[-1])
        if held >= _CHUNK_BYTES:
            given += held
            yield b"".join(chunks)
            chunks, held = [], 0
    if taken != size_bytes:
        raise _not_of(size_bytes)
    yield b"".join((*chunks, compressor.flush()))


def _compress_dense(compressor: zstandard.ZstdCompressionObj, batch: bytearray | bytes | memoryview) -> bytes:
    """Compress in short blocks, so that a file of zeros stays below every reader's expansion ratio (spec B-8)."""
    view = memoryview(batch)
    return b"".join(
        compressor.compress(view[at : at + _DENSE_STEP_BYTES]) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        for at in range(0, len(view), _DENSE_STEP_BYTES)
    )


def store(pieces: Iterable[bytes | memoryview], size_bytes: int) -> Iterator[bytes]:
    """Yield the frame that holds the pieces as they are, in raw blocks; as `compress` does otherwise."""
    hashed = xxh64()
    parts: list[bytes | memoryview] = [_STORED_HEADER, size_bytes.to_bytes(8, "little")]
    taken = held = 0
    for batch in _batches(pieces):
        taken += len(batch)
        if taken > size_bytes:
            break
        hashed.update(batch)
        parts += _raw_blocks(memoryview(batch))
        held += len(batch)
        chunk = b"".join(parts)  # the one copy: a batch is not valid for longer
        if held >= _CHUNK_BYTES:
            yield chunk
            parts, held = [], 0
        else:
            parts = [chunk]
    if taken != size_bytes:
        raise _not_of(size_bytes)
    yield b"".join((*parts, _raw_header(0, is_last=True), hashed.digest()[:3:-1]))


def _raw_blocks(batch: memoryview) -> Iterator[bytes | memoryview]:
    for at in range(0, len(batch), _BLOCK_MAX):
        block = batch[at : at + _BLOCK_MAX]
        yield _raw_header(len(block), is_last=False)
        yield block


def _raw_header(size_bytes: int, *, is_last: bool) -> bytes:
    return (size_bytes << 3 | is_last).to_bytes(3, "little")


def _not_of(size_bytes: int) -> ValueError:
    return ValueError(f"the content of a bundle is not of the {size_bytes} bytes that were declared")


def kept_share(sample: bytes) -> float:
    """Return what compressing leaves of a sample at the lowest level: 1.0 where it does not compress."""
    return min(1.0, len(zstandard.ZstdCompressor(level=1).compress(sample)) / max(1, len(sample)))


def _batches(pieces: Iterable[bytes | memoryview]) -> Iterator[bytearray | bytes | memoryview]:
    """Join small pieces, pass large ones through without a copy; a batch is valid until the next one."""
    staged = bytearray()
    for piece in pieces:
        if len(piece) < _STAGE_BYTES:
            staged += piece
            if len(staged) < _STAGE_BYTES:
                continue
        if staged:
            yield staged
            staged = bytearray()
        if len(piece) >= _STAGE_BYTES:
            view = memoryview(piece)
            for at in range(0, len(view), _WINDOW_BYTES):
                yield view[at : at + _WINDOW_BYTES]
    if staged:
        yield staged


class FrameReader:
    """The decompressed bytes of one frame, seen through a window that slides over a reused buffer."""

    def __init__(self, source: Source, limits: Limits) -> None:
        """Read nothing yet."""
        self._raw = _MeteredSource(source, limits)
        decompressor = zstandard.ZstdDecompressor(max_window_size=WINDOW_MAX)
        self._stream = decompressor.stream_reader(self._raw, read_size=_READ_BYTES)  # type: ignore[arg-type]
        self._buffer = bytearray(_WINDOW_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        self._decompressed_bytes = 0
        self._ratio = limits.expansion_ratio

    def starts_with(self, expected: bytes) -> bool:
        """Tell whether the next bytes are these."""
        if self._end - self._start < len(expected):
            self._fill(len(expected))
        return self._buffer.startswith(expected, self._start, self._end)

    def peek(self, size_bytes: int) -> bytes:
        """Return the next bytes without taking them: fewer where the frame ends before."""
        self._fill(size_bytes)
        return bytes(self._view[self._start : min(self._end, self._start + size_bytes)])

    def skip(self, size_bytes: int) -> None:
        """Take bytes that were seen with `starts_with` or `peek`."""
        self._start += size_bytes

    def take(self, size_bytes: int) -> memoryview:
        """Take the next bytes as one view, at most 1 MiB; valid until the next call, shorter at the frame's end."""
        if self._end - self._start < size_bytes:
            self._fill(size_bytes)
        start = self._start
        self._start = min(self._end, start + size_bytes)
        return self._view[start : self._start]

    def take_some(self, size_bytes: int) -> memoryview:
        """Take at most this many of the next bytes, as many as are at hand; empty only at the frame's end."""
        if self._end == self._start:
            self._fill(1)
        return self.take(min(size_bytes, self._end - self._start))

    def is_at_end(self) -> bool:
        """Tell whether the frame, its checksum included, was read to its end."""
        return self._fill(1) == 0

    def finish(self) -> None:
        """Read the source to its end and raise Refused B-5 for any byte behind the frame."""
        while self._raw.read(_READ_BYTES):
            pass

    def _fill(self, wanted_bytes: int) -> int:
        """Have at least this many bytes in the window, or all that the frame still has; return how many."""
        left = self._end - self._start
        if left >= wanted_bytes:
            return left
        self._view[:left] = self._view[self._start : self._end]
        self._start, self._end = 0, left
        while self._end < wanted_bytes:
            try:
                count = self._stream.readinto(self._view[self._end :])
            except zstandard.ZstdError as error:
                raise Refused("B-6", f"the zstd frame is damaged: {error}") from error
            if not count:
                break
            self._end += count
            self._decompressed_bytes += count
            if self._decompressed_bytes > RATIO_FREE_BYTES + self._ratio * self._raw.taken_bytes:
                raise LimitExceeded("B-8", f"the bundle expands more than {self._ratio} times", limit=self._ratio)
        return self._end


class _MeteredSource:
    """Passes compressed bytes on while it follows the frame's own structure.

    The decompressor returns short data without an error for a truncated frame and ignores what follows it, so the
    end is found here.
    """

    def __init__(self, source: Source, limits: Limits) -> None:
        self._source = source
        self._limit_bytes = limits.bundle_bytes
        self._step = self._begin
        self._head = bytearray()
        self._wanted = len(MAGIC) + 1
        self._skip = 0
        self._is_last = False
        self._is_done = False
        self.taken_bytes = 0

    def read(self, size: int) -> bytes:
        """Return bytes that may belong to the frame, b'' at its end; raise Refused for what may not."""
        chunk = self._source.read(size)
        if not chunk:
            if not self._is_done:
                raise Refused("B-4", "the zstd frame is truncated")
            return b""
        self.taken_bytes += len(chunk)
        if self.taken_bytes > self._limit_bytes:
            raise LimitExceeded("B-7", f"the bundle is larger than {self._limit_bytes} bytes", limit=self._limit_bytes)
        self._follow(chunk)
        return chunk

    def _follow(self, chunk: bytes) -> None:
        at, end = 0, len(chunk)
        while at < end:
            if self._is_done:
                raise Refused("B-5", "bytes follow the zstd frame")
            if self._skip:
                taken = min(self._skip, end - at)
                self._skip -= taken
            else:
                taken = min(self._wanted - len(self._head), end - at)
                self._head += chunk[at : at + taken]
                if len(self._head) == self._wanted:
                    self._step()
            at += taken
            self._is_done = self._is_last and not self._skip

    def _begin(self) -> None:
        if not self._head.startswith(MAGIC):
            raise Refused("B-1", "the bundle does not begin with a zstd frame")
        flags = self._head[4]
        is_single = bool(flags & 0x20)
        if flags & 0x1B or not flags & 0x04 or (not flags >> 6 and not is_single):
            raise Refused("B-2", "the frame's header does not declare content size and checksum alone")
        self._wanted += (not is_single) + (_CONTENT_SIZE_BYTES[flags >> 6] or 1)
        self._step = self._size

    def _size(self) -> None:
        fields = bytes(self._head[5:])
        is_single = bool(self._head[4] & 0x20)
        size_bytes = int.from_bytes(fields[not is_single :], "little") + 256 * (len(fields) - (not is_single) == 2)
        base = 1 << (10 + (fields[0] >> 3))
        window_bytes = size_bytes if is_single else base + (base >> 3) * (fields[0] & 7)
        if window_bytes > WINDOW_MAX:
            raise LimitExceeded("B-3", f"the frame asks for a window of {window_bytes} bytes", limit=WINDOW_MAX)
        if size_bytes > self._limit_bytes:
            raise LimitExceeded("B-7", f"the bundle expands to {size_bytes} bytes", limit=self._limit_bytes)
        self._expect_block()

    def _expect_block(self) -> None:
        self._head.clear()
        self._wanted = 3
        self._step = self._block

    def _block(self) -> None:
        field = int.from_bytes(self._head, "little")
        kind, size_bytes = field >> 1 & 3, field >> 3
        if kind == _RESERVED or size_bytes > _BLOCK_MAX:
            raise Refused("B-6", "the zstd frame has a block that no encoder writes")
        self._skip = 1 if kind == _RLE else size_bytes
        if field & 1:
            self._is_last = True
            self._skip += 4  # the checksum
        self._expect_block()
