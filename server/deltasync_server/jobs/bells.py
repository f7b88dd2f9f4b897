"""Bells: tell those who follow a job that there is something new of it."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Bells:
    """Who listens to which job; several threads may ring and listen."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: defaultdict[str, list[Callable[[], None]]] = defaultdict(list)

    @contextmanager
    def listening(self, job_id: str, ring: Callable[[], None]) -> Iterator[None]:
        """Have a function called for the length of a block, whenever something is new of a job."""
        with self._lock:
            self._listeners[job_id].append(ring)
        try:
            yield
        finally:
            with self._lock:
                self._listeners[job_id].remove(ring)
                if not self._listeners[job_id]:
                    del self._listeners[job_id]

    def ring(self, job_id: str) -> None:
        """Tell those who listen to a job."""
        with self._lock:
            found = list(self._listeners.get(job_id, ()))
        for each in found:
            each()

    def ring_all(self) -> None:
        """Tell everybody."""
        with self._lock:
            found = [each for listeners in self._listeners.values() for each in listeners]
        for each in found:
            each()
