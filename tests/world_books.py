"""The books of a simulated world: which bundles went over the wire, and which of them the store has taken."""

from __future__ import annotations

import io
import threading
from collections import defaultdict
from dataclasses import dataclass

import msgspec

from deltasync.core import wire
from deltasync.core.bundle import BundleReader
from deltasync.core.manifest import EMPTY_ROOT
from deltasync.core.sequence import Head, Header


@dataclass(frozen=True)
class Letter:
    """A bundle as it went over the wire."""

    body: bytes
    identity: bytes
    header: Header
    root: bytes
    carried: frozenset[bytes]
    takes_over: bool

    @classmethod
    def read(cls, body: bytes, *, takes_over: bool) -> Letter:
        """Read a bundle's bytes with the real reader."""
        reader = BundleReader(io.BytesIO(body), wire.Limits())
        metadata = reader.metadata()
        carried = set()
        for operation, views, _ in reader.contents():
            carried.add(bytes.fromhex(operation.digest or ""))
            for _ in views:
                pass
        reader.finish()
        root = bytes.fromhex(metadata.manifest.root)
        return cls(body, metadata.identity, metadata.header, root, frozenset(carried), takes_over)

    @property
    def key(self) -> tuple[str, int]:
        """What a receipt spends."""
        return self.header.epoch, self.header.sequence


@dataclass
class Applied:
    """A bundle that the store has taken; its receipt, once anyone has heard it."""

    letter: Letter
    receipt: wire.Receipt | None
    was_new: bool = False
    """Someone heard the first receipt; a repeat may overtake it."""


class Books:
    """What the store has taken, as it was seen from outside."""

    def __init__(self) -> None:
        """Begin with an empty server."""
        self.line: dict[int, Applied] = {}
        """The history that leads to the head, by sequence."""
        self.spent: dict[tuple[str, int], bytes] = {}
        """Which bundle every receipt ever was for."""
        self.heard: defaultdict[str, set[bytes]] = defaultdict(set)
        """The bundles whose receipts a client knows of, by its id."""
        self.forgotten_by_server: set[tuple[str, int]] = set()
        self.forgotten_by_client: set[tuple[str, int]] = set()
        self.lock = threading.Lock()
        self._head = Head()

    def head(self) -> Head:
        """Return the head that the receipts lead to."""
        return self._head

    def _move_head(self) -> None:
        if not self.line:
            self._head = Head()
            return
        last = self.line[max(self.line)].letter
        epochs = {applied.letter.header.epoch for applied in self.line.values()} - {last.header.epoch}
        self._head = Head(last.header.client_id, last.header.epoch, last.header.sequence, last.root, frozenset(epochs))

    def take(self, letter: Letter, receipt: wire.Receipt | None) -> None:
        """Record that the store has taken a bundle, or gives a receipt again."""
        with self.lock:
            known = self.line.get(letter.header.sequence)
            if known is not None and known.letter.identity == letter.identity:
                self._repeat(known, receipt)
                return
            assert known is None, f"{letter.key} was taken although that number is spent"
            former = self.spent.get(letter.key, letter.identity)
            assert former == letter.identity or self._may_reuse(letter, former), f"{letter.key} was reused"
            self.spent[letter.key] = letter.identity
            self.line[letter.header.sequence] = Applied(letter, None)
            self._move_head()
            self._repeat(self.line[letter.header.sequence], receipt)

    def _may_reuse(self, letter: Letter, former: bytes) -> bool:
        """Tell whether neither side can know any more that a number was spent: both came back from a backup."""
        is_unknown = letter.key in self.forgotten_by_client or former not in self.heard[letter.header.client_id]
        return letter.key in self.forgotten_by_server and is_unknown

    def _repeat(self, known: Applied, receipt: wire.Receipt | None) -> None:
        if receipt is None:
            return
        told = msgspec.structs.replace(receipt, duplicate=False, tree_sequence=None)
        known.receipt = known.receipt or told
        assert told == known.receipt, f"another receipt for {known.letter.key}: {receipt}"
        assert receipt.duplicate or not known.was_new, f"{known.letter.key} was applied twice"
        known.was_new |= not receipt.duplicate

    def up_to(self, sequence: int, epoch: str) -> set[bytes]:
        """Return the bundles that whoever hears of a head hears of."""
        with self.lock:
            applied = self.line.get(sequence)
            if applied is None or applied.letter.header.epoch != epoch:
                return set()
            return {each.letter.identity for number, each in self.line.items() if number <= sequence}

    def hear(self, client_id: str, told: set[bytes], *, acknowledged: int | None = None) -> None:
        """Record of which bundles a client has heard; acknowledged: up to where it remembers, if it was killed then."""
        with self.lock:
            kept = {each.letter.identity for number, each in self.line.items() if number <= (acknowledged or 0)}
            self.heard[client_id] |= told if acknowledged is None else told & kept

    def go_back(self, line: dict[int, Applied]) -> None:
        """Record that the server's data was restored from a backup."""
        self.forgotten_by_server |= {each.letter.key for each in self.line.values()}
        self.forgotten_by_server -= {each.letter.key for each in line.values()}
        self.line = dict(line)
        self._move_head()

    def check(self) -> None:
        """Fail unless the numbers are 1, 2, 3 … and each bundle continues the one before it (spec S-5 to S-8)."""
        root = EMPTY_ROOT
        assert sorted(self.line) == list(range(1, len(self.line) + 1)), f"gap in {sorted(self.line)}"
        for _, applied in sorted(self.line.items()):
            assert applied.letter.header.parent_root == root
            root = applied.letter.root
