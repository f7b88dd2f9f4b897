"""A finished job for tests: a real session folder as a command leaves it, and what was asked for."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from deltasync.core.jobs import Input, JobRequest, Output, Returned, State
from deltasync.disk import Folder
from deltasync_server.jobs import returns, table
from deltasync_server.jobs.admission import Admitted
from deltasync_server.receive import Store
from deltasync_server.tenants import DEFAULT, Tenant

CLIENT = "c0ffee00" + "1" * 24
RETURNS = "returns-c0ffee00"


@dataclass
class Finished:
    """A job whose processes are dead."""

    root: Path
    outputs: list[Output] = field(default_factory=list)
    inputs: list[Input] = field(default_factory=list)
    tenant: Tenant = DEFAULT
    client_id: str = CLIENT
    id: str = "ds_1_00000001"
    returned: Returned | None = None

    def __post_init__(self) -> None:
        for name in ("inputs", "outputs", "work", "meta"):
            (self.root / name).mkdir(parents=True, exist_ok=True)

    @property
    def request(self) -> JobRequest:
        """What was asked for."""
        return JobRequest(key="0" * 32, client_id=self.client_id, argv=[], inputs=self.inputs, outputs=self.outputs)

    def out(self, place: str, content: bytes = b"made\n", **kind: Any) -> Path:
        """Name an output, and leave a file there."""
        self.outputs.append(Output(place=place, **kind))
        return self.leave(place, content)

    def leave(self, place: str, content: bytes = b"made\n", *, top: str = "outputs") -> Path:
        """Leave a file in the session."""
        path = self.root / top / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    @contextmanager
    def held(self) -> Iterator[Folder]:
        """Hold the session."""
        with Folder.open(self.root) as session:
            yield session

    def collect(self, store: Store, staged: Mapping[str, bytes] | None = None, **options: Any) -> Returned | None:
        """Collect it as the server does."""
        with self.held() as session:
            self.returned = returns.collect(store, self, session, staged or {}, **options)
        return self.returned

    def record(self, store: Store) -> None:
        """Have the store know of it as of a job that is done: what it returned is held until it is acknowledged."""
        request = msgspec.structs.replace(self.request, key=secrets.token_hex(16), inputs=[])
        nothing = Admitted(b"", "", 0, 0, {})
        with store.state.write() as db:
            table.insert(db, self.id, self.tenant, request, nothing, [])
            table.note(
                db, self.id, state=State.DONE.value, ended=int(time.time()), returned=msgspec.json.encode(self.returned)
            )
