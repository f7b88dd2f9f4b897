"""Families of hostile bundles: each fault of the frozen corpus at every member, field, kind and position where it fits.

They are made in memory, by the same edits as those in `bundles/refused`: all but the fault itself is computed anew.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from corpus_faults import FAULTS
from corpus_good import MTIME, noise
from corpus_refused import (
    DIGEST,
    JSON,
    KNOWN,
    LIMITS,
    Draft,
    Edit,
    Part,
    add,
    append,
    archive,
    both,
    bringing,
    checked,
    compressed,
    draft,
    first_part,
    frame,
    framed,
    hashes,
    header,
    made,
    manifest,
    new_bytes,
    op,
    part,
    parts,
    patch,
    pax,
    recipe_part,
    replace,
    sized,
    text,
)

from deltasync.core import tar
from deltasync.core.hashing import digest_of

SECOND = 11
"""The number of the bundle behind the good chain."""


@dataclass(frozen=True)
class Hostile:
    """One hostile bundle, and how it must be refused."""

    name: str
    rule: str | None
    edit: Edit
    code: str = ""
    announced: bytes | None = None
    """The identity that its sender names."""

    def build(self) -> bytes:
        """Return the bundle."""
        spoiled = draft()
        self.edit(spoiled)
        return spoiled.build()

    @property
    def refusal(self) -> tuple[str, str | None]:
        """The code and the rule of the error."""
        code = self.code or ("LIMIT_EXCEEDED" if self.rule in LIMITS else "BUNDLE_REFUSED")
        return code, self.rule


Found = Iterator[tuple[str, str, Edit]]
"""Rule, name, edit."""


def hostile_bundles() -> list[Hostile]:
    """Return every hostile bundle, those of the frozen corpus first; no two have the same name."""
    found = [Hostile(each.file.removesuffix(".tar.zst"), each.rule, each.edit, each.code) for each in FAULTS]
    for family in _FAMILIES:
        for rule, name, edit in family():
            found.append(Hostile(f"{rule}-{family.__name__.strip('_')}-{name}", rule, edit))
    found += _of_identity()
    names = [each.name for each in found]
    assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})
    return found


# The frame


def _magics() -> Found:
    others = {
        "bzip2": b"BZh9",
        "xz": b"\xfd7zXZ\x00",
        "lz4": b"\x04\x22\x4d\x18",
        "zip": b"PK\x03\x04",
        "elf": b"\x7fELF",
        "zstd-0.1": b"\x1e\xb5\x2f\xfd",
        "zstd-0.7": b"\x27\xb5\x2f\xfd",
        "dictionary": b"\x37\xa4\x30\xec",
        "swapped": b"\xfd\x2f\xb5\x28",
    }
    for name, magic in others.items():
        yield "B-1", name, frame(partial(_with_head, magic))
    for number in range(16):
        skippable = struct.pack("<II", 0x184D2A50 + number, 4) + b"skip"
        yield "B-1", f"skippable-{number}", frame(lambda sealed, s=skippable: s + sealed)
        yield "B-5", f"skippable-{number}", frame(lambda sealed, s=skippable: sealed + s)


def _with_head(magic: bytes, sealed: bytes) -> bytes:
    return magic + sealed[4:]


def _descriptors() -> Found:
    for bits, name in ((0x08, "reserved"), (0x10, "unused"), (0x18, "both")):
        yield "B-2", name, frame(lambda s, bits=bits: patch(4, bytes([s[4] | bits]))(s))
    for size in (1, 2, 3):
        dictionary = b"\x07".ljust((1, 2, 4)[size - 1], b"\x00")
        yield "B-2", f"dictionary-{size}", frame(lambda s, d=dictionary, n=size: s[:4] + bytes([s[4] | n]) + d + s[5:])
    yield "B-2", "no-checksum-bit", frame(lambda s: patch(4, bytes([s[4] & ~4]))(s[:-4]))
    window = b"\x50"  # 1 MiB
    yield "B-2", "window-and-no-size", frame(lambda s: s[:4] + b"\x04" + window + s[7:])
    for exponent in range(14, 32):
        if exponent == 14:
            continue  # see the corpus
        descriptor = bytes([exponent << 3])
        yield "B-3", f"window-2-{10 + exponent}", frame(lambda s, d=descriptor: _windowed(s, d))
    for mantissa in range(1, 8):
        yield "B-3", f"window-8-mib-and-{mantissa}", frame(lambda s, m=mantissa: _windowed(s, bytes([13 << 3 | m])))
    for size in (8 * 2**20 + 1, 2**32 - 1, 2**32, 2**40, 2**63, 2**64 - 1):
        head = b"\x28\xb5\x2f\xfd\xe4" + size.to_bytes(8, "little")
        yield "B-3", f"single-segment-{size}", frame(lambda s, h=head: h + s[7:])
    for size in (2**40 + 1, 2**41, 2**48, 2**63, 2**64 - 1):
        head = b"\x28\xb5\x2f\xfd\xc4\x50" + size.to_bytes(8, "little")
        yield "B-7", f"declares-{size}", frame(lambda s, h=head: h + s[7:])


def _windowed(sealed: bytes, descriptor: bytes) -> bytes:
    """Write the header anew with a window and eight bytes of content size."""
    size = int.from_bytes(sealed[5:7], "little") + 256
    return sealed[:4] + b"\xc4" + descriptor + size.to_bytes(8, "little") + sealed[7:]


def _ends() -> Found:
    for size in (1, 3, 4, 5, 6, 7, 8, 9, 10, 100, 500):
        yield "B-4", f"{size}-bytes", frame(lambda s, n=size: s[:n])
    for less in (1, 2, 3, 4, 5, 100):
        yield "B-4", f"lacks-{less}", frame(lambda s, n=less: s[:-n])
    yield "B-4", "never-last", frame(_never_last)
    behind = {
        "line-break": b"\n",
        "zero-block": bytes(512),
        "mebibyte": bytes(2**20),
        "noise": noise("behind", 1000),
        "magic": b"\x28\xb5\x2f\xfd",
        "tar": tar.header(b"x", 0) + tar.END,
        "frame": framed(b"x" * 1000),
    }
    for name, more in behind.items():
        yield "B-5", name, frame(lambda s, m=more: s + m)
    yield "B-5", "itself", frame(lambda s: s + s)
    for at in range(1, 5):
        for bit in (0, 7):
            yield (
                "B-6",
                f"checksum-{at}-{bit}",
                frame(lambda s, a=at, b=bit: patch(len(s) - a, bytes([s[-a] ^ 1 << b]))(s)),
            )
    yield "B-6", "checksum-of-nothing", frame(lambda s: s[:-4] + b"\x99\xe9\xd8\x51")
    for more in (1, 2, 100, 30_000):
        yield "B-6", f"declares-{more}-more", frame(lambda s, m=more: sized(s, m))
    for kind in range(3):
        large = (131_073 << 3 | kind << 1).to_bytes(3, "little")
        yield "B-6", f"large-block-{kind}", frame(lambda s, b=large: s[:7] + b + s[7:])
    for size in (0, 1, 4096, 131_072):
        reserved = (size << 3 | 3 << 1).to_bytes(3, "little")
        yield "B-6", f"reserved-block-{size}", frame(lambda s, b=reserved: s[:7] + b + s[7:])


def _never_last(sealed: bytes) -> bytes:
    """Let the last block say that another one follows."""
    at = 7
    while not sealed[at] & 1:
        field = int.from_bytes(sealed[at : at + 3], "little")
        at += 3 + (1 if field >> 1 & 3 == 1 else field >> 3)
    return patch(at, bytes([sealed[at] & ~1]))(sealed[:-4])


def _bombs() -> Found:
    for size in (64, 512):
        yield "B-8", f"rle-{size}-mib", compressed(lambda a, n=size: _rle(a, n))


def _rle(tarred: bytes, mebibytes: int) -> bytes:
    """Write the archive's head in raw blocks, and behind it so many mebibytes of zeros in blocks of a byte each."""
    spoiled = draft()
    size = mebibytes << 20
    content = "ab" * 32
    spoiled.operations.append(_file("added/bomb", digest=content, size=size))
    metadata: list[bytes] = []
    spoiled.edit_parts = lambda members: metadata.extend(each.header + each.content + each.padding for each in members)
    spoiled.edit_archive = lambda _: b""
    spoiled.build()
    head = b"".join(metadata) + tar.header(b"files/created/added/bomb", size)
    blocks = [(len(head) << 3).to_bytes(3, "little") + head]
    blocks += [(131_072 << 3 | 2).to_bytes(3, "little") + b"\x00"] * (size >> 17)
    total = len(head) + size + len(tar.END)
    blocks.append((len(tar.END) << 3 | 1).to_bytes(3, "little") + tar.END + b"\x00" * 4)
    return b"\x28\xb5\x2f\xfd\xc4\x38" + total.to_bytes(8, "little") + b"".join(blocks)


