"""The store: takes sealed bundles, commits each once and in order, and answers what it holds."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from collections.abc import Collection as Values
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from deltasync import __version__
from deltasync.core import wire
from deltasync.core.bundle import Source
from deltasync.core.chunks import is_average
from deltasync.core.errors import DeltasyncError, LimitExceeded, NoSpace, NotFound, SequenceGone, UsageError
from deltasync.core.hashing import DIGEST_BYTES
from deltasync.core.manifest import EMPTY_ROOT
from deltasync.core.metadata import FEATURES
from deltasync.core.names import WorkspaceName
from deltasync.disk import Folder, Lock, space_guard
from deltasync_server.blobs import Cache, Leases
from deltasync_server.collect import Collected, Collection
from deltasync_server.config import LinkMode, StoreConfig
from deltasync_server.evict import Evictor
from deltasync_server.files import Files
from deltasync_server.intake import LEASE_SECONDS, Arrival, Arrivals, DecideHook, Intake, Permit, Rooms
from deltasync_server.jobs.leftovers import kill_left
from deltasync_server.jobs.removal import remove_all
from deltasync_server.journal import Adopted, Assembled, Journal, Spool
from deltasync_server.ledger import Ledger
from deltasync_server.offer import blob_pieces, chunk_pieces, held_object, object_pieces, opened_blob
from deltasync_server.room import Room
from deltasync_server.scrub import Scrub
from deltasync_server.state import (
    BlobRow,
    State,
    WorkspaceRow,
    held_row,
    held_rows,
    held_sizes,
    keep_no_more_than,
    kept_receipts,
    pinned,
    settle_stamps,
    workspace_row,
    workspace_rows,
)
from deltasync_server.streams import Streams
from deltasync_server.tenants import Tenant, own_name, qualified, tenant_of
from deltasync_server.tree import Trees
from deltasync_server.upkeep import Upkeep
from deltasync_server.uploads import Answer, Session, Uploads

PINS_MAX = 1000
"""Pinned sequences of one workspace."""
_log = logging.getLogger(__name__)
_COUNTED = ("bundles_applied_total", "bundles_duplicate_total", "bundles_refused_total", "content_bytes_total")


class Store:
    """Everything below one DATA folder; the only process that writes there."""

    def __init__(self, config: StoreConfig) -> None:
        """Open the store, or make one; raises AlreadyRunning while another process has it."""
        self.config = config
        data = config.data
        try:
            link = LinkMode(config.link)
        except ValueError as error:
            raise UsageError(f"--link is one of {', '.join(LinkMode)}, not {config.link!r}") from error
        with space_guard(data):
            data.mkdir(0o755, parents=True, exist_ok=True)
            self._lock = Lock(data / "lock", f"another server uses {data}; stop it first, or name another folder")
        try:
            kill_left(data / "state.db", config.sessions)  # first: one of them may hold what fills the disk
            self._make_room_for(lambda: self._open_rooms(link))
        except BaseException:
            self._lock.close()
            raise
        self.leases = Leases()
        self._arrivals = Arrivals()
        self._syncs = ThreadPoolExecutor(max_workers=4, thread_name_prefix="deltasync-sync")
        self.room = Room(config, self.ledger)
        self.streams = Streams(data, self.state, self.room.require_disk)
        self._rooms = Rooms(
            config,
            self.state,
            self.cache,
            self.leases,
            self._arrivals,
            self.trees,
            self.streams,
            self.room,
            self._syncs,
        )
        self.uploads = Uploads(config, self.state, self._arrivals, self.room)
        self.ledger.live = (self.journal, self.uploads, self.streams)
        self._evictor = Evictor(config, self.state, self.cache, self.leases, self.journal, self.ledger, self.room)
        self.room.gives_way = (self.uploads,) if config.keeps_streams else (self.uploads, self.streams)
        self.room.evict = self._evictor.ask
        self.room.give_back = self._give_back
        self.files = Files(self.state, self.cache)
        self._upkeep = Upkeep(
            config,
            self.state,
            self.cache,
            self.journal,
            self.trees,
            self.leases,
            self.uploads,
            self.streams,
            self._evictor,
        )
        self._scrub = Scrub(config, self.state, self.cache, self.trees)
        self._counted: Counter[str] = Counter()
        self._count_lock = threading.Lock()
        self._started_at = time.monotonic()
        self._is_open = True

    def _open_rooms(self, link: LinkMode) -> None:
        config, data = self.config, self.config.data
        with space_guard(data):
            self.state = State(data / "state.db")
            self.ledger = Ledger(config, self.state)
            try:
                self.cache = Cache(data)
                self.journal = Journal(data, self.state, self.cache, config.limits, keep_bundles=config.keep_bundles)
                self.trees = Trees(data, self.state, self.cache, link, self.ledger.note_copy)
            except BaseException:
                self.state.close()
                raise

    def _make_room_for(self, work: Callable[[], None]) -> None:
        """Do what a full disk may stop; then what can be done without goes, a kind at a time (spec ST-89, ST-96)."""
        kinds: list[tuple[str, tuple[str, ...]]] = [
            ("staged content and unfinished uploads", ("staging", "uploads")),
            ("the sessions of a server that died", ("sessions",)),
        ]
        if not self.config.keeps_streams:
            kinds.append(("the parts of files that have not come whole", ("parts",)))
        for what, folders in kinds:
            try:
                work()
            except NoSpace:
                _log.warning("the disk is full: removing %s", what)
                _remove_all(self.config.data, folders)
            else:
                return
        work()

    # --- life ---

    def recover(self) -> None:
        """Bring the store to a state as if nothing had been interrupted, before it serves (spec ST-40 to ST-44)."""
        self._make_room_for(self._recover)

    def _recover(self) -> None:
        with space_guard(self.config.data):
            self.cache.clear_staging()
            self.journal.clear_unreferenced()
            self.uploads.recover()
            self.streams.recover()
            self._settle_stamps()
            with self.state.read() as db:
                rows = workspace_rows(db)
                journalled = {name for (name,) in db.execute("SELECT workspace FROM receipts WHERE journal NOT NULL")}
            rebuilt = self.journal.rebuild()
            if rebuilt.lost:
                self.trees.quarantine(rebuilt.lost)
            suspects = [row.name for row in rows if rebuilt.rebuilt or row.name in journalled or _is_unsettled(row)]
            self.trees.distrust(suspects)
            for row in rows:
                self.trees.wake(row.name)
            if self.config.quota is not None:
                self.ledger.count()

    def _settle_stamps(self) -> None:
        """Finish restamps that were interrupted: the intent says which fingerprint is also right (spec ST-35)."""
        with self.state.hold(), self.state.write() as db:
            stamped = [
                BlobRow(digest, status.st_size, mtime_ns, bool(executable))
                for digest, mtime_ns, executable in db.execute("SELECT * FROM stamps").fetchall()
                if (status := self.cache.status(digest)) is not None and status.st_mtime_ns == mtime_ns
            ]
            settle_stamps(db, stamped)

    def start(self) -> None:
        """Bring trees forward and keep the store up in the background."""
        self.trees.start()
        self._upkeep.start()
        self._scrub.start()

    def stop(self) -> None:
        """End the background work and let everything go; receiving must have ended. The store cannot be used again."""
        if not self._is_open:
            return
        self._is_open = False
        self._scrub.stop()
        self._upkeep.stop()
        self.trees.stop()
        self._syncs.shutdown()
        self.uploads.close()
        self.streams.close()
        self.state.close()
        self.cache.close()
        self.journal.close()
        self._lock.close()

    def stop_awaiting_pieces(self) -> None:
        """Let no bundle wait any longer for one that comes in pieces: no piece comes any more."""
        self._arrivals.stop_awaiting_pieces()

    def catch_up(self) -> None:
        """Bring every tree forward now, in the calling thread."""
        with self.state.read() as db:
            rows = workspace_rows(db)
        for row in rows:
            self.trees.bring_forward(row.name)

    def upkeep(self) -> None:
        """Do the idle work now, in the calling thread."""
        self._upkeep.work()

    def collect(self, *, dry_run: bool = False, now: float | None = None) -> Collected:
        """Remove what no head, kept sequence, lease or journal needs.

        now: seconds since 1970, by which adopted content is kept or let go.
        """
        keep = self.config.keep_sequences
        collection = Collection(self.state, self.cache, self.leases, keep, is_dry_run=dry_run)
        idle_seconds = 0.0 if self.room.is_low() else self.config.upload_seconds
        uploads = self.uploads.release_older(idle_seconds, is_dry_run=dry_run)  # first: the rest needs space itself
        found = collection.run(self.journal, now=time.time() if now is None else now)
        found.uploads, found.upload_bytes = len(uploads), sum(uploads)
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _give_back(self, tenant: Tenant, size_bytes: int) -> None:
        """See what a tenant holds without need: its own streams that nobody sends, and content that is idle by now."""
        self.streams.release(size_bytes, tenant)
        self._evictor.note_idle()

    # --- questions ---

    def workspace(self, name: WorkspaceName) -> wire.WorkspaceState:
        """Return what is known of a workspace; one that was never written has sequence 0 and no owner."""
        with self.state.read() as db:
            return self._state_of(db, name, workspace_row(db, name))

    def workspaces(self, tenant: Tenant) -> list[wire.WorkspaceState]:
        """Return every workspace of a tenant, by name."""
        with self.state.read() as db:
            return [self._state_of(db, row.name, row) for row in workspace_rows(db) if tenant_of(row.name) == tenant]

    def _state_of(self, db: sqlite3.Connection, name: str, row: WorkspaceRow | None) -> wire.WorkspaceState:
        if row is None:
            row = _unwritten(name)
        wanted = db.execute("SELECT digest FROM wanted WHERE workspace = ? AND NOT healed", (name,)).fetchall()
        return wire.WorkspaceState(
            workspace=own_name(name),
            client_id=row.client_id,
            epoch=row.epoch,
            sequence=row.sequence,
            root=row.root.hex(),
            tree_path=str(self.trees.path(name).absolute()) if row.has_tree else "",
            tree_sequence=None if row.moving_to is not None else row.tree_sequence,
            files=row.files,
            content_bytes=row.content_bytes,
            last_applied_at=row.last_applied_at or None,
            last_bundle_id=row.last_bundle_id or None,
            lag=row.sequence - row.tree_sequence,
            wanted=[digest.hex() for (digest,) in wanted],
            limits=self.config.limits,
            features=sorted(FEATURES),
            usage=self.ledger.usage(tenant_of(name)) if self.room.bounds_tenants else None,
        )

    def wait_for_tree(self, name: WorkspaceName, sequence: int, seconds: float) -> wire.WorkspaceState:
        """Return the workspace as soon as its plain tree holds a sequence, or after so many seconds."""

        def is_reached() -> bool:
            with self.state.read() as db:
                row = workspace_row(db, name)
            if row is None:
                return sequence <= 0
            if row.tree_sequence < sequence:
                return False
            return row.moving_to is None or row.moving_to > sequence

        self.trees.wait_for(is_reached, seconds)
        return self.workspace(name)

    def missing(self, name: WorkspaceName, digests: list[str]) -> wire.MissingAnswer:
        """Return which of these digests must be sent; the others are leased, and their files looked at (spec ST-24)."""
        asked = self._asked(digests)
        present = self._leased(tenant_of(name), asked, LEASE_SECONDS)
        if lost := self.trees.changed(present):
            self.trees.doubt(name, lost)
        absent = [text for text, digest in zip(digests, asked, strict=True) if digest not in present or digest in lost]
        return wire.MissingAnswer(missing=absent, leased_seconds=LEASE_SECONDS)

    def sizes(self, name: WorkspaceName, sizes: Sequence[int]) -> wire.SizesAnswer:
        """Return of which of these sizes in bytes the workspace's tenant holds, or may hold, some content."""
        if len(sizes) > (most := self.config.limits.missing_digests):
            raise LimitExceeded("H-135", f"more than {most} sizes", limit=most)
        with self.state.read() as db:
            held = held_sizes(db, tenant_of(name))
        return wire.SizesAnswer(held=[size for size in sizes if size < wire.LARGE_BYTES or size in held])

    def _leased(self, tenant: Tenant, digests: Values[bytes], seconds: float) -> dict[bytes, BlobRow]:
        with self.leases.guard, self.state.read() as db:
            present = held_rows(db, tenant, digests)
            if present:
                self.leases.add(present, seconds, tenant)
        self._evictor.note_used(tenant, present)
        return present

    def directory(self, name: WorkspaceName, digest: bytes) -> bytes:
        """Return the body of a directory object."""
        with self.state.read() as db:
            body = held_object(db, tenant_of(name), digest)
            if body is None or workspace_row(db, name) is None:
                raise NotFound(f"workspace {own_name(name)!r} has no directory object {digest.hex()}")
        return body

    def sequences(self, name: WorkspaceName) -> wire.KeptSequences:
        """Return the last sequences, whose whole trees are kept, and the pinned ones, oldest first."""
        with self.state.read() as db:
            return self._kept(db, name)

    def _kept(self, db: sqlite3.Connection, name: WorkspaceName) -> wire.KeptSequences:
        pins = pinned(db, name)
        return wire.KeptSequences(
            sequences=[
                wire.KeptSequence(
                    epoch=row.epoch,
                    sequence=row.sequence,
                    identity=row.identity.hex(),
                    root=row.root.hex(),
                    applied_at=row.receipt().applied_at,
                    pinned=row.sequence in pins,
                )
                for row in kept_receipts(db, name, self.config.keep_sequences)
            ]
        )

    def pin(self, name: WorkspaceName, number: int) -> wire.KeptSequences:
        """Hold a kept sequence until it is unpinned; raises SequenceGone for one that is not kept."""
        with self.state.write() as db:
            kept = self._kept(db, name)
            _sequence_in(kept, number)
            pins = pinned(db, name)
            if number not in pins and len(pins) >= PINS_MAX:
                raise LimitExceeded("H-110", f"more than {PINS_MAX} pinned sequences", limit=PINS_MAX)
            db.execute("INSERT OR IGNORE INTO pins VALUES (?, ?)", (name, number))
            return self._kept(db, name)

    def unpin(self, name: WorkspaceName, number: int) -> wire.KeptSequences:
        """Hold a sequence only as long as others of its age; one that is not pinned stays as it is."""
        with self.state.write() as db:
            db.execute("DELETE FROM pins WHERE workspace = ? AND sequence = ?", (name, number))
            keep_no_more_than(db, self.config.keep_sequences)  # before a collection takes the first of its objects
            return self._kept(db, name)

    def sequence(self, name: WorkspaceName, number: int) -> wire.KeptSequence:
        """Return one of the kept sequences, or raise SequenceGone with the range of them."""
        return _sequence_in(self.sequences(name), number)

    def last_upload_status(self, name: WorkspaceName) -> str | None:
        """Return how the last bundle for a workspace fared: "applied", or the code of its error."""
        with self.state.read() as db:
            row = workspace_row(db, name)
        return row.last_upload_status if row else None

    def open_blob(self, tenant: Tenant, digest: bytes) -> tuple[BinaryIO, int]:
        """Return the bytes of a blob that a tenant holds, after a look at its fingerprint, and their number."""
        with self.state.read() as db:
            row = held_row(db, tenant, digest)
        found = self._opened(digest, row)
        if found is None:
            raise NotFound(f"the cache has no blob {digest.hex()}")
        return os.fdopen(found[0], "rb"), found[1]

    def doubt(self, digest: bytes) -> None:
        """Read a blob again that could not be read to its end, and give it up where that fails (spec ST-28)."""
        self.trees.prove([digest])

    def _opened(self, digest: bytes, row: BlobRow | None) -> tuple[int, int] | None:
        return opened_blob(self.cache, self.trees, digest, row)

    def offer_blobs(self, tenant: Tenant, digests: list[str]) -> Generator[bytes, None, None]:
        """Return the pieces of a stream with these blobs (spec H-37)."""
        return blob_pieces(self.state, tenant, self._opened, self.doubt, self._asked(digests))

    def offer_chunks(self, tenant: Tenant, digest: bytes, average_bytes: int) -> Generator[bytes, None, None]:
        """Return the pieces of the list of a blob's chunks; they are cut as the list is read (spec H-136)."""
        if not is_average(average_bytes):
            raise UsageError(f"chunks of {average_bytes} bytes on average cannot be asked for")
        return chunk_pieces(self.open_blob(tenant, digest)[0], average_bytes, partial(self.doubt, digest))

    def offer_objects(self, name: WorkspaceName, digests: list[str]) -> Generator[bytes, None, None]:
        """Return the pieces of a stream with these directory objects (spec H-39)."""
        with self.state.read() as db:
            if workspace_row(db, name) is None:
                raise NotFound(f"workspace {own_name(name)!r} was never written")
        return object_pieces(self.state, tenant_of(name), self._asked(digests))

    def _asked(self, digests: list[str]) -> list[bytes]:
        most = self.config.limits.missing_digests
        if len(digests) > most:
            raise LimitExceeded("H-24", f"more than {most} digests", limit=most)
        return [_digest(text) for text in digests]

    def health(self, tenant: Tenant | None = None) -> wire.Health:
        """Return whether the store can take bundles, and its headroom. tenant: count only its workspaces."""
        disk = os.statvfs(self.config.data)
        with self.state.read() as db:
            names = [name for (name,) in db.execute("SELECT name FROM workspaces")]
        return wire.Health(
            status="low disk" if self.room.is_low() else "ok",
            version=__version__,
            disk_free_bytes=disk.f_bavail * disk.f_frsize,
            disk_total_bytes=disk.f_blocks * disk.f_frsize,
            workspaces=sum(tenant in (None, tenant_of(name)) for name in names),
            uptime_seconds=time.monotonic() - self._started_at,
        )

    def figures(self) -> dict[str, float]:
        """Return numbers for /metrics; those that end in _total only grow."""
        health = self.health()
        with self.state.read() as db:
            blobs, blob_bytes = db.execute("SELECT count(*), coalesce(sum(size), 0) FROM blobs").fetchone()
            (behind,) = db.execute("SELECT count(*) FROM workspaces WHERE tree_sequence < sequence").fetchone()
            (wanted,) = db.execute("SELECT count(*) FROM wanted WHERE NOT healed").fetchone()
        with self._count_lock:
            counted = {name: float(self._counted[name]) for name in _COUNTED}
        return counted | {
            "disk_free_bytes": health.disk_free_bytes,
            "disk_total_bytes": health.disk_total_bytes,
            "workspaces": health.workspaces,
            "uptime_seconds": health.uptime_seconds,
            "blobs": blobs,
            "blob_bytes": blob_bytes,
            "blobs_wanted": wanted,
            "trees_behind": behind,
            "journal_bytes": self.journal.size_bytes(),
            "held_bytes": self.ledger.held_bytes(),
            "quota_bytes": self.config.quota or 0,
            "bundles_arriving": len(self._arrivals),
            **self.uploads.figures(),
            **self.streams.figures(),
            **self._scrub.figures(),
        }

    def _count(self, **amounts: int) -> None:
        with self._count_lock:
            self._counted.update(amounts)

    # --- receiving ---

    def receive(
        self,
        name: WorkspaceName,
        source: Source,
        *,
        expected_identity: bytes | None,
        take_over: bool = False,
        decide_hook: DecideHook | None = None,
        arrival: Arrival | None = None,
        permit: Permit = lambda: None,
        gives_back: bool = False,
        may_be_host: bool = False,
    ) -> wire.Receipt:
        """Take one bundle and return its receipt; nothing of it stays when this raises (spec ST-10 to ST-15).

        expected_identity: what the sender announced, or None where the route has no place for it.
        arrival: the bundle's place among those on their way in, where it has one already.
        permit: asked before the commit whether the sender still may; raises where not. gives_back: it brings nothing
        and lets content go, for which the reserve is there. may_be_host: the bundle may be one of the host's own.
        """
        self._upkeep.note_arrival()
        try:
            if not gives_back:
                self.room.require_disk()
            with self._arrivals.arriving(name, arrival) as coming, self._spool(source) as spool:
                intake = Intake(self._rooms, coming, spool, take_over, decide_hook, permit, may_be_host)
                done = intake.run(expected_identity)
        except DeltasyncError:
            self._count(bundles_refused_total=1)
            raise
        if done.receipt.duplicate:
            self._count(bundles_duplicate_total=1)
        else:
            self._count(bundles_applied_total=1, content_bytes_total=done.receipt.content_bytes)
            self._upkeep.note_commit(journal_bytes=done.journal_bytes, object_bytes=done.object_bytes)
        self.trees.wake(name)
        self.trees.wake_healed()
        return done.receipt

    def arriving(self, name: WorkspaceName) -> AbstractContextManager[Arrival]:
        """Count a bundle as on its way in for the length of a block, so that the one after it waits."""
        return self._arrivals.arriving(name)

    def complete_upload(
        self,
        tenant: Tenant,
        upload_id: str,
        request: wire.UploadComplete,
        *,
        take_over: bool = False,
        permit: Permit = lambda: None,
    ) -> Answer:
        """Take the bundle that an upload has brought in pieces, as `receive` takes one, or the file (spec H-73)."""

        def whole(bundle: Assembled, session: Session) -> Answer:
            if session.request.kind == "file":
                self.room.require_share(tenant, bundle.size_bytes)
                self.room.require()
                with space_guard(self.config.data):
                    stored = self.files.store(tenant, bundle, session.request, session.id, permit)
                self.trees.wake_healed()
                return stored
            return self.receive(
                qualified(tenant, WorkspaceName(session.request.workspace)),
                bundle,
                expected_identity=bytes.fromhex(session.request.identity),
                take_over=take_over,
                arrival=session.arrival,
                permit=permit,
            )

        return self.uploads.complete(tenant, upload_id, request, whole)

    def _spool(self, source: Source) -> Spool | Adopted:
        with space_guard(self.config.data):
            return self.journal.spool(source, self.room.require_disk)


