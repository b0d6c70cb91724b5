"""Subgroups: the figures of their own rows, and why they say little, for every task."""

from __future__ import annotations

import numpy as np
import pytest

from featurecache.data.targets import Target
from featurecache.evaluation.subgroups import by_subgroup


def only(target, groups):
    """What is small about all of the samples."""
    width = len(target.classes or target.names)
    n = len(target)
    [part] = by_subgroup(target, np.full((n, width), 1 / width), groups, ["x"] * n, n=0)
    assert part.n == n
    return part.small


def labels(events, n=40):
    """A multilabel target of n samples with so many positives per label."""
    values = np.stack([np.arange(n) < count for count in events], axis=1).astype(np.float32)
    return Target("multilabel", tuple("uvwxyz"[: len(events)]), (), values)


@pytest.mark.parametrize(
    ("events", "small"),
    [
        ((10, 30), ""),
        ((9, 20), "9 of 'u'"),
        ((20, 31), "9 without 'v'"),
        ((0, 37), "0 of 'u', 3 without 'v'"),
        ((1, 2, 3, 4, 38), "1 of 'u', 2 of 'v', 2 without 'y', 2 more below 10"),
    ],
)
def test_few_events_of_a_label(events, small):
    assert only(labels(events), np.arange(40)) == small


def test_few_groups_and_few_events_are_both_told():
    assert only(labels((5, 20)), np.arange(40) // 4) == "10 groups, 5 of 'u'"


def test_unknown_labels_are_no_events():
    target = labels((20, 20))
    target.values[:15, 0] = np.nan
    assert only(target, np.arange(40)) == "5 of 'u'"


def test_classes_and_numbers():
    groups = np.arange(40)
    values = np.repeat([0, 1], [33, 7])
    assert only(Target("binary", ("y",), ("no", "yes"), values), groups) == "7 of 'yes'"
    assert only(Target("multiclass", ("y",), ("a", "b", "c"), values), groups) == "0 of 'c'"
    assert only(Target("regression", ("y",), (), np.ones((40, 1), dtype=np.float32)), groups) == ""
