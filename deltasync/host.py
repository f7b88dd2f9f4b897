"""Hosts from Python: `Host("gpu1").run(["ffmpeg", "-i", "in.mp4", "out.webm"])`, as `deltasync run` does it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from deltasync import config
from deltasync.client import address
from deltasync.client.job_request import Asked, drafted
from deltasync.client.run import Runner, exit_code_of
from deltasync.client.ssh import SshOptions
from deltasync.client.transport import HttpTransport, open_transport
from deltasync.core.argv import Said
from deltasync.core.errors import DeltasyncError, PlanRefused, UsageError, of_run
from deltasync.core.names import shown

KEEP_BYTES = 16 << 20
Take = Callable[[bytes], object]
"""Takes a part of what a command says, such as the `write` of a file."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a command did: its exit code (128 + N for signal N), what it said, and the outputs that are here now."""

    exit_code: int
    stdout: bytes
    """The end of its standard output, as much as was to be kept."""
    stderr: bytes
    outputs: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What did not come home, or went without something, and why."""
    job: str = ""
    stdout_cut_bytes: int = 0
    """How many bytes of its standard output came before those that are kept."""
    stderr_cut_bytes: int = 0
    notes: list[str] = field(default_factory=list)
    """What `deltasync run` would have said beside it, such as how much of a very long log the host did not keep."""


class Host:
    """A host that runs commands; a name of the host book, or an address as `--on` takes it."""

    def __init__(self, name: str) -> None:
        """Ask nothing yet; raises UsageError for a name that nobody knows."""
        self._settings = config.load({"on": name}, os.environ, config.files_of(None, os.environ))
        self.url = address.resolved(self._settings.on or name, os.environ)
        found = open_transport(
            self.url,
            bandwidth=self._settings.bandwidth_bytes or None,
            timeout=self._settings.timeout_seconds,
            max_retries=self._settings.max_retries,
            jobs=self._settings.jobs,
            proxies=self._settings.proxy,
            insecure=self._settings.insecure,
            token_for=address.known(self._settings.token_for, os.environ),
            ssh=SshOptions(
                self._settings.ssh, self._settings.ssh_server, connect_seconds=self._settings.timeout_seconds
            ),
        )
        if not isinstance(found, HttpTransport):
            raise UsageError(f"{shown(self.url)} is a folder, which runs nothing")
        self._transport = found

    def run(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        inputs: Sequence[str] = (),
        outputs: Sequence[str] = (),
        literals: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        is_in_place: bool = False,
        fetch_failed: bool = False,
        timeout_seconds: float | None = None,
        gpus: int = 0,
        priority: int = 0,
        keep_seconds: float = 0.0,
        is_shut_in: bool = False,
        has_network: bool = False,
        folder: str | os.PathLike[str] | None = None,
        stdout: Take | None = None,
        stderr: Take | None = None,
        keep_bytes: int = KEEP_BYTES,
    ) -> Result:
        """Run a command to its end, as if it were run here in `folder`; raises a RunTrouble where it was not run.

        is_shut_in: in the host's sandbox, where it reaches the network only with has_network.
        stdout, stderr: take all that it says, in parts, as it says it. keep_bytes: how much of the end of each stream
        is in the result; the rest is counted there. Where one of the two raises, the job is left to its host.
        """
        if isinstance(argv, str | bytes | os.PathLike):
            raise PlanRefused('a command is no text; give a list of words: ["cp", "a", "b"]')
        said = Said(frozenset(inputs), frozenset(outputs), frozenset(literals), is_in_place)
        words = [os.fspath(each) for each in argv]
        asked = Asked(
            words,
            said,
            environment,
            timeout_seconds,
            gpus,
            priority,
            keep_seconds,
            is_shut_in=is_shut_in,
            has_network=has_network,
        )
        notes: list[str] = []
        runner = Runner(self._transport, note=notes.append, settle_seconds=self._settings.settle_seconds)
        try:
            draft = drafted(asked, str(Path(folder or ".").absolute()))
        except DeltasyncError as error:
            raise of_run(error) from error
        started, sink = runner.start(draft, _Silent()), _Kept(keep_bytes, stdout, stderr)
        job = runner.follow(started.job, sink)
        code = exit_code_of(job)
        problems = [f"{each.path}: {each.reason}" for each in started.inputs.problems]
        paths: list[Path] = []
        if not code or fetch_failed:
            home = runner.fetch(started.record, job, _Silent())
            paths = [Path(each) for each in home.paths]
            problems += [f"{each.place}: {each.reason}" if each.place else each.reason for each in home.problems]
        return Result(
            code,
            sink.stdout.content(),
            sink.stderr.content(),
            paths,
            problems,
            job.id,
            sink.stdout.cut_bytes,
            sink.stderr.cut_bytes,
            notes,
        )

    def close(self) -> None:
        """Let the connections go."""
        with contextlib.suppress(OSError):
            self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Tail:
    """The end of a stream, and how much came before it."""

    def __init__(self, keep_bytes: int) -> None:
        self._keep_bytes, self._kept = max(0, keep_bytes), bytearray()
        self.cut_bytes = 0

    def add(self, content: bytes) -> None:
        """Take a part; no more than twice what is to be kept, and this part, is held at any time."""
        self._kept += content
        if len(self._kept) >= 2 * self._keep_bytes:
            self._cut()

    def content(self) -> bytes:
        """Return what is kept."""
        self._cut()
        return bytes(self._kept)

    def _cut(self) -> None:
        surplus = max(0, len(self._kept) - self._keep_bytes)
        del self._kept[:surplus]
        self.cut_bytes += surplus


class _Kept:
    """Keeps the end of what a command says, and hands on all of it."""

    def __init__(self, keep_bytes: int, stdout: Take | None, stderr: Take | None) -> None:
        self.stdout, self.stderr = Tail(keep_bytes), Tail(keep_bytes)
        self._stdout, self._stderr = stdout, stderr

    def out(self, content: bytes) -> None:
        self.stdout.add(content)
        if self._stdout is not None:
            self._stdout(content)

    def err(self, content: bytes) -> None:
        self.stderr.add(content)
        if self._stderr is not None:
            self._stderr(content)


class _Silent:
    """Hears how far things are, and shows nothing."""

    def read(self, files: int, size_bytes: int) -> None:
        """Hear how much was read."""

    def all_is_read(self) -> None:
        """Hear that everything was read."""

    def sent(self, progress: object) -> None:
        """Hear how far the sending is."""

    def fetched(self, size_bytes: int, total_bytes: int) -> None:
        """Hear how far the fetching is."""
