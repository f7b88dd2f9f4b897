"""Reading again: every folder comes once in a round, at its pace, and a round survives a restart."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from folders import write
from watching import at_home

from deltasync.client import reread
from deltasync.client.ignore import IgnoreRules
from deltasync.client.reread import Rereading
from deltasync.client.scan import ScanOptions, scan
from deltasync.client.state import REHASH_DUE, State

FOLDERS = ["", "a", "a/b", "a-c", "d"]


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    for folder in FOLDERS:
        write(tmp_path / "media", f"{folder}/f".lstrip("/"), b"x" * 1000)
    os.symlink("f", tmp_path / "media/link")
    with at_home(tmp_path), State.open(tmp_path / "media") as opened:
        scan(opened, ScanOptions(IgnoreRules(opened.root)))
        yield opened


def drained(rereading: Rereading, clock: Clock) -> list[str]:
    """Return the folders of slices, one after another, until nothing is due."""
    found: list[str] = []
    while rereading.due_at() != math.inf:
        clock.now = max(clock.now, rereading.due_at())
        folders = rereading.slice()
        found += folders
        rereading.done(folders)
    return found


def test_nothing_is_read_again_unless_it_is_due(state: State) -> None:
    """Without --rehash-days and with the same inodes as before, no file is read twice."""
    assert Rereading(state, 0.0, Clock()).due_at() == math.inf


def test_what_is_due_is_read_soon_and_once(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a remount every folder comes once, in slices, and then nothing is due any more."""
    monkeypatch.setattr(reread, "SLICE_BYTES", 2500)
    state.set_meta(REHASH_DUE, "1")
    clock = Clock()
    assert sorted(drained(Rereading(state, 0.0, clock), clock)) == sorted(FOLDERS)
    assert state.get_meta(REHASH_DUE) is None
    assert clock.now > 1000.0


def test_an_interrupted_round_goes_on_behind_the_last_slice(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    """A watcher that is started again reads what is left; together the rounds read each folder once."""
    monkeypatch.setattr(reread, "SLICE_BYTES", 1)
    state.set_meta(REHASH_DUE, "1")
    clock = Clock()
    first = Rereading(state, 0.0, clock)
    read = []
    for _ in range(2):
        folders = first.slice()
        read += folders
        first.done(folders)
    read += drained(Rereading(state, 0.0, clock), clock)
    assert sorted(read) == sorted(FOLDERS)


def test_another_remount_begins_the_round_anew(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read before the inodes changed once more does not count."""
    monkeypatch.setattr(reread, "SLICE_BYTES", 1)
    state.set_meta(REHASH_DUE, "1")
    clock = Clock()
    rereading = Rereading(state, 0.0, clock)
    rereading.done(rereading.slice())
    state.set_meta(REHASH_DUE, "1")
    assert sorted(drained(rereading, clock)) == sorted(FOLDERS)


def test_a_round_takes_its_days(state: State) -> None:
    """With --rehash-days the folders are spread over the time, and the next round follows."""
    clock = Clock()
    rereading = Rereading(state, 1.0, clock)
    read: list[str] = []
    began = clock.now
    while len(read) < 2 * len(FOLDERS):
        clock.now = max(clock.now, rereading.due_at())
        folders = rereading.slice()
        read += folders
        rereading.done(folders)
    assert sorted(read) == sorted(2 * FOLDERS)
    assert clock.now - began == pytest.approx(2 * reread.DAY_SECONDS, rel=0.25)


def test_reading_again_hashes_every_file_of_its_folders(state: State) -> None:
    """A slice given to the scan as folders to re-hash reads each file there, and finds nothing changed."""
    state.set_meta(REHASH_DUE, "1")
    folders = Rereading(state, 0.0, Clock()).slice()
    report = scan(state, ScanOptions(IgnoreRules(state.root), rehash=True), folders=folders)
    assert (report.hashed_files, report.changed) == (len(FOLDERS), False)
