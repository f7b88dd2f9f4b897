"""The machine that the store of a simulated world runs on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sudden_death import Fuse, Killed, acting, as_killed, light, put_out

from deltasync.core.errors import HostUnreachable
from deltasync_server.check import check
from deltasync_server.config import StoreConfig
from deltasync_server.receive import Store

KEEP_SEQUENCES = 3


class Host:
    """The machine that the store runs on: it can be stopped, die, and be restored from a backup."""

    def __init__(self, data: Path, *, is_threaded: bool, **settings: Any) -> None:
        """Start a store. is_threaded: with its own background threads; else its trees move when they are asked to."""
        self.data = data
        self.is_threaded = is_threaded
        self.is_down = False
        self._config = StoreConfig(data, keep_sequences=KEEP_SEQUENCES, low_disk_bytes=0, gap_seconds=0.0, **settings)
        self._lock = threading.Lock()
        self._inside = 0
        self._store = self._started()

    def _started(self) -> Store:
        with acting("server"):
            store = Store(self._config)
            try:
                store.recover()
                if self.is_threaded:
                    store.start()
            except BaseException:
                with as_killed(self.data):
                    store.stop()
                raise
        return store

    @contextmanager
    def serving(self) -> Iterator[Store]:
        """Lend the store to one request; when it dies of that, or is down, the asker hears nothing."""
        with self._lock:
            if self.is_down:
                raise HostUnreachable("the server is down")
            self._inside += 1
        try:
            with acting("server"):
                yield self._store
        except Killed:
            self.is_down = True
            raise HostUnreachable("the server died") from None
        finally:
            with self._lock:
                self._inside -= 1

    @contextmanager
    def stopped(self, *, dies: bool = False) -> Iterator[bool]:
        """Have no server in this block, if nobody is being served; tells whether that is so."""
        with self._lock:
            if not self._inside:
                self._stop(dies=dies or self.is_down)
                try:
                    yield True
                finally:
                    self._store = self._started()
                    self.is_down = False
                return
        yield False

    def _stop(self, *, dies: bool) -> None:
        self.disarm()
        store = self._store
        if not dies:
            store.stop()
            return
        store._upkeep.stop()
        store.trees.stop()
        with as_killed(self.data):
            store.stop()

    def revive(self) -> None:
        """Start the server again if it is down."""
        if self.is_down:
            with self.stopped():
                pass

    def arm(self, changes: int) -> None:
        """Let the server die at its n-th change from now on."""
        light("server", Fuse(changes))

    def disarm(self) -> None:
        """Let the server live."""
        put_out("server")

    def check(self, *, repair: bool = False) -> list[str]:
        """Run the real check on the store, which is stopped, and return what it finds."""
        found = check(self._config, repair=repair).findings
        return [f"{each.kind} {each.subject}: {each.problem}" for each in found]

    def close(self) -> None:
        """Stop for good."""
        self.disarm()
        self._store.stop()
