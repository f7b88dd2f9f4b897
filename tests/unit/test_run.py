"""A job is started once, told to its end, and brought home to the places that were named, over ways that fail."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hostile_server import Asked as Request
from hostile_server import PassOn, Said, hostile, when
from lossy import Fault, lossy
from observed import settle
from serving import Served, serving

from deltasync.cli.progress import Meter
from deltasync.client import job_transport
from deltasync.client.ignore import IgnoreRules
from deltasync.client.job_records import JobBook, Record
from deltasync.client.job_request import Asked, drafted
from deltasync.client.job_transport import JobTransport
from deltasync.client.push import Pusher, PushOptions
from deltasync.client.run import Home, Runner, Started, exit_code_of
from deltasync.client.scan import ScanOptions, scan
from deltasync.client.state import State
from deltasync.client.transport import HttpTransport
from deltasync.core import jobs
from deltasync.core.errors import HostRefused, HostUnreachable, JobLost, NotADeltasyncServer, UsageError
from deltasync.core.jobs import Job, JobRequest, Output, Piece

LINES = b"".join(b"%d\n" % number for number in range(200_000))


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("host") / "data", "--run-without-token") as served:
        yield served


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DELTASYNC_HOME", str(tmp_path / "home"))
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


@contextlib.contextmanager
def reaching(url: str, pauses: list[float] | None = None) -> Iterator[HttpTransport]:
    """Reach a server, without waiting between attempts."""
    pause = [].append if pauses is None else pauses.append
    with contextlib.closing(HttpTransport(url, timeout=20, max_retries=2, pause=pause)) as transport:
        yield transport


def request(*argv: str) -> JobRequest:
    return JobRequest(key=secrets.token_hex(16), client_id="a" * 32, argv=[[Piece(text=word)] for word in argv])


def start(runner: Runner, here: Path, *argv: str) -> Started:
    return runner.start(drafted(Asked(argv), str(here)), Meter())


def a_record(number: int) -> Record:
    """Return a record of a job that was never started."""
    return Record(id=f"ds_1_{number:08x}", url="u", command=[], started_at="2999")


class Heard:
    """What a command said."""

    def __init__(self) -> None:
        self.stdout, self.stderr = b"", b""

    def out(self, content: bytes) -> None:
        self.stdout += content

    def err(self, content: bytes) -> None:
        self.stderr += content


# The way to the host


def test_a_job_whose_answer_was_lost_is_started_once(host: Served) -> None:
    """The request goes again with its key, and the host has one job of it."""
    with lossy(host.port) as proxy, reaching(proxy.url) as transport, reaching(host.url) as direct:
        before = len(JobTransport(direct).jobs())
        proxy.faults.append(fault := Fault(b"POST /api/v1/jobs", swallow=True))
        job = JobTransport(transport).start(request("true"))
        assert fault.has_happened.is_set()
        assert [each.id for each in JobTransport(direct).jobs()][: -before or None] == [job.id]


def test_a_log_that_breaks_off_goes_on_behind_its_last_event(host: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often the connection ends in the middle of an event, every byte is told once, and the end is the end."""
    monkeypatch.setattr(job_transport, "LOSSES_MAX", 1)  # what brought something is no loss in a row
    with hostile(host.port) as double, reaching(double.url) as transport:
        there = JobTransport(transport)
        job = there.start(request("seq", "0", "199999"))
        list(there.logs(job.id))

        def cut(_: Request, pass_on: PassOn) -> Said:
            said = pass_on()
            first, end, rest = said.body.partition(b"\n\n")
            said.body = first + end + rest[:10]
            return said

        asked = len(double.asked)
        double.lie = when("GET /jobs/.*/logs", cut)
        events = list(there.logs(job.id))
        assert b"".join(event.content for event in events if event.kind == "stdout") == LINES
        assert events[-1].job is not None and events[-1].job.state is jobs.State.DONE
        assert len(double.asked) - asked == len(events) > 2


def test_a_log_that_never_comes_is_given_up(host: Served) -> None:
    """After some attempts in a row that bring nothing the host is unreachable; the pauses between them grow."""
    pauses: list[float] = []
    with hostile(host.port) as double, reaching(double.url, pauses) as transport:
        job = JobTransport(transport).start(request("true"))
        double.lie = when("GET /jobs/.*/logs", lambda _, pass_on: iter([b""]))
        with pytest.raises(HostUnreachable):
            list(JobTransport(transport).logs(job.id))
    assert len(pauses) == job_transport.LOSSES_MAX and pauses[-1] > pauses[0]


