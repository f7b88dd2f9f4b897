"""Why: what the next push would do with one path, and for what reason, from a look at it now; nothing is changed."""

from __future__ import annotations

import enum
import os
import stat
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from deltasync.client import outbox, seal
from deltasync.client.frame import items
from deltasync.client.listing import signed
from deltasync.client.moves import ROOT_ID, Stats
from deltasync.client.reasons import Reason, explained, paths_with
from deltasync.client.scan import ScanOptions, ScanReport, scan
from deltasync.client.state import Row, State
from deltasync.core.delta import diff
from deltasync.core.errors import GuardStopped, NotFound
from deltasync.core.manifest import Entry, Kind, Operation, Verb
from deltasync.core.names import shown
from deltasync.core.tree import find

INSIDE_MAX = 100
"""How many paths inside of a folder an answer explains."""
_SECONDS_MAX = 253_402_300_799


class Verdict(enum.StrEnum):
    """What the next push would do with a path."""

    IN_STEP = "in_step"
    NEW = "new"
    COPY = "copy"
    CHANGED = "changed"
    METADATA = "metadata"
    MOVED = "moved"
    GONE = "gone"
    IGNORED = "ignored"
    WAITING = "waiting"
    PROBLEM = "problem"
    NOT_CARRIED = "not_carried"


class Why(msgspec.Struct, frozen=True, kw_only=True):
    """The answer for one path: the members of `why --json`; names in it are safe to print."""

    path: str
    """Below the workspace's folder; '' is that folder itself."""
    verdict: Verdict
    reason: str
    source: str | None = msgspec.field(default=None, name="from")
    """Where the tree that was sealed last has the content."""
    to: str | None = None
    """Where something is now that is gone here."""
    sequence: int | None = None
    """The bundle that holds the path as it is now, or the last one that the server acknowledged."""
    size: int | None = None
    since: str | None = None
    """When a file that is still being written was written last."""
    rule: str | None = None
    source_file: str | None = None
    line: int | None = None
    inside: list[Reason] = []
    """What would be sent of a folder, and why: the first INSIDE_MAX paths."""
    more_inside: int = 0
    problems_inside: int = 0
    """How many paths in a folder cannot be carried, or not yet."""


def why(state: State, path: str, options: ScanOptions, *, is_watched: Callable[[], bool] = lambda: False) -> Why:
    """Say what the next push would do with a path of a workspace; raises NotFound for one that is nowhere.

    is_watched: asked whether a watcher is at work, where what it last saw would count.
    """
    with state.scratch() as copy:
        return _Question(copy, path, options, is_watched).answer()


