"""`kill -9` before, after and in the middle of every call that changes a file system, and again while it recovers."""

from __future__ import annotations

from torture.harness import Defect, Result, Work
from torture.sweeping import visit

NAME = "kills"
GOAL = 5_000
SLICE = 3
WEIGHT = 6
SCENARIOS = (
    "client-push",
    "client-push-large",
    "client-push-parts",
    "client-seal",
    "client-fetch",
    "server-replay",
    "server-replay-direct",
    "server-replay-recipes",
    "server-replay-parts",
    "server-upload",
    "server-live",
    "server-collect",
    "server-adopt",
    "server-adopt-trust",
)
MOMENTS = ("before", "after", "middle")
STRIDES = (5, 7, 11, 13, 17)
DEFECTS = (
    Defect(
        "a transaction is none",
        "TR-60",
        "deltasync/db.py",
        '    connection.execute("BEGIN IMMEDIATE")\n    try:\n        yield connection\n',
        "    try:\n        yield connection\n        return\n",
        hint="server-replay",
    ),
    Defect(
        "staged content stays",
        "TR-60",
        "server/deltasync_server/receive.py",
        "            self.cache.clear_staging()\n",
        "",
        hint="server-replay",
    ),
    Defect(
        "journal files that no receipt names stay",
        "TR-60",
        "server/deltasync_server/receive.py",
        "            self.journal.clear_unreferenced()\n",
        "",
        hint="server-replay",
    ),
)


def run(work: Work) -> Result:
    """Kill commands; nothing acknowledged is lost, the repeated command ends where the unharmed one does."""
    scenarios = [name for name in SCENARIOS if name == work.hint] or SCENARIOS
    pairs = [(scenario, moment) for scenario in scenarios for moment in MOMENTS]
    return visit(work, pairs, STRIDES, kills_again=True)
