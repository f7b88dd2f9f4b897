"""The download of a fetch: small contents many in one answer, large ones by ranges, several at a time (spec F-22)."""

from __future__ import annotations

import os
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Protocol

from deltasync.client.comparison import Need, Place
from deltasync.client.destination import PART, RANGES, Destination, read_into
from deltasync.client.incoming import Incoming
from deltasync.client.patch import Spans, gaps, patched
from deltasync.client.patience import patiently
from deltasync.core.chunks import CHUNK_FROM_BYTES, average_for, chunks
from deltasync.core.errors import DeltasyncError, NoSpace, NotFound
from deltasync.core.hashing import digest_of, hasher
from deltasync.disk import is_zeros, open_regular, space_guard, write_all

RANGE_BYTES = 8 << 20
"""What one request fetches: a range of a large content, or contents up to this many bytes."""
BATCH_DIGESTS = 4096
PLACED_BYTES = 1 << 20
PLACED_FILES = 256
"""How much of small contents waits in memory for its files; what is larger is written while it comes."""
LEASE_SECONDS = 1_800.0
"""How long a lease is relied on; the server's is twice as long (spec H-24)."""
LEASE_DIGESTS = 16_384
TELL_BYTES = 1 << 20
_NUMBER = struct.Struct(">I")

ABSENT = "its content is not on the server; push again from where it comes from, then fetch again"
DAMAGED = "the server gave bytes that do not have its digest, twice; have `deltasync-server check` look at its store"


class Source(Protocol):
    """Where content comes from."""

    max_retries: int

    def missing(self, name: str, digests: Sequence[str]) -> list[str]:
        """Lease these digests, and return those that are not there."""

    def blobs(self, name: str, digests: Sequence[bytes]) -> AbstractContextManager[Incoming]:
        """Fetch many blobs once, as one stream of frames."""

    def recipe(self, name: str, digest: bytes, average_bytes: int) -> bytes:
        """Return the packed list of the chunks of a content."""

    def blob_range(self, digest: bytes, start: int, end: int, size: int) -> AbstractContextManager[Incoming]:
        """Fetch a range of a blob once."""

    def back_off(self, attempt: int, error: DeltasyncError | None = None) -> None:
        """Wait before another attempt."""


class _Stopped(Exception):
    """Another thread failed, or the user stopped the command."""


