"""`python -m bench`: run the workloads, interleaved, and write bench/RESULTS.md."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

from bench import backups
from bench.contestants import Contestant, deltasync_server, environment, has_rsync, pushed, rsync_server
from bench.floor import measure_floor
from bench.jobs import measure_jobs
from bench.links import measure_cut, measure_limit
from bench.measure import CountingProxy, Failed, PeakMemory, run, tree_cpu_seconds, wait_until_idle
from bench.report import Results, Sample, bytes_text, in_unit, write
from bench.watching import measure_watching
from bench.workloads import FETCH, STEPS, Workload, difference, workloads

_ALONE = ("floor", "watch", "cut", "limit", "jobs", "backups")

SERVERS: dict[str, Callable[[Path], AbstractContextManager[Contestant]]] = {
    "deltasync": deltasync_server,
    "rsync": rsync_server,
}


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asks for."""

    scale: float
    runs: int
    only: frozenset[str]
    contestants: list[str]
    work: Path
    results: Path


class TreesDiffer(Exception):
    """After a sync the two trees are not equal."""


def main() -> int:
    """Run the benchmark and write its results."""
    options = _parse()
    results = Results(options.scale, options.runs)
    options.work.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="deltasync-bench-", dir=options.work))
    try:
        for workload in workloads(options.scale):
            if workload.name in options.only:
                _measure(workload, options, work, results)
        if "deltasync" in options.contestants:
            _measure_alone(options, work, results)
        write(results, options.results)
        print(f"wrote {options.results}; removing what was measured", flush=True)
    except (Failed, TreesDiffer, TimeoutError) as error:
        print(f"the benchmark stops: {error}", file=sys.stderr)
        return 1
    finally:
        # Only now: files made right after thousands were deleted cost ten times more on ext4.
        shutil.rmtree(work, ignore_errors=True)
    return 0


def _parse() -> Options:
    names = [workload.name for workload in workloads(1)]
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="size of the workloads; the goals are stated for 1")
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each workload; medians are reported")
    parser.add_argument("--only", action="append", choices=[*names, *_ALONE], help="measure only these (repeatable)")
    parser.add_argument("--contestant", action="append", choices=list(SERVERS), help="run only these (repeatable)")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="folder for trees and data")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("RESULTS.md"), help="file to write")
    chosen = parser.parse_args()
    contestants = chosen.contestant or list(SERVERS)
    if "rsync" in contestants and not has_rsync():
        print("rsync is not installed (apt-get install rsync): measuring deltasync alone", file=sys.stderr)
        contestants.remove("rsync")
    only = frozenset(chosen.only or [*names, *_ALONE])
    return Options(chosen.scale, chosen.runs, only, contestants, chosen.work, chosen.results)


def _measure_alone(options: Options, work: Path, results: Results) -> None:
    """Measure what has no counterpart in rsync."""
    if "floor" in options.only:
        print("floor: hashing, copying and fsync alone", flush=True)
        media, model = (each.total_bytes for each in workloads(options.scale) if each.name in ("media", "model"))
        results.floors = measure_floor(work / "floor", media, model)
        shutil.rmtree(work / "floor")
    if "watch" in options.only:
        tiny = workloads(options.scale)[-1]
        print(f"watch: {tiny.title}", flush=True)
        results.watching = measure_watching(tiny, work / "watch")
    if "cut" in options.only:
        print("cut: a push over a link that breaks", flush=True)
        results.cut = measure_cut(work / "cut")
    if "limit" in options.only:
        print("limit: a push under --bwlimit", flush=True)
        results.limited = measure_limit(work / "limit")
    if "jobs" in options.only:
        print("jobs: commands on a host, beside ssh, cp and rsync", flush=True)
        for each in measure_jobs(work / "jobs", options.scale):
            results.jobs.append(each)
            told = "not measured" if each.figure is None else in_unit(each.figure, each.unit)
            print(f"  {each.work}: {told}; {each.said}", flush=True)
    if "backups" in options.only:
        print("backups: restic, borg and casync, where they are", flush=True)
        _back_up(options, work, results)


