"""The comparison before a fetch: what DEST holds already, what is to come, and what it has beyond."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace

from deltasync.client.digest import Digester, FileChanging
from deltasync.client.listing import clamped, is_executable
from deltasync.client.moves import joined
from deltasync.client.opening import DATABASE, STORE_FOLDERS
from deltasync.client.wanted import Wanted
from deltasync.core.errors import Refused, UsageError
from deltasync.core.manifest import Entry, Kind
from deltasync.core.names import RESERVED, shown
from deltasync.disk import Folder

Read = Callable[[int, int], None]
"""Is told how many files, and bytes, were read here so far."""
CHANGED = "changed here since the job was started, and was left; move it away, then fetch again"
MayReplace = Callable[[str, os.stat_result], bool]
"""Tells of a path in DEST and of what is there whether something else may take its place."""


@dataclass(frozen=True, slots=True)
class Place:
    """A path that is to get a content, with the time and mode of its entry."""

    path: str
    entry: Entry
    is_replacing: bool
    """Something else has the name now."""
    is_folder_there: bool
    """What has the name is a folder, which goes with everything in it."""
    read: os.stat_result | None = None
    """How the file that is only to be touched looked when it was read."""


@dataclass(slots=True)
class Need:
    """A content that some paths lack."""

    digest: bytes
    size: int
    places: list[Place] = field(default_factory=list)


@dataclass(slots=True)
class Comparison:
    """What a fetch has to do."""

    files: int = 0
    size_bytes: int = 0
    """The wanted files, and what they hold."""
    unchanged: int = 0
    """Files and links that are as they should be."""
    folders: list[Place] = field(default_factory=list)
    """To be made, parents first."""
    links: list[Place] = field(default_factory=list)
    touches: list[Place] = field(default_factory=list)
    """Files with the right content, and another time or executable bit."""
    needs: dict[bytes, Need] = field(default_factory=dict)
    extras: dict[str, int] = field(default_factory=dict)
    """What is to be deleted, each with the number of entries that it is."""
    problems: dict[str, str] = field(default_factory=dict)
    here: dict[str, bytes] = field(default_factory=dict)
    """The digests of the files that were read."""
    entries: int = 0
    """What lies in wanted folders, counted with everything below it."""
    deleted: int = 0
    """How much of that a deletion removes."""


class Comparing:
    """One walk through the wanted tree beside what is in DEST."""

    def __init__(
        self,
        wanted: Wanted,
        *,
        delete: bool,
        read: Read,
        may_be_workspace: bool = False,
        may_replace: MayReplace | None = None,
    ) -> None:
        """Begin. delete: what is not wanted will be removed, so that it is counted. may_be_workspace: of DEST.

        may_replace: asked of each file or link that is not as it should be; without it any may be replaced.
        """
        self._wanted, self._delete, self._read = wanted, delete, read
        self._is_free = may_replace
        self._may_be_workspace = may_be_workspace
        self._digester = Digester()
        self._read_bytes = 0
        self.found = Comparison()

    def compare(self, dest: Folder | None) -> Comparison:
        """Compare everything; nothing is changed. dest: None when there is no such folder yet."""
        self._folder(dest, "", self._wanted.root)
        self._read(len(self.found.here), self._read_bytes)
        return self.found

    def _folder(self, folder: Folder | None, path: str, digest: bytes) -> None:
        wanted = self._wanted.entries(path, digest)
        present = set(folder.names()) if folder is not None else set()
        if RESERVED in present and folder is not None:
            if not self._may_be_workspace:
                refuse_workspace(folder, path)
            present.discard(RESERVED)
        if folder is not None:
            _refuse_store(folder, path, present)
        for entry in wanted:
            at = joined(path, entry.name)
            status = folder.stat(entry.name) if folder is not None and entry.name in present else None
            self.found.entries += status is not None
            if entry.kind is Kind.DIRECTORY:
                self._directory(folder, at, entry, status)
            elif status is not None and stat.S_ISDIR(status.st_mode) and not self._may_replace(folder, at):
                pass
            elif entry.kind is Kind.SYMLINK:
                self._link(folder, at, entry, status)
            else:
                self._file(folder, at, entry, status)
        if folder is not None and self._wanted.scope.covers(path):
            self._beyond(folder, path, present - {entry.name for entry in wanted})

    def _directory(self, folder: Folder | None, path: str, entry: Entry, status: os.stat_result | None) -> None:
        if folder is None or status is None or not stat.S_ISDIR(status.st_mode):
            self.found.folders.append(_place(path, entry, status))
            self._folder(None, path, entry.digest)
            return
        try:
            inside = folder.enter(entry.name)
        except OSError as error:
            self.found.problems[path] = f"cannot be opened ({error.strerror}); nothing below it was fetched"
            return
        with inside:
            self._folder(inside, path, entry.digest)

    def _may_replace(self, folder: Folder | None, path: str) -> bool:
        """Tell whether the folder at a path may go, in place of which something else is wanted (spec F-12)."""
        assert folder is not None
        with folder.enter(path.rpartition("/")[2]) as inside:
            below = sum(1 for _ in _below(inside, path))
        if below and not self._delete:
            self.found.problems[path] = "is a folder here, and not empty; --delete lets it be replaced"
            return False
        self.found.entries += below
        self.found.deleted += below
        return True

    def _link(self, folder: Folder | None, path: str, entry: Entry, status: os.stat_result | None) -> None:
        is_link = folder is not None and status is not None and stat.S_ISLNK(status.st_mode)
        if is_link and folder is not None and os.readlink(entry.name, dir_fd=folder.fd) == entry.target:
            self.found.unchanged += 1
            return
        self.found.links.append(_place(path, entry, status))

    def _file(self, folder: Folder | None, path: str, entry: Entry, status: os.stat_result | None) -> None:
        found = self.found
        read = self._read_as_wanted(folder, path, entry, status) if folder is not None and status is not None else None
        if read is None and status is not None and self._is_free is not None and not self._is_free(path, status):
            found.problems[path] = CHANGED
            return
        found.files += 1
        found.size_bytes += entry.size
        if read is not None:
            if is_touched(entry, read):
                found.touches.append(replace(_place(path, entry, status), read=read))
            else:
                found.unchanged += 1
            return
        need = found.needs.setdefault(entry.digest, Need(entry.digest, entry.size))
        if need.size != entry.size:
            raise Refused("T-5", f"{shown(path)} has the digest of another file and not its size")
        need.places.append(_place(path, entry, status))

    def _read_as_wanted(self, folder: Folder, path: str, entry: Entry, status: os.stat_result) -> os.stat_result | None:
        """Return how a file with the wanted content looked when it was read, else None (spec F-11).

        Its size is asked first, then its bytes.
        """
        if not stat.S_ISREG(status.st_mode) or status.st_size != entry.size:
            return None
        try:
            digested = self._digester.digest_file(entry.name, at=folder.fd)
        except (OSError, FileChanging):
            return None  # what cannot be read, or is being written, is not what is wanted
        self.found.here[path] = digested.digest
        self._read_bytes += entry.size
        if len(self.found.here) % 256 == 0:
            self._read(len(self.found.here), self._read_bytes)
        return digested.status if digested.digest == entry.digest else None

    def _beyond(self, folder: Folder, path: str, names: set[str]) -> None:
        """Count what is not wanted, and have it deleted where that is asked for."""
        for name in sorted(names):
            entries = 1
            if self._delete and stat.S_ISDIR(folder.stat(name).st_mode):
                with folder.enter(name) as inside:
                    entries += sum(1 for _ in _below(inside, joined(path, name)))
            self.found.entries += entries
            if self._delete:
                self.found.extras[joined(path, name)] = entries
                self.found.deleted += entries


def is_touched(entry: Entry, status: os.stat_result) -> bool:
    """Tell whether a file with the right content has another time or executable bit."""
    return (clamped(status.st_mtime_ns), is_executable(status.st_mode)) != (entry.mtime_ns, entry.executable)


def refuse_workspace(folder: Folder, path: str) -> None:
    """Raise UsageError when a folder is a workspace: a fetch could overwrite what it has not sent (spec F-10)."""
    try:
        with folder.enter(RESERVED) as inside:
            inside.stat(DATABASE)
    except OSError:
        return
    raise UsageError(
        f"{shown(path) or 'the destination'} is a workspace that is pushed from here; "
        "what it has not sent yet could be lost: fetch into another folder and copy from there"
    )


def _refuse_store(folder: Folder, path: str, names: Collection[str]) -> None:
    """Raise UsageError when a folder is the data folder of a server, which alone may change it (spec F-10)."""
    try:
        is_store = DATABASE in names and all(stat.S_ISDIR(folder.stat(name).st_mode) for name in STORE_FOLDERS)
    except OSError:
        return
    if is_store:
        raise UsageError(
            f"{shown(path) or 'the destination'} is the data folder of a deltasync-server, which alone may change what "
            "is in it; fetch into another folder"
        )


def _place(path: str, entry: Entry, status: os.stat_result | None) -> Place:
    is_there = status is not None
    return Place(path, entry, is_there, status is not None and stat.S_ISDIR(status.st_mode))


def _below(folder: Folder, path: str) -> Iterator[str]:
    """Yield the path of everything below a folder; raises UsageError for a workspace."""
    names = folder.names()
    _refuse_store(folder, path, names)
    for name in names:
        at = joined(path, name)
        if name == RESERVED:
            refuse_workspace(folder, path)
        yield at
        if stat.S_ISDIR(folder.stat(name).st_mode):
            with folder.enter(name) as inside:
                yield from _below(inside, at)


def files_below(folder: Folder, path: str) -> Iterator[tuple[str, int]]:
    """Yield path and size of every file below a folder that can be looked at; links are not followed."""
    for name in sorted(folder.names()):
        try:
            status = folder.stat(name)
            if stat.S_ISREG(status.st_mode):
                yield joined(path, name), status.st_size
            elif stat.S_ISDIR(status.st_mode) and name != RESERVED:
                with folder.enter(name) as inside:
                    yield from files_below(inside, joined(path, name))
        except OSError:
            continue  # gone, or not ours to read: it is only a place where content might have been
