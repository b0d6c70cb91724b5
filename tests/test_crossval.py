"""Cross-validation: every sample scored by a head that has not seen it; the run predicts like one fitted on all."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest
from stage_two import command, quick, read_table, samples, write_store

from featurecache.config import SplitConfig
from featurecache.crossval import cross_validate
from featurecache.data.splits import fold_splits, make_splits
from featurecache.dataset import FeatureDataset
from featurecache.errors import InputError
from featurecache.evaluation.metrics import compute_metrics
from featurecache.fit import fit_rows, load_head_run
from featurecache.heads.base import get_head
from featurecache.progress import Silent
from featurecache.reporting.report import render
from featurecache.results import metrics_from_predictions, to_target


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with quick():
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("cv"))


SPLIT = SplitConfig(group="patient", seed=2)


@pytest.mark.parametrize("target", ["label", "kind", "size", ["l0", "l1", "l2"]])
def test_out_of_fold_scores_are_those_of_the_folds_own_heads(store, tmp_path, target):
    dataset = FeatureDataset(store, dataset="m", target=target)
    run = cross_validate(dataset, 3, head="logistic", split=SPLIT, out=tmp_path / "run", bootstrap=10)
    said = run.arrays
    for splits in fold_splits(dataset.table, dataset.target, SPLIT, 3, content=dataset.content):
        head = get_head("logistic")({}, seed=2)
        fit_rows(head, dataset, splits, Silent())
        rows = np.flatnonzero(splits == "test")
        np.testing.assert_allclose(
            said.scores[rows], head.score_rows(dataset.features, rows), rtol=1e-6, equal_nan=True
        )
    assert set(said.splits.tolist()) == {"test"}
    assert run.metrics["cv"]["folds"] == 3
    assert sum(run.metrics["cv"]["n"]) == run.metrics["test"]["n"] == 80
    assert metrics_from_predictions(run.path) == run.metrics
    final = get_head("logistic")({}, seed=2)
    everything = make_splits(dataset.table, dataset.target, SplitConfig(group="patient", seed=2, test=0.0))
    assert set(everything.tolist()) == {"train", "valid"}
    fit_rows(final, dataset, everything, Silent())
    np.testing.assert_allclose(
        load_head_run(run.path).predict_proba(dataset), final.score_rows(dataset.features), rtol=1e-6
    )


def test_groups_stay_in_one_fold_and_fold_figures_are_those_of_their_rows(store, tmp_path):
    dataset = FeatureDataset(store, dataset="m", target="label")
    run = cross_validate(dataset, 4, head="logistic", split=SPLIT, out=tmp_path / "run", bootstrap=0)
    table = pl.read_csv(run.path / "predictions.csv")
    assert table.group_by("group").agg(pl.col("fold").n_unique())["fold"].to_list() == [1] * 40
    for fold in range(4):
        part = run.arrays.take(np.flatnonzero(table["fold"].to_numpy() == fold))
        expected = compute_metrics(to_target(part), part.scores, threshold=run.threshold["value"])
        assert run.metrics["cv"]["roc_auc"]["values"][fold] == pytest.approx(expected["roc_auc"])
    assert run.metrics["cv"]["accuracy"]["mean"] == pytest.approx(np.mean(run.metrics["cv"]["accuracy"]["values"]))


def test_a_threshold_never_sees_what_it_is_judged_on_within_a_fold(store, tmp_path):
    """Settings are chosen per division from train and valid rows: the hook gets nothing else."""
    dataset = FeatureDataset(store, dataset="m", target="label")
    seen = []

    def choose(splits, called):
        seen.append((called, splits.copy()))
        return {"C": 0.1 * len(seen)}

    run = cross_validate(dataset, 3, head="logistic", choose=choose, split=SPLIT, out=tmp_path / "run", bootstrap=0)
    assert [called for called, _ in seen] == ["fold 1", "fold 2", "fold 3", "final"]
    folds = fold_splits(dataset.table, dataset.target, SPLIT, 3, content=dataset.content)
    for (_, splits), expected in zip(seen, folds, strict=False):
        assert (splits == expected).all()
    assert run.record["head"]["settings"]["C"] == pytest.approx(0.4)


def test_the_command(store, tmp_path):
    words = ["fit-head", store, "--dataset", "m", "--target", "label", "--head", "logistic", "--group", "patient"]
    done = command(
        *words, "--cv", "3", "--calibrate", "isotonic", "--out", tmp_path / "run", "--bootstrap", "10", "--json"
    )
    assert done.status == 0, done.err
    assert done.json["test_n"] == 80
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["cv"] == {"folds": 3, "valid": 0.15, "skipped": {}}
    assert record["calibration"]["method"] == "isotonic"
    assert {row["fold"] for row in read_table(tmp_path / "run/predictions.csv")} == {"0", "1", "2"}
    wrong = command(*words, "--cv", "3", "--split", "fold", "--out", tmp_path / "no")
    assert wrong.status == 2
    assert "contradict each other" in wrong.err
    with pytest.raises(InputError, match="91 splits need at least as many groups"):
        cross_validate(FeatureDataset(store, dataset="m", target="label"), 91, head="logistic", out=tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_what_a_fold_lacks_is_told_and_its_page_says_out_of_fold(store, tmp_path):
    rows = [{**row, "rare": int(i < 2)} for i, row in enumerate(samples(80))]  # both in patient p0, so in one fold
    write_store(tmp_path, rows=rows)
    dataset = FeatureDataset(tmp_path / "store", dataset="m", target=["l0", "rare"])
    run = cross_validate(
        dataset, 3, head="logistic", split=SPLIT, out=tmp_path / "run", bootstrap=0, at="sensitivity=0.9",
        calibrate="temperature",
    )  # fmt: skip
    (fold,) = {row["fold"] for row in read_table(run.path / "predictions.csv") if row["group"] == "p0"}
    assert run.record["cv"]["skipped"] == {"rare": [int(fold)]}
    assert run.record["skipped"] == []
    assert run.metrics["test"]["labels"]["rare"]["roc_auc"] is None
    assert "importance.json" in run.files
    for page in ((run.path / "README.md").read_text(), render(run.path, run.record)):
        assert "out-of-fold samples. Cross-validated in 3 folds" in page
        assert "Not in the training samples of every fold: rare." in page
        assert "calibrated by temperature scaling" in page
        assert "test samples" not in page
    alone = FeatureDataset(tmp_path / "store", dataset="m", target="rare")
    with pytest.raises(InputError, match=r"^fold [123]: training rows of 'rare' hold only the class '0'"):
        cross_validate(alone, 3, head="logistic", split=SPLIT, out=tmp_path / "no", bootstrap=0)
    with pytest.raises(InputError, match="a multiclass target has no threshold"):
        cross_validate(FeatureDataset(store, dataset="m", target="kind"), 3, head="no", at="sensitivity=0.9")
