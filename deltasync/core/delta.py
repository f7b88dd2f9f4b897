"""Deltas: the operations between two trees, how they apply, and where they are cut into bundles."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from deltasync.core.errors import Refused
from deltasync.core.manifest import EMPTY_ROOT, Entry, Kind, Operation, Verb, decode_directory
from deltasync.core.tree import Detached, Loader, Tree, entries_of, walk

DIRECTORY_MOVES_MAX = 5_000
"""Directory moves of one delta travel in one bundle; beyond this many, directories are created and deleted instead."""


@dataclass(slots=True)
class Applied:
    """What a delta made of a tree."""

    root: bytes = EMPTY_ROOT
    objects: dict[bytes, bytes] = field(default_factory=dict)
    """The new directory objects, body by digest."""
    files: int = 0
    """How many more files the tree has (negative: fewer)."""
    content_bytes: int = 0
    """How many more bytes of file content the tree names."""
    entries_dropped: int = 0
    """Entries that were deleted or displaced, with everything below them."""


def apply(root: bytes, operations: Sequence[Operation], load: Loader) -> Applied:
    """Apply a delta to the tree that `root` names (spec B-39); the order of the operations does not matter.

    Raises Refused B-40 to B-44 when an operation does not fit the tree; nothing is stored then.
    """
    tree, applied = Tree(root, load), Applied()
    moves = [operation for operation in operations if operation.operation is Verb.MOVED]
    taken = {operation.path: _take(tree, operation) for operation in sorted(moves, key=_source_depth, reverse=True)}
    for operation in sorted(moves, key=_depth):
        if operation.kind is Kind.DIRECTORY:
            for displaced in tree.attach(operation.path, taken[operation.path]):
                _count_dropped(tree, displaced, applied)
    for operation in operations:
        if operation.operation is Verb.DELETED:
            _delete(tree, operation, applied)
    for operation in sorted(operations, key=_depth):
        if operation.operation is Verb.CREATED:
            _create(tree, operation, applied)
        elif operation.operation is Verb.UPDATED:
            _update(tree, operation, applied)
        elif operation.operation is Verb.MOVED and operation.kind is not Kind.DIRECTORY:
            _place(tree, operation, taken[operation.path].entry, applied)
    applied.root = tree.freeze(applied.objects.__setitem__)
    return applied


def _depth(operation: Operation) -> int:
    return operation.path.count("/")


def _source_depth(operation: Operation) -> int:
    return (operation.source_path or "").count("/")


def _take(tree: Tree, operation: Operation) -> Detached:
    source = operation.source_path or ""
    detached = tree.detach(source)
    if detached is None or detached.entry.kind is not operation.kind:
        raise Refused("B-44", f"{source!r} is moved but is no {operation.kind} before the bundle", path=source)
    _check_base(operation, detached.entry)
    return detached


def _check_base(operation: Operation, before: Entry) -> None:
    if operation.base is not None and operation.base != before.digest.hex():
        raise Refused("B-43", f"{operation.path!r} has another content before than its base", path=operation.path)


def _delete(tree: Tree, operation: Operation, applied: Applied) -> None:
    detached = tree.detach(operation.path)
    if detached is None or detached.entry.kind is not operation.kind:
        raise Refused("B-42", f"{operation.path!r} is deleted but is no {operation.kind}", path=operation.path)
    _check_base(operation, detached.entry)
    _count_dropped(tree, detached, applied)


def _count_dropped(tree: Tree, detached: Detached, applied: Applied) -> None:
    for entry in (detached.entry, *tree.below(detached)):
        applied.entries_dropped += 1
        _count(applied, entry, -1)


def _count(applied: Applied, entry: Entry, sign: int) -> None:
    if entry.kind is Kind.FILE:
        applied.files += sign
        applied.content_bytes += sign * entry.size


def _create(tree: Tree, operation: Operation, applied: Applied) -> None:
    if tree.get(operation.path) is not None:
        raise Refused("B-41", f"{operation.path!r} is created but is already there", path=operation.path)
    _count(applied, _put(tree, operation), 1)


def _update(tree: Tree, operation: Operation, applied: Applied) -> None:
    before = tree.get(operation.path)
    if before is None or before.kind is not operation.kind:
        raise Refused("B-42", f"{operation.path!r} is updated but is no {operation.kind}", path=operation.path)
    _check_base(operation, before)
    _count(applied, before, -1)
    _count(applied, _put(tree, operation), 1)


def _place(tree: Tree, operation: Operation, before: Entry, applied: Applied) -> None:
    if tree.get(operation.path) is not None:
        raise Refused("B-41", f"{operation.path!r} is moved to but is already there", path=operation.path)
    _count(applied, before, -1)
    _count(applied, _put(tree, operation), 1)


def _put(tree: Tree, operation: Operation) -> Entry:
    folder, _, name = operation.path.rpartition("/")
    digest = EMPTY_ROOT if operation.kind is Kind.DIRECTORY else bytes.fromhex(operation.digest or "")
    entry = Entry(
        name,
        operation.kind,
        operation.size,
        operation.mtime_ns,
        operation.executable,
        digest,
        operation.target or "",
    )
    if not tree.put(folder, entry):
        raise Refused("B-40", f"{operation.path!r} has no parent directory", path=operation.path)
    return entry


def diff(old: bytes, new: bytes, load: Loader, renames: Mapping[str, str] | None = None) -> list[Operation]:
    """Return operations that turn the tree `old` into the tree `new`.

    renames: new path -> path in `old`, where something outside (an inode) says that one became the other. Directories
    among them become moves also when what is inside differs; files only choose between equal digests.
    The order is fit for `cut`: any prefix of the list is a delta to a valid tree.
    """
    if old == new:
        return []
    hints = dict(renames or {})
    moves = _hinted_moves(old, new, load, hints)
    base, moved_load = _after_moves(old, moves, load)
    changes = _compare(base, new, moved_load)
    found = _moves_by_digest(changes, moved_load, room=DIRECTORY_MOVES_MAX - len(moves))
    if found:
        back = Translation(moves)
        # What a moved directory took along and gave back is where it was: no operation says that (spec B-37).
        moves |= {path: back(source) for path, source in found.items() if back(source) != path}
        base, moved_load = _after_moves(old, moves, load)
        changes = _compare(base, new, moved_load)
    return _operations(changes, moves, old, load, moved_load, hints)


@dataclass(slots=True)
class _Changes:
    """How two trees differ: paths in order, with the entry before, after, or both."""

    created: list[tuple[str, Entry]] = field(default_factory=list)
    deleted: list[tuple[str, Entry]] = field(default_factory=list)
    updated: list[tuple[str, Entry, Entry]] = field(default_factory=list)
    replaced: list[tuple[str, Entry, Entry]] = field(default_factory=list)
    """Of another kind than before."""


class Translation:
    """Replaces the longest leading directory of a path that is a key, by that key's value."""

    def __init__(self, moves: Mapping[str, str]) -> None:
        self._moves = moves

    def __call__(self, path: str) -> str:
        """Return the path after the replacement, or as it is."""
        head, tail = path, ""
        while self._moves and head:
            if head in self._moves:
                return self._moves[head] + tail
            head, slash, name = head.rpartition("/")
            tail = slash + name + tail
        return path


