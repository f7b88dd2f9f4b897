"""The least that a first sync and an edit can cost on a machine: hashing, copying and fsync, and no protocol."""

from __future__ import annotations

import os
import resource
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from deltasync.core.chunks import AVERAGE_BYTES, Chunker
from deltasync.core.hashing import hasher

BUFFER_BYTES = 1 << 20


class Floor(NamedTuple):
    """What something costs at least."""

    workload: str
    step: str
    what: str
    wall_seconds: float
    cpu_seconds: float


def measure_floor(folder: Path, media_bytes: int, model_bytes: int) -> list[Floor]:
    """Measure with files of these sizes that are in memory; every promise of deltasync needs at least this."""
    folder.mkdir()
    source, target = folder / "source", folder / "target"
    _fill(source, media_bytes)
    rows = [
        ("media", "first sync", "read and sent, received and written", _passed(source, target, hashes=False)),
        ("media", "first sync", "the same, hashed on both sides", _passed(source, target, hashes=True)),
        ("media", "first sync", "the same, with fsync", _passed(source, target, hashes=True, is_durable=True)),
    ]
    _fill(source, model_bytes)
    rows += [
        ("model", "edited throughout", "cut and hashed", lambda: _in_child(lambda: _cut(source))),
        ("model", "edited throughout", "copied, hashed, fsynced", lambda: _in_child(lambda: _copy(source, target))),
    ]
    return [Floor(workload, step, what, *_timed(work, target)) for workload, step, what, work in rows]


def _fill(path: Path, size_bytes: int) -> None:
    block = os.urandom(BUFFER_BYTES)
    with path.open("wb") as file:
        for _ in range(max(1, size_bytes // BUFFER_BYTES)):
            file.write(block)


def _timed(work: Callable[[], None], target: Path) -> tuple[float, float]:
    target.unlink(missing_ok=True)
    os.sync()
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    work()
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _in_child(work: Callable[[], None], *others: Callable[[], None]) -> None:
    """Do each in a process of its own, at once."""
    children = []
    for each in (work, *others):
        child = os.fork()
        if not child:
            code = 1
            try:
                each()
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        raise RuntimeError("a measured process failed; what it said stands above")


def _passed(source: Path, target: Path, *, hashes: bool, is_durable: bool = False) -> Callable[[], None]:
    def work() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            address = listener.getsockname()
            _in_child(
                lambda: _send(source, address, hashes=hashes),
                lambda: _receive(listener, target, hashes=hashes, is_durable=is_durable),
            )

    return work


def _send(source: Path, address: tuple[str, int], *, hashes: bool) -> None:
    buffer = memoryview(bytearray(BUFFER_BYTES))
    with source.open("rb", buffering=0) as file, socket.create_connection(address) as peer:
        digest = hasher()
        while count := file.readinto(buffer):
            if hashes:
                digest.update(buffer[:count])
            peer.sendall(buffer[:count])


def _receive(listener: socket.socket, target: Path, *, hashes: bool, is_durable: bool) -> None:
    buffer = memoryview(bytearray(BUFFER_BYTES))
    peer, _ = listener.accept()
    with target.open("wb", buffering=0) as file, peer:
        digest = hasher()
        while count := peer.recv_into(buffer):
            if hashes:
                digest.update(buffer[:count])
            file.write(buffer[:count])
        if is_durable:
            os.fsync(file.fileno())


def _cut(source: Path) -> None:
    chunker, digest, buffer = Chunker(AVERAGE_BYTES), hasher(), memoryview(bytearray(BUFFER_BYTES))
    with source.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            chunker.update(buffer[:count])


def _copy(source: Path, target: Path) -> None:
    digest, buffer = hasher(), memoryview(bytearray(BUFFER_BYTES))
    with source.open("rb", buffering=0) as old, target.open("w+b", buffering=0) as new:
        while os.copy_file_range(old.fileno(), new.fileno(), 64 * BUFFER_BYTES):
            pass
        new.seek(0)
        while count := new.readinto(buffer):
            digest.update(buffer[:count])
        os.fsync(new.fileno())
