"""The terminal of a command that runs elsewhere: its streams, its interrupts, and what is said beside them."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Self

from deltasync.cli.options import Call
from deltasync.cli.output import Output
from deltasync.cli.progress import Meter, meter

if TYPE_CHECKING:
    from types import FrameType

PROBLEMS_SHOWN = 20
GRACE_SECONDS = 1.0
"""How long after a Ctrl-C a second one is waited for, before the job is cancelled."""


class Aside(Output):
    """An output whose words for people go to stderr: stdout is the command's."""

    def say(self, line: str) -> None:
        """Print a line for people who asked for more."""
        if self.is_verbose and not self.is_json:
            self.note(line)


@contextlib.contextmanager
def shown_meter(out: Output) -> Iterator[Meter]:
    """Lend what shows how far the sending is, to people who look at it."""
    if sys.stderr.isatty() or out.is_verbose:
        with meter(out) as progress:
            yield progress
    else:
        yield Meter()


def note_stdin(out: Output) -> None:
    """Say that a command gets no standard input, where somebody has put something there for it (spec J-65)."""
    if _stdin_holds():
        out.note("the command gets no standard input; name a file that it reads")


def _stdin_holds() -> bool:
    """Tell whether standard input is a file or a pipe with something in it; reads nothing."""
    try:
        descriptor = sys.stdin.fileno()
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode):
            return status.st_size > os.lseek(descriptor, 0, os.SEEK_CUR)
        if not stat.S_ISFIFO(status.st_mode):
            return False
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return any(events & select.POLLIN for _, events in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # there is none
        return False


class Streams:
    """The streams of this process, as a sink; with `is_aside` both are stderr."""

    def __init__(self, *, is_aside: bool = False) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._out = sys.stderr.buffer if is_aside else sys.stdout.buffer

    def out(self, content: bytes) -> None:
        """Write what the command said on its standard output."""
        self._out.write(content)
        self._out.flush()

    def err(self, content: bytes) -> None:
        """Write what the command said on its standard error."""
        sys.stderr.buffer.write(content)
        sys.stderr.buffer.flush()


class Interrupts:
    """Ctrl-C while a job runs: once cancels it, a second one within a moment leaves it to the host (spec J-65).

    After the cancel was asked for, another one stops waiting for the job's end.
    """

    def __init__(
        self, cancel: Callable[[], object], announce: Callable[[], object], *, grace_seconds: float = GRACE_SECONDS
    ) -> None:
        """announce: says that a second one leaves the job alone. Both are called in a thread of their own."""
        self._cancel, self._announce, self._grace_seconds = cancel, announce, grace_seconds
        self._is_first, self._decided, self._turn = True, threading.Event(), threading.RLock()
        self._before: Callable[[int, FrameType | None], object] | int | None = None
        self.has_cancelled = False
        """Whether the cancel was asked for, or is about to be."""

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)
        with self._turn:
            self._decided.set()  # what is over by now is not cancelled

    def _hear(self, *_: object) -> None:
        if self._is_first:
            self._is_first = False
            # Not here: what was interrupted may hold a lock that the request needs.
            threading.Thread(target=self._await_second, daemon=True).start()
            return
        with self._turn:
            self._decided.set()
        raise KeyboardInterrupt

    def _await_second(self) -> None:
        self._announce()
        self._decided.wait(self._grace_seconds)
        with self._turn:
            if self._decided.is_set():
                return
            self.has_cancelled = True
        self._cancel()


def complain_all(call: Call, problems: list[tuple[str, str]]) -> None:
    """Say what is wrong with some paths."""
    most = len(problems) if call.out.is_verbose else PROBLEMS_SHOWN
    for path, reason in problems[:most]:
        call.out.warn(f"{path}: {reason}" if path else reason)
    if len(problems) > most:
        call.out.warn(f"and {len(problems) - most} more problems; -v lists all")
