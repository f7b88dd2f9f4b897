"""`deltasync verify`: read every local file again and compare with what the server says that it holds."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer

from deltasync.cli import options
from deltasync.cli.options import Call, command, new_app
from deltasync.cli.output import bytes_text, count_text, seconds_text
from deltasync.cli.progress import meter
from deltasync.client import outbox
from deltasync.client.state import State
from deltasync.client.verify import Verification, verify

LINES_MAX = 50

app = new_app()


@command(app, *options.PLACE, *options.RULES, "settle", *options.WIRE, name="verify")
def verify_folder(call: Call, path: Annotated[str, typer.Argument(metavar="PATH", help="The folder.")]) -> int:
    """Read every file again and compare roots.

    Nothing is recorded or sent. The server tells the root of its tree and what it lost; its files are not read, which
    deltasync-server check does. Exit 8 when a file's bytes changed although its size and time did not, or when the
    server no longer holds what it acknowledged; 5 when the trees merely differ; 3 when a file could not be read.
    """
    root = Path(path)
    settings = call.settings(root)
    state_dir = Path(settings.state_dir) if settings.state_dir else None
    with State.open(root, state_dir=state_dir, read_only=True) as state:
        state.require_original()
        head = outbox.head(state)
        workspace, url = settings.workspace or head.workspace or state.root.name, settings.to or head.url
        outbox.check_bound(state, workspace, settings.to)
        transport = options.transport(settings, url)
        with contextlib.closing(transport) if transport else contextlib.nullcontext(), meter(call.out) as progress:
            found = verify(state, transport, workspace, options.scan_options(state, settings), progress.read)
    call.out.answer(_answer(workspace, url, found))
    _say(call, workspace, url, found)
    return _exit_code(found)


def _exit_code(found: Verification) -> int:
    if found.silent or found.is_broken_promise or found.lost:
        return 8
    if found.in_sync is False:
        return 5
    return 3 if found.problems else 0


def _answer(workspace: str, url: str | None, found: Verification) -> dict[str, Any]:
    server = found.server
    return {
        "workspace": workspace,
        "root": found.root,
        "files": found.files,
        "bytes": found.bytes,
        "server": None if server is None else {"url": url, "sequence": server.sequence, "root": server.root},
        "in_sync": found.in_sync,
        "mismatches": found.silent,
        "server_lost_it": found.is_broken_promise or bool(found.lost),
        "lost": found.lost,
        "differences": found.differences,
        "differing": found.differing,
        "problems": [{"path": each.path, "reason": each.reason} for each in found.problems],
        "seconds": found.seconds,
    }


def _say(call: Call, workspace: str, url: str | None, found: Verification) -> None:
    verdict = {True: f"equal to {url}", False: f"different from {url}", None: "no server to compare with"}
    call.out.say(
        f"{workspace}: {count_text(found.files, 'file')}, {bytes_text(found.bytes)} read in "
        f"{seconds_text(found.seconds)}; root {found.root[:16]}, {verdict[found.in_sync]}"
    )
    lines_max = None if call.out.is_verbose else LINES_MAX
    for each in found.differences[:lines_max]:
        call.out.say(f"  to be {each.operation:<8} {each.path}")
    if found.differing > len(found.differences[:lines_max]):
        call.out.say(f"  and {found.differing - len(found.differences[:lines_max])} more")
    for path in found.silent:
        call.out.warn(f"{path}: its bytes changed although size and time did not; check the disk, restore or touch it")
    if found.is_broken_promise:
        call.out.warn("the server holds another tree under the sequence that it acknowledged; run its check")
    for path in found.lost:
        call.out.warn(f"{path}: the server has lost its content; push sends it again, from here")
    for problem in found.problems:
        call.out.warn(f"{problem.path}: {problem.reason}")
