"""A torn patient and an `uncertain` among the classes are told; ordinary data are not commented on."""

import polars as pl
import pytest

from featurecache.data.shipped import shipped_path
from featurecache.data.targets import read_target
from featurecache.rundir.notes import group_note, run_notes, target_note


def note(values, **options):
    table = pl.DataFrame({"sample_id": [f"s{i}" for i in range(len(values))], "finding": values})
    return target_note(read_target(table, ["finding"], **options))


def test_a_torn_column_that_looks_like_a_group():
    likely = {"column": "patient id", "values": 1700, "torn": 41}
    assert group_note({"likely": likely}) == (
        "no group was given, though column 'patient id' looks like one: 41 of its 1,700 values are on more than one "
        "side of the split; --group 'patient id' keeps each on one"
    )
    assert group_note({"likely": {**likely, "torn": 0}}) == group_note({"likely": None}) == group_note({}) == ""


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            ["no"] * 125 + ["uncertain"] * 10 + ["yes"] * 102,
            "finding has 3 values: no 125, uncertain 10, yes 102; --uncertain uncertain=ignore would count "
            "'uncertain' as unknown",
        ),
        (
            ["no"] * 9 + ["Not done"] * 9,
            "finding has 2 values: Not done 9, no 9; --uncertain 'Not done=ignore' would count 'Not done' as unknown",
        ),
        (
            [0, 1, -1, 1, 0, None],
            "finding has 3 values: -1 1, 0 2, 1 2; --uncertain -1=ignore would count '-1' as unknown",
        ),
        (
            ["no"] * 30 + ["yes"] * 30 + ["yess"] * 3,
            "finding has 3 values: no 30, yes 30, yess 3; --uncertain yess=ignore would count 'yess' as unknown",
        ),
        (
            [f"c{i % 9}" for i in range(90)] + ["unknown"] * 40,
            "finding has 10 values, among them: unknown 40; --uncertain unknown=ignore would count 'unknown' as "
            "unknown",
        ),
    ],
)
def test_a_value_that_says_nobody_knows_or_is_rare(values, expected):
    assert note(values) == expected


@pytest.mark.parametrize(
    "values",
    [
        ["no"] * 400 + ["yes"] * 4,  # a rare event of two is what is looked for
        ["a"] * 400 + ["b"] * 300 + ["c"] * 20,
        ["a", "b", "c"] * 4,
        [0, 1, 2] * 4,
        [i / 7 for i in range(30)],
    ],
)
def test_ordinary_targets(values):
    assert note(values) == ""


def test_who_said_what_the_values_are_is_not_told():
    values = ["no"] * 9 + ["unknown"] * 9 + ["yes"] * 9
    table = pl.DataFrame({"sample_id": [f"s{i}" for i in range(27)], "finding": values})
    target, found = read_target(table, ["finding"]), {"leak_check": {}}
    assert len(run_notes(found, target, "auto")) == 1
    assert run_notes(found, target, "multiclass") == []
    assert note(values, uncertain={"unknown": "ignore"}) == ""
    assert note([0, 1] * 9, task="multilabel") == ""


def test_the_shipped_data_are_not_commented_on():
    table = pl.read_csv(shipped_path("emoji/manifest.csv"))
    assert target_note(read_target(table, ["category"])) == ""
