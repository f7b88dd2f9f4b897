"""A server with TLS, as its operator and its clients meet it: what it says, whom it answers, and how it ends."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import signal
import ssl
import subprocess
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from certificates import NOW, made
from secured import Secured, secured
from serving import BINARY, SECONDS, Writer, until

from deltasync.client.transport import HttpTransport
from deltasync.client.trust import Trust
from deltasync.core.errors import NotOwner, Unauthorized
from deltasync_server.tls import own


def shown_by(server: Secured) -> str:
    """Return the fingerprint of what the server's next handshake has."""
    with server.tls() as connection:
        return hashlib.sha256(connection.getpeercert(binary_form=True) or b"").hexdigest()


def transport(server: Secured, **options: Any) -> contextlib.closing[HttpTransport]:
    url = server.said["listening"]
    return contextlib.closing(HttpTransport(url, trust=server.trust, timeout=SECONDS, max_retries=0, **options))


def test_it_says_by_what_it_is_known_and_stays_so(tmp_path: Path) -> None:
    """The fingerprints that it prints are those of what it shows; a second start has the same ones."""
    with secured(tmp_path, "--tls", "--tls-name", "gpu.example") as server:
        with server.tls() as connection:
            shown = connection.getpeercert(binary_form=True)
        assert shown and hashlib.sha256(shown).hexdigest() == server.said["certificate_sha256"]
        assert b"gpu.example" in shown and connection.version() in (None, "TLSv1.3")
        assert Path(server.said["ca"]) == server.data / "tls/ca.pem"
        first = server.said
    with secured(tmp_path, "--tls") as server:
        assert {**server.said, **{key: first[key] for key in ("listening", "pid")}} == first


def test_people_read_it_below_the_first_line(tmp_path: Path) -> None:
    """The first line is the address; the second has the fingerprints, and the first time where the CA lies."""
    for is_first in (True, False):
        words = [BINARY, "serve", "--data", tmp_path / "data", "--listen", "127.0.0.1:0", "--tls"]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            assert process.stdout.readline().startswith("listening on https://127.0.0.1:")
            told = process.stdout.readline()
            assert told.startswith("certificate SHA-256 ") and "; CA SHA-256 " in told
            assert (str(tmp_path / "data/tls/ca.pem") in told) == is_first
            process.terminate()
            assert process.stdout.read() == ""


def test_an_address_that_others_reach_has_tls(tmp_path: Path) -> None:
    """Nothing needs to be said for TLS where other machines reach the server."""
    with secured(tmp_path, listen="0.0.0.0:0") as server:
        assert server.said["listening"].startswith("https://0.0.0.0:") and "insecure" not in server.said
        with transport(server) as here, pytest.raises(Unauthorized):
            here.health()
        assert server.errors.read_text() == ""


def test_insecure_is_said_aloud(tmp_path: Path) -> None:
    """With --insecure there is no TLS, no certificate, and a line on stderr that says so."""
    with secured(tmp_path, "--insecure", listen="0.0.0.0:0") as server:
        assert server.said["listening"].startswith("http://") and server.said["insecure"] is True
        assert "IS NOT ENCRYPTED" in server.errors.read_text()
        assert not (server.data / "tls").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ["--tls-cert", "x"],
        ["--tls-key", "x"],
        ["--no-tls", "--tls-cert", "x", "--tls-key", "x"],
        ["--tls", "--listen", "unix:/tmp/never"],
        ["--no-tls", "--listen", "[::]:0"],
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path: Path, flags: list[str]) -> None:
    """Exit 2 in one sentence, before anything is made."""
    words = [BINARY, "serve", "--data", tmp_path / "data", "--listen", "127.0.0.1:0", *flags]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
    assert not (tmp_path / "data").exists()


def test_the_operators_certificate_is_shown(tmp_path: Path) -> None:
    """With --tls-cert the server shows that one, makes none, and asks no client for one."""
    given = made("127.0.0.1")
    (tmp_path / "cert").write_text(given.pem)
    (tmp_path / "key").write_text(given.key_pem)
    with secured(tmp_path, "--tls-cert", tmp_path / "cert", "--tls-key", tmp_path / "key") as server:
        assert (server.said["certificate_sha256"], server.said["ca"]) == (given.sha256, None)
        trust = Trust(fingerprint=given.sha256)
        with contextlib.closing(HttpTransport(server.said["listening"], trust=trust)) as here:
            assert here.health().status
        assert not (server.data / "tls").exists()


