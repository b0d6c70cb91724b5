"""What the samples of a map can be coloured by and are described with: labels, predictions, errors, splits, columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from featurecache.data.targets import Target
from featurecache.rundir.predictions import Predictions, Threshold

MOST_COLOURS = 60  # categories beyond that are told on the card, not by colour
HELD_OUT = ("valid", "test")


@dataclass
class Column:
    """One property of n samples: categories (`values` are indices of `labels`, -1 unknown) or numbers (NaN unknown).

    Attributes:
        name: as a person reads it.
        values: (n,) int64 or float64.
        labels: the categories in order; empty for numbers.
        role: `class`, `prediction`, `error`, `split` or '': which colours suit it.
        card: whether the card of a sample tells it.
    """

    name: str
    values: NDArray[Any]
    labels: list[str] = field(default_factory=list)
    role: str = ""
    card: bool = True

    def to_json(self) -> dict[str, Any]:
        """Plain values for the page."""
        known = np.isfinite(self.values) if not self.labels else self.values >= 0
        values = [
            (round(float(v), 4) if not self.labels else int(v)) if ok else None
            for v, ok in zip(self.values, known, strict=True)
        ]
        kind = "category" if self.labels else "number"
        colour = bool(known.any()) and len(self.labels) <= MOST_COLOURS
        return {"name": self.name, "kind": kind, "labels": self.labels, "values": values, "role": self.role,
                "card": self.card, "colour": colour}  # fmt: skip


@dataclass(frozen=True)
class Suspect:
    """A sample whose given label a model that did not learn from it disagrees with."""

    row: int
    given: str
    said: str
    score: float  # how strongly: the probability of `said` less that of `given`, or a deviation in standard deviations


def category(name: str, values: Sequence[str | None], *, labels: Sequence[str] = (), role: str = "") -> Column:
    """A column of text; categories in the given order, else sorted."""
    order = list(labels) or sorted({value for value in values if value is not None})
    place = {label: number for number, label in enumerate(order)}
    return Column(name, np.array([place.get(v, -1) if v is not None else -1 for v in values], np.int64), order, role)


def table_column(table: pl.DataFrame, name: str) -> Column:
    """A column of the manifest: numbers with many values as numbers, all else as categories."""
    series = table[name]
    if series.dtype.is_float() or (series.dtype.is_integer() and series.n_unique() > 12):
        return Column(name, series.cast(pl.Float64).fill_null(float("nan")).to_numpy())
    return category(name, series.cast(pl.String).to_list())


def target_columns(target: Target) -> list[Column]:
    """The labels of a dataset that no run says anything about."""
    if target.classes:
        values = np.asarray(target.values, dtype=np.int64)
        return [Column(target.names[0], values, list(target.classes), "class")]
    if target.task == "regression":
        return [Column(name, np.asarray(target.values[:, i], np.float64)) for i, name in enumerate(target.names)]
    return _label_columns(target.names, target.values)


def prediction_columns(found: Predictions, threshold: Threshold, *, folds: int | None) -> list[Column]:
    """Class, prediction, error, probabilities and split of samples, as a run has them."""
    decided = found.decisions(threshold)
    columns: list[Column] = []
    if found.classes:
        labels = list(found.classes)
        wrong = np.where(found.true < 0, -1, (decided != found.true).astype(np.int64))
        sure = found.scores[np.arange(len(decided)), decided]
        columns += [
            Column("class", found.true, labels, "class"),
            Column("prediction", np.asarray(decided, np.int64), labels, "prediction"),
            Column("error", wrong, ["right", "wrong"], "error"),
            Column("probability of the prediction", sure),
        ]
        if found.task == "binary":
            columns.append(Column(f"probability of {labels[1]}", found.scores[:, 1], card=False))
    elif found.task == "regression":
        several = len(found.names) > 1
        for number, name in enumerate(found.names):
            true, said = found.true[:, number].astype(np.float64), found.scores[:, number]
            more = f" of {name}" if several else ""
            columns += [
                Column(name, true),
                Column(f"prediction{more}", said),
                Column(f"absolute error{more}", np.abs(said - true), role="error"),
            ]
    else:
        columns += _label_columns(found.names, found.true)
        columns += [Column(f"probability of {n}", found.scores[:, i], card=False) for i, n in enumerate(found.names)]
        missed = (decided != found.true) & ~np.isnan(found.true)
        columns.append(Column("wrong labels", missed.sum(axis=1).astype(np.float64), role="error"))
        columns.append(_joined("predicted labels", found.names, decided))
    tested = f"tested in one of {folds} folds" if folds else "test"
    names = {"": "not used", "train": "train", "valid": "valid", "test": tested}
    splits = [names.get(split, split) for split in found.splits.tolist()]
    columns.append(category("split", splits, labels=[n for n in names.values() if n in splits], role="split"))
    return columns


def _label_columns(names: Sequence[str], values: NDArray[Any]) -> list[Column]:
    """A yes-or-no column per label to colour by, and all positive ones as one text for the card."""
    single = [
        Column(name, np.where(np.isnan(values[:, i]), -1, values[:, i] > 0.5).astype(np.int64), ["no", "yes"], "label")
        for i, name in enumerate(names)
    ]
    for column in single:
        column.card = False
    return [_joined("labels", names, values), *single]


def _joined(name: str, names: Sequence[str], values: NDArray[Any]) -> Column:
    texts = [", ".join(names[i] for i in np.flatnonzero(row > 0.5).tolist()) or "none" for row in values]
    return category(name, texts)


def suspects(found: Predictions, threshold: Threshold, names: NDArray[np.str_]) -> list[Suspect]:
    """Samples that were not learned from and whose label the model contradicts, the clearest first.

    Classes follow confident learning (Northcutt et al., 2021, doi:10.1613/jair.1.12125): a sample counts if the model
    is at least as sure of another class as it is, on average, of that class where it is the label.

    Args:
        found: the run's predictions of the samples; only those of validation, test or a fold's test count.
        threshold: the run's.
        names: (n,) what the rows are called in the result's order: `Suspect.row` is a position in it.
    """
    judged = np.isin(found.splits, HELD_OUT) & found.known()
    listed: list[Suspect] = []
    if found.task == "regression":
        for number, name in enumerate(found.names):
            error = found.scores[:, number] - found.true[:, number].astype(np.float64)
            usual = float(np.nanstd(error[judged])) if judged.any() else 0.0
            for row in np.flatnonzero(judged & (np.abs(np.nan_to_num(error)) > 3 * usual)).tolist():
                given, said = float(found.true[row, number]), float(found.scores[row, number])
                listed.append(Suspect(row, f"{name} {given:.4g}", f"{said:.4g}", abs(said - given) / max(usual, 1e-12)))
    elif found.classes:
        scores = np.nan_to_num(found.scores)
        own = judged[:, None] & (found.true[:, None] == np.arange(len(found.classes)))
        usual_of = np.array([scores[own[:, k], k].mean() if own[:, k].any() else 2.0 for k in range(own.shape[1])])
        # Confident learning: another class counts where the model is as sure of it as it usually is of that class.
        sure = np.where(scores >= usual_of, scores, -1.0)
        for row in np.flatnonzero(judged & (sure.max(axis=1) >= 0) & (sure.argmax(axis=1) != found.true)).tolist():
            given, other = int(found.true[row]), int(sure[row].argmax())
            gap = float(scores[row, other] - scores[row, given])
            listed.append(Suspect(row, found.classes[given], found.classes[other], gap))
    else:
        decided = found.decisions(threshold)
        wrong = (decided != found.true) & ~np.isnan(found.true) & ~np.isnan(decided) & judged[:, None]
        for row, number in zip(*(part.tolist() for part in np.nonzero(wrong)), strict=True):
            positive = bool(found.true[row, number] > 0.5)
            label, answer = ("yes", "no") if positive else ("no", "yes")
            off = abs(float(found.scores[row, number]) - positive)
            listed.append(Suspect(row, f"{found.names[number]}: {label}", answer, off))
    return sorted((s for s in listed if s.score > 0), key=lambda s: (-s.score, str(names[s.row])))
