"""Failures are part of what readers see: the generation rises with them, and a resolved dataset tells of them."""

from __future__ import annotations

from dataclasses import replace

import polars as pl
from store_kit import TAPS, Filled, make_binding, make_keys, make_recipe

from featurecache.store.store import FeatureStore


def test_a_reader_hears_of_failures_that_come_and_go(filled: Filled):
    """An image that failed in the dataset's recipe is pending in another one, until it fails there as well."""
    key, other = make_keys([40])[0].tobytes(), make_recipe(precision="bf16")
    bound = make_binding(filled.recipe.id, [40])
    bound = replace(bound, cells=bound.cells.with_columns(state=pl.lit("failed")))
    with FeatureStore(filled.path, write=True) as store:
        store.add_recipe(other, TAPS)
        reader = FeatureStore(filled.path)
        before, seen = reader.generation, []
        for change in (
            lambda: None,
            lambda: store.add_failures(other.id, [(key, "image/1", "truncated")]),
            lambda: store.clear_failures(other.id, [key]),
        ):
            change()
            seen += reader.resolve(bound, "side", other.id).state.tolist()
        assert seen == ["pending", "failed", "pending"]
        assert reader.generation == before + 2
        reader.close()
