"""What a command on a host costs beside ssh, cp and rsync, in the same run."""

from __future__ import annotations

import http.client
import json
import os
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.contestants import BIN, Deltasync, deltasync_server, environment, has_rsync, rsync_server
from bench.measure import Failed, PeakMemory, run, wait_until_idle
from bench.sshd import has_sshd, sshd
from bench.workloads import Workload, make

RUN_FLAGS = ("--run-without-token",)
TRUST_FLAGS = (*RUN_FLAGS, "--trust-jobs")
_BIG_BYTES, _LOG_BYTES = 1 << 30, 2 << 30
_STAGED_FILES, _SMALL_FILES, _SMALL_BYTES = 20_000, 10_000, 4096
_STARTS, _RUNS, _STAGED = 25, 9, 5
_MAKE_SMALL = (
    "import os, sys\n"
    "for n in range(int(sys.argv[2])):\n"
    "    folder = os.path.join(sys.argv[1], str(n // 500)); os.makedirs(folder, exist_ok=True)\n"
    "    open(os.path.join(folder, str(n)), 'wb').write(os.urandom(int(sys.argv[3])))\n"
)


@dataclass(frozen=True, slots=True)
class JobFigure:
    """One figure, and what it may be at most."""

    work: str
    figure: float | None
    limit: float | None
    """None: there is no goal."""
    unit: str
    said: str
    """The times that it comes from."""


class _User:
    """Runs commands on the host of a server."""

    def __init__(self, server: Deltasync, home: Path) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.own = environment(home) | {"DELTASYNC_ON": f"http://127.0.0.1:{server.port}"}
        self.server = server

    def run(self, *words: str | Path) -> tuple[float, Any]:
        """Run `deltasync` to its end; returns the seconds, and what it answered."""
        ran = run([BIN / "deltasync", *words], self.own | {"DELTASYNC_JSON": "1"})
        return ran.wall_seconds, json.loads(ran.output)

    def metrics(self, job: str) -> Any:
        """Return the figures that the host has recorded of a job."""
        return self.run("jobs", "show", job)[1]["metrics"]

    def staged(self, wanted: Path) -> tuple[float, int]:
        """Run `true` with an input; returns the seconds of its staging, and the bytes sent."""
        answer = self.run("run", "--in", wanted, "--", "true")[1]
        return self.metrics(answer["job"])["staged_seconds"], answer["inputs"]["sent_bytes"]


def measure_jobs(folder: Path, scale: float) -> Iterator[JobFigure]:
    """Measure all; folder is fresh and may be left full."""
    with deltasync_server(folder / "host", flags=RUN_FLAGS) as server:
        user = _User(server, folder / "home")
        yield from _starts(user, folder)
        yield from _home(user, folder, scale)
        yield from _log(user, folder, scale)
    yield from _staging(folder, scale)


def _starts(user: _User, folder: Path) -> Iterator[JobFigure]:
    source = folder / "source"
    source.mkdir()
    (source / "a.txt").write_text("alpha\n")
    run(user.server.command(source, user.server.port), user.own)
    with closing(http.client.HTTPConnection("127.0.0.1", user.server.port, timeout=60)) as connection:
        connection.connect()
        first = [_first_byte(connection, number) for number in range(_STARTS)]
    yield _figure("POST to the first byte of output, inputs in sync", first, 0.1)
    ours = [user.run("run", "--", "true")[0] for _ in range(_RUNS)]
    yield _figure("`deltasync run -- true`", ours, 0.45)
    theirs: list[float] = []
    if has_sshd():
        with sshd(folder / "sshd", user.own) as login:
            theirs = [run([*login, "true"], user.own).wall_seconds for _ in range(_RUNS)]
    yield _beside("the same beside `ssh localhost true`", ours, theirs, 3.0)


def _first_byte(connection: http.client.HTTPConnection, number: int) -> float:
    place = "w/a.txt"
    asked = {
        "key": f"{number:032x}",
        "client_id": "b" * 32,
        "argv": [[{"text": "cat"}], [{"input": place}]],
        "inputs": [{"workspace": "bench", "sequence": 1, "path": "a.txt", "place": place}],
    }
    began = time.perf_counter()
    connection.request("POST", "/api/v1/jobs", json.dumps(asked), {"Content-Type": "application/json"})
    job = json.load(connection.getresponse())
    connection.request("GET", f"/api/v1/jobs/{job['id']}/logs")
    response = connection.getresponse()
    while line := response.readline():
        if line.startswith(b"event: stdout"):
            seconds = time.perf_counter() - began
            response.read()
            return seconds
    raise Failed(f"the job {job} said nothing")


