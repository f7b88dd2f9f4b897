"""The routes of plain files: deletions, one at a time or many (spec H-82, H-83)."""

from __future__ import annotations

from functools import partial
from typing import TypeVar

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from deltasync.core import wire
from deltasync.core.errors import UsageError
from deltasync_server.files import check_deletion
from deltasync_server.http import openapi
from deltasync_server.http.context import body_of, caller_of, context_of
from deltasync_server.http.problems import answer
from deltasync_server.http.workspaces import digest_of_path

router = APIRouter(prefix="/files", tags=["files"])

BODY_BYTES = 8 << 20
_Value = TypeVar("_Value")


@router.post(
    "/deletions",
    summary="Mark files deleted",
    **openapi.gives(wire.DeletedFiles, 400, 404, 411, 413),
    openapi_extra=openapi.takes(wire.FileDeletions),
)
async def deletions(request: Request) -> Response:
    """Mark files deleted for the sender that they belong to: all of them, or none when one is unknown."""
    here = context_of(request)
    asked = await body_of(request, wire.FileDeletions, BODY_BYTES)
    for each in asked.files:
        check_deletion(each)
    files = await here.workers.quick(partial(here.store.files.delete, caller_of(request).tenant, asked.files))
    return answer(wire.DeletedFiles(files=files))


@router.delete(
    "/{digest}",
    summary="Mark one file deleted",
    **openapi.gives(wire.DeletedFile, 400, 404, 413),
    openapi_extra=openapi.takes(wire.FileDeletion),
)
async def deletion(request: Request, digest: str) -> Response:
    """Mark the file with this sha256 or blake3 deleted, for the sender and under the path that the body names."""
    here, name = context_of(request), digest_of_path(digest).hex()
    asked = await body_of(request, wire.FileDeletion, BODY_BYTES)
    if {asked.sha256, asked.blake3} - {"", name}:
        raise UsageError("the body names another digest than the path")
    asked = msgspec.structs.replace(asked, sha256=name, blake3=name)
    check_deletion(asked)
    (deleted,) = await here.workers.quick(partial(here.store.files.delete, caller_of(request).tenant, [asked]))
    return answer(deleted)
