"""Explanations as a user meets them: `why PATH`, `push -v`, and the receipt line at the end of a push."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folders
import pytest
from serving import SECONDS, Served, serving

from deltasync.cli.main import run

BINARY = Path(sys.executable).parent / "deltasync"


@dataclass
class User:
    """A user with a home and one folder."""

    home: Path
    root: Path

    def run(self, *words: object, code: int = 0) -> str:
        """Run a command from inside the folder's parent and return what it prints."""
        done = subprocess.run(
            [BINARY, *map(str, words)],
            capture_output=True,
            text=True,
            env=self.environment(),
            cwd=self.home,
            timeout=SECONDS,
        )
        assert done.returncode == code, done
        return done.stdout if code == 0 else done.stderr

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("DELTASYNC_")}
        run = self.home / "run"
        run.mkdir(mode=0o700, exist_ok=True)
        return kept | {"DELTASYNC_HOME": str(self.home / "own"), "XDG_RUNTIME_DIR": str(run), "HOME": str(self.home)}

    def json(self, *words: object) -> Any:
        return json.loads(self.run(*words, "--json"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("server") / "data") as served:
        yield served


@pytest.fixture
def user(tmp_path: Path) -> User:
    root = tmp_path / "home" / tmp_path.name
    root.mkdir(parents=True)
    folders.life(root)
    return User(tmp_path / "home", root)


def test_why_tells_what_the_next_push_then_does(user: User, server: Served) -> None:
    """Each verdict is one line; the push that follows gives the same reasons."""
    user.run("push", user.root, "--to", server.url)
    assert user.run("why", user.root / "readme.txt") == (
        "readme.txt: in step: the server has it as it is here, at sequence 1\n"
    )
    folders.later(user.root)
    assert user.run("why", user.root / "clip moved.bin") == "clip moved.bin: moved from media/clip.bin\n"
    assert user.run("why", user.root / "copy.bin") == (
        "copy.bin: copy of media/clip.bin, so its content need not travel\n"
    )
    assert user.run("why", user.root / "empty.bin").startswith("empty.bin: metadata only: its time")
    expected = {each["path"]: each["reason"] for each in user.json("why", user.root)["inside"]}
    report = user.json("push", user.root, "-v")
    assert {each["path"]: each["reason"] for each in report["reasons"]} == expected
    assert report["more_reasons"] == 0
    again = user.json("why", user.root)
    assert (again["workspace"], again["verdict"], again["sequence"]) == (user.root.name, "in_step", 2)


def test_why_needs_no_server_and_changes_nothing(user: User) -> None:
    """Sealed bundles that wait are told; the state is byte for byte what it was."""
    user.run("push", user.root)
    before = (user.root / ".deltasync/state.db").read_bytes()
    found = user.json("why", user.root / "media")
    assert (found["verdict"], found["sequence"]) == ("in_step", 1)
    assert "in bundle 1, which waits for the server" in found["reason"]
    folders.write(user.root, "a.tmp", "x")
    by_option = user.json("why", user.root / "a.tmp", "--exclude", "*.tmp")
    assert (by_option["verdict"], by_option["rule"]) == ("ignored", "*.tmp")
    assert (user.root / ".deltasync/state.db").read_bytes() == before


def test_what_cannot_be_explained_is_one_sentence(user: User) -> None:
    """Outside of any workspace, or nowhere at all: exit 1 and what to do."""
    assert "lies in no workspace; run `deltasync push`" in user.run("why", user.root / "readme.txt", code=1)
    user.run("push", user.root)
    assert user.run("why", user.root / "none", code=1) == "deltasync: there is no none here, and none was sealed\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_a_folder_that_cannot_be_read_says_so_of_what_is_in_it(
    user: User, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An ordinary user hears that a folder cannot be read, of what was sent of it and of what was not."""
    monkeypatch.setenv("DELTASYNC_HOME", str(user.home / "own"))
    folders.write(user.root, "locked/sent", "1")
    user.run("push", user.root)
    assert run(["why", str(user.root / "locked/sent")]) == 0  # all is imported while it can be read
    (user.root / "locked").chmod(0)
    for above in user.home.parents:
        above.chmod(above.stat().st_mode | 0o111)
    for path in (user.home, *user.home.rglob("*")):
        os.chown(path, 65534, 65534, follow_symlinks=False)
    os.seteuid(65534)
    try:
        for name in ("locked/sent", "locked/new", "locked/deep/new", "locked"):
            capsys.readouterr()
            code, told = run(["why", str(user.root / name)]), capsys.readouterr()
            assert code == 0 and "problem: " in told.out and "cannot be read (Permission denied)" in told.out, told
    finally:
        os.seteuid(0)


def test_a_push_ends_with_a_receipt(user: User, server: Served) -> None:
    """The last line tells what went out and what was avoided; -v tells why, before it; JSON has both numbers."""
    user.run("push", user.root, "--to", server.url)
    (user.root / "media").rename(user.root / "films")
    shutil.copy2(user.root / "films/clip.bin", user.root / "copy.bin")
    folders.write(user.root, "new.txt", "new")
    dry = user.run("push", user.root, "-n", "-v").splitlines()
    assert "  films: moved from media" in dry
    assert dry[-1].startswith(f"{user.root.name}: would send 2 created, 1 moved; 3 B of content; avoided 100.0 KiB in ")
    lines = user.run("push", user.root, "-v").splitlines()
    assert {"  films: moved from media", "  new.txt: new", "  copy.bin: copy of media/clip.bin"} <= set(lines)
    name, _, receipt = lines[-1].partition(": ")
    sent, content, avoided, at = receipt.split("; ")
    assert (name, sent) == (user.root.name, "sent 2 created, 1 moved")
    assert content.endswith(" sent") and at.startswith("now at sequence 2, in ")
    assert avoided == "avoided 100.0 KiB in the cache, 241.6 KiB by moves"
    folders.write(user.root, "more.txt", "more")
    report = user.json("push", user.root)
    assert report["avoided_bytes"] == report["avoided_by_cache_bytes"] == report["avoided_by_move_bytes"] == 0
    assert "reasons" not in report


def test_a_push_beside_a_watcher_explains_too(user: User, server: Served) -> None:
    """The watcher is asked for the reasons of what this push made it send."""
    words = [BINARY, "watch", user.root, "--to", server.url, "--json", "--debounce", "60", "--rescan", "3600"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=user.environment()) as watcher:
        try:
            assert watcher.stdout
            while json.loads(watcher.stdout.readline())["event"] != "sent":
                assert watcher.poll() is None
            user.run("push", user.root)  # what the watcher still waited for
            for number in range(20):  # until the push is there before the watcher has sent it by itself
                folders.write(user.root, f"new-{number}.txt", str(number))
                report = user.json("push", user.root, "-v")
                assert report["watcher"] is True
                if report["reasons"]:
                    break
            assert report["reasons"] == [{"path": f"new-{number}.txt", "reason": "new"}]
            assert user.json("why", user.root / f"new-{number}.txt")["verdict"] == "in_step"
        finally:
            watcher.send_signal(signal.SIGTERM)
            watcher.wait(SECONDS)
