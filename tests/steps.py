"""What a call does, step by step: two that take the same steps take the same time, without a clock."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from sqlite3 import Connection
from types import FrameType


def steps_of(
    work: Callable[[], object], connections: Iterable[Connection], hidden: Mapping[str, str] | None = None
) -> list[str]:
    """Return every function that is called, C's as well, every statement, and how many steps the databases take.

    connections: those that the work uses. hidden: what is replaced in statements, by what.
    """
    steps: list[str] = []

    def note_call(frame: FrameType, event: str, argument: object) -> None:
        if frame.f_code.co_filename == __file__:
            return
        if event == "call":
            steps.append(frame.f_code.co_qualname)
        elif event == "c_call":
            steps.append(getattr(argument, "__qualname__", repr(argument)))

    def note_statement(text: str) -> None:
        for word, instead in (hidden or {}).items():
            text = text.replace(word, instead)
        asked.append(text)

    def note_instruction() -> None:
        nonlocal instructions
        instructions += 1

    asked: list[str] = []
    instructions = 0
    with ExitStack() as stack:
        for connection in connections:
            connection.set_trace_callback(note_statement)
            stack.callback(connection.set_trace_callback, None)
            connection.set_progress_handler(note_instruction, 1)
            stack.callback(connection.set_progress_handler, None, 0)
        if gc.isenabled():  # whoever listens to collections would be seen among the steps
            gc.disable()
            stack.callback(gc.enable)
        sys.setprofile(note_call)
        try:
            work()
        except Exception as error:  # noqa: BLE001  a refusal is an answer too
            steps.append(f"{type(error).__name__}: {error}")
        finally:
            sys.setprofile(None)
    return [*steps, *asked, f"{instructions} instructions"]
