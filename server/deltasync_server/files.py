"""Plain files that were uploaded by themselves: blobs under the name that their sender gave them, per sender."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from typing import NamedTuple

from deltasync.core import wire
from deltasync.core.errors import NotFound, UsageError
from deltasync.core.hashing import hasher
from deltasync.core.manifest import Kind, Operation, Verb
from deltasync.core.names import shown
from deltasync_server.blobs import Cache, Staging
from deltasync_server.intake import Permit, now
from deltasync_server.journal import Assembled
from deltasync_server.state import State, blob_rows, grant, write_blobs
from deltasync_server.tenants import Tenant

_READ_BYTES = 1 << 20


class _Digests(NamedTuple):
    blake3: bytes
    sha256: str


class Files:
    """What senders have uploaded by name; a deletion is remembered, and frees the content for a collection.

    Names are labels: nothing on the disk is named by them (spec H-81).
    """

    def __init__(self, state: State, cache: Cache) -> None:
        self._state = state
        self._cache = cache

    def store(
        self, tenant: Tenant, whole: Assembled, request: wire.UploadRequest, file_id: str, permit: Permit
    ) -> wire.StoredFile:
        """Make an assembled file a blob, once its bytes have the digest that was announced (spec H-80)."""
        found = _digests_of(whole)
        announced = {"sha256": (request.sha256, found.sha256), "blake3": (request.blake3, found.blake3.hex())}
        for name, (told, real) in announced.items():
            if told and told != real:
                raise UsageError(f"the file's {name} is {real}, not the one announced; nothing of it was stored")
        stored = wire.StoredFile(
            file_id=file_id,
            sha256=found.sha256,
            blake3=found.blake3.hex(),
            file_size=whole.size_bytes,
            status="completed",
            storage_location=f"{wire.API}/blobs/{found.blake3.hex()}",
        )
        with self._cache.staging() as staging:
            self._stage(whole, staging, found.blake3)
            try:
                permit()
                self._publish(tenant, staging, request, stored)
            except BaseException:
                _give_back(whole, staging, found.blake3)
                raise
        return stored

    def _stage(self, whole: Assembled, staging: Staging, digest: bytes) -> None:
        """Move the file to where blobs are published from; it is durable before any row names it."""
        whole.make_durable()
        mtime_ns = os.fstat(whole.descriptor).st_mtime_ns
        os.rename(whole.name, digest.hex(), src_dir_fd=whole.folder.fd, dst_dir_fd=staging.folder.fd)
        os.fchmod(whole.descriptor, self._cache.attributes.mode_of(executable=False))
        staging.is_durable = True
        staging.staged[digest] = Operation(
            operation=Verb.CREATED,
            kind=Kind.FILE,
            path=digest.hex(),
            digest=digest.hex(),
            size=whole.size_bytes,
            mtime_ns=mtime_ns,
        )

    def _publish(self, tenant: Tenant, staging: Staging, request: wire.UploadRequest, stored: wire.StoredFile) -> None:
        digest = bytes.fromhex(stored.blake3)
        with self._state.hold():
            with self._state.read() as db:
                kept = blob_rows(db, [digest])
            with self._cache.published(staging, kept) as rows, self._state.write() as db:
                write_blobs(db, rows, kept)
                grant(db, tenant, [digest])
                named = (tenant, request.hostname, request.filepath, digest, stored.sha256)
                insert = "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?, ?, NULL)"
                db.execute(insert, (*named, stored.file_id, now()))

    def delete(self, tenant: Tenant, deletions: Sequence[wire.FileDeletion]) -> list[wire.DeletedFile]:
        """Mark files deleted, all or, when one is unknown, none; deleting again gives the first answer (spec H-82)."""
        with self._state.write() as db:
            return [self._delete(db, tenant, each) for each in deletions]

    def _delete(self, db: sqlite3.Connection, tenant: Tenant, deletion: wire.FileDeletion) -> wire.DeletedFile:
        digest = bytes.fromhex(deletion.blake3) if deletion.blake3 else b""
        row = db.execute(
            "SELECT rowid, digest, sha256, deleted_at FROM files "
            "WHERE tenant = ? AND hostname = ? AND filepath = ? AND (digest = ? OR sha256 = ?)",
            (tenant, deletion.hostname, deletion.filepath, digest, deletion.sha256),
        ).fetchone()
        if row is None:
            raise NotFound(f"there is no such file {shown(deletion.filepath)} of {shown(deletion.hostname)} here")
        number, found, sha256, deleted_at = row
        if deleted_at is None:
            deleted_at = deletion.deleted_at or now()
            db.execute("UPDATE files SET deleted_at = ? WHERE rowid = ?", (deleted_at, number))
        return wire.DeletedFile(
            sha256=sha256,
            blake3=found.hex(),
            filepath=deletion.filepath,
            hostname=deletion.hostname,
            status="deleted",
            deleted_at=deleted_at,
        )


def check_deletion(deletion: wire.FileDeletion) -> None:
    """Refuse a deletion that names no file or no moment."""
    if not (deletion.sha256 or deletion.blake3):
        raise UsageError("a file is named by its sha256 or blake3, its filepath and its hostname")
    if deletion.deleted_at is not None:
        try:
            datetime.fromisoformat(deletion.deleted_at)
        except ValueError:
            raise UsageError("deleted_at is a time such as 2026-01-05T12:00:00Z") from None


def _digests_of(whole: Assembled) -> _Digests:
    blake3, sha256 = hasher(), hashlib.sha256()
    while part := whole.read(_READ_BYTES):
        blake3.update(part)
        sha256.update(part)
    return _Digests(blake3.digest(), sha256.hexdigest())


def _give_back(whole: Assembled, staging: Staging, digest: bytes) -> None:
    """Put a file that did not get as far as the cache back among the uploads, so that it can be completed later."""
    with suppress(FileNotFoundError):  # it may be a blob, which nobody may write
        os.rename(digest.hex(), whole.name, src_dir_fd=staging.folder.fd, dst_dir_fd=whole.folder.fd)
        os.fchmod(whole.descriptor, 0o600)
