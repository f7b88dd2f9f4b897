"""The plain tree: equal to the head byte by byte after any delta, by link, reflink or copy."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sender import ALICE, DAY, NAME, Sender, assert_tree, blob_of, give, seen, tree_of
from trees import Flat

from deltasync.core.errors import Corrupt
from deltasync.core.hashing import digest_of
from deltasync.core.jobs import inputs_of
from deltasync.core.manifest import Entry, Kind
from deltasync.core.names import WorkspaceName
from deltasync_server.config import StoreConfig
from deltasync_server.receive import Store
from deltasync_server.tenants import DEFAULT


@pytest.fixture(params=["auto", "hardlink", "reflink", "copy"])
def linked(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    with Store(StoreConfig(tmp_path / "data", link=request.param)) as opened:
        opened.recover()
        yield opened


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(StoreConfig(tmp_path / "data")) as opened:
        opened.recover()
        yield opened


def random_tree(sender: Sender, dice: random.Random, size: int) -> Flat:
    """Return a tree with few names and contents, so that moves, copies, touches and kind changes are common."""
    flat: Flat = {}
    for _ in range(size):
        parts = [dice.choice("abcde") for _ in range(dice.randint(1, 4))]
        above = ["/".join(parts[:depth]) for depth in range(1, len(parts))]
        path = "/".join(parts)
        if path in flat or any(a in flat and flat[a].kind is not Kind.DIRECTORY for a in above):
            continue
        flat.update({a: Entry(a.rpartition("/")[2], Kind.DIRECTORY) for a in above})
        flat[path] = random_entry(sender, dice, path)
    return flat


def random_entry(sender: Sender, dice: random.Random, path: str) -> Entry:
    name = path.rpartition("/")[2]
    kind = dice.choice(["file"] * 5 + ["directory", "symlink"])
    if kind == "directory":
        return Entry(name, Kind.DIRECTORY)
    if kind == "symlink":
        return Entry(name, Kind.SYMLINK, target=dice.choice(["a", "b/c"]))
    content = dice.choice([b"", b"x", b"y" * 3000, b"z" * 300_000])
    return sender.file(path, content, mtime_ns=dice.randint(1, 3) * DAY, executable=dice.random() < 0.2)


def reshaped(dice: random.Random, flat: Flat) -> Flat:
    """Return a tree with some of its directories and files moved elsewhere, as a user's `mv` would."""
    flat = dict(flat)
    for _ in range(dice.randint(0, 3)):
        if not flat:
            break
        source = dice.choice(sorted(flat))
        target = "/".join(dice.choice("abcdefg") for _ in range(dice.randint(1, 2)))
        parent = target.rpartition("/")[0]
        is_inside = (target + "/").startswith(source + "/")
        if target in flat or is_inside or (parent and flat.get(parent, Entry("", Kind.FILE)).kind is Kind.FILE):
            continue
        if parent and flat[parent].kind is not Kind.DIRECTORY:
            continue
        for path in [path for path in flat if path == source or path.startswith(source + "/")]:
            entry, moved = flat.pop(path), target + path[len(source) :]
            fields = (entry.kind, entry.size, entry.mtime_ns, entry.executable, entry.digest, entry.target)
            flat[moved] = Entry(moved.rpartition("/")[2], *fields)
    return flat


@pytest.mark.parametrize("seed", range(6))
def test_the_tree_is_equal_after_random_deltas(linked: Store, seed: int) -> None:
    """Whatever a delta does, and whichever sequences the tree skips, it ends equal to the head."""
    dice, sender = random.Random(seed), Sender()
    flat: Flat = {}
    for step in range(14):
        flat = reshaped(dice, flat) if step % 2 else random_tree(sender, dice, dice.randint(0, 25))
        sender.send(linked, flat)
        if dice.random() < 0.7:
            assert_tree(linked, sender)
    assert_tree(linked, sender)
    linked.upkeep()
    assert_tree(linked, sender)


def inodes(folder: Path) -> dict[str, int]:
    """Return the inode of everything below a folder."""
    return {
        str(Path(above, name).relative_to(folder)): Path(above, name).lstat().st_ino
        for above, folders, files in os.walk(folder)
        for name in (*folders, *files)
    }


