"""Transactions of our databases where SQLite itself cannot say what became of them."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from deltasync.core.errors import Corrupt
from deltasync.db import transaction


class _Failing(sqlite3.Connection):
    """A connection whose COMMIT fails with an error of the operating system."""

    name = ""

    def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
        if sql == "COMMIT":
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorname = self.name
            raise error
        return super().execute(sql, *arguments)


@pytest.mark.parametrize(
    ("name", "raised"),
    [
        ("SQLITE_IOERR_SHMSIZE", Corrupt),
        ("SQLITE_IOERR_FSYNC", Corrupt),
        ("SQLITE_IOERR_WRITE", sqlite3.OperationalError),
    ],
)
def test_a_commit_that_may_have_come_through_is_not_told_as_a_full_disk(
    name: str, raised: type[Exception], tmp_path: Path
) -> None:
    """Once the log holds a commit, a process that dies finds it again although an fsync or its index failed."""
    connection = sqlite3.connect(tmp_path / "state.db", factory=_Failing, isolation_level=None)
    connection.name = name
    connection.execute("CREATE TABLE t (a)")
    with pytest.raises(raised), transaction(connection) as db:
        db.execute("INSERT INTO t VALUES (1)")
    assert not connection.in_transaction
    connection.close()
