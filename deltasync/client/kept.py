"""Inputs that a workspace of this client has on the host already: nothing is read or sent for them (spec J-21)."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path
from typing import NamedTuple

from deltasync.client import outbox
from deltasync.client.frame import Item, items
from deltasync.client.listing import clamped, is_executable, list_folder, signed
from deltasync.client.moves import ROOT_ID, Stats, joined
from deltasync.client.opening import DATABASE, client_id
from deltasync.client.state import REHASH_DUE, Row, State
from deltasync.core.errors import DeltasyncError
from deltasync.core.manifest import Entry, Kind
from deltasync.core.names import RESERVED
from deltasync.core.tree import Loader, find, walk
from deltasync.disk import DIRECTORY_FLAGS


class Kept(NamedTuple):
    """Where a host has an input: a workspace, its last acknowledged sequence, and the path there."""

    workspace: str
    sequence: int
    path: str
    files: int
    size_bytes: int
    digests: dict[str, bytes]
    """Of its files, by their paths below it, '' for the file itself; where that was asked."""


def workspace_of(path: str) -> Path | None:
    """Return the innermost workspace that a path is, or lies in."""
    real = Path(path)
    return next((each for each in (real, *real.parents) if (each / RESERVED / DATABASE).is_file()), None)


def receiver_of(root: Path) -> str | None:
    """Return the server that a workspace of this client is bound to, if there is one.

    A state that came with a folder of somebody else, such as one that was unpacked, names no host for us.
    """
    with contextlib.suppress(DeltasyncError, sqlite3.Error), State.open(root, read_only=True) as state:
        return outbox.head(state).url if state.client_id == client_id() else None
    return None


def kept(path: str, url: str, *, digests: bool = False) -> Kept | None:
    """Return where the server has what is at a real path, exactly as it is here; None where that cannot be told."""
    root = workspace_of(path)
    if root is None:
        return None
    inside = os.path.relpath(path, root)
    with contextlib.suppress(DeltasyncError, sqlite3.Error, OSError), State.open(root, read_only=True) as state:
        state.db.execute("BEGIN")  # one moment of it: a watcher may be at work
        here = outbox.head(state)
        if here.workspace is None or here.url != url or not here.acknowledged_sequence:
            return None
        if state.client_id != client_id() or state.get_meta(REHASH_DUE):
            return None
        found = _Recorded(state, str(root)).look("" if inside == "." else inside, here.acknowledged_root)
        if found is None:
            return None
        named = digests_at(here.acknowledged_root, found[0], state.load) if digests else {}
        return Kept(here.workspace, here.acknowledged_sequence, *found, named)
    return None


def digests_at(root: bytes, path: str, load: Loader) -> dict[str, bytes]:
    """Return the digests of the files at a path of a tree, by their paths below it; '' for the file itself."""
    entry = find(root, path, load) if path else Entry("", Kind.DIRECTORY, digest=root)
    if entry is None or entry.kind is not Kind.DIRECTORY:
        return {"": entry.digest} if entry is not None else {}
    return {inside: each.digest for inside, each in walk(entry.digest, load) if each.kind is Kind.FILE}


class _Recorded:
    """What a state has recorded, beside what is here."""

    def __init__(self, state: State, root: str) -> None:
        self._state, self._root = state, root

    def look(self, path: str, acknowledged: bytes) -> tuple[str, int, int] | None:
        """Return the path with its files and bytes, if it is in the acknowledged tree as it is recorded and here."""
        folder, _, name = path.rpartition("/")
        above = self._row(folder)
        if above is None:
            return None
        row = self._row(path)
        entry = find(acknowledged, path, self._state.load) if path else Entry("", Kind.DIRECTORY, digest=acknowledged)
        if entry is None:
            return None
        if row is not None:
            is_same = entry.kind is Kind.DIRECTORY and entry.digest == row.digest and self._is_whole(row, path)
            return (path, row.files, row.size) if is_same else None
        item = self._items(above).get(name)
        if item is None or item.entry != entry or entry.kind is not Kind.FILE:
            return None
        status = os.lstat(f"{self._root}/{path}")
        return (path, 1, entry.size) if _is_same(item, _stat_of(name, status)) else None

    def _row(self, path: str) -> Row | None:
        row: Row | None = self._state.row(ROOT_ID)
        for part in filter(None, path.split("/")):
            row = next((each for each in self._state.children(row.id) if each.name == part), None) if row else None
        return row

    def _items(self, row: Row) -> dict[str, Item]:
        return items(self._state, row.digest, Stats.unpack(self._state.packed_stats(row.id)))

    def _is_whole(self, row: Row, path: str) -> bool:
        """Tell whether a folder holds what is recorded, everything with the recorded stat, and nothing else."""
        descriptor = os.open(joined(self._root, path) if path else self._root, DIRECTORY_FLAGS)
        try:
            listing = list_folder(descriptor)
        finally:
            os.close(descriptor)
        if not path:
            listing.folders.pop(RESERVED, None)
        recorded, children = self._items(row), {each.name: each for each in self._state.children(row.id)}
        if listing.folders.keys() != children.keys() or {each[0] for each in listing.files} != recorded.keys():
            return False
        if not all(_is_same(recorded[each[0]], each) for each in listing.files):
            return False
        return all(self._is_whole(child, joined(path, name)) for name, child in children.items())


def _stat_of(name: str, status: os.stat_result) -> tuple[str, int, int, int, int, int]:
    return name, status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _is_same(item: Item, seen: tuple[str, int, int, int, int, int]) -> bool:
    """Tell whether what is here is what was recorded, whose times prove its content."""
    _, inode, mode, size, mtime_ns, ctime_ns = seen
    entry = item.entry
    if item.flags or (item.inode, item.ctime_ns) != (signed(inode), clamped(ctime_ns)):
        return False
    if entry.kind is Kind.SYMLINK:
        return True
    return (entry.size, entry.mtime_ns, entry.executable) == (size, clamped(mtime_ns), is_executable(mode))
