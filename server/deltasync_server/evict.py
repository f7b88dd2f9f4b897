"""Eviction: content that nothing needs stays as a cache until its room is needed; the longest idle goes first."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from collections.abc import Collection as Values

from deltasync.core.names import bytes_text
from deltasync_server.blobs import Cache, Leases
from deltasync_server.collect import Collection, ShouldStop
from deltasync_server.config import StoreConfig
from deltasync_server.journal import Journal
from deltasync_server.ledger import Ledger
from deltasync_server.room import Room, Shortage
from deltasync_server.state import BATCH, State, batched
from deltasync_server.tenants import Tenant

KNOWN_SECONDS = 30.0
"""So long it is believed that no more could be removed."""
NOTE_SECONDS = 3600.0
"""How often it is looked up, in a quiet moment, what nothing needs any more."""
_log = logging.getLogger(__name__)


class Evictor:
    """Removes idle content where room is asked for, and some beforehand; the thread of the upkeep does it."""

    def __init__(
        self,
        config: StoreConfig,
        state: State,
        cache: Cache,
        leases: Leases,
        journal: Journal,
        ledger: Ledger,
        room: Room,
    ) -> None:
        self._config = config
        self._state = state
        self._cache = cache
        self._leases = leases
        self._journal = journal
        self._ledger = ledger
        self._room = room
        self.wake: Callable[[], None] | None = None
        """Has the thread run that removes things; None while there is none."""
        self._lock = threading.Lock()
        self._asked = Shortage()
        self._left = (0.0, Shortage())
        """Until when it is known, by the monotonic clock, how much can still be removed."""
        self._noted_at = time.monotonic()

    @property
    def is_asked(self) -> bool:
        """Whether somebody waits for room."""
        return bool(self._asked)

    def ask(self, short: Shortage) -> bool:
        """Have so much removed, and say whether the asker should wait for it; without a thread it is done now."""
        with self._lock:
            until, left = self._left
            if time.monotonic() < until and not short.is_met_by(left):
                return False
            self._asked = self._asked.or_more(short)
        if (wake := self.wake) is None:
            self.run(lambda: False)
            return False
        wake()
        return True

    def run(self, should_stop: ShouldStop) -> None:
        """Remove what was asked for and enough that the next one need not ask, or nothing where that is not there."""
        if not self._asked:
            return
        try:
            self._ledger.count()
            self._journal.checkpoint(should_stop)  # spec ST-133: a blob that it names is not let go before
            collection = self._noted()
            left = self._idle()
            if self._asked.is_met_by(left):
                gone = self._evict(collection, self._asked.or_more(self._room.spare_shortage()), should_stop)
                left = Shortage(left.bytes - gone.bytes, left.inodes - gone.inodes)
        except Exception:  # noqa: BLE001  a worker reports it; whoever waits is told that there is no room
            _log.exception("no room could be made")
            left = Shortage()
        with self._lock:
            self._asked = Shortage()
            self._left = (time.monotonic() + KNOWN_SECONDS, left)

    def keep_spare(self, should_stop: ShouldStop) -> None:
        """Remove idle content before anyone asks, where little room is left, and look up what is idle now and then."""
        if self._room.spare_shortage() and not should_stop():
            self._ledger.count()
            if short := self._room.spare_shortage():
                self._evict(self._noted(), short, should_stop)
        elif time.monotonic() - self._noted_at >= NOTE_SECONDS and not should_stop():
            self._noted()

    def note_idle(self) -> None:
        """Look up what nothing needs any more."""
        self._noted()

    def _noted(self) -> Collection:
        collection = Collection(self._state, self._cache, self._leases, self._config.keep_sequences)
        collection.note_idle(time.time())
        self._noted_at = time.monotonic()
        return collection

    def _evict(self, collection: Collection, short: Shortage, should_stop: ShouldStop) -> Shortage:
        freed = collection.evict(short.bytes, self._before(), should_stop, blobs=short.inodes)
        if blobs := collection.result.blobs:
            _log.warning("removed %d blobs (%s) that nothing needs", blobs, bytes_text(freed))
        return Shortage(freed, blobs)

    def _before(self) -> float:
        return time.time() - self._config.evict_after_seconds

    def _idle(self) -> Shortage:
        """Return how much could go; a blob is an inode."""
        with self._state.read() as db:
            select = "SELECT coalesce(sum(size), 0), count(*) FROM idle JOIN blobs USING (digest) WHERE since <= ?"
            return Shortage(*db.execute(select, (int(self._before()),)).fetchone())

    def note_used(self, tenant: Tenant, digests: Values[bytes]) -> None:
        """Count content as idle, and as let go by a tenant, only from now on: it asked for it."""
        with self._state.read() as db:
            found = db.execute("SELECT 1 FROM let_go WHERE tenant = ? LIMIT 1", (tenant,)).fetchone()
        if not digests or found is None:
            return
        now = int(time.time())
        with self._state.write() as writer:
            for batch in batched(digests, BATCH):
                update = "UPDATE idle SET since = ? WHERE digest = ?"
                writer.executemany(update, [(now, digest) for digest in batch])
                update = "UPDATE let_go SET since = ? WHERE tenant = ? AND digest = ?"
                writer.executemany(update, [(now, tenant, digest) for digest in batch])
