"""A job's log as server-sent events: what is there, then what comes, until the job is over (spec J-47)."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from deltasync.core.errors import NotFound, Unauthorized
from deltasync.core.jobs import Job, State
from deltasync_server.access import Leave
from deltasync_server.http.context import Context
from deltasync_server.http.workers import until_gone
from deltasync_server.jobs.log import Event, Kind
from deltasync_server.tenants import Tenant

MEDIA_TYPE = "text/event-stream"
LOOK_SECONDS = 5.0
"""How often a job is looked at that nothing is heard of; a comment then shows whether the reader is still there."""
PIECE_BYTES = 256 << 10
_log = logging.getLogger(__name__)


class _News:
    """Wakes a stream when a job has something new; many rings before it looks are one."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()
        self._is_rung = False

    def ring(self) -> None:
        """Wake the stream (any thread)."""
        if not self._is_rung:
            self._is_rung = True
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody reads this any more
                self._loop.call_soon_threadsafe(self._event.set)

    def clear(self) -> None:
        """Begin to look: what is rung from now on is new."""
        self._event.clear()
        self._is_rung = False

    async def wait(self, leaving: asyncio.Task[None]) -> None:
        """Return when there is something new, after a while, or when the reader is gone."""
        waiting = asyncio.create_task(self._event.wait())
        await asyncio.wait({waiting, leaving}, timeout=LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()


class LogEvents(Response):
    """Streams the events of one job; a reader that takes nothing, or is gone, ends it."""

    media_type = MEDIA_TYPE

    def __init__(self, here: Context, leave: Leave, tenant: Tenant, job_id: str, place: int) -> None:
        super().__init__(None, 200, {"Cache-Control": "no-store"})
        del self.headers["content-length"]
        self._here, self._leave, self._tenant, self._job_id = here, leave, tenant, job_id
        self._reader = here.jobs.reader(job_id, place)
        self._told: object = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the head and the events."""
        leaving, news = asyncio.create_task(until_gone(receive)), _News()
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            with self._here.jobs.bells.listening(self._job_id, news.ring):
                await self._stream(news, leaving, send)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            _log.warning("a reader of %s took nothing for %g s", scope["path"], self._here.config.body_seconds)
        except (Unauthorized, NotFound) as error:
            _log.warning("a reader of %s was cut off: %s", scope["path"], error.sentence)
        finally:
            leaving.cancel()
            self._reader.close()

    async def _stream(self, news: _News, leaving: asyncio.Task[None], send: Send) -> None:
        while not leaving.done():
            news.clear()
            job, events = await self._here.workers.quick(self._look)
            is_last = job.state.is_over and not events
            body = b"".join(map(_framed, events)) + self._state(job, is_last=is_last)
            async with asyncio.timeout(self._here.config.body_seconds):
                await send({"type": "http.response.body", "body": body or b":\n\n", "more_body": True})
            if is_last or (self._here.jobs.is_stopping and job.state is State.QUEUED):  # nothing more comes of it here
                return
            if not events:
                await news.wait(leaving)

    def _look(self) -> tuple[Job, list[Event]]:
        self._leave.require()
        job = self._here.jobs.job(self._tenant, self._job_id)  # first: what it wrote before its end is read then
        return job, self._reader.read(PIECE_BYTES)

    def _state(self, job: Job, *, is_last: bool) -> bytes:
        """Return the event of a state that was not told yet; that of a job that is over comes last."""
        said = (job.state, job.ahead)
        if said == self._told or (job.state.is_over and not is_last):
            return b""
        self._told = said
        return _event("state", self._reader.place, msgspec.json.encode(job))


def _framed(event: Event) -> bytes:
    if event.kind is Kind.GAP:
        return _event(event.kind, event.end, b"%d" % event.left_out_bytes)
    return _event(event.kind, event.end, base64.b64encode(event.content))


def _event(name: str, place: int, content: bytes) -> bytes:
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (place, name.encode(), content)
