"""The audit log: who changed or was refused what, when and from where, one JSON object a line (spec ST-115, ST-116)."""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, Self, cast

NAME = "audit.jsonl"
FILE_BYTES_MAX = 16 << 20
FILES_KEPT = 8
_log = logging.getLogger(__name__)


class Audit:
    """Appends to DATA/audit.jsonl; several threads may use it, and commands beside a server."""

    def __init__(self, data: Path) -> None:
        """Open the log, or make it, readable for its owner only."""
        self._handler = _File(data / NAME, maxBytes=FILE_BYTES_MAX, backupCount=FILES_KEPT, encoding="utf-8")

    def note(self, what: str, **facts: Any) -> None:
        """Append one line; facts are JSON values. A line that cannot be written is told to the server's own log."""
        entry = {"at": datetime.now(UTC).isoformat(timespec="milliseconds"), "what": what, **facts}
        line = json.dumps(entry, ensure_ascii=True)  # whatever a name holds, it ends no line and moves no cursor
        self._handler.handle(logging.LogRecord(NAME, logging.INFO, "", 0, line, None, None))

    def close(self) -> None:
        """Close the file."""
        self._handler.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _File(RotatingFileHandler):
    """The current file and those before it, which only their owner reads."""

    def _open(self) -> TextIOWrapper:
        def opener(path: str, flags: int) -> int:
            return os.open(path, flags | os.O_CLOEXEC, 0o600)

        return cast(TextIOWrapper, open(self.baseFilename, self.mode, encoding=self.encoding, opener=opener))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's own name
        _log.error("the audit log cannot be written (%s): %s", sys.exc_info()[1], record.getMessage())
