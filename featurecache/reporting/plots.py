"""Figures of a report as inline SVG: drawn without pyplot, the same bytes every time, coloured by the page."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import matplotlib as mpl
import matplotlib.patches
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from featurecache.rundir.predictions import Predictions

# Drawn in these, then replaced by CSS variables of the page, so that one figure serves light, dark and paper.
INK, GRID, FAINT = "#010203", "#010204", "#010205"
SERIES = tuple(f"#0102{number:02x}" for number in range(0x10, 0x18))
_VARIABLES = {INK: "var(--ink-2)", GRID: "var(--line)", FAINT: "var(--ink-3)"} | {
    color: f"var(--s{number})" for number, color in enumerate(SERIES, start=1)
}
_RC: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "featurecache", "text.parse_math": False, "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"], "font.size": 10.5, "axes.edgecolor": GRID, "axes.labelcolor": INK,
    "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.6, "xtick.color": GRID, "ytick.color": GRID,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.linewidth": 0.8, "axes.axisbelow": True, "lines.linewidth": 1.8, "path.simplify": True,
    "axes.unicode_minus": True, "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
}  # fmt: skip
MOST_POINTS = 1000  # of a scatter plot; more make the page heavy and show no more
MOST_CURVES = len(SERIES)
MOST_TARGETS = 6  # of a regression


@dataclass(frozen=True)
class Entry:
    """A line of a legend: colour number from 1 (0: faint), whether dashed, label, its figure as text."""

    series: int
    label: str
    value: str = ""
    dashed: bool = False


@dataclass(frozen=True)
class Plot:
    """A figure for the page; `svg` is safe to insert as it is, everything else is plain text."""

    title: str
    svg: str
    note: str = ""
    legend: tuple[Entry, ...] = field(default=())


@contextmanager
def style() -> Iterator[None]:
    """Draw in the style of the page, without the warnings that its fonts don't need."""
    with warnings.catch_warnings(), mpl.rc_context(_RC):
        # Class names may be in any script: the browser draws them, matplotlib only lacks their widths.
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*")
        yield


