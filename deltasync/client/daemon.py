"""The watch loop: one thread that owns the state, looks when something changed, and sends what differs."""

from __future__ import annotations

import contextlib
import os
import queue
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from deltasync.client.channel import Request, ask, failure, open_channel, socket_path
from deltasync.client.events import Event, Fact, What
from deltasync.core.errors import DeltasyncError, GuardStopped, NoSpace, RootUnavailable, UsageError
from deltasync.core.names import RESERVED, shown

if TYPE_CHECKING:
    from deltasync.client.lookout import OpenSource
    from deltasync.client.state import State
    from deltasync.config import Settings

__all__ = ["ask", "run"]

Listener = Callable[[Event], None]

RETURN_SECONDS = 2.0
"""How often to ask whether a vanished folder is back."""
JUMP_SECONDS = 10.0
"""A loop that wakes so much too late was stopped, and the world went on without it."""
STOP_SECONDS = 5.0
"""How long a stop may take, at worst while a server does not answer; the state is safe at every moment."""
WAITING_SECONDS = 5.0
"""After how long a file that is still being written is worth a word."""
SAID_MAX = 20
"""How many files of one kind are said one by one."""
SHOWN_MAX = 1_000
"""How many problems and waiting files an answer names."""


def run(root: Path, settings: Settings, listener: Listener, *, open_source: OpenSource | None = None) -> None:
    """Watch a workspace until a signal or the stop verb ends it; everything that happens is told to `listener`.

    Raises what cannot pass by itself: a folder, state or server that cannot be used, or another owner.
    """
    from deltasync.client.watch import open_source as best_source

    control = Control()
    with control.signals():
        watching = _Watching(root, settings, listener, control, open_source or best_source)
        try:
            watching.run()
        finally:
            control.release()


