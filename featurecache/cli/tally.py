"""What progress is told of, counted: how much of each task is done, since when, and that as a line."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass
class Running:
    """A task at work; `done` is what it did itself, `before` what was done when it began, times are monotonic."""

    name: str
    total: int | None
    unit: str
    before: int
    began: float
    last: float
    done: int = 0
    status: str = ""

    @property
    def seconds(self) -> float:
        """From the beginning to the latest advance."""
        return self.last - self.began

    @property
    def at_work(self) -> bool:
        """Whether it has begun in earnest, and is not complete."""
        return bool(self.done) and (self.total is None or self.before + self.done < self.total)

    def so_far(self) -> str:
        """How far it is: `a: 75/400 images, 2.5 images/s, 130 s left, 2 failed`."""
        rate, count = self.done / max(self.seconds, 1e-9), self.before + self.done
        left = "" if self.total is None or not rate else f", {max(self.total - count, 0) / rate:,.0f} s left"
        status = f", {self.status}" if self.status else ""
        return f"{self.name}: {count:,}/{self.total or '?'} {self.unit}, {rate:,.1f} {self.unit}/s{left}{status}"

    def in_all(self) -> str:
        """What became of it: `a: 625 images in 2.2 s, 284.1 images/s, 2 failed`."""
        what, rate = "nothing to do", self.done / max(self.seconds, 1e-9)
        if not self.done and self.total is not None and self.before < self.total:  # interrupted before its turn
            what = f"none of {self.total - self.before:,} {self.unit} done"
        elif self.done:
            what = f"{self.done:,} {self.unit} in {self.seconds:,.1f} s, {rate:,.1f} {self.unit}/s"
        return f"{self.name}: {what}" + (f", {self.status}" if self.status else "")


class Tally:
    """All tasks at work. One whose turn comes when another is complete begins at that moment."""

    def __init__(self) -> None:
        self.running: dict[str, Running] = {}
        self._completed = 0.0

    def begin(self, task: str, total: int | None, unit: str, done: int) -> None:
        """Remember when the task began."""
        now = time.monotonic()
        self.running[task] = Running(task, total, unit, done, now, now)

    def advance(self, task: str, n: int, status: str) -> None:
        """Count."""
        running, now = self.running[task], time.monotonic()
        if n and not running.done:
            running.began = max(running.began, self._completed)
        if n:
            running.last = now
        running.done += n
        if running.total is not None and running.before + running.done >= running.total:
            self._completed = now
        running.status = status or running.status

    def end(self, task: str) -> Running:
        """The task is over."""
        return self.running.pop(task)
