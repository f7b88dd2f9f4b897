"""A forecast: what it would take to have a command's inputs on a host; nothing is sent (spec J-76, J-77)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deltasync.client.inputs import Need, files_at, place_of
from deltasync.client.kept import kept
from deltasync.client.known import KnownDigests
from deltasync.client.opening import client_id
from deltasync.client.receiver import Transport
from deltasync.client.report import PathProblem
from deltasync.client.uplink import uplink_to
from deltasync.core.names import shown


@dataclass(slots=True)
class Forecast:
    """What it would take: of the members of `plan --json`."""

    files: int = 0
    bytes: int = 0
    kept_bytes: int = 0
    """Of workspaces that the host has already."""
    missing_files: int = 0
    missing_bytes: int = 0
    """Content that the host lacks, each once, before compression."""
    read_bytes: int = 0
    """What had to be read here to know that."""
    bytes_per_second: float = 0.0
    """Of the uplink, as former pushes found it; 0 where none did."""
    seconds: float | None = None
    """How long the missing bytes take; None where that is not known."""
    problems: list[PathProblem] = field(default_factory=list)


def forecast(transport: Transport, needs: Sequence[Need]) -> Forecast:
    """Say what it would take to have inputs on a host; raises UsageError for one that cannot be carried."""
    found = Forecast()
    unknown: dict[str, None] = {}
    above = ""
    for need in sorted(needs, key=lambda each: each.path.split("/")):
        if above and f"{place_of(need.path)}/".startswith(above):
            continue  # it comes with the other one
        above = f"{place_of(need.path)}/"
        real = os.path.realpath(need.path)
        there = kept(real, transport.url)
        if there is None:
            unknown.update(dict.fromkeys(files_at(real)))
            continue
        found.files += there.files
        found.bytes += there.size_bytes
        found.kept_bytes += there.size_bytes
    sizes = _sizes(unknown, found)
    for missing in _missing(transport, list(sizes)):
        found.missing_files += 1
        found.missing_bytes += sizes[missing]
    found.bytes_per_second = uplink_to(transport.url).bytes_per_second
    if not found.missing_bytes:
        found.seconds = 0.0
    elif found.bytes_per_second:
        found.seconds = found.missing_bytes / found.bytes_per_second
    return found


def _sizes(paths: Iterable[str], found: Forecast) -> dict[str, int]:
    """Return the size of each content, by its digest."""
    sizes: dict[str, int] = {}
    with KnownDigests() as known:
        for path in paths:
            digest = known.of(path)
            if digest is None:
                found.problems.append(PathProblem(shown(path), "cannot be read, or changes"))
                continue
            size = Path(path).stat().st_size
            sizes[digest.hex()] = size
            found.files += 1
            found.bytes += size
        found.read_bytes = known.read_bytes
    return sizes


def _missing(transport: Transport, digests: Sequence[str]) -> Iterator[str]:
    if not digests:
        return
    workspace = f"inputs-{client_id()[:8]}"
    most = max(1, transport.workspace(workspace).limits.missing_digests)
    for start in range(0, len(digests), most):
        yield from transport.missing(workspace, digests[start : start + most])
