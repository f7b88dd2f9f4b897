"""What is done of commands for many files, so that an interrupted one goes on where it was (spec J-72)."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator
from typing import Self

import msgspec

from deltasync import db
from deltasync.client.inputs import place_of
from deltasync.client.job_request import Draft
from deltasync.client.known import KnownDigests
from deltasync.client.opening import home_of_states
from deltasync.client.template import Template
from deltasync.core.argv import pattern_of
from deltasync.core.hashing import digest_of

DATABASE = "each.db"
KEEP_SECONDS = 90 * 86_400
_MIGRATIONS = [
    """
    CREATE TABLE finished (key BLOB PRIMARY KEY, at INTEGER NOT NULL) WITHOUT ROWID;
    CREATE INDEX finished_by_time ON finished (at)
    """
]


class Finished:
    """A record of each file that a template was done for; whoever lends it takes one call at a time."""

    def __init__(self, template: Template, folder: str) -> None:
        """Open the records of this user; a damaged database is thrown away, and everything is done once more."""
        asked = template.asked
        said = [sorted(each) for each in (asked.said.inputs, asked.said.outputs, asked.said.literals)]
        rest = (sorted((asked.environment or {}).items()), template.out_dir, folder, asked.said.is_in_place)
        self._template = digest_of(msgspec.msgpack.encode([_bytes(list(asked.argv)), _bytes(said), _bytes(rest)]))
        self._db = db.connect_disposable(home_of_states() / DATABASE, _MIGRATIONS)
        self._known = KnownDigests()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._known.__exit__()
        self._db.close()

    def has(self, draft: Draft, file: str) -> bool:
        """Tell whether a file is done as it is now, and all that came of it is still here."""
        digest = self._known.of(file)
        if digest is None or not all(_is_here(each.place) for each in draft.outputs if not each.is_pattern):
            return False
        if not all(any(_matches(each.place)) for each in draft.outputs if each.is_pattern):
            return False
        query = "SELECT 1 FROM finished WHERE key = ?"
        return self._db.execute(query, (self._key(draft, file, digest),)).fetchone() is not None

    def add(self, draft: Draft, file: str, digest: bytes | None) -> None:
        """Record that a file is done that had a digest; one that was changed in place has the one that it has now."""
        if file in draft.plan.in_place:
            digest = self._known.of(file)
        if digest is not None:
            now = int(time.time())
            with contextlib.suppress(sqlite3.Error), db.transaction(self._db):
                self._db.execute("INSERT OR REPLACE INTO finished VALUES (?, ?)", (self._key(draft, file, digest), now))
                self._db.execute("DELETE FROM finished WHERE at < ?", (now - KEEP_SECONDS,))

    def _key(self, draft: Draft, file: str, digest: bytes) -> bytes:
        outputs = sorted(each.place for each in draft.outputs)
        return digest_of(msgspec.msgpack.encode([self._template, place_of(file), digest, outputs]))


def _is_here(place: str) -> bool:
    return os.path.lexists(f"/{place}")


def _matches(place: str) -> Iterator[str]:
    folder, _, name = place.rpartition("/")
    form = pattern_of(name)
    with contextlib.suppress(OSError):
        yield from (each for each in os.listdir(f"/{folder}") if form is not None and form.match(each))  # noqa: PTH208


def _bytes(value: object) -> bytes:
    """Return words as bytes: some are no text."""
    return repr(value).encode()
