"""A user of the `deltasync` program: real processes, with a home of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BINARY = Path(sys.executable).parent / "deltasync"
SECONDS = 40.0
Word = str | os.PathLike[str] | bytes


@dataclass(frozen=True)
class Done:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON object on stdout."""
        assert self.out.count("\n") == 1, self.out
        return json.loads(self.out)


class User:
    """One user with a home of their own."""

    def __init__(self, home: Path) -> None:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("DELTASYNC_", "REMOTE_UPLOAD_", "XDG_"))
        }
        self.home = home
        self.environment = kept | {
            "DELTASYNC_HOME": str(home / "own"),
            "XDG_RUNTIME_DIR": str(home / "run"),
            "HOME": str(home),
            "PYTHONUTF8": "1",
        }
        (home / "run").mkdir(parents=True, mode=0o700, exist_ok=True)

    def run(self, *words: Word, cwd: Path | None = None, **variables: str) -> Done:
        """Run one command to its end."""
        done = subprocess.run(
            [BINARY, *words],
            capture_output=True,
            cwd=cwd or self.home,
            env=self.environment | variables,
            timeout=SECONDS,
            check=False,
        )
        return Done(done.returncode, done.stdout.decode(), done.stderr.decode())

    def start(self, *words: Word, **options: Any) -> subprocess.Popen[str]:
        """Start a command."""
        return subprocess.Popen(
            [BINARY, *words],
            stdout=options.pop("stdout", subprocess.PIPE),
            stderr=options.pop("stderr", subprocess.PIPE),
            text=True,
            env=self.environment,
            cwd=self.home,
            **options,
        )
