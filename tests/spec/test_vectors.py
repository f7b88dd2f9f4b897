"""The vectors of spec/vectors hold for the code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from trees import Flat, Objects, directory, file, symlink

from deltasync.core import names
from deltasync.core.delta import apply
from deltasync.core.errors import Refused
from deltasync.core.hashing import directory_digest
from deltasync.core.manifest import EMPTY_ROOT, Entry, Kind, Operation, encode_directory, parse_directory
from deltasync.core.sequence import Head, Header, Verdict, decide

SPEC = Path(__file__).parents[2] / "spec"


def _vectors(name: str) -> Any:
    return json.loads((SPEC / "vectors" / name).read_text())


PATHS = _vectors("paths.json")
ROOTS = _vectors("roots.json")
SEQUENCE = _vectors("sequence.json")
DELTAS = _vectors("deltas.json")


@pytest.mark.parametrize("text", PATHS["good"])
def test_good_paths_are_taken_as_they_are(text: str) -> None:
    """P-1 to P-7: a good path is returned unchanged."""
    assert names.parse_path(text) == text


@pytest.mark.parametrize("text", PATHS["refused"])
def test_bad_paths_are_refused(text: str) -> None:
    """P-1 to P-7: a bad path raises NameRefused with a reason."""
    with pytest.raises(names.NameRefused, match=r"\w"):
        names.parse_path(text)


@pytest.mark.parametrize("text", PATHS["refused"])
def test_a_bad_path_of_one_part_is_no_name_either(text: str) -> None:
    """The name parser refuses what the path parser refuses."""
    if text.count("/") == 0:
        with pytest.raises(names.NameRefused):
            names.parse_name(text)


@pytest.mark.parametrize("text", PATHS["workspace_good"])
def test_good_workspace_names(text: str) -> None:
    """P-8: a good workspace name is returned unchanged."""
    assert names.parse_workspace(text) == text


@pytest.mark.parametrize("text", PATHS["workspace_refused"])
def test_bad_workspace_names(text: str) -> None:
    """P-8: a bad workspace name is refused."""
    with pytest.raises(names.NameRefused):
        names.parse_workspace(text)


@pytest.mark.parametrize(("path", "target"), PATHS["targets_inside"])
def test_links_that_stay_inside(path: str, target: str) -> None:
    """P-9: a target that stays inside is carried as text."""
    assert names.parse_target(path, target) == target


@pytest.mark.parametrize(("path", "target"), PATHS["targets_outside"])
def test_links_that_leave(path: str, target: str) -> None:
    """P-9: a target that leaves, or is no text, is refused."""
    with pytest.raises(names.NameRefused):
        names.parse_target(path, target)


def _flat(tree: dict[str, Any], prefix: str = "") -> Flat:
    flat: Flat = {}
    for name, node in tree.items():
        path = prefix + name
        if "entries" in node:
            flat[path] = directory(path)
            flat.update(_flat(node["entries"], path + "/"))
        elif "target" in node:
            flat[path] = symlink(path, node["target"])
        else:
            mtime_ns, executable = node.get("mtime_ns", 0), node.get("executable", False)
            flat[path] = file(path, node["content"].encode(), mtime_ns=mtime_ns, executable=executable)
    return flat


@pytest.mark.parametrize("vector", ROOTS, ids=lambda vector: vector["name"])
def test_roots(vector: dict[str, Any]) -> None:
    """T-2, T-3, T-4, T-7: body and root of a tree are those that an independent writer computed."""
    objects = Objects()
    root = objects.build(_flat(vector["tree"]))
    assert root.hex() == vector["root"]
    if root != EMPTY_ROOT:
        assert objects[root].hex() == vector["body"]
        assert encode_directory(parse_directory(objects[root], root)) == objects[root]


def test_the_example_in_the_text_is_the_vector() -> None:
    """The body that spec/0-tree.md shows is that of the vector "one empty file"."""
    shown = (SPEC / "0-tree.md").read_text().split("```hex\n")[1].split("\n")[0]
    assert shown == next(vector["body"] for vector in ROOTS if vector["name"] == "one empty file")


GOOD = Entry("a", Kind.FILE, 1, 1, False, b"\1" * 32)
BAD_OBJECTS = {
    "T-4 order": [Entry("b", Kind.DIRECTORY, digest=EMPTY_ROOT), GOOD],
    "T-4 twice": [GOOD, GOOD],
    "T-5 short digest": [Entry("a", Kind.FILE, 1, 1, False, b"\1" * 31)],
    "T-5 negative size": [Entry("a", Kind.FILE, -1, 1, False, b"\1" * 32)],
    "T-5 file with target": [Entry("a", Kind.FILE, 1, 1, False, b"\1" * 32, "x")],
    "T-5 directory with size": [Entry("a", Kind.DIRECTORY, 1, digest=EMPTY_ROOT)],
    "T-5 link with digest": [Entry("a", Kind.SYMLINK, digest=b"\1" * 32, target="x")],
    "T-6 link without target": [Entry("a", Kind.SYMLINK)],
    "T-6 name": [Entry("..", Kind.FILE, 1, 1, False, b"\1" * 32)],
    "T-6 reserved": [Entry(".deltasync", Kind.DIRECTORY, digest=EMPTY_ROOT)],
    "T-6 absolute link": [Entry("a", Kind.SYMLINK, target="/etc")],
}


@pytest.mark.parametrize("case", BAD_OBJECTS)
def test_a_foreign_directory_object_that_breaks_a_rule_is_refused_by_it(case: str) -> None:
    """T-4 to T-6: each fault is refused by its own rule, with the digest right."""
    body = encode_directory(BAD_OBJECTS[case])
    with pytest.raises(Refused) as caught:
        parse_directory(body, directory_digest(body))
    assert caught.value.rule == case.split()[0]


def test_a_foreign_directory_object_must_be_canonical_and_have_its_digest() -> None:
    """T-2, T-3: other bytes, a longer integer form, or another digest are refused."""
    body = encode_directory([GOOD])
    longer = body.replace(b"\x01\x01\xc2", b"\xcc\x01\x01\xc2")
    for wrong, rule in (
        (longer, "T-2"),
        (body + b"\xc0", "T-2"),
        (b"\xc1", "T-2"),
        (b"\x91\x92\xa1\xff\xa4file", "T-2"),
    ):
        with pytest.raises(Refused) as caught:
            parse_directory(wrong, directory_digest(wrong))
        assert caught.value.rule == rule
    with pytest.raises(Refused) as caught:
        parse_directory(body, directory_digest(body + b"x"))
    assert caught.value.rule == "T-3"


@pytest.mark.parametrize("case", SEQUENCE["cases"], ids=lambda case: case["name"])
def test_the_sequence_table(case: dict[str, Any]) -> None:
    """S-1 to S-8: every row of the table."""
    head = SEQUENCE["heads"][case["head"]]
    client_id, epoch, sequence, parent = case["header"]
    root = bytes.fromhex(head["root"]) if head["root"] else EMPTY_ROOT
    identity = b"\7" * 32
    recorded = {None: None, "same": identity, "other": b"\x08" * 32}[case["recorded"]]
    header = Header(client_id, epoch, sequence, bytes.fromhex(parent) if parent else EMPTY_ROOT, identity)
    known = Head(head["client_id"], head["epoch"], head["sequence"], root, frozenset(head["past_epochs"]))
    assert decide(known, recorded, header, take_over=case["take_over"]) is Verdict[case["verdict"]]


def _short(tree: dict[str, str]) -> Flat:
    flat: Flat = {}
    for short, content in tree.items():
        path = short.rstrip("/")
        if short.endswith("/"):
            flat[path] = directory(path)
        elif content.startswith("->"):
            flat[path] = symlink(path, content[2:])
        else:
            flat[path] = file(path, content.encode(), mtime_ns=0)
    return flat


@pytest.mark.parametrize("vector", DELTAS["good"], ids=lambda vector: vector["name"])
def test_deltas(vector: dict[str, Any]) -> None:
    """B-39: each delta turns the tree before into the tree after, in any order of its operations."""
    objects = Objects()
    before, after = objects.build(_short(vector["before"])), objects.build(_short(vector["after"]))
    operations = msgspec.convert(vector["operations"], list[Operation])
    for order in (operations, operations[::-1]):
        assert apply(before, order, objects.load).root == after


@pytest.mark.parametrize("vector", DELTAS["refused"], ids=lambda vector: vector["name"])
def test_deltas_that_do_not_fit_the_tree_are_refused_by_their_rule(vector: dict[str, Any]) -> None:
    """B-40 to B-44: an operation that does not fit the tree is refused, and says which rule it breaks."""
    objects = Objects()
    before = objects.build(_short(vector["before"]))
    with pytest.raises(Refused) as caught:
        apply(before, msgspec.convert(vector["operations"], list[Operation]), objects.load)
    assert caught.value.rule == vector["rule"]
