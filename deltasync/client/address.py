"""Addresses of receivers: one spelling for each server and each folder, and what may be written in its place."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import SplitResult, quote, unquote, urlsplit

from deltasync.core.errors import UsageError
from deltasync.core.names import NameRefused, parse_workspace, shown

# A leading '-' would be an option of ssh, and anything odd a word of some shell behind it (spec H-131).
_SSH = re.compile(
    r"(?i:ssh)://(?:(?P<user>[A-Za-z0-9_][A-Za-z0-9_.+-]*)@)?"
    r"(?:(?P<name>[A-Za-z0-9_][A-Za-z0-9_.-]*)|\[(?P<ipv6>[0-9A-Fa-f:.]+(?:%[A-Za-z0-9_.-]+)?)\])"
    r"(?::(?P<port>[0-9]{1,5}))?(?P<path>/[^?#]*)?(?:#(?P<data>.+))?",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class SshAddress:
    """A server on a host that is reached over ssh, by the name that the user's ssh knows the host by."""

    host: str
    user: str | None = None
    port: int | None = None
    data: str | None = None
    """The server's data folder there; None is the user's usual one."""

    @property
    def login(self) -> str:
        """The host's one spelling; names stay in their case, which means something in the configuration of ssh."""
        user, port = f"{self.user}@" if self.user else "", f":{self.port}" if self.port else ""
        return f"ssh://{user}{f'[{self.host}]' if ':' in self.host else self.host}{port}"

    def __str__(self) -> str:
        """Return its one spelling: another data folder is another server."""
        return self.login + (f"#{quote(self.data, safe='/~')}" if self.data else "")

    def at(self, data: str) -> SshAddress:
        """Return the server of a data folder on this host; a relative one lies in the home folder there."""
        text = data.rstrip("/") or "/"
        if re.search(r"[\x00-\x1f\x7f]", text):
            raise UsageError(f"{shown(data)!r} can be no folder on a host")
        return replace(self, data=text if text.startswith(("/", "~")) else f"~/{text}")


def normal_url(url: str) -> str:
    """Return the one spelling of a receiver's address, or raise UsageError."""
    parts = _parts(url)
    if parts.scheme == "ssh":
        return str(ssh_address(url))
    return folder_of(url).as_uri() if parts.scheme == "file" else _server_url(url, parts)


def resolved(text: str, environment: Mapping[str, str]) -> str:
    """Return the address that a host's name stands for; an address stands for itself."""
    if "/" in text or ":" in text:
        return text
    from deltasync.client.hosts import HostBook

    return HostBook.of_user(environment).named(text).url


def known(texts: Iterable[str], environment: Mapping[str, str]) -> tuple[str, ...]:
    """Return the addresses that some names stand for; of those that nobody knows, and of what is none, nothing."""
    found: list[str] = []
    for text in texts:
        with contextlib.suppress(UsageError):
            found.append(normal_url(resolved(text, environment)))
    return tuple(found)


def is_exposed(url: str) -> bool:
    """Tell whether what is sent to an address crosses a network that anybody on the way can read (spec H-97)."""
    parts = _parts(url)
    return parts.scheme == "http" and not _is_loopback(parts.hostname or "")


def _is_loopback(host: str) -> bool:
    import ipaddress

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def is_ssh(url: str) -> bool:
    """Tell whether an address is that of a host that is reached over ssh."""
    return _parts(url).scheme == "ssh"


def ssh_address(url: str) -> SshAddress:
    """Return the server that an `ssh://` address names; raises UsageError where it names a workspace, too."""
    address, workspace = parse_ssh(url)
    if workspace is not None:
        raise UsageError(f"{address} has one server; name the workspace {shown(workspace)} apart from it")
    return address


def parse_ssh(url: str) -> tuple[SshAddress, str | None]:
    """Return the server that an `ssh://` address names, and the workspace if it has a path."""
    match = _SSH.fullmatch(url)
    port = int(match["port"]) if match and match["port"] else None
    if match is None or not 0 < (1 if port is None else port) < 65536:
        raise UsageError(
            f"{shown(url)} is no address for ssh; write ssh://user@host:port/workspace, without a password or a query, "
            "and put everything else into the configuration of ssh"
        )
    name = unquote(match["path"] or "").strip("/")
    try:
        workspace = parse_workspace(name) if name else None
    except NameRefused as error:
        raise UsageError(f"{shown(url)} ends in no workspace's name: {error}") from error
    address = SshAddress(match["name"] or match["ipv6"], match["user"], port)
    return address.at(unquote(match["data"])) if match["data"] else address, workspace


def is_folder(url: str) -> bool:
    """Tell whether an address is that of a folder."""
    return _parts(url).scheme == "file"


def folder_of(url: str) -> Path:
    """Return the folder that a `file://` address names."""
    parts = _parts(url)
    path = unquote(parts.path)
    if parts.netloc not in ("", "localhost") or not path.startswith("/") or "\0" in path:
        raise UsageError(f"{shown(url)} names no folder; write file:///absolute/path")
    return Path(path)


def _parts(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError as error:
        raise UsageError(f"{shown(url)} is no address: {error}") from error


def _server_url(url: str, parts: SplitResult) -> str:
    try:
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UsageError(f"{shown(url)} is no address of a server: {error}") from error
    if parts.scheme not in ("http", "https") or not host or re.search(r"[\x00-\x20\x7f]", url):
        raise UsageError(
            f"{shown(url)} is no address of a server; write http://host:port, ssh://host or file:///folder"
        )
    if parts.username is not None or parts.query or parts.fragment:
        raise UsageError(f"the address of {shown(host)} may have no user, query or fragment")
    name = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{name}{f':{port}' if port is not None else ''}{parts.path.rstrip('/')}"
