"""`deltasync jobs`: what runs on a host, what it said, and bringing home what nobody was here for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from deltasync.cli.options import Call, command, new_app
from deltasync.cli.output import bytes_text, count_text
from deltasync.cli.progress import Meter
from deltasync.cli.run import WIRE, host_of, reached, way_on
from deltasync.cli.terminal import Streams, complain_all
from deltasync.client.job_records import JobBook, Record
from deltasync.client.telling import Telling
from deltasync.config import parse_seconds
from deltasync.core.errors import DeltasyncError, HostBusy, JobLost, NotFound, OutputsNotHome, UsageError
from deltasync.core.jobs import Job, LeftOutput, State
from deltasync.core.names import shown

if TYPE_CHECKING:
    from deltasync.client.run import Runner
    from deltasync.core.job_metrics import Metrics, Summary

Id = Annotated[str, typer.Argument(metavar="ID", help="Its id, as `jobs ls` and `run --detach` show it.")]

COMMAND_LETTERS = 80

app = new_app()


@app.callback()
def describe() -> None:
    """Look at the commands that run on a host, and bring home what they wrote."""


@command(app, "on", *WIRE, name="ls")
def list_jobs(
    call: Call,
    newest: Annotated[str, typer.Option("-n", metavar="N", help="The newest N; 0 for all [20].")] = "20",
) -> int:
    """List the jobs that a host remembers, the newest first."""
    if not (newest.isascii() and newest.isdigit()):
        raise UsageError(f"-n: {shown(newest)} is not a whole number; 0 lists all")
    with _at(call, None) as runner:
        known = runner.jobs.jobs()
    found = known[: int(newest)] if int(newest) else known
    call.out.answer({"url": runner.jobs.url, "jobs": [msgspec.to_builtins(each) for each in found]})
    width = max((len(_state(each)) for each in found), default=0)
    for each in found:
        call.out.say(f"{each.id}  {_state(each):<{width}}  {each.created_at}  {_cut(_command(each))}")
    if not found:
        call.out.say(f"{runner.jobs.url} remembers no job of yours")
    if len(found) < len(known):
        call.out.say(f"and {len(known) - len(found):,} older; -n 0 lists all")
    return 0


def _command(job: Job) -> str:
    """Return a job's command with the paths of this machine, as its log is told (spec J-65)."""
    telling = Telling(job.session_path)
    text = " ".join(job.command).encode(errors="surrogateescape")
    return (telling.told(text) + telling.rest()).decode(errors="replace")


def _cut(text: str) -> str:
    return text if len(text) <= COMMAND_LETTERS else text[: COMMAND_LETTERS - 1] + "…"


@command(app, "on", *WIRE)
def show(
    call: Call,
    job_id: Id,
    has_outputs: Annotated[bool, typer.Option("--outputs", help="List what it left, a line for each.")] = False,
) -> int:
    """Show one job: its state, what it was given, and what it returned."""
    with _at(call, job_id) as runner:
        job = runner.jobs.job(job_id)
        left = runner.jobs.outputs(job_id) if has_outputs else None
    call.out.answer(job if left is None else {**msgspec.to_builtins(job), "left": msgspec.to_builtins(left)})
    for name, value in _facts(job).items():
        call.out.say(f"{name:<10} {value}")
    for each in left.outputs if left is not None else ():
        call.out.say(f"output     {_output(each)}")
    return 0


def _output(left: LeftOutput) -> str:
    """Return a line on what a job left, by its path here."""
    path = f"/{shown(left.path)}"
    if left.kind is None:
        return f"{path}  is not on the host any more"
    return f"{path}  {bytes_text(left.size)}  {shown(left.digest)}" if left.kind == "file" else f"{path}/"


@command(app, "on", *WIRE)
def logs(
    call: Call,
    job_id: Id,
    follows: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job is over.")] = False,
    is_raw: Annotated[bool, typer.Option("--raw", help="Show the host's paths as the command says them.")] = False,
) -> int:
    """Show what a job said so far: its standard output and error, each on its own stream."""
    with _at(call, job_id) as runner:
        job = runner.jobs.job(job_id)
        until = None if follows or job.state.is_over else job.log_bytes
        job = runner.follow(job, Streams(is_aside=call.out.is_json), is_raw=is_raw, until=until)
    call.out.answer(job)
    return 0


@command(app, "on", *WIRE)
def wait(call: Call, job_id: Id) -> int:
    """Wait until a job is over, and return the exit code of its command, as `run` does."""
    from deltasync.client.run import exit_code_of

    with _at(call, job_id) as runner:
        job = runner.wait(job_id)
    call.out.answer(job)
    return exit_code_of(job)


@command(app, "on", *WIRE)
def cancel(call: Call, job_id: Id) -> int:
    """Cancel a job; one that is over stays as it is."""
    with _at(call, job_id) as runner:
        job = runner.jobs.job(job_id)
        if not job.state.is_over:
            job = runner.jobs.cancel(job_id)
    call.out.answer(job)
    call.out.say(f"{job.id} is {_state(job) if job.state.is_over else 'being cancelled'}")
    return 0


