"""Jobs: the states that one goes through, and the JSON values of its routes (spec J-30 to J-63)."""

from __future__ import annotations

import base64
import binascii
import enum
import re
from typing import Annotated

import msgspec

from deltasync.core.errors import UsageError
from deltasync.core.job_metrics import Metrics
from deltasync.core.names import NameRefused, RelPath, parse_path

LEFT_MAX = 1000
"""Outputs in one page."""
WORDS_MAX = 20_000
"""How many words a command may have."""
JOB_ID = re.compile(r"ds_[0-9]{1,12}_[0-9a-f]{8}")
_KEY = msgspec.Meta(pattern="^[0-9a-f]{32}$")
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class State(enum.StrEnum):
    """Where a job stands."""

    QUEUED = "queued"
    STAGING = "staging"
    RUNNING = "running"
    COLLECTING = "collecting"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    LOST = "lost"

    @property
    def is_over(self) -> bool:
        """Whether nothing more comes of the job."""
        return not NEXT[self]


NEXT: dict[State, frozenset[State]] = {
    State.QUEUED: frozenset({State.STAGING, State.FAILED, State.CANCELLED, State.LOST}),
    State.STAGING: frozenset({State.RUNNING, State.FAILED, State.CANCELLED, State.LOST}),
    State.RUNNING: frozenset({State.COLLECTING, State.FAILED, State.CANCELLED, State.LOST}),
    State.COLLECTING: frozenset({State.DONE, State.FAILED, State.CANCELLED, State.LOST}),
    State.DONE: frozenset(),
    State.FAILED: frozenset(),
    State.CANCELLED: frozenset(),
    State.LOST: frozenset(),
}
"""Which states may follow one (spec J-40)."""


