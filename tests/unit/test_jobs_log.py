"""The log of a command: both streams in order, from any place on, in bounded space."""

from __future__ import annotations

import shutil
from pathlib import Path

from deltasync_server.jobs.log import SEGMENTS, Event, Kind, Log, LogReader, end_of


def events(path: Path, place: int = 0) -> list[Event]:
    reader, found = LogReader(path, place), []
    while part := reader.read(1000):
        found += part
    reader.close()
    return found


def content(found: list[Event]) -> bytes:
    return b"".join(each.content for each in found)


def test_both_streams_come_back_in_the_order_in_which_they_came(tmp_path: Path) -> None:
    """Bytes of the streams are told apart, and the id of each event is the place behind it."""
    log = Log(tmp_path / "log", 1 << 20)
    for kind, text in ((Kind.OUT, b"one\n"), (Kind.ERR, b"\xff\0two"), (Kind.OUT, b"3")):
        log.append(kind, text)
    log.close()
    assert events(tmp_path / "log") == [
        Event(Kind.OUT, b"one\n", 4),
        Event(Kind.ERR, b"\xff\0two", 9),
        Event(Kind.OUT, b"3", 10),
    ]
    assert (log.end, end_of(tmp_path / "log")) == (10, 10)


def test_a_log_goes_on_from_every_place(tmp_path: Path) -> None:
    """Whatever came already does not come again, and nothing is left out, also across segments and inside an event."""
    log = Log(tmp_path / "log", 40 * SEGMENTS)
    for number in range(30):
        log.append(Kind.OUT if number % 3 else Kind.ERR, b"%d;" % number * (number % 4 + 1))
    log.close()
    whole = content(events(tmp_path / "log"))
    assert len(whole) == log.end and len(list((tmp_path / "log").iterdir())) > 3
    for place in range(log.end + 2):
        assert content(events(tmp_path / "log", place)) == whole[place:]


def test_a_reader_sees_what_is_written_meanwhile(tmp_path: Path) -> None:
    """What is there is read; the rest when it has come, in the same segment and in the next ones."""
    log = Log(tmp_path / "log", 64 * SEGMENTS)
    reader = LogReader(tmp_path / "log", 0)
    assert reader.read(10) == []
    for number in range(40):
        text = b"line %d\n" % number
        log.append(Kind.OUT, text)
        assert content(reader.read(100)) == text
        assert reader.read(100) == []
    reader.close()
    log.close()


def test_of_too_much_the_middle_is_left_out(tmp_path: Path) -> None:
    """The beginning and the end stay, a gap says how many bytes are missing, and the disk holds no more than asked."""
    log = Log(tmp_path / "log", 16_000)
    lines = [b"line %06d\n" % number for number in range(20_000)]
    for line in lines:
        log.append(Kind.OUT, line)
    log.close()
    found, whole = events(tmp_path / "log"), b"".join(lines)
    (gap,) = [each for each in found if each.kind is Kind.GAP]
    before, after = (content([each for each in found if (each.end <= gap.end) is side]) for side in (True, False))
    assert whole.startswith(before) and whole.endswith(after) and min(len(before), len(after)) > 4000
    assert len(before) + gap.left_out_bytes + len(after) == len(whole) == log.end
    assert sum(each.stat().st_size for each in (tmp_path / "log").iterdir()) <= 16_000
    assert content(events(tmp_path / "log", gap.end)) == after
    (later,) = [each for each in events(tmp_path / "log", gap.end - 10) if each.kind is Kind.GAP]
    assert later.left_out_bytes == 10


def test_a_reader_that_is_overtaken_is_told_of_the_gap(tmp_path: Path) -> None:
    """What it had not read when the middle went is counted, and it goes on behind."""
    log, reader = Log(tmp_path / "log", 3200), LogReader(tmp_path / "log", 0)
    log.append(Kind.OUT, b"a" * 100)
    assert content(reader.read(1000)) == b"a" * 100
    for _ in range(500):
        log.append(Kind.ERR, b"b" * 100)
    found = []
    while part := reader.read(1000):
        found += part
    assert sum(len(each.content) + each.left_out_bytes for each in found) == 50_000 == log.end - 100
    assert [each.kind for each in found].count(Kind.GAP) == 1
    reader.close()
    log.close()


def test_half_a_frame_is_no_frame(tmp_path: Path) -> None:
    """A server that died while it wrote has left a log that ends with the last whole event."""
    log = Log(tmp_path / "log", 1 << 20)
    log.append(Kind.OUT, b"whole")
    log.append(Kind.OUT, b"broken off")
    log.close()
    (segment,) = (tmp_path / "log").iterdir()
    for missing in range(1, 15):
        segment.write_bytes(segment.read_bytes()[:-1])
        assert content(events(tmp_path / "log")) == b"whole", missing
    assert end_of(tmp_path / "log") == 5


def test_a_log_that_cannot_be_written_holds_nobody_up(tmp_path: Path) -> None:
    """Where the disk takes nothing more the bytes are counted as left out, and the command goes on."""
    log = Log(tmp_path / "log", 16 * 100)
    log.append(Kind.OUT, b"first")
    shutil.rmtree(tmp_path / "log")
    log.append(Kind.OUT, b"x" * 1000)
    assert log.end == 1005
    log.close()


def test_a_log_that_never_was_is_empty(tmp_path: Path) -> None:
    """A job that never ran has nothing to say."""
    assert (events(tmp_path / "none"), end_of(tmp_path / "none")) == ([], 0)
