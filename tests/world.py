"""A small world: real clients and a real store in one process, between them a network that fails as networks do.

Everything here wraps the real code. The world keeps books of its own: what each folder holds (`plain_folder`), which
bundles went over the wire, and which of them the store has taken. `World.push` compares the two after every push.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import shutil
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import folders
import msgspec
from plain_folder import Change, PlainFolder

from deltasync.client import outbox, pack
from deltasync.client.ignore import IgnoreRules
from deltasync.client.push import Progress, Pusher, PushOptions, PushReport
from deltasync.client.scan import ScanOptions, scan
from deltasync.client.state import REHASH_DUE, State
from deltasync.core import wire
from deltasync.core.bundle import BundleReader
from deltasync.core.errors import (
    ContentMissing,
    Corrupt,
    DeltasyncError,
    GuardStopped,
    HostBusy,
    HostUnreachable,
    LimitExceeded,
    NotFound,
    NotOwner,
    SequenceConflict,
    SequenceFork,
    SequenceGap,
    StaleEpoch,
    from_problem,
)
from deltasync.core.manifest import EMPTY_ROOT, Entry, Kind, decode_directory
from deltasync.core.metadata import file_name
from deltasync.core.names import WorkspaceName
from deltasync.core.sequence import Head, Header, Verdict, decide
from deltasync.core.tree import walk
from deltasync_server.check import check
from deltasync_server.config import StoreConfig
from deltasync_server.receive import Store

NAME = WorkspaceName("proj")
KEEP_SEQUENCES = 3
TREE_SECONDS = 20.0
_DATABASE = ("state.db", "state.db-wal", "state.db-shm")
_T = TypeVar("_T")


# --- sudden death ---


class Killed(BaseException):
    """The process was killed here; nothing of ours may catch it."""


class Fuse:
    """Kills whatever acts on one side at its n-th change of the file system, and at every later one: no clean-up."""

    def __init__(self, changes: int) -> None:
        """Be ready. changes: how many are still let through."""
        self._left = changes
        self.is_blown = False

    def burn(self) -> None:
        """Count one change."""
        self._left -= 1
        if self._left < 0:
            self.is_blown = True
            raise Killed


class _Here(threading.local):
    side: str | None = None


_here = _Here()
_fuses: dict[str, Fuse] = {}
_CHANGES = frozenset(
    f"os.{name}" for name in ("rename", "link", "remove", "mkdir", "rmdir", "symlink", "chmod", "utime", "truncate")
)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def _on_audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _fuses or not (event in _CHANGES or (event == "open" and arguments[2] & _WRITES)):
        return
    side = _here.side
    if side is None:  # a thread of the client's, or one that the store has started for itself
        side = "store" if threading.current_thread().name.startswith("deltasync") else "client"
    fuse = _fuses.get(side)
    if fuse is not None:
        fuse.burn()


_is_watching = False


def _watch_changes() -> None:
    global _is_watching
    if not _is_watching:  # an audit hook stays until the process ends
        sys.addaudithook(_on_audit)
        _is_watching = True


@contextmanager
def acting(side: str) -> Iterator[None]:
    """Say who acts in this block, in this thread."""
    before, _here.side = _here.side, side
    try:
        yield
    finally:
        _here.side = before


@contextmanager
def armed(side: str, fuse: Fuse | None) -> Iterator[None]:
    """Let a side die by a fuse in this block."""
    if fuse is None:
        yield
        return
    _watch_changes()
    _fuses[side] = fuse
    try:
        yield
    finally:
        _fuses.pop(side, None)


@contextmanager
def as_killed(folder: Path) -> Iterator[None]:
    """Undo what closing a database writes in this block: a killed process leaves its log as it is."""
    before = {name: (folder / name).read_bytes() for name in _DATABASE[:2] if (folder / name).exists()}
    yield
    for name in _DATABASE:
        (folder / name).unlink(missing_ok=True)
    for name, content in before.items():
        (folder / name).write_bytes(content)


def copy_tree(source: Path, target: Path) -> None:
    """Copy a folder as `cp -a` does: times, modes, links, and hard links among the copies."""
    seen: dict[tuple[int, int], str] = {}

    def copy(one: str, other: str) -> str:
        status = os.lstat(one)
        first = seen.setdefault((status.st_dev, status.st_ino), other)
        if first is other:
            shutil.copy2(one, other, follow_symlinks=False)
        else:
            os.link(first, other, follow_symlinks=False)
        return other

    shutil.copytree(source, target, symlinks=True, copy_function=copy)


# --- the server's machine ---


class Host:
    """The machine that the store runs on: it can be stopped, die, and be restored from a backup."""

    def __init__(self, data: Path, *, is_threaded: bool, **settings: Any) -> None:
        """Start a store. is_threaded: with its own background threads; else its trees move when they are asked to."""
        self.data = data
        self.is_threaded = is_threaded
        self.is_down = False
        self._config = StoreConfig(data, keep_sequences=KEEP_SEQUENCES, low_disk_bytes=0, **settings)
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
        _watch_changes()
        _fuses["server"] = Fuse(changes)

    def disarm(self) -> None:
        """Let the server live."""
        _fuses.pop("server", None)

    def check(self, *, repair: bool = False) -> list[str]:
        """Run the real check on the store, which is stopped, and return what it finds."""
        found = check(self._config, repair=repair).findings
        return [f"{each.kind} {each.subject}: {each.problem}" for each in found]

    def close(self) -> None:
        """Stop for good."""
        self.disarm()
        self._store.stop()


# --- the books ---


@dataclass(frozen=True)
class Letter:
    """A bundle as it went over the wire."""

    body: bytes
    identity: bytes
    header: Header
    root: bytes
    carried: frozenset[bytes]
    takes_over: bool

    @classmethod
    def read(cls, body: bytes, *, takes_over: bool) -> Letter:
        """Read a bundle's bytes with the real reader."""
        reader = BundleReader(io.BytesIO(body), wire.Limits())
        metadata = reader.metadata()
        carried = set()
        for operation, views in reader.contents():
            carried.add(bytes.fromhex(operation.digest or ""))
            for _ in views:
                pass
        reader.finish()
        root = bytes.fromhex(metadata.manifest.root)
        return cls(body, metadata.identity, metadata.header, root, frozenset(carried), takes_over)

    @property
    def key(self) -> tuple[str, int]:
        """What a receipt spends."""
        return self.header.epoch, self.header.sequence


