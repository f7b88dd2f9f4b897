"""spec/6-fetch.md and the client cite each other."""

from __future__ import annotations

import re
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]


def test_the_rules_of_fetching_and_the_code_know_each_other() -> None:
    """Every rule of the page is cited by the client, and every F rule that is cited is on the page."""
    page = (PROJECT / "spec/6-fetch.md").read_text(encoding="utf-8")
    rules = set(re.findall(r"^\| (F-\d+) \|", page, re.MULTILINE))
    code = "".join(path.read_text(encoding="utf-8") for path in (PROJECT / "deltasync").rglob("*.py"))
    assert rules and rules == set(re.findall(r"\bF-\d+\b", code))
