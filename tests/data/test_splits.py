"""Splits: no group torn, same for the same seed, near the wanted fractions; leaks and the impossible are named."""

from __future__ import annotations

from collections import Counter

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featurecache.config import SplitConfig
from featurecache.data.splits import check_leaks, fold_splits, make_splits, read_splits, sample_groups, write_splits
from featurecache.data.targets import Target, read_target
from featurecache.errors import InputError, MissingFileError


def table(n: int, **columns) -> pl.DataFrame:
    return pl.DataFrame({"sample_id": [f"s{i}" for i in range(n)], **columns})


def classes(values) -> Target:
    values = np.asarray(values)
    return Target("multiclass", ("y",), tuple(str(i) for i in range(int(values.max()) + 1)), values.astype(np.int64))


def shares(splits: np.ndarray) -> list[float]:
    return [float((splits == name).mean()) for name in ("train", "valid", "test")]


def test_fractions_are_met_in_every_class():
    rng = np.random.default_rng(0)
    target = classes(rng.choice(4, 2000, p=[0.7, 0.2, 0.07, 0.03]))
    splits = make_splits(table(2000), target, SplitConfig(seed=3))
    assert shares(splits) == pytest.approx([0.7, 0.15, 0.15], abs=0.002)
    for index in range(4):
        mine = target.values == index
        assert shares(splits[mine]) == pytest.approx([0.7, 0.15, 0.15], abs=1.5 / mine.sum())


def test_groups_of_all_sizes_are_spread_fairly():
    rng = np.random.default_rng(1)
    group = rng.integers(0, 600, 3000)
    splits = make_splits(table(3000, group=group), classes(rng.integers(0, 3, 3000)), SplitConfig())
    assert shares(splits) == pytest.approx([0.7, 0.15, 0.15], abs=0.005)
    sizes = Counter(group.tolist())
    means = [np.mean([sizes[g] for g in group[splits == name].tolist()]) for name in ("train", "valid", "test")]
    assert max(means) - min(means) < 0.8  # large groups do not gather in train


def test_seed_decides_and_the_order_of_the_manifest_does_not():
    rng = np.random.default_rng(2)
    frame = table(300, group=rng.integers(0, 90, 300).astype(str), y=rng.integers(0, 2, 300))

    def splits(rows: pl.DataFrame, seed: int) -> dict[str, str]:
        made = make_splits(rows, read_target(rows, ["y"]), SplitConfig(seed=seed))
        return dict(zip(rows["sample_id"].to_list(), made.tolist(), strict=True))

    assert splits(frame, 0) == splits(frame, 0) == splits(frame.sample(fraction=1, shuffle=True, seed=1), 0)
    assert splits(frame, 0) != splits(frame, 1)


def test_splits_are_pinned():
    # A change here moves samples between train and test of everybody's data.
    splits = make_splits(table(12, y=[0, 1] * 6), classes([0, 1] * 6), SplitConfig(valid=0.25, test=0.25))
    assert "".join(name[1] for name in splits.tolist()) == "rarrarerreea"


@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(st.integers(0, 12), min_size=10, max_size=80),
    labels=st.randoms(use_true_random=False),
    seed=st.integers(0, 5),
    test=st.sampled_from([0.0, 0.1, 0.3]),
)
def test_no_group_is_torn_and_all_is_deterministic(groups, labels, seed, test):
    target = classes([labels.randrange(3) for _ in groups])
    config = SplitConfig(seed=seed, valid=0.2, test=test)
    frame = table(len(groups), group=[f"g{number}" for number in groups])
    if len(set(groups)) < (3 if test else 2):
        with pytest.raises(InputError, match="splits need at least as many groups, but"):
            make_splits(frame, target, config)
        return
    splits = make_splits(frame, target, config)
    assert set(splits.tolist()) == {"train", "valid", "test"} - (set() if test else {"test"})
    sides: dict[int, set[str]] = {}
    for group, split in zip(groups, splits.tolist(), strict=True):
        sides.setdefault(group, set()).add(split)
    assert all(len(side) == 1 for side in sides.values())
    assert np.array_equal(splits, make_splits(frame, target, config))
    check_leaks(frame["sample_id"].to_list(), splits, sample_groups(frame, None), None)
    largest = max(Counter(groups).values())
    for name, wanted in (("train", 0.8 - test), ("valid", 0.2), ("test", test)):
        assert abs((splits == name).sum() - wanted * len(groups)) <= 1.5 * largest + 1


