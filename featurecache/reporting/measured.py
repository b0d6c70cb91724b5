"""Sections of a report on how good the model is: metrics, classes, labels, curves, subgroups."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from featurecache.reporting import drawn, plots
from featurecache.reporting.material import SPLITS, Material
from featurecache.reporting.panels import class_panels
from featurecache.reporting.wording import HEADLINE, RULES, chosen_on, metric_name, number, percent, split_name
from featurecache.rundir.predictions import Predictions

TABLE_CLASSES = 12  # more make a table that no screen holds; they get a heat map
BESIDE = ("n", "n_groups", "events", "labels", "classes", "class_counts", "intervals", "small")
FIRST = (
    "roc_auc", "average_precision", "sensitivity_at_90_specificity", "sensitivity", "specificity", "ppv", "npv", "f1",
    "accuracy", "balanced_accuracy", "f1_macro", "mcc", "brier", "log_loss", "ece",
)  # fmt: skip


def metrics(material: Material) -> dict[str, Any] | None:
    """The main table: a row per metric, test first, each with its interval; the decision threshold."""
    splits = [name for name in SPLITS if name in material.metrics]
    columns = [
        (name, material.split_name if material.evaluation is not None else split_name(material.record, name))
        for name in splits
    ]
    rows = _metric_rows([material.metrics[name] for name in splits])
    return {
        "columns": columns,
        "rows": rows,
        "bootstrap": material.metrics["bootstrap"],
        "threshold": threshold(material.record),
        "notes": _how_to_read(material, rows),
    }


def _how_to_read(material: Material, rows: list[dict[str, Any]]) -> list[str]:
    """Sentences on what the figures of the main table are."""
    figures, task, found = material.figures, material.record["task"], []
    labels = figures.get("labels") or {}
    if labels and task in ("multilabel", "regression"):
        what = "labels" if task == "multilabel" else "targets"
        found.append(f"Figures are means over the {what} for which they are defined.")
    guessed = "Average precision is {} for a model that guesses: the {}."
    if task == "binary" and figures.get("n"):
        found.append(guessed.format(number(figures["events"] / figures["n"]), "prevalence"))
    elif task == "multiclass" and figures.get("average_precision") is not None:
        share = 1 / len(np.unique(material.part.true))  # the mean over the classes that are there of their shares
        found.append(guessed.format(number(share), "mean prevalence of the classes"))
    elif task == "multilabel":
        shares = [
            label["events"] / label["n"] for label in labels.values() if label.get("average_precision") is not None
        ]
        if shares:
            found.append(guessed.format(number(float(np.mean(shares))), "mean prevalence of these labels"))
    keys = {row["key"]: row["cells"] for row in rows}
    if "sensitivity_at_90_specificity" in keys:
        found.append(
            "Sensitivity at 90 % specificity is read off the ROC curve of the same samples, not decided beforehand."
        )
    if any(cell["low"] is not None and cell["value"] < cell["low"] for cell in keys.get("ece", ())):
        found.append("A calibration error can lie below its interval, since resampling adds noise to it.")
    return found


def _metric_rows(splits: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per metric; its cells in the order of the columns."""
    found = [name for name in dict.fromkeys(name for figures in splits for name in figures) if name not in BESIDE]
    rows = []
    for name in sorted(found, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST)):
        cells = []
        for figures in splits:
            low, high = (figures.get("intervals") or {}).get(name) or (None, None)
            value = figures.get(name)
            inside = value is not None and low is not None and high is not None and low >= 0 and high <= 1
            cells.append({"value": value, "low": low, "high": high, "track": inside})
        if all(isinstance(cell["value"], int | float | None) for cell in cells):
            rows.append({"name": metric_name(name), "key": name, "cells": cells})
    return rows


