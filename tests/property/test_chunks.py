"""Chunks depend on content alone, and recipes say what they make."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltasync.core import recipe
from deltasync.core.chunks import AVERAGE_BYTES, CHUNKS_MAX, Chunker, average_for, chunks, is_average
from deltasync.core.errors import Refused
from deltasync.core.hashing import digest_of

CONTENT = random.Random(5).randbytes(1 << 20)


def listed(content: bytes, cuts: list[int], average: int = AVERAGE_BYTES) -> bytes:
    """Return the chunks of content that comes in parts which end at these places."""
    chunker, start, found = Chunker(average), 0, b""
    for end in [*sorted(cuts), len(content)]:
        chunker.update(memoryview(content)[start:end])
        start = end
        found += chunker.take()
    return found + chunker.finish()


@settings(max_examples=150)
@given(st.lists(st.integers(0, len(CONTENT)), max_size=30), st.integers(0, len(CONTENT)))
def test_how_content_comes_in_parts_does_not_move_a_cut(cuts: list[int], size: int) -> None:
    """The list of a content is one, whatever the sizes of the reads."""
    content = CONTENT[:size]
    assert listed(content, [min(cut, size) for cut in cuts]) == listed(content, [])


@pytest.mark.parametrize("content", [b"", b"x", bytes(300_000), CONTENT], ids=["none", "one", "zeros", "random"])
def test_chunks_add_up_to_the_content(content: bytes) -> None:
    """Each chunk of a list is the next bytes of the content, under the beginning of their digest."""
    at = 0
    for chunk in chunks(listed(content, [70_000] if len(content) > 70_000 else [])):
        assert digest_of(content[at : at + chunk.size]).startswith(chunk.key)
        at += chunk.size
    assert at == len(content)


def test_an_insertion_changes_few_chunks() -> None:
    """Behind what was inserted the chunks are those of before."""
    before = {chunk.key for chunk in chunks(listed(CONTENT, []))}
    after = [chunk.key for chunk in chunks(listed(CONTENT[:500_000] + b"new" + CONTENT[500_000:], []))]
    assert len([key for key in after if key not in before]) <= 3


def test_the_average_grows_with_the_size() -> None:
    """No list has too many chunks; what is too large is not cut."""
    assert average_for(0) == average_for(CHUNKS_MAX * AVERAGE_BYTES) == AVERAGE_BYTES
    for size in (4 << 30, 40 << 30, 250 << 30):
        average = average_for(size)
        assert average is not None and is_average(average) and size / average <= CHUNKS_MAX
    assert average_for(1 << 40) is None


SEGMENTS = st.lists(
    st.builds(
        lambda base, offset, size: recipe.Segment(base, offset if base in (1, 2) else 0, size),
        st.sampled_from((0, 1, 2, recipe.ZEROS)),
        st.integers(0, 2**40),
        st.integers(1, 2**40),
    ),
    min_size=1,
    max_size=20,
)


@given(SEGMENTS)
def test_a_recipe_reads_as_it_was_written(segments: list[recipe.Segment]) -> None:
    """Writing and reading gives the same ranges; those that continue each other are one."""
    bases = (digest_of(b"one"), digest_of(b"two"))
    made = recipe.compose(bases, segments)
    assert made.size == sum(segment.size for segment in segments)
    assert recipe.parse(made.encoded(), made.size) == made
    assert made.zero_bytes == sum(segment.size for segment in segments if segment.base == recipe.ZEROS)
    flat = [
        (each.base, each.offset + at if each.base in (1, 2) else 0)
        for each in made.segments()
        for at in (0, each.size - 1)
    ]
    assert flat[0] == (segments[0].base, segments[0].offset)


@given(st.binary(max_size=120), st.integers(0, 2**63 - 1))
def test_any_bytes_are_a_recipe_or_refused(content: bytes, size: int) -> None:
    """Nothing but a refusal comes of bytes that are no recipe."""
    try:
        made = recipe.parse(content, size)
    except Refused as error:
        assert error.rule == "B-61"
    else:
        assert made.encoded() == content and made.size == size
