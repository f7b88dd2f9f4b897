"""`deltasync bundle`: the sealed bundles of a workspace, and bundle files anywhere."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer

from deltasync.cli import options
from deltasync.cli.options import Call, command, new_app
from deltasync.cli.output import bytes_text, count_text
from deltasync.client import replay as bundles
from deltasync.client.state import State
from deltasync.core.errors import UsageError
from deltasync.core.names import shown

OPERATIONS_SHOWN = 50

app = new_app()


@app.callback()
def describe() -> None:
    """List, show, verify, export and replay sealed bundles."""


@command(app, "state-dir", name="ls")
def list_bundles(
    call: Call, path: Annotated[str, typer.Argument(metavar="PATH", help="The folder; here if not given.")] = "."
) -> int:
    """List the bundles of a workspace.

    These are the sealed ones that wait for the server, and the sent ones that --keep-sent keeps.
    """
    state_dir = call.settings(Path(path)).state_dir
    with State.open(Path(path), state_dir=Path(state_dir) if state_dir else None, read_only=True) as state:
        listed = bundles.bundle_list(state)
    call.out.answer({"bundles": listed})
    for each in listed:
        size = "not a file yet" if each.file_bytes is None else bytes_text(each.file_bytes)
        name = Path(each.file).name if each.file else ""
        call.out.say(
            f"{each.sequence:>8}  {each.state:<8}{size:>15}  {each.root[:16]}  {each.sealed_at}  {name}".rstrip()
        )
    if not listed:
        call.out.say("no bundle waits or is kept")
    return 0


@command(app)
def show(call: Call, file: Annotated[str, typer.Argument(metavar="FILE", help="A bundle file.")]) -> int:
    """Show a bundle file: its manifest and operations."""
    _require_file(file)
    manifest = bundles.bundle_show(Path(file))
    call.out.answer(manifest)
    for line in _manifest_lines(manifest, limit=None if call.out.is_verbose else OPERATIONS_SHOWN):
        call.out.say(line)
    return 0


def _require_file(file: str) -> None:
    if Path(file).is_dir():
        raise UsageError(f"{shown(file)} is a folder; name the bundle files in it, such as {shown(file)}/*.tar.zst")
    if not Path(file).is_file():
        raise UsageError(f"{shown(file)} cannot be read: there is no such file")


@command(app)
def verify(call: Call, files: Annotated[list[str], typer.Argument(metavar="FILE", help="Bundle files.")]) -> int:
    """Prove that bundle files are sound.

    Each is read to its end, strictly; exit 8 when one is not sound.
    """
    for file in files:
        _require_file(file)
    found = bundles.bundle_verify(map(Path, files))
    call.out.answer({"files": found, "sound": not any(each.reason for each in found)})
    for each in found:
        if each.reason is None:
            call.out.say(f"{each.path}: sound")
        else:
            call.out.warn(f"{each.path}: {each.reason}")
    return 8 if any(each.reason for each in found) else 0


@command(app, "full", "state-dir", *options.RULES, "settle", "level")
def export(
    call: Call,
    path: Annotated[str, typer.Argument(metavar="PATH", help="The folder of the workspace.")],
    target: Annotated[str, typer.Argument(metavar="DIR", help="Where the bundle files go; made if needed.")],
) -> int:
    """Write bundles into a folder for a host.

    These are the bundles that wait or are kept. With --full it is a chain that leads from nothing to the present
    tree and carries all content, which an empty server takes.
    """
    from deltasync.cli.push import opened
    from deltasync.client.scan import scan

    root = Path(path)
    settings = call.settings(root)
    with opened(call, root, settings) as state:
        look = options.scan_options(state, settings)
        if settings.full:
            scan(state, look)
        done = bundles.export(
            state,
            Path(target),
            full=settings.full,
            level=settings.level,
            rescan=lambda folders: scan(state, look, folders=folders),
        )
        problems = [{"path": each.path, "reason": each.reason} for each in state.problems()]
    problems += [{"path": shown(name), "reason": reason} for name, reason in done.left_out.items()]
    files = [str(each) for each in done.paths]
    call.out.answer({"files": files, "root": done.root, "problems": problems})
    for each in files:
        call.out.say(each)
    call.out.say(f"{count_text(len(files), 'bundle')} written; the tree after the last has root {done.root[:16]}")
    if not files:
        call.out.note("no bundle waits or is kept; --full writes a chain that carries everything")
    for problem in problems:
        call.out.warn(f"{problem['path']}: {problem['reason']}")
    return 3 if problems else 0


@command(
    app,
    "to",
    "workspace",
    "take-over",
    *options.WIRE,
    helps={
        "to": "Server to send to, or file:///FOLDER.",
        "workspace": "Name on the server; without it each bundle goes to the one that it names.",
    },
)
def replay(call: Call, folder: Annotated[str, typer.Argument(metavar="DIR", help="A folder of bundle files.")]) -> int:
    """Send bundle files to a server in order.

    What the server has is skipped; a gap stops with exit 5.
    """
    settings = call.settings()
    transport = options.transport(settings, settings.to)
    if transport is None:
        raise UsageError("name the server with --to URL")
    with contextlib.closing(transport):
        done = bundles.replay(
            Path(folder), transport, workspace=settings.workspace, take_over=settings.take_over, say=call.out.say
        )
    totals = {"applied": sum(each.applied for each in done), "skipped": sum(each.skipped for each in done)}
    call.out.answer({**totals, "workspaces": done})
    for each in done:
        call.out.say(
            f"{each.workspace}: {count_text(each.applied, 'bundle')} applied, {each.skipped} skipped; "
            f"now at sequence {each.sequence}, root {each.root[:16]}"
        )
    return 0


def _manifest_lines(manifest: dict[str, Any], *, limit: int | None) -> list[str]:
    operations = manifest["operations"]
    lines = [f"{key}: {value}" for key, value in manifest.items() if key != "operations"]
    lines.append(f"operations: {len(operations)}")
    for each in operations[:limit]:
        source = f"  from {each['source_path']}" if each.get("source_path") else ""
        lines.append(f"  {each['operation']:<8} {each['kind']:<9} {each['path']}{source}")
    if limit is not None and len(operations) > limit:
        lines.append(f"  and {len(operations) - limit} more; -v shows all")
    return lines