def moved_since(earlier: Mapping[str, str], later: Mapping[str, str]) -> dict[str, str]:
    """Return new path -> first path of directories, where both say new path -> path before, one after the other."""
    back, forward = Translation(earlier), Translation({source: path for path, source in later.items()})
    pairs = [(forward(path), source) for path, source in earlier.items()]
    pairs += [(path, back(source)) for path, source in later.items()]
    # What took the place of something that had moved away before was not there at first.
    first = {source: path for path, source in reversed(pairs) if path != source}
    return {path: source for source, path in first.items()}


def _hinted_moves(old: bytes, new: bytes, load: Loader, hints: Mapping[str, str]) -> dict[str, str]:
    """Keep those hints that say a directory of the old tree is now a directory elsewhere in the new one."""
    if not hints:
        return {}
    moves: dict[str, str] = {}
    sources: set[str] = set()
    old_tree, new_tree = Tree(old, load), Tree(new, load)
    for path, source in sorted(hints.items()):
        if path == source or source in sources or len(moves) >= DIRECTORY_MOVES_MAX:
            continue
        before, after = old_tree.get(source), new_tree.get(path)
        if before and after and before.kind is Kind.DIRECTORY and after.kind is Kind.DIRECTORY:
            moves[path] = source
            sources.add(source)
    back = Translation(moves)
    return {path: source for path, source in moves.items() if not _is_implied(path, source, back)}


def _is_implied(path: str, source: str, back: Translation) -> bool:
    """Tell whether the move of a folder above already brings a directory to its place."""
    folder, slash, name = path.rpartition("/")
    return back(folder) + slash + name == source


def _after_moves(old: bytes, moves: Mapping[str, str], load: Loader) -> tuple[bytes, Loader]:
    """Return the tree after the directory moves alone, and a loader that knows its objects."""
    if not moves:
        return old, load
    tree = Tree(old, load)
    sources = sorted(moves.items(), key=lambda move: move[1].count("/"), reverse=True)
    taken = {path: tree.detach(source) for path, source in sources}
    for path in sorted(taken, key=lambda path: path.count("/")):
        detached = taken[path]
        if detached is not None:
            tree.attach(path, detached)
    bodies: dict[bytes, bytes] = {}
    root = tree.freeze(bodies.__setitem__)
    overlay = {digest: decode_directory(body) for digest, body in bodies.items()}
    return root, lambda digest: overlay[digest] if digest in overlay else load(digest)


