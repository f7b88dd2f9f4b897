"""What a store does before a power cut, and what must be there after it: the life that `powercut` records."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from sender import DAY, Sender, meant, seen
from trees import Flat, directory, symlink

from deltasync.core import bundle, delta, recipe, wire
from deltasync.core.bundle import BundleReader
from deltasync.core.errors import DeltasyncError, Unauthorized
from deltasync.core.hashing import digest_of
from deltasync.core.manifest import Kind, Operation
from deltasync.core.names import WorkspaceName
from deltasync.core.part import Part
from deltasync_server import intake, tls
from deltasync_server.access import Access, Scope
from deltasync_server.check import check
from deltasync_server.config import StoreConfig
from deltasync_server.receive import Store
from deltasync_server.tenants import DEFAULT

KEEP = 2
LARGE_BYTES = 16_000
PIECE_BYTES = 9_000
LIVES = {
    "journal": {"small": 6, "checkpoint": 2, "touch": 1, "trees": 2, "collect": 1, "long": 1},
    "direct": {"large": 6, "small": 1, "mixed": 1, "trees": 1, "long": 2, "checkpoint": 1},
    "parts": {"parts": 5, "small": 1, "long": 1, "trees": 1},
    "uploads": {"upload": 4, "plain": 3, "large": 1, "long": 1, "trees": 1, "checkpoint": 1},
    "deletion": {
        "small": 3,
        "large": 2,
        "delete": 4,
        "collect": 4,
        "again": 3,
        "checkpoint": 2,
        "trees": 2,
        "rename": 2,
    },
    "copies": {"small": 5, "trees": 4, "checkpoint": 4, "touch": 2, "rename": 1, "delete": 1},
    "tokens": {"token": 5, "revoke": 3, "tls": 1, "small": 1},
    "busy": {
        "small": 4,
        "large": 2,
        "collect": 2,
        "delete": 2,
        "checkpoint": 2,
        "trees": 2,
        **dict.fromkeys(
            ("mixed", "upload", "plain", "parts", "again", "rename", "touch", "restart", "token", "long"), 1
        ),
    },
}
"""What each life consists of, and how often: a step's name and its weight."""


@dataclass(frozen=True)
class Fact:
    """Something that a store said, from then on."""

    kind: str
    """head, stream, file, token, ca."""
    name: str
    value: object
    """A sequence; how long a stream is; whether a token is good; a fingerprint. None: it is about to change."""


