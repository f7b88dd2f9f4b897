"""Ignore rules decide as git does, in linear time, and say which line decided."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from observed import write

from deltasync.client.ignore import Decision, IgnoreRules, parse_rules

CASES = [
    ("*.log", "a.log", True), ("*.log", "d/e/a.log", True), ("*.log", "a.logs", False), ("*.log", ".log", True),
    ("build", "build", True), ("build", "d/build/x", True), ("/build", "build", True), ("/build", "d/build", False),
    ("build/", "build/x", True), ("build/", "build", False), ("d/build", "d/build", True),
    ("d/build", "e/d/build", False),
    ("a/**", "a/b/c", True), ("a/**", "a", False), ("**/b", "b", True), ("**/b", "x/y/b", True),
    ("a/**/b", "a/b", True), ("a/**/b", "a/x/y/b", True), ("a/**/b", "c/a/b", False), ("**/a/b", "x/a/b", True),
    ("a**b", "axxb", True), ("a**b/c", "axb/c", True), ("a**b/c", "ax/xb/c", False),
    ("?", "x", True), ("?", "xy", False), ("a?c", "a/c", False), ("[ab]x", "bx", True), ("[!ab]x", "bx", False),
    ("[^ab]x", "cx", True), ("[a-c]x", "bx", True), ("[]]x", "]x", True), ("[!]]x", "]x", False), ("[a-]x", "-x", True),
    ("[[:digit:]]x", "7x", True), ("[[:digit:]]x", "ax", False), ("[z-a]x", "mx", False), ("[", "[", False),
    ("\\#x", "#x", True), ("#x", "#x", False), ("\\!x", "!x", True), ("x ", "x", True), ("x\\ ", "x ", True),
    ("\\*", "*", True), ("\\*", "a", False), ("x\\", "x\\", False), ("x\r", "x", True), ("ünï*", "ünïx", True),
    ("*", "anything/at/all", True), ("**", "anything/at/all", True), ("/", "x", False), ("//x", "x", False),
    ("/**/x", "a/b/x", True), ("a.b", "axb", False), ("*.tar.*", "x.tar.gz", True), ("*a*b*c", "xaybzc", True),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "path", "is_ignored"), CASES)
def test_a_pattern_decides_as_gitignore_says(tmp_path: Path, pattern: str, path: str, is_ignored: bool) -> None:
    """One pattern in a file at the top, asked about one file."""
    (tmp_path / ".deltasyncignore").write_text(pattern + "\n", newline="")
    assert IgnoreRules(tmp_path).is_ignored(path, False) is is_ignored


def test_the_last_match_wins_and_a_deeper_file_wins_over_a_higher_one(tmp_path: Path) -> None:
    """Negation, order, levels; what lies in an ignored folder cannot come back."""
    write(tmp_path, {".deltasyncignore": "*.log\n!keep.log\nout/\n!out/in.log\n", "sub/.deltasyncignore": "!b.log\n"})
    write(tmp_path, {"sub/deep/.deltasyncignore": "keep.log\n/b.log\n"})
    rules = IgnoreRules(tmp_path)
    ignored = ["a.log", "out/in.log", "out", "sub/a.log", "sub/deep/keep.log", "sub/deep/b.log"]
    carried = ["keep.log", "sub/b.log", "sub/keep.log", "sub/deep/x/b.log", "sub"]
    assert [path for path in ignored if not rules.is_ignored(path, path == "out")] == []
    assert [path for path in carried if rules.is_ignored(path, path == "sub")] == []


def test_the_command_line_wins_and_include_wins_over_exclude(tmp_path: Path) -> None:
    """--exclude over files, --include over both."""
    write(tmp_path, {".deltasyncignore": "*.log\n!x.tmp\n"})
    rules = IgnoreRules(tmp_path, exclude=["*.tmp", "*.bin"], include=["a.log", "b.bin"])
    assert rules.on_command_line
    assert [rules.is_ignored(path, False) for path in ("x.tmp", "a.log", "b.log", "b.bin", "c.bin")] == [
        True, False, True, False, True,
    ]  # fmt: skip


def test_gitignore_files_count_only_if_asked(tmp_path: Path) -> None:
    """--gitignore reads .gitignore too; .deltasyncignore beside it wins."""
    write(tmp_path, {".gitignore": "*.o\n*.keep\n", ".deltasyncignore": "!x.keep\n"})
    assert not IgnoreRules(tmp_path).is_ignored("a.o", False)
    rules = IgnoreRules(tmp_path, gitignore=True)
    assert (rules.is_ignored("a.o", False), rules.is_ignored("x.keep", False)) == (True, False)


def test_our_own_folder_is_always_ignored(tmp_path: Path) -> None:
    """No rule brings .deltasync back."""
    rules = IgnoreRules(tmp_path, include=[".deltasync", ".deltasync/*"])
    assert rules.is_ignored(".deltasync", True)
    assert rules.is_ignored(".deltasync/state.db", False)
    assert rules.explain("a/.deltasync/x").ignored


def test_a_decision_names_rule_file_and_line(tmp_path: Path) -> None:
    """`deltasync ignore PATH` says which line decides, also for a folder above."""
    write(tmp_path, {"d/.deltasyncignore": "# first\n\nbuild/\n!*.md\n", "d/build/x": "", "d/a.md": ""})
    rules = IgnoreRules(tmp_path, exclude=["*.tmp"])
    assert rules.explain("d/build/x") == Decision(True, "build/", "d/.deltasyncignore", 3)
    assert rules.explain("d/build") == Decision(True, "build/", "d/.deltasyncignore", 3)
    assert rules.explain("d/a.md") == Decision(False, "!*.md", "d/.deltasyncignore", 4)
    assert rules.explain("x.tmp") == Decision(True, "*.tmp", None, None)
    assert rules.explain("other") == Decision(False)


def test_hostile_patterns_take_linear_time() -> None:
    """Patterns that make a backtracking matcher run for ever answer within seconds, in a process of their own (F44)."""
    program = """
