"""The OpenAPI description: what each route gives and takes, with the schemas of the wire's own types."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from starlette.responses import Response

from deltasync import __version__
from deltasync.core import jobs, wire
from deltasync_server.http.problems import MEDIA_TYPE, phrase

if TYPE_CHECKING:
    from fastapi import FastAPI

TYPES = (
    wire.WorkspaceState,
    wire.WorkspaceList,
    wire.MissingRequest,
    wire.MissingAnswer,
    wire.SizesRequest,
    wire.SizesAnswer,
    wire.KeptSequence,
    wire.KeptSequences,
    wire.ContentRequest,
    wire.Receipt,
    wire.PairingRequest,
    wire.PairingAnswer,
    wire.PairingConfirm,
    wire.Paired,
    wire.RotateRequest,
    wire.Rotated,
    wire.Unpaired,
    wire.UploadRequest,
    wire.UploadState,
    wire.UploadParts,
    wire.UploadedChunk,
    wire.UploadComplete,
    wire.UploadAborted,
    wire.StoredFile,
    wire.FileDeletions,
    wire.DeletedFile,
    wire.DeletedFiles,
    jobs.JobRequest,
    jobs.Job,
    jobs.JobList,
    jobs.LeftOutputs,
    jobs.Capabilities,
    wire.Health,
    wire.SeedUploadAnswer,
    wire.SeedStatus,
    wire.Problem,
)
IDENTITY = {
    "name": wire.IDENTITY_HEADER,
    "in": "header",
    "required": True,
    "description": "the bundle's identity: BLAKE3 of its manifest.json",
    "schema": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
}
ETAG = {
    "name": wire.ETAG_HEADER,
    "in": "header",
    "required": False,
    "description": "BLAKE3 of the whole piece; a piece of another digest is refused",
    "schema": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
}
OFFSET = {
    "name": wire.OFFSET_HEADER,
    "in": "header",
    "required": False,
    "description": "the body is the rest of the piece, behind what the server has as partial",
    "schema": {"type": "integer", "minimum": 0},
}

Keywords = dict[str, Any]
"""Arguments of FastAPI's route decorators and pieces of OpenAPI; JSON without a type of its own."""


def _ref(kind: type[msgspec.Struct]) -> Keywords:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}


def _responses(content: Keywords, successes: tuple[int, ...], errors: tuple[int, ...]) -> Keywords:
    refused = {"description": "refused", "content": {MEDIA_TYPE: {"schema": _ref(wire.Problem)}}}
    answers = {status: {"description": phrase(status), "content": content} for status in successes}
    answers |= {status: {**refused, "description": phrase(status)} for status in errors}
    return {"responses": {**answers, "default": refused}, "response_class": Response}


def gives(kind: type[msgspec.Struct], *errors: int) -> Keywords:
    """Describe a route that answers one JSON value."""
    return _responses({"application/json": {"schema": _ref(kind)}}, (200,), errors)


def gives_made(kind: type[msgspec.Struct], *errors: int) -> Keywords:
    """Describe a route that answers one JSON value, 201 when it has just been made."""
    return _responses({"application/json": {"schema": _ref(kind)}}, (200, 201), errors)


def gives_events(*errors: int) -> Keywords:
    """Describe a route that answers server-sent events."""
    return _responses({"text/event-stream": {}}, (200,), errors)


def gives_one_of(kinds: tuple[type[msgspec.Struct], ...], *errors: int) -> Keywords:
    """Describe a route that answers one of several JSON values."""
    return _responses({"application/json": {"schema": {"oneOf": [_ref(kind) for kind in kinds]}}}, (200,), errors)


def gives_always(kind: type[msgspec.Struct], *statuses: int) -> Keywords:
    """Describe a route whose refusals have the shape of its successes."""
    return _responses({"application/json": {"schema": _ref(kind)}}, statuses, ())


def gives_bytes(*statuses: int) -> Keywords:
    """Describe a route that answers raw bytes."""
    content = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    successes = tuple(status for status in statuses if status < 300)
    return _responses(content, successes, tuple(status for status in statuses if status >= 300))


def gives_text(media_type: str) -> Keywords:
    """Describe a route that answers text."""
    return _responses({media_type: {}}, (200,), ())


def takes(kind: type[msgspec.Struct]) -> Keywords:
    """Describe a route whose body is one JSON value."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": _ref(kind)}}}}


def takes_bundle() -> Keywords:
    """Describe the route whose body is a sealed bundle."""
    content = {wire.BUNDLE_MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}
    return {"parameters": [IDENTITY], "requestBody": {"required": True, "content": content}}


def takes_piece() -> Keywords:
    """Describe the route whose body is one piece of an upload."""
    content = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    return {"parameters": [ETAG, OFFSET], "requestBody": {"required": True, "content": content}}


def takes_form(fields: Keywords, required: list[str]) -> Keywords:
    """Describe a route whose body is a form with a file."""
    schema = {"type": "object", "properties": fields, "required": required}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def describe(app: FastAPI) -> Keywords:
    """Return the description of an application, made once."""
    if app.openapi_schema is None:
        from fastapi.openapi.utils import get_openapi

        found = get_openapi(
            title="deltasync-server",
            version=__version__,
            summary="Takes sealed bundles, keeps a plain tree, and proves both sides equal.",
            routes=app.routes,
        )
        _, schemas = msgspec.json.schema_components(TYPES, ref_template="#/components/schemas/{name}")
        found["components"] = {
            "schemas": dict(sorted(schemas.items())),
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        }
        found["security"] = [{"token": []}, {}]  # where nobody else reaches the server none is needed (spec H-100)
        app.openapi_schema = found
    return app.openapi_schema
