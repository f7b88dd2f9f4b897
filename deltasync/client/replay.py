"""Bundle files: list, show, verify and export them, and replay a folder of them into a receiver."""

from __future__ import annotations

import contextlib
import secrets
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from deltasync.client import outbox, pack, resync, seal
from deltasync.client.pack import ContentChanged
from deltasync.client.pieces import making_seconds
from deltasync.client.ranges import Plan, plans_by_holes
from deltasync.client.receiver import check_receipt
from deltasync.client.streams import Streams
from deltasync.core import part, wire
from deltasync.core.bundle import advice, name_file
from deltasync.core.chain import Chain, Link, broken, continue_from
from deltasync.core.delta import diff
from deltasync.core.errors import (
    ContentMissing,
    DeltasyncError,
    HostBusy,
    HostUnreachable,
    NotFound,
    Refused,
    RootMismatch,
    SequenceConflict,
    UsageError,
)
from deltasync.core.manifest import EMPTY_ROOT, Operation
from deltasync.core.metadata import Metadata, content_operations, file_name, naming, parse_file_name
from deltasync.core.names import NameRefused, parse_workspace, shown
from deltasync.core.recipe import FEATURE
from deltasync.disk import staged

if TYPE_CHECKING:
    from deltasync.client.push import Rescan, Transport
    from deltasync.client.state import State

SUFFIX = ".tar.zst"
ATTEMPTS_MAX = 5


class Listed(msgspec.Struct, frozen=True, kw_only=True):
    """One sealed bundle of a workspace: a line of `bundle ls`."""

    sequence: int
    epoch: str
    identity: str
    root: str
    state: str
    """`pending` until the server has it, then `kept` as long as `--keep-sent` says."""
    content_bytes: int
    sealed_at: str
    file: str | None
    """Its path, if it is a file."""
    file_bytes: int | None


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    """What reading one bundle file to its end showed."""

    path: str
    identity: str | None
    reason: str | None
    """Why it is no sound bundle, or None."""


