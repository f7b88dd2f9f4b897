"""Event sources: what the operating system says of changes below a folder, turned into hints; imports watchdog."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from deltasync.client.hints import Hints
from deltasync.core.names import RESERVED, NameRefused, parse_name

if TYPE_CHECKING:
    from watchdog.events import FileSystemEvent
    from watchdog.observers.inotify_c import InotifyEvent, InotifyFD, WatchDescriptor

log = logging.getLogger(__name__)
logging.getLogger("watchdog").addHandler(logging.NullHandler())  # we report an overflow ourselves

IsIgnored = Callable[[str, bool], bool]


@dataclass(frozen=True, slots=True)
class Coverage:
    """How much of the tree an event source hears of."""

    source: str
    watched_folders: int
    unwatched_folders: int
    reason: str = ""
    """Why some folders are not watched, in one sentence; '' when all are."""

    @property
    def is_whole(self) -> bool:
        """Whether every folder is watched."""
        return self.unwatched_folders == 0 and not self.reason


class Source(Protocol):
    """Something that adds hints while it is open."""

    def rebuild(self) -> None:
        """Watch exactly the folders that exist now; called at start and after a loss."""

    def barrier(self, seconds: float) -> bool:
        """Wait until every change made before the call is among the hints; False when that cannot be told."""

    def coverage(self) -> Coverage:
        """Tell how much is watched."""

    def is_alive(self) -> bool:
        """Tell whether the source still listens; a dead one is opened again."""

    def close(self) -> None:
        """Stop listening."""


@dataclass(frozen=True, slots=True)
class Place:
    """What to watch: the root, a folder of our own for barriers, and what never to look at.

    is_ignored: called with a path and whether it is a directory, from the source's own thread.
    rule_files: names of the files whose change changes the rules.
    """

    root: Path
    barrier: Path
    is_ignored: IsIgnored
    rule_files: frozenset[str] = frozenset()


def open_source(place: Place, hints: Hints) -> Source:
    """Open the best source that this system offers; where there is none, only rescans notice changes."""
    kinds: list[type[InotifySource | ObserverSource]] = [ObserverSource]
    if sys.platform.startswith("linux"):
        kinds.insert(0, InotifySource)
    reason = ""
    for kind in kinds:
        try:
            return kind(place, hints)
        except (ImportError, OSError) as error:
            reason = f"no change events here ({error}); only the periodic rescan notices changes"
    hints.covered(is_whole=False)
    return NoSource(reason)


class NoSource:
    """The absence of events: every promise rests on the periodic rescan."""

    def __init__(self, reason: str) -> None:
        """Remember why there are no events."""
        self._reason = reason

    def rebuild(self) -> None:
        """Have nothing to build."""

    def barrier(self, seconds: float) -> bool:
        """Never know."""
        return False

    def coverage(self) -> Coverage:
        """Tell that nothing is watched."""
        return Coverage("none", 0, 0, self._reason)

    def is_alive(self) -> bool:
        """Stay as it is; a system without events has none later."""
        return True

    def close(self) -> None:
        """Have nothing to stop."""


class _Watched:
    """One watched folder in the tree of them; its path follows from its parents."""

    __slots__ = ("has_rules", "inside", "name", "parent", "wd")

    def __init__(self, name: str, parent: _Watched | None, wd: WatchDescriptor) -> None:
        self.name, self.parent, self.wd = name, parent, wd
        self.inside: dict[str, _Watched] | None = None
        self.has_rules = False

    def path(self) -> str:
        parts: list[str] = []
        here: _Watched | None = self
        while here is not None and here.parent is not None:
            parts.append(here.name)
            here = here.parent
        return "/".join(reversed(parts))

    def tree(self) -> Iterator[_Watched]:
        stack = [self]
        while stack:
            here = stack.pop()
            yield here
            if here.inside:
                stack.extend(here.inside.values())


class InotifySource:
    """Linux: one watch for each folder on watchdog's inotify reader, with our own book of folders.

    watchdog's Observer keeps such a book as well, but it swallows a full watch table, tells nobody of an overflow,
    reports no change of mode or mtime under a filter, and holds a rename back for up to half a second. Here every
    event reaches the hints from the reader's thread, in the kernel's order.
    """

    def __init__(self, place: Place, hints: Hints) -> None:
        """Open an inotify instance and watch every folder; raises OSError when the system has none left."""
        from watchdog.observers.inotify_c import CallbackId, InotifyFD, Mask
        from watchdog.observers.inotify_c import InotifyConstants as In

        # After a loss a moved folder may be watched twice for a moment, which the next rebuild puts right.
        warnings.filterwarnings("ignore", "Callback with id", RuntimeWarning)
        self._place, self._hints, self._in = place, hints, In
        self._id = CallbackId
        self._lock = threading.RLock()
        self._root = os.fsencode(place.root)
        self._mask = Mask(
            In.IN_CREATE | In.IN_DELETE | In.IN_MOVE | In.IN_MODIFY | In.IN_ATTRIB | In.IN_CLOSE_WRITE
            | In.IN_DELETE_SELF | In.IN_MOVE_SELF | In.IN_ONLYDIR | In.IN_DONT_FOLLOW | In.IN_EXCL_UNLINK
        )  # fmt: skip  # never IN_OPEN, IN_ACCESS or IN_CLOSE_NOWRITE: our own scans would feed them for ever
        self._written = In.IN_MODIFY | In.IN_CREATE
        self._complete = In.IN_CLOSE_WRITE | In.IN_MOVED_TO
        self._gone = In.IN_DELETE | In.IN_MOVED_FROM
        self._came = In.IN_CREATE | In.IN_MOVED_TO
        self._book: dict[WatchDescriptor, _Watched] = {}
        self._top: _Watched | None = None
        self._generation = 0
        self._unwatched: dict[str, str] = {}
        self._passed: dict[bytes, threading.Event] = {}
        self._fd: InotifyFD = InotifyFD()
        self._fd.start()
        self._barrier_wd = self._watch_barrier()
        self.rebuild()

    def rebuild(self) -> None:
        """Watch exactly the folders that exist now, keeping the watches that still stand."""
        with self._lock:
            stale, self._book, self._top, self._unwatched = self._book, {}, None, {}
            self._generation += 1  # each generation has its own callback, so that what is only in the old one can go
            top = self._adopt(None, "")
            self._fd.remove_callbacks([(wd, self._id(self._generation - 1)) for wd in stale])
            self._top = top
        if top is None:
            self._hints.covered(is_whole=False)
        else:
            self._hints.covered(is_whole=not self._unwatched)

    def barrier(self, seconds: float) -> bool:
        """Make a change of our own and wait for its event: the kernel's queue keeps the order."""
        name = f"flush-{secrets.token_hex(8)}"
        passed = self._passed[os.fsencode(name)] = threading.Event()
        marker = self._place.barrier / name
        try:
            marker.touch()
            return passed.wait(seconds) and self.is_alive()
        except OSError:
            return False
        finally:
            self._passed.pop(os.fsencode(name), None)
            with contextlib.suppress(OSError):
                marker.unlink()

    def coverage(self) -> Coverage:
        """Tell how many folders are watched, how many are not, and why."""
        with self._lock:
            reason = next(iter(self._unwatched.values()), "") if self._top is not None else "the folder is not there"
            return Coverage("inotify", len(self._book), len(self._unwatched), reason)

    def is_alive(self) -> bool:
        """Tell whether the reader's thread runs."""
        return self._fd.is_alive()

    def close(self) -> None:
        """Stop the reader and let all watches go."""
        self._fd.stop()
        self._fd.join(5)

    # What watchdog's reader calls, in its thread (watchdog.observers.inotify_c.WatchCallback).

    def on_event(self, event: InotifyEvent) -> None:
        """Turn one event of the kernel into hints."""
        try:
            if event.wd == self._barrier_wd:
                self._pass_barrier(event.name)
            else:
                with self._lock:
                    self._hear(event)
        except Exception as error:  # an exception would end the reader's thread in silence
            log.exception("an event could not be read")
            self._hints.lost(f"an event could not be read ({error})")

    def on_watch_deleted(self, wd: WatchDescriptor) -> None:
        """Hear that the kernel dropped a watch: its folder is gone or unmounted."""
        with self._lock:
            watched = self._book.get(wd)
            if watched is None:
                return
            self._forget(watched)
            if watched.parent is None:
                self._top = None
                self._hints.lost("the folder itself went away")
            else:
                self._hints.changed(watched.parent.path())

    def on_queue_overflow(self) -> None:
        """Hear that the kernel dropped events: everything must be looked at, under rebuilt watches."""
        self._hints.lost("more changes at once than the kernel's event queue holds")
        for passed in list(self._passed.values()):
            passed.set()  # a lost barrier passes: everything is dirty now

    # With the lock held.

    def _hear(self, event: InotifyEvent) -> None:
        watched = self._book.get(event.wd)
        if watched is None:
            return
        mask, name = event.mask, os.fsdecode(event.name)
        if mask & self._in.IN_UNMOUNT or (watched.parent is None and mask & self._in.IN_MOVE_SELF):
            self._hints.lost("a folder was unmounted or moved away")
            return
        folder = watched.path()
        if not name:
            if mask & self._in.IN_ATTRIB:
                self._hints.changed(folder)
            return
        if name == RESERVED and watched.parent is None:
            return
        path = f"{folder}/{name}" if folder else name
        if mask & self._in.IN_ISDIR:
            self._hear_of_folder(watched, name, folder, mask)
        elif mask & self._complete or mask & self._gone:
            self._hints.closed(folder, path)
        elif mask & self._written:
            self._hints.written(folder, path)
        else:
            self._hints.changed(folder)
        if name in self._place.rule_files:
            watched.has_rules = True
            self._hints.rules_changed()

    def _hear_of_folder(self, parent: _Watched, name: str, folder: str, mask: int) -> None:
        self._hints.changed(folder)
        known = parent.inside.get(name) if parent.inside else None
        if known is not None and mask & (self._gone | self._came):
            # Forgotten even when it only moved: it is adopted again where it went, and looked at there as a whole.
            if any(watched.has_rules for watched in known.tree()):
                self._hints.rules_changed()
            wds = self._forget(known)
            self._fd.remove_callbacks([(wd, self._id(self._generation)) for wd in wds])
        if mask & self._came or known is None:
            self._adopt(parent, name)

    def _pass_barrier(self, name: bytes) -> None:
        passed = self._passed.get(name)
        if passed is not None:
            passed.set()

    def _watch_barrier(self) -> WatchDescriptor:
        return self._fd.add_callback(os.fsencode(self._place.barrier), self._in.IN_CREATE, self, self._id(0))

    def _adopt(self, parent: _Watched | None, name: str) -> _Watched | None:
        """Watch a folder and everything below it, then call all of it dirty.

        Each folder is watched before it is listed: what appears later gives an event, what was there is listed.
        """
        first: _Watched | None = None
        found: list[str] = []
        todo: list[tuple[_Watched | None, str]] = [(parent, name)]
        while todo:
            parent, name = todo.pop()
            above = parent.path() if parent is not None else ""
            folder = f"{above}/{name}" if above else name
            if folder and not self._is_wanted(folder, name):
                continue
            watched = self._watch(parent, name, folder)
            if watched is None:
                continue
            first = first or watched
            found.append(folder)
            todo.extend((watched, inner) for inner in self._subfolders(watched, folder))
        self._hints.adopted(found)
        return first

    def _is_wanted(self, folder: str, name: str) -> bool:
        try:
            parse_name(name)
        except NameRefused:
            return False  # the scan reports it; what lies inside is not carried
        return not self._place.is_ignored(folder, True)

    def _watch(self, parent: _Watched | None, name: str, folder: str) -> _Watched | None:
        try:
            wd = self._fd.add_callback(self._absolute(folder), self._mask, self, self._id(self._generation))
            if wd == -1:
                raise PermissionError("no permission to watch a folder")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            self._unwatched[folder] = f"{error.strerror or error}"
            self._hints.covered(is_whole=False)
            return None
        self._unwatched.pop(folder, None)
        watched = self._book[wd] = _Watched(name, parent, wd)
        if parent is not None:
            if parent.inside is None:
                parent.inside = {}
            parent.inside[name] = watched
        return watched

    def _subfolders(self, watched: _Watched, folder: str) -> list[str]:
        try:
            with os.scandir(self._absolute(folder)) as listing:
                entries = [(os.fsdecode(entry.name), entry.is_dir(follow_symlinks=False)) for entry in listing]
        except OSError:
            return []  # gone again, or unreadable: the scan reports it
        watched.has_rules = any(name in self._place.rule_files for name, _ in entries)
        if watched.has_rules and self._top is not None:  # while the watches are built, the rules are read anyway
            self._hints.rules_changed()
        return [name for name, is_directory in entries if is_directory]

    def _forget(self, gone: _Watched) -> list[WatchDescriptor]:
        """Take a folder and everything below it out of the book, and return the watches that nobody needs now.

        A watch follows its folder: one that was met at a new place before its departure was heard belongs there.
        """
        wds = [watched.wd for watched in gone.tree() if self._book.get(watched.wd) is watched]
        for wd in wds:
            del self._book[wd]
        if gone.parent is not None and gone.parent.inside and gone.parent.inside.get(gone.name) is gone:
            del gone.parent.inside[gone.name]
        return wds

    def _absolute(self, folder: str) -> bytes:
        return self._root + b"/" + os.fsencode(folder) if folder else self._root


