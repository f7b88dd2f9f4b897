"""Decoders of JSON by type: each is made once, and by one thread at a time."""

from __future__ import annotations

import threading
from typing import Any, TypeVar

import msgspec

_T = TypeVar("_T")
_made: dict[object, msgspec.json.Decoder[Any]] = {}
_lock = threading.Lock()


def decoded(content: bytes | str, kind: type[_T]) -> _T:
    """Return the value that JSON holds, as `msgspec.json.decode` does; raises msgspec.MsgspecError."""
    decoder = _made.get(kind)
    if decoder is None:
        # msgspec (0.22) describes a Struct in steps, in a place where other threads find it before it is whole: two
        # that meet a type for the first time together would crash the process.
        with _lock:
            decoder = _made[kind] = msgspec.json.Decoder(kind)
    try:
        value: _T = decoder.decode(content)
    except (UnicodeDecodeError, RecursionError) as error:  # msgspec lets these through as they are
        raise msgspec.DecodeError(f"JSON is malformed: {error}") from error
    return value
