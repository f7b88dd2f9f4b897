"""What lies at the words of a command on this machine (spec J-1 to J-19)."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator

from deltasync.core.argv import Found, Kind, pattern_of
from deltasync.core.errors import UsageError
from deltasync.core.names import shown


class Looking:
    """Looks at paths as somebody types them in a folder; each word is looked at once."""

    def __init__(self, folder: str, *, near: str | None = None) -> None:
        """Take relative paths from `folder`, or from `near` where nothing is in the first."""
        self._folder, self._near = folder, near
        self._found: dict[str, Found] = {}

    def __call__(self, text: str) -> Found:
        """Return what is known of a path."""
        found = self._found.get(text)
        if found is None:
            found = self._found[text] = self._looked(text)
        return found

    def _looked(self, text: str) -> Found:
        found = found_at(absolute(text, self._folder))
        if self._near is not None and found.kind is Kind.ABSENT and not found.matches:
            near = found_at(absolute(text, self._near))
            if near.kind is not Kind.ABSENT or near.matches:
                return near
        return found


def absolute(text: str, folder: str) -> str:
    """Return the absolute path of one that was typed in a folder; `..` behind a link leads out of where it leads to."""
    parts = os.path.join(folder, text).split("/")  # noqa: PTH118 - a Path forgets `.`, and a trailing slash
    if ".." in parts and "\0" not in text:
        end = len(parts) - parts[::-1].index("..")
        parts = [*os.path.realpath("/".join(parts[:end]) or "/").split("/"), *parts[end:]]
    return "/" + os.path.normpath("/".join(parts)).lstrip("/")


def found_at(path: str) -> Found:
    """Return what is at an absolute path; what cannot be looked at is not here."""
    folder, name = os.path.split(path)
    kind = _kind(path)
    matches = () if kind is not Kind.ABSENT else _matches(folder, name)
    return Found(path, kind, _kind(folder) is Kind.DIRECTORY, matches)


def expanded(patterns: Iterable[str], folder: str) -> list[str]:
    """Return the files that patterns stand for, each once, as they would be typed in a folder (spec J-70).

    A pattern may stand in any component, and `**` for any number of folders. Raises UsageError where no file fits.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        is_file = _kind(absolute(pattern, folder)) is Kind.FILE
        fitting = [pattern] if is_file else list(_fitting(folder, "/" if pattern[:1] == "/" else "", pattern))
        if not fitting:
            raise UsageError(f"--each: no file fits {shown(pattern)}; patterns are for files, and quoted")
        found.update(dict.fromkeys(fitting))
    return list(found)


def _fitting(folder: str, above: str, pattern: str) -> Iterator[str]:
    """Yield the files below a typed folder, '' or with a slash at its end, that the rest of a pattern stands for."""
    part, _, rest = pattern.lstrip("/").partition("/")
    form = pattern_of(part)
    if part == "**":
        yield from _fitting(folder, above, rest or "*")
        for name in _names(absolute(above, folder)):
            path = absolute(above + name, folder)
            if name[0] != "." and os.path.isdir(path) and not os.path.islink(path):  # noqa: PTH112, PTH114 - many
                yield from _fitting(folder, f"{above}{name}/", pattern)
        return
    is_shown = form is None or part[0] == "."
    for name in _names(absolute(above, folder)) if form is not None else (part,):
        if form is not None and not (form.match(name) and (is_shown or name[0] != ".")):
            continue
        kind = _kind(absolute(above + name, folder))
        if rest and kind is Kind.DIRECTORY:
            yield from _fitting(folder, f"{above}{name}/", rest)
        elif not rest and kind is Kind.FILE:
            yield above + name


def _names(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))  # noqa: PTH208 - the names alone
    except (OSError, ValueError):
        return []


def _kind(path: str) -> Kind:
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 - links are followed (spec J-23)
    except (OSError, ValueError):
        return Kind.ABSENT
    if stat.S_ISREG(mode):
        return Kind.FILE
    return Kind.DIRECTORY if stat.S_ISDIR(mode) else Kind.OTHER


def _matches(folder: str, name: str) -> tuple[str, ...]:
    """Return the files that a pattern stands for; one that begins with a dot only where the pattern does."""
    pattern = pattern_of(name)
    if pattern is None:
        return ()
    fitting = (each for each in _names(folder) if pattern.match(each) and (each[0] != "." or name[0] == "."))
    paths = (f"{folder.rstrip('/')}/{each}" for each in fitting)
    return tuple(path for path in paths if _kind(path) is Kind.FILE)
