"""Bringing a tree from one root to another by comparing directory objects: what moves, and what is placed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from deltasync.core.manifest import EMPTY_ROOT, Entry, Kind
from deltasync.core.tree import Loader, Tree, entries_of, walk
from deltasync.disk import Folder
from deltasync_server.place import Placer

ShouldStop = Callable[[], bool]


class Stopped(Exception):
    """The store is closing; the tree is repaired at the next start."""


class Change:
    """Brings a tree from one root to another by comparing their directory objects; operations are not consulted."""

    def __init__(
        self, placer: Placer, load: Loader, should_stop: ShouldStop, forget_durable: Callable[[Collection[str]], None]
    ) -> None:
        """Move nothing yet. forget_durable: called with folders whose files will be others of the same names."""
        self._placer = placer
        self._load = load
        self._should_stop = should_stop
        self._forget_durable = forget_durable
        self._brought: dict[str, str] = {}
        self._taken: frozenset[str] = frozenset()

    def move(self, old: bytes, new: bytes) -> None:
        """Make the tree, which holds `old`, hold `new`."""
        if old == new:
            return
        moves = plan_moves(old, new, self._load)
        self._taken = frozenset(moves.values())
        if moves:
            after = Tree(new, self._load)
            self._forget_durable({path for path in (*moves, *moves.values()) if after.has_folder(path)})
        # All of them are taken before one is brought, so that swaps and chains need no order.
        self._brought = {path: self._placer.take(source) for path, source in moves.items()}
        self._folder(self._placer.tree, "", entries_of(old, self._load), entries_of(new, self._load))

    def _folder(self, folder: Folder, path: str, old: Iterable[Entry], new: list[Entry]) -> None:
        if self._should_stop():
            raise Stopped
        prefix = f"{path}/" if path else ""
        before = {entry.name: entry for entry in old}
        for taken in [name for name in before if prefix + name in self._taken] if self._taken else ():
            del before[taken]
        after = {entry.name for entry in new}
        for name in before:
            if name not in after:
                self._placer.remove(folder, name)
        differing = [(entry, before.get(entry.name)) for entry in new if before.get(entry.name) != entry]
        self._placer.place(folder, path, [pair for pair in differing if pair[0].kind is Kind.FILE])
        for entry, was in differing:
            if entry.kind is Kind.SYMLINK:
                self._placer.make_symlink(folder, entry)
            elif entry.kind is Kind.DIRECTORY:
                self._subfolder(folder, prefix + entry.name, entry, was)

    def _subfolder(self, folder: Folder, path: str, entry: Entry, was: Entry | None) -> None:
        if path in self._brought:
            self._placer.bring(self._brought[path], folder, entry.name)
            return
        old: list[Entry] = []
        if was is not None and was.kind is Kind.DIRECTORY:
            old = entries_of(was.digest, self._load)
        else:
            self._placer.make_folder(folder, entry.name)
        with folder.enter(entry.name) as entered:
            self._folder(entered, path, old, entries_of(entry.digest, self._load))

    def restore(self, root: bytes, digests: Collection[bytes]) -> None:
        """Place every file of these contents again, whatever is in its place."""
        by_folder: dict[str, list[tuple[Entry, Entry | None]]] = {}
        for path, entry in walk(root, self._load) if digests else ():
            if entry.digest in digests and entry.kind is Kind.FILE:
                by_folder.setdefault(path.rpartition("/")[0], []).append((entry, None))
        for path, files in by_folder.items():
            with self._placer.tree.walk_to(path) as folder:
                self._placer.place(folder, path, files)


def plan_moves(old: bytes, new: bytes, load: Loader) -> dict[str, str]:
    """Return new path -> old path of directories whose whole content the old tree has elsewhere, outermost first.

    No source lies in another one, and none is needed where it was.
    """
    compared = _Compared(load)
    compared.compare(old, new, "")
    sources = compared.sources() if compared.needed else {}
    moves: dict[str, str] = {}
    taken: set[str] = set()
    broken: set[str] = set()
    queue = deque(sorted(compared.needed, key=lambda needed: needed[0].count("/"))) if sources else deque()
    while queue:
        path, digest, is_fresh = queue.popleft()
        if any(above in moves for above in _above(path)):
            continue
        source = next((s for s in sources.get(digest, ()) if _is_whole(s, taken, broken)), None)
        if source is not None:
            moves[path] = source
            taken.add(source)
            broken.update(_above(source))
        elif is_fresh:
            below = (entry for entry in entries_of(digest, load) if entry.kind is Kind.DIRECTORY)
            queue.extend((f"{path}/{entry.name}", entry.digest, True) for entry in below)
    return moves


class _Compared:
    """Directories that two trees do not share: needed in the new one, at hand in the old one."""

    def __init__(self, load: Loader) -> None:
        self._load = load
        self.needed: list[tuple[str, bytes, bool]] = []
        """Path, digest, and whether nothing is at the path yet."""
        self._changed: list[tuple[str, bytes]] = []
        self._gone: list[tuple[str, bytes]] = []

    def compare(self, old: bytes, new: bytes, prefix: str) -> None:
        """Gather the directories below one that differs."""
        before = {entry.name: entry.digest for entry in self._folders(old)}
        for entry in self._folders(new):
            path, was = prefix + entry.name, before.pop(entry.name, None)
            if was == entry.digest:
                continue
            if entry.digest != EMPTY_ROOT:
                self.needed.append((path, entry.digest, was is None))
            if was is not None:
                self._changed.append((path, was))
                self.compare(was, entry.digest, path + "/")
        self._gone.extend((prefix + name, digest) for name, digest in before.items())

    def sources(self) -> Mapping[bytes, list[str]]:
        """Return the paths of the old tree's directories that need not stay, by digest."""
        found: dict[bytes, list[str]] = {}
        for path, digest in (*self._gone, *self._changed):
            found.setdefault(digest, []).append(path)
        for top, digest in self._gone:
            for path, entry in walk(digest, self._load, top + "/"):
                if entry.kind is Kind.DIRECTORY:
                    found.setdefault(entry.digest, []).append(path)
        found.pop(EMPTY_ROOT, None)
        return found

    def _folders(self, digest: bytes) -> list[Entry]:
        return [entry for entry in entries_of(digest, self._load) if entry.kind is Kind.DIRECTORY]


def _above(path: str) -> Iterator[str]:
    while path := path.rpartition("/")[0]:
        yield path


def _is_whole(path: str, taken: set[str], broken: set[str]) -> bool:
    return path not in taken and path not in broken and taken.isdisjoint(_above(path))
