"""The routes of uploads against a real server: what they take, answer and refuse."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Answer, Bundle, Served, Writer, serving, until

from deltasync.core.hashing import digest_of

UPLOADS = "/api/v1/uploads"
PIECE = 1000
NOBODY = "00000000-0000-4000-8000-000000000000"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served") / "data") as served:
        yield served


def post(server: Served, path: str, value: Any = None) -> Answer:
    body = b"" if value is None else json.dumps(value).encode()
    return server.request("POST", path, body, {"Content-Type": "application/json"})


def begin(server: Served, workspace: str, made: Bundle, uploads: str = UPLOADS, **options: int) -> str:
    """Begin an upload and return its path."""
    asked = {"kind": "bundle", "workspace": workspace, "identity": made.identity, "chunk_size": PIECE, **options}
    answer = post(server, f"{uploads}/initiate", asked)
    assert answer.status == 200, answer
    return f"{uploads}/{answer.json['upload_id']}"


def pieces(made: Bundle) -> list[bytes]:
    return [made.sealed[at : at + PIECE] for at in range(0, len(made.sealed), PIECE)]


def put(server: Served, path: str, number: int, piece: bytes, **headers: str) -> Answer:
    named = {f"Deltasync-{name.capitalize()}": value for name, value in headers.items()}
    return server.request("PUT", f"{path}/chunk/{number}", piece, named)


def send_all(server: Served, path: str, made: Bundle) -> dict[str, Any]:
    """Send every piece, the last first, and return what completes the upload."""
    cut = pieces(made)
    for number in reversed(range(len(cut))):
        assert put(server, path, number, cut[number], etag=digest_of(cut[number]).hex()).status == 200
    return {"total_chunks": len(cut), "file_size": len(made.sealed)}


def refused(answer: Answer, status: int, code: str) -> None:
    assert (answer.status, answer.json["code"]) == (status, code), answer


@pytest.mark.parametrize("uploads", [UPLOADS, "/api/uploads"])
def test_a_bundle_in_pieces_gets_the_receipt_of_the_bundles_route(server: Served, uploads: str) -> None:
    """The tree is there when `wait` asked for it, and the same bundle in one body is a duplicate afterwards."""
    name = uploads.strip("/").replace("/", "-")
    made = Writer(name).large(9_000)
    path = begin(server, name, made, uploads)
    told = send_all(server, path, made)
    parts = [{"chunk_num": n, "etag": digest_of(piece).hex()} for n, piece in enumerate(pieces(made))]
    first = post(server, f"{path}/complete?wait=20", {**told, "parts": parts})
    assert first.status == 200, first
    assert (first.json["root"], first.json["tree_sequence"], first.json["duplicate"]) == (made.root, 1, False)
    assert post(server, f"{path}/complete?wait=20", told).json == first.json
    assert server.send(name, made).json == {**first.json, "duplicate": True, "wanted": None}
    refused(server.request("DELETE", path), 400, "USAGE")
    assert server.get(path).json["status"] == "completed"


def test_an_announced_size_need_not_be_told_again(server: Served) -> None:
    """Completing takes no body then, as the seed's clients do it; each answer counts what is there."""
    made = Writer("announced").large(3_500)
    cut = pieces(made)
    path = begin(server, "announced", made, file_size=len(made.sealed), total_chunks=len(cut))
    for number, piece in enumerate(cut):
        assert put(server, path, number, piece).json == {
            "chunk_num": number,
            "etag": digest_of(piece).hex(),
            "received_bytes": len(piece),
            "uploaded_chunks": number + 1,
            "total_chunks": len(cut),
        }
    refused(put(server, path, len(cut), b"more"), 400, "USAGE")
    assert post(server, f"{path}/complete").json["root"] == made.root


def test_what_is_missing_is_told_and_listed(server: Served) -> None:
    """Completing too early is a conflict that names how much is missing; the list says which; aborting counts."""
    made = Writer("missing").large(6_500)
    cut = pieces(made)
    path = begin(server, "missing", made)
    for number in (0, 1, 3):
        put(server, path, number, cut[number])
    early = post(server, f"{path}/complete", {"total_chunks": len(cut), "file_size": len(made.sealed)})
    refused(early, 409, "UPLOAD_INCOMPLETE")
    assert early.json["facts"]["missing_chunks"] == len(cut) - 3
    found = server.get(path).json
    assert (found["present"], found["uploaded_chunks"], found["received_bytes"]) == ([[0, 1], [3, 3]], 3, 3 * PIECE)
    answer = server.request("DELETE", path)
    assert answer.json == {
        "upload_id": path.rpartition("/")[2],
        "status": "aborted",
        "chunks_uploaded": 3,
        "chunks_deleted": 3,
    }
    for gone in (server.get(path), server.request("DELETE", path), put(server, path, 0, cut[0])):
        refused(gone, 404, "NOT_FOUND")
    refused(post(server, f"{path}/complete"), 404, "NOT_FOUND")


def test_a_gap_is_answered_as_on_the_bundles_route(server: Served) -> None:
    """The same status, code and facts; when the first is there the upload completes."""
    writer = Writer("gap")
    first, second = writer.file(), writer.large(3_000)
    whole = server.send("gap", second)
    path = begin(server, "gap", second)
    told = send_all(server, path, second)
    in_pieces = post(server, f"{path}/complete", told)
    refused(in_pieces, 409, "SEQUENCE_GAP")
    assert in_pieces.json == whole.json
    server.send("gap", first)
    assert post(server, f"{path}/complete", told).json["sequence"] == 2


