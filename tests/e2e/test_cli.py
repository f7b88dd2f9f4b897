"""The `deltasync` program as a user meets it: real processes, exact exit codes, one sentence for each trouble."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import pty
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import folders
import pytest
from corpus_good import noise
from serving import Served, serving
from user import BINARY, SECONDS, User, Word

from deltasync.client.moves import Stats
from deltasync.core.hashing import digest_of
from deltasync.core.manifest import decode_directory

REFUSED = Path(__file__).resolve().parents[2] / "bundles/refused"
REPORT = {
    "workspace", "sequence", "root", "operations", "bundles", "content_bytes", "sent_bytes", "avoided_bytes",
    "problems", "seconds",
}  # fmt: skip


@pytest.fixture
def folder(user: User, request: pytest.FixtureRequest) -> Path:
    """A folder with one of everything; its name is the test's, so that no two share a workspace."""
    root = user.home / f"w{abs(hash(request.node.nodeid)):x}"
    root.mkdir()
    folders.life(root)
    return root


def tree(server: Served, root: Path) -> Path:
    """Return a folder's plain tree on the server."""
    return server.data / "workspaces" / root.name / "tree"


# Push


def test_a_push_makes_the_servers_folder_equal_and_prints_what_scripts_rely_on(
    user: User, server: Served, folder: Path
) -> None:
    """A push makes the server's folder equal and prints the JSON that scripts rely on, and nothing else."""
    done = user.run("push", folder, "--to", server.url, "--json")
    assert (done.code, done.err) == (0, "")
    assert set(done.json) >= REPORT
    assert done.json["workspace"] == folder.name
    assert done.json["operations"] == {"created": 14, "updated": 0, "moved": 0, "deleted": 0}
    assert done.json["sent_bytes"] > 0 and done.json["sequence"] == done.json["bundles"] == 1
    folders.assert_same(folder, tree(server, folder))

    again = user.run("push", folder, "--json")
    assert again.json["operations"] == {"created": 0, "updated": 0, "moved": 0, "deleted": 0}
    assert (again.code, again.json["sent_bytes"], again.json["root"]) == (0, 0, done.json["root"])

    folders.later(folder)
    moved = user.run("push", folder, "-v")
    assert (moved.code, moved.err) == (0, "")
    assert "files looked at, " in moved.out and "\n1 bundle, " in moved.out
    assert " moved" in moved.out and "now at sequence 2" in moved.out
    folders.assert_same(folder, tree(server, folder))


def test_a_dry_run_says_what_would_be_sent_and_sends_nothing(user: User, server: Served, folder: Path) -> None:
    """A dry run says what would be sent and sends nothing."""
    done = user.run("push", "-n", folder, "--to", server.url)
    assert done.code == 0 and "would send 14 created" in done.out
    assert server.get(f"/api/v1/workspaces/{folder.name}").json["sequence"] == 0
    assert user.run("push", "-n", folder, "--to", server.url, "--json").json["dry_run"] is True


def test_without_a_server_bundles_wait_and_are_sent_once_there_is_one(user: User, server: Served, folder: Path) -> None:
    """Without a server bundles wait in the outbox, are listed, and are sent in order once there is one."""
    done = user.run("push", folder)
    assert done.code == 0 and "sealed 14 created" in done.out
    assert "the outbox holds 1 bundle" in done.err
    (listed,) = user.run("bundle", "ls", folder, "--json").json["bundles"]
    assert (listed["state"], listed["sequence"]) == ("pending", 1)
    assert Path(listed["file"]).stat().st_size == listed["file_bytes"]
    status = user.run("status", folder, "--json").json
    assert (status["local"]["pending"], status["server"], status["in_sync"]) == (1, None, None)

    assert user.run("push", folder, "--to", server.url).code == 0
    folders.assert_same(folder, tree(server, folder))
    assert user.run("bundle", "ls", folder, "--json").json["bundles"] == []


def test_of_several_folders_the_worst_exit_code_counts(user: User, server: Served, folder: Path) -> None:
    """Several folders are pushed one after another; the worst exit code counts, and one failure stops no other."""
    odd = user.home / (folder.name + "-odd")
    odd.mkdir()
    os.mkfifo(odd / "pipe")
    folders.write(odd, "a.txt", "a")
    done = user.run("push", folder, user.home / "none", odd, "--to", server.url, "--json")
    first, second, third = done.json["pushes"]
    assert (first["sequence"], third["sequence"]) == (1, 1)
    assert second["error"]["code"] == "ROOT_UNAVAILABLE"
    assert third["problems"] == [{"path": "pipe", "reason": "is a FIFO; only files, folders and links are carried"}]
    assert done.code == 1
    assert user.run("push", folder, odd).code == 3


@pytest.mark.parametrize(
    "name", [b"[/red]".replace(b"/", b"\\"), b"[bold]x[b]", b"a\x1b[31mred", b"new\nline", b"\xff\xfe", "é☃".encode()]
)
def test_every_name_is_shown_safely(user: User, server: Served, folder: Path, name: bytes) -> None:
    """Every name is shown safely: no control character reaches the terminal, and none stops the program."""
    shutil.rmtree(folder)
    os.makedirs(os.path.join(os.fsencode(folder), b"["))
    Path(os.fsdecode(os.path.join(os.fsencode(folder), name))).write_text("x")
    folders.write(folder, "[/red]", "markup")
    done = user.run("push", folder, "--to", server.url)
    assert done.code in (0, 3), done.err
    assert "\x1b" not in done.out + done.err and "Traceback" not in done.err
    assert user.run("push", folder, "--json").code == done.code
    if done.code == 3:
        (problem,) = user.run("push", folder, "--json").json["problems"]
        assert problem["path"].isprintable() and problem["path"] in done.err
    status = user.run("status", folder, "-v")
    assert status.code == 0 and "in sync" in status.out
    assert user.run("ignore", folder / "[/red]").out == "[/red] is carried: no rule matches\n"


# Status


