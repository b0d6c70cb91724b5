"""Rows go straight to where they are wanted: mapped or decoded, in order or not, by numpy or by torch."""

import numpy as np
import pytest

from featurecache.features.stored import gather_rows as by_torch
from featurecache.store.chunks import as_slice
from featurecache.store.format import CODECS
from featurecache.store.store import FeatureStore
from featurecache.store.windows import gather_rows as by_numpy

TAP = "penultimate@none"


@pytest.mark.parametrize("gather", [by_numpy, by_torch])
@pytest.mark.parametrize("codec", CODECS)
def test_rows_fill_a_part_of_wider_rows(tmp_path, kit, codec, gather, monkeypatch):
    monkeypatch.setattr("featurecache.store.windows.PIECE_BYTES", 100)
    filled = kit.fill(tmp_path / "store", codec=codec)
    store = FeatureStore(filled.path)
    ids = store.rows(filled.recipe.id, kit.keys(filled.numbers))
    expected = kit.features(filled.numbers)[TAP]
    n, width = expected.shape
    for order in (np.arange(n), np.random.default_rng(0).permutation(n), np.array([3, 3, n - 1, 0]), np.arange(5, 30)):
        wide = np.full((len(order), width + 3), 7, expected.dtype)
        part = wide[:, 2 : 2 + width]
        assert store.read(filled.recipe.id, TAP, ids[order], part, gather) is part
        np.testing.assert_array_equal(part, expected[order])
        assert (wide[:, :2] == 7).all()
        assert (wide[:, -1] == 7).all()
        np.testing.assert_array_equal(store.read(filled.recipe.id, TAP, ids[order]), expected[order])


def test_neighbours_are_a_slice():
    assert as_slice(np.array([4, 5, 6])) == slice(4, 7)
    assert as_slice(np.array([9])) == slice(9, 10)
    for other in ([4, 6, 5], [4, 4, 6], [6, 5, 4], [1, 3]):
        np.testing.assert_array_equal(np.arange(10)[as_slice(np.array(other))], other)
