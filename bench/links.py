"""What a push sends over a link that breaks again and again, and how well it keeps to a limit."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
import termios
import time
from dataclasses import dataclass
from pathlib import Path

from bench.contestants import deltasync_server, environment
from bench.measure import CountingProxy, Failed, run
from bench.workloads import Workload, difference, make

CUT_EVERY_BYTES = 8 << 20
CUT_BYTES = 256 << 20
_CUT = Workload("cut", "", 2, 2, (CUT_BYTES // 2,))
_FLIGHT_BYTES = 64 << 10
"""What the proxy's machine holds of a connection is lost with it: as much as is under way on a link of 20 Mbit/s."""

LIMIT, LIMIT_BYTES = "2.5M", 5 << 19
_LIMITED = Workload("limited", "", 2, 2, (44 << 20,))
_CONTENT_BYTES = 8 << 10
"""A connection that brought this much carries content: what is asked before is shorter."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A push whose connection was reset every CUT_EVERY_BYTES."""

    size_bytes: int
    sent_bytes: int
    cuts: int
    wall_seconds: float


@dataclass(frozen=True, slots=True)
class Limited:
    """A push under `--bwlimit`, from its first content byte to the last."""

    sent_bytes: int
    seconds: float

    @property
    def bytes_per_second(self) -> float:
        """The measured rate."""
        return self.sent_bytes / self.seconds


class _CuttingProxy(CountingProxy):
    """Resets the connection that brings a multiple of so many bytes."""

    def __init__(self, target_port: int, every_bytes: int) -> None:
        super().__init__(target_port, buffer_bytes=_FLIGHT_BYTES)
        self.cuts = 0
        self._every, self._passed_bytes = every_bytes, 0

    def _passed(self, client: socket.socket, server: socket.socket, size_bytes: int) -> None:
        with self._lock:
            before, self._passed_bytes = self._passed_bytes, self._passed_bytes + size_bytes
            if before // self._every == self._passed_bytes // self._every:
                return
            self.cuts += 1
            self.counts.sent_bytes += _unread_bytes(client)
        for connection in (client, server):
            _reset(connection)


class _TimingProxy(CountingProxy):
    """Remembers when the pieces passed that carry content."""

    def __init__(self, target_port: int) -> None:
        super().__init__(target_port, buffer_bytes=_FLIGHT_BYTES)
        self.moments: list[tuple[float, int]] = []
        self._brought: dict[socket.socket, int] = {}

    def _passed(self, client: socket.socket, server: socket.socket, size_bytes: int) -> None:
        with self._lock:
            self._brought[client] = self._brought.get(client, 0) + size_bytes
            if self._brought[client] >= _CONTENT_BYTES:
                self.moments.append((time.monotonic(), size_bytes))


def measure_cut(folder: Path) -> Cut:
    """Push content that does not compress through a proxy that resets the connection again and again.

    The sizes are the same at every scale: the pieces of a push are, too.
    """
    source = _made(_CUT, folder)
    with deltasync_server(folder / "deltasync") as server:
        with contextlib.closing(_CuttingProxy(server.port, CUT_EVERY_BYTES)) as proxy:
            ran = run(server.command(source, proxy.port), environment(folder / "deltasync"))
            sent = proxy.take().sent_bytes
        if where := difference(source, server.tree):
            raise Failed(f"the push over a link that breaks left another tree: {where}")
    return Cut(_CUT.total_bytes, sent, proxy.cuts, ran.wall_seconds)


def measure_limit(folder: Path) -> Limited:
    """Push for more than half a minute under a limit, the same at every scale."""
    source = _made(_LIMITED, folder)
    with deltasync_server(folder / "deltasync") as server:
        with contextlib.closing(_TimingProxy(server.port)) as proxy:
            command = [*server.command(source, proxy.port), "--bwlimit", LIMIT]
            run(command, environment(folder / "deltasync"))
        if where := difference(source, server.tree):
            raise Failed(f"the limited push left another tree: {where}")
    (first, _), *rest = proxy.moments
    return Limited(sum(size for _, size in rest), rest[-1][0] - first)


def _made(workload: Workload, folder: Path) -> Path:
    source = folder / "source"
    source.mkdir(parents=True)
    make(workload, source)
    return source


def _unread_bytes(connection: socket.socket) -> int:
    """Return how much has arrived and was not read: it was sent, too."""
    (size,) = struct.unpack("i", fcntl.ioctl(connection, termios.FIONREAD, bytes(4)))
    return int(size)


def _reset(connection: socket.socket) -> None:
    """Close with a reset, as a network that goes away does."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RD)  # wakes the thread that reads the other direction
    connection.close()
