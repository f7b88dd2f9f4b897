"""Entries, directory objects and operations: the values that a tree and a delta are made of."""

from __future__ import annotations

import enum
from collections.abc import Sequence

import msgspec

from deltasync.core.errors import Refused
from deltasync.core.hashing import DIGEST_BYTES, directory_digest
from deltasync.core.names import NameRefused, parse_name, parse_target

MTIME_MIN, MTIME_MAX = -(2**63), 2**63 - 1
SIZE_MAX = 2**63 - 1


class Kind(enum.StrEnum):
    """What an entry is."""

    FILE = "file"
    SYMLINK = "symlink"
    DIRECTORY = "directory"


class Verb(enum.StrEnum):
    """What an operation does to a path."""

    CREATED = "created"
    UPDATED = "updated"
    MOVED = "moved"
    DELETED = "deleted"


class Entry(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One name in a directory.

    digest: 32 bytes, of the content (file) or of the directory object (directory); b'' for a symlink.
    size in bytes, mtime_ns and executable are zero for anything but a file; target is '' for anything but a symlink.
    """

    name: str
    kind: Kind
    size: int = 0
    mtime_ns: int = 0
    executable: bool = False
    digest: bytes = b""
    target: str = ""


class Operation(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True, gc=False, kw_only=True):
    """One change of one path, or of one whole directory for moved and deleted (spec B-31 to B-44).

    `source_path` and `base` refer to the tree before the bundle, `path` to the tree after it.
    Digests are 64 lower-case hex. `base` is the digest before: of the path (updated, deleted file) or of the source
    (moved); for a moved directory it is the digest of the directory object.
    """

    operation: Verb
    kind: Kind
    path: str
    source_path: str | None = None
    base: str | None = None
    digest: str | None = None
    size: int = 0
    executable: bool = False
    mtime_ns: int = 0
    target: str | None = None
    recipe: str | None = None


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[Entry])


def encode_directory(entries: Sequence[Entry]) -> bytes:
    """Return the body of a directory object; entries must be sorted by name (spec T-2)."""
    return _encoder.encode(entries)


def decode_directory(body: bytes) -> list[Entry]:
    """Return the entries of a body that this side wrote itself; raises msgspec.MsgspecError for any other."""
    try:
        return _decoder.decode(body)
    except UnicodeDecodeError as error:  # msgspec lets it through as it is
        raise msgspec.DecodeError(f"a text is not UTF-8: {error}") from error


def parse_directory(body: bytes, expected: bytes) -> list[Entry]:
    """Return the entries of a body that came from elsewhere: canonical, sorted, safe and of the expected digest.

    Raises Refused with rule T-1 to T-6.
    """
    if directory_digest(body) != expected:
        raise Refused("T-3", "a directory object does not have the digest that names it")
    try:
        entries = decode_directory(body)
    except msgspec.MsgspecError as error:
        raise Refused("T-2", f"a directory object is malformed: {error}") from error
    if encode_directory(entries) != body:
        raise Refused("T-2", "a directory object is not in canonical form")
    before = ""
    for entry in entries:
        check_entry(entry)
        if entry.name <= before:
            raise Refused("T-4", "a directory object is not sorted or repeats a name")
        before = entry.name
    return entries


def check_entry(entry: Entry) -> None:
    """Raise Refused unless an entry's fields fit its kind (spec T-5, T-6)."""
    try:
        parse_name(entry.name)
        if entry.kind is Kind.SYMLINK:
            parse_target("d/" * 100 + entry.name, entry.target)
    except NameRefused as error:
        raise Refused("T-6", f"{entry.name!r}: {error}") from error
    fits = {
        Kind.FILE: len(entry.digest) == DIGEST_BYTES and not entry.target and 0 <= entry.size <= SIZE_MAX,
        Kind.SYMLINK: not (entry.digest or entry.size or entry.mtime_ns or entry.executable) and bool(entry.target),
        Kind.DIRECTORY: len(entry.digest) == DIGEST_BYTES
        and not (entry.size or entry.mtime_ns or entry.executable or entry.target),
    }[entry.kind]
    if not fits or not MTIME_MIN <= entry.mtime_ns <= MTIME_MAX:
        raise Refused("T-5", f"{entry.name!r}: the fields do not fit a {entry.kind}")


EMPTY_BODY = encode_directory([])
EMPTY_ROOT = directory_digest(EMPTY_BODY)
"""The root of a tree without entries, and the parent root of every workspace's first bundle."""
