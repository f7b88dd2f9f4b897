"""Small trees for tests: a plain dict is the oracle, directory objects are what the code under test sees."""

from __future__ import annotations

from hypothesis import strategies as st

from deltasync.core.hashing import digest_of, directory_digest
from deltasync.core.manifest import EMPTY_ROOT, Entry, Kind, decode_directory, encode_directory
from deltasync.core.tree import walk

Flat = dict[str, Entry]
"""Every path of a tree with its entry; a directory's digest is left out (b"")."""


class Objects(dict[bytes, bytes]):
    """A store of directory objects."""

    def load(self, digest: bytes) -> list[Entry]:
        return decode_directory(self[digest])

    def build(self, flat: Flat) -> bytes:
        """Store a flat tree's directory objects and return its root, bottom-up and naively."""
        return self._build(flat, "")

    def _build(self, flat: Flat, prefix: str) -> bytes:
        names = sorted({path[len(prefix) :].split("/")[0] for path in flat if path.startswith(prefix)})
        entries = []
        for name in names:
            entry = flat[prefix + name]
            if entry.kind is Kind.DIRECTORY:
                entry = Entry(name, Kind.DIRECTORY, digest=self._build(flat, f"{prefix}{name}/"))
            entries.append(entry)
        if not entries:
            return EMPTY_ROOT
        body = encode_directory(entries)
        self[directory_digest(body)] = body
        return directory_digest(body)

    def flat(self, root: bytes) -> Flat:
        """Return a root's tree as a flat dict."""
        return {
            path: Entry(entry.name, Kind.DIRECTORY) if entry.kind is Kind.DIRECTORY else entry
            for path, entry in walk(root, self.load)
        }


def file(path: str, content: bytes = b"", *, mtime_ns: int = 1, executable: bool = False) -> Entry:
    """Return the entry of a file."""
    name = path.rpartition("/")[2]
    return Entry(name, Kind.FILE, len(content), mtime_ns, executable, digest_of(content))


def directory(path: str) -> Entry:
    """Return the entry of a directory in a flat tree."""
    return Entry(path.rpartition("/")[2], Kind.DIRECTORY)


def symlink(path: str, target: str) -> Entry:
    """Return the entry of a symlink."""
    return Entry(path.rpartition("/")[2], Kind.SYMLINK, target=target)


def flat(*entries: tuple[str, Entry]) -> Flat:
    """Return a flat tree of the entries and every parent they need."""
    tree: Flat = {}
    for path, entry in entries:
        parent = path.rpartition("/")[0]
        while parent:
            tree.setdefault(parent, directory(parent))
            parent = parent.rpartition("/")[0]
        tree[path] = entry
    return tree


_names = st.sampled_from(["a", "b", "c", "d", "é"])
_paths = st.lists(_names, min_size=1, max_size=4).map("/".join)
_contents = st.sampled_from([b"", b"x", b"y", b"z"])


@st.composite
def flat_trees(draw: st.DrawFn) -> Flat:
    """Draw a tree with few names and few contents, so that moves, copies and kind changes are common."""
    tree: Flat = {}
    for path in draw(st.lists(_paths, max_size=14)):
        above = [path[:i] for i, c in enumerate(path) if c == "/"]
        if any(a in tree and tree[a].kind is not Kind.DIRECTORY for a in above) or path in tree:
            continue
        for parent in above:
            tree.setdefault(parent, directory(parent))
        kind = draw(st.sampled_from(["file", "file", "file", "directory", "symlink"]))
        if kind == "file":
            mtime_ns, executable = draw(st.integers(0, 2)), draw(st.booleans())
            tree[path] = file(path, draw(_contents), mtime_ns=mtime_ns, executable=executable)
        elif kind == "directory":
            tree[path] = directory(path)
        else:
            tree[path] = symlink(path, draw(st.sampled_from(["a", "b/c"])))
    return tree


@st.composite
def shuffled(draw: st.DrawFn, tree: Flat) -> tuple[Flat, dict[str, str]]:
    """Move some directories and files of a tree elsewhere; return the tree after and the renames (new -> old)."""
    tree = dict(tree)
    origin = {path: path for path in tree}
    for _ in range(draw(st.integers(0, 4))):
        if not tree:
            break
        source = draw(st.sampled_from(sorted(tree)))
        target = draw(_paths)
        parent = target.rpartition("/")[0]
        if target in tree or target.startswith(source + "/") or (parent and parent not in tree):
            continue
        if parent and tree[parent].kind is not Kind.DIRECTORY:
            continue
        for path in [p for p in tree if p == source or p.startswith(source + "/")]:
            moved = target + path[len(source) :]
            entry = tree.pop(path)
            name = moved.rpartition("/")[2]
            tree[moved] = Entry(
                name, entry.kind, entry.size, entry.mtime_ns, entry.executable, entry.digest, entry.target
            )
            origin[moved] = origin.pop(path)
    return tree, {path: old for path, old in origin.items() if path != old}