def test_old_tls_and_plain_http_get_nothing(tmp_path: Path) -> None:
    """TLS 1.1 ends in an alert, plain http in a closed connection, and the next client is served."""
    with secured(tmp_path, "--tls") as server:
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        old.set_ciphers("ALL:@SECLEVEL=0")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
        with (
            server.plain() as plain,
            pytest.raises(ssl.SSLError),
        ):
            old.wrap_socket(plain)
        with server.plain() as plain:
            plain.sendall(b"GET /health HTTP/1.1\r\nHost: [::1]\r\n\r\n")
            with contextlib.suppress(ConnectionResetError):
                assert not plain.recv(100).startswith(b"HTTP")
        with transport(server) as here:
            assert here.health().status
        assert "Traceback" not in server.errors.read_text()


def test_a_slow_handshake_and_a_slow_head_are_ended(tmp_path: Path) -> None:
    """Who connects and says nothing is cut off in time, before the handshake and after it."""
    (tmp_path / "server.toml").write_text("header_seconds = 0.5\nhandshake_seconds = 0.5\n")
    with secured(tmp_path, "--tls", "--config", tmp_path / "server.toml") as server:
        with server.plain() as silent, contextlib.suppress(ConnectionResetError):
            assert silent.recv(1) == b""
        with server.tls() as silent:
            assert silent.recv(12).startswith(b"HTTP/1.1 408")


def test_handshakes_count_as_connections(tmp_path: Path) -> None:
    """Beyond its number of connections, with those in their handshake, one is closed at once; later there is room."""
    (tmp_path / "server.toml").write_text("connections = 4\n")
    with secured(tmp_path, "--tls", "--config", tmp_path / "server.toml") as server:
        with server.tls() as idle, contextlib.ExitStack() as silent:
            idle.sendall(b"GET /health HTTP/1.1\r\nHost: [::1]\r\n\r\n")
            assert idle.recv(12) == b"HTTP/1.1 200"
            held = [silent.enter_context(server.plain()) for _ in range(3)]
            with server.plain() as beyond, contextlib.suppress(ConnectionResetError):
                assert beyond.recv(1) == b""
            for each in held:
                each.settimeout(0.05)
                with pytest.raises(TimeoutError):
                    each.recv(1)
        with transport(server) as here:
            here.max_retries = 9
            assert here.health().status


def test_a_certificate_that_is_soon_over_is_renewed_while_the_server_runs(tmp_path: Path) -> None:
    """The next handshake has another certificate of the same CA; open connections go on, and the operator is told."""
    (tmp_path / "server.toml").write_text("renewal_seconds = 0.1\n")
    with secured(tmp_path, "--tls", "--config", tmp_path / "server.toml") as server, server.tls() as before:
        (server.data / "tls/server.pem").unlink()
        old = own(server.data, [], NOW - timedelta(days=350)).certificate_sha256
        until(lambda: shown_by(server) not in (server.said["certificate_sha256"], old))
        before.sendall(b"GET /health HTTP/1.1\r\nHost: [::1]\r\n\r\n")
        assert before.recv(12) == b"HTTP/1.1 200"
        until(lambda: f"renewed; its SHA-256 is {shown_by(server)} now" in server.errors.read_text())


def test_a_signal_ends_it_with_connections_open(tmp_path: Path) -> None:
    """An idle connection and one in its handshake do not keep the server: exit 0 in less than 10 s."""
    with secured(tmp_path, "--tls") as server, server.tls() as idle:
        with server.plain():
            idle.sendall(b"GET /health HTTP/1.1\r\nHost: [::1]\r\n\r\n")
            assert idle.recv(12) == b"HTTP/1.1 200"
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(10) == 0
        assert "Traceback" not in server.errors.read_text()


def test_a_bundle_comes_over_tls_and_a_refusal_comes_early(tmp_path: Path) -> None:
    """A bundle is applied; one that another client may not send is refused in words while most of it is on its way."""
    with secured(tmp_path, "--tls") as server, transport(server) as here:
        mine = Writer("w").file()
        assert here.send_bundle("w", bytes.fromhex(mine.identity), iter([mine.sealed])).root == mine.root
        other = Writer("w", client_id="b" * 32, epoch="2" * 32)
        large = other.large(3 << 20)
        endless = (large.sealed if number == 0 else bytes(1 << 20) for number in range(200))
        here._pace.note(1 << 30)  # a quick way: bundles go whole
        with pytest.raises(NotOwner):
            here.send_bundle("w", bytes.fromhex(large.identity), endless)
        assert here.sent_bytes < 100 << 20


def test_requests_on_one_connection_stay_apart(tmp_path: Path) -> None:
    """A connection that is kept serves one request after another."""
    with secured(tmp_path, "--tls") as server:
        connection = http.client.HTTPSConnection("127.0.0.1", server.port, context=server.trust.context())
        for _ in range(3):
            connection.request("GET", "/health")
            assert json.loads(connection.getresponse().read())["status"]
        connection.close()
