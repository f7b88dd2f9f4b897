"""The metadata members of a bundle: composed by the sender, parsed strictly by everyone else (spec B-20 to B-38)."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple, TypeVar

import msgspec

from deltasync.core import part, recipe
from deltasync.core.errors import LimitExceeded, Refused
from deltasync.core.hashing import digest_of
from deltasync.core.manifest import MTIME_MAX, MTIME_MIN, SIZE_MAX, Operation, Verb
from deltasync.core.names import NameRefused, parse_path, parse_target, parse_workspace, shown
from deltasync.core.sequence import Header
from deltasync.core.wire import Limits

VERSION = "2.0"
FEATURES: frozenset[str] = frozenset((recipe.FEATURE, part.FEATURE))
"""What a bundle may require of a reader of this release."""
SEQUENCE_MAX = 2**53 - 1
MANIFEST_BYTES_MAX = 64 * 1024
WORKSPACE_PATH_MAX = 4096


class Counts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How many operations of each verb a bundle has."""

    created: int
    updated: int
    moved: int
    deleted: int


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """manifest.json; the order of the fields is the order in the file."""

    version: str
    bundle_id: str
    workspace_path: str
    """Where the sender has the folder: informative, never used to build a path."""
    collection_name: str
    """The workspace's name: informative as well."""
    created_at: str
    sequence_number: int
    parent_sequence: int
    operations: Counts
    total_files: int
    """The number of operations."""
    total_size_bytes: int
    """The sum of `size` over all operations."""
    compression: str
    encoding: str
    epoch: str
    parent_root: str
    root: str
    client_id: str
    hash: str
    requires: list[str]
    operations_digest: str
    hashes_digest: str


class _Preamble(msgspec.Struct):
    """What is read of any manifest, to say which release it needs."""

    version: str = ""
    requires: list[str] = []


class _Operations(msgspec.Struct, forbid_unknown_fields=True):
    """metadata/operations.json."""

    operations: list[Operation]


class _Hashes(msgspec.Struct):
    """metadata/hashes.json."""

    algorithm: str
    files: dict[str, str]


# Made here and not when the first bundle comes: see deltasync.decoding.
_preambles = msgspec.json.Decoder(_Preamble)
_manifests = msgspec.json.Decoder(Manifest)
_operations = msgspec.json.Decoder(_Operations)


@dataclass(frozen=True, slots=True)
class Metadata:
    """Everything that a bundle says apart from content; thin and full bundles of one delta share it."""

    manifest: Manifest
    identity: bytes
    """BLAKE3 of the bytes of manifest.json, which names the digests of the other two members (spec B-26)."""
    operations: list[Operation]
    manifest_bytes: bytes
    operations_bytes: bytes
    hashes_bytes: bytes

    @property
    def header(self) -> Header:
        """The bundle's place in the sequence."""
        manifest = self.manifest
        return Header(
            manifest.client_id,
            manifest.epoch,
            manifest.sequence_number,
            bytes.fromhex(manifest.parent_root),
            self.identity,
        )


def compose(
    operations: Sequence[Operation],
    *,
    workspace: str,
    workspace_path: str,
    epoch: str,
    sequence: int,
    parent_root: bytes,
    root: bytes,
    client_id: str,
    bundle_id: str,
    created_at: datetime,
    requires: Sequence[str] = (),
) -> Metadata:
    """Return the metadata of a new bundle; the operations are trusted to keep the rules, as `diff` writes them.

    workspace_path: text for people; what cannot be shown of it is escaped. created_at: with its time zone.
    """
    operations = list(operations)
    operations_bytes = msgspec.json.encode(_Operations(operations))
    hashes_bytes = _encode_hashes(operations)
    manifest = Manifest(
        version=VERSION,
        bundle_id=bundle_id,
        workspace_path=shown(workspace_path)[:WORKSPACE_PATH_MAX],
        collection_name=workspace,
        created_at=created_at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        sequence_number=sequence,
        parent_sequence=sequence - 1,
        operations=_count(operations),
        total_files=len(operations),
        total_size_bytes=sum(operation.size for operation in operations),
        compression="zstd",
        encoding="utf-8",
        epoch=epoch,
        parent_root=parent_root.hex(),
        root=root.hex(),
        client_id=client_id,
        hash="blake3",
        requires=list(requires),
        operations_digest=digest_of(operations_bytes).hex(),
        hashes_digest=digest_of(hashes_bytes).hex(),
    )
    manifest_bytes = msgspec.json.encode(manifest)
    identity = digest_of(manifest_bytes)
    return Metadata(manifest, identity, operations, manifest_bytes, operations_bytes, hashes_bytes)


