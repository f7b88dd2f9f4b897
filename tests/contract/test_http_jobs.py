"""Commands over HTTP: who may run them, what they are given, what they say, and how they end."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from commands import (
    API,
    Event,
    begun,
    events_of,
    followed,
    given,
    is_there,
    let_pass,
    run,
    seen,
    shell,
    streams,
    submit,
    wanted,
    words,
)
from serving import BINARY, SECONDS, Answer, Served, Writer, serving, until
from spec.test_openapi import check

from deltasync.client.job_transport import JobTransport
from deltasync.client.transport import open_transport
from deltasync.core.errors import NotADeltasyncServer
from deltasync.core.hashing import digest_of
from deltasync.core.jobs import Capabilities, JobRequest, List, Output, Piece, State, Variable
from deltasync_server.access import Access, Scope
from deltasync_server.tenants import Tenant

JOB_PATH = f"{API}/jobs/{{job}}"
ABSENT = "ds_1_00000000"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server that runs commands for everybody, with one workspace."""
    with serving(tmp_path_factory.mktemp("served") / "data", "--run-without-token", "--slots", "8") as served:
        assert served.send("w", Writer("w").seal(_furnish)).status == 200
        yield served


def _furnish(life: Any) -> None:
    life.directory("dir")
    life.file("dir/a.txt", b"of a\n")
    life.file("-rf", b"of -rf\n")
    life.file("a; touch x", b"of a semicolon\n")
    life.link("link", "dir/a.txt")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server that asks for tokens."""
    with serving(tmp_path_factory.mktemp("guarded") / "data", "--require-token") as served:
        yield served


def token(served: Served, tenant: str, *scopes: Scope) -> Served:
    with Access(served.data) as access:
        return served.showing(access.create(Tenant(tenant), frozenset(scopes), "", None)[1])


def refused(answer: Answer, status: int, words_of_it: str = "") -> None:
    assert answer.status == status, answer
    assert words_of_it in answer.json["detail"]
    check(answer, "post", f"{API}/jobs")


# What comes of a command


def test_a_command_runs_with_its_inputs_and_is_followed_to_its_end(server: Served) -> None:
    """Its words name its inputs where they lie here; both streams come, each state, and last that it is done."""
    asked = wanted(
        *("sh", "-c", 'cat "$1"; echo wrong >&2; exit 3', "sh", Piece(input="home/dir/a.txt")),
        inputs=[given("home/dir", "dir")],
    )
    answer = submit(server, asked)
    check(answer, "post", f"{API}/jobs")
    events = followed(server, answer.json["id"])
    assert streams(events) == {"stdout": b"of a\n", "stderr": b"wrong\n"}
    states = [each.job["state"] for each in events if each.name == "state"]
    order = [str(state) for state in State]
    assert states == sorted(states, key=order.index) and states[-1] == "done" and events[-1].name == "state"
    done = events[-1].job
    assert (done["exit_code"], done["signal"], done["reason"], done["log_bytes"]) == (3, None, "", 11)
    assert (done["input_files"], done["input_bytes"], done["ahead"]) == (1, 5, None)
    assert done["command"][-1] == f"{done['session_path']}/inputs/home/dir/a.txt"
    check(server.get(f"{API}/jobs/{done['id']}"), "get", JOB_PATH)
    until(lambda: not Path(done["session_path"]).exists())


def test_what_a_job_left_is_listed_while_it_waits_and_after(server: Served) -> None:
    """Files have size and digest, folders are there, what only leads to an output is not; then the places remain."""
    script = "cd ../outputs; printf abc > home/b.txt; mkdir -p home/m/deep/empty; printf x > home/m/a"
    outputs = [Output(place="home/m", is_folder=True), Output(place="home/b.txt"), Output(place="home/none")]
    job_id = begun(server, shell(script, outputs=outputs), State.DONE)
    path = f"{JOB_PATH}/outputs"
    answer = server.get(path.format(job=job_id))
    check(answer, "get", path)
    digests = {name: digest_of(content).hex() for name, content in (("b.txt", b"abc"), ("a", b"x"))}
    assert answer.json["outputs"] == [
        {"path": "home/b.txt", "kind": "file", "size": 3, "digest": digests["b.txt"]},
        {"path": "home/m", "kind": "directory", "size": 0, "digest": ""},
        {"path": "home/m/a", "kind": "file", "size": 1, "digest": digests["a"]},
        {"path": "home/m/deep", "kind": "directory", "size": 0, "digest": ""},
        {"path": "home/m/deep/empty", "kind": "directory", "size": 0, "digest": ""},
    ]
    assert (answer.json["waits"], answer.json["next"]) == (True, None)
    assert server.request("POST", f"{API}/jobs/{job_id}/acknowledge", b"").status == 200
    answer = server.get(path.format(job=job_id))
    check(answer, "get", path)
    assert [(each["path"], each["kind"]) for each in answer.json["outputs"]] == [("home/b.txt", None), ("home/m", None)]
    assert answer.json["waits"] is False
    nothing = server.get(path.format(job=begun(server, wanted("true"), State.DONE)))
    assert nothing.json == {"outputs": [], "waits": False, "next": None}


def test_many_outputs_come_in_pages(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """No page has more than 1,000, the client puts them together, and one that is told of ever more of them stops."""
    script = "cd ../outputs/m; mkdir a a/b c; seq 400 | xargs touch; cd a/b; seq 700 | xargs touch; cd ../../c; touch 1"
    job_id = begun(server, shell(script, outputs=[Output(place="m", is_folder=True)]), State.DONE)
    first = server.get(f"{API}/jobs/{job_id}/outputs").json
    assert len(first["outputs"]) == 1000 and first["next"] == first["outputs"][-1]["path"]
    transport = open_transport(server.url, timeout=SECONDS)
    try:
        paths = [each.path for each in JobTransport(transport).outputs(job_id).outputs]
        assert paths == sorted(paths, key=lambda path: path.split("/")) and len(set(paths)) == len(paths) == 1105
        assert [each["path"] for each in first["outputs"]] == paths[:1000]
        monkeypatch.setattr("deltasync.client.job_transport.OUTPUT_PAGES_MAX", 1)
        with pytest.raises(NotADeltasyncServer, match="no end"):
            JobTransport(transport).outputs(job_id)
    finally:
        transport.close()


def test_a_signal_is_told_as_one(server: Served) -> None:
    """A command that a signal ended is done, without an exit code."""
    done = run(server, shell("kill -KILL $$"))
    assert (done["state"], done["exit_code"], done["signal"]) == ("done", None, signal.SIGKILL)


@pytest.mark.parametrize(("place", "content"), [("-rf", "of -rf"), ("a; touch x", "of a semicolon")])
def test_a_name_is_never_more_than_a_name(server: Served, place: str, content: str) -> None:
    """What looks like an option or like shell in a file's name is neither."""
    inputs, script = [given(f"in/{place}", place)], 'cat "$1"; ls -A . "${1%/*}"'
    asked = wanted("sh", "-c", script, "sh", Piece(input=f"in/{place}"), inputs=inputs)
    events = followed(server, begun(server, asked))
    out = streams(events)["stdout"].decode().splitlines()
    assert out[0] == content and [each for each in out[1:] if each and not each.endswith(":")] == ["tmp", place]