def test_status_tells_both_halves(user: User, server: Served, folder: Path) -> None:
    """Status tells both halves, from the folder, from inside of it, and from the server's name alone."""
    user.run("push", folder, "--to", server.url)
    both = user.run("status", folder, "--json").json
    assert set(both) >= {"workspace", "local", "server", "in_sync"}
    assert set(both["local"]) >= {"sequence", "root", "pending", "waiting"}
    assert set(both["server"]) >= {"url", "sequence", "root", "tree_sequence", "last_applied_at"}
    assert both["in_sync"] is True and both["local"]["root"] == both["server"]["root"]
    assert both["server"]["url"] == server.url and both["server"]["tree_sequence"] == 1
    here = user.run("status", "--json", cwd=folder).json
    assert here["local"] == both["local"]
    alone = user.run("status", "--to", server.url, "--workspace", folder.name, "--json", cwd=folder).json
    assert (alone["local"], alone["in_sync"], alone["server"]["root"]) == (None, None, both["server"]["root"])
    text = user.run("status", folder)
    assert text.code == 0 and text.out.startswith(f"{folder.name}  in sync with {server.url}\n")

    user.run("push", folder, DELTASYNC_TIMEOUT="5s")
    folders.write(folder, "more.txt", "more")
    assert user.run("push", folder, "--to", server.url, "--no-wait", "-q").out == ""
    assert user.run("status", folder, "--json").json["local"]["sequence"] == 2


def test_status_of_a_name_that_was_never_pushed_is_an_error(user: User, server: Served, folder: Path) -> None:
    """A misspelt name is no empty workspace (1); programs still get what the server says."""
    told = user.run("status", "--to", server.url, "--workspace", "misspelt")
    assert (told.code, told.out) == (1, "")
    assert "has no workspace misspelt: nothing was ever pushed under this name" in told.err
    asked = user.run("status", "--to", server.url, "--workspace", "misspelt", "--json")
    assert (asked.code, asked.json["server"]["sequence"], asked.json["local"]) == (1, 0, None)


def test_no_delete_is_told_and_what_is_gone_here_is_no_difference(user: User, server: Served, folder: Path) -> None:
    """After --no-delete the trees are compared over what was sent: status says so, verify agrees; a push ends it."""
    folders.write(folder, "old", "x")
    user.run("push", folder, "--to", server.url)
    (folder / "old").unlink()
    (folder / "new").write_text("new")
    assert user.run("push", folder, "--no-delete").code == 0
    found = user.run("status", folder, "--json").json
    assert (found["in_sync"], found["local"]["no_delete"]) == (True, True)
    assert "--no-delete" in user.run("status", folder).out
    assert user.run("verify", folder, "--json").json["in_sync"] is True
    (folder / "new").write_text("changed")
    verified = user.run("verify", folder, "--json")
    assert (verified.code, [each["path"] for each in verified.json["differences"]]) == (5, ["new"])
    assert user.run("push", folder).code == 0
    found = user.run("status", folder, "--json").json
    assert (found["in_sync"], found["local"]["no_delete"]) == (True, False)
    folders.assert_same(folder, tree(server, folder))


