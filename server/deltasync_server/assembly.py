"""Assembly: a large content made of ranges of blobs, holes and new bytes, proven by its digest (spec B-64, ST-17)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

from deltasync.core.hashing import Hasher, hasher
from deltasync.core.recipe import ZEROS, Recipe
from deltasync.disk import ZEROS as HOLE
from deltasync.disk import start_writeback, write_all

_BUFFER_BYTES = 1 << 20
_WRITEBACK_BYTES = 16 << 20

Opened = Callable[[bytes], tuple[int, int] | None]
"""Gives descriptor and size of a blob, or None where the cache lacks it."""


def assemble(
    target: int, recipe: Recipe, views: Iterator[memoryview], opened: Opened, require_space: Callable[[int], None]
) -> bytes | None:
    """Write a content into an open file and return the digest of what was written.

    views: the new bytes. require_space: raises where so many bytes more do not fit, before they are written.
    None when a base is not here, or is shorter than the recipe says, b"" when one cannot be read; nothing more is read
    then.
    """
    bases: list[tuple[int, int]] = []
    require_space(recipe.size - recipe.zero_bytes)  # a small bundle may make a large file
    if recipe.zero_bytes:
        os.ftruncate(target, recipe.size)  # what is not written stays a hole
    try:
        for digest in recipe.bases:
            found = opened(digest)
            if found is None:
                return None
            bases.append(found)
        return _Assembly(target, bases, views, require_space).run(recipe)
    except _Unreadable:
        return b""
    finally:
        for descriptor, _ in bases:
            os.close(descriptor)


class _Unreadable(Exception):
    """The disk failed a base."""


class _Assembly:
    """Writes one content; every byte is hashed on its way, where it is in memory anyway."""

    def __init__(
        self,
        target: int,
        bases: Sequence[tuple[int, int]],
        views: Iterator[memoryview],
        require_space: Callable[[int], None],
    ) -> None:
        self._target, self._bases, self._require_space = target, bases, require_space
        self._views, self._view = views, memoryview(b"")
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._hashed: Hasher = hasher()
        self._unstarted = 0

    def run(self, recipe: Recipe) -> bytes | None:
        for segment in recipe.segments():
            if not segment.base:
                self._take_new(segment.size)
                continue
            if segment.base == ZEROS:
                self._pass_over(segment.size)
                continue
            descriptor, size = self._bases[segment.base - 1]
            if segment.offset + segment.size > size or not self._copy(descriptor, segment.offset, segment.size):
                return None
        return self._hashed.digest()

    def _take_new(self, size: int) -> None:
        while size:
            if not self._view:
                self._view = next(self._views)
            piece = self._view[:size]
            self._write(piece)
            self._view = self._view[len(piece) :]
            size -= len(piece)

    def _pass_over(self, size: int) -> None:
        """Leave a hole, and hash its zeros."""
        os.lseek(self._target, size, os.SEEK_CUR)
        while size:
            zeros = HOLE[:size]
            self._hashed.update(zeros)
            size -= len(zeros)

    def _copy(self, descriptor: int, offset: int, size: int) -> bool:
        while size:
            try:
                count = os.preadv(descriptor, [self._buffer[: min(size, _BUFFER_BYTES)]], offset)
            except OSError as error:
                raise _Unreadable from error
            if not count:
                return False
            self._write(self._buffer[:count])
            offset += count
            size -= count
        return True

    def _write(self, piece: memoryview) -> None:
        self._hashed.update(piece)
        write_all(self._target, piece)
        self._unstarted += len(piece)
        if self._unstarted >= _WRITEBACK_BYTES:
            start_writeback(self._target)  # it is fsynced soon (spec ST-17)
            self._require_space(0)
            self._unstarted = 0
