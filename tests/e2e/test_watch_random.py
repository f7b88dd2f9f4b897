"""A watched folder under random changes, with no rescan to help: after each flush both sides are byte-equal."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sys
from pathlib import Path

import pytest
from watching import assert_in_step, at_home, inside, site

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="inotify is Linux's")
ROUNDS = int(os.environ.get("ROUNDS", "12"))
SEED = int(os.environ.get("SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
FOLDERS_MAX = 80


class Hand:
    """Changes a folder at random: files, folders, moves of both, in, out and around, copies, times and modes."""

    def __init__(self, root: Path, outside: Path, seed: int) -> None:
        self.root, self.outside, self.pick = root, outside, random.Random(seed)

    def folders(self) -> list[Path]:
        """Return every folder that is carried."""
        found = [self.root]
        for above, names, _ in os.walk(self.root):
            if ".deltasync" in names:
                names.remove(".deltasync")
            found += [Path(above, name) for name in names]
        return found

    def change(self) -> None:
        """Make one change, or none where it does not fit."""
        here, there = self.pick.choice(self.folders()), self.pick.choice(self.folders())
        file, folder = f"n{self.pick.randrange(6)}", f"d{self.pick.randrange(4)}"
        parked = self.outside / f"o{self.pick.randrange(3)}"
        steps = [
            *3 * [lambda: (here / file).write_bytes(self.pick.randbytes(self.pick.choice([0, 10, 3000])))],
            *2 * [lambda: (here / folder).mkdir()],
            lambda: os.rename(here, there / folder),
            lambda: shutil.rmtree(here) if len(here.relative_to(self.root).parts) > 1 else None,
            lambda: os.rename(here / file, there / file),
            lambda: os.rename(here, parked) if here != self.root else None,
            lambda: os.rename(parked, there / folder),
            lambda: os.utime(here / file, (self.pick.randrange(10**9), self.pick.randrange(10**9))),
            lambda: (here / file).chmod(self.pick.choice([0o644, 0o755])),
            lambda: self.copy(here, there / folder),
        ]
        with contextlib.suppress(OSError):
            self.pick.choice(steps)()

    def copy(self, source: Path, target: Path) -> None:
        """Copy a tree that is not around its own copy."""
        if source not in target.parents and len(self.folders()) < FOLDERS_MAX:
            shutil.copytree(source, target)


def test_random_changes_end_in_step_by_events_alone(tmp_path: Path) -> None:
    """Whatever happens to files and folders, every change is heard, and each folder has exactly one watch."""
    (tmp_path / "media").mkdir()
    (tmp_path / "outside").mkdir()
    hand = Hand(tmp_path / "media", tmp_path / "outside", SEED)
    print(f"SEED={SEED}")
    with (
        at_home(tmp_path),
        site(tmp_path) as server,
        inside(hand.root, to=server.url, rescan_seconds=3600.0) as watcher,
    ):
        for _ in range(ROUNDS):
            for _ in range(hand.pick.choice([1, 3, 30, 200])):
                hand.change()
            watcher.flush(allow_mass_delete=True)
            assert_in_step(watcher, server.data)
            assert watcher.ask("status")["coverage"]["watched_folders"] == len(hand.folders())
