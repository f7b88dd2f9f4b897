"""Who may do what over HTTP: tokens, scopes, tenants; a foreign thing is like one that never was."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from corpus_good import noise
from serving import BINARY, Answer, Bundle, Served, Writer, serving, until

from deltasync.core import frames
from deltasync.core.hashing import digest_of
from deltasync.core.manifest import EMPTY_ROOT
from deltasync.core.names import bytes_text

API = "/api/v1"
NOBODY = "dst_" + "0" * 12 + "_" + "0" * 64
ABSENT = "a" * 64
JOB = "ds_0_00000000"
UPLOAD = "00000000-0000-4000-8000-000000000000"
ROUTES = (
    ("GET", "/health", 200),
    ("GET", "/metrics", 200),
    ("GET", "/openapi.json", 200),
    ("GET", "/docs", 200),
    ("GET", f"{API}/workspaces", 200),
    ("GET", f"{API}/workspaces/w", 200),
    ("GET", f"{API}/workspaces/w/tree/{ABSENT}", 404),
    ("GET", f"{API}/workspaces/w/recipes/{ABSENT}", 404),
    ("GET", f"{API}/workspaces/w/sequences", 200),
    ("GET", f"{API}/workspaces/w/sequences/1", 410),
    ("PUT", f"{API}/workspaces/w/sequences/1/pin", 410),
    ("DELETE", f"{API}/workspaces/w/sequences/1/pin", 200),
    ("POST", f"{API}/workspaces/w/missing", 400),
    ("POST", f"{API}/workspaces/w/sizes", 400),
    ("POST", f"{API}/workspaces/w/bundles", 400),
    ("POST", f"{API}/workspaces/w/blobs", 400),
    ("POST", f"{API}/workspaces/w/trees", 400),
    ("GET", f"{API}/blobs/{ABSENT}", 404),
    ("POST", f"{API}/uploads/initiate", 400),
    ("GET", f"{API}/uploads/{UPLOAD}", 404),
    ("GET", f"{API}/uploads/{UPLOAD}/chunks", 404),
    ("PUT", f"{API}/uploads/{UPLOAD}/chunk/0", 404),
    ("POST", f"{API}/uploads/{UPLOAD}/complete", 404),
    ("DELETE", f"{API}/uploads/{UPLOAD}", 404),
    ("POST", f"{API}/files/deletions", 400),
    ("DELETE", f"{API}/files/{ABSENT}", 400),
    ("POST", f"{API}/delta/upload", 415),
    ("GET", f"{API}/delta/status?collection_name=w", 200),
    ("POST", f"{API}/jobs", 415),
    ("GET", f"{API}/jobs", 200),
    ("GET", f"{API}/jobs/{JOB}", 404),
    ("GET", f"{API}/jobs/{JOB}/logs", 404),
    ("POST", f"{API}/jobs/{JOB}/acknowledge", 404),
    ("GET", f"{API}/jobs/{JOB}/outputs", 404),
    ("DELETE", f"{API}/jobs/{JOB}", 404),
    ("GET", f"{API}/capabilities", 200),
    ("POST", f"{API}/token/rotate", 400),
    ("DELETE", f"{API}/token", 200),
    ("POST", "/api/uploads/initiate", 400),
    ("GET", f"/api/uploads/{UPLOAD}", 404),
    ("DELETE", f"/api/files/{ABSENT}", 400),
)
"""Every route with what it answers to a caller who may use it."""
JOBS = f"{API}/jobs"
LOOKS = tuple(f"{API}/workspaces/w/{each}" for each in ("missing", "blobs", "trees"))


def command(data: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BINARY, "token", *words, "--data", data, "--json"], capture_output=True, text=True, check=False, timeout=60
    )


def token(data: Path, *words: str) -> dict[str, Any]:
    made = command(data, "create", *words)
    assert made.returncode == 0, made.stderr
    found: dict[str, Any] = json.loads(made.stdout)
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served") / "data", "--require-token") as served:
        yield served


@pytest.fixture(scope="module")
def alice(server: Served) -> Served:
    return server.showing(token(server.data, "--tenant", "alice")["token"])


@pytest.fixture(scope="module")
def bob(server: Served) -> Served:
    return server.showing(token(server.data, "--tenant", "bob")["token"])


@pytest.fixture(scope="module")
def unasked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server that needs no token, and one that it knows."""
    with serving(tmp_path_factory.mktemp("unasked") / "data") as served:
        yield served.showing(token(served.data)["token"])


