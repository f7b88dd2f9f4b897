"""`deltasync run`: run a command on a host as if it were here."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from deltasync.cli import options
from deltasync.cli.asked import (
    Environment,
    InPlace,
    Inputs,
    Literals,
    Outputs,
    Shell,
    Words,
    argv_of,
    number_of,
    seconds_of,
    size_of,
    variable,
    words_of,
)
from deltasync.cli.options import Call, command, new_app
from deltasync.cli.output import bytes_text, count_text
from deltasync.cli.progress import Meter, meter
from deltasync.cli.terminal import Aside, Interrupts, Streams, complain_all, note_stdin, shown_meter
from deltasync.config import Settings
from deltasync.core.argv import Role, Said, plan
from deltasync.core.errors import Cancelled, DeltasyncError, OutputsNotHome, PlanRefused, UsageError
from deltasync.core.jobs import Job
from deltasync.core.names import shown

if TYPE_CHECKING:
    from deltasync.client.job_records import Record
    from deltasync.client.job_request import Asked
    from deltasync.client.run import Home, Runner, Started
    from deltasync.client.template import Template
    from deltasync.client.transport import HttpTransport

WIRE = tuple(key for key in options.WIRE if key != "timeout")
_GPUS_MAX, _PRIORITY_MAX, _RETRIES_MAX = 1024, 1000, 100

app = new_app()


@command(app, "on", *WIRE, "settle", stops_at_word=True)
def run(
    call: Call,
    words: Words = None,
    inputs: Inputs = None,
    outputs: Outputs = None,
    literals: Literals = None,
    environment: Environment = None,
    is_in_place: InPlace = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say what each word is, and why; send and run nothing.")
    ] = False,
    is_raw: Annotated[bool, typer.Option("--raw", help="Show the host's paths as the command says them.")] = False,
    fetch_failed: Annotated[
        bool, typer.Option("--fetch-failed", help="Bring outputs home also where the command fails.")
    ] = False,
    timeout: Annotated[str | None, typer.Option(metavar="TIME", help="End the command after so long.")] = None,
    gpus: Annotated[str, typer.Option(metavar="N", help="Wait for so many GPUs, and use no others [0].")] = "0",
    priority: Annotated[str, typer.Option(metavar="N", help="Higher goes first [0].")] = "0",
    keep: Annotated[
        str, typer.Option(metavar="TIME", help="Keep the folder on the host so long after the end [0].")
    ] = "0",
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Return when the host has the job; `jobs fetch` brings home.")
    ] = False,
    is_reused: Annotated[
        bool, typer.Option("--reuse", help="Take the result of an equal job that ended with 0, if there is one.")
    ] = False,
    tool_version: Annotated[
        str | None, typer.Option(metavar="COMMAND", help="With --reuse: jobs are equal where this says the same there.")
    ] = None,
    is_prestaged: Annotated[
        bool, typer.Option("--prestage", help="Have the inputs on the host, and run nothing yet.")
    ] = False,
    is_shut_in: Annotated[
        bool,
        typer.Option(
            "--sandbox", help="Shut the command in there: it writes its own folder alone, and has no network."
        ),
    ] = False,
    has_network: Annotated[bool, typer.Option("--net", help="Leave it the network in the sandbox.")] = False,
    shell: Shell = None,
    each: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Run TOOL once for each file that fits, which is {}; repeatable."),
    ] = None,
    out_dir: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="With --each: {out} is the file's name in this folder.")
    ] = None,
    retries: Annotated[str, typer.Option(metavar="N", help="With --each: run what failed so often again [0].")] = "0",
    is_resumed: Annotated[
        bool, typer.Option("--resume", help="With --each: leave out what is done, and is still here.")
    ] = False,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="With --each: what one command takes of the host's memory.")
    ] = None,
) -> int:
    """Run a command on a host: the files that it names go there, what it says and writes comes back.

    It runs in an empty folder of its own, and gets no standard input; its inputs and outputs lie elsewhere, and the
    words that name them say where. Files are found by themselves; --explain shows them, {in:PATH} and {out:PATH} in a
    word say what is not clear. Without --on the host is that of the workspace that holds the first input, or the only
    known one. The exit code is the command's (128+N for signal N); 121 the plan is refused, 122 the host is unreachable
    or refuses, 123 inputs could not be sent, 124 outputs are not here, 125 the job was cancelled or lost. Ctrl-C
    cancels, a second one within a second leaves the job to the host. With --json the command's words go to stderr. With
    --each, {stem}, {name} and {ext} are the parts of the file's name, and the exit code is 0, or 3 where some failed.
    """
    argv = argv_of(words or [], shell)
    said = Said(frozenset(inputs or ()), frozenset(outputs or ()), frozenset(literals or ()), is_in_place)
    if tool_version is not None and not is_reused:
        raise PlanRefused("--tool-version is for --reuse")
    if has_network and not is_shut_in:
        raise PlanRefused("--net is for --sandbox: without it the command has the host's network")
    if each is None and (out_dir is not None or is_resumed or memory is not None or retries != "0"):
        raise PlanRefused("--out-dir, --retries, --resume and --memory are for --each")
    if explain and each is None:
        return _explain(call, argv, said)
    from deltasync.client.job_request import Asked
    from deltasync.client.template import Template

    settings = call.settings()
    asked = Asked(
        argv,
        said,
        dict(variable(each) for each in environment or ()),
        timeout_seconds=seconds_of("--timeout", timeout) if timeout is not None else None,
        gpus=number_of("--gpus", gpus, 0, _GPUS_MAX),
        priority=number_of("--priority", priority, -_PRIORITY_MAX, _PRIORITY_MAX),
        keep_seconds=seconds_of("--keep", keep),
        is_reused=is_reused,
        tool_version=words_of("--tool-version", tool_version or ""),
        is_shut_in=is_shut_in,
        has_network=has_network,
    )
    if each is not None and explain:
        return _explain_first(call, Template(asked, out_dir), each)
    if each is not None:
        from deltasync.cli.each import run_each
        from deltasync.client.each import Options

        if detach:
            raise PlanRefused("--each does not go with --detach")
        size = size_of("--memory", memory) if memory is not None else None
        options = Options(
            number_of("--retries", retries, 0, _RETRIES_MAX), size, is_raw=is_raw, fetch_failed=fetch_failed
        )
        return run_each(
            call, settings, Template(asked, out_dir), each, options, is_resumed=is_resumed, is_prestaged=is_prestaged
        )
    if is_prestaged:
        from deltasync.cli.prestage import prestage

        return prestage(call, settings, asked)
    return _Command(call, settings, is_raw=is_raw, fetch_failed=fetch_failed, detach=detach).run(asked)


def _explain(call: Call, argv: list[str], said: Said) -> int:
    from deltasync.client.looking import Looking

    found = plan(argv, Looking(os.getcwd()), said)  # noqa: PTH109
    rows = [
        {
            "word": shown(word.text),
            "is": ", ".join(dict.fromkeys(each.role.value for each in word.pieces if each.role is not Role.LITERAL))
            or Role.LITERAL.value,
            "paths": [shown(each.path) for each in word.pieces if each.role is not Role.LITERAL],
            "why": word.why,
        }
        for word in found.words
    ]
    paths = {"inputs": [*map(shown, found.inputs)], "outputs": [*map(shown, found.outputs)]}
    call.out.answer({"words": rows, **paths})
    width = max(len(str(row["word"])) for row in rows)
    for row in rows:
        call.out.say(f"{row['word']:<{min(width, 60)}}  {row['is']:<8}  {row['why']}")
    for kind, each in paths.items():
        for path in each:
            call.out.say(f"{kind[:-1]}: {path}")
    return 0


def _explain_first(call: Call, template: Template, patterns: list[str]) -> int:
    """Say what each word is for the first file that fits; the others fare as it does."""
    from deltasync.client.looking import expanded

    template.require_holes()
    files = expanded(patterns, os.getcwd())  # noqa: PTH109
    call.out.say(f"for {files[0]}, the first of {count_text(len(files), 'file')}:")
    asked = template.of(files[0])
    return _explain(call, list(asked.argv), asked.said)


# Where it runs


def host_of(settings: Settings, paths: list[str]) -> str:
    """Return the address of the host: as given, that of the first path's workspace, or of the only known host."""
    from deltasync.client.hosts import HostBook
    from deltasync.client.kept import receiver_of, workspace_of

    if settings.on is not None:
        return settings.on
    for path in paths[:1]:
        root = workspace_of(os.path.realpath(path))
        url = receiver_of(root) if root is not None else None
        if url is not None and not url.startswith("file:"):
            return url
    hosts = HostBook.of_user(os.environ).hosts()
    if len(hosts) != 1:
        known = f"; known are {', '.join(each.name for each in hosts)}" if hosts else ", or `deltasync host add`"
        raise UsageError(f"say where: --on HOST{known}")
    return hosts[0].url


