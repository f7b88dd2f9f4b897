"""When to look and where: hints, waiting files and timers become scans of the folders that may have changed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from deltasync.client.events import Say, What
from deltasync.client.hints import Dirt, Hints
from deltasync.client.ignore import IgnoreRules
from deltasync.client.observation import Follow
from deltasync.client.reread import Rereading
from deltasync.client.scan import IsSettled, ScanOptions, ScanReport, scan
from deltasync.client.watch import Coverage, NoSource, Place, Source

if TYPE_CHECKING:
    from deltasync.client.state import State
    from deltasync.config import Settings

BURST_SECONDS = 2.0
"""The longest that a burst of changes puts a look off."""
RETRY_SECONDS = 2.0
"""How long to wait after a look that failed, for example because the folder is not there."""
BARRIER_SECONDS = 10.0
"""How long a busy event source may take to say everything; past it, everything is looked at."""

OpenSource = Callable[[Place, Hints], Source]


class Lookout:
    """Everything that observes one workspace while it is watched; used by the watch loop's thread only."""

    def __init__(
        self,
        state: State,
        settings: Settings,
        *,
        barrier: Path,
        wake: Callable[[], None],
        say: Say,
        open_source: OpenSource,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Watch first, so that the first look, at everything, misses nothing that happens after it."""
        self._state, self._settings, self._say, self._clock = state, settings, say, clock
        self._open_source = open_source
        self._options = ScanOptions(
            ignore=self._rules(),
            delete_excluded=settings.delete_excluded,
            no_delete=settings.no_delete,
            rehash=settings.rehash,
            settle_seconds=settings.settle_seconds,
            chunk_from_bytes=settings.chunk_from_bytes,
            allow_emptied=settings.allow_mass_delete,
        )
        self.hints = Hints(wake, settle_seconds=settings.settle_seconds, clock=clock)
        self._watch_rules = self._rules()
        files = frozenset(self._watch_rules.files)
        self._place = Place(state.root, barrier, self._is_ignored, files)
        self._source = open_source(self._place, self.hints)
        self._coverage = Coverage("", 0, 0)
        self._full_at = clock()
        self._retry_at = -math.inf
        self._rereading = Rereading(state, settings.rehash_days, clock)
        self.looked_at: float | None = None
        """When the last look at everything began."""
        self.look_seconds = 0.0
        self.read = (0, 0)
        """How many files and bytes the look that goes on has read; (0, 0) between looks."""

    def due_at(self) -> float:
        """Tell when to look next."""
        heard_at = self.hints.due_at(self._settings.debounce_seconds, BURST_SECONDS)
        return max(min(self._full_at, heard_at, self._rereading.due_at()), self._retry_at)

    def look(
        self,
        *,
        everything: bool = False,
        is_asked: bool = False,
        allow_emptied: bool = False,
        recorded: Callable[[], None] | None = None,
        follow: Follow | None = None,
    ) -> ScanReport | None:
        """Look at what is dirty, and at everything when it is time; None when nothing was dirty.

        is_asked: somebody waits for the answer, so files do not have to settle, only to hold still while they are read.
        allow_emptied: take an empty workspace for one whose files were deleted.
        recorded: called when a part of what is looked at was recorded. follow: told of large files that are new.
        """
        began = self._clock()
        if everything or began >= self._full_at:
            self.hints.everything()
        dirt = self._take(self.hints.waiting_folders() if is_asked else frozenset())
        if dirt.folders is not None and not dirt.folders:
            return None if is_asked else self._reread(began)
        options = replace(self._options, allow_emptied=allow_emptied or self._options.allow_emptied)
        report = self._scan(options, dirt.folders, None if is_asked else self.hints.is_settled, recorded, follow)
        self.hints.looked(dirt, at=began)
        if dirt.folders is None:
            self.looked_at, self.look_seconds = began, self._clock() - began
            self._full_at = self._clock() + self._settings.rescan_seconds
            # Asked for what was there when the watcher began, not for what happens later.
            self._options = replace(self._options, rehash=False, allow_emptied=False)
        return report

    def look_again(self, folders: Collection[str]) -> None:
        """Look at folders whose files changed while they were sent; what is still being written waits."""
        scan(self._state, self._options, folders=folders, is_settled=self.hints.is_settled)

    def catch_up(self) -> bool:
        """Wait until every change made before now is among the hints; if that cannot be told, everything is dirty."""
        if self._source.barrier(BARRIER_SECONDS):
            return True
        self.hints.everything()
        return False

    def coverage(self) -> Coverage:
        """Tell how much of the workspace is watched."""
        return self._coverage

    def close(self) -> None:
        """Stop watching."""
        self._source.close()

    def _reread(self, now: float) -> ScanReport | None:
        """Read some folders again whatever their times say, if it is time for it."""
        if now < self._rereading.due_at():
            return None
        folders = self._rereading.slice()
        report = None
        if folders:
            report = self._scan(replace(self._options, rehash=True), folders, self.hints.is_settled)
        self._rereading.done(folders)
        return report

    def _scan(
        self,
        options: ScanOptions,
        folders: Collection[str] | None,
        is_settled: IsSettled | None,
        recorded: Callable[[], None] | None = None,
        follow: Follow | None = None,
    ) -> ScanReport:
        try:
            report = scan(
                self._state,
                options,
                folders=folders,
                is_settled=is_settled,
                progress=self._note,
                recorded=recorded,
                follow=follow,
            )
        except BaseException:
            self.hints.everything()  # what was taken was not looked at
            self._retry_at = self._clock() + RETRY_SECONDS
            raise
        finally:
            self.read = (0, 0)
        self._retry_at = -math.inf
        return report

    def _take(self, more: frozenset[str]) -> Dirt:
        dirt = self.hints.take()
        if not self._source.is_alive():
            self._reopen()
            dirt = replace(dirt, folders=None, reasons=(*dirt.reasons, "the event source ended"))
        elif dirt.folders is None and isinstance(self._source, NoSource):
            self._reopen()  # the system may have room for one by now
        elif dirt.is_lost or dirt.are_rules_changed or (dirt.folders is None and not self._coverage.is_whole):
            if dirt.are_rules_changed:
                self._watch_rules = self._rules()
            self._source.rebuild()
            self.hints.take()  # all folders, adopted again: everything is looked at anyway
        for reason in dirt.reasons:
            self._say(What.RESCAN, f"{reason}; looking at everything", reason=reason)
        self._tell_coverage()
        return dirt if dirt.folders is None else replace(dirt, folders=dirt.folders | more)

    def _reopen(self) -> None:
        self._source.close()
        self._source = self._open_source(self._place, self.hints)
        self.hints.take()

    def _tell_coverage(self) -> None:
        coverage, before = self._source.coverage(), self._coverage
        self._coverage = coverage
        if (coverage.is_whole, coverage.reason) == (before.is_whole, before.reason):
            return
        facts = {"watched_folders": coverage.watched_folders, "unwatched_folders": coverage.unwatched_folders}
        if coverage.is_whole:
            self._say(What.COVERAGE, "every folder is watched", **facts)
            return
        every = f"{self._settings.rescan_seconds:g} s"
        self._say(
            What.COVERAGE,
            f"{coverage.unwatched_folders} folder(s) are not watched ({coverage.reason}); "
            f"changes there are noticed every {every}",
            reason=coverage.reason,
            **facts,
        )

    def _note(self, files: int, size_bytes: int) -> None:
        self.read = (files, size_bytes)

    def _is_ignored(self, path: str, is_directory: bool) -> bool:
        return self._watch_rules.is_ignored(path, is_directory)

    def _rules(self) -> IgnoreRules:
        settings = self._settings
        return IgnoreRules(self._state.root, settings.exclude, settings.include, settings.gitignore)
