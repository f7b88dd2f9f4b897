"""What a job leaves comes into the store as a pinned sequence: whole, durable, never through a link, never too much."""

from __future__ import annotations

import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from finished import CLIENT, RETURNS, Finished
from sender import NAME, Sender, blob_of

from deltasync.core.errors import LimitExceeded, NoSpace, NotOwner, Refused
from deltasync.core.hashing import digest_of
from deltasync.core.jobs import Input, Output, Returned
from deltasync.core.manifest import EMPTY_ROOT, Entry, Kind
from deltasync.core.names import WorkspaceName
from deltasync.core.tree import walk
from deltasync.core.wire import Limits
from deltasync_server import receive
from deltasync_server.check import check
from deltasync_server.config import StoreConfig
from deltasync_server.jobs import returns
from deltasync_server.overview import lines, overview
from deltasync_server.receive import Store
from deltasync_server.replay import replay
from deltasync_server.state import HOST, loader
from deltasync_server.tenants import Tenant

HERE = WorkspaceName(RETURNS)
WHEN = 1_700_000_000_123_456_789


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def store(data: Path) -> Iterator[Store]:
    with opened(data) as store:
        yield store


@pytest.fixture
def job(data: Path) -> Finished:
    """A job whose session lies on the disk of the store."""
    return Finished(data / "sessions/ds_1_00000001")


def opened(data: Path, **settings: Any) -> Store:
    store = Store(StoreConfig(data, keep_sequences=2, low_disk_bytes=0, low_disk_inodes=0, **settings))
    store.recover()
    return store


def another(job: Finished, number: int = 2, **changes: Any) -> Finished:
    return Finished(job.root.with_name(f"ds_1_{number:08x}"), id=f"ds_1_{number:08x}", **changes)


def tree(store: Store, returned: Returned | None) -> dict[str, Entry]:
    """Return the tree of what was returned, path by path."""
    assert returned is not None
    with store.state.read() as db:
        return dict(walk(bytes.fromhex(returned.root), loader(db)))


def files(store: Store, returned: Returned | None) -> dict[str, bytes]:
    """Return the files that were returned, with the bytes that the cache has of them."""
    found = {path: entry for path, entry in tree(store, returned).items() if entry.kind is Kind.FILE}
    return {path: blob_of(store.config.data, entry).read_bytes() for path, entry in found.items()}


def reasons(returned: Returned | None) -> dict[str, str]:
    assert returned is not None
    return {each.place: each.reason for each in returned.problems}


def blobs(store: Store) -> int:
    with store.state.read() as db:
        count: int = db.execute("SELECT count(*) FROM blobs").fetchone()[0]
    return count


def test_outputs_become_a_pinned_sequence_with_their_times_and_bits(store: Store, job: Finished) -> None:
    """Files, folders and empty folders are in the tree at their places; the sequence is one that is kept."""
    os.utime(job.out("home/ada/out.mp4", b"film"), ns=(WHEN, WHEN))
    job.out("home/ada/tool", b"#!/bin/sh\n").chmod(0o750)
    job.outputs.append(Output(place="home/ada/model", is_folder=True))
    job.leave("home/ada/model/deep/w.bin", b"weights")
    (job.root / "outputs/home/ada/model/empty").mkdir()
    returned = job.collect(store)
    assert returned is not None
    assert (returned.workspace, returned.sequence, returned.files, returned.bytes) == (RETURNS, 1, 3, 21)
    assert returned.places == ["home/ada/out.mp4", "home/ada/tool", "home/ada/model"] and not returned.problems
    there = tree(store, returned)
    assert there["home/ada/out.mp4"] == Entry("out.mp4", Kind.FILE, 4, WHEN, False, digest_of(b"film"))
    assert there["home/ada/tool"].executable
    assert there["home/ada/model/empty"] == Entry("empty", Kind.DIRECTORY, digest=EMPTY_ROOT)
    assert files(store, returned)["home/ada/model/deep/w.bin"] == b"weights"
    kept = store.sequence(HERE, 1)
    assert kept.pinned and kept.root == returned.root
    store.stop()
    assert check(store.config).findings == []


