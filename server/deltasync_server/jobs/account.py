"""Who runs the commands of jobs (spec J-43)."""

from __future__ import annotations

import os
import pwd
from typing import NamedTuple, Self

from deltasync.core.errors import UsageError
from deltasync.core.names import shown


class Account(NamedTuple):
    """A user of this host, who is another one than the server's."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]

    @classmethod
    def named(cls, name: str | None) -> Self | None:
        """Return the user of a name; None for nobody but the server's own. Raises UsageError."""
        if name is None:
            return None
        try:
            found = pwd.getpwnam(name)
        except KeyError as error:
            raise UsageError(f"--job-user {shown(name)}: there is no such user") from error
        if found.pw_uid == os.geteuid():
            return None
        if os.geteuid() != 0:
            raise UsageError("--job-user needs a server that runs as root; leave it out, or name its own user")
        return cls(name, found.pw_uid, found.pw_gid, tuple(os.getgrouplist(name, found.pw_gid)))
