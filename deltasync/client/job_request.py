"""The request for a job, from the plan of its command: every path becomes its place (spec J-20, J-30)."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deltasync.client.inputs import Need, place_of
from deltasync.client.looking import Looking
from deltasync.core import jobs
from deltasync.core.argv import Kind, Piece, Plan, Role, Said, is_series, pattern_of, plan, plan_lines, plan_values
from deltasync.core.errors import UsageError
from deltasync.core.names import shown

LIST_BYTES_MAX = 16 << 20
_READ = (Role.INPUT, Role.IN_PLACE, Role.LIST)


@dataclass(frozen=True, slots=True)
class Asked:
    """A command as the user gives it, and what the user says of it."""

    argv: Sequence[str]
    said: Said = field(default_factory=Said)
    environment: Mapping[str, str] | None = None
    timeout_seconds: float | None = None
    gpus: int = 0
    priority: int = 0
    keep_seconds: float = 0.0
    is_reused: bool = False
    """The result of an equal job that ended with 0 is as good as running this one (spec J-78)."""
    tool_version: Sequence[str] = ()
    is_shut_in: bool = False
    has_network: bool = False
    guessed: frozenset[str] = frozenset()
    """Of the outputs that are said, those that only a template takes for some (spec J-70)."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A command whose files are known, but for where the host has its inputs."""

    asked: Asked
    plan: Plan
    lists: tuple[jobs.List, ...]
    variables: tuple[jobs.Variable, ...]
    needs: tuple[Need, ...]
    """What has to be on the host."""
    outputs: tuple[jobs.Output, ...]
    named: tuple[str, ...] = ()
    """The places of the outputs that the user named; the others are guesses (spec J-62)."""

    def request(self, key: str, client_id: str, inputs: list[jobs.Input]) -> jobs.JobRequest:
        """Return what the host is asked."""
        asked = self.asked
        return jobs.JobRequest(
            key=key,
            client_id=client_id,
            argv=[_word(word.pieces) for word in self.plan.words],
            environment=list(self.variables),
            inputs=inputs,
            lists=list(self.lists),
            outputs=list(self.outputs),
            timeout_seconds=asked.timeout_seconds,
            gpus=asked.gpus,
            priority=asked.priority,
            keep_seconds=asked.keep_seconds,
            reuse=asked.is_reused,
            tool_version=[[_literal(word)] for word in asked.tool_version],
            sandbox=asked.is_shut_in,
            network=asked.has_network,
        )


def drafted(asked: Asked, folder: str) -> Draft:
    """Find out which words of a command are files, as it would run in a folder; raises UsageError."""
    look = Looking(folder)
    found = plan(asked.argv, look, asked.said)
    lists = {path: _lines(path, folder) for path in found.lists}
    values = {name: plan_values([value], look) for name, value in (asked.environment or {}).items()}
    changed = {*found.in_place, *(match for path in found.in_place for match in look(path).matches)}
    needs = {path: Need(path, path in changed) for path in found.inputs if path not in lists}
    beside = [piece for pieces in (*lists.values(), *values.values()) for piece in pieces]
    needs |= {piece.path: Need(piece.path) for piece in beside if piece.role in _READ and piece.path not in needs}
    return Draft(
        asked,
        found,
        tuple(jobs.List(place=place_of(path), lines=_by_line(pieces)) for path, pieces in lists.items()),
        tuple(jobs.Variable(name=name, value=_word(pieces)) for name, pieces in values.items()),
        tuple(needs.values()),
        tuple(_output(path, found, asked.said, look) for path in found.outputs),
        _named(asked, found, look),
    )


def _named(asked: Asked, found: Plan, look: Looking) -> tuple[str, ...]:
    """Return the places of the outputs that `--out`, `{out:PATH}` or a template's `{out}` names."""
    named = {look(text).path for text in asked.said.outputs - asked.guessed}
    for typed, word in zip(asked.argv, found.words, strict=True):
        marks = (each for each in word.pieces if each.role is Role.OUTPUT and f"{{out:{each.text}}}" in typed)
        named |= {each.path for each in marks}
    return tuple(place_of(path) for path in found.outputs if path in named)


def _output(path: str, found: Plan, said: Said, look: Looking) -> jobs.Output:
    pieces = (piece for word in found.words for piece in word.pieces if piece.role is Role.OUTPUT)
    in_words = {piece.text for piece in pieces if piece.path == path}
    typed = in_words | {text for text in said.outputs if look(text).path == path}
    is_folder = any(text.endswith("/") for text in typed) or look(path).kind is Kind.DIRECTORY
    name = path.rpartition("/")[2]
    # Nobody expands a glob on its way to the command: that is what the file is called (spec J-16).
    may_be_glob = not in_words and look(path).kind is Kind.ABSENT
    is_pattern = not is_folder and (may_be_glob or is_series(name)) and pattern_of(name) is not None
    return jobs.Output(place=place_of(path), is_folder=is_folder, is_pattern=is_pattern)


def _lines(path: str, folder: str) -> tuple[Piece, ...]:
    """Read a list; its relative paths are those of the command's folder, or of the list's own."""
    try:
        with Path(path).open("rb") as file:
            content = file.read(LIST_BYTES_MAX + 1)
    except OSError as error:
        raise UsageError(f"{shown(path)} cannot be read ({error.strerror}); the command reads it as a list") from error
    if len(content) > LIST_BYTES_MAX:
        raise UsageError(
            f"{shown(path)} is larger than a list may be ({LIST_BYTES_MAX} bytes); write @{{in:{shown(path)}}} to send "
            "it as it is"
        )
    text = content.decode(errors="surrogateescape")
    return plan_lines(text, Looking(folder, near=os.path.dirname(path)))  # noqa: PTH120


def _by_line(pieces: Iterable[Piece]) -> list[jobs.Word]:
    """Put the pieces of a list together by its lines, each with its end."""
    lines: list[jobs.Word] = []
    word: list[Piece] = []
    for piece in pieces:
        word.append(piece)
        if piece.role is Role.LITERAL and piece.text.endswith("\n"):
            lines.append(_word(word))
            word = []
    return [*lines, _word(word)] if word else lines


def _word(pieces: Iterable[Piece]) -> jobs.Word:
    word = [each for piece in pieces for each in _pieces(piece)]
    return word or [jobs.Piece(text="")]


def _pieces(piece: Piece) -> list[jobs.Piece]:
    if piece.role is Role.LITERAL:
        return [_literal(piece.text)]
    place, end = place_of(piece.path), [jobs.Piece(text="/")] if piece.text.endswith("/") else []
    return [jobs.Piece(output=place) if piece.role is Role.OUTPUT else jobs.Piece(input=place), *end]


def _literal(text: str) -> jobs.Piece:
    try:
        text.encode()
    except UnicodeEncodeError:
        return jobs.Piece(raw=base64.b64encode(text.encode(errors="surrogateescape")).decode())
    return jobs.Piece(text=text)