def test_a_job_without_outputs_returns_nothing(store: Store, job: Finished) -> None:
    """Where nothing is there, and nothing is wrong, no workspace comes into being."""
    job.outputs.append(Output(place="home/ada/never made.png"))
    assert job.collect(store) is None
    assert store.workspace(HERE).sequence == 0


def test_nothing_but_files_and_folders_comes_home(store: Store, job: Finished, tmp_path: Path) -> None:
    """Links, pipes, sockets and names that cannot be carried are problems of their places; the rest is returned."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"of somebody else")
    job.outputs.append(Output(place="out", is_folder=True))
    job.leave("out/good")
    out = job.root / "outputs/out"
    (out / "link").symlink_to(secret)
    (out / "folder link").symlink_to(tmp_path, target_is_directory=True)
    os.mkfifo(out / "pipe")
    (out / "bad\nname").write_bytes(b"x")
    Path(os.fsdecode(os.fsencode(out) + b"/\xff")).write_bytes(b"x")
    with socket.socket(socket.AF_UNIX) as bound:
        os.symlink(out, tmp_path / "short")
        bound.bind(f"{tmp_path}/short/socket")
    job.outputs.append(Output(place="top"))
    (job.root / "outputs/top").symlink_to(secret)
    returned = job.collect(store)
    assert returned is not None and returned.places == ["out"]
    assert files(store, returned) == {"out/good": b"made\n"}
    told = reasons(returned)
    assert told["out/link"] == told["top"] == "is a link, and only files and folders are"
    assert "a link" in told["out/folder link"] and "a pipe" in told["out/pipe"] and "a socket" in told["out/socket"]
    assert "cannot be carried" in told["out/bad\\nname"] and "cannot be carried" in told["out/\\xff"]
    assert len(told) == 7


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes devices")
def test_a_device_does_not_come_home(store: Store, job: Finished) -> None:
    """A device is never opened."""
    job.outputs.append(Output(place="zero"))
    try:
        os.mknod(job.root / "outputs/zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("this system lets nobody make devices")
    assert "is a device" in reasons(job.collect(store))["zero"]


def test_a_folder_that_became_a_link_leads_nowhere(store: Store, job: Finished, tmp_path: Path) -> None:
    """What lies above an output is not followed either, nor the folder of all outputs."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/x").write_bytes(b"of somebody else")
    job.outputs.append(Output(place="a/x"))
    (job.root / "outputs/a").symlink_to(tmp_path / "elsewhere")
    returned = job.collect(store)
    assert returned is not None and not returned.places and "no folder of the session" in reasons(returned)["a"]
    assert (returned.sequence, returned.root, blobs(store)) == (0, EMPTY_ROOT.hex(), 0)
    os.unlink(job.root / "outputs/a")
    os.rmdir(job.root / "outputs")
    (job.root / "outputs").symlink_to(tmp_path / "elsewhere")
    assert not (job.collect(store) or returned).places and blobs(store) == 0


