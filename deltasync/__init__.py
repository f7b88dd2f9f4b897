"""Deltasync keeps a folder's content on a remote host before a job needs it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deltasync.host import Host, Result

__version__ = "0.1.0"
__all__ = ["Host", "Result", "__version__"]


def __getattr__(name: str) -> object:
    """Import what runs commands when it is first asked for: the program, which needs it seldom, starts fast."""
    if name in ("Host", "Result"):
        from deltasync import host

        return getattr(host, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
