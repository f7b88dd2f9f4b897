"""A running server: the store behind its routes, from the first byte that is accepted to the last answer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Protocol

import uvicorn

from deltasync.core import wire
from deltasync.core.errors import DeltasyncError, UsageError
from deltasync_server.access import Access
from deltasync_server.audit import Audit
from deltasync_server.config import ServeConfig, StoreConfig
from deltasync_server.http.app import build
from deltasync_server.http.context import Context
from deltasync_server.http.listen import Address, bind, resolve, unusable, url_of
from deltasync_server.http.pairing import Exchanges
from deltasync_server.http.protocol import LINGER_SECONDS, BoundedProtocol, protocol_for
from deltasync_server.http.secured import Rules, SecuredListener
from deltasync_server.http.workers import Workers
from deltasync_server.jobs.desk import Jobs
from deltasync_server.opening import open_store

if TYPE_CHECKING:
    from deltasync_server.tls import Tls

log = logging.getLogger(__name__)

STOP_SECONDS = 3
"""How long requests that are under way may go on after a signal; then bodies break off (spec H-54)."""
CANCEL_SECONDS = STOP_SECONDS + 2
"""When whatever else is under way is cancelled."""
API_VERSION = "1"
"""What every answer says (spec H-2)."""


class Ready(Protocol):
    """Is told where requests are taken, and how they are protected."""

    def __call__(self, url: str, tls: Tls | None, *, is_insecure: bool) -> None:
        """Say so."""


class _Server(uvicorn.Server):
    """uvicorn's server, which says when it is ready and ends its long-polls before it waits for requests."""

    def __init__(self, config: uvicorn.Config, context: Context, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.servers: list[asyncio.base_events.Server] = []
        self._context, self._ready = context, ready
        self._busy_at, self._seen_requests = time.monotonic(), 0
        self._renews_at = time.monotonic() + context.config.renewal_seconds
        self._renewing: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen as uvicorn does, but with bounds for handshakes and farewells (spec H-94)."""
        loop, config, tls = asyncio.get_running_loop(), self.config, self._context.tls
        kind: type[BoundedProtocol] = config.http_protocol_class  # type: ignore[assignment]

        def connection() -> asyncio.Protocol:
            return kind(config=config, server_state=self.server_state, app_state={})

        def has_room(handshakes: int) -> bool:
            return len(self.server_state.connections) + handshakes < kind.serve_config.connections

        rules = Rules(self._context.config.handshake_seconds, LINGER_SECONDS, has_room)
        for each in sockets or ():
            if tls is not None:
                each.listen(config.backlog)
                self.servers.append(SecuredListener(each, tls.context, connection, rules))  # type: ignore[arg-type]
            else:
                self.servers.append(await loop.create_server(connection, sock=each, backlog=config.backlog))
        self.started = True
        self._ready()

    async def on_tick(self, counter: int) -> bool:
        state, idle_seconds = self.server_state, self._context.config.idle_exit or 0
        is_busy = bool(state.connections) or self._context.jobs.is_busy
        if is_busy or state.total_requests != self._seen_requests:
            self._busy_at, self._seen_requests = time.monotonic(), state.total_requests
        elif 0 < idle_seconds <= time.monotonic() - self._busy_at:  # spec H-59
            self.should_exit = True
        if self._context.tls is not None and time.monotonic() >= self._renews_at:
            self._renews_at = time.monotonic() + self._context.config.renewal_seconds
            self._renewing = asyncio.create_task(_renew(self._context.tls))
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._context.workers.stop_waiting()
        self._context.jobs.begin_stop()
        asyncio.get_running_loop().call_later(STOP_SECONDS, self._stop_receiving)
        await super().shutdown(sockets)

    def _stop_receiving(self) -> None:
        self._context.workers.stop_receiving()
        self._context.store.stop_awaiting_pieces()

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Stop as a handler of signals, also of one that comes before uvicorn listens to them."""
        self.should_exit = True


async def _renew(tls: Tls) -> None:
    """Have a certificate that is soon over followed by another one, in time (spec H-92)."""
    try:
        certificate = await asyncio.to_thread(tls.renewed, datetime.now(UTC))
        if certificate is not None:
            tls.show(certificate)  # here, where handshakes begin: none sees half of it
            log.warning("the server's certificate was renewed; its SHA-256 is %s now", tls.certificate_sha256)
    except (DeltasyncError, OSError) as error:
        log.error("the server's certificate could not be renewed: %s", error)


def run(store_config: StoreConfig, config: ServeConfig, ready: Ready) -> None:
    """Serve a store until SIGTERM or SIGINT; `ready` is called with the address once requests are taken (H-50)."""
    address = resolve(config.listen)
    is_encrypted = _is_encrypted(config, address)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)  # until requests are taken we may end anywhere: recovery begins anew
    with (
        contextlib.closing(bind(address)) as listener,
        open_store(store_config) as store,
        Access(store_config.data) as access,
        Audit(store_config.data) as audit,
        Jobs(store, socket=Path(address.where) if isinstance(address.where, str) else None) as jobs,
    ):
        store.start()
        jobs.start()
        tls = _tls(store_config, config) if is_encrypted else None
        context = Context(
            store,
            access,
            audit,
            Workers(uploads=config.uploads, waits=config.waits),
            store_config,
            config,
            needs_token=_needs_token(config, address),
            is_local=address.is_private,
            tls=tls,
            exchanges=Exchanges(),
            jobs=jobs,
        )
        url, is_insecure = url_of(listener, is_encrypted=is_encrypted), not (is_encrypted or address.is_private)
        _serve(
            context,
            listener,
            lambda: ready(url, tls, is_insecure=is_insecure),
            seed_routes=_has_seed_routes(config, address),
        )