@pytest.mark.parametrize("target", ["link", "other file"])
def test_a_file_that_is_swapped_while_it_is_read_gives_what_was_read(
    store: Store, job: Finished, tmp_path: Path, target: str
) -> None:
    """What comes home are the bytes of the file that was opened, whatever has its name by then."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"of somebody else")
    made = job.out("x", b"made by the command")

    def swap() -> None:
        made.unlink(missing_ok=True)
        if target == "link":
            made.symlink_to(secret)
        else:
            os.link(secret, made)

    returned = job.collect(store, should_stop=swap)
    assert files(store, returned) == {"x": b"made by the command"}
    assert secret.stat().st_mode & 0o200
    store.stop()
    assert check(store.config).findings == []


def test_no_race_leads_out_of_a_session(store: Store, job: Finished, tmp_path: Path) -> None:
    """While names turn from files and folders into links and back, nothing that lies elsewhere is ever taken."""
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "x").write_bytes(b"of somebody else")
    job.outputs += [Output(place="out", is_folder=True), Output(place="top/x")]
    good = [job.leave("out/file"), job.leave("out/folder/x").parent, job.leave("top/x").parent]
    links = [(good[0], secret / "x"), (good[1], secret), (good[2], secret)]
    is_over = threading.Event()

    def race() -> None:
        while not is_over.is_set():
            for path, target in links:
                kept = path.with_name("kept")
                os.rename(path, kept)
                os.symlink(target, path)
                os.unlink(path)
                os.rename(kept, path)

    racer = threading.Thread(target=race)
    racer.start()
    try:
        for _ in range(60):
            job.collect(store)
    finally:
        is_over.set()
        racer.join()
    with store.state.read() as db:
        assert db.execute(
            "SELECT count(*) FROM blobs WHERE digest = ?", (digest_of(b"of somebody else"),)
        ).fetchone() == (0,)
    assert (secret / "x").stat().st_nlink == 1 and (secret / "x").stat().st_mode & 0o200


def test_a_file_is_moved_into_the_cache_and_not_copied(store: Store, job: Finished) -> None:
    """A file that nobody can write any more becomes the blob itself, read-only, durable before its row."""
    made = job.out("big", b"b" * 100_000)
    inode = made.stat().st_ino
    there = tree(store, job.collect(store))
    blob = blob_of(store.config.data, there["big"])
    assert (blob.stat().st_ino, blob.stat().st_mode & 0o777) == (inode, 0o444)


def test_a_file_that_somebody_still_has_open_to_write_is_copied(store: Store, job: Finished) -> None:
    """A process that outlived its group writes into its own file, never into a blob."""
    made = job.out("x", b"as it was")
    with made.open("r+b") as survivor:
        there = tree(store, job.collect(store))
        survivor.write(b"CHANGED")
    blob = blob_of(store.config.data, there["x"])
    assert blob.read_bytes() == b"as it was" and not blob.samefile(made)


def test_a_file_that_is_still_mapped_is_copied(store: Store, job: Finished) -> None:
    """Memory that is shared with a file writes it as well, with no descriptor open."""
    import mmap

    made = job.out("x", b"as it was")
    with made.open("r+b") as file, mmap.mmap(file.fileno(), 0) as shared:
        file.close()
        there = tree(store, job.collect(store))
        shared[:2] = b"XX"
    assert blob_of(store.config.data, there["x"]).read_bytes() == b"as it was"


def test_a_second_name_of_a_file_never_becomes_a_blob(store: Store, job: Finished) -> None:
    """A command that links an input into its outputs gets a copy home: nothing changes the input, or its mode."""
    given = job.leave("given", b"an input", top="inputs")
    given.chmod(0o644)
    job.outputs.append(Output(place="x"))
    os.link(given, job.root / "outputs/x")
    there = tree(store, job.collect(store))
    blob = blob_of(store.config.data, there["x"])
    assert blob.read_bytes() == b"an input" and not blob.samefile(given)
    assert given.stat().st_mode & 0o777 == 0o644


def test_a_file_that_is_written_while_it_is_read_is_a_problem(store: Store, job: Finished) -> None:
    """Half of one state and half of another is no output."""
    made = job.out("x", b"1234")
    job.out("y")

    def write() -> None:
        with made.open("ab") as file:
            file.write(b"more")

    returned = job.collect(store, should_stop=write)
    assert "still writes it" in reasons(returned)["x"]
    assert list(files(store, returned)) == ["y"]


def test_a_pattern_brings_what_matches_it(store: Store, job: Finished) -> None:
    """A series and a glob are the names in their folder that match; what lies beside is named and stays."""
    job.outputs += [Output(place="f/%04d.png", is_pattern=True), Output(place="f/*.txt", is_pattern=True)]
    for name in ("0001.png", "0002.png", "12345.png", "x.png", "log.txt", "core", "deep/y.png"):
        job.leave(f"f/{name}", name.encode())
    returned = job.collect(store)
    assert returned is not None
    assert returned.places == ["f/0001.png", "f/0002.png", "f/12345.png", "f/log.txt"]
    beside = "was written beside the outputs, and is none of them; --out names it"
    assert reasons(returned) == {"f/core": beside, "f/x.png": beside, "f/deep": beside}
    assert (blobs(store), returned.files) == (4, 4)


def test_a_name_that_looks_like_a_pattern_is_itself(store: Store, job: Finished) -> None:
    """Brackets in a name match something else: what was named comes home all the same."""
    job.out("f/clip [abc].mp4", is_pattern=True)
    returned = job.collect(store)
    assert returned is not None and returned.places == ["f/clip [abc].mp4"] and not returned.problems


def test_an_output_folder_that_is_a_file_is_a_problem(store: Store, job: Finished) -> None:
    """What was to be a folder comes home as one or not at all; an output that was to be a file may be a folder."""
    job.out("folder", is_folder=True)
    job.outputs.append(Output(place="file"))
    job.leave("file/inside")
    returned = job.collect(store)
    assert returned is not None and returned.places == ["file"]
    assert reasons(returned) == {"folder": "was to be a folder and is none"}


def test_of_inputs_in_place_what_changed_comes_home(store: Store, job: Finished) -> None:
    """Files with other bytes, and new ones in an input's folder; what is as before, or was removed, does not."""
    job.inputs += [
        Input(workspace="w", sequence=1, place="a.txt", in_place=True),
        Input(workspace="w", sequence=1, place="same.txt", in_place=True),
        Input(workspace="w", sequence=1, place="folder", in_place=True),
        Input(workspace="w", sequence=1, place="read only"),
    ]
    for place, content in (("a.txt", b"new"), ("same.txt", b"same"), ("folder/same", b"1"), ("folder/fresh", b"2")):
        job.leave(place, content, top="inputs")
    job.leave("read only", b"touched all the same", top="inputs")
    (job.root / "inputs/folder/link").symlink_to("same")
    os.mkfifo(job.root / "inputs/folder/pipe")
    staged = {
        "a.txt": digest_of(b"old"),
        "same.txt": digest_of(b"same"),
        "folder/same": digest_of(b"1"),
        "folder/gone": digest_of(b"3"),
    }
    returned = job.collect(store, staged)
    assert returned is not None and returned.places == ["a.txt", "folder/fresh"]
    assert files(store, returned) == {"a.txt": b"new", "folder/fresh": b"2"}
    assert list(reasons(returned)) == ["folder/pipe", "folder/gone"]
    assert reasons(returned)["folder/gone"] == "was removed on the host and stays here"
    assert blobs(store) == 2


