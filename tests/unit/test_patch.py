"""Spans of a content that is being put together: what is there, what is left to fetch."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deltasync.client.patch import gaps, joined

PLACES = st.tuples(st.integers(0, 60), st.integers(1, 20)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@given(st.lists(PLACES, max_size=8), PLACES)
def test_gaps_and_spans_cover_a_range_once(spans: list[tuple[int, int]], asked: tuple[int, int]) -> None:
    """Each byte of a range is in a span or in a gap, never in both; gaps come in order."""
    covered = {place for start, end in spans for place in range(start, end)}
    left = list(gaps(*asked, joined(spans)))
    assert [place for start, end in left for place in range(start, end)] == [
        place for place in range(*asked) if place not in covered
    ]
