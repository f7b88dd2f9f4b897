"""Mutants: JSON values and bundles with a few random changes, from decoded structure outwards; all from one number."""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any

import zstandard
from corpus_refused import (
    DIGEST,
    JSON,
    KNOWN,
    Draft,
    Part,
    checked,
    draft,
    first_part,
    new_bytes,
    part,
    patch,
    recipe_part,
)

from deltasync.core import tar
from deltasync.core.hashing import digest_of

TEXTS = (
    *(
        "",
        ".",
        "..",
        "/",
        "../x",
        "a/../b",
        "/etc/passwd",
        ".deltasync",
        ".deltasync/x",
        "a//b",
        "a/",
        "\x00",
        "a\x00b",
    ),
    *("\x1b[31m", "\x7f", "\x85", "\u202e", "\ufeff", "é" * 128, "x" * 256, "x" * 4097, "😀", "a\\b", "%2e%2e", "a\nb"),
    *("created", "updated", "moved", "deleted", "file", "symlink", "directory", "zstd", "blake3", "2.0", "recipes"),
    *("added", "README.md", "copies", "-rf", "latest", "empty", "empty/file", "pictures", "parts", "null", "0", "-1"),
    *(DIGEST, KNOWN.digest, "0" * 64, "A" * 64, "g" * 64, digest_of(b"").hex(), "0" * 63, "1" * 32, "2026-11-21"),
)
NUMBERS = (0, 1, -1, 2, 7, 255, 2**31, 2**32, 2**53, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), 2**64 - 1, 1.5, 1e308, -0.0)
_OTHERS: tuple[object, ...] = (None, True, False, [], {}, [[]], {"": ""}, [None])


def value_of(random: Random) -> object:
    """Return some small value."""
    kind = random.random()
    if kind < 0.5:
        return random.choice(TEXTS)
    return random.choice(NUMBERS) if kind < 0.8 else random.choice(_OTHERS)


