"""A real server with TLS for tests, and connections to it."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving import BINARY, SECONDS

from deltasync.client.trust import Trust


@dataclass
class Secured:
    """A running server and what it said first."""

    process: subprocess.Popen[str]
    said: dict[str, Any]
    data: Path
    errors: Path

    @property
    def port(self) -> int:
        return int(self.said["listening"].rpartition(":")[2])

    @property
    def trust(self) -> Trust:
        return Trust(ca_pem=(self.data / "tls/ca.pem").read_text())

    def tls(self) -> ssl.SSLSocket:
        """Open a connection that is secured."""
        return self.trust.context().wrap_socket(self.plain())

    def plain(self) -> socket.socket:
        """Open a connection that is not."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS)


@contextmanager
def secured(tmp_path: Path, *flags: str | Path, listen: str = "127.0.0.1:0") -> Iterator[Secured]:
    """Serve with TLS while the block runs."""
    data, errors = tmp_path / "data", tmp_path / "errors"
    words = [BINARY, "serve", "--data", data, "--listen", listen, "--json", *flags]
    with (
        errors.open("ab") as stderr,
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
    ):
        try:
            assert process.stdout
            line = process.stdout.readline()
            assert line, errors.read_text()
            yield Secured(process, json.loads(line), data, errors)
        finally:
            process.terminate()
