"""Inputs reach the host once, whatever they are called and wherever they lie; nothing else of this machine does."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import let_pass
from hostile_server import hostile, members, when
from observed import settle
from serving import Served, serving

from deltasync.cli.progress import Meter
from deltasync.client.ignore import IgnoreRules
from deltasync.client.inputs import Delivered, Need, delivered
from deltasync.client.kept import receiver_of
from deltasync.client.opening import client_id
from deltasync.client.push import Pusher, PushOptions
from deltasync.client.scan import ScanOptions, scan
from deltasync.client.state import State
from deltasync.client.transport import HttpTransport
from deltasync.core.errors import InputsNotSent, UsageError
from deltasync.core.hashing import digest_of
from deltasync.core.jobs import inputs_of
from deltasync.core.manifest import Entry, parse_directory
from deltasync.core.tree import walk

MIB = 1 << 20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("inputs") / "data") as served:
        yield served


@pytest.fixture
def transport(server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpTransport]:
    monkeypatch.setenv("DELTASYNC_HOME", str(tmp_path / "home"))
    with contextlib.closing(HttpTransport(server.url)) as opened:
        yield opened


@pytest.fixture
def media(tmp_path: Path) -> Path:
    folder = tmp_path / "media"
    folder.mkdir()
    return folder


def carry(transport: HttpTransport, *paths: Path, notes: list[str] | None = None, **options: bool) -> Delivered:
    """Have some paths on the host."""
    needs = [Need(str(path)) for path in paths]
    note = [].append if notes is None else notes.append
    with delivered(transport, needs, watcher=Meter(), note=note, settle_seconds=0.0, **options) as done:
        return done


def tree(transport: HttpTransport, workspace: str, sequence: int) -> dict[str, Entry]:
    """Return what the host has in a workspace at a sequence: files and links by their paths."""
    root = bytes.fromhex(transport.sequence(workspace, sequence).root)

    def load(digest: bytes) -> list[Entry]:
        return parse_directory(transport.directory(workspace, digest), digest)

    return {path: entry for path, entry in walk(root, load) if entry.kind != "directory"}


def old(path: Path, content: bytes) -> Path:
    """Write a file whose times prove its content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def pushed(transport: HttpTransport, root: Path, workspace: str) -> int:
    """Push a folder as a workspace, and return its sequence."""
    with State.open(root) as state:
        scan(state, ScanOptions(IgnoreRules(root)))
        with Pusher(state, transport, PushOptions(workspace=workspace)) as pusher:
            return pusher.run().sequence


def test_the_host_has_the_inputs_and_nothing_beside_them(transport: HttpTransport, media: Path) -> None:
    """Of two files and a folder, what is named is in the private workspace at its own path, and no neighbour is."""
    one = old(media / "a/one.bin", b"1" * 1000)
    old(media / "a/secret", b"never")
    old(media / "all/deep/two.bin", b"2" * 1000)
    (media / "all/near").symlink_to("deep/two.bin")
    done = carry(transport, one, media / "all")
    (file, folder) = done.inputs
    top = str(media)[1:]
    assert (file.path, file.place) == (f"{top}/a/one.bin",) * 2 and folder.path == f"{top}/all"
    assert file.workspace == inputs_of(client_id()) == folder.workspace  # as the host knows it
    found = tree(transport, file.workspace, file.sequence)
    assert set(found) == {f"{top}/a/one.bin", f"{top}/all/deep/two.bin", f"{top}/all/near"}
    assert found[f"{top}/all/near"].target == "deep/two.bin"
    assert (done.report.files, done.report.bytes, done.report.read_bytes) == (2, 2000, 2000)


def test_the_same_inputs_are_neither_read_nor_sent_again(transport: HttpTransport, media: Path) -> None:
    """A second command with the same file sends nothing, also with a command on another file between them."""
    first, second = old(media / "first", os.urandom(MIB)), old(media / "second", os.urandom(MIB))
    settle(first, second)
    assert carry(transport, first).report.read_bytes == MIB
    carry(transport, second)
    again = carry(transport, first)
    assert (again.report.read_bytes, again.report.bytes, again.report.problems) == (0, MIB, [])
    assert again.report.sent_bytes < 10_000 and again.report.cached_bytes == MIB
    found = tree(transport, again.inputs[0].workspace, again.inputs[0].sequence)
    assert set(found) == {str(first)[1:]}


def test_a_renamed_and_a_copied_input_send_no_content(transport: HttpTransport, media: Path) -> None:
    """A file under another name, and a copy of it, are read here and come from the host's cache there."""
    first = old(media / "first", os.urandom(MIB))
    assert carry(transport, first).report.sent_bytes > MIB
    first.rename(media / "renamed")
    old(media / "copy", (media / "renamed").read_bytes())
    for name in ("renamed", "copy"):
        done = carry(transport, media / name)
        assert done.report.sent_bytes < 10_000, name
        assert set(tree(transport, done.inputs[0].workspace, done.inputs[0].sequence)) == {str(media / name)[1:]}


