"""The bundles in bundles/: the good chain opens and applies to the trees beside it, each refused one by its rule."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import zstandard
from corpus_faults import FAULTS
from corpus_good import Step, good_chain, part_chain, recipe_chain, tree_text

from deltasync.core.bundle import ArrivingPart, BundleReader, Content, file_name
from deltasync.core.delta import apply
from deltasync.core.errors import DeltasyncError, Refused, RootMismatch
from deltasync.core.hashing import digest_of
from deltasync.core.manifest import EMPTY_ROOT, Entry, Kind, decode_directory
from deltasync.core.recipe import ZEROS
from deltasync.core.tree import walk
from deltasync.core.wire import Limits

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
GOOD: list[dict[str, Any]] = json.loads((BUNDLES / "good/index.json").read_text(encoding="utf-8"))
RECIPES: list[dict[str, Any]] = json.loads((BUNDLES / "recipes/index.json").read_text(encoding="utf-8"))
PARTS: list[dict[str, Any]] = json.loads((BUNDLES / "parts/index.json").read_text(encoding="utf-8"))
REFUSED: list[dict[str, Any]] = json.loads((BUNDLES / "refused/index.json").read_text(encoding="utf-8"))


class Receiver:
    """What a receiver keeps: the root, directory objects, and the content it has."""

    def __init__(self) -> None:
        self.root = EMPTY_ROOT
        self.objects: dict[bytes, bytes] = {}
        self.cache: dict[str, bytes] = {}
        self.streams: dict[bytes, bytes] = {}

    def load(self, digest: bytes) -> list[Entry]:
        return decode_directory(self.objects[digest])

    def receive(self, raw: bytes) -> None:
        """Read a bundle strictly to its end, then apply it to the tree."""
        reader = BundleReader(io.BytesIO(raw), Limits())
        metadata = reader.metadata()
        self._take(reader.part())
        carried = {content.operation.digest or "": self._made(content) for content in reader.contents()}
        reader.finish()
        assert all(digest_of(content).hex() == digest for digest, content in carried.items())
        assert metadata.header.parent_root == self.root
        applied = apply(self.root, metadata.operations, self.load)
        if applied.root.hex() != metadata.manifest.root:
            raise RootMismatch("the operations lead to another root")
        absent = {operation.digest for operation in metadata.operations if operation.digest} - carried.keys()
        assert absent <= self.cache.keys()
        self.objects |= applied.objects
        self.root = applied.root
        self.cache |= carried

    def _take(self, arriving: ArrivingPart | None) -> None:
        """Put a part behind what is there of its stream."""
        if arriving is None:
            return
        part = arriving.part
        content = self.streams.get(part.stream, b"")[: part.offset] + b"".join(map(bytes, arriving.views))
        if part.size and arriving.read_digest() != digest_of(content):
            raise Refused("B-66", "the stream has another digest")
        self.streams[part.stream] = content

    def _made(self, content: Content) -> bytes:
        """Return a content that travels whole, or make it by its recipe."""
        new = b"".join(map(bytes, content.views))
        if content.recipe is None:
            return new
        held = {bytes.fromhex(digest): content for digest, content in self.cache.items()} | self.streams
        bases, made = [held[digest] for digest in content.recipe.bases], b""
        for base, offset, size in content.recipe.segments():
            if base == ZEROS:
                made += bytes(size)
                continue
            made += bases[base - 1][offset : offset + size] if base else new[:size]
            new = new if base else new[size:]
        return made

    def text(self) -> str:
        """Write the tree as the files in trees/ do."""
        lines = [f"root\t{self.root.hex()}"]
        for path, entry in sorted(walk(self.root, self.load)):
            if entry.kind is Kind.FILE:
                mode = "x" if entry.executable else "-"
                lines.append(f"file\t{mode}\t{entry.size}\t{entry.mtime_ns}\t{entry.digest.hex()}\t{path}")
            else:
                lines.append(f"{entry.kind.value}\t-\t-\t-\t{entry.target or '-'}\t{path}")
        return "\n".join(lines) + "\n"


@cache
def _after_the_chain() -> Receiver:
    receiver = Receiver()
    for row in GOOD:
        receiver.receive((BUNDLES / "good" / row["file"]).read_bytes())
    return receiver


def test_the_good_chain_leads_to_the_tree_beside_each_bundle() -> None:
    """Ten bundles, each received on top of the one before, give exactly the trees and roots that are written down."""
    receiver = Receiver()
    for row in GOOD:
        receiver.receive((BUNDLES / "good" / row["file"]).read_bytes())
        assert receiver.root.hex() == row["root"]
        assert receiver.text() == (BUNDLES / "good" / row["tree"]).read_text(encoding="utf-8")
    assert [row["sequence"] for row in GOOD] == list(range(1, 11))


def test_the_chain_with_recipes_leads_to_the_tree_beside_each_bundle() -> None:
    """The bundles behind the first carry less than a tenth of what they name; every content has its digest."""
    receiver, sizes = Receiver(), []
    for row in RECIPES:
        raw = (BUNDLES / "recipes" / row["file"]).read_bytes()
        receiver.receive(raw)
        sizes.append((len(raw), sum(map(len, receiver.cache.values()))))
        assert receiver.text() == (BUNDLES / "recipes" / row["tree"]).read_text(encoding="utf-8")
    assert sizes[1][0] < 4_000 and sizes[1][1] > 60_000
    assert sizes[2][0] < 10_000 and sizes[2][1] > 4 << 20


def test_the_chain_with_parts_leads_to_the_tree_beside_each_bundle() -> None:
    """Parts change nothing; the bundles behind them carry no content."""
    receiver = Receiver()
    for row in PARTS:
        raw = (BUNDLES / "parts" / row["file"]).read_bytes()
        receiver.receive(raw)
        assert receiver.text() == (BUNDLES / "parts" / row["tree"]).read_text(encoding="utf-8")
    assert sum(map(len, receiver.cache.values())) == 43_000


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row["file"].removesuffix(".tar.zst"))
def test_a_refused_bundle_is_refused_by_exactly_its_rule(row: dict[str, Any]) -> None:
    """Each bundle has one fault, and the error names it; what the receiver holds stays as it was."""
    receiver = _after_the_chain()
    before = receiver.root, len(receiver.objects), len(receiver.cache)
    with pytest.raises(DeltasyncError) as caught:
        receiver.receive((BUNDLES / "refused" / row["file"]).read_bytes())
    assert (caught.value.code, caught.value.facts.get("rule")) == (row["code"], row["rule"])
    assert (receiver.root, len(receiver.objects), len(receiver.cache)) == before


def test_the_folder_has_a_row_for_every_file_and_enough_of_them() -> None:
    """Nothing lies in bundles/ that no index names; at least 45 are refused."""
    for part, rows in (("good", GOOD), ("recipes", RECIPES), ("parts", PARTS), ("refused", REFUSED)):
        assert {file.name for file in (BUNDLES / part).glob("*.tar.zst")} == {row["file"] for row in rows}
    assert len(REFUSED) >= 45


@pytest.mark.parametrize(
    ("part", "rows", "build"),
    [("good", GOOD, good_chain), ("recipes", RECIPES, recipe_chain), ("parts", PARTS, part_chain)],
)
def test_a_good_chain_is_built_again_from_its_parts(
    part: str, rows: list[dict[str, Any]], build: Callable[[], list[Step]]
) -> None:
    """Names, identities, trees and archives are those of the frozen files, whatever the release of zstd."""
    unpack = zstandard.ZstdDecompressor().decompress
    for row, step in zip(rows, build(), strict=True):
        frozen = (BUNDLES / part / row["file"]).read_bytes()
        assert (row["file"], row["title"]) == (file_name(step.metadata), step.title)
        assert tree_text(step.tree) == (BUNDLES / part / row["tree"]).read_text(encoding="utf-8")
        assert unpack(frozen) == unpack(step.sealed)


@pytest.mark.parametrize("number", range(len(FAULTS)), ids=lambda number: FAULTS[number].slug)
def test_a_refused_bundle_is_built_again_from_its_parts(number: int) -> None:
    """The frozen file holds what its line in corpus_faults.py builds."""
    fault, row = FAULTS[number], REFUSED[number]
    assert (fault.file, fault.rule, fault.code, fault.says) == (row["file"], row["rule"], row["code"], row["says"])
    frozen, built = (BUNDLES / "refused" / row["file"]).read_bytes(), fault.build()
    assert _content(built) == _content(frozen)


def _content(raw: bytes) -> bytes | None:
    """Return the first MiB that plain zstd decompresses, or None for a frame that is itself the fault."""
    try:
        return zstandard.ZstdDecompressor().stream_reader(raw).read(1 << 20)
    except zstandard.ZstdError:
        return None