def _back_up(options: Options, work: Path, results: Results) -> None:
    """Let every program that is installed store the same trees."""
    installed = {program: said for program in backups.PROGRAMS if (said := backups.version(program))}
    results.programs.extend(installed.values())
    for program in (each for each in backups.PROGRAMS if each not in installed):
        _leave_out(f"{program}, which is not installed", results)
    for workload in (each for each in workloads(options.scale) if each.name in backups.EDITS):
        if _lacks_room(f"backups of {workload.name}", workload, work, results):
            continue
        for program in (backups.OURS, *installed):
            folder = work / f"{workload.name}-{program}"
            for backup in backups.measure_backup(program, workload, folder):
                results.backups.append(backup)
                print(f"  {workload.name}, {backup.step:18} {program:10} {backup.wall_seconds:8.2f} s", flush=True)
            shutil.rmtree(folder)


def _lacks_room(what: str, workload: Workload, work: Path, results: Results) -> bool:
    """Tell whether the disk is too full for a tree, two versions of it on the other side and some more, and say so."""
    free, needed = shutil.disk_usage(work).free, 3.5 * workload.total_bytes
    if free < needed:
        _leave_out(f"{what}, which needs {bytes_text(needed)} of disk where {bytes_text(free)} are free", results)
    return free < needed


def _leave_out(line: str, results: Results) -> None:
    print(f"not measured: {line}", file=sys.stderr, flush=True)
    results.left_out.append(line)


def _measure(workload: Workload, options: Options, work: Path, results: Results) -> None:
    contestants, runs = options.contestants, options.runs
    if not workload.is_timed:
        contestants, runs = [name for name in contestants if name == "deltasync"], 0
        if not contestants or _lacks_room(workload.name, workload, work, results):
            return
    results.workloads.append(workload)
    for number in range(runs + 1):
        is_counting = number == 0  # the first run counts bytes and memory through a proxy and is not timed
        print(f"{workload.name}: {'counting' if is_counting else f'run {number} of {runs}'}", flush=True)
        folder = work / f"{workload.name}-{number}"
        order = contestants[:: -1 if number % 2 else 1]
        _run_steps(workload, folder, order, results, is_counting=is_counting)
        if workload.total_bytes > 1 << 29:
            shutil.rmtree(folder)  # few files: their removal slows nothing down


def _run_steps(workload: Workload, folder: Path, order: list[str], results: Results, *, is_counting: bool) -> None:
    source = folder / "source"
    source.mkdir(parents=True)
    with ExitStack() as stack:
        servers = [stack.enter_context(SERVERS[name](folder / name)) for name in order]
        memory = PeakMemory() if is_counting else None
        proxies = [CountingProxy(server.port) if is_counting else None for server in servers]
        for step in workload.steps:
            STEPS[step](workload, source)
            for server, proxy in zip(servers, proxies, strict=True):
                os.sync()  # nobody pays for the pages that somebody else left dirty
                command, filled = _command(step, server, source, folder, proxy.port if proxy else server.port)
                sample = _sync(server, command, folder, proxy, memory)
                results.add(workload.name, step, server.name, sample)
                if where := difference(source, filled):
                    raise TreesDiffer(f"{server.name}, {workload.name}, {step}: {where}")
                print(f"  {step:22} {server.name:10} {sample.wall_seconds:8.2f} s", flush=True)
        if memory:
            memory.stop()
        for proxy in filter(None, proxies):
            proxy.close()


def _command(step: str, server: Contestant, source: Path, folder: Path, port: int) -> tuple[list[str | Path], Path]:
    """Return what a step runs, and the tree that equals the source afterwards."""
    if step != FETCH:
        return server.command(source, port), server.tree
    dest = folder / f"{server.name}-fetched"
    dest.mkdir()
    return server.fetch_command(dest, port), dest


def _sync(
    server: Contestant,
    command: list[str | Path],
    folder: Path,
    proxy: CountingProxy | None,
    memory: PeakMemory | None,
) -> Sample:
    wait_until_idle(server.server_pid)
    if memory:
        memory.follow(server.server_pid)
    before = tree_cpu_seconds(server.server_pid)
    ran = run(command, environment(folder / server.name), watch=memory)
    wait_until_idle(server.server_pid)  # its checkpoint belongs to this step's CPU
    return Sample(
        wall_seconds=ran.wall_seconds,
        client_cpu_seconds=ran.cpu_seconds,
        server_cpu_seconds=tree_cpu_seconds(server.server_pid) - before,
        client_peak_bytes=memory.last() if memory else 0,
        server_peak_bytes=memory.peak(server.server_pid) if memory else 0,
        counts=proxy.take() if proxy else None,
        pushed=pushed(ran.output),
    )


if __name__ == "__main__":
    sys.exit(main())
