"""Bundles: sealed in one canonical form, read strictly in one pass, listed and extracted by the real GNU tar."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta, timezone
from hashlib import shake_256
from pathlib import Path

import msgspec
import pytest
import zstandard

from deltasync.core import bundle, tar
from deltasync.core.bundle import BundleReader, Metadata, compose, content_operations, seal
from deltasync.core.errors import LimitExceeded, Refused
from deltasync.core.frame import STORED, FrameReader, compress
from deltasync.core.hashing import digest_of
from deltasync.core.manifest import EMPTY_ROOT, Kind, Operation, Verb
from deltasync.core.metadata import check_operations
from deltasync.core.wire import Limits

needs_gnu_tar = pytest.mark.skipif(
    not (shutil.which("tar") and shutil.which("zstd")), reason="GNU tar and zstd are not installed"
)
WHEN = datetime(2026, 11, 21, 10, 0, 0, 123_456, tzinfo=timezone(timedelta(hours=1)))
NAMES = [
    "plain.txt",
    "with spaces  and 'quotes'.txt",
    "-rf",
    "ünïcode/☃/日本語.txt",
    "a" * 100,
    "b" * 255,
    "/".join(["c" * 80] * 2),
    "/".join(["d" * 90] * 4),
    "/".join(["é" * 120] * 16),
    "[bold] back\\slash",
]


def created(path: str, content: bytes) -> Operation:
    """Return the creation of a file."""
    digest = digest_of(content).hex()
    return Operation(operation=Verb.CREATED, kind=Kind.FILE, path=path, digest=digest, size=len(content), mtime_ns=7)


def composed(operations: Iterable[Operation], **changes: object) -> Metadata:
    """Return metadata around operations."""
    fields = {
        "workspace": "proj",
        "workspace_path": "/home/ada/proj",
        "epoch": "0123456789abcdef" * 2,
        "sequence": 1,
        "parent_root": EMPTY_ROOT,
        "root": EMPTY_ROOT,
        "client_id": "fedcba9876543210" * 2,
        "bundle_id": "00000000-0000-4000-8000-000000000001",
        "created_at": WHEN,
    }
    return compose(list(operations), **(fields | changes))  # type: ignore[arg-type]


def of(files: dict[str, bytes]) -> Metadata:
    """Return the metadata of a bundle that creates files."""
    return composed(created(path, content) for path, content in files.items())


def sealed(metadata: Metadata, files: dict[str, bytes], digests: Iterable[str] | None = None, **options: int) -> bytes:
    """Return the bundle file with the content of those digests, or of all."""
    wanted = set(content_operations(metadata) if digests is None else digests)
    return b"".join(seal(metadata, wanted, lambda operation: (files[operation.path],), **options))


def opened(raw: bytes, limits: Limits | None = None) -> tuple[Metadata, dict[str, bytes]]:
    """Read a whole bundle; return its metadata and the content it carries by path."""
    reader = BundleReader(io.BytesIO(raw), limits or Limits())
    metadata = reader.metadata()
    contents = {operation.path: b"".join(map(bytes, views)) for operation, views, _ in reader.contents()}
    reader.finish()
    return metadata, contents


def refusal(raw: bytes, limits: Limits | None = None) -> str:
    """Return the rule that refuses a bundle."""
    with pytest.raises((Refused, LimitExceeded)) as caught:
        opened(raw, limits)
    return caught.value.rule


FILES = {name: f"content of {number}\n".encode() * number for number, name in enumerate(NAMES)}


def test_a_sealed_bundle_opens_with_the_same_metadata_and_content() -> None:
    """What goes in comes out, long and odd names and an empty file included."""
    metadata = of(FILES)
    assert opened(sealed(metadata, FILES)) == (metadata, FILES)


def test_thin_and_full_bundles_have_one_identity() -> None:
    """A thin bundle leaves content out; everything that it says stays the same (B-56)."""
    metadata = of(FILES)
    full, thin = opened(sealed(metadata, FILES)), opened(sealed(metadata, FILES, []))
    assert full[0] == thin[0] == metadata
    assert (full[1], thin[1]) == (FILES, {})
    some = [created(name, FILES[name]).digest or "" for name in NAMES[2:9:3]]
    assert opened(sealed(metadata, FILES, some))[1] == {name: FILES[name] for name in NAMES[2:9:3]}


def test_content_travels_once_under_the_first_operation_that_names_it() -> None:
    """Duplicates are one member, in the order of the operations (B-52, B-53)."""
    files = {"b": b"same", "a": b"same", "c": b"other"}
    metadata = of(files)
    assert [operation.path for operation in content_operations(metadata).values()] == ["b", "c"]
    assert opened(sealed(metadata, files))[1] == {"b": b"same", "c": b"other"}


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 256 * 1024, 256 * 1024 + 1, 3_000_000])
@pytest.mark.parametrize("threads", [0, 2])
def test_content_of_any_size_round_trips(size: int, threads: int) -> None:
    """Sizes around every boundary of blocks and buffers are carried, with and without worker threads."""
    files = {"first": b"x", "large": bytes(range(256)) * (size // 256) + b"y" * (size % 256), "last": b"z"}
    metadata = of(files)
    assert opened(sealed(metadata, files, threads=threads)) == (metadata, files)


def test_small_content_comes_as_one_verified_view_and_large_content_in_pieces() -> None:
    """Up to 256 KiB a consumer sees one view; beyond, several, none larger than the window."""
    files = {"small": b"s" * 256 * 1024, "large": b"l" * 5_000_000, "none": b""}
    reader = BundleReader(io.BytesIO(sealed(of(files), files)), Limits())
    counts = {operation.path: [len(view) for view in views] for operation, views, _ in reader.contents()}
    assert counts["small"] == [256 * 1024]
    assert counts["none"] == []
    assert sum(counts["large"]) == 5_000_000
    assert max(counts["large"]) <= 1 << 20


def test_content_that_nobody_reads_is_checked_all_the_same() -> None:
    """`finish` verifies what was skipped, and a consumer may leave a content half read."""
    files = {"a": b"a" * 1_000_000, "b": b"b" * 1_000_000, "c": b"c"}
    raw = sealed(of(files), files)
    reader = BundleReader(io.BytesIO(raw), Limits())
    _, views, _ = next(reader.contents())
    next(views)
    reader.finish()
    BundleReader(io.BytesIO(raw), Limits()).finish()
    lying = dict(files, b=b"B" * 1_000_000)
    with pytest.raises(Refused, match="B-55"):
        BundleReader(io.BytesIO(sealed(of(files), lying)), Limits()).finish()


def test_wrong_content_of_a_small_file_is_never_handed_out() -> None:
    """Small content is verified before the consumer sees a byte of it (B-55)."""
    metadata = of({"a": b"right"})
    reader = BundleReader(io.BytesIO(sealed(metadata, {"a": b"wrong"})), Limits())
    with pytest.raises(Refused, match="B-55"):
        next(reader.contents())


def test_a_source_that_gives_one_byte_at_a_time_is_read_as_well() -> None:
    """The frame's headers may arrive in any pieces."""

    class Trickle(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(1)

    files = {"a": b"hello", "b": bytes(10_000)}
    reader = BundleReader(Trickle(sealed(of(files), files)), Limits())
    assert reader.metadata() == of(files)
    reader.finish()


def test_the_same_input_gives_the_same_archive() -> None:
    """Nothing depends on a clock or on chance; only the compressed form may differ, by level."""
    metadata = of(FILES)
    low, high = sealed(metadata, FILES, level=1), sealed(metadata, FILES, level=19)
    unpack = zstandard.ZstdDecompressor()
    assert unpack.decompress(low) == unpack.decompress(high)
    assert len(unpack.decompress(low)) == bundle.sealed_bytes(metadata, content_operations(metadata))


def test_the_frame_declares_size_and_checksum() -> None:
    """B-2: a reader knows the size before the first byte and the checksum after the last."""
    metadata = of(FILES)
    parameters = zstandard.get_frame_parameters(sealed(metadata, FILES))
    assert parameters.has_checksum
    assert parameters.dict_id == 0
    assert parameters.content_size == bundle.sealed_bytes(metadata, content_operations(metadata))


def test_content_that_does_not_compress_comes_out_in_large_chunks() -> None:
    """A frame is handed on in pieces of at least 256 KiB, and never gathered as a whole."""
    files = {"noise": shake_256(b"noise").digest(3_000_000), "small": b"s"}
    metadata = of(files)
    chunks = list(seal(metadata, set(content_operations(metadata)), lambda operation: (files[operation.path],)))
    assert len(chunks) >= 3
    assert min(map(len, chunks[:-1])) >= 256 * 1024
    assert opened(b"".join(chunks)) == (metadata, files)


@pytest.mark.parametrize("given", [b"shor", b"longer", b"", bytes(2_000_000)])
def test_content_of_another_size_than_named_is_never_sealed(given: bytes) -> None:
    """A file that changed while it was read stops the sealing; no whole bundle comes out."""
    metadata = of({"a": b"right", "b": b"b"})
    with pytest.raises(ValueError, match=r"declared|names"):
        list(seal(metadata, set(content_operations(metadata)), lambda operation: (given,)))


@needs_gnu_tar
@pytest.mark.parametrize("level", [STORED, 1])
def test_gnu_tar_lists_and_extracts_every_name(tmp_path: Path, level: int) -> None:
    """`tar --zstd -tf` and `-xf` work on names beyond 100 and 255 bytes, Unicode, spaces and dashes."""
    file = tmp_path / "bundle.tar.zst"
    file.write_bytes(sealed(of(FILES), FILES, level=level))
    plain = {"LC_ALL": "C", "PATH": "/usr/bin:/bin:/usr/local/bin"}
    listing = ["tar", "--zstd", "--quoting-style=literal", "-tf", file]
    listed = subprocess.run(listing, check=True, capture_output=True, env=plain)
    members = ["manifest.json", "metadata/operations.json", "metadata/hashes.json"]
    assert listed.stderr == b""
    assert listed.stdout.decode().splitlines() == members + [f"files/created/{name}" for name in NAMES]
    verbose = subprocess.run(["tar", "--zstd", "-tvf", file], check=True, capture_output=True)
    assert verbose.stderr == b""
    out = tmp_path / "out"
    out.mkdir()
    extracted = subprocess.run(["tar", "-C", out, "--zstd", "-xf", file], check=True, capture_output=True, env=plain)
    assert extracted.stderr == b""
    assert {name: (out / "files/created" / name).read_bytes() for name in NAMES} == FILES


def test_a_size_beyond_eight_gibibytes_has_a_pax_record_that_others_read() -> None:
    """B-12: the size that ustar cannot hold stands in a PAX header, which stdlib tarfile understands."""
    for name in (b"model.bin", b"/".join([b"d" * 90] * 4)):
        header = tar.header(name, 5 * 2**40)
        with tarfile.open(fileobj=io.BytesIO(header)) as archive:
            member = archive.next()
        assert member is not None
        assert (member.name.encode(), member.size, member.isreg()) == (name, 5 * 2**40, True)
        assert tar.parse(header) == (name, 5 * 2**40)
        assert tar.member_bytes(name, 5 * 2**40) == len(header) + 5 * 2**40


@pytest.mark.parametrize("length", [1, 99, 100, 101, 102, 200, 255, 256, 257, 400, 4096])
@pytest.mark.parametrize("part", [7, 99, 100, 101, 155, 156, 255])
def test_every_header_is_parsed_by_us_and_by_the_standard_library(length: int, part: int) -> None:
    """Whatever the lengths of a path and of its parts, both readers find the name again."""
    name = "/".join("n" * min(part, length - at) for at in range(0, length, part + 1)).encode()
    header = tar.header(name, 12)
    assert tar.parse(header) == (name, 12)
    assert tar.member_bytes(name, 12) == len(header) + 512
    with tarfile.open(fileobj=io.BytesIO(header + bytes(512))) as archive:
        member = archive.next()
    assert member is not None
    assert member.name.encode() == name


def test_every_inverted_byte_of_a_bundle_is_refused() -> None:
    """Each byte in turn inverted: the bundle is refused."""
    files = {"a": b"some words, some more words", "b": bytes(range(200))}
    raw = sealed(of(files), files)
    assert all(refusal(raw[:at] + bytes([raw[at] ^ 0xFF]) + raw[at + 1 :]) for at in range(len(raw)))


def test_a_flipped_bit_is_refused_or_changes_nothing() -> None:
    """Each bit in turn flipped: refused, or zstd has two ways to write the same and the bundle says the same."""
    files = {"a": b"some words, some more words", "b": bytes(range(200))}
    raw = sealed(of(files), files)
    whole, accepted = opened(raw), 0
    for at in range(len(raw)):
        for bit in range(8):
            spoiled = raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :]
            try:
                assert opened(spoiled) == whole
                accepted += 1
            except (Refused, LimitExceeded):
                pass
    assert accepted < len(raw) // 10


