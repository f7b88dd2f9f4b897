"""What every receiver must do, a server over HTTP and a folder alike: one suite for both transports."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from sender import ALICE, BOB, Sender
from serving import serving

from deltasync.client.push import Transport
from deltasync.client.transport import open_transport
from deltasync.core import wire
from deltasync.core.errors import (
    DeltasyncError,
    HostUnreachable,
    NotFound,
    NotOwner,
    Refused,
    SequenceFork,
    SequenceGap,
    StaleEpoch,
)
from deltasync.core.manifest import EMPTY_ROOT, parse_directory
from deltasync.core.metadata import Metadata


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("served") / "data") as served:
        yield served.url


@pytest.fixture(params=["http", "folder"])
def receiver(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Transport]:
    """A receiver that never saw the test's workspace."""
    (tmp_path / "usb").mkdir()
    url = request.getfixturevalue("server") if request.param == "http" else (tmp_path / "usb").as_uri()
    transport = open_transport(url, timeout=20, max_retries=0)
    yield transport
    transport.close()


@pytest.fixture
def sender(tmp_path: Path) -> Sender:
    """A sender of a workspace with a name of its own."""
    return Sender(name=tmp_path.name)  # type: ignore[arg-type]


def send(receiver: Transport, sender: Sender, metadata: Metadata, sealed: bytes, **options: bool) -> wire.Receipt:
    """Send sealed bytes in uneven pieces."""
    pieces = (sealed[at : at + 1009] for at in range(0, len(sealed), 1009))
    return receiver.send_bundle(sender.name, metadata.identity, pieces, **options)


def follow(receiver: Transport, sender: Sender, **files: bytes) -> tuple[Metadata, bytes, wire.Receipt]:
    """Seal and send the tree of these files, and move on."""
    flat = sender.tree(**files)
    metadata, sealed = sender.seal(flat)
    receipt = send(receiver, sender, metadata, sealed)
    sender.move_on(flat)
    return metadata, sealed, receipt


def test_an_unknown_workspace_has_the_empty_head(receiver: Transport, sender: Sender) -> None:
    """Before the first bundle there is no owner, sequence 0, and the empty tree's root."""
    state = receiver.workspace(sender.name)
    assert (state.client_id, state.sequence, state.root) == ("", 0, EMPTY_ROOT.hex())


def test_a_bundle_becomes_the_head(receiver: Transport, sender: Sender) -> None:
    """A receipt names the bundle and its root, and the head is then what the bundle leads to."""
    metadata, sealed, receipt = follow(receiver, sender, a=b"one", d__b=b"two")
    assert (receipt.sequence, receipt.epoch, receipt.identity) == (1, sender.epoch, metadata.identity.hex())
    assert (receipt.root, receipt.created, receipt.duplicate) == (sender.root.hex(), 3, False)
    state = receiver.workspace(sender.name)
    assert (state.client_id, state.epoch, state.sequence, state.root) == (ALICE, sender.epoch, 1, sender.root.hex())
    assert receiver.sent_bytes == len(sealed)


def test_the_same_bundle_twice_gives_the_first_receipt(receiver: Transport, sender: Sender) -> None:
    """A repeat changes nothing, and says that it is one."""
    metadata, sealed, first = follow(receiver, sender, a=b"one")
    again = send(receiver, sender, metadata, sealed)
    assert again.duplicate
    assert (again.sequence, again.identity, again.root) == (first.sequence, first.identity, first.root)
    assert receiver.workspace(sender.name).sequence == 1


def test_a_gap_is_refused_with_what_is_expected(receiver: Transport, sender: Sender) -> None:
    """Number n + 2 after n is a gap, and the error says which number comes next."""
    follow(receiver, sender, a=b"one")
    sender.move_on(sender.tree(a=b"two"))
    metadata, sealed = sender.seal(sender.tree(a=b"three"))
    with pytest.raises(SequenceGap) as caught:
        send(receiver, sender, metadata, sealed)
    assert caught.value.facts["expected_sequence"] == 2
    assert receiver.workspace(sender.name).sequence == 1


