"""The `deltasync-server` program: its commands, its sentences, its exit codes, and how it starts and ends."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import folders
import pytest
from sender import Sender
from serving import BINARY, SECONDS, Served, Writer, serving, until

from deltasync.core.names import WorkspaceName
from deltasync_server.access import Access, Scope
from deltasync_server.config import StoreConfig
from deltasync_server.receive import Store
from deltasync_server.tenants import DEFAULT

GOOD = Path(__file__).resolve().parents[2] / "bundles/good"
ROOT = json.loads((GOOD / "index.json").read_text(encoding="utf-8"))[-1]["root"]


def run(*words: object, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command that ends by itself."""
    given = {**os.environ, **(environment or {})}
    return subprocess.run([BINARY, *map(str, words)], capture_output=True, text=True, env=given, timeout=60)


def sentence(done: subprocess.CompletedProcess[str], code: int) -> str:
    """Return what a failed command says: one sentence on stderr and nothing on stdout."""
    assert (done.returncode, done.stdout) == (code, ""), done
    (line,) = done.stderr.splitlines()
    assert line.startswith("deltasync-server: ")
    return line.removeprefix("deltasync-server: ")


@contextlib.contextmanager
def started(*words: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run `serve` and yield it with its first line."""
    with subprocess.Popen([BINARY, "serve", *map(str, words)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            yield process, process.stdout.readline()
        finally:
            process.terminate()


def test_the_first_line_says_where_and_nothing_follows(tmp_path: Path) -> None:
    """`listening on http://127.0.0.1:PORT` is all that is printed, when requests are taken."""
    with started("--data", tmp_path / "data", "--listen", "127.0.0.1:0") as (process, line):
        port = int(line.removeprefix("listening on http://127.0.0.1:"))
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: [::1]\r\nConnection: close\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        process.terminate()
        assert process.stdout and process.stdout.read() == ""
        assert process.wait(SECONDS) == 0


def test_json_is_one_object(tmp_path: Path) -> None:
    """--json prints one object: the address, the data, the version, the process."""
    with started("--data", tmp_path / "data", "--listen", "[::1]:0", "--json") as (process, line):
        found = json.loads(line)
        assert found["listening"].startswith("http://[::1]:") and found["pid"] == process.pid
        assert found["data"] == str(tmp_path / "data")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly_with_everything_in_flight(tmp_path: Path, number: signal.Signals) -> None:
    """With a long-poll, an upload and an idle connection open it ends in under 10 s, exit 0, nothing half there."""
    with serving(tmp_path / "data") as server:
        connections = [server.connect() for _ in range(3)]
        connections[0].sendall(b"GET /api/v1/workspaces/w?tree_sequence=9&wait=60 HTTP/1.1\r\nHost: [::1]\r\n\r\n")
        made = Writer("w").large(2_000_000)
        head = f"POST /api/v1/workspaces/w/bundles HTTP/1.1\r\nHost: [::1]\r\nDeltasync-Identity: {made.identity}\r\n"
        connections[1].sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(made.sealed) + made.sealed[:1500000])
        until(lambda: list((server.data / "journal").iterdir()))
        began = time.monotonic()
        server.process.send_signal(number)
        assert server.process.wait(10) == 0
        assert time.monotonic() - began < 10
        assert connections[0].recv(15).startswith(b"HTTP/1.1 200")
        assert connections[1].recv(15).startswith(b"HTTP/1.1 503")
        for connection in connections:
            connection.close()
    assert not list((server.data / "journal").iterdir())
    assert "Traceback" not in server.log.read_text()
    with serving(tmp_path / "data") as again:
        assert again.send("w", made).status == 200


def test_what_was_applied_is_there_after_a_kill(tmp_path: Path) -> None:
    """kill -9 after the receipt: the next server has the head and brings the tree forward."""
    made = Writer("w").file("a", b"kept\n")
    with serving(tmp_path / "data") as server:
        assert server.send("w", made).status == 200
        server.process.kill()
        server.process.wait(SECONDS)
    with serving(tmp_path / "data") as server:
        found = server.get("/api/v1/workspaces/w?tree_sequence=1&wait=20").json
        assert (found["sequence"], found["root"], found["tree_sequence"]) == (1, made.root, 1)
    assert (tmp_path / "data/workspaces/w/tree/a").read_bytes() == b"kept\n"


def test_an_address_that_others_reach_needs_a_word(tmp_path: Path) -> None:
    """Without --insecure it refuses to go without TLS beyond loopback: exit 2, before anything is made."""
    for address in ("0.0.0.0:0", "[::]:0", "192.0.2.1:80"):
        said = sentence(run("serve", "--data", tmp_path / "data", "--listen", address, "--no-tls"), 2)
        assert "--insecure" in said and address in said
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "address", ["nonsense", "127.0.0.1", ":80", "127.0.0.1:x", "127.0.0.1:70000", "unix:", "no.such.invalid:1"]
)
def test_an_address_that_is_none_is_a_usage_error(tmp_path: Path, address: str) -> None:
    """Exit 2, and the sentence shows what was given."""
    assert sentence(run("serve", "--data", tmp_path / "data", "--listen", address), 2)


def test_a_port_in_use_is_one_sentence(tmp_path: Path) -> None:
    """Exit 1, and the store is left alone."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert f"{address} is in use" in sentence(run("serve", "--data", tmp_path / "data", "--listen", address), 1)
    assert not (tmp_path / "data").exists()


def test_a_unix_socket_can_be_listened_on(tmp_path: Path) -> None:
    """unix:/path: only its owner may connect; a second server is refused; a stale socket is replaced."""
    path = tmp_path / "socket"
    with started("--data", tmp_path / "data", "--listen", f"unix:{path}") as (process, line):
        assert line == f"listening on unix:{path}\n"
        assert path.stat().st_mode & 0o777 == 0o600
        connection = http.client.HTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(path))
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200
        connection.close()
        assert "in use" in sentence(run("serve", "--data", tmp_path / "other", "--listen", f"unix:{path}"), 1)
        process.kill()
        process.wait(SECONDS)
    with started("--data", tmp_path / "data", "--listen", f"unix:{path}") as (_, line):
        assert line == f"listening on unix:{path}\n"
    (tmp_path / "file").write_text("mine")
    assert "in use" in sentence(run("serve", "--data", tmp_path / "data", "--listen", f"unix:{tmp_path / 'file'}"), 1)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_store_belongs_to_one_process(tmp_path: Path) -> None:
    """While a server has it, every other command says so and ends with exit 4."""
    with serving(tmp_path / "data") as server:
        server.send("w", Writer("w").file())
        for words in (("serve", "--listen", "127.0.0.1:0"), ("collect",), ("check",), ("replay", GOOD)):
            assert "another server uses" in sentence(run(*words, "--data", tmp_path / "data"), 4)


