"""Settings: what a user can set, read from file, environment and flags into one frozen value."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import msgspec

from deltasync.core.errors import UsageError
from deltasync.core.names import NameRefused, parse_workspace, shown

PREFIX = "DELTASYNC_"
HOME = "DELTASYNC_HOME"
JOBS_MAX = 64
CHUNK_FROM_MIN = 128 << 10
LEVEL_MAX = 19
_OTHERS = ("SERVER_", "HOME", "CLIENT_ID_FILE", "TOKEN")
"""Variables that are no settings of the client, without the prefix."""
WORKSPACE_FILE = Path(".deltasync", "config.toml")

Raw = str | int | float | bool | Sequence[str]
"""A value before it is parsed: text from a flag or the environment, anything that TOML offers from a file."""

Value = str | int | float | bool | tuple[str, ...] | None


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """Everything that a user can set; the names in files, flags and the environment are those of `SETTINGS`."""

    to: str | None = None
    on: str | None = None
    source: str | None = msgspec.field(default=None, name="from")
    workspace: str | None = None
    at: int | None = None
    """A sequence; None is the last."""
    delete: bool = False
    state_dir: str | None = None
    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    gitignore: bool = False
    delete_excluded: bool = False
    no_delete: bool = False
    allow_mass_delete: bool = False
    take_over: bool = False
    rehash: bool = False
    scan: bool = False
    settle_seconds: float = msgspec.field(default=2.0, name="settle")
    chunk_from_bytes: int = msgspec.field(default=4 << 20, name="chunk-from")
    debounce_seconds: float = msgspec.field(default=0.25, name="debounce")
    rescan_seconds: float = msgspec.field(default=60.0, name="rescan")
    rehash_days: float = 0.0
    level: int | None = None
    """Of zstd; None is what suits the content and the link."""
    jobs: int = 4
    """Requests, or pieces of a large bundle, at a time."""
    bandwidth_bytes: int = msgspec.field(default=0, name="bwlimit")
    """Bytes per second; 0 is no limit."""
    timeout_seconds: float = msgspec.field(default=30.0, name="timeout")
    max_retries: int = 3
    keep_sent_seconds: float = msgspec.field(default=0.0, name="keep-sent")
    outbox_limit_bytes: int = msgspec.field(default=2 << 30, name="outbox-limit")
    proxy: bool = False
    insecure: bool = False
    ssh: str = "ssh"
    ssh_server: str = "deltasync-server"
    ssh_data: str | None = None
    """On the host; None is the usual folder there."""
    token_for: tuple[str, ...] = msgspec.field(default=(), name="token-for")
    """The addresses that the environment's token is for (spec H-144)."""
    no_wait: bool = False
    dry_run: bool = False
    full: bool = False
    json: bool = False
    quiet: bool = False
    verbose: bool = False


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of value: how it is parsed, and in words what is allowed."""

    parse: Callable[[Raw], Value]
    allowed: str
    metavar: str = ""
    is_list: bool = False


@dataclass(frozen=True, slots=True)
class Setting:
    """One thing that can be set: `--KEY`, `DELTASYNC_KEY`, and KEY in a file."""

    key: str
    kind: Kind
    help: str
    short: str = ""
    in_file: bool = True
    """Whether a configuration file may set it; what allows a loss once does not belong there."""
    in_workspace_file: bool = True
    """Whether the workspace's own file may set it: a folder that came from elsewhere never says where it is sent."""
    alias: str = ""
    """Another environment variable that sets it, for clients of the seed's own API."""

    @property
    def variable(self) -> str:
        """The environment variable."""
        return PREFIX + self.key.upper().replace("-", "_")


_SIZE = re.compile(r"(?i)\s*([0-9]+(?:\.[0-9]+)?)\s*(?:([kmgt])(i?b)?|b)?\s*")
_TIME = re.compile(r"(?i)\s*([0-9]+(?:\.[0-9]+)?)\s*(ms|s|m|h|d|w)?\s*")
_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def parse_size(raw: Raw) -> int:
    """Return bytes: `500`, `10M` and `2GiB` count in 1024s, `2GB` in 1000s; raises ValueError."""
    match = _SIZE.fullmatch(_text(raw))
    if match is None:
        raise ValueError("not a size")
    number, letter, tail = match.groups()
    base = 1000 if (tail or "").lower() == "b" else 1024
    power = " kmgt".index(letter.lower()) if letter else 0
    return round(float(number) * float(base**power))


def _chunked(raw: Raw) -> int:
    size = parse_size(raw)
    if size < CHUNK_FROM_MIN:
        raise ValueError("smaller than any file that is cut")
    return size


