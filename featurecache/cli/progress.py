"""Tells of progress on stderr: bars on a terminal, elsewhere a line every 30 s."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from featurecache.cli.tally import Tally

if TYPE_CHECKING:
    from featurecache.cli.bars import Terminal

LINE_EVERY = 30.0  # seconds
WORTH_A_LINE = 2.0  # seconds that a task took, for a line at its end


class Lines:
    """A Reporter for logs: a line every 30 s, whatever is at work, and one at the end of each task that took longer."""

    def __init__(self) -> None:
        self._tally, self._last = Tally(), 0.0

    def begin(self, task: str, total: int | None, unit: str = "images", *, done: int = 0) -> None:
        """Remember when the task began."""
        if not self._tally.running:
            self._last = time.monotonic()
        self._tally.begin(task, total, unit, done)

    def advance(self, task: str, n: int = 1, *, status: str = "") -> None:
        """Count, and print when a line is due."""
        self._tally.advance(task, n, status)
        if (now := time.monotonic()) - self._last >= LINE_EVERY:
            running = list(self._tally.running.values())
            told = [each for each in running if each.at_work or each.last > self._last]  # also what is complete by now
            self.note("; ".join(each.so_far() for each in told or running))
            self._last = now

    def end(self, task: str) -> None:
        """One last line for what took a while."""
        running = self._tally.end(task)
        if running.seconds > WORTH_A_LINE:
            self.note(running.in_all())

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