@dataclass
class Applied:
    """A bundle that the store has taken; its receipt, once anyone has heard it."""

    letter: Letter
    receipt: wire.Receipt | None
    was_new: bool = False
    """Someone heard the first receipt; a repeat may overtake it."""


class Books:
    """What the store has taken, as it was seen from outside."""

    def __init__(self) -> None:
        """Begin with an empty server."""
        self.line: dict[int, Applied] = {}
        """The history that leads to the head, by sequence."""
        self.spent: dict[tuple[str, int], bytes] = {}
        """Which bundle every receipt ever was for."""
        self.heard: set[bytes] = set()
        """The bundles whose receipts some client knows of."""
        self.forgotten_by_server: set[tuple[str, int]] = set()
        self.forgotten_by_client: set[tuple[str, int]] = set()
        self.lock = threading.Lock()

    def head(self) -> Head:
        """Return the head that the receipts lead to."""
        if not self.line:
            return Head()
        last = self.line[max(self.line)].letter
        epochs = {applied.letter.header.epoch for applied in self.line.values()} - {last.header.epoch}
        return Head(last.header.client_id, last.header.epoch, last.header.sequence, last.root, frozenset(epochs))

    def take(self, letter: Letter, receipt: wire.Receipt | None) -> None:
        """Record that the store has taken a bundle, or gives a receipt again."""
        with self.lock:
            known = self.line.get(letter.header.sequence)
            if known is not None and known.letter.identity == letter.identity:
                self._repeat(known, receipt)
                return
            assert known is None, f"{letter.key} was taken although that number is spent"
            former = self.spent.get(letter.key, letter.identity)
            assert former == letter.identity or self._may_reuse(letter.key, former), f"{letter.key} was reused"
            self.spent[letter.key] = letter.identity
            self.line[letter.header.sequence] = Applied(letter, None)
            self._repeat(self.line[letter.header.sequence], receipt)

    def _may_reuse(self, key: tuple[str, int], former: bytes) -> bool:
        """Tell whether neither side can know any more that a number was spent: both came back from a backup."""
        return key in self.forgotten_by_server and (key in self.forgotten_by_client or former not in self.heard)

    def _repeat(self, known: Applied, receipt: wire.Receipt | None) -> None:
        if receipt is None:
            return
        told = msgspec.structs.replace(receipt, duplicate=False, tree_sequence=None)
        known.receipt = known.receipt or told
        assert told == known.receipt, f"another receipt for {known.letter.key}: {receipt}"
        assert receipt.duplicate or not known.was_new, f"{known.letter.key} was applied twice"
        known.was_new |= not receipt.duplicate

    def hear(self, sequence: int, epoch: str) -> None:
        """Record that a client has heard of everything up to a head."""
        with self.lock:
            applied = self.line.get(sequence)
            if applied is not None and applied.letter.header.epoch == epoch:
                self.heard |= {each.letter.identity for number, each in self.line.items() if number <= sequence}

    def go_back(self, line: dict[int, Applied]) -> None:
        """Record that the server's data was restored from a backup."""
        self.forgotten_by_server |= {each.letter.key for each in self.line.values()}
        self.forgotten_by_server -= {each.letter.key for each in line.values()}
        self.line = dict(line)

    def check(self) -> None:
        """Fail unless the numbers are 1, 2, 3 … and each bundle continues the one before it (spec S-5 to S-8)."""
        root = EMPTY_ROOT
        assert sorted(self.line) == list(range(1, len(self.line) + 1)), f"gap in {sorted(self.line)}"
        for _, applied in sorted(self.line.items()):
            assert applied.letter.header.parent_root == root
            root = applied.letter.root