def parse_seconds(raw: Raw) -> float:
    """Return seconds: `250ms`, `2s`, `30m`, `12h`, `7d`, `2w`; a bare number is seconds; raises ValueError."""
    match = _TIME.fullmatch(_text(raw))
    if match is None:
        raise ValueError("not a time")
    number, unit = match.groups()
    return float(number) * _SECONDS[(unit or "s").lower()]


def parse_switch(raw: Raw) -> bool:
    """Return true or false for the usual words; raises ValueError."""
    word = _text(raw).lower()
    if word not in _TRUE + _FALSE:
        raise ValueError("neither true nor false")
    return word in _TRUE


def _text(raw: Raw) -> str:
    if isinstance(raw, str):
        return raw.strip()
    if isinstance(raw, bool):
        return "true" if raw else "false"
    if isinstance(raw, int):
        return str(raw)
    if isinstance(raw, float) and math.isfinite(raw):
        return f"{raw:f}"
    raise ValueError("not one value")


def _only_text(raw: Raw) -> str:
    if not isinstance(raw, str) or not raw.strip():
        raise ValueError("no text")
    return raw


def _address(raw: Raw) -> str:
    """Return an address in the one spelling that is remembered, as far as that needs no understanding of hosts.

    A bare word is the name of a host, which the book of hosts knows or not.
    """
    text = _only_text(raw).strip()
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", text):
        return text
    match = re.fullmatch(r"(?i)(https?|file|ssh)://([^/]*)(/.*)?", text)
    if match is None or not (match[2] or match[3]):
        raise ValueError("no address")
    scheme = match[1].lower()
    return f"{scheme}://{match[2] if scheme == 'ssh' else match[2].lower()}{(match[3] or '').rstrip('/')}"


def _folder(raw: Raw) -> str:
    return str(Path(_only_text(raw)).expanduser())


def _patterns(raw: Raw) -> tuple[str, ...]:
    patterns = raw.split() if isinstance(raw, str) else raw
    if not isinstance(patterns, list | tuple) or not all(isinstance(each, str) for each in patterns):
        raise ValueError("no list of texts")
    return tuple(patterns)


def _count(raw: Raw) -> int:
    text = _text(raw)
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ValueError("not a count")
    return int(text)


def _jobs(raw: Raw) -> int:
    count = _count(raw)
    if not 1 <= count <= JOBS_MAX:
        raise ValueError("no number of jobs")
    return count


def _level(raw: Raw) -> int:
    level = _count(raw)
    if not 1 <= level <= LEVEL_MAX:
        raise ValueError("no level")
    return level


def _days(raw: Raw) -> float:
    return parse_seconds(f"{_text(raw)}d") / _SECONDS["d"]


def _positive_seconds(raw: Raw) -> float:
    seconds = parse_seconds(raw)
    if seconds <= 0:
        raise ValueError("not above zero")
    return seconds


SWITCH = Kind(parse_switch, "true or false")
PATTERNS = Kind(_patterns, "a list of patterns in the syntax of .gitignore", "PATTERN", is_list=True)
SIZE = Kind(parse_size, "a size such as 500k, 10M or 2GiB", "SIZE")
CHUNKED = Kind(_chunked, "a size of at least 128k", "SIZE")
SECONDS = Kind(parse_seconds, "a time such as 250ms, 2s, 30m, 12h or 7d", "TIME")
POSITIVE = Kind(_positive_seconds, "a time above zero such as 250ms, 2s, 30m, 12h or 7d", "TIME")
COUNT = Kind(_count, "a whole number from 0", "N")
JOBS = Kind(_jobs, f"a whole number from 1 to {JOBS_MAX}", "N")
LEVEL = Kind(_level, f"a whole number from 1 to {LEVEL_MAX}", "N")
DAYS = Kind(_days, "a number of days, 0 for never", "N")
ADDRESS = Kind(
    _address, "an address such as https://host:8080, ssh://host or file:///mnt/usb, or a known host's name", "URL"
)
REMOTE_FOLDER = Kind(_only_text, "a folder", "DIR")
COMMAND = Kind(_only_text, "a command", "COMMAND")
NAME = Kind(lambda raw: parse_workspace(_only_text(raw)), "a workspace's name", "NAME")
FOLDER = Kind(_folder, "a folder", "DIR")

