"""What this machine has for commands: cores and memory, and how much of them is taken."""

from __future__ import annotations

import os
from typing import NamedTuple

import psutil


class Machine(NamedTuple):
    """What there is, and how much of it programs could still take."""

    cores: int
    """Those that a command can use."""
    load: float
    memory_bytes: int
    memory_free_bytes: int


def machine() -> Machine:
    """Look at the machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = psutil.virtual_memory()
    return Machine(cores, psutil.getloadavg()[0], memory.total, memory.available)
