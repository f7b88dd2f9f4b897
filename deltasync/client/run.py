"""Running a command on a host as if it were here: its inputs go there, what it says and writes comes back."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import msgspec

from deltasync.client import inputs
from deltasync.client.allowance import require_allowed
from deltasync.client.fetch import Watcher
from deltasync.client.homecoming import bring_home
from deltasync.client.inputs import delivered
from deltasync.client.job_records import JobBook, Record
from deltasync.client.job_request import Draft
from deltasync.client.job_transport import JobTransport
from deltasync.client.opening import client_id
from deltasync.client.telling import Telling
from deltasync.client.transport import HttpTransport
from deltasync.core import jobs
from deltasync.core.errors import (
    DeltasyncError,
    Forbidden,
    HostBusy,
    HostRefused,
    HostUnreachable,
    HostUntrusted,
    InputsNotSent,
    JobLost,
    NotADeltasyncServer,
    NotFound,
    OutputsNotHome,
    RunTrouble,
    SequenceGone,
    Unauthorized,
    UsageError,
    of_run,
)
from deltasync.core.names import shown

GRAIN_NS = 20_000_000
"""By how much a file system may note a change earlier than the clock says: its own goes on by ticks."""
NOT_WRITTEN = "was not written; the command ran in a folder of its own, so a relative name in a script is not it"
_OF_OTHERS = (Forbidden, HostBusy, HostUnreachable, HostUntrusted, NotADeltasyncServer, Unauthorized, UsageError)
"""What is no failure of the inputs or outputs, whenever it happens."""


class Sink(Protocol):
    """Takes what a command says, as it says it."""

    def out(self, content: bytes) -> None:
        """Take a part of its standard output."""

    def err(self, content: bytes) -> None:
        """Take a part of its standard error."""


@dataclass(frozen=True, slots=True)
class Started:
    """A job that the host has, and what it took to have its inputs there."""

    job: jobs.Job
    record: Record
    inputs: inputs.Report


@dataclass(slots=True)
class Home:
    """What came home of a job: the member `outputs` of `run --json`."""

    paths: list[str] = field(default_factory=list)
    """Where they are, safe to print."""
    files: int = 0
    bytes: int = 0
    fetched_bytes: int = 0
    problems: list[jobs.Trouble] = field(default_factory=list)
    """Paths that are not as the command wrote them, and what it wrote that nobody named."""
    is_whole: bool = True
    """Everything that was named, and that the command wrote, is here."""
    is_left: bool = False
    """Something that belongs here is still on the host, and a fetch may bring it."""


class Runner:
    """Runs commands on one host."""

    def __init__(self, transport: HttpTransport, *, note: Callable[[str], None], settle_seconds: float = 2.0) -> None:
        """Ask nothing yet. note: takes a sentence for the user."""
        self._transport, self._note, self._settle_seconds = transport, note, settle_seconds
        self.jobs = JobTransport(transport)
        self._book = JobBook.of_user()

    def start(self, draft: Draft, watcher: inputs.Watcher) -> Started:
        """Have the inputs on the host, and the job after them; it is recorded here before anything else is done."""
        require_allowed(self.require_leave(is_shut_in=draft.asked.is_shut_in), draft.asked, draft.needs)
        key = secrets.token_hex(16)
        try:
            return self._started(draft, key, watcher, may_keep=True)
        except (SequenceGone, NotFound) as error:  # what a workspace had there is gone
            self._note(f"{error.sentence}; the inputs are sent by themselves")
        return self._started(draft, key, watcher, may_keep=False)

    def require_leave(self, *, is_shut_in: bool = False) -> jobs.Capabilities:
        """Return what the host has for jobs; raises HostRefused where it would refuse any (spec J-67)."""
        try:
            able = self.jobs.capabilities()
        except NotFound as error:
            raise HostRefused(f"{self.jobs.url} is of a release that runs no commands") from error
        except DeltasyncError as error:
            raise of_run(error) from error
        if not able.runs:
            raise HostRefused(f"{self.jobs.url} runs no commands for this client: {shown(able.why)}")
        if is_shut_in and not able.sandbox:  # spec J-86
            why = shown(able.sandbox_why) or "it is of a release that cannot"
            raise HostRefused(f"{self.jobs.url} can shut no command in: {why}; run it without --sandbox")
        return able

    @contextlib.contextmanager
    def delivered(
        self, needs: Sequence[inputs.Need], watcher: inputs.Watcher, *, may_keep: bool = True, digests: bool = False
    ) -> Iterator[inputs.Delivered]:
        """Have inputs on the host while the block runs; what fails before it is InputsNotSent."""
        with contextlib.ExitStack() as stack:
            with _failing(InputsNotSent):
                there = stack.enter_context(
                    delivered(
                        self._transport,
                        needs,
                        watcher=watcher,
                        note=self._note,
                        settle_seconds=self._settle_seconds,
                        may_keep=may_keep,
                        digests_of_all=digests,
                    )
                )
            yield there

    def _started(self, draft: Draft, key: str, watcher: inputs.Watcher, *, may_keep: bool) -> Started:
        with self.delivered(draft.needs, watcher, may_keep=may_keep) as there:
            try:
                job, record = self.post(draft, key, there.inputs, there.digests)
            except (SequenceGone, NotFound) as error:
                if may_keep and there.is_any_kept:
                    raise
                raise HostRefused.of(error) from error
            return Started(job, record, there.report)

    def post(
        self, draft: Draft, key: str, found: list[jobs.Input], digests: Mapping[str, bytes]
    ) -> tuple[jobs.Job, Record]:
        """Have a command run with inputs that the host has, and record it here; raises SequenceGone, NotFound."""
        started_at = datetime.now(UTC)
        try:
            job = self.jobs.start(draft.request(key, client_id(), found))
        except (SequenceGone, NotFound):
            raise
        except DeltasyncError as error:
            raise of_run(error) from error
        record = Record(
            id=job.id,
            url=self.jobs.url,
            command=[shown(each) for each in draft.asked.argv],
            started_at=started_at.isoformat(timespec="microseconds"),
            outputs=list(draft.outputs),
            named=list(draft.named),
            in_place={each.place: str(Path("/" + each.place).resolve()) for each in found if each.in_place},
            digests={place: digest.hex() for place, digest in digests.items()},
        )
        self._book.write(record)
        return job, record

    def follow(self, job: jobs.Job, sink: Sink, *, is_raw: bool = False, until: int | None = None) -> jobs.Job:
        """Hand on what a job says until it is over, or to a place in its log, and return it as it is then."""
        session = "" if is_raw else job.session_path
        ways = {"stdout": (Telling(session), sink.out), "stderr": (Telling(session), sink.err)}
        with _failing(HostRefused):
            for event in self.jobs.logs(job.id) if until != 0 else ():
                if event.kind in ways:
                    telling, put = ways[event.kind]
                    put(telling.told(event.content))
                elif event.kind == "gap":
                    self._note(f"{shown(event.content.decode(errors='replace'))} bytes of what it said were not kept")
                elif event.job is not None:
                    if event.job.ahead and event.job.ahead != job.ahead:
                        self._note(f"{job.id} waits; {event.job.ahead} go first")
                    job = event.job
                if until is not None and event.at is not None and event.at >= until:
                    break
        for telling, put in ways.values():
            put(telling.rest())
        return job

    def wait(self, job_id: str) -> jobs.Job:
        """Return a job once it is over; what it says is not fetched."""
        job = self.jobs.job(job_id)
        while not job.state.is_over:
            for event in self.jobs.logs(job_id, job.log_bytes):
                job = event.job or job
        return job

    def forget(self, record: Record) -> None:
        """Say that nothing more comes of a job."""
        self._book.write(msgspec.structs.replace(record, is_home=True))

    def fetch(self, record: Record, job: jobs.Job, watcher: Watcher) -> Home:
        """Bring home what a job returned, and tell the host when everything is here (spec J-62, J-63)."""
        home = Home()
        _tell_lacking(record, job, home)
        if job.returned is None or job.acknowledged:
            self.forget(record)
            return home
        began_ns, is_home = time.time_ns() - GRAIN_NS, False
        try:
            with _failing(OutputsNotHome):
                if self._bring(record, job.returned, home, watcher):
                    self.jobs.acknowledge(job.id)
                    is_home = True
        finally:
            came = [*record.came, (began_ns, time.time_ns())]
            self._book.write(msgspec.structs.replace(record, came=came, is_home=is_home))
        return home

    def _bring(self, record: Record, returned: jobs.Returned, home: Home, watcher: Watcher) -> bool:
        """Fill in what came home, and tell whether that is everything that the host has for it."""
        targets = {place: path for place in returned.places if (path := record.target(place)) is not None}
        others = [place for place in returned.places if place not in targets]
        report = bring_home(
            self._transport,
            returned,
            targets,
            watcher,
            in_place=record.sent(targets),
            may_replace=self._book.judge(record),
            job_id=record.id,
        )
        wrong = {each.path for each in report.problems} | set(report.damaged)
        home.paths = [told for path in targets.values() if (told := shown(str(path))) not in wrong]
        home.files, home.bytes, home.fetched_bytes = report.files, report.bytes, report.fetched_bytes
        home.problems += [jobs.Trouble(place=each.path, reason=each.reason) for each in report.problems]
        home.problems += [jobs.Trouble(place=each, reason="came wrong from the host, twice") for each in report.damaged]
        home.problems += [
            jobs.Trouble(place=shown(each), reason="was not asked for, and stays there") for each in others
        ]
        home.is_left = bool(report.problems or report.damaged)
        home.is_whole &= not home.is_left
        return not home.is_left


def _tell_lacking(record: Record, job: jobs.Job, home: Home) -> None:
    """Say what cannot come home, now or later: what the host left out, and what was named and never written."""
    problems = job.returned.problems if job.returned is not None else []
    for each in problems:
        place = shown(f"/{each.place}") if each.place else ""
        home.problems.append(jobs.Trouble(place=place, reason=shown(each.reason)))
        home.is_whole &= not record.names(each.place)
    if job.state is not jobs.State.DONE or job.exit_code:  # spec J-62: of a command that failed nobody expects it
        return
    places = job.returned.places if job.returned is not None else []
    home.is_whole &= bool(places) or not problems  # spec J-64: all that it left stays there
    for place in record.missing([*places, *(each.place for each in problems)]):
        home.problems.append(jobs.Trouble(place=shown(f"/{place}"), reason=NOT_WRITTEN))
        home.is_whole = False


def exit_code_of(job: jobs.Job) -> int:
    """Return what a command ended with (spec J-64); raises JobLost for a job that did not run to its end."""
    if job.state is jobs.State.DONE and job.signal is not None:
        return 128 + job.signal
    if job.state is jobs.State.DONE and job.exit_code is not None:
        return job.exit_code
    said = {
        jobs.State.CANCELLED: "was cancelled",
        jobs.State.LOST: "was lost by its host",
        jobs.State.FAILED: "failed",
    }.get(job.state, f"is {job.state}")
    reason = f": {shown(job.reason)}" if job.reason else ""
    raise JobLost(f"the job {job.id} {said}{reason}", job=job.id, state=job.state.value)


@contextlib.contextmanager
def _failing(kind: type[RunTrouble]) -> Iterator[None]:
    """Give an error the exit code of the step that it happened in, unless it is the host's, or the plan's."""
    try:
        yield
    except DeltasyncError as error:
        raise (of_run(error) if isinstance(error, _OF_OTHERS) else kind.of(error)) from error
