"""Fetching: bring a folder to the tree that a server holds, or to a part of it; a push the other way round."""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from deltasync.client.comparison import Comparing, Comparison, MayReplace, Need, files_below
from deltasync.client.destination import Destination, usable
from deltasync.client.digest import Digester, FileChanging
from deltasync.client.download import Download, Source
from deltasync.client.listing import clamped, is_executable
from deltasync.client.moves import joined
from deltasync.client.resync import root_of
from deltasync.client.seal import GUARD_ENTRIES
from deltasync.client.wanted import EVERYTHING, Directories, Scope, Wanted, fetch_wanted, find_folder
from deltasync.core import wire
from deltasync.core.errors import GuardStopped, NotADeltasyncServer, NotFound
from deltasync.core.hashing import DIGEST_BYTES, directory_digest
from deltasync.core.manifest import Entry, Kind, encode_directory
from deltasync.core.names import shown
from deltasync.disk import Folder, fsync_each, require_confinement

JOBS = 4


class Origin(Source, Directories, Protocol):
    """The server that is fetched from."""

    def workspace(self, name: str, *, tree_sequence: int | None = None, wait: float = 0.0) -> wire.WorkspaceState:
        """Return a workspace's head."""

    def sequence(self, name: str, number: int) -> wire.KeptSequence:
        """Return one of the kept sequences."""


@dataclass(frozen=True, slots=True)
class FetchOptions:
    """What is fetched, and what may happen to DEST."""

    workspace: str
    at: int | None = None
    """One of the kept sequences; None is the last."""
    inside: str = ""
    """The folder of the tree that DEST stands for; the scope lies in it."""
    scope: Scope = EVERYTHING
    is_own: bool = False
    """DEST is where somebody works, and what comes is the only copy: it may be a workspace, nothing but what is wanted
    is looked at in it, another fetch into it is waited for, and what came is made durable (spec J-62)."""
    may_replace: MayReplace | None = None
    """Asked of each file here that is not what is wanted, by its path in DEST; what it denies is left, and told."""
    delete: bool = False
    allow_mass_delete: bool = False
    dry_run: bool = False
    jobs: int = JOBS


class Watcher(Protocol):
    """Hears how far a fetch is."""

    def read(self, files: int, size_bytes: int) -> None:
        """Hear how much of what is here was read."""

    def all_is_read(self) -> None:
        """Hear that everything was read."""

    def fetched(self, size_bytes: int, total_bytes: int) -> None:
        """Hear how much has arrived, of how much; called from the fetching threads."""


@dataclass(frozen=True, slots=True)
class Change:
    """One path that differs, and what becomes of it."""

    operation: str
    path: str


@dataclass(frozen=True, slots=True)
class Trouble:
    """A path that could not be brought to what it should be, and why; both are safe to print."""

    path: str
    reason: str


@dataclass(slots=True)
class FetchReport:
    """What a fetch did: the members of `fetch --json`."""

    workspace: str
    sequence: int
    root: str
    """The tree that was fetched, or of which a part was."""
    files: int = 0
    bytes: int = 0
    """The wanted files, and what they hold."""
    created: int = 0
    replaced: int = 0
    """Files and links that were something else before."""
    touched: int = 0
    """Files that got another time or executable bit, and kept their content."""
    unchanged: int = 0
    deleted: int = 0
    fetched_bytes: int = 0
    """Content that came from the server."""
    found_bytes: int = 0
    """Content that was here already: in place, elsewhere in DEST, or left by a fetch that was interrupted."""
    verified: bool = False
    """Everything that was wanted is in DEST now, as its digests say."""
    damaged: list[str] = field(default_factory=list)
    """Paths whose content the server gave wrong, twice."""
    problems: list[Trouble] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    """What a dry run found to be done."""
    dry_run: bool = False
    seconds: float = 0.0


def fetch(origin: Origin, dest: Path, options: FetchOptions, watcher: Watcher) -> FetchReport:
    """Bring DEST to what the server holds; raises GuardStopped before anything was changed."""
    began = time.monotonic()
    require_confinement()
    real = usable(dest, may_be_workspace=options.is_own)
    sequence, root = _chosen(origin, options)
    top = find_folder(origin, options.workspace, root, options.inside)
    wanted = fetch_wanted(origin, options.workspace, top, options.scope)
    report = FetchReport(options.workspace, sequence, root.hex(), dry_run=options.dry_run)
    if options.dry_run:
        _foresee(real, wanted, options, watcher, report)
    else:
        _Fetch(origin, options, wanted, watcher, report).run(real)
    report.seconds = time.monotonic() - began
    return report


def _chosen(origin: Origin, options: FetchOptions) -> tuple[int, bytes]:
    """Return the sequence and the root to fetch; a push from now on does not change them (spec F-1)."""
    if options.at is None:
        server = origin.workspace(options.workspace)
        if not server.sequence:
            raise NotFound(f"{origin.url} has no workspace {shown(options.workspace)}; check its name")
        return server.sequence, root_of(server)
    kept = origin.sequence(options.workspace, options.at)
    try:
        root = bytes.fromhex(kept.root)
    except ValueError:
        root = b""
    if len(root) != DIGEST_BYTES or kept.sequence != options.at:
        raise NotADeltasyncServer(f"{origin.url} states a sequence that is malformed")
    return kept.sequence, root


