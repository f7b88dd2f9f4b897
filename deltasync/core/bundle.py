"""Bundles: sealed from metadata and content, and read strictly in one pass (spec/1-bundle.md)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator

from deltasync.core import tar
from deltasync.core.errors import LimitExceeded, Refused
from deltasync.core.frame import FrameReader, Source, compress
from deltasync.core.hashing import digest_of, hasher
from deltasync.core.manifest import Operation
from deltasync.core.metadata import (
    MANIFEST_BYTES_MAX,
    FileName,
    Manifest,
    Metadata,
    compose,
    content_operations,
    file_name,
    parse_file_name,
    parse_metadata,
)
from deltasync.core.wire import Limits

__all__ = [
    "METADATA_MEMBERS",
    "BundleReader",
    "FileName",
    "Manifest",
    "Metadata",
    "Read",
    "Source",
    "compose",
    "content_operations",
    "file_name",
    "parse_file_name",
    "parse_metadata",
    "seal",
    "sealed_bytes",
]

METADATA_MEMBERS = (b"manifest.json", b"metadata/operations.json", b"metadata/hashes.json")
_SMALL_BYTES = 256 * 1024
"""Content up to this size is verified before it is handed out, and comes as one view."""

Read = Callable[[Operation], Iterable[bytes | memoryview]]
"""Gives the content that an operation names, in pieces; each is used up before the next is asked for."""


def seal(
    metadata: Metadata, digests: Collection[str], read: Read, *, level: int = 1, threads: int = 0
) -> Iterator[bytes]:
    """Yield the bundle file that carries the content of those digests: all, or what the receiver lacks (spec B-56).

    read: must give exactly the content that the operation's digest names; only its size is checked here (ValueError).
    threads: zstd's own worker threads; 0 compresses in the calling thread.
    """
    carried = [operation for digest, operation in content_operations(metadata).items() if digest in digests]
    pieces = _pieces(metadata, carried, read)
    return compress(pieces, _archive_bytes(metadata, carried), level=level, threads=threads)


def sealed_bytes(metadata: Metadata, digests: Collection[str]) -> int:
    """Return how many bytes the bundle has before compression."""
    contents = content_operations(metadata)
    return _archive_bytes(metadata, [operation for digest, operation in contents.items() if digest in digests])


def _members(metadata: Metadata) -> Iterator[tuple[bytes, bytes]]:
    return zip(
        METADATA_MEMBERS, (metadata.manifest_bytes, metadata.operations_bytes, metadata.hashes_bytes), strict=True
    )


def _archive_bytes(metadata: Metadata, carried: Iterable[Operation]) -> int:
    members = sum(tar.member_bytes(name, len(content)) for name, content in _members(metadata))
    return members + sum(tar.member_bytes(_name(each), each.size) for each in carried) + len(tar.END)


def _name(operation: Operation) -> bytes:
    return ("files/" + operation.operation + "/" + operation.path).encode()


def _pieces(metadata: Metadata, carried: Iterable[Operation], read: Read) -> Iterator[bytes | memoryview]:
    for name, content in _members(metadata):
        yield tar.header(name, len(content))
        yield content
        yield tar.padding(len(content))
    for operation in carried:
        yield tar.header(_name(operation), operation.size)
        left = operation.size
        for piece in read(operation):
            left -= len(piece)
            yield piece
        if left:
            raise ValueError(f"the content of {operation.path!r} is not of the {operation.size} bytes that it names")
        yield tar.padding(operation.size)
    yield tar.END


class BundleReader:
    """Reads one bundle from a stream: metadata, then content, then the end; nothing is trusted before it is checked.

    Every method raises Refused or LimitExceeded, with the number of the rule, for a bundle that breaks one.
    """

    def __init__(self, source: Source, limits: Limits) -> None:
        """Read nothing yet. source: `read(n)` gives at most n bytes, and b'' at its end."""
        self._frame = FrameReader(source, limits)
        self._limits = limits
        self._metadata: Metadata | None = None
        self._contents = self._read_contents()

    def metadata(self) -> Metadata:
        """Return what the bundle says of itself, read when first asked for."""
        if self._metadata is None:
            manifest, operations, hashes = (self._read_member(name) for name in METADATA_MEMBERS)
            self._metadata = parse_metadata(manifest, operations, hashes, self._limits)
        return self._metadata

    def contents(self) -> Iterator[tuple[Operation, Iterator[memoryview]]]:
        """Yield each content that the bundle carries, once, with the operation that it travels under.

        Its bytes come as views that are valid until the next step. Content up to 256 KiB is verified before it is
        handed out and comes as one view (none when empty); of larger content the last step verifies the whole.
        """
        return self._contents

    def finish(self) -> None:
        """Check what was not read yet, and that the archive, the frame and the source end here."""
        for _, views in self._contents:
            for _ in views:
                pass
        if not self._frame.starts_with(tar.END):
            raise Refused("B-14", "the archive does not end with two blocks of zeros")
        self._frame.skip(len(tar.END))
        if not self._frame.is_at_end():
            raise Refused("B-14", "the archive goes on behind its end mark")
        self._frame.finish()

    def _read_member(self, name: bytes) -> bytes:
        found = tar.parse(self._peek_header())
        if found.name != name:
            raise Refused("B-15", f"the archive has {found.name!r} where {name.decode()} belongs")
        limit = MANIFEST_BYTES_MAX if name == METADATA_MEMBERS[0] else self._limits.metadata_bytes
        if found.size > limit:
            raise LimitExceeded("B-16", f"{name.decode()} has {found.size} bytes", limit=limit)
        self._frame.skip(len(tar.header(*found)))
        content = b"".join(bytes(view) for view in self._read_views(found.size))
        self._skip_padding(found.size)
        return content

    def _peek_header(self) -> bytes:
        ahead = self._frame.peek(tar.HEADER_BYTES_MAX)
        if ahead.startswith(tar.END[: tar.BLOCK]):
            raise Refused("B-15", "the archive ends before its three metadata members")
        return ahead

    def _read_views(self, size: int) -> Iterator[memoryview]:
        while size:
            view = self._frame.take_some(size)
            if not view:
                raise Refused("B-9", "the archive is truncated")
            size -= len(view)
            yield view

    def _skip_padding(self, size: int) -> None:
        padding = tar.padding(size)
        if not self._frame.starts_with(padding):
            self._refuse_unless_whole(len(padding))
            raise Refused("B-13", "the padding behind a member is not zeros")
        self._frame.skip(len(padding))

    def _refuse_unless_whole(self, size: int) -> None:
        if len(self._frame.peek(size)) < size:
            raise Refused("B-9", "the archive is truncated")

    def _read_contents(self) -> Iterator[tuple[Operation, Iterator[memoryview]]]:
        frame = self._frame
        end = tar.END[: tar.BLOCK]
        contents = content_operations(self.metadata())
        for operation in contents.values():
            header = tar.header(_name(operation), operation.size)
            if not frame.starts_with(header):
                if frame.starts_with(end):
                    return
                continue  # this content is not carried: the next one may be (spec B-53)
            frame.skip(len(header))
            views = self._verified_view(operation) if operation.size <= _SMALL_BYTES else self._verified(operation)
            yield operation, views
            for _ in views:
                pass
        if not frame.starts_with(end):
            raise self._why_not(contents)

    def _verified_view(self, operation: Operation) -> Iterator[memoryview]:
        size = operation.size
        view = self._frame.take(size + -size % tar.BLOCK)
        if len(view) < size + -size % tar.BLOCK:
            raise Refused("B-9", "the archive is truncated")
        content = view[:size]
        if view[size:] != tar.padding(size):
            raise Refused("B-13", "the padding behind a member is not zeros")
        _check_digest(operation, digest_of(content))
        return iter((content,) if size else ())

    def _verified(self, operation: Operation) -> Iterator[memoryview]:
        hashed = hasher()
        for view in self._read_views(operation.size):
            hashed.update(view)
            yield view
        self._skip_padding(operation.size)
        _check_digest(operation, hashed.digest())

    def _why_not(self, contents: dict[str, Operation]) -> Refused:
        """Say why the member that comes next is none of those that may come (spec B-9 to B-12, B-50 to B-54)."""
        member = tar.parse(self._frame.peek(tar.HEADER_BYTES_MAX))
        name = member.name
        operations = {each.path.encode(): each for each in self.metadata().operations if each.digest is not None}
        folder, _, path = name.removeprefix(b"files/").partition(b"/")
        operation = operations.get(path)
        if operation is None or not name.startswith(b"files/"):
            return Refused("B-50", f"no operation names the content of {name!r}")
        if folder != operation.operation.encode():
            return Refused("B-51", f"{name!r} is in the folder of another operation")
        if member.size != operation.size:
            return Refused("B-54", f"{name!r} has {member.size} bytes where its operation names {operation.size}")
        if contents[operation.digest or ""] is not operation:
            return Refused("B-52", f"the content of {name!r} travels under an earlier operation")
        return Refused("B-53", f"{name!r} comes twice or is out of order")


def _check_digest(operation: Operation, found: bytes) -> None:
    if found.hex() != operation.digest:
        raise Refused("B-55", f"the content of {operation.path!r} is not of its digest", path=operation.path)
