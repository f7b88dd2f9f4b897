"""Kill a real process at its n-th change of the file system, or have that fail, for n = 1, 2, 3 … until none is left.

Run with the shim preloaded: `LD_PRELOAD=shim.so python sweep.py SCENARIO FOLDER --stride 7 --first 1 --moment before`.
Each point forks this process, whose modules are loaded already; the child arms the shim and runs the real command line.
After that an unarmed child repeats the command, and the scenario's promises are checked. `--again SEED` kills the
repeated command too, somewhere. A moment such as ENOSPC or EIO-sticky has the call fail, once or from there on: the
command must end by itself, with one of its exit codes and without a traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import importlib
import io
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

sys.path.insert(0, str(Path(__file__).parents[1]))

import folders
import msgspec
from corpus import FOLDER as BUNDLES
from corpus_good import File, noise, part_chain, recipe_chain
from finished import RETURNS, Finished

from deltasync.client import seal
from deltasync.client import state as client_state
from deltasync.core.errors import DeltasyncError
from deltasync.core.hashing import digest_of
from deltasync.core.jobs import Input, Output, Returned
from deltasync.core.manifest import Kind
from deltasync.core.names import WorkspaceName
from deltasync.core.tree import walk
from deltasync.db import connect
from deltasync.disk import refusal, staged
from deltasync_server import access, intake
from deltasync_server import state as server_state
from deltasync_server.config import StoreConfig
from deltasync_server.jobs import returns
from deltasync_server.receive import Store
from deltasync_server.state import loader, pinned
from deltasync_server.tenants import DEFAULT

if TYPE_CHECKING:
    from deltasync.core.wire import UploadRequest

MOMENTS = {"before": 0, "after": 1, "middle": 2}
CREATES, WRITES, NAMES, REMOVALS, ATTRIBUTES, SYNCS, OPENS, READS = (1 << number for number in range(8))
_TAKES_SPACE = CREATES | WRITES | NAMES | SYNCS
FAILURES = {
    "ENOSPC": (errno.ENOSPC, _TAKES_SPACE),
    "EDQUOT": (errno.EDQUOT, _TAKES_SPACE),
    "EIO": (errno.EIO, _TAKES_SPACE | REMOVALS | ATTRIBUTES),
    "EIO-read": (errno.EIO, READS),
    "EMFILE": (errno.EMFILE, OPENS),
    "EROFS": (errno.EROFS, _TAKES_SPACE | REMOVALS | ATTRIBUTES),
    "short": (0, WRITES),
}
"""What a call can fail with, and which calls; `short` is a write that takes half."""
ALL_MOMENTS = (*MOMENTS, *FAILURES, *(f"{name}-sticky" for name in FAILURES))
KNOWN_CODES = (*range(9), 130)
SHIM = ctypes.CDLL(None)
LIMIT_SECONDS = 120
PIECE = 8_000
LARGE = bytes(range(256)) * 40_000


def arm(point: int, moment: str) -> None:
    """Let this process die at its point-th change of the file system from now on, or let that fail."""
    global _armed
    _armed = point, moment
    if moment in MOMENTS:
        SHIM.shim_arm(ctypes.c_long(point), MOMENTS[moment])
        return
    number, kinds = FAILURES[moment.removesuffix("-sticky")]
    SHIM.shim_fail(ctypes.c_long(point), number, moment.endswith("-sticky"), kinds)


_counted = 0
_armed: tuple[int, str] = (-1, "before")
"""What `arm` was called with last; a process that was never harmed is armed with a point that never comes."""


def pause() -> tuple[int, str]:
    """Let nothing fail for a while; returns what `arm` takes to go on."""
    SHIM.shim_arm(ctypes.c_long(-1), 0)
    return _armed


def disarm() -> int:
    """Let nothing fail any more; returns how many calls were counted before it was first said."""
    global _counted
    _counted = _counted or int(SHIM.shim_count())
    SHIM.shim_arm(ctypes.c_long(-1), 0)
    return _counted


def forked(work: Callable[[], int], log: Path) -> int:
    """Run work in a child process and return its wait status as subprocess does (negative: killed by that signal)."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            with log.open("ab", buffering=0) as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
            code = work()
        except BaseException:  # noqa: BLE001  (a child must never return into the sweep)
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    timer = threading.Timer(LIMIT_SECONDS, os.kill, (child, signal.SIGTERM))
    timer.start()
    try:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        timer.cancel()


