"""Mutants of bundles, directory objects, requests and answers: refused by a rule or understood, never anything else."""

from __future__ import annotations

import base64
import io
import json
import posixpath
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from random import Random
from types import FrameType
from unittest.mock import patch

import zstandard
from corpus_good import good_chain

from deltasync.core import bundle
from deltasync.core.bundle import BundleReader, Content, Metadata
from deltasync.core.delta import apply
from deltasync.core.errors import LimitExceeded, Refused
from deltasync.core.hashing import digest_of, directory_digest
from deltasync.core.manifest import EMPTY_BODY, EMPTY_ROOT, Entry, decode_directory, encode_directory, parse_directory
from deltasync.core.wire import Limits
from deltasync_server import intake
from torture.fuzz_api import Fetches, Liars, answer, request
from torture.harness import Defect, Result, Work
from torture.inside import inside
from torture.mutation import TEXTS, changed, mutant, spoiled_bytes

NAME = "fuzz"
GOAL = 1_000_000
SLICE = 1500
WEIGHT = 10
HANG_SECONDS = 1.0
"""Of CPU time, for one mutant; pushes have more."""
PUSH_SECONDS = 30.0
_LIMITS = Limits()
_TIGHT = Limits(bundle_operations=6, metadata_bytes=1300, bundle_bytes=9000)
_MEMBERS = ("operation", "kind", "path", "source_path", "base", "digest", "size", "executable", "mtime_ns", "target")
_DEFAULTS = ("size", "executable", "mtime_ns")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_KINDS = {"bundle": 880, "object": 30, "answer": 45, "request": 41, "push": 3, "fetch": 1}
DEFECTS = (
    Defect(
        "metadata need not be canonical",
        "TR-20",
        "deltasync/core/metadata.py",
        "    if msgspec.json.encode(value) != content:\n",
        "    if False:\n",
        "bundle",
    ),
    Defect(
        "a recipe may begin beyond any size",
        "TR-20",
        "deltasync/core/recipe.py",
        "if not length or not is_known or offset + length > SIZE_MAX or (has_no_offset and offset):",
        "if not length or not is_known or (has_no_offset and offset):",
        "bundle",
    ),
    Defect(
        "the padding of small contents is not looked at",
        "TR-93",
        "deltasync/core/bundle.py",
        "        if view[size:] != tar.padding(size):\n",
        "        if False:\n",
        "bundle",
    ),
    Defect(
        "a digest may end in anything",
        "TR-20",
        "deltasync/core/metadata.py",
        "if (base is not None and not _HEX_64.fullmatch(base)) or",
        "if (base is not None and not _HEX_64.match(base)) or",
        "bundle",
    ),
    Defect(
        "an answer of another shape crashes the client",
        "TR-34",
        "deltasync/client/transport.py",
        """            return decoded(content, kind)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:""",
        """            return decoded(content, kind)
        except RecursionError as error:""",
        "answer",
    ),
    Defect(
        "fetched bytes are not hashed",
        "TR-38",
        "deltasync/client/download.py",
        "                if digest_of(content) == need.digest:\n",
        "                if True:\n",
        "fetch",
    ),
    Defect(
        "a request of another shape crashes the server",
        "TR-138",
        "server/deltasync_server/http/uploads.py",
        "    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:\n",
        "    except (UnicodeDecodeError, RecursionError) as error:\n",
        "request",
    ),
)


class Hang(BaseException):
    """A mutant takes too long."""


