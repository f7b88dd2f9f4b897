"""The client's state: what was observed, sealed and acknowledged of one workspace, in one SQLite database."""

from __future__ import annotations

import contextlib
import sqlite3
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import msgspec

from deltasync import db
from deltasync.client import moves, opening
from deltasync.client.moves import LIMBO, ROOT_ID, Link
from deltasync.core.delta import moved_since
from deltasync.core.errors import Corrupt
from deltasync.core.hashing import directory_digest
from deltasync.core.manifest import EMPTY_BODY, EMPTY_ROOT, Entry, Kind, decode_directory

MIGRATIONS = [
    """
    CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE directories (
        id INTEGER PRIMARY KEY, parent INTEGER NOT NULL, name TEXT NOT NULL, inode INTEGER NOT NULL,
        digest BLOB NOT NULL, moved_from TEXT, files INTEGER NOT NULL, bytes INTEGER NOT NULL,
        signature BLOB NOT NULL, stats BLOB NOT NULL
    );
    CREATE INDEX directories_by_parent ON directories (parent, name);
    CREATE INDEX directories_by_inode ON directories (inode);
    CREATE INDEX directories_moved ON directories (moved_from) WHERE moved_from IS NOT NULL;
    CREATE TABLE objects (digest BLOB PRIMARY KEY, body BLOB NOT NULL);
    CREATE TABLE vanished (path TEXT PRIMARY KEY, inode INTEGER NOT NULL) WITHOUT ROWID;
    CREATE TABLE problems (
        folder TEXT NOT NULL, path TEXT NOT NULL, reason TEXT NOT NULL, waiting INTEGER NOT NULL
    );
    CREATE INDEX problems_by_folder ON problems (folder);
    CREATE TABLE head (
        id INTEGER PRIMARY KEY CHECK (id = 1), workspace TEXT, url TEXT, epoch TEXT NOT NULL,
        sealed_sequence INTEGER NOT NULL, sealed_root BLOB NOT NULL,
        acknowledged_sequence INTEGER NOT NULL, acknowledged_root BLOB NOT NULL,
        acknowledged_at TEXT, server_tree_sequence INTEGER
    );
    CREATE TABLE outbox (
        sequence INTEGER PRIMARY KEY, epoch TEXT NOT NULL, identity BLOB NOT NULL, parent_root BLOB NOT NULL,
        root BLOB NOT NULL, manifest BLOB NOT NULL, operations BLOB NOT NULL, hashes BLOB NOT NULL, file TEXT,
        left_machine INTEGER NOT NULL, state TEXT NOT NULL, content_bytes INTEGER NOT NULL, sealed_at TEXT NOT NULL
    )
    """,
    """
    CREATE TABLE recipes (digest BLOB PRIMARY KEY, average INTEGER NOT NULL, chunks BLOB NOT NULL);
    CREATE TABLE edges (
        edge BLOB NOT NULL, digest BLOB NOT NULL, size INTEGER NOT NULL, PRIMARY KEY (edge, digest)
    );
    CREATE INDEX edges_by_digest ON edges (digest)
    """,
    """
    CREATE TABLE streams (
        id BLOB PRIMARY KEY, path TEXT NOT NULL, digest TEXT NOT NULL, size INTEGER NOT NULL, most INTEGER NOT NULL,
        ends BLOB NOT NULL, sealed INTEGER
    ) WITHOUT ROWID;
    CREATE TABLE parts (
        sequence INTEGER PRIMARY KEY, stream BLOB NOT NULL, start INTEGER NOT NULL, size INTEGER NOT NULL, digest BLOB
    )
    """,
]

RACY, KEPT = 1, 2
"""Flags of an entry: written too close to its hash; not observed now, its former entry stands."""
REHASH_DUE = "rehash_due"
"""The meta key that says that size and mtime were trusted and every file is to be read again."""
TAKEN_BACK = "taken_back"
"""The meta key that names the directories which bundles moved that were taken back."""
UNREADABLE = "cannot be read"
"""The reason of such a problem begins so."""
_SWEEP_SLACK = 1_000
_moves = msgspec.json.Decoder(dict[str, str])


