"""A real watcher in trouble: no server, a hung one, a vanished folder, mass deletion, signals, other watchers."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import folders
import pytest
from folders import write
from serving import Served, serving
from watching import Inside, Listening, Site, assert_in_step, at_home, inside, process, site

from deltasync.client.channel import ask
from deltasync.core.errors import AlreadyRunning, NotADeltasyncServer, NotOwner

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(tmp_path_factory.mktemp("server")) as shared:
        yield shared


@pytest.fixture
def base(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "media").mkdir()
    with at_home(tmp_path):
        yield tmp_path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serving_at(data: Path, port: int) -> contextlib.AbstractContextManager[Served]:
    return serving(data, "--listen", f"127.0.0.1:{port}")


def pending(watcher: Listening) -> int:
    return int(watcher.ask("status")["local"]["pending"])


# Servers that come and go


def test_without_a_server_everything_is_sealed_into_bundle_files(base: Path) -> None:
    """`watch PATH` alone works locally: each burst of changes becomes a bundle that waits in the outbox."""
    root = base / "media"
    with inside(root) as watcher:
        for number in range(3):
            since = len(watcher.events)
            write(root, f"f{number}", os.urandom(1000))
            assert watcher.heard("sealed", since)["sequence"] == number + 1
        report = watcher.flush()
        assert (report["pending"], report["bundles"]) == (3, 0)
        assert pending(watcher) == 3
    assert len(list((root / ".deltasync/outbox").iterdir())) == 3


def test_a_server_that_comes_late_gets_everything_in_order(base: Path) -> None:
    """While the server is away changes are sealed; when it comes everything is sent, with no restart."""
    root, port = base / "media", free_port()
    write(root, "first", "1")
    with inside(root, to=f"http://127.0.0.1:{port}") as watcher:
        assert watcher.heard("offline")["url"] == f"http://127.0.0.1:{port}"
        for number in range(4):
            since = len(watcher.events)
            write(root, f"d/f{number}", f"{number}" * 100)
            watcher.heard("sealed", since)
        assert watcher.ask("status")["offline"]["reason"]
        since = len(watcher.events)
        with serving_at(base / "data", port):
            watcher.heard("sent", since)
            assert assert_in_step(watcher, base / "data")["sequence"] >= 4
            assert watcher.ask("status")["offline"] is None
            assert pending(watcher) == 0


def test_a_server_that_is_restarted_is_found_again(base: Path) -> None:
    """The server goes in the middle of the work; what happened meanwhile arrives when it is back."""
    root, port = base / "media", free_port()
    folders.life(root)
    with contextlib.ExitStack() as first:
        first.enter_context(serving_at(base / "data", port))
        with inside(root, to=f"http://127.0.0.1:{port}") as watcher:
            assert_in_step(watcher, base / "data")
            first.close()
            folders.later(root)
            watcher.heard("sealed")
            assert watcher.ask("flush")["error"]["code"] == "HOST_UNREACHABLE"
            with serving_at(base / "data", port):
                watcher.heard("online")
                assert_in_step(watcher, base / "data")


def test_a_full_outbox_makes_sealing_wait_and_says_so(base: Path) -> None:
    """Beyond --outbox-limit nothing is sealed, the watcher goes on, and the server's return ends the wait."""
    root, port = base / "media", free_port()
    with inside(root, to=f"http://127.0.0.1:{port}", outbox_limit_bytes=1 << 20) as watcher:
        for number in range(3):
            write(root, f"f{number}", os.urandom(600_000))
            watcher.heard("sealed")
        assert "outbox" in watcher.heard("full")["sentence"]
        assert watcher.ask("status")["full"]
        write(root, "later", "x")
        with serving_at(base / "data", port):
            watcher.heard("online")
            assert_in_step(watcher, base / "data")
            assert watcher.ask("status")["full"] is None


@pytest.fixture
def hung() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_sigterm_ends_a_watcher_whose_server_hangs(base: Path, hung: str) -> None:
    """A stop takes less than ten seconds, whatever the server does, and nothing is lost."""
    root = base / "media"
    write(root, "f", "x")
    with process(root, to=hung, timeout_seconds=60.0) as watcher:
        while watcher.ask("status")["doing"] != "sending":
            assert watcher.process.poll() is None
        watcher.signal(signal.SIGTERM)
        assert watcher.process.wait(10) == 0
    with serving(base / "data") as server:
        shutil.rmtree(root / ".deltasync")  # another server: begin anew
        with process(root, to=server.url) as watcher:
            assert_in_step(watcher, base / "data")


def test_status_is_answered_while_the_server_hangs(base: Path, hung: str) -> None:
    """Questions about the state do not wait for the network."""
    write(base / "media", "f", "x")
    with process(base / "media", to=hung, timeout_seconds=60.0) as watcher:
        while watcher.ask("status")["doing"] != "sending":
            assert watcher.process.poll() is None
        assert watcher.ask("status")["waiting"] is not None


