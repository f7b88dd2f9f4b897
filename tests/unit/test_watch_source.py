"""Event sources over real inotify: every change is heard, and every loss is told."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deltasync.client import watch
from deltasync.client.hints import Dirt, Hints
from deltasync.client.watch import Coverage, InotifySource, NoSource, ObserverSource, Place, Source, open_source

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="inotify is Linux's")
pytestmark = linux


class Watched:
    """A folder under a real source, with the hints it gives."""

    def __init__(self, base: Path, ignored: Callable[[str, bool], bool] = lambda path, is_directory: False) -> None:
        self.root, self.outside = base / "root", base / "outside"
        for folder in (self.root, self.outside, base / "barrier"):
            folder.mkdir(exist_ok=True)
        self.place = Place(self.root, base / "barrier", ignored, frozenset({".deltasyncignore"}))
        self.hints = Hints(lambda: None)
        self.source: Source = open_source(self.place, self.hints)
        self.hints.take()

    def heard(self) -> Dirt:
        """Take the hints of everything that happened until now."""
        assert self.source.barrier(20)
        return self.hints.take()


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    made = Watched(tmp_path)
    yield made
    made.source.close()


def write(path: Path, text: str = "x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


EDITS: dict[str, Callable[[Path], None]] = {
    "create": lambda root: write(root / "a/new"),
    "write": lambda root: write(root / "a/f", "other"),
    "append": lambda root: (root / "a/f").open("a").close() or os.truncate(root / "a/f", 3),
    "replace": lambda root: write(root / "a/.f.tmp") or os.replace(root / "a/.f.tmp", root / "a/f"),
    "delete": lambda root: (root / "a/f").unlink(),
    "chmod": lambda root: (root / "a/f").chmod(0o755),
    "touch": lambda root: os.utime(root / "a/f", (1, 1)),
    "link": lambda root: os.link(root / "a/f", root / "a/g"),
    "symlink": lambda root: os.symlink("f", root / "a/s"),
    "mkdir": lambda root: (root / "a/d").mkdir(),
    "rmdir": lambda root: (root / "a/empty").rmdir(),
    "chmod of the folder": lambda root: (root / "a").chmod(0o700),
}


@pytest.mark.parametrize("edit", EDITS)
def test_every_kind_of_change_makes_its_folder_dirty(tmp_path: Path, edit: str) -> None:
    """Content, names, modes and times: whatever differs in a folder is heard."""
    write(tmp_path / "root/a/f")
    (tmp_path / "root/a/empty").mkdir()
    watched = Watched(tmp_path)
    EDITS[edit](watched.root)
    assert "a" in (watched.heard().folders or ())
    watched.source.close()


def test_reading_is_no_change(watched: Watched) -> None:
    """Our own scans open and read everything and must not be heard, or they would never end."""
    write(watched.root / "a/f")
    watched.heard()
    for path in watched.root.rglob("*"):
        if path.is_file():
            path.read_bytes()
    assert watched.heard() == Dirt(frozenset())


def test_nothing_of_our_own_state_is_heard(watched: Watched) -> None:
    """The folder .deltasync is never a change, at the root or below."""
    write(watched.root / ".deltasync/state.db")
    write(watched.root / "a/.deltasync/state.db")
    watched.heard()
    write(watched.root / ".deltasync/state.db", "again")
    write(watched.root / "a/.deltasync/state.db", "again")
    assert watched.heard() == Dirt(frozenset())


def test_a_new_folder_is_dirty_with_all_that_it_held_before_its_watch(watched: Watched) -> None:
    """A tree that came into being at once is looked at as a whole and watched from then on."""
    for name in ("n/1/2/3/f", "n/1/g", "n/h"):
        write(watched.root / name)
    assert {"", "n", "n/1", "n/1/2", "n/1/2/3"} <= (watched.heard().folders or set())
    write(watched.root / "n/1/2/3/f", "later")
    assert watched.heard().folders == {"n/1/2/3"}


def test_a_folder_moved_in_is_heard_and_watched(watched: Watched) -> None:
    """mv from elsewhere brings a tree whose content nobody announced."""
    write(watched.outside / "d/e/f")
    os.rename(watched.outside / "d", watched.root / "d")
    assert watched.heard().folders == {"", "d", "d/e"}
    write(watched.root / "d/e/f", "later")
    assert watched.heard().folders == {"d/e"}


def test_a_folder_moved_out_is_heard_once_and_no_longer(watched: Watched) -> None:
    """mv to elsewhere changes the parent; what happens elsewhere afterwards is none of our business."""
    write(watched.root / "a/d/e/f")
    watched.heard()
    before = watched.source.coverage().watched_folders
    os.rename(watched.root / "a/d", watched.outside / "d")
    assert watched.heard().folders == {"a"}
    write(watched.outside / "d/e/f", "later")
    assert watched.heard() == Dirt(frozenset())
    assert watched.source.coverage().watched_folders == before - 2


def test_a_folder_moved_inside_is_watched_under_its_new_name(watched: Watched) -> None:
    """Changes below a renamed folder are heard at the path that they have now."""
    write(watched.root / "a/d/e/f")
    watched.heard()
    os.rename(watched.root / "a/d", watched.root / "b")
    assert watched.heard().folders == {"", "a", "b", "b/e"}
    write(watched.root / "b/e/f", "later")
    assert watched.heard().folders == {"b/e"}
    assert watched.source.coverage() == Coverage("inotify", 4, 0)


def test_a_folder_that_replaces_an_empty_one_is_watched(watched: Watched) -> None:
    """rename() over an empty directory leaves one watch, at the right path."""
    (watched.root / "old").mkdir()
    write(watched.root / "new/f")
    watched.heard()
    os.rename(watched.root / "new", watched.root / "old")
    watched.heard()
    write(watched.root / "old/f", "later")
    assert watched.heard().folders == {"old"}
    assert watched.source.coverage().watched_folders == 2


def test_a_folder_moved_into_a_new_one_is_watched_there(watched: Watched) -> None:
    """It is met at its new place, below a folder just made, before its departure from the old one is heard."""
    write(watched.root / "a/d/e/f")
    watched.heard()
    source = watched.source
    assert isinstance(source, InotifySource)
    with source._lock:  # the reader stands still until all of it has happened
        (watched.root / "new").mkdir()
        os.rename(watched.root / "a/d", watched.root / "new/d")
    watched.heard()
    write(watched.root / "new/d/f", "later")
    write(watched.root / "new/d/e/f", "later")
    assert watched.heard().folders == {"new/d", "new/d/e"}
    assert source.coverage() == Coverage("inotify", 5, 0)


def test_a_removed_tree_leaves_no_watch(watched: Watched) -> None:
    """Watches are a limited good: a deleted folder gives its own back."""
    write(watched.root / "a/b/c/f")
    watched.heard()
    shutil.rmtree(watched.root / "a")
    assert "" in (watched.heard().folders or set())
    assert watched.source.coverage() == Coverage("inotify", 1, 0)


def test_ignored_and_uncarried_folders_are_not_watched(tmp_path: Path) -> None:
    """An ignored folder costs no watch and no look; neither does one whose name cannot be carried."""
    write(tmp_path / "root/node_modules/x/f")
    os.mkdir(os.fsencode(tmp_path) + b"/root/\xff")
    watched = Watched(tmp_path, lambda path, is_directory: is_directory and path == "node_modules")
    assert watched.source.coverage() == Coverage("inotify", 1, 0)
    write(watched.root / "node_modules/x/f", "later")
    assert watched.heard() == Dirt(frozenset())
    watched.source.close()


def test_a_changed_ignore_file_is_told(watched: Watched) -> None:
    """New rules mean a new look at everything."""
    write(watched.root / "sub/.deltasyncignore", "*.o")
    dirt = watched.heard()
    assert dirt.are_rules_changed and dirt.folders is None


def test_a_folder_moved_away_with_its_ignore_file_changes_the_rules(watched: Watched) -> None:
    """What a folder's own rules said holds no longer when the folder is gone."""
    write(watched.root / "sub/.deltasyncignore", "*.o")
    watched.heard()
    os.rename(watched.root / "sub", watched.outside / "sub")
    assert watched.heard().are_rules_changed