def test_a_workspace_in_sync_is_taken_as_it_is(transport: HttpTransport, media: Path) -> None:
    """A file, a folder and the whole of a workspace that the host has are neither read nor sent."""
    file = old(media / "in/file", os.urandom(MIB))
    settle(file)
    sequence, requests = pushed(transport, media, "in-sync"), transport.requests
    for path, inside in ((file, "in/file"), (media / "in", "in"), (media, "")):
        done = carry(transport, path)
        (given,) = done.inputs
        assert (given.workspace, given.sequence) == ("in-sync", sequence)
        assert (given.path, given.place) == (inside, str(path)[1:])
        assert (done.report.kept_bytes, done.report.sent_bytes, done.report.files) == (MIB, 0, 1)
    assert transport.requests == requests


@pytest.mark.parametrize("change", ["edited", "added", "ignored", "removed", "touched"])
def test_a_workspace_that_differs_is_not_taken(transport: HttpTransport, media: Path, change: str) -> None:
    """Whatever differs from the acknowledged tree by one stat goes through the private workspace, as it is here."""
    file, other = old(media / "in/file", b"before"), old(media / "in/other", b"other")
    old(media / ".deltasyncignore", b"*.log\n")
    if change == "ignored":
        old(media / "in/a.log", b"log")
    settle(file, other)
    pushed(transport, media, f"differs-{change}")
    if change == "edited":
        file.write_bytes(b"after!")
    elif change == "added":
        old(media / "in/new", b"new")
    elif change == "removed":
        other.unlink()
    elif change == "touched":
        os.utime(file, ns=(1, 1))
    (given,) = carry(transport, media / "in").inputs
    assert given.workspace.startswith("inputs-")
    found = tree(transport, given.workspace, given.sequence)
    assert {path.rpartition("/")[2] for path in found} == {each.name for each in (media / "in").iterdir()}
    assert {entry.size for path, entry in found.items() if path.endswith("/file")} == {6}
    assert {entry.mtime_ns for path, entry in found.items() if path.endswith("/file")} == {file.stat().st_mtime_ns}


def test_no_rule_and_no_guard_keeps_an_input_back(transport: HttpTransport, media: Path) -> None:
    """Ignored files, nested workspaces and a folder that became empty are carried as they are; states are not."""
    old(media / "in/.deltasyncignore", b"*\n")
    old(media / "in/file", b"ignored")
    nested = media / "in/nested"
    old(nested / "file", b"nested")
    State.open(nested).close()
    (given,) = carry(transport, media / "in").inputs
    names = {path.removeprefix(f"{given.path}/") for path in tree(transport, given.workspace, given.sequence)}
    assert names == {".deltasyncignore", "file", "nested/file"}
    for name in (".deltasyncignore", "file", "nested/file"):
        (media / "in" / name).unlink()
    (given,) = carry(transport, media / "in").inputs
    assert tree(transport, given.workspace, given.sequence) == {}


def test_a_link_is_followed_and_keeps_its_place(transport: HttpTransport, media: Path) -> None:
    """A named link has its own place and the content of what it leads to, also through a linked folder."""
    target = old(media / "real/file", b"content")
    (media / "link").symlink_to(target)
    (media / "way").symlink_to("real")
    done = carry(transport, media / "link", media / "way/file")
    assert {(each.place, each.path) for each in done.inputs} == {
        (str(media / "link")[1:], str(target)[1:]),
        (str(media / "way/file")[1:], str(target)[1:]),
    }


def test_one_input_inside_another_comes_with_it(transport: HttpTransport, media: Path) -> None:
    """A folder and a file in it are one input; a link in it that leads elsewhere is refused by name."""
    file = old(media / "in/file", b"x")
    (given,) = carry(transport, file, media / "in").inputs
    assert given.place == str(media / "in")[1:]
    (media / "in/link").symlink_to(old(media / "elsewhere", b"y"))
    with pytest.raises(UsageError, match="link inside of"):
        carry(transport, media / "in", media / "in/link")


@pytest.mark.parametrize("name", ["new\nline", "by\udcfftes", "\x07", ".deltasync"])
def test_a_path_that_cannot_be_carried_is_refused_before_anything_is_sent(
    transport: HttpTransport, media: Path, name: str
) -> None:
    """A control character, bytes that are no UTF-8 and our own name are one clear sentence each."""
    (media / name).write_bytes(b"")
    with pytest.raises(UsageError, match="cannot be carried"):
        carry(transport, media / name)
    assert transport.requests == 0


