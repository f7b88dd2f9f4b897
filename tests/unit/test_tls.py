"""A server's own CA: what it makes, what it keeps, what it makes anew, and whom it vouches for."""

from __future__ import annotations

import asyncio
import http.client
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from certificates import NOW, made
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import NameOID

from deltasync.client.trust import Trust
from deltasync.core.errors import Corrupt, UsageError
from deltasync_server import tls
from deltasync_server.config import ServeConfig
from deltasync_server.http.protocol import protocol_for


def test_what_is_made_is_kept_and_its_owners_alone(tmp_path: Path) -> None:
    """The folder is 0700, its files 0600; a second start has the same CA and certificate."""
    first = tls.own(tmp_path, ["gpu.example", "192.0.2.7"], NOW)
    folder = tmp_path / "tls"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {each.name: each.stat().st_mode & 0o777 for each in folder.iterdir()} == {
        "ca.key": 0o600,
        "ca.pem": 0o600,
        "server.pem": 0o600,
    }
    again = tls.own(tmp_path, ["192.0.2.7"], NOW + timedelta(days=300))
    assert (first.is_new, again.is_new) == (True, False)
    assert (again.certificate_sha256, again.ca_sha256) == (first.certificate_sha256, first.ca_sha256)


@pytest.mark.parametrize(
    ("names", "days", "is_renewed"),
    [
        ([], 334, False),
        ([], 336, True),
        ([], 400, True),
        (["gpu.example"], 0, False),
        (["GPU.example"], 0, False),
        (["other"], 0, True),
        (["fd00::1"], 0, True),
    ],
)
def test_a_certificate_is_renewed_in_time_and_for_a_new_name(
    tmp_path: Path, names: list[str], days: int, is_renewed: bool
) -> None:
    """Less than 30 days before its end, or when a name is missing, there is another one of the same CA."""
    first = tls.own(tmp_path, ["gpu.example"], NOW)
    second = tls.own(tmp_path, names, NOW + timedelta(days=days))
    assert (second.certificate_sha256 != first.certificate_sha256) == is_renewed
    assert second.ca_sha256 == first.ca_sha256


@pytest.mark.parametrize("content", ["", "nonsense", made("x").pem, made("x").key_pem + made("x").pem])
def test_a_certificate_that_cannot_be_used_is_made_anew(tmp_path: Path, content: str) -> None:
    """Whatever happened to the server's certificate, the CA issues another one."""
    first = tls.own(tmp_path, [], NOW)
    (tmp_path / "tls/server.pem").write_text(content)
    second = tls.own(tmp_path, [], NOW)
    assert second.ca_sha256 == first.ca_sha256 and second.certificate_sha256 != first.certificate_sha256


def test_a_first_start_that_was_cut_short_begins_anew(tmp_path: Path) -> None:
    """A key without its CA is of a start that never got further: no client knows it."""
    tls.own(tmp_path, [], NOW)
    for name in ("ca.pem", "server.pem"):
        (tmp_path / "tls" / name).unlink()
    assert tls.own(tmp_path, [], NOW).is_new


def test_a_ca_that_lost_its_key_is_damage(tmp_path: Path) -> None:
    """Clients know the CA: it is not replaced in silence."""
    tls.own(tmp_path, [], NOW)
    for content in (b"nonsense", made(is_ca=True).key_pem.encode()):
        (tmp_path / "tls/ca.key").write_bytes(content)
        with pytest.raises(Corrupt, match="restore the folder from a backup, or remove it"):
            tls.own(tmp_path, [], NOW)
    (tmp_path / "tls/ca.key").unlink()
    with pytest.raises(Corrupt):
        tls.own(tmp_path, [], NOW)


def test_a_ca_ends(tmp_path: Path) -> None:
    """Nothing that a CA issues outlasts it, and after ten years it says what to do."""
    tls.own(tmp_path, [], NOW)
    tls.own(tmp_path, [], NOW + timedelta(days=3600))
    last = x509.load_pem_x509_certificate((tmp_path / "tls/server.pem").read_bytes())
    assert last.not_valid_after_utc == tls.load_authority(tmp_path / "tls").certificate.not_valid_after_utc
    with pytest.raises(UsageError, match="the CA of this server ended"):
        tls.own(tmp_path, [], NOW + timedelta(days=3651))


