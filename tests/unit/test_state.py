"""The state opens where it should, refuses what is not its own, and survives what happens to it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from observed import check, look, look_until_quiet, naive_root, seal, write

from deltasync.client import opening, outbox
from deltasync.client.state import MIGRATIONS, Problem, State
from deltasync.core.errors import (
    AlreadyRunning,
    Corrupt,
    NotFound,
    RootUnavailable,
    UsageError,
    WorkspaceCopied,
)
from deltasync.core.hashing import directory_digest
from deltasync.core.manifest import EMPTY_BODY, EMPTY_ROOT, Entry, Kind, encode_directory
from deltasync.core.tree import walk


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DELTASYNC_HOME", str(tmp_path / "home"))
    (tmp_path / "ws").mkdir()
    return tmp_path / "home"


def epoch(state: State) -> str:
    return str(state.db.execute("SELECT epoch FROM head").fetchone()[0])


def test_a_fresh_state_is_private_and_empty(tmp_path: Path) -> None:
    """Folder 0700, files 0600, the empty tree, an epoch, nothing to tell."""
    with State.open(tmp_path / "ws") as state:
        assert stat.S_IMODE(state.folder.stat().st_mode) == 0o700
        assert {stat.S_IMODE(path.stat().st_mode) for path in state.folder.iterdir()} == {0o600}
        assert (state.observed_root(), state.counts(), state.notes) == (EMPTY_ROOT, (0, 0), [])
        assert (state.sealed_root(), state.renames(), state.problems()) == (EMPTY_ROOT, {}, [])
        assert len(epoch(state)) == 32
        assert state.load(EMPTY_ROOT) == []
        assert state.load_body(EMPTY_ROOT) == EMPTY_BODY


def test_reopening_changes_nothing(tmp_path: Path) -> None:
    """Same client, same epoch, nothing to tell."""
    with State.open(tmp_path / "ws") as state:
        before = (state.client_id, epoch(state))
    with State.open(tmp_path / "ws") as state:
        assert (state.client_id, epoch(state), state.notes) == (*before, [])


def test_the_client_id_is_made_once_per_machine(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many first starts at once agree on one id; DELTASYNC_CLIENT_ID_FILE names its file."""
    ids: list[str] = []
    threads = [threading.Thread(target=lambda: ids.append(opening.client_id())) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 16 and len(set(ids)) == 1
    assert os.listdir(home) == ["client-id"]
    assert stat.S_IMODE((home / "client-id").stat().st_mode) == 0o600
    monkeypatch.setenv("DELTASYNC_CLIENT_ID_FILE", str(tmp_path / "other/id"))
    assert opening.client_id() not in ids
    (tmp_path / "other/id").write_text("torn")
    assert len(opening.client_id()) == 32


def test_the_client_id_lies_in_the_users_state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an override platformdirs says where."""
    monkeypatch.delenv("DELTASYNC_HOME")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home-of-user"))
    identity = opening.client_id()
    assert [path.read_text() for path in tmp_path.rglob("client-id")] == [identity]


def test_a_client_id_that_cannot_be_kept_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file where the folder should be."""
    write(tmp_path, {"file": "x"})
    monkeypatch.setenv("DELTASYNC_HOME", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="DELTASYNC_CLIENT_ID_FILE"):
        State.open(tmp_path / "ws")


def test_a_second_writer_is_refused_and_told_whom_to_look_for(tmp_path: Path) -> None:
    """The lock's holder is named with its process; a reader needs no lock (F42)."""
    with State.open(tmp_path / "ws"):
        with pytest.raises(AlreadyRunning, match=f"process {os.getpid()}"):
            State.open(tmp_path / "ws")
        with State.open(tmp_path / "ws", read_only=True) as reader:
            assert reader.counts() == (0, 0)
    State.open(tmp_path / "ws").close()


def test_a_reader_makes_nothing(tmp_path: Path) -> None:
    """read_only on a folder that is no workspace is an error and leaves no trace."""
    with pytest.raises(NotFound):
        State.open(tmp_path / "ws", read_only=True)
    assert os.listdir(tmp_path / "ws") == []


def test_a_reader_sees_what_a_writer_committed(tmp_path: Path) -> None:
    """`status` beside a watcher."""
    write(tmp_path / "ws", {"f": "x"})
    with State.open(tmp_path / "ws") as state, State.open(tmp_path / "ws", read_only=True) as reader:
        look(state)
        assert reader.observed_root() == state.observed_root()


def test_roots_that_are_none_are_named(tmp_path: Path) -> None:
    """A missing folder, a file, a broken link and a loop."""
    write(tmp_path, {"file": "x"})
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "broken").symlink_to("nowhere")
    for name in ("missing", "file", "loop", "broken", "file/below"):
        with pytest.raises(RootUnavailable, match=name.partition("/")[0]):
            State.open(tmp_path / name)


