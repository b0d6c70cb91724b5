import time

import numpy as np
import pytest

from featurecache.data.targets import Target
from featurecache.errors import InputError
from featurecache.evaluation.bootstrap import (
    Repeat,
    Said,
    bootstrap_intervals,
    class_tables,
    label_intervals,
    paired_differences,
    percentile_interval,
    repeated,
    repeated_replicates,
    replicates,
)
from featurecache.evaluation.metrics import compute_metrics, metric_names
from featurecache.evaluation.weighted import mean_defined, weighted_parts


def sample(task, n=150, *, seed=0, unknown=0.1):
    rng = np.random.default_rng(seed)
    lost = rng.random(n) < unknown
    if task == "binary":
        y = rng.integers(0, 2, n)
        p = np.round(np.clip(0.25 * y + 0.75 * rng.random(n), 0, 1), 2)  # rounded: ties
        return Target(task, ("y",), ("0", "1"), np.where(lost, -1, y)), np.stack([1 - p, p], axis=1)
    if task == "multiclass":
        y = rng.integers(0, 4, n)
        p = 0.8 * rng.dirichlet(np.ones(4), n) + 0.2 * np.eye(4)[y]
        return Target(task, ("y",), tuple("abcd"), np.where(lost, -1, y)), p
    if task == "multilabel":
        y = rng.integers(0, 2, (n, 3)).astype(np.float32)
        p = np.round(np.clip(0.25 * y + 0.75 * rng.random((n, 3)), 0, 1), 2)
        return Target(task, ("a", "b", "c"), (), np.where(rng.random((n, 3)) < unknown, np.nan, y)), p
    y = rng.normal(size=(n, 2)) * 3 + 10
    p = y + rng.normal(size=(n, 2))
    return Target(task, ("u", "v"), (), np.where(rng.random((n, 2)) < unknown, np.nan, y).astype(np.float32)), p


TASKS = ("binary", "multiclass", "multilabel", "regression")


def weighted(target, scores, weights, threshold=None):
    names = metric_names(target.task)
    tables = [part(weights) for part in weighted_parts(target, scores, threshold, names)]
    return {name: mean_defined([table[name] for table in tables]) for name in names}


@pytest.mark.parametrize("task", TASKS)
def test_the_weighted_metrics_are_the_metrics_of_repeated_rows(task):
    target, scores = sample(task)
    rng = np.random.default_rng(1)
    known = np.flatnonzero(target.known)
    weights = np.vstack([np.ones(len(known)), rng.integers(0, 4, (6, len(known)))]).astype(float)
    found = weighted(target, scores, weights, 0.45)
    for i, row in enumerate(weights):
        rows = np.repeat(known, row.astype(int))
        expected = compute_metrics(target.subset(rows), scores[rows], threshold=0.45)
        for name, values in found.items():
            assert values[i] == pytest.approx(expected[name], rel=1e-9, abs=1e-12), name


@pytest.mark.parametrize("rows", [[0, 0, 3], [3, 3, 3, 3]])
def test_the_weighted_metrics_are_undefined_where_the_metrics_are(rows):
    target = Target("binary", ("y",), ("0", "1"), np.array([0, 0, 1, 0]))
    scores = np.array([[0.8, 0.2], [0.4, 0.6], [0.1, 0.9], [0.3, 0.7]])
    found = weighted(target, scores, np.bincount(rows, minlength=4)[None].astype(float))
    expected = compute_metrics(target.subset(np.array(rows)), scores[rows])
    for name, value in found.items():
        assert np.isnan(value[0]) == (expected[name] is None), name


@pytest.mark.parametrize("task", TASKS)
def test_intervals_hold_the_metric_and_follow_the_seed(task):
    target, scores = sample(task)
    groups = np.arange(len(scores)) // 2
    found = bootstrap_intervals(target, scores, groups, n=300, seed=1)
    metrics = compute_metrics(target, scores)
    assert set(found) == set(metric_names(task))
    for name, (low, high) in found.items():
        assert low < high
        if name != "ece":  # which a bootstrap overestimates
            assert low <= metrics[name] <= high
    assert found == bootstrap_intervals(target, scores, groups, n=300, seed=1)
    assert found != bootstrap_intervals(target, scores, groups, n=300, seed=2)


