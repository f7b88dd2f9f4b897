"""A small world: real clients and a real store in one process, between them a network that fails as networks do.

Everything here wraps the real code. The world keeps books of its own: what each folder holds (`plain_folder`), which
bundles went over the wire, and which of them the store has taken. `World.push` compares the two after every push.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folders
from sudden_death import Killed, copy_tree
from world_books import Applied, Books, Letter
from world_client import TREE_SECONDS, Client, How
from world_host import Host
from world_network import Network

from deltasync.client.push import PushReport
from deltasync.core import wire
from deltasync.core.errors import (
    ContentMissing,
    GuardStopped,
    HostBusy,
    HostUnreachable,
    LimitExceeded,
    NotOwner,
    SequenceConflict,
    SequenceFork,
    SequenceGap,
    StaleEpoch,
)
from deltasync.core.manifest import EMPTY_ROOT, Entry, Kind, decode_directory
from deltasync.core.names import WorkspaceName
from deltasync.core.sequence import Verdict, decide
from deltasync.core.tree import walk
from deltasync_server.receive import Store
from deltasync_server.tenants import DEFAULT

NAME = WorkspaceName("proj")


@dataclass
class Backup:
    """A copy of the server's data, and the history that it holds."""

    path: Path
    line: dict[int, Applied]
    rotten: set[bytes]