@pytest.mark.parametrize("name", ["", "a b", "gpu:8080", "http://gpu", "a..b", "x" * 64, "\x00", "ä" * 70])
def test_what_is_no_name_is_refused(tmp_path: Path, name: str) -> None:
    """A name that no certificate can have is a mistake of the operator."""
    with pytest.raises(UsageError, match="is no name for a certificate"):
        tls.own(tmp_path, [name], NOW)


def test_the_operators_certificate_must_be_usable(tmp_path: Path) -> None:
    """A key of another certificate, a key with a password and files that are none are refused with their names."""
    one, other = made("gpu.example"), made("gpu.example")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    certificate.write_text(one.pem)
    locked = one.key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
    ).decode()
    for content in (other.key_pem, locked, "nonsense", ""):
        key.write_text(content)
        with pytest.raises(UsageError, match=r"cert\.pem with .*key\.pem cannot be used"):
            tls.given(certificate, key)
    key.write_text(one.key_pem)
    assert tls.given(certificate, key).certificate_sha256 == one.sha256
    with pytest.raises(UsageError, match="cannot be used"):
        tls.given(tmp_path / "none.pem", key)


# Clients


def request_of(key: Any, name: str = "root") -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def test_a_client_is_called_what_the_server_says(tmp_path: Path) -> None:
    """A certificate has the key that was asked for and the name that was decided; a request's own names are nothing."""
    tls.own(tmp_path, [], NOW)
    authority, client = tls.load_authority(tmp_path / "tls"), made()
    for asked in (request_of(client.key), client.public_pem):
        issued = x509.load_pem_x509_certificate(tls.issue_client(authority, asked, "ada's desk", NOW))
        issued.verify_directly_issued_by(authority.certificate)
        assert issued.public_key() == client.key.public_key()
        assert [each.value for each in issued.subject] == ["ada's desk"]
        purposes = issued.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert list(purposes) == [x509.ExtendedKeyUsageOID.CLIENT_AUTH]
        assert not issued.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_what_is_no_request_is_refused(tmp_path: Path) -> None:
    """Neither rubbish, nor a private key, nor a request that its key did not sign gets a certificate."""
    tls.own(tmp_path, [], NOW)
    authority = tls.load_authority(tmp_path / "tls")
    forged = bytearray(request_of(made().key))
    forged[-60] ^= 1
    for asked in (b"", b"nonsense", made().key_pem.encode(), bytes(forged)):
        with pytest.raises(UsageError):
            tls.issue_client(authority, asked, "x", NOW)
    for name in ("", "x" * 65):
        with pytest.raises(UsageError, match="1 to 64"):
            tls.issue_client(authority, made().public_pem, name, NOW)


@contextmanager
def naming(context: ssl.SSLContext) -> Iterator[int]:
    """Serve, with our protocol, the certificate that the client showed."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": scope["client_certificate"] or b"nobody"})

    config = uvicorn.Config(
        app,
        http=protocol_for(ServeConfig()),
        ws="none",
        lifespan="off",
        log_config=None,
        ssl_context_factory=lambda *_: context,
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join(20)


def ask(port: int, trust: Trust) -> bytes:
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=20, context=trust.context())
    try:
        connection.request("GET", "/")
        return connection.getresponse().read()
    finally:
        connection.close()


def test_who_shows_a_certificate_is_known_to_the_routes(tmp_path: Path) -> None:
    """The routes see the certificate that the handshake proved, nobody's where none was shown, and no other's ever."""
    own = tls.own(tmp_path, [], NOW)
    assert own.ca
    pem, authority, client = own.ca.read_text(), tls.load_authority(tmp_path / "tls"), made()
    issued = tls.issue_client(authority, client.public_pem, "ada", NOW).decode()
    server_pem = (tmp_path / "tls/server.pem").read_text()
    with naming(own.context) as port:
        assert ask(port, Trust(ca_pem=pem)) == b"nobody"
        known = Trust(None, own.certificate_sha256, issued, client.key_pem)
        assert ask(port, known) == ssl.PEM_cert_to_DER_cert(issued)
        end = server_pem.index("-----END PRIVATE KEY-----") + 26
        foreign = made(issuer=made(is_ca=True, organization=tls.ORGANIZATION))
        for shown, key in (
            (client.pem, client.key_pem),  # signed by itself
            (foreign.pem, foreign.key_pem),
            (server_pem[end:], server_pem[:end]),  # of the right CA, for another purpose
            (pem, (tmp_path / "tls/ca.key").read_text()),
        ):
            with pytest.raises(OSError):
                ask(port, Trust(pem, None, shown, key))
        assert ask(port, Trust(ca_pem=pem)) == b"nobody"
