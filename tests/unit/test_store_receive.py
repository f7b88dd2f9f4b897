"""The receiving store: what a bundle does to it, and what a bundle that is refused does not."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sender import ALICE, BOB, NAME, Sender, assert_tree, give, tree_of

from deltasync.core import delta
from deltasync.core.errors import (
    AlreadyRunning,
    ContentMissing,
    NotFound,
    NotOwner,
    Refused,
    RootMismatch,
    SequenceFork,
    SequenceGap,
    StaleEpoch,
    UsageError,
)
from deltasync.core.hashing import digest_of
from deltasync.core.manifest import EMPTY_ROOT, Entry, Kind
from deltasync_server.config import StoreConfig
from deltasync_server.receive import Store
from deltasync_server.tenants import DEFAULT


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(StoreConfig(tmp_path / "data")) as opened:
        opened.recover()
        yield opened


def leftovers(store: Store) -> list[str]:
    data = store.config.data
    return [path.name for folder in ("staging", "journal") for path in (data / folder).iterdir()]


def test_a_bundle_becomes_a_plain_folder_and_a_receipt(store: Store) -> None:
    """A first bundle with files, folders and links is applied, and its plain folder is equal byte by byte."""
    sender = Sender()
    flat = sender.tree(a=b"one", sub__b=b"two", sub__empty=b"")
    flat["void"] = Entry("void", Kind.DIRECTORY)
    flat["link"] = Entry("link", Kind.SYMLINK, target="sub/b")
    flat["run"] = sender.file("run", b"#!/bin/sh", executable=True)
    receipt = sender.send(store, flat)
    assert (receipt.sequence, receipt.created, receipt.content_bytes) == (1, 7, 15)
    assert_tree(store, sender)
    state = store.workspace(NAME)
    assert (state.client_id, state.files, state.content_bytes, state.lag) == (ALICE, 4, 15, 0)
    assert state.last_bundle_id == receipt.bundle_id
    assert store.last_upload_status(NAME) == "applied"


def test_the_same_bundle_twice_gets_the_first_receipt(store: Store) -> None:
    """A repeated bundle changes nothing and is answered with the receipt of the first time."""
    sender = Sender()
    flat = sender.tree(a=b"one")
    metadata, sealed = sender.seal(flat)
    first = give(store, metadata, sealed)
    again = give(store, metadata, sealed)
    assert again.duplicate and not first.duplicate
    assert (again.applied_at, again.content_bytes, again.identity) == (first.applied_at, 3, first.identity)
    assert store.figures()["bundles_duplicate_total"] == 1


def test_a_thin_repeat_of_a_full_bundle_is_the_same_bundle(store: Store) -> None:
    """Identity is the metadata's: without its content the bundle is still the one that was applied."""
    sender = Sender()
    flat = sender.tree(a=b"one")
    give(store, *sender.seal(flat))
    assert give(store, *sender.seal(flat, is_thin=True)).duplicate


def test_a_gap_says_which_number_is_expected(store: Store) -> None:
    """A bundle that comes too early is refused with the expected number, and spends nothing."""
    sender = Sender()
    first = sender.seal(sender.tree(a=b"one"))
    sender.move_on(sender.tree(a=b"one"))
    second = sender.seal(sender.tree(a=b"two"))
    with pytest.raises(SequenceGap) as caught:
        give(store, *second)
    assert caught.value.facts["expected_sequence"] == 1
    assert store.workspace(NAME).sequence == 0
    give(store, *first)
    assert give(store, *second).sequence == 2


def test_another_bundle_under_a_spent_number_is_a_fork(store: Store) -> None:
    """A number is spent by its receipt: another bundle with it, or with another parent, is a fork."""
    sender, other = Sender(), Sender()
    sender.send(store, sender.tree(a=b"one"))
    with pytest.raises(SequenceFork) as caught:
        give(store, *other.seal(other.tree(a=b"other")))
    assert caught.value.facts["root"] == sender.root.hex()
    other.move_on(other.tree(a=b"other"))
    with pytest.raises(SequenceFork):
        give(store, *other.seal(other.tree(a=b"more")))
    assert store.last_upload_status(NAME) == "SEQUENCE_FORK"
    assert leftovers(store)[1:] == []


def test_a_new_epoch_retires_the_one_before(store: Store) -> None:
    """Numbers go on across epochs, and a bundle of a replaced epoch is refused."""
    sender = Sender()
    sender.send(store, sender.tree(a=b"one"))
    old_epoch, sender.epoch = sender.epoch, "2" * 32
    sender.send(store, sender.tree(a=b"two"))
    sender.epoch = old_epoch
    with pytest.raises(StaleEpoch):
        give(store, *sender.seal(sender.tree(a=b"three")))
    assert store.workspace(NAME).sequence == 2


