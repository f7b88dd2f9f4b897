"""The error tree: each leaf fixes one exit code and one HTTP status.

DeltasyncError
├── UsageError            2 · 400   the command, request or configuration is wrong
├── NotFound              1 · 404   no such workspace, blob, sequence or object
├── SequenceGone          1 · 410   a sequence whose tree is not kept
├── HostUnreachable       4 · 502   no answer from the server
├── HostBusy              4 · 503   the server, a lock or a folder is busy
├── Unauthorized          7 · 401   no token, or one that is good for nothing
├── Forbidden             7 · 403   a token that is not good for this
├── NotADeltasyncServer   1 · 502   something else answers at that address
├── HostUntrusted         7 · 502   the server cannot prove that it is the one that is meant
├── SequenceConflict      5 · 409   gap, fork, stale epoch, not owner, root mismatch
│   ├── SequenceGap · SequenceFork · StaleEpoch · NotOwner · RootMismatch
├── ContentMissing        5 · 409   a thin bundle names content that the cache lacks
├── UploadIncomplete      4 · 409   pieces of an upload are missing
├── GuardStopped          6 · 409   mass deletion, an emptied root
├── NoSpace               6 · 507   disk full or below the reserve
├── LimitExceeded         6 · 413   a bundle or request beyond an advertised limit
├── Refused               8 · 422   a bundle that breaks a numbered rule of the spec
├── Corrupt               8 · 500   our own store does not hold what it says
├── AlreadyRunning        4 · 503   another writer holds the lock
├── WorkspaceCopied       2 · 409   the folder is a copy of another workspace
├── RootUnavailable       1 · 500   the workspace folder is missing, empty or unreadable
├── Cancelled           130 · 499
└── RunTrouble                    what `run` itself fails with; any other code is the command's own (spec J-64)
    ├── PlanRefused     121       the plan is refused, or `run` was given wrongly
    ├── HostRefused     122       the host is unreachable, or refuses the job
    ├── InputsNotSent   123
    ├── OutputsNotHome  124
    └── JobLost         125       the job was cancelled, or its host lost it
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

Fact = str | int | bool | None | list[str]


class DeltasyncError(Exception):
    """The base: a sentence that says what happened and what to do next, and the facts as attributes."""

    code: ClassVar[str] = "ERROR"
    exit_code: ClassVar[int] = 1
    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(self, sentence: str, **facts: Fact) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.facts: Mapping[str, Fact] = facts


class UsageError(DeltasyncError):
    """The command, the request or the configuration is wrong."""

    code, exit_code, status = "USAGE", 2, 400


class NotFound(DeltasyncError):
    """The named workspace, blob, object or sequence does not exist."""

    code, exit_code, status = "NOT_FOUND", 1, 404


_PINS_NAMED = 10


class SequenceGone(DeltasyncError):
    """The server does not keep the tree of that sequence; `first` and `last` say which it keeps, None for none.

    pinned: those that are kept beside this range; they stand in the sentence alone, and only the last few.
    """

    code, exit_code, status = "SEQUENCE_GONE", 1, 410

    def __init__(self, sequence: int, first: int | None, last: int | None, pinned: Sequence[int] = ()) -> None:
        span = f"only {first} is" if first == last else f"only {first} to {last} are"
        if pinned:
            more = f" and {len(pinned) - _PINS_NAMED} more" * (len(pinned) > _PINS_NAMED)
            span = f"{span}, and the pinned {', '.join(map(str, pinned[-_PINS_NAMED:]))}{more}"
        super().__init__(
            f"the tree of sequence {sequence} is not kept, {'none is' if first is None else span}",
            sequence=sequence,
            first=first,
            last=last,
        )


class HostUnreachable(DeltasyncError):
    """No answer came from the server."""

    code, exit_code, status, retryable = "HOST_UNREACHABLE", 4, 502, True


class HostBusy(DeltasyncError):
    """The server cannot take the request now."""

    code, exit_code, status, retryable = "HOST_BUSY", 4, 503, True


class Unauthorized(DeltasyncError):
    """No token was shown, or one that the server does not take (any more)."""

    code, exit_code, status = "UNAUTHORIZED", 7, 401


class Forbidden(DeltasyncError):
    """The token that was shown is not good for this."""

    code, exit_code, status = "FORBIDDEN", 7, 403


class NotADeltasyncServer(DeltasyncError):
    """Something that is not a deltasync server answers at the address."""

    code, exit_code, status = "NOT_A_DELTASYNC_SERVER", 1, 502


class HostUntrusted(DeltasyncError):
    """What answers at the address cannot prove that it is the server that is meant; nothing was sent to it."""

    code, exit_code, status = "HOST_UNTRUSTED", 7, 502


class AlreadyRunning(DeltasyncError):
    """Another writer holds the workspace's or the store's lock."""

    code, exit_code, status, retryable = "ALREADY_RUNNING", 4, 503, True


class SequenceConflict(DeltasyncError):
    """The bundle does not follow the server's head; the facts carry that head."""

    code, exit_code, status = "SEQUENCE_CONFLICT", 5, 409


class SequenceGap(SequenceConflict):
    """The server has not applied the bundle before this one."""

    code, retryable = "SEQUENCE_GAP", True

    def __init__(self, expected_sequence: int, got_sequence: int) -> None:
        super().__init__(
            f"the server expects bundle {expected_sequence}, got {got_sequence}; send what is missing first",
            expected_sequence=expected_sequence,
            got_sequence=got_sequence,
        )


