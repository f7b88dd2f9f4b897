"""The bytes of an HTTP answer as they come: with an end, and not drop by drop (spec H-140, H-141)."""

from __future__ import annotations

import contextlib
import io
import socket
import threading
import time
from http.client import HTTPResponse
from typing import Any, Self

HEAD_BYTES_MAX = 256 << 10
"""What may come before a body; what frames one may be as much again for every piece of it that is read."""
FRAMING = 8
"""So many bytes may come for each of a body: in chunks of a single byte it takes six."""
WINDOW_BYTES = 4 << 10
"""What comes at least in the time that a server may be silent, unless the answer ends."""


class Unbounded(OSError):
    """An answer that does not end, or whose frame is none."""


class Deadline:
    """Ends a connection, for whoever waits for its bytes, unless it is cancelled in time."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self._twin = connection.dup()  # TLS takes the descriptor of the other one away
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True
        self._timer.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def cancel(self) -> None:
        """Let the connection be."""
        self._timer.cancel()
        self._twin.close()

    def _end(self) -> None:
        with contextlib.suppress(OSError):
            self._twin.shutdown(socket.SHUT_RDWR)


class _Line(io.RawIOBase):
    """What comes from a connection for one answer."""

    def __init__(self, raw: io.RawIOBase, seconds: float | None) -> None:
        """seconds: how long each window is; None waits as long as it takes."""
        self._raw, self._seconds = raw, seconds
        self._allowed_bytes = HEAD_BYTES_MAX
        self._waited_seconds, self._window_bytes, self._has_begun = 0.0, 0, False
        self.has_ended = False

    def allow(self, size_bytes: int) -> None:
        """Let so much of a body come, with its framing."""
        self._allowed_bytes = FRAMING * size_bytes + HEAD_BYTES_MAX

    def take_time(self) -> None:
        """Let the body come as slowly as it does: what it tells happens while it is read."""
        self._seconds = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        began = time.monotonic()
        count = self._raw.readinto(buffer) or 0
        self.has_ended = not count
        self._allowed_bytes -= count
        if self._allowed_bytes < 0:
            raise Unbounded("the answer has no end")
        if self._has_begun and self._seconds is not None:
            self._note(count, time.monotonic() - began, self._seconds)
        self._has_begun = True  # what a server does before its first byte is not slowness of the line
        return count

    def _note(self, count: int, waited_seconds: float, seconds: float) -> None:
        self._waited_seconds += waited_seconds
        self._window_bytes += count
        if self._waited_seconds < seconds:
            return
        if count and self._window_bytes < WINDOW_BYTES:
            raise TimeoutError(f"less than {WINDOW_BYTES} bytes came in {seconds:g} s")
        self._waited_seconds, self._window_bytes = 0.0, 0

    def close(self) -> None:
        self._raw.close()
        super().close()


class BoundedAnswer(HTTPResponse):
    """An answer that is read through such a line."""

    def __init__(self, sock: Any, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        reader: Any = self.fp
        self._line = _Line(reader.detach(), sock.gettimeout())
        self.fp = io.BufferedReader(self._line)

    def begin(self) -> None:
        """Read the head, all of it."""
        super().begin()
        if self._line.has_ended:  # http.client takes the end of a connection for that of the head
            raise ConnectionResetError("the answer broke off")

    def read(self, amt: int | None = None) -> bytes:
        """Read at most so much of the body; without a number no more than a head has."""
        self._line.allow(amt or 0)
        try:
            return super().read(amt)
        except ValueError as error:  # a chunk of less than nothing
            raise Unbounded(f"the answer is no HTTP: {error}") from error

    def read1(self, n: int = -1) -> bytes:
        """Read what has come of the body, at most so much; it may be without an end, and take its time."""
        self._line.allow(max(n, 0))
        self._line.take_time()
        try:
            return super().read1(n)
        except ValueError as error:
            raise Unbounded(f"the answer is no HTTP: {error}") from error