def test_another_client_is_refused_until_it_takes_over(store: Store) -> None:
    """The owner is named by the first bundle; another one needs take_over, which the audit tells, and then owns it."""
    alice = Sender()
    alice.send(store, alice.tree(a=b"one"))
    bob = Sender(client_id=BOB, epoch="2" * 32, sequence=1, root=alice.root, flat=alice.flat, objects=alice.objects)
    with pytest.raises(NotOwner):
        give(store, *bob.seal(bob.tree(a=b"bob")))
    bob.send(store, bob.tree(a=b"bob"), take_over=True)
    assert store.workspace(NAME).client_id == BOB
    with pytest.raises(NotOwner):
        give(store, *alice.seal(alice.tree(a=b"alice")))
    with store.state.read() as db:
        assert db.execute("SELECT workspace, event, detail FROM audit").fetchall() == [
            (NAME, "take-over", f"{ALICE} -> {BOB} with sequence 2")
        ]


def test_a_thin_bundle_is_answered_with_what_is_missing(store: Store) -> None:
    """Content that neither the bundle nor the cache has is listed; the rest of the same bundle then follows."""
    sender = Sender()
    sender.send(store, sender.tree(a=b"one"))
    flat = sender.tree(a=b"one", b=b"one", c=b"two", d=b"three")
    with pytest.raises(ContentMissing) as caught:
        give(store, *sender.seal(flat, without=[digest_of(b"two")]))
    assert caught.value.missing == [digest_of(b"two").hex()]
    assert store.workspace(NAME).sequence == 1
    receipt = sender.send(store, flat)
    assert receipt.content_bytes == len(b"two") + len(b"three")
    assert_tree(store, sender)


def test_a_size_that_the_cache_denies_is_refused(store: Store) -> None:
    """A thin bundle cannot give content another size than it has."""
    sender = Sender()
    sender.send(store, sender.tree(a=b"one"))
    lie = sender.file("b", b"one")
    flat = {**sender.flat, "b": Entry("b", Kind.FILE, 4, lie.mtime_ns, False, lie.digest)}
    with pytest.raises(Refused) as caught:
        give(store, *sender.seal(flat, is_thin=True))
    assert caught.value.rule == "B-54"
    assert store.workspace(NAME).sequence == 1


def test_missing_leases_what_it_calls_present(store: Store) -> None:
    """Digests that must not be sent cannot be collected before the bundle that names them comes."""
    sender = Sender()
    sender.send(store, sender.tree(a=b"one", b=b"gone"))
    for number in range(store.config.keep_sequences + 1):
        sender.send(store, sender.tree(a=b"one", n=b"%d" % number))
    gone, never = digest_of(b"gone").hex(), digest_of(b"never").hex()
    assert store.missing(NAME, [gone, never]).missing == [never]
    store.collect()
    receipt = sender.send(store, sender.tree(a=b"one", back=b"gone"), is_thin=True)
    assert receipt.content_bytes == 0
    assert_tree(store, sender)


@pytest.mark.parametrize("text", ["", "abc", "A" * 64, "g" * 64, " " + "a" * 63])
def test_missing_takes_digests_alone(store: Store, text: str) -> None:
    """What is no digest is a usage error."""
    with pytest.raises(UsageError):
        store.missing(NAME, [text])


def test_an_announced_identity_must_be_the_bundles(store: Store) -> None:
    """A bundle that is not the announced one is refused, and nothing of it stays."""
    sender = Sender()
    _, sealed = sender.seal(sender.tree(a=b"one"))
    with pytest.raises(Refused) as caught:
        store.receive(NAME, io.BytesIO(sealed), expected_identity=bytes(32))
    assert caught.value.rule == "B-26"
    assert leftovers(store) == []


def test_a_wrong_root_is_refused(store: Store) -> None:
    """Operations that do not lead to the promised root change nothing."""
    sender = Sender()
    flat = sender.tree(a=b"one")
    operations = delta.diff(EMPTY_ROOT, sender.objects.build(flat), sender.objects.load)
    with pytest.raises(RootMismatch):
        give(store, *sender.seal_operations(operations, b"\1" * 32))
    assert store.workspace(NAME).sequence == 0
    assert leftovers(store) == []


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_a_truncated_bundle_leaves_nothing(store: Store, cut: int) -> None:
    """Wherever a bundle ends early, no file, row or number of it stays."""
    sender = Sender()
    metadata, sealed = sender.seal(sender.tree(a=b"one", b=b"two"))
    with pytest.raises(Refused):
        give(store, metadata, sealed[:cut])
    assert leftovers(store) == []
    assert store.workspaces(DEFAULT) == []
    assert not any(path.is_file() for path in (store.config.data / "cache").rglob("*"))


