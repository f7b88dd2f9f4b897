"""The way to a server over ssh: the user's own `ssh` program logs in, starts the server, and forwards its socket."""

from __future__ import annotations

import contextlib
import math
import os
import re
import secrets
import shlex
import socket
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from deltasync.client.address import SshAddress
from deltasync.client.channel import SUN_PATH_BYTES, runtime_folder
from deltasync.core.errors import (
    DeltasyncError,
    HostBusy,
    HostUnreachable,
    HostUntrusted,
    NotADeltasyncServer,
    Unauthorized,
    UsageError,
    from_problem,
)
from deltasync.core.hashing import digest_of
from deltasync.core.names import shown
from deltasync.decoding import decoded

PERSIST_SECONDS = 600
"""How long a connection stays after the last command that used it."""
FRESH_SECONDS = 60.0
"""For how long a server that was found is taken to be there; it stays far longer without a connection (spec H-130)."""
ANSWER_SECONDS = 60.0
"""How long the host may take to start a server, beyond the time to connect."""
LOCAL_SECONDS = 5.0
"""How long the process that holds the connection may take to answer; it is on this machine."""
_SUFFIX_BYTES = 17
"""What ssh adds to the name of its control socket while it makes it."""
_FAILED, _NO_COMMAND = 255, 127
_HOST_KEY = re.compile("Host key verification failed|HOST IDENTIFICATION HAS CHANGED|No .* host key is known")
_DENIED = re.compile("Permission denied|Too many authentication failures|authentication methods|Authentication failed")
_INSTALL = "pipx install '.[server]' in a clone of the repository"
# What the host's shell runs; it finds programs of `pip install --user` that a shell without a login does not look for.
_SCRIPT = 'PATH="$PATH:$HOME/.local/bin"; command -v "$0" >/dev/null || exit 127; exec "$0" attach --json "$@"'


@dataclass(frozen=True, slots=True)
class SshOptions:
    """How a user wants ssh to be used."""

    command: str = "ssh"
    """The program and its own options, as words of a shell."""
    server: str = "deltasync-server"
    """The program on the host."""
    may_ask: bool = False
    """Whether ssh may ask for a passphrase; never where nobody would see it."""
    connect_seconds: float = 30.0


class Attached(msgspec.Struct, frozen=True):
    """What the host says of its server (spec H-130)."""

    socket: str
    version: str


