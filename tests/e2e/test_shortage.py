"""Commands that may have little: no more threads, no more memory, files larger than memory, signals all the time."""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import folders
import pytest
from serving import Served, serving
from threads import group
from user import SECONDS, Done, User

from deltasync.client.pieces import UPLOAD_FROM_BYTES

LARGE_BYTES = 2 * UPLOAD_FROM_BYTES
MIB = 1 << 20
LIMITED = """
import resource, sys
import deltasync.cli.push
from deltasync.cli.main import main
allowed = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
main()
"""
"""The program, which may take so many bytes more than it has when all of it is imported."""
MEASURED = """
import sys
from deltasync.cli.main import run
code = run(sys.argv[1:])
print(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0], file=sys.stderr)
sys.exit(code)
"""
"""The program, which says at its end how many KiB it held at most."""


@pytest.fixture
def folder(user: User, request: pytest.FixtureRequest) -> Path:
    """A folder with one of everything and a file that goes in pieces; its name is the test's."""
    root = user.home / f"w{abs(hash(request.node.nodeid)):x}"
    folders.life(root)
    folders.write(root, "large.bin", random.Random(root.name).randbytes(LARGE_BYTES))
    return root


def tree(server: Served, root: Path) -> Path:
    """Return a folder's plain tree on the server."""
    return server.data / "workspaces" / root.name / "tree"


def ended(process: subprocess.Popen[str]) -> Done:
    """Return what a command that was started says, when it has ended."""
    out, err = process.communicate(timeout=SECONDS)
    return Done(process.returncode, out, err)


def sentence(done: Done) -> str:
    """Return the one sentence of a command that failed."""
    (line,) = done.err.splitlines()
    assert "unexpected" not in line and "Traceback" not in line, line
    return line


# No more threads


@pytest.mark.parametrize("most", [1, 2])
def test_without_threads_a_push_and_a_fetch_do_one_thing_after_another(
    server: Served, user: User, folder: Path, tmp_path: Path, most: int
) -> None:
    """Bundles, pieces and contents are carried by threads where there are some, and by the program itself else."""
    dest = tmp_path / "dest"
    for words in (
        ("push", folder, "--to", server.url),
        ("fetch", "--from", server.url, dest, "--workspace", folder.name),
    ):
        with group() as threads:
            threads.limit(most)
            done = ended(user.start(*words, preexec_fn=threads.enter))
        assert (done.code, done.err) == (0, "")
    folders.assert_same(folder, tree(server, folder))
    folders.assert_same(folder, dest)


def test_a_watcher_without_threads_says_so(user: User, folder: Path) -> None:
    """It cannot do without: one sentence, and no traceback."""
    with group() as threads:
        threads.limit(1)
        done = ended(user.start("watch", folder, preexec_fn=threads.enter))
    assert done.code == 1 and "starts no more threads" in sentence(done)


def test_a_server_without_more_threads_is_busy_and_recovers(user: User, folder: Path, tmp_path: Path) -> None:
    """What needs another thread is 503; a push gets through, then or when there are threads again."""
    with group() as threads, serving(tmp_path / "data") as server:
        assert server.get("/api/v1/workspaces/w").status == 200
        threads.enter(server.process.pid)
        threads.limit(threads.count())
        with ThreadPoolExecutor(20) as askers:
            found = {each.status for each in askers.map(lambda _: server.get("/api/v1/workspaces/w"), range(60))}
        assert found == {200, 503}
        assert user.run("push", folder, "--to", server.url, "--max-retries", "0", "--timeout", "5").code in (0, 4)
        threads.limit(None)
        assert user.run("push", folder, "--to", server.url).code == 0
        folders.assert_same(folder, tree(server, folder))
        assert "Traceback" not in server.log.read_text()


# Little memory


