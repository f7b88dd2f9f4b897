"""Pushing: seal everything that differs between the observed tree and the receiver, and send it."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Self

from deltasync import db
from deltasync.client import opening, outbox, pack, parts, resync, seal
from deltasync.client.ahead import Ahead, Begun, Making
from deltasync.client.carriage import Carriage
from deltasync.client.difference import Difference
from deltasync.client.outbox import OutboxRow
from deltasync.client.pack import ContentChanged
from deltasync.client.pieces import making_seconds
from deltasync.client.ranges import Plan
from deltasync.client.reasons import NO_PLANS, Reasons
from deltasync.client.receiver import WAIT_SECONDS, PushOptions, Transport, check_receipt
from deltasync.client.report import Avoided, Counts, PathProblem, Progress, PushReport, Tally
from deltasync.client.resync import Meeting
from deltasync.client.uplink import note_push
from deltasync.core import recipe, wire
from deltasync.core.errors import (
    ContentMissing,
    DeltasyncError,
    HostBusy,
    HostUnreachable,
    LimitExceeded,
    NoSpace,
    NotOwner,
    Refused,
    SequenceConflict,
    UsageError,
)
from deltasync.core.metadata import FEATURES, Metadata, content_operations, file_name
from deltasync.core.names import NameRefused, parse_workspace, shown
from deltasync.core.part import Part
from deltasync.core.tree import Loader, find

if TYPE_CHECKING:
    from types import TracebackType

    from deltasync.client.courier import Parcel, Undelivered
    from deltasync.client.state import State

POLL_SECONDS = 30.0
CHANGES_MAX = 3
"""How often one file may change while it is sent before it is left out of this push."""
RESYNCS_MAX = 10
"""How often one push begins anew from the receiver's tree, also when it gets receipts in between (spec H-142)."""
ROUNDS_MAX = 40
"""How often trouble without a receipt in between is met with another attempt."""
__all__ = [
    "WAIT_SECONDS",
    "Counts",
    "PathProblem",
    "Progress",
    "PushOptions",
    "PushReport",
    "Pusher",
    "Transport",
]


Rescan = Callable[[Collection[str]], object]
"""Observes some folders again ('' is the root), because a file in each of them changed while it was sent."""