def test_a_file_beyond_the_limit_stays(store: Store, job: Finished) -> None:
    """One output that is too large is a problem of its place, with both figures; the others come home."""
    job.out("large", b"123456")
    job.out("small", b"1234")
    returned = job.collect(store, file_bytes=5)
    assert reasons(returned) == {"large": "has 6 B, and a file may have 5 B"}
    assert list(files(store, returned)) == ["small"]


def test_holes_of_an_output_stay_holes(store: Store, job: Finished) -> None:
    """A large sparse output takes no more space in the cache than it did, whether it is linked or copied."""
    made = job.out("linked", b"")
    os.truncate(made, 100 << 20)
    copied = job.out("copied", b"end")
    os.truncate(copied, 40 << 20)
    with copied.open("r+b"):
        there = tree(store, job.collect(store))
    for entry in there.values():
        status = blob_of(store.config.data, entry).stat()
        assert status.st_size == entry.size and status.st_blocks * 512 < 1 << 20


def test_ten_thousand_outputs_come_in_batches(store: Store, job: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small files are staged and recorded some at a time, and returned as one sequence."""
    staged: list[int] = []

    def count() -> None:
        staged.append(sum(1 for _ in (store.config.data / "staging").glob("*/*")) if len(staged) % 499 == 0 else 0)

    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # the disk's part, which takes most of the time
    job.outputs.append(Output(place="out", is_folder=True))
    for number in range(10_000):
        job.leave(f"out/{number % 20}/{number}", b"%d" % number)
    returned = job.collect(store, should_stop=count)
    assert returned is not None and (returned.files, returned.sequence) == (10_000, 1)
    assert len(staged) == blobs(store) == 10_000 and 0 < max(staged) <= 2000


def test_a_tree_of_more_operations_than_a_bundle_has_is_one_return(data: Path, job: Finished) -> None:
    """A return that takes several bundles is the sequence of the last one, and only that is pinned."""
    with opened(data, limits=Limits(bundle_operations=5)) as store:
        job.outputs.append(Output(place="out", is_folder=True))
        for number in range(12):
            job.leave(f"out/{number}", b"%d" % number)
        returned = job.collect(store)
        assert returned is not None and returned.sequence == 3 and len(files(store, returned)) == 12
        assert [each.sequence for each in store.sequences(HERE).sequences] == [3]


def test_what_nobody_acknowledged_stays_and_what_was_acknowledged_goes(store: Store, job: Finished) -> None:
    """However many returns come after one, a collection spares it until it is released; then nothing of it stays."""
    made = [another(job, number) for number in range(6)]
    for number, each in enumerate(made):
        each.out("x", b"%d" % number)
        each.collect(store)
        store.catch_up()
        store.collect()
    assert [files(store, each.returned)["x"] for each in made] == [b"0", b"1", b"2", b"3", b"4", b"5"]
    for each in made[1:]:
        returns.release(store, each.tenant, each.returned)
        returns.release(store, each.tenant, each.returned)
    store.catch_up()
    assert store.collect().blobs == 5
    assert files(store, made[0].returned) == {"x": b"0"}
    returns.release(store, made[0].tenant, made[0].returned)
    store.collect()
    assert blobs(store) == 0
    store.stop()
    assert check(store.config).findings == []


def test_a_return_of_the_same_outputs_is_held_for_itself(store: Store, job: Finished) -> None:
    """Two jobs that made the same have a sequence each: who acknowledges one does not let go of the other."""
    twin = another(job)
    for each in (job, twin):
        os.utime(each.out("x"), ns=(WHEN, WHEN))
        each.collect(store)
    assert job.returned and twin.returned and (job.returned.sequence, twin.returned.sequence) == (1, 2)
    returns.release(store, job.tenant, job.returned)
    store.collect()
    assert files(store, twin.returned) == {"x": b"made\n"} and store.workspace(HERE).sequence == 2


def test_two_jobs_that_end_at_once_both_return(store: Store, job: Finished) -> None:
    """Returns of one client are told apart, each with its own outputs, whoever comes first."""
    both = [another(job, number) for number in range(2, 8)]
    for each in both:
        each.out("x", each.id.encode())
    started = threading.Barrier(len(both))
    errors: list[BaseException] = []

    def collect(each: Finished) -> None:
        try:
            started.wait()
            each.collect(store)
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=collect, args=(each,)) for each in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert {files(store, each.returned)["x"] for each in both} == {each.id.encode() for each in both}
    assert len({each.returned.sequence for each in both if each.returned}) == len(both)


def test_a_collection_between_batch_and_bundle_takes_nothing(
    store: Store, job: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was recorded is leased until the head names it, and the head's sequence until it is pinned."""
    real_send, real_pin = receive.Store.receive, receive.Store.pin

    def collecting(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Store, *arguments: Any, **options: Any) -> Any:
            self.collect()
            return real(self, *arguments, **options)

        return call

    monkeypatch.setattr(receive.Store, "receive", collecting(real_send))
    monkeypatch.setattr(receive.Store, "pin", collecting(real_pin))
    job.out("x")
    assert files(store, job.collect(store)) == {"x": b"made\n"}


def test_a_return_is_of_its_tenant(store: Store, job: Finished) -> None:
    """The workspace, its objects and its content are the job's tenant's, and nobody else's."""
    job.tenant = Tenant("acme")
    job.out("x")
    returned = job.collect(store)
    assert returned is not None and returned.workspace == RETURNS
    assert store.workspace(HERE).sequence == 0
    assert store.workspace(WorkspaceName(f"acme/{RETURNS}")).sequence == 1
    digest = digest_of(b"made\n").hex()
    assert store.missing(NAME, [digest]).missing == [digest]
    assert store.missing(WorkspaceName("acme/any"), [digest]).missing == []


def test_a_tenant_gets_home_no_more_than_it_may_hold(data: Path, job: Finished) -> None:
    """An output beyond the tenant's part is refused as a push of it is, and nothing of it stays."""
    with opened(data, tenant_quota=1000) as store:
        job.out("x", b"1" * 2000)
        with pytest.raises(NoSpace):
            job.collect(store)
        assert (blobs(store), store.workspace(HERE).sequence) == (0, 0)
        assert not any((data / "staging").iterdir())


def test_returns_have_no_plain_tree_and_nobody_waits_for_one(data: Path, job: Finished) -> None:
    """The store makes no folder for them, says so, and is in order; pushes go on as before."""
    with opened(data, keep_bundles=True) as store:
        store.start()
        job.out("x")
        job.collect(store)
        state = store.wait_for_tree(HERE, 1, 10.0)
        assert (state.tree_path, state.tree_sequence, state.lag, state.wanted) == ("", 1, 0, [])
        sender = Sender()
        sender.send(store, sender.tree(a=b"pushed"))
        assert store.wait_for_tree(NAME, 1, 10.0).tree_path
        store.upkeep()
    assert sorted(each.name for each in (data / "workspaces").iterdir()) == [NAME]
    assert any("it has no tree" in line for line in lines(overview(StoreConfig(data))))
    with opened(data) as store:
        store.catch_up()
        store.upkeep()
    assert sorted(each.name for each in (data / "workspaces").iterdir()) == [NAME]
    assert check(StoreConfig(data)).findings == []


def test_the_hosts_own_id_is_no_clients(store: Store) -> None:
    """A bundle whose client id is the host's is refused with one sentence, whatever workspace it names."""
    for name in (NAME, HERE):
        sender = Sender(client_id=HOST, name=name)
        with pytest.raises(Refused, match=r"J-61: the client id 0{32} is the host's own"):
            sender.send(store, sender.tree(a=b"a"))
        assert store.workspace(name).sequence == 0


def test_what_the_host_returned_is_replayed(data: Path, tmp_path: Path, job: Finished) -> None:
    """The bundle files of returns are the host's own: a store that has the content takes them, without a plain tree."""
    with opened(data, keep_bundles=True) as store:
        job.out("x", b"made")
        job.collect(store)
        store.upkeep()
    with opened(tmp_path / "other") as store:
        sender = Sender()
        sender.send(store, sender.tree(a=b"made"))
    for config, applied in ((StoreConfig(tmp_path / "other"), 1), (StoreConfig(data), 0)):
        (found,) = replay(config, data / "bundles" / RETURNS, workspace=None, say=lambda line: None)
        assert (found.sequence, found.applied, found.skipped, found.tree_path) == (1, applied, 1 - applied, "")


def test_a_damaged_return_is_asked_for_from_nobody(store: Store, job: Finished) -> None:
    """A blob of a return that rotted is taken out; no workspace wants what nobody can bring."""
    job.out("x", b"12345")
    blob = blob_of(store.config.data, tree(store, job.collect(store))["x"])
    blob.chmod(0o644)
    blob.write_bytes(b"54321")
    blob.chmod(0o444)
    store.catch_up()
    store.trees.prove([digest_of(b"12345")])
    assert blobs(store) == 0 and store.workspace(HERE).wanted == []
    job.leave("x", b"12345")
    job.collect(store)
    store.catch_up()
    with store.state.read() as db:
        assert db.execute("SELECT count(*) FROM wanted").fetchone() == (0,)


def test_a_workspace_of_a_client_is_never_returned_into(store: Store, job: Finished) -> None:
    """Who has pushed a folder by such a name keeps it."""
    sender = Sender(name=HERE)
    sender.send(store, sender.tree(a=b"mine"))
    job.out("x")
    with pytest.raises(NotOwner, match="is a client's"):
        job.collect(store)
    assert store.workspace(HERE).root == sender.root.hex()


def test_a_return_that_cannot_be_pinned_is_not_kept(
    store: Store, job: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where too many wait to be acknowledged a job fails, and those that wait stay."""
    monkeypatch.setattr(receive, "PINS_MAX", 1)
    job.out("x", b"first")
    job.collect(store)
    second = another(job)
    second.out("x", b"second")
    with pytest.raises(LimitExceeded):
        second.collect(store)
    store.collect()
    assert blobs(store) == 1 and files(store, job.returned) == {"x": b"first"}


def test_a_start_lets_go_of_what_no_job_names(data: Path, job: Finished) -> None:
    """A return whose job was lost before it was recorded is not held for ever; those of other jobs are."""
    with opened(data) as store:
        job.out("x", b"recorded")
        job.collect(store)
        lost = another(job)
        lost.out("x", b"lost")
        lost.collect(store)
    with opened(data) as store:
        assert job.returned is not None
        returns.release_others(store, [(job.tenant, job.returned)])
        store.collect()
        assert blobs(store) == 1 and files(store, job.returned) == {"x": b"recorded"}


def test_a_client_id_names_the_workspace(job: Finished) -> None:
    """The workspace of returns is a name that any server takes."""
    assert returns.workspace_of(CLIENT) == RETURNS


def test_what_is_left_in_the_jobs_own_folder_is_told(store: Store, job: Finished) -> None:
    """Files and folders at the top of work/ are problems of no place; what programs keep for themselves is none."""
    for name in ("d.tgz", "parts/aa", "tmp/scratch", ".cache/fonts", "__pycache__/m.pyc"):
        job.leave(name, top="work")
    os.mkfifo(job.root / "work/pipe")
    returned = job.collect(store)
    assert returned is not None and returned.sequence == 0
    told = "was written into the job's own folder, which goes with the job; {out:%s} in the command brings it home"
    assert [(each.place, each.reason) for each in returned.problems] == [
        ("", f"d.tgz {told % 'd.tgz'}"),
        ("", f"parts {told % 'parts'}"),
    ]


def test_twenty_strays_are_told_and_the_others_counted(store: Store, job: Finished) -> None:
    """A command that splits a file into thousands in its own folder does not fill the answer with them."""
    for number in range(25):
        job.leave(f"x{number:02d}", top="work")
    returned = job.collect(store)
    assert returned is not None and len(returned.problems) == 21
    assert returned.problems[-1].reason == "5 more were written into the job's own folder"


def test_a_failed_command_tells_strays_only_beside_what_can_be_fetched(store: Store, job: Finished) -> None:
    """Where nothing of it can come home, a command that failed returns nothing, whatever lies in its folder."""
    job.leave("core", top="work")
    assert job.collect(store, is_well=False) is None
    job.out("home/ada/half.mp4")
    returned = job.collect(store, is_well=False)
    assert returned is not None and "core was written" in reasons(returned)[""]
