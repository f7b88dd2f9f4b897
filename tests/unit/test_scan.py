"""Observation finds what the folder holds, reads as little as it may, and records it as one true tree."""

from __future__ import annotations

import os
import random
import shutil
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from observed import (
    check,
    check_delta,
    check_rows,
    has_racy,
    look,
    look_until_quiet,
    naive_root,
    operations,
    seal,
    write,
)

from deltasync.client.ignore import IgnoreRules
from deltasync.client.state import REHASH_DUE, State
from deltasync.core.manifest import EMPTY_ROOT
from deltasync.core.tree import find


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[State]:
    monkeypatch.setenv("DELTASYNC_HOME", str(tmp_path / "home"))
    (tmp_path / "ws").mkdir()
    with State.open(tmp_path / "ws") as opened:
        yield opened


def test_an_empty_folder_is_the_empty_tree(state: State) -> None:
    """A workspace without entries has the empty root and nothing is hashed."""
    report = look(state)
    assert (report.root, report.changed, report.files) == (EMPTY_ROOT, False, 0)
    check_rows(state)


def test_the_root_is_that_of_a_naive_computation(state: State) -> None:
    """Files, links, empty folders, executable bits, odd and long names, old and far dates: one root, twice the same."""
    root = state.root
    write(root, {"a/b/c.txt": "c", "a/b/empty": "", "a/e/": "", "z": b"\0" * 300_000, "ünï": "u", "n" * 255: "long"})
    write(root, {"sp ace": "s", "[/red]": "r", "a\\b": "w", "big": os.urandom(9 << 20)})
    (root / "a/link").symlink_to("b/c.txt")
    (root / "a/up").symlink_to("../z")
    (root / "a/b/run").write_text("x")
    (root / "a/b/run").chmod(0o4755)
    os.utime(root / "z", ns=(0, 0))
    os.utime(root / "ünï", ns=(-1_000_000_007, -1_000_000_007))
    os.utime(root / "[/red]", (4_300_000_000, 4_300_000_000))
    report = look(state)
    check(state)
    assert report.problems == []
    assert (report.files, report.size_bytes) == state.counts()
    assert report.hashed_files == report.files == 10
    again = look(state)
    assert (again.changed, again.root) == (False, report.root)


def test_a_scan_without_changes_reads_no_file(state: State) -> None:
    """Once nothing is fresh, no file is opened and nothing is written."""
    write(state.root, {f"d{n}/f{m}": f"{n}{m}" for n in range(5) for m in range(5)})
    look_until_quiet(state)
    changes = state.db.total_changes
    report = look(state)
    assert (report.hashed_files, report.hashed_bytes, report.changed) == (0, 0, False)
    assert state.db.total_changes == changes


def test_only_the_changed_file_is_read(state: State) -> None:
    """An edit, a new file and a deletion cost one hash each at most."""
    write(state.root, {f"d{n}/f{m}": f"{n}{m}" for n in range(3) for m in range(3)})
    look_until_quiet(state)
    write(state.root, {"d1/f1": "changed"})
    assert look(state).hashed_files == 1
    look_until_quiet(state)
    (state.root / "d2/f2").unlink()
    report = look(state)
    assert (report.hashed_files, report.changed) == (0, True)
    check(state)


def test_a_changed_ctime_or_inode_alone_reads_one_file_and_changes_nothing(state: State) -> None:
    """chmod to the same bits, and a copy that takes the name with the same times, send nothing."""
    write(state.root, {"a": "aaa", "b": "bbb", "c": "ccc"})
    before = look_until_quiet(state)
    (state.root / "a").chmod(stat.S_IMODE((state.root / "a").stat().st_mode))
    report = look(state)
    assert (report.hashed_files, report.changed) == (1, False)
    look_until_quiet(state)
    shutil.copy2(state.root / "b", state.root / "b2")
    os.rename(state.root / "b2", state.root / "b")
    report = look(state)
    assert (report.hashed_files, report.changed, report.root) == (1, False, before.root)


def test_an_executable_bit_is_noticed(state: State) -> None:
    """chmod +x changes the entry, not its content."""
    write(state.root, {"run": "#!/bin/sh"})
    before = look_until_quiet(state)
    (state.root / "run").chmod(0o755)
    after = look(state)
    assert after.root != before.root
    check(state)


@pytest.mark.parametrize("mode", [0o654, 0o645, 0o611])
def test_any_execute_bit_makes_a_file_executable(state: State, mode: int) -> None:
    """The owner's bit is not the only one: a file that a group or others may execute is carried as executable."""
    write(state.root, {"run.sh": "#!/bin/sh", "plain": ""})
    (state.root / "run.sh").chmod(mode)
    root = look(state).root
    entry, plain = find(root, "run.sh", state.load), find(root, "plain", state.load)
    assert entry is not None and entry.executable and plain is not None and not plain.executable


