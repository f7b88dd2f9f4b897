"""`--to ssh://`: a real sshd, the real ssh, and a server that is started on demand (spec H-130 to H-134)."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import folders
import pytest
from serving import BINARY, serving, until
from sshd import Host, end, hosting, leave, masters, needs_sshd, visitor
from user import BINARY as user_binary
from user import SECONDS, User

pytestmark = needs_sshd


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a short name: the address of a socket has 107 bytes."""
    return tmp_path_factory.mktemp("s")


@pytest.fixture
def host(place: Path) -> Iterator[Host]:
    with hosting(place / "h") as host:
        yield host


@pytest.fixture
def user(place: Path, host: Host) -> Iterator[User]:
    user = visitor(place / "u", host)
    yield user
    leave(user)


@pytest.fixture
def project(user: User) -> Path:
    """A folder of the user with something in it."""
    folder = user.home / "project"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("one\n")
    (folder / "deep" / "b.bin").write_bytes(bytes(range(256)) * 1000)
    return folder


@contextlib.contextmanager
def bounded(pid: int) -> Iterator[None]:
    """Kill a process that does not say in time what the block reads."""
    timer = threading.Timer(SECONDS, os.kill, (pid, signal.SIGKILL))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Watch:
    """A running `deltasync watch`, and what it tells."""

    def __init__(self, user: User, *words: str | Path) -> None:
        self.process = user.start("watch", "--json", *words)
        self.events: list[str] = []

    def heard(self, what: str) -> None:
        """Wait for an event."""
        assert self.process.stdout is not None
        with bounded(self.process.pid):
            for line in self.process.stdout:
                self.events.append(json.loads(line)["event"])
                if self.events[-1] == what:
                    return
        raise AssertionError((self.events, self.process.stderr and self.process.stderr.read()))

    def stop(self) -> None:
        """Stop it as a user does, and see that it ends well."""
        self.process.send_signal(signal.SIGTERM)
        out, err = self.process.communicate(timeout=SECONDS)
        self.events += [json.loads(line)["event"] for line in out.splitlines()]
        assert self.process.returncode == 0, err


@pytest.fixture
def watch(user: User, project: Path, host: Host) -> Iterator[Watch]:
    """A watcher of the project that has sent it."""
    watch = Watch(user, project, "--to", f"{host.url}/project")
    try:
        watch.heard("sent")
        yield watch
    finally:
        watch.process.kill()
        watch.process.communicate()


def tree(host: Host, name: str = "project") -> Path:
    return host.data / "workspaces" / name / "tree"


def is_same(project: Path, host: Host) -> bool:
    return tree(host).exists() and folders.listing(project) == folders.listing(tree(host))


def test_a_folder_is_pushed_asked_about_and_fetched_over_one_connection(
    user: User, project: Path, host: Host, place: Path
) -> None:
    """Nothing runs on the host before; the second command and the third use the connection of the first."""
    pushed = user.run("push", project, "--to", f"{host.url}/life", "--json")
    assert (pushed.code, pushed.err) == (0, "")
    assert pushed.json["workspace"] == "life"
    assert folders.listing(project) == folders.listing(tree(host, "life"))
    asked = user.run("status", project, "--json")
    assert (asked.code, asked.err) == (0, "")
    assert asked.json["in_sync"] is True
    assert asked.json["server"]["url"] == host.url
    fetched = user.run("fetch", "--from", f"{host.url}/life", place / "back", "--json")
    assert (fetched.code, fetched.json["verified"]) == (0, True)
    assert folders.listing(project) == folders.listing(place / "back")
    assert host.logins() == 1
    assert len(masters(user)) == 1
    assert len(host.servers()) == 1
    assert user.run("verify", project).code == 0
    assert user.run("doctor", project).err == ""


def test_a_watcher_sends_what_changes(watch: Watch, user: User, project: Path, host: Host) -> None:
    """Each change arrives; a push and a status beside the watcher find everything in step."""
    (project / "new.txt").write_text("new\n")
    until(lambda: is_same(project, host))
    assert user.run("push", project).code == 0
    assert user.run("status", project, "--json").json["in_sync"] is True
    assert user.run("push", project, "--to", f"{host.url}/other").code == 2
    watch.stop()
    assert host.logins() == 1


