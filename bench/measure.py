"""Measuring: processes timed cold, their CPU seconds and peak memory with children, and the bytes between them."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

_TICK = 1 / os.sysconf("SC_CLK_TCK")
_BUFFER_BYTES = 1 << 18
_REQUEST = re.compile(rb"(?:GET|POST|PUT|HEAD|DELETE) /\S* HTTP/1\.1\r\n")


class Failed(Exception):
    """A measured program ended with an error."""


@dataclass(frozen=True, slots=True)
class Ran:
    """What one finished process cost; its CPU includes the children that it waited for."""

    wall_seconds: float
    cpu_seconds: float
    output: str


def run(command: Sequence[str | Path], environment: dict[str, str], *, watch: PeakMemory | None = None) -> Ran:
    """Run a program from a cold start to its end; raise Failed unless it exits 0."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as trouble:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=trouble, stdin=subprocess.DEVNULL, env=environment)
        if watch:
            watch.follow(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        trouble.seek(0)
        said = output.read().decode(errors="replace")
        if process.returncode:
            said += trouble.read().decode(errors="replace")
            raise Failed(f"{' '.join(map(str, command))} exited {process.returncode}: {said}")
    return Ran(wall, usage.ru_utime + usage.ru_stime, said)


def tree_cpu_seconds(pid: int) -> float:
    """Return the CPU seconds of a process, of its living descendants and of the children that they waited for."""
    total = 0.0
    for one in _descendants(pid):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
            total += sum(map(int, fields[11:15])) * _TICK
    return total


def wait_until_idle(pid: int, *, quiet_seconds: float = 0.3, at_most_seconds: float = 60) -> None:
    """Wait until a process tree has used no CPU for a while: its background work belongs to what was before."""
    deadline = time.monotonic() + at_most_seconds
    before, since = tree_cpu_seconds(pid), time.monotonic()
    while time.monotonic() < deadline:
        time.sleep(0.05)
        now = tree_cpu_seconds(pid)
        if now - before > _TICK:
            before, since = now, time.monotonic()
        elif time.monotonic() - since > quiet_seconds:
            return


def _descendants(pid: int) -> list[int]:
    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def _resident_bytes(pid: int) -> int:
    """Return the proportional share of memory of one process tree: pages shared among forks count once."""
    total, pids = 0, _descendants(pid)
    for one in pids:
        name, field_name = (
            (f"/proc/{one}/status", "VmHWM:") if len(pids) == 1 else (f"/proc/{one}/smaps_rollup", "Pss:")
        )
        with contextlib.suppress(OSError, StopIteration):
            lines = Path(name).read_text().splitlines()
            total += int(next(line for line in lines if line.startswith(field_name)).split()[1]) * 1024
    return total


class PeakMemory:
    """Samples the memory of process trees; a lone process answers with the kernel's own high-water mark."""

    def __init__(self, interval_seconds: float = 0.02) -> None:
        self._interval = interval_seconds
        self._peaks: dict[int, int] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def follow(self, pid: int) -> None:
        """Watch one more process and everything below it."""
        self._peaks.setdefault(pid, 0)

    def peak(self, pid: int) -> int:
        """Return the most bytes seen so far."""
        return max(self._peaks.get(pid, 0), _resident_bytes(pid))

    def last(self) -> int:
        """Return the peak of the process that was followed last."""
        return self._peaks[next(reversed(self._peaks))]

    def stop(self) -> None:
        """End the sampling."""
        self._stopped.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stopped.wait(self._interval):
            for pid in list(self._peaks):
                self._peaks[pid] = max(self._peaks[pid], _resident_bytes(pid))


@dataclass(slots=True)
class Counts:
    """Bytes of TCP payload through a proxy, and the HTTP requests among the short ones."""

    sent_bytes: int = 0
    received_bytes: int = 0
    head: bytes = field(default=b"", repr=False)

    @property
    def requests(self) -> int:
        """The HTTP requests among the first 64 KiB that the client sent."""
        return len(_REQUEST.findall(self.head))


class CountingProxy:
    """A TCP proxy on loopback that counts what passes in both directions."""

    def __init__(self, target_port: int, *, buffer_bytes: int | None = None) -> None:
        """Listen on a free port. buffer_bytes: about how much the kernel may hold of what the client has sent."""
        self._target, self._buffer_bytes = target_port, buffer_bytes
        self._listener = socket.create_server(("127.0.0.1", 0))
        if buffer_bytes:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)  # connections inherit it
        self._lock = threading.Lock()
        self.port: int = self._listener.getsockname()[1]
        self.counts = Counts()
        threading.Thread(target=self._accept, daemon=True).start()

    def take(self) -> Counts:
        """Return the counts since the last call and begin anew."""
        with self._lock:
            taken, self.counts = self.counts, Counts()
        return taken

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._target))
            if self._buffer_bytes:
                server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._buffer_bytes)
            for source, sink, is_sending in ((client, server, True), (server, client, False)):
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._pump, args=(source, sink, is_sending), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, is_sending: bool) -> None:
        buffer = memoryview(bytearray(_BUFFER_BYTES))
        with contextlib.suppress(OSError):
            while size := source.recv_into(buffer):
                with self._lock:
                    if is_sending:
                        self.counts.sent_bytes += size
                        self.counts.head = (self.counts.head + buffer[:size])[:65_536]
                    else:
                        self.counts.received_bytes += size
                sink.sendall(buffer[:size])
                if is_sending:
                    self._passed(source, sink, size)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def _passed(self, client: socket.socket, server: socket.socket, size_bytes: int) -> None:
        """Hear that a piece which the client sent is on its way to the server."""


@contextmanager
def started(command: Sequence[str | Path], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[str]]:
    """Run a program in the background and end it with the block, by SIGTERM and at last by SIGKILL."""
    with log.open("ab") as trouble:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=trouble, stdin=subprocess.DEVNULL, env=environment, text=True
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout:
            process.stdout.close()


def free_port() -> int:
    """Return a port of loopback that nothing listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def wait_for_port(port: int, *, at_most_seconds: float = 15) -> None:
    """Wait until something listens on a port of loopback."""
    deadline = time.monotonic() + at_most_seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return
