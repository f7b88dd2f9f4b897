"""Uvicorn's protocol with the limits that it lacks, and a close that is heard (spec H-11, H-14, H-17 to H-19)."""

from __future__ import annotations

import asyncio
from typing import Any

import httptools
import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from deltasync.core.errors import DeltasyncError, HostBusy
from deltasync_server.config import ServeConfig
from deltasync_server.http.problems import MEDIA_TYPE, HttpRefusal, RequestLate, problem, status_of

TARGET_BYTES_MAX = 16 * 1024
HEAD_BYTES_MAX = 64 * 1024
HEADERS_MAX = 100
"""What a head may have (spec H-11)."""
SILENT_BYTES_MAX = 64 * 1024
"""What may come inside a body without being part of it: an endless chunk extension is not."""
LINGER_BYTES_MAX = 16 << 20
LINGER_SECONDS = 2.0


class LingeringTransport:
    """The transport as uvicorn sees it; close() hears out what the peer still sends, so that the peer hears us.

    A socket closed with unread bytes resets the connection, and the reset can overtake the answer.
    """

    def __init__(self, protocol: BoundedProtocol, transport: asyncio.Transport) -> None:
        self._protocol, self._transport = protocol, transport
        self._is_closing = False
        self.write = transport.write
        self.pause_reading = transport.pause_reading
        self.resume_reading = transport.resume_reading
        self.get_extra_info = transport.get_extra_info

    def is_closing(self) -> bool:
        """Tell whether nothing more will be written."""
        return self._is_closing or self._transport.is_closing()

    def close(self) -> None:
        """Close at once, or after the rest of a request was thrown away."""
        if not self.is_closing():
            self._is_closing = True
            if self._protocol.is_mid_request():
                self._protocol.linger()
            else:
                self._transport.close()
                self._protocol.abort_later(self._protocol.serve_config.body_seconds)  # the last bytes may go unread


