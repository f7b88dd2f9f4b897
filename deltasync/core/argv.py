"""Which words of a command line are files: what a command reads and writes on another machine (spec J-1 to J-19).

A command's words are a list, never a line for a shell. What lies at a path is asked of `Look`, so that this module
touches no machine.
"""

from __future__ import annotations

import enum
import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from deltasync.core.errors import UsageError
from deltasync.core.names import shown

INPUT_FLAGS = frozenset({"-i", "--in", "--input"})
OUTPUT_FLAGS = frozenset({"-o", "--out", "--output"})
WRITES_LAST = frozenset({"convert", "ffmpeg", "magick"})
"""Programs whose last word is what they write, also where it is there already."""
SERIES_MAX = 2
"""Series in one name; to match more takes time that grows with each."""
SEPARATORS_MAX = 200
"""A word with more of them is searched for nothing: it holds a program or data."""
_SEPARATORS = frozenset("=:,;@|<>[]()'\" \t\n")
_NUMBER = re.compile(r"[-+]?(\d+([.:]\d+)*|\d*\.\d+|0x[0-9a-fA-F]+)(e[-+]?\d+)?[%a-zA-Z]?")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_EXTENSION = re.compile(r"[^/]\.[A-Za-z][A-Za-z0-9_]{0,11}$")
_MARK = re.compile(r"\{(in|out):([^{}]+)\}")
_SERIES = re.compile(r"%(0?\d*)d")
_GLOB = re.compile(r"[*?\[]")
_SHELL_SIGNS = re.compile(r"[><|;&$`]")
_RUNS_WORDS = (
    (re.compile(r"sh|bash|dash|zsh|python[\d.]*"), re.compile(r"-[A-Za-z]*c")),
    (re.compile(r"perl[\d.]*"), re.compile(r"-[A-Za-z]*[eE]")),
)
"""Programs that run a word of theirs, and the flag before it."""
_TAKE_A_WORD = frozenset({"-o", "+o", "-O", "+O", "-W", "-X", "-I"})
"""Flags of those, of which each takes the word behind it."""
_REDIRECTS = "a redirect in it is text"
_LINE = re.compile(r"(?P<before>\s*(?:file\s+|File\d+=)?(?P<quote>['\"]?))(?P<path>.*?)(?P<after>(?P=quote)\s*)")


class Kind(enum.Enum):
    """What lies at a path."""

    ABSENT = "absent"
    FILE = "file"
    DIRECTORY = "directory"
    OTHER = "other"
    """A device, a pipe, a socket: never sent, never brought home."""


class Found(NamedTuple):
    """What is known of a path as somebody typed it."""

    path: str
    """Absolute, without `.` and `..`."""
    kind: Kind
    has_parent: bool
    """Whether the folder that it would be in is there."""
    matches: tuple[str, ...] = ()
    """The files that a pattern in the last component stands for, absolute."""


Look = Callable[[str], Found]


class Role(enum.Enum):
    """What a piece of a word is to the command."""

    LITERAL = "literal"
    INPUT = "input"
    LIST = "list"
    """An input whose lines name inputs."""
    OUTPUT = "output"
    IN_PLACE = "in place"
    """An input that comes home when the command has changed it."""


class Piece(NamedTuple):
    """A part of a word: text, or a path to be translated."""

    role: Role
    text: str
    """As it was typed."""
    path: str = ""


class Word(NamedTuple):
    """One word of the command, and why it is what it is."""

    pieces: tuple[Piece, ...]
    why: str

    @property
    def text(self) -> str:
        """The word as it was typed, without marks."""
        return "".join(piece.text for piece in self.pieces)


@dataclass(frozen=True)
class Said:
    """What the user says of words, which goes before what they look like."""

    inputs: frozenset[str] = frozenset()
    outputs: frozenset[str] = frozenset()
    literals: frozenset[str] = frozenset()
    is_in_place: bool = False


