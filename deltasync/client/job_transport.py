"""Jobs over HTTP: the requests that start, watch and end them (spec J-30 to J-63)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from http import HTTPStatus

import msgspec

from deltasync.client.job_events import STREAMS, Event, events
from deltasync.client.transport import HttpTransport
from deltasync.core.errors import HostBusy, HostUnreachable, NotADeltasyncServer, UsageError
from deltasync.core.jobs import JOB_ID, Capabilities, Job, JobList, JobRequest, LeftOutput, LeftOutputs
from deltasync.core.names import shown

LOSSES_MAX = 12
"""How often in a row a log that breaks off is asked for again: some minutes, by the pauses of `back_off`."""
OUTPUT_PAGES_MAX = 1000
"""How many pages of outputs are asked for."""
SILENCE_SECONDS = 60.0
"""How much longer than any other answer a log may be silent."""


class JobTransport:
    """The jobs of one server."""

    def __init__(self, transport: HttpTransport) -> None:
        """Use the connections of a transport, which the caller closes."""
        self._transport = transport
        self.url = transport.url

    def start(self, request: JobRequest) -> Job:
        """Have a job run; the same key again is the same job, so a lost answer costs nothing."""
        body, good = msgspec.json.encode(request), (HTTPStatus.OK, HTTPStatus.CREATED)
        return self._transport.patiently(
            lambda: _known(self._transport.ask(Job, "POST", "/jobs", body=body, good=good))
        )

    def job(self, job_id: str) -> Job:
        """Return a job as it is now."""
        return self._ask(job_id, "GET")

    def jobs(self) -> list[Job]:
        """Return the jobs that the server remembers, the newest first."""
        found = self._transport.patiently(lambda: self._transport.ask(JobList, "GET", "/jobs"))
        return [_known(each) for each in found.jobs]

    def cancel(self, job_id: str) -> Job:
        """Cancel a job; one that is over is forgotten."""
        return self._ask(job_id, "DELETE")

    def outputs(self, job_id: str) -> LeftOutputs:
        """Return all that a job left, by path (spec J-68); raises NotADeltasyncServer where that has no end."""
        path, after, found = f"{_path(job_id)}/outputs", "", list[LeftOutput]()
        for _ in range(OUTPUT_PAGES_MAX):
            query = {"after": after}
            page = self._transport.patiently(partial(self._transport.ask, LeftOutputs, "GET", path, query=query))
            found += page.outputs
            if page.next is None:
                return LeftOutputs(outputs=found, waits=page.waits)
            after = page.next
        raise NotADeltasyncServer(f"the outputs of {job_id} have no end")

    def acknowledge(self, job_id: str) -> Job:
        """Say that everything that a job returned is here, so that the server need not keep it (spec J-63)."""
        return self._ask(job_id, "POST", "/acknowledge")

    def capabilities(self) -> Capabilities:
        """Ask what a job may ask for, and what is free."""
        return self._transport.patiently(lambda: self._transport.ask(Capabilities, "GET", "/capabilities"))

    def logs(self, job_id: str, after: int = 0) -> Iterator[Event]:
        """Yield a job's log from a place on, as it grows, to its end: the state that it ended with.

        A connection that breaks off is opened again behind the last event; raises HostUnreachable when that goes on.
        """
        path, losses = f"{_path(job_id)}/logs", 0
        while True:
            try:
                with self._transport.arriving(path, {"after": after}, extra_seconds=SILENCE_SECONDS) as pieces:
                    for event in events(pieces):
                        losses = 0
                        after = _behind(event, after)
                        yield event
                        if event.job is not None and event.job.state.is_over:
                            return
                raise HostUnreachable(f"the log of {job_id} broke off")
            except (HostUnreachable, HostBusy) as error:
                if losses >= LOSSES_MAX:
                    raise
                self._transport.back_off(losses, error)
                losses += 1

    def _ask(self, job_id: str, method: str, tail: str = "") -> Job:
        path = _path(job_id) + tail
        return self._transport.patiently(lambda: _known(self._transport.ask(Job, method, path)))


def _behind(event: Event, after: int) -> int:
    """Return the place behind an event; raises NotADeltasyncServer where the log would go back, or not on."""
    if event.at is None or event.at < after or (event.kind in STREAMS and event.at == after):
        if event.kind in STREAMS:
            raise NotADeltasyncServer("the log of a job goes back; it cannot be told without a gap")
        return after
    return event.at


def _known(job: Job) -> Job:
    """Return a job whose id is one; nothing else becomes part of a path here."""
    if JOB_ID.fullmatch(job.id) is None:
        raise NotADeltasyncServer(f"{shown(job.id)} is no id of a job")
    return job


def _path(job_id: str) -> str:
    if JOB_ID.fullmatch(job_id) is None:
        raise UsageError(f"{shown(job_id)} is no id of a job; `deltasync jobs ls` lists them")
    return f"/jobs/{job_id}"
