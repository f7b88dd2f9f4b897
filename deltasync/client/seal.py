"""Sealing: the difference between two trees, guarded, cut into bundles, with the content that each must carry."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice

from deltasync.client.ranges import Plan
from deltasync.client.streams import Stream
from deltasync.core import part, recipe
from deltasync.core.delta import apply, cut
from deltasync.core.errors import Corrupt, GuardStopped
from deltasync.core.hashing import directory_digest
from deltasync.core.manifest import EMPTY_ROOT, Entry, Kind, Operation, Verb, decode_directory, encode_directory
from deltasync.core.metadata import Metadata, compose
from deltasync.core.part import Part
from deltasync.core.tree import Loader, Tree, entries_of, walk
from deltasync.core.wire import Limits

OPERATIONS_MAX = 20_000
GUARD_ENTRIES = 100
"""A delta may delete up to this many entries without asking, unless they are all."""
_NAMED_MAX = 10
ASK_MAX = 2_000
"""Fewer digests than this are asked for at once: cheaper than walking the tree that the receiver holds."""
_OPERATION_BYTES = 400
"""What an operation takes in operations.json beside its paths, with room to spare."""

Ask = Callable[[list[str]], Iterable[str]]
"""Says which of these digests the receiver lacks."""
Planned = Callable[[Sequence[Operation], Collection[str]], Mapping[str, Plan]]
"""Says which of these contents travel as recipes."""
Left = Callable[[Stream], Iterable[Part]]
"""Gives the parts of a stream that are to be sealed."""
_WHOLE: Mapping[str, Plan] = {}


@dataclass(frozen=True, slots=True)
class Writer:
    """Whose bundles these are: what every manifest of one history repeats."""

    workspace: str
    workspace_path: str
    client_id: str
    epoch: str


@dataclass(frozen=True, slots=True)
class Span:
    """From which tree to which, and the number of the first bundle between them."""

    base: bytes
    target: bytes
    sequence: int


@dataclass(frozen=True, slots=True)
class Cut:
    """One bundle to be: metadata, the directory objects of the tree after it, and the content that it carries."""

    metadata: Metadata
    objects: dict[bytes, bytes]
    digests: set[str]
    content_bytes: int
    """How much of that travels."""
    is_last: bool = False
    """Nothing follows in this delta."""
    plans: Mapping[str, Plan] = field(default_factory=dict)
    """For those digests whose content does not travel whole."""
    part: Part | None = None
    """What a bundle without operations carries of a content that is too large for one."""


class Contents:
    """Decides which content of a delta must travel; the receiver is asked for one window of operations at a time."""

    def __init__(
        self, operations: list[Operation], base: bytes, load: Loader, ask: Ask, *, exact: bool, known: set[bytes]
    ) -> None:
        """Ask nothing yet.

        operations: used up while they are handed out, so that their memory is free again. base: a tree that the
        receiver holds before the first of them, as far as its content is not `known`. exact: never ask for what that
        tree has. known: content that was decided on before, as the first half of each digest; grows.
        """
        operations.reverse()
        self._left, self._base, self._load, self._ask = operations, base, load, ask
        self._exact = exact
        self._window: list[Operation] = []
        self._last: Operation | None = None
        self._known = known
        self._due: set[str] = set()
        self._counted: set[str] = set()
        self.total_bytes = sum(each.size for each in operations if _brings_content(each))
        """What travels at most: less after each answer."""

    def operations(self) -> Iterator[Operation]:
        """Yield the operations in order; of each it is known, then, whether its content travels."""
        while self._left:
            self._window = self._left[-OPERATIONS_MAX:]
            del self._left[-OPERATIONS_MAX:]
            self._decide(self._window)
            while self._window:
                self._last = self._window.pop()
                yield self._last

    def ends_with(self, operation: Operation) -> bool:
        """Tell whether an operation is the last of them all."""
        last = self._last
        return not self._left and not self._window and last is not None and last.path == operation.path

    def size(self, operation: Operation) -> int:
        """Return the bytes that an operation adds to its bundle; called for each operation once, in order."""
        digest = operation.digest
        if digest not in self._due or digest in self._counted:
            return 0
        self._counted.add(digest)
        return operation.size

    def take(self, operations: Iterable[Operation]) -> set[str]:
        """Return the digests whose content travels with these operations, each once over all bundles."""
        taken = {each.digest for each in operations if each.digest and each.digest in self._due}
        self._due -= taken
        self._counted -= taken
        return taken

    def _decide(self, window: Sequence[Operation]) -> None:
        sizes = {each.digest: each.size for each in window if each.digest and _brings_content(each)}
        halves = {bytes.fromhex(digest[:32]): digest for digest in sizes}  # 16 bytes tell digests apart as well
        fresh = {digest for half, digest in halves.items() if half not in self._known}
        self._known.update(halves)
        lacking = fresh - self._held(fresh)
        missing = set(self._ask(list(lacking))) if lacking else set()
        due = {digest for digest in lacking if digest in missing}  # nothing that was not offered (T6)
        self._due |= due
        self.total_bytes -= sum(each.size for each in window if _brings_content(each))
        self.total_bytes += sum(sizes[digest] for digest in due)

    def _held(self, digests: set[str]) -> set[str]:
        """Return those digests that the base tree has, unless asking for all of them is cheaper."""
        if self._base == EMPTY_ROOT or (len(digests) < ASK_MAX and not self._exact):
            return set()
        entries = (entry for _, entry in walk(self._base, self._load) if entry.kind is Kind.FILE)
        return {digest for entry in entries if (digest := entry.digest.hex()) in digests}


def _brings_content(operation: Operation) -> bool:
    return operation.digest is not None and operation.digest != operation.base


class Cuts:
    """The bundles of a delta, in order; of one that was handed out nothing stays in memory here."""

    def __init__(
        self,
        contents: Contents,
        span: Span,
        writer: Writer,
        load: Loader,
        limits: Limits,
        *,
        max_operations: int,
        has_target: bool = False,
        planned: Planned | None = None,
        left: Left = lambda _: (),
    ) -> None:
        """Cut nothing yet.

        load: must know the directory objects of each bundle before the next is asked for. has_target: those of the
        target are stored already, so that the tree after the last bundle need not be computed. planned: asked for each
        bundle; None lets all content travel whole. left: asked for each stream of a plan.
        """
        self._contents, self._span, self._writer, self._load = contents, span, writer, load
        self._has_target, self._planned, self._left = has_target, planned, left
        self._runs = runs(contents, limits, max_operations=max_operations)
        self._parent, self._sequence = span.base, span.sequence

    def __iter__(self) -> Iterator[Cut]:
        for run in self._runs:
            digests = self._contents.take(run)
            plans = self._planned(run, digests) if self._planned else _WHOLE
            for each in parts(plans, self._left, self._writer, self._parent, self._sequence):
                self._sequence += 1
                yield each
            yield self._cut(run, digests, plans)
        if self._parent != self._span.target:
            raise Corrupt("the sealed bundles do not lead to the observed tree; run `deltasync push --rehash`")

    def _cut(self, run: list[Operation], digests: set[str], plans: Mapping[str, Plan]) -> Cut:
        is_last = self._contents.ends_with(run[-1])
        if is_last and self._has_target:
            root, objects = self._span.target, {}
        else:
            applied = apply(self._parent, run, self._load)
            root, objects = applied.root, applied.objects
        metadata = composed(
            run, self._writer, sequence=self._sequence, parent_root=self._parent, root=root, requires=_required(plans)
        )
        self._parent, self._sequence = root, self._sequence + 1
        content_bytes = travelling_bytes(run, digests, plans)
        run.clear()  # the generator behind it holds the list until it goes on
        return Cut(metadata, objects, digests, content_bytes, is_last, plans)


def runs(contents: Contents, limits: Limits, *, max_operations: int) -> Iterator[list[Operation]]:
    """Yield the operations of each bundle of a delta."""
    return cut(
        contents.operations(),
        contents.size,
        max_operations=max_operations,
        max_bytes=content_max(limits),
    )


def parts(plans: Mapping[str, Plan], left: Left, writer: Writer, root: bytes, sequence: int) -> Iterator[Cut]:
    """Yield the bundles that bring what is too large for the bundle behind them."""
    for plan in plans.values():
        for each in left(plan.stream) if plan.stream else ():
            yield part_cut(each, writer, root, sequence)
            sequence += 1


def part_cut(carried: Part, writer: Writer, root: bytes, sequence: int) -> Cut:
    """Return a bundle without operations that carries a part, or says that a stream is over."""
    metadata = composed((), writer, sequence=sequence, parent_root=root, root=root, requires=(part.FEATURE,))
    return Cut(metadata, {}, set(), carried.size, part=carried)


def _required(plans: Mapping[str, Plan]) -> Sequence[str]:
    if not plans:
        return ()
    return (recipe.FEATURE, part.FEATURE) if any(plan.stream for plan in plans.values()) else (recipe.FEATURE,)


def travelling_bytes(operations: Iterable[Operation], digests: Collection[str], plans: Mapping[str, Plan]) -> int:
    """Return how much content the bundle of these operations carries itself."""
    return carried_bytes(operations, digests) - saved_bytes(plans) - before_bytes(plans)


def before_bytes(plans: Mapping[str, Plan]) -> int:
    """Return how much content comes in parts before the bundle with these plans."""
    return sum(plan.before_bytes for plan in plans.values())


def saved_bytes(plans: Mapping[str, Plan]) -> int:
    """Return how much content these plans keep from travelling."""
    return sum(plan.saved_bytes for plan in plans.values())


def composed(
    operations: Sequence[Operation],
    writer: Writer,
    *,
    sequence: int,
    parent_root: bytes,
    root: bytes,
    requires: Sequence[str] = (),
) -> Metadata:
    """Return the metadata of a new bundle of a writer, made now."""
    return compose(
        operations,
        workspace=writer.workspace,
        workspace_path=writer.workspace_path,
        epoch=writer.epoch,
        sequence=sequence,
        parent_root=parent_root,
        root=root,
        client_id=writer.client_id,
        bundle_id=str(uuid.uuid4()),
        created_at=datetime.now(UTC),
        requires=requires,
    )


def carried_bytes(operations: Iterable[Operation], digests: Collection[str]) -> int:
    """Return how many bytes of content the operations carry when they carry these digests, each once."""
    return sum({each.digest: each.size for each in operations if each.digest in digests}.values())


def operations_max(operations: Sequence[Operation], limits: Limits) -> int:
    """Return how many operations fit into one bundle, also when their paths are long."""
    longest = max((len(each.path) + len(each.source_path or "") for each in operations), default=0)
    # a character takes at most six bytes escaped or encoded, and a path stands in two members
    fitting = limits.metadata_bytes // (_OPERATION_BYTES + 6 * longest)
    return max(1, min(OPERATIONS_MAX, limits.bundle_operations, fitting))


def content_max(limits: Limits) -> int:
    """Return where a bundle is cut: no later than our own limit, whatever the receiver says."""
    return max(1, min(Limits().bundle_content_bytes, limits.bundle_content_bytes))


def guard(
    operations: Sequence[Operation], base: bytes, load: Loader, *, is_resync: bool, unseen: Collection[str] = ()
) -> None:
    """Raise GuardStopped for a delta that deletes more than half of the entries and over 100, or all of them.

    is_resync: the base is a tree that this client does not remember; then any deletion stops. unseen: paths, safe to
    print, that cannot be observed: whoever allows the deletions has to know of them.
    """
    dropped = _dropped(operations, base, load)
    if not dropped:
        return
    is_many = dropped > GUARD_ENTRIES and not _has_entries(base, 2 * dropped, load)
    if is_resync or is_many or not _has_entries(base, dropped + 1, load):
        total = sum(1 for _ in walk(base, load))
        why = "the server's tree is not the one that this folder was last synced to, and " if is_resync else ""
        raise GuardStopped(
            f"{why}{dropped} of {total} entries would be deleted on the server; {_unseen(unseen)}"
            "nothing was sent; if that is meant, push with --allow-mass-delete",
            deleted=dropped,
            entries=total,
            flag="--allow-mass-delete",
        )


def _unseen(paths: Collection[str]) -> str:
    if not paths:
        return ""
    more = f" and {len(paths) - _NAMED_MAX} more" if len(paths) > _NAMED_MAX else ""
    return f"{len(paths)} that cannot be read here are not among them: {', '.join(sorted(paths)[:_NAMED_MAX])}{more}; "


def _dropped(operations: Sequence[Operation], base: bytes, load: Loader) -> int:
    """Return how many entries a delta deletes, with everything below deleted directories; a change of kind is none."""
    deleted = [each for each in operations if each.operation is Verb.DELETED]
    if any(each.kind is Kind.DIRECTORY for each in deleted):
        dropped = apply(base, operations, load).entries_dropped
    else:
        dropped = len(deleted)
    gone = {each.path for each in deleted}
    return dropped - sum(1 for each in operations if each.operation is not Verb.DELETED and each.path in gone)


def _has_entries(root: bytes, count: int, load: Loader) -> bool:
    """Tell whether a tree has at least that many entries."""
    return sum(1 for _ in islice(walk(root, load), count)) == count


def without(
    target: bytes, base: bytes, paths: Collection[str], load: Loader, origins: Mapping[str, str] | None = None
) -> tuple[bytes, dict[bytes, bytes]]:
    """Return the target tree with some paths as they are in the base tree, and its new directory objects.

    origins: where the base tree has those of the paths that lie in a folder which moved.
    """
    tree, before = Tree(target, load), Tree(base, load)
    for path in paths:
        former = before.get((origins or {}).get(path, path))
        if former is None:
            tree.detach(path)
        else:
            tree.put(path.rpartition("/")[0], former)
    objects: dict[bytes, bytes] = {}
    return tree.freeze(objects.__setitem__), objects


def united(target: bytes, base: bytes, load: Loader) -> tuple[bytes, dict[bytes, bytes]]:
    """Return the target tree with what only the base tree has, and its new directory objects.

    Where one has a folder and the other has none, the base's entry stays.
    """
    objects: dict[bytes, bytes] = {}

    def unite(mine: bytes, theirs: bytes) -> bytes:
        if mine == theirs:
            return mine
        entries = {entry.name: entry for entry in entries_of(mine, load)}
        for former in entries_of(theirs, load):
            now, is_folder = entries.get(former.name), former.kind is Kind.DIRECTORY
            if now is None or (now.kind is Kind.DIRECTORY) != is_folder:
                entries[former.name] = former
            elif is_folder:
                entries[former.name] = Entry(former.name, Kind.DIRECTORY, digest=unite(now.digest, former.digest))
        body = encode_directory([entries[name] for name in sorted(entries)])
        digest = directory_digest(body)
        objects[digest] = body
        return digest

    return unite(target, base), objects


def overlaid(load: Loader, bodies: Mapping[bytes, bytes]) -> Loader:
    """Return a loader that knows some more directory objects."""
    return lambda digest: decode_directory(bodies[digest]) if digest in bodies else load(digest)


def healing(
    wanted: Collection[str],
    span: Span,
    writer: Writer,
    load: Loader,
    limits: Limits,
    *,
    planned: Planned,
    left: Left,
) -> Iterator[Cut]:
    """Yield bundles that change nothing and carry content which the receiver asks for, as far as the tree has it."""
    operations = list(_unchanged(wanted, span.base, load))
    cut_runs = cut(
        operations,
        lambda operation: operation.size,
        max_operations=operations_max(operations, limits),
        max_bytes=content_max(limits),
    )
    sequence = span.sequence
    for run in cut_runs:
        digests = {each.digest for each in run if each.digest}
        plans = planned(run, digests)
        for each in parts(plans, left, writer, span.base, sequence):
            sequence += 1
            yield each
        metadata = composed(
            run, writer, sequence=sequence, parent_root=span.base, root=span.base, requires=_required(plans)
        )
        sequence += 1
        yield Cut(metadata, {}, digests, travelling_bytes(run, digests, plans), plans=plans)


def _unchanged(wanted: Collection[str], root: bytes, load: Loader) -> Iterator[Operation]:
    left = set(wanted)
    for path, entry in walk(root, load) if left else ():
        digest = entry.digest.hex()
        if entry.kind is Kind.FILE and digest in left:
            left.discard(digest)
            yield Operation(
                operation=Verb.UPDATED,
                kind=Kind.FILE,
                path=path,
                base=digest,
                digest=digest,
                size=entry.size,
                executable=entry.executable,
                mtime_ns=entry.mtime_ns,
            )


def claim(span: Span, writer: Writer) -> Cut:
    """Return a bundle without operations: all it does is to begin a new history, or to take a workspace over."""
    metadata = composed((), writer, sequence=span.sequence, parent_root=span.base, root=span.base)
    return Cut(metadata, {}, set(), 0)
