"""`deltasync run` in trouble: commands that fail, outputs that are none, inputs that change, and names that are odd."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from lossy import Fault, lossy
from remote_runs import Terminal, contents, is_over
from serving import BINARY, Served, serving

MEBI = 1 << 20
FLAGS = ("--run-without-token", "--job-file-bytes", "1M")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One host for all tests, which runs what anybody on this machine asks, and takes no file above a mebibyte."""
    with serving(tmp_path_factory.mktemp("host") / "data", *FLAGS) as served:
        yield served


# Commands that fail


@pytest.mark.parametrize("tool", ["no-such-tool", "/no/such/tool"])
def test_a_tool_that_the_host_lacks_is_named(terminal: Terminal, tool: str) -> None:
    """A command that is not on the host is 125 and one sentence with its name; its output is not made here."""
    done = terminal.run("--", tool, "-i", "a.txt", "-o", "b.txt")
    assert done.code == 125 and done.err.count("\n") == 1
    assert f"there is no command {tool} on the host" in done.err
    assert set(contents(terminal.folder)) == {"a.txt"}


def test_a_tool_that_may_not_be_run_is_told(terminal: Terminal, tmp_path: Path) -> None:
    """A file that is no program, and one of a format that the host cannot run, are 125 and one sentence each."""
    (tmp_path / "plain").write_text("x")
    (tmp_path / "odd").write_bytes(b"\x7fELF nothing")
    (tmp_path / "odd").chmod(0o755)
    for name, said in (("plain", "may not be run"), ("odd", "could not be started")):
        done = terminal.run("--", tmp_path / name)
        assert done.code == 125 and said in done.err and done.err.count("\n") == 1, done.err


@pytest.mark.parametrize("code", [0, 1, 2, 77, 255])
def test_an_exit_code_passes_through(terminal: Terminal, code: int) -> None:
    """Whatever the command ends with `run` ends with, and outputs come home only where that is 0."""
    done = terminal.run("--shell", f"cp {{in:a.txt}} {{out:b.txt}}; echo said; exit {code}")
    assert (done.code, done.out) == (code, "said\n")
    assert (terminal.folder / "b.txt").exists() == (code == 0)


@pytest.mark.parametrize("signal", ["TERM", "KILL", "SEGV"])
def test_a_signal_passes_through_as_in_a_shell(terminal: Terminal, signal: str) -> None:
    """A command that a signal ends is 128 and the signal's number, with the words that it said before."""
    done = terminal.run("--shell", f"echo said; kill -{signal} $$")
    number = {"TERM": 15, "KILL": 9, "SEGV": 11}[signal]
    assert (done.code, done.out) == (128 + number, "said\n")


# Outputs that are none


def test_an_output_that_was_never_written_leaves_what_is_here(terminal: Terminal) -> None:
    """Where the command writes nothing at its output's place that is told, and nothing is made or removed here."""
    (terminal.folder / "old.txt").write_text("old")
    done = terminal.run("--shell", ": {in:a.txt} {out:new.txt} {out:old.txt}")
    assert done.code == 124, done.err
    assert contents(terminal.folder) == {"a.txt": (b"alpha\n", False), "old.txt": (b"old", False)}


def test_what_is_written_over_an_input_is_told(terminal: Terminal) -> None:
    """A second file that is here from an earlier run was sent as an input: that it stays as it was is said."""
    (terminal.folder / "old.txt").write_text("old\n")
    done = terminal.run("--", "cp", "a.txt", "old.txt")
    assert f"{terminal.folder}/old.txt: was changed on the host and stays as it is here" in done.err
    assert (terminal.folder / "old.txt").read_text() == "old\n" and "a.txt:" not in done.err


