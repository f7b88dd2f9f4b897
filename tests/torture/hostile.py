"""Hostile bundles against a real store: each refused by exactly its rule, with nothing changed and within its means."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import random
import re
import sqlite3
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from corpus_good import File, Link, Model, directory_of, good_chain
from serving import Writer

from deltasync.core.errors import DeltasyncError, StaleEpoch
from deltasync.core.hashing import digest_of
from deltasync.core.names import WorkspaceName
from deltasync_server.config import StoreConfig
from deltasync_server.receive import Store
from torture.families import Hostile, hostile_bundles
from torture.harness import PROJECT, Defect, Result, Work
from torture.oddities import Odd, odd_bundles

NAME = "hostile"
GOAL = 2100
SLICE = 40
WEIGHT = 2
LIFE = WorkspaceName("life")
GROWTH_MAX_KIB = 256 * 1024
SECONDS_MAX = 5.0
BYTES_READ_MAX = 64 * 1024
"""Larger files are known by their inode, size and time."""
_BY_THE_TREE = {"B-39", "B-46", "B-56", "B-57"}
"""Rules that refuse nothing by their own number."""
_BY_WHAT_IS_HELD = {"B-64", "B-67", "B-68"}
"""Rules whose breach is CONTENT_MISSING."""
DEFECTS = (
    Defect(
        "a content is not hashed",
        "TR-23",
        "deltasync/core/bundle.py",
        "    if found.hex() != operation.digest:\n",
        "    if False:\n",
        "B-55",
    ),
    Defect(
        "bytes behind the frame are let through",
        "TR-20",
        "deltasync/core/frame.py",
        '                raise Refused("B-5", "bytes follow the zstd frame")\n',
        "                return\n",
        "B-5-",
    ),
    Defect(
        "a path may have '..'",
        "TR-21",
        "deltasync/core/names.py",
        'if part in ("", ".", "..", RESERVED)',
        'if part in ("", ".", RESERVED)',
        "B-31",
    ),
    Defect(
        "a link may climb one folder too far",
        "TR-21",
        "deltasync/core/names.py",
        "            if depth < 0:\n",
        "            if depth < -1:\n",
        "B-35",
    ),
    Defect(
        "the expansion of a frame has no limit",
        "TR-22",
        "deltasync/core/frame.py",
        "if self._decompressed_bytes > RATIO_FREE_BYTES + self._ratio * self._raw.taken_bytes:",
        "if False:",
        "B-8",
    ),
    Defect(
        "a header need not be canonical",
        "TR-20",
        "deltasync/core/tar.py",
        'if b"\\x00" in member.name or not ahead.startswith(header(*member)):',
        'if b"\\x00" in member.name:',
        "B-12",
    ),
    Defect(
        "the root that a bundle names is believed",
        "TR-23",
        "server/deltasync_server/intake.py",
        "if applied.root.hex() != metadata.manifest.root:",
        "if False:",
        "ROOT_MISMATCH",
    ),
    Defect(
        "a lease of a refused bundle is forgotten",
        "TR-20",
        "server/deltasync_server/intake.py",
        "            self.rooms.leases.drop(self._lease)\n",
        "            pass\n",
        "ROOT_MISMATCH",
    ),
)


@cache
def _bundles() -> list[Hostile]:
    return hostile_bundles()


def run(work: Work) -> Result:
    """Give hostile bundles, and odd ones, to a store with a life of ten bundles behind it."""
    result, random_order = Result(), random.Random(work.seed)
    cases: list[Hostile | Odd] = [*_bundles(), *odd_bundles()]
    random_order.shuffle(cases)
    if work.points >= GOAL:
        work = replace(work, points=len(cases))
    if work.hint:
        cases.sort(key=lambda each: not each.name.startswith(work.hint))
    rules: set[str] = set()
    with _lived(work.scratch / "data") as store, _opened(work.scratch / "odd") as other:
        for case in cases:
            if not work.goes_on(result):
                break
            result.points += 1
            if isinstance(case, Odd):
                result.count("odd and taken")
                fault = _why_not_taken(other, case)
            else:
                result.count("refused")
                rules.add(case.rule or case.code)
                fault = _why_not_refused(store, case, result)
            if fault:
                result.faults.append(f"{case.name}: {fault}")
        if result.points == len(cases) and not work.stop_at_first:
            result.faults += [f"{rule} is broken by no bundle" for rule in sorted(_refusing() - rules)]
            result.faults += [] if _turns_away(other) else ["a bundle of an epoch that is over is not STALE_EPOCH"]
    result.counts["rules and codes reached"] = len(rules)
    return result


@contextmanager
def _opened(data: Path) -> Iterator[Store]:
    with Store(StoreConfig(data=data, gap_seconds=0.0)) as store:
        store.recover()
        yield store


@contextmanager
def _lived(data: Path) -> Iterator[Store]:
    """Lend a store that has received the good chain."""
    with _opened(data) as store:
        for step in good_chain():
            store.receive(LIFE, io.BytesIO(step.sealed), expected_identity=None)
        store.catch_up()
        yield store


def _refusing() -> set[str]:
    """Return the numbers of spec/1-bundle.md that a bundle can be refused by."""
    page = (PROJECT / "spec/1-bundle.md").read_text(encoding="utf-8")
    return set(re.findall(r"^\| (B-\d+) \|", page, re.MULTILINE)) - _BY_THE_TREE - _BY_WHAT_IS_HELD


def _why_not_refused(store: Store, case: Hostile, result: Result) -> str:
    """Return what is wrong with how a bundle was refused, '' for nothing."""
    sealed = case.build()
    gc.collect(0)
    before = kept(store)
    resident = _reset_peak()
    began = time.monotonic()
    found: tuple[str, str | None] | str
    try:
        store.receive(LIFE, io.BytesIO(sealed), expected_identity=case.announced)
        found = "it is taken"
    except DeltasyncError as error:
        rule = error.facts.get("rule")
        found = error.code, rule if isinstance(rule, str) else None
    except Exception as error:  # noqa: BLE001 - whatever else is raised is the fault
        found = repr(error)
    seconds, growth = time.monotonic() - began, _peak() - resident
    result.counts["most KiB of growth"] = max(result.counts.get("most KiB of growth", 0), growth)
    result.counts["most ms"] = max(result.counts.get("most ms", 0), int(seconds * 1000))
    if found != case.refusal:
        return f"{case.refusal} was expected, and {found} came"
    after = kept(store)
    if case.code == "CONTENT_MISSING":  # what is there is kept for the sender, who comes again
        del before["leases"], after["leases"]
    if after != before:
        return f"something is left: {_difference(before, after)}"
    if seconds > SECONDS_MAX or growth > GROWTH_MAX_KIB:
        return f"it took {seconds:.1f} s and {growth} KiB"
    return ""


def _difference(before: dict[str, object], after: dict[str, object]) -> str:
    names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return "; ".join(f"{name}: {str(before.get(name))[:300]} -> {str(after.get(name))[:300]}" for name in names[:3])


def kept(store: Store) -> dict[str, object]:
    """Return everything that a store keeps, but for how the last upload of a workspace fared."""
    data = store.config.data
    found: dict[str, object] = {"leases": sorted(store.leases.digests())}
    with contextlib.closing(sqlite3.connect(f"file:{data}/state.db?mode=ro", uri=True)) as db:
        for (table,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})") if row[1] != "last_upload_status"]
            found[f"table {table}"] = sorted(map(repr, db.execute(f"SELECT {', '.join(columns)} FROM {table}")))
    found |= _seen(data, BYTES_READ_MAX)
    return found


def _why_not_taken(store: Store, odd: Odd) -> str:
    """Return what is wrong with how an odd bundle was taken, '' for nothing."""
    name = WorkspaceName(odd.name)
    try:
        for sealed in odd.sealed:
            receipt = store.receive(name, io.BytesIO(sealed), expected_identity=None)
            if receipt.duplicate or not store.receive(name, io.BytesIO(sealed), expected_identity=None).duplicate:
                return "it counts twice"
    except DeltasyncError as error:
        return f"it is refused: {error}"
    store.trees.bring_forward(name)
    state = store.workspace(name)
    if state.root != directory_of(odd.tree).hex() or state.sequence != len(odd.sealed):
        return f"it led to {state.sequence} {state.root}"
    tree = Path(state.tree_path)
    found = {os.path.relpath(path, tree): _as_meant(seen) for path, seen in _seen(tree).items()}
    wanted = _meant(odd.tree)
    return "" if found == wanted else f"the tree is not what it should be: {_difference(wanted, found)}"


def _seen(folder: Path, most_bytes: int = 1 << 30) -> dict[str, object]:
    """Return what lies below a folder, whose paths may be too long to be opened by their names."""
    found: dict[str, object] = {}
    for above, folders, files, descriptor in os.fwalk(folder):
        for name in (*folders, *files):
            if name.startswith("state.db"):
                continue
            path, status = os.path.join(above, name), os.stat(name, dir_fd=descriptor, follow_symlinks=False)
            if stat.S_ISLNK(status.st_mode):
                found[path] = os.readlink(name, dir_fd=descriptor)
            elif stat.S_ISDIR(status.st_mode):
                found[path] = status.st_mode
            else:
                with open(name, "rb", opener=partial(os.open, dir_fd=descriptor)) as file:
                    digest = digest_of(file.read()) if status.st_size <= most_bytes else b""
                found[path] = (status.st_mode, status.st_size, status.st_mtime_ns, status.st_ino, digest.hex())
    return found


def _meant(tree: Model) -> dict[str, object]:
    found: dict[str, object] = {}
    for path, thing in tree.items():
        if isinstance(thing, Link):
            found[path] = thing.target
        elif isinstance(thing, File):
            found[path] = (thing.executable, thing.digest)
        else:
            found[path] = None
    return found


def _as_meant(seen: object) -> object:
    """Return of what is seen what a model says as well."""
    if isinstance(seen, tuple):
        return bool(seen[0] & 0o100), seen[4]
    return seen if isinstance(seen, str) else None


def _turns_away(store: Store) -> bool:
    """Tell whether a bundle of an epoch that another one replaced is turned away."""
    name, old, new = WorkspaceName("turned"), Writer("turned"), Writer("turned", epoch="2" * 32)
    first = old.file("a", b"1")
    store.receive(name, io.BytesIO(first.sealed), expected_identity=None)
    new.life.tree, new.sequence, new.root = dict(old.life.tree), old.sequence, old.root
    store.receive(name, io.BytesIO(new.file("b", b"2").sealed), expected_identity=None)
    before = kept(store)
    for number in range(2):
        try:
            store.receive(name, io.BytesIO(old.file(f"c{number}", b"3").sealed), expected_identity=None)
        except StaleEpoch:
            continue
        return False
    return kept(store) == before


def _reset_peak() -> int:
    """Begin to measure the most memory anew, and return what is used now, in KiB."""
    with contextlib.suppress(OSError):  # where the kernel does not let us, the peak is that of all before
        Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _peak() -> int:
    return _memory("VmHWM")


def _memory(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0
