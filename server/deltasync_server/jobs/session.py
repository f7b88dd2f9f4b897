"""Sessions: the folders that commands run in, made of blobs and removed whatever is in them (spec J-42, J-43)."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from deltasync.core.errors import NotFound
from deltasync.core.jobs import JOB_ID, Input, JobRequest
from deltasync.core.manifest import Entry, Kind
from deltasync.core.tree import entries_of
from deltasync.disk import Folder, Lock, copy_bytes, reflink, write_all
from deltasync_server.blobs import is_unchanged
from deltasync_server.config import StoreConfig
from deltasync_server.jobs import strays
from deltasync_server.jobs.account import Account
from deltasync_server.jobs.admission import filled
from deltasync_server.jobs.removal import GOING, left_over, remove_all
from deltasync_server.jobs.table import JobRow
from deltasync_server.offer import opened_blob
from deltasync_server.receive import Store
from deltasync_server.state import BlobRow, blob_rows, loader

INPUTS, OUTPUTS, WORK, TEMPORARY = "inputs", "outputs", "work", "tmp"
_MAKING = ".making-"
_NO_LINK = frozenset({errno.EMLINK, errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS})
_log = logging.getLogger(__name__)


@dataclass
class Session:
    """The folder of one job."""

    path: Path
    folder: Folder
    staged: dict[str, bytes] = field(default_factory=dict)
    """The digest of each in-place file, by its place."""
    linked: set[bytes] = field(default_factory=set)
    """The blobs that are in it as hard links."""
    staged_ns: int = 0
    """A time of its file system behind that of every input; 0 where it has none."""

    @property
    def work(self) -> Path:
        """Where the command runs."""
        return self.path / WORK


class Sessions:
    """The folder that sessions are made in."""

    def __init__(self, store: Store, account: Account | None) -> None:
        """Open the folder, or make it; raises AlreadyRunning while another server has it."""
        config = store.config
        self._store, self._account = store, account
        self.path = config.sessions.absolute()
        if not self.path.is_dir():
            self.path.mkdir(0o711 if account else 0o700, parents=True)
        elif config.sessions_dir is None:
            self.path.chmod(0o711 if account else 0o700)
        self.folder = Folder.open(self.path)
        self._lock = Lock(".lock", f"another server makes its sessions in {self.path}", at=self.folder.fd)
        self.links = self._probed(config)

    def _probed(self, config: StoreConfig) -> str:
        """Find out how a blob comes to a session (spec J-43)."""
        with self._store.cache.staging() as staging:
            name = f"{_MAKING}{secrets.token_hex(8)}"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            source = os.open("probe", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=staging.folder.fd)
            target = os.open(name, flags, 0o600, dir_fd=self.folder.fd)
            try:
                write_all(source, b"probe")
                if reflink(source, target):
                    return "reflink"
                if not (config.trust_jobs or self._account):
                    return "copy"
                os.unlink(name, dir_fd=self.folder.fd)
                os.link("probe", name, src_dir_fd=staging.folder.fd, dst_dir_fd=self.folder.fd)
                return "hardlink"
            except OSError as error:
                if error.errno not in _NO_LINK:
                    raise
                return "copy"
            finally:
                os.close(source)
                os.close(target)
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=self.folder.fd)

    def make(self, job: JobRow, go_on: Callable[[], None]) -> Session:
        """Make the session of a job, whole or not at all; raises NotFound where content is gone.

        go_on: called again and again; it raises to break off.
        """
        name = _MAKING + job.id
        remove_all(self.folder, name)
        os.mkdir(name, 0o700, dir_fd=self.folder.fd)
        try:
            with self.folder.enter(name) as making:
                session = Session(self.path / job.id, making)
                for each in (INPUTS, OUTPUTS, WORK):
                    os.mkdir(each, 0o700, dir_fd=making.fd)
                making.walk_to(f"{WORK}/{TEMPORARY}", create=True).close()
                maker = _Maker(self._store, self.links, session, go_on)
                maker.inputs(job)
                maker.rest(job.request)
                if self._account is not None:
                    _give(making, self._account)
                os.rename(name, job.id, src_dir_fd=self.folder.fd, dst_dir_fd=self.folder.fd)
        except BaseException:
            remove_all(self.folder, name)
            raise
        session.folder = self.folder.enter(job.id)
        if job.request.inputs or job.request.lists:
            session.staged_ns = strays.next_tick(session.folder)  # spec J-69
        return session

    def remove(self, job_id: str) -> bool:
        """Remove a session, whatever the command has made of it; False, and a line in the log, where that fails.

        What an earlier removal has left goes as well.
        """
        return not self._unremoved([job_id, *left_over(self.folder)])

    def _unremoved(self, names: Iterable[str]) -> list[str]:
        """Remove some entries; return those of them that could not be removed."""
        failed = []
        for name in names:
            try:
                remove_all(self.folder, name)
            except OSError as error:
                _log.warning("the session %s could not be removed: %s", name, error)
                failed.append(name)
        return failed

    @property
    def stuck(self) -> int:
        """How many could not be removed, and lie there under another name."""
        return len(left_over(self.folder))

    def names(self) -> set[str]:
        """Return the ids of the sessions that are there."""
        return {name for name in self.folder.names() if JOB_ID.fullmatch(name)}

    def sweep(self, kept: Collection[str]) -> None:
        """Remove every session that no job needs, and what was being made or removed."""
        self._unremoved(
            name
            for name in self.folder.names()
            if name.startswith((_MAKING, GOING)) or (JOB_ID.fullmatch(name) and name not in kept)
        )

    def free_bytes(self) -> int:
        """Return how much its disk has free."""
        return shutil.disk_usage(self.path).free

    def close(self) -> None:
        """Let the folder go."""
        self._lock.close()
        self.folder.close()


class _Maker:
    """Fills one session."""

    def __init__(self, store: Store, links: str, session: Session, go_on: Callable[[], None]) -> None:
        self._store, self._links, self._session, self._go_on = store, links, session, go_on

    def inputs(self, job: JobRow) -> None:
        """Bring every input to its place."""
        for one, (digest, is_folder) in zip(job.request.inputs, job.sources(), strict=True):
            above, _, name = one.place.rpartition("/")
            with self._session.folder.walk_to(_join(INPUTS, above), create=True) as folder:
                if is_folder:
                    os.mkdir(name, 0o755, dir_fd=folder.fd)
                    with folder.enter(name) as here:
                        self._folder(here, one, one.place, digest)
                else:
                    wanted = one.path.rpartition("/")[2]
                    entry = next(each for each in self._entries(digest) if each.name == wanted)
                    self._files(folder, one, above, [(name, entry)])

    def rest(self, request: JobRequest) -> None:
        """Write the lists with what their places are, and make the folders of outputs."""
        inputs, outputs = (os.fsencode(self._session.path / top) for top in (INPUTS, OUTPUTS))
        for each in request.lists:
            above, _, name = each.place.rpartition("/")
            with self._session.folder.walk_to(_join(INPUTS, above), create=True) as folder:
                descriptor = _created(folder, name, 0o644)
                try:
                    write_all(descriptor, b"".join(filled(line, inputs, outputs) for line in each.lines))
                finally:
                    os.close(descriptor)
        for one in request.outputs:
            above = one.place if one.is_folder else one.place.rpartition("/")[0]
            self._session.folder.walk_to(_join(OUTPUTS, above), create=True).close()

    def _entries(self, digest: bytes) -> list[Entry]:
        with self._store.state.read() as db:
            return entries_of(digest, loader(db))

    def _folder(self, folder: Folder, one: Input, place: str, digest: bytes) -> None:
        entries = self._entries(digest)
        for entry in entries:
            if entry.kind is Kind.SYMLINK:
                os.symlink(entry.target, entry.name, dir_fd=folder.fd)
        self._files(folder, one, place, [(each.name, each) for each in entries if each.kind is Kind.FILE])
        for entry in entries:
            if entry.kind is Kind.DIRECTORY:
                os.mkdir(entry.name, 0o755, dir_fd=folder.fd)
                with folder.enter(entry.name) as below:
                    self._folder(below, one, f"{place}/{entry.name}", entry.digest)

    def _files(self, folder: Folder, one: Input, above: str, files: Iterable[tuple[str, Entry]]) -> None:
        files = list(files)
        with self._store.state.read() as db:
            rows = blob_rows(db, {entry.digest for _, entry in files})
        for name, entry in files:
            self._go_on()
            place = _join(above, name)
            row = rows.get(entry.digest)
            if row is None:
                raise NotFound(f"the host has lost the content of the input {place}; push it again")
            if one.in_place or not self._link(folder, name, entry, row):
                self._copy(folder, name, entry, row, place)
            if one.in_place:
                self._session.staged[place] = entry.digest

    def _link(self, folder: Folder, name: str, entry: Entry, row: BlobRow) -> bool:
        """Make a hard link of a blob, where that may be and says the same as a copy."""
        mtime_ns = self._store.cache.attributes.mtime_of(entry.mtime_ns)
        if self._links != "hardlink" or (row.mtime_ns, row.executable) != (mtime_ns, entry.executable):
            return False
        try:
            with self._store.cache.home_of(entry.digest) as home:
                os.link(entry.digest.hex(), name, src_dir_fd=home.fd, dst_dir_fd=folder.fd, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _NO_LINK | {errno.ENOENT}:
                raise
            return False
        if not is_unchanged(row, folder.stat(name)):  # spec J-43: its bytes are read and compared first
            os.unlink(name, dir_fd=folder.fd)
            return False
        self._session.linked.add(entry.digest)
        return True

    def _copy(self, folder: Folder, name: str, entry: Entry, row: BlobRow, place: str) -> None:
        found = opened_blob(self._store.cache, self._store.trees, entry.digest, row)
        if found is None:
            raise NotFound(f"the host has lost the content of the input {place}; push it again")
        source = found[0]
        try:
            target = _created(folder, name, 0o755 if entry.executable else 0o644)
            try:
                if not (self._links == "reflink" and reflink(source, target)):
                    copy_bytes(source, target, self._go_on)
                os.utime(target, ns=(entry.mtime_ns, entry.mtime_ns))
            finally:
                os.close(target)
        except OSError as error:
            if error.errno == errno.EIO:
                self._store.doubt(entry.digest)
            raise
        finally:
            os.close(source)


def _created(folder: Folder, name: str, mode: int) -> int:
    return os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode, dir_fd=folder.fd)


def _join(above: str, name: str) -> str:
    return f"{above}/{name}" if above and name else above or name


def _give(session: Folder, account: Account) -> None:
    """Let the user who runs the command have the session; blobs stay the server's."""
    for _, folders, files, descriptor in os.fwalk(".", dir_fd=session.fd):
        for name in (*folders, *files):
            status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
            if not (stat.S_ISREG(status.st_mode) and status.st_nlink > 1):
                os.chown(name, account.uid, account.gid, dir_fd=descriptor, follow_symlinks=False)
    os.fchown(session.fd, account.uid, account.gid)
