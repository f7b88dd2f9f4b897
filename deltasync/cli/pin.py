"""`deltasync pin`: have the server hold a state of a workspace, with its content, however many come after it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from deltasync.cli import options
from deltasync.cli.options import Call, command, new_app
from deltasync.client import outbox
from deltasync.client.state import State
from deltasync.client.transport import HttpTransport
from deltasync.config import Settings
from deltasync.core import wire
from deltasync.core.errors import NotFound, UsageError
from deltasync.core.names import shown

app = new_app()


@command(
    app, *options.PLACE, "at", *options.WIRE, helps={"at": "The sequence, one that the server keeps; the last of them."}
)
def pin(
    call: Call,
    path: Annotated[str | None, typer.Argument(metavar="PATH", help="The folder; here if not given.")] = None,
    release: Annotated[bool, typer.Option("--release", help="Take the pin of --at away.")] = False,
    only_list: Annotated[bool, typer.Option("--list", help="Only list what the server keeps.")] = False,
) -> int:
    """Pin a state of a workspace on the server.

    A server keeps the last sequences of a workspace; a pinned one stays beyond them, with all its content, and can be
    fetched with --at until its pin is taken away. It counts in what you may hold there. With --to and --workspace no
    folder is needed.
    """
    settings = call.settings(Path(path) if path else None)
    workspace, url = _target(settings, path)
    transport = options.transport(settings, url)
    if not isinstance(transport, HttpTransport):
        raise UsageError("a server pins, a folder of bundles does not; name one with --to http://HOST:PORT")
    if release and settings.at is None:
        raise UsageError("say which pin to take away: --release --at SEQUENCE; --list shows them")
    with contextlib.closing(transport):
        kept = transport.sequences(workspace)
        if not kept:
            raise NotFound(f"{url} has no workspace {shown(workspace)}: nothing was ever pushed under this name")
        number = kept[-1].sequence if settings.at is None else settings.at
        if not only_list:
            kept = transport.pin(workspace, number, is_pinned=not release)
    call.out.answer({"workspace": workspace, "url": url, "sequences": msgspec.to_builtins(kept)})
    for line in _lines(kept, None if only_list else number, is_pinned=not release):
        call.out.say(line)
    return 0


def _target(settings: Settings, path: str | None) -> tuple[str, str | None]:
    """Return the workspace and where it is kept: as given, or as the folder's state remembers it."""
    if path is None and settings.to and settings.workspace:
        return settings.workspace, settings.to
    state_dir = Path(settings.state_dir) if settings.state_dir else None
    with State.open(Path(path or "."), state_dir=state_dir, read_only=True) as state:
        head = outbox.head(state)
        outbox.check_bound(state, settings.workspace or head.workspace or state.root.name, settings.to)
        return settings.workspace or head.workspace or state.root.name, settings.to or head.url


def _lines(kept: list[wire.KeptSequence], number: int | None, *, is_pinned: bool) -> list[str]:
    if number is not None:
        return [f"sequence {number} is {'pinned' if is_pinned else 'no longer pinned'}"]
    return [f"{each.sequence:>8}  {each.applied_at}  {each.root[:16]}{'  pinned' * each.pinned}" for each in kept]
