"""Splits drawn among all samples, of which only some take part."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from featurecache.config import SplitConfig
from featurecache.data.everyone import folds_taking_part, taking_part
from featurecache.data.splits import make_splits
from featurecache.data.targets import read_target
from featurecache.errors import InputError


def samples(n):
    table = pl.DataFrame({"sample_id": [f"s{i:03d}" for i in range(n)], "y": [i % 3 for i in range(n)]})
    return table.with_columns(part=pl.Series([("train", "test")[i % 2] for i in range(n)])), read_target(table, ["y"])


def test_who_takes_part_moves_nobody():
    table, target = samples(90)
    every = make_splits(table, target, SplitConfig(seed=4))
    assert np.array_equal(taking_part(table, target, SplitConfig(seed=4), np.arange(90)), every)
    kept = np.flatnonzero(np.arange(90) % 4 != 1)
    assert np.array_equal(taking_part(table, target, SplitConfig(seed=4), kept), every[kept])
    assert not np.array_equal(make_splits(table[kept], target.subset(kept), SplitConfig(seed=4)), every[kept])
    whole = folds_taking_part(table, target, SplitConfig(), 3, np.arange(90))
    some = folds_taking_part(table, target, SplitConfig(), 3, kept)
    assert all(np.array_equal(part, fold[kept]) for part, fold in zip(some, whole, strict=True))


def test_a_side_of_which_nobody_takes_part_is_refused_and_a_column_is_looked_at_for_those_who_do():
    table, target = samples(40)
    kept = np.flatnonzero(make_splits(table, target, SplitConfig()) != "test")
    with pytest.raises(InputError, match=r"m\.csv: none of the \d+ test samples has the views that are asked for"):
        taking_part(table, target, SplitConfig(), kept, source="m.csv")
    by = SplitConfig(split="part")
    assert set(taking_part(table, target, by, np.arange(0, 40, 2))) == {"train"}
    shared = [("same",)] * 2 + [(str(i),) for i in range(38)]  # s000 in train, s001 in test
    with pytest.raises(InputError, match="the same image"):
        taking_part(table, target, by, np.arange(40), content=shared)
    assert len(taking_part(table, target, by, np.arange(1, 40), content=shared)) == 39
