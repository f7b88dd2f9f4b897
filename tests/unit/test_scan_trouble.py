"""Trouble with one entry is reported and costs nothing else; what cannot be observed keeps its former entry."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import socket
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from observed import check, check_rows, look, look_until_quiet, naive_root, operations, seal, write

from deltasync.client.ignore import IgnoreRules
from deltasync.client.scan import ScanOptions, scan
from deltasync.client.state import REHASH_DUE, State
from deltasync.core.errors import Corrupt, GuardStopped, RootUnavailable
from deltasync.core.tree import find, walk

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[State]:
    monkeypatch.setenv("DELTASYNC_HOME", str(tmp_path / "home"))
    (tmp_path / "ws").mkdir()
    with State.open(tmp_path / "ws") as opened:
        yield opened


def reasons(state: State) -> dict[str, str]:
    return {problem.path: problem.reason for problem in state.problems()}


def test_unsafe_names_are_reported_and_shown_escaped(state: State) -> None:
    """Newline, ESC and bytes that are no UTF-8 are problems; markup is not; the rest goes on (F1-F4)."""
    root = os.fsencode(state.root)
    for name in (b"new\nline", b"esc\x1b[31m", b"bytes\xff\xfe", b"[red]", b"ok"):
        os.close(os.open(root + b"/" + name, os.O_CREAT | os.O_WRONLY))
    os.mkdir(root + b"/dir\xff")
    os.close(os.open(root + b"/dir\xff/inside", os.O_CREAT))
    report = look(state)
    assert reasons(state) == {
        "new\\nline": "the name has a control character",
        "esc\\x1b[31m": "the name has a control character",
        "bytes\\xff\\xfe": "the name is not UTF-8",
        "dir\\xff": "the name is not UTF-8",
    }
    assert [entry.name for entry in state.load(report.root)] == ["[red]", "ok"]
    assert all(problem.path.isprintable() and not problem.waiting for problem in report.problems)
    again = look(state)
    assert (again.problems, again.changed) == (report.problems, False)


def test_fifo_socket_and_device_are_reported_without_blocking(state: State) -> None:
    """They are neither opened nor carried (F9-F11)."""
    os.mkfifo(state.root / "fifo")
    listener = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(state.root)
    try:
        listener.bind("socket")
    finally:
        os.chdir(here)
        listener.close()
    if os.geteuid() == 0:
        os.mknod(state.root / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    look(state)
    assert reasons(state)["fifo"] == "is a FIFO; only files, folders and links are carried"
    assert reasons(state)["socket"].startswith("is a socket")
    assert state.counts() == (0, 0)


def test_links_that_leave_are_reported(state: State) -> None:
    """An absolute target or one above the root is a problem (F15, F16)."""
    (state.root / "d").mkdir()
    (state.root / "abs").symlink_to("/etc/passwd")
    (state.root / "d/up").symlink_to("../../x")
    (state.root / "d/fine").symlink_to("../x")
    look(state)
    assert reasons(state) == {
        "abs": "the link leaves the workspace (absolute target)",
        "d/up": "the link leaves the workspace",
    }


def test_a_problem_that_is_solved_goes(state: State) -> None:
    """Full and partial scans drop what is no problem any more, and keep what still is."""
    write(state.root, {"a/": "", "b/": ""})
    os.mkfifo(state.root / "a/fifo")
    os.mkfifo(state.root / "b/fifo")
    look(state)
    assert set(reasons(state)) == {"a/fifo", "b/fifo"}
    os.unlink(state.root / "a/fifo")
    look(state, {"a"})
    assert set(reasons(state)) == {"b/fifo"}
    os.rename(state.root / "b", state.root / "c")
    look(state, {""})
    assert set(reasons(state)) == {"c/fifo"}
    shutil.rmtree(state.root / "c")
    look(state, {""})
    assert reasons(state) == {}


def test_a_nested_workspace_is_left_alone(state: State) -> None:
    """A folder with a state of its own is a problem; a bare .deltasync is only a reserved name (F40)."""
    write(state.root, {"inner/.deltasync/state.db": "db", "inner/f": "x", "other/.deltasync/x": "", "other/g": "y"})
    look(state)
    assert "holds a nested workspace" in reasons(state)["inner"]
    assert "reserved" in reasons(state)["other/.deltasync"]
    assert state.observed_root() == naive_root(state.root, without={"inner", "other/.deltasync"})


def test_a_workspace_made_inside_keeps_what_was_carried(state: State) -> None:
    """The folder was carried before it became a workspace: its entries stay."""
    write(state.root, {"inner/f": "x"})
    before = look(state).root
    write(state.root, {"inner/.deltasync/state.db": "db", "inner/g": "y"})
    report = look(state)
    assert report.root == before
    assert "inner" in reasons(state)


@as_root
def test_unreadable_files_and_folders_keep_their_entries(state: State) -> None:
    """Without permission nothing is deleted, new ones are left out, the rest goes on (F12, F13)."""
    root = state.root
    write(root, {"secret": "1", "ok": "2", "dir/inner/f": "3"})
    look(state)
    (root / "secret").chmod(0)
    write(root, {"secret": "changed", "new": "n", "ok": "changed", "newdir/f": "4"})
    for name in ("new", "dir", "newdir"):
        (root / name).chmod(0)
    with as_nobody(state):
        report = look(state)
        assert reasons(state) == dict.fromkeys(("secret", "new", "dir", "newdir"), "cannot be read (Permission denied)")
        look(state, {""})
        assert set(reasons(state)) == {"secret", "new", "dir", "newdir"}
    paths = dict(walk(report.root, state.load))
    assert set(paths) == {"secret", "ok", "dir", "dir/inner", "dir/inner/f"}
    assert (paths["secret"].size, paths["ok"].size) == (1, len("changed"))
    (root / "dir").chmod(0o755)
    with as_nobody(state):
        look(state)
        assert set(reasons(state)) == {"secret", "new", "newdir"}
    look(state)
    check(state)


@as_root
@pytest.mark.parametrize("is_partial", [False, True])
def test_what_is_renamed_and_cannot_be_read_keeps_its_entries(state: State, *, is_partial: bool) -> None:
    """Under its new name an unreadable file or folder is what it was before, as often as it is renamed (spec S-20)."""
    root = state.root
    write(root, {"bad": "1", "good": "2", "gone": "3", "d/inner": "4", "d/sub/f": "5", "e/f": "6", "z/": ""})
    before = dict(walk(look_until_quiet(state).root, state.load))
    seal(state)
    for old, new in (("bad", "z/broken"), ("d", "z/dir"), ("e/f", "good")):
        (root / old).rename(root / new)
        (root / new).chmod(0)
    (root / "gone").unlink()
    with as_nobody(state):
        if is_partial:
            look(state, {"z"})
            look(state, {"", "e"})
        else:
            look(state)
        look(state)  # nothing has changed since, and they still cannot be read
    moved = {"z/broken": "bad", "good": "e/f", "z/dir": "d", "z/dir/inner": "d/inner", "z/dir/sub/f": "d/sub/f"}
    paths = dict(walk(state.observed_root(), state.load))
    assert set(paths) == {*moved, "e", "z", "z/dir/sub"}
    assert {path: paths[path].digest for path in moved} == {path: before[old].digest for path, old in moved.items()}
    assert set(reasons(state)) == {"z/broken", "z/dir", "good"}
    check_rows(state)
    assert {("moved", "z/broken", "bad"), ("moved", "z/dir", "d")} < set(operations(state))
    seal(state)
    (root / "z/broken").rename(root / "broken")
    with as_nobody(state):
        look(state)
        assert operations(state) == [("moved", "broken", "z/broken")]
    for name in ("broken", "z/dir", "good"):
        (root / name).chmod(0o755)
    look(state)
    assert reasons(state) == {}
    check(state)


@as_root
def test_an_unreadable_file_that_is_not_what_disappeared_takes_nothing_over(state: State) -> None:
    """The inode of a file that was deleted may be given to another one: then size or time are not the same."""
    write(state.root, {"old": "1", "ok": "2"})
    look_until_quiet(state)
    seal(state)
    (state.root / "old").rename(state.root / "new")  # a file of this inode, with other content
    write(state.root, {"new": "another"})
    (state.root / "new").chmod(0)
    with as_nobody(state):
        look(state)
    assert set(dict(walk(state.observed_root(), state.load))) == {"ok"}


@as_root
def test_a_folder_that_lists_but_does_not_stat_is_left_as_it_was(state: State) -> None:
    """Read without search permission shows names and nothing else: the folder is a problem as a whole."""
    write(state.root, {"d/f": "1"})
    before = look(state).root
    (state.root / "d").chmod(0o444)
    with as_nobody(state):
        assert look(state).root == before
    assert reasons(state) == {"d": "cannot be read (Permission denied)"}


@as_root
def test_a_file_that_gives_an_io_error_keeps_its_entry(state: State) -> None:
    """EIO while reading is a problem of that file alone."""
    write(state.root, {"bad": "1", "good": "2"})
    before = look_until_quiet(state)
    source = ["mount", "--bind", f"/proc/{os.getpid()}/mem", state.root / "bad"]  # reads as EIO
    if subprocess.run(source, capture_output=True).returncode:
        pytest.skip("cannot mount here")
    try:
        write(state.root, {"good": "changed"})
        report = look(state)
    finally:
        subprocess.run(["umount", state.root / "bad"], check=True)
    assert reasons(state) == {"bad": "cannot be read (Input/output error)"}
    assert find(report.root, "bad", state.load) == find(before.root, "bad", state.load)
    look(state)
    check(state)


def test_running_out_of_descriptors_deletes_nothing(state: State) -> None:
    """A tree deeper than the process may open is kept where it cannot be entered."""
    write(state.root, {"/".join(["d"] * depth) + "/f": str(depth) for depth in range(1, 80)})
    before = look_until_quiet(state)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, hard))
    try:
        report = look(state)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert report.root == before.root
    assert [problem.reason for problem in report.problems] == ["cannot be read (Too many open files)"]
    assert look(state).problems == []


@as_root
def test_an_unreadable_root_is_no_deletion(state: State) -> None:
    """The root's own permissions are taken away."""
    write(state.root, {"f": "1"})
    before = look(state).root
    state.root.chmod(0o311)
    with as_nobody(state), pytest.raises(RootUnavailable):
        look(state)
    assert state.observed_root() == before


