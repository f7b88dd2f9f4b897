"""The address that a server listens on: parsed, judged, bound."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import stat
from dataclasses import dataclass
from urllib.parse import urlsplit

from deltasync.core.errors import DeltasyncError, UsageError
from deltasync.core.names import shown

UNIX = "unix:"
PATH_BYTES_MAX = 107


@dataclass(frozen=True, slots=True)
class Address:
    """One address: a path for a unix socket, else a host and a port that were resolved."""

    family: socket.AddressFamily
    where: tuple[str, int] | str

    @property
    def is_private(self) -> bool:
        """Whether no other machine can reach it."""
        return isinstance(self.where, str) or ipaddress.ip_address(self.where[0]).is_loopback


def resolve(text: str) -> Address:
    """Return the address that --listen names: HOST:PORT, [IPV6]:PORT or unix:/path."""
    if text.startswith(UNIX):
        path = text.removeprefix(UNIX)
        if not path or len(os.fsencode(path)) > PATH_BYTES_MAX:
            raise UsageError(f"the path of a unix socket has 1 to {PATH_BYTES_MAX} bytes")
        return Address(socket.AF_UNIX, path)
    host, colon, port = text.rpartition(":")
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise UsageError(f"{shown(text)} is no address to listen on: say HOST:PORT, [IPV6]:PORT or unix:/path")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"{shown(host)} is not a host of this machine: {error}") from error
    family, _, _, _, where = min(found, key=lambda each: each[0] != socket.AF_INET)
    return Address(family, (str(where[0]).partition("%")[0], int(where[1])))


def is_loopback_name(host: str) -> bool:
    """Tell whether a Host header names this host by what never leaves it."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def bind(address: Address) -> socket.socket:
    """Return a socket that holds the address but does not listen yet; raises when the address is taken."""
    listener = socket.socket(address.family, socket.SOCK_STREAM)
    try:
        if isinstance(address.where, str):
            _remove_stale(address.where)
            listener.bind(address.where)
            os.chmod(address.where, 0o600)  # noqa: PTH101 - a socket's name is text
        else:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address.where)
    except OSError as error:
        listener.close()
        raise unusable(address.where, error) from error
    listener.setblocking(False)
    return listener


def _remove_stale(path: str) -> None:
    """Remove a socket that nobody answers on; anything else at the path stays, and bind() refuses it."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)  # noqa: PTH108


def unusable(name: tuple[str, int] | str, error: OSError) -> DeltasyncError:
    """Say why an address cannot be listened on."""
    where = name if isinstance(name, str) else f"{name[0]}:{name[1]}"
    if error.errno == errno.EADDRINUSE:
        return DeltasyncError(f"{shown(where)} is in use; choose another --listen, or port 0 for any free one")
    return DeltasyncError(f"cannot listen on {shown(where)}: {error.strerror}")


def url_of(listener: socket.socket, *, is_encrypted: bool) -> str:
    """Return what a client calls the socket's address."""
    name = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return f"{UNIX}{name}"
    host = f"[{name[0]}]" if listener.family == socket.AF_INET6 else name[0]
    return f"http{'s' * is_encrypted}://{host}:{name[1]}"
