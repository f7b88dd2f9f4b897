"""A recorded disk: every block write and barrier of a mounted file system, and what a power cut may leave of it.

One image file is served over FUSE by a process of its own, a loop device is laid over that file, and a file system is
mounted from it. The image's server notes every write, every barrier, and every mark that the workload puts between.
A cut disk has everything that was written before the last barrier, and of what came after it any part: whole writes
left out, others torn at their sectors, in any order. All mounts are in a mount namespace of this process, which the
kernel takes down with it, and every loop device lets itself go.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import random
import shutil
import signal
import stat
import struct
import subprocess
import sys
import threading
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

SECTOR = 512
CHUNK = 1 << 16
SUPERBLOCK_BYTES = 4096
LIES_MAX = 8
"""How many barriers, one after another, a disk that lies ignores."""
MAKERS = {
    "ext4": (
        *("mkfs.ext4", "-q", "-F", "-b4096", "-N8192", "-Jsize=4"),
        "-Enodiscard,lazy_itable_init=0,lazy_journal_init=0",
    ),
    "xfs": ("mkfs.xfs", "-q", "-f", "-K"),
}
OPTIONS = {"ext4": ("", "", "data=writeback", "nodelalloc,data=writeback", "data=journal"), "xfs": ("",)}
"""How a file system may be mounted while it is recorded; with the fewest promises, sizes come long before bytes."""
SIZES = {"ext4": 48 << 20, "xfs": 320 << 20}
"""What a disk of each file system has at least, to hold a life; the images are sparse."""
SUBSETS = ("none", "all", "all but one", "some", "torn")
"""What of the writes behind the last barrier is there."""
_HEAD = struct.Struct("<cQI")
_WRITE, _BARRIER, _MARK = b"W", b"F", b"M"
_CLONE_NEWNS, _MS_NOATIME, _MS_REC, _MS_PRIVATE, _MNT_DETACH = 0x20000, 1024, 16384, 1 << 18, 2
_LOOP_GET_FREE, _LOOP_CONFIGURE, _LO_AUTOCLEAR, _PDEATHSIG = 0x4C82, 0x4C0A, 4, 1
_libc = ctypes.CDLL(None, use_errno=True)


class Unavailable(Exception):
    """No disk can be recorded on this machine, and why."""


def require_means() -> None:
    """Raise Unavailable where something is missing that can be told without trying."""
    missing = [name for name in ("/dev/fuse", "/dev/loop-control") if not Path(name).exists()]
    missing += [] if shutil.which("mkfs.ext4") else ["mkfs.ext4"]
    if os.name != "posix" or os.geteuid():
        raise Unavailable("disks are mounted by root alone")
    if missing:
        raise Unavailable(f"there is no {' and no '.join(missing)}")
    try:
        import fuse  # noqa: F401
    except (ImportError, OSError) as error:
        raise Unavailable(f"there is no fusepy, or no libfuse 2 ({error})") from error


def isolate() -> None:
    """Have the mounts of this process be its own; raises Unavailable where that is not allowed."""
    die_with_parent()
    if _libc.unshare(_CLONE_NEWNS) or _libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None):
        raise Unavailable(f"mounts are not allowed here ({os.strerror(ctypes.get_errno())})")


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it is gone."""
    _libc.prctl(_PDEATHSIG, signal.SIGKILL)


# --- mounts ---


@contextmanager
def mounted(image: Path, folder: Path, kind: str, options: str = "") -> Iterator[Path]:
    """Mount a disk's image while the block runs; the file system's journal is replayed.

    Raises OSError where something on it is still open at the end; it is unmounted all the same.
    """
    device = _attached(image)
    try:
        _check(_libc.mount(device.path.encode(), os.fsencode(folder), kind.encode(), _MS_NOATIME, options.encode()))
    finally:
        os.close(device.descriptor)  # it lets itself go when the last one who has it does
    try:
        yield folder
    except BaseException:
        _unmount(folder)
        raise
    if not _unmount(folder):
        raise OSError(errno.EBUSY, "something on the disk is still open")


def _unmount(folder: Path) -> bool:
    """Unmount a disk; False where it was busy and goes only when the last one lets go."""
    pause = threading.Event()
    for _ in range(20):
        if not _libc.umount2(os.fsencode(folder), 0):
            return True
        if ctypes.get_errno() != errno.EBUSY:
            break
        pause.wait(0.01)
    _check(_libc.umount2(os.fsencode(folder), _MNT_DETACH))
    return False


class _Device(NamedTuple):
    path: str
    descriptor: int


