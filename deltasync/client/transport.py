"""Reach a receiver: a server over HTTP, or a folder that carries bundle files."""

from __future__ import annotations

import os
import random
import re
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from http import HTTPStatus
from http.cookiejar import DefaultCookiePolicy
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import quote, urlencode

import msgspec
import requests
from requests.structures import CaseInsensitiveDict
from urllib3.util import SKIP_HEADER

from deltasync.client.address import folder_of, is_exposed, is_folder, is_ssh, normal_url, ssh_address
from deltasync.client.bandwidth import Bandwidth, limited
from deltasync.client.connection import Adapter, Sending, Session, tls_options
from deltasync.client.folder import FolderTransport
from deltasync.client.hosts import TOKEN_VARIABLE, Host, HostBook, has_token, token_of
from deltasync.client.incoming import DIRECTORY_BYTES_MAX, READ_BYTES, Incoming
from deltasync.client.pace import Pace
from deltasync.client.pieces import JOBS, PROBE_BYTES, SLOWEST_DISK_BYTES_PER_SECOND, UPLOAD_FROM_BYTES, Upload, begun
from deltasync.client.ssh import SshOptions, Tunnel
from deltasync.client.trouble import BELOW_HTTP, meaning
from deltasync.client.trust import SYSTEM, Trust
from deltasync.core import wire
from deltasync.core.errors import (
    DeltasyncError,
    Fact,
    HostBusy,
    HostUnreachable,
    NotADeltasyncServer,
    NotFound,
    Unauthorized,
    UsageError,
    from_problem,
)
from deltasync.core.names import shown
from deltasync.decoding import decoded

if TYPE_CHECKING:
    from deltasync.client.receiver import Transport

API_VERSION = "1"
CONNECT_SECONDS = 5.0
ANSWER_BYTES_MAX = 16 * 2**20
BACKOFF_SECONDS = 0.25
BACKOFF_SECONDS_MAX = 30.0

_RETRY_AFTER = "retry_after_seconds"
_GATEWAY_STATUS = (502, 503, 504)
_T = TypeVar("_T")


def open_transport(
    url: str,
    *,
    bandwidth: int | None = None,
    timeout: float = 60.0,
    max_retries: int = 3,
    jobs: int = JOBS,
    proxies: bool = False,
    insecure: bool = False,
    token_for: Collection[str] = (),
    ssh: SshOptions | None = None,
) -> Transport:
    """Return the transport for a URL: `http://`, `https://`, `ssh://`, or `file://` for a folder.

    What the user's book of hosts says of a server holds. bandwidth: bytes of bodies sent per second. jobs: pieces of a
    large bundle under way at once. proxies: obey the proxies that the environment names. insecure: talk plain http with
    other machines. token_for: the addresses that the environment's token is for. ssh: how to use it for `ssh://`.
    """
    if is_folder(url):
        return FolderTransport(folder_of(url))
    if is_ssh(url):
        tunnel = Tunnel(ssh_address(url), ssh or SshOptions())
        return HttpTransport(
            url, tunnel=tunnel, bandwidth=bandwidth, timeout=timeout, max_retries=max_retries, jobs=jobs
        )
    host = HostBook.of_user(os.environ).at(normal_url(url))
    token = (host.token if host is not None else None) or token_of(os.environ, normal_url(url), token_for)
    return HttpTransport(
        url,
        trust=host.trust if host is not None else SYSTEM,
        token=token,
        if_unauthorized=_why_unauthorized(host, token),
        bandwidth=bandwidth,
        timeout=timeout,
        max_retries=max_retries,
        jobs=jobs,
        proxies=proxies,
        insecure=insecure,
    )


def _why_unauthorized(host: Host | None, token: str | None) -> str:
    """Return what may be the reason, and the remedy, where the server refuses a request for its token."""
    if host is not None and host.next_token is not None:  # the server may have heard of it
        return f"a change of this token was broken off; run `deltasync host rotate {host.name}` to finish it"
    if token is None and has_token(os.environ):
        return f"{TOKEN_VARIABLE} was not shown: it is for DELTASYNC_TO, or without that for --to"
    return ""


