"""The threads that blocking work runs on, kept apart so that no kind of work can starve another (spec H-16)."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeVar

from starlette.types import Receive

from deltasync.core.errors import Cancelled, HostBusy
from deltasync_server.http.body import BodyPump, BodyRules
from deltasync_server.http.problems import HostStopping
from deltasync_server.tenants import Tenant

Answer = TypeVar("Answer")

QUICK_THREADS = 8
PROBE_THREADS = 2
WAIT_SLICE_SECONDS = 0.5
QUEUE_SECONDS = 30.0
SLOTS_FOR_OTHERS = 2
"""Of the uploads at once, so many are never all one tenant's."""


class Workers:
    """Four pools: quick questions, health probes, uploads, long-polls."""

    def __init__(self, *, uploads: int, waits: int) -> None:
        """Prepare the pools; a thread starts when it is first needed."""
        self._quick = ThreadPoolExecutor(QUICK_THREADS, "quick")
        self._probe = ThreadPoolExecutor(PROBE_THREADS, "probe")
        self._upload = ThreadPoolExecutor(uploads, "upload")
        self._wait = ThreadPoolExecutor(waits, "wait")
        self._upload_slots = asyncio.Semaphore(uploads)
        self._tenant_slots: defaultdict[Tenant, asyncio.Semaphore] = defaultdict(
            partial(asyncio.Semaphore, max(1, uploads - SLOTS_FOR_OTHERS))
        )
        self._free_waits = waits
        self._pumps: set[BodyPump] = set()
        self._stopping = threading.Event()

    async def quick(self, function: Callable[[], Answer]) -> Answer:
        """Run a short question to the store."""
        return await asyncio.get_running_loop().run_in_executor(self._quick, function)

    async def probe(self, function: Callable[[], Answer]) -> Answer:
        """Run a health question, which must be answered when everything else is busy."""
        return await asyncio.get_running_loop().run_in_executor(self._probe, function)

    async def with_body(
        self, receive: Receive, rules: BodyRules, work: Callable[[BodyPump], Answer], *, tenant: Tenant
    ) -> Answer:
        """Run work on an upload thread while a tenant's body arrives; work reads it from the pump.

        The work always ends: when the client goes away, is late, or the server stops, its next read raises.
        """
        async with self._upload_slot(tenant):
            pump = BodyPump()
            self._pumps.add(pump)
            filling = asyncio.create_task(pump.fill(receive, rules))
            try:
                return await asyncio.get_running_loop().run_in_executor(self._upload, work, pump)
            finally:
                filling.cancel()
                self._pumps.discard(pump)
                pump.fail(Cancelled("the request ended before its body"))

    @asynccontextmanager
    async def _upload_slot(self, tenant: Tenant) -> AsyncIterator[None]:
        """Hold a thread for an upload; some stay free for whoever else comes (spec H-107)."""
        async with contextlib.AsyncExitStack() as held:
            try:
                async with asyncio.timeout(QUEUE_SECONDS):
                    for slots in (self._tenant_slots[tenant], self._upload_slots):
                        await held.enter_async_context(slots)
            except TimeoutError:
                raise HostBusy("the server is receiving as many bundles as it can; try again") from None
            yield

    async def poll(self, receive: Receive, ask: Callable[[float], Answer | None], seconds: float) -> Answer | None:
        """Ask until there is an answer or the time is up; ask(s) blocks up to s seconds and gives None for not yet.

        Answers None at once when every waiting thread is taken: a long-poll may always be answered early.
        """
        if not self._free_waits or seconds <= 0:
            return None
        self._free_waits -= 1
        gone = threading.Event()
        leaving = asyncio.create_task(until_gone(receive))
        leaving.add_done_callback(lambda _: gone.set())
        try:
            return await asyncio.get_running_loop().run_in_executor(self._wait, self._ask, ask, seconds, gone)
        finally:
            leaving.cancel()
            self._free_waits += 1

    def _ask(self, ask: Callable[[float], Answer | None], seconds: float, gone: threading.Event) -> Answer | None:
        end = time.monotonic() + seconds
        while not gone.is_set() and not self._stopping.is_set():
            left = end - time.monotonic()
            found = ask(max(0.0, min(left, WAIT_SLICE_SECONDS)))
            if found is not None or left <= 0:
                return found
        return None

    def stop_waiting(self) -> None:
        """End every long-poll within a slice; called when the server begins to stop."""
        self._stopping.set()

    def stop_receiving(self) -> None:
        """Break off every body that is still arriving: its sender is told to come again (event loop)."""
        for pump in self._pumps:
            pump.fail(HostStopping("the server is being stopped; send the bundle again when it is back"))

    def close(self) -> None:
        """Let the threads end; what is still running ends by itself, because its body does."""
        self._stopping.set()
        for pool in (self._quick, self._probe, self._upload, self._wait):
            pool.shutdown(wait=True, cancel_futures=True)


async def until_gone(receive: Receive) -> None:
    """Return when the client is no longer there; the body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
