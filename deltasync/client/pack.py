"""Content on its way into bundles: read from the workspace, re-hashed, and written into bundle files."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

from deltasync.client.digest import is_same
from deltasync.client.listing import clamped
from deltasync.client.ranges import Plan
from deltasync.core.bundle import BundleReader, Read, seal, sealed_bytes
from deltasync.core.errors import Refused
from deltasync.core.hashing import digest_of, hasher
from deltasync.core.manifest import Operation
from deltasync.core.metadata import Metadata, file_name, parse_file_name
from deltasync.core.names import shown
from deltasync.core.recipe import ZEROS
from deltasync.core.wire import Limits
from deltasync.disk import ZEROS as HOLE
from deltasync.disk import Folder, open_regular, staged

LEVEL = 1
BUFFER_BYTES = 1 << 20
THREADED_BYTES = 1 << 20
"""Bundles from here on may be compressed in threads of their own, beside the reading and the sending."""
THREADS_MAX = 4
CHUNK_BYTES = 256 * 1024
_WHOLE: Mapping[str, Plan] = {}


class ContentChanged(Exception):
    """A file no longer holds the bytes that its digest names; it never leaves the sending code."""

    def __init__(self, operation: Operation, reason: str) -> None:
        super().__init__(f"{shown(operation.path)}: {reason}")
        self.path = operation.path
        self.digest = bytes.fromhex(operation.digest or "")
        self.reason = reason


class FileLost(Exception):
    """A bundle file in the outbox cannot be read; it never leaves the sending code."""


class Source:
    """Reads content below a workspace's folder; every byte handed out is of the digest that was asked for.

    It never leaves the folder, follows no link and blocks on nothing (T6: only named content, only from where it was
    hashed). One thread uses one source.
    """

    def __init__(self, root: Path, *, proves_holes: bool = False) -> None:
        """Open nothing yet.

        proves_holes: hash also the zeros of a sparse file, because no receiver does it before the bundle is needed.
        """
        self._root_path, self._proves_holes = root, proves_holes
        self._root: Folder | None = None
        self._near: tuple[str, Folder] | None = None
        self._buffer = memoryview(bytearray(BUFFER_BYTES))

    def read(self, operation: Operation) -> Iterator[memoryview]:
        """Yield the content that an operation names, from its path; each view is valid until the next.

        Raises ContentChanged before the last byte is handed out, so that no receiver can take wrong content for whole.
        """
        try:
            descriptor = self._open(operation.path)
        except OSError as error:
            raise ContentChanged(operation, error.strerror or "cannot be opened") from error
        try:
            if operation.size < BUFFER_BYTES:
                yield self._whole(descriptor, operation)
            else:
                yield from self._streamed(descriptor, operation)
        except OSError as error:
            raise ContentChanged(operation, error.strerror or "cannot be read") from error
        finally:
            os.close(descriptor)

    def read_fresh(self, operation: Operation, plan: Plan) -> Iterator[memoryview]:
        """Yield the new bytes of a recipe; each view is valid until the next. Raises ContentChanged."""
        try:
            descriptor = self._open(operation.path)
        except OSError as error:
            raise ContentChanged(operation, error.strerror or "cannot be opened") from error
        try:
            yield from (
                self._chunks(descriptor, operation, plan)
                if plan.chunks
                else _Sparse(descriptor, operation, plan, self._buffer, proves=self._proves_holes).views()
            )
        except OSError as error:
            raise ContentChanged(operation, error.strerror or "cannot be read") from error
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Let the folders go."""
        for folder in (self._root, self._near[1] if self._near else None):
            if folder is not None:
                folder.close()
        self._root = self._near = None

    def _open(self, path: str) -> int:
        folder, _, name = path.rpartition("/")
        if self._near is None or self._near[0] != folder:
            if self._root is None:
                self._root = Folder.open(self._root_path)
            entered = self._root.walk_to(folder)  # members come in runs of one folder: it is held until the next
            if self._near is not None:
                self._near[1].close()
            self._near = (folder, entered)
        return open_regular(name, at=self._near[1].fd)

    def _whole(self, descriptor: int, operation: Operation) -> memoryview:
        content = self._buffer[: _read(descriptor, self._buffer, operation.size)]
        if len(content) != operation.size or digest_of(content).hex() != operation.digest:
            raise ContentChanged(operation, "changed while it was being sent")
        return content

    def _chunks(self, descriptor: int, operation: Operation, plan: Plan) -> Iterator[memoryview]:
        for chunk in plan.fresh():
            if chunk.size > len(self._buffer):
                self._buffer = memoryview(bytearray(chunk.size))
            view = self._buffer[: os.preadv(descriptor, [self._buffer[: chunk.size]], chunk.offset)]
            if len(view) != chunk.size or not digest_of(view).startswith(chunk.key):
                raise ContentChanged(operation, "changed while it was being sent")
            yield view

    def _streamed(self, descriptor: int, operation: Operation) -> Iterator[memoryview]:
        left, hashed = operation.size, hasher()
        while left:
            view = self._buffer[: min(left, BUFFER_BYTES)]
            count = _read(descriptor, view, len(view))
            left -= count
            hashed.update(view[:count])
            is_wrong = not left and (hashed.digest().hex() != operation.digest or os.read(descriptor, 1))
            if not count or is_wrong:
                raise ContentChanged(operation, "changed while it was being sent")
            yield view[:count]


