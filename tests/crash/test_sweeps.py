"""Every command survives being killed at any change that it makes to the file system.

`make test` visits a sample of the points, another one each time; `make crash` (CRASH_STRIDE=1) visits every one.
"""

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
STRIDE = int(os.environ.get("CRASH_STRIDE", "0"))
SAMPLES = {
    "client-push": 61,
    "client-push-large": 89,
    "client-push-parts": 109,
    "client-seal": 53,
    "client-fetch": 61,
    "client-home": 43,
    "server-return": 97,
    "server-replay": 167,
    "server-replay-direct": 173,
    "server-replay-recipes": 97,
    "server-replay-parts": 113,
    "server-upload": 173,
    "server-collect": 29,
    "server-adopt": 41,
    "server-adopt-trust": 43,
}
"""The stride of a sample, by scenario: primes, so that the samples of several runs differ."""


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the library that kills its process at the n-th change."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C compiler to build the shim")
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, HERE / "shim.c", "-ldl"], check=True)
    return library


@pytest.mark.parametrize("moment", ["before", "after", "middle"])
@pytest.mark.parametrize("scenario", SAMPLES)
def test_a_killed_command_loses_nothing_and_can_be_repeated(
    scenario: str, moment: str, shim: Path, tmp_path: Path
) -> None:
    """Killed before, after or in the middle of its n-th change, the command repeated brings the promised state."""
    sweep(scenario, moment, SAMPLES[scenario], shim, tmp_path)


@pytest.mark.parametrize("moment", ["before", "after", "middle"])
def test_a_killed_migration_is_whole_or_not_there(moment: str, shim: Path, tmp_path: Path) -> None:
    """Killed at its n-th change, a database of any older schema is that or the newest one; opened again, the newest."""
    sweep("migrations", moment, 31, shim, tmp_path)


def sweep(scenario: str, moment: str, sample: int, shim: Path, tmp_path: Path) -> None:
    """Visit a sample of a scenario's points, or every one of them."""
    stride = STRIDE or sample
    first = random.SystemRandom().randrange(1, stride + 1)
    words = [sys.executable, HERE / "sweep.py", scenario, tmp_path / "sweep", "--moment", moment]
    words += ["--stride", str(stride), "--first", str(first)]
    environment = {**os.environ, "LD_PRELOAD": str(shim), "DELTASYNC_HOME": str(tmp_path / "home")}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    print(result)
    assert result["complete"] and (result["points"] > 0 or first > 20), result
