"""The plain trees: each brought from the root it holds to its workspace's head, and compared with it after a crash."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

from deltasync.core.errors import NoSpace
from deltasync.core.manifest import EMPTY_ROOT, Entry, Kind
from deltasync.core.tree import Loader, Tree, walk
from deltasync.disk import FULL, Folder, fsync_folder, remove_tree, space_guard, start_writeback
from deltasync_server.blobs import Cache, is_unchanged, says_nothing
from deltasync_server.change import Change, ShouldStop, Stopped
from deltasync_server.config import LinkMode
from deltasync_server.durable import changed_folders, is_done, shared, stage_again, with_file
from deltasync_server.place import Placer
from deltasync_server.repair import Comparison, Repair
from deltasync_server.state import (
    BlobRow,
    State,
    WorkspaceRow,
    blob_row,
    blob_rows,
    loader,
    workspace_row,
    workspace_rows,
    write_blobs,
)
from deltasync_server.tenants import folder_of

RETRY_SECONDS = 5.0
_log = logging.getLogger(__name__)

_Inode = tuple[int, int]
"""A file by its device and number."""


class Trees:
    """Every plain folder of the store; one thread brings them forward, as soon as a head has moved."""

    def __init__(
        self, data: Path, state: State, cache: Cache, link: LinkMode, note_copy: Callable[[int], None]
    ) -> None:
        """note_copy: told the bytes of every file that a tree gets which is no link of a blob."""
        (data / "workspaces").mkdir(0o755, exist_ok=True)
        self._data = data
        self._state = state
        self._cache = cache
        self._link = link
        self._note_copy = note_copy
        self._lock = threading.RLock()
        """Held while a tree changes, and while a damaged blob is taken out of the trees."""
        self._suspect: set[str] = set()
        """Trees that may not hold what their row says: compared entry by entry before they move on."""
        self._moves: Counter[str] = Counter()
        """How often each tree has begun to move: one that has come back to its root meanwhile has other files."""
        self._changed = threading.Condition()
        self._due: dict[str, float] = {}
        self._doubted: set[bytes] = set()
        """Blobs that lost their fingerprint, as somebody noticed who had no time to read them."""
        self._is_stopping = False
        self._thread: threading.Thread | None = None

    def path(self, name: str) -> Path:
        """Return where a workspace's plain folder is."""
        return self._data / folder_of(name) / "tree"

    # --- the thread ---

    def start(self) -> None:
        """Bring trees forward in the background from now on."""
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="deltasync-trees", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop after the folder at hand."""
        self._is_stopping = True
        with self._changed:
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wake(self, name: str) -> None:
        """Say that a workspace's head has moved."""
        with self._changed:
            self._due[name] = 0.0
            self._changed.notify_all()

    def wake_healed(self) -> None:
        """Say that content may have come back which some trees lack."""
        with self._state.read() as db:
            names = [name for (name,) in db.execute("SELECT DISTINCT workspace FROM wanted WHERE healed")]
        for name in names:
            self.wake(name)

    def wait_for(self, is_reached: Callable[[], bool], seconds: float) -> None:
        """Wait until something holds of the rows, looked at again after each move of a tree."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_stopping or is_reached(), timeout=seconds)

    def _run(self) -> None:
        while (name := self._next()) is not None:
            try:
                self.bring_forward(name)
            except Stopped:
                return
            except Exception:  # noqa: BLE001  a worker loop reports it and goes on
                _log.exception("the tree of %s could not be brought forward; trying again", name)
                with self._changed:
                    self._due.setdefault(name, time.monotonic() + RETRY_SECONDS)

    def _next(self) -> str | None:
        with self._changed:
            while not self._is_stopping:
                now = time.monotonic()
                name = min(self._due, key=self._due.__getitem__, default=None)
                if name is not None and self._due[name] <= now:
                    del self._due[name]
                    return name
                self._changed.wait(None if name is None else self._due[name] - now)
        return None

    # --- bringing a tree forward ---

    def distrust(self, names: Iterable[str]) -> None:
        """Compare these trees with the rows before they are used again (spec ST-44)."""
        for name in names:
            with self._lock, self._state.write() as db:
                self._suspect.add(name)
                db.execute("UPDATE workspaces SET moving_to = sequence WHERE name = ?", (name,))
            self.wake(name)

    def bring_forward(self, name: str) -> None:
        """Make a plain tree hold its workspace's head; the rows say "moving" before and the sequence after."""
        self._read_doubted()
        with self._lock:
            is_suspect = name in self._suspect
            with self._state.write() as db:
                row, healed = workspace_row(db, name), _healed(db, name)
                if row is None or not (is_suspect or healed or row.tree_sequence != row.sequence):
                    return
                # A move that was cut short may have put anything in the place of anything.
                was_cut = row.moving_to is not None or not row.has_tree
                durable, objects = shared(EMPTY_ROOT if was_cut else row.durable_root, row.tree_root, loader(db))
                row = row._replace(durable_root=durable)
                db.executemany("INSERT OR IGNORE INTO objects VALUES (?, ?)", objects.items())
                # In the transaction that reads the root: a collection keeps the root that a tree moves to.
                update = "UPDATE workspaces SET moving_to = ?, durable_root = ? WHERE name = ?"
                db.execute(update, (row.sequence, durable, name))
            # After the commit: who has read this number reads a row that says "moving", or one from after the move.
            self._moves[name] += 1
            self._suspect.add(name)  # until this has succeeded
            if row.has_tree:
                with space_guard(self._data), self._placer(name) as placer:
                    self._move(placer, row, healed, is_suspect=is_suspect)
                    self._settle(row, healed, placer.lost)
            else:
                self._drop(name)  # it may have had one before
                self._settle(row, healed, ())  # spec J-22, J-61: nobody waits for it
            self._suspect.discard(name)
        with self._changed:
            self._changed.notify_all()

    def _move(self, placer: Placer, row: WorkspaceRow, healed: Collection[bytes], *, is_suspect: bool) -> None:
        """Bring a tree from its root to the head."""
        with self._state.read() as db:
            load = loader(db)
            change = Change(
                placer, load, lambda: self._is_stopping, lambda paths: self._forget_durable_below(row.name, paths)
            )
            if not is_suspect:
                try:
                    change.move(row.tree_root, row.root)
                    change.restore(row.root, healed)
                    placer.finish()
                    return
                except OSError as error:
                    if error.errno in FULL:
                        raise
                    _log.warning("the tree of %s is not as it was left (%s); comparing it", row.name, error)
                    placer.forget()
            comparison = Comparison(self._cache, self._state, may_link=placer.may_link)
            repair = Repair(placer, comparison, load, lambda: self._is_stopping, lambda: self._forget_durable(row.name))
            repair.run(row.root, row.durable_root)
            placer.finish()

    def _forget_durable(self, name: str) -> None:
        """Count nothing of a tree as durable: what is replaced comes to places that do, and all is made so again."""
        with self._state.write() as db:
            db.execute("UPDATE workspaces SET durable_root = ? WHERE name = ?", (EMPTY_ROOT, name))

    def _forget_durable_below(self, name: str, paths: Collection[str]) -> None:
        """Count nothing below these folders as durable: they go elsewhere whole, and others come in their places."""
        objects: dict[bytes, bytes] = {}
        with self._state.write() as db:
            row = workspace_row(db, name)
            durable = Tree(row.durable_root if row else EMPTY_ROOT, loader(db))
            detached = [durable.detach(path) for path in paths]
            if any(detached):
                root = durable.freeze(objects.__setitem__)
                db.executemany("INSERT OR IGNORE INTO objects VALUES (?, ?)", objects.items())
                db.execute("UPDATE workspaces SET durable_root = ? WHERE name = ?", (root, name))

    def _drop(self, name: str) -> None:
        """Remove a tree that is not to be."""
        home = self._data / folder_of(name)
        if home.is_dir():
            with Folder.open(home.parent) as above:
                remove_tree(above, home.name)

    def _settle(self, row: WorkspaceRow, healed: Mapping[bytes, int], lost: Collection[bytes]) -> None:
        with self._state.write() as db:
            db.execute(
                "UPDATE workspaces SET tree_sequence = ?, tree_root = ?, moving_to = NULL WHERE name = ?",
                (row.sequence, row.root if row.has_tree else EMPTY_ROOT, row.name),
            )
            if healed:  # the files came to places that count as durable
                db.execute("UPDATE workspaces SET durable_root = ? WHERE name = ?", (EMPTY_ROOT, row.name))
            # Only the marks that were read: one that came since is of a file that may have been placed before it.
            delete = "DELETE FROM wanted WHERE workspace = ? AND digest = ? AND healed = ?"
            db.executemany(delete, [(row.name, digest, mark) for digest, mark in healed.items()])
            db.executemany(
                "INSERT OR REPLACE INTO wanted SELECT ?1, ?2, EXISTS (SELECT 1 FROM blobs WHERE digest = ?2)",
                [(row.name, digest) for digest in lost],
            )
            self._forget_unnamed(db, row)

    def _forget_unnamed(self, db: sqlite3.Connection, row: WorkspaceRow) -> None:
        """Stop asking for content that the head no longer names."""
        wanted = {digest for (digest,) in db.execute("SELECT digest FROM wanted WHERE workspace = ?", (row.name,))}
        if wanted:
            unnamed = wanted - {entry.digest for _, entry in walk(row.root, loader(db)) if entry.kind is Kind.FILE}
            delete = "DELETE FROM wanted WHERE workspace = ? AND digest = ?"
            db.executemany(delete, [(row.name, digest) for digest in unnamed])

    @contextmanager
    def _placer(self, name: str) -> Iterator[Placer]:
        with self._opened(name) as (tree, aside):
            looks = self.sound_rows, self.prove
            yield Placer(tree, aside, self._state, self._cache, self._link, *looks, self._note_copy)

    @contextmanager
    def _opened(self, name: str) -> Iterator[tuple[Folder, Folder]]:
        home = self._data / folder_of(name)
        if not (home / "aside").is_dir() or not (home / "tree").is_dir():
            for folder in (home / "tree", home / "aside"):
                folder.mkdir(0o755, parents=True, exist_ok=True)
            try:
                for folder in takewhile(lambda each: each != self._data.parent, (home, *home.parents)):
                    fsync_folder(folder)
            except OSError:
                for folder in (home / "tree", home / "aside", home):
                    with contextlib.suppress(OSError):
                        folder.rmdir()  # made again by the next attempt: what failed is not asked again
                raise
        with Folder.open(home / "tree") as tree, Folder.open(home / "aside") as aside:
            yield tree, aside

    def differences(self, name: str) -> list[str]:
        """Return the paths at which a plain tree is not what its row says; every copy is hashed."""
        with self._lock, self._state.read() as db, self._placer(name) as placer:
            row = workspace_row(db, name)
            comparison = Comparison(self._cache, self._state, may_link=placer.may_link)
            return list(comparison.differences(placer.tree, "", row.tree_root, loader(db))) if row else []

    def rebuild(self, name: str) -> None:
        """Compare a tree with its head and replace what differs; every copy is hashed."""
        self._forget_durable(name)
        self.distrust([name])
        self.bring_forward(name)

    # --- damaged blobs ---

    def sound_rows(self, digests: Collection[bytes]) -> dict[bytes, BlobRow]:
        """Hash blobs that lost their fingerprint: the right ones get it back, the wrong ones are quarantined."""
        with self._lock:
            read = {digest: self._inode(digest) for digest in digests}
            sound = {digest: row for digest in digests if (row := self._rehashed(digest)) is not None}
            wrong = {digest: inode for digest, inode in read.items() if digest not in sound}
            if wrong:
                self.quarantine(wrong, read=wrong)
        return sound

    def _rehashed(self, digest: bytes) -> BlobRow | None:
        """Return a blob's row when its bytes are right; its inode has the row's time and mode again (spec ST-25)."""
        while True:
            with self._state.read() as db:
                row = blob_row(db, digest)
            before = self._cache.status(digest)
            if row is None or before is None:
                return None
            if is_unchanged(row, before):
                return row
            is_right = self._cache.holds_right_bytes(digest)
            with self._state.hold():
                after = self._cache.status(digest)
                if after is None or not os.path.samestat(before, after):
                    continue  # another receipt has just published it again
                if is_right:
                    self._cache.restamp(digest, row.mtime_ns, executable=row.executable)
                return row if is_right else None

    def changed(self, rows: Mapping[bytes, BlobRow]) -> set[bytes]:
        """Return those of these blobs whose file is gone or lost its fingerprint; nothing is read (spec ST-24)."""
        changed = [digest for digest, row in rows.items() if not self._cache.has_unchanged(row)]
        if not changed:
            return set()
        # Again while nobody restamps: an inode gets its new time before its row does (spec ST-35).
        with self._state.hold(), self._state.read() as db:
            rows = blob_rows(db, changed)
            return {digest for digest in changed if digest not in rows or not self._cache.has_unchanged(rows[digest])}

    def doubt(self, name: str, digests: Collection[bytes]) -> None:
        """Have blobs that lost their fingerprint looked at soon, before the tree of a workspace comes forward."""
        with self._changed:
            self._doubted.update(digests)
        self.wake(name)

    def _read_doubted(self) -> None:
        """Do with doubted blobs what `sound_rows` does, but let others work while they are read."""
        with self._changed:
            doubted, self._doubted = self._doubted, set()
        wrong: list[bytes] = []
        for digest in doubted:
            with self._lock:
                if self._rehashed(digest) is None:
                    wrong.append(digest)
        if wrong:
            with self._lock:
                with self._state.read() as db:
                    rows = blob_rows(db, wrong)
                if still := self.changed(rows) & rows.keys():  # the others came again while this read on
                    self.quarantine(still)

    def prove(self, digests: Collection[bytes]) -> None:
        """Read blobs whose fingerprint is right and quarantine those whose bytes are not (spec ST-26)."""
        read = {digest: self._inode(digest) for digest in digests}
        wrong = {digest: inode for digest, inode in read.items() if not self._cache.holds_right_bytes(digest)}
        if wrong:
            self.quarantine(wrong, read=wrong)

    def quarantine(self, wrong: Collection[bytes], *, read: Mapping[bytes, _Inode | None] | None = None) -> None:
        """Take damaged blobs out of the cache and out of every tree, and ask for their content (spec ST-26).

        read: the files that were found wrong; one that was published since then is another.
        """
        _log.error("quarantining %d damaged blob(s), the first is %s", len(wrong), next(iter(wrong)).hex())
        with self._lock:
            self._take_out(wrong, read or {digest: self._inode(digest) for digest in wrong})

    def _take_out(self, wrong: Collection[bytes], inodes: Mapping[bytes, _Inode | None]) -> None:
        with self._state.read() as db:
            rows, load = workspace_rows(db), loader(db)
            clients = [row for row in rows if not row.is_of_returns]  # what was returned nobody brings again
            named = {row.name: _paths_of(wrong, {row.root, row.tree_root}, load) for row in clients}
        for row in clients:
            if row.has_tree:
                self._unlink_inodes(row.name, {path for path, _ in named[row.name]}, set(inodes.values()))
        with self._state.hold():
            # A receipt may have published one of them again by now: that file is right.
            gone = {digest for digest in wrong if self._inode(digest) == inodes[digest]}
            asked = {(name, digest) for name, found in named.items() for _, digest in found if digest in gone}
            for digest in gone:
                self._cache.quarantine(digest)
            with self._state.write() as db:
                # Whose they are stays: who brings one again heals it for all (spec ST-104).
                db.executemany("DELETE FROM blobs WHERE digest = ?", [(digest,) for digest in gone])
                db.executemany("INSERT OR REPLACE INTO wanted VALUES (?, ?, 0)", asked)

    def _inode(self, digest: bytes) -> _Inode | None:
        status = self._cache.status(digest)
        return (status.st_dev, status.st_ino) if status else None

    def _unlink_inodes(self, name: str, paths: Iterable[str], inodes: Collection[tuple[int, int] | None]) -> None:
        with self._opened(name) as (tree, _):
            for path in paths:
                above, _, leaf = path.rpartition("/")
                with contextlib.suppress(OSError), tree.walk_to(above) as folder:
                    status = folder.stat(leaf)
                    if (status.st_dev, status.st_ino) in inodes:
                        os.unlink(leaf, dir_fd=folder.fd)

    # --- when idle ---

    def make_durable(self, should_stop: ShouldStop) -> None:
        """Fsync folders and files that changed since this was last done, of every tree at rest (spec ST-50)."""
        moves = self._moves.copy()
        with self._state.read() as db:
            rows = workspace_rows(db)
        for row in rows:
            is_at_rest = row.moving_to is None and row.name not in self._suspect
            if should_stop() or not is_at_rest or row.durable_root == row.tree_root:
                continue
            try:
                with self._state.read() as db:
                    is_durable = self._make_tree_durable(row, loader(db), _awaited(db, row.name), should_stop)
            except OSError as error:
                if error.errno in FULL or error.errno == errno.EIO:
                    raise
                _log.warning("the tree of %s is not as it was left (%s); comparing it", row.name, error)
                self.distrust([row.name])
            else:
                if is_durable:
                    self._note_durable(row, moves[row.name])

    def _make_tree_durable(
        self, row: WorkspaceRow, load: Loader, awaited: Collection[bytes], should_stop: ShouldStop
    ) -> bool:
        with self._opened(row.name) as (tree, _):
            for path, changed in changed_folders(row.durable_root, row.tree_root, "", load):
                if should_stop():
                    return False
                with tree.walk_to(path) as folder:
                    files = [entry for entry in changed if entry.kind is Kind.FILE and entry.digest not in awaited]
                    for entry in files:
                        with_file(folder, entry.name, start_writeback)
                    # Copies are in no journal, nor are restamped inodes.
                    failed = [each for each in files if self._is_doubtful(folder, each)]
                    failed = failed or [each for each in files if not with_file(folder, each.name, os.fsync)]
                    if failed or not is_done(folder.fsync):
                        self._make_anew(row.name, folder, failed or changed, is_folder=not failed)
                        raise OSError(errno.EIO, "not made durable", f"{row.name}/{path}")
        return True

    def _make_anew(self, name: str, folder: Folder, failed: Collection[Entry], *, is_folder: bool) -> None:
        """Take out of a tree what the disk failed: it is placed anew, and never asked again (spec ST-51)."""
        _log.error("the disk failed %d name(s) in the tree of %s; making them anew", len(failed), name)
        with self._lock:
            self._suspect.add(name)
            for entry in () if is_folder else failed:
                self._renew_if_linked(folder, entry)
            with self._placer(name) as placer:
                for entry in failed:
                    placer.displace(folder, entry.name)
            with self._state.write() as db:
                db.execute("UPDATE workspaces SET durable_root = ? WHERE name = ?", (EMPTY_ROOT, name))
            self.distrust([name])

    def _renew_if_linked(self, folder: Folder, entry: Entry) -> None:
        """Write a blob anew from its own bytes when a tree file is its inode; quarantine it where that fails."""
        with self._state.read() as db:
            row = blob_row(db, entry.digest)
        blob = self._cache.status(entry.digest)
        with contextlib.suppress(FileNotFoundError):
            if row is None or blob is None or not os.path.samestat(blob, folder.stat(entry.name)):
                return
            try:
                with self._cache.staging() as staging:
                    stage_again(self._cache, staging, row)
                    kept = {row.digest: row}
                    renewed = self._cache.published(staging, kept, renews=True)
                    with self._state.hold(), renewed as rows, self._state.write() as db:
                        write_blobs(db, rows, kept)
            except (OSError, NoSpace) as error:
                if isinstance(error, NoSpace) or says_nothing(error):
                    self._cache.doubt(entry.digest)  # the next attempt begins here, and does not ask the disk again
                    raise
                self.quarantine([entry.digest])

    def _is_doubtful(self, folder: Folder, entry: Entry) -> bool:
        """Tell whether a tree file is the inode of a blob that the disk failed."""
        if not self._cache.is_doubtful(entry.digest):
            return False
        blob = self._cache.status(entry.digest)
        with contextlib.suppress(FileNotFoundError):
            return blob is not None and os.path.samestat(blob, folder.stat(entry.name))
        return False

    def _note_durable(self, row: WorkspaceRow, moves: int) -> None:
        with self._state.write() as db:
            if self._moves[row.name] != moves:
                return
            db.execute(
                "UPDATE workspaces SET durable_root = tree_root WHERE name = ? AND tree_root = ? AND moving_to IS NULL",
                (row.name, row.tree_root),
            )

    def tidy(self, should_stop: ShouldStop) -> None:
        """Remove what was displaced; never before an apply: creating files after many removals is slow (spec ST-36)."""
        with self._state.read() as db:
            names = [row.name for row in workspace_rows(db) if row.has_tree]
        for name in names:
            with self._opened(name) as (_, aside):
                with self._lock:
                    left = aside.names()  # outside of a move everything here is waste
                for waste in left:
                    if should_stop():
                        return
                    remove_tree(aside, waste)


def _healed(db: sqlite3.Connection, name: str) -> dict[bytes, int]:
    return dict(db.execute("SELECT digest, healed FROM wanted WHERE workspace = ? AND healed", (name,)))


def _awaited(db: sqlite3.Connection, name: str) -> set[bytes]:
    rows = db.execute("SELECT digest FROM wanted WHERE workspace = ? AND NOT healed", (name,))
    return {digest for (digest,) in rows}


def _paths_of(digests: Collection[bytes], roots: Collection[bytes], load: Loader) -> set[tuple[str, bytes]]:
    wanted = frozenset(digests)
    return {(path, entry.digest) for root in roots for path, entry in walk(root, load) if entry.digest in wanted}
