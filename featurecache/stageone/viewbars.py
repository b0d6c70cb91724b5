"""Stage one's progress, a task a view: how many of its images are done, reused and failed."""

from __future__ import annotations

from collections.abc import Collection, Container, Sequence

import numpy as np
from numpy.typing import NDArray

from featurecache.progress import Reporter
from featurecache.stageone.jobs import Job
from featurecache.stageone.keys import Cells
from featurecache.stageone.producer import Item


class ViewBars:
    """A task for each view of a job; views that share a recipe are one job, yet a person asks of each.

    Attributes:
        reused: per view, cells whose row was there.
        failed: per view, cells that have none and will have none.
    """

    def __init__(self, job: Job, reporter: Reporter) -> None:
        self.job, self.reporter = job, reporter
        self.titles = [job.title.replace("+".join(job.views), view, 1) for view in job.views]
        self._views = np.zeros(job.cells.table.height, np.uint16)  # of each cell of the manifest
        if len(job.views) > 1:
            table = job.cells.table["view"]
            for number, view in enumerate(job.views):
                self._views[(table == view).to_numpy()] = number
        self.reused, self.failed = np.zeros((2, len(job.views)), np.int64)

    def count(self, cells: Cells | Collection[int]) -> NDArray[np.int64]:
        """Cells, or their indices, per view."""
        at = cells.indices if isinstance(cells, Cells) else np.fromiter(cells, np.int64, len(cells))
        return np.bincount(self._views[at], minlength=len(self.titles)).astype(np.int64)

    def begin(self) -> None:
        """Show what there is; what is known already counts as done."""
        images, left = self.count(self.job.cells), self.count(self.job.todo)
        self.failed = self.count(self.job.failures)
        self.reused = images - left - self.failed
        for number, title in enumerate(self.titles):
            self.reporter.begin(title, int(images[number]), done=int(images[number] - left[number]))
            self.reporter.advance(title, 0, status=self.status(number))

    def settle(self, items: Sequence[Item], failed: Container[bytes | None]) -> None:
        """These cells are done: computed, or known by their content, or failed; so has any content among `failed`."""
        moved = np.zeros_like(self.failed)
        for item in items:
            view = self._views[item.cell.index]
            moved[view] += 1
            if item.failure is not None or item.key in failed:
                self.failed[view] += 1
            elif item.image is None:
                self.reused[view] += 1
        for number in np.flatnonzero(moved).tolist():
            self.reporter.advance(self.titles[number], int(moved[number]), status=self.status(number))

    def status(self, number: int) -> str:
        """`2 failed, 600 reused`, as far as there are any."""
        counts = {"failed": self.failed[number], "reused": self.reused[number]}
        return ", ".join(f"{count:,} {word}" for word, count in counts.items() if count)

    def end(self) -> None:
        """The job is over; what the store refused came to light late."""
        self.failed = self.count(self.job.failures)
        for number, title in enumerate(self.titles):
            self.reporter.advance(title, 0, status=self.status(number))
            self.reporter.end(title)
