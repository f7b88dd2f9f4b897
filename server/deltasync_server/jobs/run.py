"""One job on its way: its session, its command, what comes home, and its end, in a thread of its own."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from deltasync.core.errors import Cancelled, DeltasyncError, HostBusy
from deltasync.core.job_metrics import Metrics, measured
from deltasync.core.jobs import Returned, State, Word
from deltasync.disk import Folder, refusal
from deltasync_server.intake import now
from deltasync_server.jobs import returns, reuse
from deltasync_server.jobs.account import Account
from deltasync_server.jobs.admission import filled
from deltasync_server.jobs.bells import Bells
from deltasync_server.jobs.figures import COLLECTED, RUN, Stopwatch, Tally
from deltasync_server.jobs.leftovers import MARK
from deltasync_server.jobs.log import Log
from deltasync_server.jobs.process import Command, Ended, Process, Why, require_there
from deltasync_server.jobs.removal import remove_all
from deltasync_server.jobs.sandbox import Sandbox
from deltasync_server.jobs.session import INPUTS, OUTPUTS, TEMPORARY, Session, Sessions
from deltasync_server.jobs.table import JobRow, note, step
from deltasync_server.receive import Store
from deltasync_server.state import blob_rows

KEPT_SECONDS_MAX = 7 * 86_400.0
"""No session is kept longer than its job is remembered."""
ROOM_SECONDS = 300.0
"""How long a collection waits for the store to make room."""
ROOM_PAUSE_SECONDS = 0.5
END_TRIES = 600
STOPPED = "the server was stopped; run it again"
_INHERITED = ("PATH", "LANG", "LC_ALL", "TZ")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Shop:
    """What every job is worked on with."""

    store: Store
    sessions: Sessions
    logs: Path
    account: Account | None
    bells: Bells
    tally: Tally
    sandbox: Sandbox

    def step(self, job_id: str, to: State, **columns: Any) -> bool:
        """Take a job to another state, and tell those who follow it; False where it cannot be there."""
        with self.store.state.write() as db:
            is_taken = step(db, job_id, to, **columns)
        if is_taken and to.is_over:
            metrics: bytes | None = columns.get("metrics")
            self.tally.count(to, msgspec.json.decode(metrics, type=Metrics) if metrics else None)
        self.bells.ring(job_id)
        return is_taken

    def forget_session(self, job_id: str) -> None:
        """Remove a job's session, and let its inputs go."""
        self.sessions.remove(job_id)
        with self.store.state.write() as db:
            note(db, job_id, roots=b"", kinds="", keep_until=0)


