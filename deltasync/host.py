"""Hosts from Python: `Host("gpu1").run(["ffmpeg", "-i", "in.mp4", "out.webm"])`, as `deltasync run` does it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
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
from deltasync.core.errors import DeltasyncError, UsageError, of_run
from deltasync.core.names import shown


@dataclass(frozen=True, slots=True)
class Result:
    """What a command did: its exit code (128 + N for signal N), what it said, and the outputs that are here now."""

    exit_code: int
    stdout: bytes
    stderr: bytes
    outputs: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What did not come home, or went without something, and why."""
    job: str = ""


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
            token_for=[address.resolved(each, os.environ) for each in self._settings.token_for],
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
    ) -> Result:
        """Run a command to its end, as if it were run here in `folder`; raises a RunTrouble where it was not run.

        is_shut_in: in the host's sandbox, where it reaches the network only with has_network.
        """
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
        started, sink = runner.start(draft, _Silent()), _Kept()
        job = runner.follow(started.job, sink)
        code = exit_code_of(job)
        problems = [f"{each.path}: {each.reason}" for each in started.inputs.problems]
        paths: list[Path] = []
        if not code or fetch_failed:
            home = runner.fetch(started.record, job, _Silent())
            paths = [Path(each) for each in home.paths]
            problems += [f"{each.place}: {each.reason}" for each in home.problems]
        return Result(code, bytes(sink.stdout), bytes(sink.stderr), paths, problems, job.id)

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


class _Kept:
    """Keeps what a command says."""

    def __init__(self) -> None:
        self.stdout, self.stderr = bytearray(), bytearray()

    def out(self, content: bytes) -> None:
        self.stdout += content

    def err(self, content: bytes) -> None:
        self.stderr += content


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
