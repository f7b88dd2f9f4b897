"""The numbers of the rules: each is given once, and what the code and the tests cite is there."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

_PROJECT = Path(__file__).resolve().parents[2]
_GIVEN = re.compile(r"^(?:\| )?([A-Z]{1,2}-\d+)(?: \||\. )", re.MULTILINE)
_CITED = re.compile(r"\bspec ([A-Z]{1,2}-\d+)")


def given() -> Counter[str]:
    """Return how often each number has a row, or a paragraph, of its own."""
    return Counter(number for page in (_PROJECT / "spec").glob("*.md") for number in _GIVEN.findall(page.read_text()))


def test_a_number_is_given_to_one_rule() -> None:
    """Who cites a rule means one thing by it."""
    assert [number for number, times in given().items() if times > 1] == []


def test_what_is_cited_is_a_rule() -> None:
    """No comment and no docstring names a rule that was never written, or was numbered anew."""
    sources = [path for folder in ("deltasync", "server", "tests") for path in (_PROJECT / folder).rglob("*.py")]
    cited = {(number, path.name) for path in sources for number in _CITED.findall(path.read_text())}
    prefixes = {number.partition("-")[0] for number in given()}
    unknown = {each for each in cited if each[0] not in given() and each[0].partition("-")[0] in prefixes}
    assert len(cited) > 100 and unknown == set()
