"""The queue: which job runs when, with which GPUs, and what becomes of jobs when a server stops or died."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from commands import given, shell, wanted
from sender import Sender
from serving import SECONDS, until

from deltasync.core.errors import Corrupt, LimitExceeded, NoSpace, SequenceGone
from deltasync.core.hashing import digest_of
from deltasync.core.jobs import Gpu, Job, JobRequest, Output, Piece, Returned, State
from deltasync.core.names import WorkspaceName
from deltasync_server.config import StoreConfig
from deltasync_server.jobs.desk import LOST, Jobs
from deltasync_server.jobs.leftovers import MARK, start_of
from deltasync_server.jobs.log import Kind, Log
from deltasync_server.jobs.table import note
from deltasync_server.receive import Store
from deltasync_server.tenants import DEFAULT, Tenant

ALICE, BOB = Tenant("alice"), Tenant("bob")
GPUS = [Gpu(name="one", memory_bytes=2, memory_free_bytes=1), Gpu(name="two")]


@contextmanager
def working(data: Path, *, gpus: list[Gpu] | None = None, starts: bool = True, **settings: Any) -> Iterator[Jobs]:
    """Lend the jobs of a store, which are worked on."""
    with Store(StoreConfig(data, **settings)) as store:
        store.recover()
        with Jobs(store, lambda: list(gpus or [])) as jobs:
            if starts:
                jobs.start()
            yield jobs


def submitted(jobs: Jobs, request: JobRequest, tenant: Tenant = DEFAULT) -> str:
    job, is_new = jobs.submit(tenant, request)
    assert is_new
    return job.id


def reached(jobs: Jobs, job_id: str, state: State, tenant: Tenant = DEFAULT) -> Job:
    until(lambda: jobs.job(tenant, job_id).state is state)
    return jobs.job(tenant, job_id)


def waits_for(folder: Path, name: str) -> str:
    """Return a script that ends when a file is there."""
    return f"until test -e '{folder / name}'; do sleep 0.01; done"


def test_one_at_a_time_the_more_urgent_first(tmp_path: Path) -> None:
    """With one slot the others wait; when it is free the highest priority goes, and among equals the oldest."""
    with working(tmp_path / "data", slots=1) as jobs:
        first = submitted(jobs, shell(waits_for(tmp_path, "go")))
        reached(jobs, first, State.RUNNING)
        order = tmp_path / "order"
        queued = [
            submitted(jobs, shell(f"echo {number} >> '{order}'", priority=priority))
            for number, priority in enumerate((0, 7, 0))
        ]
        assert [jobs.job(DEFAULT, each).ahead for each in queued] == [1, 0, 2]
        assert jobs.capabilities("").slots_free == 0
        (tmp_path / "go").touch()
        for each in queued:
            reached(jobs, each, State.DONE)
        assert order.read_text().split() == ["1", "0", "2"]


def test_who_waits_for_gpus_holds_up_nobody_else(tmp_path: Path) -> None:
    """Each job has GPUs of its own; one that waits for them lets pass who needs none, but not who needs fewer."""
    script = 'echo "$CUDA_VISIBLE_DEVICES"; ' + waits_for(tmp_path, "go")
    with working(tmp_path / "data", gpus=GPUS) as jobs:
        one = submitted(jobs, shell(script, gpus=1))
        assert reached(jobs, one, State.RUNNING).gpus == [0]
        both, other = (submitted(jobs, shell("true", gpus=count)) for count in (2, 1))
        none = submitted(jobs, shell('echo "<$CUDA_VISIBLE_DEVICES>"'))
        reached(jobs, none, State.DONE)
        assert [jobs.job(DEFAULT, each).state for each in (both, other)] == [State.QUEUED] * 2
        assert (jobs.capabilities("").gpus, jobs.capabilities("").gpus_free) == (GPUS, 1)
        (tmp_path / "go").touch()
        for each in (one, both, other):
            assert reached(jobs, each, State.DONE).gpus == []
        said = [b"".join(each.content for each in jobs.reader(job_id, 0).read(99)) for job_id in (one, none)]
        assert said == [b"0\n", b"<>\n"]
        with pytest.raises(LimitExceeded, match="2 GPUs, not 3"):
            jobs.submit(DEFAULT, shell("true", gpus=3))


def test_kept_sessions_are_bounded(tmp_path: Path) -> None:
    """A session stays as long as was asked for, and where all are kept by jobs that are over no more are taken."""
    with working(tmp_path / "data", job_sessions=1) as jobs:
        kept = submitted(jobs, shell("echo made > file", keep_seconds=1000))
        folder = Path(reached(jobs, kept, State.DONE).session_path)
        assert (folder / "work/file").read_text() == "made\n"
        with pytest.raises(NoSpace, match="1 sessions are kept"):
            jobs.submit(DEFAULT, wanted("true"))
        jobs.cancel(DEFAULT, kept)  # it is over: this forgets it
        assert not folder.exists()
        reached(jobs, submitted(jobs, wanted("true")), State.DONE)


def test_no_tenant_keeps_all_sessions(tmp_path: Path) -> None:
    """One that keeps half of them may keep no more: such jobs wait or are refused, all others run."""
    with working(tmp_path / "data", job_sessions=4, slots=4) as jobs:
        script = waits_for(tmp_path, "go")
        kept = [submitted(jobs, shell(script, keep_seconds=1000), ALICE) for _ in range(4)]
        for job_id in kept[:2]:
            reached(jobs, job_id, State.RUNNING, ALICE)
        reached(jobs, submitted(jobs, wanted("true"), BOB), State.DONE, BOB)  # the queue was looked at since
        assert [jobs.job(ALICE, job_id).state for job_id in kept[2:]] == [State.QUEUED] * 2
        (tmp_path / "go").touch()
        for job_id in kept[:2]:
            reached(jobs, job_id, State.DONE, ALICE)
        with pytest.raises(NoSpace, match="2 sessions of yours are kept here, and no more than 2 may"):
            jobs.submit(ALICE, shell("true", keep_seconds=1000))
        reached(jobs, submitted(jobs, wanted("true"), ALICE), State.DONE, ALICE)  # it keeps none
        reached(jobs, submitted(jobs, shell("true", keep_seconds=1000), BOB), State.DONE, BOB)
        assert [jobs.job(ALICE, job_id).state for job_id in kept[2:]] == [State.QUEUED] * 2
        jobs.cancel(ALICE, kept[0])  # it is over: this forgets it
        reached(jobs, kept[2], State.DONE, ALICE)


def test_tenants_take_turns(tmp_path: Path) -> None:
    """Who has many jobs, and urgent ones, holds up nobody else's: they take turns; each tells its own place."""
    with working(tmp_path / "data", slots=1) as jobs:
        first = submitted(jobs, shell(waits_for(tmp_path, "go")), ALICE)
        reached(jobs, first, State.RUNNING, ALICE)
        order = tmp_path / "order"

        def asked(tenant: Tenant, number: int, **fields: Any) -> tuple[Tenant, str]:
            return tenant, submitted(jobs, shell(f"echo {tenant}{number} >> '{order}'", **fields), tenant)

        queued = [asked(ALICE, number, priority=1000) for number in range(3)]
        queued += [asked(BOB, 0), asked(BOB, 1, priority=1)]
        assert [jobs.job(*each).ahead for each in queued] == [0, 1, 2, 1, 0]
        (tmp_path / "go").touch()
        for tenant, job_id in queued:
            reached(jobs, job_id, State.DONE, tenant)
        assert order.read_text().split() == ["bob1", "alice0", "bob0", "alice1", "alice2"]


