"""An sshd on loopback, whose `true` is what a command on a host costs at least."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.measure import free_port, started, wait_for_port

_SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/sbin")


def has_sshd() -> bool:
    """Tell whether both sides of ssh are installed."""
    return _SSHD is not None and shutil.which("ssh") is not None


@contextmanager
def sshd(folder: Path, environment: dict[str, str]) -> Iterator[list[str | Path]]:
    """Run an sshd with keys of its own, and lend the words that log in there."""
    folder.mkdir(parents=True)
    for name in ("host", "client"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    port = free_port()
    (folder / "known").write_text(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}")
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/client.pub\n"
        "StrictModes no\nUsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nPidFile none\n"
    )
    options = {"IdentityFile": folder / "client", "IdentitiesOnly": "yes", "IdentityAgent": "none"}
    options |= {"UserKnownHostsFile": folder / "known", "GlobalKnownHostsFile": "/dev/null", "BatchMode": "yes"}
    assert _SSHD is not None
    with started([_SSHD, "-D", "-e", "-f", folder / "sshd_config"], environment, folder / "sshd.log"):
        wait_for_port(port)
        words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        yield ["ssh", "-F", "/dev/null", "-p", str(port), *words, "127.0.0.1"]
