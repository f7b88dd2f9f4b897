"""Real folders for tests: make them, change them, compare two of them byte by byte."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def listing(root: Path) -> dict[str, tuple[object, ...]]:
    """Return every path below a folder with what a tree carries of it: kind, execute bit, mtime, bytes or target."""
    found: dict[str, tuple[object, ...]] = {}
    for folder, folders, files in os.walk(root):
        if folder == str(root) and ".deltasync" in folders:
            folders.remove(".deltasync")
        for name in [*folders, *files]:
            path = Path(folder, name)
            found[str(path.relative_to(root))] = _seen(path)
    return found


def _seen(path: Path) -> tuple[object, ...]:
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        return ("symlink", os.readlink(path))
    if stat.S_ISDIR(status.st_mode):
        return ("directory",)
    return ("file", bool(status.st_mode & 0o111), status.st_mtime_ns, path.read_bytes())


def assert_same(left: Path, right: Path) -> None:
    """Fail, naming the paths, unless two folders are equal in everything that a tree carries."""
    a, b = listing(left), listing(right)
    differing = sorted(path for path in a.keys() | b.keys() if a.get(path) != b.get(path))
    assert not differing, (
        f"{len(differing)} paths differ: {[(p, _brief(a.get(p)), _brief(b.get(p))) for p in differing[:5]]}"
    )


def _brief(seen: tuple[object, ...] | None) -> object:
    return None if seen is None else tuple(len(part) if isinstance(part, bytes) else part for part in seen)


def write(root: Path, path: str, content: bytes | str = b"", *, executable: bool = False) -> Path:
    """Write a file, with the folders it needs."""
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content.encode() if isinstance(content, str) else content)
    if executable:
        target.chmod(0o755)
    return target


def life(root: Path) -> None:
    """Fill a folder with one of everything that a tree carries."""
    write(root, "readme.txt", "hello\n")
    write(root, "bin/run.sh", "#!/bin/sh\n", executable=True)
    write(root, "media/clip.bin", bytes(range(256)) * 400)
    write(root, "media/raw/a.dat", b"a" * 5000)
    write(root, "media/raw/b.dat", b"b" * 70_000)
    write(root, "media/raw/copy of b.dat", b"b" * 70_000)
    write(root, "média/ünïcode ☃.txt", "snow")
    write(root, "empty.bin")
    (root / "empty folder").mkdir()
    (root / "link").symlink_to("media/clip.bin")


def later(root: Path) -> None:
    """Change what `life` made: create, edit, touch, chmod, move a file and a directory, delete, copy, change kinds."""
    write(root, "new/deep/file.txt", "new\n")
    write(root, "readme.txt", "hello again\n")
    os.utime(root / "empty.bin", ns=(10**18, 10**18))
    (root / "bin/run.sh").chmod(0o644)
    os.rename(root / "media/clip.bin", root / "clip moved.bin")
    os.rename(root / "media/raw", root / "sources")
    write(root, "sources/a.dat", b"edited inside")
    os.unlink(root / "sources/b.dat")
    write(root, "copy.bin", bytes(range(256)) * 400)
    os.unlink(root / "link")
    write(root, "link/now a folder.txt", "x")
    (root / "empty folder").rmdir()
    write(root, "empty folder", "now a file")
