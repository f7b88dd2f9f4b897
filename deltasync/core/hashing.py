"""BLAKE3 digests: the one module that imports blake3."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, Self

from blake3 import blake3

if TYPE_CHECKING:
    from collections.abc import Buffer  # type: ignore[attr-defined]

DIGEST_BYTES = 32
DIRECTORY_CONTEXT = "deltasync 2026-11-21 directory object v1"


class Hasher(Protocol):
    """An incremental BLAKE3-256."""

    def update(self, data: Buffer, /) -> object:
        """Add bytes to the hash."""

    def digest(self) -> bytes:
        """Return the 32 bytes of the hash so far."""

    def copy(self) -> Self:
        """Return another hash of the same bytes, which goes on by itself."""


def hasher() -> Hasher:
    """Return a fresh incremental hash of file content."""
    return blake3()


def digest_of(data: Buffer) -> bytes:
    """Return the 32-byte BLAKE3 of bytes in memory."""
    return blake3(data).digest()


def directory_digest(body: bytes) -> bytes:
    """Return the digest of a directory object, in its own domain so that no file can pose as one (spec T-3)."""
    return blake3(body, derive_key_context=DIRECTORY_CONTEXT).digest()
