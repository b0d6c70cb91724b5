"""How the samples of a dataset are divided: drawn among all of its manifest, whichever views a head takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from featurecache.config import SplitConfig
from featurecache.data.everyone import folds_taking_part, taking_part
from featurecache.data.splits import Content
from featurecache.data.targets import Target
from featurecache.dataset import FeatureDataset, find_target, sample_content
from featurecache.errors import InputError


def divide(dataset: FeatureDataset, config: SplitConfig) -> NDArray[np.str_]:
    """`make_splits` for a dataset (n,): samples that it leaves out, for want of a view, don't move the others.

    Raises:
        InputError: no target, or as `taking_part`.
    """
    every = _everyone(dataset, config)
    return taking_part(every.table, every.target, config, every.kept, content=every.content, source=every.source)


def divide_folds(dataset: FeatureDataset, config: SplitConfig, folds: int) -> list[NDArray[np.str_]]:
    """`fold_splits` for a dataset, (n,) per fold, in the same way."""
    every = _everyone(dataset, config)
    return folds_taking_part(
        every.table, every.target, config, folds, every.kept, content=every.content, source=every.source
    )


@dataclass(frozen=True)
class _Everyone:
    """All samples of a manifest, and which of them a dataset has."""

    table: pl.DataFrame
    target: Target
    content: Content
    kept: NDArray[np.int64]
    source: str


def _everyone(dataset: FeatureDataset, config: SplitConfig) -> _Everyone:
    binding, target, source = dataset.binding, dataset.target, str(dataset.binding.manifest_path)
    if target is None:
        raise InputError("the dataset has no target: give target=COLUMN")
    rows = np.arange(len(dataset), dtype=np.int64)
    whole = not dataset.n_dropped and set(dataset.views) == set(binding.recipes)
    if whole or config.split != "auto" or target.task == "dense":
        return _Everyone(dataset.table, target, dataset.content, rows, source)
    every = np.arange(binding.table.height, dtype=np.int64)
    content = sample_content(binding, tuple(binding.recipes), every)
    if not dataset.n_dropped:
        return _Everyone(dataset.table, target, content, rows, source)
    given: dict[str, Any] = dataset.target_config
    target = find_target(binding, binding.table, tuple(given["target"]), given["task"], given["uncertain"])
    kept = np.flatnonzero(np.isin(binding.sample_ids, dataset.sample_ids)).astype(np.int64)
    return _Everyone(binding.table, target, content, kept, source)
