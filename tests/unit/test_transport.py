"""The HTTP transport against servers of every kind: good, busy, broken, hostile, or not ours at all."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
from lossy import answering

from deltasync.client.address import normal_url
from deltasync.client.bandwidth import Bandwidth
from deltasync.client.folder import FolderTransport
from deltasync.client.transport import BACKOFF_SECONDS, BACKOFF_SECONDS_MAX, HttpTransport, open_transport
from deltasync.core import frames, wire
from deltasync.core.errors import (
    ContentMissing,
    DeltasyncError,
    HostBusy,
    HostUnreachable,
    NotADeltasyncServer,
    NotFound,
    SequenceGap,
    UsageError,
)
from deltasync.core.manifest import EMPTY_ROOT

STATE = wire.WorkspaceState(
    workspace="w",
    client_id="",
    epoch="",
    sequence=0,
    root=EMPTY_ROOT.hex(),
    tree_path="/w",
    tree_sequence=0,
    files=0,
    content_bytes=0,
    last_applied_at=None,
    last_bundle_id=None,
    lag=0,
)


def http(body: bytes = b"", status: str = "200 OK", **headers: str) -> bytes:
    """Return an HTTP answer of a deltasync server; a header given as '' is left out."""
    named = {"Deltasync_Server": "1", "Content_Length": str(len(body)), "Connection": "close"} | headers
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in named.items() if value]
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode() + body


def problem(error: DeltasyncError, status: str = "409 Conflict", **headers: str) -> bytes:
    """Return the answer that carries an error."""
    value = wire.Problem(
        type="about:blank",
        title=error.code,
        status=error.status,
        detail=error.sentence,
        code=error.code,
        facts=dict(error.facts),
    )
    return http(msgspec.json.encode(value), status, **headers)


GOOD = http(msgspec.json.encode(STATE))


class Pauses(list[float]):
    """Records the pauses instead of making them."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


def transport(port: int, **options: object) -> HttpTransport:
    return HttpTransport(f"http://127.0.0.1:{port}", timeout=5, pause=Pauses(), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://Host:80/", "http://host:80"),
        ("HTTPS://gpu.example/prefix/", "https://gpu.example/prefix"),
        ("http://[::1]:8080", "http://[::1]:8080"),
        ("SSH://Ada@GPU:2222/", "ssh://Ada@GPU:2222"),
        ("ssh://gpu", "ssh://gpu"),
        ("ssh://gpu#big disk/", "ssh://gpu#~/big%20disk"),
        ("ssh://gpu#~/big%20disk", "ssh://gpu#~/big%20disk"),
        ("ssh://[fe80::1%eth0]:022", "ssh://[fe80::1%eth0]:22"),
    ],
)
def test_an_address_has_one_spelling(text: str, expected: str) -> None:
    """Two spellings of one address are one server, so that the workspace stays bound to it."""
    assert normal_url(text) == expected


@pytest.mark.parametrize(
    "text", ["", "host:80", "ftp://host", "http://", "http://u:p@host", "http://host/?a", "http://host#a", "http://a b"]
)
def test_what_is_no_address_is_a_usage_error(text: str) -> None:
    """An address that cannot be one is refused before anything is sent."""
    with pytest.raises(UsageError):
        open_transport(text)


def test_a_file_address_is_a_folder(tmp_path: Path) -> None:
    """`file://` with an absolute path is a folder, spaces escaped; a host or a relative path is refused."""
    opened = open_transport((tmp_path / "usb stick").as_uri())
    assert isinstance(opened, FolderTransport)
    assert opened.url.endswith("usb%20stick")
    for text in ("file://host/path", "file:relative"):
        with pytest.raises(UsageError):
            open_transport(text)


def test_a_bandwidth_limit_is_kept_over_any_mix_of_pieces() -> None:
    """The bytes taken never run ahead of the rate by more than the burst."""
    now = 0.0

    def pause(seconds: float) -> None:
        nonlocal now
        now += seconds

    bandwidth = Bandwidth(1_000_000, clock=lambda: now, pause=pause)
    for size in [1, 100_000, 400_000, 7, 499_992] * 4:
        bandwidth.take(size)
    assert 3.8 <= now <= 4.0
    now += 100.0
    before = now
    bandwidth.take(1_000_000)
    assert 0.8 <= now - before <= 1.0


