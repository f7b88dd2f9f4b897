"""The tree, or the parts of one, that a fetch brings: directory objects, all checked before anything is written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Protocol

import msgspec

from deltasync.client.incoming import DIRECTORY_BYTES_MAX, Incoming
from deltasync.client.moves import joined
from deltasync.client.patience import patiently
from deltasync.client.resync import FETCHED_BYTES_MAX, fetch_tree
from deltasync.core.errors import DeltasyncError, NotFound, Refused
from deltasync.core.hashing import directory_digest
from deltasync.core.manifest import EMPTY_ROOT, Entry, Kind, decode_directory, parse_directory
from deltasync.core.names import DEPTH_MAX, NameRefused, parse_path, parse_target, shown
from deltasync.core.tree import entries_of

OBJECTS_AT_ONCE = 4096
"""How many directory objects one request asks for."""


class Directories(Protocol):
    """Where directory objects come from."""

    url: str
    max_retries: int

    def directory(self, name: str, digest: bytes) -> bytes:
        """Fetch the body of a directory object."""

    def directories(self, name: str, digests: Sequence[bytes]) -> AbstractContextManager[Incoming]:
        """Fetch many directory objects as one stream of frames."""

    def back_off(self, attempt: int, error: DeltasyncError | None = None) -> None:
        """Wait before another attempt."""


@dataclass(frozen=True, slots=True)
class Scope:
    """The paths that are wanted with everything below them; none at all is everything."""

    paths: tuple[str, ...] = ()
    _whole: frozenset[str] = field(init=False, repr=False, compare=False)
    _above: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Keep what both questions look up: there may be many paths, and a question for each entry of a tree."""
        object.__setattr__(self, "_whole", frozenset(self.paths))
        object.__setattr__(self, "_above", frozenset(above for path in self.paths for above in _parents(path)))

    def covers(self, path: str) -> bool:
        """Tell whether a path ('' is the root) is wanted with everything below it."""
        return not self.paths or path in self._whole or not self._whole.isdisjoint(_parents(path))

    def leads(self, path: str) -> bool:
        """Tell whether something below a path is wanted."""
        return path in self._above if path else bool(self.paths)


def _parents(path: str) -> Iterator[str]:
    while path := path.rpartition("/")[0]:
        yield path


EVERYTHING = Scope()


@dataclass(frozen=True, slots=True)
class Wanted:
    """What DEST is to hold; every directory object below the scope is here and was checked."""

    root: bytes
    scope: Scope
    objects: Mapping[bytes, bytes]

    def entries(self, path: str, digest: bytes) -> list[Entry]:
        """Return the entries of a directory of the tree that are wanted, or that lead to something wanted."""
        entries = entries_of(digest, self._load)
        if self.scope.covers(path):
            return entries
        below = ((joined(path, entry.name), entry) for entry in entries)
        return [entry for at, entry in below if self.scope.covers(at) or self.scope.leads(at)]

    def _load(self, digest: bytes) -> list[Entry]:
        return decode_directory(self.objects[digest])


def parse_scope(texts: Iterable[str]) -> Scope:
    """Return the scope that a user names, or raise NameRefused."""
    paths = {str(parse_path(text.rstrip("/"))) for text in texts}
    return Scope(tuple(sorted(path for path in paths if paths.isdisjoint(_parents(path)))))


def fetch_wanted(source: Directories, name: str, root: bytes, scope: Scope) -> Wanted:
    """Fetch what is needed of a tree; raises Refused for one that breaks a rule (spec F-2, F-3)."""
    download = _Download(source, name)
    if not scope.paths:
        download.below(root)
    for path in scope.paths:
        top = download.find(root, path)
        if top.kind is Kind.DIRECTORY:
            download.below(top.digest)
    wanted = Wanted(root, scope, download.objects)
    _check_below(wanted, "", root)
    return wanted


def find_entries(source: Directories, name: str, root: bytes, paths: Iterable[str]) -> dict[str, Entry]:
    """Return what a tree has at some paths; a path at which it has nothing is left out."""
    download, found = _Download(source, name), dict[str, Entry]()
    for path in paths:
        with suppress(NotFound):
            found[path] = download.find(root, path)
    return found


