"""Watching one workspace with one open state: look when something changed, send what differs, answer questions."""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Collection, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import msgspec

from deltasync.client import status
from deltasync.client.channel import failure
from deltasync.client.control import Call, Control
from deltasync.client.delivery import Delivery
from deltasync.client.events import Say, What
from deltasync.client.lookout import Lookout, OpenSource
from deltasync.client.receiver import PushOptions
from deltasync.client.state import State
from deltasync.config import Settings
from deltasync.core.errors import DeltasyncError, GuardStopped, NoSpace, RootUnavailable, UsageError
from deltasync.core.names import shown

JUMP_SECONDS = 10.0
"""A loop that wakes so much too late was stopped, and the world went on without it."""
WAITING_SECONDS = 5.0
"""After how long a file that is still being written is worth a word."""
SAID_MAX = 20
"""How many files of one kind are said one by one."""
SHOWN_MAX = 1_000
"""How many problems and waiting files an answer names."""


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
    explain: bool = False
    """Say of each operation why it went out."""


class Publish(Protocol):
    """Takes what `status` tells, in parts, and keeps it for whoever asks."""

    def __call__(self, **members: Any) -> None:
        """Replace some members."""


class Watcher:
    """Watches one workspace with one open state, until it is told to stop or the state's folder goes away."""

    def __init__(
        self,
        state: State,
        settings: Settings,
        control: Control,
        *,
        barrier: Path,
        open_source: OpenSource,
        say: Say,
        publish: Publish,
    ) -> None:
        """Begin to hear of changes; look at nothing yet. barrier: a folder of ours that the source may watch."""
        self._state, self._control, self._say, self._publish = state, control, say, publish
        options = PushOptions(
            workspace=settings.workspace,
            allow_mass_delete=settings.allow_mass_delete,
            take_over=settings.take_over,
            no_delete=settings.no_delete,
            delete_excluded=settings.delete_excluded,
            outbox_limit=settings.outbox_limit_bytes,
            keep_sent_seconds=settings.keep_sent_seconds,
            level=settings.level,
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
            self._tell_status()
            if _identity(self._state) != self._database:
                self._meet(What.UNAVAILABLE, gone(self._state.root))
                return
            self._rest()

    def close(self) -> None:
        """Stop hearing and asking."""
        self._lookout.close()
        self._delivery.close()

    def live(self) -> dict[str, Any]:
        """Return what changes from moment to moment, never older than what was said last; called from other threads."""
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
            "obstacle": self._obstacle,
            "guard": delivery.guard,
            "full": delivery.full,
            "trouble": delivery.trouble,
        }

    def _go_round(self) -> None:
        try:
            if time.monotonic() >= self._lookout.due_at():
                self._publish(doing="looking")
                self._delivery.prepare()
                with self._control.interruptible():
                    self._lookout.look(recorded=self._delivery.send_ahead, follow=self._delivery.follow)
                self._clear()
                self._tell_files()
            if self._obstacle is None and time.monotonic() >= self._delivery.due_at():
                self._publish(doing="sending")
                with self._control.interruptible():
                    self._delivery.deliver()
                self._tell_files()
        except RootUnavailable as error:
            self._meet(What.UNAVAILABLE, error)
        except GuardStopped as error:
            self._meet(What.GUARD, error)
        except NoSpace as error:
            self._meet(What.TROUBLE, error)
        finally:
            self._delivery.drop_ahead()

    def _meet(self, what: What, error: DeltasyncError) -> None:
        """Say once what keeps us from looking; it is tried again until it passes."""
        before, self._obstacle = self._obstacle, error.sentence
        if before is None:
            self._say(what, error.sentence, code=error.code)

    def _clear(self) -> None:
        before, self._obstacle = self._obstacle, None
        if before is not None:
            self._say(What.AVAILABLE, f"{shown(str(self._state.root))} can be looked at again")

    def _look_again(self, folders: Collection[str]) -> None:
        self._lookout.look_again(folders)

    def _reply(self, call: Call) -> None:
        answer: dict[str, Any] | None = None
        try:
            answer = self._flush(msgspec.convert(call.request.arguments, FlushArguments))
        except msgspec.ValidationError as error:
            answer = failure(UsageError(f"flush does not understand this: {error}"))
        except DeltasyncError as error:
            answer = failure(error)
        finally:
            if answer is not None:
                self._tell_status()  # before the answer: whoever has it may ask for the status next
            call.reply(answer)

    def _flush(self, asked: FlushArguments) -> dict[str, Any]:
        """Bring everything that was written before the question to the server; the answer is the push's report."""
        if asked.url is not None and not self._delivery.is_for(asked.url):
            watched = shown(self._delivery.url or "no server")
            raise UsageError(f"the watcher of this folder sends to {watched}, not to {shown(asked.url)}; stop it first")
        with self._control.interruptible():
            self._lookout.catch_up()
            try:
                self._lookout.look(everything=asked.scan, is_asked=True, allow_emptied=asked.allow_mass_delete)
            except (RootUnavailable, GuardStopped) as error:
                self._meet(What.GUARD if isinstance(error, GuardStopped) else What.UNAVAILABLE, error)
                raise
            self._clear()
            report = self._delivery.flush(
                allow_mass_delete=asked.allow_mass_delete,
                take_over=asked.take_over,
                wait=asked.wait,
                explain=asked.explain,
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

    def _tell_status(self) -> None:
        local = status.local(self._state)
        delivery = self._delivery
        self._publish(
            doing="idle" if self._obstacle is None else "unavailable",
            url=delivery.url,
            local=msgspec.to_builtins(local),
            coverage=msgspec.to_builtins(self._lookout.coverage()),
            scan_seconds=round(self._lookout.look_seconds, 3),
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


def gone(root: Path) -> RootUnavailable:
    """Return the error that says a workspace's folder is not there."""
    return RootUnavailable(
        f"{shown(str(root))} went away, or another folder stands there; nothing is taken for deleted"
    )


def _suspended_seconds() -> float:
    """Return for how long the machine slept since it was started; 0 where that cannot be known."""
    if not hasattr(time, "CLOCK_BOOTTIME"):
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)
