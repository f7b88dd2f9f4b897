"""A command: runs in a process group of its own, into its log, to its end or until somebody ends it (spec J-44)."""

from __future__ import annotations

import contextlib
import enum
import os
import selectors
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from deltasync.core.errors import DeltasyncError, NotFound
from deltasync.core.names import shown
from deltasync_server.jobs.account import Account
from deltasync_server.jobs.leftovers import kill_marked, start_of, terminate_others
from deltasync_server.jobs.log import Kind, Log
from deltasync_server.jobs.sandbox import renounce

TERM_SECONDS = 5.0
"""How long a command has to end when it is asked to."""
LINGER_SECONDS = 2.0
"""How long the streams are read once everything that was started is killed: somebody else may hold them open."""
_READ_BYTES = 64 << 10


class Why(enum.Enum):
    """Why a command ended."""

    ITSELF = enum.auto()
    CANCELLED = enum.auto()
    TIME = enum.auto()
    STOPPED = enum.auto()
    """The server stops."""


@dataclass(frozen=True, slots=True)
class Command:
    """What is run."""

    job_id: str
    argv: list[bytes]
    environment: dict[bytes, bytes]
    folder: Path
    account: Account | None
    seconds: float
    is_shut_in: bool = False
    """Its first words are those of the sandbox."""


class Ended(NamedTuple):
    """How a command ended."""

    why: Why
    exit_code: int | None
    signal: int | None


