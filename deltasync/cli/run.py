"""`deltasync run`: run a command on a host as if it were here."""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, Self

import msgspec
import typer

from deltasync.cli import options
from deltasync.cli.options import Call, command, new_app
from deltasync.cli.output import Output, bytes_text, count_text
from deltasync.cli.progress import Meter, meter
from deltasync.config import Settings, parse_seconds, parse_size
from deltasync.core.argv import Role, Said, plan
from deltasync.core.errors import Cancelled, OutputsNotHome, PlanRefused, UsageError
from deltasync.core.jobs import Job
from deltasync.core.names import shown

if TYPE_CHECKING:
    from types import FrameType

    from deltasync.client.job_records import Record
    from deltasync.client.job_request import Asked
    from deltasync.client.run import Home, Runner, Started
    from deltasync.client.template import Template
    from deltasync.client.transport import HttpTransport

PROBLEMS_SHOWN = 20
GRACE_SECONDS = 1.0
"""How long after a Ctrl-C a second one is waited for, before the job is cancelled."""
WIRE = tuple(key for key in options.WIRE if key != "timeout")
_GPUS_MAX, _PRIORITY_MAX, _RETRIES_MAX = 1024, 1000, 100

app = new_app()


@command(app, "on", *WIRE, "settle", stops_at_word=True)
def run(
    call: Call,
    words: Annotated[list[str] | None, typer.Argument(metavar="-- TOOL ARG", help="The command.")] = None,
    inputs: Annotated[
        list[str] | None, typer.Option("--in", metavar="PATH", help="The command reads this; repeatable.")
    ] = None,
    outputs: Annotated[
        list[str] | None, typer.Option("--out", metavar="PATH", help="The command writes this; repeatable.")
    ] = None,
    literals: Annotated[
        list[str] | None, typer.Option("--literal", metavar="WORD", help="This word is no path; repeatable.")
    ] = None,
    environment: Annotated[
        list[str] | None,
        typer.Option("--env", metavar="NAME=VALUE", help="A variable; a path that is here is sent; repeatable."),
    ] = None,
    is_in_place: Annotated[
        bool, typer.Option("--in-place", help="The command may change its inputs; those come home.")
    ] = False,
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
    shell: Annotated[
        str | None, typer.Option(metavar="COMMAND", help="Have sh run this line there, instead of TOOL.")
    ] = None,
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
        timeout_seconds=_seconds("--timeout", timeout) if timeout is not None else None,
        gpus=_number("--gpus", gpus, 0, _GPUS_MAX),
        priority=_number("--priority", priority, -_PRIORITY_MAX, _PRIORITY_MAX),
        keep_seconds=_seconds("--keep", keep),
        is_reused=is_reused,
        tool_version=_words("--tool-version", tool_version or ""),
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
        size = _size("--memory", memory) if memory is not None else None
        options = Options(
            _number("--retries", retries, 0, _RETRIES_MAX), size, is_raw=is_raw, fetch_failed=fetch_failed
        )
        return run_each(
            call, settings, Template(asked, out_dir), each, options, is_resumed=is_resumed, is_prestaged=is_prestaged
        )
    if is_prestaged:
        from deltasync.cli.prestage import prestage

        return prestage(call, settings, asked)
    return _Command(call, settings, is_raw=is_raw, fetch_failed=fetch_failed, detach=detach).run(asked)


# What is asked


def argv_of(words: list[str], shell: str | None) -> list[str]:
    """Return the command's words; raises PlanRefused where there are none, or two commands."""
    if shell is not None and words:
        raise PlanRefused("--shell is the whole command; leave the words behind -- out")
    if shell is None and not words:
        raise PlanRefused("there is no command; give it behind --")
    return words if shell is None else ["sh", "-c", shell]


def variable(text: str) -> tuple[str, str]:
    """Return the name and value of a variable of the command; raises PlanRefused."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise PlanRefused(f"--env: {shown(text)} is not NAME=VALUE")
    return name, value


def _seconds(option: str, text: str) -> float:
    try:
        return parse_seconds(text)
    except (ValueError, OverflowError) as error:
        raise PlanRefused(f"{option}: {shown(text)} is not a time such as 30s, 10m or 2h") from error


def _words(option: str, text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise PlanRefused(f"{option}: {shown(text)} has a quote without an end") from error


def _size(option: str, text: str) -> int:
    try:
        return parse_size(text)
    except (ValueError, OverflowError) as error:
        raise PlanRefused(f"{option}: {shown(text)} is not a size such as 500M or 4G") from error


def _number(option: str, text: str, least: int, most: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = most + 1
    if not least <= number <= most:
        raise PlanRefused(f"{option}: {shown(text)} is not a whole number from {least} to {most}")
    return number


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


class Aside(Output):
    """An output whose words for people go to stderr: stdout is the command's."""

    def say(self, line: str) -> None:
        """Print a line for people who asked for more."""
        if self.is_verbose and not self.is_json:
            self.note(line)


@contextlib.contextmanager
def shown_meter(out: Output) -> Iterator[Meter]:
    """Lend what shows how far the sending is, to people who look at it."""
    if sys.stderr.isatty() or out.is_verbose:
        with meter(out) as progress:
            yield progress
    else:
        yield Meter()


def note_stdin(out: Output) -> None:
    """Say that a command gets no standard input, where somebody has put something there for it (spec J-65)."""
    if _stdin_holds():
        out.note("the command gets no standard input; name a file that it reads")


def _stdin_holds() -> bool:
    """Tell whether standard input is a file or a pipe with something in it; reads nothing."""
    try:
        descriptor = sys.stdin.fileno()
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode):
            return status.st_size > os.lseek(descriptor, 0, os.SEEK_CUR)
        if not stat.S_ISFIFO(status.st_mode):
            return False
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return any(events & select.POLLIN for _, events in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # there is none
        return False


class Streams:
    """The streams of this process, as a sink; with `is_aside` both are stderr."""

    def __init__(self, *, is_aside: bool = False) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._out = sys.stderr.buffer if is_aside else sys.stdout.buffer

    def out(self, content: bytes) -> None:
        """Write what the command said on its standard output."""
        self._out.write(content)
        self._out.flush()

    def err(self, content: bytes) -> None:
        """Write what the command said on its standard error."""
        sys.stderr.buffer.write(content)
        sys.stderr.buffer.flush()


class Interrupts:
    """Ctrl-C while a job runs: once cancels it, a second one within a moment leaves it to the host (spec J-65).

    After the cancel was asked for, another one stops waiting for the job's end.
    """

    def __init__(
        self, cancel: Callable[[], object], announce: Callable[[], object], *, grace_seconds: float = GRACE_SECONDS
    ) -> None:
        """announce: says that a second one leaves the job alone. Both are called in a thread of their own."""
        self._cancel, self._announce, self._grace_seconds = cancel, announce, grace_seconds
        self._is_first, self._decided, self._turn = True, threading.Event(), threading.RLock()
        self._before: Callable[[int, FrameType | None], object] | int | None = None
        self.has_cancelled = False
        """Whether the cancel was asked for, or is about to be."""

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)
        with self._turn:
            self._decided.set()  # what is over by now is not cancelled

    def _hear(self, *_: object) -> None:
        if self._is_first:
            self._is_first = False
            # Not here: what was interrupted may hold a lock that the request needs.
            threading.Thread(target=self._await_second, daemon=True).start()
            return
        with self._turn:
            self._decided.set()
        raise KeyboardInterrupt

    def _await_second(self) -> None:
        self._announce()
        self._decided.wait(self._grace_seconds)
        with self._turn:
            if self._decided.is_set():
                return
            self.has_cancelled = True
        self._cancel()


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
        with contextlib.suppress(Exception):  # the job's own end says how it went
            call.out.note(f"cancelling {job.id}; Ctrl-C again waits no longer for its end")
            if not runner.jobs.job(job.id).state.is_over:  # a cancel of one that is over forgets it
                runner.jobs.cancel(job.id)

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


def complain_all(call: Call, problems: list[tuple[str, str]]) -> None:
    """Say what is wrong with some paths."""
    most = len(problems) if call.out.is_verbose else PROBLEMS_SHOWN
    for path, reason in problems[:most]:
        call.out.warn(f"{path}: {reason}" if path else reason)
    if len(problems) > most:
        call.out.warn(f"and {len(problems) - most} more problems; -v lists all")
