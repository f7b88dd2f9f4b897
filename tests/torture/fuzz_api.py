"""Mutated requests to every route, and mutated answers to every question of the client."""

from __future__ import annotations

import io
import json
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, cast
from unittest.mock import patch
from urllib.parse import quote

import folders
import msgspec
import requests
from desk import Desk
from serving import Answer
from urllib3.response import HTTPResponse

from deltasync.client import transport
from deltasync.client.fetch import FetchOptions, fetch
from deltasync.client.transport import HttpTransport
from deltasync.core import wire
from deltasync.core.errors import DeltasyncError
from torture.harness import Result
from torture.inside import Inside
from torture.mutation import TEXTS, changed, spoiled_bytes

A, B = "a" * 64, "b" * 64
UPLOAD = "00000000-0000-4000-8000-000000000000"
_WS = f"{wire.API}/workspaces/w"
_JSON_REQUESTS: tuple[tuple[str, str, Any], ...] = (
    ("POST", f"{_WS}/missing", {"digests": [A, B]}),
    ("POST", f"{_WS}/blobs", {"digests": [A]}),
    ("POST", f"{_WS}/trees", {"digests": [A]}),
    ("POST", f"{wire.API}/uploads/initiate", {"kind": "bundle", "workspace": "w", "identity": A, "resume": True}),
    (
        "POST",
        f"{wire.API}/uploads/initiate",
        {
            "filepath": "/f",
            "hostname": "h",
            "sha256": A,
            "blake3": B,
            "file_size": 3,
            "chunk_size": 3,
            "total_chunks": 1,
        },
    ),
    (
        "POST",
        f"{wire.API}/uploads/UPLOAD/complete",
        {"parts": [{"chunk_num": 0, "etag": A}], "file_size": 3, "total_chunks": 1},
    ),
    (
        "POST",
        f"{wire.API}/files/deletions",
        {"files": [{"filepath": "/f", "hostname": "h", "blake3": A, "deleted_at": "2026-11-21T00:00:00Z"}]},
    ),
    ("DELETE", f"{wire.API}/files/{A}", {"filepath": "/f", "hostname": "h", "blake3": A}),
    ("POST", f"{wire.API}/pairings/1", {"message": "53" * 33}),
    ("POST", f"{wire.API}/pairings/1/confirm", {"exchange": "x", "confirmation": A, "public_key": "-----BEGIN"}),
    ("POST", f"{wire.API}/token/rotate", {"digest": A, "public_key": "-----BEGIN PUBLIC KEY-----"}),
)
_OTHER_REQUESTS: tuple[tuple[str, str, bytes | None, dict[str, str]], ...] = (
    ("GET", f"{_WS}?tree_sequence=1", None, {}),
    ("GET", f"{_WS}/tree/{A}", None, {}),
    ("GET", f"{_WS}/recipes/{A}?average=16384", None, {}),
    ("GET", f"{_WS}/sequences/1", None, {}),
    ("GET", f"{wire.API}/blobs/{A}", None, {"Range": "bytes=0-1"}),
    ("GET", f"{wire.API}/uploads/UPLOAD/chunks", None, {}),
    ("PUT", f"{wire.API}/uploads/UPLOAD/chunk/0", b"abc", {wire.ETAG_HEADER: A, wire.OFFSET_HEADER: "0"}),
    ("POST", f"{_WS}/bundles?take_over=true", b"(\xb5/\xfd", {wire.IDENTITY_HEADER: A}),
    ("GET", f"{wire.API}/delta/status?collection_name=w&workspace_path=/w", None, {}),
    (
        "POST",
        f"{wire.API}/delta/upload?sequence=1&force=true",
        b'--x\r\nContent-Disposition: form-data; name="workspace_path"\r\n\r\n/w\r\n'
        b'--x\r\nContent-Disposition: form-data; name="bundle"; filename="b"\r\n\r\n(\xb5/\xfd\r\n--x--\r\n',
        {"Content-Type": "multipart/form-data; boundary=x"},
    ),
)