@pytest.fixture(scope="module")
def admin(server: Served) -> Served:
    return server.showing(token(server.data, "--scope", "push run admin")["token"])


@pytest.fixture(scope="module")
def scoped(server: Served) -> dict[str, Served]:
    """A caller with each scope alone."""
    return {scope: server.showing(token(server.data, "--scope", scope)["token"]) for scope in ("read", "run", "push")}


@pytest.fixture(scope="module")
def wrong(server: Served) -> list[str]:
    """What must never let anybody in: nothing, what never was, a part, too much, what is over and what was ended."""
    good, expired, revoked = token(server.data)["token"], token(server.data, "--expires", "0s"), token(server.data)
    assert command(server.data, "revoke", revoked["id"]).returncode == 0
    return ["", NOBODY, good[:-1], good + "0", expired["token"], revoked["token"]]


def refused(answer: Answer, status: int, code: str) -> None:
    assert (answer.status, answer.json["code"]) == (status, code), answer


def asked(server: Served, method: str, path: str) -> Answer:
    return server.request(method, path, b"{}" if method in ("POST", "PUT") else None)


@pytest.mark.parametrize(("method", "path", "status"), ROUTES)
def test_every_route_asks_for_a_token(
    server: Served, admin: Served, wrong: list[str], method: str, path: str, status: int
) -> None:
    """R1, R2, R7 to R9: none, a wrong one, a part of one, an expired one and a revoked one are 401 on every route."""
    for each in wrong:
        answer = asked(server.showing(each), method, path)
        if answer.status != 429:  # others have failed before
            refused(answer, 401, "UNAUTHORIZED")
            assert answer.headers["www-authenticate"] == "Bearer"
    good = token(server.data)["token"] if path.endswith("/token") else admin.token  # that route ends what it is shown
    assert asked(server.showing(good), method, path).status == status


def test_the_table_has_every_route(admin: Served) -> None:
    """A route that is added must be added to the table above as well; only a code is tried without a token."""
    paths = admin.get("/openapi.json").json["paths"]
    known = {(path, method.upper()) for path, methods in paths.items() for method in methods}
    patterns = {
        ABSENT: "{digest}",
        UPLOAD: "{upload_id}",
        JOB: "{job}",
        "/w/tree/{digest}": "/w/tree/{root}",
        "/sequences/1": "/sequences/{sequence}",
        "/chunk/0": "/chunk/{number}",
        "/workspaces/w": "/workspaces/{workspace}",
    }
    told = set()
    for method, path, _ in ROUTES:
        path = path.partition("?")[0]
        for words, pattern in patterns.items():
            path = path.replace(words, pattern)
        told.add((path, method))
    without = {(f"{API}/pairings/{{number}}{rest}", "POST") for rest in ("", "/confirm")}
    assert {each for each in told if not each[0].startswith(("/api/uploads", "/api/files"))} == known - without


@pytest.mark.parametrize(("method", "path", "status"), [each for each in ROUTES if "/token" not in each[1]])
def test_a_narrower_token_is_403(scoped: dict[str, Served], method: str, path: str, status: int) -> None:
    """`read` only looks, `run` has jobs and nothing else, and the figures of the whole server are for `admin`."""
    is_job = path.startswith(JOBS)
    is_look = method == "GET" or path in LOOKS
    for scope, may in (("run", is_job), ("read", is_look and not is_job), ("push", not is_job)):
        caller = scoped[scope]
        answer = asked(caller, method, path)
        if may and path != "/metrics":
            assert answer.status == status
        else:
            refused(answer, 403, "FORBIDDEN")


