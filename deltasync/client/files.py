"""The files and links of one folder: which are as recorded, which are read again, which are trouble."""

from __future__ import annotations

import errno
import os
import stat
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import msgspec

from deltasync.client import recipes
from deltasync.client.digest import Cutting, Digested, Digester, FileChanging
from deltasync.client.frame import Frame, Item
from deltasync.client.ledger import Ledger
from deltasync.client.listing import Listing, Seen, clamped, is_executable, signed
from deltasync.client.moves import joined
from deltasync.client.observation import Expect, Follow, Follower, IsSettled, Progress, ScanOptions, Waiting
from deltasync.client.recipes import Edges, Known
from deltasync.client.state import KEPT, RACY, UNREADABLE, Problem
from deltasync.core.chunks import average_for
from deltasync.core.manifest import Entry, Kind
from deltasync.core.names import DEPTH_MAX, PATH_BYTES_MAX, NameRefused, parse_name, parse_target, shown
from deltasync.disk import has_holes

RACY_NS = 20_000_000
"""What changed less than this before its hash began may change again without its times showing it."""
_COARSE_RACY_NS = 2_000_000_000
_SECOND_NS = 1_000_000_000
_PROGRESS_FILES = 256
_SPECIAL = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


class Clock:
    """The time as a file system writes it: a file of our own is touched and its mtime read."""

    def __init__(self, folder: Path) -> None:
        """Use a file in the state's folder."""
        self._descriptor = os.open(folder / "clock", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._now = 0

    def is_racy(self, newest_ns: int) -> bool:
        """Tell whether what changed then may change again unseen, if it was read after this clock last looked."""
        # A file system that counts in seconds shows nothing finer.
        margin = RACY_NS if newest_ns % _SECOND_NS else _COARSE_RACY_NS
        return newest_ns >= self._now - margin

    def look(self, newest_ns: int) -> None:
        """Look again before a read, if the time known so far is too old to tell."""
        if self.is_racy(newest_ns):
            os.utime(self._descriptor)
            self._now = os.fstat(self._descriptor).st_mtime_ns

    def close(self) -> None:
        """Let the file go."""
        os.close(self._descriptor)


class Files:
    """Brings the recorded files of one folder after another up to date."""

    def __init__(
        self,
        ledger: Ledger,
        options: ScanOptions,
        clock: Clock,
        is_settled: IsSettled | None,
        progress: Progress | None,
        expect: Expect | None = None,
        follow: Follow | None = None,
    ) -> None:
        """Begin with nothing read."""
        self.ledger, self._options, self._clock = ledger, options, clock
        self._is_settled, self._progress, self._expect, self._follow = is_settled, progress, expect, follow
        self.is_alone = is_settled is None
        """Nobody else judges whether a file has settled."""
        self._digester = Digester(self._tell if progress else None)
        self.has_trust = False
        """Inodes mean nothing in this scan: equal size and mtime are enough."""
        self.trusted = 0
        self.hashed_files = self.hashed_bytes = 0
        self.waiting: dict[str, list[Waiting]] = {}
        """The files still being written, by their folder."""
        self.last_seen: dict[str, tuple[int, int, int]] = {}
        """Size and times of the files that changed while they were read."""
        self.unread: dict[int, str] = {}
        """The folders of files that cannot be read and that nothing is recorded of, by inode."""
        self.former: Mapping[int, Entry] = {}
        """What the sealed tree has of those, by inode, under the names that they had."""

    def compare(self, frame: Frame, listing: Listing, checkpoint: Callable[[], None]) -> None:
        """Bring the table of a folder up to date with its listing, which is used up.

        checkpoint: called whenever much was read.
        """
        table = frame.load(self.ledger.state)
        self._drop_missing(frame, table, listing)
        ahead, due = self._digester.ahead, self._due(frame, listing, table)
        queue: deque[tuple[Seen, Item | None]] = deque()
        try:
            while self._fill(queue, due, frame):
                self._renew(frame, *queue.popleft())
                if self.ledger.is_due():
                    ahead.clear()  # whoever sends what was found needs descriptors too
                    checkpoint()
        finally:
            ahead.clear()

    def _fill(
        self, queue: deque[tuple[Seen, Item | None]], due: Iterator[tuple[Seen, Item | None]], frame: Frame
    ) -> bool:
        """Have the next entry to renew in a queue, and those behind it announced while the disk is slow."""
        ahead = self._digester.ahead
        while len(queue) <= ahead.files and (found := next(due, None)) is not None:
            seen, item = found
            if queue and stat.S_ISREG(seen.mode) and seen.size and not self._is_trusted(seen, item):
                ahead.announce(seen.name, seen.size, at=frame.descriptor)
            queue.append(found)
        return bool(queue)

    def _due(self, frame: Frame, listing: Listing, table: dict[str, Item]) -> Iterator[tuple[Seen, Item | None]]:
        """Yield the entries of a listing that are new or may have changed, each with what is recorded of it."""
        rules = self._options.ignore
        has_rules = frame.level is not None or rules.on_command_line
        rehash = self._options.rehash
        # In the order of inodes, which is the order on many disks; each is let go before the next is looked at.
        left = listing.files
        left.sort(key=_by_inode, reverse=True)
        while left:
            name, inode, mode, size, mtime_ns, ctime_ns = left.pop()
            item = table.get(name)
            if frame.is_far and item is not None and name_trouble(frame, name):
                self._drop(frame, name)  # it came with a folder that was moved here, and cannot be carried so far
                item = None
            if has_rules and rules.decide(frame.level, joined(frame.path, name), is_directory=False).ignored:
                self._exclude(frame, name, item)
                continue
            if item is not None and not (item.flags & RACY or rehash):
                entry = item.entry
                if (
                    ctime_ns == item.ctime_ns
                    and (inode == item.inode or signed(inode) == item.inode)
                    and ((entry.size == size and entry.mtime_ns == mtime_ns) or entry.kind is Kind.SYMLINK)
                ):
                    if item.flags:
                        table[name] = item._replace(flags=0)
                    continue
            yield Seen(name, signed(inode), mode, size, clamped(mtime_ns), clamped(ctime_ns)), item

    def _drop_missing(self, frame: Frame, table: dict[str, Item], listing: Listing) -> None:
        present = {seen[0] for seen in listing.files}
        for name in [name for name in table if name not in present]:
            if name in listing.folders:
                frame.is_unsettled = True  # a folder now; it takes the name once it could be listed
            elif self._options.no_delete or self._is_excluded(frame, name):
                self._keep(frame, name)
            else:
                self._drop(frame, name)

    def _is_excluded(self, frame: Frame, name: str) -> bool:
        """Tell whether a file that is gone was ignored, and stays as it would if it were here."""
        rules = self._options.ignore
        if self._options.delete_excluded or (frame.level is None and not rules.on_command_line):
            return False
        return rules.decide(frame.level, joined(frame.path, name), is_directory=False).ignored

    def _exclude(self, frame: Frame, name: str, item: Item | None) -> None:
        """Leave an ignored file out; what was carried before it was ignored stays unless that is wanted too."""
        if item is not None:
            if self._options.delete_excluded and not self._options.no_delete:
                self._drop(frame, name)
            else:
                self._keep(frame, name)

    def _keep(self, frame: Frame, name: str) -> None:
        table = frame.load(self.ledger.state)
        table[name] = table[name]._replace(flags=KEPT)
        frame.is_unsettled = frame.is_dirty = True

    def _drop(self, frame: Frame, name: str) -> None:
        item = frame.load(self.ledger.state).pop(name)
        frame.is_dirty = True
        if item.entry.kind is Kind.FILE and not self.has_trust:
            self.ledger.vanish(frame.row.id, name, item.inode)

    def _renew(self, frame: Frame, seen: Seen, item: Item | None) -> None:
        """Observe an entry that is new or may have changed."""
        if item is None and seen.name not in frame.children:
            reason = name_trouble(frame, seen.name)
            if reason:
                self.trouble(frame, seen.name, reason)
                return
        kind = stat.S_IFMT(seen.mode)
        if kind in _SPECIAL:
            self.trouble(frame, seen.name, f"is {_SPECIAL[kind]}; only files, folders and links are carried")
        elif seen.name in frame.children and self._options.no_delete:
            self.trouble(frame, seen.name, "is no folder any more; --no-delete keeps the folder that it was")
        else:
            try:
                self._observe(frame, seen, item)
            except FileChanging as error:
                self._wait(frame, seen.name, error.status)
            except OSError as error:
                self._cannot_read(frame, seen, item, error)

    def _observe(self, frame: Frame, seen: Seen, item: Item | None) -> None:
        if stat.S_ISLNK(seen.mode):
            self._clock.look(seen.ctime_ns)
            self._observe_link(frame, seen)
        elif self._is_trusted(seen, item):
            self._trust(frame, seen, item)
        elif item is None and (entry := self._remembered(frame, seen)) is not None:
            self._take(frame, Item(entry, seen.inode, seen.ctime_ns, 0))
        elif self._may_read(frame, seen):
            self._clock.look(max(seen.mtime_ns, seen.ctime_ns))
            self._read(frame, seen.name, item)

    def _observe_link(self, frame: Frame, seen: Seen) -> None:
        target = os.readlink(seen.name, dir_fd=frame.descriptor)
        try:
            parse_target(joined(frame.path, seen.name), target)
        except NameRefused as error:
            self.trouble(frame, seen.name, str(error))
            return
        flags = RACY if self._clock.is_racy(seen.ctime_ns) else 0
        self._take(frame, Item(Entry(seen.name, Kind.SYMLINK, target=target), seen.inode, seen.ctime_ns, flags))

    def _remembered(self, frame: Frame, seen: Seen) -> Entry | None:
        memory = self._options.memory
        if memory is None or self._options.rehash or seen.name in frame.children:
            return None
        return memory.recall(joined(frame.path, seen.name), seen)

    def _is_trusted(self, seen: Seen, item: Item | None) -> bool:
        return (
            self.has_trust
            and not self._options.rehash
            and item is not None
            and item.entry.kind is Kind.FILE
            and (item.entry.size, item.entry.mtime_ns) == (seen.size, seen.mtime_ns)
            and not item.flags & RACY
        )

    def _trust(self, frame: Frame, seen: Seen, item: Item | None) -> None:
        assert item is not None
        entry = msgspec.structs.replace(item.entry, executable=is_executable(seen.mode))
        self.trusted += 1
        self._take(frame, Item(entry, seen.inode, seen.ctime_ns, 0))

    def _may_read(self, frame: Frame, seen: Seen) -> bool:
        """Ask whether a file has settled; one that changed while it was read must first stay as it then was."""
        path = joined(frame.path, seen.name)
        last = self.last_seen.get(path)
        if last is not None and last != (seen.size, seen.mtime_ns, seen.ctime_ns):
            self._wait(frame, seen.name, os.stat(seen.name, dir_fd=frame.descriptor, follow_symlinks=False))
            return False
        if self._is_settled is not None:
            status = os.stat(seen.name, dir_fd=frame.descriptor, follow_symlinks=False)
            if not self._is_settled(path, status):
                self._wait(frame, seen.name, status)
                return False
        return True

    def _read(self, frame: Frame, name: str, item: Item | None) -> None:
        edges: list[Edges] = []
        cutting = partial(self._cutting, item, edges)
        found = self._digested(frame, name, item, edges, cutting)
        may_cut = average_for(found.status.st_size) is not None
        if edges and found.listed is None and may_cut and self._is_surprise(edges[0], found.digest):
            edges.clear()  # it seemed to be a copy, or only touched, and is not: it is read once more, and cut
            found = self._digester.digest_file(name, at=frame.descriptor, cutting=partial(cutting, is_sure=True))
        status = found.status
        mtime_ns, ctime_ns = clamped(status.st_mtime_ns), clamped(status.st_ctime_ns)
        entry = Entry(name, Kind.FILE, status.st_size, mtime_ns, is_executable(status.st_mode), found.digest)
        flags = RACY if self._clock.is_racy(max(mtime_ns, ctime_ns)) else 0
        inode = signed(status.st_ino)
        if item is not None and item.inode != inode and item.entry.digest != entry.digest and not self.has_trust:
            self.ledger.vanish(frame.row.id, name, item.inode)  # another file took the name: where did this one go?
        self._take(frame, Item(entry, inode, ctime_ns, flags))
        self.hashed_files += 1
        self.hashed_bytes += status.st_size
        self.ledger.count_hashed(status.st_size)
        average = average_for(status.st_size)
        if edges:
            self.ledger.edges.append((found.digest, edges[0]))
        if found.listed is not None and average is not None:
            self.ledger.recipes.append(Known(found.digest, average, found.listed))
        if self._progress is not None and self.hashed_files % _PROGRESS_FILES == 0:
            self._progress(self.hashed_files, self.hashed_bytes)

    def _digested(self, frame: Frame, name: str, item: Item | None, edges: list[Edges], cutting: Cutting) -> Digested:
        """Read a file to its end, and let whoever follows that know how it ended."""
        followers: list[Follower] = []
        following = partial(self._following, joined(frame.path, name), edges, followers) if item is None else None
        try:
            found = self._digester.digest_file(name, at=frame.descriptor, cutting=cutting, following=following)
        except (FileChanging, OSError):
            for follower in followers:
                follower.give_up()
            raise
        for follower in followers:
            follower.finish(found.digest)
        return found

    def _following(
        self, path: str, edges: list[Edges], followers: list[Follower], status: os.stat_result
    ) -> Follower | None:
        """Let somebody follow the reading of a file of data throughout that begins or ends as none that was read."""
        is_new = bool(edges) and not recipes.seems_known(self.ledger.state, edges[0])
        is_like = any(edges[0][:3] == each[:3] for _, each in self.ledger.edges) if is_new else False
        if self._follow is None or not is_new or is_like or has_holes(status):
            return None
        follower = self._follow(path, status)
        if follower is not None:
            followers.append(follower)
        return follower

    def _is_surprise(self, edges: Edges, digest: bytes) -> bool:
        state = self.ledger.state
        return recipes.seems_known(state, edges) and not recipes.is_known(state, digest)

    def _cutting(
        self, item: Item | None, edges: list[Edges], descriptor: int, size: int, *, is_sure: bool = False
    ) -> int | None:
        """Have a large file cut when there may be a base for it: what it was before, or one that begins or ends so.

        Cutting takes three times as long as hashing: what seems to be known, whole, is hashed first.
        """
        least = self._options.chunk_from_bytes
        if size < least:
            return None
        edges.append(recipes.edges_of(descriptor, size))
        if not is_sure and recipes.seems_known(self.ledger.state, edges[0]):
            return None
        if item is not None and item.entry.kind is Kind.FILE and item.entry.size >= least:
            base: bytes | None = item.entry.digest
        else:
            base = recipes.latest_with(self.ledger.state, edges[0])
        average = average_for(size) if base is not None else None
        if base is not None and average is not None and self._expect is not None:
            self._expect(base, average)
        return average

    def _tell(self, read_bytes: int) -> None:
        if self._progress is not None:
            self._progress(self.hashed_files, self.hashed_bytes + read_bytes)

    def _take(self, frame: Frame, item: Item) -> None:
        """Have an entry in the tree, in place of whatever had its name."""
        frame.load(self.ledger.state)[item.entry.name] = item
        frame.is_dirty = True
        former = frame.children.pop(item.entry.name, None)
        if former is not None:
            self.ledger.detach(former)
        frame.is_unsettled |= item.flags != 0

    def _wait(self, frame: Frame, name: str, status: os.stat_result) -> None:
        path = joined(frame.path, name)
        self.last_seen[path] = (status.st_size, clamped(status.st_mtime_ns), clamped(status.st_ctime_ns))
        self.waiting.setdefault(frame.path, []).append(Waiting(path, status.st_size, status.st_mtime_ns))
        reason = "is still being written" if not self.is_alone else "kept changing while it was read; try again later"
        self.trouble(frame, name, reason, waiting=not self.is_alone)

    def _cannot_read(self, frame: Frame, seen: Seen, item: Item | None, error: OSError) -> None:
        name = seen.name
        if error.errno == errno.ENOENT:
            if item is not None and not self._options.no_delete:
                self._drop(frame, name)  # gone since it was listed
            frame.is_unsettled = True
        elif error.errno in (errno.ELOOP, errno.EINVAL):
            self.trouble(frame, name, "became something else while it was looked at", waiting=True)
        else:
            if item is None or item.inode != seen.inode:
                self._claim(frame, seen, item)
            self.trouble(frame, name, f"{UNREADABLE} ({error.strerror})")

    def _claim(self, frame: Frame, seen: Seen, item: Item | None) -> None:
        """Take the entry that an unreadable file had before it was renamed, where its stat proves that (spec S-20)."""
        former = self.former.get(seen.inode)
        if former is None or (former.size, former.mtime_ns) != (seen.size, seen.mtime_ns):
            self.unread[seen.inode] = frame.path
            return
        if item is not None:
            self.ledger.vanish(frame.row.id, seen.name, item.inode)
        # No ctime: it is read as soon as it can be, and until then it is trouble.
        self._take(frame, Item(msgspec.structs.replace(former, name=seen.name), seen.inode, 0, KEPT))

    def trouble(self, frame: Frame, name: str, reason: str, *, waiting: bool = False) -> None:
        """Report an entry whose former state, if any, stands."""
        frame.is_unsettled = True
        self.ledger.add_problem(frame.path, Problem(shown(joined(frame.path, name)), reason, waiting))


def name_trouble(frame: Frame, name: str) -> str | None:
    """Say why a name in a folder cannot be carried, or None."""
    try:
        parse_name(name)
    except NameRefused as error:
        return str(error)
    if frame.depth >= DEPTH_MAX:
        return f"lies deeper than {DEPTH_MAX} folders"
    if frame.is_far and len(joined(frame.path, name).encode()) > PATH_BYTES_MAX:
        return f"its path is longer than {PATH_BYTES_MAX} bytes"
    return None


def _by_inode(seen: tuple[str, int, int, int, int, int]) -> int:
    return seen[1]
