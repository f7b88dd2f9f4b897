"""Writes spec/openapi.yaml again from the routes: `python tests/make_openapi.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import yaml

from deltasync_server.http.app import routes

FILE = Path(__file__).resolve().parent.parent / "spec/openapi.yaml"
HEAD = "# Written by tests/make_openapi.py from the routes; a test compares it with the running server.\n"


class _Text(yaml.SafeDumper):
    """Writes text of several lines as a block, and never an alias."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _block(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Text.add_representer(str, _block)


def description() -> str:
    """Return the description of all routes as YAML."""
    plain = msgspec.json.decode(msgspec.json.encode(routes(seed_routes=True).openapi()))
    return HEAD + yaml.dump(plain, Dumper=_Text, sort_keys=False, allow_unicode=True, width=110)


if __name__ == "__main__":
    FILE.write_text(description(), encoding="utf-8")
    print(f"wrote {FILE}")
