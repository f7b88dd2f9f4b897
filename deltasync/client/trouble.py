"""What it means that a request got no answer, or none that is HTTP."""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Sequence
from http.client import BadStatusLine, RemoteDisconnected

import requests
import urllib3

from deltasync.client.address import is_exposed
from deltasync.client.answer import Unbounded
from deltasync.client.trust import distrust
from deltasync.core.errors import DeltasyncError, HostUnreachable, HostUntrusted, NotADeltasyncServer, UsageError
from deltasync.core.names import shown

BELOW_HTTP = (requests.RequestException, urllib3.exceptions.HTTPError, OSError)
"""What a request can end with before there is an answer."""
_CUT = (ssl.SSLEOFError, ssl.SSLZeroReturnError, TimeoutError, ConnectionError)
"""What a lost connection is called where it was encrypted."""
_PLAIN_ANSWERS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE")
"""What OpenSSL calls an answer that is no TLS, in its releases."""


def meaning(error: Exception, url: str, *, is_pinned: bool) -> DeltasyncError:
    """Return what one of `BELOW_HTTP` means for the server at a URL: unreachable, not trusted, no server of ours.

    is_pinned: the server is known by its certificate alone.
    """
    reasons = [*_causes(error)]
    if any(isinstance(each, BadStatusLine) and not isinstance(each, RemoteDisconnected) for each in reasons):
        return NotADeltasyncServer(f"what answers at {url} does not speak HTTP; check the address")
    if any(isinstance(each, Unbounded) for each in reasons):
        return NotADeltasyncServer(f"{url} gives an answer without an end, or one that is no HTTP")
    if isinstance(error, requests.exceptions.SSLError) and any(
        getattr(each, "reason", None) in _PLAIN_ANSWERS for each in reasons
    ):
        plain = url.replace("https://", "http://", 1)
        if is_exposed(plain):
            sentence = "answers without TLS: it was started with --insecure, or somebody in between takes TLS away"
            return HostUntrusted(f"{url} {sentence}; nothing was sent")
        return NotADeltasyncServer(f"{url} answers plain http; use {plain}")
    if (doubt := distrust(url, reasons, is_pinned=is_pinned)) is not None:
        return HostUntrusted(doubt)
    if isinstance(error, requests.exceptions.SSLError) and not any(isinstance(each, _CUT) for each in reasons):
        return HostUntrusted(f"no trusted TLS connection to {url}: {_last(reasons)}")
    if isinstance(error, (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema)):
        return UsageError(f"{url} is no address of a server: {shown(str(error))}")
    is_hung_up = any(isinstance(each, RemoteDisconnected | ConnectionResetError) for each in reasons)
    hint = ", and without TLS" if is_hung_up and url.startswith("http:") else ""
    return HostUnreachable(f"no answer from {url} ({_last(reasons)}); is the server running{hint}?")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error with every error inside and behind it."""
    queue, seen = [error], set()
    while queue:
        each = queue.pop(0)
        if id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        inner = (*each.args, getattr(each, "reason", None), each.__cause__, each.__context__)
        queue.extend(other for other in inner if isinstance(other, BaseException))


def _last(reasons: Sequence[BaseException]) -> str:
    """Return the most telling text: the operating system's, else the innermost."""
    system = next((each.strerror for each in reasons if isinstance(each, OSError) and each.strerror), None)
    return shown(system or str(reasons[-1]) or type(reasons[-1]).__name__)[:200]