class Control:
    """What reaches the loop from outside: wake-ups, the wish to stop, and questions that only the loop can answer."""

    def __init__(self) -> None:
        """Start without any."""
        self.calls: queue.SimpleQueue[Call] = queue.SimpleQueue()
        self.is_stopping = False
        self._is_interruptible = self._has_signals = self._is_released = False
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)
        self._last_resort: threading.Timer | None = None

    def wake(self) -> None:
        """Make the loop go round; safe in any thread and in a signal handler."""
        with contextlib.suppress(OSError):  # a full pipe wakes as well
            self._sender.send(b"!")

    def rest(self, seconds: float) -> None:
        """Wait for a wake-up, at most so long."""
        select.select([self._receiver], [], [], max(0.0, seconds))
        with contextlib.suppress(BlockingIOError):
            while self._receiver.recv(4096):
                pass

    def stop(self, *_: object) -> None:
        """Ask the loop to end; it does within seconds, whatever it is doing."""
        self.is_stopping = True
        self.wake()
        if not self._has_signals:
            return
        if self._last_resort is None:
            self._last_resort = threading.Timer(STOP_SECONDS, os._exit, (0,))
            self._last_resort.daemon = True
            self._last_resort.start()
        if threading.current_thread() is not threading.main_thread():
            os.kill(os.getpid(), signal.SIGTERM)
        elif self._is_interruptible:
            self._is_interruptible = False
            raise Stopped

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Stop on SIGTERM and SIGINT; without effect outside the main thread, where signals do not arrive."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.stop) for number in (signal.SIGTERM, signal.SIGINT)}
        self._has_signals = True
        try:
            yield
        finally:
            self._has_signals = False
            for number, handler in before.items():
                signal.signal(number, handler)
            if self._last_resort is not None:
                self._last_resort.cancel()

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let a stop break off the block, which may take long and leaves the state whole at any moment."""
        self._is_interruptible = True
        try:
            if self.is_stopping:
                raise Stopped
            yield
        finally:
            self._is_interruptible = False

    def call(self, request: Request) -> dict[str, Any] | None:
        """Have the loop answer a question, and wait for it; None when the loop ended."""
        asked = Call(request)
        self.calls.put(asked)
        if self._is_released:
            return None
        self.wake()
        asked.is_answered.wait()
        return asked.answer

    def release(self) -> None:
        """Let everybody go who still waits for an answer."""
        self._is_released = True
        with contextlib.suppress(queue.Empty):
            while True:
                self.calls.get_nowait().reply(None)


class Stopped(BaseException):
    """Breaks off what the loop is doing; not an error, so that nothing takes it for one."""


@dataclass(slots=True)
class Call:
    """A question on its way to the loop and back."""

    request: Request
    answer: dict[str, Any] | None = None
    is_answered: threading.Event = field(default_factory=threading.Event)

    def reply(self, answer: dict[str, Any] | None) -> None:
        """Give the answer to whoever waits."""
        self.answer = answer
        self.is_answered.set()


class FlushArguments(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What flush may be asked with."""

    scan: bool = False
    """Look at everything, not only at what is dirty."""
    url: str | None = None
    """The server that the caller means; refused when it is another than the watcher's."""
    allow_mass_delete: bool = False
    take_over: bool = False
    wait: float = 300.0
    """How many seconds to wait for the server's plain tree."""


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
        channel = open_channel(self._root, self._answer)
        barrier = socket_path(self._root).with_suffix(".barrier")
        try:
            while state is not None:
                barrier.mkdir(mode=0o700, exist_ok=True)
                with contextlib.closing(state):
                    self._watch(state, barrier)
                state = None if self.control.is_stopping else self._await_return()
            self.say(What.STOPPED, "stopped; what was not sent is kept and goes on with the next start")
        finally:
            if channel is not None:
                channel.close()
            with contextlib.suppress(OSError):
                barrier.rmdir()

    def say(self, what: What, sentence: str, /, **facts: Fact) -> None:
        self._listener(Event(at=_now(), event=what, sentence=sentence, facts=facts))

    def publish(self, **members: Any) -> None:
        self._snapshot = {**self._snapshot, **members}

    def _open_state(self) -> State:
        from deltasync.client.state import State

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
        watcher = Watcher(self, state, self._settings, barrier=barrier, open_source=self._open_source)
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
        self.publish(doing="unavailable")
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
            with contextlib.suppress(RootUnavailable):
                state = self._open_state()
                self.say(What.AVAILABLE, f"{shown(str(self._root))} is there again")
                return state
        return None

    def _refuse_calls(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self.control.calls.get_nowait().reply(failure(_gone(self._root)))

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


class Watcher:
    """Watches one workspace with one open state, until it is told to stop or the state's folder goes away."""

    def __init__(
        self, watching: _Watching, state: State, settings: Settings, *, barrier: Path, open_source: OpenSource
    ) -> None:
        """Begin to hear of changes; look at nothing yet."""
        from deltasync.client.delivery import Delivery
        from deltasync.client.lookout import Lookout
        from deltasync.client.push import PushOptions

        self._watching, self._control, self._say = watching, watching.control, watching.say
        self._state, self._settings = state, settings
        options = PushOptions(
            workspace=settings.workspace,
            allow_mass_delete=settings.allow_mass_delete,
            take_over=settings.take_over,
            outbox_limit=settings.outbox_limit_bytes,
            keep_sent_seconds=settings.keep_sent_seconds,
        )
        wake = self._control.wake
        self._delivery = Delivery(state, settings, options, wake=wake, say=self._say, rescan=self._look_again)
        self._lookout = Lookout(state, settings, barrier=barrier, wake=wake, say=self._say, open_source=open_source)
        self._database = _identity(state)
        self._problems: dict[str, str] = {}
        self._waited: dict[str, float] = {}
        """Since when each file that is still being written has been waited for."""
        self._long: set[str] = set()
        self._obstacle: str | None = None
        self._sleep = _suspended_seconds()

    def run(self) -> None:
        """Go round: answer, look, send, rest."""
        to = f" to {self._delivery.url}" if self._delivery.url else ""
        self._say(What.WATCHING, f"watching {shown(str(self._state.root))}{to}", url=self._delivery.url)
        while not self._control.is_stopping:
            with contextlib.suppress(queue.Empty):
                while True:
                    self._reply(self._control.calls.get_nowait())
            self._go_round()
            self._publish()
            if _identity(self._state) != self._database:
                self._meet(What.UNAVAILABLE, _gone(self._state.root))
                return
            self._rest()

    def close(self) -> None:
        """Stop hearing and asking."""
        self._lookout.close()
        self._delivery.close()

    def live(self) -> dict[str, Any]:
        """Return what changes from moment to moment; called from other threads."""
        now, lookout, delivery = time.monotonic(), self._lookout, self._delivery
        waiting = lookout.hints.waiting()[:SHOWN_MAX]
        progress = delivery.progress
        return {
            "scan_age_seconds": None if lookout.looked_at is None else round(now - lookout.looked_at, 3),
            "waiting": [
                {
                    "path": shown(each.path),
                    "size": each.size,
                    "bytes_per_second": round(each.bytes_per_second),
                    "seconds": round(now - self._waited.get(each.path, now), 1),
                }
                for each in waiting
            ],
            "offline": None if delivery.offline is None else msgspec.to_builtins(delivery.offline),
            "read": {"files": lookout.read[0], "bytes": lookout.read[1]} if lookout.read[0] else None,
            "progress": None if progress is None else msgspec.to_builtins(progress),
        }

    def _go_round(self) -> None:
        try:
            if time.monotonic() >= self._lookout.due_at():
                self._watching.publish(doing="looking")
                with self._control.interruptible():
                    self._lookout.look()
                self._clear()
                self._tell_files()
            if self._obstacle is None and time.monotonic() >= self._delivery.due_at():
                self._watching.publish(doing="sending")
                with self._control.interruptible():
                    self._delivery.deliver()
                self._tell_files()
        except RootUnavailable as error:
            self._meet(What.UNAVAILABLE, error)
        except GuardStopped as error:
            self._meet(What.GUARD, error)
        except NoSpace as error:
            self._meet(What.TROUBLE, error)

    def _meet(self, what: What, error: DeltasyncError) -> None:
        """Say once what keeps us from looking; it is tried again until it passes."""
        if self._obstacle is None:
            self._say(what, error.sentence, code=error.code)
        self._obstacle = error.sentence

    def _clear(self) -> None:
        if self._obstacle is not None:
            self._say(What.AVAILABLE, f"{shown(str(self._state.root))} can be looked at again")
            self._obstacle = None

    def _look_again(self, folders: Collection[str]) -> None:
        self._lookout.look_again(folders)

    def _reply(self, call: Call) -> None:
        try:
            call.reply(self._flush(msgspec.convert(call.request.arguments, FlushArguments)))
        except msgspec.ValidationError as error:
            call.reply(failure(UsageError(f"flush does not understand this: {error}")))
        except DeltasyncError as error:
            call.reply(failure(error))
        except BaseException:
            call.reply(None)
            raise

    def _flush(self, asked: FlushArguments) -> dict[str, Any]:
        """Bring everything that was written before the question to the server; the answer is the push's report."""
        if asked.url is not None and not self._delivery.is_for(asked.url):
            watched = shown(self._delivery.url or "no server")
            raise UsageError(f"the watcher of this folder sends to {watched}, not to {shown(asked.url)}; stop it first")
        with self._control.interruptible():
            self._lookout.catch_up()
            self._lookout.look(everything=asked.scan, is_asked=True, allow_emptied=asked.allow_mass_delete)
            self._clear()
            report = self._delivery.flush(
                allow_mass_delete=asked.allow_mass_delete, take_over=asked.take_over, wait=asked.wait
            )
        self._tell_files()
        looked_at = self._lookout.looked_at
        return {
            "ok": True,
            "report": msgspec.to_builtins(report),
            "url": self._delivery.url,
            "scan_age_seconds": None if looked_at is None else round(time.monotonic() - looked_at, 3),
            "coverage": msgspec.to_builtins(self._lookout.coverage()),
        }

    def _tell_files(self) -> None:
        """Say which files became a problem, which are none any longer, and which keep us waiting."""
        known = self._state.problems()
        problems = {each.path: each.reason for each in known if not each.waiting}
        problems |= self._delivery.left_out(each.path for each in known)
        gone = sorted(self._problems.keys() - problems.keys())
        self._tell_each(
            What.PROBLEM, {path: problems[path] for path in sorted(problems.keys() - self._problems.keys())}
        )
        self._tell_each(What.SOLVED, dict.fromkeys(gone, "is no problem any more"))
        self._problems = problems
        now, waited = time.monotonic(), self._waited
        self._waited = {each.path: waited.get(each.path, now) for each in self._lookout.hints.waiting()}
        long = {path for path, began in self._waited.items() if now - began >= WAITING_SECONDS}
        self._tell_each(What.WAITING, {shown(path): "is still being written" for path in sorted(long - self._long)})
        self._long = long

    def _tell_each(self, what: What, files: Mapping[str, str]) -> None:
        """Say something of some files; of very many, the first ones and how many more there are."""
        for path, reason in islice(files.items(), SAID_MAX):
            self._say(what, f"{path}: {reason}", path=path, reason=reason)
        if len(files) > SAID_MAX:
            more = len(files) - SAID_MAX
            self._say(what, f"and {more} more; `deltasync status` tells about them", more=more)

    def _publish(self) -> None:
        from deltasync.client import status

        local = status.local(self._state)
        delivery = self._delivery
        self._watching.publish(
            doing="idle" if self._obstacle is None else "unavailable",
            obstacle=self._obstacle,
            url=delivery.url,
            local=msgspec.to_builtins(local),
            coverage=msgspec.to_builtins(self._lookout.coverage()),
            scan_seconds=round(self._lookout.look_seconds, 3),
            guard=delivery.guard,
            full=delivery.full,
            trouble=delivery.trouble,
            problems=[{"path": path, "reason": reason} for path, reason in sorted(self._problems.items())[:SHOWN_MAX]],
        )

    def _rest(self) -> None:
        due = self._lookout.due_at()
        if self._obstacle is None:
            due = min(due, self._delivery.due_at())
        began = time.monotonic()
        seconds = min(max(0.0, due - began), 3600.0)
        self._control.rest(seconds)
        slept, self._sleep = _suspended_seconds() - self._sleep, _suspended_seconds()
        missed = max(slept, time.monotonic() - began - seconds)
        if missed > JUMP_SECONDS:
            self._say(What.RESCAN, f"nothing ran here for {missed:.0f} s; looking at everything")
            self._lookout.hints.everything()
            self._delivery.hurry()


def _identity(state: State) -> tuple[int, int] | None:
    try:
        status = (state.folder / "state.db").stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _gone(root: Path) -> RootUnavailable:
    return RootUnavailable(
        f"{shown(str(root))} went away, or another folder stands there; nothing is taken for deleted"
    )


def _suspended_seconds() -> float:
    """Return for how long the machine slept since it was started; 0 where that cannot be known."""
    if not hasattr(time, "CLOCK_BOOTTIME"):
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)


def _now() -> str:
    return datetime.now(UTC).astimezone().isoformat(timespec="seconds")
