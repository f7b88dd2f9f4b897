"""Pairing over real sockets: who knows the code gets in, once; who stands between or listens gets nothing."""

from __future__ import annotations

import contextlib
import json
import socket
import sqlite3
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest
from certificates import made
from secured import Secured, secured
from serving import BINARY, SECONDS, Writer, serving

from deltasync.client import pairing
from deltasync.client.hosts import Host, HostBook
from deltasync.client.transport import HttpTransport
from deltasync.client.trust import Trust
from deltasync.core import wire
from deltasync.core.errors import HostBusy, HostUntrusted, Unauthorized, UsageError
from deltasync.core.hashing import digest_of
from deltasync.core.pairing import CODE_BYTES, Code, Exchange, Side, is_same, new_code, parse_code


def command(data: Path, *words: str) -> dict[str, Any]:
    done = subprocess.run(
        [BINARY, *words, "--data", data, "--json"], capture_output=True, text=True, check=True, timeout=60
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def code_of(data: Path, *words: str) -> Code:
    return parse_code(command(data, "pair", *words)["code"])


def tokens(data: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = command(data, "token", "ls")["tokens"]
    return found


def paired(server: Secured, code: Code, url: str | None = None) -> Host:
    return pairing.pair("box", url or server.said["listening"], code, SECONDS)


def opened(url: str, trust: Trust, token: str | None = None) -> contextlib.closing[HttpTransport]:
    return contextlib.closing(HttpTransport(url, trust=trust, token=token, timeout=SECONDS, max_retries=0))


def is_welcome(host: Host, *, with_token: bool = True, with_certificate: bool = True) -> bool:
    trust = host.trust if with_certificate else Trust(host.ca_pem, host.fingerprint)
    with opened(host.url, trust, host.token if with_token else None) as transport:
        try:
            transport.health()
        except Unauthorized:
            return False
    return True


def other(code: Code) -> Code:
    """Return a wrong code for the same pairing."""
    return code._replace(secret=code.secret[1:] + ("0" if code.secret[0] != "0" else "1"))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Secured]:
    with secured(tmp_path, "--tls", "--require-token") as served:
        yield served


def test_codes_are_read_as_people_write_them() -> None:
    """Forty bits in eight letters; case, gaps and letters that look alike do not matter; anything else is refused."""
    assert str(new_code(7, bytes(CODE_BYTES))) == "7-0000-0000"
    assert str(new_code(12, b"\xff" * CODE_BYTES)) == "12-ZZZZ-ZZZZ"
    assert len({new_code(1, number.to_bytes(CODE_BYTES, "big")) for number in range(0, 2**40, 2**33 + 7)}) == 128
    for text in ("7-K3QM-10Z2", "7-k3qm-loz2", " 7-K3QMIOZ2 "):
        assert parse_code(text) == Code(7, "K3QM10Z2")
    for text in ("", "7", "K3QM-9XZ2", "7-K3QM-9XZ", "7-K3QM-9XZU", "7-K3QM-9XZ22", "-7-K3QM-9XZ2", "7-K3QM-9XZ2\n7"):
        with pytest.raises(UsageError):
            parse_code(text)


def test_both_sides_agree_only_on_the_same_code_and_certificate() -> None:
    """Another code, another certificate or a changed message gives other confirmations, on either side."""

    def confirmations(code: Code, certificate: bytes) -> list[bool]:
        client = Exchange(Side.CLIENT, Code(1, "K3QM9XZ2"), b"c" * 32)
        host = Exchange(Side.SERVER, code, certificate)
        here, there = client.finish(host.message), host.finish(client.message)
        return [is_same(here.of_client, there.of_client), is_same(here.of_server, there.of_server)]

    assert confirmations(Code(1, "K3QM9XZ2"), b"c" * 32) == [True, True]
    assert confirmations(Code(1, "K3QM9XZ3"), b"c" * 32) == [False, False]
    assert confirmations(Code(2, "K3QM9XZ2"), b"c" * 32) == [False, False]
    assert confirmations(Code(1, "K3QM9XZ2"), b"d" * 32) == [False, False]
    for wrong in (b"", b"B" * 33, b"A" + bytes(32), bytes(33), b"B" + b"\xff" * 32, b"B" + b"\x01" + bytes(31)):
        with pytest.raises(Unauthorized):
            Exchange(Side.CLIENT, Code(1, "K3QM9XZ2"), b"c" * 32).finish(wrong)
    mine = Exchange(Side.CLIENT, Code(1, "K3QM9XZ2"), b"c" * 32)
    with pytest.raises(Unauthorized):
        mine.finish(mine.message)


def test_who_knows_the_code_gets_a_token_and_a_certificate(server: Secured) -> None:
    """The CA is pinned; the token and the certificate each let in by themselves, as the tenant that was named."""
    host = paired(server, code_of(server.data, "--tenant", "ada", "--label", "laptop"))
    assert host.ca_pem == (server.data / "tls/ca.pem").read_text() and host.fingerprint is None
    assert is_welcome(host) and is_welcome(host, with_certificate=False) and is_welcome(host, with_token=False)
    assert not is_welcome(host, with_token=False, with_certificate=False)
    (row,) = tokens(server.data)
    assert (row["state"], row["tenant"], row["label"], row["scopes"]) == ("good", "ada", "laptop", "push")
    made_here = Writer("media").file("a", b"content")
    with opened(host.url, host.trust) as transport:  # by its certificate alone
        transport.send_bundle("media", made_here.metadata.identity, iter([made_here.sealed]), wait=20)
    assert (server.data / "tenants/ada/workspaces/media/tree/a").read_bytes() == b"content"


def test_a_code_is_good_once(server: Secured) -> None:
    """Whoever comes second with it gets nothing."""
    code = code_of(server.data)
    paired(server, code)
    with pytest.raises(Unauthorized):
        paired(server, code)
    assert len(tokens(server.data)) == 1


def test_a_code_can_be_tried_five_times(server: Secured) -> None:
    """Then it is over, also for whoever has it; other codes are not concerned."""
    code, another = code_of(server.data), code_of(server.data)
    for _ in range(5):
        with pytest.raises(Unauthorized):
            paired(server, other(code))
    with pytest.raises(Unauthorized):
        paired(server, code)
    for number in (0, 99):
        with pytest.raises((Unauthorized, UsageError)):
            paired(server, another._replace(number=number))
    assert is_welcome(paired(server, another))


def test_a_stranger_does_not_use_up_a_code(server: Secured) -> None:
    """The number is not to be guessed, and whoever looks for it is told to wait; it is good for who was told."""
    numbers = [code_of(server.data).number for _ in range(3)]
    assert len(set(numbers)) == 3 and min(numbers) >= 100_000 and numbers != list(range(numbers[0], numbers[0] + 3))
    body = msgspec.json.encode(wire.PairingRequest(message=Exchange(Side.CLIENT, Code(1, ""), b"").message.hex()))
    answers = []
    with opened(server.said["listening"], server.trust) as transport:
        for number in range(1, 31):
            with pytest.raises((Unauthorized, HostBusy)) as caught:
                transport.ask(wire.PairingAnswer, "POST", f"/pairings/{number}", body=body)
            answers.append(type(caught.value))
    assert answers == [Unauthorized] * 20 + [HostBusy] * 10


def test_a_code_ends_with_its_time(server: Secured) -> None:
    """After --for it is as if it had never been."""
    with pytest.raises(Unauthorized):
        paired(server, code_of(server.data, "--for", "0s"))


def test_a_token_that_never_reached_its_client_ends(server: Secured) -> None:
    """The answer was lost, or the server died before it: nobody has the token, and after its time it is worth nothing.

    One that was used once stays, whatever its scope.
    """
    code, url, (_, public) = code_of(server.data), server.said["listening"], pairing._new_key()
    certificate = server.said["certificate_sha256"]
    with opened(url, Trust(fingerprint=certificate)) as transport:
        lost = pairing._exchanged(transport, code, bytes.fromhex(certificate), public)
    used = [paired(server, code_of(server.data)), paired(server, code_of(server.data, "--scope", "run"))]
    with contextlib.closing(sqlite3.connect(server.data / "access.db", isolation_level=None)) as db:
        over = "UPDATE tokens SET claim_by = 1 WHERE claim_by BETWEEN created_at + 600 AND created_at + 601"
        assert db.execute(over).rowcount == 1
    with opened(url, server.trust, lost.token) as transport, pytest.raises(Unauthorized, match="expired"):
        transport.health()
    assert sorted(row["state"] for row in tokens(server.data)) == ["expired", "good", "good"]
    assert is_welcome(used[0]) and is_welcome(used[0], with_token=False)


def test_codes_and_what_came_of_them_survive_a_restart(tmp_path: Path) -> None:
    """Pending, paired and revoked are what they were; a code that was tried too often stays closed."""
    data = tmp_path / "data"
    with secured(tmp_path, "--tls", "--require-token") as server:
        pending, closed = code_of(data), code_of(data)
        for _ in range(5):
            with pytest.raises(Unauthorized):
                paired(server, other(closed))
        host = paired(server, code_of(data))
        gone = paired(server, code_of(data))
        assert pairing.unpair(gone, SECONDS) and not pairing.unpair(gone, SECONDS)
    with secured(tmp_path, "--tls", "--require-token") as server:
        url = server.said["listening"]
        assert is_welcome(msgspec.structs.replace(host, url=url))
        gone = msgspec.structs.replace(gone, url=url)
        assert not is_welcome(gone) and not is_welcome(gone, with_token=False)
        with pytest.raises(Unauthorized):
            paired(server, closed)
        assert is_welcome(paired(server, pending))


@contextmanager
def between(server: Secured, tmp_path: Path, seen: bytearray, context: ssl.SSLContext | None) -> Iterator[str]:
    """Pass everything on between a client and a server, with another certificate or, without one, as it comes."""
    listener = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while content := source.recv(1 << 16):
                seen.extend(content)
                target.sendall(content)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def run() -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            with contextlib.suppress(OSError):
                if context is None:
                    far: socket.socket = server.plain()
                else:
                    near, far = context.wrap_socket(near, server_side=True), server.tls()
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=pump, args=ends, daemon=True).start()

    threading.Thread(target=run, daemon=True).start()
    try:
        yield f"https://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()


