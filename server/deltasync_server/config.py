"""What the operator chose: the settings of the store and of its routes; file < environment < flag."""

from __future__ import annotations

import enum
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from deltasync.config import parse_size
from deltasync.core import wire
from deltasync.core.errors import UsageError

ENVIRONMENT_PREFIX = "DELTASYNC_SERVER_"
LISTS = ("tls_name",)
"""Settings that a variable holds with spaces between."""
SIZES = ("quota", "tenant_quota", "job_file_bytes", "job_session_bytes", "job_log_bytes")
"""Settings that people may write as 500k, 10M or 2GiB."""
Settings = TypeVar("Settings", "StoreConfig", "ServeConfig")


class LinkMode(enum.StrEnum):
    """How a file of the plain tree shares content with its blob (spec ST-32)."""

    AUTO = "auto"
    REFLINK = "reflink"
    HARDLINK = "hardlink"
    COPY = "copy"


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """One store: where it lies, and what it keeps."""

    data: Path
    link: str = LinkMode.AUTO
    keep_sequences: int = 10
    """Sequences of each workspace whose whole tree is kept."""
    keep_bundles: bool = False
    """Keep received bundle files under DATA/bundles instead of dropping them after their checkpoint."""
    limits: wire.Limits = field(default_factory=wire.Limits)
    keeps_streams: bool = False
    """Keep the parts of files that have not come whole also where they could give way: nobody sends them again."""
    low_disk_bytes: int = 512 * 2**20
    """Free space that a received bundle may not use; never more than a twentieth of the disk."""
    low_disk_inodes: int = 10_000
    """As many inodes as that; never more than a twentieth of the disk's (spec ST-134)."""
    quota: int | None = None
    """What everything below DATA may take (spec ST-131)."""
    tenant_quota: int | None = None
    """The content that each tenant may hold (spec H-108)."""
    tenant_files: int | None = None
    """How many files the workspaces of each tenant may have."""
    evict_after_seconds: float = 900.0
    """Content that nothing needs stays at least so long, also when its room is needed (spec ST-133)."""
    gap_seconds: float = 1.0
    """How long a bundle whose predecessor is missing waits for it to begin to arrive, on another connection."""
    quiet_seconds: float = 5.0
    """A checkpoint begins after this long without a received bundle."""
    journal_bytes: int = 4 * 2**30
    """Beyond this much journal a checkpoint begins at once."""
    scrub_bytes: int = 8 * 2**20
    """What the scrub reads of the cache in a second; 0 for no scrub (spec ST-120)."""
    scrub_seconds: float = 7 * 86_400.0
    """How long from the beginning of one pass to that of the next."""
    scrub_after_seconds: float = 600.0
    """How long a server runs before its scrub goes on."""
    upload_seconds: float = 3600.0
    """An upload in pieces is forgotten this long after its last piece."""
    upload_sync_bytes: int = 64 * 2**20
    """Pieces are made durable in this much at a time: a bundle of usual size is applied first, and written once."""
    upload_bytes: int = 1 << 40
    """What all unfinished uploads may hold."""
    slots: int = 4
    """Jobs that run at once."""
    sessions_dir: Path | None = None
    """Where sessions of jobs are made; by default DATA/sessions (spec J-42)."""
    job_user: str | None = None
    """Who runs the commands of jobs; by default whoever runs the server."""
    trust_jobs: bool = False
    """Commands never write through hard links of blobs, so inputs may be such (spec J-43)."""
    sandbox: bool = False
    """Every command is shut in, whether that was asked for or not (spec J-86)."""
    job_file_bytes: int = 50 * 10**9
    """What one file of a job's inputs or outputs may have (spec J-33)."""
    job_session_bytes: int = 100 * 10**9
    """What all inputs of a job may have."""
    job_sessions: int = 10
    """Sessions at once, those that are kept after their jobs among them."""
    tenant_sessions: int | None = None
    """Of those, how many a tenant may keep after its jobs; by default half."""
    tenant_queued: int = 500
    """How many jobs of a tenant may wait for their turn."""
    job_seconds: float = 86_400.0
    """How long a command may run."""
    job_log_bytes: int = 64 * 2**20
    """What is kept of a job's output on its two streams (spec J-47)."""

    @property
    def sessions(self) -> Path:
        """The folder in which sessions are made."""
        return self.sessions_dir or self.data / "sessions"

    @property
    def tenant_kept_max(self) -> int:
        """How many sessions a tenant may keep after its jobs (spec J-33)."""
        return max(1, self.job_sessions // 2) if self.tenant_sessions is None else self.tenant_sessions


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """The routes: where they listen, and what a request may take."""

    listen: str = "127.0.0.1:8080"
    """HOST:PORT, or unix:/path."""
    insecure: bool = False
    """Answer without encryption on an address that other machines reach."""
    tls: bool | None = None
    """Encrypt; by default where other machines reach the address, or a certificate is given (spec H-90)."""
    tls_cert: Path | None = None
    """The operator's own certificate, with its chain; without it one of the store's own CA (spec H-91, H-92)."""
    tls_key: Path | None = None
    tls_name: tuple[str, ...] = ()
    """What this server is called, beside what its machine says."""
    require_token: bool | None = None
    """Refuse requests without a token; by default where other machines can reach the server (spec H-100)."""
    run_without_token: bool = False
    """Run commands also for whoever reaches a server that asks for no token (spec J-31)."""
    no_run: bool = False
    """Run no commands at all."""
    seed_routes: bool | None = None
    """Serve delta/upload and delta/status; by default only where other machines cannot reach them (spec H-40)."""
    access_log: bool = False
    idle_exit: float | None = None
    """End after so many seconds without a connection, 0 is never; None is what suits the command (spec H-59)."""
    header_seconds: float = 30.0
    """How long the head of a request may take."""
    handshake_seconds: float = 10.0
    """How long a TLS handshake may take (spec H-94)."""
    renewal_seconds: float = 3600.0
    """How often a running server looks whether its certificate is soon over (spec H-92)."""
    body_seconds: float = 60.0
    """The window in which `body_window_bytes` of a body must arrive (spec H-13)."""
    body_window_bytes: int = 4096
    keep_alive_seconds: int = 75
    uploads: int = 8
    """Bundles received at once; more wait their turn."""
    waits: int = 64
    """Long-polls held at once; more are answered early."""
    connections: int = 1000
    tenant_requests: int = 256
    """Requests of one tenant that are answered at once (spec H-109)."""


def read_file(path: Path | None) -> dict[str, Any]:
    """Return the settings of a TOML file; raises UsageError for one that is unreadable or names unknown settings."""
    if path is None:
        return {}
    try:
        found = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path} is not TOML: {error}") from error
    known = {each.name for kind in (StoreConfig, ServeConfig) for each in fields(kind)}
    if unknown := sorted(found.keys() - known):
        raise UsageError(f"{path} has the unknown setting {unknown[0]!r}; known are {', '.join(sorted(known))}")
    return found


