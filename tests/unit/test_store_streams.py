"""Streams in the store: parts are written once, proven from the first byte on, and nothing of a wrong one stays."""

from __future__ import annotations

import contextlib
import io
import os
import sqlite3
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from threading import Event

import pytest
from sender import BOB, NAME, Sender, assert_tree, blob_of, give

from deltasync.core import bundle, recipe, wire
from deltasync.core.bundle import Metadata
from deltasync.core.delta import diff
from deltasync.core.errors import ContentMissing, Corrupt, HostBusy, Refused, SequenceGap
from deltasync.core.hashing import digest_of
from deltasync.core.names import WorkspaceName
from deltasync.core.part import Part
from deltasync.db import transaction
from deltasync_server.check import check
from deltasync_server.config import StoreConfig
from deltasync_server.receive import Store
from deltasync_server.streams import IDLE_SECONDS

STREAM, OTHER = b"\x01" * 32, b"\x02" * 32
CONTENT = os.urandom(300_000)
ENDS = (0, 100_000, 200_000, 300_000)


@pytest.fixture
def config(tmp_path: Path) -> StoreConfig:
    return StoreConfig(data=tmp_path / "data", low_disk_bytes=0)


@pytest.fixture
def store(config: StoreConfig) -> Iterator[Store]:
    with Store(config) as store:
        store.recover()
        yield store


def sealed_part(
    sender: Sender, start: int, end: int, content: bytes = CONTENT, stream: bytes = STREAM, digest: bytes | None = None
) -> tuple[Metadata, bytes]:
    """Return the next bundle, which brings a part of a content."""
    metadata = sender.compose([], sender.root, "parts")

    def read(_: Part) -> Generator[bytes, None, bytes]:
        yield content[start:end].ljust(end - start, b"x")
        return digest_of(content[:end]) if digest is None else digest

    return metadata, b"".join(bundle.seal_part(metadata, Part(stream, start, end - start), read))


def send_part(store: Store, sender: Sender, start: int, end: int, **options: bytes) -> wire.Receipt:
    receipt = give(store, *sealed_part(sender, start, end, **options))
    sender.sequence += 1
    return receipt


def send_parts(store: Store, sender: Sender, stream: bytes = STREAM) -> None:
    for start, end in pairwise(ENDS):
        send_part(store, sender, start, end, stream=stream)


def sealed_made(
    sender: Sender, made: recipe.Recipe, content: bytes = CONTENT, new: bytes = b""
) -> tuple[Metadata, bytes]:
    """Return the next bundle: a file whose content a recipe makes."""
    flat = {**sender.flat, **sender.tree(big=content)}
    root = sender.objects.build(flat)
    operations = diff(sender.root, root, sender.objects.load)
    metadata = sender.compose(operations, root, "recipes", "parts")
    digest = digest_of(content).hex()
    return metadata, b"".join(bundle.seal(metadata, [digest], lambda _: (new,), recipes={digest: made}))


def send_made(store: Store, sender: Sender, made: recipe.Recipe, content: bytes = CONTENT, new: bytes = b"") -> None:
    flat = {**sender.flat, **sender.tree(big=content)}
    give(store, *sealed_made(sender, made, content, new))
    sender.move_on(flat)


def whole(stream: bytes = STREAM, size: int = len(CONTENT)) -> recipe.Recipe:
    return recipe.compose((stream,), [recipe.Segment(1, 0, size)])


class Late(io.RawIOBase):
    """The bytes of a bundle; something happens before the last one."""

    def __init__(self, sealed: bytes, happens: Callable[[], None]) -> None:
        self._rest, self._last, self._happens = sealed[:-1], sealed[-1:], happens

    def read(self, size: int = -1) -> bytes:
        if not self._rest and self._last:
            self._happens()
            self._rest, self._last = self._last, b""
        piece, self._rest = self._rest[:size], self._rest[size:]
        return piece


def held(store: Store) -> list[str]:
    return sorted(os.listdir(store.config.data / "parts"))


