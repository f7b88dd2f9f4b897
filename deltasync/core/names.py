"""Names and paths inside a workspace: parsed once at the border, trusted past it; and how people are shown them."""

from __future__ import annotations

import re
from typing import NewType

RelPath = NewType("RelPath", str)
"""A path inside a workspace: '/' between parts, no part is '', '.', '..' or reserved."""

WorkspaceName = NewType("WorkspaceName", str)
"""A workspace's name: one path component that is safe as a folder name and in a URL."""

RESERVED = ".deltasync"
NAME_BYTES_MAX = 255
PATH_BYTES_MAX = 4096
TARGET_BYTES_MAX = 4095
"""A link's target cannot be longer on Linux: a bundle with one would lead to a tree that cannot be made."""
DEPTH_MAX = 200
WORKSPACE_BYTES_MAX = 100

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_TOKEN = re.compile(r"(?i:(?<=bearer )[\x21-\x7e]+)|(?<=dst_[0-9a-f]{12}_)[0-9a-f]{64}")
_WINDOWS = re.compile(r"(?i)(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?")


class NameRefused(ValueError):
    """A name that cannot be carried; the text says why."""


def parse_name(text: str) -> str:
    """Return the name of one directory entry if it can be carried, else raise NameRefused (spec P-1 to P-5)."""
    if text in ("", ".", ".."):
        raise NameRefused(f"{text!r} is not a name")
    if "/" in text:
        raise NameRefused("a name holds no '/'")
    if text == RESERVED:
        raise NameRefused(f"{RESERVED} is reserved for deltasync's own state")
    if _CONTROL.search(text):
        raise NameRefused("the name has a control character")
    if len(_utf8(text)) > NAME_BYTES_MAX:
        raise NameRefused(f"the name is longer than {NAME_BYTES_MAX} bytes")
    return text


def parse_path(text: str) -> RelPath:
    """Return a path inside a workspace if every part can be carried, else raise NameRefused (spec P-1 to P-7)."""
    if _CONTROL.search(text):
        raise NameRefused("the path has a control character")
    size = len(_utf8(text))
    if size > PATH_BYTES_MAX:
        raise NameRefused(f"the path is longer than {PATH_BYTES_MAX} bytes")
    parts = text.split("/")
    if len(parts) > DEPTH_MAX:
        raise NameRefused(f"the path is deeper than {DEPTH_MAX}")
    for part in parts:
        if part in ("", ".", "..", RESERVED):
            raise NameRefused(f"the path has the part {part!r}")
    if size > NAME_BYTES_MAX and max(len(_utf8(part)) for part in parts) > NAME_BYTES_MAX:
        raise NameRefused(f"a part of the path is longer than {NAME_BYTES_MAX} bytes")
    return RelPath(text)


def parse_workspace(text: str) -> WorkspaceName:
    """Return a workspace name, or raise NameRefused (spec P-8): one part, no leading '.', at most 100 bytes."""
    parse_name(text)
    if text.startswith(".") or "\\" in text or text != text.strip():
        raise NameRefused("a workspace name has no leading '.', no '\\' and no outer spaces")
    if len(_utf8(text)) > WORKSPACE_BYTES_MAX:
        raise NameRefused(f"a workspace name is at most {WORKSPACE_BYTES_MAX} bytes")
    return WorkspaceName(text)


def parse_target(path: str, target: str) -> str:
    """Return a symlink's target if it stays inside the workspace, else raise NameRefused (spec P-9).

    The target is carried as text. A relative target is judged by its words alone: no component may climb above
    the workspace's root, and an absolute one always leaves it.
    """
    if not target or _CONTROL.search(target) or len(_utf8(target)) > TARGET_BYTES_MAX:
        raise NameRefused("the link's target is empty, too long or has a control character")
    if target.startswith("/"):
        raise NameRefused("the link leaves the workspace (absolute target)")
    depth = path.count("/")
    for part in target.split("/"):
        if part == "..":
            depth -= 1
            if depth < 0:
                raise NameRefused("the link leaves the workspace")
        elif part not in ("", "."):
            depth += 1
    return target


def portability_note(name: str) -> str | None:
    """Say why a name that is legal here is not legal everywhere, or None; `doctor` lists these."""
    if _WINDOWS.fullmatch(name):
        return "is a device name on Windows"
    if name.endswith((".", " ")):
        return "ends in a dot or space"
    if any(character in name for character in '\\:*?"<>|'):
        return "has a character that Windows does not allow"
    return None


def shown(text: str) -> str:
    """Return a name that is safe to print: control, format and undecodable characters are escaped."""
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def without_tokens(text: str) -> str:
    """Return a text for a log, in which no token stands, wherever it came from (spec H-98)."""
    return _TOKEN.sub("***", text)


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte that is no UTF-8, as file names carry it
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape", "surrogatepass").decode()


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise NameRefused("the name is not UTF-8") from None


def bytes_text(count: float) -> str:
    """Return a number of bytes for people: `812 B`, `4.2 MiB`."""
    if abs(count) < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        count /= 1024
        if abs(count) < 1000 or unit == "TiB":
            break
    return f"{count:.1f} {unit}"