class _Sparse:
    """The data of one sparse file between the holes that its plan knows.

    A file that has the size and time it was hashed with holds that content, unless somebody set the time back: the
    receiver finds out, and asks for the whole. Where no receiver does, or the time is another one, all is hashed.
    """

    def __init__(self, descriptor: int, operation: Operation, plan: Plan, buffer: memoryview, *, proves: bool) -> None:
        self._descriptor, self._operation, self._plan, self._buffer = descriptor, operation, plan, buffer
        self._before = os.fstat(descriptor)
        is_as_hashed = clamped(self._before.st_mtime_ns) == operation.mtime_ns
        self._hashed = None if is_as_hashed and not proves else hasher()

    def views(self) -> Iterator[memoryview]:
        """Yield the new bytes; the last view comes when all are proven."""
        held: memoryview | None = None
        at = 0
        for segment in self._plan.recipe.segments():
            if segment.base == ZEROS:
                self._pass_over(segment.size)
            else:
                for offset in range(at, at + segment.size, len(self._buffer)):
                    if held is not None:
                        yield held
                    held = self._read(offset, min(len(self._buffer), at + segment.size - offset))
            at += segment.size
        is_same_content = self._hashed is None or self._hashed.digest().hex() == self._operation.digest
        if not (is_same_content and is_same(self._before, os.fstat(self._descriptor))):
            raise ContentChanged(self._operation, "changed while it was being sent")
        if held is not None:
            yield held

    def _pass_over(self, size: int) -> None:
        while size and self._hashed is not None:
            zeros = HOLE[:size]
            self._hashed.update(zeros)
            size -= len(zeros)

    def _read(self, offset: int, size: int) -> memoryview:
        view = self._buffer[: os.preadv(self._descriptor, [self._buffer[:size]], offset)]
        if len(view) != size:
            raise ContentChanged(self._operation, "changed while it was being sent")
        if self._hashed is not None:
            self._hashed.update(view)
        return view


def _read(descriptor: int, buffer: memoryview, size: int) -> int:
    """Read until that many bytes came, or more, or the file ends; return how many they are."""
    count = os.readv(descriptor, [buffer])
    while 0 < count < size:
        more = os.readv(descriptor, [buffer[count:]])
        if not more:
            break
        count += more
    return count


def threads_for(size_bytes: int) -> int:
    """Return how many threads of its own zstd gets.

    None for a small bundle, where starting one costs more, and none on two cores: they double the work for content
    that does not compress, and a server on the same machine has use for the other core.
    """
    cores = os.cpu_count() or 1
    return 0 if size_bytes < THREADED_BYTES or cores <= 2 else min(THREADS_MAX, cores - 2)


def packed(
    metadata: Metadata,
    digests: Collection[str],
    source: Source,
    plans: Mapping[str, Plan] = _WHOLE,
    *,
    on_content: Callable[[int], None] | None = None,
) -> Iterator[bytes]:
    """Yield a bundle's bytes with the content of those digests, read from a source, which is closed at the end.

    plans: by digest, for content that does not travel whole. on_content: told the size of each piece of content once
    the next one is wanted.
    """

    def read(operation: Operation) -> Iterator[memoryview]:
        plan = plans.get(operation.digest or "")
        for view in source.read_fresh(operation, plan) if plan else source.read(operation):
            yield view
            if on_content is not None:
                on_content(len(view))

    reader: Read = source.read if on_content is None and not plans else read
    recipes = {digest: plan.recipe for digest, plan in plans.items()}
    threads = threads_for(sealed_bytes(metadata, digests, recipes))
    try:
        yield from seal(metadata, digests, reader, recipes=recipes, level=LEVEL, threads=threads)
    finally:
        source.close()


def write_bundle(folder: Path, metadata: Metadata, chunks: Iterator[bytes]) -> Path:
    """Write a bundle file into a folder under its own name, whole and durable or not at all; return its path."""
    final = folder / file_name(metadata)
    with staged(final) as out:
        for chunk in chunks:
            out.write(chunk)
    return final


def kept(chunks: Iterator[bytes], final: Path) -> Iterator[bytes]:
    """Pass a bundle's bytes on and keep them as a file, which appears when the last one was taken."""
    with staged(final) as out:
        for chunk in chunks:
            out.write(chunk)
            yield chunk


def file_chunks(path: Path) -> Iterator[bytes]:
    """Yield a bundle file's bytes; raises FileLost."""
    try:
        with os.fdopen(open_regular(str(path)), "rb", buffering=0) as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
    except OSError as error:
        raise FileLost(f"{shown(str(path))}: {error.strerror}") from error


def verify(path: Path) -> Metadata:
    """Read a bundle file to its end, strictly, and return its metadata; raises Refused or LimitExceeded."""
    return carried_digests(path)[0]


def carried_digests(path: Path) -> tuple[Metadata, set[str]]:
    """Verify a bundle file and return its metadata and the digests of what it carries whole, but perhaps for zeros."""
    digests: set[str] = set()
    with os.fdopen(open_regular(str(path)), "rb", buffering=0) as file:
        reader = BundleReader(file, own_limits())
        metadata = reader.metadata()
        for content in reader.contents():
            if content.recipe is None or not content.recipe.bases:
                digests.add(content.operation.digest or "")
            for _ in content.views:
                pass
        reader.finish()
    return metadata, digests


def read_metadata(path: Path, limits: Limits | None = None) -> Metadata:
    """Read what a bundle file says of itself, strictly; raises Refused also when its name says otherwise."""
    with os.fdopen(open_regular(str(path)), "rb", buffering=0) as file:
        metadata = BundleReader(file, limits or own_limits()).metadata()
    name = parse_file_name(path.name)
    if name is not None and path.name != file_name(metadata):
        raise Refused("B-26", f"{shown(path.name)} holds the bundle {file_name(metadata)}")
    return metadata


def own_limits() -> Limits:
    """Return the limits for bundles that this machine reads for itself."""
    return Limits(bundle_bytes=sys.maxsize)
