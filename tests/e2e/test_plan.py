"""`deltasync plan` and `run --prestage`: what a command would take, and its inputs without the command."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import Served, serving
from user import User

from deltasync.client.uplink import note_push, uplink_to

MIB = 1 << 20


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One host for all tests, with three slots."""
    with serving(tmp_path_factory.mktemp("host") / "data", "--run-without-token", "--slots", "3") as served:
        yield served


@pytest.fixture
def user(tmp_path: Path, host: Served) -> User:
    """A user who knows that host as gpu."""
    made = User(tmp_path / "home")
    assert made.run("host", "add", "gpu", host.url).code == 0
    made.environment["DELTASYNC_ON"] = "gpu"
    return made


@pytest.fixture
def here(user: User) -> Path:
    """The user's folder, with a large and a small file, and the large one once more."""
    folder = user.home / "work"
    (folder / "in").mkdir(parents=True)
    (folder / "in/large").write_bytes(os.urandom(2 * MIB))
    (folder / "in/again").write_bytes((folder / "in/large").read_bytes())
    (folder / "small.txt").write_bytes(os.urandom(100))
    return folder


def test_a_plan_says_what_is_missing_and_sends_nothing(user: User, here: Path, host: Served) -> None:
    """Each content that the host lacks counts once; nothing is sent, and once it is there nothing is missing."""
    before = json.loads(host.get("/api/v1/workspaces").body)
    words = ("--json", "--", "cat", "in/", "small.txt")
    found = user.run("plan", *words, cwd=here).json
    assert (found["files"], found["bytes"]) == (3, 4 * MIB + 100)
    assert (found["missing_files"], found["missing_bytes"]) == (2, 2 * MIB + 100)
    assert (found["slots"], found["slots_free"], found["runs"]) == (3, 3, True) and found["disk_free_bytes"] > 0
    assert json.loads(host.get("/api/v1/workspaces").body) == before
    assert user.run("run", "--prestage", *words, cwd=here).json["inputs"]["sent_bytes"] > 2 * MIB
    found = user.run("plan", *words, cwd=here).json
    assert (found["missing_files"], found["missing_bytes"], found["seconds"]) == (0, 0, 0.0)


def test_prestaged_inputs_wait_for_their_command(user: User, here: Path) -> None:
    """`run --prestage` sends the inputs and runs nothing; the command itself sends none of their content."""
    before = len(user.run("jobs", "ls", "--json").json["jobs"])
    done = user.run("run", "--prestage", "--", "cksum", "in/large", cwd=here)
    assert done.code == 0 and "1 file" in done.out, done.err
    assert len(user.run("jobs", "ls", "--json").json["jobs"]) == before
    assert user.run("run", "--json", "--", "cksum", "in/large", cwd=here).json["inputs"]["sent_bytes"] < MIB
    done = user.run("run", "--prestage", "--each", "in/*", "--out-dir", "out", "--", "cp", "{}", "{out}", cwd=here)
    assert done.code == 0 and "2 files" in done.out and not (here / "out").exists()


def test_the_wait_has_a_time_and_a_price(user: User, here: Path) -> None:
    """The time is that of the uplink as pushes found it; with a price of an hour the wait has a cost."""
    plan = ("plan", "--json", "--", "cat", "small.txt")
    assert (user.run(*plan, cwd=here).json["seconds"], user.run("host", "price", "gpu", "7200").code) == (None, 0)
    assert user.run("run", "--prestage", "--", "cat", "in/large", cwd=here).code == 0
    found = user.run(*plan, cwd=here).json
    assert found["bytes_per_second"] > 0
    assert found["seconds"] == pytest.approx(100 / found["bytes_per_second"])
    assert found["cost"] == pytest.approx(found["seconds"] * 2)
    text = user.run("plan", "--", "cat", "small.txt", cwd=here).out
    assert "1 file, 100 B" in text and "7200 an hour" in text
    assert user.run("host", "price", "gpu", "0").code == 0
    assert user.run("host", "ls", "--json").json["hosts"][0]["price_per_hour"] is None
    assert user.run("host", "price", "gpu", "-1").code == 2


def test_what_the_host_keeps_in_step_is_there(user: User, here: Path, host: Served) -> None:
    """Inputs of a workspace in sync are neither read nor missing."""
    probe = here / "probe"
    while not probe.exists() or probe.stat().st_mtime_ns - (here / "in/again").stat().st_ctime_ns < 40_000_000:
        probe.write_bytes(b"")
    probe.unlink()
    assert user.run("push", here / "in", "--to", host.url, "--workspace", "planned").code == 0
    found = user.run("plan", "--json", "--", "cat", "in/large", cwd=here).json
    assert (found["kept_bytes"], found["read_bytes"], found["missing_bytes"]) == (2 * MIB, 0, 0)


def test_a_plan_that_is_not_clear_is_refused(user: User, here: Path) -> None:
    """An input that is not here is 121, a host that is gone 122, as with `run`."""
    assert user.run("plan", "--", "cat", "{in:none}", cwd=here).code == 121
    gone = user.run("plan", "--on", "http://127.0.0.1:1", "--max-retries", "0", "--", "cat", "small.txt", cwd=here)
    assert gone.code == 122


def test_the_uplink_is_that_of_the_last_pushes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A push of more than 1 MiB counts, twice as much as the one before it; a damaged record is none."""
    monkeypatch.setenv("DELTASYNC_HOME", str(tmp_path))
    note_push("http://one", MIB - 1, 1.0)
    assert uplink_to("http://one").bytes_per_second == 0
    note_push("http://one", 4 * MIB, 1.0)
    assert uplink_to("http://one").bytes_per_second == 4 * MIB
    note_push("http://one", 4 * MIB, 2.5)
    assert uplink_to("http://one").bytes_per_second == 2 * MIB
    assert uplink_to("http://two").bytes_per_second == 0
    for record in (tmp_path / "uplinks").iterdir():
        record.write_text("{")
    assert uplink_to("http://one").bytes_per_second == 0
