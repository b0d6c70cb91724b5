import numpy as np
import pytest

from featurecache.data.targets import Target
from featurecache.evaluation.metrics import compute_metrics
from featurecache.evaluation.threshold import choose_threshold, youden


def binary(y, p):
    p = np.asarray(p, dtype=np.float64)
    return Target("binary", ("y",), ("0", "1"), np.asarray(y)), np.stack([1 - p, p], axis=1)


def test_separates_best():
    target, scores = binary([0, 0, 1, 1, -1], [0.05, 0.1, 0.2, 0.4, 0.3])
    found = choose_threshold(target, scores)
    assert found == {"value": pytest.approx(0.15), "rule": "youden", "chosen_on": "valid"}
    metrics = compute_metrics(target, scores, threshold=found["value"])
    assert metrics["sensitivity"] == metrics["specificity"] == 1


def test_is_the_best_of_all_cuts():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 300)
    p = np.round(np.clip(0.3 * y + 0.7 * rng.random(300), 0, 1), 2)
    value = youden(y, p)

    def j(cut):
        return (p >= cut)[y == 1].mean() - (p >= cut)[y == 0].mean()

    assert j(value) == pytest.approx(max(j(cut) for cut in np.unique(p)))


@pytest.mark.parametrize(("y", "p"), [
    ([1, 1, -1], [0.2, 0.4, 0.1]), ([0, 1], [0.3, 0.3]), ([0, 1], [0.9, 0.1]), ([-1, -1], [0.1, 0.2]),
])  # fmt: skip
def test_where_nothing_can_be_told(y, p):
    assert choose_threshold(*binary(y, p)) == {"value": 0.5, "rule": "default", "chosen_on": "valid"}


def test_of_equal_cuts_the_nearest_to_a_half():
    assert youden(np.array([1, 0, 1, 0]), np.array([0.95, 0.75, 0.45, 0.15])) == pytest.approx(0.3)


def test_a_threshold_per_label():
    y = np.array([[0, 1, 0], [1, 1, np.nan], [1, 1, 1]], dtype=np.float32)
    p = np.array([[0.1, 0.5, 0.6], [0.3, 0.6, 0.7], [0.4, 0.7, 0.8]])
    target = Target("multilabel", ("a", "b", "c"), (), y)
    found = choose_threshold(target, p, chosen_on="train")
    assert found["value"] == {"a": pytest.approx(0.2), "b": 0.5, "c": pytest.approx(0.7)}
    assert found["chosen_on"] == "train"
    assert compute_metrics(target, p, threshold=found["value"])["labels"]["a"]["accuracy"] == 1


def test_tasks_without_a_threshold():
    several = Target("multiclass", ("y",), tuple("abc"), np.array([0, 1]))
    assert choose_threshold(several, np.full((2, 3), 1 / 3)) == {"value": None, "rule": "argmax", "chosen_on": None}
    numbers = Target("regression", ("u",), (), np.zeros((2, 1)))
    assert choose_threshold(numbers, np.zeros((2, 1)))["rule"] == "none"
