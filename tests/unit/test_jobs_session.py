"""Sessions: made of blobs whole or not at all, removed whatever a command has made of them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import given, let_pass, output, wanted
from sender import DAY, Sender

from deltasync.core.errors import AlreadyRunning, Cancelled, NotFound, UsageError
from deltasync.core.hashing import digest_of
from deltasync.core.jobs import JobRequest, List, Piece
from deltasync.core.manifest import Entry, Kind
from deltasync.core.names import WorkspaceName
from deltasync.disk import Folder
from deltasync_server.blobs import is_unchanged
from deltasync_server.config import StoreConfig
from deltasync_server.jobs.account import Account
from deltasync_server.jobs.admission import admit
from deltasync_server.jobs.removal import remove_all
from deltasync_server.jobs.session import Session, Sessions
from deltasync_server.jobs.table import insert, job_row
from deltasync_server.receive import Store
from deltasync_server.state import blob_row
from deltasync_server.tenants import DEFAULT

JOB = "ds_1_00000001"
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")


@pytest.fixture
def sender() -> Sender:
    return Sender(name=WorkspaceName("w"))


def opened(data: Path, **settings: Any) -> Store:
    store = Store(StoreConfig(data, **settings))
    store.recover()
    return store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with opened(tmp_path / "data") as found:
        yield found


@pytest.fixture
def trusting(tmp_path: Path) -> Iterator[Store]:
    with opened(tmp_path / "data", trust_jobs=True) as found:
        yield found


def furnish(store: Store, sender: Sender) -> None:
    """Send a tree with a folder, a link in it, an empty folder, and files of several times and bits."""
    flat = sender.tree(top=b"top", film__a=b"of a", film__sub__b=b"of b")
    flat["film/run"] = sender.file("film/run", b"#!/bin/sh\n", mtime_ns=DAY * 3 + 17, executable=True)
    flat["film/link"] = Entry("link", Kind.SYMLINK, target="sub/b")
    flat["film/empty"] = Entry("empty", Kind.DIRECTORY)
    sender.send(store, flat)


def made(
    store: Store, request: JobRequest, account: Account | None = None, go_on: Callable[[], None] = lambda: None
) -> Session:
    """Make the session of a request as a job has it."""
    with store.state.write() as db:
        insert(db, JOB, DEFAULT, request, admit(db, store.config, DEFAULT, request), [])
        job = job_row(db, JOB)
    assert job is not None
    sessions = Sessions(store, account)
    try:
        return sessions.make(job, go_on)
    finally:
        sessions.close()


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir() if each.name != ".lock")


def test_inputs_stand_in_their_places_as_they_are_in_the_tree(store: Store, sender: Sender) -> None:
    """Files have their bytes, times and bits, folders all that is in them, and a link in one stays one."""
    furnish(store, sender)
    session = made(store, wanted("x", inputs=[given("home/ada/film", "film"), given("home/ada/t", "top")]))
    inputs = session.path / "inputs/home/ada"
    assert names(inputs) == ["film", "t"] and (inputs / "t").read_bytes() == b"top"
    assert names(inputs / "film") == ["a", "empty", "link", "run", "sub"]
    assert os.readlink(inputs / "film/link") == "sub/b" and (inputs / "film/link").read_bytes() == b"of b"
    run = (inputs / "film/run").stat()
    assert (run.st_mtime_ns, run.st_mode & 0o111) == (DAY * 3 + 17, 0o111)
    assert (inputs / "t").stat().st_mtime_ns == DAY and not (inputs / "t").stat().st_mode & 0o111
    assert names(session.path) == ["inputs", "outputs", "work"] and names(session.path.parent) == [JOB]


def test_a_whole_workspace_is_an_input(store: Store, sender: Sender) -> None:
    """Without a path it is the tree's root, also where that is empty."""
    sender.send(store, {})
    assert names(made(store, wanted("x", inputs=[given("all")])).path / "inputs/all") == []