def test_a_moved_directory_is_one_rename(store: Store) -> None:
    """A directory that only has another name is renamed: it and everything below it keep their inodes."""
    sender = Sender()
    sender.send(store, sender.tree(top__old__sub__a=b"a", top__old__b=b"b", top__c=b"c"))
    assert_tree(store, sender)
    before = inodes(tree_of(store))
    sender.send(store, sender.tree(top__new__sub__a=b"a", top__new__b=b"b", top__c=b"c"))
    assert_tree(store, sender)
    after = inodes(tree_of(store))
    assert after["top/new"] == before["top/old"]
    assert after["top/new/sub"] == before["top/old/sub"]


def test_swapped_directories_are_two_renames(store: Store) -> None:
    """Two directories that change places, and one that moves into what it held, keep their inodes."""
    sender = Sender()
    sender.send(store, sender.tree(a__x=b"1", b__y=b"2", c__d__z=b"3", c__w=b"4"))
    assert_tree(store, sender)
    before = inodes(tree_of(store))
    sender.send(store, sender.tree(b__x=b"1", a__y=b"2", d__z=b"3"))
    assert_tree(store, sender)
    after = inodes(tree_of(store))
    assert (after["a"], after["b"], after["d"]) == (before["b"], before["a"], before["c/d"])


def test_skipped_sequences_do_not_matter(store: Store) -> None:
    """A tree that is many sequences behind goes straight to the head."""
    sender = Sender()
    sender.send(store, sender.tree(a__x=b"1"))
    assert_tree(store, sender)
    for number in range(5):
        sender.send(store, sender.tree(**{f"d{number}__x": b"1", "a": b"%d" % number}))
    assert store.workspace(NAME).lag == 5
    assert_tree(store, sender)


def test_two_copies_with_different_times_are_both_right(linked: Store) -> None:
    """One inode has one time: the second of two copies with different times or modes is a file of its own."""
    sender = Sender()
    flat = {
        "a": sender.file("a", b"same", mtime_ns=DAY),
        "b": sender.file("b", b"same", mtime_ns=2 * DAY),
        "c": sender.file("c", b"same", mtime_ns=DAY, executable=True),
        "d": sender.file("d", b"same", mtime_ns=DAY),
    }
    sender.send(linked, flat)
    assert_tree(linked, sender)
    if linked.config.link in ("auto", "hardlink"):
        assert os.path.samefile(tree_of(linked) / "a", tree_of(linked) / "d")
    sender.send(linked, {**flat, "b": sender.file("b", b"same", mtime_ns=3 * DAY, executable=True)})
    assert_tree(linked, sender)
    sender.send(linked, {"c": flat["c"]})
    assert_tree(linked, sender)


def test_a_touched_file_restamps_the_only_link(store: Store) -> None:
    """A new time or mode of a file that is the blob's only link changes the inode; the file stays a link."""
    sender = Sender()
    sender.send(store, {"a": sender.file("a", b"content")})
    assert_tree(store, sender)
    touched = sender.file("a", b"content", mtime_ns=5 * DAY, executable=True)
    sender.send(store, {"a": touched})
    assert_tree(store, sender)
    assert os.path.samefile(tree_of(store) / "a", blob_of(store.config.data, touched))
    stream, _ = store.open_blob(DEFAULT, touched.digest)
    stream.close()
    with store.state.read() as db:
        assert db.execute("SELECT mtime_ns, executable FROM blobs").fetchall() == [(5 * DAY, 1)]
        assert db.execute("SELECT count(*) FROM stamps").fetchone() == (0,)


def test_a_blob_without_a_link_is_restamped_and_linked(store: Store) -> None:
    """Content that comes back with another time, and is in no tree, is linked again after a restamp."""
    sender = Sender()
    entry = sender.file("a", b"content")
    sender.send(store, {"a": entry})
    assert_tree(store, sender)
    sender.send(store, {})
    assert_tree(store, sender)
    sender.send(store, {"b": sender.file("b", b"content", mtime_ns=7 * DAY)}, is_thin=True)
    assert_tree(store, sender)
    assert os.path.samefile(tree_of(store) / "b", blob_of(store.config.data, entry))


