"""Workloads: trees made of seeded bytes, the changes between two syncs, and the comparison of two trees."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

HALVES = ("half-a", "half-b")
RENAMED, COPIED, RECOPIED = "renamed-half", "copied-half", "recopied-half"
IGNORED = ".deltasync"
FETCH = "fetch"
"""The step that goes the other way: from the server into an empty folder."""
_BLOCK_BYTES = 8 << 20
_CHANGES = ("no change", "1 % edited", "half renamed", "half duplicated", "duplicated, new times")


@dataclass(frozen=True, slots=True)
class Workload:
    """A tree of `files` files in `folders` folders, half of the bytes below each of HALVES."""

    name: str
    title: str
    files: int
    folders: int
    sizes: tuple[int, ...]
    """The sizes of files, used in turn; both halves begin at the first."""
    steps: tuple[str, ...] = ("first sync", *_CHANGES)
    """Which of STEPS are measured, one after another."""
    is_timed: bool = True
    """Whether it is compared with rsync and timed; else it runs once, for its memory and its bytes."""

    @property
    def total_bytes(self) -> int:
        """The bytes of all files together."""
        return sum(size for _, size in self.layout())

    def layout(self) -> Iterator[tuple[str, int]]:
        """Yield the path and size of every file, in the order in which they are made."""
        folders, files = max(1, self.folders // 2), max(1, self.files // 2)
        for half in HALVES if self.files > 1 else HALVES[:1]:
            for number in range(files):
                yield (
                    f"{half}/folder-{number * folders // files:04}/file-{number:06}.bin",
                    self.sizes[number % len(self.sizes)],
                )


def workloads(scale: float) -> list[Workload]:
    """Return the workloads; scale 1 is the size that the goals are stated for."""
    small, tiny = max(2, round(20_000 * scale)), max(2, round(100_000 * scale))
    mebibytes = [24, 40, 56, 64, 72, 80, 88, 96, 104, 112, 128, 160]
    media = tuple(round(2**20 * scale * size) for size in mebibytes)
    return [
        Workload(
            "media",
            f"24 files, {_shown(2 * sum(media))} of incompressible media",
            24,
            4,
            media,
            steps=("first sync", FETCH, *_CHANGES),
        ),
        Workload(
            "model",
            f"one incompressible file of {_shown(round(2**32 * scale))}",
            1,
            1,
            (round(2**32 * scale),),
            steps=("first sync", "edited throughout", "copy, other header"),
        ),
        Workload(
            "huge",
            f"one incompressible file of {_shown(round(2**33 * scale))}, once through the proxy and not timed",
            1,
            1,
            (round(2**33 * scale),),
            steps=("first sync", "edited throughout"),
            is_timed=False,
        ),
        Workload(
            "small",
            f"{small:,} files of about 10 KiB",
            small,
            max(2, small // 100),
            tuple(range(8_192, 12_289, 61)),
            steps=("first sync", FETCH, *_CHANGES),
        ),
        Workload("tiny", f"{tiny:,} files of 100 to 200 bytes", tiny, max(2, tiny // 100), tuple(range(100, 201))),
    ]


def _shown(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def make(workload: Workload, root: Path) -> None:
    """Write the workload's tree."""
    made: set[str] = set()
    for path, size in workload.layout():
        folder = path.rpartition("/")[0]
        if folder not in made:
            (root / folder).mkdir(parents=True)
            made.add(folder)
        _write(root / path, path, size)


def _write(path: Path, seed: str, size: int) -> None:
    stream = blake3(seed.encode())
    with path.open("wb", buffering=0) as out:
        for offset in range(0, size, _BLOCK_BYTES):
            out.write(stream.digest(length=min(_BLOCK_BYTES, size - offset), seek=offset))


def edit_one_percent(workload: Workload, root: Path) -> None:
    """Overwrite every 100th file in place with as many new bytes; of a workload of fewer files, 1 MiB of the first."""
    paths = list(workload.layout())
    for path, size in paths[::100]:
        with (root / path).open("r+b", buffering=0) as out:
            out.write(blake3(f"edited {path}".encode()).digest(length=min(size, 1 << 20)))


def rename_half(_: Workload, root: Path) -> None:
    """Rename the directory that holds one half of the bytes."""
    (root / HALVES[0]).rename(root / RENAMED)