def test_an_input_is_of_its_sequence_whatever_came_since(store: Store, sender: Sender) -> None:
    """A later change of the file, and a collection, change nothing of what was asked for: the job holds it."""
    sender.send(store, sender.tree(f=b"of one", sub__g=b"also"))
    request = wanted("x", inputs=[given("f", "f"), given("s", "sub")])
    with store.state.write() as db:
        insert(db, JOB, DEFAULT, request, admit(db, store.config, DEFAULT, request), [])
    for number in range(12):
        sender.send(store, sender.tree(f=b"then %d" % number))
    store.catch_up()
    store.collect()
    with store.state.read() as db:
        job = job_row(db, JOB)
    assert job is not None
    sessions = Sessions(store, None)
    session = sessions.make(job, lambda: None)
    sessions.close()
    assert (session.path / "inputs/f").read_bytes() == b"of one"
    assert (session.path / "inputs/s/g").read_bytes() == b"also"
    with store.state.write() as db:
        db.execute("UPDATE jobs SET roots = x''")
    assert store.collect().blobs == 2


def test_a_list_has_the_places_of_its_files(store: Store, sender: Sender) -> None:
    """Its lines name the files where they lie here, and are otherwise as they were, byte for byte."""
    furnish(store, sender)
    lines = [[Piece(text="file '"), Piece(input="top"), Piece(text="'\r\n")], [Piece(raw="/w=="), Piece(output="o")]]
    session = made(store, wanted("x", inputs=[given("top", "top")], lists=[List(place="l/list.txt", lines=lines)]))
    top, out = (os.fsencode(session.path / each) for each in ("inputs/top", "outputs/o"))
    assert (session.path / "inputs/l/list.txt").read_bytes() == b"file '" + top + b"'\r\n\xff" + out


def test_outputs_find_their_folders(store: Store) -> None:
    """The folder of each output is there, an output that is a folder itself, and nothing else."""
    outputs = [output("a/b/out.png"), output("a/frames", is_folder=True), output("c/%04d.png", is_pattern=True)]
    session = made(store, wanted("x", outputs=outputs))
    found = sorted(str(each.relative_to(session.path / "outputs")) for each in (session.path / "outputs").rglob("*"))
    assert found == ["a", "a/b", "a/frames", "c"]
    assert (session.work / "tmp").is_dir()


def test_in_place_inputs_are_remembered_and_never_shared(trusting: Store, sender: Sender) -> None:
    """What the command may write is a copy, and its digest before is known by its place."""
    furnish(trusting, sender)
    session = made(trusting, wanted("x", inputs=[given("film", "film", in_place=True), given("t", "top")]))
    contents = {"film/a": b"of a", "film/run": b"#!/bin/sh\n", "film/sub/b": b"of b"}
    assert session.staged == {place: digest_of(content) for place, content in contents.items()}
    assert (session.path / "inputs/film/a").stat().st_nlink == 1
    (session.path / "inputs/film/a").write_bytes(b"changed")
    assert trusting.cache.holds_right_bytes(digest_of(b"of a"))


def test_links_are_only_made_where_commands_cannot_write_through_them(store: Store, sender: Sender) -> None:
    """A command that runs as the server's own user gets copies: what it writes changes no blob."""
    furnish(store, sender)
    session = made(store, wanted("x", inputs=[given("t", "top")]))
    assert session.linked == set()
    (session.path / "inputs/t").write_bytes(b"changed")
    assert store.cache.holds_right_bytes(digest_of(b"top"))


def test_trusted_commands_get_links_of_blobs(trusting: Store, sender: Sender) -> None:
    """With --trust-jobs an input shares its blob's inode, unless its time or bit is another one."""
    flat = sender.tree(a=b"same", c=b"other")
    flat["b"] = sender.file("b", b"same", mtime_ns=DAY * 5)
    sender.send(trusting, flat)
    trusting.catch_up()
    session = made(trusting, wanted("x", inputs=[given("all")]))
    if (session.path / "inputs/all/c").stat().st_nlink == 1:
        pytest.skip("this file system makes reflinks")
    found = {name: (session.path / "inputs/all" / name).stat() for name in ("a", "b", "c")}
    digests = {"a": digest_of(b"same"), "b": digest_of(b"same"), "c": digest_of(b"other")}
    with trusting.state.read() as db:
        blobs = {name: blob_row(db, digest) for name, digest in digests.items()}
    for name, status in found.items():
        blob, row = trusting.cache.status(digests[name]), blobs[name]
        assert blob is not None and row is not None
        is_blobs = (row.mtime_ns, row.executable) == (status.st_mtime_ns, False)
        assert os.path.samestat(status, blob) is is_blobs and (not is_blobs or is_unchanged(row, status))
    assert [found[name].st_mtime_ns for name in ("a", "b")] == [DAY, DAY * 5]
    assert found["a"].st_ino != found["b"].st_ino and session.linked == set(digests.values())