def test_every_truncation_is_noticed() -> None:
    """A bundle cut at any byte is refused as truncated (B-4)."""
    files = {"a": b"some words", "b": bytes(range(200))}
    raw = sealed(of(files), files)
    assert {refusal(raw[:length]) for length in range(len(raw))} == {"B-4"}


def test_limits_hold_before_content_is_handed_out() -> None:
    """Each limit refuses by its own rule; at the limit the bundle passes."""
    files = {"a": b"a" * 1000, "b": b"b"}
    metadata = of(files)
    raw = sealed(metadata, files)
    size = bundle.sealed_bytes(metadata, content_operations(metadata))
    largest = max(len(metadata.operations_bytes), len(metadata.hashes_bytes))
    for limit, value, rule in (
        ("bundle_bytes", size, "B-7"),
        ("bundle_operations", 2, "B-30"),
        ("metadata_bytes", largest, "B-16"),
    ):
        assert opened(raw, Limits(**{limit: value}))[1] == files
        assert refusal(raw, Limits(**{limit: value - 1})) == rule


def test_operations_are_counted_before_they_are_decoded() -> None:
    """B-30: braces in names do not count, and no way to write JSON hides an operation."""
    files = {"{" * 20 + '"{\\': b"a", "}{": b"b"}
    metadata = of(files)
    assert opened(sealed(metadata, files), Limits(bundle_operations=2))[1] == files
    spaced = metadata.operations_bytes.replace(b'"operation":', b'"operat\\u0069on" :')
    manifest = msgspec.structs.replace(metadata.manifest, operations_digest=digest_of(spaced).hex(), total_files=0)
    with pytest.raises(LimitExceeded, match="B-30"):
        bundle.parse_metadata(msgspec.json.encode(manifest), spaced, metadata.hashes_bytes, Limits(bundle_operations=1))


