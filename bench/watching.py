"""What a running watcher costs and how soon a saved file is on the server."""

from __future__ import annotations

import json
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from bench.contestants import BIN, WORKSPACE, Deltasync, deltasync_server, environment, pushed
from bench.measure import CountingProxy, PeakMemory, run, started, tree_cpu_seconds, wait_until_idle
from bench.workloads import Workload, make

_SAVES = 15
_ASKS = 5
_IDLE_SECONDS = 65  # one periodic rescan falls into it
_POLL_SECONDS = 0.002


@dataclass(frozen=True, slots=True)
class Watching:
    """Figures of one watcher on one workload."""

    first_sync_seconds: float
    push_seconds: float
    push_sent_bytes: int
    save_median_seconds: float
    save_worst_seconds: float
    idle_wire_bytes: int
    idle_cpu_seconds: float
    idle_quiet_cpu_seconds: float
    idle_seconds: int
    status_seconds: float
    status_beside_seconds: float
    watcher_peak_bytes: int


def measure_watching(workload: Workload, folder: Path) -> Watching:
    """Run a watcher on a fresh tree and measure it at rest and at work."""
    source = folder / "source"
    source.mkdir(parents=True)
    make(workload, source)
    with deltasync_server(folder / "deltasync") as server:
        proxy = CountingProxy(server.port)
        try:
            return _measure(source, server, proxy, folder)
        finally:
            proxy.close()


def _measure(source: Path, server: Deltasync, proxy: CountingProxy, folder: Path) -> Watching:
    own = environment(folder / "deltasync")
    url = f"http://127.0.0.1:{proxy.port}"
    command: list[str | Path] = [BIN / "deltasync", "watch", source, "--to", url, "--workspace", WORKSPACE]
    began = time.perf_counter()
    memory = PeakMemory()
    with started(command, own, folder / "watch.log") as watcher:
        memory.follow(watcher.pid)
        _wait_until_in_sync(source, own)
        first = time.perf_counter() - began
        wait_until_idle(watcher.pid)
        wait_until_idle(server.server_pid)
        proxy.take()
        asks = [run([BIN / "deltasync", "push", source, "--json"], own) for _ in range(_ASKS)]
        beside = [run([BIN / "deltasync", "status", source, "--json"], own).wall_seconds for _ in range(_ASKS)]
        saves = [_save(source, server.tree, number) for number in range(_SAVES)]
        wait_until_idle(watcher.pid)
        proxy.take()
        idle = _idle_cpu(watcher.pid)
        quiet_wire = proxy.take()
    peak = memory.peak(watcher.pid)
    memory.stop()
    alone = [run([BIN / "deltasync", "status", source, "--json"], own).wall_seconds for _ in range(_ASKS)]
    return Watching(
        first_sync_seconds=first,
        push_seconds=statistics.median(ask.wall_seconds for ask in asks),
        push_sent_bytes=max(pushed(ask.output)["sent_bytes"] for ask in asks),
        save_median_seconds=statistics.median(saves),
        save_worst_seconds=max(saves),
        idle_wire_bytes=quiet_wire.sent_bytes + quiet_wire.received_bytes,
        idle_cpu_seconds=sum(idle),
        idle_quiet_cpu_seconds=statistics.median(idle),
        idle_seconds=_IDLE_SECONDS,
        status_seconds=statistics.median(alone),
        status_beside_seconds=statistics.median(beside),
        watcher_peak_bytes=peak,
    )


def _wait_until_in_sync(source: Path, own: dict[str, str], *, at_most_seconds: float = 300) -> None:
    deadline = time.monotonic() + at_most_seconds
    while time.monotonic() < deadline:
        if (source / ".deltasync" / "state.db").exists():
            state = json.loads(run([BIN / "deltasync", "status", source, "--json"], own).output)
            if state["in_sync"] and state["local"]["sequence"] and not state["local"]["pending"]:
                return
        time.sleep(0.2)
    raise TimeoutError(f"the watcher did not reach the server's root in {at_most_seconds} s")


def _save(source: Path, tree: Path, number: int) -> float:
    """Save a small file in an existing folder and return after how many seconds the server's tree holds it."""
    folder = next(path for path in sorted((source / "half-a").iterdir()) if path.is_dir())
    saved = folder / f"saved-{number:03}.txt"
    applied = tree / saved.relative_to(source)
    content = os.urandom(200)
    began = time.perf_counter()
    saved.write_bytes(content)
    while time.perf_counter() - began < 30:
        try:
            if applied.read_bytes() == content:
                return time.perf_counter() - began
        except FileNotFoundError:
            pass
        time.sleep(_POLL_SECONDS)
    raise TimeoutError(f"{saved.name} did not reach the server's tree in 30 s")


def _idle_cpu(pid: int) -> list[float]:
    """Return the watcher's CPU seconds in each second of rest."""
    figures, before = [], tree_cpu_seconds(pid)
    for _ in range(_IDLE_SECONDS):
        time.sleep(1)
        now = tree_cpu_seconds(pid)
        figures.append(now - before)
        before = now
    return figures
