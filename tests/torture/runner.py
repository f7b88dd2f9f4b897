"""Runs harnesses in processes of their own, against the product as it is or with a defect planted in a copy of it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torture.harness import PROJECT, Defect, Result

GRACE_SECONDS = 60.0
"""How much longer than it may a harness can take to stop by itself; then it is killed, which is a fault."""
_FAST = Path("/dev/shm")


@dataclass(frozen=True)
class Outcome:
    """What came of one run of a harness."""

    result: Result
    died: str
    """Why the run gave no result, if it gave none."""
    seconds: float

    @property
    def is_untried(self) -> bool:
        """Nothing of it can be tried on this machine, and the result says why."""
        return not self.died and not self.result.points and bool(self.result.skipped)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Lend an empty folder, in memory where that can be: no promise of durability is tried in it."""
    base = _FAST if _FAST.is_dir() and os.access(_FAST, os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="torture-", dir=base))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_harness(
    name: str,
    *,
    seed: int,
    points: int,
    seconds: float,
    product: Path = PROJECT,
    stop_at_first: bool = False,
    hint: str = "",
) -> Outcome:
    """Run a harness; it stops by itself when its points are visited or its time is over."""
    began = time.monotonic()
    with scratch_folder() as folder:
        (folder / "work").mkdir()
        answer = folder / "answer.json"
        asked = {
            "harness": name,
            "seed": seed,
            "points": points,
            "seconds": seconds,
            "product": str(product),
            "scratch": str(folder / "work"),
            "stop_at_first": stop_at_first,
            "hint": hint,
            "answer": str(answer),
        }
        died = _work(asked, product, seconds + GRACE_SECONDS)
        taken = time.monotonic() - began
        if not answer.exists():
            return Outcome(Result(), died or "the process ended without a result", taken)
        found = json.loads(answer.read_text(encoding="utf-8"))
    why = found.pop("died")
    return Outcome(Result(**found), why, taken)


_running: set[subprocess.Popen[bytes]] = set()


def call_off_all() -> None:
    """Have every harness that runs end soon, with what it has found so far."""
    for process in list(_running):
        process.terminate()


def unmeasured() -> dict[str, str]:
    """Return the environment without what has coverage measure a child: a copy of the product is gone afterwards."""
    return {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}


def _work(asked: dict[str, object], product: Path, seconds: float) -> str:
    """Let a worker do something; returns what it said when it ended badly."""
    # What is named here comes before the installed packages, also for the commands that a harness starts.
    names = (product, product / "server", PROJECT / "tests")
    environment = {**unmeasured(), "PYTHONPATH": os.pathsep.join(map(str, names)), "PYTHONHASHSEED": "0"}
    process = subprocess.Popen(
        [sys.executable, "-X", "faulthandler", "-m", "torture.worker"],
        cwd=str(asked["scratch"]),
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    _running.add(process)
    try:
        _, stderr = process.communicate(json.dumps(asked).encode(), timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # it says where it hangs
        with contextlib.suppress(subprocess.TimeoutExpired):
            _, stderr = process.communicate(timeout=5)
            return f"it hangs: {stderr.decode(errors='replace')[-3000:]}"
        return "it hangs"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and whatever it started
        process.wait()
        _running.discard(process)
    return f"exit {process.returncode}: {stderr.decode(errors='replace')[-3000:]}" if process.returncode else ""


@contextmanager
def planted(defect: Defect) -> Iterator[Path]:
    """Lend a copy of the product with a defect in it."""
    with scratch_folder() as folder:
        for part in ("deltasync", "server"):
            shutil.copytree(PROJECT / part, folder / part)  # with what is compiled: it keeps the times of its sources
        path = folder / defect.path
        text = path.read_text(encoding="utf-8")
        assert text.count(defect.old) == 1, f"{defect.name}: {defect.path} has the text {text.count(defect.old)} times"
        path.write_text(text.replace(defect.old, defect.new), encoding="utf-8")
        yield folder


def catch(name: str, defect: Defect, *, seed: int, points: int, seconds: float) -> tuple[Outcome, str]:
    """Run a harness against a planted defect; returns why it was missed, '' where it was caught."""
    with planted(defect) as product:
        options = {"product": product, "stop_at_first": True, "hint": defect.hint}
        outcome = run_harness(name, seed=seed, points=points, seconds=seconds, **options)  # type: ignore[arg-type]
    if outcome.died:
        return outcome, outcome.died
    return outcome, "" if outcome.result.faults else f"nothing was found at {outcome.result.points} points"


def told(outcome: Outcome) -> dict[str, object]:
    """Return what a run's record says of an outcome."""
    record: dict[str, object] = dataclasses.asdict(outcome.result)
    return record | ({"died": outcome.died} if outcome.died else {}) | {"seconds": round(outcome.seconds, 1)}
