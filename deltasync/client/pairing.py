"""Pairing with a server by a one-time code, and changing the key that came of it (spec H-120 to H-125)."""

from __future__ import annotations

import contextlib
import secrets
from typing import TypeVar

import msgspec
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from deltasync.client.hosts import Host, HostBook, time_text
from deltasync.client.transport import HttpTransport
from deltasync.client.trust import Trust, presented
from deltasync.core import wire
from deltasync.core.errors import Forbidden, HostUnreachable, HostUntrusted, NotFound, Unauthorized, UsageError
from deltasync.core.hashing import digest_of
from deltasync.core.pairing import Code, Exchange, Side, is_same
from deltasync.core.wire import Paired

_ROUTE = "/pairings"
_SECRET_BYTES = 32
_Answer = TypeVar("_Answer")


def pair(name: str, url: str, code: Code, timeout: float) -> Host:
    """Return a server as the book keeps it, after both sides have proved that they know the code.

    Raises Unauthorized for a wrong or used code, and HostUntrusted where somebody stands between with a certificate of
    their own; nothing that was answered before the proof is believed.
    """
    if not url.startswith("https:"):
        raise UsageError(
            f"a code works only over https://; for {url} use --token-file FILE, if it asks for a token at all"
        )
    certificate = presented(url, timeout)
    if certificate is None:
        raise HostUnreachable(f"no TLS answer from {url}; is the server running, and is this its address?")
    private_pem, public_pem = _new_key()
    with _transport(url, Trust(fingerprint=certificate), None, timeout) as transport:
        paired = _exchanged(transport, code, bytes.fromhex(certificate), public_pem)
    host = Host(
        name=name,
        url=url,
        added_at=time_text(),
        token=paired.token,
        ca_pem=paired.ca,
        fingerprint=certificate if paired.ca is None else None,
        client_cert_pem=paired.certificate,
        client_key_pem=private_pem if paired.certificate else None,
    )
    _require_welcome(host, timeout)
    return host


def _exchanged(transport: HttpTransport, code: Code, certificate: bytes, public_pem: str) -> Paired:
    mine = Exchange(Side.CLIENT, code, certificate)
    route = f"{_ROUTE}/{code.number}"
    begun = _asked(transport, wire.PairingAnswer, route, wire.PairingRequest(message=mine.message.hex()))
    wanted = mine.finish(bytes.fromhex(begun.message))
    proof = wire.PairingConfirm(exchange=begun.exchange, confirmation=wanted.of_client.hex(), public_key=public_pem)
    paired = _asked(transport, Paired, f"{route}/confirm", proof)
    if not is_same(wanted.of_server, bytes.fromhex(paired.confirmation)):
        raise HostUntrusted(
            f"what answers at {transport.url} does not know the code: it is not the server that the code came from"
        )
    return paired


def rotate(book: HostBook, host: Host, timeout: float) -> Host:
    """Put a new secret and certificate in the place of a host's, on both sides; the old ones are then worth nothing.

    The new secret is in the book before the server hears of it: whenever this breaks off, one of both is good.
    """
    host = settled(book, host, timeout)
    if host.token is None:
        raise UsageError(f"{host.name} is shown no token; there is nothing to change")
    private_pem, public_pem = _new_key()
    secret = secrets.token_bytes(_SECRET_BYTES)
    fresh = f"{host.token.rpartition('_')[0]}_{secret.hex()}"
    book.replace(msgspec.structs.replace(host, next_token=fresh))
    request = wire.RotateRequest(digest=digest_of(secret).hex(), public_key=public_pem)
    with _transport(host.url, host.trust, host.token, timeout) as transport:
        rotated = _asked(transport, wire.Rotated, "/token/rotate", request)
    return _kept(book, host, fresh, rotated.certificate, private_pem)


def settled(book: HostBook, host: Host, timeout: float) -> Host:
    """Finish a rotation that was broken off: find out which of both secrets the server takes."""
    fresh = host.next_token
    if fresh is None:
        return host
    trust = Trust(host.ca_pem, host.fingerprint)  # the old certificate may be revoked with the old secret
    with _transport(host.url, trust, fresh, timeout) as transport:
        try:
            transport.health()
        except Unauthorized:
            host = msgspec.structs.replace(host, next_token=None)
            book.replace(host)
            return host
    return _kept(book, host, fresh, None, None)


def _kept(book: HostBook, host: Host, token: str, certificate: str | None, private_pem: str | None) -> Host:
    host = msgspec.structs.replace(
        host,
        token=token,
        next_token=None,
        client_cert_pem=certificate,
        client_key_pem=private_pem if certificate else None,
    )
    book.replace(host)
    return host


def unpair(host: Host, timeout: float) -> bool:
    """End a host's token on the server, whichever it is after a rotation that broke off; tell whether one was ended."""
    for token in filter(None, (host.token, host.next_token)):
        trust = Trust(host.ca_pem, host.fingerprint)
        with contextlib.suppress(Unauthorized, NotFound), _transport(host.url, trust, token, timeout) as transport:
            transport.ask(wire.Unpaired, "DELETE", "/token")
            return True
    return False


def _require_welcome(host: Host, timeout: float) -> None:
    """Use what was got once: a CA that does not vouch for the server is found out now, not by the next push."""
    with _transport(host.url, host.trust, host.token, timeout) as transport, contextlib.suppress(Forbidden):
        transport.health()  # a token that may not look is welcome all the same


def _transport(url: str, trust: Trust, token: str | None, timeout: float) -> contextlib.closing[HttpTransport]:
    return contextlib.closing(HttpTransport(url, trust=trust, token=token, timeout=timeout, max_retries=0))


def _asked(transport: HttpTransport, kind: type[_Answer], route: str, body: msgspec.Struct) -> _Answer:
    return transport.ask(kind, "POST", route, body=msgspec.json.encode(body))


def _new_key() -> tuple[str, str]:
    """Return a new private key and its public one, as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return private.decode(), public.decode()
