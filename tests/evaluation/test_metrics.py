import numpy as np
import pytest
from sklearn import metrics as sk

from featurecache.data.targets import Target
from featurecache.evaluation.metrics import (
    BINARY,
    CLASSIFICATION,
    calibration_error,
    compute_metrics,
)

RNG = np.random.default_rng(0)


def binary(values):
    return Target("binary", ("y",), ("no", "yes"), np.asarray(values, dtype=np.int64))


def two(p):
    p = np.asarray(p, dtype=np.float64)
    return np.stack([1 - p, p], axis=1)


def test_binary_against_scikit_learn():
    y = RNG.integers(0, 2, 200)
    p = np.round(np.clip(y * 0.3 + RNG.random(200) * 0.7, 0, 1), 2)
    found = compute_metrics(binary(y), two(p), threshold=0.4)
    predicted = p >= 0.4
    expected = {
        "n": 200,
        "events": y.sum(),
        "accuracy": sk.accuracy_score(y, predicted),
        "balanced_accuracy": sk.balanced_accuracy_score(y, predicted),
        "roc_auc": sk.roc_auc_score(y, p),
        "average_precision": sk.average_precision_score(y, p),
        "log_loss": sk.log_loss(y, p),
        "brier": sk.brier_score_loss(y, p),
        "f1_macro": sk.f1_score(y, predicted, average="macro"),
        "mcc": sk.matthews_corrcoef(y, predicted),
        "sensitivity": sk.recall_score(y, predicted),
        "specificity": sk.recall_score(y, predicted, pos_label=0),
    }
    assert set(found) == {*expected, "ece", "ppv", "npv", "f1", "sensitivity_at_90_specificity"}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-12), name
    assert all(type(value) in (int, float) for value in found.values())


