"""Options: one table of settings becomes the options of every command, their help and their variables."""

from __future__ import annotations

import contextlib
import inspect
import keyword
import os
import stat
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from msgspec import structs
from typer.core import TyperCommand, TyperGroup

from deltasync import config
from deltasync.cli.output import Output, complain
from deltasync.client import address
from deltasync.core.errors import NotFound, UsageError
from deltasync.core.names import RESERVED, shown

if TYPE_CHECKING:
    from deltasync.client.observation import ScanOptions
    from deltasync.client.receiver import Transport
    from deltasync.client.state import State

COMMON = ("json", "quiet", "verbose")
PLACE = ("to", "workspace", "state-dir")
RULES = ("exclude", "include", "gitignore")
DELETING = ("delete-excluded", "no-delete", "allow-mass-delete")
WIRE = ("jobs", "bwlimit", "timeout", "max-retries", "proxy", "insecure", "ssh", "ssh-server", "ssh-data")
OUTBOX = ("keep-sent", "outbox-limit")


_PLACES = {"from": "source", "on": "on", "to": "to"}
"""Which setting, by its option, names a server of a command's, and its field; no other is looked up."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a command: its flags, and where its words go."""

    flags: dict[str, config.Raw | None]
    out: Output

    def given(self, root: Path | None = None) -> config.Settings:
        """Return the settings as they were given: a host's name may be one that nobody knows yet."""
        return config.load(self.flags, os.environ, config.files_of(root, os.environ))

    def settings(self, root: Path | None = None) -> config.Settings:
        """Return the settings that hold for a workspace, or outside of any; a host's name has become its address."""
        found = self.given(root)
        named = {field: getattr(found, field) for key, field in _PLACES.items() if key in self.flags}
        found = structs.replace(
            found,
            token_for=address.known(found.token_for, os.environ),  # another one than the command's need not be known
            **{field: text and address.resolved(text, os.environ) for field, text in named.items()},
        )
        return _parted(found, next((field for key, field in _PLACES.items() if key in self.flags), "to"))


def _parted(settings: config.Settings, field: str) -> config.Settings:
    """Take the workspace's name out of an address for ssh, and the data folder into it (spec H-131)."""
    url: str | None = getattr(settings, field)
    if url is None or not url.startswith("ssh:"):
        return settings
    place, named = address.parse_ssh(url)
    if named is not None and settings.workspace not in (None, named):
        raise UsageError(
            f"{shown(url)} names the workspace {shown(named)}, and --workspace (or its variable, or a file) "
            f"{shown(settings.workspace or '')}; give one of them"
        )
    if settings.ssh_data and not place.data:
        place = place.at(settings.ssh_data)
    return structs.replace(settings, workspace=named or settings.workspace, **{field: str(place)})


class _AsGiven:
    """Takes a value as the parser split it: the settings parse text themselves, and typer's own way would import
    pydantic, which costs more than most commands."""

    def coerce(self, value: object, **_: object) -> object:
        return value


def _as_given(parameters: list[Any]) -> list[Any]:
    for each in parameters:
        each._runtime_param = _AsGiven()
    return parameters


class PlainCommand(TyperCommand):
    """A command whose values are taken as they were given."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters, --help among them."""
        return _as_given(super().get_params(ctx))


class PlainGroup(TyperGroup):
    """A group of such commands."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters, --help among them."""
        return _as_given(super().get_params(ctx))


def new_app(cls: type[PlainGroup] = PlainGroup) -> typer.Typer:
    """Return an app without typer's own colours, tracebacks and installation of completions."""
    return typer.Typer(
        cls=cls,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


Command = Callable[..., int]
"""Takes the call first, then its own arguments by name, and returns the exit code."""


def command(
    app: typer.Typer,
    *keys: str,
    name: str | None = None,
    helps: Mapping[str, str] | None = None,
    stops_at_word: bool = False,
) -> Callable[[Command], Command]:
    """Register a command with these settings as options, and --json, -q and -v; it receives them as a `Call`.

    helps: what an option means here, by key, where that is not what it means elsewhere.
    stops_at_word: what follows the first word that is no option are words, whatever they look like.
    """
    context = {"allow_interspersed_args": not stops_at_word}

    def decorate(function: Command) -> Command:
        settings_here = {key: config.SETTINGS[key] for key in (*keys, *COMMON)}
        settings_here |= {key: replace(config.SETTINGS[key], help=text) for key, text in (helps or {}).items()}
        fields = {_field(key): setting for key, setting in settings_here.items()}

        def run(**values: object) -> int:
            flags = {setting.key: _given(values.pop(field)) for field, setting in fields.items()}
            settings = config.load(flags, os.environ)
            out = Output(json=settings.json, quiet=settings.quiet, verbose=settings.verbose)
            for name, near in config.mistyped(os.environ).items():
                out.note(f"{shown(name)} is no setting and has no effect; did you mean {near}?")
            return function(Call(flags, out), **values)

        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [
                *(each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own),
                *(_parameter(field, setting) for field, setting in fields.items()),
            ]
        )
        run.__annotations__ = {}
        run.__name__, run.__doc__ = function.__name__, function.__doc__
        app.command(name, cls=PlainCommand, context_settings=context)(run)
        return function

    return decorate


