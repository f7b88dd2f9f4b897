"""The audit log: every change and every refusal leaves a line; no secret and no line of a name's own making does."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from serving import BINARY, Writer, serving

from deltasync_server import audit
from deltasync_server.audit import Audit

API = "/api/v1"


def lines(data: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (data / "audit.jsonl").read_text().splitlines()]


def command(data: Path, *words: str) -> dict[str, Any]:
    done = subprocess.run([BINARY, *words, "--data", data, "--json"], capture_output=True, check=True, timeout=60)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_changes_and_refusals_are_written_down(tmp_path: Path) -> None:
    """Who, what, when, from where, and how it ended; looking leaves nothing, and what was said there is not there."""
    with serving(tmp_path / "data", "--require-token") as served:
        made = command(served.data, "token", "create", "--tenant", "ada")
        code = command(served.data, "pair")["code"]
        ada = served.showing(made["token"])
        assert ada.send("media", Writer("media").file("secretname", b"secretcontent")).status == 200
        assert ada.get(f"{API}/workspaces/media").status == 200
        assert served.get(f"{API}/workspaces/media").status == 401
        assert served.showing(made["token"][:-1]).send("media", Writer("media").file()).status == 401
        assert ada.get("/metrics").status == 403
        assert ada.request("POST", f"{API}/workspaces/a%C2%85%E2%80%A8b/missing", b"{}").status in (400, 404)
        command(served.data, "token", "revoke", made["id"])
    found = lines(served.data)
    who = {"source": "127.0.0.1", "token": made["id"], "tenant": "ada"}
    path = f"{API}/workspaces/media"
    wanted = [
        {"what": "token create", "token": made["id"], "tenant": "ada"},
        {"what": "pair", "pairing": int(code.partition("-")[0]), "tenant": "default"},
        {**who, "what": "request", "method": "POST", "path": f"{path}/bundles", "status": 200},
        {"what": "request", "token": None, "method": "GET", "path": path, "status": 401, "source": "127.0.0.1"},
        {"what": "request", "token": None, "method": "POST", "path": f"{path}/bundles", "status": 401},
        {**who, "what": "request", "method": "GET", "path": "/metrics", "status": 403},
        {**who, "what": "request", "method": "POST"},
        {"what": "token revoke", "token": made["id"], "user": os.getuid()},
    ]
    assert len(found) == len(wanted)
    for line, each in zip(found, wanted, strict=True):
        assert line["at"] and {key: line[key] for key in each} == each
    written = (served.data / "audit.jsonl").read_bytes()
    assert written.isascii()
    for secret in (made["token"][-64:], code.partition("-")[2], "secretname", "secretcontent"):
        assert secret.encode() not in written
    assert (served.data / "audit.jsonl").stat().st_mode & 0o777 == 0o600


def test_it_rotates_and_stays_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many files of so many bytes, each whole lines, each for its owner only."""
    monkeypatch.setattr(audit, "FILE_BYTES_MAX", 1000)
    with Audit(tmp_path) as log:
        for number in range(500):
            log.note("request", number=number)
    files = sorted(tmp_path.iterdir())
    assert len(files) == audit.FILES_KEPT + 1
    assert all(path.stat().st_size <= 1000 and path.stat().st_mode & 0o777 == 0o600 for path in files)
    numbers = [json.loads(line)["number"] for path in files for line in path.read_text().splitlines()]
    assert sorted(numbers) == list(range(500 - len(numbers), 500))


def test_what_cannot_be_written_is_told_and_stops_nothing(tmp_path: Path) -> None:
    """A full disk costs the line, not the request."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/audit.jsonl").symlink_to("/dev/full")
    with serving(tmp_path / "data") as served:
        assert served.send("w", Writer("w").file()).status == 200
    assert "the audit log cannot be written" in served.log.read_text()