def test_another_owner_needs_take_over(server: Served) -> None:
    """The query parameter means what it means on the bundles' route."""
    server.send("owned", Writer("owned").file())
    made = Writer("owned", client_id="b" * 32, epoch="2" * 32).large(2_000)
    path = begin(server, "owned", made)
    told = send_all(server, path, made)
    refused(post(server, f"{path}/complete", told), 409, "NOT_OWNER")
    taken = post(server, f"{path}/complete?take_over=true", told)
    assert taken.json["code"] == "SEQUENCE_FORK"  # it is let in, and then judged as any other


def test_a_bundle_of_another_identity_is_refused(server: Served) -> None:
    """The identity that was announced binds what the pieces make."""
    made, other = Writer("identity").large(2_000), Writer("identity").file()
    path = begin(server, "identity", other)
    refused(post(server, f"{path}/complete", send_all(server, path, made)), 422, "BUNDLE_REFUSED")
    assert server.get("/api/v1/workspaces/identity").json["sequence"] == 0


GOOD = {"kind": "bundle", "workspace": "w", "identity": "0" * 64}


@pytest.mark.parametrize(
    ("value", "status"),
    [
        ({**GOOD, "unknown": 1}, 400),
        ({**GOOD, "kind": "other"}, 400),
        ({**GOOD, "workspace": "../w"}, 400),
        ({**GOOD, "identity": "0" * 63}, 400),
        ({**GOOD, "identity": "G" * 64}, 400),
        ({**GOOD, "chunk_size": "2"}, 400),
        ({**GOOD, "chunk_size": 0}, 400),
        ({**GOOD, "file_size": -1}, 400),
        ({**GOOD, "file_size": 1 << 50}, 413),
        ([], 400),
        ({**GOOD, "workspace": "w" * 70_000}, 413),
    ],
)
def test_what_begins_no_upload_is_refused(server: Served, value: object, status: int) -> None:
    """The request is decoded strictly, and bounded."""
    assert post(server, f"{UPLOADS}/initiate", value).status == status


def test_a_piece_is_checked_before_it_counts(server: Served) -> None:
    """Wrong digests, headers, numbers and lengths are refused, and leave the upload as it was."""
    made = Writer("checked").large(3_000)
    cut = pieces(made)
    path = begin(server, "checked", made)
    etag = digest_of(cut[0]).hex()
    for number, piece, headers, status in [
        (0, cut[0], {"etag": "0" * 64}, 400),
        (0, cut[0], {"etag": "0" * 63}, 400),
        (0, cut[0], {"etag": etag, "offset": "-1"}, 400),
        (0, cut[0][5:], {"etag": etag, "offset": "5"}, 400),
        (0, bytes(PIECE + 1), {}, 400),
        (0, b"", {}, 400),
        (1 << 31, cut[0], {}, 400),
        (-1, cut[0], {}, 400),
    ]:
        assert put(server, path, number, piece, **headers).status == status, (number, headers)
    assert server.request("PUT", f"{path}/chunk/0", bytes((8 << 20) + 1)).status == 413
    assert server.request("PUT", f"{path}/chunk/one", b"x").status == 400
    assert (server.get(path).json["uploaded_chunks"], server.get(path).json["partial"]) == (0, [])
    bad = [{"chunk_num": 0, "etag": "0" * 64}]
    told = send_all(server, path, made)
    refused(post(server, f"{path}/complete", {**told, "parts": bad}), 400, "USAGE")
    for number in (-1, 2**31 + 1, 2**63, 2**64 - 1):
        nowhere = [{"chunk_num": number, "etag": "a" * 64}]
        refused(post(server, f"{path}/complete", {**told, "parts": nowhere}), 400, "USAGE")
    refused(post(server, f"{path}/complete", {**told, "unknown": 1}), 400, "USAGE")
    refused(post(server, f"{path}/complete", {}), 400, "USAGE")
    assert post(server, f"{path}/complete", told).status == 200


def test_an_unknown_upload_is_no_upload(server: Served) -> None:
    """Every route of it says so, whatever is asked."""
    path = f"{UPLOADS}/{NOBODY}"
    for answer in (
        server.get(path),
        server.request("DELETE", path),
        put(server, path, 0, b"x"),
        post(server, f"{path}/complete"),
    ):
        refused(answer, 404, "NOT_FOUND")


def test_uploads_are_counted_in_the_figures(tmp_path: Path) -> None:
    """What unfinished uploads take on the disk is among the metrics."""
    with serving(tmp_path / "data") as server:
        path = begin(server, "w", Writer("w").large(3_000))
        put(server, path, 2, bytes(PIECE))
        metrics = server.get("/metrics").body.decode().splitlines()
        assert "deltasync_uploads 1.0" in metrics and "deltasync_upload_bytes 1000.0" in metrics


def test_a_server_that_stops_lets_nobody_wait_for_pieces(tmp_path: Path) -> None:
    """A bundle that waits for one in pieces is answered, and the server ends in time, with what came."""
    writer = Writer("w")
    first, second = writer.large(3_000), writer.file()
    with serving(tmp_path / "data") as server:
        path = begin(server, "w", first)
        put(server, path, 0, pieces(first)[0])
        answers: list[Answer] = []
        waiting = threading.Thread(target=lambda: answers.append(server.send("w", second)))
        waiting.start()
        until(lambda: b"deltasync_bundles_arriving 2.0" in server.get("/metrics").body)
        assert server.stop() == 0
        waiting.join()
        refused(answers[0], 409, "SEQUENCE_GAP")
    with serving(tmp_path / "data") as server:
        assert server.get(path).json["present"] == [[0, 0]]
        assert post(server, f"{path}/complete", send_all(server, path, first)).json["root"] == first.root
