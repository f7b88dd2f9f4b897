"""What a job returned comes home from a real server: to its places, resumed, never through a link, nothing else."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import folders
import pytest
from corpus_good import noise
from desk import Desk
from finished import Finished
from serving import Served, serving, until

from deltasync.client.destination import Destination
from deltasync.client.download import RANGE_BYTES
from deltasync.client.fetch import FetchOptions, fetch
from deltasync.client.homecoming import HomeReport, bring_home
from deltasync.client.incoming import Incoming
from deltasync.client.transport import HttpTransport
from deltasync.client.wanted import Scope, parse_scope
from deltasync.core.errors import AlreadyRunning, HostUnreachable, NotADeltasyncServer, NotFound
from deltasync.core.hashing import digest_of
from deltasync.core.jobs import Input, Output, Returned
from deltasync_server.config import StoreConfig
from deltasync_server.receive import Store

JOB = "ds_1_0badcafe"
WHEN = 1_700_000_000_123_456_789
LARGE = noise("large", 2 * RANGE_BYTES + 5)
MANY = 2_000


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("host") / "data"


@pytest.fixture(scope="module")
def returned(data: Path) -> dict[str, Returned]:
    """What some jobs returned, by their names."""
    made: dict[str, Returned] = {}
    with Store(StoreConfig(data)) as store, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        store.recover()
        for number, (name, make) in enumerate(JOBS.items()):
            job = Finished(data / "sessions" / name, id=f"ds_{number}_0badcafe")
            make(job)
            found = job.collect(store)
            assert found is not None
            job.record(store)
            made[name] = found
    return made


@pytest.fixture(scope="module")
def server(data: Path, returned: Mapping[str, Returned]) -> Iterator[Served]:
    with serving(data) as served:
        yield served


def _files(job: Finished) -> None:
    os.utime(job.out("p/a.txt", b"first"), ns=(WHEN, WHEN))
    job.out("p/tool", b"#!/bin/sh\n").chmod(0o755)
    job.out("q/b.txt", b"third")


def _folder(job: Finished) -> None:
    job.outputs.append(Output(place="p/out", is_folder=True))
    job.leave("p/out/deep/w.bin", b"weights")
    (job.root / "outputs/p/out/empty").mkdir()


def _many(job: Finished) -> None:
    job.outputs.append(Output(place="p/%04d.txt", is_pattern=True))
    for number in range(MANY):
        job.leave(f"p/{number:04}.txt", b"%d" % number)


def _in_place(job: Finished) -> None:
    for place, content in (("p/a.txt", b"edited there"), ("p/new.txt", b"new there")):
        job.leave(place, content, top="inputs")
        job.inputs.append(Input(workspace="w", sequence=1, place=place, in_place=True))


def _later_in_place(job: Finished) -> None:
    job.leave("p/a.txt", b"edited by another one", top="inputs")
    job.inputs.append(Input(workspace="w", sequence=1, place="p/a.txt", in_place=True))


def _large(job: Finished) -> None:
    job.out("p/large.bin", LARGE)


JOBS: Mapping[str, Callable[[Finished], None]] = {
    "files": _files,
    "folder": _folder,
    "many": _many,
    "in place": _in_place,
    "later in place": _later_in_place,
    "large": _large,
}


class Way(HttpTransport):
    """The real transport, which counts what it is asked for, and may break."""

    breaks_after: int | None = None

    def __init__(self, url: str) -> None:
        super().__init__(url, timeout=20, max_retries=0)
        self.streams = self.ranges = 0

    def blobs(self, name: str, digests: Sequence[bytes]) -> AbstractContextManager[Incoming]:
        self.streams += 1
        return super().blobs(name, digests)

    def blob_range(self, digest: bytes, start: int, end: int, size: int) -> AbstractContextManager[Incoming]:
        self.ranges += 1
        if self.breaks_after is not None and self.ranges > self.breaks_after:
            raise HostUnreachable("the line is cut")
        return super().blob_range(digest, start, end, size)


@pytest.fixture
def way(server: Served) -> Iterator[Way]:
    made = Way(server.url)
    yield made
    made.close()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The user's folder, with something in it."""
    made = tmp_path / "home"
    folders.write(made, "p/mine.txt", "mine")
    folders.write(made, "q/same bytes.txt", "third")
    return made