@pytest.mark.parametrize("trust", [False, True])
def test_a_damaged_blob_reaches_no_session(tmp_path: Path, sender: Sender, *, trust: bool) -> None:
    """Bytes whose fingerprint is another one are read and compared first; wrong ones are no input, and are put away."""
    with opened(tmp_path / "data", trust_jobs=trust) as store:
        furnish(store, sender)
        with store.cache.home_of(digest_of(b"top")) as home:
            path = Path(f"/proc/self/fd/{home.fd}") / digest_of(b"top").hex()
            path.chmod(0o644)
            path.write_bytes(b"pot")
        with pytest.raises(NotFound, match="content of the input t"):
            made(store, wanted("x", inputs=[given("t", "top")]))
        assert names(store.config.data / "sessions") == []
        assert (
            not store.cache.status(digest_of(b"top")) and len(list((store.config.data / "quarantine").iterdir())) == 1
        )


@pytest.mark.parametrize("trust", [False, True])
def test_a_touched_blob_is_read_and_used(tmp_path: Path, sender: Sender, *, trust: bool) -> None:
    """Where only the time of a blob is another one its bytes are right all the same."""
    with opened(tmp_path / "data", trust_jobs=trust) as store:
        furnish(store, sender)
        with store.cache.home_of(digest_of(b"top")) as home:
            os.utime(digest_of(b"top").hex(), ns=(1, 1), dir_fd=home.fd)
        session = made(store, wanted("x", inputs=[given("t", "top")]))
        assert (session.path / "inputs/t").read_bytes() == b"top"
        assert (session.path / "inputs/t").stat().st_mtime_ns == DAY


def test_nothing_is_left_of_a_session_that_was_not_made(store: Store, sender: Sender) -> None:
    """A cancel in the middle, some files in, leaves no folder behind."""
    furnish(store, sender)
    left = iter(range(3))

    def go_on() -> None:
        if next(left, None) is None:
            assert names(store.config.data / "sessions") == [f".making-{JOB}"]
            raise Cancelled("enough")

    with pytest.raises(Cancelled, match="enough"):
        made(store, wanted("x", inputs=[given("all")]), go_on=go_on)
    assert names(store.config.data / "sessions") == []


def test_two_servers_do_not_share_a_folder_of_sessions(store: Store, tmp_path: Path) -> None:
    """The second would remove what the first one has made."""
    shared = tmp_path / "shared"
    first = Sessions(_elsewhere(store, shared), None)
    with pytest.raises(AlreadyRunning):
        Sessions(_elsewhere(store, shared), None)
    first.close()


def _elsewhere(store: Store, folder: Path) -> Store:
    store.config = replace(store.config, sessions_dir=folder)
    return store


def test_a_sweep_takes_sessions_and_nothing_else(store: Store, tmp_path: Path) -> None:
    """What no job needs goes, with what was half made; a folder of somebody else's stays where it is."""
    folder = tmp_path / "shared"
    for name in (JOB, "ds_1_00000002", f".making-{JOB}", ".going-00", "mine", "ds_x"):
        (folder / name / "sub").mkdir(parents=True)
    sessions = Sessions(_elsewhere(store, folder), None)
    sessions.sweep({JOB})
    sessions.close()
    assert names(folder) == [JOB, "ds_x", "mine"]


# Removal


def removed(folder: Path, name: str = "it") -> None:
    with Folder.open(folder) as parent:
        remove_all(parent, name)
        remove_all(parent, name)  # nothing there is fine
    assert name not in names(folder) and not any(each.startswith(".going") for each in names(folder))


