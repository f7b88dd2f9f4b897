"""Apply the bundle files of a folder, in their order, to a store that no server holds (spec H-60 to H-64)."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import msgspec

from deltasync.core import wire
from deltasync.core.bundle import BundleReader, Metadata, name_file
from deltasync.core.chain import Link, broken, continue_from, replaced
from deltasync.core.errors import (
    ContentMissing,
    DeltasyncError,
    NotFound,
    Refused,
    SequenceConflict,
    UsageError,
)
from deltasync.core.metadata import naming
from deltasync.core.names import NameRefused, WorkspaceName, parse_workspace, shown
from deltasync_server.config import StoreConfig
from deltasync_server.opening import open_store
from deltasync_server.receive import Store

SUFFIX = ".tar.zst"


class Replayed(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one workspace's bundles."""

    workspace: str
    sequence: int
    root: str
    tree_path: str
    applied: int
    skipped: int
    """Applied before, or replaced by a later epoch's bundle."""

    def __str__(self) -> str:
        """Say it to a person."""
        return (
            f"{shown(self.workspace)}: sequence {self.sequence}, root {self.root}, "
            f"{self.applied} applied, {self.skipped} skipped"
        )


class _File(NamedTuple):
    path: Path
    metadata: Metadata

    @property
    def link(self) -> Link:
        manifest, header = self.metadata.manifest, self.metadata.header
        root = bytes.fromhex(manifest.root)
        return Link(self.path.name, header.epoch, header.sequence, header.parent_root, root, manifest.created_at)


def replay(config: StoreConfig, folder: Path, *, workspace: str | None, say: Callable[[str], None]) -> list[Replayed]:
    """Apply what a folder holds; raises SequenceConflict, naming the bundle, where the chain is broken.

    workspace: the name to apply to; without it each bundle goes to the workspace that it names.
    """
    files = [_File(path, _read(path, config.limits)) for path in _paths(folder)]
    groups = _by_workspace(files, workspace)
    with open_store(dataclasses.replace(config, keeps_streams=True)) as store:
        try:
            return [_Replay(store, name, own, say).run() for name, own in groups.items()]
        except DeltasyncError:
            _settle(store)  # what was applied before the chain broke is applied
            raise


def _settle(store: Store) -> None:
    """Bring the trees forward and make everything durable, so that the next server has nothing to recover."""
    store.catch_up()
    store.upkeep()


def _paths(folder: Path) -> list[Path]:
    try:
        paths = sorted(path for path in folder.iterdir() if path.name.endswith(SUFFIX) and path.is_file())
    except OSError as error:
        raise UsageError(f"{shown(str(folder))} is no folder that can be read: {error.strerror}") from error
    if not paths:
        raise NotFound(f"{shown(str(folder))} holds no bundle (*{SUFFIX})")
    return paths


def _read(path: Path, limits: wire.Limits) -> Metadata:
    with path.open("rb") as source:
        try:
            return BundleReader(source, limits).metadata()
        except DeltasyncError as error:
            name_file(error, path.name)
            raise


def _by_workspace(files: Iterable[_File], wanted: str | None) -> dict[WorkspaceName, list[_File]]:
    groups: defaultdict[str, list[_File]] = defaultdict(list)
    for each in files:
        groups[each.metadata.manifest.collection_name].append(each)
    if wanted is not None and wanted in groups:
        groups = defaultdict(list, {wanted: groups[wanted]})
    elif wanted is not None and len(groups) > 1:
        raise UsageError(f"the folder holds {', '.join(map(shown, sorted(groups)))}; --workspace names one of them")
    try:
        return {parse_workspace(wanted or name): own for name, own in groups.items()}
    except NameRefused as error:
        raise UsageError(f"not a workspace name: {error}") from error


class _Replay:
    """The bundles of one workspace on their way into its store."""

    def __init__(self, store: Store, name: WorkspaceName, files: list[_File], say: Callable[[str], None]) -> None:
        self._store, self._name, self._say = store, name, say
        self._files = {each.path.name: each for each in files}
        self._links = [each.link for each in files]
        self._applied = self._skipped = 0

    def run(self) -> Replayed:
        head = self._store.workspace(self._name)
        stray = self._skip_passed([link for link in self._links if link.sequence <= head.sequence])
        ahead = [link for link in self._links if link.sequence > head.sequence]
        chain = continue_from(ahead, epoch=head.epoch, sequence=head.sequence, root=bytes.fromhex(head.root))
        for link in chain.follow:
            self._receive(link)
            self._applied += 1
            self._say(f"{shown(self._name)} {link.sequence}: applied {shown(link.name)}")
        self._skipped += len(chain.superseded)
        if stray := [*stray, *chain.stray]:
            raise self._broken(stray)
        return self._settled()

    def _receive(self, link: Link) -> wire.Receipt:
        each = self._files[link.name]
        try:
            with each.path.open("rb") as source:
                identity = each.metadata.identity
                return self._store.receive(self._name, source, expected_identity=identity, may_be_host=True)
        except Refused as error:
            name_file(error, each.path.name)
            raise
        except ContentMissing as error:
            lacking = naming(each.metadata, error.missing)
            error.sentence = (
                f"{shown(link.name)} is thin: it does not carry the content of {lacking}, and the store lacks it; "
                "`deltasync bundle export PATH DIR --full` writes bundles that carry everything"
            )
            error.args = (error.sentence,)
            raise

    def _skip_passed(self, links: list[Link]) -> list[Link]:
        """Return those of the bundles that the head has passed which were neither applied nor replaced (spec H-63)."""
        refused: list[Link] = []
        for link in links:
            try:
                self._receive(link)
            except SequenceConflict:
                refused.append(link)
        known = replaced(refused, [link for link in links if link not in refused])
        stray = [link for link in refused if link not in known]
        self._skipped += len(links) - len(stray)
        return stray

    def _broken(self, stray: list[Link]) -> SequenceConflict:
        following = self._store.workspace(self._name).sequence + 1
        is_missing = all(link.sequence > following for link in stray)
        return broken(shown(self._name), following, shown(stray[0].name), is_missing=is_missing)

    def _settled(self) -> Replayed:
        _settle(self._store)
        state = self._store.workspace(self._name)
        return Replayed(
            workspace=state.workspace,
            sequence=state.sequence,
            root=state.root,
            tree_path=state.tree_path,
            applied=self._applied,
            skipped=self._skipped,
        )