def test_a_folder_that_cannot_be_a_store_is_one_sentence(tmp_path: Path) -> None:
    """A file, a folder of other things, a damaged and a newer database, a folder that cannot be made."""
    (tmp_path / "file").write_text("x")
    assert "is no folder" in sentence(run("serve", "--data", tmp_path / "file", "--listen", "127.0.0.1:0"), 2)
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.txt").write_text("x")
    assert "holds other things" in sentence(run("replay", GOOD, "--data", tmp_path / "home"), 2)
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["thesis.txt"]
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/state.db").write_bytes(b"no database" * 1000)
    assert "state.db" in sentence(run("serve", "--data", tmp_path / "damaged", "--listen", "127.0.0.1:0"), 8)
    assert "cannot be used" in sentence(run("serve", "--data", "/proc/nothing", "--listen", "127.0.0.1:0"), 4)
    assert "there is no store" in sentence(run("collect", "--data", tmp_path / "nowhere"), 1)
    assert not (tmp_path / "nowhere").exists()


def pages_of(path: Path) -> dict[str, int]:
    """Return where the first page of each table of a database lies."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        return {name: (page - 1) * 4096 for name, page in db.execute("SELECT name, rootpage FROM sqlite_master")}


@contextlib.contextmanager
def rotten(path: Path, at: int) -> Iterator[None]:
    """Let one page of a file be noise while the block runs."""
    with path.open("r+b", buffering=0) as file:
        sound = os.pread(file.fileno(), 4096, at)
        os.pwrite(file.fileno(), b"\xa5" * 4096, at)
        try:
            yield
        finally:
            os.pwrite(file.fileno(), sound, at)


@pytest.fixture
def filled(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """Yield a data folder with one workspace, and a token for it."""
    sender = Sender(name=WorkspaceName("life"))
    with Store(StoreConfig(tmp_path / "data")) as store, Access(tmp_path / "data") as access:
        store.recover()
        sender.send(store, sender.tree(a=b"a", sub__b=b"b"))
        store.catch_up()
        _, token = access.create(DEFAULT, [Scope.PUSH], "", None)
    yield tmp_path / "data", token


def test_a_page_of_a_database_that_rots_is_one_sentence(filled: tuple[Path, str]) -> None:
    """A start that meets it is refused, and `check` names the database: exit 8."""
    data, _ = filled
    for name, table, words in (
        ("state.db", "uploads", ("serve", "--listen", "127.0.0.1:0")),
        ("access.db", "tokens", ("check",)),
    ):
        with rotten(data / name, pages_of(data / name)[table]):
            assert f"{data / name} is damaged" in sentence(run(*words, "--data", data), 8)


def test_a_page_that_rots_under_a_running_server_refuses_what_needs_it(filled: tuple[Path, str]) -> None:
    """Such a request is answered CORRUPT, without a word of the inside; others are answered, and the log says why."""
    data, token = filled
    made, tables, tokens = Writer("w").file(), pages_of(data / "state.db"), pages_of(data / "access.db")["tokens"]
    with serving(data, "--require-token") as stranger, rotten(data / "access.db", tokens):
        for shown in (token, f"{token[:-4]}0000"):
            answer = stranger.showing(shown).get("/api/v1/workspaces/life")
            assert (answer.status, answer.json["code"]) == (500, "CORRUPT")
    with serving(data, "--require-token") as stranger, rotten(data / "state.db", tables["receipts"]):
        server = stranger.showing(token)
        root = server.get("/api/v1/workspaces/life").json["root"]
        for answer in (server.get("/api/v1/workspaces/life/sequences"), server.send("w", made)):
            assert (answer.status, answer.json["code"]) == (500, "CORRUPT")
            assert b"Traceback" not in answer.body
        assert server.get(f"/api/v1/workspaces/life/tree/{root}").status == 200
        assert server.get("/api/v1/workspaces/w").json["sequence"] == 0
    said = server.log.read_text()
    assert "state.db is damaged" in said and "access.db is damaged" in said


def test_settings_come_from_flag_variable_and_file_in_this_order(tmp_path: Path) -> None:
    """A flag beats a variable, which beats the file; what is unknown or wrong is a usage error that names it."""
    settings = tmp_path / "server.toml"
    settings.write_text(f'data = "{tmp_path / "from-file"}"\nlisten = "127.0.0.1:0"\nkeep_sequences = 1\n')
    with started("--config", settings, "--json") as (_, line):
        assert json.loads(line)["data"] == str(tmp_path / "from-file")
    environment = {"DELTASYNC_SERVER_CONFIG": str(settings), "DELTASYNC_SERVER_DATA": str(tmp_path / "from-variable")}
    said = sentence(run("collect", environment=environment), 1)
    assert "from-variable" in said
    assert "from-flag" in sentence(run("collect", "--data", tmp_path / "from-flag", environment=environment), 1)
    settings.write_text("colour = 1\n")
    assert "'colour'" in sentence(run("collect", "--config", settings), 2)
    settings.write_text("keep_sequences = 'many'\n")
    assert "keep_sequences" in sentence(run("collect", "--data", tmp_path, "--config", settings), 2)
    settings.write_text("= broken")
    assert str(settings) in sentence(run("collect", "--config", settings), 2)
    assert "--link" in sentence(run("serve", "--data", tmp_path / "d", "--link", "magic", "--listen", "127.0.0.1:0"), 2)
    assert "--data" in sentence(run("collect", environment={"XDG_DATA_HOME": str(tmp_path)}), 1)
    assert "such option" in sentence(run("serve", "--nonsense"), 2)


def test_version_and_help() -> None:
    """--version is one line, and no command at all is help."""
    assert run("--version").stdout == "deltasync-server 0.1.0\n"
    module = subprocess.run([sys.executable, "-m", "deltasync_server", "--version"], capture_output=True, text=True)
    assert module.stdout == "deltasync-server 0.1.0\n"
    for words in ((), ("--help",), ("-h",)):
        done = run(*words)
        assert done.returncode == 0 and "replay" in done.stdout


def test_a_configuration_file_that_is_not_there_is_named_once(tmp_path: Path) -> None:
    """The sentence has the path once, and no number of the system's."""
    words = ("check", "--data", tmp_path / "data", "--config", tmp_path / "none.toml")
    assert sentence(run(*words), 2) == f"{tmp_path / 'none.toml'} cannot be read: No such file or directory"
    (tmp_path / "bad.toml").write_text("=")
    assert "bad.toml is not TOML: " in sentence(run(*words[:-1], tmp_path / "bad.toml"), 2)


