"""Room as a user meets it: a server with a quota, what `status` says of it, and states that are pinned."""

from __future__ import annotations

import http.client
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import folders
import pytest
from serving import serving
from user import User

MEBI = 1 << 20


def test_a_full_server_says_so_and_goes_on_when_something_went(tmp_path: Path) -> None:
    """Exit 6 with figures, `status` says what is held; after a deletion and a collection of a moment the push goes."""
    settings = tmp_path / "server.toml"
    settings.write_text('tenant_quota = "8M"\nquota = "20M"\ntenant_files = 50\nevict_after_seconds = 0\n')
    user = User(tmp_path / "home")
    root = user.home / "w"
    folders.write(root, "a", os.urandom(6 * MEBI))
    with serving(tmp_path / "data", "--config", str(settings), "--keep-sequences", "1") as served:
        assert user.run("push", root, "--to", served.url).code == 0
        folders.write(root, "b", os.urandom(6 * MEBI))
        full = user.run("push", root)
        assert full.code == 6 and "you may hold 8.0 MiB on this server: 6.0 MiB are held and 6.0 MiB would" in full.err
        said = user.run("status", root)
        assert "you hold 6.0 MiB of 8.0 MiB and 1 of 50 files on this server" in said.out
        usage = user.run("status", root, "--json").json["server"]["usage"]
        assert usage == {"bytes": 6 * MEBI, "bytes_limit": 8 * MEBI, "files": 1, "files_limit": 50}
        (root / "b").unlink()
        folders.write(root, "b", os.urandom(MEBI))
        assert user.run("push", root).code == 0
        folders.assert_same(root, served.data / "workspaces/w/tree")


def test_what_was_sealed_and_does_not_fit_can_be_taken_back(tmp_path: Path) -> None:
    """A bundle file that the quota refuses stays until the folder changes; then it is sealed anew."""
    settings = tmp_path / "server.toml"
    settings.write_text('tenant_quota = "1M"\n')
    user = User(tmp_path / "home")
    root = user.home / "w"
    folders.write(root, "a", os.urandom(2 * MEBI))
    assert "the outbox holds 1 bundle" in user.run("push", root).err
    with serving(tmp_path / "data", "--config", str(settings)) as served:
        full = user.run("push", root, "--to", served.url)
        assert full.code == 6 and "remove what does not fit and push" in full.err
        assert len(list((root / ".deltasync/outbox").iterdir())) == 1
        (root / "a").unlink()
        folders.write(root, "b", "small")
        assert user.run("push", root, "--to", served.url).code == 0
        folders.assert_same(root, served.data / "workspaces/w/tree")


def test_a_pinned_state_can_be_fetched_for_as_long_as_it_is_pinned(tmp_path: Path) -> None:
    """Beyond the sequences that are kept; released it is gone with them."""
    user = User(tmp_path / "home")
    root, dest = user.home / "w", user.home / "dest"
    folders.write(root, "a", "first")
    with serving(tmp_path / "data", "--keep-sequences", "1") as served:
        place = ("--to", served.url, "--workspace", "w")
        assert user.run("push", root, "--to", served.url).code == 0
        pinned = user.run("pin", root)
        assert (pinned.code, pinned.out) == (0, "sequence 1 is pinned\n")
        for content in ("second", "third"):
            folders.write(root, "a", content)
            assert user.run("push", root).code == 0
        listed = user.run("pin", "--list", "--json", *place).json
        assert [(each["sequence"], each["pinned"]) for each in listed["sequences"]] == [(1, True), (3, False)]
        assert "  pinned" in user.run("pin", "--list", root).out.splitlines()[0]
        assert user.run("fetch", "--from", served.url, "--workspace", "w", dest, "--at", "1").code == 0
        assert (dest / "a").read_text() == "first"

        gone = user.run("pin", root, "--at", "2")
        assert (
            gone.code == 1
            and gone.err == "deltasync: the tree of sequence 2 is not kept, only 3 is, and the pinned 1\n"
        )
        assert user.run("pin", root, "--release").code == 2
        assert user.run("pin", "--list", "--to", served.url, "--workspace", "never").code == 1
        assert user.run("pin", root, "--to", (tmp_path / "usb").as_uri()).code == 2
        released = user.run("pin", root, "--at", "1", "--release")
        assert (released.code, released.out) == (0, "sequence 1 is no longer pinned\n")
        assert user.run("fetch", "--from", served.url, "--workspace", "w", dest, "--at", "1").code == 1


MAKERS = (("mkfs.xfs", "-q"), ("mkfs.ext4", "-q", "-b", "1024"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system whose links have targets of at most 1,023 bytes."""
    image, mounted = tmp_path / "image", tmp_path / "disk"
    mounted.mkdir()
    image.touch()
    os.truncate(image, 400 << 20)
    maker = next((words for words in MAKERS if shutil.which(words[0])), None)
    if os.geteuid() != 0 or maker is None:
        pytest.skip("needs root, and mkfs.xfs or mkfs.ext4")
    subprocess.run([*maker, image], check=True)
    if subprocess.run(["mount", "-o", "loop", image, mounted], capture_output=True, check=False).returncode:
        pytest.skip("this system mounts no image")
    yield mounted
    subprocess.run(["umount", "--lazy", str(mounted)], check=True)


@pytest.mark.root
def test_a_link_that_the_servers_disk_does_not_take_is_named_and_nothing_is_lost(tmp_path: Path, disk: Path) -> None:
    """ST-38: exit 6 and its path, instead of a tree that never moves again; without it the next push goes."""
    user = User(tmp_path / "home")
    root = user.home / "w"
    folders.write(root, "a", "first")
    (root / "fits").symlink_to("x/" * 511 + "x")
    with serving(disk / "data") as served:
        assert user.run("push", root, "--to", served.url).code == 0
        folders.write(root, "b", "second")
        (root / "long").symlink_to("x/" * 512)
        refused = user.run("push", root)
        assert refused.code == 6 and "the target of the link long has 1024 bytes, more than" in refused.err
        assert served.get("/api/v1/workspaces/w").json["sequence"] == 1
        (root / "long").unlink()
        assert user.run("push", root).code == 0
        folders.assert_same(root, served.data / "workspaces/w/tree")


def test_one_tenants_requests_at_once_are_bounded(tmp_path: Path) -> None:
    """One more than may be is told to come again, and is answered when another one is."""
    settings = tmp_path / "server.toml"
    settings.write_text("tenant_requests = 1\n")
    with serving(tmp_path / "data", "--config", str(settings)) as served:
        host = served.url.removeprefix("http://")
        first = http.client.HTTPConnection(host, timeout=20)
        first.putrequest("POST", "/api/v1/workspaces/w/missing")
        first.putheader("Content-Length", "14")
        first.putheader("Content-Type", "application/json")
        first.endheaders(b'{"digests"')
        while (second := served.get("/api/v1/workspaces")).status == 200:
            pass  # until the first one's head was read
        assert (second.status, second.json["code"], second.json["facts"]) == (429, "HOST_BUSY", {"limit": 1})
        assert second.headers["retry-after"] == "2"
        first.send(b":[]}")
        assert first.getresponse().read()
        while (third := served.get("/api/v1/workspaces")).status == 429:
            pass
        assert third.status == 200
        first.close()