def command(main: Callable[[], None], *words: object) -> int:
    """Run a console script's main in this process and return its exit code."""
    sys.argv = ["deltasync", *map(str, words)]
    try:
        main()
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else int(bool(leave.code))
    return 0


def client(*words: object) -> int:
    """Run `deltasync`."""
    from deltasync.cli.main import main

    return command(main, *words)


def server(*words: object) -> int:
    """Run `deltasync-server`."""
    from deltasync_server.cli.main import main

    return command(main, *words)


class Scenario:
    """A command to kill, how to prepare for it, and what must hold after it was run again."""

    allowed: tuple[int, ...] = (0,)

    def __init__(self, folder: Path, shared: Path) -> None:
        self.folder, self.shared = folder, shared
        self.url = (shared / "url").read_text() if (shared / "url").exists() else ""
        self.log = folder / "log.txt"

    def prepare(self) -> None:
        """Bring about the state before the command."""

    def act(self) -> int:
        """Run the command that is killed."""
        raise NotImplementedError

    def verify_harmed(self) -> None:
        """Check the promises that hold already when the command was harmed."""

    def verify(self) -> None:
        """Check the promises after the command was repeated unharmed."""

    def run(self, work: Callable[[], int]) -> None:
        """Run an unarmed step that must succeed."""
        code = forked(work, self.log)
        assert code in self.allowed, f"exit {code}: {self.log.read_text()[-2000:]}"


class ClientPush(Scenario):
    """A client pushes a change to a live server and is killed; the second push brings both sides together."""

    def prepare(self) -> None:
        self.media = self.folder / "media"
        self.media.mkdir()
        folders.life(self.media)
        self.run(self.push)
        before = {*folders.listing(self.media)}
        folders.later(self.media)
        self.kept = before & {*folders.listing(self.media)}

    def push(self) -> int:
        return client("push", self.media, "--to", self.url, "--workspace", self.folder.name, "--json")

    act = push

    @property
    def tree(self) -> Path:
        """The plain folder on the server."""
        return self.shared / "data/workspaces" / self.folder.name / "tree"

    def verify_harmed(self) -> None:
        gone = self.kept - {*folders.listing(self.tree)}
        assert not gone, f"deleted although still there: {sorted(gone)[:5]}"

    def verify(self) -> None:
        folders.assert_same(self.media, self.tree)
        status = self.folder / "status.json"
        self.log.unlink()
        self.run(lambda: client("status", self.media, "--json"))
        state = json.loads(self.log.read_text())
        status.write_text(json.dumps(state))
        assert state["in_sync"], state
        assert state["local"]["root"] == state["server"]["root"] and state["server"]["url"].rstrip("/") == self.url
        assert state["local"]["sequence"] == state["server"]["sequence"]
        assert not list(self.media.rglob("*.tmp"))


class ClientPushLarge(ClientPush):
    """The change is one of a large file, which goes as a recipe."""

    def prepare(self) -> None:
        self.media = self.folder / "media"
        large = folders.write(self.media, "large.bin", bytes(range(256)) * 20 + noise("large", 4_500_000))
        self.run(self.push)
        folders.write(self.media, "large.bin", b"new header" + large.read_bytes() + b"more")
        self.kept = {"large.bin"}


class ClientPushParts(ClientPush):
    """The change is a large file, which goes in parts; nothing of a stream stays on the server."""

    def prepare(self) -> None:
        self.media = self.folder / "media"
        folders.write(self.media, "small.txt", b"small")
        self.run(self.push)
        folders.write(self.media, "large.bin", noise(self.folder.name, 250_000))
        self.kept = {"small.txt"}

    def push(self) -> int:
        seal.content_max = lambda limits: 50_000
        return super().push()

    act = push

    def verify(self) -> None:
        super().verify()
        assert not list((self.shared / "data/parts").iterdir())