def _compare(old: bytes, new: bytes, load: Loader) -> _Changes:
    changes = _Changes()
    _compare_into(changes, old, new, "", load)
    return changes


def _compare_into(changes: _Changes, old: bytes, new: bytes, prefix: str, load: Loader) -> None:
    left = {entry.name: entry for entry in entries_of(old, load)}
    for entry in entries_of(new, load):
        before = left.pop(entry.name, None)
        if before is None:
            changes.created.append((prefix + entry.name, entry))
        elif before == entry:
            continue
        elif before.kind is not entry.kind:
            changes.replaced.append((prefix + entry.name, before, entry))
        elif entry.kind is Kind.DIRECTORY:
            _compare_into(changes, before.digest, entry.digest, f"{prefix}{entry.name}/", load)
        else:
            changes.updated.append((prefix + entry.name, before, entry))
    changes.deleted.extend((prefix + name, entry) for name, entry in left.items())


def _moves_by_digest(changes: _Changes, load: Loader, *, room: int) -> dict[str, str]:
    """Pair created directories with deleted ones of the same digest, outermost first; empty ones are not paired."""
    fresh = [(path, entry) for path, entry in changes.created if entry.kind is Kind.DIRECTORY]
    gone = [(path, entry) for path, entry in changes.deleted if entry.kind is Kind.DIRECTORY]
    if not fresh or not gone:
        return {}
    by_digest: dict[bytes, list[str]] = {}
    for top, entry in gone:
        by_digest.setdefault(entry.digest, []).append(top)
        for path, inner in walk(entry.digest, load, top + "/"):
            if inner.kind is Kind.DIRECTORY:
                by_digest.setdefault(inner.digest, []).append(path)
    by_digest.pop(EMPTY_ROOT, None)
    moves: dict[str, str] = {}
    used = _Used()
    queue = deque(fresh)
    while queue and len(moves) < room:
        path, entry = queue.popleft()
        source = next((s for s in by_digest.get(entry.digest, ()) if used.is_apart(s)), None)
        if source is not None:
            moves[path] = source
            used.add(source)
        else:
            below = entries_of(entry.digest, load)
            queue.extend((f"{path}/{e.name}", e) for e in below if e.kind is Kind.DIRECTORY)
    return moves


class _Used:
    """The sources that were taken; another one must neither hold nor lie in any of them."""

    def __init__(self) -> None:
        self._paths: set[str] = set()
        self._above: set[str] = set()

    def add(self, path: str) -> None:
        self._paths.add(path)
        self._above.update(_ancestors(path))

    def is_apart(self, path: str) -> bool:
        taken = path in self._paths or path in self._above
        return not taken and self._paths.isdisjoint(_ancestors(path))


def _ancestors(path: str) -> Iterator[str]:
    while path := path.rpartition("/")[0]:
        yield path


def _operations(
    changes: _Changes,
    moves: Mapping[str, str],
    old: bytes,
    load: Loader,
    moved_load: Loader,
    hints: Mapping[str, str],
) -> list[Operation]:
    """Write changes as operations: moves, deletions in the way, new directories, moved files, deletions, the rest."""
    before = Tree(old, load)
    operations = [_moved_directory(path, source, before.get(source)) for path, source in sorted(moves.items())]
    operations += [_deleted(path, before) for path, before, _ in changes.replaced]
    # The new entries are walked again for each use rather than held: they may be the whole tree.
    folders = ((path, entry) for path, entry in _expanded(changes, load) if entry.kind is Kind.DIRECTORY)
    operations += [_created(path, entry) for path, entry in folders]
    moved, moved_from = _moved_files(changes, moves, load, moved_load, hints)
    operations += moved
    operations += [_deleted(path, entry) for path, entry in changes.deleted if path not in moved_from]
    arrived = {operation.path for operation in moved}
    fresh = ((path, entry) for path, entry in _expanded(changes, load) if entry.kind is not Kind.DIRECTORY)
    operations += [_created(path, entry) for path, entry in fresh if path not in arrived]
    operations += [_updated(path, before, entry) for path, before, entry in changes.updated]
    return operations


def _moved_files(
    changes: _Changes, moves: Mapping[str, str], load: Loader, moved_load: Loader, hints: Mapping[str, str]
) -> tuple[list[Operation], set[str]]:
    """Pair created files with deleted ones; return the moves, and the paths that they came from."""
    if not changes.deleted:
        return [], set()
    wanted = {entry.digest for _, entry in _expanded(changes, load) if entry.kind is Kind.FILE}
    sources = _file_sources(changes, wanted, moved_load)
    back = Translation(moves)
    moved_from: set[str] = set()
    operations = []
    for path, entry in _expanded(changes, load) if sources else ():
        source = _pick(sources.get(entry.digest), path, entry, hints, back) if entry.kind is Kind.FILE else None
        if source is not None:
            moved_from.add(source)
            operations.append(_moved_file(path, back(source), entry))
    return operations, moved_from


