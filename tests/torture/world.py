"""The whole system against a dictionary: the worlds of tests/property/test_world.py, each seed lived through twice."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import invariant, run_state_machine_as_test
from property import test_world
from world import World
from world_network import Fault, Network

from torture.harness import Defect, Result, Work

NAME = "world"
GOAL = 200_000
SLICE = 40
WEIGHT = 8
WORLDS = 5
"""How many worlds one seed makes; the first is always the simplest that there is."""
STEPS = 25
DEFECTS = (
    Defect(
        "the trees that are kept lose their objects",
        "TR-96",
        "server/deltasync_server/collect.py",
        "            for tenant, roots in kept_roots_of(db, self._keep_sequences).items():",
        "            for tenant, roots in kept_roots_of(db, 1).items():",
    ),
    Defect(
        "no deletion stops a push",
        "TR-73",
        "deltasync/client/seal.py",
        "    if is_resync or is_many or not _has_entries(base, dropped + 1, load):\n",
        "    if False:\n",
    ),
    Defect(
        "the files of a workspace are those of its last bundle",
        "TR-79",
        "server/deltasync_server/intake.py",
        "files = files + excluded.files,",
        "files = excluded.files,",
    ),
)


@dataclass
class Trace:
    """What happened in one world, without what is random or of the clock.

    Questions and bundles are two rows: the client asks in one thread and sends in another.
    """

    is_threaded: bool = False
    rows: dict[str, list[str]] = field(default_factory=lambda: {"ask": [], "send": [], "push": [], "state": []})


def run(work: Work) -> Result:
    """Live through worlds until the steps are taken or the time is over."""
    result, random = Result(), Random(work.seed)
    while work.goes_on(result):
        chosen = random.randrange(2**32)
        lives = [_lived(chosen, work, result) for _ in range(1 if work.stop_at_first or work.points <= SLICE else 2)]
        result.count("seeds")
        for one, other in zip(*lives, strict=False) if len(lives) == 2 else ():
            if one.is_threaded or other.is_threaded:
                result.count("worlds with threads, whose order is not compared")
            elif one.rows == other.rows:
                result.count("worlds with the same trace twice")
            else:
                result.count("worlds with another trace")
                where = next(row for row in one.rows if one.rows[row] != other.rows[row])
                result.count(f"of these with another {where} first")
    return result


def _lived(chosen: int, work: Work, result: Result) -> list[Trace]:
    """Live through the worlds of one seed."""
    traces: list[Trace] = []

    class Traced(test_world.Worlds):
        @invariant()
        def note(self) -> None:
            result.points += 1
            if hasattr(self, "world"):
                traces[-1].rows["state"].append(_seen(self.world))

        def __init__(self) -> None:
            super().__init__()
            traces.append(Trace())

    with pytest.MonkeyPatch.context() as patch:
        _listen(patch, traces)
        patch.setattr(test_world, "_BASE", str(work.scratch))
        try:
            machine = seed(chosen)(Traced)
            run_state_machine_as_test(
                machine,
                settings=settings(
                    max_examples=WORLDS if work.points > SLICE else 2,
                    stateful_step_count=STEPS,
                    deadline=None,
                    database=None,
                    phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck),
                    report_multiple_bugs=False,
                ),
            )
        except Exception:  # noqa: BLE001 - an assertion of the world, or whatever the product raised
            lines = traceback.format_exc()
            result.faults.append(f"seed {chosen}: {lines[-2500:]}")
    return traces


def _seen(world: World) -> str:
    head = world.books.head()
    folders = [sorted(client.folder.nodes) for client in world.clients]
    return f"head {head.sequence} of {len(world.books.spent)}, down {world.host.is_down}, {folders}"


def _listen(patch: pytest.MonkeyPatch, traces: list[Trace]) -> None:
    """Write down every request and what came of every push."""
    asked, pushed, begun = Network._next, World.push, World.__init__

    def _next(self: Network, *, is_on_send: bool = False) -> Fault:
        fault = asked(self, is_on_send=is_on_send)
        traces[-1].rows["send" if is_on_send else "ask"].append(f"{fault.kind} {fault.number}")
        return fault

    def push(self: World, *arguments: Any, **options: Any) -> str:
        outcome = pushed(self, *arguments, **options)
        traces[-1].rows["push"].append(outcome)
        return outcome

    def begin(self: World, *arguments: Any, is_threaded: bool = False, **options: Any) -> None:
        traces[-1].is_threaded = is_threaded
        begun(self, *arguments, is_threaded=is_threaded, **options)

    patch.setattr(Network, "_next", _next)
    patch.setattr(World, "push", push)
    patch.setattr(World, "__init__", begin)