def test_a_number_is_not_given_twice(receiver: Transport, sender: Sender) -> None:
    """Another bundle under a number that is spent is a fork."""
    follow(receiver, sender, a=b"one")
    other = replace(sender, sequence=0, root=EMPTY_ROOT, flat={})
    metadata, sealed = other.seal(other.tree(a=b"another"))
    with pytest.raises(SequenceFork):
        send(receiver, sender, metadata, sealed)


def test_a_bundle_on_another_tree_is_a_fork(receiver: Transport, sender: Sender) -> None:
    """The right number over the wrong parent root is a fork, and the head stays."""
    follow(receiver, sender, a=b"one")
    head = receiver.workspace(sender.name)
    sender.root = sender.objects.build(sender.tree(a=b"elsewhere"))
    metadata, sealed = sender.seal(sender.tree(a=b"three"))
    with pytest.raises(SequenceFork):
        send(receiver, sender, metadata, sealed)
    assert receiver.workspace(sender.name).root == head.root


def test_a_new_epoch_continues_and_the_old_one_is_over(receiver: Transport, sender: Sender) -> None:
    """The first bundle of a new epoch follows the head; one of the epoch before it is stale."""
    follow(receiver, sender, a=b"one")
    fresh = replace(sender, epoch="2" * 32)
    follow(receiver, fresh, a=b"two")
    stale = replace(fresh, epoch=sender.epoch)
    metadata, sealed = stale.seal(stale.tree(a=b"three"))
    with pytest.raises(StaleEpoch):
        send(receiver, stale, metadata, sealed)


def test_another_client_has_to_take_over(receiver: Transport, sender: Sender) -> None:
    """A workspace belongs to one client until another one says that it takes it over."""
    follow(receiver, sender, a=b"one")
    other = replace(sender, client_id=BOB, epoch="b" * 32)
    metadata, sealed = other.seal(other.tree(a=b"two"))
    with pytest.raises(NotOwner):
        send(receiver, other, metadata, sealed)
    assert send(receiver, other, metadata, sealed, take_over=True).sequence == 2
    assert receiver.workspace(sender.name).client_id == BOB


@pytest.mark.parametrize("damage", [lambda sealed: sealed[:-1], lambda sealed: sealed[:40] + b"?" + sealed[41:]])
def test_a_damaged_bundle_leaves_nothing(receiver: Transport, sender: Sender, damage: object) -> None:
    """A truncated or altered bundle is refused, and the whole one is taken afterwards."""
    flat = sender.tree(a=b"one" * 1000)
    metadata, sealed = sender.seal(flat)
    with pytest.raises(Refused):
        send(receiver, sender, metadata, damage(sealed))  # type: ignore[operator]
    assert receiver.workspace(sender.name).sequence == 0
    assert send(receiver, sender, metadata, sealed).sequence == 1


def test_a_bundle_under_another_identity_is_refused(receiver: Transport, sender: Sender) -> None:
    """What was announced is what must come."""
    _, sealed = sender.seal(sender.tree(a=b"one"))
    with pytest.raises(Refused):
        receiver.send_bundle(sender.name, bytes(32), iter([sealed]))


def test_a_sender_that_gives_up_leaves_nothing(receiver: Transport, sender: Sender) -> None:
    """When reading the content fails the error is the reader's own, and the number is not spent."""

    class Gone(Exception):
        pass

    metadata, sealed = sender.seal(sender.tree(a=b"one" * 1000))

    def chunks() -> Iterator[bytes]:
        yield sealed[:100]
        raise Gone

    with pytest.raises(Gone):
        receiver.send_bundle(sender.name, metadata.identity, chunks())
    assert receiver.workspace(sender.name).sequence == 0
    assert send(receiver, sender, metadata, sealed).sequence == 1


