"""`deltasync watch`: keep a folder in step for as long as it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltasync.cli import options
from deltasync.cli.options import Call, command, new_app

app = new_app()


@command(
    app,
    *options.PLACE,
    *options.RULES,
    *options.DELETING,
    "take-over",
    "settle",
    "chunk-from",
    "debounce",
    "rescan",
    "rehash-days",
    "level",
    *options.OUTBOX,
    *options.WIRE,
    helps={"settle": "How long a file that its writer has not closed must stay unchanged [2s]."},
)
def watch(call: Call, path: Annotated[str, typer.Argument(metavar="PATH", help="The folder.")]) -> int:
    """Keep a folder in step, until stopped.

    Changes are noticed, sealed, and sent while the server answers. Without --to, and while the server does not
    answer, bundles wait in the outbox and are sent in order later. One line tells each thing that happens (one JSON
    object a line with --json). Stop it with Ctrl-C; nothing is lost.
    """
    from deltasync.client import daemon

    root = Path(path)
    settings = call.settings(root)
    options.note_exposure(settings, settings.to)
    _bring_home(call, settings.to, root)
    daemon.run(root, settings, lambda event: call.out.event(event.line(), event.json()))
    return 0


def _bring_home(call: Call, url: str | None, root: Path) -> None:
    """Bring home what commands wrote on the workspace's host while nobody was here (spec J-63)."""
    from deltasync.client.job_records import JobBook

    if any(not each.is_home for each in JobBook.of_user().records()):
        from deltasync.cli.jobs import fetch_waiting
        from deltasync.client.kept import receiver_of

        if (found := url or receiver_of(root)) is not None:
            fetch_waiting(call, found)
