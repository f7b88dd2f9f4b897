"""The host's clock jumps, by years, to and fro: what is acknowledged, leased or under way stays."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sender import NAME, Sender, assert_tree, give

from deltasync.core import bundle, wire
from deltasync.core.errors import Unauthorized
from deltasync.core.hashing import digest_of
from deltasync.core.part import Part
from deltasync_server.access import Access, Scope
from deltasync_server.check import check
from deltasync_server.config import StoreConfig
from deltasync_server.receive import Store
from deltasync_server.room import Shortage
from deltasync_server.tenants import DEFAULT

YEARS = 10 * 365 * 86_400.0
STREAM = b"\x01" * 32
Jump = Callable[[float], None]


@pytest.fixture
def jump(monkeypatch: pytest.MonkeyPatch) -> Jump:
    """Return what sets the host's clock, by seconds from the true time."""
    true = time.time
    return lambda seconds: monkeypatch.setattr(time, "time", lambda: true() + seconds)


@pytest.fixture
def config(tmp_path: Path) -> StoreConfig:
    return StoreConfig(tmp_path / "data", keep_sequences=1, low_disk_bytes=0)


@pytest.fixture
def store(config: StoreConfig) -> Iterator[Store]:
    with Store(config) as opened:
        opened.recover()
        yield opened


def held(store: Store) -> set[bytes]:
    with store.state.read() as db:
        return {digest for (digest,) in db.execute("SELECT digest FROM blobs")}


def send_part(store: Store, sender: Sender, start: int, content: bytes) -> None:
    """Send a part of a stream, which is zeros before it."""
    metadata = sender.compose([], sender.root, "parts")

    def read(_: Part) -> Iterator[bytes]:
        yield content
        return digest_of(bytes(start) + content)

    give(store, metadata, b"".join(bundle.seal_part(metadata, Part(STREAM, start, len(content)), read)))
    sender.sequence += 1


@pytest.mark.parametrize("seconds", [YEARS, -YEARS], ids=["forward", "back"])
def test_a_clock_that_jumps_takes_nothing_that_is_under_way(store: Store, jump: Jump, seconds: float) -> None:
    """Heads, leases, uploads in pieces and streams are as they were, whatever is tidied, evicted or collected then."""
    sender = Sender()
    sender.send(store, sender.tree(a=b"first", b=b"stays"))
    sender.send(store, sender.tree(b=b"stays"))
    leased = digest_of(b"first")
    assert store.missing(NAME, [leased.hex()]).missing == []
    content = os.urandom(100)
    asked = wire.UploadRequest(
        kind="file", hostname="h", filepath="/f", file_size=100, chunk_size=60, blake3=digest_of(content).hex()
    )
    upload = store.uploads.initiate(DEFAULT, asked).upload_id
    store.uploads.put(DEFAULT, upload, 0, io.BytesIO(content[:60]))
    send_part(store, sender, 0, bytes(50))
    jump(seconds)
    store.catch_up()
    store.upkeep()
    store._evictor.note_idle()
    store._evictor._evict(store._evictor._noted(), Shortage(1 << 40), lambda: False)
    assert {leased, digest_of(b"stays")} <= held(store)
    send_part(store, sender, 50, bytes(20))
    store.uploads.put(DEFAULT, upload, 1, io.BytesIO(content[60:]))
    store.complete_upload(DEFAULT, upload, wire.UploadComplete())
    sender.send(store, {**sender.flat, "again": sender.file("again", b"first")}, is_thin=True)
    assert_tree(store, sender)
    store.stop()
    assert check(store.config).is_sound


def test_what_is_noted_while_the_clock_is_ahead_makes_way_when_it_is_right(store: Store, jump: Jump) -> None:
    """Content that nothing needs, and a stream that nobody sends, do not stay until the wrong time comes."""
    sender = Sender()
    sender.send(store, sender.tree(a=b"idle"))
    sender.send(store, sender.tree(b=b"needed"))
    send_part(store, sender, 0, bytes(50))
    jump(YEARS)
    store._evictor.note_idle()
    with store.state.write() as db:
        db.execute("UPDATE streams SET touched = ?", (int(time.time()),))
    jump(0)
    store._evictor.note_idle()
    store.streams.expire(time.time())
    with store.state.read() as db:
        latest = db.execute("SELECT max(since) FROM idle UNION SELECT max(touched) FROM streams").fetchall()
    assert latest and all(moment <= time.time() for (moment,) in latest)
    jump(store.config.evict_after_seconds + 1)
    assert store._evictor._evict(store._evictor._noted(), Shortage(1), lambda: False).bytes == len(b"idle")
    assert held(store) == {digest_of(b"needed")}


def test_the_end_of_a_token_and_of_a_code_is_a_time_of_the_hosts_clock(tmp_path: Path, jump: Jump) -> None:
    """While the clock is ahead they are over; one that was not used up is good again when the clock is right."""
    with Access(tmp_path) as access:
        _, endless = access.create(DEFAULT, [Scope.PUSH], "", None)
        _, token = access.create(DEFAULT, [Scope.PUSH], "", int(time.time()) + 3600)
        code = access.open_pairing(DEFAULT, [Scope.PUSH], "", 600)
        jump(YEARS)
        assert access.caller(endless).scopes == {Scope.PUSH}
        with pytest.raises(Unauthorized, match="expired"):
            access.caller(token)
        with pytest.raises(Unauthorized):
            access.attempt(code.number)
        jump(-YEARS)
        assert access.caller(token).scopes == access.caller(endless).scopes
        assert access.attempt(code.number) == code
