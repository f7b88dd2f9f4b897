"""Why operations go out: one reason for each, for people who ask; nobody else pays for them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import islice

import msgspec

from deltasync.client.ranges import Plan
from deltasync.core.manifest import EMPTY_ROOT, Kind, Operation, Verb
from deltasync.core.metadata import Metadata
from deltasync.core.names import shown
from deltasync.core.tree import Loader, walk

NO_PLANS: Mapping[str, Plan] = {}
REASONS_MAX = 1_000
"""How many reasons an answer gives; the others are counted."""


class Reason(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why one path is part of what is sent; both paths are safe to print."""

    path: str
    reason: str
    source: str | None = msgspec.field(default=None, name="from")
    """Where the content was in the tree before."""


class Reasons:
    """Collects the reasons of what goes out; those of a bundle count once it is acknowledged or is a file."""

    def __init__(self, load: Loader) -> None:
        """Hold nothing yet. load: must know the tree before each bundle."""
        self._load = load
        self._noted: dict[bytes, tuple[list[Reason], int]] = {}
        self.given: list[Reason] = []
        self.more = 0
        """How many operations went out beyond those that have their reason in the list."""

    def note(self, metadata: Metadata, plans: Mapping[str, Plan] = NO_PLANS) -> None:
        """Find the reasons of a bundle that is about to go out. plans: of the contents that do not travel whole."""
        manifest = metadata.manifest
        before = bytes.fromhex(manifest.parent_root)
        first = self._first(metadata.operations)
        is_resent = manifest.root == manifest.parent_root  # nothing changes: the receiver asked for content again
        found = _resent(first) if is_resent else explained(first, before, self._load, plans)
        self._noted[metadata.identity] = (found, len(metadata.operations))

    def count(self, identity: bytes) -> None:
        """Give the reasons of a bundle that is acknowledged, as far as there is room."""
        found, count = self._noted.pop(identity, ([], 0))
        self._give(found, count)

    def add(
        self, operations: Sequence[Operation], before: bytes, load: Loader, plans: Mapping[str, Plan] = NO_PLANS
    ) -> None:
        """Give the reasons of operations that are not sealed."""
        self._give(explained(self._first(operations), before, load, plans), len(operations))

    def _first(self, operations: Sequence[Operation]) -> list[Operation]:
        return list(islice(operations, REASONS_MAX - len(self.given)))

    def _give(self, found: list[Reason], count: int) -> None:
        taken = found[: REASONS_MAX - len(self.given)]
        self.given += taken
        self.more += count - len(taken)


def explained(
    operations: Collection[Operation], before: bytes, load: Loader, plans: Mapping[str, Plan] = NO_PLANS
) -> list[Reason]:
    """Return the reason of each operation; the tree before is walked only when files were created."""
    created = {each.digest for each in operations if each.operation is Verb.CREATED and each.digest and each.size}
    copies = paths_with(created, before, load)
    return [_with_chunks(reason_of(each, copies), plans.get(each.digest or "")) for each in operations]


def _with_chunks(reason: Reason, plan: Plan | None) -> Reason:
    if plan is None or not (plan.chunks or plan.recipe.zero_bytes):
        return reason
    if not plan.chunks:
        data_bytes = plan.recipe.size - plan.recipe.zero_bytes
        return msgspec.structs.replace(reason, reason=f"{reason.reason} (sparse: {data_bytes:,} bytes are no holes)")
    return msgspec.structs.replace(
        reason, reason=f"{reason.reason} ({plan.fresh_chunks:,} of {plan.chunks:,} chunks are new to the server)"
    )


def paths_with(digests: Collection[str], root: bytes, load: Loader) -> dict[str, str]:
    """Return for each of these digests the first path of a tree that has this content."""
    found: dict[str, str] = {}
    if not digests or root == EMPTY_ROOT:
        return found
    for path, entry in walk(root, load):
        if entry.kind is Kind.FILE and (digest := entry.digest.hex()) in digests:
            found.setdefault(digest, path)
            if len(found) == len(digests):
                break
    return found


def reason_of(operation: Operation, copies: Mapping[str, str]) -> Reason:
    """Return why an operation is one. copies: where the tree before has the content of created files."""
    path, source = shown(operation.path), None
    if operation.operation is Verb.DELETED:
        reason = "gone here"
    elif operation.operation is Verb.MOVED:
        source = shown(operation.source_path or "")
        reason = f"moved from {source}"
    elif operation.operation is Verb.UPDATED:
        is_file = operation.kind is Kind.FILE
        reason = "metadata only" if is_file and operation.digest == operation.base else "content changed"
    elif (operation.digest or "") in copies:
        source = shown(copies[operation.digest or ""])
        reason = f"copy of {source}"
    else:
        reason = "new"
    return Reason(path, reason, source)


def _resent(operations: Iterable[Operation]) -> list[Reason]:
    return [Reason(shown(each.path), "resent because the server asked for it") for each in operations]
