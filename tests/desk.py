"""A desk for tests: a real folder with its state, observed and pushed in this process as the commands do it."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import folders
from serving import Served

from deltasync.client import outbox
from deltasync.client.ignore import IgnoreRules
from deltasync.client.observation import Follow
from deltasync.client.push import Pusher, PushOptions, PushReport, Transport
from deltasync.client.scan import ScanOptions, scan
from deltasync.client.state import State
from deltasync.client.transport import open_transport
from deltasync.core import wire


@dataclass
class Desk:
    """One workspace of one client."""

    root: Path
    url: str | None = None
    client: str = "ada"
    scan_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.root.mkdir(exist_ok=True)

    @contextmanager
    def open(self, **options: Any) -> Iterator[State]:
        """Open the state, as the client that this desk belongs to."""
        name = "DELTASYNC_CLIENT_ID_FILE"
        before = os.environ.get(name)
        os.environ[name] = str(self.root.with_name(f"{self.client}.client-id"))
        try:
            with State.open(self.root, **options) as state:
                yield state
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before

    def observe(
        self,
        state: State,
        folders: Collection[str] | None = None,
        recorded: Callable[[], None] | None = None,
        follow: Follow | None = None,
    ) -> None:
        """Scan the folder, or some folders of it; what the tests make is never still being written."""
        options = ScanOptions(
            ignore=IgnoreRules(self.root), settle_seconds=0.0, allow_emptied=True, **self.scan_options
        )
        scan(state, options, folders=folders, recorded=recorded, follow=follow)

    def push(
        self,
        *,
        transport: Transport | None = None,
        before: Callable[[State], None] | None = None,
        rescans: bool = True,
        scans: bool = True,
        **options: Any,
    ) -> PushReport:
        """Observe and push, to the desk's server unless a transport is given; without either, seal into files.

        before: called between the two.
        """
        mine = transport or (open_transport(self.url, timeout=20, max_retries=2) if self.url else None)
        try:
            with self.open() as state:
                rescan = (lambda folders: self.observe(state, folders)) if rescans else None
                with Pusher(state, mine, PushOptions(**options), rescan=rescan) as pusher:
                    if scans:
                        self.observe(state, recorded=pusher.ahead.send_recorded, follow=pusher.ahead.follow)
                    if before is not None:
                        before(state)
                    return pusher.run()
        finally:
            if mine is not None and transport is None:
                mine.close()

    def outbox(self) -> list[Path]:
        """Return the bundle files in the outbox."""
        return sorted((self.root / ".deltasync/outbox").glob("*.tar.zst"))


class Meddler:
    """A transport that does as another one, and something else on the way: the real one stays in between."""

    def __init__(self, inner: Transport) -> None:
        self.inner = inner
        self.on_send: list[Callable[[], None]] = []
        """Called, the first first, before each bundle is sent."""
        self.receipts: list[Callable[[wire.Receipt], wire.Receipt]] = []
        self.asked: list[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def missing(self, name: str, digests: list[str]) -> list[str]:
        self.asked.append(list(digests))
        return self.inner.missing(name, digests)

    def send_bundle(self, *arguments: Any, **options: Any) -> wire.Receipt:
        if self.on_send:
            self.on_send.pop(0)()
        receipt = self.inner.send_bundle(*arguments, **options)
        return self.receipts.pop(0)(receipt) if self.receipts else receipt


def assert_in_step(served: Served, desk: Desk, report: PushReport) -> None:
    """Fail unless both sides state one root, the plain tree is the folder, byte by byte, and nothing waits."""
    head: dict[str, Any] = served.get(f"/api/v1/workspaces/{desk.root.name}").json
    assert (head["root"], head["sequence"], head["tree_sequence"]) == (report.root, report.sequence, report.sequence)
    folders.assert_same(desk.root, served.data / "workspaces" / desk.root.name / "tree")
    with desk.open() as state:
        assert outbox.pending(state) == []
