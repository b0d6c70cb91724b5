"""Progress on a terminal: a bar for each task at work, a line once it is done. Apart: rich's part is slow to import."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text
from rich.theme import Theme

from featurecache.cli.tally import Tally

# Colours that can be read on white and on black alike; all else is in the terminal's own.
THEME = Theme(
    {
        "bar.complete": "green",
        "bar.finished": "green",
        "bar.pulse": "green",
        "bar.back": "bright_black",
        "progress.remaining": "none",
        "progress.spinner": "none",
    }
)


class CountColumn(ProgressColumn):
    """`600/1,250 images`; the unit only where there is room."""

    def __init__(self, *, unit: bool) -> None:
        super().__init__(Column(no_wrap=True, justify="right"))
        self._unit = unit

    def render(self, task: Task) -> Text:
        """How much is done, of how much."""
        of = f"/{task.total:,.0f}" if task.total is not None else ""
        return Text(f"{task.completed:,.0f}{of}" + (f" {task.fields['unit']}" if self._unit else ""))


class RateColumn(ProgressColumn):
    """Units per second, over the recent past."""

    def __init__(self) -> None:
        super().__init__(Column(no_wrap=True, justify="right"))

    def render(self, task: Task) -> Text:
        """`123.4/s`."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f}/s" if speed else "")


class StatusColumn(ProgressColumn):
    """What else there is to say; where it is narrow this alone gives way, for its column may wrap and its text not."""

    def render(self, task: Task) -> Text:
        """`600 reused, 2 failed`."""
        return Text(task.fields["status"], no_wrap=True, overflow="ellipsis")


class Terminal:
    """A Reporter with a bar for each task that is at work."""

    def __init__(self) -> None:
        console = Console(stderr=True, theme=THEME)
        wide, most = console.width >= 90, console.width // 3
        self._progress = Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, max_width=most)),
            BarColumn(bar_width=30 if wide else 12),
            CountColumn(unit=wide),
            RateColumn(),
            TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
            StatusColumn(),
            console=console,
            transient=True,
        )
        self._tally = Tally()
        self._bars: dict[str, TaskID] = {}

    def begin(self, task: str, total: int | None, unit: str = "images", *, done: int = 0) -> None:
        """Show a bar."""
        self._tally.begin(task, total, unit, done)
        self._bars[task] = self._progress.add_task(task, total=total, completed=done, unit=unit, status="")

    def advance(self, task: str, n: int = 1, *, status: str = "") -> None:
        """Move the bar."""
        self._tally.advance(task, n, status)
        self._progress.update(self._bars[task], advance=n, status=self._tally.running[task].status)

    def end(self, task: str) -> None:
        """A line in the place of the bar."""
        self._progress.remove_task(self._bars.pop(task))
        self.note(self._tally.end(task).in_all())

    def redraw(self) -> None:
        """Show what the last moment brought, which the next picture would."""
        self._progress.refresh()

    def note(self, message: str) -> None:
        """A line above the bars."""
        self._progress.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
