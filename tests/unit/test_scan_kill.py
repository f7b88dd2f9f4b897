"""A scan that is killed leaves a whole tree and loses little; the next one ends where it would have ended."""

from __future__ import annotations

import os
import shutil
import signal
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from observed import check, check_delta, check_rows, limbo, look, look_until_quiet, rest, seal, write

from deltasync.client import ledger
from deltasync.client.state import State
from deltasync.core.tree import walk

FILES: dict[str, str | bytes] = {f"d{n}/e{m}/f{k}": f"{n}{m}{k}" for n in range(3) for m in range(3) for k in range(5)}


@pytest.fixture(autouse=True)
def small_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write every few files instead of every 20,000."""
    monkeypatch.setenv("DELTASYNC_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(ledger, "_FLUSH_FILES", 4)
    (tmp_path / "ws").mkdir()


def scan_and_die(root: Path, statement: str, number: int) -> bool:
    """Scan in a process that kills itself at the n-th statement of a kind; tell whether it lived to the end."""
    child = os.fork()
    if child == 0:
        try:
            _scan_and_die(root, statement, number)
        except Exception:  # noqa: BLE001  # the child must not go on with the tests of its parent
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    assert status == 0
    return True


def _scan_and_die(root: Path, statement: str, number: int) -> None:
    state = State.open(root)
    left = [number]

    def count(sql: str) -> None:
        if sql.startswith(statement):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    state.db.set_trace_callback(count)
    look(state)


def kill_everywhere(root: Path, statement: str, prepare: Callable[[], None]) -> int:
    """Kill a scan at the n-th statement for n = 1, 2, 3 …, each time from the same beginning; return how often."""
    aside = root.parent / "aside"
    for number in range(1, 500):
        shutil.rmtree(root)
        root.mkdir()
        prepare()
        if scan_and_die(root, statement, number):
            return number - 1
        with State.open(root) as state:
            assert state.notes == []
            check_rows(state)
            check_delta(state)
            assert len(dict(walk(state.observed_root(), state.load))) >= state.counts()[0]
            look(state)
            check(state)
            seal(state)
            assert limbo(state) == 0
        shutil.rmtree(aside, ignore_errors=True)
    raise AssertionError("the scan never ends")


@pytest.mark.parametrize("statement", ["BEGIN", "COMMIT"])
def test_a_killed_first_scan_is_repeated(tmp_path: Path, statement: str) -> None:
    """Killed before each transaction and at each commit: a whole tree, then the true one."""
    root = tmp_path / "ws"
    assert kill_everywhere(root, statement, lambda: write(root, FILES)) >= 8


@pytest.mark.parametrize("statement", ["BEGIN", "COMMIT", "INSERT OR REPLACE INTO directories"])
def test_a_killed_scan_of_moves_is_repeated(tmp_path: Path, statement: str) -> None:
    """Moves, swaps, deletions and edits, killed everywhere: whole trees, true deltas, and in the end the true tree."""
    root = tmp_path / "ws"

    def prepare() -> None:
        write(root, FILES)
        with State.open(root) as state:
            look_until_quiet(state)
            seal(state)
        os.rename(root / "d0/e0", root / "d1/moved")
        os.rename(root / "d0", root / "z")
        os.rename(root / "d2/e1", root / "swap")
        os.rename(root / "d2/e2", root / "d2/e1")
        os.rename(root / "swap", root / "d2/e2")
        shutil.rmtree(root / "d1/e1")
        os.rename(root / "d2/e0/f0", root / "d1/e0/f9")
        write(root, {f"new/{n}/{m}": f"new{n}{m}" for n in range(3) for m in range(4)})
        write(root, {"d1/e2/f1": "edited", "z/e1/f1": "edited"})

    assert kill_everywhere(root, statement, prepare) >= 3


def test_what_was_hashed_before_the_kill_is_not_hashed_again(tmp_path: Path) -> None:
    """One folder with many files: a kill costs at most the last few."""
    root = tmp_path / "ws"
    write(root, {f"f{number:03}": str(number) for number in range(100)})
    rest(root)
    assert not scan_and_die(root, "COMMIT", 20)
    with State.open(root) as state:
        before = state.counts()[0]
        assert before >= 19 * 4
        assert look(state).hashed_files == 100 - before
        check(state)
