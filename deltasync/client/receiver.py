"""What a push is told: how far it may go, and what a receiver of bundles can do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from deltasync.client import outbox
from deltasync.core import wire
from deltasync.core.errors import DeltasyncError, RootMismatch
from deltasync.core.metadata import Manifest

WAIT_SECONDS = 300.0
"""How long a push waits for the server's plain tree after its last receipt."""


class Transport(Protocol):
    """A receiver of bundles."""

    url: str
    sent_bytes: int
    requests: int
    max_retries: int
    has_cache: bool
    """Whether it can say what it lacks; a folder cannot."""

    @property
    def link_bytes_per_second(self) -> float:
        """What the link to it carries, by its limit or as far as was measured; 0 where neither is known."""

    def workspace(self, name: str, *, tree_sequence: int | None = None, wait: float = 0.0) -> wire.WorkspaceState:
        """Return a workspace's head."""

    def missing(self, name: str, digests: Sequence[str]) -> list[str]:
        """Return those of the digests whose content must be sent."""

    def sizes(self, name: str, sizes: Sequence[int]) -> list[int]:
        """Return those of the sizes, in bytes, of which the receiver may have some content."""

    def directory(self, name: str, digest: bytes) -> bytes:
        """Return the body of a directory object of the receiver's tree."""

    def sequences(self, name: str) -> list[wire.KeptSequence]:
        """Return the sequences that the receiver remembers, oldest first."""

    def recipe(self, name: str, digest: bytes, average_bytes: int) -> bytes:
        """Return the packed list of the chunks of a content that the receiver holds."""

    def send_bundle(
        self,
        name: str,
        identity: bytes,
        chunks: Iterable[bytes],
        *,
        take_over: bool = False,
        wait: float = 0.0,
        patience: float = 0.0,
    ) -> wire.Receipt:
        """Send a bundle once and return its receipt.

        wait: for how many seconds the answer may wait for the plain tree. patience: how many more it may take.
        """

    def back_off(self, attempt: int, error: DeltasyncError | None = None) -> None:
        """Wait before another attempt, after an error."""

    def close(self) -> None:
        """Let connections go."""


def check_receipt(receipt: wire.Receipt, name: str, manifest: Manifest, identity: bytes) -> None:
    """Raise RootMismatch unless a receipt is one for this bundle in this workspace (spec S-11, H-142)."""
    if receipt.root != manifest.root:
        raise RootMismatch(
            f"the server computed another tree for bundle {manifest.sequence_number}; "
            "run `deltasync verify` and `deltasync-server check`",
            expected_root=manifest.root,
            got_root=receipt.root,
        )
    stated = (receipt.workspace, receipt.epoch, receipt.sequence, receipt.identity)
    if stated != (name, manifest.epoch, manifest.sequence_number, identity.hex()):
        raise RootMismatch(f"the server's receipt is not for bundle {manifest.sequence_number}, which was sent")


@dataclass(frozen=True, slots=True)
class PushOptions:
    """What a push may do, and how far it goes."""

    workspace: str | None = None
    """The workspace's name; None is the remembered one, or the folder's."""
    allow_mass_delete: bool = False
    take_over: bool = False
    no_delete: bool = False
    """What the sealed tree has stays there, also where an earlier look at the folder recorded that it is gone."""
    delete_excluded: bool = False
    """What is ignored is no reason to keep what the server has under its name."""
    dry_run: bool = False
    seal_offline: bool = False
    """With no answer from the server, go on sealing into bundle files (`watch`) instead of failing (`push`)."""
    outbox_limit: int = outbox.LIMIT_BYTES
    keep_sent_seconds: float = 0.0
    level: int | None = None
    """Of zstd; None is what suits the content and the link."""
    wait: float = WAIT_SECONDS
    """How long to wait for the plain tree after the last receipt; 0 returns after the receipt."""
    explain: bool = False
    """Say of each operation why it went out."""