def _home(user: _User, folder: Path, scale: float) -> Iterator[JobFigure]:
    if not has_rsync():
        return
    size, count = int(_BIG_BYTES * scale), int(_SMALL_FILES * scale)
    home = folder / "came"
    home.mkdir()
    make_big = ("--shell", f"head -c {size} /dev/urandom > {{out:{home}/big}}")
    script = folder / "small.py"
    script.write_text(_MAKE_SMALL)
    make_small = ("--", "python3", script, f"{{out:{home}/small/}}", str(count), str(_SMALL_BYTES))
    for name, words, limit in (("big", make_big, 1 / 0.8), ("small", make_small, 1.2)):
        job = user.run("run", "--detach", *words)[1]["job"]
        run([BIN / "deltasync", "jobs", "wait", job], user.own)
        os.sync()
        ours = user.run("jobs", "fetch", job)[0]
        collected = user.metrics(job)["collected_seconds"]
        theirs = _rsynced(home / name, folder / f"rsync-{name}", user.own)
        durable = _rsynced(home / name, folder / f"rsync-{name}-durable", user.own, "--fsync")
        what = f"{size / 2**20:.0f} MiB home" if name == "big" else f"{count} files of 4 KiB home"
        yield _beside(f"{what}, beside rsync", [ours], [theirs], limit)
        yield _beside("the same, beside `rsync --fsync`: ours is durable before the host may forget", [ours], [durable])
        yield _figure("the same, collected on the host before that", [collected], None)


def _rsynced(source: Path, folder: Path, own: dict[str, str], *flags: str) -> float:
    with rsync_server(folder) as server:
        subprocess.run(["cp", "-a", source, server.tree], check=True)
        os.sync()
        dest = folder / "dest"
        dest.mkdir()
        return run([*server.fetch_command(dest, server.port), *flags], own).wall_seconds


def _log(user: _User, folder: Path, scale: float) -> Iterator[JobFigure]:
    size = int(_LOG_BYTES * scale)
    memory = PeakMemory()
    memory.follow(user.server.server_pid)
    words: list[str | Path] = [BIN / "deltasync", "run", "--shell", f"head -c {size} /dev/zero"]
    began = time.perf_counter()
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, env=user.own) as client:
        memory.follow(client.pid)
        code = client.wait()
    if code:
        raise Failed(f"the command with a log of {size} bytes exited {code}")
    seconds, peaks = time.perf_counter() - began, (memory.last(), memory.peak(user.server.server_pid))
    memory.stop()
    for side, peak in zip(("client", "server"), peaks, strict=True):
        said = f"{seconds:.2f} s"
        yield JobFigure(f"a log of {size / 2**20:.0f} MiB, peak memory of the {side}", peak, 150 << 20, "bytes", said)


def _staging(folder: Path, scale: float) -> Iterator[JobFigure]:
    """Stage a large file and many small ones where inputs may be links, and where they may not."""
    big, many = folder / "big", folder / "many"
    for each in (big, many):
        each.mkdir()
    make(Workload("staged", "", 1, 1, (int(_BIG_BYTES * scale),)), big)
    count = int(_STAGED_FILES * scale)
    make(Workload("staged", "", count, max(1, count // 100), (_SMALL_BYTES,)), many)
    for flags, way, limit in ((TRUST_FLAGS, "links", 0.5), (RUN_FLAGS, "copies", 1.1)):
        with deltasync_server(folder / f"host-{way}", flags=flags) as server:
            user = _User(server, folder / f"home-{way}")
            user.staged(big)
            _settle(server)
            seconds, sent = user.staged(big)
            what = f"a second run on {_BIG_BYTES * scale / 2**20:.0f} MiB"
            if way == "links":  # a copy takes what the disk takes
                yield JobFigure(f"{what}, content sent", sent, 0, "B", "")
                yield _figure(f"{what}, staging by {way}", [seconds], 0.05)
            user.staged(many)
            ours: list[float] = []
            theirs: list[float] = []
            for number in range(_STAGED):  # in turns: what the disk is at changes from moment to moment
                _settle(server)
                theirs.append(_copied(many, folder / f"copied-{way}-{number}"))
                _settle(server)
                ours.append(user.staged(many)[0])
            yield _beside(f"staging {count} files by {way}, beside `cp -r`", ours, theirs, limit)


def _settle(server: Deltasync) -> None:
    wait_until_idle(server.server_pid)
    os.sync()


def _copied(source: Path, target: Path) -> float:
    began = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    return time.perf_counter() - began


def _figure(work: str, seconds: list[float], limit: float | None) -> JobFigure:
    median = statistics.median(seconds)
    return JobFigure(work, median, limit, "s", _said(seconds))


def _beside(work: str, ours: list[float], theirs: list[float], limit: float | None = None) -> JobFigure:
    if not theirs:
        return JobFigure(work, None, limit, "times", "the other program is not installed")
    said = f"{_said(ours)} and {_said(theirs)}"
    return JobFigure(work, statistics.median(ours) / statistics.median(theirs), limit, "times", said)


def _said(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.3f} s"
