"""Recovery: whatever an interruption tore is whole again after the next start."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sender import DAY, NAME, Sender, assert_tree, blob_of, give, give_file, seen, tree_of, zero

from deltasync.core.bundle import content_operations
from deltasync.core.errors import Corrupt, NoSpace, NotFound
from deltasync.core.manifest import EMPTY_ROOT, Entry
from deltasync.disk import Folder
from deltasync_server.adopt import Adoption, AdoptOptions
from deltasync_server.check import check
from deltasync_server.config import StoreConfig
from deltasync_server.place import Placer
from deltasync_server.receive import Store
from deltasync_server.state import blob_rows, workspace_row, write_blobs
from deltasync_server.tenants import DEFAULT


def opened(data: Path, **settings: object) -> Store:
    store = Store(StoreConfig(data, **settings))  # type: ignore[arg-type]
    store.recover()
    return store


def truncate(path: Path) -> None:
    path.chmod(0o644)
    times = path.stat().st_mtime_ns
    os.truncate(path, 0)
    os.utime(path, ns=(times, times))
    path.chmod(0o444)


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("tear", [truncate, zero, remove])
def test_torn_blobs_are_rebuilt_from_the_journal(tmp_path: Path, tear: Callable[[Path], None]) -> None:
    """A blob that a power cut left empty, full of zeros or without a name comes back, and so do its tree files."""
    sender = Sender()
    with opened(tmp_path) as store:
        flat = {
            "a": sender.file("a", b"one" * 1000),
            "b": sender.file("b", b"two" * 1000),
            "copy": sender.file("copy", b"one" * 1000, mtime_ns=3 * DAY),
        }
        sender.send(store, flat)
        assert_tree(store, sender)
    tear(blob_of(tmp_path, flat["a"]))
    with opened(tmp_path) as store:
        assert store.workspace(NAME).tree_sequence is None
        assert_tree(store, sender)
        assert store.workspace(NAME).wanted == []
        stream, _ = store.open_blob(DEFAULT, flat["a"].digest)
        with stream:
            assert stream.read() == b"one" * 1000


def test_other_workspaces_are_repaired_too(tmp_path: Path) -> None:
    """A rebuilt blob is a new inode: every tree that was linked to the torn one gets it."""
    sender, other = Sender(), Sender(name=type(NAME)("other"))
    with opened(tmp_path) as store:
        other.send(store, other.tree(x=b"shared"))
        assert_tree(store, other)
        store.upkeep()
        sender.send(store, sender.tree(a=b"shared"))
        assert_tree(store, sender)
    with opened(tmp_path) as store:
        assert_tree(store, other)
        assert_tree(store, sender)


def test_after_a_checkpoint_the_journal_is_empty(tmp_path: Path) -> None:
    """A checkpoint releases the journal files; the next start has nothing to hash and trusts the tree."""
    sender = Sender()
    with opened(tmp_path) as store:
        sender.send(store, sender.tree(a=b"one", sub__b=b"two"))
        assert_tree(store, sender)
        assert len(list((tmp_path / "journal").iterdir())) == 1
        store.upkeep()
        assert not list((tmp_path / "journal").iterdir())
    with opened(tmp_path) as store:
        assert store.workspace(NAME).tree_sequence == 1
        assert_tree(store, sender)


@pytest.mark.parametrize("spoil", ["removed", "touched", "fifo", "folder"])
def test_a_checkpoint_makes_changed_blobs_again(tmp_path: Path, spoil: str) -> None:
    """The journal is not released before what it carries is in the cache: a changed blob is written again from it."""
    sender = Sender()
    with opened(tmp_path) as store:
        flat = sender.tree(a=b"one", b=b"two")
        sender.send(store, flat)
        assert_tree(store, sender)
        blob = blob_of(tmp_path, flat["a"])
        if spoil == "touched":
            os.utime(blob, ns=(1, 1))
        else:
            blob.unlink()
        if spoil == "fifo":
            os.mkfifo(blob)
        if spoil == "folder":
            blob.mkdir()
        store.upkeep()
        assert not list((tmp_path / "journal").iterdir())
        assert_tree(store, sender)
        assert store.workspace(NAME).wanted == []
        assert os.path.samefile(tree_of(store) / "a", blob)


def test_what_a_reader_found_damaged_comes_back_from_the_journal(tmp_path: Path) -> None:
    """A blob that was taken out before its checkpoint is put back by it; the journal is not released before."""
    sender = Sender()
    with opened(tmp_path) as store:
        flat = sender.tree(a=b"one" * 1000, b=b"two")
        sender.send(store, flat)
        assert_tree(store, sender)
        truncate(blob_of(tmp_path, flat["a"]))
        with pytest.raises(NotFound):
            store.open_blob(DEFAULT, flat["a"].digest)
        assert store.workspace(NAME).wanted == [flat["a"].digest.hex()]
        store.upkeep()
        assert_tree(store, sender)
        assert store.workspace(NAME).wanted == [] and not list((tmp_path / "journal").iterdir())


def test_a_journal_that_may_have_what_is_asked_for_stays(tmp_path: Path) -> None:
    """While a journal cannot give what the cache has lost it is kept, and others are released; a client may heal it."""
    sender, other = Sender(), Sender(name=type(NAME)("other"))
    with opened(tmp_path) as store:
        flat = sender.tree(a=b"one" * 1000)
        sender.send(store, flat)
        assert_tree(store, sender)
        (journal,) = (tmp_path / "journal").iterdir()
        journal.write_bytes(b"damaged")
        other.send(store, other.tree(x=b"other"))
        truncate(blob_of(tmp_path, flat["a"]))
        with pytest.raises(NotFound):
            store.open_blob(DEFAULT, flat["a"].digest)
        store.upkeep()
        assert list((tmp_path / "journal").iterdir()) == [journal]
        sender.heal(store, [flat["a"].digest])
        store.upkeep()
        assert_tree(store, sender)
        assert not list((tmp_path / "journal").iterdir())


def test_a_second_journal_gives_what_the_first_cannot(tmp_path: Path) -> None:
    """A torn blob that two journalled bundles carry is rebuilt from the one that can be read."""
    sender, other = Sender(), Sender(name=type(NAME)("other"))
    with opened(tmp_path) as store:
        flat = sender.tree(a=b"one" * 1000)
        sender.send(store, flat)
        (first,) = (tmp_path / "journal").iterdir()
        remove(blob_of(tmp_path, flat["a"]))
        other.send(store, other.tree(a=b"one" * 1000))
    first.write_bytes(b"damaged")
    truncate(blob_of(tmp_path, flat["a"]))
    with opened(tmp_path) as store:
        assert_tree(store, sender)
        assert_tree(store, other)
        assert store.workspace(NAME).wanted == []


def test_a_failed_write_of_rows_removes_no_blob_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that makes a blob anew and cannot write its row leaves a blob under its name."""
    sender = Sender()
    with opened(tmp_path) as store:
        flat = sender.tree(a=b"one" * 1000)
        sender.send(store, flat)
        assert_tree(store, sender)
        os.utime(blob_of(tmp_path, flat["a"]), ns=(1, 1))

        @contextmanager
        def full() -> Iterator[sqlite3.Connection]:
            raise NoSpace("no room for rows")
            yield

        with monkeypatch.context() as patch:
            patch.setattr(store.state, "write", full)
            assert store.journal.checkpoint() == 0
        assert blob_of(tmp_path, flat["a"]).read_bytes() == b"one" * 1000
        store.upkeep()
        assert_tree(store, sender)
        assert store.workspace(NAME).wanted == []


