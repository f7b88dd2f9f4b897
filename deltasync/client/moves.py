"""Where directories hang, where they hung in the sealed tree, and what that says about renames."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Self

from deltasync.core.manifest import Entry, Kind
from deltasync.core.tree import find

if TYPE_CHECKING:
    from deltasync.client.state import State

ROOT_ID = 1
LIMBO = -1
"""The parent of a directory that disappeared: it waits here to be met elsewhere, until the next sealing."""


class Link(NamedTuple):
    """Where a directory hangs; moved_from is where the sealed tree has it, None where that follows from its parent."""

    parent: int
    name: str
    moved_from: str | None


@dataclass(frozen=True, slots=True)
class Stats:
    """What a directory object does not say of its entries, aligned with them: zeros for directories."""

    inodes: array[int]
    ctimes: array[int]
    flags: bytearray

    @classmethod
    def empty(cls) -> Self:
        """Return the stats of a directory without entries."""
        return cls(array("q"), array("q"), bytearray())

    @classmethod
    def unpack(cls, packed: bytes) -> Self:
        """Return the stats that `pack` wrote."""
        count = len(packed) // 17
        stats = cls.empty()
        stats.inodes.frombytes(packed[: 8 * count])
        stats.ctimes.frombytes(packed[8 * count : 16 * count])
        stats.flags.extend(packed[16 * count :])
        return stats

    def has_any(self, inodes: set[int]) -> bool:
        """Tell whether an entry has one of these inodes."""
        return not inodes.isdisjoint(self.inodes)

    def pack(self) -> bytes:
        """Return the columns one after another: 17 bytes an entry."""
        return self.inodes.tobytes() + self.ctimes.tobytes() + bytes(self.flags)


class Links:
    """Where every directory hangs: the rows, with the changes of a running scan laid over them."""

    def __init__(self, state: State) -> None:
        """Begin without changes."""
        self._state = state
        self._known: dict[int, Link] = {}
        self.changed: dict[int, Link] = {}

    def get(self, identity: int) -> Link:
        """Return where a directory hangs."""
        link = self.changed.get(identity) or self._known.get(identity)
        if link is None:
            link = self._known[identity] = self._state.link(identity)
        return link

    def set(self, identity: int, link: Link) -> None:
        """Hang a directory elsewhere."""
        self.changed[identity] = link

    def recorded(self) -> None:
        """Say that the changes were written."""
        self._known.clear()
        self.changed.clear()

    def path(self, identity: int) -> str | None:
        """Return the path of a directory, '' for the root, None when it or a folder above it waits in limbo."""
        parts: list[str] = []
        while identity != ROOT_ID:
            if identity == LIMBO:
                return None
            link = self.get(identity)
            parts.append(link.name)
            identity = link.parent
        return "/".join(reversed(parts))

    def origin(self, identity: int) -> str:
        """Return the path that the sealed tree has for a directory, if it has it at all."""
        parts: list[str] = []
        while identity != ROOT_ID:
            link = self.get(identity)
            parts.append(link.name if link.moved_from is None else link.moved_from)
            if link.moved_from is not None:
                break
            identity = link.parent
        return "/".join(reversed(parts))


def joined(folder: str, name: str) -> str:
    """Return the path of a name in a folder; the root is ''."""
    return f"{folder}/{name}" if folder else name


def renames(state: State) -> dict[str, str]:
    """Return new path -> path in the sealed tree, for directories and files recognised by their inode."""
    links = Links(state)
    found = _moved_directories(state, links)
    gone = _gone_inodes(state, links)
    if not gone:
        return found
    met = _met_again(state, links, gone)
    former = _former_paths(state, links, set(met))
    for inode, paths in met.items():
        for path in paths:
            if inode in former and former[inode] != path:
                found[path] = former[inode]
    return found


def former_entries(state: State, inodes: Collection[int]) -> dict[int, Entry]:
    """Return, of these inodes, those that disappeared since the last sealing, with the entry of the sealed tree."""
    links = Links(state)
    gone = _gone_inodes(state, links).intersection(inodes) if inodes else set()
    if not gone:
        return {}
    root, former = state.sealed_root(), _former_paths(state, links, gone)
    entries = {inode: find(root, path, state.load) for inode, path in former.items()}
    return {inode: entry for inode, entry in entries.items() if entry is not None and entry.kind is Kind.FILE}


def _moved_directories(state: State, links: Links) -> dict[str, str]:
    query = "SELECT id, moved_from FROM directories WHERE moved_from IS NOT NULL"
    moved = ((links.path(identity), origin) for identity, origin in state.db.execute(query).fetchall())
    return {path: origin for path, origin in moved if path is not None and path != origin}


def _all_stats(state: State) -> Iterator[tuple[int, bytes, Stats]]:
    for identity, digest, packed in state.db.execute("SELECT id, digest, stats FROM directories"):
        yield identity, digest, Stats.unpack(packed)


def _gone_inodes(state: State, links: Links) -> set[int]:
    """Return the inodes of what disappeared since the last sealing."""
    inodes = {inode for (inode,) in state.db.execute("SELECT inode FROM vanished")}
    if state.limbo_size():
        for identity, _, stats in _all_stats(state):
            if links.path(identity) is None:
                inodes.update(stats.inodes)
    inodes.discard(0)
    return inodes


def _met_again(state: State, links: Links, gone: set[int]) -> dict[int, list[str]]:
    """Return the paths where inodes that disappeared are observed now."""
    met: dict[int, list[str]] = {}
    for identity, digest, stats in _all_stats(state):
        if not stats.has_any(gone) or (path := links.path(identity)) is None:
            continue
        for entry, inode in zip(state.load(digest), stats.inodes, strict=True):
            if inode in gone and entry.kind is Kind.FILE:
                met.setdefault(inode, []).append(joined(path, entry.name))
    return met


def _former_paths(state: State, links: Links, inodes: set[int]) -> dict[int, str]:
    """Return where the sealed tree has the inodes that disappeared."""
    former: dict[int, str] = {}
    for identity, digest, stats in _all_stats(state):
        if stats.has_any(inodes) and links.path(identity) is None:
            origin = links.origin(identity)
            names = zip(state.load(digest), stats.inodes, strict=True)
            former.update((inode, joined(origin, entry.name)) for entry, inode in names if inode in inodes)
    query = "SELECT inode, path FROM vanished"
    former.update((inode, path) for inode, path in state.db.execute(query) if inode in inodes)
    return former
