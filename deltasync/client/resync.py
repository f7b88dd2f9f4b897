"""Meeting the server: is its head one that we know, and if not, what tree does it hold (spec S-12, S-14)."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from deltasync.client import outbox
from deltasync.core.errors import NotADeltasyncServer, NotOwner, Refused
from deltasync.core.hashing import directory_digest
from deltasync.core.manifest import EMPTY_ROOT, Entry, Kind, parse_directory
from deltasync.core.metadata import SEQUENCE_MAX
from deltasync.core.names import DEPTH_MAX, shown
from deltasync.core.wire import WorkspaceState

if TYPE_CHECKING:
    from deltasync.client.state import State

ENTRIES_MAX = 20_000_000
"""A tree beyond this is not fetched: shared directory objects could make one without end (T6)."""
FETCHED_BYTES_MAX = 1 << 30
Here = Callable[[bytes], bytes | None]
"""Gives the body of a directory object that need not be fetched."""

_HEX_DIGITS = frozenset("0123456789abcdef")


class Meeting(enum.Enum):
    """What the server's head is to us."""

    SAME = "same"
    """It is what was acknowledged last."""
    AHEAD = "ahead"
    """It is a bundle that we sealed: the answer was lost."""
    TAKEN_BACK = "taken back"
    """It is a bundle that we sealed and took back while it was still under way."""
    FOREIGN = "foreign"
    """It is none that we know: lost or restored state on either side, or another writer."""


class Directories(Protocol):
    """Where directory objects of the server's tree come from."""

    url: str

    def directory(self, name: str, digest: bytes) -> bytes:
        """Fetch the body of a directory object."""


def root_of(server: WorkspaceState) -> bytes:
    """Return the root that a server states, or raise when it is none."""
    if len(server.root) != 64 or not _HEX_DIGITS.issuperset(server.root) or not 0 <= server.sequence <= SEQUENCE_MAX:
        raise NotADeltasyncServer("the server states a head that is malformed")
    return bytes.fromhex(server.root)


def meet(state: State, server: WorkspaceState, *, has_cache: bool) -> Meeting:
    """Compare a server's head with what was acknowledged, sealed and taken back."""
    here, root = outbox.head(state), root_of(server)
    if (server.sequence, root) == (here.acknowledged_sequence, here.acknowledged_root):
        return Meeting.SAME
    if not has_cache and server.sequence == 0:
        outbox.require_mount(state)
        return Meeting.SAME  # its bundles were carried away: the chain goes on
    for row in outbox.pending(state):
        if (server.epoch, server.sequence, root) == (row.epoch, row.sequence, row.root):
            return Meeting.AHEAD
    if outbox.was_discarded(state, server.epoch, server.sequence, root):
        return Meeting.TAKEN_BACK
    return Meeting.FOREIGN


def check_owner(server: WorkspaceState, client_id: str, *, take_over: bool) -> bool:
    """Tell whether a bundle has to take the workspace over; raises NotOwner when that was not asked for (spec S-15)."""
    if server.client_id in ("", client_id):
        return False
    if take_over:
        return True
    raise NotOwner(
        f"the workspace {shown(server.workspace)} on the server belongs to another client; "
        "if this folder is to replace it, push with --take-over; a new folder takes another name with --workspace NAME",
        workspace=server.workspace,
    )


def fetch_tree(source: Directories, name: str, root: bytes, here: Here) -> dict[bytes, bytes]:
    """Return the directory objects of the server's tree that are not `here`, each checked (spec T-1 to T-6)."""
    return _Walk(source, name, here).fetch(root)


class _Walk:
    """One Merkle walk: fetches only what is not here, and ends also where a hostile server does not."""

    def __init__(self, source: Directories, name: str, here: Here) -> None:
        self._source, self._name, self._here = source, name, here
        self._fetched: dict[bytes, bytes] = {}
        self._fetched_bytes = 0
        self._seen: dict[bytes, tuple[int, int]] = {EMPTY_ROOT: (0, 0)}

    def fetch(self, root: bytes) -> dict[bytes, bytes]:
        self._visit(root, 0)
        return self._fetched

    def _visit(self, digest: bytes, depth: int) -> tuple[int, int]:
        """Return how many entries lie below a directory, and how deep; every directory is visited once."""
        known = self._seen.get(digest)
        if depth > DEPTH_MAX:
            raise self._excess()
        if known is None:
            total = height = 0
            for entry in self._entries(digest):
                total += 1
                if entry.kind is Kind.DIRECTORY:
                    below, levels = self._visit(entry.digest, depth + 1)
                    total, height = total + below, max(height, levels + 1)
                if total > ENTRIES_MAX:
                    break
            known = self._seen[digest] = (total, height)
        if known[0] > ENTRIES_MAX or depth + known[1] > DEPTH_MAX:
            raise self._excess()
        return known

    def _entries(self, digest: bytes) -> list[Entry]:
        body = self._here(digest)
        if body is None:
            body = self._source.directory(self._name, digest)
            self._fetched[digest] = body
            self._fetched_bytes += len(body)
            if self._fetched_bytes > FETCHED_BYTES_MAX:
                raise self._excess()
        return parse_directory(body, digest)

    def _excess(self) -> Refused:
        return Refused("P-7", f"the tree that {self._source.url} states is larger or deeper than any that we take")


def known_body(state: State, digest: bytes) -> bytes | None:
    """Return the body of a directory object that the state has, unless it is damaged."""
    row = state.db.execute("SELECT body FROM objects WHERE digest = ?", (digest,)).fetchone()
    return bytes(row[0]) if row is not None and directory_digest(row[0]) == digest else None
