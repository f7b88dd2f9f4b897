"""`deltasync run` and `jobs` for somebody who has read the README alone: what goes wrong is said, and how to go on."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from remote_runs import Terminal
from serving import Served, serving, until
from user import BINARY, SECONDS

from deltasync import Host
from deltasync.cli.terminal import Interrupts
from deltasync.core.errors import PlanRefused

README = Path(__file__).parents[2] / "README.md"
SERVER = Path(sys.executable).parent / "deltasync-server"


# Outputs that are not there


@pytest.mark.parametrize(
    "words",
    [
        ["--out", "res.csv", "--", "true"],
        ["--shell", "echo 1 > res.csv; : {out:res.csv}"],
        ["--", "true", "{out:res_%02d.csv}"],
        ["-d", "--out", "res.csv", "--", "true"],
    ],
)
def test_an_output_that_was_named_and_not_written_is_told(terminal: Terminal, words: list[str]) -> None:
    """`--out` and `{out:}` promise a file: without it the code is 124, its path is told, and no fetch is advised."""
    done = terminal.run(*words)
    if "-d" in words:
        assert done.code == 0 and terminal.user.run("jobs", "wait", done.out.strip()).code == 0
        done = terminal.user.run("jobs", "fetch", done.out.strip())
    assert done.code == 124, done
    assert (
        f"{terminal.folder}/res" in done.err and "was not written; the command ran in a folder of its own" in done.err
    )
    assert "tries again" not in done.err and "cannot come home" in done.err


@pytest.mark.parametrize("words", [["echo", "x", "-o", "b.txt"], ["echo", "a.txt", "b.txt"]])
def test_an_output_that_was_only_guessed_is_not_missed(terminal: Terminal, words: list[str]) -> None:
    """A word that merely looks like an output was promised by nobody: nothing is told of it, and the code is 0."""
    done = terminal.run("--", *words)
    assert (done.code, done.err) == (0, "")


def test_a_command_that_fails_is_not_blamed_for_its_outputs_as_well(terminal: Terminal) -> None:
    """Of a command that ended with another code than 0 the missing output is no news."""
    done = terminal.run("--fetch-failed", "--out", "res.csv", "--", "false")
    assert done.code == 1 and "was not written" not in done.err


def test_each_file_has_to_become_what_was_named(terminal: Terminal) -> None:
    """With --each a file whose `{out}` was not written failed; a last word with a hole is a guess."""
    words = ("--each", "*.txt", "--out-dir", "out", "--", "test", "{}", "!=", "{out}")
    done = terminal.run(*words)
    assert done.code == 3 and "was not written" in done.err, done
    done = terminal.run("--each", "*.txt", "--", "echo", "{}", "{stem}.png")
    assert done.code == 0, done.err


def test_python_says_what_was_not_written(terminal: Terminal, host: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Result.problems` names an output that was to be written and was not."""
    monkeypatch.setenv("DELTASYNC_HOME", terminal.user.environment["DELTASYNC_HOME"])
    with Host(host.url) as there:
        done = there.run(["true"], outputs=["res.csv"], folder=terminal.folder)
    assert done.exit_code == 0 and done.outputs == []
    assert [each.partition(": ")[0] for each in done.problems] == [f"{terminal.folder}/res.csv"]


def test_a_fetch_says_again_what_can_never_come(terminal: Terminal) -> None:
    """`jobs fetch ID` of a job whose output is a link says so with 124, each time; one that is home says that."""
    job = terminal.detached("--shell", "ln -s /etc/passwd {out:b.txt}; cp {in:a.txt} {out:c.txt}")
    assert terminal.user.run("jobs", "wait", job).code == 0
    for _ in range(2):
        done = terminal.user.run("jobs", "fetch", job)
        assert done.code == 124 and f"{terminal.folder}/b.txt: is a link" in done.err, done
        assert "tries again" not in done.err and " 0 B home" not in done.out
    job = terminal.detached("--", "cp", "a.txt", "d.txt")
    assert terminal.user.run("jobs", "wait", job).code == 0
    assert "6 B home" in terminal.user.run("jobs", "fetch", job).out
    done = terminal.user.run("jobs", "fetch", job)
    assert (done.code, done.err) == (0, "") and "home already" in done.out


def test_a_fetch_of_all_has_a_line_for_what_returned_nothing(terminal: Terminal) -> None:
    """`jobs fetch` says once of a cancelled and of a failed job that it is one, and that nothing came."""
    cancelled = terminal.detached("--shell", "exec sleep 1000")
    assert terminal.user.run("jobs", "cancel", cancelled).code == 0
    failed = terminal.detached("--", "no-such-command")
    for job in (cancelled, failed):
        assert terminal.user.run("jobs", "wait", job).code == 125
    done = terminal.user.run("jobs", "fetch")
    assert done.code == 0 and done.out == ""
    lines = done.err.splitlines()
    assert len(lines) == 2 and all("returned nothing" in each for each in lines), lines
    assert f"{cancelled} was cancelled" in done.err and f"{failed} failed" in done.err
    assert "waits to be brought home" in terminal.user.run("jobs", "fetch").out


# Jobs that nobody needs any more


