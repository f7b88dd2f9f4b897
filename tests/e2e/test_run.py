"""`deltasync run`: a command on a host behaves as it would here, with real programs."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from observed import settle
from serving import Served, serving, until
from user import BINARY, SECONDS, Done, User

from deltasync import Host
from deltasync.core.errors import JobLost, PlanRefused
from deltasync.host import Tail

EDIT = "s/alpha/omega/"


@pytest.fixture
def user(tmp_path: Path, host: Served) -> User:
    """A user whose commands run on that host."""
    made = User(tmp_path / "home")
    made.environment["DELTASYNC_ON"] = host.url
    return made


@pytest.fixture
def here(user: User) -> Path:
    """The user's folder, with something in it."""
    folder = user.home / "work"
    folder.mkdir()
    (folder / "a.txt").write_text("alpha\n")
    (folder / "b.txt").write_text("beta\n")
    return folder


def run(user: User, here: Path, *words: str, **variables: str) -> Done:
    """Run a command on the host, from the user's folder."""
    return user.run("run", *words, cwd=here, **variables)


def as_it_is(path: Path) -> tuple[int, ...]:
    """Return what changes with a file."""
    status = path.stat()
    return status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def names(folder: Path) -> set[str]:
    return {each.name for each in folder.iterdir()}


# What comes home


def test_a_copy_comes_home_and_nothing_else_changes(user: User, here: Path) -> None:
    """`cp a.txt c.txt` leaves c.txt here as it would, prints nothing, and touches nothing beside it."""
    before = {each: as_it_is(each) for each in here.iterdir()}
    done = run(user, here, "--", "cp", "a.txt", "c.txt")
    assert (done.code, done.out, done.err) == (0, "", "")
    assert (here / "c.txt").read_text() == "alpha\n"
    assert names(here) == {"a.txt", "b.txt", "c.txt"}
    assert {each: as_it_is(each) for each in before} == before


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_a_program_is_built_from_sources_and_runs_here(user: User, here: Path) -> None:
    """`gcc -Iinclude main.c -o main` finds its header there; the program comes home executable."""
    (here / "include").mkdir()
    (here / "include/word.h").write_text('#define WORD "built"\n')
    (here / "main.c").write_text('#include <stdio.h>\n#include "word.h"\nint main(void) { puts(WORD); return 0; }\n')
    done = run(user, here, "--", "gcc", "-Iinclude", "main.c", "-o", "main")
    assert (done.code, done.out) == (0, ""), done.err
    assert subprocess.run([here / "main"], capture_output=True, check=True).stdout == b"built\n"


def test_an_archive_of_a_folder_and_a_folder_of_an_archive(user: User, here: Path) -> None:
    """`tar` reads a whole folder there, and a folder that it writes comes home whole, with links and empty folders."""
    source = here / "source"
    (source / "deep").mkdir(parents=True)
    (source / "deep/file").write_text("deep")
    (source / "empty").mkdir()
    (source / "run").write_text("#!/bin/sh\n")
    (source / "run").chmod(0o755)
    done = run(user, here, "--out", "all.tar", "--literal", ".", "--", "tar", "-cf", "all.tar", "-C", "source/", ".")
    assert done.code == 0, done.err
    with tarfile.open(here / "all.tar") as archive:
        assert {"./deep/file", "./empty", "./run"} <= set(archive.getnames())
    done = run(user, here, "--", "tar", "-xf", "all.tar", "-C", "{out:unpacked/}")
    assert done.code == 0, done.err
    assert (here / "unpacked/deep/file").read_text() == "deep"
    assert (here / "unpacked/empty").is_dir() and os.access(here / "unpacked/run", os.X_OK)


def test_each_file_of_a_series_comes_home(user: User, here: Path) -> None:
    """An output that is a pattern brings home the files that the command made of it."""
    code = "import sys; [open(sys.argv[1] % n, 'w').write(str(n)) for n in (1, 2, 30)]"
    done = run(user, here, "--", "python3", "-c", code, "{out:f_%03d.txt}")
    assert done.code == 0, done.err
    found = {name for name in names(here) if name.startswith("f_")}
    assert found == {"f_001.txt", "f_002.txt", "f_030.txt"}


def test_inputs_change_in_place(user: User, here: Path) -> None:
    """With --in-place a file that the command edits is edited here; one that it only reads is left alone."""
    before = as_it_is(here / "b.txt")
    done = run(user, here, "--in-place", "--literal", EDIT, "--", "sed", "-i", EDIT, "a.txt", "b.txt")
    assert done.code == 0, done.err
    assert (here / "a.txt").read_text() == "omega\n"
    assert as_it_is(here / "b.txt") == before


