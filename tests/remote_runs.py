"""A user whose commands run on a host: for tests of `deltasync run` with real programs and in trouble."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from user import BINARY, SECONDS, Done, User, Word


@dataclass(frozen=True)
class Terminal:
    """A folder of a user, and the host on which commands run that are typed in it."""

    user: User
    folder: Path

    @classmethod
    def at(cls, home: Path, url: str, name: str = "work") -> Terminal:
        """Return a new user with a folder, whose commands run on a host."""
        user = User(home)
        user.environment["DELTASYNC_ON"] = url
        for name in [each for each in user.environment if each.startswith("COVERAGE_")]:
            del user.environment[name]  # other tests measure the same commands
        (home / name).mkdir()
        return cls(user, home / name)

    def run(self, *words: Word, **variables: str) -> Done:
        """Run `deltasync run` with these words to its end."""
        return self.user.run("run", *words, cwd=self.folder, **variables)

    def start(self, *words: Word) -> subprocess.Popen[str]:
        """Start `deltasync run` with these words."""
        return subprocess.Popen(
            [BINARY, "run", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.user.environment,
            cwd=self.folder,
        )

    def detached(self, *words: Word) -> str:
        """Start a job and return its id."""
        done = self.run("--detach", *words)
        assert done.code == 0, done.err
        return done.out.strip()

    def job(self, job_id: str) -> Any:
        """Return what the host knows of a job."""
        done = self.user.run("jobs", "show", "--json", job_id)
        assert done.code == 0, done.err
        return done.json

    def local(self, *words: Word) -> Done:
        """Run a command here, in the folder, to its end."""
        done = subprocess.run(words, capture_output=True, cwd=self.folder, timeout=SECONDS, check=False)
        return Done(done.returncode, done.stdout.decode(), done.stderr.decode())


def contents(folder: Path) -> dict[str, tuple[bytes, bool]]:
    """Return what each file below a folder holds, and whether it can be run."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), os.access(path, os.X_OK)) for path in files}


def is_over(pid: int) -> bool:
    """Tell whether a process is gone, or dead and not yet waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
