"""What restic, borg and casync need for the same files, into a repository on the same disk."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.contestants import deltasync_server, environment
from bench.measure import run, tree_cpu_seconds, wait_until_idle
from bench.workloads import STEPS, Workload

OURS = "deltasync"
PROGRAMS = ("restic", "borg", "casync")
EDITS = {"media": "1 % edited", "model": "edited throughout"}
"""The workloads that are backed up, and what is changed before the second time."""
_SECRETS = {"RESTIC_PASSWORD": "bench", "BORG_PASSPHRASE": "bench"}
_BLOCK_BYTES = 512  # what st_blocks counts


@dataclass(frozen=True, slots=True)
class Backup:
    """One program's first or second backup of one workload."""

    program: str
    workload: str
    step: str
    wall_seconds: float
    cpu_seconds: float
    stored_bytes: int


@dataclass(frozen=True, slots=True)
class _Tool:
    """A program that is ready to store a folder."""

    command: Callable[[Path, int], list[str | Path]]
    """What stores a folder for the n-th time."""
    stored: Path
    server_pid: int | None = None

    def server_cpu_seconds(self) -> float:
        """Return the CPU seconds of its server, once that has done all its work."""
        if self.server_pid is None:
            return 0.0
        wait_until_idle(self.server_pid)
        return tree_cpu_seconds(self.server_pid)


def version(program: str) -> str | None:
    """Return an installed program's own name and version; None: it is not installed."""
    if shutil.which(program) is None:
        return None
    word = "version" if program == "restic" else "--version"
    said = subprocess.run([program, word], capture_output=True, text=True, check=False).stdout.split()
    return " ".join(said[:2])


def measure_backup(program: str, workload: Workload, folder: Path) -> Iterator[Backup]:
    """Store a fresh tree once, change it, and store it again."""
    source, own = folder / "source", environment(folder) | _SECRETS
    source.mkdir(parents=True)
    with _prepared(program, folder / "store", own) as tool:
        for number, step in enumerate(("first sync", EDITS[workload.name])):
            STEPS[step](workload, source)
            cpu, stored = tool.server_cpu_seconds(), _stored_bytes(tool.stored)
            ran = run(tool.command(source, number), own)
            cpu = ran.cpu_seconds + tool.server_cpu_seconds() - cpu
            stored = _stored_bytes(tool.stored) - stored
            yield Backup(program, workload.name, step, ran.wall_seconds, cpu, stored)


@contextmanager
def _prepared(program: str, store: Path, own: dict[str, str]) -> Iterator[_Tool]:
    """Make an empty repository, or run a server with fresh data."""
    match program:
        case "restic":
            run(["restic", "init", "--quiet", "--repo", store], own)
            yield _Tool(lambda source, _: ["restic", "backup", "--quiet", "--repo", store, source], store)
        case "borg":
            run(["borg", "init", "--encryption=repokey-blake2", store], own)
            yield _Tool(lambda source, number: ["borg", "create", f"{store}::{number}", source], store)
        case "casync":
            store.mkdir()
            words: list[str | Path] = ["casync", "make", f"--store={store / 'default.castr'}"]
            yield _Tool(lambda source, number: [*words, store / f"{number}.caidx", source], store)
        case _:
            with deltasync_server(store) as server:
                yield _Tool(lambda source, _: server.command(source, server.port), store / "data", server.server_pid)


def _stored_bytes(folder: Path) -> int:
    """Return the disk space of a folder, each inode once."""
    os.sync()  # blocks are allocated late; and nobody pays for the pages that somebody else left dirty
    found = {}
    for where, _, names in os.walk(folder):
        for name in names:
            status = os.lstat(os.path.join(where, name))
            found[status.st_ino] = status.st_blocks * _BLOCK_BYTES
    return sum(found.values())