def test_a_root_that_is_a_link_is_the_folder_behind_it(tmp_path: Path) -> None:
    """The link and the folder are one workspace (F37)."""
    (tmp_path / "link").symlink_to("ws")
    with State.open(tmp_path / "link") as state:
        assert state.root == tmp_path.resolve() / "ws"
        first = epoch(state)
    with State.open(tmp_path / "ws") as state:
        assert (epoch(state), state.notes) == (first, [])


def test_a_workspace_inside_a_workspace_is_refused(tmp_path: Path) -> None:
    """At any depth, and our own folder too (F40)."""
    with State.open(tmp_path / "ws") as state:
        assert not outbox.head(state).sealed_sequence
        outbox.adopt(state, 1, EMPTY_ROOT, opens_epoch=False)
    write(tmp_path / "ws", {"a/b/": ""})
    for inner in ("a", "a/b", ".deltasync"):
        with pytest.raises(UsageError, match="lies inside"):
            State.open(tmp_path / "ws" / inner)


def test_a_state_folder_elsewhere_leaves_the_workspace_alone(tmp_path: Path) -> None:
    """--state-dir: nothing is made in the workspace; one state folder serves one workspace."""
    write(tmp_path / "ws", {"f": "x"})
    with State.open(tmp_path / "ws", state_dir=tmp_path / "s/t") as state:
        look(state)
        check(state)
    assert os.listdir(tmp_path / "ws") == ["f"]
    (tmp_path / "other").mkdir()
    with pytest.raises(UsageError, match="state of"):
        State.open(tmp_path / "other", state_dir=tmp_path / "s/t")


def test_a_state_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    """A planted link does not lead our writes elsewhere."""
    (tmp_path / "target").mkdir()
    (tmp_path / "ws/.deltasync").symlink_to(tmp_path / "target")
    with pytest.raises(UsageError, match="link"):
        State.open(tmp_path / "ws")
    assert os.listdir(tmp_path / "target") == []


def test_a_copied_folder_is_refused_until_the_user_decides(tmp_path: Path) -> None:
    """cp -a: neither side may go on under one name unasked; the original is not disturbed."""
    write(tmp_path / "ws", {"f": "x"})
    with State.open(tmp_path / "ws") as state:
        look(state)
        seal(state)
        state.db.execute("UPDATE head SET workspace = 'ws', url = 'http://x', sealed_sequence = 3")
        first = epoch(state)
    shutil.copytree(tmp_path / "ws", tmp_path / "copy")
    for name in (None, "ws"):
        with pytest.raises(WorkspaceCopied, match="--take-over"):
            State.open(tmp_path / "copy", workspace=name)
    with State.open(tmp_path / "ws") as state:
        assert (epoch(state), state.notes) == (first, [])
    shutil.copytree(tmp_path / "ws", tmp_path / "copy2")
    with State.open(tmp_path / "copy", take_over=True) as state:
        assert epoch(state) != first
        assert state.db.execute("SELECT workspace, sealed_sequence FROM head").fetchone() == ("ws", 3)
        assert "copied" in state.notes[0]
    with State.open(tmp_path / "copy2", workspace="new") as state:
        assert epoch(state) != first
        head = state.db.execute("SELECT workspace, url, sealed_sequence, sealed_root FROM head").fetchone()
        assert head == (None, None, 0, EMPTY_ROOT)
        assert state.observed_root() == naive_root(tmp_path / "copy2")
    for name in ("copy", "copy2"):
        with State.open(tmp_path / name) as state:
            assert state.notes == []


