"""The two programs that are compared: deltasync and rsync, each with its server on loopback."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from bench.measure import free_port, started, wait_for_port

BIN = Path(sys.executable).parent
WORKSPACE = "bench"


class Contestant(Protocol):
    """A client command and the running server that it sends to."""

    name: str
    server_pid: int
    port: int
    tree: Path

    def command(self, source: Path, port: int) -> list[str | Path]:
        """Return the command that syncs a folder to the server behind a port."""

    def fetch_command(self, dest: Path, port: int) -> list[str | Path]:
        """Return the command that brings the server's tree into a folder."""


@dataclass(slots=True)
class Deltasync:
    """`deltasync push` to `deltasync-server serve`."""

    server_pid: int
    port: int
    tree: Path
    name: str = field(default="deltasync", init=False)

    def command(self, source: Path, port: int) -> list[str | Path]:
        """Return a push that ends when the tree on the server holds what was sent."""
        return [
            BIN / "deltasync",
            "push",
            source,
            "--to",
            f"http://127.0.0.1:{port}",
            "--workspace",
            WORKSPACE,
            "--json",
        ]

    def fetch_command(self, dest: Path, port: int) -> list[str | Path]:
        """Return a fetch of the whole workspace as it is now."""
        url = f"http://127.0.0.1:{port}"
        return [BIN / "deltasync", "fetch", "--from", url, "--workspace", WORKSPACE, "--quiet", dest]


@dataclass(slots=True)
class Rsync:
    """`rsync -a --delete` to `rsync --daemon`."""

    server_pid: int
    port: int
    tree: Path
    name: str = field(default="rsync", init=False)

    def command(self, source: Path, port: int) -> list[str | Path]:
        """Return a sync that leaves out what deltasync keeps in the same folder."""
        return ["rsync", "-a", "--delete", "--exclude=/.deltasync", f"{source}/", f"rsync://127.0.0.1:{port}/bench/"]

    def fetch_command(self, dest: Path, port: int) -> list[str | Path]:
        """Return a sync from the daemon."""
        return ["rsync", "-a", f"rsync://127.0.0.1:{port}/bench/", f"{dest}/"]


def environment(home: Path) -> dict[str, str]:
    """Return an environment in which the programs keep their own state below `home` and no setting leaks in.

    Python's own settings are left out too: without bytecode on disk every start compiles the sources again.
    """
    foreign = ("DELTASYNC_", "REMOTE_UPLOAD_", "XDG_", "PYTHON")
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(foreign) or name == "XDG_RUNTIME_DIR"
    }
    return kept | {"HOME": str(home), "PYTHONUNBUFFERED": "1"}


@contextmanager
def deltasync_server(folder: Path, *, workspace: str = WORKSPACE, flags: Sequence[str] = ()) -> Iterator[Deltasync]:
    """Run a deltasync server with fresh data below a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "data"
    command: list[str | Path] = [BIN / "deltasync-server", "serve", "--data", data, "--listen", "127.0.0.1:0", *flags]
    with started(command, environment(folder), folder / "server.log") as process:
        assert process.stdout
        line = process.stdout.readline()
        if not line.startswith("listening on http://"):
            raise RuntimeError(f"the server did not start: {line}{(folder / 'server.log').read_text()}")
        yield Deltasync(process.pid, int(line.strip().rpartition(":")[2]), data / "workspaces" / workspace / "tree")


@contextmanager
def rsync_server(folder: Path) -> Iterator[Rsync]:
    """Run an rsync daemon with a fresh module below a folder."""
    tree = folder / "tree"
    tree.mkdir(parents=True)
    port = free_port()
    identity = f"uid = {os.getuid()}\ngid = {os.getgid()}\n" if os.getuid() == 0 else ""
    (folder / "rsyncd.conf").write_text(
        f"use chroot = no\nreverse lookup = no\n{identity}pid file = {folder}/pid\n"
        f"[bench]\npath = {tree}\nread only = no\n"
    )
    command = [
        "rsync",
        "--daemon",
        "--no-detach",
        f"--config={folder}/rsyncd.conf",
        f"--port={port}",
        "--address=127.0.0.1",
    ]
    with started(command, environment(folder), folder / "rsyncd.log") as process:
        wait_for_port(port)
        yield Rsync(process.pid, port, tree)


def has_rsync() -> bool:
    """Tell whether an rsync program is installed."""
    return shutil.which("rsync") is not None


def pushed(output: str) -> dict[str, int]:
    """Return the byte counts that `push --json` printed, or nothing for another program's output."""
    try:
        answer = json.loads(output)
    except ValueError:
        return {}
    return {name: int(answer[name]) for name in ("content_bytes", "sent_bytes", "avoided_bytes", "bundles")}
