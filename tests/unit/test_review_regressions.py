"""Promises that a review found broken: each test names one, and fails where it is broken again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import folders
import pytest
from desk import Desk
from serving import Served, serving, until

from deltasync.core.errors import WorkspaceCopied
from deltasync.core.hashing import digest_of


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """A running server."""
    with serving(tmp_path / "data") as running:
        yield running


def tree_of(served: Served, workspace: str) -> dict[str, bytes]:
    """The files of a plain tree by name."""
    return {path.name: path.read_bytes() for path in (served.data / "workspaces" / workspace / "tree").iterdir()}


def test_two_folders_of_one_name_never_replace_each_other(served: Served, tmp_path: Path) -> None:
    """Of two folders of one client with one name the second is refused, until it is to take over; then the first."""
    first, second = Desk(tmp_path / "one", served.url), Desk(tmp_path / "two", served.url)
    for desk in (first, second):
        folders.write(desk.root, "config", desk.root.name)
    first.push(workspace="media")
    with pytest.raises(WorkspaceCopied, match="--workspace NAME"):
        second.push(workspace="media")
    assert tree_of(served, "media") == {"config": b"one"}
    second.push(workspace="media", take_over=True)
    assert tree_of(served, "media") == {"config": b"two"}
    with pytest.raises(WorkspaceCopied):
        first.push()
    assert tree_of(served, "media") == {"config": b"two"}


def test_a_folder_that_moved_or_lost_its_state_goes_on(served: Served, tmp_path: Path) -> None:
    """A claim binds nobody to a place: the folder may move, and its state may be lost."""
    desk = Desk(tmp_path / "media", served.url)
    folders.write(desk.root, "f", "1")
    desk.push()
    os.rename(desk.root, tmp_path / "moved")
    moved = Desk(tmp_path / "moved", served.url)
    folders.write(moved.root, "g", "2")
    moved.push()
    (moved.root / ".deltasync/state.db").unlink()
    folders.write(moved.root, "h", "3")
    moved.push(workspace="media")
    assert tree_of(served, "media") == {"f": b"1", "g": b"2", "h": b"3"}


@pytest.mark.parametrize("is_folder", [False, True])
def test_no_delete_never_deletes_what_an_earlier_look_missed(served: Served, tmp_path: Path, is_folder: bool) -> None:
    """What a rehearsal recorded as gone or moved stays on the server when the push that follows may not delete."""
    desk = Desk(tmp_path / "media", served.url)
    folders.write(desk.root, "d/gone" if is_folder else "gone", "1")
    folders.write(desk.root, "stays", "2")
    desk.push()
    before = tree_of(served, "media") if not is_folder else {}
    os.rename(desk.root / ("d" if is_folder else "gone"), desk.root / "renamed")
    desk.push(dry_run=True)
    desk.push(no_delete=True)
    tree = served.data / "workspaces/media/tree"
    assert (tree / ("d/gone" if is_folder else "gone")).read_bytes() == b"1"
    assert (tree / ("renamed/gone" if is_folder else "renamed")).read_bytes() == b"1"
    assert before.keys() <= {path.name for path in tree.iterdir()}
    assert desk.push(no_delete=True).bundles == 0


def test_an_ignored_file_that_is_deleted_here_stays_there(served: Served, tmp_path: Path) -> None:
    """What was ignored later is deleted on the server only with --delete-excluded, also once it is gone here."""
    desk = Desk(tmp_path / "media", served.url)
    for path in ("a.bin", "build/b", "stays"):
        folders.write(desk.root, path, "1")
    desk.push()
    folders.write(desk.root, ".deltasyncignore", "*.bin\nbuild\n")
    desk.push()
    (desk.root / "a.bin").unlink()
    (desk.root / "build/b").unlink()
    (desk.root / "build").rmdir()
    desk.push()
    tree = served.data / "workspaces/media/tree"
    assert (tree / "a.bin").is_file() and (tree / "build/b").is_file()
    desk.scan_options = {"delete_excluded": True}
    desk.push()
    assert {path.name for path in tree.iterdir()} == {".deltasyncignore", "stays"}


def test_a_push_that_returns_left_a_whole_tree(served: Served, tmp_path: Path) -> None:
    """A blob that the server has lost without knowing is sent again by the push that needs it, not by the next one."""
    desk = Desk(tmp_path / "media", served.url)
    content = os.urandom(1000)
    folders.write(desk.root, "x", content)
    desk.push()
    until(lambda: not any((served.data / "journal").iterdir()))
    name = digest_of(content).hex()
    (served.data / "cache" / name[:2] / name).unlink()
    folders.write(desk.root, "y", content)
    os.utime(desk.root / "y", (1, 1))
    desk.push()
    assert tree_of(served, "media")["y"] == content
