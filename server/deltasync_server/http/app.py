"""The application: every route behind the guard, with one way to fail (spec H-1, H-6)."""

from __future__ import annotations

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from deltasync.core import wire
from deltasync.core.errors import DeltasyncError, UsageError
from deltasync.core.names import shown
from deltasync_server.http import blobs, files, jobs, pairing, seed, service, uploads, workspaces
from deltasync_server.http.auth import Door, permitted
from deltasync_server.http.context import Context
from deltasync_server.http.guard import Guard, report
from deltasync_server.http.openapi import describe
from deltasync_server.http.problems import HttpRefusal, no_such_route, refusal, told


def build(context: Context, *, seed_routes: bool) -> ASGIApp:
    """Return the application that serves a store.

    seed_routes: also serve delta/upload and delta/status, which any program that reaches us can call (spec H-40).
    """
    app = routes(seed_routes=seed_routes)
    door = Door(context.access, needs_token=context.needs_token, is_local=context.is_local)
    guard = Guard(app, door, context.audit, tenant_requests=context.config.tenant_requests)
    app.state.context = context
    app.state.guard = guard
    return guard


def routes(*, seed_routes: bool) -> FastAPI:
    """Return the routes and their description, without a store behind them."""
    app = FastAPI(
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
        exception_handlers={
            DeltasyncError: _refused,
            Exception: _failed,
            HTTPException: _routing_failed,
            RequestValidationError: _parameters_refused,
        },
    )
    needs_permission = [Depends(permitted)]
    for part in (workspaces, blobs, pairing, jobs, service, *((seed,) if seed_routes else ())):
        app.include_router(part.router, dependencies=needs_permission)
    for part in (uploads, files):
        app.include_router(part.router, prefix=wire.API, dependencies=needs_permission)
        app.include_router(part.router, prefix=uploads.ALIAS, dependencies=needs_permission, include_in_schema=False)
    app.openapi = lambda: describe(app)  # type: ignore[method-assign]
    return app


async def _refused(request: Request, error: Exception) -> Response:
    report(request.scope, error)
    return refusal(told(error, request.scope))


async def _failed(request: Request, error: Exception) -> Response:
    return refusal(told(error, request.scope))  # Starlette raises it again, and the guard reports it


async def _routing_failed(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = shown(request.scope["path"])
    if error.status_code == 404:
        return refusal(no_such_route(path))
    return refusal(HttpRefusal(error.status_code, f"{request.method} is not for {path}", error.headers))


async def _parameters_refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return refusal(UsageError(f"{first['loc'][-1]}: {first['msg']}"))
