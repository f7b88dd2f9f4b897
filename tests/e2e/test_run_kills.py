"""Client and server are killed at random moments while commands run; every job has an end, and leaves nothing."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from remote_runs import Terminal
from serving import BINARY as SERVER
from serving import until
from user import BINARY, SECONDS

KILLS = int(os.environ.get("KILLS", "2"))
SEED = int(os.environ.get("SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
FILES, BIG = 20, 3 << 20
PLACES = {"queued": 1, "staging": 2, "running": 3, "collecting": 4}
OVER = {"done", "failed", "cancelled", "lost"}
CODES = {0, 122, 123, 124, 125}
"""What `run` may end with while its host dies: its command's own 0, or a code of its own."""


class Rounds:
    """A host that is started again when it was killed, and a user who runs commands on it."""

    def __init__(self, folder: Path) -> None:
        self.data, self.errors = folder / "data", (folder / "errors.txt").open("ab")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.listen = f"127.0.0.1:{free.getsockname()[1]}"
        self.terminal = Terminal.at(folder / "home", f"http://{self.listen}")
        self.expected: dict[str, bytes] = {}
        """What each file holds that may be in the folder."""
        self.server = self.start_server()

    @property
    def folder(self) -> Path:
        return self.terminal.folder

    def start_server(self) -> subprocess.Popen[str]:
        words = [SERVER, "serve", "--data", self.data, "--listen", self.listen, "--run-without-token", "--slots", "2"]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=self.errors, text=True)
        assert process.stdout
        line = process.stdout.readline()
        assert line.startswith("listening on"), (line, Path(self.errors.name).read_text()[-3000:])
        return process

    def kill_server(self) -> None:
        self.server.kill()
        assert self.server.wait(SECONDS) == -signal.SIGKILL
        self.server = self.start_server()
        lost = {each["id"] for each in self.jobs() if each["state"] == "lost"}
        assert lost.isdisjoint(running_jobs())  # the start has killed them

    def line(self, number: int, pick: random.Random, *, seconds: float) -> list[str]:
        """Make the inputs of a command, note what it writes, and return it: it copies a file and a folder of them."""
        big = pick.randbytes(pick.choice([10, BIG]))
        (self.folder / f"big-{number}").write_bytes(big)
        (self.folder / f"many-{number}").mkdir()
        self.expected |= {f"big-{number}": big, f"copy-{number}": big}
        for each in range(FILES):
            content = pick.randbytes(1000)
            (self.folder / f"many-{number}/{each}").write_bytes(content)
            self.expected |= {f"many-{number}/{each}": content, f"all-{number}/{each}": content}
        copies = f"cp -r {{in:many-{number}}}/. {{out:all-{number}/}}; cat {{in:big-{number}}} > {{out:copy-{number}}}"
        return ["--shell", f"echo began; {copies}; sleep {seconds}; echo ended"]

    def require_whole(self) -> None:
        """Every file here is one that may be, with all of its content."""
        for path in self.folder.rglob("*"):
            name = str(path.relative_to(self.folder))
            if path.is_file() and ".deltasync" not in path.parts:  # what a fetch has under way
                assert self.expected.get(name) == path.read_bytes(), f"{name} is not what it may be"

    def jobs(self) -> list[Any]:
        with urllib.request.urlopen(f"http://{self.listen}/api/v1/jobs") as answer:
            return msgspec.json.decode(answer.read())["jobs"]

    def reach(self, process: subprocess.Popen[bytes], known: set[str], place: int) -> None:
        """Wait until a command's job has come so far, or the command is over; the first place is before any job."""
        while place and process.poll() is None:
            states = [each["state"] for each in self.jobs() if each["id"] not in known]
            if states and PLACES.get(states[0], len(PLACES)) >= place:
                return
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.01)

    def close(self) -> None:
        self.server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.server.wait(SECONDS)
        self.server.kill()
        self.errors.close()


def running_jobs() -> set[str]:
    """Return the ids of jobs that have a process on this machine."""
    found = set()
    for each in Path("/proc").iterdir():
        if each.name.isdigit():
            with contextlib.suppress(OSError):
                found |= set(re.findall(rb"(?:^|\0)DELTASYNC_JOB=(ds_\w+)", (each / "environ").read_bytes()))
    return {job_id.decode() for job_id in found}


@pytest.fixture
def rounds(tmp_path: Path) -> Iterator[Rounds]:
    made = Rounds(tmp_path)
    yield made
    made.close()


def a_round(rounds: Rounds, number: int, pick: random.Random) -> None:
    """Run a command, or bring home what one has written, and kill one side of it at a random moment."""
    victim = pick.choice(["server", "run", "fetch", "server in a fetch"])
    known = {each["id"] for each in rounds.jobs()}
    line = rounds.line(number, pick, seconds=pick.choice([0.2, 5.0] if victim == "server" else [0.0, 0.2]))
    if "fetch" in victim:
        job = rounds.terminal.detached(*line)
        assert rounds.terminal.user.run("jobs", "wait", job).code == 0
        words: list[Any] = [BINARY, "jobs", "fetch"]
    else:
        words = [BINARY, "run", *line]
    with (rounds.folder.with_name(f"said-{number}")).open("wb") as said:
        environment = rounds.terminal.user.environment
        process = subprocess.Popen(words, stdout=said, stderr=said, env=environment, cwd=rounds.folder)
        if "fetch" not in victim:
            rounds.reach(process, known, pick.randrange(len(PLACES) + 1))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(pick.uniform(0.0, 2.0 if "fetch" in victim else 0.3))
        if victim.startswith("server"):
            rounds.kill_server()
        else:
            process.kill()
        code = process.wait(SECONDS)
    heard = Path(said.name).read_text()
    assert code in {*CODES, -signal.SIGKILL} or "fetch" in victim, (victim, code, heard)
    assert "Traceback" not in heard, heard
    rounds.require_whole()


def test_every_job_has_an_end_when_either_side_is_killed_at_random(rounds: Rounds, tmp_path: Path) -> None:
    """After KILLS kills of client or server each job is over with a reason, no folder, no process and no half file is
    left, what is done comes home whole, and the store is sound.
    """
    print(f"KILLS={KILLS} SEED={SEED}")
    pick = random.Random(SEED)
    for number in range(KILLS):
        a_round(rounds, number, pick)
    until(lambda: all(each["state"] in OVER for each in rounds.jobs()))
    for each in rounds.jobs():
        assert (each["state"] == "done") != bool(each["reason"]), each
        assert each["state"] in ("done", "lost", "cancelled"), each
    until(lambda: [path.name for path in (rounds.data / "sessions").iterdir() if path.is_dir()] == [])
    assert running_jobs().isdisjoint(each["id"] for each in rounds.jobs())
    assert rounds.terminal.user.run("jobs", "fetch").code == 0
    rounds.require_whole()
    known = {each["id"]: each for each in rounds.jobs()}
    for record in (rounds.terminal.user.home / "own").rglob("jobs/ds_*.json"):
        job = known[record.stem]
        assert job["state"] != "done" or job["acknowledged"] or job["returned"] is None, job
    assert list(rounds.folder.rglob(".deltasync/*")) == []
    rounds.close()
    checked = subprocess.run([SERVER, "check", "--data", rounds.data, "--json"], capture_output=True, check=False)
    assert checked.returncode == 0, checked.stdout
