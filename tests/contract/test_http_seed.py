"""The seed's routes: our bundle as a form, and the fields that clients of that API expect."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from serving import BINARY, Answer, Bundle, Served, Writer, serving

UPLOAD = "/api/v1/delta/upload"
STATUS = "/api/v1/delta/status"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served") / "data") as served:
        yield served


def form(fields: Mapping[str, str], sealed: bytes, *, file_first: bool = False) -> tuple[bytes, dict[str, str]]:
    """Return a form's body and its header."""
    parts = [f'--b\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n'.encode() for k, v in fields.items()]
    head = b'--b\r\nContent-Disposition: form-data; name="bundle"; filename="../../x.tar.zst"\r\n'
    file = head + b"Content-Type: application/gzip\r\n\r\n" + sealed + b"\r\n"
    parts = [file, *parts] if file_first else [*parts, file]
    return b"".join(parts) + b"--b--\r\n", {"Content-Type": 'multipart/form-data; boundary="b"'}


def upload(server: Served, made: Bundle, *, file_first: bool = False, **fields: str) -> Answer:
    body, headers = form(fields, made.sealed, file_first=file_first)
    return server.request("POST", UPLOAD, body, headers)


def last(server: Served, name: str) -> int:
    found: int = server.get(f"/api/v1/workspaces/{name}").json["sequence"]
    return found


@pytest.mark.parametrize("file_first", [False, True], ids=["fields first", "file first"])
def test_an_upload_answers_as_the_seed_says(server: Served, *, file_first: bool) -> None:
    """Success is HTTP 200 with the seed's fields, wherever the fields stand in the form."""
    name = f"seed-{file_first}"
    made = Writer("media").file("a.txt", b"seed\n")
    fields = {"workspace_path": "/home/ada/media", "collection_name": name, "sequence_number": "1", "force": "false"}
    answer = upload(server, made, file_first=file_first, **fields)
    assert answer.status == 200 and answer.headers["content-type"] == "application/json"
    assert answer.json.pop("processing_time_ms", -1) >= 0
    assert {k: v for k, v in answer.json.items() if k != "processing_time_ms"} == {
        "success": True,
        "bundle_id": made.metadata.manifest.bundle_id,
        "sequence_number": 1,
        "processed_operations": {"created": 1, "updated": 0, "moved": 0, "deleted": 0},
        "next_sequence": 2,
    }
    assert last(server, name) == 1
    assert not (server.data.parent / "x.tar.zst").exists()


def test_the_seeds_own_client_library_can_send_it(server: Served) -> None:
    """A form as `requests` writes it is understood."""
    import requests

    made = Writer("library").file()
    session = requests.Session()
    session.trust_env = False
    answer = session.post(
        server.url + UPLOAD,
        files={"bundle": ("x.tar.zst", made.sealed, "application/zstd")},
        data={"workspace_path": "/w", "sequence_number": 1},
        timeout=20,
    )
    assert answer.json()["success"], answer.text


def test_a_large_form_is_spooled_and_leaves_nothing(server: Served) -> None:
    """A bundle of some MiB goes through a file without a name; none stays."""
    made = Writer("large").large(6_000_000)
    assert upload(server, made).json["success"]
    assert not list((server.data / "staging").iterdir())


def test_the_workspace_is_the_fields_or_the_bundles_never_the_paths(server: Served) -> None:
    """workspace_path is a label: with it alone the bundle's own name decides; no folder is made from it."""
    made = Writer("named").file()
    assert upload(server, made, workspace_path="/home/ada/another").json["success"]
    assert (last(server, "named"), last(server, "another")) == (1, 0)
    assert upload(server, made, workspace_path="../../escape", collection_name="renamed").json["success"]
    assert last(server, "renamed") == 1
    refused = upload(server, made, collection_name="../../escape")
    assert (refused.status, refused.json["success"], refused.json["error"]["code"]) == (400, False, "USAGE")


def mismatch(answer: Answer) -> int:
    assert answer.status == 200, answer
    assert answer.json["success"] is False and answer.json["error"]["code"] == "SEQUENCE_MISMATCH"
    assert answer.json["error"]["message"]
    found: int = answer.json["error"]["expected_sequence"]
    return found


def test_a_mismatch_is_an_answer_that_says_what_is_expected(server: Served) -> None:
    """HTTP 200, success false, SEQUENCE_MISMATCH and the number, for the bundle's number and for the field's."""
    writer = Writer("mismatch")
    first, second, third = (writer.file(name, name.encode()) for name in "abc")
    assert mismatch(upload(server, second)) == 1
    assert mismatch(upload(server, first, sequence_number="7")) == 1
    assert last(server, "mismatch") == 0
    assert upload(server, first).json["next_sequence"] == 2
    assert mismatch(upload(server, third)) == 2
    assert mismatch(upload(server, Writer("mismatch").file("x", b"x"))) == 2
    assert upload(server, second, sequence_number="2").json["success"]
    assert last(server, "mismatch") == 2


