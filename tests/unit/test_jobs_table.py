"""The table of jobs: its steps, its order, what it holds and what it forgets."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from commands import wanted

from deltasync.core.jobs import NEXT, JobRequest, Returned, State
from deltasync_server.config import StoreConfig
from deltasync_server.jobs.admission import Admitted
from deltasync_server.jobs.desk import REMEMBERED_SECONDS, UNFETCHED_SECONDS, Jobs
from deltasync_server.jobs.table import (
    by_key,
    forgettable,
    insert,
    job_of,
    jobs_of,
    kept_sessions,
    note,
    stale_sessions,
    state_of,
    step,
    waiting,
)
from deltasync_server.receive import Store
from deltasync_server.tenants import DEFAULT, Tenant

NOTHING = Admitted(b"", "", 0, 0, {})
RETURNED = msgspec.json.encode(Returned(workspace="r", sequence=1, root="0" * 64, files=1, bytes=1, places=["o"]))
BOB = Tenant("bob")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(StoreConfig(tmp_path / "data")) as opened:
        opened.recover()
        yield opened


@pytest.fixture
def db(store: Store) -> Iterator[sqlite3.Connection]:
    with store.state.write() as connection:
        yield connection


def add(db: sqlite3.Connection, number: int, request: JobRequest | None = None, tenant: Tenant = DEFAULT) -> str:
    job_id = f"ds_1_{number:08x}"
    insert(db, job_id, tenant, request or wanted("true"), NOTHING, ["true"])
    return job_id


def over(db: sqlite3.Connection, job_id: str, ended: int = 0, **columns: object) -> None:
    assert step(db, job_id, State.CANCELLED, ended=ended, **columns)


@pytest.mark.parametrize("before", State)
def test_only_the_steps_of_the_table_are_taken(db: sqlite3.Connection, before: State) -> None:
    """From each state those that follow it can be reached, and no other; what is refused changes nothing."""
    for number, after in enumerate(State):
        job_id = add(db, number)
        note(db, job_id, state=before.value)
        assert step(db, job_id, after, reason="because") is (after in NEXT[before])
        found = job_of(db, DEFAULT, job_id, Path("/s"))
        assert found is not None
        is_taken = after in NEXT[before]
        assert (found.state, found.reason) == ((after, "because") if is_taken else (before, ""))
        assert (found.ended_at is not None) is (is_taken and after.is_over)
    assert not step(db, "ds_1_ffffffff", before)


def test_the_next_is_by_priority_then_by_age(db: sqlite3.Connection) -> None:
    """A higher priority goes first, among equals the older one; each says how many go before it."""
    for number, priority in enumerate((0, 5, 0, -1, 5)):
        add(db, number, wanted("true", priority=priority))
    order = [each.id[-1] for each in waiting(db)]
    assert order == ["1", "4", "0", "2", "3"]
    ahead = {each.id[-1]: each.ahead for each in jobs_of(db, DEFAULT, Path("/s"))}
    assert ahead == {each: place for place, each in enumerate(order)}
    over(db, "ds_1_00000001")
    assert [each.id[-1] for each in waiting(db)] == ["4", "0", "2", "3"]


def test_each_tenant_has_its_own_jobs_and_keys(db: sqlite3.Connection) -> None:
    """The same key is another job for another tenant, and nobody finds the other's."""
    request = wanted("true")
    mine, theirs = add(db, 1, request), add(db, 2, request, BOB)
    assert (by_key(db, DEFAULT, request.key), by_key(db, BOB, request.key)) == (mine, theirs)
    assert job_of(db, BOB, mine, Path("/s")) is None and by_key(db, BOB, "0" * 32) is None
    assert [each.id for each in jobs_of(db, BOB, Path("/s"))] == [theirs]
    with pytest.raises(sqlite3.IntegrityError):
        add(db, 3, request)


def test_jobs_are_forgotten_in_time_and_what_nobody_fetched_later(db: sqlite3.Connection) -> None:
    """After a week, and after a month where outputs still wait; one that is not over never."""
    plain, fetched, unfetched = add(db, 1), add(db, 2), add(db, 3)
    add(db, 4)
    over(db, plain)
    over(db, fetched, returned=RETURNED, acknowledged=1)
    over(db, unfetched, returned=RETURNED)
    week, month = REMEMBERED_SECONDS, UNFETCHED_SECONDS

    def gone(at: float, most: int = 1000) -> list[str]:
        return sorted(job_id for job_id, _ in forgettable(db, at, week, month, most))

    assert (gone(week), gone(week + 1)) == ([], [plain, fetched])
    assert (gone(month), gone(month + 1)) == ([plain, fetched], [plain, fetched, unfetched])
    assert gone(1, most=1) == [plain]


def test_of_too_many_the_oldest_of_that_tenant_are_forgotten(db: sqlite3.Connection) -> None:
    """One tenant's jobs cost another none, and what still waits to be fetched is not counted."""
    for number in range(6):
        over(db, add(db, number, tenant=BOB if number == 0 else DEFAULT), returned=RETURNED if number == 1 else None)
    assert [job_id[-1] for job_id, _ in forgettable(db, 0, 1e9, 1e9, 2)] == ["3", "2"]


def test_sessions_are_kept_for_their_time(db: sqlite3.Connection) -> None:
    """A session that is to be kept is, until then; and then it goes."""
    over(db, add(db, 1), keep_until=100.0)
    over(db, add(db, 2))
    assert (kept_sessions(db, 99), stale_sessions(db, 99)) == ({"ds_1_00000001": 100.0}, [])
    assert (kept_sessions(db, 100), stale_sessions(db, 100)) == ({}, ["ds_1_00000001"])


def test_what_time_does_to_jobs_is_done(store: Store) -> None:
    """A session whose time is over goes with its folder, and a job that is forgotten with its log."""
    with Jobs(store, list) as jobs:
        with store.state.write() as db:
            for number in (1, 2):
                over(db, add(db, number), ended=1000 * number, keep_until=100.0 * number)
        data = store.config.data
        for folder in ("sessions", "jobs"):
            for number in (1, 2):
                (data / folder / f"ds_1_0000000{number}").mkdir()
        assert jobs.tidy(150) == 50
        assert not (data / "sessions/ds_1_00000001").exists() and (data / "sessions/ds_1_00000002").exists()
        assert jobs.tidy(1000 + REMEMBERED_SECONDS + 1) is None
        with store.state.read() as db:
            assert (state_of(db, "ds_1_00000001"), state_of(db, "ds_1_00000002")) == (None, State.CANCELLED)
        assert [each.name for each in (data / "jobs").iterdir()] == ["ds_1_00000002"]
        assert [each.name for each in (data / "sessions").iterdir()] == [".lock"]
