"""Reading every file again, a few folders at a time: what changed behind its times is found in the end."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from deltasync.client.state import REHASH_DUE
from deltasync.core.manifest import Kind
from deltasync.core.tree import walk

if TYPE_CHECKING:
    from deltasync.client.state import State

DAY_SECONDS = 86_400.0
PACE_SECONDS = 60.0
"""How often a few folders are read again, in a round that takes days."""
URGENT_SECONDS = 1.0
"""How often, when every inode had changed and only sizes and times vouch for the files."""
SLICE_BYTES = 32 << 20
"""Where a slice ends, so that changes do not wait long behind it; a larger folder is a slice of its own."""
_CURSOR = "reread_after"
"""The meta key of the last folder that was read again; a round goes on with the one after it."""
_BEGUN = "begun"
"""The value of REHASH_DUE once a round has begun at the first folder for its sake."""


class Rereading:
    """Chooses which folders to read again, and when; a round goes on where an earlier watcher ended."""

    def __init__(self, state: State, days: float, clock: Callable[[], float]) -> None:
        """Plan rounds of so many days; 0 reads again only what the state says is due."""
        self._state, self._clock = state, clock
        self._days = days
        self._folders: list[tuple[str, int]] = []
        """What is left of this round, last first: each folder with the bytes of its files."""
        self._total = 0
        self._owed = 0.0
        self._next_at = clock()

    def due_at(self) -> float:
        """Tell when to read the next slice; never, when nothing is to be read again."""
        if self._is_urgent() or self._days > 0:
            return self._next_at
        return math.inf

    def slice(self) -> list[str]:
        """Return the folders to read now; the caller reads them and then says `done`."""
        if not self._folders or self._state.get_meta(REHASH_DUE) not in (None, _BEGUN):
            self._plan()
        count = len(self._folders) if self._is_urgent() else self._allowance()
        chosen: list[str] = []
        size_bytes = 0
        for folder, folder_bytes in reversed(self._folders[-count:] if count else []):
            size_bytes += folder_bytes
            if chosen and size_bytes > SLICE_BYTES:
                break
            chosen.append(folder)
        return chosen

    def done(self, folders: list[str]) -> None:
        """Record that these folders were read; the end of a round is the end of what was due."""
        self._next_at = self._clock() + (URGENT_SECONDS if self._is_urgent() else PACE_SECONDS)
        if not folders:
            return
        del self._folders[-len(folders) :]
        self._owed -= len(folders)
        with self._state.writing():
            self._state.set_meta(_CURSOR, folders[-1] if self._folders else None)
            if not self._folders:
                self._state.set_meta(REHASH_DUE, None)

    def _is_urgent(self) -> bool:
        return self._state.get_meta(REHASH_DUE) is not None

    def _plan(self) -> None:
        """List the folders of a round, from the one after the last that was read."""
        sizes = {"": 0}
        for path, entry in walk(self._state.observed_root(), self._state.load):
            if entry.kind is Kind.DIRECTORY:
                sizes[path] = 0
            else:
                sizes[path.rpartition("/")[0]] += entry.size
        after = self._state.get_meta(_CURSOR) or ""
        if self._state.get_meta(REHASH_DUE) not in (None, _BEGUN):
            after = ""
            with self._state.writing():
                self._state.set_meta(REHASH_DUE, _BEGUN)
        self._folders = sorted(((folder, size) for folder, size in sizes.items() if folder > after), reverse=True)
        if not after or not self._folders:
            self._folders = sorted(sizes.items(), reverse=True)
        self._total = len(sizes)

    def _allowance(self) -> int:
        """Return how many folders may be read now, so that a round takes its days."""
        self._owed += self._total * PACE_SECONDS / (self._days * DAY_SECONDS)
        return max(0, int(self._owed))
