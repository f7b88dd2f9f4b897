"""What `status` shows: a few rows of the client's state, read without a scan, beside what the server says."""

from __future__ import annotations

import contextlib
import os
from itertools import islice
from pathlib import Path
from typing import Protocol

import msgspec

from deltasync.client import outbox, parts
from deltasync.client.address import is_exposed, is_folder
from deltasync.client.ignore import GITIGNORE_FILE, IGNORE_FILE
from deltasync.client.moves import joined
from deltasync.client.state import State
from deltasync.core import wire
from deltasync.core.errors import GuardStopped
from deltasync.core.manifest import EMPTY_ROOT, Entry, Kind, Operation
from deltasync.core.names import RESERVED, shown
from deltasync.core.tree import find

_RULE_FILES = (IGNORE_FILE, GITIGNORE_FILE)


class Local(msgspec.Struct, frozen=True, kw_only=True):
    """The client's half."""

    sequence: int
    """The last sealed bundle."""
    root: str
    """The tree as it was last observed."""
    pending: int
    """Sealed bundles that the server has not acknowledged."""
    waiting: int
    """Files that are still being written."""
    changed: bool
    """Whether the observed tree differs from the sealed one."""
    problems: int
    files: int
    bytes: int
    epoch: str
    acknowledged_sequence: int
    acknowledged_at: str | None
    pending_bytes: int
    """Content that those bundles carry."""
    outbox_bytes: int
    """Bytes of the bundle files that wait for the server."""
    kept: int
    """Bundle files that are kept although they were sent."""
    no_delete: bool
    """Whether the last push left on the server what is gone here."""
    in_parts: list[parts.Sent]
    """Large files on their way: how many parts of each the server has."""
    compared_root: str
    """The tree that the server should hold: with no_delete, what was sent and is gone here is a part of it."""
    held_back: int = 0
    """Paths with a problem whose former state stands on the server: what they are here is not there."""
    blocked: bool = False
    """Whether all that changed is held back, so that a push has nothing to seal."""
    guard: str | None = None
    """What stops a push as a whole, and which flag lets it go on. `examined` fills in this and the two above."""


class Server(msgspec.Struct, frozen=True, kw_only=True):
    """The server's half."""

    url: str
    sequence: int
    root: str
    tree_sequence: int | None
    last_applied_at: str | None
    tree_path: str
    files: int
    bytes: int
    lag: int
    epoch: str
    wanted: int
    """Blobs that were found damaged and that the next push sends again."""
    usage: wire.Usage | None = None
    """What is held there in all, and may be; None where the server does not say."""
    insecure: bool = False
    """Whether everybody on the way can read and change what is sent."""


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """Both halves: the members of `status --json`."""

    workspace: str
    local: Local | None
    server: Server | None
    in_sync: bool | None
    """Whether both trees are known to be equal; None while one of them is not known."""


class Asked(Protocol):
    """What is asked of a receiver."""

    url: str

    def workspace(self, name: str, *, tree_sequence: int | None = None, wait: float = 0.0) -> wire.WorkspaceState:
        """Return a workspace's head."""


def local(state: State) -> Local:
    """Return the client's half; its cost does not grow with the workspace."""
    head, pending = outbox.head(state), outbox.pending(state)
    observed = state.observed_root()
    has_no_delete, wanted = outbox.has_no_delete(state), observed
    if has_no_delete:
        from deltasync.client.seal import united

        wanted, _ = united(observed, head.sealed_root, state.load)
    files, size = state.counts()
    problems, waiting = state.db.execute(
        "SELECT count(*) - total(waiting != 0), total(waiting != 0) FROM problems"
    ).fetchone()
    return Local(
        sequence=head.sealed_sequence,
        root=observed.hex(),
        pending=len(pending),
        waiting=int(waiting),
        changed=wanted != head.sealed_root,
        problems=int(problems),
        files=files,
        bytes=size,
        epoch=head.epoch,
        acknowledged_sequence=head.acknowledged_sequence,
        acknowledged_at=head.acknowledged_at,
        pending_bytes=sum(row.content_bytes for row in pending),
        outbox_bytes=_file_bytes(state.folder / outbox.FOLDER, [row.file for row in pending]),
        kept=len(outbox.kept(state)),
        no_delete=has_no_delete,
        in_parts=parts.sent(state),
        compared_root=wanted.hex(),
    )


