"""How refused bundles are made: the next one of the good chain, with an edit that spoils one layer of it.

Every layer above the fault (digests, counts, identity, headers, compression) is computed anew.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import msgspec
import zstandard
from corpus_good import File, Life, Model, compose, directory_of, good_chain, noise

from deltasync.core import tar
from deltasync.core.bundle import METADATA_MEMBERS
from deltasync.core.errors import LimitExceeded, Refused, RootMismatch
from deltasync.core.hashing import digest_of
from deltasync.core.manifest import Operation

JSON = dict[str, Any]
LIMITS = {"B-3", "B-7", "B-8", "B-16", "B-30", "B-62"}
DIGEST = "ab" * 32
KNOWN = File(noise("three", 100))
"""A content that the receiver has from the good chain."""


@dataclass
class Part:
    """One member of the archive as it will be written."""

    header: bytes
    content: bytes
    padding: bytes


def part(name: str | bytes, content: bytes) -> Part:
    """Return a member in canonical form."""
    name = name.encode() if isinstance(name, str) else name
    return Part(tar.header(name, len(content)), content, tar.padding(len(content)))


def framed(archive: bytes, **options: Any) -> bytes:
    """Compress as a sender does, but for the options."""
    options = {"level": 19, "write_checksum": True, "write_content_size": True} | options
    return zstandard.ZstdCompressor(**options).compress(archive)


@dataclass
class Draft:
    """A good bundle before it is written; an edit spoils one layer of it."""

    operations: list[JSON]
    contents: list[tuple[str, bytes]]
    manifest: JSON
    edit_hashes: Callable[[JSON], None] = lambda hashes: None
    edit_manifest: Callable[[JSON], None] = lambda manifest: None
    edit_text: dict[str, Callable[[bytes], bytes]] = field(default_factory=dict)
    edit_parts: Callable[[list[Part]], None] = lambda parts: None
    edit_archive: Callable[[bytes], bytes] = lambda archive: archive
    frame: Callable[[bytes], bytes] = framed

    def build(self) -> bytes:
        """Write every layer on top of the one below."""
        operations = self._text("operations", {"operations": [_ordered(each) for each in self.operations]})
        hashes = self._hashes()
        self.edit_hashes(hashes)
        hashes_text = self._text("hashes", hashes)
        manifest = self._manifest(operations, hashes_text)
        self.edit_manifest(manifest)
        texts = self._text("manifest", manifest), operations, hashes_text
        parts = [part(name, text) for name, text in zip(METADATA_MEMBERS, texts, strict=True)]
        parts += [part(name, content) for name, content in self.contents]
        self.edit_parts(parts)
        archive = b"".join(each.header + each.content + each.padding for each in parts) + tar.END
        return self.frame(self.edit_archive(archive))

    def _text(self, name: str, value: object) -> bytes:
        return self.edit_text.get(name, bytes)(msgspec.json.encode(value))

    def _hashes(self) -> JSON:
        files: JSON = {}
        for each in self.operations:
            if "digest" in each:
                files[each["path"]] = each["digest"]
            elif each["operation"] == "deleted" and "base" in each:
                files.setdefault(each["path"], each["base"])
        return {"algorithm": "blake3", "files": files}

    def _manifest(self, operations: bytes, hashes: bytes) -> JSON:
        verbs = [each["operation"] for each in self.operations]
        return self.manifest | {
            "operations": {verb: verbs.count(verb) for verb in self.manifest["operations"]},
            "total_files": len(verbs),
            "total_size_bytes": sum(each.get("size", 0) for each in self.operations),
            "operations_digest": digest_of(operations).hex(),
            "hashes_digest": digest_of(hashes).hex(),
        }


def _ordered(operation: JSON) -> JSON:
    known = [name for name in Operation.__struct_fields__ if name in operation]
    return {name: operation[name] for name in (*known, *(operation.keys() - set(known)))}


@cache
def _good() -> tuple[Life, bytes, Model, int]:
    chain = good_chain()
    before = chain[-1].tree
    life = Life(dict(before))
    life.directory("added")
    life.file("added/one.txt", b"one\n")
    life.edit("README.md", b"# A life\n\nIt ends here.\n")
    life.move("copies", "added/copies.txt")
    life.delete("-rf")
    life.link("latest", "README.md")
    life.file("added/two.txt", b"two\n")
    life.file("added/two again.txt", b"two\n")
    return life, directory_of(before), before, len(chain)


def draft() -> Draft:
    """Return the bundle after the good chain, without a fault."""
    life, parent_root, _, length = _good()
    metadata = compose(life.operations, length + 1, parent_root, directory_of(life.tree))
    contents = [
        ("files/created/added/one.txt", b"one\n"),
        ("files/updated/README.md", b"# A life\n\nIt ends here.\n"),
        ("files/created/added/two.txt", b"two\n"),
    ]
    operations = [msgspec.to_builtins(each) for each in metadata.operations]
    return Draft(operations, contents, msgspec.to_builtins(metadata.manifest))


Edit = Callable[[Draft], None]


@dataclass(frozen=True)
class Fault:
    """One refused bundle: its rule, a short name, what is wrong, and how to spoil a good one so."""

    rule: str | None
    slug: str
    says: str
    edit: Edit

    @property
    def code(self) -> str:
        """The code of the error."""
        if self.rule is None:
            return RootMismatch.code
        return LimitExceeded.code if self.rule in LIMITS else Refused.code

    @property
    def file(self) -> str:
        """The name in bundles/refused."""
        return f"{self.rule or self.code}-{self.slug}.tar.zst"

    def build(self) -> bytes:
        """Return the bundle."""
        spoiled = draft()
        self.edit(spoiled)
        return spoiled.build()


# Edits of the frame


def frame(change: Callable[[bytes], bytes]) -> Edit:
    """Change the compressed bytes."""

    def edit(spoiled: Draft) -> None:
        spoiled.frame = lambda archive: change(framed(archive))

    return edit


def compressed(compress: Callable[[bytes], bytes]) -> Edit:
    """Compress in another way."""

    def edit(spoiled: Draft) -> None:
        spoiled.frame = compress

    return edit


def patch(at: int, new: bytes) -> Callable[[bytes], bytes]:
    """Replace bytes at an offset."""
    return lambda content: content[:at] + new + content[at + len(new) :]


def begin(descriptor: int, fields: bytes) -> Callable[[bytes], bytes]:
    """Replace the frame's header, which in a small frame has two bytes of content size."""
    return lambda sealed: sealed[:4] + bytes([descriptor]) + fields + sealed[7:]


