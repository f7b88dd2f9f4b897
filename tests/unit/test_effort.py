"""How hard a bundle is compressed: by a sample spread over its content, and never slower than its link."""

from __future__ import annotations

from hashlib import shake_256
from itertools import pairwise

import pytest

from deltasync.core.effort import (
    LEVEL,
    LEVEL_QUICK,
    SAMPLE_BYTES,
    SAMPLES_MAX,
    Stretch,
    kept_by,
    level_for,
    spread,
)
from deltasync.core.frame import STORED

MIB = 1 << 20
NOISE = shake_256(b"noise").digest(SAMPLE_BYTES)
TEXT = (b"never compress what does not become smaller, " * 200)[:SAMPLE_BYTES]


@pytest.mark.parametrize("sizes", [[64 * MIB], [1 * MIB] * 64, [0, 5, 63 * MIB, 4096, 0, MIB], [4096] * 16_384])
def test_a_sample_is_spread_over_all_content(sizes: list[int]) -> None:
    """However content is divided into files, about as many places are looked at, equally far from each other."""
    content = [Stretch(str(number), 7, size) for number, size in enumerate(sizes)]
    places = list(spread(content, sum(sizes)))
    assert SAMPLES_MAX - 1 <= len(places) <= SAMPLES_MAX
    assert places == list(spread(iter(content), sum(sizes)))
    for place in places:
        size = sizes[int(place.path)]
        assert place.size == min(size, SAMPLE_BYTES)
        assert 7 <= place.offset <= 7 + size - place.size
    starts = [sum(sizes[: int(place.path)]) + place.offset for place in places]
    step = sum(sizes) / SAMPLES_MAX
    assert all(abs(b - a - step) <= 2 * SAMPLE_BYTES for a, b in pairwise(starts))


def test_nothing_has_no_sample() -> None:
    """A bundle without content is not sampled, and is compressed."""
    assert list(spread([], 0)) == list(spread([Stretch("a", 0, 0)], 0)) == []
    assert level_for(kept_by([], 0, 4096), 0, 0) == LEVEL
    assert level_for(kept_by([b"", b""], 5, 4096), 0, 0) == LEVEL


@pytest.mark.parametrize(
    ("texts", "expected"), [(0, STORED), (1, STORED), (2, LEVEL), (4, LEVEL), (16, LEVEL), (32, LEVEL)]
)
def test_little_text_among_noise_is_worth_compressing(texts: int, expected: int) -> None:
    """Wherever the text is in a bundle: when a sixteenth of it shrinks, all of it is compressed."""
    samples = [TEXT] * texts + [NOISE] * (SAMPLES_MAX - texts)
    for order in (samples, samples[::-1]):
        assert level_for(kept_by(order, 64 * MIB, 64 * MIB + 8192), 0, 0) == expected


def test_small_files_of_noise_are_compressed_for_their_headers() -> None:
    """What is around the content counts: a header and the padding behind a small file shrink though it does not."""
    files = 1_000
    assert level_for(kept_by([NOISE] * 8, files * 200_000, files * 201_000), 0, 0) == STORED
    assert level_for(kept_by([NOISE] * 8, files * 5_000, files * 6_000), 0, 0) == LEVEL


@pytest.mark.parametrize(
    ("link", "threads", "expected"),
    [
        (0, 0, LEVEL),  # not known
        (2.5e6, 0, LEVEL),  # 20 Mbit/s
        (125e6, 0, LEVEL_QUICK),
        (float("inf"), 4, LEVEL_QUICK),
        (20e6, 0, LEVEL_QUICK),
        (20e6, 2, LEVEL),
        (60e6, 2, LEVEL_QUICK),
        (60e6, 4, LEVEL),
    ],
)
def test_compressing_is_never_slower_than_the_link(link: float, threads: int, expected: int) -> None:
    """The level of a text depends on the rate of the link, and on whether zstd has threads of its own."""
    assert level_for(0.25, link, threads) == expected


def test_what_does_not_compress_is_stored_whatever_the_link() -> None:
    """No link is so slow that an encoder could save anything on noise."""
    for link in (0, 1.0, 1e6, float("inf")):
        assert level_for(kept_by([NOISE], MIB, MIB), link, 0) == STORED