@contextlib.contextmanager
def as_nobody(state: State) -> Iterator[None]:
    """Go on as a user without privileges, who owns the state's folder."""
    for path in (state.folder, *state.folder.iterdir()):
        os.chown(path, 65534, 65534)
    for folder in state.root.parents:
        folder.chmod(folder.stat().st_mode | 0o111)
    os.setegid(65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def test_a_file_that_keeps_changing_keeps_its_former_entry(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file appended to without end is a problem after the time to settle; its former entry stands (F24, F34)."""
    write(state.root, {"log": "first", "calm": "x"})
    before = look_until_quiet(state)
    stop = threading.Event()

    def append() -> None:
        with open(state.root / "log", "ab", buffering=0) as out:
            while not stop.is_set():
                out.write(b"x" * 997)
                if out.tell() > 64 << 20:
                    out.truncate(0)

    write(state.root, {"log": b"y" * (32 << 20)})
    writer = threading.Thread(target=append)
    writer.start()
    try:
        report = look(state, settle_seconds=0.3)
    finally:
        stop.set()
        writer.join()
    assert [waiting.path for waiting in report.waiting] == ["log"]
    assert reasons(state) == {"log": "kept changing while it was read; try again later"}
    assert report.root == before.root
    report = look(state)
    assert (report.waiting, report.problems) == ([], [])
    check(state)


def test_a_file_that_stops_changing_is_waited_for(state: State) -> None:
    """A file that changes under the first read and then rests is observed by the same scan."""
    write(state.root, {"f": b"a" * (64 << 20)})
    changed = []

    def progress(files: int, size: int) -> None:
        if not changed:
            changed.append(True)
            write(state.root, {"f": b"b" * (64 << 20)})

    options = ScanOptions(IgnoreRules(state.root), settle_seconds=30.0)
    report = scan(state, options, progress=progress)
    assert (report.waiting, report.problems, report.files) == ([], [], 1)
    check(state)


def test_unsettled_files_wait_and_keep_their_entry(state: State) -> None:
    """The watcher says which files have settled; others wait, with size, and are asked about again."""
    write(state.root, {"old": "1", "d/calm": "2"})
    before = look_until_quiet(state)
    write(state.root, {"old": "11", "new": "333", "d/calm": "22"})
    asked: list[str] = []

    def is_settled(path: str, status: os.stat_result) -> bool:
        asked.append(path)
        return path.startswith("d/")

    report = look(state, is_settled=is_settled)
    assert sorted(asked) == ["d/calm", "new", "old"]
    assert sorted((w.path, w.size) for w in report.waiting) == [("new", 3), ("old", 2)]
    assert all(problem.waiting for problem in report.problems)
    entry = find(report.root, "old", state.load)
    assert entry is not None and entry.size == 1
    assert find(report.root, "new", state.load) is None
    assert report.root != before.root
    look(state, {""}, is_settled=lambda path, status: True)
    check(state)
    assert state.problems() == []


def test_a_settled_file_in_place_of_a_folder_takes_its_name_only_then(state: State) -> None:
    """While the new file waits, the folder that had its name stays in the tree."""
    write(state.root, {"x/inner": "1"})
    before = look_until_quiet(state)
    shutil.rmtree(state.root / "x")
    write(state.root, {"x": "file"})
    assert look(state, is_settled=lambda path, status: False).root == before.root
    check_rows(state)
    look(state, is_settled=lambda path, status: True)
    check(state)


def test_files_that_vanish_or_turn_into_something_else_are_no_trouble(state: State) -> None:
    """Between listing and reading a file goes, becomes a link, a folder or a FIFO: not followed, not blocked."""
    root = state.root
    names = ["gone", "link", "folder", "fifo"]
    write(root, dict.fromkeys(names, "before") | {"safe": "s"})
    look_until_quiet(state)
    write(root, dict.fromkeys(names, "after!") | {"outside/secret": "s"})
    swapped: list[str] = []

    def swap(path: str, status: os.stat_result) -> bool:
        name = path.rpartition("/")[2]
        if name in names and name not in swapped:
            swapped.append(name)
            (root / name).unlink()
            if name == "link":
                (root / name).symlink_to("outside/secret")
            elif name == "folder":
                (root / name).mkdir()
            elif name == "fifo":
                os.mkfifo(root / name)
        return True

    report = look(state, is_settled=swap)
    assert sorted(swapped) == sorted(names)
    for name in ("link", "folder", "fifo"):
        entry = find(report.root, name, state.load)
        assert entry is not None and entry.size == len("before")
    assert find(report.root, "gone", state.load) is None
    look(state)
    os.unlink(root / "fifo")
    look(state)
    check(state)


def test_an_emptied_root_stops(state: State) -> None:
    """Everything gone is not taken for deleted unless that is allowed; then it is."""
    write(state.root, {"a": "1", "b/c": "2"})
    before = look(state).root
    for path in ("a", "b"):
        os.rename(state.root / path, state.root.parent / path)
    with pytest.raises(GuardStopped):
        look(state)
    with pytest.raises(GuardStopped):
        look(state, {""})
    assert state.observed_root() == before
    look(state, allow_emptied=True)
    assert state.counts() == (0, 0)
    check(state)


def test_a_root_that_is_gone_is_no_deletion(state: State) -> None:
    """A root removed, replaced by a file, or made anew is unavailable; nothing is observed as deleted (F38)."""
    write(state.root, {"a": "1"})
    before = look(state).root
    state.root.rename(state.root.parent / "aside")
    with pytest.raises(RootUnavailable):
        look(state)
    state.root.write_text("file")
    with pytest.raises(RootUnavailable):
        look(state)
    state.root.unlink()
    write(state.root, {".deltasync/": ""})
    with pytest.raises(RootUnavailable):
        look(state)
    assert state.observed_root() == before


@as_root
def test_an_unmounted_root_is_no_deletion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state lies elsewhere and the mount is gone: the empty mount point is another device (F39)."""
    monkeypatch.setenv("DELTASYNC_HOME", str(tmp_path / "home"))
    root = tmp_path / "mnt"
    root.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "none", root], capture_output=True).returncode:
        pytest.skip("cannot mount here")
    try:
        write(root, {"a": "1"})
        with State.open(root, state_dir=tmp_path / "state") as state:
            before = look(state).root
    finally:
        subprocess.run(["umount", root], check=True)
    with State.open(root, state_dir=tmp_path / "state") as state:
        with pytest.raises(RootUnavailable):
            look(state, allow_emptied=True)
        assert state.observed_root() == before


