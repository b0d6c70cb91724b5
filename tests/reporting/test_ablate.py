"""ablate: each arm is what fitting it by hand gives, and the words follow the intervals."""

from __future__ import annotations

import html
import json

import numpy as np
import polars as pl
import pytest
from stage_two import command, quick, samples, write_store

from featurecache.config import SplitConfig
from featurecache.data.splits import make_splits
from featurecache.dataset import FeatureDataset
from featurecache.errors import InputError
from featurecache.evaluation.metrics import compute_metrics
from featurecache.fit import fit_head
from featurecache.reporting.ablate import ablate, conclude, mean_of_divisions


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with quick():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablate")
    write_store(folder, 120, missing=0.0)
    return folder


def dataset(folder, target="kind", **options):
    return FeatureDataset(folder / "store", dataset="m", target=target, **options)


def arms(found, head="logistic"):
    return {arm.arm: arm for arm in found.arms if arm.head == head}


@pytest.mark.parametrize("target", ["kind", "label", "size", ["l0", "l1", "l2"]])
def test_arms_are_the_runs_that_one_would_fit(folder, tmp_path, target):
    found = ablate(dataset(folder, target), ["logistic"], split=SplitConfig(seed=3), seeds=1, bootstrap=20)
    assert list(arms(found)) == ["alone:a", "alone:b", "fused", "late", "missing:a", "missing:b", "shuffled"]
    runs = {}
    for arm, views in (("alone:a", ["a"]), ("alone:b", ["b"]), ("fused", None)):
        data = dataset(folder, target, views=views)
        runs[arm] = fit_head(data, head="logistic", seed=3, out=tmp_path / arm.replace(":", "-"), bootstrap=0)
        for side, value in (("valid", arms(found)[arm].valid), ("test", arms(found)[arm].test)):
            assert value == pytest.approx(runs[arm].metrics[side][found.metric]), (arm, side)
    data = dataset(folder, target)
    rows = make_splits(data.table, data.target, SplitConfig(seed=3), content=data.content) == "test"
    late = (runs["alone:a"].arrays.scores + runs["alone:b"].arrays.scores)[rows] / 2
    if found.metric != "accuracy":  # which needs no threshold; nor do roc_auc and r2
        assert arms(found)["late"].test == pytest.approx(compute_metrics(data.target.subset(rows), late)[found.metric])
    x = data.numpy()[0].copy()
    x[:, [i for block in data.blocks if block.view == "a" for i in range(block.start, block.stop)]] = np.nan
    missing = runs["fused"].head.scores(x)[rows]
    expected = compute_metrics(data.target.subset(rows), missing)[found.metric]
    assert arms(found)["missing:a"].test == pytest.approx(expected)


def test_the_reference_is_chosen_on_validation_and_words_follow_the_interval(folder):
    found = ablate(dataset(folder), ["logistic", "xgboost"], split=SplitConfig(), seeds=3, bootstrap=60, settings={
        "xgboost": {"n_estimators": 4, "max_bin": 16, "nthread": 1}})  # fmt: skip
    assert found.divisions == 3
    for head in ("logistic", "xgboost"):
        of_head = arms(found, head)
        alone = {view: of_head[f"alone:{view}"].valid for view in "ab"}
        assert found.reference[head] == max(alone, key=alone.get)
        assert of_head[f"alone:{found.reference[head]}"].words == "the reference"
        for arm in of_head.values():
            if arm.low is not None:
                expected = "better" if arm.low > 0 else "worse" if arm.high < 0 else "no gain shown"
                assert arm.words == expected
                assert arm.low <= arm.difference <= arm.high
    assert len(found.conclusions) == 2
    # View a alone tells the three kinds apart, b does not: without a the fused head is lost.
    assert arms(found)["missing:a"].words == "worse"


def test_the_conclusion_says_no_gain_where_the_interval_holds_zero(folder):
    found = ablate(dataset(folder), ["logistic"], split=SplitConfig(), seeds=2, bootstrap=60)
    said = conclude("logistic", "accuracy", found.arms, "a")
    assert found.conclusions == (said,)
    best = arms(found)["late" if "late fusion" in said else "fused"]
    assert ("no gain shown from fusion" in said) == (best.words == "no gain shown")


