"""Admission: whether a request for a job is one that can be run here, and what its inputs are (spec J-30, J-33)."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from deltasync.core.argv import pattern_of
from deltasync.core.errors import LimitExceeded, NotFound, SequenceGone, UsageError
from deltasync.core.jobs import WORDS_MAX, Input, JobRequest, Word, require_place
from deltasync.core.manifest import Entry, Kind
from deltasync.core.names import NameRefused, bytes_text, parse_workspace, shown
from deltasync.core.tree import Loader, entries_of
from deltasync_server.config import StoreConfig
from deltasync_server.state import HOST, NO_CLIENT, kept_receipts, loader, workspace_row
from deltasync_server.tenants import Tenant, qualified

_NAME = re.compile(r"[A-Za-z0-9_]+")
_REFUSED = re.compile(r"LD_.*|DELTASYNC_.*|PATH|IFS|BASH_ENV|ENV|PYTHONSTARTUP")


class Admitted(NamedTuple):
    """What the inputs of a job come to."""

    roots: bytes
    """A digest for each input: of the directory object that it is, or that holds it."""
    kinds: str
    """A letter for each input: `d` for a folder, `f` for a file."""
    files: int
    size_bytes: int
    trees: dict[tuple[str, int], bytes]
    """The root of each workspace and sequence that they are taken from."""


def check(request: JobRequest) -> None:
    """Raise UsageError unless a request can be read, and says no more than it may (spec J-30, J-46)."""
    if request.client_id == HOST:
        raise UsageError(NO_CLIENT)  # spec J-61
    if not request.argv:
        raise UsageError("a job has a command")
    lines = [line for each in request.lists for line in each.lines]
    if len(request.argv) > WORDS_MAX:
        raise UsageError(f"a command has at most {WORDS_MAX} words, not {len(request.argv)}")
    if len(request.tool_version) > WORDS_MAX or (request.tool_version and not request.reuse):
        raise UsageError("tool_version is a command, and goes with reuse")
    for word in (*request.argv, *request.tool_version, *lines, *(each.value for each in request.environment)):
        filled(word, b"", b"")
    for output in request.outputs:
        require_place(output.place)
        if output.is_pattern:
            pattern_of(output.place.rpartition("/")[2])
    for one in request.inputs:
        if one.path:
            require_place(one.path)
    _require_apart([*(one.place for one in request.inputs), *(each.place for each in request.lists)])
    _check_names([each.name for each in request.environment])


def filled(word: Word, inputs: bytes, outputs: bytes) -> bytes:
    """Return a word with its places in a session; raises UsageError."""
    try:
        return b"".join(piece.filled(inputs, outputs) for piece in word)
    except UnicodeEncodeError as error:
        raise UsageError("a word of a command is no UTF-8; bytes that are none go as raw") from error


def _require_apart(places: list[str]) -> None:
    """Raise UsageError for two places of which one is the other, or lies in it."""
    parts = sorted(require_place(place).split("/") for place in places)
    for one, other in pairwise(parts):
        if other[: len(one)] == one:  # whatever sorts between a folder and what lies in it lies in it too
            raise UsageError(f"two inputs have the places {shown('/'.join(one))} and {shown('/'.join(other))}")


def _check_names(names: list[str]) -> None:
    for name in names:
        if not _NAME.fullmatch(name) or _REFUSED.fullmatch(name):
            raise UsageError(f"a command's environment cannot have the variable {shown(name)}")
    if len(set(names)) < len(names):
        raise UsageError("a variable of a command's environment is named twice")


def require_limits(config: StoreConfig, request: JobRequest, gpus: int) -> None:
    """Raise LimitExceeded for more time or GPUs than there are (spec J-33)."""
    seconds = request.timeout_seconds
    if seconds is not None and seconds > config.job_seconds:
        raise LimitExceeded(
            "J-33",
            f"a command may run for {config.job_seconds:g} s here, not {seconds:g} s",
            limit=int(config.job_seconds),
        )
    if request.gpus > gpus:
        raise LimitExceeded("J-33", f"the host has {gpus} GPUs, not {request.gpus}", limit=gpus)


def admit(db: sqlite3.Connection, config: StoreConfig, tenant: Tenant, request: JobRequest) -> Admitted:
    """Look every input up in its tree; raises NotFound, SequenceGone or LimitExceeded (spec J-30, J-33)."""
    look = _Lookup(db, config, tenant)
    roots, kinds = bytearray(), ""
    files, size_bytes = len(request.lists), sum(_size_of(each.lines) for each in request.lists)
    for each in request.inputs:
        digest, entry = look.find(each)
        roots += digest
        kinds += "d" if entry.kind is Kind.DIRECTORY else "f"
        for path, file in look.files(entry):
            _require_file(config, f"{each.place}{path}", file.size)
            files, size_bytes = files + 1, size_bytes + file.size
    if size_bytes > config.job_session_bytes:
        raise LimitExceeded(
            "J-33",
            f"the inputs of a job may have {bytes_text(config.job_session_bytes)} here, not {bytes_text(size_bytes)}",
            limit_bytes=config.job_session_bytes,
            needed_bytes=size_bytes,
        )
    return Admitted(bytes(roots), kinds, files, size_bytes, look.roots)


def require_kept(
    db: sqlite3.Connection, config: StoreConfig, tenant: Tenant, request: JobRequest, admitted: Admitted
) -> None:
    """Raise as `admit` does where a tree that an input was found in is not kept any more."""
    look = _Lookup(db, config, tenant)
    for each in request.inputs:
        if look.root(each) != admitted.trees[each.workspace, each.sequence]:
            raise SequenceGone(each.sequence, None, None)


def _require_file(config: StoreConfig, place: str, size_bytes: int) -> None:
    if size_bytes > config.job_file_bytes:
        raise LimitExceeded(
            "J-33",
            f"a file of a job may have {bytes_text(config.job_file_bytes)} here, and {shown(place)} has "
            f"{bytes_text(size_bytes)}",
            limit_bytes=config.job_file_bytes,
            needed_bytes=size_bytes,
        )


def _size_of(lines: list[Word]) -> int:
    return sum(len(filled(line, b"", b"")) for line in lines)


class _Lookup:
    """Finds inputs in trees; a directory object that was read is not read again."""

    def __init__(self, db: sqlite3.Connection, config: StoreConfig, tenant: Tenant) -> None:
        self._db, self._config, self._tenant = db, config, tenant
        self._load: Loader = loader(db)
        self._folders: dict[bytes, dict[str, Entry]] = {}
        self.roots: dict[tuple[str, int], bytes] = {}

    def root(self, each: Input) -> bytes:
        """Return the root of the tree that an input is in."""
        named = (each.workspace, each.sequence)
        if named not in self.roots:
            self.roots[named] = self._kept(each)
        return self.roots[named]

    def _kept(self, each: Input) -> bytes:
        try:
            name = qualified(self._tenant, parse_workspace(each.workspace))
        except NameRefused as error:
            raise UsageError(f"not a workspace name: {error}") from error
        if workspace_row(self._db, name) is None:
            raise NotFound(f"workspace {each.workspace!r} was never written")
        kept = {row.sequence: row.root for row in kept_receipts(self._db, name, self._config.keep_sequences)}
        if each.sequence not in kept:
            raise SequenceGone(each.sequence, min(kept, default=None), max(kept, default=None))
        return kept[each.sequence]

    def find(self, each: Input) -> tuple[bytes, Entry]:
        """Return the directory object that an input is, or that holds it, and its entry."""
        digest, entry = self.root(each), Entry("", Kind.DIRECTORY, digest=self.root(each))
        for part in filter(None, each.path.split("/")):
            digest = entry.digest
            found = self._entries(digest).get(part) if entry.kind is Kind.DIRECTORY else None
            if found is None:
                raise NotFound(f"sequence {each.sequence} of {each.workspace!r} has no {shown(each.path)}")
            entry = found
        if entry.kind is Kind.SYMLINK:
            raise UsageError(f"the input {shown(each.path)} of {each.workspace!r} is a link; name what it leads to")
        return (entry.digest if entry.kind is Kind.DIRECTORY else digest), entry

    def files(self, entry: Entry, path: str = "") -> Iterator[tuple[str, Entry]]:
        """Yield a file, or every file in a folder, with its path below."""
        if entry.kind is Kind.FILE:
            yield path, entry
        elif entry.kind is Kind.DIRECTORY:
            for child in self._entries(entry.digest).values():
                yield from self.files(child, f"{path}/{child.name}")

    def _entries(self, digest: bytes) -> dict[str, Entry]:
        if digest not in self._folders:
            self._folders[digest] = {entry.name: entry for entry in entries_of(digest, self._load)}
        return self._folders[digest]
