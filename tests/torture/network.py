"""A real client and a real server over a network that loses, repeats, delays, reorders and cuts: each effect once."""

from __future__ import annotations

import json
import math
import traceback
from itertools import pairwise
from random import Random
from typing import Any

import folders
import pytest
from corpus_good import noise
from desk import Desk
from serving import Served, serving

from deltasync.client import outbox, pace
from deltasync.client.transport import HttpTransport
from deltasync.core.errors import DeltasyncError
from torture.badnet import BadNet, bad_net
from torture.harness import Defect, Result, Work

NAME = "network"
GOAL = 2000
SLICE = 30
WEIGHT = 4
PUSHES = 6
"""Through the bad network, before one through a good one must bring both sides together."""
DEFECTS = (
    Defect(
        "a repeated bundle gets no receipt",
        "TR-85",
        "deltasync/core/sequence.py",
        "if recorded is not None and recorded == header.identity:",
        "if False:",
    ),
    Defect(
        "a repeat is told as if it were new",
        "TR-136",
        "server/deltasync_server/intake.py",
        "msgspec.structs.replace(recorded.receipt(), duplicate=True, tree_sequence=tree_sequence)",
        "msgspec.structs.replace(recorded.receipt(), tree_sequence=tree_sequence)",
    ),
    Defect(
        "a receipt is given, and the head stays",
        "TR-37",
        "server/deltasync_server/intake.py",
        "        self._db.execute(_UPSERT_HEAD, head)\n",
        "        head and None\n",
    ),
)


def run(work: Work) -> Result:
    """Push through a bad network again and again, and through a good one after some pushes."""
    result, random = Result(), Random(work.seed)
    with serving(work.scratch / "data") as served, pytest.MonkeyPatch.context() as patch:
        patch.setattr(pace, "QUICK_BYTES_PER_SECOND", math.inf)  # large bundles go in pieces
        with bad_net(served.port, random) as net:
            number = 0
            while work.goes_on(result):
                number += 1
                fault = _round(served, net, Desk(work.scratch / f"w{number}"), random, work, result)
                result.points = net.exchanges
                result.counts |= {f"exchanges: {way}": count for way, count in net.ways.items()}
                if fault or net.faults:
                    result.faults.append(f"round {number}: {fault} {net.faults[:3]}"[:3000])
                    net.faults.clear()
    return result


def _round(served: Served, net: BadNet, desk: Desk, random: Random, work: Work, result: Result) -> str:
    """Push some changes through the bad network, then once through a good one; returns what is wrong then."""
    try:
        for _ in range(PUSHES):
            _change(desk, random)
            net.is_bad = True
            try:
                _push(desk, net)
                result.count("pushes that came through")
            except DeltasyncError as error:
                result.count(f"pushes that ended with {error.code}")
        net.is_bad = False
        net.settle()
        _push(desk, net, allow_mass_delete=True)
        return _why_not_in_step(served, desk, net)
    except Exception:  # noqa: BLE001 - whatever else comes of a bad network is the fault
        return traceback.format_exc()[-2000:]


def _push(desk: Desk, net: BadNet, **options: Any) -> None:
    transport = HttpTransport(net.url, timeout=20, max_retries=2, pause=lambda _: None)
    try:
        desk.push(transport=transport, wait=0.0, **options)
    finally:
        transport.close()


def _change(desk: Desk, random: Random) -> None:
    for _ in range(random.choice((1, 1, 2, 4))):
        what, path = random.random(), f"{random.choice('abc')}/{random.randrange(4)}"
        if what < 0.6:
            folders.write(desk.root, path, random.randbytes(random.choice((0, 5, 5000))))
        elif what < 0.62:
            folders.write(desk.root, path, noise(str(random.random()), 9 << 20))
        elif what < 0.8 and (desk.root / path).exists():
            (desk.root / path).rename(desk.root / path.replace("/", "-"))
        elif (desk.root / path).exists() and len(list((desk.root / path).parent.iterdir())) > 1:
            (desk.root / path).unlink()


def _why_not_in_step(served: Served, desk: Desk, net: BadNet) -> str:
    name = desk.root.name
    before = net.exchanges
    head = served.get(f"/api/v1/workspaces/{name}?tree_sequence=1&wait=20").json
    head = served.get(f"/api/v1/workspaces/{name}?tree_sequence={head['sequence']}&wait=20").json
    kept = served.get(f"/api/v1/workspaces/{name}/sequences").json["sequences"]
    numbers = [each["sequence"] for each in kept]
    if numbers != list(range(head["sequence"] - len(kept) + 1, head["sequence"] + 1)):
        return f"the sequences are {numbers}, the head is {head['sequence']}"
    if [one["sequence"] for one, other in pairwise(kept) if one["root"] == other["root"]]:
        return f"a change was made twice: {kept}"
    folders.assert_same(desk.root, served.data / "workspaces" / name / "tree")
    with desk.open() as state:
        if outbox.pending(state) or outbox.head(state).acknowledged_root.hex() != head["root"]:
            return "the client does not know where the server is"
    _push(desk, net)
    again = served.get(f"/api/v1/workspaces/{name}").json
    if (again["sequence"], again["root"]) != (head["sequence"], head["root"]):
        return f"a push of nothing has moved the head: {json.dumps(again)}, {net.exchanges - before} exchanges"
    return ""
