"""The inputs of a command on their way to a host: from a workspace that is there, or through a private one."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from deltasync.client import outbox
from deltasync.client.ignore import IgnoreRules
from deltasync.client.kept import Kept, digests_at, kept
from deltasync.client.memory import Memory
from deltasync.client.moves import joined
from deltasync.client.observation import ScanOptions, ScanReport
from deltasync.client.opening import client_id, home_of_states
from deltasync.client.push import Pusher, PushOptions
from deltasync.client.report import PathProblem, Progress
from deltasync.client.scan import scan
from deltasync.client.selection import Selection
from deltasync.client.state import UNREADABLE, State
from deltasync.core.errors import AlreadyRunning, InputsNotSent, UsageError
from deltasync.core.hashing import digest_of
from deltasync.core.jobs import Input
from deltasync.core.manifest import Entry, Kind
from deltasync.core.names import RESERVED, NameRefused, parse_path, shown
from deltasync.core.tree import find, walk
from deltasync.disk import Lock, open_regular, space_guard

if TYPE_CHECKING:
    from deltasync.client.receiver import Transport

FOLDER, MEMORY, TURN = "inputs", "reads.db", "turn"


class Need(NamedTuple):
    """A file or folder that a command reads."""

    path: str
    """Absolute, as it was named: links are not resolved."""
    is_in_place: bool = False


def files_at(real: str) -> Iterator[str]:
    """Yield the files at a path; links inside of a folder stay links (spec J-23)."""
    if not os.path.isdir(real):  # noqa: PTH112
        yield real
        return
    for folder, _, names in os.walk(real):
        yield from (path for path in (f"{folder}/{name}" for name in names) if not os.path.islink(path))  # noqa: PTH114


class Watcher(Protocol):
    """Hears how far the reading and the sending are."""

    def read(self, files: int, size_bytes: int) -> None:
        """Hear how many files and bytes were read so far."""

    def all_is_read(self) -> None:
        """Hear that everything was read."""

    def sent(self, progress: Progress) -> None:
        """Hear how far the sending is; called from the sending threads."""


@dataclass(slots=True)
class Report:
    """What it took to have the inputs on the host: the member `inputs` of `run --json`."""

    files: int = 0
    bytes: int = 0
    kept_bytes: int = 0
    """Of workspaces that the host has already: neither read nor sent."""
    read_bytes: int = 0
    sent_bytes: int = 0
    """Request bodies as sent."""
    cached_bytes: int = 0
    """Content that was new in the private workspace, and that the host had."""
    problems: list[PathProblem] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Delivered:
    """Inputs that the host has."""

    inputs: list[Input]
    report: Report
    is_any_kept: bool
    """One of them is of a workspace that the host had already."""
    digests: dict[str, bytes]
    """Of every file that the command may change, or where that was asked of every file, by its place."""


class _Placed(NamedTuple):
    """An input, its place, and the file or folder that it leads to."""

    need: Need
    place: str
    real: str

    def kept(self, url: str, *, digests: bool) -> Kept | None:
        """Return where a workspace of this client has it on a server already."""
        return kept(self.real, url, digests=digests or self.need.is_in_place)


def place_of(path: str) -> str:
    """Return the place of an absolute path below inputs/ or outputs/ (spec J-20), or raise UsageError."""
    try:
        return str(parse_path(path.removeprefix("/")))
    except NameRefused as error:
        raise UsageError(f"{shown(path)} cannot be carried: {error}; give it another name, or use a copy") from error


@contextlib.contextmanager
def delivered(
    transport: Transport,
    needs: Sequence[Need],
    *,
    watcher: Watcher,
    note: Callable[[str], None],
    settle_seconds: float = 2.0,
    may_keep: bool = True,
    digests_of_all: bool = False,
) -> Iterator[Delivered]:
    """Have inputs on a host, and keep others of this client from taking their sequence away while the block runs.

    may_keep: what a workspace has there already is taken from it. digests_of_all: not only of what may change.
    """
    began, report = time.monotonic(), Report()
    placed = _placed(needs)
    held = {each.real: each.kept(transport.url, digests=digests_of_all) if may_keep else None for each in placed}
    rest = [each for each in placed if held[each.real] is None]
    for each in rest:
        _require_readable(each.real)
    with contextlib.ExitStack() as stack:
        private = None
        if rest:
            private = stack.enter_context(_Private.turn(transport, note))
            private.carry(rest, watcher, settle_seconds, report, digests_of_all=digests_of_all)
        inputs: list[Input] = []
        digests: dict[str, bytes] = {}
        for each in placed:
            there = held[each.real] or private
            assert there is not None
            inputs.append(_input(each, there, report))
            if digests_of_all or each.need.is_in_place:
                known = there.digests if isinstance(there, Kept) else there.digests[each.real]
                digests |= {joined(each.place, path) if path else each.place: digest for path, digest in known.items()}
        report.seconds = time.monotonic() - began
        yield Delivered(inputs, report, any(held.values()), digests)


def _input(placed: _Placed, there: Kept | _Private, report: Report) -> Input:
    if isinstance(there, Kept):
        report.files += there.files
        report.bytes += there.size_bytes
        report.kept_bytes += there.size_bytes
    path = there.path if isinstance(there, Kept) else placed.real.removeprefix("/")
    return Input(
        workspace=there.workspace,
        sequence=there.sequence,
        path=path,
        place=placed.place,
        in_place=placed.need.is_in_place,
    )


def _placed(needs: Iterable[Need]) -> list[_Placed]:
    """Return every input once; one that lies in another one comes with it, and may be written as a part of it."""
    chosen: list[_Placed] = []
    unique = {each.path: each for each in sorted(needs, key=lambda each: not each.is_in_place, reverse=True)}
    for need in sorted(unique.values(), key=lambda each: each.path.split("/")):
        fresh = _Placed(need, place_of(need.path), _real(need.path))
        around = chosen[-1] if chosen else None
        if around is None or not f"{fresh.place}/".startswith(f"{around.place}/"):
            chosen.append(fresh)
        elif fresh.real != around.real + fresh.place.removeprefix(around.place):
            raise UsageError(
                f"{shown(need.path)} is reached through a link inside of {shown(around.need.path)}, which is an input "
                "as well; name the file that it leads to"
            )
        elif need.is_in_place:  # spec J-20
            chosen[-1] = around._replace(need=around.need._replace(is_in_place=True))
    return chosen


def _real(path: str) -> str:
    try:
        real = str(Path(path).resolve(strict=True))
    except (OSError, RuntimeError) as error:
        raise UsageError(f"{shown(path)} cannot be read; the command reads it") from error
    place_of(real)
    return real


def _require_readable(real: str) -> None:
    """Raise InputsNotSent where the system says that a command's file or folder cannot be read (spec J-24)."""
    todo = [real]
    while todo:
        path = todo.pop()
        try:
            if not os.path.isdir(path):  # noqa: PTH112 - one of many
                _try_reading(path)
                continue
            with os.scandir(path) as listing:
                for entry in listing:
                    if entry.is_file(follow_symlinks=False):
                        _try_reading(entry.path)
                    elif entry.is_dir(follow_symlinks=False) and entry.name != RESERVED:
                        todo.append(entry.path)
        except FileNotFoundError:
            continue  # gone again
        except OSError as error:
            raise InputsNotSent(
                f"{shown(error.filename or path)} {UNREADABLE} ({error.strerror}), and the command would run without "
                "it; make it readable, or move it out of the folder that the command reads"
            ) from error


