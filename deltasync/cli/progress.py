"""Progress: a bar with rate and remaining time on a terminal, a line for each bundle where there is none."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from deltasync.cli.output import Output, bytes_text, count_text

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from deltasync.client.report import Progress


LINE_BYTES = 64 << 20
"""How much is fetched for each line."""


class Meter:
    """Hears how far the reading and the sending are, and shows nothing."""

    def read(self, files: int, size_bytes: int) -> None:
        """Hear how many files and bytes were read so far."""

    def all_is_read(self) -> None:
        """Hear that everything was read."""

    def sent(self, progress: Progress) -> None:
        """Hear how far the sending is; called from the sending threads."""

    def fetched(self, size_bytes: int, total_bytes: int) -> None:
        """Hear how far the fetching is; called from the fetching threads."""


class _Lines(Meter):
    """A line for each bundle, or for as much as a bundle has, for logs."""

    def __init__(self, out: Output) -> None:
        self._out, self._bundles, self._fetched_bytes = out, 0, 0

    def sent(self, progress: Progress) -> None:
        if progress.bundles > self._bundles:
            self._bundles = progress.bundles
            done = f"{bytes_text(progress.content_bytes)} of {bytes_text(progress.total_bytes)}"
            part = f"; {progress.part}" if progress.part else ""
            self._out.say(f"{count_text(progress.bundles, 'bundle')}, {done} read{part}")

    def fetched(self, size_bytes: int, total_bytes: int) -> None:
        if size_bytes - self._fetched_bytes >= LINE_BYTES:
            self._fetched_bytes = size_bytes
            self._out.say(f"{bytes_text(size_bytes)} of {bytes_text(total_bytes)} fetched")


class _Bar(Meter):
    """A bar for what is read, until all is, and one for what is sent."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._reading: TaskID | None = None
        self._sending: TaskID | None = None
        self._fetching: TaskID | None = None

    def read(self, files: int, size_bytes: int) -> None:
        if self._reading is None:
            self._reading = self._bars.add_task("reading", total=None)
        self._bars.update(self._reading, completed=size_bytes)

    def all_is_read(self) -> None:
        if self._reading is not None:
            self._bars.remove_task(self._reading)
            self._reading = None

    def sent(self, progress: Progress) -> None:
        if self._sending is None:
            self._sending = self._bars.add_task("sending", total=progress.total_bytes)
        self._bars.update(
            self._sending,
            description=progress.part or "sending",
            completed=progress.content_bytes,
            total=progress.total_bytes,
        )

    def fetched(self, size_bytes: int, total_bytes: int) -> None:
        if self._fetching is None:
            self._fetching = self._bars.add_task("fetching", total=total_bytes)
        self._bars.update(self._fetching, completed=size_bytes, total=max(size_bytes, total_bytes))


@contextlib.contextmanager
def meter(out: Output) -> Iterator[Meter]:
    """Show progress on stderr where that is a terminal, as lines where it is not, not at all for programs."""
    if out.is_json or out.is_quiet:
        yield Meter()
    elif not sys.stderr.isatty():
        yield _Lines(out)
    else:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.progress import TransferSpeedColumn as Rate

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(binary_units=True),
            Rate(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True, markup=False), transient=True) as bars:
            yield _Bar(bars)
