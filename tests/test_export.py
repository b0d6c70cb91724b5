import sys
from importlib import import_module

import numpy as np
import polars as pl
import pytest
import xarray
from stage_two import WIDTH, command, write_store

from featurecache.dataset import FeatureDataset
from featurecache.errors import DependencyError

module = import_module("featurecache.export")  # the attribute `featurecache.export` is the function


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("export"), taps=("penultimate@none", "layer4@avg"))


@pytest.fixture
def dataset(store):
    return FeatureDataset(store, dataset="m", target="label", tap=["layer4", "penultimate"])


@pytest.fixture(autouse=True)
def _several_parts(monkeypatch):
    monkeypatch.setattr(module, "PART", 33)


def test_arrow_has_ids_columns_and_a_list_a_tap_with_null_where_a_view_is_missing(dataset):
    frame = dataset.arrow()
    assert frame.columns[:2] == ["sample_id", "a"]
    assert frame.columns[-4:] == [f"{view}.{tap}" for view in "ab" for tap in ("layer4@avg", "penultimate@none")]
    assert frame.schema["b.layer4@avg"] == pl.Array(pl.Float32, WIDTH)
    x = dataset.numpy()[0]
    there = dataset.present[:, 1]
    assert frame["b.layer4@avg"].is_null().to_list() == (~there).tolist()
    np.testing.assert_array_equal(frame["b.layer4@avg"].drop_nulls().to_numpy(), x[there][:, 2 * WIDTH : 3 * WIDTH])


class Stream:
    """A table that shows nothing but Arrow's C interface, as another library sees it."""

    def __init__(self, table):
        self.__arrow_c_stream__ = table.__arrow_c_stream__


def test_another_arrow_library_takes_it(dataset):
    assert pl.DataFrame(Stream(dataset.arrow())).equals(dataset.arrow())


def test_xarray_has_named_dimensions(dataset):
    found = dataset.xarray()
    assert found["a.layer4@avg"].dims == ("sample", "features")
    assert found.sizes == {"sample": 80, "features": WIDTH}
    name = str(dataset.sample_ids[7])
    np.testing.assert_array_equal(found["a.layer4@avg"].sel(sample=name), dataset.numpy()[0][7, :WIDTH])
    assert found["label"].sel(sample=name) == "yes"
    assert isinstance(found, xarray.Dataset)


def test_without_xarray_the_extra_is_named(dataset, monkeypatch):
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(DependencyError, match=r"pip install 'featurecache\[xarray\]'"):
        dataset.xarray()


def test_xarray_of_taps_of_other_sizes_and_other_targets(store):
    several = FeatureDataset(store, dataset="m", target=["l0", "l1"], tap="penultimate").xarray()
    assert np.isnan(several["l0"]).any()
    assert FeatureDataset(store, dataset="m", tap="penultimate").xarray().data_vars.keys() == {
        "a.penultimate@none", "b.penultimate@none",
    }  # fmt: skip


@pytest.mark.parametrize("format", ["parquet", "csv", "npz"])
def test_files_hold_what_the_dataset_has(store, dataset, tmp_path, format):
    out = tmp_path / f"features.{format}"
    words = ["export", store, "--dataset", "m", "--tap", "layer4", "--tap", "penultimate", "--format", format]
    done = command(*words, "--out", out, "--json")
    assert done.status == 0, done.err
    assert done.json["samples"] == 80
    assert done.json["features"] == 4 * WIDTH
    assert done.json["outputs"] == [str(out)]
    assert done.json["bytes"] == out.stat().st_size
    x = dataset.numpy()[0]
    if format == "parquet":
        assert pl.read_parquet(out).equals(dataset.arrow())
    elif format == "csv":
        frame = pl.read_csv(out, infer_schema_length=None)
        assert frame["sample_id"].to_list() == dataset.sample_ids.tolist()
        np.testing.assert_allclose(frame[:, -4 * WIDTH :].cast(pl.Float32).fill_null(np.nan).to_numpy(), x, rtol=1e-6)
        assert frame.columns[-1] == "b.penultimate@none.5"
    else:
        with np.load(out, allow_pickle=False) as found:
            np.testing.assert_array_equal(found["x"], x)
            assert found["sample_id"].tolist() == dataset.sample_ids.tolist()
            assert found["columns"][-1] == "b.penultimate@none.5"
            assert set(found["label"]) == {"no", "yes"}
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    again = command(*words, "--out", out)
    assert again.status == 2
    assert "exists. Choose another --out, or replace a file with --overwrite" in again.err
    assert command(*words, "--out", out, "--overwrite", "--quiet").out == f"{out}\n"


def test_what_can_not_be_exported(store, dataset, tmp_path):
    assert "no such folder. Make it" in command("export", store, "--dataset", "m", "--tap", "layer4", "--out",
                                       tmp_path / "no" / "x.csv").err  # fmt: skip
    assert "holds several taps" in command("export", store, "--dataset", "m", "--out", tmp_path / "x").err
    table = dataset.table.rename({"kind": "columns"})
    with pytest.raises(module.InputError, match="columns columns of the manifest have the name of exported features"):
        module.export(dataset.features, table, tmp_path / "x.npz", format="npz")
    with pytest.raises(module.InputError, match=r"--format 'parket': Did you mean 'parquet'"):
        module.export(dataset.features, table, tmp_path / "x", format="parket")