def test_tokens_come_in_one_header_and_nowhere_else(server: Served) -> None:
    """R4 to R6: a token in the query is none; two headers are 400; another scheme is 401."""
    good = token(server.data)["token"]
    unshown = server.get(f"{API}/workspaces?token={good}&access_token={good}")
    assert unshown.status in (401, 429)
    twice = f"GET {API}/workspaces HTTP/1.1\r\nHost: x\r\n" + f"Authorization: Bearer {good}\r\n" * 2 + "\r\n"
    assert server.raw(twice.encode())[0].startswith(b"HTTP/1.1 400 ")
    for value in (f"Basic {good}", "Bearer", "Bearer ", f"Bearer  {good} x", f"Bearer {good},{good}"):
        assert server.get(f"{API}/workspaces", {"Authorization": value}).status in (401, 429)
    assert server.get(f"{API}/workspaces", {"Authorization": f"bearer {good}"}).status == 200


def test_a_source_that_guesses_is_told_to_wait_and_the_owner_is_not(tmp_path: Path) -> None:
    """Wrong tokens are 401, after too many 429 with Retry-After; from the same place a right one still passes."""
    with serving(tmp_path / "data", "--require-token") as served:
        good = served.showing(token(served.data)["token"])
        answers = [served.showing(NOBODY).get("/health") for _ in range(40)]
        assert [each.status for each in answers[:20]] == [401] * 20
        assert {each.status for each in answers[20:]} == {429}
        assert 0 < int(answers[-1].headers["retry-after"]) <= 60
        assert good.get("/health").status == 200


def test_without_the_option_loopback_needs_no_token_and_a_wrong_one_is_refused_all_the_same(tmp_path: Path) -> None:
    """Whoever shows a token is judged by it; the default tenant has the workspaces that need none."""
    with serving(tmp_path / "data") as served:
        assert served.get("/metrics").status == 200
        refused(served.showing(NOBODY).get("/health"), 401, "UNAUTHORIZED")
        eve = served.showing(token(served.data, "--tenant", "eve")["token"])
        assert served.send("w", Writer("w").file()).status == 200
        assert served.get(f"{API}/workspaces/w").json["sequence"] == 1
        assert eve.get(f"{API}/workspaces/w").json["sequence"] == 0


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("127.0.0.1:{port}", 200),
        ("[::1]:{port}", 200),
        ("evil.example", 403),
        ("evil.example:{port}", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example", 403),
        ("0.0.0.0:{port}", 403),
        ("[::]:{port}", 403),
        ("user@localhost", 200),
        ("localhost@evil.example", 403),
        ("[", 403),
        ("", 403),
    ],
)
def test_a_page_whose_name_leads_here_reads_nothing(unasked: Served, host: str, status: int) -> None:
    """R61 to R66, DNS rebinding: without a token the server answers to loopback's own names alone."""
    line = f"GET {API}/workspaces HTTP/1.1\r\nHost: {host.format(port=unasked.port)}\r\n\r\n"
    assert unasked.raw(line.encode())[0].startswith(f"HTTP/1.1 {status} ".encode())
    line = line.replace("\r\n\r\n", f"\r\nAuthorization: Bearer {unasked.token}\r\n\r\n")
    assert unasked.raw(line.encode())[0].startswith(b"HTTP/1.1 200 ")  # who shows one is asked for no name


