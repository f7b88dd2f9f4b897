"""The store's database: heads, receipts, directory objects, blob rows; one writer, any number of readers."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from queue import Empty, LifoQueue
from typing import NamedTuple

from deltasync.core import wire
from deltasync.core.errors import Corrupt
from deltasync.core.hashing import DIGEST_BYTES
from deltasync.core.jobs import inputs_of
from deltasync.core.manifest import EMPTY_ROOT, Entry, decode_directory
from deltasync.core.sequence import Head
from deltasync.core.tree import Loader
from deltasync.db import connect, damaged, make_private, transaction
from deltasync.decoding import decoded
from deltasync_server.tenants import Tenant, own_name, tenant_of

HOST = "0" * 32
"""The client id of what the host itself writes: the workspaces of returns, which have no plain tree (spec J-61)."""
NO_CLIENT = f"the client id {HOST} is the host's own, and no client's; remove the file that holds it, to get another"
BATCH = 500
"""Digests in one query; SQLite takes 999 parameters everywhere."""

MIGRATIONS = (
    """
    CREATE TABLE workspaces (
        name TEXT PRIMARY KEY,
        client_id TEXT NOT NULL,
        epoch TEXT NOT NULL,
        sequence INTEGER NOT NULL,
        root BLOB NOT NULL,
        files INTEGER NOT NULL,
        content_bytes INTEGER NOT NULL,
        last_bundle_id TEXT NOT NULL,
        last_applied_at TEXT NOT NULL,
        last_upload_status TEXT NOT NULL,
        tree_sequence INTEGER NOT NULL,
        tree_root BLOB NOT NULL,
        moving_to INTEGER,
        durable_root BLOB NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE epochs (
        workspace TEXT NOT NULL,
        epoch TEXT NOT NULL,
        PRIMARY KEY (workspace, epoch)
    ) WITHOUT ROWID;
    CREATE TABLE receipts (
        workspace TEXT NOT NULL,
        sequence INTEGER NOT NULL,
        epoch TEXT NOT NULL,
        identity BLOB NOT NULL,
        root BLOB NOT NULL,
        body BLOB NOT NULL,
        journal TEXT,
        carried BLOB,
        file_name TEXT NOT NULL,
        is_kept INTEGER NOT NULL,
        PRIMARY KEY (workspace, sequence)
    );
    CREATE INDEX receipts_journal ON receipts (journal) WHERE journal IS NOT NULL;
    CREATE TABLE objects (
        digest BLOB PRIMARY KEY,
        body BLOB NOT NULL
    );
    CREATE TABLE blobs (
        digest BLOB PRIMARY KEY,
        size INTEGER NOT NULL,
        mtime_ns INTEGER NOT NULL,
        executable INTEGER NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE stamps (
        digest BLOB PRIMARY KEY,
        mtime_ns INTEGER NOT NULL,
        executable INTEGER NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE wanted (
        workspace TEXT NOT NULL,
        digest BLOB NOT NULL,
        healed INTEGER NOT NULL,
        PRIMARY KEY (workspace, digest)
    ) WITHOUT ROWID;
    CREATE TABLE audit (
        id INTEGER PRIMARY KEY,
        at TEXT NOT NULL,
        workspace TEXT NOT NULL,
        event TEXT NOT NULL,
        detail TEXT NOT NULL
    )
    """,
    """
    CREATE TABLE adopted (
        digest BLOB PRIMARY KEY,
        until INTEGER NOT NULL
    ) WITHOUT ROWID
    """,
    """
    CREATE TABLE uploads (
        id TEXT PRIMARY KEY,
        request BLOB NOT NULL,
        answer BLOB
    ) WITHOUT ROWID;
    CREATE TABLE upload_pieces (
        upload TEXT NOT NULL,
        number INTEGER NOT NULL,
        size INTEGER NOT NULL,
        etag BLOB NOT NULL,
        PRIMARY KEY (upload, number)
    ) WITHOUT ROWID
    """,
    """
    CREATE TABLE files (
        hostname TEXT NOT NULL,
        filepath TEXT NOT NULL,
        digest BLOB NOT NULL,
        sha256 TEXT NOT NULL,
        file_id TEXT NOT NULL,
        stored_at TEXT NOT NULL,
        deleted_at TEXT,
        PRIMARY KEY (hostname, filepath, digest)
    )
    """,
    """
    CREATE TABLE streams (
        id BLOB PRIMARY KEY,
        workspace TEXT NOT NULL,
        size INTEGER NOT NULL,
        touched INTEGER NOT NULL
    ) WITHOUT ROWID
    """,
    """
    CREATE TABLE holdings (
        digest BLOB NOT NULL,
        tenant TEXT NOT NULL,
        PRIMARY KEY (digest, tenant)
    ) WITHOUT ROWID;
    INSERT INTO holdings SELECT digest, '' FROM blobs;
    INSERT OR IGNORE INTO holdings SELECT digest, '' FROM objects;
    ALTER TABLE uploads ADD COLUMN tenant TEXT NOT NULL DEFAULT '';
    ALTER TABLE files RENAME TO files_of_one;
    CREATE TABLE files (
        tenant TEXT NOT NULL,
        hostname TEXT NOT NULL,
        filepath TEXT NOT NULL,
        digest BLOB NOT NULL,
        sha256 TEXT NOT NULL,
        file_id TEXT NOT NULL,
        stored_at TEXT NOT NULL,
        deleted_at TEXT,
        PRIMARY KEY (tenant, hostname, filepath, digest)
    );
    INSERT INTO files SELECT '', * FROM files_of_one;
    DROP TABLE files_of_one;
    CREATE TABLE scrub (
        id INTEGER PRIMARY KEY CHECK (id = 1),
        behind BLOB NOT NULL,
        began INTEGER NOT NULL
    )
    """,
    """
    CREATE TABLE cached (
        blobs INTEGER NOT NULL,
        bytes INTEGER NOT NULL
    );
    INSERT INTO cached SELECT count(*), coalesce(sum(size), 0) FROM blobs;
    CREATE TABLE shares (
        tenant TEXT PRIMARY KEY,
        blobs INTEGER NOT NULL,
        bytes INTEGER NOT NULL
    ) WITHOUT ROWID;
    INSERT INTO shares SELECT tenant, count(*), sum(size) FROM holdings JOIN blobs USING (digest) GROUP BY tenant;
    CREATE TABLE idle (
        digest BLOB PRIMARY KEY,
        since INTEGER NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX idle_since ON idle (since);
    CREATE TRIGGER blob_came AFTER INSERT ON blobs BEGIN
        UPDATE cached SET blobs = blobs + 1, bytes = bytes + new.size;
        INSERT INTO shares SELECT tenant, 1, new.size FROM holdings WHERE digest = new.digest
            ON CONFLICT (tenant) DO UPDATE SET blobs = blobs + 1, bytes = bytes + excluded.bytes;
    END;
    CREATE TRIGGER blob_goes BEFORE DELETE ON blobs BEGIN
        UPDATE cached SET blobs = blobs - 1, bytes = bytes - old.size;
        UPDATE shares SET blobs = blobs - 1, bytes = bytes - old.size
            WHERE tenant IN (SELECT tenant FROM holdings WHERE digest = old.digest);
        DELETE FROM idle WHERE digest = old.digest;
    END;
    CREATE TRIGGER holding_came AFTER INSERT ON holdings BEGIN
        INSERT INTO shares SELECT new.tenant, 1, size FROM blobs WHERE digest = new.digest
            ON CONFLICT (tenant) DO UPDATE SET blobs = blobs + 1, bytes = bytes + excluded.bytes;
    END;
    CREATE TRIGGER holding_goes BEFORE DELETE ON holdings BEGIN
        UPDATE shares SET blobs = blobs - 1, bytes = bytes - (SELECT size FROM blobs WHERE digest = old.digest)
            WHERE tenant = old.tenant AND EXISTS (SELECT 1 FROM blobs WHERE digest = old.digest);
    END;
    CREATE TABLE pins (
        workspace TEXT NOT NULL,
        sequence INTEGER NOT NULL,
        PRIMARY KEY (workspace, sequence)
    ) WITHOUT ROWID
    """,
    """
    CREATE INDEX blobs_large ON blobs (size) WHERE size >= 1048576
    """,
    """
    CREATE TABLE let_go (
        tenant TEXT NOT NULL,
        digest BLOB NOT NULL,
        since INTEGER NOT NULL,
        PRIMARY KEY (tenant, digest)
    ) WITHOUT ROWID;
    INSERT INTO let_go SELECT tenant, digest, since FROM idle JOIN holdings USING (digest);
    CREATE TRIGGER holding_went AFTER DELETE ON holdings BEGIN
        DELETE FROM let_go WHERE tenant = old.tenant AND digest = old.digest;
    END
    """,
    """
    CREATE TABLE jobs (
        number INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        tenant TEXT NOT NULL,
        client_id TEXT NOT NULL,
        key TEXT NOT NULL,
        state TEXT NOT NULL,
        reason TEXT NOT NULL DEFAULT '',
        request BLOB NOT NULL,
        command BLOB NOT NULL,
        priority INTEGER NOT NULL,
        gpus_wanted INTEGER NOT NULL,
        gpus BLOB NOT NULL DEFAULT '[]',
        roots BLOB NOT NULL,
        kinds TEXT NOT NULL,
        input_files INTEGER NOT NULL,
        input_bytes INTEGER NOT NULL,
        created_at TEXT NOT NULL,
        started_at TEXT,
        ended_at TEXT,
        ended INTEGER,
        exit_code INTEGER,
        signal INTEGER,
        pid INTEGER,
        pid_start TEXT,
        keep_until REAL NOT NULL DEFAULT 0,
        log_bytes INTEGER NOT NULL DEFAULT 0,
        returned BLOB,
        acknowledged INTEGER NOT NULL DEFAULT 0,
        UNIQUE (tenant, key)
    );
    CREATE INDEX jobs_by_state ON jobs (state)
    """,
    """
    ALTER TABLE jobs ADD COLUMN result_key BLOB;
    ALTER TABLE jobs ADD COLUMN result_root BLOB;
    ALTER TABLE jobs ADD COLUMN reused TEXT NOT NULL DEFAULT '';
    CREATE INDEX jobs_by_result ON jobs (result_key) WHERE result_key IS NOT NULL
    """,
    "ALTER TABLE jobs ADD COLUMN metrics BLOB",
)


class WorkspaceRow(NamedTuple):
    """One workspace: its head, and what its plain tree holds."""

    name: str
    client_id: str
    epoch: str
    sequence: int
    root: bytes
    files: int
    content_bytes: int
    last_bundle_id: str
    last_applied_at: str
    last_upload_status: str
    tree_sequence: int
    tree_root: bytes
    moving_to: int | None
    durable_root: bytes
    """The root of the tree as it was last made durable, folder by folder (spec ST-50)."""

    @property
    def is_of_returns(self) -> bool:
        """Whether the host itself writes the workspace."""
        return self.client_id == HOST

    @property
    def has_tree(self) -> bool:
        """Whether the workspace has a plain folder on the host: nobody looks at returns, and at inputs of commands."""
        return not self.is_of_returns and own_name(self.name) != inputs_of(self.client_id)


class BlobRow(NamedTuple):
    """A blob and the fingerprint of its inode."""

    digest: bytes
    size: int
    mtime_ns: int
    executable: bool
    """0 or 1 as SQLite keeps it, which compares equal."""


class ReceiptRow(NamedTuple):
    """An applied bundle; `journal` and `carried` are there until its checkpoint (spec ST-40)."""

    workspace: str
    sequence: int
    epoch: str
    identity: bytes
    root: bytes
    body: bytes
    journal: str | None
    carried: bytes | None
    """The 32-byte digests of the content that the journal file carries, one after another."""
    file_name: str
    is_kept: bool
    """The whole tree of this sequence is still held."""

    def receipt(self) -> wire.Receipt:
        """Return the answer that the commit gave."""
        return decoded(self.body, wire.Receipt)


class State:
    """The only owner of the connections to DATA/state.db."""

    def __init__(self, path: Path) -> None:
        self._path = path
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        self._writer = connect(path, MIGRATIONS)
        make_private(path)  # it has every tenant's names
        self._lock = threading.RLock()
        self._readers: LifoQueue[sqlite3.Connection] = LifoQueue()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep every other writer out; what a row names is published and removed only inside (spec ST-21)."""
        with self._lock:
            yield

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """Run a block as one durable transaction of the only writer."""
        with self._lock, self._explained(), transaction(self._writer) as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """Lend a read-only connection; it sees what was committed and never blocks the writer."""
        with self._explained():
            try:
                connection = self._readers.get_nowait()
            except Empty:
                connection = connect(self._path, MIGRATIONS, read_only=True)
            try:
                yield connection
            finally:
                self._readers.put(connection)

    @contextmanager
    def snapshot(self) -> Iterator[sqlite3.Connection]:
        """Lend a read-only connection whose queries all see the same moment."""
        with self.read() as connection:
            connection.execute("BEGIN")
            try:
                yield connection
            finally:
                connection.execute("ROLLBACK")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.ProgrammingError, sqlite3.IntegrityError):
            raise  # our mistake, not the disk's
        except sqlite3.DatabaseError as error:
            raise damaged(self._path, error) from error

    def close(self) -> None:
        """Close every connection."""
        while not self._readers.empty():
            self._readers.get_nowait().close()
        with self._lock:
            self._writer.close()


def workspace_row(db: sqlite3.Connection, name: str) -> WorkspaceRow | None:
    """Return one workspace's row, or None before its first bundle."""
    row = db.execute(f"SELECT {_WORKSPACE} FROM workspaces WHERE name = ?", (name,)).fetchone()
    return WorkspaceRow._make(row) if row else None


def workspace_rows(db: sqlite3.Connection) -> list[WorkspaceRow]:
    """Return every workspace, by name."""
    return [WorkspaceRow._make(row) for row in db.execute(f"SELECT {_WORKSPACE} FROM workspaces ORDER BY name")]


def head_of(db: sqlite3.Connection, name: str) -> Head:
    """Return the last applied (epoch, sequence, root) of a workspace and the epochs before it."""
    row = workspace_row(db, name)
    if row is None:
        return Head()
    past = db.execute("SELECT epoch FROM epochs WHERE workspace = ?", (name,))
    return Head(row.client_id, row.epoch, row.sequence, row.root, frozenset(epoch for (epoch,) in past))


def receipt_row(db: sqlite3.Connection, name: str, epoch: str, sequence: int) -> ReceiptRow | None:
    """Return the receipt of (epoch, sequence), or None."""
    row = db.execute(
        f"SELECT {_RECEIPT} FROM receipts WHERE workspace = ? AND sequence = ? AND epoch = ?", (name, sequence, epoch)
    ).fetchone()
    return ReceiptRow._make(row) if row else None


def kept_receipts(db: sqlite3.Connection, name: str, keep_sequences: int) -> list[ReceiptRow]:
    """Return the newest receipts of a workspace whose trees are held, and the pinned ones, oldest of them first."""
    rows = db.execute(
        f"SELECT {_RECEIPT} FROM receipts WHERE workspace = ?1 AND is_kept "
        f"AND (sequence >= ({_FIRST_KEPT}) OR sequence IN ({_PINNED})) ORDER BY sequence",
        (name, keep_sequences),
    )
    return [ReceiptRow._make(row) for row in rows]


def keep_no_more_than(db: sqlite3.Connection, keep_sequences: int) -> None:
    """Record that older sequences are no longer held, before the first of their objects is removed."""
    for row in workspace_rows(db):
        db.execute(
            "UPDATE receipts SET is_kept = 0 WHERE workspace = ?1 AND is_kept "
            f"AND sequence < ({_FIRST_KEPT}) AND sequence NOT IN ({_PINNED})",
            (row.name, keep_sequences),
        )


def pinned(db: sqlite3.Connection, name: str) -> set[int]:
    """Return the pinned sequences of a workspace."""
    return {sequence for (sequence,) in db.execute("SELECT sequence FROM pins WHERE workspace = ?", (name,))}


def journalled(db: sqlite3.Connection) -> list[ReceiptRow]:
    """Return the receipts whose bundle is still in the journal, in the order in which they were committed."""
    rows = db.execute(f"SELECT {_RECEIPT} FROM receipts WHERE journal IS NOT NULL ORDER BY rowid")
    return [ReceiptRow._make(row) for row in rows]


def kept_roots(db: sqlite3.Connection, keep_sequences: int) -> set[bytes]:
    """Return every root whose whole tree must stay, with content: of heads, kept sequences, moving trees and jobs."""
    return set().union(*kept_roots_of(db, keep_sequences).values())


def kept_roots_of(db: sqlite3.Connection, keep_sequences: int) -> dict[Tenant, set[bytes]]:
    """Return those roots by whose workspaces, or jobs, need them."""
    found: defaultdict[Tenant, set[bytes]] = defaultdict(set)
    for row in workspace_rows(db):
        roots = found[tenant_of(row.name)]
        roots |= {row.root, *(receipt.root for receipt in kept_receipts(db, row.name, keep_sequences))}
        if row.moving_to is not None:
            select = "SELECT root FROM receipts WHERE workspace = ? AND sequence = ?"
            roots |= {root for (root,) in db.execute(select, (row.name, row.moving_to))}
    for tenant, packed in db.execute("SELECT tenant, roots FROM jobs WHERE roots != x''"):
        found[tenant].update(split_digests(packed))  # spec J-32
    for tenant, root in db.execute("SELECT tenant, result_root FROM jobs WHERE result_root IS NOT NULL"):
        found[tenant].add(root)  # spec J-79
    for roots in found.values():
        roots.discard(EMPTY_ROOT)
    return found


def compared_roots(db: sqlite3.Connection) -> set[bytes]:
    """Return the roots that plain trees are compared with: their directory objects are needed, their content not."""
    rows = workspace_rows(db)
    return {root for row in rows for root in (row.tree_root, row.durable_root)} - {EMPTY_ROOT}


def file_digests_of(db: sqlite3.Connection) -> dict[Tenant, set[bytes]]:
    """Return the blobs that each tenant's files uploaded by themselves need; deleted ones need none."""
    found: defaultdict[Tenant, set[bytes]] = defaultdict(set)
    for tenant, digest in db.execute("SELECT tenant, digest FROM files WHERE deleted_at IS NULL"):
        found[tenant].add(digest)
    return found


def object_body(db: sqlite3.Connection, digest: bytes) -> bytes | None:
    """Return a directory object's body, or None."""
    row = db.execute("SELECT body FROM objects WHERE digest = ?", (digest,)).fetchone()
    return bytes(row[0]) if row else None


def loader(db: sqlite3.Connection) -> Loader:
    """Return what gives the entries of a directory object of this store."""

    def load(digest: bytes) -> list[Entry]:
        body = object_body(db, digest)
        if body is None:
            raise Corrupt(f"directory object {digest.hex()} is missing; run `deltasync-server check`")
        return decode_directory(body)

    return load


def blob_row(db: sqlite3.Connection, digest: bytes) -> BlobRow | None:
    """Return a blob's row, or None when the cache does not hold it."""
    row = db.execute(f"SELECT {_BLOB} FROM blobs WHERE digest = ?", (digest,)).fetchone()
    return BlobRow._make(row) if row else None


def blob_rows(db: sqlite3.Connection, digests: Iterable[bytes]) -> dict[bytes, BlobRow]:
    """Return the rows of those digests that the cache holds."""
    found: dict[bytes, BlobRow] = {}
    for batch in batched(digests, BATCH):
        marks = ",".join("?" * len(batch))
        for row in db.execute(f"SELECT {_BLOB} FROM blobs WHERE digest IN ({marks})", batch):
            found[row[0]] = BlobRow._make(row)
    return found


def lacking_of(db: sqlite3.Connection, digests: Iterable[bytes]) -> set[bytes]:
    """Return those digests that some tree waits for and the cache has lost."""
    found: set[bytes] = set()
    for batch in batched(digests, BATCH):
        marks = ",".join("?" * len(batch))
        select = f"SELECT digest FROM wanted WHERE NOT healed AND digest IN ({marks})"
        found.update(digest for (digest,) in db.execute(select, batch))
    return found - blob_rows(db, found).keys()


def held_row(db: sqlite3.Connection, tenant: Tenant, digest: bytes) -> BlobRow | None:
    """Return a blob's row if this tenant holds its content (spec ST-101), else None."""
    return held_rows(db, tenant, [digest]).get(digest)


def held_rows(db: sqlite3.Connection, tenant: Tenant, digests: Iterable[bytes]) -> dict[bytes, BlobRow]:
    """Return the rows of those digests that the cache has and this tenant holds."""
    # Whose it is comes first: what only others hold is looked for no further, so that no time tells (spec ST-101).
    return blob_rows(db, held(db, tenant, digests))


def held(db: sqlite3.Connection, tenant: Tenant, digests: Iterable[bytes]) -> set[bytes]:
    """Return those of some digests whose bytes this tenant has sent, or was given."""
    found: set[bytes] = set()
    for batch in batched(digests, BATCH):
        marks = ",".join("?" * len(batch))
        select = f"SELECT digest FROM holdings WHERE tenant = ? AND digest IN ({marks})"
        found.update(digest for (digest,) in db.execute(select, (tenant, *batch)))
    return found


def held_sizes(db: sqlite3.Connection, tenant: Tenant) -> set[int]:
    """Return the sizes of the large contents that the cache has and this tenant holds."""
    # All of them, so that no time tells of which sizes others hold something (spec ST-101).
    select = f"""
        SELECT DISTINCT size FROM blobs INDEXED BY blobs_large WHERE size >= {wire.LARGE_BYTES}
        AND EXISTS (SELECT 1 FROM holdings WHERE holdings.digest = blobs.digest AND tenant = ?)
    """
    return {size for (size,) in db.execute(select, (tenant,))}


def grant(db: sqlite3.Connection, tenant: Tenant, digests: Iterable[bytes]) -> None:
    """Record that a tenant holds the content, or the directory objects, of these digests."""
    insert = "INSERT OR IGNORE INTO holdings VALUES (?, ?)"
    db.executemany(insert, [(digest, tenant) for digest in sorted(digests)])


def held_by_tenant(db: sqlite3.Connection) -> dict[Tenant, set[bytes]]:
    """Return the contents in the cache that each tenant holds."""
    found: defaultdict[Tenant, set[bytes]] = defaultdict(set)
    for tenant, digest in db.execute("SELECT tenant, digest FROM holdings JOIN blobs USING (digest)"):
        found[tenant].add(digest)
    return found


def forget_digests(db: sqlite3.Connection, table: str, digests: Collection[bytes]) -> None:
    """Remove the rows of blobs or objects, and whose they were."""
    rows = [(digest,) for digest in digests]
    db.executemany(f"DELETE FROM {table} WHERE digest = ?", rows)
    db.executemany("DELETE FROM holdings WHERE digest = ?", rows)


def write_blobs(db: sqlite3.Connection, rows: Iterable[BlobRow], kept: Mapping[bytes, BlobRow]) -> None:
    """Write the rows of published blobs, in the order of their keys; trees that lack one of them get it back.

    kept: rows that were there before: the file of such a one was damaged, and trees may be linked to it.
    """
    rows = sorted(rows)
    insert = (
        "INSERT INTO blobs VALUES (?, ?, ?, ?) ON CONFLICT (digest) DO UPDATE SET "
        "mtime_ns = excluded.mtime_ns, executable = excluded.executable"
    )
    db.executemany(insert, rows)  # no REPLACE: that would hide the row that goes from the triggers
    mark_replaced(db, [row.digest for row in rows if row.digest in kept])
    # Asked of the rows and not of what came: a sender is asked for nothing that is here, whoever brought it (ST-27).
    db.execute("UPDATE wanted SET healed = 1 WHERE NOT healed AND digest IN (SELECT digest FROM blobs)")


def mark_replaced(db: sqlite3.Connection, digests: Iterable[bytes]) -> None:
    """Have every tree place these contents again: it may be linked to a file that was replaced.

    Each mark has a number of its own: a tree that is placing a content forgets no mark that came meanwhile.
    """
    mark = (
        "INSERT INTO wanted SELECT name, ?, 1 FROM workspaces WHERE true "
        "ON CONFLICT (workspace, digest) DO UPDATE SET healed = healed + 1"
    )
    db.executemany(mark, [(digest,) for digest in digests])


def lease_adopted(db: sqlite3.Connection, digests: Iterable[bytes], until: int) -> None:
    """Keep adopted content from collections until a time in seconds since 1970; never shorter than before."""
    lease = "INSERT INTO adopted VALUES (?, ?) ON CONFLICT (digest) DO UPDATE SET until = max(until, excluded.until)"
    db.executemany(lease, [(digest, until) for digest in sorted(digests)])


def adopted_digests(db: sqlite3.Connection, now: float) -> set[bytes]:
    """Return the digests whose adoption still keeps them at a time in seconds since 1970 (spec ST-73)."""
    return {digest for (digest,) in db.execute("SELECT digest FROM adopted WHERE until > ?", (now,))}


def settle_stamps(db: sqlite3.Connection, rows: Iterable[BlobRow]) -> None:
    """Record the fingerprints of inodes that were restamped; the intents are done with."""
    update = "UPDATE blobs SET mtime_ns = ?, executable = ? WHERE digest = ?"
    db.executemany(update, [(row.mtime_ns, row.executable, row.digest) for row in rows])
    db.execute("DELETE FROM stamps")


def batched(values: Iterable[bytes], size: int) -> Iterator[Sequence[bytes]]:
    """Yield lists of at most `size` values."""
    iterator = iter(values)
    while batch := list(islice(iterator, size)):
        yield batch


def split_digests(packed: bytes | None) -> list[bytes]:
    """Return the digests of a packed column."""
    packed = packed or b""
    return [packed[at : at + DIGEST_BYTES] for at in range(0, len(packed), DIGEST_BYTES)]


_FIRST_KEPT = (
    "SELECT coalesce(min(sequence), 9223372036854775807) FROM "
    "(SELECT sequence FROM receipts WHERE workspace = ?1 AND is_kept ORDER BY sequence DESC LIMIT "
    # Of returns the head and what is pinned: the others were acknowledged (spec J-63).
    f"CASE WHEN EXISTS (SELECT 1 FROM workspaces WHERE name = ?1 AND client_id = '{HOST}') THEN min(?2, 1) ELSE ?2 END)"
)
_PINNED = "SELECT sequence FROM pins WHERE workspace = ?1"
_WORKSPACE = ", ".join(WorkspaceRow._fields)
_RECEIPT = ", ".join(ReceiptRow._fields)
_BLOB = ", ".join(BlobRow._fields)
