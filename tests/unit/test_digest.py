"""Digests are those of the bytes on disk, or there is none."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from blake3 import blake3
from observed import write

from deltasync.client.digest import BUFFER_BYTES, Digester, FileChanging, is_same


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
