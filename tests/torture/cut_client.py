"""What a client does before a power cut, and what must be so after it: the life that `powercut` records."""

from __future__ import annotations

import io
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import folders

from deltasync.client import outbox, pack, seal
from deltasync.client.ignore import IgnoreRules
from deltasync.client.observation import ScanOptions
from deltasync.client.push import Pusher, PushOptions
from deltasync.client.scan import scan
from deltasync.client.state import State
from deltasync.core import wire
from deltasync.core.bundle import BundleReader
from deltasync.core.errors import DeltasyncError, from_problem
from deltasync.core.manifest import Verb
from deltasync.core.metadata import Metadata
from deltasync.core.names import WorkspaceName
from deltasync_server.config import StoreConfig
from deltasync_server.receive import Store
from torture.cut_store import Fact, believed

NAME = WorkspaceName("media")
PART_BYTES = 20_000
STEPS = {"edit": 4, "online": 4, "offline": 3, "large": 2}


@dataclass
class ClientLife:
    """A client whose state and outbox are on a disk that is recorded, and the server that it sends to, which is not."""

    disk: Path
    beside: Path
    """Where the workspace's files and the server are, on a disk that loses nothing."""
    mark: Callable[[int], None]
    chance: random.Random
    facts: list[Fact] = field(default_factory=list)
    """sent, sealed: an identity, by epoch and number. acknowledged: a sequence. server: the number of its backup."""
    _serial: int = 0
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        shutil.rmtree(self.beside, ignore_errors=True)
        self.media, self.backups = self.beside / "media", self.beside / "backups"
        for each in (self.media, self.backups):
            each.mkdir(parents=True)
        self._edit()

    def note(self, kind: str, name: str, value: object) -> None:
        """Note something that is so from now on."""
        with self._lock:
            self.facts.append(Fact(kind, name, value))
            self.mark(len(self.facts))

    def live(self, steps: int) -> None:
        """Do so many things, one after another."""
        with _server(self.beside / "server") as store, _at_home(self.disk):
            line = Line(store, self._note_received)
            for step in ["online", *self.chance.choices(list(STEPS), list(STEPS.values()), k=steps)]:
                if step in ("edit", "large"):
                    getattr(self, f"_{step}")()
                    continue
                self._edit()
                self._push(line if step == "online" else None)

    def recover(self, mark: Callable[[int], None], acknowledged: int) -> None:
        """Push again after a cut."""
        self.mark, self.facts = mark, self.facts[:acknowledged]
        with _server(self.restored(self.facts)) as store, _at_home(self.disk):
            self._push(Line(store, self._note_received))

    def trouble(self, acknowledged: int) -> str:
        """Open the state that a power cut left and push once; return what is wrong, '' for nothing."""
        return _trouble_after_cut(self, self.facts[:acknowledged])

    def trouble_after_lie(self, acknowledged: int) -> tuple[str, str]:
        """Push from a disk that lost what it said was durable; return what came of that, and what is wrong.

        What the disk lost may be lost, with the numbers of bundles. Nothing that is in the folder is deleted on the
        server, and both are equal after the push, or after the one that the first one's sentence asks for.
        """
        return _trouble_after_lie(self, self.facts[:acknowledged])

    def restored(self, facts: list[Fact]) -> Path:
        """Return where the server is, as it was when the client's power was cut."""
        data = self.beside / "server now"
        shutil.rmtree(data, ignore_errors=True)
        backup = believed(facts, "server").get("")
        if backup is not None:
            shutil.copytree(self.backups / str(backup), data)
        return data

    def close(self) -> None:
        """Hold nothing."""

    def _push(self, line: Line | None) -> None:
        """Push, or seal into a file; what is said at the end is so from then on."""
        with opened(self.media, self.disk) as state:
            pushed(state, line, keeps=self.chance.random() < 0.3)
            for row in outbox.pending(state):
                if row.file:
                    self.note("sealed", f"{row.epoch} {row.sequence}", row.identity.hex())
            self.note("acknowledged", "", outbox.head(state).acknowledged_sequence)

    def _note_received(self, metadata: Metadata, data: Path) -> None:
        with self._lock:
            number = len(list(self.backups.iterdir()))
            shutil.copytree(data, self.backups / str(number), ignore=lambda _, names: [n for n in names if n == "lock"])
            self.facts.append(Fact("sent", _key(metadata), metadata.identity.hex()))
            self.note("server", "", number)

    # --- the folder ---

    def _edit(self) -> None:
        """Change some small files and folders."""
        for _ in range(self.chance.randint(1, 6)):
            self._serial += 1
            path = self.media / self.chance.choice(("", "a", "a/b", "c")) / f"f{self.chance.randrange(12)}"
            content = self.chance.randbytes(self.chance.randint(0, 3_000)) + b"%d" % self._serial
            if path.exists() and self.chance.random() < 0.3:
                path.unlink()
            else:
                folders.write(path.parent, path.name, content)
        if self.chance.random() < 0.2 and (self.media / "a").exists():
            (self.media / "a").rename(self.media / f"moved {self._serial}")

    def _large(self) -> None:
        """Write a file that goes in parts, or change it, so that it goes as a recipe."""
        path, self._serial = self.media / "large", self._serial + 1
        before = path.read_bytes() if path.exists() and self.chance.random() < 0.5 else b""
        path.write_bytes(before + self.chance.randbytes(self.chance.randint(30_000, 70_000)) + b"%d" % self._serial)


