"""Sudden death in one process: an actor dies at its n-th change of the file system and leaves all as a kill does."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DATABASE = ("state.db", "state.db-wal", "state.db-shm")
"""The files of a database of ours: itself, its log, and what nobody needs after a restart."""


class Killed(BaseException):
    """The process was killed here; nothing of ours may catch it."""


class Fuse:
    """Kills whatever acts on one side at its n-th change of the file system, and at every later one: no clean-up."""

    def __init__(self, changes: int) -> None:
        """Be ready. changes: how many are still let through."""
        self._left = changes
        self.is_blown = False

    def burn(self) -> None:
        """Count one change."""
        self._left -= 1
        if self._left < 0:
            self.is_blown = True
            raise Killed


class _Here(threading.local):
    side: str | None = None


_here = _Here()
_fuses: dict[str, Fuse] = {}
_CHANGES = frozenset(
    f"os.{name}" for name in ("rename", "link", "remove", "mkdir", "rmdir", "symlink", "chmod", "utime", "truncate")
)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def _on_audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _fuses or not (event in _CHANGES or (event == "open" and arguments[2] & _WRITES)):
        return
    side = _here.side
    if side is None:  # a thread of the client's, or one that the store has started for itself
        side = "store" if threading.current_thread().name.startswith("deltasync") else "client"
    fuse = _fuses.get(side)
    if fuse is not None:
        fuse.burn()


_is_watching = False


def _watch_changes() -> None:
    global _is_watching
    if not _is_watching:  # an audit hook stays until the process ends
        sys.addaudithook(_on_audit)
        _is_watching = True


@contextmanager
def acting(side: str) -> Iterator[None]:
    """Say who acts in this block, in this thread."""
    before, _here.side = _here.side, side
    try:
        yield
    finally:
        _here.side = before


def light(side: str, fuse: Fuse) -> None:
    """Let a side die by a fuse from now on."""
    _watch_changes()
    _fuses[side] = fuse


def put_out(side: str) -> None:
    """Let a side live."""
    _fuses.pop(side, None)


@contextmanager
def armed(side: str, fuse: Fuse | None) -> Iterator[None]:
    """Let a side die by a fuse in this block."""
    if fuse is not None:
        light(side, fuse)
    try:
        yield
    finally:
        put_out(side)


@contextmanager
def as_killed(folder: Path) -> Iterator[None]:
    """Undo what closing a database writes in this block: a killed process leaves its log as it is."""
    before = {name: (folder / name).read_bytes() for name in DATABASE[:2] if (folder / name).exists()}
    yield
    for name in DATABASE:
        (folder / name).unlink(missing_ok=True)
    for name, content in before.items():
        (folder / name).write_bytes(content)


def copy_tree(source: Path, target: Path) -> None:
    """Copy a folder as `cp -a` does: times, modes, links, and hard links among the copies."""
    seen: dict[tuple[int, int], str] = {}

    def copy(one: str, other: str) -> str:
        status = os.lstat(one)
        first = seen.setdefault((status.st_dev, status.st_ino), other)
        if first is other:
            shutil.copy2(one, other, follow_symlinks=False)
        else:
            os.link(first, other, follow_symlinks=False)
        return other

    shutil.copytree(source, target, symlinks=True, copy_function=copy)