def test_an_address_where_something_else_answers_ends_the_watcher(base: Path) -> None:
    """A wrong address is said at once, not retried for ever."""
    code = "import http.server, sys; http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), " + (
        "http.server.BaseHTTPRequestHandler).serve_forever()"
    )
    port = free_port()
    other = subprocess.Popen([sys.executable, "-c", code, str(port)], stderr=subprocess.DEVNULL)
    try:
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
        watcher = Inside(base / "media", to=f"http://127.0.0.1:{port}")
        try:
            watcher.until(lambda event: event["event"] == "ended")
            assert isinstance(watcher.error, NotADeltasyncServer)
        finally:
            watcher.close()
    finally:
        other.terminate()
        other.wait()


def test_an_idle_watcher_asks_the_server_nothing(base: Path) -> None:
    """Rescans that find nothing cost no request and no byte."""
    root = base / "media"
    folders.life(root)
    with (
        serving(base / "data", "--access-log") as server,
        inside(root, to=server.url, rescan_seconds=0.05) as watcher,
    ):
        watcher.flush()
        asked = server.log.read_text().count("HTTP/1.1")
        assert asked > 0
        rescans, age = 0, 0.0
        while rescans < 10:  # each time the age falls back, another look at everything was made
            now = watcher.ask("status")["scan_age_seconds"]
            rescans, age = rescans + (now < age), now
        assert server.log.read_text().count("HTTP/1.1") == asked


# Guards


def test_a_mass_deletion_waits_until_it_is_allowed(base: Path, server: Site) -> None:
    """More than half of many files gone: said once, kept on the server, and sent when somebody allows it."""
    root = base / "media"
    for number in range(300):
        write(root, f"d{number % 7}/f{number}", f"{number}")
    with inside(root, to=server.url, workspace=base.name) as watcher:
        assert_in_step(watcher, server.data)
        tree = server.tree(base)
        for number in range(250):
            (root / f"d{number % 7}/f{number}").unlink()
        watcher.heard("guard")
        write(root, "new", "does not change that")
        answer = watcher.ask("flush")
        assert answer["error"]["code"] == "GUARD_STOPPED"
        assert watcher.ask("status")["guard"]
        assert sum(path.is_file() for path in tree.rglob("*")) == 300
        assert [event["event"] for event in watcher.events].count("guard") == 1
        watcher.flush(allow_mass_delete=True)
        assert_in_step(watcher, server.data)
        assert watcher.ask("status")["guard"] is None


def test_a_mass_deletion_that_is_undone_needs_no_word(base: Path, server: Site) -> None:
    """When the files come back, the watcher goes on by itself."""
    root = base / "media"
    for number in range(300):
        write(root, f"d{number % 7}/f{number}", f"{number}")
    with inside(root, to=server.url, workspace=base.name) as watcher:
        assert_in_step(watcher, server.data)
        os.rename(root / "d0", base / "d0")
        for number in range(1, 6):
            os.rename(root / f"d{number}", base / f"d{number}")
        watcher.heard("guard")
        for number in range(6):
            os.rename(base / f"d{number}", root / f"d{number}")
        write(root, "more", "x")
        watcher.until_same()


def test_an_emptied_folder_is_not_taken_for_deleted(base: Path, server: Site) -> None:
    """Everything gone at once is more likely a mistake; it waits, and passes when it is allowed."""
    root = base / "media"
    for number in range(5):
        write(root, f"f{number}", f"{number}")
    with inside(root, to=server.url, workspace=base.name) as watcher:
        assert_in_step(watcher, server.data)
        for path in root.glob("f*"):
            path.unlink()
        watcher.heard("guard")
        assert len(list(server.tree(base).iterdir())) == 5
        watcher.flush(allow_mass_delete=True)
        assert list(server.tree(base).iterdir()) == []
        write(root, "again", "x")
        assert_in_step(watcher, server.data)


# Folders that vanish


def test_a_folder_that_is_moved_away_and_back_is_watched_again(base: Path, server: Site) -> None:
    """While the folder is away nothing is deleted; when it is back the watcher goes on."""
    root = base / "media"
    folders.life(root)
    with inside(root, to=server.url, workspace=base.name) as watcher:
        assert_in_step(watcher, server.data)
        before = folders.listing(server.tree(base))
        os.rename(root, base / "elsewhere")
        watcher.heard("unavailable")
        answer = ask(root, "flush", timeout=20)
        assert answer is None or answer["error"]["code"] == "ROOT_UNAVAILABLE"
        assert folders.listing(server.tree(base)) == before
        write(base / "elsewhere", "meanwhile", "x")
        os.rename(base / "elsewhere", root)
        watcher.heard("available")
        assert_in_step(watcher, server.data)
        write(root, "later", "x")
        assert_in_step(watcher, server.data)