def test_a_job_that_is_over_holds_nothing(tmp_path: Path) -> None:
    """Its session is gone, and a collection takes the inputs that nothing else needs."""
    with working(tmp_path / "data", keep_sequences=1) as jobs:
        store, sender = jobs._store, Sender(name=WorkspaceName("w"))
        sender.send(store, sender.tree(a=b"only of the job"))
        job_id = submitted(jobs, shell(waits_for(tmp_path, "go"), inputs=[given("a", "a")]))
        reached(jobs, job_id, State.RUNNING)
        sender.send(store, {})
        store.catch_up()
        assert store.collect().blobs == 0
        (tmp_path / "go").touch()
        reached(jobs, job_id, State.DONE)
        until(lambda: os.listdir(tmp_path / "data/sessions") == [".lock"])
        until(lambda: store.collect().blobs == 1)


def test_a_command_that_wrote_through_a_link_reaches_nobody(tmp_path: Path) -> None:
    """With --trust-jobs every blob is looked at after a job: a changed one is put away before anyone gets it."""
    with working(tmp_path / "data", trust_jobs=True) as jobs:
        store, sender = jobs._store, Sender(name=WorkspaceName("w"))
        sender.send(store, sender.tree(a=b"as it was", b=b"touched"))
        job_id = submitted(
            jobs,
            shell("cd ../inputs/w; chmod u+w a; echo changed > a; touch b", inputs=[given("w")]),
        )
        reached(jobs, job_id, State.DONE)
        assert not store.cache.holds_right_bytes(digest_of(b"changed\n"))
        if jobs._sessions.links == "hardlink":
            assert store.cache.status(digest_of(b"as it was")) is None
        assert store.cache.holds_right_bytes(digest_of(b"touched"))


