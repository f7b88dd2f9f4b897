"""How hard a bundle is compressed, judged by a sample of its content and by the link that it goes over."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from deltasync.core.frame import STORED, kept_share

SAMPLED_FROM_BYTES = 1 << 20
"""Less content than this is not worth a sample: any level is quick enough."""
SAMPLES_MAX = 32
SAMPLE_BYTES = 8 * 1024
LEVEL, LEVEL_QUICK = 3, 1
_WORTH = 1 / 32
"""The least share of a bundle that compressing must save."""
_ENVELOPE_SHARE = 0.5
"""What compressing leaves of metadata, headers and padding, about."""
_UNKNOWN_SHARE = 0.5
_BYTES_PER_SECOND = 96 << 20
"""What one thread takes in at level 3."""
_IN_LINE = 8
"""Without threads of its own zstd may take so small a part of the time that the link does."""


class Stretch(NamedTuple):
    """Some bytes of one file."""

    path: str
    offset: int
    size: int


def spread(content: Iterable[Stretch], total_bytes: int) -> Iterator[Stretch]:
    """Yield what to sample of content whose sizes add up to the total.

    The places are equally far from each other, so that each byte counts the same, and the same ones each time.
    """
    step = max(1, -(-total_bytes // SAMPLES_MAX))
    at = step // 2
    for path, offset, size in content:
        while at < size:
            yield Stretch(path, offset + max(0, min(at, size - SAMPLE_BYTES)), min(size, SAMPLE_BYTES))
            at += step
        at -= size


def kept_by(samples: Iterable[bytes], content_bytes: int, archive_bytes: int) -> float:
    """Return what compressing leaves of a bundle, as a share: what its samples say of the content, and the rest."""
    shares = [kept_share(sample) for sample in samples if sample]
    content_share = sum(shares) / len(shares) if shares else _UNKNOWN_SHARE
    kept = content_share * content_bytes + _ENVELOPE_SHARE * (archive_bytes - content_bytes)
    return kept / max(1, archive_bytes)


def level_for(share: float, link_bytes_per_second: float, threads: int) -> int:
    """Return the level for a bundle, or STORED where compressing leaves nearly all of it.

    link_bytes_per_second: 0 where it is not known. threads: those that zstd has of its own.
    """
    if share > 1 - _WORTH:
        return STORED
    output = share * _BYTES_PER_SECOND * (threads or 1 / _IN_LINE)
    return LEVEL if link_bytes_per_second <= output else LEVEL_QUICK
