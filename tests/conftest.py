"""What holds for every test."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a script starts things in its background
    signal.signal(signal.SIGINT, signal.default_int_handler)

_SWEEPS = {"test_sweeps", "test_failing_fsync", "test_random_kills", "test_run_kills"}
_REPEATS = {"test_mistakes", "test_odd_files", "test_watch_random", "test_watch_scripted", "test_project"}
_REPEATS |= {"test_run_programs", "test_run_topaz", "test_run_trouble", "test_run_faults", "test_run_reuse"}
_REPEATS |= {
    "test_watch_edits",
    "test_watch_trouble",
    "test_hosts",
    "test_uploads",
    "test_shortage",
    "test_run_stumbles",
}
_UNMEASURED = _SWEEPS | _REPEATS


@pytest.fixture(scope="module", autouse=True)
def unmeasured(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leave the processes of some modules out of coverage: others run the same lines, and it costs half as much again.

    A process that is killed loses its share anyway.
    """
    with pytest.MonkeyPatch.context() as patch:
        if request.path.stem in _UNMEASURED:
            for name in [each for each in os.environ if each.startswith("COVERAGE_")]:
                patch.delenv(name)
        yield
