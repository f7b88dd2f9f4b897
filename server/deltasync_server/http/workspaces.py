"""The routes of a workspace: state, tree, kept sequences, missing digests, sizes, bundles (H-20 to H-36, H-135)."""

from __future__ import annotations

import re
from functools import partial
from typing import Annotated

import msgspec
from fastapi import APIRouter, Query, Request
from fastapi import Path as PathParameter
from starlette.responses import Response

from deltasync.core import wire
from deltasync.core.errors import NotFound, UsageError
from deltasync.core.names import WorkspaceName
from deltasync.decoding import decoded
from deltasync_server.http import openapi
from deltasync_server.http.body import check_length, whole
from deltasync_server.http.context import Context, caller_of, context_of, permit_of, workspace_of
from deltasync_server.http.problems import answer

router = APIRouter(prefix=wire.API, tags=["workspaces"])

WAIT_SECONDS_MAX = 60.0
DIGEST_JSON_BYTES = 72
"""What one digest may take in the JSON of a `missing` request, with room for spaces."""
_DIGEST = re.compile(r"[0-9a-f]{64}")

Wait = Annotated[float, Query(ge=0, allow_inf_nan=False, description="seconds to wait, 60 at most")]
Sequence = Annotated[int, Query(ge=0, le=2**53)]
SequenceNumber = Annotated[int, PathParameter(ge=0, le=2**53)]


def digest_of_path(text: str) -> bytes:
    """Return the digest that a path names; what is none cannot exist."""
    if not _DIGEST.fullmatch(text):
        raise NotFound("there is no such digest: it is 64 lower-case hexadecimal digits")
    return bytes.fromhex(text)


@router.get("/workspaces", summary="Every workspace", **openapi.gives(wire.WorkspaceList))
async def workspaces(request: Request) -> Response:
    """List every workspace of the caller's tenant that was ever written."""
    here, tenant = context_of(request), caller_of(request).tenant
    return answer(wire.WorkspaceList(workspaces=await here.workers.quick(partial(here.store.workspaces, tenant))))


@router.get("/workspaces/{workspace}", summary="One workspace", **openapi.gives(wire.WorkspaceState, 400))
async def workspace_state(
    request: Request, workspace: str, tree_sequence: Sequence | None = None, wait: Wait = 0
) -> Response:
    """Say where a workspace stands; one that was never written has sequence 0.

    With `tree_sequence` and `wait` the answer comes as soon as the plain tree holds that sequence, or when the time
    is up, or earlier when the server is busy: read `tree_sequence` in the answer.
    """
    here, name = context_of(request), workspace_of(request, workspace)
    if tree_sequence is not None and (found := await _settled(here, request, name, tree_sequence, wait)):
        return answer(found)
    return answer(await here.workers.quick(partial(here.store.workspace, name)))


async def _settled(
    here: Context, request: Request, name: WorkspaceName, sequence: int, seconds: float
) -> wire.WorkspaceState | None:
    """Wait until the tree holds a sequence; None when it does not in time."""

    def ask(slice_seconds: float) -> wire.WorkspaceState | None:
        state = here.store.wait_for_tree(name, sequence, slice_seconds)
        return state if state.tree_sequence is not None and state.tree_sequence >= sequence else None

    return await here.workers.poll(request.receive, ask, min(seconds, WAIT_SECONDS_MAX))


@router.get("/workspaces/{workspace}/tree/{root}", summary="One directory object", **openapi.gives_bytes(200, 400, 404))
async def directory(request: Request, workspace: str, root: str) -> Response:
    """Return the body of a directory object of this workspace, for the Merkle walk."""
    here, name, digest = context_of(request), workspace_of(request, workspace), digest_of_path(root)
    body = await here.workers.quick(partial(here.store.directory, name, digest))
    return Response(body, media_type="application/octet-stream")


@router.get("/workspaces/{workspace}/sequences", summary="Kept sequences", **openapi.gives(wire.KeptSequences, 400))
async def sequences(request: Request, workspace: str) -> Response:
    """List the sequences whose trees the server still holds, oldest first."""
    here, name = context_of(request), workspace_of(request, workspace)
    return answer(await here.workers.quick(partial(here.store.sequences, name)))


@router.get(
    "/workspaces/{workspace}/sequences/{sequence}",
    summary="One kept sequence",
    **openapi.gives(wire.KeptSequence, 400, 410),
)
async def kept_sequence(request: Request, workspace: str, sequence: SequenceNumber) -> Response:
    """Return a kept sequence with its root; one that is not kept is 410 with the range of those that are (H-36)."""
    here, name = context_of(request), workspace_of(request, workspace)
    return answer(await here.workers.quick(partial(here.store.sequence, name, sequence)))


_PIN = "/workspaces/{workspace}/sequences/{sequence}/pin"


