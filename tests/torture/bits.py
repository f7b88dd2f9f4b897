"""Bit rot: one flipped bit in each of many blobs, found by the scrub, served to nobody, and healed by the client."""

from __future__ import annotations

import random
import traceback

import serving
from unit.test_store_scrub import rot_and_heal

from deltasync_server.config import StoreConfig
from torture.harness import Defect, Result, Work

NAME = "bits"
GOAL = 1000
SLICE = 60
WEIGHT = 1
DEFECTS = (
    Defect(
        "the scrub reads and does not compare",
        "TR-40",
        "server/deltasync_server/scrub.py",
        "        return content.digest() == digest\n",
        "        return True\n",
    ),
    Defect(
        "a damaged file stays in the tree",
        "TR-40",
        "server/deltasync_server/tree.py",
        "                self._unlink_inodes(row.name, {path for path, _ in named[row.name]}, set(inodes.values()))\n",
        "                pass\n",
    ),
    Defect(
        "a blob is never read to prove it",
        "TR-40",
        "server/deltasync_server/blobs.py",
        "            return hash_of(descriptor) == digest\n",
        "            return True\n",
    ),
)


def run(work: Work) -> Result:
    """Flip bits in rounds, each with a store of its own."""
    result, seconds = Result(), serving.SECONDS
    if work.stop_at_first:  # a scrub that finds nothing is not waited for as long
        serving.SECONDS = 6.0
    try:
        _rounds(work, result)
    finally:
        serving.SECONDS = seconds
    return result


def _rounds(work: Work, result: Result) -> None:
    while work.goes_on(result):
        number = min(60 if work.stop_at_first else 1000, work.points - result.points)
        random.seed(work.seed + result.points)  # the test draws the bytes and bits from there
        config = StoreConfig(work.scratch / f"{result.points}", scrub_bytes=1 << 30, scrub_after_seconds=0.0)
        try:
            rot_and_heal(config, number)
        except Exception:  # noqa: BLE001 - its assertions, and whatever else fails
            result.faults.append(f"round {work.seed}+{result.points}: {traceback.format_exc()[-1500:]}")
        result.points += number
        result.count("blobs damaged, found and healed", 0 if result.faults else number)
