"""`deltasync fetch` as a user meets it: exit codes, one JSON object, and kill -9 in the middle."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folders
import pytest
from corpus_good import noise
from desk import Desk
from serving import Served, serving, until

from deltasync.client.download import RANGE_BYTES

BINARY = Path(sys.executable).parent / "deltasync"
SECONDS = 60.0
REPORT = {
    "workspace", "sequence", "root", "files", "bytes", "created", "replaced", "touched", "unchanged", "deleted",
    "fetched_bytes", "found_bytes", "verified", "damaged", "problems", "changes", "dry_run", "seconds",
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served") / "data", "--keep-sequences", "2") as served:
        yield served


@dataclass(frozen=True)
class User:
    """A user with a home, and a pushed folder."""

    home: Path
    server: Served
    source: Path

    def words(self, *words: str | Path) -> list[str | Path]:
        return [BINARY, "fetch", "--from", self.server.url, "--workspace", self.source.name, *words]

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("DELTASYNC_")}
        return kept | {"DELTASYNC_HOME": str(self.home)}

    def fetch(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        return self.run(*self.words(*words))

    def run(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, env=self.environment())

    def start(self, *words: str | Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self.words(*words), env=self.environment(), stdout=subprocess.DEVNULL)


@pytest.fixture
def desk(tmp_path: Path, server: Served, request: pytest.FixtureRequest) -> Desk:
    made = Desk(tmp_path / f"e{abs(hash(request.node.nodeid)):x}", server.url)
    folders.life(made.root)
    made.push()
    return made


@pytest.fixture
def user(tmp_path: Path, server: Served, desk: Desk) -> User:
    return User(tmp_path / "home", server, desk.root)


def test_a_fetch_prints_what_scripts_rely_on(user: User, tmp_path: Path) -> None:
    """One JSON object and nothing else; for people one line that says what was done."""
    done = user.fetch(tmp_path / "dest", "--json")
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)
    report: dict[str, Any] = json.loads(done.stdout)
    assert set(report) == REPORT and report["verified"] and report["created"] == 9
    folders.assert_same(user.source, tmp_path / "dest")
    again = user.fetch(tmp_path / "dest")
    assert (again.returncode, again.stderr) == (0, "")
    assert "sequence 1, 8 files; nothing to do; 0 B fetched, " in again.stdout and "verified" in again.stdout
    folders.write(tmp_path / "dest", "readme.txt", "other")
    part = user.fetch(tmp_path / "dest", "media", "-j", "1")
    assert (part.returncode, (tmp_path / "dest/readme.txt").read_text()) == (0, "other")
    dry = user.fetch(tmp_path / "dest", "-n")
    assert (dry.returncode, dry.stdout.splitlines()[0]) == (0, "replaced readme.txt")
    assert "would be: 1 replaced; 6 B fetched" in dry.stdout
    assert (tmp_path / "dest/readme.txt").read_text() == "other"


def test_every_refusal_has_its_exit_code(user: User, desk: Desk, tmp_path: Path) -> None:
    """Usage, what is not there, a guard, trouble with one path, no server: each one sentence and a code of its own."""
    dest = tmp_path / "dest"
    for name in ("a", "b"):
        folders.write(desk.root, name, name)
        desk.push()
    gone = user.fetch(dest, "--at", "1", "--json")
    assert gone.returncode == 1
    error = json.loads(gone.stdout)["error"]
    assert (error["code"], error["first"], error["last"]) == ("SEQUENCE_GONE", 2, 3)
    assert gone.stderr == "deltasync: the tree of sequence 1 is not kept, only 2 to 3 are\n"
    assert user.fetch(dest, "--at", "2").returncode == 0 and not (dest / "b").exists()

    assert user.run(BINARY, "fetch", dest).returncode == 2
    assert user.fetch(dest, "../outside").returncode == 2
    assert user.fetch(dest, "-j", "0").returncode == 2
    assert user.fetch(user.source).returncode == 2, "a workspace is not overwritten"
    folder = (tmp_path / "usb").as_uri()
    assert user.run(BINARY, "fetch", "--from", folder, "--workspace", "w", dest).returncode == 2
    assert user.run(BINARY, "fetch", "--from", user.server.url, "--workspace", "never", dest).returncode == 1

    folders.write(tmp_path / "other", "mine", "mine")
    guarded = user.fetch(tmp_path / "other", "--delete")
    assert guarded.returncode == 6 and "--allow-mass-delete" in guarded.stderr
    (dest / "readme.txt").unlink()
    folders.write(dest, "readme.txt/inside", "x")
    blocked = user.fetch(dest)
    assert blocked.returncode == 3 and "readme.txt: is a folder here" in blocked.stderr
    unreachable = user.run(
        BINARY, "fetch", "--from", "http://127.0.0.1:1", "--workspace", "w", dest, "--max-retries", "0"
    )
    assert unreachable.returncode == 4


def kill(process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
    """Kill a command as soon as something holds."""
    try:
        until(lambda: condition() or process.poll() is not None)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(SECONDS)


def arrived(dest: Path) -> int:
    """Return how many ranges of large contents have arrived."""
    return sum(each.stat().st_size // 4 for each in (dest / ".deltasync/fetch").glob("*.ranges"))


def test_a_killed_fetch_goes_on_where_it_was(user: User, desk: Desk, tmp_path: Path) -> None:
    """kill -9: no file is half written under its name, and what had arrived is not fetched again."""
    dest = tmp_path / "dest"
    for number in range(300):
        folders.write(desk.root, f"many/{number}", noise(f"kill {number}", 30_000))
    folders.write(desk.root, "large.bin", noise("kill", 4 * RANGE_BYTES + 5))
    desk.push()
    for least in (1, 2, 3):
        kill(user.start(dest, "--bwlimit", "16M", "-j", "1"), lambda least=least: arrived(dest) >= least)
        assert arrived(dest) >= least
        assert not (dest / "large.bin").exists()
        for path, seen in folders.listing(dest).items():
            assert seen == folders.listing(desk.root)[path], path
    done = user.fetch(dest, "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["verified"]
    assert report["fetched_bytes"] <= report["bytes"] - 3 * RANGE_BYTES
    folders.assert_same(desk.root, dest)
    assert not (dest / ".deltasync").exists()


def test_a_fetch_that_is_killed_among_small_files_goes_on(user: User, desk: Desk, tmp_path: Path) -> None:
    """Small files that have their names are not fetched again, and each of them is whole."""
    dest = tmp_path / "dest"
    for number in range(400):
        folders.write(desk.root, f"many/{number}", noise(f"small {number}", 50_000))
    desk.push()
    kill(user.start(dest, "--bwlimit", "10M", "-j", "2"), lambda: len(list(dest.glob("many/*"))) > 50)
    there, source = folders.listing(dest), folders.listing(desk.root)
    assert 50 < len(there) < len(source) and all(seen == source[path] for path, seen in there.items())
    report = json.loads(user.fetch(dest, "--json").stdout)
    assert report["verified"] and report["fetched_bytes"] <= report["bytes"] - 50 * 50_000
    folders.assert_same(desk.root, dest)


def test_a_full_disk_ends_a_fetch_that_goes_on_later(user: User, desk: Desk, tmp_path: Path) -> None:
    """No space (here: a limit on the size of files) is exit 6 with one sentence, and nothing half is in place."""
    folders.write(desk.root, "large.bin", noise("full", RANGE_BYTES + 5))
    desk.push()
    words = shlex.join(map(str, user.words(tmp_path / "dest")))
    done = user.run("bash", "-c", f"ulimit -f 1024; exec {words}")
    assert (done.returncode, done.stderr.count("\n")) == (6, 1) and "no space left" in done.stderr
    assert not (tmp_path / "dest/large.bin").exists()
    assert user.fetch(tmp_path / "dest").returncode == 0
    folders.assert_same(desk.root, tmp_path / "dest")


def test_a_stopped_fetch_says_so(user: User, desk: Desk, tmp_path: Path) -> None:
    """Ctrl-C ends it with its code; the next one goes on."""
    folders.write(desk.root, "large.bin", noise("stop", 3 * RANGE_BYTES))
    desk.push()
    process = user.start(tmp_path / "dest", "--bwlimit", "4M")
    until(lambda: list((tmp_path / "dest/.deltasync/fetch").glob("*.part")))
    process.send_signal(signal.SIGINT)
    assert process.wait(SECONDS) == 130
    assert user.fetch(tmp_path / "dest").returncode == 0
    folders.assert_same(desk.root, tmp_path / "dest")
