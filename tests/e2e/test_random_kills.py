"""Client and server are killed at random moments while files change; nothing acknowledged is lost."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import folders
import pytest

BIN = Path(sys.executable).parent
KILLS = int(os.environ.get("KILLS", "12"))
SEED = int(os.environ.get("SEED", "0")) or random.SystemRandom().randrange(1, 10**6)


class Mutator(threading.Thread):
    """Changes a folder at random, with the moves, copies and replacements of real work, until told to stop."""

    def __init__(self, root: Path, seed: int) -> None:
        super().__init__(daemon=True)
        self.root, self.random = root, random.Random(seed)
        self.stopped = threading.Event()
        self.steps = 0

    def run(self) -> None:
        while not self.stopped.wait(self.random.uniform(0.001, 0.02)):
            with contextlib.suppress(OSError, ValueError):
                self.step()
            self.steps += 1

    def step(self) -> None:
        pick = self.random
        folder = self.root / f"d{pick.randrange(6)}" / f"e{pick.randrange(3)}"
        path = folder / f"f{pick.randrange(12)}"
        action = pick.randrange(9)
        if action <= 3:
            folders.write(folder, path.name, pick.randbytes(pick.choice([0, 10, 5000, 200_000])))
        elif action == 4:
            path.unlink()
        elif action == 5:
            os.replace(path, self.root / f"d{pick.randrange(6)}" / f"moved{pick.randrange(5)}")
        elif action == 6:
            source = self.root / f"d{pick.randrange(6)}"
            if max(folder.count("/") for folder, _, _ in os.walk(source)) < str(source).count("/") + 20:
                shutil.move(source, self.root / f"d{pick.randrange(6)}")
        elif action == 7:
            shutil.copy2(path, folder / f"copy{pick.randrange(4)}")
        else:
            temporary = folders.write(folder, f".{path.name}.swp", pick.randbytes(300))
            os.replace(temporary, path)


class Processes:
    """One server and one watcher, each restarted after its kill; the watcher's lines are kept."""

    def __init__(self, folder: Path) -> None:
        self.media, self.data = folder / "media", folder / "data"
        self.config = folder / "server.toml"
        self.config.write_text("[limits]\nbundle_content_bytes = 60_000\n")  # so that the larger files go in parts
        folders.write(self.media, "first.txt", "something to acknowledge before the first kill")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        self.lines = folder / "watch.jsonl"
        self.errors = (folder / "errors.txt").open("ab")
        self.server = self.start_server()
        self.client = self.start_client()

    def start_server(self) -> subprocess.Popen[str]:
        listen = self.url.removeprefix("http://")
        words = [BIN / "deltasync-server", "serve", "--data", self.data, "--listen", listen, "--config", self.config]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=self.errors, text=True)
        assert process.stdout
        line = process.stdout.readline()
        assert line.startswith("listening on"), (line, Path(self.errors.name).read_text()[-3000:])
        return process

    def start_client(self) -> subprocess.Popen[bytes]:
        words = [BIN / "deltasync", "watch", self.media, "--to", self.url, "--json", "--debounce", "50ms"]
        words += ["--settle", "200ms", "--rescan", "5s"]
        with self.lines.open("ab") as out:
            return subprocess.Popen(words, stdout=out, stderr=self.errors)

    def await_first_receipt(self) -> None:
        for _ in range(600):
            if self.acknowledged():
                return
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.client.wait(0.1)
                break
        pytest.fail(f"nothing was acknowledged: {Path(self.errors.name).read_text()[-3000:]}")

    def kill_one(self, pick: random.Random) -> None:
        victim = pick.choice([self.server, self.client])
        with contextlib.suppress(subprocess.TimeoutExpired):
            victim.wait(pick.uniform(0.02, 1.2))  # a random moment, unless it ends by itself, which it must not
            pytest.fail(
                f"a process ended by itself with {victim.returncode}: {Path(self.errors.name).read_text()[-3000:]}"
            )
        victim.kill()
        assert victim.wait(30) == -signal.SIGKILL
        if victim is self.server:
            self.server = self.start_server()
        else:
            self.client = self.start_client()

    def push(self) -> dict[str, object]:
        # What is moved and written anew between two looks counts as deleted: much of it may be, while nobody looks.
        words = [BIN / "deltasync", "push", self.media, "--to", self.url, "--allow-mass-delete", "--json"]
        for _ in range(30):
            done = subprocess.run(words, capture_output=True, text=True, timeout=120)
            if done.returncode not in (3, 4):  # a file is still being written, or the watcher is just starting
                break
        assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
        return json.loads(done.stdout)

    def acknowledged(self) -> int:
        """Return the highest sequence that the watcher was heard to have acknowledged."""
        highest = 0
        for line in self.lines.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # the line that a kill cut
                event = json.loads(line)
                if event.get("event") in ("sent", "acknowledged", "pushed"):
                    highest = max(highest, event["sequence"])
        return highest

    def close(self) -> None:
        for process in (self.client, self.server):
            process.terminate()
        for process in (self.client, self.server):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()
        self.errors.close()


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    running = Processes(tmp_path)
    yield running
    running.close()


def test_no_acknowledged_change_is_lost_when_either_side_is_killed_at_random(processes: Processes) -> None:
    """After KILLS kills of client or server under changing files, both sides are equal and the store is whole."""
    print(f"KILLS={KILLS} SEED={SEED}")
    pick = random.Random(SEED)
    processes.await_first_receipt()
    mutator = Mutator(processes.media, SEED)
    mutator.start()
    for _ in range(KILLS):
        processes.kill_one(pick)
    mutator.stopped.set()
    mutator.join(30)
    assert mutator.steps > KILLS
    report = processes.push()
    folders.assert_same(processes.media, processes.data / "workspaces/media/tree")
    with urllib.request.urlopen(f"{processes.url}/api/v1/workspaces/media") as answer:
        state = json.load(answer)
    assert state["root"] == report["root"] and state["tree_sequence"] == state["sequence"]
    assert state["sequence"] >= processes.acknowledged() > 0
    processes.close()
    check = subprocess.run(
        [BIN / "deltasync-server", "check", "--data", processes.data, "--json"], capture_output=True, text=True
    )
    assert check.returncode == 0, check.stdout + check.stderr