def _key(metadata: Metadata) -> str:
    return f"{metadata.manifest.epoch} {metadata.manifest.sequence_number}"


@contextmanager
def _at_home(disk: Path) -> Iterator[None]:
    """Have what belongs to this machine, and the size of parts, be other ones while the block runs."""
    before, most = os.environ.get("DELTASYNC_HOME"), seal.content_max
    os.environ["DELTASYNC_HOME"] = str(disk / "home")
    seal.content_max = lambda limits: PART_BYTES
    try:
        yield
    finally:
        seal.content_max = most
        del os.environ["DELTASYNC_HOME"]
        if before is not None:
            os.environ["DELTASYNC_HOME"] = before


@contextmanager
def _server(data: Path) -> Iterator[Store]:
    with Store(StoreConfig(data, gap_seconds=0.0, scrub_bytes=0, low_disk_bytes=0)) as store:
        store.recover()
        yield store


@contextmanager
def opened(media: Path, disk: Path) -> Iterator[State]:
    """Open the state of the workspace, as the command does."""
    with State.open(media, state_dir=disk / "state") as state:
        yield state


def pushed(state: State, line: Line | None, *, keeps: bool = False) -> None:
    """Observe the folder and push it; without a line, seal into a file."""
    options = ScanOptions(IgnoreRules(state.root), settle_seconds=0.0, allow_emptied=True)
    told = PushOptions(workspace=NAME, allow_mass_delete=True, keep_sent_seconds=86_400.0 if keeps else 0.0, wait=0.0)

    def rescan(names: Any) -> object:
        return scan(state, options, folders=names)

    with Pusher(state, line, told, rescan=rescan) as pusher:
        scan(state, options, recorded=pusher.ahead.send_recorded)
        pusher.run()


class Line:
    """The transport's promises over a store's methods, one bundle after another."""

    url = "http://world.test"
    max_retries = 0
    has_cache = True
    link_bytes_per_second = 0.0

    def __init__(self, store: Store, received: Callable[[Metadata, Path], None]) -> None:
        """received: told of each bundle that the store took, and where the store lies."""
        self.sent_bytes = self.requests = 0
        self._store, self._received = store, received
        self._lock = threading.Lock()

    @contextmanager
    def _asked(self) -> Iterator[Store]:
        self.requests += 1
        try:
            yield self._store
        except DeltasyncError as error:  # as the client's transport rebuilds it from the answer
            raise from_problem(error.code, str(error), error.facts) from error

    def workspace(self, name: str, *, tree_sequence: int | None = None, wait: float = 0.0) -> wire.WorkspaceState:
        """Return the head."""
        with self._asked() as store:
            return store.workspace(NAME)

    def missing(self, name: str, digests: Sequence[str]) -> list[str]:
        """Return what must be sent."""
        with self._asked() as store:
            return store.missing(NAME, list(digests)).missing

    def directory(self, name: str, digest: bytes) -> bytes:
        """Return a directory object."""
        with self._asked() as store:
            return store.directory(NAME, digest)

    def sequences(self, name: str) -> list[wire.KeptSequence]:
        """Return the kept sequences."""
        with self._asked() as store:
            return store.sequences(NAME).sequences

    def recipe(self, name: str, digest: bytes, average_bytes: int) -> bytes:
        """Return the list of a content's chunks."""
        with self._asked() as store:
            return b"".join(store.offer_chunks("", digest, average_bytes))

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
        """Deliver a bundle."""
        with self._lock, self._asked() as store:
            body = b"".join(chunks)
            self.sent_bytes += len(body)
            receipt = store.receive(NAME, io.BytesIO(body), expected_identity=identity, take_over=take_over)
            self._received(bundle_metadata(body), store.config.data)
            return receipt

    def back_off(self, attempt: int, error: DeltasyncError | None = None) -> None:
        """Wait for nothing."""

    def close(self) -> None:
        """Hold nothing."""


