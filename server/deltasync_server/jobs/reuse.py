"""Reuse: a command that ended well for the same inputs gives its result again, without being run (spec J-78, J-79)."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from deltasync.core.errors import DeltasyncError
from deltasync.core.hashing import digest_of
from deltasync.core.jobs import Returned
from deltasync.core.manifest import EMPTY_ROOT
from deltasync.core.tree import entries_of
from deltasync_server.jobs import returns
from deltasync_server.jobs.log import FRAME_BYTES_MAX, Log, LogReader
from deltasync_server.jobs.table import JobRow, note
from deltasync_server.receive import Store
from deltasync_server.state import loader
from deltasync_server.tenants import Tenant

REMEMBERED_SECONDS = 7 * 86_400.0
RESULTS_MAX = 100
"""Of a tenant; the oldest make way."""
VERSION_BYTES = 64 << 10
"""So much of what a tool says of its version counts."""
_log = logging.getLogger(__name__)


class Former(NamedTuple):
    """A job whose result is given again, and what it returned, held for who gets it now."""

    id: str
    returned: Returned | None


def key_of(db: sqlite3.Connection, job: JobRow, version: bytes, inherited: Mapping[bytes, bytes]) -> bytes:
    """Return the digest of all that a job's result depends on; places are those below inputs/ and outputs/."""
    request, load = job.request, loader(db)
    inputs: list[object] = []
    for each, (digest, is_folder) in zip(request.inputs, job.sources(), strict=True):
        what: object = digest.hex()
        if not is_folder:  # it is the digest of the folder that holds it
            name = each.path.rpartition("/")[2]
            entry = next(entry for entry in entries_of(digest, load) if entry.name == name)
            what = [entry.digest.hex(), entry.executable]
        inputs.append([each.place, each.in_place, what])
    variables = sorted((each.name, each.value) for each in request.environment)
    own = sorted((name.hex(), value.hex()) for name, value in inherited.items())
    walls = (request.sandbox, request.network)
    asked = (request.argv, variables, request.lists, request.outputs, request.gpus, request.tool_version, walls)
    return digest_of(msgspec.json.encode((job.tenant, asked, inputs, own, version.hex())))


def take(store: Store, job: JobRow, key: bytes, logs: Path) -> Former | None:
    """Have the result of a former job held for this one; None where none is remembered, or can be had any more.

    logs: the folder of the jobs' logs.
    """
    with store.state.write() as db:
        found = db.execute(
            "SELECT id, returned, result_root, log_bytes FROM jobs WHERE tenant = ? AND result_key = ? "
            "AND result_root NOTNULL AND ended > ? ORDER BY number DESC LIMIT 1",
            (job.tenant, key, int(time.time() - REMEMBERED_SECONDS)),
        ).fetchone()
        if found is None:
            return None
        former_id, packed, root, log_bytes = found
        note(db, job.id, result_root=root)  # from here on it stays, whatever becomes of the other job
    try:
        if not _is_whole(logs / former_id, log_bytes):
            _log.warning("the result of %s is not given again: its log is not whole", former_id)
            return None
        former = msgspec.json.decode(packed, type=Returned) if packed else None
        return Former(former_id, returns.again(store, job, former))
    except DeltasyncError as error:  # such as content that was damaged since: the command makes it once more
        _log.warning("the result of %s cannot be given again: %s", former_id, error)
        return None
    finally:
        with store.state.write() as db:
            note(db, job.id, result_root=None)  # the pinned sequence has it


def remembered(key: bytes | None, returned: Returned | None, exit_code: int | None) -> dict[str, Any]:
    """Return the columns by which a job's result is found later; none where it is not to be, or is not whole."""
    if key is None or exit_code != 0 or (returned is not None and returned.problems):
        return {}
    root = bytes.fromhex(returned.root) if returned is not None else EMPTY_ROOT
    return {"result_key": key, "result_root": root}


def forget_oldest(db: sqlite3.Connection, tenant: Tenant) -> None:
    """Let go of a tenant's results beyond the newest."""
    db.execute(
        "UPDATE jobs SET result_root = NULL, result_key = NULL WHERE tenant = ?1 AND result_root NOTNULL "
        "AND number NOT IN (SELECT number FROM jobs WHERE tenant = ?1 AND result_root NOTNULL "
        "ORDER BY number DESC LIMIT ?2)",
        (tenant, RESULTS_MAX),
    )


def replay(former: Path, log: Log) -> None:
    """Say again what a former job said; where it named its session it names this one's. former: its log."""
    before, now = os.fsencode(former.name), os.fsencode(log.name)
    with contextlib.closing(LogReader(former, 0)) as reader:
        while events := reader.read(FRAME_BYTES_MAX):
            for event in events:
                log.append(event.kind, event.content.replace(before, now))


def _is_whole(path: Path, size_bytes: int) -> bool:
    """Tell whether a log has all that its job said, which may have been too much for it, or for the disk."""
    found_bytes = 0
    with contextlib.closing(LogReader(path, 0)) as reader:
        while events := reader.read(FRAME_BYTES_MAX):
            found_bytes += sum(len(event.content) for event in events)
    return found_bytes == size_bytes


def said(log: Path) -> bytes:
    """Return what a command said on both streams, in its order."""
    found = bytearray()
    with contextlib.closing(LogReader(log, 0)) as reader:
        while events := reader.read(FRAME_BYTES_MAX):
            found += b"".join(event.content for event in events)
    return bytes(found)
