"""A warm start, as operator and user see it: adopt a folder of the host, serve, push the same files from elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import folders
import pytest
from serving import BINARY, SECONDS, serving

CLIENT = Path(sys.executable).parent / "deltasync"


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([BINARY, *map(str, words)], capture_output=True, text=True, timeout=60)


def push(home: Path, root: Path, url: str) -> dict[str, object]:
    """Push a folder as a user of another machine, and return the report."""
    environment = {**os.environ, "DELTASYNC_HOME": str(home / "own"), "XDG_RUNTIME_DIR": str(home), "HOME": str(home)}
    home.mkdir(exist_ok=True)
    done = subprocess.run(
        [CLIENT, "push", root, "--to", url, "--json"], capture_output=True, text=True, env=environment, timeout=60
    )
    assert done.returncode == 0, done
    report: dict[str, object] = json.loads(done.stdout)
    return report


@pytest.fixture
def host_files(tmp_path: Path) -> Path:
    """What lies on the host already: the same files that a laptop has."""
    root = tmp_path / "host"
    root.mkdir()
    folders.life(root)
    folders.write(root, "models/base.safetensors", os.urandom(3_000_000))
    return root


@pytest.mark.parametrize("trust", [(), ("--trust",)])
def test_a_first_push_of_adopted_files_sends_no_content(
    tmp_path: Path, host_files: Path, trust: tuple[str, ...]
) -> None:
    """The push carries names alone, both folders are equal afterwards, and the store is sound."""
    laptop, data = tmp_path / "laptop", tmp_path / "data"
    shutil.copytree(host_files, laptop, symlinks=True)
    adopted = json.loads(run("adopt", host_files, "--data", data, *trust, "--json").stdout)
    assert set(adopted) >= {"files", "bytes", "stored", "stored_bytes", "present", "left_out", "seconds"}
    assert (adopted["left_out"], adopted["linked"]) == ([], adopted["stored"] if trust else 0)
    with serving(data) as server:
        report = push(tmp_path / "home", laptop, server.url)
        assert report["content_bytes"] == 0
        assert report["avoided_bytes"] == adopted["bytes"]
        tree = data / "workspaces/laptop/tree"
        folders.assert_same(laptop, tree)
        blob = tree / "models/base.safetensors"
        assert blob.stat().st_nlink == (3 if trust else 2)
    assert json.loads(run("check", "--data", data, "--json").stdout)["findings"] == []
    folders.assert_same(laptop, host_files)


def test_an_adoption_that_is_killed_is_simply_repeated(tmp_path: Path) -> None:
    """Killed at any moment it leaves a sound store; the same command ends what it began."""
    root, data = tmp_path / "host", tmp_path / "data"
    for number in range(3_000):
        folders.write(root, f"{number % 50}/{number}", b"%d" % number * 100)
    words = [BINARY, "adopt", root, "--data", data]
    cache = data / "cache"
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        while process.poll() is None and not any(any(folder.iterdir()) for folder in cache.glob("a*")):
            pass
        process.kill()
    again = json.loads(run(*words[1:], "--json").stdout)
    assert again["files"] == 3_000 == again["stored"] + again["present"]
    assert json.loads(run("check", "--data", data, "--json").stdout)["findings"] == []
    assert list((data / "staging").iterdir()) == []


def test_a_signal_ends_it_between_two_steps(tmp_path: Path) -> None:
    """Ctrl-C keeps what was read, says so in one sentence, and exits 130."""
    root, data = tmp_path / "host", tmp_path / "data"
    root.mkdir()
    with (root / "large").open("wb") as file:
        file.truncate(40 << 30)  # a hole: to read all of it takes longer than this test
    folders.write(root, "a", "before the large one\n")
    with subprocess.Popen([BINARY, "adopt", root, "--data", data], stderr=subprocess.PIPE, text=True) as process:
        while not list((data / "staging").glob("*/*")):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    assert said == (
        "deltasync-server: stopped after 1 files; what was read of them is kept, and the same command goes on\n"
    )
    assert len([path for path in (data / "cache").rglob("*") if path.is_file()]) == 1


def test_what_cannot_be_done_is_one_sentence(tmp_path: Path, host_files: Path) -> None:
    """A running server, a wrong option and a missing folder are named with what to do; unreadable files exit 3."""
    data = tmp_path / "data"
    with serving(data):
        busy = run("adopt", host_files, "--data", data)
        assert (busy.returncode, "stop it first" in busy.stderr) == (4, True)
    for words, code, sentence in (
        ((host_files, "--no-copy"), 2, "--no-copy goes with --trust"),
        ((host_files, "--keep", "soon"), 2, "--keep takes a time such as 12h or 30d, not soon"),
        ((tmp_path / "gone",), 2, "there is no folder"),
        ((data / "cache",), 2, "lies in the store itself"),
    ):
        done = run("adopt", *words, "--data", data)
        assert (done.returncode, sentence in done.stderr, done.stdout) == (code, True, ""), done
    done = run("adopt", tmp_path, "--data", data)
    assert done.returncode == 3
    assert done.stderr == f"deltasync-server: {data}: is the store itself\n"
    assert done.stdout.endswith("1 left out\n")


def test_a_collection_says_what_it_spares(tmp_path: Path, host_files: Path) -> None:
    """Adopted content that nothing names stays for its time, or until it is released."""
    data = tmp_path / "data"
    stored = json.loads(run("adopt", host_files, "--data", data, "--json").stdout)["stored"]
    spared = run("collect", "--data", data).stdout
    assert f"{stored} blobs stay, {stored} of them only because they were adopted" in spared
    would = json.loads(run("collect", "--data", data, "--release-adopted", "--dry-run", "--json").stdout)
    assert (would["blobs"], would["released"]) == (stored, stored)
    assert json.loads(run("collect", "--data", data, "--release-adopted", "--json").stdout)["blobs"] == stored
    run("adopt", host_files, "--data", data, "--keep", "0")
    assert json.loads(run("collect", "--data", data, "--json").stdout)["blobs"] == stored
