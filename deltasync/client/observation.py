"""What a scan is asked, and what it answers."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from deltasync.client.ignore import IgnoreRules
from deltasync.client.state import Problem
from deltasync.core.chunks import CHUNK_FROM_BYTES
from deltasync.core.hashing import Hasher

if TYPE_CHECKING:
    from deltasync.client.memory import Memory
    from deltasync.client.selection import Selection

IsSettled = Callable[[str, os.stat_result], bool]
Progress = Callable[[int, int], None]
Expect = Callable[[bytes, int], None]
"""Is told of a large file that is about to be cut: the content that is its likely base, and the size of chunks."""


class Follower(Protocol):
    """Follows the first reading of a large file; `finish` or `give_up` ends it, unless the scan ends altogether."""

    @property
    def at(self) -> int:
        """At which offset the hash is wanted next; it only grows."""

    def reach(self, content: Hasher) -> None:
        """Hear that everything up to `at` was hashed; the hash goes on to change."""

    def finish(self, digest: bytes) -> None:
        """Hear that the whole file was read, and did not change meanwhile."""

    def give_up(self) -> None:
        """Hear that it changed, or could not be read."""


Follow = Callable[[str, os.stat_result], Follower | None]
"""Is told of a large file, by its path, that is about to be read and is like none that was read before."""


@dataclass(frozen=True, slots=True)
class ScanOptions:
    """How to observe a workspace."""

    ignore: IgnoreRules
    delete_excluded: bool = False
    """What is ignored by now is observed as deleted."""
    no_delete: bool = False
    """What is missing keeps its entry."""
    rehash: bool = False
    """Every file is read again, whatever its stat says."""
    settle_seconds: float = 2.0
    """How long a file that changes while it is read is waited for, where nobody else judges (see scan)."""
    chunk_from_bytes: int = CHUNK_FROM_BYTES
    """Files from this size are cut into chunks where a base may be known."""
    allow_emptied: bool = False
    """An empty folder is taken for what it is."""
    selection: Selection | None = None
    """What there is to see: nothing is nested in it, and a folder that is empty now was emptied (spec J-22)."""
    memory: Memory | None = None
    """What was read of files that the recorded tree does not have."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A file that is still being written; its former entry stands."""

    path: str
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class ScanReport:
    """What a scan found."""

    changed: bool
    root: bytes
    files: int
    size_bytes: int
    hashed_files: int
    hashed_bytes: int
    waiting: list[Waiting]
    problems: list[Problem]
    """All that are known, also from earlier scans of other folders."""
    seconds: float
    remounted: bool
    """Every inode had changed, so that size and mtime were trusted; a re-hash is due."""
