"""Strays: what a command wrote where nothing comes home from, as in its own folder (spec J-88, J-69)."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping

from deltasync.core.jobs import JobRequest, Trouble
from deltasync.core.names import NameRefused, parse_path, shown
from deltasync.disk import Folder

STRAYS_MAX = 20
"""How many of a kind are told one by one."""
TICK_SECONDS = 0.1
"""How long the clock of a file system is waited for; most have one that ticks every few milliseconds."""
_TEMPORARY = "tmp"
_OUT = "name it with --out, or run with --in-place, to have it here"


def clock_of(session: Folder) -> int:
    """Return the time of the session's file system, in nanoseconds, by making a change to its folder."""
    os.utime(session.fd)
    return os.fstat(session.fd).st_ctime_ns


def next_tick(session: Folder) -> int:
    """Return a time that is later than that of everything in the session, and not later than what comes next."""
    first = now = clock_of(session)
    deadline = time.monotonic() + TICK_SECONDS
    while now <= first and time.monotonic() < deadline:
        time.sleep(0.0005)
        now = clock_of(session)
    return max(now, first + 1)


def of(
    session: Folder, request: JobRequest, staged: Mapping[str, bytes], since_ns: int, go_on: Callable[[], None]
) -> list[Trouble]:
    """Return all of them. staged: the files of inputs in place, by their places; since_ns: next_tick, or 0."""
    return [*in_work(session), *in_inputs(session, request, since_ns, go_on), *removed(session, staged, go_on)]


def in_work(session: Folder) -> list[Trouble]:
    """Return what the command left in its current folder, by the names at its top (spec J-88)."""
    try:
        with session.walk_to("work") as work:
            names = sorted(name for name in work.names() if name != _TEMPORARY and not _is_private(name))
            found = [name for name in names if _kind(work, name) in (stat.S_IFREG, stat.S_IFDIR)]
    except OSError:  # the command has shut its folder, or removed it: nobody writes into that
        return []
    told = [
        f"{shown(name)} was written into the job's own folder, which goes with the job; "
        f"{{out:{shown(name)}}} in the command brings it home"
        for name in found
    ]
    return _bounded([Trouble(place="", reason=reason) for reason in told], "were written into the job's own folder")


def in_inputs(session: Folder, request: JobRequest, since_ns: int, go_on: Callable[[], None]) -> list[Trouble]:
    """Return what was changed or made among the inputs since the session was staged (spec J-69)."""
    if not since_ns:
        return []
    named = {each.place for each in request.inputs} | {each.place for each in request.lists}
    skipped = {each.place for each in request.inputs if each.in_place}
    found = sorted(_changed(session, skipped, since_ns, go_on))
    told = [Trouble(place=shown(place), reason=_reason(place, named)) for place in found]
    return _bounded(told, "were changed or made among the inputs")


def removed(session: Folder, staged: Mapping[str, bytes], go_on: Callable[[], None]) -> list[Trouble]:
    """Return the files of inputs in place that went away. staged: all of them, by their places (spec J-69)."""
    names: dict[str, set[str]] = {}
    gone = []
    for place in sorted(staged):
        above, _, name = place.rpartition("/")
        if above not in names:
            go_on()
            names[above] = _names(session, above)
        if name not in names[above]:
            gone.append(Trouble(place=shown(place), reason="was removed on the host and stays here"))
    return _bounded(gone, "were removed there and stay here")


def _changed(session: Folder, skipped: set[str], since_ns: int, go_on: Callable[[], None]) -> Iterator[str]:
    """Yield the places of changed files; no folder is held while another one is looked at, however deep they are."""
    now_ns = clock_of(session)
    waiting = [""]
    while waiting:
        go_on()
        above = waiting.pop()
        try:
            with session.walk_to(_joined("inputs", above)) as folder, os.scandir(folder.fd) as listing:
                for each in listing:
                    place = _joined(above, each.name)
                    if _is_private(each.name) or place in skipped:
                        continue
                    if each.is_dir(follow_symlinks=False):
                        if _can_be_carried(place):
                            waiting.append(place)
                    elif _is_later(each.stat(follow_symlinks=False), since_ns, now_ns):
                        yield place
        except OSError:  # it went away, or the command has shut it: what is in it cannot be known
            continue


def _is_later(status: os.stat_result, since_ns: int, now_ns: int) -> bool:
    """Tell whether a file was written since a time; the other names of a file that has some may come and go."""
    if not stat.S_ISREG(status.st_mode):
        return False
    if status.st_nlink > 1:
        return since_ns <= status.st_mtime_ns <= now_ns  # what has a time to come was given that one where it came from
    return status.st_ctime_ns >= since_ns


def _kind(folder: Folder, name: str) -> int:
    """Return what has a name; 0 where it went away, which says nothing of the others."""
    try:
        return stat.S_IFMT(folder.stat(name).st_mode)
    except FileNotFoundError:
        return 0


def _reason(place: str, named: set[str]) -> str:
    if place in named:
        return f"was changed on the host and stays as it is here; {_OUT}"
    parts = place.split("/")
    if any("/".join(parts[:end]) in named for end in range(1, len(parts))):
        return "was changed or made on the host, in an input, and does not come home; --in-place brings it"
    return (
        "was made beside the inputs on the host and does not come home; {out:PATH} in the command says where it belongs"
    )


def _names(session: Folder, above: str) -> set[str]:
    try:
        with session.walk_to(_joined("inputs", above)) as folder:
            return set(folder.names())
    except OSError:
        return set()


def _bounded(told: list[Trouble], what: str) -> list[Trouble]:
    """Return troubles, the first of them one by one."""
    if len(told) <= STRAYS_MAX:
        return told
    return [*told[:STRAYS_MAX], Trouble(place="", reason=f"{len(told) - STRAYS_MAX} more {what}")]


def _is_private(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__"


def _can_be_carried(place: str) -> bool:
    try:
        parse_path(place)
    except NameRefused:
        return False
    return True


def _joined(above: str, name: str) -> str:
    return f"{above}/{name}" if above and name else above or name
