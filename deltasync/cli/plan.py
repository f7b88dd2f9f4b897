"""`deltasync plan`: what it would take to run a command on a host, before anything is sent."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import msgspec

from deltasync.cli.asked import Environment, InPlace, Inputs, Literals, Outputs, Shell, Words, argv_of, variable
from deltasync.cli.options import Call, command, new_app
from deltasync.cli.output import bytes_text, count_text, seconds_text
from deltasync.cli.run import WIRE, host_of, reached
from deltasync.cli.terminal import complain_all
from deltasync.core.argv import Said

if TYPE_CHECKING:
    from deltasync.client.forecast import Forecast
    from deltasync.core.jobs import Capabilities

app = new_app()


@command(app, "on", *WIRE, stops_at_word=True)
def plan(
    call: Call,
    words: Words = None,
    inputs: Inputs = None,
    outputs: Outputs = None,
    literals: Literals = None,
    environment: Environment = None,
    is_in_place: InPlace = False,
    shell: Shell = None,
) -> int:
    """Say what it would take to run a command on a host; nothing is sent, and nothing runs.

    The inputs, how much of them the host lacks, how long that takes by the rate of earlier pushes, what is free there,
    and what the wait costs, where `deltasync host price` has noted what an hour does. Files that are not known yet are
    read. The exit codes are those of `run` itself.
    """
    from deltasync.client.forecast import forecast
    from deltasync.client.hosts import HostBook
    from deltasync.client.job_request import Asked, drafted
    from deltasync.client.job_transport import JobTransport

    said = Said(frozenset(inputs or ()), frozenset(outputs or ()), frozenset(literals or ()), is_in_place)
    asked = Asked(argv_of(words or [], shell), said, dict(variable(each) for each in environment or ()))
    settings = call.settings()
    draft = drafted(asked, os.getcwd())  # noqa: PTH109
    url = host_of(settings, [each.path for each in draft.needs])
    with reached(settings, url) as transport:
        able = JobTransport(transport).capabilities()
        found = forecast(transport, draft.needs)
    host = HostBook.of_user(os.environ).at(url)
    price = host.price_per_hour if host is not None else None
    cost = price * found.seconds / 3600 if price is not None and found.seconds is not None else None
    _say(call, url, found, able, {"price_per_hour": price, "cost": cost})
    return 0


def _say(call: Call, url: str, found: Forecast, able: Capabilities, cost: dict[str, Any]) -> None:
    free = {key: value for key, value in msgspec.to_builtins(able).items() if key.endswith("_free") or "_free_" in key}
    call.out.answer({"url": url, **msgspec.to_builtins(found), **cost, "runs": able.runs, "slots": able.slots, **free})
    call.out.say(f"inputs   {count_text(found.files, 'file')}, {bytes_text(found.bytes)}")
    call.out.say(f"to send  {count_text(found.missing_files, 'file')}, {bytes_text(found.missing_bytes)}")
    rate = f"{bytes_text(round(found.bytes_per_second))}/s" if found.bytes_per_second else "not known yet"
    known = "" if found.seconds is None else f"about {seconds_text(found.seconds)}, "
    call.out.say(f"time     {known}uplink {rate}")
    gpus = f", {able.gpus_free} of {len(able.gpus)} GPUs" if able.gpus else ""
    call.out.say(
        f"free     {able.slots_free} of {able.slots} slots{gpus}, {bytes_text(able.memory_free_bytes)} of memory, "
        f"{bytes_text(able.disk_free_bytes)} of disk"
    )
    if cost["cost"] is not None:
        call.out.say(f"cost     {cost['cost']:.4f} for the wait, at {cost['price_per_hour']:g} an hour")
    if not able.runs:
        call.out.warn(f"{url} runs no commands for this client: {able.why}")
    complain_all(call, [(each.path, each.reason) for each in found.problems])