def test_force_takes_the_expected_number_and_skips_no_check(server: Served) -> None:
    """force=true stands for the number that the server expects: a bundle with another number is refused anyway."""
    writer = Writer("forced")
    first, second = writer.file("a", b"a"), writer.file("b", b"b")
    assert mismatch(upload(server, second, force="true")) == 1
    assert mismatch(upload(server, second, force="true", sequence_number="2")) == 1
    assert upload(server, first, force="true", sequence_number="9").json["success"]
    assert mismatch(upload(server, Writer("forced").file("x", b"x"), force="true", sequence_number="1")) == 2
    thief = Writer("forced", client_id="d" * 32, epoch="4" * 32, sequence=1, root=writer.root, life=writer.life)
    refused = upload(server, thief.file("y", b"y"), force="true")
    assert (refused.status, refused.json["error"]["code"]) == (409, "NOT_OWNER")
    assert last(server, "forced") == 1
    assert upload(server, first, force="yes").json["sequence_number"] == 1, "a repeat is answered again"


def test_a_repeat_gets_its_first_answer_and_the_number_that_is_next_now(server: Served) -> None:
    """The same bundle again is a success with its own number; next_sequence is the head's plus one."""
    writer = Writer("repeat")
    first, second = writer.file("a", b"a"), writer.file("b", b"b")
    for made in (first, second, first):
        answer = upload(server, made)
        assert answer.json["success"]
    assert (answer.json["sequence_number"], answer.json["next_sequence"]) == (1, 3)


def test_a_broken_bundle_is_no_success_and_has_the_right_status(server: Served) -> None:
    """Refusals that are not about numbers keep HTTP's status, and the seed's shape with the error's code."""
    made = Writer("broken").file()
    torn = Bundle(made.metadata, made.sealed[:-9])
    answer = upload(server, torn)
    assert answer.status == 422 and answer.json["success"] is False
    assert answer.json["error"]["code"] == "BUNDLE_REFUSED" and "expected_sequence" not in answer.json["error"]
    for fields in ({"sequence_number": "one"}, {"force": "perhaps"}):
        answer = upload(server, made, **fields)
        assert (answer.status, answer.json["error"]["code"]) == (400, "USAGE")
    assert last(server, "broken") == 0


def test_a_bundle_beyond_the_advertised_size_is_refused(server: Served) -> None:
    """100 MiB bind this route, whether the size is announced or found out."""
    status = server.get(STATUS + "?collection_name=big").json
    assert status["server_info"]["max_bundle_size_mb"] == 100
    head = b"POST " + UPLOAD.encode() + b" HTTP/1.1\r\nHost: [::1]\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    answered, _ = server.raw(head + b"Content-Length: %d\r\n\r\n" % (102 << 20))
    assert answered.startswith(b"HTTP/1.1 413") and b'"success":false' in answered

    def pieces() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="bundle"\r\n\r\n'
        for _ in range(101):
            yield bytes(1 << 20)

    answer = server.request("POST", UPLOAD, pieces(), {"Content-Type": "multipart/form-data; boundary=b"})
    assert (answer.status, answer.json["error"]["code"]) == (413, "LIMIT_EXCEEDED")


def test_status_has_the_seeds_fields(server: Served) -> None:
    """Every field of the seed, and ours beside them; a workspace that was never written stands at 0."""
    answer = server.get(STATUS + "?workspace_path=/home/ada/fresh")
    assert answer.json == {
        "success": True,
        "workspace_path": "/home/ada/fresh",
        "collection_name": "fresh",
        "last_sequence": 0,
        "last_upload": None,
        "pending_operations": 0,
        "status": "ready",
        "last_bundle_id": None,
        "last_upload_status": None,
        "server_info": {"version": "0.1.0", "max_bundle_size_mb": 100, "supported_formats": ["tar.zst"]},
    }
    writer = Writer("fresh")
    made = writer.file()
    upload(server, made)
    found = server.get(STATUS + "?workspace_path=/elsewhere&collection_name=fresh").json
    assert (found["last_sequence"], found["last_bundle_id"]) == (1, made.metadata.manifest.bundle_id)
    assert found["last_upload"] and found["last_upload_status"] == "applied"
    upload(server, Writer("fresh").file("x", b"x"))
    assert server.get(STATUS + "?collection_name=fresh").json["last_upload_status"] == "SEQUENCE_MISMATCH"


def test_the_routes_can_be_left_out(tmp_path: Path) -> None:
    """--no-seed-routes: they are not there, and the description does not speak of them."""
    with serving(tmp_path / "data", "--no-seed-routes") as server:
        assert server.get(STATUS + "?collection_name=x").status == 404
        assert upload(server, Writer("x").file()).status == 404
        assert not [path for path in server.get("/openapi.json").json["paths"] if "delta" in path]


def test_the_routes_are_left_out_where_other_machines_reach_them(tmp_path: Path) -> None:
    """TRUST d4: on a public address they are off unless they are asked for."""
    for flags, status in ((), 404), (("--seed-routes",), 200):
        words = [
            BINARY,
            "serve",
            "--data",
            tmp_path / "data",
            "--listen",
            "0.0.0.0:0",
            "--insecure",
            "--no-require-token",
            "--json",
            *flags,
        ]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout
                url = json.loads(process.stdout.readline())["listening"]
                served = Served(process, tmp_path / "data", url, tmp_path / "log")
                assert served.get(STATUS + "?collection_name=x").status == status
            finally:
                process.terminate()
