"""The routes about the server itself: health, metrics, its description and the page that shows it (H-33 to H-35)."""

from __future__ import annotations

from functools import partial

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, Response

from deltasync.core import wire
from deltasync_server.http import openapi
from deltasync_server.http.context import caller_of, context_of
from deltasync_server.http.problems import COARSE_BYTES, answer, knows_the_disk

router = APIRouter(tags=["service"])

NOTHING_FROM_ELSEWHERE = "default-src 'none'; style-src 'unsafe-inline'"


@router.get("/health", summary="Liveness and disk headroom", **openapi.gives(wire.Health))
async def health(request: Request) -> Response:
    """Say that the server lives and how much room its disk has."""
    here, caller = context_of(request), caller_of(request)
    found = await here.workers.probe(partial(here.store.health, caller.tenant))
    if not knows_the_disk(caller):
        found = msgspec.structs.replace(found, disk_free_bytes=found.disk_free_bytes // COARSE_BYTES * COARSE_BYTES)
    return answer(found)


@router.get("/metrics", summary="Figures for Prometheus", **openapi.gives_text("text/plain"))
async def metrics(request: Request) -> Response:
    """Return the server's figures in Prometheus' text format."""
    from deltasync_server.http.metrics import CONTENT_TYPE, exposition

    here, answers = context_of(request), dict(request.app.state.guard.answers)
    body = await here.workers.probe(lambda: exposition(here.store.figures() | here.jobs.figures(), answers))
    return Response(body, headers={"Content-Type": CONTENT_TYPE})


@router.get("/openapi.json", summary="This description", **openapi.gives_text("application/json"))
async def description(request: Request) -> Response:
    """Return the OpenAPI description of this server."""
    return Response(msgspec.json.encode(request.app.openapi()), media_type="application/json")


@router.get("/docs", summary="This description, to read", **openapi.gives_text("text/html"))
async def docs(request: Request) -> Response:
    """Return a page that shows the OpenAPI description; it loads nothing from elsewhere."""
    from deltasync_server.http.docs import page

    return HTMLResponse(page(request.app.openapi()), headers={"Content-Security-Policy": NOTHING_FROM_ELSEWHERE})