def test_a_command_that_is_not_there_has_failed(server: Served) -> None:
    """The reason names it."""
    done = run(server, wanted("no-such-command"))
    assert (done["state"], done["reason"]) == ("failed", "there is no command no-such-command on the host")


def test_a_command_sees_what_it_was_given_and_nothing_of_the_server(server: Served) -> None:
    """Variables hold text and places, home and temporary folder are its own, and the server's own are not there."""
    asked = wanted(
        "env",
        environment=[
            Variable(name="MODEL", value=[Piece(text="at="), Piece(input="m")]),
            Variable(name="RAW", value=[Piece(raw="/w==")]),
        ],
        inputs=[given("m", "dir/a.txt")],
    )
    events = followed(server, begun(server, asked))
    session = events[-1].job["session_path"].encode()
    found = dict(line.split(b"=", 1) for line in streams(events)["stdout"].splitlines())
    assert found.pop(b"PATH") == os.environb[b"PATH"]
    assert (found.pop(b"HOME"), found.pop(b"TMPDIR")) == (session + b"/work", session + b"/work/tmp")
    assert (found.pop(b"MODEL"), found.pop(b"RAW")) == (b"at=" + session + b"/inputs/m", b"\xff")
    assert found.pop(b"DELTASYNC_JOB") == events[-1].job["id"].encode()
    assert set(found) <= {b"LANG", b"LC_ALL", b"TZ"}