def parse_metadata(manifest_bytes: bytes, operations_bytes: bytes, hashes_bytes: bytes, limits: Limits) -> Metadata:
    """Return the metadata that three members hold, received or stored.

    Raises Refused B-20 to B-38, and LimitExceeded B-30.
    """
    manifest = parse_manifest(manifest_bytes)
    if digest_of(operations_bytes).hex() != manifest.operations_digest:
        raise Refused("B-26", "metadata/operations.json is not the one that the manifest names")
    if digest_of(hashes_bytes).hex() != manifest.hashes_digest:
        raise Refused("B-26", "metadata/hashes.json is not the one that the manifest names")
    count = max(_count_objects(operations_bytes, limits.bundle_operations), manifest.total_files)
    if count > limits.bundle_operations:
        raise LimitExceeded("B-30", f"the bundle has {count} operations", limit=limits.bundle_operations)
    operations = _decode(operations_bytes, _operations, "B-27", "metadata/operations.json").operations
    total_bytes = sum(operation.size for operation in operations)
    stated = (manifest.operations, manifest.total_files, manifest.total_size_bytes)
    if stated != (_count(operations), len(operations), total_bytes):
        raise Refused("B-28", "the manifest's counts and totals are not those of the operations")
    check_operations(operations)
    if hashes_bytes != _encode_hashes(operations):
        raise Refused("B-29", "metadata/hashes.json does not say what the operations say")
    identity = digest_of(manifest_bytes)
    return Metadata(manifest, identity, operations, manifest_bytes, operations_bytes, hashes_bytes)


def content_operations(metadata: Metadata) -> dict[str, Operation]:
    """Return each digest that a bundle names with the first operation that names it, in the order of members.

    The content of a digest travels at most once, under that operation's name (spec B-52).
    """
    first: dict[str, Operation] = {}
    for operation in metadata.operations:
        if operation.digest is not None:
            first.setdefault(operation.digest, operation)
    return first


def naming(metadata: Metadata, digests: Collection[str]) -> str:
    """Say which files of a bundle have these contents: the first by its path, the others by their number."""
    paths = [each.path for digest, each in content_operations(metadata).items() if digest in digests]
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return f"{shown(paths[0])}{more}" if paths else f"{len(digests)} file(s)"


_HEX_64 = re.compile(r"[0-9a-f]{64}")
_FORMS = {
    "bundle_id": re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"),
    "created_at": re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{3}Z"),
    "workspace_path": re.compile(rf"[^\x00-\x1f\x7f-\x9f]{{0,{WORKSPACE_PATH_MAX}}}"),
    "epoch": re.compile(r"[0-9a-f]{32}"),
    "client_id": re.compile(r"[0-9a-f-]{16,64}"),
    "parent_root": _HEX_64,
    "root": _HEX_64,
    "operations_digest": _HEX_64,
    "hashes_digest": _HEX_64,
}


def parse_manifest(manifest_bytes: bytes) -> Manifest:
    """Return the manifest that these bytes hold, or raise Refused B-20 to B-25."""
    try:
        preamble = _preambles.decode(manifest_bytes)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise Refused("B-20", f"manifest.json is malformed: {error}") from error
    if preamble.version != VERSION:
        raise Refused("B-21", f"the bundle is of version {preamble.version!r}, this release reads {VERSION}")
    unknown = sorted(set(preamble.requires) - FEATURES)
    if unknown:
        raise Refused("B-22", f"the bundle requires {', '.join(map(shown, unknown))}; use a newer release")
    manifest = _decode(manifest_bytes, _manifests, "B-20", "manifest.json")
    if (manifest.compression, manifest.encoding, manifest.hash) != ("zstd", "utf-8", "blake3"):
        raise Refused("B-23", "compression, encoding or hash is none of this version")
    for field, form in _FORMS.items():
        if not form.fullmatch(getattr(manifest, field)):
            raise Refused("B-24", f"the manifest's {field} is malformed")
    try:
        parse_workspace(manifest.collection_name)
        datetime.fromisoformat(manifest.created_at)
    except ValueError as error:
        raise Refused("B-24", f"the manifest's collection_name or created_at is malformed: {error}") from error
    if not 1 <= manifest.sequence_number <= SEQUENCE_MAX or manifest.parent_sequence != manifest.sequence_number - 1:
        raise Refused("B-25", f"sequence {manifest.sequence_number} does not follow {manifest.parent_sequence}")
    return manifest


_T = TypeVar("_T")


def _decode(content: bytes, decoder: msgspec.json.Decoder[_T], rule: str, member: str) -> _T:
    """Decode JSON that must be in canonical form: writing it again gives the same bytes, so no key can be doubled."""
    try:
        value = decoder.decode(content)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise Refused(rule, f"{member} is malformed: {error}") from error
    if msgspec.json.encode(value) != content:
        raise Refused(rule, f"{member} is not in canonical form")
    return value


_NO_MARKS = bytes(set(range(256)) - set(b'"{'))


def _count_objects(operations_bytes: bytes, limit: int) -> int:
    """Return a number that is beyond the limit if the number of operations is, without decoding them (spec B-30)."""
    count = operations_bytes.count(b"{") - 1  # each operation opens one, and the object around them
    if count <= limit:
        return count
    # Names may hold braces too. Without escapes, all other characters, and pairs of quotes (which move no brace in or
    # out of a text), every run between texts has a brace: looking at a few runs is enough.
    plain = operations_bytes.replace(b"\\\\", b"").replace(b'\\"', b"")
    runs = plain.translate(None, _NO_MARKS).replace(b'""', b"").split(b'"', 2 * limit + 8)
    return sum(run.count(b"{") for run in runs[::2]) - 1


