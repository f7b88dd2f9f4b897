"""A running watcher: its state, its socket, its signals; opened again when the folder went away and came back."""

from __future__ import annotations

import contextlib
import os
import queue
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from msgspec import structs

from deltasync.client import watch
from deltasync.client.channel import Request, ask, failure, open_channel, socket_path
from deltasync.client.control import Control, Stopped
from deltasync.client.events import Event, Fact, What
from deltasync.client.lookout import OpenSource
from deltasync.client.state import State
from deltasync.client.watcher import Watcher, gone
from deltasync.config import Settings
from deltasync.core.errors import AlreadyRunning, RootUnavailable, UsageError
from deltasync.core.names import RESERVED, shown

__all__ = ["ask", "run"]

Listener = Callable[[Event], None]

RETURN_SECONDS = 2.0
"""How often to ask whether a vanished folder is back."""


def run(root: Path, settings: Settings, listener: Listener, *, open_source: OpenSource | None = None) -> None:
    """Watch a workspace until a signal or the stop verb ends it; everything that happens is told to `listener`.

    Raises what cannot pass by itself: a folder, state or server that cannot be used, or another owner.
    """
    control = Control()
    with control.signals():
        watching = _Watching(root, settings, listener, control, open_source or watch.open_source)
        try:
            watching.run()
        finally:
            control.release()


class _Watching:
    """One call of `run`: opens the state, again when its folder went and came back, and answers questions."""

    def __init__(
        self, root: Path, settings: Settings, listener: Listener, control: Control, open_source: OpenSource
    ) -> None:
        self._root, self._settings, self._listener = root, settings, listener
        self.control, self._open_source = control, open_source
        self._since = _now()
        self._watcher: Watcher | None = None
        self._snapshot: dict[str, Any] = {"doing": "starting"}

    def run(self) -> None:
        state: State | None = self._open_state()
        assert state is not None
        self._root = state.root
        barrier = socket_path(self._root).with_suffix(".barrier")
        with contextlib.ExitStack() as whole:
            whole.callback(state.close)  # once more does no harm
            channel = open_channel(self._root, self._answer)  # only now: the state's lock says that it is ours
            if channel is not None:
                whole.callback(channel.close)
            whole.callback(_remove_folder, barrier)
            while state is not None:
                barrier.mkdir(mode=0o700, exist_ok=True)
                with contextlib.closing(state):
                    self._watch(state, barrier)
                # Allowed for what the user saw when the watcher began, not for a folder that comes back other.
                self._settings = structs.replace(self._settings, allow_mass_delete=False, take_over=False)
                state = None if self.control.is_stopping else self._await_return()
            self.say(What.STOPPED, "stopped; what was not sent is kept and goes on with the next start")

    def say(self, what: What, sentence: str, /, **facts: Fact) -> None:
        self._listener(Event(at=_now(), event=what, sentence=sentence, facts=facts))

    def publish(self, **members: Any) -> None:
        self._snapshot = {**self._snapshot, **members}

    def _open_state(self) -> State:
        settings = self._settings
        state = State.open(
            self._root,
            state_dir=Path(settings.state_dir) if settings.state_dir else None,
            workspace=settings.workspace,
            take_over=settings.take_over,
        )
        for note in state.notes:
            self.say(What.NOTE, note)
        return state

    def _watch(self, state: State, barrier: Path) -> None:
        watcher = Watcher(
            state,
            self._settings,
            self.control,
            barrier=barrier,
            open_source=self._open_source,
            say=self.say,
            publish=self.publish,
        )
        self._watcher = watcher
        try:
            with contextlib.suppress(Stopped):
                watcher.run()
        finally:
            self._watcher = None
            watcher.close()

    def _await_return(self) -> State | None:
        """Wait until the folder is there again, with its state or with content; None when it is time to stop.

        An empty folder without state may be the bare place of something that was unmounted, and one that changes may
        be in the middle of being deleted: nothing is made there.
        """
        self.publish(doing="unavailable", obstacle=gone(self._root).sentence)
        before, next_at = None, time.monotonic() + RETURN_SECONDS
        while not self.control.is_stopping:
            self.control.rest(next_at - time.monotonic())
            self._refuse_calls()
            if time.monotonic() < next_at:
                continue
            next_at = time.monotonic() + RETURN_SECONDS
            seen = self._seen()
            if seen is None or seen != before:
                before = seen
                continue
            with contextlib.suppress(RootUnavailable, AlreadyRunning):
                state = self._open_state()
                self.say(What.AVAILABLE, f"{shown(str(self._root))} is there again")
                return state
        return None

    def _refuse_calls(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self.control.calls.get_nowait().reply(failure(gone(self._root)))

    def _seen(self) -> tuple[int, int, int] | None:
        """Return what tells one look at a folder that can be watched from the next; None for one that cannot."""
        try:
            status, names = self._root.stat(), {path.name for path in self._root.iterdir()}
        except OSError:
            return None
        has_state = not self._settings.state_dir and (self._root / RESERVED / "state.db").exists()
        if not has_state and not names - {RESERVED}:
            return None
        return status.st_dev, status.st_ino, status.st_mtime_ns

    def _answer(self, request: Request) -> dict[str, Any] | None:
        """Answer a question, in the thread of whoever asks."""
        if request.verb == "status":
            return self._status()
        if request.verb == "stop":
            self.control.stop()
            return {"ok": True}
        if request.verb == "flush":
            return self.control.call(request)
        raise UsageError(f"the watcher does not know {shown(request.verb)!r}; it answers flush, status and stop")

    def _status(self) -> dict[str, Any]:
        watcher, snapshot = self._watcher, self._snapshot
        live = watcher.live() if watcher is not None else {}
        return {"ok": True, "pid": os.getpid(), "root": str(self._root), "since": self._since, **snapshot, **live}


def _remove_folder(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.rmdir()


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