def test_samples_without_a_label_are_not_counted(tmp_path):
    rows = samples(60)
    for row in rows[:9]:
        row["label"] = ""
    write_store(tmp_path, rows=rows)
    found = ablate(dataset(tmp_path, "label"), ["logistic"], split=SplitConfig(group="patient"), seeds=2, bootstrap=5)
    assert (found.samples, found.groups) == (51, 26)  # p4 has one with and one without


def test_folds_test_every_sample_once(folder):
    found = ablate(dataset(folder), ["logistic"], split=SplitConfig(), folds=4, bootstrap=20)
    assert found.divisions == 4
    assert found.samples == 120


def test_one_view_or_no_test_rows_are_refused(folder):
    with pytest.raises(InputError, match="the dataset has one view, 'a'"):
        ablate(dataset(folder, views=["a"]), ["logistic"], split=SplitConfig())
    with pytest.raises(InputError, match="an ablation needs test samples"):
        ablate(dataset(folder), ["logistic"], split=SplitConfig(test=0.0))


def test_a_division_that_can_not_be_measured_is_left_out_and_none_at_all_is_an_error(tmp_path):
    rows = [{**row, "few": ("no", "yes")[i < 12 and i % 4 < 2]} for i, row in enumerate(samples(120))]
    write_store(tmp_path, rows=rows)
    data = dataset(tmp_path, "few")  # by column `fold` only training rows hold a yes
    with pytest.raises(InputError, match="roc_auc is undefined on the validation samples of every division"):
        ablate(data, ["logistic"], split=SplitConfig(split="fold"), seeds=1, bootstrap=10)
    assert mean_of_divisions([float("nan"), 0.25, 0.75], "roc_auc", "validation") == 0.5


def test_the_command(folder, tmp_path):
    words = ["ablate", folder / "store", "--dataset", "m", "--target", "kind", "--head", "logistic,xgboost"]
    words += ["--set", "xgboost.n_estimators=3", "--set", "xgboost.max_bin=16", "--seeds", "2", "--bootstrap", "20"]
    done = command(*words, "--out", tmp_path / "out")
    assert done.status == 0, done.err
    assert done.out.splitlines()[0].startswith("accuracy on test, mean of 2 divisions of 120 samples")
    assert done.out.rstrip().splitlines()[-1].startswith("xgboost: ")
    written = json.loads((tmp_path / "out/ablation.json").read_text())
    table = pl.read_csv(tmp_path / "out/ablation.csv")
    assert table["arm"].to_list() == [arm["arm"] for arm in written["arms"]]
    assert command(*words, "--json").json["arms"] == written["arms"]
    again = command(*words, "--out", tmp_path / "out")
    assert again.status == 2
    assert "already holds an ablation" in again.err
    file = command(*words, "--out", tmp_path / "out/ablation.json", "--overwrite")
    assert "a file, but --out is a folder" in file.err
    wrong = command(*words, "--set", "depth=3")
    assert wrong.status == 2
    assert "depth" in wrong.err


def test_an_ablation_beside_a_run_is_shown_in_its_report(folder, tmp_path):
    fit_head(dataset(folder, "label"), head="logistic", out=tmp_path / "run", bootstrap=0, images="none")
    words = ["ablate", folder / "store", "--dataset", "m", "--head", "logistic", "--seeds", "1", "--bootstrap", "10"]
    other = command(*words, "--target", "kind", "--run", tmp_path / "run")
    assert other.status == 2
    assert "predicts label from a, b; an ablation of kind from a, b does not belong there" in other.err
    assert not (tmp_path / "run/ablation").exists()
    done = command(*words, "--target", "label", "--run", tmp_path / "run")
    assert done.status == 0, done.err
    said = json.loads((tmp_path / "run/ablation/ablation.json").read_text())["conclusions"][0]
    assert html.escape(said.replace(" roc_auc ", " AUROC ")) in (tmp_path / "run/report.html").read_text()
    again = command(*words, "--target", "label", "--run", tmp_path / "run")
    assert "already holds an ablation" in again.err
