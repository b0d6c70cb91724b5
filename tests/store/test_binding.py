from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from featurecache.errors import CorruptionError, InputError
from featurecache.store.binding import CELL_SCHEMA, Binding, samples_with
from featurecache.store.store import FeatureStore


@pytest.fixture
def multi(filled, kit) -> Binding:
    """Three samples; `side` is there once, `top` up to twice; one cell failed, one is pending, one has no key yet."""
    key = {n: kit.keys([n])[0].tobytes() for n in (0, 1, 2, 3, 90, 91)}
    cells = [
        (0, "side", 0, key[0], "done"),
        (0, "top", 0, key[1], "pending"),
        (0, "top", 1, key[2], "done"),
        (1, "side", 0, None, "absent"),
        (1, "top", 0, key[90], "failed"),
        (2, "side", 0, None, "pending"),
        (2, "top", 0, key[91], "done"),
        (2, "top", 1, key[3], "pending"),
    ]
    return Binding(
        "multi",
        "/data/m.csv",
        "ab" * 32,
        pl.DataFrame(
            {"sample_id": ["a", "b", "c"], "label": [1, None, 0], "age": [0.5, None, 2.0], "ok": [True, None, False]}
        ),
        {"manifest": {"layout": "wide", "box": {"side": ["x", "y"]}}},
        {"top": filled.recipe.id, "side": filled.recipe.id},
        "mean",
        pl.DataFrame(cells, schema=dict(CELL_SCHEMA), orient="row"),
    )


def test_a_binding_comes_back_as_it_was(filled, multi):
    with FeatureStore(filled.path, write=True) as store:
        before = store.generation
        store.bind(multi)
        assert store.generation == before + 1
        assert store.bindings() == ["birds", "multi"]
    again = FeatureStore(filled.path).binding("multi")
    assert again.table.equals(multi.table)
    assert again.cells.equals(multi.cells)
    assert (again.config, again.recipes, again.multi) == (multi.config, multi.recipes, multi.multi)
    assert (again.manifest_path, again.manifest_digest, again.digest) == ("/data/m.csv", "ab" * 32, multi.digest)
    assert again.views == ("top", "side")
    assert again.sample_ids.tolist() == ["a", "b", "c"]


def test_cells_resolve_to_rows_and_states_of_now(filled, multi, kit):
    with FeatureStore(filled.path, write=True) as store:
        store.bind(multi)
        top, side = store.resolve(multi, "top"), store.resolve(multi, "side")
        assert top.state.tolist() == ["done", "done", "failed", "pending", "done"]
        assert top.rows.tolist() == [1, 2, -1, -1, 3]
        np.testing.assert_array_equal(top.grid(3), [[1, 2], [-1, -1], [-1, 3]])
        assert side.state.tolist() == ["done", "absent", "pending"]
        assert side.counts() == {"done": 1, "absent": 1, "failed": 0, "pending": 1}
        np.testing.assert_array_equal(side.grid(3), [[0], [-1], [-1]])
        assert store.resolve(multi, "top") is top  # kept while the generation is the same
        with store.appender(filled.recipe.id) as appender:
            appender.append(kit.keys([90, 91]), kit.features([90, 91]))
        assert store.resolve(multi, "top").state.tolist() == ["done"] * 5
        with pytest.raises(InputError, match=r"dataset 'multi' has no view 'front'; it has top, side."):
            store.resolve(multi, "front")


def test_a_pending_cell_whose_content_failed_for_good_is_failed(filled, multi, kit):
    with FeatureStore(filled.path, write=True) as store:
        store.add_failures(filled.recipe.id, [(kit.keys([91])[0].tobytes(), "image/1", "truncated")])
        assert store.resolve(multi, "top").state.tolist() == ["done", "done", "failed", "failed", "done"]


def test_resolving_in_another_recipe(filled, multi, kit):
    other = kit.recipe(precision="fp32")
    with FeatureStore(filled.path, write=True) as store:
        store.add_recipe(other, kit.TAPS)
        with store.appender(other.id) as appender:
            appender.append(kit.keys([2]), kit.features([2]))
        assert store.resolve(multi, "top", other.id).rows.tolist() == [-1, 0, -1, -1, -1]


