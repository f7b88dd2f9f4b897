"""The results: medians, ratios to rsync, and each goal beside what was measured."""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench.backups import PROGRAMS, Backup
from bench.floor import Floor
from bench.jobs import JobFigure
from bench.links import CUT_BYTES, CUT_EVERY_BYTES, LIMIT, LIMIT_BYTES, Cut, Limited
from bench.measure import Counts
from bench.watching import Watching
from bench.workloads import FETCH, STEPS, Workload

OURS, THEIRS = "deltasync", "rsync"


@dataclass(frozen=True, slots=True)
class Sample:
    """One sync: what it cost, and in a counting run also memory and bytes on the wire."""

    wall_seconds: float
    client_cpu_seconds: float
    server_cpu_seconds: float
    client_peak_bytes: int
    server_peak_bytes: int
    counts: Counts | None
    pushed: dict[str, int]


@dataclass(slots=True)
class Results:
    """Every sample of every step, and the figures of what was measured alone."""

    scale: float
    runs: int
    workloads: list[Workload] = field(default_factory=list)
    floors: list[Floor] = field(default_factory=list)
    watching: Watching | None = None
    cut: Cut | None = None
    limited: Limited | None = None
    jobs: list[JobFigure] = field(default_factory=list)
    backups: list[Backup] = field(default_factory=list)
    programs: list[str] = field(default_factory=list)
    """The backup programs, as they name themselves."""
    left_out: list[str] = field(default_factory=list)
    """What could not be measured here, and why."""
    samples: dict[tuple[str, str, str], list[Sample]] = field(default_factory=dict)

    def add(self, workload: str, step: str, contestant: str, sample: Sample) -> None:
        """Keep one sample."""
        self.samples.setdefault((workload, step, contestant), []).append(sample)

    def median(self, workload: str, step: str, contestant: str, figure: Callable[[Sample], float]) -> float | None:
        """Return the median of one figure over the timed runs, or None where nothing was measured."""
        timed = [sample for sample in self.samples.get((workload, step, contestant), []) if sample.counts is None]
        return statistics.median(map(figure, timed)) if timed else None

    def counted(self, workload: str, step: str, contestant: str) -> Sample | None:
        """Return the sample of the counting run."""
        return next((one for one in self.samples.get((workload, step, contestant), []) if one.counts), None)

    def wall(self, workload: str, step: str, contestant: str) -> float | None:
        """Return the median wall seconds."""
        return self.median(workload, step, contestant, lambda sample: sample.wall_seconds)

    def wire(self, workload: str, step: str, contestant: str) -> int | None:
        """Return the bytes on the wire in both directions."""
        sample = self.counted(workload, step, contestant)
        return sample.counts.sent_bytes + sample.counts.received_bytes if sample and sample.counts else None

    def peak(self, workload: str, contestant: str) -> tuple[int, int] | None:
        """Return the highest memory of client and server over a workload's steps."""
        counted = [one for step in STEPS if (one := self.counted(workload, step, contestant))]
        if not counted:
            return None
        return max(one.client_peak_bytes for one in counted), max(one.server_peak_bytes for one in counted)


def write(results: Results, path: Path) -> None:
    """Write the results as one markdown page."""
    sections = (_preface, _goals, _floors, _steps, _memory, _watching, _links, _jobs, _backups)
    path.write_text("\n".join(line for section in sections for line in section(results)).rstrip("\n") + "\n")


_PREFACE = """\
How it is measured: both programs run interleaved, in turns, on the same source tree, each to its own server process
on loopback (deltasync over HTTP, `rsync -a --delete` to `rsync --daemon`). Every run has fresh folders. The client is
a new process each time, the page cache is warm, and `sync` runs before each measurement. Wall is from the start of
the client to its end; deltasync ends when the server has stored the content durably *and* its plain tree holds it,
rsync when the files are written, without any fsync. CPU is user and system time of both sides with their children,
deltasync's background checkpoint included. Times are medians of the timed runs. Bytes (TCP payload, both directions),
requests and peak memory come from one more run through a counting proxy. `fetch` brings what the first sync sent into
an empty folder, as `rsync -a` does from its daemon; neither fsyncs that. After each step both trees are compared with
the source: names, kinds, bytes, executable bits, link targets, file times. Half of the files is duplicated twice:
with their times kept (`cp -a`), then with new times (`cp -r`), where the server cannot share one inode between both
copies.
"""


