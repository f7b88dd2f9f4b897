"""Every call of a disk fails, once and from there on: no space, a quota, an I/O error, no descriptor, half a write."""

from __future__ import annotations

from torture import kills
from torture.harness import Defect, Result, Work
from torture.sweeping import visit

NAME = "diskfaults"
GOAL = 5_000
SLICE = 3
WEIGHT = 4
SCENARIOS = tuple(name for name in kills.SCENARIOS if name != "server-upload")
"""That one is no command: whoever calls it is told by an exception."""
MOMENTS = ("ENOSPC", "EDQUOT", "EIO", "EIO-read", "EMFILE", "EROFS", "short")
STRIDES = (5, 7, 11, 13, 17)
DEFECTS = (
    Defect(
        "half a write is a whole one",
        "TR-70",
        "deltasync/disk.py",
        "    while view:\n        view = view[os.write(descriptor, view) :]",
        "    os.write(descriptor, view)",
        hint="server-replay short-sticky",
    ),
    Defect(
        "a folder that cannot be opened was deleted",
        "TR-71",
        "deltasync/client/scan.py",
        "            if descriptor < 0 and error.errno in _GONE:\n                self._lose(above, name, error)\n",
        "            if descriptor < 0:\n                self._ledger.detach(above.children.pop(name))\n",
        hint="client-push EMFILE",
    ),
    Defect(
        "a bundle that is sealed again has no content",
        "TR-68",
        "deltasync/client/push.py",
        "        self._difference.forget()  # what an attempt before this one took for carried is in no bundle\n",
        "",
        hint="client-seal EMFILE",
    ),
)


def run(work: Work) -> Result:
    """Let calls fail; each is refused with one sentence, nothing is half applied, and all goes on without a restart."""
    moments = [*MOMENTS, *(f"{name}-sticky" for name in MOMENTS)]
    pairs = [(scenario, moment) for scenario in SCENARIOS for moment in moments]
    hinted = [(scenario, moment) for scenario, moment in pairs if work.hint == f"{scenario} {moment}"]
    return visit(work, hinted or pairs, STRIDES, kills_again=False)
