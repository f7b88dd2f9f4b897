"""The seed's routes, translated into native operations behind the same receive() (spec H-40 to H-48)."""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import PurePosixPath
from typing import Annotated, BinaryIO

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from deltasync import __version__
from deltasync.core import wire
from deltasync.core.bundle import BundleReader, Metadata
from deltasync.core.errors import SequenceConflict, UsageError
from deltasync.core.names import WorkspaceName
from deltasync.core.sequence import Head, Verdict
from deltasync_server.http import openapi
from deltasync_server.http.body import BodyPump, check_length
from deltasync_server.http.context import caller_of, context_of, permit_of, workspace_of
from deltasync_server.http.guard import report
from deltasync_server.http.multipart import boundary_of, read_form
from deltasync_server.http.problems import answer, status_of, told

router = APIRouter(prefix=f"{wire.API}/delta", tags=["seed"])

BUNDLE_MB_MAX = 100
BUNDLE_BYTES_MAX = BUNDLE_MB_MAX << 20
FORM_BYTES_MAX = BUNDLE_BYTES_MAX + (1 << 20)
"""The bundle, and room for the form around it."""
FIELDS = {
    "bundle": {"type": "string", "format": "binary", "description": "a sealed bundle, 100 MiB at most"},
    "workspace_path": {"type": "string", "description": "a label; no path is built from it"},
    "collection_name": {"type": "string", "description": "the workspace; otherwise the bundle's own"},
    "sequence_number": {"type": "string", "description": "the number that the client expects to be next"},
    "force": {"type": "string", "description": "true: take the number that the server expects"},
}
_YES, _NO = ("true", "1", "yes", "on"), ("", "false", "0", "no", "off", "null")
Label = Annotated[str, Query(max_length=4096)]


@router.post(
    "/upload",
    summary="Upload a bundle as a form",
    **openapi.gives_always(wire.SeedUploadAnswer, 200, 400, 408, 409, 413, 415, 422, 503, 507),
    openapi_extra=openapi.takes_form(FIELDS, ["bundle"]),
)
async def upload(request: Request) -> Response:
    """Apply a bundle that comes as a form; every refusal of it is this route's JSON with `success: false` (H-47)."""
    here = context_of(request)
    try:
        boundary = boundary_of(request.headers.get("content-type", ""))
        check_length(request, FORM_BYTES_MAX)
        work = partial(_receive_form, request, boundary)
        rules, tenant = here.body_rules(FORM_BYTES_MAX), caller_of(request).tenant
        return answer(await here.workers.with_body(request.receive, rules, work, tenant=tenant))
    except Exception as error:  # noqa: BLE001 - a route may; report() writes the traceback of what is a bug
        report(request.scope, error)
        ours = told(error, request.scope)
        return answer(_refused(ours.code, ours.sentence), status_of(ours))


def _receive_form(request: Request, boundary: bytes, pump: BodyPump) -> wire.SeedUploadAnswer:
    """Spool the file, because fields may follow it, then apply it (worker thread)."""
    here, began = context_of(request), time.monotonic()
    with tempfile.TemporaryFile(dir=here.staging()) as spool:
        form = read_form(pump, boundary, "bundle", spool, BUNDLE_BYTES_MAX)
        if form.file_bytes is None:
            raise UsageError("the form has no file named 'bundle'")
        spool.seek(0)
        name = workspace_of(request, form.fields.get("collection_name") or _collection_of(spool, here.limits))
        check = _Check(_number(form.fields.get("sequence_number")), is_forced=_flag(form.fields.get("force")))
        try:
            receipt = here.store.receive(
                name, spool, expected_identity=None, decide_hook=check, permit=permit_of(request)
            )
        except SequenceMismatch as error:
            return _refused(error.code, error.sentence, error.expected)
    following = here.store.workspace(name).sequence + 1 if receipt.duplicate else receipt.sequence + 1
    return _accepted(receipt, following, began)


