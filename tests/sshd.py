"""A real sshd on loopback for tests: one host, one user there with a home of their own, and the keys to it."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from serving import SECONDS, until
from user import User

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/sbin")
ATTEMPTS = 5
"""How often another free port is tried: somebody else may take it first."""

needs_sshd = pytest.mark.skipif(
    SSHD is None or shutil.which("ssh") is None, reason="OpenSSH is not installed (openssh-server, openssh-client)"
)


@dataclass
class Host:
    """A host with a running sshd."""

    process: subprocess.Popen[bytes]
    port: int
    folder: Path
    log: Path

    @property
    def url(self) -> str:
        """Its address, to which a workspace's name can be added."""
        return f"ssh://{self.user}@127.0.0.1:{self.port}"

    @property
    def user(self) -> str:
        """The name of the user there."""
        return getpass.getuser()

    @property
    def home(self) -> Path:
        """The home folder there."""
        return self.folder / "home"

    @property
    def data(self) -> Path:
        """The usual data folder there."""
        return self.home / ".local" / "share" / "deltasync"

    def logins(self) -> int:
        """Count how often somebody proved who they are."""
        return self.log.read_text().count("Accepted publickey")

    def servers(self) -> list[psutil.Process]:
        """Return the deltasync servers that run there."""
        return running("serve", str(self.folder))

    def cut(self) -> None:
        """Break every connection."""
        with contextlib.suppress(psutil.NoSuchProcess):  # sshd itself may have ended
            for each in psutil.Process(self.process.pid).children(recursive=True):
                end(each)


def running(*words: str) -> list[psutil.Process]:
    """Return the processes that have all of these in their command lines."""
    found = []
    for each in psutil.process_iter(["cmdline"]):
        line = " ".join(each.info["cmdline"] or ())
        if all(word in line for word in words):
            found.append(each)
    return found


def end(process: psutil.Process) -> None:
    """Kill a process that a test started, and wait until it is gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()
        process.wait(SECONDS)


def masters(user: User) -> list[psutil.Process]:
    """Return the processes of ssh that hold a user's connections."""
    return running("[mux]", str(user.home))


@contextmanager
def hosting(folder: Path, **variables: str) -> Iterator[Host]:
    """Run a host; `variables` are set for everything that runs there."""
    folder.mkdir()
    for name in ("host", "client", "stranger"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    shutil.copy(folder / "client.pub", folder / "authorized_keys")
    (folder / "home").mkdir()
    host = _started(folder, variables)
    try:
        yield host
    finally:
        for each in host.servers():
            end(each)
        host.cut()
        host.process.kill()
        host.process.wait(SECONDS)


def _started(folder: Path, variables: dict[str, str]) -> Host:
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where sshd, as root, lets its unprivileged part live
    log = folder / "sshd.log"
    for _ in range(ATTEMPTS):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        (folder / "sshd_config").write_text(_configuration(folder, port, variables))
        log.write_bytes(b"")
        assert SSHD is not None
        with log.open("ab") as err:
            process = subprocess.Popen([SSHD, "-D", "-e", "-f", folder / "sshd_config"], stderr=err)
        until(lambda process=process: process.poll() is not None or "Server listening" in log.read_text())
        if process.poll() is None:
            return Host(process, port, folder, log)
    raise AssertionError(log.read_text())


def _configuration(folder: Path, port: int, variables: dict[str, str]) -> str:
    programs = Path(sys.executable).parent
    everything = {"HOME": f"{folder}/home", "PATH": f"{programs}:/usr/bin:/bin", "PYTHONUTF8": "1"} | variables
    set_env = " ".join(f'"{name}={value}"' for name, value in everything.items())
    return f"""
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host
AuthorizedKeysFile {folder}/authorized_keys
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PidFile none
SetEnv {set_env}
"""


def visitor(home: Path, host: Host, *, key: str = "client", knows_host: bool = True) -> User:
    """Return a user whose ssh has a key and, if so, knows the host."""
    user = User(home)
    known = f"[127.0.0.1]:{host.port} {(host.folder / 'host.pub').read_text()}" if knows_host else ""
    (home / "known_hosts").write_text(known)
    (home / "ssh_config").write_text(
        f"IdentityFile {host.folder / key}\nIdentitiesOnly yes\nIdentityAgent none\n"
        f"UserKnownHostsFile {home}/known_hosts\nGlobalKnownHostsFile /dev/null\n"
    )
    user.environment["DELTASYNC_SSH"] = f"ssh -F {home}/ssh_config"
    return user


def leave(user: User) -> None:
    """End the connections of a user that stay."""
    for each in masters(user):
        end(each)
