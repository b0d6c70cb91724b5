"""Ctrl-C held back where an exception would be lost: in compiled code that calls Python back, and beside threads."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


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