@contextlib.contextmanager
def reached(settings: Settings, url: str) -> Iterator[HttpTransport]:
    """Lend the transport to a host that may run commands."""
    from deltasync.client.transport import HttpTransport

    transport = options.transport(settings, url)
    if not isinstance(transport, HttpTransport):
        raise UsageError(f"{shown(url)} is a folder, which runs nothing; name a server with --on")
    with contextlib.closing(transport):
        yield transport


# Running it


class _Command:
    """One call of `run`, from its plan to its exit code."""

    def __init__(self, call: Call, settings: Settings, *, is_raw: bool, fetch_failed: bool, detach: bool) -> None:
        self._call, self._settings = call, settings
        self._is_raw, self._fetch_failed, self._detach = is_raw, fetch_failed, detach
        out = call.out
        self._out = Aside(json=out.is_json, quiet=out.is_quiet, verbose=out.is_verbose)

    def run(self, asked: Asked) -> int:
        """Plan, send, run, fetch."""
        from deltasync.client.job_request import drafted
        from deltasync.client.run import Runner

        draft = drafted(asked, os.getcwd())  # noqa: PTH109
        url = host_of(self._settings, [each.path for each in draft.needs])
        with reached(self._settings, url) as transport:
            with shown_meter(self._out) as progress:
                runner = Runner(transport, note=self._out.note, settle_seconds=self._settings.settle_seconds)
                started = runner.start(draft, progress)
            self._say_sent(started)
            note_stdin(self._out)
            if self._detach:
                answer = {"job": started.job.id, "url": url, "inputs": msgspec.to_builtins(started.inputs)}
                self._call.out.answer(answer)
                self._call.out.say(started.job.id)
                return 0
            return self._followed(runner, started)

    def _followed(self, runner: Runner, started: Started) -> int:
        job = follow(self._call, runner, started.job, is_raw=self._is_raw)
        answer = {"job": job.id, "url": runner.jobs.url, "state": job.state.value, "exit_code": job.exit_code}
        if job.reused:
            self._out.say(f"{job.id}: the result of {job.reused}, which was the same; nothing was run")
        answer |= {"signal": job.signal, "reused": job.reused or None, "inputs": msgspec.to_builtins(started.inputs)}
        return ended(self._call, runner, started.record, job, answer, fetch_failed=self._fetch_failed)

    def _say_sent(self, started: Started) -> None:
        report = started.inputs
        self._out.say(
            f"{started.job.id}: {count_text(report.files, 'file')}, {bytes_text(report.bytes)}; "
            f"{bytes_text(report.sent_bytes)} sent, {bytes_text(report.kept_bytes)} in sync, "
            f"{bytes_text(report.cached_bytes)} in the cache"
        )
        complain_all(self._call, [(each.path, each.reason) for each in report.problems])


