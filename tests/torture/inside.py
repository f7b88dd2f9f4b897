"""The whole server without a socket: requests go to its application in this process, from any thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from serving import Answer

from deltasync_server.access import Access
from deltasync_server.audit import Audit
from deltasync_server.config import ServeConfig, StoreConfig
from deltasync_server.http.app import build
from deltasync_server.http.context import Context
from deltasync_server.http.pairing import Exchanges
from deltasync_server.http.workers import Workers
from deltasync_server.jobs.desk import Jobs
from deltasync_server.receive import Store

ASKED_SECONDS = 20.0


@dataclass
class Inside:
    """A server; every route is behind its guard."""

    store: Store
    access: Access
    app: Any
    loop: asyncio.AbstractEventLoop

    def ask(
        self,
        method: str,
        target: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        source: str = "127.0.0.1",
    ) -> Answer:
        """Make one request. source: where it comes from."""
        asked = self._ask(method, target, body, dict(headers or {}), source)
        return asyncio.run_coroutine_threadsafe(asked, self.loop).result(ASKED_SECONDS)

    async def _ask(self, method: str, target: str, body: bytes | None, headers: dict[str, str], source: str) -> Answer:
        path, _, query = target.encode().partition(b"?")
        named = {"host": "localhost", **{name.lower(): value for name, value in headers.items()}}
        if body is not None or method in ("POST", "PUT"):
            named.setdefault("content-length", str(len(body or b"")))
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": unquote_to_bytes(path).decode(errors="replace"),
            "raw_path": path,
            "query_string": query,
            "headers": [(name.encode(), value.encode("latin-1", "replace")) for name, value in named.items()],
            "client": (source, 1),
            "server": ("127.0.0.1", 2),
            "state": {},
        }
        messages = [{"type": "http.request", "body": body or b"", "more_body": False}]
        found: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            found.append(message)

        await self.app(scope, receive, send)
        assert found, "there is no answer"
        said = {"deltasync-server": "1", "date": "Sat, 21 Nov 2026 00:00:00 GMT"}  # as the listener says of all
        said |= {name.decode().lower(): value.decode() for name, value in found[0]["headers"]}
        return Answer(found[0]["status"], said, b"".join(each.get("body", b"") for each in found[1:]))


@contextmanager
def inside(data: Path, *, needs_token: bool = False, **settings: Any) -> Iterator[Inside]:
    """Lend a server with its own data and no background work."""
    store_config, config = StoreConfig(data, gap_seconds=0.0, **settings), ServeConfig()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    with Store(store_config) as store, Access(data) as access, Audit(data) as audit, Jobs(store) as jobs:
        store.recover()
        store.trees.start()

        async def made() -> Any:
            workers = Workers(uploads=config.uploads, waits=config.waits)
            context = Context(
                store,
                access,
                audit,
                workers,
                store_config,
                config,
                needs_token=needs_token,
                is_local=True,
                tls=None,
                exchanges=Exchanges(),
                jobs=jobs,
            )
            return build(context, seed_routes=True)

        app = asyncio.run_coroutine_threadsafe(made(), loop).result(ASKED_SECONDS)
        try:
            yield Inside(store, access, app, loop)
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(ASKED_SECONDS)
            loop.close()
