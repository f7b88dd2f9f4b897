"""Files that are larger than what they hold, through the real programs: little is sent, and little lies on the host.

`make test` pushes one of 4 GiB; `make huge` (SPARSE_GIB=1024) one of a tebibyte, of which both sides hash every byte.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import sparse
from serving import serving
from user import User

GIB = int(os.environ.get("SPARSE_GIB", "4"))
SIZE = GIB << 30
SECONDS = 60 + 3 * GIB
MIB = 1 << 20
VERIFIED_GIB = 64
"""A larger file is not read once more: what both sides say of it must do."""


def test_a_large_sparse_file_is_sent_by_its_data(tmp_path: Path) -> None:
    """Three MiB at both ends and in the middle travel; blob and tree are as sparse; both trees are equal."""
    sparse.require_holes(tmp_path)
    root, user, noise = tmp_path / "vm", User(tmp_path / "home"), random.Random(GIB).randbytes
    sparse.write(root / "disk.img", SIZE, {at: noise(MIB) for at in (0, SIZE // 2 + 12_345, SIZE - MIB)})
    with serving(tmp_path / "data") as server:
        push = user.start("push", root, "--to", server.url, "--json")
        out, err = push.communicate(timeout=SECONDS)
        assert push.returncode == 0, err
        report = json.loads(out)
        assert 3 * MIB <= report["content_bytes"] < 4 * MIB and report["sent_bytes"] < 4 * MIB
        head = server.get("/api/v1/workspaces/vm").json
        assert (head["root"], head["tree_sequence"]) == (report["root"], 1)
        (blob,) = (server.data / "cache").glob("*/*")
        for place in (blob, server.data / "workspaces/vm/tree/disk.img"):
            assert place.stat().st_size == SIZE and sparse.space(place) < 8 * MIB
        if GIB <= VERIFIED_GIB:
            done = user.run("verify", root, "--to", server.url, "--json")
            assert (done.code, done.json["in_sync"]) == (0, True), done.err
