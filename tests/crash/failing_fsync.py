"""Runs a store whose n-th fsync fails, for n = 1, 2, 3 … until none does: `failing_fsync.py FOLDER`, with the shim."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sender import NAME, Sender, assert_tree, give

from deltasync.core.errors import Corrupt
from deltasync_server import intake
from deltasync_server.check import check
from deltasync_server.config import StoreConfig
from deltasync_server.receive import Store

SHIM = ctypes.CDLL(None)


def run(data: Path, number: int, *, is_journalled: bool) -> str:
    """Fail one fsync of receive, tree or checkpoint; say how it went. Whatever it was, nothing acknowledged is lost.

    is_journalled: the bundle is journalled; otherwise its content is made durable by itself (spec ST-16).
    """
    intake.LARGE_BYTES = 1 << 20 if is_journalled else 1
    sender = Sender()
    sender.move_on({})
    sender.sequence = 0
    flat = sender.tree(a=b"one" * 500, sub__b=b"two" * 500)
    flat["copy"] = sender.file("copy", b"one" * 500, mtime_ns=1)
    sealed = sender.seal(flat)
    outcome = "survived"
    with Store(StoreConfig(data)) as store:
        store.recover()
        SHIM.failing_arm(number)
        try:
            give(store, *sealed)
            store.catch_up()
            store.upkeep()
        except (Corrupt, OSError) as error:
            outcome = type(error).__name__
        failed = SHIM.failing_count() >= number
        SHIM.failing_arm(-1)
    with Store(StoreConfig(data)) as store:
        store.recover()
        if store.workspace(NAME).sequence == 0:
            assert outcome != "survived"
            assert not give(store, *sealed).duplicate
        sender.move_on(flat)
        assert_tree(store, sender)
        store.upkeep()
    assert check(StoreConfig(data)).findings == []
    return outcome if failed else "none failed"


def main() -> None:
    """Sweep the points."""
    for is_journalled in (True, False):
        outcomes: list[str] = []
        while "none failed" not in outcomes:
            number = len(outcomes) + 1
            data = Path(sys.argv[1]) / f"{number}{is_journalled}"
            outcomes.append(run(data, number, is_journalled=is_journalled))
        print(" ".join(outcomes))


if __name__ == "__main__":
    main()
