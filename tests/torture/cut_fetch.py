"""A fetch before a power cut, and what the next one must make of it: the life that `powercut` records."""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import folders
from sender import Sender, tree_of
from serving import serving
from trees import Flat

from deltasync.client.fetch import FetchOptions, FetchReport, fetch
from deltasync.client.transport import HttpTransport
from deltasync_server.config import StoreConfig
from deltasync_server.receive import Store
from torture.cut_store import Fact

VERSIONS = 3


@dataclass
class FetchLife:
    """A folder on a disk that is recorded, and a server that loses nothing, with some versions of a tree."""

    disk: Path
    beside: Path
    mark: Callable[[int], None]
    chance: random.Random
    facts: list[Fact] = field(default_factory=list)
    """fetched: a sequence."""
    _held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __post_init__(self) -> None:
        shutil.rmtree(self.beside, ignore_errors=True)
        self.beside.mkdir()
        data, sender = self.beside / "data", Sender()
        with Store(StoreConfig(data, low_disk_bytes=0, gap_seconds=0.0)) as store:
            for _ in range(VERSIONS):
                sender.send(store, self._version(sender))
            store.catch_up()
            self.expected = tree_of(store)
        served = self._held.enter_context(serving(data))
        self.origin = self._held.enter_context(contextlib.closing(HttpTransport(served.url)))

    def _version(self, sender: Sender) -> Flat:
        """Return the next tree: some files stay, some change, some go and some move."""
        names = [f"f{number}" for number in range(12)] + ["d__g", "d__h"]
        kept = {path: entry for path, entry in sender.flat.items() if self.chance.random() < 0.5}
        sizes = {name: self.chance.choice((10, 3_000, 60_000)) for name in self.chance.sample(names, 8)}
        fresh = sender.tree(**{name: self.chance.randbytes(size) for name, size in sizes.items()})
        folder = {path: entry for path, entry in sender.flat.items() if path == "d"}
        return {**folder, **kept, **fresh}

    def live(self, steps: int) -> None:
        """Fetch some versions, one over another."""
        for number in range(1, min(steps, 4)):
            self._fetched(at=self.chance.randint(1, VERSIONS))
            self.facts.append(Fact("fetched", "", number))
            self.mark(number)

    def _fetched(self, at: int | None = None) -> FetchReport:
        told = FetchOptions("proj", at=at, delete=True, allow_mass_delete=True, jobs=2)
        report = fetch(self.origin, self.disk / "dest", told, _Deaf())
        assert report.verified, report
        return report

    def recover(self, mark: Callable[[int], None], acknowledged: int) -> None:
        """Fetch again after a cut."""
        self.mark, self.facts = mark, self.facts[:acknowledged]
        self._fetched()

    def trouble(self, acknowledged: int) -> str:
        """Fetch over what a cut left, of which nothing is believed (spec F-28); return what is wrong."""
        self._fetched()
        if folders.listing(self.disk / "dest") != folders.listing(self.expected):
            return "a fetch after the cut says that it is verified, and it is not"
        return "something is left of a fetch" if (self.disk / "dest/.deltasync").exists() else ""

    def close(self) -> None:
        """Stop the server."""
        self._held.close()


class _Deaf:
    """Hears how far a fetch is."""

    def read(self, files: int, size_bytes: int) -> None:
        """Hear nothing."""

    def all_is_read(self) -> None:
        """Hear nothing."""

    def fetched(self, size_bytes: int, total_bytes: int) -> None:
        """Hear nothing."""
