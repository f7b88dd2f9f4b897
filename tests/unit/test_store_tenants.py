"""Tenants in the store: what one holds is nobody else's, whichever way it is asked for."""

from __future__ import annotations

import io
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from folders import write
from sender import NAME, Sender, blob_of, give
from steps import steps_of

from deltasync.core import bundle, recipe
from deltasync.core.chunks import AVERAGE_BYTES
from deltasync.core.errors import ContentMissing, NotFound, UsageError
from deltasync.core.hashing import digest_of
from deltasync.core.manifest import Kind, Operation, Verb
from deltasync.core.names import NameRefused, WorkspaceName
from deltasync.core.recipe import Segment
from deltasync.core.wire import LARGE_BYTES
from deltasync_server.adopt import Adoption, AdoptOptions
from deltasync_server.check import check
from deltasync_server.collect import Collection
from deltasync_server.config import StoreConfig
from deltasync_server.journal import Journal
from deltasync_server.receive import Store
from deltasync_server.state import MIGRATIONS
from deltasync_server.tenants import DEFAULT, Tenant, own_name, parse_tenant, qualified, tenant_of

ALICE, BOB = Tenant("alice"), Tenant("bob")
CONTENT = bytes(range(256)) * 400


@pytest.fixture
def config(tmp_path: Path) -> StoreConfig:
    return StoreConfig(tmp_path / "data", keep_sequences=1)


@pytest.fixture
def store(config: StoreConfig) -> Iterator[Store]:
    with Store(config) as opened:
        opened.recover()
        yield opened


def sender_of(tenant: Tenant, name: str = NAME) -> Sender:
    return Sender(name=qualified(tenant, WorkspaceName(name)))


def send(store: Store, sender: Sender, **files: bytes) -> Sender:
    """Send a tree; the bundle itself names the workspace as its tenant does."""
    name, sender.name = sender.name, WorkspaceName(own_name(sender.name))
    flat = sender.tree(**files)
    metadata, sealed = sender.seal(flat)
    sender.name = name
    store.receive(name, io.BytesIO(sealed), expected_identity=metadata.identity)
    sender.move_on(flat)
    return sender


def holders(store: Store, digest: bytes) -> set[str]:
    with store.state.read() as db:
        return {tenant for (tenant,) in db.execute("SELECT tenant FROM holdings WHERE digest = ?", (digest,))}


def test_a_tenants_name_is_a_workspaces() -> None:
    """Names that could leave their folder, or pass for another's, are refused."""
    for wrong in ("", ".", "..", "a/b", ".hidden", "a\\b", "a\nb", " a"):
        with pytest.raises(NameRefused):
            parse_tenant(wrong)
    assert parse_tenant("default") == DEFAULT
    key = qualified(parse_tenant("alice"), WorkspaceName("media"))
    assert (tenant_of(key), own_name(key)) == ("alice", "media")
    assert (tenant_of("media"), own_name("media")) == (DEFAULT, "media")


def test_content_is_held_by_those_who_brought_it(store: Store) -> None:
    """One blob for both; each asks for it, and gets it, only after its own bytes came."""
    digest = digest_of(CONTENT)
    send(store, sender_of(ALICE), a=CONTENT)
    assert store.missing(qualified(BOB, NAME), [digest.hex()]).missing == [digest.hex()]
    assert store.missing(qualified(ALICE, WorkspaceName("other")), [digest.hex()]).missing == []
    with pytest.raises(NotFound):
        store.open_blob(BOB, digest)
    inode = blob_of(store.config.data, sender_of(ALICE).tree(a=CONTENT)["a"]).stat().st_ino
    send(store, sender_of(BOB), b=CONTENT)
    assert holders(store, digest) == {"alice", "bob"}
    assert blob_of(store.config.data, sender_of(BOB).tree(b=CONTENT)["b"]).stat().st_ino == inode
    stream, size = store.open_blob(BOB, digest)
    with stream:
        assert (stream.read(), size) == (CONTENT, len(CONTENT))