@as_root
def test_a_mount_below_the_root_is_carried(state: State) -> None:
    """Another device below the root is a folder like others."""
    (state.root / "m").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "none", state.root / "m"], capture_output=True).returncode:
        pytest.skip("cannot mount here")
    try:
        write(state.root, {"m/f": "1", "g": "2"})
        look(state)
        check(state)
    finally:
        subprocess.run(["umount", state.root / "m"], check=True)


@as_root
def test_an_unmounted_folder_below_the_root_is_no_deletion(state: State) -> None:
    """A mount point that is empty after its unmount keeps its content and is a problem; a removed one is a deletion."""
    (state.root / "m").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "none", state.root / "m"], capture_output=True).returncode:
        pytest.skip("cannot mount here")
    try:
        write(state.root, {"m/f": "1", "g": "2"})
        before = look(state).root
    finally:
        subprocess.run(["umount", state.root / "m"], check=True)
    report = look(state)
    assert report.root == before
    assert [(problem.path, "mount" in problem.reason) for problem in report.problems] == [("m", True)]
    (state.root / "m").rmdir()
    assert look(state).root != before
    check(state)


def test_a_restored_tree_is_trusted_by_size_and_mtime(state: State, tmp_path: Path) -> None:
    """When all inodes changed nothing is read but what differs; a re-hash is noted as due and pays it off."""
    write(state.root, {f"d{n}/f{m}": f"{n}{m}" for n in range(4) for m in range(5)})
    before = look_until_quiet(state)
    for name in os.listdir(state.root):
        if name != ".deltasync":
            shutil.copytree(state.root / name, tmp_path / "copy" / name, copy_function=shutil.copy2)
            os.rename(state.root / name, tmp_path / f"former-{name}")
            os.rename(tmp_path / "copy" / name, state.root / name)
    write(state.root, {"d1/f1": "edited"})
    report = look(state)
    assert (report.remounted, report.hashed_files) == (True, 1)
    assert report.root != before.root
    assert state.get_meta(REHASH_DUE) == "1"
    assert state.renames() == {}
    check(state)
    seal(state)
    look_until_quiet(state)
    assert look(state).remounted is False
    look(state, rehash=True)
    assert state.get_meta(REHASH_DUE) is None


