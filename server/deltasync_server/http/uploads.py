"""The routes of uploads: a bundle in pieces, several at a time, that go on where they broke off (spec H-70 to H-77)."""

from __future__ import annotations

import re
from functools import partial
from typing import Annotated, TypeVar

import msgspec
from fastapi import APIRouter, Path, Request
from starlette.responses import Response

from deltasync.core import wire
from deltasync.core.errors import UsageError
from deltasync.core.names import WorkspaceName
from deltasync.decoding import decoded
from deltasync_server.http import openapi
from deltasync_server.http.body import BodyPump, check_length, whole
from deltasync_server.http.context import caller_of, context_of, permit_of, workspace_of
from deltasync_server.http.problems import answer
from deltasync_server.http.workspaces import Wait, settled_receipt
from deltasync_server.uploads import Answer

ALIAS = "/api"
"""Where the seed's clients look for these routes."""
router = APIRouter(prefix="/uploads", tags=["uploads"])

INITIATE_BYTES = 64 * 1024
PART_JSON_BYTES = 128
"""What one piece may take in the JSON of `complete`, with room for spaces."""
_DIGEST = re.compile(r"[0-9a-f]{64}")
_Value = TypeVar("_Value")
Number = Annotated[int, Path(ge=0, le=2**31)]


@router.post(
    "/initiate",
    summary="Begin an upload in pieces",
    **openapi.gives(wire.UploadState, 400, 411, 413, 503, 507),
    openapi_extra=openapi.takes(wire.UploadRequest),
)
async def initiate(request: Request) -> Response:
    """Begin an upload; its pieces may come in any order, several at once, and again after a cut."""
    here = context_of(request)
    check_length(request, INITIATE_BYTES)
    asked = _decoded(await whole(request.receive, here.body_rules(INITIATE_BYTES)), wire.UploadRequest)
    name, tenant = _workspace(request, asked), caller_of(request).tenant
    return answer(await here.workers.quick(partial(here.store.uploads.initiate, tenant, asked, name)))


@router.get("/{upload_id}", summary="What is there of an upload", **openapi.gives(wire.UploadState, 404))
async def upload_state(request: Request, upload_id: str) -> Response:
    """List the pieces that are there; the others are still to be sent."""
    here = context_of(request)
    return answer(await here.workers.quick(partial(here.store.uploads.state, caller_of(request).tenant, upload_id)))


@router.get("/{upload_id}/chunks", summary="The pieces of an upload", **openapi.gives(wire.UploadParts, 404))
async def upload_parts(request: Request, upload_id: str) -> Response:
    """List the pieces that are there with their digests, for a sender that goes on with an upload."""
    here = context_of(request)
    return answer(await here.workers.quick(partial(here.store.uploads.parts, caller_of(request).tenant, upload_id)))


@router.put(
    "/{upload_id}/chunk/{number}",
    summary="Send one piece",
    **openapi.gives(wire.UploadedChunk, 400, 404, 408, 411, 413, 503, 507),
    openapi_extra=openapi.takes_piece(),
)
async def chunk(request: Request, upload_id: str, number: Number) -> Response:
    """Take one piece, which is the raw body; the same piece again is one piece."""
    here = context_of(request)
    rules = here.body_rules(here.limits.upload_piece_bytes)
    check_length(request, rules.limit_bytes)
    tenant = caller_of(request).tenant
    put = partial(here.store.uploads.put, tenant, upload_id, number, etag=_etag(request), offset=_offset(request))
    return answer(await here.workers.with_body(request.receive, rules, put, tenant=tenant))


@router.post(
    "/{upload_id}/complete",
    summary="End an upload",
    **openapi.gives_one_of((wire.Receipt, wire.StoredFile), 400, 404, 409, 411, 413, 422, 503, 507),
    openapi_extra=openapi.takes(wire.UploadComplete),
)
async def complete(request: Request, upload_id: str, take_over: bool = False, wait: Wait = 0) -> Response:
    """Apply the bundle that the pieces make, and answer as the bundles' route does, or store the file.

    Completing again gives the same answer.
    """
    here = context_of(request)
    asked = await here.workers.quick(partial(here.store.uploads.state, caller_of(request).tenant, upload_id))
    rules = here.body_rules(INITIATE_BYTES + asked.uploaded_chunks * PART_JSON_BYTES)
    check_length(request, rules.limit_bytes)
    work = partial(_complete, request, upload_id, take_over)
    found = await here.workers.with_body(request.receive, rules, work, tenant=caller_of(request).tenant)
    return answer(await settled_receipt(here, request, found, wait) if isinstance(found, wire.Receipt) else found)


def _workspace(request: Request, asked: wire.UploadRequest) -> WorkspaceName | None:
    """Return the workspace that a bundle is for; refuse what lacks a part of its kind, or has one of the other."""
    of_bundle, of_file = (asked.workspace, asked.identity), (asked.filepath, asked.hostname)
    if asked.kind == "bundle":
        if not asked.identity or any((*of_file, asked.sha256, asked.blake3)):
            raise UsageError("a bundle comes with workspace and identity, and without what names a file")
        return workspace_of(request, asked.workspace)
    if any(of_bundle) or not all(of_file) or not (asked.sha256 or asked.blake3) or asked.file_size is None:
        raise UsageError("a file comes with filepath, hostname, file_size and sha256 or blake3")
    return None


def _complete(request: Request, upload_id: str, take_over: bool, pump: BodyPump) -> Answer:
    body = b"".join(iter(partial(pump.read, 1 << 16), b""))
    asked = _decoded(body or b"{}", wire.UploadComplete)
    complete_upload = context_of(request).store.complete_upload
    tenant, permit = caller_of(request).tenant, permit_of(request)
    return complete_upload(tenant, upload_id, asked, take_over=take_over, permit=permit)


@router.delete("/{upload_id}", summary="Abort an upload", **openapi.gives(wire.UploadAborted, 400, 404, 503))
async def abort(request: Request, upload_id: str) -> Response:
    """Remove an unfinished upload with everything that came of it."""
    here = context_of(request)
    return answer(await here.workers.quick(partial(here.store.uploads.abort, caller_of(request).tenant, upload_id)))


def _decoded(body: bytes, kind: type[_Value]) -> _Value:
    try:
        return decoded(body, kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"the request's JSON is not what this route takes: {error}") from error


def _etag(request: Request) -> bytes | None:
    values = request.headers.getlist(wire.ETAG_HEADER)
    if len(values) > 1 or not all(_DIGEST.fullmatch(value) for value in values):
        raise UsageError(f"a piece has at most one {wire.ETAG_HEADER} header, of 64 lower-case hexadecimal digits")
    return bytes.fromhex(values[0]) if values else None


def _offset(request: Request) -> int:
    values = request.headers.getlist(wire.OFFSET_HEADER) or ["0"]
    if len(values) > 1 or not re.fullmatch("[0-9]{1,12}", values[0]):
        raise UsageError(f"{wire.OFFSET_HEADER} is one whole number")
    return int(values[0])
