"""Which ranges of a large file the receiver holds, or are holes: only the bytes between them travel (spec B-60)."""

from __future__ import annotations

import contextlib
import struct
import threading
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from deltasync.client import recipes
from deltasync.client.holes import Holes, holes_of
from deltasync.client.recipes import Known
from deltasync.core import recipe
from deltasync.core.chunks import KEY_BYTES, LISTED_BYTES, chunks
from deltasync.core.errors import DeltasyncError
from deltasync.core.manifest import Operation
from deltasync.core.recipe import BASES_MAX, RECIPE_BYTES_MAX, ZEROS, Recipe, Segment

if TYPE_CHECKING:
    from deltasync.client.state import State
    from deltasync.client.streams import Stream

WORTH = 0.9
"""A recipe that carries more than this share of the file is not worth its trouble."""
EARLY_MAX = 2
"""How many recipes are asked for early: files may turn out to be what they were, and nobody wants the answer then."""
ENOUGH = 0.02
"""Where no more than this share of a file is lacking, no further base is asked for."""
_PLAN_FROM_BYTES = 128 << 10
"""Files that are smaller are never cut: no recipe need be looked up."""
_FRESH = struct.Struct(f">QI{KEY_BYTES}s")
UNPROVEN = bytes(KEY_BYTES)
"""In place of a key: only the digest of the whole content tells whether these bytes are right."""
RUN_BYTES = 1 << 20


class Receiver(Protocol):
    """A server that holds bases."""

    def missing(self, name: str, digests: Sequence[str]) -> list[str]:
        """Lease these digests, and return those that are not there."""

    def recipe(self, name: str, digest: bytes, average_bytes: int) -> bytes:
        """Return the packed list of the chunks of a content."""


class Fresh(NamedTuple):
    """A chunk that no base has: where it is in the file, and the beginning of its BLAKE3."""

    offset: int
    size: int
    key: bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """How one content travels: its recipe, and the chunks that are sent with it."""

    recipe: Recipe
    packed: bytes
    """The list of the chunks that the bundle carries."""
    chunks: int
    """How many the whole content has; 0 where it was not cut, and all but its holes is sent."""
    fresh_chunks: int
    """How many of them are sent."""
    stream: Stream | None = None
    """What brings them before the bundle, where they are too many for one."""

    def fresh(self) -> Iterator[Fresh]:
        """Yield the chunks that the bundle carries, in the order of the file."""
        return fresh_chunks(self.packed)

    @property
    def before_bytes(self) -> int:
        """How much is sent before the bundle."""
        return self.stream.size if self.stream else 0

    @property
    def saved_bytes(self) -> int:
        """How much less travels than the whole."""
        return self.recipe.size - self.recipe.new_bytes - self.before_bytes


def fresh_chunks(packed: bytes, first: int = 0) -> Iterator[Fresh]:
    """Yield the chunks of a packed list, in the order of the file. first: the number of the one to begin with."""
    return map(Fresh._make, _FRESH.iter_unpack(memoryview(packed)[first * _FRESH.size :]))


def runs_of(made: Recipe) -> bytes:
    """Return the packed list of what is new in a recipe, in runs that fit into memory; nothing proves each of them."""
    packed, at = bytearray(), 0
    for segment in made.segments():
        for start in range(at, at + segment.size, RUN_BYTES) if not segment.base else ():
            packed += _FRESH.pack(start, min(RUN_BYTES, at + segment.size - start), UNPROVEN)
        at += segment.size
    return bytes(packed)


class Planner:
    """Plans how large files travel to one receiver."""

    def __init__(self, state: State, receiver: Receiver, workspace: str) -> None:
        """Ask nothing yet."""
        self._state, self._receiver, self._workspace = state, receiver, workspace
        self._early: dict[tuple[bytes, int], _Early] = {}

    def expect(self, digest: bytes, average_bytes: int) -> None:
        """Hear that a file is read now whose base is this content: its recipe is asked for meanwhile."""
        if (digest, average_bytes) in self._early or len(self._early) >= EARLY_MAX:
            return
        known = recipes.recipe_of(self._state, digest)
        if known is None or known.average_bytes != average_bytes:
            asked = _Early(lambda: self._receiver.recipe(self._workspace, digest, average_bytes))
            with contextlib.suppress(RuntimeError):  # the system starts no more threads: it is asked for later
                asked.start()
                self._early[digest, average_bytes] = asked

    def plans(self, operations: Iterable[Operation], digests: Collection[str]) -> dict[str, Plan]:
        """Return the plans of those contents, by digest, that need not travel whole.

        Only a sparse file has one, and a file that was cut when it was read: for that there was a base then.
        """

        def plan_of(operation: Operation, holes: Holes) -> Plan | None:
            known = recipes.recipe_of(self._state, bytes.fromhex(operation.digest or ""))
            plan = self._plan(operation, known, holes) if known else None
            return plan or sparse(operation.size, holes)

        return _plans(self._state.root, operations, digests, plan_of)

    def _plan(self, operation: Operation, known: Known, holes: Holes) -> Plan | None:
        former = bytes.fromhex(operation.base) if operation.base and operation.base != operation.digest else None
        tried = [former] if former else []
        tried += recipes.similar(self._state, known.digest, but=tried)
        if not tried:
            return None
        # What is there is leased by the answer: it is not collected before the bundle comes.
        missing = set(self._receiver.missing(self._workspace, [each.hex() for each in tried]))
        bases = (each for each in tried[:BASES_MAX] if each.hex() not in missing)
        found = filter(None, (self._base(each, known.average_bytes) for each in bases))
        return matched(known.listed, found, holes)

    def _base(self, digest: bytes, average_bytes: int) -> Known | None:
        """Return the recipe of a base, with chunks of this size: as it is remembered, or from the receiver."""
        known = recipes.recipe_of(self._state, digest)
        if known is not None and known.average_bytes == average_bytes:
            return known
        early = self._early.pop((digest, average_bytes), None)
        try:
            listed = early.result() if early else self._receiver.recipe(self._workspace, digest, average_bytes)
        except DeltasyncError:
            return None  # a recipe is a help: without it more is sent, and a server that is gone is met then
        if not listed or len(listed) % LISTED_BYTES:
            return None
        known = Known(digest, average_bytes, listed)
        recipes.remember(self._state, [known], [])
        return known


