"""The `deltasync-server` program (spec H-50 to H-59): its commands and options; the only place that exits."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from deltasync import __version__
from deltasync.core.errors import DeltasyncError, UsageError
from deltasync_server.cli import store  # noqa: F401 - registers its commands, which the help shows in this order

# isort: split
from deltasync_server.cli import access  # noqa: F401 - the same
from deltasync_server.cli.call import PROGRAM, app, as_json, complain, is_set

# typer exports only this leaf of the parser's errors; its bases are "bad usage" and "any error of the parser".
_PARSER_ERROR: type[Exception] = typer.BadParameter.__mro__[2]


@app.callback()
def describe(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    """Take sealed bundles, keep each workspace as a plain folder, and prove it equal to its source.

    A setting is a flag, else the variable DELTASYNC_SERVER_ and its name, else a key of server.toml. Exit codes:
    0 done, 1 error, 2 usage, 3 done but something was left out, 4 busy, 5 sequence or root mismatch, 6 guard or disk
    full, 8 integrity, 130 stopped.
    """


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
    if "--json" in arguments or is_set("JSON"):
        print(as_json({"error": {**error.facts, "code": error.code, "detail": error.sentence}}), flush=True)
    complain(error.sentence)
    return error.exit_code


def _usage(error: Exception) -> DeltasyncError:
    message = " ".join(getattr(error, "format_message", error.__str__)().split()).rstrip(".")
    where = getattr(getattr(error, "ctx", None), "command_path", PROGRAM)
    return UsageError(f"{message[:1].lower()}{message[1:]} (see {where} --help)")


def _unexpected(error: Exception) -> DeltasyncError:
    """Say in one sentence what nobody foresaw; the traceback goes to the log."""
    from deltasync.disk import refusal

    if known := refusal(error):
        logging.getLogger(PROGRAM).info("refused", exc_info=error)
        return known
    logging.getLogger(PROGRAM).error("unexpected", exc_info=error)
    at = f" at {error.filename}" if isinstance(error, OSError) and error.filename else ""
    return DeltasyncError(f"unexpected {type(error).__name__}{at}: {error}; the traceback stands above")