def test_compressed_bytes_beyond_the_limit_are_refused() -> None:
    """B-7: a frame that hides its size in empty blocks is stopped by the count of its own bytes."""
    limits = Limits(bundle_bytes=100_000)
    empty_blocks = b"\x28\xb5\x2f\xfd\x24\x01" + b"\x00\x00\x00" * 50_000
    assert refusal(empty_blocks, limits) == "B-7"


def test_a_bomb_is_stopped_early_and_a_file_of_zeros_is_not_a_bomb() -> None:
    """B-8: zstd's full ratio is refused; a sender ends blocks early, so that zeros pass every receiver."""
    files = {"zeros": bytes(48 * 2**20)}
    metadata = of(files)
    raw = sealed(metadata, files)
    assert opened(raw, Limits(expansion_ratio=1_100))[1] == files
    bomb = zstandard.ZstdCompressor(write_checksum=True).compress(zstandard.ZstdDecompressor().decompress(raw))
    assert len(bomb) < len(raw)
    assert refusal(bomb) == "B-8"


def test_a_wider_window_than_8_mib_is_refused_whatever_the_level() -> None:
    """B-3: no level that a sender may ask for leads to a frame that a reader refuses."""
    content = bytes(9 * 2**20)
    for level in (-5, 1, 19, 22):
        frame = b"".join(compress([content], len(content), level=level))
        assert zstandard.get_frame_parameters(frame).window_size <= 8 * 2**20
    parameters = zstandard.ZstdCompressionParameters(window_log=24, write_checksum=1)
    wide = zstandard.ZstdCompressor(compression_params=parameters).compressobj(size=len(content))
    assert refusal(wide.compress(content) + wide.flush()) == "B-3"


