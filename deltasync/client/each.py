"""Commands for many files on one host: never many more than it has slots for, so that its queue decides (spec J-71)."""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from deltasync.client import fetch, inputs
from deltasync.client.finished import Finished
from deltasync.client.inputs import Delivered, Need, Report, place_of
from deltasync.client.job_records import Record
from deltasync.client.job_request import Draft, drafted
from deltasync.client.looking import absolute
from deltasync.client.run import Home, Runner, Sink, exit_code_of
from deltasync.client.template import Template
from deltasync.core import jobs
from deltasync.core.errors import (
    DeltasyncError,
    HostRefused,
    LimitExceeded,
    NotFound,
    OutputsNotHome,
    PlanRefused,
    RunTrouble,
    SequenceGone,
    UsageError,
)
from deltasync.core.names import shown

WAITING = 2
"""How many more jobs than the host has slots are there at once, so that none of these waits for us."""
AT_ONCE_MAX = 64
MEMORY_BYTES = 512 << 20
"""What a job takes of the host's memory, where nobody says."""
LOOK_SECONDS = 2.0
"""How often the host's memory is looked at while there is too little."""


class Watcher(inputs.Watcher, fetch.Watcher, Protocol):
    """Hears how far the reading, the sending and the fetching are."""


class Sinks(Protocol):
    """Makes what takes the words of one file's command, and hears that they are over."""

    def __call__(self, file: str) -> contextlib.AbstractContextManager[Sink]:
        """Return a sink for a file's command."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a batch goes about its files."""

    retries: int = 0
    memory_bytes: int | None = None
    is_raw: bool = False
    fetch_failed: bool = False


@dataclass(frozen=True, slots=True)
class Failure:
    """A file whose command did not do what it should: of the member `failed` of `run --each --json`."""

    file: str
    """As it was typed, safe to print."""
    reason: str
    job: str | None = None
    exit_code: int | None = None


@dataclass(slots=True)
class BatchReport:
    """What came of all files: the members of `run --each --json`."""

    files: int = 0
    done: int = 0
    skipped: int = 0
    """Done by an earlier run, as they are now."""
    left: int = 0
    """Not begun, or ended, because somebody cancelled it."""
    failed: list[Failure] = field(default_factory=list)
    inputs: Report = field(default_factory=Report)
    output_files: int = 0
    output_bytes: int = 0


class _Failed(Exception):
    """One attempt at a file failed."""

    def __init__(self, failure: Failure, *, may_retry: bool) -> None:
        super().__init__(failure.reason)
        self.failure, self.may_retry = failure, may_retry


class _Posted(NamedTuple):
    """A job that the host has for a file."""

    job: jobs.Job
    record: Record
    digest: bytes | None
    """Of the file as it was sent."""


class Batch:
    """One template and its files."""

    def __init__(self, template: Template, folder: str, files: Sequence[str]) -> None:
        """Ask nothing and look at nothing yet. files: as they were typed in the folder."""
        template.require_holes()
        self._template, self._folder = template, folder
        self.files = list(files)
        self.report = BatchReport(files=len(self.files))

    def draft(self, file: str) -> Draft:
        """Return the command for a file; raises PlanRefused that names the file."""
        try:
            return drafted(self._template.of(file), self._folder)
        except UsageError as error:
            raise PlanRefused(f"for {shown(file)}: {error.sentence}") from error

    def path(self, file: str) -> str:
        """Return the absolute path of a file."""
        return absolute(file, self._folder)

    def needs(self) -> list[Need]:
        """Plan every file, and return all that they read; raises PlanRefused where two would write the same."""
        needs: dict[str, Need] = {}
        written: dict[str, str] = {}
        for file in self.files:
            draft = self.draft(file)
            for output in draft.outputs:
                other = written.setdefault(output.place, file)
                if other != file:
                    raise PlanRefused(f"{shown(other)} and {shown(file)} would both become /{shown(output.place)}")
            needs |= {each.path: each for each in draft.needs if each.is_in_place or each.path not in needs}
        return list(needs.values())

    def skip_finished(self, finished: Finished) -> None:
        """Leave out what an earlier run did."""
        left = [file for file in self.files if not finished.has(self.draft(file), self.path(file))]
        self.report.skipped = len(self.files) - len(left)
        self.files = left