def _collection_of(spool: BinaryIO, limits: wire.Limits) -> str:
    name = BundleReader(spool, limits).metadata().manifest.collection_name
    spool.seek(0)
    return name


class SequenceMismatch(SequenceConflict):
    """The bundle's number, or the one that the client expects, is not the next one (spec H-46)."""

    code = "SEQUENCE_MISMATCH"

    def __init__(self, expected: int) -> None:
        super().__init__(f"the server expects bundle {expected}", expected_sequence=expected)
        self.expected = expected


class _Check:
    """Compares the numbers while nobody else can move the head; raises SequenceMismatch."""

    def __init__(self, wanted: int | None, *, is_forced: bool) -> None:
        self._wanted, self._is_forced = wanted, is_forced

    def __call__(self, head: Head, metadata: Metadata, verdict: Verdict) -> None:
        if verdict is Verdict.NOT_OWNER:
            return  # whose workspace it is comes before which number is next
        number, expected = metadata.header.sequence, head.sequence + 1
        is_next = verdict is Verdict.DUPLICATE or number == expected
        # spec H-45: force puts the expected number in the place of the field's, and skips no check of the bundle's own
        is_wanted = self._is_forced or self._wanted in (None, number)
        if not (is_next and is_wanted):
            raise SequenceMismatch(expected)


def _accepted(receipt: wire.Receipt, following: int, began: float) -> wire.SeedUploadAnswer:
    return wire.SeedUploadAnswer(
        success=True,
        bundle_id=receipt.bundle_id,
        sequence_number=receipt.sequence,
        processed_operations={
            "created": receipt.created,
            "updated": receipt.updated,
            "moved": receipt.moved,
            "deleted": receipt.deleted,
        },
        processing_time_ms=round((time.monotonic() - began) * 1000),
        next_sequence=following,
    )


def _refused(code: str, message: str, expected: int | None = None) -> wire.SeedUploadAnswer:
    error = wire.SeedError(code=code, message=message, expected_sequence=expected)
    return wire.SeedUploadAnswer(success=False, error=error)


def _number(text: str | None) -> int | None:
    if text is None or text in ("", "null"):
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 16):
        raise UsageError("sequence_number is a whole number")
    return int(text)


def _flag(text: str | None) -> bool:
    if (found := (text or "").lower()) in _YES:
        return True
    if found in _NO:
        return False
    raise UsageError("force is true or false")


@router.get("/status", summary="Where a workspace stands", **openapi.gives(wire.SeedStatus, 400))
async def status(request: Request, workspace_path: Label = "", collection_name: Label = "") -> Response:
    """Say the last sequence of a workspace, which collection_name names, else the last part of workspace_path."""
    here, name = context_of(request), _status_name(request, workspace_path, collection_name)
    state = await here.workers.quick(partial(here.store.workspace, name))
    outcome = await here.workers.quick(partial(here.store.last_upload_status, name))
    return answer(_status(state, workspace_path, outcome))


def _status_name(request: Request, workspace_path: str, collection_name: str) -> WorkspaceName:
    if not (workspace_path or collection_name):
        raise UsageError("say which workspace: collection_name or workspace_path")
    if not collection_name and ".." in workspace_path.split("/"):
        raise UsageError("workspace_path climbs")
    return workspace_of(request, collection_name or PurePosixPath(workspace_path).name)


def _status(state: wire.WorkspaceState, workspace_path: str, outcome: str | None) -> wire.SeedStatus:
    return wire.SeedStatus(
        success=True,
        workspace_path=workspace_path,
        collection_name=state.workspace,
        last_sequence=state.sequence,
        last_upload=state.last_applied_at,
        pending_operations=state.lag,
        status="processing" if state.lag else "ready",
        last_bundle_id=state.last_bundle_id,
        last_upload_status=outcome,
        server_info=wire.SeedServerInfo(
            version=__version__, max_bundle_size_mb=BUNDLE_MB_MAX, supported_formats=["tar.zst"]
        ),
    )
