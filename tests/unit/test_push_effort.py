"""Bundles on their way out: what does not compress is stored, and the rest is compressed as fits the link."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from desk import Desk
from serving import Served, serving

from deltasync.client import pack
from deltasync.client.pack import ContentChanged, Source
from deltasync.client.seal import Writer, composed
from deltasync.client.transport import HttpTransport, open_transport
from deltasync.core.hashing import digest_of
from deltasync.core.manifest import EMPTY_ROOT, Kind, Operation, Verb
from deltasync.core.metadata import Metadata

MIB = 1 << 20
STORED_HEADER = bytes.fromhex("28b52ffdc438")
QUICK, SLOW = 1e9, 1e6


def text(size: int, seed: int = 0) -> bytes:
    words = random.Random(seed)
    return (" ".join(f"{words.randrange(3_000):x}" for _ in range(size // 4 + 1)) * 2)[:size].encode()


def noise(size: int) -> bytes:
    return os.urandom(size)


def written(root: Path, **files: bytes) -> Metadata:
    """Write files and return a bundle that creates them."""
    operations = []
    for name, content in files.items():
        (root / name).write_bytes(content)
        digest = digest_of(content).hex()
        operations.append(
            Operation(operation=Verb.CREATED, kind=Kind.FILE, path=name, digest=digest, size=len(content))
        )
    writer = Writer("proj", "/proj", "a" * 32, "1" * 32)
    return composed(operations, writer, sequence=1, parent_root=EMPTY_ROOT, root=b"\1" * 32)


def packed(root: Path, metadata: Metadata, *, level: int | None = None, link: float = 0.0) -> bytes:
    digests = {each.digest or "" for each in metadata.operations}
    return b"".join(pack.packed(metadata, digests, Source(root), level=level, link=lambda: link))


def verified(root: Path, metadata: Metadata, raw: bytes) -> int:
    """Read a bundle strictly and return its size."""
    path = pack.write_bundle(root, metadata, iter([raw]))
    assert pack.carried_digests(path) == (metadata, {each.digest for each in metadata.operations})
    return len(raw)


def test_noise_is_stored_and_text_is_compressed(tmp_path: Path) -> None:
    """The content decides, not the names or the number of files."""
    medium = written(tmp_path, a=noise(3 * MIB), b=noise(MIB))
    raw = packed(tmp_path, medium)
    assert raw.startswith(STORED_HEADER)
    assert verified(tmp_path, medium, raw) < 4 * MIB + 16_384
    prose = written(tmp_path, a=text(3 * MIB), b=text(MIB, 1))
    raw = packed(tmp_path, prose)
    assert not raw.startswith(STORED_HEADER)
    assert verified(tmp_path, prose, raw) < 2 * MIB


def test_noise_first_and_text_behind_it_is_compressed(tmp_path: Path) -> None:
    """A sample is of the whole bundle: what it begins with does not decide alone."""
    mixed = written(tmp_path, a=noise(6 * MIB), b=text(2 * MIB))
    assert verified(tmp_path, mixed, packed(tmp_path, mixed)) < 7.3 * MIB
    (tmp_path / "one").write_bytes(b"")
    one = written(tmp_path, one=noise(6 * MIB) + text(2 * MIB))
    assert verified(tmp_path, one, packed(tmp_path, one)) < 7.3 * MIB


def test_a_small_bundle_is_compressed_without_a_look(tmp_path: Path) -> None:
    """Below a mebibyte a sample costs more than it could save."""
    small = written(tmp_path, a=noise(500_000))
    assert not packed(tmp_path, small).startswith(STORED_HEADER)


def test_a_level_that_is_asked_for_holds_for_everything(tmp_path: Path) -> None:
    """`--level` overrides the sample and the link."""
    medium = written(tmp_path, a=noise(2 * MIB))
    assert not packed(tmp_path, medium, level=1).startswith(STORED_HEADER)
    prose = written(tmp_path, a=text(2 * MIB))
    low, high = (packed(tmp_path, prose, level=level, link=QUICK) for level in (1, 12))
    assert verified(tmp_path, prose, high) < verified(tmp_path, prose, low)


def test_a_slow_link_permits_what_a_quick_one_does_not(tmp_path: Path) -> None:
    """Text goes at level 3 where the link is slow or not known, at level 1 where zstd would hold it up."""
    prose = written(tmp_path, a=text(3 * MIB))
    by_level = {level: packed(tmp_path, prose, level=level) for level in (1, 3)}
    assert by_level[1] != by_level[3]
    assert packed(tmp_path, prose, link=QUICK) == by_level[1]
    assert packed(tmp_path, prose, link=SLOW) == packed(tmp_path, prose) == by_level[3]


def test_files_that_vanish_before_the_sample_count_as_nothing(tmp_path: Path) -> None:
    """A sample is no promise: the sealing itself says that a file is gone, or is none any more."""
    medium = written(tmp_path, a=noise(2 * MIB), b=noise(2 * MIB))
    (tmp_path / "b").unlink()
    source = Source(tmp_path)
    assert source.sample("b", 0, 5) == source.sample("none/b", 0, 5) == b""
    assert source.sample("a", 2 * MIB - 2, 5) == (tmp_path / "a").read_bytes()[-2:]
    assert source.sample("a", 2 * MIB, 5) == b""
    source.close()
    with pytest.raises(ContentChanged, match="b: "):
        packed(tmp_path, medium)
    (tmp_path / "a").unlink()
    (tmp_path / "a").mkdir()
    with pytest.raises(ContentChanged, match="a: "):
        packed(tmp_path, medium)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served") / "data") as running:
        yield running


def kept(desk: Desk) -> bytes:
    """Return the bundle file that was sent last and is kept."""
    return desk.outbox()[-1].read_bytes()


def test_what_is_sent_is_stored_or_compressed_by_its_content(tmp_path: Path, served: Served) -> None:
    """A push of media stores, one of text compresses, `--level` holds for both, and the server takes them all."""
    desk = Desk(tmp_path / "kinds", served.url)
    (desk.root / "a.mov").write_bytes(noise(2 * MIB))
    desk.push(keep_sent_seconds=1000)
    assert kept(desk).startswith(STORED_HEADER)
    (desk.root / "a.txt").write_bytes(text(2 * MIB))
    desk.push(keep_sent_seconds=1000)
    assert len(kept(desk)) < MIB
    (desk.root / "b.mov").write_bytes(noise(2 * MIB))
    desk.push(keep_sent_seconds=1000, level=5)
    assert not kept(desk).startswith(STORED_HEADER)


def test_only_the_new_chunks_of_a_changed_file_are_sampled(tmp_path: Path, served: Served) -> None:
    """Text that was put into a large file of noise is compressed, because only the text travels."""
    desk = Desk(tmp_path / "chunks", served.url)
    path = desk.root / "big.bin"
    begin, end = noise(4 * MIB), noise(4 * MIB)
    path.write_bytes(begin + end)
    desk.push()
    path.write_bytes(begin + text(2 * MIB) + end)
    report = desk.push(keep_sent_seconds=1000)
    assert report.avoided_by_chunks_bytes > 7 * MIB
    assert len(kept(desk)) < 1.2 * MIB
    path.write_bytes(begin + noise(2 * MIB) + end)
    desk.push(keep_sent_seconds=1000)
    assert kept(desk).startswith(STORED_HEADER)


def test_a_link_is_as_fast_as_it_was_found_or_may_be(tmp_path: Path, served: Served) -> None:
    """Nothing is known of a link before a large bundle went over it, but its limit."""
    here = open_transport(served.url, timeout=20, max_retries=2)
    assert here.link_bytes_per_second == 0
    desk = Desk(tmp_path / "rate", served.url)
    for name, size in (("small", 1000), ("large", 10 * MIB), ("larger", 40 * MIB)):
        (desk.root / name).write_bytes(noise(size))
        desk.push(transport=here)
        assert (here.link_bytes_per_second > 0) == (name != "small")
    assert isinstance(here, HttpTransport)
    limited = HttpTransport(served.url, bandwidth=5)
    assert limited.link_bytes_per_second == 5
    for each in (here, limited):
        each.close()
