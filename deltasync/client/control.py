"""What reaches the watch loop from outside: wake-ups, the wish to stop, and questions that only the loop can answer."""

from __future__ import annotations

import contextlib
import os
import queue
import select
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from deltasync.client.channel import Request

STOP_SECONDS = 5.0
"""How long a stop may take, at worst while a server does not answer; the state is safe at every moment."""


class Control:
    """What reaches the loop from outside: wake-ups, the wish to stop, and questions that only the loop can answer."""

    def __init__(self) -> None:
        """Start without any."""
        self.calls: queue.SimpleQueue[Call] = queue.SimpleQueue()
        self.is_stopping = False
        self._is_interruptible = self._has_signals = self._is_released = False
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)
        self._last_resort: threading.Timer | None = None

    def wake(self) -> None:
        """Make the loop go round; safe in any thread and in a signal handler."""
        with contextlib.suppress(OSError):  # a full pipe wakes as well
            self._sender.send(b"!")

    def rest(self, seconds: float) -> None:
        """Wait for a wake-up, at most so long."""
        select.select([self._receiver], [], [], max(0.0, seconds))
        with contextlib.suppress(BlockingIOError):
            while self._receiver.recv(4096):
                pass

    def stop(self, *_: object) -> None:
        """Ask the loop to end; it does within seconds, whatever it is doing."""
        self.is_stopping = True
        self.wake()
        if not self._has_signals:
            return
        if self._last_resort is None:
            self._last_resort = threading.Timer(STOP_SECONDS, os._exit, (0,))
            self._last_resort.daemon = True
            self._last_resort.start()
        if threading.current_thread() is not threading.main_thread():
            os.kill(os.getpid(), signal.SIGTERM)
        elif self._is_interruptible:
            self._is_interruptible = False
            raise Stopped

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Stop on SIGTERM and SIGINT; without effect outside the main thread, where signals do not arrive."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.stop) for number in (signal.SIGTERM, signal.SIGINT)}
        self._has_signals = True
        try:
            yield
        finally:
            self._has_signals = False
            for number, handler in before.items():
                signal.signal(number, handler)
            if self._last_resort is not None:
                self._last_resort.cancel()

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let a stop break off the block, which may take long and leaves the state whole at any moment."""
        self._is_interruptible = True
        try:
            if self.is_stopping:
                raise Stopped
            yield
        finally:
            self._is_interruptible = False

    def call(self, request: Request) -> dict[str, Any] | None:
        """Have the loop answer a question, and wait for it; None when the loop ended."""
        asked = Call(request)
        self.calls.put(asked)
        if self._is_released:
            return None
        self.wake()
        asked.is_answered.wait()
        return asked.answer

    def release(self) -> None:
        """Let everybody go who still waits for an answer; the loop has ended."""
        self._is_released = True
        with contextlib.suppress(queue.Empty):
            while True:
                self.calls.get_nowait().reply(None)
        self._receiver.close()
        self._sender.close()


class Stopped(BaseException):
    """Breaks off what the loop is doing; not an error, so that nothing takes it for one."""


@dataclass(slots=True)
class Call:
    """A question on its way to the loop and back."""

    request: Request
    answer: dict[str, Any] | None = None
    is_answered: threading.Event = field(default_factory=threading.Event)

    def reply(self, answer: dict[str, Any] | None) -> None:
        """Give the answer to whoever waits."""
        self.answer = answer
        self.is_answered.set()
