"""The routes of plain files against a real server: as clients of the seed's own API use them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from corpus_good import noise
from serving import Answer, Served, serving

from deltasync.core.hashing import digest_of
from deltasync_server.config import StoreConfig
from deltasync_server.receive import Store

PIECE = 1000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served") / "data") as served:
        yield served


def ask(server: Served, method: str, path: str, value: Any = None) -> Answer:
    body = b"" if value is None else json.dumps(value).encode()
    return server.request(method, path, body, {"Content-Type": "application/json"})


def facts(name: str, content: bytes, **others: Any) -> dict[str, Any]:
    """Return what begins the upload of a file, as the seed's clients say it."""
    return {
        "filepath": f"/home/ada/{name}",
        "hostname": "desk",
        "sha256": hashlib.sha256(content).hexdigest(),
        "file_size": len(content),
        "chunk_size": PIECE,
        "total_chunks": -(-len(content) // PIECE),
        **others,
    }


def upload(server: Served, content: bytes, begun: dict[str, Any], api: str = "/api") -> Answer:
    """Send a file as the seed's clients do, and return the answer to the end."""
    answer = ask(server, "POST", f"{api}/uploads/initiate", begun)
    assert answer.status == 200, answer
    path = f"{api}/uploads/{answer.json['upload_id']}"
    for number, at in enumerate(range(0, len(content), PIECE)):
        assert server.request("PUT", f"{path}/chunk/{number}", content[at : at + PIECE]).status == 200
    done = ask(server, "POST", f"{path}/complete")
    assert ask(server, "POST", f"{path}/complete").json == done.json
    return done


@pytest.mark.parametrize("api", ["/api", "/api/v1"])
@pytest.mark.parametrize("size", [0, 1, 999, 1000, 5500])
def test_a_file_is_stored_as_a_blob_and_marked_deleted(server: Served, api: str, size: int) -> None:
    """Its bytes can be had by its digest; deleting it twice is one deletion."""
    name = f"{api.strip('/').replace('/', '-')}-{size}"
    content = noise(name, size)
    done = upload(server, content, facts(name, content), api)
    assert done.status == 200, done
    assert (done.json["sha256"], done.json["file_size"]) == (hashlib.sha256(content).hexdigest(), size)
    assert done.json["blake3"] == digest_of(content).hex() and done.json["status"] == "completed"
    assert server.get(done.json["storage_location"]).body == content
    named = {"filepath": f"/home/ada/{name}", "hostname": "desk", "deleted_at": "2026-01-05T12:00:00Z"}
    first = ask(server, "DELETE", f"{api}/files/{done.json['sha256']}", named)
    assert first.json == {
        **named,
        "sha256": done.json["sha256"],
        "blake3": done.json["blake3"],
        "status": "deleted",
    }
    named["deleted_at"] = "2027-01-05T12:00:00Z"
    assert ask(server, "DELETE", f"{api}/files/{done.json['blake3']}", named).json == first.json


def test_a_file_belongs_to_the_host_that_sent_it(server: Served) -> None:
    """The digest alone, another host or another path find nothing; of several deletions all or none hold."""
    content = noise("owned", 1500)
    done = upload(server, content, facts("owned", content, blake3=digest_of(content).hex()))
    digest = done.json["sha256"]
    mine = {"filepath": "/home/ada/owned", "hostname": "desk", "sha256": digest}
    for other in ({"hostname": "other"}, {"filepath": "/home/ada/else"}):
        answer = ask(server, "DELETE", f"/api/files/{digest}", {**mine, **other})
        assert (answer.status, answer.json["code"]) == (404, "NOT_FOUND") and answer.json["detail"]
        both = ask(server, "POST", "/api/files/deletions", {"files": [mine, {**mine, **other}]})
        assert both.status == 404
    deleted = ask(server, "POST", "/api/files/deletions", {"files": [{**mine, "deleted_at": "2026-01-05"}]})
    assert [each["deleted_at"] for each in deleted.json["files"]] == ["2026-01-05"]


@pytest.mark.parametrize("wrong", [{"sha256": "0" * 64}, {"blake3": "0" * 64}])
def test_a_file_of_another_digest_is_not_stored(server: Served, wrong: dict[str, str]) -> None:
    """The end is refused with 400, and the cache does not have the bytes."""
    content = noise(f"wrong {sorted(wrong)}", 2500)
    done = upload(server, content, facts("wrong", content, **wrong))
    assert (done.status, done.json["code"]) == (400, "USAGE")
    assert server.get(f"/api/v1/blobs/{digest_of(content).hex()}").status == 404


def test_one_file_sent_twice_at_once_is_stored_once(server: Served) -> None:
    """Both senders succeed, and there is one blob."""
    content = noise("twice", 20_000)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: upload(server, content, facts("twice", content)), range(4)))
    assert all(answer.status == 200 for answer in answers)
    assert server.get(answers[0].json["storage_location"]).body == content
    assert not list((server.data / "staging").iterdir())


@pytest.mark.parametrize(
    "change",
    [
        {"filepath": ""},
        {"hostname": ""},
        {"sha256": ""},
        {"sha256": "0" * 63},
        {"file_size": None},
        {"file_size": -1},
        {"total_chunks": 1},
        {"workspace": "w"},
        {"identity": "0" * 64},
        {"kind": "bundle"},
        {"filepath": "x" * 4097},
        {"filepath": 1},
        {"unknown": 1},
    ],
)
def test_what_is_no_file_is_not_begun(server: Served, change: dict[str, Any]) -> None:
    """A part that is missing, too many, or malformed is told at once."""
    begun = facts("bad", bytes(2500)) | change
    assert ask(server, "POST", "/api/uploads/initiate", begun).status == 400


@pytest.mark.parametrize(
    "value",
    [{}, [], {"hostname": "desk"}, {"filepath": "/x", "hostname": "desk", "sha256": "1" * 63}]
    + [{"filepath": "/x", "hostname": "desk", "deleted_at": when} for when in ("", "yesterday", "x" * 99)],
)
def test_what_names_no_file_is_no_deletion(server: Served, value: object) -> None:
    """A malformed body, another digest than the path's, and a time that is none are refused."""
    assert ask(server, "DELETE", f"/api/v1/files/{'0' * 64}", value).status == 400
    assert ask(server, "DELETE", "/api/v1/files/nothing", value).status == 404
    other = {"filepath": "/x", "hostname": "desk", "sha256": "1" * 64}
    assert ask(server, "DELETE", f"/api/v1/files/{'0' * 64}", other).status == 400
    assert ask(server, "POST", "/api/v1/files/deletions", {"files": [value]}).status == 400


def test_a_collection_keeps_files_until_they_are_deleted(tmp_path: Path) -> None:
    """A stored file is needed by itself; once it is marked deleted its content may go, and it can be stored again."""
    data, content = tmp_path / "data", noise("kept", 1500)
    named = {"filepath": "/home/ada/kept", "hostname": "desk"}
    for is_deleted in (False, True, False):
        with serving(data) as server:
            place = upload(server, content, facts("kept", content)).json["storage_location"]
            if is_deleted:
                digest = place.rpartition("/")[2]
                assert ask(server, "DELETE", f"/api/v1/files/{digest}", named).status == 200
        with Store(StoreConfig(data)) as store:
            store.recover()
            assert store.collect().blobs == int(is_deleted)
        with serving(data) as server:
            assert server.get(place).status == (404 if is_deleted else 200)
