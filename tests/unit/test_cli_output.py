"""What the command line prints: units for people, JSON for programs, and the last line of defence."""

from __future__ import annotations

import errno
import json
import sqlite3

import pytest

from deltasync.cli import main, output
from deltasync.core.errors import AlreadyRunning, ContentMissing, Corrupt, NoSpace
from deltasync.core.names import without_tokens


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (999 * 1024, "999.0 KiB"),
        (1_048_576, "1.0 MiB"),
        (1 << 30, "1.0 GiB"),
        (5 << 50, "5120.0 TiB"),
    ],
)
def test_bytes_are_told_in_units(count: int, text: str) -> None:
    """Bytes are told in the unit that keeps the number short."""
    assert output.bytes_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.94, "9.9 s"), (75, "75 s"), (180, "3 min"), (7200, "2 h"), (9e5, "10 d")]
)
def test_times_are_told_in_units(seconds: float, text: str) -> None:
    """Times are told in the largest unit of which there are two."""
    assert output.seconds_text(seconds) == text


def test_counts_have_the_right_noun() -> None:
    """Counts have the right noun."""
    assert [output.count_text(n, "file") for n in (0, 1, 20_000)] == ["0 files", "1 file", "20,000 files"]
    assert output.count_text(2, "copy", "copies") == "2 copies"


def test_json_escapes_only_what_is_not_utf_8() -> None:
    """JSON carries every name as it is, and escapes one that is not UTF-8 as it is shown to people."""
    assert json.loads(output.as_json({"path": "é☃[/red]"})) == {"path": "é☃[/red]"}
    odd = {"problems": [{"path": "a\udcff", "reason": None, "size": 3}]}
    assert json.loads(output.as_json(odd)) == {"problems": [{"path": "a\\xff", "reason": None, "size": 3}]}


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        (f"GET /?t=dst_0123456789ab_{'0f' * 32} HTTP/1.1", "GET /?t=dst_0123456789ab_*** HTTP/1.1"),
        ("b'Bearer abc.DEF-1' and BEARER x", "b'Bearer *** and BEARER ***"),
        (f"root {'0f' * 32} of dst_0123456789ab", f"root {'0f' * 32} of dst_0123456789ab"),
    ],
)
def test_a_token_is_left_out_of_a_log(text: str, safe: str) -> None:
    """Tokens of a server, and whatever stands behind `Bearer`, are left out; digests and ids stay."""
    assert without_tokens(text) == safe


def test_json_does_nothing_to_a_terminal() -> None:
    """Characters that a terminal obeys are escaped in JSON, also those beyond 16 bits; its value stays the same."""
    odd = {"tree_path": "\x1b[2J\u009b31m\u202eé☃\U000e0001", "list": ["\x7f"]}
    text = output.as_json(odd)
    assert text.isprintable() and json.loads(text) == odd and "é☃" in text


def test_an_error_as_json_has_its_code_its_sentence_and_its_facts() -> None:
    """An error as JSON has its code, its sentence and its facts."""
    error = json.loads(output.error_json(ContentMissing(["ab"])))["error"]
    assert (error["code"], error["missing"]) == ("CONTENT_MISSING", ["ab"])
    assert error["detail"].startswith("the receiver lacks")


def test_a_full_disk_and_a_busy_or_damaged_database_are_known() -> None:
    """A full disk and a busy or damaged database, wherever they are met, are told as what they are."""
    assert isinstance(main._known(OSError(errno.ENOSPC, "No space left", "/x")), NoSpace)
    busy = sqlite3.OperationalError("database is locked")
    busy.sqlite_errorname = "SQLITE_BUSY"
    assert isinstance(main._known(busy), AlreadyRunning)
    assert isinstance(main._known(sqlite3.DatabaseError("malformed")), Corrupt)
    refused = main._known(OSError(errno.EIO, "bad", "/data/x"))
    assert refused and refused.sentence.startswith("the system refused at /data/x: Input/output error; when")
    assert main._known(OSError(errno.ENOTEMPTY, "our own mistake")) is None


def test_quiet_prints_errors_alone_and_json_nothing_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    """-q prints errors alone, --json nothing for people, -v more; names are safe in all of them."""
    output.Output(quiet=True).say("a")
    output.Output(quiet=True).note("b")
    output.Output(json=True).say("c")
    output.Output().detail("d")
    assert capsys.readouterr() == ("", "")
    output.Output(verbose=True).detail("e\x1b")
    output.Output(quiet=True).warn("f\x1b")
    output.Output(json=True).event("line", '{"g": 1}')
    output.Output().event("h\n", "{}")
    assert capsys.readouterr() == ('e\\x1b\n{"g": 1}\nh\\n\n', "deltasync: f\\x1b\n")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["-v"], True), (["push", "-qv"], True), (["--verbose"], True), (["-n", "vvv"], False), ([], False)],
)
def test_verbosity_is_found_in_a_line_that_nobody_understood(
    arguments: list[str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verbosity is found also in a command line that could not be parsed, and in its variable."""
    monkeypatch.delenv("DELTASYNC_VERBOSE", raising=False)
    assert main._is_asked(arguments, "verbose") is expected
    monkeypatch.setenv("DELTASYNC_VERBOSE", "1")
    assert main._is_asked(arguments, "verbose") is True
