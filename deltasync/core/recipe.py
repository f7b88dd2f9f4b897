"""Recipes: a large content as ranges of contents that the receiver holds, zeros, and new bytes (spec B-60 to B-64)."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from deltasync.core.errors import Refused
from deltasync.core.hashing import DIGEST_BYTES
from deltasync.core.manifest import SIZE_MAX

FEATURE = "recipes"
"""What the manifest of a bundle requires whose content may come as recipes."""
BASES_MAX = 16
ZEROS = 255
"""The base of a segment that is zeros: nothing travels for it, and nothing is read or written."""
RECIPE_BYTES_MAX = 16 << 20
SEGMENTS_FREE, SEGMENT_BYTES_MIN = 64, 1024
"""Beyond the first few, segments have so many bytes on average: each costs the receiver a read and a write."""
_SEGMENT = struct.Struct(">BQQ")


class Segment(NamedTuple):
    """A run of a content: `size` bytes from `offset` of a base, or (base 0) new ones, or (base ZEROS) zeros."""

    base: int
    """Which base, counted from 1; 0 is the next new bytes of the bundle, ZEROS none at all."""
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to make one content."""

    bases: tuple[bytes, ...]
    """Digests of the contents that segments are taken from."""
    body: bytes
    """The packed segments."""
    size: int
    new_bytes: int
    zero_bytes: int

    def segments(self) -> Iterator[Segment]:
        """Yield the segments, in the order of the content."""
        return map(Segment._make, _SEGMENT.iter_unpack(self.body))

    def encoded(self) -> bytes:
        """Return the member of a bundle (spec B-61)."""
        return bytes([len(self.bases)]) + b"".join(self.bases) + self.body


def compose(bases: tuple[bytes, ...], segments: Iterable[Segment]) -> Recipe:
    """Return the recipe with these segments; those that continue each other become one."""
    body, size, new_bytes, zero_bytes = bytearray(), 0, 0, 0
    last: Segment | None = None
    for segment in segments:
        size += segment.size
        new_bytes += segment.size if segment.base == 0 else 0
        zero_bytes += segment.size if segment.base == ZEROS else 0
        if last is not None and _continues(last, segment):
            last = last._replace(size=last.size + segment.size)
            continue
        if last is not None:
            body += _SEGMENT.pack(*last)
        last = segment
    if last is not None:
        body += _SEGMENT.pack(*last)
    return Recipe(bases, bytes(body), size, new_bytes, zero_bytes)


def _continues(last: Segment, segment: Segment) -> bool:
    return last.base == segment.base and (last.base in (0, ZEROS) or last.offset + last.size == segment.offset)


def parse(content: bytes, size: int) -> Recipe:
    """Return the recipe of a content with `size` bytes, or raise Refused B-61."""
    count = content[0] if content else 0
    body = content[1 + count * DIGEST_BYTES :]
    if not content or count > BASES_MAX or not body or len(body) % _SEGMENT.size:
        raise Refused("B-61", "a recipe is malformed")
    ends = range(1, 1 + count * DIGEST_BYTES, DIGEST_BYTES)
    recipe = Recipe(tuple(content[at : at + DIGEST_BYTES] for at in ends), body, size, 0, 0)
    if len(body) // _SEGMENT.size > SEGMENTS_FREE + size // SEGMENT_BYTES_MIN:
        raise Refused("B-61", "a recipe has more segments than its content is worth")
    total = new_bytes = zero_bytes = 0
    for base, offset, length in recipe.segments():
        has_no_offset = base in (0, ZEROS)
        is_known = has_no_offset or base <= count
        if not length or not is_known or offset + length > SIZE_MAX or (has_no_offset and offset):
            raise Refused("B-61", "a recipe has a segment that cannot be")
        total += length
        new_bytes += length if base == 0 else 0
        zero_bytes += length if base == ZEROS else 0
    if total != size:
        raise Refused("B-61", f"a recipe makes {total} bytes where the operation names {size}")
    if not count and not zero_bytes:
        raise Refused("B-61", "a recipe has neither a base nor zeros")
    return Recipe(recipe.bases, body, size, new_bytes, zero_bytes)
