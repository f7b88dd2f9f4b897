"""The doctor finds what may go wrong, says it in one sentence each, and changes nothing."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from observed import write

from deltasync.client.doctor import EXAMPLES, Finding, Level, examine
from deltasync.core.errors import RootUnavailable


@pytest.fixture(autouse=True)
def _now() -> None:
    """Take the time when a test begins: a file that it writes must not be from the future."""
    global NOW
    NOW = datetime.now(UTC)


NOW = datetime.now(UTC)


def found(root: Path, topic: str, **facts: object) -> list[Finding]:
    return [finding for finding in examine(root, now=NOW, **facts) if finding.topic == topic]  # type: ignore[arg-type]


def test_a_healthy_folder_has_nothing_to_say(tmp_path: Path) -> None:
    """Every finding is fine, and the probe leaves no file."""
    write(tmp_path, {"a/b": "x", ".deltasync/": ""})
    findings = examine(tmp_path, now=NOW, server_date=NOW, max_watches=1000)
    assert {finding.level for finding in findings} <= {Level.OK}
    assert {finding.topic for finding in findings} == {"names", "watches", "links", "clock", "space"}
    assert os.listdir(tmp_path / ".deltasync") == []


def test_names_that_are_not_legal_everywhere_are_listed(tmp_path: Path) -> None:
    """Device names, trailing dots, backslashes, twins of case and of Unicode form (F5-F8)."""
    write(tmp_path, {"con": "", "d/trail.": "", "space ": "", "a\\b": "", "A": "", "a": "", "d/é": "", "d/e\u0301": ""})
    text = "\n".join(finding.sentence for finding in found(tmp_path, "names"))
    for name in ("con", "d/trail.", "space ", "a\\b", "'A', 'a'"):
        assert name in text
    assert "2 group(s)" in text
    assert all(finding.level is Level.WARNING for finding in found(tmp_path, "names"))


def test_names_that_are_not_carried_are_problems(tmp_path: Path) -> None:
    """Control characters and bytes that are no UTF-8, shown escaped (F1-F3)."""
    os.close(os.open(os.fsencode(tmp_path) + b"/x\n\xff", os.O_CREAT))
    finding = found(tmp_path, "names")[0]
    assert finding.level is Level.PROBLEM
    assert finding.sentence.isprintable()


def test_workspaces_inside_are_a_note(tmp_path: Path) -> None:
    """They are pushed by themselves, so their state is no reserved name, and what is in them is theirs to examine."""
    write(tmp_path, {"inner/.deltasync/state.db": "db", "inner/con": "", "d/two/.deltasync/state.db": "db"})
    note, *others = found(tmp_path, "names")
    assert note == Finding(
        Level.NOTE, "names", "2 folder(s) are workspaces of their own; push each by itself: d/two; inner"
    )
    assert {each.level for each in others} == {Level.OK}
    write(tmp_path, {"other/.deltasync/x": ""})
    assert "reserved" in found(tmp_path, "names")[0].sentence and found(tmp_path, "names")[0].level is Level.PROBLEM


def test_only_some_examples_are_named(tmp_path: Path) -> None:
    """A thousand bad names are one sentence of bearable length."""
    write(tmp_path, {f"{number}.": "" for number in range(100)})
    sentence = found(tmp_path, "names")[0].sentence
    assert f"and {100 - EXAMPLES} more" in sentence


def test_watch_headroom_is_weighed(tmp_path: Path) -> None:
    """Enough, little, and too few watches; a system without a limit."""
    write(tmp_path, {f"d{number}/": "" for number in range(9)})
    levels = [found(tmp_path, "watches", max_watches=limit)[0].level for limit in (100, 11, 5)]
    assert levels == [Level.OK, Level.WARNING, Level.PROBLEM]
    assert "sysctl" in found(tmp_path, "watches", max_watches=5)[0].sentence


def test_clocks_are_compared(tmp_path: Path) -> None:
    """Files from the future, and a server whose clock is far away."""
    write(tmp_path, {"f": ""})
    os.utime(tmp_path / "f", (NOW.timestamp() + 3600, NOW.timestamp() + 3600))
    assert "f" in found(tmp_path, "clock")[0].sentence
    apart = found(tmp_path, "clock", server_date=NOW - timedelta(hours=2))
    assert [finding.level for finding in apart] == [Level.WARNING, Level.WARNING]
    assert "7200 s apart" in apart[1].sentence


def test_a_folder_that_is_no_workspace_is_not_written_to(tmp_path: Path) -> None:
    """Without a state's folder no link is tried."""
    write(tmp_path, {"f": ""})
    assert found(tmp_path, "links")[0].level is Level.NOTE
    assert os.listdir(tmp_path) == ["f"]


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    """There is nothing to examine."""
    with pytest.raises(RootUnavailable):
        examine(tmp_path / "missing", now=NOW)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_unreadable_folders_are_problems(tmp_path: Path) -> None:
    """A folder that cannot be listed is named, and a state's folder that cannot be written."""
    write(tmp_path, {"d/x": "", ".deltasync/": ""})
    (tmp_path / "d").chmod(0)
    for folder in tmp_path.parents:
        folder.chmod(folder.stat().st_mode | 0o111)
    tmp_path.chmod(0o755)
    os.seteuid(65534)
    try:
        findings = examine(tmp_path, now=NOW)
    finally:
        os.seteuid(0)
    problems = {finding.topic: finding.sentence for finding in findings if finding.level is Level.PROBLEM}
    assert "d (Permission denied)" in problems["reading"]
    assert "nothing can be written" in problems["links"]
