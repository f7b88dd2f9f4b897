"""What a command prints: one JSON object, JSON lines, or text for people whose names are safe to show."""

from __future__ import annotations

import contextlib
import json as plain_json
import sys
from collections.abc import Mapping

import msgspec

from deltasync.core.errors import DeltasyncError
from deltasync.core.names import bytes_text as bytes_text
from deltasync.core.names import shown


def prepare() -> None:
    """Let no character stop the output: what the terminal's encoding lacks is escaped."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


class Output:
    """Where a command's words go: `answer` and `event` for programs, `say` for people, `warn` for both."""

    def __init__(self, *, json: bool = False, quiet: bool = False, verbose: bool = False) -> None:
        """Print JSON only, nothing but errors, or more than usual."""
        self.is_json, self.is_quiet, self.is_verbose = json, quiet, verbose

    def answer(self, content: object) -> None:
        """Print a command's one JSON object; text for people is left to `say`."""
        if self.is_json:
            _write(as_json(content))

    def event(self, line: str, json: str) -> None:
        """Print one thing that happened, at once: as JSON or as a line."""
        if self.is_json:
            _write(_harmless(json), flush=True)
        elif not self.is_quiet:
            _write(shown(line), flush=True)

    def say(self, line: str) -> None:
        """Print a line for people."""
        if not (self.is_json or self.is_quiet):
            _write(shown(line))

    def detail(self, line: str) -> None:
        """Print a line for people who asked for more."""
        if self.is_verbose:
            self.say(line)

    def warn(self, line: str) -> None:
        """Print a line on stderr, where it never mixes with what is read by a program."""
        complain(line)

    def note(self, line: str) -> None:
        """Print a line on stderr, unless only errors are wanted."""
        if not self.is_quiet:
            complain(line)


def complain(sentence: str) -> None:
    """Print one line on stderr."""
    print(f"deltasync: {shown(sentence)}", file=sys.stderr, flush=True)


def as_json(content: object) -> str:
    """Return content as one line of JSON; a name that is not UTF-8 is escaped as it is for people."""
    try:
        text = msgspec.json.encode(content).decode()
    except UnicodeEncodeError:
        text = msgspec.json.encode(_escaped(msgspec.to_builtins(content))).decode()
    return _harmless(text)


def error_json(error: DeltasyncError) -> str:
    """Return an error as JSON: its code, its sentence, and the facts beside them."""
    return as_json({"error": {**error.facts, "code": error.code, "detail": error.sentence}})


def seconds_text(seconds: float) -> str:
    """Return a time for people: `0.4 s`, `3 min`, `2 h`, `5 d`."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


def count_text(count: int, one: str, many: str = "") -> str:
    """Return a count with its noun: `1 file`, `20,000 files`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def _write(text: str, *, flush: bool = False) -> None:
    print(text, flush=flush)


def _harmless(text: str) -> str:
    """Return the same JSON without a character that a terminal obeys (spec H-143)."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else plain_json.dumps(each)[1:-1] for each in text)


def _escaped(content: object) -> object:
    if isinstance(content, str):
        return content if content.isascii() else shown(content)
    if isinstance(content, Mapping):
        return {_escaped(key): _escaped(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_escaped(each) for each in content]
    return content
