"""What this machine has for commands: cores and memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

_MEMORY = Path("/proc/meminfo")


class Memory(NamedTuple):
    """How much there is, and how much of it programs could still take."""

    bytes: int
    free_bytes: int


def cores() -> int:
    """Return how many cores a command can use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> Memory:
    """Return how much memory there is."""
    try:
        lines = dict(line.split(":", 1) for line in _MEMORY.read_text().splitlines())
        return Memory(*(int(lines[name].split()[0]) << 10 for name in ("MemTotal", "MemAvailable")))
    except (OSError, KeyError, ValueError):
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Memory(whole, 0)
