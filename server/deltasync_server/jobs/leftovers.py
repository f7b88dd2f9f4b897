"""Processes that a command has left behind: found by their group, or by the job that their environment names."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from deltasync.core.errors import DeltasyncError
from deltasync.core.jobs import JOB_ID
from deltasync.db import connect
from deltasync.disk import Folder, Lock
from deltasync_server.jobs.table import Left, left_over
from deltasync_server.state import MIGRATIONS

MARK = "DELTASYNC_JOB"
"""The variable with a job's id, which every process of it inherits."""
_PROC = Path("/proc")
_BOOT = _PROC / "sys/kernel/random/boot_id"
_ROUNDS, _PAUSE_SECONDS = 100, 0.01
_GROUP_FIELD, _START_FIELD = 2, 19
"""Of /proc/PID/stat, behind the name: the process's group, and when it began."""


def start_of(pid: int) -> str | None:
    """Return what tells a process from others that had or get its number; None where it is gone, or nobody says."""
    try:
        fields = (_PROC / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()
        return f"{_BOOT.read_text().strip()} {fields[_START_FIELD].decode()}"
    except (OSError, IndexError):
        return None


def kill_left(database: Path, sessions: Path) -> None:
    """Kill what the jobs of a server that died have left running; nothing of this needs space (spec J-45).

    sessions: the folder of their sessions, which name them where a full disk keeps the database closed.
    """
    left = _recorded(database)
    for each in left or ():
        if each.pid is not None:
            kill_group(each.pid, each.pid_start)
    if job_ids := _in_sessions(sessions) if left is None else [each.id for each in left]:
        kill_marked(job_ids)


def _recorded(database: Path) -> list[Left] | None:
    """Return the jobs that were worked on; None where that cannot be read."""
    try:
        with contextlib.closing(connect(database, MIGRATIONS, read_only=True)) as db:
            return left_over(db)
    except (DeltasyncError, sqlite3.Error, OSError):
        return None


def _in_sessions(path: Path) -> list[str]:
    """Return the jobs that a folder has sessions of; none where it is another server's, or cannot be read."""
    with contextlib.suppress(DeltasyncError, OSError), Folder.open(path) as folder, Lock(".lock", "", at=folder.fd):
        return [name for name in folder.names() if JOB_ID.fullmatch(name)]
    return []


def kill_group(pid: int, start: str | None) -> None:
    """Kill the process group that a command was given, if it is still that one (spec J-45)."""
    if start is not None and start_of(pid) == start:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


def terminate_others(group: int) -> None:
    """Ask every process of a group to end but for its first."""
    for each in _PROC.iterdir():
        if each.name.isdigit() and int(each.name) != group:
            with contextlib.suppress(OSError, IndexError):  # it is gone
                fields = (each / "stat").read_bytes().rpartition(b")")[2].split()
                if int(fields[_GROUP_FIELD]) == group:
                    os.kill(int(each.name), signal.SIGTERM)


def kill_marked(job_ids: Collection[str]) -> None:
    """Kill every process whose environment names one of these jobs: it may have left its group."""
    marks = {f"{MARK}={job_id}".encode() for job_id in job_ids}
    killed: set[int] = set()
    for _ in range(_ROUNDS):  # again: one may have started another in between
        found = list(_marked(marks))
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        killed.update(found)
        if not (found or any(map(_holds, killed))):
            return
        time.sleep(_PAUSE_SECONDS)


def _holds(pid: int) -> bool:
    """Tell whether a process may still have files open, whose space is in use."""
    try:
        return (_PROC / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except (OSError, IndexError):
        return False


def _marked(marks: set[bytes]) -> Iterator[int]:
    """Yield the processes that live and have one of these variables."""
    if not _PROC.is_dir():
        return
    for each in _PROC.iterdir():
        if each.name.isdigit() and int(each.name) != os.getpid():
            with contextlib.suppress(OSError):  # it is gone, or somebody else's
                content = (each / "environ").read_bytes()  # a zombie has none
                if not marks.isdisjoint(content.split(b"\0")):
                    yield int(each.name)
