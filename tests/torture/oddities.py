"""Bundles that are odd and valid: each leads a workspace of its own to the tree that a dictionary says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import zstandard
from corpus_good import (
    MTIME,
    Directory,
    Life,
    Model,
    Step,
    compose,
    directory_of,
    noise,
    part_chain,
    recipe_chain,
    seal,
)
from xxhash import xxh64

from deltasync.core import bundle
from deltasync.core.manifest import EMPTY_ROOT

Compress = Callable[[bytes], bytes]


@dataclass(frozen=True)
class Odd:
    """A chain of bundles, and the tree behind its end."""

    name: str
    sealed: list[bytes]
    tree: Model


def odd_bundles() -> list[Odd]:
    """Return them all."""
    found = [_chain(live.__name__.strip("_"), live) for live in _LIVES]
    found += [_chain(f"frame-{name}", _little, compress) for name, compress in _FRAMES.items()]
    return [*found, _of_steps("recipes", recipe_chain()), _of_steps("parts", part_chain())]


def _of_steps(name: str, steps: list[Step]) -> Odd:
    return Odd(name, [each.sealed for each in steps], steps[-1].tree)


def _chain(name: str, live: Callable[[Life], Iterator[None]], compress: Compress = bytes) -> Odd:
    """Seal a bundle wherever a life pauses. compress: how the archive is compressed, if not as a sender does."""
    life, root, sealed = Life(), EMPTY_ROOT, list[bytes]()
    sent: set[str] = set()
    for number, _ in enumerate(live(life), start=1):
        parent_root, root = root, directory_of(life.tree)
        metadata = compose(life.take(), number, parent_root, root)
        new = bundle.content_operations(metadata).keys() - sent
        made = seal(metadata, new, life.tree, level=1)
        sealed.append(made if compress is bytes else compress(zstandard.decompress(made)))
        sent |= new
    return Odd(name, sealed, dict(life.tree))


def _nothing(life: Life) -> Iterator[None]:
    yield
    yield


def _little(life: Life) -> Iterator[None]:
    life.directory("a")
    life.file("a/b", b"hello\n" * 50)
    life.file("zeros", bytes(3000))
    yield


def _only_directories(life: Life) -> Iterator[None]:
    for path in ("a", "a/b", "a/b/c", "z"):
        life.directory(path)
    yield


def _names(life: Life) -> Iterator[None]:
    odd = [
        "con",
        "NUL.txt",
        "a.",
        "a ",
        " a",
        "caf\u00e9",
        "cafe\u0301",
        "\u202egnp.exe",
        "a\u200bb",
        "-rf",
        "~",
        "$(reboot)",
    ]
    odd += [
        "*",
        "?",
        "a\\b",
        "\"'`",
        "[red]",
        "%2e%2e",
        "...",
        "..a",
        ".. ",
        ".deltasync2",
        "x.deltasync",
        "{",
        "😀" * 63,
    ]
    for number, name in enumerate(odd):
        life.file(name, b"%d" % number)
    yield
    for number, name in enumerate(odd):
        life.move(name, f"moved {number}")
    yield


def _longest(life: Life) -> Iterator[None]:
    life.file("n" * 255, b"1")
    life.file("é" * 127, b"2")
    path = "d" * 255
    for _ in range(15):
        life.directory(path)
        path += "/" + "d" * 255
    life.file(path, b"3")  # 16 * 255 + 15 = 4,095 bytes
    yield


def _deepest(life: Life) -> Iterator[None]:
    for depth in range(1, 200):
        life.directory("/".join("x" * depth))
    life.file("/".join("x" * 199) + "/f", b"deep")
    yield


def _times(life: Life) -> Iterator[None]:
    for number, mtime in enumerate((-(2**63), 2**63 - 1, 0, -1, 1, 2**31 * 10**9, 2**32 * 10**9 + 999_999_999)):
        life.file(f"f{number}", b"%d" % number, mtime_ns=mtime)
    yield
    life.edit("f0", later=0, executable=True)
    yield


def _empty_files(life: Life) -> Iterator[None]:
    for number in range(30):
        life.file(f"f{number}", b"", mtime_ns=MTIME + number, executable=number % 2 == 0)
    yield


def _links(life: Life) -> Iterator[None]:
    life.directory("a")
    for number, target in enumerate((".", "a", "a/..", "./././a", "nowhere", "x" * 4095, "a//b", "\\", "a b", "l0")):
        life.link(f"l{number}", target)
    life.link("a/up", "..")
    life.link("a/there", "../a/../l0")
    yield
    life.link("a/up", "up")
    yield


def _changes_of_kind(life: Life) -> Iterator[None]:
    life.directory("d")
    life.file("d/f", b"in it")
    life.file("f", b"file")
    life.link("l", "f")
    yield
    for path in ("d", "f", "l"):
        life.delete(path)
    life.file("d", b"was a directory")
    life.link("f", "d")
    life.directory("l")
    life.file("l/f", b"file")
    yield


def _swaps(life: Life) -> Iterator[None]:
    for name in "abc":
        life.directory(name)
        life.file(f"{name}/f", name.encode())
    yield
    life.move_directories(("a", "b"), ("b", "c"), ("c", "a"))
    yield
    life.tree["d"] = Directory()  # no operation: it comes into being with what arrives in it
    life.move_directories(("a", "d/a"))
    yield


def _touched(life: Life) -> Iterator[None]:
    life.file("f", b"same")
    yield
    life.edit("f", b"same", later=0)  # changes nothing at all
    yield
    life.edit("f", later=1)
    yield


def _twins(life: Life) -> Iterator[None]:
    for number in range(60):
        life.file(f"f{number}", b"the same" * 100, mtime_ns=MTIME + number % 7)
    yield


def _block_sizes(life: Life) -> Iterator[None]:
    for size in (1, 511, 512, 513, 1023, 1024, 262_143, 262_144, 262_145):
        life.file(f"f{size}", noise(str(size), size))
    yield


def _many(life: Life) -> Iterator[None]:
    for number in range(1500):
        life.file(f"{number:05d}", b"%d" % number)
    yield


def _zeros(life: Life) -> Iterator[None]:
    life.file("zeros", bytes(15 << 20))
    yield


def _old_files_replaced(life: Life) -> Iterator[None]:
    life.file("a", b"a")
    life.file("b", b"b")
    yield
    life.delete("b")
    life.move("a", "b")
    life.file("a", b"b")
    yield


_LIVES = (
    _nothing,
    _only_directories,
    _names,
    _longest,
    _deepest,
    _times,
    _empty_files,
    _links,
    _changes_of_kind,
    _swaps,
    _touched,
    _twins,
    _block_sizes,
    _many,
    _zeros,
    _old_files_replaced,
)


def _level(level: int, **options: bool) -> Compress:
    return lambda archive: zstandard.ZstdCompressor(level=level, write_checksum=True, **options).compress(archive)


def _in_steps(archive: bytes) -> bytes:
    """End a block behind every hundred bytes."""
    stream = zstandard.ZstdCompressor(write_checksum=True).compressobj(size=len(archive))
    blocks = []
    for at in range(0, len(archive), 100):
        blocks += [stream.compress(archive[at : at + 100]), stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)]
    return b"".join((*blocks, stream.flush()))


def _raw(archive: bytes, step: int, head: bytes) -> bytes:
    blocks = [archive[at : at + step] for at in range(0, len(archive), step)]
    written = [(len(block) << 3).to_bytes(3, "little") + block for block in blocks]
    return b"".join((head, *written, b"\x01\x00\x00", xxh64(archive).digest()[:3:-1]))


def _widest(archive: bytes) -> bytes:
    """Ask for a window of exactly 8 MiB."""
    return _raw(archive, 131_072, b"\x28\xb5\x2f\xfd\xc4\x68" + len(archive).to_bytes(8, "little"))


def _bytewise(archive: bytes) -> bytes:
    """Write runs of one byte as such blocks, and empty blocks between."""
    blocks, at = [], 0
    while at < len(archive):
        run = len(archive[at:]) - len(archive[at:].lstrip(archive[at : at + 1]))
        blocks.append((run << 3 | 2).to_bytes(3, "little") + archive[at : at + 1] + b"\x00\x00\x00")
        at += run
    head = b"\x28\xb5\x2f\xfd\xe4" + len(archive).to_bytes(8, "little")
    return b"".join((head, *blocks, b"\x01\x00\x00", xxh64(archive).digest()[:3:-1]))


_FRAMES: dict[str, Compress] = {
    "level-minus-5": _level(-5),
    "level-3": _level(3),
    "level-22": _level(22),
    "in-steps": _in_steps,
    "window-8-mib": _widest,
    "raw-blocks-of-7": lambda archive: _raw(archive, 7, b"\x28\xb5\x2f\xfd\xa4" + len(archive).to_bytes(4, "little")),
    "runs-and-empty-blocks": _bytewise,
}
