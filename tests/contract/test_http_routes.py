"""What each route answers, against a real server over real sockets."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import folders
import pytest
from corpus_good import Life, noise
from serving import SECONDS, Answer, Served, Writer, received, serving, until

from deltasync.core import bundle, frames
from deltasync.core.bundle import BundleReader
from deltasync.core.errors import DeltasyncError
from deltasync.core.hashing import digest_of
from deltasync.core.manifest import EMPTY_BODY, EMPTY_ROOT, parse_directory
from deltasync.core.wire import LARGE_BYTES, Limits

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
REFUSED = json.loads((BUNDLES / "refused/index.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served") / "data") as served:
        yield served


def state(server: Served, name: str) -> dict[str, object]:
    answer = server.get(f"/api/v1/workspaces/{name}")
    assert answer.status == 200
    found: dict[str, object] = answer.json
    return found


def problem(answer: Answer, status: int, code: str) -> dict[str, object]:
    assert (answer.status, answer.json["code"], answer.json["status"]) == (status, code, status), answer
    facts: dict[str, object] = answer.json["facts"]
    return facts


def test_a_workspace_that_was_never_written_stands_at_the_beginning(server: Served) -> None:
    """Its state is the empty tree's: nobody need ask whether it exists."""
    assert state(server, "new") == {
        "workspace": "new",
        "client_id": "",
        "epoch": "",
        "sequence": 0,
        "root": EMPTY_ROOT.hex(),
        "tree_path": str(server.data / "workspaces/new/tree"),
        "tree_sequence": 0,
        "files": 0,
        "content_bytes": 0,
        "last_applied_at": None,
        "last_bundle_id": None,
        "lag": 0,
        "wanted": [],
        "limits": {name: getattr(Limits(), name) for name in Limits.__struct_fields__},
        "features": ["parts", "recipes"],
        "usage": None,
    }


def test_a_bundle_is_applied_once_and_its_receipt_comes_again(server: Served) -> None:
    """The receipt names the new head; the tree is there when `wait` asked for it; a repeat gets the same receipt."""
    made = Writer("once").file("folder.txt", b"content\n")
    first = server.send("once", made, "?wait=20")
    assert first.status == 200, first
    receipt = first.json
    assert (receipt["sequence"], receipt["root"], receipt["created"]) == (1, made.root, 1)
    assert receipt["identity"] == made.identity and receipt["content_bytes"] == 8
    assert receipt["tree_sequence"] == 1 and not receipt["duplicate"]
    assert (server.data / "workspaces/once/tree/folder.txt").read_bytes() == b"content\n"
    again = server.send("once", made).json
    assert again == {**receipt, "duplicate": True, "wanted": None}
    found = state(server, "once")
    assert (found["sequence"], found["root"], found["files"], found["lag"]) == (1, made.root, 1, 0)
    assert found["last_bundle_id"] == receipt["bundle_id"] and found["client_id"] == "a" * 32


def test_the_state_of_a_workspace_travels_in_less_than_a_kibibyte(server: Served) -> None:
    """A push without a change costs one question, and its answer with all headers is small."""
    server.send("small", Writer("small").file())
    answered, _ = server.raw(b"GET /api/v1/workspaces/small HTTP/1.1\r\nHost: [::1]\r\n\r\n")
    assert len(answered) < 1024


def test_bundles_out_of_turn_are_refused_with_what_is_expected(server: Served) -> None:
    """Gap, fork, another client and a foreign identity have their own codes, and none of them moves the head."""
    writer, other = Writer("turns"), Writer("turns", client_id="b" * 32, epoch="2" * 32)
    first = writer.file()
    assert problem(server.send("turns", writer.file("b", b"b")), 409, "SEQUENCE_GAP")["expected_sequence"] == 1
    assert server.send("turns", first).status == 200
    problem(server.send("turns", Writer("turns").file("c", b"c")), 409, "SEQUENCE_FORK")
    theirs = other.file("d", b"d")
    problem(server.send("turns", theirs), 409, "NOT_OWNER")
    path, header = "/api/v1/workspaces/turns/bundles", {"Deltasync-Identity": first.identity}
    problem(server.request("POST", path, theirs.sealed, header), 422, "BUNDLE_REFUSED")
    assert state(server, "turns")["sequence"] == 1


