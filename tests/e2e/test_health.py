"""`deltasync health`: what a host tells of itself, and what its exit code means (spec J-84)."""

from __future__ import annotations

from pathlib import Path

import pytest
from serving import serving
from user import User

from deltasync.client.doctor import Level
from deltasync.client.health import findings
from deltasync.core.jobs import Capabilities, Gpu
from deltasync.core.wire import Health


@pytest.fixture
def user(tmp_path: Path) -> User:
    return User(tmp_path / "home")


def test_a_host_tells_how_it_is(user: User, tmp_path: Path) -> None:
    """A host that runs commands is exit 0, with its slots, disk, memory, GPUs and the way of inputs; in JSON too."""
    with serving(tmp_path / "data", "--run-without-token", "--slots", "3") as served:
        (served.data / "sessions/ds_1_00000000").mkdir()  # as one that could not be removed
        stale = user.run("health", "--on", served.url)
        assert (stale.code, "1 that no job needs" in stale.out) == (3, True)
        (served.data / "sessions/ds_1_00000000").rmdir()
        told = user.run("health", "--on", served.url, "--json")
        assert (told.code, told.json["healthy"]) == (0, True), told.out
        topics = {each["topic"]: each["sentence"] for each in told.json["findings"]}
        assert {*topics} == {
            *("server", "run", "disk", "slots", "sessions", "machine", "gpus", "inputs", "sandbox"),
        }
        assert topics["slots"] == "3 of 3 slots are free, 0 jobs wait"
        host = told.json["host"]
        assert host["memory_bytes"] > host["memory_free_bytes"] > 0 and host["cores"] > 0 and host["load"] >= 0


def test_who_may_not_run_is_told_so(user: User, tmp_path: Path) -> None:
    """A host that runs nothing for this caller is exit 3, and says why."""
    with serving(tmp_path / "data", "--no-run") as served:
        told = user.run("health", "--on", served.url)
        assert told.code == 3 and "(--no-run)" in told.out and "Traceback" not in told.err


def test_a_host_that_is_not_there_is_exit_4(user: User) -> None:
    """Nobody at the address is exit 4, in one sentence; a folder of bundles is no host."""
    gone = user.run("health", "--on", "http://127.0.0.1:1", "--json")
    assert (gone.code, gone.json["error"]["code"]) == (4, "HOST_UNREACHABLE") and gone.err.count("\n") == 1
    assert user.run("health", "--on", f"file://{user.home}").code == 2


def test_doctor_tells_what_waits_to_be_brought_home(user: User, tmp_path: Path) -> None:
    """A job that was started here, and whose outputs nobody fetched, is a note of `doctor` here; no other is."""
    folder = user.home / "work"
    folder.mkdir()
    with serving(tmp_path / "data", "--run-without-token") as served:
        assert "jobs fetch" not in user.run("doctor", folder).out
        job = user.run("run", "--on", served.url, "--detach", "--", "true").out.strip()
        told = user.run("doctor", folder)
        assert told.code == 0 and "what 1 job wrote may wait on a host" in told.out
        assert user.run("jobs", "wait", job).code == 0 == user.run("jobs", "fetch", job).code
        assert "jobs fetch" not in user.run("doctor", folder).out


def test_what_is_to_be_looked_at() -> None:
    """A full disk and a low server are worth a look; busy slots, copied inputs and no sandbox are not."""
    server = Health(status="ok", version="1", disk_free_bytes=1, disk_total_bytes=2, workspaces=0, uptime_seconds=1.0)
    host = Capabilities(
        runs=True,
        slots=1,
        slots_free=0,
        gpus=[Gpu(name="one\x1b", memory_bytes=2 << 30, memory_free_bytes=1 << 30), Gpu(name="two")],
        cores=1,
        load=9.0,
        memory_bytes=2,
        memory_free_bytes=1,
        disk_free_bytes=2**40,
        links="copy",
        file_bytes_max=1,
        session_bytes_max=1,
        sessions_max=1,
        seconds_max=1.0,
    )
    levels = {each.topic: each.level for each in findings(server, host)}
    assert {*levels.values()} == {Level.OK, Level.NOTE}
    told = next(each.sentence for each in findings(server, host) if each.topic == "gpus")
    assert told == "0 of 2 are free: 0 one\\x1b, 1.0 GiB of 2.0 GiB free; 1 two"
    assert findings(server, None)[-1].level is Level.WARNING