def test_when_time_is_over_nothing_of_it_is_left(server: Served, tmp_path: Path) -> None:
    """It is cancelled with the reason, and its grandchildren are gone with it."""
    script = f"sh -c 'sleep 1000 & echo $! > {tmp_path}/pid; wait' & wait"
    done = run(server, shell(script, timeout_seconds=1.0))
    assert (done["state"], done["reason"], done["signal"]) == ("cancelled", "its time of 1 s was over", signal.SIGTERM)
    until(lambda: not is_there(int((tmp_path / "pid").read_text())))


# Following


def test_a_log_goes_on_behind_every_event(server: Served) -> None:
    """With the id of any event as Last-Event-ID, or as ?after=, the rest comes, byte for byte."""
    script = "for n in 1 2 3 4 5 6; do echo out $n; echo err $n >&2; done"
    job_id = begun(server, shell(script), State.DONE)
    whole = followed(server, job_id)
    assert len(streams(whole)) == 2
    for place in [each.id for each in whole] + [3]:
        rest = followed(server, job_id, place)
        assert b"".join(bytes_of(rest)) == b"".join(bytes_of(whole))[place:]
        assert events_of(server.get(f"{API}/jobs/{job_id}/logs?after={place}").body) == rest
        assert [each.job["state"] for each in rest if each.name == "state"] == ["done"]
    for bad in ("-1", "x", "9" * 30):
        assert server.get(f"{API}/jobs/{job_id}/logs", {"Last-Event-ID": bad}).status == 400


def bytes_of(events: list[Event]) -> list[bytes]:
    return [each.content for each in events if each.name != "state"]


def test_what_a_command_says_comes_while_it_runs(server: Served, tmp_path: Path) -> None:
    """A line is sent when it is written, not when the command is over; a follower that leaves disturbs nobody."""
    script = f"echo first; until test -e {tmp_path}/go; do sleep 0.01; done; echo second"
    job_id = begun(server, shell(script))
    gone = http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)
    gone.request("GET", f"{API}/jobs/{job_id}/logs")
    gone.getresponse().readline()
    gone.close()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)
    connection.request("GET", f"{API}/jobs/{job_id}/logs")
    response = connection.getresponse()
    body = b""
    while b"event: stdout" not in body:
        body += response.readline()
    (tmp_path / "go").touch()
    body += response.read()
    connection.close()
    events = events_of(body)
    assert streams(events) == {"stdout": b"first\nsecond\n"} and events[-1].job["state"] == "done"


def test_of_a_long_log_the_middle_is_a_gap(tmp_path: Path) -> None:
    """Beginning and end come, and between them how many bytes are left out."""
    with serving(tmp_path / "data", "--run-without-token", "--job-log-bytes", "64k") as served:
        events = followed(served, begun(served, shell("seq 100000; echo END"), State.DONE))
    whole = b"".join(b"%d\n" % number for number in range(1, 100_001)) + b"END\n"
    (gap,) = [number for number, each in enumerate(events) if each.name == "gap"]
    before, after = (b"".join(bytes_of(part)) for part in (events[:gap], events[gap + 1 :]))
    assert whole.startswith(before) and whole.endswith(after) and before and after
    assert len(before) + int(events[gap].text) + len(after) == len(whole) == events[-1].job["log_bytes"]