@dataclass(frozen=True)
class Plan:
    """A command whose files are known."""

    words: tuple[Word, ...]
    inputs: tuple[str, ...]
    """Every file or folder that must be there, absolute, each once, in the order of the command."""
    outputs: tuple[str, ...]
    """Every path that may be written, absolute; the last component may be a pattern."""
    in_place: tuple[str, ...]
    """Those inputs that may be written too."""
    lists: tuple[str, ...]
    """Those inputs whose lines name inputs."""

    def translated(self, place: Callable[[Piece], str]) -> list[str]:
        """Return the command with every path in the place that it has on the host; text stays, byte for byte."""
        return [
            "".join(piece.text if piece.role is Role.LITERAL else place(piece) for piece in word.pieces)
            for word in self.words
        ]


def is_series(name: str) -> bool:
    """Tell whether a path's last component is a series (`%04d`), which the command itself fills in."""
    return _SERIES.search(name) is not None


def pattern_of(name: str) -> re.Pattern[str] | None:
    """Return what a series (`%04d`) or a glob in a path's last component matches; None where it is neither."""
    if is_series(name):
        if len(_SERIES.findall(name)) > SERIES_MAX or any(len(width) > 3 for width in _SERIES.findall(name)):
            raise UsageError(f"{shown(name)} has more than {SERIES_MAX} series like %04d, or one of a thousand digits")
        digits = (rf"\d{{{int(width)},}}" if width.strip("0") else r"\d+" for width in _SERIES.findall(name))
        texts = re.split(r"%0?\d*d", name)
        return re.compile("".join(re.escape(text) + next(digits, "") for text in texts) + r"\Z")
    return re.compile(fnmatch.translate(name)) if _GLOB.search(name) else None


def plan(argv: Sequence[str], look: Look, said: Said = Said()) -> Plan:
    """Find out what each word of a command is; raises UsageError with a word that is not clear, and what settles it."""
    if not argv:
        raise UsageError("there is no command; give it behind --")
    return _Planner(argv, look, said).run()


def plan_values(values: Iterable[str], look: Look) -> tuple[Piece, ...]:
    """Return a piece for each value of an environment variable: an input where it names something here.

    Empty ones, dots, numbers and addresses are none, whatever is here: nobody means the whole folder by them.
    """
    return tuple(
        (_may_be_path(value) and _whole(look(value), Role.INPUT, value)) or Piece(Role.LITERAL, value)
        for value in values
    )


def plan_lines(content: str, look: Look) -> tuple[Piece, ...]:
    """Return the pieces of a list of files or of a playlist: of each line, the path that it names, if that is here.

    Lines that begin with `#` are none. A line is a path, or `file 'PATH'`, or `FileN=PATH`, as players write them.
    """
    pieces: list[Piece] = []
    for line in re.findall(r"[^\n]*\n|[^\n]+", content):
        body = line.rstrip("\r\n")
        found = None if body.lstrip().startswith("#") else _LINE.fullmatch(body)
        piece = found and found["path"] and _whole(look(found["path"]), Role.INPUT, found["path"])
        if not (found and piece):
            pieces.append(Piece(Role.LITERAL, line))
            continue
        pieces += [Piece(Role.LITERAL, found["before"]), piece, Piece(Role.LITERAL, found["after"] + line[len(body) :])]
    return tuple(piece for piece in pieces if piece.text)


def _whole(found: Found, role: Role, text: str) -> Piece | None:
    return Piece(role, text, found.path) if found.kind in (Kind.FILE, Kind.DIRECTORY) else None


def _may_be_path(value: str) -> bool:
    return not (value.strip("./") == "" or _NUMBER.fullmatch(value) or _URL.match(value))


def _looks_like_path(text: str) -> bool:
    return ("/" in text and bool(text.strip("/"))) or bool(_EXTENSION.search(text))


def _is_flag(word: str) -> bool:
    return len(word) > 1 and word[0] == "-" and not _NUMBER.fullmatch(word)


def _without_folder(text: str, found: Found) -> str:
    folder = text.rstrip("/").rpartition("/")[0] or found.path.rpartition("/")[0]
    return f"{shown(text)}: there is no folder {shown(folder)} here; make it first"


def _unclear(word: str, why: str, *ways: str) -> UsageError:
    return UsageError(f"{shown(word)}: {why}; say " + " or ".join(f"{way} {shown(word)}" for way in ways))


