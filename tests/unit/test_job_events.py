"""The events of a log are read as they come, in bounded memory, and nothing that is none passes."""

from __future__ import annotations

import base64
import random

import msgspec
import pytest

from deltasync.client import job_events
from deltasync.client.job_events import Event, events
from deltasync.core.errors import NotADeltasyncServer
from deltasync.core.jobs import Job, State

JOB = Job(
    id="ds_1_00000000", state=State.RUNNING, client_id="a" * 32, command=["x"], session_path="/s", created_at="now"
)


def framed(kind: str, at: int, content: bytes) -> bytes:
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (at, kind.encode(), content)


STREAM = (
    framed("stdout", 3, base64.b64encode(b"\0\xff\n"))
    + b":\n\n: a comment\n\n"
    + framed("state", 3, msgspec.json.encode(JOB))
    + framed("stderr", 7, base64.b64encode(b"oh"))
    + framed("gap", 90, b"12")
)


@pytest.mark.parametrize("size", [1, 2, 5, 64, 1 << 20])
def test_events_are_whole_however_they_come(size: int) -> None:
    """Kinds, places and bytes are those that were sent, wherever the stream is cut; comments are none."""
    found = list(events(STREAM[at : at + size] for at in range(0, len(STREAM), size)))
    assert found == [
        Event("stdout", 3, b"\0\xff\n"),
        Event("state", 3, job=JOB),
        Event("stderr", 7, b"oh"),
        Event("gap", 90, b"12"),
    ]


def test_an_event_that_was_cut_off_is_none() -> None:
    """What the connection broke off in is not told; it comes again."""
    assert len(list(events([STREAM[:-1]]))) == 3


@pytest.mark.parametrize(
    "stream",
    [
        framed("stdout", 1, b"no base64!"),
        framed("state", 1, b"{}"),
        framed("state", 1, b"[" * 100_000),
        framed("state", 1, b"\xff"),
    ],
)
def test_a_malformed_event_is_refused(stream: bytes) -> None:
    """Bytes that are no base64 and a state that is no job are those of no deltasync server."""
    with pytest.raises(NotADeltasyncServer):
        list(events([stream]))


@pytest.mark.parametrize("line", [b"", b"data: " + b"x" * 1000 + b"\n"])
def test_an_event_without_an_end_is_given_up(monkeypatch: pytest.MonkeyPatch, line: bytes) -> None:
    """Neither one endless line nor endless lines of one event fill the memory."""
    monkeypatch.setattr(job_events, "EVENT_BYTES_MAX", 10_000)
    asked = 0

    def endless():
        nonlocal asked
        while asked < 1000:
            asked += 1
            yield line or b"x" * 1000

    with pytest.raises(NotADeltasyncServer, match="has more than"):
        list(events(endless()))
    assert asked < 40


def test_random_bytes_are_no_events() -> None:
    """Noise is refused or ignored, and never fails in another way."""
    for seed in range(200):
        noise = random.Random(seed).randbytes(200)
        try:
            list(events([noise, b"\n\n", b"event: stdout\ndata: " + noise + b"\n\n"]))
        except NotADeltasyncServer:
            continue