class Download:
    """Brings contents to DEST, each verified before it gets its name."""

    def __init__(
        self, source: Source, workspace: str, dest: Destination, needs: Iterable[Need], tell: Callable[[int], None]
    ) -> None:
        """Begin with nothing asked for. tell: hears how many bytes have arrived, from any thread."""
        self.source, self.workspace, self.dest, self._tell = source, workspace, dest, tell
        self.damaged: list[str] = []
        """Paths whose content the server gave wrong, twice."""
        self.fetched_bytes = 0
        self.resumed_bytes = 0
        """What an earlier fetch had left of large contents."""
        self._needs = list(needs)
        self._guard = threading.Lock()
        self.patching = threading.Lock()
        """Held while one large content is patched: its table of chunks takes some memory."""
        self.placing = threading.Lock()
        """Held while some small files are made."""
        self._units: deque[Callable[[], None]] = deque()
        self._large: list[_Large] = []
        self._errors: list[BaseException] = []
        self._is_stopping = threading.Event()
        self._leased_at: float | None = None
        self._told_bytes = 0

    def run(self, jobs: int) -> None:
        """Fetch everything with so many requests at a time; raises the first error that is not one path's."""
        if not self._needs:
            return
        self.lease()
        self._units.extend(self._planned())
        threads = [threading.Thread(target=self._work, name=f"fetch-{n}", daemon=True) for n in range(jobs)]
        try:
            for thread in threads:
                try:
                    thread.start()
                except RuntimeError:  # the system starts no more of them: this one works as well
                    self._work()
                    break
            _join(threads)
        finally:
            self._is_stopping.set()
            _join(threads)  # after Ctrl-C: what they hold open is closed next
        if self._errors:
            raise self._errors[0]

    def _planned(self) -> Iterator[Callable[[], None]]:
        """Yield what is to be asked for: the large contents first, so that none of them is left alone at the end."""
        self._large = [_Large(self, need) for need in self._needs if need.size > RANGE_BYTES]
        for large in self._large:
            yield large.lead
        for batch in _batches(need for need in self._needs if need.size <= RANGE_BYTES):
            yield _Batch(self, batch).fetch

    def _work(self) -> None:
        try:
            while not self._is_stopping.is_set() and (unit := self._next()) is not None:
                unit()
        except _Stopped:
            pass
        except BaseException as error:  # noqa: BLE001 - a worker reports it; run() raises it
            with self._guard:
                self._errors.append(error)
            self._is_stopping.set()
        finally:
            self.dest.forget_near()

    def _next(self) -> Callable[[], None] | None:
        """Return what a thread does next: what nobody has begun, else a share of what others are at."""
        with self._guard:
            if self._units:
                return self._units.popleft()
        most = max(self._large, key=_Large.count_left, default=None)
        return most.help if most is not None and most.count_left() else None

    def again(self, unit: Callable[[], None]) -> None:
        """Have a unit done once more, before the others."""
        with self._guard:
            self._units.appendleft(unit)

    def lease(self) -> None:
        """Keep the contents from being collected while they are fetched (spec F-4)."""
        with self._guard:
            now = time.monotonic()
            if self._leased_at is not None and now - self._leased_at < LEASE_SECONDS:
                return
            self._leased_at = now
        digests = [need.digest.hex() for need in self._needs]
        for at in range(0, len(digests), LEASE_DIGESTS):
            self.source.missing(self.workspace, digests[at : at + LEASE_DIGESTS])

    def check(self) -> None:
        """Raise when the fetch is being stopped."""
        if self._is_stopping.is_set():
            raise _Stopped

    def count(self, size_bytes: int) -> None:
        """Count content that arrived; raises when the fetch is being stopped."""
        self.check()
        with self._guard:
            self.fetched_bytes += size_bytes
            is_due = self.fetched_bytes - self._told_bytes >= TELL_BYTES
            if is_due:
                self._told_bytes = self.fetched_bytes
        if is_due:
            self._tell(self._told_bytes)

    def resumed(self, size_bytes: int) -> None:
        """Count content that an earlier fetch had left."""
        with self._guard:
            self.resumed_bytes += size_bytes

    def give_up(self, need: Need, reason: str, *, is_damaged: bool = False) -> None:
        """Report every path of a content that cannot be had."""
        for place in need.places:
            self.dest.report(place.path, reason)
        if is_damaged:
            with self._guard:
                self.damaged.extend(place.path for place in need.places)


def _join(threads: Iterable[threading.Thread]) -> None:
    """Wait for the threads that were started."""
    for thread in threads:
        if thread.ident is not None:
            thread.join()


def _batches(needs: Iterable[Need]) -> Iterator[list[Need]]:
    batch: list[Need] = []
    size = 0
    for need in needs:
        if batch and (size + need.size > RANGE_BYTES or len(batch) == BATCH_DIGESTS):
            yield batch
            batch, size = [], 0
        batch.append(need)
        size += need.size
    if batch:
        yield batch