def peak_mib(user: User, *words: object) -> float:
    """Run a command that succeeds; return how much memory it held at most."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, words), "--quiet"],
        env=user.environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=True,
    )
    print(words[0], done.stderr)
    return int(done.stderr) / 1024


def test_a_clients_peak_memory_does_not_follow_the_size_of_a_file(server: Served, user: User, tmp_path: Path) -> None:
    """A file of 192 MiB passes through a client that stays under 150 MiB, whether it is sealed, pushed or fetched."""
    root = tmp_path / f"{tmp_path.name}-large"
    root.mkdir()
    block = random.Random(1).randbytes(MIB)
    with (root / "large.bin").open("wb") as out:
        for number in range(192):
            out.write(number.to_bytes(4) + block)
    most = 150
    assert peak_mib(user, "push", root, "--state-dir", tmp_path / "state") < most
    assert peak_mib(user, "push", root, "--to", server.url) < most
    assert peak_mib(user, "fetch", "--from", server.url, "--workspace", root.name, tmp_path / "dest") < most
    assert (tmp_path / "dest/large.bin").stat().st_size == (root / "large.bin").stat().st_size


@pytest.mark.parametrize("allowed", [64 << 10, 1 << 20, 6 << 20])
def test_when_memory_runs_out_nothing_is_half_done(user: User, folder: Path, tmp_path: Path, allowed: int) -> None:
    """A push that the system gives no memory says so in one sentence; the next one does it all."""
    words = [sys.executable, "-c", LIMITED, str(allowed), "push", folder]
    environment = user.environment | {"MALLOC_ARENA_MAX": "1"}
    # What measures the command would be the first to find no memory, and says so in its own way.
    environment = {name: value for name, value in environment.items() if not name.startswith("COVERAGE_")}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode in (1, 8)
    if "SystemError" not in done.stderr:  # Python's own, where even that it has no memory cannot be said
        assert sentence(Done(done.returncode, done.stdout, done.stderr))
    outbox = folder / ".deltasync/outbox"
    assert not outbox.exists() or not os.listdir(outbox)
    assert user.run("push", folder).code == 0
    numbers = [name.split("-")[-2] for name in sorted(os.listdir(outbox))]
    assert numbers == [f"{number + 1:08}" for number in range(len(numbers))]
    words = [sys.executable, "-m", "deltasync_server", "replay", outbox, "--data", tmp_path / "data"]
    subprocess.run(words, check=True, timeout=SECONDS, stdout=subprocess.DEVNULL)
    folders.assert_same(folder, tmp_path / "data/workspaces" / folder.name / "tree")


# Signals all the time

INTERRUPTED = """
import atexit, os, signal
counted = []
signal.signal(signal.SIGALRM, lambda *_: counted.append(1))
signal.signal(signal.SIGWINCH, lambda *_: counted.append(1))
signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
atexit.register(lambda: open(os.environ["INTERRUPTIONS"], "a").write(f"{len(counted)}\\n"))
atexit.register(signal.setitimer, signal.ITIMER_REAL, 0)
"""
"""What Python runs first: from then on its system calls are interrupted two hundred times a second."""


def test_interrupted_calls_go_on(user: User, folder: Path, tmp_path: Path) -> None:
    """A push, a sealing, a fetch, and their server, whose calls all end early again and again, do what they do else."""
    counts, dest = tmp_path / "counts", tmp_path / "dest"
    folders.write(tmp_path, "first/sitecustomize.py", INTERRUPTED)
    variables = {"PYTHONPATH": str(tmp_path / "first"), "INTERRUPTIONS": str(counts)}
    with serving(tmp_path / "data", environment=variables) as server:
        for words in (
            ("push", folder, "--to", server.url),
            ("push", folder, "--state-dir", tmp_path / "state"),
            ("fetch", "--from", server.url, "--workspace", folder.name, dest),
        ):
            done = user.run(*words, "--quiet", **variables)
            assert (done.code, done.err) == (0, "")
        folders.assert_same(folder, tree(server, folder))
        assert server.stop() == 0 and "Traceback" not in server.log.read_text()
    folders.assert_same(folder, dest)
    assert len(found := counts.read_text().split()) == 4 and min(map(int, found)) > 10


def test_a_server_without_memory_goes_on_once_it_has_some(user: User, folder: Path, tmp_path: Path) -> None:
    """A push to it ends with one sentence and nothing half done; the same process takes the next one whole."""
    with serving(tmp_path / "data") as server:
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        here = next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmSize:"))
        resource.prlimit(server.process.pid, resource.RLIMIT_AS, (here, resource.RLIM_INFINITY))
        done = user.run("push", folder, "--to", server.url, "--max-retries", "0")
        assert done.code == 4 and sentence(done)
        assert not (server.data / "workspaces" / folder.name).exists()
        resource.prlimit(server.process.pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
        assert user.run("push", folder, "--to", server.url).code == 0
        folders.assert_same(folder, server.data / "workspaces" / folder.name / "tree")
        assert server.process.poll() is None
