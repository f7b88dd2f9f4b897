"""What a host has for commands: GPUs as NVIDIA's library names them, cores and memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from deltasync_server.jobs.gpus import gpu_names
from deltasync_server.jobs.machine import cores, memory

LIBRARY = """
class NVMLError(Exception):
    pass

def nvmlInit():
    if {fails!r} == "init":
        raise NVMLError("no driver")

def nvmlShutdown():
    open({told!r}, "a").write("shut down")

def nvmlDeviceGetCount():
    return 2

def nvmlDeviceGetHandleByIndex(number):
    if {fails!r} == "handle":
        raise NVMLError("gone")
    return number

def nvmlDeviceGetName(handle):
    return ["NVIDIA H200", b"NVIDIA A100"][handle]
"""


def library(folder: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> Path:
    """Put another pynvml before any that is installed; returns the file in which it says that it was let go."""
    told = folder / "told"
    (folder / "pynvml.py").write_text(LIBRARY.format(fails=fails, told=str(told)))
    monkeypatch.syspath_prepend(folder)
    forget_library(monkeypatch)
    return told


def forget_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the module looked for, now and again after the test."""
    monkeypatch.setitem(sys.modules, "pynvml", sys)
    del sys.modules["pynvml"]


@pytest.mark.parametrize(
    ("fails", "names", "lets_go"),
    [("", ["NVIDIA H200", "NVIDIA A100"], True), ("init", [], False), ("handle", [], True)],
)
def test_gpus_are_those_of_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str, names: list[str], *, lets_go: bool
) -> None:
    """Each has its name, in the library's order; without a driver, or where it fails, there are none."""
    told = library(tmp_path, monkeypatch, fails)
    assert gpu_names() == names
    assert told.exists() is lets_go


def test_without_the_library_there_are_no_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It need not be installed."""
    (tmp_path / "pynvml.py").write_text("raise ImportError('not here')")
    monkeypatch.syspath_prepend(tmp_path)
    forget_library(monkeypatch)
    assert gpu_names() == []


def test_there_are_cores_and_memory() -> None:
    """Some of each, and no more memory is free than there is."""
    found = memory()
    assert cores() >= 1 and 0 < found.free_bytes <= found.bytes
