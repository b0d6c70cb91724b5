"""Tells of progress on stderr: bars on a terminal, elsewhere a line every 30 s."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from featurecache.cli.bars import Terminal

LINE_EVERY = 30.0  # seconds


class Lines:
    """A Reporter for logs: a line every 30 s and one at the end of each task that took longer than two."""

    def __init__(self) -> None:
        self._state: dict[str, tuple[int, int | None, str, float, float]] = {}

    def begin(self, task: str, total: int | None, unit: str = "images") -> None:
        """Remember when the task began."""
        now = time.monotonic()
        self._state[task] = (0, total, unit, now, now)

    def advance(self, task: str, n: int = 1, *, status: str = "") -> None:
        """Count, and print when a line is due."""
        done, total, unit, began, last = self._state[task]
        done, now = done + n, time.monotonic()
        if now - last >= LINE_EVERY:
            rate = done / (now - began)
            left = "" if total is None or not rate else f", {max(total - done, 0) / rate:,.0f} s left"
            self.note(f"{task}: {done:,}/{total or '?'} {unit}, {rate:,.1f} {unit}/s{left} {status}".rstrip())
            last = now
        self._state[task] = (done, total, unit, began, last)

    def end(self, task: str) -> None:
        """One last line for what took a while."""
        done, _, unit, began, _ = self._state[task]
        took = time.monotonic() - began
        if took > 2:
            self.note(f"{task}: {done:,} {unit} in {took:,.1f} s, {done / took:,.1f} {unit}/s")

    def note(self, message: str) -> None:
        """A line."""
        print(message, file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class Mute(Lines):
    """Says nothing: --quiet."""

    def note(self, message: str) -> None:
        """Nothing."""


def reporter(*, quiet: bool) -> Terminal | Lines:
    """The reporter that suits stderr."""
    if quiet:
        return Mute()
    if not sys.stderr.isatty():
        return Lines()
    from featurecache.cli.bars import Terminal

    return Terminal()