@pytest.mark.parametrize("way", ["sound_rows", "prove"])
def test_what_is_healed_while_it_is_read_is_not_taken_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Whoever found a blob wrong quarantines the file that it read, not one that a bundle brought meanwhile."""
    sender = Sender()
    with opened(tmp_path) as store:
        flat = sender.tree(a=b"one" * 1000)
        sender.send(store, flat)
        assert_tree(store, sender)
        store.upkeep()
        blob = blob_of(tmp_path, flat["a"])
        blob.chmod(0o644)
        blob.write_bytes(b"bad" * 1000)
        quarantine = store.trees.quarantine

        def late(*arguments: Any, **options: Any) -> None:
            blob.rename(tmp_path / "damaged")  # its inode stays in use, as that of a file that is being read
            blob.write_bytes(b"one" * 1000)
            quarantine(*arguments, **options)

        monkeypatch.setattr(store.trees, "quarantine", late)
        getattr(store.trees, way)([flat["a"].digest])
        assert blob.read_bytes() == b"one" * 1000


def test_kept_bundles_are_the_bundles_that_came(tmp_path: Path) -> None:
    """With keep_bundles a checkpoint moves the bundle to DATA/bundles, under its name and byte for byte."""
    sender = Sender()
    with opened(tmp_path, keep_bundles=True) as store:
        flat = sender.tree(a=b"one")
        metadata, sealed = sender.seal(flat)
        give(store, metadata, sealed)
        store.upkeep()
    kept = list((tmp_path / "bundles" / NAME).iterdir())
    assert [path.read_bytes() for path in kept] == [sealed]
    assert kept[0].name.startswith(f"{NAME}-11111111-00000001-")
    assert not list((tmp_path / "journal").iterdir())


def test_large_content_is_not_journalled(tmp_path: Path) -> None:
    """Content of a MiB and more is written once: it is durable when it is acknowledged."""
    sender = Sender()
    with opened(tmp_path) as store:
        sender.send(store, sender.tree(a=b"a" * (1 << 20), sub__b=b"b" * (3 << 20)))
        assert_tree(store, sender)
        assert not list((tmp_path / "journal").iterdir())
        small = sender.tree(a=b"a" * (1 << 20), sub__b=b"b" * (3 << 20), c=b"c")
        sender.send(store, small)
        assert len(list((tmp_path / "journal").iterdir())) == 1
        del small["a"]
        sender.send(store, small)
        assert len(list((tmp_path / "journal").iterdir())) == 1
        assert_tree(store, sender)
        store.upkeep()
        with store.state.read() as db:
            assert db.execute("SELECT count(*) FROM workspaces WHERE durable_root = root").fetchone() == (1,)
    with opened(tmp_path) as store:
        assert store.workspace(NAME).tree_sequence == 3
        assert_tree(store, sender)


def test_a_file_that_changed_and_changed_back_is_not_believed(tmp_path: Path) -> None:
    """What was durable once is believed after a restart only if the tree never left it."""
    sender = Sender()
    former, other = sender.tree(f=b"same", sub__g=b"same size"), sender.tree(f=b"came", sub__g=b"other way")
    with opened(tmp_path) as store:
        sender.send(store, former)
        assert_tree(store, sender)
        store.upkeep()
        sender.send(store, other)
        assert_tree(store, sender)
        sender.send(store, former)
    with opened(tmp_path) as store:
        assert_tree(store, sender)


@pytest.mark.parametrize("link", ["auto", "copy"])
def test_a_file_that_a_cut_move_replaced_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link: str
) -> None:
    """When a move is cut short and the head returns, files of the right size and time are read all the same."""
    sender = Sender()
    former = sender.tree(f=b"former", a__x=b"one" * 9, b__x=b"two" * 9)
    other = sender.tree(f=b"others", a__x=b"two" * 9, b__x=b"one" * 9)
    with opened(tmp_path, link=link) as store:
        sender.send(store, former)
        assert_tree(store, sender)
        store.upkeep()
        store.upkeep()
        with monkeypatch.context() as patch:

            def fail(placer: Placer) -> None:
                raise OSError(errno.ENOSPC, "no space left on device")

            patch.setattr(Placer, "finish", fail)
            sender.send(store, other)
            with pytest.raises(NoSpace):
                store.catch_up()
        sender.send(store, former)
        assert_tree(store, sender)


@pytest.mark.parametrize("before", [{}, {"b__x": b"x", "b__y": b"was"}])
def test_a_folder_that_was_renamed_away_and_made_again_is_fsynced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: dict[str, bytes]
) -> None:
    """Its unchanged files are new copies: they are fsynced before they count as durable."""
    sender = Sender()
    synced: set[int] = set()
    fsync = os.fsync

    def note(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    with opened(tmp_path, link="copy") as store:
        sender.send(store, sender.tree(a__x=b"x", a__y=b"y", **before))
        assert_tree(store, sender)
        store.upkeep()
        sender.send(store, sender.tree(a__x=b"x", a__y=b"edited", b__x=b"x", b__y=b"y"))
        assert_tree(store, sender)
        monkeypatch.setattr(os, "fsync", note)
        store.upkeep()
        with store.state.read() as db:
            row = workspace_row(db, NAME)
        assert row is not None and row.durable_root == row.tree_root
        files = [tree_of(store) / path for path in ("a/x", "a/y", "b/x", "b/y")]
        assert synced.issuperset(file.stat().st_ino for file in files)


def test_a_removal_is_made_durable(tmp_path: Path) -> None:
    """A tree that only lost files does not count as durable before its folders were fsynced."""
    sender = Sender()
    with opened(tmp_path) as store:
        sender.send(store, sender.tree(f=b"stays", g=b"goes", sub__h=b"stays", sub__i=b"goes"))
        assert_tree(store, sender)
        store.upkeep()
        sender.send(store, sender.tree(f=b"stays", sub__h=b"stays"))
        assert_tree(store, sender)
        for is_durable in (False, True):
            with store.state.read() as db:
                row = workspace_row(db, NAME)
            assert row is not None and (row.durable_root == row.tree_root) is is_durable
            store.upkeep()


@pytest.mark.parametrize("way", ["there and back", "healed from elsewhere"])
def test_a_tree_that_moves_while_it_is_made_durable_is_not_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """A root is noted as durable only if no file was placed since its folders were fsynced."""
    sender = Sender()
    former, other = sender.tree(f=b"one"), sender.tree(f=b"two")
    with opened(tmp_path, link="copy") as store:
        sender.send(store, former)
        assert_tree(store, sender)
        left = [tree_of(store)]
        fsync = Folder.fsync

        def fsync_slowly(folder: Folder) -> None:
            fsync(folder)
            if left and os.path.samestat(os.fstat(folder.fd), left[0].stat()):
                left.clear()
                if way == "there and back":
                    for flat in (other, former):
                        sender.send(store, flat)
                        assert_tree(store, sender)
                else:
                    blob_of(tmp_path, former["f"]).unlink()
                    give_file(store, b"one")
                    assert_tree(store, sender)

        monkeypatch.setattr(Folder, "fsync", fsync_slowly)
        store.trees.make_durable(lambda: False)
        assert not left
        with store.state.read() as db:
            row = workspace_row(db, NAME)
        assert row is not None and row.moving_to is None and row.durable_root == EMPTY_ROOT


def test_what_a_repair_replaced_is_not_durable_yet(tmp_path: Path) -> None:
    """A file that was durable, went bad and was replaced is fsynced again before it counts as durable."""
    sender = Sender()
    with opened(tmp_path) as store:
        sender.send(store, sender.tree(f=b"content", g=b"other"))
        assert_tree(store, sender)
        store.upkeep()
    (tree_of(store) / "f").unlink()
    with opened(tmp_path) as store:
        store.trees.distrust([NAME])
        assert_tree(store, sender)
        with store.state.read() as db:
            row = workspace_row(db, NAME)
        assert row is not None and row.durable_root == EMPTY_ROOT


@pytest.mark.parametrize("way", ["bundle", "plain file", "adoption", "recipe beside a journal file"])
@pytest.mark.parametrize("stands", [True, False])
def test_a_commit_of_unknown_outcome_loses_no_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, *, stands: bool
) -> None:
    """What no journal gives again is there after a restart, if the commit that failed turns out to stand after all."""
    sender, content = Sender(), b"l" * (1 << 20)
    data, media = tmp_path / "data", tmp_path / "media"
    media.mkdir()
    (media / "f").write_bytes(content)

    @contextmanager
    def failing(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
        """Fail at the commit of a blob as the disk does at an fsync: in the log is what was written, or not."""
        connection.execute("BEGIN IMMEDIATE")
        yield connection
        brings_blob = connection.execute("SELECT 1 FROM blobs").fetchone() is not None
        connection.execute("COMMIT" if stands or not brings_blob else "ROLLBACK")
        if brings_blob:
            raise sqlite3.OperationalError("disk I/O error")

    with opened(data) as store:
        entry = sender.file("f", content)

        def bring() -> None:
            if way == "bundle":
                give(store, *sender.seal({"f": entry}))
            elif way == "plain file":
                give_file(store, content)
            elif way == "adoption":
                Adoption(store, AdoptOptions()).run([media])
            else:
                publish_as_assembled(store, sender, entry)

        with monkeypatch.context() as patch, pytest.raises(Corrupt):
            patch.setattr("deltasync_server.state.transaction", failing)
            bring()
    with opened(data) as store, store.state.read() as db:
        assert (entry.digest in blob_rows(db, [entry.digest])) is stands
    found = [finding.kind for finding in check(StoreConfig(data)).findings if finding.kind != "tree"]
    assert found == ([] if stands else ["stray"])
    with opened(data) as store:
        store.collect()
        assert store.cache.strays([entry.digest]) == []


def publish_as_assembled(store: Store, sender: Sender, entry: Entry) -> None:
    """Bring one content as a recipe gives it, in a bundle that has a journal file otherwise."""
    content = sender.contents[entry.digest]
    (operation,) = content_operations(sender.seal({"f": entry})[0]).values()
    with store.cache.staging() as staging:
        staging.write(operation, [memoryview(content)])
        staging.assembled.add(entry.digest)
        with store.state.hold(), store.cache.published(staging, {}) as rows, store.state.write() as db:
            write_blobs(db, rows, {})


def test_what_a_cut_repair_replaced_is_not_durable_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that a repair replaced before it was cut short does not count as durable after the next one either."""
    sender = Sender()
    with opened(tmp_path, link="copy") as store:
        sender.send(store, sender.tree(f=b"content", g=b"other"))
        assert_tree(store, sender)
        store.upkeep()
        (tree_of(store) / "f").unlink()
        store.trees.distrust([NAME])
        with monkeypatch.context() as patch:

            def fail(placer: Placer) -> None:
                raise OSError(errno.ENOSPC, "no space left on device")

            patch.setattr(Placer, "finish", fail)
            with pytest.raises(NoSpace):
                store.catch_up()
        assert_tree(store, sender)
        with store.state.read() as db:
            row = workspace_row(db, NAME)
        assert row is not None and row.durable_root == EMPTY_ROOT