def test_a_log_that_goes_back_is_no_log(host: Served) -> None:
    """A host that tells a place twice would have the same bytes written twice."""
    with hostile(host.port) as double, reaching(double.url) as transport:
        job = JobTransport(transport).start(request("true"))

        def twice(_: Request, pass_on: PassOn) -> Said:
            said = pass_on()
            said.body = b"id: 9\nevent: stdout\ndata: eA==\n\n" * 2
            return said

        double.lie = when("GET /jobs/.*/logs", twice)
        with pytest.raises(NotADeltasyncServer, match="goes back"):
            list(JobTransport(transport).logs(job.id))


@pytest.mark.parametrize("found", ["../../tokens", "ds_1_0000000g", "ds_1_00000000/x", ""])
def test_an_id_that_is_none_becomes_no_path(host: Served, found: str) -> None:
    """What a host calls a job, and what a user does, is the id of one, or refused."""
    with hostile(host.port) as double, reaching(double.url) as transport:

        def renamed(_: Request, pass_on: PassOn) -> Said:
            said = pass_on()
            said.body = msgspec.json.encode({**json.loads(said.body), "id": found})
            return said

        double.lie = when("POST /jobs", renamed)
        with pytest.raises(NotADeltasyncServer):
            JobTransport(transport).start(request("true"))
        asked = len(double.asked)
        with pytest.raises(UsageError):
            JobTransport(transport).job(found)
        assert len(double.asked) == asked


# What is sent, and what comes home


def test_a_workspace_that_the_host_lost_is_no_hindrance(host: Served, here: Path) -> None:
    """Where a sequence that this side counts on is gone there, the inputs go by themselves, and the command runs."""
    (here / "a.txt").write_text("alpha")
    settle(here / "a.txt")
    with hostile(host.port) as double, reaching(double.url) as transport:
        with State.open(here) as state, Pusher(state, transport, PushOptions(workspace="lost")) as pusher:
            scan(state, ScanOptions(IgnoreRules(here)))
            pusher.run()

        def gone(_: Request, pass_on: PassOn) -> Said:
            problem = {
                "type": "about:blank",
                "title": "Gone",
                "status": 410,
                "detail": "not kept",
                "code": "SEQUENCE_GONE",
            }
            return Said(410, dict(pass_on().headers), msgspec.json.encode(problem))

        double.lie = when("POST /jobs", gone, times=1)
        notes: list[str] = []
        runner = Runner(transport, note=notes.append, settle_seconds=0.0)
        heard = Heard()
        assert exit_code_of(runner.follow(start(runner, here, "cat", "a.txt").job, heard)) == 0
        assert heard.stdout == b"alpha" and len(notes) == 1


def test_nothing_comes_home_to_a_place_that_nobody_named(host: Served, here: Path) -> None:
    """A host that returns more than it was asked for is told of; no file of it is written."""
    (here / "a.txt").write_text("alpha")
    with reaching(host.url) as transport:
        runner = Runner(transport, note=[].append, settle_seconds=0.0)
        started = start(runner, here, "sh", "-c", "cp {in:a.txt} {out:c.txt}; cp {in:a.txt} {out:d.txt}")
        job = runner.follow(started.job, Heard())
        outputs, named = started.record.outputs[:1], started.record.named[:1]
        record = msgspec.structs.replace(started.record, outputs=outputs, named=named)
        home = runner.fetch(record, job, Meter())
    assert {each.name for each in here.iterdir()} == {"a.txt", "c.txt"}
    assert [(each.place, "not asked for" in each.reason) for each in home.problems] == [(f"{here}/d.txt"[1:], True)]


@pytest.mark.parametrize(
    ("place", "target"),
    [
        ("home/u/o.txt", "/home/u/o.txt"),
        ("home/u/f_001.png", "/home/u/f_001.png"),
        ("home/u/link", "/data/real"),
        ("home/u/link/new", "/data/real/new"),
        ("home/u/f_x.png", None),
        ("home/u/any/f_001.png", None),
        ("home/u/..", None),
        ("home/u/any*/x", None),
        ("home/u/all/..", None),
        ("home/u/link/../x", None),
        ("home/u/all/.deltasync", None),
        ("home/u/linked", None),
        ("etc/passwd", None),
        ("", None),
    ],
)
def test_a_place_leads_where_it_was_named_or_nowhere(place: str, target: str | None) -> None:
    """An output, a file of a pattern, and what lies in an input that may change have targets; nothing else has."""
    outputs = [
        Output(place="home/u/o.txt"),
        Output(place="home/u/f_%03d.png", is_pattern=True),
        Output(place="home/u/all/*", is_pattern=True),
    ]
    record = Record(
        id="ds_1_00000000", url="", command=[], started_at="", outputs=outputs, in_place={"home/u/link": "/data/real"}
    )
    assert record.target(place) == (target and Path(target))


