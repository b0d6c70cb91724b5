"""Ctrl-C raised once, and held back where an exception would be lost: in compiled code, and beside threads."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

PATIENCE = 10.0
"""Seconds that work has to commit what is complete, before another Ctrl-C ends the process there and then."""
ENDING = f"Ending: what is complete is being kept. {PATIENCE:g} s after the first, another Ctrl-C ends it at once.\n"
ENDED = "Ended at once. What was committed is kept.\n"
STATUS = 130  # of a process that ended so


def interrupt_once() -> Callable[[int, FrameType | None], None]:
    """A handler of signals whose first raises KeyboardInterrupt; those that follow can't break what it set going.

    A second exception, in the middle of the commit that the first one led to, would leave that undone.
    """
    first: float | None = None
    told = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first, told
        now = time.monotonic()
        if first is None:
            first = now
            raise KeyboardInterrupt
        if now - first > PATIENCE:  # whatever hangs: a store survives this as it survives kill -9
            os.write(2, ENDED.encode())
            os._exit(STATUS)
        if not told:
            told = True
            os.write(2, ENDING.encode())

    return handle


class Interrupted(Exception):
    """Raised by work that noticed the request to end; who holds the interrupt back raises KeyboardInterrupt instead."""


class Held:
    """Tells whether the user asked to end meanwhile.

    Attributes:
        caught: number of the signal that came, or None.
    """

    caught: int | None = None

    def check(self) -> None:
        """Raise `Interrupted` if so."""
        if self.caught is not None:
            raise Interrupted


@contextmanager
def held_back() -> Iterator[Held]:
    """Within it SIGINT and SIGTERM raise nothing; at its end they do what they would have done.

    Only the main thread is ever interrupted: in any other this does nothing. Signals that Python code does not handle
    are left alone.
    """
    held = Held()

    def note(number: int, frame: FrameType | None) -> None:
        held.caught = number

    main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)} if main else {}
    ours = {number: handler for number, handler in handlers.items() if callable(handler)}
    try:
        for number in ours:
            signal.signal(number, note)
        yield held
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
        if held.caught is not None:
            ours[signal.Signals(held.caught)](held.caught, None)
