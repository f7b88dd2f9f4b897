"""Who makes a request, and what they may do: asked before a route sees it (spec H-100 to H-105)."""

from __future__ import annotations

import hashlib
import re
import time
from collections import OrderedDict
from functools import partial

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import Scope as AsgiScope

from deltasync.core import wire
from deltasync.core.errors import Unauthorized
from deltasync_server.access import LOCAL, Access, Caller, Scope
from deltasync_server.http.context import caller_of, context_of
from deltasync_server.http.listen import is_loopback_name
from deltasync_server.http.problems import HttpRefusal, TooManyFailures

FAILURES_MAX = 20
FAILURES_SECONDS = 60.0
"""So many wrong tokens of one source in so long; then it is told to wait."""
SOURCES_MAX = 4096
_WORKSPACE = f"{wire.API}/workspaces/{{workspace}}"
_LOOKS = frozenset({f"{_WORKSPACE}/{each}" for each in ("missing", "blobs", "trees")})
"""Routes that change nothing that anybody sees, although their method says so: all that a fetch asks for."""
_FIGURES = "/metrics"
_JOBS = f"{wire.API}/jobs"
_PAIRINGS = f"{wire.API}/pairings"
_TOKEN_ROUTE = f"{wire.API}/token"
_WITH_A_CODE = "`deltasync-server pair` there makes a code for `deltasync host add`"
_WITHOUT_A_CODE = (
    "`deltasync-server token create` there makes one, for `deltasync host add NAME URL --token-file FILE` or "
    "DELTASYNC_TOKEN"
)
"""Pairing is of TLS (spec H-120): where there is none, no code helps."""
_NEEDS_NONE = re.compile(rf"{_PAIRINGS}/[0-9]+(/confirm)?")
"""Who pairs has no token yet, but a code (spec H-120)."""
STRANGER = Caller(scopes=frozenset())


class Door:
    """Lets callers in; wrong tokens of one source are answered ever the same, right ones always pass (spec H-102)."""

    def __init__(self, access: Access, *, needs_token: bool, is_local: bool) -> None:
        """needs_token: whether a request without one is refused. is_local: no other machine reaches the server."""
        self._access, self._needs_token, self._is_local = access, needs_token, is_local
        self._failures: OrderedDict[str, tuple[int, float]] = OrderedDict()
        """How often a source has failed, and when it began (event loop only)."""

    def caller(self, scope: AsgiScope) -> Caller:
        """Return who makes a request; raises Unauthorized, or TooManyFailures for a source that goes on and on."""
        values = Headers(scope=scope).getlist("authorization")
        if len(values) > 1:
            raise HttpRefusal(400, "a request has one Authorization header")
        certificate = scope.get("client_certificate")
        source = source_of(scope)
        if not (values or certificate):
            if not self._needs_token:
                self._require_own_name(scope)
                return LOCAL
            if _NEEDS_NONE.fullmatch(scope["path"]):
                self._note_failure(source)  # nobody needs many, and strangers must not look for codes to use up
                return STRANGER
        try:
            if certificate and not values:
                return self._access.certified(hashlib.sha256(certificate).digest())
            return self._access.caller(_token(values, is_tls=scope.get("scheme") == "https"))
        except Unauthorized:
            self._note_failure(source)
            raise

    def _require_own_name(self, scope: AsgiScope) -> None:
        """Raise 403 where a page may have had its own name resolved to this host (spec H-106)."""
        host = Headers(scope=scope).get("host")
        if self._is_local and host is not None and source_of(scope) and not is_loopback_name(host):
            raise HttpRefusal(403, "without a token this server is asked as localhost, 127.0.0.1 or [::1]")

    def _note_failure(self, source: str) -> None:
        now = time.monotonic()
        count, since = self._failures.pop(source, (0, now))
        if now - since >= FAILURES_SECONDS:
            count, since = 0, now
        self._failures[source] = (count + 1, since)
        if len(self._failures) > SOURCES_MAX:
            self._failures.popitem(last=False)
        if count >= FAILURES_MAX:
            raise TooManyFailures(since + FAILURES_SECONDS - now)


def source_of(scope: AsgiScope) -> str:
    """Return where a request comes from; '' for a unix socket."""
    return str(scope["client"][0]) if scope.get("client") else ""


def _token(values: list[str], *, is_tls: bool) -> str:
    scheme, _, token = values[0].partition(" ") if values else ("", "", "")
    if scheme.lower() != "bearer" or not token:
        raise Unauthorized(f"this server asks for a token; {_WITH_A_CODE if is_tls else _WITHOUT_A_CODE}")
    return token.strip(" ")


def needed(method: str, route: str) -> Scope | None:
    """Return what a token must be good for on a route, which is named by its path's pattern (spec H-105)."""
    if route.startswith((_PAIRINGS, _TOKEN_ROUTE)):
        return None
    if route == _FIGURES:
        return Scope.ADMIN
    if route.startswith(_JOBS):
        return Scope.RUN  # spec J-31
    return Scope.READ if method == "GET" or route in _LOOKS else Scope.PUSH


async def permitted(request: Request) -> None:
    """Raise Forbidden unless the caller may use the route at hand; every route depends on this."""
    caller = caller_of(request)
    if caller.is_fresh:
        here = context_of(request)
        await here.workers.quick(partial(here.access.claim, caller))
    scope = needed(request.method, request.scope["route"].path)
    if scope is not None:
        caller.require(scope)
