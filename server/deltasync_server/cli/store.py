"""What an operator does with a store: serve it, check it, collect, replay, adopt."""

from __future__ import annotations

import contextlib
import math
import os
import signal
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from deltasync import __version__
from deltasync.core.errors import Corrupt, NoSpace, UsageError
from deltasync.core.names import shown
from deltasync_server.cli.call import JOBS, ROUTES, STORE, Call, as_json, command, complain, seconds_of, tenant_of
from deltasync_server.tenants import DEFAULT_TEXT

if TYPE_CHECKING:
    from deltasync_server.adopt import Adopted
    from deltasync_server.tls import Tls

LEFT_OUT_CODE = 3
SERVER_PART = ("fastapi", "httptools", "prometheus_client", "python_multipart", "uvicorn")
"""What the extra `server` brings, and `serve` cannot do without."""


@command(*STORE, *ROUTES, *JOBS)
def serve(call: Call) -> int:
    """Serve a store over HTTP, until stopped.

    The first line says where, once requests are taken. SIGTERM or SIGINT stops it.
    """
    _require_server_part()
    from deltasync_server.http.serve import run

    def ready(url: str, tls: Tls | None, *, is_insecure: bool) -> None:
        facts = {"listening": url, "data": str(call.store.data), "version": __version__, "pid": os.getpid()}
        if tls is not None:
            ca = None if tls.ca is None else str(tls.ca)
            facts |= {"certificate_sha256": tls.certificate_sha256, "ca_sha256": tls.ca_sha256, "ca": ca}
        if is_insecure:
            facts["insecure"] = True
            complain(f"{url} IS NOT ENCRYPTED (--insecure): everybody on the way can read and change what is sent")
        print(as_json(facts) if call.is_json else "\n".join([f"listening on {url}", *_told(tls)]), flush=True)

    run(call.store, call.routes, ready)
    return 0


def _require_server_part() -> None:
    """Raise UsageError where only the client's part was installed, to which this program belongs."""
    if any(find_spec(each) is None for each in SERVER_PART):
        raise UsageError(
            "the server's part is not installed; in a clone of the repository `pipx install --force '.[server]'` "
            "installs it, or `pip install '.[server]'` in a venv"
        )


def _told(tls: Tls | None) -> list[str]:
    """Return what clients need to know this server by (spec H-93)."""
    if tls is None:
        return []
    ca = f"; CA SHA-256 {tls.ca_sha256}" if tls.ca_sha256 else ""
    where = f"; clients take the new CA from {shown(str(tls.ca))}" if tls.is_new else ""
    return [f"certificate SHA-256 {tls.certificate_sha256}{ca}{where}"]


@command("data", "idle_exit")
def attach(call: Call) -> int:
    """Make sure that a server runs, for a client over ssh.

    It listens on a unix socket in DATA/run and ends by itself, ten minutes after the last connection unless --idle-exit
    says otherwise. Once it takes requests, one line of JSON says where. DATA is ~/.local/share/deltasync unless --data
    names another. Clients with --to ssh://HOST call this; nobody else needs to.
    """
    _require_server_part()
    from deltasync_server.attach import attach as ensure

    print(as_json(ensure(call.store.data, config_file=call.file, idle_exit=call.routes.idle_exit)))
    return 0


@command(*STORE)
def replay(
    call: Call,
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A folder with bundle files.")],
    workspace: Annotated[
        str | None, typer.Option(metavar="NAME", help="Apply to this workspace, not to the one they name.")
    ] = None,
) -> int:
    """Apply bundle files in order, offline.

    What was applied before is skipped; a gap stops with exit 5.
    """
    from deltasync_server.replay import replay as apply

    done = apply(call.store, Path(folder), workspace=workspace, say=call.say)
    totals = {"applied": sum(each.applied for each in done), "skipped": sum(each.skipped for each in done)}
    call.answer({**totals, "workspaces": done}, [str(each) for each in done])
    return 0


@command("data")
def check(
    call: Call,
    repair: Annotated[bool, typer.Option("--repair", help="Repair what the journal or the cache can give.")] = False,
) -> int:
    """Verify every blob, row and tree.

    Exit 8 when something is wrong, exit 4 while a server uses the store.
    """
    from deltasync_server.check import check as verify
    from deltasync_server.opening import explained

    with explained(call.store.data):
        found = verify(call.store, repair=repair)
    lines = [f"{each.kind} {each.subject}: {each.problem}{' (repaired)' * each.is_repaired}" for each in found.findings]
    looked = f"{found.blobs} blobs, {found.objects} directory objects, {found.workspaces} workspaces: "
    total = "everything is as the rows say"
    if lines:
        mended = sum(each.is_repaired for each in found.findings)
        total = f"{len(lines)} finding{'s' * (len(lines) > 1)}"
        total += f", {mended or 'none'} mended" if repair else ""
    call.answer({"sound": found.is_sound, **msgspec.to_builtins(found)}, [*map(shown, lines), looked + total])
    return 0 if found.is_sound else Corrupt.exit_code


