"""Servers by name, as a user meets them: added, used in place of an address, trusted or refused, forgotten."""

from __future__ import annotations

import http.client
import json
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import folders
import pytest
from certificates import made, presenting
from hostile_server import hostile, refusal
from serving import BINARY, serving, until
from user import User


@dataclass
class Host:
    """A server with TLS."""

    url: str
    data: Path
    sha256: str
    token: str

    @property
    def ca(self) -> Path:
        return self.data / "tls/ca.pem"


@contextmanager
def served(data: Path, listen: str, *flags: str) -> Iterator[Host]:
    """Serve while the block runs."""
    words = [BINARY, "serve", "--data", data, "--listen", listen, "--json", *flags]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            said = json.loads(process.stdout.readline())
            made = [BINARY, "token", "create", "--data", data]
            token = subprocess.run(made, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
            yield Host(said["listening"], data, said["certificate_sha256"], token)
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """One server that other machines can reach."""
    with served(tmp_path_factory.mktemp("host") / "data", "0.0.0.0:0") as host:
        yield host


@pytest.fixture
def user(tmp_path: Path) -> User:
    """A user with an empty home."""
    return User(tmp_path / "home")


@pytest.fixture
def folder(user: User, request: pytest.FixtureRequest) -> Path:
    """A folder with one of everything."""
    root = user.home / f"w{abs(hash(request.node.nodeid)):x}"
    root.mkdir()
    folders.life(root)
    return root


def add(user: User, host: Host, *words: str | Path) -> None:
    (user.home / "token").write_text(host.token + "\n")
    done = user.run("host", "add", "gpu", host.url, "--token-file", "token", *words)
    assert done.code == 0, done


def test_a_name_stands_for_its_address_everywhere(user: User, host: Host, folder: Path) -> None:
    """push, status, verify, doctor and fetch take a name; the folder remembers the address, and needs none again."""
    add(user, host, "--ca", host.ca)
    assert user.run("push", folder, "--to", "gpu").code == 0
    assert host.url in (folder / ".deltasync/remote").read_text()
    status = user.run("status", folder, "--json").json
    assert status["in_sync"] is True and status["server"]["url"] == host.url and status["server"]["insecure"] is False
    for words in (
        ["push", folder],
        ["verify", folder],
        ["doctor", folder],
        ["status", "--to", "gpu", "--workspace", folder.name],
        ["fetch", "--from", "gpu", "--workspace", folder.name, "back"],
    ):
        done = user.run(*words)
        assert done.code == 0, done
    assert user.run("push", folder, DELTASYNC_TO="gpu").code == 0


def test_a_watcher_trusts_what_the_book_says(user: User, host: Host, folder: Path) -> None:
    """A watcher reaches a named server over TLS."""
    add(user, host, "--fingerprint", host.sha256)
    with user.start("watch", folder, "--to", "gpu", "--json") as watcher:
        assert watcher.stdout
        events = (json.loads(line)["event"] for line in watcher.stdout)
        assert next(each for each in events if each in ("sent", "offline", "trouble")) == "sent"
        watcher.terminate()
        assert watcher.wait(20) == 0


@pytest.mark.parametrize("how", ["rotated", "added anew"])
def test_a_watcher_goes_on_with_another_token(user: User, host: Host, folder: Path, how: str) -> None:
    """What the server refuses is sealed and waits; once the book has a good token it is sent, without a restart."""

    def token() -> str:
        words = [BINARY, "token", "create", "--data", host.data]
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout.strip()

    first = token()
    add(user, replace(host, token=first), "--fingerprint", host.sha256)
    with user.start("watch", folder, "--to", "gpu", "--json") as watcher:
        assert watcher.stdout
        events = (json.loads(line)["event"] for line in watcher.stdout)
        assert next(each for each in events if each in ("sent", "offline", "trouble")) == "sent"
        if how == "rotated":
            assert user.run("host", "rotate", "gpu").code == 0
        else:
            revoke = [BINARY, "token", "revoke", first.split("_")[1], "--data", host.data]
            subprocess.run(revoke, check=True, timeout=60, capture_output=True)
        (folder / "more").write_text("more")
        assert next(each for each in events if each in ("sent", "offline", "trouble")) == "offline"
        if how != "rotated":
            assert user.run("host", "rm", "gpu").code == 0
            add(user, replace(host, token=token()), "--fingerprint", host.sha256)
        assert next(each for each in events if each in ("sent", "trouble")) == "sent"
        watcher.terminate()
        assert watcher.wait(20) == 0
    until((host.data / "workspaces" / folder.name / "tree/more").exists)


def test_a_push_after_a_rotation_that_broke_off_says_how_to_finish_it(user: User, host: Host, folder: Path) -> None:
    """The server has the new token, the book still shows the old one; the sentence names the command that mends it."""
    words = [BINARY, "token", "create", "--data", host.data]
    first = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    add(user, replace(host, token=first), "--fingerprint", host.sha256)
    assert user.run("push", folder, "--to", "gpu").code == 0
    record = user.home / "own/hosts/gpu.json"
    before = json.loads(record.read_text())
    assert user.run("host", "rotate", "gpu").code == 0
    fresh = json.loads(record.read_text())["token"]
    record.write_text(json.dumps({**before, "next_token": fresh}))  # as it was when the answer did not come
    refused = user.run("push", folder)
    assert refused.code == 7 and "broken off; run `deltasync host rotate gpu` to finish it" in refused.err
    assert fresh not in refused.err
    assert user.run("host", "rotate", "gpu").code == 0
    assert user.run("push", folder).code == 0


def test_a_watcher_waits_while_another_answers(user: User, folder: Path, tmp_path: Path) -> None:
    """Where another server answers meanwhile a watcher sends it nothing, and goes on when its own is back."""
    with served(tmp_path / "data", "127.0.0.1:0", "--tls") as first:
        add(user, first, "--ca", first.ca)
        port = int(first.url.rpartition(":")[2])
        watcher = user.start("watch", folder, "--to", "gpu", "--json")
        assert watcher.stdout
        events = (json.loads(line) for line in watcher.stdout)
        assert next(each for each in events if each["event"] in ("sent", "offline"))["event"] == "sent"
        assert user.run("push", folder).code == 0  # the watcher asks nothing more
    with presenting(made("127.0.0.1").context(tmp_path), b"", port=port) as seen:
        (folder / "more").write_text("more")
        offline = next(each for each in events if each["event"] in ("offline", "stopped"))
        assert offline["event"] == "offline" and "than what is pinned" in offline["sentence"]
    assert seen.requests == []
    with served(tmp_path / "data", f"127.0.0.1:{port}", "--tls"):
        assert next(each for each in events if each["event"] in ("sent", "stopped"))["event"] == "sent"
    watcher.terminate()
    watcher.communicate(timeout=20)


def test_a_server_that_nobody_vouches_for_is_not_added(user: User, host: Host) -> None:
    """Without --ca and --fingerprint it says what the server shows and how to add it; that command works."""
    done = user.run("host", "add", "gpu", host.url, "--json")
    assert (done.code, done.json["error"]["fingerprint"]) == (7, host.sha256)
    assert f"deltasync host add gpu {host.url} --fingerprint {host.sha256}" in done.err
    assert user.run("host", "ls", "--json").json == {"hosts": []}
    add(user, host, "--fingerprint", host.sha256.upper())
    assert user.run("host", "ls", "--json").json["hosts"][0]["certificate_sha256"] == host.sha256


def test_a_token_is_kept_and_shown_to_nobody(user: User, host: Host, folder: Path) -> None:
    """From a file or from stdin it goes into the book alone: no output, state or log has it."""
    add(user, host, "--ca", host.ca)
    done = [
        user.run("host", "ls"),
        user.run("host", "ls", "--json"),
        user.run("push", folder, "--to", "gpu", "-v"),
        user.run("push", folder, "--json"),
        user.run("status", folder, "--json"),
        user.run("push", folder, "--to", "gpu", DELTASYNC_TOKEN=f"two {host.token}"),
    ]
    assert [each.code for each in done] == [0] * 6, done
    assert not any(host.token in each.out + each.err for each in done)
    holders = [each for each in user.home.rglob("*") if each.is_file() and host.token.encode() in each.read_bytes()]
    assert sorted(holders) == sorted([user.home / "token", user.home / "own/hosts/gpu.json"])


def test_the_environments_token_reaches_only_who_was_named_with_it(user: User, folder: Path) -> None:
    """It goes to the server in DELTASYNC_TO, or in --to without that; not to one that is remembered or in a file."""
    token, shown = "canary-9d20", list[bool]()
    with serving(user.home / "data") as real, hostile(real.port) as seen:
        seen.lie = refusal("UNAUTHORIZED", 401)

        def run(*words: str | Path, **variables: str) -> str:
            before = len(seen.asked)
            done = user.run(*words, DELTASYNC_TOKEN=token, **variables)
            assert done.code == 7 and token not in done.out + done.err and len(seen.asked) > before
            shown.append(all(f"Bearer {token}" == each.headers.get("authorization") for each in seen.asked[before:]))
            assert ("DELTASYNC_TOKEN was not shown" in done.err) != shown[-1]
            return done.err

        run("push", folder, "--to", seen.url)
        run("push", folder)  # the state remembers the address
        run("push", folder, DELTASYNC_TO=seen.url)
        run("status", folder, DELTASYNC_TO=f"{seen.url}/")
        run("push", folder, "--to", seen.url, DELTASYNC_TO="http://127.0.0.1:9")
        run("fetch", "--from", seen.url, "--workspace", "w", user.home / "dest")
        (user.home / "own/config.toml").write_text(f'to = "{seen.url}"\n')
        run("push", folder)
    assert shown == [True, False, True, True, False, True, False]


def test_a_token_that_only_reads_fetches_and_does_not_push(user: User, folder: Path) -> None:
    """Scope `read` is enough for all that a fetch asks for; a push is refused (7), and the server's tree stays."""
    with serving(user.home / "data", "--require-token") as real:

        def token(scope: str) -> str:
            words = [BINARY, "token", "create", "--data", real.data, "--scope", scope]
            return subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout.strip()

        where = ("--workspace", "w", "--json")
        assert user.run("push", folder, "--to", real.url, *where, DELTASYNC_TOKEN=token("push")).code == 0
        reader, dest = token("read"), user.home / "dest"
        done = user.run("fetch", "--from", real.url, *where, dest, DELTASYNC_TOKEN=reader)
        assert done.code == 0 and done.json["verified"] and done.json["fetched_bytes"]
        folders.assert_same(folder, dest)
        other = user.home / "other"
        folders.write(other, "mine", b"1")
        pushed = user.run("push", other, "--to", real.url, "--workspace", "v", DELTASYNC_TOKEN=reader)
        assert pushed.code == 7 and "it lacks the scope 'push'" in pushed.err
        assert not (real.data / "workspaces/v").exists()


def test_no_traceback_has_a_token(user: User, host: Host, folder: Path) -> None:
    """What nobody foresaw, with the token in hand: neither error.log nor the traceback of -v has it."""
    add(user, host, "--ca", host.ca)
    assert user.run("push", folder, "--to", "gpu").code == 0
    (folder / ".deltasync/outbox").write_text("in the way")
    (folder / "new").write_text("new")
    for words in (["--keep-sent", "1d"], ["--keep-sent", "1d", "-v"]):
        done = user.run("push", folder, *words)
        assert done.code == 1 and host.token.rpartition("_")[2] not in done.out + done.err, done
    assert "Traceback" in done.err
    log = (user.home / "own/error.log").read_text()
    assert "Traceback" in log and host.token.rpartition("_")[2] not in log


def test_stdin_gives_a_token(user: User, host: Host) -> None:
    """--token-file - reads one line."""
    words = [BINARY.with_name("deltasync"), "host", "add", "gpu", host.url, "--ca", host.ca, "--token-file", "-"]
    subprocess.run(
        words, input=host.token, text=True, check=True, env=user.environment, capture_output=True, timeout=60
    )
    assert user.run("host", "ls", "--json").json["hosts"][0]["has_token"] is True


def test_what_is_forgotten_is_not_trusted(user: User, host: Host, folder: Path) -> None:
    """After `host rm` the remembered address proves nothing any more: exit 7, in one sentence."""
    add(user, host, "--ca", host.ca)
    assert user.run("push", folder, "--to", "gpu").code == 0
    assert user.run("host", "rm", "gpu").code == 0
    done = user.run("push", folder)
    assert (done.code, done.out) == (7, "") and "nothing that is trusted here vouches for" in done.err
    assert user.run("status", folder).code == 7
    assert user.run("host", "rm", "gpu").code == 1


def test_mistakes_are_usage_errors(user: User, host: Host, folder: Path) -> None:
    """Each is one sentence with exit 2, and nothing is kept."""
    (user.home / "nonsense").write_text("nonsense")
    for words, says in (
        (["host", "add", "gpu", host.url, "--ca", host.ca, "--fingerprint", host.sha256], "not by both"),
        (["host", "add", "gpu", host.url, "--ca", "nonsense"], "no certificate as PEM"),
        (["host", "add", "gpu", host.url, "--ca", "none"], "cannot be read"),
        (["host", "add", "gpu", host.url, "--fingerprint", "12"], "64 hexadecimal digits"),
        (["host", "add", "gpu", "file:///x"], "is no server"),
        (["host", "add", "gpu", "http://127.0.0.1:1", "--ca", host.ca], "has no certificate"),
        (["host", "add", "gpu", "http://192.0.2.1:1"], "is not encrypted"),
        (["host", "add", "gpu", "192.0.2.1:1", "1-AAAA-AAAA"], "with a code write https://host:port"),
        (
            ["host", "add", "gpu", "http://127.0.0.1:1", "482913-K3QM-9XZ2"],
            "only over https://; for http://127.0.0.1:1",
        ),
        (["host", "add", "a/b", host.url, "--ca", host.ca], "is no name for a host"),
        (["push", folder, "--to", "gpu"], "gpu is no known host (none is known yet)"),
        (["fetch", "--from", "gpu", "--workspace", "w", "d"], "gpu is no known host"),
        (["push", folder, "--to", "http://192.0.2.1:1"], "is not encrypted"),
    ):
        done = user.run(*words)
        assert (done.code, done.out, done.err.count("\n")) == (2, "", 1) and says in done.err, done
    assert user.run("host", "ls", "--json").json == {"hosts": []}


def test_a_server_says_how_a_token_is_had(user: User, host: Host, folder: Path, tmp_path: Path) -> None:
    """Without TLS no code helps: it names `token create` and --token-file, which lets in; with TLS `pair`."""
    with serving(tmp_path / "data", "--require-token") as plain:
        told = user.run("push", folder, "--to", plain.url)
        assert told.code == 7 and "`deltasync-server token create` there" in told.err and "pair" not in told.err
        made = [BINARY, "token", "create", "--data", plain.data]
        token = subprocess.run(made, capture_output=True, text=True, check=True, timeout=60).stdout
        (user.home / "token").write_text(token)
        assert user.run("host", "add", "lo", plain.url, "--token-file", "token").code == 0
        assert user.run("push", folder, "--to", "lo").code == 0
    bad = http.client.HTTPSConnection(host.url.removeprefix("https://"), context=ssl._create_unverified_context())
    with closing(bad):
        bad.request("GET", "/api/v1/workspaces")
        detail = json.loads(bad.getresponse().read())["detail"]
    assert "`deltasync-server pair` there" in detail and "token create" not in detail


def test_insecure_is_said_each_time(user: User, folder: Path, tmp_path: Path) -> None:
    """Plain http to another machine needs --insecure or its variable, and says what that means every time."""
    words = [
        BINARY,
        "serve",
        "--data",
        tmp_path / "data",
        "--listen",
        "0.0.0.0:0",
        "--insecure",
        "--no-require-token",
        "--json",
    ]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            url = json.loads(process.stdout.readline())["listening"]
            assert user.run("push", folder, "--to", url).code == 2
            for done in (
                user.run("push", folder, "--to", url, "--insecure"),
                user.run("push", folder, DELTASYNC_INSECURE="1"),
                user.run("status", folder, "--insecure"),
            ):
                assert done.code == 0 and "everybody on the way can read and change it" in done.err
            assert user.run("status", folder, "--insecure", "--json").json["server"]["insecure"] is True
        finally:
            process.terminate()


def test_a_code_is_all_that_a_client_needs(user: User, folder: Path, tmp_path: Path) -> None:
    """The README's rented box: pair, push, rotate, forget; what is shown of it has no secret, and what ends is over."""
    with served(tmp_path / "data", "0.0.0.0:0") as host:
        made = [BINARY, "pair", "--data", host.data, "--label", "laptop"]
        code = subprocess.run(made, capture_output=True, text=True, check=True, timeout=60).stdout.split()[0]
        assert user.run("push", folder, "--to", host.url).code == 7
        done = [
            user.run("host", "add", "box", host.url, code),
            user.run("push", folder, "--to", "box"),
            user.run("host", "ls", "--json"),
            user.run("host", "rotate", "box"),
            user.run("status", folder),
        ]
        assert [each.code for each in done] == [0] * 5, done
        assert done[2].json["hosts"][0]["has_client_certificate"] is True
        record = json.loads((user.home / "own/hosts/box.json").read_text())
        assert not any(record["token"].rpartition("_")[2] in each.out + each.err for each in done)
        assert (user.home / "own/hosts/box.json").stat().st_mode & 0o777 == 0o600
        folders.assert_same(folder, host.data / "workspaces" / folder.name / "tree")
        assert user.run("host", "add", "again", host.url.replace("0.0.0.0", "localhost"), code).code == 7
        assert user.run("host", "rm", "box", "--json").json == {"removed": "box", "token_ended": True}
        assert user.run("push", folder).code == 7
        listed = subprocess.run(
            [BINARY, "token", "ls", "--data", host.data], capture_output=True, text=True, timeout=60
        )
        assert [line.split()[1] for line in listed.stdout.splitlines()] == ["good", "revoked"]