def test_a_workspace_is_taken_over_only_when_asked_for(server: Served) -> None:
    """`take_over=true` gives the workspace to another client; the former one is then told so."""
    former = Writer("taken")
    server.send("taken", former.file())
    heir = Writer("taken", client_id="c" * 32, epoch="3" * 32, sequence=1, root=former.root, life=former.life)
    made = heir.file("e", b"e")
    problem(server.send("taken", made), 409, "NOT_OWNER")
    assert server.send("taken", made, "?take_over=true").status == 200
    late = former.file("f", b"f")
    problem(server.send("taken", late), 409, "NOT_OWNER")
    assert state(server, "taken")["client_id"] == "c" * 32


def test_a_thin_bundle_without_its_content_names_what_is_missing(server: Served) -> None:
    """The answer lists the digests to send; the same bundle with them is applied."""
    made = Writer("thin").file("a", noise("thin", 5000))
    digest = made.metadata.operations[0].digest
    thin = Writer("thin").seal(lambda life: life.file("a", noise("thin", 5000)))
    assert thin.identity == made.identity
    empty = b"".join(bundle.seal(made.metadata, (), lambda _: ()))
    answer = server.request("POST", "/api/v1/workspaces/thin/bundles", empty, {"Deltasync-Identity": made.identity})
    assert problem(answer, 409, "CONTENT_MISSING")["missing"] == [digest]
    assert server.send("thin", made).status == 200