def test_whoever_stands_between_with_another_certificate_is_found_out(server: Secured, tmp_path: Path) -> None:
    """The code is right and every message is passed on; the certificate is not the server's, so nobody is let in."""
    context = made("127.0.0.1").context(tmp_path)
    seen = bytearray()
    code = code_of(server.data)
    with between(server, tmp_path, seen, context) as url, pytest.raises(Unauthorized):
        paired(server, code, url)
    assert b"/confirm" in seen and b'"token"' not in seen
    assert tokens(server.data) == []
    assert is_welcome(paired(server, code))  # the try is gone, the code is not


def test_a_false_server_is_not_believed(tmp_path: Path) -> None:
    """One that does not know the code answers with a token and a CA of its own: neither is kept."""
    context = made("127.0.0.1").context(tmp_path)

    class False_(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            if self.path.endswith("/confirm"):
                body = msgspec.json.encode(wire.Paired(confirmation="0" * 64, token="dst_false", ca="mine"))
            else:
                mine = Exchange(Side.SERVER, Code(1, "00000000"), bytes(32)).message
                body = msgspec.json.encode(wire.PairingAnswer(exchange="x", message=mine.hex()))
            self.send_response(200)
            self.send_header("Deltasync-Server", "1")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), False_) as fake:
        fake.socket = context.wrap_socket(fake.socket, server_side=True)
        threading.Thread(target=fake.serve_forever, daemon=True).start()
        with pytest.raises(HostUntrusted):
            pairing.pair("box", f"https://127.0.0.1:{fake.server_port}", Code(1, "K3QM9XZ2"), SECONDS)
        fake.shutdown()