def _attached(image: Path) -> _Device:
    """Lay a loop device over a file; another process may be quicker to take the one that is free."""
    try:
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    except PermissionError as error:
        raise Unavailable("loop devices are not allowed here") from error
    backing = os.open(image, os.O_RDWR | os.O_CLOEXEC)
    # struct loop_config: the descriptor, the block size, then struct loop_info64 with its flags, then reserved.
    config = struct.pack("<II5Q4I", backing, 0, 0, 0, 0, 0, 0, 0, 0, 0, _LO_AUTOCLEAR) + bytes(64 + 64 + 32 + 16 + 64)
    try:
        for _ in range(100):
            path = f"/dev/loop{fcntl.ioctl(control, _LOOP_GET_FREE)}"
            descriptor = -1
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                fcntl.ioctl(descriptor, _LOOP_CONFIGURE, config)
                return _Device(path, descriptor)
            except OSError as error:
                if descriptor >= 0:
                    os.close(descriptor)
                if error.errno in (errno.EPERM, errno.EACCES, errno.ENOENT):
                    raise Unavailable(f"{path} cannot be used ({error.strerror})") from error
                if error.errno not in (errno.EBUSY, errno.ENXIO):
                    raise
        raise Unavailable("no loop device is free")
    finally:
        os.close(backing)
        os.close(control)


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


# --- recording ---


class Event(NamedTuple):
    """Something that the disk met: a write, a barrier, or a mark."""

    kind: bytes
    offset: int
    body: bytes


@dataclass
class Recorded:
    """A disk that is mounted and recorded."""

    folder: Path
    """Where it is mounted."""
    first: Path
    """Its image as it was before."""
    log: Path
    _marks: int = -1

    def mark(self, number: int) -> None:
        """Note that something was acknowledged: every later moment knows."""
        os.write(self._marks, str(number).encode())

    def events(self) -> list[Event]:
        """Return everything so far."""
        found, at, text = [], 0, self.log.read_bytes()
        while at < len(text):
            kind, offset, size = _HEAD.unpack_from(text, at)
            at += _HEAD.size
            found.append(Event(kind, offset, text[at : at + size]))
            at += size
        return found


def new_disk(image: Path, kind: str) -> None:
    """Make a file system on a new disk."""
    image.unlink(missing_ok=True)
    with image.open("wb") as file:
        file.truncate(SIZES[kind])
    subprocess.run([*MAKERS[kind], str(image)], check=True, capture_output=True)


def copied(image: Path, target: Path) -> Path:
    """Copy a disk, and return the copy."""
    subprocess.run(["cp", "--sparse=always", str(image), str(target)], check=True)
    return target


@contextmanager
def recorded(scratch: Path, kind: str, image: Path, options: str = "") -> Iterator[Recorded]:
    """Mount a disk and record all that is written to it in the block, also what its journal has to say."""
    served, folder, log = scratch / "served", scratch / "disk", scratch / "log"
    for each in (served, folder):
        each.mkdir(parents=True, exist_ok=True)
    first = copied(image, image.with_suffix(".first"))
    log.write_bytes(b"")
    with _served(image, log, served), mounted(served / "disk", folder, kind, options):
        disk = Recorded(folder, first, log, os.open(served / "marks", os.O_WRONLY))
        try:
            yield disk
        finally:
            os.close(disk._marks)


@contextmanager
def _served(image: Path, log: Path, folder: Path) -> Iterator[None]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    words = [sys.executable, "-m", "torture.disk", str(image), str(log), str(folder)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, env=environment)
    try:
        assert process.stdout
        if process.stdout.readline() != b"ready\n":
            raise Unavailable("FUSE serves no file here")
        yield
    finally:
        with contextlib.suppress(OSError):
            _unmount(folder)
        process.terminate()
        process.wait()


def main() -> None:
    """Serve one image and note what is done to it: `python -m torture.disk IMAGE LOG FOLDER`."""
    from fuse import FUSE, FuseOSError, Operations

    die_with_parent()
    image = os.open(sys.argv[1], os.O_RDWR)
    log = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND)
    size = os.fstat(image).st_size

    def note(kind: bytes, offset: int = 0, body: bytes = b"") -> None:
        os.write(log, _HEAD.pack(kind, offset, len(body)) + body)

    class Disk(Operations):  # type: ignore[misc]
        """Two files: the disk, and one that takes marks."""

        def init(self, path: str) -> None:
            print("ready", flush=True)

        def getattr(self, path: str, handle: int | None = None) -> dict[str, int]:
            if path == "/":
                return {"st_mode": stat.S_IFDIR | 0o700, "st_nlink": 2}
            if path in ("/disk", "/marks"):
                return {"st_mode": stat.S_IFREG | 0o600, "st_nlink": 1, "st_size": size if path == "/disk" else 0}
            raise FuseOSError(errno.ENOENT)

        def read(self, path: str, count: int, offset: int, handle: int) -> bytes:
            return os.pread(image, count, offset)

        def write(self, path: str, body: bytes, offset: int, handle: int) -> int:
            if path == "/disk":
                os.pwrite(image, body, offset)
                note(_WRITE, offset, body)
            else:
                note(_MARK, 0, body)
            return len(body)

        def fsync(self, path: str, is_data_only: int, handle: int) -> int:
            note(_BARRIER)
            return 0

        def flush(self, path: str, handle: int) -> int:
            return 0

    # One thread, so that the notes have the order of the writes; no page cache, so that each write is seen at once.
    FUSE(Disk(), sys.argv[3], foreground=True, nothreads=True, direct_io=True, big_writes=True)


# --- cuts ---