class Course:
    """A batch on its way: some threads, each with one file at a time."""

    def __init__(self, batch: Batch, runner: Runner, finished: Finished, options: Options, watcher: Watcher) -> None:
        self._batch, self._runner, self._finished, self._options = batch, runner, finished, options
        self._watcher = watcher
        self.report = batch.report
        self._turn = threading.Lock()
        """Held while one job is posted."""
        self._recording = threading.Lock()
        self._changed = threading.Condition()
        self._next = 0
        self._active: set[str] = set()
        self._there: Delivered | None = None
        self._inputs: dict[str, jobs.Input] = {}
        self._cancelled = threading.Event()
        self._error: BaseException | None = None

    def deliver(self, needs: Sequence[Need], watcher: Watcher) -> Report:
        """Have the inputs of all files on the host, in one go (spec J-71)."""
        with self._runner.delivered(needs, watcher, digests=True) as there:
            self._take(there)
        self.report.inputs = there.report
        return there.report

    def _take(self, there: Delivered) -> None:
        self._there = there
        self._inputs = {each.place: each for each in there.inputs}

    def run(self, able: jobs.Capabilities, sinks: Sinks) -> BatchReport:
        """Go through all files; raises what is no failure of one of them, with everything cancelled."""
        threads = [
            threading.Thread(target=self._work, args=(sinks,), daemon=True, name=f"deltasync-each-{number}")
            for number in range(self.width(able))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error
        report = self.report
        report.left = report.files - report.done - report.skipped - len(report.failed)
        return report

    def width(self, able: jobs.Capabilities) -> int:
        """Return how many jobs there are at once: by the host's slots, and by its memory as it is now."""
        most = min(able.slots + WAITING, AT_ONCE_MAX, len(self._batch.files))
        if self._options.memory_bytes and able.memory_bytes:
            most = min(most, able.memory_free_bytes // self._options.memory_bytes)
        return max(1, most)

    def cancel(self) -> None:
        """End every job that is on the host, and begin no other."""
        with self._changed:
            self._cancelled.set()
            active = list(self._active)
            self._changed.notify_all()
        for job_id in active:
            self._end(job_id)

    def _end(self, job_id: str) -> None:
        with contextlib.suppress(DeltasyncError):  # the job's own end says how it went
            self._runner.jobs.cancel(job_id)

    # One thread

    def _work(self, sinks: Sinks) -> None:
        try:
            while (file := self._taken()) is not None:
                self._one(file, sinks)
        except BaseException as error:  # noqa: BLE001 - a worker reports it; the batch ends with it
            with self._changed:
                self._error = self._error or error
            self.cancel()

    def _taken(self) -> str | None:
        with self._changed:
            if self._cancelled.is_set() or self._next >= len(self._batch.files):
                return None
            self._next += 1
            return self._batch.files[self._next - 1]

    def _one(self, file: str, sinks: Sinks) -> None:
        """Take one file to its end, in as many attempts as it may have."""
        left = self._options.retries
        while True:
            try:
                self._attempt(file, sinks)
            except _Failed as failed:
                if left and failed.may_retry and not self._cancelled.is_set():
                    left -= 1
                    continue
                with self._recording:
                    if not self._cancelled.is_set():  # it is left for another time, and did not fail
                        self.report.failed.append(failed.failure)
            return

    def _attempt(self, file: str, sinks: Sinks) -> None:
        try:
            draft = self._batch.draft(file)
            with self._turn:
                posted = self._posted(file, draft)
        except RunTrouble as error:
            if isinstance(error, HostRefused) and error.facts.get("cause") != LimitExceeded.code:
                raise  # the next file would fare no better
            raise _Failed(Failure(shown(file), error.sentence), may_retry=False) from error
        if posted is None:
            return
        try:
            with sinks(file) as sink:
                job = self._runner.follow(posted.job, sink, is_raw=self._options.is_raw)
            self._home(file, draft, posted, job)
        finally:
            with self._changed:
                self._active.discard(posted.job.id)
                self._changed.notify_all()

    def _posted(self, file: str, draft: Draft) -> _Posted | None:
        """Have a job for a file; None where everything was cancelled meanwhile."""
        self._await_memory()
        if self._cancelled.is_set():
            return None
        job, record = self._post(draft)
        digest = self._there.digests.get(place_of(self._batch.path(file))) if self._there else None
        with self._changed:
            self._active.add(job.id)
            is_late = self._cancelled.is_set()
        if is_late:
            self._end(job.id)
        return _Posted(job, record, digest)

    def _await_memory(self) -> None:
        """Wait until the host has memory for one more job, or none of ours is there (spec J-71)."""
        while True:
            with self._changed:
                if self._cancelled.is_set() or not self._active:
                    return
            able = self._runner.jobs.capabilities()
            wanted = self._options.memory_bytes or min(MEMORY_BYTES, able.memory_bytes // 16)
            if able.memory_free_bytes >= wanted or not able.memory_bytes:
                return
            with self._changed:
                self._changed.wait(LOOK_SECONDS)

    def _post(self, draft: Draft) -> tuple[jobs.Job, Record]:
        key = secrets.token_hex(16)
        try:
            return self._runner.post(draft, key, self._inputs_of(draft), self._digests_of(draft))
        except (SequenceGone, NotFound):  # other commands have sent theirs since: what is left goes again
            needs = self._needs_left(draft)
        with self._runner.delivered(needs, self._watcher, may_keep=False, digests=True) as there:
            self._take(there)
            try:
                return self._runner.post(draft, key, self._inputs_of(draft), self._digests_of(draft))
            except (SequenceGone, NotFound) as error:
                raise HostRefused.of(error) from error

    def _needs_left(self, draft: Draft) -> list[Need]:
        needs = {each.path: each for each in draft.needs}
        for file in self._batch.files[self._next :]:
            with contextlib.suppress(UsageError, PlanRefused):  # it fails when its turn comes
                needs |= {each.path: each for each in self._batch.draft(file).needs if each.path not in needs}
        return list(needs.values())

    def _inputs_of(self, draft: Draft) -> list[jobs.Input]:
        """Return where the host has what one command reads; what lies in another input of it comes with that."""
        return [self._input(place, is_in_place=is_in_place) for place, is_in_place in _outermost(draft).items()]

    def _input(self, place: str, *, is_in_place: bool) -> jobs.Input:
        above = place
        while above not in self._inputs:
            above, _, _ = above.rpartition("/")
            if not above:
                raise SequenceGone(0, None, None)
        there = self._inputs[above]
        inside = place.removeprefix(above).removeprefix("/")
        path = "/".join(filter(None, (there.path, inside)))
        return jobs.Input(
            workspace=there.workspace, sequence=there.sequence, path=path, place=place, in_place=is_in_place
        )

    def _digests_of(self, draft: Draft) -> Mapping[str, bytes]:
        """Return the digests of what one command may change."""
        places = [place for place, is_in_place in _outermost(draft).items() if is_in_place]
        if not places or self._there is None:
            return {}
        known = self._there.digests
        return {
            place: digest for place, digest in known.items() if any(f"{place}/".startswith(f"{e}/") for e in places)
        }

    # The end of a job

    def _home(self, file: str, draft: Draft, posted: _Posted, job: jobs.Job) -> None:
        """Bring home what came of a file; raises _Failed."""
        name = shown(file)
        try:
            code = exit_code_of(job)
        except DeltasyncError as error:
            failure = Failure(name, error.sentence, job.id)
            raise _Failed(failure, may_retry=job.state is not jobs.State.CANCELLED) from error
        home = Home()
        if not code or self._options.fetch_failed:
            try:
                home = self._runner.fetch(posted.record, job, self._watcher)
            except OutputsNotHome as error:
                raise _Failed(Failure(name, error.sentence, job.id, code), may_retry=False) from error
        elif job.returned is None:
            self._runner.forget(posted.record)
        if code:
            raise _Failed(Failure(name, f"the command ended with {code}", job.id, code), may_retry=True)
        if not home.is_whole:
            told = "; ".join(f"{each.place}: {each.reason}" for each in home.problems[:3])
            raise _Failed(Failure(name, told, job.id, code), may_retry=False)
        with self._recording:
            self.report.done += 1
            self.report.output_files += home.files
            self.report.output_bytes += home.bytes
            self._finished.add(draft, self._batch.path(file), posted.digest)


def _outermost(draft: Draft) -> dict[str, bool]:
    """Return the places of the inputs that lie in no other one, and whether the command may change them (spec J-20)."""
    found: dict[str, bool] = {}
    for need in sorted(draft.needs, key=lambda each: each.path):
        place = place_of(need.path)
        place = next((each for each in found if f"{place}/".startswith(f"{each}/")), place)
        found[place] = found.get(place, False) or need.is_in_place
    return found