def test_removal_follows_no_link(tmp_path: Path) -> None:
    """Links go, wherever they stand, and what they lead to stays."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    (tmp_path / "parent/it/sub").mkdir(parents=True)
    for place in ("it/link", "it/sub/link", "link"):
        (tmp_path / "parent" / place).symlink_to(outside)
    removed(tmp_path / "parent")
    removed(tmp_path / "parent", "link")
    assert (outside / "precious").read_text() == "x"


def test_no_folder_is_too_deep_to_remove(tmp_path: Path) -> None:
    """A command can nest folders deeper than a path can say, or a stack can hold."""
    (tmp_path / "it").mkdir()
    here = os.open(tmp_path / "it", os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    removed(tmp_path)


class Meanwhile(Folder):
    """A real folder of which something else happens just before an entry is moved aside."""

    __slots__ = ("happens",)

    def stat(self, name: str) -> os.stat_result:
        happens, self.happens = self.happens, lambda: None
        happens()
        return super().stat(name)


def test_two_removals_at_once_leave_nothing(tmp_path: Path) -> None:
    """Of two that remove the same session one finds it gone, and its own folder goes as well."""
    (tmp_path / "it/sub").mkdir(parents=True)
    with Meanwhile.open(tmp_path) as parent, Folder.open(tmp_path) as same:
        parent.happens = lambda: remove_all(same, "it")
        remove_all(parent, "it")
    assert names(tmp_path) == []


def test_the_next_removal_takes_what_is_left_over(store: Store, tmp_path: Path) -> None:
    """A removal that was broken off is finished by the next one, but not one that is still under way."""
    folder = tmp_path / "shared"
    for name in (JOB, "ds_1_00000002/sub", ".going-00/0/sub"):
        (folder / name).mkdir(parents=True)
    sessions = Sessions(_elsewhere(store, folder), None)

    def meanwhile() -> None:
        assert sessions.stuck == 1
        assert sessions.remove(JOB) and sessions.stuck == 0
        assert len(names(folder)) == 2  # what is being removed, and where to

    with Meanwhile.open(folder) as parent:
        parent.happens = meanwhile
        remove_all(parent, "ds_1_00000002")
    sessions.close()
    assert names(folder) == []


@as_root
def test_what_is_read_only_is_removed_by_its_owner(tmp_path: Path) -> None:
    """Folders without any permission go too, although the server is no root who needs none."""
    shutil.chown(tmp_path, 65534, 65534)
    let_pass(tmp_path.parent)
    child = os.fork()
    if not child:
        _as_nobody(tmp_path)
    assert os.waitpid(child, 0)[1] == 0 and names(tmp_path) == []


def _as_nobody(folder: Path) -> None:
    try:
        os.setuid(65534)
        for place in ("it/closed/below", "it/shut"):
            (folder / place).mkdir(parents=True)
        (folder / "it/closed/below/file").write_text("x")
        for place, mode in (("it/closed/below", 0o555), ("it/closed", 0), ("it/shut", 0o111), ("it", 0o500)):
            (folder / place).chmod(mode)
        removed(folder)
        os._exit(0)
    finally:
        os._exit(1)


# Another user


@as_root
def test_another_user_has_its_session_and_no_blob(store: Store, sender: Sender) -> None:
    """With --job-user folders and copies are that user's, links stay the server's, and no other user enters."""
    furnish(store, sender)
    account = Account.named("nobody")
    assert account is not None
    session = made(store, wanted("x", inputs=[given("f", "film"), given("m", "top", in_place=True)]), account)
    owners = {each: each.lstat().st_uid for each in (session.path, *session.path.rglob("*"))}
    linked = {each for each in owners if each.is_file() and not each.is_symlink() and each.stat().st_nlink > 1}
    assert all(uid == (0 if each in linked else account.uid) for each, uid in owners.items())
    assert len(linked) == len(session.linked) and session.path / "inputs/m" not in linked
    assert session.path.stat().st_mode & 0o777 == 0o700


def test_only_root_names_another_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody else is told so at the start, and so is who names nobody that there is."""
    with pytest.raises(UsageError, match="no such user"):
        Account.named("no-such-user")
    assert Account.named(None) is None
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(UsageError, match="runs as root"):
        Account.named("nobody")


def test_a_session_is_whole_before_its_time(store: Store, sender: Sender) -> None:
    """What is staged changed before the time that a session keeps, and what is made after it did not."""
    furnish(store, sender)
    session = made(store, wanted("x", inputs=[given("film", "film"), given("top", "top")]))
    film = session.path / "inputs/film"
    assert all((film / name).lstat().st_ctime_ns < session.staged_ns for name in ("a", "run", "sub/b", "link"))
    (film / "late").write_bytes(b"late")
    assert (film / "late").stat().st_ctime_ns >= session.staged_ns