@dataclass
class StoreLife:
    """A store on a disk that is recorded, its senders, and everything that it acknowledged."""

    data: Path
    mark: Callable[[int], None]
    chance: random.Random
    kind: str
    facts: list[Fact] = field(default_factory=list)
    """The mark with number n says that the first n of them hold."""
    senders: dict[str, Sender] = field(default_factory=dict)
    history: dict[str, list[Sender]] = field(default_factory=dict)
    """What each sender was after each sequence that it sent, or was about to send."""
    streams: dict[str, bytes] = field(default_factory=dict)
    """The content of each stream, by its id."""
    _dead: list[bytes] = field(default_factory=list)
    """Contents that were deleted."""
    _serial: int = 0

    def __post_init__(self) -> None:
        for number, name in enumerate(("one", "two")):
            self.senders[name] = Sender(client_id=str(number + 1) * 32, name=WorkspaceName(name))
            self.history[name] = [replace(self.senders[name])]
        sync_bytes = self.chance.choice((1, 1, 1, 1 << 20))
        self.config = StoreConfig(
            self.data,
            link="copy" if self.kind == "copies" else "auto",
            keep_sequences=KEEP,
            keep_bundles=self.kind in ("journal", "parts", "busy") and self.chance.random() < 0.25,
            gap_seconds=0.0,
            quiet_seconds=0.0,
            scrub_bytes=0,
            upload_sync_bytes=sync_bytes,
        )

    def live(self, steps: int) -> None:
        """Do so many things, one after another; in some lives beside the store's own threads."""
        weights, before = LIVES[self.kind], intake.LARGE_BYTES
        intake.LARGE_BYTES = LARGE_BYTES
        has_threads = self.chance.random() < 0.4
        try:
            while steps > 0:
                with self._opened(has_threads=has_threads) as store, Access(self.data) as access:
                    self._store, self._access = store, access
                    if self.chance.random() < 0.6:
                        self._long()
                    while steps > 0:
                        steps -= 1
                        (step,) = self.chance.choices(list(weights), list(weights.values()))
                        if step == "restart":
                            break
                        getattr(self, f"_{step}")()
        finally:
            intake.LARGE_BYTES = before

    @contextlib.contextmanager
    def _opened(self, *, has_threads: bool) -> Iterator[Store]:
        with Store(self.config) as store:
            store.recover()
            if has_threads:
                store.start()
            yield store

    def _note(self, kind: str, name: str, value: object) -> None:
        self.facts.append(Fact(kind, name, value))
        self.mark(len(self.facts))

    def recover(self, mark: Callable[[int], None], acknowledged: int) -> None:
        """Start again after a cut."""
        self.mark, self.facts = mark, self.facts[:acknowledged]
        if (self.data / "state.db").exists():
            with self._opened(has_threads=False) as store:
                store.catch_up()
                store.upkeep()

    def trouble(self, acknowledged: int) -> str:
        """Open the store that a power cut left, and return what is wrong with it, '' for nothing."""
        return _trouble_after_cut(self, self.facts[:acknowledged])

    def trouble_after_lie(self, acknowledged: int) -> tuple[str, str]:
        """Open the store of a disk that lost what it said was durable; return what came of that, and what is wrong.

        What the disk lost may be lost, but then it is said, or asked for and sent again: nothing wrong is served.
        """
        try:
            found = check(self.config, repair=True).findings
            if any(not each.is_repaired and each.kind != "content" for each in found):
                return "found", ""
            with self._opened(has_threads=False) as store:
                lacks = any(store.workspace(WorkspaceName(name)).wanted for name in self.senders)
                troubles = [_unhealed(self, store, name) for name in self.senders]
                return "healed" if lacks else "nothing is lacking", "; ".join(filter(None, troubles))
        except DeltasyncError as error:
            return f"refused by {type(error).__name__}", ""

    def close(self) -> None:
        """Hold nothing."""

    # --- what is sent ---

    def _sender(self) -> Sender:
        return self.senders[self.chance.choice(("one", "one", "two"))]

    def _content(self, least: int, most: int) -> bytes:
        self._serial += 1
        return self.chance.randbytes(self.chance.randint(least, most)) + b"%d" % self._serial

    def _send(self, sender: Sender, flat: Flat, give: Callable[[bundle.Metadata, bytes], object] | None = None) -> None:
        metadata, sealed = sender.seal(flat)
        self._sent(sender, flat, metadata, sealed, give)

    def _sent(
        self,
        sender: Sender,
        flat: Flat,
        metadata: bundle.Metadata,
        sealed: bytes,
        give: Callable[[bundle.Metadata, bytes], object] | None = None,
    ) -> None:
        """Send a bundle, and note what it led to once there is a receipt."""
        sender.move_on(flat)
        self.history[sender.name].append(replace(sender))
        (give or self._give)(metadata, sealed)
        self._note("head", sender.name, sender.sequence)

    def _give(self, metadata: bundle.Metadata, sealed: bytes) -> None:
        name = WorkspaceName(metadata.manifest.collection_name)
        self._store.receive(name, io.BytesIO(sealed), expected_identity=metadata.identity)

    def _file(self, sender: Sender, flat: Flat, content: bytes) -> None:
        folder = self.chance.choice(("", "a", "a/b", "c"))
        for number, character in enumerate(f"{folder}/" if folder else ""):
            if character == "/":
                flat[folder[:number]] = directory(folder[:number])
        path = f"{folder}/f{self.chance.randrange(20)}".strip("/")
        executable, mtime_ns = self.chance.random() < 0.2, DAY + self.chance.randrange(1000) * 10**9
        flat[path] = sender.file(path, content, mtime_ns=mtime_ns, executable=executable)

    def _small(self) -> None:
        sender = self._sender()
        flat = dict(sender.flat)
        for _ in range(self.chance.randint(1, 6)):
            self._file(sender, flat, self._content(0, 3_000))
        if self.chance.random() < 0.2:
            flat["link"] = symlink("link", f"a/f{self.chance.randrange(9)}")
        self._send(sender, flat)

    def _large(self) -> None:
        sender = self._sender()
        flat = dict(sender.flat)
        for _ in range(self.chance.randint(1, 2)):
            self._file(sender, flat, self._content(LARGE_BYTES, 60_000))
        self._send(sender, flat)

    def _mixed(self) -> None:
        """Send a change of a large file as a recipe, beside small ones that come whole."""
        sender = self._sender()
        old = [(path, each) for path, each in sender.flat.items() if each.kind is Kind.FILE and each.size > 1_000]
        if not old:
            return self._large()
        path, entry = self.chance.choice(sorted(old, key=lambda each: each[0]))
        before, new = sender.contents[entry.digest], self._content(10, 200)
        flat = dict(sender.flat)
        for _ in range(self.chance.randint(0, 2)):
            self._file(sender, flat, self._content(0, 2_000))
        flat[path] = sender.file(path, new + before, mtime_ns=DAY)
        root, segments = sender.objects.build(flat), [recipe.Segment(0, 0, len(new)), recipe.Segment(1, 0, len(before))]
        made = {flat[path].digest.hex(): recipe.compose((entry.digest,), segments)}
        metadata = sender.compose(_difference(sender, root), root, "recipes")
        contents = {digest.hex(): content for digest, content in sender.contents.items()} | {
            flat[path].digest.hex(): new
        }
        sealed = b"".join(
            bundle.seal(
                metadata,
                list(bundle.content_operations(metadata)),
                lambda operation: (contents[operation.digest or ""],),
                recipes=made,
            )
        )
        return self._sent(sender, flat, metadata, sealed)

    def _delete(self) -> None:
        sender = self._sender()
        flat = dict(sender.flat)
        files = sorted(path for path, each in flat.items() if each.kind is Kind.FILE)
        for path in self.chance.sample(files, min(len(files), self.chance.randint(1, 8))):
            self._dead.append(sender.contents[flat.pop(path).digest])
        self._send(sender, flat)

    def _again(self) -> None:
        """Send content that was deleted."""
        sender = self._sender()
        flat = dict(sender.flat)
        for content in self.chance.sample(self._dead, min(len(self._dead), 3)):
            self._file(sender, flat, content)
        self._send(sender, flat)

    def _touch(self) -> None:
        """Give files another time or executable bit; the content stays."""
        sender = self._sender()
        flat = dict(sender.flat)
        files = sorted(path for path, each in flat.items() if each.kind is Kind.FILE)
        for path in self.chance.sample(files, min(len(files), 3)):
            mtime_ns = DAY + self.chance.randrange(10**6) * 10**9
            flat[path] = sender.file(path, sender.contents[flat[path].digest], mtime_ns=mtime_ns)
        self._send(sender, flat)

    def _rename(self) -> None:
        """Give a folder another name."""
        sender = self._sender()
        here, there = self.chance.choice((("a", "moved"), ("moved", "a"), ("c", "a/c"), ("a/b", "b")))
        if (
            here not in sender.flat
            or there in sender.flat
            or ("/" in there and there.partition("/")[0] not in sender.flat)
        ):
            return
        flat: Flat = {}
        for path, entry in sender.flat.items():
            new = there + path[len(here) :] if path == here or path.startswith(here + "/") else path
            flat[new] = msgspec.structs.replace(entry, name=new.rpartition("/")[2])
        self._send(sender, flat)

    def _parts(self) -> None:
        """Send a content in parts, and then the bundle that names it; some streams never end."""
        sender = self._sender()
        content, stream = self._content(30_000, 90_000), digest_of(self.chance.randbytes(8))
        self.streams[stream.hex()] = content
        at = 0
        while at < len(content):
            size = min(len(content) - at, self.chance.randint(9_000, 40_000))
            metadata = sender.compose([], sender.root, "parts")
            sealed = b"".join(bundle.seal_part(metadata, Part(stream, at, size), _part_reader(content, at + size)))
            self._sent(sender, sender.flat, metadata, sealed)
            at += size
            self._note("stream", stream.hex(), at)
        if self.chance.random() < 0.3:
            return
        flat = dict(sender.flat)
        self._file(sender, flat, content)
        root = sender.objects.build(flat)
        metadata = sender.compose(_difference(sender, root), root, "recipes", "parts")
        whole = {digest_of(content).hex(): recipe.compose((stream,), [recipe.Segment(1, 0, len(content))])}
        sealed = b"".join(bundle.seal(metadata, list(whole), lambda _: (), recipes=whole))
        self._note("stream", stream.hex(), None)
        self._sent(sender, flat, metadata, sealed)

    def _upload(self) -> None:
        """Send a bundle in pieces."""
        sender = self._sender()
        flat = dict(sender.flat)
        for _ in range(self.chance.randint(1, 5)):
            self._file(sender, flat, self._content(2_000, 12_000))
        self._send(sender, flat, self._give_in_pieces)

    def _give_in_pieces(self, metadata: bundle.Metadata, sealed: bytes) -> None:
        name = WorkspaceName(metadata.manifest.collection_name)
        request = wire.UploadRequest(
            kind="bundle",
            workspace=name,
            identity=metadata.identity.hex(),
            chunk_size=PIECE_BYTES,
            file_size=len(sealed),
        )
        self._pieces(request, sealed, name)

    def _given_file(self) -> bytes:
        content = self._content(1, 40_000)
        request = wire.UploadRequest(
            filepath=f"/x{self._serial}",
            hostname="h",
            blake3=digest_of(content).hex(),
            chunk_size=PIECE_BYTES,
            file_size=len(content),
        )
        self._pieces(request, content, None)
        return content

    def _plain(self) -> None:
        self._note("file", digest_of(self._given_file()).hex(), True)

    def _pieces(self, request: wire.UploadRequest, body: bytes, name: WorkspaceName | None) -> None:
        upload = self._store.uploads.initiate(DEFAULT, request, name).upload_id
        starts = list(enumerate(range(0, len(body), PIECE_BYTES)))
        self.chance.shuffle(starts)
        for number, at in starts:
            self._store.uploads.put(DEFAULT, upload, number, io.BytesIO(body[at : at + PIECE_BYTES]))
        self._store.complete_upload(DEFAULT, upload, wire.UploadComplete())

    # --- what a store does by itself ---

    def _checkpoint(self) -> None:
        self._store.upkeep()

    def _trees(self) -> None:
        self._store.catch_up()

    def _collect(self) -> None:
        self._store.collect()

    def _long(self) -> None:
        """Be a database that was in use for long: it writes over its log, whose file does not grow any more.

        The file system has nothing to commit then, and takes no rename along with a transaction.
        """
        connections = [self._store.state._writer, self._access._connection]
        for table, connection in zip(("audit", "pairings"), connections, strict=True):
            row = "(at, workspace, event, detail) VALUES ('', '', '', ?)"
            if table == "pairings":
                row = "(secret, tenant, scopes, label, expires_at, tries) VALUES (NULL, '', '', ?, 0, 0)"
            with self._store.state.hold():
                connection.execute("BEGIN IMMEDIATE")
                connection.executemany(f"INSERT INTO {table} {row}", [("x" * 3_000,)] * 200)
                connection.execute(f"DELETE FROM {table}")
                connection.execute("COMMIT")
                connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()

    # --- who may send ---

    def _token(self) -> None:
        _, text = self._access.create(DEFAULT, {Scope.PUSH}, "cut", None)
        self._note("token", text, True)

    def _tls(self) -> None:
        """Make the server's CA, or use it."""
        self._note("ca", "", tls.own(self.data, [], datetime.now(UTC)).ca_sha256)

    def _revoke(self) -> None:
        good = sorted(name for name, value in believed(self.facts, "token").items() if value)
        if good:
            text = self.chance.choice(good)
            self._note("token", text, None)
            self._access.revoke(text.split("_")[1])
            self._note("token", text, False)


