"""Homecoming: what a job returned comes into the folders that the user named, and nothing else there changes."""

from __future__ import annotations

import contextlib
import os
import stat
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deltasync.client.comparison import MayReplace
from deltasync.client.digest import Digester, FileChanging
from deltasync.client.fetch import JOBS, FetchOptions, Origin, Trouble, Watcher, fetch
from deltasync.client.moves import joined
from deltasync.client.wanted import Scope, find_entries
from deltasync.core.errors import NotADeltasyncServer, RootUnavailable, UsageError
from deltasync.core.hashing import digest_of
from deltasync.core.jobs import JOB_ID, Returned
from deltasync.core.manifest import Entry, Kind
from deltasync.core.names import RESERVED, shown
from deltasync.disk import Folder, Lock, open_regular, remove_tree, space_guard

NOTHING: Mapping[str, bytes] = {}
LOCK = "home.lock"
"""In the hidden folder of one in which inputs are replaced: held while that is done."""


@dataclass(slots=True)
class HomeReport:
    """What came home."""

    files: int = 0
    bytes: int = 0
    """The files that are here now, and what they hold."""
    fetched_bytes: int = 0
    """Content that came from the host; the rest was here already."""
    problems: list[Trouble] = field(default_factory=list)
    """What could not be brought to its place, and why; both are safe to print."""
    damaged: list[str] = field(default_factory=list)
    """Paths whose content the host gave wrong, twice."""


def bring_home(
    origin: Origin,
    returned: Returned,
    targets: Mapping[str, Path],
    watcher: Watcher,
    *,
    in_place: Mapping[str, bytes] = NOTHING,
    may_replace: MayReplace | None = None,
    job_id: str = "",
    jobs: int = JOBS,
) -> HomeReport:
    """Bring each returned place that has a target to it (spec J-62); trouble with one of them is data.

    in_place: of inputs that the command could write, by their places, the digest that was sent; b'' where nothing was.
    may_replace: whether an output, by its place, may take the place of what is there; without it any may.
    Raises what a fetch raises where the host cannot be reached, or does not keep the sequence; a repetition goes on.
    """
    name = job_id if JOB_ID.fullmatch(job_id) else f"job-{returned.sequence}"
    home = _Home(origin, returned, watcher, jobs, name, may_replace)
    places = [place for place in returned.places if place in targets]
    if not places:
        return home.report
    kept = origin.sequence(returned.workspace, returned.sequence)
    if kept.root != returned.root:
        raise NotADeltasyncServer(f"{origin.url} keeps another tree than the one that it returned")
    entries = find_entries(origin, returned.workspace, bytes.fromhex(kept.root), places)
    files: defaultdict[tuple[str, Path], list[str]] = defaultdict(list)
    changed: defaultdict[tuple[str, Path], list[tuple[str, Path, Entry]]] = defaultdict(list)
    for place in places:
        target, entry = targets[place], entries.get(place)
        above, _, name = place.rpartition("/")
        if not home.can_take(target, entry, is_in_place=place in in_place):
            continue
        assert entry is not None
        if entry.kind is Kind.DIRECTORY:
            home.fetch(target, place)
        elif place in in_place or target.name != name:
            changed[above, target.parent].append((place, target, entry))
        else:
            files[above, target.parent].append(name)
    for (above, folder), names in files.items():  # one fetch for each folder
        home.fetch(folder, above, names)
    for (above, folder), found in changed.items():
        home.replace(folder.resolve(), above, found, in_place)
    return home.report


