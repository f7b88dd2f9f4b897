"""Room: everything counts, nothing goes beyond a quota, and what nothing needs makes way, the longest idle first."""

from __future__ import annotations

import io
import subprocess
import threading
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sender import DAY, NAME, Sender, assert_tree, give, give_file, zero

from deltasync.core import bundle, wire
from deltasync.core.errors import ContentMissing, HostBusy, LimitExceeded, NoSpace, SequenceGone, UsageError
from deltasync.core.hashing import digest_of
from deltasync.core.names import WorkspaceName
from deltasync.core.part import Part
from deltasync_server import config as settings
from deltasync_server import receive, streams
from deltasync_server.adopt import Adoption, AdoptOptions
from deltasync_server.check import check
from deltasync_server.config import StoreConfig
from deltasync_server.ledger import count_again
from deltasync_server.receive import Store
from deltasync_server.tenants import DEFAULT, Tenant, qualified

KIB = 1024
ALICE, BOB = Tenant("alice"), Tenant("bob")


@pytest.fixture
def config(tmp_path: Path) -> StoreConfig:
    return StoreConfig(tmp_path / "data", keep_sequences=1, evict_after_seconds=0.0, low_disk_bytes=0)


def opened(config: StoreConfig, **changes: Any) -> Store:
    store = Store(replace(config, **changes))
    store.recover()
    return store


def large(seed: int) -> bytes:
    """Return content beside which the database is small."""
    return noise(seed, 1024 * KIB)


def room_for(config: StoreConfig, size_bytes: int) -> StoreConfig:
    """Return settings whose quota leaves so many bytes free, beside what the database needs."""
    return replace(config, quota=du(config.data) + 300 * KIB + size_bytes)