def _compared(folder: Folder | None, wanted: Wanted, options: FetchOptions, watcher: Watcher) -> Comparison:
    found = Comparing(
        wanted,
        delete=options.delete,
        may_be_workspace=options.is_own,
        may_replace=options.may_replace,
        read=watcher.read,
    ).compare(folder)
    watcher.all_is_read()
    many = found.deleted > GUARD_ENTRIES and 2 * found.deleted > found.entries
    if found.deleted and (many or found.deleted == found.entries) and not options.allow_mass_delete:
        raise GuardStopped(
            f"{found.deleted} of {found.entries} entries would be deleted here; "
            "nothing was changed; if that is meant, fetch with --allow-mass-delete",
            deleted=found.deleted,
            entries=found.entries,
            flag="--allow-mass-delete",
        )
    return found


def _foresee(real: Path, wanted: Wanted, options: FetchOptions, watcher: Watcher, report: FetchReport) -> None:
    """Fill a report with what would be done."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(Folder.open(real)) if real.exists() else None
        found = _compared(folder, wanted, options, watcher)
        local = _elsewhere(folder, found, options) if folder is not None else {}
    places = [*found.folders, *found.links, *(place for need in found.needs.values() for place in need.places)]
    changes = [(place.path, "replaced" if place.is_replacing else "created") for place in places]
    changes += [(place.path, "touched") for place in found.touches]
    changes += [(path, "deleted") for path in found.extras if options.delete]
    report.changes = [Change(operation, shown(path)) for path, operation in sorted(changes)]
    report.created = sum(1 for place in places if not place.is_replacing and place.entry.kind is not Kind.DIRECTORY)
    report.replaced = sum(1 for place in places if place.is_replacing and place.entry.kind is not Kind.DIRECTORY)
    report.touched = len(found.touches)
    report.deleted = found.deleted
    asked = [need for need in found.needs.values() if need.digest not in local]
    report.fetched_bytes = sum(need.size for need in asked)
    _complete(report, found, found.problems, asked)


def _complete(report: FetchReport, found: Comparison, problems: dict[str, str], asked: Iterable[Need]) -> None:
    """Fill in what both kinds of fetch know. asked: the contents that the server was, or would be, asked for."""
    report.files, report.bytes, report.unchanged = found.files, found.size_bytes, found.unchanged
    lacking = 0
    for need in asked:
        missing = sum(1 for place in need.places if place.path in problems)
        lacking += need.size * max(1, missing)
    report.found_bytes += found.size_bytes - lacking
    report.problems = [Trouble(shown(path), reason) for path, reason in sorted(problems.items())]


def _elsewhere(folder: Folder, found: Comparison, options: FetchOptions) -> dict[bytes, str]:
    """Return where in DEST contents lie that are needed at other paths."""
    places = {digest: path for path, digest in found.here.items() if digest in found.needs}
    sizes = {need.size for need in found.needs.values() if need.digest not in places}
    digester = Digester()
    for path, size in files_below(folder, "") if sizes and not options.is_own else ():
        if size not in sizes or path in found.here:
            continue
        inside, _, name = path.rpartition("/")
        with contextlib.suppress(OSError, FileChanging), folder.walk_to(inside) as held:
            places.setdefault(digester.digest_file(name, at=held.fd).digest, path)
    return {digest: path for digest, path in places.items() if digest in found.needs}


class _Fetch:
    """One fetch into a held DEST."""

    def __init__(
        self, origin: Origin, options: FetchOptions, wanted: Wanted, watcher: Watcher, report: FetchReport
    ) -> None:
        self._origin, self._options, self._wanted = origin, options, wanted
        self._watcher, self._report = watcher, report

    def run(self, real: Path) -> None:
        dest = Destination(real, may_delete=self._options.delete, waits=self._options.is_own)
        is_done = False
        try:
            self._fill(dest)
            is_done = True
        finally:
            dest.close(is_done=is_done)

    def _fill(self, dest: Destination) -> None:
        found = _compared(dest.folder, self._wanted, self._options, self._watcher)
        dest.problems.update(found.problems)
        here = self._gathered(dest, found)  # before anything is replaced (spec F-14)
        for place in found.folders:
            dest.put_folder(place)
        for place in found.touches:
            dest.touch(place)
        for need in here:
            dest.put(need, need.digest.hex())
        for need in here:
            del found.needs[need.digest]
        download = self._download(dest, list(found.needs.values()))
        for place in found.links:
            if self._options.is_own:  # spec J-60: whoever reads it next would follow it
                dest.report(place.path, "is a link there, which no host may return")
            else:
                dest.put_link(place)
        dest.forget_near()
        self._delete(dest, found)
        self._report.damaged = [shown(path) for path in sorted(download.damaged)]
        self._report.verified = self._verify(dest)
        self._close(dest, found, download)

    def _gathered(self, dest: Destination, found: Comparison) -> list[Need]:
        """Bring what is here already to the arrivals: what an earlier fetch left, and what lies elsewhere in DEST."""
        whole = dest.left_over(found.needs)
        for digest, path in _elsewhere(dest.folder, found, self._options).items():
            if digest not in whole and dest.adopt(found.needs[digest], path):
                whole.add(digest)
        return [need for need in found.needs.values() if need.digest in whole]

    def _download(self, dest: Destination, needs: list[Need]) -> Download:
        total_bytes = sum(need.size for need in needs)

        def tell(size_bytes: int) -> None:
            self._watcher.fetched(size_bytes, total_bytes - download.resumed_bytes)

        download = Download(self._origin, self._options.workspace, dest, needs, tell)
        download.run(self._options.jobs)
        return download

    def _delete(self, dest: Destination, found: Comparison) -> None:
        """Remove what is not wanted, last and only when everything else came: it may be all there is (spec F-13)."""
        if not self._options.delete or not found.extras:
            return
        if dest.problems:
            first = next(iter(found.extras))
            dest.report(first, "was not deleted, and nothing else was, because not everything could be fetched")
            return
        for path, entries in found.extras.items():
            dest.delete(path, entries)

    def _verify(self, dest: Destination) -> bool:
        """Tell whether DEST holds what is wanted, by a last look at it; what does not fit is reported (spec F-27)."""
        check = _Check(self._wanted, dest, makes_durable=self._options.is_own)
        is_equal = check.folder(dest.folder, "", self._wanted.root)
        return is_equal and not dest.problems

    def _close(self, dest: Destination, found: Comparison, download: Download) -> None:
        report, counts = self._report, dest.counts
        report.created, report.replaced, report.touched = counts["created"], counts["replaced"], counts["touched"]
        report.deleted = found.deleted - sum(found.extras.values()) + counts["deleted"]
        report.fetched_bytes, report.found_bytes = download.fetched_bytes, download.resumed_bytes
        _complete(report, found, dest.problems, found.needs.values())


class _Check:
    """Computes the digests of what is in DEST again, from the disk's names, sizes, times and modes.

    The bytes of each file were verified before it got its name; size and time tell whether it is still that file.
    """

    def __init__(self, wanted: Wanted, dest: Destination, *, makes_durable: bool) -> None:
        self._wanted, self._dest, self._makes_durable = wanted, dest, makes_durable

    def folder(self, folder: Folder, path: str, digest: bytes) -> bool:
        """Tell whether a folder holds the wanted entries of a directory of the tree."""
        wanted, names = self._wanted.entries(path, digest), set(folder.names())
        there = [each for each in wanted if each.name in names]
        found = [entry for each in there if (entry := self._entry(folder, joined(path, each.name), each)) is not None]
        if self._makes_durable:
            self._settle(folder, path, found)
        if self._wanted.scope.covers(path) and directory_digest(encode_directory(found)) == digest:
            return True
        right = set(found)
        wrong = [each for each in wanted if each not in right]
        for each in wrong:
            twin = _twin(folder, each.name) if each.name not in names else None
            if twin is not None:
                reason = f"is not there: this file system takes it for {shown(twin)}; fetch into one that keeps both"
                self._dest.report(joined(path, each.name), reason)
            elif each.kind is not Kind.DIRECTORY:
                reason = "is not what was fetched: it changed meanwhile, or this file system cannot hold its time"
                self._dest.report(joined(path, each.name), reason)
        return not wrong

    def _entry(self, folder: Folder, path: str, wanted: Entry) -> Entry | None:
        try:
            status = folder.stat(wanted.name)
            if stat.S_ISDIR(status.st_mode):
                return self._directory(folder, path, wanted)
            if stat.S_ISLNK(status.st_mode):
                return Entry(wanted.name, Kind.SYMLINK, target=os.readlink(wanted.name, dir_fd=folder.fd))
        except OSError:
            return None
        if not stat.S_ISREG(status.st_mode):
            return None
        has_bit = is_executable(status.st_mode)
        return Entry(wanted.name, Kind.FILE, status.st_size, clamped(status.st_mtime_ns), has_bit, wanted.digest)

    def _settle(self, folder: Folder, path: str, entries: Iterable[Entry]) -> None:
        """Make the files and names of a folder durable: who sent them may forget them then."""
        for name, error in fsync_each(folder, [each.name for each in entries if each.kind is Kind.FILE]):
            self._dest.report(joined(path, name), f"cannot be made durable ({error.strerror})")
        try:
            folder.fsync()
        except OSError as error:
            self._dest.report(path, f"cannot be made durable ({error.strerror})")

    def _directory(self, folder: Folder, path: str, wanted: Entry) -> Entry | None:
        if wanted.kind is not Kind.DIRECTORY:
            return None
        with folder.enter(wanted.name) as inside:
            return wanted if self.folder(inside, path, wanted.digest) else None


def _twin(folder: Folder, name: str) -> str | None:
    """Return the name that a folder lists for what it shows under another one, which it does not list."""
    try:
        status = folder.stat(name)
        return next((each for each in folder.names() if os.path.samestat(folder.stat(each), status)), None)
    except OSError:
        return None
