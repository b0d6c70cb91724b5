"""Small figures of each class against the rest, written as SVG directly: some twenty on a page cost no time."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from featurecache.reporting.drawn import Asked
from featurecache.reporting.plots import Plot, thin
from featurecache.rundir.predictions import Predictions

Points = tuple[NDArray[np.float64], NDArray[np.float64]]
LEFT, TOP, WIDE, HIGH = 46, 10, 260, 190  # of the axes within 320 x 240
MOST_POINTS = 120
UNIT = (0, 0.2, 0.4, 0.6, 0.8, 1)
DASHED = 'stroke="var(--ink-3)" stroke-width="1" stroke-dasharray="3 3"'


def class_panels(part: Predictions, split: str, asked: Asked) -> list[tuple[str, list[Plot]]]:
    """Of several classes each against the rest: its ROC and precision-recall curve with bands, its decision curve.

    Args:
        part: the samples of one split.
        split: its name.
        asked: by class the entry of curves.json.

    Returns:
        (class, figures) of each class that is asked for and has both answers.
    """
    found = []
    for label, positive, score in part.curves():
        if label in asked:
            about = asked[label]
            made = [_roc(positive, score, about), _pr(positive, score, about), _benefit(about)]
            text = f"{label} against the rest on {split} samples"
            found.append((label, [Plot(title, draw(f"{title}: {text}. {note}"), note) for title, draw, note in made]))
    return found


def _roc(positive: NDArray[np.bool_], score: NDArray[np.float64], about: Mapping[str, Any]) -> tuple[str, Any, str]:
    x, y, _ = roc_curve(positive, score)
    band, dot = _band(about["roc"], "fpr"), _dot(about, "fpr", "sensitivity")
    unit = np.array([0.0, 1.0])
    note = f"AUROC {roc_auc_score(positive, score):.3f}." + _said(band, dot)

    def draw(alt: str) -> str:
        return panel(alt, "1 - specificity", "sensitivity", line=(x, y), dashed=(unit, unit), band=band, dot=dot)

    return "ROC curve", draw, note


def _pr(positive: NDArray[np.bool_], score: NDArray[np.float64], about: Mapping[str, Any]) -> tuple[str, Any, str]:
    y, x, _ = precision_recall_curve(positive, score)
    few, of = thin(x, y, most=MOST_POINTS // 2)
    steps = np.repeat(few, 2)[1:], np.repeat(of, 2)[:-1]
    band, dot = _band(about["pr"], "recall"), _dot(about, "sensitivity", "ppv")
    share = float(positive.mean())
    note = f"Average precision {average_precision_score(positive, score):.3f}; dashed: guessing, {share:.3f}."

    def draw(alt: str) -> str:
        guessing = np.array([0.0, 1.0]), np.array([share, share])
        return panel(alt, "recall (sensitivity)", "precision (PPV)", line=steps, dashed=guessing, band=band, dot=dot)

    return "Precision-recall curve", draw, note + _said(band, dot)


def _benefit(about: Mapping[str, Any]) -> tuple[str, Any, str]:
    share = float(about["events"]) / float(about["n"])
    right = min(1.0, max(0.2, 3 * share))
    x, model, every = (np.array(about["benefit"][name], dtype=float) for name in ("threshold", "model", "all"))
    kept = x <= right
    band = _band(about["benefit"], "threshold", kept)

    def draw(alt: str) -> str:
        return panel(
            alt, "threshold probability", "net benefit", line=(x[kept], model[kept]), dashed=(x[kept], every[kept]),
            band=band, box=(right, -0.25 * share, 1.15 * share), ticks=([0, right / 2, right], [0, share]),
        )  # fmt: skip

    return "Decision curve", draw, f"Dashed: treating everybody; 0: nobody.{_said(band, None)}"


def _band(about: Mapping[str, Any], over: str, kept: NDArray[np.bool_] | None = None) -> Points | None:
    """The outline of a band: along its lower end and back along the upper; None where there is none."""
    if "low" not in about:
        return None
    x, low, high = (np.array(about[name], dtype=float) for name in (over, "low", "high"))
    if kept is not None:
        x, low, high = x[kept], low[kept], high[kept]
    return np.append(x, x[::-1]), np.append(low, high[::-1])


def _dot(about: Mapping[str, Any], x: str, y: str) -> tuple[float, float] | None:
    decided = about.get("decided") or {}
    return None if decided.get(x) is None or decided.get(y) is None else (float(decided[x]), float(decided[y]))


def _said(band: object, dot: object) -> str:
    return " Shaded: 95 % band." * (band is not None) + " The dot: where the model decides." * (dot is not None)


def panel(
    alt: str,
    x_label: str,
    y_label: str,
    *,
    line: Points,
    dashed: Points,
    band: Points | None,
    dot: tuple[float, float] | None = None,
    box: tuple[float, float, float] = (1.0, 0.0, 1.0),
    ticks: tuple[Sequence[float], Sequence[float]] = (UNIT, UNIT),
) -> str:
    """One pair of axes as an `<svg>` element in the colours of the page.

    Args:
        alt: what it shows, for those who don't see it.
        x_label: below the axes.
        y_label: beside them.
        line: the curve.
        dashed: what it is compared with.
        band: the outline of what is shaded.
        dot: a point to mark.
        box: the end of the x axis, which begins at 0, and both ends of the y axis; what lies outside is drawn there.
        ticks: of both axes.
    """
    right, low, high = box

    def place(x: Any, y: Any) -> Points:
        down = (high - np.clip(np.asarray(y, float), low, high)) / (high - low)
        return LEFT + WIDE * np.clip(np.asarray(x, float), 0, right) / right, TOP + HIGH * down

    def path(points: Iterable[Any]) -> str:
        return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in zip(*place(*points), strict=True))

    rows = []
    for value in ticks[0]:
        x, _ = place(value, low)
        rows.append(f'<path d="M{x:.1f} {TOP}V{TOP + HIGH}" stroke="var(--line)"/>')
        rows.append(f'<text x="{x:.1f}" y="{TOP + HIGH + 14}" text-anchor="middle">{value:.2g}</text>')
    for value in ticks[1]:
        _, y = place(0, value)
        rows.append(f'<path d="M{LEFT} {y:.1f}H{LEFT + WIDE}" stroke="var(--line)"/>')
        rows.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.2g}</text>')
    middle = TOP + HIGH / 2
    rows.append(f'<text x="{LEFT + WIDE / 2}" y="{TOP + HIGH + 32}" text-anchor="middle">{x_label}</text>')
    rows.append(f'<text transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">{y_label}</text>')
    if band is not None:
        rows.append(f'<path d="{path(band)}Z" fill="var(--s1)" fill-opacity=".15"/>')
    rows.append(f'<path d="{path(thin(*dashed, most=MOST_POINTS))}" fill="none" {DASHED}/>')
    curve = path(thin(*line, most=MOST_POINTS))
    rows.append(f'<path d="{curve}" fill="none" stroke="var(--s1)" stroke-width="1.8"/>')
    if dot is not None:
        x, y = place(*dot)
        rows.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="var(--s1)"/>')
    head = f'<svg viewBox="0 0 320 240" role="img" aria-label="{html.escape(alt)}" font-size="11" fill="var(--ink-2)">'
    return head + "".join(rows) + "</svg>"
