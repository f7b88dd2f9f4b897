"""Making many files durable at once: every one is, and who fails is named."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from deltasync.disk import MANY_FILES, Folder, fsync_each, make_folder


@pytest.mark.parametrize("count", [0, 1, MANY_FILES - 1, MANY_FILES, 4 * MANY_FILES])
def test_every_file_is_made_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """However many they are, each is fsynced once; those that cannot be are told by name, and no other."""
    names = [f"file-{number}" for number in range(count)]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    synced, guard, fsync = list[int](), threading.Lock(), os.fsync

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        with guard:
            synced.append(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", noted)
    with Folder.open(tmp_path) as folder:
        assert list(fsync_each(folder, names)) == []
        assert sorted(synced) == sorted((tmp_path / name).stat().st_ino for name in names)
        failed = dict(fsync_each(folder, ["gone", *names, "gone too"]))
    assert {name: type(error) for name, error in failed.items()} == dict.fromkeys(
        ["gone", "gone too"], FileNotFoundError
    )


def test_a_folder_behind_a_link_is_made_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder that a link leads to holds the new name, and is what is fsynced."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    synced: set[int] = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))
    make_folder(tmp_path / "link/made", durable=True)
    assert (tmp_path / "real").stat().st_ino in synced
