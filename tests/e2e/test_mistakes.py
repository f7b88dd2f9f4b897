"""What people do by mistake: nothing is lost by it, nobody is locked out, and one sentence says what to do."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import folders
import pytest
from serving import Served
from user import User


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A name that no other test uses at the server."""
    return f"m{abs(hash(request.node.nodeid)):x}"


def tree(server: Served, name: str) -> Path:
    return server.data / "workspaces" / name / "tree"


def mounted(point: Path) -> None:
    """Mount an empty file system, or skip where that may not be done."""
    words = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", point]
    if shutil.which("mount") is None or subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("may not mount")


def test_a_rehearsal_leaves_nothing_behind(user: User, server: Served, name: str) -> None:
    """A dry run in a folder that is no workspace makes none, also with no server."""
    root = user.home / name
    folders.write(root, "a", b"x")
    done = user.run("push", root, "-n", "--to", server.url, "--json")
    assert (done.code, done.json["operations"]["created"], done.json["dry_run"]) == (0, 1, True)
    assert user.run("push", root, "-n", "--to", "http://127.0.0.1:1").code == 4
    assert [entry.name for entry in root.iterdir()] == ["a"]


def test_a_push_that_knows_no_server_says_so(user: User) -> None:
    """Nothing to send is no success where nobody was asked: it says that no server is known, and still ends with 0."""
    (user.home / "w").mkdir()
    done = user.run("push", "w")
    assert (done.code, done.out.split(",")[0]) == (0, "w: nothing to send")
    assert done.err == "deltasync: no server is known for this folder; name one with --to\n"


def test_a_folder_that_was_moved_sends_nothing_again(user: User, server: Served, name: str) -> None:
    """After `mv` a push says that a new history begins and that nothing goes again; and nothing does."""
    root = user.home / name
    folders.write(root, "a", "content")
    assert user.run("push", root, "--to", server.url).code == 0
    moved = root.rename(user.home / f"{name}-moved")
    done = user.run("push", moved, "--json")
    assert done.err.endswith("; a new history begins; nothing that the host has is sent again\n")
    assert (done.code, done.json["bundles"], done.json["sequence"]) == (0, 0, 1)


def test_a_folder_from_another_machine_sends_no_content_again(
    user: User, server: Served, name: str, tmp_path: Path
) -> None:
    """The state came along with the folder: taken over it sends no content, as its note says."""
    root = user.home / name
    folders.write(root, "a", "content")
    assert user.run("push", root, "--to", server.url).code == 0
    other = User(tmp_path / "other")
    done = other.run("push", root, "--take-over", "--json")
    assert "another machine or user; a new history begins; nothing that the host has is sent again" in done.err
    assert (done.code, done.json["content_bytes"], done.json["taken_over"]) == (0, 0, True)


def test_a_push_of_the_folder_above_leaves_a_workspace_usable(user: User, server: Served, name: str) -> None:
    """The outer workspace leaves the inner one out and says so; the inner one goes on."""
    outer, inner = user.home / name, user.home / name / "inner"
    folders.write(inner, "file", b"1")
    folders.write(outer, "beside", b"2")
    assert user.run("push", inner, "--to", server.url, "--workspace", f"{name}-inner").code == 0
    done = user.run("push", outer, "--to", server.url)
    assert done.code == 3 and "inner: holds a nested workspace" in done.err
    folders.write(inner, "new", b"3")
    assert user.run("push", inner).code == 0
    assert (tree(server, f"{name}-inner") / "new").read_bytes() == b"3"
    assert not (tree(server, name) / "inner").exists()
    assert user.run("status", inner).code == user.run("verify", inner).code == 0
    assert "in step" in user.run("why", inner / "new").out


def test_a_new_workspace_inside_of_another_is_refused(user: User, server: Served, name: str) -> None:
    """Its files are carried already; only what was pushed counts, not a folder that was tried once."""
    outer, inner = user.home / name, user.home / name / "inner"
    folders.write(inner, "file", b"1")
    assert user.run("push", outer, "--to", "http://127.0.0.1:1").code == 4
    assert user.run("push", inner, "-n").code == 0
    assert user.run("push", outer, "--to", server.url).code == 0
    done = user.run("push", inner, "--to", server.url)
    assert done.code == 2 and str(outer / ".deltasync") in done.err