def test_no_delete_keeps_what_is_missing(state: State) -> None:
    """With --no-delete entries that are gone stay; without it they go."""
    root = state.root
    write(root, {"a": "1", "d/e/f": "2", "k": "3", "x/y": "4"})
    before = look_until_quiet(state)
    os.unlink(root / "a")
    shutil.rmtree(root / "d")
    os.unlink(root / "k")
    write(root, {"k/now": "folder"})
    shutil.rmtree(root / "x")
    write(root, {"x": "file", "new": "n"})
    report = look(state, no_delete=True)
    for path in ("a", "d/e/f", "k", "x/y"):
        assert find(report.root, path, state.load) == find(before.root, path, state.load)
    assert find(report.root, "new", state.load) is not None
    assert set(reasons(state)) == {"k", "x"}
    check_rows(state)
    assert look(state, no_delete=True).root == report.root
    look(state)
    check(state)


def test_no_delete_moves_nothing_away(state: State) -> None:
    """A folder that moved is new where it is and stays where it was."""
    write(state.root, {"a/f": "1"})
    look_until_quiet(state)
    os.rename(state.root / "a", state.root / "b")
    report = look(state, no_delete=True)
    assert find(report.root, "a/f", state.load) == find(report.root, "b/f", state.load)
    look(state)
    check(state)


