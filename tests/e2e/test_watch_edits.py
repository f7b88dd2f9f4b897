"""A real watcher under real edits: whatever programs do to a folder, both sides end equal, with no restart.

Full rescans are an hour apart here: only events, the barrier and the overflow hook can pass these tests.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import folders
import pytest
from folders import write
from serving import serving
from watching import Process, assert_in_step, at_home, process

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="inotify is Linux's")
HOUR = 3600.0


@dataclass
class World:
    """One folder, watched and sent to one server."""

    watcher: Process
    data: Path
    outside: Path

    @property
    def root(self) -> Path:
        return self.watcher.root

    def assert_in_step(self) -> dict[str, object]:
        return assert_in_step(self.watcher, self.data)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    base = tmp_path_factory.mktemp("edits")
    (base / "media").mkdir()
    (base / "outside").mkdir()
    folders.life(base / "media")
    with (
        at_home(base),
        serving(base / "data") as server,
        process(base / "media", to=server.url, rescan_seconds=HOUR) as watcher,
    ):
        yield World(watcher, base / "data", base / "outside")


def replaced(path: Path) -> None:
    """Save as vim, emacs, VS Code and most libraries do: a temporary file, then a rename over the old one."""
    temporary = write(path.parent, f".{path.name}.tmp", "replaced")
    os.replace(temporary, path)


def rewritten(path: Path) -> None:
    """Save in place: truncate, then write."""
    with path.open("w") as out:
        out.write("rewritten")


def backed_up(path: Path) -> None:
    """Save as vim does with backups: the old file is renamed aside, the new one is created."""
    os.rename(path, path.with_name(path.name + "~"))
    path.write_text("with a backup")


def backed_up_and_removed(path: Path) -> None:
    """Save with a backup that goes when the save is done."""
    backed_up(path)
    path.with_name(path.name + "~").unlink()


def linked(path: Path) -> None:
    """Save with a backup that is a hard link, as emacs can."""
    os.link(path, path.with_name(path.name + ".bak"))
    replaced(path)


def appended(path: Path) -> None:
    """Append as a program that logs does."""
    with path.open("a") as out:
        out.write("one more line\n")


def exchanged(path: Path) -> None:
    """Swap two files by three renames."""
    other, aside = write(path.parent, "other", "the other"), path.with_name("aside")
    os.rename(path, aside)
    os.rename(other, path)
    os.rename(aside, other)


SAVES: list[Callable[[Path], None]] = [
    replaced, rewritten, backed_up, backed_up_and_removed, linked, appended, exchanged,
]  # fmt: skip


@pytest.mark.parametrize("save", SAVES, ids=lambda save: save.__name__)
def test_every_way_to_save_a_file_is_carried(world: World, save: Callable[[Path], None]) -> None:
    """However an editor saves, the server's folder ends byte-equal."""
    path = write(world.root, f"saves/{save.__name__}/text.txt", "before")
    world.assert_in_step()
    save(path)
    world.assert_in_step()


def test_what_was_written_before_the_question_is_in_the_answer(world: World) -> None:
    """A flush sent right after a write never misses it, though the event may still be in the kernel's queue."""
    tree = world.data / "workspaces/media/tree"
    for number in range(100):
        write(world.root, f"race/f{number % 7}", f"{number}")
        world.watcher.flush()
        assert (tree / f"race/f{number % 7}").read_text() == f"{number}"


def test_a_change_is_sent_by_itself(world: World) -> None:
    """Nobody asks: a saved file, a new folder and a deletion arrive."""
    world.assert_in_step()
    write(world.root, "alone/deep/er/file.txt", "x")
    shutil.rmtree(world.root / "média", ignore_errors=True)
    world.watcher.until_same()


def test_modes_and_times_are_noticed_without_a_rescan(world: World) -> None:
    """chmod and utime change no content, and are carried all the same."""
    path = write(world.root, "modes/tool", "#!/bin/sh\n")
    world.assert_in_step()
    path.chmod(0o755)
    os.utime(write(world.root, "modes/old", "x"), ns=(10**18, 10**18))
    report = world.assert_in_step()
    assert report["operations"]["updated"] == 1  # type: ignore[index]


def test_a_file_that_stays_open_is_carried_when_somebody_asks(world: World) -> None:
    """A flush does not wait for a writer to close; what it wrote so far counts, and later what it wrote after."""
    with (world.root / "open.log").open("w") as out:
        out.write("first\n")
        out.flush()
        world.assert_in_step()
        out.write("second\n")
    world.assert_in_step()