class Moment(NamedTuple):
    """A point of time between two events: what is durable then, what is not, and what was acknowledged."""

    number: int
    """How many events were before it."""
    barrier: int
    """How many events the last barrier covers."""
    acknowledged: int
    """The last mark."""


def moments(events: Sequence[Event], chance: random.Random, *, marks_from: int = 0) -> list[Moment]:
    """Return every moment with something to lose, at random: after each mark, before each barrier, after each write."""
    found: list[Moment] = []
    barrier, acknowledged = 0, 0
    for number, event in enumerate(events):
        if event.kind == _BARRIER:
            if number and events[number - 1].kind == _WRITE:
                found.append(Moment(number, barrier, acknowledged))
            barrier = number
        elif event.kind == _MARK:
            acknowledged = int(event.body)
            found.append(Moment(number + 1, barrier, acknowledged))
        elif chance.random() < 0.3:
            found.append(Moment(number + 1, barrier, acknowledged))
    return [each for each in found if each.acknowledged >= marks_from]


@dataclass
class Cutter:
    """Makes disks of one recording, at one moment after another."""

    first: Path
    events: Sequence[Event]
    _durable: bytearray = field(init=False)
    _used: set[int] = field(init=False)
    """The chunks that are not all zeros."""
    _at: int = 0

    def __post_init__(self) -> None:
        self._durable = bytearray(self.first.read_bytes())
        disk, empty = self._durable, bytes(CHUNK)
        self._used = {n for n in range(len(disk) // CHUNK) if disk[n * CHUNK : (n + 1) * CHUNK] != empty}

    def pending(self, moment: Moment) -> list[Event]:
        """Return the writes that no barrier covers."""
        return [event for event in self.events[moment.barrier : moment.number] if event.kind == _WRITE]

    def before_lies(self, chosen: Sequence[Moment], chance: random.Random) -> list[Moment]:
        """Return moments as they are where the last barriers before each did nothing, those with something to lose."""
        barriers = [0, *(number for number, event in enumerate(self.events) if event.kind == _BARRIER)]
        found: list[Moment] = []
        for each in chosen:
            last = bisect_left(barriers, each.barrier)
            lied = each._replace(barrier=barriers[max(0, last - chance.randint(1, LIES_MAX))])
            if self.pending(lied):
                found.append(lied)
        return sorted(found, key=lambda each: each.barrier)

    def cut(self, moment: Moment, subset: str, chance: random.Random, image: Path) -> str:
        """Write the disk of a moment with a part of what was pending; moments never go back. Returns what is there."""
        assert moment.barrier >= self._at, "moments come in order"
        for event in self.events[self._at : moment.barrier]:
            if event.kind == _WRITE:
                self._durable[event.offset : event.offset + len(event.body)] = event.body
                self._used |= _chunks(event)
        self._at = moment.barrier
        image.unlink(missing_ok=True)  # never the same file: a former disk may still be written by what held it open
        chosen, words = _chosen(self.pending(moment), subset, chance)
        with image.open("wb", buffering=0) as file:
            file.truncate(len(self._durable))
            view = memoryview(self._durable)
            for number in self._used:
                os.pwrite(file.fileno(), view[number * CHUNK : (number + 1) * CHUNK], number * CHUNK)
            view.release()
            for event in chosen:
                os.pwrite(file.fileno(), event.body, event.offset)
        return words


def _chunks(event: Event) -> set[int]:
    return set(range(event.offset // CHUNK, (event.offset + len(event.body) - 1) // CHUNK + 1))


def _chosen(pending: list[Event], subset: str, chance: random.Random) -> tuple[list[Event], str]:
    """Return the part of the pending writes that is there, in the order in which it came, and what that is."""
    if subset in ("none", "all"):
        return ([] if subset == "none" else pending), f"{subset} of {len(pending)}"
    if subset == "all but one":
        left_out = chance.randrange(len(pending))
        return [
            *pending[:left_out],
            *pending[left_out + 1 :],
        ], f"all of {len(pending)} but number {left_out}"
    kept = [number for number in range(len(pending)) if chance.random() < chance.choice((0.2, 0.5, 0.8))]
    chance.shuffle(kept)
    if subset == "some":
        return [pending[number] for number in kept], f"{kept} of {len(pending)}"
    found: list[Event] = []
    for number in kept or [chance.randrange(len(pending))]:
        found += _torn(pending[number], chance)
    return found, f"{kept} of {len(pending)}, torn"


def _torn(event: Event, chance: random.Random) -> Iterator[Event]:
    """Yield some sectors of a write: a beginning, an end, or any; a superblock's checksum bears no tear."""
    if event.offset < SUPERBLOCK_BYTES:
        yield event
        return
    sectors = range(-(-len(event.body) // SECTOR))
    middle, how = chance.randrange(len(sectors) + 1), chance.randrange(3)
    for number in sectors:
        if (number < middle, number >= middle, chance.random() < 0.5)[how]:
            at = number * SECTOR
            yield Event(_WRITE, event.offset + at, event.body[at : at + SECTOR])


if __name__ == "__main__":
    main()
