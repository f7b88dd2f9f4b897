"""`deltasync why`: what the next push would do with a path, and for what reason."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from deltasync.cli import options
from deltasync.cli.options import Call, command, new_app
from deltasync.client import outbox
from deltasync.client.state import State
from deltasync.client.why import Verdict, Why, why

ASK_SECONDS = 1.0
"""How long a busy watcher may take to answer."""
WORDS = {
    Verdict.IN_STEP: "in step",
    Verdict.CHANGED: "content changed",
    Verdict.METADATA: "metadata only",
    Verdict.GONE: "gone here",
    Verdict.NOT_CARRIED: "not carried",
}
"""What people read for a verdict, where that is not its own name."""

app = new_app()


@command(app, "state-dir", *options.RULES, "delete-excluded", "no-delete", name="why")
def why_path(
    call: Call, path: Annotated[str, typer.Argument(metavar="PATH", help="A file or folder in a workspace.")]
) -> int:
    """Say what the next push would do with a path.

    It looks at the path now and compares it with what was sealed last: in step, new, content changed, moved or copied
    from where, metadata only, ignored by which rule, still being written, a problem, not carried. Nothing is recorded
    or sent, and no server is asked. Give the rules that push would be given.
    """
    root, inside = options.place_of(Path(path), call)
    settings = call.settings(root)
    state_dir = Path(settings.state_dir) if settings.state_dir else None
    with State.open(root, state_dir=state_dir, read_only=True) as state:
        state.require_original()
        look = options.scan_options(state, settings)
        look.ignore.origin = partial(options.rule_origin, call, root)
        found = why(state, inside, look, is_watched=lambda: _is_watched(state))
        workspace = settings.workspace or outbox.head(state).workspace or state.root.name
    call.out.answer({"workspace": workspace, **msgspec.to_builtins(found)})
    _say(call, found, path)
    return 0


def _is_watched(state: State) -> bool:
    from deltasync.client.channel import ask
    from deltasync.core.errors import UsageError

    try:
        return ask(state.root, "status", timeout=ASK_SECONDS) is not None
    except TimeoutError:
        return True  # it is busy
    except (OSError, UsageError):
        return False


def _say(call: Call, found: Why, path: str) -> None:
    word = WORDS.get(found.verdict, found.verdict.value)
    joint = " " if found.verdict in (Verdict.MOVED, Verdict.COPY) else ": "
    call.out.say(f"{found.path or path}: {word}{joint}{found.reason}")
    for each in found.inside:
        call.out.say(f"  {each.path}: {each.reason}")
    if found.more_inside:
        call.out.say(f"  and {found.more_inside:,} more")
