"""Certificates of every kind for tests, and servers of real TLS that show them."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

NOW = datetime.now(UTC)
SERVER, CLIENT = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH


@dataclass(frozen=True)
class Made:
    """A certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> str:
        return self.certificate.public_bytes(serialization.Encoding.PEM).decode()

    @property
    def key_pem(self) -> str:
        form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        return self.key.private_bytes(*form).decode()

    @property
    def public_pem(self) -> bytes:
        form = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        return self.key.public_key().public_bytes(*form)

    @property
    def sha256(self) -> str:
        return self.certificate.fingerprint(hashes.SHA256()).hex()

    def context(self, folder: Path) -> ssl.SSLContext:
        """Return a server's TLS with this certificate."""
        (folder / "shown.pem").write_text(self.key_pem + self.pem)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "shown.pem")
        return context


def made(
    *names: str,
    issuer: Made | None = None,
    is_ca: bool = False,
    organization: str = "Elsewhere Ltd",
    purpose: x509.ObjectIdentifier = SERVER,
    days: tuple[int, int] = (-2, 100),
) -> Made:
    """Make a certificate; without an issuer it signs itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    parts = [(NameOID.ORGANIZATION_NAME, organization), (NameOID.COMMON_NAME, f"{names} {is_ca}")]
    subject = x509.Name([x509.NameAttribute(*each) for each in parts])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW + timedelta(days=days[0]))
        .not_valid_after(NOW + timedelta(days=days[1]))
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
    )
    if not is_ca:
        builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        alternatives = x509.SubjectAlternativeName([_name(each) for each in names])
        builder = builder.add_extension(alternatives, critical=False)
    return Made(builder.sign(issuer.key if issuer else key, hashes.SHA256()), key)


def _name(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


@dataclass
class Seen:
    """What came to a server after its handshakes."""

    port: int
    requests: list[bytes] = field(default_factory=list)


@contextmanager
def presenting(
    context: ssl.SSLContext | None, answer: bytes, *, hangs_up: bool = False, port: int = 0
) -> Iterator[Seen]:
    """Serve one answer for each connection, over TLS, or without."""
    with socket.create_server(("127.0.0.1", port)) as listener:
        seen = Seen(listener.getsockname()[1])
        thread = threading.Thread(target=_serve, args=(listener, context, answer, seen, hangs_up), daemon=True)
        thread.start()
        yield seen
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        thread.join(20)


def _serve(listener: socket.socket, context: ssl.SSLContext | None, answer: bytes, seen: Seen, hangs_up: bool) -> None:
    while True:
        try:
            plain, _ = listener.accept()
        except OSError:
            return
        plain.settimeout(20)
        with plain, contextlib.suppress(OSError):
            connection = plain if context is None else context.wrap_socket(plain, server_side=True)
            with connection:
                if part := connection.recv(1 << 16):
                    seen.requests.append(part)
                    if not hangs_up:
                        connection.sendall(answer)
