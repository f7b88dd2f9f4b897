"""Every call of a disk fails, once and from there on: no space, a quota, an I/O error, no descriptor, half a write."""

from __future__ import annotations

from torture.harness import Defect, Result, Work
from torture.kills import SCENARIOS
from torture.sweeping import visit

NAME = "diskfaults"
GOAL = 5_000
SLICE = 12
WEIGHT = 4
MOMENTS = ("ENOSPC", "EDQUOT", "EIO", "EIO-read", "EMFILE", "EROFS", "short")
STRIDES = (17, 29, 41, 61, 89)
DEFECTS = (
    Defect(
        "half a write is a whole one",
        "TR-70",
        "deltasync/disk.py",
        "",
        "",
        hint="server-live short",
    ),
)


def run(work: Work) -> Result:
    """Let calls fail; each is refused with one sentence, nothing is half applied, and all goes on without a restart."""
    moments = [*MOMENTS, *(f"{name}-sticky" for name in MOMENTS)]
    pairs = [(scenario, moment) for scenario in SCENARIOS for moment in moments]
    hinted = [(scenario, moment) for scenario, moment in pairs if work.hint == f"{scenario} {moment}"]
    return visit(work, hinted or pairs, STRIDES, kills_again=False)
