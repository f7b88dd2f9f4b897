"""What every request must be before a route sees it, and what every answer is when a route fails."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import unquote_to_bytes

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deltasync.core.names import shown
from deltasync_server.access import Caller
from deltasync_server.audit import Audit
from deltasync_server.http.auth import Door, source_of
from deltasync_server.http.problems import (
    HttpRefusal,
    TooManyRequests,
    known,
    no_such_route,
    refusal,
    status_of,
    told,
)
from deltasync_server.tenants import Tenant, tenant_text

METHODS = ("GET", "POST", "PUT", "DELETE")
_log = logging.getLogger(__name__)


class Guard:
    """The outermost application: checks the request, counts it, and turns every exception into a problem."""

    def __init__(self, app: ASGIApp, door: Door, audit: Audit, *, tenant_requests: int) -> None:
        """tenant_requests: how many of one tenant are answered at once."""
        self._app, self._door, self._audit = app, door, audit
        self._most, self._under_way = tenant_requests, Counter[Tenant]()
        self.answers: Counter[tuple[str, int]] = Counter()
        """Answers given so far, by method and status (event loop only)."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        exchange = _Exchange(scope, receive, send)
        try:
            check(scope)
            caller = scope.setdefault("state", {})["caller"] = self._door.caller(scope)
            with self._turn(caller.tenant):
                await self._app(scope, exchange.receive, exchange.send)
        except asyncio.CancelledError:
            _log.warning("%s %s was cut off by the stop", scope["method"], shown(scope["path"]))
        except Exception as error:  # noqa: BLE001 - the one place that may; _failed reports it with its traceback
            await _failed(scope, exchange, error)
        self._note(scope, exchange.status)
        self.answers[scope["method"] if scope["method"] in METHODS else "other", exchange.status] += 1

    @contextmanager
    def _turn(self, tenant: Tenant) -> Iterator[None]:
        """Count a request as under way; raises TooManyRequests where its tenant has enough of them (spec H-109)."""
        if self._under_way[tenant] >= self._most:
            raise TooManyRequests(self._most)
        self._under_way[tenant] += 1
        try:
            yield
        finally:
            self._under_way[tenant] -= 1
            if not self._under_way[tenant]:
                del self._under_way[tenant]

    def _note(self, scope: Scope, status: int) -> None:
        """Write down what changes something, or is refused for who asks (spec ST-115); pieces go with their upload."""
        method = scope["method"]
        is_refused = status in (401, 403, 429)
        if not is_refused and (method == "GET" or (method == "PUT" and status < 300)):
            return
        caller: Caller | None = scope.get("state", {}).get("caller")
        self._audit.note(
            "request",
            source=source_of(scope),
            token=caller.token if caller else None,
            tenant=tenant_text(caller.tenant) if caller else None,
            method=method,
            path=scope["path"],
            status=status,
        )


class _Exchange:
    """One request and its answer: knows whether the body was read to its end and whether an answer began."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        self._receive, self._send = receive, send
        self._is_read = "transfer-encoding" not in headers and headers.get("content-length", "0") == "0"
        self.status = 0

    async def receive(self) -> Message:
        message = await self._receive()
        if not message.get("more_body", False):
            self._is_read = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if not self._is_read:  # the rest of the body is nobody's: it must not be taken for the next request
                message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
        await self._send(message)


def check(scope: Scope) -> None:
    """Raise the refusal of a request that no route may see (spec H-3, H-4, H-10, H-15)."""
    headers = Headers(scope=scope)
    if scope["method"] not in METHODS:
        raise HttpRefusal(
            405, f"{scope['method']} is not used here", {"Allow": ", ".join(METHODS), "Connection": "close"}
        )
    if not is_plain(scope["raw_path"]):
        raise no_such_route(shown(scope["path"]))
    if scope["http_version"] != "1.0" and len(headers.getlist("host")) != 1:
        raise HttpRefusal(400, "a request has exactly one Host header")
    if headers.get("content-encoding", "identity") != "identity":
        raise HttpRefusal(415, "no Content-Encoding is taken; a bundle is compressed inside")
    if headers.get("transfer-encoding", "chunked").strip().lower() != "chunked":
        raise HttpRefusal(400, "no Transfer-Encoding but chunked is taken")
    if scope["method"] != "GET":
        _check_change(headers, scope["method"])


def _check_change(headers: Headers, method: str) -> None:
    if method != "DELETE" and "content-length" not in headers and "transfer-encoding" not in headers:
        raise HttpRefusal(411, f"a {method} says its Content-Length or is chunked")
    if "origin" in headers:
        raise HttpRefusal(403, "no page in a browser may change anything here")  # spec H-15


def is_plain(raw_path: bytes) -> bool:
    """Tell whether a path says one thing only: no empty, '.' or '..' part, no hidden '/', nothing but UTF-8 (H-3)."""
    for part in raw_path.split(b"/")[1:]:
        text = unquote_to_bytes(part)
        if text in (b"", b".", b"..") or b"/" in text or b"\\" in text or min(text) < 0x20:
            return False
        try:
            text.decode()
        except UnicodeDecodeError:
            return False
    return True


async def _failed(scope: Scope, exchange: _Exchange, error: Exception) -> None:
    """Answer a failure once; an answer that broke off half-way stays broken, so that nobody takes it for whole."""
    report(scope, error)
    if not exchange.status:
        await refusal(told(error, scope))(scope, exchange.receive, exchange.send)


def report(scope: Scope, error: Exception) -> None:
    """Log what the operator must know: bugs and damage of our own store, with the traceback."""
    ours = known(error)
    if ours is None or status_of(ours) == 500:
        _log.error("%s %s failed", scope["method"], shown(scope["path"]), exc_info=error)