def test_only_the_user_reaches_the_sockets_and_the_command_takes_its_own_away(
    watch: Watch, user: User, host: Host
) -> None:
    """Sockets here and there have mode 0600 in folders of mode 0700; at the end only the connection of ssh stays."""
    here = user.home / "run" / "deltasync"
    (here / "of-somebody-else").write_text("stays")
    sockets = [path for path in here.iterdir() if stat.S_ISSOCK(path.lstat().st_mode)]
    assert len([path for path in sockets if path.name.startswith("ssh-")]) == 2
    there = host.data / "run"
    sockets.append(there / "http.sock")
    assert {stat.S_IMODE(path.lstat().st_mode) for path in sockets} == {0o600}
    assert {stat.S_IMODE(folder.lstat().st_mode) for folder in (here, there)} == {0o700}
    watch.stop()
    (connection,) = here.glob("ssh-*")
    assert stat.S_ISSOCK(connection.lstat().st_mode)
    (master,) = masters(user)
    assert not [each for each in master.net_connections("unix") if f"ssh-{watch.process.pid}-" in str(each.laddr)]
    assert (here / "of-somebody-else").read_text() == "stays"


def test_a_watcher_goes_on_by_itself_when_the_connection_broke(
    watch: Watch, user: User, project: Path, host: Host
) -> None:
    """Whatever of the way is killed, here or there, is made again without anybody's help."""
    host.cut()
    (project / "cut.txt").write_text("cut\n")
    until(lambda: is_same(project, host))
    for each in masters(user):
        end(each)  # leaves its socket behind
    (project / "killed.txt").write_text("killed\n")
    until(lambda: is_same(project, host))
    for each in host.servers():
        end(each)
    (project / "server.txt").write_text("server\n")
    until(lambda: is_same(project, host))
    watch.stop()
    assert host.logins() == 3


def test_a_watcher_waits_for_a_host_that_does_not_let_it_in(watch: Watch, project: Path, host: Host) -> None:
    """A key that is refused later is trouble that may pass: changes wait, and go out when the host takes it again."""
    keys = host.folder / "authorized_keys"
    before = keys.read_text()
    keys.write_text("")
    host.cut()
    (project / "later.txt").write_text("later\n")
    watch.heard("offline")
    keys.write_text(before)
    watch.heard("online")
    until(lambda: is_same(project, host))
    watch.stop()


def test_an_upload_that_is_cut_goes_on(user: User, project: Path, host: Host) -> None:
    """A push whose connection breaks in the middle of a large file logs in again and ends well."""
    (project / "large.bin").write_bytes(os.urandom(24 << 20))
    push = user.start("push", project, "--to", host.url, "--bwlimit", "8M")
    uploads = host.data / "uploads"
    until(lambda: uploads.is_dir() and any(uploads.iterdir()))
    host.cut()
    out, err = push.communicate(timeout=SECONDS)
    assert push.returncode == 0, (out, err)
    assert is_same(project, host)
    assert host.logins() == 2


def test_a_connection_that_does_not_answer_is_replaced(user: User, project: Path, host: Host) -> None:
    """A process of ssh that is stopped, or hangs, holds a command up for some seconds and is left alone then."""
    assert user.run("push", project, "--to", f"{host.url}/project").code == 0
    (master,) = masters(user)
    master.suspend()
    (project / "a.txt").write_text("two\n")
    assert user.run("push", project).code == 0
    assert is_same(project, host)
    assert host.logins() == 2
    end(master)


def test_an_idle_server_is_started_again(place: Path) -> None:
    """A server on the host ends when nobody asks it anything; the next command does not notice."""
    with hosting(place / "h", DELTASYNC_SERVER_IDLE_EXIT="1") as host:
        user = visitor(place / "u", host)
        (user.home / "project").mkdir()
        try:
            assert user.run("push", "project", "--to", host.url).code == 0
            until(lambda: not host.servers())
            (user.home / "project" / "a.txt").write_text("new\n")
            assert user.run("push", "project").code == 0
            assert is_same(user.home / "project", host)
            assert host.logins() == 1
        finally:
            leave(user)