def test_a_file_that_is_being_written_is_shown_and_sent_when_it_is_closed(world: World) -> None:
    """Nobody asks: an open file waits, status names it, and its close sends it at once."""
    world.assert_in_step()
    with (world.root / "growing.bin").open("wb") as out:
        shown: list[object] = []
        while not shown:
            out.write(b"x" * 1000)
            out.flush()
            shown = world.watcher.ask("status")["waiting"]
    world.watcher.until_same()


def test_a_folder_moved_in_and_out_is_carried(world: World) -> None:
    """mv from elsewhere, changes inside, mv to elsewhere, changes there."""
    folders.life(world.outside / "tree")
    os.rename(world.outside / "tree", world.root / "came")
    world.assert_in_step()
    folders.later(world.root / "came")
    world.assert_in_step()
    os.rename(world.root / "came", world.outside / "went")
    world.assert_in_step()
    write(world.outside, "went/after", "nobody hears this")
    assert world.assert_in_step()["bundles"] == 0


def test_a_renamed_folder_is_one_operation_and_watched_under_its_new_name(world: World) -> None:
    """mv inside the workspace sends no content, and changes below the new name are noticed."""
    for number in range(30):
        write(world.root, f"first name/sub{number % 3}/f{number}", os.urandom(2000))
    world.assert_in_step()
    os.rename(world.root / "first name", world.root / "second name")
    report = world.assert_in_step()
    assert report["operations"] == {"created": 0, "updated": 0, "moved": 1, "deleted": 0}
    assert report["content_bytes"] == 0
    write(world.root, "second name/sub1/f1", "edited")
    world.assert_in_step()


def test_an_unpacked_archive_is_carried(world: World, tmp_path: Path) -> None:
    """tar x makes folders, files, links, modes and old times in one go."""
    folders.life(tmp_path / "packed")
    folders.later(tmp_path / "packed")
    for number in range(400):
        path = write(tmp_path / "packed", f"many/d{number % 20}/f{number}", f"{number}" * 20)
        os.utime(path, ns=(number * 10**15, number * 10**15))
    with tarfile.open(tmp_path / "packed.tar", "w") as tar:
        tar.add(tmp_path / "packed", "unpacked")
    subprocess.run(["tar", "xf", tmp_path / "packed.tar", "-C", world.root], check=True)
    world.assert_in_step()


def test_a_copied_tree_is_carried_without_content(world: World) -> None:
    """cp -a duplicates a tree: new entries, old content."""
    for number in range(50):
        write(world.root, f"original/d{number % 5}/f{number}", os.urandom(3000))
    world.assert_in_step()
    subprocess.run(["cp", "-a", world.root / "original", world.root / "duplicate"], check=True)
    report = world.assert_in_step()
    assert report["content_bytes"] == 0


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_git_checkout_is_carried(world: World) -> None:
    """Branches of a real repository, switched back and forth, with files, folders and links that come and go."""
    repository = world.root / "repository"
    repository.mkdir()
    quiet = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}

    def git(*words: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "gc.auto=0"]
        subprocess.run(["git", *identity, *words], cwd=repository, check=True, env=quiet, capture_output=True)

    git("init", "-q", "-b", "main")
    for number in range(150):
        write(repository, f"src/p{number % 10}/m{number}.py", f"# {number}\n" * 30)
    git("add", "-A")
    git("commit", "-qm", "first")
    git("checkout", "-qb", "other")
    folders.life(repository)
    shutil.rmtree(repository / "src/p3")
    os.rename(repository / "src/p4", repository / "src/q4")
    for number in range(0, 150, 7):
        if (repository / f"src/p{number % 10}").is_dir():
            write(repository, f"src/p{number % 10}/m{number}.py", "changed\n")
    git("add", "-A")
    git("commit", "-qm", "second")
    world.assert_in_step()
    for branch in ("main", "other", "main"):
        git("checkout", "-q", branch)
        world.assert_in_step()
    git("gc", "-q")
    world.assert_in_step()


def test_an_ignore_file_counts_from_the_moment_that_it_is_saved(world: World) -> None:
    """New rules hold at once, also for folders that were not watched before; what they newly ignore stays."""
    write(world.root, "rules/build/out.o", "object")
    write(world.root, "rules/.deltasyncignore", "build/\n*.tmp\n")
    world.watcher.flush()
    tree = world.data / "workspaces/media/tree/rules"
    write(world.root, "rules/noise.tmp", "x")
    write(world.root, "rules/build/more.o", "x")
    world.watcher.flush()
    assert sorted(path.name for path in tree.iterdir()) == [".deltasyncignore"]
    write(world.root, "rules/.deltasyncignore", "*.tmp\n")
    world.watcher.flush()
    write(world.root, "rules/build/last.o", "x")
    world.watcher.flush()
    assert sorted(path.name for path in (tree / "build").iterdir()) == ["last.o", "more.o", "out.o"]
    shutil.rmtree(world.root / "rules")
    world.assert_in_step()