def follow(call: Call, runner: Runner, job: Job, *, is_raw: bool) -> Job:
    """Show what a job says until it is over; Ctrl-C once cancels it, twice within a second lets it go on."""

    def cancel() -> None:
        try:
            call.out.note(f"cancelling {job.id}; Ctrl-C again waits no longer for its end")
            if not runner.jobs.job(job.id).state.is_over:  # a cancel of one that is over forgets it
                runner.jobs.cancel(job.id)
        except DeltasyncError as error:
            call.out.note(f"{job.id} could not be cancelled, and may go on: {error}")

    def announce() -> None:
        with contextlib.suppress(Exception):
            call.out.note(f"Ctrl-C again within a second leaves {job.id} to its host")

    sink, interrupts = Streams(is_aside=call.out.is_json), Interrupts(cancel, announce)
    try:
        with interrupts:
            return runner.follow(job, sink, is_raw=is_raw)
    except KeyboardInterrupt:
        if interrupts.has_cancelled:
            raise Cancelled(f"{job.id} is being cancelled; `deltasync jobs show {job.id}` says how it ended") from None
        raise Cancelled(f"left {job.id} to its host; `deltasync jobs wait {job.id}` waits for it") from None
    except BrokenPipeError:
        cancel()  # as a command here that writes into a pipe without a reader
        raise


def ended(call: Call, runner: Runner, record: Record, job: Job, answer: dict[str, Any], *, fetch_failed: bool) -> int:
    """Bring home what a job that is over returned, and return the exit code; raises JobLost."""
    from deltasync.client.run import exit_code_of

    code = exit_code_of(job)
    if code and not fetch_failed:
        if job.returned is None:
            runner.forget(record)
        else:
            call.out.note(f"what it wrote stays on the host; `deltasync jobs fetch {job.id}` brings it home")
        call.out.answer({**answer, "outputs": None})
        return code
    with meter(call.out) if sys.stderr.isatty() else contextlib.nullcontext(Meter()) as progress:
        home = runner.fetch(record, job, progress)
    call.out.answer({**answer, "outputs": msgspec.to_builtins(home)})
    complain_all(call, [(each.place, each.reason) for each in home.problems])
    if not code and not home.is_whole:
        call.out.warn(f"not everything that {job.id} was to write is here; {way_on(home, job)}")
        return OutputsNotHome.exit_code
    return code


def way_on(home: Home, job: Job) -> str:
    """Say what can be done about outputs that are not here: nothing more comes of a job that was acknowledged."""
    if home.is_left:
        return f"`deltasync jobs fetch {job.id}` tries again"
    return "these cannot come home: only files and folders do, from where the command was told to write them"