class ObserverSource:
    """Other systems: watchdog's own observer; closing is not reported there, so files settle by their age."""

    def __init__(self, place: Place, hints: Hints) -> None:
        """Watch the folder; raises OSError when the system cannot."""
        from watchdog.observers import Observer

        self._place, self._hints = place, hints
        self._observer = Observer()
        self._observer.start()
        self.rebuild()

    def rebuild(self) -> None:
        """Watch the folder as it is now."""
        from watchdog import events

        hear = self._hear

        class Listener(events.FileSystemEventHandler):
            def on_any_event(self, event: FileSystemEvent) -> None:
                hear(event)

        self._observer.unschedule_all()
        self._is_watching = False
        self._hints.covered(is_whole=False)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            wanted: list[type[FileSystemEvent]] = [
                events.FileClosedEvent,
                events.FileCreatedEvent,
                events.FileModifiedEvent,
                events.FileMovedEvent,
                events.FileDeletedEvent,
                events.DirCreatedEvent,
                events.DirMovedEvent,
                events.DirDeletedEvent,
            ]  # never opened or closed-without-writing: our own scans would feed them for ever
            self._observer.schedule(Listener(), str(self._place.root), recursive=True, event_filter=wanted)
            self._is_watching = True

    def barrier(self, seconds: float) -> bool:
        """Never know: other systems report late and in any order."""
        return False

    def coverage(self) -> Coverage:
        """Tell that the folder is watched as a whole, or not at all."""
        reason = "" if self._is_watching else "the folder is not there"
        return Coverage("observer", int(self._is_watching), int(not self._is_watching), reason)

    def is_alive(self) -> bool:
        """Tell whether the observer's thread runs."""
        return self._observer.is_alive()

    def close(self) -> None:
        """Stop the observer."""
        self._observer.stop()
        self._observer.join(5)

    def _hear(self, event: FileSystemEvent) -> None:
        for text in (event.src_path, event.dest_path):
            try:
                path = Path(str(text)).relative_to(self._place.root)
            except ValueError:
                continue
            if path.parts[:1] == (RESERVED,):
                continue
            if not path.parts:
                self._hints.lost("the folder itself changed")
                continue
            self._hints.changed("/".join(path.parent.parts))
            if event.is_directory and event.event_type != "deleted":
                self._hints.adopted(["/".join(path.parts)])
            if path.name in self._place.rule_files:
                self._hints.rules_changed()
