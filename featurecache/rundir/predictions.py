"""predictions.csv: what a model said about each sample, written with full precision and read back as arrays."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from featurecache.errors import RunError
from featurecache.rundir.cut import Threshold, recorded_threshold, threshold_of

__all__ = ["TEXT", "Predictions", "Threshold", "numbers", "read_predictions", "read_text", "refusing", "text_columns"]

TEXT = ("sample_id", "group", "split", "views")  # the columns that every predictions.csv begins with


@dataclass(frozen=True)
class Predictions:
    """True values and scores of n samples.

    Attributes:
        task: binary, multiclass, multilabel or regression.
        names: the target columns; one for binary and multiclass.
        classes: class labels, in binary tasks the positive one last; empty for multilabel and regression.
        true: (n,) int64 class index, -1 = unknown; multilabel and regression (n, names) float64, NaN = unknown.
        scores: (n, classes) or (n, names) float64: probabilities, for regression the predicted values; NaN = none.
        sample_ids: (n,) text.
        groups: (n,) text.
        splits: (n,) text: train, valid, test, or '' where a sample was not used.
        views: (n,) text: the views that the sample has, joined by `+`.
        folds: (n,) int64: which fold of a cross-validation tested the sample, -1 for none; None without folds.
    """

    task: str
    names: tuple[str, ...]
    classes: tuple[str, ...]
    true: NDArray[Any]
    scores: NDArray[np.float64]
    sample_ids: NDArray[np.str_]
    groups: NDArray[np.str_]
    splits: NDArray[np.str_]
    views: NDArray[np.str_]
    folds: NDArray[np.int64] | None = None

    def known(self) -> NDArray[np.bool_]:
        """(n,) whether any target of the sample is known."""
        known: NDArray[np.bool_] = self.true >= 0 if self.classes else ~np.isnan(self.true).all(axis=1)
        return known

    def of(self, split: str) -> Predictions:
        """The samples of one split of which a target is known."""
        return self.take(np.flatnonzero((self.splits == split) & self.known()))

    def take(self, rows: NDArray[np.int64]) -> Predictions:
        """These samples, in this order."""
        arrays = [field.name for field in fields(self) if isinstance(getattr(self, field.name), np.ndarray)]
        return replace(self, **{name: getattr(self, name)[rows] for name in arrays})

    def cut(self, record: Mapping[str, Any] | None) -> Threshold:
        """The threshold of these samples, by what a run records; in a cross-validation that of each sample's fold."""
        return recorded_threshold(record, self.folds)

    def curves(self, *, every: bool = False) -> list[tuple[str, NDArray[np.bool_], NDArray[np.float64]]]:
        """(label, is positive, score) of each yes-or-no question that has both answers among the known samples.

        One for binary (`every` adds the negative class), one against the rest per class, one per multilabel column.
        """
        asked = self.questions(every=every)
        return [(label, positive, self.scores[rows, column]) for label, column, rows, positive in asked]

    def questions(self, *, every: bool = False) -> list[tuple[str, int, NDArray[np.int64], NDArray[np.bool_]]]:
        """The same as (label, column of the scores, rows with an answer and a score, is positive)."""
        found = []
        for column, label in enumerate(() if self.task == "regression" else self.classes or self.names):
            if self.task == "binary" and column == 0 and not every:
                continue
            true = self.true if self.classes else self.true[:, column]
            known = (true >= 0 if self.classes else ~np.isnan(true)) & np.isfinite(self.scores[:, column])
            rows = np.flatnonzero(known)
            positive = (true == column if self.classes else true > 0.5)[rows]
            if positive.any() and not positive.all():
                found.append((label, column, rows, positive))
        return found

    def confidences(self) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """(m,) probabilities and whether what they were given for is so, over the known samples.

        Binary: of the positive class. Multiclass: of the predicted class. Multilabel: of all labels together.
        """
        if self.task == "multiclass":
            score, right = self.scores.max(axis=1), (self.scores.argmax(axis=1) == self.true).astype(np.float64)
            right[self.true < 0] = np.nan
        elif self.task == "binary":
            score, right = self.scores[:, 1], np.where(self.true >= 0, self.true, np.nan)
        else:
            score, right = self.scores.ravel(), self.true.ravel()
        known = np.isfinite(score) & np.isfinite(right)
        return score[known], right[known] > 0.5

    def decisions(self, threshold: Threshold = None) -> NDArray[Any]:
        """What the model decides.

        Args:
            threshold: of the positive class, or per label; for all samples or each. None and absent labels mean 0.5.

        Returns:
            (n,) int64 class index (binary: positive from the threshold on; multiclass: the most probable); multilabel
            (n, names) float64 of 0, 1 and NaN where there is no score; regression: the scores.
        """
        if self.task == "multiclass":
            best: NDArray[np.int64] = np.argmax(self.scores, axis=1).astype(np.int64)
            return best
        if self.task == "regression":
            return self.scores
        if self.task == "binary":
            return (self.scores[:, 1] >= threshold_of(threshold, self.names[0])).astype(np.int64)
        limits = [np.broadcast_to(threshold_of(threshold, name), len(self.scores)) for name in self.names]
        cut = np.stack(limits, axis=1)
        return np.where(np.isfinite(self.scores), (self.scores >= cut).astype(np.float64), np.nan)

    def _text(self) -> dict[str, pl.Series]:
        values = (self.sample_ids, self.groups, self.splits, self.views)
        return {name: pl.Series(found.tolist(), dtype=pl.String) for name, found in zip(TEXT, values, strict=True)}

    def table(self, threshold: Threshold = None) -> pl.DataFrame:
        """The columns of predictions.csv: sample_id, group, split, views, target, prediction, scores, fold."""
        columns = self._text()
        decided = self.decisions(threshold)
        if self.classes:
            labels = [*self.classes, None]  # index -1
            columns["target"] = pl.Series([labels[index] for index in self.true], dtype=pl.String)
            columns["prediction"] = pl.Series([labels[index] for index in decided], dtype=pl.String)
        else:
            kind = pl.Int8 if self.task == "multilabel" else pl.Float64
            for what, values in (("target", self.true), ("prediction", decided)):
                for number, name in enumerate(_columns(what, self.task, self.names)):
                    columns[name] = pl.Series(values[:, number].astype(np.float64)).fill_nan(None).cast(kind)
        if self.task != "regression":
            for number, label in enumerate(self.classes or self.names):
                columns[f"p:{label}"] = pl.Series(self.scores[:, number].astype(np.float64)).fill_nan(None)
        if self.folds is not None:
            columns["fold"] = pl.Series(self.folds, dtype=pl.Int64)
        return pl.DataFrame(columns)


