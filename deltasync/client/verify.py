"""Verification: read every local file again, record nothing, and compare with what was recorded and with the server."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

from deltasync.client import outbox, resync
from deltasync.client.address import is_folder
from deltasync.client.reasons import paths_with
from deltasync.client.scan import Progress, ScanOptions, scan
from deltasync.client.seal import overlaid, united
from deltasync.client.state import Problem, State
from deltasync.core import wire
from deltasync.core.delta import diff
from deltasync.core.manifest import Kind, Operation, Verb
from deltasync.core.names import shown
from deltasync.core.tree import Tree

if TYPE_CHECKING:
    from deltasync.core.tree import Loader

DIFFERENCES_MAX = 1_000
"""How many paths an answer names."""


class Asked(Protocol):
    """What is asked of a receiver."""

    url: str

    def workspace(self, name: str, *, tree_sequence: int | None = None, wait: float = 0.0) -> wire.WorkspaceState:
        """Return a workspace's head."""

    def directory(self, name: str, digest: bytes) -> bytes:
        """Return the body of a directory object of the receiver's tree."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One path that would have to change on the server, and how."""

    operation: str
    path: str


@dataclass(frozen=True, slots=True)
class Verification:
    """What reading everything again showed."""

    root: str
    """The root of what is on disk now."""
    files: int
    bytes: int
    silent: list[str]
    """Files whose bytes changed although their size and time did not."""
    server: wire.WorkspaceState | None
    is_broken_promise: bool
    """The server holds another tree under the sequence that it acknowledged."""
    lost: list[str]
    """Paths of the server's tree whose content it says that it lost, one for each content."""
    differences: list[Difference]
    """How the server's tree differs from what is on disk, at most DIFFERENCES_MAX paths."""
    differing: int
    problems: list[Problem]
    seconds: float
    in_sync: bool | None
    """Whether both trees are equal, over what was sent after --no-delete, and whole; None without a server."""
    no_delete: bool


def verify(
    state: State, receiver: Asked | None, workspace: str, options: ScanOptions, progress: Progress | None = None
) -> Verification:
    """Read every file of a workspace and compare; neither the state nor the server is changed."""
    with state.scratch() as copy:  # a file that went bad must not pass for an edit
        known = scan(copy, replace(options, rehash=False)).root
        found = scan(copy, replace(options, rehash=True), progress=progress)
        server = receiver.workspace(workspace) if receiver is not None else None
        if receiver is not None and server is not None and not server.sequence and is_folder(receiver.url):
            outbox.require_mount(state)
        operations: list[Operation] = []
        lost: list[str] = []
        has_no_delete = outbox.has_no_delete(state)
        if receiver is not None and server is not None:
            load = _server_loader(copy, receiver, server, found.root)
            operations = _server_delta(server, found.root, load, no_delete=has_no_delete)
            lost = sorted(shown(path) for path in paths_with(set(server.wanted), resync.root_of(server), load).values())
        return Verification(
            root=found.root.hex(),
            files=found.files,
            bytes=found.size_bytes,
            silent=_silent(known, found.root, copy.load),
            server=server,
            is_broken_promise=server is not None and _breaks_promise(state, server),
            lost=lost,
            differences=[Difference(str(each.operation), shown(each.path)) for each in operations[:DIFFERENCES_MAX]],
            differing=len(operations),
            problems=found.problems,
            seconds=found.seconds,
            in_sync=None if server is None else not operations and not lost,
            no_delete=has_no_delete,
        )


def _silent(before: bytes, after: bytes, load: Loader) -> list[str]:
    """Return the files whose content differs between two readings while size and time are equal."""
    changed = [
        each
        for each in diff(before, after, load)
        if each.operation is Verb.UPDATED and each.kind is Kind.FILE and each.base != each.digest
    ]
    tree, silent = Tree(before, load), []
    for each in changed:
        entry = tree.get(each.path)
        if entry is not None and (entry.size, entry.mtime_ns) == (each.size, each.mtime_ns):
            silent.append(shown(each.path))
    return silent


def _breaks_promise(state: State, server: wire.WorkspaceState) -> bool:
    head = outbox.head(state)
    is_same = (server.epoch, server.sequence) == (head.epoch, head.acknowledged_sequence) and server.sequence > 0
    return is_same and server.root != head.acknowledged_root.hex()


def _server_loader(state: State, receiver: Asked, server: wire.WorkspaceState, root: bytes) -> Loader:
    """Return a loader that knows the server's tree; fetches the directories that are not known here."""
    base = resync.root_of(server)
    if base == root:
        return state.load
    fetched = resync.fetch_tree(receiver, server.workspace, base, partial(resync.known_body, state))
    return overlaid(state.load, fetched)


def _server_delta(server: wire.WorkspaceState, root: bytes, load: Loader, *, no_delete: bool) -> list[Operation]:
    """Return the operations from the server's tree to what it should hold."""
    base = resync.root_of(server)
    if no_delete and base != root:
        root, objects = united(root, base, load)
        load = overlaid(load, objects)
    return diff(base, root, load)
