"""Upkeep: what a running store does when nothing arrives: checkpoints, durable trees, waste, old directory objects."""

from __future__ import annotations

import logging
import threading
import time

from deltasync_server.blobs import Cache, Leases
from deltasync_server.collect import Collection
from deltasync_server.config import StoreConfig
from deltasync_server.evict import Evictor
from deltasync_server.journal import Journal
from deltasync_server.state import State
from deltasync_server.streams import Streams
from deltasync_server.tree import Trees
from deltasync_server.uploads import Uploads

RETRY_SECONDS = 30.0
AGE_SECONDS = 300.0
"""A bundle waits at most about this long for its checkpoint, when no moment is quiet."""
PRUNE_BYTES = 64 * 2**20
"""Directory objects that no kept sequence needs are removed after this many bytes of new ones."""
CLEANUP_SECONDS = 3600.0
"""How often uploads that expired are removed, when nothing else is to be done."""
_log = logging.getLogger(__name__)


class Upkeep:
    """One thread that waits for a quiet moment, and for none when the journal grows too large."""

    def __init__(
        self,
        config: StoreConfig,
        state: State,
        cache: Cache,
        journal: Journal,
        trees: Trees,
        leases: Leases,
        uploads: Uploads,
        streams: Streams,
        evictor: Evictor,
    ) -> None:
        self._config = config
        self._state = state
        self._cache = cache
        self._journal = journal
        self._trees = trees
        self._leases = leases
        self._uploads = uploads
        self._streams = streams
        self._evictor = evictor
        self._cleaned_at = time.monotonic()
        self._changed = threading.Condition()
        self._is_stopping = False
        self._has_work = True
        self._active_at = self._pending_since = time.monotonic()
        self._journal_bytes = 0
        self._object_bytes = 0
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Work in the background from now on."""
        self._is_stopping = False
        self._journal_bytes = self._journal.size_bytes()
        self._thread = threading.Thread(target=self._run, name="deltasync-upkeep", daemon=True)
        self._thread.start()
        self._evictor.wake = self._hurry

    def stop(self) -> None:
        """Stop after the batch at hand."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        self._evictor.wake = None
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _hurry(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def note_arrival(self) -> None:
        """Say that a bundle begins to arrive."""
        with self._changed:
            self._active_at = time.monotonic()

    def note_commit(self, *, journal_bytes: int, object_bytes: int) -> None:
        """Say that a bundle was committed with this much new."""
        with self._changed:
            self._active_at = time.monotonic()
            self._journal_bytes += journal_bytes
            self._object_bytes += object_bytes
            self._pending_since = self._pending_since if self._has_work else self._active_at
            self._has_work = True
            self._changed.notify_all()

    def work(self) -> None:
        """Do everything that is due; gives way when a bundle arrives, but for a checkpoint that is overdue."""
        started, is_overdue = self._active_at, self._is_overdue()
        self._has_work = False
        self._cleaned_at = time.monotonic()
        self._evictor.run(lambda: self._is_stopping)  # somebody waits for it

        def must_yield() -> bool:
            self._has_work |= self._active_at != started
            return self._is_stopping or self._active_at != started

        self._journal.checkpoint(lambda: self._is_stopping if is_overdue else must_yield())
        self._journal_bytes = self._journal.size_bytes()
        self._trees.wake_healed()
        self._trees.make_durable(must_yield)
        self._trees.tidy(must_yield)
        self._uploads.expire()
        self._streams.expire(time.time())
        self._evictor.keep_spare(must_yield)
        if self._object_bytes >= PRUNE_BYTES and not must_yield():
            self._object_bytes = 0
            collection = Collection(self._state, self._cache, self._leases, self._config.keep_sequences)
            collection.prune_objects(must_yield)

    def _run(self) -> None:
        while self._is_due():
            try:
                self.work()
            except Exception:  # noqa: BLE001  a worker loop reports it and goes on
                _log.exception("the store's upkeep failed; trying again")
                with self._changed:
                    self._has_work = True
                    self._changed.wait_for(lambda: self._is_stopping, timeout=RETRY_SECONDS)

    def _is_due(self) -> bool:
        """Wait for work and for a quiet moment; False when the store stops."""
        with self._changed:
            while not self._is_stopping:
                left = self._quiet_in() if self._has_work else self._cleaning_in()
                if left > 0 and not self._evictor.is_asked:
                    self._changed.wait(left)
                else:
                    return True
        return False

    def _quiet_in(self) -> float:
        now = time.monotonic()
        if self._is_overdue():
            return 0.0
        quiet_at = self._active_at + self._config.quiet_seconds
        return min(quiet_at, self._pending_since + AGE_SECONDS) - now

    def _cleaning_in(self) -> float:
        return self._cleaned_at + CLEANUP_SECONDS - time.monotonic()

    def _is_overdue(self) -> bool:
        age = time.monotonic() - self._pending_since
        return self._journal_bytes > self._config.journal_bytes or (self._has_work and age >= AGE_SECONDS)