class ClientSeal(Scenario):
    """A client without a server seals bundle files and is killed; what it sealed replays into an empty server."""

    def prepare(self) -> None:
        self.media = self.folder / "media"
        self.media.mkdir()
        folders.life(self.media)
        self.run(self.push)
        folders.later(self.media)

    def push(self) -> int:
        return client("push", self.media, "--json")

    act = push

    def verify(self) -> None:
        data = self.folder / "data"
        outbox = self.media / ".deltasync/outbox"
        self.run(lambda: server("replay", outbox, "--data", data, "--workspace", "media", "--json"))
        folders.assert_same(self.media, data / "workspaces/media/tree")
        assert not list(outbox.glob("*.tmp")) and not list(outbox.glob(".*"))


class ClientFetch(Scenario):
    """A fetch over an older tree is killed; no file is half written under its name, and the second one completes it."""

    def prepare(self) -> None:
        self.dest = self.folder / "dest"
        self.dest.mkdir()
        folders.life(self.dest)
        folders.write(self.dest, "extra/file", "goes")
        self.whole = {*self.contents(self.dest), *self.contents(self.shared / "expected")}

    @staticmethod
    def contents(root: Path) -> set[object]:
        """Return the content of every file, and the target of every link."""
        return {seen[-1] for seen in folders.listing(root).values() if seen[0] != "directory"}

    def act(self) -> int:
        armed = pause()
        broken = self.contents(self.dest) - self.whole
        assert not broken, f"{len(broken)} files are half written"
        arm(*armed)
        words = ("fetch", "--from", self.url, "--workspace", "expected", self.dest, "--delete", "-j", "2", "--json")
        return client(*words)

    def verify(self) -> None:
        folders.assert_same(self.shared / "expected", self.dest)
        assert not (self.dest / ".deltasync").exists()


def refused(error: DeltasyncError | OSError) -> int:
    """Return the exit code of an error as the commands end with it; raises what they would show a traceback of."""
    told = error if isinstance(error, DeltasyncError) else refusal(error)
    if told is None:
        raise error
    print(told.sentence)
    return told.exit_code


class ClientHome(Scenario):
    """A homecoming is killed; no file is half written under its name, and the second one completes it."""

    sent: ClassVar[dict[str, bytes]] = {"p/in place.txt": b"as sent", "p/also here.txt": b"another"}

    @classmethod
    def make(cls, shared: Path) -> None:
        """Have a store return a few files, a large one, a folder, and files that were in place."""
        job = Finished(shared / "data/sessions/ds_1_00000001", outputs=[Output(place="p/folder", is_folder=True)])
        with Store(StoreConfig(shared / "data")) as store:
            store.recover()
            job.out("p/a.txt", b"first")
            job.out("p/large.bin", LARGE)
            job.leave("p/folder/deep/x", b"inside")
            for place, content in cls.sent.items():
                job.leave(place, content + b", and edited there", top="inputs")
                job.inputs.append(Input(workspace="w", sequence=1, place=place, in_place=True))
            (shared / "returned").write_bytes(msgspec.json.encode(job.collect(store)))
            job.record(store)

    def prepare(self) -> None:
        self.dest = self.folder / "dest"
        folders.write(self.dest, "p/a.txt", "an older one")
        folders.write(self.dest, "p/mine.txt", "mine")
        folders.write(self.dest, "p/in place.txt", self.sent["p/in place.txt"])
        folders.write(self.dest, "p/also here.txt", "edited here")
        self.returned = msgspec.json.decode((self.shared / "returned").read_bytes(), type=Returned)

    def act(self) -> int:
        from deltasync.client.homecoming import bring_home
        from deltasync.client.transport import HttpTransport

        way = HttpTransport(self.url, timeout=20, max_retries=0)
        targets = {place: self.dest / place for place in self.returned.places}
        sent = {place: digest_of(content) for place, content in self.sent.items()}
        try:
            bring_home(way, self.returned, targets, Quiet(), in_place=sent, job_id="ds_1_00000001")
        except (DeltasyncError, OSError) as error:
            return refused(error)
        finally:
            way.close()
        return 0

    def verify_harmed(self) -> None:
        there = {path: seen[3] for path, seen in folders.listing(self.dest / "p").items() if seen[0] == "file"}
        left = {path: content for path, content in there.items() if not path.startswith(".deltasync")}
        assert left["a.txt"] in (b"an older one", b"first") and left["mine.txt"] == b"mine"
        assert left["in place.txt"] in (b"as sent", b"as sent, and edited there")
        assert left["also here.txt"] == b"edited here"
        assert left.get("large.bin", LARGE) == LARGE

    def verify(self) -> None:
        self.verify_harmed()
        found = {path: seen[-1] for path, seen in folders.listing(self.dest / "p").items()}
        assert (found["a.txt"], found["large.bin"], found["folder/deep/x"]) == (b"first", LARGE, b"inside")
        assert found["in place.txt"] == b"as sent, and edited there"
        assert found["also here.txt.from-ds_1_00000001"] == b"another, and edited there"
        assert not (self.dest / "p/.deltasync").exists()