def _difference(sender: Sender, root: bytes) -> list[Operation]:
    return delta.diff(sender.root, root, sender.objects.load)


def _part_reader(content: bytes, end: int) -> Callable[[Part], Iterator[bytes]]:
    def read(part: Part) -> Iterator[bytes]:
        yield content[part.offset : end]
        return digest_of(content[:end])

    return read


def believed(facts: list[Fact], kind: str) -> dict[str, object]:
    """Return what is so by the last word on each thing of a kind."""
    return {fact.name: fact.value for fact in facts if fact.kind == kind}


# --- after the cut ---


def _trouble_after_cut(life: StoreLife, facts: list[Fact]) -> str:
    data, config, chance = life.data, life.config, life.chance
    if not (data / "state.db").exists():
        return "there is no store" if facts else ""
    try:
        found = check(config, repair=True).findings
        wrong = [f"{each.kind} {each.subject}: {each.problem}" for each in found if each.kind != "stray"]
        if wrong:
            return "; ".join(wrong[:3])
        again = check(config).findings if chance.random() < 0.2 else []
        if again:
            return f"the second check finds {again[0]}"
        with contextlib.closing(sqlite3.connect(f"file:{data}/state.db?mode=ro", uri=True)) as db:
            heads = dict(db.execute("SELECT name, sequence FROM workspaces"))
            troubles = [
                *(_head_trouble(life, data, db, name, heads.get(name, 0), facts) for name in life.senders),
                _stream_trouble(life, data, db, facts, heads),
                _piece_trouble(data, db),
                _file_trouble(data, db, facts),
                _kept_trouble(data, db) if config.keep_bundles else "",
            ]
        ca = believed(facts, "ca").get("")
        if ca is not None and tls.own(data, [], datetime.now(UTC)).ca_sha256 != ca:
            return "the CA that clients know is another one"
        troubles.append(_token_trouble(data, facts))
        if chance.random() < 0.3:
            troubles.append(_onward_trouble(life, config, heads))
    except DeltasyncError as error:
        return f"{type(error).__name__}: {error}"
    return "; ".join(filter(None, troubles))


