"""The server's databases: of a newer release, with a page that rots, and readable for nobody else."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from sender import NAME, Sender

from deltasync.core.errors import Corrupt, Unauthorized
from deltasync_server.access import DATABASE as ACCESS
from deltasync_server.access import Access, Scope
from deltasync_server.check import check
from deltasync_server.config import StoreConfig
from deltasync_server.opening import DATABASE as STATE
from deltasync_server.receive import Store
from deltasync_server.tenants import DEFAULT

PAGE_BYTES = 4096


def made(data: Path) -> Sender:
    """Make a store with a tree, and a token for it."""
    sender = Sender()
    with Store(StoreConfig(data)) as store:
        store.recover()
        sender.send(store, sender.tree(a=b"one" * 50, sub__b=b"two" * 50))
        store.catch_up()
        store.upkeep()
    with Access(data) as access:
        access.create(DEFAULT, [Scope.READ], "", None)
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


def rotten(path: Path, sound: bytes, number: int) -> None:
    """Write a database whose page of this number is noise, or zeros."""
    fill = b"\xa5" if number % 2 else b"\0"
    path.write_bytes(sound[: number * PAGE_BYTES] + fill * PAGE_BYTES + sound[(number + 1) * PAGE_BYTES :])


def right_or_refused(asks: Callable[[], object], right: object) -> None:
    with contextlib.suppress(Corrupt):
        assert asks() == right


def test_every_page_of_the_store_that_rots_is_found(tmp_path: Path) -> None:
    """`check` names the database; a start is refused, or each of its answers is right or a refusal."""
    sender, config, path = made(tmp_path), StoreConfig(tmp_path), tmp_path / STATE
    digests = [digest.hex() for digest in sender.contents]
    sound = path.read_bytes()
    assert check(config).is_sound and len(sound) > 20 * PAGE_BYTES
    for number in range(len(sound) // PAGE_BYTES):
        rotten(path, sound, number)
        with pytest.raises(Corrupt, match=STATE):
            check(config)
        with contextlib.suppress(Corrupt), Store(config) as store:
            store.recover()
            right_or_refused(lambda store=store: store.workspace(NAME).root, sender.root.hex())
            right_or_refused(lambda store=store: store.missing(NAME, digests).missing, [])
            right_or_refused(lambda store=store: len(store.sequences(NAME).sequences), 1)
            for digest, content in sender.contents.items():
                right_or_refused(lambda store=store, digest=digest: read(store, digest), content)


def read(store: Store, digest: bytes) -> bytes:
    stream, _ = store.open_blob(DEFAULT, digest)
    with stream:
        return stream.read()


def test_every_page_of_the_tokens_that_rots_is_found(tmp_path: Path) -> None:
    """`check` names the database, and no token is taken or refused by what is left of it."""
    made(tmp_path)
    path = tmp_path / ACCESS
    with Access(tmp_path) as access:
        row, text = access.create(DEFAULT, [Scope.READ], "", None)
    sound = path.read_bytes()
    for number in range(len(sound) // PAGE_BYTES):
        rotten(path, sound, number)
        with pytest.raises(Corrupt, match=ACCESS):
            check(StoreConfig(tmp_path))
        with contextlib.suppress(Corrupt), Access(tmp_path) as access:
            right_or_refused(lambda access=access: access.caller(text).token, row.id)
            with pytest.raises((Corrupt, Unauthorized)):
                access.caller(f"{text[:-4]}0000")