def test_what_is_written_elsewhere_does_not_come_home(terminal: Terminal, tmp_path: Path) -> None:
    """A file beside an output, or in the command's folder, is told and stays there; one outside of all is not seen."""
    script = f"cp {{in:a.txt}} {{out:b.txt}}; d=$(dirname {{out:b.txt}}); touch $d/beside plain {tmp_path}/outside"
    done = terminal.run("--shell", script)
    assert done.code == 0 and f"{terminal.folder}/beside" in done.err
    assert "plain was written into the job's own folder" in done.err and "outside" not in done.err
    assert set(contents(terminal.folder)) == {"a.txt", "b.txt"} and (tmp_path / "outside").exists()


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ("ln -s /etc/passwd", "is a link"),
        ("ln -s / ", "is a link"),
        ("mkfifo", "is a pipe"),
        ("truncate -s 2M", "has 2.0 MiB, and a file may have"),
    ],
)
def test_an_output_that_is_no_file_stays_there(terminal: Terminal, made: str, said: str) -> None:
    """A link, a pipe and a file above the limit are told with their path here, 124, and what else came is home."""
    (terminal.folder / "out.txt").write_text("old")
    done = terminal.run("--shell", f"rm -f {{out:out.txt}}; {made} {{out:out.txt}}; cp {{in:a.txt}} {{out:b.txt}}")
    assert done.code == 124, done
    assert f"{terminal.folder}/out.txt: {said}" in done.err
    assert (terminal.folder / "out.txt").read_text() == "old" and not (terminal.folder / "out.txt").is_symlink()
    assert (terminal.folder / "b.txt").read_text() == "alpha\n"


def test_an_input_above_the_limit_is_refused_with_figures(terminal: Terminal) -> None:
    """A host that takes no file so large says so with both sizes; nothing runs."""
    (terminal.folder / "large").write_bytes(bytes(2 * MEBI))
    done = terminal.run("--", "cksum", "large")
    assert done.code == 122 and "2.0 MiB" in done.err and "1.0 MiB" in done.err and done.out == ""


# Inputs that change


def test_an_input_that_changes_on_the_way_is_the_one_that_was_sent(terminal: Terminal, host: Served) -> None:
    """A file that is edited after its sending and before the job's start is read there as it was sent."""
    go = threading.Event()
    with lossy(host.port) as proxy:
        fault = Fault(b"POST /api/v1/jobs ", until=go)
        proxy.faults.append(fault)
        process = terminal.start("--on", proxy.url, "--", "cat", "a.txt")
        assert fault.has_happened.wait(20)
        (terminal.folder / "a.txt").write_text("edited\n")
        go.set()
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, "alpha\n"), err
    assert terminal.run("--", "cat", "a.txt").out == "edited\n"


@pytest.mark.parametrize("becomes", ["nothing", "a folder", "a pipe"])
def test_an_input_that_goes_before_it_is_sent_ends_the_run(terminal: Terminal, host: Served, becomes: str) -> None:
    """A file that is another thing when it is sent than when the command was planned: one sentence tells it."""
    go, path = threading.Event(), terminal.folder / "a.txt"
    with lossy(host.port) as proxy:
        fault = Fault(b"GET /api/v1/capabilities", until=go)
        proxy.faults.append(fault)
        process = terminal.start("--on", proxy.url, "--", "cat", "a.txt")
        assert fault.has_happened.wait(20)
        path.unlink()
        if becomes == "a pipe":
            os.mkfifo(path)
        elif becomes == "a folder":
            path.mkdir()
        go.set()
        out, err = process.communicate(timeout=20)
    if becomes == "a folder":
        assert process.returncode == 1 and "a.txt: Is a directory" in err  # as `cat` says here
    else:
        assert process.returncode in (121, 123) and err.count("\n") == 1 and str(path) in err, (process.returncode, err)
    assert out == ""