_ALL = (
    Setting(
        "to",
        ADDRESS,
        "Server to send to (URL, ssh://USER@HOST/NAME, or a known host's name), or file:///FOLDER; remembered.",
        in_workspace_file=False,
        alias="REMOTE_UPLOAD_ENDPOINT",
    ),
    Setting("on", ADDRESS, "Host to run on (URL, ssh://USER@HOST, or a known host's name).", in_workspace_file=False),
    Setting("from", ADDRESS, "Server to fetch from (URL, or a known host's name).", in_workspace_file=False),
    Setting("at", COUNT, "Fetch this sequence, one of those that the server keeps; the last.", in_file=False),
    Setting("delete", SWITCH, "Delete what DEST has beyond the workspace.", in_file=False),
    Setting("workspace", NAME, "Name on the server; the folder's own name, then remembered.", in_workspace_file=False),
    Setting("state-dir", FOLDER, "Keep the state here, not in PATH/.deltasync.", in_workspace_file=False),
    Setting("exclude", PATTERNS, "Ignore what matches, as in .gitignore; repeatable (variable: spaces between)."),
    Setting("include", PATTERNS, "Carry what matches although a rule ignores it; as --exclude."),
    Setting("gitignore", SWITCH, "Obey .gitignore files too."),
    Setting("delete-excluded", SWITCH, "Delete on the server what is newly ignored."),
    Setting("no-delete", SWITCH, "Never delete on the server."),
    Setting("allow-mass-delete", SWITCH, "Let a change pass that deletes most entries, or all.", in_file=False),
    Setting("take-over", SWITCH, "Become the workspace's owner, in place of its client.", in_file=False),
    Setting("rehash", SWITCH, "Read every file again instead of trusting its times.", in_file=False),
    Setting("scan", SWITCH, "Look at every folder although a watcher runs.", in_file=False),
    Setting("settle", SECONDS, "How long to wait for a file that changes while it is read [2s]."),
    Setting("chunk-from", CHUNKED, "Send only the new parts of changed files from this size on [4MiB]."),
    Setting("debounce", SECONDS, "Quiet time that ends a burst of changes [250ms]."),
    Setting("rescan", POSITIVE, "Look at every folder this often [60s]."),
    Setting("rehash-days", DAYS, "Read every file again in so many days, 0 for never [0]."),
    Setting("level", LEVEL, "Compress at this level of zstd, 1 to 19; else as suits content and link."),
    Setting("jobs", JOBS, "Requests, or pieces of a large bundle, at a time [4].", short="j"),
    Setting("bwlimit", SIZE, "Send, or fetch, at most this much a second, 0 for no limit [0]."),
    Setting("timeout", POSITIVE, "How long to wait for the server [30s].", alias="REMOTE_UPLOAD_TIMEOUT"),
    Setting("max-retries", COUNT, "Tries again when a request fails [3].", alias="REMOTE_UPLOAD_MAX_RETRIES"),
    Setting("keep-sent", SECONDS, "Keep bundle files this long after they were sent [0]."),
    Setting("outbox-limit", SIZE, "Most bytes of bundle files that wait to be sent [2GiB]."),
    Setting("proxy", SWITCH, "Use the proxies that the environment names.", in_workspace_file=False),
    Setting("insecure", SWITCH, "Talk plain http with other machines.", in_workspace_file=False),
    Setting("ssh", COMMAND, "Program and options for ssh:// [ssh].", in_workspace_file=False),
    Setting("ssh-server", COMMAND, "Program on the host for ssh:// [deltasync-server].", in_workspace_file=False),
    Setting(
        "ssh-data",
        REMOTE_FOLDER,
        "Its data folder there; if not given, the usual.",
        in_workspace_file=False,
    ),
    Setting("no-wait", SWITCH, "Return at the receipt, before the server's tree is complete."),
    Setting("dry-run", SWITCH, "Show what would be done; do nothing.", short="n", in_file=False),
    Setting("full", SWITCH, "Carry all content, also what the server already holds.", in_file=False),
    Setting("json", SWITCH, "Print JSON and nothing else.", in_file=False),
    Setting("quiet", SWITCH, "Print only errors.", short="q", in_file=False),
    Setting("verbose", SWITCH, "Print more, and tracebacks.", short="v", in_file=False),
)
DERIVED = ("token-for",)
"""What follows from other settings, and from where they were given."""
SETTINGS: Mapping[str, Setting] = {setting.key: setting for setting in _ALL}


def load(
    flags: Mapping[str, Raw | None], environment: Mapping[str, str], files: Iterable[tuple[Path, bool]] = ()
) -> Settings:
    """Return the settings: a file's, over them the environment's, over them the flags'; lists add up in this order.

    flags: by key; None and an empty list are not given. files: each with whether it is a workspace's own.
    Raises UsageError that names where a bad value stands and what is allowed there.
    """
    layers = [_from_file(path, is_workspace=is_workspace) for path, is_workspace in files]
    around = _from_environment(environment)
    given = {key: raw for key, raw in flags.items() if raw is not None and raw != []}
    asked = {key: _parsed(f"--{key}", SETTINGS[key], raw) for key, raw in given.items()}
    layers += [around, asked]
    merged: dict[str, Value] = {"token-for": _addresses(around) or _addresses(asked)}
    for layer in layers:
        for key, value in layer.items():
            before = merged.get(key)
            merged[key] = (*before, *value) if isinstance(before, tuple) and isinstance(value, tuple) else value
    return msgspec.convert(merged, Settings)


