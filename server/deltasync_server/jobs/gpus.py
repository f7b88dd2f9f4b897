"""The GPUs of this host, as NVIDIA's library tells of them; none is normal (spec J-83)."""

from __future__ import annotations

import functools
from importlib import import_module
from typing import Any

from deltasync.core.jobs import Gpu


def gpus() -> list[Gpu]:
    """Return the GPUs, in the order in which CUDA_VISIBLE_DEVICES counts them."""
    nvml = _library()
    if nvml is None:
        return []
    try:
        handles = map(nvml.nvmlDeviceGetHandleByIndex, range(nvml.nvmlDeviceGetCount()))
        return [_told(nvml, handle) for handle in handles]
    except nvml.NVMLError:
        return []


@functools.cache
def _library() -> Any | None:
    """Return the library, ready to be asked; it stays so, for that takes longer than all answers."""
    try:
        nvml: Any = import_module("pynvml")  # of nvidia-ml-py, which need not be there
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None  # no driver
    return nvml


def _told(nvml: Any, handle: object) -> Gpu:
    name = nvml.nvmlDeviceGetName(handle)
    text = name.decode(errors="replace") if isinstance(name, bytes) else name
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    except nvml.NVMLError:  # it shares that of the machine
        return Gpu(name=text)
    return Gpu(name=text, memory_bytes=memory.total, memory_free_bytes=memory.free)
