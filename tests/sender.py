"""A sender for tests of the store: seals real bundles from flat trees, and compares plain folders with them."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from trees import Flat, Objects

from deltasync.core import bundle, delta, wire
from deltasync.core.bundle import Metadata
from deltasync.core.hashing import digest_of
from deltasync.core.manifest import EMPTY_ROOT, Entry, Kind, Operation
from deltasync.core.names import WorkspaceName
from deltasync_server.receive import Store
from deltasync_server.tenants import DEFAULT

NAME = WorkspaceName("proj")
ALICE, BOB = "a" * 32, "b" * 32
DAY = 86_400 * 10**9
"""An mtime that every file system holds."""


@dataclass
class Sender:
    """One client history of one workspace; `flat` is the tree that it sent last."""

    client_id: str = ALICE
    epoch: str = "1" * 32
    name: WorkspaceName = NAME
    sequence: int = 0
    root: bytes = EMPTY_ROOT
    flat: Flat = field(default_factory=dict)
    contents: dict[bytes, bytes] = field(default_factory=dict)
    objects: Objects = field(default_factory=Objects)

    def file(self, path: str, content: bytes = b"", *, mtime_ns: int = DAY, executable: bool = False) -> Entry:
        """Return an entry whose content this sender has."""
        digest = digest_of(content)
        self.contents[digest] = content
        return Entry(path.rpartition("/")[2], Kind.FILE, len(content), mtime_ns, executable, digest)

    def tree(self, **files: bytes) -> Flat:
        """Return a tree of files in the top folder; '__' in a name stands for '/'."""
        flat: Flat = {}
        for key, content in files.items():
            path = key.replace("__", "/")
            for number, character in enumerate(path):
                if character == "/":
                    parent = path[:number]
                    flat[parent] = Entry(parent.rpartition("/")[2], Kind.DIRECTORY)
            flat[path] = self.file(path, content)
        return flat

    def seal(self, flat: Flat, without: Iterable[bytes] = (), *, is_thin: bool = False) -> tuple[Metadata, bytes]:
        """Return the next bundle, which leads to a tree; sealing alone does not move this sender on.

        without: digests whose content stays behind. is_thin: all content does.
        """
        root = self.objects.build(flat)
        return self.seal_operations(delta.diff(self.root, root, self.objects.load), root, without, is_thin=is_thin)

    def seal_operations(
        self, operations: list[Operation], root: bytes, without: Iterable[bytes] = (), *, is_thin: bool = False
    ) -> tuple[Metadata, bytes]:
        """Return the next bundle with these operations."""
        metadata = self.compose(operations, root)
        left = {digest.hex() for digest in without}
        carried = [] if is_thin else [d for d in bundle.content_operations(metadata) if d not in left]
        return metadata, b"".join(bundle.seal(metadata, carried, self._read))

    def compose(self, operations: list[Operation], root: bytes, *requires: str) -> Metadata:
        """Return the metadata of the next bundle."""
        return bundle.compose(
            operations,
            workspace=self.name,
            workspace_path="/somewhere",
            epoch=self.epoch,
            sequence=self.sequence + 1,
            parent_root=self.root,
            root=root,
            client_id=self.client_id,
            bundle_id="00000000-0000-4000-8000-000000000001",
            created_at=datetime(2026, 11, 21, tzinfo=UTC),
            requires=requires,
        )

    def _read(self, operation: Operation) -> Iterator[bytes]:
        yield self.contents[bytes.fromhex(operation.digest or "")]

    def move_on(self, flat: Flat) -> None:
        """Take the next bundle as acknowledged."""
        self.flat, self.root = dict(flat), self.objects.build(flat)
        self.sequence += 1

    def send(self, store: Store, flat: Flat, *, is_thin: bool = False, take_over: bool = False) -> wire.Receipt:
        """Seal, send, and move on when the store took it."""
        metadata, sealed = self.seal(flat, is_thin=is_thin)
        receipt = give(store, metadata, sealed, take_over=take_over)
        self.move_on(flat)
        assert receipt.root == self.root.hex()
        return receipt

    def heal(self, store: Store, digests: Iterable[bytes]) -> wire.Receipt:
        """Send content again that the store asked for, in a bundle that changes nothing."""
        wanted = set(digests)
        operations = [delta_updated(path, entry) for path, entry in sorted(self.flat.items()) if entry.digest in wanted]
        metadata, sealed = self.seal_operations(operations, self.root)
        receipt = give(store, metadata, sealed)
        self.sequence += 1
        return receipt


def delta_updated(path: str, entry: Entry) -> Operation:
    """Return the operation that says a file is as it was."""
    digest = entry.digest.hex()
    return Operation(
        operation=delta.Verb.UPDATED,
        kind=Kind.FILE,
        path=path,
        base=digest,
        digest=digest,
        size=entry.size,
        executable=entry.executable,
        mtime_ns=entry.mtime_ns,
    )


def give(store: Store, metadata: Metadata, sealed: bytes, *, take_over: bool = False) -> wire.Receipt:
    """Let the store receive a sealed bundle."""
    name = WorkspaceName(metadata.manifest.collection_name)
    return store.receive(name, io.BytesIO(sealed), expected_identity=metadata.identity, take_over=take_over)


def give_file(store: Store, content: bytes, path: str = "/home/alice/f") -> wire.StoredFile:
    """Upload a plain file in one piece."""
    digest = digest_of(content).hex()
    asked = wire.UploadRequest(kind="file", hostname="host", filepath=path, file_size=len(content), blake3=digest)
    upload = store.uploads.initiate(DEFAULT, asked).upload_id
    store.uploads.put(DEFAULT, upload, 0, io.BytesIO(content))
    stored = store.complete_upload(DEFAULT, upload, wire.UploadComplete())
    assert isinstance(stored, wire.StoredFile)
    return stored


def tree_of(store: Store, name: str = NAME) -> Path:
    """Return where a workspace's plain folder is."""
    return Path(store.workspace(WorkspaceName(name)).tree_path)