def test_a_recorded_pairing_cannot_be_played_again(server: Secured) -> None:
    """The same messages a second time: the exchange is over, and a new one has another key."""
    code = code_of(server.data)
    certificate = bytes.fromhex(server.said["certificate_sha256"])
    mine = Exchange(Side.CLIENT, code, certificate)
    first = msgspec.json.encode(wire.PairingRequest(message=mine.message.hex()))
    _, public = pairing._new_key()
    with opened(server.said["listening"], server.trust) as transport:

        def ask(kind: type, path: str, body: bytes) -> Any:
            return transport.ask(kind, "POST", f"/pairings/{code.number}{path}", body=body)

        begun = ask(wire.PairingAnswer, "", first)
        wanted = mine.finish(bytes.fromhex(begun.message))
        proof = wire.PairingConfirm(exchange=begun.exchange, confirmation=wanted.of_client.hex(), public_key=public)
        again = ask(wire.PairingAnswer, "", first)  # recorded before the code was used
        replayed = msgspec.structs.replace(proof, exchange=again.exchange)
        with pytest.raises(Unauthorized):
            ask(wire.Paired, "/confirm", msgspec.json.encode(replayed))
        assert ask(wire.Paired, "/confirm", msgspec.json.encode(proof)).token
        for body in (proof, replayed):
            with pytest.raises(Unauthorized):
                ask(wire.Paired, "/confirm", msgspec.json.encode(body))
        with pytest.raises(Unauthorized):
            ask(wire.PairingAnswer, "", first)
    assert len(tokens(server.data)) == 1


