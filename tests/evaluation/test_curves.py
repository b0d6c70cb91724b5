import numpy as np
import pytest
from sklearn.metrics import roc_curve

from featurecache.evaluation.curves import curve_data

RNG = np.random.default_rng(1)
N = 240
POSITIVE = RNG.random(N) < 0.3
SCORE = np.clip(0.3 * POSITIVE + 0.7 * RNG.random(N), 0, 1).round(2)
GROUPS = np.arange(N) // 2


def test_net_benefit_is_that_of_the_definition():
    found = curve_data(POSITIVE, SCORE, GROUPS, n=0)
    for cut, model, every in zip(*(found["benefit"][name] for name in ("threshold", "model", "all")), strict=True):
        said = SCORE >= cut
        odds = cut / (1 - cut)
        expected = ((said & POSITIVE).sum() - odds * (said & ~POSITIVE).sum()) / N
        assert model == pytest.approx(expected, abs=1e-3)
        assert every == pytest.approx(POSITIVE.mean() - odds * (1 - POSITIVE.mean()), abs=1e-3)
    assert "low" not in found["roc"]


def test_bands_hold_the_curve_and_widen_with_fewer_groups():
    widths = []
    for groups in (np.arange(N), np.arange(N) // 24):
        found = curve_data(POSITIVE, SCORE, groups, n=200)
        fpr, tpr, _ = roc_curve(POSITIVE, SCORE)
        low, high = np.array(found["roc"]["low"]), np.array(found["roc"]["high"])
        curve = np.interp(found["roc"]["fpr"], fpr, tpr)
        inside = (low - 0.02 <= curve) & (curve <= high + 0.02)
        assert inside.mean() > 0.95
        widths.append((high - low).mean())
        assert all(a <= b for a, b in zip(found["pr"]["low"], found["pr"]["high"], strict=True))
    assert widths[0] < widths[1]
    assert curve_data(POSITIVE, SCORE, GROUPS, n=50) == curve_data(POSITIVE, SCORE, GROUPS, n=50)
