"""A folder as the receiver: bundle files for a host that no network reaches, on a USB disk for example."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from deltasync.client.pack import read_metadata
from deltasync.core import wire
from deltasync.core.bundle import BundleReader
from deltasync.core.delta import apply
from deltasync.core.errors import (
    DeltasyncError,
    HostUnreachable,
    NotFound,
    NotOwner,
    Refused,
    SequenceFork,
    SequenceGap,
    StaleEpoch,
)
from deltasync.core.manifest import EMPTY_ROOT, Entry, decode_directory
from deltasync.core.metadata import FEATURES, FileName, Metadata, file_name, parse_file_name
from deltasync.core.names import shown
from deltasync.core.sequence import Head, Verdict, decide
from deltasync.disk import staged


class FolderTransport:
    """A folder that bundles are written to; its head is the last bundle of the workspace that lies there.

    A folder has no cache: a bundle may lack only content that an earlier bundle of the chain carries. A folder whose
    bundles were all taken away (carried to the host) takes the next one of the chain, whatever its number.
    """

    has_cache = False
    max_retries = 0
    link_bytes_per_second = 0.0

    def __init__(self, path: Path) -> None:
        """Read nothing yet."""
        self.url = path.as_uri()
        self.sent_bytes = 0
        self.requests = 0
        self._path = path
        self._bodies: dict[bytes, bytes] = {}

    def workspace(self, name: str, *, tree_sequence: int | None = None, wait: float = 0.0) -> wire.WorkspaceState:
        """Return the state that the last bundle in the folder describes; a folder has no tree to wait for."""
        last = self._last(name)
        manifest = last.manifest if last else None
        return wire.WorkspaceState(
            workspace=name,
            client_id=manifest.client_id if manifest else "",
            epoch=manifest.epoch if manifest else "",
            sequence=manifest.sequence_number if manifest else 0,
            root=manifest.root if manifest else EMPTY_ROOT.hex(),
            tree_path=str(self._path),
            tree_sequence=None,
            files=0,
            content_bytes=0,
            last_applied_at=manifest.created_at if manifest else None,
            last_bundle_id=manifest.bundle_id if manifest else None,
            lag=0,
            features=sorted(FEATURES),
        )

    def missing(self, name: str, digests: Sequence[str]) -> list[str]:
        """Return all of them: what the chain holds is known without asking."""
        return list(digests)

    def sizes(self, name: str, sizes: Sequence[int]) -> list[int]:
        """Return all of them: bundle files do not say what their receiver has."""
        return list(sizes)

    def directory(self, name: str, digest: bytes) -> bytes:
        """Return the body of a directory object, rebuilt from the operations of the whole chain."""
        if digest not in self._bodies:
            self._rebuild(name)
        if digest not in self._bodies:
            raise NotFound(
                f"the bundles in {self._path} do not reach back to the empty tree, so that nobody knows theirs; "
                "carry them away and push into the empty folder, or export --full"
            )
        return self._bodies[digest]

    def sequences(self, name: str) -> list[wire.KeptSequence]:
        """Return what the bundle files in the folder say, oldest first."""
        read = [read_metadata(path) for path in self._files(name).values()]
        return [
            wire.KeptSequence(
                epoch=each.manifest.epoch,
                sequence=each.manifest.sequence_number,
                identity=each.identity.hex(),
                root=each.manifest.root,
                applied_at=each.manifest.created_at,
            )
            for each in read
        ]

    def recipe(self, name: str, digest: bytes, average_bytes: int) -> bytes:
        """Know of none."""
        raise NotFound(f"a folder has no recipe of {digest.hex()} of {shown(name)}")

    def send_bundle(
        self,
        name: str,
        identity: bytes,
        chunks: Iterable[bytes],
        *,
        take_over: bool = False,
        wait: float = 0.0,
        patience: float = 0.0,
    ) -> wire.Receipt:
        """Write a bundle file, verified while it is written; it appears whole, durably, or not at all."""
        self.requests += 1
        try:
            return self._send(name, identity, _Tee(chunks), take_over=take_over)
        except OSError as error:
            raise HostUnreachable(f"{self._path} cannot be written ({error.strerror}); is the disk mounted?") from error

    def _send(self, name: str, identity: bytes, tee: _Tee, *, take_over: bool) -> wire.Receipt:
        reader = BundleReader(tee, wire.Limits())
        metadata = reader.metadata()
        if metadata.identity != identity or metadata.manifest.collection_name != name:
            raise Refused("B-26", f"the bundle is not {identity.hex()} of {shown(name)}")
        final = self._path / file_name(metadata)
        if final.exists():
            return _receipt(read_metadata(final), 0, is_duplicate=True)
        self._check(name, metadata, take_over=take_over)
        content_bytes = 0
        with staged(final) as out:
            tee.write_to(out.write)
            for operation, views, recipe in reader.contents():
                content_bytes += operation.size if recipe is None else recipe.new_bytes
                for _ in views:
                    pass
            reader.finish()
        self.sent_bytes += tee.taken_bytes
        return _receipt(metadata, content_bytes)

    def back_off(self, attempt: int, error: DeltasyncError | None = None) -> None:
        """Wait for nothing: a folder is there or not."""

    def close(self) -> None:
        """Hold nothing."""

    def _check(self, name: str, metadata: Metadata, *, take_over: bool) -> None:
        """Raise unless the bundle follows the last one in the folder (spec S-1 to S-8)."""
        last = self._last(name)
        if last is None:
            return
        manifest, header = last.manifest, metadata.header
        starts = {each.epoch_start for each in self._files(name)} - {manifest.epoch[:8]}
        past = frozenset({header.epoch} if header.epoch[:8] in starts else ())
        head = Head(manifest.client_id, manifest.epoch, manifest.sequence_number, bytes.fromhex(manifest.root), past)
        verdict = decide(head, None, header, take_over=take_over)
        if verdict is Verdict.GAP:
            raise SequenceGap(head.sequence + 1, header.sequence)
        if verdict is Verdict.NOT_OWNER:
            raise NotOwner(f"{self._path} holds {shown(name)} of another client; --take-over continues it")
        if verdict is Verdict.STALE_EPOCH:
            raise StaleEpoch(f"bundle {header.sequence} belongs to a history that {self._path} has left behind")
        if verdict is not Verdict.APPLY:
            raise SequenceFork(f"bundle {header.sequence} does not follow bundle {head.sequence} in {self._path}")

    def _files(self, name: str) -> dict[FileName, Path]:
        """Return the workspace's bundle files by what their names tell, in the order of their numbers."""
        try:
            paths = list(self._path.iterdir())
        except OSError as error:
            raise HostUnreachable(f"{self._path} cannot be read ({error.strerror}); is the disk mounted?") from error
        named = [(found, path) for path in paths if (found := parse_file_name(path.name)) and found.workspace == name]
        return dict(sorted(named, key=lambda each: each[0].sequence))

    def _last(self, name: str) -> Metadata | None:
        files = self._files(name)
        if not files:
            return None
        *_, top = files
        twins = [path for each, path in files.items() if each.sequence == top.sequence]
        if len(twins) > 1:
            names = " and ".join(path.name for path in twins)
            raise SequenceFork(f"{names} have one number in {self._path}; take the one away that belongs elsewhere")
        try:
            return read_metadata(twins[0])
        except OSError as error:
            raise HostUnreachable(f"{twins[0]} cannot be read ({error.strerror}); is the disk sound?") from error

    def _rebuild(self, name: str) -> None:
        root = EMPTY_ROOT
        for path in self._files(name).values():
            metadata = read_metadata(path)
            if metadata.header.parent_root != root:
                return
            applied = apply(root, metadata.operations, self._load)
            self._bodies |= applied.objects
            root = applied.root

    def _load(self, digest: bytes) -> list[Entry]:
        return decode_directory(self._bodies[digest])


