"""What `status` shows: a few rows of the client's state, read without a scan, beside what the server says."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Protocol

import msgspec

from deltasync.client import outbox
from deltasync.client.state import State
from deltasync.core import wire


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
    outbox_bytes: int
    """Bytes of the bundle files that wait for the server."""
    kept: int
    """Bundle files that are kept although they were sent."""
    no_delete: bool
    """Whether the last push left on the server what is gone here."""
    compared_root: str
    """The tree that the server should hold: with no_delete, what was sent and is gone here is a part of it."""


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
        outbox_bytes=_file_bytes(state.folder / outbox.FOLDER, [row.file for row in pending]),
        kept=len(outbox.kept(state)),
        no_delete=has_no_delete,
        compared_root=wanted.hex(),
    )


def server(receiver: Asked, workspace: str) -> Server:
    """Ask for the server's half; one request."""
    answer = receiver.workspace(workspace)
    return Server(
        url=receiver.url,
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
    )


def together(workspace: str, here: Local | None, there: Server | None) -> Status:
    """Return both halves and whether they are equal."""
    in_sync = None
    if here is not None and there is not None:
        in_sync = here.compared_root == there.root and not here.waiting and not there.wanted
    return Status(workspace=workspace, local=here, server=there, in_sync=in_sync)


def _file_bytes(folder: Path, names: list[str | None]) -> int:
    total = 0
    for name in filter(None, names):
        with contextlib.suppress(OSError):
            total += (folder / name).stat().st_size
    return total