def test_each_tenant_has_its_own_workspaces(alice: Served, bob: Served) -> None:
    """R3: the same name twice is two workspaces, in two folders, and nobody's list has the other's."""
    assert alice.send("shared", Writer("shared").file("a.txt", b"of alice"), "?wait=20").status == 200
    assert bob.send("shared", Writer("shared").file("b.txt", b"of bob"), "?wait=20").status == 200
    places = []
    for caller, content in ((alice, {"a.txt": b"of alice"}), (bob, {"b.txt": b"of bob"})):
        state = caller.get(f"{API}/workspaces/shared").json
        assert (state["workspace"], state["sequence"]) == ("shared", 1)
        assert [each["workspace"] for each in caller.get(f"{API}/workspaces").json["workspaces"]] == ["shared"]
        assert caller.get("/health").json["workspaces"] == 1
        places.append(Path(state["tree_path"]))
        assert {path.name: path.read_bytes() for path in places[-1].iterdir()} == content
    assert places[0] != places[1]
    for name in ("alice/shared", "alice%2Fshared", "..%2Falice"):
        assert bob.get(f"{API}/workspaces/{name}").status in (400, 404)


def sent(caller: Served, name: str, content: bytes) -> Bundle:
    made = Writer(name).file("secret", content)
    assert caller.send(name, made, "?wait=20").status == 200
    return made


def test_a_foreign_blob_is_like_one_that_never_was(alice: Served, bob: Served) -> None:
    """T1: its digest gives neither its bytes nor the news that somebody has them, by any route."""
    content = noise("secret", 300_000)
    made = sent(alice, "mine", content)
    known, random = digest_of(content).hex(), digest_of(b"nobody has this").hex()
    assert alice.get(f"{API}/blobs/{known}").body == content

    def answers(path: str, body: bytes | None = None) -> list[tuple[int, bytes]]:
        found = []
        for digest in (known, random):
            words = (path.replace("DIGEST", digest), body and body.replace(b"DIGEST", digest.encode()))
            answer = bob.request("POST" if body else "GET", *words)
            found.append((answer.status, answer.body.replace(digest.encode(), b"DIGEST")))
        return found

    digests = b'{"digests": ["DIGEST"]}'
    for found in (
        answers(f"{API}/blobs/DIGEST"),
        answers(f"{API}/workspaces/w/recipes/DIGEST"),
        answers(f"{API}/workspaces/w/missing", digests),
        answers(f"{API}/workspaces/w/blobs", digests),
    ):
        assert found[0] == found[1]
    assert bob.request("POST", f"{API}/workspaces/w/blobs", digests.replace(b"DIGEST", known.encode())).body == (
        frames.head(None)
    )
    assert sent(bob, "own", b"so that bob has a workspace").root != EMPTY_ROOT.hex()
    root = made.root
    assert alice.get(f"{API}/workspaces/mine/tree/{root}").status == 200
    assert bob.get(f"{API}/workspaces/own/tree/{root}").status == 404
    trees = bob.request("POST", f"{API}/workspaces/own/trees", json.dumps({"digests": [root]}).encode())
    assert trees.body == frames.head(None)


def test_a_digest_alone_claims_nothing(alice: Served, bob: Served) -> None:
    """claim-hash-without-bytes: a bundle that names foreign content lacks it, unless it brings the bytes."""
    content = noise("claimed", 200_000)
    sent(alice, "claimed", content)
    made = Writer("theirs").file("secret", content)
    thin = Bundle(made.metadata, thin_of(made))
    answer = bob.send("theirs", thin)
    refused(answer, 409, "CONTENT_MISSING")
    assert answer.json["facts"]["missing"] == [digest_of(content).hex()]
    assert bob.send("theirs", made, "?wait=20").status == 200
    assert bob.get(f"{API}/blobs/{digest_of(content).hex()}").body == content
    assert bob.send("theirs2", Bundle(*renamed(content))).status == 200


def thin_of(made: Bundle) -> bytes:
    from deltasync.core import bundle

    return b"".join(bundle.seal(made.metadata, [], lambda _: iter(())))


def renamed(content: bytes) -> tuple[Any, bytes]:
    made = Writer("theirs2").file("again", content)
    return made.metadata, thin_of(made)


