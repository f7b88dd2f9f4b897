"""Returns: what a job leaves becomes a pinned sequence of a workspace for its client (spec J-60 to J-63)."""

from __future__ import annotations

import io
import logging
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from itertools import accumulate, islice
from typing import Protocol

import msgspec

from deltasync.core import bundle, delta
from deltasync.core.bundle import Metadata
from deltasync.core.errors import DeltasyncError, NotOwner
from deltasync.core.jobs import LEFT_MAX, JobRequest, LeftOutput, LeftOutputs, Returned
from deltasync.core.manifest import EMPTY_ROOT, Entry, Kind, Operation, decode_directory
from deltasync.core.names import WorkspaceName
from deltasync.core.tree import Detached, Tree, walk_behind
from deltasync.disk import Folder
from deltasync_server.jobs import strays
from deltasync_server.jobs.contents import Contents
from deltasync_server.jobs.outputs import FILE_BYTES_MAX, Gathered, Gathering
from deltasync_server.receive import Store
from deltasync_server.state import HOST, head_of, loader, pinned, workspace_rows
from deltasync_server.tenants import Tenant, own_name, qualified

_log = logging.getLogger(__name__)
_one_at_a_time = threading.Lock()
"""Held from the look at a head until the sequence behind it is pinned: two jobs may end at once."""


class JobLike(Protocol):
    """What is asked of a job."""

    @property
    def id(self) -> str:
        """Its id."""

    @property
    def tenant(self) -> Tenant:
        """Whose it is."""

    @property
    def client_id(self) -> str:
        """Who gets what it returns."""

    @property
    def request(self) -> JobRequest:
        """What was asked for."""


def collect(
    store: Store,
    job: JobLike,
    session: Folder,
    staged: Mapping[str, bytes],
    *,
    file_bytes: int = FILE_BYTES_MAX,
    should_stop: Callable[[], None] = lambda: None,
    staged_ns: int = 0,
    is_well: bool = True,
) -> Returned | None:
    """Return what a job left, pinned; None where there is nothing, and nothing to say. Its processes are dead.

    staged: the digests that the files of `in_place` inputs had, by their places (a folder's file by file). file_bytes:
    of one output (spec J-33). should_stop: may raise, between two files. staged_ns: when its inputs were there, by the
    session's file system; 0 where it has none. is_well: the command ended with 0: what it wrote elsewhere is told then,
    also where nothing comes home. Raises NoSpace: then nothing is returned.
    """
    with Contents(store, job.tenant, should_stop) as contents:
        found = Gathering(session, contents, file_bytes=file_bytes).run(job.request, staged)
        if is_well or found.places or found.problems:  # what a failed command left is looked at where it may be fetched
            found.strays = strays.of(session, job.request, staged, staged_ns, should_stop)
        if not (found.places or found.problems or found.strays):
            return None
        workspace = workspace_of(job.client_id)
        if not found.places:  # nothing to fetch: what is wrong is all there is to say
            return _returned(workspace, 0, EMPTY_ROOT, found)
        objects: dict[bytes, bytes] = {}
        root = _tree(found.entries).freeze(objects.__setitem__)
        with _one_at_a_time:  # while the contents are leased
            sequence = _pinned(store, qualified(job.tenant, workspace), root, objects)
    return _returned(workspace, sequence, root, found)


def again(store: Store, job: JobLike, former: Returned | None) -> Returned | None:
    """Return what another job of the tenant left, pinned for this one; its tree must be kept (spec J-79)."""
    if former is None or not former.places:
        return former
    workspace = workspace_of(job.client_id)
    with _one_at_a_time:
        sequence = _pinned(store, qualified(job.tenant, workspace), bytes.fromhex(former.root), {})
    return msgspec.structs.replace(former, workspace=workspace, sequence=sequence)


def left(store: Store, job: JobLike, returned: Returned | None, after: str) -> LeftOutputs:
    """Return a page of what a job left, behind a path (spec J-68); of what the host let go of, the places alone."""
    if returned is None:
        return LeftOutputs(outputs=[], waits=False)
    name = qualified(job.tenant, WorkspaceName(returned.workspace))
    with store.state.snapshot() as db:  # what is pinned in it is whole
        waits = returned.sequence in pinned(db, name)
        if waits:
            told = _told(returned, walk_behind(bytes.fromhex(returned.root), loader(db), after))
        else:
            places = sorted(returned.places, key=_parts)
            told = (LeftOutput(path=place) for place in places if _parts(place) > _parts(after))
        page = list(islice(told, LEFT_MAX + 1))
    is_last = len(page) <= LEFT_MAX
    return LeftOutputs(outputs=page[:LEFT_MAX], waits=waits, next=None if is_last else page[LEFT_MAX - 1].path)


def _told(returned: Returned, entries: Iterable[tuple[str, Entry]]) -> Iterator[LeftOutput]:
    """Yield the outputs among the entries of a tree: no folder that only leads to them."""
    places = set(returned.places)
    for path, entry in entries:
        if entry.kind is Kind.FILE:
            yield LeftOutput(path=path, kind=entry.kind, size=entry.size, digest=entry.digest.hex())
        elif not places.isdisjoint(accumulate(path.split("/"), "{}/{}".format)):
            yield LeftOutput(path=path, kind=entry.kind)


