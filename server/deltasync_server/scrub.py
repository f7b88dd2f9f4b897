"""The scrub: reads every blob again, slowly, and has the damaged ones replaced (spec ST-120, ST-121)."""

from __future__ import annotations

import logging
import os
import threading
import time

from deltasync.core.hashing import hasher
from deltasync_server.blobs import Cache
from deltasync_server.config import StoreConfig
from deltasync_server.state import State, blob_row
from deltasync_server.tree import Trees

BATCH = 64
PIECE_BYTES = 1 << 20
RETRY_SECONDS = 60.0
REST_SECONDS = 3600.0
"""How often to look whether a pass is due."""
_log = logging.getLogger(__name__)


class Scrub:
    """One thread that goes through the blobs in the order of their digests, and goes on there after a restart."""

    def __init__(self, config: StoreConfig, state: State, cache: Cache, trees: Trees) -> None:
        self._config, self._state, self._cache, self._trees = config, state, cache, trees
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._read_bytes = self._found = 0

    def start(self) -> None:
        """Read in the background from now on."""
        if self._config.scrub_bytes:
            self._thread = threading.Thread(target=self._run, name="deltasync-scrub", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Stop after the piece at hand."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def figures(self) -> dict[str, float]:
        """Return how much was read since the start, and how many blobs were wrong."""
        return {"scrubbed_bytes_total": float(self._read_bytes), "scrub_damaged_total": float(self._found)}

    def _run(self) -> None:
        self._stop.wait(self._config.scrub_after_seconds)
        while not self._stop.is_set():
            try:
                self._stop.wait(self._go_on())
            except Exception:  # noqa: BLE001  a worker loop reports it and goes on
                _log.exception("the scrub failed; trying again")
                self._stop.wait(RETRY_SECONDS)

    def _go_on(self) -> float:
        """Read some blobs and remember how far that is; returns how long to rest."""
        with self._state.read() as db:
            behind, began = db.execute("SELECT behind, began FROM scrub").fetchone() or (b"", 0)
            select = "SELECT digest FROM blobs WHERE digest > ? ORDER BY digest LIMIT ?"
            digests = [digest for (digest,) in db.execute(select, (behind, BATCH))]
        now, pause = time.time(), self._config.scrub_seconds
        if not behind and began <= now < began + pause:  # a clock that was set back costs a pass and nothing worse
            return min(began + pause - now, REST_SECONDS)
        for digest in digests:
            is_right = self._is_right(digest)
            if self._stop.is_set():
                return 0.0
            if not is_right and self._is_known(digest):
                self._found += 1
                self._trees.prove([digest])
        behind, began = (digests[-1] if digests else b"", began if behind else int(now))
        with self._state.write() as db:
            db.execute("INSERT OR REPLACE INTO scrub VALUES (1, ?, ?)", (behind, began))
        return 0.0

    def _is_known(self, digest: bytes) -> bool:
        with self._state.read() as db:
            return blob_row(db, digest) is not None

    def _is_right(self, digest: bytes) -> bool:
        """Read a blob at the pace that is allowed; False as well where the scrub is to stop."""
        try:
            file = os.fdopen(self._cache.open(digest), "rb", buffering=0)
        except OSError:
            return False
        content, buffer = hasher(), memoryview(bytearray(PIECE_BYTES))
        with file:
            try:
                while count := file.readinto(buffer):
                    content.update(buffer[:count])
                    self._read_bytes += count
                    if self._stop.wait(count / self._config.scrub_bytes):
                        return False
            except OSError:
                return False
        return content.digest() == digest