def test_what_could_not_be_sent_is_no_sync(user: User, server: Served, folder: Path) -> None:
    """A path that became a problem, while the server has what it was before, is told by status as by push."""
    os.mkfifo(folder / "never sent")
    assert user.run("push", folder, "--to", server.url).code == 3
    found = user.run("status", folder, "--json").json
    assert (found["in_sync"], found["local"]["problems"], found["local"]["held_back"]) == (True, 1, 0)
    for name in ("readme.txt", "media/raw/a.dat"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
    assert user.run("push", folder).code == 3
    found = user.run("status", folder, "--json").json
    assert (found["in_sync"], found["local"]["problems"], found["local"]["held_back"]) == (False, 3, 2)
    text = user.run("status", folder).out
    assert "differs from" in text and "changes wait" not in text
    assert "3 problems; the former state of 2 paths stands on the server; deltasync push lists them" in text
    folders.write(folder, "bin/.deltasync/state.db")
    assert user.run("push", folder).code == 3
    assert user.run("status", folder, "--json").json["local"]["held_back"] == 3, "and the folder that is left alone"


def test_status_and_push_agree_on_a_change_that_cannot_be_sent(user: User, server: Served, folder: Path) -> None:
    """A change that was looked at, and became a problem before it was sent, does not wait to be sealed."""
    user.run("push", folder, "--to", server.url)
    folders.write(folder, "readme.txt", f"what no server has: {folder.name}")
    assert user.run("push", folder, "-n", "--json").json["operations"]["updated"] == 1
    assert "changes wait to be sealed" in user.run("status", folder).out
    (folder / "readme.txt").unlink()
    os.mkfifo(folder / "readme.txt")
    pushed = user.run("push", folder)
    assert pushed.code == 3 and "nothing to send" in pushed.out
    text = user.run("status", folder).out
    assert "differs from" in text and "changes wait" not in text and "1 problem; the former state of 1 path" in text
    assert user.run("status", folder, "--json").json["local"]["blocked"] is True


def test_a_link_in_place_of_an_ignore_file_is_in_sync(user: User, server: Served, folder: Path) -> None:
    """It is a problem of its rules, and is carried as a link all the same."""
    folders.write(folder, "rules", "*.tmp\n")
    (folder / ".deltasyncignore").symlink_to("rules")
    assert user.run("push", folder, "--to", server.url).code == 3
    assert user.run("status", folder, "--json").json["in_sync"] is True


@pytest.mark.parametrize("elsewhere", [False, True])
def test_status_says_that_everything_is_gone(user: User, server: Served, folder: Path, elsewhere: bool) -> None:
    """An emptied folder is not in sync with what the server has, before and after the push that the guard stops."""
    state = ["--state-dir", folder / "own"] if elsewhere else []
    user.run("push", folder, "--to", server.url, *state)
    for path in folder.iterdir():
        if path.name not in (".deltasync", "own"):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for _ in range(2):
        found = user.run("status", folder, "--json", *state).json
        assert found["in_sync"] is False and "is gone" in found["local"]["guard"]
        told = user.run("status", folder, *state).out
        assert "differs from" in told and told.count("unless you say --allow-mass-delete") == 1
        assert user.run("push", folder, *state).code == 6
    assert user.run("push", folder, "--allow-mass-delete", *state).code == 0
    assert user.run("status", folder, "--json", *state).json["in_sync"] is True


def test_status_names_the_guard_that_stopped_a_push(user: User, server: Served, folder: Path) -> None:
    """After a push that a mass deletion stopped, status says without any watcher which flag lets it go on."""
    for number in range(150):
        folders.write(folder, f"many/{number}", "x")
    user.run("push", folder, "--to", server.url)
    shutil.rmtree(folder / "many")
    assert user.run("push", folder).code == 6
    told = user.run("status", folder)
    assert told.code == 0 and "differs from" in told.out and "changes wait to be sealed" in told.out
    assert "151 of 165 entries would be deleted on the server; nothing was sent; if that is meant, push" in told.out
    assert user.run("push", folder, "--allow-mass-delete").code == 0
    assert "in sync with" in user.run("status", folder).out


def test_a_lost_database_loses_neither_name_nor_server(user: User, server: Served, folder: Path) -> None:
    """With its database removed, a workspace goes on under its name and with its server, without being told them."""
    assert user.run("push", folder, "--to", server.url, "--workspace", f"{folder.name}-x").code == 0
    (folder / ".deltasync/state.db").unlink()
    done = user.run("push", folder, "--json")
    assert (done.code, done.json["workspace"], done.json["pending"]) == (0, f"{folder.name}-x", 0)
    assert user.run("status", folder, "--json").json["in_sync"] is True
    (folder / ".deltasync/state.db").unlink()
    (folder / ".deltasync/remote").write_bytes(b"../x\nno address\n\xff")
    assert user.run("push", folder, "--json").json["pending"] == 1


def test_of_a_copied_workspace_nothing_is_told_that_is_the_originals(user: User, server: Served, folder: Path) -> None:
    """Status and verify of a copy say that it is one, as push does, instead of telling the original's state."""
    user.run("push", folder, "--to", server.url)
    copy = folder.with_name(f"{folder.name}-copy")
    shutil.copytree(folder, copy, symlinks=True)
    for command in ("status", "verify", "push"):
        done = user.run(command, copy, "--json")
        assert (done.code, done.json["error"]["code"]) == (2, "WORKSPACE_COPIED"), command
    shutil.rmtree(folder)
    assert user.run("status", copy, "--json").json["in_sync"] is True  # it was moved, as far as one can see


def test_status_tells_the_local_half_when_the_server_is_away(user: User, tmp_path: Path, folder: Path) -> None:
    """Status tells the local half when the server is away, says so, and exits 4."""
    with serving(tmp_path / "data") as gone:
        user.run("push", folder, "--to", gone.url)
    done = user.run("status", folder, "--json")
    assert done.code == 4
    assert done.json["server"] is None and done.json["local"]["sequence"] == 1 and done.json["in_sync"] is None
    assert done.json["error"]["code"] == "HOST_UNREACHABLE"
    assert done.err.count("\n") == 1 and done.err.startswith("deltasync: no answer from ")
    assert user.run("push", folder, "--max-retries", "0").code == 4


# Bundles


def test_bundles_are_listed_shown_verified_exported_and_replayed(user: User, server: Served, folder: Path) -> None:
    """Bundles are listed, shown, verified, exported and replayed into another server, whose tree is then equal."""
    user.run("push", folder, "--to", server.url, "--keep-sent", "7d")
    folders.later(folder)
    root = user.run("push", folder, "--keep-sent", "7d", "--json").json["root"]
    listed = user.run("bundle", "ls", folder, "--json").json["bundles"]
    assert [(each["sequence"], each["state"]) for each in listed] == [(1, "kept"), (2, "kept")]
    lines = user.run("bundle", "ls", folder).out.splitlines()
    assert len(lines) == 2 and all("kept" in line for line in lines)

    shown = user.run("bundle", "show", listed[1]["file"], "--json").json
    assert (shown["version"], shown["sequence_number"], shown["root"]) == ("2.0", 2, root)
    assert {each["operation"] for each in shown["operations"]} == {"created", "updated", "moved", "deleted"}
    assert "operations: " in user.run("bundle", "show", listed[1]["file"]).out

    usb = user.home / "usb"
    exported = user.run("bundle", "export", folder, usb, "--full", "--json")
    assert exported.code == 0 and exported.json["root"] == root
    files = [Path(name) for name in exported.json["files"]]
    assert sorted(files) == sorted(usb.iterdir())
    assert user.run("bundle", "verify", *files).code == 0

    with serving(user.home / "other") as other:
        first = user.run("bundle", "replay", usb, "--to", other.url, "--json")
        assert (first.code, first.json["applied"]) == (0, len(files))
        assert first.json["workspaces"][0]["root"] == root
        assert user.run("bundle", "replay", usb, "--to", other.url, "--json").json["skipped"] == len(files)
        folders.assert_same(folder, other.data / "workspaces" / folder.name / "tree")


@pytest.mark.parametrize("kind", ["B-21-version-3", "B-22-feature"])
def test_a_bundle_of_a_newer_release_is_refused_and_left(user: User, folder: Path, tmp_path: Path, kind: str) -> None:
    """To show, verify, replay it, or go on behind it: one sentence, exit 8, and the file is as it was."""
    there, file = tmp_path / "usb", tmp_path / "usb/life-11111111-00000001-aaaaaaaa.tar.zst"
    there.mkdir()
    shutil.copy(REFUSED / f"{kind}.tar.zst", file)
    before = file.read_bytes()
    for words in (
        ("bundle", "show", file),
        ("bundle", "verify", file),
        ("bundle", "replay", there, "--to", (tmp_path / "other").as_uri()),
        ("push", folder, "--workspace", "life", "--to", there.as_uri()),
    ):
        done = user.run(*words)
        assert done.code == 8 and kind[:4] in done.err and done.err.count("\n") == 1, done
    assert [*there.iterdir()] == [file] and file.read_bytes() == before


def test_a_thin_bundle_names_what_it_does_not_carry(user: User, folder: Path, tmp_path: Path) -> None:
    """Into an empty server a thin chain cannot be replayed: bundle, first path and the way out are named."""
    with serving(tmp_path / "first") as first:
        folders.write(folder, "big.bin", "known content")
        user.run("push", folder, "--to", first.url)
        thin = user.home / "thin"
        thin.mkdir()
        folders.write(thin, "copies/a.bin", "known content")
        folders.write(thin, "copies/readme.txt", "hello\n")
        user.run("push", thin, "--to", first.url, "--keep-sent", "7d")
    out = user.home / "out"
    assert user.run("bundle", "export", thin, out).code == 0
    (name,) = (each.name for each in out.iterdir())
    expected = (
        f"{name} is thin: it does not carry the content of copies/a.bin and 1 more, and the {{}} lacks it; "
        "`deltasync bundle export PATH DIR --full` writes bundles that carry everything\n"
    )
    with serving(tmp_path / "second") as second:
        done = user.run("bundle", "replay", out, "--to", second.url)
        assert (done.code, done.err) == (5, f"deltasync: {expected.format('server')}")
    words = [BINARY.with_name("deltasync-server"), "replay", out, "--data", tmp_path / "third"]
    offline = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, env=user.environment)
    assert (offline.returncode, offline.stderr) == (5, f"deltasync-server: {expected.format('store')}")