# Asking again, cancelling, forgetting


def test_the_same_key_is_the_same_job(server: Served, tmp_path: Path) -> None:
    """A request that is repeated, whoever lost the first answer, runs once."""
    asked = shell(f"echo ran >> {tmp_path}/ran")
    first = submit(server, asked)
    again = submit(server, asked)
    assert (first.status, again.status, again.json["id"]) == (201, 200, first.json["id"])
    followed(server, first.json["id"])
    assert submit(server, asked).json["state"] == "done" and (tmp_path / "ran").read_text() == "ran\n"


def test_a_job_is_cancelled_in_the_queue_and_while_it_runs(tmp_path: Path) -> None:
    """One that waits never begins, one that runs is ended, and a second DELETE forgets either with its log."""
    with serving(tmp_path / "data", "--run-without-token", "--slots", "1") as served:
        running = begun(served, shell(f"touch {tmp_path}/up; sleep 1000"), State.RUNNING)
        until((tmp_path / "up").exists)
        waiting = begun(served, shell(f"touch {tmp_path}/never"))
        assert seen(served, waiting)["ahead"] == 0
        cancelled = served.request("DELETE", f"{API}/jobs/{waiting}")
        check(cancelled, "delete", JOB_PATH)
        assert (cancelled.json["state"], cancelled.json["reason"]) == (
            "cancelled",
            "somebody cancelled it before its turn",
        )
        assert served.request("DELETE", f"{API}/jobs/{running}").status == 200
        over = followed(served, running)[-1].job
        assert (over["state"], over["reason"]) == ("cancelled", "somebody cancelled it")
        assert over["signal"] == signal.SIGTERM
        for each in (running, waiting):
            assert served.request("DELETE", f"{API}/jobs/{each}").json["state"] == "cancelled"
            assert served.get(f"{API}/jobs/{each}").status == 404
        assert list((served.data / "jobs").iterdir()) == [] and not (tmp_path / "never").exists()
        assert served.get(f"{API}/jobs").json == {"jobs": []}


def test_a_job_is_cancelled_while_its_session_is_made(tmp_path: Path) -> None:
    """Staging many files stops at the next one, and leaves nothing."""

    def furnish(life: Any) -> None:
        for number in range(2000):
            life.file(f"f{number:04d}", b"%d" % number)

    with serving(tmp_path / "data", "--run-without-token") as served:
        assert served.send("w", Writer("w").seal(furnish)).status == 200
        job_id = begun(served, wanted("sleep", "1000", inputs=[given("all")]))
        until(lambda: seen(served, job_id)["state"] != "queued")
        served.request("DELETE", f"{API}/jobs/{job_id}")
        assert followed(served, job_id)[-1].job["state"] == "cancelled"
        until(lambda: os.listdir(served.data / "sessions") == [".lock"])


def test_jobs_are_listed_newest_first(server: Served) -> None:
    """Each as its own route tells it."""
    ids = [begun(server, wanted("true"), State.DONE) for _ in range(3)]
    answer = server.get(f"{API}/jobs")
    check(answer, "get", f"{API}/jobs")
    found = [each["id"] for each in answer.json["jobs"]]
    assert found[:3] == ids[::-1]
    assert answer.json["jobs"][0] == seen(server, ids[2])


