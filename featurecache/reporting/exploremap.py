"""What a map is made of: samples in the plane, and what is known of each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from featurecache.dataset import FeatureDataset
from featurecache.errors import InputError, did_you_mean
from featurecache.reporting.embedding import Components, fit_components, tsne
from featurecache.reporting.explorefields import Column, category, prediction_columns, table_column, target_columns
from featurecache.run import Run
from featurecache.rundir.predictions import Predictions, Threshold

POINTS = 20_000  # on the page; a frame of that many stays below 50 ms
Method = Literal["pca", "tsne"]


@dataclass(frozen=True)
class Map:
    """Samples in the plane.

    Attributes:
        rows: (m,) int64, which samples of the dataset.
        components: the directions of the features.
        coordinates: (m, k) of each sample along them.
        xy: (m, 2), what is drawn.
        method: `pca` or `tsne`.
    """

    rows: NDArray[np.int64]
    components: Components
    coordinates: NDArray[np.float32]
    xy: NDArray[np.float32]
    method: Method


def make_map(dataset: FeatureDataset, *, method: Method = "pca", points: int = POINTS, seed: int = 0) -> Map:
    """Lay samples out in the plane; where there are more than `points`, a random part of them.

    Raises:
        InputError: unknown method, or too few samples for it.
    """
    if method not in ("pca", "tsne"):
        raise InputError(f"--method {method!r}:{did_you_mean(method, ('pca', 'tsne'))} Known: pca, tsne.")
    if points < 1:
        raise InputError(f"--points {points}: at least 1 is needed")
    n = len(dataset)
    rows = np.arange(n, dtype=np.int64)
    if n > points:
        rows = np.sort(np.random.default_rng(seed).choice(n, points, replace=False)).astype(np.int64)
    components, coordinates = fit_components(dataset.features, rows, seed=seed)
    xy = coordinates[:, :2] if method == "pca" else tsne(coordinates, seed=seed)
    return Map(rows, components, coordinates, xy, method)


@dataclass(frozen=True)
class Said:
    """What a run says about the samples of a dataset.

    Attributes:
        run: the run.
        places: (n,) int64 row of each sample among the run's predictions, -1 where it has none.
    """

    run: Run
    places: NDArray[np.int64]

    def threshold(self, found: Predictions) -> Threshold:
        """From which probability on the run says yes, for samples that `of` gave."""
        return found.cut(self.run.record.get("threshold"))

    @property
    def folds(self) -> int | None:
        """How many folds the run was cross-validated in; None where it was not."""
        folds = (self.run.record.get("cv") or {}).get("folds")
        return int(folds) if folds else None

    def of(self, rows: NDArray[np.int64]) -> Predictions:
        """The predictions of some samples, in their order; nothing is known where there is none."""
        places = self.places[rows]
        found = self.run.arrays.take(np.maximum(places, 0))
        unknown = places < 0
        if unknown.any():
            found.true[unknown] = -1 if found.classes else np.nan
            found.scores[unknown] = np.nan
            found.splits[unknown] = ""
        return found


def match(dataset: FeatureDataset, run: Run | None) -> Said | None:
    """A run's predictions of the samples of a dataset.

    Raises:
        InputError: it has none.
    """
    if run is None:
        return None
    if run.task == "dense":
        raise InputError(f"{run.path}: predicts masks; the map shows labels and scores of samples. Leave out --run.")
    place = {name: row for row, name in enumerate(run.arrays.sample_ids.tolist())}
    places = np.array([place.get(name, -1) for name in dataset.sample_ids.tolist()], dtype=np.int64)
    if (places < 0).all():
        raise InputError(
            f"{run.path}: has predictions of none of the samples of dataset {dataset.binding.name!r}. "
            f"It was fitted on dataset {run.binding.get('dataset', '?')!r}."
        )
    return Said(run, places)


def check_columns(dataset: FeatureDataset, by: Sequence[str]) -> None:
    """Refuse columns that the manifest does not have."""
    known = dataset.table.columns
    for name in by:
        if name not in known:
            raise InputError(f"--by: no column {name!r}.{did_you_mean(name, known)} Columns: {', '.join(known[:20])}")


def describe(
    dataset: FeatureDataset, rows: NDArray[np.int64], said: Said | None, by: Sequence[str] = ()
) -> list[Column]:
    """What is known of some samples: from a run, the dataset's target, and columns of its manifest."""
    columns: list[Column] = []
    table = dataset.table[rows]
    if said is not None:
        found = said.of(rows)
        columns = prediction_columns(found, said.threshold(found), folds=said.folds)
        for column in columns:  # a sample that the run does not know has no split or prediction either
            if column.role in ("split", "prediction") and column.labels:
                column.values = np.where(said.places[rows] < 0, -1, column.values)
    elif dataset.target is not None:
        columns = target_columns(dataset.target.subset(rows))
    taken = {column.name for column in columns}
    if "split" in table.columns and not taken & {"split"} and "split" not in by:
        columns.append(category("split", table["split"].cast(pl.String).to_list(), role="split"))
    columns += [table_column(table, name) for name in by if name not in taken]
    present = dataset.present[rows]
    if not present.all():
        texts = ["+".join(v for v, yes in zip(dataset.views, row, strict=True) if yes) for row in present]
        columns.append(category("views", texts))
    return columns
