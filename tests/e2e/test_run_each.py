"""`deltasync run --each`: one command for each of many files, in as many jobs as the host has room for."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import Served, serving, until
from user import SECONDS, Done, User

COPY = ("cp", "{}", "{out}")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One host for all tests, with three slots, that keeps nothing of the past."""
    data = tmp_path_factory.mktemp("host") / "data"
    with serving(data, "--run-without-token", "--slots", "3", "--keep-sequences", "1") as served:
        yield served


@pytest.fixture
def user(tmp_path: Path, host: Served) -> User:
    """A user whose commands run on that host."""
    made = User(tmp_path / "home")
    made.environment |= {"DELTASYNC_ON": host.url, "DELTASYNC_SETTLE": "0"}
    return made


@pytest.fixture
def here(user: User) -> Path:
    """The user's folder, with four files to work on."""
    folder = user.home / "work"
    (folder / "media/deep").mkdir(parents=True)
    for name in ("a", "b c", "d"):
        (folder / f"media/{name}.jpg").write_text(f"{name}\n")
    (folder / "media/deep/e.jpg").write_text("e\n")
    (folder / "media/.hidden.jpg").write_text("hidden\n")
    (folder / "media/note.txt").write_text("a note\n")
    return folder


def each(user: User, here: Path, *words: str) -> Done:
    """Run a template on the host, from the user's folder."""
    return user.run("run", "--each", *words, cwd=here)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_each_file_becomes_one_of_the_same_name(user: User, here: Path) -> None:
    """Every file that fits, below any folder, has a command of its own, and its output is in the folder for them."""
    done = each(user, here, "media/**/*.jpg", "--out-dir", "made/here", "--json", "--", *COPY)
    assert done.code == 0, done.err
    assert contents(here / "made/here") == {"a.jpg": "a\n", "b c.jpg": "b c\n", "d.jpg": "d\n", "e.jpg": "e\n"}
    assert (done.json["files"], done.json["done"], done.json["failed"]) == (4, 4, [])


def test_the_parts_of_a_name_make_the_output(user: User, here: Path) -> None:
    """{stem}, {name} and {ext} stand anywhere; the last word is the output also where one is here already."""
    (here / "out").mkdir()
    (here / "out/a.jpg.txt").write_text("of an earlier time")
    done = each(user, here, "media/*.jpg", "--", "cp", "{}", "out/{stem}.{ext}.txt")
    assert done.code == 0, done.err
    assert contents(here / "out") == {"a.jpg.txt": "a\n", "b c.jpg.txt": "b c\n", "d.jpg.txt": "d\n"}
    done = each(
        user, here, "media/d.jpg", "--out-dir", "more", "--", "sh", "-c", "cp {} {out}; echo {name} {stem} {ext}"
    )
    assert (done.code, done.out) == (0, "d.jpg: d.jpg d jpg\n")
    assert contents(here / "more") == {"d.jpg": "d\n"}


def test_lines_stand_behind_the_name_of_their_file(user: User, here: Path) -> None:
    """What commands say is told in whole lines, also the last, with the file's name in front; with --raw as it is."""
    script = "printf one; printf 'more\\nlast'; echo bad >&2"
    done = each(user, here, "media/[ab]*.jpg", "--", "sh", "-c", script, "{}")
    lines = [f"{name}: {text}" for name in ("a.jpg", "b c.jpg") for text in ("last", "onemore")]
    assert sorted(done.out.splitlines()) == lines
    assert sorted(done.err.splitlines()) == ["a.jpg: bad", "b c.jpg: bad"]
    assert each(user, here, "media/a.jpg", "--raw", "--", "sh", "-c", script, "{}").out == "onemore\nlast"


def test_all_inputs_go_in_one_push(user: User, here: Path, host: Served) -> None:
    """Four files, and what all of them need, are one sequence of the private workspace."""
    done = each(user, here, "media/**/*.jpg", "--", "cat", "{}", "media/note.txt")
    assert done.code == 0 and done.out.count("a note") == 4, done.err
    client = json.loads(host.get("/api/v1/jobs").body)["jobs"][0]["client_id"]
    assert host.get(f"/api/v1/workspaces/inputs-{client[:8]}").json["sequence"] == 1


MEET = 'touch "$1/$$"; until test $(ls "$1" | wc -l) -ge 3; do sleep 0.01; done'
ALONE = 'mkdir "$1/one" || exit 9; rmdir "$1/one"'


def test_as_many_run_at_once_as_there_are_slots(user: User, here: Path, tmp_path: Path) -> None:
    """Three commands that wait for each other all end on a host with three slots."""
    there = f"{tmp_path}/meet/"
    Path(there).mkdir()
    words = ("--literal", MEET, "--literal", there, "--", "sh", "-c", MEET, "x", there, "{}")
    done = each(user, here, "media/*.jpg", *words)
    assert done.code == 0, done.err


def test_a_job_that_takes_all_the_memory_runs_alone(user: User, here: Path, tmp_path: Path) -> None:
    """With --memory no more jobs are there at once than the host's free memory holds, and at least one."""
    there = f"{tmp_path}/alone/"
    Path(there).mkdir()
    words = ("--memory", "900T", "--literal", ALONE, "--literal", there, "--", "sh", "-c", ALONE, "x", there, "{}")
    done = each(user, here, "media/**/*.jpg", *words)
    assert done.code == 0, done.err