@command(app, "on", *WIRE, name="rm")
def remove(
    call: Call,
    ids: Annotated[list[str], typer.Argument(metavar="ID", help="Jobs that are over.")],
    forced: Annotated[
        bool, typer.Option("--force", help="Also where what it wrote is not home; nobody can fetch that any more.")
    ] = False,
) -> int:
    """Have the host forget jobs that are over: what they said and wrote, and the folder that --keep keeps."""
    gone = []
    for job_id in dict.fromkeys(ids):
        with _at(call, job_id) as runner:
            job = runner.jobs.job(job_id)
            _require_done_with(job, forced=forced)
            runner.jobs.cancel(job_id)
            with contextlib.suppress(NotFound):
                runner.forget(JobBook.of_user().named(job_id))
        gone.append(job_id)
        call.out.say(f"{job_id} is forgotten")
    call.out.answer({"jobs": gone})
    return 0


def _require_done_with(job: Job, *, forced: bool) -> None:
    """Raise UsageError for a job that goes on, or whose outputs nobody has."""
    if not job.state.is_over:
        raise UsageError(f"{job.id} is {job.state}; `deltasync jobs cancel {job.id}` ends it")
    if job.returned is not None and job.returned.places and not job.acknowledged and not forced:
        raise UsageError(
            f"what {job.id} wrote is not home; `deltasync jobs fetch {job.id}` brings it, `jobs rm --force` lets it go"
        )


@command(app, "on", *WIRE)
def fetch(
    call: Call,
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="ID", help="Without any, every job that was started here.")
    ] = None,
    fetch_failed: Annotated[
        bool, typer.Option("--fetch-failed", help="Without any ID, also of commands that failed.")
    ] = False,
) -> int:
    """Bring home what jobs wrote that nobody waited for.

    Exit 3 when something could not be brought home; it stays on the host, for the next fetch. Exit 124 when something
    was not written, or is neither a file nor a folder: it cannot come home.
    """
    book = JobBook.of_user()
    if ids:
        return _fetch_all(call, [book.named(each) for each in ids], is_named=True, fetch_failed=True)
    records = [each for each in reversed(book.records()) if not each.is_home]  # of one path the last one stays
    if not records:
        call.out.say("nothing that was started here waits to be brought home")
    return _fetch_all(call, records, is_named=False, fetch_failed=fetch_failed)


def fetch_waiting(call: Call, url: str) -> None:
    """Bring home what jobs of a host wrote, as far as that goes at once; for a watch that starts (spec J-63)."""
    for record in reversed(JobBook.of_user().records()):
        if record.url == url and not record.is_home:
            try:
                _fetched(call, record, is_named=False, fetch_failed=False)
            except DeltasyncError as error:
                call.out.note(f"{record.id}: {error.sentence}")


def _fetch_all(call: Call, records: list[Record], *, is_named: bool, fetch_failed: bool) -> int:
    answers, codes = [], [0]
    for record in records:
        try:
            answer, code = _fetched(call, record, is_named=is_named, fetch_failed=fetch_failed)
        except DeltasyncError as error:
            if is_named and len(records) == 1:
                raise
            call.out.warn(f"{record.id}: {error.sentence}")
            answer, code = {"job": record.id, "error": {"code": error.code, "detail": error.sentence}}, error.exit_code
        answers.append(answer)
        codes.append(code)
    call.out.answer({"jobs": answers})
    return max(codes, key=lambda code: (code not in (0, 3), code))


@command(app, "on", *WIRE)
def stats(
    call: Call,
    since: Annotated[
        str, typer.Option(metavar="TIME", help="Of the jobs that came so long ago, or later [24h].")
    ] = "24h",
) -> int:
    """Sum up what jobs moved, how long their steps took, and how many failed, as far as the host remembers them."""
    from datetime import UTC, datetime, timedelta

    from deltasync.core.job_metrics import summed

    try:
        start = datetime.now(UTC) - timedelta(seconds=parse_seconds(since))
    except (ValueError, OverflowError) as error:
        raise UsageError(f"--since: {shown(since)} is not a time such as 10m, 2h or 7d") from error
    with _at(call, None) as runner:
        found = summed(runner.jobs.jobs(), start)
    call.out.answer(
        {"url": runner.jobs.url, "since": start.isoformat(timespec="seconds"), **msgspec.to_builtins(found)}
    )
    for name, value in _sums(found).items():
        call.out.say(f"{name:<10} {value}")
    return 0


def _sums(found: Summary) -> dict[str, str]:
    """Return what is worth telling of many jobs, by its name."""
    total = found.totals
    states = ", ".join(f"{count} {state}" for state, count in found.states.items())
    return {
        "jobs": f"{found.jobs}{f': {states}' if states else ''}",
        "success": f"{found.success_rate:.0%}; {found.commands_failed} commands failed, {total.error_count} errors",
        **_figures(total),
    }


