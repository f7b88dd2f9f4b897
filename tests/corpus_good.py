"""The good chain of bundles/: ten bundles of one life, with a dictionary as the oracle of the tree after each."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import shake_256

from deltasync.core import bundle, recipe
from deltasync.core.hashing import digest_of, directory_digest
from deltasync.core.manifest import EMPTY_ROOT, Entry, Kind, Operation, Verb, encode_directory
from deltasync.core.part import Part

WORKSPACE = "life"
EPOCH = "6c696665" * 4
CLIENT = "00112233445566778899aabbccddeeff"
STARTED = datetime(2026, 11, 21, 9, 0, tzinfo=UTC)
SECOND = 1_000_000_000
MTIME = 1_795_251_600 * SECOND


@dataclass(frozen=True)
class File:
    """A file of the model."""

    content: bytes
    mtime_ns: int = MTIME
    executable: bool = False

    @property
    def digest(self) -> str:
        """What `b3sum` prints."""
        return digest_of(self.content).hex()


@dataclass(frozen=True)
class Link:
    """A symlink of the model."""

    target: str


@dataclass(frozen=True)
class Directory:
    """A directory of the model."""


Model = dict[str, File | Link | Directory]
"""The oracle: what stands at each path."""


@dataclass
class Life:
    """A workspace as a dictionary; every change is written down as the operation that says it."""

    tree: Model = field(default_factory=dict)
    operations: list[Operation] = field(default_factory=list)

    def directory(self, path: str) -> None:
        """Create a directory."""
        self.tree[path] = Directory()
        self._say(Verb.CREATED, Kind.DIRECTORY, path)

    def file(self, path: str, content: bytes, *, mtime_ns: int = MTIME, executable: bool = False) -> None:
        """Create a file."""
        self.tree[path] = made = File(content, mtime_ns, executable)
        self._say_file(Verb.CREATED, path, made)

    def edit(self, path: str, content: bytes | None = None, *, later: int = 60, executable: bool | None = None) -> None:
        """Change a file's content, its time, or its executable bit."""
        before = self._file(path)
        self.tree[path] = after = File(
            before.content if content is None else content,
            before.mtime_ns + later * SECOND,
            before.executable if executable is None else executable,
        )
        self._say_file(Verb.UPDATED, path, after, base=before.digest)

    def move(self, source: str, path: str) -> None:
        """Move a file."""
        moved = self._file(source)
        del self.tree[source]
        self.tree[path] = moved
        self._say_file(Verb.MOVED, path, moved, base=moved.digest, source_path=source)

    def move_directories(self, *moves: tuple[str, str]) -> None:
        """Move directories, all at once: swaps are legal."""
        before = dict(self.tree)
        for source, path in moves:
            base = directory_of(before, source).hex()
            self._say(Verb.MOVED, Kind.DIRECTORY, path, source_path=source, base=base)
            for inner in below(before, source):
                self.tree.pop(inner, None)
        for source, path in moves:
            self.tree |= {path + inner.removeprefix(source): before[inner] for inner in below(before, source)}

    def link(self, path: str, target: str) -> None:
        """Create a symlink, or point it elsewhere."""
        verb = Verb.UPDATED if isinstance(self.tree.get(path), Link) else Verb.CREATED
        self.tree[path] = Link(target)
        self._say(verb, Kind.SYMLINK, path, target=target)

    def delete(self, path: str) -> None:
        """Delete what stands at a path, with everything below it."""
        gone = self.tree[path]
        base = gone.digest if isinstance(gone, File) else None
        self._say(Verb.DELETED, kind_of(gone), path, base=base)
        for inner in below(self.tree, path):
            del self.tree[inner]

    def take(self) -> list[Operation]:
        """Return the operations since the last bundle."""
        taken, self.operations = self.operations, []
        return taken

    def _file(self, path: str) -> File:
        found = self.tree[path]
        assert isinstance(found, File)
        return found

    def _say(self, verb: Verb, kind: Kind, path: str, **fields: str | None) -> None:
        self.operations.append(Operation(operation=verb, kind=kind, path=path, **fields))  # type: ignore[arg-type]

    def _say_file(
        self, verb: Verb, path: str, after: File, *, base: str | None = None, source_path: str | None = None
    ) -> None:
        self.operations.append(
            Operation(
                operation=verb,
                kind=Kind.FILE,
                path=path,
                source_path=source_path,
                base=base,
                digest=after.digest,
                size=len(after.content),
                executable=after.executable,
                mtime_ns=after.mtime_ns,
            )
        )