def test_a_content_in_parts_becomes_the_blob_where_it_lies(store: Store) -> None:
    """The file that took the parts is the blob and the tree's file: its bytes were written once."""
    sender = Sender()
    for start, end in pairwise(ENDS):
        receipt = send_part(store, sender, start, end)
        assert (receipt.root, receipt.content_bytes, receipt.created) == (sender.root.hex(), 100_000, 0)
    inode = (store.config.data / "parts" / STREAM.hex()).stat().st_ino
    send_made(store, sender, whole())
    assert_tree(store, sender)
    blob = blob_of(store.config.data, sender.flat["big"])
    assert blob.stat().st_ino == inode and blob.stat().st_nlink == 2
    assert held(store) == []
    assert store.figures()["streams"] == 0
    store.stop()
    assert check(store.config).findings == []


def test_a_part_that_comes_twice_is_answered_as_before(store: Store) -> None:
    """A repeat gives the first receipt and writes nothing."""
    sender = Sender()
    metadata, sealed = sealed_part(sender, 0, 100_000)
    first = give(store, metadata, sealed)
    again = give(store, metadata, sealed)
    assert (again.duplicate, again.identity) == (True, first.identity)


def test_a_part_of_another_digest_leaves_nothing(store: Store) -> None:
    """The digest is that of the whole stream: one wrong byte anywhere is found with the part that brings it."""
    sender = Sender()
    with pytest.raises(Refused, match="B-66"):
        give(store, *sealed_part(sender, 0, 100_000, digest=bytes(32)))
    assert held(store) == [] and store.workspace(NAME).sequence == 0
    send_part(store, sender, 0, 100_000)
    with pytest.raises(Refused, match="B-66"):
        give(store, *sealed_part(sender, 100_000, 200_000, content=b"x" + CONTENT[1:]))
    send_part(store, sender, 100_000, 200_000)
    send_part(store, sender, 200_000, 300_000)
    send_made(store, sender, whole())
    assert_tree(store, sender)


def test_what_was_not_recorded_of_a_part_takes_no_space(store: Store) -> None:
    """A part that fails, of a full disk as well, gives back what it took, and its stream is as it was."""
    sender, path = Sender(), store.config.data / "parts" / STREAM.hex()
    send_part(store, sender, 0, 100_000)
    with pytest.raises(Refused, match="B-66"):
        give(store, *sealed_part(sender, 100_000, 200_000, digest=bytes(32)))
    assert path.stat().st_size == 100_000
    with pytest.raises(Refused, match="B-66"):
        give(store, *sealed_part(sender, 0, 100_000, digest=bytes(32)))
    assert held(store) == [] and store.figures()["streams"] == 0
    send_parts(store, sender)
    send_made(store, sender, whole())
    assert_tree(store, sender)


def test_a_writer_of_a_stream_that_is_over_leaves_the_next_alone(store: Store) -> None:
    """An upload that ends late removes no file that another one began meanwhile under the same id."""
    sender = Sender()
    part = Part(STREAM, 0, 100_000)
    with store.streams.begin(NAME, part, 1):
        send_parts(store, sender)
        send_made(store, sender, whole())
        send_part(store, sender, 0, 100_000)
    assert held(store) == [STREAM.hex()]


