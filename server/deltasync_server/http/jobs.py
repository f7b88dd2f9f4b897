"""The routes of jobs: run a command, follow it, end it; and what this host has for commands (spec J-30, J-49)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated

import msgspec
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from deltasync.core import wire
from deltasync.core.errors import Forbidden, UsageError
from deltasync.core.jobs import Capabilities, Job, JobList, JobRequest, LeftOutputs
from deltasync.core.names import PATH_BYTES_MAX
from deltasync.decoding import decoded
from deltasync_server.access import Scope
from deltasync_server.http import openapi
from deltasync_server.http.auth import source_of
from deltasync_server.http.body import check_length, whole
from deltasync_server.http.context import caller_of, context_of, leave_of
from deltasync_server.http.events import LogEvents
from deltasync_server.http.problems import HttpRefusal, answer
from deltasync_server.tenants import tenant_text

router = APIRouter(prefix=wire.API, tags=["jobs"])

REQUEST_BYTES = 16 << 20
"""What the JSON of a request may take."""
_NOTED_WORDS, _NOTED_LETTERS = 50, 200
"""How much of a command the audit log takes."""
_JSON = "application/json"
After = Annotated[int | None, Query(ge=0, le=2**63 - 1, description="the id of the last event that came")]
AfterPath = Annotated[str, Query(max_length=PATH_BYTES_MAX, description="`next` of the page before")]


def why_not(request: Request) -> str:
    """Say why a caller may run no command here; '' where it may (spec J-31)."""
    config, caller = context_of(request).config, caller_of(request)
    if config.no_run:
        return "this server runs no commands (--no-run)"
    if Scope.RUN not in caller.scopes:
        return (
            "this token lacks the scope 'run': there `deltasync-server pair --scope push,run` prints a code (here "
            "`deltasync host rm NAME`, then `host add`), or `deltasync-server token create --scope push,run` a token"
        )
    if caller.token is None and source_of(request.scope) and not config.run_without_token:
        return (
            "commands run only for who shows a token: `deltasync-server token create --scope 'push run'` there makes "
            "one; or serve with --require-token, on a unix socket, or with --run-without-token"
        )
    return ""


@router.post(
    "/jobs",
    summary="Run a command",
    **openapi.gives_made(Job, 400, 403, 404, 410, 411, 413, 415, 507),
    openapi_extra=openapi.takes(JobRequest),
)
async def run_job(request: Request) -> Response:
    """Queue a command; the same key again is the same job, which is answered with 200 (J-30)."""
    here, caller = context_of(request), caller_of(request)
    if why := why_not(request):
        raise Forbidden(why)
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != _JSON:
        raise HttpRefusal(415, f"a request to run a command has the Content-Type {_JSON}")
    check_length(request, REQUEST_BYTES)
    body = await whole(request.receive, here.body_rules(REQUEST_BYTES))
    job, is_new = await here.workers.quick(lambda: here.jobs.submit(caller.tenant, _asked(body)))
    if is_new:
        command = [word[:_NOTED_LETTERS] for word in job.command[:_NOTED_WORDS]]
        _note(request, "run", job, command=command)
    return answer(job, 201 if is_new else 200)


@router.get("/jobs", summary="Every job", **openapi.gives(JobList))
async def jobs(request: Request) -> Response:
    """List the jobs of the caller's tenant, the newest first."""
    here, tenant = context_of(request), caller_of(request).tenant
    return answer(JobList(jobs=await here.workers.quick(partial(here.jobs.jobs, tenant))))


@router.get("/jobs/{job}", summary="One job", **openapi.gives(Job, 404))
async def job_state(request: Request, job: str) -> Response:
    """Say where a job stands, and what it returned."""
    return await _of(request, context_of(request).jobs.job, job)


@router.delete("/jobs/{job}", summary="Cancel or forget a job", **openapi.gives(Job, 404))
async def cancel_job(request: Request, job: str) -> Response:
    """Cancel a job; one that is over is forgotten, with its log and what it returned (J-48)."""
    here, tenant = context_of(request), caller_of(request).tenant
    found = await here.workers.quick(partial(here.jobs.cancel, tenant, job))
    _note(request, "cancel", found)
    return answer(found)


@router.post("/jobs/{job}/acknowledge", summary="Let go of what a job returned", **openapi.gives(Job, 404, 411))
async def acknowledge_job(request: Request, job: str) -> Response:
    """Take the pin from what a job returned: the caller has all of it (J-63)."""
    return await _of(request, context_of(request).jobs.acknowledge, job)


@router.get("/jobs/{job}/outputs", summary="What a job left", **openapi.gives(LeftOutputs, 400, 404))
async def job_outputs(request: Request, job: str, after: AfterPath = "") -> Response:
    """List the files and folders that a job left, a page of them by path, and whether they wait here (J-68)."""
    here, tenant = context_of(request), caller_of(request).tenant
    return answer(await here.workers.quick(partial(here.jobs.outputs, tenant, job, after)))


@router.get("/jobs/{job}/logs", summary="Follow a job", **openapi.gives_events(400, 404))
async def job_logs(request: Request, job: str, after: After = None) -> Response:
    """Send what the command writes, and each state of the job, as server-sent events until the job is over (J-47)."""
    here, tenant = context_of(request), caller_of(request).tenant
    await here.workers.quick(partial(here.jobs.job, tenant, job))
    return LogEvents(here, leave_of(request), tenant, job, _place(request, after))


@router.get("/capabilities", summary="What commands meet here", **openapi.gives(Capabilities))
async def capabilities(request: Request) -> Response:
    """Say what a job may ask for, what is free of it, and whether the caller may run anything (J-49)."""
    here = context_of(request)
    return answer(await here.workers.quick(partial(here.jobs.capabilities, why_not(request))))


def _asked(body: bytes) -> JobRequest:
    try:
        return decoded(body, JobRequest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"not a request to run a command: {error}") from error


async def _of(request: Request, ask: Callable[..., Job], job: str) -> Response:
    return answer(await context_of(request).workers.quick(partial(ask, caller_of(request).tenant, job)))


def _place(request: Request, after: int | None) -> int:
    text = request.headers.get("last-event-id")
    if text is None:
        return after or 0
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise UsageError("Last-Event-ID is the id of an event of this job")
    return int(text)


def _note(request: Request, what: str, job: Job, **facts: object) -> None:
    caller = caller_of(request)
    context_of(request).audit.note(
        what,
        source=source_of(request.scope),
        token=caller.token,
        tenant=tenant_text(caller.tenant),
        job=job.id,
        state=job.state,
        **facts,
    )
