"""`deltasync run` with real programs, unmodified: what they say and write is what they say and write here."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from remote_runs import Terminal, contents
from serving import Served
from user import Done, Word

EXACT = ["-fflags", "+bitexact", "-flags:v", "+bitexact", "-threads", "1"]
"""What makes two runs of ffmpeg write the same bytes."""
JOIN = """
import argparse
parser = argparse.ArgumentParser(fromfile_prefix_chars="@")
parser.add_argument("inputs", nargs="+")
parser.add_argument("-o", dest="output")
said = parser.parse_args()
with open(said.output, "w") as out:
    for each in said.inputs:
        out.write(open(each).read())
print(len(said.inputs), "joined")
"""


def needs(program: str) -> pytest.MarkDecorator:
    """Skip a test where a program is missing."""
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"needs {program}")


@pytest.fixture
def terminal(tmp_path: Path, host: Served) -> Terminal:
    """A user with an empty folder, whose commands run on that host."""
    return Terminal.at(tmp_path / "home", host.url)


def same(terminal: Terminal, *words: Word, said: tuple[str, ...] = ()) -> Done:
    """Run a line on the host and in a copy of the folder here; assert that what comes of it is the same.

    said: options of `run` before the line.
    """
    twin = terminal.folder.with_name("twin")
    shutil.copytree(terminal.folder, twin)
    here = Terminal(terminal.user, twin).local(*words)
    there = terminal.run(*said, "--", *words)
    assert (here.code, here.out) == (there.code, there.out), (here, there)
    assert contents(terminal.folder) == contents(twin)
    shutil.rmtree(twin)
    return there


def film(path: Path, *, seconds: str = "1") -> None:
    """Make a small film."""
    source = ["-f", "lavfi", "-i", f"testsrc=size=64x64:rate=5:duration={seconds}"]
    subprocess.run(["ffmpeg", "-v", "error", *source, *EXACT, path], check=True)


def picture(path: Path, *, seed: int = 1) -> None:
    """Make a small picture."""
    pixels = bytes((seed * x * y) % 256 for y in range(16) for x in range(16) for _ in range(3))
    path.write_bytes(b"P6\n16 16\n255\n" + pixels)


# ffmpeg


@needs("ffmpeg")
def test_ffmpeg_makes_the_same_film_of_a_film(terminal: Terminal) -> None:
    """`ffmpeg -i in.mp4 -vf … out.mp4` leaves the film that it would have made here, and nothing else."""
    film(terminal.folder / "in.mp4")
    done = same(terminal, "ffmpeg", "-v", "error", "-i", "in.mp4", "-vf", "scale=32:32,hue=s=0", *EXACT, "out.mp4")
    assert done.code == 0 and (terminal.folder / "out.mp4").stat().st_size > 500


@needs("ffmpeg")
def test_ffmpeg_tells_its_progress_on_a_pipe(terminal: Terminal) -> None:
    """`-progress pipe:1` is no file: the frames that it counts come out of `run`, and the film is the same."""
    film(terminal.folder / "in.mp4")
    line = ["ffmpeg", "-v", "error", "-nostats", "-progress", "pipe:1", "-i", "in.mp4", *EXACT]
    here, there = terminal.local(*line, "local.mp4"), terminal.run("--", *line, "there.mp4")
    assert here.code == there.code == 0, there.err

    def counted(text: str) -> list[str]:
        lines = [line for line in text.splitlines() if line.startswith(("frame=", "total_size=", "progress="))]
        return lines[-3:]

    assert counted(there.out) == counted(here.out) == ["frame=5", *counted(here.out)[1:2], "progress=end"]
    assert (terminal.folder / "there.mp4").read_bytes() == (terminal.folder / "local.mp4").read_bytes()


@needs("ffmpeg")
def test_ffmpeg_writes_and_reads_a_series_of_pictures(terminal: Terminal) -> None:
    """`frames/%04d.png` comes home picture by picture as an output, and goes there as an input."""
    film(terminal.folder / "in.mp4")
    (terminal.folder / "frames").mkdir()
    done = same(terminal, "ffmpeg", "-v", "error", "-i", "in.mp4", *EXACT, "frames/%04d.png")
    assert done.code == 0, done.err
    assert sorted(path.name for path in (terminal.folder / "frames").iterdir()) == [f"{n:04d}.png" for n in range(1, 6)]
    done = same(terminal, "ffmpeg", "-v", "error", "-framerate", "5", "-i", "frames/%04d.png", *EXACT, "back.mp4")
    assert done.code == 0 and (terminal.folder / "back.mp4").is_file()


@needs("ffmpeg")
def test_ffmpeg_finds_a_file_inside_of_a_filter(terminal: Terminal) -> None:
    """A picture that only a filter graph names is sent, and laid over the film."""
    film(terminal.folder / "in.mp4")
    picture(terminal.folder / "logo.ppm")
    graph = "movie=logo.ppm[logo];[0:v][logo]overlay=4:4"
    done = same(
        terminal, "ffmpeg", "-v", "error", "-i", "in.mp4", "-filter_complex", graph, *EXACT, "-frames:v", "2", "out.mp4"
    )
    assert done.code == 0, done.err


@needs("ffmpeg")
def test_ffmpeg_joins_the_films_of_a_list_that_are_named_beside_it(terminal: Terminal) -> None:
    """A list for `-f concat` goes as it is; with --in the films lie beside it there as they do here."""
    for name in ("one.mp4", "two.mp4"):
        film(terminal.folder / name, seconds="0.4")
    (terminal.folder / "list.txt").write_text("file 'one.mp4'\nfile 'two.mp4'\n")
    said = ("--in", "one.mp4", "--in", "two.mp4")
    line = ["ffmpeg", "-v", "error", "-f", "concat", "-i", "list.txt", *EXACT, "joined.mp4"]
    assert same(terminal, *line, said=said).code == 0


# ImageMagick


@needs("convert")
@needs("mogrify")
def test_convert_makes_the_same_picture(terminal: Terminal) -> None:
    """`convert a.ppm b.ppm +append -resize 50% out.ppm` makes the picture that it makes here."""
    picture(terminal.folder / "a.ppm")
    picture(terminal.folder / "b.ppm", seed=7)
    done = same(terminal, "convert", "a.ppm", "b.ppm", "+append", "-resize", "50%", "-depth", "8", "out.ppm")
    assert done.code == 0 and (terminal.folder / "out.ppm").is_file()


@needs("convert")
@needs("mogrify")
def test_convert_replaces_a_picture_that_is_here(terminal: Terminal) -> None:
    """The last word of `convert` is its output also where a file has that name already."""
    picture(terminal.folder / "a.ppm")
    picture(terminal.folder / "out.ppm", seed=7)
    before = (terminal.folder / "out.ppm").read_bytes()
    assert same(terminal, "convert", "a.ppm", "-negate", "out.ppm").code == 0
    assert (terminal.folder / "out.ppm").read_bytes() != before


@needs("mogrify")
def test_mogrify_changes_pictures_in_place(terminal: Terminal) -> None:
    """With --in-place `mogrify` changes the pictures here, each of a pattern as well."""
    for seed, name in enumerate(("a.ppm", "b.ppm", "c.ppm"), start=1):
        picture(terminal.folder / name, seed=seed)
    done = same(terminal, "mogrify", "-resize", "50%", "-depth", "8", "a.ppm", "b.ppm", "c.ppm", said=("--in-place",))
    assert done.code == 0 and (terminal.folder / "a.ppm").read_bytes().startswith(b"P6\n8 8\n")


# Archives, compilers, scripts


def test_tar_packs_a_folder_and_unpacks_it(terminal: Terminal) -> None:
    """`tar -C` packs the same archive there, and what it unpacks into a folder comes home with its modes."""
    source = terminal.folder / "source"
    (source / "deep").mkdir(parents=True)
    (source / "deep/file.txt").write_text("deep")
    (source / "run.sh").write_text("#!/bin/sh\n")
    (source / "run.sh").chmod(0o755)
    fixed = ["--sort=name", "--mtime=@0", "--owner=0", "--group=0", "--numeric-owner", "--mode=u=rwX,go=rX"]
    said = ("--out", "all.tar", "--literal", "deep", "--literal", "run.sh")
    assert same(terminal, "tar", *fixed, "-cf", "all.tar", "-C", "source/", "deep", "run.sh", said=said).code == 0
    (terminal.folder / "unpacked").mkdir()
    assert same(terminal, "tar", "-xf", "all.tar", "-C", "unpacked", said=("--out", "unpacked")).code == 0
    assert contents(terminal.folder / "unpacked") == contents(source)


@needs("zip")
def test_zip_packs_files_and_what_it_says_names_them(terminal: Terminal) -> None:
    """`zip -j` packs files by their names, and the archive comes home."""
    (terminal.folder / "a.txt").write_text("alpha\n" * 50)
    (terminal.folder / "b.txt").write_text("beta\n" * 50)
    done = same(terminal, "zip", "-X", "-q", "-j", "all.zip", "a.txt", "b.txt", said=("--out", "all.zip"))
    assert done.code == 0 and (terminal.folder / "all.zip").read_bytes().startswith(b"PK")


@needs("gcc")
def test_gcc_finds_headers_and_its_program_is_the_same(terminal: Terminal) -> None:
    """`gcc -I include -Iother -o main` finds both folders there; the program runs here."""
    for folder, word in (("include", "first"), ("other", "second")):
        (terminal.folder / folder).mkdir()
        (terminal.folder / folder / f"{word}.h").write_text(f'#define {word.upper()} "{word}"\n')
    code = '#include <stdio.h>\n#include "first.h"\n#include "second.h"\nint main(void) { puts(FIRST SECOND); }\n'
    (terminal.folder / "main.c").write_text(code)
    done = same(terminal, "gcc", "-s", "-I", "include/", "-Iother", "main.c", "-o", "main")
    assert done.code == 0, done.err
    assert subprocess.run([terminal.folder / "main"], capture_output=True, check=True).stdout == b"firstsecond\n"


@needs("gcc")
def test_the_errors_of_a_compiler_name_the_files_here(terminal: Terminal) -> None:
    """A compiler that refuses a source ends with its own code, and names the source by its path here."""
    (terminal.folder / "bad.c").write_text("int main(void) { return nothing; }\n")
    done = terminal.run("--", "gcc", "bad.c", "-o", "bad")
    assert done.code == terminal.local("gcc", "bad.c", "-o", "bad").code == 1
    assert f"{terminal.folder}/bad.c:1:" in done.err and not (terminal.folder / "bad").exists()


def test_a_script_reads_its_files_from_a_list(terminal: Terminal) -> None:
    """`python3 join.py @list -o out.txt` sends the script, the list and each file that a line of it names."""
    (terminal.folder / "join.py").write_text(JOIN)
    (terminal.folder / "sub").mkdir()
    for name in ("one.txt", "sub/two words.txt"):
        (terminal.folder / name).write_text(f"<{name}>\n")
    (terminal.folder / "list").write_text("one.txt\nsub/two words.txt\n")
    done = same(terminal, "python3", "join.py", "@list", "-o", "out.txt")
    assert (done.code, done.out) == (0, "2 joined\n"), done.err
    assert (terminal.folder / "out.txt").read_text() == "<one.txt>\n<sub/two words.txt>\n"
