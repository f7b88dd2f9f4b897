"""Ignore rules: gitignore syntax at any level and on the command line, matched in linear time.

pathspec writes each pattern as one regular expression that backtracks: `*a*a*a*a*a*b` on a long run of `a` does not
end. Here each part of a path is matched by itself, with atomic groups, and `**` by one remembered position.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from deltasync.core.hashing import digest_of
from deltasync.core.names import RESERVED, shown
from deltasync.disk import Folder, open_regular

IGNORE_FILE = ".deltasyncignore"
GITIGNORE_FILE = ".gitignore"
FILE_BYTES_MAX = 1 << 20
_CLASSES = {
    "alnum": "a-zA-Z0-9", "alpha": "a-zA-Z", "blank": " \\t", "cntrl": "\\x00-\\x1f\\x7f", "digit": "0-9",
    "graph": "!-~", "lower": "a-z", "print": " -~", "punct": "!-/:-@\\[-`{-~", "space": "\\s", "upper": "A-Z",
    "xdigit": "0-9a-fA-F",
}  # fmt: skip
NEVER_CARRIED = f"{RESERVED}/ is never carried"
_ANY = None
"""The part of a pattern that matches any number of folders: `**`."""

Stamp = tuple[str | int, ...]
"""What identifies one version of an ignore file: its name and stat."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a path is ignored, and the rule, its file and its line that say so; no rule: carried by default."""

    ignored: bool
    rule: str | None = None
    source_file: str | None = None
    line: int | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of an ignore file, ready to match."""

    text: str
    source_file: str | None
    line: int
    is_negated: bool
    for_directories: bool
    parts: tuple[re.Pattern[str] | None, ...]
    """One pattern for each part of the path, or one alone for the last part at any depth; None is `**`."""
    is_anchored: bool

    def matches(self, parts: Sequence[str], *, is_directory: bool) -> bool:
        """Tell whether the rule matches a path, given as its parts below the rule's folder."""
        if self.for_directories and not is_directory:
            return False
        if not self.is_anchored:
            pattern = self.parts[0]
            return pattern is None or pattern.match(parts[-1]) is not None
        return _matches(self.parts, parts)


@dataclass(frozen=True, slots=True)
class Level:
    """The rules of one folder, and those of the folders above it."""

    rules: tuple[Rule, ...]
    """Last match wins."""
    depth: int
    above: Level | None
    fingerprint: bytes
    """Equal fingerprints mean equal rules, all the way up."""


