"""Reading content for bundles: every byte is of its digest, whatever happens to the file meanwhile."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from deltasync.client import pack
from deltasync.client.pack import BUFFER_BYTES, ContentChanged, Source
from deltasync.client.seal import Writer, composed, operations_max
from deltasync.core.errors import Refused
from deltasync.core.hashing import digest_of
from deltasync.core.manifest import EMPTY_ROOT, Kind, Operation, Verb
from deltasync.core.metadata import Metadata, file_name
from deltasync.core.wire import Limits


def operation(path: str, content: bytes) -> Operation:
    return Operation(
        operation=Verb.CREATED, kind=Kind.FILE, path=path, digest=digest_of(content).hex(), size=len(content)
    )


def bundle_of(*operations: Operation) -> Metadata:
    writer = Writer("proj", "/proj", "a" * 32, "1" * 32)
    return composed(operations, writer, sequence=1, parent_root=EMPTY_ROOT, root=b"\1" * 32)


@pytest.mark.parametrize("size", [0, 1, BUFFER_BYTES - 1, BUFFER_BYTES, BUFFER_BYTES + 1, 3 * BUFFER_BYTES])
def test_content_of_every_size_is_read_whole(tmp_path: Path, size: int) -> None:
    """Content around the size of the buffer comes out as it lies there."""
    content = os.urandom(size)
    (tmp_path / "f").write_bytes(content)
    source = Source(tmp_path)
    assert b"".join(bytes(view) for view in source.read(operation("f", content))) == content
    source.close()


def test_the_last_bytes_of_changed_content_are_never_handed_out(tmp_path: Path) -> None:
    """A large file that changes in the middle of the reading gives its beginning at most."""
    content = os.urandom(4 * BUFFER_BYTES)
    path = tmp_path / "f"
    path.write_bytes(content)
    given = 0
    with pytest.raises(ContentChanged) as caught:
        for view in Source(tmp_path).read(operation("f", content)):
            if not given:
                with path.open("r+b") as file:
                    file.seek(3 * BUFFER_BYTES + 5)
                    file.write(b"!")
            given += len(view)
    assert given < len(content)
    assert caught.value.path == "f"


def _truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _grown(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def _linked(path: Path) -> None:
    path.rename(path.with_name("other"))
    path.symlink_to("other")


def _behind_a_linked_folder(path: Path) -> None:
    path.parent.rename(path.parent.with_name("real"))
    path.parent.symlink_to("real")


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    "change", [Path.unlink, _truncated, _grown, _linked, _behind_a_linked_folder, _fifo], ids=lambda each: each.__name__
)
@pytest.mark.parametrize("size", [1000, 2 * BUFFER_BYTES])
def test_a_path_that_is_no_longer_what_it_was_gives_nothing_whole(
    tmp_path: Path, change: Callable[[Path], None], size: int
) -> None:
    """No link is followed, no FIFO waited for, no byte beyond the digest's content is read as such."""
    content = os.urandom(size)
    path = tmp_path / "d/f"
    path.parent.mkdir()
    path.write_bytes(content)
    change(path)
    given = 0
    with pytest.raises(ContentChanged):
        for view in Source(tmp_path).read(operation("d/f", content)):
            given += len(view)
    assert given < size


def test_a_racing_writer_never_gets_wrong_bytes_into_a_bundle(tmp_path: Path) -> None:
    """While a file flips between two contents, what is read is the one that was asked for, or nothing whole."""
    contents = [bytes([n]) * 200_000 for n in (1, 2)]
    path = tmp_path / "f"
    path.write_bytes(contents[0])
    stop = threading.Event()

    def flip() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            path.write_bytes(contents[number % 2])

    writer = threading.Thread(target=flip)
    writer.start()
    source = Source(tmp_path)
    try:
        for _ in range(300):
            try:
                found = b"".join(bytes(view) for view in source.read(operation("f", contents[1])))
            except ContentChanged:
                continue
            assert found == contents[1]
    finally:
        stop.set()
        writer.join()


def test_a_bundle_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    """When content turns out to be gone no file is left, not even an unfinished one."""
    (tmp_path / "root").mkdir()
    (tmp_path / "root/f").write_bytes(b"here")
    metadata = bundle_of(operation("f", b"here"), operation("g", b"gone"))
    digests = {each.digest or "" for each in metadata.operations}
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ContentChanged):
        pack.write_bundle(out, metadata, pack.packed(metadata, digests, Source(tmp_path / "root")))
    assert list(out.iterdir()) == []
    (tmp_path / "root/g").write_bytes(b"gone")
    path = pack.write_bundle(out, metadata, pack.packed(metadata, digests, Source(tmp_path / "root")))
    assert [each.name for each in out.iterdir()] == [path.name] == [file_name(metadata)]
    assert pack.carried_digests(path) == (metadata, digests)


def test_a_kept_copy_appears_with_the_last_byte(tmp_path: Path) -> None:
    """What is passed on and kept is the same; a sending that stops half-way keeps nothing."""
    chunks = [b"a" * 10, b"b" * 10]
    assert list(pack.kept(iter(chunks), tmp_path / "whole")) == chunks
    assert (tmp_path / "whole").read_bytes() == b"".join(chunks)
    stopped = pack.kept(iter(chunks), tmp_path / "half")
    next(stopped)
    stopped.close()
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_a_bundle_file_under_another_name_is_refused(tmp_path: Path) -> None:
    """A file whose name tells another sequence than its manifest is not taken for either."""
    metadata = bundle_of()
    path = pack.write_bundle(tmp_path, metadata, pack.packed(metadata, (), Source(tmp_path)))
    assert pack.read_metadata(path) == metadata
    renamed = path.rename(path.with_name(path.name.replace("00000001", "00000002")))
    with pytest.raises(Refused, match="holds the bundle"):
        pack.read_metadata(renamed)


def test_long_paths_make_small_bundles() -> None:
    """However long the paths are, the metadata stays within what a receiver takes."""
    short = [operation("a", b"")]
    long = [operation("d" * 200 + "/" + "e" * 3800, b"")]
    assert operations_max(short, Limits()) == 20_000
    assert operations_max(long, Limits()) * len(long[0].path) < Limits().metadata_bytes
    assert operations_max(long, Limits(metadata_bytes=10)) == 1
