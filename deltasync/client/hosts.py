"""The book of hosts: servers by name, each with how it is known and what it is shown (spec H-96)."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import msgspec

from deltasync.client.address import normal_url
from deltasync.client.trust import Trust
from deltasync.config import home_of
from deltasync.core.errors import NotFound, UsageError
from deltasync.core.names import shown
from deltasync.decoding import decoded
from deltasync.disk import fsync_folder, open_regular, staged

FOLDER, SUFFIX = "hosts", ".json"
TOKEN_VARIABLE = "DELTASYNC_TOKEN"
RECORD_BYTES_MAX = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_TOKEN = re.compile(r"[\x21-\x7e]{1,4096}")
_PORTS = {"http": 80, "https": 443}


class Host(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One server; what it shows of itself in a traceback has no secrets."""

    name: str
    url: str
    added_at: str
    token: str | None = None
    next_token: str | None = None
    """What takes its place once the server has said so."""
    ca_pem: str | None = None
    fingerprint: str | None = None
    client_cert_pem: str | None = None
    client_key_pem: str | None = None
    price_per_hour: Annotated[float, msgspec.Meta(ge=0, le=1e9)] | None = None
    """What an hour of it costs, in whatever currency (spec J-77)."""

    def __repr__(self) -> str:
        return f"Host({self.name!r}, {self.url!r})"

    @property
    def trust(self) -> Trust:
        """By what it is known, and what it is shown in the handshake."""
        return Trust(self.ca_pem, self.fingerprint, self.client_cert_pem, self.client_key_pem)


class HostBook:
    """The hosts in a folder: one file for each, which only its owner can read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @classmethod
    def of_user(cls, environment: Mapping[str, str]) -> HostBook:
        """Return the book of the user who runs this."""
        return cls(home_of(environment) / FOLDER)

    def hosts(self) -> list[Host]:
        """Return every host, by name; raises UsageError for a file that is damaged or that others can read."""
        try:
            names = sorted(each for each in os.listdir(self._folder) if _is_record(each))  # noqa: PTH208
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UsageError(f"{shown(str(self._folder))} cannot be read: {error.strerror}") from error
        return [_read(self._folder / each) for each in names]

    def named(self, name: str) -> Host:
        """Return the host of a name, or raise UsageError that lists the names there are."""
        hosts = self.hosts()
        for host in hosts:
            if host.name == name:
                return host
        known = f"known are {', '.join(each.name for each in hosts)}" if hosts else "none is known yet"
        raise UsageError(
            f"{shown(name)} is no known host ({known}); `deltasync host add {shown(name)} URL` makes it one, "
            "or write http://host:port or file:///folder"
        )

    def at(self, url: str) -> Host | None:
        """Return the host that has the origin of an address, if there is one."""
        origin = origin_of(url)
        return next((each for each in self.hosts() if origin_of(each.url) == origin), None)

    def add(self, host: Host) -> None:
        """Keep a host; raises UsageError for a name or an origin that is in the book."""
        self.require_free(host.name, host.url)
        if not self._folder.is_dir():
            self._folder.parent.mkdir(parents=True, exist_ok=True)
            self._folder.mkdir(mode=0o700, exist_ok=True)
            fsync_folder(self._folder.parent)
        self.replace(host)

    def require_free(self, name: str, url: str) -> None:
        """Raise UsageError for a name that is none, and for a name or an origin that is in the book."""
        if not _NAME.fullmatch(name) or name.endswith(SUFFIX):
            raise UsageError(f"{shown(name)} is no name for a host: letters, digits, '.', '_' and '-', at most 63")
        same = (each for each in self.hosts() if each.name == name or origin_of(each.url) == origin_of(url))
        for each in same:
            raise UsageError(f"{each.url} is known as {each.name}; `deltasync host rm {each.name}` first")

    def replace(self, host: Host) -> None:
        """Keep what is known of a host from now on, in the place of what was known."""
        with staged(self._folder / (host.name + SUFFIX)) as out:
            out.write(msgspec.json.encode(host))

    def remove(self, name: str) -> None:
        """Forget a host, also one whose file is damaged; raises NotFound for an unknown one."""
        path = self._folder / (name + SUFFIX)
        if not _NAME.fullmatch(name) or not path.is_file():
            raise NotFound(f"{shown(name)} is no known host; `deltasync host ls` lists them")
        path.unlink()
        fsync_folder(self._folder)


def is_name(text: str) -> bool:
    """Tell whether a text may be a host's name, and no address."""
    return _NAME.fullmatch(text) is not None


def origin_of(url: str) -> tuple[str, str, int]:
    """Return what a token and a trust are for: scheme, host and port."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or _PORTS.get(parts.scheme, 0)


def token_in(text: str, where: str) -> str:
    """Return the token that a file or variable holds, or raise UsageError, which does not show it."""
    token = text.strip()
    if not _TOKEN.fullmatch(token):
        raise UsageError(f"{where} holds no token: it is one word of visible characters")
    return token


def has_token(environment: Mapping[str, str]) -> bool:
    """Tell whether the environment has a token, for whomever it is."""
    return bool(environment.get(TOKEN_VARIABLE, "").strip())


def token_of(environment: Mapping[str, str], url: str, token_for: Iterable[str]) -> str | None:
    """Return the environment's token if it is for the origin of an address (spec H-144).

    token_for: the addresses that were named beside it.
    """
    if not has_token(environment) or origin_of(url) not in (origin_of(normal_url(each)) for each in token_for):
        return None
    return token_in(environment[TOKEN_VARIABLE], TOKEN_VARIABLE)


def time_text() -> str:
    """Return the time as records keep it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _is_record(name: str) -> bool:
    return name.endswith(SUFFIX) and is_name(name.removesuffix(SUFFIX))


def _read(path: Path) -> Host:
    advice = f"`deltasync host rm {path.stem}` and add it again"
    try:
        descriptor = open_regular(str(path))
        with contextlib.closing(os.fdopen(descriptor, "rb")) as file:
            status = os.fstat(descriptor)
            if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
                raise UsageError(f"{shown(str(path))} is not its owner's alone, so its token may be known; {advice}")
            host = decoded(file.read(RECORD_BYTES_MAX), Host)
    except (OSError, msgspec.MsgspecError, ValueError) as error:
        raise UsageError(f"{shown(str(path))} cannot be read ({error}); {advice}") from error
    if host.name != path.stem:
        raise UsageError(f"{shown(str(path))} holds the host {shown(host.name)}; {advice}")
    return host