def test_rotation_kills_the_old_secret_and_certificate(server: Secured, tmp_path: Path) -> None:
    """The pairing stays the same one; what it was shown before is worth nothing."""
    book, before = HostBook(tmp_path / "hosts"), paired(server, code_of(server.data))
    book.add(before)
    after = pairing.rotate(book, before, SECONDS)
    assert book.named("box") == after and after.next_token is None
    assert is_welcome(after) and is_welcome(after, with_token=False) and is_welcome(after, with_certificate=False)
    assert not is_welcome(before, with_certificate=False) and not is_welcome(before, with_token=False)
    assert [row["state"] for row in tokens(server.data)] == ["good"]


def test_a_request_that_waited_does_not_undo_a_rotation(server: Secured, tmp_path: Path) -> None:
    """Who stole the old secret began a rotation, or a bundle, before; it ends after the owner's and does nothing."""
    book, before = HostBook(tmp_path / "hosts"), paired(server, code_of(server.data))
    book.add(before)
    _, public = pairing._new_key()
    body = msgspec.json.encode(wire.RotateRequest(digest=digest_of(bytes(32)).hex(), public_key=public))
    bundle = Writer("w").file()
    waiting = (
        (f"POST {wire.API}/token/rotate", "", body),
        (f"POST {wire.API}/workspaces/w/bundles", f"{wire.IDENTITY_HEADER}: {bundle.identity}\r\n", bundle.sealed),
    )
    with contextlib.ExitStack() as open_connections:
        begun = []
        for line, header, content in waiting:
            connection = open_connections.enter_context(server.tls())
            head = f"{line} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n{header}"
            head += f"Authorization: Bearer {before.token}\r\n"
            connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode())
            assert b" 100 " in connection.recv(1 << 16)  # it was let in, and its body is waited for
            begun.append((connection, content))
        after = pairing.rotate(book, before, SECONDS)
        for connection, content in begun:
            connection.sendall(content)
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 401")
    assert is_welcome(after) and is_welcome(after, with_certificate=False)
    assert not (server.data / "workspaces/w").exists()


