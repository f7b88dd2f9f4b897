"""A server whose bundles are small, so that small files go in parts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import folders
import msgspec
from desk import Desk, Meddler, assert_in_step
from serving import Served

from deltasync.client import parts
from deltasync.client.push import PushReport
from deltasync.core import wire
from deltasync.core.errors import HostUnreachable

LIMIT = 1 << 20


class Narrow(Meddler):
    """The way to a server whose bundles are small; it remembers how large they were."""

    def __init__(self, inner: Any, features: list[str] | None = None) -> None:
        super().__init__(inner)
        self.sent: list[int] = []
        self.features = features

    def workspace(self, *arguments: Any, **options: Any) -> wire.WorkspaceState:
        state = self.inner.workspace(*arguments, **options)
        limits = msgspec.structs.replace(state.limits, bundle_content_bytes=LIMIT)
        return msgspec.structs.replace(
            state, limits=limits, features=state.features if self.features is None else self.features
        )

    def send_bundle(self, name: str, identity: bytes, chunks: Any, **options: Any) -> wire.Receipt:
        number = len(self.sent)
        self.sent.append(0)

        def counted() -> Iterator[bytes]:
            for chunk in chunks:
                self.sent[number] += len(chunk)
                yield chunk

        return super().send_bundle(name, identity, counted(), **options)


def cut_off() -> None:
    """Let no bundle through."""
    raise HostUnreachable("the network is gone")


def fine() -> None:
    """Let a bundle through."""


def edit(desk: Desk, path: str, change: Callable[[bytes], bytes]) -> None:
    """Write a file anew."""
    folders.write(desk.root, path, change((desk.root / path).read_bytes()))


def streams_of(served: Served) -> list[str]:
    """Return what the server has of contents that came in parts."""
    return os.listdir(served.data / "parts")


def assert_arrived(served: Served, desk: Desk, report: PushReport) -> None:
    """Fail unless both sides are in step, and nothing is left of any stream."""
    assert_in_step(served, desk, report)
    with desk.open() as state:
        assert parts.sent(state) == []
        assert state.db.execute("SELECT * FROM parts").fetchall() == []
    assert streams_of(served) == []