class _Home:
    """One homecoming."""

    def __init__(
        self,
        origin: Origin,
        returned: Returned,
        watcher: Watcher,
        jobs: int,
        job_id: str,
        may_replace: MayReplace | None,
    ) -> None:
        self._origin, self._returned, self._watcher = origin, returned, watcher
        self._jobs, self._job_id, self._may_replace = jobs, job_id, may_replace
        self.report = HomeReport()

    def _refuse(self, target: Path, reason: str) -> bool:
        self.report.problems.append(Trouble(shown(str(target)), reason))
        return False

    def can_take(self, target: Path, entry: Entry | None, *, is_in_place: bool) -> bool:
        """Tell whether a target can become what came home; says why not."""
        if entry is None:
            return self._refuse(target, "is not in what the host returned")
        if entry.kind is Kind.SYMLINK or (is_in_place and entry.kind is not Kind.FILE):
            return self._refuse(target, f"is a {entry.kind.value} there, which no host may return")
        try:
            if is_in_place and target.parent.resolve() != target.parent:  # what was sent lies behind no link
                return self._refuse(target, "lies behind a link here; a link is not followed")
            if not target.parent.is_dir():
                return self._refuse(target, "its folder is not here; make it, then fetch again")
            mode = target.lstat().st_mode
        except FileNotFoundError:
            return True
        except OSError as error:
            return self._refuse(target, f"cannot be looked at ({error.strerror})")
        if entry.kind is Kind.FILE and stat.S_ISDIR(mode):
            return self._refuse(target, "is a folder here, and a file there; move it away, then fetch again")
        if entry.kind is Kind.DIRECTORY and stat.S_ISLNK(mode):
            return self._refuse(target, "is a link here, and a folder there; a link is not followed")
        if entry.kind is Kind.DIRECTORY and not stat.S_ISDIR(mode):
            return self._refuse(target, "is a file here, and a folder there; move it away, then fetch again")
        return True

    def fetch(self, dest: Path, inside: str, names: Sequence[str] = (), *, told: Path | None = None) -> bool:
        """Fetch a folder of the tree, or some names in it, into DEST; False where DEST takes nothing.

        told: the folder that problems are told of, where it is another one.
        """
        options = FetchOptions(
            self._returned.workspace,
            at=self._returned.sequence,
            inside=inside,
            scope=Scope(tuple(sorted(names))),
            is_own=True,
            may_replace=self._judge(inside) if told is None else None,
            jobs=self._jobs,
        )
        try:
            done = fetch(self._origin, dest, options, self._watcher)
        except (RootUnavailable, UsageError) as error:
            return self._refuse(told or dest, error.sentence)
        report = self.report
        report.files, report.bytes = report.files + done.files, report.bytes + done.bytes
        report.fetched_bytes += done.fetched_bytes
        where = shown(str(told or dest))
        report.problems += [Trouble(f"{where}/{each.path}", each.reason) for each in done.problems]
        report.damaged += [f"{where}/{path}" for path in done.damaged]
        return True

    def _judge(self, inside: str) -> MayReplace | None:
        """Return what may be replaced in a DEST that stands for a folder of the tree."""
        asked = self._may_replace
        return None if asked is None else lambda path, status: asked(joined(inside, path) if inside else path, status)

    def replace(
        self, folder: Path, inside: str, found: Sequence[tuple[str, Path, Entry]], sent: Mapping[str, bytes]
    ) -> None:
        """Replace files that are still what was sent; what came home for others is put beside them (spec J-62).

        It arrives in a folder of its own, on the same file system, so that a look and a rename are all that is left.
        """
        with contextlib.ExitStack() as stack:
            try:
                held = stack.enter_context(Folder.open(folder))
                ours = stack.enter_context(_alone(held, folder))
            except OSError as error:
                self._refuse(folder, f"cannot be written ({error.strerror})")
                return
            left = [each for each in found if not self._is_home(each[1], each[2])]
            name = f"home-{digest_of(f'{self._job_id}/{inside}'.encode()).hex()[:16]}"
            names = [entry.name for _, _, entry in left]
            if not left or not self.fetch(folder / RESERVED / name, inside, names, told=folder):
                return
            with ours.enter(name) as arrived:
                there = set(arrived.names())
                for place, target, entry in left:
                    if entry.name in there:
                        self._put(held, arrived, target, entry, sent.get(place))
                held.fsync()
            remove_tree(ours, name)

    def _is_home(self, target: Path, entry: Entry) -> bool:
        """Tell whether a target has the content already, as after a homecoming that was cut short."""
        if _digest_at(target) != entry.digest:
            return False
        with Folder.open(target.parent.resolve()) as folder:  # the other one may have been cut short before this
            descriptor = open_regular(target.name, at=folder.fd)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            folder.fsync()
        self.report.files += 1
        self.report.bytes += entry.size
        return True

    def _put(self, folder: Folder, arrived: Folder, target: Path, entry: Entry, sent: bytes | None) -> None:
        """Give a file that came its name. sent: what has to be there; None: whatever is, as of an output."""
        name = target.name
        try:
            if sent is not None and _digest_at(target) != (sent or None):
                name = f"{name}.from-{self._job_id}"
                self._refuse(
                    target, f"changed here while the job ran, and was left; what came is beside it: {shown(name)}"
                )
            elif target.is_file() and not target.is_symlink():
                _take_mode(arrived, entry.name, target)
            os.rename(entry.name, name, src_dir_fd=arrived.fd, dst_dir_fd=folder.fd)
        except OSError as error:
            self._refuse(target.with_name(name), f"cannot be written ({error.strerror})")


@contextlib.contextmanager
def _alone(folder: Folder, path: Path) -> Iterator[Folder]:
    """Hold the hidden folder inside a held one, while no other homecoming replaces anything there (spec J-62)."""
    while True:
        with contextlib.ExitStack() as stack:
            try:
                with space_guard(path):
                    ours = stack.enter_context(folder.walk_to(RESERVED, create=True))
                    lock = stack.enter_context(Lock(LOCK, "", at=ours.fd, wait=True))
            except FileNotFoundError:
                if not os.fstat(folder.fd).st_nlink:
                    raise  # the folder itself was removed
                continue
            if not lock.is_named(LOCK, at=ours.fd):  # whoever had it before has removed it
                continue
            try:
                yield ours
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(LOCK, dir_fd=ours.fd)
                    os.rmdir(RESERVED, dir_fd=folder.fd)  # refused while it holds something else
            return


def _digest_at(path: Path) -> bytes | None:
    """Return the digest of a file; None where none is, b'' where what is there is no file that holds still."""
    try:
        with Folder.open(path.parent.resolve()) as folder:
            return Digester().digest_file(path.name, at=folder.fd).digest
    except FileNotFoundError:
        return None
    except (OSError, FileChanging):
        return b""


def _take_mode(arrived: Folder, name: str, target: Path) -> None:
    """Let who could read a file read the one that takes its place, and nobody else."""
    os.chmod(name, stat.S_IMODE(target.stat().st_mode), dir_fd=arrived.fd)
