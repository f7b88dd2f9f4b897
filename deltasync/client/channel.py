"""The watcher's unix socket: one JSON line asks, one JSON line answers, and only the same user may."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
import struct
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from deltasync.core.errors import DeltasyncError, UsageError
from deltasync.core.hashing import digest_of
from deltasync.decoding import decoded
from deltasync.disk import Folder

log = logging.getLogger(__name__)

LINE_BYTES_MAX = 1 << 20
SUN_PATH_BYTES = 107
CONNECT_SECONDS = 5.0
_CREDENTIALS = struct.Struct("3i")

Argument = bool | int | float | str | None
Answerer = Callable[["Request"], dict[str, Any] | None]


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One question: a verb (flush, status, stop) and its arguments."""

    verb: str
    arguments: dict[str, Argument] = {}


def runtime_folder() -> Path:
    """Return the user's runtime folder for sockets, closed to others; raises UsageError when it is not ours."""
    import platformdirs

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns when the session has no XDG_RUNTIME_DIR
            folder = Path(platformdirs.user_runtime_dir("deltasync", appauthor=False, ensure_exists=True))
        if os.name == "posix":
            status = folder.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
                raise PermissionError(f"{folder} belongs to another user")
            if status.st_mode & 0o077:
                folder.chmod(0o700)  # whoever put a socket there before is found out by its credentials
    except OSError as error:
        raise UsageError(
            f"no folder for the watcher's socket: {error}; set XDG_RUNTIME_DIR to a private one"
        ) from error
    return folder


def socket_path(root: Path) -> Path:
    """Return where the watcher of a workspace listens."""
    name = digest_of(os.fsencode(root.resolve())).hex()[:16]
    return runtime_folder() / f"{name}.sock"


@contextlib.contextmanager
def address_of(path: Path) -> Iterator[str]:
    """Give the name by which a socket is bound or reached: a long one goes through a descriptor of its folder.

    Raises UsageError where the system has no such way and the path does not fit into a socket's address.
    """
    if len(os.fsencode(path)) <= SUN_PATH_BYTES:
        yield os.fspath(path)
        return
    if not sys.platform.startswith("linux"):
        raise UsageError(f"{path} is too long for a socket; set XDG_RUNTIME_DIR to a shorter folder")
    with Folder.open(path.parent) as folder:
        yield f"/proc/self/fd/{folder.fd}/{path.name}"


def ask(root: Path, verb: str, *, timeout: float | None = None, **arguments: Argument) -> dict[str, Any] | None:
    """Ask the workspace's watcher and return its answer, or None when none runs or it ended before answering.

    timeout: how long to wait for the answer; None waits as long as it takes. Raises TimeoutError past it.
    """
    path = socket_path(root)
    if sys.platform == "win32" or not path.exists():
        return None
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
        line.settimeout(CONNECT_SECONDS)
        try:
            with address_of(path) as address:
                line.connect(address)
        except (FileNotFoundError, ConnectionError):
            return None  # the next watcher removes what a killed one left; only it holds the workspace's lock
        if not _is_same_user(line):
            raise UsageError(f"{path} belongs to another user")
        line.settimeout(timeout)
        try:
            line.sendall(msgspec.json.encode(Request(verb, arguments)) + b"\n")
            with line.makefile("rb") as answer:
                text = answer.readline()
        except ConnectionError:
            return None
    return decoded(text, dict[str, Any]) if text.endswith(b"\n") else None


def failure(error: DeltasyncError) -> dict[str, Any]:
    """Return an answer that carries an error, from which `core.errors.from_problem` builds it again."""
    return {"ok": False, "error": {"code": error.code, "detail": error.sentence, "facts": dict(error.facts)}}


class Channel:
    """The listening side; every question is answered in a thread of its own."""

    def __init__(self, root: Path, answer: Answerer) -> None:
        """Listen at the workspace's socket, replacing one that a killed watcher left behind."""
        self.path, self._answer = socket_path(root), answer
        self._is_closing = threading.Event()
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with address_of(self.path) as address:
            self._listener.bind(address)
        self.path.chmod(0o600)
        self._inode = self.path.stat().st_ino
        self._listener.listen()
        self._thread = threading.Thread(target=self._listen, name="channel", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening and remove the socket, unless another watcher's stands there already."""
        self._is_closing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._listener.close()
        self._thread.join(1)
        with contextlib.suppress(FileNotFoundError):
            if self.path.stat().st_ino == self._inode:
                self.path.unlink()

    def _listen(self) -> None:
        while not self._is_closing.is_set():
            try:
                line, _ = self._listener.accept()
            except OSError:
                self._is_closing.wait(0.1)  # closing, or no file descriptor left for the moment
                continue
            try:
                threading.Thread(target=self._serve, args=(line,), name="answer", daemon=True).start()
            except RuntimeError:
                line.close()  # no thread left for the moment: the caller sees that nobody answers

    def _serve(self, line: socket.socket) -> None:
        try:
            with line:
                answer = self._reply(line) if _is_same_user(line) else None
                if answer is not None:
                    line.sendall(msgspec.json.encode(answer) + b"\n")
        except OSError:
            log.debug("a caller hung up")
        except Exception:
            log.exception("a question could not be answered")

    def _reply(self, line: socket.socket) -> dict[str, Any] | None:
        line.settimeout(CONNECT_SECONDS)
        try:
            with line.makefile("rb") as asked:
                request = decoded(asked.readline(LINE_BYTES_MAX), Request)
            line.settimeout(None)
            return self._answer(request)
        except msgspec.MsgspecError as error:
            return failure(UsageError(f"the question is malformed: {error}"))
        except DeltasyncError as error:
            return failure(error)


def open_channel(root: Path, answer: Answerer) -> Channel | None:
    """Listen for questions, or return None on a system without unix sockets."""
    return None if sys.platform == "win32" else Channel(root, answer)


def _is_same_user(line: socket.socket) -> bool:
    if not sys.platform.startswith("linux"):
        return True  # the folder and the socket are closed to others
    _, uid, _ = _CREDENTIALS.unpack(line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return bool(uid == os.getuid())
