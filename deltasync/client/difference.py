"""What differs between the observed tree and one that a receiver holds, as guarded operations cut into bundles."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from deltasync.client import outbox, seal
from deltasync.client.listing import Present
from deltasync.core import wire
from deltasync.core.delta import Translation, diff
from deltasync.core.manifest import EMPTY_ROOT, Kind, Operation, Verb
from deltasync.core.names import shown
from deltasync.core.part import Part
from deltasync.core.tree import Loader, Tree

if TYPE_CHECKING:
    from deltasync.client.receiver import PushOptions
    from deltasync.client.state import State


class Difference:
    """Compares the observed tree with the sealed one or another, and remembers what need not be decided again."""

    def __init__(self, state: State, workspace: str, options: PushOptions) -> None:
        self._state, self._workspace, self._options = state, workspace, options
        self._known: set[bytes] = set()
        """Content that a bundle of this round carries or need not carry."""
        self.knows_all = False
        """All content of the sealed tree is in there."""
        self.hints_hold = True
        """What the state recorded as renamed since the last bundle starts from the tree compared with."""
        self.left_out: dict[str, str] = {}
        """Paths that this push does not carry, and why."""

    def forget(self) -> None:
        """Begin a round in which the receiver may hold anything."""
        self._known.clear()
        self.knows_all = False

    def target(self, base: bytes, load: Loader) -> tuple[bytes, Loader]:
        """Return the tree that the receiver is to hold after all, and a loader that knows it."""
        target = self._state.observed_root()
        if not self._options.no_delete:
            return target, load
        target, objects = seal.united(target, base, load)
        return target, seal.overlaid(load, objects)

    def operations(
        self, base: bytes, load: Loader, limits: wire.Limits, *, is_resync: bool = False
    ) -> tuple[list[Operation], bytes, Loader]:
        """Return the guarded operations from a tree to the observed one, without the paths that are left out."""
        operations, target, load = self.compared(base, load)
        for operation in operations:
            if operation.size > limits.bundle_bytes:
                self.left_out[operation.path] = f"larger than the server takes ({limits.bundle_bytes} bytes)"
        if operations and self.left_out:
            target, objects = seal.without(target, base, self.left_out, load)
            load = seal.overlaid(load, objects)
            operations = diff(base, target, load, self._hints())
        self.guard(operations, base, load, is_resync=is_resync)
        return operations, target, load

    def compared(self, base: bytes, load: Loader) -> tuple[list[Operation], bytes, Loader]:
        """Return the operations from a tree to the observed one, deleting nothing that is still here (spec S-19)."""
        target, load = self.target(base, load)
        hints = self._hints()
        operations = diff(base, target, load, hints)
        here = self._still_here(operations, target, load, hints)
        if here:
            target, objects = seal.without(target, base, here, load, here)
            load = seal.overlaid(load, objects)
            operations = diff(base, target, load, hints)
        return operations, target, load

    def guard(self, operations: list[Operation], base: bytes, load: Loader, *, is_resync: bool) -> None:
        """Raise GuardStopped where so much would be deleted that the user has to allow it, and has not."""
        if not self._options.allow_mass_delete:
            unseen = {each.path for each in self._state.problems()} if is_resync else ()
            seal.guard(operations, base, load, is_resync=is_resync, unseen=unseen)

    def _hints(self) -> dict[str, str]:
        return self._state.renames() if self.hints_hold and not self._options.no_delete else {}

    def _still_here(
        self, operations: list[Operation], target: bytes, load: Loader, hints: Mapping[str, str]
    ) -> dict[str, str]:
        """Return the paths that would be deleted though the folder has them, and where the base tree has each.

        They could not be observed, and nothing is recorded of them: the state that knew them was lost.
        """
        folders = {
            each.path: each.source_path or ""
            for each in operations
            if each.operation is Verb.MOVED and each.kind is Kind.DIRECTORY
        }
        back, forward = Translation(folders), Translation({source: path for path, source in folders.items()})
        gone: dict[str, str] = {}
        for each in operations:
            source = each.source_path
            if each.operation is Verb.DELETED:
                gone[each.path] = back(each.path)
            elif each.operation is Verb.MOVED and source is not None and hints.get(each.path) != source:
                # only the content says that it moved; the source may be a file that cannot be read
                gone[source if source in folders.values() else forward(source)] = source
        if not gone:
            return {}
        after, here = Tree(target, load), Present(self._state.root)
        if self._options.delete_excluded:  # what is ignored is here too, and is meant to go
            unseen = {each.path for each in self._state.problems()}
            gone = {path: origin for path, origin in gone.items() if shown(path) in unseen}
        return {path: origin for path, origin in gone.items() if after.get(path) is None and here.has(path)}

    def contents(
        self, operations: list[Operation], base: bytes, load: Loader, ask: seal.Ask, *, exact: bool
    ) -> seal.Contents:
        """Return what decides which content of these operations travels to a receiver that holds `base`."""
        held = EMPTY_ROOT if self.knows_all else base
        return seal.Contents(operations, held, load, ask, exact=exact, known=self._known)

    def cuts(
        self,
        limits: wire.Limits,
        ask: seal.Ask,
        *,
        exact: bool,
        expect: Callable[[seal.Contents], object],
        planned: seal.Planned,
        left: seal.Left,
    ) -> Iterator[seal.Cut]:
        """Yield the bundles between the sealed tree and the observed one; each is recorded before the next.

        expect: told what there is to carry, before the first. planned, left: as in seal.Cuts.
        """
        span = self._span()
        operations, target, load = self.operations(span.base, self._state.load, limits)
        if not operations:
            return
        span = seal.Span(span.base, target, span.sequence)
        most = seal.operations_max(operations, limits)
        contents = self.contents(operations, span.base, load, ask, exact=exact)
        expect(contents)
        # A server computes the tree again before it commits; what becomes a file is proven here.
        has_target = target == self._state.observed_root() and not exact
        yield from seal.Cuts(
            contents,
            span,
            self._writer(),
            load,
            limits,
            max_operations=most,
            has_target=has_target,
            planned=planned,
            left=left,
        )

    def healing(
        self, digests: Collection[str], limits: wire.Limits, *, planned: seal.Planned, left: seal.Left
    ) -> Iterator[seal.Cut]:
        """Yield bundles that change nothing and carry what the receiver asked for, as far as it is still here."""
        if digests and not self.left_out:
            span, writer, load = self._span(), self._writer(), self._state.load
            yield from seal.healing(digests, span, writer, load, limits, planned=planned, left=left)

    def parts(self, parts: Iterable[Part]) -> Iterator[seal.Cut]:
        """Yield the bundles of parts beyond those of `cuts`; each is recorded before the next.

        They carry what is sent before its operation is known, or say which streams no bundle will name.
        """
        for each in parts:
            span = self._span()
            yield seal.part_cut(each, self._writer(), span.base, span.sequence)

    def claim(self) -> seal.Cut:
        """Return a bundle without operations: it makes the workspace ours."""
        return seal.claim(self._span(), self._writer())

    def _span(self) -> seal.Span:
        here = outbox.head(self._state)
        return seal.Span(here.sealed_root, here.sealed_root, here.sealed_sequence + 1)

    def _writer(self) -> seal.Writer:
        epoch = outbox.head(self._state).epoch
        return seal.Writer(self._workspace, str(self._state.root), self._state.client_id, epoch)
