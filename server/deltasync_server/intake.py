"""Intake: one bundle on its way in, from the first byte to its receipt; the commit is the only point of no return."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sqlite3
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import islice
from typing import NamedTuple

import msgspec

from deltasync.core import delta, part, wire
from deltasync.core.bundle import BundleReader, Metadata, content_operations, file_name
from deltasync.core.errors import (
    ContentMissing,
    Corrupt,
    DeltasyncError,
    HostBusy,
    LimitExceeded,
    NotOwner,
    Refused,
    RootMismatch,
    SequenceFork,
    SequenceGap,
    StaleEpoch,
)
from deltasync.core.manifest import EMPTY_ROOT, Kind, Operation, Verb
from deltasync.core.names import WorkspaceName, shown
from deltasync.core.recipe import Recipe
from deltasync.core.sequence import Head, Header, Verdict, decide
from deltasync.disk import space_guard
from deltasync_server.assembly import assemble
from deltasync_server.blobs import Cache, Leases, Staging
from deltasync_server.config import StoreConfig
from deltasync_server.journal import Adopted, Spool
from deltasync_server.offer import opened_blob
from deltasync_server.room import Room
from deltasync_server.state import (
    HOST,
    NO_CLIENT,
    BlobRow,
    State,
    blob_rows,
    grant,
    head_of,
    held,
    held_row,
    held_rows,
    loader,
    receipt_row,
    workspace_row,
    write_blobs,
)
from deltasync_server.streams import Streams, Writer, forget
from deltasync_server.tenants import Tenant, own_name, tenant_of
from deltasync_server.tree import Trees

LEASE_SECONDS = 3600
ARRIVAL_SECONDS = 7 * 24 * 3600.0
TURN_SECONDS = 60.0
"""How long a complete bundle waits for one before it that is still arriving."""

LARGE_BYTES = 1 << 20
"""Bundles whose content is this large on average are not journalled: the content itself is made durable."""

_log = logging.getLogger(__name__)

Permit = Callable[[], None]
"""Raises where the sender may send no longer."""
DecideHook = Callable[[Head, Metadata, Verdict], None]
"""Called when the metadata is in, before the verdict is acted on; it may raise an error of its own."""


@dataclass(slots=True, eq=False)
class Arrival:
    """A bundle that is arriving; its header is there once the metadata is in."""

    workspace: WorkspaceName
    header: Header | None = None
    lives_until: float = math.inf
    """Whose pieces stopped coming is waited for no longer."""


class Arrivals:
    """The bundles on their way in, so that number n + 1 can wait for n instead of being told of a gap."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._present: list[Arrival] = []
        self._awaits_pieces = True
        self._commit_locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def __len__(self) -> int:
        return len(self._present)

    @contextmanager
    def arriving(self, workspace: WorkspaceName, known: Arrival | None = None) -> Iterator[Arrival]:
        """Count a bundle as arriving for the length of a block; known: it was counted before, in pieces."""
        if known is not None:
            yield known
            return
        arrival = Arrival(workspace)
        self._add(arrival)
        try:
            yield arrival
        finally:
            self.leave(arrival)

    def enter(self, workspace: WorkspaceName) -> Arrival:
        """Count a bundle as arriving in pieces, until it leaves or none comes for as long as anyone would wait."""
        arrival = Arrival(workspace)
        self.touch(arrival)
        self._add(arrival)
        return arrival

    def _add(self, arrival: Arrival) -> None:
        with self._changed:
            self._present.append(arrival)
            self._changed.notify_all()

    def note_header(self, arrival: Arrival, header: Header) -> None:
        """Note which bundle it is."""
        with self._changed:
            arrival.header = header
            self._changed.notify_all()

    def touch(self, arrival: Arrival) -> None:
        """Note that a piece came."""
        arrival.lives_until = time.monotonic() + TURN_SECONDS

    def leave(self, arrival: Arrival) -> None:
        """Count a bundle as arriving no longer."""
        with self._changed:
            self._present.remove(arrival)
            self._changed.notify_all()

    @contextmanager
    def committing(self, workspace: WorkspaceName) -> Iterator[None]:
        """Keep other commits of the same workspace out."""
        with self._changed:
            lock = self._commit_locks[workspace]
        with lock:
            yield

    def note_part(self) -> None:
        """Say that a part was written: the next one may go on."""
        with self._changed:
            self._changed.notify_all()

    def stop_awaiting_pieces(self) -> None:
        """Count no bundle as arriving that comes in pieces."""
        with self._changed:
            self._awaits_pieces = False
            self._changed.notify_all()

    def has_one_before(self, arrival: Arrival) -> bool:
        """Tell whether another arriving bundle may be the one that this one follows.

        One whose number is not known yet may be only if it began to arrive earlier.
        """
        mine, now = arrival.header, time.monotonic() if self._awaits_pieces else math.inf
        with self._changed:
            is_earlier = True
            for other in self._present:
                if other is arrival:
                    is_earlier = False
                    continue
                theirs = other.header
                is_before = is_earlier if theirs is None else mine is not None and theirs.sequence < mine.sequence
                if other.workspace == arrival.workspace and is_before and other.lives_until >= now:
                    return True
        return False

    def await_one_before(self, arrival: Arrival, seconds: float) -> bool:
        """Tell whether a bundle that this one may follow is arriving, or begins to within a moment (spec ST-15)."""
        with self._changed:
            return self._changed.wait_for(lambda: self.has_one_before(arrival), timeout=seconds)

    def await_turn(self, arrival: Arrival, is_turn: Callable[[], bool]) -> None:
        """Wait until its turn has come, no earlier one is arriving any more, or too long has passed (spec ST-15)."""
        with self._changed:
            self._changed.wait_for(lambda: is_turn() or not self.has_one_before(arrival), timeout=TURN_SECONDS)


