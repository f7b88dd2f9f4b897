"""A proxy that knows requests: drops, repeats, delays, reorders and cuts them at random, and keeps the answers."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random

from lossy import _reset

SECONDS = 20.0
_WAYS = {
    "pass": 40,
    "delay": 6,
    "drop the request": 8,
    "drop the answer": 10,
    "twice": 10,
    "twice at once": 6,
    "late": 8,
    "cut the request": 8,
    "cut the answer": 8,
}
_BUNDLE = re.compile(rb"^POST /api/v1/workspaces/[^/]+/bundles|^POST /api/v1/uploads/[^/]+/complete")


@dataclass
class BadNet:
    """Passes requests on to a server of loopback, more or less."""

    upstream: int
    random: Random
    is_bad: bool = True
    exchanges: int = 0
    ways: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    _late: list[bytes] = field(default_factory=list)
    _receipts: dict[str, tuple[str, int, str]] = field(default_factory=dict)
    """By identity: what the first receipt said."""
    _lock: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Listen no longer."""
        self._listener.close()

    def settle(self) -> None:
        """Deliver everything that is late."""
        with self._lock:
            late, self._late = self._late, []
        for each in late:
            self._forwarded(each)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                near.settimeout(SECONDS)
                threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        """Answer the one request of a connection: every answer says that it is the last."""
        with contextlib.suppress(OSError), near:
            asked = _request(near)
            if not asked:
                return
            with self._lock:
                self.exchanges += 1
                self._lock.notify_all()
                way = self.random.choices(list(_WAYS), list(_WAYS.values()))[0] if self.is_bad else "pass"
                share, due = self.random.random(), self.random.random() < 0.3
                self.ways[way] += 1
                late = self._late.pop(0) if self._late and due else b""
            if late:
                self._forwarded(late)
            self._exchange(near, asked, way, share)

    def _exchange(self, near: socket.socket, asked: bytes, way: str, share: float) -> None:
        if way == "drop the request":
            _reset(near)
        elif way == "late":
            with self._lock:
                self._late.append(asked)
            _reset(near)
        elif way == "cut the request":
            with socket.create_connection(("127.0.0.1", self.upstream), SECONDS) as far:
                far.sendall(asked[: int(share * len(asked))])
                _reset(far)
            _reset(near)
        else:
            if way == "delay":
                with self._lock:  # until another one overtakes it, if one comes soon
                    self._lock.wait(share / 20)
            others = [threading.Thread(target=self._forwarded, args=(asked,))] if way == "twice at once" else []
            for each in others:
                each.start()
            answer = self._forwarded(asked)
            for each in others:
                each.join()
            if way == "twice":
                answer = self._forwarded(asked)
            if way == "drop the answer":
                _reset(near)
            elif way == "cut the answer":
                near.sendall(answer[: int(share * len(answer))])
                _reset(near)
            else:
                near.sendall(answer)

    def _forwarded(self, asked: bytes) -> bytes:
        """Send a request to the server, and return its answer."""
        try:
            with socket.create_connection(("127.0.0.1", self.upstream), SECONDS) as far:
                far.sendall(asked)
                answer = b"".join(iter(lambda: far.recv(1 << 16), b""))
        except OSError:
            return b""
        self._note(asked, answer)
        return answer

    def _note(self, asked: bytes, answer: bytes) -> None:
        """Keep books of receipts: each bundle is new once, and its repeats get what the first one got (spec S-2)."""
        identity = re.search(rb"(?i)^deltasync-identity: ([0-9a-f]{64})", asked, re.MULTILINE)
        if not _BUNDLE.match(asked) or identity is None:
            return
        head, _, body = answer.partition(b"\r\n\r\n")
        status, named = head.split(b" ", 2)[1:2], identity[1].decode()
        with self._lock:
            first = self._receipts.get(named)
            if status == [b"200"]:
                told = json.loads(body)
                said = told["epoch"], told["sequence"], told["root"]
                if not told["duplicate"]:
                    self._news[named] += 1
                    if self._news[named] > 1:
                        self.faults.append(f"bundle {named} of {said} is new twice")
                if first is not None and said != first:
                    self.faults.append(f"bundle {named} has two receipts: {first} and {said}")
                self._receipts[named] = said
            elif first is not None and status in ([b"409"], [b"422"]):
                self.faults.append(f"bundle {named} of {first} is refused when it comes again: {body[:300]!r}")

    _news: Counter[str] = field(default_factory=Counter)


def _request(near: socket.socket) -> bytes:
    """Return a whole request, with the word that its connection is closed behind the answer; b'' where none comes."""
    found = bytearray()
    while b"\r\n\r\n" not in found:
        part = near.recv(1 << 16)
        if not part:
            return b""
        found += part
    head, _, rest = bytes(found).partition(b"\r\n\r\n")
    body = bytearray(rest)
    length = re.search(rb"(?i)^content-length: (\d+)", head, re.MULTILINE)
    is_chunked = re.search(rb"(?i)^transfer-encoding: chunked", head, re.MULTILINE)
    while (is_chunked and not _is_whole(body)) or (length and len(body) < int(length[1])):
        part = near.recv(1 << 18)
        if not part:
            return b""
        body += part
    first, _, fields = re.sub(rb"(?im)^connection:.*\r\n", b"", head + b"\r\n").partition(b"\r\n")
    return first + b"\r\nConnection: close\r\n" + fields + b"\r\n" + bytes(body)


def _is_whole(body: bytearray) -> bool:
    """Tell whether chunks are there to their end."""
    at = 0
    while True:
        end = body.find(b"\r\n", at)
        if end < 0:
            return False
        size = int(bytes(body[at:end]).partition(b";")[0], 16)
        at = end + 2 + size + 2
        if at > len(body):
            return False
        if not size:
            return True


@contextmanager
def bad_net(upstream: int, random: Random) -> Iterator[BadNet]:
    """Run a proxy before a port of loopback while the block runs."""
    net = BadNet(upstream, random)
    try:
        yield net
    finally:
        net.close()
