"""Request bodies: bounded in size, in time and in memory, on their way from the event loop to a worker thread."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator
from dataclasses import dataclass

from starlette.requests import Request
from starlette.types import Receive

from deltasync.core.errors import Cancelled, DeltasyncError, LimitExceeded
from deltasync_server.http.problems import RequestLate

QUEUE_HIGH_BYTES = 4 << 20
QUEUE_LOW_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class BodyRules:
    """What a body may weigh and how fast it must come (spec H-12, H-13)."""

    limit_bytes: int
    window_seconds: float
    window_bytes: int


async def chunks(receive: Receive, rules: BodyRules) -> AsyncIterator[bytes]:
    """Yield a body as it arrives; raises LimitExceeded, RequestLate, or Cancelled when the client goes away.

    A window runs only while the server is ready to take bytes: our own back-pressure is not the client's fault.
    """
    clock = asyncio.get_running_loop().time
    total = in_window = 0
    deadline = clock() + rules.window_seconds
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            raise RequestLate(f"less than {rules.window_bytes} bytes came in {rules.window_seconds:g} s") from None
        if message["type"] == "http.disconnect":
            raise Cancelled("the client went away before the end of the body")
        chunk: bytes = message.get("body", b"")
        total += len(chunk)
        in_window += len(chunk)
        if total > rules.limit_bytes:
            raise _too_large(rules.limit_bytes)
        ready = clock()
        if chunk:
            yield chunk
        if not message.get("more_body", False):
            return
        if in_window >= rules.window_bytes:
            in_window, deadline = 0, clock() + rules.window_seconds
        else:
            deadline += clock() - ready


def check_length(request: Request, limit_bytes: int) -> None:
    """Refuse a body that announces more than its route takes, before any of it is read (spec H-12)."""
    if int(request.headers.get("content-length", 0)) > limit_bytes:
        raise _too_large(limit_bytes)


def _too_large(limit_bytes: int) -> LimitExceeded:
    return LimitExceeded("H-12", f"the body is larger than {limit_bytes} bytes", limit_bytes=limit_bytes)


async def whole(receive: Receive, rules: BodyRules) -> bytes:
    """Return a small body in one piece."""
    return b"".join([chunk async for chunk in chunks(receive, rules)])


class BodyPump:
    """A queue of a few MiB between the event loop, which fills it, and one worker thread, which reads it.

    Each side writes only its own counter, so that a chunk costs one SimpleQueue hand-over and no lock; the loop is
    woken only when it waits for room.
    """

    def __init__(self) -> None:
        """Make an empty pump; must be called on the event loop."""
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()
        self._put_bytes = 0
        self._taken_bytes = 0
        self._is_waiting = False
        self._room = asyncio.Event()
        self._chunk = b""
        self._offset = 0
        self._end: Exception | None = None
        self._is_ended = False

    async def fill(self, receive: Receive, rules: BodyRules) -> None:
        """Move a whole body into the pump; whatever goes wrong is raised in the reader, never here."""
        try:
            async for chunk in chunks(receive, rules):
                self._queue.put(chunk)
                self._put_bytes += len(chunk)
                if self._put_bytes - self._taken_bytes > QUEUE_HIGH_BYTES:
                    await self._wait_for_room()
            self._queue.put(b"")
        except DeltasyncError as error:
            self.fail(error)

    async def _wait_for_room(self) -> None:
        self._room.clear()
        self._is_waiting = True  # set before the check: the reader either sees it, or has already made room
        if self._put_bytes - self._taken_bytes > QUEUE_LOW_BYTES:
            await self._room.wait()
        self._is_waiting = False

    def fail(self, error: Exception) -> None:
        """Make the reader raise once it has taken what was already there."""
        self._queue.put(error)

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes as soon as there are any, b'' at the end (worker thread)."""
        if self._offset == len(self._chunk) and not self._next():
            return b""
        start, self._offset = self._offset, min(self._offset + size, len(self._chunk))
        part = self._chunk[start : self._offset]  # the whole chunk is not copied
        self._taken_bytes += len(part)
        if self._is_waiting and self._put_bytes - self._taken_bytes <= QUEUE_LOW_BYTES:
            self._is_waiting = False
            self._loop.call_soon_threadsafe(self._room.set)
        return part

    def _next(self) -> bool:
        if self._end is not None:
            raise self._end
        if self._is_ended:
            return False
        item = self._queue.get()
        if isinstance(item, Exception):
            self._end = item
            raise item
        self._chunk, self._offset, self._is_ended = item, 0, not item
        return not self._is_ended