def _sequence_in(kept: wire.KeptSequences, number: int) -> wire.KeptSequence:
    """Return one of the kept sequences, or raise SequenceGone with the range of those that no pin holds."""
    found = next((each for each in kept.sequences if each.sequence == number), None)
    if found is None:
        by_age = [each.sequence for each in kept.sequences if not each.pinned]
        last = kept.sequences[-1].sequence if kept.sequences else None
        first = by_age[0] if by_age else last
        pinned = [each.sequence for each in kept.sequences if first is not None and each.sequence < first]
        raise SequenceGone(number, first, last, pinned)
    return found


def _remove_all(data: Path, folders: Iterable[str]) -> None:
    """Remove everything in some of the store's folders."""
    for name in folders:
        with contextlib.suppress(FileNotFoundError), Folder.open(data / name) as folder:
            for each in folder.names():
                remove_all(folder, each)


def _is_unsettled(row: WorkspaceRow) -> bool:
    """Tell whether a tree may not be what its row says, after a restart (spec ST-44)."""
    return row.moving_to is not None or row.tree_root != row.durable_root


def _unwritten(name: str) -> WorkspaceRow:
    return WorkspaceRow(name, "", "", 0, EMPTY_ROOT, 0, 0, "", "", "", 0, EMPTY_ROOT, None, EMPTY_ROOT)


def _digest(text: str) -> bytes:
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        digest = b""
    if len(digest) != DIGEST_BYTES or digest.hex() != text:
        raise UsageError("a digest is 64 lower-case hexadecimal digits")
    return digest
