"""The uplink to each server, as pushes found it: what `plan` tells of the time that inputs take (spec J-77)."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import msgspec

from deltasync.client.opening import home_of_states
from deltasync.core.errors import DeltasyncError
from deltasync.core.hashing import digest_of
from deltasync.decoding import decoded
from deltasync.disk import staged

FOLDER = "uplinks"
LEAST_BYTES = 1 << 20
"""A push that sent less says nothing."""
_KEPT = 0.5
"""What an earlier push counts for beside the last one; before it, half of that."""


class Uplink(msgspec.Struct, frozen=True, kw_only=True):
    """What went to a server, and how long it took; the older the less."""

    bytes: float = 0.0
    seconds: float = 0.0

    @property
    def bytes_per_second(self) -> float:
        """The rate; 0 where nothing is known."""
        return self.bytes / self.seconds if self.seconds > 0 and math.isfinite(self.bytes) else 0.0


def uplink_to(url: str) -> Uplink:
    """Return what is known of the uplink to a server; a record that cannot be read is none."""
    with contextlib.suppress(OSError, msgspec.MsgspecError, ValueError):
        return decoded(_path(url).read_bytes(), Uplink)
    return Uplink()


def note_push(url: str, sent_bytes: int, seconds: float) -> None:
    """Hear what a push sent, and how long that took; trouble with the record is none of the push."""
    if sent_bytes < LEAST_BYTES or seconds <= 0:
        return
    before = uplink_to(url)
    found = Uplink(bytes=before.bytes * _KEPT + sent_bytes, seconds=before.seconds * _KEPT + seconds)
    with contextlib.suppress(OSError, DeltasyncError):
        _path(url).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with staged(_path(url)) as out:
            out.write(msgspec.json.encode(found))


def _path(url: str) -> Path:
    return home_of_states() / FOLDER / f"{digest_of(url.encode()).hex()[:16]}.json"
