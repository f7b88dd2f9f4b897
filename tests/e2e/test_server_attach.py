"""`deltasync-server attach`: one server for a data folder, started on demand and ended by itself (spec H-59, H-130)."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from serving import BINARY, SECONDS, serving, until


def servers(data: Path) -> list[psutil.Process]:
    """Return the servers that run on a data folder."""
    found = psutil.process_iter(["cmdline"])
    return [each for each in found if {"serve", str(data)} <= set(each.info["cmdline"] or ())]


def start(home: Path, *words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "HOME": str(home), "XDG_DATA_HOME": ""}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([BINARY, "attach", *words], text=True, env=environment, **pipes)


def attach(home: Path, *words: str) -> tuple[int, Any, str]:
    """Attach and return the exit code, the JSON line and what stands on stderr."""
    with start(home, *words) as process:
        out, err = process.communicate(timeout=SECONDS)
    return process.returncode, json.loads(out) if out else None, err


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A user's home on the host, of a short name; the servers of its usual data folder are stopped at the end."""
    home = tmp_path_factory.mktemp("s")
    yield home
    for each in servers(usual_data(home)):
        each.terminate()
        each.wait(SECONDS)


def usual_data(home: Path) -> Path:
    return home / ".local" / "share" / "deltasync"


def test_a_server_is_started_for_the_user_and_only_the_user_reaches_it(home: Path) -> None:
    """The line names a socket that takes requests, of mode 0600 in a folder of mode 0700; data lie below the home."""
    code, found, err = attach(home)
    assert (code, err) == (0, "")
    assert found == {"socket": f"{usual_data(home)}/run/http.sock", "data": str(usual_data(home)), "version": "0.1.0"}
    path = Path(found["socket"])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    with socket.socket(socket.AF_UNIX) as line:
        line.settimeout(SECONDS)
        line.connect(str(path))
        line.sendall(b"GET /health HTTP/1.1\r\nHost: [::1]\r\n\r\n")
        assert line.recv(1024).startswith(b"HTTP/1.1 200")


def test_two_at_once_start_one_server(home: Path) -> None:
    """Whoever comes while a server is being started waits for it and gets the same line."""
    both = [start(home), start(home)]
    lines = [process.communicate(timeout=SECONDS)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert lines[0] == lines[1]
    assert len(servers(usual_data(home))) == 1


def test_an_idle_server_ends_by_itself_and_the_next_call_starts_another(home: Path) -> None:
    """Without a connection for --idle-exit seconds the server ends; a socket file that it left is no obstacle."""
    assert attach(home, "--idle-exit", "1")[0] == 0
    first = servers(usual_data(home))
    until(lambda: not servers(usual_data(home)))
    assert attach(home)[0] == 0
    (second,) = servers(usual_data(home))
    assert [second.pid] != [each.pid for each in first]


def test_a_connection_keeps_a_server_from_being_idle(home: Path) -> None:
    """As long as somebody is connected the server stays, and ends after the last one left."""
    path = attach(home, "--idle-exit", "1")[1]["socket"]
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(path)
        line.settimeout(3)
        with pytest.raises(TimeoutError):
            line.recv(1)
        assert servers(usual_data(home))
    until(lambda: not servers(usual_data(home)))


def test_a_server_that_was_started_by_other_means_is_said(tmp_path: Path) -> None:
    """A store that another server has is one sentence and exit 4."""
    with serving(tmp_path / "data"):
        code, found, err = attach(tmp_path, "--data", str(tmp_path / "data"), "--json")
    assert code == 4
    assert found["error"]["code"] == "ALREADY_RUNNING"
    assert err.count("\n") == 1
    assert "started by other means" in err


def test_a_folder_that_holds_other_things_stays_as_it_is(tmp_path: Path) -> None:
    """A mistyped --data is refused before anything is made in it."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").touch()
    code, _, err = attach(tmp_path, "--data", str(tmp_path / "mine"))
    assert code == 2
    assert "holds other things" in err
    assert [each.name for each in (tmp_path / "mine").iterdir()] == ["letter"]


def test_a_path_too_long_for_a_socket_is_said(tmp_path: Path) -> None:
    """A socket's address has 107 bytes; a longer path is one sentence, and nothing is made there."""
    data = tmp_path / ("x" * 100)
    code, _, err = attach(tmp_path, "--data", str(data))
    assert code == 2
    assert "too long" in err
    assert not data.exists()
