"""A command as a process: what it gets, how it ends, and that nothing of it is left."""

from __future__ import annotations

import os
import secrets
import signal
import sys
import threading
import tracemalloc
from pathlib import Path

import pytest
from commands import is_there, let_pass
from serving import until

from deltasync.core.errors import DeltasyncError, NotFound
from deltasync_server.jobs import process
from deltasync_server.jobs.account import Account
from deltasync_server.jobs.leftovers import MARK, kill_group, kill_marked, start_of
from deltasync_server.jobs.log import Kind, Log, LogReader
from deltasync_server.jobs.process import Command, Ended, Process, Why

JOB = f"ds_1_{secrets.token_hex(4)}"
"""Of this process alone: whatever else bears a job's mark is killed with it."""


class Ran:
    """A command that ran to its end."""

    def __init__(
        self,
        folder: Path,
        *argv: str | bytes,
        seconds: float = 60.0,
        account: Account | None = None,
        limit: int = 2**20,
    ) -> None:
        self.log = Log(folder / "log", limit)
        self.work = folder / "work"
        self.work.mkdir(exist_ok=True)
        self.folder = folder
        self.pids: list[int] = []
        environment = {b"PATH": os.environb[b"PATH"], MARK.encode(): JOB.encode()}
        command = Command(JOB, [os.fsencode(each) for each in argv], environment, self.work, account, seconds)
        self.process = Process(command, self.log)

    def run(self) -> Ended:
        ended = self.process.run(lambda pid, start: self.pids.append(pid))
        self.log.close()
        return ended

    def told(self, kind: Kind) -> bytes:
        reader = LogReader(self.folder / "log", 0)
        found = b"".join(each.content for each in reader.read(1 << 30) if each.kind is kind)
        reader.close()
        return found

    def told_pid(self, name: str) -> int:
        """Wait until the command has written a number to a file, and return it."""
        until(lambda: (self.work / name).exists() and (self.work / name).read_text().endswith("\n"))
        return int((self.work / name).read_text())


def in_background(ran: Ran) -> tuple[threading.Thread, list[Ended]]:
    found: list[Ended] = []
    thread = threading.Thread(target=lambda: found.append(ran.run()))
    thread.start()
    return thread, found


def test_a_command_has_its_own_exit_code_and_streams(tmp_path: Path) -> None:
    """What it says on each stream is kept apart, and its code is told as it is."""
    ran = Ran(tmp_path, "sh", "-c", "printf out; printf err >&2; exit 7")
    assert ran.run() == Ended(Why.ITSELF, 7, None)
    assert (ran.told(Kind.OUT), ran.told(Kind.ERR)) == (b"out", b"err")


def test_a_signal_is_no_exit_code(tmp_path: Path) -> None:
    """A command that a signal ends is told with that signal."""
    assert Ran(tmp_path, "sh", "-c", "kill -SEGV $$").run() == Ended(Why.ITSELF, None, signal.SIGSEGV)


def test_no_shell_reads_the_words(tmp_path: Path) -> None:
    """Every word arrives byte for byte: spaces, semicolons, options, newlines and bytes that are no text."""
    argv = [b"-rf", b"a; touch x", b"$(touch y)", b"*", b"", b"new\nline", b"\xff\xfe", b"'\""]
    script = "import sys, os; sys.stdout.buffer.write(b'\\1'.join(map(os.fsencode, sys.argv[1:])))"
    ran = Ran(tmp_path, sys.executable, "-c", script, *argv)
    assert ran.run().exit_code == 0
    assert ran.told(Kind.OUT).split(b"\1") == argv
    assert list(ran.work.iterdir()) == []


def test_standard_input_is_empty_and_the_folder_is_work(tmp_path: Path) -> None:
    """A command that reads does not wait; what it makes without saying where is in its own folder."""
    ran = Ran(tmp_path, "sh", "-c", "cat; pwd; touch made")
    assert ran.run().exit_code == 0
    assert ran.told(Kind.OUT).decode().strip() == str(ran.work) and (ran.work / "made").exists()


def test_only_the_named_environment_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the server's own environment has besides, secrets among it, no command sees."""
    monkeypatch.setenv("A_SECRET", "of the server")
    ran = Ran(tmp_path, "env")
    ran.run()
    assert {line.partition("=")[0] for line in ran.told(Kind.OUT).decode().splitlines()} == {"PATH", MARK}


def test_a_command_that_is_not_there_is_named(tmp_path: Path) -> None:
    """It fails with a sentence that says so, and so does what is no program."""
    with pytest.raises(NotFound, match="no command no-such-command on the host"):
        Ran(tmp_path, "no-such-command").run()
    plain = tmp_path / "plain"
    plain.write_text("text")
    for number, mode in enumerate((0o644, 0o755)):
        plain.chmod(mode)
        (tmp_path / str(number)).mkdir()
        with pytest.raises(DeltasyncError, match=r"plain (may not be run|could not be started)"):
            Ran(tmp_path / str(number), os.fspath(plain)).run()


