"""What may go wrong with a workspace on this machine, found before it does."""

from __future__ import annotations

import contextlib
import enum
import os
import shutil
import stat
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from deltasync.client.opening import DATABASE, usable_root
from deltasync.core.names import RESERVED, NameRefused, parse_name, portability_note, shown
from deltasync.disk import reflink

EXAMPLES = 10
FUTURE_SECONDS = 120.0
CLOCK_SECONDS = 120.0
FREE_BYTES = 1 << 30
WATCH_SHARE = 0.8
"""From this share of the watch limit on, a tree has little headroom."""
_WATCHES = Path("/proc/sys/fs/inotify/max_user_watches")


class Level(enum.StrEnum):
    """How much a finding matters."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to know, in one sentence."""

    level: Level
    topic: str
    sentence: str


@dataclass(slots=True)
class _Survey:
    """What one walk over the workspace saw: counts, and a few examples of each."""

    folders: int = 1
    files: int = 0
    refused: dict[str, list[str]] = field(default_factory=dict)
    foreign: dict[str, list[str]] = field(default_factory=dict)
    twins: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    future: list[str] = field(default_factory=list)
    workspaces: list[str] = field(default_factory=list)


def examine(
    root: Path,
    *,
    now: datetime,
    state_dir: Path | None = None,
    server_date: datetime | None = None,
    max_watches: int | None = None,
) -> list[Finding]:
    """Look at names, watches, links, clocks and space; changes nothing but a probe file in the state's folder.

    server_date: what the server's clock says, as far as one was asked. max_watches: the system's limit unless given.
    """
    real = usable_root(root)
    folder = state_dir or real / RESERVED
    survey = _survey(real, future=now.timestamp() + FUTURE_SECONDS)
    limit = max_watches if max_watches is not None else _watch_limit()
    return [
        *_names(survey),
        *_reading(survey),
        _watches(survey.folders, limit),
        *_links(folder),
        *_clock(survey, now, server_date),
        *(_space(path) for path in sorted({real, folder}) if path.is_dir()),
    ]


def _survey(root: Path, *, future: float) -> _Survey:
    survey = _Survey()
    todo = [""]
    while todo:
        folder = todo.pop()
        try:
            with os.scandir(root / folder) as listing:
                entries = [(entry.name, entry.stat(follow_symlinks=False)) for entry in listing]
        except OSError as error:
            survey.unreadable.append(f"{shown(folder)} ({error.strerror})")
            continue
        if not folder:
            entries = [(name, status) for name, status in entries if name != RESERVED]
        elif os.path.lexists(root / folder / RESERVED / DATABASE):
            survey.workspaces.append(shown(folder))
            continue
        for name, status in entries:
            path = f"{folder}/{name}" if folder else name
            _survey_name(survey, name, path)
            if stat.S_ISDIR(status.st_mode):
                survey.folders += 1
                todo.append(path)
            else:
                survey.files += 1
                if status.st_mtime > future:
                    survey.future.append(shown(path))
        survey.twins.extend(_twins(folder, (name for name, _ in entries)))
    return survey


def _survey_name(survey: _Survey, name: str, path: str) -> None:
    try:
        parse_name(name)
    except NameRefused as error:
        survey.refused.setdefault(str(error), []).append(shown(path))
        return
    note = portability_note(name)
    if note is not None:
        survey.foreign.setdefault(note, []).append(shown(path))


def _twins(folder: str, names: Iterable[str]) -> Iterator[str]:
    """Yield names that are one name where letter case or Unicode form does not count."""
    met: dict[str, list[str]] = {}
    for name in names:
        met.setdefault(unicodedata.normalize("NFC", name).casefold(), []).append(name)
    for group in met.values():
        if len(group) > 1:
            yield f"{shown(folder) or '.'}: " + ", ".join(ascii(shown(name)) for name in sorted(group))


