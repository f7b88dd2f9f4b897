"""What every command has: its options, its settings, and how its words are printed."""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from deltasync.core.errors import UsageError
from deltasync.core.names import NameRefused, shown, without_tokens
from deltasync_server import config
from deltasync_server.tenants import Tenant, parse_tenant

PROGRAM = "deltasync-server"
UMASK = 0o022
"""Blobs and trees are for every program on the host to read; only this one writes them."""

_TEXT, _COUNT, _SWITCH, _CHOICE, _TEXTS = str | None, int | None, bool, bool | None, list[str] | None
OPTIONS: dict[str, tuple[Any, Any, str, str]] = {
    "data": (_TEXT, "--data", "DIR", "Where the store lies. (~/.local/share/deltasync)"),
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
    "run_without_token": (_SWITCH, "--run-without-token", "", "Run jobs also for callers who need no token."),
    "no_run": (_SWITCH, "--no-run", "", "Run no jobs."),
    "slots": (_COUNT, "--slots", "N", "How many jobs run at once. (4)"),
    "job_user": (_TEXT, "--job-user", "NAME", "Run jobs as this user; needs root."),
    "trust_jobs": (_SWITCH, "--trust-jobs", "", "Jobs never write into their inputs: these may be hard links."),
    "sandbox": (_SWITCH, "--sandbox", "", "Shut every job in; needs bubblewrap (bwrap)."),
    "sessions_dir": (_TEXT, "--sessions-dir", "DIR", "Where jobs run. (DATA/sessions)"),
    "job_file_bytes": (_TEXT, "--job-file-bytes", "SIZE", "How large one file of a job may be. (50 GB)"),
    "job_session_bytes": (_TEXT, "--job-session-bytes", "SIZE", "What all inputs of a job may have. (100 GB)"),
    "job_sessions": (_COUNT, "--job-sessions", "N", "How many sessions of jobs there may be. (10)"),
    "job_seconds": (_COUNT, "--job-seconds", "SECONDS", "How long a job may run. (86400)"),
    "job_log_bytes": (_TEXT, "--job-log-bytes", "SIZE", "What is kept of a job's output. (64 MiB)"),
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
JOBS = (
    "run_without_token",
    "no_run",
    "slots",
    "job_user",
    "trust_jobs",
    "sandbox",
    "sessions_dir",
    "job_file_bytes",
    "job_session_bytes",
    "job_sessions",
    "job_seconds",
    "job_log_bytes",
)
COMMON = ("config", "json", "quiet", "verbose")

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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


def command(*names: str, group: typer.Typer = app) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Register a command that has these options and the common ones, and receives them as a `Call`.

    The store lies in the user's own data folder when nothing says where.
    """

    def decorate(function: Callable[..., int]) -> Callable[..., int]:
        def run(**values: Any) -> int:
            given = {name: values.pop(name) for name in (*names, *COMMON)}
            is_unset = {name: OPTIONS[name][0] in (_SWITCH, _TEXTS) and not value for name, value in given.items()}
            flags = {name: None if is_unset[name] else given[name] for name in given}
            return function(_call(flags, _usual_data()), **values)

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
    level = logging.ERROR if flags["quiet"] or is_set("QUIET") else logging.WARNING
    if flags["verbose"] or flags.get("access_log") or is_set("VERBOSE"):
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
        is_json=bool(flags["json"]) or is_set("JSON"),
        is_quiet=bool(flags["quiet"]) or is_set("QUIET"),
    )


class _Formatter(logging.Formatter):
    """Leaves tokens out, also those that a client has put where none belongs."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record with its traceback."""
        return without_tokens(super().format(record))


def is_set(name: str) -> bool:
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


def complain(sentence: str) -> None:
    """Print one line on stderr."""
    print(f"{PROGRAM}: {shown(sentence)}", file=sys.stderr, flush=True)


def as_json(content: object) -> str:
    """Return content as one line of JSON."""
    return msgspec.json.encode(content).decode()


def seconds_of(name: str, text: str) -> float:
    """Return the seconds that an option names; raises UsageError."""
    from deltasync.config import parse_seconds

    try:
        return parse_seconds(text)
    except ValueError as error:
        raise UsageError(f"{name} takes a time such as 12h or 30d, not {shown(text)}") from error


def tenant_of(text: str) -> Tenant:
    """Return the tenant that --tenant names; raises UsageError."""
    try:
        return parse_tenant(text)
    except NameRefused as error:
        raise UsageError(f"--tenant {shown(text)}: {error}") from error