class _Early(threading.Thread):
    """A request that is made while a file is read; nobody waits for it when nobody wants its answer any more."""

    def __init__(self, ask: Callable[[], bytes]) -> None:
        super().__init__(name="recipe", daemon=True)
        self._ask = ask
        self._answer = b""
        self._error: Exception | None = None

    def run(self) -> None:
        """Make the request."""
        try:
            self._answer = self._ask()
        except Exception as error:  # noqa: BLE001  who wants the answer is told
            self._error = error

    def result(self) -> bytes:
        """Wait for the answer and return it, or raise what came instead."""
        self.join()
        if self._error is not None:
            raise self._error
        return self._answer


def plans_by_holes(root: Path, operations: Iterable[Operation], digests: Collection[str]) -> dict[str, Plan]:
    """Return the plans of those contents, by digest, that are sparse files: any receiver can follow them."""
    return _plans(root, operations, digests, lambda operation, holes: sparse(operation.size, holes))


def _plans(
    root: Path,
    operations: Iterable[Operation],
    digests: Collection[str],
    plan_of: Callable[[Operation, Holes], Plan | None],
) -> dict[str, Plan]:
    found: dict[str, Plan] = {}
    for operation in operations:
        digest = operation.digest
        if digest in digests and digest not in found and digest and operation.size >= _PLAN_FROM_BYTES:
            plan = plan_of(operation, holes_of(root, operation))
            if plan is not None:
                found[digest] = plan
    return found


def sparse(size: int, holes: Holes) -> Plan | None:
    """Return the plan for a content of which all but the holes is sent; None where it has none."""
    if not holes:
        return None

    def segments() -> Iterator[Segment]:
        at = 0
        for start, end in (*holes, (size, size)):
            if start > at:
                yield Segment(0, 0, start - at)
            if end > start:
                yield Segment(ZEROS, 0, end - start)
            at = end

    return Plan(recipe.compose((), segments()), b"", 0, 0)


def matched(listed: bytes, bases: Iterable[Known], holes: Holes) -> Plan | None:
    """Return the plan for a content with these chunks; None when it had better travel otherwise.

    bases: tried in this order until little is lacking; the lookup table of one is in memory at a time.
    """
    match = _Match(listed, holes)
    used: list[bytes] = []
    for base in bases:
        if match.has_any_of(base.listed):
            used.append(base.digest)
            if match.lacking_bytes <= ENOUGH * match.size:
                break
    if not used:
        return None
    plan = match.plan(tuple(used))
    carried = plan.recipe.new_bytes + len(plan.recipe.body)
    return plan if len(plan.recipe.body) < RECIPE_BYTES_MAX // 2 and carried <= WORTH * plan.recipe.size else None


class _Match:
    """For each chunk of a content, the base that has it, and where."""

    def __init__(self, listed: bytes, holes: Holes) -> None:
        count = len(listed) // LISTED_BYTES
        self._listed = listed
        self._base = array("B", bytes(count))
        self._offset = array("Q", bytes(8 * count))
        self._used = 0
        self.size = self.lacking_bytes = sum(chunk.size for chunk in chunks(listed))
        if holes:
            self._mark(holes)

    def _mark(self, holes: Holes) -> None:
        """Take the chunks that lie in a hole for zeros."""
        at, left = 0, iter(holes)
        start, end = next(left)
        for number, chunk in enumerate(chunks(self._listed)):
            while end <= at:
                start, end = next(left, (self.size, self.size + 1))
            if start <= at and at + chunk.size <= end:
                self._base[number] = ZEROS
                self.lacking_bytes -= chunk.size
            at += chunk.size

    def has_any_of(self, listed: bytes) -> bool:
        """Look the chunks that no earlier base has up in another one; False when it has none of them."""
        starts, at = array("Q"), 0
        index: dict[bytes, int] = {}
        for number, chunk in enumerate(chunks(listed)):
            starts.append(at)
            index.setdefault(listed[number * LISTED_BYTES : (number + 1) * LISTED_BYTES], number)
            at += chunk.size
        following, mark, found = 0, self._used + 1, False
        for number in range(len(self._base)):
            if self._base[number]:
                continue
            text = self._listed[number * LISTED_BYTES : (number + 1) * LISTED_BYTES]
            # the chunk behind the last one found, where content repeats itself: ranges stay long
            here = following if listed.startswith(text, following * LISTED_BYTES) else index.get(text)
            if here is not None:
                self._base[number], self._offset[number] = mark, starts[here]
                self.lacking_bytes -= int.from_bytes(text[:4])
                following, found = here + 1, True
        self._used += found
        return found

    def plan(self, bases: tuple[bytes, ...]) -> Plan:
        packed = bytearray()

        def segments() -> Iterator[Segment]:
            at = 0
            for number, chunk in enumerate(chunks(self._listed)):
                base = self._base[number]
                if not base:
                    packed.extend(_FRESH.pack(at, *chunk))
                yield Segment(base, self._offset[number], chunk.size)
                at += chunk.size

        made = recipe.compose(bases, segments())
        return Plan(made, bytes(packed), len(self._base), len(packed) // _FRESH.size)
