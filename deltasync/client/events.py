"""What a watcher says while it runs: one value for each thing that happened, shown as a line or as JSON."""

from __future__ import annotations

import enum
from typing import Protocol

import msgspec

Fact = str | int | float | bool | None


class What(enum.StrEnum):
    """The kinds of things that a watcher says."""

    WATCHING = "watching"
    SEALED = "sealed"
    SENT = "sent"
    PROBLEM = "problem"
    SOLVED = "solved"
    WAITING = "waiting"
    OFFLINE = "offline"
    ONLINE = "online"
    GUARD = "guard"
    FULL = "full"
    TROUBLE = "trouble"
    UNAVAILABLE = "unavailable"
    AVAILABLE = "available"
    RESCAN = "rescan"
    COVERAGE = "coverage"
    NOTE = "note"
    STOPPED = "stopped"


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that happened: when, what, one sentence for people, and the facts for programs."""

    at: str
    event: What
    sentence: str
    """Safe to print: names in it are escaped."""
    facts: dict[str, Fact] = {}

    def line(self) -> str:
        """Return the event for people."""
        return f"{self.at[11:19]} {self.sentence}"

    def json(self) -> str:
        """Return the event as one JSON object on one line; the facts stand beside the other members."""
        members = {"at": self.at, "event": self.event, "sentence": self.sentence, **self.facts}
        return msgspec.json.encode(members).decode()


class Say(Protocol):
    """Tells whoever listens that something happened."""

    def __call__(self, what: What, sentence: str, /, **facts: Fact) -> None:
        """Say one thing."""