# The archive


def _truncations() -> Found:
    def cut(member: int, where: str) -> Callable[[list[Part]], Any]:
        return lambda members: _cut(members, member, where)

    for member in range(6):
        for where in ("header", "content", "padding", "behind"):
            yield "B-9", f"{where}-of-{member}", both(parts(cut(member, where)), archive(_without_end))


def _cut(members: list[Part], member: int, where: str) -> None:
    del members[member + 1 :]
    last = members[-1]
    if where == "header":
        last.header, last.content, last.padding = last.header[:300], b"", b""
    elif where == "content":
        last.content, last.padding = last.content[:-1], b""
    elif where == "padding":
        last.padding = last.padding[:-1]


def _without_end(tarred: bytes) -> bytes:
    return tarred[: -len(tar.END)]


def _checksums() -> Found:
    forms: dict[str, Callable[[int], bytes]] = {
        "off-by-one": lambda total: b"%06o\x00 " % (total + 1),
        "spaces": lambda total: b"%6o\x00 " % total,
        "no-space": lambda total: b"%07o\x00" % total,
        "space-first": lambda total: b"%06o \x00" % total,
        "eight-digits": lambda total: b"%08o" % total,
        "blank": lambda _: b" " * 8,
        "zeros": lambda _: bytes(8),
    }
    for member in range(6):
        for name, form in forms.items():
            yield "B-10", f"{name}-{member}", parts(partial(_stated, member, form))


def _stated(member: int, form: Callable[[int], bytes], members: list[Part]) -> None:
    block = members[member].header
    members[member].header = patch(148, form(sum(patch(148, b" " * 8)(block))))(block)


def _types() -> Found:
    for flag in "1234567ABDEGIKLMNSVXgyz":
        for member in (0, 2, 3, 5):
            name = flag if flag.islower() or flag.isdigit() else flag + flag
            yield "B-11", f"{name}-{member}", header(156, flag.encode(), member=member)
    for flag in (b"\x00", b" ", b"\xff"):
        yield "B-11", f"byte-{flag.hex()}", header(156, flag, member=4)


def _headers() -> Found:
    fields: dict[str, tuple[int, bytes]] = {
        "mode-777": (100, b"0000777"),
        "mode-sticky": (100, b"0001644"),
        "mode-spaces": (100, b"   644 "),
        "mode-behind": (107, b"x"),
        "uid": (108, b"0000001"),
        "uid-base-256": (108, b"\x80\x00\x00\x00\x00\x00\x00\x01"),
        "gid": (116, b"0000001"),
        "size-no-end": (135, b"0"),
        "size-spaces": (124, b"          4"),
        "size-minus": (124, b"-0000000004"),
        "size-base-256-huge": (124, b"\x80\x7f" + b"\xff" * 10),
        "size-all-ones": (124, b"\xff" * 12),
        "size-hex": (124, b"0000000000a"),
        "size-octal-8": (124, b"00000000008"),
        "time-zero": (136, b"00000000000"),
        "time-behind": (147, b"x"),
        "time-negative": (136, b"\xff" * 12),
        "link-name": (157, b"/etc/passwd"),
        "magic-none": (257, bytes(8)),
        "magic-gnu": (257, b"ustar  \x00"),
        "version": (263, b"01"),
        "owner": (265, b"ada"),
        "group": (297, b"ada"),
        "major": (329, b"0000001"),
        "minor": (337, b"0000001"),
        "behind-prefix": (500, b"x"),
        "last-byte": (511, b"x"),
        "behind-name": (99, b"x"),
        "behind-prefix-zero": (400, b"x"),
    }
    for member in (0, 1, 2, 3, 5):
        for name, (at, new) in fields.items():
            yield "B-12", f"{name}-{member}", header(at, new, member=member)
    for member in (0, 1, 2, 3):
        yield "B-12", f"name-{member}-slash", parts(partial(_prefixed, member))
    records = {
        "other-length": b"99 path=files/created/added/one.txt\n",
        "time": b"20 mtime=1234567890\n",
        "atime": b"12 atime=1.5\n",
        "uname": b"14 uname=root\n",
        "sparse": b"22 GNU.sparse.major=1\n",
        "real-size": b"28 GNU.sparse.realsize=1000\n",
        "sparse-name": b"36 GNU.sparse.name=../../etc/passwd\n",
        "xattr": b"35 SCHILY.xattr.security.selinux=x\n",
        "charset": b"21 hdrcharset=BINARY\n",
        "comment": b"14 comment=ok\n",
        "link": b"24 linkpath=/etc/passwd\n",
        "no-line-break": b"10 path=ab",
        "no-length": b"path=ab\n",
        "path-twice": b"13 path=abcd\n13 path=abce\n",
        "size-first": b"10 size=4\n13 path=abcd\n",
        "empty-path": b"8 path=\n",
        "zero-in-path": b"14 path=a\x00bc\n",
        "needless-size": b"10 size=4\n",
        "huge-size": b"28 size=99999999999999999999\n",
        "negative-size": b"11 size=-4\n",
        "nothing": b"",
        "noise": noise("pax", 700),
    }
    for name, record in records.items():
        yield "B-12", f"pax-{name}", replace(3, pax("files/created/added/one.txt", record))


