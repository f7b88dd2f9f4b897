"""Frames of raw blocks: written without an encoder, read by every reader of zstd, refused by rule when spoiled."""

from __future__ import annotations

import io
import shutil
import subprocess
from hashlib import shake_256
from pathlib import Path

import pytest
import zstandard

from deltasync.core.errors import LimitExceeded, Refused
from deltasync.core.frame import MAGIC, STORED, FrameReader, compress, kept_share, store
from deltasync.core.wire import Limits

NOISE = shake_256(b"noise").digest(300_000)
HEADER_BYTES, CHECKSUM_BYTES = 14, 4


def stored(content: bytes) -> bytes:
    return b"".join(store([content], len(content)))


def read(raw: bytes, limits: Limits | None = None) -> bytes:
    """Read a frame to its end, strictly."""
    frame = FrameReader(io.BytesIO(raw), limits or Limits())
    content = b""
    while view := frame.take_some(1 << 20):
        content += bytes(view)
    frame.finish()
    return content


def refusal(raw: bytes, limits: Limits | None = None) -> str:
    with pytest.raises((Refused, LimitExceeded)) as caught:
        read(raw, limits)
    return caught.value.rule


def patched(raw: bytes, at: int, new: bytes) -> bytes:
    return raw[:at] + new + raw[at + len(new) :]


@pytest.mark.parametrize("size", [0, 1, 255, 256, 131_071, 131_072, 131_073, 262_144, 300_000])
def test_stored_content_is_read_by_us_by_the_library_and_by_zstd(tmp_path: Path, size: int) -> None:
    """A frame of raw blocks is a zstd frame like any other, whatever its size."""
    raw = stored(NOISE[:size])
    assert read(raw) == NOISE[:size]
    assert zstandard.ZstdDecompressor().decompress(raw) == NOISE[:size]
    if shutil.which("zstd"):
        (tmp_path / "f.zst").write_bytes(raw)
        subprocess.run(["zstd", "-qt", tmp_path / "f.zst"], check=True)


def test_a_stored_frame_declares_size_checksum_and_a_small_window() -> None:
    """B-2 and B-3: what every frame declares, and a window that no reader has to find memory for."""
    parameters = zstandard.get_frame_parameters(stored(NOISE))
    assert (parameters.content_size, parameters.has_checksum, parameters.dict_id) == (len(NOISE), True, 0)
    assert parameters.window_size == 128 * 1024


def test_stored_content_grows_by_three_bytes_for_each_128_kib() -> None:
    """Nothing is lost by storing what does not compress."""
    assert len(stored(NOISE)) == len(NOISE) + HEADER_BYTES + 3 * (3 + 1) + CHECKSUM_BYTES
    assert len(stored(NOISE)) < len(b"".join(compress([NOISE], len(NOISE)))) + 16


def test_pieces_may_reuse_their_buffer() -> None:
    """A piece is copied before the next one is asked for: a source reads all of them into one buffer."""
    buffer = bytearray(1 << 20)
    sizes = [1 << 20, 5, 300_000, 200_000, 7, 1 << 20, 262_144]

    def pieces():  # type: ignore[no-untyped-def]
        for number, size in enumerate(sizes):
            buffer[:size] = bytes([number]) * size
            yield memoryview(buffer)[:size] if size >= 256 * 1024 else bytes(buffer[:size])

    chunks = list(store(pieces(), sum(sizes)))
    assert read(b"".join(chunks)) == b"".join(bytes([number]) * size for number, size in enumerate(sizes))
    assert min(map(len, chunks[:-1])) >= 256 * 1024


@pytest.mark.parametrize("declared", [0, 299_999, 300_001])
def test_a_stored_frame_of_another_size_than_declared_is_never_whole(declared: int) -> None:
    """Content that shrank or grew while it was read stops the sealing before the checksum."""
    chunks = []
    with pytest.raises(ValueError, match="declared"):
        for chunk in store([NOISE], declared):
            chunks.append(chunk)
    assert refusal(b"".join(chunks)) == "B-4"


def test_every_fault_of_a_stored_frame_is_refused_by_its_rule() -> None:
    """B-1 to B-7 hold for raw blocks as for compressed ones."""
    raw = stored(NOISE[:1000])
    block = HEADER_BYTES
    flipped = patched(raw, 500, bytes([raw[500] ^ 4]))
    for spoiled, rule in (
        (patched(raw, 0, b"\x50"), "B-1"),
        (patched(raw, 4, b"\xc0"), "B-2"),  # no checksum
        (patched(raw, 4, b"\xc5"), "B-2"),  # a dictionary
        (patched(raw, 4, b"\xcc"), "B-2"),  # a reserved bit
        (patched(raw, 5, b"\x70"), "B-3"),  # a window of 16 MiB
        (raw[:-1], "B-4"),
        (raw[:600], "B-4"),
        (raw + b"\0", "B-5"),
        (raw + stored(b""), "B-5"),
        (raw + b"\x50\x2a\x4d\x18\0\0\0\0", "B-5"),
        (flipped, "B-6"),
        (patched(raw, len(raw) - 1, bytes([raw[-1] ^ 1])), "B-6"),
        (patched(raw, 6, (1001).to_bytes(8, "little")), "B-6"),
        (patched(raw, 6, (999).to_bytes(8, "little")), "B-6"),
        (patched(raw, block, bytes([raw[block] | 6])), "B-6"),  # the reserved type
        (patched(raw, block, ((128 * 1024 + 1) << 3).to_bytes(3, "little")), "B-6"),
        (patched(raw, 6, (2**41).to_bytes(8, "little")), "B-7"),
    ):
        assert refusal(spoiled) == rule
    assert refusal(raw, Limits(bundle_bytes=999)) == "B-7"
    assert read(raw, Limits(bundle_bytes=len(raw))) == NOISE[:1000]


def test_every_truncation_of_a_stored_frame_is_noticed() -> None:
    """B-4: wherever a frame of raw blocks is cut."""
    raw = stored(NOISE[:400])
    assert {refusal(raw[:length]) for length in range(len(raw))} == {"B-4"}


def test_every_flipped_bit_of_stored_content_is_refused() -> None:
    """B-6: no bit of the content, of its blocks' headers or of the checksum may differ."""
    raw = stored(NOISE[:200])
    for at in range(HEADER_BYTES, len(raw)):
        for bit in range(8):
            assert refusal(patched(raw, at, bytes([raw[at] ^ 1 << bit]))) in ("B-4", "B-5", "B-6")


def test_raw_blocks_before_and_behind_compressed_ones_are_read() -> None:
    """A frame whose first block is raw and whose later ones refer back to it is as good as any."""
    text = b"a line that repeats itself\n" * 4_000
    content = NOISE[:200_000] + NOISE[:200_000] + text
    raw = b"".join(compress([content], len(content), level=3))
    assert raw.startswith(MAGIC)
    assert len(raw) < 210_000  # the second half refers to the first, which is raw
    assert read(raw) == content


def test_a_sample_says_what_compressing_leaves() -> None:
    """Noise stays as it is, text shrinks, and nothing counts as more than itself."""
    assert kept_share(NOISE[:8192]) == 1.0
    assert kept_share(b"x") == kept_share(b"") == 1.0
    assert kept_share(b"many words are much alike, " * 300) < 0.2
    assert STORED not in range(1, 20)