def test_an_inode_without_room_for_links_is_copied(store: Store) -> None:
    """When the file system takes no more links of a blob, the tree gets a copy."""
    sender = Sender()
    entry = sender.file("a", b"content")
    sender.send(store, {"a": entry})
    blob, spare = blob_of(store.config.data, entry), store.config.data / "spare"
    spare.mkdir()
    most = os.pathconf(blob, "PC_LINK_MAX")
    if most > 70_000:
        pytest.skip(f"this file system takes {most} links of one file")
    try:
        for number in range(most - 1):
            os.link(blob, spare / str(number))
        assert_tree(store, sender)
        assert not os.path.samefile(tree_of(store) / "a", blob)
    finally:
        for path in spare.iterdir():
            path.unlink()


def test_far_times_are_carried_as_far_as_the_disk_does(store: Store) -> None:
    """Times before 1970 and beyond 2106 are set; what the file system cannot hold does no harm."""
    sender = Sender()
    times = [-(2**63), -1, 0, 1, 2**32 * 10**9, 2**63 - 1]
    sender.send(store, {f"f{n}": sender.file(f"f{n}", b"%d" % n, mtime_ns=t) for n, t in enumerate(times)})
    store.catch_up()
    assert store.trees.differences(NAME) == []
    found = seen(tree_of(store))
    assert [found[f"f{n}"][2] for n in range(1, 5)] == times[1:5]
    sender.send(store, {f"f{n}": sender.file(f"f{n}", b"same", mtime_ns=t) for n, t in enumerate(times)})
    store.catch_up()
    assert store.trees.differences(NAME) == []


def test_foreign_things_in_the_way_are_overcome(store: Store) -> None:
    """What someone put into the tree, or took out of it, does not keep the tree from its head."""
    sender = Sender()
    sender.send(store, sender.tree(a__b=b"1", c=b"2", d__e__f=b"3"))
    assert_tree(store, sender)
    tree = tree_of(store)
    (tree / "new").mkdir()
    (tree / "new" / "foreign").write_text("x")
    (tree / "c").unlink()
    (tree / "d" / "e" / "f").unlink()
    (tree / "d" / "e").rmdir()
    sender.send(store, sender.tree(a__b=b"9", new=b"4", d__e__f=b"5", d__e__g__h=b"6", c__i=b"7"))
    assert_tree(store, sender)


def test_a_directory_swapped_for_a_link_is_never_followed(store: Store, tmp_path: Path) -> None:
    """A link that someone plants where the tree has a directory is replaced; what it points to stays untouched."""
    sender = Sender()
    sender.send(store, sender.tree(a__b=b"1", a__c=b"2"))
    assert_tree(store, sender)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "b").write_text("precious")
    tree = tree_of(store)
    (tree / "a").rename(tmp_path / "elsewhere")
    (tree / "a").symlink_to(outside)
    sender.send(store, sender.tree(a__b=b"changed", a__d=b"3"))
    assert_tree(store, sender)
    assert {path.name: path.read_text() for path in outside.iterdir()} == {"b": "precious"}


def test_a_racer_never_gets_a_write_outside(store: Store, tmp_path: Path) -> None:
    """While someone swaps a directory for a link again and again, nothing outside changes, and the tree heals."""
    sender, outside = Sender(), tmp_path / "outside"
    outside.mkdir()
    (outside / "b").write_text("precious")
    sender.send(store, sender.tree(a__b=b"0"))
    assert_tree(store, sender)
    tree, is_over = tree_of(store), threading.Event()

    def race() -> None:
        while not is_over.is_set():
            with contextlib.suppress(OSError):
                os.rename(tree / "a", tmp_path / "hidden")
                os.symlink(outside, tree / "a")
            with contextlib.suppress(OSError):
                os.unlink(tree / "a")
                os.rename(tmp_path / "hidden", tree / "a")

    racer = threading.Thread(target=race)
    racer.start()
    try:
        for number in range(25):
            sender.send(store, sender.tree(a__b=b"%d" % number, **{f"a__c{number}": b"%d" % number}))
            with contextlib.suppress(OSError):
                store.catch_up()
    finally:
        is_over.set()
        racer.join()
    assert {path.name: path.read_text() for path in outside.iterdir()} == {"b": "precious"}
    store.trees.rebuild(NAME)
    assert_tree(store, sender)


