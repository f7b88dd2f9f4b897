"""The head and the outbox of a workspace: what was sealed, what was acknowledged, and the bundle files between."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from deltasync.client import opening, parts
from deltasync.client.address import folder_of, is_folder, normal_url
from deltasync.core.delta import moved_since
from deltasync.core.errors import HostUnreachable, UsageError
from deltasync.core.manifest import Kind, Verb
from deltasync.core.metadata import Metadata, parse_metadata
from deltasync.core.names import shown
from deltasync.core.part import Part
from deltasync.core.wire import Limits
from deltasync.db import transaction

if TYPE_CHECKING:
    from deltasync.client.state import State

FOLDER = "outbox"
LIMIT_BYTES = 2 * 2**30
PENDING, KEPT = "pending", "kept"
_NO_DELETE, _MOUNT, _KEEP = "no_delete", "folder_mount", "keep_sent"
_DISCARDED = "discarded"
_DISCARDED_MAX = 16
_COLUMNS = "sequence, epoch, identity, parent_root, root, file, left_machine, state, content_bytes, sealed_at"


@dataclass(frozen=True, slots=True)
class HeadRow:
    """Where the workspace stands: what was sealed last, and what the server acknowledged last."""

    workspace: str | None
    url: str | None
    epoch: str
    sealed_sequence: int
    sealed_root: bytes
    acknowledged_sequence: int
    acknowledged_root: bytes
    acknowledged_at: str | None
    server_tree_sequence: int | None


@dataclass(frozen=True, slots=True)
class OutboxRow:
    """One sealed bundle, without its metadata: pending until acknowledged, then kept as a file or gone."""

    sequence: int
    epoch: str
    identity: bytes
    parent_root: bytes
    root: bytes
    file: str | None
    """The name of its file in the outbox folder."""
    left_machine: bool
    state: str
    content_bytes: int
    sealed_at: str


class Past(msgspec.Struct, frozen=True, array_like=True):
    """A point of a history: a server that stands there is one that we know."""

    epoch: str
    sequence: int
    root: str


_pasts = msgspec.json.Decoder(list[Past])


def head(state: State) -> HeadRow:
    """Return where the workspace stands."""
    columns = ", ".join(HeadRow.__slots__)
    return HeadRow(*state.db.execute(f"SELECT {columns} FROM head WHERE id = 1").fetchone())


def bind(state: State, workspace: str, url: str | None) -> HeadRow:
    """Remember the workspace's name and its server; raises UsageError for another one than before.

    url: None when there is no server yet. The name is free until the first bundle is sealed, which carries it; the
    server is free until one has acknowledged a bundle.
    """
    row, url = check_bound(state, workspace, url), url and normal_url(url)
    if (row.workspace, row.url) != (workspace, url or row.url):
        opening.remember(state.folder, workspace, url or row.url)
        with state.writing():
            state.db.execute("UPDATE head SET workspace = ?, url = coalesce(?, url)", (workspace, url))
    return head(state)


def check_bound(state: State, workspace: str, url: str | None) -> HeadRow:
    """Return the head, or raise UsageError when the folder belongs to another name or server."""
    row, url = head(state), url and normal_url(url)
    if url is not None and is_folder(url):
        opening.refuse_inside(folder_of(url), state.root)
    if row.workspace not in (None, workspace) and row.sealed_sequence:
        raise UsageError(f"this folder is the workspace {shown(row.workspace or '')}, not {shown(workspace)}")
    if url is not None and row.url not in (None, url) and row.acknowledged_sequence:
        raise UsageError(
            f"this folder is synced to {shown(row.url or '')}; it cannot be synced to {shown(url)} as well; if that is "
            f"its new address, or a new server, remove {shown(str(state.folder / 'state.db'))} "
            "and push again with this --to"
        )
    return row


def note_mount(state: State, url: str) -> None:
    """Remember where the disk is mounted that holds a folder of bundles; nothing is remembered of the root's."""
    path = folder_of(url).resolve()
    mount = next((str(each) for each in (path, *path.parents[:-1]) if each.is_mount()), None)
    if state.get_meta(_MOUNT) != mount:
        with state.writing():
            state.set_meta(_MOUNT, mount)


def require_mount(state: State) -> None:
    """Raise HostUnreachable where the disk that bundles went to is not there: an empty folder is all that is left."""
    mount = state.get_meta(_MOUNT)
    if mount is not None and not Path(mount).is_mount():
        raise HostUnreachable(
            f"nothing is mounted at {shown(mount)}, where the bundles of this workspace went; mount the disk and try "
            f"again (if they are to go to a folder without one, remove {shown(str(state.folder / 'state.db'))} first)"
        )


def note_no_delete(state: State, is_so: bool) -> None:
    """Remember whether the last push left on the server what is gone here (`--no-delete`)."""
    if has_no_delete(state) != is_so:
        with state.writing():
            state.set_meta(_NO_DELETE, "1" if is_so else None)


