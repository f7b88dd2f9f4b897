"""Collection: removes objects and blobs that no head, kept sequence, lease, adoption or journal needs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from deltasync.core.manifest import EMPTY_ROOT, Kind
from deltasync.core.tree import Loader
from deltasync_server.blobs import Cache, Leases
from deltasync_server.journal import Journal
from deltasync_server.state import (
    BATCH,
    State,
    adopted_digests,
    batched,
    compared_roots,
    file_digests_of,
    forget_digests,
    held_by_tenant,
    keep_no_more_than,
    kept_roots_of,
    loader,
)
from deltasync_server.tenants import Tenant

ShouldStop = Callable[[], bool]
EVER = 2**62
"""Seconds since 1970 that are never reached."""
NOTED_AT_ONCE = 5_000
"""Rows of idle content that are written in one transaction."""


@dataclass(slots=True)
class Collected:
    """What a collection removed, or would remove."""

    blobs: int = 0
    blob_bytes: int = 0
    objects: int = 0
    strays: int = 0
    """Files in the cache that no row names."""
    kept_blobs: int = 0
    kept_objects: int = 0
    kept_adopted: int = 0
    """How many of the kept blobs nothing names but their adoption."""
    released: int = 0
    """Adoptions whose time is over."""
    uploads: int = 0
    """Unfinished uploads that nobody went on with."""
    upload_bytes: int = 0
    is_dry_run: bool = False


class Marks:
    """Everything below the roots that were added; an object that was seen before is not read again."""

    def __init__(self) -> None:
        self.objects: set[bytes] = set()
        self.blobs: set[bytes] = set()

    def add(self, roots: Iterable[bytes], load: Loader) -> None:
        """Mark every object and blob that these roots reach."""
        left = [root for root in roots if root not in self.objects]
        while left:
            digest = left.pop()
            if digest in self.objects or digest == EMPTY_ROOT:
                continue
            self.objects.add(digest)
            for entry in load(digest):
                if entry.kind is Kind.FILE:
                    self.blobs.add(entry.digest)
                elif entry.kind is Kind.DIRECTORY:
                    left.append(entry.digest)


class Collection:
    """One pass over the store; a running server goes on receiving meanwhile."""

    def __init__(self, state: State, cache: Cache, leases: Leases, keep_sequences: int, *, is_dry_run: bool = False):
        self._state = state
        self._cache = cache
        self._leases = leases
        self._keep_sequences = keep_sequences
        self._marks: defaultdict[Tenant, Marks] = defaultdict(Marks)
        """What each tenant's heads, kept sequences and files need."""
        self._compared = Marks()
        self._adopted: set[bytes] = set()
        self.result = Collected(is_dry_run=is_dry_run)

    def run(self, journal: Journal, should_stop: ShouldStop = lambda: False, *, now: float) -> Collected:
        """Remove objects, blobs and stray files; journals that name a blob are checkpointed first (spec ST-60).

        now: seconds since 1970.
        """
        if not self.result.is_dry_run:
            journal.checkpoint(should_stop)
        self.prune_objects(should_stop)
        self._release_adopted(now)
        self._sweep_blobs(should_stop)
        if not (should_stop() or self.result.is_dry_run):
            self._note_let_go(0)
            self._end_holdings(EVER, b"")
        if not should_stop():
            self._sweep_strays()
        return self.result

    def prune_objects(self, should_stop: ShouldStop = lambda: False) -> None:
        """Remove the directory objects that no kept root reaches."""
        if not self.result.is_dry_run:
            with self._state.write() as db:
                keep_no_more_than(db, self._keep_sequences)
        self._mark()
        with self._state.read() as db:
            digests = [digest for (digest,) in db.execute("SELECT digest FROM objects")]
        dead = [digest for digest in digests if self._is_dead_object(digest)]
        self.result.kept_objects = len(digests) - len(dead)
        for batch in batched(dead, BATCH):
            if should_stop():
                return
            with self._state.hold():
                self._mark()  # a head may have moved since, to a tree that needs an old object again
                gone = [digest for digest in batch if self._is_dead_object(digest)]
                self.result.objects += len(gone)
                if not self.result.is_dry_run:
                    with self._state.write() as db:
                        forget_digests(db, "objects", gone)

    def note_idle(self, now: float) -> None:
        """Record which content nothing needs, and since when (spec ST-133)."""
        with self._state.write() as db:
            keep_no_more_than(db, self._keep_sequences)
            # A clock that was ahead once must not keep content for as long.
            for table in ("idle", "let_go"):
                db.execute(f"UPDATE {table} SET since = ?1 WHERE since > ?1", (int(now),))
        self._release_adopted(now)
        self._mark()
        with self._state.read() as db:
            known = {digest for (digest,) in db.execute("SELECT digest FROM idle")}
            found = {digest for (digest,) in db.execute("SELECT digest FROM blobs")}
        found -= self._adopted | self._leases.digests()
        for marks in self._marks.values():
            found -= marks.blobs
        for batch in batched(known - found, NOTED_AT_ONCE):
            with self._state.write() as db:
                db.executemany("DELETE FROM idle WHERE digest = ?", [(digest,) for digest in batch])
        for batch in batched(found - known, NOTED_AT_ONCE):
            with self._state.write() as db:  # what a commit needs again by now is seen before it is removed
                db.executemany("INSERT OR IGNORE INTO idle VALUES (?, ?)", [(digest, int(now)) for digest in batch])
        self._note_let_go(int(now))

    def _note_let_go(self, now: int) -> None:
        """Record what each tenant holds and needs no more, whatever the others do (spec ST-105)."""
        with self._state.read() as db:
            holdings = held_by_tenant(db)
            known = set(db.execute("SELECT tenant, digest FROM let_go"))
        for tenant, found in holdings.items():
            found -= self._marks[tenant].blobs | self._adopted | self._leases.digests(tenant)
            former = {digest for whose, digest in known if whose == tenant}
            for batch in batched(former - found, NOTED_AT_ONCE):
                with self._state.write() as db:
                    delete = "DELETE FROM let_go WHERE tenant = ? AND digest = ?"
                    db.executemany(delete, [(tenant, digest) for digest in batch])
            for batch in batched(found - former, NOTED_AT_ONCE):
                with self._state.write() as db:
                    insert = "INSERT OR IGNORE INTO let_go VALUES (?, ?, ?)"
                    db.executemany(insert, [(tenant, digest, now) for digest in batch])

    def evict(self, size_bytes: int, before: float, should_stop: ShouldStop = lambda: False, *, blobs: int = 0) -> int:
        """Remove so many bytes of what `note_idle` recorded, the longest idle first; returns how many went.

        before: seconds since 1970; what nothing has needed only since then stays. blobs: and at least so many blobs.
        """
        select = "SELECT since, digest, size FROM idle JOIN blobs USING (digest) WHERE since <= ? ORDER BY 1, 2"
        with self._state.read() as db:
            idle = db.execute(select, (int(before),)).fetchall()
        batch, batch_bytes, gone = list[bytes](), 0, self.result

        def is_enough() -> bool:
            return gone.blob_bytes + batch_bytes >= size_bytes and gone.blobs + len(batch) >= blobs

        last = None
        for since, digest, size in idle:
            if should_stop() or (not batch and is_enough()):
                break
            batch.append(digest)
            batch_bytes += size
            last = (since, digest)
            if len(batch) == BATCH or is_enough():
                self._remove_blobs(batch)
                batch, batch_bytes = [], 0
        self._remove_blobs(batch)
        if last is not None:
            self._end_holdings(*last)
        return gone.blob_bytes

    def _end_holdings(self, since: int, digest: bytes) -> None:
        """End what tenants let go no later than a blob that went, as if nobody else needed it (spec ST-105)."""
        with self._state.read() as db:
            select = "SELECT tenant, digest FROM let_go WHERE (since, digest) <= (?, ?)"
            ended = db.execute(select, (since, digest)).fetchall()
        for start in range(0, len(ended), BATCH):
            with self._leases.guard, self._state.hold():
                self._mark()
                leased = {tenant: self._leases.digests(tenant) for tenant, _ in ended[start : start + BATCH]}
                gone = [
                    (digest, tenant)
                    for tenant, digest in ended[start : start + BATCH]
                    if digest not in self._marks[tenant].blobs and digest not in leased[tenant]
                ]
                with self._state.write() as db:
                    db.executemany("DELETE FROM holdings WHERE digest = ? AND tenant = ?", gone)

    def _release_adopted(self, now: float) -> None:
        """Let go of adopted content whose time is over (spec ST-73); its blobs are like any others from then on."""
        with self._state.read() as db:
            self._adopted = adopted_digests(db, now)
            (known,) = db.execute("SELECT count(*) FROM adopted").fetchone()
        self.result.released = known - len(self._adopted)
        if self.result.released and not self.result.is_dry_run:
            with self._state.write() as db:
                db.execute("DELETE FROM adopted WHERE until <= ?", (now,))

    def _sweep_blobs(self, should_stop: ShouldStop) -> None:
        self._mark()
        with self._state.read() as db:
            digests = [digest for (digest,) in db.execute("SELECT digest FROM blobs")]
        unnamed = [digest for digest in digests if not self._is_named(digest)]
        dead = [digest for digest in unnamed if digest not in self._adopted]
        self.result.kept_adopted = len(unnamed) - len(dead)
        for batch in batched(dead, BATCH):
            if should_stop():
                return
            self._remove_blobs(batch)
        self.result.kept_blobs = len(digests) - self.result.blobs

    def _remove_blobs(self, batch: Iterable[bytes]) -> None:
        """Remove what nothing needs of a batch: rows first, files second, and nobody publishes in between (spec ST-61).

        The lock order is leases, then writer: a digest that `missing` calls present is leased before it answers.
        """
        with self._cache.staging() as waste, self._leases.guard, self._state.hold():
            self._mark()
            leased = self._leases.digests()
            gone = [digest for digest in batch if not self._is_named(digest) and digest not in leased]
            with self._state.read() as db:
                for digest in gone:
                    (size,) = db.execute("SELECT size FROM blobs WHERE digest = ?", (digest,)).fetchone() or (0,)
                    self.result.blob_bytes += size
            self.result.blobs += len(gone)
            if self.result.is_dry_run:
                return
            with self._state.write() as db:
                forget_digests(db, "blobs", gone)
            for digest in gone:
                self._cache.move_to(waste, digest)  # freeing a large file takes time, which nobody waits for

    def _sweep_strays(self) -> None:
        with self._state.hold(), self._state.read() as db:
            strays = self._cache.strays(digest for (digest,) in db.execute("SELECT digest FROM blobs"))
            self.result.strays = len(strays)
            if not self.result.is_dry_run:
                for place in strays:
                    self._cache.remove_stray(place)

    def _mark(self) -> None:
        with self._state.read() as db:
            for tenant, roots in kept_roots_of(db, self._keep_sequences).items():
                self._marks[tenant].add(roots, loader(db))
            for tenant, digests in file_digests_of(db).items():
                self._marks[tenant].blobs |= digests
            self._compared.add(compared_roots(db), loader(db))

    def _is_named(self, digest: bytes) -> bool:
        return any(digest in marks.blobs for marks in self._marks.values())

    def _is_dead_object(self, digest: bytes) -> bool:
        return digest not in self._compared.objects and all(
            digest not in marks.objects for marks in self._marks.values()
        )