def kind_of(thing: File | Link | Directory) -> Kind:
    """Return the kind of a model's entry."""
    return {File: Kind.FILE, Link: Kind.SYMLINK, Directory: Kind.DIRECTORY}[type(thing)]


def below(tree: Model, path: str) -> list[str]:
    """Return a path and every path below it."""
    return [inner for inner in tree if inner == path or inner.startswith(path + "/")]


def directory_of(tree: Model, path: str = "") -> bytes:
    """Return the Merkle digest of one directory of a model; '' is the root."""
    names = {inner for inner in tree if inner.rpartition("/")[0] == path}
    entries = []
    for inner in sorted(names, key=lambda name: name.rpartition("/")[2]):
        thing, name = tree[inner], inner.rpartition("/")[2]
        if isinstance(thing, File):
            digest = digest_of(thing.content)
            entries.append(Entry(name, Kind.FILE, len(thing.content), thing.mtime_ns, thing.executable, digest))
        elif isinstance(thing, Link):
            entries.append(Entry(name, Kind.SYMLINK, target=thing.target))
        else:
            entries.append(Entry(name, Kind.DIRECTORY, digest=directory_of(tree, inner)))
    return directory_digest(encode_directory(entries))


def tree_text(tree: Model) -> str:
    """Write a tree for people and for other programs: tab-separated, the root first, then the paths in order."""
    lines = [f"root\t{directory_of(tree).hex()}"]
    for path, thing in sorted(tree.items()):
        if isinstance(thing, File):
            mode = "x" if thing.executable else "-"
            lines.append(f"file\t{mode}\t{len(thing.content)}\t{thing.mtime_ns}\t{thing.digest}\t{path}")
        elif isinstance(thing, Link):
            lines.append(f"symlink\t-\t-\t-\t{thing.target}\t{path}")
        else:
            lines.append(f"directory\t-\t-\t-\t-\t{path}")
    return "\n".join(lines) + "\n"


def noise(seed: str, size: int) -> bytes:
    """Return bytes that do not compress, the same for the same seed."""
    return shake_256(seed.encode()).digest(size)


def live(life: Life) -> Iterator[str]:
    """Live the chain: after each yielded title, `life.take()` has the operations of one bundle."""
    life.file("README.md", b"# A life\n")
    life.file("run.sh", b"#!/bin/sh\necho hello\n", executable=True)
    life.file("notes.txt", b"buy milk\n", mtime_ns=-SECOND)  # before 1970
    life.directory("photos")
    life.file("photos/one.jpg", noise("one", 3000))
    life.file("photos/two.jpg", noise("two", 2000), mtime_ns=4_294_967_296 * SECOND + 1)  # after 2106
    life.directory("models")
    life.file("models/table.txt", b"".join(b"%d squared is %d\n" % (n, n * n) for n in range(16_000)))
    yield "created"

    life.edit("README.md", b"# A life\n\nIt goes on.\n")
    life.edit("notes.txt")
    life.edit("run.sh", later=0, executable=False)
    yield "edited, touched, made plain"

    life.directory("docs")
    life.move("notes.txt", "docs/notes.txt")
    yield "a file moved"

    life.move_directories(("photos", "pictures"))
    life.edit("pictures/one.jpg", noise("one again", 3100))
    life.delete("pictures/two.jpg")
    life.file("pictures/three.jpg", noise("three", 100))
    yield "a directory moved, and changed inside"

    life.delete("run.sh")
    life.delete("models")
    yield "a file and a directory deleted"

    life.directory("copies")
    life.file("copies/one.jpg", noise("one again", 3100))
    life.file("copies/first.bin", noise("twin", 1500))
    life.file("copies/second.bin", noise("twin", 1500), mtime_ns=MTIME + 1)
    yield "duplicates: of content that the cache has, and twice of new content, which travels once"

    life.link("latest", "pictures/one.jpg")
    life.link("docs/up", "../README.md")
    life.link("dangling", "nowhere/at all")
    yield "symlinks"

    life.link("latest", "pictures/three.jpg")
    life.directory("empty")
    life.directory("empty/inside")
    life.delete("copies")
    life.file("copies", b"a directory became a file\n")
    life.delete("dangling")
    life.directory("dangling")
    yield "empty directories, and two paths that change their kind"

    life.file("empty/file", b"")
    life.file("empty/also", b"")
    life.move_directories(("docs", "pictures"), ("pictures", "docs"))
    yield "empty files, and two directories swapped"

    life.directory("Ünïcode ☃ 日本語")
    life.file("Ünïcode ☃ 日本語/😀 smile.txt", "žluťoučký kůň\n".encode())
    life.file("Ünïcode ☃ 日本語/caf\u00e9", b"composed\n")
    life.file("Ünïcode ☃ 日本語/cafe\u0301", b"decomposed\n")
    life.file("with spaces  and [bold] \\ \"quotes\" 'too'", b"odd but legal\n")
    life.file("-rf", b"begins with a dash\n")
    life.file("n" * 120, b"a name beyond 100 bytes\n")
    life.file("m" * 255, b"the longest name\n")
    deep = "d" * 60
    for _ in range(5):
        life.directory(deep)
        deep += "/" + "d" * 60
    life.file(deep, b"a path beyond 255 bytes\n")
    yield "names: Unicode, spaces, dashes, beyond 100 and beyond 255 bytes"


