"""The queue: which job is worked on when: turns, slots, GPUs, priority, age (spec J-41); what time does to jobs."""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable

import msgspec

from deltasync.core.jobs import State
from deltasync_server.intake import now
from deltasync_server.jobs.process import Why
from deltasync_server.jobs.run import Run, Shop
from deltasync_server.jobs.table import Waiting, job_row, kept_by_tenant, note, waiting
from deltasync_server.tenants import Tenant

LOOK_SECONDS = 30.0
"""How often what time does to jobs is looked at."""
_log = logging.getLogger(__name__)


class Queue:
    """Starts a thread for each job whose turn it is."""

    def __init__(self, shop: Shop, gpus: int, tidy: Callable[[], float | None]) -> None:
        """tidy: does what time asks for, and returns in how many seconds it asks again, if that is known."""
        self._shop, self._tidy = shop, tidy
        self._config = shop.store.config
        self._gpus = gpus
        self._changed = threading.Condition()
        self._is_stopping = False
        self._is_asked = False
        self._active: dict[str, Run] = {}
        self._threads: dict[str, threading.Thread] = {}
        self._turns: dict[Tenant, int] = {}
        """The number of each tenant's last turn."""
        self._thread = threading.Thread(target=self._attend, name="deltasync-jobs")

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def begin_stop(self) -> None:
        """Have every job that is worked on ended, and begin no other; returns at once."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
            runs = list(self._active.values())
        for run in runs:
            run.end(Why.STOPPED)

    def stop(self) -> None:
        """End everything, and return when it has ended."""
        self.begin_stop()
        if self._thread.ident is not None:
            self._thread.join()
        with self._changed:
            threads = list(self._threads.values())
        for thread in threads:
            thread.join()

    def wake(self) -> None:
        """Look at the queue again."""
        with self._changed:
            self._is_asked = True
            self._changed.notify_all()

    @property
    def is_busy(self) -> bool:
        """Whether any job is worked on."""
        return bool(self._active)

    def run_of(self, job_id: str) -> Run | None:
        """Return who works on a job."""
        with self._changed:
            return self._active.get(job_id)

    def active(self) -> set[str]:
        """Return the jobs that are worked on."""
        with self._changed:
            return set(self._active)

    def slots_free(self) -> int:
        """Return how many more jobs could run now."""
        with self._changed:
            return max(0, self._config.slots - len(self._active))

    def gpus_free(self) -> int:
        """Return how many GPUs no job has."""
        with self._changed:
            return len(self._free())

    def _free(self) -> list[int]:
        taken = {number for run in self._active.values() for number in run.gpus}
        return [number for number in range(self._gpus) if number not in taken]

    def _attend(self) -> None:
        while True:
            seconds: float | None = None
            try:
                while self._begin_one():
                    pass
                seconds = self._tidy()
            except Exception:  # noqa: BLE001 - a worker reports it and goes on
                _log.exception("the queue of jobs could not be looked at")
            with self._changed:
                if not (self._is_stopping or self._is_asked):
                    self._changed.wait(min(LOOK_SECONDS, LOOK_SECONDS if seconds is None else max(0.0, seconds)))
                self._is_asked = False
                if self._is_stopping:
                    return

    def _begin_one(self) -> bool:
        """Begin with the job whose turn it is; False where there is none, or no slot."""
        with self._changed:
            if self._is_stopping or len(self._active) >= self._config.slots:
                return False
            with self._shop.store.state.read() as db:
                kept = kept_by_tenant(db, time.time())
                if len(self._active) + kept.total() >= self._config.job_sessions:
                    return False
                chosen = self._chosen(db, kept)
                job = job_row(db, chosen.id) if chosen else None
            if chosen is None or job is None:
                return False
            run = Run(self._shop, job, self._free()[: chosen.gpus])
            self._active[job.id] = run  # before its state says so: whoever cancels it finds it there
            self._turns[job.tenant] = max(self._turns.values(), default=0) + 1
        is_taken = False
        try:
            gpus = msgspec.json.encode(run.gpus)
            is_taken = self._shop.step(job.id, State.STAGING, started_at=now(), gpus=gpus)
        finally:
            if not is_taken:  # somebody cancelled it, or the store took no change: the slot is free again
                self._release(job.id)
        if is_taken:
            self._begin(run)
        return True

    def _chosen(self, db: sqlite3.Connection, kept: Counter[Tenant]) -> Waiting | None:
        """Return the job whose turn it is; one that waits for GPUs holds up only those that need some as well.

        kept: how many sessions each tenant keeps; where it may keep no more, jobs that would wait (spec J-33).
        """
        runs = self._active.values()
        busy = Counter(run.job.tenant for run in runs)
        kept = kept + Counter(run.job.tenant for run in runs if run.job.request.keep_seconds)
        free, is_held_up = len(self._free()), False
        for each in sorted(waiting(db), key=lambda each: (busy[each.tenant], self._turns.get(each.tenant, 0))):
            if each.id in self._active:
                continue
            if kept[each.tenant] >= self._config.tenant_kept_max and _keeps(db, each):
                continue
            if not each.gpus or (each.gpus <= free and not is_held_up):
                return each
            is_held_up = True
        return None

    def _begin(self, run: Run) -> None:
        thread = threading.Thread(target=self._work, args=(run,), name=f"deltasync-job-{run.job.id}")
        with self._changed:
            if self._is_stopping:
                run.end(Why.STOPPED)
            self._threads[run.job.id] = thread
        try:
            thread.start()
        except RuntimeError as error:  # the system starts no more threads
            with self._changed:
                del self._threads[run.job.id]
            self._shop.step(run.job.id, State.FAILED, reason=str(error), ended=int(time.time()))
            with self._shop.store.state.write() as db:
                note(db, run.job.id, roots=b"", kinds="")
            self._release(run.job.id)

    def _work(self, run: Run) -> None:
        try:
            run.work()
        finally:
            self._release(run.job.id)

    def _release(self, job_id: str) -> None:
        with self._changed:
            self._active.pop(job_id, None)
            self._threads.pop(job_id, None)
            self._is_asked = True
            self._changed.notify_all()


def _keeps(db: sqlite3.Connection, waits: Waiting) -> bool:
    job = job_row(db, waits.id)
    return job is not None and job.request.keep_seconds > 0
