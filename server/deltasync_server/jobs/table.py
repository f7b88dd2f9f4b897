"""The table of jobs: what each asks for, and where it stands; every step of one is a transaction of its own."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from deltasync.core.hashing import DIGEST_BYTES
from deltasync.core.job_metrics import Metrics
from deltasync.core.jobs import NEXT, Job, JobRequest, Returned, State
from deltasync_server.intake import now
from deltasync_server.jobs.admission import Admitted
from deltasync_server.state import split_digests
from deltasync_server.tenants import Tenant

ACTIVE = (State.STAGING, State.RUNNING, State.COLLECTING)
_OVER = tuple(state for state in State if state.is_over)


class JobRow(NamedTuple):
    """A job, as those who work on it need it."""

    id: str
    tenant: Tenant
    client_id: str
    request: JobRequest
    roots: bytes
    """A digest for each input: of the directory object that it is, or that holds it."""
    kinds: str
    """A letter for each input: `d` for a folder, `f` for a file."""
    input_bytes: int
    returned: Returned | None = None
    input_files: int = 0
    created_at: str = ""

    def sources(self) -> list[tuple[bytes, bool]]:
        """Return the digest for each input, and whether it is a folder."""
        return [(digest, kind == "d") for digest, kind in zip(split_digests(self.roots), self.kinds, strict=True)]


class Waiting(NamedTuple):
    """A queued job, whose it is, and how many GPUs it needs."""

    id: str
    tenant: Tenant
    gpus: int


class Left(NamedTuple):
    """What a server that died has left of a job."""

    id: str
    state: State
    pid: int | None
    pid_start: str | None


def insert(
    db: sqlite3.Connection, job_id: str, tenant: Tenant, request: JobRequest, admitted: Admitted, command: list[str]
) -> None:
    """Record a job as queued."""
    assert len(admitted.roots) == DIGEST_BYTES * len(request.inputs)
    db.execute(
        "INSERT INTO jobs (id, tenant, client_id, key, state, request, command, priority, gpus_wanted, roots, kinds, "
        "input_files, input_bytes, created_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            *(job_id, tenant, request.client_id, request.key, State.QUEUED.value),
            *(msgspec.json.encode(request), msgspec.json.encode(command), request.priority, request.gpus),
            *(admitted.roots, admitted.kinds, admitted.files, admitted.size_bytes, now()),
        ),
    )


def state_of(db: sqlite3.Connection, job_id: str) -> State | None:
    """Return where a job stands, or None when there is none."""
    row = db.execute("SELECT state FROM jobs WHERE id = ?", (job_id,)).fetchone()
    return State(row[0]) if row else None


def step(db: sqlite3.Connection, job_id: str, to: State, **columns: Any) -> bool:
    """Take a job to another state; False, and nothing changes, where that does not follow its own (spec J-40)."""
    before = state_of(db, job_id)
    if before is None or to not in NEXT[before]:
        return False
    if to.is_over:
        columns = {"ended_at": now(), "pid": None, "pid_start": None, "gpus": b"[]", "result_root": None, **columns}
    note(db, job_id, state=to.value, **columns)
    return True


def note(db: sqlite3.Connection, job_id: str, **columns: Any) -> None:
    """Change columns of a job."""
    names = ", ".join(f"{name} = ?" for name in columns)
    db.execute(f"UPDATE jobs SET {names} WHERE id = ?", (*columns.values(), job_id))


def job_row(db: sqlite3.Connection, job_id: str) -> JobRow | None:
    """Return a job for those who work on it."""
    select = (
        "SELECT id, tenant, client_id, request, returned, roots, kinds, input_bytes, input_files, created_at "
        "FROM jobs WHERE id = ?"
    )
    row = db.execute(select, (job_id,)).fetchone()
    if row is None:
        return None
    job, tenant, client_id, request, returned, *rest = row
    roots, kinds, input_bytes, input_files, created_at = rest
    asked = msgspec.json.decode(request, type=JobRequest)
    found = msgspec.json.decode(returned, type=Returned) if returned else None
    return JobRow(job, Tenant(tenant), client_id, asked, roots, kinds, input_bytes, found, input_files, created_at)


def by_key(db: sqlite3.Connection, tenant: Tenant, key: str) -> str | None:
    """Return the job that came with a key, or None."""
    row = db.execute("SELECT id FROM jobs WHERE tenant = ? AND key = ?", (tenant, key)).fetchone()
    return row[0] if row else None


def job_of(db: sqlite3.Connection, tenant: Tenant, job_id: str, sessions: Path) -> Job | None:
    """Return one job of a tenant as the wire says it; None where it has none of that id (spec J-31)."""
    row = db.execute(f"SELECT {_SEEN} FROM jobs WHERE id = ? AND tenant = ?", (job_id, tenant)).fetchone()
    return _seen(db, row, sessions) if row else None


def jobs_of(db: sqlite3.Connection, tenant: Tenant, sessions: Path) -> list[Job]:
    """Return every job of a tenant, the newest first."""
    rows = db.execute(f"SELECT {_SEEN} FROM jobs WHERE tenant = ? ORDER BY number DESC", (tenant,)).fetchall()
    return [_seen(db, row, sessions) for row in rows]


def waiting(db: sqlite3.Connection) -> list[Waiting]:
    """Return the queued jobs; of each tenant's the one that goes first comes first (spec J-41)."""
    select = "SELECT id, tenant, gpus_wanted FROM jobs WHERE state = ? ORDER BY priority DESC, number"
    return [Waiting._make(row) for row in db.execute(select, (State.QUEUED.value,))]


