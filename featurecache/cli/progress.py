"""Draws progress on stderr: bars with rate and time left on a terminal, a line every 30 s elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

LINE_EVERY = 30.0  # seconds


class RateColumn(ProgressColumn):
    """Units per second, over the recent past."""

    def render(self, task: Task) -> Text:
        """`123.4 images/s`."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f} {task.fields['unit']}/s" if speed else "", style="progress.data.speed")


class Terminal:
    """A Reporter with one bar a task."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            RateColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[status]}"),
            console=Console(stderr=True),
            transient=False,
        )
        self._tasks: dict[str, TaskID] = {}

    def begin(self, task: str, total: int | None, unit: str = "images") -> None:
        """Show a bar."""
        self._tasks[task] = self._progress.add_task(task, total=total, unit=unit, status="")

    def advance(self, task: str, n: int = 1, *, status: str = "") -> None:
        """Move the bar."""
        if status:
            self._progress.update(self._tasks[task], advance=n, status=status)
        else:
            self._progress.update(self._tasks[task], advance=n)

    def end(self, task: str) -> None:
        """Leave the bar as it stands."""
        self._progress.stop_task(self._tasks[task])

    def note(self, message: str) -> None:
        """A line above the bars."""
        self._progress.console.print(message, highlight=False, markup=False)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


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
    return Terminal() if sys.stderr.isatty() else Lines()
