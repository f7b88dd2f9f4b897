"""`deltasync run --prestage`: the inputs of a command go to the host, and the command does not run yet."""

from __future__ import annotations

import os

import msgspec

from deltasync.cli.options import Call
from deltasync.cli.output import bytes_text, count_text
from deltasync.cli.run import host_of, reached
from deltasync.cli.terminal import complain_all, shown_meter
from deltasync.client.inputs import Report
from deltasync.client.job_request import Asked, drafted
from deltasync.client.run import Runner
from deltasync.config import Settings


def prestage(call: Call, settings: Settings, asked: Asked) -> int:
    """Have the inputs on the host, and nothing else (spec J-76)."""
    draft = drafted(asked, os.getcwd())  # noqa: PTH109
    with reached(settings, host_of(settings, [each.path for each in draft.needs])) as transport:
        runner = Runner(transport, note=call.out.note, settle_seconds=settings.settle_seconds)
        runner.require_leave()
        with shown_meter(call.out) as progress, runner.delivered(draft.needs, progress) as there:
            say_prestaged(call, transport.url, there.report)
    return 0


def say_prestaged(call: Call, url: str, report: Report) -> None:
    """Say what was sent, with nothing run."""
    call.out.answer({"url": url, "inputs": msgspec.to_builtins(report)})
    call.out.say(
        f"{count_text(report.files, 'file')}, {bytes_text(report.bytes)} on {url}; {bytes_text(report.sent_bytes)} sent"
    )
    complain_all(call, [(each.path, each.reason) for each in report.problems])
