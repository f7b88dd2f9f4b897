"""What a host tells of its machine: GPUs, cores and memory (spec J-83)."""

from __future__ import annotations

import sys
from importlib import import_module

import psutil
import pytest

from deltasync_server.jobs import gpus
from deltasync_server.jobs.machine import machine


def test_a_host_without_a_driver_has_no_gpu() -> None:
    """NVIDIA's library is there and finds no driver: that is normal, and told as no GPU, each time."""
    nvml = import_module("pynvml")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        assert (gpus.gpus(), gpus.gpus()) == ([], [])
        return
    assert len(gpus.gpus()) == nvml.nvmlDeviceGetCount()
    assert all(each.memory_bytes >= each.memory_free_bytes > 0 for each in gpus.gpus())


def test_a_host_without_the_library_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nvidia-ml-py is not installed there is no GPU to tell of."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    gpus._library.cache_clear()
    try:
        assert gpus.gpus() == []
    finally:
        gpus._library.cache_clear()


def test_the_machine_is_told_as_it_is() -> None:
    """The memory is that of the machine, of which some is free; a command has at least one core."""
    found = machine()
    assert found.memory_bytes == psutil.virtual_memory().total > found.memory_free_bytes > 0
    assert found.cores >= 1 and found.load >= 0
