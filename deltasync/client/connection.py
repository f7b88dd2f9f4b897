"""The connections that requests are made over: watched while a body goes out, through TLS, a tunnel or neither."""

from __future__ import annotations

import io
import select
import ssl
import threading
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import requests
from requests.adapters import HTTPAdapter
from requests.utils import DEFAULT_CA_BUNDLE_PATH
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from deltasync.client.answer import BoundedAnswer, Deadline

if TYPE_CHECKING:
    from deltasync.client.ssh import Tunnel
    from deltasync.client.trust import Trust

HANDSHAKE_SECONDS = 10.0
"""How long it takes at most until a connection is secure."""

_local = threading.local()


class _Watched:
    """Makes the connection that is used known to the body it sends, and waits for slow disks (mixin)."""

    timeout: Any
    patience_seconds = 0.0
    response_class: Any = BoundedAnswer

    def request(self, *args: Any, **options: Any) -> None:
        """Send a request; its body finds this connection in the thread's variable."""
        self.patience_seconds = 0.0
        _local.connection = self
        try:
            super().request(*args, **options)  # type: ignore[misc]
        finally:
            _local.connection = None

    def getresponse(self) -> Any:
        """Wait for the answer, longer after a large body."""
        if self.patience_seconds and isinstance(self.timeout, (int, float)):
            self.timeout += self.patience_seconds
        return super().getresponse()  # type: ignore[misc]


class _Connection(_Watched, HTTPConnection):
    """A plain connection."""


class _TlsConnection(_Watched, HTTPSConnection):
    """A TLS connection."""

    _deadline: Deadline | None = None

    def connect(self) -> None:
        """Connect, and be done with the handshake in time, also where its bytes come drop by drop (spec H-141)."""
        try:
            super().connect()
        finally:
            if self._deadline is not None:
                self._deadline.cancel()

    def _new_conn(self) -> Any:
        plain: Any = super()._new_conn()
        self._deadline = Deadline(plain, HANDSHAKE_SECONDS)
        return plain

    def send(self, content: Any) -> None:
        """Send, and call a connection that is gone what it is called without TLS: an answer may be there to be read."""
        try:
            super().send(content)
        except ssl.SSLEOFError as error:
            raise BrokenPipeError from error


class _Begun(io.RawIOBase):
    """An answer whose first byte was read before the rest."""

    def __init__(self, first: bytes, rest: io.RawIOBase) -> None:
        self._first, self._rest = first, rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if not self._first:
            return self._rest.readinto(buffer)
        buffer[:1], self._first = self._first, b""
        return 1

    def close(self) -> None:
        self._rest.close()
        super().close()


class _BegunSocket:
    """A socket of whose answer the first byte was read."""

    def __init__(self, socket: Any, first: bytes) -> None:
        self._socket, self._first = socket, first

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)

    def makefile(self, mode: str) -> io.BufferedReader:
        first, self._first = self._first, b""
        return io.BufferedReader(_Begun(first, self._socket.makefile(mode, buffering=0)))


def _has_answer(connection: Any) -> bool:
    """Tell whether what came to a connection is of an answer: under TLS it may be a session ticket, which is taken."""
    if not isinstance(connection, _TlsConnection):
        return True
    socket: Any = connection.sock
    seconds = socket.gettimeout()
    socket.settimeout(0)
    try:
        first = socket.recv(1)
    except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
        return False
    finally:
        socket.settimeout(seconds)
    connection.sock = _BegunSocket(socket, first)
    return True


class Sending:
    """The connection that this thread sends a body over, while it does; there is none before and after."""

    def __init__(self, seconds: float) -> None:
        """seconds: how long a piece may take; urllib3 sends under the connect timeout, too short for a busy disk."""
        self._connection: Any = getattr(_local, "connection", None)
        socket = getattr(self._connection, "sock", None)
        self._poll: select.poll | None = None
        if socket is not None:
            socket.settimeout(seconds)
            if isinstance(self._connection, _Watched):
                self._poll = select.poll()
                self._poll.register(socket, select.POLLIN | select.POLLHUP)

    def is_answered(self) -> bool:
        """Tell whether the server says something already."""
        return self._poll is not None and bool(self._poll.poll(0)) and _has_answer(self._connection)

    def wait_longer(self, seconds: float) -> None:
        """Have the answer waited for so much longer than others."""
        if self._connection is not None:
            self._connection.patience_seconds = seconds


class _TunnelConnection(_Connection):
    """A plain connection through a tunnel."""

    def __init__(self, tunnel: Tunnel, **options: Any) -> None:
        super().__init__(**options)
        self._way = tunnel

    def _new_conn(self) -> Any:
        line = self._way.connect()
        line.settimeout(self.timeout)
        return line


class _Pool(HTTPConnectionPool):
    """Plain connections to one host."""

    ConnectionCls = _Connection


class _TunnelPool(HTTPConnectionPool):
    """Plain connections through a tunnel."""

    def __init__(self, tunnel: Tunnel, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.ConnectionCls = partial(_TunnelConnection, tunnel)  # type: ignore[assignment]


class _TlsPool(HTTPSConnectionPool):
    """TLS connections to one host."""

    ConnectionCls = _TlsConnection


class Adapter(HTTPAdapter):
    """Makes pools of watched connections; never retries: an upload that is sent again is sent empty.

    tls: what every TLS connection is made with, also one through a proxy; requests' own choices are left out, because
    they would add CAs to those that were chosen.
    """

    def __init__(self, tls: Mapping[str, Any], tunnel: Tunnel | None = None) -> None:
        """tunnel: what all connections go through, if there is one."""
        self._tls, self._tunnel = tls, tunnel
        super().__init__(pool_connections=1, pool_maxsize=1)

    def build_connection_pool_key_attributes(self, *args: Any, **options: Any) -> Any:
        """Return where a connection goes, and how it is secured."""
        where, _ = super().build_connection_pool_key_attributes(*args, **options)
        return where, dict(self._tls)

    def cert_verify(self, *args: Any, **options: Any) -> None:
        """Leave a connection's TLS as it was made."""

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        """Set the pools' classes."""
        super().init_poolmanager(*args, **options)
        plain = _Pool if self._tunnel is None else partial(_TunnelPool, self._tunnel)
        self.poolmanager.pool_classes_by_scheme = {"http": plain, "https": _TlsPool}


class Session(requests.Session):
    """Follows no redirect, and reads nothing of one: requests would read all of its body to be ready to follow."""

    def get_redirect_target(self, resp: requests.Response) -> None:
        """Tell of none (spec H-96)."""


def tls_options(trust: Trust) -> dict[str, Any]:
    """Return the options of urllib3 that make it connect by this trust alone."""
    context = trust.context(DEFAULT_CA_BUNDLE_PATH)
    return {
        "ssl_context": context,
        "assert_hostname": None if context.check_hostname else False,
        "assert_fingerprint": trust.fingerprint,
    }
