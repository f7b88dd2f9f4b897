"""`make demo`: a server, a watcher, real changes, a command that runs there, an offline replay; all must agree."""

from __future__ import annotations

import json
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from bench.contestants import BIN, deltasync_server, environment
from bench.measure import started
from bench.media import make_media, write_png
from bench.report import bytes_text
from bench.workloads import difference

WORKSPACE = "media"
REPAINTED = "images/run-copy/frame-03.png"
LIMIT_SECONDS = 55
EVENT_SECONDS = 10.0
_VERBS = ("created", "updated", "moved", "deleted")


_LOUDNESS = """
import array, sys, wave
samples = array.array("h", wave.open(sys.argv[1]).readframes(-1))
with open(sys.argv[-1], "w") as out:
    for second in range(0, len(samples), 22050):
        print(max(samples[second : second + 22050]), file=out)
"""
"""What the job runs: the peak of each second of a sound."""


class DemoFailed(Exception):
    """Something is not as it must be; the text says what."""


@dataclass(slots=True)
class Change:
    """One step of the demo."""

    title: str
    apply: Callable[[Path], object]


def main() -> int:
    """Run the demo; returns 0 only when both sides were equal after every step and after the replay."""
    signal.signal(signal.SIGALRM, _too_long)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.alarm(LIMIT_SECONDS)
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="deltasync-demo-"))
    try:
        _run(folder)
    except (DemoFailed, RuntimeError, OSError) as error:
        print(f"\nthe demo failed: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"\nAll roots are equal. {time.monotonic() - began:.1f} s; the temporary folder is removed.")
    return 0


def _too_long(*_: object) -> None:
    raise DemoFailed(f"it takes longer than {LIMIT_SECONDS} s")


def _run(folder: Path) -> None:
    media = folder / "media"
    media.mkdir()
    print("deltasync: a folder and its copy on a server, kept equal and proven so\n")
    with deltasync_server(folder / "server", workspace=WORKSPACE, flags=["--run-without-token"]) as server:
        url = f"http://127.0.0.1:{server.port}"
        options = ["--to", url, "--workspace", WORKSPACE, "--keep-sent", "7d"]
        print(f"  server    deltasync-server serve --listen 127.0.0.1:{server.port} --run-without-token")
        print(f"  watcher   deltasync watch media {' '.join(options)}\n")
        command: list[str | Path] = [BIN / "deltasync", "watch", media, *options, "--json"]
        with started(command, environment(folder), folder / "watch.log") as process:
            assert process.stdout
            watcher = Watcher(media, folder, _lines(process.stdout))
            watcher.await_start()
            print(f"  {'change':<38} {'operations':<24} {'sent':>9} {'avoided':>9}   root there and here")
            for change in _changes():
                watcher.show(change)
        if where := difference(media, server.tree):
            raise DemoFailed(f"the server's folder differs from the source: {where}")
        print("\n  the server's folder was compared with the source: equal, byte for byte")
        _run_a_job(folder, url)
    _replay(media, folder, watcher.root)


def _run_a_job(folder: Path, url: str) -> None:
    """Run a command on the server twice, and here: the same comes of it, and the second time nothing is sent."""
    (folder / "loudness.py").write_text(_LOUDNESS)
    line = ["python3", "loudness.py", "media/sound/sweep.wav", "-o"]
    subprocess.run([*line, "here.txt"], cwd=folder, check=True)
    print(f"\n  job       deltasync run --on {url} -- {' '.join(line)} loudness.txt")
    for turn in ("the first time", "once more"):
        job = _json(["run", "--on", url], folder, *line, "loudness.txt")
        inputs = job["inputs"]
        if (folder / "loudness.txt").read_text() != (folder / "here.txt").read_text():
            raise DemoFailed("the command wrote there what it does not write here")
        print(
            f"  {turn:<38} {bytes_text(inputs['bytes'])} of inputs, {bytes_text(inputs['sent_bytes'])} sent; "
            f"loudness.txt is here, as a run here writes it"
        )
    if inputs["sent_bytes"]:
        raise DemoFailed("the same inputs were sent twice")


def _changes() -> list[Change]:
    return [
        Change("add images, a sound and text", make_media),
        Change("edit a text", lambda root: (root / "notes/brief.txt").write_text("Rain. The host sleeps.\n" * 50)),
        Change("touch an image (new time, same bytes)", lambda root: (root / "images/cover.png").touch()),
        Change("rename a file", lambda root: (root / "sound/tone.wav").rename(root / "sound/sweep.wav")),
        Change("rename a directory of 8 images", lambda root: (root / "images/walk").rename(root / "images/run")),
        Change("duplicate that directory", lambda root: _copy(root / "images/run", root / "images/run-copy")),
        Change(
            "paint one image of the copy anew", lambda root: write_png(root / "images/run-copy/frame-03.png", seed=77)
        ),
        Change("delete a text and an image", _delete),
        Change("add a script and a link to it", _add_script),
    ]


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target, copy_function=shutil.copyfile)


