"""Carriage: how the content of bundles travels, whole, as recipes or in parts, and the bytes of each bundle."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from deltasync.client import outbox, pack, parts, seal
from deltasync.client.outbox import OutboxRow
from deltasync.client.ranges import Plan, Planner, plans_by_holes
from deltasync.client.receiver import PushOptions, Transport
from deltasync.client.report import Tally
from deltasync.client.streams import Streams
from deltasync.core import part, recipe, wire
from deltasync.core.manifest import Operation
from deltasync.core.metadata import Metadata, file_name
from deltasync.core.part import Part

if TYPE_CHECKING:
    from deltasync.client.state import State


class Carriage:
    """Decides for one receiver, or none, and one push."""

    def __init__(
        self, state: State, transport: Transport | None, workspace: str, options: PushOptions, tally: Tally
    ) -> None:
        """Ask nothing yet."""
        self._state, self._transport, self._options, self._tally = state, transport, options, tally
        self._has_cache = transport is not None and transport.has_cache
        self._planner = Planner(state, transport, workspace) if transport and self._has_cache else None
        self.streams = Streams(state, tally.read)
        self._links: dict[bytes, float] = {}

    def expect(self, digest: bytes, average_bytes: int) -> None:
        """Hear that a large file is read now which was this content before, or is like it."""
        if self._planner is not None:
            self._planner.expect(digest, average_bytes)

    def has_parts(self, row: OutboxRow, metadata: Metadata) -> bool:
        """Tell whether the part that a pending bundle carries, or the parts before it, can be sent again."""
        if part.FEATURE not in metadata.manifest.requires:
            return True
        carried = parts.part_of(self._state, row.sequence)
        if carried is not None:
            return not carried.size or self.streams.stream_of(carried) is not None
        return all(map(self.streams.is_complete, parts.named_by(self._state, row.sequence)))

    def planned(
        self,
        features: Collection[str],
        limits: wire.Limits,
        operations: Sequence[Operation],
        digests: Collection[str],
        *,
        asks: bool = True,
    ) -> dict[str, Plan]:
        """Return how contents travel that do not travel whole to a receiver with these features.

        asks: it may be asked for bases; what it lost may be one as well.
        """
        plans = self.plans(features, operations, digests, asks=asks)
        if part.FEATURE not in features:
            return plans
        return self.streams.planned(operations, digests, plans, seal.content_max(limits))

    def plans(
        self, features: Collection[str], operations: Sequence[Operation], digests: Collection[str], *, asks: bool
    ) -> dict[str, Plan]:
        """Return how they travel, whether in parts or not."""
        if recipe.FEATURE not in features:
            return {}
        if self._planner is None or not asks:
            return plans_by_holes(self._state.root, operations, digests)
        return self._planner.plans(operations, digests)

    def packed(
        self,
        metadata: Metadata,
        digests: Collection[str],
        plans: Mapping[str, Plan],
        *,
        is_file: bool = False,
    ) -> Iterator[bytes]:
        """Return a bundle with content from the workspace; it is read in a sending thread, without the state.

        is_file: it is sealed for later.
        """
        self._tally.part = None
        self._tally.read(0)  # what is on its way is shown at once, not when the first piece is out
        chunks = pack.packed(
            metadata,
            digests,
            pack.Source(self._state.root, proves_holes=is_file or not self._has_cache),
            plans,
            level=self._options.level,
            link=partial(self._link_for, metadata.identity),
            on_content=self._tally.read if self._tally.progress else None,
        )
        return self._kept(metadata, chunks)

    def packed_part(self, metadata: Metadata, carried: Part) -> Iterator[bytes]:
        """Return a bundle with a part, read in a sending thread; one that says that a stream is over reads nothing."""
        stream = self.streams.stream_of(carried)
        self._tally.part = stream.name_of(carried) if stream and carried.size else None
        self._tally.read(0)
        chunks = pack.packed_part(
            metadata,
            carried,
            pack.Source(self._state.root),
            self.streams,
            level=self._options.level,
            link=partial(self._link_for, metadata.identity),
            on_content=self._tally.read if self._tally.progress else None,
        )
        return self._kept(metadata, chunks)

    def _kept(self, metadata: Metadata, chunks: Iterator[bytes]) -> Iterator[bytes]:
        if self._options.keep_sent_seconds and self._transport is not None:
            return pack.kept(chunks, outbox.folder(self._state) / file_name(metadata))
        return chunks

    def _link_for(self, identity: bytes) -> float:
        """Return the link's rate as it was when the bundle was first sealed.

        Sealed at another level, nothing that the server already has of it would fit.
        """
        return self._links.setdefault(identity, self._transport.link_bytes_per_second if self._transport else 0.0)

    def note_part(self, carried: Part | None) -> None:
        """Remember that the receiver has a part; one whose digest is not known by now is sent again at worst."""
        digest = self.streams.digest_at_end(carried) if carried else None
        if carried is not None and digest is not None:
            parts.note_received(self._state, carried, digest)