class IgnoreRules:
    """What not to carry: `.deltasyncignore` files, `.gitignore` files if asked, and what the command line says.

    The command line wins over files, `include` over `exclude`; a deeper file wins over a higher one. What lies in an
    ignored folder is ignored with it. Files are read when first needed; `enter` reads one again when it has changed.
    """

    def __init__(
        self,
        root: Path,
        exclude: Iterable[str] = (),
        include: Iterable[str] = (),
        gitignore: bool = False,
        *,
        has_files: bool = True,
    ) -> None:
        """Take the rules of the command line; `gitignore` obeys `.gitignore` files too, not `has_files` none at all."""
        files = (GITIGNORE_FILE, IGNORE_FILE) if gitignore else (IGNORE_FILE,)
        self.files: tuple[str, ...] = files if has_files else ()
        self._root = root
        self.origin: Callable[[str], str] = lambda _: "in the settings"
        """Says where a rule of `exclude` or `include` is from, in words that follow it."""
        lines = [*(f"{text}\n" for text in exclude), *(f"!{text}\n" for text in include)]
        self._command = tuple(parse_rules("".join(lines), None))
        self.command_fingerprint = digest_of("".join(lines).encode(errors="surrogateescape")) if lines else b""
        self._levels: dict[str, tuple[list[Stamp], Level | None]] = {}

    @property
    def on_command_line(self) -> bool:
        """Tell whether the command line gave any rule."""
        return bool(self._command)

    def is_ignored(self, path: str, is_directory: bool) -> bool:
        """Tell whether a path, or a folder that it lies in, is ignored."""
        return self._decide_along(path, is_directory=is_directory).ignored

    def explain(self, path: str) -> Decision:
        """Say which rule decides about a path, which may be any path below the root."""
        is_directory = False
        with contextlib.suppress(OSError):  # what cannot be looked at is taken for a file
            is_directory = stat.S_ISDIR((self._root / path).lstat().st_mode)
        return self._decide_along(path, is_directory=is_directory)

    def where(self, decision: Decision) -> str:
        """Say where the rule of a decision stands, in words that follow it; '' for what no rule decides."""
        if decision.line is not None:
            return f"in {shown(decision.source_file or '')}, line {decision.line}"
        return "" if decision.rule in (None, NEVER_CARRIED) else self.origin(decision.rule or "")

    def decide(self, level: Level | None, path: str, *, is_directory: bool) -> Decision:
        """Decide about one entry, given the level of the folder that it is in, which is itself not ignored."""
        parts = path.split("/")
        for rule in reversed(self._command):
            if rule.matches(parts, is_directory=is_directory):
                return Decision(not rule.is_negated, rule.text, None, None)
        while level is not None:
            below = parts[level.depth :]
            for rule in reversed(level.rules):
                if rule.matches(below, is_directory=is_directory):
                    return Decision(not rule.is_negated, rule.text, rule.source_file, rule.line)
            level = level.above
        return Decision(False)

    def enter(self, above: Level | None, folder: str, stamps: list[Stamp]) -> Level | None:
        """Return the level of a folder; stamps name the ignore files that it holds now.

        Raises OSError when one of them cannot be read or is no regular file.
        """
        known = self._levels.get(folder)
        if known is None and not stamps:
            return above
        if known is not None and known[0] == stamps and (known[1] is None or known[1].above is above):
            return known[1] or above
        level = self._read_level(above, folder, [str(stamp[0]) for stamp in stamps])
        if stamps or known is not None:
            self._levels[folder] = (stamps, level)
        return level or above

    def _read_level(self, above: Level | None, folder: str, names: Sequence[str]) -> Level | None:
        rules: list[Rule] = []
        text = ""
        for name in self.files:  # .deltasyncignore comes last and wins
            if name in names:
                content = _read(self._root, folder, name)
                rules += parse_rules(content, f"{folder}/{name}" if folder else name)
                text += f"{name}\0{content}\0"
        if not rules:
            return None
        chain = (above.fingerprint if above else b"") + f"{folder}\0{text}".encode(errors="surrogateescape")
        return Level(tuple(rules), folder.count("/") + 1 if folder else 0, above, digest_of(chain))

    def _decide_along(self, path: str, *, is_directory: bool) -> Decision:
        """Decide about each folder above a path, from the top, then about the path."""
        level = self.level_of("", None)
        parts = path.split("/")
        for depth, name in enumerate(parts, start=1):
            is_last = depth == len(parts)
            if name == RESERVED:
                return Decision(True, NEVER_CARRIED)
            here = "/".join(parts[:depth])
            decision = self.decide(level, here, is_directory=is_directory or not is_last)
            if decision.ignored or is_last:
                return decision
            level = self.level_of(here, level)
        return Decision(False)

    def level_of(self, folder: str, above: Level | None) -> Level | None:
        """Return the level of a folder as it was last read, given the one above it.

        An ignore file that cannot be read says nothing.
        """
        if folder in self._levels:
            return self._levels[folder][1] or above
        stamps: list[Stamp] = []
        for name in self.files:
            with contextlib.suppress(OSError):
                stamps.append(stamp_of(name, (self._root / folder / name).lstat()))
        try:
            level = self._read_level(above, folder, [str(stamp[0]) for stamp in stamps])
        except OSError:
            stamps, level = [], None
        self._levels[folder] = (stamps, level)
        return level or above