class ServerReturn(Scenario):
    """What a job left is collected and the server killed; collected again it is whole, and nothing else is held."""

    def prepare(self) -> None:
        self.data = self.folder / "data"
        self.recorded = self.folder / "returned"
        self.job = Finished(self.data / "sessions/ds_1_00000001", outputs=[Output(place="out", is_folder=True)])
        self.made = {f"out/{number % 3}/{number}": b"%d" % number for number in range(20)}
        for place, content in self.made.items():
            self.job.leave(place, content)
        os.link(self.job.root / "outputs/out/0/0", self.job.root / "outputs/out/second name")
        self.made["out/second name"] = b"0"

    def act(self) -> int:
        try:
            with Store(StoreConfig(self.data)) as store:
                store.recover()
                is_recorded = self.recorded.exists()
                if is_recorded:
                    self.job.returned = msgspec.json.decode(self.recorded.read_bytes(), type=Returned)
                returns.release_others(store, [(DEFAULT, self.job.returned)] if self.job.returned else [])
                if not is_recorded:
                    with staged(self.recorded) as out:
                        out.write(msgspec.json.encode(self.job.collect(store)))
                store.collect()
        except (DeltasyncError, OSError) as error:
            return refused(error)
        return 0

    def verify(self) -> None:
        returned = msgspec.json.decode(self.recorded.read_bytes(), type=Returned)
        assert returned.places == ["out"] and not returned.problems, returned
        with Store(StoreConfig(self.data)) as store, store.state.read() as db:
            found = dict(walk(bytes.fromhex(returned.root), loader(db)))
            blobs = {path: store.cache.open(each.digest) for path, each in found.items() if each.kind is Kind.FILE}
            assert {path: os.read(blob, 100) for path, blob in blobs.items()} == self.made
            assert pinned(db, RETURNS) == {returned.sequence}
            for blob in blobs.values():
                os.close(blob)
        self.run(lambda: server("check", "--data", self.data, "--json"))
        assert not list((self.data / "staging").iterdir())


class Quiet:
    """Hears how far a fetch is."""

    def read(self, files: int, size_bytes: int) -> None: ...
    def all_is_read(self) -> None: ...
    def fetched(self, size_bytes: int, total_bytes: int) -> None: ...


class ServerReplay(Scenario):
    """A server applies the reference chain and is killed; the second replay ends at the chain's root."""

    def prepare(self) -> None:
        self.data = self.folder / "data"

    def act(self) -> int:
        return server("replay", self.shared / "chain", "--data", self.data, "--workspace", "life", "--json")

    def verify(self) -> None:
        tree = self.data / "workspaces/life/tree"
        folders.assert_same(self.shared / "expected", tree)
        self.run(lambda: server("check", "--data", self.data, "--json"))
        leftovers = [*(self.data / "staging").iterdir(), *(self.data / "journal").iterdir()]
        assert not leftovers, leftovers


class ServerReplayDirect(ServerReplay):
    """A server does the same with content that is made durable by itself instead of through the journal."""

    def act(self) -> int:
        intake.LARGE_BYTES = 1
        return super().act()


