"""The order in which bundle files continue a head: by parent root and epoch, never by their names (spec H-61, H-62)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

from deltasync.core.errors import SequenceConflict, SequenceFork


class Link(NamedTuple):
    """A bundle's place among others."""

    name: str
    """What people call it: a file's name."""
    epoch: str
    sequence: int
    parent_root: bytes
    root: bytes
    created_at: str


@dataclass(frozen=True, slots=True)
class Chain:
    """The links that continue a head, in their order, and what becomes of the others."""

    follow: list[Link] = field(default_factory=list)
    superseded: list[Link] = field(default_factory=list)
    """Sealed, but replaced by a later epoch's bundle before anyone applied them (spec S-13)."""
    stray: list[Link] = field(default_factory=list)
    """Of another history, or behind a gap; in the order of their numbers."""


def continue_from(links: Collection[Link], *, epoch: str, sequence: int, root: bytes) -> Chain:
    """Return how links continue the head (epoch, sequence, root).

    Where several links continue the same tree, the one of a new epoch is later than the one that stays in its epoch:
    a client opens an epoch when it discards a bundle that had left the machine, and never returns to an old one.
    """
    chain, rest = Chain(), sorted(links, key=lambda each: (each.sequence, each.created_at))
    left_epochs: set[str] = set()
    while fitting := [each for each in rest if each.sequence == sequence + 1 and each.parent_root == root]:
        chosen = max(fitting, key=lambda each: (each.epoch != epoch, each.created_at))
        left_epochs |= {epoch, *(each.epoch for each in fitting)} - {chosen.epoch}
        chain.follow.append(chosen)
        rest.remove(chosen)
        epoch, sequence, root = chosen.epoch, chosen.sequence, chosen.root
    for each in rest:
        (chain.superseded if each.epoch in left_epochs else chain.stray).append(each)
    return chain


def replaced(refused: Collection[Link], applied: Collection[Link]) -> list[Link]:
    """Return those of the refused links, all of which a head has passed, that later bundles have replaced.

    A link is replaced when an applied one continues the same tree under the same number and is not older; what its
    epoch sealed behind it is replaced with it. Of any other link nobody knows which history is the right one.
    """
    newest = {(each.sequence, each.parent_root): each.created_at for each in applied}
    epochs = {each.epoch for each in refused if newest.get((each.sequence, each.parent_root), "") >= each.created_at}
    return [each for each in refused if each.epoch in epochs]


def broken(workspace: str, expected: int, name: str, *, is_missing: bool) -> SequenceConflict:
    """Return the error for a bundle that cannot be applied, and what to do where the right one is lost.

    workspace, name: of the bundle's file, both safe to print. is_missing: bundles before it were not found.
    """
    kind: type[SequenceConflict] = SequenceConflict if is_missing else SequenceFork
    found = f"bundle {expected} of {workspace} is missing; {name} comes later"
    sentence = found if is_missing else f"{name} does not continue bundle {expected - 1} of {workspace}"
    return kind(
        f"{sentence} (where bundles are lost: `deltasync bundle export PATH DIR --full`, "
        "and replay that under another name with --workspace)",
        expected_sequence=expected,
        bundle=name,
    )
