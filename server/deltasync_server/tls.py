"""Certificates of a server: its own CA, what the CA issues, and the TLS that they make (spec H-90 to H-94, ST-97)."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from deltasync.core.errors import Corrupt, UsageError
from deltasync.core.names import shown
from deltasync.disk import fsync_folder, staged

FOLDER, CA, CA_KEY, SERVER = "tls", "ca.pem", "ca.key", "server.pem"
"""Where certificates lie in a store: the CA, its key, and the server's certificate with its key (spec ST-97)."""
ORGANIZATION = "deltasync-server"
"""The subject's organization in every CA made here: a client knows by it that this CA vouches for one server alone."""
CA_DAYS = 3650
SERVER_DAYS = 365
RENEW_DAYS = 30
SKEW = timedelta(days=1)
"""How far a clock may be behind that looks at a new certificate."""
_NAME_MAX = 64
"""What the common name of a certificate may have."""

_PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey | ed25519.Ed25519PublicKey | ed448.Ed448PublicKey


@dataclass(frozen=True, slots=True)
class Authority:
    """A CA that can issue certificates."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


@dataclass(slots=True)
class Tls:
    """What a server answers handshakes with, and what its operator is told of it."""

    context: ssl.SSLContext
    certificate_sha256: str
    """Of the one that is shown now."""
    ca_sha256: str | None = None
    """None where the operator gave the certificate."""
    ca: Path | None = None
    is_new: bool = False
    """Whether the CA was made just now: clients do not have it yet."""
    names: Sequence[x509.GeneralName] = ()
    """What the operator calls the server."""

    def renewed(self, now: datetime) -> x509.Certificate | None:
        """Make another certificate if this one is soon over; None where it is not, or is the operator's (H-92)."""
        if self.ca is None:
            return None
        folder = self.ca.parent
        authority = load_authority(folder)
        if _current(folder / SERVER, authority, self.names, now) is not None:
            return None
        return _renewed(folder / SERVER, authority, self.names, now)

    def show(self, certificate: x509.Certificate) -> None:
        """Answer handshakes from now on with a renewed certificate."""
        assert self.ca is not None
        self.context.load_cert_chain(self.ca.parent / SERVER)
        self.certificate_sha256 = sha256_of(certificate)


def given(certificate: Path, key: Path) -> Tls:
    """Return the TLS of a certificate that the operator has (spec H-91)."""
    try:
        first = x509.load_pem_x509_certificates(certificate.read_bytes())[0]
        return Tls(_context(certificate, key), sha256_of(first))
    except (OSError, ValueError) as error:  # an SSLError is an OSError
        raise UsageError(f"{shown(str(certificate))} with {shown(str(key))} cannot be used: {error}") from error


def own(data: Path, names: Sequence[str], now: datetime) -> Tls:
    """Return the TLS of a store's own CA; what is missing, or soon over, is made (spec H-92).

    names: what the server is called beside what its machine says. The caller holds the store.
    """
    folder = data / FOLDER
    wanted = [_general_name(each) for each in names]
    if not folder.exists():
        folder.mkdir(mode=0o700)
        fsync_folder(data)
    is_new = not (folder / CA).exists()
    authority = _new_authority(folder, now) if is_new else load_authority(folder)
    certificate = _current(folder / SERVER, authority, wanted, now) or _renewed(folder / SERVER, authority, wanted, now)
    context = _context(folder / SERVER, None)
    context.verify_mode = ssl.CERT_OPTIONAL
    context.load_verify_locations(cadata=_pem(authority.certificate).decode())
    return Tls(
        context, sha256_of(certificate), sha256_of(authority.certificate), (folder / CA).absolute(), is_new, wanted
    )


def load_authority(folder: Path) -> Authority:
    """Return the CA that a folder keeps; raises Corrupt where it is damaged, and for one that is over."""
    try:
        certificate = x509.load_pem_x509_certificate((folder / CA).read_bytes())
        key = serialization.load_pem_private_key((folder / CA_KEY).read_bytes(), password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise ValueError("the key is not the certificate's")
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise Corrupt(
            f"the CA in {shown(str(folder))} cannot be used: {error}; restore the folder from a backup, or remove it "
            "and add this server to its clients anew"
        ) from error
    return Authority(certificate, key)


def issue_client(authority: Authority, asked: bytes, name: str, now: datetime) -> bytes:
    """Return a certificate, as PEM, for a client's key: it proves to this server who connects, and nothing else.

    asked: a certificate request or a public key, as PEM. name: what the certificate calls the client, whatever a
    request says. Raises UsageError for what is neither.
    """
    if not 0 < len(name) <= _NAME_MAX:
        raise UsageError(f"the name in a certificate has 1 to {_NAME_MAX} characters")
    builder = _builder(_public_key(asked), name, now, timedelta(days=CA_DAYS), authority)
    return _pem(_leaf(builder, ExtendedKeyUsageOID.CLIENT_AUTH).sign(authority.key, hashes.SHA256()))


def sha256_of(certificate: x509.Certificate) -> str:
    """Return the fingerprint that people compare: SHA-256 of the certificate, 64 hexadecimal digits."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def _context(certificate: Path, key: Path | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate, key, password=_no_password)
    return context


def _no_password() -> str:
    raise ValueError("its key has a password, which nobody can type here")


def _new_authority(folder: Path, now: datetime) -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    name = f"{socket.gethostname()[: _NAME_MAX - 22]} {key.public_key().public_numbers().x:064x}"[:_NAME_MAX]
    builder = _builder(key.public_key(), name, now, timedelta(days=CA_DAYS))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    authority = Authority(builder.sign(key, hashes.SHA256()), key)
    _write(folder / CA_KEY, _private_pem(key))  # first: a certificate says that its key is there
    _write(folder / CA, _pem(authority.certificate))
    return authority


def _current(
    path: Path, authority: Authority, names: Sequence[x509.GeneralName], now: datetime
) -> x509.Certificate | None:
    """Return the server's certificate; None where there is none that goes on for a while and has these names."""
    try:
        content = path.read_bytes()
        certificate = x509.load_pem_x509_certificate(content)
        key = serialization.load_pem_private_key(content, password=None)
        certificate.verify_directly_issued_by(authority.certificate)
        present = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature, x509.ExtensionNotFound):
        return None
    is_ours = key.public_key() == certificate.public_key() and set(names) <= set(present)
    return certificate if is_ours and certificate.not_valid_after_utc - now > timedelta(days=RENEW_DAYS) else None