class _Question:
    """One path: what the sealed tree has of it, and what is on disk."""

    def __init__(self, state: State, path: str, options: ScanOptions, is_watched: Callable[[], bool]) -> None:
        self._state, self._path, self._options, self._is_watched = state, path, options, is_watched
        self._sealed_root = state.sealed_root()
        self._sealed = _entry(state, self._sealed_root, path)
        self._waited = {each.path for each in state.problems() if each.waiting}
        self._status: os.stat_result | None = None
        """What is on disk; None where nothing is that could be carried under this path."""
        self._problems_inside = 0

    def answer(self) -> Why:
        """Ask the rules, then the path itself, and look at everything only where that tells more."""
        early = self._stat() or self._ignored()
        if early is not None:
            return early
        report = self._look()
        top = shown(self._path)
        self._problems_inside = sum(1 for each in report.problems if each.path != top and _is_within(each.path, top))
        now = _entry(self._state, report.root, self._path)
        trouble = self._trouble(report, now)
        if trouble is not None:
            return trouble
        if now is None and self._sealed is None:
            raise NotFound(f"there is no {shown(self._path)} here, and none was sealed")
        if now is not None and now == self._sealed:
            return self._in_step(now)
        if now is not None and self._sealed is not None and now.kind is not Kind.DIRECTORY:
            return self._changed(self._sealed, now)
        operations = self._operations()
        if now is None:
            return self._gone(operations, self._state.observed_root())
        return self._folder(now, operations) if now.kind is Kind.DIRECTORY else self._fresh(now, operations)

    def _say(self, verdict: Verdict, reason: str, **members: Any) -> Why:
        count = self._problems_inside
        if count:
            reason += f"; {count} in it cannot be carried now"
        return Why(path=shown(self._path), verdict=verdict, reason=reason, problems_inside=count, **members)

    # Before anything is read

    def _stat(self) -> Why | None:
        """Look at the path without following anything; answer for what can never be carried."""
        root, parts = self._state.root, self._path.split("/")
        for depth in range(1, len(parts)):
            above = "/".join(parts[:depth])
            status = _lstat(root / above)
            if status is None or not stat.S_ISDIR(status.st_mode):
                if status is not None and self._sealed is None:
                    what = "a link, which is not followed" if stat.S_ISLNK(status.st_mode) else "no folder"
                    return self._say(Verdict.NOT_CARRIED, f"{shown(above)} is {what}")
                return None
        self._status = _lstat(root / self._path)
        return None

    def _ignored(self) -> Why | None:
        rules = self._options.ignore
        decision = rules.explain(self._path) if self._path else None
        if decision is None or not decision.ignored:
            return None
        named = " ".join(filter(None, (shown(decision.rule or ""), rules.where(decision))))
        kept = ""
        if self._sealed is not None:
            is_deleted = self._options.delete_excluded and not self._options.no_delete
            kept = "; what was sent is deleted on the server" if is_deleted else "; what was sent stays on the server"
        return self._say(
            Verdict.IGNORED,
            f"{named}{kept}",
            rule=decision.rule,
            source_file=decision.source_file,
            line=decision.line,
        )

    # The look

    def _look(self) -> ScanReport:
        """Look at the path's folder where it only may have changed, else at everything: it may have moved.

        No file is read but those that the question is about, wherever they are now.
        """
        is_plain = self._status is not None and not stat.S_ISDIR(self._status.st_mode)
        folders = {self._path.rpartition("/")[0]} if is_plain and self._sealed is not None else None
        return self._scan(folders, set() if is_plain else self._recorded_inodes())

    def _scan(self, folders: Collection[str] | None, inodes: Collection[int]) -> ScanReport:
        """Look at some folders or at everything, and read what is at the path and what has one of these inodes."""

        def is_asked(path: str, status: os.stat_result) -> bool:
            return _is_within(path, self._path) or signed(status.st_ino) in inodes

        options = replace(self._options, settle_seconds=0.0, rehash=False)
        return scan(self._state, options, folders=folders, is_settled=is_asked)

    def _operations(self) -> list[Operation]:
        """Return how the tree that was looked at differs from the sealed one.

        A copy passes for what was moved as long as the file that moved is not read: then it is, and all is compared
        again. Other new files stay unread: one that is a copy of what is gone too may be the one that push pairs.
        """
        operations = self._difference()
        sources = [each.source_path or "" for each in operations if _is_within(each.path, self._path)]
        query = "SELECT inode FROM vanished WHERE path = ?"
        rows = (self._state.db.execute(query, (source,)).fetchone() for source in filter(None, sources))
        elsewhere = {inode for (inode,) in filter(None, rows)} - self._recorded_inodes()
        if not elsewhere:
            return operations
        self._scan(None, elsewhere)
        return self._difference()

    def _difference(self) -> list[Operation]:
        return diff(self._sealed_root, self._state.observed_root(), self._state.load, self._state.renames())

    def _recorded_inodes(self) -> set[int]:
        """Return the inodes of the files at and below the path as it was last observed: they may be elsewhere now."""
        if not self._path:
            return set()  # everything is within
        folder, _, name = self._path.rpartition("/")
        above = self._row(folder)
        if above is None:
            return set()
        top = self._row(self._path)
        if top is None:
            item = items(self._state, above.digest, self._stats(above)).get(name)
            return {item.inode} if item is not None else set()
        left, inodes = [top], set[int]()
        while left:
            row = left.pop()
            inodes.update(self._stats(row).inodes)
            left += self._state.children(row.id)
        return inodes - {0}

    def _row(self, path: str) -> Row | None:
        """Return the row of an observed folder."""
        row = self._state.row(ROOT_ID)
        for part in filter(None, path.split("/")):
            inner = next((child for child in self._state.children(row.id) if child.name == part), None)
            if inner is None:
                return None
            row = inner
        return row

    def _stats(self, row: Row) -> Stats:
        return Stats.unpack(self._state.packed_stats(row.id))

    def _trouble(self, report: ScanReport, now: Entry | None) -> Why | None:
        """Answer for what could not be looked at: the path, or a folder that it is in."""
        waiting = next((each for each in report.waiting if each.path == self._path), None)
        is_expected = shown(self._path) in self._waited and now != self._sealed
        if waiting is not None or (is_expected and self._is_watched()):
            return self._waiting()
        reasons = {each.path: each.reason for each in report.problems if not each.waiting}
        for path in (self._path, *_above(self._path)):
            if shown(path) not in reasons:
                continue
            is_itself = path == self._path
            reason = reasons[shown(path)] if is_itself else f"{shown(path)} {reasons[shown(path)]}"
            is_odd = is_itself and self._status is not None and not _is_carried(self._status)
            return self._say(Verdict.NOT_CARRIED if is_odd else Verdict.PROBLEM, reason)
        return None

    def _waiting(self) -> Why:
        status = _lstat(self._state.root / self._path)
        if status is None:
            return self._say(Verdict.WAITING, "was still being written and is gone")
        since = datetime.fromtimestamp(min(max(status.st_mtime, 0.0), _SECONDS_MAX)).astimezone()
        text = since.isoformat(timespec="seconds")
        reason = f"still being written: {status.st_size} bytes, the last of them at {text}"
        return self._say(Verdict.WAITING, reason, size=status.st_size, since=text)

    # What differs

    def _in_step(self, now: Entry) -> Why:
        head = outbox.head(self._state)
        if self._status is None:
            return self._say(Verdict.GONE, "is gone here and stays on the server (--no-delete)")
        if not head.sealed_sequence:
            return self._say(Verdict.IN_STEP, "nothing is here, and nothing was sealed")
        if _entry(self._state, head.acknowledged_root, self._path) == now:
            sequence = head.acknowledged_sequence
            return self._say(
                Verdict.IN_STEP, f"the server has it as it is here, at sequence {sequence}", sequence=sequence
            )
        holding = (row for row in outbox.pending(self._state) if _entry(self._state, row.root, self._path) == now)
        row = next(holding, None)
        sequence = row.sequence if row is not None else head.sealed_sequence
        return self._say(
            Verdict.IN_STEP,
            f"sealed as it is here, in bundle {sequence}, which waits for the server",
            sequence=sequence,
        )

    def _changed(self, before: Entry, now: Entry) -> Why:
        if before.kind is not now.kind:
            return self._say(Verdict.CHANGED, f"was a {before.kind} and is a {now.kind} now")
        if now.kind is Kind.SYMLINK:
            return self._say(
                Verdict.CHANGED, f"points to {shown(now.target)} now, and to {shown(before.target)} before"
            )
        if before.digest != now.digest:
            return self._say(Verdict.CHANGED, f"{now.size} bytes now, {before.size} bytes when it was sealed")
        touched = ["its time"] * (before.mtime_ns != now.mtime_ns)
        touched += ["its executable bit"] * (before.executable != now.executable)
        return self._say(Verdict.METADATA, f"{' and '.join(touched)} changed, its content did not")

    def _fresh(self, now: Entry, operations: Sequence[Operation]) -> Why:
        """Answer for a file or link that the sealed tree does not have under this path."""
        moved = self._moved_here(operations)
        if moved is not None:
            source, is_itself = moved
            before = _entry(self._state, self._sealed_root, source)
            if is_itself or before == now:
                how = "" if is_itself else ", with the folder that it is in"
                return self._say(Verdict.MOVED, f"from {shown(source)}{how}", source=shown(source))
            if before is not None:
                answer = self._changed(before, now)
                reason = f"{answer.reason}; moved from {shown(source)} with its folder"
                return self._say(answer.verdict, reason, source=shown(source))
        digest = now.digest.hex()
        copies = paths_with({digest} if now.size else (), self._sealed_root, self._state.load)
        if digest in copies:
            source = shown(copies[digest])
            return self._say(Verdict.COPY, f"of {source}, so its content need not travel", source=source)
        return self._say(Verdict.NEW, "nothing was sealed under this path")

    def _gone(self, operations: Sequence[Operation], root: bytes) -> Why:
        """Answer for what the sealed tree has and the folder has not."""
        moves = {each.source_path or "": each.path for each in operations if each.operation is Verb.MOVED}
        for above in (self._path, *_above(self._path)):
            if above in moves:
                target = moves[above] + self._path[len(above) :]
                if _entry(self._state, root, target) is not None:
                    return self._say(Verdict.GONE, f"moved to {shown(target)}", to=shown(target))
        return self._say(Verdict.GONE, self._guard(operations) or "the next push deletes it on the server")

    def _guard(self, operations: Sequence[Operation]) -> str | None:
        """Say why the next push stops at what is gone, and which flag lets it go on."""
        try:
            seal.guard(operations, self._sealed_root, self._state.load, is_resync=False)
        except GuardStopped as stopped:
            of = f"{stopped.facts['deleted']} of {stopped.facts['entries']} entries"
            flag = stopped.facts["flag"]
            return f"the next push stops: it would delete {of} on the server; if that is meant, push with {flag}"
        return None

    def _folder(self, now: Entry, operations: Sequence[Operation]) -> Why:
        """Answer for a folder: what it is itself, and what would be sent of what is in it."""
        inside = [each for each in operations if _is_within(each.path, self._path) and each.path != self._path]
        found = explained(inside[:INSIDE_MAX], self._sealed_root, self._state.load)
        counts = Counter(each.operation.value for each in inside)
        counted = ", ".join(f"{counts[verb.value]} {verb}" for verb in Verb if counts[verb.value])
        members = {"inside": found, "more_inside": len(inside) - len(found)}
        moved = self._moved_here(operations)
        if moved is not None:
            reason = f"from {shown(moved[0])}" + (f"; in it, {counted}" if counted else "")
            return self._say(Verdict.MOVED, reason, source=shown(moved[0]), **members)
        if self._sealed is None and self._path:
            return self._say(
                Verdict.NEW, f"nothing was sealed under this path; in it, {counted or 'nothing'}", **members
            )
        if self._sealed is not None and self._sealed.kind is not now.kind:
            return self._say(Verdict.CHANGED, f"was a {self._sealed.kind} and is a {now.kind} now", **members)
        out = sum(
            1
            for each in operations
            if each.source_path and _is_within(each.source_path, self._path) and not _is_within(each.path, self._path)
        )
        left = f"{out} moved out of it" if out else ""
        guard = self._guard(operations) if counts[Verb.DELETED.value] else None
        return self._say(Verdict.CHANGED, "; ".join(filter(None, (counted, left, guard))), **members)

    def _moved_here(self, operations: Sequence[Operation]) -> tuple[str, bool] | None:
        """Return where the path was before a move of it or of a folder above, and whether it is itself that moved."""
        moves = {each.path: each.source_path or "" for each in operations if each.operation is Verb.MOVED}
        for above in (self._path, *_above(self._path)):
            if above in moves:
                return moves[above] + self._path[len(above) :], above == self._path
        return None


def _entry(state: State, root: bytes, path: str) -> Entry | None:
    """Return what a tree has at a path; '' is the tree itself."""
    if not path:
        return Entry("", Kind.DIRECTORY, digest=root)
    return find(root, path, state.load)


def _lstat(path: Path) -> os.stat_result | None:
    """Return what is at a path; None for nothing, and for what cannot be told: the look says why."""
    try:
        return path.lstat()
    except (OSError, ValueError):
        return None


def _is_carried(status: os.stat_result) -> bool:
    kind = stat.S_IFMT(status.st_mode)
    return kind in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK)


def _is_within(path: str, top: str) -> bool:
    return not top or path == top or path.startswith(f"{top}/")


def _above(path: str) -> Iterator[str]:
    while path := path.rpartition("/")[0]:
        yield path
