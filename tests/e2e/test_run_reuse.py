"""`deltasync run --reuse`: an equal command gives the former result, and only an equal one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import Served, serving
from user import Done, User

SCRIPT = 'echo ran >> "$3"; cat "$1" > "$2"; echo "$1"; echo warned >&2'


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One host for all tests, which collects what nothing needs at once."""
    data = tmp_path_factory.mktemp("host") / "data"
    with serving(data, "--run-without-token", "--keep-sequences", "1") as served:
        yield served


@pytest.fixture
def user(tmp_path: Path, host: Served) -> User:
    """A user whose commands run on that host."""
    made = User(tmp_path / "home")
    made.environment["DELTASYNC_ON"] = host.url
    return made


@pytest.fixture
def here(user: User) -> Path:
    """The user's folder, with a file in it."""
    folder = user.home / "work"
    folder.mkdir()
    (folder / "a.txt").write_text(f"of {folder}\n")
    return folder


class Command:
    """A command that notes on the host that it ran."""

    def __init__(self, user: User, here: Path, ran: Path) -> None:
        self._user, self._here, self._ran = user, here, ran

    def run(self, *options: str, script: str = SCRIPT) -> Done:
        """Run it for a.txt, into c.txt."""
        literal = ("--literal", script, "--literal", str(self._ran))
        words = ("sh", "-c", script, "x", "{in:a.txt}", "{out:c.txt}", str(self._ran))
        done = self._user.run("run", "--reuse", *literal, *options, "--", *words, cwd=self._here)
        assert "Traceback" not in done.err
        return done

    @property
    def runs(self) -> int:
        """How often it ran."""
        return len(self._ran.read_text().splitlines()) if self._ran.exists() else 0


@pytest.fixture
def cat(user: User, here: Path, tmp_path: Path) -> Command:
    return Command(user, here, tmp_path / "ran")


def test_an_equal_command_is_not_run_again(cat: Command, here: Path, user: User) -> None:
    """The same command on the same content gives its outputs and its words again, and names the job that made them."""
    first = cat.run("--json").json
    (here / "c.txt").unlink()
    (here / "a.txt").touch()
    again = cat.run()
    assert (again.code, again.out, again.err) == (0, f"{here / 'a.txt'}\n", "warned\n")
    assert (here / "c.txt").read_text() == (here / "a.txt").read_text()
    assert (cat.runs, first["reused"]) == (1, None)
    job = user.run("jobs", "ls", "--json").json["jobs"][0]
    assert (job["state"], job["exit_code"], job["reused"]) == ("done", 0, first["job"])


@pytest.mark.parametrize("change", ["content", "mode", "word", "variable", "version"])
def test_whatever_differs_is_run(cat: Command, here: Path, change: str) -> None:
    """Another content, executable bit, word, variable or version of the tool makes another command."""
    version = here / "version"
    tool = ("--tool-version", f"cat '{version}'")
    version.write_text("1")
    cat.run(*tool)
    if change == "content":
        (here / "a.txt").write_text("another")
    elif change == "mode":
        (here / "a.txt").chmod(0o755)
    elif change == "version":
        version.write_text("2")
    options = (*tool, "--env", "NAME=value") if change == "variable" else tool
    assert cat.run(*options, script=SCRIPT + "; true" if change == "word" else SCRIPT).code == 0
    assert cat.runs == 2
    assert (here / "c.txt").read_text() == (here / "a.txt").read_text()


def test_only_what_ended_well_and_was_meant_for_it_is_reused(
    cat: Command, user: User, here: Path, tmp_path: Path
) -> None:
    """A command that failed runs again, and so does one that was run without --reuse."""
    assert cat.run(script=SCRIPT + "; exit 4").code == cat.run(script=SCRIPT + "; exit 4").code == 4
    assert cat.runs == 2
    ran = str(tmp_path / "ran")
    words = ("sh", "-c", SCRIPT, "x", "{in:a.txt}", "{out:c.txt}", ran)
    assert user.run("run", "--literal", SCRIPT, "--literal", ran, "--", *words, cwd=here).code == 0
    assert cat.run().code == 0 and cat.runs == 4
    assert user.run("run", "--tool-version", "cat", "--", "true", cwd=here).code == 121


def test_a_result_is_kept_when_it_was_brought_home(cat: Command, user: User, here: Path, host: Served) -> None:
    """A result outlives its own homecoming, others that come after it, and a collection; not its job."""
    job = cat.run("--json").json["job"]
    for number in range(2):
        assert user.run("run", "--shell", f"echo {number} > {{out:other.txt}}", cwd=here).code == 0
    (here / "c.txt").unlink()
    assert cat.run().code == 0 and cat.runs == 1 and (here / "c.txt").exists()
    assert host.request("DELETE", f"/api/v1/jobs/{job}").status == 200
    assert cat.run().code == 0 and cat.runs == 2
