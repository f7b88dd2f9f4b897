"""The desk: takes jobs, tells of them, cancels and forgets them; the routes know nothing else of jobs."""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Self

import msgspec

from deltasync.core.errors import Forbidden, NoSpace, NotFound, UsageError
from deltasync.core.jobs import Capabilities, Gpu, Job, JobRequest, LeftOutputs, State, Word
from deltasync.core.names import bytes_text
from deltasync.disk import DiskFull, Folder, make_private
from deltasync_server.jobs import returns
from deltasync_server.jobs.account import Account
from deltasync_server.jobs.admission import Admitted, admit, check, filled, require_kept, require_limits
from deltasync_server.jobs.bells import Bells
from deltasync_server.jobs.figures import Tally
from deltasync_server.jobs.gpus import gpus as nvidia_gpus
from deltasync_server.jobs.leftovers import kill_group, kill_marked
from deltasync_server.jobs.log import LogReader, end_of
from deltasync_server.jobs.machine import machine
from deltasync_server.jobs.process import Why
from deltasync_server.jobs.queue import Queue
from deltasync_server.jobs.removal import remove_all
from deltasync_server.jobs.run import Shop
from deltasync_server.jobs.sandbox import Sandbox
from deltasync_server.jobs.session import INPUTS, OUTPUTS, Sessions
from deltasync_server.jobs.table import (
    by_key,
    forget,
    forgettable,
    insert,
    job_of,
    job_row,
    jobs_of,
    kept_by_tenant,
    kept_sessions,
    left_over,
    note,
    over_with_inputs,
    stale_sessions,
    state_of,
    step,
    unfetched,
    waiting,
)
from deltasync_server.receive import Store
from deltasync_server.tenants import Tenant

LOGS = "jobs"
_LETS_GO = "`deltasync jobs rm ID` lets one go (--keep)"
QUEUED_MAX = 1000
REMEMBERED_SECONDS = 7 * 86_400.0
UNFETCHED_SECONDS = 30 * 86_400.0
REMEMBERED_MAX = 1000
"""Of a tenant's jobs that are over (spec J-48)."""
LOST = "the server died while it worked on this; run it again"
_COMMAND_BYTES = 8 << 10
"""So much of a command is told to people."""


