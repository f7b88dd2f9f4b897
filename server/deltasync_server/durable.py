"""What of a tree is durable: which of it still is, what is to be made so, and what the disk failed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from functools import partial

from deltasync.core.hashing import directory_digest, hasher
from deltasync.core.manifest import EMPTY_ROOT, Entry, Kind, Operation, Verb, encode_directory
from deltasync.core.tree import Loader, entries_of
from deltasync.disk import Folder, open_regular, pieces
from deltasync_server.blobs import Cache, Staging
from deltasync_server.state import BlobRow

_READ_BYTES = 1 << 20


def shared(one: bytes, other: bytes, load: Loader) -> tuple[bytes, dict[bytes, bytes]]:
    """Return the tree of all that two trees have at the same places, and its new directory objects."""
    if one in (other, EMPTY_ROOT):
        return one, {}
    objects: dict[bytes, bytes] = {}

    def share(mine: bytes, theirs: bytes) -> bytes:
        others = {entry.name: entry for entry in entries_of(theirs, load)}
        kept: list[Entry] = []
        for entry in entries_of(mine, load):
            there = others.get(entry.name)
            if entry == there:
                kept.append(entry)
            elif there is not None and entry.kind is there.kind is Kind.DIRECTORY:
                kept.append(Entry(entry.name, Kind.DIRECTORY, digest=share(entry.digest, there.digest)))
        body = encode_directory(kept)
        digest = directory_digest(body)
        objects[digest] = body
        return digest

    return share(one, other), objects


def changed_folders(old: bytes, new: bytes, path: str, load: Loader) -> Iterator[tuple[str, list[Entry]]]:
    """Yield each folder of `new` whose own entries are not those of `old`, with the new and changed ones."""
    if old == new:
        return
    before = {entry.name: entry for entry in entries_of(old, load)}
    changed = [entry for entry in entries_of(new, load) if before.get(entry.name) != entry]
    yield path, changed
    for entry in changed:
        if entry.kind is Kind.DIRECTORY:
            was = before.get(entry.name)
            base = was.digest if was is not None and was.kind is Kind.DIRECTORY else EMPTY_ROOT
            yield from changed_folders(base, entry.digest, f"{path}/{entry.name}" if path else entry.name, load)


def with_file(folder: Folder, name: str, action: Callable[[int], None]) -> bool:
    """Do something with an open file; False when the disk failed it."""
    descriptor = open_regular(name, at=folder.fd)
    try:
        return is_done(partial(action, descriptor))
    finally:
        os.close(descriptor)


def is_done(action: Callable[[], None]) -> bool:
    """Do something that the disk may fail; False when it did."""
    try:
        action()
    except OSError:
        return False
    return True


def stage_again(cache: Cache, staging: Staging, row: BlobRow) -> None:
    """Stage a durable file with a blob's bytes; raises OSError where they cannot be read right."""
    found, source = hasher(), cache.open(row.digest)

    def views() -> Iterator[memoryview]:
        for piece in pieces(source, memoryview(bytearray(_READ_BYTES))):
            found.update(piece)
            yield piece

    try:
        staging.is_durable = True
        staging.write(_operation_of(row), views())
    finally:
        os.close(source)
    if found.digest() != row.digest:
        raise OSError(errno.EIO, "its bytes have another digest", row.digest.hex())
    staging.make_durable()


def _operation_of(row: BlobRow) -> Operation:
    name = row.digest.hex()
    return Operation(
        operation=Verb.CREATED,
        kind=Kind.FILE,
        path=name,
        digest=name,
        size=row.size,
        mtime_ns=row.mtime_ns,
        executable=row.executable,
    )