def test_the_same_bundle_twice_in_parallel_is_applied_once(server: Served) -> None:
    """R43: of parallel repeats one is applied, and all get the same receipt."""
    made = Writer("parallel").large(500_000)
    answers: list[Answer] = []
    threads = [threading.Thread(target=lambda: answers.append(server.send("parallel", made))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert [answer.status for answer in answers] == [200] * 6
    assert sorted(answer.json["duplicate"] for answer in answers) == [False] + [True] * 5
    assert len({(answer.json["applied_at"], answer.json["root"]) for answer in answers}) == 1


@pytest.mark.parametrize(
    ("second", "code"),
    [({}, "SEQUENCE_FORK"), ({"epoch": "2" * 32}, "SEQUENCE_FORK"), ({"client_id": "b" * 32}, "NOT_OWNER")],
    ids=["of-one-history", "of-two-epochs", "of-two-clients"],
)
def test_of_two_bundles_of_one_number_at_once_one_is_applied(
    server: Served, second: dict[str, str], code: str, request: pytest.FixtureRequest
) -> None:
    """Both are as good as the other until one is committed; the other is told with 409, and nothing of it stays."""
    name = f"race-{request.node.callspec.id}"
    contents = [noise(f"{name}{number}", 300_000) for number in range(2)]
    made = [Writer(name).file("a", contents[0]), Writer(name, **second).file("a", contents[1])]
    before, answers = {*(server.data / "journal").iterdir()}, dict[int, bytes]()

    def finish(number: int) -> None:
        connections[number].sendall(made[number].sealed[-1000:])
        answers[number] = received(connections[number])[0]

    connections = [server.connect() for _ in made]
    for connection, each in zip(connections, made, strict=True):
        head = (
            f"POST /api/v1/workspaces/{name}/bundles HTTP/1.1\r\nHost: [::1]\r\nDeltasync-Identity: {each.identity}\r\n"
        )
        connection.sendall(f"{head}Content-Length: {len(each.sealed)}\r\n\r\n".encode() + each.sealed[:-1000])
    until(lambda: sum(path.stat().st_size > 250_000 for path in {*(server.data / "journal").iterdir()} - before) == 2)
    threads = [threading.Thread(target=finish, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    for connection in connections:
        connection.close()
    winner = next(number for number in range(2) if answers[number].startswith(b"HTTP/1.1 200 "))
    refused = answers[1 - winner]
    assert refused.startswith(b"HTTP/1.1 409 ")
    assert json.loads(refused.partition(b"\r\n\r\n")[2])["code"] == code
    found = state(server, name)
    assert (found["sequence"], found["root"]) == (1, made[winner].root)
    statuses = [server.get(f"/api/v1/blobs/{digest_of(content).hex()}").status for content in contents]
    assert statuses[winner] == 200 and statuses[1 - winner] == 404


def test_a_chunked_body_is_taken_as_well(server: Served) -> None:
    """A body without a known length arrives in chunks of any size."""
    made = Writer("chunked").large(300_000)
    pieces = (made.sealed[at : at + 7001] for at in range(0, len(made.sealed), 7001))
    headers = {"Deltasync-Identity": made.identity}
    assert server.request("POST", "/api/v1/workspaces/chunked/bundles", pieces, headers).status == 200


def test_a_client_that_waits_for_leave_gets_it(server: Served) -> None:
    """`Expect: 100-continue` is answered when the body is wanted, and not when the request is refused."""
    made = Writer("expect").file()
    head = f"POST /api/v1/workspaces/expect/bundles HTTP/1.1\r\nHost: [::1]\r\nContent-Length: {len(made.sealed)}\r\n"
    head += "Expect: 100-continue\r\n"
    with server.connect() as connection:
        connection.sendall(f"{head}Deltasync-Identity: {made.identity}\r\n\r\n".encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 100 ")
        connection.sendall(made.sealed)
        assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
    with server.connect() as connection:
        connection.sendall(f"{head}\r\n".encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 400 ")


def test_a_long_poll_is_answered_when_the_tree_is_there(server: Served) -> None:
    """It waits as long as the tree is behind, and no longer; its time is bounded."""
    began = time.monotonic()
    assert state(server, "polled?tree_sequence=1&wait=0.6")["tree_sequence"] == 0
    assert 0.5 < time.monotonic() - began < 3
    found: list[dict[str, object]] = []
    waiting = threading.Thread(target=lambda: found.append(state(server, "polled?tree_sequence=1&wait=20")))
    waiting.start()
    server.send("polled", Writer("polled").file())
    waiting.join(10)
    assert found and found[0]["tree_sequence"] == 1
    began = time.monotonic()
    assert state(server, "polled?tree_sequence=1&wait=20")["sequence"] == 1
    assert time.monotonic() - began < 2


def test_missing_says_which_content_must_be_sent(server: Served) -> None:
    """Known digests are leased, the others come back in the order asked; none at all is a fair question."""
    made = Writer("have").file("a", b"known\n")
    server.send("have", made)
    known = made.metadata.operations[0].digest
    asked = ["f" * 64, known, "0" * 64]
    answer = server.request("POST", "/api/v1/workspaces/have/missing", json.dumps({"digests": asked}).encode())
    assert answer.json == {"missing": ["f" * 64, "0" * 64], "leased_seconds": 3600}
    empty = server.request("POST", "/api/v1/workspaces/have/missing", b'{"digests":[]}')
    assert empty.json["missing"] == []


def test_sizes_says_of_which_sizes_there_may_be_content(server: Served) -> None:
    """A size that no content has is not named; small ones always are, in the order asked, and too many are refused."""
    path, large = "/api/v1/workspaces/sized/sizes", LARGE_BYTES + 5
    server.send("sized", Writer("sized").file("a", bytes(large)))
    asked = [large + 1, 7, large, 2**63 - 1, 7]
    assert server.request("POST", path, json.dumps({"sizes": asked}).encode()).json == {"held": [7, large, 7]}
    assert server.request("POST", path, b'{"sizes":[]}').json == {"held": []}
    for body in (b'{"sizes":[-1]}', b'{"sizes":["1"]}', b'{"sizes":[9223372036854775808]}', b'{"digests":[]}'):
        answer = server.request("POST", path, body)
        assert (answer.status, answer.json["code"]) == (400, "USAGE")
    answer = server.request("POST", path, json.dumps({"sizes": [7] * 65_537}).encode())
    assert (answer.status, answer.json["code"]) == (413, "LIMIT_EXCEEDED")


def test_the_tree_can_be_walked_by_its_digests(server: Served) -> None:
    """Each directory object comes as the bytes that have its digest; the empty tree is there for everyone."""
    writer = Writer("walked")

    def change(life: object) -> None:
        writer.life.directory("d")
        writer.life.file("d/a", b"a")

    made = writer.seal(change)
    server.send("walked", made)
    body = server.get(f"/api/v1/workspaces/walked/tree/{made.root}")
    assert body.headers["content-type"] == "application/octet-stream"
    (entry,) = parse_directory(body.body, bytes.fromhex(made.root))
    inner = server.get(f"/api/v1/workspaces/walked/tree/{entry.digest.hex()}")
    assert [each.name for each in parse_directory(inner.body, entry.digest)] == ["a"]
    assert server.get(f"/api/v1/workspaces/walked/tree/{EMPTY_ROOT.hex()}").body == EMPTY_BODY
    problem(server.get(f"/api/v1/workspaces/elsewhere/tree/{made.root}"), 404, "NOT_FOUND")


def test_the_kept_sequences_are_listed_oldest_first(server: Served) -> None:
    """Each has its root, so that an earlier tree can be fetched."""
    writer = Writer("kept")
    made = [writer.file(name, name.encode()) for name in "abc"]
    for each in made:
        assert server.send("kept", each).status == 200
    listed = server.get("/api/v1/workspaces/kept/sequences").json["sequences"]
    assert [(each["sequence"], each["root"]) for each in listed] == [(n + 1, each.root) for n, each in enumerate(made)]
    names = [each["workspace"] for each in server.get("/api/v1/workspaces").json["workspaces"]]
    assert "kept" in names and names == sorted(names)


def test_a_sequence_that_is_not_kept_is_gone_and_the_range_is_named(tmp_path: Path) -> None:
    """H-36: a kept one is answered with its root; older, later and unwritten ones are 410 with the range."""
    with serving(tmp_path / "data", "--keep-sequences", "2") as server:
        writer = Writer("gone")
        made = [writer.file(name, name.encode()) for name in "abcd"]
        for each in made:
            assert server.send("gone", each).status == 200
        path = "/api/v1/workspaces/gone/sequences"
        assert [server.get(f"{path}/{n}").json["root"] for n in (3, 4)] == [each.root for each in made[2:]]
        for number in (0, 1, 2, 5, 2**53):
            facts = problem(server.get(f"{path}/{number}"), 410, "SEQUENCE_GONE")
            assert facts == {"sequence": number, "first": 3, "last": 4}
        never = problem(server.get("/api/v1/workspaces/never/sequences/1"), 410, "SEQUENCE_GONE")
        assert never == {"sequence": 1, "first": None, "last": None}
        for text in ("-1", "x", "1.5", str(2**53 + 1)):
            problem(server.get(f"{path}/{text}"), 400, "USAGE")


def asked_for(server: Served, what: str, *digests: str) -> Answer:
    return server.request("POST", f"/api/v1/workspaces/{what}", json.dumps({"digests": digests}).encode())


def framed(stream: bytes) -> list[bytes | None]:
    """Split a stream into its contents."""
    found: list[bytes | None] = []
    while stream:
        size = frames.size_of(stream[: frames.HEAD_BYTES])
        end = frames.HEAD_BYTES + (size or 0)
        assert len(stream) >= end
        found.append(None if size is None else stream[frames.HEAD_BYTES : end])
        stream = stream[end:]
    return found


def test_many_blobs_come_in_one_stream(server: Served) -> None:
    """H-37, H-38: a frame for each in the order asked, as often as asked; what is not there is said to be absent."""
    contents = {"small": b"s", "empty": b"", "large": noise("many", 3_000_000)}
    writer = Writer("many")

    def change(life: Life) -> None:
        for name, content in contents.items():
            life.file(name, content)

    assert server.send("many", writer.seal(change)).status == 200
    small, empty, large = (digest_of(content).hex() for content in contents.values())
    answer = asked_for(server, "many/blobs", large, "0" * 64, small, empty, small)
    assert (answer.status, answer.headers["content-type"]) == (200, "application/octet-stream")
    assert framed(answer.body) == [contents["large"], None, b"s", b"", b"s"]
    assert asked_for(server, "many/blobs").body == b""


def test_many_directory_objects_come_in_one_stream(server: Served) -> None:
    """H-39: the bodies of directory objects, framed the same way; the empty directory is everyone's."""
    writer = Writer("manytrees")
    made = writer.file("d", b"a")
    assert server.send("manytrees", made).status == 200
    top, nothing, none = framed(asked_for(server, "manytrees/trees", made.root, EMPTY_ROOT.hex(), "0" * 64).body)
    assert top and [each.name for each in parse_directory(top, bytes.fromhex(made.root))] == ["d"]
    assert (nothing, none) == (EMPTY_BODY, None)
    problem(asked_for(server, "elsewhere/trees", made.root), 404, "NOT_FOUND")


@pytest.mark.parametrize("what", ["w/blobs", "w/trees"])
def test_a_request_for_content_is_strict_and_bounded(server: Served, what: str) -> None:
    """What is no digest, no such request, or too much, is refused before anything is sent."""
    server.send("w", Writer("w").file())
    problem(asked_for(server, what, "A" * 64), 400, "USAGE")
    problem(asked_for(server, what, *["0" * 64] * (Limits().missing_digests + 1)), 413, "LIMIT_EXCEEDED")
    path = f"/api/v1/workspaces/{what}"
    for body in (b"", b"[]", b'{"digests":[],"more":1}', b"\xff"):
        problem(server.request("POST", path, body), 400, "USAGE")
    problem(server.request("POST", "/api/v1/workspaces/.w/" + what[2:], b'{"digests":[]}'), 400, "USAGE")


def test_a_reader_that_leaves_a_stream_leaves_no_file_open(server: Served) -> None:
    """When the client goes away in the middle of a stream, the server closes the blob that it was sending."""
    made = Writer("leaving").large(40_000_000)
    assert server.send("leaving", made).status == 200
    body = json.dumps({"digests": [made.metadata.operations[0].digest] * 50}).encode()
    with server.connect() as connection:
        head = f"POST /api/v1/workspaces/leaving/blobs HTTP/1.1\r\nHost: [::1]\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        assert connection.recv(1 << 16)
    opened = Path(f"/proc/{server.process.pid}/fd")
    until(lambda: not any("/cache/" in str(each.readlink()) for each in opened.iterdir() if each.is_symlink()))


@pytest.fixture(scope="module", name="blob")
def sent_blob(server: Served) -> tuple[str, bytes]:
    content = noise("blob", 2_500_000)
    made = Writer("blobs").file("blob", content)
    assert server.send("blobs", made).status == 200
    digest = made.metadata.operations[0].digest
    assert digest
    return f"/api/v1/blobs/{digest}", content


def test_a_blob_comes_whole(server: Served, blob: tuple[str, bytes]) -> None:
    """Without a range, or with one in a unit that nobody knows, the whole blob is the answer."""
    path, content = blob
    for headers in ({}, {"Range": "lines=1-2"}):
        answer = server.get(path, headers)
        assert (answer.status, answer.body, answer.headers["accept-ranges"]) == (200, content, "bytes")


@pytest.mark.parametrize(
    ("text", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=10-19", 10, 20),
        ("bytes=2499999-", 2_499_999, 2_500_000),
        ("bytes=-5", 2_499_995, 2_500_000),
        ("bytes=-9999999", 0, 2_500_000),
        ("bytes=1000000-99999999", 1_000_000, 2_500_000),
        ("Bytes = 1-2".replace(" = ", "="), 1, 3),
    ],
)
def test_one_range_of_a_blob_can_be_asked_for(
    server: Served, blob: tuple[str, bytes], text: str, start: int, end: int
) -> None:
    """206 with the bytes and their place."""
    path, content = blob
    answer = server.get(path, {"Range": text})
    assert answer.status == 206 and answer.body == content[start:end]
    assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{len(content)}"


@pytest.mark.parametrize(
    "text",
    [
        "bytes=2500000-",
        "bytes=9-1",
        "bytes=-0",
        "bytes=-",
        "bytes=",
        "bytes=a-b",
        "bytes=0-1,3-4",
        "bytes=" + ",".join(["0-0"] * 10_000),
        "bytes=99999999999999999999999-",
    ],
    ids=lambda text: text[:20],
)
def test_a_range_that_is_not_there_or_not_one_is_refused(server: Served, blob: tuple[str, bytes], text: str) -> None:
    """R47, R48: 416 says how long the blob is."""
    path, content = blob
    answer = server.get(path, {"Range": text})
    assert answer.status == 416
    assert answer.headers["content-range"] == f"bytes */{len(content)}"


def test_an_empty_blob_is_served(server: Served) -> None:
    """No byte is an answer as well; no range of it exists."""
    made = Writer("empty").file("nothing", b"")
    server.send("empty", made)
    path = f"/api/v1/blobs/{made.metadata.operations[0].digest}"
    assert (server.get(path).status, server.get(path).body) == (200, b"")
    assert server.get(path, {"Range": "bytes=0-"}).status == 416


def test_health_metrics_description_and_page_are_there(server: Served) -> None:
    """Health has the disk's headroom, metrics are Prometheus', the page needs nothing from elsewhere."""
    health = server.get("/health").json
    assert health["status"] == "ok" and 0 < health["disk_free_bytes"] <= health["disk_total_bytes"]
    metrics = server.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain; version=")
    assert b"# TYPE deltasync_bundles_applied_total counter" in metrics.body
    assert b'deltasync_http_answers_total{method="GET",status="200"}' in metrics.body
    page = server.get("/docs").body.decode()
    assert "/api/v1/workspaces/{workspace}/bundles" in page and "Receipt" in page
    assert "<script" not in page and "http://" not in page and "https://" not in page
    assert server.get("/openapi.json").json["info"]["title"] == "deltasync-server"


def test_every_answer_says_who_answers_and_no_more(server: Served) -> None:
    """The API's version and the time are in every answer; no name of a library."""
    for path in ("/health", "/nowhere", "/docs", "/metrics", "/openapi.json", "/api/v1/workspaces"):
        headers = server.get(path).headers
        assert headers["deltasync-server"] == "1"
        assert "server" not in headers
        assert headers["date"].endswith(" GMT")


@pytest.fixture(scope="module", name="life")
def reference_chain(server: Served) -> str:
    """Send the reference chain, each bundle of which must give the root that is written beside it."""
    for row in json.loads((BUNDLES / "good/index.json").read_text(encoding="utf-8")):
        sealed = (BUNDLES / "good" / row["file"]).read_bytes()
        headers = {"Deltasync-Identity": identity_of(sealed)}
        answer = server.request("POST", "/api/v1/workspaces/life/bundles?wait=20", sealed, headers)
        assert (answer.status, answer.json.get("root")) == (200, row["root"]), answer
    return "/api/v1/workspaces/life"


def identity_of(sealed: bytes) -> str:
    """Return a bundle's identity, or any when its metadata cannot be read."""
    try:
        return BundleReader(io.BytesIO(sealed), Limits()).metadata().identity.hex()
    except DeltasyncError:
        return "0" * 64


def test_the_reference_chain_gives_its_roots_and_its_tree(server: Served, life: str) -> None:
    """Ten bundles over HTTP lead to the roots that are written beside them, and to a tree that holds them."""
    assert server.get(life).json["tree_sequence"] == 10
    tree = folders.listing(server.data / "workspaces/life/tree")
    assert tree["README.md"][0] == "file" and tree["latest"][0] == "symlink"


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row["file"])
def test_a_refused_bundle_is_refused_by_its_rule_and_leaves_nothing(
    server: Served, life: str, row: dict[str, str]
) -> None:
    """Each faulty reference bundle gets its code and rule over HTTP, its sequence is not spent and no file stays."""
    sealed = (BUNDLES / "refused" / row["file"]).read_bytes()
    before = server.get(life).json
    journal = list((server.data / "journal").iterdir())
    answer = server.request("POST", f"{life}/bundles", sealed, {"Deltasync-Identity": identity_of(sealed)})
    assert answer.status in (409, 413, 422), answer
    assert (answer.json["code"], answer.json["facts"].get("rule")) == (row["code"], row["rule"])
    assert server.get(life).json == before
    assert set((server.data / "journal").iterdir()) <= set(journal)
    assert not list((server.data / "staging").iterdir())
