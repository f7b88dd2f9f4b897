"""What a route works with: the store, the threads and the settings of this server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec
from fastapi import Request

from deltasync.core import wire
from deltasync.core.errors import UsageError
from deltasync.core.names import NameRefused, WorkspaceName, parse_workspace
from deltasync.decoding import decoded
from deltasync_server.access import Access, Caller, Leave
from deltasync_server.audit import Audit
from deltasync_server.config import ServeConfig, StoreConfig
from deltasync_server.http.body import BodyRules, check_length, whole
from deltasync_server.http.workers import Workers
from deltasync_server.tenants import qualified

if TYPE_CHECKING:
    from deltasync_server.http.pairing import Exchanges
    from deltasync_server.intake import Permit
    from deltasync_server.jobs.desk import Jobs
    from deltasync_server.receive import Store
    from deltasync_server.tls import Tls


_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Context:
    """Everything that outlives a request."""

    store: Store
    access: Access
    audit: Audit
    workers: Workers
    store_config: StoreConfig
    config: ServeConfig
    needs_token: bool
    """Whether a request without a token is refused; where not, it is one of the default tenant."""
    is_local: bool
    """Whether no other machine reaches the server."""
    tls: Tls | None
    """What it is encrypted with, if it is."""
    exchanges: Exchanges
    """Pairings that clients are about to confirm."""
    jobs: Jobs

    @property
    def limits(self) -> wire.Limits:
        """What this server takes."""
        return self.store_config.limits

    def body_rules(self, limit_bytes: int) -> BodyRules:
        """Return the rules for a body of at most so many bytes."""
        return BodyRules(limit_bytes, self.config.body_seconds, self.config.body_window_bytes)

    def staging(self) -> Path:
        """Return the folder for what is not yet anything; its files have no name and vanish with the process."""
        folder = self.store_config.data / "staging"
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder


def context_of(request: Request) -> Context:
    """Return the context of the server that received the request."""
    found: Context = request.app.state.context
    return found


def caller_of(request: Request) -> Caller:
    """Return who makes a request."""
    found: Caller = request.state.caller
    return found


def permit_of(request: Request) -> Permit:
    """Return what raises once the caller may no longer do what the request is about."""
    access, caller = context_of(request).access, caller_of(request)

    def require() -> None:
        access.require_still(caller)

    return require


def leave_of(request: Request) -> Leave:
    """Return what raises once the caller may no longer read what is being sent."""
    return Leave(context_of(request).access, caller_of(request))


async def body_of(request: Request, kind: type[_Value], limit_bytes: int) -> _Value:
    """Return the JSON that a request brings, read to its end and within limits."""
    check_length(request, limit_bytes)
    body = await whole(request.receive, context_of(request).body_rules(limit_bytes))
    try:
        return decoded(body, kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"the request's JSON is not what this route takes: {error}") from error


def workspace_of(request: Request, text: str) -> WorkspaceName:
    """Return the caller's workspace that a request names, as the store keeps it (spec H-5, H-103)."""
    try:
        return qualified(caller_of(request).tenant, parse_workspace(text))
    except NameRefused as error:
        raise UsageError(f"not a workspace name: {error}") from error