@pytest.mark.parametrize("reached", [False, True])
def test_a_rotation_that_broke_off_leaves_one_good_secret(server: Secured, tmp_path: Path, reached: bool) -> None:
    """Whether or not the server heard of the new secret before the client died, the next rotation finds out."""
    book, host = HostBook(tmp_path / "hosts"), paired(server, code_of(server.data))
    book.add(host)
    secret = bytes(32)
    fresh = f"{(host.token or '').rpartition('_')[0]}_{secret.hex()}"
    book.replace(msgspec.structs.replace(host, next_token=fresh))
    if reached:
        _, public = pairing._new_key()
        body = msgspec.json.encode(wire.RotateRequest(digest=digest_of(secret).hex(), public_key=public))
        with opened(host.url, host.trust, host.token) as transport:
            transport.ask(wire.Rotated, "POST", "/token/rotate", body=body)
    after = pairing.rotate(book, book.named("box"), SECONDS)
    assert is_welcome(after) and after.next_token is None and after.token not in (host.token, fresh)


@pytest.mark.parametrize("reached", [False, True])
def test_a_host_whose_rotation_broke_off_is_forgotten_on_both_sides(server: Secured, reached: bool) -> None:
    """No token stays good that nobody has any more."""
    host, secret = paired(server, code_of(server.data)), bytes(32)
    _, public = pairing._new_key()
    body = msgspec.json.encode(wire.RotateRequest(digest=digest_of(secret).hex(), public_key=public))
    if reached:
        with opened(host.url, host.trust, host.token) as transport:
            transport.ask(wire.Rotated, "POST", "/token/rotate", body=body)
    fresh = f"{(host.token or '').rpartition('_')[0]}_{secret.hex()}"
    assert pairing.unpair(msgspec.structs.replace(host, next_token=fresh), SECONDS)
    assert [row["state"] for row in tokens(server.data)] == ["revoked"]


@pytest.mark.parametrize("scope", ["run", "admin", "read,admin"])
def test_a_code_for_any_scope_can_be_used(server: Secured, scope: str) -> None:
    """A token that may not look is no reason to lose it after the code was used up."""
    assert paired(server, code_of(server.data, "--scope", scope)).token


def test_a_listener_sees_neither_code_nor_token_nor_name(server: Secured, tmp_path: Path) -> None:
    """Everything between pairing and a push goes by; no secret and no name of a workspace or file is among it."""
    seen = bytearray()
    code = code_of(server.data)
    made_here = Writer("secretproject").file("secretfile.txt", b"secretcontent" * 100)
    with between(server, tmp_path, seen, None) as url:
        host = paired(server, code, url)
        with opened(url, host.trust, host.token) as transport:
            transport.send_bundle("secretproject", made_here.metadata.identity, iter([made_here.sealed]), wait=20)
    assert (server.data / "workspaces/secretproject/tree/secretfile.txt").exists()
    assert len(seen) > 3000 and host.token
    secrets = (code.secret, host.token, host.token.rpartition("_")[2], "secret", "workspaces", "pairings", "Bearer")
    for each in secrets:
        assert each.encode() not in seen
    assert bytes.fromhex(host.token.rpartition("_")[2]) not in seen


def test_a_server_without_tls_pairs_with_nobody(tmp_path: Path) -> None:
    """Who reaches it needs no code, or has chosen to be without protection."""
    with serving(tmp_path / "data", "--require-token") as served:
        code = code_of(tmp_path / "data")
        body = msgspec.json.encode(wire.PairingRequest(message="42" * 33))
        answer = served.request("POST", f"/api/v1/pairings/{code.number}", body)
        assert (answer.status, answer.json["code"]) == (400, "USAGE")