def test_a_kept_folder_is_let_go(tmp_path: Path) -> None:
    """Where kept sessions leave no room the refusal, `health` and `jobs show` name `jobs rm`, and that makes room."""
    with serving(tmp_path / "data", "--run-without-token", "--job-sessions", "1") as served:
        terminal = Terminal.at(tmp_path / "home", served.url)
        user, job = terminal.user, terminal.detached("--keep", "1h", "--", "true")
        assert user.run("jobs", "wait", job).code == 0
        folder = Path(terminal.job(job)["session_path"])
        assert f"`deltasync jobs rm {job}`" in user.run("jobs", "show", job).out and folder.is_dir()
        refused = terminal.run("--", "true")
        assert refused.code == 122 and "`deltasync jobs rm ID`" in refused.err, refused
        told = user.run("health")
        assert told.code == 3 and "`deltasync jobs rm ID`" in told.out, told
        assert user.run("jobs", "rm", job).code == 0
        assert not folder.exists() and user.run("jobs", "show", job).code != 0
        assert terminal.run("--", "true").code == 0
        assert user.run("jobs", "fetch").err == ""


def test_no_job_is_removed_that_somebody_waits_for(terminal: Terminal) -> None:
    """`jobs rm` leaves a job alone that goes on, and one whose outputs are not home unless that is said."""
    user, job = terminal.user, terminal.detached("--shell", "exec sleep 1000")
    refused = user.run("jobs", "rm", job)
    assert refused.code == 2 and f"`deltasync jobs cancel {job}`" in refused.err
    assert terminal.job(job)["state"] != "cancelled" and user.run("jobs", "cancel", job).code == 0
    job = terminal.detached("--", "cp", "a.txt", "b.txt")
    assert user.run("jobs", "wait", job).code == 0
    refused = user.run("jobs", "rm", job)
    assert refused.code == 2 and f"`deltasync jobs fetch {job}`" in refused.err
    assert user.run("jobs", "fetch", job).code == 0 == user.run("jobs", "rm", job).code
    job = terminal.detached("--", "cp", "a.txt", "b.txt")
    assert user.run("jobs", "wait", job).code == 0 == user.run("jobs", "rm", "--force", job).code


@pytest.mark.parametrize("words", [["status"], ["check"], ["collect"], ["adopt", "."], ["replay", "."]])
def test_what_serves_and_what_looks_take_the_same_store(tmp_path: Path, words: list[str]) -> None:
    """Without --data every command of the server takes the usual folder of the user, and its help names it."""
    home = tmp_path / "home"
    home.mkdir()
    environment = {**os.environ, "HOME": str(home), "XDG_DATA_HOME": ""}
    done = subprocess.run([SERVER, *words], capture_output=True, text=True, cwd=home, env=environment, check=False)
    assert done.returncode != 2, done
    usual = home / ".local/share/deltasync"
    assert usual.is_dir() or str(usual) in done.stderr or "holds no bundle" in done.stderr, done


# What the command does not get


@pytest.mark.parametrize("source", ["pipe", "file"])
def test_standard_input_is_not_dropped_in_silence(terminal: Terminal, source: str) -> None:
    """Where a pipe or a file holds something for the command, one line says that it gets none, and nothing is read."""
    said = "gets no standard input"
    for text, lines in (("alpha\n", 1), ("", 0)):
        (terminal.folder / "given").write_text(text)
        with (terminal.folder / "given").open() as given, piped(text) as pipe:
            done = subprocess.run(
                [BINARY, "run", "--", "cat"],
                stdin=given if source == "file" else pipe,
                capture_output=True,
                text=True,
                cwd=terminal.folder,
                env=terminal.user.environment,
                check=False,
            )
            assert (done.returncode, done.stdout, done.stderr.count(said)) == (0, "", lines), done
            left = given.read() if source == "file" else os.read(pipe, 99).decode()
            assert left == text


@contextlib.contextmanager
def piped(text: str) -> Iterator[int]:
    """Lend the end of a pipe that holds a text, and nobody writes to it any more."""
    end, begin = os.pipe()
    os.write(begin, text.encode())
    os.close(begin)
    try:
        yield end
    finally:
        os.close(end)


# Ctrl-C


def test_a_second_interrupt_in_time_cancels_nothing() -> None:
    """Within the moment after the first Ctrl-C a second one ends the waiting alone: no cancel is asked for."""
    announced, cancelled = threading.Event(), threading.Event()
    with pytest.raises(KeyboardInterrupt), Interrupts(cancelled.set, announced.set, grace_seconds=1000) as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert announced.wait(SECONDS) and not interrupts.has_cancelled
        signal.raise_signal(signal.SIGINT)
    assert not interrupts.has_cancelled and not cancelled.is_set()


def test_an_interrupt_alone_cancels_and_another_one_stops_waiting() -> None:
    """When the moment is over the cancel is asked for once, and the next Ctrl-C still gets the user out."""
    cancelled = threading.Event()
    with pytest.raises(KeyboardInterrupt), Interrupts(cancelled.set, lambda: None, grace_seconds=0) as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert cancelled.wait(SECONDS) and interrupts.has_cancelled
        signal.raise_signal(signal.SIGINT)
    assert interrupts.has_cancelled


