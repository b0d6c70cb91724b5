"""Figures that are drawn from a run's predictions and curves.json: ROC, calibration, net benefit, trials."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import matplotlib as mpl
import matplotlib.ticker
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from featurecache.reporting.plots import (
    FAINT,
    GRID,
    MOST_CURVES,
    SERIES,
    Entry,
    Plot,
    line,
    new_axes,
    style,
    thin,
    to_svg,
    unit_square,
)
from featurecache.reporting.wording import metric_name
from featurecache.rundir.predictions import Predictions

Asked = Mapping[str, Mapping[str, Any]]
"""By label the entries of curves.json."""

MOST_BANDS = 2  # more lie on each other
MOST_BENEFITS = 3
WHOSE = {
    "multiclass": "Probability of the predicted class against how often it is right.",
    "multilabel": "All labels together.",
}
"""By task: which probabilities a reliability diagram shows; of a binary one it needs no saying."""


def roc_plot(part: Predictions, split: str, asked: Asked) -> Plot | None:
    """ROC curves of one split (`part` holds its samples alone); None where no question has both answers."""
    with style():
        return _curve_plot(part, split, asked, roc=True)


def pr_plot(part: Predictions, split: str, asked: Asked) -> Plot | None:
    """Precision-recall curves of one split; None where no question has both answers."""
    with style():
        return _curve_plot(part, split, asked, roc=False)


class _Curve(NamedTuple):
    """One curve: its points, the area under it, and the share of positive samples."""

    label: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    value: float
    share: float


def _curves(part: Predictions, *, roc: bool) -> list[_Curve]:
    found = []
    for label, positive, score in part.curves():
        if roc:
            x, y, _ = roc_curve(positive, score)
            value = float(roc_auc_score(positive, score))
        else:
            y, x, _ = precision_recall_curve(positive, score)
            value = float(average_precision_score(positive, score))
        found.append(_Curve(label, x, y, value, float(positive.mean())))
    return found


def _curve_plot(part: Predictions, split: str, asked: Asked, *, roc: bool) -> Plot | None:
    curves = _curves(part, roc=roc)
    if not curves:
        return None
    name, short = ("ROC curve", "AUROC") if roc else ("Precision-recall curve", "AP")
    shown = curves
    if len(curves) > MOST_CURVES:  # the best and worst four carry colour and name, the others stay visible as context
        order = sorted(curves, key=lambda curve: -curve.value)
        shown = order[: MOST_CURVES // 2] + order[-(MOST_CURVES // 2) :]
    named = {curve.label for curve in shown}
    others = [curve for curve in curves if curve.label not in named]
    few = len(shown) <= MOST_BANDS
    legend, notes = [], ["Each class against the rest."] if len(part.classes) > 2 else []
    figure, axes = new_axes()
    way, axes_of = ("default", ("fpr", "sensitivity")) if roc else ("steps-post", ("sensitivity", "ppv"))
    if roc:
        axes.plot([0, 1], [0, 1], color=FAINT, linewidth=0.8, linestyle=(0, (2, 2)))
    elif len(curves) == 1:
        axes.axhline(curves[0].share, color=FAINT, linewidth=0.8, linestyle=(0, (2, 2)))
        legend.append(Entry(0, "guessing (prevalence)", f"{curves[0].share:.3f}", dashed=True))
    for curve in others:
        axes.plot(*thin(curve.x, curve.y, most=80), color=GRID, linewidth=0.7, drawstyle=way)
    marked = False
    for number, curve in enumerate(shown):
        about = asked.get(curve.label, {}) if few else {}
        _band(axes, about.get("roc" if roc else "pr", {}), "fpr" if roc else "recall", number)
        marked |= _dot(axes, about.get("decided") or {}, axes_of, number)
        label = f"{part.names[0]} = {curve.label}" if part.task == "binary" else curve.label
        x, y = thin(curve.x, curve.y)
        line(axes, x, y, number, drawstyle=way)
        legend.insert(number, Entry(number + 1, label, f"{short} {curve.value:.3f}", dashed=number >= 4))
    unit_square(axes, *(("1 - specificity", "sensitivity") if roc else ("recall (sensitivity)", "precision (PPV)")))
    alt = f"{name} on {split} samples: " + ", ".join(f"{entry.label} {entry.value}" for entry in legend[:8])
    if others:
        notes.append(f"The four best and the four worst of {len(curves)}; the others in grey.")
    if few and any("low" in asked.get(curve.label, {}).get("roc", {}) for curve in shown):
        notes.append("Shaded: 95 % band.")
    if marked:
        notes.append("The dot: where the model decides.")
    return Plot(name, to_svg(figure, alt, "roc" if roc else "pr"), " ".join(notes), tuple(legend))


def _dot(axes: Axes, decided: Mapping[str, Any], axes_of: tuple[str, str], number: int) -> bool:
    """Mark where the decisions lie; False where that is not known."""
    place = [decided[name] for name in axes_of if decided.get(name) is not None]
    if len(place) < 2:
        return False
    axes.plot(*map(float, place), color=SERIES[number], marker="o", markersize=7, markeredgewidth=0, zorder=4)
    return True


def _band(axes: Axes, about: Mapping[str, Any], over: str, number: int) -> None:
    if "low" in about:
        x, low, high = (np.array(about[name], dtype=float) for name in (over, "low", "high"))
        axes.fill_between(x, low, high, color=SERIES[number], alpha=0.15, linewidth=0)


def calibration_plot(found: Mapping[str, Any], task: str, split: str) -> Plot:
    """Reliability diagram over a histogram of the probabilities; `found` is the `reliability` of curves.json."""
    count = np.array(found["count"])
    used, bins = np.flatnonzero(count), len(count)
    mean, rate = (np.array(found[name], dtype=float)[used] for name in ("probability", "frequency"))
    error = float(found["gap"])
    with style():
        figure = Figure(figsize=(4.6, 3.7), layout="constrained")
        grid = figure.add_gridspec(2, 1, height_ratios=(3.4, 1))
        axes, below = figure.add_subplot(grid[0]), figure.add_subplot(grid[1])
        axes.plot([0, 1], [0, 1], color=FAINT, linewidth=0.8, linestyle=(0, (2, 2)))
        axes.plot(mean, rate, color=SERIES[0], linewidth=1, alpha=0.6)
        axes.scatter(mean, rate, s=10 + 70 * count[used] / count.max(), color=SERIES[0], linewidths=0, zorder=3)
        unit_square(axes, "", "predicted class correct" if task == "multiclass" else "observed frequency")
        axes.tick_params(labelbottom=False)
        below.bar((np.arange(bins) + 0.5) / bins, count, width=0.92 / bins, color=SERIES[0], alpha=0.55)
        below.set(xlim=(-0.01, 1.01), xlabel="predicted probability", ylabel="samples")
        below.set_xticks(np.linspace(0, 1, 6))
        below.locator_params(axis="y", nbins=2)
        alt = f"Reliability diagram on {split} samples: mean gap between probability and frequency {error:.3f}"
        svg = to_svg(figure, alt, "calibration")
    note = f"{WHOSE.get(task, '')} Mean gap over {bins} equal bins {error:.3f}; below, how many samples."
    return Plot("Calibration", svg, note.strip())


def benefit_plot(asked: Asked, split: str) -> Plot | None:
    """Decision curve: net benefit of deciding by the model, against treating all and treating none."""
    entries = list(asked.items())
    if not entries or len(entries) > MOST_BENEFITS:
        return None
    share = max(float(about["events"]) / float(about["n"]) for _, about in entries)
    right = min(1.0, max(0.2, 3 * share))
    legend = []
    with style():
        figure, axes = new_axes()
        axes.axhline(0, color=FAINT, linewidth=0.8)
        for number, (label, about) in enumerate(entries):
            x, model, every = (np.array(about["benefit"][name], dtype=float) for name in ("threshold", "model", "all"))
            kept = x <= right
            if len(entries) <= MOST_BANDS and "low" in about["benefit"]:
                low, high = (np.array(about["benefit"][name], dtype=float) for name in ("low", "high"))
                axes.fill_between(x[kept], low[kept], high[kept], color=SERIES[number], alpha=0.15, linewidth=0)
            axes.plot(x[kept], every[kept], color=FAINT, linewidth=1, linestyle=(0, (2, 2)))
            line(axes, x[kept], model[kept], number)
            legend.append(Entry(number + 1, "the model" if len(entries) == 1 else label))
        legend += [Entry(0, "treat everybody", dashed=True), Entry(0, "treat nobody: 0")]
        axes.set(
            xlim=(0, right), ylim=(-0.25 * share, 1.15 * share), xlabel="threshold probability", ylabel="net benefit"
        )
        best = [label for label, about in entries if _worth(about)]
        alt = f"Decision curve on {split} samples: net benefit of the model" + (
            " is above treating all and none over part of the thresholds" if best else " is not above both others"
        )
        svg = to_svg(figure, alt, "benefit")
    note = (
        "True positives per sample, less false ones weighted by what they cost at that threshold. "
        "Where the coloured line is highest, acting on the model does most good."
    )
    return Plot("Decision curve", svg, note, tuple(legend))


def _worth(about: Mapping[str, Any]) -> bool:
    model, every = (np.array(about["benefit"][name], dtype=float) for name in ("model", "all"))
    return bool((model > np.maximum(every, 0)).any())


def trials_plot(trials: pl.DataFrame, metric: str) -> Plot:
    """Validation figure of each trial, and the best so far."""
    value = f"valid_{metric}"
    final = trials.filter(pl.col("division") == "final") if "division" in trials.columns else trials
    done = final.drop_nulls(value).sort("trial")
    x, y = done["trial"].to_numpy() + 1, done[value].to_numpy().astype(float)
    low = metric in ("log_loss", "brier", "ece", "rmse", "mae")
    best = np.minimum.accumulate(y) if low else np.maximum.accumulate(y)
    shown = metric_name(metric)
    with style():
        figure, axes = new_axes()
        axes.plot(x, y, color=SERIES[0], linestyle="", marker="o", markersize=4, markeredgewidth=0, alpha=0.6)
        axes.plot(x, best, color=SERIES[1], drawstyle="steps-post")
        axes.set(xlabel="trial", ylabel=f"{shown} on validation")
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(nbins=8, integer=True))
        end = f"{best[-1]:.3f}" if len(best) else ""
        alt = f"{len(y)} trials of settings by {shown} on validation, the best {end or 'undefined'}"
        svg = to_svg(figure, alt, "trials")
    return Plot("Search of settings", svg, "", (Entry(1, "a trial"), Entry(2, "best so far", end)))
