import numpy as np
import pytest
from sklearn.metrics import f1_score, jaccard_score

from featurecache.data.dense import IGNORE, pixel_counts
from featurecache.data.targets import Target
from featurecache.evaluation.bootstrap import bootstrap_intervals, class_tables, paired_differences, replicates
from featurecache.evaluation.metrics import compute_metrics

RANDOM = np.random.default_rng(0)
CLASSES = ("0", "3", "7")
TRUE = RANDOM.integers(0, 3, (6, 9, 8)).astype(np.uint8)
SAID = np.where(RANDOM.random(TRUE.shape) < 0.7, TRUE, RANDOM.integers(0, 3, TRUE.shape)).astype(np.uint8)
TRUE[RANDOM.random(TRUE.shape) < 0.1] = IGNORE
TRUE[4][TRUE[4] == 2] = 0  # a class that one sample lacks
SAID[4][SAID[4] == 2] = 0


def counted(true=TRUE, said=SAID):
    counts = pixel_counts(true, said, 3).astype(float)
    return Target("dense", ("mask",), CLASSES, counts[:, :, 0]), counts[:, :, 1:]


def test_pooled_figures_are_those_of_scikit_learn():
    known = TRUE != IGNORE
    found = compute_metrics(*counted())
    y, p = TRUE[known], SAID[known]
    assert found["iou"] == pytest.approx(jaccard_score(y, p, labels=[1, 2], average="macro"))
    assert found["dice"] == pytest.approx(f1_score(y, p, labels=[1, 2], average="macro"))
    assert found["pixel_accuracy"] == pytest.approx((y == p).mean())
    assert found["n"] == 6
    tables = class_tables(*counted(), None, n=50)
    np.testing.assert_allclose([tables[c]["iou"] for c in CLASSES], jaccard_score(y, p, average=None))
    assert tables["3"]["n"] == (y == 1).sum()
    assert all(low <= tables["7"][name] <= high for name, (low, high) in tables["7"]["intervals"].items())


def test_per_sample_figures_leave_out_classes_that_are_not_there():
    expected = []
    for true, said in zip(TRUE, SAID, strict=True):
        known = true != IGNORE
        y, p = true[known], said[known]
        there = [c for c in (1, 2) if ((y == c) | (p == c)).any()]
        expected.append(np.mean([jaccard_score(y == c, p == c) for c in there]))
    assert compute_metrics(*counted())["sample_iou"] == pytest.approx(np.mean(expected))


def test_nothing_to_find_is_undefined_rather_than_perfect():
    empty = np.zeros((2, 4, 4), np.uint8)
    found = compute_metrics(*counted(empty, empty))
    assert found["iou"] is None
    assert found["sample_dice"] is None
    assert found["pixel_accuracy"] == 1
    assert compute_metrics(*counted(np.full_like(empty, IGNORE), empty))["pixel_accuracy"] is None


def test_resamples_draw_whole_groups():
    target, scores = counted()
    groups = np.array(["a", "a", "b", "b", "c", "c"])
    draws = replicates(target, scores, groups, n=40, seed=3)["iou"]
    drawn = np.random.default_rng(3).integers(0, 3, size=(40, 3))
    for value, parts in zip(draws[:5], drawn[:5], strict=True):
        rows = np.concatenate([[2 * part, 2 * part + 1] for part in parts])
        assert value == pytest.approx(compute_metrics(target.subset(rows), scores[rows])["iou"])
    low, high = bootstrap_intervals(target, scores, groups, n=200)["dice"]
    assert low < compute_metrics(target, scores)["dice"] < high


def test_unknown_samples_count_nowhere():
    target, scores = counted()
    values = target.values.copy()
    values[0] = np.nan
    some = Target("dense", ("mask",), CLASSES, values)
    assert compute_metrics(some, scores) == compute_metrics(target.subset(np.arange(1, 6)), scores[1:])


def test_two_models_on_the_same_resamples():
    target, scores = counted()
    worse = counted(TRUE, np.zeros_like(SAID))[1]
    found = paired_differences(target, worse, scores, None, n=100, metrics=["iou"])["iou"]
    assert found["high"] < 0
    assert found["difference"] == pytest.approx(found["a"] - found["b"])
