"""What the client remembers of large contents: their recipes once they were cut, and what tells those that are alike.

A recipe is the packed list of a content's chunks. All of it is a help and no truth: what is forgotten here travels
whole, or its recipe is asked of the server.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, NamedTuple

from deltasync.core.chunks import AVERAGE_BYTES, Chunker, chunks
from deltasync.core.hashing import digest_of
from deltasync.disk import announce

if TYPE_CHECKING:
    from deltasync.client.state import State

EDGE_BYTES = 64 << 10
SIMILAR_MAX = 8
"""How many contents are tried as bases beside the one that a file had before."""
KEPT_BYTES = 128 << 20
"""How much the recipes take in the state; the oldest are dropped."""
EDGES_MAX = 1_000_000
SAMPLE_BYTES_MAX, SAMPLE_SHARE, SAMPLE_MARKS = 4 << 20, 16, 2
"""So much is cut at the beginning, in the middle and at the end, at most this part of the file, for so many marks."""


class Edges(NamedTuple):
    """What tells contents alike: 16 bytes of the digest of the first bytes, of the last ones, and of some chunks."""

    head: bytes
    tail: bytes
    size: int
    marks: tuple[bytes, ...]
    """Of the chunks in three places those with the lowest digests: where most chunks are the same, so are these."""


class Known(NamedTuple):
    """The recipe of a content, which was cut into chunks of this size on average."""

    digest: bytes
    average_bytes: int
    listed: bytes


def edges_of(descriptor: int, size: int) -> Edges:
    """Read the edges of an open file; a header that was changed leaves the end, what was appended the beginning."""
    sample = min(SAMPLE_BYTES_MAX, size // SAMPLE_SHARE)
    starts = {EDGE_BYTES, (size - sample) // 2, max(0, size - EDGE_BYTES - sample)}
    for start in starts:
        announce(descriptor, start, start + sample)
    head = os.pread(descriptor, EDGE_BYTES, 0)
    tail = os.pread(descriptor, EDGE_BYTES, max(0, size - EDGE_BYTES))
    marks = {mark for start in starts for mark in _marks(os.pread(descriptor, sample, start))}
    return Edges(_edge(b"head", head, size), _edge(b"tail", tail, size), size, tuple(sorted(marks)))


def _edge(end: bytes, content: bytes, size: int) -> bytes:
    # Many sparse files begin or end with zeros and have nothing else in common.
    telling = content if content.strip(b"\0") else b"zeros of %d" % size
    return digest_of(end + telling)[:16]


def _marks(sample: bytes) -> list[bytes]:
    """Return the lowest keys of the chunks of a sample, without those that tell nothing.

    The first one and the last one begin or end where the sample does; one byte repeated is in files of all kinds.
    """
    listed: list[bytes] = []

    def found(chunk: bytes, content: memoryview) -> None:
        listed.append(b"" if content[:EDGE_BYTES] == bytes(content[:1]) * min(len(content), EDGE_BYTES) else chunk)

    chunker = Chunker(AVERAGE_BYTES, found)
    chunker.update(memoryview(sample))
    chunker.finish()
    return sorted(chunk.key for each in filter(None, listed[1:-1]) for chunk in chunks(each))[:SAMPLE_MARKS]


def remember(state: State, known: Iterable[Known], edges: Iterable[tuple[bytes, Edges]]) -> None:
    """Keep recipes, and the edges of contents (by digest); joins the caller's transaction where one is open."""
    with state.writing():
        state.db.executemany("INSERT OR REPLACE INTO recipes VALUES (?, ?, ?)", known)
        rows = [(edge, digest, each.size) for digest, each in edges for edge in (each.head, each.tail, *each.marks)]
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
    """Return the content seen last that is like this one somewhere."""
    found = (edges.head, edges.tail, *edges.marks)
    query = f"SELECT digest FROM edges WHERE edge IN ({', '.join('?' * len(found))}) ORDER BY rowid DESC LIMIT 1"
    row = state.db.execute(query, found).fetchone()
    return None if row is None else bytes(row[0])


def seems_known(state: State, edges: Edges) -> bool:
    """Tell whether a content was seen that begins and ends in the same way and is as large: most likely it is this."""
    query = "SELECT digest FROM edges WHERE edge = ? AND size = ? INTERSECT SELECT digest FROM edges WHERE edge = ?"
    return state.db.execute(query, (edges.head, edges.size, edges.tail)).fetchone() is not None


def is_known(state: State, digest: bytes) -> bool:
    """Tell whether a content was seen."""
    return state.db.execute("SELECT 1 FROM edges WHERE digest = ?", (digest,)).fetchone() is not None


def similar(state: State, digest: bytes, but: Collection[bytes] = ()) -> list[bytes]:
    """Return the contents that are most like this one: those with the most edges in common, the newest first."""
    query = """
        SELECT other.digest FROM edges AS own JOIN edges AS other USING (edge)
        WHERE own.digest = ? AND other.digest != own.digest
        GROUP BY other.digest ORDER BY count(*) DESC, max(other.rowid) DESC
    """
    found = (bytes(row[0]) for row in state.db.execute(query, (digest,)))
    return [each for each, _ in zip((one for one in found if one not in but), range(SIMILAR_MAX), strict=False)]
