"""`deltasync run` with tools that behave like those of Topaz: what they are told there, and what comes home."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from remote_runs import Terminal, contents
from serving import Served

PHOTO = b"\xff\xd8 a photo " * 100
SEES = f"""#!{sys.executable}
import json, os, pathlib, sys
argv = sys.argv[1:]
seen = {{"argv": sys.argv, "models": os.environ.get("TVAI_MODEL_DIR"), "folder": os.getcwd()}}
pathlib.Path(__file__).with_suffix(".json").write_text(json.dumps(seen))
def after(flag):
    return pathlib.Path(argv[argv.index(flag) + 1])
"""
GIGAPIXEL = """
source, folder = after("-i"), after("-o")
for each in sorted(source.iterdir()) if source.is_dir() else [source]:
    (folder / f"{each.stem}-gigapixel-{after('--scale')}x{each.suffix}").write_bytes(each.read_bytes() * 2)
    print(f"saved {folder / each.name}")
"""
PHOTO_AI = """
source, folder = pathlib.Path(argv[1]), after("-o")
folder.mkdir(exist_ok=True)
for number in (1, 2):
    (folder / f"{source.stem}-{number}.{after('-f')}").write_bytes(source.read_bytes()[:-number])
sys.exit(1 if "--fail" in argv else 0)
"""
VIDEO = """
source, target = after("-i"), pathlib.Path(argv[-1])
models = seen["models"] and pathlib.Path(seen["models"])
target.write_bytes(source.read_bytes() + (models / "prob.json").read_bytes() if models else source.read_bytes())
print("frame=1 fps=0.0\\rframe=2 fps=9.9", file=sys.stderr)
"""


@dataclass(frozen=True)
class Tool:
    """A tool on the host, and what it was told when it ran last."""

    path: Path

    @classmethod
    def made(cls, path: Path, code: str) -> Tool:
        """Write a tool and make it executable."""
        path.parent.mkdir(exist_ok=True)
        path.write_text(SEES + code)
        path.chmod(0o755)
        return cls(path)

    @property
    def seen(self) -> Any:
        """Its words, its folder and its models."""
        return json.loads(self.path.with_suffix(".json").read_text())


@pytest.fixture
def terminal(tmp_path: Path, host: Served) -> Terminal:
    """A user with a photo, whose commands run on that host."""
    made = Terminal.at(tmp_path / "home", host.url)
    (made.folder / "photo.jpg").write_bytes(PHOTO)
    return made


def session(host: Served, report: Any) -> Path:
    """Return the folder on the host in which a job ran."""
    return host.data / "sessions" / report["job"]


def test_a_photo_is_enlarged_into_a_folder(terminal: Terminal, host: Served, tmp_path: Path) -> None:
    """`--cli -i in -o outdir --scale 4`: the tool sees its photo and folder there; its file joins those here."""
    tool = Tool.made(tmp_path / "topaz/gigapixel", GIGAPIXEL)
    (terminal.folder / "out").mkdir()
    (terminal.folder / "out/mine.txt").write_text("mine")
    done = terminal.run("--json", "--", tool.path, "--cli", "-i", "photo.jpg", "-o", "out", "--scale", "4")
    assert done.code == 0, done.err
    there = session(host, done.json)
    source, folder = f"{there}/inputs{terminal.folder}/photo.jpg", f"{there}/outputs{terminal.folder}/out"
    assert tool.seen["argv"] == [str(tool.path), "--cli", "-i", source, "-o", folder, "--scale", "4"]
    assert tool.seen["folder"] == f"{there}/work"
    assert contents(terminal.folder) == {
        "photo.jpg": (PHOTO, False),
        "out/mine.txt": (b"mine", False),
        "out/photo-gigapixel-4x.jpg": (PHOTO * 2, False),
    }
    assert f"saved {terminal.folder}/out/photo.jpg\n" in done.err  # with --json its words go to stderr
    assert not there.exists()


def test_a_folder_of_photos_is_enlarged_into_its_own_folder(terminal: Terminal, host: Served, tmp_path: Path) -> None:
    """With the same folder behind -i and -o the tool reads and writes two places, and here all lies in one."""
    tool = Tool.made(tmp_path / "topaz/gigapixel", GIGAPIXEL)
    (terminal.folder / "more.jpg").write_bytes(PHOTO[1:])
    line = [tool.path, "--cli", "--recursive", "-i", terminal.folder, "-o", terminal.folder, "--scale", "2"]
    done = terminal.run("--json", "--", *line)
    assert done.code == 0, done.err
    there = session(host, done.json)
    words = [
        "--cli",
        "--recursive",
        "-i",
        f"{there}/inputs{terminal.folder}",
        "-o",
        f"{there}/outputs{terminal.folder}",
    ]
    assert tool.seen["argv"] == [str(tool.path), *words, "--scale", "2"]
    assert contents(terminal.folder) == {
        "photo.jpg": (PHOTO, False),
        "more.jpg": (PHOTO[1:], False),
        "photo-gigapixel-2x.jpg": (PHOTO * 2, False),
        "more-gigapixel-2x.jpg": (PHOTO[1:] * 2, False),
    }


def test_a_photo_becomes_files_that_the_tool_names(terminal: Terminal, host: Served, tmp_path: Path) -> None:
    """`--cli in -o outdir -f jpg`: whatever names the tool gives its files in its folder, they come home."""
    tool = Tool.made(tmp_path / "topaz/tpai", PHOTO_AI)
    done = terminal.run("--json", "--", tool.path, "--cli", "photo.jpg", "-o", "made", "-f", "jpg", "--quality", "95")
    assert done.code == 0, done.err
    there = session(host, done.json)
    words = ["--cli", f"{there}/inputs{terminal.folder}/photo.jpg", "-o", f"{there}/outputs{terminal.folder}/made"]
    assert tool.seen["argv"] == [str(tool.path), *words, "-f", "jpg", "--quality", "95"]
    assert contents(terminal.folder / "made") == {
        "photo-1.jpg": (PHOTO[:-1], False),
        "photo-2.jpg": (PHOTO[:-2], False),
    }
    assert done.json["outputs"]["files"] == 2


def test_what_the_tool_writes_beside_its_photo_comes_home_beside_it(
    terminal: Terminal, host: Served, tmp_path: Path
) -> None:
    """With `-o .` the files that the tool names by the photo's stem lie beside it here, and the photo is as it was."""
    tool = Tool.made(tmp_path / "topaz/tpai", PHOTO_AI)
    before = (terminal.folder / "photo.jpg").stat()
    done = terminal.run("--json", "--", tool.path, "--cli", "photo.jpg", "-o", ".", "-f", "jpg")
    assert done.code == 0, done.err
    assert tool.seen["argv"][4] == f"{session(host, done.json)}/outputs{terminal.folder}"
    assert set(contents(terminal.folder)) == {"photo.jpg", "photo-1.jpg", "photo-2.jpg"}
    after = (terminal.folder / "photo.jpg").stat()
    assert (after.st_ino, after.st_mtime_ns, after.st_ctime_ns) == (
        before.st_ino,
        before.st_mtime_ns,
        before.st_ctime_ns,
    )