def _is_encrypted(config: ServeConfig, address: Address) -> bool:
    """Tell whether TLS is used; raise UsageError where it must be and may not (spec H-90)."""
    if (config.tls_cert is None) != (config.tls_key is None):
        raise UsageError("--tls-cert and --tls-key go together")
    is_given = config.tls_cert is not None
    if address.family == socket.AF_UNIX:
        if config.tls:
            raise UsageError("a unix socket has no use for TLS; leave --tls out")
        return False
    if is_given and config.tls is False:
        raise UsageError("--no-tls and --tls-cert contradict each other")
    default = is_given or not (address.is_private or config.insecure)
    is_encrypted = default if config.tls is None else config.tls
    if not (is_encrypted or address.is_private or config.insecure):
        raise UsageError(
            f"{config.listen} can be reached by other machines: leave --no-tls out, listen on 127.0.0.1, or say "
            "--insecure if everybody on the way may read and change what is sent"
        )
    return is_encrypted


def _tls(store_config: StoreConfig, config: ServeConfig) -> Tls:
    from deltasync_server import tls

    if config.tls_cert is not None and config.tls_key is not None:
        return tls.given(config.tls_cert, config.tls_key)
    return tls.own(store_config.data, config.tls_name, datetime.now(UTC))


def _needs_token(config: ServeConfig, address: Address) -> bool:
    """Tell whether a request must show a token; raise UsageError where others would be let in unasked (spec H-100)."""
    needs_token = not address.is_private if config.require_token is None else config.require_token
    if not (needs_token or address.is_private or config.insecure):
        raise UsageError(
            f"{config.listen} can be reached by other machines: leave --no-require-token out, or say --insecure if "
            "everybody there may do everything"
        )
    return needs_token


def _open_files_max() -> int:
    """Raise the number of files that this process may open as far as it goes, and return it (spec H-19)."""
    try:
        import resource
    except ImportError:  # not on this system: its own limit is far off
        return 1 << 20
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return soft if soft != resource.RLIM_INFINITY else 1 << 20


def _has_seed_routes(config: ServeConfig, address: Address) -> bool:
    return address.is_private if config.seed_routes is None else config.seed_routes


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


def _serve(context: Context, listener: socket.socket, ready: Callable[[], None], *, seed_routes: bool) -> None:
    config, tls = context.config, context.tls
    settings = uvicorn.Config(
        build(context, seed_routes=seed_routes),
        http=protocol_for(replace(config, connections=min(config.connections, _open_files_max() // 2))),
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=config.access_log,
        proxy_headers=False,
        server_header=False,
        headers=[(wire.SERVER_HEADER, API_VERSION)],
        timeout_keep_alive=config.keep_alive_seconds,
        timeout_graceful_shutdown=CANCEL_SECONDS,
        ssl_context_factory=(lambda *_: tls.context) if tls is not None else None,
    )
    where = listener.getsockname()[:2] if listener.family != socket.AF_UNIX else str(listener.getsockname())
    server = _Server(settings, context, ready)
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them again at its end: they must not kill then
        signal.signal(number, server.stop)
    try:
        server.run(sockets=[listener])
    except OSError as error:
        raise unusable(where, error) from error
    finally:
        context.workers.close()
