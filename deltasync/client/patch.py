"""A large content that is to be fetched, filled with the chunks that a file in its place still has (spec F-29)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from deltasync.core.chunks import LISTED_BYTES, Chunker, chunks

BUFFER_BYTES = 8 << 20
Spans = list[tuple[int, int]]
"""Begin and end of runs of bytes, in order, none of which touches the next."""


def patched(
    source: int, average_bytes: int, listed: bytes, write: Callable[[memoryview, int], None], check: Callable[[], None]
) -> Spans:
    """Cut an open file, hand over each of its chunks that a recipe lists, and return which spans those are.

    listed: the recipe of the wanted content, cut into chunks of `average_bytes`. write: takes bytes and their offset in
    that content. check: called now and then; raises to stop.
    """
    offsets: dict[bytes, list[int]] = {}
    at = 0
    for number, chunk in enumerate(chunks(listed)):
        offsets.setdefault(listed[number * LISTED_BYTES : (number + 1) * LISTED_BYTES], []).append(at)
        at += chunk.size
    found: Spans = []

    def take(name: bytes, content: memoryview) -> None:
        for offset in offsets.pop(name, ()):
            write(content, offset)
            found.append((offset, offset + len(content)))

    chunker, buffer = Chunker(average_bytes, take), memoryview(bytearray(BUFFER_BYTES))
    while count := os.readv(source, [buffer]):
        check()
        chunker.update(buffer[:count])
    chunker.finish()
    return joined(found)


def joined(spans: Spans) -> Spans:
    """Return spans in order, those that touch as one."""
    out: Spans = []
    for start, end in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((start, end))
    return out


def gaps(start: int, end: int, spans: Spans) -> Iterator[tuple[int, int]]:
    """Yield what of a range no span covers."""
    for first, last in spans:
        if last <= start:
            continue
        if first >= end:
            break
        if first > start:
            yield start, first
        start = max(start, last)
    if start < end:
        yield start, end