def test_a_stopping_server_ends_its_jobs_and_keeps_the_queue(tmp_path: Path) -> None:
    """What runs is asked to end, is lost, and leaves no session; what waited waits for the next start."""
    with working(tmp_path / "data", slots=1) as jobs:
        running = submitted(
            jobs, shell(f"trap 'touch {tmp_path}/asked; exit' TERM; touch {tmp_path}/up; while :; do sleep 0.01; done")
        )
        queued = submitted(jobs, wanted("true"))
        until((tmp_path / "up").exists)
        jobs.stop()
        assert jobs.job(DEFAULT, running).state is State.LOST and (tmp_path / "asked").exists()
        assert jobs.job(DEFAULT, queued).state is State.QUEUED
        assert not Path(jobs.job(DEFAULT, running).session_path).exists()
    with working(tmp_path / "data") as jobs:
        reached(jobs, queued, State.DONE)


@pytest.mark.parametrize("state", [State.STAGING, State.RUNNING, State.COLLECTING])
def test_what_a_dead_server_worked_on_is_lost(tmp_path: Path, state: State) -> None:
    """Its process group is killed, its session removed, its log stays, and its row says what happened."""
    with working(tmp_path / "data", starts=False) as jobs:
        job_id = submitted(jobs, shell("true"))
        process = subprocess.Popen(["sleep", "1000"], start_new_session=True)
        with jobs._store.state.write() as db:
            note(db, job_id, state=state.value, pid=process.pid, pid_start=start_of(process.pid))
        for name in (job_id, f".making-{job_id}"):
            (tmp_path / "data/sessions" / name / "inputs").mkdir(parents=True)
        log = Log(tmp_path / "data/jobs" / job_id, 1 << 20)
        log.append(Kind.OUT, b"so far")
        log.close()
    with working(tmp_path / "data") as jobs:
        found = jobs.job(DEFAULT, job_id)
        assert (found.state, found.reason, found.log_bytes) == (State.LOST, LOST, 6)
        assert process.wait(SECONDS) == -9
        assert os.listdir(tmp_path / "data/sessions") == [".lock"]


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("what", ["group", "mark"])
def test_a_store_that_does_not_open_has_ended_what_ran(tmp_path: Path, what: str, elsewhere: bool) -> None:
    """By the pid that its row has, or, where the database cannot be read, by the sessions that are there."""
    settings: dict[str, Any] = {"sessions_dir": tmp_path / "elsewhere"} if elsewhere else {}
    with working(tmp_path / "data", starts=False, **settings) as jobs:
        job_id = submitted(jobs, shell("true"))
        environment = {} if what == "group" else {MARK: job_id}
        process = subprocess.Popen(["/bin/sleep", "1000"], start_new_session=True, env=environment)
        with jobs._store.state.write() as db:
            note(db, job_id, state=State.RUNNING.value, pid=process.pid, pid_start=start_of(process.pid))
        (jobs._sessions.path / job_id).mkdir()
    try:
        if what == "mark":
            (tmp_path / "data/state.db").write_bytes(b"no database" * 1000)
            with pytest.raises(Corrupt):
                Store(StoreConfig(tmp_path / "data", **settings))
        else:
            Store(StoreConfig(tmp_path / "data", **settings)).stop()
        assert process.wait(SECONDS) == -9
    finally:
        process.kill()