class World:
    """Two clients, one server, the network between them, and the books."""

    name = NAME

    def __init__(self, base: Path, *, is_threaded: bool = False, is_tiny: bool = False, link: str = "auto") -> None:
        """Begin with empty folders and an empty server. is_tiny: the server takes only small bundles."""
        self.base = base
        limits = wire.Limits(bundle_content_bytes=200, bundle_operations=10) if is_tiny else wire.Limits()
        quiet = {"quiet_seconds": 0.0} if is_threaded else {}
        self.host = Host(base / "data", is_threaded=is_threaded, link=link, limits=limits, **quiet)
        self.contents: dict[bytes, bytes] = {}
        self.clients = [Client(base / name / NAME, self.contents) for name in ("ada", "bob")]
        self.letters: list[Letter] = []
        self.books = Books()
        self.rotten: set[bytes] = set()
        """Content that the server's disk has lost."""
        self.has_rotted = False
        self._trees: dict[bytes, dict[str, Entry]] = {EMPTY_ROOT: {}}
        self._backup: Backup | None = None

    def close(self) -> None:
        """End the world."""
        self.host.close()

    # Requests

    def given(self, store: Store, letter: Letter, *, is_late: bool = False) -> wire.Receipt:
        """Give the store a bundle and keep the books.

        is_late: it was sealed for a server whose disk may have lost content that this one has.
        """
        receipt = store.receive(
            NAME, io.BytesIO(letter.body), expected_identity=letter.identity, take_over=letter.takes_over
        )
        assert (receipt.epoch, receipt.sequence) == letter.key
        assert (receipt.identity, receipt.root) == (letter.identity.hex(), letter.root.hex())
        self.books.take(letter, receipt)
        if not receipt.duplicate:
            self._check_carried(store, letter, is_late=is_late)
        return receipt

    def _check_carried(self, store: Store, letter: Letter, *, is_late: bool) -> None:
        """Fail when a bundle brought what the tree before it has, unless it may have been missing once."""
        parent = self.tree(store, letter.header.parent_root)
        twice = letter.carried & {entry.digest for entry in parent.values()} - self.rotten
        self.rotten -= letter.carried
        named = [digest.hex() for digest in twice]
        assert is_late or not twice, f"{letter.key} carries {named}, which its parent tree has"

    def deliver(self, letter: Letter) -> wire.Receipt:
        """Deliver a bundle that was sent before."""
        with self.host.serving() as store:
            return self.given(store, letter, is_late=True)

    def deliver_late(self, letter: Letter) -> None:
        """Deliver a bundle that was sent before; the answer must be what the table says (spec S-2 to S-8)."""
        self.host.revive()
        self.settle()
        known = self.books.line.get(letter.header.sequence)
        recorded = known.letter.identity if known and known.letter.key == letter.key else None
        verdict = decide(self.books.head(), recorded, letter.header, take_over=letter.takes_over)
        try:
            receipt = self.deliver(letter)
        except ContentMissing:
            assert verdict is Verdict.APPLY
        except LimitExceeded:
            assert letter.identity in {identity for client in self.clients for identity in client.sealed_files}
        except SequenceConflict as error:
            kinds = {
                Verdict.GAP: SequenceGap,
                Verdict.FORK: SequenceFork,
                Verdict.STALE_EPOCH: StaleEpoch,
                Verdict.NOT_OWNER: NotOwner,
            }
            assert type(error) is kinds.get(verdict), f"{error!r} where the verdict is {verdict}"
        else:
            assert verdict is (Verdict.DUPLICATE if receipt.duplicate else Verdict.APPLY)
        self.settle()

    def wait_for_tree(self, store: Store, sequence: int) -> wire.WorkspaceState:
        """Wait until the plain tree holds a sequence."""
        if not self.host.is_threaded:
            store.catch_up()
            return store.workspace(NAME)
        return store.wait_for_tree(NAME, sequence, TREE_SECONDS)

    def tree(self, store: Store, root: bytes) -> dict[str, Entry]:
        """Return a tree that the store holds, by path."""
        if root not in self._trees:
            self._trees[root] = dict(walk(root, lambda digest: decode_directory(store.directory(NAME, digest))))
        return self._trees[root]

    # Pushing

    def push(self, client: Client, how: How) -> str:
        """Push, and fail unless everything that can be said of the outcome holds; returns what came of it."""
        if how.is_quiet:
            self.host.revive()
        self.settle()
        expected = self._expected(client, how)
        network = Network(self, client, how.plan)
        try:
            report = client.push(network, how)
        except Killed:
            outcome = "killed"
            known = client.known(self.books.head())
            self.books.hear(client.client_id, network.told, acknowledged=known.acknowledged[0] if known else 0)
        except (HostUnreachable, HostBusy):
            assert not how.is_quiet
            outcome = "unreachable"
        except NotOwner:
            assert not how.take_over and (not how.is_quiet or expected.is_foreign)
            outcome = "not owner"
        except GuardStopped:
            assert expected.may_stop, "a guard stopped what deletes nothing"
            outcome = "stopped"
        except (SequenceConflict, ContentMissing):
            assert any(fault.kind in ("echo", "restart", "server_dies", "collect") for fault in how.plan)
            assert not how.is_quiet
            outcome = "conflict"
        else:
            self.host.disarm()
            assert not (how.is_quiet and (expected.must_stop or expected.is_foreign))
            outcome = "done" if report.unreachable is None else "sealed"
            if outcome == "done":
                self._check_done(client, network, report, how)
        finally:
            self.host.disarm()
        if outcome != "killed":
            self.books.hear(client.client_id, network.told)
        self.settle()
        return outcome

    def push_again(self, client: Client) -> None:
        """Push what was just pushed, and fail if anything is sealed or sent."""
        known = client.known(self.books.head())
        network = Network(self, client)
        report = client.push(network, How())
        self.books.hear(client.client_id, network.told)
        assert (network.sent_bytes, report.sent_bytes, report.bundles, report.content_bytes) == (0, 0, 0, 0)
        assert client.known(self.books.head()) == known
        self.settle()

    def seal(self, client: Client, how: How) -> str:
        """Push without a server: seal into files, and fail unless they lead to the folder's tree."""
        try:
            report = client.push(None, how)
        except Killed:
            return "killed"
        except GuardStopped:
            assert not how.allow
            return "stopped"
        if not how.plan:
            assert report.root == client.folder.root_digest().hex() and not report.problems and not report.waiting
        client.check_outbox()
        return "sealed"

    def _expected(self, client: Client, how: How) -> Expected:
        """Work out what must come of a push when nothing fails."""
        head = self.books.head()
        known = client.known(head)
        is_foreign = head.client_id not in ("", client.client_id) and not how.take_over
        if how.allow or self.host.is_down:
            return Expected(is_foreign, may_stop=not how.allow, must_stop=False)
        with self.host.serving() as store:
            there = self.tree(store, head.root)
        here = client.folder.flat()
        gone = [path for path, entry in there.items() if path not in here or here[path].kind is not entry.kind]
        fresh = {entry.digest for path, entry in here.items() if path not in there}
        links = {(entry.name, entry.target) for path, entry in here.items() if path not in there}
        lost = [path for path in gone if path not in here and _is_lost(there[path], fresh, links)]
        acknowledged = known.acknowledged if known else (0, EMPTY_ROOT)
        is_known = (head.sequence, head.root) == acknowledged or head.root == acknowledged[1]
        is_known |= known is not None and (bool(known.pending) or known.has_taken_back)
        is_emptied = not here and known is not None and known.has_observed
        must_stop = is_emptied or (bool(lost) and not is_known)
        may_stop = must_stop or bool(gone) or not here or not how.is_quiet or bool(known and known.pending)
        return Expected(is_foreign, may_stop=may_stop, must_stop=must_stop)

    def _check_done(self, client: Client, network: Network, report: PushReport, how: How) -> None:
        """Fail unless both sides hold the same tree, and that one is the folder's."""
        self.settle()
        head = self.books.head()
        assert report.pending == 0 and report.waiting is None and not report.unreachable
        assert (head.root.hex(), head.sequence) == (report.root, report.sequence)
        if network.has_edited:
            return
        assert not report.problems, report.problems
        assert head.root == client.folder.root_digest(), "the head is not the folder's tree"
        if not self.host.is_down:
            self.check_tree(client)

    def check_tree(self, client: Client) -> None:
        """Fail unless the plain tree on the server is a client's folder, byte by byte, and all its content is there."""
        with self.host.serving() as store:
            state = self.wait_for_tree(store, self.books.head().sequence)
            assert state.tree_sequence == state.sequence
            found, wanted = folders.listing(Path(state.tree_path)), client.folder.listing()
            assert found == wanted, _difference(found, wanted)
            assert state.wanted == []
            assert state.files == len(client.folder.paths(Kind.FILE))
            digests = {entry.digest.hex() for entry in client.folder.flat().values() if entry.kind is Kind.FILE}
            assert store.missing(NAME, sorted(digests)).missing == []

    def settle(self) -> None:
        """Fail unless the store's head is the one in the books; hear of what it took while it died (spec S-8)."""
        if self.host.is_down:
            return
        with self.host.serving() as store:
            with store.state.read() as db:
                query = "SELECT sequence, identity, is_kept FROM receipts ORDER BY sequence"
                receipts = [(number, identity.hex(), is_kept) for number, identity, is_kept in db.execute(query)]
            for sequence, identity, _ in receipts:
                if sequence not in self.books.line:  # one behind it may be known: several are on their way at once
                    letter = next(one for one in self.letters if one.identity.hex() == identity)
                    self.books.take(letter, None)
            state, head = store.workspace(NAME), self.books.head()
            assert (state.sequence, state.epoch, state.root) == (head.sequence, head.epoch, head.root.hex())
            assert state.client_id == head.client_id
            line = [(number, self.books.line[number].letter.identity.hex()) for number in sorted(self.books.line)]
            assert [(number, identity) for number, identity, _ in receipts] == line
            lasting = [identity for _, identity, is_kept in receipts if is_kept]  # parts change nothing
            kept = [each.identity for each in store.sequences(NAME).sequences]
            assert kept == lasting[-len(kept) :]
        self.books.check()

    # The server's life

    def back_up_server(self) -> None:
        """Copy the server's data while it runs."""
        self.host.revive()
        self.settle()
        path = self.base / "data.backup"
        shutil.rmtree(path, ignore_errors=True)
        with self.host.stopped() as is_stopped:
            assert is_stopped
            copy_tree(self.host.data, path)
        self._backup = Backup(path, dict(self.books.line), set(self.rotten))

    def restore_server(self) -> bool:
        """Bring the server's data back from the copy."""
        if self._backup is None:
            return False
        self.host.revive()
        self.settle()
        with self.host.stopped() as is_stopped:
            assert is_stopped
            shutil.rmtree(self.host.data)
            copy_tree(self._backup.path, self.host.data)
        self.books.go_back(self._backup.line)
        self.rotten = set(self._backup.rotten)
        self.settle()
        return True

    def restore_client(self, client: Client, *, is_whole: bool) -> bool:
        """Bring a client's state back from its copy."""
        if not client.restore(is_whole=is_whole):
            return False
        sealed = client.sealed_head()
        if sealed is not None:
            epoch, sequence = sealed
            spent = self.books.spent
            self.books.forgotten_by_client |= {key for key in spent if key[0] == epoch and key[1] > sequence}
        return True

    def restart(self, *, dies: bool) -> None:
        """Stop the server, or let it die, and start it again."""
        with self.host.stopped(dies=dies):
            pass
        self.settle()

    def work(self, what: str, *, dies_at: int | None) -> None:
        """Let the server do some of its background work now; it may die of that, at a change of the file system."""
        self.host.revive()
        if dies_at is not None:
            self.host.arm(dies_at)
        with contextlib.suppress(HostUnreachable), self.host.serving() as store:
            getattr(store, what)()
        self.host.disarm()
        self.host.revive()
        self.settle()
        with self.host.serving() as store:
            self._check_kept(store)

    def rot(self, number: int) -> None:
        """Damage a blob; a check that repairs takes it out of use, or gives it again from the journal."""
        self.host.revive()
        paths = sorted(path for path in self.host.data.glob("cache/*/*") if path.stat().st_size)
        if not paths:
            return
        path = paths[number % len(paths)]
        with self.host.stopped() as is_stopped:
            assert is_stopped
            path.chmod(0o644)
            path.write_bytes(bytes(path.stat().st_size))
            assert any(path.name in each for each in self.host.check())
            self.host.check(repair=True)
        with self.host.serving() as store:
            if store.missing(NAME, [path.name]).missing:
                self.rotten.add(bytes.fromhex(path.name))
        self.has_rotted = True
        self.settle()

    def _kept(self, store: Store) -> tuple[set[bytes], set[bytes]]:
        """Return the digests of the content and of the directory objects that the kept sequences need."""
        roots = {bytes.fromhex(each.root) for each in store.sequences(NAME).sequences}
        entries = [entry for root in roots for entry in self.tree(store, root).values()]
        blobs = {entry.digest for entry in entries if entry.kind is Kind.FILE}
        objects = roots | {entry.digest for entry in entries if entry.kind is Kind.DIRECTORY}
        return blobs, objects - {EMPTY_ROOT}

    def _check_kept(self, store: Store) -> None:
        blobs, objects = self._kept(store)
        for digest in objects:
            assert store.directory(NAME, digest)
        for digest in blobs - self.rotten:
            stream, size = store.open_blob(DEFAULT, digest)
            with stream:
                content = stream.read()
            assert content == self.contents[digest] and len(content) == size

    def tidy(self) -> None:
        """Bring the store to rest, collect, and fail unless exactly what is needed is left and nothing is wrong."""
        self.host.revive()
        self.settle()
        with self.host.serving() as store:
            self.wait_for_tree(store, self.books.head().sequence)
            store.upkeep()
        with self.host.stopped() as is_stopped:  # leases end with the process
            assert is_stopped
        with self.host.serving() as store:
            store.catch_up()
            store.upkeep()
            store.collect()
            self._check_kept(store)
            blobs, objects = self._kept(store)
            with store.state.read() as db:
                assert {digest for (digest,) in db.execute("SELECT digest FROM objects")} == objects
        data = self.host.data
        present = {bytes.fromhex(path.name) for path in data.glob("cache/*/*")}
        self.rotten -= present  # what a repeat or another machine brought again is whole: the check below reads it
        assert present == blobs - self.rotten
        waste = ("journal", "staging") if self.has_rotted else ("journal", "staging", "quarantine")
        left = [str(path) for folder in waste for path in (data / folder).iterdir()]
        left += map(str, data.glob("workspaces/*/aside/*"))
        assert not left, f"waste is left: {left}"
        with self.host.stopped() as is_stopped:
            assert is_stopped
            found = self.host.check()
        assert not [each for each in found if not any(digest.hex() in each for digest in self.rotten)], found


@dataclass(frozen=True)
class Expected:
    """What must come of a push when nothing fails on the way."""

    is_foreign: bool
    """The workspace belongs to another client."""
    may_stop: bool
    must_stop: bool


def _is_lost(entry: Entry, fresh: set[bytes], links: set[tuple[str, str | None]]) -> bool:
    """Tell whether an entry that is gone cannot have moved, a link together with the folder that it is in."""
    if entry.kind is Kind.SYMLINK:
        return (entry.name, entry.target) not in links
    return entry.kind is Kind.FILE and entry.digest not in fresh


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    paths = sorted(path for path in found.keys() | wanted.keys() if found.get(path) != wanted.get(path))
    return f"{len(paths)} paths differ: {[(path, found.get(path), wanted.get(path)) for path in paths[:4]]}"[:3000]
