"""A record of each job that was started here: where it runs, and where what it writes belongs (spec J-62, J-63)."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from deltasync.client.opening import home_of_states
from deltasync.core.argv import pattern_of
from deltasync.core.errors import NotFound
from deltasync.core.jobs import JOB_ID, Output
from deltasync.core.names import NameRefused, parse_path, shown
from deltasync.decoding import decoded
from deltasync.disk import open_regular, space_guard, staged

if TYPE_CHECKING:
    from deltasync.client.comparison import MayReplace

FOLDER, SUFFIX, LOOKED = "jobs", ".json", "looked"
RECORD_BYTES_MAX = 256 << 20
DAY_SECONDS = 86_400
KEEP_DAYS = 31
"""What nobody brought home by then the host has forgotten (spec J-48)."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One job that was started here."""

    id: str
    url: str
    command: list[str]
    """As it was typed, safe to print."""
    started_at: str
    """Right before the host was asked for it, by the clock here."""
    outputs: list[Output] = []
    named: list[str] = []
    """The places of those outputs that were no guess."""
    in_place: dict[str, str] = {}
    """The inputs that the command may have changed: place and local path, links resolved."""
    digests: dict[str, str] = {}
    """What their files were when they were sent, by their places."""
    is_home: bool = False
    """Everything that it returned is here, and was acknowledged."""
    came: list[tuple[int, int]] = []
    """From when to when it was brought home, by the clock here in nanoseconds, each time."""

    def target(self, place: str) -> Path | None:
        """Return where something that came from a place belongs; None for a place that nobody named (spec J-66)."""
        with contextlib.suppress(NameRefused):
            parse_path(place)
            return self._output(place) or self._input(place)
        return None

    def names(self, place: str) -> bool:
        """Tell whether a place is an output or an input in place, or lies in one."""
        inside = any(f"{place}/".startswith(f"{each.place}/") for each in self.outputs)
        return inside or self.target(place) is not None

    def missing(self, places: Iterable[str]) -> list[str]:
        """Return the places that were named, and where nothing came of these (spec J-62)."""
        came = set(places)
        brought = {each.place for each in self.outputs if any(_is_of(each, place) for place in came)}
        return [place for place in self.named if place not in brought and self._input(place) is None]

    def sent(self, places: Iterable[str]) -> dict[str, bytes]:
        """Return, for those of the places that inputs have, the digest that was sent; b'' for what was not."""
        return {
            place: bytes.fromhex(self.digests.get(place, ""))
            for place in places
            if self.target(place) is not None and self._output(place) is None
        }

    @property
    def started_ns(self) -> int:
        """When it was started, in nanoseconds."""
        with contextlib.suppress(ValueError):
            return round(datetime.fromisoformat(self.started_at).timestamp() * 1e6) * 1000
        return 0

    def has_brought(self, place: str, changed_ns: int) -> bool:
        """Tell whether what is at a place, and changed last at that time, is what came home of this job.

        That holds of a job that is home as a whole: every file was compared with what it returned at the end.
        """
        return self.is_home and any(start <= changed_ns <= end for start, end in self.came) and self.names(place)

    def _input(self, place: str) -> Path | None:
        for above, path in self.in_place.items():
            if f"{place}/".startswith(f"{above}/"):
                return Path(path + place.removeprefix(above))
        return None

    def _output(self, place: str) -> Path | None:
        return Path("/" + place) if any(_fits(each, place) for each in self.outputs) else None


def _is_of(output: Output, place: str) -> bool:
    """Tell whether a place is an output's, or holds it, or lies in it."""
    lies_in = f"{place}/".startswith(f"{output.place}/") or f"{output.place}/".startswith(f"{place}/")
    return lies_in or _fits(output, place)


def _fits(output: Output, place: str) -> bool:
    """Tell whether a place is an output, or what a pattern of one stands for."""
    if output.place == place:
        return True
    folder, _, name = place.rpartition("/")
    above, _, pattern = output.place.rpartition("/")
    fits = pattern_of(pattern) if output.is_pattern and above == folder else None
    return fits is not None and fits.match(name) is not None


class JobBook:
    """The records of one user: a file for each job."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @classmethod
    def of_user(cls) -> JobBook:
        """Return the book of the user who runs this."""
        return cls(home_of_states() / FOLDER)

    def write(self, record: Record) -> None:
        """Keep a record from now on; once a day, forget those that are too old to be brought home."""
        with space_guard(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with staged(self._folder / (record.id + SUFFIX)) as out:
                out.write(msgspec.json.encode(record))
            self._forget_old(time.time())

    def _forget_old(self, now: float) -> None:
        """Remove what was not written for too long, by the names and times alone: there may be very many records."""
        looked = self._folder / LOOKED
        with contextlib.suppress(FileNotFoundError):  # the first time
            if abs(now - looked.stat().st_mtime) < DAY_SECONDS:
                return
        looked.touch(0o600)
        with os.scandir(self._folder) as listing:
            paths = [each.path for each in listing if each.name.endswith((SUFFIX, ".tmp"))]
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                if os.lstat(path).st_mtime < now - KEEP_DAYS * DAY_SECONDS:
                    os.unlink(path)  # noqa: PTH108 - one of very many

    def records(self) -> list[Record]:
        """Return every record that can be read, the newest first."""
        names: list[str] = []
        with contextlib.suppress(OSError):
            names = os.listdir(self._folder)  # noqa: PTH208 - the names alone
        ids = [name.removesuffix(SUFFIX) for name in names if name.endswith(SUFFIX)]
        found = (self._read(each) for each in ids if JOB_ID.fullmatch(each))
        return sorted((each for each in found if each is not None), key=lambda each: each.started_at, reverse=True)

    def judge(self, record: Record) -> MayReplace:
        """Return what tells whether an output of a job may take the place of what is there (spec J-62).

        It may where that is as old as the job's start, or came home of a job that was started earlier.
        """
        older: list[Record] = []

        def may_replace(place: str, status: os.stat_result) -> bool:
            if status.st_ctime_ns <= record.started_ns:
                return True
            if not older:  # all are read, and only where it matters; this job is among them
                older.extend(each for each in self.records() if each.started_at <= record.started_at)
            return any(each.has_brought(place, status.st_ctime_ns) for each in older)

        return may_replace

    def named(self, job_id: str) -> Record:
        """Return the record of a job, or raise NotFound."""
        record = self._read(job_id) if JOB_ID.fullmatch(job_id) else None
        if record is None:
            raise NotFound(f"{shown(job_id)} was not started here; `deltasync jobs ls` lists what a host knows")
        return record

    def _read(self, job_id: str) -> Record | None:
        with contextlib.suppress(OSError, msgspec.MsgspecError, ValueError):
            with os.fdopen(open_regular(str(self._folder / (job_id + SUFFIX))), "rb") as file:
                record = decoded(file.read(RECORD_BYTES_MAX), Record)
            return record if record.id == job_id else None
        return None
