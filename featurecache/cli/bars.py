"""Progress on a terminal: bars with rate and time left. Apart, since rich's part for it is slow to import."""

from __future__ import annotations

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
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            RateColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[status]}", markup=False),
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
