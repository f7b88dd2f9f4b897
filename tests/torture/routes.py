"""Every route of openapi.yaml: who may not gets nothing, and what fits the description gets a described answer."""

from __future__ import annotations

import io
import json
import re
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any
from urllib.parse import urlencode

from corpus_good import noise
from hypothesis import HealthCheck, Phase, given, seed, settings
from serving import Answer, Writer
from spec.test_openapi import ROUTES, WRITTEN, check

from deltasync.core.hashing import digest_of
from deltasync.core.names import WorkspaceName
from deltasync.core.wire import BUNDLE_MEDIA_TYPE
from deltasync_server.access import Scope
from deltasync_server.http.auth import needed
from deltasync_server.tenants import DEFAULT, Tenant, qualified
from torture.harness import Defect, Result, Work
from torture.hostile import kept
from torture.inside import Inside, inside

NAME = "routes"
GOAL = 30_000
SLICE = 200
WEIGHT = 3
API = "/api/v1"
AT_ONCE = 30
"""How many requests are made up for a route before it is another one's turn."""
NOBODY = "dst_" + "0" * 12 + "_" + "0" * 64
DEFECTS = (
    Defect(
        "an upload is everybody's",
        "TR-4",
        "server/deltasync_server/uploads.py",
        "if session is None or session.tenant != tenant or self._is_expired(session):",
        "if session is None or self._is_expired(session):",
    ),
    Defect(
        "content is everybody's",
        "TR-1",
        "server/deltasync_server/state.py",
        '"SELECT digest FROM holdings WHERE tenant = ? AND digest IN ({marks})"',
        '"SELECT digest FROM holdings WHERE (1 OR tenant = ?) AND digest IN ({marks})"',
    ),
    Defect(
        "a job is everybody's",
        "TR-181",
        "server/deltasync_server/jobs/table.py",
        'FROM jobs WHERE id = ? AND tenant = ?", (job_id, tenant)',
        'FROM jobs WHERE id = ?", (job_id,)',
    ),
    Defect(
        "a token never expires",
        "TR-120",
        "server/deltasync_server/access.py",
        "if any(end is not None and end <= now for end in (self.expires_at, self.claim_by)):",
        "if False:",
    ),
    Defect(
        "a part of a secret is enough",
        "TR-120",
        "server/deltasync_server/access.py",
        '        if row is None or not is_right:\n            raise Unauthorized("the token is not one',
        '        if row is None:\n            raise Unauthorized("the token is not one',
    ),
    Defect(
        "who may read may send",
        "TR-122",
        "server/deltasync_server/http/auth.py",
        'return Scope.READ if method == "GET" or route in _LOOKS else Scope.PUSH',
        "return Scope.READ",
    ),
    Defect(
        "a digest in a path is taken for one",
        "TR-138",
        "server/deltasync_server/http/workspaces.py",
        '    if not _DIGEST.fullmatch(text):\n        raise NotFound("there is no such digest',
        '    if not text:\n        raise NotFound("there is no such digest',
    ),
)


@dataclass(frozen=True)
class Names:
    """What the placeholders of a path stand for, and what bodies name."""

    workspace: str
    root: str
    digest: str
    upload_id: str
    identity: str
    sequence: str = "1"
    number: str = "0"
    job: str = "ds_0_00000000"

    def path(self, pattern: str) -> str:
        """Fill a path's placeholders."""
        return pattern.format(**{each: getattr(self, each) for each in re.findall(r"{(\w+)}", pattern)})

    def body(self, method: str, pattern: str) -> bytes | None:
        """Return what a request to a route brings."""
        digests: dict[str, object] = {"digests": [self.digest, self.root]}
        bodies: dict[str, object] = {
            f"{API}/workspaces/{{workspace}}/missing": digests,
            f"{API}/workspaces/{{workspace}}/blobs": digests,
            f"{API}/workspaces/{{workspace}}/trees": digests,
            f"{API}/uploads/initiate": {"kind": "bundle", "workspace": "up", "identity": self.identity, "resume": True},
            f"{API}/files/deletions": {"files": [{"filepath": "/f", "hostname": "h", "blake3": self.digest}]},
            f"{API}/files/{{digest}}": {"filepath": "/f", "hostname": "h"},
        }
        if pattern in bodies and method != "GET":
            return json.dumps(bodies[pattern]).encode()
        return b"{}" if method in ("POST", "PUT") else None

    def headers(self) -> dict[str, str]:
        """Return what every request says."""
        return {"Deltasync-Identity": self.identity, "Content-Type": "application/json"}

    def hidden(self, text: str) -> str:
        """Return a text without these names, and without what is new in each answer."""
        for each in (self.workspace, self.root, self.digest, self.upload_id, self.identity, self.job):
            text = text.replace(each, "NAME")
        text = re.sub(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}", "ID", text)
        return re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+(Z|\+00:00)", "TIME", text)


