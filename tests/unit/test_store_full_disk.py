"""A full disk: a bundle is refused whole, what was there stays, and all goes on when space returns."""

from __future__ import annotations

import io
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from sender import DAY, NAME, Sender, assert_tree, give, tree_of

from deltasync.core import wire
from deltasync.core.errors import NoSpace
from deltasync_server.config import StoreConfig
from deltasync_server.receive import Store

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs needs root")]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 MiB and 3,000 inodes."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m,nr_inodes=3000", "tmpfs", str(mounted)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this system mounts no tmpfs")
    yield mounted
    subprocess.run(["umount", "--lazy", str(mounted)], check=True)


@pytest.fixture
def store(disk: Path) -> Iterator[Store]:
    with Store(StoreConfig(disk / "data", low_disk_bytes=0)) as opened:
        opened.recover()
        yield opened


def fill(disk: Path, leave_bytes: int) -> Path:
    """Use up the disk but for so many bytes."""
    ballast = disk / "ballast"
    free = os.statvfs(disk)
    with ballast.open("wb") as out:
        out.write(bytes(max(0, free.f_bavail * free.f_frsize - leave_bytes)))
    return ballast


def noise(seed: int, size: int) -> bytes:
    return b"".join((seed * 1_000_003 + number).to_bytes(8, "little") * 2 for number in range(size // 16))


@pytest.mark.parametrize("leave_bytes", [0, 4096, 100_000, 400_000, 1_500_000, 3_200_000, 3_600_000])
def test_a_bundle_that_does_not_fit_changes_nothing(store: Store, disk: Path, leave_bytes: int) -> None:
    """Wherever the space ends, the bundle is refused whole; the same bundle is taken when space returns."""
    sender = Sender()
    sender.send(store, sender.tree(a=b"first"))
    assert_tree(store, sender)
    ballast = fill(disk, leave_bytes)
    flat = sender.tree(a=b"second", **{f"f{n}": noise(n, 100_000) for n in range(30)})
    metadata, sealed = sender.seal(flat)
    try:
        receipt = give(store, metadata, sealed)
    except NoSpace:
        assert store.workspace(NAME).sequence == 1
        assert not list((store.config.data / "staging").iterdir())
        ballast.unlink()
        receipt = give(store, metadata, sealed)
        assert not receipt.duplicate
    ballast.unlink(missing_ok=True)
    sender.move_on(flat)
    assert_tree(store, sender)
    assert store.figures()["blobs"] == len({entry.digest for entry in flat.values()}) + 1


def test_an_upload_that_does_not_fit_goes_on_when_space_returns(store: Store, disk: Path) -> None:
    """The piece that found no room does not count, those before it stay, and nothing is sent twice but that one."""
    sender = Sender()
    flat = sender.tree(a=os.urandom(3_000_000), b=os.urandom(3_000_000))
    metadata, sealed = sender.seal(flat)
    size = 1 << 16
    request = wire.UploadRequest(kind="bundle", workspace=NAME, identity=metadata.identity.hex(), chunk_size=size)
    upload_id = store.uploads.initiate(request, NAME).upload_id
    cut = [sealed[at : at + size] for at in range(0, len(sealed), size)]
    ballast, number = fill(disk, len(sealed) // 2), 0
    with pytest.raises(NoSpace):
        for number, piece in enumerate(cut):
            store.uploads.put(upload_id, number, io.BytesIO(piece))
    ballast.unlink()
    assert store.uploads.state(upload_id).present == [(0, number - 1)]
    for late in range(number, len(cut)):
        store.uploads.put(upload_id, late, io.BytesIO(cut[late]))
    told = wire.UploadComplete(total_chunks=len(cut), file_size=len(sealed))
    assert store.complete_upload(upload_id, told).root == metadata.manifest.root
    sender.move_on(flat)
    assert_tree(store, sender)


def test_a_tree_that_does_not_fit_comes_forward_later(store: Store, disk: Path) -> None:
    """Copies need space of their own: the receipt stands, and the tree follows when there is room."""
    sender = Sender()
    content = noise(1, 2_000_000)
    flat = {f"f{n}": sender.file(f"f{n}", content, mtime_ns=(n + 1) * DAY) for n in range(5)}
    metadata, sealed = sender.seal(flat)
    ballast = fill(disk, 6_000_000 + len(sealed))
    give(store, metadata, sealed)
    sender.move_on(flat)
    with pytest.raises(NoSpace):
        store.catch_up()
    assert store.workspace(NAME).tree_sequence is None
    ballast.unlink()
    assert_tree(store, sender)


def test_running_out_of_inodes_is_a_full_disk(store: Store) -> None:
    """Space for bytes is no space for names."""
    sender = Sender()
    sender.send(store, sender.tree(a=b"first"))
    flat = sender.tree(**{f"f{number}": b"%d" % number for number in range(4000)})
    with pytest.raises(NoSpace):
        give(store, *sender.seal(flat))
    assert store.workspace(NAME).sequence == 1
    sender.send(store, sender.tree(**{f"f{number}": b"%d" % number for number in range(200)}))
    assert_tree(store, sender)


def test_below_the_reserve_nothing_is_taken(disk: Path) -> None:
    """A bundle may not use the last of a disk: what is left belongs to the database and to recovery."""
    sender = Sender()
    with Store(StoreConfig(disk / "data")) as store:
        store.recover()
        ballast = fill(disk, 500_000)
        with pytest.raises(NoSpace, match="reserve"):
            give(store, *sender.seal(sender.tree(a=b"one")))
        assert store.health().status == "low disk"
        ballast.unlink()
        sender.send(store, sender.tree(a=b"one"))
        assert store.health().status == "ok"
        assert tree_of(store).parent.parent.is_dir()
