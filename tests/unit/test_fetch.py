"""Fetching from a real server: what comes, what is found here, what goes on after an interruption, what is refused."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import folders
import pytest
from corpus_good import noise
from desk import Desk
from serving import Served, serving

from deltasync.client import destination, download
from deltasync.client.download import RANGE_BYTES
from deltasync.client.fetch import FetchOptions, FetchReport, fetch
from deltasync.client.incoming import Incoming
from deltasync.client.transport import HttpTransport
from deltasync.client.wanted import Scope, parse_scope
from deltasync.core import frames, wire
from deltasync.core.errors import (
    AlreadyRunning,
    DeltasyncError,
    GuardStopped,
    HostUnreachable,
    NotADeltasyncServer,
    NotFound,
    Refused,
    RootUnavailable,
    SequenceGone,
    UsageError,
)
from deltasync.core.hashing import digest_of, directory_digest
from deltasync.core.manifest import EMPTY_ROOT, Entry, Kind, encode_directory
from deltasync.core.names import NameRefused


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served") / "data", "--keep-sequences", "3") as served:
        yield served


@pytest.fixture
def desk(tmp_path: Path, server: Served, request: pytest.FixtureRequest) -> Desk:
    """A folder with one of everything, pushed."""
    made = Desk(tmp_path / f"w{abs(hash(request.node.nodeid)):x}", server.url)
    folders.life(made.root)
    made.push()
    return made


@pytest.fixture
def origin(server: Served) -> Iterator[HttpTransport]:
    transport = HttpTransport(server.url, timeout=20, max_retries=0)
    yield transport
    transport.close()


class Meter:
    """Hears how far a fetch is."""

    def __init__(self) -> None:
        self.totals: list[int] = []
        self.is_read = False

    def read(self, files: int, size_bytes: int) -> None:
        assert files >= 0 and size_bytes >= 0

    def all_is_read(self) -> None:
        self.is_read = True

    def fetched(self, size_bytes: int, total_bytes: int) -> None:
        self.totals.append(size_bytes)


def fetched(origin: Any, desk: Desk, dest: Path, *parts: str, **options: Any) -> FetchReport:
    chosen = FetchOptions(workspace=desk.root.name, scope=parse_scope(parts), **options)
    return fetch(origin, dest, chosen, Meter())


class Between:
    """A transport that does as the real one, but for what a test changes on the way."""

    def __init__(self, inner: HttpTransport, *, max_retries: int = 0) -> None:
        self.inner = inner
        self.max_retries = max_retries
        self.asked: list[list[bytes]] = []
        self.ranges: list[tuple[int, int]] = []
        self.before: Callable[[], None] = lambda: None
        self.change: Callable[[bytes], bytes] = lambda content: content
        self.pauses = 0
        self._guard = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def back_off(self, attempt: int, error: DeltasyncError | None = None) -> None:
        self.pauses += 1

    @contextmanager
    def blobs(self, name: str, digests: Sequence[bytes]) -> Iterator[Incoming]:
        with self._guard:
            self.asked.append(list(digests))
        self.before()
        with self.inner.blobs(name, digests) as incoming:
            yield Incoming(self.inner.url, lambda size: self.change(incoming._read(size)))

    @contextmanager
    def blob_range(self, digest: bytes, start: int, end: int, size: int) -> Iterator[Incoming]:
        with self._guard:
            self.ranges.append((start, end))
        self.before()
        with self.inner.blob_range(digest, start, end, size) as incoming:
            yield Incoming(self.inner.url, lambda size: self.change(incoming._read(size)))


def fetched_folder(root: Path) -> set[str]:
    return {path for path in folders.listing(root) if not path.startswith(".deltasync")}


def test_a_fetch_brings_everything_that_a_tree_carries(desk: Desk, origin: HttpTransport, tmp_path: Path) -> None:
    """A folder that does not exist becomes the pushed one; no trace of the fetch stays; the report counts it."""
    report = fetched(origin, desk, tmp_path / "new/dest")
    folders.assert_same(desk.root, tmp_path / "new/dest")
    assert not (tmp_path / "new/dest/.deltasync").exists()
    size_bytes = sum(each.stat().st_size for each in desk.root.rglob("*") if each.is_file() and not each.is_symlink())
    state_bytes = sum(each.stat().st_size for each in (desk.root / ".deltasync").rglob("*") if each.is_file())
    assert (report.files, report.bytes, report.created) == (8, size_bytes - state_bytes, 9)
    assert (report.replaced, report.touched, report.unchanged, report.deleted) == (0, 0, 0, 0)
    assert report.fetched_bytes == report.bytes - 70_000 and report.found_bytes == 70_000  # one content, two files
    assert report.verified and not report.problems
    assert report.root == origin.workspace(desk.root.name).root


def test_a_fetch_that_is_over_holds_nothing_open(desk: Desk, origin: HttpTransport, tmp_path: Path) -> None:
    """Whoever fetches in a process that goes on loses no descriptors, and may unmount DEST."""
    dest = tmp_path / "dest"
    folders.write(dest, "folder/too much", "goes")
    assert fetched(origin, desk, dest, delete=True, allow_mass_delete=True).deleted == 2
    held = [os.readlink(each) for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]
    assert [each for each in held if each.startswith(str(dest))] == []


def test_what_is_here_is_not_fetched_again(desk: Desk, origin: HttpTransport, tmp_path: Path) -> None:
    """A second fetch asks for no content; a file with other times only gets its time back."""
    dest = tmp_path / "dest"
    fetched(origin, desk, dest)
    between = Between(origin)
    again = fetched(between, desk, dest)
    assert (between.asked, again.fetched_bytes, again.unchanged, again.created) == ([], 0, 9, 0)
    os.utime(dest / "readme.txt", ns=(1, 1))
    (dest / "bin/run.sh").chmod(0o600)
    touched = fetched(between, desk, dest)
    assert (between.asked, touched.touched, touched.unchanged) == ([], 2, 7)
    folders.assert_same(desk.root, dest)
    assert (dest / "bin/run.sh").stat().st_mode & 0o777 == 0o700, "who may read it may execute it, and nobody else"


def test_content_that_lies_elsewhere_in_dest_is_copied(desk: Desk, origin: HttpTransport, tmp_path: Path) -> None:
    """Moved and swapped files are found by their digest, also where each takes the name of the other."""
    dest = tmp_path / "dest"
    fetched(origin, desk, dest)
    a, b = dest / "media/raw/a.dat", dest / "media/raw/b.dat"
    for source, target in ((a, dest / "x"), (b, a), (dest / "x", b)):
        os.rename(source, target)
    os.unlink(dest / "media/raw/copy of b.dat")
    (dest / "old").mkdir()
    os.rename(dest / "media/clip.bin", dest / "old/clip.bin")
    between = Between(origin)
    report = fetched(between, desk, dest)
    assert (between.asked, report.fetched_bytes, report.replaced, report.created) == ([], 0, 2, 2)
    assert (dest / "old/clip.bin").exists(), "what is beyond the workspace stays"
    folders.assert_same(desk.root / "media", dest / "media")


def test_what_differs_is_replaced_and_what_is_beyond_stays(desk: Desk, origin: HttpTransport, tmp_path: Path) -> None:
    """Files, links and kinds that differ are replaced and counted; only --delete removes what nobody asked for."""
    dest = tmp_path / "dest"
    fetched(origin, desk, dest)
    folders.later(dest)
    os.unlink(dest / "empty folder")
    blocked = fetched(origin, desk, dest)
    assert [each.path for each in blocked.problems] == ["link"], "a folder that is not empty stays without --delete"
    assert not blocked.verified and (dest / "link/now a folder.txt").exists() and (dest / "sources/a.dat").exists()
    assert (dest / "readme.txt").read_text() == "hello\n" and blocked.replaced == 1
    report = fetched(origin, desk, dest, delete=True)
    assert report.verified and report.deleted == 9, report
    folders.assert_same(desk.root, dest)


def test_folders_and_files_change_places(desk: Desk, origin: HttpTransport, tmp_path: Path) -> None:
    """A file or a link where a folder is wanted gives way; nothing is written through a link that leaves DEST."""
    dest, outside = tmp_path / "dest", tmp_path / "outside"
    outside.mkdir()
    (outside / "canary").write_text("alive")
    dest.mkdir()
    (dest / "media").symlink_to(outside)
    (dest / "bin").write_text("a file")
    (dest / "readme.txt").mkdir()
    os.mkfifo(dest / "link")
    report = fetched(origin, desk, dest)
    assert report.verified, report.problems
    folders.assert_same(desk.root, dest)
    assert [each.name for each in outside.iterdir()] == ["canary"]


def test_parts_are_fetched_by_their_paths(desk: Desk, origin: HttpTransport, tmp_path: Path) -> None:
    """Only what is named comes, at its place; --delete touches nothing outside of it; a wrong name is an error."""
    dest = tmp_path / "dest"
    report = fetched(origin, desk, dest, "media/raw/", "média/ünïcode ☃.txt")
    assert report.verified and report.files == 4
    assert {path for path in fetched_folder(dest) if (dest / path).is_file()} == {
        "media/raw/a.dat", "media/raw/b.dat", "media/raw/copy of b.dat", "média/ünïcode ☃.txt",
    }  # fmt: skip
    folders.write(dest, "media/mine.txt", "stays")
    folders.write(dest, "media/raw/extra.txt", "goes")
    deleting = fetched(origin, desk, dest, "media/raw", delete=True)
    assert deleting.verified and deleting.deleted == 1
    assert (dest / "media/mine.txt").exists() and not (dest / "media/raw/extra.txt").exists()
    with pytest.raises(NotFound, match="there is no media/nothing"):
        fetched(origin, desk, dest, "media/nothing")
    for wrong in ("../x", "/etc", "a//b", ".deltasync"):
        with pytest.raises(NameRefused):
            parse_scope([wrong])
    assert parse_scope(["a/b", "a", "ab"]) == Scope(("a", "ab"))


def test_a_mass_deletion_waits_for_leave(desk: Desk, origin: HttpTransport, tmp_path: Path) -> None:
    """A wrong DEST is not emptied: nothing is changed before --allow-mass-delete."""
    dest = tmp_path / "photos"
    for number in range(101):
        folders.write(dest, f"p/{number}.jpg", "photo")
    with pytest.raises(GuardStopped, match="102 of 102 entries"):
        fetched(origin, desk, dest, delete=True)
    assert sorted(each.name for each in dest.iterdir()) == ["p"]
    report = fetched(origin, desk, dest, delete=True, allow_mass_delete=True)
    assert report.deleted == 102 and report.verified
    folders.assert_same(desk.root, dest)


def test_a_dry_run_shows_all_and_changes_nothing(desk: Desk, origin: HttpTransport, tmp_path: Path) -> None:
    """It says what would be done to which path, and does not even make DEST."""
    dest = tmp_path / "dest"
    report = fetched(origin, desk, dest, dry_run=True)
    assert not dest.exists() and report.created == 9 and not report.verified
    fetched(origin, desk, dest)
    os.utime(dest / "empty.bin", ns=(1, 1))
    folders.write(dest, "readme.txt", "other")
    folders.write(dest, "extra", "extra")
    os.rename(dest / "media/clip.bin", dest / "clip")
    before = folders.listing(dest)
    report = fetched(origin, desk, dest, dry_run=True, delete=True)
    assert folders.listing(dest) == before and not (dest / ".deltasync").exists()
    assert [(each.operation, each.path) for each in report.changes] == [
        ("deleted", "clip"), ("touched", "empty.bin"), ("deleted", "extra"), ("created", "media/clip.bin"),
        ("replaced", "readme.txt"),
    ]  # fmt: skip
    assert report.fetched_bytes == len("hello\n"), "the clip lies elsewhere"
    assert report.found_bytes == report.bytes - len("hello\n")


def test_an_earlier_tree_is_fetched_by_its_sequence(desk: Desk, origin: HttpTransport, tmp_path: Path) -> None:
    """One of the kept sequences comes as it was; the others are refused with the range of those."""
    (tmp_path / "as it was").mkdir()
    fetched(origin, desk, tmp_path / "as it was")
    folders.later(desk.root)
    desk.push()
    last = origin.workspace(desk.root.name).sequence
    report = fetched(origin, desk, tmp_path / "dest", at=1)
    assert (report.sequence, report.verified) == (1, True) and last > 1
    folders.assert_same(tmp_path / "as it was", tmp_path / "dest")
    for number in range(4):
        folders.write(desk.root, "readme.txt", f"{number}")
        desk.push()
    with pytest.raises(SequenceGone) as caught:
        fetched(origin, desk, tmp_path / "dest", at=1)
    assert (caught.value.facts["first"], caught.value.facts["last"]) == (last + 2, last + 4)


def test_a_push_meanwhile_does_not_mix_two_trees(desk: Desk, origin: HttpTransport, tmp_path: Path) -> None:
    """The fetch stays at the root that it began with, whatever is pushed while it runs."""
    fetched(origin, desk, tmp_path / "as it was")
    between = Between(origin)

    def push() -> None:
        between.before = lambda: None
        folders.later(desk.root)
        desk.push()

    between.before = push
    report = fetched(between, desk, tmp_path / "dest")
    assert (report.sequence, report.verified) == (1, True)
    assert origin.workspace(desk.root.name).sequence > 1
    folders.assert_same(tmp_path / "as it was", tmp_path / "dest")


def test_a_workspace_that_was_never_written_empties_nothing(desk: Desk, origin: HttpTransport, tmp_path: Path) -> None:
    """A misspelt name is an error, not an empty tree."""
    folders.write(tmp_path / "dest", "mine", "stays")
    chosen = FetchOptions(workspace="misspelt", delete=True, allow_mass_delete=True)
    with pytest.raises(NotFound, match="has no workspace misspelt"):
        fetch(origin, tmp_path / "dest", chosen, Meter())
    assert (tmp_path / "dest/mine").exists()


@pytest.mark.parametrize("inside", ["", "media/raw", "somewhere/deeper"])
def test_a_workspace_is_not_overwritten(desk: Desk, origin: HttpTransport, inside: str) -> None:
    """DEST that is a workspace, or lies in one, is refused: what it has not sent yet could be lost."""
    before = folders.listing(desk.root)
    with pytest.raises(UsageError, match="is a workspace that is pushed from here"):
        fetched(origin, desk, desk.root / inside)
    assert folders.listing(desk.root) == before


@pytest.mark.parametrize(("place", "delete"), [("media/raw", False), ("media/raw", True), ("mine/deep", True)])
def test_a_workspace_inside_dest_is_not_overwritten(
    desk: Desk, origin: HttpTransport, tmp_path: Path, place: str, delete: bool
) -> None:
    """Nor is one that lies where a fetch would write or delete; elsewhere it is left alone."""
    inner = tmp_path / "dest" / place
    inner.mkdir(parents=True)
    folders.write(inner, "a.dat", "not sent yet")
    Desk(inner).push()
    with pytest.raises(UsageError, match=f"{place} is a workspace"):
        fetched(origin, desk, tmp_path / "dest", delete=delete, allow_mass_delete=True)
    assert (inner / "a.dat").read_text() == "not sent yet"
    if place.startswith("mine"):
        assert fetched(origin, desk, tmp_path / "dest").verified


def test_two_fetches_into_one_folder_do_not_meet(desk: Desk, origin: HttpTransport, tmp_path: Path) -> None:
    """The second is refused while the first runs, and nothing of the first is lost."""
    between, refused = Between(origin), []

    def second() -> None:
        between.before = lambda: None
        with pytest.raises(AlreadyRunning) as caught:
            fetched(origin, desk, tmp_path / "dest")
        refused.append(caught.value)

    between.before = second
    assert fetched(between, desk, tmp_path / "dest").verified and refused
    folders.assert_same(desk.root, tmp_path / "dest")


# Interruptions


@pytest.fixture
def large(desk: Desk) -> bytes:
    """A file of the desk that travels by ranges, pushed."""
    content = noise("large", 3 * RANGE_BYTES + 12_345)
    folders.write(desk.root, "large.bin", content)
    desk.push()
    return content


def test_a_large_file_comes_by_ranges_and_goes_on_where_it_stopped(
    desk: Desk, origin: HttpTransport, tmp_path: Path, large: bytes
) -> None:
    """After a failure only the ranges that did not arrive are asked for, and no half file has the final name."""
    dest, between = tmp_path / "dest", Between(origin)

    def fail() -> None:
        if len(between.ranges) > 2:
            raise HostUnreachable("cut")

    between.before = fail
    with pytest.raises(HostUnreachable):
        fetched(between, desk, dest, jobs=1)
    assert not (dest / "large.bin").exists() and len(between.ranges) == 3
    again = Between(origin)
    report = fetched(again, desk, dest)
    assert report.verified and len(again.ranges) == 2
    assert report.fetched_bytes == report.bytes - 70_000 - 2 * RANGE_BYTES
    assert report.found_bytes == 70_000 + 2 * RANGE_BYTES
    folders.assert_same(desk.root, dest)
    assert not (dest / ".deltasync").exists()


def test_a_large_file_is_hashed_while_it_comes(
    desk: Desk, origin: HttpTransport, tmp_path: Path, large: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes in order is not read again; what helpers brought, or an earlier fetch left, is."""
    read: list[tuple[int, int]] = []
    preadv = os.preadv

    def noted(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        count = preadv(descriptor, buffers, offset)
        read.append((offset, count))
        return count

    monkeypatch.setattr(os, "preadv", noted)
    between = Between(origin)
    fetched(between, desk, tmp_path / "dest", "large.bin", jobs=1)
    assert between.ranges == sorted(between.ranges) and sum(count for _, count in read) == 0
    between.before = lambda: fail_after(between.ranges, 6)
    with pytest.raises(HostUnreachable):
        fetched(between, desk, tmp_path / "again", "large.bin", jobs=1)
    assert fetched(origin, desk, tmp_path / "again", "large.bin", jobs=1).verified
    assert sum(count for _, count in read) == 2 * RANGE_BYTES
    assert fetched(origin, desk, tmp_path / "helped", "large.bin", jobs=4).verified
    assert (tmp_path / "helped/large.bin").read_bytes() == large


def fail_after(asked: Sequence[object], limit: int) -> None:
    if len(asked) > limit:
        raise HostUnreachable("cut")


def test_several_large_files_are_fetched_in_one_piece_each(
    desk: Desk, origin: HttpTransport, tmp_path: Path, large: bytes
) -> None:
    """Every range of every file is asked for once, whoever leads and whoever helps; all are right."""
    for number in range(3):
        folders.write(desk.root, f"more/{number}.bin", noise(f"more {number}", (number + 1) * RANGE_BYTES + number))
    desk.push()
    between = Between(origin)
    assert fetched(between, desk, tmp_path / "dest", jobs=3).verified
    assert len(between.ranges) == 4 + 3 + 4, "8 MiB themselves need no ranges"
    folders.assert_same(desk.root, tmp_path / "dest")


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_are_the_same_without_unnamed_ones(
    desk: Desk, origin: HttpTransport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, umask: int
) -> None:
    """Where the system makes no file without a name, or gives it none, files come by way of the arrivals."""
    before = os.umask(umask)
    try:
        fetched(origin, desk, tmp_path / "unnamed")
        monkeypatch.setattr(os, "link", refused)
        fetched(origin, desk, tmp_path / "unlinked")
        monkeypatch.setattr(destination, "_UNNAMED", None)
        fetched(origin, desk, tmp_path / "named")
    finally:
        os.umask(before)
    for name in ("unnamed", "unlinked", "named"):
        folders.assert_same(desk.root, tmp_path / name)
        assert (tmp_path / name / "bin/run.sh").stat().st_mode & 0o777 == 0o777 & ~umask
        assert (tmp_path / name / "readme.txt").stat().st_mode & 0o777 == 0o666 & ~umask


def refused(*_: object, **__: object) -> None:
    raise FileNotFoundError(errno.ENOENT, "no /proc here")


def test_what_arrived_damaged_by_the_disk_is_fetched_again(
    desk: Desk, origin: HttpTransport, tmp_path: Path, large: bytes
) -> None:
    """What an earlier fetch left is believed only by its digest."""
    dest, between = tmp_path / "dest", Between(origin)

    def fail() -> None:
        if len(between.ranges) > 3:
            raise HostUnreachable("cut")

    between.before = fail
    with pytest.raises(HostUnreachable):
        fetched(between, desk, dest, jobs=1)
    name = digest_of(large).hex()
    arrivals = dest / ".deltasync/fetch"
    with (arrivals / f"{name}.part").open("r+b") as part:
        part.seek(RANGE_BYTES)
        part.write(b"zeros")
    folders.write(arrivals, digest_of(b"hello\n").hex(), "wrong\n")
    folders.write(arrivals, "rubbish", "x")
    assert fetched(origin, desk, dest).verified
    folders.assert_same(desk.root, dest)


def test_a_large_file_that_changed_fetches_what_is_new(
    desk: Desk, origin: HttpTransport, tmp_path: Path, large: bytes
) -> None:
    """The chunks that the file in DEST still has are taken from it; what breaks off is taken up the same way."""
    dest, between = tmp_path / "dest", Between(origin)
    fetched(origin, desk, dest)
    new = b"inserted" * 1000 + large[:5_000_000] + bytes(4000) + large[5_000_000:-700_000]
    folders.write(desk.root, "large.bin", new)
    desk.push()

    def fail() -> None:
        if len(between.ranges) > 1:
            raise HostUnreachable("cut")

    between.before = fail
    with pytest.raises(HostUnreachable):
        fetched(between, desk, dest, jobs=1)
    assert (dest / "large.bin").read_bytes() == large
    report = fetched(origin, desk, dest)
    assert report.verified and 0 < report.fetched_bytes < 300_000
    assert report.found_bytes == report.bytes - report.fetched_bytes
    folders.assert_same(desk.root, dest)
    assert not (dest / ".deltasync").exists()


@pytest.mark.parametrize("recipe", ["none", "short", "lies", "odd"])
def test_a_recipe_that_is_of_no_use_costs_nothing(
    desk: Desk, origin: HttpTransport, tmp_path: Path, large: bytes, recipe: str
) -> None:
    """A server that knows no recipes, or gives a wrong one: the digest decides, and all of it comes."""
    dest, between = tmp_path / "dest", Between(origin)
    folders.write(dest, "large.bin", large[3_000_000:] + large[:3_000_000])

    def wrong(name: str, digest: bytes, average_bytes: int) -> bytes:
        if recipe == "none":
            raise NotFound("no such route")
        if recipe == "odd":
            raise NotADeltasyncServer("odd")
        listed = origin.recipe(name, digest, average_bytes)
        swapped = listed[-20:] + listed[20:-20] + listed[:20]
        return listed[:-20] if recipe == "short" else swapped

    between.recipe = wrong  # type: ignore[attr-defined]
    report = fetched(between, desk, dest)
    assert report.verified and report.damaged == []
    folders.assert_same(desk.root, dest)


def test_a_broken_answer_goes_on_with_what_is_left(
    desk: Desk, origin: HttpTransport, tmp_path: Path, large: bytes
) -> None:
    """An answer that breaks off is asked for again, without what came; each that brings something is a fresh start."""
    for number in range(40):
        folders.write(desk.root, f"many/{number}", noise(f"{number}", 20_000))
    desk.push()
    between = Between(origin, max_retries=1)
    pieces = 0

    def cut(content: bytes) -> bytes:
        nonlocal pieces
        pieces += 1
        if pieces % 3 == 0:
            raise HostUnreachable("cut")
        return content

    between.change = cut
    report = fetched(between, desk, tmp_path / "dest", jobs=1)
    assert report.verified and between.pauses >= 5
    assert len(between.asked) > 1 and len(between.asked[-1]) < len(between.asked[0])
    folders.assert_same(desk.root, tmp_path / "dest")


def test_a_whole_content_that_waited_for_its_name_is_not_fetched_again(
    desk: Desk, origin: HttpTransport, tmp_path: Path
) -> None:
    """A fetch that was killed between the content and its name leaves the content to the next one."""
    left = folders.write(tmp_path, f"dest/.deltasync/fetch/{digest_of(b'hello' + bytes([10])).hex()}", "hello\n")
    between = Between(origin)
    report = fetched(between, desk, tmp_path / "dest")
    assert report.verified and not left.exists()
    assert digest_of(b"hello\n") not in {digest for digests in between.asked for digest in digests}
    folders.assert_same(desk.root, tmp_path / "dest")


# Trouble in DEST


def test_trouble_with_one_path_is_a_problem_and_the_rest_comes(
    desk: Desk, origin: HttpTransport, tmp_path: Path
) -> None:
    """A name that is taken meanwhile is reported with the system's reason."""
    dest, between = tmp_path / "dest", Between(origin)
    between.before = lambda: folders.write(dest, "readme.txt/taken", "x") and None
    report = fetched(between, desk, dest)
    assert [(each.path, each.reason) for each in report.problems] == [
        ("readme.txt", "cannot be written (Is a directory)")
    ]
    assert not report.verified and report.created == 8
    assert fetched_folder(dest) == fetched_folder(desk.root) | {"readme.txt/taken"}


def test_what_changes_during_a_fetch_is_noticed(desk: Desk, origin: HttpTransport, tmp_path: Path) -> None:
    """The last look at DEST finds a file that was right when it was compared and is not any more."""
    dest, between = tmp_path / "dest", Between(origin)
    fetched(origin, desk, dest)
    (dest / "readme.txt").unlink()
    between.before = lambda: folders.write(dest, "bin/run.sh", "edited") and None
    report = fetched(between, desk, dest)
    assert [each.path for each in report.problems] == ["bin/run.sh"] and not report.verified
    assert "changed meanwhile" in report.problems[0].reason


def test_a_file_that_was_edited_after_it_was_read_keeps_its_own_time(
    desk: Desk, origin: HttpTransport, tmp_path: Path
) -> None:
    """A file that was only to get its time back, and was edited meanwhile, stays as it is and is a problem."""
    dest = tmp_path / "dest"
    folders.write(dest, "readme.txt", "hello\n")

    class Editor(Meter):
        def all_is_read(self) -> None:
            (dest / "readme.txt").write_text("HELLO\n")

    report = fetch(origin, dest, FetchOptions(workspace=desk.root.name), Editor())
    assert [each.path for each in report.problems] == ["readme.txt"] and not report.verified
    assert "changed after it was read" in report.problems[0].reason
    assert (report.touched, (dest / "readme.txt").read_text()) == (0, "HELLO\n")
    assert (dest / "readme.txt").stat().st_mtime_ns != (desk.root / "readme.txt").stat().st_mtime_ns
    assert fetched(origin, desk, dest).verified
    folders.assert_same(desk.root, dest)


def test_an_execute_bit_of_a_group_is_enough(desk: Desk, origin: HttpTransport, tmp_path: Path) -> None:
    """What was pushed as executable is as wanted with any of the three bits, and plain with none."""
    (desk.root / "bin/run.sh").chmod(0o654)
    desk.push()
    assert fetched(origin, desk, tmp_path / "dest").verified
    assert (tmp_path / "dest/bin/run.sh").stat().st_mode & 0o100
    (tmp_path / "dest/bin/run.sh").chmod(0o645)
    (tmp_path / "dest/readme.txt").chmod(0o645)
    report = fetched(origin, desk, tmp_path / "dest")
    assert report.verified and report.touched == 1
    assert (tmp_path / "dest/readme.txt").stat().st_mode & 0o777 == 0o644


def test_two_names_of_one_file_are_touched_together(desk: Desk, origin: HttpTransport, tmp_path: Path) -> None:
    """The time that one name got does not pass for an edit of the other."""
    (desk.root / "second.txt").write_text("hello\n")
    os.utime(desk.root / "second.txt", ns=(7, (desk.root / "readme.txt").stat().st_mtime_ns))
    desk.push()
    dest = tmp_path / "dest"
    folders.write(dest, "readme.txt", "hello\n")
    os.link(dest / "readme.txt", dest / "second.txt")
    report = fetched(origin, desk, dest)
    assert report.verified and report.touched == 2, report.problems


def test_two_names_that_are_one_in_dest_are_not_both_there(
    desk: Desk, origin: HttpTransport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system that does not tell `A` from `a` the name that DEST does not list is a problem, with its twin."""
    for name in ("A", "a", "D/same", "d/same"):
        os.utime(folders.write(desk.root, f"twins/{name}", name[:1]), ns=(7, 7))
    desk.push()
    dest = tmp_path / "dest"
    folds_case(monkeypatch, dest / "twins")
    report = fetched(origin, desk, dest, "twins")
    assert [(each.path, each.reason) for each in report.problems] == [
        ("twins/A", "is not there: this file system takes it for a; fetch into one that keeps both"),
        ("twins/D", "is not there: this file system takes it for d; fetch into one that keeps both"),
        ("twins/d", "cannot be written (File exists)"),
    ]
    assert not report.verified and fetched_folder(dest / "twins") == {"a", "d", "d/same"}


def folds_case(monkeypatch: pytest.MonkeyPatch, top: Path) -> None:
    """Have the system calls take upper for lower case in a folder, and below it."""

    def folded(name: Any, folder: int | None) -> Any:
        is_below = isinstance(name, str) and folder is not None and os.readlink(f"/proc/self/fd/{folder}") == str(top)
        return name.lower() if is_below else name

    def rename(source: Any, target: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
        real_rename(source, folded(target, dst_dir_fd), src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    def patched(real: Any) -> Any:
        return lambda name, *rest, dir_fd=None, **more: real(folded(name, dir_fd), *rest, dir_fd=dir_fd, **more)

    def link(source: Any, target: Any, *, dst_dir_fd: int | None = None) -> None:
        real_link(source, folded(target, dst_dir_fd), dst_dir_fd=dst_dir_fd)

    real_rename, real_link = os.rename, os.link
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(os, "link", link)
    for call in ("open", "stat", "mkdir", "unlink"):
        monkeypatch.setattr(os, call, patched(getattr(os, call)))
    monkeypatch.setattr(os, "supports_dir_fd", {*os.supports_dir_fd, os.open})


def test_a_hidden_folder_that_is_a_link_is_not_followed(desk: Desk, origin: HttpTransport, tmp_path: Path) -> None:
    """What arrives never lies outside of DEST."""
    (tmp_path / "dest").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "dest/.deltasync").symlink_to(tmp_path / "outside")
    with pytest.raises(RootUnavailable, match="cannot be written"):
        fetched(origin, desk, tmp_path / "dest")
    assert not list((tmp_path / "outside").iterdir())


def test_a_lock_that_is_a_link_is_not_followed(desk: Desk, origin: HttpTransport, tmp_path: Path) -> None:
    """A link among the arrivals makes no file outside of DEST."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "dest/.deltasync/fetch").mkdir(parents=True)
    (tmp_path / "dest/.deltasync/fetch/lock").symlink_to(tmp_path / "outside/made")
    with pytest.raises(RootUnavailable, match="cannot be written"):
        fetched(origin, desk, tmp_path / "dest")
    assert not list((tmp_path / "outside").iterdir())


def test_dest_must_be_a_folder(desk: Desk, origin: HttpTransport, tmp_path: Path) -> None:
    """A file is not filled."""
    with pytest.raises(UsageError, match="is not a folder"):
        fetched(origin, desk, folders.write(tmp_path, "dest", "a file"))


def test_the_content_is_leased_before_it_is_fetched_and_while(
    desk: Desk, origin: HttpTransport, tmp_path: Path, large: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No collection comes between: everything is leased first, and again when the lease grows old."""
    between, leased = Between(origin), list[int]()

    def missing(name: str, digests: Sequence[str]) -> list[str]:
        assert leased or not (between.asked or between.ranges)
        leased.append(len(digests))
        return origin.missing(name, digests)

    between.missing = missing  # type: ignore[attr-defined]
    fetched(between, desk, tmp_path / "dest")
    assert leased == [8]
    monkeypatch.setattr(download, "LEASE_SECONDS", 0.0)
    fetched(between, desk, tmp_path / "again", jobs=1)
    assert leased == [8] * 7, "once before, and with each of four ranges and one batch"


# Wrong bytes, and hostile trees


def flipped(times: int) -> Callable[[bytes], bytes]:
    """Change the content `hello`, this many times."""
    left = times

    def change(content: bytes) -> bytes:
        nonlocal left
        if left and b"hello\n" in content:
            left -= 1
            return content.replace(b"hello\n", b"hallo\n")
        return content

    return change


def test_wrong_bytes_are_fetched_once_more(desk: Desk, origin: HttpTransport, tmp_path: Path) -> None:
    """Bytes without their digest never get a name; a second answer may be right."""
    between = Between(origin)
    between.change = flipped(1)
    report = fetched(between, desk, tmp_path / "dest")
    assert report.verified and not report.damaged and between.asked[-1] == [digest_of(b"hello\n")]
    folders.assert_same(desk.root, tmp_path / "dest")


def test_bytes_that_stay_wrong_are_reported_and_the_rest_comes(
    desk: Desk, origin: HttpTransport, tmp_path: Path
) -> None:
    """The path is named, the file is not there rather than wrong, and nothing is deleted after that."""
    dest, between = tmp_path / "dest", Between(origin)
    between.change = flipped(2)
    folders.write(dest, "extra", "stays")
    report = fetched(between, desk, dest, delete=True, allow_mass_delete=True)
    assert (report.damaged, report.verified, report.deleted) == (["readme.txt"], False, 0)
    assert not (dest / "readme.txt").exists() and (dest / "extra").exists()
    assert fetched_folder(dest) == fetched_folder(desk.root) - {"readme.txt"} | {"extra"}


def test_a_large_file_that_stays_wrong_is_reported(
    desk: Desk, origin: HttpTransport, tmp_path: Path, large: bytes
) -> None:
    """A content by ranges is begun once more, and then given up."""
    between = Between(origin)
    between.change = lambda content: content.replace(large[:16], bytes(16))
    report = fetched(between, desk, tmp_path / "dest")
    assert report.damaged == ["large.bin"] and len(between.ranges) == 8
    assert not (tmp_path / "dest/large.bin").exists() and not (tmp_path / "dest/.deltasync").exists()


@pytest.mark.parametrize("jobs", [1, 4])
def test_what_came_wrong_once_leaves_nothing_behind(
    desk: Desk, origin: HttpTransport, tmp_path: Path, jobs: int
) -> None:
    """Where bytes came wrong the first time and are zeros the second time, the file has zeros."""
    large = noise("zeros", RANGE_BYTES) + bytes(RANGE_BYTES) + noise("end", RANGE_BYTES // 2)
    folders.write(desk.root, "zeros.bin", large)
    desk.push()
    dest, between = tmp_path / "dest", Between(origin)
    left = 1

    def spoil(content: bytes) -> bytes:
        nonlocal left
        if left and len(content) >= 1 << 16 and not content.strip(b"\0"):
            left = 0
            return b"GARBAGE!" + content[8:]
        return content

    between.change = spoil
    report = fetched(between, desk, dest, jobs=jobs)
    assert not left and report.verified
    assert (dest / "zeros.bin").read_bytes() == large


def test_content_that_the_server_lost_is_a_problem_of_its_paths(
    desk: Desk, origin: HttpTransport, server: Served, tmp_path: Path, large: bytes
) -> None:
    """What is absent is named, small or large, and everything else comes."""
    for content in (b"a" * 5000, large):
        name = digest_of(content).hex()
        os.unlink(server.data / "cache" / name[:2] / name)
    report = fetched(origin, desk, tmp_path / "dest")
    assert [each.path for each in report.problems] == ["large.bin", "media/raw/a.dat"]
    assert all("not on the server" in each.reason for each in report.problems)
    assert not report.damaged and not report.verified
    assert report.bytes - report.fetched_bytes - report.found_bytes == 5000 + len(large)
    assert fetched_folder(tmp_path / "dest") == fetched_folder(desk.root) - {"large.bin", "media/raw/a.dat"}


FILE = Entry("f", Kind.FILE, 6, 0, False, digest_of(b"hello\n"))


@dataclass
class Hostile:
    """A server that states what it likes."""

    objects: Mapping[bytes, bytes]
    root: bytes
    frame: Callable[[bytes], bytes] = lambda body: frames.head(len(body)) + body
    url: str = "http://hostile"
    max_retries: int = 0
    asked: list[Sequence[bytes]] = field(default_factory=list)

    def workspace(self, name: str, **_: Any) -> wire.WorkspaceState:
        return wire.WorkspaceState(
            workspace=name, client_id="", epoch="", sequence=1, root=self.root.hex(), tree_path="", tree_sequence=1,
            files=0, content_bytes=0, last_applied_at=None, last_bundle_id=None, lag=0,
        )  # fmt: skip

    def sequence(self, name: str, number: int) -> wire.KeptSequence:
        return wire.KeptSequence(epoch="", sequence=number, identity="", root="no root", applied_at="")

    def directory(self, name: str, digest: bytes) -> bytes:
        return self.objects[digest]

    @contextmanager
    def directories(self, name: str, digests: Sequence[bytes]) -> Iterator[Incoming]:
        self.asked.append(digests)
        stream = b"".join(self.frame(self.objects[each]) for each in digests if each in self.objects)
        pieces = iter([stream])
        yield Incoming(self.url, lambda _: next(pieces, b""))


def tree(*entries: Entry) -> tuple[dict[bytes, bytes], bytes]:
    body = encode_directory(entries)
    digest = directory_digest(body)
    return {digest: body}, digest


def chain(depth: int) -> tuple[dict[bytes, bytes], bytes]:
    """Return directories inside each other."""
    objects, top = tree(FILE)
    for _ in range(depth):
        more, top = tree(Entry("d", Kind.DIRECTORY, digest=top))
        objects |= more
    return objects, top


@pytest.mark.parametrize(
    ("made", "rule"),
    [
        (tree(Entry("l", Kind.SYMLINK, target="../out")), "P-9"),
        (tree(Entry("l", Kind.SYMLINK, target="/etc/passwd")), "T-6"),
        (tree(Entry("..", Kind.FILE, 1, 0, False, bytes(32))), "T-6"),
        (tree(Entry("a/b", Kind.FILE, 1, 0, False, bytes(32))), "T-6"),
        (tree(Entry(".deltasync", Kind.DIRECTORY, digest=EMPTY_ROOT)), "T-6"),
        (tree(Entry("f", Kind.FILE, -1, 0, False, bytes(32))), "T-5"),
        (tree(FILE, FILE), "T-4"),
        (tree(FILE, Entry("g", Kind.FILE, 7, 0, False, FILE.digest)), "T-5"),
        (({bytes(32): b"\x90"}, bytes(32)), "T-3"),
        (chain(210), "P-7"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_tree_that_breaks_a_rule_writes_nothing(
    tmp_path: Path, made: tuple[dict[bytes, bytes], bytes], rule: str
) -> None:
    """A hostile server's tree is refused before anything is written, here or elsewhere."""
    (tmp_path / "dest").mkdir()
    with pytest.raises(Refused) as caught:
        fetch(Hostile(*made), tmp_path / "dest", FetchOptions(workspace="w"), Meter())  # type: ignore[arg-type]
    assert caught.value.rule == rule and caught.value.exit_code == 8
    assert [each.name for each in tmp_path.iterdir()] == ["dest"] and not list((tmp_path / "dest").iterdir())


@pytest.mark.parametrize(
    ("frame", "kind"),
    [
        (lambda body: frames.head(None), NotFound),
        (lambda body: frames.head(2**40) + body, Refused),
        (lambda body: frames.head(len(body) + 1) + body, HostUnreachable),
        (lambda body: frames.head(len(body)) + body + b"more", NotADeltasyncServer),
        (lambda body: b"short", HostUnreachable),
    ],
)
def test_a_stream_of_objects_is_never_trusted(
    tmp_path: Path, frame: Callable[[bytes], bytes], kind: type[Exception]
) -> None:
    """What is absent, too large, too short or too much ends the fetch before anything is written."""
    with pytest.raises(kind):
        fetch(Hostile(*tree(FILE), frame), tmp_path / "dest", FetchOptions(workspace="w"), Meter())  # type: ignore[arg-type]
    assert not (tmp_path / "dest").exists()


def test_a_malformed_sequence_is_not_followed(tmp_path: Path) -> None:
    """A root that is none is no server of ours."""
    with pytest.raises(NotADeltasyncServer):
        fetch(Hostile(*tree(FILE)), tmp_path / "dest", FetchOptions(workspace="w", at=3), Meter())  # type: ignore[arg-type]