def begun(caller: Served, made: Bundle) -> str:
    words = {"kind": "bundle", "workspace": "up", "identity": made.identity}
    answer = caller.request("POST", f"{API}/uploads/initiate", json.dumps(words).encode())
    assert answer.status == 200
    found: str = answer.json["upload_id"]
    return found


def test_an_upload_belongs_to_its_tenant(alice: Served, bob: Served) -> None:
    """A foreign upload is 404 in the words for one that never was, and `resume` finds only one's own."""
    made = Writer("up").large(100_000)
    upload = begun(alice, made)
    for method, rest in (("GET", ""), ("GET", "/chunks"), ("PUT", "/chunk/0"), ("POST", "/complete"), ("DELETE", "")):
        theirs = asked(bob, method, f"{API}/uploads/{upload}{rest}")
        never = asked(bob, method, f"{API}/uploads/{UPLOAD}{rest}")
        assert (theirs.status, theirs.body.replace(upload.encode(), UPLOAD.encode())) == (404, never.body)
    words = {"kind": "bundle", "workspace": "up", "identity": made.identity, "resume": True}
    resumed = [
        caller.request("POST", f"{API}/uploads/initiate", json.dumps(words).encode()).json["upload_id"]
        for caller in (alice, bob)
    ]
    assert resumed[0] == upload != resumed[1]
    assert alice.request("PUT", f"{API}/uploads/{upload}/chunk/0", made.sealed).status == 200
    told = json.dumps({"total_chunks": 1, "file_size": len(made.sealed)}).encode()
    assert alice.request("POST", f"{API}/uploads/{upload}/complete", told).json["workspace"] == "up"


def test_a_token_that_is_revoked_during_an_upload_commits_nothing(server: Served) -> None:
    """R9: the pieces came while it was good; at the commit it is not."""
    made = token(server.data, "--tenant", "carol")
    carol = server.showing(made["token"])
    bundle = Writer("up").large(50_000)
    upload = begun(carol, bundle)
    assert carol.request("PUT", f"{API}/uploads/{upload}/chunk/0", bundle.sealed).status == 200

    def body() -> Iterator[bytes]:  # the request is let in before, and its body ends after the token was revoked
        yield b'{"total_chunks": 1, '
        assert command(server.data, "revoke", made["id"]).returncode == 0
        yield b'"file_size": %d}' % len(bundle.sealed)

    answer = carol.request("POST", f"{API}/uploads/{upload}/complete", body())
    refused(answer, 401, "UNAUTHORIZED")
    again = server.showing(token(server.data, "--tenant", "carol")["token"])
    assert again.get(f"{API}/workspaces/up").json["sequence"] == 0
    told = json.dumps({"total_chunks": 1, "file_size": len(bundle.sealed)}).encode()
    assert again.request("POST", f"{API}/uploads/{upload}/complete", told).json["sequence"] == 1


def test_a_token_that_is_revoked_while_it_reads_gets_no_further_piece(server: Served) -> None:
    """H-104: the stream breaks off, so that nobody takes what came for whole."""
    content = os.urandom(1 << 20) * 24
    digest = digest_of(content).hex()
    sent(server.showing(token(server.data, "--tenant", "reader")["token"]), "long", content)
    asked = {"GET": f"{API}/blobs/{digest}", "POST": f"{API}/workspaces/long/blobs"}
    for method, path in asked.items():
        made = token(server.data, "--tenant", "reader")
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)) as connection:
            body = json.dumps({"digests": [digest]}) if method == "POST" else None
            connection.request(method, path, body, {"Authorization": f"Bearer {made['token']}"})
            answer = connection.getresponse()
            assert answer.status == 200 and answer.read(1024)
            assert command(server.data, "revoke", made["id"]).returncode == 0
            with pytest.raises(http.client.IncompleteRead):
                answer.read()


