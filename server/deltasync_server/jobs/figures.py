"""How long the steps of a job take, and what all jobs come to since the server began (spec J-80, J-82)."""

from __future__ import annotations

import threading
import time
from collections import Counter
from datetime import UTC, datetime

import msgspec

from deltasync.core.job_metrics import Metrics, Steps
from deltasync.core.jobs import State

QUEUED, STAGED, RUN, COLLECTED = "queued_seconds", "staged_seconds", "run_seconds", "collected_seconds"
_SUMMED = ("files_in", "bytes_in", "files_out", "bytes_out", QUEUED, STAGED, RUN, COLLECTED, "error_count")
_OVER = tuple(state for state in State if state.is_over)


class Stopwatch:
    """Measures one job from the moment at which its turn came."""

    def __init__(self, created_at: str) -> None:
        """created_at: when the job was queued, as its row says."""
        self._seconds = {QUEUED: _since(created_at)}
        self._step, self._began = STAGED, time.monotonic()

    def begin(self, step: str) -> None:
        """Note that a step is over and another one begins."""
        at = time.monotonic()
        self._seconds[self._step] = self._seconds.get(self._step, 0.0) + at - self._began
        self._step, self._began = step, at

    def steps(self) -> Steps:
        """Return what was measured until now."""
        self.begin(self._step)
        return Steps(**{name: round(seconds, 6) for name, seconds in self._seconds.items()})


class Tally:
    """Counts the jobs that end; any thread may."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counted: Counter[str] = Counter()

    def count(self, state: State, metrics: Metrics | None = None) -> None:
        """Count a job that is over."""
        found = msgspec.structs.asdict(metrics) if metrics is not None else {}
        with self._lock:
            self._counted[state.value] += 1
            for name in _SUMMED:
                self._counted[name] += found.get(name, 0)

    def figures(self) -> dict[str, float]:
        """Return the numbers for /metrics; all only grow."""
        with self._lock:
            states = {f"jobs_{state}_total": float(self._counted[state.value]) for state in _OVER}
            return states | {f"job_{name}_total": float(self._counted[name]) for name in _SUMMED}


def _since(moment: str) -> float:
    """Return the seconds since a moment, by the clock that it was written with; none where that was set back."""
    return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds())