def test_peek_and_take_see_the_same_bytes() -> None:
    """The window over a frame slides without losing a byte."""
    content = bytes(range(256)) * 20_000
    frame = FrameReader(io.BytesIO(b"".join(compress([content], len(content)))), Limits())
    taken = b""
    for size in (1, 700_000, 5, 1 << 20, 999_999):
        assert frame.peek(10) == content[len(taken) : len(taken) + 10]
        taken += bytes(frame.take(size))
    while view := frame.take_some(1 << 20):
        taken += bytes(view)
    assert taken == content
    assert frame.is_at_end()
    frame.finish()


def test_the_name_of_a_bundle_file_tells_workspace_epoch_sequence_and_identity() -> None:
    """B-57: the name is made from the manifest and can be taken apart, dashes in the workspace included."""
    metadata = composed([], workspace="my-proj-2", sequence=42)
    name = bundle.file_name(metadata)
    assert name == f"my-proj-2-01234567-00000042-{metadata.identity.hex()[:8]}.tar.zst"
    assert bundle.parse_file_name(name) == ("my-proj-2", "01234567", 42, metadata.identity.hex()[:8])
    large = composed([], sequence=2**53 - 1)
    assert (bundle.parse_file_name(bundle.file_name(large)) or name)[2] == 2**53 - 1
    for other in ("proj.tar.zst", name + ".tmp", "." + name[9:], name.upper(), ""):
        assert bundle.parse_file_name(other) is None


