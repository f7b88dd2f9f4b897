"""Malformed and hostile requests against a real server: each is refused by its status, and the server serves on."""

from __future__ import annotations

import contextlib
import itertools
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from serving import SECONDS, Served, Writer, received, serving, until

DEADLINES = {
    "DELTASYNC_SERVER_HEADER_SECONDS": "1.5",
    "DELTASYNC_SERVER_BODY_SECONDS": "1.5",
    "DELTASYNC_SERVER_CONNECTIONS": "60",
}
IDENTITY = b"Deltasync-Identity: " + b"a" * 64 + b"\r\n"
BUNDLES = b"POST /api/v1/workspaces/w/bundles HTTP/1.1\r\nHost: [::1]\r\n"
MISSING = b"POST /api/v1/workspaces/w/missing HTTP/1.1\r\nHost: [::1]\r\n"
UPLOAD = b"POST /api/v1/delta/upload HTTP/1.1\r\nHost: [::1]\r\n"
FORM = b"Content-Type: multipart/form-data; boundary=XX\r\n"
NOTHING = "/api/v1/blobs/" + "0" * 64


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served") / "data", environment=DEADLINES) as served:
        yield served


def get(target: str | bytes, *headers: bytes) -> bytes:
    line = target if isinstance(target, bytes) else target.encode()
    return b"GET " + line + b" HTTP/1.1\r\nHost: [::1]\r\n" + b"".join(each + b"\r\n" for each in headers) + b"\r\n"


def sized(head: bytes, body: bytes) -> bytes:
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def form(*parts: bytes, head: bytes = FORM, end: bytes = b"--XX--\r\n") -> bytes:
    return sized(UPLOAD + head, b"".join(b"--XX\r\n" + part + b"\r\n" for part in parts) + end)


def field(name: str, value: bytes) -> bytes:
    return f'Content-Disposition: form-data; name="{name}"\r\n\r\n'.encode() + value


@dataclass(frozen=True)
class Row:
    """One request and what must come of it."""

    name: str
    request: bytes
    status: tuple[int, ...]
    closes: bool | None = None