def request(random: Random, server: Inside, upload: str) -> str:
    """Make one mutated request; returns what is wrong with the answer, '' for nothing."""
    headers: dict[str, str] = {}
    if random.random() < 0.7:
        method, target, value = random.choice(_JSON_REQUESTS)
        headers["Content-Type"] = "application/json"
        value = changed(random, value)
        if random.random() < 0.3:
            value = changed(random, value)
        body: bytes | None = json.dumps(value, ensure_ascii=random.random() < 0.5).encode("utf-8", "surrogatepass")
        if random.random() < 0.1:
            body = spoiled_bytes(random, body or b"")
    else:
        method, target, body, headers = random.choice(_OTHER_REQUESTS)
        headers = dict(headers)
        what = random.random()
        if body is not None and what < 0.4:
            body = spoiled_bytes(random, body)
        elif headers and what < 0.8:
            name = random.choice(list(headers))
            headers[name] = str(changed(random, headers[name])).replace("\n", " ").replace("\r", " ")
    target = target.replace("UPLOAD", random.choice((upload, upload, UPLOAD)))
    if random.random() < 0.3:
        target = _other_target(random, target)
    answer = server.ask(method, target, body, headers)
    if answer.status == 200 and target.endswith("/initiate"):
        server.ask("DELETE", f"{wire.API}/uploads/{answer.json['upload_id']}")
    wrong = _why_wrong(answer, is_seed="/delta/" in target)
    return f"{wrong}: {method} {target} {headers} {body!r}" if wrong else ""


def _other_target(random: Random, target: str) -> str:
    path, mark, query = target.partition("?")
    parts = path.split("/")
    if mark and random.random() < 0.5:
        names = query.split("&")
        at = random.randrange(len(names))
        names[at] = names[at].partition("=")[0] + "=" + quote(str(random.choice(TEXTS)), safe="")
        return path + "?" + "&".join(names)
    at = random.randrange(3, len(parts))
    parts[at] = quote(random.choice((parts[at] + "x", *TEXTS)), safe="")
    return "/".join(parts) + mark + query


def _why_wrong(answer: Answer, *, is_seed: bool) -> str:
    if answer.headers.get("deltasync-server") != "1" and "deltasync-server" in answer.headers:
        return "another server"
    if answer.status >= 500 and answer.status not in (503, 507):
        return f"{answer.status} {answer.body!r}"
    if answer.status >= 400 and not is_seed:
        problem = msgspec.json.decode(answer.body, type=wire.Problem)
        if problem.status != answer.status or not problem.code:
            return f"{answer.status} with {problem}"
    return ""


# Answers


class Canned(HttpTransport):
    """The real transport; what answers is a function instead of a server."""

    def __init__(self, answer: Callable[[str, str, bytes | None, dict[str, str]], Answer]) -> None:
        """answer: gives the answer to method, target, body and headers."""
        super().__init__("http://127.0.0.1:1", max_retries=1, pause=lambda _: None)
        self._canned = answer

    def _answer(self, session: requests.Session, method: str, path: str, **options: Any) -> requests.Response:
        query = options.get("query")
        target = (path if path == "/health" else wire.API + path) + (f"?{_encoded(query)}" if query else "")
        body = options.get("body")
        sent = body if body is None or isinstance(body, bytes) else b"".join(body)
        answer = self._canned(method, target, sent, dict(options.get("headers") or {}))
        response = requests.Response()
        response.status_code = answer.status
        response.headers.update(answer.headers)
        response.raw = HTTPResponse(io.BytesIO(answer.body), preload_content=False)
        return response


def _encoded(query: Any) -> str:
    return "&".join(f"{name}={quote(str(value))}" for name, value in query.items())