@router.put(_PIN, summary="Pin a kept sequence", **openapi.gives(wire.KeptSequences, 400, 410, 411, 413))
async def pin(request: Request, workspace: str, sequence: SequenceNumber) -> Response:
    """Hold a kept sequence, with its content, until it is unpinned; returns what is kept then (H-110)."""
    here, name = context_of(request), workspace_of(request, workspace)
    return answer(await here.workers.quick(partial(here.store.pin, name, sequence)))


@router.delete(_PIN, summary="Unpin a sequence", **openapi.gives(wire.KeptSequences, 400))
async def unpin(request: Request, workspace: str, sequence: SequenceNumber) -> Response:
    """Hold a sequence only as long as others of its age; one that is not pinned stays as it is (H-110)."""
    here, name = context_of(request), workspace_of(request, workspace)
    return answer(await here.workers.quick(partial(here.store.unpin, name, sequence)))


@router.post(
    "/workspaces/{workspace}/missing",
    summary="Which content must be sent",
    **openapi.gives(wire.MissingAnswer, 400, 413),
    openapi_extra=openapi.takes(wire.MissingRequest),
)
async def missing(request: Request, workspace: str) -> Response:
    """Say which of these digests the cache lacks; the others are leased, so that they stay until the bundle comes."""
    here, name = context_of(request), workspace_of(request, workspace)
    rules = here.body_rules(here.limits.missing_digests * DIGEST_JSON_BYTES)
    check_length(request, rules.limit_bytes)
    body = await whole(request.receive, rules)
    return answer(await here.workers.quick(lambda: here.store.missing(name, _digests(body))))


def _digests(body: bytes) -> list[str]:
    try:
        return decoded(body, wire.MissingRequest).digests
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UsageError(f"not a missing request: {error}") from error


@router.post(
    "/workspaces/{workspace}/sizes",
    summary="Of which sizes there is content",
    **openapi.gives(wire.SizesAnswer, 400, 413),
    openapi_extra=openapi.takes(wire.SizesRequest),
)
async def sizes(request: Request, workspace: str) -> Response:
    """Say of which of these sizes the caller holds some content, or may; a file of any other size is not here (H-135).

    Of those below 1 MiB there may always be some.
    """
    here, name = context_of(request), workspace_of(request, workspace)
    rules = here.body_rules(here.limits.missing_digests * DIGEST_JSON_BYTES)
    check_length(request, rules.limit_bytes)
    body = await whole(request.receive, rules)
    return answer(await here.workers.quick(lambda: here.store.sizes(name, _sizes(body))))


def _sizes(body: bytes) -> list[int]:
    try:
        return decoded(body, wire.SizesRequest).sizes
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UsageError(f"not a sizes request: {error}") from error


@router.post(
    "/workspaces/{workspace}/bundles",
    summary="Send one sealed bundle",
    **openapi.gives(wire.Receipt, 400, 408, 409, 411, 413, 415, 422, 503, 507),
    openapi_extra=openapi.takes_bundle(),
)
async def bundles(request: Request, workspace: str, take_over: bool = False, wait: Wait = 0) -> Response:
    """Apply a bundle, which is the raw body, and return its receipt; the same bundle again gets the same receipt.

    With `wait` the receipt comes when the plain tree holds the bundle, or when the time is up.
    """
    here, name = context_of(request), workspace_of(request, workspace)
    identity, permit = _identity(request), permit_of(request)
    rules = here.body_rules(here.limits.bundle_bytes)
    check_length(request, rules.limit_bytes)
    with here.store.arriving(name) as arrival:  # before a thread is found for it: the next one may overtake it there
        receipt = await here.workers.with_body(
            request.receive,
            rules,
            lambda pump: here.store.receive(
                name, pump, expected_identity=identity, take_over=take_over, arrival=arrival, permit=permit
            ),
            tenant=caller_of(request).tenant,
        )
    return answer(await settled_receipt(here, request, receipt, wait))


async def settled_receipt(here: Context, request: Request, receipt: wire.Receipt, seconds: float) -> wire.Receipt:
    """Hold a receipt back until the plain tree holds its bundle, or for so many seconds (spec H-28)."""
    name = workspace_of(request, receipt.workspace)
    if seconds and (found := await _settled(here, request, name, receipt.sequence, seconds)):
        return msgspec.structs.replace(receipt, tree_sequence=found.tree_sequence, wanted=found.wanted)
    return receipt


def _identity(request: Request) -> bytes:
    values = request.headers.getlist(wire.IDENTITY_HEADER)
    if len(values) != 1 or not _DIGEST.fullmatch(values[0]):
        raise UsageError(f"a bundle comes with one {wire.IDENTITY_HEADER} header of 64 lower-case hexadecimal digits")
    return bytes.fromhex(values[0])
