"""What a fitted model leaves behind: predictions, metrics with intervals, threshold, splits, history, card, report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from featurecache.data.splits import write_splits
from featurecache.data.targets import Target
from featurecache.evaluation.bootstrap import bootstrap_intervals, class_tables, label_intervals
from featurecache.evaluation.curves import curve_data, reliability_data
from featurecache.evaluation.metrics import compute_metrics, metric_names
from featurecache.evaluation.threshold import At, choose_threshold
from featurecache.reporting.card import write_card
from featurecache.reporting.report import write_report
from featurecache.run import Run, RunWriter
from featurecache.rundir.densepredictions import DensePredictions
from featurecache.rundir.predictions import Predictions
from featurecache.rundir.record import dump_json, plain

SPLITS = ("train", "valid", "test")
MOST_CURVES = 8  # with bands; more in one figure are not told apart
BANDS = 500  # resamples of a band, which is read by eye


@dataclass(frozen=True)
class Results:
    """What `write_results` found: metrics.json, the threshold for run.json, and the predictions."""

    metrics: dict[str, Any]
    threshold: dict[str, Any]
    predictions: Predictions


@dataclass(frozen=True)
class Folds:
    """Which fold tested each row, (n,) from 0, -1 for none; and the threshold of new samples and of each fold."""

    number: NDArray[np.int64]
    threshold: Mapping[str, Any]


def write_results(
    directory: Path,
    *,
    target: Target,
    scores: ArrayLike,
    splits: Sequence[str] | NDArray[Any],
    groups: Sequence[str] | NDArray[Any],
    sample_ids: Sequence[str] | NDArray[Any],
    views: Sequence[str],
    present: ArrayLike | None = None,
    history: Sequence[Mapping[str, Any]] = (),
    bootstrap: int = 1000,
    seed: int = 0,
    at: At | None = None,
    folds: Folds | None = None,
    masks: Sequence[str] = (),
) -> Results:
    """Write predictions.csv, splits.csv, history.csv, metrics.json and curves.json; all rows are of the fitted samples.

    Args:
        directory: of the run being written (`RunWriter.path`).
        target: (n,) or (n, T) true values; dense (n, classes) pixels.
        scores: (n, classes) or (n, labels) probabilities, NaN for a skipped label; regression (n, T) values; dense
            (n, classes, 2) pixels said to be of the class, and the right ones.
        splits: (n,) train, valid, test, or '' for samples that were not used.
        groups: (n,) what the split kept together and the bootstrap resamples.
        sample_ids: (n,) unique.
        views: the model's views, in its order.
        present: (n, len(views)) bool; default all present.
        history: one mapping per epoch or round, as heads keep it.
        bootstrap: resamples of the groups per interval; 0 for none.
        seed: of the resampling.
        at: decide at a fixed sensitivity or specificity on validation; default Youden's J.
        folds: of a cross-validation, whose scores are out of fold and all in the split `test`.
        masks: (n,) files of predicted masks, relative to `directory`; of a dense task.
    """
    predictions = make_predictions(
        target, scores, sample_ids=sample_ids, groups=groups, splits=splits, views=views, present=present, masks=masks
    )
    if folds is not None:
        predictions = replace(predictions, folds=folds.number)
    threshold = find_threshold(predictions, at) if folds is None else dict(folds.threshold)
    metrics = measure(predictions, threshold, bootstrap=bootstrap, seed=seed)
    if folds is not None:
        metrics["cv"] = fold_metrics(predictions, threshold)
    predictions.table(predictions.cut(threshold)).write_csv(directory / "predictions.csv")
    write_splits(directory / "splits.csv", predictions.sample_ids.tolist(), predictions.groups, predictions.splits)
    if history:
        rows = plain(list(history), directory)
        pl.DataFrame(rows, infer_schema_length=None).write_csv(directory / "history.csv")
    (directory / "metrics.json").write_text(dump_json(metrics), encoding="utf-8")
    if predictions.task != "regression":
        curves = curves_of(predictions, threshold, bootstrap=bootstrap, seed=seed)
        (directory / "curves.json").write_text(dump_json(curves), encoding="utf-8")
    return Results(metrics, threshold, predictions)


def finish_run(writer: RunWriter, record: Mapping[str, Any]) -> Run:
    """Add README.md and report.html to what lies in `writer.path`, then publish the run.

    Args:
        writer: of the run, its directory holding the results and the saved model.
        record: run.json but for what `RunWriter.complete` adds: task, classes, targets, views, recipes, config,
            threshold, command, binding, split, and for the report `head` ({name, settings}).
    """
    complete = writer.complete(record)
    write_card(writer.path, complete)
    write_report(writer.path, complete)
    return writer.publish(complete)


def make_predictions(
    target: Target,
    scores: ArrayLike,
    *,
    sample_ids: Sequence[str] | NDArray[Any],
    groups: Sequence[str] | NDArray[Any] | None = None,
    splits: Sequence[str] | NDArray[Any] | None = None,
    views: Sequence[str] = (),
    present: ArrayLike | None = None,
    masks: Sequence[str] = (),
) -> Predictions:
    """Bring true values, scores and names of n samples together; arguments as `write_results`."""
    ids = np.asarray(sample_ids, dtype=np.str_)
    empty = np.full(len(ids), "", dtype=np.str_)
    here = np.ones((len(ids), len(views)), bool) if present is None else np.asarray(present, dtype=bool)
    dense = target.task == "dense"
    made = (
        target.task,
        tuple(target.names),
        tuple(target.classes),
        np.asarray(target.values, dtype=np.int64 if target.classes and not dense else np.float64),
        np.asarray(scores, dtype=np.float64),
        ids,
        empty if groups is None else np.asarray(groups, dtype=np.str_),
        empty if splits is None else np.asarray(splits, dtype=np.str_),
        np.array(["+".join(np.asarray(views, dtype=np.str_)[row]) for row in here], dtype=np.str_),
    )
    if not dense:
        return Predictions(*made)
    return DensePredictions(*made, masks=np.asarray(masks, dtype=np.str_) if len(masks) else empty)


def to_target(predictions: Predictions) -> Target:
    """The true values as the evaluation takes them."""
    values = predictions.true.astype(np.float32) if predictions.task == "multilabel" else predictions.true
    return Target(predictions.task, predictions.names, predictions.classes, values)  # type: ignore[arg-type]


def find_threshold(predictions: Predictions, at: At | None = None) -> dict[str, Any]:
    """`value`, `rule` and `chosen_on` of the decision threshold, chosen on the validation samples.

    The value is one probability, or one per label; None where the most probable class is taken or a number predicted.
    """
    valid = predictions.of("valid")
    return threshold_on(to_target(valid), valid.scores, at)


def threshold_on(target: Target, scores: NDArray[Any], at: At | None = None) -> dict[str, Any]:
    """The same, chosen on these samples; half where none of them has a known target."""
    if target.task in ("binary", "multilabel") and not target.known.any():
        value = 0.5 if target.task == "binary" else dict.fromkeys(target.names, 0.5)
        return {"value": value, "rule": "default", "chosen_on": None}
    found: dict[str, Any] = plain(choose_threshold(target, scores, at=at), Path())
    return found


def measure(predictions: Predictions, threshold: Mapping[str, Any], *, bootstrap: int, seed: int) -> dict[str, Any]:
    """metrics.json: per split n, n_groups, events, the task's metrics and their intervals; then the bootstrap.

    `classes` holds the figures of each class against the rest, `labels` those of each label, with intervals for the
    test samples.
    """
    found: dict[str, Any] = {}
    for split in SPLITS:
        part = predictions.of(split)
        if not len(part.sample_ids):
            continue
        target, cut = to_target(part), part.cut(threshold)
        figures = compute_metrics(target, part.scores, threshold=cut)
        first = {"n": len(part.sample_ids), "n_groups": len(np.unique(part.groups))}
        found[split] = {**first, **{name: value for name, value in figures.items() if name not in first}}
        draws = bootstrap if split == "test" else 0
        if target.classes:
            found[split]["classes"] = class_tables(target, part.scores, part.groups, n=draws, seed=seed, threshold=cut)
        elif draws and "labels" in figures:
            for name, intervals in label_intervals(
                target, part.scores, part.groups, n=draws, seed=seed, threshold=cut
            ).items():
                found[split]["labels"][name]["intervals"] = intervals
        if bootstrap:
            found[split]["intervals"] = bootstrap_intervals(
                target, part.scores, part.groups, n=bootstrap, seed=seed, threshold=cut
            )
    found["bootstrap"] = {"unit": "group", "n": bootstrap, "seed": seed}
    result: dict[str, Any] = plain(found, Path())
    return result


def fold_metrics(predictions: Predictions, threshold: Mapping[str, Any]) -> dict[str, Any]:
    """Per metric its value in every fold (None where undefined), mean and standard deviation; the folds' thresholds."""
    number = predictions.folds if predictions.folds is not None else np.empty(0, np.int64)
    tables = []
    for fold in range(int(number.max(initial=-1)) + 1):
        part = predictions.take(np.flatnonzero((number == fold) & predictions.known()))
        tables.append(compute_metrics(to_target(part), part.scores, threshold=part.cut(threshold)))
    found: dict[str, Any] = {"folds": len(tables), "n": [table["n"] for table in tables]}
    if threshold.get("folds") is not None:
        found["thresholds"] = threshold["folds"]
    for name in metric_names(predictions.task):
        values = [table.get(name) for table in tables]
        defined = [value for value in values if value is not None]
        spread = {"mean": float(np.mean(defined)), "sd": float(np.std(defined))} if defined else {}
        found[name] = {"values": values, **spread}
    result: dict[str, Any] = plain(found, Path())
    return result


