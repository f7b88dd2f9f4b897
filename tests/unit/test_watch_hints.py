"""Hints: what was heard is taken once, bursts are bounded, and a file settles when its writer is done."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from deltasync.client import hints as module
from deltasync.client.hints import Dirt, Hints


@dataclass
class Clock:
    """A clock that tests turn by hand; the wall clock runs with it."""

    now: float = 1000.0
    wakes: list[float] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now

    def wake(self) -> None:
        self.wakes.append(self.now)

    def hints(self, settle_seconds: float = 2.0) -> Hints:
        heard = Hints(self.wake, settle_seconds=settle_seconds, clock=self, wall=self)
        heard.covered(is_whole=True)
        return heard


@pytest.fixture
def clock() -> Clock:
    return Clock()


def status(*, size: int = 1, mtime: float = 0.0) -> os.stat_result:
    return os.stat_result((0o100644, 1, 1, 1, 0, 0, size, mtime, mtime, mtime))


def test_what_was_heard_is_taken_once(clock: Clock) -> None:
    """Dirty folders come once each, and a second take is empty."""
    heard = clock.hints()
    heard.changed("a", "b")
    heard.changed("a")
    assert heard.take() == Dirt(frozenset({"a", "b"}))
    assert heard.take() == Dirt(frozenset())


def test_only_the_first_hint_wakes_the_loop(clock: Clock) -> None:
    """A burst wakes the watch loop once; the loop then waits by itself for the quiet moment."""
    heard = clock.hints()
    for number in range(100):
        heard.changed(str(number))
    assert len(clock.wakes) == 1
    heard.take()
    heard.changed("again")
    assert len(clock.wakes) == 2


def test_a_look_is_due_after_a_quiet_moment_and_at_last_after_the_burst_limit(clock: Clock) -> None:
    """Each hint puts the look off by the debounce, but never beyond the limit after the first one."""
    heard = clock.hints()
    assert heard.due_at(0.25, 2.0) == math.inf
    heard.changed("")
    assert heard.due_at(0.25, 2.0) == 1000.25
    clock.now = 1000.2
    heard.changed("")
    assert heard.due_at(0.25, 2.0) == 1000.45
    clock.now = 1001.9
    heard.changed("")
    assert heard.due_at(0.25, 2.0) == 1002.0


def test_too_many_folders_become_everything(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The set of dirty folders is bounded: beyond it the answer is "everything"."""
    monkeypatch.setattr(module, "FOLDERS_MAX", 3)
    heard = clock.hints()
    heard.changed("a", "b", "c")
    heard.adopted(["d"])
    assert heard.take().folders is None


@pytest.mark.parametrize(
    ("tell", "expected"),
    [
        (lambda heard: heard.lost("overflow"), Dirt(None, is_lost=True, reasons=("overflow",))),
        (lambda heard: heard.rules_changed(), Dirt(None, are_rules_changed=True)),
        (lambda heard: heard.everything(), Dirt(None)),
    ],
)
def test_a_loss_makes_everything_dirty(clock: Clock, tell: Callable[[Hints], None], expected: Dirt) -> None:
    """Lost events, changed rules and the periodic rescan ask for everything, whatever else was heard."""
    heard = clock.hints()
    tell(heard)
    tell(heard)
    heard.changed("a")
    assert heard.take() == expected


def test_a_closed_file_is_settled_at_once_and_an_open_one_after_the_settle_time(clock: Clock) -> None:
    """A writer's close settles a file; a file that stays open settles when it was not written for two seconds."""
    heard = clock.hints()
    clock.now += 10
    heard.written("d", "d/closed")
    heard.closed("d", "d/closed")
    heard.written("d", "d/open")
    clock.now += 0.25
    assert heard.is_settled("d/closed", status(mtime=1010.0))
    assert not heard.is_settled("d/open", status(mtime=1010.0))
    assert heard.due_at(0.25, 2.0) == 1010.25
    heard.take()
    assert heard.due_at(0.25, 2.0) == 1012.0
    clock.now = 1012.0
    assert heard.take().folders == {"d"}
    assert heard.is_settled("d/open", status(mtime=1010.0))
    assert heard.due_at(0.25, 2.0) == math.inf


def test_a_waiting_file_is_shown_with_its_size_and_rate(clock: Clock) -> None:
    """Between two looks a growing file's rate is what it grew."""
    heard = clock.hints()
    heard.written("", "log")
    heard.is_settled("log", status(size=100, mtime=1000.0))
    clock.now += 2
    heard.written("", "log")
    heard.is_settled("log", status(size=300, mtime=1002.0))
    (waiting,) = heard.waiting()
    assert (waiting.path, waiting.size, waiting.bytes_per_second) == ("log", 300, 100.0)
    assert heard.waiting_folders() == {""}