class Tunnel:
    """A server's socket on a host, reached through a socket here (spec H-132 to H-134); several threads may use it.

    Nothing runs until the first connection is wanted. What broke is found when the next one is: a connection of ssh
    that has ended, a socket that it left behind, a server that ended because nobody asked it anything.
    """

    def __init__(self, address: SshAddress, options: SshOptions) -> None:
        """Raises UsageError where a word of the options cannot be one."""
        self._address, self._options = address, options
        self._words = _words(options.command)
        self._folder: Path | None = None
        self._id = digest_of("\0".join((options.command, address.login)).encode()).hex()[:16]
        self._local_name = f"ssh-{os.getpid()}-{secrets.token_hex(4)}"
        self._remote: str | None = None
        self._forwarded: str | None = None
        self._is_sound = False
        self._found_at = -math.inf
        self._lock = threading.Lock()

    def connect(self) -> socket.socket:
        """Return a connection to the server; everything that is missing on the way is made first."""
        with self._lock:
            if self._is_sound:
                if time.monotonic() - self._found_at > FRESH_SECONDS:
                    self._attach()
                with contextlib.suppress(OSError):  # the connection of ssh may have ended meanwhile
                    return self._dialled()
            self._attach()
            self._forward()
            return self._dialled()

    def forget(self) -> None:
        """Take nothing of the way for granted at the next connection: one has just failed."""
        self._is_sound = False

    def close(self) -> None:
        """Take back what this made; the connection of ssh stays for the next command."""
        with self._lock:
            self._take_back()

    @property
    def _control(self) -> Path:
        return self._sockets / f"ssh-{self._id}"

    @property
    def _local(self) -> Path:
        return self._sockets / self._local_name

    @property
    def _sockets(self) -> Path:
        if self._folder is None:
            folder = runtime_folder()
            longest = max(len(self._id) + len("ssh-") + _SUFFIX_BYTES, len(self._local_name))
            if len(os.fsencode(folder)) + 1 + longest > SUN_PATH_BYTES:
                raise UsageError(f"{folder} is too long for the sockets of ssh; set XDG_RUNTIME_DIR to a shorter one")
            self._folder = folder
        return self._folder

    def _dialled(self) -> socket.socket:
        line = socket.socket(socket.AF_UNIX)
        try:
            line.settimeout(LOCAL_SECONDS)
            line.connect(os.fspath(self._local))
        except OSError:
            line.close()
            raise
        return line

    def _attach(self) -> None:
        """Log in, unless a connection is there, and have a server run on the host."""
        if self._control.exists():
            # A connection that does not answer is dropped here; ssh itself replaces one that is dead.
            with contextlib.suppress(HostUnreachable):
                self._ask_master("check")
        options = self._options
        data = () if self._address.data is None else ("--data", _remote_word(self._address.data))
        remote = " ".join(("sh -c", shlex.quote(_SCRIPT), _remote_word(options.server), *data))
        seconds = None if options.may_ask else options.connect_seconds + ANSWER_SECONDS
        done = self._run(*self._master_words(), "--", self._address.host, remote, seconds=seconds)
        self._remote = self._understood(done).socket
        self._found_at = time.monotonic()

    def _master_words(self) -> list[str]:
        """Return the words that make a connection which stays, or use the one that is there."""
        options = {
            "ControlMaster": "auto",
            "ControlPersist": str(PERSIST_SECONDS),
            "ConnectTimeout": str(math.ceil(self._options.connect_seconds)),
            "ServerAliveInterval": "10",
            "ServerAliveCountMax": "3",
            "StreamLocalBindMask": "0177",
            "StreamLocalBindUnlink": "yes",
            # What somebody's configuration does for a shell at the host is not for us (as scp has it).
            "ClearAllForwardings": "yes",
            "RemoteCommand": "none",
            "ForwardAgent": "no",
            "ForwardX11": "no",
            "PermitLocalCommand": "no",
        }
        if not self._options.may_ask:
            options["BatchMode"] = "yes"
        return ["-T", *(word for name, value in options.items() for word in ("-o", f"{name}={value}"))]

    def _understood(self, done: _Done) -> Attached:
        """Return what the host answered; every other outcome is an error of ours."""
        host = shown(self._address.host)
        if done.code == _FAILED:
            raise self._failure(done)
        if done.code == _NO_COMMAND:
            program = shown(self._options.server)
            raise HostUnreachable(f"there is no {program} on {host}; install it there: {_INSTALL}")
        answer = next((line for line in done.out.splitlines() if line.startswith(b"{")), b"")
        try:
            if done.code == 0:
                return decoded(answer, Attached)
            problem = decoded(answer, _Failed).error
        except msgspec.MsgspecError:
            raise NotADeltasyncServer(
                f"{host} does not start a deltasync-server: {done.last_line or 'its answer is none'}"
            ) from None
        sentence = f"on {host}: {shown(problem.detail)}"
        if "no such command" in problem.detail.lower():
            raise NotADeltasyncServer(f"the deltasync-server on {host} is too old for ssh; install a newer one there")
        error = from_problem(problem.code, sentence, {})
        raise HostBusy(sentence) if error.exit_code == HostBusy.exit_code else error

    def _failure(self, done: _Done) -> DeltasyncError:
        """Say what it means that ssh failed."""
        where = self._address.login
        if line := done.line_with(_HOST_KEY):
            return HostUntrusted(f"ssh does not trust {where}: {line}; compare its key, then log in once by hand")
        if line := done.line_with(_DENIED):
            return Unauthorized(f"ssh may not log in at {where}: {line}")
        return HostUnreachable(f"ssh does not reach {where}: {done.last_line or 'it does not say why'}")

    def _forward(self) -> None:
        """Have the connection of ssh listen here for the server there."""
        assert self._remote is not None
        self._sweep()
        self._take_back()
        self._forwarded = f"{_escaped(os.fspath(self._local))}:{_escaped(self._remote)}"
        self._ask_master("forward", "-L", self._forwarded)
        self._is_sound = True

    def _take_back(self) -> None:
        if self._forwarded is None:
            return
        if self._control.exists():
            with contextlib.suppress(DeltasyncError):
                self._ask_master("cancel", "-L", self._forwarded)
        self._local.unlink(missing_ok=True)
        self._forwarded = None

    def _sweep(self) -> None:
        """Remove the sockets of commands that were killed."""
        for path in self._sockets.glob("ssh-*-*"):
            with contextlib.suppress(ValueError, PermissionError):
                try:
                    os.kill(int(path.name.split("-")[1]), 0)
                except ProcessLookupError:
                    path.unlink(missing_ok=True)

    def _ask_master(self, verb: str, *words: str) -> None:
        """Have the process that holds the connection do something; raises HostUnreachable where it does not."""
        done = self._run(*self._to_master(verb), *words, "--", self._address.host, seconds=LOCAL_SECONDS)
        if done.code:
            raise HostUnreachable(f"ssh does not {verb} to {self._address.login}: {done.last_line}")

    def _run(self, *words: str, seconds: float | None) -> _Done:
        """Run ssh to its end; None seconds is as long as somebody takes to answer its questions."""
        with tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as out:  # a pipe would stay open in the master
            try:
                process = subprocess.run(
                    [*self._program(), *words],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    timeout=seconds,
                    check=False,
                )
            except FileNotFoundError:
                raise UsageError(
                    f"there is no program {shown(self._words[0])}; install the OpenSSH client, or name it with --ssh"
                ) from None
            except OSError as error:
                raise UsageError(f"{shown(self._words[0])} cannot be run: {error.strerror}") from error
            except subprocess.TimeoutExpired:
                self._drop_master()
                raise HostUnreachable(f"ssh gets no answer from {self._address.login} in {seconds:.0f} s") from None
            return _Done(process.returncode, _content(out), _content(err).decode(errors="replace"))

    def _program(self) -> list[str]:
        """Return the program with what names the connection."""
        user, port = self._address.user, self._address.port
        who = [*(["-l", user] if user else []), *(["-p", str(port)] if port else [])]
        return [*self._words, "-S", os.fspath(self._control).replace("%", "%%"), *who]

    @staticmethod
    def _to_master(verb: str) -> tuple[str, ...]:
        # The configuration has been read by the connection; what it forwards for shells would be forwarded with ours.
        return "-F", "none", "-O", verb

    def _drop_master(self) -> None:
        """Make way for a new connection: the one that is there does not answer; commands that use it may go on."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            words = [*self._program(), *self._to_master("stop"), "--", self._address.host]
            subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=LOCAL_SECONDS, check=False)
        self._control.unlink(missing_ok=True)


class _Failed(msgspec.Struct, frozen=True):
    error: _Problem


class _Problem(msgspec.Struct, frozen=True):
    code: str
    detail: str


@dataclass(frozen=True, slots=True)
class _Done:
    """What ssh printed, and its exit code."""

    code: int
    out: bytes
    err: str

    @property
    def last_line(self) -> str:
        """The last thing that it said; what is before are warnings and the host's greetings."""
        return self.line_with(re.compile(r"\S"))

    def line_with(self, pattern: re.Pattern[str]) -> str:
        """Return the last line that matches, '' for none: behind a jump host's refusal stands that nothing came."""
        found = (line.strip() for line in reversed(self.err.splitlines()) if pattern.search(line))
        return shown(next(found, ""))[:300].rstrip(".")


def _content(file: BinaryIO) -> bytes:
    file.seek(0)
    return file.read(1 << 20)


def _words(command: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError(f"--ssh {shown(command)!r} cannot be split into words: {error}") from error
    if not words or "\0" in command:
        raise UsageError("--ssh names no program")
    return words


def _remote_word(text: str) -> str:
    """Quote a word for the host's shell; a home folder in front is for it to fill in."""
    if "\0" in text or "\n" in text:
        raise UsageError(f"{shown(text)!r} can be no path on the host")
    home = "~/" if text.startswith("~/") else ""
    return home + shlex.quote(text.removeprefix(home))


def _escaped(path: str) -> str:
    """Return a path as a part of what -L takes."""
    return re.sub(r"([\\:])", r"\\\1", path).replace("%", "%%")
