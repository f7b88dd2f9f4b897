"""The network of a simulated world: the transport's promises over the store's methods, and what can go wrong."""

from __future__ import annotations

import contextlib
import io
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import msgspec
from plain_folder import Change
from sudden_death import Killed, acting
from world_books import Letter

from deltasync.core import wire
from deltasync.core.errors import ContentMissing, DeltasyncError, HostBusy, HostUnreachable, from_problem
from deltasync.core.names import WorkspaceName
from deltasync_server.receive import Store

if TYPE_CHECKING:
    from world import World
    from world_client import Client

_T = TypeVar("_T")


class Fault(NamedTuple):
    """What happens to one request; `number` says how much of it."""

    kind: str
    number: int = 0
    is_on_send: bool = False
    """Whether the request is a bundle or a question: each kind has its own order."""


SILENT = ("pass", "catch_up", "collect", "restart", "upkeep")
"""Faults that no client may notice, but for a tree that is not there yet."""
LOUD = ("lost", "unanswered", "busy", "cut", "twice", "echo", "away", "server_dies", "edit")
DEADLY = ("killed", "killed_after")


class Network:
    """The real transport's promises over the store's methods; each request meets the next fault of a plan."""

    url = "http://world.test"
    max_retries = 2
    has_cache = True
    link_bytes_per_second = 0.0

    def __init__(self, world: World, client: Client, plan: Iterable[Fault] = ()) -> None:
        """Connect a client for one push."""
        self.sent_bytes = 0
        self.requests = 0
        self.has_edited = False
        self.told: set[bytes] = set()
        """The bundles of which this client has heard; one that is killed may not remember."""
        self._world, self._client, self._books = world, client, world.books
        faults = tuple(plan)
        self._plans = {
            is_on_send: deque(f for f in faults if f.is_on_send is is_on_send) for is_on_send in (False, True)
        }
        self._away = 0
        self._is_broken = False
        self._lock = threading.Lock()
        self._line = threading.Lock()
        self._old = list(world.letters)
        self._held: set[bytes] = set()
        """What the server said it has."""

    # What a client asks

    def workspace(self, name: str, *, tree_sequence: int | None = None, wait: float = 0.0) -> wire.WorkspaceState:
        """Return the head; waiting for the plain tree brings it forward."""

        def ask(store: Store) -> wire.WorkspaceState:
            if tree_sequence is not None and wait > 0:
                return self._world.wait_for_tree(store, tree_sequence)
            return store.workspace(WorkspaceName(name))

        self._is_broken = False
        state = self._asked(ask)
        self.told |= self._books.up_to(state.sequence, state.epoch)
        return state

    def missing(self, name: str, digests: Sequence[str]) -> list[str]:
        """Return what must be sent; what is not must never be sent then."""
        missing = self._asked(lambda store: store.missing(WorkspaceName(name), list(digests))).missing
        self._held |= {bytes.fromhex(digest) for digest in digests}
        self._held -= {bytes.fromhex(digest) for digest in missing}
        return missing

    def sizes(self, name: str, sizes: Sequence[int]) -> list[int]:
        """Return of which sizes there may be some content."""

        def ask(store: Store) -> list[int]:
            with store.state.read() as db:  # the store itself tells nothing of sizes as small as these
                return [size for size in sizes if db.execute("SELECT 1 FROM blobs WHERE size = ?", (size,)).fetchone()]

        return self._asked(ask)

    def directory(self, name: str, digest: bytes) -> bytes:
        """Return a directory object."""
        return self._asked(lambda store: store.directory(WorkspaceName(name), digest))

    def sequences(self, name: str) -> list[wire.KeptSequence]:
        """Return the kept sequences."""
        return self._asked(lambda store: store.sequences(WorkspaceName(name))).sequences

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
        """Deliver a bundle; in a world without threads, one after another, and none after one that failed."""
        if self._world.host.is_threaded:
            return self._sent(identity, chunks, take_over, wait)
        with self._line:
            if self._is_broken:
                raise HostUnreachable("the connection broke with the bundle before")
            try:
                return self._sent(identity, chunks, take_over, wait)
            except BaseException:
                self._is_broken = True
                raise

    def _sent(self, identity: bytes, chunks: Iterable[bytes], take_over: bool, wait: float) -> wire.Receipt:
        fault = self._next(is_on_send=True)
        body = bytearray()
        try:
            for chunk in chunks:
                body += chunk
        except BaseException:
            self._cut(bytes(body))
            raise
        self.sent_bytes += len(body)
        letter = self._posted(bytes(body), identity, takes_over=take_over)
        if fault.kind == "cut":
            self._cut(letter.body[: len(letter.body) * fault.number // 100])
            raise HostUnreachable("the connection was reset")
        self._before(fault)
        receipt = self._delivered(letter, wait)
        if fault.kind == "twice":
            receipt = self._delivered(letter, wait)
            assert receipt.duplicate
        self._after(fault)
        with self._lock:
            self.told |= self._books.up_to(receipt.sequence, receipt.epoch)
        return receipt

    def back_off(self, attempt: int, error: DeltasyncError | None = None) -> None:
        """Wait for nothing."""

    def close(self) -> None:
        """Hold nothing."""

    # Faults

    def _next(self, *, is_on_send: bool = False) -> Fault:
        with self._lock:
            self.requests += 1
            plan = self._plans[is_on_send]
            return plan.popleft() if plan else Fault("pass")

    def _asked(self, ask: Callable[[Store], _T]) -> _T:
        fault = self._next()
        self._before(fault)
        with self._serving() as store:
            answer = ask(store)
        self._after(fault)
        return answer

    def _before(self, fault: Fault) -> None:
        """Do what happens before a request arrives."""
        if fault.kind == "killed":
            raise Killed
        if fault.kind == "away":
            self._away = fault.number % 4
        if fault.kind in ("lost", "cut", "away") or self._away > 0:
            self._away -= 1
            raise HostUnreachable("the request was lost")
        if fault.kind == "busy":
            raise HostBusy("another time")
        with acting("nobody"):
            self._happen(fault)

    def _happen(self, fault: Fault) -> None:
        """Let something else happen that a request may meet."""
        world = self._world
        if fault.kind == "server_dies":
            world.host.arm(fault.number)
        elif fault.kind == "edit":
            with self._lock:  # the client asks in one thread and sends in another
                self.has_edited |= self._client.folder.apply(Change("replace", fault.number, fault.number // 7, 6))
        elif fault.kind == "echo" and self._old:
            with contextlib.suppress(DeltasyncError):
                world.deliver(self._old[fault.number % len(self._old)])
        elif fault.kind == "restart":
            with world.host.stopped(dies=fault.number % 2 == 0):
                pass
        elif fault.kind in ("catch_up", "collect", "upkeep"):
            with contextlib.suppress(HostUnreachable), world.host.serving() as store:
                getattr(store, fault.kind)()

    def _after(self, fault: Fault) -> None:
        """Do what happens before an answer arrives."""
        if fault.kind == "unanswered":
            raise HostUnreachable("the answer was lost")
        if fault.kind == "killed_after":
            raise Killed

    @contextmanager
    def _serving(self) -> Iterator[Store]:
        try:
            with self._world.host.serving() as store:
                yield store
        except DeltasyncError as error:  # as the client's transport rebuilds it from the answer
            raise from_problem(error.code, str(error), error.facts) from error

    def _posted(self, body: bytes, identity: bytes, *, takes_over: bool) -> Letter:
        letter = Letter.read(body, takes_over=takes_over)
        assert letter.identity == identity
        is_file = letter.identity in self._client.sealed_files
        twice = letter.carried & self._held
        assert is_file or not twice, f"{letter.key} carries {twice}, which the server said it has"
        with self._lock:
            self._world.letters.append(letter)
        return letter

    def _cut(self, body: bytes) -> None:
        """Let the store have the beginning of a bundle; it must leave nothing behind."""
        with contextlib.suppress(DeltasyncError), self._world.host.serving() as store:
            store.receive(self._world.name, _Broken(body), expected_identity=None)
            raise AssertionError("half a bundle was taken")

    def _delivered(self, letter: Letter, wait: float) -> wire.Receipt:
        try:
            with self._serving() as store:
                receipt = self._world.given(store, letter)
                if wait:
                    state = self._world.wait_for_tree(store, receipt.sequence)
                    receipt = msgspec.structs.replace(receipt, tree_sequence=state.tree_sequence, wanted=state.wanted)
                return receipt
        except ContentMissing as error:
            self._held -= {bytes.fromhex(digest) for digest in error.missing}
            raise


class _Broken:
    """A body that breaks off."""

    def __init__(self, body: bytes) -> None:
        self._body = io.BytesIO(body)

    def read(self, size: int, /) -> bytes:
        chunk = self._body.read(size)
        if not chunk:
            raise HostUnreachable("the client is gone")
        return chunk
