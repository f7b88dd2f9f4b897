"""What is asked of `run` and `plan`: their common options, and the values of options."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from deltasync.config import parse_seconds, parse_size
from deltasync.core.errors import PlanRefused
from deltasync.core.names import shown

Words = Annotated[list[str] | None, typer.Argument(metavar="-- TOOL ARG", help="The command.")]
Inputs = Annotated[list[str] | None, typer.Option("--in", metavar="PATH", help="The command reads this; repeatable.")]
Outputs = Annotated[
    list[str] | None, typer.Option("--out", metavar="PATH", help="The command writes this; repeatable.")
]
Literals = Annotated[
    list[str] | None, typer.Option("--literal", metavar="WORD", help="This word is no path; repeatable.")
]
Environment = Annotated[
    list[str] | None,
    typer.Option("--env", metavar="NAME=VALUE", help="A variable; a path that is here is sent; repeatable."),
]
InPlace = Annotated[bool, typer.Option("--in-place", help="The command may change its inputs; those come home.")]
Shell = Annotated[str | None, typer.Option(metavar="COMMAND", help="Have sh run this line there, instead of TOOL.")]


def argv_of(words: list[str], shell: str | None) -> list[str]:
    """Return the command's words; raises PlanRefused where there are none, or two commands."""
    if shell is not None and words:
        raise PlanRefused("--shell is the whole command; leave the words behind -- out")
    if shell is None and not words:
        raise PlanRefused("there is no command; give it behind --")
    return words if shell is None else ["sh", "-c", shell]


def variable(text: str) -> tuple[str, str]:
    """Return the name and value of a variable of the command; raises PlanRefused."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise PlanRefused(f"--env: {shown(text)} is not NAME=VALUE")
    return name, value


def seconds_of(option: str, text: str) -> float:
    """Return the seconds that an option names; raises PlanRefused, as the others do."""
    try:
        return parse_seconds(text)
    except (ValueError, OverflowError) as error:
        raise PlanRefused(f"{option}: {shown(text)} is not a time such as 30s, 10m or 2h") from error


def words_of(option: str, text: str) -> list[str]:
    """Return the words of a command line in an option, by the rules of a shell's quotes."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise PlanRefused(f"{option}: {shown(text)} has a quote without an end") from error


def size_of(option: str, text: str) -> int:
    """Return the bytes that an option names."""
    try:
        return parse_size(text)
    except (ValueError, OverflowError) as error:
        raise PlanRefused(f"{option}: {shown(text)} is not a size such as 500M or 4G") from error


def number_of(option: str, text: str, least: int, most: int) -> int:
    """Return the whole number that an option names."""
    try:
        number = int(text)
    except ValueError:
        number = most + 1
    if not least <= number <= most:
        raise PlanRefused(f"{option}: {shown(text)} is not a whole number from {least} to {most}")
    return number