@dataclass(frozen=True)
class Step:
    """One bundle of the good chain."""

    title: str
    metadata: bundle.Metadata
    sealed: bytes
    tree: Model


def good_chain() -> list[Step]:
    """Build the ten bundles, each thin: it carries what no bundle before it carried."""
    life = Life()
    steps: list[Step] = []
    sent: set[str] = set()
    root = EMPTY_ROOT
    for number, title in enumerate(live(life), start=1):
        parent_root, root = root, directory_of(life.tree)
        metadata = compose(life.take(), number, parent_root, root)
        new = bundle.content_operations(metadata).keys() - sent
        sealed = seal(metadata, new, life.tree)
        sent |= new
        steps.append(Step(title, metadata, sealed, dict(life.tree)))
    return steps


def recipe_chain() -> list[Step]:
    """Build three bundles: a large file (as far as a reference goes), its next version as a recipe, and sparse files.

    The second one inserts, overwrites, moves a range to the front and appends; a copy with another header has its own.
    The third one has a file with holes and no base, one that is a hole, and one with a base and a hole at its end.
    """
    life = Life()
    before = noise("large", 20_000)
    life.file("large.bin", before)
    first = compose(life.take(), 1, EMPTY_ROOT, directory_of(life.tree))
    steps = [Step("a file", first, seal(first, {File(before).digest}, life.tree), dict(life.tree))]
    parent_root = directory_of(life.tree)
    pieces = [(1, 15_000, 2_000), (0, 0, 300), (1, 0, 5_000), (0, 0, 700), (1, 5_700, 14_300), (0, 0, 64)]
    fresh = {size: noise(f"new {size}", size) for base, _, size in pieces if not base}
    after = b"".join(before[offset : offset + size] if base else fresh[size] for base, offset, size in pieces)
    life.edit("large.bin", after)
    header = noise("header", 100)
    copy = header + before[100:]
    life.file("copy.bin", copy)
    operations = life.take()
    metadata = compose(operations, 2, parent_root, directory_of(life.tree), requires=("recipes",))
    bases = (digest_of(before),)
    recipes = {
        File(after).digest: recipe.compose(bases, (recipe.Segment(*piece) for piece in pieces)),
        File(copy).digest: recipe.compose(bases, (recipe.Segment(0, 0, 100), recipe.Segment(1, 100, 19_900))),
    }
    new_bytes = {File(after).digest: b"".join(fresh.values()), File(copy).digest: header}
    read: bundle.Read = lambda operation: (new_bytes[operation.digest or ""],)  # noqa: E731
    sealed = b"".join(bundle.seal(metadata, recipes.keys(), read, recipes=recipes, level=19))
    steps.append(Step("its next version and a copy, as recipes", metadata, sealed, dict(life.tree)))
    return [*steps, _sparse(life, after)]