def test_newly_ignored_entries_stay_until_that_is_not_wanted(state: State) -> None:
    """Files and folders ignored later keep their entries; delete_excluded drops them (F43)."""
    root = state.root
    write(root, {"a.log": "1", "b": "2", "build/x": "3", "sub/c.log": "4"})
    before = look_until_quiet(state)
    write(root, {".deltasyncignore": "*.log\nbuild\n"})
    write(root, {"a.log": "changed", "new.log": "5", "build/x": "changed"})
    report = look(state)
    for path in ("a.log", "build/x", "sub/c.log", "b"):
        assert find(report.root, path, state.load) == find(before.root, path, state.load)
    assert find(report.root, "new.log", state.load) is None
    assert report.problems == []
    check_rows(state)
    look(state, delete_excluded=True)
    check(state, without={"a.log", "new.log", "build", "sub/c.log"})
    os.unlink(root / ".deltasyncignore")
    look(state)
    check(state)


def test_a_changed_ignore_file_reaches_below_also_in_a_partial_scan(state: State) -> None:
    """Only the ignore file's folder is named; the rules count in the folders below."""
    root = state.root
    write(root, {"d/e/f.log": "1", "d/e/g": "2"})
    look_until_quiet(state)
    write(root, {"d/.deltasyncignore": "*.log\n"})
    look(state, {"d"}, delete_excluded=True)
    check(state, without={"d/e/f.log"})
    write(root, {"d/.deltasyncignore": "g\n"})
    look(state, {"d"}, delete_excluded=True)
    check(state, without={"d/e/g"})
    os.unlink(root / "d/.deltasyncignore")
    look(state, {"d"})
    check(state)


