"""What a command says on a host, told with the paths of this machine (spec J-65)."""

from __future__ import annotations

import re


class Telling:
    """Puts local paths in the place of a session's, in a stream of bytes, whatever pieces it comes in.

    Only a path below inputs/ or outputs/ of this one session is replaced, byte for byte. No more is held back than
    the beginning of such a path.
    """

    def __init__(self, session_path: str) -> None:
        """session_path: the session's folder on the host; '' replaces nothing."""
        top = session_path.rstrip("/").encode(errors="surrogateescape")
        self._prefixes = (top + b"/inputs/", top + b"/outputs/") if top else ()
        self._pattern = re.compile(b"|".join(map(re.escape, self._prefixes))) if top else None
        self._held = b""

    def told(self, content: bytes) -> bytes:
        """Return what can be told by now."""
        if self._pattern is None:
            return content
        text = self._held + content
        last = max((match.end() for match in self._pattern.finditer(text)), default=0)
        end = len(text) - self._unsure(text[last:])
        self._held = text[end:]
        return self._pattern.sub(b"/", text[:end])

    def rest(self) -> bytes:
        """Return what was held back, at the end of the stream."""
        held, self._held = self._held, b""
        return held

    def _unsure(self, text: bytes) -> int:
        """Return how many bytes at the end may be the beginning of a path that is to be replaced."""
        longest = max(map(len, self._prefixes)) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(prefix.startswith(text[-length:]) for prefix in self._prefixes):
                return length
        return 0
