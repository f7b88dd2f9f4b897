"""Connections that become secure: a handshake has an end, and counts as an open connection does (spec H-94)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass

log = logging.getLogger(__name__)

ACCEPT_SECONDS = 0.5
"""How long nothing is accepted when the system has no room for another connection."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What a handshake may take."""

    seconds: float
    farewell_seconds: float
    """How long the end of a connection may take."""
    has_room: Callable[[int], bool]
    """Tells whether there may be another connection beside so many whose handshake is under way."""


class SecuredListener:
    """Accepts connections and makes each secure before its protocol hears of it; closed as an asyncio server is."""

    def __init__(
        self, listener: socket.socket, context: ssl.SSLContext, make: Callable[[], asyncio.Protocol], rules: Rules
    ) -> None:
        """Begin to accept. listener: bound, and listening. make: gives the protocol of a connection."""
        self._listener, self._context, self._make, self._rules = listener, context, make, rules
        self._loop = asyncio.get_running_loop()
        self._handshakes: set[asyncio.Task[None]] = set()
        listener.setblocking(False)
        self._accepting = self._loop.create_task(self._accept())

    def close(self) -> None:
        """Accept nothing more, and end what is not secure yet."""
        self._accepting.cancel()
        for each in self._handshakes:
            each.cancel()

    async def wait_closed(self) -> None:
        """Wait until that is so."""
        await asyncio.gather(self._accepting, *self._handshakes, return_exceptions=True)

    async def _accept(self) -> None:
        while True:
            try:
                connection, _ = await self._loop.sock_accept(self._listener)
            except ConnectionError:
                continue  # it went away before it was accepted
            except OSError as error:
                log.warning("no connection can be accepted: %s", error)
                await asyncio.sleep(ACCEPT_SECONDS)
                continue
            if not self._rules.has_room(len(self._handshakes)):
                connection.close()  # what would be said could be read only after a handshake
                continue
            task = self._loop.create_task(self._secure(connection))
            self._handshakes.add(task)
            task.add_done_callback(self._handshakes.discard)

    async def _secure(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError):  # an SSLError is the former; nobody waits for either
            await self._loop.connect_accepted_socket(
                self._make,
                connection,
                ssl=self._context,
                ssl_handshake_timeout=self._rules.seconds,
                ssl_shutdown_timeout=self._rules.farewell_seconds,
            )