def test_a_bundle_is_kept_whatever_it_brings(tmp_path: Path) -> None:
    """With keep_bundles every bundle is journalled, also one of large content or of none."""
    sender = Sender()
    with opened(tmp_path, keep_bundles=True) as store:
        sender.send(store, sender.tree(a=b"a" * (2 << 20)))
        sender.send(store, {})
        store.upkeep()
    assert len(list((tmp_path / "bundles" / NAME).iterdir())) == 2


def test_what_a_receipt_left_behind_is_removed(tmp_path: Path) -> None:
    """Staging folders and journal files without a receipt go at the next start."""
    sender = Sender()
    with opened(tmp_path) as store:
        sender.send(store, sender.tree(a=b"one"))
    (tmp_path / "staging" / "abc").mkdir()
    (tmp_path / "staging" / "abc" / ("0" * 64)).write_bytes(b"half")
    (tmp_path / "journal" / "left.spool").write_bytes(b"half a bundle")
    with opened(tmp_path) as store:
        assert not list((tmp_path / "staging").iterdir())
        assert len(list((tmp_path / "journal").iterdir())) == 1
        assert_tree(store, sender)


def spoil_nothing(tree: Path) -> None:
    pass


def spoil_names(tree: Path) -> None:
    (tree / "sub" / "b").unlink()
    (tree / "sub" / "gone").mkdir()
    (tree / "foreign").write_text("x")
    (tree / "link").unlink()
    (tree / "link").symlink_to("elsewhere")