@dataclass(frozen=True, slots=True)
class Rooms:
    """The parts of a store that a bundle passes through."""

    config: StoreConfig
    state: State
    cache: Cache
    leases: Leases
    arrivals: Arrivals
    trees: Trees
    streams: Streams
    room: Room
    syncs: ThreadPoolExecutor
    """Threads that make journal files durable beside the computation of the tree."""


class Committed(NamedTuple):
    """The receipt of a bundle, and what it cost; both sizes are zero for a duplicate."""

    receipt: wire.Receipt
    journal_bytes: int
    object_bytes: int


class _Published(NamedTuple):
    """Blobs that are in the cache now and have no row yet, and the rows that those of the bundle had before."""

    rows: Collection[BlobRow]
    kept: Mapping[bytes, BlobRow]


@dataclass(slots=True)
class Intake:
    """Takes one bundle."""

    rooms: Rooms
    arrival: Arrival
    spool: Spool | Adopted
    take_over: bool
    hook: DecideHook | None
    permit: Permit
    may_be_host: bool
    _lease: int = field(default=0, init=False)
    _has_wrong_recipe: bool = field(default=False, init=False)
    _writer: Writer | None = field(default=None, init=False)
    """Of the part that the bundle brings."""
    _spent: set[bytes] = field(default_factory=set, init=False)
    """Streams of this workspace that are over with this bundle."""

    @property
    def _tenant(self) -> Tenant:
        return tenant_of(self.arrival.workspace)

    def run(self, expected_identity: bytes | None) -> Committed:
        """Read, check and commit the bundle; nothing of it stays when this raises."""
        try:
            with space_guard(self.rooms.config.data):
                return self._run(expected_identity)
        except DeltasyncError as error:
            if not self.spool.has_failed_source:
                self._note(error)
            raise
        except OSError as error:
            if self.spool.has_failed_source:
                raise
            raise Corrupt(f"the store's disk failed ({error}); the bundle was not applied") from error
        finally:
            self.rooms.leases.drop(self._lease)

    def _run(self, expected_identity: bytes | None) -> Committed:
        reader = BundleReader(self.spool, self.rooms.config.limits)
        metadata = reader.metadata()
        if expected_identity is not None and metadata.identity != expected_identity:
            raise Refused("B-26", f"the bundle's identity is {metadata.identity.hex()}, not the one announced")
        if metadata.header.client_id == HOST and not self.may_be_host:
            raise Refused("J-61", NO_CLIENT)
        self.rooms.arrivals.note_header(self.arrival, metadata.header)
        first = self._judge(metadata, may_wait=True)
        if first is not None:
            return Committed(first, 0, 0)  # the rest is not read: the routes answer while it still arrives (spec H-14)
        with ExitStack() as borrowed, self.rooms.cache.staging() as staging:
            _require_links(metadata, staging)
            if _brings_large_content(metadata):
                self._do_without_journal(staging)
            if self.rooms.room.is_bounded:
                borrowed.enter_context(self._reserved(metadata))
            self._take_part(reader, metadata.header, staging, borrowed)
            self._stage(reader, metadata, staging)
            if not staging.staged:
                self._do_without_journal(staging)
            del reader  # with the bytes of the metadata: two large bundles at once must fit into little memory
            metadata = replace(metadata, operations_bytes=b"", hashes_bytes=b"")
            with self._being_made_durable(staging) as durable:
                self.rooms.arrivals.await_turn(self.arrival, lambda: self._is_turn(metadata.header))
                with self.rooms.arrivals.committing(self.arrival.workspace):
                    first = self._judge(metadata, may_wait=False)
                    return Committed(first, 0, 0) if first else self._commit(metadata, staging, durable)

    def _reserved(self, metadata: Metadata) -> AbstractContextManager[None]:
        """Count what the bundle brings, and is about to, as coming (spec ST-131, H-108)."""
        named = content_operations(metadata)
        with self.rooms.state.read() as db:
            here = held(db, self._tenant, map(bytes.fromhex, named))
        size_bytes = sum(each.size for digest, each in named.items() if bytes.fromhex(digest) not in here)
        if part.FEATURE in metadata.manifest.requires:  # what came of it before counts as a stream
            size_bytes -= self.rooms.streams.size_of(self.arrival.workspace)
        if isinstance(self.spool, Adopted):  # it came in pieces, which count until it is taken
            size_bytes -= self.spool.lying_bytes
        return self.rooms.room.reserved(self._tenant, max(0, size_bytes), files=_new_files(metadata.operations))

    def _do_without_journal(self, staging: Staging) -> None:
        """Have the content itself made durable, unless the operator wants the bundle's file (spec ST-16)."""
        if not self.rooms.config.keep_bundles:
            staging.is_durable = True
            self.spool.stop_keeping()

    @contextmanager
    def _being_made_durable(self, staging: Staging) -> Iterator[Future[None]]:
        """Make the journal file, or the content itself, durable beside a block; nobody uses either behind it."""
        durable = self.rooms.syncs.submit(self._make_durable, staging)
        try:
            yield durable
        finally:
            durable.exception()

    def _make_durable(self, staging: Staging) -> None:
        staging.make_durable()
        if self._writer is not None:
            self._writer.make_durable(self.rooms.streams.folder)
        if not staging.is_durable:
            self.spool.make_durable()

    def _judge(self, metadata: Metadata, *, may_wait: bool) -> wire.Receipt | None:
        """Return the first receipt of a duplicate, None when the bundle may go on, or raise the verdict."""
        name, header = self.arrival.workspace, metadata.header
        with self.rooms.state.snapshot() as db:  # a commit in between would make the head and the receipt disagree
            head, row = head_of(db, name), workspace_row(db, name)
            recorded = receipt_row(db, name, header.epoch, header.sequence)
        verdict = decide(head, recorded.identity if recorded else None, header, take_over=self.take_over)
        if self.hook is not None:
            self.hook(head, metadata, verdict)
        if verdict is Verdict.DUPLICATE and recorded and row:
            tree_sequence = None if row.moving_to is not None else row.tree_sequence
            return msgspec.structs.replace(recorded.receipt(), duplicate=True, tree_sequence=tree_sequence)
        seconds = self.rooms.config.gap_seconds
        may_follow = may_wait and verdict is Verdict.GAP
        is_early = may_follow and self.rooms.arrivals.await_one_before(self.arrival, seconds)
        if verdict is not Verdict.APPLY and not is_early:
            raise conflict(verdict, head, header)
        return None

    def _is_turn(self, header: Header) -> bool:
        with self.rooms.state.read() as db:
            return header.sequence <= head_of(db, self.arrival.workspace).sequence + 1

    def _take_part(self, reader: BundleReader, header: Header, staging: Staging, borrowed: ExitStack) -> None:
        """Write the part that the bundle brings, if it brings one, into its stream (spec ST-90 to ST-92)."""
        arriving = reader.part()
        if arriving is None:
            return
        self._do_without_journal(staging)
        streams, name = self.rooms.streams, self.arrival.workspace
        if not arriving.part.size:
            self._spend(arriving.part.stream)
            return
        self.rooms.arrivals.await_turn(
            self.arrival, lambda: streams.is_next(arriving.part, header.sequence) or self._is_turn(header)
        )

        def require_due() -> None:
            with self.rooms.state.read() as db:
                head = head_of(db, name)
            if header.sequence <= head.sequence:  # written again, it would be taken from the stream
                raise HostBusy("another upload brought this bundle meanwhile; sent again it gets its receipt")
            if header.sequence > head.sequence + 1 and not streams.is_next(arriving.part, header.sequence):
                raise SequenceGap(head.sequence + 1, header.sequence)

        require_due()
        borrowed.enter_context(self.rooms.room.reserved(self._tenant, arriving.part.size))
        self._writer = borrowed.enter_context(streams.begin(name, arriving.part, header.sequence, require_due))
        self._writer.take(arriving.views, arriving.read_digest)
        self.rooms.arrivals.note_part()
        staging.content_bytes += arriving.part.size

    def _spend(self, stream: bytes) -> bool:
        """Have a stream end with this bundle; False where this workspace has none of this id."""
        found = self.rooms.streams.opened(self.arrival.workspace, stream)
        if found is None:
            return False
        os.close(found[0])
        self._spent.add(stream)
        return True

    def _stage(self, reader: BundleReader, metadata: Metadata, staging: Staging) -> None:
        """Write the content that the cache lacks; what it has is leased, and read only to be checked."""
        named = [bytes.fromhex(digest) for digest in content_operations(metadata)]
        with self.rooms.leases.guard, self.rooms.state.read() as db:
            present = held_rows(db, self._tenant, named)
            self._lease = self.rooms.leases.add(present, ARRIVAL_SECONDS, self._tenant)
        is_of_parts = part.FEATURE in metadata.manifest.requires
        if is_of_parts and metadata.operations:  # the last part may be on its way into its row
            self.rooms.arrivals.await_turn(self.arrival, lambda: self._is_turn(metadata.header))
            self._judge(metadata, may_wait=False)  # a part that has not come is a gap: the stream is not lost
        for content in reader.contents():
            operation = content.operation
            row = present.get(bytes.fromhex(operation.digest or ""))
            for base in content.recipe.bases if content.recipe and is_of_parts else ():
                self._spend(base)
            if row is not None and self.rooms.cache.has_unchanged(row):
                continue
            if content.recipe is None:
                staging.write(operation, content.views)
            elif not (is_of_parts and self._take_stream(staging, operation, content.recipe)):
                self._assemble(staging, operation, content.recipe, content.views)
        reader.finish()

    def _take_stream(self, staging: Staging, operation: Operation, recipe: Recipe) -> bool:
        """Take a stream as it lies for the content that a recipe makes of it; False where it must be copied."""
        segments = list(islice(recipe.segments(), 2))
        if segments != [(1, 0, operation.size)]:
            return False
        with contextlib.suppress(OSError):  # no second name here: it is copied
            if self.rooms.streams.take_whole(self.arrival.workspace, recipe.bases[0], operation, staging.folder):
                staging.take(operation, new_bytes=0)
                return True
        return False

    def _assemble(self, staging: Staging, operation: Operation, recipe: Recipe, views: Iterator[memoryview]) -> None:
        """Make a content by its recipe; where that fails it is missing, and the sender is asked for it (spec B-64).

        After a wrong one no other is made: each costs as much as the content is large.
        """
        if self._has_wrong_recipe:
            return
        descriptor = staging.create(operation)
        try:
            digest = assemble(descriptor, recipe, views, self._opened, self.rooms.room.require_disk)
            os.utime(descriptor, ns=(operation.mtime_ns, operation.mtime_ns))
        finally:
            os.close(descriptor)
        if digest is not None and digest.hex() == operation.digest:
            staging.take(operation, new_bytes=recipe.new_bytes)
            return
        staging.drop(operation)
        if digest is not None:
            self._has_wrong_recipe = True  # a base may have other bytes than its digest says, or the sender erred
            self.rooms.trees.prove(recipe.bases)

    def _opened(self, digest: bytes) -> tuple[int, int] | None:
        if digest in self._spent:
            return self.rooms.streams.opened(self.arrival.workspace, digest)
        with self.rooms.state.read() as db:
            row = held_row(db, self._tenant, digest)
        return opened_blob(self.rooms.cache, self.rooms.trees, digest, row)

    def _commit(self, metadata: Metadata, staging: Staging, durable: Future[None]) -> Committed:
        """Compute the tree, publish the content, and move the head (spec ST-13, ST-14)."""
        state, name = self.rooms.state, self.arrival.workspace
        with state.read() as db:
            applied = delta.apply(head_of(db, name).root, metadata.operations, loader(db))
        if applied.root.hex() != metadata.manifest.root:
            raise RootMismatch(f"the operations give the root {applied.root.hex()}, not {metadata.manifest.root}")
        durable.result()  # spec ST-11: durable before any row names it
        self.permit()  # a token that was revoked meanwhile commits nothing (spec H-104)
        changed = self._changed(metadata, staging)  # before the lock: a first look at many files takes long
        try:
            with state.hold():
                # Here, where no other commit comes between: two that also delete were not weighed before (spec H-108).
                self.rooms.room.require_files(self._tenant, applied.files)
                with state.read() as db:
                    kept = self._present(db, metadata, staging, changed)
                with self.rooms.cache.published(staging, kept) as rows:
                    receipt = self._record(metadata, staging, applied, _Published(rows, kept))
        except ContentMissing:
            self._lease_present(metadata)  # not inside: leases come before the writer (spec ST-61)
            raise
        objects = sum(map(len, applied.objects.values()))
        return Committed(receipt, self.spool.size_bytes, objects)

    def _lease_present(self, metadata: Metadata) -> None:
        """Keep what is here of a bundle until its sender has brought the rest (spec ST-62)."""
        named = map(bytes.fromhex, content_operations(metadata))
        with self.rooms.leases.guard, self.rooms.state.read() as db:
            self.rooms.leases.add(held_rows(db, self._tenant, named), LEASE_SECONDS, self._tenant)

    def _changed(self, metadata: Metadata, staging: Staging) -> Collection[bytes]:
        """Return what the bundle names without bringing it, and whose file is not as its row says (spec ST-24)."""
        named = (bytes.fromhex(digest) for digest in content_operations(metadata))
        with self.rooms.state.read() as db:
            rows = held_rows(db, self._tenant, (digest for digest in named if digest not in staging.staged))
        changed = self.rooms.trees.changed(rows)
        if changed:
            self.rooms.trees.doubt(self.arrival.workspace, changed)
        return changed

    def _present(
        self, db: sqlite3.Connection, metadata: Metadata, staging: Staging, changed: Collection[bytes]
    ) -> dict[bytes, BlobRow]:
        """Return the rows of the digests that the bundle names; raise ContentMissing for what nobody has.

        changed: digests whose file was not as its row said; it may have been healed since.
        """
        named = {bytes.fromhex(digest): each for digest, each in content_operations(metadata).items()}
        known = held_rows(db, self._tenant, named)
        lost = {digest for digest in changed if digest in known and not self.rooms.cache.has_unchanged(known[digest])}
        present = (known.keys() - lost) | staging.staged.keys()
        missing = [digest for digest in named if digest not in present]
        if missing:
            raise ContentMissing([digest.hex() for digest in missing])
        rows = blob_rows(db, named)
        for digest, row in rows.items():
            if row.size != named[digest].size:
                raise Refused("B-54", f"{digest.hex()} has {row.size} bytes here, not {named[digest].size}")
        return rows

    def _record(
        self, metadata: Metadata, staging: Staging, applied: delta.Applied, published: _Published
    ) -> wire.Receipt:
        """Run the one transaction; an error that leaves its outcome open keeps the journal file (spec ST-14)."""
        self.spool.is_kept = True
        try:
            with self.rooms.state.write() as db:
                if self._writer is not None:
                    self._writer.record(db, self.arrival.workspace, time.time())
                forget(db, self._spent)
                commit = _Commit(db, self.arrival.workspace, metadata, staging)
                receipt = commit.write(applied, published, None if staging.is_durable else self.spool.name)
            try:
                self.rooms.streams.remove(self._spent)
            except OSError as error:  # it is committed: a stream that nothing names goes with the next start
                _log.warning("streams that are used up could not be removed: %s", error)
            return receipt
        except (DeltasyncError, sqlite3.OperationalError) as error:  # the latter: busy, so nothing was committed
            self.spool.is_kept = isinstance(error, Corrupt)
            raise

    def _note(self, error: DeltasyncError) -> None:
        """Record how the workspace's last upload fared; a full disk may not take it."""
        if isinstance(error, Corrupt):
            return
        with contextlib.suppress(DeltasyncError), self.rooms.state.write() as db:
            update = "UPDATE workspaces SET last_upload_status = ? WHERE name = ?"
            db.execute(update, (error.code, self.arrival.workspace))


