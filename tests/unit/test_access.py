"""Tokens: whatever is wrong with one, it is found out by the same steps."""

from __future__ import annotations

from pathlib import Path

from steps import steps_of

from deltasync_server.access import SECRET_BYTES, Access, Scope
from deltasync_server.tenants import DEFAULT

ASKS = ("Connection.execute", "Cursor.fetchone", "digest_of", "compare_digest")


def test_every_wrong_token_is_found_out_by_the_same_steps(tmp_path: Path) -> None:
    """One question to the database, one digest, and one comparison in constant time of two digests of one length."""
    with Access(tmp_path) as access:
        row, right = access.create(DEFAULT, [Scope.READ], "", None)
        gone, revoked = access.create(DEFAULT, [Scope.READ], "", None)
        access.revoke(gone.id)
        start, _, secret = right.rpartition("_")
        wrong = {
            "the first digit": f"{start}_{'1' if secret[0] == '0' else '0'}{secret[1:]}",
            "the last digit": f"{start}_{secret[:-1]}{'1' if secret[-1] == '0' else '0'}",
            "the secret of another": f"{start}_{revoked.rpartition('_')[2]}",
            "another secret of one that was revoked": f"dst_{gone.id}_{secret}",
            "no such token": f"dst_{'0' * 12}_{secret}",
            "none at all": "hello",
            "too long": right + "0",
        }
        reader = access._reader
        taken = {what: steps_of(lambda text=text: access.caller(text), [reader]) for what, text in wrong.items()}
    for what, steps in taken.items():
        asked = [step for step in steps if step in ASKS or step.startswith("SELECT ")]
        assert [step.partition(" ")[0] for step in asked] == [*ASKS, "SELECT"], what
        assert "Unauthorized: the token is not one of this server's" in steps, what
    known = [taken[what] for what in ("the first digit", "the last digit", "the secret of another")]
    assert known == known[:1] * 3
    assert len(row.digest) == len(gone.digest) == SECRET_BYTES