def _count(operations: Iterable[Operation]) -> Counts:
    counts = dict.fromkeys(Verb, 0)
    for operation in operations:
        counts[operation.operation] += 1
    return Counts(**{verb.value: count for verb, count in counts.items()})


def _encode_hashes(operations: Iterable[Operation]) -> bytes:
    """Write hashes.json; a path that is both deleted and placed has its new digest (spec B-29)."""
    files: dict[str, str] = {}
    for operation in operations:
        if operation.digest is not None:
            files[operation.path] = operation.digest
        elif operation.operation is Verb.DELETED and operation.base is not None:
            files.setdefault(operation.path, operation.base)
    return msgspec.json.encode(_Hashes("blake3", files))


class _Shape(NamedTuple):
    """Which of an operation's optional fields are there."""

    source_path: bool = False
    base: bool = False
    digest: bool = False
    target: bool = False


_SHAPES: dict[str, _Shape] = {
    "created file": _Shape(digest=True),
    "created symlink": _Shape(target=True),
    "created directory": _Shape(),
    "updated file": _Shape(base=True, digest=True),
    "updated symlink": _Shape(target=True),
    "moved file": _Shape(source_path=True, base=True, digest=True),
    "moved directory": _Shape(source_path=True, base=True),
    "deleted file": _Shape(base=True),
    "deleted symlink": _Shape(),
    "deleted directory": _Shape(),
}


def check_operations(operations: Iterable[Operation]) -> None:
    """Raise Refused B-31 to B-38 unless operations are well formed, each alone and all together."""
    placed: set[str] = set()
    deleted: set[str] = set()
    sources: set[str] = set()
    sizes: dict[str, int] = {}
    for operation in operations:
        path, digest = operation.path, operation.digest
        _check_fields(operation)
        taken = deleted if operation.operation is Verb.DELETED else placed
        if path in taken:
            raise Refused("B-36", f"{path!r} is the path of two operations", path=path)
        taken.add(path)
        source = operation.source_path
        if source is not None:
            if source == path or source in sources:
                raise Refused("B-37", f"{source!r} is moved twice or onto itself", path=path)
            sources.add(source)
        if digest is not None and sizes.setdefault(digest, operation.size) != operation.size:
            raise Refused("B-38", f"{digest} has two sizes", path=path)


def _check_fields(operation: Operation) -> None:
    """Check one operation alone (spec B-31 to B-35)."""
    path, source, target = operation.path, operation.source_path, operation.target
    base, digest = operation.base, operation.digest
    _check_path(path)
    if source is not None:
        _check_path(source)
    shape = (source is not None, base is not None, digest is not None, target is not None)
    if _SHAPES.get(operation.operation + " " + operation.kind) != shape or operation.recipe is not None:
        raise Refused("B-32", f"{path!r}: {operation.operation} {operation.kind} has other fields", path=path)
    if (base is not None and not _HEX_64.fullmatch(base)) or (digest is not None and not _HEX_64.fullmatch(digest)):
        raise Refused("B-33", f"{path!r}: a digest is not 64 lower-case hex digits", path=path)
    if digest is None:
        if operation.size or operation.mtime_ns or operation.executable:
            raise Refused("B-32", f"{path!r}: size, mtime_ns and executable are of files alone", path=path)
    elif not (0 <= operation.size <= SIZE_MAX and MTIME_MIN <= operation.mtime_ns <= MTIME_MAX):
        raise Refused("B-34", f"{path!r}: size or mtime_ns is out of range", path=path)
    if target is not None:
        try:
            parse_target(path, target)
        except NameRefused as error:
            raise Refused("B-35", f"{path!r}: {error}", path=path) from error


def _check_path(path: str) -> None:
    try:
        parse_path(path)
    except NameRefused as error:
        raise Refused("B-31", f"{shown(path[:200])}: {error}") from error


class FileName(NamedTuple):
    """What the name of a bundle file tells: enough to list a folder, never trusted beyond that."""

    workspace: str
    epoch_start: str
    sequence: int
    identity_start: str


_FILE_NAME = re.compile(r"([^.].*)-([0-9a-f]{8})-([0-9]{8,16})-([0-9a-f]{8})\.tar\.zst", re.DOTALL)


def file_name(metadata: Metadata) -> str:
    """Return the name of a bundle's file (spec B-57)."""
    manifest = metadata.manifest
    start, identity = manifest.epoch[:8], metadata.identity.hex()[:8]
    return f"{manifest.collection_name}-{start}-{manifest.sequence_number:08d}-{identity}.tar.zst"


def parse_file_name(name: str) -> FileName | None:
    """Return what a bundle file's name tells, or None for any other file."""
    found = _FILE_NAME.fullmatch(name)
    return FileName(found[1], found[2], int(found[3]), found[4]) if found else None
