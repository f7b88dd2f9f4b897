"""Open a store for a command; every reason why it cannot be used is one sentence (spec H-53, H-55, H-56)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deltasync.core.errors import HostBusy, NotFound, UsageError
from deltasync.core.names import shown
from deltasync.disk import FULL
from deltasync_server import access, audit
from deltasync_server.config import StoreConfig
from deltasync_server.receive import Store

DATABASE = "state.db"
OWN = frozenset(
    {"lock", "journal", "cache", "staging", "workspaces", "tenants", "quarantine", "bundles", "uploads", "parts"}
    | {"tls", "run", "lost+found"}
)
"""What may lie in a folder that is to become a store: what an interrupted first start left, or a fresh disk."""


def no_store(data: Path) -> NotFound:
    """Return the error for a folder that is no store."""
    return NotFound(f"there is no store at {shown(str(data))}; say where it lies: --data DIR")


@contextmanager
def open_store(config: StoreConfig, *, create: bool = True) -> Iterator[Store]:
    """Hold a store that is recovered, and close it after the block; raises NotFound where `create` would be needed."""
    if not create and not (config.data / DATABASE).is_file():
        raise no_store(config.data)
    with explained(config.data):
        require_ours(config.data)
        store = Store(config)
    with store:
        store.recover()
        yield store


def require_data(data: Path, *, create: bool) -> None:
    """See to it that a folder is a store's, or may become one; raises NotFound where `create` would be needed."""
    if not create and not data.is_dir():
        raise no_store(data)
    with explained(data):
        require_ours(data)
        data.mkdir(0o755, parents=True, exist_ok=True)


@contextmanager
def explained(data: Path) -> Iterator[None]:
    """Turn what the system says of a folder that cannot be used into one sentence."""
    try:
        yield
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"{shown(str(data))} is no folder") from error
    except OSError as error:
        if error.errno in FULL:
            raise
        raise HostBusy(f"{shown(str(data))} cannot be used: {error.strerror or error}") from error


def require_ours(data: Path) -> None:
    """Refuse a folder that holds other things: a mistyped --data must not be filled with a store."""
    if not data.exists() or (data / DATABASE).exists():
        return
    for path in data.iterdir():
        if path.name not in OWN and not path.name.startswith((DATABASE, access.DATABASE, audit.NAME)):
            sentence = "is no store of deltasync-server and holds other things; name an empty folder"
            raise UsageError(f"{shown(str(data))} {sentence}")
