"""A small slice of `make torture` with every test run: each harness for a moment, and one planted defect."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from torture import families, hostile, powercut, routes
from torture.harness import NAMES, PROJECT, Defect, Result, Work, load
from torture.inside import inside
from torture.runner import catch, planted, unmeasured

_chance = random.SystemRandom()
_RACES = ("swaps", "kills", "diskfaults")
"""They meet a defect by chance, sooner or later: `make torture` gives them the time."""
_SECONDS = 60.0
"""Nothing here takes that long; a harness stops by itself if it does."""


@pytest.mark.parametrize("name", NAMES)
def test_a_harness_finds_nothing_in_a_moment(name: str, tmp_path: Path) -> None:
    """Some points of each, others in each run: no fault."""
    seed, harness = _chance.randrange(2**32), load(name)
    print(f"seed {seed}")
    result = harness.run(Work(seed, harness.SLICE, time.monotonic() + _SECONDS, tmp_path))
    assert result.faults == []
    if not result.points:
        pytest.skip(f"{name} cannot be tried here: {result.skipped}")


def test_a_foreign_name_is_like_one_that_never_was_on_every_route(tmp_path: Path) -> None:
    """One table of every route: what another tenant has gets the status and body of what nobody has (TR-4)."""
    result = Result()
    with inside(tmp_path, needs_token=True) as server:
        routes.ask_as_foreigner(routes.Place(server, random.Random(), result))
    assert result.faults == []
    assert result.points >= 25


def test_a_client_whose_disk_lied_heals_with_the_next_push(tmp_path: Path) -> None:
    """It loses what its disk lost and no more, and has the server delete nothing that is there (TR-64)."""
    seed = _chance.randrange(2**32)
    print(f"seed {seed}")
    result = powercut.run(Work(seed, 5, time.monotonic() + _SECONDS, tmp_path, hint=powercut.CLIENT))
    assert result.faults == []
    if not result.points:
        pytest.skip(f"power cuts cannot be tried here: {result.skipped}")


@pytest.mark.parametrize("rule", ["B-8", "B-62"])
def test_a_bomb_costs_little_memory_and_time(rule: str, tmp_path: Path) -> None:
    """Each is refused with less than 256 MiB of memory and in less than 5 s, and nothing of it is left (TR-22)."""
    there = sum(each.name.startswith(f"{rule}-") for each in families.hostile_bundles())
    result = hostile.run(Work(0, there, time.monotonic() + _SECONDS, tmp_path, hint=f"{rule}-"))
    assert (result.faults, result.points) == ([], there)


def test_a_planted_defect_is_caught() -> None:
    """One of them, another one in each run: the harness that is for it notices."""
    names = [name for name in NAMES if name not in _RACES]
    name, defect = _chance.choice([(name, defect) for name in names for defect in load(name).DEFECTS])
    seed = _chance.randrange(2**32)
    print(f"seed {seed}: {name}, {defect.name}")
    outcome, missed = catch(name, defect, seed=seed, points=load(name).GOAL, seconds=_SECONDS)
    if outcome.is_untried:
        pytest.skip(f"{name} cannot be tried here: {outcome.result.skipped}")
    assert missed == ""


@pytest.mark.parametrize("name", NAMES)
def test_a_harness_has_defects_and_each_can_be_planted(name: str) -> None:
    """Every text stands in the product exactly once, and breaks a row of the page of threats."""
    harness, page = load(name), (PROJECT / "spec/7-trust.md").read_text(encoding="utf-8")
    assert name == harness.NAME and len(harness.DEFECTS) >= 2 and 0 < harness.SLICE <= harness.GOAL
    for defect in harness.DEFECTS:
        assert (PROJECT / defect.path).read_text(encoding="utf-8").count(defect.old) == 1, defect.name
        assert f"| {defect.row} |" in page


def test_what_is_planted_is_what_runs_also_behind_a_command() -> None:
    """A copy comes before the installed package, for a worker and for the commands that it starts."""
    defect = Defect("another release", "TR-102", "deltasync/__init__.py", "__version__ = ", '__version__ = "9" + ')
    with planted(defect) as product:
        paths = os.pathsep.join((str(product), str(product / "server")))
        words = [str(Path(sys.executable).parent / "deltasync-server"), "--version"]
        said = subprocess.run(
            words, env={**unmeasured(), "PYTHONPATH": paths}, capture_output=True, text=True, check=True
        )
    assert " 9" in said.stdout


def test_the_frozen_corpus_is_a_part_of_what_the_hostile_harness_sends() -> None:
    """Far more than 400 hostile bundles, and no two are the same words for one thing."""
    assert len(families.hostile_bundles()) >= 2000