def test_a_name_with_brackets_leads_to_itself_alone(host: Served, here: Path) -> None:
    """What a host returns for `c [1].txt` is never written to `c 1.txt`, which that would match as a pattern."""
    (here / "c 1.txt").write_text("mine")
    with reaching(host.url) as transport:
        runner = Runner(transport, note=[].append, settle_seconds=0.0)
        started = start(
            runner, here, "sh", "-c", 'for each in "$@"; do echo there > "$each"; done', "x", "{out:c [1].txt}"
        )
        assert started.record.target(f"{here}/c 1.txt"[1:]) is None
        runner.follow(started.job, Heard())
        assert home_of(runner, started).is_whole
    assert (here / "c [1].txt").read_text() == "there\n" and (here / "c 1.txt").read_text() == "mine"


def test_what_is_home_is_acknowledged_and_what_is_not_stays(host: Served, here: Path) -> None:
    """While something could not be written here the host keeps everything; the record knows which jobs wait."""
    (here / "sub").mkdir()
    with reaching(host.url) as transport:
        runner = Runner(transport, note=[].append, settle_seconds=0.0)
        started = start(runner, here, "sh", "-c", "echo x > {out:sub/c.txt}")
        job = runner.follow(started.job, Heard())
        (here / "sub").rmdir()
        home = runner.fetch(started.record, job, Meter())
        assert home.problems and not home.is_whole
        assert not runner.jobs.job(job.id).acknowledged and not JobBook.of_user().named(job.id).is_home
        (here / "sub").mkdir()
        assert runner.fetch(started.record, job, Meter()).is_whole
        assert (here / "sub/c.txt").read_text() == "x\n"
        assert runner.jobs.job(job.id).acknowledged and JobBook.of_user().named(job.id).is_home


def written(runner: Runner, here: Path, content: str, out: str = "{out:c.txt}") -> Started:
    """Have a command write an output, and wait for its end; nothing comes home yet."""
    started = start(runner, here, "sh", "-c", f"echo {content} > {out}")
    assert exit_code_of(runner.follow(started.job, Heard())) == 0
    return started


def home_of(runner: Runner, started: Started) -> Home:
    """Bring home what a command wrote, as a later process does."""
    return runner.fetch(JobBook.of_user().named(started.job.id), runner.jobs.job(started.job.id), Meter())


def test_an_older_job_never_replaces_what_a_later_one_brought(host: Served, here: Path) -> None:
    """Its output is told and stays on the host, until what is there was moved away; then it comes."""
    with reaching(host.url) as transport:
        runner = Runner(transport, note=[].append, settle_seconds=0.0)
        older = written(runner, here, "older")
        later = written(runner, here, "later")
        assert home_of(runner, later).is_whole
        home = home_of(runner, older)
        assert (here / "c.txt").read_text() == "later\n" and not home.is_whole
        assert [(each.place, "changed here since" in each.reason) for each in home.problems] == [
            (str(here / "c.txt"), True)
        ]
        assert not runner.jobs.job(older.job.id).acknowledged
        (here / "c.txt").rename(here / "kept.txt")
        assert home_of(runner, older).is_whole and (here / "c.txt").read_text() == "older\n"


def test_of_two_jobs_that_come_home_late_the_later_one_stays(host: Served, here: Path) -> None:
    """What an older job brought gives way to what a later one wrote, also where the older came home in two attempts."""
    (here / "sub").mkdir()
    with reaching(host.url) as transport:
        runner = Runner(transport, note=[].append, settle_seconds=0.0)
        older = written(runner, here, "older", "{out:c.txt}; echo x > {out:sub/d.txt}")
        later = written(runner, here, "later")
        (here / "sub").rmdir()
        assert not home_of(runner, older).is_whole and (here / "c.txt").read_text() == "older\n"
        (here / "sub").mkdir()
        assert home_of(runner, older).is_whole
        assert home_of(runner, later).is_whole and (here / "c.txt").read_text() == "later\n"


