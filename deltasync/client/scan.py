"""Observation: compare the workspace with what is recorded of it, and record what it is now.

The walk goes from the root down and holds one open folder for each level, so that its memory is bounded by the
largest folder. What it finds is written in bounded transactions; each brings the folders above up to date as well, so
that the observed root always names a whole tree and a scan that is killed is simply repeated.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import sqlite3
import stat
import time
from collections.abc import Callable, Collection, Iterator, Mapping

from deltasync.client.files import Clock, Files, name_trouble
from deltasync.client.frame import Frame, Item, Want, items
from deltasync.client.ignore import Level, Stamp
from deltasync.client.ledger import Ledger
from deltasync.client.listing import Listing, clamped, list_folder, signed
from deltasync.client.moves import LIMBO, ROOT_ID, Stats, former_entries, joined
from deltasync.client.observation import Expect, Follow, IsSettled, Progress, ScanOptions, ScanReport, Waiting
from deltasync.client.opening import DATABASE, damaged
from deltasync.client.state import REHASH_DUE, UNREADABLE, Problem, Row, State
from deltasync.core.errors import GuardStopped, RootUnavailable
from deltasync.core.manifest import EMPTY_ROOT, Kind
from deltasync.core.names import RESERVED, shown
from deltasync.disk import DIRECTORY_FLAGS, PASSING_FLAGS, Folder, space_guard

__all__ = ["IsSettled", "Progress", "ScanOptions", "ScanReport", "Waiting", "emptied", "scan"]

_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_RETRY_SECONDS = 0.1
_SAMPLES, _SAMPLES_MIN = 256, 8
_MOUNTS = "mounts"
"""The meta key that names the folders on which something was mounted: an empty one is unmounted, not emptied."""


def scan(
    state: State,
    options: ScanOptions,
    *,
    folders: Collection[str] | None = None,
    is_settled: IsSettled | None = None,
    progress: Progress | None = None,
    recorded: Callable[[], None] | None = None,
    expect: Expect | None = None,
    follow: Follow | None = None,
) -> ScanReport:
    """Observe the whole workspace, or only some folders of it, and record what it is now.

    folders: these are listed again, and everything below them that is new or moved; None lists everything.
    is_settled: asked for each file that would be read; while it says no, the file's former entry stands.
    progress: told how many files and bytes were read so far.
    recorded: called when a part of an unfinished scan was recorded: the observed tree is whole and holds that part.
    expect: told of large files that may have a base, before they are read.
    follow: told of large files that are like none that is known, before they are read.
    Raises RootUnavailable and GuardStopped before anything is taken for deleted.
    """
    with space_guard(state.folder), _open_root(state) as top, contextlib.closing(Clock(state.folder)) as clock:
        try:
            files = Files(Ledger(state), options, clock, is_settled, progress, expect, follow)
            return _Scan(state, options, top, files, recorded).run(folders)
        except sqlite3.DatabaseError as error:
            raised = damaged(state.folder, error)
            raise raised from None if raised is error else error


def _open_root(state: State) -> Folder:
    name = shown(str(state.root))
    try:
        top = Folder.open(state.root)
    except OSError as error:
        raise RootUnavailable(f"{name} cannot be opened ({error.strerror}); nothing is taken for deleted") from error
    if state.is_in_place():
        return top
    top.close()
    raise RootUnavailable(f"{name} was unmounted or replaced while deltasync was at work; start again when it is back")


class _Scan:
    """One scan: the walk over folders; files are left to `Files`, what to write to the ledger."""

    def __init__(
        self, state: State, options: ScanOptions, top: Folder, files: Files, recorded: Callable[[], None] | None
    ) -> None:
        self._state, self._options, self._top, self._files = state, options, top, files
        self._recorded = recorded
        self._ledger = files.ledger
        self._stack: list[Frame] = []
        self._bereft: set[int] = set()
        """Folders that a folder was moved out of, and that were not looked at since."""
        self._began = time.monotonic()
        self._before = state.observed_root()
        self._own = _inside(state)
        self._mounts = set((state.get_meta(_MOUNTS) or "").split("\n")) - {""}

    def run(self, folders: Collection[str] | None) -> ScanReport:
        """Walk, wait for what is still changing, and write the rest."""
        is_all = folders is None and self._options.selection is None  # a command reads what it is
        self._files.has_trust = is_all and self._is_remounted()
        self._walk(None if folders is None else Want.of(folders))
        while self._bereft:
            self._walk(Want.of(self._bereft_paths()))
        if self._files.is_alone:
            self._settle()
        if not (self._files.has_trust or self._options.no_delete):
            self._claim_files(is_full=folders is None)
        meta = self._meta(is_full=folders is None)
        self._ledger.finish(is_full=folders is None, meta=meta)
        root, (count, size) = self._state.observed_root(), self._state.counts()
        return ScanReport(
            changed=root != self._before,
            root=root,
            files=count,
            size_bytes=size,
            hashed_files=self._files.hashed_files,
            hashed_bytes=self._files.hashed_bytes,
            waiting=[file for found in self._files.waiting.values() for file in found],
            problems=self._state.problems(),
            seconds=time.monotonic() - self._began,
            remounted=self._files.has_trust,
        )

    # Passes

    def _walk(self, want: Want | None) -> None:
        """Go through the tree; want: the folders to look at, None for all."""
        self._ledger.flush()
        try:
            self._enter_root(want)
            while self._stack:
                frame = self._stack[-1]
                if frame.todo:
                    self._enter(frame, frame.todo.pop())
                else:
                    frame.write(self._ledger)
                    self._stack.pop().close()
                    if self._ledger.is_due():
                        self._checkpoint()
        finally:
            while self._stack:
                self._stack.pop().close()

    def _checkpoint(self) -> None:
        """Write what was found so far, with the folders above it, so that the observed root names a whole tree."""
        for frame in reversed(self._stack):
            frame.write(self._ledger)
        self._ledger.flush()
        if self._recorded is not None:
            self._recorded()

    def _settle(self) -> None:
        """Look again at files that changed while they were read, until they stay as they are or time is up."""
        end = time.monotonic() + self._options.settle_seconds
        while self._files.waiting and (left := end - time.monotonic()) > 0:
            time.sleep(min(_RETRY_SECONDS, left))
            folders = list(self._files.waiting)
            self._files.waiting.clear()
            self._walk(Want.of(folders))

    def _claim_files(self, *, is_full: bool) -> None:
        """Look again at what cannot be read: it may be what disappeared under another name (spec S-20)."""
        self._ledger.flush()
        if not self._state.has_renames() and not self._state.limbo_size():
            return
        others = set() if is_full else self._state.problem_folders() - self._ledger.looked_at
        if others:
            self._walk(Want.of(others))
        self._files.former = former_entries(self._state, self._files.unread.keys())
        if self._files.former:
            self._walk(Want.of(self._files.unread[inode] for inode in self._files.former))

    def _bereft_paths(self) -> list[str]:
        paths = [self._ledger.links.path(identity) for identity in self._bereft]
        self._bereft.clear()
        return [path for path in paths if path is not None]

    def _meta(self, *, is_full: bool) -> dict[str, str | None]:
        status = os.fstat(self._top.fd)
        meta: dict[str, str | None] = {"root_device": str(status.st_dev), "root_inode": str(status.st_ino)}
        meta[_MOUNTS] = "\n".join(sorted(self._mounts)) or None
        if self._files.trusted:
            meta[REHASH_DUE] = "1"
        elif is_full and self._options.rehash:
            meta[REHASH_DUE] = None
        return meta

    # Folders

    def _enter_root(self, want: Want | None) -> None:
        row = self._state.row(ROOT_ID)
        frame = Frame(row, "", 0, os.dup(self._top.fd), None, want, is_deep=want is None)
        self._stack.append(frame)
        if self._can_pass(frame):
            return
        self._reset("")
        try:
            listing = self._listed("", frame.descriptor)
            self._guard_root(listing)
            frame.level = self._rules("", None, listing)
        except OSError as error:
            raise RootUnavailable(
                f"{shown(str(self._state.root))} cannot be read ({error.strerror}); nothing is taken for deleted"
            ) from error
        self._look(frame, listing)

    def _guard_root(self, listing: Listing) -> None:
        """Stop where an empty root would mean that everything was deleted."""
        if listing.files or listing.folders or self._before == EMPTY_ROOT or self._options.no_delete:
            return
        if self._options.selection is not None:
            return
        error = emptied(self._state, os.fstat(self._top.fd))
        if isinstance(error, RootUnavailable) or not self._options.allow_emptied:
            raise error

    def _enter(self, above: Frame, name: str) -> None:
        """Open a folder inside another one and look at it; where that fails, it stays as it was recorded."""
        path = joined(above.path, name)
        descriptor, found = -1, None
        try:
            flags = DIRECTORY_FLAGS if self._selected(path) is None else PASSING_FLAGS
            descriptor = os.open(name, flags, dir_fd=above.descriptor)
            found = self._inspected(above, name, path, descriptor)
        except OSError as error:
            if descriptor < 0 and error.errno in _GONE:
                self._lose(above, name, error)
            else:
                self._claim_folder(above, name)
                self._leave(path, f"{UNREADABLE} ({error.strerror})")
        if found is None:
            if descriptor >= 0:
                os.close(descriptor)
            return
        frame, listing = found
        self._stack.append(frame)
        if listing is not None:
            self._look(frame, listing)

    def _inspected(self, above: Frame, name: str, path: str, descriptor: int) -> tuple[Frame, Listing | None] | None:
        """Find out which folder an open one is; no listing when the walk only passes, None when it is left alone."""
        status = os.fstat(descriptor)
        inode = signed(status.st_ino)
        known = above.children.get(name)
        want = above.want.below.get(name) if above.want else None
        is_deep = above.is_deep or known is None or known.inode != inode
        if known is not None and not is_deep:
            frame = Frame(known, path, above.depth + 1, descriptor, above, want, is_deep=False)
            if self._can_pass(frame):
                return frame, None
        self._reset(path)
        listing = self._listed(path, descriptor)
        if RESERVED in listing.folders and _holds_state(descriptor):
            self._leave(path, f"holds a nested workspace ({RESERVED}), which is not carried inside another one")
            return None
        is_mount = status.st_dev != os.fstat(above.descriptor).st_dev
        is_empty = not (listing.files or listing.folders) and self._options.selection is None
        if path in self._mounts and is_empty and not is_mount and known is not None and known.digest != EMPTY_ROOT:
            self._leave(path, "is empty and no longer a mount point; mount what belongs there, or remove the folder")
            return None
        (self._mounts.add if is_mount else self._mounts.discard)(path)
        level = self._rules(path, above.level, listing)
        row = self._identified(above, name, inode, listing)
        return Frame(row, path, above.depth + 1, descriptor, above, want, is_deep, level), listing

    def _lose(self, above: Frame, name: str, error: OSError) -> None:
        """Hear that a folder that was just listed is gone, or is no folder any more."""
        above.is_unsettled, above.is_dirty, above.signature = True, True, b""
        if error.errno == errno.ENOENT and name in above.children and not self._options.no_delete:
            self._ledger.detach(above.children.pop(name))

    def _leave(self, path: str, reason: str) -> None:
        """Report a folder that stays as it was recorded, with everything below it."""
        self._reset(path)
        self._ledger.add_problem(path, Problem(shown(path), reason, False))

    def _reset(self, path: str) -> None:
        """Forget what an earlier look at a folder reported."""
        self._ledger.looked_at.add(path)
        self._ledger.problems.pop(path, None)
        self._files.waiting.pop(path, None)

    def _can_pass(self, frame: Frame) -> bool:
        """Pass through a folder that a partial scan need not list: all that it wants below is where it was."""
        want = frame.want
        if frame.is_deep or want is None or want.is_listed:
            return False
        children = self._ledger.children(frame.row.id)
        for name in want.below:
            known = children.get(name)
            if known is None or _inode_of(name, frame.descriptor) != known.inode:
                return False
        frame.children, frame.signature = children, frame.row.signature
        frame.todo = sorted(want.below, reverse=True)
        frame.level = self._options.ignore.level_of(frame.path, frame.above.level if frame.above else None)
        return True

    def _listed(self, path: str, descriptor: int) -> Listing:
        """List a folder, but for our own state."""
        listing = list_folder(descriptor, self._selected(path))
        if not path or self._options.selection is not None:
            listing.folders.pop(RESERVED, None)
            listing.files[:] = [seen for seen in listing.files if seen[0] != RESERVED]
        if self._own is not None and self._own[0] == path:
            listing.folders.pop(self._own[1], None)
        return listing

    def _selected(self, path: str) -> Collection[str] | None:
        """Return the names that there are to see in a folder; None for all of them."""
        selection = self._options.selection
        return None if selection is None else selection.names(path)

    def _rules(self, path: str, above: Level | None, listing: Listing) -> Level | None:
        """Return the ignore rules that hold in a folder; raises OSError when its ignore file cannot be read."""
        rules = self._options.ignore
        stamps: list[Stamp] = []
        for seen in listing.files:
            if seen[0] in rules.files:
                if stat.S_ISLNK(seen[2]):
                    reason = "is a link; an ignore file is not followed, so its rules do not count"
                    self._ledger.add_problem(path, Problem(shown(joined(path, seen[0])), reason, False))
                else:
                    stamps.append((seen[0], seen[1], seen[3], seen[4], seen[5]))
        return rules.enter(above, path, stamps)

    def _look(self, frame: Frame, listing: Listing) -> None:
        """Compare a folder with what is recorded of it, and queue the folders inside."""
        row, rules = frame.row, self._options.ignore
        frame.children = self._ledger.children(row.id)
        self._bereft.discard(row.id)
        level = frame.level.fingerprint if frame.level else b""
        signature = listing.signature(level + rules.command_fingerprint)
        is_same = bool(signature) and signature == row.signature and not (self._options.rehash or frame.is_far)
        if not is_same:
            table = frame.load(self._state)
            frame.is_deep = frame.is_deep or _has_new_rules(table, listing, rules.files)
        self._queue(frame, listing)
        if not is_same:
            frame.is_dirty = True
            self._files.compare(frame, listing, self._checkpoint)
        if frame.path in self._ledger.problems:
            frame.is_unsettled = True
        frame.signature = b"" if frame.is_unsettled else signature
        frame.is_dirty = frame.is_dirty or row.is_unwritten or not is_same or frame.is_unsettled

    def _queue(self, frame: Frame, listing: Listing) -> None:
        """Choose the folders inside to look at, and let go of those that are not there any more."""
        for name, inode in listing.folders.items():
            known = frame.children.get(name)
            if self._is_wanted(frame, name, known) and (
                frame.is_deep
                or known is None
                or known.inode != inode
                or (frame.want is not None and name in frame.want.below)
            ):
                frame.todo.append(name)
        frame.todo.sort(reverse=True)
        missing = frame.children.keys() - listing.folders.keys()
        if missing:
            missing -= {seen[0] for seen in listing.files}  # a file now; it takes the name once it could be read
        for name in missing:
            self._drop(frame, name, is_kept=self._is_excluded(frame, name))

    def _is_wanted(self, frame: Frame, name: str, known: Row | None) -> bool:
        """Tell whether a folder inside can be carried, and is."""
        reason = name_trouble(frame, name) if known is None or frame.is_far else None
        if reason is not None and known is not None:
            self._drop(frame, name)  # it came with a folder that was moved here, and cannot be carried so far
        if reason is None and known is None and frame.table and name in frame.table:
            if self._options.no_delete:
                reason = "is a folder now; --no-delete keeps the file that it was"
            elif frame.table[name].entry.kind is Kind.FILE:
                self._ledger.vanish(frame.row.id, name, frame.table[name].inode)
        if reason is not None:
            self._files.trouble(frame, name, reason)
            return False
        if not self._is_ignored(frame, name):
            return True
        if known is not None:
            self._drop(frame, name, is_kept=not self._options.delete_excluded)
        return False

    def _is_ignored(self, frame: Frame, name: str) -> bool:
        rules = self._options.ignore
        if frame.level is None and not rules.on_command_line:
            return False
        return rules.decide(frame.level, joined(frame.path, name), is_directory=True).ignored

    def _is_excluded(self, frame: Frame, name: str) -> bool:
        """Tell whether a folder that is gone was ignored, and stays as it would if it were here."""
        return not self._options.delete_excluded and self._is_ignored(frame, name)

    def _drop(self, frame: Frame, name: str, *, is_kept: bool = False) -> None:
        """Take a folder inside out of the tree, unless what is gone or ignored stays."""
        if is_kept or self._options.no_delete:
            frame.is_unsettled = True
        else:
            self._ledger.detach(frame.children.pop(name))
            frame.is_dirty = True

    # Which folder is this?

    def _identified(self, above: Frame, name: str, inode: int, listing: Listing) -> Row:
        """Return the row of a folder: the one under its name, the one that moved here, or a new one."""
        known = above.children.get(name)
        if known is not None and (known.inode == inode or self._files.has_trust or self._options.no_delete):
            known.is_unwritten |= known.inode != inode
            known.inode = inode
            return known
        moved = None
        if not (self._files.has_trust or self._options.no_delete):
            rows = self._ledger.candidates(inode)
            moved = next((row for row in rows if self._has_moved(row, inode, listing)), None)
        if known is not None:
            self._drop(above, name)
        if moved is None:
            return self._ledger.new_row(above.row.id, name, inode, EMPTY_ROOT)
        self._adopt(moved, above, name)
        return moved

    def _has_moved(self, row: Row, inode: int, listing: Listing) -> bool:
        """Tell whether a recorded folder with this inode is not where it was, and this listing shows that it is it."""
        if not self._has_left(row, inode):
            return False
        known = items(self._state, row.digest, Stats.unpack(self._state.packed_stats(row.id)))
        children = self._ledger.children(row.id)
        if not known and not children:
            return not listing.files and not listing.folders
        # The file system gives the inodes of what was deleted to what is new; the move of a folder changes nothing
        # of the files inside, not even a ctime.
        if any(listing.folders.get(child.name) == child.inode for child in children.values()):
            return True
        return any(
            (item := known.get(seen[0])) is not None
            and (item.inode, item.ctime_ns) == (signed(seen[1]), clamped(seen[5]))
            for seen in listing.files
        )

    def _has_left(self, row: Row, inode: int) -> bool:
        """Tell whether a recorded folder with this inode is not where it was."""
        if any(frame.row.id == row.id for frame in self._stack):
            return False
        path = self._ledger.links.path(row.id)
        return path is None or not self._is_there(path, inode)

    def _claim_folder(self, above: Frame, name: str) -> None:
        """Take what is recorded of an unreadable folder to the name that it has now, by its inode (spec S-20)."""
        inode, known = _inode_of(name, above.descriptor), above.children.get(name)
        if inode is None or self._files.has_trust or self._options.no_delete or (known and known.inode == inode):
            return
        moved = next((row for row in self._ledger.candidates(inode) if self._has_left(row, inode)), None)
        if moved is not None:
            if known is not None:
                self._drop(above, name)
            self._adopt(moved, above, name)

    def _is_there(self, path: str, inode: int) -> bool:
        """Tell whether a folder may still be at a path, without following a link on the way."""
        folder, _, name = path.rpartition("/")
        try:
            with self._top.walk_to(folder) as here:
                return _inode_of(name, here.fd) == inode
        except OSError as error:
            return error.errno not in _GONE

    def _adopt(self, row: Row, above: Frame, name: str) -> None:
        """Take a folder that moved, with everything that is recorded below it, to where it is now."""
        link = self._ledger.links.get(row.id)
        former = next((frame for frame in self._stack if frame.row.id == link.parent), None)
        if former is None and link.parent != LIMBO:
            self._bereft.add(link.parent)
        elif former is not None:
            former.children.pop(link.name, None)
            former.is_dirty = True
        self._ledger.adopt(row, above.row.id, name)
        above.take_child(row)

    # Remounts

    def _is_remounted(self) -> bool:
        """Tell whether files kept size and mtime but (nearly) all have other inodes: a remount, or a restored copy."""
        same = other = 0
        for is_same in itertools.islice(self._samples(), _SAMPLES):
            same += is_same is True
            other += is_same is False
            if same == _SAMPLES_MIN:
                return False
        return other >= _SAMPLES_MIN and other > 9 * same

    def _samples(self) -> Iterator[bool | None]:
        """Say of recorded files whether the inode is the same; None for those that are gone or were written since."""
        query = "SELECT id, digest, stats FROM directories WHERE parent != ? ORDER BY id"
        for identity, digest, packed in self._state.db.execute(query, (LIMBO,)):
            path = self._ledger.links.path(identity)
            if path is None:
                continue
            for name, item in items(self._state, digest, Stats.unpack(packed)).items():
                yield _has_same_inode(joined(path, name), item, self._top.fd)


def emptied(state: State, status: os.stat_result) -> RootUnavailable | GuardStopped:
    """Return what an empty root means, where the tree that was observed last is not empty; status: the root's."""
    name = shown(str(state.root))
    if state.get_meta("root_device") != str(status.st_dev):
        return RootUnavailable(f"{name} is empty and on another device than before; mount what belongs there")
    return GuardStopped(
        f"everything in {name} is gone; nothing is taken for deleted unless you say --allow-mass-delete"
    )


