"""A stand-in for the way home of outputs: nothing is collected, and nothing is held."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from deltasync.core.jobs import Returned
from deltasync.disk import Folder
from deltasync_server.jobs.table import JobRow
from deltasync_server.receive import Store


def collect(
    store: Store,
    job: JobRow,
    session: Folder,
    staged: Mapping[str, bytes],
    *,
    file_bytes: int,
    should_stop: Callable[[], None],
) -> Returned | None:
    """Return what a job wrote, as a pinned sequence; None where it wrote nothing.

    staged: the digest of each in-place file as it was staged, by its place. should_stop: raises to break off.
    """
    return None


def release(store: Store, job: JobRow) -> None:
    """Let go of what a job returned; nothing there is fine."""


def release_others(store: Store, jobs: Iterable[JobRow]) -> None:
    """Let go of what none of these jobs has returned: a server has died before it could say whose it is."""
