"""Parts: a content too large for one bundle, sent before the bundle that names it (spec B-65 to B-68)."""

from __future__ import annotations

import re
from typing import NamedTuple

from deltasync.core.errors import Refused
from deltasync.core.hashing import DIGEST_BYTES

FEATURE = "parts"
"""What the manifest of a bundle requires that carries a part, or whose recipes take bytes from parts."""
_NAME = re.compile(rb"parts/([0-9a-f]{64})/([0-9a-f]{16})")
OFFSET_MAX = 2**63 - 1


class Part(NamedTuple):
    """A run of a stream: `size` bytes from `offset`; none at all says that the stream is over."""

    stream: bytes
    """A random id: what the parts of one content are put together under."""
    offset: int
    size: int

    @property
    def end(self) -> int:
        """Where the next part begins."""
        return self.offset + self.size

    @property
    def name(self) -> bytes:
        """The name of its member."""
        return f"parts/{self.stream.hex()}/{self.offset:016x}".encode()

    @property
    def member_size(self) -> int:
        """How many bytes its member has: the digest of the stream up to its end is behind the part's own."""
        return self.size + DIGEST_BYTES if self.size else 0


def parse(name: bytes, member_size: int) -> Part:
    """Return the part that a member with this name and size is, or raise Refused B-65."""
    found = _NAME.fullmatch(name)
    if found is None:
        raise Refused("B-65", "a bundle that brings a part has another member where that belongs")
    part = Part(bytes.fromhex(found[1].decode()), int(found[2], 16), max(0, member_size - DIGEST_BYTES))
    if part.member_size != member_size or part.end > OFFSET_MAX or (part.offset and not part.size):
        raise Refused("B-65", "a part is malformed")
    return part
