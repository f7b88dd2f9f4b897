"""The HTTP transport over TLS: whom it trusts, and that everybody else gets no byte of a request."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import certificates
import msgspec
import pytest
from certificates import CLIENT, Made, made, presenting

from deltasync.client import connection
from deltasync.client.transport import HttpTransport
from deltasync.client.trust import Trust, parse_fingerprint
from deltasync.core import wire
from deltasync.core.errors import (
    DeltasyncError,
    HostUnreachable,
    HostUntrusted,
    NotADeltasyncServer,
    Unauthorized,
    UsageError,
)
from deltasync_server import tls

HEALTH = wire.Health(status="ok", version="0", disk_free_bytes=0, disk_total_bytes=0, workspaces=0, uptime_seconds=0.0)
TOKEN = "canary-5f0a"


def http(body: bytes, status: str = "200 OK", more: str = "") -> bytes:
    head = f"HTTP/1.1 {status}\r\nDeltasync-Server: 1\r\nContent-Length: {len(body)}\r\nConnection: close\r\n{more}\r\n"
    return head.encode() + body


GOOD = http(msgspec.json.encode(HEALTH))


def transport(port: int, trust: Trust, host: str = "127.0.0.1") -> HttpTransport:
    return HttpTransport(f"https://{host}:{port}", trust=trust, token=TOKEN, timeout=10, max_retries=0)


@pytest.fixture
def own(tmp_path: Path) -> tls.Tls:
    """A deltasync-server's own CA and certificate."""
    return tls.own(tmp_path, [], certificates.NOW)


def pinned(own: tls.Tls) -> Trust:
    assert own.ca
    return Trust(ca_pem=own.ca.read_text())


def test_an_own_ca_is_enough_whatever_the_server_is_called(own: tls.Tls) -> None:
    """A server that is known by its own CA answers at any address, also one that no certificate has."""
    with presenting(own.context, GOOD) as seen, warnings.catch_warnings():
        warnings.simplefilter("error")
        for host in ("127.0.0.1", "localhost", "0.0.0.0"):
            assert transport(seen.port, pinned(own), host).health() == HEALTH
    assert [b"Authorization: Bearer canary-5f0a\r\n" in each for each in seen.requests] == [True] * 3


def test_a_pinned_certificate_is_enough(tmp_path: Path) -> None:
    """A certificate that nobody vouches for, over and for another name, is the one that was pinned."""
    shown = made("elsewhere.example", days=(-9, -1))
    with presenting(shown.context(tmp_path), GOOD) as seen, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert transport(seen.port, Trust(fingerprint=shown.sha256)).health() == HEALTH


