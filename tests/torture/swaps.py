"""A process swaps folders and files for links while the product works there: nothing outside is touched or read."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import folders
from desk import Desk
from sender import NAME as WORKSPACE
from sender import Sender, meant, seen
from serving import serving
from trees import Flat

from deltasync.client.fetch import FetchOptions, fetch
from deltasync.client.transport import HttpTransport, open_transport
from deltasync.core.errors import DeltasyncError
from deltasync.core.hashing import digest_of
from deltasync_server.config import StoreConfig
from deltasync_server.receive import Store
from torture.harness import Defect, Result, Work

RACER = Path(__file__).with_name("racer.py")
NAME = "swaps"
GOAL = 200_000
SLICE = 300
WEIGHT = 2
ROUND_SECONDS = 4.0
SECRET = b"nobody was to see this"
DEFECTS = (
    Defect(
        "folders are entered through links",
        "TR-23",
        "deltasync/disk.py",
        'DIRECTORY_FLAGS = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0) | _CLOEXEC',
        'DIRECTORY_FLAGS = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | _CLOEXEC',
    ),
    Defect(
        "files are read through links",
        "TR-23",
        "deltasync/disk.py",
        'FILE_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | _CLOEXEC',
        'FILE_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _CLOEXEC',
        hint="send",
    ),
)


def run(work: Work) -> Result:
    """Apply, fetch and send while links come and go; then everything is in order again."""
    result, chance = Result(), random.Random(work.seed)
    rounds = {"apply": _apply, "fetch": _fetch, "send": _send}
    names = [work.hint] if work.hint else [*rounds]
    number = 0
    while work.goes_on(result):
        for name in names:
            number += 1
            folder = work.scratch / str(number)
            outside = _outside(folder)
            before = _seen(outside)
            seconds = max(0.2, min(ROUND_SECONDS, work.deadline - time.monotonic(), work.points / 2_000))
            try:
                swaps = rounds[name](folder, outside, chance, seconds)
            except AssertionError as error:
                result.faults.append(f"{name}, seed {work.seed}, round {number}: {error}")
                swaps = 1
            if _seen(outside) != before:
                result.faults.append(f"{name}, seed {work.seed}, round {number}: something outside was changed")
            result.points += swaps
            result.count(name, swaps)
            shutil.rmtree(folder, ignore_errors=True)
            if not work.goes_on(result):
                break
    return result


def _outside(folder: Path) -> Path:
    outside = folder / "outside"
    for name in ("secret", "sub/a", "sub/deep/b", "c"):
        folders.write(outside, name, SECRET)
    return outside


def _seen(outside: Path) -> dict[str, object]:
    """Return what is outside, with modes and times of files and folders."""
    found: dict[str, object] = {}
    for path in (outside, *sorted(outside.rglob("*"))):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() else None
        found[str(path)] = (status.st_mode, status.st_mtime_ns, status.st_nlink, status.st_ino, content)
    return found


@contextmanager
def _racing(chance: random.Random, outside: Path, *places: Path) -> Iterator[list[int]]:
    """Swap below some places while the block runs; the list has the number of swaps afterwards."""
    words = [sys.executable, RACER, str(chance.random()), outside, *places]
    swaps: list[int] = []
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as racer:
        try:
            yield swaps
        finally:
            swaps.append(int(racer.communicate()[0].split()[-1]))


def _until(seconds: float, step: Callable[[], object]) -> None:
    """Take a step again and again; what fails because of the swaps may fail."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, DeltasyncError):
            step()


def _tree(sender: Sender, chance: random.Random) -> Flat:
    """Return a tree: some of the same names, with some of the same contents."""
    files = {}
    for name in ("a", "sub__b", "sub__deep__c", "sub__deep__er__d", "other__e"):
        if chance.random() < 0.8:
            files[name] = b"%d" % chance.randrange(5)
    return sender.tree(**files)


def _apply(folder: Path, outside: Path, chance: random.Random, seconds: float) -> int:
    """Bring a plain tree forward, tidy up and collect."""
    config = StoreConfig(folder / "data", keep_sequences=1, low_disk_bytes=0, low_disk_inodes=0)
    sender = Sender()
    with Store(config) as store:
        store.recover()
        sender.send(store, sender.tree(a=b"a", sub__b=b"b", sub__deep__c=b"c", sub__deep__er__d=b"d"))
        store.catch_up()

        def step() -> None:
            flat = _tree(sender, chance)
            try:
                sender.send(store, flat)
            except DeltasyncError:
                if store.workspace(WORKSPACE).root == sender.objects.build(flat).hex() != sender.root.hex():
                    sender.move_on(flat)  # it was committed all the same
            store.catch_up()
            store.upkeep()
            store.collect()

        home = store.trees.path(WORKSPACE).parent
        with _racing(chance, outside, home / "tree", home / "aside", config.data / "staging") as swaps:
            _until(seconds, step)
        if wanted := store.workspace(WORKSPACE).wanted:  # a staged file was a link at the wrong moment, and was found
            sender.heal(store, map(bytes.fromhex, wanted))
        store.trees.distrust([WORKSPACE])
        store.catch_up()
        folder = store.trees.path(WORKSPACE)
        assert seen(folder) == meant(sender), f"the tree has {sorted(seen(folder))}, not {sorted(meant(sender))}"
    return swaps[0]


def _fetch(folder: Path, outside: Path, chance: random.Random, seconds: float) -> int:
    """Fetch one of two states into a folder, in turns."""
    source, dest = Desk(folder / "w"), folder / "dest"
    dest.mkdir()
    with serving(folder / "data") as served:
        source.url = served.url
        folders.life(source.root)
        source.push()
        folders.later(source.root)
        source.push()
        transport = open_transport(served.url, timeout=20, max_retries=1)
        assert isinstance(transport, HttpTransport)
        with contextlib.closing(transport):

            def step(at: int | None = None) -> None:
                options = FetchOptions("w", at or chance.choice((1, 2)), delete=True, allow_mass_delete=True)
                fetch(transport, dest, options, _Silent())

            step(1)
            with _racing(chance, outside, dest) as swaps:
                _until(seconds, step)
            for _ in range(3):
                with contextlib.suppress(OSError, DeltasyncError):
                    step(2)
        folders.assert_same(source.root, dest)
    return swaps[0]


class _Silent:
    """Hears how far a fetch is."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *words, **facts: None


def _send(folder: Path, outside: Path, chance: random.Random, seconds: float) -> int:
    """Scan and push a folder; what the links led to is never sent."""
    desk = Desk(folder / "w")
    with serving(folder / "data") as served:
        desk.url = served.url
        folders.life(desk.root)
        desk.push()

        def step() -> None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
            descriptor = os.open(desk.root / f"new{chance.randrange(20)}", flags, 0o644)
            os.write(descriptor, str(chance.random()).encode())
            os.close(descriptor)
            desk.push(allow_mass_delete=True)

        with _racing(chance, outside, desk.root) as swaps:
            _until(seconds, step)
        desk.push(allow_mass_delete=True)
        folders.assert_same(desk.root, served.data / "workspaces/w/tree")
        digest = digest_of(SECRET).hex()
        assert not (served.data / "cache" / digest[:2] / digest).exists(), "what is outside was sent"
    return swaps[0]
