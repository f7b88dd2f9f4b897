"""Properties of bundles: what is sealed opens again, and what is spoiled never passes as something else."""

from __future__ import annotations

import io
import uuid
from datetime import UTC, datetime
from hashlib import shake_256

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import Flat, Objects, flat_trees

from deltasync.core import tar
from deltasync.core.bundle import (
    BundleReader,
    Metadata,
    compose,
    content_operations,
    parse_metadata,
    seal,
    sealed_bytes,
)
from deltasync.core.delta import diff
from deltasync.core.errors import LimitExceeded, Refused
from deltasync.core.frame import STORED, FrameReader, compress, store
from deltasync.core.hashing import digest_of
from deltasync.core.manifest import EMPTY_ROOT, Kind, Operation, Verb
from deltasync.core.names import NameRefused, parse_path
from deltasync.core.wire import Limits

CONTENTS = {digest_of(content).hex(): content for content in (b"", b"x", b"y", b"z")}


def _is_path(text: str) -> bool:
    try:
        parse_path(text)
    except NameRefused:
        return False
    return True


_paths = st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=60), min_size=1, max_size=9)
_files = st.dictionaries(_paths.map("/".join).filter(_is_path), st.binary(max_size=2_000), max_size=12)


def _metadata(operations: list[Operation], parent_root: bytes, root: bytes, sequence: int) -> Metadata:
    return compose(
        operations,
        workspace="proj",
        workspace_path="/proj",
        epoch="ab" * 16,
        sequence=sequence,
        parent_root=parent_root,
        root=root,
        client_id=str(uuid.UUID(int=sequence)),
        bundle_id=str(uuid.UUID(int=sequence, version=4)),
        created_at=datetime.fromtimestamp(sequence % 10**9, UTC),
    )


def _open(raw: bytes) -> tuple[Metadata, dict[str, bytes]]:
    reader = BundleReader(io.BytesIO(raw), Limits())
    metadata = reader.metadata()
    contents = {operation.digest or "": b"".join(map(bytes, views)) for operation, views, _ in reader.contents()}
    reader.finish()
    return metadata, contents


@given(flat_trees(), flat_trees(), st.data(), st.integers(1, 2**53 - 1))
@settings(max_examples=200, deadline=None)
def test_the_delta_of_any_two_trees_opens_as_it_was_sealed(old: Flat, new: Flat, data: st.DataObject, n: int) -> None:
    """open(seal(diff)) is the diff, with exactly the content that was chosen to travel."""
    objects = Objects()
    parent_root, root = objects.build(old), objects.build(new)
    metadata = _metadata(diff(parent_root, root, objects.load), parent_root, root, n)
    named = sorted(content_operations(metadata))
    chosen = data.draw(st.sets(st.sampled_from(named)) if named else st.just(set[str]()))
    raw = b"".join(seal(metadata, chosen, lambda operation: (CONTENTS[operation.digest or ""],)))
    assert _open(raw) == (metadata, {digest: CONTENTS[digest] for digest in chosen})


@given(_files, st.integers(0, 19), st.integers(1, 700))
@settings(max_examples=200, deadline=None)
def test_any_names_and_any_bytes_round_trip(files: dict[str, bytes], level: int, piece: int) -> None:
    """Whatever the paths and contents, in whatever pieces they are read, the receiver gets the same."""
    contents = {digest_of(content).hex(): content for content in files.values()}
    operations = [
        Operation(operation=Verb.CREATED, kind=Kind.FILE, path=path, digest=digest_of(content).hex(), size=len(content))
        for path, content in files.items()
    ]
    metadata = _metadata(operations, EMPTY_ROOT, EMPTY_ROOT, 1)

    def read(operation: Operation) -> list[bytes]:
        content = contents[operation.digest or ""]
        return [content[at : at + piece] for at in range(0, len(content), piece)]

    raw = b"".join(seal(metadata, contents, read, level=level))
    assert _open(raw) == (metadata, contents)
    assert sealed_bytes(metadata, contents) % tar.BLOCK == 0


_piece_sizes = st.one_of(st.integers(0, 600), st.sampled_from((131_071, 131_072, 262_143, 262_144, 1 << 20)))


