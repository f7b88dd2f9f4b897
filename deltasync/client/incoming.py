"""Content on its way here: the body of a long answer, read through one buffer and never trusted to end in time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from deltasync.core import frames
from deltasync.core.errors import HostUnreachable, NotADeltasyncServer

READ_BYTES = 1 << 18
"""What is taken from the connection at a time."""


DIRECTORY_BYTES_MAX = 256 << 20
"""What one directory object may have (spec H-140)."""


class Incoming:
    """The bytes of an answer, in the order in which they come."""

    def __init__(self, url: str, read: Callable[[int], bytes]) -> None:
        """Begin before the first byte. read: gives at most so many bytes, b'' at the end."""
        self._url, self._read = url, read
        self._ready = b""
        self._at = 0

    def frame(self) -> int | None:
        """Read the head of a frame and return its size; None when the content is not there (spec H-38)."""
        return frames.size_of(self.whole(frames.HEAD_BYTES))

    def whole(self, size: int) -> bytes:
        """Read the next bytes, so many that they fit into memory."""
        end = self._at + size
        if end > len(self._ready):
            return b"".join(self.content(size))
        piece = self._ready[self._at : end]
        self._at = end
        return piece

    def content(self, size: int) -> Iterator[bytes]:
        """Yield the next bytes, so many together; raises HostUnreachable when the answer breaks off before."""
        while size:
            if self._at == len(self._ready):
                self._ready, self._at = self._read(READ_BYTES), 0
                if not self._ready:
                    raise HostUnreachable(f"the answer from {self._url} broke off; run the command again")
            piece = self._ready[self._at : self._at + size]
            self._at += len(piece)
            size -= len(piece)
            yield piece

    def end(self) -> None:
        """Raise NotADeltasyncServer unless everything was read."""
        if self._at < len(self._ready) or self._read(1):
            raise NotADeltasyncServer(f"{self._url} answers with more than it was asked for")
