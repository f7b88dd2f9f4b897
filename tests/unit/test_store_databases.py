"""The server's databases: of a newer release, with a page that rots, and readable for nobody else."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from sender import Sender

from deltasync.core.errors import Corrupt
from deltasync_server.access import DATABASE as ACCESS
from deltasync_server.access import Access
from deltasync_server.check import check
from deltasync_server.config import StoreConfig
from deltasync_server.opening import DATABASE as STATE
from deltasync_server.receive import Store


def made(data: Path) -> Sender:
    """Make a store with a tree, and a token for it."""
    sender = Sender()
    with Store(StoreConfig(data)) as store:
        store.recover()
        sender.send(store, sender.tree(a=b"one" * 50, sub__b=b"two" * 50))
        store.catch_up()
        store.upkeep()
    with Access(data) as access:
        access.create("", [], "", None)
    return sender


def open_store(data: Path) -> None:
    Store(StoreConfig(data)).stop()


def open_access(data: Path) -> None:
    Access(data).close()


def newer(data: Path, database: str, *, is_killed: bool) -> None:
    """Give a database the schema of a release to come; is_killed: what says so lies in its log alone."""
    with contextlib.closing(sqlite3.connect(data / database, isolation_level=None)) as db:
        db.execute("PRAGMA user_version = 99")
        if is_killed:
            for name in (database, f"{database}-wal"):
                shutil.copy(data / name, data / f"{name}.kept")
    if is_killed:
        for name in (database, f"{database}-wal"):
            (data / f"{name}.kept").rename(data / name)


@pytest.mark.parametrize("is_killed", [False, True], ids=["ended", "killed"])
@pytest.mark.parametrize(
    ("database", "opens"),
    [(STATE, open_store), (STATE, lambda data: check(StoreConfig(data))), (ACCESS, open_access)],
    ids=["store", "check", "access"],
)
def test_a_database_of_a_newer_release_is_refused_and_left_as_it_is(
    tmp_path: Path, database: str, opens: Callable[[Path], None], *, is_killed: bool
) -> None:
    """Not a byte of it changes, nor of its log, and nothing is made beside it."""
    made(tmp_path)
    newer(tmp_path, database, is_killed=is_killed)
    (tmp_path / database).chmod(0o640)

    def seen() -> dict[Path, tuple[int, bytes]]:
        files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.endswith("-shm")]
        return {path: (path.stat().st_mode, path.read_bytes()) for path in files}

    before = seen()
    assert (tmp_path / f"{database}-wal").exists() == is_killed
    with pytest.raises(Corrupt, match="newer release"):
        opens(tmp_path)
    assert seen() == before