def curves_of(predictions: Predictions, threshold: Mapping[str, Any], *, bootstrap: int, seed: int) -> dict[str, Any]:
    """curves.json: what the figures of a report are drawn from beside predictions.csv, on the split that counts.

    Per yes-or-no question (the first few; each of a few classes against the rest) the bands of its ROC and
    precision-recall curves, its net benefit, and where on the curves the decisions lie. Besides the bins of the
    reliability diagram, None without probabilities.
    """
    split = next((name for name in reversed(SPLITS) if len(predictions.of(name).sample_ids)), "")
    part = predictions.of(split)
    said = part.decisions(part.cut(threshold))
    several = predictions.task == "multiclass"
    questions = part.questions()[: MOST_CURVES if not several or len(part.classes) <= MOST_CURVES else 0]
    draws = min(bootstrap, BANDS // 2 if several else BANDS)
    made = [
        {
            "label": label,
            **curve_data(positive, part.scores[rows, column], part.groups[rows], n=draws, seed=seed),
            "decided": _decided(said[rows] == column if part.classes else said[rows, column] > 0.5, positive),
        }
        for label, column, rows, positive in questions
    ]
    confidence, right = part.confidences()
    reliability = reliability_data(confidence, right) if len(confidence) else None
    found = {"schema": 1, "split": split, "curves": made, "reliability": reliability}
    result: dict[str, Any] = plain(found, Path())
    return result


def _decided(called: NDArray[np.bool_], positive: NDArray[np.bool_]) -> dict[str, float | None]:
    """Where on the curves the decisions (n,) lie."""
    return {
        "fpr": float(called[~positive].mean()),
        "sensitivity": float(called[positive].mean()),
        "ppv": float(positive[called].mean()) if called.any() else None,
    }