ROWS = [
    Row("R10 negative length", BUNDLES + IDENTITY + b"Content-Length: -1\r\n\r\n", (400,), True),
    Row("R11 two lengths", BUNDLES + IDENTITY + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab", (400,), True),
    Row("R12 no length", BUNDLES + IDENTITY + b"\r\n", (411,)),
    Row("R13 too large", BUNDLES + IDENTITY + b"Content-Length: 9999999999999\r\n\r\n", (413,), True),
    Row("R13 too large for the form", UPLOAD + FORM + b"Content-Length: 200000000\r\n\r\n", (413,), True),
    Row("R14 bad chunk size", BUNDLES + IDENTITY + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", (400,), True),
    Row(
        "R16 endless chunk extension",
        BUNDLES + IDENTITY + b"Transfer-Encoding: chunked\r\n\r\n5;" + b"x" * (1 << 20),
        (400,),
        True,
    ),
    Row(
        "R17 length and chunked",
        BUNDLES + IDENTITY + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        (400,),
        True,
    ),
    Row("R17 another coding", BUNDLES + IDENTITY + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", (400,)),
    Row("R18 long header", get("/health", b"X: " + b"x" * 100_000), (431,), True),
    Row("R19 many headers", get("/health", *(b"X%d: y" % n for n in range(10_000))), (431,), True),
    Row("R22 no boundary", sized(UPLOAD + b"Content-Type: multipart/form-data\r\n", b"x"), (400,)),
    Row("R22 no form", sized(UPLOAD + b"Content-Type: text/plain\r\n", b"x"), (415,)),
    Row("R23 many parts", form(*(field(f"f{n}", b"v") for n in range(100_000))), (400, 413)),
    Row("R24 long part header", form(b"X: " + b"y" * 10_000_000 + b"\r\n\r\nv"), (400, 413)),
    Row("R25 endless preamble", sized(UPLOAD + FORM, b"\r\n" + b"x" * 1_000_000), (400, 413)),
    Row("R25 preamble that is no boundary", sized(UPLOAD + FORM, b"x" * 1_000_000), (400, 413)),
    Row("R25 endless epilogue", form(field("bundle", b"v"), end=b"--XX--\r\n" + b"x" * 1_000_000), (400, 413)),
    Row("truncated form", form(field("bundle", b"v"), end=b""), (400,)),
    Row("form without a file", form(field("force", b"true")), (400,)),
    Row("long field", form(field("workspace_path", b"x" * 1_000_000)), (400, 413)),
    Row("twice the same field", form(field("force", b"true"), field("force", b"true")), (400,)),
    Row("field that is not UTF-8", form(field("force", b"\xff")), (400,)),
    Row("R27 gzip", sized(BUNDLES + IDENTITY + b"Content-Encoding: gzip\r\n", b"x"), (415,)),
    Row("R28 zstd", sized(MISSING + b"Content-Encoding: zstd\r\n", b"x"), (415,)),
    Row("R29 dots in the path", get("/api/v1/../admin"), (404,)),
    Row("R30 encoded dots", get("/api/v1/workspaces/%2e%2e%2fadmin"), (404,)),
    Row("R30 encoded dots as a part", get("/api/v1/workspaces/%2e%2e"), (404,)),
    Row("R30 encoded slash", get(f"/api/v1/workspaces/w%2ftree%2f{'0' * 64}"), (404,)),
    Row("R30 encoded backslash", get("/api/v1/workspaces/a%5cb"), (404,)),
    Row("R31 host in the path", get("//host/x"), (404,)),
    Row("R31 two slashes", get("/api/v1//workspaces"), (404,)),
    Row("trailing slash", get("/api/v1/workspaces/"), (404,)),
    Row("path that is not UTF-8", get("/api/v1/workspaces/%ff"), (404,)),
    Row("path with NUL", get("/api/v1/workspaces/a%00b"), (404,)),
    Row("path with raw bytes", get(b"/api/v1/workspaces/\xc3\xbc"), (400,), True),
    Row("hidden workspace", get("/api/v1/workspaces/.hidden"), (400,)),
    Row("reserved workspace", get("/api/v1/workspaces/.deltasync"), (400,)),
    Row("long workspace", get("/api/v1/workspaces/" + "x" * 101), (400,)),
    Row("R32 climbing label", get("/api/v1/delta/status?workspace_path=../.."), (404, 400)),
    Row("R33 label of 1 MiB", get("/api/v1/delta/status?workspace_path=" + "x" * (1 << 20)), (404, 400), True),
    Row("R33 long label", get("/api/v1/delta/status?workspace_path=" + "x" * 5000), (404, 400)),
    Row("R34 label with NUL", get("/api/v1/delta/status?workspace_path=/a%00b"), (404, 400)),
    Row("no label at all", get("/api/v1/delta/status"), (400,)),
    Row("R35 no identity", sized(BUNDLES, b"x"), (400,)),
    Row("R36 malformed identity", sized(BUNDLES + b"Deltasync-Identity: abc\r\n", b"x"), (400,)),
    Row("R36 upper-case identity", sized(BUNDLES + b"Deltasync-Identity: " + b"A" * 64 + b"\r\n", b"x"), (400,)),
    Row("R36 two identities", sized(BUNDLES + IDENTITY + IDENTITY, b"x"), (400,)),
    Row("not a bundle", sized(BUNDLES + IDENTITY, b"x" * 100), (422,)),
    Row("empty bundle", sized(BUNDLES + IDENTITY, b""), (422,)),
    Row("R44 a million digests", sized(MISSING, b'{"digests":[' + b",".join([b'"%064x"' % 1] * 10**6) + b"]}"), (413,)),
    Row(
        "a few digests too many", sized(MISSING, b'{"digests":[' + b",".join([b'"%064x"' % 1] * 65_537) + b"]}"), (413,)
    ),
    Row("missing: not JSON", sized(MISSING, b"{"), (400,)),
    Row("missing: not UTF-8", sized(MISSING, b'{"digests":["\xff"]}'), (400,)),
    Row("missing: another shape", sized(MISSING, b'{"digests":[1]}'), (400,)),
    Row("missing: unknown member", sized(MISSING, b'{"digests":[],"x":1}'), (400,)),
    Row("missing: no digest", sized(MISSING, b'{"digests":["xyz"]}'), (400,)),
    Row("missing: deep JSON", sized(MISSING, b"[" * 100_000), (400,)),
    Row("R46 blob that is not there", get(NOTHING), (404,)),
    Row("blob that is no digest", get("/api/v1/blobs/abc"), (404,)),
    Row("directory object that is not there", get(f"/api/v1/workspaces/w/tree/{'0' * 64}"), (404,)),
    Row("R77 HTTP/0.9", b"GET /health\r\n\r\n", (400,), True),
    Row("no HTTP at all", b"\x16\x03\x01\x02\x00\x01\x00", (400,), True),
    Row("R78 TRACE", b"TRACE /health HTTP/1.1\r\nHost: [::1]\r\n\r\n", (400, 405), True),
    Row("R79 CONNECT", b"CONNECT example.com:443 HTTP/1.1\r\nHost: [::1]\r\n\r\n", (400, 405), True),
    Row(
        "R80 pipelined after an error",
        b"GET /health HTTP/9.9\r\nHost: [::1]\r\n\r\n" + get("/health"),
        (400,),
        True,
    ),
    Row("R80 pipelined after a refused body", sized(BUNDLES, b"x" * 10)[:-5] + get("/health"), (400,), None),
    Row("other methods", b"PATCH /api/v1/workspaces/w HTTP/1.1\r\nHost: [::1]\r\n\r\n", (405,), True),
    Row("DELETE where only GET is", b"DELETE /api/v1/workspaces/w HTTP/1.1\r\nHost: [::1]\r\n\r\n", (405,)),
    Row("PUT without a length", b"PUT /api/v1/uploads/u/chunk/0 HTTP/1.1\r\nHost: [::1]\r\n\r\n", (411,)),
    Row(
        "PUT of a page",
        b"PUT /api/v1/uploads/u/chunk/0 HTTP/1.1\r\nHost: [::1]\r\nOrigin: http://e\r\nContent-Length: 0\r\n\r\n",
        (403,),
    ),
    Row("DELETE of a page", b"DELETE /api/v1/uploads/u HTTP/1.1\r\nHost: [::1]\r\nOrigin: null\r\n\r\n", (403,)),
    Row("POST where only GET is", sized(b"POST /health HTTP/1.1\r\nHost: [::1]\r\n", b""), (405,)),
    Row("GET where only POST is", get("/api/v1/workspaces/w/bundles"), (405,)),
    Row("no host", b"GET /health HTTP/1.1\r\n\r\n", (400,)),
    Row("two hosts", get("/health", b"Host: other"), (400,)),
    Row("page in a browser", sized(MISSING + b"Origin: https://evil.example\r\n", b'{"digests":[]}'), (403,)),
    Row("web socket", get("/health", b"Connection: Upgrade", b"Upgrade: websocket"), (200, 400), True),
    Row("wait that is no number", get("/api/v1/workspaces/w?tree_sequence=1&wait=x"), (400,)),
    Row("wait that is not finite", get("/api/v1/workspaces/w?tree_sequence=1&wait=nan"), (400,)),
    Row("negative wait", get("/api/v1/workspaces/w?tree_sequence=1&wait=-1"), (400,)),
    Row("R41 sequence that is no number", get("/api/v1/workspaces/w?tree_sequence=1.5"), (400,)),
    Row("huge sequence", get("/api/v1/workspaces/w?tree_sequence=" + "9" * 30), (400,)),
    Row("no such route", get("/api/v2/workspaces"), (404,)),
]


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_a_bad_request_is_refused_by_its_status_and_by_nothing_else(server: Served, row: Row) -> None:
    """The status is the promised one, the body is a problem (or the seed route's JSON), and the server serves on."""
    answered, closed = server.raw(row.request)
    head, _, body = answered.partition(b"\r\n\r\n")
    found = re.match(rb"HTTP/1\.1 (\d{3})", head)
    assert found, answered[:200]
    assert int(found[1]) in row.status, answered[:500]
    assert b"deltasync-server: 1" in head.lower()
    assert b"Traceback" not in body and b"/site-packages" not in body
    if int(found[1]) >= 400:
        is_seed = row.request.startswith(UPLOAD) and b'"success":false' in body
        assert is_seed or b"content-type: application/problem+json" in head.lower()
    if row.closes is not None:
        assert closed == row.closes
    if closed:
        assert len(re.findall(rb"HTTP/1\.1 \d{3} ", answered)) == 1, (
            "bytes behind a refused request were taken for another one"
        )
    assert server.get("/health").status == 200


def test_every_refusal_says_the_same_things(server: Served) -> None:
    """A problem has a type, a title, its status, a sentence, a code and facts."""
    answer = server.get("/nowhere")
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json == {
        "type": "urn:deltasync:problem:not-found",
        "title": "Not Found",
        "status": 404,
        "detail": "there is no /nowhere; GET /docs lists the routes",
        "code": "NOT_FOUND",
        "facts": {},
    }
    assert server.request("POST", "/health", b"").headers["allow"] == "GET"


def test_the_names_in_a_refusal_are_safe_to_show(server: Served) -> None:
    """A path with an escape sequence comes back escaped."""
    detail = server.get("/nowhere%C2%9B31m").json["detail"]
    assert "\\x9b31m" in detail and detail.isprintable()


def chunked(count: int) -> bytes:
    return b"1\r\nx\r\n" * count


def test_a_million_chunks_of_one_byte_are_taken_in_bounded_time(server: Served) -> None:
    """R15: one-byte chunks are slow for the sender, not for the server: the answer comes, and others are served."""
    began = time.monotonic()
    answered, _ = server.raw(BUNDLES + IDENTITY + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(10**6) + b"0\r\n\r\n")
    assert answered.startswith(b"HTTP/1.1 422")
    assert time.monotonic() - began < SECONDS
    assert server.get("/health").status == 200


def drip(server: Served, start: bytes, pieces: Iterator[bytes]) -> bytes:
    """Send one piece after another, slowly, until the server answers; return the answer."""
    with server.connect() as connection:
        connection.sendall(start)
        connection.settimeout(0.4)
        while True:
            try:
                return connection.recv(4096)
            except TimeoutError:
                connection.sendall(next(pieces))


WHOLE = Writer("w").large(5000)
SENT = b"Deltasync-Identity: " + WHOLE.identity.encode() + b"\r\n"
BYTES = [WHOLE.sealed[n : n + 1] for n in range(1000)]


@pytest.mark.parametrize(
    ("start", "pieces"),
    [
        (b"", [b""]),
        (b"GET /health HTTP/1.1\r\nHost: [::1]\r\n", [b"X"]),
        (b"", [b"\r\n"]),
        (BUNDLES + SENT + b"Content-Length: 100000\r\n\r\n", BYTES),
        (BUNDLES + SENT + b"Transfer-Encoding: chunked\r\n\r\n", [b"1\r\n" + each + b"\r\n" for each in BYTES]),
        (MISSING + b"Content-Length: 100000\r\n\r\n", [b"["]),
        (UPLOAD + FORM + b"Content-Length: 100000\r\n\r\n--XX\r\n", [b"a"]),
    ],
    ids=["nothing", "R20 head", "empty lines", "R21 bundle", "R21 chunks", "R21 json", "R21 form"],
)
def test_a_request_that_comes_drop_by_drop_is_ended_by_the_deadline(
    server: Served, start: bytes, pieces: list[bytes]
) -> None:
    """R20, R21: head and body have deadlines that a byte now and then does not extend."""
    began = time.monotonic()
    assert drip(server, start, itertools.cycle(pieces)).startswith(b"HTTP/1.1 408")
    assert 1.0 < time.monotonic() - began < 6.0


def test_many_idle_connections_do_not_keep_others_out(server: Served) -> None:
    """Beyond its number of connections the server answers 503, which a retry helps; later it takes new ones."""
    idle = [server.connect() for _ in range(70)]
    try:
        answers = [received(each)[0] for each in idle[65:]]
        assert all(each.startswith(b"HTTP/1.1 503") and b"HOST_BUSY" in each for each in answers)
    finally:
        for each in idle:
            each.close()
    until(lambda: server.raw(get("/health", b"Connection: close"))[0].startswith(b"HTTP/1.1 200"))


def test_a_refused_upload_is_answered_before_its_body_and_the_answer_is_heard(server: Served) -> None:
    """R13: what is refused by its head is answered at once, while the sender still sends, and the sender hears it."""
    with server.connect() as connection:
        connection.sendall(BUNDLES + IDENTITY + b"Content-Length: 9999999999999\r\n\r\n")
        answer = connection.recv(4096)
        assert answer.startswith(b"HTTP/1.1 413") and b"connection: close" in answer.lower()
        with pytest.raises(OSError, match=r"reset|[Pp]ipe"):
            for _ in range(100_000):
                connection.sendall(b"x" * 65536)


def test_a_reader_that_takes_nothing_is_cut_off(server: Served) -> None:
    """A download that nobody reads does not hold its file: it breaks off, and does not look whole."""
    made = Writer("unread").large(20_000_000)
    assert server.send("unread", made).status == 200
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(get(f"/api/v1/blobs/{made.metadata.operations[0].digest}"))
        until(lambda: "took nothing" in server.log.read_text())
        connection.settimeout(SECONDS)
        found = 0
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(1 << 20):
                found += len(part)
    assert found < 20_000_000


def test_a_gap_is_answered_before_the_whole_body_has_come(server: Served) -> None:
    """A bundle out of turn is refused by its metadata: its sender need not send the rest."""
    writer = Writer("gap")
    writer.file()
    late = writer.large(3_000_000)
    head = f"POST /api/v1/workspaces/gap/bundles HTTP/1.1\r\nHost: [::1]\r\nDeltasync-Identity: {late.identity}\r\n"
    with server.connect() as connection:
        length = b"Content-Length: %d\r\n\r\n" % len(late.sealed)
        connection.sendall(head.encode() + length + late.sealed[:2_500_000])
        answer, _ = received(connection)
    assert answer.startswith(b"HTTP/1.1 409") and b'"expected_sequence":1' in answer


def test_a_sender_that_goes_away_leaves_nothing(server: Served) -> None:
    """A connection that breaks in the middle of a bundle leaves no file and no sequence behind."""
    made = Writer("broken").large(2_000_000)
    head = f"POST /api/v1/workspaces/broken/bundles HTTP/1.1\r\nHost: [::1]\r\nDeltasync-Identity: {made.identity}\r\n"
    for cut in (0, 1000, 1_500_000):
        connection = server.connect()
        connection.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(made.sealed) + made.sealed[:cut])
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.close()
    until(lambda: not left(server.data))
    assert server.get("/api/v1/workspaces/broken").json["sequence"] == 0
    assert server.send("broken", made).status == 200


def left(data: Path) -> list[Path]:
    return [*(data / "journal").iterdir(), *(data / "staging").iterdir()]


def test_long_polls_and_uploads_do_not_keep_health_waiting(server: Served) -> None:
    """With every waiting and every receiving thread taken, health still answers at once."""
    connections = []
    for number in range(20):
        connection = server.connect()
        connection.sendall(get(f"/api/v1/workspaces/w{number}?tree_sequence=9&wait=5"))
        connections.append(connection)
    for number in range(12):
        connection = server.connect()
        head = f"POST /api/v1/workspaces/u{number}/bundles HTTP/1.1\r\nHost: [::1]\r\n".encode()
        connection.sendall(head + IDENTITY + b"Content-Length: 1000\r\n\r\n")
        connections.append(connection)
    try:
        for _ in range(20):
            began = time.monotonic()
            assert server.get("/health").status == 200
            assert time.monotonic() - began < 1.0
    finally:
        for connection in connections:
            connection.close()
