"""The watcher's socket: private, found by the folder, answered line by line, and harmless when nobody listens."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deltasync.client import channel
from deltasync.client.channel import (
    SUN_PATH_BYTES,
    Channel,
    Request,
    ask,
    failure,
    open_channel,
    socket_path,
)
from deltasync.core.errors import GuardStopped, UsageError, from_problem

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="unix sockets")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="run-") as short:  # peers in these tests connect by the plain path
        Path(short).chmod(0o755)
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(Path(short, "run")))
        (tmp_path / "root").mkdir()
        yield tmp_path / "root"


def echo(request: Request) -> dict[str, Any]:
    if request.verb == "refuse":
        raise GuardStopped("too many deletions", count=7)
    return {"verb": request.verb, **request.arguments}


@pytest.fixture
def listening(root: Path) -> Iterator[Channel]:
    opened = open_channel(root, echo)
    assert opened is not None
    yield opened
    opened.close()


def test_a_question_is_answered(root: Path, listening: Channel) -> None:
    """The verb and its arguments arrive, and the answer comes back."""
    assert ask(root, "flush", scan=True, timeout=5) == {"verb": "flush", "scan": True}


def test_a_link_to_the_folder_finds_the_same_watcher(root: Path, listening: Channel) -> None:
    """The socket belongs to the real folder, whatever name it was given."""
    (root.parent / "link").symlink_to(root)
    assert ask(root.parent / "link", "status") == {"verb": "status"}


def test_an_error_travels_with_its_code_and_facts(root: Path, listening: Channel) -> None:
    """What the watcher raises can be raised again by whoever asked."""
    answer = ask(root, "refuse")
    assert answer is not None and not answer["ok"]
    error = from_problem(**answer["error"])
    assert isinstance(error, GuardStopped)
    assert (error.sentence, error.facts) == ("too many deletions", {"count": 7})
    assert answer == failure(error)


def test_nobody_listening_is_none(root: Path) -> None:
    """Without a watcher there is no answer and no error."""
    assert ask(root, "status") is None


def test_a_socket_that_a_killed_watcher_left_is_none_and_is_replaced(root: Path) -> None:
    """A stale socket file answers nobody and does not keep the next watcher from listening."""
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(os.fspath(socket_path(root)))
    stale.close()
    assert ask(root, "status") is None
    opened = Channel(root, echo)
    assert ask(root, "status") == {"verb": "status"}
    opened.close()
    assert not opened.path.exists()
    assert ask(root, "status") is None


def test_closing_leaves_the_socket_of_the_next_watcher(root: Path, listening: Channel) -> None:
    """A watcher that ends late does not cut off the one that took its place."""
    next_one = Channel(root, echo)
    listening.close()
    assert ask(root, "status") == {"verb": "status"}
    next_one.close()


def test_a_slow_answer_does_not_keep_others_waiting(root: Path) -> None:
    """A flush may take minutes; status is answered meanwhile."""
    release, started = threading.Event(), threading.Event()

    def answer(request: Request) -> dict[str, Any]:
        if request.verb == "flush":
            started.set()
            release.wait(10)
        return {"verb": request.verb}

    opened = Channel(root, answer)
    answers: list[object] = []
    asking = threading.Thread(target=lambda: answers.append(ask(root, "flush")))
    asking.start()
    assert started.wait(10)
    assert ask(root, "status", timeout=5) == {"verb": "status"}
    with pytest.raises(TimeoutError):
        ask(root, "flush", timeout=0.05)
    release.set()
    asking.join(10)
    assert answers == [{"verb": "flush"}]
    opened.close()


def test_the_socket_is_closed_to_others(root: Path, listening: Channel) -> None:
    """Folder and socket have no permission for anybody else, and the path fits a socket's address."""
    assert listening.path.stat().st_mode & 0o777 == 0o600
    assert listening.path.parent.stat().st_mode & 0o777 == 0o700
    assert len(os.fsencode(listening.path)) <= channel.SUN_PATH_BYTES


@pytest.mark.root
@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
def test_another_user_gets_no_answer_even_with_permission(root: Path, listening: Channel) -> None:
    """The credentials of the peer decide, not only the modes of files."""
    listening.path.chmod(0o666)
    for folder in [listening.path.parent, *listening.path.parents][:-1]:
        folder.chmod(folder.stat().st_mode | 0o111)
    code = (
        "import os, socket, sys\n"
        "os.setuid(65534)\n"
        "line = socket.socket(socket.AF_UNIX); line.settimeout(5); line.connect(sys.argv[1])\n"
        "try:\n"
        '    line.sendall(b\'{"verb": "status"}\\n\')\n'
        "    print(repr(line.recv(100)))\n"
        "except ConnectionError: print(repr(b''))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(listening.path)], capture_output=True, check=True)
    assert done.stdout == b"b''\n"


def test_a_runtime_folder_that_others_could_enter_is_closed(root: Path, tmp_path: Path) -> None:
    """A folder of ours with open modes is closed before it is used."""
    folder = socket_path(root).parent
    folder.chmod(0o777)
    assert socket_path(root).parent == folder
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.root
@pytest.mark.skipif(os.getuid() != 0, reason="gives a folder away")
def test_a_runtime_folder_of_another_user_is_refused(root: Path) -> None:
    """A folder that somebody else owns could hold somebody else's socket."""
    os.chown(socket_path(root).parent, 65534, 65534)
    with pytest.raises(UsageError, match="another user"):
        socket_path(root)


def test_a_runtime_folder_may_have_any_length(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The 108 bytes that a socket's address holds are no limit on where the runtime folder lies."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / ("x" * 120)))
    opened = Channel(root, lambda request: {"verb": request.verb})
    assert len(os.fsencode(opened.path)) > SUN_PATH_BYTES
    assert ask(root, "status") == {"verb": "status"}
    opened.close()
    assert not opened.path.exists()


@pytest.mark.parametrize("line", [b"{\n", b"[]\n", b'{"verb": "status", "more": 1}\n', b"", b"x" * 2_000_000 + b"\n"])
def test_a_malformed_question_is_refused(root: Path, listening: Channel, line: bytes) -> None:
    """Whatever is not one JSON question gets an error and harms nothing."""
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(5)
        peer.connect(os.fspath(listening.path))
        try:
            peer.sendall(line)
            peer.shutdown(socket.SHUT_WR)
            answer = peer.makefile("rb").readline()
        except ConnectionError:
            answer = b"malformed"
    assert b"malformed" in answer
    assert ask(root, "status") == {"verb": "status"}


def test_a_watcher_that_ends_in_the_middle_gives_no_answer(root: Path) -> None:
    """A fault or an end while answering is None, so that the caller can do the work itself."""
    opened = Channel(root, lambda request: {"bad": 1 // 0})
    assert ask(root, "flush") is None
    opened.close()
