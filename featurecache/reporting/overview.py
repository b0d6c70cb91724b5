"""A page that sets several runs beside each other: what each reaches, and whether joining views helps."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from featurecache.reporting.report import environment


@dataclass(frozen=True)
class Row:
    """One run: its value of the metric with a 95 % interval, and the paired difference to the reference."""

    title: str
    run: str
    n: int
    value: float
    low: float
    high: float
    difference: tuple[float, float, float] | None
    reference: bool = False

    def words(self) -> str:
        """What the difference shows, in words."""
        if self.reference:
            return "the reference"
        if self.difference is None:
            return ""
        _, low, high = self.difference
        return "better" if low > 0 else "worse" if high < 0 else "no gain shown"

    def verdict(self) -> str:
        """`+0.031 [+0.004, +0.060] better`."""
        if self.difference is None:
            return self.words()
        value, low, high = self.difference
        return f"{value:+.3f} [{low:+.3f}, {high:+.3f}] {self.words()}"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "words": self.words()}


@dataclass(frozen=True)
class Sample:
    """One sample to look at: (view, image as data URI) of every view that it has."""

    name: str
    target: str
    images: tuple[tuple[str, str], ...]


def png_uri(path: Path) -> str:
    """A PNG file as a data URI."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def write_overview(
    path: Path,
    *,
    title: str,
    lead: str,
    rows: Sequence[Row],
    samples: Sequence[Sample] = (),
    footer: str = "",
    metric: str = "accuracy",
    reference: str = "the view that is better alone on the validation samples",
    lists: Sequence[tuple[str, Sequence[str]]] = (),
) -> Path:
    """Write the page; links to the runs' own reports are relative to it.

    Args:
        path: of the page.
        title: of what was done.
        lead: of what, in a sentence or two.
        rows: one a run; none leaves the table out.
        samples: to look at.
        footer: credits.
        metric: of the values.
        reference: what differences are to, in words.
        lists: (heading, lines) of what else there is to say.
    """
    template = environment.get_template("overview.html.j2")
    path.write_text(
        template.render(
            title=title,
            lead=lead,
            rows=rows,
            samples=samples,
            footer=footer,
            metric=metric,
            reference=reference,
            lists=lists,
        ),
        encoding="utf-8",
    )
    return path