def test_what_cannot_be_carried_inside_a_folder_is_told(transport: HttpTransport, media: Path) -> None:
    """A pipe and a link that leaves everything are problems; the rest of the folder goes."""
    old(media / "in/file", b"x")
    os.mkfifo(media / "in/pipe")
    (media / "in/away").symlink_to("/etc/hostname")
    done = carry(transport, media / "in")
    assert sorted(each.path.rpartition("/")[2] for each in done.report.problems) == ["away", "pipe"]
    assert len(tree(transport, done.inputs[0].workspace, done.inputs[0].sequence)) == 1


def test_two_commands_take_turns(transport: HttpTransport, media: Path) -> None:
    """The second waits for the first with a sentence, and each gets a sequence that has its own inputs."""
    one, two = old(media / "one", b"1"), old(media / "two", b"2")
    said, results = threading.Event(), []

    def second() -> None:
        needs = [Need(str(two))]
        with delivered(transport, needs, watcher=Meter(), note=lambda _: said.set(), settle_seconds=0.0) as done:
            results.append(done)

    thread = threading.Thread(target=second)
    with delivered(transport, [Need(str(one))], watcher=Meter(), note=lambda _: None, settle_seconds=0.0) as first:
        thread.start()
        assert said.wait(20) and not results
        assert set(tree(transport, first.inputs[0].workspace, first.inputs[0].sequence)) == {str(one)[1:]}
    thread.join(20)
    (given,) = results[0].inputs
    assert set(tree(transport, given.workspace, given.sequence)) == {str(two)[1:]}


@pytest.mark.parametrize("change", ["edited unseen", "written in the future", "replaced by a copy"])
def test_a_workspace_whose_times_prove_nothing_is_not_taken(transport: HttpTransport, media: Path, change: str) -> None:
    """Other bytes of the same size and time, and times that a later change would not show, are sent by themselves."""
    file = old(media / "in/file", b"before")
    before = file.stat()
    if change == "written in the future":
        os.utime(file, (2_000_000_000, 2_000_000_000))
    settle(file)
    pushed(transport, media, f"unproven-{change[0]}")
    if change == "edited unseen":
        file.write_bytes(b"after!")
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif change == "replaced by a copy":
        (media / "copy").write_bytes(b"after!")
        os.utime(media / "copy", ns=(before.st_atime_ns, before.st_mtime_ns))
        (media / "copy").rename(file)
    for path in (file, media / "in"):
        done = carry(transport, path)
        assert done.inputs[0].workspace.startswith("inputs-") and done.report.read_bytes == 6, path
        if change != "written in the future":
            break  # what was read stands by now


def test_files_replaced_by_others_of_the_same_size_and_time_are_read(transport: HttpTransport, media: Path) -> None:
    """A command gets what is there: a tree that looks remounted is not trusted by its sizes and times."""
    when = 1_600_000_000_000_000_000
    paths = [old(media / f"d/{number}", b"former") for number in range(12)]
    for path in paths:
        os.utime(path, ns=(when, when))
    carry(transport, *paths)
    for path in paths:
        fresh = old(path.with_name("fresh"), b"latter")
        os.utime(fresh, ns=(when, when))
        fresh.rename(path)
    done = carry(transport, *paths)
    found = tree(transport, done.inputs[0].workspace, done.inputs[0].sequence)
    assert {entry.digest for entry in found.values()} == {digest_of(b"latter")}