def test_a_limited_upload_goes_out_in_small_pieces() -> None:
    """With `--bwlimit` no piece is larger than the socket takes at once, and each waits for its turn."""
    pauses = Pauses()
    receipt = b"{}"
    with answering(http(receipt), reads_request=False) as port:
        limited = HttpTransport(f"http://127.0.0.1:{port}", bandwidth=1, timeout=5, pause=pauses)
        limited._bandwidth = Bandwidth(10_000_000, clock=lambda: 0.0, pause=pauses)
        with pytest.raises(DeltasyncError):
            limited.send_bundle("w", bytes(32), iter([bytes(100_000)]))
    assert 1 <= len(pauses) <= 4


def test_an_answer_is_decoded_into_its_type() -> None:
    """A workspace's state arrives as a value, through one request without a body."""
    with answering(GOOD) as port:
        here = transport(port)
        assert here.workspace("w") == STATE
        assert (here.requests, here.sent_bytes) == (1, 0)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (http(b"hello", Deltasync_Server=""), "no deltasync server"),
        (http(b"", "301 Moved", Location="http://elsewhere/"), "redirects to http://elsewhere/"),
        (http(b"", "307 Moved", Location="http://127.0.0.1:1/"), "redirects"),
        (http(b"{}", Deltasync_Server="2"), "version 2"),
        (http(b"{}"), "malformed"),
        (http(b"[" * 100_000), "malformed"),
        (http(b'"\xff"'), "malformed"),
        (http(msgspec.json.encode(msgspec.structs.replace(STATE, tree_sequence=2**63))), "malformed"),
        (http(msgspec.json.encode(msgspec.structs.replace(STATE, sequence=-1))), "malformed"),
        (http(b"oops", "500 Oops"), "without saying why"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "does not speak HTTP"),
        (b"\x15\x03\x01\x00\x02\x02\x46", "does not speak HTTP"),
    ],
)
def test_what_is_no_deltasync_server_is_named_and_not_asked_again(answer: bytes, says: str) -> None:
    """Another service at the address is an error with a sentence, at once."""
    with answering(answer) as port:
        here = transport(port)
        with pytest.raises(NotADeltasyncServer, match=says):
            here.workspace("w")
        assert here.requests == 1


@pytest.mark.parametrize("size", [0, -1, -(2**20), 2**63])
def test_pieces_of_no_size_are_not_begun(size: int) -> None:
    """A server that asks for pieces of no bytes would be sent such pieces without end."""
    state = wire.UploadState(
        upload_id="u",
        expires_at="",
        status="initiated",
        chunk_size=size,
        total_chunks=None,
        uploaded_chunks=0,
        received_bytes=0,
        present=[],
        partial=[],
    )
    with answering(http(msgspec.json.encode(state))) as port, pytest.raises(NotADeltasyncServer, match="malformed"):
        transport(port).ask(wire.UploadState, "GET", "/uploads/u")


def test_an_endless_answer_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more of an answer is read than any good one has."""
    monkeypatch.setattr("deltasync.client.transport.ANSWER_BYTES_MAX", 1000)
    with answering(http(b"x" * 100_000)) as port:
        here = HttpTransport(f"http://127.0.0.1:{port}")
        with pytest.raises(NotADeltasyncServer, match="more than"):
            here._once("GET", "/health", limit_bytes=1000)


def test_what_passes_is_tried_again_with_growing_pauses() -> None:
    """Busy and gateway answers and lost connections are repeated with exponential backoff and jitter."""
    busy = problem(HostBusy("busy"), "503 Busy")
    with answering(busy, http(b"", "502 Bad", Deltasync_Server=""), b"", GOOD) as port:
        here = transport(port, max_retries=3)
        assert here.workspace("w") == STATE
    pauses = here._pause
    assert isinstance(pauses, Pauses)
    assert [BACKOFF_SECONDS * 2**n / 2 <= each <= BACKOFF_SECONDS * 2**n for n, each in enumerate(pauses)] == [True] * 3


def test_a_server_that_stays_away_is_unreachable_after_the_last_retry() -> None:
    """When nothing listens the error says so, exits with 4, and the retries are those that were asked for."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    here = transport(port, max_retries=2)
    with pytest.raises(HostUnreachable, match="Connection refused") as caught:
        here.workspace("w")
    assert (here.requests, caught.value.exit_code) == (3, 4)