def test_a_folder_that_is_deleted_and_made_anew_waits_for_leave_to_delete(base: Path, server: Site) -> None:
    """Folder and state are gone and a fresh folder stands there: a new history, and nothing deleted unasked."""
    root = base / "media"
    folders.life(root)
    with inside(root, to=server.url, workspace=base.name) as watcher:
        assert_in_step(watcher, server.data)
        before = folders.listing(server.tree(base))
        shutil.rmtree(root)
        watcher.heard("unavailable")
        since = len(watcher.events)
        root.mkdir()
        write(root, "fresh", "x")
        watcher.heard("available", since)
        assert watcher.heard("guard", since)
        assert folders.listing(server.tree(base)) == before
        watcher.flush(allow_mass_delete=True)
        assert_in_step(watcher, server.data)


@pytest.mark.root
@pytest.mark.skipif(os.getuid() != 0 or not sys.platform.startswith("linux"), reason="mounts a folder")
def test_an_unmounted_folder_is_unavailable_until_it_is_mounted_again(base: Path, server: Site) -> None:
    """umount leaves an empty folder: that means unavailable, never deleted, and nothing is written there.

    Taking a bind mount away gives no event; the next look at everything notices.
    """
    root, disk = base / "media", base / "disk"
    folders.life(disk)
    mount = ["unshare", "-m", "true"]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("no mounting here")
    subprocess.run(["mount", "--bind", disk, root], check=True)
    try:
        with inside(root, to=server.url, workspace=base.name, rescan_seconds=1.0) as watcher:
            assert_in_step(watcher, server.data)
            before = folders.listing(server.tree(base))
            subprocess.run(["umount", "-l", root], check=True)
            watcher.heard("unavailable")
            assert list(root.iterdir()) == []
            assert folders.listing(server.tree(base)) == before
            write(disk, "meanwhile", "x")
            subprocess.run(["mount", "--bind", disk, root], check=True)
            watcher.heard("available")
            assert_in_step(watcher, server.data)
    finally:
        subprocess.run(["umount", "-l", root], check=False, capture_output=True)


# Signals, and others


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_watcher_cleanly(base: Path, server: Site, number: signal.Signals) -> None:
    """It says that it stopped, leaves no socket behind, and the next one goes on where it was."""
    root = base / "media"
    folders.life(root)
    with process(root, to=server.url, workspace=base.name) as watcher:
        sequence = assert_in_step(watcher, server.data)["sequence"]
        watcher.signal(number)
        assert watcher.process.wait(10) == 0
        watcher.heard("stopped")
    assert ask(root, "status") is None
    assert list((base / "run/deltasync").iterdir()) == []
    with process(root, to=server.url, workspace=base.name) as watcher:
        report = assert_in_step(watcher, server.data)
        assert (report["sequence"], report["bundles"]) == (sequence, 0)


def test_the_stop_verb_ends_the_watcher(base: Path) -> None:
    """Whoever may ask may stop it."""
    with process(base / "media") as watcher:
        assert watcher.ask("stop") == {"ok": True}
        assert watcher.process.wait(10) == 0


def test_a_stopped_and_continued_watcher_catches_up(base: Path, server: Site) -> None:
    """After SIGSTOP and SIGCONT everything that happened meanwhile is sent."""
    root = base / "media"
    folders.life(root)
    with process(root, to=server.url, workspace=base.name) as watcher:
        assert_in_step(watcher, server.data)
        watcher.signal(signal.SIGSTOP)
        folders.later(root)
        watcher.signal(signal.SIGCONT)
        watcher.until_same()


def test_a_killed_watcher_is_followed_by_one_that_sends_nothing_twice(base: Path, server: Site) -> None:
    """kill -9 leaves a socket and a state; the next watcher takes both over."""
    root = base / "media"
    folders.life(root)
    with process(root, to=server.url, workspace=base.name) as watcher:
        sequence = assert_in_step(watcher, server.data)["sequence"]
        watcher.process.kill()
        watcher.process.wait()
    with process(root, to=server.url, workspace=base.name) as watcher:
        assert assert_in_step(watcher, server.data)["sequence"] == sequence


def test_a_second_watcher_is_refused(base: Path) -> None:
    """Two writers on one folder: the second says who is there, and the first goes on."""
    root = base / "media"
    with inside(root) as watcher:
        second = Inside(root)
        try:
            second.until(lambda event: event["event"] == "ended")
            assert isinstance(second.error, AlreadyRunning)
        finally:
            second.close()
        assert watcher.ask("status")["ok"]


