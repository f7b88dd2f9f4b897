"""A folder and what it must hold: every change is made on disk and, apart from it, in a plain dictionary."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from trees import Flat, Objects

from deltasync.core.hashing import digest_of
from deltasync.core.manifest import Entry, Kind

NAMES = ("a", "b", "c.txt", "é", "A", "con")
DAY = 86_400 * 10**9
TIMES: tuple[int | None, ...] = (DAY, 10**18 + 123_456_789, 4_102_444_800 * 10**9, 0, None)
"""Modification times that files get, most of them long ago; None is now."""
POOL = (b"", b"x", b"y", b"same size 1", b"same size 2", b"a" * 5000, bytes(range(256)) * 3)
"""Contents that come again and again, so that copies are common."""
NODES_MAX = 60
DEPTH_MAX = 5


class Change(NamedTuple):
    """One change of a folder: what is done, and three numbers that choose where, where to, and which."""

    verb: str
    a: int = 0
    b: int = 0
    c: int = 0


@dataclass(eq=False)
class Node:
    """What one name stands for; hard links share one node."""

    kind: Kind
    content: bytes = b""
    executable: bool = False
    mtime_ns: int = 0
    target: str = ""

    def twin(self) -> Node:
        """Return a copy, as `cp -p` makes it."""
        return Node(self.kind, self.content, self.executable, self.mtime_ns, self.target)


class PlainFolder:
    """A real folder with the dictionary of what was put there; nothing in it is ever read back from the disk."""

    def __init__(self, root: Path, contents: dict[bytes, bytes]) -> None:
        """Make the folder. contents: takes every content ever written, by digest."""
        root.mkdir(parents=True)
        self.root = root
        self.nodes: dict[str, Node] = {}
        self._contents = contents
        self._aside = root.parent / "aside"
        self._made = 0

    # What it must hold

    def listing(self) -> dict[str, tuple[object, ...]]:
        """Return what `folders.listing` must find here."""
        return {path: _seen(node) for path, node in self.nodes.items()}

    def flat(self) -> Flat:
        """Return the tree as the oracle of `trees` takes it."""
        return {path: _entry(path, node) for path, node in self.nodes.items()}

    def root_digest(self) -> bytes:
        """Return the root of this tree, computed bottom-up and naively."""
        return Objects().build(self.flat())

    def paths(self, *kinds: Kind) -> list[str]:
        """Return the paths of some kinds, in order."""
        return sorted(path for path, node in self.nodes.items() if node.kind in kinds)

    # Changes

    def write(self, path: str, content: bytes) -> None:
        """Make a file that is long done."""
        self._make(path, Node(Kind.FILE, content, mtime_ns=DAY))

    def apply(self, change: Change) -> bool:
        """Make a change; False where nothing here fits it."""
        verb: Callable[[Change], bool] = getattr(self, f"_{change.verb}")
        return verb(change)

    def _create(self, change: Change) -> bool:
        path = self._free(change.a, change.b)
        return path is not None and self._write(path, self._content(change.c), change.c)

    def _grow(self, change: Change) -> bool:
        """A folder with files of their own and copies, as an unpacked archive."""
        top = self._free(change.a, change.b)
        if top is None or top.count("/") >= DEPTH_MAX - 1:
            return False
        self._mkdir_at(top)
        self._mkdir_at(f"{top}/sub")
        for number in range(3 + change.c % 3):
            self._write(f"{top}/{NAMES[number]}", self._content(6), change.c)
            self._write(f"{top}/sub/{NAMES[number]}", self._content(number + change.c), change.b)
        return True

    def _edit(self, change: Change) -> bool:
        """Write into a file where it is: other names of it see that, too."""
        path = self._pick(change.a, Kind.FILE)
        return path is not None and self._overwrite(path, self._content(change.c), _time(change.b))

    def _falsify(self, change: Change) -> bool:
        """Change a file's bytes and leave its size and time as they were; only its ctime tells."""
        path = self._pick(change.a, Kind.FILE)
        if path is None or not self.nodes[path].content:
            return False
        node = self.nodes[path]
        content = bytes([node.content[0] ^ (1 + change.c % 3), *node.content[1:]])
        return self._overwrite(path, content, node.mtime_ns)

    def _replace(self, change: Change) -> bool:
        """Put a new file in the place of one, as editors do."""
        path = self._pick(change.a, Kind.FILE)
        if path is None:
            return False
        node = Node(Kind.FILE, self._content(change.c), self.nodes[path].executable, _time(change.b))
        self._make_file(self._aside, node)
        os.replace(self._aside, self.root / path)
        self.nodes[path] = node
        return True

    def _touch(self, change: Change) -> bool:
        path = self._pick(change.a, Kind.FILE)
        if path is None:
            return False
        node = self.nodes[path]
        node.mtime_ns = _time(change.b)
        os.utime(self.root / path, ns=(node.mtime_ns, node.mtime_ns))
        return True

    def _chmod(self, change: Change) -> bool:
        path = self._pick(change.a, Kind.FILE)
        if path is None:
            return False
        node = self.nodes[path]
        node.executable = not node.executable
        (self.root / path).chmod(0o755 if node.executable else 0o644)
        return True

    def _rename(self, change: Change) -> bool:
        """Move a file, link or folder to another name or folder; a file may take the place of another."""
        source = self._pick(change.a, *Kind)
        if source is None:
            return False
        target = self._joined(self._folder(change.b), NAMES[change.c % len(NAMES)])
        return self._may_move(source, target) and self._move(source, target)

    def _may_move(self, source: str, target: str) -> bool:
        if target == source or target.startswith(f"{source}/") or source.startswith(f"{target}/"):
            return False
        node, there = self.nodes[source], self.nodes.get(target)
        height = max(path.count("/") for path in (source, *self._below(source))) - source.count("/")
        if target.count("/") + height >= DEPTH_MAX or there is node:
            return False  # rename does nothing when both are one file
        if there is None:
            return True
        is_folder = node.kind is Kind.DIRECTORY
        return is_folder == (there.kind is Kind.DIRECTORY) and not (is_folder and self._below(target))

    def _move(self, source: str, target: str) -> bool:
        os.rename(self.root / source, self.root / target)
        self.nodes.pop(target, None)
        for path in [source, *self._below(source)]:
            self.nodes[target + path[len(source) :]] = self.nodes.pop(path)
        return True

    def _swap(self, change: Change) -> bool:
        """Let two things take each other's place."""
        one, two = self._pick(change.a, *Kind), self._pick(change.b, *Kind)
        if one is None or two is None or one == two or one.startswith(f"{two}/") or two.startswith(f"{one}/"):
            return False
        if self._height(one, two) or self._height(two, one):
            return False
        os.rename(self.root / one, self._aside)
        os.rename(self.root / two, self.root / one)
        os.rename(self._aside, self.root / two)
        first = {path[len(one) :]: self.nodes.pop(path) for path in [one, *self._below(one)]}
        second = {path[len(two) :]: self.nodes.pop(path) for path in [two, *self._below(two)]}
        self.nodes |= {two + rest: node for rest, node in first.items()}
        self.nodes |= {one + rest: node for rest, node in second.items()}
        return True

    def _height(self, source: str, target: str) -> bool:
        """Tell whether something would hang too deep at another place."""
        deepest = max(path.count("/") for path in (source, *self._below(source)))
        return deepest - source.count("/") + target.count("/") >= DEPTH_MAX

    def _copy(self, change: Change) -> bool:
        """Copy a file, link or folder, keeping times or not."""
        source, target = self._pick(change.a, *Kind), self._free(change.b, change.c)
        if source is None or target is None or f"{target}/".startswith(f"{source}/"):
            return False
        if self._height(source, target):
            return False
        for path in [source, *self._below(source)]:
            node = self.nodes[path].twin()
            if change.c % 2:
                node.mtime_ns = _time(change.c) if node.kind is Kind.FILE else 0
            self._make(target + path[len(source) :], node)
        return True

    def _link(self, change: Change) -> bool:
        """Give a file a second name."""
        source, target = self._pick(change.a, Kind.FILE), self._free(change.b, change.c)
        if source is None or target is None:
            return False
        os.link(self.root / source, self.root / target)
        self.nodes[target] = self.nodes[source]
        return True

    def _renew(self, change: Change) -> bool:
        """Put copies in the place of a folder and all that is in it: other inodes, nothing else."""
        path = self._pick(change.a, Kind.DIRECTORY)
        if path is None:
            return False
        nodes = {each: self.nodes[each].twin() for each in [path, *self._below(path)]}
        self._remove(path)
        for each, node in nodes.items():
            self._make(each, node)
        return True

    def _delete(self, change: Change) -> bool:
        path = self._pick(change.a, *Kind)
        return path is not None and self._remove(path)

    def _mkdir(self, change: Change) -> bool:
        path = self._free(change.a, change.b)
        return path is not None and self._mkdir_at(path)

    def _symlink(self, change: Change) -> bool:
        path = self._free(change.a, change.b)
        if path is None:
            return False
        self._make(path, Node(Kind.SYMLINK, target=NAMES[change.c % len(NAMES)]))
        return True

    def _retarget(self, change: Change) -> bool:
        """Let a link point elsewhere, or a file become a link."""
        path = self._pick(change.a, Kind.SYMLINK, Kind.FILE)
        if path is None:
            return False
        self._remove(path)
        self._make(path, Node(Kind.SYMLINK, target=f"{NAMES[change.c % len(NAMES)]}/x"))
        return True

    def _turn(self, change: Change) -> bool:
        """Let a folder become a file, or a file a folder that holds one."""
        path = self._pick(change.a, Kind.DIRECTORY, Kind.FILE)
        if path is None:
            return False
        is_folder = self.nodes[path].kind is Kind.DIRECTORY
        self._remove(path)
        if is_folder:
            return self._write(path, self._content(change.c), change.b)
        self._mkdir_at(path)
        if change.b % 2 and path.count("/") < DEPTH_MAX - 1:
            self._write(f"{path}/{NAMES[change.b % len(NAMES)]}", self._content(change.c), change.b)
        return True

    # Small parts

    def _pick(self, number: int, *kinds: Kind) -> str | None:
        paths = self.paths(*kinds)
        return paths[number % len(paths)] if paths else None

    def _folder(self, number: int) -> str:
        folders = ["", *self.paths(Kind.DIRECTORY)]
        return folders[number % len(folders)]

    def _free(self, folder: int, name: int) -> str | None:
        """Return a path that nothing has yet."""
        above = self._folder(folder)
        if len(self.nodes) >= NODES_MAX or above.count("/") >= DEPTH_MAX - 1:
            return None
        names = [self._joined(above, NAMES[(name + shift) % len(NAMES)]) for shift in range(len(NAMES))]
        return next((path for path in names if path not in self.nodes), None)

    @staticmethod
    def _joined(folder: str, name: str) -> str:
        return f"{folder}/{name}" if folder else name

    def _below(self, path: str) -> list[str]:
        return sorted(each for each in self.nodes if each.startswith(f"{path}/"))

    def _content(self, number: int) -> bytes:
        self._made += 1
        choice = number % (len(POOL) + 3)
        if choice < len(POOL):
            return POOL[choice]
        unique = f"{self.root.parent.name} {self._made} ".encode()
        return unique * (1, 300, 6000)[choice - len(POOL)]

    def _write(self, path: str, content: bytes, number: int) -> bool:
        self._make(path, Node(Kind.FILE, content, number % 7 == 0, _time(number)))
        return True

    def _overwrite(self, path: str, content: bytes, mtime_ns: int) -> bool:
        node = self.nodes[path]
        node.content, node.mtime_ns = content, mtime_ns
        self._contents[digest_of(content)] = content
        with open(self.root / path, "r+b") as file:
            file.truncate(len(content))
            file.write(content)
        os.utime(self.root / path, ns=(mtime_ns, mtime_ns))
        return True

    def _mkdir_at(self, path: str) -> bool:
        self._make(path, Node(Kind.DIRECTORY))
        return True

    def _make(self, path: str, node: Node) -> None:
        if node.kind is Kind.DIRECTORY:
            (self.root / path).mkdir()
        elif node.kind is Kind.SYMLINK:
            (self.root / path).symlink_to(node.target)
        else:
            self._make_file(self.root / path, node)
        self.nodes[path] = node

    def _make_file(self, at: Path, node: Node) -> None:
        self._contents[digest_of(node.content)] = node.content
        at.write_bytes(node.content)
        at.chmod(0o755 if node.executable else 0o644)
        os.utime(at, ns=(node.mtime_ns, node.mtime_ns))

    def _remove(self, path: str) -> bool:
        if self.nodes[path].kind is Kind.DIRECTORY:
            shutil.rmtree(self.root / path)
        else:
            (self.root / path).unlink()
        for each in [path, *self._below(path)]:
            del self.nodes[each]
        return True


def _is_verb(member: object) -> bool:
    return callable(member) and getattr(member, "__annotations__", {}).get("change") == "Change"


VERBS = tuple(sorted(name[1:] for name, verb in vars(PlainFolder).items() if name[0] == "_" and _is_verb(verb)))
"""What `apply` understands."""


def _time(number: int) -> int:
    chosen = TIMES[number % len(TIMES)]
    return time.time_ns() if chosen is None else chosen


def _seen(node: Node) -> tuple[object, ...]:
    if node.kind is Kind.FILE:
        return ("file", node.executable, node.mtime_ns, node.content)
    return ("symlink", node.target) if node.kind is Kind.SYMLINK else ("directory",)


def _entry(path: str, node: Node) -> Entry:
    name = path.rpartition("/")[2]
    if node.kind is Kind.FILE:
        digest = digest_of(node.content)
        return Entry(name, Kind.FILE, len(node.content), node.mtime_ns, node.executable, digest)
    return Entry(name, node.kind, target=node.target)