class _Streamed(NamedTuple):
    """A good answer whose body is still to be read."""

    response: requests.Response
    content: Incoming


class HttpTransport:
    """A deltasync server over HTTP (spec/3-http.md); several threads may use it."""

    has_cache = True

    def __init__(
        self,
        url: str,
        *,
        trust: Trust = SYSTEM,
        token: str | None = None,
        if_unauthorized: str = "",
        bandwidth: int | None = None,
        timeout: float = 60.0,
        max_retries: int = 3,
        jobs: int = JOBS,
        proxies: bool = False,
        insecure: bool = False,
        tunnel: Tunnel | None = None,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        """Connect to nothing yet. timeout: seconds to wait for an answer; pause: how a retry waits.

        if_unauthorized: what is said behind the server's own words where the token is refused, or none was shown.
        tunnel: the way to the server, for an address that is none of HTTP's.
        """
        self.url = normal_url(url)
        if not insecure:
            _require_secrecy(self.url, has_token=token is not None, proxies=proxies)
        self._token, self._trust, self._if_unauthorized = token, trust, if_unauthorized
        self._tls = tls_options(trust) if self.url.startswith("https:") else {}
        self._tunnel = tunnel
        self._base = self.url if tunnel is None else "http://localhost"
        self.sent_bytes = 0
        self.requests = 0
        self.max_retries = max_retries
        self.server_date: datetime | None = None
        """What the server's clock said with its last answer."""
        self._timeout = timeout
        self._jobs = jobs
        self._proxies = proxies
        self._pause = pause
        self._bandwidth_bytes = bandwidth
        self._bandwidth = Bandwidth(bandwidth, pause=pause) if bandwidth else None
        self._lock = threading.Lock()
        self._sessions: list[requests.Session] = []
        self._pace = Pace()

    @property
    def link_bytes_per_second(self) -> float:
        """What the link carries: its limit, or how fast it was found to be; 0 where neither is known."""
        known = (self._bandwidth_bytes or 0, self._pace.bytes_per_second)
        return min(filter(None, known), default=0.0)

    def workspace(self, name: str, *, tree_sequence: int | None = None, wait: float = 0.0) -> wire.WorkspaceState:
        """Ask for a workspace's head; with `tree_sequence`, once the plain tree is there or `wait` seconds are over."""
        query: dict[str, str | int] = {}
        if tree_sequence is not None and wait > 0:
            query = {"tree_sequence": tree_sequence, "wait": f"{wait:g}"}
        content = self._patiently(lambda: self._once("GET", _workspace(name), query=query, extra_seconds=wait))
        return self._parsed(content, wire.WorkspaceState)

    def missing(self, name: str, digests: Sequence[str]) -> list[str]:
        """Ask which of these digests must be sent; the others are leased."""
        body = msgspec.json.encode(wire.MissingRequest(digests=list(digests)))
        path = _workspace(name) + "/missing"

        def ask() -> bytes:
            began = time.monotonic()
            content = self._once("POST", path, body=body, media_type="application/json")
            self._pace.note_answer(len(body), time.monotonic() - began)
            return content

        return self._parsed(self._patiently(ask), wire.MissingAnswer).missing

    def sizes(self, name: str, sizes: Sequence[int]) -> list[int]:
        """Ask of which of these sizes, in bytes, the server may have some content; an older one may of all."""
        body, path = msgspec.json.encode(wire.SizesRequest(sizes=list(sizes))), _workspace(name) + "/sizes"
        try:
            content = self._patiently(lambda: self._once("POST", path, body=body, media_type="application/json"))
        except NotFound:
            return list(sizes)
        return self._parsed(content, wire.SizesAnswer).held

    def directory(self, name: str, digest: bytes) -> bytes:
        """Fetch the body of a directory object; the caller checks it."""
        path = f"{_workspace(name)}/tree/{digest.hex()}"
        return self._patiently(lambda: self._once("GET", path, limit_bytes=DIRECTORY_BYTES_MAX))

    def recipe(self, name: str, digest: bytes, average_bytes: int) -> bytes:
        """Fetch the packed list of the chunks of a blob, which the server cuts while it answers."""
        path, query = f"{_workspace(name)}/recipes/{digest.hex()}", {"average": average_bytes}
        return self._patiently(lambda: self._once("GET", path, query=query))

    def sequences(self, name: str) -> list[wire.KeptSequence]:
        """Ask for the sequences whose trees the server still holds, oldest first."""
        content = self._patiently(lambda: self._once("GET", _workspace(name) + "/sequences"))
        return self._parsed(content, wire.KeptSequences).sequences

    def sequence(self, name: str, number: int) -> wire.KeptSequence:
        """Ask for one of the kept sequences; raises SequenceGone for any other."""
        content = self._patiently(lambda: self._once("GET", f"{_workspace(name)}/sequences/{number}"))
        return self._parsed(content, wire.KeptSequence)

    def pin(self, name: str, number: int, *, is_pinned: bool) -> list[wire.KeptSequence]:
        """Pin a kept sequence, or take its pin away; returns what is kept then. Raises SequenceGone."""
        path = f"{_workspace(name)}/sequences/{number}/pin"
        content = self._patiently(lambda: self._once("PUT" if is_pinned else "DELETE", path))
        return self._parsed(content, wire.KeptSequences).sequences

    def blobs(self, name: str, digests: Sequence[bytes]) -> AbstractContextManager[Incoming]:
        """Fetch many blobs once, as one stream of frames; the caller checks each, and begins again where it broke."""
        return self._frames(f"{_workspace(name)}/blobs", digests)

    def directories(self, name: str, digests: Sequence[bytes]) -> AbstractContextManager[Incoming]:
        """Fetch many directory objects once, as one stream of frames; the caller checks each."""
        return self._frames(f"{_workspace(name)}/trees", digests)

    @contextmanager
    def _frames(self, path: str, digests: Sequence[bytes]) -> Iterator[Incoming]:
        body = msgspec.json.encode(wire.ContentRequest(digests=[digest.hex() for digest in digests]))
        with self._stream("POST", path, good=HTTPStatus.OK, body=body, media_type="application/json") as streamed:
            yield streamed.content

    @contextmanager
    def blob_range(self, digest: bytes, start: int, end: int, size: int) -> Iterator[Incoming]:
        """Fetch a range of a blob of a known size once; the caller checks the whole."""
        headers = {"Range": f"bytes={start}-{end - 1}"}
        path, good = f"/blobs/{digest.hex()}", HTTPStatus.PARTIAL_CONTENT
        with self._stream("GET", path, good=good, headers=headers) as streamed:
            if streamed.response.headers.get("Content-Range") != f"bytes {start}-{end - 1}/{size}":
                raise NotADeltasyncServer(f"{self.url} answers with another range than it was asked for")
            yield streamed.content

    def health(self) -> wire.Health:
        """Ask whether the server is alive."""
        return self._parsed(self._patiently(lambda: self._once("GET", "/health")), wire.Health)

    def send_bundle(
        self,
        name: str,
        identity: bytes,
        chunks: Iterable[bytes],
        *,
        take_over: bool = False,
        wait: float = 0.0,
        patience: float = 0.0,
    ) -> wire.Receipt:
        """Send a bundle once and return the receipt: after a failure the sender asks the head before it sends again.

        A large one goes in pieces, and only its pieces are sent again, unless the way was found quick and sound.
        wait: for how many seconds the answer may wait for the plain tree. patience: how many more it may take, and how
        long the server may stop reading meanwhile.
        """
        query: dict[str, str | int] = {"take_over": "true"} if take_over else {}
        if wait > 0:
            query["wait"] = f"{wait:g}"
        if self._pace.is_quick and self._bandwidth is None:
            return self._send_whole(name, identity, self._pace.measured(chunks), query, wait, patience)
        rest = iter(chunks)
        first, is_all = begun(rest, PROBE_BYTES)
        upload = None
        if not is_all or sum(map(len, first)) > UPLOAD_FROM_BYTES:
            request = wire.UploadRequest(kind="bundle", workspace=name, identity=identity.hex(), resume=True)
            upload = self._upload(request)
        if upload is None:
            chunks = chain(_drained(first), self._pace.measured(rest))
            return self._send_whole(name, identity, chunks, query, wait, patience)
        probed = upload.probe(first) if not is_all and self._bandwidth is None else 0.0
        self._pace.note(probed)  # the bundle behind this one may go whole
        receipt = upload.send(chain(_drained(first), rest), query, wait + patience)
        self._pace.note(0.0 if probed else upload.bytes_per_second)
        return receipt

    def _upload(self, request: wire.UploadRequest) -> Upload | None:
        """Begin an upload; None where the server has no room for it, or is too old to know of uploads."""
        try:
            return Upload(self, request, self._jobs)
        except (NotFound, HostBusy):
            return None

    def _send_whole(
        self,
        name: str,
        identity: bytes,
        chunks: Iterable[bytes],
        query: Mapping[str, str | int],
        wait: float,
        patience: float,
    ) -> wire.Receipt:
        content = self._once(
            "POST",
            _workspace(name) + "/bundles",
            query=query,
            body=self._body(chunks, patience),
            media_type=wire.BUNDLE_MEDIA_TYPE,
            headers={wire.IDENTITY_HEADER: identity.hex()},
            extra_seconds=wait + patience,
        )
        return self._parsed(content, wire.Receipt)

    def ask(
        self,
        kind: type[_T],
        method: str,
        path: str,
        *,
        query: Mapping[str, str | int] | None = None,
        body: bytes | Iterable[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        extra_seconds: float = 0.0,
        good: Collection[int] = (HTTPStatus.OK,),
    ) -> _T:
        """Make one request and return its answer; chunks are a body of bytes, anything else is JSON."""
        is_json = isinstance(body, bytes)
        content = self._once(
            method,
            path,
            query=query,
            body=body if body is None or isinstance(body, bytes) else self._body(body),
            media_type=None if body is None else "application/json" if is_json else "application/octet-stream",
            headers=headers,
            extra_seconds=extra_seconds,
            good=good,
        )
        return self._parsed(content, kind)

    def patiently(self, call: Callable[[], _T]) -> _T:
        """Make a call that may be repeated, again where the error says that a retry can help."""
        return self._patiently(call)

    @contextmanager
    def arriving(self, path: str, query: Mapping[str, str | int], *, extra_seconds: float) -> Iterator[Iterator[bytes]]:
        """Lend the body of an answer as it comes, in pieces, for as long as the server goes on; it is asked for once.

        extra_seconds: how much longer than any other answer it may be silent.
        """
        with self._stream("GET", path, good=HTTPStatus.OK, query=query, extra_seconds=extra_seconds) as streamed:
            yield iter(partial(self._read_some, streamed.response), b"")

    def back_off(self, attempt: int, error: DeltasyncError | None = None) -> None:
        """Wait before another attempt: exponentially longer, never in step with other clients, as long as asked to."""
        seconds = min(BACKOFF_SECONDS * 2**attempt, BACKOFF_SECONDS_MAX) * random.uniform(0.5, 1.0)
        asked = error.facts.get(_RETRY_AFTER) if error is not None else None
        self._pause(max(seconds, min(asked, BACKOFF_SECONDS_MAX)) if isinstance(asked, int) else seconds)

    def close(self) -> None:
        """Close the connections."""
        with self._lock:
            sessions, self._sessions = self._sessions, []
        for session in sessions:
            session.close()
        if self._tunnel is not None:
            self._tunnel.close()

    def _patiently(self, call: Callable[[], _T]) -> _T:
        """Make a call that may be repeated, again where the error says that a retry can help: the only such place."""
        attempt = 0
        while True:
            try:
                return call()
            except (HostUnreachable, HostBusy) as error:
                if attempt >= self.max_retries:
                    raise
                self.back_off(attempt, error)
            attempt += 1

    def _once(
        self,
        method: str,
        path: str,
        *,
        limit_bytes: int = ANSWER_BYTES_MAX,
        good: Collection[int] = (HTTPStatus.OK,),
        **options: Any,
    ) -> bytes:
        """Make one request and return the body of its good answer; every other outcome is an error of ours."""
        with self._session() as session, self._answer(session, method, path, **options) as response:
            content = self._all(response, limit_bytes + 1)
        self._check(response)
        if len(content) > limit_bytes:
            raise NotADeltasyncServer(f"{self.url} answers with more than {limit_bytes} bytes")
        if response.status_code in good:
            return content
        raise self._problem(response, content)

    @contextmanager
    def _stream(self, method: str, path: str, *, good: HTTPStatus, **options: Any) -> Iterator[_Streamed]:
        """Make one request and lend its good answer while the body is read; what the block raises is left alone."""
        with self._session() as session, self._answer(session, method, path, **options) as response:
            self._check(response)
            if response.status_code != good:
                raise self._problem(response, self._all(response, ANSWER_BYTES_MAX))
            yield _Streamed(response, Incoming(self.url, partial(self._read_limited, response)))

    def _answer(
        self,
        session: requests.Session,
        method: str,
        path: str,
        *,
        query: Mapping[str, str | int] | None = None,
        body: bytes | Iterator[bytes] | None = None,
        media_type: str | None = None,
        headers: Mapping[str, str] | None = None,
        extra_seconds: float = 0.0,
    ) -> requests.Response:
        url = self._base + (path if path == "/health" else wire.API + path) + (f"?{urlencode(query)}" if query else "")
        sent_headers = dict(headers or {}) | ({"Content-Type": media_type} if media_type else {})
        with self._lock:
            self.requests += 1
            self.sent_bytes += len(body) if isinstance(body, bytes) else 0
        try:
            return session.request(
                method,
                url,
                data=body,
                headers=sent_headers,
                stream=True,
                allow_redirects=False,
                timeout=(CONNECT_SECONDS, self._timeout + extra_seconds),
            )
        except BELOW_HTTP as error:
            raise self._trouble(error) from error

    def _all(self, response: requests.Response, limit_bytes: int) -> bytes:
        """Read an answer's body to its end, but no more of it than this."""
        pieces: list[bytes] = []
        while limit_bytes and (piece := self._read(response, min(limit_bytes, READ_BYTES))):
            pieces.append(piece)
            limit_bytes -= len(piece)
        return b"".join(pieces)

    def _read(self, response: requests.Response, size_bytes: int) -> bytes:
        """Read at most so much of an answer's body."""
        try:
            return response.raw.read(size_bytes, decode_content=False)
        except BELOW_HTTP as error:
            raise self._trouble(error) from error

    def _read_some(self, response: requests.Response) -> bytes:
        """Read what has come of an answer's body, waiting only for its next byte; b'' at its end."""
        try:
            return response.raw.read1(READ_BYTES, decode_content=False)
        except BELOW_HTTP as error:
            raise self._trouble(error) from error

    def _read_limited(self, response: requests.Response, size_bytes: int) -> bytes:
        content = self._read(response, size_bytes)
        if self._bandwidth is not None and content:
            self._bandwidth.take(len(content))
        return content

    @contextmanager
    def _session(self) -> Iterator[requests.Session]:
        """Lend a session, with its open connection, to one thread at a time."""
        with self._lock:
            session = self._sessions.pop() if self._sessions else None
        session = session or self._new_session()
        try:
            yield session
        except BaseException:
            session.close()  # who knows what its connection still carries
            raise
        with self._lock:
            self._sessions.append(session)

    def _new_session(self) -> requests.Session:
        session = Session()
        session.trust_env = False  # REQUESTS_CA_BUNDLE, .netrc and proxies of the environment stay out
        session.headers = CaseInsensitiveDict({"User-Agent": "deltasync", "Accept-Encoding": SKIP_HEADER})
        session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        if self._proxies and self._tunnel is None:
            session.proxies = dict(requests.utils.get_environ_proxies(self.url))
        if self._token is not None:  # no redirect is followed: it goes to this origin alone (spec H-98)
            session.headers["Authorization"] = f"Bearer {self._token}"
        session.mount("http://", Adapter(self._tls, self._tunnel))
        session.mount("https://", Adapter(self._tls))
        return session

    def _body(self, chunks: Iterable[bytes], patience: float = 0.0) -> Iterator[bytes]:
        """Yield the body piece by piece; stop early when the server has answered already."""
        sending = Sending(self._timeout + patience)
        total_bytes = 0
        for piece in limited(chunks, self._bandwidth):
            if sending.is_answered():
                break  # what the server says now does not depend on the rest
            yield piece
            total_bytes += len(piece)
            with self._lock:
                self.sent_bytes += len(piece)
        sending.wait_longer(total_bytes / SLOWEST_DISK_BYTES_PER_SECOND)

    def _trouble(self, error: Exception) -> DeltasyncError:
        """Say what a failure below HTTP means; a way that failed is opened anew."""
        found = meaning(error, self.url, is_pinned=self._trust.is_pinned)
        if isinstance(found, HostUnreachable):
            self._pace.note_loss()
            if self._tunnel is not None:
                self._tunnel.forget()
        return found

    def _check(self, response: requests.Response) -> None:
        """Raise unless the head of an answer is that of a deltasync server (T6)."""
        status, version = response.status_code, response.headers.get(wire.SERVER_HEADER)
        if version is None and status in _GATEWAY_STATUS:
            raise HostUnreachable(f"a gateway before {self.url} answers {status}; is the server running?")
        if 300 <= status < 400:
            there = shown(response.headers.get("Location", "elsewhere"))
            raise NotADeltasyncServer(f"{self.url} redirects to {there}; give the server's own address")
        if version is None:
            raise NotADeltasyncServer(f"what answers at {self.url} (HTTP {status}) is no deltasync server")
        if version != API_VERSION:
            raise NotADeltasyncServer(f"{self.url} speaks version {shown(version)} of the API, not {API_VERSION}")
        self.server_date = _date(response.headers.get("Date", ""))

    def _problem(self, response: requests.Response, content: bytes) -> DeltasyncError:
        """Return the error that an answer carries, or that it is none of ours (T6)."""
        status, retry_after = response.status_code, response.headers.get("Retry-After", "")
        facts: dict[str, Fact] = {_RETRY_AFTER: int(retry_after)} if re.fullmatch("[0-9]{1,4}", retry_after) else {}
        try:
            problem = decoded(content, wire.Problem)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            if status in (429, *_GATEWAY_STATUS):
                return HostBusy(f"{self.url} answers {status}; try again", **facts)
            return NotADeltasyncServer(f"{self.url} answers {status} without saying why")
        code = problem.code if problem.code in wire.PROBLEM_CODES else ""  # no server says what is wrong on this side
        sentence = shown(problem.detail)
        if code == Unauthorized.code and self._if_unauthorized:
            sentence += f"; {self._if_unauthorized}"
        return from_problem(code, sentence, {**problem.facts, **facts})

    def _parsed(self, content: bytes, kind: type[_T]) -> _T:
        try:
            return decoded(content, kind)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise NotADeltasyncServer(f"{self.url} gives an answer that is malformed: {error}") from error


def _date(text: str) -> datetime | None:
    try:
        return parsedate_to_datetime(text).replace(tzinfo=UTC)  # HTTP knows no other zone
    except (ValueError, OverflowError):
        return None


def _workspace(name: str) -> str:
    return f"/workspaces/{quote(name, safe='')}"


def _drained(chunks: list[bytes]) -> Iterator[bytes]:
    """Yield a list's items and let each go, so that they are not held until the last is out."""
    chunks.reverse()
    while chunks:
        yield chunks.pop()


def _require_secrecy(url: str, *, has_token: bool, proxies: bool) -> None:
    """Raise UsageError where what is sent could be read on its way (spec H-97, H-98)."""
    if is_exposed(url):
        raise UsageError(
            f"{url} is not encrypted: everybody on the way could read and change what is sent; use https://, an SSH "
            "tunnel, or --insecure"
        )
    if has_token and proxies and url.startswith("http:"):
        raise UsageError(f"--proxy would hand the token for {url} to the proxy; leave it out")
