"""Real watchers for tests, in a process of their own or in a thread: their events, and questions over their socket."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folders
import pytest
from serving import serving

from deltasync.client import daemon, delivery
from deltasync.client.channel import ask
from deltasync.client.events import Event
from deltasync.client.hints import Hints
from deltasync.client.watch import Place, Source
from deltasync.config import Settings

SECONDS = 40.0
BACKOFF_SECONDS_MAX = 1.0
"""Tests ask an absent server more often than a user's watcher does."""
PROGRAM = """
import json, sys
from pathlib import Path
from deltasync.client import daemon, delivery
from deltasync.config import Settings
settings = json.loads(sys.argv[2])
delivery.BACKOFF_SECONDS_MAX = settings.pop("backoff")
daemon.run(Path(sys.argv[1]), Settings(**settings), lambda event: print(event.json(), flush=True))
"""


@dataclass(frozen=True)
class Site:
    """A server that several tests share, each with a workspace of its own, named after its folder."""

    url: str
    data: Path

    def tree(self, base: Path) -> Path:
        """Return the plain tree of a test's workspace."""
        return self.data / "workspaces" / base.name / "tree"


@contextmanager
def site(folder: Path) -> Iterator[Site]:
    """Serve a fresh data folder while the block runs."""
    with serving(folder / "data") as served:
        yield Site(served.url, served.data)


class Listening:
    """A watcher that is listened to."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.events: list[dict[str, Any]] = []
        self._news = threading.Condition()

    def why(self) -> str:
        """Say what a watcher that ended left behind."""
        raise NotImplementedError

    def hear(self, event: dict[str, Any]) -> None:
        """Take an event."""
        with self._news:
            self.events.append(event)
            self._news.notify_all()

    def until(self, is_it: Callable[[dict[str, Any]], bool], since: int = 0) -> dict[str, Any]:
        """Wait for an event, among those from number `since` on."""
        found: list[dict[str, Any]] = []

        def is_there() -> bool:
            found[:] = [event for event in self.events[since:] if is_it(event) or event["event"] == "ended"]
            return bool(found)

        with self._news:
            assert self._news.wait_for(is_there, SECONDS), f"it did not happen: {self.events}"
        assert found[0]["event"] != "ended" or is_it(found[0]), f"the watcher ended: {self.why()}"
        return found[0]

    def heard(self, what: str, since: int = 0) -> dict[str, Any]:
        """Wait for an event of a kind."""
        return self.until(lambda event: event["event"] == what, since)

    def ask(self, verb: str, **arguments: Any) -> dict[str, Any]:
        """Ask, and insist on an answer."""
        answer = ask(self.root, verb, timeout=SECONDS, **arguments)
        assert answer is not None, self.why()
        return answer

    def until_same(self) -> None:
        """Wait, asking the watcher nothing, until what it sends by itself makes the server's plain tree equal."""
        while True:
            with self._news:
                seen = len(self.events)
            sent = [event for event in self.events[:seen] if event["event"] == "sent"]
            if sent and self._is_same(sent[-1]):
                return
            self.heard("sent", seen)

    def _is_same(self, sent: Mapping[str, Any]) -> bool:
        """Tell whether the server's plain tree, once it holds the bundle that was sent, is the folder."""
        url = self.heard("watching")["url"]
        query = f"tree_sequence={sent['sequence']}&wait={SECONDS:g}"
        with urllib.request.urlopen(f"{url}/api/v1/workspaces/{sent['workspace']}?{query}") as answer:
            tree = Path(json.load(answer)["tree_path"])
        return folders.listing(self.root) == folders.listing(tree)

    def flush(self, **arguments: Any) -> dict[str, Any]:
        """Flush and return the push's report."""
        answer = self.ask("flush", **arguments)
        assert answer["ok"], answer
        report: dict[str, Any] = answer["report"]
        return report


class Process(Listening):
    """One `daemon.run` in a process of its own."""

    def __init__(self, root: Path, **settings: Any) -> None:
        super().__init__(root)
        self.errors = root.with_name(root.name + ".watcher.log")
        words = json.dumps({"backoff": BACKOFF_SECONDS_MAX, **settings})
        with self.errors.open("ab") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(root), words], stdout=subprocess.PIPE, stderr=stderr, text=True
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.hear(json.loads(line))
        self.hear({"event": "ended"})

    def why(self) -> str:
        return self.errors.read_text()

    def signal(self, number: signal.Signals) -> None:
        """Send the process a signal."""
        self.process.send_signal(number)

    def close(self) -> None:
        """End the process, whatever it does."""
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        try:
            self.process.wait(SECONDS)
        finally:
            self.process.kill()
            self.process.wait()
            self._reader.join(SECONDS)


class Inside(Listening):
    """The watch loop in a thread of this process, with a source of events of the test's choice."""

    def __init__(self, root: Path, source: Callable[[Place, Hints], Source] | None = None, **settings: Any) -> None:
        super().__init__(root)
        self.error: Exception | None = None
        self.sources: list[Any] = []
        self._settings, self._open = Settings(**{"settle_seconds": 0.3, **settings}), source
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        def tell(event: Event) -> None:
            assert event.line().endswith(event.sentence)
            self.hear(json.loads(event.json()))

        try:
            daemon.run(self.root, self._settings, tell, open_source=self._opened if self._open else None)
        except Exception as error:  # noqa: BLE001
            self.error = error
        finally:
            self.hear({"event": "ended"})

    def _opened(self, place: Place, hints: Hints) -> Source:
        assert self._open is not None
        source = self._open(place, hints)
        self.sources.append(source)
        return source

    def why(self) -> str:
        return repr(self.error)

    def close(self) -> None:
        """Ask the loop to end, and wait for it."""
        if self._thread.is_alive():
            ask(self.root, "stop", timeout=SECONDS)
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()


@contextmanager
def at_home(folder: Path) -> Iterator[None]:
    """Keep the client id and the sockets of the block below a folder, for this process and those it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELTASYNC_HOME", str(folder / "home"))
        patch.setenv("XDG_RUNTIME_DIR", str(folder / "run"))
        patch.setattr(delivery, "BACKOFF_SECONDS_MAX", BACKOFF_SECONDS_MAX)
        yield


@contextmanager
def process(root: Path, **settings: Any) -> Iterator[Process]:
    """Watch a folder from another process while the block runs."""
    watcher = Process(root, **settings)
    try:
        watcher.heard("watching")
        yield watcher
    finally:
        watcher.close()


@contextmanager
def inside(root: Path, source: Callable[[Place, Hints], Source] | None = None, **settings: Any) -> Iterator[Inside]:
    """Watch a folder from a thread of this process while the block runs."""
    watcher = Inside(root, source, **settings)
    try:
        watcher.heard("watching")
        yield watcher
    finally:
        watcher.close()


def assert_in_step(watcher: Listening, data: Path) -> dict[str, Any]:
    """Flush, then compare the watched folder with the server's plain tree, byte by byte."""
    report = watcher.flush()
    folders.assert_same(watcher.root, data / "workspaces" / report["workspace"] / "tree")
    return report