@given(st.lists(_piece_sizes, max_size=6), st.integers(0, 255), st.sampled_from((STORED, 1, 3)))
@settings(max_examples=100, deadline=None)
def test_pieces_of_any_sizes_round_trip_stored_and_compressed(sizes: list[int], seed: int, level: int) -> None:
    """However content is cut into pieces, every reader of zstd gets it back, from raw and from compressed blocks."""
    noise = shake_256(bytes([seed])).digest(4096) * 257
    pieces = [memoryview(noise)[number : number + size] for number, size in enumerate(sizes)]
    content = b"".join(pieces)
    made = store(pieces, len(content)) if level == STORED else compress(pieces, len(content), level=level)
    raw = b"".join(made)
    frame, found = FrameReader(io.BytesIO(raw), Limits()), []
    while view := frame.take_some(1 << 20):
        found.append(bytes(view))
    frame.finish()
    assert b"".join(found) == zstandard.ZstdDecompressor().decompress(raw) == content


@given(st.lists(st.text('a{"\\[', min_size=1, max_size=6), unique=True, min_size=1, max_size=8))
@settings(max_examples=300, deadline=None)
def test_operations_are_counted_right_whatever_their_names_are(names: list[str]) -> None:
    """B-30: braces, quotes and backslashes in names neither hide an operation nor add one."""
    operations = [Operation(operation=Verb.CREATED, kind=Kind.DIRECTORY, path=name) for name in names]
    made = _metadata(operations, EMPTY_ROOT, EMPTY_ROOT, 1)
    members = made.manifest_bytes, made.operations_bytes, made.hashes_bytes
    assert parse_metadata(*members, Limits(bundle_operations=len(names))) == made
    with pytest.raises(LimitExceeded, match="B-30"):
        parse_metadata(*members, Limits(bundle_operations=len(names) - 1))


_SAMPLE = {"a": b"some words", "b/c": bytes(range(256)) * 3, "d" * 130: b"long name"}
_SAMPLE_METADATA = _metadata(
    [
        Operation(operation=Verb.CREATED, kind=Kind.FILE, path=path, digest=digest_of(content).hex(), size=len(content))
        for path, content in _SAMPLE.items()
    ],
    EMPTY_ROOT,
    EMPTY_ROOT,
    1,
)
_SEALED = [
    b"".join(seal(_SAMPLE_METADATA, content_operations(_SAMPLE_METADATA), lambda o: (_SAMPLE[o.path],), level=level))
    for level in (1, STORED)
]
_OPENED = _open(_SEALED[0])


@given(st.data(), st.sampled_from(_SEALED))
@settings(max_examples=800, deadline=None)
def test_a_spoiled_bundle_is_refused_or_says_the_same(data: st.DataObject, sealed: bytes) -> None:
    """Bytes replaced, removed or put in: never another exception, and never another content."""
    start = data.draw(st.integers(0, len(sealed)))
    end = data.draw(st.integers(start, min(len(sealed), start + 8)))
    spoiled = sealed[:start] + data.draw(st.binary(max_size=8)) + sealed[end:]
    try:
        assert _open(spoiled) == _OPENED
    except (Refused, LimitExceeded) as error:
        assert error.rule.startswith("B-")


@given(st.binary(max_size=2_000))
@settings(max_examples=300, deadline=None)
def test_any_archive_in_a_good_frame_is_refused_by_a_rule(junk: bytes) -> None:
    """Whatever stands where headers belong, the reader answers with a rule of the archive."""
    for archive in (junk, tar.header(b"manifest.json", len(junk)) + junk + tar.padding(len(junk)) + tar.END):
        raw = b"".join(compress([archive], len(archive)))
        try:
            _open(raw)
        except (Refused, LimitExceeded) as error:
            assert error.rule.startswith("B-")
        else:
            raise AssertionError("junk was accepted")


@given(st.binary(min_size=512, max_size=1_600))
@settings(max_examples=300, deadline=None)
def test_no_bytes_but_canonical_ones_parse_as_a_header(noise: bytes) -> None:
    """A header that parses is the one that its name and size would be written as."""
    block = bytearray(noise[:512])
    block[148:156] = b"%06o\x00 " % (sum(block) - sum(block[148:156]) + 256)
    try:
        member = tar.parse(bytes(block) + noise[512:])
    except Refused:
        return
    assert (bytes(block) + noise[512:]).startswith(tar.header(*member))
