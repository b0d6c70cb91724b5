import numpy as np
import pytest
from sklearn.calibration import calibration_curve

from featurecache.data.targets import Target
from featurecache.evaluation.calibration import reliability
from featurecache.evaluation.metrics import compute_metrics


def test_binary_against_scikit_learn():
    rng = np.random.default_rng(0)
    p = rng.random(500) * 0.98 + 0.01
    y = (rng.random(500) < p**2).astype(np.int64)
    target = Target("binary", ("y",), ("0", "1"), y)
    scores = np.stack([1 - p, p], axis=1)
    curve = reliability(target, scores, bins=10)["y"]
    frequency, confidence = calibration_curve(y, p, n_bins=10)
    np.testing.assert_allclose(curve.frequency, frequency)
    np.testing.assert_allclose(curve.confidence, confidence)
    assert curve.count.sum() == 500
    gap = np.abs(curve.frequency - curve.confidence)
    assert curve.ece == pytest.approx((gap * curve.count).sum() / 500)
    assert reliability(target, scores)["y"].ece == compute_metrics(target, scores)["ece"]


def test_multiclass_is_about_the_class_chosen():
    target = Target("multiclass", ("y",), tuple("abc"), np.array([0, 1, -1, 2]))
    p = np.array([[0.8, 0.1, 0.1], [0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.0, 0.0, 1.0]])
    curve = reliability(target, p)["y"]
    np.testing.assert_allclose(curve.confidence, [0.8, 1.0])
    np.testing.assert_allclose(curve.frequency, [0.5, 1.0])
    assert curve.count.tolist() == [2, 1]
    assert curve.ece == pytest.approx(0.2)


def test_multilabel_has_a_curve_per_label():
    y = np.array([[0, np.nan, 1], [1, np.nan, 0]], dtype=np.float32)
    p = np.array([[0.2, 0.5, np.nan], [0.9, 0.5, np.nan]])
    found = reliability(Target("multilabel", ("a", "b", "c"), (), y), p)
    assert list(found) == ["a"]
    assert found["a"].count.tolist() == [1, 1]


def test_regression_has_none():
    assert reliability(Target("regression", ("u",), (), np.zeros((2, 1))), np.zeros((2, 1))) == {}
