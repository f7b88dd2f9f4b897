"""`deltasync status`: what is sealed here, what the server holds, and whether both are equal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from deltasync.cli import options
from deltasync.cli.options import Call, command, new_app
from deltasync.cli.output import bytes_text, count_text
from deltasync.client import outbox
from deltasync.client import status as halves
from deltasync.client.address import is_folder
from deltasync.client.state import State
from deltasync.config import Settings
from deltasync.core import wire
from deltasync.core.errors import DeltasyncError, NotFound, UsageError
from deltasync.core.names import shown

ASK_SECONDS = 1.0
"""How long a busy watcher may take to answer; without it, `status` tells the same from the state."""
WAITING_SHOWN = 5

app = new_app()


@command(app, *options.PLACE, *options.WIRE)
def status(
    call: Call,
    path: Annotated[str | None, typer.Argument(metavar="PATH", help="The folder; here if not given.")] = None,
) -> int:
    """Show whether both sides are equal.

    It tells what is sealed here and what the server holds. Nothing is scanned: the local half is as of the last
    scan. With --to and --workspace alone, only the server is asked; exit 1 when nothing was ever pushed under that
    name. Exit 4 when the server does not answer.
    """
    if path is None and call.flags["to"] and (call.flags["workspace"] or _names_workspace(str(call.flags["to"]))):
        return _show(call, call.settings(), None)
    root = Path(path or ".")
    settings = call.settings(root)
    if path is None and settings.to and settings.workspace and not _has_state(root, settings):
        return _show(call, settings, None)
    state_dir = Path(settings.state_dir) if settings.state_dir else None
    with State.open(root, state_dir=state_dir, read_only=True) as state:
        state.require_original()
        return _show(call, settings, state)


def _names_workspace(url: str) -> bool:
    from deltasync.client.address import is_ssh, parse_ssh

    return is_ssh(url) and parse_ssh(url)[1] is not None


def _has_state(root: Path, settings: Settings) -> bool:
    return (Path(settings.state_dir or root / ".deltasync") / "state.db").exists()


def _show(call: Call, settings: Settings, state: State | None) -> int:
    here, workspace, url = None, settings.workspace or "", settings.to
    if state is not None:
        workspace, url = _bound(state, settings)
        here = halves.examined(state, halves.local(state))
    there, trouble = _ask_server(settings, workspace, url, state)
    watcher = _ask_watcher(state) if state is not None else None
    together = halves.together(workspace, here, there)
    extra: dict[str, Any] = {"watcher": watcher}
    if trouble is not None:
        extra["error"] = {**trouble.facts, "code": trouble.code, "detail": trouble.sentence}
    call.out.answer({**msgspec.structs.asdict(together), **extra})
    if state is None and there is not None and not there.sequence:
        call.out.warn(f"{url} has no workspace {shown(workspace)}: nothing was ever pushed under this name; check it")
        return NotFound.exit_code
    for line in _lines(together, watcher, url):
        call.out.say(line)
    if trouble is None:
        return 0
    call.out.warn(trouble.sentence)
    return trouble.exit_code


def _bound(state: State, settings: Settings) -> tuple[str, str | None]:
    """Return the workspace's name and server: what is remembered, or what was given for a folder never sent."""
    head = outbox.head(state)
    workspace = settings.workspace or head.workspace or state.root.name
    outbox.check_bound(state, workspace, settings.to)
    return workspace, settings.to or head.url


def _ask_server(
    settings: Settings, workspace: str, url: str | None, state: State | None
) -> tuple[halves.Server | None, DeltasyncError | None]:
    transport = options.transport(settings, url, max_retries=0)
    if transport is None:
        return None, None
    try:
        there = halves.server(transport, workspace)
        if state is not None and not there.sequence and is_folder(there.url):
            outbox.require_mount(state)
        return there, None
    except UsageError:
        raise
    except DeltasyncError as error:
        return None, error
    finally:
        transport.close()


def _ask_watcher(state: State) -> Mapping[str, Any] | None:
    from deltasync.client.channel import ask

    try:
        return ask(state.root, "status", timeout=ASK_SECONDS)
    except (OSError, UsageError):
        return None


