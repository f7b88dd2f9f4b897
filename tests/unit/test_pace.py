"""The pace of a way to a server, measured by a clock that a test holds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from deltasync.client.pace import ANSWERED_BYTES, MEASURED_BYTES, QUICK_BYTES_PER_SECOND, Pace


class Clock:
    """A clock that stands still unless it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def taken(pace: Pace, clock: Clock, size_bytes: int, seconds: float) -> None:
    """Take a body of two chunks, in so many seconds; to make them takes far longer."""

    def chunks() -> Iterator[bytes]:
        for chunk in (bytes(size_bytes - 1), b"x"):
            clock.now += 1000.0
            yield chunk

    for _ in pace.measured(chunks()):
        clock.now += seconds / 2


@pytest.mark.parametrize(("share", "is_quick"), [(1.0, True), (0.99, True), (1.01, False)])
def test_a_way_is_quick_from_a_rate_on(share: float, is_quick: bool) -> None:
    """Nothing is known before a large body; then its rate decides, and the next one's after it."""
    clock = Clock()
    pace = Pace(clock)
    assert not pace.is_quick
    taken(pace, clock, MEASURED_BYTES, share * MEASURED_BYTES / QUICK_BYTES_PER_SECOND)
    assert pace.is_quick == is_quick
    taken(pace, clock, MEASURED_BYTES, 60.0)
    assert not pace.is_quick


def test_a_small_body_says_nothing() -> None:
    """A body that is small neither proves a way quick nor slow."""
    clock = Clock()
    pace = Pace(clock)
    taken(pace, clock, MEASURED_BYTES - 1, 0.0)
    assert not pace.is_quick
    taken(pace, clock, MEASURED_BYTES, 0.0)
    taken(pace, clock, 2, 60.0)
    assert pace.is_quick


def test_a_loss_is_not_forgotten() -> None:
    """Once a connection broke, no rate makes the way sound again."""
    clock = Clock()
    pace = Pace(clock)
    pace.note_loss()
    taken(pace, clock, MEASURED_BYTES, 0.0)
    assert not pace.is_quick


def test_a_body_that_was_not_taken_is_not_measured() -> None:
    """A body that broke off in the middle says nothing about the rate."""
    pace = Pace(Clock())
    body = pace.measured([bytes(MEASURED_BYTES), b"more"])
    next(body)
    body.close()
    assert not pace.is_quick


def test_a_rate_is_told_by_what_says_most() -> None:
    """A question with its answer says how fast at least; a large body says it better, and 0 says nothing."""
    clock = Clock()
    pace = Pace(clock)
    assert pace.bytes_per_second == 0
    pace.note_answer(ANSWERED_BYTES - 1, 0.001)
    assert pace.bytes_per_second == 0
    pace.note_answer(ANSWERED_BYTES, 0.5)
    assert pace.bytes_per_second == 2 * ANSWERED_BYTES
    assert not pace.is_quick
    pace.note(3e6)
    pace.note(0.0)
    assert pace.bytes_per_second == 3e6
    taken(pace, clock, MEASURED_BYTES, 4.0)
    pace.note_answer(1 << 30, 0.001)
    assert pace.bytes_per_second == MEASURED_BYTES / 4