def test_an_error_of_the_server_arrives_as_the_same_error() -> None:
    """problem+json becomes the leaf that was raised over there, with its facts, and escaped for the terminal."""
    hostile = ContentMissing(["ab" * 32])
    hostile.sentence = "gone \x1b[31m"
    with answering(problem(hostile)) as port, pytest.raises(ContentMissing) as caught:
        transport(port).workspace("w")
    assert caught.value.missing == ["ab" * 32]
    assert caught.value.sentence == "gone \\x1b[31m"


def test_an_upload_is_never_sent_again_by_the_transport() -> None:
    """A generator that is gone cannot be sent twice: the caller learns of the failure and decides."""
    taken = 0

    def chunks() -> Iterator[bytes]:
        nonlocal taken
        for _ in range(3):
            taken += 1
            yield b"x" * 1000

    with answering(b"") as port:
        here = transport(port, max_retries=5)
        with pytest.raises(HostUnreachable):
            here.send_bundle("w", bytes(32), chunks())
    assert here.requests == 1
    assert 1 <= taken <= 3


def test_a_bundle_that_takes_the_server_long_is_waited_for() -> None:
    """Patience comes on top of the timeout, which ends a request that has none."""
    receipt = wire.Receipt(
        workspace="w",
        epoch="1" * 32,
        sequence=1,
        identity="0" * 64,
        bundle_id="",
        root=EMPTY_ROOT.hex(),
        created=0,
        updated=0,
        moved=0,
        deleted=0,
        content_bytes=0,
        applied_at="",
        tree_sequence=None,
    )
    with socket.create_server(("127.0.0.1", 0)) as silent, ThreadPoolExecutor(1) as threads:
        here = HttpTransport(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.3, pause=Pauses())
        patient = threads.submit(here.send_bundle, "w", bytes(32), iter([b"x"]), patience=60)
        connection, _ = silent.accept()
        with connection:
            body = b""
            while not body.endswith(b"0\r\n\r\n"):
                body += connection.recv(4096)
            with pytest.raises(HostUnreachable):  # begun later, ended earlier
                here.send_bundle("w", bytes(32), iter([b"x"]))
            assert not patient.done()
            connection.sendall(http(msgspec.json.encode(receipt)))
            assert patient.result() == receipt


def test_an_early_answer_ends_an_upload() -> None:
    """A server that refuses after the first bytes is heard before a large body has gone out."""
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 1 << 34:
            sent += 1 << 18
            yield bytes(1 << 18)

    with answering(problem(SequenceGap(3, 9))) as port:
        here = transport(port)
        with pytest.raises(SequenceGap):
            here.send_bundle("w", bytes(32), endless())
    assert sent < 1 << 30


def test_an_error_in_the_body_reaches_the_caller_as_it_is() -> None:
    """What goes wrong while the content is read is not taken for a network failure."""

    class Gone(Exception):
        pass

    def chunks() -> Iterator[bytes]:
        yield b"x"
        raise Gone

    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(Gone):
        transport(silent.getsockname()[1]).send_bundle("w", bytes(32), chunks())


def test_proxies_of_the_environment_are_used_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy variable does not divert content, unless `proxies` says so."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dead = f"http://127.0.0.1:{listener.getsockname()[1]}"
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("http_proxy", dead)
    with answering(GOOD) as port:
        assert transport(port).workspace("w") == STATE
        with pytest.raises(HostUnreachable):
            transport(port, proxies=True, max_retries=0).workspace("w")


