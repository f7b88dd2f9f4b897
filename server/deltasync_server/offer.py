"""Offers: many blobs or directory objects as one stream of frames, the chunks of one blob; in bounded pieces."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial
from typing import BinaryIO

from deltasync.core import frames
from deltasync.core.chunks import Chunker
from deltasync.core.manifest import EMPTY_BODY, EMPTY_ROOT
from deltasync.disk import pieces
from deltasync_server.blobs import Cache
from deltasync_server.state import BATCH, BlobRow, State, batched, held, held_rows, object_body
from deltasync_server.tenants import Tenant
from deltasync_server.tree import Trees

PIECE_BYTES = 1 << 20
CUT_BYTES = 1 << 20
"""What is read of a blob at a time to cut it."""
Opened = Callable[[bytes, BlobRow | None], tuple[int, int] | None]
"""Gives the descriptor and size of a blob whose fingerprint is right, or None."""
Doubt = Callable[[bytes], object]
"""Told the digest of a blob that could not be read to its end (spec ST-28)."""


def opened_blob(cache: Cache, trees: Trees, digest: bytes, row: BlobRow | None) -> tuple[int, int] | None:
    """Open a blob after a look at its fingerprint; None when the cache does not have it (spec ST-24 to ST-26)."""
    if row is None:
        return None
    descriptor = cache.open_unchanged(row)
    if descriptor is not None:
        return descriptor, row.size
    row = trees.sound_rows([digest]).get(digest)
    try:
        return None if row is None else (cache.open(digest), row.size)
    except FileNotFoundError:
        return None


def blob_pieces(
    state: State, tenant: Tenant, opened: Opened, doubt: Doubt, digests: Iterable[bytes]
) -> Generator[bytes, None, None]:
    """Yield the frames of these blobs, in their order; a piece takes little more than PIECE_BYTES."""
    ready = bytearray()
    for batch in batched(digests, BATCH):
        with state.read() as db:
            rows = held_rows(db, tenant, batch)
        for digest in batch:
            found = opened(digest, rows.get(digest))
            if found is None:
                ready += frames.head(None)
            else:
                ready += frames.head(found[1])
                for content in _contents(*found, partial(doubt, digest)):
                    ready += content
                    if len(ready) >= PIECE_BYTES:
                        yield bytes(ready)
                        ready.clear()
    if ready:
        yield bytes(ready)


def _contents(descriptor: int, size: int, doubt: Callable[[], object]) -> Iterator[bytes]:
    try:
        while size:
            content = os.read(descriptor, min(size, PIECE_BYTES))
            if not content:
                raise OSError("a blob is shorter than its row says")
            size -= len(content)
            yield content
    except OSError:
        doubt()
        raise
    finally:
        os.close(descriptor)


def chunk_pieces(blob: BinaryIO, average_bytes: int, doubt: Callable[[], object]) -> Generator[bytes, None, None]:
    """Yield the packed list of an open blob's chunks, and close it (spec H-136). doubt: told if that fails."""
    chunker, buffer = Chunker(average_bytes), memoryview(bytearray(CUT_BYTES))
    with blob:
        try:
            for part in pieces(blob.fileno(), buffer):
                chunker.update(part)
                if piece := chunker.take():
                    yield piece
        except OSError:
            doubt()
            raise
    if piece := chunker.finish():
        yield piece


def held_object(db: sqlite3.Connection, tenant: Tenant, digest: bytes) -> bytes | None:
    """Return the body of a directory object that a tenant's own bundles have made, else None (spec ST-103)."""
    if digest == EMPTY_ROOT:
        return EMPTY_BODY
    return object_body(db, digest) if held(db, tenant, [digest]) else None


def object_pieces(state: State, tenant: Tenant, digests: Iterable[bytes]) -> Generator[bytes, None, None]:
    """Yield the frames of these directory objects, in their order."""
    ready = bytearray()
    for digest in digests:
        with state.read() as db:
            body = held_object(db, tenant, digest)
        ready += frames.head(None if body is None else len(body)) + (body or b"")
        if len(ready) >= PIECE_BYTES:
            yield bytes(ready)
            ready.clear()
    if ready:
        yield bytes(ready)
