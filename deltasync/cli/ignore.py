"""`deltasync ignore`: which rule decides about a path."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from deltasync.cli.options import RULES, Call, command, new_app, place_of, rule_origin
from deltasync.client.ignore import Decision, IgnoreRules
from deltasync.core.errors import UsageError
from deltasync.core.names import shown

app = new_app()


@command(app, "state-dir", *RULES)
def ignore(
    call: Call, path: Annotated[str, typer.Argument(metavar="PATH", help="A path in a workspace; it need not exist.")]
) -> int:
    """Say which rule decides about a path.

    Rules stand in .deltasyncignore files at any level, in .gitignore files with --gitignore, and in --exclude and
    --include, which win.
    """
    root, inside = place_of(Path(path), call)
    if not inside:
        raise UsageError(f"{shown(path)} is a workspace itself; name a path inside of it")
    settings = call.settings(root)
    rules = IgnoreRules(root, settings.exclude, settings.include, settings.gitignore)
    rules.origin = partial(rule_origin, call, root)
    decision = rules.explain(inside)
    call.out.answer({"path": inside, "workspace": str(root), **_facts(decision)})
    verdict = "is ignored" if decision.ignored else "is carried"
    named = " ".join(filter(None, (decision.rule, rules.where(decision))))
    call.out.say(f"{inside} {verdict}: {named or 'no rule matches'}")
    return 0


def _facts(decision: Decision) -> dict[str, object]:
    return {
        "ignored": decision.ignored,
        "rule": decision.rule,
        "source_file": decision.source_file,
        "line": decision.line,
    }
