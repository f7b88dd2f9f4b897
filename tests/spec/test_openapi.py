"""spec/openapi.yaml describes the running server: its routes, what they take, and what they answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from make_openapi import FILE
from serving import Answer, Served, Writer, serving

Json = dict[str, Any]
WRITTEN: Json = yaml.safe_load(FILE.read_text(encoding="utf-8"))
ROUTES = [(method, path) for path, methods in WRITTEN["paths"].items() for method in methods]
VALUES = {"workspace": "w", "root": "0" * 64, "digest": "0" * 64, "sequence": "1", "upload_id": "u", "number": 0}
VALUES["job"] = "ds_0_00000000"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served") / "data") as served:
        yield served


def essence(description: Json) -> Json:
    """Return what of a description binds a client: routes, parameters, bodies, answers, and the fields of values."""
    routes = {
        f"{method.upper()} {path}": {
            "name": route["operationId"],
            "parameters": {(each["in"], each["name"], each["required"]) for each in route.get("parameters", ())},
            "body": content(route.get("requestBody", {})),
            "answers": {str(status): content(answer) for status, answer in route["responses"].items()},
        }
        for path, methods in description["paths"].items()
        for method, route in methods.items()
    }
    schemas = description["components"]["schemas"]
    fields = {name: (set(each.get("properties", ())), set(each.get("required", ()))) for name, each in schemas.items()}
    return {"routes": routes, "values": fields}


def content(part: Json) -> Json:
    return {media: each.get("schema", {}).get("$ref", "") for media, each in part.get("content", {}).items()}


def test_the_file_is_what_the_server_says_of_itself(server: Served) -> None:
    """openapi.yaml and /openapi.json agree; after a change of a route run tests/make_openapi.py and read the diff."""
    assert essence(server.get("/openapi.json").json) == essence(WRITTEN)


def test_every_reference_leads_to_a_schema_that_is_one() -> None:
    """No dangling $ref, and each schema is valid JSON Schema."""
    schemas = WRITTEN["components"]["schemas"]
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)
    for reference in references(WRITTEN):
        assert reference.removeprefix("#/components/schemas/") in schemas, reference


def references(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        yield from ([part["$ref"]] if "$ref" in part else [])
        part = list(part.values())
    if isinstance(part, list):
        for each in part:
            yield from references(each)


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_of_the_file_is_served(server: Served, method: str, path: str) -> None:
    """The path exists, takes its method, and no other."""
    answer = server.request(method.upper(), path.format(**VALUES), b"" if method == "post" else None)
    assert "GET /docs lists the routes" not in answer.body.decode(errors="replace") and answer.status != 405
    other = "PUT" if method == "post" else "POST"
    if (other.lower(), path) not in ROUTES:
        assert server.request(other, path.format(**VALUES), b"").status == 405
    check(answer, method, path)


def check(answer: Answer, method: str, path: str) -> None:
    """Fail unless an answer is one of those that the file declares, and of its schema."""
    declared = WRITTEN["paths"][path][method]["responses"]
    given = declared.get(str(answer.status)) or declared["default"]
    media = answer.headers["content-type"].partition(";")[0]
    assert media in given["content"], (answer.status, media)
    if "json" in media and "schema" in given["content"][media]:
        schema = {**given["content"][media]["schema"], "components": WRITTEN["components"]}
        Draft202012Validator(schema).validate(answer.json)


def test_real_answers_have_the_shapes_of_the_file(server: Served) -> None:
    """Good answers and refusals of each kind of route validate against the file's schemas."""
    made = Writer("w").file("a", b"a")
    workspace, bundles = "/api/v1/workspaces/{workspace}", "/api/v1/workspaces/{workspace}/bundles"
    check(server.send("w", made, "?wait=20"), "post", bundles)
    check(server.send("w", Writer("w").file("b", b"b")), "post", bundles)
    check(server.get("/api/v1/workspaces/w"), "get", workspace)
    check(server.get("/api/v1/workspaces/.w"), "get", workspace)
    check(server.get("/api/v1/workspaces"), "get", "/api/v1/workspaces")
    check(server.get("/api/v1/workspaces/w/sequences"), "get", workspace + "/sequences")
    check(server.get(f"/api/v1/workspaces/w/tree/{made.root}"), "get", workspace + "/tree/{root}")
    asked = json.dumps({"digests": ["0" * 64]}).encode()
    check(server.request("POST", "/api/v1/workspaces/w/missing", asked), "post", workspace + "/missing")
    check(server.request("POST", "/api/v1/workspaces/w/sizes", b'{"sizes": [1]}'), "post", workspace + "/sizes")
    digest = made.metadata.operations[0].digest
    for headers in ({}, {"Range": "bytes=0-0"}, {"Range": "bytes=9-"}):
        check(server.get(f"/api/v1/blobs/{digest}", headers), "get", "/api/v1/blobs/{digest}")
    check(server.get("/api/v1/delta/status?collection_name=w"), "get", "/api/v1/delta/status")
    for name in ("/health", "/metrics", "/docs", "/openapi.json"):
        check(server.get(name), "get", name)


def test_the_file_is_the_one_beside_the_specification() -> None:
    """It lies where spec/README.md says."""
    assert Path("spec/openapi.yaml") == FILE.relative_to(FILE.parents[1])
