"""An fsync that fails is believed: what it was for is made again, and nothing acknowledged is lost."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
STRIDE = int(os.environ.get("CRASH_STRIDE", "0")) or 7
"""One in so many fsyncs of a client fails with each run of the tests, others each time; `make crash` visits all."""


def swept(program: str, folder: Path, *words: object) -> list[str]:
    """Run one of the programs beside this file with the shim, and return what it prints."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C compiler to build the shim")
    shim = folder / "shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", shim, HERE / "failing_fsync.c", "-ldl"], check=True)
    done = subprocess.run(
        [sys.executable, HERE / program, folder / "points", *map(str, words)],
        env={**os.environ, "LD_PRELOAD": str(shim)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


def test_no_failing_fsync_loses_anything(tmp_path: Path) -> None:
    """Whichever fsync of a receipt, a tree or a checkpoint fails, the store is whole after the next start."""
    journalled, direct = (line.split() for line in swept("failing_fsync.py", tmp_path))
    assert "Corrupt" in journalled and "survived" in journalled
    # Without a journal each content and each folder that it goes to is fsynced before the commit.
    contents = folders_of_contents = 2
    assert direct[: contents + folders_of_contents] == ["Corrupt"] * (contents + folders_of_contents)


def test_no_failing_fsync_of_a_client_is_forgotten(tmp_path: Path) -> None:
    """Whichever fsync of its state or outbox fails, the push says so or does without; the next one makes it again.

    No number stands for two bundles, and no bundle file is there that is not recorded.
    """
    first = random.SystemRandom().randrange(1, STRIDE + 1)
    print(f"from {first} on")
    for line in swept("failing_fsync_client.py", tmp_path, first, STRIDE):
        found: list[tuple[str, int]] = json.loads(line)
        assert len(found) >= 20 // STRIDE
        if STRIDE == 1:  # among them a commit, which is refused, and a checkpoint, which is made again
            assert {code for path, code in found if path.endswith("-wal")} == {0, 8}
            assert [code for path, code in found if ".tar.zst." in path] == [1, 1]
