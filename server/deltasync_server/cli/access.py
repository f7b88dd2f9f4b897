"""Who may come in: `deltasync-server pair` and `deltasync-server token`."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from deltasync.core.errors import UsageError
from deltasync.core.names import shown
from deltasync_server.cli.call import Call, app, command, seconds_of, tenant_of
from deltasync_server.tenants import DEFAULT_TEXT, tenant_text

if TYPE_CHECKING:
    from deltasync_server.access import Access, Scope, TokenRow

tokens = typer.Typer(help="Make, list and end the tokens that requests come with.", no_args_is_help=True)
app.add_typer(tokens, name="token")

_TENANT = Annotated[str, typer.Option("--tenant", metavar="NAME", help="Whose it is: each sees only its own.")]
_SCOPE = Annotated[str, typer.Option("--scope", metavar="NAMES", help="What it is good for: push, read, run, admin.")]
_LABEL = Annotated[str, typer.Option("--label", metavar="TEXT", help="What you call it.")]


@command("data")
def pair(
    call: Call,
    tenant: _TENANT = DEFAULT_TEXT,
    scope: _SCOPE = "push",
    label: _LABEL = "",
    lasts: Annotated[str, typer.Option("--for", metavar="TIME", help="How long the code is good. (10m)")] = "10m",
) -> int:
    """Print a one-time code that lets one client in.

    The client runs `deltasync host add NAME https://ADDRESS:PORT CODE`, and both sides prove to each other that they
    know the code. It is good for five tries and for one client. It may be done while the server runs.
    """
    seconds = seconds_of("--for", lasts)
    with _access(call) as access:
        code = access.open_pairing(tenant_of(tenant), _scopes(scope), label, seconds)
        _note(call, "pair", pairing=code.number, tenant=tenant, scopes=scope)
    command = f"deltasync host add NAME https://ADDRESS:PORT {code}"
    lines = [str(code), f"good for {lasts}, once; on the other machine run `{command}`"]
    call.answer({"code": str(code), "seconds": seconds}, lines)
    return 0


@command("data", group=tokens)
def create(
    call: Call,
    tenant: _TENANT = DEFAULT_TEXT,
    scope: _SCOPE = "push",
    label: _LABEL = "",
    expires: Annotated[
        str | None, typer.Option("--expires", metavar="TIME", help="When it ends, such as 12h or 30d. (never)")
    ] = None,
) -> int:
    """Make a token and print it, this once; the server keeps only its digest.

    Whoever has it may do what its scopes say: push sends and reads, read only reads. It may be done while the server
    runs.
    """
    lasts = None if expires is None else int(time.time() + seconds_of("--expires", expires))
    with _access(call) as access:
        row, text = access.create(tenant_of(tenant), _scopes(scope), label, lasts)
        _note(call, "token create", token=row.id, tenant=tenant, scopes=scope)
    call.answer({"token": text, **_public(row)}, [text])
    return 0


@command("data", group=tokens)
def ls(call: Call) -> int:
    """List every token: its id, tenant, scopes, label and whether it is good for anything; never the token itself."""
    with _access(call, create=False) as access:
        told = [_public(row) for row in access.tokens()]
    call.answer({"tokens": told}, ["  ".join(str(value) for value in each.values() if value) for each in told])
    return 0


@command("data", group=tokens)
def revoke(call: Call, token: Annotated[str, typer.Argument(metavar="ID", help="As `token ls` shows it.")]) -> int:
    """End a token at once; an upload that it began is refused at its end."""
    with _access(call, create=False) as access:
        row = access.revoke(token)
        _note(call, "token revoke", token=row.id)
    call.answer(_public(row), [f"{row.id} is revoked"])
    return 0


def _access(call: Call, *, create: bool = True) -> Access:
    from deltasync_server.access import Access
    from deltasync_server.opening import require_data

    require_data(call.store.data, create=create)
    return Access(call.store.data)


def _note(call: Call, what: str, **facts: object) -> None:
    """Write down what a command of the operator did about who may do what."""
    from deltasync_server.audit import Audit

    with Audit(call.store.data) as audit:
        audit.note(what, user=os.getuid(), **facts)


def _scopes(text: str) -> list[Scope]:
    from deltasync_server.access import Scope

    try:
        return [Scope(word) for word in text.replace(",", " ").split()]
    except ValueError as error:
        raise UsageError(f"--scope takes some of {', '.join(Scope)}, not {shown(text)}") from error


def _public(row: TokenRow) -> dict[str, object]:
    """Return what may be shown of a token."""

    def moment(seconds: int | None) -> str | None:
        return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")

    return {
        "id": row.id,
        "state": row.why_not(time.time()) or "good",
        "tenant": tenant_text(row.tenant),
        "scopes": row.scopes,
        "label": shown(row.label),
        "created_at": moment(row.created_at),
        "expires_at": moment(row.expires_at),
        "revoked_at": moment(row.revoked_at),
    }
