"""Large bundles over a bad network and through kills: pieces arrive once, and both sides end with one tree."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import folders
import msgspec
import pytest
from corpus_good import noise
from desk import Desk
from lossy import Fault, Proxy, lossy
from serving import Served, Writer, serving, until

from deltasync.client import pace
from deltasync.client.push import PushReport
from deltasync.client.transport import HttpTransport, open_transport
from deltasync.core import wire
from deltasync.core.errors import HostUnreachable
from deltasync.core.hashing import digest_of

Value = TypeVar("Value")
MIB = 1 << 20
SIZE = 64 * MIB


@pytest.fixture(autouse=True)
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no way pass for quick: what goes in pieces is not to depend on this machine's mood."""
    monkeypatch.setattr(pace, "QUICK_BYTES_PER_SECOND", math.inf)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Served]:
    with serving(tmp_path / "data") as served:
        yield served


@pytest.fixture
def proxy(server: Served) -> Iterator[Proxy]:
    with lossy(server.port) as between:
        yield between


def desk_with(tmp_path: Path, url: str, size: int, files: int = 1) -> Desk:
    """Return a folder of so many bytes that do not compress."""
    desk = Desk(tmp_path / "media", url)
    for number in range(files):
        (desk.root / f"{number}.bin").write_bytes(noise(str(number), size // files))
    return desk


def assert_arrived(server: Served, desk: Desk, report: PushReport) -> None:
    """Both sides hold the same tree, and nothing of an upload is left."""
    state = server.get("/api/v1/workspaces/media").json
    assert (state["root"], state["sequence"]) == (report.root, report.sequence) and not report.problems
    folders.assert_same(desk.root, server.data / "workspaces/media/tree")
    assert not list((server.data / "uploads").iterdir())


@pytest.mark.parametrize("files", [1, 16])
def test_a_connection_that_breaks_every_8_mib_costs_little(
    server: Served, proxy: Proxy, tmp_path: Path, files: int
) -> None:
    """A cut piece goes on where it broke off: no more than a twentieth of all is sent twice."""
    desk = desk_with(tmp_path, proxy.url, SIZE, files)
    proxy.reset_every = 8 * MIB
    report = desk.push()
    assert proxy.resets >= SIZE // (8 * MIB)
    assert report.bundles == 1
    assert proxy.request_bytes <= SIZE * 1.05
    assert_arrived(server, desk, report)


def bytes_waiting(port: int) -> int:
    """Return how many bytes have come for a server's connections that it has not read."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(int(row[4].partition(":")[2], 16) for row in rows if row[1].endswith(f":{port:04X}") and row[3] == "01")


def test_a_server_that_is_frozen_in_the_midst_of_an_upload_gets_all_of_it(tmp_path: Path) -> None:
    """After SIGSTOP and SIGCONT the push goes through, also where a deadline of the server was over meanwhile."""
    environment = {"DELTASYNC_SERVER_BODY_SECONDS": "1"}
    with serving(tmp_path / "data", environment=environment) as server, lossy(server.port) as proxy:
        desk, release = desk_with(tmp_path, proxy.url, 12 * MIB), threading.Event()
        held = Fault((desk.root / "0.bin").read_bytes()[5_700_000:5_700_016], until=release)  # in the midst of a piece
        proxy.faults = [held]
        reports: list[PushReport] = []
        pushing = threading.Thread(target=lambda: reports.append(desk.push()))
        pushing.start()
        until(held.has_happened.is_set)
        server.process.send_signal(signal.SIGSTOP)
        try:
            release.set()
            until(lambda: bytes_waiting(server.port))
            thawed_at = time.monotonic() + 1.2
            until(lambda: time.monotonic() >= thawed_at)
            assert pushing.is_alive()
        finally:
            server.process.send_signal(signal.SIGCONT)
        pushing.join()
        assert reports[0].bundles == 1
        until(lambda: server.get("/api/v1/workspaces/media").json["tree_sequence"] == 1)
        assert_arrived(server, desk, reports[0])


def test_answers_that_are_lost_are_asked_for_again(server: Served, proxy: Proxy, tmp_path: Path) -> None:
    """The answers to begin, to a piece, to its state and to the end get lost: the bundle is applied once."""
    desk = desk_with(tmp_path, proxy.url, 20 * MIB)
    markers = [b"POST /api/v1/uploads/initiate", b"/chunk/3 ", b"/chunk/3 ", b"GET /api/v1/uploads/", b"/complete"]
    faults = proxy.faults = [Fault(marker, swallow=True) for marker in markers]
    expected = list(faults)
    report = desk.push()
    assert all(fault.has_happened.is_set() for fault in expected[:2] + expected[-1:])
    assert report.bundles == 1 and server.get("/api/v1/workspaces/media").json["sequence"] == 1
    assert proxy.request_bytes <= 1.3 * 20 * MIB
    state = server.get("/api/v1/workspaces/media").json
    assert state["root"] == report.root
    folders.assert_same(desk.root, server.data / "workspaces/media/tree")


def test_a_piece_that_comes_late_holds_nothing_but_the_end(server: Served, proxy: Proxy, tmp_path: Path) -> None:
    """Pieces overtake a held one, up to as many as are under way; it is waited for."""
    desk = desk_with(tmp_path, proxy.url, 20 * MIB)
    release = threading.Event()
    held = Fault(b"/chunk/8 ", until=release)
    proxy.faults = [held]
    reports: list[PushReport] = []
    pushing = threading.Thread(target=lambda: reports.append(desk.push()))
    pushing.start()
    until(held.has_happened.is_set)
    until(lambda: figure(server, "upload_bytes") >= 18 * MIB)
    assert server.get("/api/v1/workspaces/media").json["sequence"] == 0
    release.set()
    pushing.join()
    assert_arrived(server, desk, reports[0])


def figure(server: Served, name: str) -> float:
    lines = server.get("/metrics").body.decode().splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(f"deltasync_{name} ")), 0.0)


def test_a_small_bundle_is_one_request(server: Served, proxy: Proxy, tmp_path: Path) -> None:
    """Up to 8 MiB nothing is cut into pieces."""
    desk = desk_with(tmp_path, proxy.url, 7 * MIB)
    proxy.faults = [Fault(b"/api/v1/uploads", swallow=True)]
    report = desk.push()
    assert not proxy.faults[0].has_happened.is_set()
    assert_arrived(server, desk, report)


def test_an_upload_that_the_server_forgot_is_sent_anew(tmp_path: Path) -> None:
    """The server is killed between the pieces and the end and starts with less: the bundle comes from its start."""
    data = tmp_path / "data"
    desk = desk_with(tmp_path, "", 24 * MIB)
    with lossy(1) as proxy:
        desk.url = proxy.url
        with serving(data) as first:
            proxy._upstream = first.port
            release = threading.Event()
            held = Fault(b"/complete", until=release)
            proxy.faults = [held]
            reports: list[PushReport] = []
            transport = open_transport(proxy.url, timeout=20, max_retries=9)
            pushing = threading.Thread(target=lambda: reports.append(desk.push(transport=transport)))
            pushing.start()
            until(held.has_happened.is_set)
            first.process.send_signal(signal.SIGKILL)
            first.process.wait()
            with serving(data) as second:
                proxy._upstream = second.port
                release.set()
                pushing.join()
                assert_arrived(second, desk, reports[0])
                assert reports[0].bundles == 1
                transport.close()


@pytest.mark.parametrize("sent", [0, 1, 4, 9])
def test_a_killed_server_has_only_pieces_that_are_durable(tmp_path: Path, sent: int) -> None:
    """Each piece that a restart lists has its bytes; the others are sent, and the bundle is whole."""
    made = Writer("killed").large(9_500)
    cut = [made.sealed[at : at + 1000] for at in range(0, len(made.sealed), 1000)]
    data, environment = tmp_path / "data", {"DELTASYNC_SERVER_UPLOAD_SYNC_BYTES": "2000"}
    with serving(data, environment=environment) as server, _transport(server) as here:
        request = wire.UploadRequest(kind="bundle", workspace="killed", identity=made.identity, chunk_size=1000)
        upload_id = _post(here, wire.UploadState, "/initiate", request).upload_id
        for number in range(sent):
            _put(here, upload_id, number, cut[number])
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
    with serving(data) as server, _transport(server) as here:
        found = here.ask(wire.UploadState, "GET", f"/uploads/{upload_id}")
        present = {number for first, last in found.present for number in range(first, last + 1)}
        assert present <= set(range(sent))
        stored = (data / "uploads" / upload_id).read_bytes()
        for number in present:
            assert stored[number * 1000 : (number + 1) * 1000] == cut[number]
        for number in set(range(len(cut))) - present:
            _put(here, upload_id, number, cut[number])
        told = wire.UploadComplete(total_chunks=len(cut), file_size=len(made.sealed))
        receipt = _post(here, wire.Receipt, f"/{upload_id}/complete", told)
        assert (receipt.root, receipt.sequence) == (made.root, 1)


def _transport(server: Served) -> contextlib.closing[HttpTransport]:
    return contextlib.closing(HttpTransport(server.url, timeout=20))


def _post(here: HttpTransport, kind: type[Value], path: str, value: msgspec.Struct) -> Value:
    return here.ask(kind, "POST", f"/uploads{path}", body=msgspec.json.encode(value))


def _put(here: HttpTransport, upload_id: str, number: int, piece: bytes) -> None:
    headers = {wire.ETAG_HEADER: digest_of(piece).hex()}
    here.ask(wire.UploadedChunk, "PUT", f"/uploads/{upload_id}/chunk/{number}", body=[piece], headers=headers)


def test_the_next_push_goes_on_where_one_failed(server: Served, tmp_path: Path) -> None:
    """A push fails when the way is gone for good; the next one sends only what the server has not, and no more."""
    desk = desk_with(tmp_path, "", 40 * MIB)
    with lossy(server.port) as proxy:
        desk.url = proxy.url
        proxy.faults = [Fault(b"/chunk/1%d " % number, cut_after=100) for number in range(8) for _ in range(200)]
        with pytest.raises(HostUnreachable):
            desk.push()
        proxy.faults, before = [], proxy.request_bytes
        assert figure(server, "upload_bytes") >= 18 * MIB
        report = desk.push()
        assert proxy.request_bytes - before <= 22 * MIB
    assert_arrived(server, desk, report)


def test_a_quick_and_sound_way_needs_no_pieces(
    server: Served, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a bundle that went fast the next one goes whole; once a connection broke, pieces are worth it again."""
    monkeypatch.setattr(pace, "QUICK_BYTES_PER_SECOND", 1)
    desk = desk_with(tmp_path, proxy.url, 9 * MIB)
    pieces: list[float] = []
    fault = Fault(b"/bundles", cut_after=MIB)
    with contextlib.closing(open_transport(proxy.url, timeout=20, max_retries=2)) as transport:
        for number in range(3):
            if number:
                (desk.root / f"{number}.bin").write_bytes(noise(f"more {number}", 9 * MIB))
            proxy.faults = [fault] if number == 2 else []
            before = figure(server, 'http_answers_total{method="PUT",status="200"}')
            assert_arrived(server, desk, desk.push(transport=transport))
            pieces.append(figure(server, 'http_answers_total{method="PUT",status="200"}') - before)
    assert fault.has_happened.is_set()
    assert pieces == [5, 0, 5]


def test_nothing_is_sent_twice_to_find_out_how_quick_the_way_is(
    server: Served, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first large bundle goes in pieces to its end, however quick the first of them went."""
    monkeypatch.setattr(pace, "QUICK_BYTES_PER_SECOND", 1)
    desk = desk_with(tmp_path, proxy.url, 40 * MIB)
    assert_arrived(server, desk, desk.push())
    assert figure(server, 'http_answers_total{method="PUT",status="200"}') == 21
    assert figure(server, "bundles_applied_total") == 1
    assert 40 * MIB < proxy.request_bytes < 41 * MIB
