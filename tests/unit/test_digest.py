"""Digests are those of the bytes on disk, or there is none."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from blake3 import blake3
from observed import write

from deltasync.client.digest import AHEAD_FILES, BUFFER_BYTES, Ahead, Digester, FileChanging, is_same


@pytest.mark.parametrize(
    "size", [0, 1, 4096, (128 << 10) - 1, 128 << 10, BUFFER_BYTES - 1, BUFFER_BYTES, BUFFER_BYTES + 1]
)
def test_a_digest_is_the_blake3_of_the_file(tmp_path: Path, size: int) -> None:
    """Small and large files, at every edge of the buffers, one after another through one digester."""
    content = os.urandom(size)
    write(tmp_path, {"f": content, "g": b"other"})
    digester = Digester()
    found = digester.digest_file(str(tmp_path / "f"))
    assert (found.digest, found.status.st_size) == (blake3(content).digest(), size)
    assert digester.digest_file(str(tmp_path / "g")).digest == blake3(b"other").digest()


def test_a_sparse_file_is_its_zeros(tmp_path: Path) -> None:
    """A hole reads as zeros (F23)."""
    with open(tmp_path / "f", "wb") as out:
        out.truncate(20 << 20)
    assert Digester().digest_file(str(tmp_path / "f")).digest == blake3(bytes(20 << 20)).digest()


def test_nothing_but_a_regular_file_is_opened(tmp_path: Path) -> None:
    """Links are not followed, FIFOs and folders do not block."""
    write(tmp_path, {"f": "x", "d/": ""})
    (tmp_path / "link").symlink_to("f")
    os.mkfifo(tmp_path / "fifo")
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        for name in ("link", "fifo", "d", "missing"):
            with pytest.raises(OSError):
                Digester().digest_file(name, at=folder)
        assert Digester().digest_file("f", at=folder).digest == blake3(b"x").digest()
    finally:
        os.close(folder)


def test_a_file_that_changes_while_it_is_read_has_no_digest(tmp_path: Path) -> None:
    """A large file is given up at the first part that shows the change."""
    write(tmp_path, {"f": b"a" * (4 * BUFFER_BYTES)})
    read: list[int] = []

    def change(size: int) -> None:
        read.append(size)
        with open(tmp_path / "f", "ab") as out:
            out.write(b"b")

    with pytest.raises(FileChanging) as caught:
        Digester(change).digest_file(str(tmp_path / "f"))
    assert len(read) == 1
    assert caught.value.status.st_size == 4 * BUFFER_BYTES + 1


def test_a_torn_read_is_never_taken_for_a_digest(tmp_path: Path) -> None:
    """Under a writer in a tight loop every digest is that of a content that was whole at some time."""
    contents = [bytes([value]) * 60_000 for value in range(4)]
    write(tmp_path, {"f": contents[0]})
    whole = {blake3(content).digest() for content in contents}
    stop = threading.Event()

    def rewrite() -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            write(tmp_path, {"g": contents[turn % 4]})
            os.rename(tmp_path / "g", tmp_path / "f")

    writer = threading.Thread(target=rewrite)
    writer.start()
    digester, found = Digester(), 0
    try:
        for _ in range(500):
            try:
                assert digester.digest_file(str(tmp_path / "f")).digest in whole
                found += 1
            except FileChanging:
                continue
    finally:
        stop.set()
        writer.join()
    assert found


def test_sameness_is_size_times_and_inode(tmp_path: Path) -> None:
    """A touch makes another file of it."""
    write(tmp_path, {"f": "x"})
    before = (tmp_path / "f").stat()
    assert is_same(before, (tmp_path / "f").stat())
    os.utime(tmp_path / "f", ns=(1, 1))
    assert not is_same(before, (tmp_path / "f").stat())


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[int]:
    """A held folder with the files f and g."""
    write(tmp_path, {"f": "f", "g": "g"})
    descriptor = os.open(tmp_path, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def waited(ahead: Ahead, folder: int) -> Ahead:
    """Return it with a read behind it that did not bring all that was asked for at once, as from a disk."""
    descriptor = ahead.opened("f", at=folder)
    assert ahead.files == 0
    assert ahead.read(descriptor, memoryview(bytearray(9)), 0, 9) == 1
    os.close(descriptor)
    return ahead


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="nothing tells here whether a disk is waited for")
def test_files_are_announced_only_while_the_disk_is_waited_for(folder: int) -> None:
    """What lies in memory is opened when it is read; behind a slow read the next files are opened as well."""
    ahead = waited(Ahead(), folder)
    reads = 0
    while ahead.files:
        descriptor = ahead.opened("f", at=folder)
        assert ahead.read(descriptor, memoryview(bytearray(9)), 0, 1) == 1
        os.close(descriptor)
        reads += 1
    assert 1 < reads < 1000


def test_an_announced_file_is_the_one_that_has_the_name_when_it_is_read(folder: int, tmp_path: Path) -> None:
    """What was replaced, removed or made a link since is not read in its place, and no descriptor is left."""
    before = len(os.listdir("/dev/fd"))
    ahead = Ahead()
    for name in "fg":
        ahead.announce(name, 1, at=folder)
    ahead.announce("missing", 1, at=folder)
    write(tmp_path, {"new": "new"})
    os.rename(tmp_path / "new", tmp_path / "f")
    (tmp_path / "g").unlink()
    descriptor = ahead.opened("f", at=folder)
    assert os.read(descriptor, 9) == b"new"
    os.close(descriptor)
    with pytest.raises(FileNotFoundError):
        ahead.opened("g", at=folder)
    ahead.announce("f", 1, at=folder)
    (tmp_path / "f").unlink()
    (tmp_path / "f").symlink_to("other")
    with pytest.raises(OSError):
        ahead.opened("f", at=folder)
    ahead.clear()
    assert len(os.listdir("/dev/fd")) == before


def test_what_is_announced_and_never_read_keeps_few_descriptors(tmp_path: Path) -> None:
    """A folder of files that have not settled holds no more of them open than one whose files are read."""
    write(tmp_path, {f"f{number}": "f" for number in range(100)})
    before = len(os.listdir("/dev/fd"))
    ahead = Ahead()
    folder = os.open(tmp_path, os.O_RDONLY)
    for number in range(100):
        ahead.announce(f"f{number}", 1, at=folder)
        assert len(os.listdir("/dev/fd")) <= before + 1 + AHEAD_FILES
    os.close(folder)
    ahead.clear()
    assert len(os.listdir("/dev/fd")) == before


def test_announced_files_give_way_when_there_are_no_more_descriptors(folder: int) -> None:
    """Opening ahead never keeps a file from being read that could be without it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    ahead = Ahead()
    descriptors: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/dev/fd"))) + 1, hard))
        with pytest.raises(OSError):
            while True:
                descriptors.append(os.dup(folder))
        os.close(descriptors.pop())
        ahead.announce("g", 1, at=folder)
        descriptors.append(ahead.opened("f", at=folder))
        assert os.read(descriptors[-1], 9) == b"f"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in descriptors:
            os.close(descriptor)
        ahead.clear()
