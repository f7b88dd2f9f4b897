"""Decoding by type from many threads: the first time for a type is safe too."""

from __future__ import annotations

import subprocess
import sys

import msgspec
import pytest

from deltasync.core.wire import Health
from deltasync.decoding import decoded

SCRIPT = """
import sys, threading, types
import msgspec
from deltasync.decoding import decoded

sys.setswitchinterval(1e-6)
FIELDS = "".join(f"    b{n}: 'Inner | None' = None\\n    c{n}: 'list[Inner]' = []\\n" for n in range(12))
SOURCE = "import msgspec\\nclass Inner(msgspec.Struct):\\n    a: int = 0\\nclass Outer(msgspec.Struct):\\n" + FIELDS
for number in range(100):
    module = sys.modules[f"types{number}"] = types.ModuleType(f"types{number}")
    exec(SOURCE, module.__dict__)
    gate = threading.Barrier(4)

    def decode():
        gate.wait()
        assert decoded(b'{"b1": {"a": 1}, "c2": [{"a": 2}]}', module.Outer).c2[0].a == 2

    threads = [threading.Thread(target=decode) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
"""


def test_threads_that_meet_a_type_together_do_not_crash() -> None:
    """A server whose first requests come together answers them; without a lock around it this ends by a signal."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "content", [b'{"status": "\xff"}', b'{"\xff": 1}', b"\xff", b"[" * 100_000, b'{"x":' * 100_000, b""]
)
def test_whatever_is_no_json_is_one_kind_of_error(content: bytes) -> None:
    """Bytes that are no UTF-8 and nesting without end are what every caller expects of a malformed text."""
    with pytest.raises(msgspec.MsgspecError):
        decoded(content, Health)
