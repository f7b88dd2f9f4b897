"""The JSON values of the HTTP API (spec/3-http.md); frozen, decoded strictly, additive only."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

API = "/api/v1"
BUNDLE_MEDIA_TYPE = "application/vnd.deltasync.bundle"
IDENTITY_HEADER = "Deltasync-Identity"
ETAG_HEADER = "Deltasync-Etag"
"""The digest of a piece as its sender knows it."""
OFFSET_HEADER = "Deltasync-Offset"
"""How many first bytes of a piece the server has from an attempt that broke off."""
SERVER_HEADER = "Deltasync-Server"
"""Every answer of a deltasync server carries this header; its value is the API version."""


PROBLEM_CODES = frozenset(
    [
        "USAGE",
        "UNAUTHORIZED",
        "FORBIDDEN",
        "NOT_FOUND",
        "SEQUENCE_GAP",
        "SEQUENCE_FORK",
        "STALE_EPOCH",
        "NOT_OWNER",
        "CONTENT_MISSING",
        "CORRUPT",
        "UPLOAD_INCOMPLETE",
        "SEQUENCE_GONE",
        "LIMIT_EXCEEDED",
        "BUNDLE_REFUSED",
        "ROOT_MISMATCH",
        "HOST_BUSY",
        "NO_SPACE",
        "ERROR",
    ]
)
"""What a server may say that is wrong (spec H-7); other errors are a client's own."""

_DIGEST = msgspec.Meta(pattern="^([0-9a-f]{64})?$")
_Sequence = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
"""A number that a database, a file and a seek can have (spec H-142)."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a server takes; advertised in GET workspaces/{ws} and enforced before anything is written."""

    bundle_content_bytes: Count = 64 * 2**20
    """Where a sender cuts a bundle; one larger file still travels whole in one bundle."""
    bundle_bytes: Count = 1 << 40
    """The most compressed and decompressed bytes of one bundle."""
    bundle_operations: Count = 20_000
    metadata_bytes: Count = 64 * 2**20
    """The most bytes of manifest.json, operations.json and hashes.json, each."""
    missing_digests: Count = 65_536
    """The most digests in one `missing` request."""
    expansion_ratio: Count = 2_000
    """The most decompressed bytes per compressed byte, counted beyond the first 16 MiB."""
    upload_piece_bytes: Count = 8 * 2**20
    """The most bytes of one piece of an upload."""
    upload_sessions: Count = 64
    """Unfinished uploads at once."""


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """The server's answer after its commit."""

    workspace: str
    epoch: str
    sequence: _Sequence
    identity: str
    bundle_id: str
    root: str
    created: Count
    updated: Count
    moved: Count
    deleted: Count
    content_bytes: Count
    """Bytes of content that arrived in this bundle and were stored."""
    applied_at: str
    tree_sequence: _Sequence | None
    """Which sequence the plain tree holds now; None while it moves."""
    duplicate: bool = False
    wanted: list[str] | None = None
    """Digests whose content the server asks for again; None unless the answer waited until the tree held the bundle."""


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What a tenant has on a server, and what it may have; a limit is None where there is none."""

    bytes: int
    """Of all content that it holds, of heads and of kept and pinned sequences, and of what is on its way."""
    bytes_limit: int | None = None
    files: int = 0
    """Of the heads of its workspaces."""
    files_limit: int | None = None


class WorkspaceState(msgspec.Struct, frozen=True, kw_only=True):
    """GET /api/v1/workspaces/{ws}; a workspace that was never written has sequence 0 and no owner."""

    workspace: str
    client_id: str
    epoch: str
    sequence: _Sequence
    root: str
    tree_path: str
    tree_sequence: _Sequence | None
    files: Count
    content_bytes: Count
    last_applied_at: str | None
    last_bundle_id: str | None
    lag: Count
    """Sequences that the plain tree is behind the head."""
    wanted: list[str] = []
    """Digests whose blobs were found damaged: the client sends their content again."""
    limits: Limits = Limits()
    features: list[str] = []
    """What the manifest of a bundle for this server may require (spec B-22)."""
    usage: Usage | None = None
    """Of the tenant, over all its workspaces; None where nothing bounds a tenant."""


class WorkspaceList(msgspec.Struct, frozen=True, kw_only=True):
    """GET /api/v1/workspaces."""

    workspaces: list[WorkspaceState]


class MissingRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST …/missing: which of these digests must be sent."""

    digests: list[str]


class MissingAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The digests to send; every other one is leased for `leased_seconds`."""

    missing: list[str]
    leased_seconds: Count


LARGE_BYTES = 1 << 20
"""What a server says of sizes, it says of contents from this size on; it may have some of any smaller one."""


class SizesRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST …/sizes: of which of these sizes is there some content, in bytes."""

    sizes: list[Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]]


class SizesAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The sizes of which the caller holds some content, or may."""

    held: list[int]


class KeptSequence(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence whose directory objects the server still holds."""

    epoch: str
    sequence: _Sequence
    identity: str
    root: str
    applied_at: str
    pinned: bool = False
    """Held until somebody takes the pin away, however many come after it."""


class KeptSequences(msgspec.Struct, frozen=True, kw_only=True):
    """GET …/sequences, oldest first."""

    sequences: list[KeptSequence]


class ContentRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST …/blobs and POST …/trees: which content to send, in this order."""

    digests: list[str]


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """GET /health."""

    status: str
    version: str
    disk_free_bytes: Count
    disk_total_bytes: Count
    workspaces: Count
    uptime_seconds: float


class UploadRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """POST /api/v1/uploads/initiate: a bundle or a plain file that will come in pieces.

    A bundle has workspace and identity, and its size may be told at the end; a file has all the others but those.
    """

    kind: Literal["file", "bundle"] = "file"
    workspace: str = ""
    identity: Annotated[str, _DIGEST] = ""
    filepath: Annotated[str, msgspec.Meta(max_length=4096)] = ""
    hostname: Annotated[str, msgspec.Meta(max_length=255)] = ""
    sha256: Annotated[str, _DIGEST] = ""
    blake3: Annotated[str, _DIGEST] = ""
    file_size: int | None = None
    chunk_size: int | None = None
    total_chunks: int | None = None
    resume: bool = False
    """Go on with an unfinished upload that was begun with the same words, if there is one."""


_PEM = msgspec.Meta(min_length=1, max_length=8192)
_MESSAGE = msgspec.Meta(pattern="^[0-9a-f]{66}$")


class PairingRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /api/v1/pairings/{number}: one try of a code."""

    message: Annotated[str, _MESSAGE]


class PairingAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The server's half of the exchange."""

    exchange: str
    message: Annotated[str, _MESSAGE]


class PairingConfirm(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /api/v1/pairings/{number}/confirm: the client knows the code, and saw this server's certificate."""

    exchange: str
    confirmation: Annotated[str, _DIGEST]
    public_key: Annotated[str, _PEM]
    """For which a certificate is asked."""


class Paired(msgspec.Struct, frozen=True, kw_only=True):
    """What a client gets; it believes none of it before the confirmation is right."""

    confirmation: Annotated[str, _DIGEST]
    token: str
    certificate: str | None = None
    """For the client's key; None where the operator's certificate has no CA here."""
    ca: str | None = None


class RotateRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /api/v1/token/rotate: what takes the place of the caller's secret and certificate."""

    digest: Annotated[str, _DIGEST]
    """BLAKE3 of the 32 bytes of the new secret."""
    public_key: Annotated[str, _PEM]


class Rotated(msgspec.Struct, frozen=True, kw_only=True):
    """The end of a rotation: the old secret and certificate are good for nothing."""

    certificate: str | None = None


class Unpaired(msgspec.Struct, frozen=True, kw_only=True):
    """The token of this id is revoked."""

    id: str


class StoredFile(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to the end of a file's upload."""

    file_id: str
    sha256: str
    blake3: str
    file_size: int
    status: str
    storage_location: str
    """Where the bytes can be had, on this server."""


class FileDeletion(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One file that its sender has no more."""

    filepath: str
    hostname: str
    sha256: Annotated[str, _DIGEST] = ""
    blake3: Annotated[str, _DIGEST] = ""
    deleted_at: str | None = None


class FileDeletions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /api/v1/files/deletions."""

    files: list[FileDeletion]


class DeletedFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file that is marked deleted."""

    sha256: str
    blake3: str
    filepath: str
    hostname: str
    status: str
    deleted_at: str


class DeletedFiles(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to POST /api/v1/files/deletions."""

    files: list[DeletedFile]


class UploadPartial(msgspec.Struct, frozen=True, kw_only=True):
    """The first bytes of a piece whose sender broke off."""

    chunk_num: Count
    received_bytes: Count


class UploadState(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to initiate, and GET /api/v1/uploads/{id}: what is there."""

    upload_id: str
    expires_at: str
    status: str
    """"initiated", or "completed" once there is an answer."""
    chunk_size: Annotated[int, msgspec.Meta(ge=1, le=2**31)]
    total_chunks: Count | None
    uploaded_chunks: Count
    received_bytes: Count
    present: list[tuple[Count, Count]]
    """The pieces that are there, as ranges: the first and the last of each."""
    partial: list[UploadPartial]


class UploadedChunk(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to one piece."""

    chunk_num: Count
    etag: str
    """BLAKE3 of the piece."""
    received_bytes: Count
    uploaded_chunks: Count
    total_chunks: Count | None


class UploadPart(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One piece as its sender knows it."""

    chunk_num: Annotated[int, msgspec.Meta(ge=0, le=2**31)]
    etag: str


class UploadParts(msgspec.Struct, frozen=True, kw_only=True):
    """GET /api/v1/uploads/{id}/chunks: every piece that is there, with its digest."""

    parts: list[UploadPart]


class UploadComplete(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """POST /api/v1/uploads/{id}/complete; the size, where it was not announced, and the pieces to compare."""

    parts: list[UploadPart] | None = None
    file_size: int | None = None
    total_chunks: int | None = None


class UploadAborted(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to DELETE /api/v1/uploads/{id}."""

    upload_id: str
    status: str
    chunks_uploaded: int
    chunks_deleted: int


class SeedError(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The error member of the seed route's answer."""

    code: str
    message: str
    expected_sequence: int | None = None


class SeedUploadAnswer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """POST /api/v1/delta/upload."""

    success: bool
    bundle_id: str | None = None
    sequence_number: int | None = None
    processed_operations: dict[str, int] | None = None
    processing_time_ms: int | None = None
    next_sequence: int | None = None
    error: SeedError | None = None


class SeedServerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The server_info member of the seed's status."""

    version: str
    max_bundle_size_mb: int
    supported_formats: list[str]


class SeedStatus(msgspec.Struct, frozen=True, kw_only=True):
    """GET /api/v1/delta/status."""

    success: bool
    workspace_path: str
    collection_name: str
    last_sequence: int
    last_upload: str | None
    pending_operations: int
    status: str
    last_bundle_id: str | None
    last_upload_status: str | None
    server_info: SeedServerInfo


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """application/problem+json; `facts` hold what the error's sentence names."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    facts: dict[str, str | int | bool | None | list[str]] = {}
