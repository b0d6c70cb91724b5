"""Calibration: right where it should be, the same after run.json, and fitted on what it is given only."""

from __future__ import annotations

import json

import numpy as np
import pytest

from featurecache.data.targets import Target
from featurecache.errors import InputError, RunError
from featurecache.evaluation.calibration import Calibration, fit_calibration
from featurecache.evaluation.metrics import compute_metrics


def overconfident(task: str, n: int = 4000, *, factor: float = 3.0, seed: int = 0):
    """A target drawn from known probabilities, and those probabilities with their logits times `factor`."""
    rng = np.random.default_rng(seed)
    if task == "multilabel":
        logits = rng.normal(size=(n, 2)) * 1.2
        p = 1 / (1 + np.exp(-logits))
        y = (rng.random((n, 2)) < p).astype(np.float32)
        y[rng.random((n, 2)) < 0.1] = np.nan
        return Target(task, ("u", "v"), (), y), 1 / (1 + np.exp(-factor * logits)), p
    classes = 2 if task == "binary" else 4
    logits = rng.normal(size=(n, classes)) * 1.2
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    y = (p.cumsum(axis=1) > rng.random((n, 1))).argmax(axis=1)
    said = np.exp(factor * logits)
    target = Target(task, ("y",), tuple("abcd"[:classes]), np.where(rng.random(n) < 0.05, -1, y))
    return target, said / said.sum(axis=1, keepdims=True), p


@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel"])
def test_the_temperature_that_was_put_in_is_found(task):
    target, said, true = overconfident(task)
    found = fit_calibration(target, said, "temperature")
    assert [round(value, 1) for value in found.parameters] == pytest.approx([3.0] * len(found.parameters), abs=0.25)
    np.testing.assert_allclose(found.apply(said, exclusive=bool(target.classes)), true, atol=0.03)


@pytest.mark.parametrize("method", ["temperature", "isotonic"])
@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel"])
def test_new_samples_are_calibrated_better(task, method):
    target, said, _ = overconfident(task)
    fresh, fresh_said, _ = overconfident(task, seed=1)
    exclusive = bool(target.classes)
    calibration = fit_calibration(target, said, method)
    put_right = calibration.apply(fresh_said, exclusive=exclusive)
    before, after = (compute_metrics(fresh, scores) for scores in (fresh_said, put_right))
    assert after["ece"] < 0.4 * before["ece"]
    assert after["brier"] < before["brier"]
    if exclusive:
        np.testing.assert_allclose(put_right.sum(axis=1), 1)
    if method == "temperature":
        assert after["roc_auc"] == pytest.approx(before["roc_auc"], abs=0.02 if task == "multiclass" else 1e-6)
    again = Calibration.from_json(json.loads(json.dumps(calibration.to_json())))
    np.testing.assert_array_equal(again.apply(fresh_said, exclusive=exclusive), put_right)


@pytest.mark.parametrize("task", ["binary", "multilabel"])
def test_a_temperature_keeps_the_order_of_extreme_scores(task):
    target, said, _ = overconfident(task)
    found = fit_calibration(target, said, "temperature")
    p = np.unique(1 / (1 + np.exp(-np.linspace(-36, 36, 721))))  # those that float64 tells apart
    assert p[0] < 1e-15
    assert p[-1] > 1 - 1e-15
    cooled = found.apply(np.stack([1 - p, p], axis=1), exclusive=task == "binary")[:, 1]
    assert (np.diff(cooled) > 0).all()
    logits = (np.log(p) - np.log1p(-p)) / found.parameters[-1]
    np.testing.assert_allclose(np.log(cooled) - np.log1p(-cooled), logits, atol=1e-8)
    at_the_ends = found.apply(np.array([[1.0, 0.0], [0.0, 1.0]]), exclusive=task == "binary")
    assert np.isfinite(at_the_ends).all()
    assert at_the_ends[0, 1] <= cooled[0]
    assert at_the_ends[1, 1] >= cooled[-1]


def test_a_temperature_at_an_end_of_its_range_is_told():
    labels = np.arange(40) % 2
    target = Target("binary", ("y",), ("no", "yes"), labels)
    for right, end in ((0.51, -4), (0.7, -4), (1.0, -4), (0.3, 4)):  # nothing mistaken, and nothing right
        p = np.where(labels == 1, right, 1 - right)
        found = fit_calibration(target, np.stack([1 - p, p], axis=1), "temperature")
        assert found.parameters[0] == np.exp(end)
        assert found.to_json()["bound_reached"] is True
        again = Calibration.from_json(json.loads(json.dumps(found.to_json())))
        assert again.bound_reached
    target, said, _ = overconfident("binary")
    for method in ("temperature", "isotonic"):
        assert fit_calibration(target, said, method).to_json()["bound_reached"] is False
    alike = fit_calibration(target, np.full(said.shape, 0.5), "temperature")
    assert (alike.parameters, alike.bound_reached) == ((None,), False)


@pytest.mark.parametrize("method", ["temperature", "isotonic"])
def test_one_side_only_leaves_probabilities_as_they_are(method):
    target = Target("binary", ("y",), ("no", "yes"), np.ones(6, dtype=np.int64))
    scores = np.stack([np.linspace(0, 1, 6), np.linspace(1, 0, 6)], axis=1)
    np.testing.assert_allclose(fit_calibration(target, scores, method).apply(scores, exclusive=True), scores, atol=1e-6)


def test_labels_that_were_not_trained_stay_nan():
    target, said, _ = overconfident("multilabel")
    said[:, 1] = np.nan
    for method in ("temperature", "isotonic"):
        found = fit_calibration(target, said, method).apply(said, exclusive=False)
        assert np.isnan(found[:, 1]).all()
        assert not np.isnan(found[:, 0]).any()


def test_what_can_not_be_calibrated_is_refused():
    numbers = Target("regression", ("y",), (), np.ones((3, 1), dtype=np.float32))
    with pytest.raises(InputError, match="a regression predicts values, not probabilities"):
        fit_calibration(numbers, np.ones((3, 1)), "isotonic")
    none = Target("binary", ("y",), ("a", "b"), np.full(3, -1))
    with pytest.raises(InputError, match="no validation sample has a known target"):
        fit_calibration(none, np.full((3, 2), 0.5), "temperature")
    with pytest.raises(InputError, match="use temperature or isotonic"):
        fit_calibration(none, np.full((3, 2), 0.5), "platt")
    bad = [{"method": "x", "parameters": []}, {"method": "isotonic", "parameters": [[[2, 1], [0, 1]]]}]
    for values in [*bad, {"method": "temperature", "parameters": [-1]}, {}]:
        with pytest.raises(RunError, match=r"run\.json: calibration: not valid"):
            Calibration.from_json(values)
