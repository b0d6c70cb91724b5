"""Drifted numbers are noticed before a row is added."""

from __future__ import annotations

import numpy as np
import pytest
from extract_kit import counts, features, image, recipe_ids, run, tree, write_images
from PIL import Image

from featurecache.bodies.engines.torch import TorchEngine
from featurecache.data.preprocessing import Preprocessing
from featurecache.data.readers import get_reader
from featurecache.errors import StoreError
from featurecache.stageone import canary
from featurecache.stageone.canary import KEPT, canary_batch, check_canary, drift, synthetic_images, versions
from featurecache.store.store import FeatureStore


@pytest.fixture
def store(tmp_path):
    run(write_images(tmp_path / "data", 4), tmp_path / "store")
    return tmp_path / "store"


def drifting(monkeypatch, factor: float) -> None:
    """Another kernel: what comes from the device is off."""
    collect = TorchEngine.collect
    monkeypatch.setattr(TorchEngine, "collect", lambda self, handle: [a * factor for a in collect(self, handle)])


def new_image(store) -> None:
    Image.fromarray(255 - np.asarray(image(1))).save(store.parent / "data" / "image0001.png")


def test_a_process_that_drifts_may_not_append(store, monkeypatch):
    new_image(store)
    drifting(monkeypatch, 1.01)
    monkeypatch.setattr(canary, "versions", lambda: {**versions(), "torch": "99.1"})
    before, chunks = features(store), tree(store / "features.zarr" / recipe_ids(store)[0])
    with pytest.raises(StoreError) as caught:
        run(store.parent / "data" / "samples.csv", store)
    message = str(caught.value)
    assert f"recipe {recipe_ids(store)[0]}: this process computes other features than the one that made it" in message
    assert "Tap penultimate@none drifts by 0.1" in message
    assert f"torch {versions()['torch']} then, 99.1 now" in message
    assert "Nothing was added to it." in message
    assert tree(store / "features.zarr" / recipe_ids(store)[0]) == chunks
    after = features(store)
    assert len(after) == 3, "the changed image has no row; it is not served by the old one"
    assert all(np.array_equal(after[sample], before[sample]) for sample in after)


def test_within_tolerance_it_may(store, monkeypatch):
    new_image(store)
    drifting(monkeypatch, 1.00001)
    assert counts(run(store.parent / "data" / "samples.csv", store)) == (1, 3, 0)


def test_what_is_reused_needs_no_canary(store, monkeypatch):
    drifting(monkeypatch, 2.0)
    assert counts(run(store.parent / "data" / "samples.csv", store)) == (0, 4, 0)


def test_the_canary_is_kept_beside_the_recipe(store):
    (info,) = FeatureStore(store).recipes()
    assert info.canary["version"] == 1
    assert set(info.canary["taps"]) == {"penultimate@none"}
    assert np.array(info.canary["taps"]["penultimate@none"]).shape == (4, 3)
    assert info.recorded["versions"]["torch"]
    assert info.recorded["device"] == "cpu"


def test_a_body_that_gives_nan_for_a_canary_can_still_append(tmp_path):
    """Not finite is None in JSON, and equal to itself."""
    manifest = write_images(tmp_path / "data", 3)
    options = {"body": "plugin_extract:unsteady"}
    run(manifest, tmp_path / "store", **options)
    (info,) = FeatureStore(tmp_path / "store").recipes()
    assert None in info.canary["taps"]["penultimate@none"][0]
    Image.fromarray(255 - np.asarray(image(1))).save(tmp_path / "data" / "image0001.png")
    assert run(manifest, tmp_path / "store", **options).computed == 1


def song(rows):
    return {"version": 1, "taps": {"a": rows}}


def test_drift():
    then = [[0.0, 1.0], [2.0, 3.0]]
    assert drift(then, then) == 0
    assert drift([[0.0, 1.0], [2.0, 3.1]], then) == pytest.approx(0.1 / 2)
    assert drift([[0.0, 1.0]], then) == float("inf")
    assert drift([[None, 1.0], [2.0, 3.0]], then) == float("inf")
    assert drift([[None, 1.0], [2.0, 3.0]], [[None, 1.0], [2.0, 3.0]]) == 0
    assert drift([[5.0], [5.0]], [[5.0], [5.0]]) == 0
    kept = song(then)
    check_canary(song(then), kept, "fp32", {}, "r")
    with pytest.raises(StoreError, match="Versions: torch absent then"):
        check_canary({"version": 1, "taps": {}}, kept, "fp32", {"versions": {**versions(), "torch": "absent"}}, "r")
    with pytest.raises(StoreError, match="the same, so the hardware or its kernels differ"):
        check_canary(song([[0.0, 1.0], [2.0, 9.0]]), kept, "bf16", {"versions": versions()}, "r")


@pytest.mark.parametrize(("kept", "found"), [(None, "none"), ({"version": 2, "taps": {}}, "one of version 2")])
def test_without_a_canary_to_compare_with_nothing_is_added(kept, found):
    with pytest.raises(StoreError, match=f"compares canaries of version 1, and the recipe keeps {found}"):
        check_canary(song([[0.0]]), kept, "fp32", {}, "r")


def test_inputs_are_fixed_and_differ():
    images = synthetic_images()
    sums = [int(one.astype(np.int64).sum()) for one in images]
    assert sums == [25051136, 24942449, 24627180, 25247744]
    assert all(one.shape == (256, 256, 3) and one.dtype == np.uint8 for one in images)


@pytest.mark.parametrize(("reader", "channels"), [("image", 1), ("image", 3), ("array", 2), ("array", 5)])
def test_every_reader_and_channel_count_has_inputs(reader, channels):
    preprocessing = Preprocessing(channels=channels, resize=40, crop=32, mean=(0.5,) * channels, std=(0.5,) * channels)
    batch = canary_batch(get_reader(reader, channels=channels), preprocessing)
    assert batch.shape == (4, channels, 32, 32)


def test_few_values_are_kept(tmp_path):
    run(write_images(tmp_path / "data", 1), tmp_path / "store", tap="bn1")
    (info,) = FeatureStore(tmp_path / "store").recipes()
    rows = next(iter(info.canary["taps"].values()))
    assert len(rows) == 4
    assert all(len(row) <= KEPT for row in rows)
