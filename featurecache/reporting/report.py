"""report.html: one self-contained page about a run, made from nothing but what lies in the run's directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray

from featurecache.predictions import Predictions, Threshold, read_predictions
from featurecache.reporting import plots
from featurecache.reporting.wording import (
    HEADLINE,
    RULES,
    chosen_on,
    how_measured,
    input_text,
    interval,
    metric_name,
    number,
    percent,
    sentence,
    split_name,
    tap_text,
)
from featurecache.rundir import read_record

SPLITS = ("test", "valid", "train")  # what counts comes first
TABLE_CLASSES = 12  # more make a table that no screen holds; they get a heat map
BESIDE = (
    "n",
    "n_groups",
    "events",
    "labels",
    "class_counts",
    "intervals",
)  # in metrics.json beside the metrics themselves

environment = Environment(
    loader=PackageLoader("featurecache", "reporting/templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
environment.filters.update(number=number, percent=percent, interval=interval)


def write_report(directory: str | Path, record: Mapping[str, Any] | None = None) -> Path:
    """Write report.html into a run directory, from its metrics.json, predictions.csv, history.csv and record.

    Args:
        directory: of the run, published or still being written.
        record: its run.json; read from the directory if not given.

    Returns:
        The page's path.
    """
    directory = Path(directory)
    record = read_record(directory) if record is None else record
    path = directory / "report.html"
    path.write_text(render(directory, record), encoding="utf-8")
    return path


def render(directory: Path, record: Mapping[str, Any]) -> str:
    """The page as HTML text; see `write_report`."""
    metrics = json.loads((directory / "metrics.json").read_text(encoding="utf-8"))
    predictions = read_predictions(directory, record)
    split = next((name for name in SPLITS if name in metrics), "")
    part = predictions.of(split)
    matrix = _confusion(part, record.get("threshold"))
    return environment.get_template("report.html.j2").render(
        record=record,
        title=directory.name.removesuffix(".tmp"),
        lead=sentence(record, metrics, split),
        split=split_name(record, split),
        measured=how_measured(record),
        cards=_cards(record, metrics.get(split, {})),
        columns=[(name, split_name(record, name)) for name in SPLITS if name in metrics],
        table=_metric_rows(metrics),
        bootstrap=metrics["bootstrap"],
        samples=_sample_rows(predictions, record),
        left_out=_left_out(predictions, record),
        figures=_figures(directory, part, split_name(record, split)),
        classes=_class_rows(part, matrix, predictions.of("train")),
        long_names=any(len(label) > 8 for label in part.classes),
        matrix=_matrix_rows(matrix, part.classes) if 0 < len(matrix) <= TABLE_CLASSES else None,
        heat=plots.confusion_plot(matrix, split_name(record, split)) if len(matrix) > TABLE_CLASSES else None,
        labels=_label_rows(metrics.get(split, {})),
        threshold=_thresholds(record),
        recipes=[_recipe(view, recipe) for view, recipe in record["recipes"].items()],
        details={
            name: json.dumps(record[name], indent=1, ensure_ascii=False)
            for name in ("head", "config", "recipes", "bodies", "split")
            if record.get(name)
        },
    )


def _cards(record: Mapping[str, Any], figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The few figures that a reader looks for first."""
    names = [name for name in HEADLINE.get(str(record["task"]), ()) if figures.get(name) is not None][:4]
    intervals = figures.get("intervals") or {}
    return [{"name": metric_name(name), "value": figures[name], "interval": intervals.get(name)} for name in names]