def examined(state: State, here: Local) -> Local:
    """Return the client's half with what keeps a push back; it costs as much as there are changes and problems."""
    held_back, guard, operations = _held_back(state), _obstacle(state), list[Operation]()
    if here.changed and not here.no_delete:
        from deltasync.client import seal
        from deltasync.core.delta import diff

        base = state.sealed_root()
        operations = diff(base, state.observed_root(), state.load, state.renames())
        try:
            seal.guard(operations, base, state.load, is_resync=False)
        except GuardStopped as stopped:
            guard = guard or stopped.sentence
    is_blocked = bool(operations) and all(each.path in held_back for each in operations)
    return msgspec.structs.replace(here, held_back=len(held_back), blocked=is_blocked, guard=guard)


def _held_back(state: State) -> set[str]:
    """Return the paths that have a problem, and are in the observed tree all the same: their former entry stands."""
    found: set[str] = set()
    folders: dict[str, set[str]] = {}
    for folder, path in state.db.execute("SELECT folder, path FROM problems WHERE waiting = 0"):
        folders.setdefault(folder, set()).add(path)
    root = state.observed_root()
    for folder, paths in folders.items():
        entry = find(root, folder, state.load) if folder else Entry("", Kind.DIRECTORY, digest=root)
        if entry is not None and folder and shown(folder) in paths:
            found.add(folder)
        entries = state.load(entry.digest) if entry is not None and entry.kind is Kind.DIRECTORY else ()
        # A link in place of an ignore file is a problem of its rules; the link itself is carried.
        odd = (each for each in entries if each.kind is not Kind.SYMLINK or each.name not in _RULE_FILES)
        found.update(path for each in odd if shown(path := joined(folder, each.name)) in paths)
    return found


def _obstacle(state: State) -> str | None:
    """Say why the folder as it is now cannot be looked at, or is taken for lost; only its first names are read."""
    if state.observed_root() == EMPTY_ROOT or outbox.has_no_delete(state):
        return None
    try:
        with os.scandir(state.root) as entries:
            names = {entry.name for entry in islice(entries, 3)}
        status = state.root.stat()
    except OSError as error:
        return f"{shown(str(state.root))} cannot be read ({error.strerror}); nothing is taken for deleted"
    ours = {RESERVED} | ({state.folder.name} if state.folder.resolve().parent == state.root else set())
    if names - ours:
        return None
    from deltasync.client.scan import emptied

    return emptied(state, status).sentence


def server(receiver: Asked, workspace: str) -> Server:
    """Ask for the server's half; one request."""
    answer = receiver.workspace(workspace)
    return Server(
        url=receiver.url,
        insecure=is_exposed(receiver.url),
        sequence=answer.sequence,
        root=answer.root,
        tree_sequence=answer.tree_sequence,
        last_applied_at=answer.last_applied_at,
        tree_path=answer.tree_path,
        files=answer.files,
        bytes=answer.content_bytes,
        lag=answer.lag,
        epoch=answer.epoch,
        wanted=len(answer.wanted),
        usage=answer.usage,
    )


def together(workspace: str, here: Local | None, there: Server | None) -> Status:
    """Return both halves and whether they are equal."""
    in_sync = None
    if here is not None and there is not None:
        is_known = not (here.waiting or here.held_back or here.guard)
        has_tree = there.tree_sequence == there.sequence or is_folder(there.url)
        in_sync = is_known and here.compared_root == there.root and not there.wanted and has_tree
    return Status(workspace=workspace, local=here, server=there, in_sync=in_sync)


def _file_bytes(folder: Path, names: list[str | None]) -> int:
    total = 0
    for name in filter(None, names):
        with contextlib.suppress(OSError):
            total += (folder / name).stat().st_size
    return total