def test_replay_applies_a_chain_and_skips_what_it_has(tmp_path: Path) -> None:
    """The reference chain into an empty store: its root and tree; what was applied is skipped, the rest is applied."""
    half, data = tmp_path / "half", tmp_path / "data"
    half.mkdir()
    names = sorted(path.name for path in GOOD.glob("*.tar.zst"))
    for number, name in enumerate(names[:5]):
        shutil.copy(GOOD / name, half / f"{9 - number}.tar.zst")  # the order is the bundles' own, not their names'
    first = json.loads(run("replay", half, "--data", data, "--json").stdout)
    assert (first["applied"], first["skipped"], first["workspaces"][0]["sequence"]) == (5, 0, 5)
    second = json.loads(run("replay", GOOD, "--data", data, "--json").stdout)
    assert (second["applied"], second["skipped"]) == (5, 5)
    assert second["workspaces"] == [
        {
            "workspace": "life",
            "sequence": 10,
            "root": ROOT,
            "tree_path": str(data / "workspaces/life/tree"),
            "applied": 5,
            "skipped": 5,
        }
    ]
    done = run("replay", GOOD, "--data", data)
    assert done.returncode == 0 and done.stdout == f"life: sequence 10, root {ROOT}, 0 applied, 10 skipped\n"
    assert folders.listing(data / "workspaces/life/tree")["README.md"][0] == "file"
    with serving(data) as server:
        assert server.get("/api/v1/workspaces/life").json["tree_sequence"] == 10


