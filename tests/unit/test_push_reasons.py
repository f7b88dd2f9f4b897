"""Why a push sends what it sends: a reason for each operation, for who asks, and what was avoided in which way."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import folders
import msgspec
import pytest
from desk import Desk, Meddler
from serving import Served, serving

from deltasync.client import reasons
from deltasync.client.push import PushReport
from deltasync.client.transport import open_transport
from deltasync.core.hashing import digest_of


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served") / "data") as running:
        yield running


@pytest.fixture
def desk(tmp_path: Path, served: Served) -> Desk:
    return Desk(tmp_path / tmp_path.name, served.url)


def told(report: PushReport) -> dict[str, str]:
    assert report.reasons is not None
    return {each.path: each.reason for each in report.reasons}


def test_every_operation_has_its_reason(desk: Desk) -> None:
    """New, copy, content changed, metadata only, moved, gone: each path says which."""
    folders.life(desk.root)
    first = desk.push(explain=True)
    assert set(told(first).values()) == {"new"} and len(told(first)) == 14
    folders.later(desk.root)
    shutil.copy2(desk.root / "readme.txt", desk.root / "twin of new content.txt")
    second = desk.push(explain=True)
    assert told(second) == {
        "new": "new",
        "new/deep": "new",
        "new/deep/file.txt": "new",
        "readme.txt": "content changed",
        "twin of new content.txt": "new",
        "empty.bin": "metadata only",
        "bin/run.sh": "metadata only",
        "clip moved.bin": "moved from media/clip.bin",
        "sources": "moved from media/raw",
        "sources/a.dat": "content changed",
        "sources/b.dat": "gone here",
        "copy.bin": "copy of media/clip.bin",
        "link": "new",
        "link/now a folder.txt": "new",
        "empty folder": "new",
    }
    assert second.more_reasons == 0
    sources = {each.path: each.source for each in second.reasons or () if each.source}
    assert sources["copy.bin"] == "media/clip.bin" and sources["sources"] == "media/raw"


def test_a_rehearsal_gives_the_same_reasons_and_a_plain_push_gives_none(desk: Desk) -> None:
    """What -n says is what happens; without being asked, nothing is explained."""
    folders.life(desk.root)
    desk.push()
    folders.later(desk.root)
    dry = desk.push(explain=True, dry_run=True)
    wet = desk.push(explain=True)
    assert sorted(told(dry).items()) == sorted(told(wet).items())
    folders.write(desk.root, "more", "1")
    assert desk.push().reasons is None


def test_bundles_that_were_sealed_without_a_server_are_explained_too(tmp_path: Path, served: Served) -> None:
    """Sealed into files they say why; sent later, they say it again."""
    desk = Desk(tmp_path / tmp_path.name)
    folders.write(desk.root, "a", "first")
    sealed = desk.push(explain=True)
    assert told(sealed) == {"a": "new"}
    folders.write(desk.root, "b", "second")
    sent = Desk(desk.root, served.url).push(explain=True)
    assert told(sent) == {"a": "new", "b": "new"}


def test_content_that_the_server_asks_for_again_says_so(desk: Desk) -> None:
    """Healing changes nothing here; its reason is the server's."""
    folders.write(desk.root, "kept", "precious")
    desk.push()
    assert desk.url
    inner = open_transport(desk.url, timeout=20, max_retries=2)
    meddler = Meddler(inner)
    ask, wanted = inner.workspace, [digest_of(b"precious").hex()]
    meddler.workspace = lambda *a, **o: msgspec.structs.replace(ask(*a, **o), wanted=wanted)  # type: ignore[attr-defined]
    healed = desk.push(transport=meddler, explain=True)
    assert told(healed) == {"kept": "resent because the server asked for it"}
    inner.close()


def test_only_the_first_reasons_are_given_and_the_others_counted(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list is bounded, over all bundles of a push; the rest is a number."""
    monkeypatch.setattr(reasons, "REASONS_MAX", 5)
    for number in range(12):
        folders.write(desk.root, f"{number:02}", str(number))
    report = desk.push(explain=True)
    assert (sorted(told(report)), report.more_reasons) == ([f"{number:02}" for number in range(5)], 7)


def test_names_in_reasons_are_safe_to_print(desk: Desk) -> None:
    """A name that would write to the terminal is escaped, in both places."""
    folders.write(desk.root, "a\u202eb", "x" * 100)
    desk.push()
    os.rename(desk.root / "a\u202eb", desk.root / "c\u202ed")
    report = desk.push(explain=True)
    (reason,) = report.reasons or ()
    assert "\u202e" not in reason.path + reason.reason + (reason.source or "")
    assert reason.source is not None and reason.reason == f"moved from {reason.source}"


def test_what_was_avoided_is_told_apart(desk: Desk) -> None:
    """Moves of files and of folders, copies and touches: each byte is counted once, in its place."""
    for number in range(4):
        folders.write(desk.root, f"folder/{number}", os.urandom(1000 + number))
    folders.write(desk.root, "alone", os.urandom(500))
    folders.write(desk.root, "touched", os.urandom(70))
    first = desk.push()
    assert (first.avoided_bytes, first.avoided_by_cache_bytes, first.avoided_by_move_bytes) == (0, 0, 0)
    os.rename(desk.root / "folder", desk.root / "moved folder")
    os.rename(desk.root / "alone", desk.root / "moved alone")
    os.utime(desk.root / "touched", ns=(1, 1))
    shutil.copy2(desk.root / "moved alone", desk.root / "copy")
    folders.write(desk.root, "new", os.urandom(33))
    report = desk.push()
    assert report.content_bytes == 33
    assert report.avoided_by_move_bytes == 4006 + 500
    assert report.avoided_by_cache_bytes == 70 + 500
    assert report.avoided_bytes == report.avoided_by_move_bytes + report.avoided_by_cache_bytes