def _prefixed(member: int, members: list[Part]) -> None:
    """Let a name begin in the prefix field, as only a longer one may."""
    name = members[member].header[:100].rstrip(b"\x00")
    front, _, last = (b"x/" + name).rpartition(b"/")
    block = patch(345, front.ljust(155, b"\x00"))(patch(0, last.ljust(100, b"\x00"))(members[member].header))
    members[member].header = checked(block)


def _paddings() -> Found:
    for member in range(6):
        for name, at in (("first", 0), ("last", -1), ("middle", 100)):
            yield "B-13", f"{name}-{member}", parts(partial(_padded, member, at))


def _padded(member: int, at: int, members: list[Part]) -> None:
    padding = bytearray(members[member].padding)
    padding[at] = 1
    members[member].padding = bytes(padding)


def _end_marks() -> Found:
    end = len(tar.END)
    yield "B-14", "noise-in-second", archive(lambda a: a[:-1] + b"x")
    yield "B-14", "noise-begins-second", archive(lambda a: a[:-512] + b"x" + a[-511:])
    yield "B-14", "one-byte-more", archive(lambda a: a + b"\x00")
    yield "B-14", "one-byte-less", archive(lambda a: a[:-1])
    yield "B-14", "ten-kibibytes", archive(lambda a: a + bytes(10_240 - len(a) % 10_240))
    yield "B-14", "another-archive", archive(lambda a: a + a)
    yield "B-14", "end-in-the-middle", parts(lambda m: m.insert(4, Part(bytes(512), b"", b"")))
    yield "B-14", "end-before-content", parts(lambda m: m.insert(3, Part(bytes(1024), b"", b"")))
    yield "B-14", "text-behind", archive(lambda a: a[:-end] + tar.END + b"hello".ljust(512, b"\x00"))


def _order() -> Found:
    names = ("manifest.json", "metadata/operations.json", "metadata/hashes.json")
    for member in range(3):
        yield "B-15", f"lacks-{member}", parts(lambda m, n=member: m.pop(n))
        for other in ("./" + names[member], names[member].upper(), "x/" + names[member], names[member] + "~", "x"):
            yield "B-15", f"renamed-{member}-{other}", parts(partial(_renamed, member, other))
    for order in ((1, 0, 2), (2, 1, 0), (0, 2, 1), (1, 2, 0), (2, 0, 1)):
        yield "B-15", f"order-{order}", parts(lambda m, o=order: m.__setitem__(slice(0, 3), [m[n] for n in o]))
    for member in range(2):
        yield "B-15", f"twice-{member}", parts(lambda m, n=member: m.insert(n, m[n]))
    yield "B-50", "hashes-twice", parts(lambda m: m.insert(3, m[2]))
    yield "B-15", "content-first", parts(lambda m: m.insert(0, m.pop()))
    yield "B-15", "content-between", parts(lambda m: m.insert(1, m.pop()))
    yield "B-16", "manifest-64-kib", manifest(workspace_path="x" * 65_536)
    yield "B-16", "manifest-1-mib", manifest(client_id="0" * 2**20)


def _renamed(member: int, name: str, members: list[Part]) -> None:
    members[member] = part(name, members[member].content)


# The manifest

_FIELDS = tuple(draft().manifest)


def _manifest_members() -> Found:
    for number, field in enumerate(_FIELDS):
        is_first = field == "version"
        yield "B-21" if is_first else "B-20", f"lacks-{field}", _manifest_json(lambda v, f=field: v.pop(f))
        yield "B-20", f"null-{field}", manifest(**{field: None})
        yield "B-20", f"object-{field}", manifest(**{field: {"x": 1}})
        yield (
            "B-20",
            f"twice-{field}",
            text("manifest", b'"%s":' % field.encode(), b'"%s":null,"%s":' % ((field.encode(),) * 2)),
        )
        if number:
            yield "B-20", f"early-{field}", _manifest_json(partial(_moved_front, field))
    for field in ("version", "epoch", "root", "client_id", "created_at", "hash", "compression"):
        yield "B-20", f"number-{field}", manifest(**{field: 5})
    for field in ("sequence_number", "parent_sequence", "total_files", "total_size_bytes"):
        for name, value in (("text", "11"), ("float", 11.5), ("true", True), ("list", [11])):
            yield "B-20", f"{name}-{field}", manifest(**{field: value})
        yield (
            "B-20",
            f"exponent-{field}",
            text("manifest", b'"%s":' % field.encode(), b'"%s":1e1,"x":' % field.encode()),
        )
    for verb in ("created", "updated", "moved", "deleted"):
        yield "B-20", f"counts-lack-{verb}", _manifest_json(lambda v, verb=verb: v["operations"].pop(verb))
        yield "B-20", f"counts-text-{verb}", _manifest_json(lambda v, verb=verb: v["operations"].update({verb: "1"}))
    yield "B-20", "counts-more", _manifest_json(lambda v: v["operations"].update(linked=0))


def _manifest_json(change: Callable[[JSON], Any]) -> Edit:
    def edit(spoiled: Draft) -> None:
        spoiled.edit_manifest = lambda values: change(values) and None

    return edit


def _moved_front(field: str, values: JSON) -> None:
    rest = dict(values)
    values.clear()
    values[field] = rest.pop(field)
    values.update(rest)