def _metric_rows(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per metric; its cells in the order of the columns, test first."""
    splits = [metrics[name] for name in SPLITS if name in metrics]
    names = dict.fromkeys(name for figures in splits for name in figures if name not in BESIDE)
    rows = []
    for name in names:
        cells = []
        for figures in splits:
            low, high = (figures.get("intervals") or {}).get(name) or (None, None)
            value = figures.get(name)
            inside = value is not None and low is not None and high is not None and low >= 0 and high <= 1
            cells.append({"value": value, "low": low, "high": high, "track": inside})
        if all(isinstance(cell["value"], int | float | None) for cell in cells):
            rows.append({"name": metric_name(name), "key": name, "cells": cells})
    return rows


def _sample_rows(predictions: Predictions, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per split: samples, groups, what the targets look like, and how complete each view is."""
    rows = []
    for split in SPLITS:
        part = predictions.of(split)
        if not (n := len(part.sample_ids)):
            continue
        had = [set(text.split("+")) for text in part.views]
        complete = [(view, sum(view in views for views in had) / n) for view in record["views"]]
        targets = _target_counts(part)
        groups = len(np.unique(part.groups))
        rows.append(
            {"split": split_name(record, split), "n": n, "groups": groups, "targets": targets, "views": complete}
        )
    return rows


def _left_out(predictions: Predictions, record: Mapping[str, Any]) -> list[str]:
    """What did not take part, in words."""
    failed = record.get("n_failed", len(record.get("failed") or ()))
    counts = (
        (int(record.get("n_dropped") or 0), "dropped for a missing view"),
        (int(failed or 0), "not readable"),
        (int((~predictions.known()).sum()), "without a known target"),
        (int(((predictions.splits == "") & predictions.known()).sum()), "in no split"),
    )
    return [f"{count:,} {why}" for count, why in counts if count]


def _target_counts(part: Predictions) -> str:
    n = len(part.sample_ids)
    if part.task == "binary":
        events = int((part.true == 1).sum())
        return f"{part.names[0]} = {part.classes[1]}: {events:,} ({percent(events / n)})"
    if part.task == "multiclass":
        counts = np.bincount(part.true, minlength=len(part.classes))
        return f"{len(counts)} classes, {counts.min():,} to {counts.max():,} samples each"
    if part.task == "multilabel":
        known = ~np.isnan(part.true)
        return f"{len(part.names)} labels, {int(np.nansum(part.true)):,} positive of {int(known.sum()):,} known"
    described = []
    for column, name in enumerate(part.names[:4]):
        mean, spread = np.nanmean(part.true[:, column]), np.nanstd(part.true[:, column])
        described.append(f"{name} {number(float(mean))} \N{PLUS-MINUS SIGN} {number(float(spread))}")
    return ", ".join(described)


def _figures(directory: Path, part: Predictions, split: str) -> list[plots.Plot]:
    """Every figure that the task and the data allow."""
    if part.task == "regression":
        made: list[plots.Plot | None] = [*plots.regression_plots(part, split)]
    else:
        made = [plot(part, split) for plot in (plots.roc_plot, plots.pr_plot, plots.calibration_plot)]
    history = directory / "history.csv"
    if history.is_file():
        table = pl.read_csv(history, infer_schema_length=None)
        if "fold" in table.columns:  # one curve after another, of different lengths
            table = table.clear()
        numeric = table.select(pl.selectors.numeric())
        made += plots.learning_plots({name: plots.series(numeric[name].to_list()) for name in numeric.columns})
    return [plot for plot in made if plot is not None]


def _confusion(part: Predictions, threshold: Mapping[str, Any] | None) -> NDArray[np.int64]:
    """(classes, classes) counts, rows are true classes; empty where the task has no classes."""
    size = len(part.classes)
    matrix = np.zeros((size, size), dtype=np.int64)
    if size and len(part.sample_ids):
        value: Threshold = threshold["value"] if threshold else None
        np.add.at(matrix, (part.true, part.decisions(value)), 1)
    return matrix


def _matrix_rows(matrix: NDArray[np.int64], classes: tuple[str, ...]) -> list[dict[str, Any]]:
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    return [
        {
            "label": label,
            "cells": [
                {"count": int(count), "share": float(share), "right": row == column, "predicted": classes[column]}
                for column, (count, share) in enumerate(zip(matrix[row], shares[row], strict=True))
            ],
        }
        for row, label in enumerate(classes)
    ]


def _class_rows(part: Predictions, matrix: NDArray[np.int64], train: Predictions) -> list[dict[str, Any]]:
    """Per class: samples, sensitivity, PPV and F1 at the decisions of the confusion matrix, and the usual mistake."""
    rows = []
    for index, label in enumerate(part.classes):
        n, named, right = int(matrix[index].sum()), int(matrix[:, index].sum()), int(matrix[index, index])
        wrong = matrix[index].copy()
        wrong[index] = 0
        rows.append(
            {
                "label": label,
                "n": n,
                "n_train": int((train.true == index).sum()),
                "sensitivity": right / n if n else None,
                "ppv": right / named if named else None,
                "f1": 2 * right / (n + named) if n + named else None,
                "mistake": f"{part.classes[int(wrong.argmax())]} ({int(wrong.max()):,})" if wrong.any() else "",
            }
        )
    return rows


def _label_rows(figures: Mapping[str, Any]) -> dict[str, Any] | None:
    """The per-label table of a multilabel (or several-target) run: names of the columns, then a row per label."""
    labels = figures.get("labels")
    if not labels:
        return None
    wanted = ("n", "events", "roc_auc", "average_precision", "sensitivity", "specificity", "brier", "r2", "rmse", "mae")
    present = [name for name in wanted if any(name in values for values in labels.values())]
    rows = [{"label": label, "cells": [values.get(name) for name in present]} for label, values in labels.items()]
    return {"columns": [metric_name(name) for name in present], "rows": rows}


def _thresholds(record: Mapping[str, Any]) -> dict[str, Any] | None:
    threshold = record.get("threshold")
    value = threshold["value"] if threshold else None
    if threshold is None or value is None:
        return None
    values = list(value.items()) if isinstance(value, Mapping) else [("", value)]
    return {
        "values": values,
        "rule": RULES.get(str(threshold.get("rule")), str(threshold.get("rule"))),
        "chosen_on": chosen_on(record),
    }


def _recipe(view: str, recipe: Mapping[str, Any]) -> dict[str, str]:
    """One view's recipe in the words of a person; the whole of it stands in the details."""
    fields: Mapping[str, Any] = recipe["recipe"]
    steps = fields["preprocessing"]
    return {
        "view": view,
        "body": str(fields["body"]["architecture"]),
        "tap": ", ".join(tap_text(tap) for tap in fields["taps"]),
        "input": input_text(steps, fields["reader"].get("parameters", {}).get("channels", 3)),
        "reader": str(fields["reader"]["name"]),
        "computed": " ".join(str(fields[n]) for n in ("engine", "precision", "storage_dtype") if fields.get(n)),
        "digest": str(recipe.get("digest", ""))[:16],
    }