def _unhealed(life: StoreLife, store: Store, name: str) -> str:
    state, past = store.workspace(WorkspaceName(name)), life.history[name]
    if state.sequence >= len(past) or state.root != past[state.sequence].root.hex():
        return f"{name} has a root at {state.sequence} that it never had"
    last = past[state.sequence]
    sender = replace(last, flat=dict(last.flat))
    if state.wanted:
        sender.heal(store, map(bytes.fromhex, state.wanted))
    store.upkeep()
    store.catch_up()
    if store.workspace(WorkspaceName(name)).wanted or (state.sequence and seen(_tree(life, name)) != meant(sender)):
        return f"{name} is not healed at {state.sequence}"
    return ""


def _tree(life: StoreLife, name: str) -> Path:
    return life.data / "workspaces" / name / "tree"


def _head_trouble(
    life: StoreLife, data: Path, db: sqlite3.Connection, name: str, sequence: int, facts: list[Fact]
) -> str:
    """The head is what was acknowledged or came after it, and is there as a whole; so is what is kept before it."""
    least, past = int(str(believed(facts, "head").get(name, 0))), life.history[name]
    if not least <= sequence < len(past):
        return f"{name} is at {sequence}, and {least} was acknowledged"
    if not sequence:
        return ""
    (root,) = db.execute("SELECT root FROM workspaces WHERE name = ?", (name,)).fetchone()
    if root != past[sequence].root:
        return f"{name} has another root at {sequence}"
    if seen(data / "workspaces" / name / "tree") != meant(past[sequence]):
        return f"the tree of {name} is not that of {sequence}"
    known = {digest for (digest,) in db.execute("SELECT digest FROM blobs")}
    for before in range(max(1, sequence - KEEP + 1), sequence + 1):
        files = (each for each in past[before].flat.values() if each.kind is Kind.FILE)
        if any(each.digest not in known for each in files):
            return f"{name} lacks content of the kept sequence {before}"
    return ""


