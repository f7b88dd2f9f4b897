"""The whole system against a dictionary: random changes, pushes, faults, deaths and restores, with the real code."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import world_client
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from plain_folder import VERBS, Change
from world import World
from world_client import Client, How
from world_network import DEADLY, LOUD, SILENT, Fault

from deltasync.client import ahead, digest, ledger
from deltasync_server import intake

EXAMPLES = int(os.environ.get("WORLD_EXAMPLES", "0"))
"""How many worlds to live through; 0 is the short, repeatable run of every test run."""
STEPS = int(os.environ.get("WORLD_STEPS", "25"))
_FAST = Path("/dev/shm")
_BASE = os.environ.get("WORLD_DIR") or (_FAST if _FAST.is_dir() and os.access(_FAST, os.W_OK) else None)
"""Where worlds are made: in memory where that can be, since every promise of durability is an fsync."""

_numbers = st.integers(0, 40)
_changes = st.lists(
    st.builds(Change, st.sampled_from(VERBS), _numbers, _numbers, st.integers(0, 20)), min_size=1, max_size=6
)
_some = st.just([]) | _changes


def _faults(kinds: list[str], **sizes: int) -> st.SearchStrategy[tuple[Fault, ...]]:
    one = st.builds(Fault, st.sampled_from(kinds), st.integers(0, 99), st.booleans())
    return st.lists(one, **sizes).map(tuple)


_silent = _faults([*SILENT], max_size=4)
_loud = _faults([*SILENT, *LOUD, *LOUD], min_size=1, max_size=8)
_deadly = st.tuples(_faults([*SILENT, *LOUD], max_size=4), _faults([*DEADLY], min_size=1, max_size=1)).map(
    lambda both: both[0] + both[1]
)


class Worlds(RuleBasedStateMachine):
    """One world; `here` is the client whose folder is being changed."""

    def __init__(self) -> None:
        super().__init__()
        self.base = Path(tempfile.mkdtemp(prefix="world-", dir=_BASE))
        self.patch = pytest.MonkeyPatch()
        self.world: World
        self.here: Client

    @initialize(
        is_threaded=st.sampled_from([False, False, False, True]),
        is_tiny=st.booleans(),
        link=st.sampled_from(["auto", "auto", "copy"]),
        goes_ahead=st.booleans(),
        is_journalled=st.booleans(),
        follows=st.booleans(),
        changes=_changes,
    )
    def begin(
        self,
        is_threaded: bool,
        is_tiny: bool,
        link: str,
        goes_ahead: bool,
        is_journalled: bool,
        follows: bool,
        changes: list[Change],
    ) -> None:
        if goes_ahead:  # of a first scan: otherwise nothing here is large enough for it
            self.patch.setattr(ahead, "AHEAD_FILES", 2)
            self.patch.setattr(ledger, "_FLUSH_FILES", 1)
        if follows:  # the first reading of a file: the same
            self.patch.setattr(ahead, "AHEAD_BYTES", 100)
            self.patch.setattr(digest, "_SMALL_BYTES", 100)
            self.patch.setattr(digest, "BUFFER_BYTES", 70)
            self.patch.setattr(world_client, "CHUNK_FROM_BYTES", 100)
        if not is_journalled:
            self.patch.setattr(intake, "LARGE_BYTES", 1)
        self.world = World(self.base, is_threaded=is_threaded, is_tiny=is_tiny or follows, link=link)
        self.here = self.world.clients[0]
        self.change([Change("grow"), *changes])

    # The folder

    @rule(changes=_changes)
    def change(self, changes: list[Change]) -> None:
        for each in changes:
            self.here.folder.apply(each)

    # Pushing

    @rule(changes=_some, plan=_silent, allow=st.booleans(), waits=st.booleans(), keeps=st.booleans())
    def push(self, changes: list[Change], plan: tuple[Fault, ...], allow: bool, waits: bool, keeps: bool) -> None:
        self.change(changes)
        self.world.push(self.here, How(plan=plan, allow=allow, waits=waits, keeps=keeps))

    @rule(changes=_changes, allow=st.booleans())
    def push_twice(self, changes: list[Change], allow: bool) -> None:
        self.change(changes)
        if self.world.push(self.here, How(allow=allow)) == "done":
            self.world.push_again(self.here)

    @rule(changes=_some, plan=_loud, allow=st.booleans(), waits=st.booleans(), seals=st.booleans())
    def push_through_faults(
        self, changes: list[Change], plan: tuple[Fault, ...], allow: bool, waits: bool, seals: bool
    ) -> None:
        self.change(changes)
        self.world.push(self.here, How(plan=plan, allow=allow, waits=waits, seals_offline=seals))

    @rule(changes=_some, plan=_deadly, allow=st.booleans())
    def push_killed_at_a_request(self, changes: list[Change], plan: tuple[Fault, ...], allow: bool) -> None:
        self.change(changes)
        self.world.push(self.here, How(plan=plan, allow=allow))

    @rule(changes=_some, kill_at=st.integers(0, 60), plan=_silent, keeps=st.booleans())
    def push_killed_at_a_change(
        self, changes: list[Change], kill_at: int, plan: tuple[Fault, ...], keeps: bool
    ) -> None:
        self.change(changes)
        self.world.push(self.here, How(plan=plan, kill_at=kill_at, keeps=keeps))

    @rule(changes=_changes, told=st.integers(0, 5))
    def push_killed_while_it_reads(self, changes: list[Change], told: int) -> None:
        self.change(changes)
        self.world.push(self.here, How(kill_on_progress=told))

    @rule(changes=_some, kill_at=st.none() | st.integers(0, 40), allow=st.booleans())
    def seal_offline(self, changes: list[Change], kill_at: int | None, allow: bool) -> None:
        self.change(changes)
        self.world.seal(self.here, How(kill_at=kill_at, allow=allow))

    # Owners

    @rule(changes=_some, allow=st.booleans(), plan=_silent)
    def take_over(self, changes: list[Change], allow: bool, plan: tuple[Fault, ...]) -> None:
        one, two = self.world.clients
        self.here = two if self.here is one else one
        self.change(changes)
        self.world.push(self.here, How(take_over=True, allow=allow, plan=plan))

    @rule(changes=_some)
    def push_from_the_other_machine(self, changes: list[Change]) -> None:
        one, two = self.world.clients
        other = two if self.here is one else one
        for each in changes:
            other.folder.apply(each)
        self.world.push(other, How())

    # The network, later

    @rule(number=_numbers)
    def an_old_bundle_arrives(self, number: int) -> None:
        if self.world.letters:
            self.world.deliver_late(self.world.letters[-1 - number % len(self.world.letters)])

    # The server

    @rule(way=st.sampled_from(["stop", "die", "tidy"]))
    def restart_server(self, way: str) -> None:
        if way == "tidy":
            self.world.tidy()
        else:
            self.world.restart(dies=way == "die")

    @rule(what=st.sampled_from(["catch_up", "upkeep", "collect"]), dies_at=st.none() | st.integers(0, 30))
    def server_works(self, what: str, dies_at: int | None) -> None:
        self.world.work(what, dies_at=dies_at)

    @rule(number=_numbers)
    def server_disk_rots(self, number: int) -> None:
        self.world.rot(number)

    # Backups

    @rule(of_server=st.booleans())
    def back_up(self, of_server: bool) -> None:
        if of_server:
            self.world.back_up_server()
        else:
            self.here.back_up()

    @rule(what=st.sampled_from(["server", "state", "whole state", "no state"]))
    def restore(self, what: str) -> None:
        if what == "server":
            self.world.restore_server()
        elif what == "no state":
            self.here.lose_state()
        else:
            self.world.restore_client(self.here, is_whole=what == "whole state")

    def teardown(self) -> None:
        try:
            if hasattr(self, "world"):
                self.end()
        finally:
            self.patch.undo()
            shutil.rmtree(self.base)

    def end(self) -> None:
        """Whatever happened: an allowed push brings everything over, a second one sends nothing, nothing is wrong."""
        try:
            outcome = self.world.push(self.here, How(allow=True, take_over=True))
            assert outcome == "done"
            self.world.push_again(self.here)
            self.world.tidy()
        finally:
            self.world.close()


TestWorlds = Worlds.TestCase
TestWorlds.settings = settings(
    max_examples=EXAMPLES or 16,
    stateful_step_count=STEPS,
    deadline=None,
    derandomize=not EXAMPLES,
    database=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
    report_multiple_bugs=False,
)
