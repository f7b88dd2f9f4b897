"""Reuse: whose results are given again, how long they are kept, and what becomes of one that cannot be."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from commands import output, shell, wanted, words
from serving import until

from deltasync.core.hashing import digest_of
from deltasync.core.jobs import Job, Piece, State
from deltasync_server.config import StoreConfig
from deltasync_server.jobs import reuse
from deltasync_server.jobs.desk import Jobs
from deltasync_server.jobs.log import SEGMENTS, LogReader
from deltasync_server.jobs.table import note
from deltasync_server.receive import Store
from deltasync_server.state import kept_roots
from deltasync_server.tenants import DEFAULT, Tenant

BOB = Tenant("bob")
WRITES = 'echo ran >> "$0"; printf made > "$1"; echo "$1"'


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    with Store(StoreConfig(tmp_path / "data", keep_sequences=1)) as store:
        store.recover()
        with Jobs(store, list) as found:
            found.start()
            yield found


@contextmanager
def edited(jobs: Jobs, job: Job) -> Iterator[None]:
    """Wait until nobody works on a job, so that its row can be changed."""
    until(lambda: jobs._queue.run_of(job.id) is None)
    yield


def made(
    jobs: Jobs, ran: Path, *, tenant: Tenant = DEFAULT, word: str = "", version: str = "", script: str = WRITES
) -> Job:
    """Run what notes that it ran, and return the job once it is over."""
    asked = shell(script, outputs=[output("o/made")], reuse=True, tool_version=words(*version.split()))
    asked.argv.extend([[Piece(text=str(ran))], [Piece(output="o/made")], [Piece(text=word)]])
    job, _ = jobs.submit(tenant, asked)
    until(lambda: jobs.job(tenant, job.id).state.is_over)
    return jobs.job(tenant, job.id)


def runs(ran: Path) -> int:
    return len(ran.read_text().splitlines())


def test_a_result_is_its_tenants_alone(jobs: Jobs, tmp_path: Path) -> None:
    """Another tenant's equal command runs."""
    ran = tmp_path / "ran"
    first = made(jobs, ran)
    assert made(jobs, ran, tenant=BOB).reused == "" and runs(ran) == 2
    assert made(jobs, ran).reused == first.id and runs(ran) == 2


def test_a_result_outlives_its_return_and_a_collection(jobs: Jobs, tmp_path: Path) -> None:
    """What was acknowledged is still there to be given again; when its job is forgotten a collection takes it."""
    ran = tmp_path / "ran"
    first = made(jobs, ran)
    jobs.acknowledge(DEFAULT, first.id)
    jobs._store.catch_up()
    assert jobs._store.collect().blobs == 0
    again = made(jobs, ran)
    assert (again.reused, again.exit_code) == (first.id, 0)
    assert again.returned and first.returned and again.returned.sequence > first.returned.sequence
    assert (again.returned.root, again.returned.places) == (first.returned.root, ["o/made"])
    jobs.acknowledge(DEFAULT, again.id)
    jobs.cancel(DEFAULT, first.id)
    jobs._store.catch_up()
    until(lambda: jobs._store.collect().blobs == 1)
    assert made(jobs, ran).reused == "" and runs(ran) == 2


def test_a_former_log_names_the_session_of_today(jobs: Jobs, tmp_path: Path) -> None:
    """The words of the former job are said again, with this job's session where they had their own."""
    first, again = made(jobs, tmp_path / "ran"), made(jobs, tmp_path / "ran")
    said = LogReader(tmp_path / "data/jobs" / again.id, 0).read(1000)
    assert again.reused == first.id
    assert [each.content.decode() for each in said] == [f"{again.session_path}/outputs/o/made\n"]


@pytest.mark.parametrize("what", ["middle", "end", "all"])
def test_a_log_that_is_not_whole_is_not_given_again(tmp_path: Path, what: str) -> None:
    """Where the limit took the middle of a log, or the disk lost some of it, the command runs again."""
    settings: dict[str, Any] = {"job_log_bytes": 100 * SEGMENTS} if what == "middle" else {}
    with Store(StoreConfig(tmp_path / "data", **settings)) as store, Jobs(store, list) as jobs:
        jobs.start()
        ran, asked = tmp_path / "ran", 'echo ran >> "$0"; for n in 1 2 3 4 5; do printf "%0500d" "$n"; done'

        def ended() -> Job:
            request = wanted("sh", "-c", asked, str(ran), reuse=True)
            job_id = jobs.submit(DEFAULT, request)[0].id
            until(lambda: jobs.job(DEFAULT, job_id).state.is_over)
            return jobs.job(DEFAULT, job_id)

        first = ended()
        log = tmp_path / "data/jobs" / first.id
        if what == "end":
            (segment,) = log.iterdir()
            os.truncate(segment, 1000)
        elif what == "all":
            shutil.rmtree(log)
        assert ended().reused == "" and runs(ran) == 2