def test_an_acknowledged_job_can_be_acknowledged_again(server: Served) -> None:
    """One that returned nothing has nothing to let go of; one that never was is 404."""
    job_id = begun(server, wanted("true"), State.DONE)
    answer = server.request("POST", f"{JOB_PATH.format(job=job_id)}/acknowledge", b"")
    check(answer, "post", f"{JOB_PATH}/acknowledge")
    assert answer.status == 200
    assert server.request("POST", f"{API}/jobs/{ABSENT}/acknowledge", b"").status == 404


# Who may


def test_on_loopback_nobody_runs_commands_without_a_token(tmp_path: Path) -> None:
    """Every user of the machine reaches loopback: who shows no token is 403, who shows one that is good for it runs."""
    with serving(tmp_path / "data") as served:
        refused(submit(served, wanted("true")), 403, "token")
        found = served.get(f"{API}/capabilities")
        check(found, "get", f"{API}/capabilities")
        assert not found.json["runs"] and "token" in found.json["why"]
        runner = token(served, "", Scope.RUN, Scope.READ)
        assert runner.get(f"{API}/capabilities").json["runs"]
        assert run(runner, wanted("true"))["state"] == "done"


def test_no_run_refuses_everybody(tmp_path: Path) -> None:
    """A server that is to run nothing runs nothing, whatever the token is good for."""
    with serving(tmp_path / "data", "--no-run", "--run-without-token") as served:
        refused(submit(served, wanted("true")), 403, "--no-run")
        refused(submit(token(served, "", *Scope), wanted("true")), 403, "--no-run")
        assert served.get(f"{API}/capabilities").json["why"] == "this server runs no commands (--no-run)"


def test_only_the_scope_run_runs(guarded: Served) -> None:
    """A token that is good for sending and looking alone is 403 on every route of jobs."""
    for scopes in ((Scope.READ,), (Scope.PUSH,), (Scope.PUSH, Scope.ADMIN)):
        caller = token(guarded, "narrow", *scopes)
        refused(submit(caller, wanted("true")), 403, "'run'")
        of_one = (("GET", ""), ("GET", "/logs"), ("GET", "/outputs"), ("DELETE", ""))
        for method, path in (("GET", ""), *((method, f"/{ABSENT}{path}") for method, path in of_one)):
            assert caller.request(method, f"{API}/jobs{path}").status == 403
        assert "'run'" in caller.get(f"{API}/capabilities").json["why"]


def test_a_foreign_job_is_like_one_that_never_was(guarded: Served) -> None:
    """Another tenant finds, follows, cancels and acknowledges nothing, and names no input of somebody else's."""
    alice, bob = (token(guarded, name, Scope.PUSH, Scope.RUN) for name in ("alice", "bob"))
    assert alice.send("w", Writer("w").file("a", b"a")).status == 200
    asked = shell("true", inputs=[given("a", "a")])
    job_id = begun(alice, asked, State.DONE)
    for method, path in (("GET", ""), ("GET", "/logs"), ("GET", "/outputs"), ("DELETE", ""), ("POST", "/acknowledge")):
        answers = [
            bob.request(method, f"{API}/jobs/{each}{path}", b"" if method == "POST" else None)
            for each in (job_id, ABSENT)
        ]
        assert [each.status for each in answers] == [404, 404]
        assert answers[0].body.replace(job_id.encode(), b"X") == answers[1].body.replace(ABSENT.encode(), b"X")
    assert bob.get(f"{API}/jobs").json["jobs"] == []
    refused(submit(bob, asked), 404, "'w' was never written")
    assert bob.send("w", Writer("w").file("b", b"b")).status == 200
    refused(submit(bob, asked), 404, "has no a")
    theirs = submit(bob, msgspec.structs.replace(asked, inputs=[]))
    assert theirs.status == 201 and theirs.json["id"] != job_id  # a key is one tenant's
    assert seen(alice, job_id)["state"] == "done"


