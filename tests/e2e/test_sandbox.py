"""Commands that are shut in: what they see and write, how they end, and where none can be (spec J-85 to J-87)."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import msgspec
import pytest
from commands import API, begun, events_of, followed, is_there, run, seen, shell, streams, submit, words
from serving import BINARY, SECONDS, Served, serving, until
from user import User

from deltasync.core.jobs import JobRequest, State
from deltasync_server.jobs.sandbox import Sandbox

_SOMEWHERE = Path(tempfile.gettempdir())
WHY_NOT = Sandbox(_SOMEWHERE, _SOMEWHERE, None).why_not
works = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server that shuts in who asks for it."""
    with serving(tmp_path_factory.mktemp("host") / "data", "--run-without-token") as served:
        yield served


def said(served: Served, script: str, **fields: Any) -> str:
    """Run a script in the sandbox, and return what it said."""
    events = followed(served, begun(served, shell(script, **{"sandbox": True, **fields})))
    assert events[-1].job["state"] == "done", events[-1].job
    return streams(events).get("stdout", b"").decode()


@works
def test_a_command_writes_its_session_alone(server: Served, tmp_path: Path) -> None:
    """It writes below its session, /tmp there included; anywhere else nothing changes, whatever it tries."""
    script = f"""
        touch here ../outputs/there /tmp/mine && echo written
        for each in {tmp_path} /etc /usr /run /dev/shm/.. {server.data} {server.data}/sessions; do
            touch $each/strange-file 2>/dev/null && echo "$each"
        done
        mount -o remount,rw / 2>/dev/null && echo remounted
        umount {server.data} 2>/dev/null && echo uncovered
        true"""
    assert said(server, script).split() == ["written", "/dev/shm/.."]  # a /dev of its own, in memory
    assert not any((Path(each) / "strange-file").exists() for each in (tmp_path, "/etc", "/usr", "/run", "/dev"))
    assert not Path("/tmp/mine").exists() and not (server.data / "strange-file").exists()


@works
def test_links_that_a_command_left_are_no_way_out_for_the_next(server: Served) -> None:
    """What says the version runs in the session before the command: where it plants links the walls stay whole."""
    plant = f"rm -rf tmp; ln -s {server.data} tmp; mv ../work ../moved; ln -s {server.data} ../work"
    script = "ls /tmp /tmp/.. $TMPDIR 2>/dev/null; touch /tmp/strange-file $TMPDIR/strange-file; ls; true"
    found = said(server, script, reuse=True, tool_version=words("sh", "-c", plant))
    assert "state.db" not in found and "workspaces" not in found
    assert not (server.data / "strange-file").exists()


@works
def test_nothing_of_the_store_is_seen(server: Served) -> None:
    """Of DATA it sees its own session: no token, no database, no blob, no log and no session of another job."""
    kept = run(server, shell("echo secret > secret", keep_seconds=1000))
    assert (Path(kept["session_path"]) / "work/secret").read_text() == "secret\n"
    found = said(
        server, f"cd {server.data}; find . -mindepth 1 -maxdepth 2; pwd; cat {kept['session_path']}/work/secret"
    )
    *names, folder = found.split()
    own = [name for name in names if name.startswith("./sessions/")]
    assert sorted(names) == ["./sessions", *own] and len(own) == 1
    assert folder == str(server.data) and own[0] != f"./sessions/{kept['id']}"
    server.request("DELETE", f"/api/v1/jobs/{kept['id']}")


@works
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash, which opens connections")
def test_processes_and_network_are_its_own(server: Served) -> None:
    """It sees no process of the host, has no rights to gain, and reaches the network where that was asked for."""
    script = f"""
        test -d /proc/{server.process.pid} && echo seen
        echo $(($$ < 10))
        grep -E 'NoNewPrivs|CapEff|CapBnd' /proc/self/status | cut -f2
        bash -c ': < /dev/tcp/127.0.0.1/{server.port}' 2>/dev/null && echo reached
        ls /run/*.sock /run/docker* 2>/dev/null
        true"""
    none = "0000000000000000"
    assert said(server, script).split() == ["1", none, none, "1"]
    assert said(server, script, network=True).split() == ["1", none, none, "1", "reached"]


