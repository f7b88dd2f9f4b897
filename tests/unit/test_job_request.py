"""What the host is asked: each path as its place, each other word byte for byte."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from deltasync.client import job_request
from deltasync.client.inputs import Need
from deltasync.client.job_request import Asked, Draft, drafted
from deltasync.core.argv import Said
from deltasync.core.errors import UsageError
from deltasync.core.jobs import JobRequest, Output, Word


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    for name in ("a.txt", "b.txt", "f_0001.png", "f_0002.png", "sub/c.txt"):
        (tmp_path / name).write_text(name)
    return tmp_path


def draft(here: Path, *argv: str, said: Said | None = None, **environment: str) -> Draft:
    return drafted(Asked(argv, said or Said(), environment), str(here))


def asked(found: Draft) -> JobRequest:
    return found.request("0" * 32, "a" * 32, [])


def filled(word: Word) -> bytes:
    """Return a word as the host makes it."""
    return b"".join(piece.filled(b"IN", b"OUT") for piece in word)


def test_paths_become_places_and_text_stays(here: Path) -> None:
    """Inputs and outputs lie at their absolute paths below two folders; bytes that are no UTF-8 come as they are."""
    found = draft(here, "tool", "-v", "by\udcfftes", "", "./sub/../a.txt", "--mode=x:sub/c.txt", "out.txt")
    words = [filled(word) for word in asked(found).argv]
    top = str(here).encode()
    expected = [b"tool", b"-v", b"by\xfftes", b"", b"IN%b/a.txt", b"--mode=x:IN%b/sub/c.txt", b"OUT%b/out.txt"]
    assert words == [word.replace(b"%b", top) for word in expected]
    assert found.needs == (Need(f"{here}/a.txt"), Need(f"{here}/sub/c.txt"))
    assert found.outputs == (Output(place=f"{here}/out.txt"[1:]),)
    assert asked(found).argv[2][0].raw == base64.b64encode(b"by\xfftes").decode()


def test_a_slash_behind_a_folder_stays_and_says_that_an_output_is_one(here: Path) -> None:
    """`sub/` is not `sub` to every program; an output that ends so, or is a folder here, is a folder there."""
    said = Said(inputs=frozenset({"sub/"}), outputs=frozenset({"made/", "sub"}))
    found = draft(here, "tool", "sub/", "made/", "sub", said=said)
    words = [filled(word).decode() for word in asked(found).argv]
    assert words[1:] == [f"IN{here}/sub/", f"OUT{here}/made/", f"OUT{here}/sub"]
    assert {(each.place.rpartition("/")[2], each.is_folder) for each in found.outputs} == {
        ("made", True),
        ("sub", True),
    }


def test_a_pattern_is_one_word_and_all_its_files(here: Path) -> None:
    """The command gets the pattern, the host the files that match; an output's pattern is matched there."""
    found = draft(here, "tool", "-i", "f_%04d.png", "-o", "g_%04d.png")
    assert [Path(need.path).name for need in found.needs] == ["f_0001.png", "f_0002.png"]
    assert filled(asked(found).argv[2]).decode() == f"IN{here}/f_%04d.png"
    assert [(each.place.rpartition("/")[2], each.is_pattern) for each in found.outputs] == [("g_%04d.png", True)]


def test_a_list_is_made_there_line_by_line(here: Path) -> None:
    """Each line keeps its end and its quotes, paths in it are places, and the list itself is not sent."""
    content = b"# a.txt\nfile 'sub/c.txt'\r\nb.txt\nnone.txt\n\xff\nd\xe2\x80\xa8e.txt\nlast"
    (here / "list").write_bytes(content)
    (here / "d\u2028e.txt").write_text("one name, not two lines")
    found = draft(here, "tool", "@list")
    (made,) = asked(found).lists
    top = str(here).encode()
    lines = [filled(line) for line in made.lines]
    expected = content
    for name in (b"sub/c.txt", b"b.txt", b"d\xe2\x80\xa8e.txt"):
        expected = expected.replace(name, b"IN" + top + b"/" + name)
    assert b"".join(lines) == expected
    assert all(line.endswith(b"\n") and line.count(b"\n") == 1 for line in lines[:-1])
    assert {Path(need.path).name for need in found.needs} == {"b.txt", "c.txt", "d\u2028e.txt"}
    assert filled(asked(found).argv[1]).decode() == f"@IN{here}/list"


def test_a_list_that_is_too_large_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list is read into memory; one beyond the limit says how to send it as it is, which works."""
    monkeypatch.setattr(job_request, "LIST_BYTES_MAX", 10)
    (here / "list").write_text("a.txt\n" * 10)
    with pytest.raises(UsageError, match=r"@\{in:"):
        draft(here, "tool", "@list")
    assert draft(here, "tool", "@{in:list}").needs == (Need(f"{here}/list"),)


def test_a_variable_with_a_path_is_an_input(here: Path) -> None:
    """The value of a variable that is here is sent and leads there; others are text."""
    found = draft(here, "tool", FILE="a.txt", WORD="a.txt b")
    values = {each.name: filled(each.value).decode() for each in asked(found).environment}
    assert values == {"FILE": f"IN{here}/a.txt", "WORD": "a.txt b"}
    assert found.needs == (Need(f"{here}/a.txt"),)


def test_in_place_is_for_inputs_and_not_for_lists(here: Path) -> None:
    """With --in-place what the command reads may change, but for a list and what it names."""
    (here / "list").write_text("b.txt\n")
    found = draft(here, "tool", "a.txt", "@list", said=Said(is_in_place=True))
    assert found.needs == (Need(f"{here}/a.txt", True), Need(f"{here}/b.txt"))


def test_a_place_that_cannot_be_carried_is_refused(here: Path) -> None:
    """An output whose name cannot be carried is refused when the request is drafted."""
    with pytest.raises(UsageError, match="cannot be carried"):
        draft(here, "tool", "{out:new\nline}")


@pytest.mark.parametrize("value", ["", ".", "./", "8", "https://host/a.txt"])
def test_a_variable_that_can_be_no_path_is_text(here: Path, value: str) -> None:
    """Also where something of that name is here: nothing is sent for it, least of all the whole folder."""
    (here / "8").write_text("x")
    draft = drafted(Asked(["env"], environment={"NAME": value}), str(here))
    assert draft.needs == ()


def test_what_a_pattern_stands_for_may_change_in_place(here: Path) -> None:
    """A pattern that no shell has expanded names files that come home when the command changed them."""
    found = draft(here, "mogrify", "f_*.png", said=Said(is_in_place=True))
    assert found.needs == (Need(f"{here}/f_0001.png", True), Need(f"{here}/f_0002.png", True))


@pytest.mark.parametrize("name", ["clip [1].mp4", "what?.txt", "a*b"])
def test_an_output_in_a_word_is_called_what_it_is_called(here: Path, name: str) -> None:
    """Brackets and stars in a word of the command are letters of a name; beside the words they are a glob."""
    for words in (["tool", "-o", name], ["tool", f"{{out:{name}}}"], ["ffmpeg", "-i", "a.txt", name]):
        assert draft(here, *words).outputs == (Output(place=f"{here}/{name}"[1:]),)
    beside = Said(outputs=frozenset({name}))
    assert draft(here, "tool", said=beside).outputs == (Output(place=f"{here}/{name}"[1:], is_pattern=True),)
    assert draft(here, "tool", name, said=beside).outputs == (Output(place=f"{here}/{name}"[1:]),)
    (here / name).write_text("here")
    assert draft(here, "tool", said=beside).outputs == (Output(place=f"{here}/{name}"[1:]),)
