import math
import signal

import numpy as np
import pytest
import xgboost as xgb

from featurecache.data.targets import Target
from featurecache.features import features as features_module
from featurecache.features.features import ArrayFeatures, Block
from featurecache.heads import bins
from featurecache.heads.base import Fold
from featurecache.heads.bins import column_groups, sketch_bytes, with_bins
from featurecache.heads.xgboost import XGBoostHead
from featurecache.machine.interrupts import Held, Interrupted

N = 3000


def columns():
    """(N, 16) float32 of what columns can be like: activations, ties, gaps, nothing at all."""
    random = np.random.default_rng(0)
    x = random.standard_normal((N, 16)).astype(np.float32)
    x[:, 1] = np.maximum(x[:, 1], 0).astype(np.float16)
    x[:, 2], x[:, 3], x[:, 4] = 0, np.nan, -7
    x[:, 5] = random.integers(0, 3, N)
    x[:, 6] = random.integers(0, 17, N)
    x[:, 7] = random.integers(0, 18, N)
    x[:, 8] *= 1e30
    x[:, 9] *= 1e-30
    x[:, 10] = np.arange(N)
    x[:, 11] = -np.arange(N)
    x[random.random(N) < 0.3, 12:14] = np.nan
    x[1:, 14] = np.nan
    x[:, 15] = np.exp(5 * x[:, 15])
    return x


def fold_of(x, y=None):
    y = np.arange(len(x)) % 2 if y is None else y
    features = ArrayFeatures(x, (Block("view", "tap", 0, x.shape[1], (x.shape[1],)),))
    return Fold(features, np.arange(len(x)), Target("binary", ("y",), ("a", "b"), y))


@pytest.mark.parametrize(("max_bin", "passes"), [(2, 2), (16, 2), (17, 2), (64, 2), (256, 2), (64, math.inf)])
def test_bins_are_those_of_all_columns_at_once(monkeypatch, max_bin, passes):
    """With rows without values after the second pass, and with the same rows in all of them."""
    monkeypatch.setattr(features_module, "MOST_ROWS", 1000)
    monkeypatch.setattr(bins, "_TO_BINS", passes)
    x = columns()
    found = with_bins(fold_of(x), max_bin, nthread=1, allowed=1, held=Held())
    starts, cuts = found.get_quantile_cut()
    expected = xgb.QuantileDMatrix(x, max_bin=max_bin).get_quantile_cut()
    np.testing.assert_array_equal(starts, expected[0])
    np.testing.assert_array_equal(cuts, expected[1])
    assert found.num_row() <= max_bin + 1


def test_xgboost_has_the_bins_after_two_passes():
    """Else the versions for which that is said should not be."""
    if bins._TO_BINS == math.inf:
        pytest.skip(f"not tried with xgboost {xgb.__version__}: it gets the rows in all passes")
    rows = bins._ToSketch(columns()[:, [0, 1, 15]])
    matrix = xgb.QuantileDMatrix(rows, max_bin=16)
    assert (rows._passed, bins._TO_BINS) == (4, 2)
    assert matrix.num_nonmissing() == 3 * N
    assert matrix.num_row() == N + 1


def test_the_sketch_of_a_column():
    """Twice as many values never take less, and the finest sketch holds them all."""
    sizes = [sketch_bytes(2**k, 64) for k in range(20)]
    assert sizes == sorted(sizes)
    assert sketch_bytes(0, 64) == 0
    assert sketch_bytes(100, 256) == 100 * (16 + 32 + 16)
    assert sketch_bytes(40_000, 64) == 2561 * (16 + 32 + 5 * 16)


@pytest.mark.parametrize(("allowed", "count"), [(0, 16), (10**6, 5), (10**9, 1)])
def test_groups_cover_every_column_once(allowed, count):
    groups = column_groups(1000, 70, 256, allowed)
    assert len(groups) == count
    assert np.concatenate([np.arange(70)[group] for group in groups]).tolist() == list(range(70))


def test_fewer_columns_than_groups():
    assert column_groups(1000, 3, 256, 0) == [slice(0, 1), slice(1, 2), slice(2, 3)]


def test_groups_whose_values_outweigh_the_sketches_are_not_made():
    assert len(column_groups(1_000_000, 2048, 256, 10**9)) == 13
    assert column_groups(20_000_000, 2048, 256, 10**9) == [slice(0, 2048)]


def test_what_xgboost_can_do_at_once_is_left_to_it():
    assert with_bins(fold_of(columns()), 16, nthread=1, allowed=10**9, held=Held()) is None


def test_bins_that_come_out_otherwise_are_not_used(monkeypatch):
    real = bins._columns

    def greater(matrix, values):
        found = real(matrix, values)
        found[0].cuts[-1] += 0.5
        return found

    monkeypatch.setattr(bins, "_columns", greater)
    assert with_bins(fold_of(columns()), 16, nthread=1, allowed=1, held=Held()) is None


def test_ctrl_c_ends_the_search():
    held = Held()
    held.caught = signal.SIGINT
    with pytest.raises(Interrupted):
        with_bins(fold_of(columns()), 16, nthread=1, allowed=1, held=held)


@pytest.mark.parametrize("memory", [None, 0])
def test_trees_on_bins_found_in_groups(monkeypatch, memory):
    monkeypatch.setattr(bins, "sketch_bytes", lambda n, max_bin: 1 << 40)
    made = []

    def noted(*given, **named):
        made.append(with_bins(*given, **named))
        return made[-1]

    monkeypatch.setattr("featurecache.heads.xgboost.with_bins", noted)
    settings = {"n_estimators": 5, "max_bin": 16, "max_depth": 4, "nthread": 1, "early_stopping_rounds": None}
    x = columns()
    y = (np.nan_to_num(x[:, 0] + x[:, 12]) > 0).astype(np.int64)
    head = XGBoostHead(settings, memory=memory).fit(fold_of(x, y), fold_of(x[:500], y[:500]))
    matrix = xgb.QuantileDMatrix(x, y, max_bin=16, feature_names=head.booster.feature_names)
    parameters = head.settings.parameters(head.seed, "cpu") | {"objective": "binary:logistic"}
    expected = xgb.train(parameters, matrix, 5)
    assert made[0] is not None
    assert head.fitted_["external_memory"] == (memory == 0)
    assert head.booster.get_dump(with_stats=True) == expected.get_dump(with_stats=True)