class Pusher:
    """Brings one receiver to the observed tree, however often it is interrupted (spec S-10 to S-15)."""

    def __init__(
        self,
        state: State,
        transport: Transport | None,
        options: PushOptions,
        *,
        progress: Callable[[Progress], None] | None = None,
        rescan: Rescan | None = None,
    ) -> None:
        """Do nothing yet. transport: None seals into bundle files; rescan: None leaves changing files out at once."""
        self._state, self._transport, self._options = state, transport, options
        self._rescan = rescan
        self._name = _workspace_name(state, options)
        self._tally = Tally(state, PushReport(workspace=self._name, dry_run=options.dry_run), progress)
        self._reasons = Reasons(state.load) if options.explain else None
        self._carriage = Carriage(state, transport, self._name, options, self._tally)
        self._also: dict[bytes, set[str]] = {}
        self._sent_before = transport.sent_bytes if transport else 0
        self._began = time.monotonic()
        self._changes: dict[str, int] = {}
        self._difference = Difference(state, self._name, options)
        making = Making(partial(self._parcels, follows=True, is_whole=False), self._sealed_now, self._received)
        self.ahead = Ahead(
            state,
            transport,
            self._name,
            options,
            tally=self._tally,
            carriage=self._carriage,
            difference=self._difference,
            make=making,
        )
        self._takes_over = self._is_claim_due = False
        self._wanted: frozenset[str] = frozenset()
        """What the receiver asked for at the beginning of this round."""
        self._unhealed: set[str] = set()
        """What of that no bundle of this round carries."""
        self._has_asked_again = False
        self._asked_for: list[str] | None = None
        """What the receiver asks for since its tree holds what was sent, as far as it has said so."""
        self._sealed_here: set[bytes] = set()
        self._coming: set[str] = set()
        """Content that pending bundles name: wherever one after them is applied, it is there."""
        self._restarts = 0
        """How often content that came in parts began anew."""
        self._resyncs = 0
        self._rounds = self._losses = self._conflicts = 0
        """How often, since the last receipt, something went wrong at all, on the way, and between the histories."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop what was sent ahead of a scan that failed."""
        if (begun := self.ahead.hand_over()) is not None:
            begun.courier.__exit__(kind, error, trace)

    def run(self) -> PushReport:
        """Seal and send everything that differs; returns when the server's plain tree has it, or `wait` is over."""
        started = time.monotonic()
        report = self._tally.report
        try:
            if self._options.dry_run:
                self._rehearse()
            else:
                self._push()
            self._tally.close(self._difference.left_out)
            if self._reasons is not None:
                report.reasons, report.more_reasons = self._reasons.given, self._reasons.more
        except sqlite3.DatabaseError as error:
            raise db.damaged(self._state.folder / "state.db", error) from error
        if self._transport is not None:
            report.sent_bytes += self._transport.sent_bytes - self._sent_before
            report.tree_behind = self._is_tree_behind(self._transport)
        report.seconds = time.monotonic() - started
        return report

    def _is_tree_behind(self, transport: Transport) -> bool:
        sequence = outbox.head(self._state).acknowledged_sequence
        return transport.has_cache and not self._options.dry_run and (self._tally.report.tree_sequence or 0) < sequence

    def _push(self) -> None:
        transport = self._transport
        if not self.ahead.is_begun:  # a file of a bundle that is on its way has no row yet
            outbox.bind(self._state, self._name, transport.url if transport else None)
            outbox.drop_old(self._state, self._options.keep_sent_seconds, datetime.now(UTC))
        outbox.note_no_delete(self._state, self._options.no_delete)
        try:
            is_done = self._exchange(transport) if transport is not None else self._seal_files()
        except (HostUnreachable, HostBusy) as error:
            if not self._options.seal_offline:
                raise
            self._tally.report.unreachable = error.sentence
            is_done = self._seal_files()
        if not is_done:
            raise HostBusy("the folder changes faster than it can be sent; push again when it is quiet")

    # With a receiver

    def _exchange(self, transport: Transport) -> bool:
        """Deliver in rounds: each begins with the receiver's head, and ends with everything sent (True) or trouble."""
        from deltasync.client.courier import Undelivered

        while self._rounds < ROUNDS_MAX:
            begun = self.ahead.hand_over()
            server = begun.server if begun else self._greet(transport)
            before = outbox.head(self._state).acknowledged_sequence
            try:
                self._deliver(transport, server, begun)
            except Undelivered as trouble:
                self._rounds += 1
                if outbox.head(self._state).acknowledged_sequence > before:
                    self._rounds = self._losses = self._conflicts = 0
                self._recover(transport, trouble)
            else:
                sent_at = time.monotonic()
                self._await_tree(transport)
                if self._wants_more(transport):
                    continue
                self._note_receiver()
                self._tally.report.still_wanted = len(self._unhealed if self._asked_for is None else self._asked_for)
                if self._tally.report.bundles:
                    self._note_uplink(transport, sent_at)
                    self._state.sweep_objects(outbox.roots(self._state))
                return True
        return False

    def _note_uplink(self, transport: Transport, sent_at: float) -> None:
        """Remember how fast the way was; what was sent ahead went while the folder was looked at."""
        if transport.has_cache:
            note_push(transport.url, transport.sent_bytes - self._sent_before, sent_at - self._began)

    def _greet(self, transport: Transport) -> wire.WorkspaceState:
        """Ask for the head and settle what it means for ours; the only request when nothing changed."""
        state, server = self._state, transport.workspace(self._name)
        if not self._options.take_over:
            opening.claim(state.folder, transport.url, self._name)
        self._takes_over = resync.check_owner(server, state.client_id, take_over=self._options.take_over)
        self._is_claim_due = self._takes_over
        meeting = resync.meet(state, server, has_cache=transport.has_cache)
        if meeting is Meeting.AHEAD:
            self._take_for_receipt(server)
        elif meeting is not Meeting.SAME or self._conflicts > 1:
            self._resync(transport, server, meeting)
        self._note_tree(server.tree_sequence)
        self._wanted = frozenset(server.wanted)
        return server

    def _take_for_receipt(self, server: wire.WorkspaceState) -> None:
        """Take the head for the receipts that were lost (spec S-12)."""
        for row in outbox.pending(self._state):
            if row.sequence <= server.sequence:
                metadata = outbox.metadata_of(self._state, row.sequence)
                self._count(metadata, row.content_bytes)
                self._carriage.note_part(parts.part_of(self._state, row.sequence))
                self._record_kept(row.sequence, file_name(metadata))
        self._acknowledge(server.sequence, resync.root_of(server), server.last_applied_at)

    def _resync(self, transport: Transport, server: wire.WorkspaceState, meeting: Meeting) -> None:
        """Go on from the server's tree, in a new epoch unless its head is a bundle of this one (spec S-14)."""
        self._resyncs += 1
        if self._resyncs > RESYNCS_MAX:
            raise SequenceConflict(
                "the server goes back on what it acknowledges, again and again; have `deltasync-server check` look at "
                "its store, then push again"
            )
        base, load = self._learn(transport, server, keep=True)
        self._difference.hints_hold = False
        if not self._options.allow_mass_delete:  # checked before anything is forgotten: the next push asks again
            operations, _, load = self._difference.compared(base, load)
            self._difference.guard(operations, base, load, is_resync=self._is_strange(meeting, base))
        is_ours = meeting is Meeting.TAKEN_BACK and self._conflicts <= 1
        outbox.adopt(self._state, server.sequence, base, opens_epoch=not is_ours)

    def _is_strange(self, meeting: Meeting, base: bytes) -> bool:
        return meeting is Meeting.FOREIGN and base != outbox.head(self._state).acknowledged_root

    def _learn(self, transport: Transport, server: wire.WorkspaceState, *, keep: bool) -> tuple[bytes, Loader]:
        """Return the server's root, and a loader that knows its tree: what was not here is fetched."""
        base = resync.root_of(server)
        fetched = resync.fetch_tree(transport, self._name, base, partial(resync.known_body, self._state))
        if keep:
            self._state.store(fetched)
        return base, seal.overlaid(self._state.load, fetched)

    def _deliver(self, transport: Transport, server: wire.WorkspaceState, begun: Begun | None) -> None:
        """Send what is sealed, then seal and send what differs, behind what is on its way; raises Undelivered."""
        parcels = self._parcels(transport, server, follows=begun is not None)
        parcel = None if begun else next(parcels, None)
        if parcel is None and begun is None:
            return
        from deltasync.client.courier import Courier

        with begun.courier if begun else Courier(transport, self._name, self._received) as courier:
            try:
                if begun is not None:
                    if begun.trouble is not None:
                        raise begun.trouble
                    parcel = next(parcels, None)
                while parcel is not None:
                    courier.send(parcel, wait_seconds=min(self._options.wait, POLL_SECONDS) if parcel.is_last else 0.0)
                    courier.make_room()  # before the next is prepared: each takes some memory
                    parcel = next(parcels, None)
            except DeltasyncError:
                courier.finish()  # what is under way was sealed before the trouble, and counts
                raise
            courier.finish()

    def _parcels(
        self, transport: Transport, server: wire.WorkspaceState, *, follows: bool, is_whole: bool = True
    ) -> Iterator[Parcel]:
        """Yield every bundle to be sent; each is recorded durably before it is yielded (spec S-10).

        follows: those that are sealed already are on their way. is_whole: the whole tree is observed.
        """
        planned, left = partial(self._carriage.planned, server.features, server.limits), self._carriage.streams.left
        rows = [] if follows else self._sendable(outbox.pending(self._state), server)
        is_all = not server.wanted and outbox.head(self._state).sealed_root == self._state.observed_root()
        ask = self._asking(transport, server.limits)
        if not follows:
            self._coming.clear()
            self._difference.forget()
        self._unhealed = set(server.wanted)
        for row in rows:
            yield self._sealed_before(ask, row, server, is_last=is_all and row is rows[-1])
        cuts = self._difference.cuts(
            server.limits,
            ask,
            exact=not transport.has_cache,
            expect=partial(self._expect, follows=follows),
            planned=planned,
            left=left,
        )
        # nothing here holds a bundle while it is under way: `map` hands each on
        yield from map(partial(self._sealed_now, is_all=not server.wanted), cuts)
        heals = partial(planned, asks=False)
        healing = self._difference.healing(self._unhealed, server.limits, planned=heals, left=left)
        yield from map(self._sealed_now, healing)
        if is_whole:  # what no bundle names now, none will
            waiting = {each.path for each in self._state.problems()} | set(map(shown, self._difference.left_out))
            yield from map(self._sealed_now, self._difference.parts(parts.abandoned(self._state, waiting)))
        if self._is_claim_due:  # nothing differs: a bundle without operations makes the workspace ours
            yield self._sealed_now(self._difference.claim())

    def expect(self, digest: bytes, average_bytes: int) -> None:
        """Hear that a large file is read now which was this content before, or is like it."""
        self._carriage.expect(digest, average_bytes)

    def _sendable(self, rows: list[OutboxRow], server: wire.WorkspaceState) -> list[OutboxRow]:
        """Take back what cannot go out as it was sealed: the receiver lacks a feature by now (spec B-22), or this
        process cannot read the parts of a content again. It is sealed anew.
        """
        for number, row in enumerate(rows):
            metadata = outbox.metadata_of(self._state, row.sequence)
            requires = set(metadata.manifest.requires)
            if not requires.issubset(server.features) or not (row.file or self._carriage.has_parts(row, metadata)):
                outbox.discard_from(self._state, row.sequence)
                return rows[:number]
        return rows

    def _expect(self, contents: seal.Contents, *, follows: bool) -> None:
        followed_bytes = self.ahead.take_followed()
        sent_ahead = self._tally.expected() - followed_bytes if follows else 0
        self._tally.expected = lambda: sent_ahead + contents.total_bytes

    def _asking(self, transport: Transport, limits: wire.Limits) -> seal.Ask:
        """Return a function that asks which digests must be sent, as many at a time as the server takes."""
        most = max(1, limits.missing_digests)

        def ask(digests: list[str]) -> list[str]:
            digests = [digest for digest in digests if digest not in self._coming]
            parts = (digests[at : at + most] for at in range(0, len(digests), most))
            return [digest for part in parts for digest in transport.missing(self._name, part)]

        return ask

    def _sealed_before(self, ask: seal.Ask, row: OutboxRow, server: wire.WorkspaceState, *, is_last: bool) -> Parcel:
        """Return the parcel of a pending bundle: its file, or its content from where it lies now."""
        metadata = outbox.metadata_of(self._state, row.sequence)
        carried = parts.part_of(self._state, row.sequence)
        if carried is not None and not row.file:
            return self._part_parcel(metadata, carried, row.content_bytes)
        also = self._also.get(metadata.identity)
        named = content_operations(metadata)
        if row.file and also is None:
            self._coming.update(named)
            chunks = pack.file_chunks(outbox.folder(self._state) / row.file)
            return self._parcel(metadata, chunks, row.content_bytes, {}, is_last=is_last)
        missing = set(ask(list(named)))
        self._coming.update(named)
        digests = {digest for digest in named if digest in missing} | (also or set())
        # What was asked for once travels whole: a base of its recipe is not there, or not what it seems.
        may_plan = recipe.FEATURE in metadata.manifest.requires
        planned = partial(self._carriage.planned, server.features, server.limits)
        plans = planned(metadata.operations, digests - (also or set())) if may_plan else {}
        content_bytes = seal.travelling_bytes(metadata.operations, digests, plans)
        self._unhealed -= digests
        chunks = self._carriage.packed(metadata, digests, plans)
        return self._parcel(metadata, chunks, content_bytes, plans, is_last=is_last)

    def _sealed_now(self, cut: seal.Cut, *, is_all: bool = True) -> Parcel:
        named = [plan.stream.id for plan in cut.plans.values() if plan.stream]
        outbox.record_sealed(
            self._state, cut.metadata, cut.objects, content_bytes=cut.content_bytes, part=cut.part, named=named
        )
        self._sealed_here.add(cut.metadata.identity)
        if cut.part is not None:
            return self._part_parcel(cut.metadata, cut.part, cut.content_bytes)
        self._unhealed -= cut.digests
        chunks = self._carriage.packed(cut.metadata, cut.digests, cut.plans)
        return self._parcel(cut.metadata, chunks, cut.content_bytes, cut.plans, is_last=cut.is_last and is_all)

    def _part_parcel(self, metadata: Metadata, carried: Part, content_bytes: int) -> Parcel:
        chunks = self._carriage.packed_part(metadata, carried)
        return self._parcel(metadata, chunks, content_bytes, {}, is_last=False, carried=carried)

    def _parcel(
        self,
        metadata: Metadata,
        chunks: Iterator[bytes],
        content_bytes: int,
        plans: Mapping[str, Plan],
        *,
        is_last: bool,
        carried: Part | None = None,
    ) -> Parcel:
        from deltasync.client.courier import Parcel

        self._is_claim_due = False
        if self._reasons is not None:
            self._reasons.note(metadata, plans)
        return Parcel(
            metadata.manifest,
            metadata.identity,
            file_name(metadata),
            chunks,
            content_bytes,
            self._avoided(metadata, plans),
            self._takes_over,  # also those after the first: they may arrive before it is applied
            carried,
            is_last,
            making_seconds(metadata.manifest, [plan.recipe for plan in plans.values()], carried),
        )

    def _avoided(self, metadata: Metadata, plans: Mapping[str, Plan] = NO_PLANS) -> Avoided:
        by_chunks, in_parts = seal.saved_bytes(plans), seal.before_bytes(plans)
        return self._tally.moved(metadata.operations)._replace(by_chunks=by_chunks, in_parts=in_parts)

    def _received(self, parcel: Parcel, receipt: wire.Receipt) -> None:
        """Record a receipt, if it is one for this bundle (spec S-11)."""
        manifest = parcel.manifest
        check_receipt(receipt, self._name, manifest, parcel.identity)
        self._record_kept(parcel.sequence, parcel.file_name)
        self._carriage.note_part(parcel.part)
        self._acknowledge(parcel.sequence, bytes.fromhex(receipt.root), receipt.applied_at)
        self._note_tree(receipt.tree_sequence)
        self._asked_for = receipt.wanted
        self._note_receiver()
        self._tally.add(manifest, parcel.content_bytes, parcel.avoided)
        if self._reasons is not None:
            self._reasons.count(parcel.identity)

    def _note_receiver(self) -> None:
        """Remember whose folder this workspace is there, once it is, and where the disk of a folder is mounted."""
        if self._transport is not None and self._options.take_over:
            opening.claim(self._state.folder, self._transport.url, self._name, take_over=True)
        if self._transport is not None and not self._transport.has_cache:
            outbox.note_mount(self._state, self._transport.url)

    def _record_kept(self, sequence: int, name: str) -> None:
        if self._options.keep_sent_seconds and (outbox.folder(self._state) / name).is_file():
            outbox.attach_file(self._state, sequence, name)

    def _count(self, metadata: Metadata, content_bytes: int) -> None:
        in_parts = parts.named_bytes(self._state, metadata.manifest.sequence_number)
        self._tally.add(metadata.manifest, content_bytes, self._avoided(metadata)._replace(in_parts=in_parts))
        if self._reasons is not None:
            self._reasons.note(metadata)
            self._reasons.count(metadata.identity)

    def _acknowledge(self, sequence: int, root: bytes, at: str | None) -> None:
        outbox.acknowledge(self._state, sequence, root, at=at, keep=self._options.keep_sent_seconds > 0)

    def _recover(self, transport: Transport, trouble: Undelivered) -> None:
        """Prepare the next round after a bundle did not get its receipt, or raise why it never will."""
        parcel, cause = trouble.parcel, trouble.cause
        if isinstance(cause, ContentChanged):
            outbox.discard_from(self._state, parcel.sequence)
            self._carriage.streams.forget()
            self._set_aside(cause)
        elif isinstance(cause, Refused) and parcel.part is not None:
            self._restart(parcel, cause, {parcel.part.stream.hex()})  # what it follows is not what was sent
        elif isinstance(cause, pack.FileLost) or (isinstance(cause, Refused) and self._has_damaged_file(parcel)):
            outbox.discard_from(self._state, parcel.sequence)
        elif isinstance(cause, LimitExceeded) and parcel.identity not in self._sealed_here:
            outbox.discard_from(self._state, parcel.sequence)  # it was cut for other limits than this receiver's
        elif isinstance(cause, NoSpace) and self._is_outdated(parcel):
            outbox.discard_from(self._state, parcel.sequence)  # spec S-13: what did not fit may be gone by now
        elif isinstance(cause, ContentMissing):
            self._restart(parcel, cause, set(cause.missing))
        elif isinstance(cause, (HostUnreachable, HostBusy)) and self._losses < transport.max_retries:
            transport.back_off(self._losses, cause)
            self._losses += 1
        elif isinstance(cause, SequenceConflict) and not isinstance(cause, NotOwner) and self._conflicts < CHANGES_MAX:
            self._conflicts += 1
        else:
            raise cause

    def _is_outdated(self, parcel: Parcel) -> bool:
        """Tell whether a bundle was sealed by an earlier push, and the folder is not any more what that sealed last."""
        if parcel.identity in self._sealed_here:
            return False
        earlier = [row for row in outbox.pending(self._state) if row.identity not in self._sealed_here]
        return self._state.observed_root() != earlier[-1].root  # this push may have sealed what changed already

    def _restart(self, parcel: Parcel, error: Refused | ContentMissing, lacking: set[str]) -> None:
        """Meet a receiver that lacks content: what came in parts begins anew, anything else is added to the bundle."""
        in_parts = {*parts.named_by(self._state, parcel.sequence)}
        in_parts |= {parcel.part.stream.hex()} if parcel.part else set()
        if isinstance(error, ContentMissing) and not lacking & in_parts:  # also where a stream once began with that
            self._add_content(parcel, error)
            return
        lost = parts.note_lost(self._state, lacking)
        self._carriage.streams.drop(lost)
        self._restarts += 1
        if self._restarts > CHANGES_MAX:
            raise error
        outbox.discard_from(self._state, parcel.sequence)

    def _add_content(self, parcel: Parcel, error: ContentMissing) -> None:
        """Have a bundle sent again with what the receiver turned out to lack; only content that it names (T6)."""
        named = content_operations(outbox.metadata_of(self._state, parcel.sequence))
        lacking = {digest for digest in error.missing if digest in named}
        known = self._also.setdefault(parcel.identity, set())
        if lacking <= known:
            raise error
        known |= lacking

    def _has_damaged_file(self, parcel: Parcel) -> bool:
        path = self._state.folder / outbox.FOLDER / parcel.file_name
        try:
            pack.verify(path)
        except (Refused, OSError):
            return path.exists()
        return False

    def _set_aside(self, change: ContentChanged) -> None:
        """Look again at a file whose content is not what was sealed, or leave it out of this push (spec S-13)."""
        path = change.path
        count = self._changes[path] = self._changes.get(path, 0) + 1
        if self._rescan is None or count >= CHANGES_MAX or self._rounds > ROUNDS_MAX // 2:
            self._difference.left_out[path] = change.reason
            return
        self._rescan({path.rpartition("/")[0]})
        entry = find(self._state.observed_root(), path, self._state.load)
        if entry is not None and entry.digest == change.digest:
            self._difference.left_out[path] = change.reason  # it cannot be read now, and its former entry stands

    def _await_tree(self, transport: Transport) -> None:
        """Wait until the server's plain tree holds what was acknowledged, as long as the options say."""
        wanted = outbox.head(self._state).acknowledged_sequence
        deadline, attempt = time.monotonic() + self._options.wait, 0
        while self._is_tree_behind(transport):
            asked = time.monotonic()
            if asked >= deadline:
                return
            wait = min(deadline - asked, POLL_SECONDS)
            server = transport.workspace(self._name, tree_sequence=wanted, wait=wait)
            self._note_tree(server.tree_sequence)
            self._asked_for = server.wanted
            if server.sequence < wanted:
                return  # it lost what it acknowledged: the next push sees to that
            if time.monotonic() - asked < wait / 2:
                transport.back_off(attempt)  # it does not wait: ask less and less often
                attempt += 1

    def _wants_more(self, transport: Transport) -> bool:
        """Tell, once, whether the receiver misses more since it brought its tree forward (spec ST-26)."""
        has_waited = transport.has_cache and self._options.wait > 0 and self._tally.report.bundles > 0
        if self._has_asked_again or not has_waited:
            return False
        self._has_asked_again = True
        asked_for = transport.workspace(self._name).wanted if self._asked_for is None else self._asked_for
        return not self._wanted.issuperset(asked_for)

    def _note_tree(self, tree_sequence: int | None) -> None:
        self._tally.report.tree_sequence = tree_sequence
        self._tally.report.taken_over |= self._takes_over
        outbox.note_tree(self._state, tree_sequence)

    # Without a receiver

    def _seal_files(self) -> bool:
        """Seal what differs into bundle files in the outbox, up to its limit; they are sent in order later."""
        while self._rounds < ROUNDS_MAX:
            try:
                self._write_files()
            except ContentChanged as change:
                self._rounds += 1
                self._carriage.streams.forget()
                self._set_aside(change)
            else:
                return True
        return False

    def _write_files(self) -> None:
        self._difference.forget()  # what an attempt before this one took for carried is in no bundle
        limit, url = self._options.outbox_limit, outbox.head(self._state).url
        room = limit - outbox.pending_bytes(self._state)
        planned = partial(self._carriage.planned, FEATURES, wire.Limits(), asks=False)
        left = self._carriage.streams.left
        expect = partial(self._expect, follows=False)
        cuts = self._difference.cuts(wire.Limits(), list, exact=True, expect=expect, planned=planned, left=left)
        for cut in cuts:
            metadata, carried = cut.metadata, cut.part
            if cut.content_bytes + len(metadata.operations_bytes) + len(metadata.hashes_bytes) > room:
                self._tally.report.waiting = (
                    f"the outbox is full (--outbox-limit is {limit} bytes, the next bundle has {cut.content_bytes}); "
                    + ("sealing goes on when the server has taken some of it" if url else "name a server with --to")
                )
                return
            if carried is not None:
                chunks = self._carriage.packed_part(metadata, carried)
            else:
                chunks = self._carriage.packed(metadata, cut.digests, cut.plans, is_file=True)
            path = pack.write_bundle(outbox.folder(self._state), metadata, chunks)
            outbox.record_sealed(
                self._state,
                metadata,
                cut.objects,
                content_bytes=cut.content_bytes,
                file=path.name,
                part=carried,
                part_digest=self._carriage.streams.digest_at_end(carried) if carried else None,
                named=[plan.stream.id for plan in cut.plans.values() if plan.stream],
            )
            written_bytes = path.stat().st_size
            room -= written_bytes
            self._rounds = 0
            self._tally.report.sent_bytes += written_bytes
            self._count(metadata, cut.content_bytes)

    # Rehearsal

    def _rehearse(self) -> None:
        """Count what would be sent, and change nothing."""
        transport, state = self._transport, self._state
        here = outbox.check_bound(state, self._name, transport.url if transport else None)
        base, limits, done = here.sealed_root, wire.Limits(), here.acknowledged_sequence
        load: Loader = state.load
        ask: seal.Ask = list
        is_strange = False
        features: Collection[str] = FEATURES
        if transport is not None:
            server = transport.workspace(self._name)
            resync.check_owner(server, state.client_id, take_over=self._options.take_over)
            meeting = resync.meet(state, server, has_cache=transport.has_cache)
            limits, ask, done = server.limits, self._asking(transport, server.limits), server.sequence
            features = server.features
            if meeting in (Meeting.FOREIGN, Meeting.TAKEN_BACK):
                base, load = self._learn(transport, server, keep=False)
                is_strange = self._is_strange(meeting, base)
                self._difference.hints_hold = False
        operations, _, load = self._difference.operations(base, load, limits, is_resync=is_strange)
        most = seal.operations_max(operations, limits)
        exact = transport is None or not transport.has_cache
        contents = self._difference.contents(operations, base, load, ask, exact=exact)
        if base == here.sealed_root:
            for row in outbox.pending(state):
                if row.sequence > done:
                    self._count(outbox.metadata_of(state, row.sequence), row.content_bytes)
        for run in seal.runs(contents, limits, max_operations=most):
            digests = contents.take(run)
            plans = self._carriage.plans(features, run, digests, asks=transport is not None)
            saved_bytes = seal.saved_bytes(plans)
            self._tally.add_operations(run, seal.carried_bytes(run, digests) - saved_bytes, saved_bytes)
            if self._reasons is not None:
                self._reasons.add(run, base, load, plans)


def _workspace_name(state: State, options: PushOptions) -> str:
    """Return the workspace's name: as asked, as remembered, or the folder's."""
    name = options.workspace or outbox.head(state).workspace or state.root.name
    if not name:
        raise UsageError(
            f"the folder {shown(str(state.root))} has no name for the workspace; give one with --workspace"
        )
    try:
        return parse_workspace(name)
    except NameRefused as error:
        raise UsageError(
            f"{shown(name)} cannot be the workspace's name ({error}); give one with --workspace"
        ) from error