def changed(random: Random, value: Any) -> Any:
    """Return a JSON value with one random change somewhere inside."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        return _changed_object(random, value)
    if isinstance(value, list) and value and random.random() < 0.9:
        return _changed_list(random, value)
    if isinstance(value, str) and random.random() < 0.6:
        return _changed_text(random, value)
    if isinstance(value, int) and not isinstance(value, bool) and random.random() < 0.6:
        return random.choice((value + 1, value - 1, -value, value << 1, ~value, random.choice(NUMBERS)))
    return value_of(random)


def _changed_object(random: Random, value: JSON) -> JSON:
    value = dict(value)
    name = random.choice(list(value))
    what = random.random()
    if what < 0.6:
        value[name] = changed(random, value[name])
    elif what < 0.7:
        del value[name]
    elif what < 0.8:
        value[name] = value[random.choice(list(value))]
    elif what < 0.9:
        value[str(random.choice(TEXTS))] = value_of(random)
    else:
        value[name + random.choice(("x", " ", "\x00", "_"))] = value.pop(name)
    return value


def _changed_list(random: Random, value: list[Any]) -> list[Any]:
    value, at = list(value), random.randrange(len(value))
    what = random.random()
    if what < 0.6:
        value[at] = changed(random, value[at])
    elif what < 0.7:
        del value[at]
    elif what < 0.8:
        value.insert(at, random.choice(value))
    elif what < 0.9:
        other = random.randrange(len(value))
        value[at], value[other] = value[other], value[at]
    else:
        value.insert(at, value_of(random))
    return value


def _changed_text(random: Random, text: str) -> str:
    at = random.randrange(len(text) + 1)
    what = random.random()
    if what < 0.3:
        return (
            text[:at]
            + chr(random.choice((0, 9, 10, 27, 46, 47, 92, 127, 133, 255, 0x202E, 0xFFFF, 0x1F600)))
            + text[at:]
        )
    if what < 0.5:
        return text[:at] + text[at + 1 :]
    if what < 0.7:
        return text[:at] + random.choice(TEXTS) + text[at:]
    if what < 0.8:
        return text.swapcase()
    return text + "/" + random.choice(TEXTS) if what < 0.9 else text * 2


def spoiled_bytes(random: Random, content: bytes) -> bytes:
    """Return bytes with some of them flipped, taken out, repeated or put in."""
    if not content:
        return random.randbytes(3)
    at = random.randrange(len(content))
    what = random.random()
    if what < 0.4:
        return patch(at, bytes([content[at] ^ 1 << random.randrange(8)]))(content)
    if what < 0.55:
        return content[:at] + content[at + random.choice((1, 2, 512)) :]
    if what < 0.7:
        return content[:at] + random.choice((b"\x00", b" ", b"\xff", b'"', b"{", b"[", b",")) + content[at:]
    if what < 0.8:
        end = at + random.choice((1, 16, 512))
        return content[:end] + content[at:end] + content[end:]
    return content[:at] if what < 0.9 else content + content[at:][:600]


# Bundles


class Mutant(Draft):
    """A draft whose operations may be nonsense: what is computed from them is so from those that are not."""

    def _sound(self) -> list[JSON]:
        texts = ("path", "operation", "base", "digest")
        return [
            each
            for each in self.operations
            if {"path", "operation"} <= each.keys()
            and all(isinstance(each.get(name, ""), str) for name in texts)
            and isinstance(each.get("size", 0), int)
        ]

    def _hashes(self) -> JSON:
        return Draft(self._sound(), [], self.manifest)._hashes()

    def _manifest(self, operations: bytes, hashes: bytes) -> JSON:
        found = Draft(self._sound(), [], self.manifest)._manifest(operations, hashes)
        return found | {"total_files": len(self.operations)}


_compressor = zstandard.ZstdCompressor(level=1, write_checksum=True, write_content_size=True)


@cache
def _base() -> Draft:
    return draft()


def mutant(random: Random) -> tuple[bytes, bool]:
    """Return a bundle with one to three faults, and whether they are of its structure."""
    made = _fresh(random)
    is_structural = random.random() < 0.87
    if is_structural:
        for _ in range(random.choice((1, 1, 1, 2, 3))):
            random.choices(_WAYS, _WEIGHTS)[0](random, made)
        return made.build(), True
    if random.random() < 0.5:
        made.edit_archive = lambda archive: spoiled_bytes(random, archive)
        return made.build(), False
    return spoiled_bytes(random, made.build()), False


def _fresh(random: Random) -> Mutant:
    base = _base()
    made = Mutant([dict(each) for each in base.operations], list(base.contents), dict(base.manifest))
    made.frame = _compressor.compress
    kind = random.random()
    if kind < 0.12:  # the first content by a recipe
        made.manifest["requires"] = ["recipes"]
        segments = random.choice((((0, 0, 4),), ((1, 0, 1), (0, 0, 3)), ((255, 0, 2), (0, 0, 2))))
        new = sum(size for base_number, _, size in segments if not base_number)
        members = [recipe_part(*segments), new_bytes(b"one\n"[:new])]
        made.edit_parts = lambda old: old.__setitem__(slice(3, 4), members)
    elif kind < 0.2:
        made.operations, made.contents = [], []
        made.manifest |= {"requires": ["parts"], "root": made.manifest["parent_root"]}
        carried = first_part(random.randbytes(random.choice((1, 40, 600))))
        made.edit_parts = lambda old: old.append(carried)
    elif kind < 0.5:  # few operations: a change does not drown
        keep = random.sample(range(len(made.operations)), random.choice((1, 2, 3)))
        made.operations = [made.operations[n] for n in sorted(keep)]
        named = {f"files/{each['operation']}/{each['path']}" for each in made.operations}
        made.contents = [each for each in made.contents if each[0] in named]
    return made


def _operation(random: Random, made: Mutant) -> None:
    if made.operations:
        at = random.randrange(len(made.operations))
        made.operations[at] = _changed_object(random, made.operations[at])


def _field(random: Random, made: Mutant) -> None:
    if made.operations:
        name = random.choice(
            ("path", "source_path", "base", "digest", "size", "mtime_ns", "target", "executable", "kind")
        )
        random.choice(made.operations)[name] = changed(random, random.choice(made.operations).get(name, ""))


def _operations(random: Random, made: Mutant) -> None:
    if not made.operations:
        return
    at, other = (random.randrange(len(made.operations)) for _ in range(2))
    what = random.random()
    if what < 0.3:
        del made.operations[at]
    elif what < 0.5:
        made.operations.insert(at, dict(made.operations[other]))
    elif what < 0.7:
        made.operations[at], made.operations[other] = made.operations[other], made.operations[at]
    elif what < 0.85:
        made.operations[at]["operation"] = random.choice(("created", "updated", "moved", "deleted"))
    else:
        made.operations[at]["path"] = made.operations[other].get(random.choice(("path", "source_path")), "x")


def _manifest(random: Random, made: Mutant) -> None:
    before = made.edit_manifest

    def edit(values: JSON) -> None:
        before(values)
        after = _changed_object(random, values)
        values.clear()
        values.update(after)

    made.edit_manifest = edit


def _hashes(random: Random, made: Mutant) -> None:
    def edit(values: JSON) -> None:
        after = _changed_object(random, values)
        values.clear()
        values.update(after)

    made.edit_hashes = edit


def _text(random: Random, made: Mutant) -> None:
    made.edit_text[random.choice(("manifest", "operations", "hashes"))] = lambda content: spoiled_bytes(random, content)


def _content(random: Random, made: Mutant) -> None:
    """Change a content and what is said of it, so that only what is meant is wrong, if anything is."""
    if not made.contents:
        return
    at = random.randrange(len(made.contents))
    name, before = made.contents[at]
    after = random.choice((b"", b"x", bytes(512), bytes(513), spoiled_bytes(random, before)))
    made.contents[at] = name, after
    for each in made.operations:
        if each.get("digest") == digest_of(before).hex() and random.random() < 0.9:
            each["digest"] = digest_of(after).hex()
            if random.random() < 0.9:
                each["size"] = len(after)
                if not after:
                    del each["size"]


def _members(random: Random, made: Mutant) -> None:
    def edit(members: list[Part]) -> None:
        at, other = (random.randrange(len(members)) for _ in range(2))
        what = random.random()
        if what < 0.25:
            del members[at]
        elif what < 0.5:
            members.insert(at, members[other])
        elif what < 0.75:
            members[at], members[other] = members[other], members[at]
        else:
            names = [f"files/{random.choice(TEXTS)}", f"metadata/recipes/{DIGEST}", f"parts/{DIGEST}/{0:016x}", "../x"]
            name = random.choice((*names, "manifest.json", f"files/created/{random.choice(TEXTS)}"))
            members.insert(at, part(name, random.randbytes(random.choice((0, 1, 40, 513)))))

    _also(made, edit)


def _header(random: Random, made: Mutant) -> None:
    def edit(members: list[Part]) -> None:
        if not members:
            return
        chosen = random.choice(members)
        at = random.choice(
            (0, 99, 100, 107, 108, 116, 124, 135, 136, 148, 156, 157, 257, 263, 265, 297, 329, 337, 345, 500)
        )
        new = random.choice(
            (b"\x00", b"\x80", b"\xff", b" ", b"x", b"7", b"1", b"g", b"L", b"../", b"0000777\x00", b"\xff" * 12)
        )
        chosen.header = patch(at, new)(chosen.header)[: len(chosen.header)]
        if random.random() < 0.85 and len(chosen.header) == tar.BLOCK:
            chosen.header = checked(chosen.header)

    _also(made, edit)


def _padding(random: Random, made: Mutant) -> None:
    def edit(members: list[Part]) -> None:
        if members:
            chosen = random.choice(members)
            chosen.padding = spoiled_bytes(random, chosen.padding)

    _also(made, edit)


def _pax(random: Random, made: Mutant) -> None:
    """Put a PAX header before a member, with some records."""

    def edit(members: list[Part]) -> None:
        if not members:
            return
        chosen = random.choice(members)
        keys = ("path", "size", "mtime", "linkpath", "GNU.sparse.size", "hdrcharset", "comment")
        records = b"".join(_record(random, random.choice(keys)) for _ in range(random.choice((0, 1, 1, 2))))
        head = checked(patch(156, b"x")(tar.header(random.choice((b"PaxHeaders", b"x")), len(records))))
        chosen.header = head + records + tar.padding(len(records)) + chosen.header

    _also(made, edit)


def _record(random: Random, key: str) -> bytes:
    value = random.choice((random.choice(TEXTS), str(random.choice(NUMBERS)), "p/" * 60 + "x")).encode()
    return tar._record(key.encode(), value) if random.random() < 0.8 else b"%d %s=%s\n" % (7, key.encode(), value)


def _recipe(random: Random, made: Mutant) -> None:
    """Let the first content come by a recipe of random segments."""
    if len(made.operations) < 2 or made.operations[1].get("path") != "added/one.txt":
        made.operations = [dict(each) for each in _base().operations]
        made.contents = list(_base().contents)
    made.manifest["requires"] = random.choice((["recipes"], ["recipes"], ["recipes", "parts"], []))
    rows = list(random.choice((((0, 0, 4),), ((1, 0, 1), (0, 0, 3)), ((255, 0, 2), (0, 0, 2)), ((1, 0, 4),))))
    count = 1
    for _ in range(random.choice((0, 1, 1, 2))):
        at, what = random.randrange(len(rows)), random.random()
        base, offset, size = rows[at]
        if what < 0.2:
            rows[at] = random.choice((0, 1, 2, 254, 255)), offset, size
        elif what < 0.5:
            rows[at] = base, random.choice((1, 97, 2**32, 2**63 - 5, 2**63 - 1, 2**63, 2**64 - 5)), size
        elif what < 0.7:
            rows[at] = base, offset, random.choice((0, 1, 5, 2**62, 2**63 - 1))
        elif what < 0.85:
            rows[at:at] = [rows[at]] * random.choice((1, 64))
        else:
            count = random.choice((0, 2, 16, 17, 255))
    bases = b"".join(random.choice((bytes.fromhex(KNOWN.digest), bytes(32))) for _ in range(min(count, 20)))
    body = bytes([count]) + bases + b"".join(struct.pack(">BQQ", *row) for row in rows)
    if random.random() < 0.2:
        body = spoiled_bytes(random, body)
    new = sum(size for base, _, size in rows if not base and size < 100)
    members = [recipe_part(content=body), new_bytes((b"one\n" * 100)[:new])]

    def edit(old: list[Part]) -> None:
        old[3:4] = members[: random.choice((1, 2, 2, 2, 2))]

    _also(made, edit)


def _part(random: Random, made: Mutant) -> None:
    """Bring a part of some name and size."""
    made.manifest["requires"] = ["parts"]
    if random.random() < 0.8:
        made.operations, made.contents = [], []
        made.manifest["root"] = made.manifest["parent_root"]
    stream = random.choice((DIGEST, DIGEST.upper(), "0" * 64, DIGEST[:-1]))
    offset = random.choice(("%016x", "%015x", "%016X", "%d")) % random.choice(
        (0, 0, 1, 10, 2**63 - 1, 2**63, 2**64 - 1)
    )
    content = random.randbytes(random.choice((0, 1, 31, 32, 33, 600)))
    content += random.choice((b"", digest_of(content)))
    member = part(f"parts/{stream}/{offset}", content)
    _also(made, lambda members: members.insert(random.choice((3, 3, 3, len(members))), member))


def _ending(random: Random, made: Mutant) -> None:
    ends: tuple[Callable[[bytes], bytes], ...] = (
        lambda archive: archive[:-512],
        lambda archive: archive[:-1024],
        lambda archive: archive + bytes(512),
        lambda archive: archive + archive,
        lambda archive: archive[:-1] + b"x",
        lambda archive: archive[: random.randrange(len(archive))],
    )
    made.edit_archive = random.choice(ends)


def _framing(random: Random, made: Mutant) -> None:
    """Change the frame: its header, a block's, the checksum, what is behind it."""

    def frame(archive: bytes) -> bytes:
        sealed = _compressor.compress(archive)
        what = random.random()
        if what < 0.3:
            return patch(4, bytes([sealed[4] ^ 1 << random.randrange(8)]))(sealed)
        if what < 0.45:
            return patch(random.choice((5, 6, 7, 8, 9)), random.randbytes(1))(sealed)
        if what < 0.6:
            return sealed[: random.choice((4, 5, 7, 9, 12, -1, -4, -5))]
        if what < 0.8:
            return sealed + random.choice((b"\x00", sealed, b"\x50\x2a\x4d\x18\x00\x00\x00\x00", b"x" * 300))
        if what < 0.9:
            return patch(len(sealed) - 4, random.randbytes(4))(sealed)
        return random.choice((b"\x50\x2a\x4d\x18\x00\x00\x00\x00" + sealed, b"\x1f\x8b" + sealed, archive))

    made.frame = frame


def _also(made: Mutant, edit: Callable[[list[Part]], None]) -> None:
    before = made.edit_parts

    def both(members: list[Part]) -> None:
        before(members)
        edit(members)

    made.edit_parts = both


_CHOICES: dict[Callable[[Random, Mutant], None], int] = {
    _operation: 14,
    _field: 14,
    _operations: 12,
    _manifest: 12,
    _hashes: 7,
    _text: 7,
    _content: 8,
    _members: 7,
    _header: 9,
    _padding: 3,
    _pax: 4,
    _recipe: 6,
    _part: 4,
    _ending: 3,
    _framing: 5,
}
_WAYS, _WEIGHTS = tuple(_CHOICES), tuple(_CHOICES.values())
