"""Addresses of receivers: one spelling for each server and each folder, and what may be written in its place."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from deltasync.core.errors import UsageError
from deltasync.core.names import shown


def normal_url(url: str) -> str:
    """Return the one spelling of a receiver's address, or raise UsageError."""
    parts = _parts(url)
    return folder_of(url).as_uri() if parts.scheme == "file" else _server_url(url, parts)


def resolved(text: str, environment: Mapping[str, str]) -> str:
    """Return the address that a host's name stands for; an address stands for itself."""
    if "/" in text or ":" in text:
        return text
    from deltasync.client.hosts import HostBook

    return HostBook.of_user(environment).named(text).url


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
        raise UsageError(f"{shown(url)} is no address of a server; write http://host:port or file:///folder")
    if parts.username is not None or parts.query or parts.fragment:
        raise UsageError(f"the address of {shown(host)} may have no user, query or fragment")
    name = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{name}{f':{port}' if port is not None else ''}{parts.path.rstrip('/')}"
