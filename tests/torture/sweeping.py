"""Runs tests/crash/sweep.py for the harnesses that kill a command at a call, or have the call fail."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from torture.harness import PROJECT, Result, Work

CRASH = PROJECT / "tests/crash"
ROUND_SECONDS = 45.0
"""One scenario is left for the next one after that."""


def build_shim(folder: Path) -> Path | None:
    """Compile the library that kills or fails a call; None where there is no compiler for it."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    library = folder / "shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, CRASH / "shim.c", "-ldl"], check=True)
    return library


def visit(work: Work, pairs: Sequence[tuple[str, str]], strides: Sequence[int], *, kills_again: bool) -> Result:
    """Sweep over pairs of a scenario and a moment, in an order of the seed's, each time from another point on.

    kills_again: every other sweep also kills the command that repeats the killed one.
    """
    result = Result()
    shim = build_shim(work.scratch)
    if shim is None:
        result.skipped["all"] = "needs Linux and a C compiler"
        return result
    chance = random.Random(work.seed)
    for number, (scenario, moment) in enumerate(_endless(chance, pairs)):
        if not work.goes_on(result):
            return result
        stride = chance.choice(strides)
        words = [scenario, work.scratch / str(number), "--moment", moment, "--stride", str(stride)]
        words += ["--first", str(chance.randrange(1, stride + 1)), "--most", str(work.points - result.points)]
        words += ["--seconds", str(max(0.0, min(ROUND_SECONDS, work.deadline - time.monotonic())))]
        if kills_again and number % 2:
            words += ["--again", str(chance.randrange(2**32))]
        _sweep(words, shim, work.scratch, f"{scenario} {moment}", result)
        shutil.rmtree(work.scratch / str(number), ignore_errors=True)
    return result


def _endless(chance: random.Random, pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    while True:
        yield from chance.sample(pairs, len(pairs))


def _sweep(words: Sequence[object], shim: Path, scratch: Path, kind: str, result: Result) -> None:
    environment = {**os.environ, "LD_PRELOAD": str(shim), "DELTASYNC_HOME": str(scratch / "home")}
    program = [sys.executable, str(CRASH / "sweep.py"), *map(str, words)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stdout + done.stderr).strip()
        cause = said[said.rfind("AssertionError") :] if "AssertionError" in said else said
        result.faults.append(f"{' '.join(map(str, words))}: {cause[-1500:]}")
        result.points += 1
        return
    points = int(json.loads(done.stdout.splitlines()[-1])["points"])
    result.points += points
    result.count(kind, points)