def test_a_name_that_is_bound_to_another_manifest_needs_replace(filled, multi):
    with FeatureStore(filled.path, write=True) as store:
        store.bind(multi)
        store.bind(replace(multi, manifest_digest="cd" * 32))  # the same path: the manifest was changed
        other = replace(multi, manifest_path="/data/other.csv")
        message = "'multi' of this store is bound to /data/m.csv, now it would be /data/other.csv. Give another --name"
        with pytest.raises(InputError, match=message):
            store.bind(other)
        store.bind(other, replace=True)
        assert store.binding("multi").manifest_path == "/data/other.csv"


def test_the_digest_covers_table_cells_and_recipes_but_not_progress(multi):
    def with_cells(**columns):
        return replace(multi, cells=multi.cells.with_columns(**columns)).digest

    same = [
        replace(multi, name="x").digest,
        replace(multi, manifest_path="/elsewhere.csv").digest,
        with_cells(state=pl.when(pl.col("state") == "pending").then(pl.lit("done")).otherwise(pl.col("state"))),
        replace(multi, table=pl.concat([multi.table[:1], multi.table[1:]], rechunk=False)).digest,
    ]
    assert set(same) == {multi.digest}
    changed = [
        replace(multi, table=multi.table.with_columns(label=pl.Series([1, 1, 0]))).digest,
        replace(multi, table=multi.table.with_columns(ok=pl.Series([True, True, False]))).digest,
        replace(multi, table=multi.table.with_columns(age=pl.Series([0.5, 0.0, 2.0]))).digest,
        replace(multi, table=multi.table.with_columns(sample_id=pl.Series(["a", "bc", ""]))).digest,
        replace(multi, table=multi.table.rename({"label": "target"})).digest,
        replace(multi, recipes={**multi.recipes, "side": "f" * 16}).digest,
        replace(multi, multi="max").digest,
        with_cells(key=pl.when(pl.col("ordinal") == 1).then(pl.lit(b"x" * 32)).otherwise(pl.col("key"))),
    ]
    assert len({multi.digest, *changed}) == len(changed) + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "a/b"}, "name 'a/b': must not be empty or hold slashes"),
        ({"table": pl.DataFrame({"id": ["a"]})}, "table: the first column must be `sample_id` of text"),
        ({"table": pl.DataFrame({"sample_id": ["a"]})}, "sample numbers reach beyond the 1 rows of the table"),
        ({"recipes": {"top": "f" * 16}}, r"recipes: none for the views \['side'\]"),
        ({"cells": pl.DataFrame({"sample": [1]})}, "cells: columns are"),
    ],
)
def test_what_is_no_binding(multi, change, message):
    with pytest.raises(InputError, match=message):
        replace(multi, **change)


def test_cells_that_make_no_sense(multi):
    with pytest.raises(InputError, match=r"unknown states \['finished'\]; known: done, absent, failed, pending"):
        replace(multi, cells=multi.cells.with_columns(state=pl.lit("finished")))
    with pytest.raises(InputError, match="cells: a key has 32 bytes"):
        replace(multi, cells=multi.cells.with_columns(key=pl.lit(b"short")))
    with pytest.raises(InputError, match="cells: a sample, view and ordinal comes twice"):
        replace(multi, cells=pl.concat([multi.cells, multi.cells[:1]]))


def test_unknown_datasets_and_recipes(filled, multi):
    with FeatureStore(filled.path, write=True) as store:
        with pytest.raises(InputError, match=r"no dataset 'bird'. Did you mean 'birds'?"):
            store.binding("bird")
        with pytest.raises(InputError, match="no recipe 'ffffffffffffffff'"):
            store.bind(replace(multi, recipes={"side": "f" * 16, "top": "f" * 16}))


def test_samples_are_found_by_key_over_all_datasets(filled, multi, kit):
    with FeatureStore(filled.path, write=True) as store:
        store.bind(multi)
        keys = {key.tobytes() for key in kit.keys([2, 90])}
        assert samples_with(store._index, keys) == ["bird-2", "a", "b"]
        assert samples_with(store._index, {b"?" * 32}) == []


def test_a_damaged_binding_is_noticed(filled):
    store = FeatureStore(filled.path, write=True)
    with store._index.writing() as connection:
        (keys,) = connection.execute("SELECT keys FROM bindings").fetchone()
        connection.execute("UPDATE bindings SET keys = ?", (bytes([keys[0] ^ 1]) + keys[1:],))
    with pytest.raises(CorruptionError, match=r"dataset 'birds' is damaged. Run extract on /data/birds.csv again"):
        store.binding("birds")
    store.close()