def _renewed(path: Path, authority: Authority, names: Sequence[x509.GeneralName], now: datetime) -> x509.Certificate:
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(key.public_key(), socket.gethostname()[:_NAME_MAX], now, timedelta(days=SERVER_DAYS), authority)
    everything = list(dict.fromkeys([*names, *_own_names()]))
    builder = builder.add_extension(x509.SubjectAlternativeName(everything), critical=False)
    builder = _leaf(builder, ExtendedKeyUsageOID.SERVER_AUTH)
    certificate = builder.sign(authority.key, hashes.SHA256())
    _write(path, _private_pem(key) + _pem(certificate))  # in one file: they are never those of two renewals
    return certificate


def _builder(
    key: _PublicKey, name: str, now: datetime, life: timedelta, issuer: Authority | None = None
) -> x509.CertificateBuilder:
    """Return a certificate that its issuer, or itself, has still to sign; it ends with its issuer at the latest."""
    attributes = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, ORGANIZATION)] if issuer is None else []
    subject = x509.Name([*attributes, x509.NameAttribute(NameOID.COMMON_NAME, name)])
    end = now + life if issuer is None else min(now + life, issuer.certificate.not_valid_after_utc)
    signer = key if issuer is None else issuer.key.public_key()
    if end <= now:
        raise UsageError(
            f"the CA of this server ended on {end:%Y-%m-%d}; remove the folder {FOLDER} of its data, start it again, "
            "and add it to its clients anew"
        )
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer.certificate.subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), critical=False)
    )


def _leaf(builder: x509.CertificateBuilder, purpose: x509.ObjectIdentifier) -> x509.CertificateBuilder:
    return (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _public_key(asked: bytes) -> _PublicKey:
    try:
        if b"CERTIFICATE REQUEST" in asked:
            request = x509.load_pem_x509_csr(asked)
            if not request.is_signature_valid:
                raise ValueError("its signature is wrong")
            key = request.public_key()
        else:
            key = serialization.load_pem_public_key(asked)  # type: ignore[assignment]
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UsageError(f"this is no certificate request and no public key: {error}") from error
    if isinstance(key, rsa.RSAPublicKey) and key.key_size < 2048:
        raise UsageError("an RSA key has at least 2048 bits")
    if not isinstance(key, _PublicKey):
        raise UsageError("a client's key is one for ECDSA, Ed25519, Ed448 or RSA")
    return key


def _general_name(text: str) -> x509.GeneralName:
    """Return what the operator calls this server, as a certificate has it."""
    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(text.strip("[]")))
    try:
        name = text.encode("idna").decode("ascii").lower()
    except UnicodeError as error:
        raise UsageError(f"{shown(text)} is no name for a certificate: {error}") from error
    if not name or not all(part.replace("-", "a").replace("_", "a").isalnum() for part in name.split(".")):
        raise UsageError(f"{shown(text)} is no name for a certificate; write a host's name or address without a port")
    return x509.DNSName(name)


def _own_names() -> list[x509.GeneralName]:
    """Return what this machine calls itself, and the addresses that it knows of."""
    found = []
    for text in ("localhost", "127.0.0.1", "::1", socket.gethostname(), socket.getfqdn(), *_addresses()):
        with contextlib.suppress(UsageError):  # what is no name for a certificate is left out
            found.append(_general_name(text))
    return found


def _addresses() -> list[str]:
    found: list[str] = []
    with contextlib.suppress(OSError):
        found += [str(each[4][0]).partition("%")[0] for each in socket.getaddrinfo(socket.gethostname(), None)]
    for family, anywhere in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((anywhere, 9))  # sends nothing: the system only chooses the address it would send from
            found.append(probe.getsockname()[0])
    return found


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, content: bytes) -> None:
    with staged(path) as out:
        out.write(content)
