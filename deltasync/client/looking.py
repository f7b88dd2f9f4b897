"""What lies at the words of a command on this machine (spec J-1 to J-19)."""

from __future__ import annotations

import os
import stat

from deltasync.core.argv import Found, Kind, pattern_of


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
    try:
        names = os.listdir(folder)  # noqa: PTH208 - the names alone
    except (OSError, ValueError):
        return ()
    fitting = (each for each in sorted(names) if pattern.match(each) and (each[0] != "." or name[0] == "."))
    paths = (f"{folder.rstrip('/')}/{each}" for each in fitting)
    return tuple(path for path in paths if _kind(path) is Kind.FILE)
