"""What the simulated world has found, each in the smallest form that shows it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from plain_folder import Change
from sender import NAME
from sudden_death import Fuse, Killed, acting, armed
from world import World
from world_client import Client, How
from world_network import Fault, Network

from deltasync.client.state import State
from deltasync.core import wire
from deltasync.core.hashing import digest_of
from deltasync_server.config import StoreConfig
from deltasync_server.receive import Store
from deltasync_server.state import workspace_row

NEVER_SECONDS = 60.0
SMALL = 10
"""How many operations a bundle takes in a tiny world."""


@pytest.fixture
def make_world(tmp_path: Path) -> Iterator[Callable[..., World]]:
    made: list[World] = []

    def make(**options: bool) -> World:
        made.append(World(tmp_path, **options))
        return made[-1]

    yield make
    for world in made:
        world.close()


def fill(client: Client, files: int) -> None:
    """Make files of their own content, and one more that is a copy of the first."""
    folder = client.folder
    for number in range(files):
        folder.write(f"{number:03}", f"{client.home.name} {number}".encode())
    folder.write("copy", f"{client.home.name} 0".encode())


class Overlapping(Network):
    """Delivers the first bundle only when the second one is on its way."""

    def __init__(self, world: World, client: Client) -> None:
        super().__init__(world, client)
        self.is_second_out = threading.Event()
        self.sent = 0

    def _sent(self, identity: bytes, chunks: Iterable[bytes], take_over: bool, wait: float) -> wire.Receipt:
        self.sent += 1
        is_first = self.sent == 1
        body = b"".join(chunks)
        if is_first:
            assert self.is_second_out.wait(NEVER_SECONDS)
        else:
            self.is_second_out.set()
        return super()._sent(identity, iter([body]), take_over, wait)


def carried_by_overlapping_bundles(world: World, client: Client) -> list[bytes]:
    """Push, and return the content of every bundle that went out, as often as it did."""
    before = len(world.letters)
    client.push(Overlapping(world, client), How())
    world.settle()
    return [digest for letter in world.letters[before:] for digest in letter.carried]


def test_the_empty_tree_of_a_workspace_that_was_never_written_is_there_at_once(tmp_path: Path) -> None:
    """Sequence 0 is held by every workspace: waiting for it does not use up the time."""
    with Store(StoreConfig(tmp_path)) as store:
        before = store.health().uptime_seconds
        assert store.wait_for_tree(NAME, 0, NEVER_SECONDS).tree_sequence == 0
        assert store.health().uptime_seconds - before < NEVER_SECONDS / 2


def test_bundles_that_are_too_large_for_the_server_are_cut_again(make_world: Callable[..., World]) -> None:
    """What was sealed offline, for limits that the server does not have, is sealed again as it takes it (spec S-13)."""
    world = make_world(is_tiny=True)
    ada = world.clients[0]
    fill(ada, SMALL)
    assert world.seal(ada, How()) == "sealed"
    assert world.push(ada, How()) == "done"
    assert len(world.books.line) == 2


def test_content_of_two_pending_bundles_travels_once(make_world: Callable[..., World]) -> None:
    """A bundle that was sealed before carries nothing that the pending one before it brings."""
    world = make_world(is_tiny=True, is_threaded=True)
    ada = world.clients[0]
    fill(ada, SMALL)
    assert world.push(ada, How(plan=(Fault("killed", is_on_send=True),))) == "killed"
    assert carried_by_overlapping_bundles(world, ada).count(digest_of(b"ada 0")) == 1
    assert world.push(ada, How()) == "done"


def test_new_bundles_carry_nothing_that_pending_ones_bring(make_world: Callable[..., World]) -> None:
    """The server lacks content of a bundle that is under way: it is not sent again with a later one."""
    world = make_world(is_threaded=True)
    ada = world.clients[0]
    fill(ada, SMALL)
    assert world.push(ada, How(plan=(Fault("killed", is_on_send=True),))) == "killed"
    ada.folder.write("later", b"ada 0")
    assert carried_by_overlapping_bundles(world, ada).count(digest_of(b"ada 0")) == 1
    assert len(world.books.line) == 2


def test_every_bundle_of_a_take_over_says_so(make_world: Callable[..., World]) -> None:
    """The second bundle may be judged before the first one has made the workspace ours."""
    world = make_world(is_tiny=True)
    ada, bob = world.clients
    fill(ada, 1)
    assert world.push(ada, How()) == "done"
    fill(bob, 2 * SMALL)
    before = len(world.letters)
    assert world.push(bob, How(take_over=True, allow=True)) == "done"
    assert [letter.takes_over for letter in world.letters[before:]] == [True] * 3


def test_content_that_heals_travels_once(make_world: Callable[..., World]) -> None:
    """Content that the server asks for, and that a new file brings anyway, is not sent twice."""
    world = make_world()
    ada = world.clients[0]
    ada.folder.write("a", b"precious")
    assert world.push(ada, How()) == "done"
    world.tidy()
    world.rot(0)
    ada.folder.write("b", b"precious")
    assert world.push(ada, How()) == "done"
    assert len(world.books.line) == 2


def test_a_tree_that_awaits_content_comes_to_rest(make_world: Callable[..., World]) -> None:
    """Upkeep makes what is there durable; it does not take the hole for damage, again and again."""
    world = make_world()
    ada = world.clients[0]
    fill(ada, 2)
    assert world.push(ada, How()) == "done"
    world.work("collect", dies_at=None)  # releases the journal: nothing can give the blob again
    world.rot(0)
    world.work("catch_up", dies_at=None)
    world.work("upkeep", dies_at=None)
    with world.host.serving() as store:
        state = store.workspace(NAME)
        assert (state.tree_sequence, len(state.wanted)) == (1, 1)


def test_healed_files_are_made_durable(make_world: Callable[..., World]) -> None:
    """A tree that counted as durable does so no longer when content comes back into it (spec ST-50)."""
    world = make_world()
    ada = world.clients[0]
    fill(ada, 2)
    assert world.push(ada, How()) == "done"
    world.tidy()
    world.rot(0)
    assert world.push(ada, How()) == "done"
    for is_durable in (False, True):
        with world.host.serving() as store:
            with store.state.read() as db:
                row = workspace_row(db, NAME)
            assert row is not None
            assert (row.durable_root == row.tree_root) is is_durable
            store.upkeep()


def test_an_opening_that_fails_half_way_leaves_no_lock(make_world: Callable[..., World]) -> None:
    """Wherever opening a state is cut off, the next one in the same process can take its lock."""
    ada = make_world().clients[0]
    for change in range(100):
        try:
            with ada.at_home(), acting("client"), armed("client", Fuse(change)):
                state = State.open(ada.root)
        except Killed:
            continue
        state.close()
        assert change > 3
        return
    raise AssertionError("it never ends")


def test_a_falsified_file_is_noticed_after_everything_moved(make_world: Callable[..., World]) -> None:
    """Copies in the place of all files are trusted by size and time, until what is due is read again."""
    world = make_world()
    ada = world.clients[0]
    ada.folder.apply(Change("mkdir"))
    for number in range(12):
        ada.folder.write(f"a/{number}", b"content of its own" + bytes([number]))
    assert world.push(ada, How()) == "done"
    ada.folder.apply(Change("renew"))
    ada.folder.apply(Change("falsify", 3))
    assert world.push(ada, How()) == "done"