def test_resamples_draw_whole_groups():
    """200 rows in 4 groups of equal rows hold 4 observations, not 200."""
    target = Target("binary", ("y",), ("0", "1"), np.repeat([0, 1, 0, 1], 50))
    scores = np.repeat([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.1, 0.9]], 50, axis=0)
    draws = replicates(target, scores, np.repeat(["a", "b", "c", "d"], 50), n=2000)["accuracy"]
    assert set(np.round(draws * 4, 9)) == {0, 1, 2, 3, 4}
    assert draws.mean() == pytest.approx(0.75, abs=0.02)
    grouped = bootstrap_intervals(target, scores, np.repeat([1, 2, 3, 4], 50))["accuracy"]
    single = bootstrap_intervals(target, scores, None)["accuracy"]
    assert grouped[1] - grouped[0] > 4 * (single[1] - single[0])


def test_intervals_cover():
    """95 % intervals of accuracy hold the truth in about 95 of 100 experiments."""
    rng, held = np.random.default_rng(0), 0
    for seed in range(200):
        right = rng.random(150) < 0.8
        target = Target("binary", ("y",), ("0", "1"), np.ones(150, dtype=np.int64))
        scores = np.where(right, 0.9, 0.1)
        found = bootstrap_intervals(
            target, np.stack([1 - scores, scores], 1), None, n=200, seed=seed, metrics=["accuracy"]
        )
        held += found["accuracy"][0] <= 0.8 <= found["accuracy"][1]
    assert 180 <= held <= 198


def test_a_metric_that_is_mostly_undefined_has_no_interval():
    target = Target("binary", ("y",), ("0", "1"), np.zeros(20, dtype=np.int64))
    found = bootstrap_intervals(target, np.full((20, 2), 0.5), None, n=50)
    assert "roc_auc" not in found
    assert "accuracy" in found
    assert percentile_interval(np.array([np.nan, np.nan, np.nan, 1.0])) is None
    assert bootstrap_intervals(target.subset(np.arange(0)), np.empty((0, 2)), None) == {}


def test_a_skipped_label_does_not_spoil_the_others():
    target, scores = sample("multilabel")
    without = bootstrap_intervals(target, np.where([False, True, False], np.nan, scores), None, n=50)
    assert set(without) == set(metric_names("multilabel"))
    labels = label_intervals(target, np.where([False, True, False], np.nan, scores), None, n=50)
    assert labels["b"] == {}
    assert labels["a"]["roc_auc"][0] < labels["a"]["roc_auc"][1]


def test_paired_differences():
    target, scores = sample("multiclass", 400)
    worse = 0.8 * scores + 0.2 * np.random.default_rng(3).dirichlet(np.ones(4), 400)
    groups = np.arange(400) // 2
    found = paired_differences(target, scores, worse, groups, n=300)
    auc = found["roc_auc"]
    assert auc["a"] == pytest.approx(compute_metrics(target, scores)["roc_auc"])
    assert auc["b"] == pytest.approx(compute_metrics(target, worse)["roc_auc"])
    assert auc["difference"] == auc["a"] - auc["b"]
    assert auc["low"] <= auc["difference"] <= auc["high"]
    alone = bootstrap_intervals(target, scores, groups, n=300)["roc_auc"]
    assert auc["high"] - auc["low"] < alone[1] - alone[0]  # pairing removes what both share
    same = paired_differences(target, scores, scores, groups, n=50, metrics=["accuracy", "roc_auc"])
    assert set(same) == {"accuracy", "roc_auc"}
    assert same["accuracy"]["low"] == same["accuracy"]["high"] == 0


def test_bad_arguments():
    target, scores = sample("binary")
    with pytest.raises(InputError, match=r"unknown metric 'roc_au' of task binary\. Did you mean 'roc_auc'\?"):
        bootstrap_intervals(target, scores, None, metrics=["roc_au"])
    with pytest.raises(InputError, match="3 groups for 150 rows"):
        bootstrap_intervals(target, scores, ["a", "b", "c"])