def test_replay_names_a_missing_bundle(tmp_path: Path) -> None:
    """A gap stops with exit 5 and the number; what came before it is applied and in the tree."""
    bundles, data = tmp_path / "bundles", tmp_path / "data"
    shutil.copytree(GOOD, bundles, ignore=shutil.ignore_patterns("*-00000004-*"))
    said = sentence(run("replay", bundles, "--data", data, "-q"), 5)
    assert "bundle 4 of life is missing" in said and "-00000005-" in said
    failed = run("replay", bundles, "--data", data, "--json")
    assert json.loads(failed.stdout)["error"]["expected_sequence"] == 4
    with serving(data) as server:
        assert server.get("/api/v1/workspaces/life").json["tree_sequence"] == 3


def test_replay_into_another_name(tmp_path: Path) -> None:
    """--workspace names where the bundles go; a folder of several workspaces needs it to be one of them."""
    bundles, data = tmp_path / "bundles", tmp_path / "data"
    done = json.loads(run("replay", GOOD, "--data", data, "--workspace", "copy", "--json").stdout)
    assert (done["workspaces"][0]["workspace"], done["workspaces"][0]["root"]) == ("copy", ROOT)
    shutil.copytree(GOOD, bundles)
    (bundles / "x.tar.zst").write_bytes(Writer("other").file().sealed)
    assert "--workspace" in sentence(run("replay", bundles, "--data", data, "--workspace", "third"), 2)
    both = json.loads(run("replay", bundles, "--data", data, "--json").stdout)
    assert [each["workspace"] for each in both["workspaces"]] == ["life", "other"]


