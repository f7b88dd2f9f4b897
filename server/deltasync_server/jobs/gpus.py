"""The GPUs of this host, as NVIDIA's library names them; none is normal."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def gpu_names() -> list[str]:
    """Return the names of the GPUs, in the order in which CUDA_VISIBLE_DEVICES counts them."""
    try:
        nvml: Any = import_module("pynvml")  # of nvidia-ml-py, which need not be there
    except ImportError:
        return []
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return []  # no driver
    try:
        handles = map(nvml.nvmlDeviceGetHandleByIndex, range(nvml.nvmlDeviceGetCount()))
        return [_text(nvml.nvmlDeviceGetName(handle)) for handle in handles]
    except nvml.NVMLError:
        return []
    finally:
        nvml.nvmlShutdown()


def _text(name: str | bytes) -> str:
    return name.decode(errors="replace") if isinstance(name, bytes) else name
