"""Whether a host is fit to run commands for this client, and what it has for them (spec J-84)."""

from __future__ import annotations

from collections.abc import Iterator

from deltasync.client.doctor import FREE_BYTES, Finding, Level
from deltasync.core.jobs import Capabilities, Gpu
from deltasync.core.names import bytes_text, shown
from deltasync.core.wire import Health

_LINKS = {
    "reflink": "inputs reach a session as reflinks: at once, and without room of their own",
    "hardlink": "inputs reach a session as hard links: at once, and without room of their own",
    "copy": "inputs are copied into a session; `deltasync-server serve --job-user` or --trust-jobs links them",
}


def findings(health: Health, able: Capabilities | None) -> list[Finding]:
    """Say what is good, and what to look at. able: None for a server of a release that runs no commands."""
    found = [_server(health)]
    if able is None:
        return [*found, Finding(Level.WARNING, "run", "this server is of a release that runs no commands")]
    return [*found, _leave(able), _disk(able), _slots(able), _sessions(able), _machine(able), _gpus(able), *_ways(able)]


def _server(health: Health) -> Finding:
    level = Level.OK if health.status == "ok" else Level.WARNING
    return Finding(level, "server", f"it answers: {shown(health.status)}, release {shown(health.version)}")


def _leave(able: Capabilities) -> Finding:
    if not able.runs:
        return Finding(Level.WARNING, "run", f"it runs no commands for this client: {shown(able.why)}")
    return Finding(Level.OK, "run", "it runs commands for this client")


def _disk(able: Capabilities) -> Finding:
    free = f"{bytes_text(able.disk_free_bytes)} are free where sessions are made"
    if able.disk_free_bytes < FREE_BYTES:
        return Finding(Level.WARNING, "disk", f"only {free}; `deltasync-server collect` there makes room")
    return Finding(Level.OK, "disk", free)


def _slots(able: Capabilities) -> Finding:
    said = f"{able.slots_free} of {able.slots} slots are free, {able.queued} jobs wait"
    return Finding(Level.OK if able.slots_free else Level.NOTE, "slots", said)


def _sessions(able: Capabilities) -> Finding:
    if able.sessions_stale:
        said = f"{able.sessions_stale} that no job needs could not be removed; the server's log says why"
        return Finding(Level.WARNING, "sessions", f"{said}, and its next start tries again")
    if able.sessions_kept and able.sessions_kept >= able.sessions_max:
        said = f"all {able.sessions_kept} are kept by jobs that are over (--keep), so no other is taken"
        return Finding(Level.WARNING, "sessions", f"{said}; `deltasync jobs rm ID` lets one go")
    kept = f"; {able.sessions_kept} of them are kept by jobs that are over" if able.sessions_kept else ""
    said = f"{able.sessions} of {able.sessions_max} are there, and a job needs each{kept}"
    return Finding(Level.OK if able.sessions < able.sessions_max else Level.NOTE, "sessions", said)


def _machine(able: Capabilities) -> Finding:
    memory = f"{bytes_text(able.memory_free_bytes)} of {bytes_text(able.memory_bytes)} of memory are free"
    said = f"{able.cores} cores with a load of {able.load:.1f}, {memory}"
    return Finding(Level.OK if able.load <= able.cores else Level.NOTE, "machine", said)


def _gpus(able: Capabilities) -> Finding:
    if not able.gpus:
        return Finding(Level.OK, "gpus", "it tells of none")
    said = "; ".join(f"{number} {_gpu(each)}" for number, each in enumerate(able.gpus))
    level = Level.OK if able.gpus_free else Level.NOTE
    return Finding(level, "gpus", f"{able.gpus_free} of {len(able.gpus)} are free: {said}")


def _gpu(gpu: Gpu) -> str:
    if not gpu.memory_bytes:
        return shown(gpu.name)
    return f"{shown(gpu.name)}, {bytes_text(gpu.memory_free_bytes)} of {bytes_text(gpu.memory_bytes)} free"


def _ways(able: Capabilities) -> Iterator[Finding]:
    said = _LINKS.get(able.links, f"inputs reach a session by {shown(able.links)}")
    yield Finding(Level.NOTE if able.links == "copy" else Level.OK, "inputs", said)
    if able.sandbox:
        said = "every command is shut in" if able.sandbox_always else "`run --sandbox` shuts a command in"
        yield Finding(Level.OK, "sandbox", said)
    else:
        yield Finding(Level.NOTE, "sandbox", f"no command can be shut in: {shown(able.sandbox_why)}")