def threshold(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The decision threshold, its rule, and on what it was chosen; None where the task has none."""
    about = record.get("threshold")
    value = about["value"] if about else None
    if about is None or value is None:
        return None
    values = list(value.items()) if isinstance(value, Mapping) else [("", value)]
    folds = about.get("folds") or []
    rule = str(about.get("rule"))
    name, equals, wanted = rule.partition("=")
    said = f"the highest that reaches a {name} of {wanted}" if equals else RULES.get(rule, rule)
    return {
        "values": values,
        "rule": said,
        "chosen_on": chosen_on(record),
        "folds": [number(cut) for cut in folds if not isinstance(cut, Mapping)],
    }


def classes(material: Material) -> dict[str, Any] | None:
    """Confusion matrix, and per class its figures against the rest."""
    part = material.part
    if not part.classes or part.task == "dense" or not len(part.sample_ids):
        return None
    matrix = material.confusion()
    table = material.figures.get("classes") or {}
    return {
        "title": f"Classes, {material.split_name} samples",
        "matrix": _matrix_rows(matrix, part.classes) if len(matrix) <= TABLE_CLASSES else None,
        "heat": plots.confusion_plot(matrix, material.split_name) if len(matrix) > TABLE_CLASSES else None,
        "rows": _class_rows(part, matrix, table, material.predictions.of("train")),
        "trained": bool(len(material.predictions.of("train").sample_ids)),
        "long_names": any(len(label) > 8 for label in part.classes),
        "mistakes": len(part.classes) > 2,
    }


def _matrix_rows(matrix: NDArray[np.int64], names: tuple[str, ...]) -> list[dict[str, Any]]:
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    return [
        {
            "label": label,
            "cells": [
                {"count": int(count), "share": float(share), "right": row == column, "predicted": names[column]}
                for column, (count, share) in enumerate(zip(matrix[row], shares[row], strict=True))
            ],
        }
        for row, label in enumerate(names)
    ]


def _class_rows(
    part: Predictions, matrix: NDArray[np.int64], table: Mapping[str, Any], train: Predictions
) -> list[dict[str, Any]]:
    """Per class its size, figures with intervals at the decisions of the confusion matrix, and the usual mistake."""
    rows = []
    for index, label in enumerate(part.classes):
        figures: Mapping[str, Any] = table.get(label) or _figures(matrix, index)
        wrong = matrix[index].copy()
        wrong[index] = 0
        names = ("sensitivity", "specificity", "ppv", "f1", *(("roc_auc",) if len(part.classes) > 2 else ()))
        rows.append(
            {
                "label": label,
                "n": int(matrix[index].sum()),
                "n_train": int((train.true == index).sum()),
                "cells": [
                    {"value": figures.get(name), "interval": (figures.get("intervals") or {}).get(name)}
                    for name in names
                ],
                "mistake": f"{part.classes[int(wrong.argmax())]} ({int(wrong.max()):,})" if wrong.any() else "",
            }
        )
    return rows


def _figures(matrix: NDArray[np.int64], index: int) -> dict[str, float | None]:
    """Figures of a class from the matrix alone, for runs that keep none."""
    n, named, right, total = (
        int(matrix[index].sum()), int(matrix[:, index].sum()), int(matrix[index, index]), int(matrix.sum())
    )  # fmt: skip
    clear = total - n - named + right
    return {
        "sensitivity": right / n if n else None,
        "specificity": clear / (total - n) if total > n else None,
        "ppv": right / named if named else None,
        "f1": 2 * right / (n + named) if n + named else None,
    }


def labels(material: Material) -> dict[str, Any] | None:
    """The table of a run of several labels or targets: names of the columns, then a row per label."""
    found = material.figures.get("labels")
    if not found:
        return None
    wanted = ("n", "events", "roc_auc", "average_precision", "sensitivity_at_90_specificity", "sensitivity",
              "specificity", "ppv", "f1", "brier", "r2", "rmse", "mae")  # fmt: skip
    present = [name for name in wanted if any(name in values for values in found.values())]
    cut = threshold(material.record)
    values = dict(cut["values"]) if cut else {}
    rows = [
        {
            "label": label,
            "cells": [{"value": row.get(name), "interval": (row.get("intervals") or {}).get(name)} for name in present],
            "cut": values.get(label, values.get("")),
        }
        for label, row in found.items()
    ]
    what = "Targets" if material.record["task"] == "regression" else "Labels"
    return {
        "title": f"{what}, {material.split_name} samples",
        "one": what[:-1].lower(),
        "columns": [metric_name(name) for name in present],
        "rows": rows,
        "threshold": cut,
    }


def curves(material: Material) -> dict[str, Any] | None:
    """Every figure that the task and the data allow."""
    part, name = material.part, material.split_name
    if part.task == "dense":
        return None
    each: list[tuple[str, list[plots.Plot]]] = []
    if part.task == "regression":
        made: list[plots.Plot | None] = [*plots.regression_plots(part, name)]
    else:
        kept = material.json("curves.json")
        asked = {str(curve["label"]): curve for curve in kept.get("curves", ())}
        reliability = kept.get("reliability")
        made = [
            drawn.roc_plot(part, name, asked),
            drawn.pr_plot(part, name, asked),
            drawn.calibration_plot(reliability, part.task, name) if reliability else None,
            drawn.benefit_plot(asked, name) if part.task != "multiclass" else None,
        ]
        each = class_panels(part, name, asked) if part.task == "multiclass" else []
    found = [plot for plot in made if plot is not None]
    return {"plots": found, "each": each} if found else None


def subgroups(material: Material) -> dict[str, Any] | None:
    """The subgroups of an evaluation; for a run those of its own evaluations, and what else it was measured on."""
    tables, others = [], []
    for name, record, figures in _evaluations(material):
        by = figures.get("by")
        if by:
            tables.append({**_subgroup_table(material, name, by), "of": record.get("manifest") or ""})
        if material.evaluation is None:
            test = figures.get("test", {})
            headline = [key for key in HEADLINE[str(material.record["task"])] if test.get(key) is not None][:3]
            shown = ", ".join(
                f"{metric_name(key)} {number(test[key])}" + _bounds((test.get("intervals") or {}).get(key))
                for key in headline
            )
            notes = [str(note) for note in record.get("notes") or ()]
            others.append({"name": name, "n": record.get("n"), "shown": shown, "notes": notes})
    title = "Subgroups" if tables else "Evaluations"
    return {"title": title, "tables": tables, "others": others} if tables or others else None


def _bounds(ends: Any) -> str:
    return f" [{number(ends[0])}, {number(ends[1])}]" if ends and None not in ends else ""


def _evaluations(material: Material) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Name, evaluation.json and metrics.json of each."""
    if material.evaluation is not None:
        yield material.directory.name, dict(material.evaluation), dict(material.metrics)
        return
    for path in sorted((material.directory / "evaluations").glob("*/evaluation.json")):
        figures = path.with_name("metrics.json")
        if not path.parent.name.startswith(".") and figures.is_file():
            about = json.loads(path.read_text(encoding="utf-8"))
            yield path.parent.name, about, json.loads(figures.read_text(encoding="utf-8"))


def _subgroup_table(material: Material, name: str, by: Mapping[str, Any]) -> dict[str, Any]:
    parts = by["subgroups"]
    keys = [
        key
        for key in HEADLINE[str(material.record["task"])]
        if any(part.get(key) is not None for part in parts.values())
    ]
    rows = []
    for value, part in parts.items():
        intervals = part.get("intervals") or {}
        events = part.get("events")
        known = sum(label["n"] for label in part["labels"].values()) if part.get("labels") else part["n"]
        rows.append(
            {
                "value": value or "(empty)",
                "n": part["n"],
                "groups": part["n_groups"],
                "events": f"{events:,} ({percent(events / known)})" if events is not None and known else "",
                "cells": [{"value": part.get(key), "interval": intervals.get(key)} for key in keys],
                "small": part.get("small") or "",
            }
        )
    return {
        "name": name,
        "column": by["column"],
        "columns": [metric_name(key) for key in keys],
        "rows": rows,
        "events": any(row["events"] for row in rows),
        "small": any(row["small"] for row in rows),
        "labels": material.record["task"] == "multilabel",
        "decided": material.record["task"] in ("binary", "multilabel"),
    }


def learning(material: Material) -> list[plots.Plot]:
    """Learning curves from the history; none of a cross-validation, whose folds are of different lengths."""
    table: pl.DataFrame = material.table("history.csv")
    if table.is_empty() or "fold" in table.columns or material.evaluation is not None:
        return []
    numeric = table.select(pl.selectors.numeric())
    columns = {name: plots.series(numeric[name].to_list()) for name in numeric.columns}
    return plots.learning_plots(columns, kept_epoch(material))


def kept_epoch(material: Material) -> int | None:
    """The epoch or round of the history that validation chose; None where it did not, or that is not known."""
    if material.record["kind"] == "joint":
        epoch = material.record.get("best_epoch")
    else:
        table = material.table("history.csv")
        if "fold" in table.columns or "valid_loss" not in table.columns or not table["valid_loss"].count():
            return None
        fitted = material.json("head.json").get("fitted") or {}
        epoch = fitted.get("epoch", fitted.get("rounds"))
    return epoch if isinstance(epoch, int) and epoch >= 0 else None
