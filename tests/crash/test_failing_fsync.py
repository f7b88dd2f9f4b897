"""An fsync that fails is believed: what it was for is made again, and nothing acknowledged is lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def test_no_failing_fsync_loses_anything(tmp_path: Path) -> None:
    """Whichever fsync of a receipt, a tree or a checkpoint fails, the store is whole after the next start."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C compiler to build the shim")
    shim = tmp_path / "shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", shim, HERE / "failing_fsync.c", "-ldl"], check=True)
    words = [sys.executable, HERE / "failing_fsync.py", tmp_path / "points"]
    done = subprocess.run(
        words, env={**os.environ, "LD_PRELOAD": str(shim)}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    journalled, direct = (line.split() for line in done.stdout.splitlines())
    assert "Corrupt" in journalled and "survived" in journalled
    # Without a journal each content and each folder that it goes to is fsynced before the commit.
    contents = folders_of_contents = 2
    assert direct[: contents + folders_of_contents] == ["Corrupt"] * (contents + folders_of_contents)