class ServerReplayRecipes(ServerReplay):
    """A server applies bundles with recipes."""

    def act(self) -> int:
        return server("replay", BUNDLES / "recipes", "--data", self.data, "--workspace", "life", "--json")


class ServerReplayParts(ServerReplay):
    """A server applies bundles with parts."""

    def act(self) -> int:
        return server("replay", BUNDLES / "parts", "--data", self.data, "--workspace", "life", "--json")

    def verify(self) -> None:
        super().verify()
        assert not list((self.data / "parts").iterdir())


class ServerUpload(Scenario):
    """A bundle and a file come in pieces to a store that is killed; their sender asks what is there and goes on."""

    def prepare(self) -> None:
        self.data = self.folder / "data"

    def act(self) -> int:
        from serving import Writer

        from deltasync.core import wire
        from deltasync_server.config import StoreConfig

        made, name, plain = Writer("life").large(40_000), WorkspaceName("life"), self._plain()
        bundle = wire.UploadRequest(
            kind="bundle", workspace=name, identity=made.identity, chunk_size=PIECE, file_size=len(made.sealed)
        )
        file = wire.UploadRequest(
            filepath="/x", hostname="h", blake3=digest_of(plain).hex(), chunk_size=PIECE, file_size=len(plain)
        )
        with Store(StoreConfig(self.data, upload_sync_bytes=1, quiet_seconds=0.0)) as store:
            store.recover()
            if not store.workspace(name).sequence:
                self._send(store, bundle, made.sealed, name)
            if not store.figures()["blobs"] > 1:
                self._send(store, file, plain, None)
            store.catch_up()
            store.upkeep()
        return 0

    def _plain(self) -> bytes:

        return noise("plain", 20_000)

    def _send(self, store: Store, request: UploadRequest, content: bytes, name: WorkspaceName | None) -> None:
        """Go on with an upload, or begin one, and complete it."""
        from deltasync.core import wire

        state = store.uploads.initiate(DEFAULT, msgspec.structs.replace(request, resume=True), name)
        there = {number for first, last in state.present for number in range(first, last + 1)}
        for number, at in enumerate(range(0, len(content), PIECE)):
            if number not in there:
                store.uploads.put(DEFAULT, state.upload_id, number, io.BytesIO(content[at : at + PIECE]))
        store.complete_upload(DEFAULT, state.upload_id, wire.UploadComplete())

    def verify(self) -> None:

        tree, digest = self.data / "workspaces/life/tree", digest_of(self._plain()).hex()
        assert (tree / "large.bin").read_bytes() == noise("life", 40_000)
        assert (self.data / "cache" / digest[:2] / digest).read_bytes() == self._plain()
        self.run(lambda: server("check", "--data", self.data, "--json"))
        self.run(lambda: server("collect", "--data", self.data, "--json"))
        assert (self.data / "cache" / digest[:2] / digest).exists()
        assert not list((self.data / "staging").iterdir())


class ServerLive(Scenario):
    """A store takes bundles, brings its tree forward, makes it durable and collects.

    What fails meanwhile is refused as a route would answer it; when calls no longer fail the same store goes on.
    """

    def prepare(self) -> None:
        self.data = self.folder / "data"

    def act(self) -> int:
        from sender import Sender, assert_tree

        from deltasync_server.config import StoreConfig

        config = StoreConfig(self.data, keep_sequences=1, low_disk_bytes=0, low_disk_inodes=0)
        sender = Sender(name=WorkspaceName("life"))
        trees = [
            sender.tree(a=noise("a", 30_000), sub__b=noise("b", 20_000), c=b"c"),
            sender.tree(moved=noise("a", 30_000), sub__b=noise("B", 20_000), d=b"d"),
            sender.tree(moved=noise("a", 30_000), large=noise("large", 1_100_000)),
        ]
        armed = pause()
        with Store(config) as store:
            store.recover()
            arm(*armed)
            for is_harmed in (True, False):
                for tree in trees[sender.sequence :]:
                    for step in (lambda now=tree: sender.send(store, now), store.catch_up, store.upkeep, store.collect):
                        is_good = attempted(step) if is_harmed else bool(step() or True)
                        if not is_good:
                            break
                    if not is_good:
                        break
                disarm()
            assert_tree(store, sender)
            assert sender.sequence == len(trees)
        return 0

    def verify(self) -> None:
        self.run(lambda: server("check", "--data", self.data, "--json"))
        assert not list((self.data / "staging").iterdir())


