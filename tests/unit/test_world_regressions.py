"""What the simulated world has found, each in the smallest form that shows it."""

from __future__ import annotations

from pathlib import Path

from sender import NAME

from deltasync_server.config import StoreConfig
from deltasync_server.receive import Store

NEVER_SECONDS = 60.0


def test_the_empty_tree_of_a_workspace_that_was_never_written_is_there_at_once(tmp_path: Path) -> None:
    """Sequence 0 is held by every workspace: waiting for it does not use up the time."""
    with Store(StoreConfig(tmp_path)) as store:
        before = store.health().uptime_seconds
        assert store.wait_for_tree(NAME, 0, NEVER_SECONDS).tree_sequence == 0
        assert store.health().uptime_seconds - before < NEVER_SECONDS / 2