class _Batch:
    """Some contents that one answer brings."""

    def __init__(self, download: Download, needs: list[Need]) -> None:
        self._download, self._left = download, {need.digest: need for need in needs}
        self._wrong: set[bytes] = set()
        self._ready: list[tuple[Need, bytes]] = []
        """Contents that have come, and wait for their files."""
        self._ready_bytes = self._done = 0

    def fetch(self) -> None:
        """Fetch until nothing is left; a content that came wrong is asked for once more (spec F-24)."""
        self._download.lease()
        while self._left:
            patiently(self._download.source, self._ask, lambda: self._done)

    def _ask(self) -> None:
        download, asked = self._download, list(self._left.values())
        download.check()
        if not asked:
            return  # only the end of the answer was missing
        with download.source.blobs(download.workspace, [need.digest for need in asked]) as incoming:
            try:
                for need in asked:
                    if not self._receive(need, incoming):
                        return  # what follows is no better: the rest is asked for again
                    self._done += 1
                incoming.end()
            finally:
                self._place()

    def _receive(self, need: Need, incoming: Incoming) -> bool:
        """Take the next content from an answer; False when it is another one."""
        size = incoming.frame()
        if size is None:
            self._download.give_up(need, ABSENT)
            del self._left[need.digest]
        elif size != need.size:
            self._is_wrong(need)
            return False
        elif size > PLACED_BYTES:
            self._take(need, incoming)
        else:
            self._ready.append((need, incoming.whole(size)))
            self._ready_bytes += size
            if self._ready_bytes >= PLACED_BYTES or len(self._ready) == PLACED_FILES:
                self._place()
        return True

    def _take(self, need: Need, incoming: Incoming) -> None:
        """Write a content while it comes."""
        dest, name, found = self._download.dest, need.digest.hex(), hasher()
        descriptor = dest.create(name)
        try:
            for piece in incoming.content(need.size):
                found.update(piece)
                with space_guard(dest.path):
                    write_all(descriptor, piece)
                self._download.count(len(piece))
        finally:
            os.close(descriptor)
        if found.digest() == need.digest:
            dest.put(need, name)
            del self._left[need.digest]
        else:
            dest.remove(name)
            self._is_wrong(need)

    def _place(self) -> None:
        """Write the contents that wait, while no other thread does: each would wait for the others at every file."""
        ready, size_bytes = self._ready, self._ready_bytes
        self._ready, self._ready_bytes = [], 0
        with self._download.placing:
            for need, content in ready:
                if digest_of(content) == need.digest:
                    self._put(need, content)
                else:
                    self._is_wrong(need)
        self._download.count(size_bytes)

    def _put(self, need: Need, content: bytes) -> None:
        dest, name = self._download.dest, need.digest.hex()
        if len(need.places) == 1:
            dest.put_content(need.places[0], content, name)
        else:
            dest.write(name, content)
            dest.put(need, name)
        del self._left[need.digest]

    def _is_wrong(self, need: Need) -> None:
        if need.digest in self._wrong:
            self._download.give_up(need, DAMAGED, is_damaged=True)
            del self._left[need.digest]
        self._wrong.add(need.digest)


class _Numbers:
    """Numbers that several threads take, each once; a server may state a size that has more than fit into memory."""

    def __init__(self, numbers: range, but: Collection[int]) -> None:
        """but: those that are not handed out."""
        self._guard = threading.Lock()
        self._count = len(numbers) - len(but)
        self._next: Iterator[int] = (number for number in numbers if number not in but)

    def __len__(self) -> int:
        return self._count

    def take(self) -> int | None:
        """Return the next one; None when there is none left."""
        with self._guard:
            number = next(self._next, None)
            self._count = 0 if number is None else self._count - 1
            return number

    def clear(self) -> None:
        """Hand out no more."""
        with self._guard:
            self._next, self._count = iter(()), 0


