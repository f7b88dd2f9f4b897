"""How one file, link or folder comes to its place in a plain tree: by hard link, reflink or copy, never half-way."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from deltasync.core.manifest import Entry
from deltasync.disk import Folder, copy_bytes, open_regular, reflink
from deltasync_server.blobs import Cache, is_executable
from deltasync_server.config import LinkMode
from deltasync_server.state import BlobRow, State, blob_rows, settle_stamps

SoundRows = Callable[[Collection[bytes]], Mapping[bytes, BlobRow]]
"""Looks at blobs again that lost their fingerprint; returns the rows of those whose bytes are right."""

_NO_LINK = frozenset({errno.EMLINK, errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS})
_IN_THE_WAY = frozenset({errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY})
_STAMPS_AT_ONCE = 5_000


@dataclass(frozen=True, slots=True)
class _Restamp:
    """A blob whose inode is to get a tree file's time and executable bit."""

    folder: str
    entry: Entry
    is_linked: bool
    """The tree file is a link of the blob already; otherwise it becomes one afterwards."""

    @property
    def links(self) -> int:
        return 2 if self.is_linked else 1


class Placer:
    """Places entries in the folders of one tree; new content is made in `aside` and renamed into the tree."""

    def __init__(
        self,
        tree: Folder,
        aside: Folder,
        state: State,
        cache: Cache,
        mode: LinkMode,
        sound: SoundRows,
        prove: Callable[[Collection[bytes]], object],
        note_copy: Callable[[int], None],
    ) -> None:
        self.tree = tree
        self._aside = aside
        self._state = state
        self._cache = cache
        self._sound = sound
        self._prove = prove
        self._note_copy = note_copy
        self.may_link = mode in (LinkMode.AUTO, LinkMode.HARDLINK)
        self._may_reflink = mode is not LinkMode.COPY
        self._restamps: dict[bytes, _Restamp] = {}
        self._token = secrets.token_hex(4)
        self._made = 0
        self.lost: set[bytes] = set()
        """Digests of files that were left out, because no sound blob holds their content."""

    def place(self, folder: Folder, path: str, files: Sequence[tuple[Entry, Entry | None]]) -> None:
        """Bring files into a folder of the tree.

        path: of the folder, '' for the tree itself. files: each with the entry that the tree has in its place, or
        None; what is in its place all the same is replaced.
        """
        rows = self._rows(files)
        mtime_of = self._cache.attributes.mtime_of
        for entry, before in files:
            row = rows.get(entry.digest)
            if row is None:
                self.lost.add(entry.digest)
                self.remove(folder, entry.name)  # spec ST-26: no content rather than a wrong one
            elif not self.may_link:
                self._copy_unless_touched(folder, entry, before)
            elif row.mtime_ns == mtime_of(entry.mtime_ns) and row.executable == entry.executable:
                self._link(folder, entry, is_fresh=before is None)
            else:
                self._disagree(folder, path, entry, before)

    def _rows(self, files: Iterable[tuple[Entry, Entry | None]]) -> dict[bytes, BlobRow]:
        """Return the rows of those blobs whose fingerprint, or else whose bytes, are right (spec ST-24)."""
        with self._state.read() as db:
            rows = blob_rows(db, {entry.digest for entry, _ in files})
        changed = [digest for digest, row in rows.items() if not self._cache.has_unchanged(row)]
        if changed:
            for digest in changed:
                del rows[digest]
            rows.update(self._sound(changed))
        return rows

    def _disagree(self, folder: Folder, path: str, entry: Entry, before: Entry | None) -> None:
        """Place a file whose time or executable bit is not that of the blob's inode (spec ST-33)."""
        blob = self._cache.status(entry.digest)
        if blob is not None and entry.digest not in self._restamps:
            is_linked = blob.st_nlink == 2 and before is not None and self._is_link_of(folder, entry.name, blob)
            if is_linked or blob.st_nlink == 1:
                self._restamps[entry.digest] = _Restamp(path, entry, is_linked)
                return
        self._copy_unless_touched(folder, entry, before)

    def _is_link_of(self, folder: Folder, name: str, blob: os.stat_result) -> bool:
        try:
            return os.path.samestat(folder.stat(name), blob)
        except FileNotFoundError:
            return False

    def _link(self, folder: Folder, entry: Entry, *, is_fresh: bool) -> None:
        try:
            with self._cache.home_of(entry.digest) as home:
                if is_fresh:
                    try:
                        _link_in(home, entry.digest, folder, entry.name)
                        return
                    except FileExistsError:
                        pass  # something stands there all the same: it is replaced below
                temporary = self._temporary()
                _link_in(home, entry.digest, self._aside, temporary)
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
            self._copy(folder, entry)  # spec ST-34: ext4 takes 65,000 links of one inode
            return
        self._rename_in(temporary, folder, entry.name)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=self._aside.fd)  # rename does nothing when both are links of one inode

    def _copy_unless_touched(self, folder: Folder, entry: Entry, before: Entry | None) -> None:
        """Give a copy that already has the content its new time and mode; else make a copy."""
        if before is None or before.digest != entry.digest or not self._touch(folder, entry, before):
            self._copy(folder, entry)

    def _touch(self, folder: Folder, entry: Entry, before: Entry) -> bool:
        attributes = self._cache.attributes
        try:
            descriptor = open_regular(entry.name, at=folder.fd)
        except OSError:
            return False
        try:
            status = os.fstat(descriptor)
            is_as_left = (status.st_size, status.st_mtime_ns) == (before.size, attributes.mtime_of(before.mtime_ns))
            if status.st_nlink != 1 or not is_as_left:  # with another link it is a blob, or the operator's business
                return False
            if is_executable(status) != entry.executable:
                os.fchmod(descriptor, attributes.mode_of(executable=entry.executable))
            os.utime(descriptor, ns=(entry.mtime_ns, entry.mtime_ns))
        finally:
            os.close(descriptor)
        return True

    def _copy(self, folder: Folder, entry: Entry) -> None:
        temporary = self._temporary()
        mode = self._cache.attributes.mode_of(executable=entry.executable)
        source = self._cache.open(entry.digest)
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            target = os.open(temporary, flags, mode, dir_fd=self._aside.fd)
            try:
                self._may_reflink = self._may_reflink and reflink(source, target)
                if not self._may_reflink:  # a file system that cannot once is not asked again in this run
                    copy_bytes(source, target)
                os.utime(target, ns=(entry.mtime_ns, entry.mtime_ns))
            finally:
                os.close(target)
        except OSError as error:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=self._aside.fd)  # a full disk wants its space back
            if error.errno == errno.EIO:
                self._prove([entry.digest])  # spec ST-28: where the blob is to blame the next attempt does without it
            raise
        finally:
            os.close(source)
        self._note_copy(entry.size)
        self._rename_in(temporary, folder, entry.name)

    def forget(self) -> None:
        """Drop what was put off: the tree is compared from its root instead."""
        self._restamps = {}
        self.lost.clear()

    def finish(self) -> None:
        """Restamp the inodes that were put off until every link of this run was made."""
        restamps = list(self._restamps.items())
        self._restamps = {}
        for start in range(0, len(restamps), _STAMPS_AT_ONCE):
            self._restamp(restamps[start : start + _STAMPS_AT_ONCE])

    def _restamp(self, restamps: Sequence[tuple[bytes, _Restamp]]) -> None:
        by_folder: dict[str, list[tuple[Entry, bool]]] = {}
        rows: list[BlobRow] = []
        mtime_of = self._cache.attributes.mtime_of
        with self._state.hold():
            with self._state.write() as db:  # spec ST-35: the intent is durable before an inode changes
                intents = [(digest, mtime_of(each.entry.mtime_ns), each.entry.executable) for digest, each in restamps]
                db.executemany("INSERT OR REPLACE INTO stamps VALUES (?, ?, ?)", intents)
            for digest, each in restamps:
                entry, status = each.entry, self._cache.status(digest)
                is_only_link = status is not None and status.st_nlink == each.links
                if is_only_link:
                    self._cache.restamp(digest, entry.mtime_ns, executable=entry.executable)
                    rows.append(BlobRow(digest, entry.size, mtime_of(entry.mtime_ns), entry.executable))
                if not (is_only_link and each.is_linked):
                    by_folder.setdefault(each.folder, []).append((entry, is_only_link))
            with self._state.write() as db:
                settle_stamps(db, rows)
        for path, entries in by_folder.items():
            with self.tree.walk_to(path) as folder:
                for entry, may_link in entries:
                    if may_link:
                        self._link(folder, entry, is_fresh=False)
                    else:
                        self._copy(folder, entry)

    def make_symlink(self, folder: Folder, entry: Entry) -> None:
        """Bring a symbolic link to its place."""
        try:
            os.symlink(entry.target, entry.name, dir_fd=folder.fd)
        except FileExistsError:
            temporary = self._temporary()
            os.symlink(entry.target, temporary, dir_fd=self._aside.fd)
            self._rename_in(temporary, folder, entry.name)

    def make_folder(self, folder: Folder, name: str) -> None:
        """Bring an empty folder to its place."""
        try:
            os.mkdir(name, 0o755, dir_fd=folder.fd)
        except FileExistsError:
            self.displace(folder, name)
            os.mkdir(name, 0o755, dir_fd=folder.fd)

    def take(self, path: str) -> str:
        """Move a folder of the tree aside, to be brought to another place; returns its name there."""
        above, _, name = path.rpartition("/")
        with self.tree.walk_to(above) as folder:
            if not stat.S_ISDIR(folder.stat(name).st_mode):
                raise NotADirectoryError(errno.ENOTDIR, "not a folder", path)
            taken = self._temporary()
            os.rename(name, taken, src_dir_fd=folder.fd, dst_dir_fd=self._aside.fd)
        return taken

    def bring(self, taken: str, folder: Folder, name: str) -> None:
        """Bring a folder that was taken to its place."""
        self._rename_in(taken, folder, name)

    def displace(self, folder: Folder, name: str) -> None:
        """Move something out of the tree; it is removed when the store is idle (spec ST-36)."""
        with contextlib.suppress(FileNotFoundError):
            os.rename(name, self._temporary(), src_dir_fd=folder.fd, dst_dir_fd=self._aside.fd)

    def remove(self, folder: Folder, name: str) -> None:
        """Remove a file or link, or displace a folder; nothing there is fine."""
        try:
            os.unlink(name, dir_fd=folder.fd)
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno not in (errno.EISDIR, errno.EPERM):
                raise
            self.displace(folder, name)

    def _rename_in(self, temporary: str, folder: Folder, name: str) -> None:
        try:
            os.rename(temporary, name, src_dir_fd=self._aside.fd, dst_dir_fd=folder.fd)
        except OSError as error:
            if error.errno not in _IN_THE_WAY:
                raise
            self.displace(folder, name)
            os.rename(temporary, name, src_dir_fd=self._aside.fd, dst_dir_fd=folder.fd)

    def _temporary(self) -> str:
        self._made += 1
        return f"{self._token}-{self._made}"


def _link_in(home: Folder, digest: bytes, folder: Folder, name: str) -> None:
    os.link(digest.hex(), name, src_dir_fd=home.fd, dst_dir_fd=folder.fd, follow_symlinks=False)
