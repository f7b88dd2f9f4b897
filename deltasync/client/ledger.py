"""What a running scan is about to write: directories with their objects, moves, vanished files, problems."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping

from deltasync.client.moves import LIMBO, ROOT_ID, Link, Links, joined
from deltasync.client.recipes import Edges, Known, remember
from deltasync.client.state import Problem, Record, Row, State

_FLUSH_BYTES = 8 << 20
_FLUSH_FILES = 4_000
_FLUSH_HASHED_BYTES = 64 << 20
_FLUSH_SECONDS = 5.0
_LIMBO_MAX = 10_000


class Ledger:
    """Collects the findings of a scan and writes them in bounded transactions, each of which leaves a whole tree."""

    def __init__(self, state: State) -> None:
        """Begin with nothing to write."""
        self.state = state
        self.links = Links(state)
        self.problems: dict[str, list[Problem]] = {}
        """The problems met, by the folder that they are in."""
        self.looked_at: set[str] = set()
        self.dropped: list[str] = []
        self.recipes: list[Known] = []
        """Recipes of large files that were read."""
        self.edges: list[tuple[bytes, Edges]] = []
        """How large files begin and end, by digest."""
        self._rows: dict[int, tuple[Row, bytes]] = {}
        self._objects: dict[bytes, bytes] = {}
        self._vanished: dict[str, int] = {}
        self._next_id = state.last_id() + 1
        self._bytes = self._files = self._hashed_bytes = 0
        self._since = time.monotonic()

    # Rows

    def children(self, parent: int) -> dict[str, Row]:
        """Return the directories that hang directly below one, by name."""
        moved = self.links.changed
        rows = self.state.children(parent)
        return {row.name: row for row in rows if row.id not in moved or moved[row.id].parent == parent}

    def new_row(self, parent: int, name: str, inode: int, empty: bytes) -> Row:
        """Return the row of a directory that was never seen before."""
        row = Row(self._next_id, name, inode, empty, 0, 0, b"", is_unwritten=True)
        self._next_id += 1
        self.links.set(row.id, Link(parent, name, None))
        return row

    def candidates(self, inode: int) -> list[Row]:
        """Return the directories last seen with an inode, but for those that this scan has already changed."""
        return [row for row in self.state.with_inode(inode) if row.id not in self._rows and row.id != ROOT_ID]

    def detach(self, row: Row) -> None:
        """Let a directory that disappeared wait until it is met elsewhere."""
        path = self.links.path(row.id)
        if path is not None:
            self.dropped.append(path)
        self.links.set(row.id, Link(LIMBO, row.name, self.links.origin(row.id)))

    def adopt(self, row: Row, parent: int, name: str) -> None:
        """Hang a directory that was met again where it is now, remembering where the sealed tree has it."""
        path = self.links.path(row.id)
        if path is not None:
            self.dropped.append(path)
        origin = self.links.origin(row.id)
        expected = joined(self.links.origin(parent), name)
        self.links.set(row.id, Link(parent, name, None if origin == expected else origin))
        row.name = name

    # Findings

    def put(self, row: Row, stats: bytes, body: bytes) -> None:
        """Record a directory as it is now, with its object."""
        self._rows[row.id] = (row, stats)
        self._objects[row.digest] = body
        self._bytes += len(stats) + len(body)

    def vanish(self, folder: int, name: str, inode: int) -> None:
        """Record that a file's name is gone or has become another file."""
        self._vanished.setdefault(joined(self.links.origin(folder), name), inode)

    def count_hashed(self, size_bytes: int) -> None:
        """Count one more file that would have to be hashed again if nothing were written."""
        self._files += 1
        self._hashed_bytes += size_bytes

    def add_problem(self, folder: str, problem: Problem) -> None:
        """Record trouble with one entry of a folder."""
        self.problems.setdefault(folder, []).append(problem)

    # Writing

    def is_due(self) -> bool:
        """Tell whether enough has come together, or enough time has passed, to write."""
        return (
            self._files >= _FLUSH_FILES
            or self._bytes >= _FLUSH_BYTES
            or self._hashed_bytes >= _FLUSH_HASHED_BYTES
            or (self._files > 0 and time.monotonic() - self._since > _FLUSH_SECONDS)
        )

    def flush(self) -> None:
        """Write what has come together, in one transaction."""
        if self._rows or self.links.changed or self._vanished:
            rows = (self._record(row, stats) for row, stats in self._rows.values())
            with self.state.writing():
                self.state.record(rows, self._objects, self.links.changed, self._vanished)
                if self.edges:
                    remember(self.state, self.recipes, self.edges)
            self._rows, self._objects, self._vanished = {}, {}, {}
            self.recipes, self.edges = [], []
            self.links.recorded()
        self._bytes = self._files = self._hashed_bytes = 0
        self._since = time.monotonic()

    def _record(self, row: Row, stats: bytes) -> Record:
        link = self.links.get(row.id)
        return Record(
            row.id, link.parent, link.name, row.inode, row.digest, link.moved_from,
            row.files, row.size, row.signature, stats,
        )  # fmt: skip

    def finish(self, *, is_full: bool, meta: Mapping[str, str | None]) -> None:
        """Write the rest in one transaction: rows, problems, small values; drop what can no longer be of use."""
        state = self.state
        fresh = [(folder, problem) for folder, found in self.problems.items() for problem in found]
        has_renames = state.has_renames() or bool(self._vanished) or bool(self.links.changed)
        if not (self._rows or has_renames or self._has_news(fresh, is_full=is_full, meta=meta)):
            return
        with state.writing():
            self.flush()
            state.set_problems(fresh, folders=None if is_full else self.looked_at, below=self.dropped)
            for key, value in meta.items():
                state.set_meta(key, value)
            if has_renames and state.observed_root() == state.sealed_root():
                state.forget_renames()
            elif is_full and state.limbo_size() > _LIMBO_MAX:
                state.empty_limbo()

    def _has_news(
        self, fresh: Collection[tuple[str, Problem]], *, is_full: bool, meta: Mapping[str, str | None]
    ) -> bool:
        """Tell whether problems or small values differ from those that are recorded; most scans change nothing."""
        if any(self.state.get_meta(key) != value for key, value in meta.items()):
            return True
        if is_full:
            return sorted(_flat(fresh)) != sorted(_flat([("", problem) for problem in self.state.problems()]))
        return bool(fresh) or bool(self.state.problems())


def _flat(problems: Collection[tuple[str, Problem]]) -> list[tuple[str, str, bool]]:
    return [(problem.path, problem.reason, problem.waiting) for _, problem in problems]