def test_one_tenants_uploads_leave_room_for_the_others(tmp_path: Path) -> None:
    """T1: as many silent uploads as the server takes at once, all of one tenant, keep nobody else waiting."""
    with (
        serving(tmp_path / "data", "--require-token", environment={"DELTASYNC_SERVER_UPLOADS": "4"}) as served,
        contextlib.ExitStack() as held,
    ):
        eve, ada = (served.showing(token(served.data, "--tenant", name)["token"]) for name in ("eve", "ada"))
        root = served.showing(token(served.data, "--scope", "admin")["token"])
        made = Writer("w").large(1_000_000)
        for number in range(6):
            connection = held.enter_context(served.connect())
            head = f"POST {API}/workspaces/w{number}/bundles HTTP/1.1\r\nHost: [::1]\r\nContent-Length: 900000\r\n"
            head += f"Authorization: Bearer {eve.token}\r\nDeltasync-Identity: {made.identity}\r\n\r\n"
            connection.sendall(head.encode() + made.sealed[:1000])
        until(lambda: b"deltasync_bundles_arriving 6" in root.get("/metrics").body)
        answer = ada.send("w", made)
        assert (answer.status, answer.json["sequence"]) == (200, 1)


def test_files_are_deleted_only_by_their_tenant(alice: Served, bob: Served) -> None:
    """S9: neither the digest nor host and path reach another tenant's file."""
    content = noise("file", 1000)
    digest = digest_of(content).hex()
    words = {"filepath": "/f", "hostname": "h", "blake3": digest, "file_size": len(content)}
    upload = alice.request("POST", f"{API}/uploads/initiate", json.dumps(words).encode()).json["upload_id"]
    assert alice.request("PUT", f"{API}/uploads/{upload}/chunk/0", content).status == 200
    assert alice.request("POST", f"{API}/uploads/{upload}/complete", b"{}").status == 200
    named = json.dumps({"filepath": "/f", "hostname": "h"}).encode()
    assert bob.request("DELETE", f"{API}/files/{digest}", named).status == 404
    assert bob.get(f"{API}/blobs/{digest}").status == 404
    assert alice.request("DELETE", f"{API}/files/{digest}", named).status == 200