def test_a_partial_scan_obeys_the_rules_of_the_folders_above(state: State) -> None:
    """The folders on the way are not listed, and their rules hold all the same, also for a scanner that begins now."""
    root = state.root
    write(root, {".deltasyncignore": "*.tmp\n", "a/.deltasyncignore": "!keep.tmp\n*.log\n", "a/b/c/f": "1"})
    look_until_quiet(state)
    write(root, {"a/b/c/x.tmp": "2", "a/b/c/keep.tmp": "3", "a/b/c/y.log": "4", "a/b/c/z": "5"})
    look(state, {"a/b/c"})
    check(state, without={"a/b/c/x.tmp", "a/b/c/y.log"})


def test_an_ignore_file_that_is_a_link_is_refused(state: State) -> None:
    """Its rules do not count, it is not read, and that is a problem (F45)."""
    write(state.root, {"rules": "*\n", "f": "1"})
    (state.root / ".deltasyncignore").symlink_to("rules")
    report = look(state)
    assert "not followed" in reasons(state)[".deltasyncignore"]
    assert find(report.root, "f", state.load) is not None
    assert look(state).problems == report.problems


def test_a_folder_whose_ignore_file_cannot_be_read_is_left_as_it_was(state: State) -> None:
    """Without its rules nothing new of it is carried: it may be meant to stay private."""
    write(state.root, {"d/f": "1"})
    before = look_until_quiet(state)
    write(state.root, {"d/secret": "2"})
    os.mkfifo(state.root / "d/.deltasyncignore")
    assert look(state).root == before.root
    assert set(reasons(state)) == {"d"}


def test_a_damaged_object_is_an_error_that_heals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flipped byte in a directory object is found when it is loaded; the next opening checks the database."""
    monkeypatch.setenv("DELTASYNC_HOME", str(tmp_path / "home"))
    write(tmp_path / "ws", {"d/f": "1"})
    with State.open(tmp_path / "ws") as state:
        look_until_quiet(state)
        state.db.execute("UPDATE objects SET body = CAST(x'00' || substr(body, 2) AS BLOB)")
        write(tmp_path / "ws", {"d/g": "2"})
        with pytest.raises(Corrupt):
            look(state)
    with State.open(tmp_path / "ws") as state:
        look(state)
        check(state)