def test_an_overflow_of_the_kernels_queue_is_told(watched: Watched) -> None:
    """More changes than the queue holds: the loss is heard, and after a rebuild every folder is watched again."""
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if limit > 100_000:
        pytest.skip(f"the event queue holds {limit}")
    (watched.root / "a").mkdir()
    watched.heard()
    source = watched.source
    assert isinstance(source, InotifySource)
    with source._lock:  # the reader stands still, as it does on a busy machine
        for number in range(limit):
            (watched.root / "a" / str(number % 7)).write_bytes(b"")
            (watched.root / f"d{number % 5}").mkdir(exist_ok=True)
    dirt = watched.heard()
    assert dirt.is_lost and dirt.folders is None and "queue" in dirt.reasons[0]
    source.rebuild()
    watched.hints.take()
    write(watched.root / "d4/f")
    assert watched.heard().folders == {"d4"}
    assert source.coverage() == Coverage("inotify", 7, 0)


def test_a_rebuild_finds_folders_whose_events_were_lost(watched: Watched) -> None:
    """After a loss the book of watches follows what is there, and no stale watch remains."""
    for name in ("a/b/f", "gone/f"):
        write(watched.root / name)
    watched.heard()
    source = watched.source
    assert isinstance(source, InotifySource)
    source.on_event = lambda event: None  # type: ignore[method-assign]
    for number in range(3):
        write(watched.root / f"late{number}/f")
    os.rename(watched.root / "a", watched.root / "moved")
    shutil.rmtree(watched.root / "gone")
    del source.on_event
    source.rebuild()
    watched.heard()
    write(watched.root / "moved/b/f", "later")
    write(watched.root / "late2/f", "later")
    assert watched.heard().folders == {"moved/b", "late2"}
    assert source.coverage() == Coverage("inotify", 6, 0)


