"""Databases: open with the pragmas that keep promises, numbered migrations, one kind of transaction."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from deltasync.core.errors import Corrupt
from deltasync.disk import full

BUSY_SECONDS = 30.0
_FULL = frozenset({"SQLITE_IOERR_WRITE", "SQLITE_IOERR_SHMSIZE"})
"""What SQLite calls a full disk where it does not say so; the second when it opens a database."""


def connect(path: Path, migrations: Sequence[str], *, read_only: bool = False) -> sqlite3.Connection:
    """Open a database in WAL mode, where every commit is durable, and bring its schema up to date.

    migrations: one SQL script for each schema version; `PRAGMA user_version` counts those applied.
    read_only: open what is there without migrating; a reader never blocks a writer.
    Raises Corrupt when the file is no database, fails its check, or was written by a newer release.
    """
    try:
        connection = _open(path, read_only=read_only)
        try:
            _refuse_newer(connection, path, migrations)
            if not read_only:
                _keep_promises(connection)
            _bring_up_to_date(connection, path, migrations, read_only=read_only)
        except BaseException:
            connection.close()
            raise
    except sqlite3.DatabaseError as error:
        raise damaged(path, error) from error
    return connection


def connect_disposable(path: Path, migrations: Sequence[str]) -> sqlite3.Connection:
    """Open a private database that can be made again from what it is of; one that cannot be used gives way."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        connection = connect(path, migrations)
    except Corrupt:
        for suffix in ("", "-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        connection = connect(path, migrations)
    make_private(path)
    return connection


def _refuse_newer(connection: sqlite3.Connection, path: Path, migrations: Sequence[str]) -> None:
    """Raise Corrupt for the database of a newer release, before anything of it changes."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > len(migrations):
        log = path.with_name(f"{path.name}-wal")
        if log.exists() and log.stat().st_size:
            with closing(_open(path, read_only=True)) as reader:
                reader.execute("PRAGMA user_version").fetchone()
                connection.close()  # were it the last one, it would move what the log holds into the file
        raise Corrupt(f"{path} was written by a newer release (schema {version}); use that release")


def _bring_up_to_date(
    connection: sqlite3.Connection, path: Path, migrations: Sequence[str], *, read_only: bool
) -> None:
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version < len(migrations):
        if read_only:
            raise Corrupt(f"{path} has the older schema {version}; run a writing command once to migrate it")
        _migrate(connection, migrations)


def _open(path: Path, *, read_only: bool) -> sqlite3.Connection:
    target = f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}"
    connection = sqlite3.connect(target, uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA mmap_size=0")
    connection.execute("PRAGMA foreign_keys=ON")
    return connection


def _keep_promises(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    # NORMAL loses acknowledged work in a power cut. EXTRA is FULL in WAL mode; where that mode could not be had, for
    # which SQLite raises nothing, FULL would not fsync the folder that a rollback journal was removed from.
    connection.execute("PRAGMA synchronous=EXTRA")


def make_private(path: Path) -> None:
    """Let nobody but its owner read an open database, nor what SQLite keeps beside it (spec ST-5)."""
    for name in (path.name, f"{path.name}-wal", f"{path.name}-shm"):
        with suppress(FileNotFoundError):
            path.with_name(name).chmod(0o600)


def _migrate(connection: sqlite3.Connection, migrations: Sequence[str]) -> None:
    from sqlite_utils import Database  # imported here: costs 0.1 s and only a new schema needs it

    database = Database(connection)
    with transaction(connection):
        version = connection.execute("PRAGMA user_version").fetchone()[0]  # another process may have been first
        for number, script in enumerate(migrations[version:], start=version + 1):
            for statement in _statements(script):
                database.execute(statement)
            database.execute(f"PRAGMA user_version={number}")


def _statements(script: str) -> Iterator[str]:
    """Yield the statements of a script; those of a trigger are inside of it."""
    statement = ""
    for piece in script.split(";"):
        statement += piece
        if statement.strip() and sqlite3.complete_statement(f"{statement};"):
            yield statement
            statement = ""
        elif statement:
            statement += ";"


def damaged(path: Path, error: sqlite3.Error) -> Exception:
    """Turn an error of SQLite into one of ours: disk full, or a damaged database; busy stays as it is."""
    name = getattr(error, "sqlite_errorname", "")
    if name.startswith("SQLITE_FULL") or name in _FULL:
        return full(path)
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return error
    if name.startswith(("SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_READONLY")):
        return Corrupt(f"{path} cannot be used ({error}): the disk, a permission or a limit of the system refused it")
    return Corrupt(f"{path} is damaged ({error})")


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """Run a block as one transaction that takes the write lock first, so that it can never fail half-way as locked.

    Raises Corrupt when nobody can say whether it was committed: a process that dies now may find that it was.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield connection
        try:
            connection.execute("COMMIT")
        except sqlite3.OperationalError as error:
            # The log has it: only its index could not grow, or nobody knows what of it is on the disk.
            if error.sqlite_errorname.startswith(("SQLITE_IOERR_SHM", "SQLITE_IOERR_FSYNC")):
                raise Corrupt(f"a change of the database may be lost or not ({error}): the disk refused it") from error
            raise
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def is_sound(connection: sqlite3.Connection) -> bool:
    """Tell whether SQLite's own check finds the database whole."""
    try:
        return bool(connection.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok")
    except sqlite3.DatabaseError:
        return False