def spoil_kinds(tree: Path) -> None:
    (tree / "a").unlink()
    (tree / "a").mkdir()
    (tree / "link").unlink()
    (tree / "link").write_text("x")
    os.rename(tree / "sub", tree / "sub2")
    (tree / "sub").write_text("x")


def spoil_copies(tree: Path) -> None:
    """A copy with the right size and time and wrong bytes."""
    zero(tree / "copy")


def spoil_everything(tree: Path) -> None:
    os.rename(tree, tree.parent.parent / "away")


SPOILS = [spoil_nothing, spoil_names, spoil_kinds, spoil_copies, spoil_everything]


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_tree_that_was_moving_is_repaired(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    """A tree that was half-way is compared with its head entry by entry, and what differs is replaced."""
    sender = Sender()
    with opened(tmp_path) as store:
        flat = sender.tree(a=b"one", sub__b=b"two", sub__deep__c=b"three")
        flat["copy"] = sender.file("copy", b"one", mtime_ns=9 * DAY)
        flat["link"] = Entry("link", type(flat["a"].kind).SYMLINK, target="a")
        sender.send(store, flat)
        assert_tree(store, sender)
        with store.state.write() as db:
            db.execute("UPDATE workspaces SET moving_to = sequence")
        tree = tree_of(store)
    spoil(tree)
    with opened(tmp_path) as store:
        assert store.workspace(NAME).tree_sequence is None
        assert_tree(store, sender)


def test_a_tree_behind_its_head_is_brought_forward_at_start(tmp_path: Path) -> None:
    """A crash between the receipt and the tree costs nothing: the next start moves the tree."""
    sender = Sender()
    with opened(tmp_path) as store:
        sender.send(store, sender.tree(a=b"one"))
        assert_tree(store, sender)
        sender.send(store, sender.tree(b=b"two"))
    with opened(tmp_path) as store:
        store.start()
        assert store.wait_for_tree(NAME, 2, 20).tree_sequence == 2
        assert set(seen(tree_of(store))) == {"b"}


def test_an_interrupted_restamp_is_settled(tmp_path: Path) -> None:
    """An inode that has its new time already, while its row has the old one, is taken as it is."""
    sender = Sender()
    with opened(tmp_path) as store:
        flat = {"a": sender.file("a", b"one")}
        sender.send(store, flat)
        assert_tree(store, sender)
        digest = flat["a"].digest
        touched = {"a": sender.file("a", b"one", mtime_ns=4 * DAY)}
        sender.send(store, touched)
        with store.state.write() as db:
            db.execute("INSERT INTO stamps VALUES (?, ?, 0)", (digest, 4 * DAY))
            db.execute("UPDATE workspaces SET moving_to = 2")
        os.utime(blob_of(tmp_path, flat["a"]), ns=(4 * DAY, 4 * DAY))
    with opened(tmp_path) as store:
        with store.state.read() as db:
            assert db.execute("SELECT mtime_ns FROM blobs").fetchone() == (4 * DAY,)
            assert db.execute("SELECT count(*) FROM stamps").fetchone() == (0,)
        assert_tree(store, sender)


def test_a_journal_that_is_damaged_too_asks_the_client(tmp_path: Path) -> None:
    """When neither the blob nor its journal can be read, the content is quarantined and asked for again."""
    sender = Sender()
    with opened(tmp_path) as store:
        flat = sender.tree(a=b"one" * 100, b=b"two" * 100)
        sender.send(store, flat)
        assert_tree(store, sender)
    zero(blob_of(tmp_path, flat["a"]))
    for path in (tmp_path / "journal").iterdir():
        os.truncate(path, path.stat().st_size // 2)
    with opened(tmp_path) as store:
        store.catch_up()
        assert store.workspace(NAME).wanted == [flat["a"].digest.hex()]
        assert set(seen(tree_of(store))) == {"b"}
        sender.heal(store, [flat["a"].digest])
        assert_tree(store, sender)


def test_recovery_can_be_interrupted_and_repeated(tmp_path: Path) -> None:
    """Recovery that was itself cut off before the trees were repaired starts over."""
    sender = Sender()
    with opened(tmp_path) as store:
        flat = sender.tree(a=b"one" * 100)
        sender.send(store, flat)
        assert_tree(store, sender)
    zero(blob_of(tmp_path, flat["a"]))
    opened(tmp_path).stop()
    with opened(tmp_path) as store:
        assert_tree(store, sender)


def test_a_durable_tree_is_not_compared_again(tmp_path: Path) -> None:
    """After an idle moment a restart trusts the tree: its sequence is known at once."""
    sender = Sender()
    with opened(tmp_path) as store:
        sender.send(store, {"a": sender.file("a", b"x"), "b": sender.file("b", b"x", mtime_ns=2 * DAY)})
        assert_tree(store, sender)
        store.upkeep()
        sender.send(store, {"a": sender.file("a", b"x")})
        assert_tree(store, sender)
        store.upkeep()
    with opened(tmp_path) as store:
        assert store.workspace(NAME).tree_sequence == 2