def noise(seed: int, size: int = 64 * KIB) -> bytes:
    return b"".join(digest_of(b"%d %d" % (seed, number)) for number in range(size // 32))


def du(data: Path) -> int:
    """Return what the system's own `du` counts of the regular files below a folder."""
    files = subprocess.run(["find", data, "-type", "f", "-print0"], capture_output=True, check=True).stdout
    words = ["du", "--bytes", "--total", "--files0-from=-"]
    return int(subprocess.run(words, input=files, capture_output=True, check=True).stdout.split()[-2])


def held(store: Store) -> set[bytes]:
    with store.state.read() as db:
        return {digest for (digest,) in db.execute("SELECT digest FROM blobs")}


def send(store: Store, sender: Sender, **files: bytes) -> None:
    """Send a tree and bring it into the plain folder, so that nothing is left to be done."""
    sender.send(store, sender.tree(**files))
    store.catch_up()
    store.upkeep()


def send_as(store: Store, tenant: Tenant, sender: Sender, **files: bytes) -> None:
    """Send a tree as one tenant's."""
    flat = sender.tree(**files)
    metadata, sealed = sender.seal(flat)
    store.receive(qualified(tenant, sender.name), io.BytesIO(sealed), expected_identity=metadata.identity)
    sender.move_on(flat)


def assert_books(store: Store) -> None:
    """Fail unless the rows that triggers keep are what a count of everything gives."""
    with store.state.read() as db:
        counted = db.execute("SELECT count(*), coalesce(sum(size), 0) FROM blobs").fetchone()
        assert db.execute("SELECT blobs, bytes FROM cached").fetchall() == [counted]
        shares = "SELECT tenant, count(*), sum(size) FROM holdings JOIN blobs USING (digest) GROUP BY tenant"
        assert set(db.execute("SELECT * FROM shares WHERE blobs")) == set(db.execute(shares))
        assert not db.execute("SELECT 1 FROM shares WHERE NOT blobs AND bytes").fetchall()


# --- the ledger ---


def test_the_ledger_counts_what_du_counts(config: StoreConfig) -> None:
    """Blobs, copies in trees, what left them, journal, uploads, parts, bundles, quarantine, jobs: every byte counts."""
    with opened(config, keep_bundles=True) as store:
        sender = Sender()
        twice = {name: sender.file(name, noise(1), mtime_ns=DAY * age) for name, age in (("a", 1), ("b", 2))}
        sender.send(store, {**twice, **sender.tree(old__c=noise(2))})
        store.catch_up()
        store.upkeep()
        sender.send(store, twice)
        store.catch_up()
        zero(config.data / "cache" / digest_of(noise(1)).hex()[:2] / digest_of(noise(1)).hex())
        store.trees.quarantine([digest_of(noise(1))])
        sender.send(store, {**twice, **sender.tree(d=noise(3))})
        give_file(store, noise(4))
        asked = {"hostname": "h", "filepath": "/f", "file_size": 128 * KIB, "blake3": "0" * 64, "chunk_size": 64 * KIB}
        upload = store.uploads.initiate(DEFAULT, wire.UploadRequest(kind="file", **asked)).upload_id
        store.uploads.put(DEFAULT, upload, 0, io.BytesIO(noise(5)))
        send_part(store, Sender(name=WorkspaceName("other")), noise(6))
        for folder in ("sessions", "jobs"):
            (config.data / folder).mkdir()
            (config.data / folder / "file").write_bytes(noise(7))
        counted = store.ledger.count()
        assert [kind for kind, size in counted.items() if not size] == ["staging"]
        assert sum(counted.values()) == du(config.data)
        assert store.ledger.held_bytes() == du(config.data)
        assert_books(store)


def send_part(store: Store, sender: Sender, content: bytes) -> None:
    """Send the first part of a content that has more of them."""

    def read(_: Part) -> Generator[bytes, None, bytes]:
        yield content
        return digest_of(content)

    metadata = sender.compose([], sender.root, "parts")
    give(store, metadata, b"".join(bundle.seal_part(metadata, Part(b"\x01" * 32, 0, len(content)), read)))
    sender.sequence += 1


def test_shares_follow_whatever_happens_to_blobs(config: StoreConfig) -> None:
    """Content that two hold counts for both; damage, healing and collection change both, and the books agree."""
    with opened(config) as store:
        alice, bob = Sender(), Sender(client_id="b" * 32)
        send_as(store, ALICE, alice, a=noise(1), b=noise(2))
        send_as(store, BOB, bob, b=noise(2))
        shares = {tenant: store.ledger.usage(tenant) for tenant in (ALICE, BOB, DEFAULT)}
        assert [each.bytes for each in shares.values()] == [128 * KIB, 64 * KIB, 0]
        assert [each.files for each in shares.values()] == [2, 1, 0]
        assert_books(store)
        store.trees.quarantine([digest_of(noise(2))])
        assert [store.ledger.usage(tenant).bytes for tenant in (ALICE, BOB)] == [64 * KIB, 0]
        assert_books(store)
        send_as(store, BOB, Sender(client_id="b" * 32, name=WorkspaceName("again")), b=noise(2))
        assert [store.ledger.usage(tenant).bytes for tenant in (ALICE, BOB)] == [128 * KIB, 64 * KIB]
        assert_books(store)
        send_as(store, ALICE, alice, a=noise(1))
        send_as(store, BOB, bob)
        store.collect()
        assert_books(store)
        assert [store.ledger.usage(tenant).bytes for tenant in (ALICE, BOB)] == [64 * KIB, 64 * KIB]  # one needs it


def test_wrong_books_are_found_and_mended(config: StoreConfig) -> None:
    """What triggers keep is compared by `check`, and counted again by --repair."""
    with opened(config) as store:
        send(store, Sender(), a=noise(1))
        with store.state.write() as db:
            db.execute("UPDATE cached SET bytes = 1")
            db.execute("UPDATE shares SET blobs = 7")
    assert [each.kind for each in check(config).findings] == ["ledger"]
    assert check(config, repair=True).is_sound
    assert check(config).findings == []
    with opened(config) as store:
        assert_books(store)


# --- the quota ---


def test_what_goes_beyond_the_quota_is_refused_before_its_first_byte(config: StoreConfig) -> None:
    """The answer has the figures; nothing changed, and a smaller bundle is taken."""
    with opened(config) as store:
        sender = Sender()
        send(store, sender, a=noise(1))
        taken = sum(store.ledger.count().values())
    with opened(config, quota=taken + 100 * KIB) as store:
        before = held(store)
        with pytest.raises(NoSpace, match=r"quota of .* is used up: 128.0 KiB to write") as refused:
            send(store, sender, a=noise(1), b=noise(2, 128 * KIB))
        assert refused.value.facts["quota_bytes"] == taken + 100 * KIB
        assert refused.value.facts["needed_bytes"] == 128 * KIB
        assert held(store) == before
        send(store, sender, a=noise(1), b=noise(3, 32 * KIB))
        assert_tree(store, sender)


def test_two_that_fit_one_at_a_time_do_not_both_come_at_once(config: StoreConfig) -> None:
    """What is on its way counts before it is there."""
    with opened(config) as store:
        taken = sum(store.ledger.count().values())
    with opened(config, quota=taken + 300 * KIB) as store:
        with store.room.reserved(DEFAULT, 200 * KIB), pytest.raises(NoSpace):
            send(store, Sender(), a=noise(1, 128 * KIB))
        send(store, Sender(), a=noise(1, 128 * KIB))


def test_a_tenant_goes_no_further_than_its_part(config: StoreConfig) -> None:
    """Bytes and files are bounded for each; what one may not is open to another, and to who deletes first."""
    with opened(config, tenant_quota=160 * KIB, tenant_files=3) as store:
        alice, bob = Sender(), Sender(client_id="b" * 32)
        send_as(store, ALICE, alice, a=noise(1), b=noise(2))
        with pytest.raises(NoSpace, match=r"you may hold 160.0 KiB on this server: 128.0 KiB are held") as refused:
            send_as(store, ALICE, alice, a=noise(1), b=noise(2), c=noise(3))
        assert refused.value.facts == {"needed_bytes": 65536, "held_bytes": 131072, "quota_bytes": 163840}
        send_as(store, BOB, bob, a=noise(3), b=noise(4))
        with pytest.raises(NoSpace, match="you may have 3 files on this server: 2 are there and 2 would come"):
            send_as(store, BOB, bob, a=noise(3), b=noise(4), c=b"", d=b"")
        with pytest.raises(NoSpace, match="you may have 3 files"):  # where something goes too the commit counts
            send_as(store, BOB, bob, a=noise(3), c=b"", d=b"", e=b"")
        send_as(store, BOB, bob, a=noise(3), b=noise(4), again=noise(4))  # content that it has takes no room
        send_as(store, ALICE, alice, b=noise(2))
        store.collect()
        send_as(store, ALICE, alice, b=noise(2), c=noise(3))


def test_two_that_also_delete_do_not_go_beyond_together(config: StoreConfig) -> None:
    """Both are weighed by files where no other commit comes between; one of them is refused."""
    senders = [Sender(name=WorkspaceName(name)) for name in ("one", "two")]
    with opened(config, tenant_files=3) as store:
        for sender in senders:
            send_as(store, ALICE, sender, old=b"old")
        meeting = threading.Barrier(2, timeout=20)

        def replace_all(sender: Sender) -> str:
            metadata, sealed = sender.seal(sender.tree(a=b"a", b=b"b"))
            name = qualified(ALICE, sender.name)
            try:
                store.receive(name, io.BytesIO(sealed), expected_identity=metadata.identity, permit=meeting.wait)
            except NoSpace as error:
                return error.sentence
            return "taken"

        with ThreadPoolExecutor(2) as pool:
            outcomes = sorted(pool.map(replace_all, senders))
        refusal = "you may have 3 files on this server: 3 are there and 1 would come; delete some, or ask its operator"
        assert outcomes == ["taken", refusal]
        assert store.ledger.usage(ALICE).files == 3


def test_an_uploaded_file_counts_for_its_tenant(config: StoreConfig) -> None:
    """An upload that would go beyond is not begun, and none that began before is stored."""
    with opened(config, tenant_quota=100 * KIB) as store:
        give_file(store, noise(1))
        with pytest.raises(NoSpace, match="you may hold"):
            give_file(store, noise(2))
        assert store.uploads.figures()["uploads"] == 0


def test_content_in_parts_counts_once(config: StoreConfig) -> None:
    """A stream counts while it comes; a part too many is refused, and the others stay."""
    with opened(config, tenant_quota=100 * KIB) as store:
        sender = Sender()
        send_part(store, sender, noise(1))
        assert store.ledger.usage(DEFAULT).bytes == 64 * KIB
        other = Sender(name=WorkspaceName("other"))
        with pytest.raises(NoSpace, match="you may hold"):
            send_part(store, other, noise(2))
        assert store.streams.size_bytes() == 64 * KIB


@pytest.mark.parametrize(("given", "expected"), [("2GiB", 2 << 30), ("500k", 500 * KIB), (7, 7), ("1.5M", 3 << 19)])
def test_a_quota_is_a_size(given: object, expected: int, tmp_path: Path) -> None:
    """As a flag, a variable or in the file, in bytes or as people write it."""
    chosen = settings.choose(StoreConfig, {"data": str(tmp_path)}, {}, {"quota": given})
    assert chosen.quota == expected
    with pytest.raises(UsageError, match="quota is a size in bytes, or such as 500k"):
        settings.choose(StoreConfig, {"data": str(tmp_path)}, {"DELTASYNC_SERVER_QUOTA": "much"}, {})


# --- eviction ---


def test_the_longest_idle_goes_first_and_no_more_than_must(config: StoreConfig) -> None:
    """Of contents that no head names, the one that was let go first makes way; heads lose nothing."""
    with opened(config) as store:
        sender = Sender()
        for number in range(4):
            send(store, sender, kept=large(9), one=large(number))
            note_idle(store, number)
    full = room_for(config, 512 * KIB)
    with opened(full) as store:
        send(store, sender, kept=large(9), one=large(3), two=large(5))
        assert held(store) == {digest_of(large(number)) for number in (1, 2, 3, 5, 9)}
        assert_tree(store, sender)
        assert_books(store)
        assert sum(store.ledger.count().values()) <= (full.quota or 0)
    assert check(config).findings == []


def note_idle(store: Store, now: float) -> None:
    receive.Collection(store.state, store.cache, store.leases, 1).note_idle(now)


def test_content_that_was_asked_for_is_the_last_to_go(config: StoreConfig) -> None:
    """`missing` leases what it calls present; when the lease is over it is idle only since then."""
    with opened(config) as store:
        sender = Sender()
        for number in range(3):
            send(store, sender, one=noise(number))
            note_idle(store, number + 1)
        assert store.missing(NAME, [digest_of(noise(0)).hex()]).missing == []
        note_idle(store, 9)
        store.leases.drop(store.leases.add([], 0) - 1)
        note_idle(store, time.time())
        collection = receive.Collection(store.state, store.cache, store.leases, 1)
        assert collection.evict(1, time.time() + 1) == 64 * KIB
        assert digest_of(noise(1)) not in held(store) and digest_of(noise(0)) in held(store)


def test_what_was_let_go_a_moment_ago_stays(config: StoreConfig) -> None:
    """A grace has to be over; until then the quota is simply full, and the sentence says what to do."""
    with opened(config) as store:
        sender = Sender()
        send(store, sender, one=large(1))
        send(store, sender, one=large(2))
    with opened(room_for(config, 512 * KIB), evict_after_seconds=900.0) as store:
        with pytest.raises(NoSpace, match="remove what does not fit and push, release a pin"):
            send(store, sender, one=large(2), two=large(3))
        assert digest_of(large(1)) in held(store)


def test_leases_pins_adoption_and_plain_files_keep_content(config: StoreConfig, tmp_path: Path) -> None:
    """However much room is asked for, what anything needs is not touched."""
    with opened(config) as store:
        sender = Sender()
        for number in range(4):
            send(store, sender, one=noise(number))
            if number == 1:
                store.pin(NAME, sender.sequence)
        give_file(store, noise(10))
        folder = tmp_path / "models"
        folder.mkdir()
        (folder / "m").write_bytes(noise(11))
        Adoption(store, AdoptOptions()).run([folder])
        store.leases.add([digest_of(noise(2))], 60)
        collection = receive.Collection(store.state, store.cache, store.leases, 1)
        collection.note_idle(0)
        collection.evict(1 << 40, time.time())
        assert held(store) == {digest_of(noise(number)) for number in (1, 2, 3, 10, 11)}
        assert_books(store)


def test_a_running_server_makes_room_while_the_sender_waits(config: StoreConfig) -> None:
    """The bundle is told to come again; its second attempt finds the room."""
    with opened(config) as store:
        sender = Sender()
        send(store, sender, one=large(1))
        send(store, sender, one=large(2))
    with opened(room_for(config, 512 * KIB), quiet_seconds=60.0) as store:
        store.start()
        with pytest.raises(HostBusy, match="removing what nothing needs any more"):
            sender.send(store, sender.tree(one=large(2), two=large(3)))
        moment = threading.Event()
        while digest_of(large(1)) in held(store):
            moment.wait(0.01)
        sender.send(store, sender.tree(one=large(2), two=large(3)))


def test_room_is_made_beforehand_in_a_quiet_moment(config: StoreConfig) -> None:
    """With less than a twentieth of the quota free, idle content goes without anyone asking."""
    with opened(config) as store:
        sender = Sender()
        send(store, sender, one=large(1))
        send(store, sender, one=large(2))
    with opened(room_for(config, -290 * KIB)) as store:
        store.upkeep()
        assert held(store) == {digest_of(large(2))}


# --- pins ---


def test_a_pinned_sequence_outlives_the_others(config: StoreConfig) -> None:
    """Its tree and content stay however many come; unpinned, they go with the next collection."""
    with opened(config) as store:
        sender = Sender()
        for number in range(3):
            send(store, sender, one=noise(number))
            if not number:
                root = sender.root
                assert [each.pinned for each in store.pin(NAME, 1).sequences] == [True]
                store.pin(NAME, 1)  # twice is once
        store.collect()
        kept = store.sequences(NAME).sequences
        assert [(each.sequence, each.pinned) for each in kept] == [(1, True), (3, False)]
        assert store.directory(NAME, root) and digest_of(noise(0)) in held(store)
        with pytest.raises(SequenceGone, match="only 3 is"):
            store.pin(NAME, 2)
        assert [each.sequence for each in store.unpin(NAME, 1).sequences] == [1, 3][1:]
        store.unpin(NAME, 1)
        store.collect()
        assert held(store) == {digest_of(noise(2))}
    assert check(config).findings == []


def test_pins_are_bounded(config: StoreConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can pin without end."""
    monkeypatch.setattr(receive, "PINS_MAX", 1)
    with opened(config, keep_sequences=3) as store:
        sender = Sender()
        send(store, sender, one=noise(1))
        send(store, sender, one=noise(2))
        store.pin(NAME, 1)
        with pytest.raises(LimitExceeded, match="more than 1 pinned"):
            store.pin(NAME, 2)


# --- what a review found ---


def test_a_tenant_without_kept_bundles_is_counted_too(config: StoreConfig) -> None:
    """Its folder has what it has, and no more; a store with a quota opens all the same."""
    with opened(config, quota=100 << 20) as store:
        send_as(store, ALICE, Sender(), a=noise(1))
        store.catch_up()
        assert sum(store.ledger.count().values()) == du(config.data)
    opened(config, quota=100 << 20).stop()


def test_content_that_a_tenant_let_go_counts_no_more(config: StoreConfig) -> None:
    """Who deletes can push again, without a collection: what is idle makes way for whatever comes."""
    with opened(config, tenant_quota=160 * KIB) as store:
        alice = Sender()
        send_as(store, ALICE, alice, a=noise(1), b=noise(2))
        send_as(store, ALICE, alice)
        send_as(store, ALICE, alice, c=noise(3))
        assert store.ledger.usage(ALICE).bytes == 64 * KIB
        assert store.missing(qualified(ALICE, NAME), [digest_of(noise(1)).hex()]).missing == []  # a cache all the same


def test_a_deletion_is_taken_beyond_the_quota(config: StoreConfig) -> None:
    """Whatever became of the quota, who brings nothing is not refused."""
    with opened(config) as store:
        sender = Sender()
        send(store, sender, a=large(1), b=large(2))
    with opened(config, quota=1024 * KIB) as store:
        send(store, sender, a=large(1))
        assert_tree(store, sender)


def test_a_request_that_cannot_fit_empties_no_cache(config: StoreConfig) -> None:
    """Where all that is idle would not be enough, nothing of it goes, and the refusal tells no totals."""
    with opened(config) as store:
        sender = Sender()
        send(store, sender, one=large(1))
        send(store, sender, one=large(2))
    with opened(room_for(config, 0)) as store:
        asked = {"hostname": "h", "filepath": "/f", "file_size": 256 << 30, "blake3": "0" * 64}
        with pytest.raises(NoSpace) as refused:
            store.uploads.initiate(DEFAULT, wire.UploadRequest(kind="file", **asked))
        assert "held_bytes" not in refused.value.facts and "held" not in refused.value.sentence
        assert held(store) == {digest_of(large(1)), digest_of(large(2))}


def test_trouble_while_room_is_made_ends_in_a_refusal(config: StoreConfig) -> None:
    """A directory object of another workspace is gone: nobody is told to come again for ever."""
    with opened(config) as store:
        sender, other = Sender(), Sender(name=WorkspaceName("other"), client_id="c" * 32)
        send(store, other, sub__x=b"x")
        send(store, sender, one=large(1))
        send(store, sender, one=large(2))
        with store.state.write() as db:
            db.execute("DELETE FROM objects WHERE digest = ?", (other.root,))
    with Store(room_for(config, 512 * KIB)) as store:
        with pytest.raises(NoSpace):
            send(store, sender, one=large(2), two=large(3))
        assert not store._evictor.is_asked


def test_a_bundle_in_pieces_needs_no_more_room_than_in_one(config: StoreConfig) -> None:
    """Its file is not counted beside its content while that is taken from it."""
    sender = Sender()
    flat = sender.tree(a=large(1), b=large(2))
    metadata, sealed = sender.seal(flat)
    with opened(config) as store:
        store.ledger.count()
    with opened(room_for(config, 3 * 1024 * KIB)) as store:
        request = wire.UploadRequest(
            kind="bundle",
            workspace=NAME,
            identity=metadata.identity.hex(),
            file_size=len(sealed),
            chunk_size=len(sealed),
        )
        upload = store.uploads.initiate(DEFAULT, request, NAME).upload_id
        store.uploads.put(DEFAULT, upload, 0, io.BytesIO(sealed))
        store.complete_upload(DEFAULT, upload, wire.UploadComplete())
        sender.move_on(flat)
        assert_tree(store, sender)


def test_copies_that_went_are_found_out_before_anything_else_goes(config: StoreConfig) -> None:
    """A file that is edited again and again leaves nothing behind that counts."""
    with opened(config, link="copy") as store:
        sender = Sender()
        send(store, sender, one=large(0))
    with opened(room_for(config, 3 * 1024 * KIB), link="copy") as store:
        for number in range(1, 8):
            send(store, sender, one=large(number))
        assert_tree(store, sender)


def test_a_share_that_was_counted_without_a_damaged_blob_comes_back_right(config: StoreConfig) -> None:
    """Healing adds to a row that is not there."""
    with opened(config) as store:
        alice = Sender()
        send_as(store, ALICE, alice, a=noise(1))
        store.trees.quarantine([digest_of(noise(1))])
        with store.state.write() as db:
            count_again(db)
        send_as(store, BOB, Sender(client_id="b" * 32), a=noise(1))
        assert_books(store)
        assert store.ledger.usage(ALICE).bytes == 64 * KIB


def test_a_tenants_own_abandoned_stream_makes_way(config: StoreConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """It could be begun anew; nobody else's does."""
    monkeypatch.setattr(streams, "GIVES_WAY_SECONDS", -1.0)
    with opened(config, tenant_quota=100 * KIB) as store:
        send_part(store, Sender(), noise(1))
        send(store, Sender(name=WorkspaceName("other")), a=noise(2))
        assert store.streams.size_bytes() == 0


def test_questions_and_thin_bundles_wait_for_each_other_in_one_order(config: StoreConfig) -> None:
    """What is missing at a commit is leased outside of the writer's lock: nobody waits for ever."""
    with opened(config) as store:
        sender = Sender()
        send(store, sender, a=noise(1))
        send(store, sender)
        note_idle(store, 0)
        flat = sender.tree(a=noise(1), b=noise(7))
        asking = threading.Thread(
            target=lambda: [store.missing(NAME, [digest_of(noise(1)).hex()]) for _ in range(200)], daemon=True
        )
        asking.start()
        for _ in range(60):
            with pytest.raises(ContentMissing):
                sender.send(store, flat, is_thin=True)
        asking.join(60)
        assert not asking.is_alive()


def test_an_unpinned_sequence_is_listed_no_more_at_once(config: StoreConfig) -> None:
    """Nobody can be promised its objects from then on; a repeated pin takes no second place."""
    with opened(config) as store:
        sender = Sender()
        send(store, sender, one=noise(1))
        store.pin(NAME, 1)
        send(store, sender, one=noise(2))
        store.unpin(NAME, 1)
    with opened(config, keep_sequences=10) as store:
        assert [each.sequence for each in store.sequences(NAME).sequences] == [2]
