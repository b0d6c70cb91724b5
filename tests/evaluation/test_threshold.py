import numpy as np
import pytest

from featurecache.data.targets import Target
from featurecache.errors import InputError
from featurecache.evaluation.metrics import compute_metrics
from featurecache.evaluation.threshold import At, choose_threshold, youden


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


@pytest.mark.parametrize("wanted", [0.5, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("name", ["sensitivity", "specificity"])
def test_a_wanted_figure_is_just_reached(name, wanted):
    rng = np.random.default_rng(3)
    y = rng.integers(0, 2, 40)
    p = np.round(np.clip(0.3 * y + 0.7 * rng.random(40), 0, 1), 2)
    target, scores = Target("binary", ("y",), ("n", "y"), y), np.stack([1 - p, p], axis=1)
    found = choose_threshold(target, scores, at=At(name, wanted))
    assert found["rule"] == f"{name}={wanted:g}"

    def shares(cut):
        return {"sensitivity": (p[y == 1] >= cut).mean(), "specificity": (p[y == 0] < cut).mean()}

    reached = compute_metrics(target, scores, threshold=found["value"])
    assert reached[name] == pytest.approx(shares(found["value"])[name])
    assert reached[name] >= wanted
    other = "specificity" if name == "sensitivity" else "sensitivity"
    every = [shares(cut) for cut in np.concatenate([p - 0.005, p + 0.005])]
    assert reached[other] == pytest.approx(max(one[other] for one in every if one[name] >= wanted))


def test_a_wanted_figure_needs_its_side_and_a_yes_or_no_question():
    scores = np.full((3, 2), 0.5)
    none = Target("binary", ("y",), ("n", "y"), np.zeros(3, dtype=np.int64))
    assert choose_threshold(none, scores, at=At("sensitivity", 0.9)) == {
        "value": 0.5, "rule": "default", "chosen_on": "valid",
    }  # fmt: skip
    several = Target("multiclass", ("y",), ("a", "b", "c"), np.array([0, 1, 2]))
    with pytest.raises(InputError, match="a multiclass target has no threshold"):
        choose_threshold(several, np.full((3, 3), 1 / 3), at=At("sensitivity", 0.9))
    for text in ("sensitivity", "sensitivity=0", "sensitivity=2", "recall=0.5", "sensitivity=x"):
        with pytest.raises(InputError, match="give sensitivity=VALUE or specificity=VALUE"):
            At.parse(text)
    assert At.parse("specificity=0.9") == At("specificity", 0.9)
