"""The courier: bundles under way a few at a time, in order, and stopped together."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator

import pytest

from deltasync.client import courier as courier_module
from deltasync.client.courier import Courier, Parcel, Undelivered
from deltasync.client.report import Avoided
from deltasync.client.seal import Writer, composed
from deltasync.core import wire
from deltasync.core.errors import HostUnreachable
from deltasync.core.manifest import EMPTY_ROOT
from deltasync.core.part import Part

SECONDS = 20.0


def receipt_for(identity: bytes) -> wire.Receipt:
    return wire.Receipt(
        workspace="w",
        epoch="",
        sequence=identity[0],
        identity=identity.hex(),
        bundle_id="",
        root="",
        created=0,
        updated=0,
        moved=0,
        deleted=0,
        content_bytes=0,
        applied_at="",
        tree_sequence=None,
    )


class Gate:
    """A receiver that takes bodies at once and answers each when the test opens its gate."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.gates = {number: threading.Event() for number in range(1, 9)}
        self.taken = {number: threading.Event() for number in range(1, 9)}
        self.failing: set[int] = set()

    def send_bundle(
        self,
        name: str,
        identity: bytes,
        chunks: Iterable[bytes],
        *,
        take_over: bool = False,
        wait: float = 0.0,
        patience: float = 0.0,
    ) -> wire.Receipt:
        number = identity[0]
        self.events.append(f"begin {number}")
        for _ in chunks:
            pass
        self.events.append(f"body {number}")
        self.taken[number].set()
        assert self.gates[number].wait(SECONDS)
        if number in self.failing:
            raise HostUnreachable("lost")
        return receipt_for(identity)


def parcel(number: int, chunks: Iterator[bytes] | None = None, *, part: Part | None = None) -> Parcel:
    writer = Writer("w", "/w", "a" * 32, "1" * 32)
    manifest = composed((), writer, sequence=number, parent_root=EMPTY_ROOT, root=EMPTY_ROOT).manifest
    return Parcel(manifest, bytes([number]) * 32, f"{number}", chunks or iter([b"x"]), 0, Avoided(0, 0), part=part)


def test_receipts_come_in_order_and_bodies_one_after_the_other() -> None:
    """The second bundle goes out while the first is being applied; a third waits for a receipt."""
    gate, received = Gate(), []
    with Courier(gate, "w", lambda sent, receipt: received.append((sent.sequence, receipt.sequence))) as courier:
        courier.send(parcel(1))
        courier.send(parcel(2))
        assert gate.taken[1].wait(SECONDS)
        assert gate.taken[2].wait(SECONDS)
        assert received == []
        gate.gates[2].set()
        gate.gates[1].set()
        courier.send(parcel(3))
        assert received[0] == (1, 1)
        gate.gates[3].set()
        courier.finish()
    assert received == [(1, 1), (2, 2), (3, 3)]
    assert gate.events == ["begin 1", "body 1", "begin 2", "body 2", "begin 3", "body 3"]


def test_two_parts_and_the_bundle_that_names_them_are_under_way_together() -> None:
    """Whoever sends a large file may look at the next one before any receipt; the next part waits for one."""
    gate, received = Gate(), []
    with Courier(gate, "w", lambda sent, _: received.append(sent.sequence)) as courier:
        courier.send(parcel(1, part=Part(b"s" * 32, 0, 1)))
        courier.send(parcel(2, part=Part(b"s" * 32, 1, 1)))
        courier.send(parcel(3))
        assert gate.taken[3].wait(SECONDS)
        assert received == []
        gate.gates[1].set()
        courier.send(parcel(4, part=Part(b"t" * 32, 0, 1)))
        assert received == [1]
        for number in (2, 3, 4):
            gate.gates[number].set()
        courier.finish()
    assert received == [1, 2, 3, 4]


def test_a_failure_stops_what_comes_after_it() -> None:
    """When one bundle fails, the one behind it is not begun or does not go on, and the error names the first."""
    gate, received = Gate(), []
    gate.failing.add(1)
    endless = iter(lambda: b"x", b"")
    with (
        pytest.raises(Undelivered) as caught,
        Courier(gate, "w", lambda sent, _: received.append(sent.sequence)) as courier,
    ):
        courier.send(parcel(1))
        courier.send(parcel(2, endless))
        gate.gates[1].set()
        courier.finish()
    assert (caught.value.parcel.sequence, received) == (1, [])
    assert isinstance(caught.value.cause, HostUnreachable)


def test_what_was_received_before_a_failure_counts() -> None:
    """The receipt of the first bundle is recorded even when the second one fails before it is asked for."""
    gate, received = Gate(), []
    gate.failing.add(2)
    with (
        pytest.raises(Undelivered) as caught,
        Courier(gate, "w", lambda sent, _: received.append(sent.sequence)) as courier,
    ):
        courier.send(parcel(1))
        courier.send(parcel(2))
        gate.gates[2].set()
        gate.gates[1].set()
        courier.finish()
    assert (caught.value.parcel.sequence, received) == (2, [1])


def test_an_interrupt_does_not_wait_for_a_server_that_is_silent() -> None:
    """Whoever presses Ctrl-C gets the prompt back, whatever the server does."""
    gate = Gate()
    with pytest.raises(KeyboardInterrupt), Courier(gate, "w", lambda *_: None) as courier:
        courier.send(parcel(1))
        assert gate.taken[1].wait(SECONDS)
        raise KeyboardInterrupt
    assert not gate.gates[1].is_set()
    gate.gates[1].set()


def test_a_thread_that_dies_before_it_begins_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook into new threads that fails ends the thread without a word: the bundle counts as undelivered."""
    monkeypatch.setattr(courier_module, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    gate = Gate()
    with pytest.raises(Undelivered) as caught, Courier(gate, "w", lambda *_: None) as courier:
        before = threading.gettrace()
        threading.settrace(lambda *_: 1 // 0)  # type: ignore[arg-type]
        try:
            courier.send(parcel(1))
        finally:
            threading.settrace(before)  # type: ignore[arg-type]
        courier.finish()
    assert (caught.value.parcel.sequence, gate.events) == (1, [])
