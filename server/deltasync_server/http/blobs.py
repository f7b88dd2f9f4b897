"""The routes of content: a blob or one range of it, and many at once (spec H-30 to H-32, H-37 to H-39)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Callable, Generator
from functools import partial
from typing import Annotated, BinaryIO, NamedTuple

import msgspec
from fastapi import APIRouter, Query, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from deltasync.core import wire
from deltasync.core.chunks import AVERAGE_BYTES
from deltasync.core.errors import Unauthorized, UsageError
from deltasync.decoding import decoded
from deltasync_server.access import Leave
from deltasync_server.http import openapi
from deltasync_server.http.body import check_length, whole
from deltasync_server.http.context import Context, caller_of, context_of, leave_of, workspace_of
from deltasync_server.http.problems import HttpRefusal
from deltasync_server.http.workers import until_gone
from deltasync_server.http.workspaces import DIGEST_JSON_BYTES, digest_of_path
from deltasync_server.tenants import tenant_of

router = APIRouter(prefix=wire.API, tags=["blobs"])

PIECE_BYTES = 1 << 20
_log = logging.getLogger(__name__)
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


@router.get("/blobs/{digest}", summary="A blob's bytes", **openapi.gives_bytes(200, 206, 404, 416))
async def blob(request: Request, digest: str) -> Response:
    """Return a blob, or the one range of it that the Range header asks for (spec H-30, H-31)."""
    here, name = context_of(request), digest_of_path(digest)
    file, size = await here.workers.quick(partial(here.store.open_blob, caller_of(request).tenant, name))
    asked = request.headers.get("range")
    try:
        part = Part(name, file, *byte_range(asked, size))
    except HttpRefusal:
        file.close()
        raise
    headers = {"Content-Length": str(part.end - part.start), "Accept-Ranges": "bytes"}
    if is_partial := asked is not None and _is_bytes(asked):
        headers["Content-Range"] = f"bytes {part.start}-{part.end - 1}/{size}"
    return _PartResponse(here, leave_of(request), part, 206 if is_partial else 200, headers)


class Part(NamedTuple):
    """A range of an open blob."""

    digest: bytes
    file: BinaryIO
    start: int
    end: int


class _PartResponse(Response):
    """Streams a part in pieces; a reader that takes nothing does not hold the file for ever (spec H-32)."""

    media_type = "application/octet-stream"

    def __init__(self, here: Context, leave: Leave, part: Part, status: int, headers: dict[str, str]) -> None:
        super().__init__(None, status, headers)
        self._here, self._leave, self._part = here, leave, part

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the head and the pieces."""
        with self._part.file as file:
            file.seek(self._part.start)
            try:
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                await self._send_pieces(file, send)
            except TimeoutError:
                _log.warning("a reader of %s took nothing for %g s", scope["path"], self._here.config.body_seconds)
            except Unauthorized as error:
                _log.warning("a reader of %s was cut off: %s", scope["path"], error.sentence)

    async def _send_pieces(self, file: BinaryIO, send: Send) -> None:
        left = self._part.end - self._part.start
        while True:
            read = partial(self._read, file, min(PIECE_BYTES, left))
            piece = await self._here.workers.quick(_with(self._leave, read))
            left -= len(piece)
            async with asyncio.timeout(self._here.config.body_seconds):
                await send({"type": "http.response.body", "body": piece, "more_body": left > 0})
            if not left:
                return

    def _read(self, file: BinaryIO, size: int) -> bytes:
        """Return the next bytes of the blob; raises OSError for one that cannot be read to its end (spec ST-28)."""
        try:
            piece = file.read(size)
            if size and not piece:
                raise OSError("a blob is shorter than its row says")
        except OSError:
            self._here.store.doubt(self._part.digest)
            raise
        return piece


def _with(leave: Leave, read: Callable[[], bytes]) -> Callable[[], bytes]:
    """Return what reads a piece where its reader still may."""

    def work() -> bytes:
        leave.require()
        return read()

    return work


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


Average = Annotated[int, Query(ge=1, le=1 << 30, description="bytes of a chunk on average")]
Pieces = Generator[bytes, None, None]


@router.get(
    "/workspaces/{workspace}/recipes/{digest}", summary="The recipe of a blob", **openapi.gives_bytes(200, 400, 404)
)
async def recipe(request: Request, workspace: str, digest: str, average: Average = AVERAGE_BYTES) -> Response:
    """Return the list of a blob's chunks, cut now: a sender finds out which of them it need not send (H-136)."""
    here, tenant = context_of(request), tenant_of(workspace_of(request, workspace))
    offer = partial(here.store.offer_chunks, tenant, digest_of_path(digest), average)
    return _PiecesResponse(here, leave_of(request), await here.workers.quick(offer))


@router.post(
    "/workspaces/{workspace}/blobs",
    summary="Many blobs in one stream",
    **openapi.gives_bytes(200, 400, 413),
    openapi_extra=openapi.takes(wire.ContentRequest),
)
async def blobs(request: Request, workspace: str) -> Response:
    """Return a frame for each digest asked for: the blob's size and bytes, or that it is not there (H-37, H-38)."""
    here, tenant = context_of(request), tenant_of(workspace_of(request, workspace))
    return await _offered(here, request, partial(here.store.offer_blobs, tenant))


@router.post(
    "/workspaces/{workspace}/trees",
    summary="Many directory objects in one stream",
    **openapi.gives_bytes(200, 400, 404, 413),
    openapi_extra=openapi.takes(wire.ContentRequest),
)
async def trees(request: Request, workspace: str) -> Response:
    """Return a frame for each directory object asked for (H-38, H-39)."""
    here, name = context_of(request), workspace_of(request, workspace)
    return await _offered(here, request, partial(here.store.offer_objects, name))


async def _offered(here: Context, request: Request, offer: Callable[[list[str]], Pieces]) -> Response:
    rules = here.body_rules(here.limits.missing_digests * DIGEST_JSON_BYTES)
    check_length(request, rules.limit_bytes)
    body = await whole(request.receive, rules)
    return _PiecesResponse(here, leave_of(request), await here.workers.quick(lambda: offer(_digests(body))))


def _digests(body: bytes) -> list[str]:
    try:
        return decoded(body, wire.ContentRequest).digests
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UsageError(f"not a request for content: {error}") from error


class _PiecesResponse(Response):
    """Streams pieces as they are made; a reader that takes nothing, or is gone, ends it (spec H-32)."""

    media_type = "application/octet-stream"

    def __init__(self, here: Context, leave: Leave, pieces: Pieces) -> None:
        super().__init__(None, 200)
        del self.headers["content-length"]
        self._here, self._leave, self._pieces = here, leave, pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the head and the pieces."""
        leaving = asyncio.create_task(until_gone(receive))
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            while not leaving.done():
                piece = await self._here.workers.quick(_with(self._leave, partial(next, self._pieces, b"")))
                async with asyncio.timeout(self._here.config.body_seconds):
                    await send({"type": "http.response.body", "body": piece, "more_body": bool(piece)})
                if not piece:
                    return
        except TimeoutError:
            _log.warning("a reader of %s took nothing for %g s", scope["path"], self._here.config.body_seconds)
        except Unauthorized as error:
            _log.warning("a reader of %s was cut off: %s", scope["path"], error.sentence)
        finally:
            leaving.cancel()
            with contextlib.suppress(ValueError):  # cut off while a thread makes a piece: it ends with that
                self._pieces.close()