def test_two_first_commands_at_once_start_one_server(user: User, project: Path, host: Host) -> None:
    """Both arrive, over connections of their own or one, at the same server."""
    (user.home / "second").mkdir()
    both = [user.start("push", each, "--to", host.url) for each in (project, user.home / "second")]
    said = [process.communicate(timeout=SECONDS) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert is_same(project, host)
    assert len(host.servers()) == 1


def test_the_users_own_configuration_counts(user: User, project: Path, host: Host) -> None:
    """A name of it is a host here, jump hosts are gone through, and what it wants for a shell is in nobody's way."""
    jump = f"{host.user}@127.0.0.1:{host.port}"
    own = f"Host GPU\nHostName localhost\nHostKeyAlias gpu\nPort {host.port}\nUser {host.user}\nProxyJump {jump}\n"
    for_shells = f"RemoteCommand false\nRequestTTY force\nLocalForward {user.home}/mine localhost:1\n"
    configuration = user.home / "ssh_config"
    configuration.write_text(own + for_shells + "Host *\n" + configuration.read_text())
    known = user.home / "known_hosts"
    known.write_text(known.read_text() + f"gpu {(host.folder / 'host.pub').read_text()}")
    done = user.run("push", project, "--to", "ssh://GPU/project", "--json")
    assert (done.code, done.err) == (0, "")
    assert is_same(project, host)
    assert host.logins() == 2
    assert user.run("status", project, "--json").json["server"]["url"] == "ssh://GPU"
    assert not (user.home / "mine").exists()


def test_bundles_are_replayed_over_ssh(user: User, project: Path, host: Host) -> None:
    """`bundle replay --to ssh://` sends bundle files to the workspace that the address names."""
    assert user.run("bundle", "export", project, user.home / "usb", "--full").code == 0
    assert user.run("bundle", "replay", user.home / "usb", "--to", f"{host.url}/copy").code == 0
    assert folders.listing(project) == folders.listing(tree(host, "copy"))


def test_the_data_folder_and_the_program_on_the_host_can_be_named(user: User, project: Path, host: Host) -> None:
    """They are words for the host's shell, whatever is in them, and a home folder in front is the one there."""
    (host.home / "bin").mkdir()
    (host.home / "bin" / "my server").symlink_to(BINARY)
    names = ("--ssh-data", "~/it's; echo $HOME & 100% : \\x", "--ssh-server", "~/bin/my server")
    done = user.run("push", project, "--to", host.url, *names, "--json")
    assert (done.code, done.err) == (0, "")
    data = host.home / "it's; echo $HOME & 100% : \\x"
    assert folders.listing(project) == folders.listing(data / "workspaces" / "project" / "tree")
    assert sorted(path.name for path in host.home.iterdir()) == ["bin", data.name]


def test_the_data_folder_on_the_host_is_remembered(user: User, project: Path, host: Host, place: Path) -> None:
    """A command without --ssh-data goes to the server that has the folder; another data folder is another server."""
    assert user.run("push", project, "--to", host.url, "--ssh-data", "~/big").code == 0
    assert user.run("status", project, "--json").json["server"]["url"] == f"{host.url}#~/big"
    (project / "a.txt").write_text("two\n")
    assert user.run("push", project).code == 0
    assert folders.listing(project) == folders.listing(host.home / "big" / "workspaces" / "project" / "tree")
    assert not host.data.exists()
    assert user.run("push", project, "--to", host.url).code == 2
    assert user.run("fetch", "--from", f"{host.url}/project", place / "back", "--ssh-data", "big").code == 0
    assert folders.listing(project) == folders.listing(place / "back")
    assert host.logins() == 1


def test_a_host_without_the_server_says_how_to_install_it(user: User, project: Path, host: Host) -> None:
    """Exit 4, and the line to run there; nothing is left on the host."""
    done = user.run("push", project, "--to", host.url, "--ssh-server", "deltasync-elsewhere", "--max-retries", "0")
    assert done.code == 4
    assert "install it there: pipx install '.[server]' in a clone of the repository" in done.err
    assert done.err.count("\n") == 1
    assert list(host.home.iterdir()) == []


def test_a_server_that_is_too_old_for_this_is_said(user: User, project: Path, host: Host) -> None:
    """A release that has no `attach` is one sentence."""
    old = host.home / "old"
    old.write_text(f'#!/bin/sh\nshift\nexec {BINARY} no-such-command "$@"\n')
    old.chmod(0o755)
    done = user.run("push", project, "--to", host.url, "--ssh-server", old)
    assert done.code == 1
    assert "too old" in done.err
    assert done.err.count("\n") == 1


def test_a_store_that_another_server_has_is_said(user: User, project: Path, host: Host) -> None:
    """What the host says comes through, with its exit code."""
    with serving(host.home / "data"):
        done = user.run("push", project, "--to", host.url, "--ssh-data", host.home / "data", "--max-retries", "0")
    assert done.code == 4
    assert "127.0.0.1" in done.err
    assert "started by other means" in done.err


@pytest.mark.parametrize(("command", "asks"), [("push", True), ("watch", False)])
def test_a_passphrase_is_asked_for_where_somebody_can_answer(
    user: User, project: Path, host: Host, command: str, asks: bool
) -> None:
    """On a terminal ssh may ask; a watcher, which goes on when nobody is there, never does."""
    subprocess.run(["ssh-keygen", "-q", "-p", "-N", "open sesame", "-f", host.folder / "client"], check=True)
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(user.home)
        os.execve(user_binary, [user_binary, command, project, "--to", host.url], user.environment)
    said = b""
    with bounded(pid), contextlib.suppress(OSError):  # the terminal is gone when the command has ended
        while part := os.read(terminal, 4096):
            said += part
            if b"passphrase" in part:
                os.write(terminal, b"open sesame\n")
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == (0 if asks else 7), said
    assert (b"passphrase" in said) == asks
    assert host.logins() == asks


def test_a_host_whose_key_is_not_known_is_refused(place: Path, project: Path, host: Host) -> None:
    """Nobody is asked where nobody can answer: exit 7 with what ssh says, and no login."""
    stranger = visitor(place / "v", host, knows_host=False)
    done = stranger.run("push", project, "--to", host.url)
    assert done.code == 7
    assert "Host key verification failed" in done.err
    assert done.err.count("\n") == 1
    assert host.logins() == 0


def test_a_key_that_the_host_does_not_know_is_refused(place: Path, project: Path, host: Host) -> None:
    """Exit 7 with what ssh says."""
    stranger = visitor(place / "v", host, key="stranger")
    done = stranger.run("push", project, "--to", host.url, "--json")
    assert done.code == 7
    assert done.json["error"]["code"] == "UNAUTHORIZED"
    assert "Permission denied" in done.err


def test_a_host_that_does_not_listen_is_unreachable(user: User, project: Path, host: Host) -> None:
    """Exit 4 with what ssh says, also for status."""
    host.process.terminate()
    host.process.wait(SECONDS)
    for words in (("push", project, "--to", host.url), ("status", "--to", f"{host.url}/project")):
        done = user.run(*words, "--max-retries", "0")
        assert done.code == 4
        assert "Connection refused" in done.err


def test_a_program_that_is_not_there_is_said(user: User, project: Path, host: Host) -> None:
    """Without an ssh to run there is one sentence and exit 2."""
    done = user.run("push", project, "--to", host.url, "--ssh", "/nowhere/ssh -v")
    assert done.code == 2
    assert "OpenSSH" in done.err


@pytest.mark.parametrize(
    "address",
    [
        "ssh://-oProxyCommand=touch${IFS}owned/x",
        "ssh://-oProxyCommand=touch owned@host/x",
        "ssh://-lroot@host/x",
        "ssh://user@-host/x",
        "ssh://$(touch owned)@host/x",
        "ssh://host;touch owned/x",
        "ssh://host`touch owned`/x",
        "ssh://user:secret@host/x",
        "ssh://host/x?ProxyCommand=touch",
        "ssh://host/x#%00",
        "ssh://host/x#a%0ab",
        "ssh://host:0/x",
        "ssh://host:99999/x",
        "ssh://host:22a/x",
        "ssh:///x",
        "ssh://host/a/b",
        "ssh://host/..",
        "ssh://host/%00",
        "ssh://ho%00st/x",
        "ssh://[::1/x",
        "ssh://hôst/x",
    ],
)
def test_an_address_that_could_be_an_option_or_a_word_of_a_shell_is_refused(tmp_path: Path, address: str) -> None:
    """Exit 2, before any program is run."""
    user = User(tmp_path)
    (tmp_path / "project").mkdir()
    done = user.run("push", "project", "--to", address, "--ssh", "touch owned")
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert not (tmp_path / "owned").exists()


def test_an_address_and_an_option_name_the_same_workspace_or_none_is_used(tmp_path: Path) -> None:
    """Two names for one workspace are a mistake that is said before anything is sent."""
    user = User(tmp_path)
    (tmp_path / "project").mkdir()
    done = user.run("push", "project", "--to", "ssh://host/one", "--workspace", "two", "--ssh", "touch owned")
    assert done.code == 2
    assert "one" in done.err and "two" in done.err
    assert not (tmp_path / "owned").exists()


def test_what_a_killed_command_left_is_removed(user: User, project: Path, host: Host) -> None:
    """A socket of a command that is gone is removed by the next one, and is in nobody's way."""
    watch = Watch(user, project, "--to", host.url)
    watch.heard("sent")
    watch.process.kill()
    watch.process.communicate()
    left = list((user.home / "run" / "deltasync").glob("ssh-*-*"))
    assert len(left) == 1
    (project / "a.txt").write_text("two\n")
    assert user.run("push", project).code == 0
    assert is_same(project, host)
    assert not left[0].exists()
    assert not os.path.lexists(left[0])
