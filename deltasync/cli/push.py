"""`deltasync push`: look at a folder once, send what differs, and return when the host's folder has it."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from deltasync.cli import options
from deltasync.cli.options import Call, command, new_app
from deltasync.cli.output import bytes_text, count_text, seconds_text
from deltasync.cli.progress import meter
from deltasync.client import outbox
from deltasync.client.opening import DATABASE
from deltasync.client.push import WAIT_SECONDS, Pusher, PushOptions
from deltasync.client.report import Counts, PushReport
from deltasync.client.scan import ScanReport, scan
from deltasync.client.state import State
from deltasync.config import Settings
from deltasync.core.errors import DeltasyncError, UsageError, from_problem
from deltasync.core.names import RESERVED, shown

PROBLEMS_SHOWN = 20
_WATCHERS_OWN = (
    *options.RULES,
    "delete-excluded",
    "no-delete",
    "settle",
    "chunk-from",
    "level",
    *options.WIRE,
    *options.OUTBOX,
)
"""What a running watcher was started with; a push beside it cannot change it."""

app = new_app()


@command(
    app,
    *options.PLACE,
    "dry-run",
    "no-wait",
    *options.DELETING,
    "take-over",
    *options.RULES,
    "rehash",
    "scan",
    "settle",
    "chunk-from",
    "level",
    *options.OUTBOX,
    *options.WIRE,
)
def push(
    call: Call, paths: Annotated[list[str], typer.Argument(metavar="PATH", help="The folders, one after another.")]
) -> int:
    """Send what differs, once.

    It returns when the server's folder holds what this one held. Beside a running watcher this asks the watcher,
    which already knows what changed. Without any server the bundles wait in the outbox. Of several folders the
    worst exit code counts.
    """
    if len(paths) > 1 and (call.settings().workspace or call.settings().state_dir):
        raise UsageError("--workspace and --state-dir are for one folder; push each folder by itself")
    answers, codes = [], []
    for path in paths:
        try:
            answer, code = _push(call, Path(path), call.settings(Path(path)))
        except DeltasyncError as error:
            if len(paths) == 1:
                raise
            call.out.warn(f"{path}: {error.sentence}")
            code = error.exit_code
            answer = {"path": shown(path), "error": {**error.facts, "code": error.code, "detail": error.sentence}}
        answers.append(answer)
        codes.append(code)
    call.out.answer(answers[0] if len(paths) == 1 else {"pushes": answers})
    return max(codes, key=lambda code: (code not in (0, 3), code))


def _push(call: Call, root: Path, settings: Settings) -> tuple[dict[str, Any], int]:
    began = time.monotonic()
    beside = None if settings.dry_run or settings.rehash else _ask_watcher(call, root, settings)
    if beside is not None:
        report, age = beside
        call.out.say(f"asked the running watcher; it looked at everything {seconds_text(age or 0.0)} ago")
        extra: dict[str, Any] = {"watcher": True, "scan_age_seconds": age}
    else:
        report = _alone(call, root, settings)
        extra = {"watcher": False, "scan_age_seconds": 0.0}
    report.seconds = time.monotonic() - began  # with the look at the folder
    _say(call, report, settings)
    answer = msgspec.to_builtins(report)
    if report.reasons is None:  # they are there for who asks with -v
        del answer["reasons"], answer["more_reasons"]
    return {**answer, **extra}, _exit_code(report, settings)


# Beside a watcher


def _ask_watcher(call: Call, root: Path, settings: Settings) -> tuple[PushReport, float | None] | None:
    """Have a running watcher bring everything to the server; None when there is none."""
    from deltasync.client.channel import ask
    from deltasync.client.opening import usable_root

    answer = ask(
        usable_root(root),
        "flush",
        scan=settings.scan,
        url=settings.to if call.flags["to"] else None,
        allow_mass_delete=settings.allow_mass_delete,
        take_over=settings.take_over,
        wait=0.0 if settings.no_wait else WAIT_SECONDS,
        explain=settings.verbose,
    )
    if answer is None:
        return None
    if not answer.get("ok"):
        error = answer["error"]
        raise from_problem(error["code"], error["detail"], error["facts"])
    report = msgspec.convert(answer["report"], PushReport)
    is_named = call.flags["workspace"] or call.flags["to"]  # an address may name it as well
    if settings.workspace and is_named and report.workspace != settings.workspace:
        raise UsageError(f"this folder is the workspace {shown(report.workspace)}, not {shown(settings.workspace)}")
    for key in _WATCHERS_OWN:
        if call.flags[key]:
            call.out.warn(f"--{key} has no effect: a watcher runs with its own options; stop it to push with others")
    return report, answer.get("scan_age_seconds")


# Alone


def _alone(call: Call, root: Path, settings: Settings) -> PushReport:
    with opened(call, root, settings) as state, meter(call.out) as progress:
        look = options.scan_options(state, settings)

        def rescan(folders: Collection[str]) -> ScanReport:
            return scan(state, look, folders=folders, progress=progress.read)

        url = settings.to or outbox.head(state).url
        transport = options.transport(settings, url)
        with (
            contextlib.closing(transport) if transport is not None else contextlib.nullcontext(),
            Pusher(state, transport, push_options(settings), progress=progress.sent, rescan=rescan) as pusher,
        ):
            found = scan(
                state,
                look,
                progress=progress.read,
                recorded=pusher.ahead.send_recorded,
                expect=pusher.expect,
                follow=pusher.ahead.follow,
            )
            progress.all_is_read()
            _say_found(call, found)
            report = pusher.run()
        if url is None and not report.pending and not _counted(report.operations):
            call.out.note("no server is known for this folder; name one with --to")
        return report


def _say_found(call: Call, found: ScanReport) -> None:
    call.out.detail(
        f"{count_text(found.files, 'file')} looked at, {found.hashed_files:,} read "
        f"({bytes_text(found.hashed_bytes)}), in {seconds_text(found.seconds)}"
    )
    if found.remounted:
        call.out.note("every file has a new inode here; sizes and times were trusted: push --rehash reads all again")


def push_options(settings: Settings) -> PushOptions:
    """Return what a push may do, as far as the settings say."""
    return PushOptions(
        workspace=settings.workspace,
        allow_mass_delete=settings.allow_mass_delete,
        take_over=settings.take_over,
        no_delete=settings.no_delete,
        delete_excluded=settings.delete_excluded,
        dry_run=settings.dry_run,
        outbox_limit=settings.outbox_limit_bytes,
        keep_sent_seconds=settings.keep_sent_seconds,
        level=settings.level,
        wait=0.0 if settings.no_wait else WAIT_SECONDS,
        explain=settings.verbose,
    )


@contextlib.contextmanager
def opened(call: Call, root: Path, settings: Settings) -> Iterator[State]:
    """Open a workspace for writing and say what its state has to tell.

    A rehearsal in a folder that is no workspace yet leaves none behind: its state is kept elsewhere and removed.
    """
    with contextlib.ExitStack() as stack:
        state_dir = Path(settings.state_dir) if settings.state_dir else None
        if settings.dry_run and not ((state_dir or root / RESERVED) / DATABASE).exists():
            state_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="deltasync-")))
        workspace, take_over = settings.workspace, settings.take_over
        state = State.open(root, state_dir=state_dir, workspace=workspace, take_over=take_over)
        stack.enter_context(state)
        for note in state.notes:
            call.out.note(note)
        yield state


# What it did


def _exit_code(report: PushReport, settings: Settings) -> int:
    if report.waiting is not None:
        return 6
    if report.tree_behind and not settings.no_wait:
        return 4
    return 3 if report.problems or report.still_wanted else 0


def _say(call: Call, report: PushReport, settings: Settings) -> None:
    for each in report.reasons or ():
        call.out.detail(f"  {each.path}: {each.reason}")
    if report.more_reasons:
        call.out.detail(f"  and {report.more_reasons:,} more")
    call.out.say(f"{report.workspace}: {_summary(report)} in {seconds_text(report.seconds)}")
    if report.waiting is not None:
        call.out.warn(report.waiting)
    if report.pending and not report.dry_run:
        call.out.note(f"the outbox holds {count_text(report.pending, 'bundle')} for a server; name one with --to")
    if _exit_code(report, settings) == 4:
        call.out.warn(
            "the server has everything, but its folder is not complete yet; ask again with status, "
            "and look into its log if that stays so"
        )
    if report.still_wanted:
        call.out.warn(
            f"the server lost {count_text(report.still_wanted, 'content')} that it did not get now; push again, "
            "and have `deltasync-server check` look at its store if that stays so"
        )
    shown_max = len(report.problems) if call.out.is_verbose else PROBLEMS_SHOWN
    for problem in report.problems[:shown_max]:
        call.out.warn(f"{problem.path}: {problem.reason}")
    if len(report.problems) > shown_max:
        call.out.warn(f"and {len(report.problems) - shown_max} more problems; -v lists all")


def _summary(report: PushReport) -> str:
    verbs = _counted(report.operations)
    if not verbs:
        told = "took the workspace over, nothing else to send" if report.taken_over else "nothing to send"
        return f"{told}, at sequence {report.sequence};"
    told, size_bytes, done = "sent", report.sent_bytes, "sent"
    if report.dry_run:
        told, size_bytes, done = "would send", report.content_bytes, "of content"
    elif report.pending:
        told, done = "sealed", "written"
    at = "" if report.dry_run else f" now at sequence {report.sequence},"
    return f"{told} {verbs}; {bytes_text(size_bytes)} {done};{_avoided(report)}{at}"


def _avoided(report: PushReport) -> str:
    ways = {
        "in the cache": report.avoided_by_cache_bytes,
        "by chunks": report.avoided_by_chunks_bytes,
        "by moves": report.avoided_by_move_bytes,
    }
    told = ", ".join(f"{bytes_text(count)} {way}" for way, count in ways.items() if count)
    return f" avoided {told};" if told else ""


def _counted(counts: Counts) -> str:
    numbers: Mapping[str, int] = msgspec.to_builtins(counts)
    return ", ".join(f"{number:,} {verb}" for verb, number in numbers.items() if number)
