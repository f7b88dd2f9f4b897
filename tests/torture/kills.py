"""`kill -9` before, after and in the middle of every call that changes a file system, and again while it recovers."""

from __future__ import annotations

from torture.harness import Defect, Result, Work
from torture.sweeping import visit

NAME = "kills"
GOAL = 5_000
SLICE = 12
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
STRIDES = (17, 29, 41, 61, 89, 113)
DEFECTS = (
    Defect(
        "a blob is taken back after its commit",
        "TR-60",
        "server/deltasync_server/collect.py",
        "        with self._cache.staging() as waste, self._leases.guard, self._state.hold():\n            self._mark()",
        "        for digest in batch:\n            self._cache.remove(digest)\n"
        "        with self._cache.staging() as waste, self._leases.guard, self._state.hold():\n            self._mark()",
        hint="server-collect",
    ),
    Defect(
        "a tree is not compared after a crash",
        "TR-60",
        "server/deltasync_server/receive.py",
        "            self.trees.distrust(suspects)\n",
        "",
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
        "a fetched file is written under its name",
        "TR-60",
        "server/deltasync_server/place.py",
        "            temporary = self._temporary()\n            os.link(place, temporary",
        "            temporary = entry.name + '.tmp'\n            os.link(place, temporary",
        hint="server-replay",
    ),
)


def run(work: Work) -> Result:
    """Kill commands; nothing acknowledged is lost, the repeated command ends where the unharmed one does."""
    scenarios = [name for name in SCENARIOS if name == work.hint] or SCENARIOS
    pairs = [(scenario, moment) for scenario in scenarios for moment in MOMENTS]
    return visit(work, pairs, STRIDES, kills_again=True)
