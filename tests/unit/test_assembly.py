"""Assembly makes exactly what a recipe says, or nothing: bases may lack, be short, or not leave room."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import sparse

from deltasync.core import recipe
from deltasync.core.errors import NoSpace
from deltasync.core.hashing import digest_of
from deltasync.core.recipe import Segment
from deltasync_server.assembly import assemble

BASE = bytes(range(256)) * 20_000
NAME = digest_of(BASE)
NEW = b"new bytes" * 200_000
SEGMENTS = [Segment(1, 70_000, 3_000_000), Segment(0, 0, 1_000_000), Segment(1, 5, 11), Segment(0, 0, len(NEW) - 10**6)]


@pytest.fixture
def target(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path / "made", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


def views() -> Iterator[memoryview]:
    """Give the new bytes in pieces that agree with no segment."""
    for at in range(0, len(NEW), 70_001):
        yield memoryview(NEW)[at : at + 70_001]


def opened(folder: Path, content: bytes) -> tuple[int, int]:
    path = folder / "base"
    path.write_bytes(content)
    return os.open(path, os.O_RDONLY), len(content)


def test_a_content_is_what_its_recipe_says(target: int, tmp_path: Path) -> None:
    """Ranges and new bytes come in order; the digest is that of what was written."""
    made = recipe.compose((NAME,), SEGMENTS)
    asked: list[int] = []
    digest = assemble(target, made, views(), lambda _: opened(tmp_path, BASE), asked.append)
    wanted = BASE[70_000:3_070_000] + NEW[:1_000_000] + BASE[5:16] + NEW[1_000_000:]
    assert os.pread(target, len(wanted) + 1, 0) == wanted
    assert digest == digest_of(wanted)
    assert asked[0] == made.size


def test_a_base_that_is_not_there_or_too_short_makes_nothing(target: int, tmp_path: Path) -> None:
    """Neither is an error: the sender is asked for the whole."""
    made = recipe.compose((NAME,), SEGMENTS)
    assert assemble(target, made, views(), lambda _: None, lambda _: None) is None
    assert assemble(target, made, views(), lambda _: opened(tmp_path, BASE[:3_000_000]), lambda _: None) is None


def test_a_base_that_cannot_be_read_is_told_apart(target: int, tmp_path: Path) -> None:
    """What the disk failed is not missing: the store looks at it."""
    unreadable = os.open(tmp_path, os.O_RDONLY)  # a folder: reading it fails
    made = recipe.compose((NAME,), SEGMENTS)
    assert assemble(target, made, views(), lambda _: (unreadable, len(BASE)), lambda _: None) == b""


def test_what_does_not_fit_is_not_begun(target: int, tmp_path: Path) -> None:
    """A few bytes may make a file of any size: room for all of it is asked for first."""

    def refuse(size_bytes: int) -> None:
        raise NoSpace(f"no room for {size_bytes}")

    made = recipe.compose((NAME,), [Segment(1, 0, 1_000_000)] * 3)
    with pytest.raises(NoSpace, match="3000000"):
        assemble(target, made, views(), lambda _: opened(tmp_path, BASE), refuse)
    assert os.fstat(target).st_size == 0


def test_zeros_are_holes_and_no_room_is_asked_for_them(target: int, tmp_path: Path) -> None:
    """Zeros come in front, between and at the end; they are hashed and not written."""
    sparse.require_holes(tmp_path)
    zeros = 40 << 20
    pieces = [Segment(255, 0, zeros), Segment(1, 0, 50_000), Segment(255, 0, 3), Segment(0, 0, len(NEW))]
    made = recipe.compose((NAME,), [*pieces, Segment(255, 0, zeros)])
    asked: list[int] = []
    digest = assemble(target, made, views(), lambda _: opened(tmp_path, BASE), asked.append)
    wanted = bytes(zeros) + BASE[:50_000] + bytes(3) + NEW + bytes(zeros)
    assert os.pread(target, len(wanted) + 1, 0) == wanted
    assert digest == digest_of(wanted)
    assert asked[0] == 50_000 + len(NEW)
    os.fsync(target)
    assert sparse.space(tmp_path / "made") < 4 << 20


def test_a_content_may_be_nothing_but_a_hole(target: int, tmp_path: Path) -> None:
    """It needs no base, no new bytes and no room."""
    made = recipe.compose((), [Segment(255, 0, 5 << 20)])
    asked: list[int] = []
    assert assemble(target, made, iter(()), lambda _: None, asked.append) == digest_of(bytes(5 << 20))
    assert (os.fstat(target).st_size, asked) == (5 << 20, [0])
