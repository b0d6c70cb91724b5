"""Targets: what each task makes of its columns, and messages that name column, sample and value."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from featurecache.data.targets import Target, read_target
from featurecache.errors import InputError


def target(values, names=("y",), **options) -> Target:
    columns = values if isinstance(values, dict) else {"y": values}
    height = len(next(iter(columns.values())))
    table = pl.DataFrame({"sample_id": [f"s{i}" for i in range(height)], **columns})
    return read_target(table, names, **options)


def refusal(values, names=("y",), **options) -> str:
    with pytest.raises(InputError) as caught:
        target(values, names, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "classes", "indices"),
    [
        (["no", "yes", None, "no"], ("no", "yes"), [0, 1, -1, 0]),
        ([0, 1, 1, 0], ("0", "1"), [0, 1, 1, 0]),
        ([0.0, 1.0, None, float("nan")], ("0", "1"), [0, 1, -1, -1]),
        ([True, False, None, True], ("0", "1"), [1, 0, -1, 1]),
        ([10, 9, 10, 9], ("9", "10"), [1, 0, 1, 0]),
        (["0", "1", "", " "], ("0", "1"), [0, 1, -1, -1]),
        (["0", "1", "nan", "NaN "], ("0", "1"), [0, 1, -1, -1]),
    ],
)
def test_binary(values, classes, indices):
    found = target(values)
    assert (found.task, found.classes, found.names) == ("binary", classes, ("y",))
    assert found.values.dtype == np.int64
    assert found.values.tolist() == indices
    assert found.known.tolist() == [index >= 0 for index in indices]
    assert len(found) == 4


def test_multiclass_and_where_numbers_become_a_quantity():
    found = target(["b", "a", "c", None, "c"])
    assert (found.task, found.classes, found.values.tolist()) == ("multiclass", ("a", "b", "c"), [1, 0, 2, -1, 2])
    assert target([3, 20, 100, 3]).classes == ("3", "20", "100")
    assert target([*range(20), 0]).task == "multiclass"
    assert target(list(range(21))).task == "regression"
    assert target([1.0, 2.0, 3.0, 3.0]).task == "multiclass"
    assert target([1.5, 2.0, 3.0]).task == "regression"
    assert target([str(i) for i in range(30)] * 3 + ["x"]).task == "multiclass"
    assert target([*range(21), 20], task="multiclass").values.tolist() == [*range(21), 20]


def test_regression():
    found = target({"y": [1.5, None, 3.0], "z": [1, 2, 3]}, ("y", "z"))
    assert (found.task, found.classes, found.names, found.values.dtype) == ("regression", (), ("y", "z"), np.float32)
    assert np.array_equal(found.values, np.array([[1.5, 1], [np.nan, 2], [3, 3]], np.float32), equal_nan=True)
    assert found.known.tolist() == [True, True, True]
    assert target(["1", "2", "x", "x"], task="multiclass").task == "multiclass"
    assert refusal(["1", "2", "x"], task="regression") == (
        "the target can't be read\n"
        "  - column 'y': regression targets are finite numbers or empty; found sample 's2' (row 3): 'x'"
    )
    assert "found sample 's0' (row 1): 'inf'" in refusal([float("inf"), 1.0], task="regression")
    assert "'1e300'" in refusal(["1e300", "2"], task="regression")


def test_multilabel():
    found = target({"a": [0, 1, None, None], "b": ["1", "", "0", None]}, ("a", "b"), source="m.csv")
    assert (found.task, found.classes) == ("multilabel", ())
    assert np.array_equal(found.values, np.array([[0, 1], [1, np.nan], [np.nan, 0], [np.nan] * 2]), equal_nan=True)
    assert found.known.tolist() == [True, True, True, False]
    assert target([0, 1], task="multilabel").values.shape == (2, 1)
    assert np.array_equal(found.subset(np.array([2, 0])).values, found.values[[2, 0]], equal_nan=True)
    many = {"a": [0, 1, 2, 3, 4, 5, 6], "b": ["x", "0", "0", "0", "0", "0", "0"]}
    what = "multilabel targets are 0, 1 or empty (give --uncertain VALUE=ignore|zero|one for other marks)"
    assert refusal(many, ("a", "b"), task="multilabel", source="m.csv") == (
        "m.csv: the target can't be read\n"
        f"  - column 'a': {what}; "
        "found sample 's2' (row 3): '2'; sample 's3' (row 4): '3'; sample 's4' (row 5): '4'; sample 's5' (row 6): '5'; "
        "sample 's6' (row 7): '6'\n"
        f"  - column 'b': {what}; "
        "found sample 's0' (row 1): 'x'"
    )


@pytest.mark.parametrize(
    "values", [[0, 1, -1, 1], [0.0, 1.0, -1.0, 1.0], ["0", "1", "-1", "1"], ["0", "1", "-1.0", "1"]]
)
@pytest.mark.parametrize(("meaning", "index"), [("ignore", -1), ("zero", 0), ("one", 1)])
def test_uncertain_matches_the_value_as_text_and_as_a_number(values, meaning, index):
    found = target(values, uncertain={"-1": meaning})
    assert (found.task, found.values.tolist()) == ("binary", [0, 1, index, 1])


def test_a_mark_for_nothing_may_be_given_a_meaning():
    assert target(["0", "1", "nan"], uncertain={"nan": "zero"}).values.tolist() == [0, 1, 0]


def test_uncertain_words_and_wrong_meanings():
    found = target({"a": ["0", "?", "1"], "b": ["?", "0", "1"]}, ("a", "b"), uncertain={"?": "one"})
    assert found.values.tolist() == [[0, 1], [1, 0], [1, 1]]
    assert refusal([0, 1], uncertain={"?": "maybe"}) == "--uncertain ?=maybe: it can mean ignore, zero or one"


@pytest.mark.parametrize(
    ("values", "names", "value", "what"),
    [
        ([0, 1, -1, 0], ("y",), "-2", "column 'y'. Found: '-1', '0', '1'"),
        ([0.0, 1.0, float("nan"), None], ("y",), "nan", "column 'y'. Found: '0', '1'"),
        (["no", "yes", "z" * 99], ("y",), "?", f"column 'y'. Found: 'no', 'yes', '{'z' * 39}…'"),
        ({"a": [0, 1, 2, 3], "b": [4, 5, 6, 10]}, ("a", "b"), "u", "columns 'a', 'b'. Found: '0', '1', '2', '3', '4' "
         "and 3 more"),
        ([None, None], ("y",), "u", "column 'y'. Found: nothing"),
    ],
)  # fmt: skip
def test_an_uncertain_value_that_no_column_holds(values, names, value, what):
    found = refusal(values, names, uncertain={value: "ignore"}, source="m.csv")
    assert found == f"m.csv: --uncertain {value}=ignore: no such value in {what}"


def test_an_uncertain_value_may_be_missing_from_new_samples():
    assert target({"a": [0, 1], "b": [-1, 0]}, ("a", "b"), uncertain={"-1": "zero"}).values.tolist() == [[0, 0], [1, 0]]
    assert target([0, 1], uncertain={"-1": "ignore"}, classes=("0", "1"), task="binary").values.tolist() == [0, 1]
    assert target([0, 1], uncertain={"-1": "ignore"}, task="multilabel").task == "multilabel"


def test_as_many_classes_as_samples():
    advice = "Ids and free text can't be learned: a class needs several samples. Give another --target"
    assert refusal([f"p{i}" for i in range(9)] + [None]) == (
        f"column 'y' has as many classes as samples (9): 'p0', 'p1', 'p2', 'p3', 'p4' and 4 more. {advice}."
    )
    assert refusal([3, 20, 100]) == (
        "column 'y' has as many classes as samples (3): '3', '20', '100'. "
        f"{advice}, or --task regression if it is a quantity."
    )
    assert target(["a", "b"]).task == "binary"
    assert target(["a", "b", "c"], classes=("a", "b", "c", "d")).task == "multiclass"


def test_a_class_for_every_two_samples():
    ids = [f"p{i // 2}" for i in range(42)]
    assert refusal(ids) == (
        "column 'y' has 21 classes for 42 samples: 'p0', 'p1', 'p10', 'p11', 'p12' and 16 more. Ids and free text "
        "can't be learned: a class needs several samples. Give another --target, or --task multiclass if these are "
        "classes."
    )
    assert "21 classes for 40 samples" in refusal([*ids[1:-1], None])
    assert target(ids, task="multiclass").task == "multiclass"
    assert len(target([*ids, "p0"]).classes) == 21  # more than two samples for a class
    assert len(target(ids[:40]).classes) == 20  # few-shot data is small
    assert target(ids, classes=[f"p{i}" for i in range(30)]).task == "multiclass"
    assert target([i // 2 for i in range(42)]).task == "regression"


def test_decimal_commas_are_told():
    ages = [f"{40 + i // 3},{i // 3 % 10}" for i in range(66)]
    assert refusal(ages).endswith(
        "Give another --target, or --task regression if it is a quantity, or --task multiclass if these are classes "
        "(decimal commas? write 40.0 for 40,0)."
    )
    found = refusal(["1", *ages], task="regression")
    assert "finite numbers or empty (decimal commas? write 40.0 for 40,0); found sample 's1' (row 2): '40,0'" in found
    assert "decimal commas" not in refusal(["40,8", "x"], task="regression")
    assert target(["1", "2", "1,2"] * 2).task == "multiclass"  # codes
    assert target(ages, task="multiclass").task == "multiclass"


def test_given_classes():
    found = target(["b", "b"], classes=("a", "b"))
    assert (found.task, found.classes, found.values.tolist()) == ("binary", ("a", "b"), [1, 1])
    assert target(["b"], classes=("a", "b", "c")).task == "multiclass"
    assert refusal(["b", "z"], classes=("a", "b")) == (
        "column 'y': not one of the classes a, b: sample 's1' (row 2): 'z'"
    )


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([1, 1], {}, "column 'y': only one class, '1'; at least two are needed"),
        ([None, None], {}, "column 'y': no value is known"),
        ([None, None], {"task": "regression"}, "column 'y': no value is known"),
        (["a", "b", "c"], {"task": "binary"}, "column 'y': binary needs two classes, but there are 3: a, b, c"),
        ([[1], [2]], {}, "column 'y' holds List(Int64), which can't be a target"),
        ([0, 1], {"names": ()}, "no target column given"),
        (
            [0, 1],
            {"names": ("yy", "y", "y")},
            "the target can't be read\n  - no column 'yy'. Did you mean 'y'? Columns: sample_id, y\n"
            "  - target 'y' is given twice",
        ),
    ],
)
def test_what_is_refused(values, options, message):
    assert refusal(values, **options) == message


def test_several_columns_are_not_classes():
    assert refusal({"a": [0, 1], "b": [1, 0]}, ("a", "b"), task="binary") == (
        "2 target columns can't be binary; use --task multilabel or regression"
    )
    assert "column 'b': regression targets are finite numbers" in refusal({"a": [0, 2], "b": ["x", "y"]}, ("a", "b"))
