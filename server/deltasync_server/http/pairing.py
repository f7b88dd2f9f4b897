"""The routes of pairing: a client that knows a one-time code gets a token and a certificate (spec H-120 to H-125)."""

from __future__ import annotations

import hashlib
import secrets
import ssl
import time
from collections import OrderedDict
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Annotated, NamedTuple, TypeVar

from fastapi import APIRouter, Path, Request
from starlette.responses import Response

from deltasync.core import wire
from deltasync.core.errors import Unauthorized, UsageError
from deltasync.core.pairing import Code, Confirmations, Exchange, Side, is_same
from deltasync_server.access import NO_PAIRING
from deltasync_server.http import openapi
from deltasync_server.http.context import Context, body_of, caller_of, context_of
from deltasync_server.http.problems import answer

if TYPE_CHECKING:
    from deltasync_server.tls import Tls

router = APIRouter(prefix=wire.API, tags=["pairing"])

BODY_BYTES = 16 * 1024
EXCHANGE_SECONDS = 60.0
EXCHANGES_MAX = 64
_Value = TypeVar("_Value")
Number = Annotated[int, Path(ge=1, le=10**9)]


class _Begun(NamedTuple):
    """An exchange whose client has still to confirm."""

    number: int
    wanted: Confirmations
    since: float


class Exchanges:
    """Exchanges under way, in memory: a restart costs their clients one try."""

    def __init__(self) -> None:
        self._begun: OrderedDict[str, _Begun] = OrderedDict()

    def add(self, number: int, wanted: Confirmations) -> str:
        """Remember an exchange and return its name (event loop only)."""
        name = secrets.token_hex(16)
        self._begun[name] = _Begun(number, wanted, time.monotonic())
        while len(self._begun) > EXCHANGES_MAX:
            self._begun.popitem(last=False)
        return name

    def take(self, name: str, number: int) -> Confirmations:
        """Return what an exchange must be confirmed with, once; raises Unauthorized."""
        found = self._begun.pop(name, None)
        if found is None or found.number != number or time.monotonic() - found.since > EXCHANGE_SECONDS:
            raise Unauthorized(NO_PAIRING)
        return found.wanted


@router.post(
    "/token/rotate",
    summary="Change a token and its certificate",
    **openapi.gives(wire.Rotated, 400, 401, 411, 413),
    openapi_extra=openapi.takes(wire.RotateRequest),
)
async def rotate(request: Request) -> Response:
    """Put a new secret and certificate in the place of the caller's; the client has made both and keeps them before."""
    here, caller = context_of(request), caller_of(request)
    body = await body_of(request, wire.RotateRequest, BODY_BYTES)
    if caller.token is None:
        raise UsageError("no token is shown")

    def work() -> wire.Rotated:
        issued = _issued(here, body.public_key, f"token {caller.token}")
        here.access.rotate(caller, bytes.fromhex(body.digest), issued.sha256 if issued else None)
        return wire.Rotated(certificate=issued.pem if issued else None)

    return answer(await here.workers.quick(work))


@router.post(
    "/pairings/{number}",
    summary="Try a pairing code",
    **openapi.gives(wire.PairingAnswer, 400, 401, 411, 413),
    openapi_extra=openapi.takes(wire.PairingRequest),
)
async def begin(request: Request, number: Number) -> Response:
    """Take the client's half of a SPAKE2 exchange and answer the server's; this uses up one of five tries."""
    here = context_of(request)
    body = await body_of(request, wire.PairingRequest, BODY_BYTES)
    certificate = _tls(here).certificate_sha256

    def exchange() -> tuple[str, Confirmations]:
        code: Code = here.access.attempt(number)
        mine = Exchange(Side.SERVER, code, bytes.fromhex(certificate))
        return mine.message.hex(), mine.finish(bytes.fromhex(body.message))

    message, wanted = await here.workers.quick(exchange)
    return answer(wire.PairingAnswer(exchange=here.exchanges.add(number, wanted), message=message))


@router.post(
    "/pairings/{number}/confirm",
    summary="Use a pairing code",
    **openapi.gives(wire.Paired, 400, 401, 411, 413),
    openapi_extra=openapi.takes(wire.PairingConfirm),
)
async def confirm(request: Request, number: Number) -> Response:
    """Let a client in that proves to know the code: it gets a token, a certificate for its key, and our own proof."""
    here = context_of(request)
    body = await body_of(request, wire.PairingConfirm, BODY_BYTES)
    wanted = here.exchanges.take(body.exchange, number)
    if not is_same(wanted.of_client, bytes.fromhex(body.confirmation)):
        raise Unauthorized(NO_PAIRING)
    return answer(await here.workers.quick(partial(_let_in, here, number, body.public_key, wanted.of_server)))


def _let_in(here: Context, number: int, public_key: str, confirmation: bytes) -> wire.Paired:
    issued = _issued(here, public_key, f"pairing {number}")
    token = here.access.pair(number, issued.sha256 if issued else None)
    return wire.Paired(
        confirmation=confirmation.hex(),
        token=token,
        certificate=issued.pem if issued else None,
        ca=issued.ca_pem if issued else None,
    )


@router.delete("/token", summary="End the caller's token", **openapi.gives(wire.Unpaired, 400, 401))
async def end(request: Request) -> Response:
    """Revoke the token that is shown, and its certificate."""
    here, caller = context_of(request), caller_of(request)
    if caller.token is None:
        raise UsageError("no token is shown")
    row = await here.workers.quick(partial(here.access.revoke, caller.token))
    return answer(wire.Unpaired(id=row.id))


class _Issued(NamedTuple):
    """A client's certificate and the CA that it is of."""

    pem: str
    sha256: bytes
    ca_pem: str


def _issued(here: Context, public_key: str, name: str) -> _Issued | None:
    """Return a certificate for a client's key, where this server has a CA of its own."""
    ca = _tls(here).ca
    if ca is None:
        return None
    from deltasync_server import tls  # with a library that a server without TLS never needs

    pem = tls.issue_client(tls.load_authority(ca.parent), public_key.encode(), name, datetime.now(UTC)).decode()
    return _Issued(pem, hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).digest(), ca.read_text())


def _tls(here: Context) -> Tls:
    if here.tls is None:
        raise UsageError("pairing is for servers that other machines reach by https; this one needs none")
    return here.tls