def duplicate_half(_: Workload, root: Path) -> None:
    """Copy the directory that holds the other half, with its files' times, as `cp -a` does."""
    shutil.copytree(root / HALVES[1], root / COPIED)


def duplicate_half_anew(_: Workload, root: Path) -> None:
    """Copy it once more, with new times, as `cp -r` does."""
    shutil.copytree(root / HALVES[1], root / RECOPIED, copy_function=shutil.copyfile)


def edit_throughout(workload: Workload, root: Path) -> None:
    """Change the one file as training changes a checkpoint: 1 MiB inserted near the front, 1 % overwritten in 1,024
    places, 16 MiB appended (each in proportion, for other sizes)."""
    ((path, size),) = workload.layout()
    file, anew = root / path, root / f"{path}.new"
    fresh = blake3(b"edited throughout")
    at, share = size // 4096, size >> 12
    with file.open("rb") as old, anew.open("wb", buffering=0) as new:
        new.write(old.read(at))
        new.write(fresh.digest(length=share))
        shutil.copyfileobj(old, new, _BLOCK_BYTES)
        new.write(fresh.digest(length=16 * share, seek=share))
        piece = size // 100 // 1024
        for number in range(1024):
            place = (number * 2_654_435_761) % (size - piece)
            new.seek(place)
            new.write(fresh.digest(length=piece, seek=17 * share + number * piece))
    anew.replace(file)


def copy_with_another_header(workload: Workload, root: Path) -> None:
    """Save the one file under another name, with a first KiB of its own."""
    ((path, _),) = workload.layout()
    shutil.copyfile(root / path, root / f"{path}.copy")
    with (root / f"{path}.copy").open("r+b", buffering=0) as file:
        file.write(blake3(b"header").digest(length=1024))


STEPS: dict[str, Callable[[Workload, Path], None]] = {
    "first sync": make,
    FETCH: lambda _workload, _root: None,
    "no change": lambda _workload, _root: None,
    "1 % edited": edit_one_percent,
    "half renamed": rename_half,
    "half duplicated": duplicate_half,
    "duplicated, new times": duplicate_half_anew,
    "edited throughout": edit_throughout,
    "copy, other header": copy_with_another_header,
}
"""Each step's change to the tree; the sync, or the fetch, after it is what is measured."""


def difference(left: Path, right: Path) -> str | None:
    """Say where two trees first differ in names, kinds, bytes, executable bits, link targets or file times, or None."""
    pending = [""]
    while pending:
        here = pending.pop()
        ours, theirs = _entries(left / here), _entries(right / here)
        if ours.keys() != theirs.keys():
            return f"{here or '.'}: {sorted(ours.keys() ^ theirs.keys())[:3]} on one side only"
        for name, one in ours.items():
            path = f"{here}/{name}" if here else name
            if reason := _entry_difference(one, theirs[name]):
                return f"{path}: {reason}"
            if one.is_dir(follow_symlinks=False):
                pending.append(path)
    return None


def _entries(folder: Path) -> dict[str, os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return {entry.name: entry for entry in entries if entry.name != IGNORED}


def _entry_difference(one: os.DirEntry[str], other: os.DirEntry[str]) -> str | None:
    here, there = one.stat(follow_symlinks=False), other.stat(follow_symlinks=False)
    if stat.S_IFMT(here.st_mode) != stat.S_IFMT(there.st_mode):
        return "another kind"
    if one.is_symlink():
        return None if os.readlink(one.path) == os.readlink(other.path) else "another target"
    if not one.is_file():
        return None
    if here.st_size != there.st_size or here.st_mtime_ns != there.st_mtime_ns:
        return f"size and time {here.st_size}, {here.st_mtime_ns} and {there.st_size}, {there.st_mtime_ns}"
    if (here.st_mode ^ there.st_mode) & 0o100:
        return "another executable bit"
    return None if _same_bytes(one.path, other.path) else "other bytes"


def _same_bytes(one: str, other: str) -> bool:
    with open(one, "rb", buffering=0) as left, open(other, "rb", buffering=0) as right:
        while block := left.read(_BLOCK_BYTES):
            if block != right.read(_BLOCK_BYTES):
                return False
        return not right.read(1)
