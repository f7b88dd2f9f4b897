"""What the other users of the host can read of a store: content and trees, which are for them, and nothing else."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from sender import NAME, Sender

from deltasync.core import wire
from deltasync.core.hashing import digest_of
from deltasync_server.access import Access, Scope
from deltasync_server.audit import Audit
from deltasync_server.config import StoreConfig
from deltasync_server.receive import Store
from deltasync_server.tenants import DEFAULT

FOR_ALL = {"cache", "workspaces", "lock"}
"""The lock is empty."""


@pytest.fixture(autouse=True)
def wide_umask() -> Iterator[None]:
    """Let every mode that is not chosen show itself."""
    before = os.umask(0)
    yield
    os.umask(before)


def open_to_others(folder: Path) -> set[str]:
    """Return the files below a folder whose bytes, and the folders whose names, others may read."""
    found: set[str] = set()
    for path in folder.iterdir():
        mode = path.stat().st_mode
        if mode & 0o044:
            found.add(path.name)
        if path.is_dir() and mode & 0o011:
            found |= {f"{path.name}/{name}" for name in open_to_others(path)}
    return found


def fill(store: Store) -> None:
    """Leave a bundle in the journal, a piece of an upload, and a tree."""
    sender = Sender()
    sender.send(store, sender.tree(a=b"one" * 50))
    asked = wire.UploadRequest(kind="file", hostname="h", filepath="/f", file_size=9, chunk_size=4, blake3="0" * 64)
    upload = store.uploads.initiate(DEFAULT, asked).upload_id
    store.uploads.put(DEFAULT, upload, 0, io.BytesIO(b"part"))
    store.catch_up()


@pytest.mark.parametrize("is_older", [False, True], ids=["new", "of-an-earlier-release"])
def test_other_users_read_content_and_trees_and_nothing_else(tmp_path: Path, *, is_older: bool) -> None:
    """Journal, uploads, staging and both databases are their owner's alone, also where they once were not."""
    data = tmp_path / "data"
    with Store(StoreConfig(data)) as store, Access(data) as access, Audit(data) as audit:
        store.recover()
        fill(store)
        access.create(DEFAULT, [Scope.PUSH], "", None)
        audit.note("something")
    if is_older:
        for name in ("journal", "uploads", "parts", "staging", "quarantine"):
            (data / name).chmod(0o755)
        for name in ("state.db", "access.db"):
            (data / name).chmod(0o644)
            for kept in ("-wal", "-shm"):
                (data / f"{name}{kept}").touch(0o644)
    with Store(StoreConfig(data)) as store, Access(data) as access:
        store.recover()
        assert store.workspace(NAME).sequence == 1
        access.create(DEFAULT, [Scope.PUSH], "", None)
        assert (data / "state.db-wal").exists() and (data / "access.db-wal").exists()
        assert list((data / "journal").iterdir()) and list((data / "uploads").iterdir())
        found = open_to_others(data)
        assert {name.partition("/")[0] for name in found} <= FOR_ALL
        digest = digest_of(b"one" * 50).hex()
        assert {f"workspaces/{NAME}/tree/a", f"cache/{digest[:2]}/{digest}"} <= found
    assert not (data / "lock").read_bytes()
