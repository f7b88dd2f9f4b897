"""When to seal and send: at once while the server answers, into bundle files while it does not."""

from __future__ import annotations

import math
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from deltasync.client import outbox
from deltasync.client.address import normal_url
from deltasync.client.events import Fact, Say, What
from deltasync.client.push import Progress, Pusher, PushOptions, PushReport
from deltasync.client.ssh import SshOptions
from deltasync.client.transport import open_transport
from deltasync.core.errors import (
    ContentMissing,
    DeltasyncError,
    GuardStopped,
    HostBusy,
    HostUnreachable,
    HostUntrusted,
    LimitExceeded,
    NoSpace,
    NotADeltasyncServer,
    Unauthorized,
)
from deltasync.core.manifest import EMPTY_ROOT

if TYPE_CHECKING:
    from deltasync.client.observation import Follower
    from deltasync.client.receiver import Transport
    from deltasync.client.state import State
    from deltasync.config import Settings

BACKOFF_SECONDS, BACKOFF_SECONDS_MAX = 0.5, 30.0
_PASSING = (NoSpace, LimitExceeded, ContentMissing)
"""Trouble that a change of the folder, of a disk or of the server can end; any other ends the watcher."""


class Offline(msgspec.Struct, frozen=True, kw_only=True):
    """Since when the server does not answer, and why."""

    since: str
    reason: str