def sized(sealed: bytes, more: int) -> bytes:
    """Declare more content than there is."""
    size = int.from_bytes(sealed[5:7], "little") + more
    return sealed[:5] + size.to_bytes(2, "little") + sealed[7:]


def wide_window(archive: bytes) -> bytes:
    """Compress with a window of 16 MiB."""
    parameters = zstandard.ZstdCompressionParameters(window_log=24, write_checksum=1, write_content_size=1)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj(size=len(archive))
    return stream.compress(archive) + stream.flush()


def without_size(archive: bytes) -> bytes:
    """Compress without declaring the size."""
    stream = zstandard.ZstdCompressor(write_checksum=True).compressobj()
    return stream.compress(archive) + stream.flush()


def zeros(size: int) -> Edit:
    """Add a file of zeros."""

    def edit(spoiled: Draft) -> None:
        content = bytes(size)
        digest = digest_of(content).hex()
        spoiled.operations.append(_file("added/zeros.bin", digest=digest, size=size))
        spoiled.contents.append(("files/created/added/zeros.bin", content))

    return edit


def both(*edits: Edit) -> Edit:
    """Make several edits."""

    def edit(spoiled: Draft) -> None:
        for each in edits:
            each(spoiled)

    return edit


# Edits of the archive


def archive(change: Callable[[bytes], bytes]) -> Edit:
    """Change the archive's bytes."""

    def edit(spoiled: Draft) -> None:
        spoiled.edit_archive = change

    return edit


def parts(change: Callable[[list[Part]], Any]) -> Edit:
    """Change the list of members."""

    def edit(spoiled: Draft) -> None:
        spoiled.edit_parts = lambda members: change(members) and None

    return edit


def header(at: int, new: bytes, *, member: int = 3) -> Edit:
    """Replace bytes in a member's header and compute its checksum again."""

    def change(members: list[Part]) -> None:
        members[member].header = checked(patch(at, new)(members[member].header))

    return parts(change)


def checked(block: bytes) -> bytes:
    """Return a header with the checksum that its bytes have."""
    blank = patch(148, b" " * 8)(block)
    return patch(148, b"%06o\x00 " % sum(blank))(blank)


def pax(name: str, records: bytes) -> Part:
    """Return a member with a PAX header of these records."""
    described = tar.header(name.encode(), 4)
    pax = checked(patch(156, b"x")(tar.header(b"PaxHeaders", len(records))))
    return Part(pax + records + tar.padding(len(records)) + described, b"one\n", tar.padding(4))


def pax_twice(members: list[Part]) -> None:
    """Put one PAX header before another."""
    twice = pax("files/created/added/one.txt", b"12 path=abc\n")
    members[3] = Part(twice.header[: 2 * tar.BLOCK] + twice.header, twice.content, twice.padding)