def test_an_export_of_nothing_names_the_whole_one(user: User, server: Served, folder: Path) -> None:
    """Where no bundle waits or is kept, an export writes none and says how to get them all."""
    user.run("push", folder, "--to", server.url)
    done = user.run("bundle", "export", folder, user.home / "out")
    assert done.code == 0 and done.out.startswith("0 bundles written")
    assert done.err == "deltasync: no bundle waits or is kept; --full writes a chain that carries everything\n"


def test_a_damaged_bundle_and_a_missing_one_are_named(user: User, server: Served, folder: Path) -> None:
    """A damaged bundle file fails verification (8), and a missing one stops a replay, by name (5)."""
    shutil.rmtree(folder)
    for number in range(3):
        folders.write(folder, "noise.bin", os.urandom(5000))  # content that the server's cache cannot have
        folders.write(folder, "counter.txt", str(number))
        user.run("push", folder, "--to", server.url, "--keep-sent", "7d")
    usb = user.home / "usb"
    files = sorted(map(Path, user.run("bundle", "export", folder, usb, "--json").json["files"]))
    assert len(files) == 3
    content = bytearray(files[0].read_bytes())
    content[len(content) // 2] ^= 1
    (user.home / "bad.tar.zst").write_bytes(content)
    bad = user.run("bundle", "verify", files[1], user.home / "bad.tar.zst", "--json")
    assert (bad.code, bad.json["sound"]) == (8, False)
    assert [each["reason"] is None for each in bad.json["files"]] == [True, False]
    assert bad.err.startswith("deltasync: ") and "bad.tar.zst" in bad.err

    files[1].unlink()
    with serving(user.home / "other") as other:
        done = user.run("bundle", "replay", usb, "--to", other.url)
        assert done.code == 5 and "bundle 2" in done.err and done.err.count("\n") == 1


def test_a_folder_carries_bundles_to_a_host_that_no_network_reaches(user: User, folder: Path) -> None:
    """A push to file:// writes bundles into a folder, and a replay of that folder makes another server equal."""
    usb = user.home / "usb stick"
    usb.mkdir()
    folders.write(folder, "noise.bin", os.urandom(5000))
    for change in (lambda: None, lambda: folders.later(folder)):
        change()
        done = user.run("push", folder, "--to", usb.as_uri(), "--json")
        assert (done.code, done.json["bundles"], done.json["pending"]) == (0, 1, 0)
    assert user.run("push", folder).out.startswith(f"{folder.name}: nothing to send, at sequence 2;")
    assert user.run("status", folder, "--json").json["in_sync"] is True
    assert "tree" not in user.run("status", folder).out
    with serving(user.home / "other") as other:
        assert user.run("bundle", "replay", usb, "--to", other.url, "--json").json["applied"] == 2
        folders.assert_same(folder, other.data / "workspaces" / folder.name / "tree")


# Verify, ignore, doctor, completion


def test_verify_proves_equality_and_finds_bytes_that_changed_in_silence(
    user: User, server: Served, folder: Path
) -> None:
    """Verify proves that both trees are equal, tells an edit (5) from bytes that changed in silence (8)."""
    user.run("push", folder, "--to", server.url)
    good = user.run("verify", folder, "--json")
    assert (good.code, good.json["in_sync"], good.json["mismatches"], good.json["differences"]) == (0, True, [], [])

    folders.write(folder, "readme.txt", "edited")
    (folder / "bin" / "run.sh").unlink()
    edited = user.run("verify", folder, "--json")
    assert (edited.code, edited.json["in_sync"]) == (5, False)
    assert {(each["operation"], each["path"]) for each in edited.json["differences"]} == {
        ("updated", "readme.txt"),
        ("deleted", "bin/run.sh"),
    }
    user.run("push", folder)

    rot(folder, "media", "clip.bin")
    assert user.run("push", folder, "--json").json["sent_bytes"] == 0
    rotten = user.run("verify", folder)
    assert rotten.code == 8 and "media/clip.bin: its bytes changed" in rotten.err
    assert user.run("verify", folder, "--json").json["mismatches"] == ["media/clip.bin"]


def test_verify_notices_a_server_that_lost_what_it_acknowledged(user: User, server: Served, folder: Path) -> None:
    """Verify notices a server that holds another tree under the sequence that it acknowledged (8)."""
    user.run("push", folder, "--to", server.url)
    with contextlib.closing(sqlite3.connect(folder / ".deltasync" / "state.db")) as db, db:
        db.execute("UPDATE head SET acknowledged_root = ?", (bytes(32),))
    done = user.run("verify", folder, "--json")
    assert (done.code, done.json["server_lost_it"], done.json["in_sync"]) == (8, True, True)
    assert "another tree under the sequence" in user.run("verify", folder).err


def test_verify_tells_what_the_server_asks_for_again(user: User, server: Served, folder: Path) -> None:
    """Content that the server found damaged in its cache is lost, although both roots are equal (8); push heals it."""
    content = folders.write(folder, "media/only here.bin", f"{folder.name}" * 1000).read_bytes()
    user.run("push", folder, "--to", server.url)
    digest = digest_of(content).hex()
    blob = server.data / "cache" / digest[:2] / digest
    blob.chmod(0o644)
    blob.write_bytes(content[::-1])
    blob.chmod(0o444)
    server.get(f"/api/v1/blobs/{digest}")
    assert server.get(f"/api/v1/workspaces/{folder.name}").json["wanted"] == [digest]
    done = user.run("verify", folder, "--json")
    assert (done.code, done.json["server_lost_it"], done.json["in_sync"]) == (8, True, False)
    assert done.json["lost"] == ["media/only here.bin"]
    told = user.run("verify", folder)
    assert told.code == 8 and "equal to" not in told.out
    assert "media/only here.bin: the server has lost its content; push sends it again" in told.err
    assert "asks again for 1 content that it lost; push sends it" in user.run("status", folder).out
    assert user.run("push", folder).code == 0
    healed = user.run("verify", folder, "--json")
    assert (healed.code, healed.json["server_lost_it"], healed.json["lost"]) == (0, False, [])


def rot(root: Path, directory: str, name: str) -> None:
    """Change a byte and leave no trace in the file's stat, as a disk does that goes bad.

    No program can set a ctime, so the recorded one is made the present one.
    """
    path = root / directory / name
    before = path.stat()
    with path.open("r+b") as file:
        file.write(b"\xff")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with contextlib.closing(sqlite3.connect(root / ".deltasync" / "state.db")) as db, db:
        identity, digest, packed = db.execute(
            "SELECT id, digest, stats FROM directories WHERE name = ?", (directory,)
        ).fetchone()
        (body,) = db.execute("SELECT body FROM objects WHERE digest = ?", (digest,)).fetchone()
        stats = Stats.unpack(packed)
        stats.ctimes[[each.name for each in decode_directory(body)].index(name)] = path.stat().st_ctime_ns
        db.execute("UPDATE directories SET stats = ? WHERE id = ?", (stats.pack(), identity))


def test_ignore_names_the_rule_that_decides(user: User, server: Served, folder: Path) -> None:
    """Ignore names the rule, its file and its line, or the command line."""
    folders.write(folder, ".deltasyncignore", "# no temporary files\n*.tmp\n!keep.tmp\n")
    folders.write(folder, "media/.deltasyncignore", "raw/\n")
    user.run("push", folder, "--to", server.url)
    by_file = user.run("ignore", folder / "a.tmp", "--json").json
    assert (by_file["ignored"], by_file["rule"], by_file["source_file"], by_file["line"]) == (
        True, "*.tmp", ".deltasyncignore", 2,
    )  # fmt: skip
    assert user.run("ignore", "a.tmp", cwd=folder).out == "a.tmp is ignored: *.tmp in .deltasyncignore, line 2\n"
    assert user.run("ignore", folder / "keep.tmp").out.startswith("keep.tmp is carried: !keep.tmp in ")
    assert "raw/ in media/.deltasyncignore, line 1" in user.run("ignore", folder / "media/raw/a.dat").out
    assert "*.txt on the command line" in user.run("ignore", folder / "readme.txt", "--exclude", "*.txt").out
    assert not (tree(server, folder) / "media/raw").exists()
    told = user.run("ignore", folder / "readme.txt", DELTASYNC_EXCLUDE="*.txt")
    assert told.out == "readme.txt is ignored: *.txt in DELTASYNC_EXCLUDE\n"
    both = user.run("ignore", folder / "readme.txt", "--exclude", "*.zip", DELTASYNC_EXCLUDE="*.txt")
    assert both.out == told.out
    settings = folders.write(folder, ".deltasync/config.toml", 'exclude = ["*.txt"]\ninclude = ["keep.txt"]\n')
    assert user.run("ignore", folder / "readme.txt").out == f"readme.txt is ignored: *.txt in {settings}\n"
    assert user.run("ignore", folder / "keep.txt").out == f"keep.txt is carried: !keep.txt in {settings}\n"
    assert user.run("why", folder / "readme.txt").out.startswith(f"readme.txt: ignored: *.txt in {settings}; what was")
    settings.unlink()
    own = folders.write(user.home, "own/config.toml", 'exclude = ["*.txt"]\n')
    assert user.run("ignore", folder / "readme.txt").out == f"readme.txt is ignored: *.txt in {own}\n"


def test_doctor_lists_what_may_go_wrong(user: User, server: Served, folder: Path) -> None:
    """Doctor lists what may go wrong, asks the server too, and exits 3 only for a problem."""
    before = user.run("doctor", folder, "--json")
    assert (before.code, before.json["healthy"]) == (0, True)
    user.run("push", folder, "--to", server.url)
    folders.write(folder, "con", "x")
    done = user.run("doctor", folder)
    assert done.code == 0 and "is a device name on Windows" in done.out and f"{server.url} answers: ok" in done.out
    assert "and the server agrees" in done.out
    folders.write(folder, "new\nline", "x")
    assert user.run("doctor", folder).code == 3


def test_completion_prints_a_script_that_works(user: User) -> None:
    """Completion prints a script, and the program completes commands and options for it."""
    for shell in ("bash", "zsh", "fish", "powershell"):
        assert "_DELTASYNC_COMPLETE" in user.run("completion", shell).out
    assert set(user.run("completion", "bash", "--json").json) == {"shell", "script"}
    asked = {"_DELTASYNC_COMPLETE": "complete_bash", "COMP_CWORD": "1", "COMP_WORDS": "deltasync st"}
    assert user.run(**asked).out.split() == ["status"]
    asked |= {"COMP_CWORD": "2", "COMP_WORDS": "deltasync status --wor"}
    assert user.run(**asked).out.split() == ["--workspace"]


# Bad input


@contextmanager
def another_server() -> Iterator[str]:
    """Serve something that is no deltasync server."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as other:
        other.RequestHandlerClass.log_message = lambda *_: None  # type: ignore[method-assign]
        threading.Thread(target=other.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{other.server_port}"
        other.shutdown()


BAD: list[tuple[list[str], int, str, str]] = [
    (["psuh"], 2, "USAGE", "no such command: psuh; did you mean push?"),
    (["bundle", "lst"], 2, "USAGE", "no such command 'lst'"),
    (["push"], 2, "USAGE", "missing argument 'PATH' (see deltasync push --help)"),
    (["push", "w", "--foo"], 2, "USAGE", "no such option: --foo"),
    (["push", "none"], 1, "ROOT_UNAVAILABLE", "there is no folder none"),
    (["push", "file.txt"], 1, "ROOT_UNAVAILABLE", "file.txt is not a folder"),
    (["watch", "none"], 1, "ROOT_UNAVAILABLE", "there is no folder none"),
    (["verify", "w"], 1, "NOT_FOUND", "is not a workspace yet"),
    (["status", "w"], 1, "NOT_FOUND", "is not a workspace yet"),
    (["status"], 1, "NOT_FOUND", "is not a workspace yet"),
    (["bundle", "ls", "w"], 1, "NOT_FOUND", "is not a workspace yet"),
    (["doctor", "none"], 1, "ROOT_UNAVAILABLE", "there is no folder none"),
    (["ignore", "w/a.txt"], 1, "NOT_FOUND", "lies in no workspace"),
    (["push", "w", "--to", "host:8080"], 2, "USAGE", "--to: 'host:8080' is not an address such as https://host:8080"),
    (["push", "w", "--to", "http://a b"], 2, "USAGE", "is no address of a server"),
    (["push", "w", "--to", "http://user@host"], 2, "USAGE", "no user, query or fragment"),
    (["push", "w", "--to", "http://127.0.0.1:1", "--max-retries", "0"], 4, "HOST_UNREACHABLE", "no answer from"),
    (["push", "w", "--to", "file:///none/usb"], 4, "HOST_UNREACHABLE", "is the disk mounted?"),
    (["push", "w", "--workspace", "../x"], 2, "USAGE", "--workspace: ../x is not a workspace's name"),
    (["push", "w", "--bwlimit", "10X"], 2, "USAGE", "--bwlimit: '10X' is not a size such as 500k, 10M or 2GiB"),
    (["push", "w", "--settle", "soon"], 2, "USAGE", "--settle: 'soon' is not a time"),
    (["push", "w", "--timeout", "0"], 2, "USAGE", "--timeout: '0' is not a time above zero"),
    (["push", "w", "--max-retries", "-1"], 2, "USAGE", "--max-retries: '-1' is not a whole number"),
    (["push", "w", "--state-dir", "/dev/null/x"], 2, "USAGE", "no state can be kept in"),
    (["push", "w", "w2", "--workspace", "x"], 2, "USAGE", "push each folder by itself"),
    (["bundle", "show", "none.tar.zst"], 2, "USAGE", "none.tar.zst cannot be read"),
    (["bundle", "show", "file.txt"], 8, "BUNDLE_REFUSED", "B-"),
    (["bundle", "show", "w"], 2, "USAGE", "w is a folder; name the bundle files in it, such as w/*.tar.zst"),
    (["bundle", "verify", "w"], 2, "USAGE", "w is a folder; name the bundle files in it"),
    (["bundle", "verify", "none.tar.zst"], 2, "USAGE", "none.tar.zst cannot be read"),
    (["bundle", "replay", "w"], 2, "USAGE", "name the server with --to URL"),
    (["bundle", "replay", "w", "--to", "http://127.0.0.1:1"], 1, "NOT_FOUND", "holds no bundle"),
    (["completion", "tcsh"], 2, "USAGE", "the shells are bash, zsh, fish, powershell"),
]


@pytest.mark.parametrize(("words", "code", "name", "sentence"), BAD, ids=[" ".join(each[0]) for each in BAD])
def test_bad_input_is_one_sentence_and_an_exact_exit_code(
    user: User, words: Sequence[str], code: int, name: str, sentence: str
) -> None:
    """Bad input is one sentence on stderr, an exact exit code, and with --json one object on stdout."""
    folders.write(user.home, "file.txt", "x")
    folders.write(user.home, "w/a.txt", "a")
    done = user.run(*words, "--json")
    assert (done.code, done.json["error"]["code"]) == (code, name), done.err
    assert done.err == f"deltasync: {done.json['error']['detail']}\n"
    assert sentence in done.err
    if code != 2:
        plain = user.run(*words)
        assert (plain.code, plain.out, plain.err) == (code, "", done.err)


def test_another_kind_of_server_is_told_apart(user: User, folder: Path) -> None:
    """Another kind of server is told apart from one that is away."""
    with another_server() as url:
        done = user.run("push", folder, "--to", url, "--json")
        assert (done.code, done.json["error"]["code"]) == (1, "NOT_A_DELTASYNC_SERVER")
        assert user.run("status", "--to", url, "--workspace", "x").code == 1


def test_a_plain_server_at_a_https_address_is_named(user: User, server: Served, folder: Path) -> None:
    """Who writes https for a server without TLS reads which address is meant, and no text of OpenSSL."""
    done = user.run("push", folder, "--to", server.url.replace("http", "https"))
    assert (done.code, done.out) == (1, "")
    https = server.url.replace("http", "https")
    assert done.err == f"deltasync: {https} answers plain http; use {server.url}\n"


def test_a_folder_has_one_server_one_name_and_one_place(user: User, server: Served, folder: Path) -> None:
    """A second server, a second name, a nested folder and a copy are refused, each with what to do."""
    assert user.run("push", folder, "--to", server.url).code == 0
    second = user.run("push", folder, "--to", "http://127.0.0.1:1")
    assert second.code == 2 and "it cannot be synced to http://127.0.0.1:1 as well" in second.err
    assert second.err.endswith("push again with this --to\n")
    named = user.run("push", folder, "--workspace", "other")
    assert named.code == 2 and "not other" in named.err
    assert user.run("status", folder, "--workspace", "other").code == 2
    nested = user.run("push", folder / "media")
    assert nested.code == 2 and "lies inside the workspace" in nested.err
    copy = user.home / "copy"
    shutil.copytree(folder, copy, symlinks=True)
    copied = user.run("push", copy)
    assert copied.code == 2 and f"--workspace NAME --to {server.url}" in copied.err and "--take-over" in copied.err
    fresh = f"{folder.name}-copy"
    assert user.run("push", copy, "--workspace", fresh, "--to", server.url).code == 0


def test_a_guard_stops_a_mass_deletion_until_it_is_allowed(user: User, server: Served, folder: Path) -> None:
    """A guard stops the deletion of everything (6) until the user allows it."""
    assert user.run("push", folder, "--to", server.url).code == 0
    for path in folder.iterdir():
        if path.name != ".deltasync":
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    stopped = user.run("push", folder, "--json")
    assert (stopped.code, stopped.json["error"]["code"]) == (6, "GUARD_STOPPED")
    assert "--allow-mass-delete" in stopped.err
    assert user.run("push", folder, "--allow-mass-delete").code == 0
    assert list(tree(server, folder).iterdir()) == []


def test_a_full_outbox_stops_sealing(user: User, folder: Path) -> None:
    """Without a server, an outbox that is full stops sealing (6); nothing is lost, and more room lets it go on."""
    full = user.run("push", folder, "--outbox-limit", "10k")
    assert full.code == 6 and "--outbox-limit" in full.err
    status = user.run("status", folder)
    assert status.code == 0 and "changes wait to be sealed" in status.out
    assert user.run("push", folder).code == 0
    assert "1 bundle to be sent, " in user.run("status", folder).out


def test_status_says_how_much_waits_and_where_nothing_is_yet(user: User, folder: Path, tmp_path: Path) -> None:
    """Content of sealed bundles counts although no file has it; what was never pushed has no folder on the server."""
    folders.write(folder, "large", noise("large", 3 << 20))
    with serving(tmp_path / "small", "--tenant-quota", "1M") as small:
        assert user.run("push", folder, "--to", small.url).code == 6
        status = user.run("status", folder)
        assert "server  nothing was pushed there yet\n" in status.out and "workspaces" not in status.out
        assert "1 bundle to be sent, 3.2 MiB of content\n" in status.out
        local = user.run("status", folder, "--json").json["local"]
        assert local["pending_bytes"] >= 3 << 20 and local["outbox_bytes"] == 0


def test_the_state_may_lie_elsewhere(user: User, server: Served, folder: Path) -> None:
    """--state-dir keeps the workspace free of our files; every command finds the state there."""
    place = ("--state-dir", user.home / "state")
    os.mkfifo(folder / "pipe")
    assert user.run("push", folder, "--to", server.url, *place).code == 3
    assert not (folder / ".deltasync").exists()
    status = user.run("status", folder, *place)
    assert status.code == 0 and "in sync" in status.out and "1 problem" in status.out
    assert user.run("status", folder).code == 1
    assert user.run("verify", folder, *place).code == 3
    assert user.run("bundle", "ls", folder, *place).out == "no bundle waits or is kept\n"
    assert user.run("ignore", folder / "readme.txt", *place).out == "readme.txt is carried: no rule matches\n"
    itself = user.run("ignore", folder, *place)
    assert itself.code == 2 and "is a workspace itself" in itself.err
    assert user.run("why", folder / "readme.txt", *place).out.startswith("readme.txt: in step: ")
    assert user.run("why", folder, *place).code == 0


@pytest.mark.parametrize(
    ("variables", "config", "words"),
    [
        ({"DELTASYNC_BWLIMIT": "10X"}, "", "DELTASYNC_BWLIMIT: '10X' is not a size"),
        ({"DELTASYNC_GITIGNORE": "perhaps"}, "", "DELTASYNC_GITIGNORE: 'perhaps' is not true or false"),
        ({"REMOTE_UPLOAD_TIMEOUT": "x"}, "", "REMOTE_UPLOAD_TIMEOUT: 'x' is not a time"),
        ({}, 'bwlimit = "10X"', "config.toml: bwlimit: '10X' is not a size"),
        ({}, "colour = 1", "config.toml: colour is no setting"),
        ({}, "settle =", "config.toml is not TOML"),
    ],
)
def test_a_bad_variable_and_a_bad_file_are_named(
    user: User, folder: Path, variables: dict[str, str], config: str, words: str
) -> None:
    """A bad variable and a bad configuration file are named, with what is allowed."""
    folders.write(user.home, "own/config.toml", config)
    done = user.run("push", folder, **variables)
    assert (done.code, done.out) == (2, "") and words in done.err and done.err.count("\n") == 1


def test_a_mistyped_variable_is_told_once(user: User, server: Served, folder: Path) -> None:
    """A variable that looks like a setting and is none has no effect, and says so on stderr; others are let be."""
    done = user.run("push", folder, "--json", DELTASYNC_EXCLUDES="*", DELTASYNC_MINE="x", DELTASYNC_SERVER_DATA="/x")
    assert done.code == 0 and done.json["operations"]["created"] == 14
    assert done.err.count("DELTASYNC_EXCLUDES is no setting and has no effect; did you mean DELTASYNC_EXCLUDE?") == 1
    assert done.err.count("DELTASYNC_") == 2
    assert "DELTASYNC_" not in user.run("push", folder, "-q", DELTASYNC_EXCLUDES="*").err


def test_variables_and_files_set_what_flags_set(user: User, server: Served, folder: Path) -> None:
    """Variables and files set what flags set: the server, the name, the rules, the kind of output."""
    folders.write(user.home, "own/config.toml", 'exclude = ["*.bin"]\ntimeout = "20s"\n')
    done = user.run("push", folder, REMOTE_UPLOAD_ENDPOINT=server.url, DELTASYNC_JSON="1", DELTASYNC_WORKSPACE="by-env")
    assert (done.code, done.json["workspace"]) == (0, "by-env")
    names = {path.name for path in (server.data / "workspaces" / "by-env" / "tree").rglob("*")}
    assert "readme.txt" in names and "clip.bin" not in names
    assert user.run("status", "none", DELTASYNC_JSON="1").json["error"]["code"] == "ROOT_UNAVAILABLE"


def test_what_nobody_foresaw_is_one_sentence_and_a_traceback_in_a_file(user: User, folder: Path) -> None:
    """What nobody foresaw is one sentence; its traceback is in a file, or on stderr with -v."""
    folders.write(user.home, "broken/sqlite_utils.py", "raise RuntimeError('a broken installation')\n")
    odd = {"PYTHONPATH": str(user.home / "broken")}
    done = user.run("push", folder, **odd)
    assert done.code == 1 and done.err.count("\n") == 1, done.err
    assert "Traceback" in (user.home / "own" / "error.log").read_text()
    assert "Traceback" in user.run("push", folder, "-v", **odd).err


# Signals, pipes, terminals


def test_an_interrupt_ends_a_push_with_130(user: User, folder: Path) -> None:
    """An interrupt ends a push with exit code 130 and one word, whatever it waits for."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        process = user.start("push", folder, "--to", f"http://127.0.0.1:{silent.getsockname()[1]}")
        silent.settimeout(SECONDS)
        connection, _ = silent.accept()
        with connection:
            connection.recv(1)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, out, err) == (130, "", "deltasync: stopped\n")