def _expanded(changes: _Changes, load: Loader) -> Iterator[tuple[str, Entry]]:
    for path, entry in (*changes.created, *((path, after) for path, _, after in changes.replaced)):
        yield path, entry
        if entry.kind is Kind.DIRECTORY:
            yield from walk(entry.digest, load, path + "/")


def _file_sources(changes: _Changes, wanted: set[bytes], load: Loader) -> dict[bytes, dict[str, None]]:
    """Index the deleted files by digest, as far as a created file has that digest."""
    sources: dict[bytes, dict[str, None]] = {}
    if not wanted:
        return sources
    for top, entry in changes.deleted:
        below = walk(entry.digest, load, top + "/") if entry.kind is Kind.DIRECTORY else ()
        for path, inner in ((top, entry), *below):
            if inner.kind is Kind.FILE and inner.digest in wanted:
                sources.setdefault(inner.digest, {})[path] = None
    return sources


def _pick(
    candidates: dict[str, None] | None, path: str, entry: Entry, hints: Mapping[str, str], back: Translation
) -> str | None:
    """Choose and use up the deleted file that a created one came from: same inode, same name, same parent, any."""
    if not candidates:
        return None
    folder, _, name = path.rpartition("/")

    def others() -> Iterator[str]:
        return (source for source in candidates if back(source) != path)  # as with directories (spec B-37)

    hinted = next((source for source in others() if back(source) == hints[path]), None) if path in hints else None
    same_name = (source for source in others() if source.rpartition("/")[2] == name)
    same_folder = (source for source in others() if source.rpartition("/")[0] == folder)
    chosen = hinted or next(same_name, None) or next(same_folder, None) or next(others(), None)
    if chosen is None or (entry.size == 0 and chosen != hinted):
        return None  # every empty file has this digest: without the inode's word it is no move
    del candidates[chosen]
    return chosen


def _moved_directory(path: str, source: str, before: Entry | None) -> Operation:
    base = before.digest.hex() if before else None
    return Operation(operation=Verb.MOVED, kind=Kind.DIRECTORY, path=path, source_path=source, base=base)


def _moved_file(path: str, source: str, entry: Entry) -> Operation:
    digest = entry.digest.hex()
    return Operation(
        operation=Verb.MOVED,
        kind=Kind.FILE,
        path=path,
        source_path=source,
        base=digest,
        digest=digest,
        size=entry.size,
        executable=entry.executable,
        mtime_ns=entry.mtime_ns,
    )


def _created(path: str, entry: Entry, verb: Verb = Verb.CREATED, base: str | None = None) -> Operation:
    if entry.kind is Kind.FILE:
        return Operation(
            operation=verb,
            kind=Kind.FILE,
            path=path,
            base=base,
            digest=entry.digest.hex(),
            size=entry.size,
            executable=entry.executable,
            mtime_ns=entry.mtime_ns,
        )
    return Operation(operation=verb, kind=entry.kind, path=path, target=entry.target or None)


def _updated(path: str, before: Entry, entry: Entry) -> Operation:
    return _created(path, entry, Verb.UPDATED, before.digest.hex() or None)


def _deleted(path: str, entry: Entry) -> Operation:
    base = entry.digest.hex() if entry.kind is Kind.FILE else None
    return Operation(operation=Verb.DELETED, kind=entry.kind, path=path, base=base)


def cut(
    operations: Iterable[Operation],
    content_size: Callable[[Operation], int],
    *,
    max_operations: int,
    max_bytes: int,
) -> Iterator[list[Operation]]:
    """Cut a delta into runs for one bundle each; every run applies to the tree that the one before it left (spec B-46).

    content_size: bytes of content that an operation adds to its bundle. Content larger than max_bytes shares its run
    with no other content; the directory moves at the head of the list are never parted.
    """
    run: list[Operation] = []
    total = 0
    moved: dict[str, str] = {}
    forward: Translation | None = None
    for operation in operations:
        size = content_size(operation)
        is_bound = operation.operation is Verb.MOVED and operation.kind is Kind.DIRECTORY
        if is_bound:
            moved[operation.source_path or ""] = operation.path
        elif run and (len(run) >= max_operations or (size and total and total + size > max_bytes)):
            yield run
            run, total, forward = [], 0, Translation(moved)
        if forward is not None and operation.source_path is not None:
            # the directories have moved in an earlier bundle: the tree before this one has them at their new place
            operation = msgspec.structs.replace(operation, source_path=forward(operation.source_path))
        run.append(operation)
        total += size
    if run:
        yield run