def test_when_its_time_is_over_its_children_are_killed_as_well(tmp_path: Path) -> None:
    """A timeout ends the command with everything that it has started, grandchildren among it."""
    ran = Ran(tmp_path, "sh", "-c", "sh -c 'sleep 1000 & echo $! > pid; wait' & wait", seconds=1.0)
    ended = ran.run()
    assert (ended.why, ended.signal) == (Why.TIME, signal.SIGTERM)
    until(lambda: not is_there(ran.told_pid("pid")))


def test_children_do_not_outlive_the_command(tmp_path: Path) -> None:
    """What it leaves running, in its group or out of it, is killed when it ends; the run waits for neither."""
    ran = Ran(tmp_path, "sh", "-c", "sleep 1000 & echo $! > in; setsid sleep 1000 & echo $! > out; exit 0")
    assert ran.run() == Ended(Why.ITSELF, 0, None)
    for name in ("in", "out"):
        until(lambda name=name: not is_there(ran.told_pid(name)))  # type: ignore[misc]


def test_whoever_holds_the_streams_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that hides its job and leaves its group keeps the pipes open; the run ends all the same."""
    monkeypatch.setattr(process, "LINGER_SECONDS", 0.05)
    script = "echo before; setsid env -i sh -c 'echo $$ > pid; exec sleep 1000' & until test -s pid; do :; done"
    ran = Ran(tmp_path, "sh", "-c", script)
    try:
        assert ran.run().exit_code == 0
        assert ran.told(Kind.OUT) == b"before\n"
    finally:
        os.kill(ran.told_pid("pid"), signal.SIGKILL)


def test_a_command_is_asked_to_end_before_it_is_killed(tmp_path: Path) -> None:
    """A cancelled one can clean up: it gets TERM first, and ends by itself."""
    ran = Ran(tmp_path, "sh", "-c", "trap 'echo bye; exit 5' TERM; echo $$ > pid; while :; do sleep 0.01; done")
    thread, found = in_background(ran)
    ran.told_pid("pid")
    ran.process.end(Why.CANCELLED)
    thread.join()
    assert found == [Ended(Why.CANCELLED, 5, None)] and ran.told(Kind.OUT) == b"bye\n"


def test_who_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that takes no notice of TERM gets KILL some seconds later."""
    monkeypatch.setattr(process, "TERM_SECONDS", 0.1)
    ran = Ran(tmp_path, "sh", "-c", "trap '' TERM; echo $$ > pid; while :; do sleep 0.01; done")
    thread, found = in_background(ran)
    ran.told_pid("pid")
    ran.process.end(Why.STOPPED)
    thread.join()
    assert found == [Ended(Why.STOPPED, None, signal.SIGKILL)]


def test_what_is_ended_before_it_began_does_not_begin(tmp_path: Path) -> None:
    """A cancel that comes first leaves nothing to run."""
    ran = Ran(tmp_path, "touch", "made")
    ran.process.end(Why.CANCELLED)
    assert ran.run() == Ended(Why.CANCELLED, None, None)
    assert list(ran.work.iterdir()) == [] and ran.pids == []


def test_a_stream_of_any_length_takes_bounded_memory_and_disk(tmp_path: Path) -> None:
    """Of 300 MB the server holds a piece at a time, and the disk no more than the limit."""
    ran = Ran(tmp_path, "head", "-c", "300000000", "/dev/zero", limit=1 << 20)
    tracemalloc.start()
    try:
        assert ran.run().exit_code == 0
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert ran.log.end == 300_000_000
    assert sum(each.stat().st_size for each in (tmp_path / "log").iterdir()) <= 1 << 20


def test_what_a_dead_server_left_is_found_by_its_start(tmp_path: Path) -> None:
    """A group is killed by its number only where its leader began when it was written down."""
    ran = Ran(tmp_path, "sh", "-c", "echo $$ > pid; sleep 1000")
    thread, found = in_background(ran)
    pid = ran.told_pid("pid")
    start = start_of(pid)
    kill_group(pid, "another boot 1")
    kill_group(pid, None)
    assert start is not None and is_there(pid)
    kill_group(pid, start)
    thread.join()
    assert found[0].signal == signal.SIGKILL and start_of(pid) is None


def test_a_job_is_found_by_its_mark(tmp_path: Path) -> None:
    """Whatever of a job has left its group is killed, and nothing of another job."""
    ran = Ran(tmp_path, "sh", "-c", "exec setsid -w sh -c 'echo $$ > pid; exec sleep 1000'")
    thread, _ = in_background(ran)
    pid = ran.told_pid("pid")
    kill_marked({"ds_1_00000002"})
    assert is_there(pid)
    kill_marked({JOB})
    thread.join()
    assert not is_there(pid)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_a_command_runs_as_the_named_user(tmp_path: Path) -> None:
    """With another user it has that user's ids, and none of the server's groups."""
    account = Account.named("nobody")
    assert account is not None
    ran = Ran(tmp_path, "id", "-u", account=account)
    let_pass(tmp_path)
    assert ran.run().exit_code == 0
    assert int(ran.told(Kind.OUT)) == account.uid