_STATE = wire.WorkspaceState(
    workspace="w",
    client_id="c" * 32,
    epoch="1" * 32,
    sequence=3,
    root=A,
    tree_path="/w",
    tree_sequence=3,
    files=1,
    content_bytes=2,
    last_applied_at="2026-11-21T00:00:00.000Z",
    last_bundle_id=UPLOAD,
    lag=0,
    wanted=[A],
    features=["recipes"],
)
_RECEIPT = wire.Receipt(
    workspace="w",
    epoch="1" * 32,
    sequence=3,
    identity=A,
    bundle_id=UPLOAD,
    root=A,
    created=1,
    updated=0,
    moved=0,
    deleted=0,
    content_bytes=3,
    applied_at="2026-11-21T00:00:00.000Z",
    tree_sequence=3,
    wanted=[],
)
_SEQUENCE = wire.KeptSequence(epoch="1" * 32, sequence=1, identity=A, root=A, applied_at="2026-11-21T00:00:00.000Z")
_HEALTH = wire.Health(status="ok", version="1", disk_free_bytes=1, disk_total_bytes=2, workspaces=1, uptime_seconds=1.5)
_UPLOAD = wire.UploadState(
    upload_id=UPLOAD,
    expires_at="2026-11-21T00:00:00.000Z",
    status="initiated",
    chunk_size=8 << 20,
    total_chunks=None,
    uploaded_chunks=0,
    received_bytes=0,
    present=[(0, 1)],
    partial=[wire.UploadPartial(chunk_num=2, received_bytes=5)],
)
_QUESTIONS: tuple[tuple[msgspec.Struct, Callable[[HttpTransport], Any]], ...] = (
    (_STATE, lambda transport: transport.workspace("w")),
    (wire.MissingAnswer(missing=[A], leased_seconds=3600), lambda transport: transport.missing("w", [A, B])),
    (wire.KeptSequences(sequences=[_SEQUENCE]), lambda transport: transport.sequences("w")),
    (_SEQUENCE, lambda transport: transport.sequence("w", 1)),
    (_HEALTH, lambda transport: transport.health()),
    (_RECEIPT, lambda transport: transport.send_bundle("w", bytes(32), [b"x"])),
    (_UPLOAD, lambda transport: transport.ask(wire.UploadState, "GET", f"/uploads/{UPLOAD}")),
)
_PROBLEM = {
    "type": "urn:deltasync:problem:content-missing",
    "title": "Conflict",
    "status": 409,
    "detail": "the receiver lacks it",
    "code": "CONTENT_MISSING",
    "facts": {"missing": [A], "rule": "B-1", "expected_sequence": 3, "got_sequence": 4},
}
_CODES = (
    "CONTENT_MISSING",
    "SEQUENCE_GAP",
    "SEQUENCE_GONE",
    "BUNDLE_REFUSED",
    "LIMIT_EXCEEDED",
    "NO_SPACE",
    "HOST_BUSY",
)
_HEADERS = {"Deltasync-Server": "1", "Date": "Sat, 21 Nov 2026 00:00:00 GMT", "Content-Type": "application/json"}


def spoiled_answer(random: Random, answer: Answer) -> Answer:
    """Return an answer whose JSON says something else, or is something else."""
    what, status, headers, body = random.random(), answer.status, dict(answer.headers), answer.body
    if what < 0.08:
        status = random.choice((200, 201, 204, 206, 301, 400, 401, 404, 409, 413, 422, 429, 500, 502, 503, 507))
    elif what < 0.14:
        name = random.choice(("Deltasync-Server", "Date", "Retry-After", "Content-Range"))
        headers.pop(name.lower(), None)
        headers[name] = str(random.choice(TEXTS)).replace("\n", "").replace("\r", "").replace("\x00", "")
    elif what < 0.25:
        body = spoiled_bytes(random, body)
    elif what < 0.35:
        problem = dict(_PROBLEM, code=random.choice(_CODES))
        status, body = random.choice((409, 413, 422, 503)), _json(changed(random, problem))
    else:
        try:
            value = json.loads(body)
        except ValueError:
            return Answer(status, headers, spoiled_bytes(random, body))
        body = _json(changed(random, value))
    return Answer(status, headers, body)


def _json(value: object) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def answer(random: Random) -> str:
    """Let the client take one mutated answer; returns what is wrong with what it made of it, '' for nothing."""
    value, ask = random.choice(_QUESTIONS)
    said = spoiled_answer(random, Answer(200, _HEADERS, msgspec.json.encode(value)))
    try:
        ask(Canned(lambda *_: said))
    except DeltasyncError as error:
        str(error), dict(error.facts)
    except Exception as error:  # noqa: BLE001 - whatever is not ours is the fault
        return f"{error!r} of {said}"
    return ""


