"""The events of a job's log as they come: server-sent events, read in bounded memory (spec J-47)."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import msgspec

from deltasync.core.errors import NotADeltasyncServer
from deltasync.core.jobs import Job
from deltasync.decoding import decoded

EVENT_BYTES_MAX = 16 << 20
"""What one event may have: a job's command has a place in it (spec H-142)."""
STREAMS = ("stdout", "stderr")


class Event(NamedTuple):
    """One event of a log."""

    kind: str
    """`stdout`, `stderr`, `gap` or `state`; any other is of a later release."""
    at: int | None
    """The place in the log behind it; None where it says none."""
    content: bytes = b""
    """What the command wrote, as it wrote it; of any other event, its words."""
    job: Job | None = None


def events(pieces: Iterable[bytes]) -> Iterator[Event]:
    """Yield the whole events of a stream; raises NotADeltasyncServer for what is none."""
    kind, at, text = "", None, bytearray()
    for line in _lines(pieces):
        if line:
            name, _, value = line.partition(b":")
            value = value.removeprefix(b" ")
            if name == b"event":
                kind = value.decode("ascii", "replace")
            elif name == b"id":
                at = int(value) if re.fullmatch(rb"[0-9]{1,18}", value) else None
            elif name == b"data":
                text += (b"\n" if text else b"") + value
            if len(text) > EVENT_BYTES_MAX:
                raise NotADeltasyncServer(f"an event of a log has more than {EVENT_BYTES_MAX} bytes")
            continue
        if kind or text:
            yield _event(kind, at, bytes(text))
        kind, at, text = "", None, bytearray()


def _lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield whole lines without their ends; what an end is still missing of is no line."""
    left = b""
    for piece in pieces:
        *whole, rest = piece.split(b"\n")
        if whole:
            yield (left + whole[0]).rstrip(b"\r")
            yield from (line.rstrip(b"\r") for line in whole[1:])
            left = b""
        left += rest
        if len(left) > 2 * EVENT_BYTES_MAX:
            raise NotADeltasyncServer(f"a line of a log has more than {2 * EVENT_BYTES_MAX} bytes")


def _event(kind: str, at: int | None, text: bytes) -> Event:
    try:
        if kind in STREAMS:
            return Event(kind, at, base64.b64decode(text, validate=True))
        if kind == "state":
            return Event(kind, at, job=decoded(text, Job))
    except (binascii.Error, msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise NotADeltasyncServer(f"an event of a log is malformed: {error}") from error
    return Event(kind, at, text)
