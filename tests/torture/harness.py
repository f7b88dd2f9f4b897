"""What a harness of `make torture` is made of.

A harness is a module of this package with

- `NAME`, which is also the module's name, and `GOAL`, how many points a full run visits;
- `SLICE`, how many of them `make test` visits, and `WEIGHT`, its share of the time that a run has;
- `DEFECTS`, at least two, each an exact text of the product that the harness must notice when it is replaced;
- `run(work)`, which visits at most `work.points` points before `work.deadline` and says what it found.

To add one: write the module, and put its name into `NAMES`. A point is whatever the harness counts: a bundle, a mutant,
a request, a step, a kill. All that is random comes from `work.seed`, and a fault is one line that says how to meet it
again. What cannot be tried on this machine is `skipped`, with the reason, and never counts as passed.
"""

from __future__ import annotations

import importlib
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, cast

PROJECT = Path(__file__).resolve().parents[2]
NAMES = ("bits", "network", "routes", "hostile", "swaps", "powercut", "world", "fuzz", "diskfaults", "kills")
"""Every harness, those first that reach their goal soonest: what they leave of their time is the others'."""


@dataclass(frozen=True)
class Defect:
    """A planted defect: one text in one file of the product, and what takes its place."""

    name: str
    row: str
    """The row of spec/7-trust.md that it breaks."""
    path: str
    """Below the repository."""
    old: str
    """Stands exactly once in the file."""
    new: str
    hint: str = ""
    """Which points to begin with, in a word that the harness understands."""


@dataclass(frozen=True)
class Work:
    """One run of a harness."""

    seed: int
    points: int
    deadline: float
    """By `time.monotonic()`."""
    scratch: Path
    """An empty folder for it alone."""
    stop_at_first: bool = False
    """One fault is enough: a defect was planted."""
    hint: str = ""

    def goes_on(self, result: Result) -> bool:
        """Tell whether another point is to be visited."""
        if result.faults and (self.stop_at_first or len(result.faults) >= FAULTS_MAX):
            return False
        return result.points < self.points and time.monotonic() < self.deadline and not _is_called_off.is_set()


_is_called_off = threading.Event()


def call_off() -> None:
    """Have what runs in this process end before its next point, with what it has found so far."""
    _is_called_off.set()


FAULTS_MAX = 20
"""A harness that has found so many faults has said enough."""


@dataclass
class Result:
    """What a run of a harness did and found."""

    points: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    """What the points were, or what became of them."""
    faults: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """What was not tried, and why."""

    def count(self, what: str, number: int = 1) -> None:
        """Count something."""
        self.counts[what] = self.counts.get(what, 0) + number


class Harness(Protocol):
    """The module of a harness."""

    NAME: str
    GOAL: int
    SLICE: int
    WEIGHT: int
    DEFECTS: tuple[Defect, ...]

    def run(self, work: Work) -> Result:
        """Visit points."""


def load(name: str) -> Harness:
    """Return a harness by its name."""
    return cast(Harness, importlib.import_module(f"torture.{name}"))
