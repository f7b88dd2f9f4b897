"""A real watcher for tests: its own process, its events as they come, and questions over its socket."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import folders
import pytest

from deltasync.client.channel import ask

SECONDS = 40.0
PROGRAM = """
import json, sys
from pathlib import Path
from deltasync.client import daemon
from deltasync.config import Settings
settings = json.loads(sys.argv[2])
daemon.run(Path(sys.argv[1]), Settings(**settings), lambda event: print(event.json(), flush=True))
"""


class Watcher:
    """One `daemon.run` in a process of its own."""

    def __init__(self, root: Path, environment: Mapping[str, str] | None = None, **settings: Any) -> None:
        self.root = root
        self.events: list[dict[str, Any]] = []
        self._news = threading.Condition()
        self.errors = root.with_name(root.name + ".watcher.log")
        with self.errors.open("ab") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(root), json.dumps(settings)],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**os.environ, **(environment or {})},
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            with self._news:
                self.events.append(json.loads(line))
                self._news.notify_all()
        with self._news:
            self.events.append({"event": "ended"})
            self._news.notify_all()

    def until(self, is_it: Callable[[dict[str, Any]], bool], since: int = 0) -> dict[str, Any]:
        """Wait for an event, among those from number `since` on."""
        found: list[dict[str, Any]] = []

        def is_there() -> bool:
            found[:] = [event for event in self.events[since:] if is_it(event) or event["event"] == "ended"]
            return bool(found)

        with self._news:
            assert self._news.wait_for(is_there, SECONDS), f"it did not happen: {self.events}"
        assert found[0]["event"] != "ended" or is_it(found[0]), f"the watcher ended: {self.errors.read_text()}"
        return found[0]

    def heard(self, what: str, since: int = 0) -> dict[str, Any]:
        """Wait for an event of a kind."""
        return self.until(lambda event: event["event"] == what, since)

    def ask(self, verb: str, **arguments: Any) -> dict[str, Any]:
        """Ask, and insist on an answer."""
        answer = ask(self.root, verb, timeout=SECONDS, **arguments)
        assert answer is not None, self.errors.read_text()
        return answer

    def until_same(self, data: Path, since: int = 0) -> None:
        """Wait, asking nothing, until what the watcher sends by itself makes the server's plain tree equal."""
        tree = data / "workspaces" / self.root.name / "tree"
        while True:
            with self._news:
                seen = len(self.events)
            if folders.listing(self.root) == folders.listing(tree):
                return
            self.until(lambda event: event["event"] == "sent", max(seen, since))

    def flush(self, **arguments: Any) -> dict[str, Any]:
        """Flush and return the push's report."""
        answer = self.ask("flush", **arguments)
        assert answer["ok"], answer
        report: dict[str, Any] = answer["report"]
        return report

    def stop(self) -> float:
        """Ask the process to end and return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(SECONDS)

    def close(self) -> None:
        """End the process, whatever it does."""
        self.process.terminate()
        try:
            self.process.wait(SECONDS)
        finally:
            self.process.kill()
            self.process.wait()
            self._reader.join(SECONDS)


@contextmanager
def at_home(folder: Path) -> Iterator[None]:
    """Keep the client id and the sockets of the block below a folder, for this process and those it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELTASYNC_HOME", str(folder / "home"))
        patch.setenv("XDG_RUNTIME_DIR", str(folder / "run"))
        yield


@contextmanager
def watching(root: Path, environment: Mapping[str, str] | None = None, **settings: Any) -> Iterator[Watcher]:
    """Watch a folder while the block runs; the block begins when the first look is done."""
    watcher = Watcher(root, environment, **settings)
    try:
        watcher.heard("watching")
        yield watcher
    finally:
        watcher.close()


def assert_in_step(watcher: Watcher, data: Path) -> dict[str, Any]:
    """Flush, then compare the watched folder with the server's plain tree, byte by byte."""
    report = watcher.flush()
    folders.assert_same(watcher.root, data / "workspaces" / report["workspace"] / "tree")
    return report