class Liars:
    """A folder that is pushed to a server whose answers are mutated; the folder must stay as it is."""

    def __init__(self, server: Inside, scratch: Path) -> None:
        self._server, self._scratch = server, scratch
        self._number = 0
        self._desk: Desk | None = None

    def push(self, random: Random, result: Result) -> str:
        """Push once; returns what is wrong with it, '' for nothing."""
        if self._desk is None or self._number % 12 == 0:
            self._desk = Desk(self._scratch / f"w{self._number}")
            folders.write(self._desk.root, "a.txt", b"first")
        self._number += 1
        desk, rate = self._desk, random.choice((0.1, 0.3, 0.6))
        folders.write(desk.root, f"f{random.randrange(5)}", random.randbytes(random.choice((0, 10, 3000))))
        before = folders.listing(desk.root)

        def ask(method: str, target: str, body: bytes | None, headers: dict[str, str]) -> Answer:
            found = self._server.ask(method, target, body, headers)
            return spoiled_answer(random, found) if random.random() < rate else found

        fault, pieces = "", random.choice((200, transport.UPLOAD_FROM_BYTES))
        try:
            with patch.object(transport, "UPLOAD_FROM_BYTES", pieces), patch.object(transport, "PROBE_BYTES", pieces):
                desk.push(transport=cast(Any, Canned(ask)), wait=random.choice((0.0, 0.0, 0.1)))
            result.count("pushes that went on")
        except DeltasyncError as error:
            result.count(f"pushes that ended with {error.code}")
        except Exception as error:  # noqa: BLE001 - whatever is not ours is the fault
            fault = "".join(traceback.format_exception(error))[-1500:]
        if folders.listing(desk.root) != before:
            fault += "the folder was changed"
        if fault:
            self._desk = None
        return fault


class Fetches:
    """A workspace that is fetched through mutated answers; nothing but its bytes may come, and nowhere but in DEST."""

    def __init__(self, server: Inside, scratch: Path) -> None:
        self._server, self._scratch = server, scratch / "fetches"
        self._number = 0
        self._scratch.mkdir()
        (self._scratch / "canary").write_bytes(b"canary")
        desk = Desk(scratch / "origin")
        folders.life(desk.root)
        desk.push(transport=cast(Any, Canned(server.ask)))
        self._contents = {each[-1] for each in folders.listing(desk.root).values() if each[0] == "file"}

    def fetch(self, random: Random, result: Result) -> str:
        """Fetch once; returns what is wrong with what came, '' for nothing."""
        self._number += 1
        dest, rate = self._scratch / f"d{self._number}", random.choice((0.1, 0.3, 0.5))

        def ask(method: str, target: str, body: bytes | None, headers: dict[str, str]) -> Answer:
            found = self._server.ask(method, target, body, headers)
            return spoiled_answer(random, found) if random.random() < rate else found

        fault = ""
        try:
            options = FetchOptions("origin", at=random.choice((None, None, 1)), delete=random.random() < 0.5)
            fetch(cast(Any, Canned(ask)), dest, options, _Deaf())
            result.count("fetches that went on")
        except DeltasyncError as error:
            result.count(f"fetches that ended with {error.code}")
        except Exception as error:  # noqa: BLE001 - whatever is not ours is the fault
            fault = "".join(traceback.format_exception(error))[-1500:]
        files = [each[-1] for each in folders.listing(dest).values() if each[0] == "file"] if dest.exists() else []
        if not set(files) <= self._contents:
            fault += "bytes came that are none of the workspace's"
        if sorted(path.name for path in self._scratch.iterdir()) != sorted(
            {"canary", *([dest.name] if dest.exists() else [])}
        ):
            fault += "something came beside DEST"
        shutil.rmtree(dest, ignore_errors=True)
        return fault


class _Deaf:
    """Hears how far a fetch is, and does nothing."""

    def read(self, files: int, size_bytes: int) -> None:
        pass

    def all_is_read(self) -> None:
        pass

    def fetched(self, size_bytes: int, total_bytes: int) -> None:
        pass
