"""What the words of a command are (spec J-1 to J-19); the cases are spec/vectors/argv.json."""

from __future__ import annotations

import json
import posixpath
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltasync.core.argv import Found, Kind, Piece, Plan, Role, Said, pattern_of, plan, plan_lines, plan_values
from deltasync.core.errors import UsageError

VECTORS = json.loads((Path(__file__).parents[2] / "spec/vectors/argv.json").read_text())
CWD = VECTORS["cwd"]
THERE = {path.rstrip("/"): Kind.DIRECTORY if path.endswith("/") else Kind.FILE for path in VECTORS["there"]}
THERE |= dict.fromkeys(VECTORS["others"], Kind.OTHER)
FOLDERS = {"/", CWD, *(path for path, kind in THERE.items() if kind is Kind.DIRECTORY)}
ROLES = {"in": Role.INPUT, "out": Role.OUTPUT, "list": Role.LIST, "in place": Role.IN_PLACE}


def look(text: str) -> Found:
    """Return what the vectors say of a path."""
    path = posixpath.normpath(posixpath.join(CWD, text))
    folder, _, name = path.rpartition("/")
    pattern = None if path in THERE else pattern_of(name)
    matches = sorted(
        each
        for each in THERE
        if pattern and each.rpartition("/")[0] == folder and pattern.match(each.rpartition("/")[2])
    )
    kind = Kind.DIRECTORY if path in FOLDERS else THERE.get(path, Kind.ABSENT)
    return Found(path, kind, has_parent=(folder or "/") in FOLDERS, matches=tuple(matches))


def said(case: dict[str, Any]) -> Said:
    given = case.get("said", {})
    named = (frozenset(given.get(name, ())) for name in ("inputs", "outputs", "literals"))
    return Said(*named, is_in_place=given.get("in_place", False))


def shape(piece: Piece) -> Any:
    if piece.role is Role.LITERAL:
        return piece.text
    return {next(word for word, role in ROLES.items() if role is piece.role): piece.path}


def shapes(found: Plan) -> list[Any]:
    words = [[shape(piece) for piece in word.pieces] for word in found.words]
    return [word[0] if len(word) == 1 else word for word in words]


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: case["name"])
def test_words_are_what_the_vectors_say(case: dict[str, Any]) -> None:
    """Every case of spec/vectors/argv.json gives its words, inputs and outputs, or its refusal."""
    if "refused" in case:
        with pytest.raises(UsageError) as refused:
            plan(case["argv"], look, said(case))
        assert case["refused"] in refused.value.sentence
        return
    found = plan(case["argv"], look, said(case))
    assert shapes(found) == case["words"]
    for name in ("inputs", "outputs", "in_place"):
        if name in case:
            assert list(getattr(found, name)) == case[name]


@given(st.lists(st.text(max_size=12), min_size=1, max_size=6))
def test_what_is_no_path_reaches_the_command_byte_for_byte(words: list[str]) -> None:
    """Where nothing is here, and nothing is said, every word stays as it is."""

    def nothing(text: str) -> Found:
        return Found(text, Kind.ABSENT, has_parent=False)

    try:
        found = plan(["tool", *words], nothing)
    except UsageError:
        assert {"-i", "-o", "--in", "--out", "--input", "--output"} & {word.partition("=")[0] for word in words} or any(
            "{in:" in word for word in words
        )
    else:
        if not found.outputs:
            assert found.translated(lambda piece: "?") == ["tool", *words]
        assert ["".join(piece.text for piece in word.pieces) for word in found.words] == ["tool", *words]


@given(
    st.lists(st.sampled_from([*"=:,;@[]'\" ab/.", "/a/b", "/a/bc", "a.mov", "media/a.mov"]), max_size=14).map("".join)
)
def test_a_translated_word_differs_in_whole_paths_alone(text: str) -> None:
    """Whatever is around a path stays, and only what is here is translated."""
    try:
        found = plan(["tool", "--", text], look)
    except UsageError:
        return
    for piece in found.words[2].pieces:
        if piece.role is Role.INPUT:
            assert look(piece.text).kind in (Kind.FILE, Kind.DIRECTORY) or look(piece.text).matches
    assert found.words[2].text == text


def test_lines_of_lists_and_playlists_are_translated() -> None:
    """A line is a path, `file 'PATH'` or `FileN=PATH`; comments and unknown names stay, and so do line ends."""
    content = "#EXTM3U\na.mov\r\nfile 'media/a.mov'\nFile1=/data/cube.cube\nTitle1=x\ngone.mov\n\nb.png"
    pieces = plan_lines(content, look)
    assert "".join(piece.text for piece in pieces) == content
    inputs = [piece.path for piece in pieces if piece.role is Role.INPUT]
    assert inputs == ["/home/u/a.mov", "/home/u/media/a.mov", "/data/cube.cube", "/home/u/b.png"]


def test_values_of_variables_are_inputs_where_something_is_there() -> None:
    """`--env NAME=PATH` is translated, any other value stays."""
    assert plan_values(["/data", "1", "gone"], look) == (
        Piece(Role.INPUT, "/data", "/data"),
        Piece(Role.LITERAL, "1"),
        Piece(Role.LITERAL, "gone"),
    )


@pytest.mark.parametrize(
    ("name", "yes", "no"),
    [("f%04d.png", "f0001.png", "f001.png"), ("%d", "12", "a"), ("*.p?g", "a.png", "a.jpeg"), ("[ab].x", "a.x", "c.x")],
)
def test_patterns_match_as_programs_match_them(name: str, yes: str, no: str) -> None:
    """A series has at least so many digits; a glob is one of the shell's."""
    pattern = pattern_of(name)
    assert pattern is not None and pattern.match(yes) and not pattern.match(no)
    assert pattern_of("plain.png") is None


@pytest.mark.parametrize("name", ["%d%d%dx", "%d1%d1%d", "%099999999d.png"])
def test_a_pattern_that_would_take_time_to_match_is_refused(name: str) -> None:
    """Two series in a name at most, of less than a thousand digits: what matches them runs on the host as well."""
    with pytest.raises(UsageError, match="series"):
        pattern_of(name)


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["sh", "-c", "sort > new.txt"], "what sh runs; a redirect in it is text"),
        (["bash", "-c", "sort a.mov > new.txt"], "a path inside it is here; a redirect in it is text"),
        (["tool", "echo 1 > new.txt"], "it has signs of a shell, and is no path; a redirect in it is text"),
    ],
)
def test_a_redirect_is_explained(argv: list[str], why: str) -> None:
    """Why what stands behind > is no output is told with the word."""
    assert plan(argv, look).words[-1].why == why
