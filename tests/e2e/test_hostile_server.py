"""The real commands against a server that lies about one thing, before a canary of a home (TR-31 to TR-38, TR-42)."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import re
import signal
import ssl
import stat
import subprocess
import sys
import tarfile
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import folders
import hostile_server as lies
import pytest
import watching
import zstandard
from certificates import made
from corpus_good import noise
from hostile_server import (
    Asked,
    Double,
    Forged,
    Lie,
    Pieces,
    Said,
    either,
    instead,
    members,
    raw,
    refusal,
    when,
    with_headers,
)
from serving import Served, serving

from deltasync.cli import main
from deltasync.client import transport
from deltasync.client.hosts import Host, HostBook
from deltasync.core import frames
from deltasync.core.hashing import digest_of, directory_digest
from deltasync.core.manifest import EMPTY_ROOT, Entry, Kind, encode_directory

SECONDS = 20
"""No command takes longer, whatever it is told."""
MEMORY_MIB = 200
CANARY = b"canary-51f7c0de"
SECRET = CANARY * 600
PETABYTE = 1 << 50
LARGE = noise("large", 9 << 20)
BEFORE = LARGE[: 5 << 20] + b"before"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served") / "data") as served:
        yield served


@pytest.fixture(scope="module")
def double(server: Served) -> Iterator[Double]:
    with lies.hostile(server.port) as standing:
        yield standing


@dataclass
class Home:
    """A user's home: a workspace, what lies beside it, and the commands that are run there."""

    path: Path
    double: Double
    capsys: pytest.CaptureFixture[str]
    before: dict[str, tuple[object, ...]] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.path / self.path.name

    @property
    def dest(self) -> Path:
        return self.path / "dest"

    def fill(self) -> None:
        """Make a workspace with a file that is not to be sent, and secrets around it."""
        folders.write(self.folder, "a.txt", "hello\n")
        folders.write(self.folder, "docs/b.bin", noise("b", 200_000))
        folders.write(self.folder, "docs/deep/c.txt", "c" * 5000)
        folders.write(self.folder, ".deltasyncignore", "*.key\n")
        folders.write(self.folder, "own.key", SECRET)
        folders.write(self.path, "private/id", SECRET)
        (self.path / "dest").mkdir()

    def edit(self) -> None:
        """Change it after a first push."""
        folders.write(self.folder, "a.txt", "hello again\n")
        folders.write(self.folder, "new/d.bin", noise("d", 100_000))
        (self.folder / "docs/deep/c.txt").unlink()

    def run(self, command: str) -> tuple[int, str, str]:
        """Run one command in this process, as the program does; it ends by itself or the test fails."""
        self.capsys.readouterr()
        signal.signal(signal.SIGALRM, _late)
        signal.alarm(SECONDS)
        try:
            code = main.run(self.words(command))
        finally:
            signal.alarm(0)
        out, err = self.capsys.readouterr()
        return code, out, err

    def words(self, command: str) -> list[str]:
        to, name = self.double.url, self.folder.name
        return {
            "push": ["push", str(self.folder), "--to", to, "--no-wait"],
            "push--json": ["push", str(self.folder), "--to", to, "--no-wait", "--json"],
            "status": ["status", str(self.folder)],
            "status--json": ["status", str(self.folder), "--json"],
            "verify": ["verify", str(self.folder)],
            "fetch": ["fetch", "--from", to, "--workspace", name, str(self.dest)],
            "replay": [
                *("bundle", "replay", str(self.folder / ".deltasync/outbox")),
                *("--to", to, "--workspace", f"{name}-again"),
            ],
            "doctor": ["doctor", str(self.folder), "--to", to],
        }[command]

    def strays(self) -> list[str]:
        """Return the files that a fetch left in DEST and that are not what the workspace has; one was there before."""
        honest, there = folders.listing(self.folder), folders.listing(self.dest)
        wrong = [path for path, seen in there.items() if seen[0] == "file" and seen != honest.get(path)]
        return [path for path in wrong if (self.dest / path).read_bytes() != BEFORE]

    def seen(self) -> dict[str, tuple[object, ...]]:
        """Return every path of the home with all that a stat has of it, but for what deltasync keeps for itself."""
        found: dict[str, tuple[object, ...]] = {}
        for folder, names, files in os.walk(self.path):
            names[:] = [name for name in names if name not in (".deltasync", "own", "run", "dest")]
            for name in [*names, *files]:
                path = Path(folder, name)
                status = path.lstat()
                content = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
                facts = (status.st_ino, status.st_mode, status.st_uid, status.st_size)
                more = (status.st_nlink, status.st_mtime_ns, status.st_ctime_ns)
                found[str(path.relative_to(self.path))] = (*facts, *(() if path == self.folder else more), content)
        return found


