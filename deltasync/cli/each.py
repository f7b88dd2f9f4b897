"""`deltasync run --each`: one command for each of many files, with what they say behind the files' names."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import msgspec

from deltasync.cli.options import Call
from deltasync.cli.output import bytes_text, count_text
from deltasync.cli.prestage import say_prestaged
from deltasync.cli.progress import Meter
from deltasync.cli.run import host_of, reached
from deltasync.cli.terminal import Aside, Interrupts, Streams, complain_all, note_stdin, shown_meter
from deltasync.client.each import Batch, BatchReport, Course, Options
from deltasync.client.finished import Finished
from deltasync.client.looking import expanded
from deltasync.client.run import Runner, Sink
from deltasync.client.template import Template
from deltasync.config import Settings
from deltasync.core.errors import Cancelled, JobLost, PlanRefused
from deltasync.core.names import shown
from deltasync.disk import make_folder

LINE_BYTES_MAX = 64 << 10
"""A line that is longer is told in parts."""
PROBLEMS = 3


class Prefixed:
    """A sink whose lines stand behind a file's name; the lines of several are never mixed (spec J-73)."""

    def __init__(self, streams: Streams, name: str, turn: threading.Lock) -> None:
        self._streams, self._turn = streams, turn
        self._prefix = f"{shown(name)}: ".encode()
        self._rest = {"out": b"", "err": b""}

    def out(self, content: bytes) -> None:
        """Take a part of the command's standard output."""
        self._put("out", content)

    def err(self, content: bytes) -> None:
        """Take a part of the command's standard error."""
        self._put("err", content)

    def close(self) -> None:
        """Tell the lines without an end."""
        for kind in self._rest:
            if self._rest[kind]:
                self._put(kind, b"\n")

    def _put(self, kind: str, content: bytes) -> None:
        *lines, rest = (self._rest[kind] + content).split(b"\n")
        if len(rest) > LINE_BYTES_MAX:
            lines, rest = [*lines, rest], b""
        self._rest[kind] = rest
        if lines:
            told = b"".join(self._prefix + line + b"\n" for line in lines)
            with self._turn:
                (self._streams.out if kind == "out" else self._streams.err)(told)


class _Sinks:
    """A sink for each file, onto the same two streams."""

    def __init__(self, streams: Streams, *, is_raw: bool) -> None:
        self._streams, self._is_raw, self._turn = streams, is_raw, threading.Lock()

    @contextlib.contextmanager
    def __call__(self, file: str) -> Iterator[Sink]:
        if self._is_raw:
            yield self._streams
            return
        with contextlib.closing(Prefixed(self._streams, Path(file).name, self._turn)) as sink:
            yield sink


def run_each(
    call: Call,
    settings: Settings,
    template: Template,
    patterns: Sequence[str],
    options: Options,
    *,
    is_resumed: bool,
    is_prestaged: bool,
) -> int:
    """Run a template's command for each file that fits a pattern, and say at the end which failed."""
    folder = os.getcwd()  # noqa: PTH109
    out = Aside(json=call.out.is_json, quiet=call.out.is_quiet, verbose=call.out.is_verbose)
    batch = Batch(template, folder, expanded(patterns, folder))
    if template.out_dir is not None and not is_prestaged:
        _make(template.out_dir)
    with Finished(template, folder) as finished:
        if is_resumed:
            batch.skip_finished(finished)
        needs = batch.needs()
        if not batch.files:
            return _told(call, out, batch.report, "")
        url = host_of(settings, [each.path for each in needs])
        with reached(settings, url) as transport:
            runner = Runner(transport, note=out.note, settle_seconds=settings.settle_seconds)
            able = runner.require_leave(is_shut_in=template.asked.is_shut_in)
            course = Course(batch, runner, finished, options, Meter())
            with shown_meter(out) as progress:
                sent = course.deliver(needs, progress)
            if is_prestaged:
                say_prestaged(call, url, sent)
                return 0
            out.say(f"{count_text(sent.files, 'file')}, {bytes_text(sent.bytes)}; {bytes_text(sent.sent_bytes)} sent")
            note_stdin(out)
            sinks = _Sinks(Streams(is_aside=call.out.is_json), is_raw=options.is_raw)
            announce = partial(out.note, "Ctrl-C again within a second leaves what runs to its host")
            interrupts = Interrupts(course.cancel, announce)
            try:
                with interrupts:
                    report = course.run(able, sinks)
            except KeyboardInterrupt:
                if interrupts.has_cancelled:
                    raise Cancelled("what runs is being cancelled; `deltasync jobs ls` lists it") from None
                raise Cancelled("left what runs to its host; `deltasync jobs ls` lists it") from None
            return _told(call, out, report, url)


def _make(folder: str) -> None:
    try:
        make_folder(Path(folder).absolute(), durable=True)
    except OSError as error:
        raise PlanRefused(f"--out-dir: {shown(folder)} cannot be made: {error.strerror}") from error


def _told(call: Call, out: Aside, report: BatchReport, url: str) -> int:
    call.out.answer({"url": url, **msgspec.to_builtins(report)})
    skipped = f", {report.skipped:,} done before" if report.skipped else ""
    home = f"{count_text(report.output_files, 'file')}, {bytes_text(report.output_bytes)} home"
    out.say(f"{report.done:,} of {count_text(report.files, 'file')} done{skipped}; {home}")
    failed = [(each.file, f"{each.reason}{f' ({each.job})' if each.job else ''}") for each in report.failed]
    complain_all(call, failed)
    if failed or report.left:
        left = f", {report.left:,} cancelled" if report.left else ""
        call.out.warn(
            f"{len(failed):,} of {count_text(report.files, 'file')} failed{left}; --resume runs only these again"
        )
    if report.left:
        return JobLost.exit_code
    return PROBLEMS if failed else 0
