"""Runs a client with an fsync that fails, every STRIDE-th in its turn: `failing_fsync_client.py FOLDER FIRST STRIDE`.

It prints one line for each way to push: what was to be made durable at each point, and the exit code.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import folders
from failing_fsync import SHIM
from serving import serving

from deltasync.cli.main import run as deltasync
from deltasync.client import pack

SHIM.failing_path.restype = ctypes.c_char_p


class Life:
    """A folder that is pushed, changed and pushed again, and the bundle that each number stands for."""

    def __init__(self, root: Path, url: str | None) -> None:
        self.root, self.outbox = root, root / ".deltasync/outbox"
        self.words = ["push", str(root), *(["--to", url] if url else []), "--keep-sent", "1d", "--quiet"]
        self.numbers: dict[tuple[str, int], bytes] = {}
        root.mkdir()
        folders.life(root)

    def push(self) -> tuple[int, list[str]]:
        """Push, and return the exit code with the lines on stderr; every number keeps its bundle."""
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = deltasync(self.words)
        for epoch, sequence, identity, file in self.recorded():
            assert self.numbers.setdefault((epoch, sequence), identity) == identity, (epoch, sequence)
            assert file is None or (self.outbox / file).exists(), file
        return code, said.getvalue().splitlines()

    def recorded(self) -> Iterator[tuple[str, int, bytes, str | None]]:
        """Yield the bundles that the state knows."""
        path = self.root / ".deltasync/state.db"
        if path.exists():
            with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
                if database.execute("PRAGMA user_version").fetchone()[0]:
                    yield from database.execute("SELECT epoch, sequence, identity, file FROM outbox").fetchall()

    def harmed(self, number: int) -> tuple[str, int] | None:
        """Let one fsync fail; return of which file it was and how the push with it ended, or None when none failed."""
        SHIM.failing_arm(number)
        try:
            code, said = self.push()
            if SHIM.failing_count() < number:
                folders.later(self.root)
                code, said = self.push()
            if SHIM.failing_count() < number:
                return None
        finally:
            SHIM.failing_arm(-1)
        path = Path(SHIM.failing_path().decode())
        assert len(said) == (code != 0), said
        assert not any("Traceback" in line or "unexpected" in line for line in said), said
        if self.outbox in (path, path.parent):
            assert code, "a bundle file that is not durable counts as written"
            for each in self.outbox.iterdir():  # whoever copies the folder now has no bundle that is made anew
                assert pack.verify(each).identity in self.numbers.values(), each
        return str(path.relative_to(self.root.parent)), code


def visit(root: Path, number: int, url: str | None) -> tuple[str, int] | None:
    """Let one fsync of a client's life fail, then push again: everything is there, and only what is recorded."""
    life = Life(root, url)
    found = life.harmed(number)
    folders.write(root, "afterwards", "x")
    assert life.push() == (0, [])
    assert {file for *_, file in life.recorded()} == {entry.name for entry in life.outbox.iterdir()}
    return found


def main() -> None:
    """Sweep the points, without a server and with one."""
    folder, first, stride = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    folder.mkdir()
    os.environ["DELTASYNC_HOME"] = str(folder / "home")
    with serving(folder / "data", environment={"LD_PRELOAD": ""}) as served:
        for kind, url in (("sealed", None), ("pushed", served.url)):
            found: list[tuple[str, int]] = []
            number = first
            while (point := visit(folder / f"{kind}{number}", number, url)) is not None:
                if url is not None:
                    folders.assert_same(folder / f"{kind}{number}", served.data / f"workspaces/{kind}{number}/tree")
                found.append(point)
                number += stride
            print(json.dumps(found))


if __name__ == "__main__":
    main()
