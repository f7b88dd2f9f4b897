"""Files that a source tree may have and few have: locked, protected, mapped, of very many names, very many of them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import folders
import pytest
import sparse
from serving import Served, serving
from user import SECONDS, User

from deltasync.client import holes, ranges
from deltasync.core.manifest import Kind, Operation, Verb
from deltasync.disk import open_regular, pieces

HUGE = bool(os.environ.get("HUGE"))
"""What `make huge` does; it takes minutes."""
NAMES, FILES = (64_000, 1_000_000) if HUGE else (10_000, 50_000)
"""Of one file, of which ext4 allows 65,000, and in one folder."""
TIB = 1 << 40
MEASURED = """
import sys
from deltasync.cli.main import run
code = run(sys.argv[1:])
print(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0], file=sys.stderr)
sys.exit(code)
"""
"""The program, which says at its end how many KiB it held at most."""
_GET_FLAGS, _SET_FLAGS, _IMMUTABLE = 0x80086601, 0x40086602, 0x10
_ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", tag, rights, who)
    for tag, rights, who in (
        (1, 6, 2**32 - 1),
        (2, 4, 12345),
        (4, 4, 2**32 - 1),
        (16, 6, 2**32 - 1),
        (32, 4, 2**32 - 1),
    )
)
"""What the kernel keeps of an access list that allows user 12345 to read."""
_CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)
"""cap_net_bind_service, effective and permitted."""


def assert_pushed(server: Served, user: User, folder: Path) -> None:
    """Push, and fail unless there was no problem and the plain tree is the folder."""
    done = user.run("push", folder, "--to", server.url)
    assert (done.code, done.err) == (0, "")
    folders.assert_same(folder, server.data / "workspaces" / folder.name / "tree")


def test_a_file_that_another_program_has_locked_is_read(server: Served, user: User, folder: Path) -> None:
    """A lock of either kind asks only those who ask for locks: the file is carried, and the lock stays."""
    with (folder / "readme.txt").open("r+b") as whole, (folder / "media/clip.bin").open("r+b") as record:
        fcntl.flock(whole, fcntl.LOCK_EX)
        fcntl.lockf(record, fcntl.LOCK_EX)
        done = user.run("push", folder, "--to", server.url)  # compared later: whoever closes the file ends the lock
        assert (done.code, done.err) == (0, "")
        other = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+b'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        words = [sys.executable, "-c", other, folder / "media/clip.bin"]
        assert subprocess.run(words, stderr=subprocess.DEVNULL, check=False).returncode == 1
    assert_pushed(server, user, folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [("system.posix_acl_access", _ACL), ("security.capability", _CAPABILITY)],
    ids=["access list", "capability"],
)
def test_access_lists_and_capabilities_are_not_carried(
    server: Served, user: User, folder: Path, tmp_path: Path, name: str, value: bytes
) -> None:
    """The file is carried without them, neither the tree nor a fetch has them, and its own stays as it is."""
    file = folder / "bin/run.sh"
    try:
        os.setxattr(file, name, value)
    except OSError as error:
        pytest.skip(f"{name} cannot be set here ({error.strerror})")
    assert_pushed(server, user, folder)
    dest = tmp_path / "dest"
    assert user.run("fetch", "--from", server.url, "--workspace", folder.name, dest).code == 0
    tree = server.data / "workspaces" / folder.name / "tree"
    assert [name in os.listxattr(root / "bin/run.sh") for root in (folder, tree, dest)] == [True, False, False]
    assert_pushed(server, user, folder)


@contextlib.contextmanager
def immutable(path: Path) -> Iterator[None]:
    """Forbid every change of a file while the block runs, or skip the test where that is not possible."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            (flags,) = struct.unpack("l", fcntl.ioctl(descriptor, _GET_FLAGS, struct.pack("l", 0)))
            fcntl.ioctl(descriptor, _SET_FLAGS, struct.pack("l", flags | _IMMUTABLE))
        except OSError as error:
            pytest.skip(f"no file can be made immutable here ({error.strerror})")
        try:
            yield
        finally:
            fcntl.ioctl(descriptor, _SET_FLAGS, struct.pack("l", flags))
    finally:
        os.close(descriptor)


def test_an_immutable_file_is_carried_and_stays_so(server: Served, user: User, folder: Path) -> None:
    """Nothing is written to a file that is pushed, nor linked to it."""
    with immutable(folder / "readme.txt"):
        assert_pushed(server, user, folder)
        with pytest.raises(PermissionError):
            (folder / "readme.txt").touch()


def test_an_immutable_file_in_the_way_of_a_fetch_is_a_problem(
    server: Served, user: User, folder: Path, tmp_path: Path
) -> None:
    """It stays as it is and is named; everything else arrives, and the next fetch completes it."""
    assert_pushed(server, user, folder)
    dest = tmp_path / "dest"
    words = ("fetch", "--from", server.url, "--workspace", folder.name, dest)
    folders.write(dest, "readme.txt", "mine")
    with immutable(dest / "readme.txt"):
        done = user.run(*words)
        assert done.code == 3 and "readme.txt" in done.err + done.out
        assert (dest / "readme.txt").read_text() == "mine"
    assert user.run(*words).code == 0
    folders.assert_same(folder, dest)


