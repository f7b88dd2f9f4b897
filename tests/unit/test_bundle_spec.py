"""spec/1-bundle.md: every rule is cited by code and the other way round, and every example is what the code writes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import msgspec
import pytest
from corpus_faults import FAULTS
from corpus_good import good_chain
from jsonschema import Draft202012Validator

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "spec/1-bundle.md").read_text(encoding="utf-8")
RULE = re.compile(r"\bB-\d+\b")
RULES = set(re.findall(r"^\| (B-\d+) \|", PAGE, re.MULTILINE))
LIMITS = set(re.findall(r"^\| (B-\d+) \| \*\*limit\*\*", PAGE, re.MULTILINE))
NOT_REFUSING = {"B-39", "B-46", "B-56", "B-57", "B-64", "B-67", "B-68"}
"""Rules about the meaning of a bundle, or for its sender."""


def _cited() -> dict[str, str]:
    sources = [*ROOT.glob("deltasync/**/*.py"), *ROOT.glob("server/**/*.py")]
    return {rule: str(source) for source in sources for rule in RULE.findall(source.read_text(encoding="utf-8"))}


def test_every_rule_of_the_page_is_cited_by_code_and_every_cited_rule_is_on_the_page() -> None:
    """A rule that nobody cites is not implemented; a cited number that has no rule helps nobody."""
    cited = _cited()
    assert sorted(cited.keys() - RULES) == []
    assert sorted(RULES - cited.keys()) == []


def test_every_rule_that_refuses_has_a_refused_bundle() -> None:
    """No rule is without a bundle that breaks it; the rules called limits are those that the code calls limits."""
    broken = {fault.rule for fault in FAULTS if fault.rule}
    assert broken == RULES - NOT_REFUSING
    assert {fault.rule for fault in FAULTS if fault.code == "LIMIT_EXCEEDED"} == LIMITS


def test_the_json_examples_are_the_members_of_the_third_good_bundle() -> None:
    """Written canonically, the three examples are the bytes in the bundle, and the identity is the one shown."""
    examples = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    metadata = good_chain()[2].metadata
    members = [metadata.manifest_bytes, metadata.operations_bytes, metadata.hashes_bytes]
    assert [msgspec.json.encode(json.loads(example)) for example in examples] == members
    assert metadata.identity.hex() in PAGE


@pytest.mark.skipif(not (shutil.which("tar") and shutil.which("zstd")), reason="GNU tar and zstd are not installed")
def test_the_console_example_is_what_gnu_tar_says() -> None:
    """The command on the page, run from the project's root, prints the lines on the page."""
    example = re.findall(r"```console\n\$ (.*?)\n(.*?)```", PAGE, re.DOTALL)
    assert example
    for command, output in example:
        ran = subprocess.run(command.split(), cwd=ROOT, check=True, capture_output=True, text=True)
        assert ran.stdout == output


def _validator(name: str) -> Draft202012Validator:
    schema = json.loads((ROOT / f"spec/schemas/{name}.schema.json").read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def test_every_good_bundle_is_valid_by_the_schemas() -> None:
    """manifest, operations and hashes of the good chain pass their JSON Schemas."""
    manifest, operations, hashes = map(_validator, ("manifest", "operations", "hashes"))
    for step in good_chain():
        manifest.validate(json.loads(step.metadata.manifest_bytes))
        operations.validate(json.loads(step.metadata.operations_bytes))
        hashes.validate(json.loads(step.metadata.hashes_bytes))


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ("operations", {"operations": [{"operation": "updated", "kind": "directory", "path": "a"}]}),
        ("operations", {"operations": [{"operation": "created", "kind": "symlink", "path": "a"}]}),
        ("operations", {"operations": [{"operation": "created", "kind": "directory", "path": "a", "size": 1}]}),
        ("operations", {"operations": [{"operation": "deleted", "kind": "file", "path": "a", "base": "AB" * 32}]}),
        ("operations", {"operations": [{"operation": "created", "kind": "directory", "path": "/a"}]}),
        ("hashes", {"algorithm": "sha1", "files": {}}),
        ("hashes", {"algorithm": "blake3", "files": {"a": "ab"}}),
        ("manifest", {"version": "2.0"}),
    ],
)
def test_the_schemas_reject_what_the_reader_rejects(schema: str, value: object) -> None:
    """A schema is no rubber stamp: wrong shapes fail."""
    assert not _validator(schema).is_valid(value)
