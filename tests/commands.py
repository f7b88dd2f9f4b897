"""Requests for jobs, for tests: what to run, and what comes of it."""

from __future__ import annotations

import base64
import itertools
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from serving import Answer, Served, until

from deltasync.core.jobs import Input, JobRequest, Output, Piece, State, Word

API = "/api/v1"
CLIENT = "a" * 32
_keys = itertools.count(1)


def words(*texts: str | Piece) -> list[Word]:
    """Return a command of whole words."""
    return [[Piece(text=each) if isinstance(each, str) else each] for each in texts]


def wanted(*texts: str | Piece, **fields: Any) -> JobRequest:
    """Return a request to run something; each has a key of its own unless one is given."""
    return JobRequest(**{"key": f"{next(_keys):032x}", "client_id": CLIENT, "argv": words(*texts), **fields})


def shell(script: str, **fields: Any) -> JobRequest:
    """Return a request to run a script."""
    return wanted("sh", "-c", script, **fields)


def given(place: str, path: str = "", **fields: Any) -> Input:
    """Return an input of the first sequence of the workspace w."""
    return Input(**{"workspace": "w", "sequence": 1, "path": path, "place": place, **fields})


def output(place: str, **fields: Any) -> Output:
    """Return an output."""
    return Output(place=place, **fields)


@dataclass(frozen=True)
class Event:
    """One server-sent event."""

    id: int
    name: str
    text: str

    @property
    def content(self) -> bytes:
        """The bytes of a stream."""
        return base64.b64decode(self.text)

    @property
    def job(self) -> Any:
        """The job of a state."""
        return json.loads(self.text)


def submit(served: Served, asked: object, headers: Mapping[str, str] | None = None) -> Answer:
    """Ask for a job. asked: a request, or JSON that is none."""
    body = asked if isinstance(asked, bytes) else _encoded(asked)
    return served.request("POST", f"{API}/jobs", body, {"Content-Type": "application/json", **(headers or {})})


def _encoded(asked: object) -> bytes:
    return msgspec.json.encode(asked)


def run(served: Served, asked: JobRequest) -> Any:
    """Run a job to its end, and return it."""
    return followed(served, begun(served, asked))[-1].job


def begun(served: Served, asked: JobRequest, state: State | None = None) -> str:
    """Ask for a job, which must be taken, and wait for a state of it, if one is named; returns its id."""
    answer = submit(served, asked)
    assert answer.status == 201, answer
    job_id = str(answer.json["id"])
    if state is not None:
        until(lambda: seen(served, job_id)["state"] == state)
    return job_id


def seen(served: Served, job_id: str) -> Any:
    """Return a job as it is now."""
    answer = served.get(f"{API}/jobs/{job_id}")
    assert answer.status == 200, answer
    return answer.json


def followed(served: Served, job_id: str, after: int | None = None) -> list[Event]:
    """Return the events of a job until it is over. after: the id of the last one that came."""
    headers = {} if after is None else {"Last-Event-ID": str(after)}
    answer = served.get(f"{API}/jobs/{job_id}/logs", headers)
    assert (answer.status, answer.headers["content-type"]) == (200, "text/event-stream; charset=utf-8"), answer
    return events_of(answer.body)


def events_of(body: bytes) -> list[Event]:
    """Parse server-sent events; comments are none."""
    found = []
    for block in body.decode().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":") and line)
        if fields:
            found.append(Event(int(fields["id"]), fields["event"], fields["data"]))
    return found


def streams(events: list[Event]) -> dict[str, bytes]:
    """Return what came on each stream."""
    return {
        name: b"".join(each.content for each in events if each.name == name)
        for name in ("stdout", "stderr")
        if any(each.name == name for each in events)
    }


def is_there(pid: int) -> bool:
    """Tell whether a process lives; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except FileNotFoundError:
        return False


def let_pass(folder: Path) -> None:
    """Let other users pass through a folder, and through those that hold it, as far as tests made them."""
    top = Path(tempfile.gettempdir()).resolve()
    for each in (folder, *folder.parents):
        if not each.is_relative_to(top) or each == top:
            return
        each.chmod(0o711)
