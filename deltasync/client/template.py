"""A template: a command for each of many files, with holes where the file and what it becomes stand (spec J-70)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from deltasync.client.job_request import Asked
from deltasync.core.argv import INPUT_FLAGS, OUTPUT_FLAGS, Said
from deltasync.core.errors import PlanRefused
from deltasync.core.names import shown

_HOLE = re.compile(r"\{(|out|stem|name|ext)\}")
_OF_NAME = re.compile(r"\{(stem|name|ext)\}")
_PROGRAM_FLAGS = frozenset({"-c", "-e"})
"""What stands behind one of them is a program, for sh, python3 or perl."""
_BRACES = re.compile(r"[{}]")


@dataclass(frozen=True)
class Template:
    """A command with holes: `{}` the file, `{out}` OUT-DIR with its name, `{stem}`, `{name}` and `{ext}`."""

    asked: Asked
    out_dir: str | None = None
    """As it was typed."""

    def require_holes(self) -> None:
        """Raise PlanRefused where the holes cannot be filled, or nothing differs from file to file."""
        words = [*self.asked.argv, *(self.asked.environment or {}).values(), *self.asked.said.inputs]
        if not any("{}" in word for word in words):
            raise PlanRefused("--each: no word of the command is {}, the file; quote it if a shell takes it away")
        if self.out_dir is None and any("{out}" in word for word in (*self.asked.argv, *self.asked.said.outputs)):
            raise PlanRefused("{out} is the file's name in a folder; say which with --out-dir FOLDER")

    def of(self, path: str) -> Asked:
        """Return the command for a file, as it was typed; raises PlanRefused for a name that cannot stand in a word."""
        asked = self.asked
        out = os.path.join(self.out_dir or "", os.path.basename(path))  # noqa: PTH118, PTH119 - as it was typed
        words = [self._filled(word, path, out) for word in asked.argv]
        said = Said(
            frozenset((path, *self._names(asked.said.inputs, path, out))),
            frozenset((*self._outputs(words, out), *self._names(asked.said.outputs, path, out))),
            asked.said.literals,
            asked.said.is_in_place,
        )
        values = {name: self._filled(value, path, out) for name, value in (asked.environment or {}).items()}
        guessed = frozenset(words[-1:]) if self._writes_last else frozenset[str]()
        return replace(asked, argv=words, said=said, environment=values, guessed=guessed)

    def _filled(self, word: str, path: str, out: str) -> str:
        """Fill the holes of a word; a path inside of one is marked, as what it is."""
        if word in self.asked.said.literals:
            return word
        if word in ("{}", "{out}"):
            return path if word == "{}" else out
        name = os.path.basename(path)  # noqa: PTH119
        stem, ext = os.path.splitext(name)  # noqa: PTH122

        def fill(hole: re.Match[str]) -> str:
            if hole[1] in ("", "out"):
                if _BRACES.search(path if not hole[1] else out):
                    raise PlanRefused(f"{shown(path)} has a brace in its name; {shown(hole[0])} has to be a whole word")
                return f"{{in:{path}}}" if not hole[1] else f"{{out:{out}}}"
            return {"stem": stem, "name": name, "ext": ext.removeprefix(".")}[hole[1]]

        return _HOLE.sub(fill, word)

    def _names(self, patterns: Iterable[str], path: str, out: str) -> list[str]:
        return [path if each == "{}" else self._filled(each, path, out) for each in patterns]

    def _outputs(self, words: Sequence[str], out: str) -> list[str]:
        """Return the words that are outputs because of their holes."""
        found = [out] if "{out}" in self.asked.argv else []
        return [*found, words[-1]] if self._writes_last else found

    @cached_property
    def _writes_last(self) -> bool:
        """Whether the last word is the output because of its hole: what is there is of an earlier time (spec J-70)."""
        argv, said = self.asked.argv, self.asked.said
        last = argv[-1]
        is_said = last in said.literals | said.inputs or not _OF_NAME.search(last) or "{}" in last or "{out}" in last
        if is_said or len(argv) < 2 or argv[-2] in INPUT_FLAGS | _PROGRAM_FLAGS or last.startswith("-"):
            return False
        return not said.outputs and not any("{out" in word or word.partition("=")[0] in OUTPUT_FLAGS for word in argv)
