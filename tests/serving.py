"""A real `deltasync-server serve` for tests, and requests to it: well-formed ones, and raw bytes."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from corpus_good import Life, directory_of, noise, seal

from deltasync.core import bundle
from deltasync.core.manifest import EMPTY_ROOT

BINARY = Path(sys.executable).parent / "deltasync-server"
SECONDS = 20.0
QUIET_SECONDS = 0.1


@dataclass(frozen=True)
class Answer:
    """One answer: status, headers by lower-case name, body."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


@dataclass
class Served:
    """A running server."""

    process: subprocess.Popen[str]
    data: Path
    url: str
    log: Path
    token: str = ""
    """What requests show, if anything."""
    port: int = field(init=False)

    def __post_init__(self) -> None:
        self.port = int(self.url.rpartition(":")[2])

    def request(
        self,
        method: str,
        path: str,
        body: bytes | Iterator[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Make one request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        try:
            shown = {"Authorization": f"Bearer {self.token}"} if self.token else {}
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused in the middle: read the answer
                connection.request(method, path, body, {**shown, **(headers or {})})
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def showing(self, token: str) -> Served:
        """Return the same server for requests that show a token."""
        return replace(self, token=token)

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        """Make one GET request."""
        return self.request("GET", path, headers=headers)

    def send(self, workspace: str, made: Bundle, query: str = "") -> Answer:
        """Send a bundle."""
        path = f"/api/v1/workspaces/{workspace}/bundles{query}"
        return self.request("POST", path, made.sealed, {"Deltasync-Identity": made.identity})

    def connect(self) -> socket.socket:
        """Open a raw connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS)

    def raw(self, request: bytes) -> tuple[bytes, bool]:
        """Send bytes and return all that is answered until the server closes or falls silent, and whether it closed."""
        with self.connect() as connection:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused in the middle: read the answer
                connection.sendall(request)
            return received(connection)

    def stop(self) -> int:
        """Ask the server to end, and return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(SECONDS)


def until(condition: Callable[[], object]) -> None:
    """Wait until something holds; fail when it does not in time."""
    deadline = time.monotonic() + SECONDS
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        pause.wait(0.02)


def received(connection: socket.socket) -> tuple[bytes, bool]:
    """Return what comes until the peer closes, or is silent after one whole answer; and whether it closed."""
    found = bytearray()
    while True:
        connection.settimeout(QUIET_SECONDS if is_whole(bytes(found)) else SECONDS)
        try:
            part = connection.recv(1 << 16)
        except ConnectionResetError:
            return bytes(found), True
        except TimeoutError:
            return bytes(found), False
        if not part:
            return bytes(found), True
        found += part


def is_whole(answer: bytes) -> bool:
    """Tell whether an answer has all the bytes that its head announces."""
    head, gap, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head.lower())
    return bool(gap) and len(body) >= int(length[1] if length else 0)


@contextmanager
def serving(data: Path, *flags: str, environment: Mapping[str, str] | None = None) -> Iterator[Served]:
    """Serve a data folder on a free port of loopback while the block runs."""
    log = data.with_name(data.name + ".log")
    words = [BINARY, "serve", "--data", data, "--listen", "127.0.0.1:0", *flags]
    with log.open("ab") as stderr:
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=stderr, text=True, env={**os.environ, **(environment or {})}
        )
    try:
        assert process.stdout
        line = process.stdout.readline()
        assert line.startswith("listening on http://"), log.read_text()
        yield Served(process, data, line.split()[-1], log)
    finally:
        process.terminate()
        try:
            process.wait(SECONDS)
        finally:
            process.kill()
            assert process.stdout
            process.stdout.close()


@dataclass(frozen=True)
class Bundle:
    """A sealed bundle and what it should lead to."""

    metadata: bundle.Metadata
    sealed: bytes

    @property
    def identity(self) -> str:
        """The value of the Deltasync-Identity header."""
        return self.metadata.identity.hex()

    @property
    def root(self) -> str:
        """The root after it."""
        return self.metadata.manifest.root


@dataclass
class Writer:
    """A client by hand: changes a dictionary and seals each change."""

    workspace: str
    client_id: str = "a" * 32
    epoch: str = "1" * 32
    sequence: int = 0
    root: bytes = EMPTY_ROOT
    life: Life = field(default_factory=Life)

    def seal(self, change: Callable[[Life], None]) -> Bundle:
        """Seal what a change does, with all the content that it names."""
        change(self.life)
        self.sequence += 1
        parent_root, self.root = self.root, directory_of(self.life.tree)
        metadata = bundle.compose(
            self.life.take(),
            workspace=self.workspace,
            workspace_path="/home/ada/" + self.workspace,
            epoch=self.epoch,
            sequence=self.sequence,
            parent_root=parent_root,
            root=self.root,
            client_id=self.client_id,
            bundle_id=f"00000000-0000-4000-8000-{self.sequence:012d}",
            created_at=datetime(2026, 11, 21, tzinfo=UTC),
        )
        return Bundle(metadata, seal(metadata, bundle.content_operations(metadata), self.life.tree, level=1))

    def file(self, path: str = "a.txt", content: bytes = b"hello\n") -> Bundle:
        """Seal one new file."""
        return self.seal(lambda life: life.file(path, content))

    def large(self, size: int) -> Bundle:
        """Seal one file that does not compress."""
        return self.seal(lambda life: life.file("large.bin", noise(self.workspace, size)))
