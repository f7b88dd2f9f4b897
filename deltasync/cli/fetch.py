"""`deltasync fetch`: bring a workspace, or a part of it, from a server into a folder."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from deltasync.cli import options
from deltasync.cli.options import Call, command, new_app
from deltasync.cli.output import bytes_text, count_text, seconds_text
from deltasync.cli.progress import meter
from deltasync.client.fetch import FetchOptions, FetchReport, fetch
from deltasync.client.transport import HttpTransport
from deltasync.client.wanted import Scope, parse_scope
from deltasync.config import Settings
from deltasync.core.errors import UsageError
from deltasync.core.names import NameRefused, shown

PROBLEMS_SHOWN = 20

app = new_app()


@command(
    app,
    "from",
    "workspace",
    "at",
    "dry-run",
    "delete",
    "allow-mass-delete",
    *options.WIRE,
    name="fetch",
    helps={
        "workspace": "Name of the workspace on the server.",
        "allow-mass-delete": "Let --delete remove most of what is in DEST, or all of it.",
    },
)
def fetch_workspace(
    call: Call,
    dest: Annotated[str, typer.Argument(metavar="DEST", help="The folder to fill; made if there is none.")],
    parts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PATH", help="Paths inside the workspace; without any, all of it."),
    ] = None,
) -> int:
    """Fetch a workspace, or parts of it, into DEST.

    Files of DEST that differ are replaced; what DEST has beyond the workspace stays, unless --delete. Content that
    lies anywhere in DEST is not fetched. An interrupted fetch goes on when it is run again. Exit 3 when some paths
    could not be written, 8 when the server gave wrong bytes.
    """
    settings = call.settings()
    if not settings.source or not settings.workspace:
        raise UsageError("say what to fetch: deltasync fetch --from http://HOST:PORT --workspace NAME DEST")
    transport = options.transport(settings, settings.source)
    if not isinstance(transport, HttpTransport):
        raise UsageError("a folder of bundles holds no tree to fetch from; replay it into a server first")
    with contextlib.closing(transport), meter(call.out) as progress:
        report = fetch(transport, Path(dest), _options(settings, settings.workspace, parts or []), progress)
    call.out.answer(report)
    _say(call, report)
    return _exit_code(report)


def _options(settings: Settings, workspace: str, parts: list[str]) -> FetchOptions:
    return FetchOptions(
        workspace=workspace,
        at=settings.at,
        scope=_scope(parts),
        delete=settings.delete,
        allow_mass_delete=settings.allow_mass_delete,
        dry_run=settings.dry_run,
        jobs=settings.jobs,
    )


def _scope(parts: list[str]) -> Scope:
    try:
        return parse_scope(parts)
    except NameRefused as error:
        raise UsageError(f"{', '.join(map(shown, parts))}: {error}; name paths inside the workspace") from error


def _exit_code(report: FetchReport) -> int:
    if report.damaged:
        return 8
    return 3 if report.problems else 0


def _say(call: Call, report: FetchReport) -> None:
    for change in report.changes:
        call.out.say(f"{change.operation:<8} {change.path}")
    call.out.say(f"{report.workspace}: {_summary(report)} in {seconds_text(report.seconds)}")
    shown_max = len(report.problems) if call.out.is_verbose else PROBLEMS_SHOWN
    for problem in report.problems[:shown_max]:
        call.out.warn(f"{problem.path}: {problem.reason}")
    if len(report.problems) > shown_max:
        call.out.warn(f"and {len(report.problems) - shown_max} more problems; -v lists all")


def _summary(report: FetchReport) -> str:
    numbers = {
        "created": report.created,
        "replaced": report.replaced,
        "touched": report.touched,
        "deleted": report.deleted,
    }
    done = ", ".join(f"{number:,} {verb}" for verb, number in numbers.items() if number) or "nothing to do"
    would = "would be: " if report.dry_run else ""
    verdict = "verified" if report.verified else "not verified"
    end = "" if report.dry_run else f", {verdict}"
    return (
        f"sequence {report.sequence}, {count_text(report.files, 'file')}; {would}{done}; "
        f"{bytes_text(report.fetched_bytes)} fetched, {bytes_text(report.found_bytes)} were here{end},"
    )
