"""One server for a data folder on a unix socket: started for clients over ssh, ended by itself (spec H-59, H-130)."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import msgspec

from deltasync.core import wire
from deltasync.core.errors import AlreadyRunning, DeltasyncError, HostBusy, UsageError, from_problem
from deltasync.core.names import shown
from deltasync.decoding import decoded
from deltasync.disk import Lock
from deltasync_server.config import ENVIRONMENT_PREFIX
from deltasync_server.http.listen import PATH_BYTES_MAX, UNIX
from deltasync_server.opening import explained, require_data

IDLE_SECONDS = 600.0
"""How long a started server stays without a connection, unless `idle_exit` says otherwise."""
ANSWER_SECONDS = 10.0
ENDING_SECONDS = 5.0
"""How long a server that just became idle may still hold the store."""
PAUSE_SECONDS = 0.1


class Attached(msgspec.Struct, frozen=True):
    """What a client must know of the server: where it listens, and what it is."""

    socket: str
    data: str
    version: str


def attach(data: Path, *, config_file: Path | None, idle_exit: float | None) -> Attached:
    """Return the data folder's server, started if none runs; of several callers at once one starts it."""
    data = data.expanduser().resolve()
    folder = data / "run"
    where = folder / "http.sock"
    if len(os.fsencode(where)) > PATH_BYTES_MAX:
        raise UsageError(f"{shown(str(data))} is too long a path for a socket inside; choose a shorter data folder")
    require_data(data, create=True)
    with explained(data):
        folder.mkdir(mode=0o700, exist_ok=True)
        folder.chmod(0o700)
        lock = Lock(folder / "lock", "", wait=True)
    with lock:
        version = _version_at(where) or _start(where, config_file, IDLE_SECONDS if idle_exit is None else idle_exit)
    return Attached(str(where), str(data), version)


class _Connection(HTTPConnection):
    """A connection to a unix socket."""

    def __init__(self, where: Path) -> None:
        super().__init__("localhost", timeout=ANSWER_SECONDS)
        self._where = where

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(os.fspath(self._where))


def _version_at(where: Path) -> str | None:
    """Ask for the release of the server that listens there; None where none does."""
    try:
        with contextlib.closing(_Connection(where)) as connection:
            connection.request("GET", "/health")
            return decoded(connection.getresponse().read(), wire.Health).version
    except (FileNotFoundError, ConnectionError):
        return None
    except (OSError, HTTPException, msgspec.MsgspecError) as error:
        raise HostBusy(f"what listens at {shown(str(where))} does not answer; try again, or stop it") from error


def _start(where: Path, config_file: Path | None, idle_exit: float) -> str:
    """Start the server and return its release, once it takes requests."""
    deadline = time.monotonic() + ENDING_SECONDS
    while True:
        try:
            return _started(where, config_file, idle_exit)
        except AlreadyRunning as error:
            if time.monotonic() >= deadline:
                data = shown(str(where.parents[1]))
                raise AlreadyRunning(
                    f"another process uses {data}, started by other means: connect to it, stop it, or choose other data"
                ) from error
        time.sleep(PAUSE_SECONDS)


def _started(where: Path, config_file: Path | None, idle_exit: float) -> str:
    log, data = where.with_name("server.log"), where.parents[1]
    words = ["serve", "--json", "--data", str(data), "--listen", f"{UNIX}{where}", "--idle-exit", f"{idle_exit:.0f}"]
    words += ["--no-tls", "--no-require-token"]  # whoever reaches the socket is the user; server.toml may be for others
    variables = {} if config_file is None else {f"{ENVIRONMENT_PREFIX}CONFIG": str(config_file.absolute())}
    log.touch(0o600)
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "deltasync_server", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=out,
            cwd=data,
            env={**os.environ, **variables},
            start_new_session=True,  # it outlives the connection that it was started over
        )
    assert process.stdout is not None
    with process.stdout:
        line = process.stdout.readline()  # spec H-51: there is no more
    try:
        found: dict[str, Any] = msgspec.json.decode(line)
    except msgspec.DecodeError as error:
        raise DeltasyncError(f"the server ended before it took requests; see {shown(str(log))}") from error
    if "error" not in found:
        return str(found["version"])
    process.wait()
    facts = found["error"]
    raise from_problem(facts.pop("code"), facts.pop("detail"), facts)