def _preface(results: Results) -> Iterator[str]:
    yield "# Benchmark results"
    yield ""
    yield f"Written by `make bench SCALE={results.scale:g} RUNS={results.runs}`; do not edit."
    yield "[NOTES.md](NOTES.md) says why goals are missed, and what the figures do not say."
    yield _machine()
    yield ""
    yield _PREFACE


def _machine() -> str:
    version = "absent"
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        version = subprocess.run(["rsync", "--version"], capture_output=True, text=True, check=True).stdout.split()[2]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"Machine: {os.cpu_count()} cores, {memory:.0f} GiB of memory, {platform.system()} {platform.release()}, "
        f"{platform.machine()}; Python {platform.python_version()}; rsync {version}."
    )


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    return ours / theirs if ours is not None and theirs else None


@dataclass(frozen=True, slots=True)
class Goal:
    """One goal: a measured figure that must not be above a limit."""

    work: str
    figure: float | None
    limit: float
    unit: str

    def row(self) -> str:
        """Return the goal as a table row."""
        if self.figure is None:
            return f"| {self.work} | {in_unit(self.limit, self.unit)} | not measured | |"
        verdict = "met" if self.figure <= self.limit else "**missed**"
        return f"| {self.work} | {in_unit(self.limit, self.unit)} | {in_unit(self.figure, self.unit)} | {verdict} |"


def in_unit(figure: float, unit: str) -> str:
    """Return a figure for people."""
    match unit:
        case "x":
            return f"{figure:.2f} × rsync"
        case "times":
            return f"{figure:.2f} ×"
        case "bytes":
            return bytes_text(figure)
        case "size":
            return f"{figure:.3f} × its size"
        case "%":
            return f"{figure:.1f} %"
        case "s":
            return f"{figure:.2f} s"
        case _:
            return f"{figure:g} {unit}".strip()