def _addresses(layer: Mapping[str, Value]) -> tuple[str, ...]:
    return tuple(str(layer[key]) for key in ("to", "from", "on") if layer.get(key))


def files_of(root: Path | None, environment: Mapping[str, str]) -> list[tuple[Path, bool]]:
    """Return the configuration files of a workspace: the user's, then the workspace's own."""
    files = [(home_of(environment) / "config.toml", False)]
    if root is not None:
        files.append((root / WORKSPACE_FILE, True))
    return files


def home_of(environment: Mapping[str, str]) -> Path:
    """Return the folder of the user's configuration.

    DELTASYNC_HOME names one folder for all that is kept for a user; without it, it lies where the system wants it.
    """
    if home := environment.get(HOME):
        return Path(home)
    import platformdirs

    return platformdirs.user_config_path("deltasync", appauthor=False)


def mistyped(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that are no setting and look like one, each with the one that it looks like."""
    known = {setting.variable.removeprefix(PREFIX) for setting in _ALL}
    names = (name.removeprefix(PREFIX) for name in environment if name.startswith(PREFIX))
    strange = (name for name in names if name not in known and not name.startswith(_OTHERS))
    near = {name: get_close_matches(name, known, 1, cutoff=0.8) for name in strange}
    return {PREFIX + name: PREFIX + found[0] for name, found in near.items() if found}


def is_true(text: str | None) -> bool:
    """Tell whether a variable is set and says yes, without complaint about anything else."""
    return (text or "").strip().lower() in _TRUE


def _from_environment(environment: Mapping[str, str]) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for setting in _ALL:
        aliases = (setting.alias,) if setting.alias and _is_alias_on(setting, environment) else ()
        for variable in (setting.variable, *aliases):
            if environment.get(variable, "").strip():
                found[setting.key] = _parsed(variable, setting, environment[variable])
                break
    return found


def _is_alias_on(setting: Setting, environment: Mapping[str, str]) -> bool:
    """REMOTE_UPLOAD_ENABLED=0 turns the endpoint off, as in the program that these variables come from."""
    enabled = environment.get("REMOTE_UPLOAD_ENABLED", "").strip()
    if setting.key != "to" or not enabled:
        return True
    return bool(_parse("REMOTE_UPLOAD_ENABLED", SWITCH, enabled))


def _from_file(path: Path, *, is_workspace: bool) -> dict[str, Value]:
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise UsageError(f"{_shown(path)} cannot be read: {error.strerror}") from error
    table = _toml(path, content)
    allowed = [each.key for each in _ALL if each.in_file and (each.in_workspace_file or not is_workspace)]
    for key in table:
        if key not in allowed:
            raise UsageError(_refused_key(path, key, allowed, is_workspace=is_workspace))
    return {key: _parsed(f"{_shown(path)}: {key}", SETTINGS[key], raw) for key, raw in table.items()}


def _toml(path: Path, content: bytes) -> dict[str, Raw]:
    import tomllib

    try:
        return tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{_shown(path)} is not TOML: {error}") from error


def _refused_key(path: Path, key: str, allowed: Sequence[str], *, is_workspace: bool) -> str:
    where = f"{_shown(path)}: {shown(key)}"
    if key in SETTINGS and SETTINGS[key].in_file and is_workspace:
        return f"{where} is set only in the user's own file, by a flag or by {SETTINGS[key].variable}"
    if key in SETTINGS:
        return f"{where} is set only by a flag or by {SETTINGS[key].variable}"
    near = get_close_matches(key, allowed, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{where} is no setting{hint}; allowed are {', '.join(allowed)}"


def _parsed(where: str, setting: Setting, raw: Raw) -> Value:
    return _parse(where, setting.kind, raw)


def _parse(where: str, kind: Kind, raw: Raw) -> Value:
    try:
        return kind.parse(raw)
    except NameRefused as error:
        raise UsageError(f"{where}: {shown(str(raw))} is not {kind.allowed}: {error}") from error
    except (ValueError, OverflowError) as error:
        raise UsageError(f"{where}: {shown(str(raw))!r} is not {kind.allowed}") from error


def _shown(path: Path) -> str:
    return shown(str(path))
