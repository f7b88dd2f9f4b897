"""`deltasync run` where the network, the disk or the quota fails, many at once, and cancelled in each of its states."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from lossy import Fault, lossy
from remote_runs import Terminal, contents, is_over
from serving import Served, serving, until
from user import SECONDS

MEBI = 1 << 20
FILES = 300


def sessions(served: Served) -> list[str]:
    """Return the folders of sessions that there are."""
    return [path.name for path in (served.data / "sessions").iterdir() if path.is_dir()]


def until_there(path: Path) -> str:
    """Return a script that ends when something is at a path."""
    return f"until test -e '{path}'; do sleep 0.02; done"


# Network


def test_a_log_that_breaks_off_is_told_whole_and_once(terminal: Terminal, host: Served, tmp_path: Path) -> None:
    """When every connection is reset while a command speaks, what it says comes all the same, each word once."""
    script = f"echo one; {until_there(tmp_path / 'go')}; echo two; cp {{in:a.txt}} {{out:b.txt}}"
    with lossy(host.port) as proxy:
        process = terminal.start("--on", proxy.url, "--shell", script)
        assert process.stdout and process.stdout.readline() == "one\n"
        proxy.reset_all()
        (tmp_path / "go").touch()
        out, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, out) == (0, "two\n"), err
    assert (terminal.folder / "b.txt").read_text() == "alpha\n"


def test_a_fetch_that_breaks_off_goes_on(terminal: Terminal, host: Served) -> None:
    """Answers that are lost while outputs come home are asked for again; the file is whole."""
    with lossy(host.port) as proxy:
        proxy.faults += [Fault(b"/blobs", swallow=True), Fault(b"/blobs", swallow=True)]
        faults = list(proxy.faults)
        done = terminal.run("--on", proxy.url, "--shell", "seq 300000 > {out:b.txt}")
    assert done.code == 0, done.err
    assert (terminal.folder / "b.txt").read_text().count("\n") == 300_000
    assert faults[0].has_happened.is_set()


def test_a_network_that_stays_away_leaves_the_outputs_for_later(terminal: Terminal, host: Served) -> None:
    """Outputs that cannot be fetched leave nothing half here, the code says so, and `jobs fetch` brings them home."""
    with lossy(host.port) as proxy:
        proxy.faults += [Fault(b"/blobs", swallow=True) for _ in range(20)]
        done = terminal.run("--on", proxy.url, "--max-retries", "1", "--json", "--shell", "seq 300000 > {out:b.txt}")
        assert done.code in (122, 124) and "Traceback" not in done.err, done
        assert set(contents(terminal.folder)) == {"a.txt"}
        proxy.faults.clear()
        assert terminal.user.run("jobs", "fetch").code == 0
    assert (terminal.folder / "b.txt").read_text().count("\n") == 300_000


# Room


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs needs root")
def test_a_host_that_is_full_when_a_session_is_made_fails_that_job_alone(terminal: Terminal, tmp_path: Path) -> None:
    """A job whose inputs find no room any more is 125 with the reason and leaves nothing; the next one goes on."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this system mounts no tmpfs")
    (tmp_path / "server.toml").write_text("low_disk_bytes = 0\n")
    flags = [
        "--run-without-token",
        "--slots",
        "1",
        "--sessions-dir",
        str(disk),
        "--config",
        str(tmp_path / "server.toml"),
    ]
    try:
        with serving(tmp_path / "data", *flags) as served:
            on = ("--on", served.url)
            (terminal.folder / "large").write_bytes(os.urandom(8 * MEBI))
            first = terminal.detached(*on, "--shell", until_there(tmp_path / "go"))
            waiting = terminal.detached(*on, "--", "cksum", "large")
            with (disk / "ballast").open("wb") as ballast:
                ballast.write(bytes(44 * MEBI))
            (tmp_path / "go").touch()
            assert terminal.user.run("jobs", "wait", *on, first).code == 0
            full = terminal.user.run("jobs", "wait", *on, waiting)
            assert full.code == 125 and "no space" in full.err.lower() and "Traceback" not in full.err, full
            assert [path.name for path in disk.iterdir() if path.is_dir()] == []
            (disk / "ballast").unlink()
            assert terminal.run(*on, "--", "cksum", "large").code == 0
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_inputs_and_outputs_beyond_the_quota_are_refused_with_figures(terminal: Terminal, tmp_path: Path) -> None:
    """What a tenant may not hold is not sent (123), and not returned (125); both say how much there may be."""
    with serving(tmp_path / "data", "--run-without-token", "--tenant-quota", "1M") as served:
        on = ("--on", served.url)
        (terminal.folder / "large").write_bytes(os.urandom(2 * MEBI))
        done = terminal.run(*on, "--", "cksum", "large")
        assert done.code == 123 and "you may hold 1.0 MiB" in done.err, done
        done = terminal.run(*on, "--shell", "head -c 2000000 /dev/urandom > {out:made}")
        assert done.code == 125 and "you may hold 1.0 MiB" in done.err, done
        assert not (terminal.folder / "made").exists() and sessions(served) == []
        assert terminal.run(*on, "--", "cat", "a.txt").out == "alpha\n"


# Many at once


