"""By what a client knows a server, and how it shows who it is itself: the TLS of one server (spec H-96 to H-98)."""

from __future__ import annotations

import hashlib
import re
import socket
import ssl
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from deltasync.client.answer import Deadline
from deltasync.core.errors import UsageError
from deltasync.core.names import shown

OWN_CA = "deltasync-server"
"""The subject's organization in a CA that a deltasync-server made for itself."""
_TOO_OLD = ("UNSUPPORTED_PROTOCOL", "TLSV1_ALERT_PROTOCOL_VERSION", "WRONG_SSL_VERSION")
_EXPIRED, _NOT_YET_VALID, _OTHER_NAME, _OTHER_ADDRESS, _OTHER_PURPOSE = 10, 9, 62, 64, 26
"""What OpenSSL calls what is wrong with a certificate."""


@dataclass(frozen=True, slots=True)
class Trust:
    """What a server must prove, and what it is shown; with nothing given, the system's CAs vouch for it."""

    ca_pem: str | None = None
    """The only CA that may vouch for it."""
    fingerprint: str | None = None
    """SHA-256 of the only certificate that it may have."""
    client_cert_pem: str | None = None
    client_key_pem: str | None = field(default=None, repr=False)

    @property
    def is_pinned(self) -> bool:
        """Whether the system's CAs have no say."""
        return self.ca_pem is not None or self.fingerprint is not None

    def context(self, more_cas: str | None = None) -> ssl.SSLContext:
        """Return a new context; raises UsageError for certificates that cannot be read.

        more_cas: a file of CAs beside those of the system, which may have none.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self.fingerprint is not None:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # what is compared is the certificate
        elif self.ca_pem is not None:
            _load(context, self.ca_pem)
            # A server's own CA vouches for nothing else, whatever name it is reached by; any other CA may.
            context.check_hostname = not all(map(_is_own, context.get_ca_certs()))
        else:
            context.load_default_certs()
            if more_cas is not None:
                context.load_verify_locations(more_cas)
        if self.client_cert_pem is not None and self.client_key_pem is not None:
            _load_client(context, self.client_cert_pem, self.client_key_pem)
        return context


SYSTEM = Trust()
"""The system's CAs vouch for the server."""


def parse_fingerprint(text: str) -> str:
    """Return a SHA-256 fingerprint as 64 lower-case digits, whatever tool wrote it; raises UsageError."""
    digits = re.sub(r"(?i)^\s*(sha-?256[ :=]\s*)?|[:\s]", "", text).lower()
    if not re.fullmatch("[0-9a-f]{64}", digits):
        raise UsageError(f"{shown(text)} is no SHA-256 fingerprint: it has 64 hexadecimal digits")
    return digits


def fingerprint_of(pem: str) -> str:
    """Return the SHA-256 fingerprint of the first certificate in a PEM text; raises ValueError."""
    start, end = pem.index(ssl.PEM_HEADER), pem.index(ssl.PEM_FOOTER) + len(ssl.PEM_FOOTER)
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem[start:end])).hexdigest()


def presented(url: str, timeout: float) -> str | None:
    """Return the fingerprint of the certificate that a server presents, trusted or not; None where it has none."""
    parts, context = urlsplit(url), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # what is asked for is who it says it is
    try:
        with (
            socket.create_connection((parts.hostname or "", parts.port or 443), timeout) as plain,
            Deadline(plain, timeout),
            context.wrap_socket(plain, server_hostname=parts.hostname) as secure,
        ):
            return hashlib.sha256(secure.getpeercert(binary_form=True) or b"").hexdigest()
    except OSError:  # an SSLError is one
        return None


def distrust(url: str, reasons: Iterable[BaseException], *, is_pinned: bool) -> str | None:
    """Say why a handshake failed, if it was because nobody could prove who answers."""
    for each in reasons:
        if isinstance(each, ssl.SSLCertVerificationError):
            return _unproven(url, each, is_pinned=is_pinned)
        if "Fingerprints did not match" in str(each):
            return _changed(url)
        if getattr(each, "reason", None) in _TOO_OLD:
            return f"{url} speaks no TLS that is safe: 1.2 is the oldest; update what answers there"
    return None


def _changed(url: str) -> str:
    return (
        f"{url} has another certificate, or one of another CA, than what is pinned; if its operator made it anew, "
        "compare the fingerprint that it prints at its start, `deltasync host rm` and `host add` it; if not, somebody "
        "is in between"
    )


def _unproven(url: str, error: ssl.SSLCertVerificationError, *, is_pinned: bool) -> str:
    if error.verify_code in (_EXPIRED, _NOT_YET_VALID):
        return (
            f"the certificate of {url} is not valid at this time ({error.verify_message}); restart deltasync-server, "
            "which renews its own, or set the clocks"
        )
    if error.verify_code in (_OTHER_NAME, _OTHER_ADDRESS):
        return f"the certificate of {url} is for another name; use one that it has, or pin it with `deltasync host add`"
    if error.verify_code == _OTHER_PURPOSE:
        return f"the certificate of {url} is not one of a server; somebody may be in between"
    if is_pinned:
        return _changed(url)
    return (
        f"nothing that is trusted here vouches for {url} ({error.verify_message}); run `deltasync-server pair` "
        f"there and `deltasync host add NAME {url} CODE` here, or add it with --ca or --fingerprint"
    )


def _is_own(ca: object) -> bool:
    subject = ca.get("subject", ()) if isinstance(ca, dict) else ()
    return any(("organizationName", OWN_CA) in part for part in subject)


def _load(context: ssl.SSLContext, pem: str) -> None:
    try:
        context.load_verify_locations(cadata=pem)
    except (ssl.SSLError, ValueError) as error:
        raise UsageError(f"the pinned CA is no certificate as PEM: {error}") from error
    if not context.get_ca_certs():
        raise UsageError("the pinned certificate is no CA; pin it with --fingerprint instead")


def _load_client(context: ssl.SSLContext, certificate: str, key: str) -> None:
    """Load a certificate and its key; OpenSSL reads them from files alone, so that they are in files without names."""
    with tempfile.TemporaryFile() as certificate_file, tempfile.TemporaryFile() as key_file:
        for file, content in ((certificate_file, certificate), (key_file, key)):
            file.write(content.encode())
            file.seek(0)
        try:
            context.load_cert_chain(*(f"/dev/fd/{each.fileno()}" for each in (certificate_file, key_file)))
        except OSError as error:  # an SSLError is one
            raise UsageError(f"this client's certificate cannot be used: {error}; add the host anew") from error
