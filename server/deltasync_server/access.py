"""Access: who may do what; a database of its own, which commands write while a server reads it (spec ST-110)."""

from __future__ import annotations

import enum
import hmac
import math
import os
import re
import secrets
import sqlite3
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Self

from deltasync import db
from deltasync.core.errors import Corrupt, Forbidden, NotFound, Unauthorized
from deltasync.core.hashing import digest_of
from deltasync.core.pairing import CODE_BYTES, Code, new_code
from deltasync.disk import space_guard
from deltasync_server.tenants import DEFAULT, Tenant

DATABASE = "access.db"
SECRET_BYTES = 32
TRIES = 5
CLAIM_SECONDS = 600
"""So long a token that came of a pairing waits for its first use: its client may never have got it."""
NUMBER_MIN, NUMBER_MAX = 100_000, 1_000_000
NO_PAIRING = "the pairing code is wrong, was used or is over; `deltasync-server pair` makes another"
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
        revoked_at INTEGER,
        certificate BLOB
    ) WITHOUT ROWID;
    CREATE UNIQUE INDEX tokens_certificate ON tokens (certificate) WHERE certificate IS NOT NULL;
    CREATE TABLE pairings (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        secret TEXT,
        tenant TEXT NOT NULL,
        scopes TEXT NOT NULL,
        label TEXT NOT NULL,
        expires_at INTEGER NOT NULL,
        tries INTEGER NOT NULL,
        token TEXT
    )
    """,
    """
    ALTER TABLE tokens ADD COLUMN claim_by INTEGER
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
    certificate: bytes | None = None
    """The SHA-256 of the client certificate that stands for it as well."""
    claim_by: int | None = None
    """Until when it must be used for the first time; None where it was, or need not be."""

    def allowed(self) -> frozenset[Scope]:
        """Return what it is good for."""
        return frozenset(map(Scope, self.scopes.split()))

    def why_not(self, now: float) -> str | None:
        """Say why it is good for nothing any more; None while it is."""
        if self.revoked_at is not None:
            return "revoked"
        if any(end is not None and end <= now for end in (self.expires_at, self.claim_by)):
            return "expired"
        return None


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a request."""

    tenant: Tenant = DEFAULT
    scopes: frozenset[Scope] = ALL
    token: str | None = None
    """The id of the token that was shown; None where none is needed."""
    digest: bytes = field(default=b"", repr=False)
    """Of its secret at that time: another one may take its place."""
    is_fresh: bool = False
    """The token is used for the first time."""

    def require(self, scope: Scope) -> None:
        """Raise Forbidden unless the caller may do that."""
        is_allowed = scope in self.scopes or (scope is Scope.READ and Scope.PUSH in self.scopes)
        if not is_allowed:
            raise Forbidden(f"this token is not good for that: it lacks the scope {scope.value!r}")


LOCAL = Caller()
"""Who reaches a server that asks for no token: nobody but this machine's users can."""


class Leave:
    """Whether a caller may go on with what takes long; its token is looked up again only after a change."""

    def __init__(self, access: Access, caller: Caller) -> None:
        self._access, self._caller = access, caller
        self._version, self._expires_at = -1, math.inf

    def require(self) -> None:
        """Raise Unauthorized where the token is good no longer (spec H-104)."""
        if self._caller.token is None:
            return
        version = self._access.version()  # before the row: a change in between is looked up next time
        if version != self._version or time.time() >= self._expires_at:
            expires_at = self._access.require_still(self._caller)
            self._version, self._expires_at = version, math.inf if expires_at is None else expires_at


class PairingRow(NamedTuple):
    """A code that was given out: pending until it is used, over, or tried too often; then its secret is gone."""

    number: int
    secret: str | None
    tenant: Tenant
    scopes: str
    label: str
    expires_at: int
    tries: int
    """How often it may still be tried."""
    token: str | None
    """The id of what the client got."""


