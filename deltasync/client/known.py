"""Known digests: of files here, from what was read of inputs before; any other is read now, and nothing is kept."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Self

from deltasync.client.digest import Digester, FileChanging
from deltasync.client.inputs import FOLDER, MEMORY
from deltasync.client.listing import Seen
from deltasync.client.memory import Memory
from deltasync.client.opening import home_of_states
from deltasync.disk import Folder


class KnownDigests:
    """Says what files hold; a memory of the user's saves reading them."""

    def __init__(self) -> None:
        """Open the memory."""
        self._memory = Memory(home_of_states() / FOLDER / MEMORY)
        self._digester = Digester()
        self.read_bytes = 0
        """What had to be read."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._memory.__exit__()

    def of(self, path: str) -> bytes | None:
        """Return the digest of the file that an absolute path leads to; None for none that holds still."""
        real = Path(os.path.realpath(path))
        with contextlib.suppress(OSError, FileChanging):
            status = real.stat()
            stat = (status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            known = self._memory.recall(str(real).removeprefix("/"), Seen(real.name, *stat))
            if known is not None:
                return known.digest
            with Folder.open(real.parent) as folder:
                found = self._digester.digest_file(real.name, at=folder.fd).digest
            self.read_bytes += status.st_size
            return found
        return None