def test_excludes_add_up(user: User, server: Served, name: str) -> None:
    """A pattern on the command line is one more, not one instead of those in the file and the environment."""
    root = user.home / name
    for file in ("keep", "a.key", "b.log", "c.tmp"):
        folders.write(root, file, b"x")
    folders.write(root, ".deltasync/config.toml", 'exclude = ["*.key"]\n')
    done = user.run("push", root, "--to", server.url, "--exclude", "*.log", DELTASYNC_EXCLUDE="*.tmp")
    assert done.code == 0
    assert [entry.name for entry in tree(server, name).iterdir()] == ["keep"]


def test_a_disk_that_is_not_mounted_is_not_taken_for_an_empty_one(user: User, name: str) -> None:
    """Bundles for a disk wait until it is there again; a disk whose bundles were carried away takes the next."""
    root, point = user.home / name, user.home / "disk"
    folders.write(root, "one", b"1")
    point.mkdir()
    mounted(point)
    try:
        assert user.run("push", root, "--to", point.as_uri()).code == 0
        for file in point.iterdir():
            file.unlink()
        folders.write(root, "two", b"2")
        assert user.run("push", root).code == 0
    finally:
        subprocess.run(["umount", point], check=True)
    folders.write(root, "three", b"3")
    for command in ("push", "status", "verify"):
        done = user.run(command, root)
        assert done.code == 4 and f"nothing is mounted at {point}" in done.err
    assert list(point.iterdir()) == []


@pytest.mark.parametrize("where", ["inside", "itself", "another"])
def test_bundles_do_not_go_where_they_would_be_carried(user: User, server: Served, name: str, where: str) -> None:
    """A folder for bundles inside of a workspace is refused: the next push would carry them as files."""
    root, other = user.home / name, user.home / "other"
    folders.write(root, "a", b"x")
    folders.write(other, "b", b"x")
    assert user.run("push", other, "--to", server.url, "--workspace", f"{name}-other").code == 0
    target = {"inside": root / "out", "itself": root, "another": other / "out"}[where]
    target.mkdir(exist_ok=True)
    done = user.run("push", root, "--to", target.as_uri())
    assert done.code == 2 and "name a folder outside of it" in done.err
    assert not list(target.glob("*.zst"))


def test_a_state_is_not_kept_among_other_files(user: User, server: Served, name: str) -> None:
    """A state folder is empty, or holds a state already."""
    root, other = user.home / name, user.home / "other"
    folders.write(root, "a", b"x")
    folders.write(other, "b", b"x")
    done = user.run("push", root, "--to", server.url, "--state-dir", other)
    assert done.code == 2 and "holds other files" in done.err
    assert [entry.name for entry in other.iterdir()] == ["b"]
    for _ in range(2):
        assert user.run("push", root, "--to", server.url, "--state-dir", user.home / "state").code == 0


def test_a_take_over_that_is_refused_takes_nothing(user: User, server: Served, name: str) -> None:
    """The folder that has the name goes on, until the other one's bundle was applied."""
    first, second = user.home / "first" / name, user.home / "second" / name
    folders.write(first, "1", b"1")
    folders.write(second, "2", b"2")
    assert user.run("push", first, "--to", server.url).code == 0
    assert user.run("push", second, "--to", server.url, "--take-over").code == 6
    folders.write(first, "more", b"3")
    assert user.run("push", first).code == 0
    assert user.run("push", second, "--to", server.url, "--take-over", "--allow-mass-delete").code == 0
    folders.assert_same(second, tree(server, name))
    done = user.run("push", first)
    assert done.code == 2 and "is another folder" in done.err


def test_a_take_over_with_nothing_to_send_says_so(user: User, server: Served, name: str, tmp_path: Path) -> None:
    """The bundle that makes a workspace ours has no operations, and the line tells what it did."""
    first, second = user.home / "first" / name, user.home / "second" / name
    folders.write(first, "1", b"1")
    assert user.run("push", first, "--to", server.url).code == 0
    shutil.copytree(first, second, ignore=shutil.ignore_patterns(".deltasync"))
    other = User(tmp_path / "other")
    done = other.run("push", second, "--to", server.url, "--take-over")
    assert done.code == 0 and f"{name}: took the workspace over, nothing else to send" in done.out
    assert user.run("push", first).code == 5


def test_what_another_identity_sealed_is_sealed_again(user: User, server: Served, name: str, tmp_path: Path) -> None:
    """Bundles that wait under a former identity would lock this one out: they are replaced by its own."""
    root, other = user.home / name, User(tmp_path / "other")
    folders.write(root, "1", b"1")
    assert user.run("push", root).code == 0
    done = other.run("push", root, "--to", server.url)
    assert done.code == 0 and "written by another machine or user" in done.err
    folders.write(root, "2", b"2")
    assert other.run("push", root).code == 0
    folders.assert_same(root, tree(server, name))


