"""Features seen otherwise agree with the same done by hand on the array."""

from __future__ import annotations

import numpy as np
import pytest

from featurecache.features.features import ArrayFeatures, Block, Stored
from featurecache.features.rearranged import OtherPartners, SomeViews, WithoutView, shuffle_partners
from featurecache.heads.contract import ChunkedFeatures

BLOCKS = (Block("a", "x", 0, 2, (2,)), Block("b", "x", 2, 5, (3,)), Block("a", "y", 5, 6, (1,)))
ROWS = np.array([3, 0, 3], dtype=np.int64)


@pytest.fixture
def features():
    return ArrayFeatures(np.random.default_rng(0).normal(size=(12, 6)).astype(np.float32), BLOCKS)


def test_some_views_are_their_columns_without_gaps(features):
    some = SomeViews(features, ("a",))
    assert some.shape == (12, 3)
    assert [(b.tap, b.start, b.stop) for b in some.blocks] == [("x", 0, 2), ("y", 2, 3)]
    np.testing.assert_array_equal(some[ROWS], features.x[ROWS][:, [0, 1, 5]])


def test_a_view_taken_away_is_nan_and_the_source_stays(features):
    before = features.x.copy()
    found = WithoutView(features, "a")[ROWS]
    assert np.isnan(found[:, [0, 1, 5]]).all()
    np.testing.assert_array_equal(found[:, 2:5], before[ROWS][:, 2:5])
    np.testing.assert_array_equal(features.x, before)


def test_partners_are_exchanged_within_a_side_only(features):
    sides = [np.arange(0, 6), np.arange(6, 8), np.arange(8, 11)]
    other = shuffle_partners(features, sides, seed=1)
    everything = np.arange(12, dtype=np.int64)
    found = other[everything]
    np.testing.assert_array_equal(found[:, [0, 1, 5]], features.x[:, [0, 1, 5]])  # the first view keeps its place
    order = other.order["b"]
    np.testing.assert_array_equal(found[:, 2:5], features.x[order][:, 2:5])
    for side in sides:
        assert sorted(order[side]) == side.tolist()
    assert order[11] == 11
    assert (order[:6] != np.arange(6)).any()
    np.testing.assert_array_equal(shuffle_partners(features, sides, seed=1).order["b"], order)
    assert (shuffle_partners(features, sides, seed=2).order["b"] != order).any()


@pytest.mark.parametrize("make", [lambda f: SomeViews(f, ("a",)), lambda f: WithoutView(f, "b"),
                                  lambda f: shuffle_partners(f, [np.arange(9)], seed=0)])  # fmt: skip
def test_features_are_read_as_those_that_they_are_made_of(features, make):
    stored = make(ChunkedFeatures(features.x.astype(np.float16), BLOCKS, buffer_rows=4))
    assert isinstance(stored, Stored)
    assert (stored.dtype, stored.buffer_rows, stored.in_ram) == (np.float16, 4, False)
    assert stored.chunks(np.array([1, 40])).tolist() == [0, 1]
    assert stored.gather(ROWS).dtype == np.float16
    out = np.zeros((3, stored.shape[1]), np.float16)
    assert stored.gather(ROWS, out) is out
    np.testing.assert_array_equal(out, stored.gather(ROWS))
    np.testing.assert_array_equal(stored[ROWS], make(ArrayFeatures(features.x.astype(np.float16), BLOCKS))[ROWS])
    plain = make(features)
    assert (plain.dtype, plain.buffer_rows) == (np.float32, None)


def test_whether_all_views_are_there_is_found_by_what_is_left_of_them(features):
    x = features.x.copy()
    x[3, 2:5] = np.nan  # sample 3 lacks view b
    holed = ArrayFeatures(x, BLOCKS)
    everything = np.arange(12, dtype=np.int64)
    assert SomeViews(holed, ("a",)).complete(everything)
    assert not SomeViews(holed, ("b",)).complete(everything)
    assert SomeViews(holed, ("b",)).complete(everything[4:])
    assert not WithoutView(features, "a").complete(ROWS)
    other = OtherPartners(holed, {"b": np.roll(everything, 1)})  # sample 4 gets what sample 3 lacks
    assert other.complete(np.array([3]))
    assert not other.complete(np.array([4]))