def test_what_fails_is_told_at_the_end(user: User, here: Path) -> None:
    """A command that fails holds up no other; the code is 3, and its file, reason and job are told."""
    done = each(
        user,
        here,
        "media/*.jpg",
        "--out-dir",
        "out",
        "--json",
        "--",
        "sh",
        "-c",
        'grep -v a "$1" > "$2"',
        "x",
        "{}",
        "{out}",
    )
    assert done.code == 3 and set(contents(here / "out")) == {"b c.jpg", "d.jpg"}
    (failed,) = done.json["failed"]
    assert (failed["file"], failed["exit_code"], done.json["done"]) == ("media/a.jpg", 1, 2)
    assert "media/a.jpg" in done.err and failed["job"] in done.err


ONCE = 'mkdir "$2" 2>/dev/null && exit 5; cp "$1" "$3"'


def test_what_fails_is_tried_again(user: User, here: Path, tmp_path: Path) -> None:
    """With --retries a command that failed once runs once more, and its file is done."""
    marker = f"{tmp_path}/marker-{{stem}}"
    words = ("--literal", ONCE, "--", "sh", "-c", ONCE, "x", "{}", marker, "{out}")
    done = each(user, here, "media/*.jpg", "--out-dir", "out", "--retries", "1", *words)
    assert done.code == 0, done.err
    assert set(contents(here / "out")) == {"a.jpg", "b c.jpg", "d.jpg"}


def test_an_interrupted_batch_goes_on_where_it_was(user: User, here: Path) -> None:
    """--resume runs what failed, whose file changed or whose output is gone, and nothing else; another template all."""
    words = (
        "media/*.jpg",
        "--out-dir",
        "out",
        "--resume",
        "--json",
        "--",
        "sh",
        "-c",
        'grep -v x "$1" > "$2"',
        "x",
        "{}",
        "{out}",
    )
    (here / "media/d.jpg").write_text("x\n")
    assert each(user, here, *words).json["done"] == 2
    (here / "media/d.jpg").write_text("d\n")
    (here / "out/a.jpg").unlink()
    done = each(user, here, *words).json
    assert (done["done"], done["skipped"]) == (2, 1)
    (here / "media/a.jpg").write_text("another\n")
    done = each(user, here, *words).json
    assert (done["done"], done["skipped"]) == (1, 2)
    assert contents(here / "out") == {"a.jpg": "another\n", "b c.jpg": "b c\n", "d.jpg": "d\n"}
    assert each(user, here, *words, "more").json["done"] == 3


def test_files_that_change_in_place_are_done_once(user: User, here: Path) -> None:
    """With --in-place and --resume a file that was changed is left alone the next time."""
    words = ("media/*.jpg", "--in-place", "--resume", "--json", "--", "sh", "-c", 'echo more >> "$1"', "x", "{}")
    assert each(user, here, *words).json["done"] == 3
    assert each(user, here, *words).json["skipped"] == 3
    assert (here / "media/a.jpg").read_text() == "a\nmore\n"


def test_an_interrupt_ends_all_jobs(user: User, here: Path) -> None:
    """Ctrl-C cancels what runs and what waits, begins nothing else, and the code is 125."""
    process = user.start("run", "--each", f"{here}/media/*.jpg", "--", "sh", "-c", "echo ready; exec sleep 1000", "{}")
    try:
        assert "ready" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 125 and "cancelled" in err
    states = {each["state"] for each in user.run("jobs", "ls", "--json").json["jobs"] if "1000" in each["command"][2]}
    assert states == {"cancelled"}


WAIT = 'until test -e "$1"; do sleep 0.01; done; cat "$2"'


def test_what_others_drive_away_is_sent_again(user: User, here: Path, tmp_path: Path) -> None:
    """A batch whose inputs another command has driven from the host sends what is left, and ends well."""
    go = f"{tmp_path}/go"
    words = ("--literal", WAIT, "--literal", go, "--memory", "900T", "--", "sh", "-c", WAIT, "x", go, "{}")
    process = user.start("run", "--each", f"{here}/media/*.jpg", *words)
    try:
        until(lambda: any(each["state"] == "running" for each in user.run("jobs", "ls", "--json").json["jobs"]))
        assert user.run("run", "--", "cat", "media/note.txt", cwd=here).out == "a note\n"
        Path(go).touch()
        out, err = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, sorted(out.splitlines())) == (0, ["a.jpg: a", "b c.jpg: b c", "d.jpg: d"]), err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["none/*.jpg", "--", "cat", "{}"], "no file fits"),
        (["media/*.jpg", "--", "cat", "a.jpg"], "{}"),
        (["media/*.jpg", "--", "cp", "{}", "{out}"], "--out-dir"),
        (["media/*.jpg", "--", "cp", "{}", "one.jpg"], "both become"),
        (["media/*.jpg", "--detach", "--", "cat", "{}"], "--detach"),
        (["media/*.jpg", "--memory", "much", "--", "cat", "{}"], "--memory"),
    ],
)
def test_what_cannot_be_meant_is_refused(user: User, here: Path, words: list[str], said: str) -> None:
    """Before anything is sent, a batch that is not clear ends with 121 and one sentence."""
    done = each(user, here, *words)
    assert done.code == 121 and said in done.err and done.err.count("\n") == 1, done.err