def _lines(together: halves.Status, watcher: Mapping[str, Any] | None, url: str | None) -> list[str]:
    here, there = together.local, together.server
    verdict = {True: "in sync with", False: "differs from", None: "not compared with"}[together.in_sync]
    lines = [f"{together.workspace}  {verdict if here else 'on'} {url or 'any server'}"]
    if here is not None:
        watched = "a watcher runs" if watcher else "no watcher runs"
        lines.append(
            f"local   sequence {here.sequence}, root {here.root[:16]}, {count_text(here.files, 'file')}, "
            f"{bytes_text(here.bytes)}; {watched}"
        )
        lines += [f"        {words}" for words in dict.fromkeys((*_left(here), *_told(watcher or {})))]
    if there is not None:
        lines += _tree(here, there)
        if there.usage is not None and (held := _held(there.usage)):
            lines.append(f"        {held}")
        if there.wanted:
            lines.append(f"        asks again for {count_text(there.wanted, 'content')} that it lost; push sends it")
    return lines


def _tree(here: halves.Local | None, there: halves.Server) -> list[str]:
    """Return where the receiver stands, and where its plain tree is; there is none before the first push."""
    if not there.sequence:
        was_there = here is not None and here.acknowledged_sequence
        empty = "nothing is there any more" if was_there else "nothing was pushed there yet"
        return [f"server  {'no bundle lies there' if is_folder(there.url) else empty}"]
    tree = ", tree moving" if there.tree_sequence is None else f", tree at {there.tree_sequence}"
    if is_folder(there.url) or not there.tree_path:
        tree = ""  # a folder of bundles holds none, nor do returns of jobs (spec J-61)
    applied = f", applied {there.last_applied_at}" if there.last_applied_at else ""
    lines = [f"server  sequence {there.sequence}, root {there.root[:16]}{tree}{applied}"]
    return [*lines, f"        {there.tree_path}"] if there.tree_path else lines


def _held(usage: wire.Usage) -> str:
    """Return how much of what may be held there is used; '' where nothing bounds it."""
    bounds = []
    if usage.bytes_limit is not None:
        bounds.append(f"{bytes_text(usage.bytes)} of {bytes_text(usage.bytes_limit)}")
    if usage.files_limit is not None:
        bounds.append(f"{usage.files} of {count_text(usage.files_limit, 'file')}")
    return f"you hold {' and '.join(bounds)} on this server" if bounds else ""


def _told(watcher: Mapping[str, Any]) -> list[str]:
    """Return what a watcher is waiting for, and what it does not hear of."""
    told = [f"{each['path']}: {bytes_text(each['size'])} so far" for each in watcher.get("waiting", ())[:WAITING_SHOWN]]
    told += [watcher[key] for key in ("obstacle", "guard", "full", "trouble") if watcher.get(key)]
    coverage = watcher.get("coverage") or {}
    if coverage.get("reason"):
        told.append(f"{coverage['unwatched_folders']} folder(s) are not watched ({coverage['reason']})")
    return told


def _left(here: halves.Local) -> list[str]:
    left = []
    if here.no_delete:
        left.append("--no-delete: what is gone here stays on the server, and only what was sent is compared")
    if here.changed and not here.blocked:
        left.append("changes wait to be sealed")
    if here.guard:
        left.append(here.guard)
    if here.pending:
        in_files = f", {bytes_text(here.outbox_bytes)} in files" if here.outbox_bytes else ""
        bundles, content = count_text(here.pending, "bundle"), bytes_text(here.pending_bytes)
        left.append(f"{bundles} to be sent, {content} of content{in_files}")
    left += [f"{each.path}: {each.parts_sent} of {each.parts} parts sent" for each in here.in_parts[:WAITING_SHOWN]]
    if here.waiting:
        left.append(f"{count_text(here.waiting, 'file')} still being written")
    if here.problems:
        former = f"the former state of {count_text(here.held_back, 'path')} stands on the server; "
        problems = count_text(here.problems, "problem")
        left.append(f"{problems}; {former if here.held_back else ''}deltasync push lists them")
    return left