def has_no_delete(state: State) -> bool:
    """Tell whether the last push left on the server what is gone here: trees are compared over what was sent."""
    return state.get_meta(_NO_DELETE) is not None


def folder(state: State) -> Path:
    """Return the folder of bundle files, made when needed."""
    path = state.folder / FOLDER
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def pending(state: State) -> list[OutboxRow]:
    """Return the sealed bundles that were not acknowledged, in order."""
    return _rows(state, PENDING)


def kept(state: State) -> list[OutboxRow]:
    """Return the acknowledged bundles that are kept as files, in order."""
    return _rows(state, KEPT)


def _rows(state: State, which: str) -> list[OutboxRow]:
    query = f"SELECT {_COLUMNS} FROM outbox WHERE state = ? ORDER BY sequence"
    rows = [OutboxRow(*values) for values in state.db.execute(query, (which,))]
    return [row for row in rows if which == PENDING or row.file]


def roots(state: State) -> set[bytes]:
    """Return the roots whose directory objects are still of use."""
    here = head(state)
    sealed = {root for row in pending(state) for root in (row.parent_root, row.root)}
    return sealed | {here.sealed_root, here.acknowledged_root}


def metadata_of(state: State, sequence: int) -> Metadata:
    """Return the metadata of a pending bundle."""
    query = "SELECT manifest, operations, hashes FROM outbox WHERE sequence = ?"
    manifest, operations, hashes = state.db.execute(query, (sequence,)).fetchone()
    return parse_metadata(manifest, operations, hashes, Limits())


def record_sealed(
    state: State,
    metadata: Metadata,
    objects: Mapping[bytes, bytes],
    *,
    content_bytes: int,
    file: str | None = None,
    part: Part | None = None,
    part_digest: bytes | None = None,
    named: Iterable[bytes] = (),
) -> None:
    """Record a sealed bundle and move the sealed root, as one transaction, before a byte of it is sent (spec S-10).

    objects: the directory objects of the tree after it. file: its name in the outbox folder, durable already.
    part: what it carries of a stream; part_digest: that of the stream, where it is known. named: the streams whose
    content it names.
    """
    manifest, root = metadata.manifest, bytes.fromhex(metadata.manifest.root)
    row = (
        manifest.sequence_number,
        manifest.epoch,
        metadata.identity,
        bytes.fromhex(manifest.parent_root),
        root,
        metadata.manifest_bytes,
        metadata.operations_bytes,
        metadata.hashes_bytes,
        file,
        0,
        PENDING,
        content_bytes,
        manifest.created_at,
    )
    with transaction(state.db):
        state.store(objects)
        # A bundle of a former history may be kept under this number: the new one takes its place.
        state.db.execute(f"INSERT OR REPLACE INTO outbox VALUES ({', '.join('?' * len(row))})", row)
        state.db.execute("UPDATE head SET sealed_sequence = ?, sealed_root = ?", (manifest.sequence_number, root))
        if part is not None:
            parts.note_sealed(state, manifest.sequence_number, part, part_digest)
            return
        parts.note_named(state, manifest.sequence_number, named)
        state.forget_renames()


def attach_file(state: State, sequence: int, file: str) -> None:
    """Record that a sealed bundle lies in the outbox folder as a file."""
    with state.writing():
        state.db.execute("UPDATE outbox SET file = ? WHERE sequence = ?", (file, sequence))


def mark_left(state: State, sequence: int) -> None:
    """Record that a bundle was handed out as a file: its number can never stand for another one in this epoch."""
    with state.writing():
        state.db.execute("UPDATE outbox SET left_machine = 1 WHERE sequence = ?", (sequence,))


def acknowledge(state: State, sequence: int, root: bytes, *, at: str | None, keep: bool) -> None:
    """Record that the server has applied everything up to a sequence (spec S-11, S-12).

    keep: bundles that are files stay, until `drop_old`.
    """
    files = [row.file for row in pending(state) if row.sequence <= sequence and row.file and not keep]
    with transaction(state.db):
        if keep:
            state.db.execute(
                "UPDATE outbox SET state = ?, manifest = x'', operations = x'', hashes = x'' "
                "WHERE sequence <= ? AND state = ? AND file IS NOT NULL",
                (KEPT, sequence, PENDING),
            )
        state.db.execute("DELETE FROM outbox WHERE sequence <= ? AND state = ?", (sequence, PENDING))
        parts.note_acknowledged(state, sequence)
        state.db.execute(
            "UPDATE head SET acknowledged_sequence = ?, acknowledged_root = ?, acknowledged_at = ?",
            (sequence, root, at),
        )
    _remove(state, files)