def test_the_header_is_the_place_in_the_sequence() -> None:
    """`decide` gets what the manifest says."""
    metadata = composed([], sequence=9)
    assert metadata.header == (
        metadata.manifest.client_id,
        metadata.manifest.epoch,
        9,
        EMPTY_ROOT,
        digest_of(metadata.manifest_bytes),
    )


def test_the_time_is_written_in_utc_and_the_folder_is_only_shown() -> None:
    """Any time zone and any folder name, even one that is not UTF-8, lead to a manifest that readers take."""
    metadata = composed([], workspace_path="/home/\udcff\n" + "x" * 5000)
    assert metadata.manifest.created_at == "2026-11-21T09:00:00.123Z"
    assert metadata.manifest.workspace_path.startswith("/home/\\xff\\n")
    assert opened(sealed(metadata, {}))[0] == metadata


def test_stored_members_are_parsed_like_received_ones() -> None:
    """An outbox keeps the three members; they parse to the metadata that was composed."""
    metadata = of(FILES)
    stored = (metadata.manifest_bytes, metadata.operations_bytes, metadata.hashes_bytes)
    assert bundle.parse_metadata(*stored, Limits()) == metadata


def test_operations_with_every_allowed_shape_pass() -> None:
    """The table of B-32 as values: each row is accepted."""
    digest = "12" * 32
    rows = [
        {"operation": "created", "kind": "file", "path": "a", "digest": digest, "size": 1, "executable": True},
        {"operation": "created", "kind": "symlink", "path": "b", "target": "a"},
        {"operation": "created", "kind": "directory", "path": "c"},
        {"operation": "updated", "kind": "file", "path": "d", "base": digest, "digest": digest, "size": 1},
        {"operation": "updated", "kind": "symlink", "path": "e", "target": "a"},
        {"operation": "moved", "kind": "file", "path": "f", "source_path": "g", "base": digest, "digest": "34" * 32},
        {"operation": "moved", "kind": "directory", "path": "h", "source_path": "i", "base": digest},
        {"operation": "deleted", "kind": "file", "path": "j", "base": digest},
        {"operation": "deleted", "kind": "symlink", "path": "k"},
        {"operation": "deleted", "kind": "directory", "path": "a"},
    ]
    operations = msgspec.convert(rows, list[Operation])
    check_operations(operations)
    metadata = composed(operations, created_at=datetime(2026, 1, 1, tzinfo=UTC))
    assert opened(sealed(metadata, {}, []))[0].operations == operations
