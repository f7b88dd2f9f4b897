"""Collection: what nothing needs goes, what anything needs stays, also while bundles arrive."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from sender import NAME, Sender, assert_tree, give

from deltasync.core.hashing import digest_of
from deltasync_server.check import check
from deltasync_server.config import StoreConfig
from deltasync_server.receive import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(StoreConfig(tmp_path, keep_sequences=2)) as opened:
        opened.recover()
        yield opened


def held(store: Store) -> set[bytes]:
    """Return the digests that have both a row and a file."""
    with store.state.read() as db:
        rows = {digest for (digest,) in db.execute("SELECT digest FROM blobs")}
    files = {bytes.fromhex(path.name) for path in (store.config.data / "cache").rglob("*") if path.is_file()}
    assert rows == files
    return rows


def test_only_heads_and_kept_sequences_keep_content(store: Store) -> None:
    """With two sequences kept, content of the one before them goes; content that is still named stays."""
    sender = Sender()
    for number in (1, 2, 3):
        sender.send(store, sender.tree(always=b"always", sub__n=b"%d" % number))
    store.catch_up()
    dry = store.collect(dry_run=True)
    assert (dry.blobs, dry.blob_bytes, dry.is_dry_run) == (1, 1, True)
    assert len(held(store)) == 4
    done = store.collect()
    assert (done.blobs, done.blob_bytes, done.kept_blobs) == (1, 1, 3)
    assert held(store) == {digest_of(content) for content in (b"always", b"2", b"3")}
    assert_tree(store, sender)
    assert store.collect().blobs == 0


def test_directory_objects_go_with_their_sequences(store: Store) -> None:
    """Objects of kept sequences can be walked, those before are gone."""
    sender = Sender()
    roots = []
    for number in range(5):
        sender.send(store, sender.tree(sub__n=b"%d" % number))
        roots.append(sender.root)
    store.catch_up()
    store.upkeep()
    store.collect()
    assert store.directory(NAME, roots[-2]) and store.directory(NAME, roots[-1])
    with store.state.read() as db:
        assert db.execute("SELECT count(*) FROM objects").fetchone() == (4,)


def test_a_sequence_is_not_listed_once_its_tree_is_gone(tmp_path: Path) -> None:
    """Keeping more sequences later does not bring back those that were let go."""
    sender = Sender()
    with Store(StoreConfig(tmp_path, keep_sequences=2)) as store:
        store.recover()
        for number in range(4):
            sender.send(store, sender.tree(sub__n=b"%d" % number))
        store.collect()
    with Store(StoreConfig(tmp_path, keep_sequences=10)) as store:
        store.recover()
        assert [each.sequence for each in store.sequences(NAME).sequences] == [3, 4]
        sender.send(store, sender.tree(sub__n=b"more"))
        assert [each.sequence for each in store.sequences(NAME).sequences] == [3, 4, 5]
        store.catch_up()
    assert check(StoreConfig(tmp_path)).findings == []


def test_a_tree_behind_its_head_keeps_what_it_holds(store: Store) -> None:
    """What the plain tree still has to move away from is needed to move it."""
    sender = Sender()
    sender.send(store, sender.tree(a__x=b"first"))
    assert_tree(store, sender)
    for number in range(5):
        sender.send(store, sender.tree(b__x=b"%d" % number))
    store.collect()
    assert_tree(store, sender)


def test_leases_and_arriving_bundles_keep_content(store: Store) -> None:
    """Content that was called present, or that a bundle on its way names, is not collected under its feet."""
    sender = Sender()
    sender.send(store, sender.tree(old=b"leased", older=b"named"))
    for number in range(3):
        sender.send(store, sender.tree(n=b"%d" % number))
    store.catch_up()
    store.missing(NAME, [digest_of(b"leased").hex()])
    flat = sender.tree(back=b"named", new=b"%d" % 9 * 1000)
    metadata, sealed = sender.seal(flat)

    class Collecting(io.BytesIO):
        """Collects when the metadata is in and the end is not."""

        def read(self, size: int | None = -1, /) -> bytes:
            chunk = super().read(min(size or 0, 64))
            if not chunk or self.tell() == len(sealed):
                store.collect()
            return chunk

    store.receive(NAME, Collecting(sealed), expected_identity=metadata.identity)
    sender.move_on(flat)
    assert {digest_of(b"leased"), digest_of(b"named")} <= held(store)
    assert_tree(store, sender)


def test_a_collected_content_that_comes_back_is_simply_stored(store: Store) -> None:
    """A digest that was collected is missing, and is stored again when it is sent."""
    sender = Sender()
    for content in (b"gone", b"1", b"2", b"3"):
        sender.send(store, sender.tree(n=content))
    store.catch_up()
    store.collect()
    assert store.missing(NAME, [digest_of(b"gone").hex()]).missing
    sender.send(store, sender.tree(n=b"gone"))
    assert_tree(store, sender)


def test_strays_are_collected(store: Store) -> None:
    """Files in the cache that no row names go."""
    folder = store.config.data / "cache" / "ab"
    (folder / ("ab" * 32)).write_bytes(b"stray")
    (folder / "folder").mkdir()
    (folder / "folder" / "x").write_bytes(b"")
    (store.config.data / "cache" / "file").write_bytes(b"")
    assert store.collect(dry_run=True).strays == 3
    assert store.collect().strays == 3
    assert held(store) == set()


def test_a_stopped_store_is_collected_as_well(tmp_path: Path) -> None:
    """A collection needs no server: it works on a store that was just opened, with its journal still full."""
    config = StoreConfig(tmp_path, keep_sequences=1)
    sender = Sender()
    with Store(config) as store:
        store.recover()
        for content in (b"1", b"2", b"3"):
            give(store, *sender.seal(sender.tree(n=content)))
            sender.move_on(sender.tree(n=content))
        store.catch_up()
    with Store(config) as store:
        store.recover()
        assert store.collect(dry_run=True).blobs == 2
        assert store.collect().blobs == 2
        assert_tree(store, sender)
