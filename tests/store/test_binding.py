import datetime as dt
import decimal
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from featurecache.errors import CorruptionError, InputError
from featurecache.store import binding as module
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
        store.bind(multi)
        found = store.resolve(multi, "top", other.id)
        assert found.rows.tolist() == [-1, 0, -1, -1, -1]
        # The third failed in the recipe that it is bound to; that says nothing of this one.
        assert found.state.tolist() == ["pending", "done", "pending", "pending", "pending"]
        assert store.resolve(multi, "top").state[2] == "failed"
        assert store.resolve(multi, "top", filled.recipe.digest).state[2] == "failed"
        store.add_failures(other.id, [(kit.keys([91])[0].tobytes(), "image/1", "truncated")])
        states = FeatureStore(filled.path).resolve(multi, "top", other.id).state.tolist()
        assert states == ["pending", "done", "pending", "failed", "pending"]


def test_a_cell_of_unknown_content_that_failed_has_failed_in_every_recipe(filled, multi, kit):
    other = kit.recipe(precision="fp32")
    unread = pl.col("key").is_null() & (pl.col("state") == "pending")
    binding = replace(
        multi,
        cells=multi.cells.with_columns(state=pl.when(unread).then(pl.lit("failed")).otherwise(pl.col("state"))),
    )
    with FeatureStore(filled.path, write=True) as store:
        store.add_recipe(other, kit.TAPS)
        assert store.resolve(binding, "side", other.id).state.tolist() == ["pending", "absent", "failed"]


def test_a_cell_that_failed_and_has_a_row_by_now_is_done(filled, multi, kit):
    with FeatureStore(filled.path, write=True) as store:
        store.bind(multi)
        store.add_failures(filled.recipe.id, [(kit.keys([90])[0].tobytes(), "image/1", "truncated")])
        assert store.resolve(multi, "top").state[2] == "failed"
        with store.appender(filled.recipe.id) as appender:
            appender.append(kit.keys([90]), kit.features([90]))
        assert store.resolve(multi, "top").state[2] == "done"
        assert store.failures(filled.recipe.id) == {}


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


def test_the_digest_covers_table_cells_and_recipes_but_not_states(multi):
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


def test_the_digest_changes_when_unknown_content_becomes_known(multi):
    found = pl.when(pl.col("key").is_null() & (pl.col("state") == "pending")).then(pl.lit(b"k" * 32))
    extracted = replace(multi, cells=multi.cells.with_columns(key=found.otherwise(pl.col("key"))))
    assert extracted.digest != multi.digest


def with_column(binding, series):
    return replace(binding, table=binding.table.with_columns(series.alias("x"))).digest


@pytest.mark.parametrize(
    ("series", "same"),
    [
        (pl.Series([1, None, 3], dtype=pl.Int64), pl.Series([1, None, 3], dtype=pl.UInt8)),
        (pl.Series([2**63, None, 3], dtype=pl.UInt64), pl.Series([2**63, None, 3], dtype=pl.Int128)),
        (pl.Series([0.5, None, 2], dtype=pl.Float64), pl.Series([0.5, None, 2], dtype=pl.Float32)),
        (pl.Series([float("nan"), 1, 2]), pl.Series([-float("nan"), 1, 2])),
        (pl.Series(["a", None, "b"]), pl.Series(["a", None, "b"], dtype=pl.Categorical)),
        (pl.Series(["a", None, "b"]), pl.Series(["a", None, "b"], dtype=pl.Enum(["b", "a"]))),
        (
            pl.Series([dt.datetime(2024, 5, 1), None, None], dtype=pl.Datetime("ms")),
            pl.Series([dt.datetime(2024, 5, 1), None, None], dtype=pl.Datetime("ns")),
        ),
        (
            pl.Series([dt.timedelta(days=1), None, None], dtype=pl.Duration("us")),
            pl.Series([dt.timedelta(days=1), None, None], dtype=pl.Duration("ns")),
        ),
        (pl.Series([dt.date(2024, 5, 1), None, None]), pl.Series(["2024-05-01", None, None])),
        (pl.Series([decimal.Decimal("1.50"), None, None]), pl.Series(["1.50", None, None])),
        (pl.Series([[1, None], [], None]), pl.Series(["[1, null]", "[]", None])),
        (
            pl.Series([{"a": dt.date(2024, 5, 1), "b": b"\1"}, None, None]),
            pl.Series(['{"a": "2024-05-01", "b": "01"}', None, None]),
        ),
        (pl.Series([None, None, None]), pl.Series([None, None, None], dtype=pl.String)),
    ],
)
def test_the_digest_knows_values_and_not_how_polars_holds_them(multi, series, same):
    assert with_column(multi, series) == with_column(multi, same)
    assert with_column(multi, series) != with_column(multi, series.reverse()) or series.null_count() == 3


def test_columns_of_different_kinds_have_different_digests(multi):
    columns = [
        pl.Series([1, 0, 1]), pl.Series([1.0, 0.0, 1.0]), pl.Series([True, False, True]), pl.Series(["1", "0", "1"]),
        pl.Series([b"1", b"0", b"1"]),
    ]  # fmt: skip
    assert len({with_column(multi, column) for column in columns}) == len(columns)


def test_a_bound_digest_is_kept_even_if_the_computation_should_change(filled, multi, monkeypatch):
    """A later version, or another polars, that would compute another digest must not call the dataset damaged."""
    with FeatureStore(filled.path, write=True) as store:
        store.bind(multi)
    before = multi.digest
    monkeypatch.setattr(module, "hash_table", lambda sha256, frame: sha256.update(b"?"))
    found = FeatureStore(filled.path).binding("multi")
    assert found.digest == before
    assert replace(found).digest != before


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


@pytest.mark.parametrize("column", [*module.STORED[1:], "sha256"])
def test_a_damaged_binding_is_noticed(filled, column):
    store = FeatureStore(filled.path, write=True)
    with store._index.writing() as connection:
        (value,) = connection.execute(f"SELECT {column} FROM bindings").fetchone()
        if isinstance(value, str):
            changed = value[:-1] + ("x" if value[-1] != "x" else "y")
        else:
            changed = bytes([value[0] ^ 1]) + value[1:]
        connection.execute(f"UPDATE bindings SET {column} = ?", (changed,))
    with pytest.raises(CorruptionError, match=r"dataset 'birds' is damaged. Run extract on /data/birds.cs[vx] again"):
        store.binding("birds")
    store.close()


def test_a_binding_that_this_polars_can_not_read(filled, monkeypatch):
    def refuse(source):
        raise pl.exceptions.ComputeError("unknown encoding")

    monkeypatch.setattr(module.pl, "read_parquet", refuse)
    with pytest.raises(CorruptionError, match=r"dataset 'birds' can not be read. Run extract .* \(unknown encoding\)"):
        FeatureStore(filled.path).binding("birds")