@dataclass
class Place:
    """A server with two tenants, and what the first one has."""

    server: Inside
    random: Random
    result: Result
    theirs: Names = field(init=False)
    tokens: dict[str, str] = field(init=False)
    """What never lets anybody in, as the header says it."""
    narrow: dict[str, str] = field(init=False)
    """A token of each scope alone."""
    _source: int = 0

    def __post_init__(self) -> None:
        self.theirs = self._furnished(Tenant("alice"), "shared")
        self._furnished(Tenant("bob"), "own")
        every = frozenset({Scope.PUSH, Scope.ADMIN})
        good = self.token(Tenant("bob"), every)
        revoked = self.token(Tenant("bob"), every)
        self.server.access.revoke(revoked.split("_")[1])
        other = good[:-1] + ("0" if good[-1] != "0" else "1")
        self.narrow = {scope: self.token(Tenant("eve"), frozenset({scope})) for scope in Scope}
        self.tokens = {
            "none": "",
            "wrong": f"Bearer {NOBODY}",
            "part": f"Bearer {good[:-1]}",
            "longer": f"Bearer {good}0",
            "last digit": f"Bearer {other}",
            "expired": f"Bearer {self.token(Tenant('bob'), every, expires_at=1)}",
            "revoked": f"Bearer {revoked}",
            "basic": f"Basic {good}",
            "bare": good,
            "empty": "Bearer ",
        }

    def token(self, tenant: Tenant, scopes: frozenset[Scope], expires_at: int | None = None) -> str:
        """Make a token."""
        return self.server.access.create(tenant, scopes, "", expires_at)[1]

    def _furnished(self, tenant: Tenant, workspace: str) -> Names:
        """Give a tenant a workspace with a file, a plain file, and an upload."""
        content = f"the content of {tenant}".encode() * 50
        made = Writer(workspace).file("secret", content)
        name = qualified(tenant, WorkspaceName(workspace))
        self.server.store.receive(name, io.BytesIO(made.sealed), expected_identity=None)
        token = self.token(tenant, frozenset({Scope.PUSH, Scope.RUN}))
        plain = {"filepath": "/f", "hostname": "h", "blake3": digest_of(content).hex(), "file_size": len(content)}
        upload = self.posted(token, "/uploads/initiate", plain)["upload_id"]
        self.asked(token, "PUT", f"{API}/uploads/{upload}/chunk/0", content)
        self.posted(token, f"/uploads/{upload}/complete", {})
        other = Writer("up").file("f", noise(tenant, 5000))
        begun = self.posted(
            token, "/uploads/initiate", {"kind": "bundle", "workspace": "up", "identity": other.identity}
        )
        self.asked(token, "PUT", f"{API}/uploads/{begun['upload_id']}/chunk/0", other.sealed)
        asked = {"key": "0" * 32, "client_id": "a" * 32, "argv": [[{"text": "true"}]]}
        job = self.posted(token, "/jobs", asked, 201)["id"]  # nobody works on it in here
        return Names(workspace, made.root, digest_of(content).hex(), begun["upload_id"], other.identity, job=job)

    def posted(self, token: str, path: str, value: object, status: int = 200) -> Any:
        """Post JSON, which must be taken."""
        headers = {"Content-Type": "application/json"}
        answer = self.asked(token, "POST", API + path, json.dumps(value).encode(), headers)
        assert answer.status == status, answer
        return answer.json

    def asked(
        self, token: str, method: str, target: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """Make a request from a place of its own, so that no other one's failures count for it."""
        self._source += 1
        source = f"10.{self._source >> 16 & 255}.{self._source >> 8 & 255}.{self._source & 255}"
        named = {**({"Authorization": f"Bearer {token}"} if token else {}), **(headers or {})}
        return self.server.ask(method, target, body, named, source=source)

    def fault(self, text: str) -> None:
        """Record a fault."""
        self.result.faults.append(text)


def run(work: Work) -> Result:
    """Ask every route as everybody who may not, then as one who may and says what the description allows."""
    result, random = Result(), Random(work.seed)
    with inside(work.scratch / "guarded", needs_token=True) as server:
        place = Place(server, random, result)
        server.store.catch_up()
        before = _kept(server)
        steps = [*_strangers(place), *_narrower(place)]
        random.shuffle(steps)
        for step in steps if work.points >= GOAL else steps[: work.points // 2]:
            if work.stop_at_first and result.faults:
                return result
            _visit(place, step)
        if (after := _kept(server)) != before:
            changed = sorted(name for name in after.keys() | before.keys() if after.get(name) != before.get(name))
            result.faults.append(f"requests that were refused have changed {changed}")
        ask_as_foreigner(place)
    with inside(work.scratch / "open") as server:
        _generate(server, work, result)
    return result


def ask_as_foreigner(place: Place) -> None:
    """Ask every route that has a name for what another tenant has, and for what nobody has."""
    for step in _foreigners(place):
        _visit(place, step)


def _kept(server: Inside) -> dict[str, object]:
    """Return what the store keeps, but for who asked what."""
    found = kept(server.store)
    apart = ("access.db-shm", "audit")
    return {
        name: each for name, each in found.items() if name != "leases" and not name.rpartition("/")[2].startswith(apart)
    }


Step = tuple[str, str, str]
"""What is tried, and on which route."""


def _visit(place: Place, step: Step) -> None:
    what, method, pattern = step
    place.result.points += 1
    place.result.count(what.partition(":")[0])
    try:
        _TRIES[what.partition(":")[0]](place, what.partition(":")[2], method, pattern)
    except Exception as error:  # noqa: BLE001 - a server that fails in this process is the fault
        place.fault(f"{what} {method} {pattern}: {error!r}")


def _routes() -> list[tuple[str, str]]:
    return [(method.upper(), path) for method, path in ROUTES]


def _strangers(place: Place) -> Iterator[Step]:
    for method, pattern in _routes():
        for kind in place.tokens:
            if not (kind == "none" and "/pairings/" in pattern):
                yield f"stranger:{kind}", method, pattern


def _stranger(place: Place, kind: str, method: str, pattern: str) -> None:
    """Whoever shows no good token is 401, whatever is asked for."""
    names, body = place.theirs, place.theirs.body(method, pattern)
    shown = {"Authorization": place.tokens[kind]} if kind != "none" else {}
    answer = place.asked("", method, names.path(pattern), body, {**names.headers(), **shown})
    code = answer.json.get("code") if "json" in answer.headers.get("content-type", "") else None
    is_refused = (answer.status, code, answer.headers.get("www-authenticate")) == (401, "UNAUTHORIZED", "Bearer")
    if not is_refused:
        place.fault(f"{kind} token: {method} {pattern} answers {answer.status} {answer.body[:300]!r}")


def _narrower(place: Place) -> Iterator[Step]:
    for method, pattern in _routes():
        if "/token" not in pattern and "/pairings" not in pattern:
            for scope in Scope:
                yield f"narrower:{scope}", method, pattern


_LOOKS = tuple(f"{API}/workspaces/{{workspace}}/{each}" for each in ("missing", "blobs", "trees"))


def _narrow(place: Place, scope: str, method: str, pattern: str) -> None:
    """A token of one scope is 403 where that is not the one that the page says."""
    is_look = method == "GET" or pattern in _LOOKS
    may = scope == "push" or (scope == "read" and is_look)
    if pattern == "/metrics" or pattern.startswith(f"{API}/jobs"):
        may = scope == ("admin" if pattern == "/metrics" else "run")
    assert needed(method, pattern) is not None
    token, names = place.narrow[scope], place.theirs
    if may and not is_look:
        return
    answer = place.asked(token, method, names.path(pattern), names.body(method, pattern), names.headers())
    if (answer.status == 403) is may:
        place.fault(f"scope {scope}: {method} {pattern} answers {answer.status} {answer.body[:300]!r}")


def _foreigners(place: Place) -> Iterator[Step]:
    for method, pattern in _routes():
        if "{" in pattern or "/uploads/initiate" in pattern or "/files/deletions" in pattern:
            yield "foreigner:", method, pattern
            if "{workspace}" in pattern:
                yield "foreigner:own", method, pattern


def _foreigner(place: Place, own: str, method: str, pattern: str) -> None:
    """What another tenant has is answered like what nobody has (spec ST-101): one table of every route (TR-4)."""
    token = place.token(Tenant("bob"), frozenset({Scope.PUSH, Scope.RUN}))
    theirs = place.theirs
    never = Names(
        "nobodys",
        digest_of(place.random.randbytes(9)).hex(),
        digest_of(place.random.randbytes(9)).hex(),
        str(uuid.UUID(bytes=place.random.randbytes(16), version=4)),
        digest_of(place.random.randbytes(9)).hex(),
    )
    found = []
    for names in (theirs, never):
        asked = replace(names, workspace=own or names.workspace)
        answer = place.asked(token, method, asked.path(pattern), asked.body(method, pattern), asked.headers())
        found.append((answer.status, asked.hidden(answer.body.decode(errors="replace"))))
        for secret in (theirs.root, theirs.digest, theirs.upload_id, theirs.job):
            if names is never and secret.encode() in answer.body:
                place.fault(f"{method} {pattern} tells of {secret}")
    if found[0] != found[1]:
        place.fault(f"foreign: {method} {pattern} answers {found[0]}, and for what nobody has {found[1]}"[:1500])


_TRIES = {"stranger": _stranger, "narrower": _narrow, "foreigner": _foreigner}


# Requests that the description allows


def _generate(server: Inside, work: Work, result: Result) -> None:
    """Make requests of the description until the points are visited or the time is over."""
    import schemathesis

    schemathesis.serializer(BUNDLE_MEDIA_TYPE)(lambda _, value: value if isinstance(value, bytes) else b"")
    made = Writer("w").file("a", b"a" * 2000)
    server.store.receive(qualified(DEFAULT, WorkspaceName("w")), io.BytesIO(made.sealed), expected_identity=None)
    schema = schemathesis.openapi.from_dict(WRITTEN)
    operations = [each.ok() for each in schema.get_all_operations()]
    turn = work.seed % 2**32
    Random(work.seed).shuffle(operations)
    while work.goes_on(result):
        for operation in operations:
            if not work.goes_on(result):
                return
            turn += 1
            _some(server, operation, turn, result)


def _some(server: Inside, operation: Any, turn: int, result: Result) -> None:
    @seed(turn)
    @settings(
        max_examples=AT_ONCE,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy())
    def try_one(case: Any) -> None:
        result.points += 1
        result.count("generated")
        fault = _why_wrong(server, case, result)
        if fault and len(result.faults) < 20:
            result.faults.append(f"turn {turn}: {fault}")

    try_one()


def _why_wrong(server: Inside, case: Any, result: Result) -> str:
    """Make a request of the description; returns what is wrong with the answer."""
    sent = case.as_transport_kwargs(base_url="http://localhost")
    query = {name: value for name, value in (sent.get("params") or {}).items() if name != "wait"}  # nobody waits here
    target = case.formatted_path + (f"?{urlencode(query, doseq=True)}" if query else "")
    body, media = sent.get("data"), {}
    if sent.get("json") is not None:
        body, media = json.dumps(sent["json"]).encode(), {"Content-Type": "application/json"}
    if sent.get("files"):
        body, media = _form(sent["files"])
    if isinstance(body, str):
        body = body.encode()
    headers = {name: str(value) for name, value in (sent.get("headers") or {}).items()} | media
    path = operation_path(case)
    said = f"{case.method} {target} {headers} {body!r}"[:1500]
    try:
        answer = server.ask(case.method, target, body if isinstance(body, bytes) or body is None else b"", headers)
        result.count(f"status {answer.status}")
        if answer.status >= 500 and answer.status not in (503, 507):
            return f"{answer.status} {answer.body[:300]!r}: {said}"
        if answer.status < 500:
            check(answer, case.method.lower(), path)
    except Exception as error:  # noqa: BLE001 - whatever comes instead of a described answer is the fault
        return f"{str(error)[:600] or repr(error)}: {said}"
    return ""


def operation_path(case: Any) -> str:
    """Return the pattern of a case's path."""
    return str(case.operation.path)


def _form(files: Any) -> tuple[bytes, dict[str, str]]:
    from urllib3.filepost import encode_multipart_formdata

    rows = files.items() if isinstance(files, dict) else files
    fields = [(name, value if isinstance(value, (str, bytes, tuple)) else str(value)) for name, value in rows]
    body, media = encode_multipart_formdata(fields, boundary="x")
    return body, {"Content-Type": media}