@command(*STORE)
def status(call: Call) -> int:
    """Say what the store holds, beside a running server or without one.

    The bytes by what they are for, the quota, the disk and its reserves, what each tenant holds, and where each
    workspace stands. Limits are those of this call's settings: give the server's own, or name its --config.
    """
    from deltasync_server.opening import explained
    from deltasync_server.overview import lines, overview

    with explained(call.store.data):
        found = overview(call.store)
    call.answer(found, lines(found))
    return 0


@command(*STORE)
def collect(
    call: Call,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    release_adopted: Annotated[
        bool, typer.Option("--release-adopted", help="Do not wait until the time of adopted content is over.")
    ] = False,
) -> int:
    """Remove what nothing needs any more.

    That is what no head, kept sequence, lease or journal names, and what was adopted longer ago than its --keep.
    Exit 4 while a server uses the store.
    """
    from deltasync_server.opening import open_store

    with open_store(call.store, create=False) as store:
        found = store.collect(dry_run=dry_run, now=math.inf if release_adopted else None)
        with contextlib.suppress(NoSpace):  # a tree that has no room comes forward later
            store.catch_up()  # opening distrusts trees that are not durable yet: a check would find fault with them
    would = "would remove" if dry_run else "removed"
    adopted = f", {found.kept_adopted} of them only because they were adopted" if found.kept_adopted else ""
    uploads = f", {found.uploads} unfinished uploads ({found.upload_bytes} bytes)" if found.uploads else ""
    call.answer(
        found,
        [
            f"{would} {found.blobs} blobs ({found.blob_bytes} bytes), {found.objects} directory objects, "
            f"{found.strays} stray files{uploads}; {found.kept_blobs} blobs stay{adopted}"
        ],
    )
    return 0


@command(*STORE)
def adopt(
    call: Call,
    folders: Annotated[list[str], typer.Argument(metavar="DIR", help="Folders on this host.")],
    trust: Annotated[
        bool, typer.Option("--trust", help="Share the files instead of copying them; read above what that means.")
    ] = False,
    no_copy: Annotated[
        bool, typer.Option("--no-copy", help="With --trust: leave out what cannot be shared, instead of copying it.")
    ] = False,
    keep: Annotated[
        str,
        typer.Option(
            "--keep", metavar="TIME", help="How long collect spares what nothing names yet. (30d)", show_default=False
        ),
    ] = "30d",
    tenant: Annotated[
        str, typer.Option("--tenant", metavar="NAME", help="Whose first push the content spares.")
    ] = DEFAULT_TEXT,
) -> int:
    """Take files that are on this host already into the cache.

    The first push of a machine that has the same files then sends none of their content. Nothing in DIR changes;
    links are not followed. Content is shared by reflink where the file system can, else copied. It runs while no
    server does: stop the server, adopt, start it. A run that was broken off is simply repeated. Every user of this
    host can read what lies in the cache, and the tenant can ask for it by its digest: adopt no secrets.

    With --trust each blob is a hard link of its file. The file then becomes read-only (0444, or 0555 if executable),
    also under its own name, and loses other mode bits; its owner and time stay, and trees link to it as well. Whoever
    writes into any of these names changes them all: the server notices another size or time before it uses the blob,
    and a change that keeps both is found by `check` alone. Use it for files that nobody edits in place, such as
    downloaded models.

    Exit 3 when something had to be left out, exit 4 while a server uses the store.
    """
    from deltasync_server.adopt import Adoption, AdoptOptions
    from deltasync_server.opening import open_store

    if no_copy and not trust:
        raise UsageError("--no-copy goes with --trust: without it every file is copied")
    options = AdoptOptions(
        trust=trust, may_copy=not no_copy, keep_seconds=seconds_of("--keep", keep), tenant=tenant_of(tenant)
    )
    with open_store(call.store) as store:
        store.catch_up()
        with _stop_asked() as is_stopping:
            found = Adoption(store, options, say=call.say, should_stop=is_stopping).run(
                [Path(each) for each in folders]
            )
        store.catch_up()  # trees that lacked some of the content get it now
    _say_adopted(call, found)
    return LEFT_OUT_CODE if found.left_out_count else 0


def _say_adopted(call: Call, found: Adopted) -> None:
    for each in found.left_out:
        complain(f"{each.path}: {each.reason}")
    if found.left_out_count > len(found.left_out):
        complain(f"and {found.left_out_count - len(found.left_out)} more were left out")
    linked = f", {found.linked} of them linked" if found.linked else ""
    call.answer(
        found,
        [
            f"{found.files} files ({found.bytes} bytes) read in {found.seconds:.1f} s: {found.stored} contents "
            f"({found.stored_bytes} bytes) stored{linked}, {found.present} were there, {found.left_out_count} left out"
        ],
    )


@contextlib.contextmanager
def _stop_asked() -> Iterator[Callable[[], bool]]:
    """Let SIGINT and SIGTERM ask for an end instead of breaking in between two steps that belong together."""
    asked: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: asked.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
