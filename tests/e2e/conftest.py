"""A server for the tests of a module, and a user with a folder for each of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import folders
import pytest
from remote_runs import Terminal
from serving import Served, serving
from user import User


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server for all tests; each has a workspace of its own."""
    with serving(tmp_path_factory.mktemp("server") / "data") as served:
        yield served


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One host for all tests, which runs what anybody on this machine asks."""
    with serving(tmp_path_factory.mktemp("host") / "data", "--run-without-token") as served:
        yield served


@pytest.fixture
def terminal(tmp_path: Path, host: Served) -> Terminal:
    """A user with a folder and a file in it, whose commands run on that host."""
    made = Terminal.at(tmp_path / "home", host.url)
    (made.folder / "a.txt").write_text("alpha\n")
    return made


@pytest.fixture
def user(tmp_path: Path) -> User:
    """A user with an empty home."""
    return User(tmp_path / "home")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one of everything; its name is the test's."""
    root = tmp_path / f"{tmp_path.name}-media"
    folders.life(root)
    return root
