"""`make replay`: the reference bundles into a fresh server; its root after the last one must be the expected one."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.contestants import BIN, environment

GOOD = Path(__file__).parents[1] / "bundles" / "good"


def main() -> int:
    """Replay the good chain into an empty store and compare the roots; returns 1 when they differ."""
    expected = json.loads((GOOD / "index.json").read_text())[-1]["root"]
    with tempfile.TemporaryDirectory(prefix="deltasync-replay-") as folder:
        data = Path(folder) / "data"
        command: list[str | Path] = [BIN / "deltasync-server", "replay", GOOD, "--data", data]
        print(f"deltasync-server replay bundles/good --data {data}", flush=True)
        subprocess.run(command, check=True, env=environment(Path(folder)))
        again = subprocess.run([*command, "--json"], check=True, env=environment(Path(folder)), capture_output=True)
        root = json.loads(again.stdout)["workspaces"][0]["root"]
    print(f"root      {root}\nexpected  {expected}\n{'equal' if root == expected else 'NOT EQUAL'}")
    return 0 if root == expected else 1


if __name__ == "__main__":
    sys.exit(main())
