"""One run of one harness in a process of its own: `python -m torture.worker`, its work as JSON on standard input."""

from __future__ import annotations

import dataclasses
import json
import logging
import signal
import sys
import time
import traceback
from pathlib import Path

from torture.harness import Result, Work, call_off, load


def main() -> None:
    """Read the work, do it, and write the result where it is wanted."""
    asked = json.load(sys.stdin)
    signal.signal(signal.SIGTERM, lambda number, frame: call_off())
    logging.disable()  # what the product says of thousands of faults is not read
    result = Result()
    try:
        _require_product(asked["product"])
        work = Work(
            seed=asked["seed"],
            points=asked["points"],
            deadline=time.monotonic() + asked["seconds"],
            scratch=Path(asked["scratch"]),
            stop_at_first=asked["stop_at_first"],
            hint=asked["hint"],
        )
        result = load(asked["harness"]).run(work)
        died = ""
    except Exception:  # noqa: BLE001 - a harness that fails is told from one that found a fault
        died = traceback.format_exc()
    Path(asked["answer"]).write_text(json.dumps({**dataclasses.asdict(result), "died": died}), encoding="utf-8")


def _require_product(folder: str) -> None:
    """Fail unless the product is the one in this folder, and not another one that is installed."""
    import deltasync
    import deltasync_server

    found = {Path(str(module.__file__)).resolve() for module in (deltasync, deltasync_server)}
    wanted = {Path(folder).resolve() / "deltasync", Path(folder).resolve() / "server/deltasync_server"}
    assert {path.parent for path in found} == wanted, f"{found} is imported where {wanted} was meant"


if __name__ == "__main__":
    main()