def _try_reading(path: str) -> None:
    """Raise what the system says where a file cannot be opened; most are not opened to know."""
    if not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
        os.close(open_regular(path))


class _Private:
    """This client's own workspace on a host, with nothing but the inputs of one command (spec J-22)."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        owner = client_id()[:8]
        self.workspace = f"inputs-{owner}"
        self.sequence = 0
        self.digests: dict[str, dict[str, bytes]] = {}
        """Of the files of each input that the command may change, by their paths below it."""
        self._home = home_of_states() / FOLDER
        self._folder = self._home / f"{owner}-{digest_of(transport.url.encode()).hex()[:16]}"

    @classmethod
    @contextlib.contextmanager
    def turn(cls, transport: Transport, note: Callable[[str], None]) -> Iterator[_Private]:
        """Wait until no other command of this client sends inputs to this host (spec J-22)."""
        private = cls(transport)
        with space_guard(private._folder):
            private._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = private._folder.with_suffix(f".{TURN}")
        try:
            lock = Lock(path, "")
        except AlreadyRunning:
            note(f"another command sends its inputs to {transport.url}; waiting for it")
            lock = Lock(path, "", wait=True)
        with lock:
            yield private

    def carry(
        self,
        placed: Sequence[_Placed],
        watcher: Watcher,
        settle_seconds: float,
        report: Report,
        *,
        digests_of_all: bool = False,
    ) -> None:
        """Bring the workspace to exactly these inputs, and the host to that; raises InputsNotSent."""
        selection = Selection(each.real.removeprefix("/") for each in placed)
        with (
            Memory(self._home / MEMORY) as memory,
            State.open(Path("/"), state_dir=self._folder, workspace=self.workspace) as state,
        ):
            look = ScanOptions(
                ignore=IgnoreRules(state.root, has_files=False),
                settle_seconds=settle_seconds,
                selection=selection,
                memory=memory,
            )
            self._push(state, look, watcher, report)
            if report.read_bytes:
                memory.keep(state, time.time())
            _require_all(state, selection, report.problems)
            here = outbox.head(state)
            self.sequence = here.acknowledged_sequence
            self.digests = {
                each.real: digests_at(here.acknowledged_root, each.real.removeprefix("/"), state.load)
                for each in placed
                if digests_of_all or each.need.is_in_place
            }
            files, size_bytes = state.counts()
            report.files += files
            report.bytes += size_bytes

    def _push(self, state: State, look: ScanOptions, watcher: Watcher, report: Report) -> None:
        found: list[ScanReport] = []

        def rescan(folders: Collection[str]) -> None:
            found.append(scan(state, look, folders=folders, progress=watcher.read))

        options = PushOptions(workspace=self.workspace, allow_mass_delete=True, delete_excluded=True, wait=0.0)
        with Pusher(state, self._transport, options, progress=watcher.sent, rescan=rescan) as pusher:
            first = scan(
                state,
                look,
                progress=watcher.read,
                recorded=pusher.ahead.send_recorded,
                expect=pusher.expect,
                follow=pusher.ahead.follow,
            )
            watcher.all_is_read()
            pushed = pusher.run()
        report.read_bytes += sum(each.hashed_bytes for each in (first, *found))
        report.sent_bytes += pushed.sent_bytes
        report.cached_bytes += pushed.avoided_bytes
        report.problems += pushed.problems


def _require_all(state: State, selection: Selection, problems: Sequence[PathProblem]) -> None:
    """Raise InputsNotSent unless the host has every input as it is here, as far as it can be carried at all."""
    root, sealed = state.observed_root(), outbox.head(state).acknowledged_root
    for path in selection.paths:
        here, there = _at(root, path, state), _at(sealed, path, state)
        if here is None or here != there:
            inside = next((each for each in problems if f"{each.path}/".startswith(f"{shown(path)}/")), None)
            why = f": /{inside.path} {inside.reason}" if inside else ""
            raise InputsNotSent(f"/{shown(path)} could not be sent as it is here{why}; run the command again")
    unseen = {each.path: each for each in state.problems()}
    for path, _ in walk(root, state.load) if unseen else ():
        if (each := unseen.get(shown(path))) is not None:  # it is there as it was in an earlier command
            raise InputsNotSent(f"/{each.path} {each.reason}; a former content of it is not sent in its place")
    for each in unseen.values():
        if each.is_unreadable:  # such as a failing disk, which shows when it is read
            raise InputsNotSent(f"/{each.path} {each.reason}, and the command would run without it")
        if each.waiting:  # a folder without it would be another input
            raise InputsNotSent(f"/{each.path} {each.reason}; run the command again when it is whole")


def _at(root: bytes, path: str, state: State) -> Entry | None:
    return find(root, path, state.load) if path else Entry("", Kind.DIRECTORY, digest=root)
