"""`deltasync doctor`: what may go wrong here, found before it does."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from deltasync.cli import options
from deltasync.cli.options import PLACE, WIRE, Call, command, new_app
from deltasync.cli.output import bytes_text, count_text
from deltasync.client.doctor import Finding, Level, examine
from deltasync.config import Settings
from deltasync.core.errors import DeltasyncError, NotFound
from deltasync.core.names import shown

app = new_app()


@command(app, *PLACE, *WIRE)
def doctor(
    call: Call,
    path: Annotated[str, typer.Argument(metavar="PATH", help="The folder; here if not given.")] = ".",
) -> int:
    """Look for what may go wrong.

    It looks at names, watches, links, clocks, free disk, and at the server if there is one. Exit 3 when there is a
    problem; warnings alone do not count.
    """
    root = Path(path)
    settings = call.settings(root)
    state_dir = Path(settings.state_dir) if settings.state_dir else None
    server_findings, server_date = _server(root, settings)
    findings = [
        *examine(root, now=datetime.now(UTC), state_dir=state_dir, server_date=server_date),
        *server_findings,
        *_waiting(),
    ]
    has_problem = any(each.level is Level.PROBLEM for each in findings)
    call.out.answer({"findings": findings, "healthy": not has_problem})
    for each in findings:
        call.out.say(f"{each.level:<8} {each.topic:<8} {each.sentence}")
    return 3 if has_problem else 0


def _server(root: Path, settings: Settings) -> tuple[list[Finding], datetime | None]:
    """Return what the server has to tell, and what its clock says."""
    url = settings.to or _remembered(root, settings)
    if url is None or url.startswith("file:"):
        return [], None
    from deltasync.client.transport import HttpTransport

    transport = options.transport(settings, url, max_retries=0)
    assert isinstance(transport, HttpTransport)
    try:
        transport = options.transport(settings, url, max_retries=0)
        assert isinstance(transport, HttpTransport)
        with contextlib.closing(transport):
            health = transport.health()
    except DeltasyncError as error:
        return [Finding(Level.PROBLEM, "server", error.sentence)], None
    free = f"{bytes_text(health.disk_free_bytes)} of {bytes_text(health.disk_total_bytes)} are free there"
    sentence = f"{url} answers: {shown(health.status)}, release {shown(health.version)}; {free}"
    return [Finding(Level.OK if health.status == "ok" else Level.WARNING, "server", sentence)], transport.server_date


def _waiting() -> list[Finding]:
    """Return what waits on hosts to be brought home here."""
    from deltasync.client.job_records import JobBook

    count = sum(not each.is_home for each in JobBook.of_user().records())
    if not count:
        return []
    sentence = f"what {count_text(count, 'job')} wrote may wait on a host; `deltasync jobs fetch` brings it home"
    return [Finding(Level.NOTE, "jobs", sentence)]


def _remembered(root: Path, settings: Settings) -> str | None:
    from deltasync.client import outbox
    from deltasync.client.state import State

    state_dir = Path(settings.state_dir) if settings.state_dir else None
    try:
        with State.open(root, state_dir=state_dir, read_only=True) as state:
            return outbox.head(state).url
    except NotFound:
        return None
