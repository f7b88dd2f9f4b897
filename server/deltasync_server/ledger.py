"""The ledger: every byte below DATA, counted as `du` counts it, and what each tenant has of it (spec ST-130)."""

from __future__ import annotations

import os
import sqlite3
import stat
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec

from deltasync.core import wire
from deltasync_server.config import StoreConfig
from deltasync_server.state import State
from deltasync_server.tenants import FOLDER, Tenant, tenant_of

_TREES, _BUNDLES, _CACHE, _SESSIONS, _LOGS = "workspaces", "bundles", "cache", "sessions", "jobs"
_LIVE = ("journal", "uploads", "parts")
"""Folders whose owners say at any time what is in them."""


class Measured(Protocol):
    """Something that takes space below DATA and knows how much."""

    def size_bytes(self) -> int:
        """Return how many bytes it takes now."""


class Share(NamedTuple):
    """What a tenant holds of the cache; content that several hold counts for each of them."""

    blobs: int
    bytes: int


class Ledger:
    """Counts what the store holds: all of it when asked for a count, and in between what changed since the last one."""

    def __init__(self, config: StoreConfig, state: State) -> None:
        self._config = config
        self._state = state
        self.live: tuple[Measured, ...] = ()
        """The owners of the folders that `_LIVE` names."""
        self._lock = threading.Lock()
        self._beside = 0
        """What lies beside the cache and the folders of `_LIVE`, since the last count."""
        self._coming: Counter[Tenant] = Counter()

    def count(self) -> dict[str, int]:
        """Return the bytes of every regular file below DATA, by what they are for."""
        with self._state.read() as db:
            found = bytes_by_kind(self._config.data, db)
        with self._lock:
            self._beside = sum(size for kind, size in found.items() if kind not in (_CACHE, "staging", *_LIVE))
        return found

    def held_bytes(self) -> int:
        """Return what the store takes: the last count of what changes seldom, everything else as it is now."""
        with self._state.read() as db:
            held = cached(db).bytes
        held += sum(each.size_bytes() for each in self.live)
        with self._lock:
            return held + self._beside + self._coming.total()

    def note_copy(self, size_bytes: int) -> None:
        """Count a file that a tree holds by itself; one that goes is no longer counted from the next count on."""
        with self._lock:
            self._beside += size_bytes

    def expect(self, tenant: Tenant, size_bytes: int) -> None:
        """Count content of a tenant as coming, or, of negative size, as coming no more."""
        with self._lock:
            self._coming[tenant] += size_bytes

    def files(self, tenant: Tenant) -> int:
        """Return how many files the workspaces of a tenant have."""
        with self._state.read() as db:
            return files_of(db, tenant)

    def usage(self, tenant: Tenant) -> wire.Usage:
        """Return what a tenant holds, with what is on its way, and what it may hold."""
        with self._state.read() as db:
            usage = usage_of(db, self._config, tenant)
        with self._lock:
            return msgspec.structs.replace(usage, bytes=usage.bytes + self._coming[tenant])


def bytes_by_kind(data: Path, db: sqlite3.Connection) -> dict[str, int]:
    """Return the bytes of every regular file below DATA, by what they are for; a hard link counts once.

    The cache is counted by its rows, a file of a tree only where it is no link of a blob.
    """
    found = dict.fromkeys((_CACHE, _TREES, _BUNDLES, _SESSIONS, _LOGS, "quarantine", "staging", *_LIVE, "other"), 0)
    for entry in os.scandir(data):
        if not entry.is_dir(follow_symlinks=False):
            found["other"] += _size_of(entry)
        elif entry.name == FOLDER:
            for kind, size in _of_tenants(entry.path):
                found[kind] += size
        elif entry.name != _CACHE:
            kind = entry.name if entry.name in found else "other"
            found[kind] += _bytes_below(entry.path, is_linked=kind in (_TREES, _SESSIONS))
    found[_CACHE] = cached(db).bytes
    return found


def _of_tenants(folder: str) -> Iterator[tuple[str, int]]:
    for tenant in os.scandir(folder):
        for kind in (_TREES, _BUNDLES):
            yield kind, _bytes_below(f"{tenant.path}/{kind}", is_linked=kind == _TREES)


def usage_of(db: sqlite3.Connection, config: StoreConfig, tenant: Tenant) -> wire.Usage:
    """Return what a tenant holds and may hold, without what is on its way."""
    return wire.Usage(
        bytes=share_of(db, tenant).bytes - _idle_bytes(db, tenant) + _arrived_bytes(db, tenant),
        bytes_limit=config.tenant_quota,
        files=files_of(db, tenant),
        files_limit=config.tenant_files,
    )


def _bytes_below(folder: str, *, is_linked: bool) -> int:
    """Return the bytes of the regular files below a folder. is_linked: leave out those that have another name."""
    total = 0
    if not Path(folder).is_dir():
        return total  # a tenant without workspaces, or without bundles that are kept
    for _, _, files, descriptor in os.fwalk(folder, follow_symlinks=False):
        for name in files:
            try:
                status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
            except FileNotFoundError:
                continue  # it went meanwhile
            if stat.S_ISREG(status.st_mode) and not (is_linked and status.st_nlink > 1):
                total += status.st_size
    return total


def _size_of(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat(follow_symlinks=False).st_size if entry.is_file(follow_symlinks=False) else 0
    except FileNotFoundError:
        return 0


def cached(db: sqlite3.Connection) -> Share:
    """Return how many blobs the cache has, and their bytes; triggers keep the row in step with every transaction."""
    return Share._make(db.execute("SELECT blobs, bytes FROM cached").fetchone())


def share_of(db: sqlite3.Connection, tenant: Tenant) -> Share:
    """Return what a tenant holds of the cache."""
    row = db.execute("SELECT blobs, bytes FROM shares WHERE tenant = ?", (tenant,)).fetchone()
    return Share._make(row or (0, 0))


def files_of(db: sqlite3.Connection, tenant: Tenant) -> int:
    """Return how many files the heads of a tenant's workspaces name."""
    rows = db.execute("SELECT name, files FROM workspaces")
    return sum(files for name, files in rows if tenant_of(name) == tenant)


def _idle_bytes(db: sqlite3.Connection, tenant: Tenant) -> int:
    """Return what a tenant holds of content that nothing of its own needs, whoever else does (spec ST-105)."""
    select = "SELECT coalesce(sum(size), 0) FROM let_go JOIN blobs USING (digest) WHERE tenant = ?"
    return int(db.execute(select, (tenant,)).fetchone()[0])


def _arrived_bytes(db: sqlite3.Connection, tenant: Tenant) -> int:
    """Return what is there of contents of a tenant that come in parts."""
    rows = db.execute("SELECT workspace, size FROM streams")
    return sum(size for workspace, size in rows if tenant_of(workspace) == tenant)


_CACHED = "SELECT count(*), coalesce(sum(size), 0) FROM blobs"
_SHARES = "SELECT tenant, count(*), sum(size) FROM holdings JOIN blobs USING (digest) GROUP BY tenant"


def is_counted(db: sqlite3.Connection) -> bool:
    """Tell whether the rows that triggers keep are what a count of all rows gives."""
    shares = {row for row in db.execute("SELECT * FROM shares") if row[1:] != (0, 0)}
    return cached(db) == db.execute(_CACHED).fetchone() and shares == set(db.execute(_SHARES))


def count_again(db: sqlite3.Connection) -> None:
    """Write these rows anew."""
    db.execute(f"UPDATE cached SET (blobs, bytes) = ({_CACHED})")
    db.execute("DELETE FROM shares")
    db.execute(f"INSERT INTO shares {_SHARES}")
