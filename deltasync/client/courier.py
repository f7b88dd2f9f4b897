"""Sending bundles in order, a few under way: while the server applies one, the next is on its way."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from deltasync.client.report import Avoided
from deltasync.core import wire
from deltasync.core.errors import HostBusy
from deltasync.core.metadata import Manifest
from deltasync.core.part import Part

UNDER_WAY_MAX = 2
"""So many bundles, and beside them as many parts: with all of a large file under way, its sender looks at the next."""
LOOK_SECONDS = 5.0
"""How often to look whether a thread is still alive that has no receipt yet."""


class Receiver(Protocol):
    """Where bundles go."""

    def send_bundle(
        self,
        name: str,
        identity: bytes,
        chunks: Iterable[bytes],
        *,
        take_over: bool = False,
        wait: float = 0.0,
        patience: float = 0.0,
    ) -> wire.Receipt:
        """Send a bundle once and return its receipt."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """A sealed bundle on its way: what is needed of it once its bytes are out, and those bytes, to be taken once."""

    manifest: Manifest
    identity: bytes
    file_name: str
    chunks: Iterator[bytes]
    content_bytes: int
    avoided: Avoided
    takes_over: bool = False
    part: Part | None = None
    is_last: bool = False
    """Nothing follows: its answer may wait for the plain tree."""
    patience_seconds: float = 0.0
    """How much longer its receiver may take than its bytes show."""

    @property
    def sequence(self) -> int:
        """The bundle's number."""
        return self.manifest.sequence_number


class Undelivered(Exception):
    """A bundle did not get its receipt; `cause` says why, and every bundle before it was acknowledged."""

    def __init__(self, parcel: Parcel, cause: Exception) -> None:
        super().__init__(str(cause))
        self.parcel = parcel
        self.cause = cause


class _Stopped(Exception):
    """An earlier bundle failed, or the user stopped: this one need not go on."""


@dataclass(frozen=True, slots=True)
class _Trip:
    """A parcel under way, and the sign that its body is out."""

    parcel: Parcel
    wait_seconds: float
    is_out: threading.Event
    receipt: Future[wire.Receipt]


class Courier:
    """Carries parcels in threads of its own; receipts come back to the calling thread, in order."""

    def __init__(self, receiver: Receiver, name: str, on_receipt: Callable[[Parcel, wire.Receipt], None]) -> None:
        """Start nothing yet. on_receipt: called in the calling thread, for each parcel in order."""
        self._receiver, self._name, self._on_receipt = receiver, name, on_receipt
        self._under_way: deque[tuple[_Trip, threading.Thread]] = deque()
        self._is_stopped = threading.Event()
        self._last_out = threading.Event()
        self._last_out.set()

    def make_room(self, *, for_part: bool = False) -> None:
        """Wait until another parcel may be sent; raises Undelivered for an earlier one that failed."""
        while sum((trip.parcel.part is not None) is for_part for trip, _ in self._under_way) >= UNDER_WAY_MAX:
            self._collect()

    def send(self, parcel: Parcel, *, wait_seconds: float = 0.0) -> None:
        """Put a parcel on its way once there is room; raises Undelivered for an earlier one that failed.

        wait_seconds: how long its answer may wait for the plain tree.
        """
        self.make_room(for_part=parcel.part is not None)
        trip = _Trip(parcel, wait_seconds, threading.Event(), Future())
        before, self._last_out = self._last_out, trip.is_out
        # A daemon: whoever interrupts a push does not wait for a server that has stopped reading.
        thread = threading.Thread(target=self._run, args=(trip, before), name="courier", daemon=True)
        self._under_way.append((trip, thread))
        try:
            thread.start()
        except RuntimeError:  # the system starts no more of them: this one carries it
            self._run(trip, before)

    def finish(self) -> None:
        """Wait for every receipt; raises Undelivered."""
        while self._under_way:
            self._collect()

    def _collect(self) -> None:
        trip, thread = self._under_way.popleft()
        _await(trip, thread)
        try:
            receipt = trip.receipt.result()
        except Exception as error:
            raise Undelivered(trip.parcel, error) from error
        self._on_receipt(trip.parcel, receipt)

    def _run(self, trip: _Trip, before: threading.Event) -> None:
        before.wait()  # two bodies at once would only take turns
        try:
            if self._is_stopped.is_set():
                raise _Stopped
            trip.receipt.set_result(self._carry(trip))
        except BaseException as error:  # noqa: BLE001 - it is raised again where the receipt is asked for
            self._is_stopped.set()
            trip.receipt.set_exception(error)
        finally:
            trip.is_out.set()

    def _carry(self, trip: _Trip) -> wire.Receipt:
        parcel = trip.parcel
        return self._receiver.send_bundle(
            self._name,
            parcel.identity,
            self._watched(parcel.chunks, trip.is_out),
            take_over=parcel.takes_over,
            wait=trip.wait_seconds,
            patience=parcel.patience_seconds,
        )

    def _watched(self, chunks: Iterator[bytes], is_out: threading.Event) -> Iterator[bytes]:
        for chunk in chunks:
            if self._is_stopped.is_set():
                raise _Stopped
            yield chunk
        is_out.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop what is still under way, and wait until it has ended unless the user interrupts."""
        self._is_stopped.set()
        if kind is None or issubclass(kind, Exception):
            for trip, thread in self._under_way:
                _await(trip, thread)


def _await(trip: _Trip, thread: threading.Thread) -> None:
    """Wait for a receipt, or for the end of a thread that did not even begin, as a tracer's hook may do to it."""
    while not wait([trip.receipt], LOOK_SECONDS).done:
        if not thread.is_alive() and not trip.receipt.done():
            trip.is_out.set()
            trip.receipt.set_exception(HostBusy("the thread that was to send a bundle ended before it began"))