class SequenceFork(SequenceConflict):
    """The bundle continues another history than the server's."""

    code = "SEQUENCE_FORK"


class StaleEpoch(SequenceConflict):
    """The bundle belongs to a client history that was replaced."""

    code = "STALE_EPOCH"


class NotOwner(SequenceConflict):
    """The workspace belongs to another client."""

    code = "NOT_OWNER"


class RootMismatch(DeltasyncError):
    """Both sides applied the same delta and hold different trees."""

    code, exit_code, status = "ROOT_MISMATCH", 8, 422


class ContentMissing(DeltasyncError):
    """A thin bundle names content that the receiver's cache lacks; `missing` lists the digests."""

    code, exit_code, status, retryable = "CONTENT_MISSING", 5, 409, True

    def __init__(self, missing: list[str]) -> None:
        super().__init__(
            f"the receiver lacks the content of {len(missing)} digest(s); send the bundle again with them",
            missing=missing,
        )
        self.missing = missing


class UploadIncomplete(DeltasyncError):
    """Pieces of an upload are missing: they were never sent, or not durable when the server ended."""

    code, exit_code, status, retryable = "UPLOAD_INCOMPLETE", 4, 409, True


class GuardStopped(DeltasyncError):
    """A guard keeps the change back until the user allows it."""

    code, exit_code, status = "GUARD_STOPPED", 6, 409


class NoSpace(DeltasyncError):
    """A disk is full; nothing was changed."""

    code, exit_code, status, retryable = "NO_SPACE", 6, 507, True


class LimitExceeded(DeltasyncError):
    """A bundle or request goes beyond an advertised limit."""

    code, exit_code, status = "LIMIT_EXCEEDED", 6, 413

    def __init__(self, rule: str, sentence: str, **facts: Fact) -> None:
        super().__init__(f"{rule}: {sentence}", rule=rule, **facts)
        self.rule = rule


class Refused(DeltasyncError):
    """A bundle breaks a numbered rule of the specification; `rule` names it."""

    code, exit_code, status = "BUNDLE_REFUSED", 8, 422

    def __init__(self, rule: str, sentence: str, **facts: Fact) -> None:
        super().__init__(f"{rule}: {sentence}", rule=rule, **facts)
        self.rule = rule


class Corrupt(DeltasyncError):
    """Our own store does not hold what it says."""

    code, exit_code, status = "CORRUPT", 8, 500


class WorkspaceCopied(DeltasyncError):
    """The folder is a copy of a workspace whose original still exists."""

    code, exit_code, status = "WORKSPACE_COPIED", 2, 409


class RootUnavailable(DeltasyncError):
    """The workspace folder is missing, empty where it was not, or unreadable."""

    code, exit_code, status = "ROOT_UNAVAILABLE", 1, 500


class Cancelled(DeltasyncError):
    """The user stopped the command."""

    code, exit_code, status = "CANCELLED", 130, 499


class RunTrouble(DeltasyncError):
    """A failure of `run` itself, with an exit code that tells it from the command's."""

    @classmethod
    def of(cls, error: DeltasyncError) -> RunTrouble:
        """Return an error as trouble of this kind; what is such trouble already stays as it is."""
        return error if isinstance(error, RunTrouble) else cls(error.sentence, **{**error.facts, "cause": error.code})


class PlanRefused(RunTrouble):
    """Which words of the command are files is not clear, or `run` was given wrongly."""

    code, exit_code, status = "PLAN_REFUSED", 121, 400


class HostRefused(RunTrouble):
    """The host cannot be reached, or does not take the job."""

    code, exit_code, status = "HOST_REFUSED", 122, 502


class InputsNotSent(RunTrouble):
    """The host does not have the inputs as they are here."""

    code, exit_code = "INPUTS_NOT_SENT", 123


class OutputsNotHome(RunTrouble):
    """What the command wrote is not where it should be."""

    code, exit_code = "OUTPUTS_NOT_HOME", 124


class JobLost(RunTrouble):
    """The job was cancelled, could not be run, or was lost by its host."""

    code, exit_code = "JOB_LOST", 125


def of_run(error: DeltasyncError) -> DeltasyncError:
    """Return what `run` ends with for an error: one whose exit code no command has by itself."""
    if isinstance(error, RunTrouble | Cancelled):
        return error
    return (PlanRefused if isinstance(error, UsageError) else HostRefused).of(error)


def _leaves(cls: type[DeltasyncError]) -> list[type[DeltasyncError]]:
    return [cls, *(leaf for sub in cls.__subclasses__() for leaf in _leaves(sub))]


def from_problem(code: str, detail: str, facts: Mapping[str, Fact]) -> DeltasyncError:
    """Rebuild the error that a server answered as problem+json; an unknown code becomes the base class."""
    cls = next((leaf for leaf in _leaves(DeltasyncError) if leaf.code == code), DeltasyncError)
    error = cls.__new__(cls)
    DeltasyncError.__init__(error, detail, **facts)
    missing, rule = facts.get("missing"), facts.get("rule")
    if isinstance(error, ContentMissing):
        error.missing = missing if isinstance(missing, list) else []
    if isinstance(error, (LimitExceeded, Refused)):
        error.rule = rule if isinstance(rule, str) else ""
    return error