class _Commit:
    """The rows of one applied bundle, written in one transaction."""

    def __init__(self, db: sqlite3.Connection, name: WorkspaceName, metadata: Metadata, staging: Staging) -> None:
        self._db = db
        self._name = name
        self._metadata = metadata
        self._staging = staging
        self._row = workspace_row(db, name)

    def write(self, applied: delta.Applied, published: _Published, journal: str | None) -> wire.Receipt:
        """Write everything that the bundle changes, and return its receipt."""
        db = self._db
        receipt = self._receipt(applied)
        db.executemany("INSERT OR IGNORE INTO objects VALUES (?, ?)", applied.objects.items())
        write_blobs(db, published.rows, published.kept)
        grant(db, tenant_of(self._name), {*self._staging.staged, *applied.objects})
        self._write_receipt(receipt, applied.root, journal)
        self._write_epoch(receipt)
        self._write_head(applied, receipt)
        return receipt

    def _receipt(self, applied: delta.Applied) -> wire.Receipt:
        manifest, row = self._metadata.manifest, self._row
        counts = manifest.operations
        is_moving = row is not None and row.moving_to is not None
        return wire.Receipt(
            workspace=own_name(self._name),
            epoch=manifest.epoch,
            sequence=manifest.sequence_number,
            identity=self._metadata.identity.hex(),
            bundle_id=manifest.bundle_id,
            root=applied.root.hex(),
            created=counts.created,
            updated=counts.updated,
            moved=counts.moved,
            deleted=counts.deleted,
            content_bytes=self._staging.content_bytes,
            applied_at=now(),
            tree_sequence=None if is_moving else (row.tree_sequence if row else 0),
        )

    def _write_receipt(self, receipt: wire.Receipt, root: bytes, journal: str | None) -> None:
        carried = b"".join(sorted(self._staging.staged.keys() - self._staging.assembled)) if journal else None
        body = msgspec.json.encode(receipt)
        # What changes nothing takes no place among the sequences that are kept.
        is_part = part.FEATURE in self._metadata.manifest.requires and not self._metadata.manifest.total_files
        values = (self._name, receipt.sequence, receipt.epoch, self._metadata.identity, root, body)
        self._db.execute(
            "INSERT INTO receipts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*values, journal, carried, file_name(self._metadata), not is_part),
        )

    def _write_epoch(self, receipt: wire.Receipt) -> None:
        """Retire the epoch that this bundle replaces, and tell the audit of a new owner."""
        row, client_id = self._row, self._metadata.manifest.client_id
        if row is None:
            return
        if row.epoch != receipt.epoch:
            self._db.execute("INSERT OR IGNORE INTO epochs VALUES (?, ?)", (self._name, row.epoch))
        if row.client_id != client_id:
            detail = f"{row.client_id} -> {client_id} with sequence {receipt.sequence}"
            insert = "INSERT INTO audit (at, workspace, event, detail) VALUES (?, ?, 'take-over', ?)"
            self._db.execute(insert, (receipt.applied_at, self._name, detail))

    def _write_head(self, applied: delta.Applied, receipt: wire.Receipt) -> None:
        head: Mapping[str, object] = {
            "name": self._name,
            "client_id": self._metadata.manifest.client_id,
            "epoch": receipt.epoch,
            "sequence": receipt.sequence,
            "root": applied.root,
            "files": applied.files,
            "content_bytes": applied.content_bytes,
            "bundle_id": receipt.bundle_id,
            "applied_at": receipt.applied_at,
            "empty_root": EMPTY_ROOT,
        }
        self._db.execute(_UPSERT_HEAD, head)