def _figures(of: Metrics) -> dict[str, str]:
    return {
        "in": f"{count_text(of.files_in, 'file')}, {bytes_text(of.bytes_in)}",
        "out": f"{count_text(of.files_out, 'file')}, {bytes_text(of.bytes_out)}",
        "seconds": f"{of.queued_seconds:.3f} queued, {of.staged_seconds:.3f} staged, {of.run_seconds:.3f} run, "
        f"{of.collected_seconds:.3f} collected",
        "speed": f"{bytes_text(int(of.bytes_per_second))}/s staged and collected",
    }


def _fetched(call: Call, record: Record, *, is_named: bool, fetch_failed: bool) -> tuple[dict[str, Any], int]:
    with _at(call, record.id) as runner:
        try:
            job = runner.jobs.job(record.id)
        except NotFound:
            if is_named:
                raise
            call.out.note(f"{record.id} is not known to {runner.jobs.url}, or not to this client's token")
            return {"job": record.id, "outputs": None}, 3
        if not job.state.is_over:
            if is_named:
                raise HostBusy(f"{job.id} is {job.state}; `deltasync jobs wait {job.id}` waits for its end")
            return {"job": job.id, "state": job.state.value, "outputs": None}, 0
        if is_named and job.state is not State.DONE:
            raise JobLost(_lost(job), job=job.id)
        if job.state is not State.DONE:
            runner.forget(record)
            call.out.warn(_lost(job))
            return {"job": job.id, "state": job.state.value, "outputs": None}, 0
        if job.returned is not None and (job.exit_code or job.signal) and not fetch_failed:
            call.out.note(f"{job.id} failed; `deltasync jobs fetch {job.id}` brings home what it wrote all the same")
            return {"job": job.id, "state": job.state.value, "outputs": None}, 0
        home = runner.fetch(record, job, Meter())
    complain_all(call, [(each.place, each.reason) for each in home.problems])
    if home.is_whole and (job.acknowledged or job.returned is None):
        call.out.say(f"{job.id}: {'it is home already' if job.returned else 'it wrote nothing that was to come home'}")
    elif home.paths or home.is_whole:
        call.out.say(f"{job.id}: {bytes_text(home.bytes)} home, {bytes_text(home.fetched_bytes)} fetched")
    for path in home.paths:
        call.out.detail(f"  {path}")
    answer = {"job": job.id, "state": job.state.value, "outputs": msgspec.to_builtins(home)}
    if home.is_whole:
        return answer, 0
    call.out.warn(f"not everything that {job.id} was to write is here; {way_on(home, job)}")
    return answer, 3 if home.is_left else OutputsNotHome.exit_code


def _lost(job: Job) -> str:
    verb = "" if job.state is State.FAILED else "was "
    return f"{job.id} {verb}{job.state}: {shown(job.reason)}; it returned nothing"


@contextlib.contextmanager
def _at(call: Call, job_id: str | None) -> Iterator[Runner]:
    """Lend what speaks with the host of a job: as the job's record says, as given, or the only one."""
    from deltasync.client.run import Runner

    settings, book = call.settings(), JobBook.of_user()
    url = settings.on
    if job_id is not None:
        with contextlib.suppress(NotFound):
            url = book.named(job_id).url
    if url is None:
        started_at = {each.url for each in book.records()}
        url = started_at.pop() if len(started_at) == 1 else host_of(settings, [])
    with reached(settings, url) as transport:
        yield Runner(transport, note=call.out.note)


def _state(job: Job) -> str:
    if job.exit_code or job.signal:
        return f"{job.state} ({f'exit {job.exit_code}' if job.exit_code else f'signal {job.signal}'})"
    return f"{job.state}{f' ({job.ahead} ahead)' if job.ahead else ''}"


def _facts(job: Job) -> dict[str, object]:
    """Return what is worth telling of a job, by its name."""
    returned = job.returned
    facts = {
        "job": job.id,
        "state": _state(job),
        "reason": job.reason,
        "command": _command(job),
        "session": job.session_path,
        "kept": f"until {job.kept_until}; `deltasync jobs rm {job.id}` lets the folder go" if job.kept_until else "",
        "created": job.created_at,
        "started": job.started_at,
        "ended": job.ended_at,
        "gpus": ", ".join(map(str, job.gpus)),
        "inputs": f"{count_text(job.input_files, 'file')}, {bytes_text(job.input_bytes)}",
        "log": bytes_text(job.log_bytes),
        "returned": returned and f"{count_text(returned.files, 'file')}, {bytes_text(returned.bytes)}",
        "home": "yes" if job.acknowledged else "",
    }
    figures = {name: text for name, text in _figures(job.metrics).items() if name == "seconds"} if job.metrics else {}
    return {name: value for name, value in (facts | figures).items() if value}