from deltasync.client.ignore import parse_rules
hostile = ["*a" * 60 + "*b", "a*" * 100 + "b", "/" + "**/a/" * 60 + "b", "*" * 200 + "b", "[a-z]*" * 40 + "0"]
hostile.append("?*" * 80 + "b")
paths = [["a" * 255], ["a"] * 200, ["a" * 250] * 16]
for rule in parse_rules("\\n".join(hostile), None):
    for _ in range(20):
        for parts in paths:
            assert not rule.matches(parts, is_directory=False)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)


def test_an_ignore_file_that_is_a_link_or_too_large_is_not_read(tmp_path: Path) -> None:
    """A link leads nowhere, and a file of more than 1 MiB is no ignore file."""
    write(tmp_path, {"rules": "*\n", "big/.deltasyncignore": b"*\n" * 600_000})
    (tmp_path / ".deltasyncignore").symlink_to("rules")
    rules = IgnoreRules(tmp_path)
    assert not rules.is_ignored("x", False)
    assert not rules.is_ignored("big/x", False)
    with pytest.raises(OSError, match="larger"):
        rules.enter(None, "big", [(".deltasyncignore", 1, 1, 1, 1)])


def test_odd_bytes_in_an_ignore_file_do_no_harm(tmp_path: Path) -> None:
    """A byte-order mark is skipped; bytes that are no UTF-8 match themselves."""
    (tmp_path / ".deltasyncignore").write_bytes(b"\xef\xbb\xbf*.log\n\xff\xfe\n")
    rules = IgnoreRules(tmp_path)
    assert rules.is_ignored("a.log", False)
    assert rules.is_ignored(os.fsdecode(b"\xff\xfe"), False)


def test_a_changed_ignore_file_is_read_again_when_its_stamp_changes(tmp_path: Path) -> None:
    """The scan names the ignore files that it sees; equal stamps read nothing."""
    write(tmp_path, {".deltasyncignore": "*.a\n"})
    rules = IgnoreRules(tmp_path)
    first = rules.enter(None, "", [(".deltasyncignore", 1, 4, 1, 1)])
    assert first is not None
    write(tmp_path, {".deltasyncignore": "*.b\n"})
    assert rules.enter(None, "", [(".deltasyncignore", 1, 4, 1, 1)]) is first
    second = rules.enter(None, "", [(".deltasyncignore", 1, 4, 2, 2)])
    assert second is not None and second.fingerprint != first.fingerprint
    assert rules.decide(second, "x.b", is_directory=False).ignored
    assert rules.is_ignored("x.b", False)
    assert rules.enter(None, "", []) is None


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git as the second opinion")
@pytest.mark.parametrize("seed", range(int(os.environ.get("IGNORE_SEEDS", "3"))))
def test_random_rules_decide_as_git_does(tmp_path: Path, seed: int) -> None:
    """Random ignore files at two levels over random trees: `git check-ignore` and we agree on every path."""
    rng = random.Random(seed)
    git = ["git", "-c", "core.excludesFile=/dev/null", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    paths = sorted({"/".join(rng.choices(["a", "b", "ab", "a.b", "ba"], k=rng.randint(1, 4))) for _ in range(60)})
    files = [path for path in paths if not any(other.startswith(path + "/") for other in paths)]
    write(tmp_path, dict.fromkeys(files, ""))
    for folder in ("", "a/"):
        if (tmp_path / folder).is_dir():
            lines = [_random_pattern(rng) for _ in range(rng.randint(1, 5))]
            write(tmp_path, {f"{folder}.gitignore": "\n".join(lines) + "\n"})
    asked = "\n".join(files)
    ran = subprocess.run([*git, "check-ignore", "--stdin"], input=asked, capture_output=True, text=True, check=False)
    rules = IgnoreRules(tmp_path, gitignore=True)
    assert [path for path in files if rules.is_ignored(path, False)] == ran.stdout.splitlines()


def _random_pattern(rng: random.Random) -> str:
    parts = ["a", "b", "*", "**", "a*", "*b", "?", "[ab]", "[!a]*", "a.b", "*.*", "a**b"]
    text = "/".join(rng.choices(parts, k=rng.choice([1, 1, 1, 2, 2, 3])))
    return rng.choice(["", "", "", "!"]) + rng.choice(["", "", "/"]) + text + rng.choice(["", "", "/"])


def test_blank_and_broken_lines_are_no_rules() -> None:
    """Comments, blank lines, lone slashes, open brackets and trailing backslashes match nothing."""
    assert list(parse_rules("\n  \n# x\n/\n!\n[\nx\\\n!/\na//b\n", None)) == []
