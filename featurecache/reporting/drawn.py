"""Figures that are drawn from a run's predictions and curves.json: ROC, precision-recall, net benefit, trials."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import matplotlib.ticker
import numpy as np
import polars as pl
from matplotlib.axes import Axes
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


def roc_plot(part: Predictions, split: str, asked: Asked) -> Plot | None:
    """ROC curves of one split (`part` holds its samples alone); None where no question has both answers."""
    with style():
        return _curve_plot(part, split, asked, roc=True)


def pr_plot(part: Predictions, split: str, asked: Asked) -> Plot | None:
    """Precision-recall curves of one split; None where no question has both answers."""
    with style():
        return _curve_plot(part, split, asked, roc=False)


def _curve_plot(part: Predictions, split: str, asked: Asked, *, roc: bool) -> Plot | None:
    curves = []
    for label, positive, score in part.curves():
        if roc:
            x, y, _ = roc_curve(positive, score)
            value = float(roc_auc_score(positive, score))
        else:
            y, x, _ = precision_recall_curve(positive, score)
            value = float(average_precision_score(positive, score))
        curves.append((label, x, y, value, float(positive.mean())))
    if not curves:
        return None
    name, short = ("ROC curve", "AUROC") if roc else ("Precision-recall curve", "AP")
    crowded = len(curves) > MOST_CURVES
    if crowded:  # the best and worst four carry colour and name, the others stay visible as context
        order = sorted(range(len(curves)), key=lambda index: -curves[index][3])
        shown = order[: MOST_CURVES // 2] + order[-(MOST_CURVES // 2) :]
    else:
        shown = list(range(len(curves)))
    legend, notes = [], ["Each class against the rest."] if len(part.classes) > 2 else []
    figure, axes = new_axes()
    way = "steps-post" if not roc else "default"
    if roc:
        axes.plot([0, 1], [0, 1], color=FAINT, linewidth=0.8, linestyle=(0, (2, 2)))
    elif len(curves) == 1:
        axes.axhline(curves[0][4], color=FAINT, linewidth=0.8, linestyle=(0, (2, 2)))
        legend.append(Entry(0, "guessing (prevalence)", f"{curves[0][4]:.3f}", dashed=True))
    for index, (_, x, y, *_) in enumerate(curves):
        if index not in shown:
            x, y = thin(x, y, most=80)
            axes.plot(x, y, color=GRID, linewidth=0.7, drawstyle=way)
    marked = False
    for number, index in enumerate(shown):
        label, x, y, value, _ = curves[index]
        about = asked.get(label, {}) if len(shown) <= MOST_BANDS else {}
        _band(axes, about.get("roc" if roc else "pr", {}), "fpr" if roc else "recall", number)
        decided = about.get("decided") or {}
        across, up = ("fpr", "sensitivity") if roc else ("sensitivity", "ppv")
        if decided.get(across) is not None and decided.get(up) is not None:
            marked = True
            axes.plot(
                float(decided[across]),
                float(decided[up]),
                color=SERIES[number],
                marker="o",
                markersize=7,
                markeredgewidth=0,
                zorder=4,
            )
        label = f"{part.names[0]} = {label}" if part.task == "binary" else label
        x, y = thin(x, y)
        line(axes, x, y, number, drawstyle=way)
        legend.insert(number, Entry(number + 1, label, f"{short} {value:.3f}", dashed=number >= 4))
    unit_square(axes, *(("1 - specificity", "sensitivity") if roc else ("recall (sensitivity)", "precision (PPV)")))
    alt = f"{name} on {split} samples: " + ", ".join(f"{entry.label} {entry.value}" for entry in legend[:8])
    if crowded:
        notes.append(f"The four best and the four worst of {len(curves)}; the others in grey.")
    if any("low" in asked.get(curves[index][0], {}).get("roc", {}) for index in shown) and len(shown) <= MOST_BANDS:
        notes.append("Shaded: 95 % band.")
    if marked:
        notes.append("The dot: where the model decides.")
    return Plot(name, to_svg(figure, alt, "roc" if roc else "pr"), " ".join(notes), tuple(legend))


def _band(axes: Axes, about: Mapping[str, Any], over: str, number: int) -> None:
    if "low" in about:
        x, low, high = (np.array(about[name], dtype=float) for name in (over, "low", "high"))
        axes.fill_between(x, low, high, color=SERIES[number], alpha=0.15, linewidth=0)


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
