"""Making many files durable at once: every one is, and who fails is named."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from deltasync.disk import MANY_FILES, Folder, fsync_each


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
