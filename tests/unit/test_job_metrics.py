"""The figures of one job and of many (spec J-80, J-81)."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from deltasync.core.job_metrics import Metrics, Steps, measured, summed
from deltasync.core.jobs import Job, State
from deltasync_server.jobs.figures import COLLECTED, RUN, Stopwatch, Tally

STEPS = Steps(queued_seconds=1.0, staged_seconds=2.0, run_seconds=4.0, collected_seconds=8.0)
NOW = datetime(2030, 1, 2, tzinfo=UTC)


def job(state: State, hours: float, *, exit_code: int | None = None, metrics: Metrics | None = None) -> Job:
    """Return a job that came some hours ago."""
    created = (NOW - timedelta(hours=hours)).isoformat().replace("+00:00", "Z")
    return Job(
        id="ds_1_00000000",
        state=state,
        client_id="",
        command=[],
        session_path="",
        created_at=created,
        exit_code=exit_code,
        metrics=metrics,
    )


@pytest.mark.parametrize(
    ("left", "problems", "is_done", "rate", "errors"),
    [
        ((2, 60), 0, True, 1.0, 0),
        ((3, 60), 1, True, 0.75, 1),
        ((0, 0), 0, True, 1.0, 0),
        ((0, 0), 2, True, 0.0, 2),
        ((2, 60), 0, False, 0.0, 1),
    ],
)
def test_what_is_told_of_one_job(left: tuple[int, int], problems: int, is_done: bool, rate: float, errors: int) -> None:
    """Files, bytes and seconds are those of both ways and all steps; the rate is that of what can come home."""
    found = measured(STEPS, (5, 40), left, problems=problems, is_done=is_done)
    assert (found.success_rate, found.error_count) == (rate, errors)
    assert (found.file_count, found.total_bytes) == (5 + left[0], 40 + left[1])
    assert (found.duration_seconds, found.bytes_per_second) == (15.0, (40 + left[1]) / 10.0)


def test_no_time_is_no_speed() -> None:
    """A job that was never staged has the speed 0."""
    assert measured(Steps(), (1, 9), (0, 0), problems=0, is_done=False).bytes_per_second == 0.0


def test_many_jobs_are_summed() -> None:
    """Only jobs of the time that was asked for count; sums are of those that are over."""
    good = measured(STEPS, (1, 30), (1, 70), problems=0, is_done=True)
    bad = measured(STEPS, (1, 0), (0, 0), problems=0, is_done=False)
    jobs = [
        job(State.RUNNING, 0),
        job(State.DONE, 1, exit_code=0, metrics=good),
        job(State.DONE, 2, exit_code=7, metrics=good),
        job(State.LOST, 3),
        job(State.FAILED, 23, metrics=bad),
        job(State.DONE, 25, exit_code=0, metrics=good),
    ]
    found = summed(jobs, NOW - timedelta(hours=24))
    assert (found.jobs, found.states) == (5, {"running": 1, "done": 2, "lost": 1, "failed": 1})
    assert (found.success_rate, found.commands_failed) == (0.25, 1)
    totals = found.totals
    assert (totals.files_in, totals.bytes_in, totals.files_out, totals.bytes_out) == (3, 60, 2, 140)
    assert (totals.duration_seconds, totals.bytes_per_second, totals.error_count) == (45.0, 200 / 30, 1)
    assert summed([], NOW).success_rate == 1.0


def test_each_step_has_its_own_seconds() -> None:
    """A stopwatch gives each step what passed in it, and the queue what passed before."""
    watch = Stopwatch((datetime.now(UTC) - timedelta(seconds=100)).isoformat())
    assert watch.steps().run_seconds == 0.0 == watch.steps().collected_seconds
    watch.begin(RUN)
    while not watch.steps().run_seconds:
        pass
    assert watch.steps().queued_seconds >= 100
    staged = watch.steps().staged_seconds
    watch.begin(COLLECTED)
    while not watch.steps().collected_seconds:
        pass
    assert watch.steps().staged_seconds == staged
    assert Stopwatch((datetime.now(UTC) + timedelta(hours=1)).isoformat()).steps().queued_seconds == 0.0


def test_a_tally_only_grows() -> None:
    """Every job that ends is counted by its state, and what it moved is added; none ends uncounted."""
    tally = Tally()
    assert set(tally.figures().values()) == {0.0}
    tally.count(State.DONE, measured(STEPS, (1, 30), (2, 70), problems=1, is_done=True))
    tally.count(State.CANCELLED)
    found = tally.figures()
    assert (found["jobs_done_total"], found["jobs_cancelled_total"], found["jobs_lost_total"]) == (1, 1, 0)
    assert (found["job_bytes_in_total"], found["job_files_out_total"], found["job_run_seconds_total"]) == (30, 2, 4.0)
    assert found["job_error_count_total"] == 1
