"""Upkeep: checkpoints come in quiet moments, and at once when the journal is large."""

from __future__ import annotations

import threading
from pathlib import Path

from sender import NAME, Sender, assert_tree

from deltasync_server.config import StoreConfig
from deltasync_server.receive import Store

WAIT = 20.0


def wait_until_empty(folder: Path) -> None:
    """Wait on the condition itself: a folder that the upkeep empties."""
    tick = threading.Event()
    for _ in range(int(WAIT / 0.01)):
        if not list(folder.iterdir()):
            return
        tick.wait(0.01)
    raise AssertionError(f"{folder} is not empty after {WAIT} s")


def test_a_quiet_store_checkpoints_by_itself(tmp_path: Path) -> None:
    """Soon after the last bundle the journal is empty, without a restart or a command."""
    sender = Sender()
    with Store(StoreConfig(tmp_path, quiet_seconds=0.05)) as store:
        store.recover()
        store.start()
        sender.send(store, sender.tree(a=b"one", sub__b=b"two"))
        wait_until_empty(tmp_path / "journal")
        assert_tree(store, sender)


def test_a_large_journal_does_not_wait_for_quiet(tmp_path: Path) -> None:
    """Beyond its limit the journal is checkpointed although bundles keep arriving."""
    sender = Sender()
    with Store(StoreConfig(tmp_path, quiet_seconds=3600, journal_bytes=1)) as store:
        store.recover()
        store.start()
        for number in range(5):
            sender.send(store, sender.tree(n=b"%d" % number))
        wait_until_empty(tmp_path / "journal")
        assert_tree(store, sender)


def test_old_directory_objects_go_by_themselves(tmp_path: Path) -> None:
    """A large directory that changes often does not fill the database."""
    sender = Sender()
    with Store(StoreConfig(tmp_path, keep_sequences=2)) as store:
        store.recover()
        store._upkeep.note_commit(journal_bytes=0, object_bytes=1 << 40)
        for number in range(6):
            sender.send(store, sender.tree(n=b"%d" % number))
        store.catch_up()
        store.upkeep()
        with store.state.read() as db:
            assert db.execute("SELECT count(*) FROM objects").fetchone() == (2,)
            assert db.execute("SELECT count(*) FROM blobs").fetchone() == (6,)
        assert store.workspace(NAME).sequence == 6