def test_directory_objects_can_be_fetched(receiver: Transport, sender: Sender) -> None:
    """Every directory of the head's tree is there under its digest; any other digest is not."""
    follow(receiver, sender, d__e__f=b"deep", a=b"x")
    follow(receiver, sender, d__e__f=b"deeper", a=b"x")
    entries = parse_directory(receiver.directory(sender.name, sender.root), sender.root)
    assert [entry.name for entry in entries] == ["a", "d"]
    below = entries[1].digest
    assert [entry.name for entry in parse_directory(receiver.directory(sender.name, below), below)] == ["e"]
    with pytest.raises(NotFound):
        receiver.directory(sender.name, b"\1" * 32)


def test_missing_never_names_what_was_not_asked(receiver: Transport, sender: Sender) -> None:
    """The answer is a part of the question, and holds at least what was never sent."""
    digest = sender.file("a", sender.name.encode()).digest.hex()
    assert receiver.missing(sender.name, [digest]) == [digest]
    assert receiver.missing(sender.name, []) == []


def test_sequences_are_listed_oldest_first(receiver: Transport, sender: Sender) -> None:
    """What the receiver remembers of the history comes in order, each with its root."""
    roots = []
    for content in (b"1", b"2", b"3"):
        follow(receiver, sender, a=content)
        roots.append(sender.root.hex())
    kept = receiver.sequences(sender.name)
    assert [(each.sequence, each.root) for each in kept] == list(zip((1, 2, 3), roots, strict=True))


def test_a_receiver_that_is_away_is_unreachable(tmp_path: Path) -> None:
    """A folder that is not mounted is like a server that is down: try again later, exit 4."""
    away = open_transport((tmp_path / "not mounted").as_uri())
    with pytest.raises(HostUnreachable) as caught:
        away.workspace("w")
    assert caught.value.exit_code == 4


def test_a_folder_with_two_heads_is_refused(tmp_path: Path) -> None:
    """Two bundles of one number are named, and nobody guesses which one counts."""
    for epoch in ("1" * 32, "2" * 32):
        apart = tmp_path / epoch
        apart.mkdir()
        sender = Sender(epoch=epoch)
        follow(open_transport(apart.as_uri()), sender, a=b"x")
        (path,) = apart.iterdir()
        path.rename(tmp_path / path.name)
    with pytest.raises(SequenceFork, match=r"proj-11111111-00000001-.* and proj-22222222-00000001"):
        open_transport(tmp_path.as_uri()).workspace("proj")


def test_a_folder_whose_bundles_were_carried_away_takes_the_next(tmp_path: Path) -> None:
    """The chain goes on over a disk that is emptied on the other side each time."""
    sender, folder = Sender(), open_transport(tmp_path.as_uri())
    follow(folder, sender, a=b"1")
    for path in tmp_path.iterdir():
        path.unlink()
    _, _, receipt = follow(folder, sender, a=b"2")
    assert receipt.sequence == 2
    with pytest.raises(NotFound):
        folder.directory(sender.name, sender.root)


def test_a_bundle_file_that_lies_about_its_name_is_refused(tmp_path: Path) -> None:
    """The name of a file is believed only as far as the bundle in it says the same."""
    sender, folder = Sender(), open_transport(tmp_path.as_uri())
    follow(folder, sender, a=b"1")
    (path,) = tmp_path.iterdir()
    path.rename(tmp_path / path.name.replace("00000001", "00000007"))
    with pytest.raises(DeltasyncError, match="holds the bundle"):
        folder.workspace("proj")


def test_a_server_waits_for_its_tree(server: str, sender: Sender) -> None:
    """With `wait` an answer comes when the plain tree holds the bundle."""
    with_tree = open_transport(server, timeout=20)
    metadata, sealed = sender.seal(sender.tree(a=b"1"))
    receipt = with_tree.send_bundle(sender.name, metadata.identity, iter([sealed]), wait=20)
    assert receipt.tree_sequence == 1
    assert with_tree.workspace(sender.name, tree_sequence=1, wait=20).tree_sequence == 1
    assert msgspec.structs.asdict(receipt)["sequence"] == 1
