"""Removing trees: what is gone already is no trouble."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from deltasync.disk import Folder, remove_tree


def test_two_removals_of_a_tree_hinder_nobody(tmp_path: Path) -> None:
    """Whoever comes second to a folder finds it gone, which is what both want."""
    with Folder.open(tmp_path) as parent, ThreadPoolExecutor(2) as pool:
        for _ in range(30):
            for number in range(40):
                (tmp_path / f"tree/{number}/deep").mkdir(parents=True)
            ready = threading.Barrier(2)

            def remove(ready: threading.Barrier = ready) -> None:
                ready.wait()
                remove_tree(parent, "tree")

            for each in [pool.submit(remove) for _ in range(2)]:
                each.result()
            assert not (tmp_path / "tree").exists()
