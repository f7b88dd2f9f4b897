"""A server that lies about one thing: a real deltasync-server behind a double that changes single answers of it."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

SECONDS = 20.0
DRIP_SECONDS = 0.02
_PIECE = 1 << 16


@dataclass(frozen=True)
class Asked:
    """One request, with all of its body."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def line(self) -> str:
        """What a lie looks at: `POST /workspaces/w/missing`, without the API's prefix and the query."""
        return f"{self.method} {self.target.partition('?')[0].removeprefix('/api/v1')}"


@dataclass
class Said:
    """One answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    def put(self, name: str, value: str) -> None:
        """Put a header in the place of what there is of that name; '' leaves it out."""
        for known in [each for each in self.headers if each.lower() == name.lower()]:
            del self.headers[known]
        if value:
            self.headers[name] = value

    def sealed(self) -> bytes:
        """Return the answer as it is sent, with the length that it has."""
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _FRAMING}
        headers["Content-Length"] = str(len(self.body))
        lines = [f"HTTP/1.1 {self.status} Said", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        return "\r\n".join(lines).encode("latin-1", "replace") + self.body


_FRAMING = ("content-length", "transfer-encoding", "connection", "keep-alive")
PassOn = Callable[[], Said]
"""Asks the real server."""
Raw = Iterator[bytes]
"""Bytes that are sent as they are, also without end; the connection is closed behind them."""
Lie = Callable[[Asked, PassOn], "Said | Raw | None"]
"""Answers a request in the real server's place; None is the truth."""
Pieces = Callable[[], Iterable[bytes]]
"""Gives bytes to be sent, also without end."""


class Double:
    """Stands before a real server on loopback, records every request, and lies while it is told to."""

    def __init__(self, upstream: int, contexts: Iterable[ssl.SSLContext] = ()) -> None:
        """contexts: the TLS of the first connections, the last one that of all others; none at all is plain http."""
        self._upstream, self._contexts = upstream, list(contexts)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http{'s' if self._contexts else ''}://127.0.0.1:{self.port}"
        self.lie: Lie | None = None
        self.asked: list[Asked] = []
        self.is_closing = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Stop listening; what drips ends."""
        self.is_closing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            context = None
            if self._contexts:
                context = self._contexts.pop(0) if len(self._contexts) > 1 else self._contexts[0]
            threading.Thread(target=self._serve, args=(connection, context), daemon=True).start()

    def _serve(self, plain: socket.socket, context: ssl.SSLContext | None) -> None:
        plain.settimeout(SECONDS)
        with plain, contextlib.suppress(OSError, ValueError, http.client.HTTPException):
            connection = plain if context is None else context.wrap_socket(plain, server_side=True)
            with connection, connection.makefile("rb") as reading:
                while (asked := _request(reading)) is not None:
                    self.asked.append(asked)
                    if not self._answer(connection, asked):
                        with contextlib.suppress(OSError):
                            connection.shutdown(socket.SHUT_WR)
                            while connection.recv(_PIECE):
                                pass
                        return

    def _answer(self, connection: socket.socket, asked: Asked) -> bool:
        lie = self.lie
        said = lie(asked, lambda: self._truth(asked)) if lie is not None else None
        if said is None:
            said = self._truth(asked)
        if isinstance(said, Said):
            connection.sendall(said.sealed())
            return True
        for piece in said:
            if self.is_closing.is_set():
                break
            connection.sendall(piece)
        return False

    def _truth(self, asked: Asked) -> Said:
        upstream = http.client.HTTPConnection("127.0.0.1", self._upstream, timeout=SECONDS)
        kept = {name: value for name, value in asked.headers.items() if name not in (*_FRAMING, "host")}
        with contextlib.closing(upstream):
            upstream.request(asked.method, asked.target, asked.body or None, kept)
            answer = upstream.getresponse()
            return Said(answer.status, dict(answer.getheaders()), answer.read())


def _request(reading: Any) -> Asked | None:
    words = reading.readline(_PIECE).decode("latin-1").split()
    if len(words) != 3:
        return None
    headers: dict[str, str] = {}
    while line := reading.readline(_PIECE).strip():
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.lower()] = value.strip()
    if headers.get("transfer-encoding") == "chunked":
        body = bytearray()
        while size := int(reading.readline(_PIECE), 16):
            body += reading.read(size)
            reading.readline(_PIECE)
        reading.readline(_PIECE)
        return Asked(words[0], words[1], headers, bytes(body))
    return Asked(words[0], words[1], headers, reading.read(int(headers.get("content-length", 0))))


@contextmanager
def hostile(upstream: int, contexts: Iterable[ssl.SSLContext] = ()) -> Iterator[Double]:
    """Stand before a real server while the block runs."""
    double = Double(upstream, contexts)
    try:
        yield double
    finally:
        double.close()


# Ways to lie


def when(pattern: str, lie: Lie, *, times: int | None = None, skip: int = 0) -> Lie:
    """Lie to requests of which this is the whole line, so many times, after so many were told the truth."""
    count = 0

    def told(asked: Asked, pass_on: PassOn) -> Said | Raw | None:
        nonlocal count
        if not re.fullmatch(pattern, asked.line):
            return None
        count += 1
        return lie(asked, pass_on) if count > skip and (times is None or count <= skip + times) else None

    return told


def either(*lies: Lie) -> Lie:
    """Tell the first of these lies that concerns a request."""

    def told(asked: Asked, pass_on: PassOn) -> Said | Raw | None:
        return next((said for lie in lies if (said := lie(asked, pass_on)) is not None), None)

    return told


def members(**changed: Any) -> Lie:
    """Change members of a JSON answer; a function is given what is there."""

    def told(asked: Asked, pass_on: PassOn) -> Said:
        said = pass_on()
        found = json.loads(said.body)
        for name, value in changed.items():
            found[name] = value(found.get(name)) if callable(value) else value
        said.body = json.dumps(found).encode()
        return said

    return told


def text(change: Callable[[bytes], bytes]) -> Lie:
    """Change the body of an answer."""

    def told(asked: Asked, pass_on: PassOn) -> Said:
        said = pass_on()
        said.body = change(said.body)
        return said

    return told


def instead(body: bytes = b"", status: int = 200, **headers: str) -> Lie:
    """Answer this, without asking the real server; underscores in headers' names are dashes."""
    said = Said(status, {"Deltasync-Server": "1", "Content-Type": "application/json"}, body)
    for name, value in headers.items():
        said.put(name.replace("_", "-"), value)
    return lambda asked, pass_on: said


