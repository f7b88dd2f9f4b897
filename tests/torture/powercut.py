"""Power cuts at any moment of a store's or a client's life: nothing that was acknowledged is lost, all is whole.

A life is recorded with every write and barrier that reaches its disk, and then ends at many moments: the real code
opens what each of these disks has. See `disk` for what a disk may have lost, `cut_store`, `cut_client` and
`cut_fetch` for what must be there. Threads make no two recordings of one seed the same to the byte: with
POWERCUT_KEEP=FOLDER in the environment, each disk that something is wrong with is kept there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from deltasync.disk import start_writeback
from torture.cut_client import ClientLife
from torture.cut_fetch import FetchLife
from torture.cut_store import LIVES, StoreLife
from torture.disk import (
    OPTIONS,
    SUBSETS,
    Cutter,
    Moment,
    Recorded,
    Unavailable,
    isolate,
    moments,
    mounted,
    new_disk,
    recorded,
    require_means,
)
from torture.harness import Defect, Result, Work
from torture.runner import scratch_folder

NAME = "powercut"
GOAL = 1000
SLICE = 8
WEIGHT = 3
STEPS = 14
CLIENT, FETCH = "client", "fetch"
STATES_MAX, STATES_MIN = 60, 4
"""How many disks one recording gives."""
LIES_EVERY = 4
"""One moment in so many is met once more on a disk that lied."""
XFS_EVERY = 9
"""One recording in so many is of xfs, whose journal takes longer to replay."""
_JOURNAL, _BLOBS, _INTAKE = (f"server/deltasync_server/{name}.py" for name in ("journal", "blobs", "intake"))
DEFECTS = (
    Defect(
        "the journal file is not fsynced",
        "TR-62",
        _JOURNAL,
        "        os.fsync(self._descriptor)\n        self._folder.fsync()\n",
        "        self._folder.fsync()\n",
        "journal",
    ),
    Defect(
        "the name of an upload that becomes a journal file is not fsynced",
        "TR-62",
        _JOURNAL,
        "        self._is_moved = True\n        self._folder.fsync()\n",
        "        self._is_moved = True\n",
        "uploads",
    ),
    Defect(
        "journal files are released before their blobs are durable",
        "TR-62",
        _JOURNAL,
        "            if not self._make_durable(receipt, should_stop):\n                break\n",
        "",
        "journal",
    ),
    Defect(
        "blobs of the journal are believed by their size and time",
        "TR-62",
        _JOURNAL,
        "here = {digest for digest in rows if digest not in wrong and self._cache.holds_right_bytes(digest)}",
        "here = {digest for digest, row in rows.items() if self._cache.has_unchanged(row)}",
        "journal",
    ),
    Defect(
        "content that is in no journal is not fsynced",
        "TR-62",
        _BLOBS,
        """\
        for _, error in fsync_each(self.folder, [digest.hex() for digest in self.unjournalled()]):
            raise error
""",
        "        pass\n",
        "direct",
    ),
    Defect(
        "the folders of such content are not fsynced",
        "TR-62",
        _BLOBS,
        "                entered.fsync()\n",
        "                pass\n",
        "direct",
    ),
    Defect(
        "the commit does not wait until its content is durable",
        "TR-62",
        _INTAKE,
        "        durable.result()  # spec ST-11: durable before any row names it\n",
        "",
        "direct",
    ),
    Defect(
        "a transaction is not fsynced",
        "TR-62",
        "deltasync/db.py",
        'connection.execute("PRAGMA synchronous=EXTRA")',
        'connection.execute("PRAGMA synchronous=NORMAL")',
    ),
    Defect(
        "a part of a stream is not fsynced",
        "TR-62",
        "server/deltasync_server/streams.py",
        "        os.fsync(self._descriptor)\n",
        "",
        "parts",
    ),
    Defect(
        "pieces of an upload are not fsynced",
        "TR-62",
        "server/deltasync_server/uploads.py",
        "                    os.fsync(descriptor)\n",
        "                    pass\n",
        "uploads",
    ),
    Defect(
        "trees are believed after a start",
        "TR-62",
        "server/deltasync_server/receive.py",
        "            self.trees.distrust(suspects)\n",
        "",
        "copies",
    ),
    Defect(
        "copies in a tree are not fsynced",
        "TR-62",
        "server/deltasync_server/tree.py",
        """\
                    for entry in files:
                        with_file(folder, entry.name, start_writeback)
                    # Copies are in no journal, nor are restamped inodes.
                    failed = [each for each in files if self._is_doubtful(folder, each)]
                    failed = failed or [each for each in files if not with_file(folder, each.name, os.fsync)]
