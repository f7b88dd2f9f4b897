"""A limit on the bytes that are sent in a second, shared by every thread that sends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator

from deltasync.core.errors import UsageError

BURST_SECONDS = 0.1
PIECE_BYTES = 32 * 1024
"""What a limited upload hands to the socket at a time."""


class Bandwidth:
    """A token bucket: `take` waits until that many bytes may be sent."""

    def __init__(
        self,
        bytes_per_second: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        if bytes_per_second < 1:
            raise UsageError("a bandwidth limit is at least one byte per second")
        self._rate = bytes_per_second
        self._clock, self._pause = clock, pause
        self._free_at = clock()
        self._lock = threading.Lock()

    def take(self, size_bytes: int) -> None:
        """Wait for the turn of this many bytes; several threads share one limit."""
        with self._lock:
            now = self._clock()
            self._free_at = max(self._free_at, now - BURST_SECONDS) + size_bytes / self._rate
            wait_seconds = self._free_at - now
        if wait_seconds > 0:
            self._pause(wait_seconds)


def limited(chunks: Iterable[bytes], bandwidth: Bandwidth | None) -> Iterator[bytes]:
    """Pass a body on, at most as fast as the limit allows; without one, as it comes."""
    if bandwidth is None:
        yield from filter(None, chunks)
        return
    for chunk in chunks:
        for at in range(0, len(chunk), PIECE_BYTES):
            piece = chunk[at : at + PIECE_BYTES]
            bandwidth.take(len(piece))
            yield piece
