"""What a fitted model leaves behind: predictions, metrics with intervals, threshold, splits, history, card, report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from featurecache.data.splits import write_splits
from featurecache.data.targets import Target
from featurecache.evaluation.bootstrap import bootstrap_intervals
from featurecache.evaluation.metrics import compute_metrics, metric_names
from featurecache.evaluation.threshold import At, choose_threshold
from featurecache.predictions import Predictions, read_predictions
from featurecache.record import dump_json, plain
from featurecache.reporting.card import write_card
from featurecache.reporting.report import write_report
from featurecache.run import Run, RunWriter
from featurecache.rundir import read_record

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Results:
    """What `write_results` found: metrics.json, and the threshold for run.json."""

    metrics: dict[str, Any]
    threshold: dict[str, Any]


@dataclass(frozen=True)
class Folds:
    """Which fold tested each row, (n,) from 0, -1 for none; and the threshold, chosen on the folds' validation rows."""

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
) -> Results:
    """Write predictions.csv, splits.csv, history.csv and metrics.json; all rows are those of the fitted samples.

    Args:
        directory: of the run being written (`RunWriter.path`).
        target: (n,) or (n, T) true values.
        scores: (n, classes) or (n, labels) probabilities, NaN for a skipped label; regression (n, T) values.
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
    """
    predictions = make_predictions(
        target, scores, sample_ids=sample_ids, groups=groups, splits=splits, views=views, present=present
    )
    threshold = find_threshold(predictions, at) if folds is None else dict(folds.threshold)
    metrics = measure(predictions, threshold, bootstrap=bootstrap, seed=seed)
    table = predictions.table(threshold["value"])
    if folds is not None:
        metrics["cv"] = fold_metrics(predictions, folds.number, threshold)
        table = table.with_columns(pl.Series("fold", folds.number, dtype=pl.Int64))
    table.write_csv(directory / "predictions.csv")
    write_splits(directory / "splits.csv", predictions.sample_ids.tolist(), predictions.groups, predictions.splits)
    if history:
        rows = plain(list(history), directory)
        pl.DataFrame(rows, infer_schema_length=None).write_csv(directory / "history.csv")
    (directory / "metrics.json").write_text(dump_json(metrics), encoding="utf-8")
    return Results(metrics, threshold)


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
) -> Predictions:
    """Bring true values, scores and names of n samples together; arguments as `write_results`."""
    ids = np.asarray(sample_ids, dtype=np.str_)
    empty = np.full(len(ids), "", dtype=np.str_)
    here = np.ones((len(ids), len(views)), bool) if present is None else np.asarray(present, dtype=bool)
    return Predictions(
        target.task,
        tuple(target.names),
        tuple(target.classes),
        np.asarray(target.values, dtype=np.int64 if target.classes else np.float64),
        np.asarray(scores, dtype=np.float64),
        ids,
        empty if groups is None else np.asarray(groups, dtype=np.str_),
        empty if splits is None else np.asarray(splits, dtype=np.str_),
        np.array(["+".join(np.asarray(views, dtype=np.str_)[row]) for row in here], dtype=np.str_),
    )


def to_target(predictions: Predictions) -> Target:
    """The true values as the evaluation takes them."""
    values = predictions.true.astype(np.float32) if predictions.task == "multilabel" else predictions.true
    return Target(predictions.task, predictions.names, predictions.classes, values)  # type: ignore[arg-type]


def find_threshold(predictions: Predictions, at: At | None = None) -> dict[str, Any]:
    """`value`, `rule` and `chosen_on` of the decision threshold, chosen on the validation samples.

    The value is one probability, or one per label; None where the most probable class is taken or a number predicted.
    """
    valid = predictions.of("valid")
    if predictions.task in ("binary", "multilabel") and not len(valid.sample_ids):
        return {"value": 0.5, "rule": "default", "chosen_on": None}
    found: dict[str, Any] = plain(choose_threshold(to_target(valid), valid.scores, at=at), Path())
    return found


def measure(predictions: Predictions, threshold: Mapping[str, Any], *, bootstrap: int, seed: int) -> dict[str, Any]:
    """metrics.json: per split n, n_groups, events, the task's metrics and their intervals; then the bootstrap."""
    found: dict[str, Any] = {}
    for split in SPLITS:
        part = predictions.of(split)
        if not len(part.sample_ids):
            continue
        target = to_target(part)
        figures = compute_metrics(target, part.scores, threshold=threshold["value"])
        first = {"n": len(part.sample_ids), "n_groups": len(np.unique(part.groups))}
        found[split] = {**first, **{name: value for name, value in figures.items() if name not in first}}
        if bootstrap:
            found[split]["intervals"] = bootstrap_intervals(
                target, part.scores, part.groups, n=bootstrap, seed=seed, threshold=threshold["value"]
            )
    found["bootstrap"] = {"unit": "group", "n": bootstrap, "seed": seed}
    result: dict[str, Any] = plain(found, Path())
    return result


def fold_metrics(predictions: Predictions, number: NDArray[np.int64], threshold: Mapping[str, Any]) -> dict[str, Any]:
    """Per metric its value in every fold (None where undefined), their mean and standard deviation."""
    tables = []
    for fold in range(int(number.max()) + 1):
        part = predictions.take(np.flatnonzero((number == fold) & predictions.known()))
        tables.append(compute_metrics(to_target(part), part.scores, threshold=threshold["value"]))
    found: dict[str, Any] = {"folds": len(tables), "n": [table["n"] for table in tables]}
    for name in metric_names(predictions.task):
        values = [table.get(name) for table in tables]
        defined = [value for value in values if value is not None]
        spread = {"mean": float(np.mean(defined)), "sd": float(np.std(defined))} if defined else {}
        found[name] = {"values": values, **spread}
    result: dict[str, Any] = plain(found, Path())
    return result


def metrics_from_predictions(path: str | Path) -> dict[str, Any]:
    """metrics.json, computed again from predictions.csv (and the bootstrap's size and seed) of a run."""
    path = Path(path)
    settings = json.loads((path / "metrics.json").read_text(encoding="utf-8"))["bootstrap"]
    record = read_record(path)
    predictions = read_predictions(path, record)
    if record.get("cv"):  # the threshold was chosen on the folds' validation rows, whose scores are not kept
        threshold = record["threshold"]
        number = pl.read_csv(path / "predictions.csv", columns=["fold"])["fold"].to_numpy()
        found = measure(predictions, threshold, bootstrap=settings["n"], seed=settings["seed"])
        return {**found, "cv": fold_metrics(predictions, number, threshold)}
    rule = str((record.get("threshold") or {}).get("rule", ""))
    at = At.parse(rule) if "=" in rule else None
    return measure(predictions, find_threshold(predictions, at), bootstrap=settings["n"], seed=settings["seed"])
