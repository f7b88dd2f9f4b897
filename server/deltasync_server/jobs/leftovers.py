"""Processes that a command has left behind: found by their group, or by the job that their environment names."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Collection, Iterator
from pathlib import Path

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
    for _ in range(_ROUNDS):  # again: one may have started another in between
        found = list(_marked(marks))
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if not found:
            return
        time.sleep(_PAUSE_SECONDS)


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