class _Large:
    """A content that comes by ranges; a note beside it says which are there (kill -9 loses none).

    One thread leads: it hashes what it writes. Others help once they have nothing else to do; what they bring is read
    again, to be hashed in its turn.
    """

    def __init__(self, download: Download, need: Need) -> None:
        self._download, self._need = download, need
        self._part, self._note = need.digest.hex() + PART, need.digest.hex() + RANGES
        self._guard = threading.Lock()
        self._done = self._noted()
        self._left = _Numbers(range(0), ())
        """The ranges that nobody has begun, once there is a leader."""
        self._here: Spans = []
        """What of it was found in DEST, in an earlier version of the file."""
        self._found, self._hashed_bytes = hasher(), 0
        self._is_begun = bool(self._done)
        self._is_hole = False
        """Whether the file has nothing but zeros where nothing was written since this process began with it."""
        self._is_given_up = self._was_wrong = self._was_patched = False
        self._users = 0
        self._descriptor = self._note_descriptor = -1
        download.resumed(sum(self._span(number)[1] - self._span(number)[0] for number in self._done))

    def _count(self) -> int:
        return -(-self._need.size // RANGE_BYTES)

    def count_left(self) -> int:
        """Return how many ranges wait for somebody to fetch them."""
        return len(self._left)

    def lead(self) -> None:
        """Fetch the content, alone or with others."""
        with self._opened():
            if self._has_former():
                self._patch()
            left = self._left = _Numbers(range(self._count()), frozenset(self._done))
            if not len(left):
                self._finish()
            while (number := left.take()) is not None:
                self._fetch(number, leads=True)

    def help(self) -> None:
        """Fetch a range for the leader."""
        left = self._left
        with self._opened():
            if (number := left.take()) is not None:
                self._fetch(number, leads=False)

    def _has_former(self) -> bool:
        is_whole = len(self._done) == self._count()
        return not (is_whole or self._was_patched) and any(place.is_replacing for place in self._need.places)

    def _patch(self) -> None:
        """Take from the file that has the place now what it has of the content (spec F-29)."""
        self._was_patched = True
        average = average_for(self._need.size)
        if average is None:
            return
        try:
            with self._download.patching:
                self._patch_from(next(place for place in self._need.places if place.is_replacing), average)
        except NoSpace:
            raise
        except (OSError, DeltasyncError, struct.error):
            self._here = []  # it is a help and no more: without it all is fetched

    def _patch_from(self, place: Place, average: int) -> None:
        download = self._download
        source = download.dest.open_former(place)
        try:
            if os.fstat(source).st_size < CHUNK_FROM_BYTES:
                return
            listed = download.source.recipe(download.workspace, self._need.digest, average)
            if sum(chunk.size for chunk in chunks(listed)) != self._need.size:
                return
            with space_guard(download.dest.path):
                write = partial(_write_at, self._descriptor)
                self._here = patched(source, average, listed, write, download.check)
        finally:
            os.close(source)
        spans = [self._span(number) for number in range(self._count()) if number not in self._done]
        lacking = sum(end - start for span in spans for start, end in gaps(*span, self._here))
        download.resumed(sum(end - start for start, end in spans) - lacking)

    def _span(self, number: int) -> tuple[int, int]:
        return number * RANGE_BYTES, min((number + 1) * RANGE_BYTES, self._need.size)

    def _noted(self) -> set[int]:
        """Return the ranges that are there already; without the content or the note there are none."""
        folder = self._download.dest.arrivals
        try:
            if folder.stat(self._part).st_size != self._need.size:
                return set()
            descriptor = open_regular(self._note, at=folder.fd)
        except OSError:
            return set()
        try:
            content = os.read(descriptor, min(_NUMBER.size * self._count(), os.fstat(descriptor).st_size))
        finally:
            os.close(descriptor)
        whole = content[: len(content) // _NUMBER.size * _NUMBER.size]
        return {number for (number,) in _NUMBER.iter_unpack(whole) if number < self._count()}

    @contextmanager
    def _opened(self) -> Iterator[None]:
        """Have the files open while a range is under way; the last one closes them."""
        with self._guard:
            self._open()
            self._users += 1
        try:
            yield
        finally:
            with self._guard:
                self._users -= 1
                if not self._users:
                    self._close()

    def _open(self) -> None:
        dest, flags = self._download.dest, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
        if self._descriptor >= 0:
            return
        if self._is_begun:  # what an earlier process left may be of anything
            self._descriptor = os.open(self._part, flags, dir_fd=dest.arrivals.fd)
            self._note_descriptor = os.open(self._note, flags | os.O_APPEND, dir_fd=dest.arrivals.fd)
            return
        dest.remove(self._note)
        self._descriptor, self._note_descriptor = dest.create(self._part), dest.create(self._note)
        self._empty()
        self._is_begun = True

    def _empty(self) -> None:
        """Make the file one hole."""
        with space_guard(self._download.dest.path):
            os.ftruncate(self._descriptor, 0)
            os.ftruncate(self._descriptor, self._need.size)
        self._is_hole = True

    def _fetch(self, number: int, *, leads: bool) -> None:
        self._download.lease()
        try:
            for gap in gaps(*self._span(number), self._here):
                if leads:
                    self._hash_up_to(gap[0])
                self._receive(*gap, leads=leads)
        except NotFound:
            self._give_up(ABSENT)
            return
        with self._guard:
            write_all(self._note_descriptor, _NUMBER.pack(number))
            self._done.add(number)
            is_last = len(self._done) == self._count()
        if is_last:
            self._finish()

    def _receive(self, reached: int, end: int, *, leads: bool) -> None:
        def ask() -> None:
            nonlocal reached
            self._download.check()
            if reached == end:
                return  # only the end of the answer was missing
            with self._download.source.blob_range(self._need.digest, reached, end, self._need.size) as incoming:
                for piece in incoming.content(end - reached):
                    if not (self._is_hole and is_zeros(piece)):
                        with space_guard(self._download.dest.path):
                            _write_at(self._descriptor, piece, reached)
                    if leads and self._hashed_bytes == reached:
                        self._found.update(piece)
                        self._hashed_bytes += len(piece)
                    reached += len(piece)
                    self._download.count(len(piece))
                incoming.end()

        patiently(self._download.source, ask, lambda: reached)

    def _hash_up_to(self, offset: int) -> None:
        """Hash what lies before an offset, as far as it has arrived without a gap."""
        number = self._hashed_bytes // RANGE_BYTES
        while number in self._done:
            number += 1
        if number < offset // RANGE_BYTES:  # somebody is still at an earlier range
            offset = max(number * RANGE_BYTES, self._hashed_bytes)
        read_into(self._found, self._descriptor, self._hashed_bytes, offset)
        self._hashed_bytes = offset

    def _finish(self) -> None:
        """Give the content its places, if it is right; begin once more if it is not."""
        dest = self._download.dest
        self._hash_up_to(self._need.size)
        if self._found.digest() == self._need.digest and os.fstat(self._descriptor).st_size == self._need.size:
            dest.put(self._need, self._part)
            dest.remove(self._note)
            return
        if self._was_wrong and not self._here:
            self._give_up(DAMAGED, is_damaged=True)
            return
        self._was_wrong = not self._here  # a recipe may be wrong: then not all of it was the server's bytes
        os.ftruncate(self._note_descriptor, 0)  # others may have it open still: it is written again from its begin
        self._empty()
        self._done, self._here, self._found, self._hashed_bytes = set(), [], hasher(), 0
        self._download.again(self.lead)

    def _give_up(self, reason: str, *, is_damaged: bool = False) -> None:
        with self._guard:
            if self._is_given_up:
                return
            self._is_given_up = True
        self._left.clear()
        self._download.give_up(self._need, reason, is_damaged=is_damaged)
        if is_damaged:
            self._download.dest.remove(self._note)  # before the content: a note without it says nothing
            self._download.dest.remove(self._part)

    def _close(self) -> None:
        for descriptor in (self._descriptor, self._note_descriptor):
            if descriptor >= 0:
                os.close(descriptor)
        self._descriptor = self._note_descriptor = -1


def _write_at(descriptor: int, content: bytes | memoryview, offset: int) -> None:
    view = memoryview(content)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count