class Quiet:
    """Hears how far a fetch is."""

    def read(self, files: int, size_bytes: int) -> None: ...
    def all_is_read(self) -> None: ...
    def fetched(self, size_bytes: int, total_bytes: int) -> None: ...


def brought(way: Way, some: Returned, home: Path, **options: Any) -> HomeReport:
    targets = {place: home / place for place in some.places}
    return bring_home(way, some, targets, Quiet(), job_id=JOB, **options)


def told(report: HomeReport, home: Path) -> dict[str, str]:
    return {each.path.removeprefix(f"{home}/"): each.reason for each in report.problems}


def test_files_come_home_and_nothing_else_changes(way: Way, returned: dict[str, Returned], home: Path) -> None:
    """Each output is at its place with its time and bit; what was there before is as it was, and no trace stays."""
    before = folders.listing(home)
    report = brought(way, returned["files"], home)
    assert (report.files, report.bytes, report.fetched_bytes, report.problems) == (3, 20, 20, [])
    after = folders.listing(home)
    assert after["p/a.txt"] == ("file", False, WHEN, b"first")
    assert after["p/tool"][1] and after["q/b.txt"][3] == b"third"
    assert {path: after[path] for path in before} == before and len(after) == len(before) + 3


def test_outputs_in_one_folder_cost_one_fetch(way: Way, returned: dict[str, Returned], home: Path) -> None:
    """Two files for one folder come in one answer; another folder costs another."""
    brought(way, returned["files"], home)
    assert way.streams == 2


def test_what_is_here_already_is_not_sent(way: Way, returned: dict[str, Returned], home: Path) -> None:
    """A second homecoming reads what is here; nothing beside the outputs is read to find their content."""
    assert brought(way, returned["files"], home).fetched_bytes == 20  # q has the bytes of q/b.txt, and is not searched
    again = brought(way, returned["files"], home)
    assert (again.files, again.fetched_bytes, again.problems) == (3, 0, [])


def test_a_folder_comes_home_with_empty_folders(way: Way, returned: dict[str, Returned], home: Path) -> None:
    """A folder is made where its parent is; what lies in it already stays."""
    brought(way, returned["folder"], home)
    assert (home / "p/out/empty").is_dir() and (home / "p/out/deep/w.bin").read_bytes() == b"weights"
    folders.write(home, "p/out/notes.txt", "mine")
    (home / "p/out/deep/w.bin").unlink()
    assert not brought(way, returned["folder"], home).problems
    assert set(folders.listing(home / "p/out")) == {"deep", "deep/w.bin", "empty", "notes.txt"}


def test_outputs_come_home_into_a_workspace(
    server: Served, way: Way, returned: dict[str, Returned], home: Path
) -> None:
    """A project that is pushed from here takes outputs, and the next push carries them and no more."""
    project = Desk(home / "p", server.url)
    project.push()
    assert not brought(way, returned["files"], home).problems
    assert not brought(way, returned["folder"], home).problems
    pushed = project.push()
    assert pushed.operations.created == 6 and not pushed.problems  # three files, three folders
    assert not [each for each in (project.root / ".deltasync").iterdir() if "fetch" in each.name]


def test_a_link_in_the_place_of_a_file_is_replaced(
    way: Way, returned: dict[str, Returned], home: Path, tmp_path: Path
) -> None:
    """What the link led to stays as it is."""
    other = folders.write(tmp_path, "elsewhere/x", "not yours")
    (home / "p/a.txt").symlink_to(other)
    brought(way, returned["files"], home)
    assert other.read_text() == "not yours"
    assert not (home / "p/a.txt").is_symlink() and (home / "p/a.txt").read_bytes() == b"first"