def test_a_thousand_resamples_of_a_thousand_samples_take_seconds():
    target, scores = sample("multiclass", 1000)
    start = time.process_time()
    bootstrap_intervals(target, scores, np.arange(1000) // 2)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("task", TASKS)
def test_one_division_of_all_rows_draws_as_without_divisions(task):
    target, scores = sample(task, unknown=0.0)
    groups = np.arange(len(target)) // 3
    metric = metric_names(task)[0]
    once = Repeat(np.arange(len(target)), target, {"m": Said(scores, 0.4)})
    found = repeated_replicates([once, once], groups, metric, n=40, seed=3)["m"]
    alone = replicates(target, scores, groups, n=40, seed=3, threshold=0.4, metrics=[metric])[metric]
    np.testing.assert_allclose(found, alone)
    expected = compute_metrics(target, scores, threshold=0.4)[metric]
    assert repeated([once, once], metric)["m"] == pytest.approx(expected)


def test_repeats_of_the_same_samples_do_not_pass_for_more_data():
    target, good = sample("binary", 400, unknown=0.1)
    bad = np.full_like(good, 0.5)
    rng = np.random.default_rng(0)
    rows = [np.sort(rng.choice(400, 200, replace=False)) for _ in range(6)]
    groups = np.arange(400)

    def width(number: int) -> float:
        repeats = [Repeat(r, target.subset(r), {"a": Said(good[r]), "b": Said(bad[r])}) for r in rows[:number]]
        draws = repeated_replicates(repeats, groups, "roc_auc", n=300)
        low, high = percentile_interval(draws["a"] - draws["b"])
        return high - low

    # Two models that are the same in every repeat: six repeats see at most twice the samples of one.
    assert width(6) > 0.6 * width(1)


def test_rows_are_told_apart_by_their_place_among_all_samples():
    target, scores = sample("multiclass", 60, unknown=0.0)
    halves = [np.arange(0, 30), np.arange(30, 60)]
    repeats = [Repeat(r, target.subset(r), {"m": Said(scores[r])}) for r in halves]
    found = repeated_replicates(repeats, np.arange(60), "accuracy", n=25, seed=1)["m"]
    hits = (scores.argmax(axis=1) == target.values).astype(float)
    drawn = np.random.default_rng(1).integers(0, 60, size=(25, 60))
    expected = []
    for row in drawn:
        times = np.bincount(row, minlength=60)
        expected.append(np.mean([(hits[r] * times[r]).sum() / times[r].sum() for r in halves]))
    np.testing.assert_allclose(found, expected)


def test_tables_of_classes_are_those_of_one_class_against_the_rest():
    rng = np.random.default_rng(8)
    values = rng.integers(-1, 3, 150)
    raw = rng.random((150, 3)) + 0.8 * np.eye(3)[np.maximum(values, 0)]
    scores = raw / raw.sum(axis=1, keepdims=True)
    target = Target("multiclass", ("y",), tuple("abc"), values)
    groups = np.arange(150) // 3
    table = class_tables(target, scores, groups, n=40, seed=3)
    known = values >= 0
    said = scores.argmax(axis=1)
    for number, label in enumerate("abc"):
        one = Target("binary", ("y",), ("no", "yes"), np.where(known, values == number, -1).astype(np.int64))
        both = np.stack([(said != number), (said == number)], axis=1).astype(float)
        expected = compute_metrics(one, both, threshold=0.5)
        row = table[label]
        for name in ("sensitivity", "specificity", "ppv", "npv", "f1"):
            assert row[name] == pytest.approx(expected[name])
        assert row["n"] == (values == number).sum()
        assert row["predicted"] == (said[known] == number).sum()
        ranked = np.stack([1 - scores[:, number], scores[:, number]], axis=1)
        assert row["roc_auc"] == pytest.approx(compute_metrics(one, ranked)["roc_auc"])
        same = bootstrap_intervals(one, ranked, groups, n=40, seed=3, metrics=["roc_auc"])
        assert row["intervals"]["roc_auc"] == pytest.approx(same["roc_auc"])
        low, high = row["intervals"]["sensitivity"]
        assert low <= row["sensitivity"] <= high
