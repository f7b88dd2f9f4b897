"""The page at /docs: the OpenAPI description as plain HTML, made on the server, without script."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

import msgspec

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
h2{margin:2rem 0 .3rem;font:600 1rem ui-monospace,monospace}h2 b{color:#06c;margin-right:.6rem}
table{border-collapse:collapse;margin:.5rem 0}td{padding:.15rem 1rem .15rem 0;vertical-align:top}
code,pre{font:13px ui-monospace,monospace}pre{background:#f5f5f5;padding:.7rem;overflow:auto}
@media(prefers-color-scheme:dark){body{background:#111;color:#ddd}pre{background:#1c1c1c}h2 b{color:#6af}}"""

Json = Mapping[str, Any]


def page(description: Json) -> str:
    """Return the page for a description."""
    about = description["info"]
    routes = "".join(
        _route(method, path, route)
        for path, methods in description["paths"].items()
        for method, route in methods.items()
    )
    schemas = "".join(_schema(name, schema) for name, schema in description["components"]["schemas"].items())
    title = escape(f"{about['title']} {about['version']}")
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>"
        f"<h1>{title}</h1><p>{escape(about['summary'])} "
        f"Machines read <a href=/openapi.json>openapi.json</a>.</p>{routes}<h1>Values</h1>{schemas}</html>"
    )


def _route(method: str, path: str, route: Json) -> str:
    rows = "".join(f"<tr><td><code>{escape(name)}</code><td>{escape(what)}" for name, what in _facts(route))
    return (
        f"<h2><b>{method.upper()}</b>{escape(path)}</h2>"
        f"<p>{escape(route.get('description', route['summary']))}</p><table>{rows}</table>"
    )


def _facts(route: Json) -> Iterator[tuple[str, str]]:
    for parameter in route.get("parameters", ()):
        need = "required" if parameter.get("required") else "optional"
        yield parameter["name"], f"{parameter['in']}, {need}. {parameter.get('description', '')}"
    for media_type, content in route.get("requestBody", {}).get("content", {}).items():
        yield "body", f"{media_type} {_named(content)}"
    for status, response in route["responses"].items():
        given = ", ".join(f"{kind} {_named(content)}" for kind, content in response.get("content", {}).items())
        yield status, f"{response['description']}. {given}"


def _named(content: Json) -> str:
    return str(content.get("schema", {}).get("$ref", "")).rpartition("/")[2]


def _schema(name: str, schema: Json) -> str:
    return f"<h2>{escape(name)}</h2><pre>{escape(msgspec.json.format(msgspec.json.encode(schema)).decode())}</pre>"
