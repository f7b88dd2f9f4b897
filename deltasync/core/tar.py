"""The tar headers of a bundle: one canonical form to write, and a reader that takes no other (spec B-9 to B-14)."""

from __future__ import annotations

import re
from typing import NamedTuple

from deltasync.core.errors import Refused

BLOCK = 512
END = bytes(2 * BLOCK)
"""The end mark: two blocks of zeros."""
HEADER_BYTES_MAX = 16 * 1024
"""Enough for a PAX header with the longest path, and the header that it describes."""

_NAME_BYTES, _PREFIX_BYTES = 100, 155
_OCTAL_SIZE_MAX = 8**11 - 1
_FILE, _PAX = b"0", b"x"
_PAX_NAME = b"PaxHeaders"
_LONG_NAME = b"long-name"
_IDS = b"0000644\x000000000\x000000000\x00"
_TIME = b"\x00%011o\x00" % 315_532_800  # 1980-01-01: GNU tar warns about implausibly old files before 1970
_MAGIC = bytes(100) + b"ustar\x0000" + bytes(64) + b"0000000\x000000000\x00"
_REST = BLOCK - 345
_CONSTANT = sum(_IDS) + sum(_TIME) + sum(_MAGIC) + 8 * ord(" ")
_CHECKSUM = slice(148, 156)
_RECORDS = re.compile(rb"(?:\d+ path=([^\n]+)\n)?(?:\d+ size=([0-9]{1,19})\n)?")


class Member(NamedTuple):
    """What a header says."""

    name: bytes
    size: int


def header(name: bytes, size: int) -> bytes:
    """Return the header of a regular file, with a PAX header before it only where ustar has no room (spec B-12)."""
    if len(name) <= _NAME_BYTES and size <= _OCTAL_SIZE_MAX:
        return _block(name, b"", size, _FILE)
    split = _split(name)
    records = b""
    if split is None:
        records += _record(b"path", name)
        split = _LONG_NAME, b""
    if size > _OCTAL_SIZE_MAX:
        records += _record(b"size", b"%d" % size)
        size = 0
    if not records:
        return _block(*split, size, _FILE)
    return b"".join(
        (_block(_PAX_NAME, b"", len(records), _PAX), records, padding(len(records)), _block(*split, size, _FILE))
    )


def member_bytes(name: bytes, size: int) -> int:
    """Return how many bytes a member takes in the archive, its header and padding included."""
    header_bytes = BLOCK if len(name) <= _NAME_BYTES and size <= _OCTAL_SIZE_MAX else len(header(name, size))
    return header_bytes + size + -size % BLOCK


def padding(size: int) -> bytes:
    """Return the zeros that fill the last block of a member."""
    return END[: -size % BLOCK]


def parse(ahead: bytes) -> Member:
    """Return the member whose canonical header the next bytes of an archive begin with.

    ahead: HEADER_BYTES_MAX bytes, fewer only at the archive's end. Raises Refused B-9 to B-12.
    """
    flag, name, size = _parse_block(ahead)
    long_name = long_size = None
    if flag == _PAX:
        behind = BLOCK + size + -size % BLOCK
        records = _RECORDS.fullmatch(ahead[BLOCK : BLOCK + size])
        if records is None or behind + BLOCK > HEADER_BYTES_MAX:
            raise Refused("B-12", "a PAX header holds more than path and size")
        long_name, long_size = records.groups()
        flag, name, size = _parse_block(ahead[behind:])
    if flag != _FILE:
        raise Refused("B-11", "a PAX header is followed by another one")
    member = Member(long_name or name, size if long_size is None else int(long_size))
    if b"\x00" in member.name or not ahead.startswith(header(*member)):
        raise Refused("B-12", f"the header of {member.name!r} is not in canonical form")
    return member


def _parse_block(ahead: bytes) -> tuple[bytes, bytes, int]:
    block = ahead[:BLOCK]
    if len(block) < BLOCK:
        raise Refused("B-9", "the archive is truncated")
    stated = block[_CHECKSUM]
    if stated != b"%06o\x00 " % (sum(block) - sum(stated) + 8 * ord(" ")):
        raise Refused("B-10", "a header's checksum is wrong")
    flag = block[156:157]
    if flag not in (_FILE, _PAX):
        raise Refused("B-11", f"a member of type {flag!r} is not a regular file")
    digits = block[124:135]
    if not re.fullmatch(rb"[0-7]{11}", digits):
        raise Refused("B-12", "a member's size is not eleven octal digits")
    name, prefix = block[:100].rstrip(b"\x00"), block[345:500].rstrip(b"\x00")
    return flag, prefix + b"/" + name if prefix else name, int(digits, 8)


def _block(name: bytes, prefix: bytes, size: int, flag: bytes) -> bytes:
    digits = b"%011o" % size
    checksum = _CONSTANT + sum(name) + sum(prefix) + sum(digits) + flag[0]
    return b"".join(
        (
            name.ljust(_NAME_BYTES, b"\x00"),
            _IDS,
            digits,
            _TIME,
            b"%06o\x00 " % checksum,
            flag,
            _MAGIC,
            prefix.ljust(_REST, b"\x00"),
        )
    )


def _split(name: bytes) -> tuple[bytes, bytes] | None:
    """Return (name, prefix) with the shortest prefix that leaves at most 100 bytes, or None where none fits."""
    if len(name) <= _NAME_BYTES:
        return name, b""
    at = name.find(b"/", len(name) - _NAME_BYTES - 1)
    return (name[at + 1 :], name[:at]) if 0 < at <= _PREFIX_BYTES and at + 1 < len(name) else None


def _record(key: bytes, value: bytes) -> bytes:
    """Return a PAX record; its length counts its own digits."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    length = rest + len(str(length))
    return b"%d %s=%s\n" % (length, key, value)
