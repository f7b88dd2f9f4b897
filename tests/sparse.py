"""Sparse files for tests: made of what is in them, and the sign that a file system keeps holes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest


def write(path: Path, size: int, data: Mapping[int, bytes]) -> None:
    """Write a file that has this data at these offsets, and holes elsewhere."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as out:
        out.truncate(size)
        for offset, content in data.items():
            out.seek(offset)
            out.write(content)


def content(size: int, data: Mapping[int, bytes]) -> bytes:
    """Return what such a file holds."""
    made = bytearray(size)
    for offset, part in data.items():
        made[offset : offset + len(part)] = part
    return bytes(made)


def space(path: Path) -> int:
    """Return how many bytes a file takes on its disk."""
    return path.stat().st_blocks * 512


def require_holes(folder: Path) -> None:
    """Skip a test where a hole takes space, or cannot be told from data."""
    probe = folder / "probe"
    write(probe, 8 << 20, {4 << 20: b"x"})
    descriptor = os.open(probe, os.O_RDONLY)
    try:
        has_holes = space(probe) < 1 << 20 and os.lseek(descriptor, 0, os.SEEK_DATA) > 0
    finally:
        os.close(descriptor)
        probe.unlink()
    if not has_holes:
        pytest.skip(f"the file system of {folder} keeps no holes")