def stamp_of(name: str, status: os.stat_result) -> Stamp:
    """Return what identifies one version of an ignore file."""
    return (name, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _read(root: Path, folder: str, name: str) -> str:
    """Read an ignore file without following a link on the way."""
    with Folder.open(root) as top, top.walk_to(folder) as here:
        descriptor = open_regular(name, at=here.fd)
        with os.fdopen(descriptor, "rb") as file:
            content = file.read(FILE_BYTES_MAX + 1)
    if len(content) > FILE_BYTES_MAX:
        raise OSError(errno.EFBIG, f"is larger than {FILE_BYTES_MAX} bytes", name)
    return content.decode(errors="surrogateescape").removeprefix("\ufeff")


def parse_rules(text: str, source_file: str | None) -> Iterable[Rule]:
    """Parse the lines of an ignore file; blank lines, comments and broken patterns give no rule, as in git."""
    for number, line in enumerate(text.split("\n"), start=1):
        rule = _parse_rule(line.removesuffix("\r"), source_file, number)
        if rule is not None:
            yield rule


def _parse_rule(line: str, source_file: str | None, number: int) -> Rule | None:
    text = _without_trailing_spaces(line)
    if not text or text.startswith("#"):
        return None
    is_negated = text.startswith("!")
    pattern = text[1:] if is_negated else text
    for_directories = pattern.endswith("/")
    pattern = pattern.removesuffix("/")
    is_anchored = "/" in pattern
    names = pattern.removeprefix("/").split("/")
    if not all(names):
        return None
    if is_anchored and names[-1] == "**":
        names.append("*")  # `x/**` is what lies in x, never x itself
    parts: list[re.Pattern[str] | None] = []
    for name in names:
        if name == "**" and is_anchored:
            if not parts or parts[-1] is not _ANY:
                parts.append(_ANY)
            continue
        compiled = _glob(name)
        if compiled is None:
            return None
        parts.append(compiled)
    return Rule(text, source_file, number, is_negated, for_directories, tuple(parts), is_anchored)


def _without_trailing_spaces(line: str) -> str:
    stripped = line.rstrip(" ")
    backslashes = len(stripped) - len(stripped.rstrip("\\"))
    return stripped + " " if backslashes % 2 and len(stripped) < len(line) else stripped


def _matches(pattern: Sequence[re.Pattern[str] | None], parts: Sequence[str]) -> bool:
    """Match parts of a path; `**` takes as few as it can, and only the last one met is ever tried again."""
    at = here = 0
    retry_at, retry_here = -1, 0
    while here < len(parts):
        expected = pattern[at] if at < len(pattern) else None
        if at < len(pattern) and expected is _ANY:
            retry_at, retry_here = at, here
            at += 1
        elif expected is not None and expected.match(parts[here]):
            at, here = at + 1, here + 1
        elif retry_at >= 0:
            retry_here += 1
            at, here = retry_at + 1, retry_here
        else:
            return False
    return at == len(pattern)


def _glob(name: str) -> re.Pattern[str] | None:
    """Compile the pattern of one part of a path; None when it is broken and so matches nothing.

    Between two stars the shortest match is the right one, so an atomic group may forget the others: no backtracking
    beyond the last star, whatever the pattern.
    """
    pieces: list[str] = [""]
    at = 0
    while at < len(name):
        character = name[at]
        at += 1
        if character == "*":
            if pieces[-1] or len(pieces) == 1:
                pieces.append("")
        elif character == "?":
            pieces[-1] += "."
        elif character == "[":
            found = _bracket(name, at)
            if found is None:
                return None
            pieces[-1] += found[0]
            at = found[1]
        else:
            if character == "\\":
                if at == len(name):
                    return None
                character = name[at]
                at += 1
            pieces[-1] += re.escape(character)
    return re.compile(_joined(pieces), re.DOTALL)


def _joined(pieces: Sequence[str]) -> str:
    if len(pieces) == 1:
        return pieces[0] + r"\Z"
    inner = "".join(f"(?>.*?{piece})" for piece in pieces[1:-1])
    return f"{pieces[0]}{inner}.*{pieces[-1]}\\Z"


def _bracket(name: str, at: int) -> tuple[str, int] | None:
    """Translate a bracket expression that begins before `at`; return it and where it ends, or None if it does not."""
    is_negated = name[at : at + 1] in ("!", "^") and at < len(name)
    at += is_negated
    out: list[str] = []
    first = True
    while at < len(name) and (first or name[at] != "]"):
        first = False
        if name.startswith("[:", at) and (end := name.find(":]", at)) > 0:
            known = _CLASSES.get(name[at + 2 : end])
            if known is None:
                return None
            out.append(known)
            at = end + 2
            continue
        low, at = _bracket_character(name, at)
        if name[at : at + 1] == "-" and name[at + 1 : at + 2] not in ("", "]"):
            high, at = _bracket_character(name, at + 1)
            if low <= high:
                out.append(f"{re.escape(low)}-{re.escape(high)}")
        else:
            out.append(re.escape(low))
    if at >= len(name):
        return None
    if not out:
        return ("." if is_negated else "(?!)"), at + 1
    return f"[{'^' if is_negated else ''}{''.join(out)}]", at + 1


def _bracket_character(name: str, at: int) -> tuple[str, int]:
    if name[at] == "\\" and at + 1 < len(name):
        at += 1
    return name[at], at + 1