def test_replay_refuses_what_is_no_bundle_by_name(tmp_path: Path) -> None:
    """A damaged file stops with its name and exit 8; an empty or absent folder says so."""
    shutil.copytree(GOOD, tmp_path / "bundles")
    (tmp_path / "bundles/broken.tar.zst").write_bytes(b"broken")
    words = sentence(run("replay", tmp_path / "bundles", "--data", tmp_path / "data"), 8)
    assert "broken.tar.zst: B-1" in words and "copy it again" in words
    (tmp_path / "bundles/broken.tar.zst").unlink()
    last = max((tmp_path / "bundles").glob("*.tar.zst"))
    last.write_bytes(last.read_bytes()[:-3])
    words = sentence(run("replay", tmp_path / "bundles", "--data", tmp_path / "data"), 8)
    assert f"{last.name}: B-4" in words and "copy it again" in words
    (tmp_path / "empty").mkdir()
    assert "holds no bundle" in sentence(run("replay", tmp_path / "empty", "--data", tmp_path / "data"), 1)
    assert "no folder" in sentence(run("replay", tmp_path / "absent", "--data", tmp_path / "data"), 2)


def test_replay_refuses_another_history_and_passes_over_a_replaced_one(tmp_path: Path) -> None:
    """A second history is refused by name, exit 5; a bundle that a new epoch replaced is skipped."""
    writer, data, bundles = Writer("w"), tmp_path / "data", tmp_path / "bundles"
    bundles.mkdir()
    first = writer.file("a", b"a")
    replaced = Writer("w", sequence=1, root=writer.root).seal(lambda life: life.file("b", b"discarded"))
    later = Writer("w", epoch="2" * 32, sequence=1, root=writer.root, life=writer.life)
    made = {"1": first, "2-old": replaced, "2-new": later.file("b", b"b"), "3": later.file("c", b"c")}
    for name, each in made.items():
        (bundles / f"{name}.tar.zst").write_bytes(each.sealed)
    done = json.loads(run("replay", bundles, "--data", data, "--json").stdout)
    assert (done["applied"], done["skipped"], done["workspaces"][0]["root"]) == (3, 1, made["3"].root)
    again = json.loads(run("replay", bundles, "--data", data, "--json").stdout)
    assert (again["applied"], again["skipped"]) == (0, 4)
    stranger = Writer("w", epoch="3" * 32)
    stranger.file("x", b"x")
    (bundles / "stranger.tar.zst").write_bytes(stranger.seal(lambda life: life.file("y", b"y")).sealed)
    for folder in (data, tmp_path / "fresh"):
        assert "stranger.tar.zst" in sentence(run("replay", bundles, "--data", folder, "-q"), 5)


def test_collect_and_check_report_what_they_find(tmp_path: Path) -> None:
    """A sound store: exit 0; a damaged blob: named, exit 8; collect says what it would remove, then removes it."""
    data = tmp_path / "data"
    run("replay", GOOD, "--data", data, "-q")
    sound = json.loads(run("check", "--data", data, "--json").stdout)
    assert sound["sound"] and sound["findings"] == [] and sound["blobs"] == 20
    would = json.loads(run("collect", "--data", data, "--keep-sequences", "1", "--dry-run", "--json").stdout)
    assert would["blobs"] > 0 and would["is_dry_run"]
    did = json.loads(run("collect", "--data", data, "--keep-sequences", "1", "--json").stdout)
    assert did["blobs"] == would["blobs"]
    assert json.loads(run("check", "--data", data, "--json").stdout)["blobs"] == 20 - did["blobs"]
    assert "0 blobs" in run("collect", "--data", data, "--keep-sequences", "1").stdout
    victim = next(path for path in (data / "cache").rglob("*") if path.is_file() and path.stat().st_size > 1000)
    victim.chmod(0o644)
    victim.write_bytes(b"x" * victim.stat().st_size)
    failed = run("check", "--data", data)
    assert failed.returncode == 8 and "blob " in failed.stdout and "mended" not in failed.stdout


