"""Systems without POSIX file access import the client and are told what is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_WITHOUT_POSIX = """
import os, sys
for name in ("fcntl", "pwd", "grp", "resource", "termios"):
    sys.modules[name] = None
for name in ("O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC"):
    delattr(os, name)
os.supports_dir_fd = set()
from deltasync.cli.main import main
sys.argv = ["deltasync", *sys.argv[1:]]
main()
"""


def _run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _WITHOUT_POSIX, *map(str, words)], capture_output=True, text=True, timeout=60
    )


def test_a_system_without_posix_flags_imports_the_client() -> None:
    """`deltasync --version` works where fcntl and the flags of POSIX are missing."""
    assert _run("--version").returncode == 0


def test_a_system_that_cannot_confine_file_access_is_told_so(tmp_path: Path) -> None:
    """A push there changes nothing, says what is missing in one sentence, and exits 2."""
    done = _run("push", tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "WSL" in done.stderr
    assert list(tmp_path.iterdir()) == []
    fetch = _run("fetch", "--from", "http://127.0.0.1:1", "--workspace", "w", tmp_path / "dest")
    assert fetch.returncode == 2 and "WSL" in fetch.stderr and list(tmp_path.iterdir()) == []
