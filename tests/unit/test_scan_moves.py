"""Moved folders keep what is known of them; the renames say where the sealed tree has what moved."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from observed import check, limbo, look, look_until_quiet, operations, seal, write

from deltasync.client.state import State
from deltasync.core.names import parse_path
from deltasync.core.tree import walk


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[State]:
    monkeypatch.setenv("DELTASYNC_HOME", str(tmp_path / "home"))
    (tmp_path / "ws").mkdir()
    with State.open(tmp_path / "ws") as opened:
        yield opened


def begin(state: State, files: dict[str, str | bytes]) -> None:
    write(state.root, files)
    look_until_quiet(state)
    seal(state)


TREE: dict[str, str | bytes] = {"a/x/1": "1", "a/x/2": "2", "a/y/3": "3", "b/4": "4", "c/": ""}


def test_a_moved_folder_is_not_read_again(state: State) -> None:
    """A rename of a folder costs no hash and is one moved operation."""
    begin(state, TREE)
    os.rename(state.root / "a", state.root / "c/moved")
    report = look(state)
    assert (report.hashed_files, report.changed) == (0, True)
    check(state)
    assert state.renames() == {"c/moved": "a"}
    assert operations(state) == [("moved", "c/moved", "a")]


def test_what_changed_inside_a_moved_folder_is_read_alone(state: State) -> None:
    """A move with an edit, a new and a deleted file inside reads the edit and the new file."""
    begin(state, TREE)
    os.rename(state.root / "a", state.root / "z")
    write(state.root, {"z/x/1": "edited", "z/y/new": "new"})
    os.unlink(state.root / "z/x/2")
    assert look(state).hashed_files == 2
    check(state)
    assert state.renames()["z"] == "a"
    assert ("moved", "z", "a") in operations(state)


def test_the_old_place_may_be_met_first_or_last(state: State) -> None:
    """Whether the walk meets the old or the new place first does not matter."""
    begin(state, TREE)
    os.rename(state.root / "a/x", state.root / "c/x")  # the old place comes first
    os.rename(state.root / "b", state.root / "a/b")  # the new place comes first
    assert look(state).hashed_files == 0
    check(state)
    assert state.renames() == {"c/x": "a/x", "a/b": "b"}


def test_folders_may_be_swapped_and_shifted(state: State) -> None:
    """a and b swap, and c becomes d becomes e: no hash, one operation each (F30, F31)."""
    begin(state, {"a/1": "1", "b/2": "2", "c/3": "3", "d/4": "4"})
    root = state.root
    os.rename(root / "a", root / "t")
    os.rename(root / "b", root / "a")
    os.rename(root / "t", root / "b")
    os.rename(root / "d", root / "e")
    os.rename(root / "c", root / "d")
    assert look(state).hashed_files == 0
    check(state)
    assert state.renames() == {"a": "b", "b": "a", "d": "c", "e": "d"}
    assert [verb for verb, _, _ in operations(state)] == ["moved"] * 4


def test_files_may_be_swapped(state: State) -> None:
    """Two files that swap names are matched by their inodes."""
    begin(state, {"a": "1", "b": "22"})
    root = state.root
    os.rename(root / "a", root / "t")
    os.rename(root / "b", root / "a")
    os.rename(root / "t", root / "b")
    look(state)
    check(state)
    assert state.renames() == {"a": "b", "b": "a"}


def test_nested_moves_name_sealed_paths(state: State) -> None:
    """A folder that moved inside a folder that moved is named by its path in the sealed tree."""
    begin(state, TREE)
    root = state.root
    os.rename(root / "a/x", root / "a/w")
    os.rename(root / "a", root / "c/a")
    look(state)
    check(state)
    assert state.renames() == {"c/a": "a", "c/a/w": "a/x"}
    os.rename(root / "c/a/w", root / "w")
    look(state)
    check(state)
    assert state.renames() == {"c/a": "a", "w": "a/x"}


def test_a_parent_may_move_into_its_former_child(state: State) -> None:
    """a/b becomes b, then a becomes b/a: both are known again."""
    begin(state, {"a/b/1": "1", "a/2": "2"})
    root = state.root
    os.rename(root / "a/b", root / "b")
    os.rename(root / "a", root / "b/a")
    assert look(state).hashed_files == 0
    check(state)
    assert state.renames() == {"b": "a/b", "b/a": "a"}


def test_a_move_over_several_scans_is_one_rename(state: State) -> None:
    """Each scan sees one step; the sealed path stays, and moving back leaves nothing."""
    begin(state, TREE)
    root = state.root
    os.rename(root / "a", root / "one")
    look(state)
    os.rename(root / "one", root / "c/two")
    look(state)
    assert state.renames() == {"c/two": "a"}
    os.rename(root / "c/two", root / "a")
    look(state)
    assert state.renames() == {}
    assert not state.has_renames()
    check(state)


def test_a_folder_out_of_sight_for_a_scan_is_met_again(state: State, tmp_path: Path) -> None:
    """Moved out of the workspace and back in before anything is sealed: known, not read again."""
    begin(state, TREE)
    os.rename(state.root / "a", tmp_path / "out")
    look(state)
    assert limbo(state) == 1
    check(state)
    os.rename(tmp_path / "out", state.root / "b/in")
    assert look(state).hashed_files == 0
    check(state)
    assert state.renames() == {"b/in": "a"}


def test_sealing_forgets_renames(state: State, tmp_path: Path) -> None:
    """After sealing there is nothing to hint at, and nothing waits in limbo."""
    begin(state, TREE)
    os.rename(state.root / "a", state.root / "z")
    os.rename(state.root / "b", tmp_path / "gone")
    look(state)
    assert state.has_renames() and limbo(state) == 1
    seal(state)
    assert (state.renames(), limbo(state), state.has_renames()) == ({}, 0, False)
    os.rename(state.root / "z", state.root / "q")
    look(state)
    assert state.renames() == {"q": "z"}
    check(state)


def test_a_tree_that_is_again_the_sealed_one_needs_no_sealing_to_forget(state: State, tmp_path: Path) -> None:
    """A folder that came and went leaves no row behind although nothing is ever sealed."""
    begin(state, TREE)
    rows = state.db.execute("SELECT count(*) FROM directories").fetchone()
    write(state.root, {"tmp/deep/f": "x"})
    look(state)
    shutil.rmtree(state.root / "tmp")
    look(state)
    assert state.db.execute("SELECT count(*) FROM directories").fetchone() == rows
    check(state)


def test_moved_files_are_matched_by_inode(state: State) -> None:
    """A file that moved, or moved out of a folder that then disappeared, is named by its sealed path."""
    begin(state, {"a/x/one": "1", "a/x/two": "2", "b/three": "3", "k": "k"})
    root = state.root
    os.rename(root / "b/three", root / "three")
    os.rename(root / "a/x/one", root / "one")
    shutil.rmtree(root / "a")
    look(state)
    check(state)
    assert state.renames() == {"three": "b/three", "one": "a/x/one"}
    assert ("moved", "one", "a/x/one") in operations(state)


def test_an_inode_that_was_given_away_is_no_move(state: State) -> None:
    """A new folder that got the inode of a deleted one is new: nothing inside agrees."""
    begin(state, {"old/f": "old", "keep": "k"})
    inode = (state.root / "old").stat().st_ino
    shutil.rmtree(state.root / "old")
    write(state.root, {"new/g": "new"})
    state.db.execute("UPDATE directories SET inode = ? WHERE inode = ?", ((state.root / "new").stat().st_ino, inode))
    assert look(state).hashed_files == 1
    check(state)
    assert "new" not in state.renames()


def test_a_folder_made_anew_under_its_name_is_read(state: State) -> None:
    """rm -r and mkdir with other files: the old one waits to be met elsewhere, and may be."""
    begin(state, {"d/1": "1", "d/sub/2": "2"})
    root = state.root
    os.rename(root / "d", root / "former")
    write(root, {"d/1": "new"})
    os.rename(root / "former/sub", root / "d/sub")
    assert look(state).hashed_files == 1
    check(state)
    assert state.renames()["former"] == "d"


def test_moves_are_seen_by_partial_scans_too(state: State) -> None:
    """Only the new place is named: the old one is looked at as well, because the folder was taken from it."""
    begin(state, {"a/x/1": "1", "a/y": "2", "b/z": "3"})
    os.rename(state.root / "a/x", state.root / "b/x")
    assert look(state, {"b"}).hashed_files == 0
    check(state)
    assert state.renames() == {"b/x": "a/x"}


def test_a_case_only_rename_is_a_move(state: State) -> None:
    """Only the letter case of a name changes (F32)."""
    begin(state, {"Folder/f": "1", "file": "2"})
    os.rename(state.root / "Folder", state.root / "folder")
    os.rename(state.root / "file", state.root / "FILE")
    look(state)
    check(state)
    assert operations(state) == [("moved", "FILE", "file"), ("moved", "folder", "Folder")]


def test_a_link_at_the_old_place_is_not_followed(state: State) -> None:
    """mv a b; ln -s b a: the folder did move, although its old path still leads to it."""
    begin(state, {"a/x/1": "1", "a/f": "2"})
    os.rename(state.root / "a", state.root / "b")
    os.rename(state.root / "b/x", state.root / "x")
    (state.root / "b/x").symlink_to("../x")
    (state.root / "a").symlink_to("b")
    assert look(state).hashed_files == 0
    check(state)
    assert state.renames() == {"b": "a", "x": "a/x"}


@pytest.mark.parametrize(("name", "levels"), [("d", 120), ("n" * 60, 50)], ids=["too deep", "too long"])
def test_what_a_move_brings_beyond_the_limits_is_left_out(state: State, name: str, levels: int) -> None:
    """A directory moved so deep that paths below it pass P-6 or P-7: those are problems, the rest is carried."""
    chain = "/".join([name] * levels)
    write(state.root, {f"a/{chain}/f": "1", f"b/{chain}/g": "2"})
    look(state)
    descriptor = os.open(state.root / "b" / chain, os.O_RDONLY)
    os.rename(state.root / "a", "a", dst_dir_fd=descriptor)
    os.close(descriptor)
    report = look(state)
    paths = [path for path, _ in walk(report.root, state.load)]
    assert f"b/{chain}/g" in paths and f"b/{chain}/a/{name}" in paths
    assert all(parse_path(path) for path in paths)
    assert report.problems
    assert look(state).root == report.root