def attempted(step: Callable[[], object]) -> bool:
    """Take a step that may fail as a route or a worker's loop lets it; anything else is raised."""
    from deltasync_server.http.problems import known

    try:
        step()
    except OSError:
        return False
    except Exception as error:
        if known(error) is None:
            raise
        return False
    return True


class ServerCollect(ServerReplay):
    """Collection is killed; nothing that a head needs is gone."""

    def prepare(self) -> None:
        self.data = self.folder / "data"
        shutil.copytree(self.shared / "full", self.data, symlinks=True, copy_function=_copy_links(self.shared / "full"))

    def act(self) -> int:
        return server("collect", "--data", self.data, "--json")


class ServerAdopt(ServerCollect):
    """An adoption is killed; the second one ends with every content in the cache, and nothing else there."""

    words: tuple[str, ...] = ()

    def prepare(self) -> None:
        super().prepare()
        self.media = self.folder / "media"
        self.media.mkdir()
        folders.life(self.media)
        folders.write(self.media, "new/large", bytes(range(256)) * 10_000)
        folders.write(self.media, "new/small", "small\n")

    def act(self) -> int:
        return server("adopt", self.media, "--data", self.data, *self.words, "--json")

    def verify(self) -> None:
        super().verify()
        found = [path for path in self.media.rglob("*") if path.is_file() and not path.is_symlink()]
        blobs = {path.name for path in (self.data / "cache").rglob("*") if path.is_file()}
        assert {digest_of(path.read_bytes()).hex() for path in found} <= blobs


class ServerAdoptTrust(ServerAdopt):
    """The same with hard links; the originals have their bytes whenever it is killed."""

    words = ("--trust",)

    def verify(self) -> None:
        super().verify()
        assert (self.media / "new/small").read_text() == "small\n"
        assert (self.media / "new/small").stat().st_nlink == 2


def _copy_links(root: Path) -> Callable[[str, str], str]:
    """Return a copy function that keeps hard links among the copies, as `cp -a` does."""
    seen: dict[tuple[int, int], str] = {}

    def copy(source: str, target: str) -> str:
        status = os.lstat(source)
        first = seen.setdefault((status.st_dev, status.st_ino), target)
        if first is target:
            shutil.copy2(source, target, follow_symlinks=False)
        else:
            os.link(first, target)
        return target

    return copy


class Migrations(Scenario):
    """Databases of every older schema are migrated; each is the old one or the new one whole, and then the new one."""

    schemas: ClassVar[dict[str, Sequence[str]]] = {
        "server": server_state.MIGRATIONS,
        "access": access._MIGRATIONS,
        "client": client_state.MIGRATIONS,
    }

    @classmethod
    def make(cls, shared: Path) -> None:
        """Make databases with rows in each of their tables, and what they must hold afterwards.

        One of every older schema, or of three of them where a sample of the points is visited.
        """
        every = [(name, version) for name, schema in cls.schemas.items() for version in range(len(schema))]
        for name, version in every if os.environ.get("CRASH_STRIDE") else random.SystemRandom().sample(every, 3):
            path, migrations = shared / f"{name}-{version}.db", cls.schemas[name]
            with contextlib.closing(connect(path, migrations[:version])) as db:
                fill(db)
                (shared / f"{path.name}.old").write_text(contents(db))
            shutil.copy(path, shared / "migrated")
            with contextlib.closing(connect(shared / "migrated", migrations)) as db:
                (shared / f"{path.name}.new").write_text(contents(db))
            (shared / "migrated").unlink()

    def prepare(self) -> None:
        self.paths = {path: path.name.split("-")[0] for path in sorted(self.shared.glob("*.db"))}
        self.paths = {self.folder / path.name: name for path, name in self.paths.items()}
        for path in self.paths:
            shutil.copy(self.shared / path.name, path)

    def act(self) -> int:
        for path, name in self.paths.items():
            connect(path, self.schemas[name]).close()
        return 0

    def seen(self, path: Path) -> str:
        """Return what a database holds, looked at without a change."""
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as db:
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            return contents(db)

    def verify_harmed(self) -> None:
        for path in self.paths:
            meant = [(self.shared / f"{path.name}.{age}").read_text() for age in ("old", "new")]
            assert self.seen(path) in meant, f"{path.name} is neither the old nor the new one"

    def verify(self) -> None:
        for path in self.paths:
            assert self.seen(path) == (self.shared / f"{path.name}.new").read_text(), path.name


