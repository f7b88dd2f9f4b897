"""Access: who may do what; a database of its own, which commands write while a server reads it (spec ST-110)."""

from __future__ import annotations

import enum
import hmac
import os
import re
import secrets
import sqlite3
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from deltasync import db
from deltasync.core.errors import Forbidden, NotFound, Unauthorized
from deltasync.core.hashing import digest_of
from deltasync.disk import space_guard
from deltasync_server.tenants import DEFAULT, Tenant

DATABASE = "access.db"
SECRET_BYTES = 32
_TOKEN = re.compile(r"dst_([0-9a-f]{12})_([0-9a-f]{64})")
_MIGRATIONS = (
    """
    CREATE TABLE tokens (
        id TEXT PRIMARY KEY,
        digest BLOB NOT NULL,
        tenant TEXT NOT NULL,
        scopes TEXT NOT NULL,
        label TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        expires_at INTEGER,
        revoked_at INTEGER
    ) WITHOUT ROWID
    """,
)


class Scope(enum.StrEnum):
    """What a token is good for."""

    READ = "read"
    """Look at the tenant's workspaces, and fetch them."""
    PUSH = "push"
    """Send to them; whoever may send may look as well."""
    RUN = "run"
    """Run commands on them."""
    ADMIN = "admin"
    """See the figures of the whole server."""


ALL = frozenset(Scope)


class TokenRow(NamedTuple):
    """A token as it is remembered: its secret is not; times are seconds since 1970."""

    id: str
    digest: bytes
    tenant: Tenant
    scopes: str
    label: str
    created_at: int
    expires_at: int | None
    revoked_at: int | None

    def allowed(self) -> frozenset[Scope]:
        """Return what it is good for."""
        return frozenset(map(Scope, self.scopes.split()))

    def why_not(self, now: float) -> str | None:
        """Say why it is good for nothing any more; None while it is."""
        if self.revoked_at is not None:
            return "revoked"
        if self.expires_at is not None and self.expires_at <= now:
            return "expired"
        return None


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a request."""

    tenant: Tenant = DEFAULT
    scopes: frozenset[Scope] = ALL
    token: str | None = None
    """The id of the token that was shown; None where none is needed."""

    def require(self, scope: Scope) -> None:
        """Raise Forbidden unless the caller may do that."""
        is_allowed = scope in self.scopes or (scope is Scope.READ and Scope.PUSH in self.scopes)
        if not is_allowed:
            raise Forbidden(f"this token is not good for that: it lacks the scope {scope.value!r}")


LOCAL = Caller()
"""Who reaches a server that asks for no token: nobody but this machine's users can."""


class Access:
    """The only owner of the connection to DATA/access.db; several threads may use it."""

    def __init__(self, data: Path) -> None:
        """Open the database, or make it, readable for its owner only."""
        path = data / DATABASE
        with space_guard(data):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._connection = db.connect(path, _MIGRATIONS)
        self._path = path
        self._lock = threading.Lock()

    def create(
        self, tenant: Tenant, scopes: Collection[Scope], label: str, expires_at: int | None
    ) -> tuple[TokenRow, str]:
        """Make a token; its text is returned this once and kept nowhere."""
        number, secret = secrets.token_hex(6), secrets.token_bytes(SECRET_BYTES)
        words = " ".join(sorted(scopes))
        row = TokenRow(number, digest_of(secret), tenant, words, label, int(time.time()), expires_at, None)
        with self._writing() as connection:
            connection.execute("INSERT INTO tokens VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
        return row, f"dst_{number}_{secret.hex()}"

    def tokens(self) -> list[TokenRow]:
        """Return every token there ever was, the oldest first."""
        with self._using() as connection:
            rows = connection.execute(f"SELECT {_TOKEN_COLUMNS} FROM tokens ORDER BY created_at, id").fetchall()
        return [TokenRow._make(row) for row in rows]

    def revoke(self, token_id: str) -> TokenRow:
        """End a token for good; revoking again changes nothing."""
        with self._writing() as connection:
            update = "UPDATE tokens SET revoked_at = ? WHERE id = ? AND revoked_at IS NULL"
            connection.execute(update, (int(time.time()), token_id))
        row = self._row(token_id)
        if row is None:
            raise NotFound(f"there is no token {token_id!r}; `deltasync-server token ls` lists them")
        return row

    def caller(self, text: str) -> Caller:
        """Return who shows a token, or raise Unauthorized, in the same words for one that never was (spec H-90)."""
        found = _TOKEN.fullmatch(text)
        row = self._row(found[1]) if found else None
        secret = bytes.fromhex(found[2]) if found else bytes(SECRET_BYTES)
        is_right = hmac.compare_digest(digest_of(secret), row.digest if row else bytes(SECRET_BYTES))
        if row is None or not is_right:
            raise Unauthorized("the token is not one of this server's")
        return _caller(row)

    def require_still(self, caller: Caller) -> None:
        """Raise Unauthorized where a caller's token was revoked, or its time ran out, since it was shown."""
        if caller.token is not None:
            row = self._row(caller.token)
            if row is None:
                raise Unauthorized("the token is not one of this server's")
            _caller(row)

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _row(self, token_id: str) -> TokenRow | None:
        with self._using() as connection:
            row = connection.execute(f"SELECT {_TOKEN_COLUMNS} FROM tokens WHERE id = ?", (token_id,)).fetchone()
        return TokenRow._make(row) if row else None

    @contextmanager
    def _using(self) -> Iterator[sqlite3.Connection]:
        try:
            with self._lock:
                yield self._connection
        except sqlite3.DatabaseError as error:
            raise db.damaged(self._path, error) from error

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._using() as connection, db.transaction(connection):
            yield connection


def _caller(row: TokenRow) -> Caller:
    if (reason := row.why_not(time.time())) is not None:
        raise Unauthorized(f"the token was {reason}" if reason == "revoked" else f"the token has {reason}")
    return Caller(row.tenant, row.allowed(), row.id)


_TOKEN_COLUMNS = ", ".join(TokenRow._fields)
