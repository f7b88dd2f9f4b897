"""How quick and how sound the way to a server has been: whether a bundle is worth its pieces."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

QUICK_BYTES_PER_SECOND = 64 << 20
"""At this rate a bundle of usual size takes a second: sending it again costs less than cutting it into pieces."""
MEASURED_BYTES = 8 << 20
"""Less than this says nothing about a rate."""
ANSWERED_BYTES = 64 << 10
"""So much, and its answer, says how fast the way is at least."""


class Pace:
    """Measures bodies as they are taken; one that was lost makes every later one careful."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Know nothing yet. clock: seconds that only grow."""
        self._clock = clock
        self._bytes_per_second = 0.0
        self._least_bytes_per_second = 0.0
        self._has_lost = False

    @property
    def is_quick(self) -> bool:
        """Whether a bundle may travel whole: the last one went fast enough, and no connection broke yet."""
        return self._bytes_per_second >= QUICK_BYTES_PER_SECOND and not self._has_lost

    @property
    def bytes_per_second(self) -> float:
        """How fast the last body went of those that say something, or any at least; 0 before the first."""
        return self._bytes_per_second or self._least_bytes_per_second

    def note(self, bytes_per_second: float) -> None:
        """Hear how fast the way was found to be elsewhere; 0 says nothing."""
        self._bytes_per_second = bytes_per_second or self._bytes_per_second

    def note_answer(self, size_bytes: int, seconds: float) -> None:
        """Hear how long a body and its answer took together: so fast it went at least."""
        if size_bytes >= ANSWERED_BYTES:
            self._least_bytes_per_second = size_bytes / max(seconds, 1e-9)

    def note_loss(self) -> None:
        """Hear that a connection broke, or was not made."""
        self._has_lost = True

    def measured(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """Pass a body on and remember how fast it was taken; the time that it took to make does not count."""
        size_bytes, seconds = 0, 0.0
        for chunk in chunks:
            began = self._clock()
            yield chunk
            seconds += self._clock() - began
            size_bytes += len(chunk)
        if size_bytes >= MEASURED_BYTES:
            self._bytes_per_second = size_bytes / seconds if seconds > 0 else float("inf")