def find_folder(source: Directories, name: str, root: bytes, path: str) -> bytes:
    """Return the digest of a tree's folder ('' is all of it), or raise NotFound."""
    if not path:
        return root
    found = _Download(source, name).find(root, path)
    if found.kind is not Kind.DIRECTORY:
        raise NotFound(f"{shown(path)} is no folder in the tree that is to be fetched; check its name")
    return found.digest


class _Download:
    """Fetches the directory objects of one tree; ends also where a hostile server does not."""

    def __init__(self, source: Directories, name: str) -> None:
        self._source, self._name = source, name
        self.objects: dict[bytes, bytes] = {}
        self._names: dict[bytes, dict[str, Entry]] = {}
        """Of the directories that were looked into."""
        self._bytes = 0

    def find(self, root: bytes, path: str) -> Entry:
        """Return the entry at a path; the directories that lead to it are fetched and checked."""
        entry = Entry("", Kind.DIRECTORY, digest=root)
        for part in path.split("/"):
            found = self._checked(entry).get(part)
            if found is None:
                raise NotFound(f"there is no {shown(path)} in the tree that is to be fetched; check its name")
            entry = found
        return entry

    def _checked(self, entry: Entry) -> Mapping[str, Entry]:
        if entry.kind is not Kind.DIRECTORY or entry.digest == EMPTY_ROOT:
            return {}
        if entry.digest not in self.objects:
            self.objects[entry.digest] = self._source.directory(self._name, entry.digest)
        if entry.digest not in self._names:
            entries = parse_directory(self.objects[entry.digest], entry.digest)
            self._names[entry.digest] = {each.name: each for each in entries}
        return self._names[entry.digest]

    def below(self, top: bytes) -> None:
        """Fetch a directory with everything below it, one level after another, and check all of it."""
        level, depth = {top}, 0
        while level := level - self.objects.keys() - {EMPTY_ROOT}:
            if (depth := depth + 1) > DEPTH_MAX + 1:
                raise self._excess()
            left, level = iter(sorted(level)), set()
            while asked := list(islice(left, OBJECTS_AT_ONCE)):
                patiently(self._source, partial(self._fetch, asked), lambda: len(self.objects))
                level |= {child for digest in asked for child in _children(self.objects[digest])}
        self.objects |= fetch_tree(self._source, self._name, top, self.objects.get)

    def _fetch(self, asked: list[bytes]) -> None:
        lacking = [digest for digest in asked if digest not in self.objects]
        with self._source.directories(self._name, lacking) as incoming:
            for digest in lacking:
                self.objects[digest] = self._body(incoming, digest)
            incoming.end()

    def _body(self, incoming: Incoming, digest: bytes) -> bytes:
        size = incoming.frame()
        if size is None:
            raise NotFound("the server does not keep this tree any more; fetch again")
        self._bytes += size
        if self._bytes > FETCHED_BYTES_MAX or size > DIRECTORY_BYTES_MAX:
            raise self._excess()
        body = b"".join(incoming.content(size))
        if directory_digest(body) != digest:
            raise Refused("T-3", f"{self._source.url} gives a directory object that does not have its digest")
        return body

    def _excess(self) -> Refused:
        return Refused("P-7", f"the tree that {self._source.url} states is larger or deeper than any that we take")


def _children(body: bytes) -> list[bytes]:
    """Return the directories inside a body that is still to be checked."""
    try:
        return [entry.digest for entry in decode_directory(body) if entry.kind is Kind.DIRECTORY]
    except msgspec.MsgspecError:
        return []


def _check_below(wanted: Wanted, path: str, digest: bytes) -> None:
    """Check what no directory object shows by itself: the whole paths, and the links against them."""
    for entry in wanted.entries(path, digest):
        at = joined(path, entry.name)
        try:
            if entry.kind is Kind.SYMLINK:
                parse_target(at, entry.target)
            elif entry.kind is Kind.DIRECTORY:
                parse_path(at)
        except NameRefused as error:
            raise Refused("P-9" if entry.kind is Kind.SYMLINK else "P-6", f"{shown(at)}: {error}") from error
        if entry.kind is Kind.DIRECTORY:
            _check_below(wanted, at, entry.digest)