def run(work: Work) -> Result:
    """Try mutants, each made from the seed and its number alone."""
    result, number = Result(), -1
    kinds, weights = [work.hint] if work.hint else list(_KINDS), [1] if work.hint else list(_KINDS.values())
    mutant(Random(0)), _tree()  # what is made once is made before anybody looks at the clock
    with ExitStack() as open_now, _watched():
        open_now.enter_context(patch.object(intake, "TURN_SECONDS", 0.1))  # for uploads that a lie has ended
        server = open_now.enter_context(inside(work.scratch / "data"))
        upload = server.ask(
            "POST", "/api/v1/uploads/initiate", b'{"kind":"bundle","workspace":"w","identity":"%s"}' % (b"c" * 64)
        )
        liars, fetches = Liars(server, work.scratch), Fetches(server, work.scratch)
        tries: dict[str, Callable[[Random], str]] = {
            "bundle": lambda random: _bundle(random, result),
            "object": lambda random: _object(random, result),
            "answer": answer,
            "request": lambda random: request(random, server, upload.json["upload_id"]),
            "push": lambda random: liars.push(random, result),
            "fetch": lambda random: fetches.fetch(random, result),
        }
        while work.goes_on(result):
            number += 1
            random = Random(f"{work.seed}:{number}")
            kind = random.choices(kinds, weights)[0]
            result.points += 1
            result.count(kind)
            try:
                with _limited(PUSH_SECONDS if kind in ("push", "fetch") else HANG_SECONDS):
                    fault = tries[kind](random)
            except Hang:
                fault = "it hangs"
            except Exception as error:  # noqa: BLE001 - whatever nobody foresaw is a fault of that mutant
                fault = repr(error)
            if fault:
                result.faults.append(f"mutant {work.seed}:{number} ({kind}): {fault}")
    return result


@contextmanager
def _watched() -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGPROF, ring)
    try:
        yield
    finally:
        signal.signal(signal.SIGPROF, before)


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


# Bundles


def _loader(objects: dict[bytes, bytes]) -> Callable[[bytes], list[Entry]]:
    return lambda digest: decode_directory(objects[digest])


@cache
def _tree() -> tuple[bytes, dict[bytes, bytes]]:
    """Return the root behind the good chain, and the directory objects that lead there."""
    root, objects = EMPTY_ROOT, {EMPTY_ROOT: EMPTY_BODY}
    for step in good_chain():
        applied = apply(root, step.metadata.operations, _loader(objects))
        root = applied.root
        objects |= applied.objects
    return root, objects


def _bundle(random: Random, result: Result) -> str:
    """Read one mutated bundle; returns what is wrong with the outcome, '' for nothing."""
    raw, is_structural = mutant(random)
    result.count("bundles of decoded structure", is_structural)
    limits = _TIGHT if random.random() < 0.05 else _LIMITS
    reader = BundleReader(io.BytesIO(raw), limits)
    carried: dict[str, tuple[Content, bytes]] = {}
    try:
        metadata = reader.metadata()
        arriving = reader.part()
        if arriving is not None:
            for _ in arriving.views:
                pass
            arriving.read_digest()
        for content in reader.contents():
            carried[content.operation.digest or ""] = content, b"".join(map(bytes, content.views))
        reader.finish()
        fault = _why_wrong(raw, metadata, carried, has_part=arriving is not None)
        result.count("bundles read to their end")
        root, objects = _tree()
        apply(root, metadata.operations, _loader(objects))
        result.count("bundles that fit the tree")
    except (Refused, LimitExceeded) as error:
        result.count(f"rule {error.rule}")
        fault = "" if re.fullmatch(r"B-\d+", error.rule) else f"the rule is {error.rule}"
    except Exception as error:  # noqa: BLE001 - whatever is not a refusal is the fault
        fault = repr(error)
    return f"{fault}: {base64.b64encode(raw).decode()[:4000]}" if fault else ""