def test_few_large_groups_leave_no_split_empty():
    frame = table(10, group=["a"] * 6 + ["b"] * 4)
    splits = make_splits(frame, classes([0, 1] * 5), SplitConfig(valid=0.2, test=0.0))
    assert splits.tolist() == ["train"] * 6 + ["valid"] * 4


def test_shared_images_join_groups():
    n = 60
    content = [(f"own{i}", "shared" if i in (3, 17, 40) else f"other{i}") for i in range(n)]
    content[5] = None
    for seed in range(6):
        splits = make_splits(table(n), classes([0, 1] * 30), SplitConfig(seed=seed), content=content)
        assert len({splits[3], splits[17], splits[40]}) == 1


def test_unknown_labels_are_left_out():
    values = np.array([0, 1] * 20 + [-1] * 5)
    splits = make_splits(table(45), Target("binary", ("y",), ("0", "1"), values), SplitConfig())
    assert (splits[40:] == "").all()
    assert (splits[:40] != "").all()


def test_multilabel_and_regression_are_stratified():
    rng = np.random.default_rng(0)
    labels = (rng.random((1000, 5)) < [0.5, 0.3, 0.2, 0.1, 0.03]).astype(np.float32)
    labels[::7, 0] = np.nan
    splits = make_splits(table(1000), Target("multilabel", tuple("abcde"), (), labels), SplitConfig())
    rare = labels[:, 4] == 1
    assert shares(splits[rare]) == pytest.approx([0.7, 0.15, 0.15], abs=1.5 / rare.sum())
    numbers = rng.lognormal(size=(1000, 1)).astype(np.float32)
    splits = make_splits(table(1000), Target("regression", ("y",), (), numbers), SplitConfig())
    top = numbers[:, 0] > np.quantile(numbers, 0.9)
    assert shares(splits[top]) == pytest.approx([0.7, 0.15, 0.15], abs=0.03)


def test_groups_come_from_a_column_or_the_sample():
    frame = table(3, patient=["p", None, "q"], group=[1, 1, 2])
    assert sample_groups(frame, None).tolist() == ["1", "1", "2"]
    assert sample_groups(frame, "patient").tolist() == ["p", "s1", "q"]
    assert sample_groups(table(2), None).tolist() == ["s0", "s1"]
    with pytest.raises(InputError, match=r"no group column 'patent'\. Did you mean 'patient'\?"):
        sample_groups(frame, "patent")


def test_too_few_groups():
    frame = table(40, group=["a"] * 30 + ["b"] * 10)
    with pytest.raises(InputError) as caught:
        make_splits(frame, classes([0, 1] * 20), SplitConfig(), source="m.csv")
    assert str(caught.value) == (
        "m.csv: 3 splits need at least as many groups, but 40 samples with a known target are in 2 groups, "
        "the largest of which ('a') holds 30"
    )
    with pytest.raises(InputError, match="but 0 samples with a known target are in 0 groups"):
        make_splits(frame, Target("binary", ("y",), ("0", "1"), np.full(40, -1)), SplitConfig())


def test_a_column_of_splits():
    frame = table(5, part=["Train", "validation", " test ", None, "training"])
    splits = make_splits(frame, classes([0, 1, 0, 1, 1]), SplitConfig(split="part"))
    assert splits.tolist() == ["train", "valid", "test", "", "train"]
    with pytest.raises(InputError, match=r"no split column 'prat'\. Did you mean 'part'\? Give --split auto or one of"):
        make_splits(frame, classes([0, 1, 0, 1, 1]), SplitConfig(split="prat"))
    with pytest.raises(InputError) as caught:
        make_splits(table(3, part=["train", "fold1", "x"]), classes([0, 1, 0]), SplitConfig(split="part"))
    assert str(caught.value) == (
        "column 'part': a split is train, valid or test\n  - sample 's1': 'fold1'\n  - sample 's2': 'x'"
    )
    with pytest.raises(InputError, match="column 'part': no sample with a known target is marked train"):
        make_splits(table(2, part=["test", "valid"]), classes([0, 1]), SplitConfig(split="part"))