def test_a_source_that_fails_raises_its_own_error(store: Store) -> None:
    """When the sender goes away the store lets go of everything and says what the source said."""

    class Gone:
        def __init__(self, sealed: bytes) -> None:
            self.stream = io.BytesIO(sealed)

        def read(self, size: int, /) -> bytes:
            if chunk := self.stream.read(min(size, 200)):
                return chunk
            raise ConnectionResetError

    sender = Sender()
    _, sealed = sender.seal(sender.tree(a=b"one"))
    with pytest.raises(ConnectionResetError):
        store.receive(NAME, Gone(sealed[:-10]), expected_identity=None)
    assert leftovers(store) == []


def test_a_refused_body_is_not_read_on(store: Store) -> None:
    """A bundle that does not fit is answered when its metadata is in; what follows is left to the route."""
    sender = Sender()
    sender.send(store, sender.tree(a=b"one"))
    other = Sender()
    metadata, sealed = other.seal(other.tree(**{f"f{number}": os.urandom(500_000) for number in range(8)}))
    source = io.BytesIO(sealed)
    with pytest.raises(SequenceFork):
        store.receive(NAME, source, expected_identity=metadata.identity)
    assert source.tell() < len(sealed) // 2


def test_a_hook_sees_the_verdict_and_may_refuse(store: Store) -> None:
    """A route can look at head, metadata and verdict before the store acts on them."""
    sender = Sender()
    _, sealed = sender.seal(sender.tree(a=b"one"))

    def refuse(head: object, metadata: object, verdict: object) -> None:
        raise UsageError(f"{verdict}")

    with pytest.raises(UsageError, match="APPLY"):
        store.receive(NAME, io.BytesIO(sealed), expected_identity=None, decide_hook=refuse)
    assert leftovers(store) == []


class Gate:
    """A source that stops in the middle until it is opened."""

    def __init__(self, sealed: bytes) -> None:
        self.stream = io.BytesIO(sealed)
        self.half = len(sealed) // 2
        self.is_reached, self.is_open = threading.Event(), threading.Event()

    def read(self, size: int, /) -> bytes:
        if self.stream.tell() >= self.half:
            self.is_reached.set()
            assert self.is_open.wait(20)
        return self.stream.read(
            min(size, max(1, self.half - self.stream.tell()) if not self.is_open.is_set() else size)
        )


def test_a_complete_bundle_waits_for_the_one_before_it(store: Store) -> None:
    """Number 2 that arrives whole while number 1 is still arriving is applied after it, and is no gap."""
    sender = Sender()
    flat = sender.tree(a=bytes(range(256)) * 4000)
    metadata, sealed = sender.seal(flat)
    gate, answers = Gate(sealed), []
    sender.move_on(flat)
    later = sender.seal(sender.tree(a=b"two"))

    def first() -> None:
        answers.append(store.receive(NAME, gate, expected_identity=metadata.identity).sequence)

    def second() -> None:
        answers.append(give(store, *later).sequence)

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert gate.is_reached.wait(20)
    threads[1].start()
    gate.is_open.set()
    for thread in threads:
        thread.join(20)
    assert sorted(answers) == [1, 2]


def test_the_same_bundle_twice_at_once_is_applied_once(store: Store) -> None:
    """Of two equal uploads in parallel one is applied and the other gets its receipt."""
    sender = Sender()
    metadata, sealed = sender.seal(sender.tree(a=b"one", b=b"two"))
    receipts = []
    barrier = threading.Barrier(4)

    def send() -> None:
        barrier.wait()
        receipts.append(give(store, metadata, sealed))

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(receipt.duplicate for receipt in receipts) == [False, True, True, True]
    sender.move_on(sender.tree(a=b"one", b=b"two"))
    assert_tree(store, sender)


def test_workspaces_share_content_and_nothing_else(store: Store) -> None:
    """A second workspace reuses blobs of the first and has its own head and tree."""
    one, two = Sender(), Sender(name=type(NAME)("other"), client_id=BOB)
    one.send(store, one.tree(a=b"same", b=b"one"))
    receipt = two.send(store, two.tree(x=b"same", y=b"two"), is_thin=False)
    assert receipt.content_bytes == 3
    assert_tree(store, one)
    assert_tree(store, two)
    assert [state.workspace for state in store.workspaces(DEFAULT)] == ["other", "proj"]