def _has_same_inode(path: str, item: Item, top: int) -> bool | None:
    try:
        status = os.stat(path, dir_fd=top, follow_symlinks=False)
    except OSError:
        return None
    if (status.st_size, status.st_mtime_ns) != (item.entry.size, item.entry.mtime_ns):
        return None
    return signed(status.st_ino) == item.inode


def _inode_of(name: str, descriptor: int) -> int | None:
    """Return the inode of a folder inside an open one; None where no folder has that name."""
    try:
        status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return signed(status.st_ino) if stat.S_ISDIR(status.st_mode) else None


def _holds_state(descriptor: int) -> bool:
    """Tell whether an open folder is a workspace itself."""
    try:
        os.stat(f"{RESERVED}/{DATABASE}", dir_fd=descriptor, follow_symlinks=False)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _has_new_rules(table: Mapping[str, Item], listing: Listing, names: Collection[str]) -> bool:
    """Tell whether an ignore file came, went or changed: everything below must be judged again."""
    present = {seen[0]: seen for seen in listing.files if seen[0] in names}
    for name in names:
        item, seen = table.get(name), present.get(name)
        if item is None or seen is None:
            if item is not None or seen is not None:
                return True
        elif (item.inode, item.ctime_ns, item.entry.size) != (signed(seen[1]), clamped(seen[5]), seen[3]):
            return True
    return False


def _inside(state: State) -> tuple[str, str] | None:
    """Return folder and name of the state's folder where it lies inside the workspace but not at its usual place."""
    with contextlib.suppress(ValueError):
        path = state.folder.resolve().relative_to(state.root).as_posix()
        folder, _, name = path.rpartition("/")
        return folder, name
    return None