_UPSERT_HEAD = """
    INSERT INTO workspaces VALUES (
        :name, :client_id, :epoch, :sequence, :root, :files, :content_bytes, :bundle_id, :applied_at, 'applied',
        0, :empty_root, NULL, :empty_root
    ) ON CONFLICT (name) DO UPDATE SET
        client_id = excluded.client_id, epoch = excluded.epoch, sequence = excluded.sequence, root = excluded.root,
        files = files + excluded.files, content_bytes = content_bytes + excluded.content_bytes,
        last_bundle_id = excluded.last_bundle_id, last_applied_at = excluded.last_applied_at,
        last_upload_status = excluded.last_upload_status
"""


def _new_files(operations: Sequence[Operation]) -> int:
    """Return how many files more there will be; 0 where only the commit can tell, because something goes as well."""
    if any(each.operation is Verb.DELETED for each in operations):
        return 0
    return sum(each.operation is Verb.CREATED and each.kind is Kind.FILE for each in operations)


def _require_links(metadata: Metadata, staging: Staging) -> None:
    """Raise LimitExceeded where a link's target is longer than the disk takes: no tree could hold it (spec ST-38)."""
    links = [each for each in metadata.operations if each.target is not None]
    longest = max(links, key=lambda each: len((each.target or "").encode()), default=None)
    if longest is not None and not staging.takes_link(longest.target or ""):
        size = len((longest.target or "").encode())
        raise LimitExceeded(
            "ST-38",
            f"the target of the link {shown(longest.path)} has {size} bytes, more than the file system of the server's "
            "data takes; shorten it, or have it ignored",
            path=longest.path,
        )


def _brings_large_content(metadata: Metadata) -> bool:
    """Tell whether one fsync for each content costs less than writing all of it twice (spec ST-16)."""
    sizes = [operation.size for operation in content_operations(metadata).values()]
    return sum(sizes) >= max(1, len(sizes)) * LARGE_BYTES


def conflict(verdict: Verdict, head: Head, header: Header) -> DeltasyncError:
    """Return the error that a verdict is answered with; its facts carry the head."""
    if verdict is Verdict.GAP:
        return SequenceGap(head.sequence + 1, header.sequence)
    kind, sentence = {
        Verdict.NOT_OWNER: (NotOwner, "the workspace belongs to another client; --take-over makes it yours"),
        Verdict.STALE_EPOCH: (StaleEpoch, f"epoch {header.epoch} was replaced; fetch the head and seal again"),
        Verdict.FORK: (SequenceFork, f"bundle {header.sequence} does not follow the head {head.sequence}"),
    }[verdict]
    return kind(
        sentence,
        expected_sequence=head.sequence + 1,
        got_sequence=header.sequence,
        sequence=head.sequence,
        epoch=head.epoch,
        root=head.root.hex(),
    )


def now() -> str:
    """Return the time for people to read; nothing is decided by it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
