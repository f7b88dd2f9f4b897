"""The words of a command are looked up as the command itself would find them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from deltasync.client.looking import Looking
from deltasync.core.argv import Kind


@pytest.fixture
def here(tmp_path: Path) -> Path:
    for name in ("a.txt", "f_0001.png", "f_0002.png", "f_12.png", ".f_hidden.png", "x y.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/b.txt").write_text("b")
    return tmp_path


@pytest.mark.parametrize(
    ("word", "path", "kind"),
    [
        ("a.txt", "a.txt", Kind.FILE),
        ("./a.txt", "a.txt", Kind.FILE),
        ("sub/", "sub", Kind.DIRECTORY),
        ("sub/../a.txt", "a.txt", Kind.FILE),
        (".", "", Kind.DIRECTORY),
        ("x y.txt", "x y.txt", Kind.FILE),
        ("sub/none", "sub/none", Kind.ABSENT),
        ("a.txt/none", "a.txt/none", Kind.ABSENT),
        ("nul\0", "nul\0", Kind.ABSENT),
        ("n" * 300, "n" * 300, Kind.ABSENT),
    ],
)
def test_a_word_is_looked_up_in_the_folder_of_the_command(here: Path, word: str, path: str, kind: Kind) -> None:
    """Relative words, dots and slashes lead where they lead; what no file can be called is not here."""
    found = Looking(str(here))(word)
    assert (found.path, found.kind) == (str(here / path) if path else str(here), kind)


def test_dots_behind_a_link_lead_out_of_what_it_leads_to(here: Path) -> None:
    """`link/../b.txt` is beside the linked folder, not beside the link."""
    (here / "sub/deep").mkdir()
    (here / "link").symlink_to("sub/deep")
    found = Looking(str(here))("link/../b.txt")
    assert (found.path, found.kind) == (str(here / "sub/b.txt"), Kind.FILE)


def test_a_pipe_is_no_file_and_a_link_is_what_it_leads_to(here: Path) -> None:
    """Devices and pipes are told apart, links are followed, and one that leads nowhere is not here."""
    os.mkfifo(here / "pipe")
    (here / "to-file").symlink_to("a.txt")
    (here / "to-none").symlink_to("none")
    look = Looking(str(here))
    kinds = [look(word).kind for word in ("pipe", "/dev/null", "to-file", "to-none")]
    assert kinds == [Kind.OTHER, Kind.OTHER, Kind.FILE, Kind.ABSENT]


@pytest.mark.parametrize(
    ("word", "names"),
    [
        ("f_%04d.png", ["f_0001.png", "f_0002.png"]),
        ("f_%d.png", ["f_0001.png", "f_0002.png", "f_12.png"]),
        ("*.png", ["f_0001.png", "f_0002.png", "f_12.png"]),
        (".f*.png", [".f_hidden.png"]),
        ("s*", []),
        ("none/*.png", []),
        ("f_0001.png", []),
    ],
)
def test_a_pattern_stands_for_the_files_that_match(here: Path, word: str, names: list[str]) -> None:
    """A series and a glob find files of their folder in order, no folder, and no hidden file unless they begin so."""
    assert Looking(str(here))(word).matches == tuple(str(here / name) for name in names)


def test_a_word_of_a_list_is_found_beside_the_list_as_well(here: Path) -> None:
    """Where nothing is in the command's folder, what lies beside the list is meant; else the first."""
    (here / "sub/a.txt").write_text("other")
    look = Looking(str(here), near=str(here / "sub"))
    assert look("b.txt").path == str(here / "sub/b.txt")
    assert look("a.txt").path == str(here / "a.txt")
    assert look("none").path == str(here / "none")


def test_each_word_is_looked_up_once(here: Path) -> None:
    """What was found stays so while one command is planned."""
    look = Looking(str(here))
    assert look("a.txt").kind is Kind.FILE
    (here / "a.txt").unlink()
    assert look("a.txt").kind is Kind.FILE and look("./a.txt").kind is Kind.ABSENT
