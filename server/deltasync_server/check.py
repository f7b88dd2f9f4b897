"""Checks: every blob, row, receipt and tree of a store that no server runs on, and what can be repaired of it."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from deltasync.core.errors import Corrupt
from deltasync.core.hashing import directory_digest
from deltasync.core.manifest import Kind
from deltasync.core.names import shown
from deltasync.core.tree import walk
from deltasync.db import is_sound
from deltasync_server import access
from deltasync_server.access import Access
from deltasync_server.blobs import is_unchanged
from deltasync_server.config import StoreConfig
from deltasync_server.ledger import count_again, is_counted
from deltasync_server.opening import no_store
from deltasync_server.receive import Store
from deltasync_server.state import BlobRow, WorkspaceRow, compared_roots, kept_roots, loader, workspace_rows

BATCH = 1000


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """Something that is not as the rows say."""

    kind: str
    """blob, object, receipt, journal, content, file, stream, stray, ledger or tree."""
    subject: str
    """A digest, the id of a stream, a workspace, a workspace and a path, or a host, a path there and a digest."""
    problem: str
    is_repaired: bool = False


class Report(msgspec.Struct, kw_only=True):
    """What a check looked at and found."""

    blobs: int = 0
    blob_bytes: int = 0
    objects: int = 0
    receipts: int = 0
    workspaces: int = 0
    findings: list[Finding] = []

    @property
    def is_sound(self) -> bool:
        """Tell whether nothing is wrong, or everything that was is repaired."""
        return all(finding.is_repaired for finding in self.findings)


def check(config: StoreConfig, *, repair: bool = False) -> Report:
    """Verify a whole store byte by byte; raises AlreadyRunning while a server has it.

    repair: rebuild what the journal or the cache can give, quarantine and ask the client for what they cannot.
    """
    if not (config.data / "state.db").is_file():
        raise no_store(config.data)
    with Store(config) as store:
        if repair:
            store.recover()
            store.catch_up()
        _check_access(config.data)
        return _Check(store, is_repairing=repair).run()


def _check_access(data: Path) -> None:
    """Raise Corrupt where the database of tokens is damaged: a server would let nobody in."""
    if (data / access.DATABASE).is_file():
        with Access(data) as opened:
            opened.require_sound()


class _Check:
    def __init__(self, store: Store, *, is_repairing: bool) -> None:
        self._store = store
        self._is_repairing = is_repairing
        self._report = Report(findings=[])

    def run(self) -> Report:
        with self._store.state.read() as db:
            if not is_sound(db):
                raise Corrupt(f"{self._store.config.data / 'state.db'} is damaged; restore it, or begin a new store")
            rows = workspace_rows(db)
        self._report.workspaces = len(rows)
        self._check_objects()
        self._check_receipts(rows)
        self._check_journal()
        self._check_blobs()
        self._check_references(rows)
        self._check_files()
        self._check_streams()
        self._check_strays()
        self._check_ledger()
        for row in rows:
            self._check_tree(row)
        return self._report

    def _found(self, kind: str, subject: str, problem: str, *, is_repaired: bool = False) -> None:
        finding = Finding(kind=kind, subject=subject, problem=problem, is_repaired=is_repaired and self._is_repairing)
        self._report.findings.append(finding)

    def _check_objects(self) -> None:
        with self._store.state.read() as db:
            for digest, body in db.execute("SELECT digest, body FROM objects"):
                self._report.objects += 1
                if directory_digest(body) != digest:
                    self._found("object", digest.hex(), "its body has another digest")

    def _check_receipts(self, rows: Iterable[WorkspaceRow]) -> None:
        """Receipts are 1, 2, 3 … without a gap, and the last one is the head (spec ST-14)."""
        with self._store.state.read() as db:
            for row in rows:
                select = "SELECT sequence, epoch, root FROM receipts WHERE workspace = ? ORDER BY sequence"
                receipts = db.execute(select, (row.name,)).fetchall()
                self._report.receipts += len(receipts)
                if [sequence for sequence, _, _ in receipts] != list(range(1, row.sequence + 1)):
                    self._found("receipt", row.name, f"the receipts are not those of 1 to {row.sequence}")
                elif receipts and receipts[-1] != (row.sequence, row.epoch, row.root):
                    self._found("receipt", row.name, "the last receipt is not the head")

    def _check_journal(self) -> None:
        for receipt, why in self._store.journal.damaged_files():
            # A blob that this file carries is hashed below; once checkpointed, nobody needs the file.
            self._found("journal", receipt.file_name, why, is_repaired=self._is_repairing)

    def _check_blobs(self) -> None:
        wrong: list[bytes] = []
        for row in self._blob_rows():
            self._report.blobs += 1
            self._report.blob_bytes += row.size
            status = self._store.cache.status(row.digest)
            if status is None or not stat.S_ISREG(status.st_mode):
                self._found("blob", row.digest.hex(), "its file is gone", is_repaired=True)
                wrong.append(row.digest)
            elif not self._store.cache.holds_right_bytes(row.digest):
                self._found("blob", row.digest.hex(), "its bytes are wrong", is_repaired=True)
                wrong.append(row.digest)
            elif not is_unchanged(row, status):
                self._found("blob", row.digest.hex(), "its time or mode was changed", is_repaired=True)
                if self._is_repairing:
                    self._store.trees.sound_rows([row.digest])
        if wrong and self._is_repairing:
            self._store.trees.quarantine(wrong)

    def _blob_rows(self) -> Iterator[BlobRow]:
        """Yield every row, some at a time: repairs write in between."""
        last = b""
        while True:
            with self._store.state.read() as db:
                select = "SELECT digest, size, mtime_ns, executable FROM blobs WHERE digest > ? ORDER BY digest LIMIT ?"
                rows = db.execute(select, (last, BATCH)).fetchall()
            if not rows:
                return
            last = rows[-1][0]
            yield from (
                BlobRow(digest, size, mtime_ns, bool(executable)) for digest, size, mtime_ns, executable in rows
            )

    def _check_references(self, rows: Iterable[WorkspaceRow]) -> None:
        """Everything that a head names is there, or asked for; kept trees can be walked (spec ST-20, ST-26)."""
        with self._store.state.read() as db:
            kept = kept_roots(db, self._store.config.keep_sequences) | compared_roots(db)
            known = {digest for (digest,) in db.execute("SELECT digest FROM blobs")}
            asked = set(db.execute("SELECT workspace, digest FROM wanted WHERE NOT healed"))
            load = loader(db)
            for root in kept:
                try:
                    missing = {e.digest for _, e in walk(root, load) if e.kind is Kind.FILE} - known
                except Corrupt as error:
                    self._found("object", root.hex(), error.sentence)
                    continue
                for row in rows:
                    if row.root == root:
                        self._check_missing(row.name, missing, {d for d in missing if (row.name, d) in asked})

    def _check_missing(self, name: str, missing: set[bytes], asked: set[bytes]) -> None:
        for digest in sorted(missing):
            is_asked = digest in asked or self._is_repairing
            problem = "no blob holds this content" + is_asked * "; the next push sends it again"
            self._found("content", f"{name} {digest.hex()}", problem)
        unasked = missing - asked
        if unasked and self._is_repairing:
            with self._store.state.write() as db:
                db.executemany("INSERT OR IGNORE INTO wanted VALUES (?, ?, 0)", [(name, digest) for digest in unasked])

    def _check_files(self) -> None:
        """Files that were uploaded by themselves have their content; only their sender can bring it again (ST-86)."""
        with self._store.state.read() as db:
            select = (
                "SELECT hostname, filepath, digest FROM files "
                "WHERE deleted_at IS NULL AND digest NOT IN (SELECT digest FROM blobs) ORDER BY hostname, filepath"
            )
            lost = db.execute(select).fetchall()
        for hostname, path, digest in lost:
            problem = "no blob holds this file's content; upload the file again, or mark it deleted"
            self._found("file", f"{shown(hostname)} {shown(path)} {digest.hex()}", problem)

    def _check_streams(self) -> None:
        """What rows count of streams is there, and no file without a row (spec ST-94); the next start sees to both."""
        for stream, problem in self._store.streams.troubles():
            self._found("stream", stream, problem, is_repaired=True)

    def _check_strays(self) -> None:
        with self._store.state.read() as db:
            strays = self._store.cache.strays(digest for (digest,) in db.execute("SELECT digest FROM blobs"))
        for place in strays:
            self._found("stray", place, "no row names it", is_repaired=True)
            if self._is_repairing:
                self._store.cache.remove_stray(place)

    def _check_ledger(self) -> None:
        """The rows that say how much is held are what a count gives (spec ST-130)."""
        with self._store.state.read() as db:
            is_right = is_counted(db)
        if not is_right:
            self._found("ledger", "cached and shares", "they are not what the blobs' rows give", is_repaired=True)
            if self._is_repairing:
                with self._store.state.write() as db:
                    count_again(db)

    def _check_tree(self, row: WorkspaceRow) -> None:
        if not row.has_tree:
            return
        if row.moving_to is not None or row.tree_sequence != row.sequence:
            self._found("tree", row.name, "it is behind its head; the next start brings it forward", is_repaired=True)
            return
        with self._store.state.read() as db:
            # What came again and is not in its place is no hole to be excused.
            select = "SELECT digest FROM wanted WHERE workspace = ? AND digest NOT IN (SELECT digest FROM blobs)"
            asked = {digest for (digest,) in db.execute(select, (row.name,))}
            awaited = {path for path, e in walk(row.root, loader(db)) if e.digest in asked} if asked else set()
        paths = [path for path in self._store.trees.differences(row.name) if path not in awaited]
        for path in paths:
            self._found("tree", shown(f"{row.name} {path}"), "it is not what the head says", is_repaired=True)
        if paths and self._is_repairing:
            self._store.trees.rebuild(row.name)