def test_requests_say_little_and_keep_no_cookies() -> None:
    """A request has no header that the server does not need, and nothing that the server planted."""
    seen: list[bytes] = []
    answers = [http(msgspec.json.encode(STATE), Set_Cookie="a=b; Path=/", Connection="keep-alive"), GOOD]
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                for answer in answers:
                    seen.append(connection.recv(1 << 16))
                    connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        here = transport(listener.getsockname()[1])
        here.workspace("w")
        here.workspace("w")
        thread.join(5)
    for request in seen:
        names = {line.split(b":")[0].lower() for line in request.split(b"\r\n")[1:] if line}
        assert names <= {b"host", b"user-agent", b"connection"}
    assert len(seen) == 2


def test_threads_share_a_transport() -> None:
    """Two bundles under way and a question between them do not disturb each other."""
    with answering(GOOD) as port:
        here = transport(port)
        found: list[wire.WorkspaceState] = []
        threads = [
            threading.Thread(target=lambda: found.extend(here.workspace("w") for _ in range(20))) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        here.close()
    assert found == [STATE] * 60
    assert here.requests == 60


def test_a_busy_server_says_how_long_to_wait() -> None:
    """Retry-After is obeyed where it is longer than the backoff, up to its maximum."""
    busy = problem(HostBusy("busy"), "503 Busy", Retry_After="7")
    busier = problem(HostBusy("busy"), "503 Busy", Retry_After="9999")
    with answering(busy, busier, GOOD) as port:
        here = transport(port, max_retries=2)
        here.workspace("w")
    assert here._pause == [7, BACKOFF_SECONDS_MAX]


def partial_answer(body: bytes, content_range: str = "bytes 2-5/9", status: str = "206 Partial Content") -> bytes:
    return http(body, status, Content_Range=content_range)


def test_a_range_is_read_as_it_comes() -> None:
    """A range of a blob, with a limit on what is taken a second."""
    with answering(partial_answer(b"cdef")) as port:
        opened = transport(port, bandwidth=10_000_000)
        with opened.blob_range(bytes(32), 2, 6, 9) as incoming:
            assert b"".join(incoming.content(4)) == b"cdef"
            incoming.end()


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (partial_answer(b"cdef", "bytes 0-3/9"), NotADeltasyncServer),
        (partial_answer(b"cdef", "bytes 2-5/10"), NotADeltasyncServer),
        (partial_answer(b"cdef", ""), NotADeltasyncServer),
        (partial_answer(b"cdefg"), NotADeltasyncServer),
        (partial_answer(b"cdef", status="200 OK"), NotADeltasyncServer),
        (partial_answer(b"cd"), HostUnreachable),
        (partial_answer(b"cd").replace(b"Length: 2", b"Length: 4"), HostUnreachable),
        (problem(NotFound("no such blob"), "404 Not Found"), NotFound),
        (problem(HostBusy("busy"), "503 Service Unavailable", Retry_After="7"), HostBusy),
        (http(b"", "302 Found", Location="http://127.0.0.1/"), NotADeltasyncServer),
        (http(b"", "206 Partial Content", Deltasync_Server=""), NotADeltasyncServer),
        (b"not HTTP", NotADeltasyncServer),
    ],
)
def test_an_answer_that_is_not_the_range_is_not_taken_for_it(answer: bytes, error: type[DeltasyncError]) -> None:
    """Another range, too little, too much, or no range at all is an error, and never content."""
    with answering(answer) as port, pytest.raises(error), transport(port).blob_range(bytes(32), 2, 6, 9) as incoming:
        list(incoming.content(4))
        incoming.end()


def test_many_blobs_are_read_as_frames() -> None:
    """What the block raises comes out as it is: trouble with a disk is none with the network."""
    stream = frames.head(3) + b"abc" + frames.head(None) + frames.head(0)
    with answering(http(stream)) as port:
        with transport(port).blobs("w", [bytes(32)] * 3) as incoming:
            assert incoming.frame() == 3 and b"".join(incoming.content(3)) == b"abc"
            assert (incoming.frame(), incoming.frame()) == (None, 0)
            incoming.end()
        with pytest.raises(OSError, match="my own"), transport(port).directories("w", [bytes(32)]):
            raise OSError("my own")