def _why_wrong(raw: bytes, metadata: Metadata, carried: dict[str, tuple[Content, bytes]], *, has_part: bool) -> str:
    """Return which rule a bundle breaks that was read to its end, as far as can be said in another way."""
    for text in (metadata.manifest_bytes, metadata.operations_bytes, metadata.hashes_bytes):
        if json.dumps(json.loads(text), separators=(",", ":"), ensure_ascii=False).encode() != text:
            return "JSON that is not canonical is let through"
    for each in json.loads(metadata.operations_bytes)["operations"]:
        if list(each) != [name for name in _MEMBERS if name in each] or not all(
            each.get(name, 1) for name in _DEFAULTS
        ):
            return f"the members of {each} are let through"
    for operation in metadata.operations:
        for path in filter(None, (operation.path, operation.source_path)):
            if not _is_inside(path):
                return f"the path {path!r} is let through"
        target = operation.target
        if target is not None and (not _stays(operation.path, target) or _CONTROL.search(target)):
            return f"the target {target!r} of {operation.path!r} is let through"
        for digest in filter(None, (operation.base, operation.digest)):
            if bytes.fromhex(digest).hex() != digest or len(digest) != 64:
                return f"the digest {digest!r} is let through"
    for digest, (content, found) in carried.items():
        if content.recipe is None and (digest_of(found).hex() != digest or len(found) != content.operation.size):
            return f"the content of {content.operation.path!r} is another one"
        for base, offset, size in content.recipe.segments() if content.recipe else ():
            if (
                offset + size > 2**63 - 1
                or size < 1
                or (base not in (0, 255) and base > len(content.recipe.bases if content.recipe else ()))
            ):
                return f"a segment {base} {offset} {size} is let through"
    recipes = {digest: content.recipe for digest, (content, _) in carried.items() if content.recipe}
    if has_part:
        return ""
    read: bundle.Read = lambda operation: (carried[operation.digest or ""][1],)  # noqa: E731
    again = b"".join(bundle.seal(metadata, carried.keys(), read, recipes=recipes, level=1))
    if zstandard.decompress(again) != zstandard.decompress(raw):
        return "a sender writes it in another way"
    return ""


def _is_inside(path: str) -> bool:
    parts = path.split("/")
    is_named = posixpath.normpath(path) == path and not path.startswith("/") and parts[0] not in ("..", ".")
    return is_named and ".deltasync" not in parts and not _CONTROL.search(path) and len(path.encode()) <= 4096


def _stays(path: str, target: str) -> bool:
    """Tell whether no step of a target leads above the root."""
    if target.startswith("/"):
        return False
    here = posixpath.dirname(path)
    for part in target.split("/"):
        here = posixpath.normpath(posixpath.join(here, part))
        if here == ".." or here.startswith("../"):
            return False
    return bool(target)


# Directory objects


_ENTRIES = [
    ["a.txt", "file", 3, 5, False, b"a" * 32, ""],
    ["b", "symlink", 0, 0, False, b"", "a.txt"],
    ["c", "directory", 0, 0, False, b"c" * 32, ""],
]


def _object(random: Random, result: Result) -> str:
    """Read one mutated directory object, whose digest is right."""
    import msgspec

    entries = [list(each) for each in _ENTRIES]
    for _ in range(random.choice((1, 1, 2))):
        row = random.choice(entries)
        at = random.randrange(len(row))
        row[at] = random.choice((bytes(31), bytes(33), b"")) if at == 5 else changed(random, row[at])
    if random.random() < 0.2:
        entries.insert(0, [random.choice(TEXTS), *entries[0][1:]])
    try:
        body = msgspec.msgpack.encode(entries)
    except (OverflowError, UnicodeEncodeError):
        return ""
    if random.random() < 0.3:
        body = spoiled_bytes(random, body)
    try:
        found: list[Entry] = parse_directory(body, directory_digest(body))
    except Refused as error:
        result.count(f"rule {error.rule}")
        return ""
    except Exception as error:  # noqa: BLE001 - whatever is not a refusal is the fault
        return f"{error!r}: {base64.b64encode(body).decode()}"
    result.count("objects read")
    names = [each.name for each in found]
    is_right = names == sorted(set(names)) and all(_is_inside(name) and "/" not in name for name in names)
    return "" if is_right and encode_directory(found) == body else f"let through: {base64.b64encode(body).decode()}"