def test_multiclass_against_scikit_learn():
    y = RNG.integers(0, 4, 300)
    p = RNG.dirichlet(np.ones(4), 300) * 0.7 + 0.3 * np.eye(4)[y]
    target = Target("multiclass", ("y",), tuple("abcd"), np.where(np.arange(300) % 10 == 0, -1, y))
    known = target.values >= 0
    found = compute_metrics(target, p)
    y, p = y[known], p[known]
    predicted = p.argmax(axis=1)
    assert found["n"] == 270
    assert found["events"] is None
    assert found["class_counts"] == {name: int((y == i).sum()) for i, name in enumerate("abcd")}
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(y, predicted))
    assert found["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(y, predicted))
    assert found["roc_auc"] == pytest.approx(sk.roc_auc_score(y, p, multi_class="ovr"))
    assert found["average_precision"] == pytest.approx(sk.average_precision_score(np.eye(4)[y], p, average="macro"))
    assert found["log_loss"] == pytest.approx(sk.log_loss(y, p))
    assert found["brier"] == pytest.approx(((p - np.eye(4)[y]) ** 2).sum(axis=1).mean())
    assert found["f1_macro"] == pytest.approx(sk.f1_score(y, predicted, average="macro"))
    assert found["mcc"] == pytest.approx(sk.matthews_corrcoef(y, predicted))
    assert set(CLASSIFICATION) <= set(found)


def test_a_class_that_is_not_there():
    target = Target("multiclass", ("y",), tuple("abc"), np.array([0, 0, 1, 1]))
    p = np.array([[0.6, 0.3, 0.1], [0.2, 0.3, 0.5], [0.3, 0.6, 0.1], [0.5, 0.4, 0.1]])
    found = compute_metrics(target, p)
    assert found["class_counts"] == {"a": 2, "b": 2, "c": 0}
    assert found["balanced_accuracy"] == 0.5
    assert found["roc_auc"] == pytest.approx(np.mean([0.5, 1.0]))


@pytest.mark.parametrize("only", [0, 1])
def test_a_single_class(only):
    found = compute_metrics(binary([only] * 4), two([0.2, 0.4, 0.7, 0.9]))
    for name in ("roc_auc", "average_precision", "mcc", "balanced_accuracy"):
        assert found[name] is None
    assert found["accuracy"] == 0.5
    assert found["log_loss"] is not None
    assert (found["sensitivity"], found["specificity"]) == ((0.5, None) if only else (None, 0.5))
    several = compute_metrics(Target("multiclass", ("y",), tuple("abc"), np.full(4, only)), np.full((4, 3), 1 / 3))
    assert several["roc_auc"] is None


def test_no_known_row():
    found = compute_metrics(binary([-1, -1]), two([0.1, 0.2]))
    assert found == {"n": 0, "events": 0} | dict.fromkeys(BINARY)


def test_multilabel_is_per_label_and_mean():
    y = RNG.integers(0, 2, (120, 3)).astype(np.float32)
    p = np.clip(y * 0.4 + RNG.random((120, 3)) * 0.6, 0, 1)
    y[::4, 0] = np.nan
    y[:, 2] = 0
    y[5] = np.nan
    target = Target("multilabel", ("a", "b", "c"), (), y)
    found = compute_metrics(target, p, threshold={"a": 0.3, "b": 0.6})
    assert found["n"] == 119
    known = ~np.isnan(y[:, 0])
    a = compute_metrics(binary(y[known, 0]), two(p[known, 0]), threshold=0.3)
    assert found["labels"]["a"] == a
    assert found["labels"]["c"]["roc_auc"] is None
    assert found["roc_auc"] == pytest.approx(np.mean([a["roc_auc"], found["labels"]["b"]["roc_auc"]]))
    assert found["accuracy"] == pytest.approx(np.mean([found["labels"][name]["accuracy"] for name in "abc"]))
    assert found["events"] == sum(label["events"] for label in found["labels"].values())


def test_a_skipped_label_has_no_metrics():
    y = RNG.integers(0, 2, (40, 2)).astype(np.float32)
    p = np.stack([RNG.random(40), np.full(40, np.nan)], axis=1)
    found = compute_metrics(Target("multilabel", ("a", "b"), (), y), p)
    assert found["labels"]["b"]["roc_auc"] is None
    assert found["labels"]["b"]["n"] == 40
    assert found["roc_auc"] == found["labels"]["a"]["roc_auc"]


def test_regression():
    y = RNG.normal(size=(50, 1)).astype(np.float32)
    value = y + 0.3 * RNG.normal(size=(50, 1))
    found = compute_metrics(Target("regression", ("u",), (), y), value)
    assert found["r2"] == pytest.approx(sk.r2_score(y, value))
    assert found["rmse"] == pytest.approx(sk.root_mean_squared_error(y, value))
    assert found["mae"] == pytest.approx(sk.mean_absolute_error(y, value))
    assert (found["n"], found["events"]) == (50, None)
    both = np.hstack([y, np.full_like(y, 2)])
    both[::2, 0] = np.nan
    found = compute_metrics(Target("regression", ("u", "v"), (), both), np.hstack([value, value]))
    assert found["labels"]["u"]["n"] == 25
    assert found["labels"]["v"]["r2"] is None
    assert found["r2"] == found["labels"]["u"]["r2"]
    assert found["rmse"] == pytest.approx(np.mean([found["labels"][name]["rmse"] for name in "uv"]))


def test_calibration_error():
    assert calibration_error(np.array([0.8] * 10), np.array([1] * 8 + [0] * 2)) == pytest.approx(0)
    assert calibration_error(np.array([0.9] * 10 + [0.1] * 10), np.array([0] * 10 + [1] * 10)) == pytest.approx(0.9)
    assert calibration_error(np.array([1.0, 1.0]), np.array([1, 0])) == pytest.approx(0.5)


def test_probabilities_of_zero_and_one_stay_finite():
    found = compute_metrics(binary([0, 1]), two([1.0, 0.0]))
    assert found["log_loss"] == pytest.approx(sk.log_loss([0, 1], [1.0, 0.0]), rel=1e-6)


def test_rounded_probabilities_give_no_warning():
    found = compute_metrics(Target("multiclass", ("y",), tuple("abc"), np.array([0, 1])), np.full((2, 3), 0.333))
    assert found["log_loss"] == pytest.approx(-np.log(0.333))


def test_a_threshold_per_row_decides_that_row():
    p = np.array([0.3, 0.3, 0.7, 0.7, 0.5])
    target = Target("binary", ("y",), ("no", "yes"), np.array([0, 1, 0, 1, -1]))
    cut = np.array([0.4, 0.2, 0.8, 0.6, 0.0])
    assert compute_metrics(target, two(p), threshold=cut)["accuracy"] == 1.0
    assert compute_metrics(target, two(p), threshold=0.5)["accuracy"] == 0.5
    labels = Target("multilabel", ("u",), (), np.array([[0], [1], [0], [1], [np.nan]], dtype=np.float32))
    assert compute_metrics(labels, p[:, None], threshold={"u": cut})["labels"]["u"]["sensitivity"] == 1.0


def test_figures_of_the_positive_class_and_the_sensitivity_at_a_specificity():
    rng = np.random.default_rng(4)
    y = rng.integers(0, 2, 300)
    p = np.clip(0.25 * y + rng.random(300) * 0.75, 0, 1).round(2)
    found = compute_metrics(binary(y), two(p), threshold=0.6)
    said = p >= 0.6
    assert found["ppv"] == pytest.approx(sk.precision_score(y, said))
    assert found["npv"] == pytest.approx(sk.precision_score(1 - y, ~said))
    assert found["f1"] == pytest.approx(sk.f1_score(y, said))
    best = max(
        (p[y == 1] >= cut).mean() for cut in [*np.unique(p), 2] if (p[y == 0] < cut).mean() >= 0.9
    )  # by every threshold there is
    assert found["sensitivity_at_90_specificity"] == pytest.approx(best)
