"""Comparing a tree on disk with a root, entry by entry, and replacing what differs."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping

from deltasync.core.manifest import EMPTY_ROOT, Entry, Kind
from deltasync.core.tree import Loader, entries_of
from deltasync.disk import Folder, open_regular
from deltasync_server.blobs import Cache, hash_of, is_executable, is_unchanged
from deltasync_server.change import ShouldStop, Stopped
from deltasync_server.place import Placer
from deltasync_server.state import BlobRow, State, blob_rows


class Comparison:
    """Says which files of a folder are what their entries say."""

    def __init__(self, cache: Cache, state: State, *, may_link: bool) -> None:
        self._cache = cache
        self._state = state
        self._may_link = may_link

    def wrong_files(self, folder: Folder, entries: Iterable[Entry], durable: Mapping[str, Entry]) -> list[Entry]:
        """Return the files that are absent or differ. durable: files that are believed by size, time and mode."""
        files = [entry for entry in entries if entry.kind is Kind.FILE]
        with self._state.read() as db:
            rows = blob_rows(db, {entry.digest for entry in files})
        return [
            entry
            for entry in files
            if not self._is_right(folder, entry, rows.get(entry.digest), is_durable=durable.get(entry.name) == entry)
        ]

    def _is_right(self, folder: Folder, entry: Entry, row: BlobRow | None, *, is_durable: bool) -> bool:
        try:
            status = folder.stat(entry.name)
        except FileNotFoundError:
            return False
        if not _looks_like(status, entry, self._cache.attributes.mtime_of(entry.mtime_ns)):
            return False
        blob = self._cache.status(entry.digest)
        if row is not None and blob is not None and os.path.samestat(status, blob):
            return self._may_link and is_unchanged(row, blob)
        return is_durable or _has_content(folder, entry)

    def differences(self, folder: Folder, path: str, digest: bytes, load: Loader) -> Iterator[str]:
        """Yield every path below a folder that is not what a directory object says; every copy is hashed."""
        prefix = f"{path}/" if path else ""
        entries = entries_of(digest, load)
        wrong = {entry.name for entry in self.wrong_files(folder, entries, {})}
        wrong |= {entry.name for entry in entries if entry.kind is Kind.SYMLINK and not _is_link_to(folder, entry)}
        wrong |= set(folder.names()) - {entry.name for entry in entries}
        for entry in entries:
            if entry.kind is Kind.DIRECTORY:
                try:
                    entered = folder.enter(entry.name)
                except OSError:
                    wrong.add(entry.name)
                    continue
                with entered:
                    yield from self.differences(entered, prefix + entry.name, entry.digest, load)
        yield from (prefix + name for name in sorted(wrong))


class Repair:
    """Compares a tree on disk with a root, entry by entry, and replaces what differs (spec ST-44)."""

    def __init__(
        self,
        placer: Placer,
        comparison: Comparison,
        load: Loader,
        should_stop: ShouldStop,
        forget_durable: Callable[[], None],
    ) -> None:
        """Compare nothing yet. forget_durable: called before the first file is replaced that counts as durable."""
        self._placer = placer
        self._comparison = comparison
        self._load = load
        self._should_stop = should_stop
        self._forget_durable = forget_durable
        self._has_forgotten = False

    def run(self, root: bytes, durable_root: bytes) -> None:
        """Repair the whole tree. durable_root: where it agrees, copies are believed by size, time and mode."""
        self._folder(self._placer.tree, "", root, durable_root)

    def _folder(self, folder: Folder, path: str, digest: bytes, durable: bytes) -> None:
        if self._should_stop():
            raise Stopped
        entries = entries_of(digest, self._load)
        before = {entry.name: entry for entry in entries_of(durable, self._load)}
        for name in set(folder.names()) - {entry.name for entry in entries}:
            self._placer.displace(folder, name)
        wrong = self._comparison.wrong_files(folder, entries, before)
        if not self._has_forgotten and any(before.get(entry.name) == entry for entry in wrong):
            self._forget_durable()
            self._has_forgotten = True
        self._placer.place(folder, path, [(entry, None) for entry in wrong])
        for entry in entries:
            if entry.kind is Kind.SYMLINK and not _is_link_to(folder, entry):
                self._placer.make_symlink(folder, entry)
            elif entry.kind is Kind.DIRECTORY:
                was = before.get(entry.name)
                self._subfolder(folder, path, entry, was.digest if was and was.kind is Kind.DIRECTORY else EMPTY_ROOT)

    def _subfolder(self, folder: Folder, path: str, entry: Entry, durable: bytes) -> None:
        try:
            entered = folder.enter(entry.name)
        except OSError:
            self._placer.make_folder(folder, entry.name)
            entered = folder.enter(entry.name)
        with entered:
            self._folder(entered, f"{path}/{entry.name}" if path else entry.name, entry.digest, durable)


def _looks_like(status: os.stat_result, entry: Entry, mtime_ns: int) -> bool:
    return (
        stat.S_ISREG(status.st_mode)
        and (status.st_size, status.st_mtime_ns) == (entry.size, mtime_ns)
        and is_executable(status) == entry.executable
        and not status.st_mode & 0o222
    )


def _has_content(folder: Folder, entry: Entry) -> bool:
    try:
        descriptor = open_regular(entry.name, at=folder.fd)
    except OSError:
        return False
    try:
        return hash_of(descriptor) == entry.digest
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _is_link_to(folder: Folder, entry: Entry) -> bool:
    try:
        return os.readlink(entry.name, dir_fd=folder.fd) == entry.target
    except OSError:
        return False