def test_two_users_with_five_jobs_each_get_their_own_files(host: Served, tmp_path: Path) -> None:
    """Ten commands at once with the same file names: each reads its user's file and writes its own."""
    terminals = [Terminal.at(tmp_path / name, host.url) for name in ("ada", "bob")]
    running = []
    for terminal in terminals:
        (terminal.folder / "in.txt").write_text(terminal.user.home.name)
        for number in range(5):
            script = f"cat {{in:in.txt}} > {{out:out-{number}.txt}}; echo {number} >> {{out:out-{number}.txt}}"
            running.append(terminal.start("--shell", script))
    for process in running:
        _, err = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, err
    for terminal in terminals:
        name = terminal.user.home.name
        expected = {f"out-{number}.txt": (f"{name}{number}\n".encode(), False) for number in range(5)}
        assert contents(terminal.folder) == expected | {"in.txt": (name.encode(), False)}
    until(lambda: sessions(host) == [])


# Cancelled


def test_a_job_that_waits_is_cancelled_before_its_turn(terminal: Terminal, tmp_path: Path) -> None:
    """A queued job that is cancelled never runs, `run` ends with 125, and the one before it goes on."""
    with serving(tmp_path / "data", "--run-without-token", "--slots", "1") as served:
        on = ("--on", served.url)
        first = terminal.detached(*on, "--shell", f"{until_there(tmp_path / 'go')}; echo first")
        process = terminal.start(*on, "--shell", f"touch '{tmp_path}/ran'")
        until(lambda: len(served.get("/api/v1/jobs").json["jobs"]) == 2)
        waiting = served.get("/api/v1/jobs").json["jobs"][0]
        assert waiting["state"] == "queued"
        assert terminal.user.run("jobs", "cancel", *on, waiting["id"]).code == 0
        _, err = process.communicate(timeout=SECONDS)
        assert process.returncode == 125 and "cancelled" in err
        (tmp_path / "go").touch()
        assert terminal.user.run("jobs", "wait", *on, first).code == 0
        assert not (tmp_path / "ran").exists() and sessions(served) == []


def test_a_job_that_runs_is_cancelled_with_all_that_it_started(
    terminal: Terminal, host: Served, tmp_path: Path
) -> None:
    """A cancel ends the command and its children; what it wrote so far does not come home."""
    script = f"cp {{in:a.txt}} {{out:b.txt}}; sh -c 'echo $$ > {tmp_path}/pid; exec sleep 1000' & echo ready; wait"
    process = terminal.start("--shell", script)
    assert process.stdout and process.stdout.readline() == "ready\n"
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip())
    job = next(each for each in host.get("/api/v1/jobs").json["jobs"] if each["state"] == "running")
    assert terminal.user.run("jobs", "cancel", job["id"]).code == 0
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 125 and "cancelled" in err
    assert set(contents(terminal.folder)) == {"a.txt"}
    assert is_over(int((tmp_path / "pid").read_text()))
    until(lambda: job["id"] not in sessions(host))


@contextmanager
def held_in(served: Served, job_id: str, state: str, go: Path) -> Iterator[bool]:
    """Make a file, and keep a job in the state that it gets to, by a lock on its table; False where it was quicker."""
    pause = threading.Event()
    with closing(sqlite3.connect(served.data / "state.db", isolation_level=None, timeout=SECONDS)) as db:
        go.touch()
        while True:
            db.execute("BEGIN IMMEDIATE")
            (found,) = db.execute("SELECT state FROM jobs WHERE id = ?", (job_id,)).fetchone()
            if found == state or found in ("done", "failed", "cancelled", "lost"):
                break
            db.execute("ROLLBACK")
            pause.wait(0.001)  # who waits for the lock gets it
        try:
            yield found == state
        finally:
            db.execute("ROLLBACK")


@pytest.mark.parametrize("state", ["staging", "collecting"])
def test_a_job_is_cancelled_while_the_host_works_on_it(terminal: Terminal, tmp_path: Path, state: str) -> None:
    """A cancel while inputs are laid out or outputs collected is kept: the job ends cancelled, and nothing is left."""
    (terminal.folder / "many").mkdir()
    for number in range(FILES):
        (terminal.folder / f"many/{number}").write_text(str(number))
    with serving(tmp_path / "data", "--run-without-token", "--slots", "1") as served:
        on = ("--on", served.url)
        for attempt in range(20):  # until it is held in that state: it may be too quick
            go = tmp_path / f"go-{attempt}"
            if state == "staging":
                terminal.detached(*on, "--shell", until_there(go))
            ran = tmp_path / f"ran-{attempt}"
            script = f"{until_there(go)}; touch '{ran}'; cp -r {{in:many}}/. {{out:copy/}}"
            job = terminal.detached(*on, "--shell", script)
            with held_in(served, job, state, go) as is_held:
                if is_held:
                    assert terminal.user.run("jobs", "cancel", *on, job).code == 0
            if is_held:
                break
        done = terminal.user.run("jobs", "wait", *on, job)
        assert done.code == 125 and "cancelled" in done.err, done
        assert served.get(f"/api/v1/jobs/{job}").json["returned"] is None
        until(lambda: sessions(served) == [])
    assert ran.exists() == (state == "collecting")  # what is cancelled before it runs does not run
    assert not (terminal.folder / "copy").exists()