def _late(number: int, frame: object) -> None:
    raise AssertionError("the command does not end")


@pytest.fixture
def home(
    tmp_path: Path, double: Double, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Home]:
    for name in [name for name in os.environ if name.startswith(("DELTASYNC_", "REMOTE_UPLOAD_"))]:
        monkeypatch.delenv(name)
    (tmp_path / "run").mkdir(mode=0o700)
    for name, value in {
        "HOME": tmp_path,
        "DELTASYNC_HOME": tmp_path / "own",
        "XDG_RUNTIME_DIR": tmp_path / "run",
        "DELTASYNC_TIMEOUT": "10",
        "DELTASYNC_MAX_RETRIES": "1",
        "DELTASYNC_SETTLE": "0",
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(transport, "BACKOFF_SECONDS", 0.02)
    double.lie, double.asked[:] = None, []
    made = Home(tmp_path, double, capsys)
    made.fill()
    yield made
    double.lie = None


def members_of(body: bytes) -> dict[str, bytes]:
    """Return the members of a bundle by their names."""
    content = zstandard.ZstdDecompressor().stream_reader(body).read()
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        return {each.name: file.read() for each in archive if (file := archive.extractfile(each)) is not None}


def assert_only_what_bundles_list(double: Double) -> None:
    """Fail where a byte of a secret left, or a bundle carries content that its operations do not name."""
    for asked in double.asked:
        assert CANARY not in asked.body, asked.line
        if not asked.line.endswith("/bundles") or not asked.body:
            continue
        found = members_of(asked.body)
        assert CANARY not in b"".join(found.values())
        operations = found["metadata/operations.json"].decode()
        carried = [match[0] for name in found if (match := re.search("[0-9a-f]{64}", name))]
        assert [digest for digest in carried if digest not in operations] == []


def packed(asked: Asked, pass_on: lies.PassOn) -> Said:
    said = pass_on()
    said.put("Content-Encoding", "gzip")
    said.body = gzip.compress(said.body)
    return said


def hung_up(asked: Asked, pass_on: lies.PassOn) -> lies.Raw:
    """Tell the truth, and close the connection."""
    return iter([pass_on().sealed()])


def with_status(status: int) -> Lie:
    def told(asked: Asked, pass_on: lies.PassOn) -> Said:
        said = pass_on()
        said.status = status
        return said

    return told


RECIPES: dict[str, Callable[[bytes], bytes]] = {
    "of no chunks": lambda body: b"",
    "that ends in one": lambda body: body[:-7],
    "of other sizes": lambda body: b"\0\0\0\1" + body[4:],
    "of a petabyte": lambda body: b"\xff" * len(body),
    "of one chunk many times": lambda body: body[:20] * (len(body) // 20),
    "of chunks in another order": lambda body: b"".join(sorted(body[at : at + 20] for at in range(0, len(body), 20))),
}
WS, BUNDLES, MISSING = "GET /workspaces/[^/]+", "POST /workspaces/[^/]+/bundles", "POST /workspaces/[^/]+/missing"
BLOBS, RANGES, ANY = "POST .*/blobs", "GET /blobs/.*", ".*"
HEAD = "HTTP/1.1 200 OK\nDeltasync-Server: 1\n"
ESCAPES = "\x1b]0;owned\x07\x1b[2J\u202e\u009b31m"
MANY = [f"{number:064x}" for number in range(200_000)]
NOBODYS, ZEROS = "ab" * 32, "0" * 64
D = b"\2" * 32
PIECES = {"DELTASYNC_BWLIMIT": "1G", "DELTASYNC_MAX_RETRIES": "2"}
KEPT = {"DELTASYNC_MAX_RETRIES": "1"}
IN_TIME = {"DELTASYNC_TIMEOUT": "0.3", "DELTASYNC_MAX_RETRIES": "0"}


@dataclass(frozen=True)
class Case:
    """A lie, what is run while it is told, and how that has to end."""

    lie: Lie
    code: int = 0
    commands: str = "push"
    """One after the other; the code is the last one's."""
    says: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)
    large: bool = False
    """The workspace has a file that is fetched by ranges."""


def head(**changed: Any) -> Lie:
    return when(WS, members(**changed))


def receipt(**changed: Any) -> Lie:
    return when(BUNDLES, members(**changed))


def limits(**changed: int) -> Lie:
    return head(limits=lambda before: {**before, **changed})


def refused(code: str, status: int = 409, **facts: Any) -> Lie:
    return when(BUNDLES, refusal(code, status, facts=facts))


def framed(head: str, pieces: Pieces = tuple) -> Lie:
    """Answer the question for the head by bytes of this frame."""
    return when(WS, raw(HEAD + head, pieces))


def session(**changed: Any) -> Lie:
    return when("POST /uploads/initiate", members(**changed))


def torn(**changed: Any) -> Lie:
    """Break off at a piece, and say this of what is there."""
    return either(when("PUT .*/chunk/1", raw("")), when("GET /uploads/[^/]+", members(**changed)))


def redirect(status: int, where: str) -> Case:
    return Case(when(ANY, instead(b"", status, Location=where)), 1, says="redirects to")


def unapplied(asked: Asked, pass_on: lies.PassOn) -> Said:
    """Give the receipt that a bundle hopes for, and drop the bundle."""
    manifest = json.loads(members_of(asked.body)["manifest.json"])
    words = {
        "workspace": asked.line.split("/")[2],
        "epoch": manifest["epoch"],
        "sequence": manifest["sequence_number"],
        "identity": asked.headers["deltasync-identity"],
        "bundle_id": manifest["bundle_id"],
        "root": manifest["root"],
        "applied_at": "2026-01-01T00:00:00Z",
        "tree_sequence": manifest["sequence_number"],
    } | dict.fromkeys(("created", "updated", "moved", "deleted", "content_bytes"), 0)
    return Said(200, {"Deltasync-Server": "1"}, json.dumps(words).encode())


def in_turn(*told: Lie) -> Lie:
    """Tell one lie after the other, from the first one again and again."""
    turns = itertools.cycle(told)
    return lambda asked, pass_on: next(turns)(asked, pass_on)


def remembered() -> Lie:
    """Say of the head what was true when it was first asked for."""
    first: list[Said] = []

    def told(asked: Asked, pass_on: lies.PassOn) -> Said:
        first.append(pass_on())
        return first[0]

    return when(WS, told)


def file(name: str, size: int = 5) -> Entry:
    return Entry(name, Kind.FILE, size, 0, False, b"\1" * 32)


def forged(*entries: Entry, d: bytes = b"") -> Forged:
    """Make a tree. d: what is said to be the directory object of the digest D."""
    body = encode_directory(entries)
    return Forged(directory_digest(body), {directory_digest(body): body, D: d})


def told_for_blobs(*contents: bytes | None, claims: int | None = None) -> Lie:
    """Answer a question for content with these, whatever was asked for. claims: the sizes that are stated."""
    sizes = [None if each is None else len(each) if claims is None else claims for each in contents]
    stream = b"".join(frames.head(size) + (each or b"") for size, each in zip(sizes, contents, strict=True))
    return when(BLOBS, instead(stream))


def twice(body: bytes) -> bytes:
    """State members of an object twice, at first as something else."""
    return b'{"sequence":9,"root":"' + NOBODYS.encode() + b'",' + body[1:]


def up_and_down() -> Callable[[object], object]:
    """Say of a piece that more and then less of it is there."""
    sizes = itertools.cycle((999, 0))
    return lambda _: [{"chunk_num": 1, "received_bytes": next(sizes)}]


CASES: dict[str, Case] = {
    # What was applied
    "applied, and is not": Case(when(BUNDLES, unapplied)),
    "applied, and is not: verify": Case(when(BUNDLES, unapplied), 5, "push verify"),
    "another root": Case(receipt(root=NOBODYS), 8),
    "another sequence": Case(receipt(sequence=7), 8),
    "another bundle": Case(receipt(identity=NOBODYS), 8),
    "another workspace": Case(receipt(workspace="elsewhere"), 8),
    "another epoch": Case(receipt(epoch="9" * 32), 8),
    "a tree of forty digits in a receipt": Case(receipt(tree_sequence=10**40), 1),
    # The head
    "a head of another epoch": Case(head(epoch="f" * 32, sequence=4), 5),
    "a head far ahead": Case(head(sequence=2**52), 5),
    "a head beyond a database": Case(head(sequence=2**63 - 1), 1),
    "a head beyond all numbers": Case(head(sequence=10**30), 1),
    "a head of minus one": Case(head(sequence=-1), 1),
    "a head far behind": Case(head(sequence=0, root=EMPTY_ROOT.hex()), 5),
    "a head that goes back": Case(remembered(), 6, "push push", says="--allow-mass-delete"),
    "a root that is none": Case(head(root="../../etc"), 1),
    "a tree of forty digits": Case(head(tree_sequence=10**30), 1),
    "a state that would delete everything": Case(forged(file("theirs")), 6, says="--allow-mass-delete"),
    "another owner": Case(head(client_id="e" * 32), 5),
    "it wants what nobody has": Case(head(wanted=[NOBODYS, "../../private/id", ""]), 3),
    "it wants a secret": Case(head(wanted=[digest_of(SECRET).hex()]), 3),
    "it wants very much": Case(head(wanted=MANY), 3),
    "features of all kinds": Case(head(features=["x" * 1000] * 1000)),
    # What is missing
    "a secret is missing": Case(when(MISSING, members(missing=lambda found: [*found, digest_of(SECRET).hex()]))),
    "nothing is missing, for once": Case(when(MISSING, members(missing=[]))),
    "words are missing": Case(when(MISSING, members(missing=["", "../../private/id", "\0", "Z" * 64]))),
    "very much is missing": Case(when(MISSING, members(missing=MANY))),
    "all is missing, each time": Case(when(MISSING, members(missing=lambda _: MANY[:10])), 0, "push push"),
    "what nobody has is missing": Case(refused("CONTENT_MISSING", missing=[NOBODYS]), 5),
    "a number is missing": Case(refused("CONTENT_MISSING", missing=5), 5),
    "nobody says what is missing": Case(refused("CONTENT_MISSING"), 5),
    # Refusals
    "not the owner": Case(refused("NOT_OWNER"), 5),
    "a fork, for ever": Case(refused("SEQUENCE_FORK"), 5),
    "a gap, for ever": Case(refused("SEQUENCE_GAP", expected_sequence=-7), 5),
    "a resync after every bundle": Case(
        either(limits(bundle_operations=1), when(BUNDLES, in_turn(unapplied, refusal("SEQUENCE_FORK", 409)))),
        5,
        says="goes back on what it acknowledges",
        variables={"DELTASYNC_ALLOW_MASS_DELETE": "1"},
    ),
    "another token is asked for": Case(when(ANY, refusal("UNAUTHORIZED", 401, WWW_Authenticate="Basic realm=x")), 7),
    "an error of this side": Case(when(ANY, refusal("CANCELLED", 418, "no", {"rule": 5, "first": []})), 1),
    "a year of patience": Case(when(ANY, refusal("HOST_BUSY", 503, Retry_After="31536000")), 4),
    "patience of less than nothing": Case(
        when(ANY, refusal("HOST_BUSY", 429, facts={"retry_after_seconds": -9}, Retry_After="-5")), 4
    ),
    # Limits
    **{
        f"a limit of {size}: {name}": Case(limits(**{name: size}), 3 if name == "bundle_bytes" and size < 2 else 0)
        for name in ("bundle_content_bytes", "bundle_bytes", "bundle_operations", "metadata_bytes", "missing_digests")
        for size in (0, 2**63 - 1)
    },
    "a limit of one byte": Case(limits(bundle_content_bytes=1, metadata_bytes=1, missing_digests=1)),
    "a limit of forty digits": Case(limits(bundle_content_bytes=10**40), 1),
    "a limit of less than nothing": Case(limits(bundle_operations=-1), 1),
    # The answer itself
    "no JSON": Case(when(WS, lies.text(lambda body: b"<html>")), 1),
    "empty answers": Case(when(ANY, instead(b"")), 1),
    "JSON that is deep": Case(when(ANY, instead(b'{"workspace":' + b"[" * 1_000_000)), 1),
    "JSON that says it twice": Case(when(WS, lies.text(twice))),
    "NaN": Case(when(WS, lies.text(lambda body: body.replace(b'"sequence":1', b'"sequence":NaN'))), 1),
    "an escaped half of a character": Case(head(tree_path="\ud800"), 1, "status"),
    "a length that is too short": Case(framed("Content-Length: 9\n\n", lambda: [b'{"workspace":1}']), 1),
    "a length that is too long": Case(framed("Content-Length: 999\n\n", lambda: [b"{}"]), 4),
    "a length that is none": Case(framed("Content-Length: -5\n\n", lambda: [b"{}"]), 1),
    "lengths that differ": Case(framed("Content-Length: 5, 7\n\n", lambda: [b"{}"]), 4),
    "chunks of minus one": Case(
        framed("Transfer-Encoding: chunked\n\n-1\n", lies.without_end(bytes(1 << 16))), 1, says="without an end"
    ),
    "chunks of minus five": Case(framed("Transfer-Encoding: chunked\n\n-5\n{}\n0\n\n"), 1, says="no HTTP"),
    "chunks that are none": Case(framed("Transfer-Encoding: chunked\n\nzz\n{}\n0\n\n"), 4),
    "chunks that are mostly frame": Case(
        framed("Transfer-Encoding: chunked\n\n", lies.without_end(b"1;" + b"x" * 60_000 + b"\r\n \r\n")), 1
    ),
    "a trailer without end": Case(
        framed("Transfer-Encoding: chunked\n\n2\n{}\n0\n", lies.without_end(b"a: b\r\n" * 1000)), 1
    ),
    "100 Continue for ever": Case(when(WS, raw("", lies.without_end(b"HTTP/1.1 100 Continue\r\n\r\n" * 500))), 1),
    "headers without end": Case(framed("", lies.without_end(b"a: b\r\n" * 1000)), 4),
    "a header of 100 MiB": Case(framed("A: ", lambda: [bytes(1 << 20)] * 100), 4),
    "a body without end": Case(framed("\n", lies.without_end(b" " * (1 << 16))), 1),
    "a date that is none": Case(when(WS, with_headers(Date="Mon, 01 Jan 2000 00:00:00 +99999999999999"))),
    "another version": Case(when(WS, with_headers(Deltasync_Server="2")), 1),
    "no server of ours": Case(when(WS, with_headers(Deltasync_Server="")), 1),
    "a gateway": Case(when(WS, instead(b"", 502, Deltasync_Server="")), 4),
    "the end in the middle": Case(when(BUNDLES, raw("HTTP/1.1 200 OK\nDeltasync-Server: 1\nContent-Len")), 4),
    "nothing but the end": Case(when(BUNDLES, raw("")), 4),
    "packed as gzip": Case(either(when(WS, packed)), 1),
    "a redirect elsewhere": redirect(301, "http://elsewhere.example/"),
    "a redirect to loopback": redirect(302, "http://127.0.0.1:9/"),
    "a redirect to a file": redirect(307, "file:///etc/passwd"),
    "a redirect without a scheme": redirect(308, "//[::1]:9/x"),
    "a redirect to no address": redirect(303, "http://[bad"),
    "a redirect to a terminal": redirect(302, ESCAPES),
    # Drop by drop
    "a head, drop by drop": Case(when(WS, raw("HTTP/1.1 200 OK\nA: ", lies.dripping(b"a"))), 4, variables=IN_TIME),
    "a body, drop by drop": Case(framed("\n", lies.dripping(b" ")), 4, variables=IN_TIME),
    "a receipt, drop by drop": Case(when(BUNDLES, raw(HEAD + "\n", lies.dripping(b" "))), 4, variables=IN_TIME),
    "content, drop by drop": Case(when(BLOBS, raw(HEAD + "\n", lies.dripping(b"\0"))), 4, "fetch", variables=IN_TIME),
    # What is shown
    "escapes in the status": Case(head(tree_path=ESCAPES, last_applied_at=ESCAPES, epoch=ESCAPES), 0, "status"),
    "escapes in the status for programs": Case(head(tree_path=ESCAPES, last_applied_at=ESCAPES), 0, "status--json"),
    "escapes in a refusal": Case(when(WS, refusal(ESCAPES, 409, ESCAPES, {ESCAPES: ESCAPES})), 1),
    "escapes in a refusal for programs": Case(
        when(WS, refusal("X", 409, ESCAPES, {ESCAPES: ESCAPES})), 1, "push--json"
    ),
    "escapes in a version": Case(when(WS, with_headers(Deltasync_Server="\x1b[2J")), 1),
    "escapes in a receipt": Case(receipt(applied_at=ESCAPES, bundle_id=ESCAPES), 0, "push status"),
    "escapes in an owner": Case(head(client_id="x", workspace=ESCAPES), 5),
    "escapes in the server's own facts": Case(
        when("GET /health", members(version=ESCAPES, status=ESCAPES)), 0, "doctor"
    ),
    "sizes beyond all numbers": Case(head(files=10**40, content_bytes=10**200), 1, "status"),
    "verify, and a wanted secret": Case(head(wanted=[digest_of(SECRET).hex(), "x"]), 0, "verify"),
    "verify, and very much is wanted": Case(head(wanted=MANY), 0, "verify"),
    "verify, and another tree": Case(forged(file("theirs")), 5, "verify"),
    # The tree that a fetch brings
    **{
        f"a tree with the name {name!r}": Case(forged(file(name)), 8, "fetch", says="T-6")
        for name in ("..", ".", "", "/etc/passwd", "a/b", "a\0b", ".deltasync", "a\x1b[2J")
    },
    "a tree with a name twice": Case(forged(file("f"), file("f")), 8, "fetch", says="T-4"),
    "a tree with a link out": Case(forged(Entry("l", Kind.SYMLINK, target="../private/id")), 8, "fetch", says="P-9"),
    "a tree that is a cycle": Case(
        forged(Entry("d", Kind.DIRECTORY, digest=D), d=encode_directory([Entry("d", Kind.DIRECTORY, digest=D)])),
        8,
        "fetch",
        says="T-3",
    ),
    "a tree of other digests": Case(Forged(D, {D: encode_directory([file("f")])}), 8, "fetch", says="T-3"),
    "a tree of another shape": Case(
        Forged(directory_digest(b"\xff"), {directory_digest(b"\xff"): b"\xff"}), 8, "fetch", says="T-2"
    ),
    "a directory of half a GiB": Case(
        when(".*/trees", instead(frames.head(1 << 29) + b"x" * 99)), 8, "fetch", says="P-7"
    ),
    "a file of minus one byte": Case(forged(file("f", -1)), 8, "fetch", says="T-5"),
    # Content
    "other bytes": Case(when(BLOBS, lies.text(lambda body: body[:-3] + b"xyz")), 8, "fetch"),
    "too few bytes": Case(when(BLOBS, lies.text(lambda body: body[:-3])), 4, "fetch"),
    "too many bytes": Case(when(BLOBS, lies.text(lambda body: body + b"xyz")), 1, "fetch"),
    "content of a petabyte": Case(told_for_blobs(b"x", claims=PETABYTE), 8, "fetch"),
    "content that is not there": Case(told_for_blobs(None, None, None, None), 3, "fetch"),
    "no content at all": Case(when(BLOBS, instead(b"")), 4, "fetch"),
    "a range, and all is given": Case(when(RANGES, with_status(200)), 1, "fetch", large=True),
    "another range": Case(when(RANGES, with_headers(Content_Range="bytes 5-9/10")), 1, "fetch", large=True),
    "a range of other bytes": Case(when(RANGES, lies.text(lambda body: b"x" + body[1:])), 8, "fetch", large=True),
    "a range that is too short": Case(when(RANGES, lies.text(lambda body: body[:-3])), 4, "fetch", large=True),
    "a range that is too long": Case(when(RANGES, lies.text(lambda body: body + b"x")), 1, "fetch", large=True),
    **{
        f"a recipe {what}": Case(when("GET .*/recipes/.*", lies.text(change)), 0, "fetch", large=True)
        for what, change in RECIPES.items()
    },
    # Bundles that are replayed
    **{
        f"replay, and {what}": Case(lie, code, "replay", variables=KEPT)
        for what, lie, code in (
            ("another root", receipt(root=NOBODYS), 8),
            ("another sequence", receipt(sequence=7), 8),
            ("a tree of forty digits", receipt(tree_sequence=10**40), 1),
            ("a fork, for ever", refused("SEQUENCE_FORK"), 5),
            ("a gap, for ever", refused("SEQUENCE_GAP", expected_sequence=-7), 5),
            ("a number is missing", refused("CONTENT_MISSING", missing=5), 5),
            ("a head far ahead", head(sequence=2**52), 0),
            ("empty answers", when(ANY, instead(b"")), 1),
            ("everything is dropped", when(BUNDLES, unapplied), 8),
        )
    },
    # Uploads in pieces
    "pieces of no bytes": Case(session(chunk_size=0), 1, variables=PIECES),
    "pieces of minus one byte": Case(session(chunk_size=-1), 1, variables=PIECES),
    "pieces of one byte": Case(session(chunk_size=1), 1, variables=PIECES),
    "pieces of a petabyte": Case(session(chunk_size=PETABYTE), 1, variables=PIECES),
    "an upload named as a path": Case(session(upload_id="../workspaces/x?y=\r\nA: b"), 1, variables=PIECES),
    "a piece of another attempt": Case(
        either(
            session(uploaded_chunks=1, present=[[0, 0]]),
            when("GET .*/chunks", instead(json.dumps({"parts": [{"chunk_num": 0, "etag": ZEROS}]}).encode())),
        ),
        4,
        variables=PIECES,
    ),
    "pieces that nobody sent": Case(torn(present=[[0, 2**62]]), 4, variables=PIECES),
    "pieces that go up and down": Case(torn(partial=up_and_down()), 4, variables=PIECES),
    "pieces of less than nothing": Case(torn(partial=[{"chunk_num": 1, "received_bytes": -9}]), 1, variables=PIECES),
}


@pytest.mark.parametrize("name", CASES)
def test_a_lie_does_no_harm(
    name: str, home: Home, server: Served, double: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a server says: a sentence, no file changes, nothing leaves that no bundle names; the truth heals it."""
    case = CASES[name]
    is_push = case.commands.startswith("push")
    if case.variables is KEPT:
        monkeypatch.setenv("DELTASYNC_KEEP_SENT", "1d")
    if case.large:
        folders.write(home.folder, "large.bin", LARGE)
        folders.write(home.dest, "large.bin", BEFORE)
    assert home.run("push")[0] == 0
    if is_push:
        home.edit()
    if case.variables is PIECES:
        folders.write(home.folder, "large.bin", noise(name, 9 << 20))
    with monkeypatch.context() as patch:
        for variable, value in case.variables.items():
            patch.setenv(variable, value)
        before, double.lie = home.seen(), case.lie
        for command in case.commands.split():
            code, out, err = home.run(command)
            assert_said_safely(code, out, err)
        double.lie = None
    assert code == case.code, (out, err)
    assert re.search(case.says, err), err
    assert home.seen() == before
    assert_only_what_bundles_list(double)
    assert home.strays() == []
    monkeypatch.setenv("DELTASYNC_ALLOW_MASS_DELETE", "1")
    if is_push:
        code, out, err = home.run("push--json")
        assert code == 0, (out, err)
        head_now = server.get(f"/api/v1/workspaces/{home.folder.name}").json
        assert (head_now["root"], head_now["sequence"]) == (json.loads(out)["root"], json.loads(out)["sequence"])
    else:
        code, out, err = home.run("replay" if case.variables is KEPT else "fetch")
        assert code == 0, (out, err)
    if not is_push and case.variables is not KEPT:
        (home.folder / "own.key").unlink()
        folders.assert_same(home.folder, home.dest)


def assert_said_safely(code: int, out: str, err: str) -> None:
    """Fail unless a failure is one sentence, and nothing that was printed does anything to a terminal."""
    assert "raceback" not in err, err
    assert all(line.startswith("deltasync: ") for line in err.splitlines()), err
    if code in (1, 2, 4, 6, 7):
        assert err.count("\n") == 1, err
    assert all(line.isprintable() for line in (out + err).split("\n"))
    for line in out.splitlines():
        assert not line.startswith("{") or json.loads(line)


MEASURED = """
import json, sys
from pathlib import Path
from deltasync.cli import main
for words in json.loads(sys.argv[1]):
    print("code", main.run(words))
status = Path("/proc/self/status").read_text()
print("peak", int(status.partition("VmHWM:")[2].split()[0]) // 1024)
"""
REDIRECT = "HTTP/1.1 302 Found\nDeltasync-Server: 1\nLocation: http://127.0.0.1:9/\n"
BOMB = gzip.compress(bytes(32 << 20)) * 64
"""Two GiB of zeros in two MiB."""
ENDLESS: dict[str, Lie] = {
    "body": raw(HEAD + "\n", lies.without_end(b" " * (1 << 16))),
    "redirect": raw(REDIRECT + "\n", lies.without_end(b" " * (1 << 16))),
    "bomb": raw(f"{REDIRECT}Content-Encoding: gzip\nContent-Length: {len(BOMB)}\n\n", lambda: [BOMB]),
    "packed": raw(f"{HEAD}Content-Encoding: gzip\nContent-Length: {len(BOMB)}\n\n", lambda: [BOMB]),
    "chunk": raw(HEAD + "Transfer-Encoding: chunked\n\n-1\n", lies.without_end(b" " * (1 << 16))),
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="nothing tells how much memory a process had")
def test_what_has_no_end_takes_little_memory(home: Home, double: Double) -> None:
    """Bodies without end, bombs, redirects with either, and a file of a petabyte: little memory, one sentence each."""
    vast = forged(file("f", PETABYTE))

    def told(asked: Asked, pass_on: lies.PassOn) -> Said | lies.Raw | None:
        name = asked.line.split("/")[2]
        return ENDLESS[name](asked, pass_on) if name in ENDLESS else vast(asked, pass_on)

    assert home.run("push")[0] == 0
    double.lie = told
    memory = Path("/dev/shm")  # a file system that has files of a petabyte
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as dest:
        commands = [["status", "--to", double.url, "--workspace", name] for name in ENDLESS]
        commands.append(["fetch", "--from", double.url, "--workspace", home.folder.name, dest])
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, json.dumps(commands)], capture_output=True, text=True, timeout=SECONDS
        )
    assert "raceback" not in done.stderr
    assert re.findall("code (.)", done.stdout)[:-1] == ["1"] * len(ENDLESS), done.stderr
    assert re.findall("code (.)", done.stdout)[-1] in "36", done.stderr
    peak = int(done.stdout.rpartition("peak")[2])
    assert peak < MEMORY_MIB, done.stdout


@pytest.mark.parametrize("change", ["certificate", "version"])
def test_a_server_that_changes_after_its_first_answer_gets_nothing_more(
    home: Home, server: Served, tmp_path: Path, change: str
) -> None:
    """Another certificate, or an older TLS, on the next connection of a push: exit 7, and no bundle was sent."""
    known, other = made("127.0.0.1"), made("127.0.0.1")
    for name in ("known", "other"):
        (tmp_path / name).mkdir()
    first = known.context(tmp_path / "known")
    second = other.context(tmp_path / "other") if change == "certificate" else known.context(tmp_path / "other")
    if change == "version":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            second.minimum_version, second.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with lies.hostile(server.port, [first, second]) as standing:
        HostBook.of_user(os.environ).add(
            Host(name="gpu", url=standing.url, added_at="", fingerprint=known.sha256, token="canary-token")
        )
        standing.lie = when(WS, hung_up)
        before = home.seen()
        code, _, err = Home(home.path, standing, home.capsys).run("push")
        assert (code, err.count("\n")) == (7, 1), err
        assert home.seen() == before
        assert [asked.line.split("/")[-1] for asked in standing.asked] == [home.folder.name]


def test_a_watcher_outlives_a_server_that_takes_everything_back(home: Home, server: Served, double: Double) -> None:
    """A head that goes back makes a watcher wait for leave to delete; it asks little meanwhile, and changes nothing."""
    with watching.inside(home.folder, to=double.url) as watcher:
        watcher.flush()
        (home.folder / "docs/deep/c.txt").unlink()
        watcher.flush()
        before, double.lie = home.seen(), forged(file("theirs"))
        folders.write(home.folder, "a.txt", "hello again\n")
        watcher.heard("guard")
        asked = len(double.asked)
        assert watcher.ask("status")["guard"]
        assert len(double.asked) - asked < 5
        after = home.seen()
        assert {path for path in before if path not in after or after[path] != before[path]} <= {
            home.folder.name + "/a.txt"
        }
        double.lie = None
        assert watcher.flush(allow_mass_delete=True)["sequence"] >= 3
        (home.folder / "own.key").unlink()
        folders.assert_same(server.data / "workspaces" / home.folder.name / "tree", home.folder)
    assert_only_what_bundles_list(double)