def bytes_text(figure: float) -> str:
    """Return a number of bytes for people."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if figure >= size:
            return f"{figure / size:.1f} {unit}"
    return f"{figure:.0f} B"


def _goals(results: Results) -> Iterator[str]:
    yield "## Goals"
    yield ""
    if results.scale != 1:
        yield f"The goals are stated for scale 1; this is scale {results.scale:g}, so read the verdicts as a hint."
        yield ""
    yield "| work | goal, at most | measured | |"
    yield "|---|---|---|---|"
    goals = (_speed_goals, _change_goals, _large_goals, _link_goals, _watch_goals, _job_goals, _memory_goals)
    for goal in (goal for each in goals for goal in each(results)):
        yield goal.row()
    yield ""
    for line in results.left_out:
        yield f"Not measured here: {line}."
        yield ""


def _speed_goals(results: Results) -> Iterator[Goal]:
    def wall(workload: str, step: str) -> float | None:
        return _ratio(results.wall(workload, step, OURS), results.wall(workload, step, THEIRS))

    yield Goal("first sync of small, wall", wall("small", "first sync"), 1.2, "x")
    yield Goal("first sync of tiny, wall", wall("tiny", "first sync"), 1.2, "x")
    yield Goal("first sync of media, wall", wall("media", "first sync"), 1.0, "x")
    cpu = _ratio(_both_cpu(results, "media", "first sync", OURS), _both_cpu(results, "media", "first sync", THEIRS))
    yield Goal("first sync of media, CPU of both sides", cpu, 1.2, "x")
    yield Goal("fetch of media into an empty folder, wall", wall("media", FETCH), 1.1, "x")
    yield Goal("fetch of small into an empty folder, wall", wall("small", FETCH), 1.1, "x")
    yield Goal("no change, tiny, wall", wall("tiny", "no change"), 1.0, "x")
    idle = results.counted("tiny", "no change", OURS)
    yield Goal("no change, tiny, requests", idle.counts.requests if idle and idle.counts else None, 1, "request")
    yield Goal("no change, tiny, bytes on the wire", results.wire("tiny", "no change", OURS), 2048, "bytes")
    yield Goal("1 % edited, tiny, wall", wall("tiny", "1 % edited"), 0.9, "x")
    wire = _ratio(results.wire("tiny", "1 % edited", OURS), results.wire("tiny", "1 % edited", THEIRS))
    yield Goal("1 % edited, tiny, bytes on the wire", wire, 0.5, "x")


def _change_goals(results: Results) -> Iterator[Goal]:
    for workload in (one.name for one in results.workloads if "half renamed" in one.steps):
        for step, limit in (("half renamed", 0.2), ("half duplicated", 0.7), ("duplicated, new times", 0.7)):
            wall = _ratio(results.wall(workload, step, OURS), results.wall(workload, step, THEIRS))
            yield Goal(f"{step}, {workload}, wall", wall, limit, "x")
        yield Goal(
            f"half renamed, {workload}, bytes on the wire", results.wire(workload, "half renamed", OURS), 4096, "bytes"
        )
        copies = [results.counted(workload, step, OURS) for step in ("half duplicated", "duplicated, new times")]
        content = sum(copy.pushed.get("content_bytes", 0) for copy in copies if copy) if any(copies) else None
        yield Goal(f"half duplicated (both ways), {workload}, content bytes sent", content, 0, "B")


def _large_goals(results: Results) -> Iterator[Goal]:
    step = "edited throughout"
    wall = _ratio(results.wall("model", step, OURS), results.wall("model", step, THEIRS))
    yield Goal(f"model, {step}, wall", wall, 0.9, "x")
    cpu = _ratio(_both_cpu(results, "model", step, OURS), _both_cpu(results, "model", step, THEIRS))
    yield Goal(f"model, {step}, CPU of both sides", cpu, 0.7, "x")
    wire = _ratio(results.wire("model", step, OURS), results.wire("model", step, THEIRS))
    yield Goal(f"model, {step}, bytes on the wire", wire, 0.9, "x")
    copied = results.wire("model", "copy, other header", OURS)
    yield Goal("model, copy with another header, bytes on the wire", copied, 2**20, "bytes")


def _link_goals(results: Results) -> Iterator[Goal]:
    cut, limited = results.cut, results.limited
    work = f"{bytes_text(CUT_BYTES)} over a link that breaks every {bytes_text(CUT_EVERY_BYTES)}, bytes sent"
    yield Goal(work, cut.sent_bytes / cut.size_bytes if cut else None, 1.05, "size")
    off = abs(limited.bytes_per_second / LIMIT_BYTES - 1) * 100 if limited else None
    yield Goal(f"`--bwlimit {LIMIT}`, how far the measured rate is from it", off, 5, "%")


def _watch_goals(results: Results) -> Iterator[Goal]:
    watching = results.watching
    yield Goal("no change beside `watch`, `push`", watching.push_seconds if watching else None, 0.3, "s")
    yield Goal("no change beside `watch`, bytes sent", watching.push_sent_bytes if watching else None, 0, "B")
    yield Goal(
        "`watch` at rest, CPU of its median second", watching.idle_quiet_cpu_seconds if watching else None, 0.01, "s"
    )
    yield Goal("save to applied, median", watching.save_median_seconds if watching else None, 0.5, "s")
    yield Goal("`status`", watching.status_seconds if watching else None, 0.3, "s")


def _job_goals(results: Results) -> Iterator[Goal]:
    for each in results.jobs:
        if each.limit is not None:
            yield Goal(each.work, each.figure, each.limit, each.unit)


def _memory_goals(results: Results) -> Iterator[Goal]:
    for workload in dict.fromkeys([*(one.name for one in results.workloads), "huge"]):
        peak = results.peak(workload, OURS)
        yield Goal(f"peak memory, {workload}, client", peak[0] if peak else None, 150 * 2**20, "bytes")
        yield Goal(f"peak memory, {workload}, server", peak[1] if peak else None, 150 * 2**20, "bytes")


_FLOORS = """\
What the promises ask of this machine before any protocol, in a few lines of Python around the system's calls: media
are read, hashed, passed through a socket of loopback between two processes, hashed and written; of the edited model the
new version is cut and hashed, and the old one copied, hashed and fsynced. A goal below these figures cannot be met here
by a program that proves content by its BLAKE3 on both sides and acknowledges what is durable.
"""


def _floors(results: Results) -> Iterator[str]:
    if not results.floors:
        return
    yield "## The least that is asked"
    yield ""
    yield _FLOORS
    yield "| workload | step | what | wall s | of rsync's | CPU s | of rsync's |"
    yield "|---|---|---|---|---|---|---|"
    for each in results.floors:
        wall = _ratio(each.wall_seconds, results.wall(each.workload, each.step, THEIRS))
        cpu = _ratio(each.cpu_seconds, _both_cpu(results, each.workload, each.step, THEIRS))
        figures = f"{each.wall_seconds:.2f} | {_number(wall)} | {each.cpu_seconds:.2f} | {_number(cpu)}"
        yield f"| {each.workload} | {each.step} | {each.what} | {figures} |"
    yield ""


def _steps(results: Results) -> Iterator[str]:
    for workload in results.workloads:
        yield f"## {workload.name}: {workload.title}"
        yield ""
        yield "| step | deltasync s | rsync s | ratio | CPU s, both | rsync CPU s | wire | rsync wire | requests |"
        yield "|---|---|---|---|---|---|---|---|---|"
        for step in workload.steps:
            if (workload.name, step, OURS) in results.samples or (workload.name, step, THEIRS) in results.samples:
                yield _step_row(results, workload.name, step)
        yield ""


def _step_row(results: Results, workload: str, step: str) -> str:
    ours, theirs = results.wall(workload, step, OURS), results.wall(workload, step, THEIRS)
    ratio = _ratio(ours, theirs)
    counted = results.counted(workload, step, OURS)
    cells = [
        step,
        _number(ours),
        _number(theirs),
        f"{ratio:.2f}" if ratio else "",
        _cpu(results, workload, step, OURS),
        _cpu(results, workload, step, THEIRS),
        *(
            bytes_text(wire) if (wire := results.wire(workload, step, name)) is not None else ""
            for name in (OURS, THEIRS)
        ),
        str(counted.counts.requests) if counted and counted.counts and counted.counts.sent_bytes < 65_536 else "",
    ]
    return f"| {' | '.join(cells)} |"


def _wire(figure: int | None) -> str:
    return "" if figure is None else bytes_text(figure)


def _number(figure: float | None) -> str:
    return "" if figure is None else f"{figure:.2f}"


def _cpu(results: Results, workload: str, step: str, contestant: str) -> str:
    client = results.median(workload, step, contestant, lambda sample: sample.client_cpu_seconds)
    server = results.median(workload, step, contestant, lambda sample: sample.server_cpu_seconds)
    return "" if client is None or server is None else f"{client:.2f} + {server:.2f}"


def _both_cpu(results: Results, workload: str, step: str, contestant: str) -> float | None:
    return results.median(
        workload, step, contestant, lambda sample: sample.client_cpu_seconds + sample.server_cpu_seconds
    )


def _memory(results: Results) -> Iterator[str]:
    yield "## Peak memory"
    yield ""
    yield "| workload | deltasync client | deltasync server | rsync client | rsync server |"
    yield "|---|---|---|---|---|"
    for workload in results.workloads:
        cells = [
            "" if figure is None else bytes_text(figure)
            for name in (OURS, THEIRS)
            for figure in results.peak(workload.name, name) or (None, None)
        ]
        yield f"| {workload.name} | {' | '.join(cells)} |"
    yield ""


def _watching(results: Results) -> Iterator[str]:
    watching = results.watching
    if not watching:
        return
    yield "## A watcher on the tiny files"
    yield ""
    yield "| figure | measured |"
    yield "|---|---|"
    for figure, measured in _watching_rows(watching):
        yield f"| {figure} | {measured} |"
    yield ""


def _watching_rows(watching: Watching) -> Iterator[tuple[str, str]]:
    rest = f"in {watching.idle_seconds} s at rest"
    yield "start of `watch` to first sync applied", f"{watching.first_sync_seconds:.2f} s"
    yield "`push` with nothing to send, beside it", f"{watching.push_seconds:.3f} s"
    yield "save of a small file to its being in the server's tree, median", f"{watching.save_median_seconds:.3f} s"
    yield "the same, worst", f"{watching.save_worst_seconds:.3f} s"
    yield f"CPU {rest}, one periodic rescan included", f"{watching.idle_cpu_seconds:.2f} s"
    yield "CPU in the median second at rest", f"{watching.idle_quiet_cpu_seconds:.2f} s"
    yield f"bytes on the wire {rest}", f"{watching.idle_wire_bytes} B"
    yield "`status` beside it", f"{watching.status_beside_seconds:.3f} s"
    yield "`status` with no watcher", f"{watching.status_seconds:.3f} s"
    yield "peak memory of the watcher", bytes_text(watching.watcher_peak_bytes)


def _links(results: Results) -> Iterator[str]:
    if not (results.cut or results.limited):
        return
    yield "## A link that breaks, and one with a limit"
    yield ""
    yield "A push of new content each, through a proxy, at the same size at every scale."
    yield ""
    yield "| figure | measured |"
    yield "|---|---|"
    if cut := results.cut:
        yield f"| connections reset (RST), one every {bytes_text(CUT_EVERY_BYTES)} | {cut.cuts} |"
        yield f"| bytes that the client sent for {bytes_text(cut.size_bytes)} of content | {cut.sent_bytes:,} |"
        yield f"| wall | {cut.wall_seconds:.2f} s |"
    if limited := results.limited:
        yield f"| `--bwlimit {LIMIT}`: the limit | {LIMIT_BYTES:,} B/s |"
        yield f"| the measured rate, over {limited.seconds:.1f} s | {limited.bytes_per_second:,.0f} B/s |"
    yield ""


_JOBS = """\
Commands that run on a host, on loopback, each beside the other program in the same run: ours first. `home` is `jobs
fetch` from its start to its end, with every file fsynced, which rsync does not; `collected` and `staging` are what the
host says of them, staging with the content there already.
"""


def _jobs(results: Results) -> Iterator[str]:
    if not results.jobs:
        return
    yield "## Commands on a host"
    yield ""
    yield _JOBS
    yield "| figure | measured |"
    yield "|---|---|"
    for each in results.jobs:
        if each.said:
            yield f"| {each.work} | {each.said} |"
    yield ""


_BACKUPS = """\
These are other programs with other promises. restic and borg compress and encrypt, casync compresses; they keep every
version in a repository, out of which a job must restore what it wants to read. deltasync leaves a plain tree, and
stores a changed file whole. Here the three write to a repository on the same disk with their defaults, and deltasync
pushes to its server on loopback. One run each, no proxy, `sync` before it; stored is by how much the repository, or the
server's folder with cache and tree, grew on the disk.
"""


def _backups(results: Results) -> Iterator[str]:
    if not results.backups:
        return
    yield f"## Beside {', '.join(PROGRAMS[:-1])} and {PROGRAMS[-1]}"
    yield ""
    yield _BACKUPS
    if results.programs:
        yield f"Measured: {', '.join(results.programs)}."
        yield ""
    yield "| workload | step | program | wall s | CPU s | stored |"
    yield "|---|---|---|---|---|---|"
    for each in sorted(results.backups, key=lambda each: (each.workload, each.step != "first sync")):
        cells = [each.workload, each.step, each.program, f"{each.wall_seconds:.2f}", f"{each.cpu_seconds:.2f}"]
        yield f"| {' | '.join(cells)} | {bytes_text(each.stored_bytes)} |"
    yield ""