def test_a_repair_says_how_many_it_mended(tmp_path: Path) -> None:
    """What was mended and what was not are counted; sound is said only of a store where nothing was found."""
    data = tmp_path / "data"
    run("replay", GOOD, "--data", data, "-q")
    lost = [path for path in (data / "workspaces/life/tree").rglob("*") if path.is_file() and path.stat().st_size]
    lost[0].unlink()
    mended = run("check", "--data", data, "--repair")
    assert mended.returncode == 0 and mended.stdout.endswith(": 1 finding, 1 mended\n")
    assert run("check", "--data", data, "--repair").stdout.endswith(": everything is as the rows say\n")


@pytest.mark.parametrize("lacking", ["uvicorn", "fastapi"])
@pytest.mark.parametrize("command", ["serve", "attach"])
def test_a_program_without_the_servers_part_says_how_to_install_it(tmp_path: Path, command: str, lacking: str) -> None:
    """A plain install has the program and not what it serves with: one sentence, exit 2, and no store is made."""
    code = f"import sys; sys.modules[{lacking!r}] = None\nfrom deltasync_server.cli.main import main; main()"
    words = [sys.executable, "-c", code, command, "--data", tmp_path / "data"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert "the server's part is not installed" in sentence(done, 2)
    assert "pipx install --force '.[server]'" in done.stderr and not (tmp_path / "data").exists()


def test_the_status_of_a_store_is_told_beside_a_running_server(tmp_path: Path) -> None:
    """H-49: every byte by its kind, quota, reserves, tenants and workspaces, whoever has the store."""
    data = tmp_path / "data"
    limits = ("--data", data, "--quota", "1G", "--tenant-quota", "100M")
    with serving(data) as server:
        assert server.send("w", Writer("w").file("a", os.urandom(50_000)), "?wait=20").status == 200
        served = json.loads(run("status", *limits, "--json").stdout)
        spoken = run("status", *limits)
    assert served["quota_bytes"] == 1 << 30 and served["disk"]["free_bytes"] > served["disk"]["reserve_bytes"] > 0
    assert served["bytes"]["cache"] == 50_000 and served["held_bytes"] == sum(served["bytes"].values())
    share = {"tenant": "default", "bytes": 50_000, "bytes_limit": 100 << 20, "files": 1, "files_limit": None}
    assert served["tenants"] == [{**share, "workspaces": 1}]
    place = {"tenant": "default", "workspace": "w", "sequence": 1, "tree_sequence": 1, "has_tree": True, "files": 1}
    assert served["workspaces"] == [{**place, "content_bytes": 50_000, "wanted": 0}]
    assert spoken.returncode == 0 and "of 1.0 GiB: cache 48.8 KiB" in spoken.stdout
    assert "tenant default: 48.8 KiB of 100.0 MiB in 1 workspaces, 1 files" in spoken.stdout
    assert "workspace w of default: sequence 1, its tree holds 1, 1 files, 48.8 KiB" in spoken.stdout
    stopped = json.loads(run("status", *limits, "--json").stdout)
    assert (stopped["workspaces"], stopped["tenants"]) == (served["workspaces"], served["tenants"])
    assert "there is no store" in sentence(run("status", "--data", tmp_path / "nowhere"), 1)
    assert not (tmp_path / "nowhere").exists()


def test_a_collection_leaves_nothing_for_a_check_to_find(tmp_path: Path) -> None:
    """After a kill trees are compared again; a collection, even a rehearsal of one, does that before it ends."""
    with serving(tmp_path / "data") as server:
        assert server.send("w", Writer("w").file("a", b"kept\n"), "?wait=20").status == 200
        server.process.kill()
        server.process.wait(SECONDS)
    assert run("collect", "--data", tmp_path / "data", "--dry-run").returncode == 0
    assert json.loads(run("check", "--data", tmp_path / "data", "--json").stdout)["findings"] == []


def test_the_program_never_imports_the_sending_wing() -> None:
    """Every module of the server is loaded without deltasync.cli, deltasync.client and requests."""
    code = """
import pkgutil, importlib, sys, deltasync_server
for found in pkgutil.walk_packages(deltasync_server.__path__, "deltasync_server."):
    if not found.name.endswith("__main__"):
        importlib.import_module(found.name)
wrong = [name for name in sys.modules if name.startswith(("deltasync.cli", "deltasync.client", "requests", "watchdog"))]
assert not wrong, wrong
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_small_commands_do_not_import_the_routes() -> None:
    """check, collect and replay start without FastAPI."""
    code = (
        "import deltasync_server.cli.main, deltasync_server.replay, sys; "
        "assert not {'fastapi', 'uvicorn'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_server_without_tls_loads_nothing_for_it() -> None:
    """What only pairing and certificates need stays out of a server's memory until it is needed."""
    code = "import deltasync_server.http.serve, sys; assert not {'cryptography', 'spake2'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_served_can_be_read_by_other_programs(tmp_path: Path) -> None:
    """Whatever umask the server was started with, the tree's folders and files can be read by the jobs of the host."""
    before = os.umask(0o077)
    try:
        with serving(tmp_path / "data") as server:
            server.send("w", Writer("w").file("a", b"a"), "?wait=20")
    finally:
        os.umask(before)
    tree = server.data / "workspaces/w/tree"
    assert tree.stat().st_mode & 0o777 == 0o755
    assert (tree / "a").stat().st_mode & 0o444 == 0o444


def test_the_log_is_quiet_and_escapes_names(tmp_path: Path) -> None:
    """Good requests leave no line; with --access-log each leaves one, whose path cannot write to the terminal."""
    with serving(tmp_path / "data") as server:
        server.get("/health")
    assert server.log.read_text() == ""
    with serving(tmp_path / "data", "--access-log") as server:
        server.get("/api/v1/workspaces/%1b%5b31m")
    assert "get /api/v1/workspaces/%1b%5b31m" in server.log.read_text().lower()


def test_few_files_are_enough_to_serve_on(tmp_path: Path) -> None:
    """With 64 open files allowed, a hundred connections are refused or wait; when they are gone it serves again."""
    words = ["sh", "-c", 'ulimit -n 64 && exec "$0" "$@"', BINARY, "serve", "--data", tmp_path / "data"]
    with subprocess.Popen([*words, "--listen", "127.0.0.1:0"], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            server = Served(process, tmp_path / "data", process.stdout.readline().split()[-1], tmp_path / "log")
            idle = [server.connect() for _ in range(100)]
            for connection in idle:
                connection.close()
            until(lambda: server.raw(b"GET /health HTTP/1.1\r\nHost: [::1]\r\n\r\n")[0].startswith(b"HTTP/1.1 200"))
            assert server.send("w", Writer("w").file()).status == 200
        finally:
            process.terminate()
        assert process.wait(SECONDS) == 0


def test_a_full_disk_is_507_and_recovers(tmp_path: Path) -> None:
    """A bundle that does not fit is refused with 507 and a time to retry; freed space is used without a restart."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        with serving(disk / "data") as server:
            (disk / "ballast").write_bytes(bytes(16 << 20))
            made = Writer("w").large(10_000_000)
            refused = server.send("w", made)
            assert (refused.status, refused.json["code"]) == (507, "NO_SPACE")
            assert int(refused.headers["retry-after"]) > 0
            assert server.get("/health").status == 200
            (disk / "ballast").unlink()
            assert server.send("w", made, "?wait=20").status == 200
            assert server.get("/api/v1/workspaces/w").json["tree_sequence"] == 1
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_peak_memory_does_not_follow_the_size_of_a_bundle(tmp_path: Path) -> None:
    """A bundle of 160 MB passes through a server that stays under 150 MiB."""
    with serving(tmp_path / "data") as server:
        made = Writer("w").file("large", random.Random(1).randbytes(160_000_000))
        assert server.send("w", made, "?wait=20").status == 200
        assert peak_mib(server) < 150


def peak_mib(server: Served) -> float:
    """Return the most memory that the server held so far."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024