def test_a_part_whose_turn_does_not_come_is_told_of_the_gap(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the part before it takes too long nothing is lost: the stream is not asked for again."""
    monkeypatch.setattr("deltasync_server.intake.TURN_SECONDS", 0.01)
    sender = Sender()
    metadata, sealed = sealed_part(sender, 0, 100_000)
    sender.sequence += 1
    following = sealed_part(sender, 100_000, 200_000)
    told: list[Exception] = []

    def overtake(*_: object) -> None:
        if not told:
            with pytest.raises(SequenceGap) as caught:
                give(store, *following)
            told.append(caught.value)

    store.receive(NAME, io.BytesIO(sealed), expected_identity=metadata.identity, decide_hook=overtake)
    assert told
    assert not give(store, *following).duplicate


def test_a_content_whose_last_part_comes_late_is_told_of_the_gap(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that are here are not asked for again where the last one comes while its content is being made."""
    monkeypatch.setattr("deltasync_server.intake.TURN_SECONDS", 0.01)
    sender, arriving, may_go_on = Sender(), Event(), Event()
    send_part(store, sender, 0, 100_000)
    metadata, sealed = sealed_part(sender, 100_000, 200_000)
    sender.sequence += 1

    def wait(*_: object) -> None:
        arriving.set()
        assert may_go_on.wait(60)

    with ThreadPoolExecutor(1) as pool:
        last = pool.submit(
            store.receive, NAME, io.BytesIO(sealed), expected_identity=metadata.identity, decide_hook=wait
        )
        assert arriving.wait(60)

        def bring() -> None:
            may_go_on.set()
            last.result()

        new = os.urandom(4 << 20)  # more than is read ahead of the operations
        both = recipe.compose((STREAM,), [recipe.Segment(1, 0, 200_000), recipe.Segment(0, 0, len(new))])
        made, sealed = sealed_made(sender, both, content=CONTENT[:200_000] + new, new=new)
        try:
            with pytest.raises(SequenceGap):
                store.receive(NAME, Late(sealed, bring), expected_identity=made.identity)
        finally:
            bring()
    assert not give(store, made, sealed).duplicate


def test_a_part_that_is_committed_meanwhile_is_not_written_again(store: Store) -> None:
    """Of two uploads of one part the one that comes late takes nothing back of the stream."""
    sender = Sender()
    send_part(store, sender, 0, 100_000)
    metadata, sealed = sealed_part(sender, 100_000, 200_000)
    firsts: list[wire.Receipt] = []

    def overtake(*_: object) -> None:
        if not firsts:
            firsts.append(give(store, metadata, sealed))

    with pytest.raises(HostBusy):
        store.receive(NAME, io.BytesIO(sealed), expected_identity=metadata.identity, decide_hook=overtake)
    sender.sequence += 1
    assert give(store, metadata, sealed).duplicate
    send_part(store, sender, 200_000, 300_000)
    send_made(store, sender, whole())
    assert_tree(store, sender)


@pytest.mark.parametrize("start", [1, 100_000, 2**40])
def test_a_part_without_those_before_it_is_asked_for(store: Store, start: int) -> None:
    """A receiver that lacks what comes before names the stream."""
    with pytest.raises(ContentMissing) as caught:
        give(store, *sealed_part(Sender(), start, start + 100_000, digest=bytes(32)))
    assert caught.value.missing == [STREAM.hex()]
    assert held(store) == []


def test_a_restart_reads_what_is_there_and_goes_on(config: StoreConfig) -> None:
    """The hash of a stream is made again from its file."""
    sender = Sender()
    for start, end in pairwise(ENDS):
        with Store(config) as store:
            store.recover()
            send_part(store, sender, start, end)
    with Store(config) as store:
        store.recover()
        send_made(store, sender, whole())
        assert_tree(store, sender)


@pytest.mark.parametrize("number", [0, 1])
def test_a_part_stays_whose_commit_nobody_knows_of(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """This process sees it undone; the next start may find that it was recorded after all, and then has its bytes."""
    sender, bounds = Sender(), list(pairwise(ENDS))

    @contextlib.contextmanager
    def left_open(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
        with transaction(connection) as db:
            yield db
            raise Corrupt("a change of the database may be lost or not")

    with Store(config) as store:
        store.recover()
        for each in bounds[:number]:
            send_part(store, sender, *each)
        with monkeypatch.context() as patch, pytest.raises(Corrupt):
            patch.setattr("deltasync_server.state.transaction", left_open)
            send_part(store, sender, *bounds[number])
        assert (config.data / "parts" / STREAM.hex()).stat().st_size == bounds[number][1]
    with Store(config) as store:
        store.recover()
        for each in bounds[number:]:
            send_part(store, sender, *each)
        send_made(store, sender, whole())
        assert_tree(store, sender)


def test_a_part_from_an_earlier_place_replaces_the_rest(store: Store) -> None:
    """What a stream had behind a part is no longer of it, whatever was there."""
    sender = Sender()
    send_parts(store, sender)
    changed = CONTENT[:100_000] + os.urandom(50_000)
    send_part(store, sender, 100_000, 150_000, content=changed)
    with pytest.raises(ContentMissing) as caught:
        give(store, *sealed_made(sender, whole()))
    assert caught.value.missing == [digest_of(CONTENT).hex()]
    send_made(store, sender, whole(size=150_000), content=changed)
    assert_tree(store, sender)


def test_a_failed_part_does_not_lengthen_what_it_began_to_replace(config: StoreConfig) -> None:
    """After bytes were written anew the old ones count no more, also when the new ones never became a part."""
    sender = Sender()
    with Store(config) as store:
        store.recover()
        send_parts(store, sender)
        with pytest.raises(Refused, match="B-66"):
            give(store, *sealed_part(sender, 100_000, 200_000, content=bytes(200_000), digest=bytes(32)))
        with pytest.raises(ContentMissing):
            give(store, *sealed_made(sender, whole()))
    with Store(config) as store:
        store.recover()
        send_part(store, sender, 100_000, 200_000)
        send_part(store, sender, 200_000, 300_000)
        send_made(store, sender, whole())
        assert_tree(store, sender)


def test_a_recipe_mixes_a_stream_with_bases_and_new_bytes(store: Store) -> None:
    """A stream is a base like any other; it is over with the bundle that names it."""
    sender = Sender()
    old = os.urandom(50_000)
    sender.send(store, sender.tree(old=old))
    send_parts(store, sender)
    made = recipe.compose(
        (digest_of(old), STREAM),
        [recipe.Segment(2, 0, 1_000), recipe.Segment(1, 500, 700), recipe.Segment(0, 0, 3), recipe.Segment(2, 5, 10)],
    )
    send_made(store, sender, made, CONTENT[:1_000] + old[500:1_200] + b"new" + CONTENT[5:15], b"new")
    assert_tree(store, sender)
    assert held(store) == []


def test_a_stream_of_what_came_otherwise_is_over_as_well(store: Store) -> None:
    """Content that another workspace brought meanwhile needs no stream; the bundle that names it ends that."""
    sender, other = Sender(), Sender(name=WorkspaceName("other"))
    send_parts(store, sender)
    other.send(store, other.tree(copy=CONTENT))
    send_made(store, sender, whole())
    assert_tree(store, sender)
    assert held(store) == []


def test_the_end_of_a_stream_removes_what_is_there_of_it(store: Store) -> None:
    """A part of no bytes says that nobody will name the stream."""
    sender = Sender()
    send_part(store, sender, 0, 100_000)
    send_part(store, sender, 0, 0)
    assert held(store) == [] and store.figures()["stream_bytes"] == 0
    send_part(store, sender, 0, 0, stream=OTHER)
    with pytest.raises(ContentMissing):
        give(store, *sealed_part(sender, 100_000, 200_000))


def test_streams_of_other_workspaces_cannot_be_used(store: Store) -> None:
    """An id says nothing in another workspace: neither its parts nor its content can be taken there."""
    alice, bob = Sender(), Sender(client_id=BOB, name=WorkspaceName("other"))
    send_parts(store, alice)
    with pytest.raises(ContentMissing):
        give(store, *sealed_made(bob, whole()))
    with pytest.raises(ContentMissing):
        give(store, *sealed_part(bob, 300_000, 300_001, content=CONTENT + b"x"))
    send_part(store, bob, 0, 0)
    assert held(store) == [STREAM.hex()]
    send_made(store, alice, whole())
    assert_tree(store, alice)


def test_a_stream_that_no_part_comes_of_is_removed_after_a_week(config: StoreConfig) -> None:
    """The clock is the host's: it must outlast the process. A stream that was just used stays, whatever it says."""
    sender = Sender()
    with Store(config) as store:
        store.recover()
        send_part(store, sender, 0, 100_000)
        assert store.streams.expire(time.time() + IDLE_SECONDS + 60) == 0
    with Store(config) as store:
        store.recover()
        assert store.streams.expire(time.time() + IDLE_SECONDS - 60) == 0
        assert store.streams.expire(time.time() + IDLE_SECONDS + 60) == 1
        assert held(store) == []


def test_a_start_forgets_what_is_not_whole(config: StoreConfig) -> None:
    """A file that is too short, or gone, is as if it had never come; a file without a row is removed."""
    sender = Sender()
    with Store(config) as store:
        store.recover()
        send_parts(store, sender)
        send_part(store, sender, 0, 100_000, stream=OTHER)
    os.truncate(config.data / "parts" / STREAM.hex(), 299_999)
    (config.data / "parts" / OTHER.hex()).unlink()
    (config.data / "parts" / "stray").write_bytes(b"x")
    found = check(config)
    assert sorted((each.kind, each.subject) for each in found.findings if each.kind != "tree") == [
        ("stream", STREAM.hex()),
        ("stream", OTHER.hex()),
        ("stream", "stray"),
    ]
    assert check(config, repair=True).is_sound
    assert check(config).findings == []
    assert os.listdir(config.data / "parts") == []


def test_a_stream_that_rotted_does_not_become_a_blob(config: StoreConfig) -> None:
    """What lies in the file is hashed after a restart; the content is asked for."""
    sender = Sender()
    with Store(config) as store:
        store.recover()
        send_parts(store, sender)
    with (config.data / "parts" / STREAM.hex()).open("r+b") as out:
        out.write(b"rotten")
    with Store(config) as store:
        store.recover()
        with pytest.raises(ContentMissing) as caught:
            give(store, *sealed_made(sender, whole()))
        assert caught.value.missing == [digest_of(CONTENT).hex()]


def test_of_two_that_write_one_place_the_last_goes_on(store: Store) -> None:
    """The first one cannot be recorded any more, and writes nothing behind the other's back."""
    part = Part(STREAM, 0, 100_000)
    with store.streams.begin(NAME, part, 1) as first:
        first.take(iter([memoryview(CONTENT[:50_000])]), lambda: digest_of(CONTENT[:50_000]))
        with store.streams.begin(NAME, part, 1) as second:
            with pytest.raises(HostBusy):
                first.take(iter([memoryview(CONTENT[:50_000])]), lambda: digest_of(CONTENT[:100_000]))
            second.take(iter([memoryview(CONTENT[:100_000])]), lambda: digest_of(CONTENT[:100_000]))
            with store.state.write() as db, pytest.raises(HostBusy):
                first.record(db, NAME, 0.0)
            with store.state.write() as db:
                second.record(db, NAME, 0.0)
    found = store.streams.opened(NAME, STREAM)
    assert found is not None and found[1] == 100_000
    os.close(found[0])


@pytest.mark.parametrize("start", [0, 100_000])
@pytest.mark.parametrize("moment", [1, 2])
def test_nothing_is_written_into_a_stream_that_becomes_a_blob(store: Store, moment: int, start: int) -> None:
    """A part of the same stream that comes before the commit does not change what is committed, nor when hashed."""
    sender = Sender()
    send_parts(store, sender)
    metadata, sealed = sealed_made(sender, whole())
    other = CONTENT[:start] + bytes(100_000)
    moments = 0

    def meddle(*_: object) -> None:
        nonlocal moments
        moments += 1
        if moments == moment:
            part = Part(STREAM, start, 100_000)
            with contextlib.suppress(ContentMissing), store.streams.begin(NAME, part, sender.sequence + 1) as writer:
                writer.take(iter([memoryview(other)[start:]]), lambda: digest_of(other))

    with contextlib.suppress(ContentMissing):
        store.receive(NAME, io.BytesIO(sealed), expected_identity=metadata.identity, decide_hook=meddle)
        sender.move_on({**sender.flat, **sender.tree(big=CONTENT)})
    assert_tree(store, sender)
    store.stop()
    assert check(store.config).findings == []


def test_nothing_is_written_behind_a_hash_that_is_made_again(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a part came while a stream was hashed, it is not taken for what it was."""
    sender = Sender()
    with Store(config) as store:
        store.recover()
        send_parts(store, sender)
    with Store(config) as store:
        store.recover()
        preadv, part = os.preadv, Part(STREAM, 0, 100_000)

        def read(descriptor: int, buffers: list[memoryview], offset: int) -> int:
            count = preadv(descriptor, buffers, offset)
            if offset + count == len(CONTENT):
                monkeypatch.undo()
                with store.streams.begin(NAME, part, sender.sequence + 1) as writer:
                    writer.take(iter([memoryview(bytes(100_000))]), lambda: digest_of(bytes(100_000)))
            return count

        monkeypatch.setattr(os, "preadv", read)
        with pytest.raises(ContentMissing):
            send_made(store, sender, whole())
        assert_tree(store, sender)


@pytest.mark.parametrize("size", [None, 150_000])
def test_a_stream_whose_file_is_gone_is_asked_for(store: Store, size: int | None) -> None:
    """Where somebody took the file, or bytes of it, zeros do not take their place."""
    sender = Sender()
    path = store.config.data / "parts" / STREAM.hex()

    def lose() -> None:
        path.unlink() if size is None else os.truncate(path, size)

    send_part(store, sender, 0, 100_000)
    send_part(store, sender, 100_000, 200_000)
    lose()
    with pytest.raises(ContentMissing) as caught:
        send_part(store, sender, 200_000, 300_000)
    assert caught.value.missing == [STREAM.hex()]
    send_parts(store, sender)
    lose()
    with pytest.raises(ContentMissing):
        send_made(store, sender, whole())
    send_parts(store, sender)
    send_made(store, sender, whole())
    assert_tree(store, sender)


def test_parts_take_no_place_among_the_kept_sequences(tmp_path: Path) -> None:
    """However many parts a file has, the trees before it are kept as long as the operator says."""
    with Store(StoreConfig(data=tmp_path / "data", keep_sequences=2, low_disk_bytes=0)) as store:
        store.recover()
        sender = Sender()
        sender.send(store, sender.tree(a=b"1"))
        sender.send(store, sender.tree(a=b"2"))
        sender.send(store, sender.tree(a=b"3"))
        send_parts(store, sender)
        assert [each.sequence for each in store.sequences(NAME).sequences] == [2, 3]
        store.collect()
        assert [each.sequence for each in store.sequences(NAME).sequences] == [2, 3]
        send_made(store, sender, whole())
        store.collect()
        assert [each.sequence for each in store.sequences(NAME).sequences] == [3, 7]
        assert_tree(store, sender)


def test_a_file_system_without_links_gets_a_copy(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a stream's file cannot have a second name its bytes are copied."""
    link = os.link

    def refuse(source: str, target: str, **options: int) -> None:
        if source == STREAM.hex():
            raise OSError(1, "no links here")
        link(source, target, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "link", refuse)
    sender = Sender()
    send_parts(store, sender)
    send_made(store, sender, whole())
    assert_tree(store, sender)
    assert held(store) == []


def test_bytes_behind_the_recorded_end_do_not_count(config: StoreConfig) -> None:
    """What a part left that was never recorded is cut off when the file becomes a blob."""
    sender = Sender()
    with Store(config) as store:
        store.recover()
        send_parts(store, sender)
    with (config.data / "parts" / STREAM.hex()).open("ab") as out:
        out.write(b"never recorded")
    with Store(config) as store:
        store.recover()
        send_made(store, sender, whole())
        assert_tree(store, sender)


def test_a_bundle_with_a_part_is_read_to_its_end_by_anyone(store: Store) -> None:
    """A reader that does not hold the stream checks everything but the digest."""
    _, sealed = sealed_part(Sender(), 100_000, 200_000)
    reader = bundle.BundleReader(io.BytesIO(sealed), wire.Limits())
    assert list(reader.contents()) == []
    reader.finish()
    arriving = bundle.BundleReader(io.BytesIO(sealed), wire.Limits()).part()
    assert arriving is not None and arriving.part == Part(STREAM, 100_000, 100_000)