@works
def test_the_servers_socket_is_no_way_out() -> None:
    """A server on a unix socket asks for no token: who is shut in does not find the socket there."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:  # /tmp is another one in the sandbox
        path = Path(name) / "socket"
        command = [BINARY, "serve", "--data", Path(name) / "data", "--listen", f"unix:{path}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout is not None and "listening" in server.stdout.readline()
                script = f"test -S {path} && echo a socket; ls {name}"
                told = [_over(path, shell(script, sandbox=is_shut_in)) for is_shut_in in (False, True)]
                assert told == ["a socket\ndata\nsocket\n", "data\nsocket\n"]
            finally:
                server.terminate()


def _over(path: Path, asked: JobRequest) -> str:
    """Run a job of a server on a unix socket, and return what it said."""
    connection = HTTPConnection("localhost", timeout=SECONDS)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(path))
    with contextlib.closing(connection):
        connection.request("POST", f"{API}/jobs", msgspec.json.encode(asked), {"Content-Type": "application/json"})
        job = json.load(connection.getresponse())
        connection.request("GET", f"{API}/jobs/{job['id']}/logs")
        return streams(events_of(connection.getresponse().read()))["stdout"].decode()


@works
def test_a_command_in_the_sandbox_ends_as_any_other(server: Served) -> None:
    """Its exit code is its own, a cancel asks it first, what is not there is told so, and nothing of it is left."""
    assert run(server, shell("exit 7", sandbox=True))["exit_code"] == 7
    assert run(server, shell("kill -9 $$", sandbox=True))["exit_code"] == 137
    gone = run(server, shell("x", sandbox=True, argv=[[{"text": "no-such-command"}]]))
    assert gone["state"] == "failed" and "there is no command no-such-command" in gone["reason"]
    busy = "i=0; while test $i -lt 100; do i=$(expr $i + 1); done"  # a sandbox that is gone would cut it short
    asked = begun(server, shell(f"trap '{busy}; echo asked; exit 0' TERM; echo ready; sleep 1000 & wait", sandbox=True))
    until(lambda: seen(server, asked)["log_bytes"])
    server.request("DELETE", f"/api/v1/jobs/{asked}")
    events = followed(server, asked)
    assert (events[-1].job["state"], streams(events)["stdout"]) == ("cancelled", b"ready\nasked\n")
    left = begun(server, shell("sleep 1000 & setsid sleep 1001 & echo over", sandbox=True))
    assert followed(server, left)[-1].job["state"] == "done"
    until(lambda: not _of(left))


@works
def test_a_server_that_is_killed_leaves_no_sandbox(tmp_path: Path) -> None:
    """kill -9 of the server ends what it has shut in, at once."""
    with serving(tmp_path / "data", "--run-without-token") as served:
        job_id = begun(served, shell("setsid sleep 1000", sandbox=True), State.RUNNING)
        until(lambda: len(_of(job_id)) > 2)
        pids = _of(job_id)
        served.process.kill()
        served.process.wait()
        until(lambda: not any(map(is_there, pids)))


@works
def test_a_server_shuts_everybody_in(tmp_path: Path) -> None:
    """With `serve --sandbox` a command that asked for nothing is shut in as well, and `health` says so."""
    with serving(tmp_path / "data", "--run-without-token", "--sandbox") as served:
        assert said(served, f"ls {served.data}; echo $(($$ < 10))", sandbox=False).split() == ["sessions", "1"]
        assert served.get("/api/v1/capabilities").json["sandbox_always"]
        assert "every command is shut in" in User(tmp_path / "home").run("health", "--on", served.url).out


@works
def test_run_in_the_sandbox(server: Served, tmp_path: Path) -> None:
    """`run --sandbox` brings home what the command wrote, and reads what it was given."""
    user, work = User(tmp_path / "home"), tmp_path / "home/work"
    work.mkdir()
    (work / "a.txt").write_text("alpha\n")
    done = user.run("run", "--on", server.url, "--sandbox", "--", "cp", "a.txt", "b.txt", cwd=work)
    assert (done.code, done.out, done.err) == (0, "", "")
    assert (work / "b.txt").read_text() == "alpha\n"


@works
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_another_users_command_is_shut_in() -> None:
    """With --job-user it is that user who is in the sandbox, and who owns the session."""
    with tempfile.TemporaryDirectory() as name:  # not below pytest's own folder, which other users may not enter
        Path(name).chmod(0o711)
        with serving(Path(name) / "data", "--run-without-token", "--job-user", "nobody") as served:
            if why := served.get("/api/v1/capabilities").json["sandbox_why"]:
                pytest.skip(why)
            found = said(served, f"id -un; touch mine && ls; ls {served.data}").split()
            assert found == ["nobody", "mine", "tmp", "sessions"]


def test_where_there_is_no_sandbox_nothing_runs_without_it(tmp_path: Path) -> None:
    """Without bubblewrap a command that asks to be shut in is refused in one sentence, and so is `serve --sandbox`."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "sh").symlink_to(shutil.which("sh") or "sh")
    with serving(tmp_path / "data", "--run-without-token", environment={"PATH": str(programs)}) as served:
        refused = submit(served, shell("true", sandbox=True))
        assert refused.status == 403 and refused.json["detail"].startswith("no command can be shut in: bubblewrap")
        told = served.get("/api/v1/capabilities").json
        assert (told["sandbox"], told["sandbox_why"]) == (False, "bubblewrap (bwrap) is not installed there")
        assert run(served, shell("true"))["state"] == "done"
        user = User(tmp_path / "home")
        done = user.run("run", "--on", served.url, "--sandbox", "--", "true")
        assert done.code == 122 and done.err.count("\n") == 1 and "without --sandbox" in done.err
    words = [BINARY, "serve", "--data", tmp_path / "data", "--listen", "127.0.0.1:0", "--sandbox"]
    environment = {**os.environ, "PATH": str(programs)}
    done_there = subprocess.run(words, capture_output=True, text=True, env=environment, check=False, timeout=60)
    assert done_there.returncode == 2 and "bubblewrap (bwrap) is not installed" in done_there.stderr


def test_no_command_gains_rights(server: Served) -> None:
    """A setuid program gives no command more than the server has; the server itself may still start one."""
    events = followed(server, begun(server, shell("grep NoNewPrivs /proc/self/status | cut -f2")))
    assert streams(events)["stdout"] == b"1\n"
    told = [path.read_text() for path in Path(f"/proc/{server.process.pid}/task").glob("*/status")]
    assert all("NoNewPrivs:\t0" in each for each in told)


def _of(job_id: str) -> list[int]:
    """Return the processes of a job."""
    found = []
    for each in Path("/proc").iterdir():
        try:
            if each.name.isdigit() and f"DELTASYNC_JOB={job_id}".encode() in (each / "environ").read_bytes():
                found.append(int(each.name))
        except OSError:
            continue
    return found
