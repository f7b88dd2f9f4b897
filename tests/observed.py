"""Workspaces for tests of observation: real folders, and a naive second opinion on their root."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Any

import msgspec
from blake3 import blake3

from deltasync.client.files import RACY_NS
from deltasync.client.ignore import IgnoreRules
from deltasync.client.moves import LIMBO, ROOT_ID, Links, Stats
from deltasync.client.scan import ScanOptions, ScanReport, scan
from deltasync.client.state import State
from deltasync.core.delta import apply, diff
from deltasync.core.manifest import Kind

CONTEXT = "deltasync 2026-11-21 directory object v1"


def naive_root(folder: Path, *, without: Collection[str] = ()) -> bytes:
    """Compute a root the slow and obvious way, from nothing but the files; `without` names paths to leave out."""
    return _naive(folder, "", frozenset(without))


def _naive(folder: Path, prefix: str, without: frozenset[str]) -> bytes:
    entries: list[list[Any]] = []
    for name in sorted(os.listdir(folder)):
        path = folder / name
        if prefix + name in without or (not prefix and name == ".deltasync"):
            continue
        status = path.lstat()
        if stat.S_ISDIR(status.st_mode):
            entries.append([name, "directory", 0, 0, False, _naive(path, f"{prefix}{name}/", without), ""])
        elif stat.S_ISLNK(status.st_mode):
            entries.append([name, "symlink", 0, 0, False, b"", os.readlink(path)])
        else:
            digest = blake3(path.read_bytes()).digest()
            executable = bool(status.st_mode & 0o111)
            entries.append([name, "file", status.st_size, status.st_mtime_ns, executable, digest, ""])
    return blake3(msgspec.msgpack.encode(entries), derive_key_context=CONTEXT).digest()


def write(root: Path, files: dict[str, str | bytes]) -> None:
    """Write files, making the folders they need; a path that ends in '/' is an empty folder."""
    for path, content in files.items():
        target = root / path
        if path.endswith("/"):
            target.mkdir(parents=True, exist_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content.encode() if isinstance(content, str) else content)


def settle(*paths: Path) -> None:
    """Return when these files were written so long ago that no later change could hide behind their times."""
    probe = paths[0].parent / "probe"
    newest = max(path.lstat().st_ctime_ns for path in paths)
    while not probe.exists() or probe.lstat().st_mtime_ns - newest <= 2 * RACY_NS:
        probe.write_bytes(b"")
    probe.unlink()


def look(
    state: State, folders: Collection[str] | None = None, *, ignore: IgnoreRules | None = None, **options: Any
) -> ScanReport:
    """Scan with options, without waiting for anything."""
    is_settled = options.pop("is_settled", None)
    options.setdefault("settle_seconds", 0.0)
    rules = ignore or IgnoreRules(state.root)
    return scan(state, ScanOptions(rules, **options), folders=folders, is_settled=is_settled)


def look_until_quiet(state: State, **options: Any) -> ScanReport:
    """Scan until no entry is so fresh that it must be read again."""
    for _ in range(1000):
        report = look(state, **options)
        if report.hashed_files == 0 and not has_racy(state):
            return report
    raise AssertionError("entries stay racy")


def rest(root: Path) -> None:
    """Wait until the file system's clock is past the time in which a change might not show."""
    newest = max(path.lstat().st_ctime_ns for path in root.rglob("*"))
    probe = root.parent / "probe"
    while True:
        probe.write_bytes(b"x")
        if probe.stat().st_mtime_ns > newest + 2 * RACY_NS:
            return


def has_racy(state: State) -> bool:
    """Tell whether an entry was written too close to its hash."""
    return any(1 in Stats.unpack(packed).flags for (packed,) in state.db.execute("SELECT stats FROM directories"))


def seal(state: State) -> None:
    """Do to the state what sealing does."""
    with state.writing():
        state.db.execute("UPDATE head SET sealed_root = ?", (state.observed_root(),))
        state.forget_renames()


def check(state: State, *, without: Collection[str] = ()) -> None:
    """Assert that the observed tree is the folder's, that rows and objects agree, and that the delta holds."""
    assert state.observed_root() == naive_root(state.root, without=without)
    check_rows(state)
    check_delta(state)


def check_rows(state: State) -> None:
    """Assert that every directory entry has its row and every row its entry, and that the counts are true."""
    seen = _check_row(state, ROOT_ID)
    links = Links(state)
    for (identity,) in state.db.execute("SELECT id FROM directories").fetchall():
        assert identity in seen or links.path(identity) is None, f"row {identity} hangs nowhere"


def _check_row(state: State, identity: int) -> set[int]:
    row = state.row(identity)
    children = {child.name: child for child in state.children(identity)}
    entries = state.load(row.digest)
    assert {e.name: e.digest for e in entries if e.kind is Kind.DIRECTORY} == {
        name: child.digest for name, child in children.items()
    }
    if entries:
        assert len(Stats.unpack(state.packed_stats(identity)).inodes) == len(entries)
    files = [e for e in entries if e.kind is Kind.FILE]
    assert row.files == len(files) + sum(child.files for child in children.values())
    assert row.size == sum(e.size for e in files) + sum(child.size for child in children.values())
    return {identity}.union(*(_check_row(state, child.id) for child in children.values()))


def check_delta(state: State) -> None:
    """Assert that the delta with the renames of the state leads from the sealed tree to the observed one."""
    sealed = state.sealed_root()
    operations = diff(sealed, state.observed_root(), state.load, state.renames())
    assert apply(sealed, operations, state.load).root == state.observed_root()


def operations(state: State) -> list[tuple[str, str, str | None]]:
    """Return the delta since the last sealing as (verb, path, source)."""
    found = diff(state.sealed_root(), state.observed_root(), state.load, state.renames())
    return sorted((str(o.operation), o.path, o.source_path) for o in found)


def limbo(state: State) -> int:
    """Return how many folders wait in limbo."""
    return len(state.children(LIMBO))