def test_no_page_and_no_form_runs_a_command(server: Served) -> None:
    """R67 to R69: with an Origin it is 403, and with a content type that a form can send, or none, 415."""
    refused(submit(server, wanted("true"), {"Origin": "http://localhost"}), 403, "page in a browser")
    body = msgspec.json.encode(wanted("true"))
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        refused(submit(server, body, {"Content-Type": kind}), 415)
    assert submit(server, body, {"Content-Type": "application/json; charset=utf-8"}).status == 201


def test_who_ran_what_is_in_the_audit_log(server: Served) -> None:
    """A run and a cancel are a line each, with who and which command."""
    job_id = begun(server, shell("sleep 1000"), State.RUNNING)
    server.request("DELETE", f"{API}/jobs/{job_id}")
    lines = [json.loads(line) for line in (server.data / "audit.jsonl").read_text().splitlines()]
    found = [each for each in lines if each.get("job") == job_id]
    assert [each["what"] for each in found] == ["run", "cancel"]
    assert found[0]["command"] == ["sh", "-c", "sleep 1000"] and found[0]["tenant"] == "default"


# What is refused


def changed(**fields: Any) -> dict[str, Any]:
    return {**msgspec.to_builtins(wanted("true")), **fields}


def an_input(**fields: Any) -> dict[str, Any]:
    return {"workspace": "w", "sequence": 1, "place": "p", **fields}