def fill(db: sqlite3.Connection) -> None:
    """Put rows into every table of a database."""
    for (table,) in db.execute(
        "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%' ORDER BY name"
    ).fetchall():
        kinds = [column[2] for column in db.execute(f"PRAGMA table_info({table})")]
        for number in range(1, 40):
            values = {"INTEGER": number, "TEXT": f"text {number}", "BLOB": bytes([number]) * 32, "REAL": number / 2}
            insert = f"INSERT OR IGNORE INTO {table} VALUES ({', '.join('?' * len(kinds))})"
            db.execute(insert, [values[kind] for kind in kinds])


def contents(db: sqlite3.Connection) -> str:
    """Return a database as text: its version, its schema, its rows."""
    return "\n".join([str(db.execute("PRAGMA user_version").fetchone()), *db.iterdump()])


SCENARIOS: dict[str, type[Scenario]] = {
    "migrations": Migrations,
    "client-push": ClientPush,
    "client-push-large": ClientPushLarge,
    "client-push-parts": ClientPushParts,
    "client-seal": ClientSeal,
    "client-fetch": ClientFetch,
    "client-home": ClientHome,
    "server-return": ServerReturn,
    "server-replay": ServerReplay,
    "server-replay-direct": ServerReplayDirect,
    "server-replay-recipes": ServerReplayRecipes,
    "server-replay-parts": ServerReplayParts,
    "server-upload": ServerUpload,
    "server-live": ServerLive,
    "server-collect": ServerCollect,
    "server-adopt": ServerAdopt,
    "server-adopt-trust": ServerAdoptTrust,
}


CHAINS = {"server-replay-recipes": recipe_chain, "server-replay-parts": part_chain}