def test_a_reader_that_goes_away_is_no_noise(user: User) -> None:
    """A reader that goes away, as `head` does, makes no noise."""
    read, write = os.pipe()
    os.close(read)
    process = user.start("completion", "bash", stdout=write)
    os.close(write)
    _, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, err) == (1, "")


def test_a_terminal_sees_a_bar_and_a_pipe_sees_lines(user: User, server: Served, folder: Path) -> None:
    """On a terminal progress is a bar that goes away; in a pipe it is a line for each bundle."""
    folders.write(folder, "large.bin", os.urandom(6 << 20))
    master, slave = pty.openpty()
    process = user.start("push", folder, "--to", server.url, stderr=slave)
    os.close(slave)
    seen = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:
            break
        if not part:
            break
        seen += part
    os.close(master)
    out, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0 and b"sending" in seen
    assert out.count("\n") == 1 and "1 bundle, " not in out
    folders.write(folder, "more.bin", os.urandom(1 << 20))
    assert "1 bundle, 1.0 MiB of 1.0 MiB read\n" in user.run("push", folder).out


# Beside a watcher


@contextmanager
def watching(user: User, root: Path, *words: Word) -> Iterator[subprocess.Popen[str]]:
    """Run `deltasync watch --json` while the block runs; the block begins when it has sent everything."""
    process = user.start("watch", root, "--json", *words)
    try:
        assert process.stdout
        for line in process.stdout:
            if json.loads(line)["event"] in ("sent", "sealed"):
                break
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=SECONDS)


