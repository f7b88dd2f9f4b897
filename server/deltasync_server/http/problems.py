"""Refusals as application/problem+json: one shape and one stable code for each (spec H-6 to H-9)."""

from __future__ import annotations

import errno
import math
import sqlite3
from collections.abc import Mapping
from http import HTTPStatus

import msgspec
from starlette.responses import Response
from starlette.types import Scope as AsgiScope

from deltasync.core import wire
from deltasync.core.errors import DeltasyncError, HostBusy, NoSpace, NotFound, Unauthorized, UsageError
from deltasync.disk import FULL, DiskFull, lacks_threads
from deltasync_server.access import Caller, Scope

MEDIA_TYPE = "application/problem+json"
RETRY_SECONDS = {NoSpace.code: "30", HostBusy.code: "2"}
COARSE_BYTES = 1 << 30
"""In what a caller without the scope admin is told of the disk's free space."""


class HttpRefusal(UsageError):
    """A request that breaks a rule of HTTP or of this API's framing; it names its own status."""

    def __init__(self, status: int, sentence: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(sentence)
        self.http_status = status
        self.headers = headers or {}


class RequestLate(HostBusy):
    """A request that did not arrive in time; sending it again can help."""

    http_status = 408


class TooManyFailures(HostBusy):
    """A source that showed one wrong token after another; a right one is still taken."""

    http_status = 429

    def __init__(self, seconds: float) -> None:
        super().__init__("too many wrong tokens came from there; wait, or show a right one")
        self.headers = {"Retry-After": str(math.ceil(seconds))}


class TooManyRequests(HostBusy):
    """A tenant whose requests that are being answered are as many as they may be."""

    http_status = 429

    def __init__(self, most: int) -> None:
        super().__init__(f"{most} of your requests are being answered, no more at once; try again", limit=most)


class HostStopping(HostBusy):
    """The server is being stopped; nothing of the request was kept."""


_WITH_STATUS = (HttpRefusal, RequestLate, TooManyFailures, TooManyRequests)


def answer(value: msgspec.Struct, status: int = 200) -> Response:
    """Return a JSON answer."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def status_of(error: DeltasyncError) -> int:
    """Return the HTTP status of an error."""
    return error.http_status if isinstance(error, _WITH_STATUS) else error.status


def problem(error: DeltasyncError) -> wire.Problem:
    """Return the body that says what went wrong (spec H-6)."""
    status = status_of(error)
    return wire.Problem(
        type=f"urn:deltasync:problem:{error.code.lower().replace('_', '-')}",
        title=phrase(status),
        status=status,
        detail=error.sentence,
        code=error.code,
        facts=dict(error.facts),
    )


def refusal(error: DeltasyncError) -> Response:
    """Return the whole answer to a request that is refused."""
    headers = dict(error.headers) if isinstance(error, HttpRefusal | TooManyFailures) else {}
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    if error.code in RETRY_SECONDS and "Retry-After" not in headers:
        headers["Retry-After"] = RETRY_SECONDS[error.code]  # spec H-9
    return Response(msgspec.json.encode(problem(error)), status_of(error), headers, media_type=MEDIA_TYPE)


def phrase(status: int) -> str:
    """Return the words that HTTP has for a status."""
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Cancelled"


def knows_the_disk(caller: Caller | None) -> bool:
    """Tell whether a caller may know to the byte what is free: for others it would say whose content came before."""
    return caller is not None and Scope.ADMIN in caller.scopes


def told(error: Exception, scope: AsgiScope) -> DeltasyncError:
    """Return what the caller of a request learns of an error, whatever the server's own log says (spec H-33)."""
    ours = known(error) or unexpected()
    if isinstance(ours, DiskFull) and not knows_the_disk(scope.get("state", {}).get("caller")):
        return ours.coarse(COARSE_BYTES)
    return ours


def known(error: Exception) -> DeltasyncError | None:
    """Return the error of ours that an exception of the system stands for, or None when it is a bug."""
    if isinstance(error, DeltasyncError):
        return error
    if isinstance(error, OSError) and error.errno in FULL:
        return NoSpace("no space left on the server; nothing was changed")
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return HostBusy("the server has as many files open as it may; try again")
    if isinstance(error, sqlite3.OperationalError) and error.sqlite_errorname.startswith("SQLITE_BUSY"):
        return HostBusy("another program on the server has locked its database; try again")
    if lacks_threads(error):
        return HostBusy("the server has as many threads as it may; try again")
    return None


def unexpected() -> DeltasyncError:
    """Return what the caller learns of a bug: nothing but where to look."""
    return DeltasyncError("the server failed; its log says why")


def no_such_route(path: str) -> NotFound:
    """Return the answer to a path that is no route."""
    return NotFound(f"there is no {path}; GET /docs lists the routes")
