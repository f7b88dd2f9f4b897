"""The route of a blob: its bytes, or one range of them (spec H-30 to H-32)."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from functools import partial
from typing import BinaryIO

from fastapi import APIRouter, Request
from starlette.responses import Response, StreamingResponse

from deltasync.core import wire
from deltasync_server.http import openapi
from deltasync_server.http.context import Context, context_of
from deltasync_server.http.problems import HttpRefusal
from deltasync_server.http.workspaces import digest_of_path

router = APIRouter(prefix=wire.API, tags=["blobs"])

PIECE_BYTES = 1 << 20
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


@router.get("/blobs/{digest}", summary="A blob's bytes", **openapi.gives_bytes(200, 206, 404, 416))
async def blob(request: Request, digest: str) -> Response:
    """Return a blob, or the one range of it that the Range header asks for."""
    here = context_of(request)
    file, size = await here.workers.quick(partial(here.store.open_blob, digest_of_path(digest)))
    try:
        start, end = byte_range(request.headers.get("range"), size)
    except HttpRefusal:
        file.close()
        raise
    headers = {"Content-Length": str(end - start), "Accept-Ranges": "bytes"}
    if is_partial := "range" in request.headers and _is_bytes(request.headers["range"]):
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    status = 206 if is_partial else 200
    return StreamingResponse(_pieces(here, file, start, end), status, headers, media_type="application/octet-stream")


def _is_bytes(text: str) -> bool:
    return text.lower().startswith("bytes=")


def byte_range(text: str | None, size: int) -> tuple[int, int]:
    """Return start and end of what a Range header asks for; raises 416 for what cannot be given as one range."""
    if text is None or not _is_bytes(text):
        return 0, size  # spec H-31: a unit that we do not know is as if it were not there
    found = _RANGE.fullmatch(text.lower().replace(" ", ""))
    first, last = found.groups() if found else ("", "")
    if first:
        start, end = int(first), min(int(last) + 1, size) if last else size
    elif last:
        start, end = max(0, size - int(last)), size
    else:
        start = end = size
    if start >= end:
        raise HttpRefusal(
            416, "one range of bytes inside the blob can be asked for", {"Content-Range": f"bytes */{size}"}
        )
    return start, end


async def _pieces(here: Context, file: BinaryIO, start: int, end: int) -> AsyncIterator[bytes]:
    try:
        file.seek(start)
        while start < end:
            piece = await here.workers.quick(partial(file.read, min(PIECE_BYTES, end - start)))
            if not piece:
                raise OSError("a blob is shorter than its row says")
            start += len(piece)
            # a client that does not read must not hold the file for ever
            async with asyncio.timeout(here.config.body_seconds):
                yield piece
    finally:
        file.close()