class BoundedProtocol(HttpToolsProtocol):
    """One connection; `config` is set on a subclass for each server (see `protocol_for`)."""

    serve_config: ServeConfig

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the head's clock: a connection that says nothing is closed as well."""
        self._socket = transport
        self._is_discarding = False
        self._discarded_bytes = self._head_bytes = self._silent_bytes = 0
        self._is_in_head = True
        self._refusal: DeltasyncError | None = None
        self._linger_timer: asyncio.TimerHandle | None = None
        self._head_timer: asyncio.TimerHandle | None = None
        encrypted = transport.get_extra_info("ssl_object")
        self._client_certificate: bytes | None = encrypted.getpeercert(binary_form=True) if encrypted else None
        super().connection_made(LingeringTransport(self, transport))  # type: ignore[arg-type]
        self._start_head()
        if len(self.connections) > self.serve_config.connections:  # spec H-19
            self._refuse(HostBusy("the server has as many connections as it can; try again"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Let the timers go with the connection."""
        self._stop_head()
        if self._linger_timer is not None:
            self._linger_timer.cancel()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came; anything that is no plain HTTP/1.1 ends the connection (spec H-17, H-18)."""
        if self._is_discarding:
            self._discard(len(data))
            return
        self._unset_keepalive_if_required()
        if self._is_in_head and self._head_timer is None:
            self._start_head()
        self._silent_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._refuse(HttpRefusal(400, "this server changes to no other protocol"))
        except httptools.HttpParserError:
            self._refuse(self._refusal or HttpRefusal(400, "this is not a valid HTTP/1.1 request"))
        else:
            self._check_silence()

    def _check_silence(self) -> None:
        if self._is_in_head and self._silent_bytes > HEAD_BYTES_MAX:
            self._refuse(_head_too_large())
        elif not self._is_in_head and self._silent_bytes > SILENT_BYTES_MAX:
            self._refuse(HttpRefusal(400, "a chunk of the body has too long a head"))

    def on_message_begin(self) -> None:
        """Count a new head from zero, and say who asks, as far as the handshake has proved it (spec H-95)."""
        self._head_bytes = 0
        super().on_message_begin()
        self.scope["client_certificate"] = self._client_certificate  # type: ignore[typeddict-unknown-key]

    def on_url(self, url: bytes) -> None:
        """Bound the request target."""
        super().on_url(url)
        if len(self.url) > TARGET_BYTES_MAX:
            self._stop(HttpRefusal(400, f"the request line is longer than {TARGET_BYTES_MAX} bytes"))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Bound the headers in number and size."""
        super().on_header(name, value)
        self._head_bytes += len(name) + len(value)
        if len(self.headers) > HEADERS_MAX or self._head_bytes > HEAD_BYTES_MAX:
            self._stop(_head_too_large())

    def on_headers_complete(self) -> None:
        """Stop the head's clock and start the request."""
        self._stop_head()
        self._is_in_head = False
        self._silent_bytes = 0
        super().on_headers_complete()

    def on_chunk_header(self) -> None:
        """Note that the body goes on."""
        self._silent_bytes = 0

    def on_body(self, body: bytes) -> None:
        """Note that the body goes on; a piece that comes alone, as the large ones do, is passed on without a copy."""
        self._silent_bytes = 0
        cycle: Any = self.cycle  # uvicorn's body is a bytearray; all it does with one is `+=`, len() and bytes()
        if not cycle.body:
            cycle.body = b""  # what is added to it stays the object that it is
        elif isinstance(cycle.body, bytes):
            cycle.body = bytearray(cycle.body)  # of many small pieces none copies those before it
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Wait for the next head; its clock starts with its first byte."""
        self._is_in_head = True
        self._silent_bytes = 0
        super().on_message_complete()

    def is_mid_request(self) -> bool:
        """Tell whether bytes of a request may still be on their way."""
        return self._is_discarding or (self.cycle is not None and self.cycle.more_body)

    def linger(self) -> None:
        """Say that nothing more comes from us, and throw away what comes from the peer, for a while."""
        self._is_discarding = True
        if self._socket.is_closing():
            return
        if self._socket.can_write_eof():
            self._socket.write_eof()
        self.flow.resume_reading()
        self.abort_later(LINGER_SECONDS)

    def abort_later(self, seconds: float) -> None:
        """End the connection by force if it does not end by then."""
        if self._linger_timer is None:
            self._linger_timer = self.loop.call_later(seconds, self._socket.abort)

    def _discard(self, size: int) -> None:
        self._discarded_bytes += size
        if self._discarded_bytes > LINGER_BYTES_MAX:
            self._socket.abort()

    def _stop(self, refusal: DeltasyncError) -> None:
        """End parsing from inside a callback."""
        self._refusal = refusal
        raise ValueError

    def _start_head(self) -> None:
        self._head_timer = self.loop.call_later(self.serve_config.header_seconds, self._head_is_late)

    def _stop_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        self._refuse(RequestLate(f"the head of the request took more than {self.serve_config.header_seconds:g} s"))

    def _refuse(self, error: DeltasyncError) -> None:
        """Answer what cannot be parsed any further and close; an answer that is under way is finished first."""
        self._stop_head()
        self._is_discarding = True
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            self._write_refusal(error)
        elif cycle.more_body and not cycle.response_started and not self.pipeline:
            cycle.disconnected = True  # the route learns that its body broke off; it must not answer as well
            cycle.message_event.set()
            self._write_refusal(error)
        elif self.pipeline:
            self.transport.close()
        else:
            cycle.keep_alive = False

    def _write_refusal(self, error: DeltasyncError) -> None:
        status, body = status_of(error), msgspec.json.encode(problem(error))
        headers = [
            *self.server_state.default_headers,
            (b"content-type", MEDIA_TYPE.encode()),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        head = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
        self.transport.write(STATUS_LINE[status] + head + b"\r\n" + body)
        self.transport.close()


def _head_too_large() -> HttpRefusal:
    return HttpRefusal(431, f"the head has more than {HEAD_BYTES_MAX} bytes or {HEADERS_MAX} headers")


def protocol_for(config: ServeConfig) -> type[asyncio.Protocol]:
    """Return the protocol class of a server with these limits."""
    namespace: dict[str, Any] = {"serve_config": config}
    return type("Protocol", (BoundedProtocol,), namespace)