def test_foreign_content_is_looked_for_as_what_nobody_has(store: Store) -> None:
    """The same functions are called, of the system's too, and the same questions asked: no time of an answer tells."""
    content = bytes(LARGE_BYTES)
    send(store, sender_of(ALICE), a=content)
    send(store, sender_of(BOB), b=b"bob's")
    store.catch_up()
    bob, root = qualified(BOB, NAME), bytes.fromhex(store.workspace(sender_of(ALICE).name).root)
    questions: dict[str, Callable[[bytes], object]] = {
        "missing": lambda digest: store.missing(bob, [digest.hex()]),
        "blob": lambda digest: store.open_blob(BOB, digest),
        "blobs": lambda digest: b"".join(store.offer_blobs(BOB, [digest.hex()])),
        "recipe": lambda digest: store.offer_chunks(BOB, digest, AVERAGE_BYTES),
        "object": lambda digest: store.directory(bob, digest),
        "objects": lambda digest: b"".join(store.offer_objects(bob, [digest.hex()])),
        "sizes": lambda digest: store.sizes(bob, [LARGE_BYTES if digest == digest_of(content) else LARGE_BYTES + 1]),
    }

    def steps(ask: Callable[[bytes], object], digest: bytes) -> list[str]:
        hidden = {digest.hex(): "DIGEST", digest.hex().upper(): "DIGEST"}
        readers = list(store.state._readers.queue)
        return steps_of(lambda: ask(digest), [store.state._writer, *readers], hidden)

    for name, ask in questions.items():
        foreign = root if name.startswith("object") else digest_of(content)
        steps(ask, digest_of(b"to be ready"))
        found, absent = steps(ask, foreign), steps(ask, digest_of(b"nobody has this"))
        assert [step.replace(foreign.hex(), "DIGEST") for step in found] == [
            step.replace(digest_of(b"nobody has this").hex(), "DIGEST") for step in absent
        ], name
        assert any("SELECT" in step for step in found), name


def test_foreign_content_is_no_base_of_a_recipe(store: Store) -> None:
    """A recipe that takes bytes from what the sender does not hold makes nothing, as if the base were not there."""
    base = digest_of(CONTENT)
    send(store, sender_of(ALICE), a=CONTENT)
    target = CONTENT[:50_000]
    made = recipe.compose((base,), [Segment(1, 0, len(target))])
    for tenant, is_known in ((BOB, False), (ALICE, True)):
        sender = sender_of(tenant, "thief")
        key, sender.name = sender.name, WorkspaceName("thief")
        flat = sender.tree(f=target)
        operation = Operation(
            operation=Verb.CREATED,
            kind=Kind.FILE,
            path="f",
            digest=digest_of(target).hex(),
            size=len(target),
            mtime_ns=flat["f"].mtime_ns,
        )
        metadata = sender.compose([operation], sender.objects.build(flat), recipe.FEATURE)
        sealed = b"".join(
            bundle.seal(metadata, [operation.digest or ""], lambda _: iter(()), recipes={operation.digest or "": made})
        )
        if is_known:
            assert store.receive(key, io.BytesIO(sealed), expected_identity=metadata.identity).sequence == 1
        else:
            with pytest.raises(ContentMissing):
                store.receive(key, io.BytesIO(sealed), expected_identity=metadata.identity)
            assert holders(store, digest_of(target)) == set()


def test_nobody_learns_of_which_sizes_others_hold_content(store: Store) -> None:
    """The sizes of large contents are told to whoever holds one of them, and to nobody else (H-135)."""
    both, hers = bytes(LARGE_BYTES), bytes(LARGE_BYTES + 1)
    send(store, sender_of(ALICE), a=both, b=hers)
    bob = send(store, sender_of(BOB), a=both)
    assert store.sizes(bob.name, [LARGE_BYTES, LARGE_BYTES + 1]).held == [LARGE_BYTES]
    assert store.sizes(sender_of(ALICE).name, [LARGE_BYTES, LARGE_BYTES + 1]).held == [LARGE_BYTES, LARGE_BYTES + 1]