def test_push_beside_a_watcher_asks_it(base: Path, server: Site) -> None:
    """`deltasync push` hands its work to the watcher and tells how old the last full look is."""
    root = base / "media"
    with inside(root, to=server.url + "/", workspace=base.name) as watcher:
        write(root, "f", "x")
        words = [BIN / "deltasync", "push", root, "--to", server.url, "--json"]
        done = subprocess.run(words, check=True, capture_output=True, text=True)
        answer = json.loads(done.stdout)
        assert answer["watcher"] is True and answer["scan_age_seconds"] >= 0
        assert (server.tree(base) / "f").read_text() == "x"
        refused = watcher.ask("flush", url="http://127.0.0.1:1")
        assert refused["error"]["code"] == "USAGE"
        assert watcher.ask("flush", surprise=True)["error"]["code"] == "USAGE"
        assert watcher.ask("dance")["error"]["code"] == "USAGE"


def test_the_former_owner_stops_and_does_not_fight(base: Path, server: Site) -> None:
    """After another client took the workspace over, the first watcher ends with what happened."""
    root, other = base / "media", base / "copy/media"
    write(root, "f", "x")
    with inside(root, to=server.url, workspace=base.name) as watcher:
        watcher.flush()
        write(other, "g", "y")
        environment = {"DELTASYNC_HOME": str(base / "other home")}
        flags = ["--to", server.url, "--workspace", base.name, "--take-over", "--allow-mass-delete"]
        subprocess.run(
            [BIN / "deltasync", "push", other, *flags],
            check=True,
            capture_output=True,
            env={**os.environ, **environment},
        )
        write(root, "h", "z")
        watcher.until(lambda event: event["event"] == "ended")
        assert isinstance(watcher.error, NotOwner)
        assert not (server.tree(base) / "h").exists()


def test_flushes_from_many_callers_are_all_answered(base: Path, server: Site) -> None:
    """Questions queue up; each asker gets a report that holds what it wrote."""
    root = base / "media"
    tree = server.tree(base)
    with inside(root, to=server.url, workspace=base.name) as watcher:
        wrong: list[str] = []

        def work(name: str) -> None:
            for number in range(10):
                write(root, f"{name}/f", f"{number}")
                watcher.flush()
                if (tree / name / "f").read_text() != f"{number}":
                    wrong.append(name)

        threads = [threading.Thread(target=work, args=(f"t{number}",)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []


def test_the_command_tells_events_and_ends_with_a_signal(base: Path, server: Site) -> None:
    """`deltasync watch --json` prints one object for each event, and SIGTERM ends it with exit 0."""
    root = base / "media"
    write(root, "f", "x")
    words = [BIN / "deltasync", "watch", root, "--to", server.url, "--workspace", base.name, "--json"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as command:
        assert command.stdout
        events = []
        while not events or events[-1]["event"] != "sent":
            events.append(json.loads(command.stdout.readline()))
        command.send_signal(signal.SIGTERM)
        rest = [json.loads(line)["event"] for line in command.stdout]
        assert command.wait(10) == 0
    assert events[0]["event"] == "watching" and rest[-1] == "stopped"
    assert (server.tree(base) / "f").read_text() == "x"


def test_bundles_go_to_a_disk_whenever_it_is_plugged_in(base: Path) -> None:
    """--to file:// writes bundles to a folder; while it is missing they wait, and later they follow in order."""
    root, disk = base / "media", base / "disk"
    write(root, "f", "x")
    disk.mkdir()
    with inside(root, to=disk.as_uri()) as watcher:
        watcher.heard("sent")
        os.rename(disk, base / "unplugged")
        write(root, "g", "y")
        watcher.heard("offline")
        since = len(watcher.events)
        os.rename(base / "unplugged", disk)
        watcher.heard("sent", since)
        watcher.flush()
        assert len([path for path in disk.rglob("*.tar.zst") if path.is_file()]) == 2


@pytest.mark.root
@pytest.mark.skipif(os.getuid() != 0 or not sys.platform.startswith("linux"), reason="mounts a small disk")
def test_a_full_disk_is_said_and_gone_when_there_is_room(base: Path, server: Site) -> None:
    """When the state's disk is full nothing is recorded and nothing is lost; with room the watcher goes on."""
    root, disk = base / "media", base / "disk"
    folders.life(root)
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2M", "tmpfs", disk], check=False, capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("no mounting here")
    try:
        with inside(root, to=server.url, workspace=base.name, state_dir=str(disk / "state")) as watcher:
            assert_in_step(watcher, server.data)
            room = os.statvfs(disk)
            write(disk, "ballast", bytes(room.f_bavail * room.f_frsize))
            for number in range(300):
                write(root, f"many/f{number}", f"{number}")
            assert watcher.heard("trouble")["code"] == "NO_SPACE"
            (disk / "ballast").unlink()
            watcher.until_same()
    finally:
        subprocess.run(["umount", "-l", disk], check=False, capture_output=True)