class Access:
    """The only owner of the connections to DATA/access.db, for several threads; nobody reads behind a writer."""

    def __init__(self, data: Path) -> None:
        """Open the database, or make it, readable for its owner only."""
        path = data / DATABASE
        with space_guard(data):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._connection = db.connect(path, _MIGRATIONS)
            db.make_private(path)
            self._reader = db.connect(path, _MIGRATIONS, read_only=True)
        self._path = path
        self._lock, self._read_lock = threading.Lock(), threading.Lock()

    def create(
        self, tenant: Tenant, scopes: Collection[Scope], label: str, expires_at: int | None
    ) -> tuple[TokenRow, str]:
        """Make a token; its text is returned this once and kept nowhere."""
        number, secret = secrets.token_hex(6), secrets.token_bytes(SECRET_BYTES)
        words = " ".join(sorted(scopes))
        row = TokenRow(number, digest_of(secret), tenant, words, label, int(time.time()), expires_at, None)
        with self._writing() as connection:
            connection.execute(_INSERT_TOKEN, row)
        return row, _text(number, secret)

    def tokens(self) -> list[TokenRow]:
        """Return every token there ever was, the oldest first."""
        with self._reading() as connection:
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
        """Return who shows a token, or raise Unauthorized, in the same words for one that never was (spec H-100)."""
        found = _TOKEN.fullmatch(text)
        row = self._row(found[1] if found else "")  # what is wrong with a token, the time of the answer does not tell
        secret = bytes.fromhex(found[2]) if found else bytes(SECRET_BYTES)
        is_right = hmac.compare_digest(digest_of(secret), row.digest if row else bytes(SECRET_BYTES))
        if row is None or not is_right:
            raise Unauthorized("the token is not one of this server's")
        return _caller(row)

    def require_still(self, caller: Caller) -> int | None:
        """Raise Unauthorized where a caller's token was revoked or rotated, or its time ran out, since it was shown.

        Returns when it ends, in seconds since 1970; None for never.
        """
        if caller.token is None:
            return None
        row = self._row(caller.token)
        if row is None or row.digest != caller.digest:
            raise Unauthorized("the token is not one of this server's")
        _caller(row)
        return row.expires_at

    def version(self) -> int:
        """Return a number that is another one after each change, by whichever process; no page is read for it."""
        with self._reading() as connection:
            return int(connection.execute("PRAGMA data_version").fetchone()[0])

    def certified(self, sha256: bytes) -> Caller:
        """Return who shows a client certificate of this server's CA, or raise Unauthorized (spec H-124)."""
        with self._reading() as connection:
            select = f"SELECT {_TOKEN_COLUMNS} FROM tokens WHERE certificate = ?"
            row = connection.execute(select, (sha256,)).fetchone()
        if row is None:
            raise Unauthorized("the client certificate is not one that this server takes any more")
        return _caller(TokenRow._make(row))

    def claim(self, caller: Caller) -> None:
        """Let a token that came of a pairing stay: its client has it (spec H-123)."""
        with self._writing() as connection:
            update = "UPDATE tokens SET claim_by = NULL WHERE id = ? AND digest = ? AND claim_by > ?"
            connection.execute(update, (caller.token, caller.digest, int(time.time())))

    def rotate(self, caller: Caller, digest: bytes, certificate: bytes | None) -> None:
        """Put another secret and certificate in the place of a caller's; what it had is good for nothing from then on.

        digest: of the new secret, which its owner has made and keeps.
        """
        with self._writing() as connection:
            # The old digest as well: a request that came with a stolen secret, and waited, must not undo the rotation.
            update = "UPDATE tokens SET digest = ?, certificate = ? WHERE id = ? AND digest = ? AND revoked_at IS NULL"
            if not connection.execute(update, (digest, certificate, caller.token, caller.digest)).rowcount:
                raise Unauthorized("there is no token to put another in the place of")

    # --- pairings ---

    def open_pairing(self, tenant: Tenant, scopes: Collection[Scope], label: str, seconds: float) -> Code:
        """Make a code that lets one client in, once; its number is random, so that no stranger uses up its tries."""
        with self._writing() as connection:
            connection.execute("UPDATE pairings SET secret = NULL WHERE expires_at <= ?", (int(time.time()),))
            taken = {number for (number,) in connection.execute("SELECT number FROM pairings")}
            while (number := NUMBER_MIN + secrets.randbelow(NUMBER_MAX - NUMBER_MIN)) in taken:
                pass
            code = new_code(number, secrets.token_bytes(CODE_BYTES))
            values = (*code, tenant, " ".join(sorted(scopes)), label, int(time.time() + seconds), TRIES, None)
            connection.execute(f"INSERT INTO pairings VALUES ({', '.join('?' * len(values))})", values)
        return code

    def attempt(self, number: int) -> Code:
        """Return the code that somebody tries, once for each call; raises Unauthorized for one that is not open.

        The try is counted before anything is answered: a listener cannot have one for nothing.
        """
        with self._writing() as connection:
            update = "UPDATE pairings SET tries = tries - 1 WHERE number = ? AND tries > 0 AND expires_at > ?"
            is_open = connection.execute(update, (number, int(time.time()))).rowcount
            row = connection.execute("SELECT secret FROM pairings WHERE number = ?", (number,)).fetchone()
        if not (is_open and row and row[0]):
            raise Unauthorized(NO_PAIRING)
        return Code(number, row[0])

    def pair(self, number: int, certificate: bytes | None) -> str:
        """Use a code up and return the token that its client gets, which its certificate stands for as well."""
        token_id, secret, now = secrets.token_hex(6), secrets.token_bytes(SECRET_BYTES), int(time.time())
        with self._writing() as connection:
            select = (
                f"SELECT {_PAIRING_COLUMNS} FROM pairings WHERE number = ? AND secret IS NOT NULL AND expires_at > ?"
            )
            found = connection.execute(select, (number, now)).fetchone()
            if found is None:
                raise Unauthorized(NO_PAIRING)
            row = PairingRow._make(found)
            kept = (row.tenant, row.scopes, row.label, now, None, None, certificate, now + CLAIM_SECONDS)
            made = TokenRow(token_id, digest_of(secret), *kept)
            connection.execute(_INSERT_TOKEN, made)
            connection.execute("UPDATE pairings SET secret = NULL, token = ? WHERE number = ?", (token_id, number))
        return _text(token_id, secret)

    def require_sound(self) -> None:
        """Raise Corrupt where SQLite's own check finds the database damaged."""
        with self._reading() as connection:
            if not db.is_sound(connection):
                raise Corrupt(f"{self._path} is damaged; restore it, or move it away and make new tokens")

    def close(self) -> None:
        """Close the database."""
        with self._read_lock, self._lock:
            self._reader.close()
            self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _row(self, token_id: str) -> TokenRow | None:
        with self._reading() as connection:
            row = connection.execute(f"SELECT {_TOKEN_COLUMNS} FROM tokens WHERE id = ?", (token_id,)).fetchone()
        return TokenRow._make(row) if row else None

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """Lend the connection of the event loop, which waits for no writer, no disk and no other process's lock."""
        with self._read_lock, self._explained():
            yield self._reader

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._explained(), db.transaction(self._connection):
            yield self._connection

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            raise db.damaged(self._path, error) from error


def _caller(row: TokenRow) -> Caller:
    if (reason := row.why_not(time.time())) is not None:
        raise Unauthorized(f"the token was {reason}" if reason == "revoked" else f"the token has {reason}")
    return Caller(row.tenant, row.allowed(), row.id, row.digest, is_fresh=row.claim_by is not None)


def _text(token_id: str, secret: bytes) -> str:
    return f"dst_{token_id}_{secret.hex()}"


_TOKEN_COLUMNS = ", ".join(TokenRow._fields)
_INSERT_TOKEN = f"INSERT INTO tokens VALUES ({', '.join('?' * len(TokenRow._fields))})"
_PAIRING_COLUMNS = ", ".join(PairingRow._fields)
