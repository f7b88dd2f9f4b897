"""Pairing: how two sides that share a short code prove it to each other, and agree on whose certificate they saw.

SPAKE2 turns the code into a key that a listener cannot test guesses against; each side then confirms that
it has the key and saw the same certificate, so that whoever stands between them with another one is found out.
"""

from __future__ import annotations

import enum
import hmac
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from deltasync.core.errors import Unauthorized, UsageError
from deltasync.core.hashing import DIGEST_BYTES
from deltasync.core.names import shown

if TYPE_CHECKING:
    from spake2 import SPAKE2_A

CODE_BYTES = 5
MESSAGE_BYTES = 33
_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
"""Crockford's base 32: no I, L, O and U."""
_ALIKE = str.maketrans("ILO", "110")
_CODE = re.compile(rf"([0-9]{{1,9}})-([{_ALPHABET}]{{4}})-?([{_ALPHABET}]{{4}})")
_CLIENT, _SERVER = b"deltasync client", b"deltasync-server"
_CONTEXT = b"deltasync pairing 1"


class Side(enum.Enum):
    """Who takes part."""

    CLIENT = _CLIENT
    SERVER = _SERVER


class Code(NamedTuple):
    """What people carry from one side to the other: which pairing it is, and its secret of 40 bits."""

    number: int
    secret: str

    def __str__(self) -> str:
        return f"{self.number}-{self.secret[:4]}-{self.secret[4:]}"


def new_code(number: int, random: bytes) -> Code:
    """Return the code of a pairing. random: five random bytes."""
    value = int.from_bytes(random[:CODE_BYTES], "big")
    return Code(number, "".join(_ALPHABET[value >> shift & 31] for shift in range(35, -1, -5)))


def parse_code(text: str) -> Code:
    """Return the code that somebody typed, or raise UsageError; case, and letters that look alike, do not matter."""
    number, gap, secret = text.strip().upper().partition("-")
    found = _CODE.fullmatch(number + gap + secret.translate(_ALIKE))
    if not found:
        raise UsageError(
            f"{shown(text)} is no pairing code; it looks like 482913-K3QM-9XZ2, as `deltasync-server pair` says"
        )
    return Code(int(found[1]), found[2] + found[3])


class Exchange:
    """One side of one attempt; `message` goes to the other side."""

    def __init__(self, side: Side, code: Code, certificate_sha256: bytes) -> None:
        """certificate_sha256: of the server's certificate, as this side sees it."""
        from spake2 import SPAKE2_A, SPAKE2_B  # it reckons its tables first, and a server seldom pairs

        kind: Callable[..., SPAKE2_A] = SPAKE2_A if side is Side.CLIENT else SPAKE2_B
        self._side = side
        self._spake = kind(str(code).encode(), idA=_CLIENT, idB=_SERVER)
        self._certificate = certificate_sha256
        self.message: bytes = self._spake.start()

    def finish(self, theirs: bytes) -> Confirmations:
        """Return what proves that both sides know the code, from the other side's message; called once."""
        from spake2.ed25519_basic import NotOnCurve
        from spake2.spake2 import SPAKEError

        try:
            if len(theirs) != MESSAGE_BYTES:
                raise ValueError(f"a message has {MESSAGE_BYTES} bytes")
            key: bytes = self._spake.finish(theirs)
        except (SPAKEError, NotOnCurve, ValueError, AssertionError) as error:
            raise Unauthorized("the other side's message is none of a pairing") from error
        messages = (self.message, theirs) if self._side is Side.CLIENT else (theirs, self.message)
        transcript = b"".join((_CONTEXT, self._certificate, *messages))
        of_client, of_server = (hmac.digest(key, each + transcript, "sha256") for each in (_CLIENT, _SERVER))
        return Confirmations(of_client, of_server)


class Confirmations(NamedTuple):
    """What each side shows to the other: equal on both where code, messages and certificate are."""

    of_client: bytes
    of_server: bytes


def is_same(first: bytes, second: bytes) -> bool:
    """Compare confirmations in a time that says nothing."""
    return len(first) == DIGEST_BYTES and hmac.compare_digest(first, second)
