"""DEST: a held folder, and inside it a hidden one where content arrives before it gets its name (spec F-20, F-25).

What arrives lies in DEST/.deltasync/fetch: on the file system of DEST, so that a rename puts it in place at once, and
under the one name that no workspace can carry (spec P-5), so that it never meets a path of the tree.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from deltasync.client.comparison import Need, Place, is_touched
from deltasync.client.digest import FileChanging, is_same
from deltasync.client.opening import DATABASE, has_history, is_store
from deltasync.core.errors import RootUnavailable, UsageError
from deltasync.core.hashing import Hasher, hasher
from deltasync.core.manifest import Entry
from deltasync.core.names import RESERVED, shown
from deltasync.disk import (
    FULL,
    Folder,
    Lock,
    copy_bytes,
    full,
    make_folder,
    open_regular,
    reflink,
    remove_tree,
    space_guard,
    write_all,
)

ARRIVALS, LOCK = "fetch", "lock"
PART, RANGES = ".part", ".ranges"
"""Ends of the names of a large content that is arriving, and of the note which of its ranges have arrived."""
_COPY = ".copy"
BUFFER_BYTES = 1 << 20
_NAME = re.compile(rf"([0-9a-f]{{64}})({re.escape(PART)}|{re.escape(RANGES)})?")
_EXECUTE, _READ = 0o111, 0o444
_UNNAMED = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC if hasattr(os, "O_TMPFILE") and hasattr(os, "O_CLOEXEC") else None
"""To make a file that goes with its descriptor unless it gets a name; None where the system has no such files."""


class Destination:
    """A folder that is being filled; several threads may place files in it."""

    def __init__(self, path: Path, *, may_delete: bool, waits: bool = False) -> None:
        """Hold the folder, made where there is none, and keep every other fetch out of it.

        may_delete: a folder that is not empty may give way to a file or a link. waits: for a fetch that fills it; what
        comes is the only copy then, and the folder's own name is made durable before anything comes.
        """
        self.path, self._may_delete = path, may_delete
        try:
            with contextlib.ExitStack() as held, space_guard(path):
                make_folder(path, durable=waits)
                self.folder = held.enter_context(Folder.open(path))
                while not self._has_arrivals(waits=waits):
                    pass
                held.pop_all()
        except OSError as error:
            raise RootUnavailable(
                f"{shown(str(path))} cannot be written ({error.strerror}); name another folder"
            ) from error
        self.counts: Counter[str] = Counter()
        """What was done: created, replaced, touched, deleted."""
        self.problems: dict[str, str] = {}
        """Paths that could not be written, and why."""
        self._stamped: dict[int, os.stat_result] = {}
        """How files look since they were touched, by inode: one of them may have several names."""
        self._guard = threading.Lock()
        self._near = threading.local()

    def _has_arrivals(self, *, waits: bool) -> bool:
        """Hold the folder of arrivals and its lock; False where the fetch before this one has just removed both."""
        sentence = f"another fetch fills {shown(str(self.path))}; wait until it ends, or stop it"
        with contextlib.ExitStack() as held:
            try:
                self.arrivals = held.enter_context(self.folder.walk_to(f"{RESERVED}/{ARRIVALS}", create=True))
                os.fchmod(self.arrivals.fd, 0o700)  # what arrives may belong into a folder that others cannot enter
                self._lock = held.enter_context(Lock(LOCK, sentence, at=self.arrivals.fd, wait=waits))
            except FileNotFoundError:
                if not os.fstat(self.folder.fd).st_nlink:
                    raise  # DEST itself was removed
                return False
            is_there = self._lock.is_named(LOCK, at=self.arrivals.fd)
            if is_there:
                held.pop_all()
            return is_there

    def close(self, *, is_done: bool) -> None:
        """Let go. is_done: nothing that arrived is wanted any more, so that no trace is left."""
        self.forget_near()
        if is_done or self.arrivals.names() == [LOCK]:
            with self.folder.enter(RESERVED) as inside, contextlib.suppress(OSError):
                remove_tree(inside, ARRIVALS)
                os.rmdir(RESERVED, dir_fd=self.folder.fd)  # refused while it holds something else, such as settings
        self._lock.close()
        self.arrivals.close()
        self.folder.close()

    # What arrives

    def left_over(self, needs: dict[bytes, Need]) -> set[bytes]:
        """Return the contents that an earlier fetch left here whole; whatever nobody needs is removed (F-23)."""
        whole: set[bytes] = set()
        for name in self.arrivals.names():
            match = _NAME.fullmatch(name)
            need = needs.get(bytes.fromhex(match[1])) if match else None
            if match and need is not None and match[2] is None and self.holds(name, need):
                whole.add(need.digest)
            elif name != LOCK and not (match and need is not None and match[2]):
                remove_tree(self.arrivals, name)
        return whole

    def create(self, name: str) -> int:
        """Return the descriptor of a fresh file among the arrivals; the umask decides who may read it."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            return os.open(name, flags, 0o666, dir_fd=self.arrivals.fd)
        except OSError:
            with space_guard(self.path):
                self.remove(name)
                return os.open(name, flags, 0o666, dir_fd=self.arrivals.fd)

    def write(self, name: str, content: bytes) -> None:
        """Make an arrival of bytes in memory."""
        descriptor = self.create(name)
        try:
            with space_guard(self.path):
                write_all(descriptor, content)
        finally:
            os.close(descriptor)

    def remove(self, name: str) -> None:
        """Remove an arrival, if it is there."""
        remove_tree(self.arrivals, name)

    def holds(self, name: str, need: Need) -> bool:
        """Tell whether an arrival has the size and the digest that are needed."""
        try:
            descriptor = open_regular(name, at=self.arrivals.fd)
        except OSError:
            return False
        try:
            found = hasher()
            read_into(found, descriptor, 0, need.size)
            return os.fstat(descriptor).st_size == need.size and found.digest() == need.digest
        finally:
            os.close(descriptor)

    def adopt(self, need: Need, path: str) -> bool:
        """Copy a content that lies elsewhere in DEST to the arrivals; False when it is not there any more."""
        folder, _, name = path.rpartition("/")
        try:
            with self.folder.walk_to(folder) as inside:
                source = open_regular(name, at=inside.fd)
        except OSError:
            return False
        try:
            self._copy(source, need.digest.hex())
        finally:
            os.close(source)
        if self.holds(need.digest.hex(), need):
            return True
        self.remove(need.digest.hex())
        return False

    def open_former(self, place: Place) -> int:
        """Return a descriptor of the file that a content is about to replace; raises OSError where none is."""
        folder, name = self._folder_of(place.path)
        return open_regular(name, at=folder.fd)

    def _copy(self, source: int, name: str) -> None:
        target = self.create(name)
        try:
            with space_guard(self.path):
                if not reflink(source, target):
                    copy_bytes(source, target)
        finally:
            os.close(target)

    # What gets its place

    # Nothing is fsynced: a later fetch reads every file, and believes none by its time (spec F-28).

    def put(self, need: Need, arrival: str) -> None:
        """Give every place of a content its file; the arrival, which was verified, becomes the last (spec F-21)."""
        for place in need.places[:-1]:
            self._try(place, partial(self._put_copy, place, arrival, need.digest.hex() + _COPY))
        self._try(need.places[-1], partial(self._put, need.places[-1], arrival))

    def put_content(self, place: Place, content: bytes, arrival: str) -> None:
        """Give the only place of a verified content its file. arrival: its name until then, where it needs one."""
        if not place.is_replacing and self._put_unnamed(place, content):
            return
        self.write(arrival, content)
        self._try(place, partial(self._put, place, arrival))

    def _put_unnamed(self, place: Place, content: bytes) -> bool:
        """Make a new file in its folder, without a name until it is whole; False where that cannot be done.

        Its inode lies near its folder, and no two threads wait for one folder of arrivals.
        """
        if _UNNAMED is None:
            return False
        try:
            folder, name = self._folder_of(place.path)
            descriptor = os.open(".", _UNNAMED, 0o666, dir_fd=folder.fd)
            try:
                write_all(descriptor, content)
                stamp(descriptor, place.entry)
                os.link(f"/proc/self/fd/{descriptor}", name, dst_dir_fd=folder.fd)  # refused where something is
            finally:
                os.close(descriptor)
        except OSError:
            return False  # whatever it was, the way through the arrivals meets it again, and says so
        with self._guard:
            self.counts["created"] += 1
        return True

    def put_link(self, place: Place) -> None:
        """Make a symbolic link, which was found to stay inside the tree."""

        def put(folder: Folder, name: str) -> None:
            arrival = f"link{_COPY}"
            self.remove(arrival)
            os.symlink(place.entry.target, arrival, dir_fd=self.arrivals.fd)
            self._rename(place, arrival, folder, name)

        self._try(place, put)

    def put_folder(self, place: Place) -> None:
        """Make a folder, in place of whatever else has its name."""

        def put(folder: Folder, name: str) -> None:
            if place.is_replacing:
                os.unlink(name, dir_fd=folder.fd)
            os.mkdir(name, dir_fd=folder.fd)

        self._try(place, put, done="folders")

    def touch(self, place: Place) -> None:
        """Give a file its time and executable bit, if it is still the one that was read (spec F-11)."""

        def touch(folder: Folder, name: str) -> None:
            descriptor = open_regular(name, at=folder.fd)
            try:
                now = os.fstat(descriptor)
                known = self._stamped.get(now.st_ino, place.read)
                if known is None or not is_same(known, now):
                    raise FileChanging(now)
                stamp(descriptor, place.entry)
                self._stamped[now.st_ino] = os.fstat(descriptor)
            finally:
                os.close(descriptor)

        try:
            self._try(place, touch, done="touched")
        except FileChanging:
            self.report(place.path, "changed after it was read, and was left as it is; fetch again to replace it")

    def delete(self, path: str, entries: int) -> None:
        """Remove what is not wanted, with everything below it; entries: how many that are."""
        try:
            folder, name = self._folder_of(path)
            remove_tree(folder, name)
            self.counts["deleted"] += entries
        except OSError as error:
            self._blame(path, error)

    def _put_copy(self, place: Place, arrival: str, copy: str, folder: Folder, name: str) -> None:
        source = open_regular(arrival, at=self.arrivals.fd)
        try:
            self._copy(source, copy)
        finally:
            os.close(source)
        self._put(place, copy, folder, name)

    def _put(self, place: Place, arrival: str, folder: Folder, name: str) -> None:
        descriptor = open_regular(arrival, at=self.arrivals.fd)
        try:
            stamp(descriptor, place.entry)
        finally:
            os.close(descriptor)
        self._rename(place, arrival, folder, name)

    def _rename(self, place: Place, arrival: str, folder: Folder, name: str) -> None:
        if place.is_folder_there and self._may_delete:
            remove_tree(folder, name)
        elif place.is_folder_there:
            os.rmdir(name, dir_fd=folder.fd)
        os.rename(arrival, name, src_dir_fd=self.arrivals.fd, dst_dir_fd=folder.fd)

    def _try(self, place: Place, act: Callable[[Folder, str], None], *, done: str = "") -> None:
        """Do something at a place: folder and name there; trouble with one path is data."""
        try:
            act(*self._folder_of(place.path))
        except OSError as error:
            self._blame(place.path, error)
            return
        with self._guard:
            self.counts[done or ("replaced" if place.is_replacing else "created")] += 1

    def _blame(self, path: str, error: OSError) -> None:
        """Take trouble with one path as data; a full disk ends the fetch (spec F-26)."""
        if error.errno in FULL:
            raise full(self.path) from error
        reason = "it is on another file system" if error.errno == errno.EXDEV else error.strerror
        self.report(path, f"cannot be written ({reason})")

    def report(self, path: str, reason: str) -> None:
        """Record trouble with a path; the first reason stands."""
        with self._guard:
            self.problems.setdefault(path, reason)

    def _folder_of(self, path: str) -> tuple[Folder, str]:
        """Return the held folder of a path, and its name there: files of one folder come together."""
        folder, _, name = path.rpartition("/")
        near: tuple[str, Folder] | None = getattr(self._near, "folder", None)
        if near is None or near[0] != folder:
            self.forget_near()
            near = self._near.folder = (folder, self.folder.walk_to(folder))
        return near[1], name

    def forget_near(self) -> None:
        """Let go of the folder that this thread placed its last file in."""
        near: tuple[str, Folder] | None = getattr(self._near, "folder", None)
        self._near.folder = None
        if near is not None:
            near[1].close()