def test_what_changed_here_meanwhile_is_not_written_over(user: User, here: Path) -> None:
    """An input that is edited here while a command changes it there stays; what came lies beside it, and is told."""
    done = run(user, here, "--in-place", "-d", "--literal", EDIT, "--", "sed", "-i", EDIT, "a.txt")
    job = done.out.strip()
    (here / "a.txt").write_text("mine\n")
    assert user.run("jobs", "wait", job).code == 0
    fetched = user.run("jobs", "fetch", job)
    assert fetched.code == 3 and "a.txt" in fetched.err
    assert (here / "a.txt").read_text() == "mine\n"
    assert (here / f"a.txt.from-{job}").read_text() == "omega\n"


def test_a_command_that_fails_leaves_nothing_until_it_is_asked_for(user: User, here: Path) -> None:
    """What a failed command wrote stays on the host; --fetch-failed, and a later fetch, bring it home."""
    script = "cp {in:a.txt} {out:c.txt}; exit 3"
    done = run(user, here, "--shell", script)
    assert done.code == 3 and "c.txt" not in names(here)
    job = done.err.split("jobs fetch ")[1].split("`")[0]
    assert user.run("jobs", "fetch", job).code == 0
    assert (here / "c.txt").read_text() == "alpha\n"
    (here / "c.txt").unlink()
    assert run(user, here, "--fetch-failed", "--shell", script).code == 3
    assert (here / "c.txt").read_text() == "alpha\n"


def test_outputs_that_find_no_folder_are_124_and_stay_on_the_host(user: User, here: Path) -> None:
    """Where an output cannot be written here, `run` says so with its own code, and the next fetch goes on."""
    (here / "sub").mkdir()
    (here / "gone").symlink_to(here / "sub")
    done = run(user, here, "--shell", f"cp {{in:a.txt}} {{out:sub/c.txt}}; rmdir {here}/gone/")
    assert done.code == 1  # a link is no folder
    done = run(user, here, "--shell", f"cp {{in:a.txt}} {{out:sub/c.txt}}; rmdir '{here}'/s'u'b")
    assert done.code == 124 and "sub" in done.err, done.err
    job = done.err.split("jobs fetch ")[1].split("`")[0]
    (here / "sub").mkdir()
    assert user.run("jobs", "fetch", job).code == 0
    assert (here / "sub/c.txt").read_text() == "alpha\n"


def test_a_folder_changes_in_place(user: User, here: Path) -> None:
    """In a folder that a command may change, files that it edits and makes come home; what it removes is told."""
    (here / "sub").mkdir()
    for name in ("edited", "left"):
        (here / "sub" / name).write_text("alpha\n")
    before = as_it_is(here / "sub/left")
    done = run(user, here, "--in-place", "--shell", "cd ./sub; echo more >> edited; echo new > made; rm -f left")
    assert done.code == 124 and f"{here}/sub/left: was removed on the host and stays here" in done.err, done.err
    assert (here / "sub/edited").read_text() == "alpha\nmore\n" and (here / "sub/made").read_text() == "new\n"
    assert as_it_is(here / "sub/left") == before and names(here / "sub") == {"edited", "left", "made"}


@pytest.mark.parametrize("each", [False, True])
def test_a_file_of_a_folder_that_is_an_input_too_changes_in_place(user: User, here: Path, *, each: bool) -> None:
    """A file that may change comes home also where a variable names its folder, of one command and of many."""
    (here / "sub").mkdir()
    (here / "sub/a.txt").write_text("alpha\n")
    words = ("--each", "sub/*.txt") if each else ()
    done = run(
        user,
        here,
        "--in-place",
        "--env",
        "DIR=sub",
        *words,
        "--",
        "sed",
        "-i",
        "-e",
        EDIT,
        "{}" if each else "sub/a.txt",
    )
    assert done.code == 0, done.err
    assert (here / "sub/a.txt").read_text() == "omega\n" and names(here / "sub") == {"a.txt"}


def test_a_host_that_is_named_wins_over_variables_that_name_none(
    user: User, here: Path, host: Served, monkeypatch: Any
) -> None:
    """With --on, a name in DELTASYNC_ON or DELTASYNC_TO that nobody knows is not looked up; without it, it is told."""
    for name in ("DELTASYNC_ON", "DELTASYNC_TO"):
        monkeypatch.setitem(user.environment, name, "nobody")
        monkeypatch.setenv(name, "nobody")
    assert run(user, here, "--on", host.url, "--", "cat", "a.txt").out == "alpha\n"
    assert user.run("jobs", "ls", "--on", host.url).code == 0
    refused = run(user, here, "--", "cat", "a.txt")
    assert refused.code in (121, 122) and "nobody" in refused.err
    monkeypatch.setenv("DELTASYNC_HOME", user.environment["DELTASYNC_HOME"])
    with Host(host.url) as there:
        assert there.run(["cat", "a.txt"], folder=here).stdout == b"alpha\n"


