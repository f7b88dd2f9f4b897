"""The project around the code: what a first-time reader runs works."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("REMOTE_UPLOAD_")}
    return subprocess.run(
        command, cwd=ROOT, env=environment | variables, capture_output=True, text=True, timeout=120, check=False
    )


def make(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return run("make", "--old-file=setup", *arguments, **variables)


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def test_the_demo_ends_well_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """The demo shows nine changes, a job that sends nothing the second time, and a replay with equal roots."""
    ran = run(sys.executable, "-m", "bench.demo", TMPDIR=str(tmp_path))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    lines = ran.stdout.splitlines()
    assert sum(" = " in line and "!=" not in line for line in lines) == 10
    assert [line for line in lines if line.startswith("  once more") and " 0 B sent" in line]
    assert lines[-1].startswith("All roots are equal.")
    assert list(tmp_path.glob("deltasync-demo-*")) == []


def test_the_reference_bundles_replay_to_the_expected_root() -> None:
    """Replaying the good chain into a fresh store ends with the root that the index names."""
    ran = run(sys.executable, "-m", "bench.replay")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.endswith("\nequal\n")


@needs_make
def test_watch_remote_says_which_variable_is_missing() -> None:
    """Without REMOTE_UPLOAD_ENDPOINT the recipe names the variable and exits 1."""
    ran = make("watch-remote")
    assert ran.returncode == 2
    assert "REMOTE_UPLOAD_ENDPOINT is missing" in ran.stderr
    assert "Error 1" in ran.stderr


@needs_make
@pytest.mark.parametrize("target", ["watch", "watch-remote"])
def test_a_missing_watch_root_is_named(target: str, tmp_path: Path) -> None:
    """A folder that is not there is named, with the variable that names another."""
    absent = tmp_path / "absent"
    ran = make(target, f"WATCH_ROOT={absent}", "REMOTE_UPLOAD_ENDPOINT=http://127.0.0.1:1")
    assert ran.returncode == 2
    assert f"no folder {absent}" in ran.stderr


def test_the_benchmark_writes_its_results(tmp_path: Path) -> None:
    """A tiny run of our side alone compares every tree and writes the tables."""
    results = tmp_path / "RESULTS.md"
    options = ["--scale", "0.001", "--runs", "1", "--only", "small", "--only", "huge", "--contestant", "deltasync"]
    ran = run(sys.executable, "-m", "bench", *options, "--work", str(tmp_path), "--results", str(results))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    page = results.read_text()
    assert "| first sync |" in page and "| fetch |" in page
    assert re.search(r"peak memory, huge, server \| 150.0 MiB \| \d", page)
    assert "content bytes sent | 0 B | 0 B | met |" in page
    assert list(tmp_path.glob("deltasync-bench-*")) == []
