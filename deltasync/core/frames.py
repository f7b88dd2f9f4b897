"""Many contents in one answer: each is a frame, its size in eight bytes and then its bytes (spec H-38)."""

from __future__ import annotations

import struct

HEAD_BYTES = 8
_ABSENT = 2**64 - 1
_HEAD = struct.Struct(">Q")


def head(size: int | None) -> bytes:
    """Return the head of a frame; None says that the content is not there, and no bytes follow."""
    return _HEAD.pack(_ABSENT if size is None else size)


def size_of(head: bytes) -> int | None:
    """Return the size that the head of a frame states, or None where the content is not there."""
    (size,) = _HEAD.unpack(head)
    return None if size == _ABSENT else int(size)