""",
        "                    failed: list[Entry] = []\n",
        "copies",
    ),
    Defect(
        "bundle files are not fsynced",
        "TR-62",
        "deltasync/disk.py",
        "                if durable:\n                    os.fsync(out.fileno())\n",
        "",
        CLIENT,
    ),
    Defect(
        "a client that forgot what it sent goes on from what it knows",
        "TR-64",
        "deltasync/client/push.py",
        "        elif meeting is not Meeting.SAME or self._conflicts > 1:\n",
        "        elif False:\n",
        CLIENT,
    ),
)


def run(work: Work) -> Result:
    """Cut the power of as many disks as there is time for, in a process whose mounts are its own."""
    result = Result()
    try:
        require_means()
    except Unavailable as error:
        result.skipped["power cuts"] = str(error)
        return result
    with scratch_folder() as folder:
        answer = folder / "answer.json"
        asked = dataclasses.asdict(work) | {
            "seconds": work.deadline - time.monotonic(),
            "scratch": str(folder),
            "answer": str(answer),
        }
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(
            [sys.executable, "-X", "faulthandler", "-m", "torture.powercut"],
            input=json.dumps(asked).encode(),
            env=environment,
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            check=False,
        )
        if not answer.exists():
            raise RuntimeError(f"exit {done.returncode}: {done.stderr.decode(errors='replace')[-3000:]}")
        return Result(**json.loads(answer.read_text(encoding="utf-8")))


def main() -> None:
    """Do the work that standard input describes, and write the result where it is wanted."""
    asked = json.load(sys.stdin)
    logging.disable()
    answer, seconds = Path(asked.pop("answer")), asked.pop("seconds")
    work = Work(**{**asked, "scratch": Path(asked["scratch"]), "deadline": time.monotonic() + seconds})
    result = Result()
    try:
        isolate()
        _visit(work, result)
    except Unavailable as error:
        result.skipped["power cuts"] = str(error)
    answer.write_text(json.dumps(dataclasses.asdict(result)), encoding="utf-8")


def _visit(work: Work, result: Result) -> None:
    kinds = sorted(name for name in (*LIVES, CLIENT, CLIENT, FETCH) if name.startswith(work.hint))
    random.Random(work.seed).shuffle(kinds)
    has_xfs = shutil.which("mkfs.xfs") is not None and not work.hint
    if not has_xfs and not work.hint:
        result.skipped["xfs"] = "there is no mkfs.xfs"
    most = STATES_MAX if not work.hint else STATES_MAX // 3  # for a planted defect one life is better than another
    states = max(STATES_MIN, min(most, work.points // 12))
    number = 0
    while work.goes_on(result):
        system = "xfs" if has_xfs and number % XFS_EVERY == XFS_EVERY - 1 else "ext4"
        _Recording(work, result, number, kinds[number % len(kinds)], system).visit(states)
        number += 1
    result.count("recordings", number)


class Life(Protocol):
    """What happens on a disk until its power is cut, and afterwards."""

    def live(self, steps: int) -> None:
        """Do so many things, and mark what was acknowledged."""

    def recover(self, mark: Callable[[int], None], acknowledged: int) -> None:
        """Go on after a cut, on a disk that is recorded as well."""

    def trouble(self, acknowledged: int) -> str:
        """Return what is wrong after a cut with as many marks, '' for nothing."""

    def close(self) -> None:
        """Let everything go."""


class _Recording:
    """One life, and the disks that power cuts leave of it."""

    def __init__(self, work: Work, result: Result, number: int, kind: str, system: str) -> None:
        self.work, self.result, self.kind, self.system = work, result, kind, system
        self.chance = random.Random(f"{work.seed}/{number}")
        self.options = self.chance.choice(OPTIONS[system])
        self.disk = f"{system} {self.options}".strip()
        self.title = f"{self.disk} {kind}, recording {number} of seed {work.seed}"

    def visit(self, states: int) -> None:
        """Live, and cut the power at so many moments; some of them while the life goes on after another one."""
        began = time.monotonic()
        image = self.work.scratch / "disk.img"
        new_disk(image, self.system)
        with contextlib.ExitStack() as held:
            with recorded(self.work.scratch, self.system, image, self.options) as disk:
                life = held.enter_context(contextlib.closing(self._life(disk)))
                with _others(disk.folder, self.chance):
                    life.live(STEPS if states > STATES_MIN else STEPS // 2)
                events = disk.events()
            self.result.count("seconds of recording", round(time.monotonic() - began))
            found = moments(events, self.chance)
            early = [each for each in found if not each.acknowledged]
            found = [each for each in found if each.acknowledged]
            found += self.chance.sample(early, min(len(early), states // 12))
            chosen = sorted(self.chance.sample(found, min(len(found), states)))
            self._cut(life, Cutter(disk.first, events), chosen, "")
            if isinstance(life, StoreLife | ClientLife):
                self._cut_liar(life, Cutter(disk.first, events), chosen[::LIES_EVERY])
            self._cut_again(life, Cutter(disk.first, events), self.chance.choice(chosen), states // 6)

    def _life(self, disk: Recorded) -> Life:
        if self.kind == CLIENT:
            return ClientLife(disk.folder, self.work.scratch / "beside", disk.mark, self.chance)
        if self.kind == FETCH:
            return FetchLife(disk.folder, self.work.scratch / "beside", disk.mark, self.chance)
        return StoreLife(disk.folder / "data", disk.mark, self.chance, self.kind)

    def _cut_liar(self, life: StoreLife | ClientLife, cutter: Cutter, chosen: list[Moment]) -> None:
        """Cut the power of a disk whose last barriers before each moment were none."""
        image, folder = self.work.scratch / "lie.img", self.work.scratch / "disk"
        for moment in cutter.before_lies(chosen, self.chance):
            if not self.work.goes_on(self.result):
                return
            words = cutter.cut(moment, self.chance.choice(SUBSETS), self.chance, image)
            what = "not mounted"
            try:
                with mounted(image, folder, self.system):
                    what, trouble = life.trouble_after_lie(moment.acknowledged)
            except OSError as error:
                trouble = "" if what == "not mounted" else repr(error)
            except Exception:  # noqa: BLE001 - whatever is raised is the fault
                trouble = traceback.format_exc()[-1500:]
            self.result.points += 1
            self.result.count(f"a lie to a {'client' if isinstance(life, ClientLife) else 'store'}: {what}")
            if trouble:
                where = f"cut at event {moment.number} of {len(cutter.events)} after a lie, {words} writes there"
                self.result.faults.append(f"{self.title}: {where}: {trouble}")
                self._keep(image)

    def _cut_again(self, life: Life, cutter: Cutter, moment: Moment, states: int) -> None:
        """Cut the power while a store or a client recovers from a cut."""
        if not states or not self.work.goes_on(self.result):
            return
        image = self.work.scratch / "again.img"
        words = cutter.cut(moment, "some", self.chance, image)
        with recorded(self.work.scratch, self.system, image, self.options) as disk:
            life.recover(disk.mark, moment.acknowledged)
            events = disk.events()
        known = [
            each._replace(acknowledged=max(each.acknowledged, moment.acknowledged))
            for each in moments(events, self.chance)
        ]
        chosen = sorted(self.chance.sample(known, min(len(known), states)))
        title = f"recovering from a cut at event {moment.number} with {words} writes there, "
        self._cut(life, Cutter(disk.first, events), chosen, title)

    def _cut(self, life: Life, cutter: Cutter, chosen: list[Moment], title: str) -> None:
        image = self.work.scratch / "cut.img"
        for moment in chosen:
            if not self.work.goes_on(self.result):
                return
            subset = self.chance.choice(SUBSETS) if cutter.pending(moment) else "all"
            words = cutter.cut(moment, subset, self.chance, image)
            trouble = self._trouble(life, image, moment)
            self.result.points += 1
            self.result.count(self.disk)
            self.result.count(f"{self.system} {subset if cutter.pending(moment) else 'nothing pending'}")
            self.result.count("in recovery" if title else f"in a life of {self.kind}")
            if trouble:
                where = f"{title}cut at event {moment.number} of {len(cutter.events)}, {words} writes there"
                self.result.faults.append(f"{self.title}: {where}: {trouble}")
                self._keep(image)

    def _trouble(self, life: Life, image: Path, moment: Moment) -> str:
        folder = self.work.scratch / "disk"
        try:
            with mounted(image, folder, self.system):
                return life.trouble(moment.acknowledged)
        except Exception:  # noqa: BLE001 - whatever is raised is the fault
            return traceback.format_exc()[-1500:]

    def _keep(self, image: Path) -> None:
        """Keep a disk that something is wrong with, where the environment says so."""
        if folder := os.environ.get("POWERCUT_KEEP"):
            name = f"{len(self.result.faults)}-{self.system}-{self.kind}.img"
            subprocess.run(["cp", "--sparse=always", str(image), str(Path(folder) / name)], check=True)


@contextmanager
def _others(folder: Path, chance: random.Random) -> Iterator[None]:
    """Let the rest of the machine use the same disk meanwhile, in some lives.

    Another program's fsyncs commit our renames; the kernel writes files back when it likes, without a barrier.
    """
    done, pauses = threading.Event(), [chance.random() * 0.02 for _ in range(50)]
    commits, writes_back = chance.random() < 0.3, chance.random() < 0.3

    def use() -> None:
        with (folder / "other").open("wb", buffering=0) as file:
            for pause in itertools.cycle(pauses):
                if done.wait(pause):
                    return
                if commits:
                    file.write(b"x")
                    os.fsync(file.fileno())
                if writes_back:
                    _write_back(folder, pause)

    thread = threading.Thread(target=use, daemon=True)
    if commits or writes_back:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if thread.ident:
            thread.join()


def _write_back(folder: Path, chance: float) -> None:
    """Begin to write some files; no database, whose locks would go with the descriptor."""
    for above, _, names in os.walk(folder):
        for name in names:
            if ".db" not in name and hash((name, chance)) % 3 == 0:
                with contextlib.suppress(OSError), (Path(above) / name).open("rb") as file:
                    start_writeback(file.fileno())


if __name__ == "__main__":
    main()