def test_collection_forgets_who_held_what_is_gone(store: Store) -> None:
    """Content that goes with its last name leaves no row, and is missing to everybody from then on."""
    alice = send(store, sender_of(ALICE), a=CONTENT, b=b"stays")
    send(store, alice, b=b"stays")
    store.catch_up()
    found = store.collect()
    assert found.blobs == 1
    with store.state.read() as db:
        known = "SELECT digest FROM blobs UNION SELECT digest FROM objects"
        dangling = db.execute(f"SELECT count(*) FROM holdings WHERE digest NOT IN ({known})").fetchone()
    assert dangling == (0,) and holders(store, digest_of(CONTENT)) == set()


@pytest.mark.parametrize("others", [(), (CONTENT,)], ids=["nobody", "somebody"])
@pytest.mark.parametrize("how", ["evict", "collect"])
def test_nobody_learns_whether_others_need_what_it_let_go(config: StoreConfig, others: tuple[bytes], how: str) -> None:
    """What goes of one's idle content is missing then, also where another needs it and the blob stays (ST-105)."""
    alone = b"of alice alone"
    digests = [digest_of(content).hex() for content in (CONTENT, alone)]
    with Store(config) as store:
        store.recover()
        alice = send(store, sender_of(ALICE), a=CONTENT, b=alone)
        send(store, sender_of(BOB), **{f"c{number}": content for number, content in enumerate(others)})
        send(store, alice)
        collection = Collection(store.state, store.cache, store.leases, 1)
        collection.note_idle(5)
        usage = store.ledger.usage(ALICE)
        if how == "evict":
            collection.evict(1 << 30, 5)
        else:
            store.collect()
        assert (store.missing(alice.name, digests).missing, usage.bytes) == (digests, 0)
        assert holders(store, digest_of(CONTENT)) == ({"bob"} if others else set())


def test_what_one_asks_for_stays_no_longer_for_others(store: Store) -> None:
    """A lease, and the time since which content is idle, are each tenant's own."""
    digest = digest_of(CONTENT).hex()
    alice, bob = (send(store, sender_of(tenant), a=CONTENT) for tenant in (ALICE, BOB))
    send(store, alice, b=b"of alice alone")
    send(store, alice)
    send(store, bob)
    Collection(store.state, store.cache, store.leases, 1).note_idle(5)
    assert store.missing(bob.name, [digest]).missing == []
    Collection(store.state, store.cache, store.leases, 1).evict(1 << 30, 5)
    assert store.missing(alice.name, [digest]).missing == [digest]
    assert store.missing(bob.name, [digest]).missing == []


def test_damaged_content_that_another_brings_again_is_whose_it_was(store: Store) -> None:
    """A tenant is asked for it no longer when it is back, so it must be able to read it."""
    digest = digest_of(CONTENT)
    alice = send(store, sender_of(ALICE), a=CONTENT)
    blob = blob_of(store.config.data, alice.tree(a=CONTENT)["a"])
    blob.chmod(0o644)
    blob.write_bytes(b"rotten")
    with pytest.raises(NotFound):
        store.open_blob(ALICE, digest)
    assert store.workspace(alice.name).wanted == [digest.hex()]
    send(store, sender_of(BOB), b=CONTENT)
    assert store.workspace(alice.name).wanted == []
    stream, _ = store.open_blob(ALICE, digest)
    with stream:
        assert stream.read() == CONTENT


def test_trees_of_tenants_lie_apart_and_survive_a_restart(config: StoreConfig) -> None:
    """The same name twice: two folders, also after recovery, and `check` finds both sound."""
    with Store(config) as store:
        store.recover()
        for tenant in (DEFAULT, ALICE, BOB):
            send(store, sender_of(tenant), f=tenant.encode() or b"default")
        store.catch_up()
    with Store(config) as store:
        store.recover()
        store.catch_up()
        for tenant, place in ((DEFAULT, ""), (ALICE, "tenants/alice/"), (BOB, "tenants/bob/")):
            tree = config.data / f"{place}workspaces/{NAME}/tree"
            assert store.trees.path(qualified(tenant, NAME)) == tree
            assert (tree / "f").read_bytes() == (tenant.encode() or b"default")
            (state,) = store.workspaces(tenant)
            assert (state.workspace, state.tree_path) == (NAME, str(tree))
    assert check(config).is_sound


