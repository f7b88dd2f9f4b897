"""Upkeep: checkpoints come in quiet moments, and at once when the journal is large."""

from __future__ import annotations

import errno
import os
import re
import threading
from pathlib import Path

import pytest
from sender import NAME, Sender, assert_tree, tree_of

from deltasync_server.check import check
from deltasync_server.config import StoreConfig
from deltasync_server.receive import Store
from deltasync_server.state import workspace_rows

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


class FailingDisk:
    """Fails the first fsyncs of a blob or of a folder of the cache with EIO."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pattern: str, times: int) -> None:
        self.left, self._pattern, self._real = times, pattern, os.fsync
        monkeypatch.setattr(os, "fsync", self._fsync)

    def _fsync(self, descriptor: int) -> None:
        if self.left and re.search(self._pattern, os.readlink(f"/proc/self/fd/{descriptor}")):
            self.left -= 1
            raise OSError(errno.EIO, "the disk failed")
        self._real(descriptor)


def inodes(store: Store) -> set[int]:
    """Return the inodes of all blobs."""
    return {each.stat().st_ino for each in (store.config.data / "cache").rglob("*") if each.is_file()}


def test_a_cache_folder_that_the_disk_failed_gets_its_names_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A journal file goes only after every name that stands for it was made again, and is durable (spec ST-43)."""
    sender = Sender()
    with Store(StoreConfig(tmp_path)) as store:
        store.recover()
        sender.send(store, sender.tree(a=b"one"))
        store.catch_up()
        before = inodes(store)
        FailingDisk(monkeypatch, r"/cache/..$", times=2)
        for _ in range(2):
            with pytest.raises(OSError, match="the disk failed"):
                store.upkeep()
            assert list((tmp_path / "journal").iterdir())
        store.upkeep()
        assert not list((tmp_path / "journal").iterdir())
        assert not inodes(store) & before
        assert_tree(store, sender)


def test_a_blob_that_the_disk_failed_twice_is_written_anew_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that failed last is not asked by the next checkpoint: it would say yes (spec ST-43)."""
    sender = Sender()
    with Store(StoreConfig(tmp_path)) as store:
        store.recover()
        sender.send(store, sender.tree(a=b"one"))
        FailingDisk(monkeypatch, r"/cache/../\w+$", times=2)
        store.upkeep()
        assert list((tmp_path / "journal").iterdir())
        failed = inodes(store)
        store.upkeep()
        assert not list((tmp_path / "journal").iterdir())
        assert not inodes(store) & failed
        assert_tree(store, sender)


@pytest.mark.parametrize("link", ["copy", "auto"])
@pytest.mark.parametrize("pattern", [r"/tree/sub/b$", r"/tree/sub$", r"/tree$"])
def test_what_the_disk_failed_in_a_tree_is_placed_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link: str, pattern: str
) -> None:
    """A file or folder whose fsync failed is not asked again: another inode, or name, takes its place (spec ST-51)."""
    sender = Sender()
    with Store(StoreConfig(tmp_path, link=link)) as store:
        store.recover()
        sender.send(store, sender.tree(a=b"one", sub__b=b"two"))
        store.catch_up()
        path = tree_of(store) / "sub/b"
        with path.open("rb") as held:  # so that no other file gets its inode number
            FailingDisk(monkeypatch, pattern, times=1)
            with pytest.raises(OSError, match="not made durable"):
                store.upkeep()  # it is tried again soon
            assert store.workspace(NAME).tree_sequence is None
            assert_tree(store, sender)
            is_same = os.path.samestat(os.fstat(held.fileno()), path.stat())
            # A name that is made again is enough where the folder failed, and the bytes were durable.
            assert is_same == (link == "auto" and pattern != r"/tree/sub/b$")
        store.upkeep()
        with store.state.read() as db:
            (row,) = workspace_rows(db)
        assert row.durable_root == row.tree_root == sender.root
        assert_tree(store, sender)
    assert check(StoreConfig(tmp_path)).findings == []
