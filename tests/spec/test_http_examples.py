"""The examples of spec/3-http.md, run in their order against a real server and the real program."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import BINARY, Served, serving

PROJECT = Path(__file__).resolve().parents[2]
PAGE = (PROJECT / "spec/3-http.md").read_text(encoding="utf-8")
GOOD = PROJECT / "bundles/good"
REQUESTS = re.findall(r"```http\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = re.findall(r"```console\n\$ (.*?)\n(.*?)exit (\d+)\n```", PAGE, re.DOTALL)
ANY = "…"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served") / "data") as served:
        yield served


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("commands") / "data"


def agree(found: Any, written: Any) -> bool:
    """Tell whether an answer is what the page says, where … stands for anything."""
    if written == ANY:
        return True
    if isinstance(written, dict) and isinstance(found, dict):
        is_open = written.get(ANY) == ANY
        names = set(written) - {ANY}
        known = names <= set(found) if is_open else names == set(found)
        return known and all(agree(found[name], written[name]) for name in names)
    if isinstance(written, list) and isinstance(found, list):
        return len(written) == len(found) and all(map(agree, found, written))
    return bool(found == written)


def form(fields: str, sealed: bytes) -> bytes:
    named = [each.split("=", 1) for each in fields.split()]
    parts = [f'--b\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n'.encode() for k, v in named]
    return b"".join(parts) + b'--b\r\nContent-Disposition: form-data; name="bundle"\r\n\r\n' + sealed + b"\r\n--b--\r\n"


def asked(lines: list[str]) -> tuple[str, str, bytes | None, dict[str, str]]:
    """Return method, path, body and headers of an example's request."""
    method, path = lines[0].split()
    body, headers, fields = None, {}, ""
    for line in lines[1:]:
        if line.startswith("@"):
            body = (GOOD / line[1:]).read_bytes()
        elif line.startswith("{"):
            body = line.encode()
        elif line.startswith("form: "):
            fields = line.removeprefix("form: ")
            headers["Content-Type"] = "multipart/form-data; boundary=b"
        else:
            name, value = line.split(": ", 1)
            headers[name] = value
    return method, path, form(fields, body or b"") if fields else body, headers


def test_requests_are_answered_as_the_page_says(server: Served) -> None:
    """Status, media type and JSON are those of the page, in its order."""
    for example in REQUESTS:
        check_request(server, example)


def check_request(server: Served, example: str) -> None:
    lines = example.splitlines()
    method, path, body, headers = asked([line[2:] for line in lines if line.startswith("> ")])
    ((status, media_type),) = [line[2:].split() for line in lines if line.startswith("< ")]
    written = json.loads("\n".join(line for line in lines if not line.startswith(("> ", "< "))))
    answer = server.request(method, path, body, headers)
    assert (answer.status, answer.headers["content-type"]) == (int(status), media_type), answer
    assert agree(answer.json, written), (example, answer.json)


def test_commands_say_what_the_page_says(data: Path) -> None:
    """Their output, on whichever stream, and their exit codes are those of the page, in its order."""
    for words, output, code in COMMANDS:
        check_command(data, words, output, code)


def check_command(data: Path, words: str, output: str, code: str) -> None:
    places = {"DATA": str(data), "GOOD": str(GOOD), "deltasync-server": str(BINARY)}
    done = subprocess.run([places.get(word, word) for word in shlex.split(words)], capture_output=True, text=True)
    said = done.stdout + done.stderr
    if output.startswith("{"):
        assert agree(json.loads(said), json.loads(output)), (words, said)
    else:
        assert said == output, words
    assert done.returncode == int(code), words


def test_the_page_has_examples_of_both_kinds() -> None:
    """The patterns above find what is there."""
    assert len(REQUESTS) >= 10 and len(COMMANDS) >= 3


def test_every_rule_that_code_cites_is_on_the_page() -> None:
    """`spec H-n` in the code, and in the rules of errors, leads to a row of the page."""
    rules = set(re.findall(r"^\| (H-\d+) \|", PAGE, re.MULTILINE))
    cited = {
        rule
        for folder in ("server", "deltasync")
        for path in (PROJECT / folder).rglob("*.py")
        for rule in re.findall(r"\bH-\d+\b", path.read_text(encoding="utf-8"))
    }
    assert cited and cited <= rules, cited - rules


def test_every_rule_of_the_page_is_cited_by_code() -> None:
    """A rule that no code cites is not implemented; `H-20 to H-29` cites each between."""
    files = (path for folder in ("server", "deltasync") for path in (PROJECT / folder).rglob("*.py"))
    code = "".join(path.read_text(encoding="utf-8") for path in files)
    cited = {int(number) for number in re.findall(r"\bH-(\d+)\b", code)}
    for first, last in re.findall(r"\bH-(\d+) to H-(\d+)\b", code):
        cited |= set(range(int(first), int(last) + 1))
    rules = {int(number) for number in re.findall(r"^\| H-(\d+) \|", PAGE, re.MULTILINE)}
    assert rules <= cited, rules - cited
