"""The Merkle tree of a workspace: walk it, look a path up, change it and freeze it into a new root."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from deltasync.core.hashing import directory_digest
from deltasync.core.manifest import EMPTY_ROOT, Entry, Kind, encode_directory

Loader = Callable[[bytes], list[Entry]]
"""Gives the entries of the directory object that a digest names."""

Store = Callable[[bytes, bytes], None]
"""Takes the digest and the body of a new directory object."""


def entries_of(digest: bytes, load: Loader) -> list[Entry]:
    """Return a directory's entries; the empty directory is known without its object."""
    return [] if digest == EMPTY_ROOT else load(digest)


def walk(root: bytes, load: Loader, prefix: str = "") -> Iterator[tuple[str, Entry]]:
    """Yield every (path, entry) below a directory, parents before children, names in order."""
    for entry in entries_of(root, load):
        path = prefix + entry.name
        yield path, entry
        if entry.kind is Kind.DIRECTORY:
            yield from walk(entry.digest, load, path + "/")


def walk_behind(root: bytes, load: Loader, behind: str, prefix: str = "") -> Iterator[tuple[str, Entry]]:
    """Yield what `walk` yields behind a path, whether that is there or not; folders before it are not loaded."""
    first, _, rest = behind.partition("/")
    for entry in entries_of(root, load):
        if entry.name < first:
            continue
        path, is_told = prefix + entry.name, entry.name == first
        if not is_told:
            yield path, entry
        if entry.kind is Kind.DIRECTORY:
            yield from walk_behind(entry.digest, load, rest if is_told else "", path + "/")


def find(root: bytes, path: str, load: Loader) -> Entry | None:
    """Return the entry at a path, or None."""
    digest, entry = root, None
    for part in path.split("/"):
        if entry is not None and entry.kind is not Kind.DIRECTORY:
            return None
        entry = next((candidate for candidate in entries_of(digest, load) if candidate.name == part), None)
        if entry is None:
            return None
        digest = entry.digest
    return entry


class _Node:
    """One loaded directory; `children` are those of its directories that were loaded as well."""

    __slots__ = ("changed", "children", "entries")

    def __init__(self, entries: dict[str, Entry]) -> None:
        self.entries = entries
        self.children: dict[str, _Node] = {}
        self.changed = False


class Detached(NamedTuple):
    """An entry taken out of a tree, with what is below it as far as it was loaded."""

    entry: Entry
    node: _Node | None


class Tree:
    """A tree under change: directories are loaded when a path below them is first touched.

    The digest that `get` shows for a directory is the one before the change, until `freeze`.
    """

    def __init__(self, root: bytes, load: Loader) -> None:
        self._load = load
        self._root_digest = root
        self._root = self._loaded(root)
        self._near: tuple[str, _Node] = ("", self._root)

    def get(self, path: str) -> Entry | None:
        """Return the entry at a path, or None."""
        folder, _, name = path.rpartition("/")
        node = self._folder(folder)
        return node.entries.get(name) if node else None

    def has_folder(self, path: str) -> bool:
        """Tell whether a path ('' is the root) is a directory now."""
        return self._folder(path) is not None

    def put(self, folder: str, entry: Entry) -> bool:
        """Place an entry in a folder, over what has its name; False when there is no such folder."""
        node = self._folder(folder)
        if node is None:
            return False
        node.entries[entry.name] = entry
        if entry.kind is Kind.DIRECTORY or entry.name in node.children:
            node.children.pop(entry.name, None)
            self._forget_near()
        node.changed = True
        return True

    def detach(self, path: str) -> Detached | None:
        """Take an entry out with everything below it, or return None when nothing is there."""
        folder, _, name = path.rpartition("/")
        node = self._folder(folder)
        entry = node.entries.pop(name, None) if node else None
        if node is None or entry is None:
            return None
        node.changed = True
        self._forget_near()
        return Detached(entry, node.children.pop(name, None))

    def attach(self, path: str, detached: Detached) -> list[Detached]:
        """Place something that was detached at a path; missing parents come into being; returns what it displaced."""
        displaced: list[Detached] = []
        node, parts = self._root, path.split("/")
        for depth, part in enumerate(parts[:-1], start=1):
            entry = node.entries.get(part)
            if entry is None or entry.kind is not Kind.DIRECTORY:
                if entry is not None:
                    displaced.append(Detached(entry, None))
                self.put("/".join(parts[: depth - 1]), Entry(part, Kind.DIRECTORY, digest=EMPTY_ROOT))
            node = self._child(node, part)
        name = parts[-1]
        if name in node.entries:
            displaced.append(Detached(node.entries[name], node.children.pop(name, None)))
        moved = detached.entry
        node.entries[name] = Entry(
            name, moved.kind, moved.size, moved.mtime_ns, moved.executable, moved.digest, moved.target
        )
        if detached.node is not None:
            node.children[name] = detached.node
        node.changed = True
        self._forget_near()
        return displaced

    def below(self, detached: Detached) -> Iterator[Entry]:
        """Yield the entries below something detached or displaced, as they are now."""
        if detached.entry.kind is Kind.DIRECTORY:
            node = detached.node
            for entry in list(node.entries.values()) if node else entries_of(detached.entry.digest, self._load):
                yield entry
                yield from self.below(Detached(entry, node.children.get(entry.name) if node else None))

    def freeze(self, store: Store) -> bytes:
        """Store the object of every changed directory and return the root's digest."""
        self._root_digest = self._frozen(self._root, self._root_digest, store)
        return self._root_digest

    def _frozen(self, node: _Node, digest: bytes, store: Store) -> bytes:
        for name, child in node.children.items():
            before = node.entries[name]
            after = self._frozen(child, before.digest, store)
            if after != before.digest:
                node.entries[name] = Entry(name, Kind.DIRECTORY, digest=after)
                node.changed = True
        if not node.changed:
            return digest
        body = encode_directory([node.entries[name] for name in sorted(node.entries)])
        digest = directory_digest(body)
        store(digest, body)
        node.changed = False
        return digest

    def _loaded(self, digest: bytes) -> _Node:
        return _Node({entry.name: entry for entry in entries_of(digest, self._load)})

    def _child(self, node: _Node, name: str) -> _Node:
        child = node.children.get(name)
        if child is None:
            child = node.children[name] = self._loaded(node.entries[name].digest)
        return child

    def _folder(self, path: str) -> _Node | None:
        """Return the loaded directory at a path; changes come in runs below one folder, so the last is kept near."""
        if path == self._near[0]:
            return self._near[1]
        node = self._root
        for part in path.split("/") if path else ():
            entry = node.entries.get(part)
            if entry is None or entry.kind is not Kind.DIRECTORY:
                return None
            node = self._child(node, part)
        self._near = (path, node)
        return node

    def _forget_near(self) -> None:
        self._near = ("", self._root)
