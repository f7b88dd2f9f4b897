"""The sandbox: a command sees the host's files, may write its session alone, and nothing of the store (spec J-85)."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from deltasync.core.names import shown
from deltasync_server.jobs.account import Account

PROGRAM = "bwrap"
PROBE_SECONDS = 20.0
_PR_SET_NO_NEW_PRIVS = 38
_APART = ("--unshare-user-try", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try")
_GPU_DEVICES = ("nvidia*", "dri", "kfd", "dxg")
_RUN = Path("/run")
_KEPT_OF_RUN = ("current-system", "opengl-driver", "wrappers")
"""Where some systems have their programs; what else is there are sockets, by which a command would get out."""
_TEMPORARY = "/tmp"
"""The command gets an empty one, in memory; TMPDIR is in its session."""


class Sandbox:
    """Puts commands behind bubblewrap; whether that works here is tried once, when somebody asks."""

    def __init__(self, data: Path, sessions: Path, account: Account | None, socket: Path | None = None) -> None:
        """data, sessions: what no command sees, but for its own session. socket: where the server listens, if there."""
        self._hidden = _outermost([Path(os.path.realpath(each)) for each in (data, sessions)])
        self._account, self._socket = account, socket
        self._lock = threading.Lock()
        self._why: str | None = None

    @property
    def why_not(self) -> str:
        """Why no command can be shut in here, in words that end a sentence; '' where it can."""
        with self._lock:
            if self._why is None:
                self._why = self._probed()
            return self._why

    def _probed(self) -> str:
        if shutil.which(PROGRAM) is None:
            return "bubblewrap (bwrap) is not installed there"
        account = self._account
        try:
            done = subprocess.run(
                [*self._shut_in(None, has_network=False), "true"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=PROBE_SECONDS,
                check=False,
                user=account.uid if account else None,
                group=account.gid if account else None,
                extra_groups=account.groups if account else None,
            )
        except (OSError, subprocess.SubprocessError) as error:
            return f"bubblewrap cannot be run there: {error}"
        said = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
        return f"bubblewrap does not work there: {shown(said[-1])}" if done.returncode else ""

    def wrapped(self, argv: list[bytes], session: Path, *, has_network: bool) -> list[bytes]:
        """Return the words that run a command of a session in the sandbox."""
        return [*map(os.fsencode, self._shut_in(Path(os.path.realpath(session)), has_network=has_network)), *argv]

    def _shut_in(self, session: Path | None, *, has_network: bool) -> list[str]:
        words = [PROGRAM, "--die-with-parent", *_APART, *(() if has_network else ("--unshare-net",))]
        words += ["--cap-drop", "ALL", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc"]
        if self._socket is not None and self._socket.exists():  # who connects there needs no token
            words += ["--ro-bind", "/dev/null", os.path.realpath(self._socket)]
        for device in _gpu_devices():
            words += ["--dev-bind-try", device, device]
        hidden = [str(each) for each in self._hidden]
        if _RUN.is_dir():
            hidden.append(str(_RUN))
            words += ["--tmpfs", str(_RUN)]
            for each in _of_run():
                words += ["--ro-bind-try", each, each]
        words += ["--tmpfs", _TEMPORARY]  # no bind from the session: what ran in it before may have planted links
        for path in self._hidden:
            words += ["--tmpfs", str(path)]
        if session is not None:
            words += ["--bind", str(session), str(session), "--chdir", f"{session}/work"]  # inside: a link gets nowhere
        for each in hidden:
            words += ["--remount-ro", each]
        return [*words, "--"]


def renounce() -> None:
    """Have this thread, and all that it starts, gain no rights from a program's file (spec J-87)."""
    if sys.platform == "linux" and ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no_new_privs could not be set")


def _gpu_devices() -> Iterator[str]:
    for pattern in _GPU_DEVICES:
        yield from sorted(map(str, Path("/dev").glob(pattern)))


def _of_run() -> Iterator[str]:
    for name in _KEPT_OF_RUN:
        yield str(_RUN / name)
    names = os.path.realpath("/etc/resolv.conf")
    if names.startswith(f"{_RUN}/"):
        yield names


def _outermost(folders: list[Path]) -> list[Path]:
    """Return the folders but for those inside of others."""
    return [each for each in dict.fromkeys(folders) if not any(other in each.parents for other in folders)]
