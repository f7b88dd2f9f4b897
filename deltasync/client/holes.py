"""Holes: which runs of a sparse file take no space here, so that nothing need travel for them."""

from __future__ import annotations

import os
from pathlib import Path

from deltasync.core.manifest import Operation
from deltasync.disk import HOLE_BYTES_MIN, Folder, extents, open_regular

HOLES_MAX = 100_000
"""Of a file that has more of them the largest count, so that its recipe is no larger than one may be."""

Holes = list[tuple[int, int]]
"""Begin and end of each, in order."""


def holes_of(root: Path, operation: Operation) -> Holes:
    """Return the holes of the file that an operation names; none where it cannot be read, or has another size now.

    No link is followed below the root. What the file holds may change after this look.
    """
    folder, _, name = operation.path.rpartition("/")
    try:
        with Folder.open(root) as top, top.walk_to(folder) as here:
            descriptor = open_regular(name, at=here.fd)
        try:
            return _holes(descriptor) if os.fstat(descriptor).st_size == operation.size else []
        finally:
            os.close(descriptor)
    except OSError:
        return []  # whoever reads the content meets the trouble


def _holes(descriptor: int) -> Holes:
    found: Holes = []
    least = HOLE_BYTES_MIN
    for start, end, is_hole in extents(descriptor):
        if is_hole and end - start >= least:
            found.append((start, end))
        while len(found) > HOLES_MAX:
            least *= 2
            found = [hole for hole in found if hole[1] - hole[0] >= least]
    return found
