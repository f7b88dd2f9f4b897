"""Sending ahead of the end of a first scan: what it has recorded, and large files right behind their reading."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from deltasync.client import opening, outbox, seal
from deltasync.core.errors import DeltasyncError
from deltasync.core.manifest import EMPTY_ROOT
from deltasync.core.part import FEATURE as PARTS
from deltasync.core.part import Part

if TYPE_CHECKING:
    from deltasync.client.carriage import Carriage
    from deltasync.client.courier import Courier, Parcel
    from deltasync.client.difference import Difference
    from deltasync.client.observation import Follower
    from deltasync.client.receiver import PushOptions, Transport
    from deltasync.client.report import Tally
    from deltasync.client.state import State
    from deltasync.client.streams import Stream
    from deltasync.core import wire
    from deltasync.core.hashing import Hasher

AHEAD_FILES, AHEAD_BYTES = 8_000, 32 << 20
"""What a first scan must have recorded anew before it is worth a bundle of its own."""


class _Pursuit:
    """Sends a file in parts right behind its first reading; the last part waits for the digest of the whole."""

    def __init__(
        self, stream: Stream, send: Callable[[Stream, Part, Hasher], bool], end: Callable[[Stream, bytes | None], None]
    ) -> None:
        """send: sends a part that was hashed up to its end; False: no more. end: hears of the digest, or None."""
        self._stream, self._send, self._end = stream, send, end
        self._left = stream.parts(0)
        self._part: Part | None = next(self._left)

    @property
    def at(self) -> int:
        """Where the next part ends, unless it is the last."""
        return self._part.end if self._part and self._part.end < self._stream.size else sys.maxsize

    def reach(self, content: Hasher) -> None:
        """Send the part that ends here."""
        is_sent = self._part is not None and self._send(self._stream, self._part, content)
        self._part = next(self._left) if is_sent else None

    def finish(self, digest: bytes) -> None:
        """Have the content named by the digest, which brings the last part."""
        self._end(self._stream, digest)

    def give_up(self) -> None:
        """Leave it at what was sent: the file goes on from there once it was read again."""
        self._end(self._stream, None)


@dataclass(slots=True)
class Begun:
    """What is on its way before the scan is at its end."""

    server: wire.WorkspaceState
    courier: Courier
    trouble: Exception | None = None


class Making(NamedTuple):
    """How bundles are made and their receipts taken; both are the push's."""

    parcels: Callable[[Transport, wire.WorkspaceState], Iterator[Parcel]]
    """Yields a parcel for all that is recorded and not sealed."""
    sealed: Callable[[seal.Cut], Parcel]
    received: Callable[[Parcel, wire.Receipt], None]


