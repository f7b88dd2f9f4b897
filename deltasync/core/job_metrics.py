"""What jobs moved and how long each step took: of one, and the sum of many (spec J-80, J-81)."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import msgspec

if TYPE_CHECKING:
    from deltasync.core.jobs import Job

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_Seconds = Annotated[float, msgspec.Meta(ge=0)]


class Steps(msgspec.Struct, frozen=True, kw_only=True):
    """How long a job was in each of its states."""

    queued_seconds: _Seconds = 0.0
    staged_seconds: _Seconds = 0.0
    run_seconds: _Seconds = 0.0
    collected_seconds: _Seconds = 0.0


class Metrics(Steps, frozen=True, kw_only=True):
    """The figures of a job that is over."""

    files_in: _Count = 0
    bytes_in: _Count = 0
    files_out: _Count = 0
    bytes_out: _Count = 0
    file_count: _Count = 0
    """Of both ways."""
    total_bytes: _Count = 0
    duration_seconds: _Seconds = 0.0
    """Of all steps."""
    bytes_per_second: _Seconds = 0.0
    """How fast the bytes of both ways were staged and collected."""
    success_rate: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    """Which share of the files that were to come home can; 0 of a job that is not done."""
    error_count: _Count = 0
    """The problems of its outputs, and one more where it is not done."""


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of many jobs; sums but for both rates."""

    jobs: int
    states: dict[str, int]
    """How many jobs are in each state."""
    commands_failed: int
    """Of those that are done: the exit code is another one than 0, or there is a signal."""
    success_rate: float
    """Which share of the jobs that are over is done with the exit code 0; 1 where none is over."""
    totals: Metrics


def measured(steps: Steps, came: tuple[int, int], left: tuple[int, int], *, problems: int, is_done: bool) -> Metrics:
    """Return the figures of a job. came, left: the files and bytes of its inputs and of its outputs."""
    errors = problems + (not is_done)
    share = left[0] / (left[0] + problems) if left[0] + problems else 1.0
    return _with_totals(steps, (*came, *left), errors, share if is_done else 0.0)


def summed(jobs: Iterable[Job], since: datetime) -> Summary:
    """Return the figures of the jobs that came after some moment."""
    found = [job for job in jobs if _is_since(job, since)]
    over = [job for job in found if job.state.is_over]
    good = sum(job.state == "done" and job.exit_code == 0 for job in over)
    states: dict[str, int] = {}
    for job in found:
        states[job.state.value] = states.get(job.state.value, 0) + 1
    return Summary(
        jobs=len(found),
        states=states,
        commands_failed=states.get("done", 0) - good,
        success_rate=good / len(over) if over else 1.0,
        totals=_totals([job.metrics for job in over if job.metrics is not None]),
    )


def _is_since(job: Job, since: datetime) -> bool:
    try:
        return datetime.fromisoformat(job.created_at) >= since
    except (ValueError, TypeError):  # a host that says it in its own way
        return False


def _totals(each: list[Metrics]) -> Metrics:
    steps = Steps(
        queued_seconds=sum(one.queued_seconds for one in each),
        staged_seconds=sum(one.staged_seconds for one in each),
        run_seconds=sum(one.run_seconds for one in each),
        collected_seconds=sum(one.collected_seconds for one in each),
    )
    moved = (
        sum(one.files_in for one in each),
        sum(one.bytes_in for one in each),
        sum(one.files_out for one in each),
        sum(one.bytes_out for one in each),
    )
    share = sum(one.success_rate for one in each) / len(each) if each else 1.0
    return _with_totals(steps, moved, sum(one.error_count for one in each), share)


def _with_totals(steps: Steps, moved: tuple[int, int, int, int], errors: int, share: float) -> Metrics:
    files_in, bytes_in, files_out, bytes_out = moved
    moving = steps.staged_seconds + steps.collected_seconds
    return Metrics(
        **msgspec.structs.asdict(steps),
        files_in=files_in,
        bytes_in=bytes_in,
        files_out=files_out,
        bytes_out=bytes_out,
        file_count=files_in + files_out,
        total_bytes=bytes_in + bytes_out,
        duration_seconds=moving + steps.queued_seconds + steps.run_seconds,
        bytes_per_second=(bytes_in + bytes_out) / moving if moving else 0.0,
        success_rate=share,
        error_count=errors,
    )
