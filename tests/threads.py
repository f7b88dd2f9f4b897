"""A limit on the threads and processes of a command, by a pids cgroup of its own: RLIMIT_NPROC does not bind root."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CGROUPS = (Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup"))
"""Where the controller is in the first version of cgroups, and in the second."""


class Group:
    """A pids cgroup: what enters it, and what that starts, is at most so many threads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def limit(self, most: int | None) -> None:
        """Allow so many threads; None allows any number."""
        (self._folder / "pids.max").write_text("max" if most is None else str(most))

    def enter(self, process: int = 0) -> None:
        """Have a process in it; 0 is the one that calls this."""
        (self._folder / "cgroup.procs").write_text(str(process or os.getpid()))

    def count(self) -> int:
        """Return how many threads are in it now."""
        return int((self._folder / "pids.current").read_text())


@contextmanager
def group() -> Iterator[Group]:
    """Make a group for the block, or skip the test where that is not allowed; it must be empty at the end."""
    for parent in CGROUPS:
        folder = parent / f"deltasync-{secrets.token_hex(6)}"
        with contextlib.suppress(OSError):
            folder.mkdir()
            if (folder / "pids.max").exists():
                break
            folder.rmdir()
    else:
        pytest.skip("no pids cgroup can be made here")
    try:
        yield Group(folder)
    finally:
        folder.rmdir()