def choose(
    kind: type[Settings], file: Mapping[str, Any], environment: Mapping[str, str], flags: Mapping[str, Any]
) -> Settings:
    """Return settings: a flag that is not None, else DELTASYNC_SERVER_NAME, else the file's, else the default."""
    chosen = {}
    for name in (each.name for each in fields(kind)):
        given = (flags.get(name), environment.get(ENVIRONMENT_PREFIX + name.upper()), file.get(name))
        if found := [value for value in given if value is not None]:
            chosen[name] = _read(name, found[0])
    if kind is StoreConfig and "data" not in chosen:
        raise UsageError(f"say where the store lies: --data DIR, or {ENVIRONMENT_PREFIX}DATA")
    try:
        return msgspec.convert(chosen, kind, strict=False, dec_hook=_path)
    except msgspec.ValidationError as error:
        raise UsageError(f"a setting is wrong: {error}") from error


def _read(name: str, value: Any) -> Any:
    """Return what a text says, of settings that people write in their own way."""
    if name in LISTS and isinstance(value, str):
        return value.split()
    if name in SIZES:
        try:
            return parse_size(value)
        except ValueError as error:
            raise UsageError(f"{name} is a size in bytes, or such as 500k, 10M or 2GiB") from error
    return value


def _path(kind: type, value: object) -> object:
    if kind is Path and isinstance(value, str | Path):
        return Path(value)
    raise NotImplementedError
