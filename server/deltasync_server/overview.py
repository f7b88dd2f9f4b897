"""What a store holds, for its operator: read beside a running server, which it neither stops nor waits for (H-49)."""

from __future__ import annotations

import contextlib
import os
import sqlite3

import msgspec

from deltasync.core.names import bytes_text, shown
from deltasync.db import connect
from deltasync_server.config import StoreConfig
from deltasync_server.ledger import bytes_by_kind, usage_of
from deltasync_server.opening import no_store
from deltasync_server.room import inodes_of, space_of
from deltasync_server.state import MIGRATIONS, WorkspaceRow, workspace_rows
from deltasync_server.tenants import Tenant, own_name, tenant_of, tenant_text


class Disk(msgspec.Struct, frozen=True, kw_only=True):
    """The disk below a store, and what of it is never used (spec ST-89, ST-134)."""

    free_bytes: int
    total_bytes: int
    reserve_bytes: int
    free_inodes: int
    reserve_inodes: int


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """What a tenant holds and may hold (spec H-108)."""

    tenant: str
    bytes: int
    bytes_limit: int | None
    files: int
    files_limit: int | None
    workspaces: int


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a workspace stands."""

    tenant: str
    workspace: str
    sequence: int
    tree_sequence: int | None
    has_tree: bool = True
    """What jobs returned has none (spec J-61)."""
    files: int
    content_bytes: int
    wanted: int


class Overview(msgspec.Struct, frozen=True, kw_only=True):
    """A whole store."""

    data: str
    held_bytes: int
    quota_bytes: int | None
    bytes: dict[str, int]
    """By what they are for, as the ledger counts them (spec ST-130)."""
    idle_bytes: int
    """What of the cache nothing needs, as far as it was looked up (spec ST-133)."""
    disk: Disk
    tenants: list[Share]
    workspaces: list[Place]


def overview(config: StoreConfig) -> Overview:
    """Return what a store holds; nothing of it is locked or changed."""
    database = config.data / "state.db"
    if not database.is_file():
        raise no_store(config.data)
    with contextlib.closing(connect(database, MIGRATIONS, read_only=True)) as db:
        db.execute("BEGIN")  # every query sees the same moment
        rows, found = workspace_rows(db), bytes_by_kind(config.data, db)
        return Overview(
            data=str(config.data),
            held_bytes=sum(found.values()),
            quota_bytes=config.quota,
            bytes=found,
            idle_bytes=db.execute("SELECT coalesce(sum(size), 0) FROM idle JOIN blobs USING (digest)").fetchone()[0],
            disk=_disk(config),
            tenants=[_share(db, config, rows, tenant) for tenant in _tenants(db, rows)],
            workspaces=[_place(db, row) for row in rows],
        )


def lines(found: Overview) -> list[str]:
    """Return the same for people."""
    disk, quota = found.disk, "" if found.quota_bytes is None else f" of {bytes_text(found.quota_bytes)}"
    kinds = ", ".join(f"{kind} {bytes_text(size)}" for kind, size in found.bytes.items() if size)
    return [
        f"{shown(found.data)} holds {bytes_text(found.held_bytes)}{quota}: {kinds}",
        f"{bytes_text(found.idle_bytes)} of the cache can go when room is needed",
        f"{bytes_text(disk.free_bytes)} of {bytes_text(disk.total_bytes)} are free on the disk, "
        f"{bytes_text(disk.reserve_bytes)} of them the reserve; {disk.free_inodes} inodes are free, "
        f"{disk.reserve_inodes} of them the reserve",
        *(
            f"tenant {each.tenant}: {bytes_text(each.bytes)}{_limit(each.bytes_limit, is_bytes=True)} in "
            f"{each.workspaces} workspaces, {each.files}{_limit(each.files_limit)} files"
            for each in found.tenants
        ),
        *(
            f"workspace {shown(each.workspace)} of {each.tenant}: sequence {each.sequence}, "
            f"{_tree(each)}, "
            f"{each.files} files, {bytes_text(each.content_bytes)}, {each.wanted} contents wanted"
            for each in found.workspaces
        ),
    ]


def _tree(place: Place) -> str:
    if not place.has_tree:
        return "it has no tree"
    return "its tree moves" if place.tree_sequence is None else f"its tree holds {place.tree_sequence}"


def _limit(limit: int | None, *, is_bytes: bool = False) -> str:
    return "" if limit is None else f" of {bytes_text(limit) if is_bytes else limit}"


def _disk(config: StoreConfig) -> Disk:
    (free_bytes, reserve_bytes), (free_inodes, reserve_inodes) = space_of(config), inodes_of(config)
    disk = os.statvfs(config.data)
    return Disk(
        free_bytes=free_bytes,
        total_bytes=disk.f_blocks * disk.f_frsize,
        reserve_bytes=reserve_bytes,
        free_inodes=free_inodes,
        reserve_inodes=reserve_inodes,
    )


def _tenants(db: sqlite3.Connection, rows: list[WorkspaceRow]) -> list[Tenant]:
    shares = {Tenant(tenant) for (tenant,) in db.execute("SELECT tenant FROM shares")}
    return sorted(shares | {tenant_of(row.name) for row in rows})


def _share(db: sqlite3.Connection, config: StoreConfig, rows: list[WorkspaceRow], tenant: Tenant) -> Share:
    usage = usage_of(db, config, tenant)
    return Share(
        tenant=tenant_text(tenant),
        bytes=usage.bytes,
        bytes_limit=usage.bytes_limit,
        files=usage.files,
        files_limit=usage.files_limit,
        workspaces=sum(tenant_of(row.name) == tenant for row in rows),
    )


def _place(db: sqlite3.Connection, row: WorkspaceRow) -> Place:
    select = "SELECT count(*) FROM wanted WHERE workspace = ? AND NOT healed"
    return Place(
        tenant=tenant_text(tenant_of(row.name)),
        workspace=own_name(row.name),
        sequence=row.sequence,
        tree_sequence=None if row.moving_to is not None else row.tree_sequence,
        has_tree=row.has_tree,
        files=row.files,
        content_bytes=row.content_bytes,
        wanted=db.execute(select, (row.name,)).fetchone()[0],
    )
