"""`deltasync ignore`: which rule decides about a path."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from deltasync.cli.options import RULES, Call, command, new_app
from deltasync.client.ignore import Decision, IgnoreRules
from deltasync.core.errors import NotFound, UsageError
from deltasync.core.names import RESERVED, shown

app = new_app()


@command(app, "state-dir", *RULES)
def ignore(
    call: Call, path: Annotated[str, typer.Argument(metavar="PATH", help="A path in a workspace; it need not exist.")]
) -> int:
    """Say which rule decides about a path.

    Rules stand in .deltasyncignore files at any level, in .gitignore files with --gitignore, and in --exclude and
    --include, which win.
    """
    root, inside = _split(Path(path), call)
    settings = call.settings(root)
    decision = IgnoreRules(root, settings.exclude, settings.include, settings.gitignore).explain(inside)
    call.out.answer({"path": inside, "workspace": str(root), **_facts(decision)})
    verdict = "is ignored" if decision.ignored else "is carried"
    call.out.say(f"{inside} {verdict}: {_why(decision)}")
    return 0


def _split(path: Path, call: Call) -> tuple[Path, str]:
    """Return the workspace's folder that holds a path, and the path inside of it; no link is followed at its end."""
    absolute = Path(os.path.normpath(path.absolute()))
    state_dir = call.settings().state_dir
    for root in absolute.parents:
        if (root / RESERVED / "state.db").is_file() or (state_dir and _is_root_of(root, Path(state_dir))):
            return root, absolute.relative_to(root).as_posix()
    if (absolute / RESERVED).is_dir():
        raise UsageError(f"{shown(str(path))} is a workspace itself; name a path inside of it")
    raise NotFound(f"{shown(str(path))} lies in no workspace; run `deltasync push` or `deltasync watch` on one first")


def _is_root_of(root: Path, state_dir: Path) -> bool:
    from deltasync.client.state import State

    with State.open(root, state_dir=state_dir, read_only=True) as state:
        return state.get_meta("root") == root.resolve().as_uri()


def _facts(decision: Decision) -> dict[str, object]:
    return {
        "ignored": decision.ignored,
        "rule": decision.rule,
        "source_file": decision.source_file,
        "line": decision.line,
    }


def _why(decision: Decision) -> str:
    if decision.rule is None:
        return "no rule matches"
    if decision.line is None:
        return f"{decision.rule}" if decision.rule.startswith(RESERVED) else f"{decision.rule} on the command line"
    return f"{decision.rule} in {decision.source_file}, line {decision.line}"
