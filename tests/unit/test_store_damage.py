"""Damage: a blob that changed on disk is noticed before it is used, quarantined, and healed by the client."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sender import DAY, NAME, Sender, assert_tree, blob_of, give_file, seen, tree_of, zero

from deltasync.core import wire
from deltasync.core.errors import AlreadyRunning, ContentMissing, NotFound
from deltasync_server.blobs import Cache
from deltasync_server.check import check
from deltasync_server.config import StoreConfig
from deltasync_server.place import Placer
from deltasync_server.receive import Store
from deltasync_server.tenants import DEFAULT


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(StoreConfig(tmp_path)) as opened:
        opened.recover()
        yield opened


def overwrite(path: Path, content: bytes) -> None:
    """Write into a file as a job that runs as root does: read-only modes do not stop it, the time gives it away."""
    path.chmod(0o644)
    path.write_bytes(content)
    path.chmod(0o444)


def settled(store: Store, sender: Sender, **files: bytes) -> dict[str, object]:
    flat = sender.tree(**files)
    sender.send(store, flat)
    assert_tree(store, sender)
    store.upkeep()
    return flat


def test_a_damaged_blob_is_never_served(store: Store) -> None:
    """Wrong bytes are quarantined at their next use, leave every tree, and are asked for; then a bundle heals them."""
    sender, other = Sender(), Sender(name=type(NAME)("other"))
    flat = settled(store, sender, sub__a=b"right", b=b"fine")
    settled(store, other, x=b"right")
    entry = sender.flat["sub/a"]
    overwrite(tree_of(store) / "sub" / "a", b"wrong")
    with pytest.raises(NotFound):
        store.open_blob(DEFAULT, entry.digest)
    assert store.workspace(NAME).wanted == [entry.digest.hex()]
    assert store.workspace(type(NAME)("other")).wanted == [entry.digest.hex()]
    assert set(seen(tree_of(store))) == {"sub", "b"}
    assert seen(tree_of(store, "other")) == {}
    assert len(list((store.config.data / "quarantine").iterdir())) == 1
    assert store.missing(NAME, [entry.digest.hex()]).missing == [entry.digest.hex()]
    sender.heal(store, [entry.digest])
    assert store.workspace(NAME).wanted == []
    assert_tree(store, sender)
    assert_tree(store, other)
    assert flat


def test_wrong_bytes_are_noticed_when_a_tree_needs_them(store: Store) -> None:
    """A blob is looked at before it is linked: the tree gets no damaged file, and the copy that is right stays."""
    sender = Sender()
    settled(store, sender, a=b"right", z=b"fine")
    flat = {**sender.flat, "b": sender.file("b", b"right")}
    sender.send(store, flat, is_thin=True)
    overwrite(blob_of(store.config.data, sender.flat["a"]), b"wrong")
    store.catch_up()
    assert set(seen(tree_of(store))) == {"z"}
    assert store.workspace(NAME).wanted == [flat["a"].digest.hex()]
    sender.heal(store, [flat["a"].digest])
    assert_tree(store, sender)


def test_right_bytes_get_their_time_back(store: Store) -> None:
    """A touched blob is hashed once; its bytes are right, so its time and mode are restored."""
    sender = Sender()
    settled(store, sender, a=b"right")
    blob = blob_of(store.config.data, sender.flat["a"])
    os.utime(blob, ns=(DAY // 2, DAY // 2))
    blob.chmod(0o666)
    stream, size = store.open_blob(DEFAULT, sender.flat["a"].digest)
    stream.close()
    assert (size, blob.stat().st_mtime_ns, blob.stat().st_mode & 0o777) == (5, DAY, 0o444)
    assert_tree(store, sender)


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """Let nothing be opened while the block runs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open("/dev/null", os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_running_out_of_descriptors_gives_no_blob_up(store: Store) -> None:
    """A look at a doubted blob that cannot even open it fails, and says nothing of the blob."""
    sender = Sender()
    settled(store, sender, a=b"right")
    digest = sender.flat["a"].digest
    with no_descriptors(), pytest.raises(OSError, match="Too many open files"):
        store.cache.holds_right_bytes(digest)  # a descriptor may be free again when it is to be taken out
    with no_descriptors(), pytest.raises(OSError, match="Too many open files"):
        store.trees.prove([digest])
    os.utime(blob_of(store.config.data, sender.flat["a"]), ns=(DAY // 2, DAY // 2))
    with no_descriptors(), pytest.raises(OSError, match="Too many open files"):
        store.open_blob(DEFAULT, digest)
    assert store.workspace(NAME).wanted == []
    store.open_blob(DEFAULT, digest)[0].close()
    assert_tree(store, sender)


def test_a_vanished_blob_is_asked_for(store: Store) -> None:
    """A blob that somebody removed is asked for, and a bundle that only names it is told so."""
    sender = Sender()
    settled(store, sender, a=b"right")
    blob_of(store.config.data, sender.flat["a"]).unlink()
    with pytest.raises(NotFound):
        store.open_blob(DEFAULT, sender.flat["a"].digest)
    with pytest.raises(ContentMissing):
        sender.send(store, {**sender.flat, "b": sender.file("b", b"right")}, is_thin=True)
    sender.send(store, {**sender.flat, "b": sender.file("b", b"right")})
    assert_tree(store, sender)
    assert os.path.samefile(tree_of(store) / "a", tree_of(store) / "b")


def vanish(blob: Path) -> None:
    blob.unlink()


def go_bad(blob: Path) -> None:
    overwrite(blob, b"wrong")


def be_touched(blob: Path) -> None:
    os.utime(blob, ns=(1, 1))


@pytest.mark.parametrize("harm", [vanish, go_bad, be_touched])
@pytest.mark.parametrize("asks", [True, False])
def test_content_is_acknowledged_only_while_its_file_is_as_it_was_left(
    store: Store, harm: Callable[[Path], None], *, asks: bool
) -> None:
    """A row is no content: whoever asks, or names it in a bundle, is told that it is missing, and it is seen to."""
    sender, other = Sender(), Sender(name=type(NAME)("other"))
    settled(store, other, x=b"right")
    entry = other.flat["x"]
    harm(blob_of(store.config.data, entry))
    flat = {"y": sender.file("y", b"right")}
    if asks:
        assert store.missing(NAME, [entry.digest.hex()]).missing == [entry.digest.hex()]
    else:
        with pytest.raises(ContentMissing):
            sender.send(store, flat, is_thin=True)
    assert store.workspace(NAME).sequence == 0
    store.trees.bring_forward(NAME)
    assert store.workspace(other.name).wanted == ([] if harm is be_touched else [entry.digest.hex()])
    sender.send(store, flat, is_thin=harm is be_touched)
    assert_tree(store, sender)
    assert_tree(store, other)


def test_content_that_comes_again_while_it_is_doubted_stays(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sender is quicker than the look at damaged files: what it brought is not taken for them."""
    sender = Sender()
    settled(store, sender, a=b"right", b=b"fine")
    damaged = [sender.flat[name].digest for name in "ab"]
    for name in "ab":
        overwrite(blob_of(store.config.data, sender.flat[name]), b"wrong")
    assert len(store.missing(NAME, [digest.hex() for digest in damaged]).missing) == 2
    holds_right_bytes, seen_before = Cache.holds_right_bytes, list[bytes]()

    def heal_the_one_before(cache: Cache, digest: bytes) -> bool:
        if seen_before:
            monkeypatch.undo()
            sender.heal(store, seen_before)
        seen_before.append(digest)
        return holds_right_bytes(cache, digest)

    monkeypatch.setattr(Cache, "holds_right_bytes", heal_the_one_before)
    store.catch_up()
    left = set(damaged) - {seen_before[0]}
    assert store.workspace(NAME).wanted == [digest.hex() for digest in left]
    sender.heal(store, left)
    assert_tree(store, sender)


def test_content_that_comes_again_replaces_a_changed_blob(store: Store) -> None:
    """A bundle that carries what the cache holds damaged, unnoticed so far, heals it and every tree."""
    sender, other = Sender(), Sender(name=type(NAME)("other"))
    settled(store, other, x=b"right")
    overwrite(blob_of(store.config.data, other.flat["x"]), b"wrong")
    sender.send(store, sender.tree(a=b"right"))
    assert_tree(store, sender)
    assert_tree(store, other)


@pytest.mark.parametrize("is_noticed", [True, False])
def test_a_plain_file_heals_every_tree(store: Store, *, is_noticed: bool) -> None:
    """Content that comes as a plain file comes back into trees that lacked it, or were linked to the damaged file."""
    sender = Sender()
    settled(store, sender, a=b"right", b=b"fine")
    overwrite(tree_of(store) / "a", b"wrong")
    if is_noticed:
        with pytest.raises(NotFound):
            store.open_blob(DEFAULT, sender.flat["a"].digest)
    store.start()
    give_file(store, b"right")
    file = tree_of(store) / "a"
    store.trees.wait_for(lambda: file.exists() and file.read_bytes() == b"right", 20)
    assert (file.read_bytes(), store.workspace(NAME).wanted) == (b"right", [])
    assert_tree(store, sender)


def test_content_that_comes_while_a_tree_is_placing_it_is_placed_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A blob that goes bad and is healed between its placing and the end of the move leaves no wrong file behind."""
    sender = Sender()
    settled(store, sender, a=b"right", b=b"fine")
    entry = sender.flat["a"]

    def damage() -> None:
        overwrite(blob_of(store.config.data, entry), b"wrong")

    damage()
    with pytest.raises(NotFound):
        store.open_blob(DEFAULT, entry.digest)
    sender.heal(store, [entry.digest])
    finish, left = Placer.finish, [damage, lambda: sender.heal(store, [entry.digest])]

    def finish_late(placer: Placer) -> None:
        finish(placer)
        while left:
            left.pop(0)()

    monkeypatch.setattr(Placer, "finish", finish_late)
    store.catch_up()
    assert not left and store.workspace(NAME).wanted == []
    assert_tree(store, sender)


def test_content_that_is_here_is_not_asked_for_again_and_again(tmp_path: Path) -> None:
    """A row that asks for content which has a blob, as an earlier release left it, is found and ends with a bundle."""
    sender = Sender()
    with Store(StoreConfig(tmp_path)) as store:
        store.recover()
        settled(store, sender, a=b"right", b=b"fine")
        with store.state.write() as db:
            db.execute("INSERT INTO wanted VALUES (?, ?, 0)", (NAME, sender.flat["a"].digest))
        (tree_of(store) / "a").unlink()
    assert [finding.subject for finding in check(StoreConfig(tmp_path)).findings] == [f"{NAME} a"]
    with Store(StoreConfig(tmp_path)) as store:
        sender.heal(store, [sender.flat["a"].digest])
        assert_tree(store, sender)
        assert store.workspace(NAME).wanted == []


def test_a_deleted_file_is_no_longer_asked_for(store: Store) -> None:
    """What the head does not name any more is not wanted."""
    sender = Sender()
    settled(store, sender, a=b"right", b=b"fine")
    overwrite(tree_of(store) / "a", b"wrong")
    with pytest.raises(NotFound):
        store.open_blob(DEFAULT, sender.flat["a"].digest)
    sender.send(store, sender.tree(b=b"fine"))
    assert_tree(store, sender)
    assert store.workspace(NAME).wanted == []


def test_check_finds_a_sound_store_sound(tmp_path: Path) -> None:
    """A check of a whole store finds nothing, and says how much it looked at."""
    sender = Sender()
    with Store(StoreConfig(tmp_path)) as store:
        store.recover()
        settled(store, sender, a=b"one", sub__b=b"two")
        with pytest.raises(AlreadyRunning):
            check(StoreConfig(tmp_path))
    report = check(StoreConfig(tmp_path))
    assert report.findings == [] and report.is_sound
    assert (report.blobs, report.blob_bytes, report.receipts, report.workspaces) == (2, 6, 1, 1)


def test_check_needs_a_store(tmp_path: Path) -> None:
    """A folder without a store is not made one."""
    with pytest.raises(NotFound):
        check(StoreConfig(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_check_finds_every_damage_and_repair_heals_it(tmp_path: Path) -> None:
    """Zeros under an unchanged fingerprint, changed copies, strays and foreign files are found, then repaired."""
    sender = Sender()
    with Store(StoreConfig(tmp_path)) as store:
        store.recover()
        flat = sender.tree(a=b"one" * 50, sub__b=b"two" * 50)
        flat["twin"] = sender.file("twin", b"two" * 50, mtime_ns=5 * DAY)
        sender.send(store, flat)
        assert_tree(store, sender)
        store.upkeep()
        tree = tree_of(store)
    zero(blob_of(tmp_path, flat["a"]))
    zero(tree / "twin")
    (tree / "foreign").write_text("x")
    (tmp_path / "cache" / "00" / ("00" * 32)).write_text("stray")
    os.utime(blob_of(tmp_path, flat["sub/b"]), ns=(1, 1))
    report = check(StoreConfig(tmp_path))
    assert not report.is_sound
    assert {(finding.kind, finding.problem.split()[-1]) for finding in report.findings} == {
        ("blob", "wrong"),
        ("blob", "changed"),
        ("stray", "it"),
        ("tree", "says"),
    }
    repaired = check(StoreConfig(tmp_path), repair=True)
    assert [finding.kind for finding in repaired.findings if not finding.is_repaired] == ["content"]
    left = check(StoreConfig(tmp_path)).findings
    assert [(finding.kind, finding.subject) for finding in left] == [("content", f"{NAME} {flat['a'].digest.hex()}")]
    with Store(StoreConfig(tmp_path)) as store:
        store.recover()
        assert store.workspace(NAME).wanted == [flat["a"].digest.hex()]
        sender.heal(store, [flat["a"].digest])
        assert_tree(store, sender)
    assert check(StoreConfig(tmp_path)).findings == []


def test_check_rebuilds_from_the_journal(tmp_path: Path) -> None:
    """What is still in the journal is repaired without asking the client."""
    sender = Sender()
    with Store(StoreConfig(tmp_path)) as store:
        store.recover()
        flat = sender.tree(a=b"one" * 50)
        sender.send(store, flat)
        assert_tree(store, sender)
    zero(blob_of(tmp_path, flat["a"]))
    assert not check(StoreConfig(tmp_path)).is_sound
    assert check(StoreConfig(tmp_path), repair=True).findings == []
    assert check(StoreConfig(tmp_path)).findings == []


def test_check_names_plain_files_whose_content_is_lost(tmp_path: Path) -> None:
    """No repair makes an uploaded file again: a check goes on naming it until it comes again or is marked deleted."""
    with Store(StoreConfig(tmp_path)) as store:
        store.recover()
        stored = give_file(store, b"lost", "/home/alice/one")
        give_file(store, b"lost", "/home/alice/two")
        give_file(store, b"fine")
    blob = tmp_path / "cache" / stored.blake3[:2] / stored.blake3
    zero(blob)
    assert [finding.kind for finding in check(StoreConfig(tmp_path)).findings] == ["blob"]
    repaired, again = check(StoreConfig(tmp_path), repair=True), check(StoreConfig(tmp_path))
    lost = [f"host /home/alice/{name} {stored.blake3}" for name in ("one", "two")]
    for report in (repaired, again):
        assert not report.is_sound
        assert [finding.subject for finding in report.findings if not finding.is_repaired] == lost
    with Store(StoreConfig(tmp_path)) as store:
        deletion = wire.FileDeletion(hostname="host", filepath="/home/alice/two", blake3=stored.blake3)
        store.files.delete(DEFAULT, [deletion])
        give_file(store, b"lost", "/home/alice/one")
    assert check(StoreConfig(tmp_path)).findings == []


def test_check_follows_receipts_and_objects(tmp_path: Path) -> None:
    """A gap in the receipts, an object with other bytes and a name without content are found."""
    sender = Sender()
    with Store(StoreConfig(tmp_path)) as store:
        store.recover()
        for number in range(3):
            settled(store, sender, sub__n=b"%d" % number)
        with store.state.write() as db:
            db.execute("DELETE FROM receipts WHERE sequence = 2")
            db.execute("DELETE FROM blobs WHERE digest = ?", (sender.flat["sub/n"].digest,))
            db.execute("UPDATE objects SET body = ? WHERE rowid = 1", (b"\x90",))
    report = check(StoreConfig(tmp_path))
    assert {"receipt", "object", "content", "stray"} <= {finding.kind for finding in report.findings}
