"""Content on its way into bundles: read from the workspace, re-hashed, and written into bundle files."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from deltasync.client.digest import is_same
from deltasync.client.listing import clamped
from deltasync.client.ranges import Plan
from deltasync.core import effort
from deltasync.core.bundle import BundleReader, Read, seal, seal_part, sealed_bytes
from deltasync.core.errors import Refused
from deltasync.core.hashing import digest_of, hasher
from deltasync.core.manifest import Operation
from deltasync.core.metadata import Metadata, content_operations, file_name, parse_file_name
from deltasync.core.names import shown
from deltasync.core.part import Part
from deltasync.core.recipe import ZEROS
from deltasync.core.wire import Limits
from deltasync.disk import ZEROS as HOLE
from deltasync.disk import Folder, open_regular, staged

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
        with self.opened(operation) as descriptor:
            if operation.size < BUFFER_BYTES:
                yield self._whole(descriptor, operation)
            else:
                yield from self._streamed(descriptor, operation)

    def read_fresh(self, operation: Operation, plan: Plan) -> Iterator[memoryview]:
        """Yield the new bytes of a recipe; each view is valid until the next. Raises ContentChanged."""
        if plan.stream is not None:
            return  # parts have brought them: the file may be another one by now
        with self.opened(operation) as descriptor:
            if plan.chunks:
                yield from self._chunks(descriptor, operation, plan)
            else:
                yield from _Sparse(descriptor, operation, plan, self._buffer, proves=self._proves_holes).views()

    @contextlib.contextmanager
    def opened(self, operation: Operation) -> Iterator[int]:
        """Lend a descriptor of the file that an operation is about; trouble with it is ContentChanged."""
        try:
            descriptor = self._open(operation.path)
            try:
                yield descriptor
            finally:
                os.close(descriptor)
        except OSError as error:
            raise ContentChanged(operation, error.strerror or "cannot be read") from error

    def sample(self, path: str, offset: int, size: int, /) -> bytes:
        """Return some bytes of a file as it is now, unchecked, to judge it by; none where they cannot be read."""
        try:
            descriptor = self._open(path)
        except OSError:
            return b""
        try:
            return os.pread(descriptor, size, offset)
        except OSError:
            return b""
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
    level: int | None = None,
    link: Callable[[], float] = lambda: 0.0,
    on_content: Callable[[int], None] | None = None,
) -> Iterator[bytes]:
    """Yield a bundle's bytes with the content of those digests, read from a source, which is closed at the end.

    plans: by digest, for content that does not travel whole. level: of zstd; None is what suits the content and the
    link. link: tells how many bytes a second it carries, 0 where that is not known. on_content: told the size of each
    piece of content once the next one is wanted.
    """

    def read(operation: Operation) -> Iterator[memoryview]:
        plan = plans.get(operation.digest or "")
        for view in source.read_fresh(operation, plan) if plan else source.read(operation):
            yield view
            if on_content is not None:
                on_content(len(view))

    reader: Read = source.read if on_content is None and not plans else read
    recipes = {digest: plan.recipe for digest, plan in plans.items()}
    archive_bytes = sealed_bytes(metadata, digests, recipes)
    threads = threads_for(archive_bytes)
    try:
        if level is None:
            share = _kept_share(metadata, digests, source, plans, archive_bytes)
            level = effort.level_for(share, link(), threads)
        yield from seal(metadata, digests, reader, recipes=recipes, level=level, threads=threads)
    finally:
        source.close()


class Parts(Protocol):
    """What gives the bytes of parts."""

    def read(self, source: Source, part: Part) -> Generator[memoryview, None, bytes]:
        """Yield the bytes of a part, and return the digest of its stream up to its end."""

    def stretches(self, part: Part) -> Iterator[effort.Stretch]:
        """Yield where in the workspace these bytes are."""


def packed_part(
    metadata: Metadata,
    part: Part,
    source: Source,
    parts: Parts,
    *,
    level: int | None = None,
    link: Callable[[], float] = lambda: 0.0,
    on_content: Callable[[int], None] | None = None,
) -> Iterator[bytes]:
    """Yield the bytes of a bundle that carries one part; the rest as for `packed`."""

    def read(part: Part) -> Generator[bytes | memoryview, None, bytes]:
        pieces = parts.read(source, part)
        while True:
            try:
                piece = next(pieces)
            except StopIteration as end:
                return bytes(end.value)
            yield piece
            if on_content is not None:
                on_content(len(piece))

    threads = threads_for(part.size)
    try:
        if level is None:
            share = _sampled(source, parts.stretches(part) if part.size else (), part.size, part.size)
            level = effort.level_for(share, link(), threads)
        yield from seal_part(metadata, part, read, level=level, threads=threads)
    finally:
        source.close()


def _kept_share(
    metadata: Metadata, digests: Collection[str], source: Source, plans: Mapping[str, Plan], archive_bytes: int
) -> float:
    """Return what compressing leaves of a bundle, about, by a sample of all the content that it carries."""
    carried = {digest: each for digest, each in content_operations(metadata).items() if digest in digests}
    content_bytes = sum(plans[key].recipe.new_bytes if key in plans else each.size for key, each in carried.items())
    return _sampled(source, _stretches(carried, plans), content_bytes, archive_bytes)


def _sampled(source: Source, content: Iterable[effort.Stretch], content_bytes: int, archive_bytes: int) -> float:
    samples: Iterator[bytes] = iter(())
    if content_bytes >= effort.SAMPLED_FROM_BYTES:
        samples = (source.sample(*place) for place in effort.spread(content, content_bytes))
    return effort.kept_by(samples, content_bytes, archive_bytes)


def _stretches(carried: Mapping[str, Operation], plans: Mapping[str, Plan]) -> Iterator[effort.Stretch]:
    for digest, operation in carried.items():
        if digest not in plans:
            yield effort.Stretch(operation.path, 0, operation.size)
            continue
        at = 0
        for segment in plans[digest].recipe.segments():
            if not segment.base:
                yield effort.Stretch(operation.path, at, segment.size)
            at += segment.size


def write_bundle(folder: Path, metadata: Metadata, chunks: Iterator[bytes]) -> Path:
    """Write a bundle file into a folder under its own name, whole and durable or not at all; return its path."""
    final = folder / file_name(metadata)
    try:
        with staged(final) as out:
            for chunk in chunks:
                out.write(chunk)
    except OSError:
        final.unlink(missing_ok=True)  # its name may be there, and not durable: nobody may take it for the bundle
        raise
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