@dataclass
class _Planner:
    """Goes through a command's words once, from the first to the last."""

    argv: Sequence[str]
    look: Look
    said: Said
    words: list[Word] = field(default_factory=list)

    def run(self) -> Plan:
        for number, text in enumerate(self.argv):
            self.words.append(self._marked(text) or self._said(text) or self._found(number, text))
        self._require_clear_end()
        pieces = [piece for word in self.words for piece in word.pieces]
        for name in (*self.said.inputs, *self.said.outputs):
            pieces += self._named_beside(name, {piece.path for piece in pieces})
        return Plan(
            tuple(self.words),
            _paths(pieces, self.look, Role.INPUT, Role.LIST, Role.IN_PLACE),
            _paths(pieces, None, Role.OUTPUT),
            _paths(pieces, None, Role.IN_PLACE),
            _paths(pieces, None, Role.LIST),
        )

    # What the user says

    def _marked(self, text: str) -> Word | None:
        """Read `{in:PATH}` and `{out:PATH}`, whatever is around them."""
        pieces, at = [], 0
        for mark in _MARK.finditer(text):
            pieces.append(Piece(Role.LITERAL, text[at : mark.start()]))
            pieces.append(self._input(mark[2]) if mark[1] == "in" else self._output(mark[2]))
            at = mark.end()
        if not at:
            return None
        pieces.append(Piece(Role.LITERAL, text[at:]))
        return Word(tuple(piece for piece in pieces if piece.text), "marked")

    def _said(self, text: str) -> Word | None:
        if text in self.said.literals:
            return Word((Piece(Role.LITERAL, text),), "--literal")
        if text in self.said.inputs:
            return Word((self._input(text),), "--in")
        if text in self.said.outputs:
            return Word((self._output(text, is_named=True),), "--out")
        return None

    def _named_beside(self, name: str, known: set[str]) -> Iterator[Piece]:
        """Yield what the user names and no word does."""
        piece = self._input(name) if name in self.said.inputs else self._output(name, is_named=True)
        if piece.path not in known:
            yield piece

    # What words look like

    def _found(self, number: int, text: str) -> Word:
        if number == 0:
            return self._command(text)
        before = self.argv[number - 1] if number > 1 else ""
        is_after_end = "--" in self.argv[1:number]
        if _is_flag(text) and not is_after_end:
            return self._flag(text)
        is_value = _is_flag(before) and not is_after_end and "=" not in before
        if is_value and before in INPUT_FLAGS:
            return self._after_input_flag(text, before)
        if is_value and before in OUTPUT_FLAGS:
            return self._literal_or(text, self._output, f"after {before}")
        return self._bare(number, text, is_value=is_value)

    def _command(self, text: str) -> Word:
        """Take the first word as it is, unless it names a program that is here and would not be there (spec J-3)."""
        if "/" in text and not text.startswith("/") and self.look(text).kind is Kind.FILE:
            raise UsageError(
                f"{shown(text)} is a program of this machine; {{in:{shown(text)}}} sends it, and its name alone finds "
                "one on the host"
            )
        return Word((Piece(Role.LITERAL, text),), "the command itself")

    def _literal_or(self, text: str, make: Callable[[str], Piece], why: str) -> Word:
        """Make a word of text that must be a path, unless it is `-`, a device or an address."""
        if text in ("", "-") or _URL.match(text) or self.look(text).kind is Kind.OTHER:
            return Word((Piece(Role.LITERAL, text),), "no file")
        return Word((make(text),), why)

    def _after_input_flag(self, text: str, flag: str) -> Word:
        if self.look(text).kind is Kind.ABSENT and not self.look(text).matches and not _looks_like_path(text):
            return self._embedded(text) or Word((Piece(Role.LITERAL, text),), "no file")  # such as `lavfi` and its kin
        return self._literal_or(text, self._input, f"after {flag}")

    def _flag(self, text: str) -> Word:
        flag, equals, value = text.partition("=")
        if equals and flag in INPUT_FLAGS | OUTPUT_FLAGS:
            make = self._input if flag in INPUT_FLAGS else self._output
            word = self._literal_or(value, make, f"after {flag}=")
            return Word((Piece(Role.LITERAL, flag + equals), *word.pieces), word.why)
        if equals:
            return self._value(flag, value) or self._embedded(text) or Word((Piece(Role.LITERAL, text),), "a flag")
        glued = text[2:]
        if text[1] != "-" and glued and (text[1] in "IL" or "/" in glued):
            if (piece := _whole(self.look(glued), self._reading, glued)) is not None:
                return Word((Piece(Role.LITERAL, text[:2]), piece), f"{text[:2]} with what is here")
            if text[1] == "o" and self.look(glued).has_parent:
                return Word((Piece(Role.LITERAL, text[:2]), self._output(glued)), "glued to -o")
        return Word((Piece(Role.LITERAL, text),), "a flag")

    def _value(self, flag: str, value: str) -> Word | None:
        """Judge what stands behind a flag's `=`, as one path."""
        if not value or _NUMBER.fullmatch(value):
            return None
        found = self.look(value)
        piece = _whole(found, self._reading, value)
        if piece is not None and not _looks_like_path(value):
            raise _unclear(f"{flag}={value}", f"is {shown(value)} the {found.kind.value} here, or a word", "--literal")
        return piece and Word((Piece(Role.LITERAL, f"{flag}="), piece), "what is behind = is here")

    def _bare(self, number: int, text: str, *, is_value: bool) -> Word:
        """Judge a word that is no flag: an argument, or the value of a flag that nobody here knows."""
        is_last = number == len(self.argv) - 1
        literal = Word((Piece(Role.LITERAL, text),), "a word")
        if text in ("", "-") or _NUMBER.fullmatch(text) or _URL.match(text):
            return literal._replace(why="a number" if _NUMBER.fullmatch(text) else "no file")
        if is_last and self._program in WRITES_LAST and self.look(text).kind is not Kind.OTHER and not is_text(text):
            return Word((self._output(text),), f"the last word of {self._program}")
        if text[0] == "@" and (piece := _whole(self.look(text[1:]), Role.LIST, text[1:])) is not None:
            return Word((Piece(Role.LITERAL, "@"), piece), "a list")
        found = self.look(text)
        if found.kind in (Kind.FILE, Kind.DIRECTORY) or found.matches:
            if is_value and not _looks_like_path(text):
                why = f"is it the {found.kind.value} that is here, or a word that the flag before it takes"
                raise _unclear(text, why, "--in", "--literal")
            return Word((self._input(text),), "it is here")
        if found.kind is Kind.OTHER:
            return literal._replace(why="no file")
        embedded = self._embedded(text)
        if (runs := self._why_program(number, text, is_last=is_last)) is not None:
            return embedded._replace(why=f"{embedded.why}; {_REDIRECTS}") if embedded else literal._replace(why=runs)
        if embedded is not None or "=" in text:
            return embedded or literal
        return self._absent(text, found, is_last=is_last, is_value=is_value) or literal

    def _why_program(self, number: int, text: str, *, is_last: bool) -> str | None:
        """Return why a word is no name of an output: something runs it (spec J-13); None where it may be one."""
        before = self.argv[1:number]
        are_flags = all(_is_flag(word) or (at > 0 and before[at - 1] in _TAKE_A_WORD) for at, word in enumerate(before))
        for program, flag in _RUNS_WORDS:
            if before and program.fullmatch(self._program) and flag.fullmatch(before[-1]) and are_flags:
                return f"what {self._program} runs; {_REDIRECTS}"
        if _SHELL_SIGNS.search(text) and (is_last or ">" in text):
            return f"it has signs of a shell, and is no path; {_REDIRECTS}"
        return None

    def _absent(self, text: str, found: Found, *, is_last: bool, is_value: bool) -> Word | None:
        """Judge a word at whose path nothing is: the output, where it is the last one and may be made."""
        is_plain = is_last and not is_value and "/" in text and not text.startswith("/")
        if is_plain and not found.has_parent and _EXTENSION.search(text) and self._only_reads:
            raise UsageError(f"{_without_folder(text, found)}, or say --literal {shown(text)}")
        if not (_looks_like_path(text) and found.has_parent) or (is_value and text.startswith("/") and not is_last):
            return None
        if not is_last:
            if "/" in text.strip("/") and not text.startswith("/") and _EXTENSION.search(text):
                raise _unclear(text, "does the command write it", "--out", "--literal")
            return None
        if any(piece.role is Role.OUTPUT for word in self.words for piece in word.pieces):
            raise _unclear(text, "does the command write this too", "--out", "--literal")
        return Word((self._output(text),), "the last word, and nothing is there yet")

    def _require_clear_end(self) -> None:
        """Refuse where a last bare word may well be what the command writes."""
        pieces = [piece for word in self.words for piece in word.pieces]
        has_input = any(piece.role in (Role.INPUT, Role.LIST) for piece in pieces)
        last = self.words[-1]
        before = self.argv[-2] if len(self.argv) > 2 else ""
        has_output = any(piece.role in (Role.OUTPUT, Role.IN_PLACE) for piece in pieces)
        if last.why != "a word" or not has_input or has_output or _is_flag(before):
            return
        if not is_text(last.text) and self.look(last.text).has_parent and re.fullmatch(r"[\w.+-]+", last.text):
            raise _unclear(last.text, "does the command write it, or is it a word", "--out", "--literal")

    @property
    def _only_reads(self) -> bool:
        """Whether there are inputs among the words so far, and no outputs."""
        roles = {piece.role for word in self.words for piece in word.pieces}
        return bool(roles & {Role.INPUT, Role.LIST}) and not roles & {Role.OUTPUT, Role.IN_PLACE}

    @property
    def _program(self) -> str:
        return self.argv[0].rpartition("/")[2]

    def _embedded(self, text: str) -> Word | None:
        """Find paths inside a word, whole between separators, the longest first."""
        edges = [number for number, letter in enumerate(text) if letter in _SEPARATORS]
        if not edges or len(edges) > SEPARATORS_MAX:
            return None
        starts, ends = [0, *(edge + 1 for edge in edges)], [*edges, len(text)]
        pieces: list[Piece] = []
        at = 0
        for start in starts:
            if start < at:
                continue
            for end in reversed(ends):
                inner = text[start:end]
                if end <= start or not _looks_like_path(inner) or _NUMBER.fullmatch(inner) or _URL.match(inner):
                    continue
                if (piece := _whole(self.look(inner), self._reading, inner)) is not None:
                    pieces += [Piece(Role.LITERAL, text[at:start]), piece]
                    at = end
                    break
        if not pieces:
            return None
        pieces.append(Piece(Role.LITERAL, text[at:]))
        return Word(tuple(piece for piece in pieces if piece.text), "a path inside it is here")

    # Pieces

    @property
    def _reading(self) -> Role:
        return Role.IN_PLACE if self.said.is_in_place else Role.INPUT

    def _input(self, text: str) -> Piece:
        found = self.look(text)
        if found.kind is Kind.ABSENT and not found.matches:
            raise _unclear(text, "there is no such file, and the command reads it, or is it a word", "--literal")
        if found.kind is Kind.OTHER:
            raise UsageError(f"{shown(text)} is no file and no folder; only those can be sent")
        return Piece(self._reading, text, found.path)

    def _output(self, text: str, *, is_named: bool = False) -> Piece:
        """Return an output. is_named: by --out, of which the folder may yet be made (spec J-70)."""
        found = self.look(text)
        if found.kind is Kind.OTHER:
            raise UsageError(f"{shown(text)} is no file and no folder; nothing can be brought home there")
        if not (found.has_parent or is_named):  # spec J-19: what the command made could not come home
            raise UsageError(_without_folder(text, found))
        return Piece(Role.OUTPUT, text, found.path)


def is_text(text: str) -> bool:
    """Tell whether a word cannot be meant as a path: empty, an address, or of several lines."""
    return not text or "\n" in text or bool(_URL.match(text))


def _paths(pieces: Iterable[Piece], look: Look | None, *roles: Role) -> tuple[str, ...]:
    """Return the paths of pieces with these roles, each once; with `look`, what patterns stand for instead of them."""
    paths: dict[str, None] = {}
    for piece in pieces:
        if piece.role in roles:
            matches = look(piece.text).matches if look else ()
            paths.update(dict.fromkeys(matches or (piece.path,)))
    return tuple(paths)