def _json_texts() -> Found:
    spoils: dict[str, Callable[[bytes], bytes]] = {
        "space-first": lambda t: b" " + t,
        "space-last": lambda t: t + b" ",
        "line-break-last": lambda t: t + b"\n",
        "space-behind-colon": lambda t: t.replace(b'":', b'": ', 1),
        "space-behind-comma": lambda t: t.replace(b',"', b', "', 1),
        "tab": lambda t: t.replace(b"{", b"{\t", 1),
        "mark": lambda t: b"\xef\xbb\xbf" + t,
        "utf-16": lambda t: t.decode().encode("utf-16"),
        "utf-16-be": lambda t: t.decode().encode("utf-16-be"),
        "utf-32": lambda t: t.decode().encode("utf-32"),
        "twice": lambda t: t + t,
        "empty": lambda t: b"",
        "null": lambda t: b"null",
        "true": lambda t: b"true",
        "number": lambda t: b"1",
        "text": lambda t: b'"' + t.replace(b"\\", b"\\\\").replace(b'"', b'\\"') + b'"',
        "array": lambda t: b"[" + t + b"]",
        "cut": lambda t: t[:-1],
        "cut-in-the-middle": lambda t: t[: len(t) // 2],
        "comment": lambda t: t + b"//x",
        "trailing-comma": lambda t: t[:-1] + b",}",
        "zero-byte": lambda t: t + b"\x00",
        "not-utf-8": lambda t: t.replace(b':"', b':"\xff', 1),
        "overlong": lambda t: t.replace(b':"', b':"\xc0\xaf', 1),
        "surrogate": lambda t: t.replace(b':"', b':"\xed\xa0\x80', 1),
        "single-quotes": lambda t: t.replace(b'"', b"'"),
        "nan": lambda t: t.replace(b":", b":NaN,", 1),
        "deep": lambda t: b'{"a":' * 10_000 + t,
        "deep-arrays": lambda t: t[:1] + b'"x":' + b"[" * 3_000 + b"]" * 3_000 + b"," + t[1:],
    }
    rules = {"manifest": "B-20", "operations": "B-27", "hashes": "B-29"}
    for member, rule in rules.items():
        for name, spoil in spoils.items():
            yield rule, f"{member}-{name}", _text_of(member, spoil)
    escape = {"manifest": (b'"life"', b'"l\\u0069fe"'), "operations": (b'"added"', b'"\\u0061dded"')}
    for member, (old, new) in escape.items():
        yield rules[member], f"{member}-needless-escape", text(member, old, new)
    yield "B-20", "slash-escaped", text("manifest", b"/ada/", b"\\/ada\\/")
    yield "B-29", "hashes-needless-escape", text("hashes", b"README", b"\\u0052EADME")
    yield "B-29", "hashes-slash-escaped", text("hashes", b"added/one", b"added\\/one")


def _text_of(member: str, spoil: Callable[[bytes], bytes]) -> Edit:
    def edit(spoiled: Draft) -> None:
        spoiled.edit_text[member] = spoil

    return edit


def _manifest_forms() -> Found:
    long_hex = "0" * 64
    forms: dict[str, list[object]] = {
        "bundle_id": [
            "",
            "0" * 32,
            "00000000-0000-4000-c000-000000000011",
            "{00000000-0000-4000-8000-000000000011}",
            "00000000-0000-4000-8000-00000000001G",
            "00000000-0000-4000-8000-000000000011\n",
            "A" * 36,
            "00000000-0000-7000-8000-000000000011",
            "00000000_0000_4000_8000_000000000011",
        ],
        "created_at": [
            "",
            "2026-11-21",
            "2026-11-21T09:11:00Z",
            "2026-11-21T09:11:00.000",
            "2026-11-21 09:11:00.000Z",
            "2026-02-30T09:11:00.000Z",
            "2026-11-21T25:11:00.000Z",
            "2026-11-21T09:61:00.000Z",
            "0000-11-21T09:11:00.000Z",
            "2026-11-21T09:11:61.000Z",
            "2026-11-21T09:11:00.000Z\n",
            "２026-11-21T09:11:00.000Z",
            "2026-11-21T09:11:00.000z",
            "2026-11-21T09:11:00.000000Z",
        ],
        "epoch": ["", "0" * 31, "0" * 33, "A" * 32, "0" * 31 + "\n", "g" * 32, "０" * 32],
        "client_id": ["", "0" * 15, "0" * 65, "A" * 32, "0" * 31 + "\n", "../../../../etc/passwd"],
        "collection_name": [
            "",
            ".",
            "..",
            ".life",
            "a/b",
            "/life",
            "a\\b",
            " life",
            "life ",
            "l" * 101,
            "é" * 51,
            "li\nfe",
            "li\x00fe",
            "li\x7ffe",
            "li\x85fe",
            ".deltasync",
        ],
        "workspace_path": ["x" * 4097, "a\x00b", "a\tb", "a\x7fb", "a\x9fb", "é" * 4097],
        "parent_root": ["", "0" * 63, "0" * 65, "A" * 64, long_hex[1:] + "\n", "g" * 64],
        "root": ["", "0" * 63, "0" * 65, long_hex[1:] + "\n", "g" * 64, "０" * 64],
        "operations_digest": ["", "0" * 63, "A" * 64, long_hex[1:] + "\n"],
        "hashes_digest": ["", "0" * 63, "A" * 64, long_hex[1:] + "\n"],
    }
    for field, values in forms.items():
        for number, value in enumerate(values):
            yield "B-24", f"{field}-{number}", manifest(**{field: value})
    for field, values in (
        ("compression", ["", "ZSTD", "zstd ", "none", "xz"]),
        ("encoding", ["", "UTF-8", "utf8", "utf-16"]),
        ("hash", ["", "BLAKE3", "sha1", "blake2b", "blake3 "]),
    ):
        for value in values:
            yield "B-23", f"{field}-{value}", manifest(**{field: value})
    for version in ("", "2", "2.0 ", "2.1", "02.0", "2.0.0", "２.0", "20", "null"):
        yield "B-21", f"version-{version}", manifest(version=version)
    for requires in (["Recipes"], ["recipes", "x"], [""], ["parts "], ["recipes\x00"], ["x"] * 50, ["../../x"]):
        yield "B-22", f"requires-{requires[0]!r}-{len(requires)}", manifest(requires=requires)
    for sequence, parent in (
        (0, 0),
        (-1, -2),
        (2**53, 2**53 - 1),
        (2**62, 2**62 - 1),
        (SECOND, SECOND),
        (SECOND, 0),
        (12, 10),
    ):
        yield "B-25", f"{sequence}-{parent}", manifest(sequence_number=sequence, parent_sequence=parent)
    empty = digest_of(b"").hex()
    for field in ("operations_digest", "hashes_digest"):
        for name, value in (("empty", empty), ("zeros", "0" * 64), ("ones", "f" * 64)):
            yield "B-26", f"{field}-{name}", manifest(**{field: value})
    yield "B-26", "swapped", _manifest_json(_swapped_digests)
    for field in ("total_files", "total_size_bytes"):
        for value in (0, -1, 7, 1):
            yield "B-28", f"{field}-{value}", manifest(**{field: value})
    for verb in ("created", "updated", "moved", "deleted"):
        for more in (1, -1, 1000, -1000):
            yield "B-28", f"{verb}-{more}", _manifest_json(partial(_counted, verb, more))


def _swapped_digests(values: JSON) -> None:
    one, other = values["operations_digest"], values["hashes_digest"]
    values["operations_digest"], values["hashes_digest"] = other, one


def _counted(verb: str, more: int, values: JSON) -> None:
    values["operations"][verb] += more


# The operations


def _file(path: str, **fields: object) -> JSON:
    known = {"digest": KNOWN.digest, "size": len(KNOWN.content), "mtime_ns": KNOWN.mtime_ns}
    return {"operation": "created", "kind": "file", "path": path} | known | fields


def _shapes() -> dict[str, JSON]:
    """Return one operation of each verb and kind, as it may be."""
    content = {"digest": KNOWN.digest, "size": len(KNOWN.content), "mtime_ns": MTIME}
    return {
        "created-file": {"path": "added/f", **content},
        "created-symlink": {"path": "added/l", "target": "f"},
        "created-directory": {"path": "added/d"},
        "updated-file": {"path": "empty/file", "base": digest_of(b"").hex(), **content},
        "updated-symlink": {"path": "pictures/up", "target": "notes.txt"},
        "moved-file": {"path": "added/m", "source_path": "empty/also", "base": digest_of(b"").hex(), **content},
        "moved-directory": {"path": "added/i", "source_path": "empty/inside", "base": digest_of(b"").hex()},
        "deleted-file": {"path": "empty/file", "base": digest_of(b"").hex()},
        "deleted-symlink": {"path": "pictures/up"},
        "deleted-directory": {"path": "empty/inside"},
    }


def _shape(name: str, **changes: object) -> Edit:
    """Add an operation of this verb and kind, changed; None removes a member."""
    verb, kind = name.split("-")
    members = {"operation": verb, "kind": kind} | _shapes()[name] | changes
    return add(**{key: value for key, value in members.items() if value is not None})


def _hostile_paths() -> Found:
    paths = {
        "empty": "",
        "dot": ".",
        "dots": "..",
        "root": "/",
        "absolute": "/etc/passwd",
        "climbs": "../x",
        "climbs-inside": "added/../../x",
        "ends-in-dots": "added/..",
        "dot-first": "./x",
        "dot-inside": "added/./x",
        "two-slashes": "added//x",
        "slash-last": "added/",
        "slashes-first": "//x",
        "state": ".deltasync",
        "below-state": ".deltasync/x",
        "state-inside": "added/.deltasync/x",
        "line-break": "a\nb",
        "return": "a\rb",
        "zero": "a\x00b",
        "zero-last": "x\x00",
        "zero-behind-dots": "..\x00/x",
        "escape": "\x1b[2Jx",
        "delete": "a\x7fb",
        "c1": "a\x9bb",
        "long-ascii": "x" * 256,
        "long-utf-8": "é" * 128,
        "long-inside": "added/" + "😀" * 64,
        "deep": "/".join("x" * 201),
        "deep-below": "added/" + "/".join("x" * 200),
        "beyond-4096": "/".join(["d" * 200] * 21),
    }
    fields = [(name, "path") for name in _shapes()] + [
        ("moved-file", "source_path"),
        ("moved-directory", "source_path"),
    ]
    for path_name, path in paths.items():
        for name, field in fields:
            yield "B-31", f"{name}-{field}-{path_name}", _shape(name, **{field: path})


def _members() -> Found:
    values = {"source_path": "x", "base": DIGEST, "digest": DIGEST, "target": "x", "recipe": DIGEST}
    for name, members in _shapes().items():
        for field, value in values.items():
            if field not in members:
                yield "B-32", f"{name}-with-{field}", _shape(name, **{field: value})
            else:
                yield "B-32", f"{name}-without-{field}", _shape(name, **{field: None})
        if "digest" not in members:
            for field, number in (("size", 1), ("mtime_ns", 1), ("executable", True)):
                yield "B-32", f"{name}-with-{field}", _shape(name, **{field: number})
        verb, kind = name.encode().split(b"-")
        yield "B-27", f"{name}-without-operation", both(_shape(name), _last(b'"operation":"%s",' % verb, b""))
        yield "B-27", f"{name}-without-kind", both(_shape(name), _last(b'"kind":"%s",' % kind, b""))
        path = b'"path":"%s"' % members["path"].encode()
        yield "B-27", f"{name}-without-path", both(_shape(name), _last(path, b'"x":""'))
        yield "B-27", f"{name}-path-list", both(_shape(name), _last(path, path.replace(b":", b":[") + b"]"))
        yield "B-27", f"{name}-path-twice", both(_shape(name), _last(path, path + b"," + path))
        yield "B-27", f"{name}-size-text", both(_shape(name), _last(path, path + b',"size":"1"'))
        yield "B-27", f"{name}-with-mode", _shape(name, mode=420)
        yield "B-27", f"{name}-null-recipe", _null(name, "recipe")
        yield "B-27", f"{name}-path-number", _shape(name, path=5)
        yield "B-27", f"{name}-executable-false", _shape(name, executable=False)
        yield "B-27", f"{name}-size-zero", _shape(name, size=0)
        yield "B-27", f"{name}-mtime-float", _shape(name, mtime_ns=1.5)
        yield "B-27", f"{name}-upper-case", _shape(name, operation=name.split("-")[0].upper())
        yield "B-27", f"{name}-kind-upper-case", _shape(name, kind=name.split("-")[1].title())
    yield "B-32", "updated-directory", _shape("created-directory", operation="updated")
    yield "B-32", "moved-symlink", _shape("updated-symlink", operation="moved", source_path="latest")


def _last(old: bytes, new: bytes) -> Edit:
    """Replace the last of these bytes in operations.json."""
    return _text_of("operations", lambda content: new.join(content.rsplit(old, 1)))


def _null(name: str, field: str) -> Edit:
    verb, kind = name.split("-")
    return add(**({"operation": verb, "kind": kind} | _shapes()[name] | {field: None}))


def _digests() -> Found:
    forms = {
        "empty": "",
        "upper": "AB" * 32,
        "short": "a" * 63,
        "long": "a" * 65,
        "no-hex": "g" * 64,
        "sha-1": "a" * 40,
        "line-break": "a" * 63 + "\n",
        "prefixed": "blake3:" + "a" * 64,
        "wide-digits": "１" * 64,
        "path": "../" * 21 + "x",
    }
    for name, members in _shapes().items():
        for field in ("base", "digest"):
            if field in members:
                for form_name, form in forms.items():
                    yield "B-33", f"{name}-{field}-{form_name}", _shape(name, **{field: form})
        if "digest" in members:
            for size in (-1, -(2**63), 2**63, 2**64 - 1):
                yield "B-34", f"{name}-size-{size}", _shape(name, size=size, digest=DIGEST)
            for mtime in (2**63, 2**64 - 1, -(2**63) - 1):
                yield "B-34", f"{name}-mtime-{mtime}", _shape(name, mtime_ns=mtime)


def _targets() -> Found:
    for name in ("created-symlink", "updated-symlink"):  # both one folder deep
        targets = {
            "empty": "",
            "root": "/",
            "absolute": "/etc/passwd",
            "climbs": "../..",
            "climbs-far": "../../../../../../etc/passwd",
            "climbs-late": "a/../../../x",
            "climbs-by-dots": "./.././../x",
            "climbs-behind-slashes": "..//..//x",
            "zero": "a\x00b",
            "line-break": "a\nb",
            "escape": "\x1b]0;x\x07",
            "delete": "\x7f",
            "c1": "\x85",
            "long": "x" * 4096,
            "long-utf-8": "é" * 2048,
        }
        for target_name, target in targets.items():
            yield "B-35", f"{name}-{target_name}", _shape(name, target=target)


def _pairs() -> Found:
    known = {"digest": KNOWN.digest, "size": len(KNOWN.content), "mtime_ns": KNOWN.mtime_ns}
    placing = ["created-file", "created-symlink", "created-directory", "updated-file", "updated-symlink", "moved-file"]
    placing.append("moved-directory")
    for one in placing:
        for other in placing:
            if "moved" in one and one == other:
                continue
            yield "B-36", f"{one}-and-{other}", both(_shape(one, path="pair"), _shape(other, path="pair"))
    for one in ("deleted-file", "deleted-symlink", "deleted-directory"):
        for other in ("deleted-file", "deleted-symlink", "deleted-directory"):
            yield "B-36", f"{one}-and-{other}", both(_shape(one, path="pair"), _shape(other, path="pair"))
    for one in ("moved-file", "moved-directory"):
        for other in ("moved-file", "moved-directory"):
            edits = (_shape(one, path="x", source_path="pair"), _shape(other, path="y", source_path="pair"))
            yield "B-37", f"{one}-and-{other}", both(*edits)
        yield "B-37", f"{one}-onto-itself", _shape(one, path="pair", source_path="pair")
    for one in ("created-file", "updated-file", "moved-file"):
        for other in ("created-file", "updated-file"):
            different = both(_shape(one, path="x"), _shape(other, path="y", **(known | {"size": 101})))
            yield "B-38", f"{one}-and-{other}", different


# The operations against the tree


def _tree() -> Found:
    for name in ("created-file", "created-symlink", "created-directory"):
        yield "B-40", f"{name}-nowhere", _shape(name, path="nowhere/x")
        yield "B-40", f"{name}-far", _shape(name, path="nowhere/at/all/x")
        yield "B-40", f"{name}-below-file", _shape(name, path="copies/x")
        yield "B-40", f"{name}-below-link", _shape(name, path="latest/x")
        for there in ("empty", "empty/file", "pictures/up", "pictures", "n" * 120):
            yield "B-41", f"{name}-{there[:10]}", _shape(name, path=there)
    empty = digest_of(b"").hex()
    yield "B-40", "moved-file-nowhere", _shape("moved-file", path="nowhere/x", digest=empty, size=None)
    yield "B-41", "moved-file-there", _shape("moved-file", path="empty/file", digest=empty, size=None)
    for path in ("x", "empty", "pictures/up", "empty/x", "nowhere/x", "empty/file/x"):
        yield "B-42", f"updated-file-{path}", _shape("updated-file", path=path)
        if path != "pictures/up":
            yield "B-42", f"updated-symlink-{path}", _shape("updated-symlink", path=path)
            yield "B-42", f"deleted-symlink-{path}", _shape("deleted-symlink", path=path)
        yield "B-42", f"deleted-file-{path}", _shape("deleted-file", path=path)
        if path != "empty":
            yield "B-42", f"deleted-directory-{path}", _shape("deleted-directory", path=path)
    for name in ("updated-file", "moved-file", "deleted-file"):
        for base_name, base in (("zeros", "0" * 64), ("known", KNOWN.digest), ("other", DIGEST)):
            yield "B-43", f"{name}-{base_name}", _shape(name, base=base)
    for base_name, base in (("zeros", "0" * 64), ("file", KNOWN.digest)):
        yield "B-43", f"moved-directory-{base_name}", _shape("moved-directory", base=base)
    for source in ("x", "empty", "latest", "nowhere/x", "empty/file/x"):
        yield "B-44", f"moved-file-{source}", _shape("moved-file", source_path=source)
    for source in ("x", "empty/file", "latest", "nowhere/x"):
        yield "B-44", f"moved-directory-{source}", _shape("moved-directory", source_path=source)


def _hashes() -> Found:
    for field in ("algorithm", "files"):
        yield "B-29", f"lacks-{field}", hashes(lambda h, f=field: h.pop(f))
        yield "B-29", f"null-{field}", hashes(lambda h, f=field: h.update({f: None}))
    for algorithm in ("", "BLAKE3", "sha256", "blake3 "):
        yield "B-29", f"algorithm-{algorithm}", hashes(lambda h, a=algorithm: h.update(algorithm=a))
    yield "B-29", "more", hashes(lambda h: h.update(comment="x"))
    for path in ("added/one.txt", "README.md", "added/copies.txt", "-rf", "added/two.txt", "added/two again.txt"):
        yield "B-29", f"lacks-{path}", hashes(lambda h, p=path: h["files"].pop(p))
        yield "B-29", f"other-{path}", hashes(lambda h, p=path: h["files"].update({p: DIGEST}))
        yield "B-29", f"upper-{path}", hashes(lambda h, p=path: h["files"].update({p: h["files"][p].upper()}))
        yield "B-29", f"null-{path}", hashes(lambda h, p=path: h["files"].update({p: None}))
        if path != "added/one.txt":
            yield "B-29", f"early-{path}", hashes(lambda h, p=path: _moved_front(p, h["files"]))
    for path in ("added", "latest", "../x", "", "added/one.txt/"):
        yield "B-29", f"names-{path}", hashes(lambda h, p=path: h["files"].update({p: DIGEST}))
    yield "B-29", "two-swapped", hashes(_two_swapped)
    yield "B-29", "none", hashes(lambda h: h["files"].clear())


def _two_swapped(values: JSON) -> None:
    files = values["files"]
    files["added/one.txt"], files["added/two.txt"] = files["added/two.txt"], files["added/one.txt"]


def _counts() -> Found:
    def many(spoiled: Draft, count: int, path: str) -> None:
        spoiled.operations += [{"operation": "created", "kind": "directory", "path": path % n} for n in range(count)]

    yield "B-30", "many-small", lambda spoiled: many(spoiled, 20_001, "added/%x")
    yield "B-30", "braces-in-names", lambda spoiled: many(spoiled, 19_993, 'added/{{"{{\\%d')


# The content


def _contents() -> Found:
    one, two = b"one\n", b"two\n"
    names = {
        "deleted": "files/deleted/-rf",
        "no-verb": "files/added/one.txt",
        "no-folder": "added/one.txt",
        "upper-case": "Files/created/added/one.txt",
        "dot": "./files/created/added/one.txt",
        "climbs": "files/created/../../etc/passwd",
        "absolute": "/etc/passwd",
        "symlink": "files/updated/latest",
        "directory": "files/created/added",
        "longer": "files/created/added/one.txt2",
        "shorter": "files/created/added/one.tx",
        "slashes": "files//created/added/one.txt",
        "state": "files/created/.deltasync/x",
        "chunks": f"chunks/{digest_of(one).hex()}",
        "recipe": f"metadata/recipes/{digest_of(one).hex()}",
        "part": f"parts/{DIGEST}/{0:016x}",
        "manifest": "manifest.json",
    }
    for name, member in names.items():
        yield "B-50", f"{name}-last", append(member, one)
        yield "B-50", f"{name}-first", parts(lambda m, n=member: m.insert(3, part(n, one)))
    for index, path, verbs, content in (
        (3, "added/one.txt", ("updated", "moved", "deleted", "linked"), one),
        (4, "README.md", ("created", "moved", "deleted", ""), b"# A life\n\nIt ends here.\n"),
        (5, "added/two.txt", ("updated", "moved", "CREATED"), two),
    ):
        for verb in verbs:
            yield "B-51", f"{verb}-{path}", replace(index, part(f"files/{verb}/{path}", content))
        sizes = {"empty": b"", "less": content[:-1], "more": content + b"x", "much-more": content + bytes(4096)}
        for name, other in sizes.items():
            yield "B-54", f"{name}-{path}", _resized(index, other)
        for name, other in (("zeros", bytes(len(content))), ("flipped", bytes([content[0] ^ 1]) + content[1:])):
            yield "B-55", f"{name}-{path}", _resized(index, other)
        yield "B-53", f"twice-{path}", parts(lambda m, i=index: m.insert(i, m[i]))
        yield "B-53", f"last-again-{path}", parts(lambda m, i=index: m.append(m[i]))
    for order in ((1, 0, 2), (2, 1, 0), (0, 2, 1), (1, 2, 0), (2, 0, 1)):
        yield "B-53", f"order-{order}", parts(lambda m, o=order: m.__setitem__(slice(3, 6), [m[3 + n] for n in o]))
    yield "B-52", "later-first", parts(lambda m: m.insert(3, part("files/created/added/two again.txt", two)))
    for number, digest in enumerate((DIGEST, "0" * 64, digest_of(two).hex()[::-1])):
        yield "B-55", f"other-digest-{number}", op(1, digest=digest)


def _resized(index: int, content: bytes) -> Edit:
    def change(members: list[Part]) -> None:
        name = members[index].header[:100].rstrip(b"\x00")
        members[index] = part(name, content)

    return parts(change)


def _recipes() -> Found:
    whole = new_bytes(b"one\n")
    bodies = {
        "17-bases": b"\x11" + bytes.fromhex(KNOWN.digest) * 17 + struct.pack(">BQQ", 0, 0, 4),
        "255-bases": b"\xff" + bytes(100),
        "bases-cut": b"\x02" + bytes.fromhex(KNOWN.digest) + struct.pack(">BQQ", 0, 0, 4),
        "only-count": b"\x01",
        "only-base": b"\x01" + bytes.fromhex(KNOWN.digest),
        "segment-cut": b"\x01" + bytes.fromhex(KNOWN.digest) + struct.pack(">BQQ", 0, 0, 4)[:-1],
        "segment-and-byte": b"\x01" + bytes.fromhex(KNOWN.digest) + struct.pack(">BQQ", 0, 0, 4) + b"x",
        "no-base-and-new": b"\x00" + struct.pack(">BQQ", 0, 0, 4),
        "json": b'{"bases":[]}',
    }
    for name, body in bodies.items():
        yield "B-61", name, made(recipe_part(content=body), whole)
    segments: dict[str, list[tuple[int, int, int]]] = {
        "new-with-offset": [(0, 1, 4)],
        "base-2": [(2, 0, 4)],
        "base-254": [(254, 0, 4)],
        "longer": [(0, 0, 5)],
        "shorter": [(0, 0, 3)],
        "huge": [(1, 0, 2**63)],
        "end-beyond": [(1, 2**63, 4)],
        "sum-wraps": [(1, 0, 2**63 - 1), (1, 0, 2**63 - 1), (0, 0, 6)],
        "zeros-with-offset": [(255, 4, 4)],
        "empty-last": [(0, 0, 4), (1, 0, 0)],
        "empty-new": [(0, 0, 0), (0, 0, 4)],
        "many": [(1, 0, 1)] * 65 + [(0, 0, 4)],
    }
    for name, rows in segments.items():
        yield "B-61", name, made(recipe_part(*rows), whole)
    one = digest_of(b"one\n").hex()
    for name, members in {
        "nothing-behind": (),
        "other-name": (part(f"chunks/{DIGEST}", b"one\n" + digest_of(b"one\n")),),
        "no-digest": (part(f"chunks/{one}", b"one\n"),),
        "recipe-again": (recipe_part((0, 0, 4)), whole),
        "content": (part("files/created/added/one.txt", b"one\n"),),
        "empty": (part(f"chunks/{one}", b""),),
        "short-digest": (part(f"chunks/{one}", b"one\n" + bytes(31)),),
    }.items():
        yield "B-60", name, made(recipe_part((0, 0, 4)), *members)
    yield "B-50", "chunks-first", made(whole, recipe_part((0, 0, 4)))
    yield "B-50", "chunks-alone", made(whole)
    for name, digest in (
        ("zeros", bytes(32)),
        ("of-nothing", digest_of(b"")),
        ("flipped", bytes([digest_of(b"one\n")[0] ^ 1]) + digest_of(b"one\n")[1:]),
    ):
        yield "B-63", name, made(recipe_part((0, 0, 4)), new_bytes(b"one\n", digest=digest))
    yield "B-63", "other-bytes", made(recipe_part((0, 0, 4)), new_bytes(b"two\n", digest=digest_of(b"one\n")))
    for size in (2**40 + 1, 2**62):
        yield "B-62", f"zeros-{size}", both(op(1, size=size), made(recipe_part((255, 0, size)), new_bytes(b"")))


def _parts_of_streams() -> Found:
    whole = b"x" + digest_of(b"x")
    names = {
        "short-id": f"parts/{DIGEST[:-2]}/{0:016x}",
        "upper-id": f"parts/{DIGEST.upper()}/{0:016x}",
        "short-offset": f"parts/{DIGEST}/{0:015x}",
        "long-offset": f"parts/{DIGEST}/{0:017x}",
        "decimal": f"parts/{DIGEST}/0",
        "no-offset": f"parts/{DIGEST}",
        "more": f"parts/{DIGEST}/{0:016x}/x",
        "file": "files/created/added/one.txt",
        "manifest": "manifest.json",
        "absolute": f"/parts/{DIGEST}/{0:016x}",
        "minus": f"parts/{DIGEST}/-00000000000000f",
    }
    for name, member in names.items():
        yield "B-65", name, bringing(part(member, whole))
    for size in (1, 16, 31, 32):
        yield "B-65", f"{size}-bytes", bringing(part(f"parts/{DIGEST}/{0:016x}", bytes(size)))
    for offset in (2**63 - 1, 2**63, 2**64 - 1):
        yield "B-65", f"offset-{offset}", bringing(part(f"parts/{DIGEST}/{offset:016x}", whole))
    yield "B-65", "over-later", bringing(part(f"parts/{DIGEST}/{512:016x}", b""))
    yield "B-50", "member-behind", bringing(first_part(b"x"), part("files/created/x", b"x"))
    yield "B-50", "other-stream-behind", bringing(first_part(b"x"), part(f"parts/{'cd' * 32}/{0:016x}", whole))
    yield "B-66", "zeros", bringing(first_part(b"x" * 1000, digest=bytes(32)))
    yield "B-66", "of-nothing", bringing(first_part(b"x", digest=digest_of(b"")))
    yield "B-66", "of-another", bringing(first_part(b"x", digest=digest_of(b"y")))


# Who says what: identities and numbers


def _of_identity() -> list[Hostile]:
    """Return bundles that are good by themselves, and wrong here and now."""

    def out_of_turn(name: str, code: str, **changes: object) -> Hostile:
        return Hostile(f"{code}-{name}", None, manifest(**changes), code)

    late: dict[str, object] = {"sequence_number": 10, "parent_sequence": 9}
    found = [
        Hostile(f"B-26-announced-{name}", "B-26", manifest(), announced=value)
        for name, value in (("zeros", bytes(32)), ("of-nothing", digest_of(b"")), ("other", digest_of(b"x")))
    ]
    found += [
        out_of_turn("number-spent", "SEQUENCE_FORK", **late),
        out_of_turn("first-again", "SEQUENCE_FORK", sequence_number=1, parent_sequence=0),
        out_of_turn("ahead", "SEQUENCE_GAP", sequence_number=12, parent_sequence=11),
        out_of_turn("far-ahead", "SEQUENCE_GAP", sequence_number=2**53 - 1, parent_sequence=2**53 - 2),
        out_of_turn("other-parent", "SEQUENCE_FORK", parent_root=DIGEST),
        out_of_turn("parent-of-nothing", "SEQUENCE_FORK", parent_root=digest_of(b"").hex()),
        out_of_turn("other-client", "NOT_OWNER", client_id="f" * 32),
        out_of_turn("other-client-ahead", "NOT_OWNER", client_id="f" * 32, sequence_number=12, parent_sequence=11),
        out_of_turn("root-of-zeros", "ROOT_MISMATCH", root="0" * 64),
        out_of_turn("root-before", "ROOT_MISMATCH", root=draft().manifest["parent_root"]),
    ]
    thin = [
        ("one", lambda m: m.pop(3)),
        ("updated", lambda m: m.pop(4)),
        ("twin", lambda m: m.pop(5)),
        ("all", lambda m: m.__delitem__(slice(3, None))),
    ]
    found += [Hostile(f"CONTENT_MISSING-{name}", None, parts(change), "CONTENT_MISSING") for name, change in thin]
    later = part(f"parts/{'ef' * 32}/{4096:016x}", b"x" + digest_of(b"x"))
    found.append(Hostile("CONTENT_MISSING-part-of-no-stream", None, bringing(later), "CONTENT_MISSING"))
    base = bytes.fromhex("ef" * 32)
    foreign = recipe_part(content=b"\x01" + base + struct.pack(">BQQ", 1, 0, 4))
    found.append(Hostile("CONTENT_MISSING-base", None, made(foreign, new_bytes(b"")), "CONTENT_MISSING"))
    beyond = recipe_part((1, 98, 4))
    found.append(Hostile("CONTENT_MISSING-range", None, made(beyond, new_bytes(b"")), "CONTENT_MISSING"))
    wrong = recipe_part((1, 0, 4))
    found.append(Hostile("CONTENT_MISSING-made-wrong", None, made(wrong, new_bytes(b"")), "CONTENT_MISSING"))
    zeros = recipe_part((255, 0, 4))
    found.append(Hostile("CONTENT_MISSING-made-of-zeros", None, made(zeros, new_bytes(b"")), "CONTENT_MISSING"))
    return found


_FAMILIES: tuple[Callable[[], Found], ...] = (
    _magics,
    _descriptors,
    _ends,
    _bombs,
    _truncations,
    _checksums,
    _types,
    _headers,
    _paddings,
    _end_marks,
    _order,
    _manifest_members,
    _json_texts,
    _manifest_forms,
    _hostile_paths,
    _members,
    _digests,
    _targets,
    _pairs,
    _tree,
    _hashes,
    _counts,
    _contents,
    _recipes,
    _parts_of_streams,
)
