"""What was heard of changes and not yet looked at: dirty folders, files being written, lost events."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

FOLDERS_MAX = 10_000
"""With more dirty folders than this, looking at everything is cheaper than remembering each."""
WRITERS_MAX = 50_000
RECENT_SECONDS = 0.05
"""How young a change may be whose events a busy reader has not read yet."""


@dataclass(frozen=True, slots=True)
class Dirt:
    """What must be looked at: these folders, or everything when `folders` is None."""

    folders: frozenset[str] | None
    is_lost: bool = False
    """Events or watches were lost: the watches must be built again before the look."""
    are_rules_changed: bool = False
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Waiting:
    """A file that is still being written: its size, how fast it grows, and when it may be looked at again."""

    path: str
    size: int
    mtime_ns: int
    since: float
    looked_at: float
    due: float
    bytes_per_second: float


class Hints:
    """The meeting point of an event source's threads, which add, and the watch loop, which takes.

    Everything here is a hint: a scan decides what is true. Hints repeat without harm, and a loss is a hint as well.
    """

    def __init__(
        self,
        wake: Callable[[], None],
        *,
        settle_seconds: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Start with nothing heard and nothing covered; `wake` is called whenever there is something new to take."""
        self._wake, self._clock, self._wall = wake, clock, wall
        self._settle = settle_seconds
        self._lock = threading.Lock()
        self._folders: set[str] | None = set()
        self._first_at = self._last_at = math.inf
        self._is_lost = self._are_rules_changed = False
        self._reasons: list[str] = []
        self._writing: dict[str, float] = {}
        self._closed: dict[str, float] = {}
        """Files heard to be complete where silence does not say so yet."""
        self._fresh: dict[str, float] = {}
        self._covered_since = math.inf
        self._waiting: dict[str, Waiting] = {}

    # Called by the event source.

    def changed(self, *folders: str) -> None:
        """Hear that entries of these folders may have changed."""
        with self._lock:
            is_first = self._heard()
            self._add(folders)
        if is_first:
            self._wake()

    def written(self, folder: str, path: str) -> None:
        """Hear that a file was created or written and that its writer may go on."""
        with self._lock:
            self._writing[path] = self._clock()
            self._closed.pop(path, None)
            if len(self._writing) > WRITERS_MAX:
                self._writing.clear()
                self._covered_since = self._clock()  # forgotten writers are judged by their file's age
        self.changed(folder)

    def closed(self, folder: str, path: str) -> None:
        """Hear that a file is complete: closed by its writer, or moved into place."""
        with self._lock:
            self._writing.pop(path, None)
            now = self._clock()
            if now - self._heard_since(folder) < self._settle and len(self._closed) < WRITERS_MAX:
                self._closed[path] = now
        self.changed(folder)

    def adopted(self, folders: Iterable[str]) -> None:
        """Hear that these folders are watched from now on; what happened in them before was not heard."""
        with self._lock:
            is_first = self._heard()
            now, found = self._clock(), list(folders)
            self._fresh.update(dict.fromkeys(found, now))
            if len(self._fresh) > FOLDERS_MAX:
                self._fresh.clear()
                self._covered_since = max(self._covered_since, now)
            self._add(found)
        if is_first:
            self._wake()

    def covered(self, *, is_whole: bool) -> None:
        """Hear that the watches were built: from now on, silence about a file means that nobody writes it.

        is_whole: every folder is watched and closing is reported; otherwise silence means nothing.
        """
        with self._lock:
            self._fresh.clear()
            self._covered_since = self._clock() if is_whole else math.inf

    def lost(self, reason: str) -> None:
        """Hear that events were lost: everything is dirty, and the watches may be wrong."""
        with self._lock:
            self._heard()
            self._folders, self._is_lost, self._covered_since = None, True, math.inf
            if reason not in self._reasons:
                self._reasons.append(reason)
        self._wake()

    def rules_changed(self) -> None:
        """Hear that an ignore file changed: everything is dirty, under other rules."""
        with self._lock:
            self._heard()
            self._folders, self._are_rules_changed = None, True
        self._wake()

    def everything(self) -> None:
        """Ask for a look at everything, for example because it is time for one."""
        with self._lock:
            self._heard()
            self._folders = None

    # Called by the watch loop.

    def due_at(self, debounce_seconds: float, burst_seconds: float) -> float:
        """Tell when to look: after a quiet moment, at the latest some time after the first hint; inf without a hint."""
        with self._lock:
            burst = min(self._last_at + debounce_seconds, self._first_at + burst_seconds)
            return min([burst, *(waiting.due for waiting in self._waiting.values())])

    def take(self) -> Dirt:
        """Take all that was heard, and the folders of waiting files whose time has come."""
        now = self._clock()
        with self._lock:
            folders = self._folders
            if folders is not None:
                folders |= {_folder(path) for path, waiting in self._waiting.items() if waiting.due <= now}
            dirt = Dirt(
                None if folders is None else frozenset(folders),
                self._is_lost,
                self._are_rules_changed,
                tuple(self._reasons),
            )
            self._folders, self._reasons, self._is_lost, self._are_rules_changed = set(), [], False, False
            self._first_at = self._last_at = math.inf
            horizon = now - self._settle
            self._writing = {path: at for path, at in self._writing.items() if at > horizon}
            self._closed = {path: at for path, at in self._closed.items() if at > horizon}
            self._fresh = {folder: at for folder, at in self._fresh.items() if at > horizon}
            return dirt

    def looked(self, dirt: Dirt, *, at: float) -> None:
        """Forget the waiting files of the folders just looked at, from the time `at`, that the look met no more."""
        with self._lock:
            self._waiting = {
                path: waiting
                for path, waiting in self._waiting.items()
                if waiting.looked_at >= at or (dirt.folders is not None and _folder(path) not in dirt.folders)
            }

    def is_settled(self, path: str, status: os.stat_result) -> bool:
        """Tell whether a changed file was closed by its writer or has not changed for the settle time.

        A file that is not settled is remembered with the time to look again.
        """
        now = self._clock()
        with self._lock:
            before = self._waiting.get(path)
            is_same = before is not None and (before.size, before.mtime_ns) == (status.st_size, status.st_mtime_ns)
            since = before.since if before is not None and is_same else now
            due = self._settles_at(path, status, now=now, since=since)
            if due <= now:
                self._waiting.pop(path, None)
                return True
            rate = 0.0
            if before is not None and now > before.looked_at:
                rate = (status.st_size - before.size) / (now - before.looked_at)
            self._waiting[path] = Waiting(path, status.st_size, status.st_mtime_ns, since, now, due, rate)
            return False

    def waiting(self) -> list[Waiting]:
        """Return the files that are still being written."""
        with self._lock:
            return sorted(self._waiting.values(), key=lambda waiting: waiting.path)

    def waiting_folders(self) -> frozenset[str]:
        """Return the folders of the files that are still being written."""
        with self._lock:
            return frozenset(map(_folder, self._waiting))

    # Called with the lock held.

    def _heard(self) -> bool:
        is_first = self._first_at == math.inf
        self._last_at = self._clock()
        if is_first:
            self._first_at = self._last_at
        return is_first

    def _add(self, folders: Iterable[str]) -> None:
        if self._folders is None:
            return
        self._folders.update(folders)
        if len(self._folders) > FOLDERS_MAX:
            self._folders = None

    def _settles_at(self, path: str, status: os.stat_result, *, now: float, since: float) -> float:
        written = self._writing.get(path)
        if written is not None:
            return written + self._settle
        if path in self._closed:
            return now
        age = self._wall() - status.st_mtime
        if now - self._heard_since(_folder(path)) >= self._settle:
            return now + RECENT_SECONDS - age if 0 <= age < RECENT_SECONDS else now
        return now if age >= self._settle else since + self._settle

    def _heard_since(self, folder: str) -> float:
        return max(self._covered_since, self._fresh.get(folder, -math.inf))


def _folder(path: str) -> str:
    return path.rpartition("/")[0]
