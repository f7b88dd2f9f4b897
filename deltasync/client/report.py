"""What a push did, and how far it is: counted bundle by bundle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from deltasync.client import outbox
from deltasync.client.reasons import Reason
from deltasync.core.manifest import Kind, Operation, Verb
from deltasync.core.metadata import Counts as ManifestCounts
from deltasync.core.metadata import Manifest
from deltasync.core.names import shown

if TYPE_CHECKING:
    from deltasync.client.state import State

_ROOT_ID = 1


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a push is; told from the sending threads."""

    bundles: int
    """How many were acknowledged, or sealed into files."""
    content_bytes: int
    """Content that was read and went out."""
    total_bytes: int
    """Content that goes out at most, as far as is known yet."""
    part: str | None = None
    """Which part of which large file was sealed last, while one goes out."""


@dataclass(slots=True)
class Counts:
    """How many operations of each verb went out."""

    created: int = 0
    updated: int = 0
    moved: int = 0
    deleted: int = 0


@dataclass(frozen=True, slots=True)
class PathProblem:
    """A path that was left out, and why; both are safe to print."""

    path: str
    reason: str


@dataclass(slots=True)
class PushReport:
    """What a push did: the members of `push --json`."""

    workspace: str = ""
    sequence: int = 0
    root: str = ""
    operations: Counts = field(default_factory=Counts)
    bundles: int = 0
    content_bytes: int = 0
    """Content as it lies in the bundles, before compression."""
    sent_bytes: int = 0
    """Request bodies, or bundle files, as sent."""
    avoided_bytes: int = 0
    """Content that the delta names and that did not have to travel: the sum of the next three."""
    avoided_by_cache_bytes: int = 0
    """Content that the server had: of copies, of touched files, of other workspaces."""
    avoided_by_chunks_bytes: int = 0
    """Content of large files that the server had in other files, or in what they were before."""
    avoided_by_move_bytes: int = 0
    """Content of what was moved, alone or with its folder."""
    problems: list[PathProblem] = field(default_factory=list)
    seconds: float = 0.0
    tree_sequence: int | None = None
    """Which sequence the server's plain tree held at the end; None when it moves, or is not known."""
    tree_behind: bool = False
    """The server's plain tree did not hold the last sequence at the end, or was not waited for."""
    still_wanted: int = 0
    """How many contents the server lost, and did not get by this push."""
    taken_over: bool = False
    """The workspace was another client's before."""
    pending: int = 0
    """Sealed bundles that wait for the server."""
    waiting: str | None = None
    """Why sealing waits, if it does."""
    unreachable: str | None = None
    """Why the server could not be reached, where that is no failure (`watch`)."""
    dry_run: bool = False
    reasons: list[Reason] | None = None
    """Why the first operations went out; None when nobody asked."""
    more_reasons: int = 0
    """How many operations went out beside those."""


class Avoided(NamedTuple):
    """How much content a bundle moves, and how much of what it changes did not travel."""

    in_moved_folders: int
    """Below the directories that are moved: no operation names it."""
    moved_alone: int
    """Of files that are moved by an operation of their own."""
    by_chunks: int = 0
    """Of large files whose other chunks were sent."""
    in_parts: int = 0
    """What travelled before the bundle."""


class Tally:
    """Counts what goes out, for the report and for the progress that is shown."""

    def __init__(self, state: State, report: PushReport, progress: Callable[[Progress], None] | None) -> None:
        self._state = state
        self.report = report
        self.progress = progress
        self.expected: Callable[[], int] = lambda: 0
        """Says how much content travels at most, as far as is known."""
        self._read_bytes = 0
        self.part: str | None = None
        """Which part of which large file was sealed last, while one goes out."""

    def read(self, size_bytes: int) -> None:
        """Count content that was read to be sent (in a sending thread)."""
        self._read_bytes += size_bytes
        self._tell()

    def add(self, manifest: Manifest, content_bytes: int, avoided: Avoided) -> None:
        """Count a bundle that is acknowledged, or sealed into a file."""
        self._add(manifest.operations, manifest.total_size_bytes, content_bytes, avoided)
        self._tell()

    def add_operations(self, operations: Sequence[Operation], content_bytes: int, by_chunks: int) -> None:
        """Count a bundle that is not sealed."""
        verbs = Counter(operation.operation.value for operation in operations)
        named_bytes = sum(operation.size for operation in operations)
        avoided = self.moved(operations)._replace(by_chunks=by_chunks)
        self._add(Counts(**verbs), named_bytes, content_bytes, avoided)

    def moved(self, operations: Sequence[Operation]) -> Avoided:
        """Return how much content the operations move."""
        moves = [each for each in operations if each.operation is Verb.MOVED]
        folders = [each.path for each in moves if each.kind is Kind.DIRECTORY]
        return Avoided(sum(_bytes_below(self._state, path) for path in folders), sum(each.size for each in moves))

    def _add(self, counts: Counts | ManifestCounts, named_bytes: int, content_bytes: int, avoided: Avoided) -> None:
        report, total = self.report, self.report.operations
        total.created += counts.created
        total.updated += counts.updated
        total.moved += counts.moved
        total.deleted += counts.deleted
        report.bundles += 1
        report.content_bytes += content_bytes
        avoided_bytes = max(0, named_bytes + avoided.in_moved_folders - content_bytes - avoided.in_parts)
        by_chunks_bytes = min(avoided_bytes, avoided.by_chunks)
        # what was moved may have had to travel all the same
        by_move_bytes = min(avoided_bytes - by_chunks_bytes, avoided.in_moved_folders + avoided.moved_alone)
        report.avoided_bytes += avoided_bytes
        report.avoided_by_chunks_bytes += by_chunks_bytes
        report.avoided_by_move_bytes += by_move_bytes
        report.avoided_by_cache_bytes += avoided_bytes - by_chunks_bytes - by_move_bytes

    def close(self, left_out: Mapping[str, str]) -> None:
        """Complete the report."""
        report, here = self.report, outbox.head(self._state)
        report.sequence, report.root = here.sealed_sequence, here.sealed_root.hex()
        report.pending = here.sealed_sequence - here.acknowledged_sequence
        known = [PathProblem(problem.path, problem.reason) for problem in self._state.problems()]
        paths = {problem.path for problem in known}
        fresh = [PathProblem(shown(path), reason) for path, reason in left_out.items() if shown(path) not in paths]
        report.problems = known + fresh

    def _tell(self) -> None:
        if self.progress is not None:
            report = self.report
            total_bytes = max(self.expected(), self._read_bytes)
            self.progress(Progress(report.bundles, self._read_bytes, total_bytes, self.part))


def _bytes_below(state: State, path: str) -> int:
    """Return the bytes of all files below an observed directory; its row counts them."""
    identity, size_bytes = _ROOT_ID, 0
    for name in path.split("/"):
        query = "SELECT id, bytes FROM directories WHERE parent = ? AND name = ?"
        row = state.db.execute(query, (identity, name)).fetchone()
        if row is None:
            return 0
        identity, size_bytes = row
    return size_bytes
