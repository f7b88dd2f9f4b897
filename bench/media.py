"""A small real media folder: images, a sound and text, generated so that nothing is downloaded."""

from __future__ import annotations

import math
import struct
import wave
import zlib
from pathlib import Path

from blake3 import blake3

_WIDTH, _HEIGHT = 480, 320
_RATE_HZ, _SOUND_SECONDS = 22_050, 12
_VERSES = "The host is paid by the hour, the wire by the byte;\nwhat is there already need not go tonight.\n"


def make_media(root: Path) -> None:
    """Write about 3 MiB of images, sound and text below a new folder."""
    for number in range(8):
        write_png(root / "images" / "walk" / f"frame-{number:02}.png", seed=number)
    write_png(root / "images" / "cover.png", seed=99)
    write_wav(root / "sound" / "tone.wav")
    for name in ("brief", "shots", "credits"):
        path = root / "notes" / f"{name}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{name}\n\n{_VERSES * 40}")


def write_png(path: Path, *, seed: int) -> None:
    """Write a grainy gradient as a true-colour PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grain = blake3(f"image {seed}".encode()).digest(length=_WIDTH * _HEIGHT * 3)
    rows = bytearray()
    for y in range(_HEIGHT):
        rows.append(0)  # PNG's filter "none" for this row
        start = y * _WIDTH * 3
        base = y * 160 // _HEIGHT + seed * 7
        rows += bytes((base + x // 9 + (value & 31)) & 255 for x, value in enumerate(grain[start : start + _WIDTH * 3]))
    header = struct.pack(">IIBBBBB", _WIDTH, _HEIGHT, 8, 2, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(bytes(rows), 1)), (b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, body) for kind, body in chunks))


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def write_wav(path: Path) -> None:
    """Write a slow sweep as 16-bit mono sound."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = range(_RATE_HZ * _SOUND_SECONDS)
    samples = (round(12_000 * math.sin(0.02 * frame * (1 + frame / len(frames)))) for frame in frames)
    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(_RATE_HZ)
        sound.writeframes(struct.pack(f"<{len(frames)}h", *samples))
