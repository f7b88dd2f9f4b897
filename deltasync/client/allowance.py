"""An allowance: what a host takes of one job, looked at before anything is sent to it (spec J-67)."""

from __future__ import annotations

import os
from collections.abc import Iterable

from deltasync.client.inputs import Need, files_at
from deltasync.client.job_request import Asked
from deltasync.core.errors import HostRefused
from deltasync.core.jobs import Capabilities
from deltasync.core.names import bytes_text, shown


def require_allowed(able: Capabilities, asked: Asked, needs: Iterable[Need]) -> None:
    """Raise HostRefused, with both figures, for files, inputs, GPUs or time that the host gives no job (spec J-33)."""
    if asked.gpus > len(able.gpus):
        raise HostRefused(f"the host has {len(able.gpus)} GPUs, not {asked.gpus}")
    if asked.timeout_seconds is not None and asked.timeout_seconds > able.seconds_max:
        raise HostRefused(f"a command may run for {able.seconds_max:g} s there, not {asked.timeout_seconds:g} s")
    total = 0
    for need in needs:
        for path in files_at(os.path.realpath(need.path)):
            try:
                size = os.stat(path).st_size  # noqa: PTH116 - one of very many
            except OSError:
                continue  # whoever reads it says what is wrong with it
            total += size
            if size > able.file_bytes_max:
                raise HostRefused(
                    f"{shown(path)} has {bytes_text(size)}, and a file of a job may have "
                    f"{bytes_text(able.file_bytes_max)} there; the host's operator can raise --job-file-bytes"
                )
    if total > able.session_bytes_max:
        raise HostRefused(
            f"the inputs have {bytes_text(total)}, and those of a job may have {bytes_text(able.session_bytes_max)} "
            "there; the host's operator can raise --job-session-bytes"
        )