def _stream_trouble(
    life: StoreLife, data: Path, db: sqlite3.Connection, facts: list[Fact], heads: dict[str, int]
) -> str:
    """What a row counts of a stream is there; so is every part that was acknowledged (spec ST-91)."""
    rows = {stream.hex(): size for stream, size in db.execute("SELECT id, size FROM streams")}
    for stream, size in rows.items():
        if (data / "parts" / stream).read_bytes()[:size] != life.streams[stream][:size]:
            return f"the stream {stream[:8]} has other bytes than its row counts"
    for stream, size in believed(facts, "stream").items():
        if size is not None and rows.get(stream, 0) < int(str(size)):
            return f"{rows.get(stream)} of {size} acknowledged bytes of the stream {stream[:8]} are there"
    return ""


def _piece_trouble(data: Path, db: sqlite3.Connection) -> str:
    """A piece that a row names is in the file (spec ST-82)."""
    select = (
        "SELECT uploads.id, request, number, size, etag FROM uploads JOIN upload_pieces ON upload = uploads.id "
        "WHERE answer IS NULL"
    )
    for upload, request, number, size, etag in db.execute(select):
        with (data / "uploads" / upload).open("rb") as file:
            body = os.pread(file.fileno(), size, number * json.loads(request)["chunk_size"])
        if digest_of(body) != etag:
            return f"the piece {number} of the upload {upload} is not there"
    return ""