MALFORMED = {
    "a text for the command": changed(argv="rm -rf /"),
    "texts for words": changed(argv=["true"]),
    "no command": changed(argv=[]),
    "too many words": changed(argv=[[]] * 20_001),
    "a piece of two kinds": changed(argv=[[{"text": "a", "input": "b"}]]),
    "a piece of none": changed(argv=[[{}]]),
    "a NUL": changed(argv=[[{"text": "a\0b"}]]),
    "a NUL in bytes": changed(argv=[[{"raw": "AA=="}]]),
    "bytes that are no base64": changed(argv=[[{"raw": "!"}]]),
    "an absolute place": changed(argv=[[{"input": "/etc/passwd"}]]),
    "a place above": changed(argv=[[{"output": "../x"}]]),
    "an output above": changed(outputs=[{"place": "a/../../x"}]),
    "an absolute output": changed(outputs=[{"place": "/tmp/x"}]),
    "an output without a name": changed(outputs=[{"place": ""}]),
    "an input above": changed(inputs=[an_input(place="..")]),
    "an input's path above": changed(inputs=[an_input(path="../x")]),
    "a list above": changed(lists=[{"place": "../l", "lines": []}]),
    "a line with a place above": changed(lists=[{"place": "l", "lines": [[{"input": ".."}]]}]),
    "an input in another": changed(inputs=[an_input(place="a"), an_input(place="a-b"), an_input(place="a/b")]),
    "an input twice": changed(inputs=[an_input(), an_input()]),
    "a list in an input": changed(inputs=[an_input()], lists=[{"place": "p/l", "lines": []}]),
    "an input that is a link": changed(inputs=[an_input(path="link")]),
    "a workspace that is no name": changed(inputs=[an_input(workspace="../w")]),
    "a working folder": changed(cwd="/"),
    "no key": {name: each for name, each in changed().items() if name != "key"},
    "a short key": changed(key="abc"),
    "no time": changed(timeout_seconds=0),
    "a negative number of GPUs": changed(gpus=-1),
    "the host's own id": changed(client_id="0" * 32),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_what_is_malformed_is_refused(server: Served, what: str) -> None:
    """R49 to R56: it is 400 with a sentence, and nothing is queued."""
    before = len(server.get(f"{API}/jobs").json["jobs"])
    refused(submit(server, MALFORMED[what]), 400)
    assert len(server.get(f"{API}/jobs").json["jobs"]) == before


NAMES = ("LD_PRELOAD", "LD_LIBRARY_PATH", "DELTASYNC_JOB", "DELTASYNC_X", "PATH", "IFS", "BASH_ENV", "ENV")


@pytest.mark.parametrize("name", [*NAMES, "PYTHONSTARTUP", "", "A B", "A=B", "É", "A\n", "BASH_FUNC_x%%"])
def test_no_variable_changes_what_is_run(server: Served, name: str) -> None:
    """Names that have the loader or a shell run something else, and names that are none, are 400."""
    refused(submit(server, wanted("true", environment=[Variable(name=name, value=[])])), 400, "variable")


def test_a_variable_has_one_value(server: Served) -> None:
    """A name that stands twice is 400."""
    refused(submit(server, wanted("true", environment=[Variable(name="A", value=[])] * 2)), 400, "twice")


def test_inputs_are_looked_up_before_the_answer(server: Served) -> None:
    """An unknown workspace or path is 404, a sequence that is not kept 410; nothing is queued."""
    refused(submit(server, wanted("true", inputs=[given("p", workspace="never")])), 404, "never written")
    for path in ("absent", "dir/absent", "dir/a.txt/below"):
        refused(submit(server, wanted("true", inputs=[given("p", path)])), 404, f"has no {path}")
    refused(submit(server, wanted("true", inputs=[given("p", sequence=9)])), 410, "sequence 9")


def test_limits_are_told_with_both_figures(tmp_path: Path) -> None:
    """A file, a session and a time beyond what the server allows are 413 before anything is stored."""
    flags = ("--job-file-bytes", "1000", "--job-session-bytes", "1500", "--job-seconds", "60")
    with serving(tmp_path / "data", "--run-without-token", *flags) as served:
        made = Writer("w")
        for name, size in (("a", 1000), ("b", 1001), ("c", 501)):
            made.life.file(name, b"x" * size)
        assert served.send("w", made.seal(lambda life: None)).status == 200
        refused(submit(served, wanted("true", inputs=[given("b", "b")])), 413, "1000 B here, and b has 1001 B")
        both = [given("a", "a"), given("c", "c")]
        refused(submit(served, wanted("true", inputs=both)), 413, "1.5 KiB here, not 1.5 KiB")
        long = List(place="l", lines=words("x" * 501))
        refused(submit(served, wanted("true", inputs=both[:1], lists=[long])), 413)
        refused(submit(served, wanted("true", timeout_seconds=61.0)), 413, "60 s here, not 61 s")
        refused(submit(served, wanted("true", gpus=100)), 413, "0 GPUs, not 100")
        assert run(served, wanted("true", inputs=both[:1], timeout_seconds=60.0))["state"] == "done"
        told = msgspec.json.decode(served.get(f"{API}/capabilities").body, type=Capabilities)
        assert (told.file_bytes_max, told.session_bytes_max, told.seconds_max) == (1000, 1500, 60.0)


# Starts and stops


def test_a_killed_server_leaves_nothing_behind(tmp_path: Path) -> None:
    """After kill -9 the next start kills what still runs, removes its session, and says that the job is lost."""
    script = f"echo said; setsid sleep 1000 & echo $! > {tmp_path}/away; sleep 1000 & echo $! > {tmp_path}/near; wait"
    with serving(tmp_path / "data", "--run-without-token") as served:
        job_id = begun(served, shell(script))
        until(lambda: (tmp_path / "near").exists() and (tmp_path / "near").read_text())
        pids = [int((tmp_path / name).read_text()) for name in ("away", "near")]
        until(lambda: seen(served, job_id)["log_bytes"] == 5)
        served.process.kill()
        served.process.wait()
    assert all(map(is_there, pids))
    with serving(tmp_path / "data", "--run-without-token") as served:
        events = followed(served, job_id)
        assert streams(events) == {"stdout": b"said\n"}
        assert events[-1].job["state"] == "lost" and "died" in events[-1].job["reason"]
        assert os.listdir(served.data / "sessions") == [".lock"]
        until(lambda: not any(map(is_there, pids)))


def test_a_stopped_server_ends_what_runs_and_tells_who_follows(tmp_path: Path) -> None:
    """A follower hears that the job is lost before the server is gone; no session and no process is left."""
    with serving(tmp_path / "data", "--run-without-token") as served:
        job_id = begun(served, shell(f"echo $$ > {tmp_path}/pid; sleep 1000"), State.RUNNING)
        until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=SECONDS)
        connection.request("GET", f"{API}/jobs/{job_id}/logs")
        response = connection.getresponse()
        assert served.stop() == 0
        assert events_of(response.read())[-1].job["state"] == "lost"
        connection.close()
        assert not is_there(int((tmp_path / "pid").read_text()))
        assert os.listdir(served.data / "sessions") == [".lock"]