def refusal(code: str, status: int, detail: str = "no", facts: Mapping[str, Any] | None = None, **headers: str) -> Lie:
    """Refuse a request as a server does."""
    words = {"type": "t", "title": "t", "status": status, "detail": detail, "code": code, "facts": dict(facts or {})}
    return instead(json.dumps(words).encode(), status, **headers)


def with_headers(**headers: str) -> Lie:
    """Add headers to an answer."""

    def told(asked: Asked, pass_on: PassOn) -> Said:
        said = pass_on()
        for name, value in headers.items():
            said.put(name.replace("_", "-"), value)
        return said

    return told


def raw(head: str, pieces: Pieces = tuple) -> Lie:
    """Answer bytes; the lines of the head are joined as HTTP has them."""
    begin = head.replace("\n", "\r\n").encode()

    def told(asked: Asked, pass_on: PassOn) -> Raw:
        def flow() -> Raw:
            yield begin
            yield from pieces()

        return flow()

    return told


def without_end(piece: bytes) -> Pieces:
    """Repeat some bytes for ever."""

    def flow() -> Iterator[bytes]:
        while True:
            yield piece

    return flow


def dripping(piece: bytes) -> Pieces:
    """Repeat some bytes for ever, slowly."""

    def flow() -> Iterator[bytes]:
        pause = threading.Event()
        while True:
            yield piece
            pause.wait(DRIP_SECONDS)

    return flow


@dataclass
class Forged:
    """A tree that no client pushed: its head and its directory objects take the place of the real ones."""

    root: bytes
    bodies: Mapping[bytes, bytes]
    lies: list[Lie] = field(default_factory=list)

    def __call__(self, asked: Asked, pass_on: PassOn) -> Said | Raw | None:
        """Tell it."""
        from deltasync.core import frames

        for lie in self.lies:
            if (said := lie(asked, pass_on)) is not None:
                return said
        if re.fullmatch("GET /workspaces/[^/]+", asked.line):
            return members(root=self.root.hex(), sequence=77, tree_sequence=77)(asked, pass_on)
        if found := re.fullmatch("GET /workspaces/[^/]+/tree/([0-9a-f]{64})", asked.line):
            body = self.bodies.get(bytes.fromhex(found[1]))
            return None if body is None else instead(body)(asked, pass_on)
        if asked.line.endswith("/trees"):
            wanted = [bytes.fromhex(each) for each in json.loads(asked.body)["digests"]]
            if not all(each in self.bodies for each in wanted):
                return None
            stream = b"".join(frames.head(len(self.bodies[each])) + self.bodies[each] for each in wanted)
            return instead(stream)(asked, pass_on)
        return None
