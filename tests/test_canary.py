"""Drifted numbers are noticed before a row is added."""

from __future__ import annotations

import numpy as np
import pytest
from extract_kit import counts, features, image, recipe_ids, run, tree, write_images
from PIL import Image

from featurecache import canary
from featurecache.canary import KEPT, canary_batch, check_canary, drift, sing, synthetic_images, versions
from featurecache.data.preprocessing import Preprocessing
from featurecache.data.readers import get_reader
from featurecache.errors import StoreError
from featurecache.extract import extract
from featurecache.store.store import FeatureStore


@pytest.fixture
def store(tmp_path):
    run(write_images(tmp_path / "data", 4), tmp_path / "store")
    return tmp_path / "store"


def drifting(monkeypatch, factor: float) -> None:
    def off(*args):
        song = sing(*args)
        return {tap: (np.array(rows) * factor).tolist() for tap, rows in song.items()}

    monkeypatch.setitem(extract.__globals__, "sing", off)


def new_image(store) -> None:
    Image.fromarray(255 - np.asarray(image(1))).save(store.parent / "data" / "image0001.png")


def test_a_process_that_drifts_may_not_append(store, monkeypatch):
    new_image(store)
    drifting(monkeypatch, 1.01)
    monkeypatch.setitem(extract.__globals__, "versions", versions)
    monkeypatch.setattr(canary, "versions", lambda: {**versions(), "torch": "99.1"})
    before, chunks = features(store), tree(store / "features.zarr" / recipe_ids(store)[0])
    with pytest.raises(StoreError) as caught:
        run(store.parent / "data" / "samples.csv", store)
    message = str(caught.value)
    assert f"recipe {recipe_ids(store)[0]}: this process computes other features than the one that made it" in message
    assert "Tap penultimate@none drifts by 0.0" in message
    assert f"torch {versions()['torch']} then, 99.1 now" in message
    assert "Nothing was added to it." in message
    assert tree(store / "features.zarr" / recipe_ids(store)[0]) == chunks
    after = features(store)
    assert len(after) == 3, "the changed image has no row; it is not served by the old one"
    assert all(np.array_equal(after[sample], before[sample]) for sample in after)


def test_within_tolerance_it_may(store, monkeypatch):
    new_image(store)
    drifting(monkeypatch, 1.0001)
    assert counts(run(store.parent / "data" / "samples.csv", store)) == (1, 3, 0)


def test_what_is_reused_needs_no_canary(store, monkeypatch):
    drifting(monkeypatch, 2.0)
    assert counts(run(store.parent / "data" / "samples.csv", store)) == (0, 4, 0)


def test_the_canary_is_kept_beside_the_recipe(store):
    (info,) = FeatureStore(store).recipes()
    assert set(info.canary) == {"penultimate@none"}
    assert np.array(info.canary["penultimate@none"]).shape == (4, 3)
    assert info.recorded["versions"]["torch"]
    assert info.recorded["device"] == "cpu"


def test_a_body_that_gives_nan_for_a_canary_can_still_append(tmp_path):
    """Not finite is None in JSON, and equal to itself."""
    manifest = write_images(tmp_path / "data", 3)
    options = {"body": "plugin_extract:unsteady"}
    run(manifest, tmp_path / "store", **options)
    (info,) = FeatureStore(tmp_path / "store").recipes()
    assert None in info.canary["penultimate@none"][0]
    Image.fromarray(255 - np.asarray(image(1))).save(tmp_path / "data" / "image0001.png")
    assert run(manifest, tmp_path / "store", **options).computed == 1


def test_drift():
    then = [[0.0, 1.0], [2.0, 3.0]]
    assert drift(then, then) == 0
    assert drift([[0.0, 1.0], [2.0, 3.1]], then) == pytest.approx(0.1 / 2)
    assert drift([[0.0, 1.0]], then) == float("inf")
    assert drift([[None, 1.0], [2.0, 3.0]], then) == float("inf")
    assert drift([[None, 1.0], [2.0, 3.0]], [[None, 1.0], [2.0, 3.0]]) == 0
    assert drift([[5.0], [5.0]], [[5.0], [5.0]]) == 0
    check_canary({"a": then}, {"a": then}, "fp32", {}, "r")
    with pytest.raises(StoreError, match="Versions: torch absent then"):
        check_canary({}, {"a": then}, "fp32", {"versions": {**versions(), "torch": "absent"}}, "r")
    with pytest.raises(StoreError, match="the same, so the hardware or its kernels differ"):
        check_canary({"a": [[0.0, 1.0], [2.0, 9.0]]}, {"a": then}, "bf16", {"versions": versions()}, "r")


def test_inputs_are_fixed_and_differ():
    images = synthetic_images()
    sums = [int(one.astype(np.int64).sum()) for one in images]
    assert sums == [25067520, 24986112, 25054208, 19169280]
    assert all(one.shape == (256, 256, 3) and one.dtype == np.uint8 for one in images)


@pytest.mark.parametrize(("reader", "channels"), [("image", 1), ("image", 3), ("array", 2), ("array", 5)])
def test_every_reader_and_channel_count_has_inputs(reader, channels):
    preprocessing = Preprocessing(channels=channels, resize=40, crop=32, mean=(0.5,) * channels, std=(0.5,) * channels)
    batch = canary_batch(get_reader(reader, channels=channels), preprocessing)
    assert batch.shape == (4, channels, 32, 32)


def test_few_values_are_kept(tmp_path):
    run(write_images(tmp_path / "data", 1), tmp_path / "store", tap="bn1")
    (info,) = FeatureStore(tmp_path / "store").recipes()
    rows = next(iter(info.canary.values()))
    assert len(rows) == 4
    assert all(len(row) <= KEPT for row in rows)
