"""What the client remembers of large contents: their recipes once they were cut, and how each begins and ends.

A recipe is the packed list of a content's chunks. All of it is a help and no truth: what is forgotten here travels
whole, or its recipe is asked of the server.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, NamedTuple

from deltasync.core.hashing import digest_of

if TYPE_CHECKING:
    from deltasync.client.state import State

EDGE_BYTES = 64 << 10
SIMILAR_MAX = 8
"""How many contents are tried as bases beside the one that a file had before."""
KEPT_BYTES = 128 << 20
"""How much the recipes take in the state; the oldest are dropped."""
EDGES_MAX = 200_000


class Edges(NamedTuple):
    """The beginning of the digest of a content's first bytes, and of its last ones, and its size."""

    head: bytes
    tail: bytes
    size: int


class Known(NamedTuple):
    """The recipe of a content, which was cut into chunks of this size on average."""

    digest: bytes
    average_bytes: int
    listed: bytes


def edges_of(descriptor: int, size: int) -> Edges:
    """Read the edges of an open file; a header that was changed leaves the end, what was appended the beginning."""
    head = os.pread(descriptor, EDGE_BYTES, 0)
    tail = os.pread(descriptor, EDGE_BYTES, max(0, size - EDGE_BYTES))
    return Edges(_edge(b"head", head, size), _edge(b"tail", tail, size), size)


def _edge(end: bytes, content: bytes, size: int) -> bytes:
    # Many sparse files begin or end with zeros and have nothing else in common.
    telling = content if content.strip(b"\0") else b"zeros of %d" % size
    return digest_of(end + telling)[:16]


def remember(state: State, known: Iterable[Known], edges: Iterable[tuple[bytes, Edges]]) -> None:
    """Keep recipes, and the edges of contents (by digest); joins the caller's transaction where one is open."""
    with state.writing():
        state.db.executemany("INSERT OR REPLACE INTO recipes VALUES (?, ?, ?)", known)
        rows = [(edge, digest, each.size) for digest, each in edges for edge in (each.head, each.tail)]
        state.db.executemany("INSERT OR IGNORE INTO edges VALUES (?, ?, ?)", rows)
        _forget_oldest(state)


def _forget_oldest(state: State) -> None:
    state.db.execute("DELETE FROM edges WHERE rowid <= (SELECT max(rowid) FROM edges) - ?", (EDGES_MAX,))
    total = 0
    for identity, size in state.db.execute("SELECT rowid, length(chunks) FROM recipes ORDER BY rowid DESC").fetchall():
        total += size
        if total > KEPT_BYTES:
            state.db.execute("DELETE FROM recipes WHERE rowid <= ?", (identity,))
            return


def recipe_of(state: State, digest: bytes) -> Known | None:
    """Return the recipe of a content, if it is still known."""
    row = state.db.execute("SELECT digest, average, chunks FROM recipes WHERE digest = ?", (digest,)).fetchone()
    return None if row is None else Known(bytes(row[0]), row[1], bytes(row[2]))


def latest_with(state: State, edges: Edges) -> bytes | None:
    """Return the content seen last that begins or ends in the same way."""
    query = "SELECT digest FROM edges WHERE edge IN (?, ?) ORDER BY rowid DESC LIMIT 1"
    row = state.db.execute(query, edges[:2]).fetchone()
    return None if row is None else bytes(row[0])


def seems_known(state: State, edges: Edges) -> bool:
    """Tell whether a content was seen that begins and ends in the same way and is as large: most likely it is this."""
    query = "SELECT digest FROM edges WHERE edge = ? AND size = ? INTERSECT SELECT digest FROM edges WHERE edge = ?"
    return state.db.execute(query, (edges.head, edges.size, edges.tail)).fetchone() is not None


def is_known(state: State, digest: bytes) -> bool:
    """Tell whether a content was seen."""
    return state.db.execute("SELECT 1 FROM edges WHERE digest = ?", (digest,)).fetchone() is not None


def similar(state: State, digest: bytes, but: Collection[bytes] = ()) -> list[bytes]:
    """Return the contents seen last that begin or end as this one does."""
    query = """
        SELECT DISTINCT other.digest FROM edges AS own JOIN edges AS other USING (edge)
        WHERE own.digest = ? AND other.digest != own.digest ORDER BY other.rowid DESC
    """
    found = (bytes(row[0]) for row in state.db.execute(query, (digest,)))
    return [each for each, _ in zip((one for one in found if one not in but), range(SIMILAR_MAX), strict=False)]