def test_the_systems_cas_vouch_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A certificate of a CA of the system holds for the name that it has."""
    ca = made(is_ca=True)
    (tmp_path / "system.pem").write_text(ca.pem)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "system.pem"))
    with presenting(made("127.0.0.1", issuer=ca).context(tmp_path), GOOD) as seen:
        assert transport(seen.port, Trust()).health() == HEALTH
        assert transport(seen.port, Trust(ca_pem=ca.pem)).health() == HEALTH
        with pytest.raises(HostUntrusted, match="is for another name"):
            transport(seen.port, Trust(), "localhost").health()
        with pytest.raises(
            HostUntrusted, match="is for another name"
        ):  # another CA than a server's own vouches for many
            transport(seen.port, Trust(ca_pem=ca.pem), "localhost").health()
    assert len(seen.requests) == 2


OURS, THEIRS = made(is_ca=True, organization=tls.ORGANIZATION), made(is_ca=True)
PIN = Trust(ca_pem=OURS.pem)


@pytest.mark.parametrize(
    ("shown", "trust", "says"),
    [
        (made("127.0.0.1"), Trust(), "nothing that is trusted here vouches for .*--fingerprint"),
        (made("127.0.0.1", issuer=OURS), Trust(), "nothing that is trusted here vouches for"),
        (made("127.0.0.1"), PIN, "has another certificate, or one of another CA, than what is pinned"),
        (made("127.0.0.1", issuer=THEIRS), PIN, "has another certificate, or one of another CA"),
        (made("127.0.0.1", issuer=OURS, days=(-9, -1)), PIN, "is not valid at this time .*expired"),
        (made("127.0.0.1", issuer=OURS, days=(1, 9)), PIN, "is not valid at this time"),
        (made("127.0.0.1", issuer=OURS, purpose=CLIENT), PIN, "is not one of a server"),
        (
            made("127.0.0.1", issuer=OURS),
            Trust(fingerprint="0" * 64),
            "has another certificate, or",
        ),
    ],
    ids=["self-signed", "unknown CA", "self-signed, pinned", "other CA", "expired", "early", "a client's", "changed"],
)
def test_who_cannot_prove_it_gets_no_byte(tmp_path: Path, shown: Made, trust: Trust, says: str) -> None:
    """Every such server is refused in one sentence, exit 7, before a request is sent, and not asked again."""
    with presenting(shown.context(tmp_path), GOOD) as seen:
        here = transport(seen.port, trust)
        here.max_retries = 3
        with pytest.raises(HostUntrusted, match=says) as caught:
            here.health()
        assert (caught.value.exit_code, here.requests) == (7, 1)
    assert seen.requests == []


def test_old_tls_is_refused(tmp_path: Path) -> None:
    """A server that speaks nothing newer than TLS 1.1 gets no byte."""
    shown = made("127.0.0.1", issuer=OURS)
    context = shown.context(tmp_path)
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with presenting(context, GOOD) as seen:
        for trust in (PIN, Trust(fingerprint=shown.sha256), Trust()):
            with pytest.raises(HostUntrusted, match=r"1\.2 is the oldest"):
                transport(seen.port, trust).health()
    assert seen.requests == []


def test_a_plain_answer_is_never_taken_for_one_of_tls() -> None:
    """Who takes TLS away on the way learns nothing but that somebody wanted it; on loopback it is a slip."""
    with presenting(None, GOOD) as seen:
        with pytest.raises(HostUntrusted, match="somebody in between takes TLS away; nothing was sent"):
            transport(seen.port, PIN, "0.0.0.0").health()
        with pytest.raises(NotADeltasyncServer, match="answers plain http; use http://127"):
            transport(seen.port, PIN).health()
    assert not any(TOKEN.encode() in each or b"HTTP" in each for each in seen.requests)


def test_tls_at_a_plain_address_is_a_hint(own: tls.Tls) -> None:
    """Who writes http for a server with TLS reads so."""
    with presenting(own.context, GOOD) as seen, pytest.raises(DeltasyncError, match=r"without TLS|does not speak HTTP"):
        HttpTransport(f"http://127.0.0.1:{seen.port}", max_retries=0).health()


def test_a_lost_connection_is_one_also_under_tls(own: tls.Tls) -> None:
    """A server that hangs up is away, which a retry can help, and not one that cannot be trusted."""
    with presenting(own.context, b"", hangs_up=True) as seen, pytest.raises(HostUnreachable):
        transport(seen.port, pinned(own)).health()
    assert len(seen.requests) == 1


def test_a_handshake_drop_by_drop_ends_in_time(own: tls.Tls, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever answers a handshake byte by byte, before it had to prove anything, holds a client only so long."""
    monkeypatch.setattr(connection, "HANDSHAKE_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(b"\x16\x03\x03\x40\x00")  # a record of 16 KiB follows
                while not is_over.wait(0.02):
                    connection.sendall(b"\x02")

        is_over = threading.Event()
        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        with pytest.raises(HostUnreachable):
            transport(listener.getsockname()[1], pinned(own)).health()
        is_over.set()
        thread.join(20)


def test_a_redirect_takes_no_token_along(own: tls.Tls) -> None:
    """A server that redirects gets one request, and where it points to gets none."""
    with presenting(None, GOOD) as other:
        away = http(b"", "307 Away", f"Location: http://127.0.0.1:{other.port}/health\r\n")
        with presenting(own.context, away) as seen, pytest.raises(NotADeltasyncServer, match="redirects"):
            transport(seen.port, pinned(own)).health()
    assert (len(seen.requests), other.requests) == (1, [])


def test_plain_http_to_other_machines_needs_a_word() -> None:
    """Nothing is sent in the clear to another machine unless the user says so; loopback is none."""
    for url in ("http://192.0.2.1:1", "http://gpu.example", "http://0.0.0.0:1", "http://127.0.0.1.example"):
        with pytest.raises(UsageError, match="is not encrypted"):
            HttpTransport(url)
        HttpTransport(url, insecure=True)
    for url in ("http://127.0.0.1:1", "http://127.9.9.9:1", "http://[::1]:1", "http://localhost:1"):
        HttpTransport(url, token=TOKEN)
        with pytest.raises(UsageError, match="to the proxy"):
            HttpTransport(url, token=TOKEN, proxies=True)


def test_the_token_shows_nowhere(own: tls.Tls) -> None:
    """No error and no description of the transport has the token."""
    problem = wire.Problem(type="", title="", status=401, detail="who are you?", code="UNAUTHORIZED", facts={})
    with presenting(own.context, http(msgspec.json.encode(problem), "401 No")) as seen:
        here = transport(seen.port, pinned(own))
        with pytest.raises(Unauthorized) as caught:
            here.health()
    assert caught.value.exit_code == 7
    assert TOKEN not in "".join(map(repr, (here, caught.value, caught.value.facts, caught.traceback)))


def test_a_proxy_sees_no_request(own: tls.Tls, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a proxy the same server is trusted and no other: the proxy is asked for a tunnel and hears no more."""
    with presenting(None, b"HTTP/1.1 200 Go on\r\n\r\n") as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        here = HttpTransport("https://gpu.example", trust=pinned(own), token=TOKEN, max_retries=0, proxies=True)
        with pytest.raises(DeltasyncError):
            here.health()
    (asked,) = proxy.requests
    assert asked.startswith(b"CONNECT gpu.example:443 ") and TOKEN.encode() not in asked


@pytest.mark.parametrize("spelled", [str.upper, lambda text: ":".join(text[n : n + 2] for n in range(0, 64, 2))])
def test_a_fingerprint_is_read_as_any_tool_writes_it(spelled: Callable[[str], str]) -> None:
    """Upper case, colons and a prefix do not matter; anything but 64 digits is refused."""
    text = OURS.sha256
    assert parse_fingerprint(spelled(text)) == parse_fingerprint(f"SHA256:{spelled(text)}\n") == text
    for wrong in ("", text[:-2], text + "00", "g" * 64, "sha1:" + text[:40]):
        with pytest.raises(UsageError):
            parse_fingerprint(wrong)


def test_what_cannot_be_pinned_is_a_usage_error() -> None:
    """A CA that is none, and a client certificate that OpenSSL cannot read, are refused before anything is asked."""
    for pem in ("", "nonsense", made("127.0.0.1").pem.replace("A", "B")):
        with pytest.raises(UsageError):
            Trust(ca_pem=pem).context()
    with pytest.raises(UsageError, match="client's certificate"):
        Trust(client_cert_pem=OURS.pem, client_key_pem=THEIRS.key_pem).context()