def _parts(path: str) -> list[str]:
    return path.split("/") if path else []


def release(store: Store, tenant: Tenant, returned: Returned | None) -> None:
    """Let go of what a job of a tenant returned, if it is still held (spec J-63)."""
    if returned is None or not returned.sequence:
        return
    name = qualified(tenant, WorkspaceName(returned.workspace))
    with _one_at_a_time:
        store.unpin(name, returned.sequence)
        _empty(store, name)


def release_others(store: Store, held: Iterable[tuple[Tenant, Returned]]) -> None:
    """Let go of what no job names, because the server died before it could; for a start (spec J-63).

    held: what jobs have returned that nobody acknowledged, and whose it is.
    """
    named = {(qualified(tenant, WorkspaceName(each.workspace)), each.sequence) for tenant, each in held}
    with _one_at_a_time:
        with store.state.read() as db:
            returns = {WorkspaceName(row.name): pinned(db, row.name) for row in workspace_rows(db) if row.is_of_returns}
        for name, sequences in returns.items():
            for sequence in sequences:
                if (name, sequence) not in named:
                    store.unpin(name, sequence)
            _empty(store, name)


def workspace_of(client_id: str) -> WorkspaceName:
    """Return the name of the workspace that a client's returns are sequences of (spec J-61)."""
    return WorkspaceName(f"returns-{client_id[:8]}")


def _returned(workspace: str, sequence: int, root: bytes, found: Gathered) -> Returned:
    files = [entry for entry in found.entries.values() if entry.kind is Kind.FILE]
    return Returned(
        workspace=workspace,
        sequence=sequence,
        root=root.hex(),
        files=len(files),
        bytes=sum(entry.size for entry in files),
        places=found.places,
        problems=found.troubles(),
    )


def _tree(entries: Mapping[str, Entry]) -> Tree:
    """Return the tree of some entries; the folders that lead to them come into being."""
    tree = Tree(EMPTY_ROOT, lambda digest: [])
    for place, entry in entries.items():
        above = place.rpartition("/")[0]
        if not tree.put(above, entry):
            tree.attach(place, Detached(entry, None))
    return tree


def _empty(store: Store, name: WorkspaceName) -> None:
    """Have a head that nobody holds name nothing: its content is free then, as that of the sequences before it."""
    with store.state.read() as db:
        head = head_of(db, name)
        is_held = head.root == EMPTY_ROOT or head.sequence in pinned(db, name)
    if is_held:
        return
    try:
        _send(store, name, EMPTY_ROOT, {})
    except DeltasyncError as error:  # the next return, or the next start, does it
        _log.warning("what %s returned last is still held: %s", name, error)


def _pinned(store: Store, name: WorkspaceName, root: bytes, objects: Mapping[bytes, bytes]) -> int:
    """Have a tree as the next sequence, which stays until it is released."""
    sequence = _send(store, name, root, objects)
    try:
        store.pin(name, sequence)
    except DeltasyncError:  # too many wait to be acknowledged
        _empty(store, name)
        raise
    return sequence


def _send(store: Store, name: WorkspaceName, root: bytes, objects: Mapping[bytes, bytes]) -> int:
    """Have the store receive bundles without content that lead from the head to a root; returns the last sequence."""
    with store.state.read() as db:
        head, stored = head_of(db, name), loader(db)
        if head.client_id not in ("", HOST):
            raise NotOwner(f"the workspace {own_name(name)} is a client's; have its owner push it under another name")
        known = dict(objects)

        def load(digest: bytes) -> list[Entry]:
            return decode_directory(known[digest]) if digest in known else stored(digest)

        most = store.config.limits.bundle_operations
        operations = delta.diff(head.root, root, load)
        runs = list(delta.cut(operations, lambda operation: 0, max_operations=most, max_bytes=1)) or [[]]
        composed: list[Metadata] = []
        before, epoch = head.root, head.epoch or uuid.uuid4().hex
        for number, run in enumerate(runs, start=head.sequence + 1):
            applied = delta.apply(before, run, load)
            known.update(applied.objects)
            composed.append(_composed(name, epoch, number, run, (before, applied.root)))
            before = applied.root
    for metadata in composed:
        sealed = b"".join(bundle.seal(metadata, (), lambda operation: ()))
        source = io.BytesIO(sealed)
        gives_back = root == EMPTY_ROOT
        store.receive(name, source, expected_identity=metadata.identity, gives_back=gives_back, may_be_host=True)
    return head.sequence + len(runs)


def _composed(
    name: WorkspaceName, epoch: str, sequence: int, operations: list[Operation], roots: tuple[bytes, bytes]
) -> Metadata:
    return bundle.compose(
        operations,
        workspace=own_name(name),
        workspace_path="",
        epoch=epoch,
        sequence=sequence,
        parent_root=roots[0],
        root=roots[1],
        client_id=HOST,
        bundle_id=str(uuid.uuid4()),
        created_at=datetime.now(UTC),
    )
