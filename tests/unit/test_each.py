"""How many commands for many files are at a host at once, and which words of theirs are what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from deltasync.cli.progress import Meter
from deltasync.client.each import AT_ONCE_MAX, Batch, Course, Options
from deltasync.client.finished import Finished
from deltasync.client.job_request import Asked
from deltasync.client.looking import expanded
from deltasync.client.run import Runner
from deltasync.client.template import Template
from deltasync.client.transport import HttpTransport
from deltasync.core.argv import Said
from deltasync.core.errors import PlanRefused, UsageError
from deltasync.core.jobs import Capabilities

GIB = 1 << 30
ABLE = Capabilities(
    runs=True, slots=4, slots_free=4, cores=8, memory_bytes=64 * GIB, memory_free_bytes=20 * GIB, disk_free_bytes=GIB,
    links="copy", file_bytes_max=GIB, session_bytes_max=GIB, sessions_max=10, seconds_max=60.0,
)  # fmt: skip


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runner]:
    monkeypatch.setenv("DELTASYNC_HOME", str(tmp_path / "home"))
    with closing(HttpTransport("http://127.0.0.1:1", max_retries=0)) as transport:
        yield Runner(transport, note=print)


@pytest.mark.parametrize(
    ("files", "slots", "memory_bytes", "width"),
    [
        (100, 4, None, 6),
        (3, 4, None, 3),
        (100, 1000, None, AT_ONCE_MAX),
        (100, 4, 4 * GIB, 5),
        (100, 4, 7 * GIB, 2),
        (100, 4, 21 * GIB, 1),
    ],
)
def test_the_host_decides_how_many_there_are(
    runner: Runner, files: int, slots: int, memory_bytes: int | None, width: int
) -> None:
    """No more than its slots and two, than its free memory holds, and than there are files; at least one."""
    template = Template(Asked(["cat", "{}"]))
    batch = Batch(template, "/", [f"f{number}" for number in range(files)])
    able = Capabilities(**{name: getattr(ABLE, name) for name in ABLE.__struct_fields__} | {"slots": slots})
    with Finished(template, "/") as finished:
        course = Course(batch, runner, finished, Options(memory_bytes=memory_bytes), Meter())
        assert course.width(able) == width


@pytest.mark.parametrize(
    ("words", "path", "filled", "outputs"),
    [
        (["t", "{}", "{out}"], "m/a b.x", ["t", "m/a b.x", "o/a b.x"], {"o/a b.x"}),
        (["t", "if={}", "of={out}"], "m/a.x", ["t", "if={in:m/a.x}", "of={out:o/a.x}"], set()),
        (["t", "{}", "p/{stem}.{ext}2"], "a.tar.x", ["t", "a.tar.x", "p/a.tar.x2"], {"p/a.tar.x2"}),
        (["t", "{}", "-o", "p/{name}.y"], "m/a.x", ["t", "m/a.x", "-o", "p/a.x.y"], set()),
        (["t", "{out}", "{}", "-m", "masks/{name}"], "a.x", ["t", "o/a.x", "a.x", "-m", "masks/a.x"], {"o/a.x"}),
        (["t", "{}", "-i", "masks/{name}"], "a.x", ["t", "a.x", "-i", "masks/a.x"], set()),
        (["t", "{}", "keep{}"], "a.x", ["t", "a.x", "keep{}"], set()),
        (["t", "{}"], "a{1}.x", ["t", "a{1}.x"], set()),
    ],
)
def test_holes_are_filled(words: list[str], path: str, filled: list[str], outputs: set[str]) -> None:
    """Each hole becomes its part, a literal word stays, and the last word is the output where nothing else is."""
    made = Template(Asked(words, Said(literals=frozenset({"keep{}"}))), "o").of(path)
    assert (made.argv, made.said.outputs) == (filled, outputs)
    assert path in made.said.inputs


def test_a_brace_inside_a_word_is_refused() -> None:
    """A file whose name has a brace cannot be marked inside a word, which is said."""
    with pytest.raises(PlanRefused, match="brace"):
        Template(Asked(["t", "if={}"])).of("a{1}.x")


def test_patterns_stand_for_files(tmp_path: Path) -> None:
    """A pattern may stand in any component; hidden names, folders and links to folders are left out."""
    for name in ("a/one.x", "a/b/two.x", "a/.h/three.x", "a/.four.x", "c/[5].x", "c/5.x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "a/loop").symlink_to(tmp_path / "a")
    (tmp_path / "a/b/link.x").symlink_to(tmp_path / "c/5.x")
    (tmp_path / "a/folder.x").mkdir()

    def found(*patterns: str) -> list[str]:
        return expanded(patterns, str(tmp_path))

    assert found("a/**/*.x") == ["a/one.x", "a/b/link.x", "a/b/two.x"]
    assert found("*/*.x") == ["a/one.x", "c/5.x", "c/[5].x"]
    assert found("a/*/two.x", "a/b/two.x") == ["a/b/two.x"]
    assert found("a/.*.x") == ["a/.four.x"] and found("c/[5].x") == ["c/[5].x"]
    assert found(f"{tmp_path}/c/?.x") == [f"{tmp_path}/c/5.x"]
    assert found("**/two.x") == ["a/b/two.x"] and found("a/b/**") == ["a/b/link.x", "a/b/two.x"]
    with pytest.raises(UsageError, match="no file fits"):
        found("a/*.y")
