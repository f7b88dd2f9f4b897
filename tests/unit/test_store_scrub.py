"""The scrub: damage that no time shows is found in the background, served to nobody, and healed by the next contact."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from sender import NAME, Sender, assert_tree, blob_of, tree_of
from serving import until

from deltasync.core.errors import NotFound
from deltasync.core.hashing import digest_of
from deltasync_server.config import StoreConfig
from deltasync_server.receive import Store
from deltasync_server.tenants import DEFAULT


@pytest.fixture
def config(tmp_path: Path) -> StoreConfig:
    return StoreConfig(tmp_path / "data", scrub_bytes=1 << 30, scrub_after_seconds=0.0)


def damaged(path: Path) -> None:
    """Flip one bit of a file and leave its time as it was."""
    before = path.stat()
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    path.write_bytes(content)
    os.utime(path, ns=(before.st_mtime_ns, before.st_mtime_ns))
    path.chmod(before.st_mode & 0o777)


def scrubbed(store: Store, condition: Callable[[], object]) -> None:
    store.start()
    until(condition)


def is_wrong(path: Path, content: bytes) -> bool:
    """Tell whether a file of a plain tree is there with other bytes."""
    return path.exists() and path.read_bytes() != content


def rot_and_heal(config: StoreConfig, number: int) -> None:
    """Flip one bit in so many blobs: all are asked for, none is served, all come back; fails where that is not so."""
    sender = Sender()
    contents = {f"f{n}": random.Random(n).randbytes(1 + n % 100) + b"%d" % n for n in range(number + number // 10)}
    flat = sender.tree(**contents)
    with Store(replace(config, scrub_bytes=0)) as store:
        store.recover()
        sender.send(store, flat)
        store.upkeep()
        store.catch_up()
    names = sorted(contents)[:number]
    for name in names:
        damaged(blob_of(config.data, flat[name]))
    with Store(config) as store:
        store.recover()
        scrubbed(store, lambda: len(store.workspace(NAME).wanted or ()) == number)
        wanted = set(store.workspace(NAME).wanted or ())
        assert wanted == {digest_of(contents[name]).hex() for name in names}
        assert store.missing(NAME, sorted(wanted)).missing == sorted(wanted)
        assert store.figures()["scrub_damaged_total"] == number
        for digest in wanted:
            with pytest.raises(NotFound):
                store.open_blob(DEFAULT, bytes.fromhex(digest))
        assert not [name for name in names if is_wrong(tree_of(store) / name, contents[name])]
        sender.heal(store, map(bytes.fromhex, wanted))
        until(lambda: not store.workspace(NAME).wanted)
        store.trees.wait_for(lambda: store.workspace(NAME).tree_sequence == 2, 20)
        assert_tree(store, sender)
        for entry in flat.values():
            stream, size = store.open_blob(DEFAULT, entry.digest)
            with stream:
                content = stream.read()
            assert (digest_of(content), len(content)) == (entry.digest, size)


def test_every_damaged_blob_is_found_and_healed(config: StoreConfig) -> None:
    """A thousand blobs with one flipped bit each: all are asked for, none is served, all come back."""
    rot_and_heal(config, 1000)


def test_a_pass_goes_on_where_it_was_and_rests_behind_its_end(config: StoreConfig) -> None:
    """What was read before a restart is not read again; a pass that is over is not begun anew before its time."""
    sender = Sender()
    flat = sender.tree(**{f"f{number}": bytes([number % 251, number // 251]) * 10 for number in range(300)})
    with Store(replace(config, scrub_bytes=0)) as store:
        store.recover()
        sender.send(store, flat)
    total = 300 * 20.0
    with Store(config) as store:
        store.recover()
        with store.state.write() as db:
            middle = sorted(entry.digest for entry in flat.values())[199]
            db.execute("INSERT INTO scrub VALUES (1, ?, ?)", (middle, int(time.time())))
        scrubbed(store, lambda: behind(store) == b"")
        assert store.figures()["scrubbed_bytes_total"] == total / 3
    with Store(config) as store:
        store.recover()
        with store.state.write() as db:
            db.execute("UPDATE scrub SET began = 0")  # long ago
        scrubbed(store, lambda: store.figures()["scrubbed_bytes_total"] == total and behind(store) == b"")
    with Store(config) as store:
        store.recover()
        store.start()
        assert store._scrub._go_on() > 3000
        assert store.figures()["scrubbed_bytes_total"] == 0


def behind(store: Store) -> bytes:
    with store.state.read() as db:
        found: bytes = db.execute("SELECT behind FROM scrub").fetchone()[0]
    return found


def test_it_reads_no_faster_than_it_may_and_stops_at_once(config: StoreConfig) -> None:
    """At a byte a second a scrub is in the middle of its first piece for ever, and a stop waits for nothing."""
    sender = Sender()
    with Store(replace(config, scrub_bytes=1)) as store:
        store.recover()
        sender.send(store, sender.tree(a=bytes(5000)))
        scrubbed(store, lambda: store.figures()["scrubbed_bytes_total"] == 5000)
        store.stop()
        assert store._scrub._thread is None