def test_a_job_that_writes_into_its_inputs_changes_nothing(terminal: Terminal, tmp_path: Path) -> None:
    """What a command does to its inputs without --in-place stays there: the next one reads what is here."""
    with serving(tmp_path / "data", "--run-without-token") as served:
        on = ("--on", served.url)
        script = (
            "echo x >> {in:a.txt}; cat {in:a.txt}; chmod 777 {in:a.txt}; rm {in:a.txt}; ln -s /etc/passwd {in:a.txt}"
        )
        assert terminal.run(*on, "--shell", script).out == "alpha\nx\n"
        assert terminal.run(*on, "--", "cat", "a.txt").out == "alpha\n"
        assert (terminal.folder / "a.txt").read_text() == "alpha\n"
    checked = subprocess.run([BINARY, "check", "--data", tmp_path / "data", "--json"], capture_output=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_a_job_that_writes_through_a_link_costs_no_other_one_its_input(terminal: Terminal, tmp_path: Path) -> None:
    """Where jobs are trusted inputs may be hard links; what one breaks all the same is found, and sent again."""
    with serving(tmp_path / "data", "--run-without-token", "--trust-jobs") as served:
        on = ("--on", served.url)
        script = "chmod u+w {in:a.txt}; echo x >> {in:a.txt}; cat {in:a.txt}"
        assert terminal.run(*on, "--shell", script).out == "alpha\nx\n"
        again = terminal.run(*on, "--", "cat", "a.txt")
        assert (again.code, again.out) == (0, "alpha\n"), again.err
    checked = subprocess.run([BINARY, "check", "--data", tmp_path / "data", "--json"], capture_output=True, check=False)
    assert checked.returncode == 0, checked.stdout


# Names


def test_the_same_name_in_two_folders_is_two_files(terminal: Terminal) -> None:
    """Inputs and outputs with the same base name are kept apart by their folders."""
    for folder in ("one", "two", "three", "four"):
        (terminal.folder / folder).mkdir()
    (terminal.folder / "one/a.txt").write_text("1")
    (terminal.folder / "two/a.txt").write_text("2")
    script = "cp {in:one/a.txt} {out:three/a.txt}; cp {in:two/a.txt} {out:four/a.txt}"
    assert terminal.run("--shell", script).code == 0
    assert (terminal.folder / "three/a.txt").read_text() == "1"
    assert (terminal.folder / "four/a.txt").read_text() == "2"


def test_names_like_commands_and_flags_are_names_on_both_ways(terminal: Terminal) -> None:
    """`a; touch x`, `-rf` and others go there and come home under their names; nothing of them is run."""
    odd = ["a; touch x", "-rf", "$(touch x)", "it's `touch x`", "ünï côde"]
    (terminal.folder / "out").mkdir()
    for name in odd:
        (terminal.folder / name).write_text(f"<{name}>")
    code = "import shutil, sys; [shutil.copy(each, sys.argv[-1]) for each in sys.argv[1:-1]]"
    done = terminal.run("--", "python3", "-c", code, *(f"{{in:{name}}}" for name in odd), "{out:out/}")
    assert done.code == 0, done.err
    assert contents(terminal.folder / "out") == {name: (f"<{name}>".encode(), False) for name in odd}
    assert "x" not in contents(terminal.folder)


@pytest.mark.parametrize("words", [["--", "cat", "two\nlines"], ["--", "cp", "a.txt", "{out:two\nlines}"]])
def test_a_name_with_a_line_end_is_refused_in_one_sentence(terminal: Terminal, words: list[str]) -> None:
    """A name that cannot be carried is 121 and one line that shows it escaped, before anything is sent."""
    (terminal.folder / "two\nlines").write_text("x")
    done = terminal.run(*words)
    assert done.code == 121 and done.err.count("\n") == 1, done
    assert "two\\nlines" in done.err and "another name" in done.err


def test_an_output_folder_with_a_name_that_cannot_be_carried(terminal: Terminal) -> None:
    """Of a folder that the command filled comes home what can be carried; the rest is told, and the code is 124."""
    code = "import sys; [open(f'{sys.argv[1]}/{name}', 'w') for name in ('good', 'two\\nlines', 'tab\\t')]"
    done = terminal.run("--", "python3", "-c", code, "{out:out/}")
    assert set(contents(terminal.folder / "out")) == {"good"}
    assert "two\\nlines" in done.err and "Traceback" not in done.err
    assert done.code == 124, done


# Processes that stay


def test_what_a_command_leaves_running_is_ended_with_it(terminal: Terminal, tmp_path: Path) -> None:
    """A process that the command put into a session of its own holds nothing up, and is gone when `run` is over."""
    left = tmp_path / "left"
    left.write_text("echo $$ > \"$1\"; trap '' HUP TERM; while :; do sleep 1; done\n")
    script = f"setsid sh '{left}' {tmp_path}/pid & until test -s {tmp_path}/pid; do :; done; echo over"
    done = terminal.run("--shell", script)
    assert (done.code, done.out) == (0, "over\n"), done.err
    assert is_over(int((tmp_path / "pid").read_text()))


def test_what_the_host_would_refuse_is_not_sent(terminal: Terminal, host: Served) -> None:
    """A file beyond its limit, and GPUs that it lacks, are refused with both figures before anything goes there."""
    (terminal.folder / "large.bin").write_bytes(os.urandom(MEBI + 1))
    before = sorted(host.data.glob("cache/*/*"))
    done = terminal.run("cat", "large.bin")
    assert done.code == 122 and "large.bin" in done.err and "1.0 MiB" in done.err, done
    done = terminal.run("--gpus", "3", "--", "cat", "a.txt")
    assert done.code == 122 and "0 GPUs, not 3" in done.err, done
    assert sorted(host.data.glob("cache/*/*")) == before