class Run:
    """Works on one job; another thread may end it."""

    def __init__(self, shop: Shop, job: JobRow, gpus: list[int]) -> None:
        self.job, self.gpus = job, gpus
        self.log: Log | None = None
        self._shop = shop
        self._watch = Stopwatch(job.created_at)
        self._why = Why.ITSELF
        self._process: Process | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._is_stopping = threading.Event()

    def end(self, why: Why) -> None:
        """Have the job ended; the first reason counts."""
        with self._lock:
            if self._why is Why.ITSELF:
                self._why = why
            self._ended.set()
            if why is Why.STOPPED:
                self._is_stopping.set()
            if self._process is not None:
                self._process.end(why)

    def work(self) -> None:
        """Take the job, which is being staged, to its end; whatever fails is the job's own failure."""
        try:
            self._work()
        except Cancelled:
            self._cut_short()
        except Exception as error:  # noqa: BLE001 - a worker reports what nobody foresaw
            known = error if isinstance(error, DeltasyncError) else refusal(error)
            if known is None:
                _log.error("the job %s failed", self.job.id, exc_info=error)
            reason = known.sentence if known else "the server failed; its log says why"
            self._over(State.FAILED, reason)
        finally:
            self._tidy()

    def _surely(self, end: Callable[[], object]) -> None:
        """Record the end of the job; where the disk is full its session goes first, which may be what fills it."""
        for number in range(END_TRIES):
            try:
                end()
                return
            except Exception as error:  # noqa: BLE001 - the next start calls it lost
                _log.error("the end of the job %s could not be recorded", self.job.id, exc_info=error)
            if not number:
                self._shop.sessions.remove(self.job.id)
            elif self._is_stopping.wait(ROOM_PAUSE_SECONDS):
                return

    def _work(self) -> None:
        session = self._shop.sessions.make(self.job, self._go_on)
        with session.folder:
            if not self._shop.step(self.job.id, State.RUNNING):
                return
            key = self._result_key(session)
            if key is not None and self._is_reused(key):
                return
            self._watch.begin(RUN)
            ended = self._run(session)
            self._watch.begin(COLLECTED)
            self._look_at_links(session)
            if ended.why is not Why.ITSELF:
                self._cut_short(exit_code=ended.exit_code, signal=ended.signal)
                return
            self._shop.step(self.job.id, State.COLLECTING, exit_code=ended.exit_code, signal=ended.signal)
            most = self._shop.store.config.job_file_bytes
            returned = self._patiently(
                lambda: returns.collect(
                    *(self._shop.store, self.job, session.folder, session.staged),
                    file_bytes=most,
                    should_stop=self._go_on,
                    staged_ns=session.staged_ns,
                    is_well=ended.exit_code == 0,
                )
            )
        self._returned(returned, **reuse.remembered(key, returned, ended.exit_code))
        if key is not None:
            with self._shop.store.state.write() as db:
                reuse.forget_oldest(db, self.job.tenant)

    def _patiently(self, collect: Callable[[], Returned | None]) -> Returned | None:
        """Collect, again and again while the store makes room: what a command took hours for is not thrown away."""
        deadline = time.monotonic() + ROOM_SECONDS
        while True:
            try:
                return collect()
            except HostBusy:
                self._go_on()
                if time.monotonic() >= deadline:
                    raise
                self._ended.wait(ROOM_PAUSE_SECONDS)

    def _returned(self, returned: Returned | None, **columns: Any) -> None:
        """End the job with what it returned, unless somebody cancelled it meanwhile: then nothing comes home."""
        if self._why is not Why.ITSELF:
            returns.release(self._shop.store, self.job.tenant, returned)
            self._cut_short()
            return
        self._over(State.DONE, returned=returned, **columns)

    def _result_key(self, session: Session) -> bytes | None:
        """Return what an equal job would have as well; None where the result is not to be reused (spec J-78)."""
        request = self.job.request
        if not request.reuse:
            return None
        version = self._version(session, request.tool_version) if request.tool_version else b""
        inherited = {os.fsencode(name): os.fsencode(os.environ[name]) for name in _INHERITED if name in os.environ}
        with self._shop.store.state.read() as db:
            return reuse.key_of(db, self.job, version, inherited)

    def _version(self, session: Session, words: list[Word]) -> bytes:
        """Return what a tool says of its version, and how it ended."""
        path = self._shop.logs / f"{self.job.id}.version"
        try:
            with contextlib.closing(Log(path, reuse.VERSION_BYTES)) as log:
                ended = self._executed(session, words, log)
            self._look_at_links(session)
            return reuse.said(path) + repr((ended.exit_code, ended.signal)).encode()
        finally:
            with Folder.open(self._shop.logs) as folder:
                remove_all(folder, path.name)

    def _is_reused(self, key: bytes) -> bool:
        """Give the result of an equal job again, if there is one (spec J-79)."""
        if self._why is not Why.ITSELF:
            self._cut_short()
            return True
        former = reuse.take(self._shop.store, self.job, key, self._shop.logs)
        if former is None:
            return False
        self.log = Log(self._shop.logs / self.job.id, self._shop.store.config.job_log_bytes)
        with contextlib.closing(self.log):
            reuse.replay(self._shop.logs / former.id, self.log)
        self._shop.step(self.job.id, State.COLLECTING, exit_code=0, reused=former.id)
        self._returned(former.returned)
        return True

    def _go_on(self) -> None:
        """Raise Cancelled where somebody has ended the job."""
        if self._why is not Why.ITSELF:
            raise Cancelled("the job was ended")

    def _run(self, session: Session) -> Ended:
        self.log = Log(self._shop.logs / self.job.id, self._shop.store.config.job_log_bytes)
        with contextlib.closing(self.log):
            return self._executed(session, self.job.request.argv, self.log)

    def _executed(self, session: Session, words: list[Word], log: Log) -> Ended:
        request = self.job.request
        seconds = request.timeout_seconds or self._shop.store.config.job_seconds
        inputs, outputs = (os.fsencode(session.path / top) for top in (INPUTS, OUTPUTS))
        argv, environment = [filled(word, inputs, outputs) for word in words], self._environment(session)
        is_shut_in = request.sandbox or self._shop.store.config.sandbox  # spec J-86
        if is_shut_in:
            require_there(argv[0], environment, session.work)
            argv = self._shop.sandbox.wrapped(argv, session.path, has_network=request.network)
        command = Command(
            self.job.id, argv, environment, session.work, self._shop.account, seconds, is_shut_in=is_shut_in
        )
        process = Process(command, log, lambda: self._shop.bells.ring(self.job.id))
        with self._lock:
            self._process = process
            if self._why is not Why.ITSELF:
                process.end(self._why)
        ended = process.run(self._note_process)
        if ended.why is not Why.ITSELF:
            self.end(ended.why)
        return ended

    def _note_process(self, pid: int, start: str | None) -> None:
        """Write down who has to be killed if this server dies (spec J-45)."""
        with self._shop.store.state.write() as db:
            note(db, self.job.id, pid=pid, pid_start=start)

    def _environment(self, session: Session) -> dict[bytes, bytes]:
        """Return the environment of the command (spec J-46)."""
        inputs, outputs = (os.fsencode(session.path / top) for top in (INPUTS, OUTPUTS))
        found = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        found |= {"HOME": str(session.work), "TMPDIR": str(session.work / TEMPORARY)}
        own = {MARK: self.job.id}
        if self.gpus:
            own |= {"CUDA_VISIBLE_DEVICES": ",".join(map(str, self.gpus)), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        asked = {each.name.encode(): filled(each.value, inputs, outputs) for each in self.job.request.environment}
        return _encoded(found.items()) | asked | _encoded(own.items())

    def _look_at_links(self, session: Session) -> None:
        """Read the blobs that the command has changed through a link, if any, before anyone gets them (spec J-43)."""
        if session.linked:
            store = self._shop.store
            with store.state.read() as db:
                rows = blob_rows(db, session.linked)
            if changed := store.trees.changed(rows):
                _log.warning("the job %s has written to %d blobs, or their attributes", self.job.id, len(changed))
                store.trees.sound_rows(changed)

    def _cut_short(self, **columns: Any) -> None:
        if self._why is Why.STOPPED:
            self._over(State.LOST, STOPPED, **columns)
        elif self._why is Why.TIME:
            seconds = self.job.request.timeout_seconds or self._shop.store.config.job_seconds
            self._over(State.CANCELLED, f"its time of {seconds:g} s was over", **columns)
        else:
            self._over(State.CANCELLED, "somebody cancelled it", **columns)

    def _over(self, state: State, reason: str = "", *, returned: Returned | None = None, **columns: Any) -> None:
        keep = min(self.job.request.keep_seconds, KEPT_SECONDS_MAX) if self._why is not Why.STOPPED else 0.0
        at = time.time()
        columns |= {
            "reason": reason,
            "ended": int(at),
            "ended_at": now(),
            "keep_until": at + keep if keep else 0,
            "log_bytes": self.log.end if self.log else 0,
            "returned": msgspec.json.encode(returned) if returned else None,
            "metrics": msgspec.json.encode(self._metrics(state, returned)),
        }
        self._surely(lambda: self._shop.step(self.job.id, state, **columns))

    def _metrics(self, state: State, returned: Returned | None) -> Metrics:
        """Return what is recorded of the job with its end (spec J-80)."""
        return measured(
            self._watch.steps(),
            (self.job.input_files, self.job.input_bytes),
            (returned.files, returned.bytes) if returned else (0, 0),
            problems=len(returned.problems) if returned else 0,
            is_done=state is State.DONE,
        )

    def _tidy(self) -> None:
        """Remove the session, unless it is kept a while."""
        try:
            if self._why is Why.STOPPED or not self.job.request.keep_seconds:
                self._shop.forget_session(self.job.id)
        except Exception as error:  # noqa: BLE001 - the job is over; the next start sees to what is left of it
            _log.error("the session of %s could not be removed", self.job.id, exc_info=error)


def _encoded(items: Iterable[tuple[str, str]]) -> dict[bytes, bytes]:
    return {os.fsencode(name): os.fsencode(value) for name, value in items}
