"""Patience with a server: a transfer that broke off goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from deltasync.core.errors import DeltasyncError, HostBusy, HostUnreachable


class Patient(Protocol):
    """What says how often and how long to wait."""

    max_retries: int

    def back_off(self, attempt: int, error: DeltasyncError | None = None) -> None:
        """Wait before another attempt."""


def patiently(source: Patient, call: Callable[[], None], progress: Callable[[], int]) -> None:
    """Make a call again where the error says that a retry can help; each that brought something counts as the first.

    progress: a number that grows with what the call has brought.
    """
    attempt, before = 0, progress()
    while True:
        try:
            return call()
        except (HostUnreachable, HostBusy) as error:
            if progress() > before:
                attempt, before = 0, progress()
            if attempt >= source.max_retries:
                raise
            source.back_off(attempt, error)
        attempt += 1