class Replayed(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one workspace's bundles."""

    workspace: str
    sequence: int
    root: str
    applied: int
    skipped: int
    """Applied before, or replaced by a later epoch's bundle."""


@dataclass(slots=True)
class Exported:
    """What an export wrote."""

    paths: list[Path] = field(default_factory=list)
    root: str = ""
    """The root of the tree after the last bundle."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Paths whose content is gone or changes, with the reason."""


@dataclass(frozen=True, slots=True)
class BundleFile:
    """A bundle file and what it says of itself."""

    path: Path
    metadata: Metadata

    @property
    def link(self) -> Link:
        """Its place among others."""
        manifest, header = self.metadata.manifest, self.metadata.header
        root = bytes.fromhex(manifest.root)
        return Link(self.path.name, header.epoch, header.sequence, header.parent_root, root, manifest.created_at)


def bundle_list(state: State) -> list[Listed]:
    """Return the pending and the kept bundles of a workspace, in order."""
    rows = sorted((*outbox.kept(state), *outbox.pending(state)), key=lambda row: row.sequence)
    return [_listed(state, row) for row in rows]


def _listed(state: State, row: outbox.OutboxRow) -> Listed:
    path, file_bytes = state.folder / outbox.FOLDER / (row.file or ""), None
    with contextlib.suppress(FileNotFoundError):
        file_bytes = path.stat().st_size if row.file else None
    return Listed(
        sequence=row.sequence,
        epoch=row.epoch,
        identity=row.identity.hex(),
        root=row.root.hex(),
        state=row.state,
        content_bytes=row.content_bytes,
        sealed_at=row.sealed_at,
        file=str(path) if row.file else None,
        file_bytes=file_bytes,
    )


def bundle_show(path: Path) -> dict[str, object]:
    """Return a bundle file's manifest, with `operations` in full instead of their counts, and its identity."""
    metadata = _read(path)
    shown_manifest: dict[str, object] = msgspec.to_builtins(metadata.manifest)
    shown_manifest["operations"] = msgspec.to_builtins(metadata.operations)
    shown_manifest["identity"] = metadata.identity.hex()
    return shown_manifest


def bundle_verify(paths: Iterable[Path]) -> list[Verified]:
    """Read bundle files to their ends, strictly, and say of each whether it is sound."""
    return [_verified(path) for path in paths]


def _verified(path: Path) -> Verified:
    try:
        metadata = pack.verify(path)
        if parse_file_name(path.name) and path.name != file_name(metadata):
            raise UsageError(f"its name is not {file_name(metadata)}")
    except (DeltasyncError, OSError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else f"{error}{advice(error)}"
        return Verified(path=str(path), identity=None, reason=reason)
    return Verified(path=str(path), identity=metadata.identity.hex(), reason=None)


def bundle_files(folder: Path) -> list[BundleFile]:
    """Return the bundle files of a folder; raises UsageError, NotFound, or what is wrong with one of them."""
    try:
        paths = sorted(path for path in folder.iterdir() if path.name.endswith(SUFFIX))
    except OSError as error:
        raise UsageError(f"{shown(str(folder))} is no folder that can be read: {error.strerror}") from error
    if not paths:
        raise NotFound(f"{shown(str(folder))} holds no bundle (*{SUFFIX})")
    return [BundleFile(path, _read(path)) for path in paths]


def _read(path: Path) -> Metadata:
    try:
        return pack.read_metadata(path)
    except OSError as error:
        raise UsageError(f"{shown(str(path))} cannot be read: {error.strerror}") from error
    except DeltasyncError as error:
        name_file(error, path.name)
        raise


# Replay


def replay(
    folder: Path,
    transport: Transport,
    *,
    workspace: str | None = None,
    take_over: bool = False,
    say: Callable[[str], None] | None = None,
) -> list[Replayed]:
    """Send the bundle files of a folder to a receiver, in the order of their chain (spec H-60 to H-64).

    workspace: the name to send to; without it each bundle goes to the workspace that it names.
    Raises SequenceConflict, naming the bundle, where the chain is broken; what comes before is applied then.
    """
    groups = _by_workspace(bundle_files(folder), workspace)
    return [
        _Replay(transport, name, files, take_over=take_over, say=say or (lambda _: None)).run()
        for name, files in groups.items()
    ]


def _by_workspace(files: Iterable[BundleFile], wanted: str | None) -> dict[str, list[BundleFile]]:
    groups: defaultdict[str, list[BundleFile]] = defaultdict(list)
    for each in files:
        groups[each.metadata.manifest.collection_name].append(each)
    if wanted is None:
        return groups
    if wanted not in groups and len(groups) > 1:
        raise UsageError(f"the folder holds {', '.join(map(shown, sorted(groups)))}; --workspace names one of them")
    try:
        return {parse_workspace(wanted): groups[wanted] if wanted in groups else next(iter(groups.values()))}
    except NameRefused as error:
        raise UsageError(f"{shown(wanted)} is no workspace name: {error}") from error


class _Replay:
    """The bundles of one workspace on their way to a receiver."""

    def __init__(
        self,
        transport: Transport,
        name: str,
        files: Sequence[BundleFile],
        *,
        take_over: bool,
        say: Callable[[str], None],
    ) -> None:
        self._transport, self._name, self._say = transport, name, say
        self._take_over = take_over
        self._files = {each.path.name: each for each in files}
        self._applied = self._skipped = 0

    def run(self) -> Replayed:
        """Send what continues the head; raises SequenceConflict for what does not."""
        head = self._transport.workspace(self._name)
        root = resync.root_of(head)
        links = [each.link for each in self._files.values()]
        stray = self._skip_passed([each for each in links if each.sequence <= head.sequence], head.sequence, root)
        ahead = [each for each in links if each.sequence > head.sequence]
        if head.sequence == 0 and not self._transport.has_cache:
            chain = _from_first(ahead)
        else:
            chain = continue_from(ahead, epoch=head.epoch, sequence=head.sequence, root=root)
        for link in chain.follow:
            self._send(link)
            self._applied += 1
            self._say(f"{shown(self._name)} {link.sequence}: sent {shown(link.name)}")
        self._skipped += len(chain.superseded)
        stray += chain.stray
        head = self._transport.workspace(self._name)
        if chain.follow and head.sequence < chain.follow[-1].sequence:
            last = chain.follow[-1].sequence
            raise RootMismatch(
                f"the server acknowledged bundle {last} of {shown(self._name)} and does not have it; "
                "have `deltasync-server check` look at its store"
            )
        if stray:
            raise self._broken(stray[0], head.sequence + 1, is_gap=all(each.sequence > head.sequence for each in stray))
        return Replayed(
            workspace=self._name,
            sequence=head.sequence,
            root=head.root,
            applied=self._applied,
            skipped=self._skipped,
        )

    def _skip_passed(self, links: list[Link], sequence: int, root: bytes) -> list[Link]:
        """Return those of the bundles that the head has passed which were neither applied nor replaced (spec H-63)."""
        proven: set[Link] = set()
        while found := next((each for each in links if (each.sequence, each.root) == (sequence, root)), None):
            proven.add(found)
            sequence, root = found.sequence - 1, found.parent_root
        refused = [each for each in links if each not in proven and not self._was_applied(each)]
        passed = {each.sequence for each in links if each not in refused}
        stray = [each for each in refused if each.sequence not in passed]
        self._skipped += len(links) - len(stray)
        return stray

    def _was_applied(self, link: Link) -> bool:
        """Ask the receiver by sending the bundle again: a repeat is answered with its first receipt, early."""
        try:
            self._send(link)
        except SequenceConflict:
            return False
        return True

    def _send(self, link: Link) -> None:
        """Send one bundle file, again when the answer was lost."""
        each, attempt = self._files[link.name], 0
        while True:
            try:
                chunks = pack.file_chunks(each.path)
                receipt = self._transport.send_bundle(
                    self._name,
                    each.metadata.identity,
                    chunks,
                    take_over=self._take_over,
                    patience=making_seconds(each.metadata.manifest),
                )
                check_receipt(receipt, self._name, each.metadata.manifest, each.metadata.identity)
                return
            except pack.FileLost as error:
                raise UsageError(f"{error}; the bundles before it are applied") from error
            except ContentMissing as error:
                lacking = naming(each.metadata, error.missing)
                error.sentence = (
                    f"{shown(link.name)} is thin: it does not carry the content of {lacking}, and the server lacks it; "
                    "`deltasync bundle export PATH DIR --full` writes bundles that carry everything"
                )
                error.args = (error.sentence,)
                raise
            except Refused as error:
                name_file(error, link.name)
                raise
            except (HostUnreachable, HostBusy) as error:
                if attempt >= self._transport.max_retries:
                    raise
                self._transport.back_off(attempt, error)
            attempt += 1  # the same bundle twice gives the first receipt again (spec S-2)

    def _broken(self, link: Link, expected: int, *, is_gap: bool) -> SequenceConflict:
        is_missing = is_gap and link.sequence > expected
        return broken(shown(self._name), expected, shown(link.name), is_missing=is_missing)


def _from_first(links: list[Link]) -> Chain:
    """Return the chain that begins with the lowest number: an empty folder takes any."""
    if not links:
        return Chain()
    first = min(links, key=lambda each: (each.sequence, each.created_at))
    return continue_from(links, epoch=first.epoch, sequence=first.sequence - 1, root=first.parent_root)


# Export


def export(
    state: State, target: Path, *, full: bool = False, level: int | None = None, rescan: Rescan | None = None
) -> Exported:
    """Write a workspace's bundles into a folder, to be carried to a host.

    Without `full` these are the pending and the kept ones, as they are. With it they are a chain that leads from the
    empty tree to the present one and carries all content: the kept ones where they are such a chain, else newly sealed
    ones in an epoch of their own, which an empty server takes.
    level: of zstd, for what is sealed here. rescan: observes folders again in which a file changed; without it such
    files are left out.
    """
    try:
        if target.resolve().is_relative_to(state.root):
            raise UsageError(f"{shown(str(target))} lies in the workspace itself; export to a folder outside of it")
        target.mkdir(parents=True, exist_ok=True)
        return _exported(state, target, rescan, full=full, level=level)
    except OSError as error:
        raise UsageError(f"{shown(str(target))} cannot be written: {error.strerror}") from error


def _exported(state: State, target: Path, rescan: Rescan | None, *, full: bool, level: int | None) -> Exported:
    rows = sorted((*outbox.kept(state), *outbox.pending(state)), key=lambda row: row.sequence)
    if not full:
        return _copied(state, list(_files_of(state, rows, level)), target)
    files = [outbox.folder(state) / row.file for row in rows if row.file]
    if _is_whole(files, state.observed_root()):
        return _copied(state, files, target)
    return _Sealing(state, target, rescan, level).run()


def _files_of(state: State, rows: Iterable[outbox.OutboxRow], level: int | None) -> Iterator[Path]:
    """Yield the bundle files of the outbox; a pending bundle without one gets it now."""
    for row in rows:
        if row.file is None:
            metadata = outbox.metadata_of(state, row.sequence)
            if part.FEATURE in metadata.manifest.requires:
                raise HostBusy("a large file is on its way in parts; push again, or export with --full")
            digests = content_operations(metadata).keys()
            may_plan = FEATURE in metadata.manifest.requires
            plans = plans_by_holes(state.root, metadata.operations, digests) if may_plan else {}
            source = pack.Source(state.root, proves_holes=True)
            chunks = pack.packed(metadata, digests, source, plans, level=level)
            try:
                path = pack.write_bundle(outbox.folder(state), metadata, chunks)
            except ContentChanged as change:
                raise HostBusy(f"{change}; push or scan the folder, then export again") from change
            outbox.attach_file(state, row.sequence, path.name)
        else:
            path = outbox.folder(state) / row.file
        yield path


def _is_whole(paths: Iterable[Path], root: bytes) -> bool:
    """Tell whether bundle files lead from the empty tree to a root, each with content that none before it carries."""
    files: dict[str, BundleFile] = {}
    carried: dict[str, set[str]] = {}
    for path in paths:
        try:
            metadata, digests = pack.carried_digests(path)
        except (DeltasyncError, OSError):
            return False
        each = BundleFile(path, metadata)
        files[path.name], carried[path.name] = each, digests
    chain = continue_from([each.link for each in files.values()], epoch="", sequence=0, root=EMPTY_ROOT)
    here: set[str] = set()
    for link in chain.follow:
        here |= carried[link.name]
        if not here.issuperset(content_operations(files[link.name].metadata)):
            return False
    return not (chain.stray or chain.superseded) and (chain.follow[-1].root if chain.follow else EMPTY_ROOT) == root


def _copied(state: State, files: Sequence[Path], target: Path) -> Exported:
    for row in outbox.pending(state):
        outbox.mark_left(state, row.sequence)  # before the file is there: its number can never mean another bundle
    exported = Exported(root=outbox.head(state).sealed_root.hex())
    for path in files:
        with staged(target / path.name) as out:
            for chunk in pack.file_chunks(path):
                out.write(chunk)
        exported.paths.append(target / path.name)
    return exported


class _Sealing:
    """A chain from the empty tree to the observed one, sealed into a folder for an export."""

    def __init__(self, state: State, target: Path, rescan: Rescan | None, level: int | None) -> None:
        self._state, self._target, self._rescan, self._level = state, target, rescan, level
        self._exported = Exported()

    def run(self) -> Exported:
        """Seal, again from the start when a file turns out to be changed."""
        for attempt in range(ATTEMPTS_MAX):
            try:
                self._write(self._exported)
            except ContentChanged as change:
                for path in self._exported.paths:
                    path.unlink()
                self._exported.paths.clear()
                self._set_aside(change, is_last=attempt + 2 >= ATTEMPTS_MAX)
            else:
                return self._exported
        raise HostBusy("the folder changes faster than it can be exported; try again when it is quiet")

    def _set_aside(self, change: ContentChanged, *, is_last: bool) -> None:
        if self._rescan is None or is_last:
            self._exported.left_out[change.path] = change.reason
        else:
            self._rescan({change.path.rpartition("/")[0]})

    def _write(self, exported: Exported) -> None:
        state, load = self._state, self._state.load
        name = outbox.head(state).workspace or state.root.name
        target, objects = seal.without(state.observed_root(), EMPTY_ROOT, exported.left_out, load)
        known = dict(objects)
        laid = seal.overlaid(load, known)
        operations = diff(EMPTY_ROOT, target, laid)
        writer = seal.Writer(name, str(state.root), state.client_id, secrets.token_hex(16))
        most = seal.operations_max(operations, wire.Limits())
        contents = seal.Contents(operations, EMPTY_ROOT, laid, list, exact=True, known=set())
        span = seal.Span(EMPTY_ROOT, target, 1)
        streams, source = Streams(None), pack.Source(state.root, proves_holes=True)

        def planned(operations: Sequence[Operation], digests: Collection[str]) -> dict[str, Plan]:
            plans = plans_by_holes(state.root, operations, digests)
            return streams.planned(operations, digests, plans, seal.content_max(wire.Limits()))

        cuts = seal.Cuts(
            contents, span, writer, laid, wire.Limits(), max_operations=most, planned=planned, left=streams.left
        )
        for cut in cuts:
            known |= cut.objects
            if cut.part is not None:
                chunks = pack.packed_part(cut.metadata, cut.part, source, streams, level=self._level)
            else:
                chunks = pack.packed(cut.metadata, cut.digests, source, cut.plans, level=self._level)
            exported.paths.append(pack.write_bundle(self._target, cut.metadata, chunks))
        exported.root = target.hex()