def test_a_state_of_somebody_else_names_no_host(
    transport: HttpTransport, media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that was unpacked may bring a state with it: nothing is sent where that says."""
    monkeypatch.setenv("DELTASYNC_HOME", str(tmp_path / "other"))
    old(media / "file", b"x")
    pushed(transport, media, "theirs")
    assert receiver_of(media) == transport.url
    monkeypatch.setenv("DELTASYNC_HOME", str(tmp_path / "home"))
    assert receiver_of(media) is None


def test_many_former_inputs_go_without_asking(transport: HttpTransport, media: Path) -> None:
    """After a folder of many files one other file is an input like any other: no guard against deletions."""
    for number in range(200):
        old(media / f"many/{number}", b"%d" % number)
    carry(transport, media / "many")
    (given,) = carry(transport, old(media / "one", b"1")).inputs
    assert set(tree(transport, given.workspace, given.sequence)) == {str(media / "one")[1:]}


def test_a_damaged_memory_costs_no_more_than_reading(transport: HttpTransport, media: Path, tmp_path: Path) -> None:
    """A memory that is no database is begun anew; files are read once more."""
    file = old(media / "file", os.urandom(MIB))
    settle(file)
    carry(transport, file)
    (tmp_path / "home/inputs/reads.db").write_bytes(b"no database" * 1000)
    carry(transport, old(media / "other", b"x"))
    assert carry(transport, file).report.read_bytes == MIB
    carry(transport, media / "other")
    assert carry(transport, file).report.read_bytes == 0


def test_an_input_that_the_host_does_not_take_is_no_input(
    server: Served, media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one file of an input cannot be sent, the command is not run: the file is named, and the code is 123."""
    monkeypatch.setenv("DELTASYNC_HOME", str(tmp_path / "home"))
    old(media / "in/small", b"x")
    old(media / "in/large", os.urandom(100_000))
    with hostile(server.port) as double, contextlib.closing(HttpTransport(double.url)) as transport:
        double.lie = when("GET /workspaces/.*", members(limits=lambda were: {**were, "bundle_bytes": 50_000}))
        with pytest.raises(InputsNotSent, match="in/large") as caught:
            carry(transport, media / "in")
        assert caught.value.exit_code == 123
        assert [each.path for each in (carry(transport, media / "in/small").inputs)] == [str(media / "in/small")[1:]]


def test_what_may_change_is_known_as_it_was_sent(transport: HttpTransport, media: Path) -> None:
    """Of inputs in place the digest of every file is known by its place, wherever the host has it from."""
    (media / "kept").mkdir()
    files = [old(media / "kept/file", b"kept"), old(media / "sent/deep/file", b"sent"), old(media / "one", b"one")]
    settle(*files)
    pushed(transport, media / "kept", "in-place")
    needs = [Need(str(media / name), True) for name in ("kept", "sent", "one")]
    with delivered(transport, needs, watcher=Meter(), note=[].append, settle_seconds=0.0) as done:
        assert {each.workspace[:7] for each in done.inputs} == {"in-plac", "inputs-"}
        assert done.digests == {str(file)[1:]: digest_of(file.read_bytes()) for file in files}


@pytest.fixture
def homes(tmp_path: Path) -> Iterator[Path]:
    """A folder of homes that may be passed and not be listed, for a user who is not root while the test runs."""
    folder = tmp_path / "homes"
    (folder / "mine").mkdir(parents=True)
    os.chown(folder / "mine", 65534, 65534)
    folder.chmod(0o711)
    let_pass(folder.parent)
    try:
        yield folder
    finally:
        os.seteuid(0)
        os.setegid(0)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_a_folder_on_the_way_need_not_be_listed(
    transport: HttpTransport, media: Path, homes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the homes of a machine may be passed and not be listed, what lies in one's own is an input."""
    carry(transport, old(media / "file", b"x"))  # what is imported late is there by now
    os.setegid(65534)
    os.seteuid(65534)
    monkeypatch.setenv("DELTASYNC_HOME", str(homes / "mine/own"))
    with pytest.raises(PermissionError):
        os.listdir(homes)
    done = carry(transport, old(homes / "mine/in/file", b"content"), homes / "mine/in")
    assert set(tree(transport, done.inputs[0].workspace, done.inputs[0].sequence)) == {f"{homes}/mine/in/file"[1:]}


def test_a_file_that_may_change_inside_another_input_may_change(transport: HttpTransport, media: Path) -> None:
    """A folder with such a file in it may change as a whole: it is one input, and every file is known as it was."""
    files = [old(media / "in/file", b"file"), old(media / "in/deep/other", b"other")]
    for needs in ([Need(str(media / "in")), Need(str(files[0]), True)], [Need(str(files[1]), True), Need(str(media))]):
        with delivered(transport, needs, watcher=Meter(), note=[].append, settle_seconds=0.0) as done:
            assert [each.in_place for each in done.inputs] == [True]
            assert done.digests == {str(file)[1:]: digest_of(file.read_bytes()) for file in files}


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
@pytest.mark.parametrize("closed", ["file", "folder", "passage", "named"])
def test_what_cannot_be_read_is_refused_before_anything_is_sent(
    transport: HttpTransport, media: Path, homes: Path, monkeypatch: pytest.MonkeyPatch, closed: str
) -> None:
    """A file or folder inside of an input without which the command would run is named, and what to do about it."""
    folder = homes / "mine/in"
    old(folder / "deep/secret", b"x")
    old(folder / "fine", b"fine")
    path, mode = {"folder": (folder / "deep", 0), "passage": (folder / "deep", 0o644)}.get(
        closed, (folder / "deep/secret", 0)
    )
    for each in (folder, folder / "deep", folder / "deep/secret"):
        os.chown(each, 65534, 65534)
    path.chmod(mode)
    carry(transport, old(media / "file", b"x"))  # what is imported late is there by now
    os.setegid(65534)
    os.seteuid(65534)
    monkeypatch.setenv("DELTASYNC_HOME", str(homes / "mine/own"))
    asked = transport.requests
    with pytest.raises(InputsNotSent, match="make it readable, or move it") as caught:
        carry(transport, path if closed == "named" else folder)
    named = path / "secret" if closed == "passage" else path
    assert f"{named} cannot be read (Permission denied)" in caught.value.sentence and caught.value.exit_code == 123
    assert transport.requests == asked
