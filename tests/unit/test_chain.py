"""Which bundle files continue a head, which were replaced, and which belong elsewhere."""

from __future__ import annotations

import pytest

from deltasync.core.chain import Link, continue_from, replaced

EMPTY = b"r0"


def link(name: str, created_at: str = "t0") -> Link:
    """Return a link from its name: epoch, sequence, parent root and root, as in `A2:r1-r2`."""
    epoch, sequence = name[0], int(name[1])
    parent, _, root = name.partition(":")[2].partition("-")
    return Link(name, epoch, sequence, parent.encode(), root.encode(), created_at)


def names(links: list[Link]) -> list[str]:
    return [each.name for each in links]


A1, A2, A3 = link("A1:r0-r1"), link("A2:r1-r2"), link("A3:r2-r3")
B3, B4 = link("B3:r2-s3"), link("B4:s3-s4")
C3 = link("C3:r2-q3", "t1")


@pytest.mark.parametrize(
    ("links", "follow", "superseded", "stray"),
    [
        ([], [], [], []),
        ([A3, A1, A2], [A1, A2, A3], [], []),
        ([A1, A3], [A1], [], [A3]),
        ([A2, A3], [], [], [A2, A3]),
        ([A1, A2, A3, B3, B4], [A1, A2, B3, B4], [A3], []),
        ([A1, A2, B3, A3], [A1, A2, B3], [A3], []),
        ([A1, A2, A3, B3, C3], [A1, A2, C3], [A3, B3], []),
        ([A1, B4], [A1], [], [B4]),
        ([A1, link("Z1:r0-z1", "t9")], [link("Z1:r0-z1", "t9")], [A1], []),
        ([A1, A2, link("Z2:z1-z2")], [A1, A2], [], [link("Z2:z1-z2")]),
    ],
    ids=[
        "none",
        "in order",
        "gap",
        "no beginning",
        "new epoch",
        "new epoch, short",
        "the latest epoch",
        "far",
        "other",
        "foreign",
    ],
)
def test_links_are_followed_by_root_and_epoch(
    links: list[Link], follow: list[Link], superseded: list[Link], stray: list[Link]
) -> None:
    """From the empty tree: what follows, what a later epoch has replaced, and what nobody can place."""
    chain = continue_from(links, epoch="", sequence=0, root=EMPTY)
    assert names(chain.follow) == names(follow)
    assert set(names(chain.superseded)) == set(names(superseded))
    assert set(names(chain.stray)) == set(names(stray))


def test_a_head_is_continued_from_where_it_stands() -> None:
    """With 1 and 2 applied the rest follows; a link that stays in the head's epoch gives way to a new one."""
    chain = continue_from([A3, B3], epoch="A", sequence=2, root=b"r2")
    assert (names(chain.follow), names(chain.superseded)) == (["B3:r2-s3"], ["A3:r2-r3"])


def test_what_a_head_has_passed_was_replaced_by_what_is_not_older() -> None:
    """A refused link beside an applied one of the same place is replaced, with what its epoch sealed behind it."""
    a4 = link("A4:r3-r4")
    assert names(replaced([A3, a4], [A1, A2, B3])) == ["A3:r2-r3", "A4:r3-r4"]
    assert replaced([C3], [A1, A2, B3]) == [], "what is newer than the applied one is another history"
    assert replaced([link("Z2:z1-z2")], [A1, A2]) == []
