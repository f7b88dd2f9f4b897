"""The clients' machines of a simulated world: a folder, the real client's state, and the backups of it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from plain_folder import PlainFolder
from sudden_death import DATABASE, Fuse, Killed, acting, armed, as_killed, copy_tree
from world_network import SILENT, Fault, Network

from deltasync.client import outbox, pack
from deltasync.client.ignore import IgnoreRules
from deltasync.client.push import Progress, Pusher, PushOptions, PushReport
from deltasync.client.scan import ScanOptions, scan
from deltasync.client.state import REHASH_DUE, State
from deltasync.core.chunks import CHUNK_FROM_BYTES
from deltasync.core.errors import Corrupt, NotFound
from deltasync.core.manifest import EMPTY_ROOT
from deltasync.core.metadata import file_name
from deltasync.core.sequence import Head

TREE_SECONDS = 20.0
"""How long a push waits for the plain tree."""


@dataclass(frozen=True)
class How:
    """How one push goes."""

    plan: tuple[Fault, ...] = ()
    allow: bool = False
    """Allow a mass deletion."""
    take_over: bool = False
    waits: bool = True
    keeps: bool = False
    """Keep sent bundles as files."""
    seals_offline: bool = False
    kill_at: int | None = None
    """Die at this change of the file system."""
    kill_on_progress: int | None = None
    """Die when progress is told for so many times."""

    @property
    def is_quiet(self) -> bool:
        """Nothing may fail."""
        is_alive = self.kill_at is None and self.kill_on_progress is None
        return is_alive and all(fault.kind in SILENT for fault in self.plan)

    def options(self) -> PushOptions:
        """Return what the push is told."""
        return PushOptions(
            allow_mass_delete=self.allow,
            take_over=self.take_over,
            seal_offline=self.seals_offline,
            keep_sent_seconds=7 * 86_400.0 if self.keeps else 0.0,
            wait=TREE_SECONDS if self.waits else 0.0,
        )


class Known(NamedTuple):
    """What a client's state says before a push."""

    acknowledged: tuple[int, bytes]
    pending: list[tuple[str, int, bytes]]
    has_observed: bool
    has_taken_back: bool
    """The server's head is a bundle that was discarded."""


def _await_couriers() -> None:
    """Wait until the bytes that a killed client has sent are where they go."""
    for thread in threading.enumerate():
        if thread.name == "courier":
            thread.join()


