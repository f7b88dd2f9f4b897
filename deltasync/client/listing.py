"""What one folder holds right now, and a signature that is equal as long as nothing in it changed."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import msgspec

from deltasync.core.hashing import digest_of
from deltasync.core.manifest import MTIME_MAX, MTIME_MIN
from deltasync.disk import Folder

_encode = msgspec.msgpack.Encoder().encode
_FORMAT, _FOLDER = 0o170000, stat.S_IFDIR
_EXECUTE = stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH


class Seen(NamedTuple):
    """One entry that is no folder, as the file system showed it."""

    name: str
    inode: int
    mode: int
    size: int
    mtime_ns: int
    ctime_ns: int


@dataclass(frozen=True, slots=True)
class Listing:
    """The entries of a folder: plain tuples in the order of `Seen`, and the inode of each folder by its name."""

    files: list[tuple[str, int, int, int, int, int]]
    folders: dict[str, int]

    def signature(self, rules: bytes) -> bytes:
        """Return a digest of names and stats under given ignore rules; b'' where a name or number has no encoding."""
        try:
            return digest_of(_encode((rules, self.files, list(self.folders.items()))))
        except (UnicodeEncodeError, OverflowError):
            return b""


@dataclass(slots=True)
class Present:
    """Tells which paths a workspace has right now, whether or not they can be read; each folder is listed once."""

    root: Path
    _names: dict[str, frozenset[str] | None] = field(default_factory=dict)

    def has(self, path: str) -> bool:
        """Tell whether a path has an entry, by exactly this name; one that cannot be looked for has."""
        folder, _, name = path.rpartition("/")
        if folder not in self._names:
            self._names[folder] = self._listed(folder)
        names = self._names[folder]
        return names is None or name in names

    def _listed(self, folder: str) -> frozenset[str] | None:
        """Return the names in a folder, none where there is no such folder, or None where that cannot be told."""
        try:
            with Folder.open(self.root) as top, top.walk_to(folder) as here:
                return frozenset(here.names())
        except OSError as error:
            return frozenset() if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP) else None


def list_folder(descriptor: int, only: Collection[str] | None = None) -> Listing:
    """List an open folder with the stat of each entry, following nothing; only: these names, as far as they are there.

    What is looked up by name needs no leave to list the folder.
    """
    files: list[tuple[str, int, int, int, int, int]] = []
    folders: dict[str, int] = {}
    add = files.append
    if only is not None:
        for name in sorted(only):
            with contextlib.suppress(FileNotFoundError):
                status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    folders[name] = signed(status.st_ino)
                else:
                    times = status.st_mtime_ns, status.st_ctime_ns
                    add((name, status.st_ino, status.st_mode, status.st_size, *times))
        return Listing(files, folders)
    with os.scandir(descriptor) as entries:
        for entry in entries:
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue  # gone since it was listed
            mode = status.st_mode
            if mode & _FORMAT == _FOLDER:
                folders[entry.name] = signed(status.st_ino)
            else:
                add((entry.name, status.st_ino, mode, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    return Listing(files, folders)


def signed(inode: int) -> int:
    """Return an inode number as SQLite and arrays keep it: 64 bits with a sign."""
    return inode - (1 << 64) if inode >= 1 << 63 else inode


def clamped(nanoseconds: int) -> int:
    """Return a time as an entry can carry it; only dates beyond the year 2262 are cut."""
    return nanoseconds if MTIME_MIN <= nanoseconds <= MTIME_MAX else max(MTIME_MIN, min(nanoseconds, MTIME_MAX))


def is_executable(mode: int) -> bool:
    """Tell from a file's mode whether its entry is executable: any of the three bits counts (spec 0-tree)."""
    return bool(mode & _EXECUTE)
