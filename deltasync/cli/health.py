"""`deltasync health`: whether a host is fit to run commands, and what it has for them."""

from __future__ import annotations

import contextlib

from deltasync.cli import options
from deltasync.cli.options import Call, command, new_app
from deltasync.cli.run import WIRE, host_of
from deltasync.core.errors import NotFound, UsageError
from deltasync.core.names import shown

app = new_app()


@command(app, "on", "timeout", *WIRE)
def health(call: Call) -> int:
    """Ask a host how it is.

    It tells whether it runs commands for this client, and of its disk, slots, sessions, memory, GPUs and sandbox.
    Without --on it is the only known host. Exit 3 when there is something to look at, 4 when it cannot be reached.
    """
    from deltasync.client.doctor import Level
    from deltasync.client.health import findings
    from deltasync.client.job_transport import JobTransport
    from deltasync.client.transport import HttpTransport

    settings = call.settings()
    url = host_of(settings, [])
    transport = options.transport(settings, url, max_retries=0)
    if not isinstance(transport, HttpTransport):
        raise UsageError(f"{shown(url)} is a folder, which runs nothing; name a server with --on")
    able = None
    with contextlib.closing(transport):
        server = transport.health()
        with contextlib.suppress(NotFound):
            able = JobTransport(transport).capabilities()
    found = findings(server, able)
    is_healthy = all(each.level in (Level.OK, Level.NOTE) for each in found)
    call.out.answer({"url": url, "healthy": is_healthy, "findings": found, "server": server, "host": able})
    for each in found:
        call.out.say(f"{each.level:<8} {each.topic:<8} {each.sentence}")
    return 0 if is_healthy else 3