def left_over(db: sqlite3.Connection) -> list[Left]:
    """Return the jobs that somebody worked on."""
    rows = db.execute(f"SELECT id, state, pid, pid_start FROM jobs WHERE {_is_in(ACTIVE)}")
    return [Left(job_id, State(state), *rest) for job_id, state, *rest in rows]


def kept_sessions(db: sqlite3.Connection, at: float) -> dict[str, float]:
    """Return which jobs that are over keep their session, and until when. at: the time, in seconds since 1970."""
    select = f"SELECT id, keep_until FROM jobs WHERE {_is_in(_OVER)} AND keep_until > ?"
    return dict(db.execute(select, (at,)))


def kept_by_tenant(db: sqlite3.Connection, at: float) -> Counter[Tenant]:
    """Return how many sessions each tenant keeps of jobs that are over. at: the time, in seconds since 1970."""
    select = f"SELECT tenant, count(*) FROM jobs WHERE {_is_in(_OVER)} AND keep_until > ? GROUP BY tenant"
    return Counter({Tenant(tenant): count for tenant, count in db.execute(select, (at,))})


def over_with_inputs(db: sqlite3.Connection) -> list[str]:
    """Return the jobs that are over and still hold their inputs."""
    return [job_id for (job_id,) in db.execute(f"SELECT id FROM jobs WHERE {_is_in(_OVER)} AND roots != x''")]


def unfetched(db: sqlite3.Connection) -> list[JobRow]:
    """Return the jobs that have returned something which nobody acknowledged."""
    rows = db.execute("SELECT id FROM jobs WHERE returned IS NOT NULL AND NOT acknowledged").fetchall()
    return [row for (job_id,) in rows if (row := job_row(db, job_id)) is not None]


def stale_sessions(db: sqlite3.Connection, at: float) -> list[str]:
    """Return the jobs that are over whose session was kept, and is no longer."""
    select = f"SELECT id FROM jobs WHERE {_is_in(_OVER)} AND keep_until > 0 AND keep_until <= ?"
    return [job_id for (job_id,) in db.execute(select, (at,))]


def forgettable(
    db: sqlite3.Connection, at: float, seconds: float, unfetched_seconds: float, most: int
) -> list[tuple[str, Tenant]]:
    """Return the jobs whose time to be forgotten has come (spec J-48); nobody fetches what they returned any more.

    most: how many a tenant may have, of those that are over and acknowledged or have nothing to bring home.
    """
    rows = db.execute(
        "SELECT id, tenant, ended, returned IS NOT NULL AND NOT acknowledged, row_number() OVER "
        "(PARTITION BY tenant, returned IS NOT NULL AND NOT acknowledged ORDER BY number DESC) "
        f"FROM jobs WHERE {_is_in(_OVER)}"
    )
    return [
        (job_id, tenant)
        for job_id, tenant, ended, is_awaited, place in rows
        if at - (ended or 0) > (unfetched_seconds if is_awaited else seconds) or (place > most and not is_awaited)
    ]


def forget(db: sqlite3.Connection, job_id: str) -> None:
    """Remove a job."""
    db.execute("DELETE FROM jobs WHERE id = ?", (job_id,))


def _is_in(states: Iterable[State]) -> str:
    return "state IN ({})".format(", ".join(f"'{state}'" for state in states))


_SEEN = (
    "id, state, reason, client_id, command, created_at, started_at, ended_at, exit_code, signal, gpus, input_files, "
    "input_bytes, log_bytes, returned, acknowledged, priority, number, reused, metrics, keep_until"
)


def _seen(db: sqlite3.Connection, row: tuple[Any, ...], sessions: Path) -> Job:
    *plain, command, created_at, started_at, ended_at, exit_code, signal, gpus = row[:11]
    job_id, state, reason, client_id = plain
    input_files, input_bytes, log_bytes, returned, acknowledged, priority, number, reused, metrics, keep = row[11:]
    ahead = None
    if state == State.QUEUED:
        select = (
            "SELECT count(*) FROM jobs WHERE state = ? AND tenant = (SELECT tenant FROM jobs WHERE id = ?) "
            "AND (priority > ? OR (priority = ? AND number < ?))"  # spec J-41
        )
        (ahead,) = db.execute(select, (state, job_id, priority, priority, number)).fetchone()
    return Job(
        id=job_id,
        state=State(state),
        reason=reason,
        client_id=client_id,
        command=msgspec.json.decode(command, type=list[str]),
        session_path=str(sessions / job_id),
        created_at=created_at,
        started_at=started_at,
        ended_at=ended_at,
        exit_code=exit_code,
        signal=signal,
        ahead=ahead,
        gpus=msgspec.json.decode(gpus, type=list[int]),
        input_files=input_files,
        input_bytes=input_bytes,
        log_bytes=log_bytes,
        returned=msgspec.json.decode(returned, type=Returned) if returned else None,
        acknowledged=bool(acknowledged),
        kept_until=f"{datetime.fromtimestamp(keep, UTC):%Y-%m-%dT%H:%M:%SZ}" if keep else None,
        reused=reused,
        metrics=msgspec.json.decode(metrics, type=Metrics) if metrics else None,
    )