def test_a_push_beside_a_watcher_asks_it(user: User, server: Served, folder: Path) -> None:
    """A push beside a watcher asks it, also for what it has not noticed yet, and tells how old its last look is."""
    with watching(user, folder, "--to", server.url, "--rescan", "3600") as watcher:
        folders.write(folder, "fresh.txt", "fresh")
        done = user.run("push", folder, "--json")
        assert (done.code, done.json["watcher"]) == (0, True), done.err
        assert done.json["scan_age_seconds"] >= 0
        folders.assert_same(folder, tree(server, folder))
        assert user.run("push", folder, "--scan", "--json").json["scan_age_seconds"] < 20
        told = user.run("push", folder, "--exclude", "*.txt")
        assert "asked the running watcher; it looked at everything" in told.out
        assert told.code == 0 and "--exclude has no effect" in told.err
        status = user.run("status", folder, "--json").json
        assert status["in_sync"] is True and status["watcher"]["pid"] == watcher.pid
        assert "a watcher runs" in user.run("status", folder).out
        assert user.run("verify", folder).code == 0
        busy = user.run("push", "-n", folder, "--json")
        assert (busy.code, busy.json["error"]["code"]) == (4, "ALREADY_RUNNING")
        other = user.run("push", folder, "--to", "http://127.0.0.1:1")
        assert other.code == 2 and "stop it first" in other.err
        watcher.terminate()
        assert watcher.wait(SECONDS) == 0
    assert user.run("push", folder, "--json").json["watcher"] is False