def test_an_unwritten_workspace_is_at_zero(store: Store) -> None:
    """A workspace without a bundle answers sequence 0, the empty root and no owner."""
    state = store.workspace(NAME)
    assert (state.sequence, state.root, state.client_id, state.tree_sequence) == (0, EMPTY_ROOT.hex(), "", 0)
    assert store.sequences(NAME).sequences == []
    with pytest.raises(NotFound):
        store.directory(NAME, EMPTY_ROOT)


def test_the_tree_can_be_walked_and_kept_sequences_listed(store: Store) -> None:
    """Directory objects are given out by digest, and the last sequences are listed oldest first."""
    sender = Sender()
    for number in range(12):
        sender.send(store, sender.tree(sub__n=b"%d" % number))
    body = store.directory(NAME, sender.root)
    assert body == sender.objects[sender.root]
    kept = store.sequences(NAME).sequences
    assert [each.sequence for each in kept] == list(range(3, 13))
    assert kept[-1].root == sender.root.hex()
    with pytest.raises(NotFound):
        store.directory(NAME, bytes(32))


def test_a_blob_is_read_by_digest(store: Store) -> None:
    """A blob is opened after a look at its fingerprint; an unknown digest is not found."""
    sender = Sender()
    sender.send(store, sender.tree(a=b"content"))
    stream, size = store.open_blob(DEFAULT, digest_of(b"content"))
    with stream:
        assert (stream.read(), size) == (b"content", 7)
    with pytest.raises(NotFound):
        store.open_blob(DEFAULT, digest_of(b"nothing"))


def test_a_second_server_is_refused(store: Store) -> None:
    """One DATA folder has one server."""
    with pytest.raises(AlreadyRunning):
        Store(StoreConfig(store.config.data))


def test_a_stopped_store_can_be_opened_again(tmp_path: Path) -> None:
    """Stopping lets go of the lock, and everything that was acknowledged is there again."""
    sender = Sender()
    with Store(StoreConfig(tmp_path)) as store:
        store.recover()
        store.start()
        sender.send(store, sender.tree(a=b"one"))
        store.wait_for_tree(NAME, 1, 20)
    with Store(StoreConfig(tmp_path)) as store:
        store.recover()
        assert_tree(store, sender)


def test_an_unknown_link_mode_is_a_usage_error(tmp_path: Path) -> None:
    """--link takes four words."""
    with pytest.raises(UsageError, match="reflink"):
        Store(StoreConfig(tmp_path, link="symlink"))


def test_waiting_for_the_tree_ends_when_it_is_there(tmp_path: Path) -> None:
    """A wait is answered when the tree holds the sequence, and at its end when it does not."""
    sender = Sender()
    with Store(StoreConfig(tmp_path)) as store:
        store.recover()
        sender.send(store, sender.tree(a=b"one"))
        assert store.wait_for_tree(NAME, 1, 0.0).tree_sequence == 0
        store.start()
        assert store.wait_for_tree(NAME, 1, 20).tree_sequence == 1
        assert store.wait_for_tree(NAME, 2, 0.01).tree_sequence == 1


def test_health_and_figures_count(store: Store) -> None:
    """Health is ok with headroom; figures count what happened."""
    sender = Sender()
    sender.send(store, sender.tree(a=b"one"))
    health, figures = store.health(), store.figures()
    assert (health.status, health.workspaces) == ("ok", 1)
    assert (figures["blobs"], figures["blob_bytes"], figures["bundles_applied_total"]) == (1, 3, 1)
    assert figures["trees_behind"] == 1
    store.catch_up()
    assert store.figures()["trees_behind"] == 0
    assert tree_of(store).is_dir()


def test_a_bundle_that_overtook_the_one_before_waits_for_it_to_begin(tmp_path: Path) -> None:
    """Two connections keep no order: the second bundle is read first, and is not told of a gap."""
    with Store(StoreConfig(tmp_path / "data", gap_seconds=30.0)) as store:
        store.recover()
        sender = Sender()
        bundles = []
        for number in range(2):
            flat = sender.tree(**{f"f{number}": b"x"})
            bundles.append(sender.seal(flat))
            sender.move_on(flat)
        with ThreadPoolExecutor(1) as other:
            second = other.submit(give, store, *bundles[1])
            arrivals = store._arrivals
            with arrivals._changed:
                assert arrivals._changed.wait_for(lambda: any(each.header for each in arrivals._present), 20)
            assert give(store, *bundles[0]).sequence == 1
            assert second.result(20).sequence == 2