def test_what_was_made_here_since_a_job_was_started_is_left(host: Served, here: Path) -> None:
    """In the place of an output, and inside of a folder that is one; what is as it was then is replaced."""
    (here / "out").mkdir()
    for name in ("c.txt", "out/old", "out/edited"):
        (here / name).write_text("mine")
    with reaching(host.url) as transport:
        runner = Runner(transport, note=[].append, settle_seconds=0.0)
        script = "{out:c.txt}; cd {out:out/}; for each in old edited new; do echo there > $each; done"
        started = written(runner, here, "there", script)
        (here / "out/edited").write_text("edited")
        (here / "out/new").write_text("new")
        home = home_of(runner, started)
    assert {each.place for each in home.problems} == {str(here / "out/edited"), str(here / "out/new")}
    assert (here / "c.txt").read_text() == (here / "out/old").read_text() == "there\n"
    assert ((here / "out/edited").read_text(), (here / "out/new").read_text()) == ("edited", "new")


def test_a_damaged_record_hides_no_other(host: Served, here: Path) -> None:
    """A record that cannot be read is left out of the book, and can be asked for no more."""
    book = JobBook.of_user()
    for number in range(2):
        book.write(a_record(number))
    (here.parent / "home/jobs/ds_1_00000000.json").write_bytes(b"{")
    (here.parent / "home/jobs/other.txt").write_bytes(b"")
    assert [each.id for each in book.records()] == ["ds_1_00000001"]


def test_a_record_costs_the_same_however_many_there_are(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing one lists no folder and opens no other record: thousands of files in a row are no slower at the end."""
    book = JobBook.of_user()
    book.write(a_record(0))
    with monkeypatch.context() as patch:
        for name in ("listdir", "scandir"):
            patch.setattr(os, name, lambda *_: pytest.fail("a folder was listed"))
        opened, real = [], os.open
        patch.setattr(os, "open", lambda path, *rest, **more: opened.append(str(path)) or real(path, *rest, **more))
        for number in range(1, 40):
            book.write(a_record(number))
        assert len(opened) <= 3 * 39 and not [each for each in opened if each.endswith(".json")]
    assert len(book.records()) == 40


def test_records_are_forgotten_when_the_host_has_forgotten_their_jobs(here: Path) -> None:
    """What was not written for a month goes, also where it cannot be read; that is looked for once a day."""
    book, folder = JobBook.of_user(), here.parent / "home/jobs"
    month_ago = time.time() - 32 * 86_400
    for number in range(3):
        book.write(a_record(number))
    (folder / "ds_1_00000001.json").write_bytes(b"{")
    for name in ("ds_1_00000000.json", "ds_1_00000001.json"):
        os.utime(folder / name, (month_ago, month_ago))
    book.write(a_record(3))
    assert len(list(folder.glob("*.json"))) == 4
    os.utime(folder / "looked", (month_ago, month_ago))
    book.write(a_record(4))
    assert sorted(each.name[-6:-5] for each in folder.glob("*.json")) == ["2", "3", "4"]


def test_a_host_that_would_refuse_is_asked_before_anything_is_sent(tmp_path: Path, here: Path) -> None:
    """The sentence of the host is the error, and not one bundle reaches it."""
    (here / "a.txt").write_text("alpha")
    with serving(tmp_path / "data", "--no-run") as served, reaching(served.url) as transport:
        runner = Runner(transport, note=[].append)
        with pytest.raises(HostRefused, match="--no-run"):
            start(runner, here, "cat", "a.txt")
        assert served.get("/api/v1/workspaces").json["workspaces"] == []


@pytest.mark.parametrize(
    ("ended", "code"),
    [
        ({"state": "done", "exit_code": 0}, 0),
        ({"state": "done", "exit_code": 255}, 255),
        ({"state": "done", "signal": 15}, 143),
        ({"state": "failed", "reason": "no"}, None),
        ({"state": "failed", "exit_code": 0}, None),
        ({"state": "cancelled", "signal": 15}, None),
        ({"state": "lost"}, None),
        ({"state": "running"}, None),
        ({"state": "done"}, None),
    ],
)
def test_only_a_job_that_ran_to_its_end_has_a_code(ended: dict[str, Any], code: int | None) -> None:
    """Whatever else became of a job is 125, with its reason."""
    facts = {"id": "ds_1_00000000", "client_id": "a" * 32, "command": [], "session_path": "/s", "created_at": ""}
    job = msgspec.convert({**facts, **ended}, Job)
    if code is not None:
        assert exit_code_of(job) == code
        return
    with pytest.raises(JobLost) as caught:
        exit_code_of(job)
    assert caught.value.exit_code == 125 and ended.get("reason", "") in caught.value.sentence
