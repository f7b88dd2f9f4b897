"""The `deltasync` program: picks a command, and turns what it raises into one sentence and an exit code."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand, TyperGroup

from deltasync import __version__, config
from deltasync.cli import output
from deltasync.cli.options import PlainGroup, new_app
from deltasync.core.errors import AlreadyRunning, Cancelled, DeltasyncError, UsageError, of_run
from deltasync.core.names import shown, without_tokens

PROGRAM = "deltasync"
COMPLETE = "_DELTASYNC_COMPLETE"
COMMANDS = (
    "watch",
    "push",
    "fetch",
    "run",
    "plan",
    "jobs",
    "status",
    "verify",
    "why",
    "ignore",
    "bundle",
    "pin",
    "host",
    "doctor",
    "health",
    "completion",
)
"""Each is a module of this package with a Typer app of the same name; only the one that is chosen is imported."""

# typer exports only this leaf of the parser's errors; its bases are "bad usage" and "any error of the parser".
_PARSER_ERROR: type[Exception] = typer.BadParameter.__mro__[2]


class _Commands(PlainGroup):
    """The commands, each imported when it is chosen."""

    def list_commands(self, ctx: object) -> list[str]:
        """Return the names in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: object, cmd_name: str) -> TyperCommand | TyperGroup | None:
        """Import and return a command."""
        if cmd_name not in COMMANDS:
            near = get_close_matches(cmd_name, COMMANDS, 1)
            hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
            raise UsageError(f"no such command: {shown(cmd_name)}; {hint}")
        command = typer.main.get_command(import_module(f"deltasync.cli.{cmd_name}").app)
        assert isinstance(command, TyperCommand | TyperGroup)
        command.name = cmd_name
        return command


app = new_app(_Commands)


@app.callback()
def describe(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    """Keep a folder in step with a GPU host: watch it, seal what changed, send only what the host lacks.

    Every option is also a variable, DELTASYNC_ and its name, and a key of config.toml in the user's configuration
    folder or in PATH/.deltasync; a flag wins over a variable, and that over a file. Exit codes: 0 done, 1 error,
    2 usage, 3 done with problems, 4 host unreachable or busy, 5 sequence or root mismatch, 6 guard,
    7 authentication, 8 integrity, 130 cancelled; run: the command's own, or 121 to 125.
    """
    if version:
        _print_version()
        raise typer.Exit


def main() -> None:
    """Run the program and exit."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; every failure is one sentence on stderr."""
    output.prepare()
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
        return _fail(Cancelled("stopped"), arguments)
    except _PARSER_ERROR as error:
        return _fail(_usage(error), arguments)
    except Exception as error:  # noqa: BLE001 - the last line of defence reports with the traceback
        return _fail(_unexpected(error, arguments), arguments)


def _dispatch(arguments: Sequence[str]) -> int:
    if list(arguments) == ["--version"]:  # without a command, the parser would miss one
        _print_version()
        return 0
    group = typer.main.get_command(app)
    if os.environ.get(COMPLETE):
        from typer._completion_classes import completion_init

        completion_init()
        group.main(prog_name=PROGRAM, complete_var=COMPLETE)
    with group.make_context(PROGRAM, list(arguments) or ["--help"]) as context:
        return int(group.invoke(context) or 0)


def _print_version() -> None:
    print(f"{PROGRAM} {__version__}")


def _fail(error: DeltasyncError, arguments: Sequence[str]) -> int:
    if arguments[:1] in (["run"], ["plan"]):
        error = of_run(error)
    if _is_asked(arguments, "json"):
        print(output.error_json(error), flush=True)
    output.complain(error.sentence)
    return error.exit_code


def _is_asked(arguments: Sequence[str], key: str) -> bool:
    """Tell whether a switch was given, also where the command line as a whole could not be understood."""
    setting = config.SETTINGS[key]
    short = re.compile(rf"-[a-z]*{setting.short}[a-z]*") if setting.short else None
    own = itertools.takewhile(lambda each: each != "--", arguments)
    given = any(each == f"--{key}" or (short and short.fullmatch(each)) for each in own)
    return given or config.is_true(os.environ.get(setting.variable))


def _usage(error: Exception) -> UsageError:
    message = getattr(error, "format_message", error.__str__)()
    context = getattr(error, "ctx", None)
    where = getattr(context, "command_path", PROGRAM)
    text = " ".join(message.split()).rstrip(".")
    return UsageError(f"{text[:1].lower()}{text[1:]} (see {where} --help)")


def _unexpected(error: Exception, arguments: Sequence[str]) -> DeltasyncError:
    """Say in one sentence what nobody foresaw; the traceback goes to stderr with -v, else to a file."""
    known = _known(error)
    if known is not None:
        return known
    import traceback

    trace = without_tokens("".join(traceback.format_exception(error)))
    if _is_asked(arguments, "verbose"):
        sys.stderr.write(trace)
        where = "the traceback stands above"
    else:
        where = _record(trace)
    if isinstance(error, OSError) and error.strerror:
        at = f" at {error.filename}" if error.filename else ""
        return DeltasyncError(f"the system refused{at}: {error.strerror}; {where}")
    return DeltasyncError(f"unexpected {type(error).__name__}: {error}; {where}")


def _known(error: Exception) -> DeltasyncError | None:
    """Return what a refusal of the system, or trouble of the database that nobody caught earlier, means to the user."""
    import sqlite3

    from deltasync.db import damaged
    from deltasync.disk import refusal

    if isinstance(error, sqlite3.Error):
        found = damaged(Path("state.db"), error)
        busy = AlreadyRunning("another process is writing the same state; wait until it ends, then try again")
        return found if isinstance(found, DeltasyncError) else busy
    return refusal(error)


def _record(trace: str) -> str:
    import platformdirs

    folder = os.environ.get(config.HOME) or platformdirs.user_log_dir(PROGRAM, appauthor=False)
    path = Path(folder, "error.log")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(trace, errors="backslashreplace")
    except OSError:
        return "run it again with -v for the traceback"
    return f"the traceback is in {path}"
