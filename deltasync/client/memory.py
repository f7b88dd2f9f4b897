"""What was read of files that were inputs before: one that did not change is not read again (spec J-22).

Nothing here is the only copy of anything: a damaged memory is thrown away, and files are read once more.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from deltasync import db
from deltasync.client.frame import items
from deltasync.client.listing import Seen, is_executable
from deltasync.client.moves import Links, Stats, joined
from deltasync.client.state import State
from deltasync.core.manifest import Entry, Kind

KEEP_SECONDS = 90 * 86_400
_MIGRATIONS = [
    """
    CREATE TABLE reads (
        path TEXT PRIMARY KEY, inode INTEGER NOT NULL, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
        ctime_ns INTEGER NOT NULL, digest BLOB NOT NULL, used_at INTEGER NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX reads_by_use ON reads (used_at)
    """
]


class Memory:
    """The digests of files, by their path and stat, in a database of the user's."""

    def __init__(self, path: Path) -> None:
        """Open the memory at a path, or begin one."""
        self._db = db.connect_disposable(path, _MIGRATIONS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def recall(self, path: str, seen: Seen) -> Entry | None:
        """Return the entry of a file that is as it was when it was read; None where that is not known."""
        row = None
        with contextlib.suppress(sqlite3.Error):
            query = "SELECT digest FROM reads WHERE path = ? AND (inode, size, mtime_ns, ctime_ns) = (?, ?, ?, ?)"
            stat = (seen.inode, seen.size, seen.mtime_ns, seen.ctime_ns)
            row = self._db.execute(query, (path, *stat)).fetchone()
        if row is None:
            return None
        return Entry(seen.name, Kind.FILE, seen.size, seen.mtime_ns, is_executable(seen.mode), bytes(row[0]))

    def keep(self, state: State, now: float) -> None:
        """Remember every file that a state holds and whose times prove its content; forget what was long of no use."""
        rows = ((*row, int(now)) for row in _files_of(state))
        with contextlib.suppress(sqlite3.Error), db.transaction(self._db):
            self._db.executemany("INSERT OR REPLACE INTO reads VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
            self._db.execute("DELETE FROM reads WHERE used_at < ?", (int(now) - KEEP_SECONDS,))


def _files_of(state: State) -> Iterator[tuple[str, int, int, int, int, bytes]]:
    links = Links(state)
    for identity, digest, packed in state.db.execute("SELECT id, digest, stats FROM directories").fetchall():
        folder = links.path(identity)
        if folder is None:
            continue
        for name, item in items(state, digest, Stats.unpack(packed)).items():
            entry = item.entry
            if entry.kind is Kind.FILE and not item.flags:
                yield joined(folder, name), item.inode, entry.size, entry.mtime_ns, item.ctime_ns, entry.digest