class Ahead:
    """Begins a push while its first scan is under way (spec S-18)."""

    def __init__(
        self,
        state: State,
        transport: Transport | None,
        name: str,
        options: PushOptions,
        *,
        tally: Tally,
        carriage: Carriage,
        difference: Difference,
        make: Making,
    ) -> None:
        """Do nothing yet; nothing ever where this is not the first scan, or the receiver is none that answers."""
        self._state, self._transport, self._name, self._options = state, transport, name, options
        self._tally, self._carriage, self._difference, self._make = tally, carriage, difference, make
        self._begun: Begun | None = None
        is_first = state.observed_root() == EMPTY_ROOT
        self._may_go = is_first and transport is not None and transport.has_cache and not options.dry_run
        self._counted = 0, 0
        self._followed: set[str] = set()
        self._followed_bytes = 0
        """How much of what is expected no operation names yet."""
        self._sizes: dict[int, bool] = {}
        """Whether the receiver may have had a content of that size before any was sent."""

    def hand_over(self) -> Begun | None:
        """Return what is on its way, if anything is, and have no more to do with it."""
        begun, self._begun = self._begun, None
        return begun

    def take_followed(self) -> int:
        """Return how many of the expected bytes are of files that were sent while they were read, once."""
        followed, self._followed_bytes = self._followed_bytes, 0
        return followed

    @property
    def is_begun(self) -> bool:
        """Whether something is on its way already."""
        return self._begun is not None

    def send_recorded(self) -> None:
        """Send what an unfinished first scan has recorded so far, if that is enough for a bundle.

        Only a history that begins now goes ahead: nothing can be moved or deleted in it. Trouble on the way is kept
        for `run`, which meets it as if it had come later.
        """
        transport, (files, size_bytes) = self._transport, self._state.counts()
        is_enough = files >= self._counted[0] + AHEAD_FILES or size_bytes >= self._counted[1] + AHEAD_BYTES
        if transport is None or not (self._may_go and is_enough):
            return
        from deltasync.client.courier import Undelivered

        self._counted = files, size_bytes
        try:
            begun = self._begun = self._begun or self._begin(transport)
            if begun is None:
                self._may_go = False
                return
            for parcel in self._make.parcels(transport, begun.server):
                begun.courier.send(parcel)
                begun.courier.make_room()
        except (DeltasyncError, Undelivered) as trouble:
            self._stop(trouble)

    def follow(self, path: str, status: os.stat_result) -> Follower | None:
        """Hear that a large file is read in a first scan, like none before; return what sends it meanwhile in parts.

        None where the receiver may have its content, or takes no parts: it is sent once that is known (spec S-18).
        """
        transport, size = self._transport, status.st_size
        if transport is None or not self._may_go or size <= AHEAD_BYTES or path in self._followed:
            return None
        try:
            begun = self._begun = self._begun or self._begin(transport)
            if begun is None or not self._is_new(transport, begun.server, size):
                self._may_go = begun is not None
                return None
        except DeltasyncError as trouble:
            self._stop(trouble)
            return None
        self._followed.add(path)
        self._expect_followed(size)
        stream = self._carriage.streams.begin(path, status, seal.content_max(begun.server.limits))
        return _Pursuit(stream, self._send_behind, self._end_pursuit)

    def _expect_followed(self, size_bytes: int) -> None:
        expected_bytes = self._tally.expected() + size_bytes
        self._tally.expected = lambda: expected_bytes
        self._followed_bytes += size_bytes

    def _is_new(self, transport: Transport, server: wire.WorkspaceState, size: int) -> bool:
        """Tell whether a file needs parts, and has a size of which the receiver had nothing before this push."""
        most, limit = seal.content_max(server.limits), server.limits.bundle_bytes
        if PARTS not in server.features or not most < size <= limit:
            return False
        if size not in self._sizes:
            self._sizes[size] = bool(transport.sizes(self._name, [size]))
        return not self._sizes[size]

    def _send_behind(self, stream: Stream, carried: Part, content: Hasher) -> bool:
        """Send a part of a file that is still read, which is in the page cache now; False when there can be no more."""
        from deltasync.client.courier import Undelivered

        if self._begun is None or not self._may_go:
            return False
        try:
            self._begun.courier.make_room(for_part=True)  # first: of the hashes only those of the last parts are kept
            stream.keep(carried.end, content.copy())
            for cut in self._difference.parts([carried]):
                self._begun.courier.send(self._make.sealed(cut))
        except (DeltasyncError, Undelivered) as trouble:
            self._stop(trouble)
        return self._may_go

    def _end_pursuit(self, stream: Stream, digest: bytes | None) -> None:
        from deltasync.client.courier import Undelivered

        if digest is not None:
            self._carriage.streams.settle(stream, digest.hex())
            return
        self._expect_followed(-stream.size)
        if self._begun is not None and self._may_go:
            try:
                self._begun.courier.finish()  # what arrived of it is known before it is read again
            except (DeltasyncError, Undelivered) as trouble:
                self._stop(trouble)

    def _stop(self, trouble: Exception) -> None:
        """Keep trouble for `run`, and send nothing more before."""
        self._may_go = False
        if self._begun is not None:  # otherwise `run` greets the receiver itself
            self._begun.trouble = trouble

    def _begin(self, transport: Transport) -> Begun | None:
        """Meet a receiver that has nothing of this workspace; None when it has, and the scan must end first."""
        from deltasync.client.courier import Courier

        if outbox.bind(self._state, self._name, transport.url).sealed_sequence:
            return None
        server = transport.workspace(self._name)
        if server.sequence or server.client_id or server.wanted:
            return None
        if not self._options.take_over:
            opening.claim(self._state.folder, transport.url, self._name)
        self._difference.knows_all = True
        return Begun(server, Courier(transport, self._name, self._make.received))