def test_a_link_that_a_host_returns_is_refused(way: Way, server: Served, home: Path, tmp_path: Path) -> None:
    """Whoever reads an output next would follow it: neither an output nor what is in one may be a link."""
    lies = Desk(tmp_path / "lies", server.url)
    folders.write(lies.root, "p/secret", "key")
    (lies.root / "p/link").symlink_to("mine.txt")
    (lies.root / "p/out").mkdir()
    (lies.root / "p/out/link").symlink_to("file")
    folders.write(lies.root, "p/out/file", "made")
    done = lies.push()
    places = ["p/link", "p/out"]
    said = Returned(workspace="lies", sequence=done.sequence, root=done.root, files=1, bytes=4, places=places)
    report = brought(way, said, home)
    assert set(told(report, home)) == {"p/link", "p/out/link"}
    assert sorted(each.name for each in (home / "p").iterdir()) == ["mine.txt", "out"]
    assert [each.name for each in (home / "p/out").iterdir()] == ["file"]


def test_an_input_in_place_is_never_reached_through_a_link(
    way: Way, returned: dict[str, Returned], home: Path, tmp_path: Path
) -> None:
    """A host that returns more than was sent writes nowhere else: not behind a link, and no folder over one."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (home / "p").rename(home / "kept")
    (home / "p").symlink_to(elsewhere, target_is_directory=True)
    report = brought(way, returned["in place"], home, in_place={"p/a.txt": b"", "p/new.txt": b""})
    assert set(told(report, home)) == {"p/a.txt", "p/new.txt"} and list(elsewhere.iterdir()) == []
    folders.write(home, "kept/out/w.bin", "mine")
    targets = {"p/out": home / "kept/out"}
    report = bring_home(way, returned["folder"], targets, Quiet(), job_id=JOB, in_place={"p/out": b""})
    assert len(report.problems) == 1 and (home / "kept/out/w.bin").read_text() == "mine"


def test_a_link_in_the_place_of_a_folder_is_refused(
    way: Way, returned: dict[str, Returned], home: Path, tmp_path: Path
) -> None:
    """Nothing is written to where the link leads."""
    (tmp_path / "elsewhere").mkdir()
    (home / "p/out").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    report = brought(way, returned["folder"], home)
    assert "a link is not followed" in told(report, home)["p/out"]
    assert list((tmp_path / "elsewhere").iterdir()) == [] and (home / "p/out").is_symlink()


def test_a_folder_is_no_place_for_a_file_nor_a_file_for_a_folder(
    way: Way, returned: dict[str, Returned], home: Path
) -> None:
    """Both stay as they are, also an empty folder, and each is one problem; the others come home."""
    (home / "p/a.txt").mkdir()
    folders.write(home, "p/out", "a file")
    report = brought(way, returned["files"], home)
    assert list(told(report, home)) == ["p/a.txt"] and "is a folder here" in report.problems[0].reason
    assert (home / "p/a.txt").is_dir() and (home / "q/b.txt").read_bytes() == b"third"
    report = brought(way, returned["folder"], home)
    assert list(told(report, home)) == ["p/out"] and "is a file here" in report.problems[0].reason
    assert (home / "p/out").read_text() == "a file"


def test_no_folder_is_made_above_an_output(way: Way, returned: dict[str, Returned], tmp_path: Path) -> None:
    """A folder that went away meanwhile is a problem, as the command itself would have had it."""
    (tmp_path / "p").mkdir()
    report = brought(way, returned["files"], tmp_path)
    assert told(report, tmp_path) == {"q/b.txt": "its folder is not here; make it, then fetch again"}
    assert (report.files, (tmp_path / "q").exists()) == (2, False)


def test_what_nobody_named_does_not_come(way: Way, returned: dict[str, Returned], home: Path) -> None:
    """A host that returns more than was asked for places nothing (T6)."""
    report = bring_home(way, returned["files"], {"q/b.txt": home / "q/b.txt"}, Quiet())
    assert report.files == 1 and sorted(each.name for each in (home / "p").iterdir()) == ["mine.txt"]
    bare = bring_home(way, returned["files"], {}, Quiet())
    assert (bare.files, bare.problems) == (0, [])
    lying = Returned(
        workspace=returned["files"].workspace,
        sequence=returned["files"].sequence,
        root=returned["files"].root,
        files=1,
        bytes=1,
        places=["p/never"],
    )
    report = bring_home(way, lying, {"p/never": home / "p/never"}, Quiet())
    assert told(report, home) == {"p/never": "is not in what the host returned"}


def test_another_tree_than_the_returned_one_is_refused(way: Way, returned: dict[str, Returned], home: Path) -> None:
    """Nothing is written from a sequence that is not what the job returned."""
    one, other = returned["files"], returned["folder"]
    wrong = Returned(
        workspace=one.workspace, sequence=other.sequence, root=one.root, files=1, bytes=1, places=one.places
    )
    before = folders.listing(home)
    with pytest.raises(NotADeltasyncServer):
        brought(way, wrong, home)
    assert folders.listing(home) == before


def test_thousands_of_files_come_into_one_folder(
    way: Way, returned: dict[str, Returned], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a pattern brought is one fetch, and no question grows with the number of names."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # the disk's part, which takes most of the time
    report = brought(way, returned["many"], home)
    assert (report.files, report.problems, way.streams) == (MANY, [], 1)
    assert len(list((home / "p").iterdir())) == MANY + 1


def test_a_scope_of_many_paths_answers_as_one_by_one() -> None:
    """What lies in a path, on the way to it, and beside it are told apart; a path in another one is no second."""
    scope = parse_scope(["a/b", "a/b/c", "d", "a/bc"])
    assert scope.paths == ("a/b", "a/bc", "d")
    assert [each for each in ("a", "a/b", "a/b/x/y", "a/bcd", "d", "dd") if scope.covers(each)] == [
        "a/b",
        "a/b/x/y",
        "d",
    ]
    assert [each for each in ("", "a", "a/b", "d") if scope.leads(each)] == ["", "a"]
    assert Scope().covers("any") and not Scope().leads("")


def test_an_input_in_place_is_replaced_while_it_is_what_was_sent(
    way: Way, returned: dict[str, Returned], home: Path
) -> None:
    """A file that the command changed takes the place of the one that was sent, with who may read it."""
    folders.write(home, "p/a.txt", "as sent").chmod(0o640)
    sent = {"p/a.txt": digest_of(b"as sent"), "p/new.txt": b""}
    report = brought(way, returned["in place"], home, in_place=sent)
    assert not report.problems and report.files == 2
    assert (home / "p/a.txt").read_bytes() == b"edited there" and (home / "p/new.txt").read_bytes() == b"new there"
    assert (home / "p/a.txt").stat().st_mode & 0o777 == 0o640
    assert sorted(each.name for each in (home / "p").iterdir()) == ["a.txt", "mine.txt", "new.txt"]
    again = brought(way, returned["in place"], home, in_place=sent)
    assert (again.files, again.fetched_bytes, again.problems) == (2, 0, [])


def test_an_input_that_changed_here_is_never_overwritten(way: Way, returned: dict[str, Returned], home: Path) -> None:
    """What came home is put beside it, under a name that says where it is from, and that is said."""
    folders.write(home, "p/a.txt", "edited here as well")
    folders.write(home, "p/new.txt", "made here as well")
    sent = {"p/a.txt": digest_of(b"as sent"), "p/new.txt": b""}
    report = brought(way, returned["in place"], home, in_place=sent)
    assert (home / "p/a.txt").read_text() == "edited here as well"
    assert (home / f"p/a.txt.from-{JOB}").read_bytes() == b"edited there"
    assert (home / "p/new.txt").read_text() == "made here as well"
    assert (home / f"p/new.txt.from-{JOB}").read_bytes() == b"new there"
    assert "is beside it" in told(report, home)["p/a.txt"] and len(report.problems) == 2


def test_a_change_during_the_fetch_is_met_too(way: Way, returned: dict[str, Returned], home: Path) -> None:
    """The look at an input comes after its content has arrived, right before the rename."""
    target = folders.write(home, "p/a.txt", "as sent")

    class Editor(Quiet):
        def fetched(self, size_bytes: int, total_bytes: int) -> None: ...

        def all_is_read(self) -> None:
            target.write_text("edited meanwhile")

    some = returned["in place"]
    sent = {"p/a.txt": digest_of(b"as sent")}
    bring_home(way, some, {"p/a.txt": target}, Editor(), in_place=sent, job_id=JOB)
    assert target.read_text() == "edited meanwhile"
    assert (home / f"p/a.txt.from-{JOB}").read_bytes() == b"edited there"


def test_an_input_that_became_a_link_is_left(
    way: Way, returned: dict[str, Returned], home: Path, tmp_path: Path
) -> None:
    """What is no file any more is not what was sent, whatever it leads to."""
    other = folders.write(tmp_path, "x", "as sent")
    (home / "p/a.txt").symlink_to(other)
    brought(way, returned["in place"], home, in_place={"p/a.txt": digest_of(b"as sent"), "p/new.txt": b""})
    assert (home / "p/a.txt").is_symlink() and other.read_text() == "as sent"
    assert (home / f"p/a.txt.from-{JOB}").read_bytes() == b"edited there"


def test_an_output_may_have_another_name_here(way: Way, returned: dict[str, Returned], home: Path) -> None:
    """A place that was named through a link comes to where the link led, under the name that the file has there."""
    target = home / "q/real name.txt"
    report = bring_home(way, returned["files"], {"p/a.txt": target}, Quiet(), job_id=JOB)
    assert not report.problems and target.read_bytes() == b"first" and target.stat().st_mtime_ns == WHEN


@pytest.mark.parametrize("is_in_place", [False, True])
def test_a_homecoming_that_was_cut_goes_on(
    way: Way, returned: dict[str, Returned], home: Path, *, is_in_place: bool
) -> None:
    """What had arrived when the line broke is not sent again, and no half of a file has a name."""
    way.breaks_after = 1
    some = returned["large"]
    sent: dict[str, Any] = {"in_place": {"p/large.bin": b""}} if is_in_place else {}
    with pytest.raises(HostUnreachable):
        brought(way, some, home, jobs=1, **sent)
    assert not (home / "p/large.bin").exists()
    way.breaks_after = None
    report = brought(way, some, home, jobs=1, **sent)
    assert report.fetched_bytes == RANGE_BYTES + 5 and not report.problems
    assert (home / "p/large.bin").read_bytes() == LARGE
    assert sorted(each.name for each in (home / "p").iterdir()) == ["large.bin", "mine.txt"]


def test_what_came_home_is_durable_before_anybody_says_so(
    way: Way, returned: dict[str, Returned], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file and its folder are fsynced: the host forgets them once it is told."""
    synced: set[int] = set()
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    brought(way, returned["files"], home)
    brought(way, returned["folder"], home)
    expect = ("p/a.txt", "p/tool", "q/b.txt", "p", "q", "p/out", "p/out/deep", "p/out/deep/w.bin")
    assert {path for path in expect if (home / path).stat().st_ino not in synced} == set()
    synced.clear()
    brought(way, returned["in place"], home, in_place={"p/a.txt": digest_of(b"first"), "p/new.txt": b""})
    assert {path for path in ("p/a.txt", "p/new.txt", "p") if (home / path).stat().st_ino not in synced} == set()