def seen(folder: Path) -> dict[str, tuple[object, ...]]:
    """Return everything below a folder, as bytes and attributes."""
    found: dict[str, tuple[object, ...]] = {}
    for above, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(above, name)
            status = path.lstat()
            key = str(path.relative_to(folder))
            if stat.S_ISLNK(status.st_mode):
                found[key] = ("symlink", os.readlink(path))
            elif stat.S_ISDIR(status.st_mode):
                found[key] = ("directory",)
            else:
                found[key] = ("file", path.read_bytes(), status.st_mtime_ns, bool(status.st_mode & 0o111))
    return found


def meant(sender: Sender) -> dict[str, tuple[object, ...]]:
    """Return what a plain folder of the sender's tree must look like to `seen`."""
    found: dict[str, tuple[object, ...]] = {}
    for path, entry in sender.flat.items():
        if entry.kind is Kind.FILE:
            found[path] = ("file", sender.contents[entry.digest], entry.mtime_ns, entry.executable)
        elif entry.kind is Kind.SYMLINK:
            found[path] = ("symlink", entry.target)
        else:
            found[path] = ("directory",)
    return found


def assert_tree(store: Store, sender: Sender) -> None:
    """Bring trees forward and fail unless the plain folder is the sender's tree, byte by byte."""
    store.catch_up()
    assert seen(tree_of(store, sender.name)) == meant(sender)
    state = store.workspace(sender.name)
    assert (state.tree_sequence, state.root) == (sender.sequence, sender.root.hex())


def blob_of(data: Path, entry: Entry) -> Path:
    """Return the file of an entry's blob in a store."""
    name = entry.digest.hex()
    return data / "cache" / name[:2] / name


def zero(path: Path) -> None:
    """Fill a file with zeros and leave its size, time and mode, as a power cut does."""
    status = path.stat()
    path.chmod(0o644)
    path.write_bytes(bytes(status.st_size))
    os.utime(path, ns=(status.st_mtime_ns, status.st_mtime_ns))
    path.chmod(status.st_mode & 0o777)