def test_a_write_through_a_mapping_is_found(server: Served, user: User, folder: Path) -> None:
    """The size stays. The kernel sets the time once a page is first written, and the next push sees that.

    A later write to that page may set none until it is written back: `verify` and `push --rehash` find it.
    """
    path = folder / "media/clip.bin"
    assert_pushed(server, user, folder)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[5] ^= 255
        assert_pushed(server, user, folder)
        mapped[6] ^= 255
        assert user.run("verify", folder).code in (5, 8)  # a file that was edited, or bytes that changed in silence
        assert user.run("push", folder, "--rehash").code == 0
        assert user.run("verify", folder).code == 0
    folders.assert_same(folder, server.data / "workspaces" / folder.name / "tree")


def test_a_file_of_very_many_names_is_sent_once(server: Served, user: User, folder: Path) -> None:
    """Its content goes once, and each name is a file like others; as many as the file system gives."""
    first = folders.write(folder, "names/first", b"content" * 10_000)
    made = 0
    for number in range(NAMES):
        try:
            os.link(first, first.with_name(f"{number:05d}"))
        except OSError as error:
            if error.errno != errno.EMLINK:
                raise
            break
        made += 1
    assert made == first.stat().st_nlink - 1 > 1000
    done = user.run("push", folder, "--to", server.url, "--json")
    assert done.code == 0 and done.json["content_bytes"] < 5 * first.stat().st_size  # with what else is there
    tree = server.data / "workspaces" / folder.name / "tree/names"
    assert len(os.listdir(tree)) == made + 1
    assert (tree / f"{made - 1:05d}").read_bytes() == first.read_bytes()


def test_the_holes_of_a_tebibyte_are_neither_read_nor_sent(tmp_path: Path) -> None:
    """Only the few pages of it that are data are asked of the disk, and are in the recipe that travels."""
    sparse.require_holes(tmp_path)
    at = (0, TIB // 2, TIB - 4096)
    try:
        sparse.write(tmp_path / "disk.img", TIB, dict.fromkeys(at, b"page" * 1024))
    except OSError as error:
        pytest.skip(f"no file of a tebibyte here ({error.strerror})")
    read: list[tuple[int, int]] = []

    def noted(descriptor: int, buffer: memoryview, start: int, end: int) -> int:
        read.append((start, end))
        return os.preadv(descriptor, [buffer], start)

    descriptor = open_regular(str(tmp_path / "disk.img"))
    try:
        assert sum(len(piece) for piece in pieces(descriptor, memoryview(bytearray(1 << 20)), noted)) == TIB
    finally:
        os.close(descriptor)
    assert sum(end - start for start, end in read) == sum(end - start for start, end in {*read}) <= 3 * (64 << 10)
    operation = Operation(operation=Verb.CREATED, kind=Kind.FILE, path="disk.img", size=TIB)
    plan = ranges.sparse(TIB, holes.holes_of(tmp_path, operation))
    assert plan is not None and plan.recipe.new_bytes <= 3 * (64 << 10)


def peak_mib(user: User, *words: object) -> float:
    """Run a command that succeeds; return how much memory it held at most."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, words), "--quiet"],
        env=user.environment,
        capture_output=True,
        text=True,
        timeout=3600 if HUGE else SECONDS,
        check=True,
    )
    return int(done.stderr) / 1024


def filled(root: Path, count: int) -> Path:
    """Return a new folder with so many empty files."""
    root.mkdir()
    for number in range(count):
        os.close(os.open(root / f"file number {number:07d}", os.O_WRONLY | os.O_CREAT, 0o644))
    return root


def test_very_many_files_in_one_folder_take_bounded_memory(user: User, tmp_path: Path) -> None:
    """What all entries take is in proportion to what a fifth of them take, and less than 2 KiB for each."""
    counts = [FILES // 50, FILES // 5, FILES]
    few, many, most = (peak_mib(user, "push", filled(tmp_path / f"of{count}", count)) for count in counts)
    assert most - few < 1.5 * 5 * (many - few)
    assert (most - few) * 1024 / FILES < 2


def test_very_many_files_in_one_folder_take_little_memory_of_a_server(user: User, tmp_path: Path) -> None:
    """Less than 2 KiB for each, and the tree has them all."""
    count = FILES if HUGE else FILES // 5
    root = filled(tmp_path / "many", count)
    with serving(tmp_path / "data") as server:
        before = server_peak_mib(server)
        assert peak_mib(user, "push", root, "--to", server.url) > 0
        assert len(os.listdir(server.data / "workspaces" / root.name / "tree")) == count
        assert (server_peak_mib(server) - before) * 1024 / count < 2 + 8 * 1024 / count  # and what a first push takes


def server_peak_mib(server: Served) -> float:
    """Return how much memory a server has held at most."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) / 1024