def test_a_moved_folder_goes_on_in_a_new_epoch(tmp_path: Path) -> None:
    """mv: what was observed and sealed stays; the epoch changes once, and that is told."""
    write(tmp_path / "ws", {"f": "x"})
    with State.open(tmp_path / "ws") as state:
        look_until_quiet(state)
        first, root = epoch(state), state.observed_root()
    os.rename(tmp_path / "ws", tmp_path / "moved")
    with State.open(tmp_path / "moved") as state:
        assert epoch(state) != first
        assert "moved" in state.notes[0]
        assert state.observed_root() == root
        assert look(state).hashed_files == 0
        second = epoch(state)
    with State.open(tmp_path / "moved") as state:
        assert (epoch(state), state.notes) == (second, [])


def test_a_copy_whose_original_is_gone_is_a_moved_folder(tmp_path: Path) -> None:
    """Nobody else can go on in the old history."""
    State.open(tmp_path / "ws").close()
    shutil.copytree(tmp_path / "ws", tmp_path / "copy")
    shutil.rmtree(tmp_path / "ws")
    with State.open(tmp_path / "copy") as state:
        assert "moved" in state.notes[0]


def test_one_folder_by_two_paths_is_no_copy(tmp_path: Path) -> None:
    """A bind mount shows the same database under another path."""
    State.open(tmp_path / "ws").close()
    (tmp_path / "bound").mkdir()
    if subprocess.run(["mount", "--bind", tmp_path / "ws", tmp_path / "bound"], capture_output=True).returncode:
        pytest.skip("cannot mount here")
    try:
        with State.open(tmp_path / "bound") as state:
            assert state.notes == []
    finally:
        subprocess.run(["umount", tmp_path / "bound"], check=True)