class Client:
    """One machine with a folder and the client's state."""

    def __init__(self, root: Path, contents: dict[bytes, bytes]) -> None:
        """Make an empty folder; the machine's own things lie beside it."""
        self.home = root.parent
        self.folder = PlainFolder(root, contents)
        self.sealed_files: set[bytes] = set()
        """The bundles that were sealed into files: what the server has by now is of no concern to them."""
        self._backup: Path | None = None

    @property
    def root(self) -> Path:
        """The workspace."""
        return self.folder.root

    @property
    def state_folder(self) -> Path:
        """Where the state lies."""
        return self.root / ".deltasync"

    @property
    def client_id(self) -> str:
        """The id of this machine; '' before it was first used."""
        path = self.home / "client-id"
        return path.read_text() if path.exists() else ""

    @contextmanager
    def at_home(self) -> Iterator[None]:
        """Be the user of this machine in this block."""
        before = {name: os.environ.pop(name, None) for name in ("DELTASYNC_HOME", "DELTASYNC_CLIENT_ID_FILE")}
        os.environ["DELTASYNC_HOME"] = str(self.home)
        try:
            yield
        finally:
            del os.environ["DELTASYNC_HOME"]
            os.environ.update({name: value for name, value in before.items() if value is not None})

    def push(self, network: Network | None, how: How) -> PushReport:
        """Observe the folder and push it as the command does; without a network, seal into files."""
        fuse = None if how.kill_at is None else Fuse(how.kill_at)
        with self.at_home(), acting("client"):
            with armed("client", fuse):
                state = State.open(self.root)
            try:
                with armed("client", fuse):
                    return self._run(state, network, how)
            except Killed:
                _await_couriers()
                with as_killed(state.folder):
                    state.db.close()
                assert state._lock is not None
                state._lock.close()
                state._lock = None
                raise
            finally:
                if state._lock is not None:
                    self._note_files(state)
                    state.close()

    def _run(self, state: State, network: Network | None, how: How) -> PushReport:
        options = ScanOptions(
            IgnoreRules(self.root), settle_seconds=0.0, allow_emptied=how.allow, chunk_from_bytes=CHUNK_FROM_BYTES
        )

        def rescan(folders: Any) -> object:
            return scan(state, options, folders=folders)

        told = iter(range(how.kill_on_progress or 0))

        def progress(_: Progress) -> None:
            if how.kill_on_progress is not None and next(told, None) is None:
                raise Killed

        with Pusher(state, network, how.options(), progress=progress, rescan=rescan) as pusher:
            scan(state, options, recorded=pusher.ahead.send_recorded, follow=pusher.ahead.follow)
            if state.get_meta(REHASH_DUE):  # every inode had changed, and the user does as the note says
                scan(state, dataclasses.replace(options, rehash=True))
            self._note_files(state)
            report = pusher.run()
        assert report.root == state.sealed_root().hex()
        return report

    def _note_files(self, state: State) -> None:
        self.sealed_files |= {row.identity for row in outbox.pending(state) if row.file}

    @contextmanager
    def _peeked(self) -> Iterator[State | None]:
        """Look into the state without holding it; None when it is not there yet, or was killed while it was made."""
        with self.at_home(), contextlib.ExitStack() as stack:
            try:
                state = stack.enter_context(State.open(self.root, read_only=True))
                yield state if state.db.execute("SELECT 1 FROM head").fetchone() else None
            except (NotFound, Corrupt):
                yield None

    def known(self, head: Head) -> Known | None:
        """Look into the state; None when there is none."""
        with self._peeked() as state:
            if state is None:
                return None
            here = outbox.head(state)
            return Known(
                (here.acknowledged_sequence, here.acknowledged_root),
                [(each.epoch, each.sequence, each.root) for each in outbox.pending(state)],
                state.observed_root() != EMPTY_ROOT,
                outbox.was_discarded(state, head.epoch, head.sequence, head.root),
            )

    def sealed_head(self) -> tuple[str, int] | None:
        """Return epoch and number of the bundle that was sealed last."""
        with self._peeked() as state:
            here = outbox.head(state) if state else None
        return (here.epoch, here.sealed_sequence) if here else None

    def check_outbox(self) -> None:
        """Fail unless every bundle file verifies."""
        with self._peeked() as state:
            rows = outbox.pending(state) if state else []
        for row in rows:
            if row.file:
                metadata = pack.verify(self.state_folder / outbox.FOLDER / row.file)
                assert metadata.identity == row.identity and row.file == file_name(metadata)

    # Backups

    def back_up(self) -> None:
        """Keep a copy of the state."""
        if self.state_folder.exists():
            self._backup = self.home / "backup"
            shutil.rmtree(self._backup, ignore_errors=True)
            copy_tree(self.state_folder, self._backup)

    def restore(self, *, is_whole: bool) -> bool:
        """Bring the state back from its copy: the database alone, or everything beside it too."""
        if self._backup is None:
            return False
        if is_whole:
            shutil.rmtree(self.state_folder, ignore_errors=True)
            copy_tree(self._backup, self.state_folder)
            return True
        self.state_folder.mkdir(exist_ok=True)
        for name in DATABASE:
            (self.state_folder / name).unlink(missing_ok=True)
            if (self._backup / name).exists() and not name.endswith("-shm"):
                shutil.copy2(self._backup / name, self.state_folder / name)
        return True

    def lose_state(self) -> None:
        """Remove the state."""
        shutil.rmtree(self.state_folder, ignore_errors=True)