# What it says, and how it ends


def test_the_streams_are_kept_apart_byte_for_byte(user: User, here: Path) -> None:
    """Bytes that are no text, many of them, and no end of line reach the stream that they were written to."""
    (here / "noise").write_bytes(os.urandom(1 << 20))
    words = [BINARY, "run", "--shell", "cat {in:noise}; printf err >&2"]
    done = subprocess.run(words, capture_output=True, cwd=here, env=user.environment, timeout=SECONDS, check=False)
    assert (done.returncode, done.stderr) == (0, b"err")
    assert done.stdout == (here / "noise").read_bytes()


def test_paths_are_told_as_they_are_here(user: User, here: Path, host: Served) -> None:
    """A command that names its files names those here, also beside them; --raw shows where they lie."""
    script = "ls {in:a.txt}; dirname {in:a.txt}; echo {out:c.txt} | tee {out:c.txt} >&2; pwd"
    done = run(user, here, "--shell", script)
    first, second, third = done.out.splitlines()
    assert (first, second) == (str(here / "a.txt"), str(here)) and str(host.data) in third
    assert done.err == f"{here / 'c.txt'}\n"
    raw = run(user, here, "--raw", "--", "ls", "a.txt")
    assert raw.out.startswith(str(host.data / "sessions")) and raw.out.endswith(f"/inputs{here / 'a.txt'}\n")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--shell", "exit 7"], 7),
        (["--shell", "kill -9 $$"], 137),
        (["--timeout", "100ms", "--", "sleep", "1000"], 125),
        (["--", "no-such-command-at-all"], 125),
        (["--", "cat", "--", "-rf"], 0),
        (["--no-such-option", "--", "true"], 121),
        (["--"], 121),
        (["--gpus", "many", "--", "true"], 121),
        (["--env", "novalue", "--", "true"], 121),
        (["--", "cat", "{in:none}"], 121),
        (["--env", "LD_PRELOAD=x", "--", "true"], 121),
        (["--gpus", "1000", "--", "true"], 122),
        (["--on", "http://127.0.0.1:1", "--max-retries", "0", "--", "true"], 122),
        (["--on", "file:///tmp", "--", "true"], 121),
    ],
)
def test_the_exit_code_says_whose_failure_it_was(user: User, here: Path, words: list[str], code: int) -> None:
    """The command's own code and signal pass through; what `run` fails with itself has a code of its own."""
    (here / "-rf").write_text("x")
    done = run(user, here, *words)
    assert done.code == code, (done.out, done.err)
    assert (done.err.count("\n") == 1) == (code in (121, 122, 125)) and "Traceback" not in done.err


def test_a_host_that_asks_for_no_token_runs_nothing(user: User, here: Path, tmp_path: Path) -> None:
    """Before anything is sent, a host that would refuse the job says why, and the code is 122."""
    with serving(tmp_path / "data") as served:
        done = run(user, here, "--on", served.url, "--", "cat", "a.txt")
        assert done.code == 122 and "token" in done.err
        assert served.get("/api/v1/workspaces").json["workspaces"] == []


def test_explaining_sends_nothing(user: User, here: Path) -> None:
    """--explain says what each word is, and why, without any host."""
    done = run(user, here, "--on", "http://127.0.0.1:1", "--explain", "--json", "--", "cp", "a.txt", "c.txt")
    assert [each["is"] for each in done.json["words"]] == ["literal", "input", "output"]
    assert (done.json["inputs"], done.json["outputs"]) == ([str(here / "a.txt")], [str(here / "c.txt")])
    text = run(user, here, "--explain", "--", "cp", "a.txt", "c.txt").out
    assert "a.txt" in text and "it is here" in text


# What is sent


def test_the_same_input_is_sent_once(user: User, here: Path) -> None:
    """A second command on the same file sends no content, nor does one on a renamed and on a copied file."""
    (here / "big").write_bytes(os.urandom(1 << 20))
    assert run(user, here, "--json", "--", "cksum", "big").json["inputs"]["sent_bytes"] > 1 << 20
    shutil.copy(here / "big", here / "copy")
    for name in ("big", "copy"):
        report = run(user, here, "--json", "--", "cksum", name).json["inputs"]
        assert report["bytes"] == 1 << 20 and report["sent_bytes"] < 10_000, name