class _Tee:
    """A source for the strict reader that passes every byte on to a file, once there is one."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks: Iterator[bytes] = iter(chunks)
        self._rest = b""
        self._held: list[bytes] = []
        self._write: Callable[[bytes], object] = self._held.append
        self.taken_bytes = 0

    def write_to(self, write: Callable[[bytes], object]) -> None:
        """Pass what came so far, and from now on everything, to a file's write."""
        for chunk in self._held:
            write(chunk)
        self._held = []
        self._write = write

    def read(self, size: int) -> bytes:
        """Return the next bytes."""
        if not self._rest:
            self._rest = next(self._chunks, b"")
            self.taken_bytes += len(self._rest)
            self._write(self._rest)
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken


def _receipt(metadata: Metadata, content_bytes: int, *, is_duplicate: bool = False) -> wire.Receipt:
    manifest = metadata.manifest
    return wire.Receipt(
        workspace=manifest.collection_name,
        epoch=manifest.epoch,
        sequence=manifest.sequence_number,
        identity=metadata.identity.hex(),
        bundle_id=manifest.bundle_id,
        root=manifest.root,
        created=manifest.operations.created,
        updated=manifest.operations.updated,
        moved=manifest.operations.moved,
        deleted=manifest.operations.deleted,
        content_bytes=content_bytes,
        applied_at=datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        tree_sequence=None,
        duplicate=is_duplicate,
    )