@pytest.mark.parametrize("state", [State.DONE, State.FAILED, State.CANCELLED])
def test_an_end_is_recorded_when_the_database_takes_it_again(tmp_path: Path, state: State) -> None:
    """What the database refuses for a while is no other end, and the job does not stay where it was."""
    with working(tmp_path / "data") as jobs:
        with jobs._store.state.write() as db:
            refuse = f"BEFORE UPDATE OF state ON jobs WHEN NEW.state = '{state}' BEGIN SELECT RAISE(FAIL, 'busy'); END"
            db.execute(f"CREATE TRIGGER refuse {refuse}")
        command = {State.DONE: ["true"], State.FAILED: ["no-such-command"], State.CANCELLED: ["sleep", "1000"]}[state]
        job_id = submitted(jobs, wanted(*command))
        session = Path(jobs.job(DEFAULT, job_id).session_path)
        if state is State.CANCELLED:
            reached(jobs, job_id, State.RUNNING)
            jobs.cancel(DEFAULT, job_id)
        until(lambda: jobs.job(DEFAULT, job_id).state is not State.QUEUED and not session.exists())
        with jobs._store.state.write() as db:
            db.execute("DROP TRIGGER refuse")
        until(lambda: jobs.job(DEFAULT, job_id).state.is_over)
        assert jobs.job(DEFAULT, job_id).state is state


def test_an_end_that_cannot_be_recorded_holds_up_no_stop(tmp_path: Path) -> None:
    """A server that stops does not wait for a database that takes nothing; the next start says that the job is lost."""
    with working(tmp_path / "data") as jobs:
        with jobs._store.state.write() as db:
            db.execute("CREATE TRIGGER refuse BEFORE UPDATE OF ended ON jobs BEGIN SELECT RAISE(FAIL, 'full'); END")
        job_id = submitted(jobs, wanted("no-such-command"))
        reached(jobs, job_id, State.RUNNING)
        stopping = threading.Thread(target=jobs.stop)
        stopping.start()
        try:
            until(lambda: not stopping.is_alive())
        finally:
            with jobs._store.state.write() as db:
                db.execute("DROP TRIGGER refuse")
            stopping.join()
    with working(tmp_path / "data") as jobs:
        assert jobs.job(DEFAULT, job_id).state is State.LOST


def test_outputs_wait_until_room_is_made(tmp_path: Path) -> None:
    """While the store removes what nothing needs, a command that has ended is not thrown away."""
    quota = 12_000_000
    with working(tmp_path / "data", keep_sequences=1, evict_after_seconds=0.0, quota=quota) as jobs:
        store, sender = jobs._store, Sender()
        flat = sender.tree(old=os.urandom(8_000_000))
        sender.send(store, flat)
        sender.send(store, {})
        store.catch_up()
        store.upkeep()
        store.start()  # from here on room is made beside whoever asks for it
        script = "head -c 5000000 /dev/urandom > ../outputs/o"
        job_id = submitted(jobs, shell(script, outputs=[Output(place="o")]))
        returned = reached(jobs, job_id, State.DONE).returned
        assert returned is not None and (returned.bytes, returned.problems) == (5_000_000, [])
        assert store.cache.status(flat["old"].digest) is None


def test_a_start_keeps_the_sessions_that_are_to_be_kept(tmp_path: Path) -> None:
    """A restart takes no folder that somebody asked to keep, and no log of a job that is remembered."""
    with working(tmp_path / "data") as jobs:
        kept = submitted(jobs, shell("echo said", keep_seconds=1000))
        reached(jobs, kept, State.DONE)
        (tmp_path / "data/jobs/ds_1_00000001").mkdir()
    with working(tmp_path / "data") as jobs:
        assert os.listdir(tmp_path / "data/jobs") == [kept]
        assert Path(jobs.job(DEFAULT, kept).session_path).is_dir()


def test_a_repeated_request_needs_nothing_anew(tmp_path: Path) -> None:
    """The answer to a key that came before is its job, also where the inputs could not be named any more."""
    with working(tmp_path / "data", starts=False, keep_sequences=1) as jobs:
        store, sender = jobs._store, Sender(name=WorkspaceName("w"))
        sender.send(store, sender.tree(a=b"a"))
        request = wanted("true", inputs=[given("a", "a")])
        first = submitted(jobs, request)
        sender.send(store, {})
        found, is_new = jobs.submit(DEFAULT, request)
        assert (found.id, is_new) == (first, False)
        with pytest.raises(SequenceGone):
            jobs.submit(DEFAULT, wanted("true", inputs=request.inputs))