def test_a_folder_of_the_cache_that_became_a_link_is_never_entered(store: Store, tmp_path: Path) -> None:
    """Nothing outside is read, written or removed, and what failed goes through when the folder is back."""
    sender = Sender()
    sender.send(store, sender.tree(a=b"first"))
    assert_tree(store, sender)
    prefix = store.config.data / "cache" / digest_of(b"second").hex()[:2]
    prefix.rename(tmp_path / "hidden")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / digest_of(b"second").hex()).write_bytes(b"second")
    prefix.symlink_to(outside)
    metadata, sealed = sender.seal(sender.tree(a=b"first", b=b"second"))
    before = [path.stat().st_ctime_ns for path in (outside, *outside.iterdir())]
    with pytest.raises(Corrupt, match="Not a directory"):
        give(store, metadata, sealed)
    assert [path.stat().st_ctime_ns for path in (outside, *outside.iterdir())] == before
    prefix.unlink()
    (tmp_path / "hidden").rename(prefix)
    assert not give(store, metadata, sealed).duplicate


def test_idle_work_repairs_a_tree_that_it_finds_changed(store: Store) -> None:
    """When something else stands where a file should be made durable, the tree is compared and repaired."""
    sender = Sender()
    sender.send(store, sender.tree(a=b"1", b=b"2"))
    assert_tree(store, sender)
    (tree_of(store) / "a").unlink()
    (tree_of(store) / "a").symlink_to("b")
    store.upkeep()
    assert store.workspace(NAME).tree_sequence is None
    assert_tree(store, sender)


def test_displaced_folders_are_removed_when_idle(store: Store) -> None:
    """A deleted directory leaves the tree by one rename, and is removed later."""
    sender = Sender()
    sender.send(store, sender.tree(a__b=b"1", c=b"2"))
    assert_tree(store, sender)
    sender.send(store, sender.tree(c=b"2"))
    assert_tree(store, sender)
    aside = tree_of(store).parent / "aside"
    assert list(aside.iterdir())
    store.upkeep()
    assert not list(aside.iterdir())
    assert_tree(store, sender)


def test_tree_files_cannot_be_written(linked: Store) -> None:
    """The tree is the server's: its files have no write permission, linked or not."""
    sender = Sender()
    sender.send(linked, {"a": sender.file("a", b"1"), "b": sender.file("b", b"1", mtime_ns=2 * DAY, executable=True)})
    assert_tree(linked, sender)
    assert [(tree_of(linked) / name).stat().st_mode & 0o222 for name in "ab"] == [0, 0]


def test_the_inputs_of_commands_have_no_plain_tree(tmp_path: Path) -> None:
    """Nobody looks at them there: no folder is made, one of before goes, and lost content is asked for all the same."""
    sender = Sender(name=WorkspaceName(inputs_of(ALICE)))
    home = tmp_path / "data/workspaces" / sender.name
    with Store(StoreConfig(tmp_path / "data", low_disk_bytes=0)) as store:
        (home / "tree/old").mkdir(parents=True)
        flat = sender.tree(a=b"one", d__b=b"two")
        sender.send(store, flat)
        store.catch_up()
        assert not home.exists()
        state = store.workspace(sender.name)
        assert (state.tree_path, state.tree_sequence, state.wanted) == ("", 1, [])
        store.upkeep()  # nothing of it is in the journal from here on
        blob_of(store.config.data, flat["a"]).unlink()
        store.doubt(flat["a"].digest)
        sender.send(store, {**flat, **sender.tree(c=b"three")})  # the head moves on, and still names it
        store.catch_up()
        assert store.workspace(sender.name).wanted == [flat["a"].digest.hex()]
        sender.heal(store, [flat["a"].digest])
        store.catch_up()
        assert store.workspace(sender.name).wanted == [] and not home.exists()
        other = Sender(name=WorkspaceName("inputs-of-mine"))
        other.send(store, other.tree(a=b"one"))
        store.catch_up()
        assert (tree_of(store, other.name) / "a").read_bytes() == b"one"