def test_a_file_of_which_nothing_was_heard_settles_by_its_age(clock: Clock) -> None:
    """After a loss silence means nothing: a young file waits until it did not change for the settle time."""
    heard = clock.hints()
    heard.lost("overflow")
    heard.covered(is_whole=True)
    heard.take()
    assert heard.is_settled("old", status(mtime=990.0))
    assert not heard.is_settled("young", status(mtime=999.0))
    clock.now += 1
    assert not heard.is_settled("young", status(mtime=1000.5)), "it changed again"
    clock.now += 1.9
    assert heard.is_settled("young", status(mtime=1000.5)) is True


def test_a_time_stamp_from_the_future_does_not_keep_a_file_waiting(clock: Clock) -> None:
    """Where the wall clock is of no help, the same stat for the settle time is enough."""
    heard = clock.hints()
    heard.covered(is_whole=False)
    assert not heard.is_settled("f", status(mtime=9999.0))
    clock.now += 2
    assert heard.is_settled("f", status(mtime=9999.0))


def test_a_change_younger_than_the_readers_lag_waits_a_moment(clock: Clock) -> None:
    """A file changed just now may have events that were not read yet."""
    heard = clock.hints()
    clock.now += 10
    assert not heard.is_settled("f", status(mtime=clock.now - 0.01))
    assert heard.due_at(0.25, 2.0) == pytest.approx(clock.now + 0.04)


def test_silence_in_a_freshly_adopted_folder_means_nothing(clock: Clock) -> None:
    """What happened in a new folder before its watch was not heard."""
    heard = clock.hints()
    clock.now += 10
    heard.adopted(["new"])
    assert not heard.is_settled("new/f", status(mtime=clock.now - 0.5))
    assert heard.is_settled("old/f", status(mtime=clock.now - 0.5))
    clock.now += 2
    assert heard.is_settled("new/f", status(mtime=clock.now - 0.5))


def test_a_close_settles_a_file_where_silence_does_not(clock: Clock) -> None:
    """Just after the start, and in a folder just adopted, a file that was heard to be closed need not wait."""
    heard = clock.hints()
    heard.written("", "f")
    heard.closed("", "f")
    assert heard.is_settled("f", status(mtime=clock.now))
    heard.written("", "f")
    assert not heard.is_settled("f", status(mtime=clock.now))
    clock.now += 10
    heard.adopted(["new"])
    heard.closed("new", "new/f")
    assert heard.is_settled("new/f", status(mtime=clock.now))


def test_a_waiting_file_that_is_gone_is_forgotten_by_the_look_that_misses_it(clock: Clock) -> None:
    """A look forgets the waiting files of its folders that it did not meet, and no others."""
    heard = clock.hints()
    heard.written("a", "a/f")
    heard.written("b", "b/f")
    for path in ("a/f", "b/f"):
        heard.is_settled(path, status(mtime=1000.0))
    heard.take()
    clock.now += 0.5
    heard.looked(Dirt(frozenset({"a"})), at=clock.now)
    assert [waiting.path for waiting in heard.waiting()] == ["b/f"]
    heard.looked(Dirt(None), at=clock.now)
    assert heard.waiting() == []


def test_forgotten_writers_are_judged_by_age(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of open writers is bounded; beyond it no file is called settled too early."""
    monkeypatch.setattr(module, "WRITERS_MAX", 2)
    heard = clock.hints()
    clock.now += 10
    for number in range(3):
        heard.written("", f"f{number}")
    assert not heard.is_settled("f0", status(mtime=clock.now - 1))
    clock.now += 2
    assert heard.is_settled("f0", status(mtime=clock.now - 3))


def test_more_fresh_folders_than_remembered_leave_nothing_covered(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a whole tree moved in, silence counts again only after the settle time."""
    monkeypatch.setattr(module, "FOLDERS_MAX", 2)
    heard = clock.hints()
    clock.now += 10
    heard.adopted(["a", "b", "c"])
    assert not heard.is_settled("elsewhere/f", status(mtime=clock.now - 1))


def test_without_settle_time_every_file_is_settled(clock: Clock) -> None:
    """--settle 0 waits for nobody."""
    heard = clock.hints(settle_seconds=0)
    heard.written("", "f")
    assert heard.is_settled("f", status(mtime=clock.now - 1))