def _names(survey: _Survey) -> Iterator[Finding]:
    for reason, paths in survey.refused.items():
        yield Finding(Level.PROBLEM, "names", f"{len(paths)} path(s) are not carried, {reason}: {_some(paths)}")
    for note, paths in survey.foreign.items():
        yield Finding(Level.WARNING, "names", f"{len(paths)} name(s) are carried, but each {note}: {_some(paths)}")
    if survey.twins:
        yield Finding(
            Level.WARNING,
            "names",
            f"{len(survey.twins)} group(s) of names are one name on other systems (letter case or Unicode form): "
            f"{_some(survey.twins)}",
        )
    if survey.workspaces:
        yield Finding(
            Level.NOTE,
            "names",
            f"{len(survey.workspaces)} folder(s) are workspaces of their own; push each by itself: "
            f"{_some(survey.workspaces)}",
        )
    if not (survey.refused or survey.foreign or survey.twins):
        yield Finding(Level.OK, "names", f"all {survey.files + survey.folders - 1} names are fit for every system")


def _some(paths: list[str]) -> str:
    more = len(paths) - EXAMPLES
    return "; ".join(sorted(paths)[:EXAMPLES]) + (f"; and {more} more" if more > 0 else "")


def _reading(survey: _Survey) -> Iterator[Finding]:
    if survey.unreadable:
        count = len(survey.unreadable)
        yield Finding(Level.PROBLEM, "reading", f"{count} folder(s) cannot be read: {_some(survey.unreadable)}")


def _watch_limit() -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(_WATCHES.read_text())
    return None


def _watches(folders: int, limit: int | None) -> Finding:
    if limit is None:
        return Finding(Level.NOTE, "watches", "this system states no limit of watches; `watch` rescans regularly")
    said = f"{folders} folder(s) need a watch each, and this user may have {limit}"
    if folders <= WATCH_SHARE * limit:
        return Finding(Level.OK, "watches", said)
    wanted = max(2 * folders, 524_288)
    fix = f"raise it with `sysctl fs.inotify.max_user_watches={wanted}`; until then rescans notice the rest"
    level = Level.PROBLEM if folders > limit else Level.WARNING
    return Finding(level, "watches", f"{said}; {fix}")


def _links(folder: Path) -> Iterator[Finding]:
    """Try a reflink and a hard link between two files of our own."""
    if not folder.is_dir():
        yield Finding(Level.NOTE, "links", "not tried: the folder is not a workspace yet")
        return
    first, second = folder / f"probe-{os.getpid()}-1", folder / f"probe-{os.getpid()}-2"
    try:
        first.write_bytes(b"deltasync")
        with first.open("rb") as source, second.open("wb") as target:
            has_reflink = reflink(source.fileno(), target.fileno())
        second.unlink()
        has_link = _can_link(first, second)
    except OSError as error:
        yield Finding(Level.PROBLEM, "links", f"nothing can be written in {shown(str(folder))} ({error.strerror})")
        return
    finally:
        for path in (first, second):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
    can = [word for word, has in (("reflinks", has_reflink), ("hard links", has_link)) if has]
    level = Level.OK if has_link else Level.NOTE
    yield Finding(level, "links", f"the file system here has {' and '.join(can) or 'neither reflinks nor hard links'}")


def _can_link(first: Path, second: Path) -> bool:
    try:
        second.hardlink_to(first)
    except OSError:
        return False
    return True


def _clock(survey: _Survey, now: datetime, server_date: datetime | None) -> Iterator[Finding]:
    if survey.future:
        count = len(survey.future)
        yield Finding(
            Level.WARNING,
            "clock",
            f"{count} file(s) were last changed in the future, or this clock is behind: {_some(survey.future)}",
        )
    if server_date is not None:
        apart = abs((server_date - now).total_seconds())
        if apart > CLOCK_SECONDS:
            sentence = f"this clock and the server's are {apart:.0f} s apart; set the one that is wrong"
            yield Finding(Level.WARNING, "clock", sentence)
            return
    if not survey.future:
        yield Finding(
            Level.OK, "clock", "no file is from the future" + (", and the server agrees" if server_date else "")
        )


def _space(path: Path) -> Finding:
    usage = shutil.disk_usage(path)
    free = f"{usage.free / 2**30:.1f} GiB are free where {shown(str(path))} lies"
    if usage.free < FREE_BYTES:
        return Finding(Level.WARNING, "space", f"only {free}; sealing without a server needs room for bundles")
    return Finding(Level.OK, "space", free)