def test_status_tells_what_keeps_a_watcher(user: User, server: Served, folder: Path) -> None:
    """Where a watcher cannot go on, status says why: here, everything is gone and nothing says that it was meant."""
    everything = folder.rename(folder.with_name("everything"))
    folder.mkdir()
    everything.rename(folder / "everything")
    with watching(user, folder, "--to", server.url):
        assert user.run("push", folder).code == 0
        (folder / "everything").rename(everything)  # in one step: the watcher may look at any moment
        assert user.run("push", folder).code == 6
        status = user.run("status", folder)
        assert status.code == 0 and status.out.count("--allow-mass-delete") == 1
        assert "differs from" in status.out


def test_a_watcher_without_a_server_prints_lines_for_people(user: User, folder: Path) -> None:
    """A watcher without a server seals into the outbox and prints one line for each thing that happens."""
    process = user.start("watch", folder)
    assert process.stdout
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "sealed" in line:
            break
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0 and err == ""
    assert any(f"watching {folder}" in line for line in lines) and "stopped" in rest


# Start


def modules_after(user: User, *words: Word) -> set[str]:
    """Return the modules that a command loads."""
    program = (
        "import sys\nbefore = set(sys.modules)\nfrom deltasync.cli.main import run\n"
        "code = run(sys.argv[1:])\nprint(code, *sorted(set(sys.modules) - before), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        capture_output=True, text=True, env=user.environment, timeout=SECONDS, check=True,
    )  # fmt: skip
    code, *names = done.stderr.splitlines()[-1].split()
    assert code == "0", done.stderr
    return set(names)