class Delivery:
    """Brings one receiver to the observed tree for as long as a watcher runs; used by the watch loop's thread only.

    A run that leaves something undone holds the observed tree: it is repeated when that tree changes, when the server
    answers again, or, where time may help, after a while.
    """

    def __init__(
        self,
        state: State,
        settings: Settings,
        options: PushOptions,
        *,
        wake: Callable[[], None],
        say: Say,
        rescan: Callable[[Collection[str]], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Connect to nothing yet; raises UsageError for an address that is none, or another than the remembered one."""
        self._state, self._settings, self._options = state, settings, options
        self._wake, self._say, self._rescan, self._clock = wake, say, rescan, clock
        address = settings.to or outbox.head(state).url
        self._transport = self._connect(address) if address else None
        self.url = self._transport.url if self._transport else None
        outbox.check_bound(state, settings.workspace or outbox.head(state).workspace or state.root.name, self.url)
        self._probe: _Probe | None = None
        self._attempt = self._stalls = 0
        self._was_reached = outbox.head(state).acknowledged_sequence > 0
        self._is_greeted = self._transport is None
        self._held_root: bytes | None = None
        self._retry_at = -math.inf
        self._left_out: dict[str, str] = {}
        self._prepared: Pusher | None = None
        self.progress: Progress | None = None
        """How far the current run is; None between runs."""
        self.offline: Offline | None = None
        self.guard: str | None = None
        self.full: str | None = None
        self.trouble: str | None = None

    def due_at(self) -> float:
        """Tell when to deliver next: never while nothing differs, so that an idle watcher asks the server nothing."""
        if self._is_answered():
            return -math.inf
        if not self._is_undone():
            return math.inf
        return self._retry_at if self._state.observed_root() == self._held_root else -math.inf

    def prepare(self) -> None:
        """Be ready to send a part of what is looked at first, before all of it was looked at."""
        if self._is_online() and self._state.observed_root() == EMPTY_ROOT:
            self._prepared = self._pusher(self._unattended(), self._transport)

    def send_ahead(self) -> None:
        """Send what a first look has recorded so far, if that is enough for a bundle."""
        if self._prepared is not None:
            self._prepared.ahead.send_recorded()

    def follow(self, path: str, status: os.stat_result) -> Follower | None:
        """Hear that a large file is read in a first look; return what sends it meanwhile, if that may be done."""
        return self._prepared.ahead.follow(path, status) if self._prepared is not None else None

    def drop_ahead(self) -> None:
        """Stop what was sent ahead of a look that failed; what was delivered since is not concerned."""
        pusher, self._prepared = self._prepared, None
        if pusher is not None:
            pusher.__exit__(*sys.exc_info())

    def deliver(self) -> None:
        """Seal and send what differs; what may pass by itself is said, remembered and tried again."""
        if self._is_answered():
            self._stop_probe()
            self._reconnect()
        try:
            self._run(self._unattended(), is_online=self._is_online())
        except GuardStopped as error:
            before, self.guard = self.guard, error.sentence
            self._say_first(before, What.GUARD, error)
        except (HostUnreachable, HostBusy) as error:
            self._go_offline(error.sentence)
        except (
            NotADeltasyncServer,
            Unauthorized,
            HostUntrusted,
        ) as error:  # or a hotel's network
            if not self._was_reached:
                raise
            self._go_offline(error.sentence)
        except _PASSING as error:
            before, self.trouble = self.trouble, error.sentence
            self._say_first(before, What.TROUBLE, error)
        finally:
            self._hold()

    def flush(self, *, allow_mass_delete: bool, take_over: bool, wait: float, explain: bool) -> PushReport:
        """Seal and send everything now, for somebody who waits for it; raises what keeps it from being done.

        wait: how many seconds to wait for the server's plain tree. explain: say of each operation why it went out.
        """
        options = replace(
            self._options,
            allow_mass_delete=allow_mass_delete,
            take_over=take_over,
            wait=wait,
            seal_offline=False,
            explain=explain,
        )
        try:
            return self._run(options, is_online=self._transport is not None)
        except (HostUnreachable, HostBusy) as error:
            self._go_offline(error.sentence)
            raise
        except GuardStopped as error:
            before, self.guard = self.guard, error.sentence
            self._say_first(before, What.GUARD, error)
            raise
        finally:
            self._hold()

    def hurry(self) -> None:
        """Ask an absent server again soon: the machine slept, and networks change meanwhile."""
        self._attempt = self._stalls = 0
        if self._probe is not None:
            self._stop_probe()
            self._start_probe()

    def left_out(self, known: Iterable[str]) -> dict[str, str]:
        """Return the paths that the last run left out, and why, but for those that the scan knows of."""
        seen = set(known)
        return {path: reason for path, reason in self._left_out.items() if path not in seen}

    def close(self) -> None:
        """Stop asking, and let connections go."""
        self._stop_probe()
        if self._transport is not None:
            self._transport.close()

    def is_for(self, address: str) -> bool:
        """Tell whether an address, however it is spelled, is this receiver's."""
        return normal_url(address) == self.url

    def _connect(self, address: str, *, is_probe: bool = False) -> Transport:
        settings = self._settings
        return open_transport(
            address,
            bandwidth=settings.bandwidth_bytes or None,
            timeout=settings.timeout_seconds,
            # While a run waits for the server nothing is sealed, and a probe asks again anyway.
            max_retries=0 if is_probe else min(settings.max_retries, 1),
            jobs=settings.jobs,
            proxies=settings.proxy,
            insecure=settings.insecure,
            token_for=settings.token_for,
            ssh=SshOptions(settings.ssh, settings.ssh_server, connect_seconds=settings.timeout_seconds),
        )

    def _reconnect(self) -> None:
        """Read again what the book says: the token may have been rotated, or the server added anew."""
        assert self.url is not None and self._transport is not None
        before, self._transport, self._prepared = self._transport, self._connect(self.url), None
        before.close()

    def _is_undone(self) -> bool:
        here, observed = outbox.head(self._state), self._state.observed_root()
        if self._transport is None or self._probe is not None:
            return observed != here.sealed_root
        is_acknowledged = here.sealed_sequence == here.acknowledged_sequence and observed == here.acknowledged_root
        return not (is_acknowledged and self._is_greeted)

    def _is_online(self) -> bool:
        return self._transport is not None and self._probe is None

    def _unattended(self) -> PushOptions:
        return replace(self._options, seal_offline=True, wait=0.0)

    def _pusher(self, options: PushOptions, transport: Transport | None) -> Pusher:
        return Pusher(self._state, transport, options, progress=self._note, rescan=self._rescan)

    def _is_answered(self) -> bool:
        return self._probe is not None and self._probe.is_answered.is_set()

    def _hold(self) -> None:
        self.progress = None
        if not self._is_undone():
            self._held_root, self._stalls = None, 0
            return
        self._held_root = self._state.observed_root()
        waits_for_change = self.guard is not None or self.full is not None
        self._retry_at = math.inf if waits_for_change else self._clock() + _pause(self._stalls)
        self._stalls += 1

    def _run(self, options: PushOptions, *, is_online: bool) -> PushReport:
        pusher = self._prepared if is_online else None
        if pusher is None or not pusher.ahead.is_begun:
            pusher = self._pusher(options, self._transport if is_online else None)
        with pusher:
            report = pusher.run()
        known = {problem.path for problem in self._state.problems()}  # a later look tells when those have passed
        self._left_out = {each.path: each.reason for each in report.problems if each.path not in known}
        self.guard = self.trouble = None
        if report.unreachable is not None:
            self._go_offline(report.unreachable)
        elif is_online:
            self._come_online()
        if report.unreachable is None and (is_online or self._transport is None):
            # Allowed for what waited when the watcher began, not for what happens later.
            self._options = replace(self._options, take_over=False, allow_mass_delete=False)
        if report.bundles:
            self._stalls = 0
        self._tell(report, is_sent=is_online and report.unreachable is None)
        return report

    def _note(self, progress: Progress) -> None:
        self.progress = progress

    def _tell(self, report: PushReport, *, is_sent: bool) -> None:
        was_full, self.full = self.full is not None, report.waiting
        if report.waiting is not None and not was_full:
            self._say(What.FULL, report.waiting)
        if not report.bundles:
            return
        done = report.operations
        counts = {"created": done.created, "updated": done.updated, "moved": done.moved, "deleted": done.deleted}
        words = ", ".join(f"{count} {verb}" for verb, count in counts.items() if count) or "no operations"
        facts: dict[str, Fact] = {
            "workspace": report.workspace,
            "sequence": report.sequence,
            "root": report.root,
            "bundles": report.bundles,
            **counts,
            "content_bytes": report.content_bytes,
            "sent_bytes": report.sent_bytes,
            "avoided_bytes": report.avoided_bytes,
            "seconds": round(report.seconds, 3),
        }
        if is_sent:
            moved = f"{report.sent_bytes:,} bytes sent, {report.avoided_bytes:,} avoided"
            self._say(What.SENT, f"sent {report.sequence}: {words}; {moved}; root {report.root[:16]}", **facts)
        else:
            self._say(What.SEALED, f"sealed {report.sequence}: {words}; {report.pending} bundle(s) wait", **facts)

    def _say_first(self, before: str | None, what: What, error: DeltasyncError) -> None:
        if before is None:
            self._say(what, error.sentence, code=error.code)

    def _come_online(self) -> None:
        self._was_reached = self._is_greeted = True
        self._attempt = 0
        self._stop_probe()
        before, self.offline = self.offline, None
        if before is not None:
            self._say(What.ONLINE, f"the server at {self.url} answers again", url=self.url)

    def _go_offline(self, reason: str) -> None:
        if self.offline is None:
            self.offline = Offline(since=datetime.now(UTC).isoformat(timespec="seconds"), reason=reason)
            self._say(What.OFFLINE, f"{reason}; changes are sealed and wait", url=self.url, reason=reason)
        if self._probe is None:
            self._start_probe()

    def _start_probe(self) -> None:
        name = outbox.head(self._state).workspace or self._options.workspace or self._state.root.name
        assert self.url is not None
        connect = partial(self._connect, self.url, is_probe=True)
        self._probe = _Probe(connect, name, self._attempt, self._wake)

    def _stop_probe(self) -> None:
        if self._probe is not None:
            self._attempt = self._probe.attempt
            self._probe.is_stopped.set()
            self._probe = None


class _Probe:
    """Asks an absent server from a thread of its own, ever less often, until it answers."""

    def __init__(self, connect: Callable[[], Transport], name: str, attempt: int, wake: Callable[[], None]) -> None:
        """connect: asked for each attempt, because what the book says of the server may change."""
        self.attempt = attempt
        self.is_answered, self.is_stopped = threading.Event(), threading.Event()
        self._connect, self._name, self._wake = connect, name, wake
        threading.Thread(target=self._ask, name="probe", daemon=True).start()

    def _ask(self) -> None:
        while not self.is_stopped.wait(_pause(self.attempt)):
            self.attempt += 1
            try:
                with closing(self._connect()) as transport:
                    transport.workspace(self._name)
            except DeltasyncError:
                continue
            self.is_answered.set()
            self._wake()
            break


def _pause(attempt: int) -> float:
    """Return how long to wait before another attempt: exponentially longer, and never in step with other clients."""
    return min(BACKOFF_SECONDS * 2.0 ** min(attempt, 16), BACKOFF_SECONDS_MAX) * random.uniform(0.5, 1.0)