def new_axes(width: float = 4.6, height: float = 3.7) -> tuple[Figure, Axes]:
    """A figure with one pair of axes, sized in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def to_svg(figure: Figure, alt: str, name: str) -> str:
    """The figure as an `<svg>` element.

    Args:
        figure: drawn in the colours of this module.
        alt: what it shows, for those who don't see it.
        name: makes the ids unique in a page.
    """
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, variable)
    text = re.sub(r"(font: [^;\"]*?)'DejaVu Sans'(, sans-serif)?", r"\1var(--font)", text)
    text = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    width, height = figure.get_size_inches() * 72
    head = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{html.escape(alt)}"'
    return re.sub(r"^<svg[^>]*>", f'{head} xmlns:xlink="http://www.w3.org/1999/xlink">', text).strip()


def thin(*arrays: NDArray[Any], most: int = 300) -> tuple[NDArray[Any], ...]:
    """Evenly chosen points of a curve, first and last among them."""
    n = len(arrays[0])
    keep = np.arange(n) if n <= most else np.unique(np.linspace(0, n - 1, most).round().astype(int))
    return tuple(array[keep] for array in arrays)


def line(axes: Axes, x: NDArray[Any], y: NDArray[Any], number: int, **style: Any) -> None:
    """A curve in the colour of a series, dashed from the fifth on."""
    dashes: Any = "-" if number < 4 else (0, (4, 1.5))
    axes.plot(x, y, color=SERIES[number], linestyle=dashes, **style)


def unit_square(axes: Axes, x: str, y: str) -> None:
    """Axes of two shares between 0 and 1."""
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.02), xlabel=x, ylabel=y)
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.set_yticks(np.linspace(0, 1, 6))


def learning_plots(columns: dict[str, NDArray[np.float64]], kept: int | None = None) -> list[Plot]:
    """Learning curves: losses in one figure, other figures between 0 and 1 in a second.

    Args:
        columns: numeric columns of history.csv; the x axis is `epoch`, `round` or `iteration`, else the row number.
        kept: where on that axis the weights come from that were kept; marked, where it is known.
    """
    axis = next((name for name in ("epoch", "round", "iteration", "step") if name in columns), "")
    n = max((len(values) for values in columns.values()), default=0)
    if n < 2:
        return []
    x = columns[axis] if axis else np.arange(1.0, n + 1)
    place = np.flatnonzero(x == kept) if axis and kept is not None else np.empty(0, np.int64)
    note = f"The dashed line: {axis} {kept}, which was kept." if len(place) else ""
    names = [name for name in columns if name != axis and np.isfinite(columns[name]).sum() > 1]
    losses = [name for name in names if re.search(r"loss|error|rmse|deviance|mae", name)]
    rest = [name for name in names if name not in losses and not re.search(r"lr|time|seconds|rate$|phase|norm", name)]
    bounded = [name for name in rest if np.nanmin(columns[name]) >= -1 and np.nanmax(columns[name]) <= 1]
    plots: list[Plot] = []
    with style():
        for title, chosen in (("Learning curve", losses[:8]), ("Validation while training", bounded[:8])):
            if not chosen:
                continue
            figure, axes = new_axes()
            legend = []
            for number, name in enumerate(chosen):
                line(axes, x, columns[name], number, marker="o" if n < 12 else "", markersize=3)
                known, there = columns[name][np.isfinite(columns[name])], columns[name][place]
                said = f"{there[0]:.3g} kept" if np.isfinite(there).any() else f"{known[-1]:.3g} at the end"
                legend.append(Entry(number + 1, name.replace("_", " "), said, dashed=number >= 4))
            if len(place):
                axes.axvline(float(x[place[0]]), color=FAINT, linewidth=0.8, linestyle=(0, (2, 2)))
            axes.set(xlabel=axis or "row", ylabel="loss" if title == "Learning curve" else "")
            axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(nbins=8, integer=True))
            alt = f"{title} over {n} rows of the history: " + ", ".join(f"{e.label} {e.value}" for e in legend)
            plots.append(Plot(title, to_svg(figure, alt, "learning" + str(len(plots))), note, tuple(legend)))
    return plots


def confusion_plot(matrix: NDArray[np.int64], split: str) -> Plot:
    """Heat map of a confusion matrix with too many classes for a table: a row per true class, its shares as colour."""
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    n = len(matrix)
    with style():
        figure, axes = new_axes(4.6, 4.2)
        for row, column in zip(*np.nonzero(share), strict=True):
            box = ((column + 0.5, row + 0.5), 1, 1)  # classes are counted from one
            axes.add_patch(mpl.patches.Rectangle(*box, color=SERIES[0], alpha=float(share[row, column]), linewidth=0))
        axes.set(xlim=(0.5, n + 0.5), ylim=(n + 0.5, 0.5), xlabel="predicted class", ylabel="true class", aspect=1)
        axes.grid(visible=False)
        right = np.trace(matrix) / max(int(matrix.sum()), 1)
        alt = f"Confusion matrix of {n} classes on {split} samples; {right:.1%} on the diagonal"
        svg = to_svg(figure, alt, "confusion")
    return Plot("Confusion matrix", svg, "Shares of each true class, in the order of the table.")


def regression_plots(predictions: Predictions, split: str) -> list[Plot]:
    """For each target (the first six): predicted against true values, and residuals against predictions."""
    plots = []
    for column, name in enumerate(predictions.names[:MOST_TARGETS]):
        true, value = predictions.true[:, column], predictions.scores[:, column]
        known = np.flatnonzero(np.isfinite(true) & np.isfinite(value))
        if not len(known):
            continue
        note = ""
        if len(known) > MOST_POINTS:
            note = f"{MOST_POINTS:,} of {len(known):,} samples, drawn at random."
            known = np.sort(np.random.default_rng(0).choice(known, MOST_POINTS, replace=False))
        true, value = true[known], value[known]
        dots: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 3, "markeredgewidth": 0, "alpha": 0.6}
        with style():
            figure, axes = new_axes()
            ends = [float(min(true.min(), value.min())), float(max(true.max(), value.max()))]
            axes.plot(ends, ends, color=FAINT, linewidth=0.8, linestyle=(0, (2, 2)))
            axes.plot(true, value, color=SERIES[0], **dots)
            axes.set(xlabel=f"true {name}", ylabel=f"predicted {name}")
            alt = f"Predicted against true {name} for {len(true)} {split} samples"
            plots.append(Plot(f"Predicted and true: {name}", to_svg(figure, alt, f"scatter{column}"), note))
            figure, axes = new_axes()
            axes.axhline(0, color=FAINT, linewidth=0.8, linestyle=(0, (2, 2)))
            axes.plot(value, value - true, color=SERIES[1], **dots)
            axes.set(xlabel=f"predicted {name}", ylabel="predicted \N{MINUS SIGN} true")
            spread = float(np.std(value - true))
            alt = f"Residuals of {name} for {len(true)} {split} samples, standard deviation {spread:.3g}"
            note = f"Standard deviation {spread:.3g}. {note}".strip()
            plots.append(Plot(f"Residuals: {name}", to_svg(figure, alt, f"residuals{column}"), note))
    return plots


def series(values: Sequence[Any]) -> NDArray[np.float64]:
    """A column of history.csv as float64; what is no number becomes NaN."""
    return np.array([float(v) if isinstance(v, int | float) else float("nan") for v in values], dtype=np.float64)
