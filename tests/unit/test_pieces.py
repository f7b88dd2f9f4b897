"""Pieces on their way: cut to size, several at once and no more, again where a retry helps, and given up together."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pytest

from deltasync.client.pieces import Upload, begun, cut
from deltasync.core import wire
from deltasync.core.errors import (
    DeltasyncError,
    HostBusy,
    HostUnreachable,
    NoSpace,
    NotFound,
    SequenceGap,
    UploadIncomplete,
)
from deltasync.core.hashing import digest_of

SIZE = 1000
SECONDS = 20.0
REQUEST = wire.UploadRequest(kind="bundle", workspace="w", identity="0" * 64)
RECEIPT = wire.Receipt(
    workspace="w",
    epoch="",
    sequence=1,
    identity="0" * 64,
    bundle_id="",
    root="",
    created=0,
    updated=0,
    moved=0,
    deleted=0,
    content_bytes=0,
    applied_at="",
    tree_sequence=None,
)


class Script:
    """A server by script: each request meets the next trouble that is foreseen for it, else succeeds."""

    max_retries = 2

    def __init__(self, **troubles: list[Exception | int]) -> None:
        self.troubles = troubles
        self.pieces: dict[int, bytes] = {}
        self.torn: dict[int, bytes] = {}
        self.asked: list[str] = []
        self.pauses = 0
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()
        self.gate: threading.Event | None = None

    def back_off(self, attempt: int, error: DeltasyncError | None = None) -> None:
        self.pauses += 1

    def ask(
        self,
        kind: type[Any],
        method: str,
        path: str,
        *,
        query: Mapping[str, str | int] | None = None,
        body: bytes | Iterable[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        extra_seconds: float = 0.0,
    ) -> Any:
        last = path.rpartition("/")[2]
        names = {"PUT": "piece", "GET": "state", "DELETE": "abort"}
        name = names.get(method, last) if last != "chunks" else last
        with self.lock:
            self.asked.append(name)
            trouble = self.troubles[name].pop(0) if self.troubles.get(name) else None
        if isinstance(trouble, Exception):
            raise trouble
        if name in ("initiate", "state"):
            return self._state()
        if name == "chunks":
            etags = {number: digest_of(piece).hex() for number, piece in self.pieces.items()}
            return wire.UploadParts(parts=[wire.UploadPart(chunk_num=n, etag=etag) for n, etag in etags.items()])
        if name == "piece":
            assert body is not None and headers is not None
            return self._take(int(path.rpartition("/")[2]), b"".join(body), headers, trouble)  # type: ignore[arg-type]
        return RECEIPT

    def _state(self) -> wire.UploadState:
        return wire.UploadState(
            upload_id="u",
            expires_at="",
            status="initiated",
            chunk_size=SIZE,
            total_chunks=None,
            uploaded_chunks=len(self.pieces),
            received_bytes=0,
            present=[(number, number) for number in self.pieces],
            partial=[wire.UploadPartial(chunk_num=n, received_bytes=len(part)) for n, part in self.torn.items()],
        )

    def _take(self, number: int, content: bytes, headers: Mapping[str, str], torn: int | None) -> None:
        offset = int(headers.get(wire.OFFSET_HEADER, 0))
        with self.lock:
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        if self.gate is not None:
            assert self.gate.wait(SECONDS)
        with self.lock:
            self.under_way -= 1
            whole = self.torn.get(number, b"")[:offset] + content
            if torn is not None and torn < len(content):
                self.torn[number] = whole[: offset + torn]
                raise HostUnreachable("torn")
            assert digest_of(whole).hex() == headers[wire.ETAG_HEADER]
            self.pieces[number] = whole
            if torn is not None:
                raise HostUnreachable("the answer is lost")


def send(script: Script, content: bytes, jobs: int = 1) -> wire.Receipt:
    chunks = [content[at : at + 333] for at in range(0, len(content), 333)]
    receipt = Upload(script, REQUEST, jobs).send(iter(chunks), {}, 0.0)
    assert b"".join(script.pieces[number] for number in sorted(script.pieces)) == content
    return receipt


def noise(size: int) -> bytes:
    return b"".join(digest_of(number.to_bytes(4, "little")) for number in range(-(-size // 32)))[:size]


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 5000, 5001])
@pytest.mark.parametrize("step", [1, 7, 1000, 6000])
def test_a_stream_is_cut_into_equal_pieces(size: int, step: int) -> None:
    """However the bytes come, all pieces but the last have the size, and none is empty."""
    content = noise(size)
    found = list(cut((content[at : at + step] for at in range(0, size, step)), SIZE))
    assert b"".join(found) == content
    assert all(len(piece) == SIZE for piece in found[:-1]) and all(0 < len(piece) <= SIZE for piece in found)


def test_only_the_beginning_is_held_to_know_whether_it_is_all() -> None:
    """One byte more than the limit is enough to know; the rest is not read yet."""
    chunks = iter([b"ab", b"cd", b"ef", b"gh"])
    assert begun(chunks, 4) == ([b"ab", b"cd", b"ef"], False) and next(chunks) == b"gh"
    assert begun(iter([b"ab", b"cd"]), 4) == ([b"ab", b"cd"], True)


def test_no_more_pieces_are_made_than_are_under_way() -> None:
    """The stream is read only as far as pieces may go: memory does not grow with the bundle."""
    script, read = Script(), []
    script.gate = threading.Event()

    def chunks() -> Iterator[bytes]:
        for number in range(20):
            read.append(number)
            yield bytes(SIZE)

    done: list[wire.Receipt] = []
    upload = Upload(script, REQUEST, 3)
    sender = threading.Thread(target=lambda: done.append(upload.send(chunks(), {}, 0.0)))
    sender.start()
    tick = threading.Event()
    while script.under_way < 3:
        tick.wait(0.01)
    assert len(read) <= 4
    script.gate.set()
    sender.join(SECONDS)
    assert done == [RECEIPT] and script.most_under_way == 3 and len(script.pieces) == 20


def test_a_torn_piece_goes_on_where_it_broke_off() -> None:
    """Progress does not count as failure: a piece may break more often than a request may be repeated."""
    script = Script(piece=[100, 200, 300, 50, 10])
    assert send(script, noise(2_500)) == RECEIPT
    assert script.asked.count("piece") == 8 and script.asked.count("state") == 5


def test_a_piece_whose_answer_was_lost_is_not_sent_again() -> None:
    """The server says that it is there."""
    script = Script(piece=[1_000])
    assert send(script, noise(1_000)) == RECEIPT
    assert script.asked == ["initiate", "piece", "state", "complete"]


def test_what_an_earlier_attempt_brought_is_not_sent_again() -> None:
    """The pieces that the server has are compared by their digests, and only the others go."""
    script, content = Script(), noise(4_500)
    script.pieces = {number: content[number * SIZE : (number + 1) * SIZE] for number in (0, 2, 4)}
    assert send(script, content) == RECEIPT
    assert script.asked == ["initiate", "chunks", "piece", "piece", "complete"]


@pytest.mark.parametrize("there", [{1: b"other"}, {9: b"more"}])
def test_pieces_of_other_bytes_end_an_upload(there: dict[int, bytes]) -> None:
    """A bundle whose compressed bytes came out otherwise is not mixed with those of before: it begins anew."""
    script = Script()
    script.pieces = there
    with pytest.raises(HostBusy):
        send(script, noise(4_500))
    assert script.asked[-1] == "abort" and "complete" not in script.asked


def test_lost_answers_to_begin_and_end_are_asked_for_again() -> None:
    """Both can be repeated: a second beginning is another upload, a second end the same answer."""
    script = Script(initiate=[HostBusy("stopping")], complete=[HostUnreachable("lost"), HostBusy("stopping")])
    assert send(script, noise(1_500), jobs=4) == RECEIPT
    assert script.pauses == 3


@pytest.mark.parametrize(
    ("troubles", "expected", "is_aborted"),
    [
        ({"piece": [HostUnreachable("gone")] * 9, "state": [HostUnreachable("gone")] * 9}, HostUnreachable, False),
        ({"complete": [HostUnreachable("gone")] * 9}, HostUnreachable, False),
        ({"piece": [NotFound("forgot")]}, HostBusy, True),
        ({"complete": [UploadIncomplete("forgot some")]}, HostBusy, False),
        ({"complete": [SequenceGap(1, 2)]}, SequenceGap, True),
        ({"piece": [NoSpace("full")]}, NoSpace, True),
    ],
)
@pytest.mark.parametrize("jobs", [1, 4])
def test_what_cannot_go_on_is_given_up(
    troubles: dict[str, list[Exception | int]], expected: type[DeltasyncError], is_aborted: bool, jobs: int
) -> None:
    """What the server forgot is worth another attempt; what it refuses is ended there, if it can be told."""
    script = Script(**{name: list(each) for name, each in troubles.items()})
    with pytest.raises(expected):
        send(script, noise(3_500), jobs)
    assert ("abort" in script.asked) == is_aborted


def test_the_full_disk_of_the_server_is_told_though_other_pieces_find_the_upload_gone() -> None:
    """The piece that found no room ended the upload: what is told is its refusal, whichever answer came first."""
    tick = threading.Event()

    class Ending(Script):
        def ask(self, kind: type[Any], method: str, path: str, **options: Any) -> Any:
            if path.endswith("chunk/1"):
                for _ in range(int(SECONDS / 0.01)):
                    if upload._trouble is not None:
                        break
                    tick.wait(0.01)
                raise NoSpace("full")
            if path.endswith("chunk/0"):
                self.begun.wait(SECONDS)
                raise NotFound("gone")
            return super().ask(kind, method, path, **options)

        begun = threading.Event()

    script = Ending()

    def chunks() -> Iterator[bytes]:
        yield noise(2_000)
        script.begun.set()

    upload = Upload(script, REQUEST, 3)
    with pytest.raises(NoSpace):
        upload.send(chunks(), {}, 0.0)


def test_trouble_of_the_stream_itself_ends_the_upload() -> None:
    """A file that changes while it is sealed is no trouble of the way: the upload is ended and its cause is told."""
    script = Script()

    def chunks() -> Iterator[bytes]:
        yield noise(2_500)
        raise ValueError("changed")

    with pytest.raises(ValueError, match="changed"):
        Upload(script, REQUEST, 2).send(chunks(), {}, 0.0)
    assert script.asked[-1] == "abort" and script.under_way == 0