def stamp(descriptor: int, entry: Entry) -> None:
    """Give an open file the time and the executable bit of its entry: who may read it may then execute it."""
    status = os.fstat(descriptor)
    if not is_touched(entry, status):
        return
    mode = stat.S_IMODE(status.st_mode)
    wanted = mode | (mode & _READ) >> 2 if entry.executable else mode & ~_EXECUTE
    if wanted != mode:
        os.fchmod(descriptor, wanted)
    os.utime(descriptor, ns=(status.st_atime_ns, entry.mtime_ns))


def read_into(found: Hasher, descriptor: int, start: int, end: int) -> None:
    """Add a range of an open file to a digest; of a file that is shorter only what there is."""
    view = memoryview(bytearray(max(0, min(BUFFER_BYTES, end - start))))
    while count := os.preadv(descriptor, [view[: end - start]], start):
        found.update(view[:count])
        start += count


def usable(path: Path, *, may_be_workspace: bool = False) -> Path:
    """Return the real path of DEST, which need not exist yet; raises UsageError where a fetch must not write."""
    try:
        real = path.resolve()
        if real.exists() and not real.is_dir():
            raise UsageError(f"{shown(str(path))} is not a folder; a fetch fills a folder")
        for parent in (real, *real.parents):
            if is_store(parent):
                raise UsageError(
                    f"{shown(str(parent))} is the data folder of a deltasync-server, which alone may change what is in "
                    "it; fetch into another folder"
                )
            if not may_be_workspace and (parent / RESERVED / DATABASE).is_file():
                raise UsageError(_why_not(parent))
    except (OSError, RuntimeError) as error:
        raise RootUnavailable(f"{shown(str(path))} cannot be used: {error}") from error
    return real


def _why_not(root: Path) -> str:
    """Say why a workspace is not fetched into; one that was only tried once need not stay one."""
    if has_history(root / RESERVED):
        return (
            f"{shown(str(root))} is a workspace that is pushed from here; "
            "what it has not sent yet could be lost: fetch into another folder and copy from there"
        )
    return (
        f"{shown(str(root))} was made a workspace, but its state knows of nothing that was ever sealed; fetch into "
        f"another folder, or remove {shown(str(root / RESERVED))}, if that was never meant to be a workspace"
    )