def test_a_full_outbox_without_a_server_says_what_helps(user: User, name: str) -> None:
    """There is no server that could take anything."""
    root = user.home / name
    folders.write(root, "large", bytes(range(256)) * 10_000)
    done = user.run("push", root, "--outbox-limit", "1M")
    assert done.code == 6 and "name a server with --to" in done.err


def test_a_server_s_own_folder_is_not_fetched_into(user: User, server: Served, name: str) -> None:
    """What lies in a data folder is the server's alone: a fetch over it, in it or around it changes nothing (2)."""
    root, own = user.home / name, tree(server, name)
    for content in (b"1", b"22"):
        folders.write(root, "a", content)
        assert user.run("push", root, "--to", server.url).code == 0
    where = ("--from", server.url, "--workspace", name, "--at", "1", "--delete", "--allow-mass-delete")
    for dest in (own, own / "new/deeper", server.data, server.data.parent):
        done = user.run("fetch", *where, dest)
        assert done.code == 2 and "is the data folder of a deltasync-server" in done.err and done.err.count("\n") == 1
        assert not (dest / ".deltasync").exists()
    folders.assert_same(root, own)


@pytest.mark.parametrize("command", ["push", "watch"])
def test_a_server_s_own_folder_is_no_workspace(user: User, server: Served, name: str, command: str) -> None:
    """A state in a tree of the server would become a part of it: `push` and `watch` refuse it (2) and leave none."""
    root = user.home / name
    folders.write(root, "a", b"1")
    assert user.run("push", root, "--to", server.url).code == 0
    for elsewhere in ((), ("--state-dir", user.home / "state")):
        done = user.run(command, tree(server, name), "--to", server.url, "--workspace", f"{name}-again", *elsewhere)
        assert done.code == 2 and "belongs to the data folder" in done.err
    folders.assert_same(root, tree(server, name))
    assert not (tree(server, name) / ".deltasync").exists() and not (user.home / "state").exists()


def test_a_first_push_that_was_refused_does_not_make_a_folder_a_source(user: User, server: Served, name: str) -> None:
    """A fetch into it says that nothing was ever sealed there, and what to remove; then it works."""
    first, second = user.home / "first" / name, user.home / "second" / name
    folders.write(first, "1", b"1")
    folders.write(second, "2", b"2")
    assert user.run("push", first, "--to", server.url).code == 0
    where = ("--from", server.url, "--workspace", name)
    for url, code in ((server.url, 2), ("http://127.0.0.1:1", 4)):
        assert user.run("push", second, "--to", url, "--max-retries", "0").code == code
        done = user.run("fetch", *where, second)
        assert (done.code, (second / "1").exists()) == (2, False)
        assert "nothing that was ever sealed" in done.err and f"remove {second}/.deltasync" in done.err
    shutil.rmtree(second / ".deltasync")
    assert user.run("fetch", *where, second).code == 0 and (second / "1").read_bytes() == b"1"
    done = user.run("fetch", *where, first)
    assert done.code == 2 and "pushed from here" in done.err and "remove" not in done.err


def test_a_folder_without_a_name_is_named(user: User) -> None:
    """The root of the file system has no name for a workspace: the sentence says which folder is meant (2)."""
    done = user.run("push", "/", "-n")
    assert (done.code, done.err) == (
        2,
        "deltasync: the folder / has no name for the workspace; give one with --workspace\n",
    )


def test_a_mount_that_is_missing_with_its_state_deletes_nothing(user: User, server: Served, name: str) -> None:
    """The folder below the mount point is an empty one that was never synced: the server keeps what it has."""
    point = user.home / "disk"
    point.mkdir()
    mounted(point)
    try:
        for number in range(30):
            folders.write(point / name, str(number), b"%d" % number)
        assert user.run("push", point / name, "--to", server.url).code == 0
    finally:
        subprocess.run(["umount", "-l", point], check=True)
    (point / name).mkdir()
    for content in (None, b"written while it was away"):
        if content:
            folders.write(point / name, "new", content)
        done = user.run("push", point / name, "--to", server.url)
        assert done.code == 6 and "30 of 30 entries would be deleted" in done.err and "--allow-mass-delete" in done.err
    assert len(list(tree(server, name).iterdir())) == 30
