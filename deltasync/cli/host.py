"""`deltasync host`: the book of hosts, servers by name with their certificates and tokens."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from msgspec import structs

from deltasync.cli.options import Call, command, new_app
from deltasync.client import address, trust
from deltasync.client.hosts import Host, HostBook, time_text, token_in
from deltasync.core.errors import DeltasyncError, HostUntrusted, Unauthorized, UsageError
from deltasync.core.names import shown

FILE_BYTES_MAX = 1 << 20
PRICE_MAX = 1e9

app = new_app()


@app.callback()
def describe() -> None:
    """Keep servers by name, with what they are known by and the token that they are shown."""


@command(app, "timeout", "insecure")
def add(
    call: Call,
    name: Annotated[str, typer.Argument(metavar="NAME", help="What --to and --from will call it.")],
    url: Annotated[str, typer.Argument(metavar="URL", help="Its address.")],
    code: Annotated[
        str | None, typer.Argument(metavar="CODE", help="The one-time code that `deltasync-server pair` printed there.")
    ] = None,
    token_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="The file that holds the token to show it; - reads stdin.")
    ] = None,
    ca: Annotated[str | None, typer.Option(metavar="FILE", help="The only CA that may vouch for it, as PEM.")] = None,
    fingerprint: Annotated[
        str | None, typer.Option(metavar="SHA256", help="The fingerprint of the only certificate that it may have.")
    ] = None,
) -> int:
    """Add a server.

    With a CODE both sides prove to each other that they know it: the server's CA is pinned, and a token and a client
    certificate are kept. Without one, over https, it is known by its CA or by its certificate's fingerprint; with
    neither, a CA of this system has to vouch for it, which is tried at once. deltasync-server prints both fingerprints
    at its start, and where its CA lies.
    """
    settings = call.given()
    if code is not None:
        if ca or fingerprint or token_file:
            raise UsageError(
                "a pairing code brings CA and token itself; leave --ca, --fingerprint and --token-file out"
            )
        if "://" not in url:
            raise UsageError(f"{shown(url)} is no address of a server; with a code write https://host:port")
        return _pair(call, name, address.normal_url(url), code, settings.timeout_seconds)
    if ca is not None and fingerprint is not None:
        raise UsageError("a server is known by --ca or by --fingerprint, not by both")
    host = Host(
        name=name,
        url=_server(url, insecure=settings.insecure, is_pinned=bool(ca or fingerprint)),
        added_at=time_text(),
        token=None if token_file is None else _token(token_file),
        ca_pem=None if ca is None else _read(ca),
        fingerprint=None if fingerprint is None else trust.parse_fingerprint(fingerprint),
    )
    if host.trust.is_pinned:
        host.trust.context()  # raises for a CA that is none
    elif host.url.startswith("https:"):
        _require_vouched(host, settings.timeout_seconds, has_token_file=token_file is not None)
    HostBook.of_user(os.environ).add(host)
    call.out.answer(_facts(host))
    call.out.say(f"{host.name} is {host.url}, known by {_known_by(host)}")
    return 0


def _pair(call: Call, name: str, url: str, code: str, timeout: float) -> int:
    from deltasync.client.pairing import pair
    from deltasync.core.pairing import parse_code

    book, parsed = HostBook.of_user(os.environ), parse_code(code)
    book.require_free(name, url)  # before the code is used up
    host = pair(name, url, parsed, timeout)
    book.add(host)
    call.out.answer(_facts(host))
    call.out.say(f"{host.name} is {host.url}, paired, known by {_known_by(host)}")
    return 0


@command(app, "timeout")
def rotate(call: Call, name: Annotated[str, typer.Argument(metavar="NAME", help="Its name.")]) -> int:
    """Change the token and the certificate that a server is shown; the old ones are worth nothing from then on."""
    from deltasync.client import pairing

    book = HostBook.of_user(os.environ)
    host = pairing.rotate(book, book.named(name), call.settings().timeout_seconds)
    call.out.answer(_facts(host))
    call.out.say(f"{host.name} is shown another token and certificate from now on")
    return 0


@command(app)
def price(
    call: Call,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its name.")],
    per_hour: Annotated[str, typer.Argument(metavar="PRICE", help="Of one hour, such as 2.50; 0 forgets it.")],
) -> int:
    """Note what an hour of a server costs, so that `deltasync plan` says what a wait for inputs costs."""
    try:
        found = float(per_hour)
    except ValueError:
        found = -1.0
    if not 0 <= found <= PRICE_MAX:
        raise UsageError(f"{shown(per_hour)} is no price such as 2.50")
    book = HostBook.of_user(os.environ)
    host = structs.replace(book.named(name), price_per_hour=found or None)
    book.replace(host)
    call.out.answer(_facts(host))
    call.out.say(f"an hour of {host.name} costs {found:g}" if found else f"no price is known of {host.name}")
    return 0


@command(app, name="ls")
def list_hosts(call: Call) -> int:
    """List the known servers; tokens are not shown."""
    hosts = HostBook.of_user(os.environ).hosts()
    call.out.answer({"hosts": [_facts(each) for each in hosts]})
    for each in hosts:
        token = "a token" if each.token else "no token"
        call.out.say(f"{each.name:<16}  {each.url}  {_known_by(each)}, {token}, added {each.added_at}")
    if not hosts:
        call.out.say("no host is known; `deltasync host add NAME URL` adds one")
    return 0


@command(app, "timeout", name="rm")
def remove(call: Call, name: Annotated[str, typer.Argument(metavar="NAME", help="Its name.")]) -> int:
    """Forget a server and end the token that it was shown; what was pushed to it stays."""
    from deltasync.client import pairing

    book, is_ended, why = HostBook.of_user(os.environ), False, ""
    try:
        is_ended = pairing.unpair(book.named(name), call.settings().timeout_seconds)
    except DeltasyncError as error:  # a server that is gone, or a damaged record, is forgotten all the same
        why = f"; its token was not ended there: {error.sentence}"
    book.remove(name)
    call.out.answer({"removed": name, "token_ended": is_ended})
    call.out.say(f"{name} is forgotten{why}")
    return 0


def _server(url: str, *, insecure: bool, is_pinned: bool) -> str:
    found = address.normal_url(url)
    if not found.startswith(("http:", "https:")):
        raise UsageError(f"{shown(url)} is no server; the book is for addresses such as https://host:8080")
    if is_pinned and found.startswith("http:"):
        raise UsageError(f"{found} has no certificate; --ca and --fingerprint are for https://")
    if address.is_exposed(found) and not insecure:
        raise UsageError(f"{found} is not encrypted; use https://, an SSH tunnel, or --insecure with every command")
    return found


def _require_vouched(host: Host, timeout: float, *, has_token_file: bool) -> None:
    """Raise HostUntrusted where no CA of the system vouches for a server; it is shown no token."""
    from deltasync.client.transport import HttpTransport

    try:
        with contextlib.closing(HttpTransport(host.url, timeout=timeout, max_retries=0)) as transport:
            transport.health()
    except Unauthorized:
        return  # it is the one that is meant, and will be shown the token
    except HostUntrusted as error:
        found = trust.presented(host.url, timeout)
        if found is None:
            raise
        again = f"deltasync host add {host.name} {host.url} --fingerprint {found}"
        raise HostUntrusted(
            f"no CA of this system vouches for {host.url}; it now presents a certificate with the SHA-256 {found}: "
            "pair with it (`deltasync-server pair` there prints a CODE to add), or compare that with what it printed "
            f"there, and only if it is the same run `{again}"
            f"{' --token-file FILE' if has_token_file else ''}`",
            fingerprint=found,
        ) from error


def _token(file: str) -> str:
    return token_in(sys.stdin.readline() if file == "-" else _read(file), "stdin" if file == "-" else shown(file))


def _read(file: str) -> str:
    try:
        with Path(file).open("rb") as opened:
            return opened.read(FILE_BYTES_MAX).decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UsageError(f"{shown(file)} cannot be read: {reason}") from error


def _known_by(host: Host) -> str:
    if host.ca_pem is not None:
        return f"its CA ({trust.fingerprint_of(host.ca_pem)[:16]})"
    if host.fingerprint is not None:
        return f"its certificate ({host.fingerprint[:16]})"
    return "the CAs of this system" if host.url.startswith("https:") else "its address alone"


def _facts(host: Host) -> dict[str, Any]:
    """Return what may be shown of a host."""
    return {
        "name": host.name,
        "url": host.url,
        "ca_sha256": trust.fingerprint_of(host.ca_pem) if host.ca_pem is not None else None,
        "certificate_sha256": host.fingerprint,
        "has_token": host.token is not None,
        "has_client_certificate": host.client_cert_pem is not None,
        "price_per_hour": host.price_per_hour,
        "added_at": host.added_at,
    }