def _columns(what: str, task: str, names: Sequence[str]) -> list[str]:
    """`target` for a single regression target, else `target:<name>` for each."""
    return [what] if task == "regression" and len(names) == 1 else [f"{what}:{name}" for name in names]


@contextmanager
def refusing(directory: Path) -> Iterator[Path]:
    """The predictions.csv of a directory; what goes wrong while it is read becomes a RunError that names it."""
    path = directory / "predictions.csv"
    try:
        yield path
    except FileNotFoundError:
        raise RunError(f"{directory}: predictions.csv is missing") from None
    except (pl.exceptions.PolarsError, csv.Error, KeyError, ValueError) as error:
        raise RunError(f"{path}: not the predictions of this run: {error}") from None


def read_text(path: Path) -> pl.DataFrame:
    """A CSV file, every column as text; polars 2.1 leaves the quotes within a name of a column doubled."""
    with path.open(encoding="utf-8", newline="") as file:
        names = next(csv.reader(file), [])
    table = pl.read_csv(path, infer_schema=False)
    table.columns = names
    return table


def text_columns(table: pl.DataFrame, columns: Sequence[str]) -> list[NDArray[np.str_]]:
    """Columns of a table of text, (n,) each, '' where it is empty."""
    return [table[name].fill_null("").to_numpy().astype(np.str_) for name in columns]


def numbers(table: pl.DataFrame, columns: Sequence[str]) -> NDArray[np.float64]:
    """(n, columns) of a table of text, NaN where it is empty."""
    values = [table[name].cast(pl.Float64).fill_null(float("nan")).to_numpy() for name in columns]
    return np.column_stack(values) if values else np.empty((table.height, 0))


def read_predictions(directory: Path, record: Mapping[str, Any]) -> Predictions:
    """The arrays behind the predictions.csv of a directory.

    Args:
        directory: a run, or any directory with a predictions.csv of the same columns.
        record: the run's record; task, classes and targets are taken from it.

    Raises:
        RunError: it is missing, lacks a column or holds what it can't hold.
    """
    with refusing(directory) as path:
        table = read_text(path)
        task, names, classes = str(record["task"]), tuple(record["targets"]), tuple(record["classes"])
        if classes:
            index = {None: -1, **{label: number for number, label in enumerate(classes)}}
            true: NDArray[Any] = np.array([index[label] for label in table["target"]], dtype=np.int64)
        else:
            true = numbers(table, _columns("target", task, names))
        scored = [f"p:{label}" for label in classes or names]
        scores = numbers(table, _columns("prediction", task, names) if task == "regression" else scored)
        folds = table["fold"].cast(pl.Int64).to_numpy() if "fold" in table.columns else None
        ids, groups, splits, views = text_columns(table, TEXT)
    return Predictions(task, names, classes, true, scores, ids, groups, splits, views, folds)