def _sparse(life: Life, held: bytes) -> Step:
    parent_root = directory_of(life.tree)
    head, tail = noise("sparse head", 4_096), noise("sparse tail", 100)
    contents = {
        "disk.img": (head + bytes(1 << 20) + tail, (), [(0, 0, 4_096), (255, 0, 1 << 20), (0, 0, 100)], head + tail),
        "empty.img": (bytes(3 << 20), (), [(255, 0, 3 << 20)], b""),
        "grown.img": (held + bytes(70_000), (digest_of(held),), [(1, 0, len(held)), (255, 0, 70_000)], b""),
    }
    for name, (content, *_) in contents.items():
        life.file(name, content)
    metadata = compose(life.take(), 3, parent_root, directory_of(life.tree), requires=("recipes",))
    recipes = {
        File(content).digest: recipe.compose(bases, (recipe.Segment(*piece) for piece in pieces))
        for content, bases, pieces, _ in contents.values()
    }
    new_bytes = {File(content).digest: new for content, _, _, new in contents.values()}
    read: bundle.Read = lambda operation: (new_bytes[operation.digest or ""],)  # noqa: E731
    sealed = b"".join(bundle.seal(metadata, recipes.keys(), read, recipes=recipes, level=19))
    return Step("sparse files, as recipes with zeros", metadata, sealed, dict(life.tree))


def part_chain() -> list[Step]:
    """Build six bundles: a file in two parts and the bundle that names it, then its next version and a stream's end."""
    life = Life()
    before, more = noise("large", 20_000), noise("more", 3_000)
    life.file("large.bin", before)
    streams = [digest_of(b"stream %d" % number) for number in (1, 2)]
    steps = [
        _part_step(1, streams[0], before, 0, 9_000, EMPTY_ROOT, {}, "the first part of a stream"),
        _part_step(2, streams[0], before, 9_000, 20_000, EMPTY_ROOT, {}, "its second part"),
    ]
    root = directory_of(life.tree)
    whole = recipe.compose((streams[0],), [recipe.Segment(1, 0, 20_000)])
    steps.append(_made_step(3, life, EMPTY_ROOT, whole, "a file that is the stream"))
    steps.append(_part_step(4, streams[1], more, 0, 3_000, root, life.tree, "a part of another stream"))
    life.edit("large.bin", before[:5_000] + more[:2_000] + before[5_000:] + more[2_000:])
    pieces = [(1, 0, 5_000), (2, 0, 2_000), (1, 5_000, 15_000), (2, 2_000, 1_000)]
    mixed = recipe.compose((digest_of(before), streams[1]), (recipe.Segment(*piece) for piece in pieces))
    steps.append(_made_step(5, life, root, mixed, "its next version, of the version before and the stream"))
    over = _part_step(6, streams[1], b"", 0, 0, directory_of(life.tree), life.tree, "a stream is over")
    return [*steps, over]


def _part_step(
    number: int, stream: bytes, content: bytes, start: int, end: int, root: bytes, tree: Model, title: str
) -> Step:
    metadata = compose([], number, root, root, requires=("parts",))

    def read(_: Part) -> Generator[bytes, None, bytes]:
        yield content[start:end]
        return digest_of(content[:end])

    sealed = b"".join(bundle.seal_part(metadata, Part(stream, start, end - start), read, level=19))
    return Step(title, metadata, sealed, dict(tree))


def _made_step(number: int, life: Life, parent_root: bytes, made: recipe.Recipe, title: str) -> Step:
    operations = life.take()
    metadata = compose(operations, number, parent_root, directory_of(life.tree), requires=("recipes", "parts"))
    (digest,) = bundle.content_operations(metadata)
    sealed = b"".join(bundle.seal(metadata, [digest], lambda _: (), recipes={digest: made}, level=19))
    return Step(title, metadata, sealed, dict(life.tree))


def seal(metadata: bundle.Metadata, digests: Collection[str], tree: Model, *, level: int = 19) -> bytes:
    """Return a bundle file that carries the content of those digests, taken from the tree after it."""
    contents = {thing.digest: thing.content for thing in tree.values() if isinstance(thing, File)}
    return b"".join(bundle.seal(metadata, digests, lambda operation: (contents[operation.digest or ""],), level=level))


def compose(
    operations: list[Operation], sequence: int, parent_root: bytes, root: bytes, requires: tuple[str, ...] = ()
) -> bundle.Metadata:
    """Return the metadata of a bundle of this workspace; nothing in it depends on the clock or on chance."""
    return bundle.compose(
        operations,
        workspace=WORKSPACE,
        workspace_path="/home/ada/life",
        epoch=EPOCH,
        sequence=sequence,
        parent_root=parent_root,
        root=root,
        client_id=CLIENT,
        bundle_id=f"00000000-0000-4000-8000-{sequence:012d}",
        created_at=STARTED.replace(minute=sequence % 60),
        requires=requires,
    )