def test_a_file_edited_within_one_tick_of_the_clock_is_read_again(state: State) -> None:
    """Same size, same inode, same mtime: an edit right after the hash is found by the next scan."""
    for number in range(30):
        write(state.root, {"f": f"{number:04}"})
        status = (state.root / "f").stat()
        look(state)
        write(state.root, {"f": f"{number + 5000:04}"})
        os.utime(state.root / "f", ns=(status.st_mtime_ns, status.st_mtime_ns))
        look(state)
        check(state)


def test_fresh_entries_are_racy_and_old_ones_are_not(state: State) -> None:
    """What was written just before its hash is marked, and unmarked by a later scan."""
    write(state.root, {"f": "x"})
    look(state)
    assert has_racy(state)
    look_until_quiet(state)
    assert not has_racy(state)


def test_rehash_reads_everything_and_finds_what_no_stat_shows(state: State) -> None:
    """--rehash reads every file; the note that it was due goes."""
    write(state.root, {f"f{n}": str(n) for n in range(10)})
    look_until_quiet(state)
    state.set_meta(REHASH_DUE, "1")
    assert look(state, rehash=True).hashed_files == 10
    assert state.get_meta(REHASH_DUE) is None


def test_kinds_may_change(state: State) -> None:
    """A file becomes a folder, a folder a file, a link either, and back (F29)."""
    root = state.root
    write(root, {"x": "file", "y/inner": "folder"})
    (root / "l").symlink_to("x")
    look(state)
    for _ in range(2):
        (root / "x").unlink()
        shutil.rmtree(root / "y")
        (root / "l").unlink()
        write(root, {"x/inner": "folder", "y": "file", "l": "file"})
        look(state)
        check(state)
        shutil.rmtree(root / "x")
        (root / "y").unlink()
        (root / "l").unlink()
        write(root, {"x": "file", "y/inner": "folder", "l/": ""})
        look(state)
        check(state)
        shutil.rmtree(root / "l")
        (root / "l").symlink_to("y")
        look(state)
        check(state)


def test_editors_save_patterns_are_seen(state: State) -> None:
    """Temporary file and rename, truncate and write, backup and rename (F33)."""
    root = state.root
    write(root, {"doc": "one"})
    look(state)
    seal(state)
    write(root, {".doc.tmp": "two"})
    os.rename(root / ".doc.tmp", root / "doc")
    look(state)
    check(state)
    assert operations(state) == [("updated", "doc", None)]
    seal(state)
    write(root, {"doc": "three"})
    look(state)
    check(state)
    os.rename(root / "doc", root / "doc~")
    write(root, {"doc": "four"})
    look(state)
    check(state)


def test_links_are_carried_as_text_and_never_followed(state: State) -> None:
    """Loops, dangling links and links to folders are entries; nothing behind them is read (F14, F17-F19)."""
    root = state.root
    write(root, {"d/f": "x"})
    (root / "loop").symlink_to("loop")
    (root / "dangling").symlink_to("nowhere")
    (root / "d/again").symlink_to("../d")
    report = look(state)
    assert (report.files, report.problems) == (1, [])
    check(state)


def test_hard_links_are_files_like_others(state: State, tmp_path: Path) -> None:
    """A pair inside, and a link to a file outside of the root, are plain files (F20, F21)."""
    write(state.root, {"a": "same"})
    write(tmp_path, {"outside": "other"})
    os.link(state.root / "a", state.root / "b")
    os.link(tmp_path / "outside", state.root / "c")
    look(state)
    check(state)
    seal(state)
    os.unlink(state.root / "b")
    look(state)
    assert operations(state) == [("deleted", "b", None)]


def test_attributed_files_are_fine(state: State) -> None:
    """An xattr changes nothing but the ctime (F47)."""
    write(state.root, {"f": "x"})
    before = look_until_quiet(state)
    try:
        os.setxattr(state.root / "f", "user.note", b"1")
    except OSError:
        pytest.skip("no extended attributes here")
    report = look(state)
    assert (report.hashed_files, report.root) == (1, before.root)


def test_deep_trees_are_walked_and_too_deep_ones_reported(state: State) -> None:
    """200 parts are carried; what lies deeper is a problem that names its folder (F27)."""
    here = os.open(state.root, os.O_RDONLY)
    for _ in range(250):
        os.mkdir("d", dir_fd=here)
        inner = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    report = look(state)
    assert [problem.reason for problem in report.problems] == ["lies deeper than 200 folders"]
    assert find(report.root, "/".join("d" * 200), state.load) is not None
    assert find(report.root, "/".join("d" * 201), state.load) is None


