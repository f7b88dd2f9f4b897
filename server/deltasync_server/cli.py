"""The `deltasync-server` program (spec H-50 to H-59): its commands and options; the only place that exits."""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from deltasync import __version__
from deltasync.core.errors import Corrupt, DeltasyncError, NoSpace, UsageError
from deltasync.core.names import NameRefused, shown, without_tokens
from deltasync_server import config
from deltasync_server.tenants import DEFAULT_TEXT, Tenant, parse_tenant, tenant_text

if TYPE_CHECKING:
    from deltasync_server.access import Access, Scope, TokenRow
    from deltasync_server.adopt import Adopted
    from deltasync_server.tls import Tls

PROGRAM = "deltasync-server"
LEFT_OUT_CODE = 3
UMASK = 0o022
"""Blobs and trees are for every program on the host to read; only this one writes them."""

# typer exports only this leaf of the parser's errors; its bases are "bad usage" and "any error of the parser".
_PARSER_ERROR: type[Exception] = typer.BadParameter.__mro__[2]

_TEXT, _COUNT, _SWITCH, _CHOICE, _TEXTS = str | None, int | None, bool, bool | None, list[str] | None
OPTIONS: dict[str, tuple[Any, Any, str, str]] = {
    "data": (_TEXT, "--data", "DIR", "Where the store lies."),
    "listen": (_TEXT, "--listen", "ADDRESS", "HOST:PORT, [IPV6]:PORT or unix:/path. (127.0.0.1:8080)"),
    "insecure": (_SWITCH, "--insecure", "", "Answer without TLS where other machines reach it."),
    "tls": (_CHOICE, "--tls/--no-tls", "", "Use TLS; by default where other machines reach it."),
    "tls_cert": (_TEXT, "--tls-cert", "FILE", "Your certificate, with its chain; else one is made, with a CA."),
    "tls_key": (_TEXT, "--tls-key", "FILE", "Its key."),
    "tls_name": (_TEXTS, "--tls-name", "NAME", "A name or address for the certificate that is made; repeatable."),
    "require_token": (
        _CHOICE,
        "--require-token/--no-require-token",
        "",
        "Refuse requests without a token. (where other machines reach it)",
    ),
    "seed_routes": (_CHOICE, "--seed-routes/--no-seed-routes", "", "Serve delta/upload and delta/status."),
    "access_log": (_SWITCH, "--access-log", "", "Log every request."),
    "idle_exit": (_COUNT, "--idle-exit", "SECONDS", "End after this long without a connection, 0 for never."),
    "link": (_TEXT, "--link", "MODE", "How tree files share content: auto, reflink, hardlink or copy. (auto)"),
    "keep_sequences": (_COUNT, "--keep-sequences", "N", "How many sequences' trees are kept. (10)"),
    "keep_bundles": (_SWITCH, "--keep-bundles", "", "Keep the received bundle files."),
    "quota": (_TEXT, "--quota", "SIZE", "What the store may take in all, such as 500G."),
    "tenant_quota": (_TEXT, "--tenant-quota", "SIZE", "What each tenant may hold."),
    "config": (_TEXT, "--config", "FILE", "Settings in TOML. (server.toml in the user's configuration folder)"),
    "json": (_SWITCH, "--json", "", "Print one JSON object and nothing else."),
    "quiet": (_SWITCH, "-q,--quiet", "", "Say nothing but errors."),
    "verbose": (_SWITCH, "-v,--verbose", "", "Log what happens, and the traceback of what fails."),
}
"""Every option: its type, its words, its value's name, its help."""
STORE = ("data", "link", "keep_sequences", "keep_bundles", "quota", "tenant_quota")
ROUTES = (
    "listen",
    "tls",
    "tls_cert",
    "tls_key",
    "tls_name",
    "insecure",
    "require_token",
    "seed_routes",
    "access_log",
    "idle_exit",
)
COMMON = ("config", "json", "quiet", "verbose")

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def describe(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    """Take sealed bundles, keep each workspace as a plain folder, and prove it equal to its source.

    A setting is a flag, else the variable DELTASYNC_SERVER_ and its name, else a key of server.toml. Exit codes:
    0 done, 1 error, 2 usage, 3 done but something was left out, 4 busy, 5 sequence or root mismatch, 6 guard or disk
    full, 8 integrity, 130 stopped.
    """


tokens = typer.Typer(help="Make, list and end the tokens that requests come with.", no_args_is_help=True)
app.add_typer(tokens, name="token")


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a command: its settings, and how its words are printed."""

    store: config.StoreConfig
    routes: config.ServeConfig
    file: Path | None
    """The configuration file that was read."""
    is_json: bool
    is_quiet: bool

    def answer(self, content: object, lines: Sequence[str]) -> None:
        """Print what the command found: one JSON object, or lines for people."""
        if self.is_json:
            print(as_json(content))
        elif not self.is_quiet:
            print(*lines, sep="\n")

    def say(self, line: str) -> None:
        """Print a line for people while the command goes on."""
        if not (self.is_json or self.is_quiet):
            print(line, flush=True)


def command(
    *names: str, group: typer.Typer = app, has_usual_data: bool = False
) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Register a command that has these options and the common ones, and receives them as a `Call`.

    has_usual_data: the store lies in the user's own data folder when nothing says where.
    """

    def decorate(function: Callable[..., int]) -> Callable[..., int]:
        def run(**values: Any) -> int:
            given = {name: values.pop(name) for name in (*names, *COMMON)}
            is_unset = {name: OPTIONS[name][0] in (_SWITCH, _TEXTS) and not value for name, value in given.items()}
            flags = {name: None if is_unset[name] else given[name] for name in given}
            return function(_call(flags, _usual_data() if has_usual_data else {}), **values)

        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        options = [_parameter(name) for name in (*names, *COMMON)]
        run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [*(each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own), *options]
        )
        run.__annotations__ = {}
        run.__name__, run.__doc__ = function.__name__, function.__doc__
        group.command()(run)
        return function

    return decorate


