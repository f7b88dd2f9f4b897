"""A file with holes is read, hashed, cut and copied as the same file without them, and its holes stay."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import sparse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltasync import disk
from deltasync.client.digest import Digester
from deltasync.core.hashing import digest_of
from deltasync_server.blobs import hash_of

UNIT = 64 << 10
LAYOUTS = st.builds(
    lambda runs, tail: (runs, tail),
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 200_000)), max_size=6),
    st.integers(0, 3_000_000),
)
"""Runs of data, each so many units behind the one before it, and what is behind the last one."""
FILES = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def _holes(tmp_path: Path) -> None:
    sparse.require_holes(tmp_path)


def laid(runs: list[tuple[int, int]], tail: int) -> tuple[int, dict[int, bytes]]:
    data: dict[int, bytes] = {}
    at = 0
    for units, size in runs:
        at += units * UNIT
        data[at] = os.urandom(size)
        at += size
    return at + tail, data


@FILES
@given(LAYOUTS)
def test_holes_change_no_digest_and_no_chunk(tmp_path: Path, layout: tuple[list[tuple[int, int]], int]) -> None:
    """Both sides hash the zeros of a hole without reading them; the chunks are those of the bytes."""
    size, data = laid(*layout)
    sparse.write(tmp_path / "sparse", size, data)
    whole = sparse.content(size, data)
    (tmp_path / "plain").write_bytes(whole)
    cut = Digester().digest_file(str(tmp_path / "sparse"), cutting=lambda *_: 16 << 10)
    plain = Digester().digest_file(str(tmp_path / "plain"), cutting=lambda *_: 16 << 10)
    assert cut.digest == plain.digest == digest_of(whole)
    assert cut.listed == plain.listed
    descriptor = os.open(tmp_path / "sparse", os.O_RDONLY)
    try:
        assert hash_of(descriptor) == cut.digest
    finally:
        os.close(descriptor)


@FILES
@given(LAYOUTS)
def test_extents_are_the_file_in_order(tmp_path: Path, layout: tuple[list[tuple[int, int]], int]) -> None:
    """They follow each other from the beginning to the end, none is empty, and a hole holds zeros."""
    size, data = laid(*layout)
    sparse.write(tmp_path / "f", size, data)
    whole = sparse.content(size, data)
    descriptor = os.open(tmp_path / "f", os.O_RDONLY)
    try:
        found = list(disk.extents(descriptor))
        pieces = [(bytes(piece), piece.obj is disk.ZEROS.obj) for piece in disk.pieces(descriptor, _buffer())]
    finally:
        os.close(descriptor)
    assert [each.start for each in found] == [0, *(each.end for each in found[:-1])][: len(found)]
    assert all(each.start < each.end or size == 0 for each in found)
    assert (found[-1].end if found else 0) == size
    assert not any(whole[each.start : each.end].strip(b"\0") for each in found if each.is_hole)
    assert b"".join(piece for piece, _ in pieces) == whole
    assert sum(len(piece) for piece, is_hole in pieces if is_hole) == sum(
        each.end - each.start for each in found if each.is_hole
    )


def _buffer() -> memoryview:
    return memoryview(bytearray(100_000))


@FILES
@given(LAYOUTS)
def test_a_copy_keeps_the_holes(tmp_path: Path, layout: tuple[list[tuple[int, int]], int]) -> None:
    """It holds the same bytes, and takes no more space."""
    size, data = laid(*layout)
    sparse.write(tmp_path / "f", size, data)
    (tmp_path / "copy").unlink(missing_ok=True)
    source = os.open(tmp_path / "f", os.O_RDONLY)
    target = os.open(tmp_path / "copy", os.O_WRONLY | os.O_CREAT)
    try:
        disk.copy_bytes(source, target)
        os.fsync(source)
        os.fsync(target)
    finally:
        os.close(source)
        os.close(target)
    assert (tmp_path / "copy").read_bytes() == sparse.content(size, data)
    assert sparse.space(tmp_path / "copy") <= sparse.space(tmp_path / "f") + 8192