def test_another_machines_state_begins_a_new_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder came on a disk from elsewhere: our id, a new epoch, and that is told."""
    with State.open(tmp_path / "ws") as state:
        first, client = epoch(state), state.client_id
    monkeypatch.setenv("DELTASYNC_HOME", str(tmp_path / "another home"))
    with State.open(tmp_path / "ws") as state:
        assert epoch(state) != first
        assert state.client_id != client
        assert "another machine" in state.notes[0]


@pytest.mark.parametrize("damage", ["garbage", "page", "header"])
def test_a_damaged_database_is_set_aside(tmp_path: Path, damage: str) -> None:
    """Everything is read again in a new epoch, the damaged file is kept under another name, and that is told."""
    write(tmp_path / "ws", {f"d{n}/f{m}": f"{n}" for n in range(40) for m in range(20)})
    with State.open(tmp_path / "ws") as state:
        look(state)
        first = epoch(state)
    path = tmp_path / "ws/.deltasync/state.db"
    content = bytearray(path.read_bytes())
    if damage == "garbage":
        content[:] = b"garbage" * 1000
    elif damage == "page":
        content[8192:32768] = os.urandom(32768 - 8192)
    else:
        content[:16] = bytes(16)
    path.write_bytes(content)
    with State.open(tmp_path / "ws") as state:
        assert "set aside as state.db.damaged-1" in state.notes[0]
        assert epoch(state) != first
        look(state)
        check(state)
    assert (tmp_path / "ws/.deltasync/state.db.damaged-1").exists()


def test_silent_damage_is_found_when_it_is_met_and_then_set_aside(tmp_path: Path) -> None:
    """Pages that rot after a clean close give one clear error; the next run begins anew."""
    write(tmp_path / "ws", {f"d{n}/f{m}": f"{n}" for n in range(40) for m in range(20)})
    with State.open(tmp_path / "ws") as state:
        look(state)
    path = tmp_path / "ws/.deltasync/state.db"
    status = path.stat()
    with open(path, "r+b") as out:
        out.seek(4096)
        out.write(os.urandom(status.st_size - 4096))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(Corrupt, match="run the command again"), State.open(tmp_path / "ws") as state:
        look(state)
    with State.open(tmp_path / "ws") as state:
        assert "set aside" in state.notes[0]
        look(state)
        check(state)


def test_a_lost_object_of_what_was_sealed_is_found_by_the_next_opening(tmp_path: Path) -> None:
    """Also one deep in a tree that the folder is not any more: the command that met it works when it is run again."""
    write(tmp_path / "ws", {"a/b/f": "1", "g": "2"})
    with State.open(tmp_path / "ws") as state:
        look(state)
        sealed = state.observed_root()
        lost = next(entry.digest for path, entry in walk(sealed, state.load) if path == "a/b")
        state.db.execute("UPDATE head SET sealed_root = ?", (sealed,))
        write(tmp_path / "ws", {"a/b/f": "other"})
        look(state)
        state.db.execute("DELETE FROM objects WHERE digest = ?", (lost,))
        with pytest.raises(Corrupt, match="run the command again"):
            dict(walk(sealed, state.load))
    with State.open(tmp_path / "ws") as state:
        assert "set aside" in state.notes[0]
        look(state)
        check(state)


def test_a_name_for_the_workspace_that_a_disk_lost_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros where a power cut left no path are no other workspace, and the file is written anew."""
    monkeypatch.setenv("DELTASYNC_HOME", str(tmp_path))
    write(tmp_path / "ws", {"a": "1"})
    with State.open(tmp_path / "ws") as state:
        opening.claim(state.folder, "http://host", "ws")
        (kept,) = (tmp_path / "client-id.workspaces").iterdir()
        named = kept.read_bytes()
        kept.write_bytes(bytes(len(named)))
        opening.claim(state.folder, "http://host", "ws")
    assert kept.read_bytes() == named