def test_the_host_of_a_workspace_runs_what_is_in_it(user: User, here: Path, host: Served) -> None:
    """Without --on the host is the one that the first input is kept on, and what is in sync there is not sent."""
    (here / "big").write_bytes(os.urandom(1 << 20))
    del user.environment["DELTASYNC_ON"]
    settle(here / "big")
    assert user.run("push", here, "--to", host.url, "--workspace", "of-a-run").code == 0
    done = run(user, here, "--json", "--", "cksum", "big")
    assert done.json["inputs"] | {"seconds": 0} == {
        "files": 1, "bytes": 1 << 20, "kept_bytes": 1 << 20, "read_bytes": 0, "sent_bytes": 0, "cached_bytes": 0,
        "problems": [], "seconds": 0,
    }  # fmt: skip
    outside = user.home / "outside"
    outside.write_text("x")
    done = user.run("run", "--", "cat", outside)
    assert done.code == 121 and "--on" in done.err


def test_names_that_a_shell_would_stumble_over(user: User, here: Path) -> None:
    """Spaces, quotes, dashes, commands and other scripts in names are names."""
    odd = ["-rf", "a; touch x", "it's", 'say "it"', "$HOME", "ünï côde", "new*", "back\\slash"]
    for name in odd:
        (here / name).write_text(f"<{name}>")
    done = run(user, here, "--", "cat", "--", *odd)
    assert done.out == "".join(f"<{name}>" for name in odd)
    assert "x" not in names(here)


def test_a_list_names_inputs(user: User, here: Path) -> None:
    """The lines of `@list` lead to the files there, in the list's order, from its own folder as well."""
    (here / "sub").mkdir()
    (here / "sub/c.txt").write_text("gamma\n")
    (here / "sub/list").write_text(f"c.txt\n{here}/a.txt\n# none.txt\n")
    code = "import sys; [print(open(line.strip()).read(), end='') for line in open(sys.argv[1][1:]) if line[0] != '#']"
    done = run(user, here, "--", "python3", "-c", code, "@sub/list")
    assert (done.code, done.out) == (0, "gamma\nalpha\n"), done.err


def test_a_variable_names_an_input(user: User, here: Path) -> None:
    """A path in --env is sent and leads there; any other value is as it was given."""
    done = run(user, here, "--env", "FILE=a.txt", "--env", "WORD=one two", "--shell", 'cat "$FILE"; echo "$WORD"')
    assert (done.code, done.out) == (0, "alpha\none two\n"), done.err


# Leaving it alone


def test_a_job_goes_on_alone_and_is_brought_home_later(user: User, here: Path) -> None:
    """A detached job is listed, waited for, read and fetched by its id; a fetch without one finds it as well."""
    job = run(user, here, "--detach", "--shell", "cp {in:a.txt} {out:c.txt}; echo said").out.strip()
    assert user.run("jobs", "wait", job).code == 0
    assert user.run("jobs", "ls", "--json").json["jobs"][0]["id"] == job
    shown = user.run("jobs", "show", "--outputs", job)
    assert "done" in shown.out and "1 file" in shown.out
    assert f"output     {here}/c.txt  6 B  " in shown.out
    assert user.run("jobs", "logs", "-f", job).out == "said\n"
    assert "c.txt" not in names(here)
    done = user.run("jobs", "fetch", "--json")
    assert [each["job"] for each in done.json["jobs"]] == [job] and done.code == 0
    assert (here / "c.txt").read_text() == "alpha\n"
    assert user.run("jobs", "fetch", "--json").json == {"jobs": []}


def test_a_watch_that_starts_brings_home_what_waited(user: User, here: Path, host: Served) -> None:
    """What a detached job wrote is here soon after a watch of a workspace on its host began; a failed one's is not."""
    kept = run(user, here, "-d", "--shell", "cp {in:a.txt} {out:failed.txt}; exit 1").out.strip()
    job = run(user, here, "-d", "--", "cp", "a.txt", "c.txt").out.strip()
    assert (user.run("jobs", "wait", kept).code, user.run("jobs", "wait", job).code) == (1, 0)
    watched = user.home / "watched"
    watched.mkdir()
    process = user.start("watch", watched, "--to", host.url, "--workspace", "of-a-watch")
    try:
        until(lambda: process.poll() is not None or (watched / ".deltasync/state.db").exists())
    finally:
        process.kill()
        _, err = process.communicate()
    assert kept in err
    assert (here / "c.txt").read_text() == "alpha\n" and "failed.txt" not in names(here)