@contextlib.contextmanager
def live_server(shared: Path):
    """Serve on loopback while the block runs; the address is in shared/url."""
    binary = Path(sys.executable).parent / "deltasync-server"
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    words = [binary, "serve", "--data", shared / "data", "--listen", "127.0.0.1:0"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout
    try:
        (shared / "url").write_text(process.stdout.readline().split()[-1])
        yield
    finally:
        process.terminate()
        process.wait(30)


@contextlib.contextmanager
def fetched_server(shared: Path):
    """Serve a tree with a file that comes by ranges."""
    expected = shared / "expected"
    expected.mkdir()
    folders.life(expected)
    folders.later(expected)
    folders.write(expected, "large.bin", bytes(range(256)) * 70_000)
    with live_server(shared):
        url = (shared / "url").read_text()
        words = ("push", expected, "--state-dir", shared / "state", "--to", url, "--json")
        assert forked(lambda: client(*words), shared / "log.txt") == 0, (shared / "log.txt").read_text()
        yield


def prepare_shared(name: str, shared: Path) -> contextlib.AbstractContextManager[None]:
    """Make what every point of a scenario starts from."""
    if name.startswith("client-push"):
        return live_server(shared)
    if name == "migrations":
        Migrations.make(shared)
    if name in CHAINS:
        expected = shared / "expected"
        for path, thing in CHAINS[name]()[-1].tree.items():
            assert isinstance(thing, File)
            os.utime(folders.write(expected, path, thing.content), ns=(thing.mtime_ns, thing.mtime_ns))
        return contextlib.nullcontext()
    if name == "client-fetch":
        return fetched_server(shared)
    if name == "client-home":
        ClientHome.make(shared)
        return live_server(shared)
    if name == "server-return":
        return contextlib.nullcontext()
    if name.startswith("server-") and name != "server-live":
        expected = shared / "expected"
        expected.mkdir()
        folders.life(expected)
        words = ("push", expected, "--state-dir", shared / "state", "--workspace", "life", "--json")
        log = shared / "log.txt"
        assert forked(lambda: client(*words), log) == 0, log.read_text()
        folders.later(expected)
        assert forked(lambda: client(*words), log) == 0, log.read_text()
        shutil.copytree(shared / "state/outbox", shared / "chain")
        full = ("replay", shared / "chain", "--data", shared / "full", "--workspace", "life", "--keep-sequences", "1")
        assert forked(lambda: server(*full, "--json"), log) == 0, log.read_text()
    return contextlib.nullcontext()


PRELOADED = (
    "deltasync.cli.fetch",
    "deltasync.cli.push",
    "deltasync.cli.status",
    "deltasync.client.homecoming",
    "deltasync.client.transport",
    "deltasync_server.check",
    "deltasync_server.cli.main",
    "deltasync_server.http.problems",
    "deltasync_server.opening",
    "deltasync_server.replay",
    "sender",
)
"""Modules that the commands import when they need them: here once, and not at every point."""


def sweep(
    name: str,
    folder: Path,
    *,
    first: int,
    stride: int,
    moment: str,
    seconds: float,
    again: int | None = None,
    most: int = 1_000_000,
) -> dict[str, object]:
    """Visit every stride-th point of a scenario, beginning with the first, until the command outlives its point."""
    for module in PRELOADED:
        importlib.import_module(module)
    shared = folder / "shared"
    shared.mkdir(parents=True)
    points, deadline = 0, time.monotonic() + seconds
    chance = None if again is None else random.Random(again)
    with prepare_shared(name, shared):
        for point in range(first, 1_000_000, stride):
            scenario = SCENARIOS[name](folder / f"p{point}-{moment}", shared)
            scenario.folder.mkdir()
            scenario.prepare()
            try:
                ended = harmed(scenario, point, moment)
                scenario.verify_harmed()
                if chance is not None and not ended:
                    harmed(scenario, chance.randrange(1, 200), chance.choice([*MOMENTS]))
                scenario.run(scenario.act)
                scenario.verify()
            except AssertionError as error:
                raise AssertionError(f"{name}, {moment} at call {point}: {error}") from error
            shutil.rmtree(scenario.folder)
            points += not ended
            if ended or points >= most or time.monotonic() > deadline:
                return {"scenario": name, "moment": moment, "points": points, "last": point, "complete": ended}
    raise AssertionError("no end")


def harmed(scenario: Scenario, point: int, moment: str) -> bool:
    """Run the command with a call that kills it, or fails; tells whether it came to its end before that call."""
    counts = scenario.folder / "count"

    def act() -> int:
        arm(point, moment)
        code = scenario.act()
        counts.write_text(str(disarm()))
        return code

    code, said = forked(act, scenario.log), scenario.log.read_text() if scenario.log.exists() else ""
    if code == -signal.SIGKILL:
        return False
    count = int(counts.read_text()) if counts.exists() else point
    if count < point or moment in MOMENTS:
        assert code in scenario.allowed, f"exit {code}\n{said[-2000:]}"
        return True
    assert code in KNOWN_CODES and "Traceback" not in said and "unexpected" not in said, f"exit {code}\n{said[-3000:]}"
    scenario.log.unlink(missing_ok=True)
    return False


def main() -> None:
    """Parse, sweep, print one JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("scenario", choices=SCENARIOS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--moment", choices=ALL_MOMENTS, default="before")
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--most", type=int, default=1_000_000)
    parser.add_argument("--again", type=int, default=None, metavar="SEED")
    given = parser.parse_args()
    print(
        json.dumps(
            sweep(
                given.scenario,
                given.folder,
                first=given.first,
                stride=given.stride,
                moment=given.moment,
                seconds=given.seconds,
                again=given.again,
                most=given.most,
            )
        )
    )


if __name__ == "__main__":
    main()