# --- the network ---


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

    def __init__(self, world: World, client: Client, plan: Iterable[Fault] = ()) -> None:
        """Connect a client for one push."""
        self.sent_bytes = 0
        self.requests = 0
        self.has_edited = False
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
        self._books.hear(state.sequence, state.epoch)
        return state

    def missing(self, name: str, digests: Sequence[str]) -> list[str]:
        """Return what must be sent; what is not must never be sent then."""
        missing = self._asked(lambda store: store.missing(WorkspaceName(name), list(digests))).missing
        self._held |= {bytes.fromhex(digest) for digest in digests}
        self._held -= {bytes.fromhex(digest) for digest in missing}
        return missing

    def directory(self, name: str, digest: bytes) -> bytes:
        """Return a directory object."""
        return self._asked(lambda store: store.directory(WorkspaceName(name), digest))

    def sequences(self, name: str) -> list[wire.KeptSequence]:
        """Return the kept sequences."""
        return self._asked(lambda store: store.sequences(WorkspaceName(name))).sequences

    def send_bundle(
        self, name: str, identity: bytes, chunks: Iterable[bytes], *, take_over: bool = False, wait: float = 0.0
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
        self._books.hear(receipt.sequence, receipt.epoch)
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
            store.receive(NAME, _Broken(body), expected_identity=None)
            raise AssertionError("half a bundle was taken")

    def _delivered(self, letter: Letter, wait: float) -> wire.Receipt:
        try:
            with self._serving() as store:
                receipt = self._world.given(store, letter)
                if wait:
                    state = self._world.wait_for_tree(store, receipt.sequence)
                    receipt = msgspec.structs.replace(receipt, tree_sequence=state.tree_sequence)
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


# --- the clients' machines ---


@dataclass(frozen=True)
class How:
    """How one push goes."""

    plan: tuple[Fault, ...] = ()
    allow: bool = False
    """Allow a mass deletion."""
    take_over: bool = False
    waits: bool = True
    keeps: bool = False
    """Keep sent bundles as files."""
    seals_offline: bool = False
    kill_at: int | None = None
    """Die at this change of the file system."""
    kill_on_progress: int | None = None
    """Die when progress is told for so many times."""

    @property
    def is_quiet(self) -> bool:
        """Nothing may fail."""
        is_alive = self.kill_at is None and self.kill_on_progress is None
        return is_alive and all(fault.kind in SILENT for fault in self.plan)

    def options(self) -> PushOptions:
        """Return what the push is told."""
        return PushOptions(
            allow_mass_delete=self.allow,
            take_over=self.take_over,
            seal_offline=self.seals_offline,
            keep_sent_seconds=7 * 86_400.0 if self.keeps else 0.0,
            wait=TREE_SECONDS if self.waits else 0.0,
        )


class Known(NamedTuple):
    """What a client's state says before a push."""

    acknowledged: tuple[int, bytes]
    pending: list[tuple[str, int, bytes]]
    has_observed: bool
    has_taken_back: bool
    """The server's head is a bundle that was discarded."""


def _await_couriers() -> None:
    """Wait until the bytes that a killed client has sent are where they go."""
    for thread in threading.enumerate():
        if thread.name == "courier":
            thread.join()


class Client:
    """One machine with a folder and the client's state."""

    def __init__(self, home: Path, contents: dict[bytes, bytes]) -> None:
        """Make an empty folder."""
        self.home = home
        self.folder = PlainFolder(home / NAME, contents)
        self.sealed_files: set[bytes] = set()
        """The bundles that were sealed into files: what the server has by now is of no concern to them."""
        self._backup: Path | None = None

    @property
    def root(self) -> Path:
        """The workspace."""
        return self.folder.root

    @property
    def state_folder(self) -> Path:
        """Where the state lies."""
        return self.root / ".deltasync"

    @property
    def client_id(self) -> str:
        """The id of this machine; '' before it was first used."""
        path = self.home / "client-id"
        return path.read_text() if path.exists() else ""

    @contextmanager
    def at_home(self) -> Iterator[None]:
        """Be the user of this machine in this block."""
        before = {name: os.environ.pop(name, None) for name in ("DELTASYNC_HOME", "DELTASYNC_CLIENT_ID_FILE")}
        os.environ["DELTASYNC_HOME"] = str(self.home)
        try:
            yield
        finally:
            del os.environ["DELTASYNC_HOME"]
            os.environ.update({name: value for name, value in before.items() if value is not None})

    def push(self, network: Network | None, how: How) -> PushReport:
        """Observe the folder and push it as the command does; without a network, seal into files."""
        fuse = None if how.kill_at is None else Fuse(how.kill_at)
        with self.at_home(), acting("client"):
            with armed("client", fuse):
                state = State.open(self.root)
            try:
                with armed("client", fuse):
                    return self._run(state, network, how)
            except Killed:
                _await_couriers()
                with as_killed(state.folder):
                    state.db.close()
                assert state._lock is not None
                state._lock.close()
                state._lock = None
                raise
            finally:
                if state._lock is not None:
                    self._note_files(state)
                    state.close()

    def _run(self, state: State, network: Network | None, how: How) -> PushReport:
        options = ScanOptions(IgnoreRules(self.root), settle_seconds=0.0, allow_emptied=how.allow)
        scan(state, options)
        if state.get_meta(REHASH_DUE):  # every inode had changed, and the user does as the note says
            scan(state, dataclasses.replace(options, rehash=True))
        self._note_files(state)

        def rescan(folders: Any) -> object:
            return scan(state, options, folders=folders)

        told = iter(range(how.kill_on_progress or 0))

        def progress(_: Progress) -> None:
            if how.kill_on_progress is not None and next(told, None) is None:
                raise Killed

        report = Pusher(state, network, how.options(), progress=progress, rescan=rescan).run()
        assert report.root == state.sealed_root().hex()
        return report

    def _note_files(self, state: State) -> None:
        self.sealed_files |= {row.identity for row in outbox.pending(state) if row.file}

    @contextmanager
    def _peeked(self) -> Iterator[State | None]:
        """Look into the state without holding it; None when it is not there yet, or was killed while it was made."""
        with self.at_home(), contextlib.ExitStack() as stack:
            try:
                state = stack.enter_context(State.open(self.root, read_only=True))
                yield state if state.db.execute("SELECT 1 FROM head").fetchone() else None
            except (NotFound, Corrupt):
                yield None

    def known(self, head: Head) -> Known | None:
        """Look into the state; None when there is none."""
        with self._peeked() as state:
            if state is None:
                return None
            here = outbox.head(state)
            return Known(
                (here.acknowledged_sequence, here.acknowledged_root),
                [(each.epoch, each.sequence, each.root) for each in outbox.pending(state)],
                state.observed_root() != EMPTY_ROOT,
                outbox.was_discarded(state, head.epoch, head.sequence, head.root),
            )

    def sealed_head(self) -> tuple[str, int] | None:
        """Return epoch and number of the bundle that was sealed last."""
        with self._peeked() as state:
            here = outbox.head(state) if state else None
        return (here.epoch, here.sealed_sequence) if here else None

    def check_outbox(self) -> None:
        """Fail unless every bundle file verifies."""
        with self._peeked() as state:
            rows = outbox.pending(state) if state else []
        for row in rows:
            if row.file:
                metadata = pack.verify(self.state_folder / outbox.FOLDER / row.file)
                assert metadata.identity == row.identity and row.file == file_name(metadata)

    # Backups

    def back_up(self) -> None:
        """Keep a copy of the state."""
        if self.state_folder.exists():
            self._backup = self.home / "backup"
            shutil.rmtree(self._backup, ignore_errors=True)
            copy_tree(self.state_folder, self._backup)

    def restore(self, *, is_whole: bool) -> bool:
        """Bring the state back from its copy: the database alone, or everything beside it too."""
        if self._backup is None:
            return False
        if is_whole:
            shutil.rmtree(self.state_folder, ignore_errors=True)
            copy_tree(self._backup, self.state_folder)
            return True
        self.state_folder.mkdir(exist_ok=True)
        for name in _DATABASE:
            (self.state_folder / name).unlink(missing_ok=True)
            if (self._backup / name).exists() and not name.endswith("-shm"):
                shutil.copy2(self._backup / name, self.state_folder / name)
        return True

    def lose_state(self) -> None:
        """Remove the state."""
        shutil.rmtree(self.state_folder, ignore_errors=True)


# --- the world ---


@dataclass
class Backup:
    """A copy of the server's data, and the history that it holds."""

    path: Path
    line: dict[int, Applied]
    rotten: set[bytes]


class World:
    """Two clients, one server, the network between them, and the books."""

    def __init__(self, base: Path, *, is_threaded: bool = False, is_tiny: bool = False, link: str = "auto") -> None:
        """Begin with empty folders and an empty server. is_tiny: the server takes only small bundles."""
        self.base = base
        limits = wire.Limits(bundle_content_bytes=64, bundle_operations=10) if is_tiny else wire.Limits()
        quiet = {"quiet_seconds": 0.0} if is_threaded else {}
        self.host = Host(base / "data", is_threaded=is_threaded, link=link, limits=limits, **quiet)
        self.contents: dict[bytes, bytes] = {}
        self.clients = [Client(base / name, self.contents) for name in ("ada", "bob")]
        self.letters: list[Letter] = []
        self.books = Books()
        self.rotten: set[bytes] = set()
        """Content that the server's disk has lost."""
        self.has_rotted = False
        self._trees: dict[bytes, dict[str, Entry]] = {EMPTY_ROOT: {}}
        self._backup: Backup | None = None

    def close(self) -> None:
        """End the world."""
        self.host.close()

    # Requests

    def given(self, store: Store, letter: Letter) -> wire.Receipt:
        """Give the store a bundle and keep the books."""
        receipt = store.receive(
            NAME, io.BytesIO(letter.body), expected_identity=letter.identity, take_over=letter.takes_over
        )
        assert (receipt.epoch, receipt.sequence) == letter.key
        assert (receipt.identity, receipt.root) == (letter.identity.hex(), letter.root.hex())
        self.books.take(letter, receipt)
        if not receipt.duplicate:
            self._check_carried(store, letter)
        return receipt

    def _check_carried(self, store: Store, letter: Letter) -> None:
        """Fail when a bundle brought what the tree before it has."""
        parent = self.tree(store, letter.header.parent_root)
        twice = letter.carried & {entry.digest for entry in parent.values()} - self.rotten
        self.rotten -= letter.carried
        assert not twice, f"{letter.key} carries {[digest.hex() for digest in twice]}, which its parent tree has"

    def deliver(self, letter: Letter) -> wire.Receipt:
        """Deliver a bundle that was sent before."""
        with self.host.serving() as store:
            return self.given(store, letter)

    def deliver_late(self, letter: Letter) -> None:
        """Deliver a bundle that was sent before; the answer must be what the table says (spec S-2 to S-8)."""
        self.host.revive()
        self.settle()
        known = self.books.line.get(letter.header.sequence)
        recorded = known.letter.identity if known and known.letter.key == letter.key else None
        verdict = decide(self.books.head(), recorded, letter.header, take_over=letter.takes_over)
        try:
            receipt = self.deliver(letter)
        except ContentMissing:
            assert verdict is Verdict.APPLY
        except LimitExceeded:
            assert letter.identity in {identity for client in self.clients for identity in client.sealed_files}
        except SequenceConflict as error:
            kinds = {
                Verdict.GAP: SequenceGap,
                Verdict.FORK: SequenceFork,
                Verdict.STALE_EPOCH: StaleEpoch,
                Verdict.NOT_OWNER: NotOwner,
            }
            assert type(error) is kinds.get(verdict), f"{error!r} where the verdict is {verdict}"
        else:
            assert verdict is (Verdict.DUPLICATE if receipt.duplicate else Verdict.APPLY)
        self.settle()

    def wait_for_tree(self, store: Store, sequence: int) -> wire.WorkspaceState:
        """Wait until the plain tree holds a sequence."""
        if not self.host.is_threaded:
            store.catch_up()
            return store.workspace(NAME)
        return store.wait_for_tree(NAME, sequence, TREE_SECONDS)

    def tree(self, store: Store, root: bytes) -> dict[str, Entry]:
        """Return a tree that the store holds, by path."""
        if root not in self._trees:
            self._trees[root] = dict(walk(root, lambda digest: decode_directory(store.directory(NAME, digest))))
        return self._trees[root]

    # Pushing

    def push(self, client: Client, how: How) -> str:
        """Push, and fail unless everything that can be said of the outcome holds; returns what came of it."""
        if how.is_quiet:
            self.host.revive()
        self.settle()
        expected = self._expected(client, how)
        network = Network(self, client, how.plan)
        try:
            report = client.push(network, how)
        except Killed:
            outcome = "killed"
        except (HostUnreachable, HostBusy):
            assert not how.is_quiet
            outcome = "unreachable"
        except NotOwner:
            assert not how.take_over and (not how.is_quiet or expected.is_foreign)
            outcome = "not owner"
        except GuardStopped:
            assert expected.may_stop, "a guard stopped what deletes nothing"
            outcome = "stopped"
        except (SequenceConflict, ContentMissing):
            assert any(fault.kind in ("echo", "restart", "server_dies", "collect") for fault in how.plan)
            assert not how.is_quiet
            outcome = "conflict"
        else:
            self.host.disarm()
            assert not (how.is_quiet and (expected.must_stop or expected.is_foreign))
            outcome = "done" if report.unreachable is None else "sealed"
            if outcome == "done":
                self._check_done(client, network, report, how)
        finally:
            self.host.disarm()
        self.settle()
        return outcome

    def push_again(self, client: Client) -> None:
        """Push what was just pushed, and fail if anything is sealed or sent."""
        known = client.known(self.books.head())
        network = Network(self, client)
        report = client.push(network, How())
        assert (network.sent_bytes, report.sent_bytes, report.bundles, report.content_bytes) == (0, 0, 0, 0)
        assert client.known(self.books.head()) == known
        self.settle()

    def seal(self, client: Client, how: How) -> str:
        """Push without a server: seal into files, and fail unless they lead to the folder's tree."""
        try:
            report = client.push(None, how)
        except Killed:
            return "killed"
        except GuardStopped:
            assert not how.allow
            return "stopped"
        if not how.plan:
            assert report.root == client.folder.root_digest().hex() and not report.problems and not report.waiting
        client.check_outbox()
        return "sealed"

    def _expected(self, client: Client, how: How) -> Expected:
        """Work out what must come of a push when nothing fails."""
        head = self.books.head()
        known = client.known(head)
        is_foreign = head.client_id not in ("", client.client_id) and not how.take_over
        if how.allow or self.host.is_down:
            return Expected(is_foreign, may_stop=not how.allow, must_stop=False)
        with self.host.serving() as store:
            there = self.tree(store, head.root)
        here = client.folder.flat()
        gone = [path for path, entry in there.items() if path not in here or here[path].kind is not entry.kind]
        fresh = {entry.digest for path, entry in here.items() if path not in there}
        lost = [path for path in gone if path not in here and _is_lost(there[path], fresh)]
        acknowledged = known.acknowledged if known else (0, EMPTY_ROOT)
        is_known = (head.sequence, head.root) == acknowledged or head.root == acknowledged[1]
        is_known |= known is not None and (bool(known.pending) or known.has_taken_back)
        is_emptied = not here and known is not None and known.has_observed
        must_stop = is_emptied or (bool(lost) and not is_known)
        may_stop = must_stop or bool(gone) or not here or not how.is_quiet or bool(known and known.pending)
        return Expected(is_foreign, may_stop=may_stop, must_stop=must_stop)

    def _check_done(self, client: Client, network: Network, report: PushReport, how: How) -> None:
        """Fail unless both sides hold the same tree, and that one is the folder's."""
        self.settle()
        head = self.books.head()
        assert report.pending == 0 and report.waiting is None and not report.unreachable
        if any(fault.kind in ("echo", "restart", "server_dies") for fault in how.plan):
            self.host.revive()
        assert (head.root.hex(), head.sequence) == (report.root, report.sequence)
        if network.has_edited:
            return
        assert not report.problems, report.problems
        assert head.root == client.folder.root_digest(), "the head is not the folder's tree"
        if not self.host.is_down:
            self.check_tree(client)

    def check_tree(self, client: Client) -> None:
        """Fail unless the plain tree on the server is a client's folder, byte by byte, and all its content is there."""
        with self.host.serving() as store:
            state = self.wait_for_tree(store, self.books.head().sequence)
            assert state.tree_sequence == state.sequence
            found, wanted = folders.listing(Path(state.tree_path)), client.folder.listing()
            assert found == wanted, _difference(found, wanted)
            assert state.wanted == []
            assert state.files == len(client.folder.paths(Kind.FILE))
            digests = {entry.digest.hex() for entry in client.folder.flat().values() if entry.kind is Kind.FILE}
            assert store.missing(NAME, sorted(digests)).missing == []

    def settle(self) -> None:
        """Fail unless the store's head is the one in the books; hear of what it took while it died (spec S-8)."""
        if self.host.is_down:
            return
        with self.host.serving() as store:
            kept = store.sequences(NAME).sequences
            for each in kept:
                if each.sequence > self.books.head().sequence:
                    letter = next(one for one in self.letters if one.identity.hex() == each.identity)
                    self.books.take(letter, None)
            state, head = store.workspace(NAME), self.books.head()
            assert (state.sequence, state.epoch, state.root) == (head.sequence, head.epoch, head.root.hex())
            assert state.client_id == head.client_id
            last = [self.books.line[number].letter.identity.hex() for number in sorted(self.books.line)]
            assert [each.identity for each in kept] == last[-len(kept) :]
        self.books.check()

    # The server's life

    def back_up_server(self) -> None:
        """Copy the server's data while it runs."""
        self.host.revive()
        self.settle()
        path = self.base / "data.backup"
        shutil.rmtree(path, ignore_errors=True)
        with self.host.stopped() as is_stopped:
            assert is_stopped
            copy_tree(self.host.data, path)
        self._backup = Backup(path, dict(self.books.line), set(self.rotten))

    def restore_server(self) -> bool:
        """Bring the server's data back from the copy."""
        if self._backup is None:
            return False
        self.host.revive()
        self.settle()
        with self.host.stopped() as is_stopped:
            assert is_stopped
            shutil.rmtree(self.host.data)
            copy_tree(self._backup.path, self.host.data)
        self.books.go_back(self._backup.line)
        self.rotten = set(self._backup.rotten)
        self.settle()
        return True

    def restore_client(self, client: Client, *, is_whole: bool) -> bool:
        """Bring a client's state back from its copy."""
        if not client.restore(is_whole=is_whole):
            return False
        sealed = client.sealed_head()
        if sealed is not None:
            epoch, sequence = sealed
            spent = self.books.spent
            self.books.forgotten_by_client |= {key for key in spent if key[0] == epoch and key[1] > sequence}
        return True

    def restart(self, *, dies: bool) -> None:
        """Stop the server, or let it die, and start it again."""
        with self.host.stopped(dies=dies):
            pass
        self.settle()

    def work(self, what: str, *, dies_at: int | None) -> None:
        """Let the server do some of its background work now; it may die of that, at a change of the file system."""
        self.host.revive()
        if dies_at is not None:
            self.host.arm(dies_at)
        with contextlib.suppress(HostUnreachable), self.host.serving() as store:
            getattr(store, what)()
        self.host.disarm()
        self.host.revive()
        self.settle()
        with self.host.serving() as store:
            self._check_kept(store)

    def rot(self, number: int) -> None:
        """Damage a blob; a check that repairs takes it out of use, or gives it again from the journal."""
        self.host.revive()
        paths = sorted(path for path in self.host.data.glob("cache/*/*") if path.stat().st_size)
        if not paths:
            return
        path = paths[number % len(paths)]
        with self.host.stopped() as is_stopped:
            assert is_stopped
            path.chmod(0o644)
            path.write_bytes(bytes(path.stat().st_size))
            assert any(path.name in each for each in self.host.check())
            self.host.check(repair=True)
        with self.host.serving() as store:
            if store.missing(NAME, [path.name]).missing:
                self.rotten.add(bytes.fromhex(path.name))
        self.has_rotted = True
        self.settle()

    def _kept(self, store: Store) -> tuple[set[bytes], set[bytes]]:
        """Return the digests of the content and of the directory objects that the kept sequences need."""
        roots = {bytes.fromhex(each.root) for each in store.sequences(NAME).sequences}
        entries = [entry for root in roots for entry in self.tree(store, root).values()]
        blobs = {entry.digest for entry in entries if entry.kind is Kind.FILE}
        objects = roots | {entry.digest for entry in entries if entry.kind is Kind.DIRECTORY}
        return blobs, objects - {EMPTY_ROOT}

    def _check_kept(self, store: Store) -> None:
        blobs, objects = self._kept(store)
        for digest in objects:
            assert store.directory(NAME, digest)
        for digest in blobs - self.rotten:
            stream, size = store.open_blob(digest)
            with stream:
                content = stream.read()
            assert content == self.contents[digest] and len(content) == size

    def tidy(self) -> None:
        """Bring the store to rest, collect, and fail unless exactly what is needed is left and nothing is wrong."""
        self.host.revive()
        self.settle()
        with self.host.serving() as store:
            self.wait_for_tree(store, self.books.head().sequence)
            store.upkeep()
        with self.host.stopped() as is_stopped:  # leases end with the process
            assert is_stopped
        with self.host.serving() as store:
            store.catch_up()
            store.upkeep()
            store.collect()
            self._check_kept(store)
            blobs, objects = self._kept(store)
            with store.state.read() as db:
                assert {digest for (digest,) in db.execute("SELECT digest FROM objects")} == objects
        data = self.host.data
        assert {path.name for path in data.glob("cache/*/*")} == {digest.hex() for digest in blobs - self.rotten}
        waste = ("journal", "staging") if self.has_rotted else ("journal", "staging", "quarantine")
        left = [str(path) for folder in waste for path in (data / folder).iterdir()]
        left += map(str, data.glob("workspaces/*/aside/*"))
        assert not left, f"waste is left: {left}"
        with self.host.stopped() as is_stopped:
            assert is_stopped
            found = self.host.check()
        assert not [each for each in found if not any(digest.hex() in each for digest in self.rotten)], found


@dataclass(frozen=True)
class Expected:
    """What must come of a push when nothing fails on the way."""

    is_foreign: bool
    """The workspace belongs to another client."""
    may_stop: bool
    must_stop: bool


def _is_lost(entry: Entry, fresh: set[bytes]) -> bool:
    """Tell whether an entry that is gone cannot have moved."""
    return entry.kind is Kind.SYMLINK or (entry.kind is Kind.FILE and entry.digest not in fresh)


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    paths = sorted(path for path in found.keys() | wanted.keys() if found.get(path) != wanted.get(path))
    return f"{len(paths)} paths differ: {[(path, found.get(path), wanted.get(path)) for path in paths[:4]]}"[:3000]