def test_names_that_cannot_be_carried_are_problems_that_pass(world: World) -> None:
    """A bad name, a FIFO and a link to elsewhere are said once each, and said to be over when they are gone."""
    since = len(world.watcher.events)
    (world.root / "odd").mkdir()
    os.mkfifo(world.root / "odd/pipe")
    os.symlink("/etc/passwd", world.root / "odd/away")
    write(world.root, "odd/good", "x")
    bad = os.open(os.fsencode(world.root) + b"/odd/\xff.txt", os.O_CREAT | os.O_WRONLY)
    os.close(bad)
    report = world.watcher.flush()
    assert len(report["problems"]) == 3
    assert (world.data / "workspaces/media/tree/odd/good").read_text() == "x"
    for _ in range(3):
        problem = world.watcher.heard("problem", since)
        since += 1 + world.watcher.events[since:].index(problem)
    shutil.rmtree(world.root / "odd")
    world.watcher.heard("solved", since)
    world.assert_in_step()


WRITERS = """
import os, sys
folder, count = sys.argv[1], int(sys.argv[2])
for number in range(count):
    with open(f"{folder}/f{number}", "wb") as out:
        out.write(b"%d" % number)
"""


def burst(root: Path, writers: int, count: int) -> None:
    """Create files from several processes at once."""
    running = []
    for number in range(writers):
        (root / f"w{number}").mkdir(parents=True, exist_ok=True)
        running.append(subprocess.Popen([sys.executable, "-c", WRITERS, str(root / f"w{number}"), str(count)]))
    assert [process.wait() for process in running] == [0] * writers


@pytest.mark.slow
def test_forty_thousand_creates_in_a_burst_are_all_carried(world: World) -> None:
    """Four writers at once, while the watcher sends all the time; every file arrives."""
    burst(world.root / "burst", 4, 10_000)
    report = world.assert_in_step()
    assert report["workspace"] == "media"
    assert sum(1 for _ in (world.data / "workspaces/media/tree/burst").rglob("f*")) == 40_000


@pytest.mark.slow
def test_ten_thousand_folders_are_kept_in_step_by_events_alone(tmp_path: Path) -> None:
    """A wide tree: edits all over it, moved and removed folders, and an overflow, with no rescan to help.

    The watcher is stopped during the burst, as on a machine that sleeps, so that the kernel's queue must overflow.
    """
    root, data = tmp_path / "wide", tmp_path / "data"
    for number in range(10_000):
        (root / f"a{number % 10}/b{number % 100}/d{number}").mkdir(parents=True)
        if number % 4 == 0:
            (root / f"a{number % 10}/b{number % 100}/d{number}/f").write_bytes(b"%d" % number)
    with (
        at_home(tmp_path),
        serving(data) as server,
        process(root, to=server.url, rescan_seconds=HOUR) as watcher,
    ):
        watcher.flush()
        assert watcher.ask("status")["coverage"]["watched_folders"] == 10_111
        for number in range(0, 10_000, 97):
            write(root, f"a{number % 10}/b{number % 100}/d{number}/g", f"edited {number}")
        os.rename(root / "a3", root / "a7/b7/moved")
        shutil.rmtree(root / "a5/b55")
        os.rename(root / "a7/b7/moved/b13", root / "b13")
        for name in ("w0", "w1"):
            (root / "a1/new" / name).mkdir(parents=True)
        assert_in_step(watcher, data)
        write(root, "b13/d13/late", "below two moves")
        since = len(watcher.events)
        watcher.signal(signal.SIGSTOP)
        burst(root / "a1/new", 2, 9_000)
        (root / "a1/new/w0/below/the/burst").mkdir(parents=True)
        watcher.signal(signal.SIGCONT)
        assert "queue" in watcher.heard("rescan", since)["reason"]
        write(root, "a1/new/w0/below/the/burst/file", "behind the overflow")
        assert_in_step(watcher, data)


def test_a_young_file_is_waited_for_without_a_word(world: World) -> None:
    """Files that are moved in while they are young settle and are sent; none is told as a problem, nor as solved."""
    world.assert_in_step()
    since = len(world.watcher.events)
    for number in range(3):
        write(world.outside, f"young/deep/{number}.txt", "young")
    write(world.root, "other.txt", "a bundle is sealed meanwhile")
    shutil.move(world.outside / "young", world.root / "young")
    world.watcher.until_same()
    told = {event["event"] for event in world.watcher.events[since:]}
    assert not told & {"problem", "solved"}, world.watcher.events[since:]
