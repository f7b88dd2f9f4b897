"""The head and the outbox: what is sealed, acknowledged, taken back and kept."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from desk import Desk

from deltasync.client import outbox, seal
from deltasync.client.state import State
from deltasync.core.errors import UsageError
from deltasync.core.manifest import EMPTY_ROOT
from deltasync.core.metadata import Metadata

ROOTS = [EMPTY_ROOT, *(bytes([n]) * 32 for n in range(1, 9))]
URL = "http://127.0.0.1:8080"


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    with Desk(tmp_path / "proj").open() as opened:
        yield opened


def sealed(state: State, *, file: str | None = None) -> Metadata:
    """Record one more sealed bundle; the tree after bundle n is ROOTS[n]."""
    head = outbox.head(state)
    number = head.sealed_sequence + 1
    writer = seal.Writer("proj", "/proj", state.client_id, head.epoch)
    metadata = seal.composed((), writer, sequence=number, parent_root=ROOTS[number - 1], root=ROOTS[number])
    if file:
        (outbox.folder(state) / file).write_bytes(b"sealed")
    outbox.record_sealed(state, metadata, {}, content_bytes=10, file=file)
    return metadata


def test_a_fresh_state_has_sealed_nothing(state: State) -> None:
    """Before the first bundle both heads are the empty tree under number 0."""
    head = outbox.head(state)
    assert (head.sealed_sequence, head.sealed_root) == (0, EMPTY_ROOT)
    assert (head.acknowledged_sequence, head.acknowledged_root) == (0, EMPTY_ROOT)
    assert outbox.pending(state) == []


def test_one_folder_has_one_server(state: State) -> None:
    """A second `--to` is refused, naming both; the same one in another spelling is the same."""
    outbox.bind(state, "proj", None)
    outbox.bind(state, "proj", URL)
    sealed(state)
    outbox.acknowledge(state, 1, ROOTS[1], at="now", keep=False)
    outbox.bind(state, "proj", "HTTP://127.0.0.1:8080/")
    with pytest.raises(UsageError, match=r"8080.*9090"):
        outbox.bind(state, "proj", "http://127.0.0.1:9090")
    assert outbox.head(state).url == URL


def test_an_address_that_never_answered_can_be_corrected(state: State) -> None:
    """A mistyped `--to` binds nothing: the server is free until one has acknowledged a bundle, also a sealed one."""
    outbox.bind(state, "proj", "http://127.0.0.1:1")
    sealed(state)
    assert outbox.bind(state, "proj", URL).url == URL


def test_a_name_is_free_until_a_bundle_carries_it(state: State) -> None:
    """The workspace may be renamed while nothing was sealed under its name, and never after."""
    outbox.bind(state, "one", URL)
    assert outbox.bind(state, "two", URL).workspace == "two"
    sealed(state)
    with pytest.raises(UsageError, match=r"two.*three"):
        outbox.bind(state, "three", None)


def test_a_sealed_bundle_is_recorded_with_the_sealed_root(state: State) -> None:
    """After sealing, the row gives back the same metadata, and the next bundle builds on its root."""
    metadata = sealed(state)
    sealed(state)
    assert outbox.metadata_of(state, 1) == metadata
    assert [row.sequence for row in outbox.pending(state)] == [1, 2]
    head = outbox.head(state)
    assert (head.sealed_sequence, head.sealed_root, head.acknowledged_sequence) == (2, ROOTS[2], 0)


def test_an_acknowledgement_covers_everything_before_it(state: State) -> None:
    """A receipt for bundle 2 drops rows 1 and 2, with their files, and keeps row 3."""
    for number in (1, 2, 3):
        sealed(state, file=f"{number}.tar.zst")
    outbox.acknowledge(state, 2, ROOTS[2], at="now", keep=False)
    assert [row.sequence for row in outbox.pending(state)] == [3]
    assert [path.name for path in outbox.folder(state).iterdir()] == ["3.tar.zst"]
    head = outbox.head(state)
    assert (head.acknowledged_sequence, head.acknowledged_root, head.acknowledged_at) == (2, ROOTS[2], "now")


def test_kept_bundles_stay_until_they_are_old(state: State) -> None:
    """With keep, files outlive their receipt; past their time they go, and so does what no row names."""
    sealed(state, file="1.tar.zst")
    sealed(state)
    outbox.acknowledge(state, 2, ROOTS[2], at="now", keep=True)
    assert [(row.sequence, row.state) for row in outbox.kept(state)] == [(1, outbox.KEPT)]
    (outbox.folder(state) / "stray.tar.zst").write_bytes(b"")
    now = datetime.now(UTC)
    outbox.drop_old(state, 3600, now)
    outbox.drop_old(state, 0, now)  # a push that says nothing of it
    assert [path.name for path in outbox.folder(state).iterdir()] == ["1.tar.zst"]
    outbox.drop_old(state, 3600, now + timedelta(hours=2))
    assert outbox.kept(state) == []
    assert list(outbox.folder(state).iterdir()) == []


def test_discarding_goes_back_to_the_tree_before(state: State) -> None:
    """Taking back bundle 2 takes 3 as well; the sealed tree is that of 1, in the same epoch."""
    epoch = outbox.head(state).epoch
    for _ in range(3):
        sealed(state)
    outbox.discard_from(state, 2)
    head = outbox.head(state)
    assert (head.sealed_sequence, head.sealed_root, head.epoch) == (1, ROOTS[1], epoch)
    assert [row.sequence for row in outbox.pending(state)] == [1]
    assert outbox.was_discarded(state, epoch, 3, ROOTS[3])
    assert not outbox.was_discarded(state, epoch, 1, ROOTS[1])


@pytest.mark.parametrize("how", ["file", "left"])
def test_discarding_what_may_have_left_opens_an_epoch(state: State, how: str) -> None:
    """A number that someone may hold in a file never means another bundle in the same epoch."""
    epoch = outbox.head(state).epoch
    sealed(state, file="1.tar.zst" if how == "file" else None)
    if how == "left":
        outbox.mark_left(state, 1)
    outbox.discard_from(state, 1)
    assert outbox.head(state).epoch != epoch
    assert list(outbox.folder(state).iterdir()) == []


def test_adopting_a_head_forgets_what_was_pending(state: State) -> None:
    """After a resync the server's head is what was sealed and acknowledged last, in an epoch of its own."""
    epoch = outbox.head(state).epoch
    sealed(state)
    outbox.adopt(state, 7, ROOTS[7], opens_epoch=True)
    head = outbox.head(state)
    assert (head.sealed_sequence, head.sealed_root) == (7, ROOTS[7])
    assert (head.acknowledged_sequence, head.acknowledged_root) == (7, ROOTS[7])
    assert head.epoch != epoch
    assert outbox.pending(state) == []


def test_a_number_may_be_used_again_in_another_epoch(state: State) -> None:
    """A kept bundle of a former history gives way to the new one under its number."""
    sealed(state, file="old.tar.zst")
    outbox.acknowledge(state, 1, ROOTS[1], at=None, keep=True)
    outbox.adopt(state, 0, EMPTY_ROOT, opens_epoch=True)
    metadata = sealed(state)
    assert outbox.metadata_of(state, 1) == metadata
    assert outbox.kept(state) == []


def test_pending_files_are_weighed(state: State) -> None:
    """The outbox's size counts the files of pending bundles; a lost file weighs nothing."""
    sealed(state, file="1.tar.zst")
    sealed(state)
    sealed(state, file="3.tar.zst")
    (outbox.folder(state) / "3.tar.zst").unlink()
    assert outbox.pending_bytes(state) == len(b"sealed")


def test_roots_of_use_are_those_of_the_head_and_the_outbox(state: State) -> None:
    """No tree that may still be sent or compared with is swept."""
    sealed(state)
    sealed(state)
    outbox.acknowledge(state, 1, ROOTS[1], at=None, keep=False)
    assert outbox.roots(state) == {ROOTS[1], ROOTS[2]}
