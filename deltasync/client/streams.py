"""Streams: contents too large for one bundle on their way in parts, and what of them the receiver has (spec B-65)."""

from __future__ import annotations

import os
import secrets
import threading
from array import array
from bisect import bisect_left
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING

import msgspec

from deltasync.client import parts
from deltasync.client.listing import clamped
from deltasync.client.pack import ContentChanged, Source
from deltasync.client.parts import End
from deltasync.client.ranges import UNPROVEN, Fresh, Plan, fresh_chunks, runs_of
from deltasync.core import recipe
from deltasync.core.effort import Stretch
from deltasync.core.hashing import DIGEST_BYTES, Hasher, digest_of, hasher
from deltasync.core.manifest import Kind, Operation, Verb
from deltasync.core.names import shown
from deltasync.core.part import Part
from deltasync.core.recipe import Segment

if TYPE_CHECKING:
    from deltasync.client.state import State

READ_BYTES = 1 << 20
HASHES_MAX = 3
"""A part that did not get through is sent again from here: two are under way at most."""


@dataclass(eq=False)
class Stream:
    """One content that travels in parts: the whole file, or those chunks of it that the receiver has nowhere."""

    id: bytes
    operation: Operation
    size: int
    most: int
    """How many bytes a part has at most."""
    packed: bytes | None
    """The list of the chunks that travel, or of the runs between holes; None where the whole file does."""
    is_doubted: bool = False
    """What came of it was another content, and nothing else proves its runs: the whole file is read before more is."""
    _hashes: dict[int, Hasher] = field(default_factory=dict)
    _starts: array[int] = field(default_factory=partial(array, "Q"))
    """Where in the stream each chunk begins, once it was asked for."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    """For the hashes: whoever sends a part keeps one, and whoever hashes the file meanwhile does too."""

    def parts(self, offset: int) -> Iterator[Part]:
        """Yield the parts from an offset on, which is 0 or the end of a part."""
        while offset < self.size:
            part = Part(self.id, offset, min(self.most, self.size - offset))
            if self.packed is not None:
                part = part._replace(size=self._whole_chunks(part))
            yield part
            offset = part.end

    def _whole_chunks(self, part: Part) -> int:
        """Return how many bytes the chunks have that fit into a part."""
        size = 0
        for chunk in self._chunks(part.offset):
            if size and size + chunk.size > part.size:
                break
            size += chunk.size
        return size

    def _chunks(self, offset: int) -> Iterator[Fresh]:
        if not self._starts:
            self._starts.extend(accumulate((chunk.size for chunk in fresh_chunks(self.packed or b"")), initial=0))
        return fresh_chunks(self.packed or b"", bisect_left(self._starts, offset))

    def name_of(self, part: Part) -> str:
        """Say which part of which file this is."""
        total = -(-self.size // self.most)
        return f"{shown(self.operation.path)} part {min(total, part.offset // self.most + 1)} of {total}"

    def read(self, source: Source, part: Part) -> Generator[memoryview, None, bytes]:
        """Yield the bytes of a part, each view valid until the next, and return the digest of the stream up to its end.

        Raises ContentChanged.
        """
        if self.is_doubted:
            for _ in source.read(self.operation):
                pass
            self.is_doubted = False
        with source.opened(self.operation) as descriptor:
            self._require_unchanged(descriptor)
            known = self._hashes.get(part.offset)
            hashed = known.copy() if known else self._hashed(descriptor, part.offset)
            for view in self._views(descriptor, part.offset, part.end):
                hashed.update(view)
                yield view
            self._require_unchanged(descriptor)
            if part.end == self.size and self.packed is None and hashed.digest().hex() != self.operation.digest:
                raise self._changed()
        self.keep(part.end, hashed)
        return hashed.digest()

    def stretches(self, part: Part) -> Iterator[Stretch]:
        """Yield where in the workspace the bytes of a part are."""
        path, at = self.operation.path, part.offset
        if self.packed is None:
            yield Stretch(path, at, part.size)
            return
        for chunk in self._chunks(at):
            if at >= part.end:
                return
            yield Stretch(path, chunk.offset, chunk.size)
            at += chunk.size

    def digest_at(self, offset: int) -> bytes | None:
        """Return the digest of the stream up to the end of a part that was read a moment ago."""
        hashed = self._hashes.get(offset)
        return hashed.digest() if hashed else None

    def common(self, source: Source, ends: Iterable[End]) -> list[End]:
        """Return where those parts end, of the ones that a receiver has, that this stream still begins with."""
        same: list[End] = []
        hashed = hasher()
        with source.opened(self.operation) as descriptor:
            for end in ends:
                if end.offset > self.size or (same and end.offset <= same[-1].offset):
                    break
                for view in self._views(descriptor, same[-1].offset if same else 0, end.offset):
                    hashed.update(view)
                if hashed.digest() != end.digest:
                    break
                same.append(end)
                self.keep(end.offset, hashed.copy())
        return same

    def keep(self, offset: int, hashed: Hasher) -> None:
        """Remember the hash of the stream up to the end of a part; the last few are kept."""
        with self._lock:
            self._hashes[offset] = hashed
            while len(self._hashes) > HASHES_MAX:
                del self._hashes[next(iter(self._hashes))]

    def _hashed(self, descriptor: int, offset: int) -> Hasher:
        hashed = hasher()
        for view in self._views(descriptor, 0, offset):
            hashed.update(view)
        return hashed

    def _views(self, descriptor: int, start: int, end: int) -> Iterator[memoryview]:
        """Yield the bytes of a stretch of the stream; chunks are compared with their keys."""
        buffer = memoryview(bytearray(READ_BYTES))
        if self.packed is None:
            while start < end:
                count = os.preadv(descriptor, [buffer[: min(READ_BYTES, end - start)]], start)
                if not count:
                    raise self._changed()
                start += count
                yield buffer[:count]
            return
        for chunk in self._chunks(start):
            if start >= end:
                break
            if chunk.size > len(buffer):
                buffer = memoryview(bytearray(chunk.size))
            view = buffer[: os.preadv(descriptor, [buffer[: chunk.size]], chunk.offset)]
            if len(view) != chunk.size or not (chunk.key == UNPROVEN or digest_of(view).startswith(chunk.key)):
                raise self._changed()
            start += chunk.size
            yield view

    def _require_unchanged(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        if (status.st_size, clamped(status.st_mtime_ns)) != (self.operation.size, self.operation.mtime_ns):
            raise self._changed()

    def _changed(self) -> ContentChanged:
        return ContentChanged(self.operation, "changed while it was being sent")


class Streams:
    """The streams of one workspace; rows remember what of each the receiver has."""

    def __init__(self, state: State | None, on_resumed: Callable[[int], object] = lambda _: None) -> None:
        """Look at nothing yet.

        state: None for streams that are all sealed at once, and never gone on with. on_resumed: told how many bytes of
        a stream need not be sent.
        """
        self._state, self._on_resumed = state, on_resumed
        self._plans: dict[str, Plan] = {}
        self._open: dict[bytes, Stream] = {}
        self._lost: set[str] = set()

    def planned(
        self, operations: Iterable[Operation], digests: Collection[str], plans: Mapping[str, Plan], most: int
    ) -> dict[str, Plan]:
        """Return the plans, with streams for those contents of which more than `most` bytes would travel."""
        found = dict(plans)
        for operation in operations:
            digest = operation.digest or ""
            plan = found.get(digest)
            if digest not in digests or (plan.recipe.new_bytes if plan else operation.size) <= most:
                continue
            if digest not in self._plans:
                self._plans[digest] = self._streamed(operation, plan, most)
            found[digest] = self._plans[digest]
        return found

    def _streamed(self, operation: Operation, plan: Plan | None, most: int) -> Plan:
        packed = (plan.packed if plan.chunks else runs_of(plan.recipe)) if plan else None
        size = plan.recipe.new_bytes if plan else operation.size
        stream = Stream(secrets.token_bytes(DIGEST_BYTES), operation, size, most, packed)
        stream.is_doubted = plan is not None and not plan.chunks and operation.digest in self._lost
        if self._state is not None:
            self._resume(self._state, stream)
        self._open[stream.id] = stream
        if plan is None:
            return _whole(stream)
        return replace(plan, recipe=_from_stream(plan.recipe, stream.id), packed=b"", stream=stream)

    def begin(self, path: str, status: os.stat_result, most: int) -> Stream:
        """Begin the stream of a file that is read for the first time: its digest is not known yet.

        status: the file's. most: how many bytes a part has at most.
        """
        assert self._state is not None
        size, mtime_ns = status.st_size, clamped(status.st_mtime_ns)
        operation = Operation(
            operation=Verb.CREATED, kind=Kind.FILE, path=path, digest="", size=size, mtime_ns=mtime_ns
        )
        stream_id = parts.latest(self._state, None, path) or secrets.token_bytes(DIGEST_BYTES)
        stream = self._open[stream_id] = Stream(stream_id, operation, size, most, None)
        parts.note_begun(self._state, stream.id, operation, size=size, most=most, ends=())
        return stream

    def settle(self, stream: Stream, digest: str) -> None:
        """Say which content a stream brings that began before that was known."""
        assert self._state is not None
        stream.operation = msgspec.structs.replace(stream.operation, digest=digest)
        parts.note_content(self._state, stream.id, digest)
        self._plans.setdefault(digest, _whole(stream))

    def _resume(self, state: State, stream: Stream) -> None:
        """Go on with the stream of this content, or of what its file was before, as far as it begins alike."""
        operation = stream.operation
        found = parts.latest(state, operation.digest or "", operation.path)
        same: list[End] = []
        if found is not None:
            stream.id, source, ends = found, Source(state.root), parts.ends_of(state, found)
            try:
                same = stream.common(source, ends)
            except ContentChanged:  # whoever reads a part meets the trouble as well, and says so
                same = [end for end in ends if end.offset < stream.size]
            finally:
                source.close()
            self._on_resumed(same[-1].offset if same else 0)
        parts.note_begun(state, stream.id, operation, size=stream.size, most=stream.most, ends=same)

    def left(self, stream: Stream) -> Iterator[Part]:
        """Yield the parts that are not sealed yet; each is recorded before the next is asked for."""
        yield from stream.parts(parts.sealed_end(self._state, stream.id) if self._state else 0)

    def is_complete(self, digest: str) -> bool:
        """Tell whether every part of a content is with the receiver, or sealed, and can be sent again."""
        plan = self._plans.get(digest)
        return plan is not None and plan.stream is not None and next(self.left(plan.stream), None) is None

    def stream_of(self, part: Part) -> Stream | None:
        """Return the stream that a part belongs to, if it can be read again."""
        return self._open.get(part.stream)

    def read(self, source: Source, part: Part) -> Generator[memoryview, None, bytes]:
        """Yield the bytes of a part and return the digest of its stream (see Stream.read)."""
        return self._open[part.stream].read(source, part)

    def stretches(self, part: Part) -> Iterator[Stretch]:
        """Yield where in the workspace the bytes of a part are."""
        return self._open[part.stream].stretches(part)

    def digest_at_end(self, part: Part) -> bytes | None:
        """Return the digest of a stream up to the end of a part that was read a moment ago."""
        stream = self._open.get(part.stream)
        return stream.digest_at(part.end) if stream else None

    def drop(self, lost: Collection[bytes]) -> None:
        """Begin these streams anew: the receiver lost them, or made another content of them."""
        for digest, plan in list(self._plans.items()):
            if plan.stream is not None and plan.stream.id in lost:
                del self._plans[digest], self._open[plan.stream.id]
                self._lost.add(digest)

    def forget(self) -> None:
        """Look at every file again before more of it is sent."""
        self._open.clear()
        self._plans.clear()


def _whole(stream: Stream) -> Plan:
    """Return the plan of a content that a stream brings as a whole."""
    return Plan(recipe.compose((stream.id,), [Segment(1, 0, stream.size)]), b"", 0, 0, stream)


def _from_stream(made: recipe.Recipe, stream: bytes) -> recipe.Recipe:
    """Return a recipe that takes from a stream what was new."""
    mark, at = len(made.bases) + 1, 0

    def segments() -> Iterator[Segment]:
        nonlocal at
        for segment in made.segments():
            if segment.base:
                yield segment
            else:
                yield Segment(mark, at, segment.size)
                at += segment.size

    return recipe.compose((*made.bases, stream), segments())