def test_long_paths_are_reported(state: State) -> None:
    """A path beyond 4096 bytes is a problem, its siblings are carried (F28)."""
    here = os.open(state.root, os.O_RDONLY)
    for _ in range(17):
        os.mkdir("é" * 120, dir_fd=here)
        inner = os.open("é" * 120, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(os.open("short", os.O_CREAT, dir_fd=here))
    os.close(os.open("l" * 100, os.O_CREAT, dir_fd=here))
    os.close(here)
    report = look(state)
    assert report.files == 0 or report.files == 1
    assert {problem.reason for problem in report.problems} == {"its path is longer than 4096 bytes"}


def test_a_state_folder_inside_the_workspace_is_not_carried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --state-dir below the root, the state is left out all the same, and no .deltasync is made (F41)."""
    monkeypatch.setenv("DELTASYNC_HOME", str(tmp_path / "home"))
    root = tmp_path / "ws"
    write(root, {"sub/f": "x"})
    with State.open(root, state_dir=root / "sub/my state") as state:
        look(state)
        assert state.observed_root() == naive_root(root, without={"sub/my state"})
        assert not (root / ".deltasync").exists()


@pytest.mark.parametrize("seed", range(int(os.environ.get("SCAN_SEEDS", "2"))))
def test_random_edits_always_lead_to_the_true_tree(state: State, seed: int) -> None:
    """Random edits, moves and swaps, full and partial scans: always the naive root, true rows, a true delta."""
    rng = random.Random(seed)
    root = state.root
    for step in range(250):
        touched = {folder for _ in range(rng.randint(1, 4)) for folder in _edit(root, rng)}
        if rng.random() < 0.5:
            look(state, allow_emptied=True)
        else:
            look(state, touched, allow_emptied=True)
        check(state)
        if rng.random() < 0.3:
            seal(state)
        if step % 50 == 0:
            state.sweep_objects([state.sealed_root()], always=True)
            check(state)


def test_edits_while_the_scan_runs_do_no_harm(state: State) -> None:
    """A thread edits and moves at random under one scan after another; when it stops, the next scan has the truth."""
    stop = threading.Event()
    rng = random.Random(7)

    def edit() -> None:
        while not stop.is_set():
            _edit(state.root, rng)

    write(state.root, {f"{a}/{b}/{c}": a + b + c for a in "abcd" for b in "abcd" for c in "abcd"})
    editor = threading.Thread(target=edit)
    editor.start()
    try:
        for _ in range(60):
            look(state, allow_emptied=True)
            check_rows(state)
            check_delta(state)
    finally:
        stop.set()
        editor.join()
    look(state, allow_emptied=True)
    check(state)


def _edit(root: Path, rng: random.Random) -> set[str]:
    """Change something at random and return the folders whose listing changed."""
    entries = [p for p in root.rglob("*") if ".deltasync" not in p.parts]
    folders = [root, *(p for p in entries if p.is_dir())]
    target = rng.choice(folders) / rng.choice("abcd")
    choice = rng.random()
    if choice < 0.35 or not entries:
        target = target / "f" if target.is_dir() else target
        if not target.is_dir():
            target.write_text(str(rng.random()))
    elif choice < 0.5:
        if not target.exists():
            target.mkdir()
            return {_relative(root, target.parent), _relative(root, target)}  # it may have the inode of a former one
    elif choice < 0.85:
        source = rng.choice(entries)
        _move(source, target, root / "swap")
        moved = [p for top in (source, target) if top.is_dir() for p in (top, *top.rglob("*")) if p.is_dir()]
        return {_relative(root, folder) for folder in (source.parent, target.parent, *moved)}  # as a watcher does
    else:
        target = rng.choice(entries)
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    return {_relative(root, target.parent)}


def _move(source: Path, target: Path, swap: Path) -> None:
    if target.is_relative_to(source) or source.is_relative_to(target):
        return
    if target.exists():
        os.rename(source, swap)
        os.rename(target, source)
        os.rename(swap, target)
    else:
        os.rename(source, target)


def _relative(root: Path, path: Path) -> str:
    text = path.relative_to(root).as_posix()
    return "" if text == "." else text


def test_ignore_rules_of_the_scan_are_those_of_the_folder(state: State) -> None:
    """Ignored files and folders are left out at any level, without being descended into."""
    root = state.root
    write(
        root, {".deltasyncignore": "*.log\nbuild/\n", "a.log": "x", "a.txt": "x", "build/x": "x", "sub/build": "file"}
    )
    write(root, {"sub/.deltasyncignore": "!keep.log\n", "sub/keep.log": "x", "sub/b.log": "x"})
    look(state)
    check(state, without={"a.log", "build", "sub/b.log"})
    rules = IgnoreRules(root, exclude=["*.txt"], include=["a.log"])
    look(state, ignore=rules, delete_excluded=True)
    check(state, without={"a.txt", "build", "sub/b.log"})


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="nothing here takes files out of memory")
def test_files_that_the_disk_must_bring_are_read_as_they_are(state: State) -> None:
    """Small, large and sparse, whatever of them and of their neighbours is announced to the disk."""
    write(state.root, {f"{number % 2}/f{number}": os.urandom(1 << number % 23) for number in range(60)})
    with open(state.root / "sparse", "wb") as out:
        for offset in range(0, 8 << 20, 1 << 20):
            os.pwrite(out.fileno(), b"x" * 5000, offset)
    expected = naive_root(state.root)
    before = len(os.listdir("/dev/fd"))
    for path in state.root.rglob("*[0-9e]"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert look(state).root == expected
    assert len(os.listdir("/dev/fd")) == before