@contextlib.contextmanager
def running(user: User, *words: str) -> Iterator[Any]:
    """Start a command on the host and wait until it has said that it is there."""
    process = user.start("run", "-v", *words)
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_an_interrupt_cancels_the_job(user: User, here: Path) -> None:
    """Ctrl-C ends the command on the host, and `run` with 125."""
    with running(user, "--shell", "echo ready; exec sleep 1000") as process:
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 125 and "cancelled" in err
    assert {each["state"] for each in user.run("jobs", "ls", "--json").json["jobs"][:1]} == {"cancelled"}


def test_a_second_interrupt_leaves_the_job_to_its_host(user: User, here: Path) -> None:
    """Ctrl-C again returns at once with 130, and the job goes on unless the second one came too late for that."""
    with running(user, "--shell", "trap '' TERM; echo ready; exec sleep 1000") as process:
        process.send_signal(signal.SIGINT)
        assert any("Ctrl-C again within a second" in line for line in iter(process.stderr.readline, ""))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    job = user.run("jobs", "ls", "--json").json["jobs"][0]
    assert (job["state"] == "running" and "to its host" in err) or "is being cancelled" in err, (job, err)
    user.run("jobs", "cancel", job["id"])


def test_a_reader_that_goes_away_ends_the_job(user: User, here: Path) -> None:
    """`run … | head -1` ends the command there, as a pipe does here."""
    with running(user, "--shell", "echo ready; while :; do echo more; sleep 0.05; done") as process:
        process.stdout.close()
        process.stdout = None
        process.communicate(timeout=SECONDS)
    until(lambda: user.run("jobs", "ls", "--json").json["jobs"][0]["state"] == "cancelled")


# From Python


def test_a_host_runs_commands_from_python(user: User, here: Path, host: Served, monkeypatch: Any) -> None:
    """`Host(url).run([...])` gives the exit code, both streams and the outputs; what was not run is an exception."""
    monkeypatch.setenv("DELTASYNC_HOME", user.environment["DELTASYNC_HOME"])
    with Host(host.url) as there:
        done = there.run(["sh", "-c", "cat {in:a.txt}; cp {in:b.txt} {out:c.txt}; echo e >&2"], folder=here)
        assert (done.exit_code, done.stdout, done.stderr) == (0, b"alpha\n", b"e\n")
        assert done.outputs == [here / "c.txt"] and (here / "c.txt").read_text() == "beta\n"
        assert there.run(["sh", "-c", "exit 9"], folder=here).exit_code == 9
        with pytest.raises(PlanRefused):
            there.run(["cat", "{in:none}"], folder=here)
        with pytest.raises(JobLost, match="no-such-command"):
            there.run(["no-such-command"], folder=here)


def test_python_keeps_the_end_of_what_a_command_says(user: User, here: Path, host: Served, monkeypatch: Any) -> None:
    """The result has no more of a stream than was to be kept, and says how much it lacks; who asks hears all of it."""
    monkeypatch.setenv("DELTASYNC_HOME", user.environment["DELTASYNC_HOME"])
    said, heard = b"".join(b"%d\n" % number for number in range(500_000)), io.BytesIO()
    with Host(host.url) as there:
        done = there.run(["sh", "-c", "seq 0 499999; echo err >&2"], folder=here, stdout=heard.write, keep_bytes=1000)
    assert heard.getvalue() == said
    assert (done.stdout, done.stdout_cut_bytes) == (said[-1000:], len(said) - 1000)
    assert (done.stderr, done.stderr_cut_bytes) == (b"err\n", 0)


@pytest.mark.parametrize("keep_bytes", [0, 1, 1000])
def test_the_end_of_a_stream_is_all_that_is_held(keep_bytes: int) -> None:
    """However long a stream is, no more than twice what is to be kept lies in memory."""
    tail = Tail(keep_bytes)
    for number in range(10_000):
        tail.add(b"%04d" % number)
        assert sys.getsizeof(tail._kept) <= 2 * keep_bytes + 1000
    assert tail.content() == b"".join(b"%04d" % number for number in range(10_000))[40_000 - keep_bytes :]
    assert tail.cut_bytes == 40_000 - keep_bytes


def test_the_program_starts_without_what_runs_commands() -> None:
    """`import deltasync` and `--version` import neither the transport nor anything of jobs."""
    code = "import sys, deltasync.cli.main; print(sorted(m for m in sys.modules if 'job' in m or m == 'requests'))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"[]\n"
