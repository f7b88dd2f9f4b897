"""spec/7-trust.md names tests that exist, and says of every row what shows it or that it is open."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
PAGE = (PROJECT / "spec/7-trust.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (TR-\d+) \| (.+) \| (.+) \|$", PAGE, re.MULTILINE)
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
SHOWN = re.compile(rf"({NAMED.pattern}(, |$|(?=; ))){{1,4}}|(?=\*\*open\*\*)")
"""One to four tests in front of what is open, or none where the row is open."""


@cache
def functions_of(path: str) -> set[str]:
    """Return what pytest collects at the top of a file: functions, classes, and state machines given a name."""
    found: set[str] = set()
    for node in ast.parse((PROJECT / path).read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return {name for name in found if name.startswith(("test_", "Test"))}


def test_every_test_that_the_page_names_exists() -> None:
    """A test that is renamed or removed is renamed on the page, or its row is open."""
    named = set(NAMED.findall(PAGE))
    assert named
    assert [f"{path}::{name}" for path, name in sorted(named) if name not in functions_of(path)] == []


def test_every_row_names_tests_or_is_open() -> None:
    """The last column is one to four tests, `**open**` with what is missing, or both, and nothing else."""
    for number, _, shown in ROWS:
        found = SHOWN.match(shown)
        assert found, f"{number} is neither shown nor open"
        rest = shown[found.end() :].removeprefix("; ")
        assert not rest or re.fullmatch(r"\*\*open\*\*: [^`]*(`[^`]+`[^`]*)*", rest), f"{number}: {rest}"


def test_numbers_are_unique_and_in_order() -> None:
    """Every line of a table is a row, and a number stands once."""
    numbers = [int(number.removeprefix("TR-")) for number, _, _ in ROWS]
    assert numbers and numbers == sorted(set(numbers))
    assert len(ROWS) == len(re.findall(r"^\| TR-", PAGE, re.MULTILINE))