def test_every_wait_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More jobs than may wait are refused with both figures."""
    monkeypatch.setattr("deltasync_server.jobs.desk.QUEUED_MAX", 2)
    with working(tmp_path / "data", starts=False) as jobs:
        for _ in range(2):
            jobs.submit(DEFAULT, wanted("true"))
        with pytest.raises(NoSpace, match="2 jobs wait here, and no more than 2 may"):
            jobs.submit(DEFAULT, wanted("true"))


def test_no_tenant_takes_the_whole_queue(tmp_path: Path) -> None:
    """One that has as many jobs waiting as it may is refused with both figures; another one is not."""
    with working(tmp_path / "data", starts=False, tenant_queued=2) as jobs:
        for _ in range(2):
            jobs.submit(ALICE, wanted("true"))
        with pytest.raises(NoSpace, match="2 jobs of yours wait here, and no more than 2 may"):
            jobs.submit(ALICE, wanted("true"))
        assert submitted(jobs, wanted("true"), BOB)


def test_the_ledger_counts_sessions_and_logs(tmp_path: Path) -> None:
    """What jobs take below DATA is in the count of what the store holds (spec ST-130)."""
    with working(tmp_path / "data") as jobs:
        script = "head -c 100000 /dev/zero > file; head -c 5000 /dev/zero"
        reached(jobs, submitted(jobs, shell(script, keep_seconds=1000)), State.DONE)
        found = jobs._store.ledger.count()
        assert found["sessions"] == 100_000 and 5000 < found["jobs"] < 6000


def test_what_is_released_is_released_once(tmp_path: Path) -> None:
    """An acknowledged job says so, and saying it again changes nothing."""
    with working(tmp_path / "data") as jobs:
        job_id = submitted(jobs, wanted("true", outputs=[Output(place="o")]))
        reached(jobs, job_id, State.DONE)
        assert not jobs.acknowledge(DEFAULT, job_id).acknowledged  # it returned nothing
        returned = Returned(workspace="r", sequence=1, root="0" * 64, files=1, bytes=1, places=["o"])
        import msgspec

        with jobs._store.state.write() as db:
            note(db, job_id, returned=msgspec.json.encode(returned))
        assert [jobs.acknowledge(DEFAULT, job_id).acknowledged for _ in range(2)] == [True, True]


def test_what_a_command_leaves_in_its_folder_is_a_problem_of_its_job(tmp_path: Path) -> None:
    """A file that a command that ends with 0 makes by a bare name is told; one that fails tells none."""
    with working(tmp_path / "data") as jobs:
        job = reached(jobs, submitted(jobs, shell("echo 1 > d.tgz")), State.DONE)
        assert job.returned is not None and "d.tgz was written" in job.returned.problems[0].reason
        assert reached(jobs, submitted(jobs, shell("echo 1 > d.tgz; exit 3")), State.DONE).returned is None


STRAYS = "echo new > $1/out.csv; echo 1 > $1/d/made; mkdir $1/d/__pycache__ && echo 1 > $1/d/__pycache__/m.pyc; "
STRAYS += "echo 1 > $1/beside; echo 1 > $1/.log; cat $1/in.csv $1/d/in > /dev/null; ls -lR $1 > /dev/null"


@pytest.mark.parametrize("trust", [False, True], ids=["own files", "links"])
def test_what_changed_among_the_inputs_is_told(tmp_path: Path, *, trust: bool) -> None:
    """Inputs that a command writes over, and what it makes in and beside them, are problems; what it reads is none."""
    with working(tmp_path / "data", trust_jobs=trust) as jobs:
        sender = Sender(name=WorkspaceName("w"))
        flat = sender.tree(**{"in.csv": b"1", "out.csv": b"old", "d__in": b"2"})
        flat["d/in"] = sender.file("d/in", b"2", mtime_ns=4_000_000_000 * 10**9)  # a time to come
        sender.send(jobs._store, flat)
        inputs = [given(f"h/{name}", name) for name in ("in.csv", "out.csv", "d")]
        asked = shell(STRAYS, inputs=inputs)
        asked.argv.extend([[Piece(text="x")], [Piece(input="h")]])
        job = reached(jobs, submitted(jobs, asked), State.DONE)
        assert job.exit_code == 0 and job.returned is not None
        told = {each.place: each.reason for each in job.returned.problems}
        assert sorted(told) == ["h/beside", "h/d/made", "h/out.csv"]
        assert told["h/out.csv"].startswith("was changed on the host and stays as it is here; name it with --out")
        assert "in an input" in told["h/d/made"] and "beside the inputs" in told["h/beside"]