def test_leaks_are_named():
    frame = table(7, part=["train"] * 5 + ["test", "valid"], group=["a", "a", "a", "a", "b", "a", "c"])
    content = [("k0",), ("k1",), None, ("k3",), ("k4" * 20,), ("k5",), ("k4" * 20, "k6")]
    with pytest.raises(InputError) as caught:
        make_splits(frame, classes([0, 1, 0, 1, 0, 1, 0]), SplitConfig(split="part"), content=content, source="m.csv")
    assert str(caught.value) == (
        "m.csv: the splits leak: what is on one side must not be on another\n"
        "  - group 'a' is on several sides: train ('s0', 's1', 's2' and 1 more), test ('s5')\n"
        "  - the same image (k4k4k4k4k4k4) is on several sides: train ('s4'), valid ('s6')"
    )
    unused = make_splits(
        table(4, part=["train", None, "test", "valid"], group=["a", "a", "b", "c"]),
        classes([0, 1, 1, 0]),
        SplitConfig(split="part"),
    )
    assert unused.tolist() == ["train", "", "test", "valid"]  # what is not used can't leak


def test_written_and_read_back(tmp_path):
    path = tmp_path / "a [1].csv"
    ids = ["007", 'a,"b"', "é", " x", "1.0"]
    splits = np.array(["train", "valid", "test", "", "train"])
    write_splits(path, ids, ["g"] * 5, splits)
    assert path.read_text(encoding="utf-8").splitlines()[:2] == ["sample_id,group,split", "007,g,train"]
    assert read_splits(path, ids).tolist() == splits.tolist()
    assert read_splits(path, ids[::-1]).tolist() == splits.tolist()[::-1]
    path.write_text("sample_id,group,split\na,g,train\na,g,test\nb,g,trian\nc,g,test\n")
    with pytest.raises(InputError) as caught:
        read_splits(path, ["a", "b", "d"])
    assert caught.value.problems == (
        "sample 'a' is there twice",
        "sample 'b': unknown split 'trian'",
        "sample 'c' is not in the data",
        "sample 'd' of the data is missing",
    )
    with pytest.raises(MissingFileError, match=r"none\.csv: no such file"):
        read_splits(tmp_path / "none.csv", [])
    path.write_text("id,split\na,train\n")
    with pytest.raises(InputError, match=r"not a splits\.csv: no column 'sample_id'"):
        read_splits(path, ["a"])
    path.write_text("")
    with pytest.raises(InputError, match=r"not a splits\.csv"):
        read_splits(path, ["a"])


def test_folds_test_every_sample_once_and_tear_no_group():
    rng = np.random.default_rng(5)
    frame = table(600, patient=rng.integers(0, 150, 600))
    values = rng.choice(3, 600, p=[0.7, 0.2, 0.1])
    target = classes(values)
    target.values[:7] = -1
    folds = fold_splits(frame, target, SplitConfig(group="patient", seed=2), 5)
    assert len(folds) == 5
    tested = np.sum([fold == "test" for fold in folds], axis=0)
    assert (tested[7:] == 1).all()
    assert (tested[:7] == 0).all()
    for fold in folds:
        check_leaks(frame["sample_id"].to_list(), fold, frame["patient"].to_numpy(), None)
        assert shares(fold[7:]) == pytest.approx([0.68, 0.12, 0.2], abs=0.02)
        for index in range(3):
            assert (fold[values == index] == "test").mean() == pytest.approx(0.2, abs=0.06)
    again = fold_splits(frame, target, SplitConfig(group="patient", seed=2), 5)
    assert all((a == b).all() for a, b in zip(folds, again, strict=True))


def test_samples_that_share_an_image_stay_in_one_fold():
    frame, target = table(40), classes(np.arange(40) % 2)
    content = [["same"] if i in (3, 20, 33) else [f"k{i}"] for i in range(40)]
    for fold in fold_splits(frame, target, SplitConfig(), 4, content=content):
        assert len({fold[i] for i in (3, 20, 33)}) == 1


def test_folds_that_can_not_be():
    frame, target = table(8, fold=["train"] * 8), classes(np.arange(8) % 2)
    with pytest.raises(InputError, match=r"m\.csv: 1 folds: at least 2 are needed"):
        fold_splits(frame, target, SplitConfig(), 1, source="m.csv")
    with pytest.raises(InputError, match=r"folds and a split column \('fold'\) contradict each other"):
        fold_splits(frame, target, SplitConfig(split="fold"), 3)
    with pytest.raises(InputError, match="9 splits need at least as many groups, but 8 samples"):
        fold_splits(frame, target, SplitConfig(), 9)