def test_kept_bundles_of_tenants_lie_apart(config: StoreConfig) -> None:
    """--keep-bundles files them below their tenant, where no workspace of another can be."""
    with Store(replace(config, keep_bundles=True)) as store:
        store.recover()
        send(store, sender_of(ALICE), a=b"x")
        assert isinstance(store.journal, Journal)
        store.journal.checkpoint()
    assert len(list((config.data / f"tenants/alice/bundles/{NAME}").iterdir())) == 1


def test_adopted_content_is_its_tenants(store: Store, tmp_path: Path) -> None:
    """`adopt --tenant` spares that tenant's first push, and nobody else's."""
    write(tmp_path / "media", "a", CONTENT)
    Adoption(store, AdoptOptions(tenant=ALICE)).run([tmp_path / "media"])
    assert holders(store, digest_of(CONTENT)) == {"alice"}
    Adoption(store, AdoptOptions()).run([tmp_path / "media"])
    assert holders(store, digest_of(CONTENT)) == {"alice", DEFAULT}


def test_a_sender_that_lost_its_leave_commits_nothing(store: Store) -> None:
    """The leave is asked for behind all that was received, before the head moves."""
    sender = Sender()
    metadata, sealed = sender.seal(sender.tree(a=b"x"))
    seen = []

    def permit() -> None:
        seen.append(store.workspace(NAME).sequence)
        raise UsageError("revoked")

    with pytest.raises(UsageError):
        store.receive(NAME, io.BytesIO(sealed), expected_identity=metadata.identity, permit=permit)
    assert seen == [0] and store.workspace(NAME).sequence == 0
    assert give(store, metadata, sealed).sequence == 1


def test_what_was_there_before_there_were_tenants_is_the_default_tenants(config: StoreConfig) -> None:
    """A store of the release before keeps working: its content, uploads and files belong to the default tenant."""
    with Store(config) as store:
        store.recover()
        send(store, Sender(), a=CONTENT)
        root = bytes.fromhex(store.workspace(NAME).root)
    db = sqlite3.connect(config.data / "state.db")
    with db:  # undo the migrations from that release on
        for trigger in ("blob_came", "blob_goes", "holding_came", "holding_goes", "holding_went"):
            db.execute(f"DROP TRIGGER {trigger}")
        for table in ("cached", "shares", "idle", "pins", "let_go", "jobs"):
            db.execute(f"DROP TABLE {table}")
        db.execute("DROP INDEX blobs_large")
        db.execute("DROP TABLE holdings")
        db.execute("DROP TABLE scrub")
        db.execute("ALTER TABLE uploads DROP COLUMN tenant")
        db.execute("DROP TABLE files")
        db.execute(
            "CREATE TABLE files (hostname TEXT NOT NULL, filepath TEXT NOT NULL, digest BLOB NOT NULL, sha256 TEXT NOT "
            "NULL, file_id TEXT NOT NULL, stored_at TEXT NOT NULL, deleted_at TEXT, "
            "PRIMARY KEY (hostname, filepath, digest))"
        )
        db.execute("INSERT INTO files VALUES ('h', '/f', ?, 's', 'id', 'now', NULL)", (digest_of(CONTENT),))
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS) - 7}")
    db.close()
    with Store(config) as store:
        store.recover()
        assert holders(store, digest_of(CONTENT)) == holders(store, root) == {DEFAULT}
        assert store.missing(NAME, [digest_of(CONTENT).hex()]).missing == []
        with store.state.read() as read:
            assert read.execute("SELECT tenant, hostname FROM files").fetchall() == [("", "h")]
            assert read.execute("SELECT * FROM shares").fetchall() == [("", 1, len(CONTENT))]