def _file_trouble(data: Path, db: sqlite3.Connection, facts: list[Fact]) -> str:
    known = {digest.hex() for (digest,) in db.execute("SELECT digest FROM files WHERE deleted_at IS NULL")}
    for name in believed(facts, "file"):
        path = data / "cache" / name[:2] / name
        if name not in known or not path.exists() or digest_of(path.read_bytes()).hex() != name:
            return f"the file {name[:8]} is lost"
    return ""


def _kept_trouble(data: Path, db: sqlite3.Connection) -> str:
    """Bundles that are kept are in the journal, or whole among those (spec ST-42)."""
    for name, file, identity in db.execute("SELECT workspace, file_name, identity FROM receipts WHERE journal IS NULL"):
        path = data / "bundles" / name / file
        if not path.exists():
            return f"the bundle {file} of {name} was not kept"
        with path.open("rb") as source:
            reader = BundleReader(source, wire.Limits())
            if reader.metadata().identity != identity:
                return f"{path.name} is another bundle"
            reader.finish()
    return ""


def _token_trouble(data: Path, facts: list[Fact]) -> str:
    with Access(data) as access:
        for text, is_good in believed(facts, "token").items():
            try:
                access.caller(text)
                found = True
            except Unauthorized:
                found = False
            if is_good not in (None, found):
                return f"a token is {'good' if found else 'forgotten'} that was {'made' if is_good else 'revoked'}"
    return ""


def _onward_trouble(life: StoreLife, config: StoreConfig, heads: dict[str, int]) -> str:
    """The store goes on: what was cut off is sent again, and another bundle after it."""
    with Store(config) as store:
        store.recover()
        for name, past in life.history.items():
            last = past[heads.get(name, 0)]
            sender = replace(last, flat=dict(last.flat), contents=dict(last.contents))
            flat = dict(sender.flat)
            flat["after"] = sender.file("after", b"after the cut")
            sender.send(store, flat)
            store.upkeep()
            store.catch_up()
            if seen(config.data / "workspaces" / name / "tree") != meant(sender):
                return f"the tree of {name} is wrong after another bundle"
    return ""
