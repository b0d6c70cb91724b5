"""Splits that are drawn among all samples, of which only some take part: no view, or an image that can't be read."""

from __future__ import annotations

import numpy as np
import polars as pl

from featurecache.config import SplitConfig
from featurecache.data.splits import SPLITS, Content, fold_splits, make_splits
from featurecache.data.targets import Target
from featurecache.errors import InputError


def taking_part(
    table: pl.DataFrame,
    target: Target,
    config: SplitConfig,
    kept: np.ndarray,
    *,
    content: Content | None = None,
    source: str = "",
) -> np.ndarray:
    """`make_splits` of all samples, of which only some take part: which side one is on does not depend on the others.

    So heads on other views of a dataset, of which some samples lack one, are tested on the same samples as far as they
    have them. A split column says this anyway; masks are divided among those that take part.

    Args:
        table: one row per sample, of all of them; `target` and `content` are of the same.
        target: as for `make_splits`.
        config: as for `make_splits`.
        kept: (k,) int64, rows that take part.
        content: as for `make_splits`.
        source: as for `make_splits`.

    Returns:
        (k,) of "train", "valid", "test" or "" (not used).

    Raises:
        InputError: as for `make_splits`, or nothing of a side takes part.
    """
    if config.split != "auto" or target.task == "dense":
        some = None if content is None else [content[row] for row in kept.tolist()]
        return make_splits(table[kept], target.subset(kept), config, content=some, source=source)
    return _still_there(make_splits(table, target, config, content=content, source=source), kept, source)


def folds_taking_part(
    table: pl.DataFrame,
    target: Target,
    config: SplitConfig,
    folds: int,
    kept: np.ndarray,
    *,
    content: Content | None = None,
    source: str = "",
) -> list[np.ndarray]:
    """The same for `fold_splits`: per fold (k,) of "train", "valid", "test" or "" (not used)."""
    made = fold_splits(table, target, config, folds, content=content, source=source)
    return [_still_there(splits, kept, source) for splits in made]


def _still_there(splits: np.ndarray, kept: np.ndarray, source: str) -> np.ndarray:
    """Those that take part; refuses a side of which none does."""
    found: np.ndarray = splits[kept]
    for side in SPLITS:
        count = int((splits == side).sum())
        if count and not (found == side).any():
            raise InputError(
                f"{source}{': ' * bool(source)}none of the {count} {side} samples has the views that are asked for. "
                "The split is drawn among all samples with a known target, to be the same for every choice of views: "
                "give another --seed, larger shares to --valid and --test, or a --split column"
            )
    return found