@pytest.mark.parametrize("rot", [None, b"\r" + bytes(4), b"\n" + bytes(4)])
def test_damage_met_by_a_scan_is_set_aside_by_the_next_opening(tmp_path: Path, rot: bytes | None) -> None:
    """Only the pages of the directories rot, some into empty ones: the opening does not read them, the scan does."""
    write(tmp_path / "ws", {f"d{n}/f{m}": f"{n}" for n in range(60) for m in range(40)})
    with State.open(tmp_path / "ws") as state:
        look(state)
    path = tmp_path / "ws/.deltasync/state.db"
    with sqlite3.connect(path) as connection:
        pages = connection.execute("SELECT rootpage FROM sqlite_master WHERE name LIKE 'directories%'").fetchall()
    connection.close()
    status = path.stat()
    with open(path, "r+b") as out:
        for (page,) in pages:
            out.seek((page - 1) * 4096)
            out.write(os.urandom(4096) if rot is None else (rot + b"\x10").ljust(4096, b"\0"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    (path.parent / "lock").write_text(f"closed {status.st_size} {status.st_mtime_ns}")
    with pytest.raises(Corrupt, match="run the command again"), State.open(tmp_path / "ws") as state:
        look(state)
    with State.open(tmp_path / "ws") as state:
        assert "set aside" in state.notes[0]
        look(state)
        check(state)


def test_a_deleted_database_is_told(tmp_path: Path) -> None:
    """The folder of the state is there, the state is not: a new epoch."""
    with State.open(tmp_path / "ws") as state:
        first = epoch(state)
    for path in (tmp_path / "ws/.deltasync").glob("state.db*"):
        path.unlink()
    with State.open(tmp_path / "ws") as state:
        assert epoch(state) != first
        assert "lost" in state.notes[0]


def test_every_commit_is_fsynced_whatever_the_journal(tmp_path: Path) -> None:
    """The log is fsynced with each commit; without one, so is the folder that the rollback journal goes from."""
    extra = 3
    with State.open(tmp_path / "ws") as state:
        assert state.db.execute("PRAGMA synchronous").fetchone() == (extra,)
        assert state.db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_newer_release_is_not_set_aside(tmp_path: Path) -> None:
    """A schema from the future is refused and left as it is, byte by byte, whoever opens it."""
    State.open(tmp_path / "ws").close()
    path = tmp_path / "ws/.deltasync/state.db"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")
        connection.commit()
    before = path.read_bytes()
    for is_read_only in (False, True):
        with pytest.raises(Corrupt, match="newer release"):
            State.open(tmp_path / "ws", read_only=is_read_only)
    assert list(path.parent.glob("*.damaged-*")) == []
    assert path.read_bytes() == before


def of_an_older_release(root: Path, version: int) -> Path:
    """Make a state as the release with an earlier schema left it, with a word in it; return its database."""
    with State.open(root) as state:
        state.set_meta("word", "kept")
    path = root / ".deltasync/state.db"
    with contextlib.closing(sqlite3.connect(path)) as database:
        for table in ("recipes", "edges", "streams", "parts")[0 if version == 1 else 2 :]:
            database.execute(f"DROP TABLE {table}")
        database.execute(f"PRAGMA user_version = {version}")
        database.execute("PRAGMA journal_mode = DELETE")
    return path


def killed_at(statement: int, root: Path) -> bool:
    """Open a state in a process that is killed before that call of its database; tells whether it came to that."""
    child = os.fork()
    if child == 0:
        left = [statement]

        def count(_: object, event: str, called: Any) -> None:
            if event == "c_call" and isinstance(getattr(called, "__self__", None), sqlite3.Connection):
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(count)
        try:
            State.open(root).close()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("version", [1, 2])
def test_a_migration_that_is_killed_is_whole_or_was_not(tmp_path: Path, version: int) -> None:
    """At whichever call: the schema is the old one or the new one, and the next opening has everything."""
    found, is_harmed = list[int](), True
    while is_harmed:
        (root := tmp_path / f"at{len(found)}").mkdir()
        path = of_an_older_release(root, version)
        is_harmed = killed_at(len(found) + 1, root)
        with contextlib.closing(sqlite3.connect(path)) as database:
            (schema,) = database.execute("PRAGMA user_version").fetchone()
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        found.append(schema)
        assert ({"streams", "parts"} <= tables) == (schema == len(MIGRATIONS))
        with State.open(root) as state:
            assert (state.get_meta("word"), state.notes) == ("kept", [])
    assert {*found} == {version, len(MIGRATIONS)} and len(found) > 10


def test_a_cut_off_writer_leaves_a_whole_state(tmp_path: Path) -> None:
    """A process that ends without closing leaves its lock free and its commits in place."""
    program = f"""
import contextlib
import os
from pathlib import Path
from typing import Any
from deltasync.client.state import State
state = State.open(Path({str(tmp_path / "ws")!r}))
with state.writing():
    state.set_meta("word", "kept")
state.db.execute("BEGIN IMMEDIATE")
state.set_meta("word", "lost")
os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 9
    with State.open(tmp_path / "ws") as state:
        assert state.get_meta("word") == "kept"
        assert state.notes == []


def test_small_values_come_and_go(tmp_path: Path) -> None:
    """None removes a value."""
    with State.open(tmp_path / "ws") as state:
        assert state.get_meta("k") is None
        state.set_meta("k", "v")
        state.set_meta("k", "w")
        assert state.get_meta("k") == "w"
        state.set_meta("k", None)
        assert state.get_meta("k") is None


def test_problems_are_replaced_by_folder_or_as_a_whole(tmp_path: Path) -> None:
    """A folder's problems go with it, also those below it; a sibling with a longer name keeps its own."""
    one, two, three = (Problem(name, "reason", waiting=False) for name in ("a/x", "a/b/y", "a!/z"))
    with State.open(tmp_path / "ws") as state:
        state.set_problems([("a", one), ("a/b", two), ("a!", three)])
        assert state.problems() == sorted([one, two, three], key=lambda problem: problem.path)
        state.set_problems([], folders=["a"])
        assert state.problems() == [three, two]
        state.set_problems([("a", one)], folders=[])
        state.set_problems([], folders=[], below=["a"])
        assert state.problems() == [three]
        state.set_problems([])
        assert state.problems() == []


def test_objects_are_stored_once_and_swept_when_nothing_names_them(tmp_path: Path) -> None:
    """Objects that a root in `keep` or the observed tree reaches stay."""
    write(tmp_path / "ws", {"d/f": "x"})
    inner = encode_directory([Entry("f", Kind.FILE, digest=bytes(32))])
    outer = encode_directory([Entry("d", Kind.DIRECTORY, digest=directory_digest(inner))])
    loose = encode_directory([Entry("g", Kind.FILE, digest=bytes(32))])
    with State.open(tmp_path / "ws") as state:
        look(state)
        for _ in range(2):
            state.store({directory_digest(body): body for body in (inner, outer, loose)})
        assert state.sweep_objects([directory_digest(outer)]) == 0
        assert state.sweep_objects([directory_digest(outer)], always=True) == 1
        assert [entry.name for entry in state.load(directory_digest(inner))] == ["f"]
        with pytest.raises(Corrupt):
            state.load(directory_digest(loose))
        check(state)


def test_storing_joins_an_open_transaction(tmp_path: Path) -> None:
    """What is stored inside a transaction that fails is gone with it."""
    body = encode_directory([Entry("g", Kind.FILE, digest=bytes(32))])
    with State.open(tmp_path / "ws") as state:
        with pytest.raises(ZeroDivisionError), state.writing():
            state.store({directory_digest(body): body})
            raise ZeroDivisionError
        with pytest.raises(Corrupt):
            state.load(directory_digest(body))


def test_odd_root_paths_are_fine(tmp_path: Path) -> None:
    """Spaces, percent signs, question marks, newlines, bytes that are no UTF-8."""
    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/we ird%20?#\n\xff"))
    write(root, {"f": "x"})
    for _ in range(2):
        with State.open(root) as state:
            look(state)
            check(state)
            assert state.notes == []


def test_very_long_root_paths_need_a_state_folder_elsewhere(tmp_path: Path) -> None:
    """SQLite opens nothing below a path of more than 500 bytes; everything else does."""
    root = tmp_path / "/".join(["d" * 200] * 18)
    root.mkdir(parents=True)
    write(root, {"f": "x"})
    with pytest.raises(UsageError, match="--state-dir"):
        State.open(root)
    for _ in range(2):
        with State.open(root, state_dir=tmp_path / "s") as state:
            look(state)
            check(state)
            assert state.notes == []


def test_a_folder_that_cannot_be_written_says_what_to_do(tmp_path: Path) -> None:
    """A read-only workspace needs --state-dir."""
    if os.geteuid() == 0:
        if subprocess.run(
            ["mount", "--bind", "-o", "ro", tmp_path / "ws", tmp_path / "ws"], capture_output=True
        ).returncode:
            pytest.skip("cannot mount here")
        subprocess.run(["mount", "-o", "remount,ro,bind", tmp_path / "ws"], check=True)
    else:
        (tmp_path / "ws").chmod(0o555)
    try:
        with pytest.raises(UsageError, match="--state-dir"):
            State.open(tmp_path / "ws")
        with State.open(tmp_path / "ws", state_dir=tmp_path / "s") as state:
            look(state)
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", tmp_path / "ws"], check=True)
        else:
            (tmp_path / "ws").chmod(0o755)