def test_a_tool_that_fails_leaves_nothing_here(terminal: Terminal, tmp_path: Path) -> None:
    """A tool that writes half of its files and fails with 1: the code is 1, and no file of it is here."""
    tool = Tool.made(tmp_path / "topaz/tpai", PHOTO_AI)
    (terminal.folder / "out").mkdir()
    done = terminal.run("--", tool.path, "--cli", "photo.jpg", "-o", "out", "-f", "jpg", "--fail")
    assert done.code == 1 and "jobs fetch" in done.err
    assert set(contents(terminal.folder)) == {"photo.jpg"}


@pytest.mark.parametrize("name", ["ffmpeg", "tvai"])
def test_a_film_is_enlarged_with_models_that_are_here(
    terminal: Terminal, host: Served, tmp_path: Path, name: str
) -> None:
    """A line like those of ffmpeg: a filter stays text, the last word is the output, a variable names the models."""
    tool = Tool.made(tmp_path / "topaz" / name, VIDEO)
    (terminal.folder / "in.mp4").write_bytes(b"film")
    (terminal.folder / "models").mkdir()
    (terminal.folder / "models/prob.json").write_bytes(b"{}")
    filters = "tvai_up=model=prob-3:scale=2:w=1280:h=720:preblur=-0.6,scale=w=1280:h=720:flags=lanczos"
    options = ["-hide_banner", "-nostdin", "-y", "-strict", "2", "-i"]
    rest = ["-filter_complex", filters, "-c:v", "hevc_nvenc", "-b:v", "0", "-map_metadata:s:v", "0:s:v"]
    line = [tool.path, *options, "in.mp4", *rest, "out.mp4"]
    done = terminal.run("--json", "--env", "TVAI_MODEL_DIR=models", "--", *line)
    assert done.code == 0, done.err
    there = session(host, done.json)
    source, target = f"{there}/inputs{terminal.folder}/in.mp4", f"{there}/outputs{terminal.folder}/out.mp4"
    assert tool.seen["argv"] == [str(tool.path), *options, source, *rest, target]
    assert tool.seen["models"] == f"{there}/inputs{terminal.folder}/models"
    assert (terminal.folder / "out.mp4").read_bytes() == b"film{}"
    assert "frame=1 fps=0.0\rframe=2 fps=9.9\n" in done.err
