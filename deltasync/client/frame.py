"""One folder on the way of a scan: what is recorded of it, what it holds now, and how that is written."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from deltasync.client.ignore import Level
from deltasync.client.ledger import Ledger
from deltasync.client.moves import Stats
from deltasync.client.state import Row, State
from deltasync.core.hashing import directory_digest
from deltasync.core.manifest import Entry, Kind, encode_directory
from deltasync.core.names import DEPTH_MAX, NAME_BYTES_MAX, PATH_BYTES_MAX


class Item(NamedTuple):
    """A recorded file or link."""

    entry: Entry
    inode: int
    ctime_ns: int
    flags: int


@dataclass(slots=True)
class Want:
    """Which folders a partial scan lists: this one or not, and some below it."""

    is_listed: bool = False
    below: dict[str, Want] = field(default_factory=dict)

    @classmethod
    def of(cls, folders: Iterable[str]) -> Want:
        """Arrange paths as a tree."""
        top = cls()
        for folder in folders:
            here = top
            for part in filter(None, folder.split("/")):
                here = here.below.setdefault(part, cls())
            here.is_listed = True
        return top


@dataclass(slots=True)
class Frame:
    """An open folder between the root and where the walk is."""

    row: Row
    path: str
    depth: int
    descriptor: int
    above: Frame | None
    want: Want | None
    is_deep: bool
    """Everything below is looked at."""
    level: Level | None = None
    children: dict[str, Row] = field(default_factory=dict)
    """The folders inside that the tree has, by name."""
    table: dict[str, Item] | None = None
    """The files and links inside that the tree has, by name; loaded when something differs."""
    todo: list[str] = field(default_factory=list)
    """The names of folders inside that are still to be looked at."""
    signature: bytes = b""
    is_dirty: bool = False
    """There may be something to write."""
    is_unsettled: bool = False
    """Something must be looked at again next time even if the listing is the same: no signature is kept."""
    _packed: bytes | None = None

    @property
    def is_far(self) -> bool:
        """Names here may lie too deep, or their paths be too long, to be carried (spec P-6, P-7)."""
        # A character takes four bytes at most, so that most paths need no encoding to be found short enough.
        return self.depth >= DEPTH_MAX or len(self.path) + NAME_BYTES_MAX > PATH_BYTES_MAX // 4

    def load(self, state: State) -> dict[str, Item]:
        """Return the files and links by name, reading them when they are first needed."""
        if self.table is None:
            self._packed = state.packed_stats(self.row.id)
            self.table = items(state, self.row.digest, Stats.unpack(self._packed))
        return self.table

    def take_child(self, row: Row) -> None:
        """Have a folder inside in the tree, in place of whatever had its name."""
        self.children[row.name] = row
        self.is_dirty = True
        if self.table is not None:
            self.table.pop(row.name, None)

    def write(self, ledger: Ledger) -> None:
        """Record the folder as it is known now, and tell the folder above if that changed."""
        if not self.is_dirty:
            return
        self.is_dirty = False
        row, before = self.row, (self.row.digest, self.row.signature)
        body, packed = self._encoded(self.load(ledger.state))
        row.digest, row.signature = directory_digest(body), self.signature
        if (row.digest, row.signature) != before or packed != self._packed or row.is_unwritten:
            row.is_unwritten = False
            self._packed = packed
            ledger.put(row, packed, body)
        if self.above is not None and (row.digest != before[0] or row.name not in self.above.children):
            self.above.take_child(row)

    def _encoded(self, table: dict[str, Item]) -> tuple[bytes, bytes]:
        """Return the directory object and the packed stats, and count what lies below."""
        stats, entries = Stats.empty(), []
        files = size = 0
        for name in sorted([*table, *self.children]):
            item = table.get(name)
            if item is None:
                child = self.children[name]
                item = Item(Entry(name, Kind.DIRECTORY, digest=child.digest), 0, 0, 0)
                files += child.files
                size += child.size
            elif item.entry.kind is Kind.FILE:
                files += 1
                size += item.entry.size
            entries.append(item.entry)
            stats.inodes.append(item.inode)
            stats.ctimes.append(item.ctime_ns)
            stats.flags.append(item.flags)
        self.row.files, self.row.size = files, size
        return encode_directory(entries), stats.pack()

    def close(self) -> None:
        """Let the folder go."""
        os.close(self.descriptor)


def items(state: State, digest: bytes, stats: Stats) -> dict[str, Item]:
    """Return the recorded files and links of a directory, by name."""
    columns = zip(state.load(digest), stats.inodes, stats.ctimes, stats.flags, strict=True)
    return {
        entry.name: Item(entry, inode, ctime_ns, flags)
        for entry, inode, ctime_ns, flags in columns
        if entry.kind is not Kind.DIRECTORY
    }