def _field(key: str) -> str:
    """Return the name of the parameter that a setting becomes."""
    name = key.replace("-", "_")
    return f"{name}_" if keyword.iskeyword(name) else name


def _given(value: object) -> config.Raw | None:
    """Return a flag's value, or None when it was not given; a switch that is off was not."""
    return value if isinstance(value, str | list) or value is True else None


def _parameter(name: str, setting: config.Setting) -> inspect.Parameter:
    names = [f"--{setting.key}", *([f"-{setting.short}"] if setting.short else [])]
    text = f"{setting.help} [{setting.variable}]"
    kind: object = bool
    default: object = False
    metavar = None
    if setting.kind is not config.SWITCH:
        kind, default, metavar = (list[str] if setting.kind.is_list else str), None, setting.kind.metavar
    option = typer.Option(*names, help=text, metavar=metavar, show_default=False)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


def place_of(path: Path, call: Call) -> tuple[Path, str]:
    """Return the workspace's folder that holds a path, and the path inside of it, '' for the folder itself.

    Of workspaces inside each other it is the inner one, which the outer one leaves out. No link is followed at the
    path's end.
    """
    absolute = Path(os.path.normpath(path.absolute()))
    state_dir = call.settings().state_dir
    itself = [absolute] if _is_real_folder(absolute) else []
    for root in (*itself, *absolute.parents):
        if _holds_state(root) or (state_dir and _is_root_of(root, Path(state_dir))):
            inside = absolute.relative_to(root).as_posix()
            return root, "" if inside == "." else inside
    with contextlib.suppress(PermissionError):
        if (absolute / RESERVED).is_dir():
            return absolute, ""
    raise NotFound(f"{shown(str(path))} lies in no workspace; run `deltasync push` or `deltasync watch` on one first")


def _holds_state(root: Path) -> bool:
    """Tell whether a folder is a workspace; one that cannot be looked into may lie in another, which says so."""
    try:
        return (root / RESERVED / "state.db").is_file()
    except PermissionError:
        return False


def rule_origin(call: Call, root: Path, rule: str) -> str:
    """Say where a rule that stands in no ignore file is from: a flag, a variable or a configuration file."""
    key = "include" if rule.startswith("!") and rule[1:] in call.settings(root).include else "exclude"
    pattern = rule[1:] if key == "include" else rule
    variable = config.SETTINGS[key].variable
    files = {f"in {shown(str(each[0]))}": [each] for each in reversed(config.files_of(root, os.environ))}
    sources: dict[str, config.Settings] = {
        "on the command line": config.load({key: call.flags[key]}, {}),
        f"in {variable}": config.load({}, {variable: os.environ.get(variable, "")}),
        **{where: config.load({}, {}, each) for where, each in files.items()},
    }
    for where, found in sources.items():
        if pattern in (found.include if key == "include" else found.exclude):
            return where
    return "in the settings"


def _is_real_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def _is_root_of(root: Path, state_dir: Path) -> bool:
    from deltasync.client.state import State

    with State.open(root, state_dir=state_dir, read_only=True) as state:
        return state.get_meta("root") == root.resolve().as_uri()


def scan_options(state: State, settings: config.Settings) -> ScanOptions:
    """Return how to observe a workspace, as far as the settings say."""
    from deltasync.client.ignore import IgnoreRules
    from deltasync.client.observation import ScanOptions

    return ScanOptions(
        ignore=IgnoreRules(state.root, settings.exclude, settings.include, settings.gitignore),
        delete_excluded=settings.delete_excluded,
        no_delete=settings.no_delete,
        rehash=settings.rehash,
        settle_seconds=settings.settle_seconds,
        chunk_from_bytes=settings.chunk_from_bytes,
        allow_emptied=settings.allow_mass_delete,
    )


def transport(settings: config.Settings, url: str | None, *, max_retries: int | None = None) -> Transport | None:
    """Return the way to a receiver, or None where none is known; nothing is asked of it yet."""
    if url is None:
        return None
    from deltasync.client.ssh import SshOptions
    from deltasync.client.transport import open_transport

    note_exposure(settings, url)
    return open_transport(
        url,
        bandwidth=settings.bandwidth_bytes or None,
        timeout=settings.timeout_seconds,
        max_retries=settings.max_retries if max_retries is None else max_retries,
        jobs=settings.jobs,
        proxies=settings.proxy,
        insecure=settings.insecure,
        token_for=settings.token_for,
        ssh=SshOptions(
            settings.ssh,
            settings.ssh_server,
            may_ask=sys.stdin is not None and sys.stdin.isatty(),
            connect_seconds=settings.timeout_seconds,
        ),
    )


def note_exposure(settings: config.Settings, url: str | None) -> None:
    """Say it where what is sent can be read on its way."""
    if url is not None and settings.insecure and address.is_exposed(url) and not settings.quiet:
        complain(f"the connection to {url} is not encrypted: everybody on the way can read and change it")
