"""Event sources that lose, delay, repeat or invent events: rescans make good what they get wrong."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import folders
import pytest
from folders import write
from watching import Site, at_home, inside, site

from deltasync.client import ahead, daemon, ledger
from deltasync.client.hints import Hints
from deltasync.client.watch import Coverage, InotifySource, NoSource, Place, Source


class Scripted:
    """A source whose hints are what a test says; it claims to be whole."""

    def __init__(self, place: Place, hints: Hints) -> None:
        self.place, self.hints = place, hints
        self.rebuilds = 0
        self.is_open = True
        self.rebuild()

    def rebuild(self) -> None:
        self.rebuilds += 1
        self.hints.covered(is_whole=True)

    def barrier(self, seconds: float) -> bool:
        return False

    def coverage(self) -> Coverage:
        return Coverage("scripted", 1, 0)

    def is_alive(self) -> bool:
        return self.is_open

    def close(self) -> None:
        self.is_open = False


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(tmp_path_factory.mktemp("server")) as shared:
        yield shared


@pytest.fixture
def base(tmp_path: Path) -> Iterator[Path]:
    folders.life(tmp_path / "media")
    with at_home(tmp_path):
        yield tmp_path


def test_a_source_that_says_nothing_is_made_good_by_rescans(base: Path, server: Site) -> None:
    """All events lost: the folder is in step after the next rescan."""
    with (
        inside(base / "media", Scripted, to=server.url, workspace=base.name, rescan_seconds=0.2) as watcher,
    ):
        watcher.until_same()
        folders.later(watcher.root)
        watcher.until_same()


def test_a_first_look_sends_before_it_has_seen_everything(
    base: Path, server: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a first look has read is on its way while it reads on, in bundles of their own."""
    monkeypatch.setattr(ahead, "AHEAD_FILES", 4)
    monkeypatch.setattr(ledger, "_FLUSH_FILES", 2)
    for number in range(40):
        write(base / "media", f"many/{number:02}", f"{number}")
        os.utime(base / "media" / f"many/{number:02}", (1e9, 1e9))  # nobody is writing it any more
    with inside(base / "media", Scripted, to=server.url, workspace=base.name) as watcher:
        assert watcher.heard("sent")["bundles"] > 3
        watcher.until_same()


def test_late_and_repeated_hints_do_no_harm(base: Path, server: Site) -> None:
    """Hints that come long after, again and again, or of folders that are gone cost a look and send nothing twice."""
    with inside(base / "media", Scripted, to=server.url, workspace=base.name) as watcher:
        watcher.until_same()
        hints = watcher.sources[0].hints
        folders.later(watcher.root)
        write(watcher.root, "d/e/f", "x")
        for _ in range(3):
            hints.changed("d/e", "no/such/folder", "média", "media/raw", "sources")
            hints.written("d/e", "d/e/f")
            hints.closed("d/e", "d/e/f")
            hints.closed("gone", "gone/f")
        hints.changed("", "bin", "media", "new", "empty folder", "link")
        watcher.until_same()
        sent = len([event for event in watcher.events if event["event"] == "sent"])
        assert watcher.flush()["bundles"] == 0
        assert len([event for event in watcher.events if event["event"] == "sent"]) == sent


def test_hints_in_the_wrong_order_do_no_harm(base: Path, server: Site) -> None:
    """A folder is hinted before its parent exists for the scan, and a move arrives as a deletion after a creation."""
    with inside(base / "media", Scripted, to=server.url, workspace=base.name) as watcher:
        watcher.until_same()
        hints = watcher.sources[0].hints
        write(watcher.root, "a/b/c/d", "x")
        os.rename(watcher.root / "media", watcher.root / "a/media")
        hints.changed("a/media/raw", "a/b/c")
        hints.changed("a/b")
        hints.changed("a")
        hints.changed("")
        watcher.until_same()


def test_a_loss_is_made_good_at_once(base: Path, server: Site) -> None:
    """An overflow makes the watches be built again and everything be looked at, and is said."""
    with inside(base / "media", Scripted, to=server.url, workspace=base.name) as watcher:
        watcher.until_same()
        since = len(watcher.events)
        folders.later(watcher.root)
        watcher.sources[0].hints.lost("the queue overflowed")
        assert watcher.heard("rescan", since)["reason"] == "the queue overflowed"
        watcher.until_same()
        assert watcher.sources[0].rebuilds == 2


def test_a_source_that_died_is_opened_again(base: Path, server: Site) -> None:
    """A listening thread that ended is noticed at the next look."""
    with (
        inside(base / "media", InotifySource, to=server.url, workspace=base.name, rescan_seconds=0.2) as watcher,
    ):
        watcher.until_same()
        watcher.sources[0].close()
        write(watcher.root, "unheard", "x")
        watcher.until_same()
        while len(watcher.sources) < 2:
            watcher.heard("rescan")
        assert watcher.sources[1].is_alive()


def test_without_any_source_the_coverage_says_so(base: Path, server: Site) -> None:
    """A system without events is watched by rescans alone, and the watcher tells how stale it may be."""

    def none(place: Place, hints: Hints) -> Source:
        hints.covered(is_whole=False)
        return NoSource("no change events here")

    with inside(base / "media", none, to=server.url, workspace=base.name, rescan_seconds=0.3) as watcher:
        assert "every 0.3 s" in watcher.heard("coverage")["sentence"]
        watcher.until_same()
        shutil.rmtree(watcher.root / "média")
        watcher.until_same()


def test_after_a_sleep_everything_is_looked_at(base: Path, server: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the machine slept, its clocks say so, and what happened to the folder meanwhile is found."""
    with inside(base / "media", Scripted, to=server.url, workspace=base.name) as watcher:
        watcher.until_same()
        folders.later(watcher.root)
        real = daemon.time.clock_gettime
        boot = daemon.time.CLOCK_BOOTTIME
        monkeypatch.setattr(daemon.time, "clock_gettime", lambda clock: real(clock) + 100.0 * (clock == boot))
        watcher.sources[0].hints.changed("bin")
        watcher.heard("rescan")
        watcher.until_same()
