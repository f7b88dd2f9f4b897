"""The run behind `make torture`: every planted defect, then every harness, two at a time, and one record of it all.

    python -m torture [--minutes N] [--seed N] [--out FILE] [--only NAME…] [--no-defects] [--point-scale X]

The exit code is 0 only if no harness found a fault, none died, and every planted defect was caught.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from torture.harness import NAMES, PROJECT, load
from torture.runner import call_off_all, catch, run_harness, told

WORKERS = 2
DEFECT_SECONDS = 90.0
_VERSIONS = ("deltasync", "zstandard", "msgspec", "blake3", "fastapi", "uvicorn", "hypothesis", "schemathesis")


@dataclass
class Run:
    """One run, and the record of it."""

    seed: int
    ends: float
    names: list[str]
    has_defects: bool
    harnesses: dict[str, dict[str, object]] = field(default_factory=dict)
    defects: list[dict[str, object]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _weights: dict[str, int] = field(default_factory=dict)
    """Of the harnesses that are not over."""

    def work(self) -> None:
        """Do everything, two at a time."""
        planted = [(name, defect) for name in self.names for defect in load(name).DEFECTS] if self.has_defects else []
        self._weights = {name: load(name).WEIGHT for name in self.names}
        with ThreadPoolExecutor(WORKERS) as pool:
            each: list[Callable[[], None]] = [lambda n=n, d=d: self._try(n, d) for n, d in planted]  # type: ignore[misc]
            each += [lambda n=n: self._run(n) for n in self.names]  # type: ignore[misc]
            for future in [pool.submit(one) for one in each]:
                future.result()

    def end(self) -> None:
        """Have a run that takes too long end with what it has: each harness that is left gets a moment."""
        self.ends = time.monotonic()
        call_off_all()

    def _try(self, name: str, defect: object) -> None:
        from torture.harness import Defect

        assert isinstance(defect, Defect)
        seed = self.seed
        outcome, missed = catch(name, defect, seed=seed, points=load(name).GOAL, seconds=DEFECT_SECONDS)
        record: dict[str, object] = {"harness": name, "name": defect.name, "row": defect.row, "path": defect.path}
        record |= {"caught": not missed, "points": outcome.result.points, "seconds": round(outcome.seconds, 1)}
        if outcome.is_untried:
            record["untried"], word = outcome.result.skipped, "untried"
        else:
            record |= {"missed": missed} if missed else {"by": outcome.result.faults[0][:300]}
            word = "MISSED" if missed else "caught"
        with self._lock:
            self.defects.append(record)
        _say(f"{word} {name}: {defect.name} ({outcome.seconds:.1f} s) {missed[-2000:]}")

    def _run(self, name: str) -> None:
        harness, seconds = load(name), self._share(name)
        _say(f"begin  {name}: {harness.GOAL} points, at most {seconds:.0f} s")
        outcome = run_harness(name, seed=self.seed, points=harness.GOAL, seconds=seconds)
        with self._lock:
            del self._weights[name]
            self.harnesses[name] = {"goal": harness.GOAL, **told(outcome)}
        faults = [*outcome.result.faults, *([outcome.died] if outcome.died else [])]
        _say(f"end    {name}: {outcome.result.points} points, {len(faults)} faults, {outcome.seconds:.0f} s")
        for fault in faults:
            _say(f"FAULT  {name}: {fault}")

    def _share(self, name: str) -> float:
        """Return how long a harness may take: its part, by weight, of what both workers have left."""
        with self._lock:
            left = self.ends - time.monotonic()
            begun = list(self._weights)  # those before it are under way or over: order is that of `names`
            later = sum(self._weights[each] for each in begun[begun.index(name) :])
            return max(5.0, min(left, WORKERS * left * self._weights[name] / later))

    @property
    def is_good(self) -> bool:
        """Nothing was found, and every planted defect was."""
        bad = any(each["faults"] or "died" in each for each in self.harnesses.values())
        is_missed = any(not each["caught"] and "untried" not in each for each in self.defects)
        return not bad and not is_missed and len(self.harnesses) == len(self.names)


def _say(line: str) -> None:
    print(line, flush=True)


def _git(*words: str) -> str:
    found = subprocess.run(["git", *words], cwd=PROJECT, capture_output=True, text=True, check=False)
    return found.stdout.strip()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "sqlite": sqlite3.sqlite_version}
    found |= {"kernel": platform.release(), "cores": str(os.cpu_count())}
    for name in _VERSIONS:
        try:
            found[name] = version(name)
        except ModuleNotFoundError:
            found[name] = "none"
    return found


def main() -> int:
    """Run, and write the record."""
    parser = argparse.ArgumentParser(prog="torture")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--out", type=Path, default=PROJECT / "build/torture.json")
    parser.add_argument("--only", nargs="*", default=list(NAMES), choices=NAMES)
    parser.add_argument("--no-defects", action="store_true")
    words = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if words.seed is None else words.seed
    began, commit = time.monotonic(), _git("rev-parse", "HEAD") + ("+" if _git("status", "--porcelain") else "")
    _say(f"seed {seed}: repeat with SEED={seed}")
    run = Run(seed, began + 60 * words.minutes, words.only, not words.no_defects)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: run.end())
    run.work()
    record = {
        "seed": seed,
        "commit": commit,
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - (time.monotonic() - began))),
        "seconds": round(time.monotonic() - began, 1),
        "good": run.is_good,
        "versions": _versions(),
        "harnesses": run.harnesses,
        "defects": {"planted": len(run.defects), "caught": sum(bool(each["caught"]) for each in run.defects)},
        "each_defect": run.defects,
    }
    words.out.parent.mkdir(parents=True, exist_ok=True)
    words.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    _say(f"wrote {words.out}: {'good' if run.is_good else 'FAULTS OR MISSED DEFECTS'}")
    return 0 if run.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
