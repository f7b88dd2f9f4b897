"""What a command says on a host is told with the paths of this machine, and otherwise byte for byte."""

from __future__ import annotations

import random

import pytest

from deltasync.client.telling import Telling

SESSION = "/data/sessions/ds_1_00000000"
PIECES = [
    b"plain ", b"\x00\xff\r\n", f"{SESSION}/inputs/home/a.txt".encode(), f"{SESSION}/outputs/b".encode(),
    f"{SESSION}/work/c".encode(), f"{SESSION}/inputs".encode(), b"/data/sessions/", b"/", SESSION.encode(), b"/inputs/",
    b"/d", b"outputs/",
]  # fmt: skip


def naive(text: bytes) -> bytes:
    """Replace in the whole text at once, from its beginning on, each place once."""
    told, at = b"", 0
    while at < len(text):
        for folder in ("inputs", "outputs"):
            prefix = f"{SESSION}/{folder}/".encode()
            if text.startswith(prefix, at):
                told, at = told + b"/", at + len(prefix)
                break
        else:
            told, at = told + text[at : at + 1], at + 1
    return told


@pytest.mark.parametrize("seed", range(20))
def test_the_same_is_told_wherever_the_stream_is_cut(seed: int) -> None:
    """However a stream is cut into pieces, what is told is that of the whole stream, replaced once."""
    luck = random.Random(seed)
    text = b"".join(luck.choices(PIECES, k=40))
    telling, told, at = Telling(SESSION), b"", 0
    while at < len(text):
        size = luck.choice([1, 2, 3, 7, 40, 200])
        told += telling.told(text[at : at + size])
        at += size
    assert told + telling.rest() == naive(text)


def test_a_path_of_an_input_and_of_an_output_are_those_here() -> None:
    """A path below inputs/ and one below outputs/ lose the session's folder; what is beside them keeps it."""
    telling = Telling(SESSION + "/")
    said = f"{SESSION}/inputs/home/u/in.txt: read\nwrote {SESSION}/outputs/home/u/o.txt in {SESSION}/work\n".encode()
    told = telling.told(said) + telling.rest()
    assert told == f"/home/u/in.txt: read\nwrote /home/u/o.txt in {SESSION}/work\n".encode()


def test_no_more_is_held_back_than_may_be_a_path() -> None:
    """A line without an end is told at once, but for what may be the beginning of a path."""
    telling = Telling(SESSION)
    assert telling.told(b"50 % \r") == b"50 % \r"
    assert telling.told(b"at /data") == b"at "
    assert telling.told(b"base") == b"/database"
    assert telling.rest() == b""


def test_nothing_is_replaced_without_a_session() -> None:
    """Raw output is what the command said, at once."""
    telling = Telling("")
    assert telling.told(b"/inputs/x") == b"/inputs/x" and telling.rest() == b""