def note_tree(state: State, tree_sequence: int | None) -> None:
    """Record which sequence the server's plain tree holds."""
    if head(state).server_tree_sequence != tree_sequence:
        with state.writing():
            state.db.execute("UPDATE head SET server_tree_sequence = ?", (tree_sequence,))


def discard_from(state: State, sequence: int) -> None:
    """Take back the pending bundles from a sequence on, none of which was applied (spec S-13).

    The sealed root is again the one before them. A new epoch opens if one of them was a file that may have left.
    """
    rows = [row for row in pending(state) if row.sequence >= sequence]
    if not rows:
        return
    renames: dict[str, str] = {}
    for row in rows:
        moved = (each for each in metadata_of(state, row.sequence).operations if each.operation is Verb.MOVED)
        folders = {each.path: each.source_path or "" for each in moved if each.kind is Kind.DIRECTORY}
        renames = moved_since(renames, folders)
    with transaction(state.db):
        _drop_pending(state, rows)
        state.take_back(renames)
        state.db.execute(
            "UPDATE head SET sealed_sequence = ?, sealed_root = ?", (rows[0].sequence - 1, rows[0].parent_root)
        )
        if any(row.file or row.left_machine for row in rows):
            new_epoch(state)
    _remove(state, [row.file for row in rows if row.file])


def adopt(state: State, sequence: int, root: bytes, *, opens_epoch: bool) -> None:
    """Take the server's head for what was sealed and acknowledged last; pending bundles are discarded (spec S-14)."""
    rows = pending(state)
    with transaction(state.db):
        _drop_pending(state, rows)
        state.forget_renames()  # they lead to the tree that was sealed before
        state.db.execute(
            "UPDATE head SET sealed_sequence = ?, sealed_root = ?, acknowledged_sequence = ?, acknowledged_root = ?",
            (sequence, root, sequence, root),
        )
        if opens_epoch or any(row.file or row.left_machine for row in rows):
            new_epoch(state)
    _remove(state, [row.file for row in rows if row.file])


def _drop_pending(state: State, rows: list[OutboxRow]) -> None:
    if not rows:
        return
    fresh = [Past(row.epoch, row.sequence, row.root.hex()) for row in rows]
    remembered = [*_discarded(state), *fresh][-_DISCARDED_MAX:]
    state.set_meta(_DISCARDED, msgspec.json.encode(remembered).decode())
    state.db.execute("DELETE FROM outbox WHERE sequence >= ? AND state = ?", (rows[0].sequence, PENDING))
    parts.note_discarded(state, rows[0].sequence)


def new_epoch(state: State) -> str:
    """Open a new epoch: the next bundle begins another history."""
    epoch = secrets.token_hex(16)
    with state.writing():
        state.db.execute("UPDATE head SET epoch = ?", (epoch,))
    return epoch


def was_discarded(state: State, epoch: str, sequence: int, root: bytes) -> bool:
    """Tell whether a head is that of a bundle we took back: its last bytes were then still under way to the server."""
    return Past(epoch, sequence, root.hex()) in _discarded(state)


def _discarded(state: State) -> list[Past]:
    text = state.get_meta(_DISCARDED)
    return _pasts.decode(text) if text else []


def pending_bytes(state: State) -> int:
    """Return how many bytes the files of pending bundles take."""
    total = 0
    for row in pending(state):
        if row.file:
            with contextlib.suppress(FileNotFoundError):
                total += (state.folder / FOLDER / row.file).stat().st_size
    return total


def drop_old(state: State, keep_seconds: float, now: datetime) -> None:
    """Drop the kept bundles that are older than that, and every file in the outbox folder that no row names.

    keep_seconds: 0 where the user says nothing, which leaves what is kept as long as he said before.
    """
    if keep_seconds and state.get_meta(_KEEP) != f"{keep_seconds:g}":
        with state.writing():
            state.set_meta(_KEEP, f"{keep_seconds:g}")
    keep_seconds = keep_seconds or float(state.get_meta(_KEEP) or 0)
    oldest = (now.astimezone(UTC) - timedelta(seconds=keep_seconds)).isoformat(timespec="milliseconds")
    old = [row for row in kept(state) if row.sealed_at.removesuffix("Z") < oldest.removesuffix("+00:00")]
    if old:
        with state.writing():
            state.db.executemany("DELETE FROM outbox WHERE sequence = ?", [(row.sequence,) for row in old])
    path = state.folder / FOLDER
    if path.is_dir():
        named = {row.file for row in (*pending(state), *kept(state))}
        _remove(state, [entry.name for entry in path.iterdir() if entry.name not in named])


def _remove(state: State, files: list[str | None] | list[str]) -> None:
    """Remove bundle files; a row never names a file that was removed, so this comes after the commit."""
    for file in files:
        if file:
            with contextlib.suppress(OSError):
                (state.folder / FOLDER / file).unlink()
