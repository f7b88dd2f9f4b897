"""Parts: the rows that say what of large contents is sealed in parts, and what of it the receiver has."""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from deltasync.core.hashing import DIGEST_BYTES
from deltasync.core.manifest import Operation
from deltasync.core.names import shown
from deltasync.core.part import Part

if TYPE_CHECKING:
    from deltasync.client.state import State

_END = struct.Struct(f">Q{DIGEST_BYTES}s")


class End(NamedTuple):
    """Where a part ended, and the digest of its stream up to there."""

    offset: int
    digest: bytes


class Sent(NamedTuple):
    """A content that the receiver has parts of, and does not have yet; the path is safe to print."""

    path: str
    parts_sent: int
    parts: int


def sent(state: State) -> list[Sent]:
    """Return the contents that are on their way in parts, by path."""
    found = []
    for path, size, most, column in state.db.execute("SELECT path, size, most, ends FROM streams ORDER BY path"):
        ends = _unpacked(column)
        found.append(Sent(shown(path), -(-ends[-1].offset // most) if ends else 0, -(-size // most)))
    return found


def named_by(state: State, sequence: int) -> list[str]:
    """Return the digests of the contents that a pending bundle names and that came in parts."""
    return [digest for (digest,) in state.db.execute("SELECT digest FROM streams WHERE sealed = ?", (sequence,))]


def named_bytes(state: State, sequence: int) -> int:
    """Return how much of what a pending bundle names came in parts."""
    query = "SELECT coalesce(sum(size), 0) FROM streams WHERE sealed = ?"
    return int(state.db.execute(query, (sequence,)).fetchone()[0])


def ends_of(state: State, stream: bytes) -> list[End]:
    """Return where the parts end that the receiver has, or will have before anything that is sealed now."""
    row = state.db.execute("SELECT ends FROM streams WHERE id = ?", (stream,)).fetchone()
    query = "SELECT start, start + size, digest FROM parts WHERE stream = ? AND digest IS NOT NULL ORDER BY sequence"
    ends = _unpacked(row[0] if row else b"")
    for start, end, digest in state.db.execute(query, (stream,)):
        ends = [each for each in ends if each.offset <= start]  # a part replaces what was behind its beginning
        if start == (ends[-1].offset if ends else 0):
            ends.append(End(end, bytes(digest)))
    return ends


def sealed_end(state: State, stream: bytes) -> int:
    """Return where the next part of a stream begins."""
    query = "SELECT start + size FROM parts WHERE stream = ? ORDER BY sequence DESC LIMIT 1"
    row = state.db.execute(query, (stream,)).fetchone()
    ends = ends_of(state, stream)
    return int(row[0]) if row else ends[-1].offset if ends else 0


def latest(state: State, digest: str | None, path: str) -> bytes | None:
    """Return the stream of a content, else the one of what a path had before, or None.

    digest: None where it is not known yet. One that a bundle names is over with it, before any part that is sealed now.
    """
    query = (
        "SELECT id FROM streams WHERE sealed IS NULL AND (digest = ?1 OR path = ?2) ORDER BY digest = ?1 DESC LIMIT 1"
    )
    row = state.db.execute(query, (digest, path)).fetchone()
    return bytes(row[0]) if row else None


def abandoned(state: State, kept: Collection[str]) -> Iterator[Part]:
    """Yield, for each stream that no bundle will name, the part that says so. kept: paths that wait."""
    rows = state.db.execute("SELECT id, path FROM streams WHERE sealed IS NULL").fetchall()
    for stream, path in rows:
        if shown(path) not in kept:
            yield Part(bytes(stream), 0, 0)


def note_begun(state: State, stream: bytes, operation: Operation, *, size: int, most: int, ends: Iterable[End]) -> None:
    """Record which content a stream is to bring, and which of its parts the receiver has.

    Parts in bundle files that are of no use any more are replaced by what is sealed next.
    """
    ends = list(ends)
    with state.writing():
        behind = "DELETE FROM parts WHERE stream = ? AND digest IS NOT NULL AND start + size > ?"
        state.db.execute(behind, (stream, ends[-1].offset if ends else 0))
        row = (stream, operation.path, operation.digest, size, most, _packed(ends))
        state.db.execute("INSERT OR REPLACE INTO streams VALUES (?, ?, ?, ?, ?, ?, NULL)", row)


def note_content(state: State, stream: bytes, digest: str) -> None:
    """Record the digest of the content that a stream brings, which was not known when it began."""
    with state.writing():
        state.db.execute("UPDATE streams SET digest = ? WHERE id = ?", (digest, stream))


def note_received(state: State, part: Part, digest: bytes) -> None:
    """Record that the receiver has a part, and all before it. digest: that of the stream up to its end."""
    ends = [end for end in ends_of(state, part.stream) if end.offset < part.end]
    if part.offset == (ends[-1].offset if ends else 0):
        with state.writing():
            column = _packed([*ends, End(part.end, digest)])
            state.db.execute("UPDATE streams SET ends = ? WHERE id = ?", (column, part.stream))


def note_lost(state: State, digests: Collection[str]) -> set[bytes]:
    """Forget what the receiver had of the streams with these ids, or of these contents; returns their ids."""
    rows = state.db.execute("SELECT id, digest FROM streams").fetchall()
    lost = {bytes(stream) for stream, digest in rows if digest in digests or bytes(stream).hex() in digests}
    with state.writing():
        state.db.executemany("UPDATE streams SET ends = x'' WHERE id = ?", [(stream,) for stream in lost])
    return lost


def note_sealed(state: State, sequence: int, part: Part, digest: bytes | None) -> None:
    """Record a part with its bundle; joins the caller's transaction. digest: known once it is a file."""
    with state.writing():
        row = (sequence, part.stream, part.offset, part.size, digest)
        state.db.execute("INSERT OR REPLACE INTO parts VALUES (?, ?, ?, ?, ?)", row)
        if not part.size:
            state.db.execute("DELETE FROM streams WHERE id = ?", (part.stream,))


def note_named(state: State, sequence: int, streams: Iterable[bytes]) -> None:
    """Record which bundle names the content of streams; joins the caller's transaction."""
    with state.writing():
        rows = [(sequence, stream) for stream in streams]
        state.db.executemany("UPDATE streams SET sealed = ? WHERE id = ?", rows)


def note_acknowledged(state: State, sequence: int) -> None:
    """Forget the parts up to a bundle, and the streams whose content it made; joins the caller's transaction."""
    with state.writing():
        query = "SELECT stream, start, size, digest FROM parts WHERE sequence <= ? AND digest NOTNULL ORDER BY sequence"
        for stream, *run, digest in state.db.execute(query, (sequence,)).fetchall():
            note_received(state, Part(bytes(stream), *run), bytes(digest))
        state.db.execute("DELETE FROM parts WHERE sequence <= ?", (sequence,))
        state.db.execute("DELETE FROM streams WHERE sealed <= ?", (sequence,))


def note_discarded(state: State, sequence: int) -> None:
    """Forget the parts from a bundle on, which was taken back; joins the caller's transaction."""
    with state.writing():
        state.db.execute("DELETE FROM parts WHERE sequence >= ?", (sequence,))
        state.db.execute("UPDATE streams SET sealed = NULL WHERE sealed >= ?", (sequence,))


def part_of(state: State, sequence: int) -> Part | None:
    """Return the part that a pending bundle carries, or None."""
    row = state.db.execute("SELECT stream, start, size FROM parts WHERE sequence = ?", (sequence,)).fetchone()
    return Part(bytes(row[0]), row[1], row[2]) if row else None


def _packed(ends: Iterable[End]) -> bytes:
    return b"".join(_END.pack(*end) for end in ends)


def _unpacked(column: bytes) -> list[End]:
    return list(map(End._make, _END.iter_unpack(column)))
