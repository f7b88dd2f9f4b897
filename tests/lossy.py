"""A real TCP proxy between a client and a server, which cuts connections and swallows answers where it is told to."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

HELD_SECONDS = 20.0


@dataclass
class Fault:
    """What happens to one request: the first whose head contains `marker`, after `skip` others that do."""

    marker: bytes
    cut_after: int | None = None
    """Reset the connection when this many bytes of the request have passed."""
    swallow: bool = False
    """Pass the request on, wait for the answer, and drop it."""
    until: threading.Event | None = None
    """Hold the request back until this happens."""
    skip: int = 0
    has_happened: threading.Event = field(default_factory=threading.Event)


class Proxy:
    """Passes bytes on between loopback ports, with faults."""

    def __init__(self, upstream: int) -> None:
        self._upstream = upstream
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.faults: list[Fault] = []
        self.passed_bytes = 0
        self.request_bytes = 0
        """What came from clients, also what was lost with its connection."""
        self.reset_every: int | None = None
        """Reset the connection that brings a multiple of so many bytes of requests."""
        self.resets = 0
        self.dark_after: int | None = None
        """Take and give nothing more, on any connection, and close none, once so many bytes of requests came."""
        self.bytes_per_second: float | None = None
        """How much goes through each connection at most, either way."""
        self.is_light = threading.Event()
        self.is_light.set()
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Stop listening and drop every connection."""
        self._listener.close()
        self.is_light.set()
        for connection in list(self._open):
            _reset(connection)

    def reset_all(self) -> None:
        """Reset every connection that is open now; new ones go through."""
        for connection in list(self._open):
            _reset(connection)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self._upstream))
                except OSError:
                    near.close()
                    continue
                if self.reset_every is not None:  # a reset loses what this machine has not passed on: little
                    far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
                self._open |= {near, far}
                line = _Line(self, near, far)
                threading.Thread(target=line.requests, daemon=True).start()
                threading.Thread(target=line.answers, daemon=True).start()

    def hold(self, size: int) -> None:
        """Keep some bytes as long as this network does."""
        if self.bytes_per_second is not None:
            threading.Event().wait(size / self.bytes_per_second)
        if self.dark_after is not None and self.request_bytes > self.dark_after:
            self.is_light.clear()
            self.dark_after = None
        self.is_light.wait()

    def must_reset(self, size: int) -> bool:
        """Count bytes of requests; tell whether their connection is to be reset now."""
        with self._lock:
            before, self.request_bytes = self.request_bytes, self.request_bytes + size
            every = self.reset_every
            is_due = every is not None and before // every < self.request_bytes // every
            self.resets += is_due
            return is_due

    def fault_in(self, chunk: bytes) -> Fault | None:
        """Return the fault that a chunk's request meets, and take it off the list."""
        with self._lock:
            self.passed_bytes += len(chunk)
            for fault in self.faults:
                if fault.marker in chunk:
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    self.faults.remove(fault)
                    return fault
        return None


class _Line:
    """One connection through the proxy."""

    def __init__(self, proxy: Proxy, near: socket.socket, far: socket.socket) -> None:
        self.proxy, self.near, self.far = proxy, near, far
        self.fault: Fault | None = None
        self.left = 0

    def requests(self) -> None:
        with contextlib.suppress(OSError):
            while chunk := self.near.recv(1 << 16):
                must_reset = self.proxy.must_reset(len(chunk))
                self.proxy.hold(len(chunk))
                if must_reset:
                    self.far.sendall(chunk)
                    _reset(self.near)
                    _reset(self.far)
                    return
                met = self.proxy.fault_in(chunk)
                if met is not None and met.until is not None:
                    met.has_happened.set()
                    met.until.wait(HELD_SECONDS)
                    met = None
                if met is not None:
                    self.fault, self.left = met, met.cut_after or 0
                if self.fault is not None and self.fault.cut_after is not None:
                    self.far.sendall(chunk[: self.left])
                    self.left -= len(chunk)
                    if self.left <= 0:
                        self.happen()
                        return
                else:
                    self.far.sendall(chunk)
        for each in (self.near, self.far):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def answers(self) -> None:
        with contextlib.suppress(OSError):
            while chunk := self.far.recv(1 << 16):
                self.proxy.hold(len(chunk))
                if self.fault is not None and self.fault.swallow:
                    self.happen()
                    return
                self.near.sendall(chunk)
                with self.proxy._lock:
                    self.proxy.passed_bytes += len(chunk)
        with contextlib.suppress(OSError):
            self.near.shutdown(socket.SHUT_RDWR)

    def happen(self) -> None:
        assert self.fault is not None
        _reset(self.near)
        _reset(self.far)
        self.fault.has_happened.set()


def _reset(connection: socket.socket) -> None:
    """Close with a reset, as a network that goes away does."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RD)
    connection.close()


@contextmanager
def lossy(upstream: int) -> Iterator[Proxy]:
    """Run a proxy before a port of loopback while the block runs."""
    proxy = Proxy(upstream)
    try:
        yield proxy
    finally:
        proxy.close()


@contextmanager
def answering(*answers: bytes, reads_request: bool = True) -> Iterator[int]:
    """Run a server of another kind: each connection gets the next answer as it is (the last one again and again)."""
    listener = socket.create_server(("127.0.0.1", 0))
    left = list(answers)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    if reads_request:
                        connection.recv(1 << 16)
                    connection.sendall(left.pop(0) if len(left) > 1 else left[0])
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(1 << 16):
                        pass

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.close()
