"""`deltasync run` on a host that was paired, as README says it: over TLS, with a scope that allows it or does not."""

from __future__ import annotations

import subprocess
from pathlib import Path

from remote_runs import Terminal
from secured import Secured, secured
from serving import BINARY
from user import User

PAIR = "deltasync-server pair "
README = Path(__file__).parents[2] / "README.md"


def paired(terminal: Terminal, host: Secured, *flags: str) -> None:
    """Pair a user with a host, which is called box from then on."""
    words = [BINARY, "pair", "--data", host.data, *flags]
    code = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    added = terminal.user.run("host", "add", "box", f"https://127.0.0.1:{host.port}", code)
    assert added.code == 0, added.err


def test_a_paired_host_runs_commands_where_the_pairing_says_so(tmp_path: Path) -> None:
    """Paired as README says a command runs and its output comes home; by `pair` alone it is 122, and what mends it."""
    (words,) = (line.split("#")[0].split() for line in README.read_text().splitlines() if line.startswith(PAIR))
    with secured(tmp_path, listen="0.0.0.0:0") as host:
        terminal = Terminal.at(tmp_path / "home", "box")
        (terminal.folder / "a.txt").write_text("alpha\n")
        paired(terminal, host)
        refused = terminal.run("--", "cp", "a.txt", "b.txt")
        assert refused.code == 122 and refused.err.count("\n") == 1, refused
        assert "`deltasync-server pair --scope push,run`" in refused.err and "`deltasync host rm NAME`" in refused.err
        assert terminal.user.run("host", "rm", "box").code == 0
        paired(terminal, host, *words[2:])
        done = terminal.run("--", "cp", "a.txt", "b.txt")
        assert (done.code, done.err) == (0, ""), done
        assert (terminal.folder / "b.txt").read_text() == "alpha\n"
        assert terminal.user.run("jobs", "ls").out.count("done") == 1


def test_a_host_that_a_variable_names_already_can_be_added(tmp_path: Path) -> None:
    """With DELTASYNC_ON or DELTASYNC_TO set to a name that is not known yet, `host add` makes it known."""
    for number, name in enumerate(("DELTASYNC_ON", "DELTASYNC_TO")):
        user = User(tmp_path / str(number))
        user.environment[name] = "box"
        added = user.run("host", "add", "box", "http://127.0.0.1:9")
        assert added.code == 0, added.err
        assert "box" in user.run("host", "ls").out
