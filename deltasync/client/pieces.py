"""A large bundle on its way in pieces: several under way at once, and after a cut only what is missing again."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Protocol, TypeVar

import msgspec

from deltasync.client.pace import MEASURED_BYTES
from deltasync.core import part, wire
from deltasync.core.errors import (
    DeltasyncError,
    HostBusy,
    HostUnreachable,
    NotADeltasyncServer,
    NotFound,
    UploadIncomplete,
    UsageError,
)
from deltasync.core.hashing import digest_of
from deltasync.core.metadata import Manifest
from deltasync.core.part import Part
from deltasync.core.recipe import FEATURE, Recipe

UPLOAD_FROM_BYTES = 8 << 20
"""A bundle that is larger goes in pieces."""
PROBE_BYTES = 8 << 20
"""So much of a bundle goes in pieces before it is known whether the way is quick."""
JOBS = 4
"""Pieces under way at once."""
PIECE_BYTES_MIN, PIECE_BYTES_MAX = 512, 8 << 20
"""The pieces that a server may ask for: each costs a request, and a few of them are in memory (spec H-142)."""
SLICE_BYTES = 256 << 10
"""What is handed to the connection at a time, and counted as sent."""
SLOWEST_DISK_BYTES_PER_SECOND = 32 * 2**20
"""The answer to a bundle is waited for longer by its size at this rate: the server makes it durable first."""
SLOWEST_HASH_BYTES_PER_SECOND = 256 * 2**20
"""And by the zeros of its recipes at this one: the server hashes them, and writes nothing."""
PART_SECONDS = 600.0
"""A server that was started anew reads what is there of a stream before it takes the next part of a bundle file."""
_ID = re.compile("[0-9A-Za-z_-]{1,100}")
_T = TypeVar("_T")


def making_seconds(manifest: Manifest, recipes: Collection[Recipe] = (), carried: Part | None = None) -> float:
    """Return how long a server may take to make the contents of a bundle that come as recipes.

    recipes: all of them where they are known; of a bundle file they are not, and have no bases most of the time.
    carried: the part that the bundle brings.
    """
    if part.FEATURE in manifest.requires and not manifest.total_files:
        return carried.offset / SLOWEST_HASH_BYTES_PER_SECOND if carried else PART_SECONDS
    if not recipes:
        return manifest.total_size_bytes / SLOWEST_HASH_BYTES_PER_SECOND if FEATURE in manifest.requires else 0.0
    zero_bytes = sum(each.zero_bytes for each in recipes)
    written_bytes = sum(each.size for each in recipes) - zero_bytes
    return written_bytes / SLOWEST_DISK_BYTES_PER_SECOND + zero_bytes / SLOWEST_HASH_BYTES_PER_SECOND


class Requests(Protocol):
    """What the pieces travel with."""

    max_retries: int

    def ask(
        self,
        kind: type[_T],
        method: str,
        path: str,
        *,
        query: Mapping[str, str | int] | None = None,
        body: bytes | Iterable[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        extra_seconds: float = 0.0,
    ) -> _T:
        """Make one request and return its answer."""

    def back_off(self, attempt: int, error: DeltasyncError | None = None) -> None:
        """Wait before another attempt."""


class _Differs(Exception):
    """The bundle was sealed anew, and its compressed bytes came out in another way."""


class Upload:
    """One upload; a piece is in memory until the server has it, and no more of them than are under way."""

    def __init__(self, requests: Requests, request: wire.UploadRequest, jobs: int) -> None:
        """Begin it; raises what the server refuses it with."""
        self._requests = requests
        self._jobs = jobs
        state = self._patiently("POST", "/uploads/initiate", msgspec.json.encode(request), wire.UploadState)
        if not (_ID.fullmatch(state.upload_id) and PIECE_BYTES_MIN <= state.chunk_size <= PIECE_BYTES_MAX):
            raise NotADeltasyncServer("the server begins an upload with a name, or a size of pieces, that is none")
        self._path = f"/uploads/{state.upload_id}"
        self._chunk_size = state.chunk_size
        self._known = self._pieces_there() if state.uploaded_chunks else {}
        self._is_resumed = bool(self._known)
        self._free = threading.Semaphore(jobs)
        self._trouble: Exception | None = None
        self.bytes_per_second = 0.0
        """How fast the pieces went that were sent last, with what it took to make them; 0 where they say nothing."""

    def probe(self, chunks: Iterable[bytes]) -> float:
        """Send the first pieces of a bundle and return how many bytes a second went; 0 where that says nothing.

        `send` is given the same chunks again, and does without those pieces. Trouble is met there.
        """
        pieces = [piece for piece in cut(chunks, self._chunk_size) if len(piece) == self._chunk_size]
        if self._is_resumed or not pieces:
            return 0.0
        try:
            self._send_pieces(pieces)
        except DeltasyncError:
            self._trouble = None
            return 0.0
        self._known = {number: digest_of(piece).hex() for number, piece in enumerate(pieces)}
        return self.bytes_per_second

    def abort(self) -> None:
        """Have the server forget the upload; where that fails it expires."""
        with contextlib.suppress(DeltasyncError):
            self._requests.ask(wire.UploadAborted, "DELETE", self._path)

    def send(self, chunks: Iterable[bytes], query: Mapping[str, str | int], extra_seconds: float) -> wire.Receipt:
        """Send a bundle and return its receipt; after a failure that another attempt mends, its pieces stay there."""
        try:
            count, size = self._send_pieces(chunks)
            extra_seconds += size / SLOWEST_DISK_BYTES_PER_SECOND
            return self._complete(wire.UploadComplete(total_chunks=count, file_size=size), query, extra_seconds)
        except HostUnreachable:
            raise
        except UploadIncomplete as error:
            raise HostBusy("the server has lost pieces that were not durable yet; they are sent again") from error
        except Exception as error:
            self.abort()
            if isinstance(error, (NotFound, _Differs)):
                raise HostBusy("the server no longer has what was sent of a bundle; it is sent anew") from error
            raise

    def _send_pieces(self, chunks: Iterable[bytes]) -> tuple[int, int]:
        """Send every piece that is not there; returns the number of all and their bytes."""
        count = size = 0
        began, there = time.monotonic(), len(self._known) * self._chunk_size
        try:
            for piece in cut(chunks, self._chunk_size):
                self._free.acquire()
                if self._trouble is not None:
                    self._free.release()
                    break
                if count in self._known:
                    self._free.release()
                    self._compare(count, piece)
                    count, size = count + 1, size + len(piece)
                    continue
                # A daemon: whoever interrupts a push does not wait for a server that has stopped reading.
                thread = threading.Thread(target=self._carry, args=(count, piece), name="piece", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # the system starts no more of them: this one carries it
                    self._carry(count, piece)
                count, size = count + 1, size + len(piece)
        finally:
            for _ in range(self._jobs):  # every piece that began has ended: none arrives after what follows
                self._free.acquire()
            self._free.release(self._jobs)
        if self._trouble is not None:
            raise self._trouble
        if self._known:
            raise _Differs("the server has pieces of a longer bundle")
        seconds = max(time.monotonic() - began, 1e-9)
        self.bytes_per_second = (size - there) / seconds if size - there >= MEASURED_BYTES else 0.0
        return count, size

    def _pieces_there(self) -> dict[int, str]:
        """Return the digests of what an earlier attempt, perhaps of another process, has brought."""
        found = self._requests.ask(wire.UploadParts, "GET", f"{self._path}/chunks")
        return {part.chunk_num: part.etag for part in found.parts}

    def _compare(self, number: int, piece: bytes) -> None:
        """Do without sending a piece that is there; one with other bytes ends the upload."""
        if self._known.pop(number) != digest_of(piece).hex():
            raise _Differs("the bundle is not the one whose pieces the server has")

    def _carry(self, number: int, piece: bytes) -> None:
        try:
            self._deliver(number, piece)
        except Exception as error:  # noqa: BLE001 - it is raised again where the pieces are awaited
            if self._trouble is None or isinstance(self._trouble, NotFound):  # of an upload that another one ended
                self._trouble = error
        finally:
            self._free.release()

    def _deliver(self, number: int, piece: bytes) -> None:
        """Send one piece until the server has it; after a cut, what it lacks of it."""
        etag, offset, attempt, reached = digest_of(piece).hex(), 0, 0, 0
        while offset < len(piece):
            try:
                self._put(number, piece, etag, offset)
                return
            except UsageError:
                if not offset:
                    raise
                offset = 0  # it does not go on there: the whole piece again
            except (HostUnreachable, HostBusy) as error:
                if attempt >= self._requests.max_retries or self._trouble is not None:
                    raise
                self._requests.back_off(attempt, error)
                offset = self._there(number, len(piece))
                attempt = attempt + 1 if offset <= reached else 0
                reached = max(reached, offset)

    def _put(self, number: int, piece: bytes, etag: str, offset: int) -> None:
        headers = {wire.ETAG_HEADER: etag} | ({wire.OFFSET_HEADER: str(offset)} if offset else {})
        path = f"{self._path}/chunk/{number}"
        slices = [piece[at : at + SLICE_BYTES] for at in range(offset, len(piece), SLICE_BYTES)]
        self._requests.ask(wire.UploadedChunk, "PUT", path, body=slices, headers=headers)

    def _there(self, number: int, size: int) -> int:
        """Return how many first bytes of a piece the server has; 0 also when it does not answer."""
        try:
            state = self._requests.ask(wire.UploadState, "GET", self._path)
        except (HostUnreachable, HostBusy):
            return 0
        if any(first <= number <= last for first, last in state.present):
            return size
        return next((each.received_bytes for each in state.partial if each.chunk_num == number), 0)

    def _complete(
        self, request: wire.UploadComplete, query: Mapping[str, str | int], extra_seconds: float
    ) -> wire.Receipt:
        """Ask for the receipt, again when the answer is lost: the server gives the same one."""
        path = f"{self._path}/complete"
        return self._patiently("POST", path, msgspec.json.encode(request), wire.Receipt, query, extra_seconds)

    def _patiently(
        self,
        method: str,
        path: str,
        body: bytes,
        kind: type[_T],
        query: Mapping[str, str | int] | None = None,
        extra_seconds: float = 0.0,
    ) -> _T:
        attempt = 0
        while True:
            try:
                return self._requests.ask(kind, method, path, query=query, body=body, extra_seconds=extra_seconds)
            except (HostUnreachable, HostBusy) as error:
                if attempt >= self._requests.max_retries:
                    raise
                self._requests.back_off(attempt, error)
            attempt += 1


def begun(chunks: Iterator[bytes], size: int) -> tuple[list[bytes], bool]:
    """Take the first chunks, until they are more than `size` bytes; returns them, and whether they are all."""
    taken: list[bytes] = []
    held = 0
    for chunk in chunks:
        taken.append(chunk)
        held += len(chunk)
        if held > size:
            return taken, False
    return taken, True


def cut(chunks: Iterable[bytes], size: int) -> Iterator[bytes]:
    """Yield the same bytes in pieces of one size; the last may be shorter."""
    held = bytearray()
    for chunk in chunks:
        held += chunk
        while len(held) >= size:
            yield bytes(held[:size])
            del held[:size]
    if held:
        yield bytes(held)