class Process:
    """One run of a command; another thread may end it."""

    def __init__(self, command: Command, log: Log, came: Callable[[], None] = lambda: None) -> None:
        """Prepare a run. came: told when the log has grown."""
        self._command, self._log, self._came = command, log, came
        self._why = Why.ITSELF
        self._wake_reader, self._wake_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._lock = threading.Lock()
        self._has_exited = threading.Event()
        self._kill_at: float | None = None
        self._is_killed = False

    def run(self, started: Callable[[int, str | None], None]) -> Ended:
        """Run the command to its end. started: told its process, and when that began, before anything is read.

        Raises a DeltasyncError that says why it could not be started.
        """
        try:
            if self._why is not Why.ITSELF:
                return Ended(self._why, None, None)
            process = self._started()
            assert process.stdout and process.stderr
            with process.stdout, process.stderr:
                try:
                    started(process.pid, start_of(process.pid))
                    self._attend(process)
                finally:
                    self._end_all(process)
            return _ended(self._why, process.returncode)
        finally:
            with self._lock:
                os.close(self._wake_reader)
                os.close(self._wake_writer)
                self._wake_writer = -1

    def end(self, why: Why) -> None:
        """Have the command ended; the first reason counts."""
        if self._why is Why.ITSELF:
            self._why = why
        self._wake()

    def _wake(self) -> None:
        with self._lock, contextlib.suppress(BlockingIOError):
            if self._wake_writer >= 0:
                os.write(self._wake_writer, b"w")

    def _started(self) -> subprocess.Popen[bytes]:
        name = shown(os.fsdecode(self._command.argv[0]))
        try:
            if self._command.is_shut_in:  # by who renounces for it, and dies with the thread that started it
                return self._opened()
            with ThreadPoolExecutor(1, "deltasync-start", renounce) as thread:  # spec J-87
                return thread.submit(self._opened).result()
        except FileNotFoundError as error:
            raise _not_there(name) from error
        except PermissionError as error:
            raise DeltasyncError(f"the command {name} may not be run on the host") from error
        except (OSError, subprocess.SubprocessError, BrokenExecutor) as error:
            raise DeltasyncError(f"the command {name} could not be started: {error}") from error

    def _opened(self) -> subprocess.Popen[bytes]:
        command, account = self._command, self._command.account
        return subprocess.Popen(  # a list: no shell ever reads it (spec J-44)
            command.argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            cwd=command.folder,
            env=command.environment,
            start_new_session=True,
            user=account.uid if account else None,
            group=account.gid if account else None,
            extra_groups=account.groups if account else None,
            umask=0o022,
        )

    def _attend(self, process: subprocess.Popen[bytes]) -> None:
        """Read the streams until the command has ended, and end it when its time has come."""
        watch = threading.Thread(target=self._await_exit, args=(process,), name="deltasync-exit", daemon=True)
        watch.start()
        deadline = time.monotonic() + self._command.seconds
        try:
            with selectors.DefaultSelector() as selector:
                self._register(selector, process)
                selector.register(self._wake_reader, selectors.EVENT_READ)
                while not self._has_exited.is_set():
                    self._read_ready(selector, _until(self._kill_at, None if self._kill_at else deadline))
                    if self._why is Why.ITSELF and time.monotonic() >= deadline and not self._has_exited.is_set():
                        self._why = Why.TIME
                    if self._why is not Why.ITSELF:
                        self._press(process.pid)
        finally:
            self._kill(process.pid)
            watch.join()

    def _await_exit(self, process: subprocess.Popen[bytes]) -> None:
        # It stays a zombie: as long as it does nobody else gets its number, by which the group is killed.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        self._has_exited.set()
        self._wake()

    def _register(self, selector: selectors.BaseSelector, process: subprocess.Popen[bytes]) -> None:
        for stream, kind in ((process.stdout, Kind.OUT), (process.stderr, Kind.ERR)):
            assert stream
            os.set_blocking(stream.fileno(), False)
            selector.register(stream, selectors.EVENT_READ, kind)

    def _read_ready(self, selector: selectors.BaseSelector, seconds: float | None) -> int:
        """Move what is there of the streams into the log; returns how many of them were ready."""
        ready = selector.select(seconds)
        found = 0
        for key, _ in ready:
            if key.data is None:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_reader, _READ_BYTES)
                continue
            found += 1
            stream: IO[bytes] = key.fileobj  # type: ignore[assignment]
            content = os.read(stream.fileno(), _READ_BYTES)
            if content:
                self._log.append(key.data, content)
                self._came()
            else:
                selector.unregister(stream)
        return found

    def _press(self, group: int) -> None:
        """Ask the command to end, and kill it where it does not (spec J-44)."""
        now = time.monotonic()
        if self._kill_at is None:
            self._kill_at = now + TERM_SECONDS
            if self._command.is_shut_in:
                terminate_others(group)  # if the sandbox itself ended, everything in it would at once
                return
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGTERM)
        elif now >= self._kill_at:
            self._kill(group)
            self._kill_at = now + TERM_SECONDS

    def _kill(self, group: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS says the latter of zombies
            os.killpg(group, signal.SIGKILL)

    def _end_all(self, process: subprocess.Popen[bytes]) -> None:
        """Kill what the command has started, and read what is left of its streams."""
        self._kill(process.pid)
        kill_marked({self._command.job_id})
        process.wait()
        end = time.monotonic() + LINGER_SECONDS
        with selectors.DefaultSelector() as selector:
            self._register(selector, process)
            while selector.get_map() and (left := end - time.monotonic()) > 0:
                self._read_ready(selector, left)


def require_there(name: bytes, environment: Mapping[bytes, bytes], folder: Path) -> None:
    """Raise NotFound where a command is not there: the sandbox would say so in its own words (spec J-44)."""
    text, path = os.fsdecode(name), os.fsdecode(environment.get(b"PATH", os.fsencode(os.defpath)))
    if shutil.which(str(folder / text) if "/" in text else text, path=path) is None:
        raise _not_there(shown(text))


def _not_there(name: str) -> NotFound:
    return NotFound(f"there is no command {name} on the host")


def _until(*moments: float | None) -> float | None:
    """Return the seconds to the first of some moments; None where there is none."""
    left = [moment - time.monotonic() for moment in moments if moment is not None]
    return max(0.0, min(left)) if left else None


def _ended(why: Why, code: int) -> Ended:
    return Ended(why, None, -code) if code < 0 else Ended(why, code, None)