class Piece(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A part of a word: text, bytes that are no UTF-8 as base64, or a place below inputs/ or outputs/; one of them."""

    text: str | None = None
    raw: str | None = None
    input: str | None = None
    output: str | None = None

    def filled(self, inputs: bytes, outputs: bytes) -> bytes:
        """Return what takes its place, with the folders of this session; raises UsageError."""
        given = [each for each in (self.text, self.raw, self.input, self.output) if each is not None]
        if len(given) != 1:
            raise UsageError("a piece of a word has one of text, raw, input and output")
        if self.text is not None:
            return _without_nul(self.text.encode())
        if self.raw is not None:
            try:
                return _without_nul(base64.b64decode(self.raw, validate=True))
            except binascii.Error as error:
                raise UsageError("raw bytes of a word are base64") from error
        top, place = (inputs, self.input) if self.input is not None else (outputs, self.output or "")
        return top + b"/" + require_place(place).encode() if place else top


Word = list[Piece]


class Input(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A file or folder of a kept sequence of one of the caller's workspaces, and its place below inputs/."""

    workspace: str
    sequence: _Count
    path: str = ""
    """In the workspace's tree; '' is all of it."""
    place: str
    in_place: bool = False
    """The command may write it; what it changed comes home."""


class List(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file that is made on the host, of lines with their ends: paths in it lie where they are there."""

    place: str
    lines: list[Word]


class Output(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A place below outputs/ that comes home: a file, a folder with all in it, or the names that match a pattern."""

    place: str
    is_folder: bool = False
    """The command finds an empty folder there."""
    is_pattern: bool = False
    """The last component is a series (`%04d`) or a glob."""


class Variable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One variable of the command's environment."""

    name: str
    value: Word


class JobRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """POST /api/v1/jobs."""

    key: Annotated[str, _KEY]
    """Random; the same key again is the same job, so that a request can be repeated."""
    client_id: Annotated[str, _KEY]
    argv: list[Word]
    environment: list[Variable] = []
    inputs: list[Input] = []
    lists: list[List] = []
    outputs: list[Output] = []
    timeout_seconds: Annotated[float, msgspec.Meta(gt=0, le=10**8)] | None = None
    """None: what the host allows."""
    gpus: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 0
    priority: Annotated[int, msgspec.Meta(ge=-1000, le=1000)] = 0
    """Higher goes first among a tenant's own; among equals the older."""
    keep_seconds: Annotated[float, msgspec.Meta(ge=0, le=10**8)] = 0.0
    """How long the session's folder stays after the end."""
    reuse: bool = False
    """The result of an equal job that ended with 0 may be given again, and this one's may be (spec J-78)."""
    tool_version: list[Word] = []
    """A command that runs first: what it says is part of what makes jobs equal."""
    sandbox: bool = False
    """Shut the command in (spec J-85)."""
    network: bool = False
    """A command that is shut in reaches the network."""


class Trouble(msgspec.Struct, frozen=True, kw_only=True):
    """A place from which something does not come home, and why; the place is empty where the reason says all."""

    place: str
    reason: str


class Returned(msgspec.Struct, frozen=True, kw_only=True):
    """The return bundle: outputs, as a sequence of a workspace of their own, pinned until they are acknowledged."""

    workspace: str
    sequence: _Count
    root: str
    files: _Count
    bytes: _Count
    places: list[str]
    """The outputs that are there, by their places; a pattern's as the command named them."""
    problems: list[Trouble] = []


class LeftOutput(msgspec.Struct, frozen=True, kw_only=True):
    """One file or folder that a job left."""

    path: str
    """Its place below outputs/, or below inputs/ of an input in place."""
    kind: str | None = None
    """`file` or `directory`; None where the host does not have it any more."""
    size: _Count = 0
    digest: str = ""
    """Of a file's bytes."""


class LeftOutputs(msgspec.Struct, frozen=True, kw_only=True):
    """GET /api/v1/jobs/{id}/outputs: a page of what a job left (spec J-68)."""

    outputs: list[LeftOutput]
    waits: bool
    """The host keeps them until somebody acknowledges them."""
    next: str | None = None
    """What `after` is for the page behind this one; None where this is the last."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """GET /api/v1/jobs/{id}."""

    id: str
    state: State
    reason: str = ""
    """Why it failed, was cancelled or lost; one sentence."""
    client_id: str
    command: list[str]
    """Its words as they run on the host, for people."""
    session_path: str
    """The session's folder on the host."""
    created_at: str
    started_at: str | None = None
    ended_at: str | None = None
    exit_code: int | None = None
    signal: int | None = None
    ahead: _Count | None = None
    """Jobs of the same tenant that go first; None unless it is queued."""
    gpus: list[int] = []
    input_files: _Count = 0
    input_bytes: _Count = 0
    log_bytes: _Count = 0
    """The last id that its logs have now."""
    returned: Returned | None = None
    acknowledged: bool = False
    kept_until: str | None = None
    """Of a job that is over: until when its session's folder stays, if it does."""
    reused: str = ""
    """The job whose result this is; nothing was run."""
    metrics: Metrics | None = None
    """Of a job that is over, unless nobody worked on it to its end (spec J-80)."""


class JobList(msgspec.Struct, frozen=True, kw_only=True):
    """GET /api/v1/jobs, the newest first."""

    jobs: list[Job]


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU of a host; both figures are 0 where it does not tell."""

    name: str
    memory_bytes: _Count = 0
    memory_free_bytes: _Count = 0


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """GET /api/v1/capabilities: what a job may ask for, and what it meets."""

    runs: bool
    """Whether this caller may run commands; `why` says why not."""
    why: str = ""
    slots: _Count
    slots_free: _Count
    queued: _Count = 0
    """Jobs that wait for a slot or for GPUs."""
    gpus: list[Gpu] = []
    """In the order in which CUDA_VISIBLE_DEVICES counts them."""
    gpus_free: _Count = 0
    cores: _Count
    load: float = 0.0
    """How many programs have run or waited for a core at once, over the last minute."""
    memory_bytes: _Count
    memory_free_bytes: _Count
    disk_free_bytes: _Count
    links: str
    """How inputs reach a session: reflink, hardlink or copy."""
    sandbox: bool = False
    """Whether a command can be shut in; `sandbox_why` says why not."""
    sandbox_why: str = ""
    sandbox_always: bool = False
    """Every command is shut in."""
    sessions: _Count = 0
    """Sessions that are there now."""
    sessions_stale: _Count = 0
    """Those among them that no job needs: they could not be removed."""
    sessions_kept: _Count = 0
    """Those of jobs that are over, which were to be kept a while."""
    file_bytes_max: _Count
    session_bytes_max: _Count
    sessions_max: _Count
    seconds_max: float


def inputs_of(client_id: str) -> str:
    """Return the name of the workspace that a client's inputs go through (spec J-22)."""
    return f"inputs-{client_id[:8]}"


def require_place(text: str) -> RelPath:
    """Return a place below inputs/ or outputs/; raises UsageError for what is no relative path of plain components."""
    try:
        return parse_path(text)
    except NameRefused as error:
        raise UsageError(f"not a place in a session: {error}") from error


def _without_nul(text: bytes) -> bytes:
    if b"\0" in text:
        raise UsageError("a word of a command holds no NUL")
    return text