HEAVY = {"pydantic", "rich", "watchdog", "sqlite_utils", "typer.rich_utils", "fastapi", "asyncio", "pathspec"}


def test_a_command_loads_only_what_it_needs(user: User, server: Served, folder: Path) -> None:
    """A command loads only what it needs, so that it starts fast."""
    assert not modules_after(user, "--version") & (HEAVY | {"requests", "sqlite3", "zstandard"})
    user.run("push", folder, "--to", server.url)
    assert not modules_after(user, "push", folder, "-q") & HEAVY
    assert not modules_after(user, "status", folder) & HEAVY
    local = user.home / "local"
    folders.life(local)
    user.run("push", local)
    assert not modules_after(user, "status", local) & (HEAVY | {"requests", "urllib3"})
    assert not modules_after(user, "ignore", local / "x") & (HEAVY | {"requests", "zstandard"})


def test_the_help_of_a_command_says_what_its_options_do_there(user: User) -> None:
    """Nothing is remembered by fetch or replay; push waits for no age, as watch does."""
    texts = {name: " ".join(user.run(*name.split(), "--help").out.split()) for name in ("fetch", "bundle replay")}
    assert "Name of the workspace on the server." in texts["fetch"]
    assert "without it each bundle goes to the one that it names" in texts["bundle replay"]
    assert not any("remembered" in text for text in texts.values())
    assert "a file that changes while it is read" in " ".join(user.run("push", "--help").out.split())
    assert "its writer has not closed" in " ".join(user.run("watch", "--help").out.split())


def test_version_and_help_answer_at_once(user: User) -> None:
    """--version and --help answer with exit 0; no words at all are a wish for help."""
    assert user.run("--version").out == user.run("--version", "push").out
    assert user.run("--version").out.startswith("deltasync ")
    words = [sys.executable, "-m", "deltasync", "--version"]
    assert subprocess.run(words, capture_output=True, env=user.environment, check=True).stdout.startswith(b"deltasync ")
    for words in ([], ["--help"], ["-h"]):
        assert "Commands:" in user.run(*words).out
    for command in ("watch", "push", "fetch", "status", "verify", "why", "ignore", "bundle", "doctor", "completion"):
        done = user.run(command, "--help")
        assert done.code == 0 and done.out.startswith(f"Usage: deltasync {command}")
        if command != "bundle":
            assert all(word in done.out for word in ("--json", "-q, --quiet", "-v, --verbose", "DELTASYNC_JSON"))