def test_the_name_of_a_folder_that_is_made_is_durable(
    way: Way, returned: dict[str, Returned], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder above an output folder is fsynced once that is there, also where a killed homecoming had made it."""
    synced: list[tuple[int, frozenset[str]]] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        synced.append((os.fstat(descriptor).st_ino, frozenset(os.listdir(descriptor) if is_folder else ())))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    for _ in range(2):
        synced.clear()
        brought(way, returned["folder"], home)
        assert any(inode == (home / "p").stat().st_ino and "out" in names for inode, names in synced)
    synced.clear()
    Destination(home / "a/b/c", may_delete=False, waits=True).close(is_done=True)
    made = {(above.stat().st_ino, frozenset({name})) for above, name in ((home / "a", "b"), (home / "a/b", "c"))}
    assert made <= set(synced) and any(inode == home.stat().st_ino and "a" in names for inode, names in synced)


def test_two_homecomings_into_one_folder_wait_for_each_other(
    server: Served, returned: dict[str, Returned], home: Path
) -> None:
    """Jobs that end at once and write into one folder both come home."""
    started = threading.Barrier(4)
    reports: list[HomeReport | BaseException] = []

    def bring(name: str) -> None:
        way = Way(server.url)
        try:
            started.wait()
            reports.append(brought(way, returned[name], home))
        except BaseException as error:  # noqa: BLE001
            reports.append(error)
        finally:
            way.close()

    threads = [threading.Thread(target=bring, args=(name,)) for name in ("files", "large", "files", "large")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [each.problems if isinstance(each, HomeReport) else each for each in reports] == [[]] * 4
    assert (home / "p/large.bin").read_bytes() == LARGE and (home / "p/a.txt").read_bytes() == b"first"
    assert not (home / "p/.deltasync").exists()


@pytest.mark.parametrize("names", [("in place", "in place"), ("in place", "later in place")])
def test_two_homecomings_never_replace_one_file_twice(
    server: Served, returned: dict[str, Returned], home: Path, names: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second looks at an input when the first is done with it: the same job is home, another one's is beside."""
    target = folders.write(home, "p/a.txt", "as sent")
    sent = {"p/a.txt": digest_of(b"as sent"), "p/new.txt": b""}
    has_looked, is_over = threading.Event(), threading.Event()
    rename = os.rename

    def renaming(source: str, to: str, **where: Any) -> None:
        if to == "a.txt" and not has_looked.is_set():  # between the look of the first and its replacing
            has_looked.set()
            until(lambda: is_over.is_set() or _is_waited_for(target.parent / ".deltasync/home.lock"))
        rename(source, to, **where)

    def bring(name: str) -> HomeReport:
        with closing(Way(server.url)) as way:
            return brought(way, returned[name], home, in_place=sent)

    monkeypatch.setattr(os, "rename", renaming)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(bring, names[0])
        assert has_looked.wait(20)
        second = pool.submit(bring, names[1])
        second.add_done_callback(lambda _: is_over.set())
        reports = [first.result(20), second.result(20)]
    assert target.read_bytes() == b"edited there" and not (home / "p/.deltasync").exists()
    if names[0] == names[1]:
        assert [(each.files, each.problems) for each in reports] == [(2, [])] * 2
    else:
        assert [len(each.problems) for each in reports] == [0, 1]
        assert (home / f"p/a.txt.from-{JOB}").read_bytes() == b"edited by another one"


def _is_waited_for(lock: Path) -> bool:
    """Tell whether somebody waits for a lock on a file."""
    waited = f":{lock.stat().st_ino} " if lock.exists() else None
    lines = Path("/proc/locks").read_text().splitlines()
    return waited is not None and any("->" in line and waited in line for line in lines)


def test_who_waited_for_a_folder_gets_one_that_is_there(tmp_path: Path) -> None:
    """The fetch before removes its arrivals with the lock: who got that one holds nothing, and begins anew."""
    first = Destination(tmp_path, may_delete=False)
    lock = tmp_path / ".deltasync/fetch/lock"
    second: list[Destination] = []
    thread = threading.Thread(target=lambda: second.append(Destination(tmp_path, may_delete=False, waits=True)))
    thread.start()
    until(lambda: _is_waited_for(lock))
    first.close(is_done=True)
    thread.join()
    second[0].write("arrival", b"content")
    with pytest.raises(AlreadyRunning):
        Destination(tmp_path, may_delete=False)
    second[0].close(is_done=True)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_a_tree_is_fetched_by_itself(way: Way, returned: dict[str, Returned], tmp_path: Path) -> None:
    """DEST stands for a folder inside the tree, all of it or some names; what is no folder there is an error."""
    some = returned["folder"]
    options = FetchOptions(some.workspace, at=some.sequence, inside="p/out")
    assert fetch(way, tmp_path / "all", options, Quiet()).verified
    assert set(folders.listing(tmp_path / "all")) == {"deep", "deep/w.bin", "empty"}
    assert fetch(way, tmp_path / "some", replace(options, scope=parse_scope(["deep"])), Quiet()).root == some.root
    assert set(folders.listing(tmp_path / "some")) == {"deep", "deep/w.bin"}
    for inside in ("p/out/deep/w.bin", "p/none"):
        with pytest.raises(NotFound):
            fetch(way, tmp_path / "none", replace(options, inside=inside), Quiet())
    assert not (tmp_path / "none").exists()
