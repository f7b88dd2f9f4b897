"""The sequence protocol: what to do with a bundle, given what was applied before it (spec/2-sequence.md)."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

from deltasync.core.manifest import EMPTY_ROOT


class Verdict(enum.Enum):
    """What the receiver does with a bundle."""

    APPLY = "apply"
    DUPLICATE = "duplicate"
    GAP = "gap"
    FORK = "fork"
    STALE_EPOCH = "stale_epoch"
    NOT_OWNER = "not_owner"


@dataclass(frozen=True, slots=True)
class Head:
    """The last applied (epoch, sequence, root) of a workspace; sequence 0 and no owner before the first bundle."""

    client_id: str = ""
    epoch: str = ""
    sequence: int = 0
    root: bytes = EMPTY_ROOT
    past_epochs: frozenset[str] = frozenset()


class Header(NamedTuple):
    """What a bundle says of its place in the sequence; `identity` is the digest of its manifest."""

    client_id: str
    epoch: str
    sequence: int
    parent_root: bytes
    identity: bytes


def decide(head: Head, recorded: bytes | None, header: Header, *, take_over: bool = False) -> Verdict:
    """Say what to do with a bundle (spec S-1 to S-8).

    recorded: the identity of the receipt that the server holds for (header.epoch, header.sequence), or None.
    take_over: the sender asks to become the workspace's owner.
    """
    if recorded is not None and recorded == header.identity:
        return Verdict.DUPLICATE  # spec S-2: a repeat gets the first receipt, whoever owns the workspace now
    if head.client_id not in ("", header.client_id) and not take_over:
        return Verdict.NOT_OWNER  # spec S-3
    if header.epoch in head.past_epochs:
        return Verdict.STALE_EPOCH  # spec S-4
    if header.sequence <= head.sequence:
        return Verdict.FORK  # spec S-5: this number is spent on another bundle
    if header.sequence > head.sequence + 1:
        return Verdict.GAP  # spec S-6
    return Verdict.APPLY if header.parent_root == head.root else Verdict.FORK  # spec S-7
