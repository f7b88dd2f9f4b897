"""Bundles: sealed from metadata and content, and read strictly in one pass (spec/1-bundle.md)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from typing import NamedTuple

from deltasync.core import part, recipe, tar
from deltasync.core.errors import DeltasyncError, LimitExceeded, Refused
from deltasync.core.frame import STORED, FrameReader, Source, compress, store
from deltasync.core.hashing import DIGEST_BYTES, digest_of, hasher
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
from deltasync.core.names import shown
from deltasync.core.part import Part
from deltasync.core.recipe import FEATURE, RECIPE_BYTES_MAX, Recipe
from deltasync.core.wire import Limits

__all__ = [
    "METADATA_MEMBERS",
    "BundleReader",
    "Content",
    "FileName",
    "Manifest",
    "Metadata",
    "Read",
    "Source",
    "advice",
    "compose",
    "content_operations",
    "file_name",
    "name_file",
    "parse_file_name",
    "parse_metadata",
    "seal",
    "sealed_bytes",
]

METADATA_MEMBERS = (b"manifest.json", b"metadata/operations.json", b"metadata/hashes.json")
_SMALL_BYTES = 256 * 1024
"""Content up to this size is verified before it is handed out, and comes as one view."""
_DAMAGED = frozenset({"B-1", "B-2", "B-4", "B-5", "B-6", "B-9"})
"""Rules that a file breaks when it was cut short, or its bytes changed, on the way."""

Read = Callable[[Operation], Iterable[bytes | memoryview]]
"""Gives the content that an operation names, or the new bytes of its recipe, in pieces; each is used up before the
next is asked for."""
_WHOLE: Mapping[str, Recipe] = {}


def seal(
    metadata: Metadata,
    digests: Collection[str],
    read: Read,
    *,
    recipes: Mapping[str, Recipe] = _WHOLE,
    level: int = 1,
    threads: int = 0,
) -> Iterator[bytes]:
    """Yield the bundle file that carries the content of those digests: all, or what the receiver lacks (spec B-56).

    read: must give exactly the content that the operation's digest names; only its size is checked here (ValueError).
    recipes: by digest, for content that does not travel whole. level: of zstd, or STORED. threads: zstd's own worker
    threads; 0 compresses in the calling thread.
    """
    carried = _carried(metadata, digests, recipes)
    return _framed(_pieces(metadata, carried, read), _archive_bytes(metadata, carried), level=level, threads=threads)


def _framed(pieces: Iterable[bytes | memoryview], size_bytes: int, *, level: int, threads: int) -> Iterator[bytes]:
    return store(pieces, size_bytes) if level == STORED else compress(pieces, size_bytes, level=level, threads=threads)


ReadPart = Callable[[Part], Generator[bytes | memoryview, None, bytes]]
"""Gives the bytes of a part in pieces, as `Read` does, and returns the digest of its stream up to its end."""


def seal_part(
    metadata: Metadata, carried: Part, read: ReadPart, *, level: int = 1, threads: int = 0
) -> Iterator[bytes]:
    """Yield the bundle file that carries one part (spec B-65); as `seal`. The metadata has no operations."""
    size = _archive_bytes(metadata, []) + tar.member_bytes(carried.name, carried.member_size)
    return _framed(_part_pieces(metadata, carried, read), size, level=level, threads=threads)


def _part_pieces(metadata: Metadata, carried: Part, read: ReadPart) -> Iterator[bytes | memoryview]:
    for name, content in _members(metadata):
        yield from _member(name, content)
    yield tar.header(carried.name, carried.member_size)
    if carried.size:
        yield (yield from read(carried))
    yield tar.padding(carried.member_size)
    yield tar.END


def sealed_bytes(metadata: Metadata, digests: Collection[str], recipes: Mapping[str, Recipe] = _WHOLE) -> int:
    """Return how many bytes the bundle has before compression."""
    return _archive_bytes(metadata, _carried(metadata, digests, recipes))


_Carried = list[tuple[Operation, Recipe | None]]


def _carried(metadata: Metadata, digests: Collection[str], recipes: Mapping[str, Recipe]) -> _Carried:
    contents = content_operations(metadata)
    return [(operation, recipes.get(digest)) for digest, operation in contents.items() if digest in digests]


def _members(metadata: Metadata) -> Iterator[tuple[bytes, bytes]]:
    return zip(
        METADATA_MEMBERS, (metadata.manifest_bytes, metadata.operations_bytes, metadata.hashes_bytes), strict=True
    )


def _archive_bytes(metadata: Metadata, carried: _Carried) -> int:
    members = sum(tar.member_bytes(name, len(content)) for name, content in _members(metadata))
    for operation, made in carried:
        if made is None:
            members += tar.member_bytes(_name(operation), operation.size)
        else:
            members += tar.member_bytes(_recipe_name(operation), len(made.encoded()))
            members += tar.member_bytes(_chunks_name(operation), made.new_bytes + DIGEST_BYTES)
    return members + len(tar.END)


def _name(operation: Operation) -> bytes:
    return ("files/" + operation.operation + "/" + operation.path).encode()


def _recipe_name(operation: Operation) -> bytes:
    return b"metadata/recipes/" + (operation.digest or "").encode()


def _chunks_name(operation: Operation) -> bytes:
    return b"chunks/" + (operation.digest or "").encode()


def _pieces(metadata: Metadata, carried: _Carried, read: Read) -> Iterator[bytes | memoryview]:
    for name, content in _members(metadata):
        yield from _member(name, content)
    for operation, made in carried:
        if made is None:
            yield tar.header(_name(operation), operation.size)
            yield from _exactly(read(operation), operation, operation.size)
            yield tar.padding(operation.size)
            continue
        yield from _member(_recipe_name(operation), made.encoded())
        size, hashed = made.new_bytes + DIGEST_BYTES, hasher()
        yield tar.header(_chunks_name(operation), size)
        for piece in _exactly(read(operation), operation, made.new_bytes):
            hashed.update(piece)
            yield piece
        yield hashed.digest()
        yield tar.padding(size)
    yield tar.END


def _member(name: bytes, content: bytes) -> Iterator[bytes]:
    yield tar.header(name, len(content))
    yield content
    yield tar.padding(len(content))


def _exactly(pieces: Iterable[bytes | memoryview], operation: Operation, size: int) -> Iterator[bytes | memoryview]:
    left = size
    for piece in pieces:
        left -= len(piece)
        yield piece
    if left:
        raise ValueError(f"the content of {operation.path!r} is not of the {size} bytes that it names")


class Content(NamedTuple):
    """One content that a bundle carries."""

    operation: Operation
    """What it travels under."""
    views: Iterator[memoryview]
    """Its bytes, or the new bytes of its recipe; each view is valid until the next step."""
    recipe: Recipe | None
    """How it is made of what the receiver holds and of the new bytes; None when it travels whole."""


class ArrivingPart(NamedTuple):
    """A part on its way in."""

    part: Part
    views: Iterator[memoryview]
    """Its bytes; each view is valid until the next step."""
    read_digest: Callable[[], bytes]
    """Gives the digest that its stream must have up to its end (spec B-66), once the views are used up."""


class BundleReader:
    """Reads one bundle from a stream: metadata, then content, then the end; nothing is trusted before it is checked.

    Every method raises Refused or LimitExceeded, with the number of the rule, for a bundle that breaks one.
    """

    def __init__(self, source: Source, limits: Limits) -> None:
        """Read nothing yet. source: `read(n)` gives at most n bytes, and b'' at its end."""
        self._frame = FrameReader(source, limits)
        self._limits = limits
        self._metadata: Metadata | None = None
        self._has_given_part = False
        self._zero_bytes = 0
        """What recipes made of nothing so far: their reader hashes all of it."""
        self._contents = self._read_contents()

    def metadata(self) -> Metadata:
        """Return what the bundle says of itself, read when first asked for."""
        if self._metadata is None:
            manifest, operations, hashes = (self._read_member(name) for name in METADATA_MEMBERS)
            self._metadata = parse_metadata(manifest, operations, hashes, self._limits)
        return self._metadata

    def contents(self) -> Iterator[Content]:
        """Yield each content that the bundle carries, once.

        Content up to 256 KiB is verified before it is handed out and comes as one view (none when empty); of larger
        content, and of new bytes, the last step verifies the whole. What is made by a recipe must be verified by the
        one who makes it (spec B-64).
        """
        return self._contents

    def part(self) -> ArrivingPart | None:
        """Return the part that the bundle carries, to be read at once; None for a bundle that brings none (spec B-65).

        Only who holds the stream can verify it, but for a first part.
        """
        metadata = self.metadata()
        if part.FEATURE not in metadata.manifest.requires or metadata.operations or self._has_given_part:
            return None
        self._has_given_part = True
        ahead = self._frame.peek(tar.HEADER_BYTES_MAX)
        if ahead.startswith(tar.END[: tar.BLOCK]):
            raise Refused("B-65", "the bundle requires parts, and has neither one nor operations")
        found = tar.parse(ahead)
        arriving = part.parse(found.name, found.size)
        self._frame.skip(len(tar.header(*found)))
        return ArrivingPart(arriving, self._read_views(arriving.size), lambda: self._read_part_digest(arriving))

    def _skip_part(self) -> None:
        arriving = self.part()
        if arriving is not None:
            for _ in arriving.views:
                pass
            arriving.read_digest()

    def _read_part_digest(self, arriving: Part) -> bytes:
        digest = b"".join(bytes(view) for view in self._read_views(arriving.member_size - arriving.size))
        self._skip_padding(arriving.member_size)
        return digest

    def finish(self) -> None:
        """Check what was not read yet, and that the archive, the frame and the source end here."""
        for content in self._contents:
            for _ in content.views:
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

    def _read_contents(self) -> Iterator[Content]:
        self._skip_part()
        frame = self._frame
        end = tar.END[: tar.BLOCK]
        contents = content_operations(self.metadata())
        may_have_recipes = FEATURE in self.metadata().manifest.requires
        for operation in contents.values():
            header = tar.header(_name(operation), operation.size)
            if frame.starts_with(header):
                frame.skip(len(header))
                views = self._verified_view(operation) if operation.size <= _SMALL_BYTES else self._verified(operation)
                made = None
            elif frame.starts_with(end):
                return
            elif may_have_recipes and frame.starts_with(_recipe_name(operation) + b"\x00"):
                made = self._read_recipe(operation)
                views = self._new_bytes(operation, made)
            else:
                continue  # this content is not carried: the next one may be (spec B-53)
            yield Content(operation, views, made)
            for _ in views:
                pass
        if not frame.starts_with(end):
            raise self._why_not(contents)

    def _read_recipe(self, operation: Operation) -> Recipe:
        found = tar.parse(self._frame.peek(tar.HEADER_BYTES_MAX))
        if found.size > RECIPE_BYTES_MAX:
            raise LimitExceeded("B-62", f"a recipe has {found.size} bytes", limit=RECIPE_BYTES_MAX)
        self._frame.skip(len(tar.header(*found)))
        content = b"".join(bytes(view) for view in self._read_views(found.size))
        self._skip_padding(found.size)
        made = recipe.parse(content, operation.size)
        self._zero_bytes += made.zero_bytes
        if self._zero_bytes > self._limits.bundle_bytes:
            limit = self._limits.bundle_bytes
            raise LimitExceeded("B-62", f"recipes have {self._zero_bytes} bytes of zeros", limit=limit)
        return made

    def _new_bytes(self, operation: Operation, made: Recipe) -> Iterator[memoryview]:
        size = made.new_bytes + DIGEST_BYTES
        header = tar.header(_chunks_name(operation), size)
        if not self._frame.starts_with(header):
            self._refuse_unless_whole(len(header))
            raise Refused("B-60", f"the new bytes of {operation.path!r} do not follow its recipe", path=operation.path)
        self._frame.skip(len(header))
        return self._verified_new_bytes(operation, made)

    def _verified_new_bytes(self, operation: Operation, made: Recipe) -> Iterator[memoryview]:
        hashed = hasher()
        for view in self._read_views(made.new_bytes):
            hashed.update(view)
            yield view
        if b"".join(bytes(view) for view in self._read_views(DIGEST_BYTES)) != hashed.digest():
            raise Refused("B-63", f"the new bytes of {operation.path!r} are not of their digest", path=operation.path)
        self._skip_padding(made.new_bytes + DIGEST_BYTES)

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


def advice(error: DeltasyncError) -> str:
    """Return what to do about a bundle file that an error is about, as the end of its sentence; often nothing."""
    return "; the file is damaged or incomplete: copy it again" if error.facts.get("rule") in _DAMAGED else ""


def name_file(error: DeltasyncError, name: str) -> None:
    """Say in an error which bundle file it is about, and what to do about that."""
    error.sentence = f"{shown(name)}: {error.sentence}{advice(error)}"
    error.args = (error.sentence,)