def test_a_result_that_a_lost_job_was_to_get_is_let_go(tmp_path: Path) -> None:
    """The server died while it gave a result again: the next start holds nothing for the job that is lost."""
    config, lost = StoreConfig(tmp_path / "data"), digest_of(b"root")
    with Store(config) as store, Jobs(store, list) as jobs:
        job_id = jobs.submit(DEFAULT, shell("true", reuse=True))[0].id
        with store.state.write() as db:
            note(db, job_id, state=State.RUNNING.value, result_root=lost)
            assert lost in kept_roots(db, 1)
    with Store(config) as store, Jobs(store, list) as jobs:
        jobs.start()
        assert jobs.job(DEFAULT, job_id).state is State.LOST
        with store.state.read() as db:
            assert lost not in kept_roots(db, 1)


def test_what_was_damaged_is_made_again(jobs: Jobs, tmp_path: Path) -> None:
    """A result whose content is gone is not given; the command runs, and its result is the next one's."""
    ran = tmp_path / "ran"
    first = made(jobs, ran)
    jobs.acknowledge(DEFAULT, first.id)
    jobs._store.catch_up()
    digest = digest_of(b"made").hex()
    (blob,) = (tmp_path / "data").glob(f"**/{digest}*")
    blob.unlink()
    second = made(jobs, ran)
    assert (second.state, second.reused, runs(ran)) == (State.DONE, "", 2)
    assert made(jobs, ran).reused == second.id


def test_a_result_is_a_week_old_at_most(jobs: Jobs, tmp_path: Path) -> None:
    """After seven days an equal command runs."""
    ran = tmp_path / "ran"
    first = made(jobs, ran)
    with edited(jobs, first), jobs._store.state.write() as db:
        (ended,) = db.execute("SELECT ended FROM jobs").fetchone()
        note(db, first.id, ended=ended - int(reuse.REMEMBERED_SECONDS))
    assert made(jobs, ran).reused == "" and runs(ran) == 2


def test_the_oldest_results_make_way(jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tenant's results only so many are remembered, the newest."""
    monkeypatch.setattr(reuse, "RESULTS_MAX", 1)
    ran = tmp_path / "ran"
    for word in ("one", "two"):
        with edited(jobs, made(jobs, ran, word=word)):
            pass
    assert made(jobs, ran, word="two").reused != ""
    assert made(jobs, ran, word="one").reused == ""


def test_a_tool_that_says_no_version_is_no_failure(jobs: Jobs, tmp_path: Path) -> None:
    """What the words for the version print and how they end counts, whatever that is; what they print is no log."""
    ran = tmp_path / "ran"
    first = made(jobs, ran, version="sh -c false")
    assert first.state is State.DONE and made(jobs, ran, version="sh -c false").reused == first.id
    assert made(jobs, ran, version="sh -c true").reused == ""
    assert {each.name for each in (tmp_path / "data/jobs").iterdir()} == {each.id for each in jobs.jobs(DEFAULT)}
    failed = made(jobs, ran, version="no-such-tool-at-all")
    assert failed.state is State.FAILED and "no-such-tool-at-all" in failed.reason


def test_a_job_is_cancelled_while_its_tool_says_its_version(jobs: Jobs, tmp_path: Path) -> None:
    """Cancelling ends the words for the version as well, and the command does not run."""
    script = f"touch {tmp_path}/up; exec sleep 1000"
    asked = shell(WRITES, reuse=True, tool_version=words("sh", "-c", script))
    job, _ = jobs.submit(DEFAULT, asked)
    until((tmp_path / "up").exists)
    jobs.cancel(DEFAULT, job.id)
    until(lambda: jobs.job(DEFAULT, job.id).state is State.CANCELLED)


def test_a_job_that_left_something_behind_is_run_again(jobs: Jobs, tmp_path: Path) -> None:
    """A result that lacks what its command wrote elsewhere is given to nobody: the next one is told of it as well."""
    ran = tmp_path / "ran"
    for number in (1, 2):
        job = made(jobs, ran, script=WRITES + "; echo 1 > left")
        assert job.returned is not None and "left was written" in job.returned.problems[0].reason
        assert job.reused == "" and runs(ran) == number