def test_a_server_that_works_is_not_idle(tmp_path: Path) -> None:
    """With --idle-exit it ends by itself, but not before a command has, although nobody is connected."""
    with serving(tmp_path / "data", "--run-without-token", "--idle-exit", "1") as served:
        begun(served, shell(f"sleep 2; touch {tmp_path}/done"))
        assert served.process.wait(SECONDS) == 0
        assert (tmp_path / "done").exists()


def test_a_unix_socket_lets_its_user_run_commands(tmp_path: Path) -> None:
    """Whoever reaches the socket is the user: no token is needed."""
    where = tmp_path / "s"
    words_of_it = [BINARY, "serve", "--data", tmp_path / "data", "--listen", f"unix:{where}"]
    with subprocess.Popen(words_of_it, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout and process.stdout.readline().startswith(b"listening on")
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(where))
                body = msgspec.json.encode(wanted("true"))
                head = f"POST {API}/jobs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                assert connection.recv(1000).startswith(b"HTTP/1.1 201 ")
        finally:
            process.terminate()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_commands_run_as_the_user_whom_the_operator_names(tmp_path: Path) -> None:
    """With --job-user a command is that user: it reads its inputs, cannot write blobs, and writes its outputs."""
    let_pass(tmp_path)
    script = 'id -un; cat "$1"; (echo bad >> "$1") 2>/dev/null; echo $?; echo x > "$2" && echo written'
    asked = wanted(
        *("sh", "-c", script, "sh", Piece(input="a"), Piece(output="o")),
        inputs=[given("a", "a.txt")],
        outputs=[Output(place="o")],
    )
    with serving(tmp_path / "data", "--run-without-token", "--job-user", "nobody") as served:
        assert served.send("w", Writer("w").file("a.txt", b"content\n")).status == 200
        events = followed(served, begun(served, asked))
        who, content, code, written = streams(events)["stdout"].decode().split()
        assert (who, content, written) == ("nobody", "content", "written")
        assert (code == "0") is (served.get(f"{API}/capabilities").json["links"] != "hardlink")


def test_sessions_are_made_where_the_operator_says(tmp_path: Path) -> None:
    """--sessions-dir names the folder; a second server cannot have it as well."""
    folder = tmp_path / "elsewhere"
    with serving(tmp_path / "data", "--run-without-token", "--sessions-dir", str(folder)) as served:
        events = followed(served, begun(served, wanted("pwd")))
        path = Path(events[-1].job["session_path"])
        assert path.parent == folder and streams(events)["stdout"].decode().strip() == str(path / "work")


def test_a_request_that_asks_for_everything_is_taken(server: Served) -> None:
    """Every field of a request is understood."""
    asked = JobRequest(
        key="f" * 32,
        client_id="a" * 32,
        argv=words("cat", Piece(input="l")),
        lists=[List(place="l", lines=[[Piece(output="o"), Piece(text="\n")]])],
        outputs=[Output(place="o", is_folder=True), Output(place="p/%04d.png", is_pattern=True)],
        timeout_seconds=30.0,
        priority=-3,
        keep_seconds=0.0,
    )
    events = followed(server, begun(server, asked))
    assert streams(events)["stdout"].decode() == events[-1].job["session_path"] + "/outputs/o\n"
