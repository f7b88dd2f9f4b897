"""A blob that the disk no longer gives: nobody takes a part of it for the whole, and it is asked for again."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from corpus_good import noise
from remote_runs import Terminal
from serving import Bundle, Served, Writer, serving, until

from deltasync.core.hashing import digest_of

HERE = Path(__file__).parent


@pytest.fixture(scope="module", name="environment")
def preloaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Compile the library that has reads fail; returns the variables that load it."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C compiler to build the library")
    folder = tmp_path_factory.mktemp("failing")
    (folder / "marks").mkdir()
    words = [compiler, "-shared", "-fPIC", "-O1", "-o", folder / "failing.so", HERE / "failing_read.c", "-ldl"]
    subprocess.run(words, check=True)
    return {"LD_PRELOAD": str(folder / "failing.so"), "FAILING_READS": str(folder / "marks")}


@pytest.fixture(scope="module")
def server(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served") / "data", environment=environment) as running:
        yield running


def harm(environment: dict[str, str], content: bytes, good_bytes: int) -> Path:
    """Have the file of a content fail behind so many bytes; removing what is returned ends that."""
    mark = Path(environment["FAILING_READS"]) / digest_of(content).hex()
    mark.touch()
    os.truncate(mark, good_bytes)
    return mark


def written(name: str, content: bytes) -> Bundle:
    """Return a first bundle with this content and another one."""
    writer = Writer(name)
    writer.life.file("large", content)
    return writer.file("fine", b"fine")


def assert_asked_for(server: Served, name: str, content: bytes) -> None:
    """The content is wanted, out of the cache, and not in the tree; the other one is served."""
    digest = digest_of(content).hex()
    until(lambda: server.get(f"/api/v1/workspaces/{name}").json["wanted"] == [digest])
    assert not (server.data / "cache" / digest[:2] / digest).exists()
    assert [path for path in (server.data / "quarantine").iterdir() if path.name.startswith(digest)]
    assert {path.name for path in (server.data / "workspaces" / name / "tree").iterdir()} == {"fine"}
    assert server.get(f"/api/v1/blobs/{digest}").status == 404
    assert server.get(f"/api/v1/blobs/{digest_of(b'fine').hex()}").body == b"fine"


def whole_blob(connection: http.client.HTTPConnection, name: str, digest: str) -> None:
    connection.request("GET", f"/api/v1/blobs/{digest}")


def one_of_many(connection: http.client.HTTPConnection, name: str, digest: str) -> None:
    connection.request("POST", f"/api/v1/workspaces/{name}/blobs", f'{{"digests":["{digest}"]}}')


def its_recipe(connection: http.client.HTTPConnection, name: str, digest: str) -> None:
    connection.request("GET", f"/api/v1/workspaces/{name}/recipes/{digest}")


@pytest.mark.parametrize("good_bytes", [0, 1_500_000])
@pytest.mark.parametrize("ask", [whole_blob, one_of_many, its_recipe])
def test_an_answer_that_the_disk_fails_is_cut_and_the_blob_asked_for(
    environment: dict[str, str],
    server: Served,
    ask: Callable[[http.client.HTTPConnection, str, str], None],
    good_bytes: int,
) -> None:
    """An answer is refused or ends before its length; the blob is quarantined, and heals when its bytes come again."""
    name = f"{ask.__name__}-{good_bytes}"
    content = noise(name, 2_500_000)
    digest = digest_of(content).hex()
    assert server.send(name, written(name, content), "?wait=20").status == 200
    mark = harm(environment, content, good_bytes)
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)) as connection:
        ask(connection, name, digest)
        answer = connection.getresponse()
        if answer.status == 200:
            with pytest.raises(http.client.IncompleteRead) as broken:
                answer.read()
            assert ask is not whole_blob or content.startswith(broken.value.partial)
        else:
            assert answer.status == 500 and json.loads(answer.read())["detail"] == "the server failed; its log says why"
    assert_asked_for(server, name, content)
    mark.unlink()
    assert server.send(f"{name}-again", Writer(f"{name}-again").file("again", content)).status == 200
    assert server.get(f"/api/v1/blobs/{digest}").body == content
    until(lambda: (server.data / "workspaces" / name / "tree/large").exists())


def test_a_tree_that_cannot_copy_a_blob_goes_on_without_it(environment: dict[str, str], tmp_path: Path) -> None:
    """Where trees are copies the rest of the tree is brought forward, and the content is asked for."""
    content = noise("copied", 2_500_000)
    with serving(tmp_path / "data", "--link", "copy", environment=environment) as server:
        mark = harm(environment, content, 1_500_000)
        assert server.send("w", written("w", content), "?wait=20").status == 200
        assert_asked_for(server, "w", content)
        assert server.get("/api/v1/workspaces/w").json["tree_sequence"] == 1
        mark.unlink()


def test_no_command_runs_without_a_file_that_the_disk_does_not_give(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """A file of an input folder whose reading fails is named, and the command that would lack it is not run."""
    content = noise("input", 10_000)
    with serving(tmp_path / "data", "--run-without-token") as served:
        terminal = Terminal.at(tmp_path / "home", served.url)
        (terminal.folder / "in").mkdir()
        (terminal.folder / "in/fine").write_bytes(b"fine")
        path = terminal.folder / "in" / digest_of(content).hex()
        path.write_bytes(content)
        harm(environment, content, 4_096)
        done = terminal.run("--settle", "0", "--", "ls", "in", **environment)
        assert (done.code, done.out) == (123, ""), done
        assert f"{path} cannot be read (Input/output error)" in done.err and "run without it" in done.err