def _parameter(name: str) -> inspect.Parameter:
    kind, words, metavar, text = OPTIONS[name]
    text += f" [{config.ENVIRONMENT_PREFIX}{name.upper()}]"
    option = typer.Option(*words.split(","), metavar=metavar or None, help=text, show_default=False)
    default = False if kind is _SWITCH else None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


def _usual_data() -> dict[str, Any]:
    import platformdirs

    return {"data": platformdirs.user_data_path("deltasync", appauthor=False)}


def _call(flags: dict[str, Any], usual: Mapping[str, Any]) -> Call:
    level = logging.ERROR if flags["quiet"] or _is_set("QUIET") else logging.WARNING
    if flags["verbose"] or flags.get("access_log") or _is_set("VERBOSE"):
        level = logging.INFO
    logging.basicConfig(level=level, stream=sys.stderr)
    for each in logging.getLogger().handlers:
        each.setFormatter(_Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    os.umask(UMASK)
    path = _config_path(flags["config"])
    file = {**usual, **config.read_file(path)}
    return Call(
        config.choose(config.StoreConfig, file, os.environ, flags),
        config.choose(config.ServeConfig, file, os.environ, flags),
        file=path,
        is_json=bool(flags["json"]) or _is_set("JSON"),
        is_quiet=bool(flags["quiet"]) or _is_set("QUIET"),
    )


class _Formatter(logging.Formatter):
    """Leaves tokens out, also those that a client has put where none belongs."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record with its traceback."""
        return without_tokens(super().format(record))


def _is_set(name: str) -> bool:
    """Tell whether a switch is on by its variable."""
    return os.environ.get(config.ENVIRONMENT_PREFIX + name, "").lower() in ("1", "true", "yes", "on")


def _config_path(flag: str | None) -> Path | None:
    """Return the file to read: the one that is named must be there, the usual one may be."""
    named = flag or os.environ.get(f"{config.ENVIRONMENT_PREFIX}CONFIG")
    if named:
        return Path(named)
    import platformdirs

    usual = platformdirs.user_config_path("deltasync", appauthor=False) / "server.toml"
    return usual if usual.exists() else None


@command(*STORE, *ROUTES, has_usual_data=True)
def serve(call: Call) -> int:
    """Serve a store over HTTP, until stopped.

    The first line says where, once requests are taken. SIGTERM or SIGINT stops it.
    """
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


def _told(tls: Tls | None) -> list[str]:
    """Return what clients need to know this server by (spec H-93)."""
    if tls is None:
        return []
    ca = f"; CA SHA-256 {tls.ca_sha256}" if tls.ca_sha256 else ""
    where = f"; clients take the new CA from {shown(str(tls.ca))}" if tls.is_new else ""
    return [f"certificate SHA-256 {tls.certificate_sha256}{ca}{where}"]


@command("data", "idle_exit", has_usual_data=True)
def attach(call: Call) -> int:
    """Make sure that a server runs, for a client over ssh.

    It listens on a unix socket in DATA/run and ends by itself, ten minutes after the last connection unless --idle-exit
    says otherwise. Once it takes requests, one line of JSON says where. DATA is ~/.local/share/deltasync unless --data
    names another. Clients with --to ssh://HOST call this; nobody else needs to.
    """
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
    total = f"{len(lines)} findings" if lines else "everything is as the rows say"
    call.answer({"sound": found.is_sound, **msgspec.to_builtins(found)}, [*map(shown, lines), looked + total])
    return 0 if found.is_sound else Corrupt.exit_code


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
        trust=trust, may_copy=not no_copy, keep_seconds=_seconds("--keep", keep), tenant=_tenant(tenant)
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


_TENANT = Annotated[str, typer.Option("--tenant", metavar="NAME", help="Whose it is: each sees only its own.")]
_SCOPE = Annotated[str, typer.Option("--scope", metavar="NAMES", help="What it is good for: push, read, run, admin.")]
_LABEL = Annotated[str, typer.Option("--label", metavar="TEXT", help="What you call it.")]


@command("data", has_usual_data=True)
def pair(
    call: Call,
    tenant: _TENANT = DEFAULT_TEXT,
    scope: _SCOPE = "push",
    label: _LABEL = "",
    lasts: Annotated[str, typer.Option("--for", metavar="TIME", help="How long the code is good. (10m)")] = "10m",
) -> int:
    """Print a one-time code that lets one client in.

    The client runs `deltasync host add NAME https://ADDRESS:PORT CODE`, and both sides prove to each other that they
    know the code. It is good for five tries and for one client. It may be done while the server runs.
    """
    seconds = _seconds("--for", lasts)
    with _access(call) as access:
        code = access.open_pairing(_tenant(tenant), _scopes(scope), label, seconds)
        _note(call, "pair", pairing=code.number, tenant=tenant, scopes=scope)
    command = f"deltasync host add NAME https://ADDRESS:PORT {code}"
    lines = [str(code), f"good for {lasts}, once; on the other machine run `{command}`"]
    call.answer({"code": str(code), "seconds": seconds}, lines)
    return 0


@command("data", group=tokens, has_usual_data=True)
def create(
    call: Call,
    tenant: _TENANT = DEFAULT_TEXT,
    scope: _SCOPE = "push",
    label: _LABEL = "",
    expires: Annotated[
        str | None, typer.Option("--expires", metavar="TIME", help="When it ends, such as 12h or 30d. (never)")
    ] = None,
) -> int:
    """Make a token and print it, this once; the server keeps only its digest.

    Whoever has it may do what its scopes say: push sends and reads, read only reads. It may be done while the server
    runs.
    """
    lasts = None if expires is None else int(time.time() + _seconds("--expires", expires))
    with _access(call) as access:
        row, text = access.create(_tenant(tenant), _scopes(scope), label, lasts)
        _note(call, "token create", token=row.id, tenant=tenant, scopes=scope)
    call.answer({"token": text, **_public(row)}, [text])
    return 0


@command("data", group=tokens, has_usual_data=True)
def ls(call: Call) -> int:
    """List every token: its id, tenant, scopes, label and whether it is good for anything; never the token itself."""
    with _access(call, create=False) as access:
        told = [_public(row) for row in access.tokens()]
    call.answer({"tokens": told}, ["  ".join(str(value) for value in each.values() if value) for each in told])
    return 0


@command("data", group=tokens, has_usual_data=True)
def revoke(call: Call, token: Annotated[str, typer.Argument(metavar="ID", help="As `token ls` shows it.")]) -> int:
    """End a token at once; an upload that it began is refused at its end."""
    with _access(call, create=False) as access:
        row = access.revoke(token)
        _note(call, "token revoke", token=row.id)
    call.answer(_public(row), [f"{row.id} is revoked"])
    return 0


def _access(call: Call, *, create: bool = True) -> Access:
    from deltasync_server.access import Access
    from deltasync_server.opening import require_data

    require_data(call.store.data, create=create)
    return Access(call.store.data)


def _note(call: Call, what: str, **facts: object) -> None:
    """Write down what a command of the operator did about who may do what."""
    from deltasync_server.audit import Audit

    with Audit(call.store.data) as audit:
        audit.note(what, user=os.getuid(), **facts)


def _tenant(text: str) -> Tenant:
    try:
        return parse_tenant(text)
    except NameRefused as error:
        raise UsageError(f"--tenant {shown(text)}: {error}") from error


def _scopes(text: str) -> list[Scope]:
    from deltasync_server.access import Scope

    try:
        return [Scope(word) for word in text.replace(",", " ").split()]
    except ValueError as error:
        raise UsageError(f"--scope takes some of {', '.join(Scope)}, not {shown(text)}") from error


def _public(row: TokenRow) -> dict[str, object]:
    """Return what may be shown of a token."""

    def moment(seconds: int | None) -> str | None:
        return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")

    return {
        "id": row.id,
        "state": row.why_not(time.time()) or "good",
        "tenant": tenant_text(row.tenant),
        "scopes": row.scopes,
        "label": shown(row.label),
        "created_at": moment(row.created_at),
        "expires_at": moment(row.expires_at),
        "revoked_at": moment(row.revoked_at),
    }


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


def _seconds(name: str, text: str) -> float:
    from deltasync.config import parse_seconds

    try:
        return parse_seconds(text)
    except ValueError as error:
        raise UsageError(f"{name} takes a time such as 12h or 30d, not {shown(text)}") from error


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


def main() -> None:
    """Run the program and exit."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; every failure is one sentence on stderr."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()
        return code
    except DeltasyncError as error:
        return _fail(error, arguments)
    except typer.Exit as stop:
        return stop.exit_code
    except BrokenPipeError:
        with contextlib.suppress(OSError):  # the reader went away: not even the last flush may complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KeyboardInterrupt, typer.Abort):
        complain("stopped")
        return 130
    except _PARSER_ERROR as error:
        return _fail(_usage(error), arguments)
    except Exception as error:  # noqa: BLE001 - the last line of defence reports with the traceback
        return _fail(_unexpected(error), arguments)


def _dispatch(arguments: Sequence[str]) -> int:
    if list(arguments) == ["--version"]:
        print(f"{PROGRAM} {__version__}")
        return 0
    group = typer.main.get_command(app)
    with group.make_context(PROGRAM, list(arguments) or ["--help"]) as context:
        return int(group.invoke(context) or 0)


def _fail(error: DeltasyncError, arguments: Sequence[str]) -> int:
    if "--json" in arguments or _is_set("JSON"):
        print(as_json({"error": {**error.facts, "code": error.code, "detail": error.sentence}}), flush=True)
    complain(error.sentence)
    return error.exit_code


def complain(sentence: str) -> None:
    """Print one line on stderr."""
    print(f"{PROGRAM}: {shown(sentence)}", file=sys.stderr, flush=True)


def as_json(content: object) -> str:
    """Return content as one line of JSON."""
    return msgspec.json.encode(content).decode()


def _usage(error: Exception) -> DeltasyncError:
    message = " ".join(getattr(error, "format_message", error.__str__)().split()).rstrip(".")
    where = getattr(getattr(error, "ctx", None), "command_path", PROGRAM)
    return UsageError(f"{message[:1].lower()}{message[1:]} (see {where} --help)")


def _unexpected(error: Exception) -> DeltasyncError:
    """Say in one sentence what nobody foresaw; the traceback goes to the log."""
    from deltasync.disk import refusal

    if isinstance(error, OSError) and (known := refusal(error)):
        logging.getLogger(PROGRAM).info("refused", exc_info=error)
        return known
    logging.getLogger(PROGRAM).error("unexpected", exc_info=error)
    at = f" at {error.filename}" if isinstance(error, OSError) and error.filename else ""
    return DeltasyncError(f"unexpected {type(error).__name__}{at}: {error}; the traceback stands above")