def test_nobody_waits_for_who_writes_the_tokens(tmp_path: Path) -> None:
    """A lock on access.db, or a slow disk below it, holds up whoever changes tokens, and no other request."""
    with serving(tmp_path / "data", "--require-token") as served:
        first, second = (served.showing(token(served.data)["token"]) for _ in range(2))
        with contextlib.closing(sqlite3.connect(served.data / "access.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with served.connect() as connection:  # it waits for the lock
                line = f"DELETE {API}/token HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {first.token}\r\n\r\n"
                connection.sendall(line.encode())
                assert first.get("/health").status == 200  # it has been read, and waits in its thread
                began = time.monotonic()
                assert [second.get("/health").status for _ in range(20)] == [200] * 20
                assert time.monotonic() - began < 5
                other.execute("ROLLBACK")
                assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
        assert first.get("/health").status == 401


def test_free_space_is_told_coarsely(server: Served, admin: Served, alice: Served) -> None:
    """To the byte it would say whether somebody else had a content before; the operator may know."""
    exact, told = (each.get("/health").json["disk_free_bytes"] for each in (admin, alice))
    assert told % (1 << 30) == 0 and abs(exact - told) < 3 << 30


def test_a_refusal_tells_free_space_coarsely(tmp_path: Path) -> None:
    """Facts and sentence have whole GiB for who has no `admin`; the operator knows to the byte."""
    settings = tmp_path / "server.toml"
    settings.write_text(f"[limits]\nbundle_bytes = {1 << 62}\nupload_piece_bytes = {1 << 40}\n")
    with serving(tmp_path / "data", "--require-token", "--config", str(settings)) as served:
        sizes = {"file_size": 1 << 60, "chunk_size": 1 << 40}
        asked = {"kind": "file", "hostname": "h", "filepath": "/f", "blake3": "0" * 64, **sizes}
        for scope, is_exact in (("push", False), ("push admin", True)):
            caller = served.showing(token(served.data, "--scope", scope)["token"])
            while (
                answer := caller.request("POST", f"{API}/uploads/initiate", json.dumps(asked).encode())
            ).status == 503:
                pass  # until it is known that nothing can make way
            refused(answer, 507, "NO_SPACE")
            free_bytes, sentence = answer.json["facts"]["free_bytes"], answer.json["detail"]
            assert (free_bytes % (1 << 30) != 0) is is_exact
            said = bytes_text(free_bytes) if free_bytes else "less than 1.0 GiB"
            assert f"{said} free" in sentence


def test_no_secret_is_written_down(server: Served, alice: Served) -> None:
    """Neither the store nor the log has a token; the database is for its owner only."""
    secret = alice.token.rpartition("_")[2]
    written = [path for path in server.data.rglob("*") if path.is_file() and "workspaces" not in path.parts]
    for path in (*written, server.log):
        content = path.read_bytes()
        assert secret.encode() not in content and bytes.fromhex(secret) not in content
    assert {path.stat().st_mode & 0o777 for path in server.data.glob("*.db*")} == {0o600}


def test_no_log_has_a_token(tmp_path: Path) -> None:
    """With every request logged, and a traceback, neither log nor store has a token, wherever it was shown."""
    data = tmp_path / "data"
    with serving(data, "--access-log", "-v", "--require-token") as server:
        made = token(data)["token"]
        mine, wrong = server.showing(made), f"{made[:-4]}0000"
        assert mine.get("/health").status == 200
        assert server.showing(wrong).get("/health").status == 401
        assert server.get(f"/health?token={made}").status == 401
        assert mine.get(f"{API}/workspaces/{made}?authorization=Bearer%20{made}").status == 200
        assert mine.get(f"/{made}").status == 404
        shutil.rmtree(data / "staging", ignore_errors=True)
        (data / "staging").touch()
        form = b'--b\r\nContent-Disposition: form-data; name="bundle"; filename="x"\r\n\r\nx\r\n--b--\r\n'
        asked = {"Content-Type": "multipart/form-data; boundary=b"}
        assert mine.request("POST", f"{API}/delta/upload", form, asked).status == 500
        server.stop()
    log = server.log.read_text()
    assert log.count("GET /health") == 3 and "Traceback" in log
    written = b"".join(path.read_bytes() for path in (server.log, *data.rglob("*")) if path.is_file())
    assert [each for each in (made, wrong) if each.rpartition("_")[2].encode() in written] == []


def test_tokens_are_listed_without_their_secrets(tmp_path: Path) -> None:
    """`token ls` shows whose each is and whether it is good; `revoke` names what it cannot find."""
    made = [
        token(tmp_path / "data", "--label", "laptop", "--expires", "30d"),
        token(tmp_path / "data", "--tenant", "x"),
    ]
    assert command(tmp_path / "data", "revoke", made[1]["id"]).returncode == 0
    listed = command(tmp_path / "data", "ls")
    assert all(each["token"] not in listed.stdout for each in made)
    rows = {each["id"]: each for each in json.loads(listed.stdout)["tokens"]}
    first, second = (rows[each["id"]] for each in made)
    assert (first["state"], first["tenant"], first["scopes"], first["label"]) == ("good", "default", "push", "laptop")
    assert first["expires_at"] > first["created_at"]
    assert (second["state"], second["tenant"]) == ("revoked", "x")
    assert command(tmp_path / "data", "revoke", "nothing").returncode == 1
    assert command(tmp_path / "data", "create", "--scope", "all").returncode == 2
    assert command(tmp_path / "data", "create", "--tenant", "a/b").returncode == 2
    assert command(tmp_path / "nowhere", "ls").returncode == 1