def bundle_metadata(body: bytes) -> Metadata:
    """Return what a bundle says of itself."""
    return BundleReader(io.BytesIO(body), wire.Limits()).metadata()


# --- after the cut ---


def _trouble_after_cut(life: ClientLife, facts: list[Fact]) -> str:
    disk, data = life.disk, life.restored(facts)
    identities = {fact.name: str(fact.value) for fact in facts if fact.kind in ("sent", "sealed")}
    reused: list[str] = []

    def received(metadata: Metadata, _: Path) -> None:
        key = _key(metadata)
        if identities.setdefault(key, metadata.identity.hex()) != metadata.identity.hex():
            reused.append(key)

    with _at_home(disk), _server(data) as store, opened(life.media, disk) as state:
        trouble = _forgotten(state, disk, facts)
        if trouble:
            return trouble
        pushed(state, Line(store, received))
        if reused:
            return f"the number {reused[0]} stands for two bundles"
        head, there = outbox.head(state), store.workspace(NAME)
        if there.root != state.observed_root().hex() or head.acknowledged_root.hex() != there.root:
            return "the roots differ after a push"
        store.catch_up()
        if folders.listing(life.media) != folders.listing(Path(there.tree_path)):
            return "the trees differ after a push"
    return ""


def _trouble_after_lie(life: ClientLife, facts: list[Fact]) -> tuple[str, str]:
    deleted: list[str] = []
    old: set[bytes] = set()
    """Bundles that were sealed before the cut: what they delete was not there then."""

    def received(metadata: Metadata, _: Path) -> None:
        gone = [each.path for each in metadata.operations if each.operation is Verb.DELETED]
        deleted.extend(path for path in gone if metadata.identity not in old and os.path.lexists(life.media / path))

    with _at_home(life.disk), _server(life.restored(facts)) as store:
        line, what = Line(store, received), ""
        for _ in range(2):
            try:
                with opened(life.media, life.disk) as state:
                    what = what or ("the state begins anew" if state.notes else "healed")
                    old.update(row.identity for row in outbox.pending(state))
                    pushed(state, line)
                    break
            except DeltasyncError as error:
                what, sentence = f"refused by {type(error).__name__}", str(error)
        else:
            return what, f"the second push is refused as well: {sentence}"
        store.catch_up()
        there = store.workspace(NAME)
        if deleted:
            return what, f"{deleted[0]} is deleted on the server, and it is there"
        if folders.listing(life.media) != folders.listing(Path(there.tree_path)):
            return what, "the trees differ after a push"
    return what, ""


def _forgotten(state: State, disk: Path, facts: list[Fact]) -> str:
    """Return what the state does not know any more of what the client said."""
    head = outbox.head(state)
    if facts and state.notes:
        return f"the state begins anew: {state.notes[0]}"
    if head.acknowledged_sequence < int(str(believed(facts, "acknowledged").get("", 0))):
        return f"{head.acknowledged_sequence} is acknowledged, and more was"
    pending = {f"{row.epoch} {row.sequence}": row for row in outbox.pending(state)}
    for name, identity in believed(facts, "sealed").items():
        row = pending.get(name)
        if row is None and int(name.split()[1]) > head.acknowledged_sequence:
            return f"the bundle {name}, which was sealed, is not pending"
        if row is not None and row.identity.hex() != identity:
            return f"the number {name} stands for two bundles"
    for row in pending.values():
        if row.file and pack.verify(disk / "state" / outbox.FOLDER / row.file).identity != row.identity:
            return f"the file of {row.sequence} is another bundle"
    return ""
