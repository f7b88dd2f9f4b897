"""Why: what the next push would do with one path, said without doing anything."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from observed import look, look_until_quiet, seal, write

from deltasync.client.ignore import IgnoreRules
from deltasync.client.scan import ScanOptions
from deltasync.client.state import Problem, State
from deltasync.client.why import Verdict, Why, why
from deltasync.core.errors import NotFound


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[State]:
    monkeypatch.setenv("DELTASYNC_HOME", str(tmp_path / "home"))
    (tmp_path / "ws").mkdir()
    with State.open(tmp_path / "ws") as opened:
        yield opened


@pytest.fixture
def root(state: State) -> Path:
    """A workspace whose sealed tree is what is on disk, each file with content of its own."""
    write(state.root, {"a/x": "x content", "a/y": "y content", "a/deep/z": "z content", "b/w": "w", "empty/": ""})
    (state.root / "link").symlink_to("a/x")
    look_until_quiet(state)
    seal(state)
    state.db.execute("UPDATE head SET sealed_sequence = 1")
    return state.root


def ask(state: State, path: str, *, is_watched: bool = False, **options: Any) -> Why:
    rules = options.pop("ignore", None) or IgnoreRules(state.root)
    return why(state, path, ScanOptions(ignore=rules, **options), is_watched=lambda: is_watched)


def everything(state: State) -> list[Any]:
    """Return all that the state's database holds."""
    tables = [name for (name,) in state.db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    return [state.db.execute(f"SELECT * FROM {table}").fetchall() for table in sorted(tables)]


def test_each_change_of_a_file_has_its_verdict(state: State, root: Path) -> None:
    """Edited, touched, made executable, moved, copied, new, gone: each is told, and where it was."""
    write(root, {"a/x": "other", "new": "new content"})
    os.utime(root / "b/w", ns=(1, 1))
    (root / "a/deep/z").chmod(0o755)
    os.rename(root / "a/y", root / "b/moved")
    shutil.copy2(root / "a/deep/z", root / "copy")
    (root / "link").unlink()
    (root / "link").symlink_to("b/w")
    before = everything(state)
    found = {path: ask(state, path) for path in ("a/x", "new", "b/w", "a/deep/z", "a/y", "b/moved", "copy", "link")}
    assert {path: (each.verdict, each.source or each.to) for path, each in found.items()} == {
        "a/x": (Verdict.CHANGED, None),
        "new": (Verdict.NEW, None),
        "b/w": (Verdict.METADATA, None),
        "a/deep/z": (Verdict.METADATA, None),
        "a/y": (Verdict.GONE, "b/moved"),
        "b/moved": (Verdict.MOVED, "a/y"),
        "copy": (Verdict.COPY, "a/deep/z"),
        "link": (Verdict.CHANGED, None),
    }
    assert found["a/x"].reason == "5 bytes now, 9 bytes when it was sealed"
    assert found["b/w"].reason == "its time changed, its content did not"
    assert found["a/deep/z"].reason == "its executable bit changed, its content did not"
    assert found["link"].reason == "points to b/w now, and to a/x before"
    assert everything(state) == before


def test_only_the_file_in_question_is_read(state: State, root: Path) -> None:
    """Other files may have changed, by gigabytes: they are not read, and are no part of the answer."""
    write(root, {"a/x": "other"})
    (root / "a/secret").write_bytes(b"")
    with (root / "a/huge").open("wb") as file:
        file.truncate(1 << 42)  # reading it would take an hour
    assert ask(state, "a/x").verdict is Verdict.CHANGED
    assert ask(state, "a/y").verdict is Verdict.IN_STEP


def test_what_is_in_a_moved_folder_moved_with_it(state: State, root: Path) -> None:
    """A file says so, also when it was edited there; the folder says where it was, and what else changed in it."""
    os.rename(root / "a", root / "b/moved")
    write(root, {"b/moved/x": "edited", "b/moved/deep/new": "1"})
    kept = ask(state, "b/moved/y")
    assert (kept.verdict, kept.source, kept.reason) == (
        Verdict.MOVED,
        "a/y",
        "from a/y, with the folder that it is in",
    )
    edited = ask(state, "b/moved/x")
    assert (edited.verdict, edited.source) == (Verdict.CHANGED, "a/x")
    assert edited.reason == "6 bytes now, 9 bytes when it was sealed; moved from a/x with its folder"
    assert ask(state, "b/moved/deep/new").verdict is Verdict.NEW
    folder = ask(state, "b/moved")
    assert (folder.verdict, folder.source, folder.reason) == (Verdict.MOVED, "a", "from a; in it, 1 created, 1 updated")
    assert {each.path: each.reason for each in folder.inside} == {
        "b/moved/deep/new": "new",
        "b/moved/x": "content changed",
    }
    assert (ask(state, "a").to, ask(state, "a/deep/z").to) == ("b/moved", "b/moved/deep/z")


def test_a_copy_beside_the_moved_file_is_a_copy(state: State, root: Path) -> None:
    """Two files have the content of one that is gone: the one with its inode moved, wherever it is."""
    os.rename(root / "a/x", root / "b/x")
    shutil.copy2(root / "b/x", root / "z copy")
    assert (ask(state, "b/x").verdict, ask(state, "b/x").source) == (Verdict.MOVED, "a/x")
    assert (ask(state, "z copy").verdict, ask(state, "z copy").source) == (Verdict.COPY, "a/x")
    shutil.copytree(root / "b", root / "copies")
    assert {each.path: each.reason for each in ask(state, "copies").inside} == {
        "copies/w": "copy of b/w",
        "copies/x": "copy of a/x",
    }


def test_folders_are_summed_up(state: State, root: Path) -> None:
    """In step, new, changed, gone; the workspace itself is a folder like any other."""
    assert ask(state, "").verdict is ask(state, "a").verdict is ask(state, "empty").verdict is Verdict.IN_STEP
    write(root, {"n/1": "1", "n/2": "2", "a/x": "edited"})
    os.rename(root / "b/w", root / "n/w")
    shutil.rmtree(root / "empty")
    assert ask(state, "n").reason == "nothing was sealed under this path; in it, 2 created, 1 moved"
    assert (ask(state, "b").verdict, ask(state, "b").reason) == (Verdict.CHANGED, "1 moved out of it")
    assert ask(state, "empty").reason == "the next push deletes it on the server"
    top = ask(state, "")
    assert (top.verdict, top.reason) == (Verdict.CHANGED, "3 created, 1 updated, 1 moved, 1 deleted")
    assert {each.path: each.reason for each in top.inside} == {
        "n": "new",
        "n/1": "new",
        "n/2": "new",
        "n/w": "moved from b/w",
        "a/x": "content changed",
        "empty": "gone here",
    }


def test_many_paths_in_a_folder_are_counted(state: State, root: Path) -> None:
    """An answer explains the first hundred."""
    write(root, {f"many/{number:03}": str(number) for number in range(150)})
    found = ask(state, "many")
    assert (len(found.inside), found.more_inside) == (100, 50)


def test_a_change_of_kind_is_told(state: State, root: Path) -> None:
    """A file for a folder, a folder for a file, and what was in the folder."""
    shutil.rmtree(root / "a")
    write(root, {"a": "file"})
    (root / "b/w").unlink()
    write(root, {"b/w/in": "1"})
    assert ask(state, "a").reason == "was a directory and is a file now"
    assert ask(state, "b/w").reason == "was a file and is a directory now"
    assert ask(state, "a/x").verdict is Verdict.GONE


def test_ignored_paths_name_their_rule_and_what_becomes_of_what_was_sent(state: State, root: Path) -> None:
    """The rule, its file and its line; what was sealed before stays unless that is wanted otherwise."""
    write(root, {"a/.deltasyncignore": "# a comment\nx\n*.tmp\n"})
    look(state)
    new = ask(state, "a/n.tmp")
    assert (new.verdict, new.rule, new.source_file, new.line) == (Verdict.IGNORED, "*.tmp", "a/.deltasyncignore", 3)
    assert new.reason == "*.tmp in a/.deltasyncignore, line 3"
    assert ask(state, "a/x").reason == "x in a/.deltasyncignore, line 2; what was sent stays on the server"
    assert ask(state, "a/x", delete_excluded=True).reason.endswith("what was sent is deleted on the server")
    by_command = ask(state, "b/w", ignore=IgnoreRules(root, exclude=["b/"]))
    assert by_command.reason == "b/ in the settings; what was sent stays on the server"
    assert ask(state, ".deltasync/state.db").reason == ".deltasync/ is never carried"


def test_what_is_not_carried_says_what_it_is(state: State, root: Path) -> None:
    """FIFOs, what lies behind a link, odd names, links that leave: each has its sentence."""
    os.mkfifo(root / "a/pipe")
    (root / "out").symlink_to("../elsewhere")
    write(root, {"bad\nname": "1"})
    assert ask(state, "a/pipe").verdict is Verdict.NOT_CARRIED
    assert ask(state, "a/pipe").reason == "is a FIFO; only files, folders and links are carried"
    assert ask(state, "link/inside").reason == "link is a link, which is not followed"
    assert ask(state, "b/w/inside").reason == "b/w is no folder"
    assert ask(state, "out").verdict is Verdict.PROBLEM
    odd = ask(state, "bad\nname")
    assert odd.verdict is Verdict.PROBLEM and "\n" not in odd.path + odd.reason


def test_a_folder_counts_what_cannot_be_carried_in_it(state: State, root: Path) -> None:
    """Everything else in it is in step, and that is not the whole truth."""
    os.mkfifo(root / "a/deep/pipe")
    for path in ("a", "a/deep", ""):
        found = ask(state, path)
        assert (found.verdict, found.problems_inside) == (Verdict.IN_STEP, 1)
        assert found.reason.endswith("; 1 in it cannot be carried now")
    assert ask(state, "a/x").problems_inside == ask(state, "b").problems_inside == 0


def test_trouble_with_a_folder_is_told_of_what_is_in_it(state: State, root: Path) -> None:
    """A nested workspace, and a folder whose rules cannot be read, explain their files."""
    write(root, {"nested/.deltasync/state.db": "", "nested/f": "1"})
    nested = ask(state, "nested/f")
    assert nested.verdict is Verdict.PROBLEM and nested.reason.startswith("nested holds a nested workspace")
    os.mkfifo(root / "a/.deltasyncignore")
    assert ask(state, "a/new").reason.startswith("a cannot be read")


def test_a_file_that_changes_while_it_is_read_waits(state: State, root: Path) -> None:
    """What is read is not what is there afterwards: it is still being written, so much so far, since then."""
    large = root / "large"
    with large.open("wb") as file:
        file.truncate(2 << 30)  # so much that the writer gets its turn before the end
    before = large.stat()
    endless = "import os, sys\nwhile True: os.utime(sys.argv[1])"
    with subprocess.Popen([sys.executable, "-c", endless, large]) as writer:
        try:
            while large.stat().st_mtime_ns == before.st_mtime_ns:
                assert writer.poll() is None
            found = ask(state, "large")
        finally:
            writer.kill()
    assert (found.verdict, found.size) == (Verdict.WAITING, before.st_size)
    assert found.since is not None and found.since in found.reason


def test_what_a_watcher_waits_for_counts_while_it_runs(state: State, root: Path) -> None:
    """A file that the watcher saw being written waits; without a watcher the next push reads it."""
    write(root, {"a/x": "half"})
    with state.writing():
        state.set_problems([("a", Problem("a/x", "is still being written", True))])
    assert ask(state, "a/x", is_watched=True).verdict is Verdict.WAITING
    assert ask(state, "a/x").verdict is Verdict.CHANGED
    assert ask(state, "a/y", is_watched=True).verdict is Verdict.IN_STEP


def test_with_no_delete_what_is_gone_stays(state: State, root: Path) -> None:
    """The rule that push is given is the rule that counts."""
    (root / "a/x").unlink()
    assert ask(state, "a/x").reason == "the next push deletes it on the server"
    assert ask(state, "a/x", no_delete=True).reason == "is gone here and stays on the server (--no-delete)"


def test_a_deletion_that_the_guard_stops_says_so(state: State, root: Path) -> None:
    """The next push deletes nothing of a mass deletion: it stops, and the answer names the flag, as push does."""
    write(root, {f"many/{number}": f"{number}" for number in range(150)})
    look_until_quiet(state)
    seal(state)
    shutil.rmtree(root / "many")
    guard = (
        "the next push stops: it would delete 151 of 160 entries on the server; "
        "if that is meant, push with --allow-mass-delete"
    )
    assert ask(state, "many/7").reason == guard
    assert ask(state, "").reason.startswith("1 deleted") and ask(state, "").reason.endswith(f"; {guard}")
    assert ask(state, "a/x").verdict is Verdict.IN_STEP


def test_a_path_that_never_was_is_an_error(state: State, root: Path) -> None:
    """Neither here nor sealed: there is nothing to explain."""
    with pytest.raises(NotFound, match="there is no a/nothing here, and none was sealed"):
        ask(state, "a/nothing")


def test_a_workspace_that_was_never_looked_at_is_all_new(state: State) -> None:
    """Before the first push everything is new, however deep; an empty one has nothing to send."""
    assert ask(state, "").reason == "nothing is here, and nothing was sealed"
    write(state.root, {"d/e/f": "1"})
    assert ask(state, "d/e/f").verdict is ask(state, "d").verdict is Verdict.NEW
    assert ask(state, "").reason == "3 created"
