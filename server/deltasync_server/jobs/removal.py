"""Removal of what a command has made: however deep, whatever its modes are, and never through a link (spec J-42)."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from pathlib import Path

from deltasync.disk import Folder

GOING = ".going-"
"""How the names begin of folders in which things are being removed."""
_IS_FOLDER = frozenset({errno.EISDIR, errno.EPERM})
_under_way: set[str] = set()
"""The names of those that this process removes things in; any other is left over."""


def remove_all(parent: Folder, name: str) -> None:
    """Remove an entry of a held folder with everything below it; nothing there is fine, and so is another removal.

    Folders are moved side by side before they are emptied, so that none is too deep.
    """
    if _unlinked(parent, name):
        return
    going = f"{GOING}{secrets.token_hex(8)}"
    _under_way.add(going)
    try:
        os.mkdir(going, 0o700, dir_fd=parent.fd)
        try:
            with parent.enter(going) as waste:
                with contextlib.suppress(FileNotFoundError):  # another removal has moved it
                    _move(parent, name, waste, 0)
                _empty(waste)
        finally:
            with contextlib.suppress(OSError):  # what could not be removed is in it
                os.rmdir(going, dir_fd=parent.fd)
    finally:
        _under_way.discard(going)


def left_over(parent: Folder) -> list[str]:
    """Return the folders with what could not be removed, or whose removal was broken off."""
    return [name for name in parent.names() if name.startswith(GOING) and name not in _under_way]


def _empty(waste: Folder) -> None:
    """Remove the folder that was moved there, and whatever is in it."""
    made, left = 0, [int(name) for name in waste.names()]
    while left:
        each = str(left.pop())
        with waste.enter(each) as folder:
            for child in folder.names():
                if not _unlinked(folder, child):
                    made += 1
                    _move(folder, child, waste, made)
                    left.append(made)
        os.rmdir(each, dir_fd=waste.fd)


def _unlinked(folder: Folder, name: str) -> bool:
    """Remove what is no folder; False for what is one."""
    try:
        os.unlink(name, dir_fd=folder.fd)
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno not in _IS_FOLDER:
            raise
        return False
    return True


def _move(folder: Folder, name: str, waste: Folder, number: int) -> None:
    """Move a folder aside, under a number; its owner may enter and change it from then on."""
    if folder.stat(name).st_mode & stat.S_IRWXU != stat.S_IRWXU:  # it could be neither moved nor read
        held = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder.fd)
        try:
            Path(f"/proc/self/fd/{held}").chmod(0o700)  # a descriptor of this kind cannot be changed itself
        finally:
            os.close(held)
    os.rename(name, str(number), src_dir_fd=folder.fd, dst_dir_fd=waste.fd)