@dataclass(frozen=True, slots=True)
class Problem:
    """Trouble with one user file, as data: `path` is safe to print; waiting means that time may heal it."""

    path: str
    reason: str
    waiting: bool

    @property
    def is_unreadable(self) -> bool:
        """Whether something is there that the system does not let us read."""
        return self.reason.startswith(UNREADABLE)


@dataclass(slots=True)
class Row:
    """One observed directory, without its entries; files and size (bytes) count everything below it."""

    id: int
    name: str
    inode: int
    digest: bytes
    files: int
    size: int
    signature: bytes
    is_unwritten: bool = False
    """Its row, or its inode there, is still to be written."""


class Record(NamedTuple):
    """One directory to write: its row in the order of the table's columns."""

    id: int
    parent: int
    name: str
    inode: int
    digest: bytes
    moved_from: str | None
    files: int
    size: int
    signature: bytes
    stats: bytes


class State:
    """One workspace's state; the only owner of its SQLite connection and, unless read-only, of its lock."""

    def __init__(self, opened: opening.Opened) -> None:
        """Wrap what `opening` opened; use `State.open`."""
        self.root, self.folder, self.db, self._lock = opened.root, opened.folder, opened.connection, opened.lock
        self.notes = opened.notes
        self._inode = (self.folder / opening.DATABASE).stat().st_ino
        self.client_id = self.get_meta("client_id") or ""

    @classmethod
    def open(
        cls,
        root: Path,
        *,
        state_dir: Path | None = None,
        workspace: str | None = None,
        take_over: bool = False,
        read_only: bool = False,
    ) -> Self:
        """Open the state of the workspace at `root`, or make it; read_only takes no lock and makes nothing.

        workspace, take_over: what the user said; either lets a copied folder go on, in a new history.
        Raises RootUnavailable, UsageError (nested), WorkspaceCopied, AlreadyRunning, or NotFound (read_only).
        """
        return cls(opening.opened(root, opening.Asked(state_dir, workspace, take_over, read_only), MIGRATIONS))

    def close(self) -> None:
        """Close the database and let the lock go; after an error the next opening checks the database."""
        self.db.close()
        if self._lock is not None:
            if sys.exc_info()[0] is None:
                opening.record_close(self.folder)
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def require_original(self) -> None:
        """Raise WorkspaceCopied when this is a copy of a workspace that is still there; what is known is that one's."""
        opening.require_original(self.root, self.folder, self.db)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[State]:
        """Give a copy of the state that is thrown away, for a look that must leave no trace."""
        with contextlib.closing(sqlite3.connect("", isolation_level=None, check_same_thread=False)) as connection:
            self.db.backup(connection)
            yield State(opening.Opened(self.root, self.folder, connection, None))

    # Small values

    def get_meta(self, key: str) -> str | None:
        """Return a small named value, or None."""
        row = self.db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def set_meta(self, key: str, value: str | None) -> None:
        """Set a small named value; None removes it."""
        if value is None:
            self.db.execute("DELETE FROM meta WHERE key = ?", (key,))
        else:
            self.db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def _row(self, query: str, *parameters: object) -> tuple[Any, ...]:
        """Return a row that every state has; raises what damage raises where it is gone, as after a page of zeros."""
        row: tuple[Any, ...] | None = self.db.execute(query, parameters).fetchone()
        if row is None:
            raise sqlite3.DatabaseError("a row is gone that is always there")
        return row

    # The observed tree

    def observed_root(self) -> bytes:
        """Return the root of the tree as it was last observed; always a complete tree."""
        return bytes(self._row("SELECT digest FROM directories WHERE id = ?", ROOT_ID)[0])

    def sealed_root(self) -> bytes:
        """Return the root of the tree that the sealed bundles lead to."""
        return bytes(self._row("SELECT sealed_root FROM head")[0])

    def counts(self) -> tuple[int, int]:
        """Return how many files were observed, and their bytes; one row is read."""
        files, size = self._row("SELECT files, bytes FROM directories WHERE id = ?", ROOT_ID)
        return files, size

    def load(self, digest: bytes) -> list[Entry]:
        """Return the entries of a directory object; it is a Loader for diff and walk."""
        return decode_directory(self.load_body(digest))

    def load_body(self, digest: bytes) -> bytes:
        """Return the body of a directory object, proven by its digest."""
        if digest == EMPTY_ROOT:
            return EMPTY_BODY
        row = self.db.execute("SELECT body FROM objects WHERE digest = ?", (digest,)).fetchone()
        if row is None or directory_digest(row[0]) != digest:
            self.suspect()
            raise Corrupt(
                f"{self.folder / 'state.db'} lost or damaged the directory object {digest.hex()[:16]}; "
                "run the command again and it is rebuilt from the workspace"
            )
        return bytes(row[0])

    def store(self, objects: Mapping[bytes, bytes]) -> None:
        """Keep directory objects; joins the caller's transaction where one is open."""
        with self.writing():
            self.db.executemany("INSERT OR IGNORE INTO objects VALUES (?, ?)", objects.items())

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Run a block in the open transaction, or in one of its own."""
        if self.db.in_transaction:
            yield
            return
        with db.transaction(self.db):
            yield

    def is_in_place(self) -> bool:
        """Tell whether the database that is open is still the one on disk: not so when its folder was replaced."""
        try:
            return (self.folder / opening.DATABASE).stat().st_ino == self._inode
        except OSError:
            return False

    def suspect(self) -> None:
        """Have the next opening check the database and set it aside if it is damaged."""
        with contextlib.suppress(OSError):
            (self.folder / opening.SUSPECT).touch(mode=0o600)

    # Rows of directories

    def row(self, identity: int) -> Row:
        """Return one directory's row."""
        return Row(
            *self.db.execute(
                "SELECT id, name, inode, digest, files, bytes, signature FROM directories WHERE id = ?", (identity,)
            ).fetchone()
        )

    def children(self, parent: int) -> list[Row]:
        """Return the rows of the directories directly inside one."""
        query = "SELECT id, name, inode, digest, files, bytes, signature FROM directories WHERE parent = ?"
        return [Row(*values) for values in self.db.execute(query, (parent,))]

    def with_inode(self, inode: int) -> list[Row]:
        """Return the rows of the directories that were last seen with an inode."""
        query = "SELECT id, name, inode, digest, files, bytes, signature FROM directories WHERE inode = ?"
        return [Row(*values) for values in self.db.execute(query, (inode,))]

    def link(self, identity: int) -> Link:
        """Return where a directory hangs."""
        return Link(*self._row("SELECT parent, name, moved_from FROM directories WHERE id = ?", identity))

    def packed_stats(self, identity: int) -> bytes:
        """Return the packed stats of a directory's entries; b'' for one that was never written."""
        row = self.db.execute("SELECT stats FROM directories WHERE id = ?", (identity,)).fetchone()
        return b"" if row is None else bytes(row[0])

    def last_id(self) -> int:
        """Return the highest id of a directory row."""
        return int(self._row("SELECT id FROM directories ORDER BY id DESC LIMIT 1")[0])

    # Moves since the last sealing

    def renames(self) -> dict[str, str]:
        """Return new path -> path in the sealed tree, for directories and files recognised by their inode."""
        found, taken_back = moves.renames(self), self.get_meta(TAKEN_BACK)
        return moved_since(_moves.decode(taken_back), found) if taken_back else found

    def forget_renames(self) -> None:
        """Say that the sealed tree is the observed one: what moved or disappeared before is no longer of use."""
        with self.writing():
            self.set_meta(TAKEN_BACK, None)
            self.db.execute("DELETE FROM vanished")
            self.empty_limbo()
            self.db.execute("UPDATE directories SET moved_from = NULL WHERE moved_from IS NOT NULL")

    def take_back(self, renames: Mapping[str, str]) -> None:
        """Remember what was moved by bundles that were taken back: the sealed tree is again the one before them."""
        with self.writing():
            before = self.get_meta(TAKEN_BACK)
            after = moved_since(renames, _moves.decode(before)) if before else dict(renames)
            self.set_meta(TAKEN_BACK, msgspec.json.encode(after).decode() if after else None)

    def has_renames(self) -> bool:
        """Tell whether anything moved or disappeared since the last sealing."""
        query = "SELECT EXISTS (SELECT 1 FROM vanished) OR EXISTS (SELECT 1 FROM directories WHERE moved_from NOT NULL)"
        return bool(self.db.execute(query).fetchone()[0]) or self.get_meta(TAKEN_BACK) is not None

    def empty_limbo(self) -> None:
        """Forget the directories that disappeared, with everything below them."""
        with self.writing():
            self.db.execute(
                """WITH RECURSIVE gone (id) AS (
                       SELECT id FROM directories WHERE parent = ?
                       UNION SELECT d.id FROM directories AS d JOIN gone ON d.parent = gone.id
                   ) DELETE FROM directories WHERE id IN gone""",
                (LIMBO,),
            )

    def limbo_size(self) -> int:
        """Return how many directories disappeared, not counting those below them."""
        return int(self.db.execute("SELECT count(*) FROM directories WHERE parent = ?", (LIMBO,)).fetchone()[0])

    # What a scan writes

    def record(
        self,
        rows: Iterable[Record],
        objects: Mapping[bytes, bytes],
        links: Mapping[int, Link],
        vanished: Mapping[str, int],
    ) -> None:
        """Write a part of a scan: directories with their objects, what moved, and the files that disappeared."""
        with self.writing():
            self.store(objects)
            self.db.executemany(
                "UPDATE directories SET parent = ?, name = ?, moved_from = ? WHERE id = ?",
                ((*link, identity) for identity, link in links.items()),
            )
            self.db.executemany("INSERT OR REPLACE INTO directories VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
            # The first disappearance of a path counts: it is the one that the sealed tree knows.
            self.db.executemany("INSERT OR IGNORE INTO vanished VALUES (?, ?)", vanished.items())

    # Problems

    def problems(self) -> list[Problem]:
        """Return the trouble with user files that the last scans found, by path."""
        query = "SELECT path, reason, waiting FROM problems ORDER BY path, reason"
        return [Problem(path, reason, bool(waiting)) for path, reason, waiting in self.db.execute(query)]

    def problem_folders(self) -> set[str]:
        """Return the folders that have trouble in them."""
        return {folder for (folder,) in self.db.execute("SELECT DISTINCT folder FROM problems")}

    def set_problems(
        self,
        problems: Iterable[tuple[str, Problem]],
        *,
        folders: Iterable[str] | None = None,
        below: Iterable[str] = (),
    ) -> None:
        """Replace the problems of some folders, or (None) of all; each problem comes with the folder it is in.

        below: folders that are gone with everything in them.
        """
        with self.writing():
            if folders is None:
                self.db.execute("DELETE FROM problems")
            else:
                self.db.executemany("DELETE FROM problems WHERE folder = ?", ((folder,) for folder in folders))
            query = "DELETE FROM problems WHERE folder = ? OR (folder > ? AND folder < ?)"
            self.db.executemany(query, ((gone, f"{gone}/", f"{gone}0") for gone in below))  # '0' follows '/'
            rows = ((folder, problem.path, problem.reason, problem.waiting) for folder, problem in problems)
            self.db.executemany("INSERT INTO problems VALUES (?, ?, ?, ?)", rows)

    # Objects that nothing names any more

    def sweep_objects(self, keep: Collection[bytes], *, always: bool = False) -> int:
        """Drop the directory objects that neither the observed tree nor a root in `keep` reaches; return how many.

        Nothing is done while they are few, unless `always`.
        """
        held = self.db.execute("SELECT count(*) FROM objects").fetchone()[0]
        rows = self.db.execute("SELECT count(*) FROM directories").fetchone()[0]
        if not always and held <= 2 * rows + _SWEEP_SLACK:
            return 0
        live: set[bytes] = set()
        todo = [self.observed_root(), *keep]
        while todo:
            digest = todo.pop()
            if digest not in live:
                live.add(digest)
                todo.extend(entry.digest for entry in self.load(digest) if entry.kind is Kind.DIRECTORY)
        with self.writing():
            # A directory that waits in limbo may be met again and brings its object with it.
            live.update(digest for (digest,) in self.db.execute("SELECT digest FROM directories"))
            dead = [(digest,) for (digest,) in self.db.execute("SELECT digest FROM objects") if digest not in live]
            self.db.executemany("DELETE FROM objects WHERE digest = ?", dead)
        return len(dead)
