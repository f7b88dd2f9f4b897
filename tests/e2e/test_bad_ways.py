"""Ways over http that are no good: one that swallows everything and closes nothing, one that is slow both ways."""

from __future__ import annotations

import random
from pathlib import Path

import folders
import pytest
from lossy import lossy
from serving import Served
from user import User

SMALL, LARGE = 200_000, 9 << 20
"""A file that goes whole, and one that goes in pieces."""


@pytest.mark.parametrize(("size", "dark_after"), [(0, 0), (SMALL, 100_000), (LARGE, 2 << 20)])
def test_a_way_that_swallows_everything_is_given_up_and_found_again(
    server: Served, user: User, folder: Path, size: int, dark_after: int
) -> None:
    """Nothing is answered and nothing closed, at once, in a bundle, in its pieces: one sentence and exit 4.

    The next push goes on when the way is there again, also with what it kept all the time.
    """
    folders.write(folder, "file.bin", random.Random(folder.name).randbytes(size))
    with lossy(server.port) as way:
        way.dark_after = dark_after
        done = user.run("push", folder, "--to", way.url, "--timeout", "0.5", "--max-retries", "1", "--no-wait")
        assert done.code == 4 and not way.is_light.is_set()
        (line,) = done.err.splitlines()
        assert way.url in line and "answer" in line
        way.is_light.set()
        assert user.run("push", folder).code == 0
    folders.assert_same(folder, server.data / "workspaces" / folder.name / "tree")


def test_a_way_that_is_slow_both_ways_takes_as_long_as_it_takes(
    server: Served, user: User, folder: Path, tmp_path: Path
) -> None:
    """The time to wait is one for silence: what moves goes through, however much longer all of it takes."""
    folders.write(folder, "file.bin", random.Random(folder.name).randbytes(SMALL))
    timeout = 0.8
    with lossy(server.port) as way:
        way.bytes_per_second = SMALL / (2 * timeout)
        words = ("--timeout", str(timeout))
        assert user.run("push", folder, "--to", way.url, *words).code == 0
        fetched = user.run("fetch", "--from", way.url, "--workspace", folder.name, tmp_path / "dest", *words)
        assert fetched.code == 0, fetched.err
    folders.assert_same(folder, server.data / "workspaces" / folder.name / "tree")
    folders.assert_same(folder, tmp_path / "dest")