def test_a_vanished_root_is_told_and_a_new_one_can_be_watched(watched: Watched) -> None:
    """Deleting the workspace's folder is a loss, not a set of deletions; it may come back."""
    shutil.rmtree(watched.root)
    assert watched.heard().is_lost
    assert not watched.source.coverage().is_whole
    watched.source.rebuild()
    assert watched.source.coverage().reason == "the folder is not there"
    watched.root.mkdir()
    watched.source.rebuild()
    watched.hints.take()
    write(watched.root / "f")
    assert watched.heard().folders == {""}


def test_a_root_that_was_moved_away_is_told(watched: Watched) -> None:
    """mv of the workspace's folder itself is a loss."""
    os.rename(watched.root, watched.outside / "root")
    assert watched.heard().is_lost


def test_a_full_watch_table_is_told_with_a_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders beyond the system's limit are counted, and silence no longer means that nobody writes."""
    from watchdog.observers import inotify_c

    for number in range(9):
        (tmp_path / f"root/d{number}").mkdir(parents=True)
    real, added = inotify_c.inotify_add_watch, []

    def limited(descriptor: int, path: bytes, mask: int) -> int:
        added.append(path)
        if len(added) > 5:
            inotify_c.ctypes.set_errno(28)
            return -1
        return real(descriptor, path, mask)

    monkeypatch.setattr(inotify_c, "inotify_add_watch", limited)
    watched = Watched(tmp_path)
    coverage = watched.source.coverage()
    assert (coverage.watched_folders, coverage.unwatched_folders) == (4, 6)
    assert "limit" in coverage.reason and not coverage.is_whole
    monkeypatch.setattr(inotify_c, "inotify_add_watch", real)
    watched.source.rebuild()
    assert watched.source.coverage() == Coverage("inotify", 10, 0)
    watched.source.close()


UNPRIVILEGED = """
import os, sys
from pathlib import Path
import watchdog.observers.inotify_c
from deltasync.client.hints import Hints
from deltasync.client.watch import Place, open_source
os.setuid(65534)
base = Path(sys.argv[1])
source = open_source(Place(base / "root", base / "barrier", lambda path, is_directory: False), Hints(lambda: None))
print(source.coverage())
"""


@pytest.mark.root
@pytest.mark.skipif(os.getuid() != 0, reason="drops its privileges")
def test_a_folder_without_permission_is_counted_as_not_watched(tmp_path: Path) -> None:
    """An unreadable folder cannot be watched; that is said and harms nothing else."""
    for folder in ("root/open", "root/shut", "barrier"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "root/shut").chmod(0)
    (tmp_path / "barrier").chmod(0o777)
    for folder in [tmp_path, *tmp_path.parents][:-1]:
        folder.chmod(folder.stat().st_mode | 0o111)
    done = subprocess.run(
        [sys.executable, "-c", UNPRIVILEGED, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "watched_folders=2, unwatched_folders=1" in done.stdout


def test_a_closed_source_knows_that_it_is_deaf(watched: Watched) -> None:
    """A source whose reader ended says so, and its barrier promises nothing."""
    watched.source.close()
    assert not watched.source.is_alive()
    assert not watched.source.barrier(0.01)


def test_an_error_while_reading_an_event_is_a_loss(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader's thread outlives a fault of ours, and the event that it lost is made good by a full look."""
    source = watched.source
    assert isinstance(source, InotifySource)
    monkeypatch.setattr(source, "_hear", lambda event: 1 // 0)
    write(watched.root / "f")
    assert watched.heard().is_lost
    assert source.is_alive()


def test_without_event_sources_only_rescans_notice_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the system has no inotify instance left, watching goes on by rescans and says so."""

    class Broken:
        def __init__(self, place: Place, hints: Hints) -> None:
            raise OSError(24, "inotify instance limit reached")

    monkeypatch.setattr(watch, "InotifySource", Broken)
    monkeypatch.setattr(watch, "ObserverSource", Broken)
    source = open_source(Place(tmp_path, tmp_path, lambda path, is_directory: False), Hints(lambda: None))
    assert isinstance(source, NoSource)
    assert source.is_alive() and not source.barrier(0) and "rescan" in source.coverage().reason
    source.rebuild()
    source.close()


def test_watchdogs_own_observer_hears_the_folders_of_changes(tmp_path: Path) -> None:
    """Where there is no inotify, watchdog's observer gives the same hints, later and without closes."""
    import queue

    root = tmp_path / "root"
    root.mkdir()
    wakes: queue.SimpleQueue[None] = queue.SimpleQueue()
    hints = Hints(lambda: wakes.put(None))
    source = ObserverSource(Place(root, tmp_path, lambda path, is_directory: False, frozenset({".rules"})), hints)
    write(root / "a/f")
    write(root / ".deltasync/x")
    wanted, heard = {"", "a"}, set[str]()
    while not wanted <= heard:
        wakes.get(timeout=10)
        heard |= hints.take().folders or set()
    assert source.coverage().is_whole and source.is_alive() and not source.barrier(1)
    assert not any(folder.startswith(".deltasync/") for folder in heard)
    write(root / ".rules")
    while not hints.take().are_rules_changed:
        wakes.get(timeout=10)
    source.close()