def test_what_is_over_is_not_cancelled_any_more() -> None:
    """A job that ends in the moment after a Ctrl-C is left alone: to cancel it then would forget what it wrote."""
    threads, cancelled = threading.active_count(), threading.Event()
    with Interrupts(cancelled.set, lambda: None, grace_seconds=1000) as interrupts:
        signal.raise_signal(signal.SIGINT)
    until(lambda: threading.active_count() <= threads)
    assert not interrupts.has_cancelled and not cancelled.is_set()


# What is told


def test_jobs_are_told_with_the_paths_of_this_machine(terminal: Terminal) -> None:
    """`jobs ls` and `jobs show` name files as they are here, whole states, and no more than was asked for."""
    job = terminal.detached("--shell", "cat {in:a.txt}; exit 7")
    assert terminal.user.run("jobs", "wait", job).code == 7
    listed = terminal.user.run("jobs", "ls", "-n", "1")
    assert listed.code == 0, listed.err
    line, *more = listed.out.splitlines()
    assert line.startswith(f"{job}  done (exit 7)  20"), line
    assert f"cat {terminal.folder}/a.txt"[:40] in line and "sessions" not in line
    assert len(more) <= 1 and all("older; -n 0 lists all" in each for each in more)
    shown = terminal.user.run("jobs", "show", job).out
    assert f"cat {terminal.folder}/a.txt" in shown and "1 file," in shown


def test_a_list_of_jobs_is_twenty_long(terminal: Terminal) -> None:
    """Without -n the newest twenty are listed, and how many more there are."""
    for number in range(21):
        (terminal.folder / f"{number}.dat").touch()
    done = terminal.run("--each", "*.dat", "--", "test", "-e", "{}")
    assert done.code == 0, done.err
    *lines, last = terminal.user.run("jobs", "ls").out.splitlines()
    assert len(lines) == 20 and "older; -n 0 lists all" in last
    assert len(terminal.user.run("jobs", "ls", "-n", "0").out.splitlines()) > 20
    assert terminal.user.run("jobs", "ls", "-n", "x").code == 2


# What is refused


def test_a_network_without_a_sandbox_is_refused(terminal: Terminal) -> None:
    """`--net` alone says nothing, so it is 121 and names --sandbox."""
    done = terminal.run("--net", "--", "true")
    assert done.code == 121 and "--sandbox" in done.err


@pytest.mark.parametrize("command", ["cp a.txt b.txt", b"true", Path("true")])
def test_python_takes_no_text_for_a_command(host: Served, command: Any) -> None:
    """`Host.run` refuses a text in one sentence that says what to give; its letters would be its words."""
    with Host(host.url) as there, pytest.raises(PlanRefused, match="give a list of words"):
        there.run(command)


def test_a_template_is_explained_by_its_first_file(terminal: Terminal) -> None:
    """`run --explain --each` shows what each word is for the first file, and runs nothing."""
    (terminal.folder / "b.txt").touch()
    done = terminal.run("--explain", "--each", "*.txt", "--out-dir", "out", "--", "cp", "{}", "{out}")
    assert done.code == 0 and "for a.txt, the first of 2 files:" in done.out, done
    assert f"input: {terminal.folder}/a.txt" in done.out and f"output: {terminal.folder}/out/a.txt" in done.out
    assert not (terminal.folder / "out").exists()


def test_where_to_run_is_asked_for(terminal: Terminal) -> None:
    """Without any host the refusal says how to name one."""
    done = terminal.run("--", "true", DELTASYNC_ON="")
    assert done.code == 121 and "--on HOST, or `deltasync host add`" in done.err, done


def test_a_cancel_says_that_it_goes_on(terminal: Terminal) -> None:
    """`jobs cancel` of a job that takes a while to end does not call it running."""
    job = terminal.detached("--shell", "trap '' TERM; exec sleep 1000")
    until(lambda: terminal.job(job)["state"] == "running")
    assert terminal.user.run("jobs", "cancel", job).out.strip() in (f"{job} is being cancelled", f"{job} is cancelled")


# What README says


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("begins", "made"),
    [
        ("deltasync run --in-place", "made.txt"),
        ("deltasync run --literal", "d.tgz"),
        ("deltasync run --shell 'sort", "sorted.txt"),
    ],
)
def test_what_readme_advises_works(terminal: Terminal, begins: str, made: str) -> None:
    """A tool that wants the current folder, an archive, a name with a space: the lines work as they stand."""
    (line,) = (each for each in README.read_text().splitlines() if each.startswith(begins) and "big.csv" not in each)
    (terminal.folder / "d").mkdir()
    (terminal.folder / "my list.txt").write_text("b\na\n")
    (terminal.folder / "Makefile").write_text("all:\n\techo made > made.txt\n")
    environment = {**terminal.user.environment, "PATH": f"{BINARY.parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["sh", "-c", line], capture_output=True, text=True, cwd=terminal.folder, env=environment, check=False
    )
    assert done.returncode == 0, done
    assert (terminal.folder / made).stat().st_size