def _delete(root: Path) -> None:
    (root / "notes/credits.txt").unlink()
    (root / "images/run/frame-07.png").unlink()


def _add_script(root: Path) -> None:
    script = root / "notes/render.sh"
    script.write_text("#!/bin/sh\nexec true\n")
    script.chmod(0o755)
    (root / "latest").symlink_to("notes/render.sh")


@dataclass(slots=True)
class Watcher:
    """A running `deltasync watch`, and what it said of its bundles."""

    media: Path
    home: Path
    lines: queue.Queue[str]
    sequence: int = field(default=0, init=False)
    root: str = field(default="", init=False)

    def show(self, change: Change) -> None:
        """Change the folder, wait until both sides are equal, and print what it cost."""
        change.apply(self.media)
        state = self._synced()
        sent = self._sent_until(state["local"]["sequence"])
        here, there = state["local"]["root"], state["server"]["root"]
        counts = {verb: sum(event[verb] for event in sent) for verb in _VERBS}
        operations = ", ".join(f"{count} {verb}" for verb, count in counts.items() if count)
        figures = (bytes_text(sum(event[name] for event in sent)) for name in ("sent_bytes", "avoided_bytes"))
        cost = " ".join(f"{figure:>9}" for figure in figures)
        print(f"  {change.title:<38} {operations:<24} {cost}   {_compared(there, here)}")
        if here != there or not state["in_sync"]:
            raise DemoFailed(f"the roots differ after: {change.title}")
        self.root = here

    def _synced(self) -> dict[str, Any]:
        """Have the watcher send what it has, and return the status of both sides."""
        answer = _json(["push", self.media], self.home)
        state = _json(["status", self.media], self.home)
        if answer["root"] != state["local"]["root"] or state["server"] is None:
            raise DemoFailed(f"push and status disagree: {answer} {state}")
        return state

    def await_start(self) -> None:
        """Wait until the watcher holds the folder; a push before that would do the work itself."""
        while self._event()["event"] != "watching":
            pass

    def _sent_until(self, sequence: int) -> list[dict[str, Any]]:
        sent = []
        while self.sequence < sequence:
            event = self._event()
            if event["event"] == "sent":
                sent.append(event)
                self.sequence = event["sequence"]
        return sent

    def _event(self) -> dict[str, Any]:
        try:
            event: dict[str, Any] = json.loads(self.lines.get(timeout=EVENT_SECONDS))
        except queue.Empty:
            raise DemoFailed(f"the watcher says nothing for {EVENT_SECONDS:.0f} s") from None
        if "error" in event:
            raise DemoFailed(f"the watcher stopped: {event['error']['detail']}")
        return event


def _replay(media: Path, folder: Path, root: str) -> None:
    """Take the sealed bundles to an empty server without any network, and compare the roots."""
    bundles, data = folder / "usb-disk", folder / "second-server"
    exported = _json(["bundle", "export", media, bundles], folder)
    replayed = _json(["replay", bundles, "--data", data], folder, program="deltasync-server")["workspaces"][0]
    size = sum(path.stat().st_size for path in bundles.iterdir())
    print("\n  offline   deltasync bundle export media usb-disk")
    print("            deltasync-server replay usb-disk --data second-server")
    print(f"  {len(exported['files'])} sealed bundles, {bytes_text(size)}, into an empty server without a network")
    print(f"  its root and ours: {_compared(replayed['root'], root)}")
    if replayed["root"] != root:
        raise DemoFailed("the replayed root differs")
    if where := difference(media, Path(replayed["tree_path"])):
        raise DemoFailed(f"the replayed folder differs from the source: {where}")


def _compared(there: str, here: str) -> str:
    return f"{there[:12]} {'=' if there == here else '!='} {here[:12]}"


def _json(arguments: list[str | Path], home: Path, *line: str, program: str = "deltasync") -> dict[str, Any]:
    """Run a command and return what it answers. line: a command that it runs, below `home`."""
    command = [BIN / program, *arguments, "--json", *(["--", *line] if line else [])]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment(home), check=False, cwd=home)
    if ran.returncode:
        raise DemoFailed(
            f"{program} {arguments[0]} exited {ran.returncode}: {ran.stderr.strip() or ran.stdout.strip()}"
        )
    answer: dict[str, Any] = json.loads(ran.stdout)
    return answer


def _lines(stream: IO[str]) -> queue.Queue[str]:
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in stream:
            lines.put(line)

    threading.Thread(target=read, daemon=True).start()
    return lines


if __name__ == "__main__":
    sys.exit(main())