def replace(index: int, new: Part) -> Edit:
    """Replace one member."""
    return parts(lambda members: members.__setitem__(index, new))


def made(*members: Part) -> Edit:
    """Let the first content come as a recipe with these members, as the manifest requires."""
    return both(manifest(requires=["recipes"]), parts(lambda old: old.__setitem__(slice(3, 4), members)))


def recipe_part(*segments: tuple[int, int, int], content: bytes | None = None) -> Part:
    """Return the recipe of the first content, with one base; content: other bytes instead."""
    one = digest_of(b"one\n").hex()
    packed = b"".join(struct.pack(">BQQ", *segment) for segment in segments)
    written = b"\x01" + bytes.fromhex(KNOWN.digest) + packed if content is None else content
    return part(f"metadata/recipes/{one}", written)


def new_bytes(content: bytes, digest: bytes | None = None) -> Part:
    """Return the new bytes of the first content; digest: another one than theirs."""
    one = digest_of(b"one\n").hex()
    return part(f"chunks/{one}", content + (digest_of(content) if digest is None else digest))


def bringing(*members: Part) -> Edit:
    """Let the bundle have no operations, require parts and have these members."""

    def spoil(spoiled: Draft) -> None:
        spoiled.operations, spoiled.contents = [], list[tuple[str, bytes]]()
        spoiled.manifest |= {"requires": ["parts"], "root": spoiled.manifest["parent_root"]}
        spoiled.edit_parts = lambda old: old.extend(members)

    return spoil


def first_part(content: bytes, digest: bytes | None = None) -> Part:
    """Return the first part of a stream; digest: another one than the stream has."""
    return part(f"parts/{DIGEST}/{0:016x}", content + (digest_of(content) if digest is None else digest))


def append(name: str, content: bytes) -> Edit:
    """Add a member behind the others."""
    return parts(lambda members: members.append(part(name, content)))


def swap(left: int, right: int) -> Edit:
    """Swap two members."""

    def change(members: list[Part]) -> None:
        members[left], members[right] = members[right], members[left]

    return parts(change)


def other_split(members: list[Part]) -> None:
    """Split a name between prefix and name where the name field alone has room."""
    members[3].header = checked(patch(0, b"one.txt".ljust(100, b"\x00"))(members[3].header))
    members[3].header = checked(patch(345, b"files/created/added")(members[3].header))


# Edits of the metadata


def manifest(**changes: object) -> Edit:
    """Change members of the manifest."""

    def edit(spoiled: Draft) -> None:
        spoiled.edit_manifest = lambda values: values.update(changes)

    return edit


def hashes(change: Callable[[JSON], Any]) -> Edit:
    """Change the value of hashes.json."""

    def edit(spoiled: Draft) -> None:
        spoiled.edit_hashes = lambda values: change(values) and None

    return edit


def text(member: str, old: bytes, new: bytes) -> Edit:
    """Replace text in one of the JSON members."""

    def change(content: bytes) -> bytes:
        assert old in content, (member, old)
        return content.replace(old, new, 1)

    def edit(spoiled: Draft) -> None:
        spoiled.edit_text[member] = change

    return edit


# Edits of the operations


def op(index: int, **changes: object) -> Edit:
    """Change members of one operation; None removes a member."""

    def edit(spoiled: Draft) -> None:
        changed = spoiled.operations[index] | changes
        spoiled.operations[index] = {name: value for name, value in changed.items() if value is not None}

    return edit


def add(**operation: object) -> Edit:
    """Add an operation."""

    def edit(spoiled: Draft) -> None:
        spoiled.operations.append(dict(operation))

    return edit


def _file(path: str, **fields: object) -> JSON:
    known = {"digest": KNOWN.digest, "size": len(KNOWN.content), "mtime_ns": KNOWN.mtime_ns}
    return {"operation": "created", "kind": "file", "path": path} | known | fields


def add_file(path: str, **fields: object) -> Edit:
    """Add the creation of a file whose content the receiver has."""
    return add(**_file(path, **fields))


def add_directory(path: str, **fields: object) -> Edit:
    """Add the creation of a directory."""
    return add(operation="created", kind="directory", path=path, **fields)


def add_link(path: str, target: str) -> Edit:
    """Add the creation of a symlink."""
    return add(operation="created", kind="symlink", path=path, target=target)


def add_move(path: str, source: str, **fields: object) -> Edit:
    """Add the move of a directory."""
    return add(operation="moved", kind="directory", path=path, source_path=source, base=DIGEST, **fields)


def many(count: int, path: str) -> Edit:
    """Add many directories."""

    def edit(spoiled: Draft) -> None:
        for number in range(count):
            spoiled.operations.append({"operation": "created", "kind": "directory", "path": path % number})

    return edit
