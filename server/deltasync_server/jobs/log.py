"""What a command wrote on its two streams, in the order in which it came; of too much the middle goes (spec J-47).

A log is a folder of segments, each named by the place of its first byte. A place counts the bytes of both streams.
A segment is frames: the stream and the length, in 5 bytes, then the bytes.
"""

from __future__ import annotations

import contextlib
import enum
import os
import struct
import threading
from pathlib import Path
from typing import NamedTuple

from deltasync.disk import FILE_FLAGS, Folder, write_all

_HEAD = struct.Struct(">BI")
_DIGITS = 20
SEGMENTS = 16
"""How many a log has at most; the first half of them stays, and of the others the last."""
FRAME_BYTES_MAX = 1 << 20


class Kind(enum.StrEnum):
    """What an event of a log is."""

    OUT = "stdout"
    ERR = "stderr"
    GAP = "gap"


_NUMBERS = {Kind.OUT: 1, Kind.ERR: 2}
_KINDS = {number: kind for kind, number in _NUMBERS.items()}


class Event(NamedTuple):
    """Bytes of one stream, or how many are left out; `end` is the place behind it."""

    kind: Kind
    content: bytes
    end: int
    left_out_bytes: int = 0


class Log:
    """The log of a command that runs: one writer."""

    def __init__(self, path: Path, limit_bytes: int) -> None:
        """Make the folder of a log. limit_bytes: what it may take on the disk."""
        path.mkdir(0o700, parents=True)
        self.name = path.name
        self._folder = Folder.open(path)
        self._segment_bytes = max(_HEAD.size + 1, limit_bytes // SEGMENTS)
        self._starts: list[int] = []
        self._descriptor = -1
        self._written_bytes = 0
        self._lock = threading.Lock()
        self.end = 0
        """The place behind all that came, whether it is there or was left out."""

    def append(self, kind: Kind, content: bytes) -> None:
        """Add what came on a stream. What cannot be written is left out: the command is not to wait for a disk."""
        with self._lock:
            view = memoryview(content)
            while view:
                piece = view[: max(1, min(FRAME_BYTES_MAX, self._segment_bytes - _HEAD.size))]
                try:
                    self._write(kind, piece)
                except OSError:
                    self._end_segment()  # the next one begins behind what is lost: a reader sees the gap
                self.end += len(piece)
                view = view[len(piece) :]

    def _write(self, kind: Kind, piece: memoryview) -> None:
        frame = _HEAD.pack(_NUMBERS[kind], len(piece)) + piece
        if self._descriptor >= 0 and self._written_bytes + len(frame) > self._segment_bytes:
            self._end_segment()
        if self._descriptor < 0:
            self._begin_segment()
        write_all(self._descriptor, frame)
        self._written_bytes += len(frame)

    def _begin_segment(self) -> None:
        if len(self._starts) == SEGMENTS:  # one more would be too much: the oldest behind the first half goes
            os.unlink(_name(self._starts[SEGMENTS // 2]), dir_fd=self._folder.fd)
            del self._starts[SEGMENTS // 2]
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        self._descriptor = os.open(_name(self.end), flags, 0o600, dir_fd=self._folder.fd)
        self._written_bytes = 0
        if self.end not in self._starts:
            self._starts.append(self.end)

    def _end_segment(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def close(self) -> None:
        """End the log."""
        with self._lock:
            self._end_segment()
            self._folder.close()


class LogReader:
    """Reads a log from a place on, also while it is written."""

    def __init__(self, path: Path, place: int) -> None:
        """Begin behind a place; a log that is not there is empty."""
        self._path = path
        self.place = place
        self._start = -1
        """The segment that is open."""
        self._descriptor = -1
        self._at = 0
        """Where in it the next frame is, and which place that is."""
        self._at_place = 0

    def read(self, size_bytes: int) -> list[Event]:
        """Return what is there behind the place, some bytes of it; nothing where that is all for now."""
        events: list[Event] = []
        found_bytes = 0
        while found_bytes < size_bytes and (event := self._next()) is not None:
            events.append(event)
            found_bytes += len(event.content)
            self.place = event.end
        return events

    def _next(self) -> Event | None:
        if self._descriptor < 0 and not self._open_at(self._segments()):
            return None
        if self._start > self.place:  # the beginning could not be written
            return Event(Kind.GAP, b"", self._start, self._start - self.place)
        while True:
            frame = self._frame()
            if frame is None:
                starts = self._segments()
                if not any(start > self._start for start in starts):
                    return None
                if (frame := self._frame()) is None:  # what came between the two looks is read; then this one is over
                    self.close()
                    return self._crossed(starts)
            begin = self._at_place - len(frame.content)
            if frame.end > self.place:
                return Event(frame.kind, frame.content[max(0, self.place - begin) :], frame.end)

    def _crossed(self, starts: list[int]) -> Event | None:
        """Go on in the next segment; what is missing before it is a gap."""
        following = [start for start in starts if start > self._start]
        self._start = -1
        if following and following[0] > self.place:
            return Event(Kind.GAP, b"", following[0], following[0] - self.place)
        return self._next()

    def _open_at(self, starts: list[int]) -> bool:
        """Open the segment that the place is in, or the first one behind it."""
        before = [start for start in starts if start <= self.place]
        start = before[-1] if before else (starts[0] if starts else None)
        if start is None:
            return False
        try:
            self._descriptor = os.open(self._path / _name(start), FILE_FLAGS)
        except FileNotFoundError:  # it has just gone: the next look finds another one
            return False
        self._start, self._at, self._at_place = start, 0, start
        return True

    def _frame(self) -> Event | None:
        """Return the next whole frame of the open segment."""
        head = os.pread(self._descriptor, _HEAD.size, self._at)
        if len(head) < _HEAD.size:
            return None
        number, size = _HEAD.unpack(head)
        if number not in _KINDS or size > FRAME_BYTES_MAX:
            return None
        content = os.pread(self._descriptor, size, self._at + _HEAD.size)
        if len(content) < size:
            return None
        self._at += _HEAD.size + size
        self._at_place += size
        return Event(_KINDS[number], content, self._at_place)

    def _segments(self) -> list[int]:
        return segments(self._path)

    def close(self) -> None:
        """Let the segment go."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def segments(path: Path) -> list[int]:
    """Return where the segments of a log begin, in order."""
    try:
        return sorted(int(each.name) for each in path.iterdir() if each.name.isdigit())
    except FileNotFoundError:
        return []


def end_of(path: Path) -> int:
    """Return the place behind all that is there of a log."""
    starts = segments(path)
    with contextlib.closing(LogReader(path, starts[-1] if starts else 0)) as reader:
        while reader.read(FRAME_BYTES_MAX):
            pass
        return reader.place


def _name(start: int) -> str:
    return f"{start:0{_DIGITS}d}"