class Jobs:
    """The jobs of one store."""

    def __init__(self, store: Store, gpus: Callable[[], list[Gpu]] = nvidia_gpus, socket: Path | None = None) -> None:
        """Open the folders of jobs; nothing is begun before `start`. socket: where requests come, if it is a file."""
        self._store, self._state, self._config = store, store.state, store.config
        account = Account.named(store.config.job_user)
        self._gpus = gpus
        self._gpus_count = len(gpus())
        self._logs = store.config.data / LOGS
        make_private(self._logs)
        self._sessions = Sessions(store, account)
        self._sandbox = Sandbox(store.config.data, self._sessions.path, account, socket)
        if store.config.sandbox and (why := self._sandbox.why_not):
            self._sessions.close()
            raise UsageError(f"no command can be shut in: {why}; leave --sandbox out, or mend that")
        self.bells = Bells()
        self._shop = Shop(store, self._sessions, self._logs, account, self.bells, Tally(), self._sandbox)
        self._queue = Queue(self._shop, self._gpus_count, lambda: self.tidy(time.time()))
        self.is_stopping = False

    # --- life ---

    def start(self) -> None:
        """Clear up after a server that died, and begin to work (spec J-42, J-45)."""
        self._recover()
        self._queue.start()

    def _recover(self) -> None:
        with self._state.read() as db:
            left = left_over(db)
        for each in left:
            if each.pid is not None:
                kill_group(each.pid, each.pid_start)
        if left:
            kill_marked({each.id for each in left})
        for each in left:
            log_bytes = end_of(self._logs / each.id)
            self._shop.step(each.id, State.LOST, reason=LOST, ended=int(time.time()), log_bytes=log_bytes)
        with self._state.write() as db:
            kept = kept_sessions(db, time.time())
            for job_id in over_with_inputs(db):
                if job_id not in kept:
                    note(db, job_id, roots=b"", kinds="", keep_until=0)
            known = {job_id for (job_id,) in db.execute("SELECT id FROM jobs")}
            awaited = unfetched(db)
        held = [(each.tenant, each.returned) for each in awaited if each.returned is not None]
        returns.release_others(self._store, held)
        self._sessions.sweep(kept)
        for log in self._logs.iterdir():
            if log.name not in known:
                self._remove_log(log.name)

    def begin_stop(self) -> None:
        """Have everything ended that runs; returns at once."""
        self.is_stopping = True
        self._queue.begin_stop()
        self.bells.ring_all()

    def stop(self) -> None:
        """End everything that runs, and let the folders go."""
        self.begin_stop()
        self._queue.stop()
        self._sessions.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def tidy(self, at: float) -> float | None:
        """Remove what was kept long enough (spec J-42, J-48); returns in how many seconds the next session goes.

        at: the time, in seconds since 1970.
        """
        with self._state.read() as db:
            stale = stale_sessions(db, at)
            old = forgettable(db, at, REMEMBERED_SECONDS, UNFETCHED_SECONDS, REMEMBERED_MAX)
            kept = kept_sessions(db, at)
        for job_id in stale:
            self._shop.forget_session(job_id)
        for job_id, _ in old:
            self._forget(job_id)
        return min(kept.values()) - at if kept else None

    # --- jobs ---

    def submit(self, tenant: Tenant, request: JobRequest) -> tuple[Job, bool]:
        """Queue a job, or return the one that came with its key; and whether it is a new one (spec J-30, J-32)."""
        check(request)
        with self._state.snapshot() as db:
            if (known := by_key(db, tenant, request.key)) is not None:
                return self.job(tenant, known), False
            if request.sandbox and (why := self._sandbox.why_not):
                raise Forbidden(f"no command can be shut in: {why}; run it without --sandbox")  # spec J-86
            require_limits(self._config, request, self._gpus_count)
            admitted = admit(db, self._config, tenant, request)
        self._require_room(admitted)
        job_id = f"ds_{int(time.time())}_{secrets.token_hex(4)}"
        with self._state.write() as db:
            known = by_key(db, tenant, request.key)
            if known is None:
                require_kept(db, self._config, tenant, request, admitted)
                self._require_turn(db, tenant, request)
                insert(db, job_id, tenant, request, admitted, self._command(job_id, request.argv))
        self._queue.wake()
        return self.job(tenant, known or job_id), known is None

    def _require_turn(self, db: sqlite3.Connection, tenant: Tenant, request: JobRequest) -> None:
        """Raise NoSpace where a job could wait for no turn, or its turn might never come (spec J-33)."""
        queued = Counter(each.tenant for each in waiting(db))
        kept = kept_by_tenant(db, time.time())
        _require_fewer(queued.total(), QUEUED_MAX, "jobs wait")
        _require_fewer(queued[tenant], self._config.tenant_queued, "jobs of yours wait")
        _require_fewer(kept.total(), self._config.job_sessions, "sessions are kept", _LETS_GO)
        if request.keep_seconds:
            _require_fewer(kept[tenant], self._config.tenant_kept_max, "sessions of yours are kept", _LETS_GO)

    def _require_room(self, admitted: Admitted) -> None:
        """Raise NoSpace where the disk has no room for a session (spec J-33)."""
        needed_bytes = admitted.size_bytes if self._sessions.links == "copy" else 0
        if self._config.sessions_dir is None:
            self._store.room.require_disk(needed_bytes)
        elif needed_bytes > (free_bytes := self._sessions.free_bytes()):
            raise DiskFull(
                f"the inputs take {bytes_text(needed_bytes)}, and {{free}} are free where sessions are made",
                free_bytes,
                needed_bytes=needed_bytes,
            )

    def _command(self, job_id: str, argv: list[Word]) -> list[str]:
        """Return the words of a command for people: a very long one is cut short."""
        inputs, outputs = (os.fsencode(self._sessions.path / job_id / top) for top in (INPUTS, OUTPUTS))
        words, left = list[str](), _COMMAND_BYTES
        for word in argv:
            text = filled(word, inputs, outputs).decode(errors="replace")
            if len(text) > left:
                return [*words, text[:left] + "…"]
            words.append(text)
            left -= len(text) + 1
        return words

    def job(self, tenant: Tenant, job_id: str) -> Job:
        """Return one job; raises NotFound, also for another tenant's (spec J-31)."""
        run = self._queue.run_of(job_id)
        with self._state.read() as db:
            found = job_of(db, tenant, job_id, self._sessions.path)
        if found is None:
            raise NotFound(f"there is no job {job_id!r}; `deltasync jobs ls` lists them")
        if run is not None and run.log is not None:
            return msgspec.structs.replace(found, log_bytes=run.log.end)
        return found

    def jobs(self, tenant: Tenant) -> list[Job]:
        """Return every job of a tenant, the newest first."""
        with self._state.read() as db:
            return jobs_of(db, tenant, self._sessions.path)

    def outputs(self, tenant: Tenant, job_id: str, after: str) -> LeftOutputs:
        """Return a page of what a job left, behind a path; raises NotFound as `job` does (spec J-68)."""
        self.job(tenant, job_id)
        with self._state.read() as db:
            row = job_row(db, job_id)
        return returns.left(self._store, row, row.returned, after) if row else LeftOutputs(outputs=[], waits=False)

    def reader(self, job_id: str, place: int) -> LogReader:
        """Return what reads a job's log from a place on."""
        return LogReader(self._logs / job_id, place)

    def cancel(self, tenant: Tenant, job_id: str) -> Job:
        """Cancel a job, or forget one that is over; returns what is known of it then, or was before (spec J-48)."""
        found = self.job(tenant, job_id)
        if found.state.is_over:
            self._forget(job_id)
            self._queue.wake()  # its session may be what others wait for
            return found
        run = self._queue.run_of(job_id)
        if run is None:
            reason = "somebody cancelled it before its turn"
            with self._state.write() as db:
                is_cancelled = state_of(db, job_id) is State.QUEUED
                if is_cancelled:
                    step(db, job_id, State.CANCELLED, reason=reason, ended=int(time.time()), roots=b"", kinds="")
            if is_cancelled:
                self._shop.tally.count(State.CANCELLED)
            run = self._queue.run_of(job_id)  # its turn may just have come
        if run is not None:
            run.end(Why.CANCELLED)
        self.bells.ring(job_id)
        return self.job(tenant, job_id)

    @property
    def is_busy(self) -> bool:
        """Whether somebody works on a job."""
        return self._queue.is_busy

    def acknowledge(self, tenant: Tenant, job_id: str) -> Job:
        """Let go of what a job returned: everything has its name (spec J-63)."""
        found = self.job(tenant, job_id)
        if found.returned is not None and not found.acknowledged:
            self._release(job_id)
            with self._state.write() as db:
                note(db, job_id, acknowledged=1)
            self.bells.ring(job_id)
        return self.job(tenant, job_id)

    def _release(self, job_id: str) -> None:
        with self._state.read() as db:
            row = job_row(db, job_id)
        if row is not None:
            returns.release(self._store, row.tenant, row.returned)

    def _forget(self, job_id: str) -> None:
        self._release(job_id)
        self._sessions.remove(job_id)
        with self._state.write() as db:
            forget(db, job_id)
        self._remove_log(job_id)

    def _remove_log(self, name: str) -> None:
        with contextlib.suppress(OSError), Folder.open(self._logs) as folder:  # the next start finds what is left
            remove_all(folder, name)

    # --- what there is ---

    def figures(self) -> dict[str, float]:
        """Return numbers for /metrics; those that end in _total only grow (spec J-82)."""
        found = self.capabilities("")
        return self._shop.tally.figures() | {
            "jobs_queued": found.queued,
            "jobs_active": len(self._queue.active()),
            "job_slots": found.slots,
            "job_slots_free": found.slots_free,
            "job_sessions": found.sessions,
            "job_sessions_stale": found.sessions_stale,
            "job_sessions_free_bytes": found.disk_free_bytes,
            "gpus": len(found.gpus),
            "gpus_free": found.gpus_free,
        }

    def capabilities(self, why: str) -> Capabilities:
        """Say what a job may ask for (spec J-49). why: why the caller may run nothing, '' where it may."""
        found, sessions = machine(), self._sessions.names()
        with self._state.read() as db:
            queued, kept = len(waiting(db)), kept_sessions(db, time.time())
        return Capabilities(
            runs=not why,
            why=why,
            slots=self._config.slots,
            slots_free=self._queue.slots_free(),
            queued=queued,
            gpus=self._gpus(),
            gpus_free=self._queue.gpus_free(),
            cores=found.cores,
            load=found.load,
            memory_bytes=found.memory_bytes,
            memory_free_bytes=found.memory_free_bytes,
            disk_free_bytes=self._sessions.free_bytes(),
            links=self._sessions.links,
            sandbox=not self._sandbox.why_not,
            sandbox_why=self._sandbox.why_not,
            sandbox_always=self._config.sandbox,
            sessions=len(sessions),
            sessions_stale=len(sessions - kept.keys() - self._queue.active()) + self._sessions.stuck,
            file_bytes_max=self._config.job_file_bytes,
            session_bytes_max=self._config.job_session_bytes,
            sessions_kept=len(kept),
            sessions_max=self._config.job_sessions,
            seconds_max=self._config.job_seconds,
        )


def _require_fewer(found: int, most: int, what: str, advice: str = "try again later") -> None:
    if found >= most:
        raise NoSpace(f"{found} {what} here, and no more than {most} may; {advice}", found=found, limit=most)
