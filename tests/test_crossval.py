"""Cross-validation: every sample scored by a head that has not seen it; the run predicts like one fitted on all."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest
from stage_two import command, metrics_from_predictions, quick, read_table, samples, write_store

import featurecache as fc
from featurecache.api import load_run
from featurecache.config import HeadConfig, SplitConfig
from featurecache.crossval import cross_validate
from featurecache.data.splits import fold_splits, make_splits
from featurecache.dataset import FeatureDataset
from featurecache.errors import InputError
from featurecache.evaluate import evaluate_own
from featurecache.evaluation.metrics import compute_metrics
from featurecache.evaluation.threshold import At, choose_threshold
from featurecache.fit import fit_rows
from featurecache.heads.base import get_head
from featurecache.progress import Silent
from featurecache.reporting.report import render
from featurecache.rundir.results import to_target


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with quick():
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("cv"))


SPLIT = SplitConfig(group="patient", seed=2)


def options(out, **more):
    return HeadConfig.create({"head": "logistic", "group": "patient", "seed": 2, "bootstrap": 0, "out": out, **more})


@pytest.mark.parametrize("target", ["label", "kind", "size", ["l0", "l1", "l2"]])
def test_out_of_fold_scores_are_those_of_the_folds_own_heads(store, tmp_path, target):
    dataset = FeatureDataset(store, dataset="m", target=target)
    run = cross_validate(dataset, 3, options(tmp_path / "run", bootstrap=10))
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
    np.testing.assert_allclose(load_run(run.path).predict_proba(dataset), final.score_rows(dataset.features), rtol=1e-6)


def test_folds_are_the_same_for_every_choice_of_views(store, tmp_path):
    both, some = (FeatureDataset(store, dataset="m", target="label", views=views) for views in (None, ["b"]))
    assert some.n_dropped
    said = [cross_validate(data, 3, options(tmp_path / str(len(data)))).arrays for data in (both, some)]
    folds = [dict(zip(part.sample_ids.tolist(), part.folds.tolist(), strict=True)) for part in said]
    assert folds[1] == {sample: folds[0][sample] for sample in folds[1]}
    assert set(folds[1].values()) == {0, 1, 2}


def test_groups_stay_in_one_fold_and_fold_figures_are_those_of_their_rows(store, tmp_path):
    dataset = FeatureDataset(store, dataset="m", target="label")
    run = cross_validate(dataset, 4, options(tmp_path / "run"))
    table = pl.read_csv(run.path / "predictions.csv")
    assert table.group_by("group").agg(pl.col("fold").n_unique())["fold"].to_list() == [1] * 40
    for fold in range(4):
        part = run.arrays.take(np.flatnonzero(table["fold"].to_numpy() == fold))
        expected = compute_metrics(to_target(part), part.scores, threshold=run.threshold["folds"][fold])
        for name in ("roc_auc", "accuracy", "sensitivity", "f1"):
            assert run.metrics["cv"][name]["values"][fold] == pytest.approx(expected[name])
    assert run.metrics["cv"]["accuracy"]["mean"] == pytest.approx(np.mean(run.metrics["cv"]["accuracy"]["values"]))


@pytest.mark.parametrize("target", ["label", ["l0", "l1"]])
def test_each_fold_decides_by_a_threshold_that_was_chosen_on_its_own_validation_rows(store, tmp_path, target):
    dataset = FeatureDataset(store, dataset="m", target=target)
    run = cross_validate(dataset, 3, options(tmp_path / "run", at="sensitivity=0.8", bootstrap=10))
    cuts = run.threshold["folds"]
    assert run.metrics["cv"]["thresholds"] == cuts
    assert len({json.dumps(cut) for cut in cuts}) == 3
    table = pl.read_csv(run.path / "predictions.csv", infer_schema=False)
    for fold, splits in enumerate(fold_splits(dataset.table, dataset.target, SPLIT, 3, content=dataset.content)):
        head = get_head("logistic")({}, seed=2)
        fit_rows(head, dataset, splits, Silent())
        rows = np.flatnonzero(splits == "valid")
        chosen = choose_threshold(
            dataset.target.subset(rows), head.score_rows(dataset.features, rows), at=At.parse("sensitivity=0.8")
        )["value"]
        assert cuts[fold] == pytest.approx(chosen, abs=1e-6)
        part = table.filter(pl.col("fold") == str(fold))
        for name in ("label",) if target == "label" else target:
            cut = chosen if target == "label" else chosen[name]
            said, p = ("prediction", "p:yes") if target == "label" else (f"prediction:{name}", f"p:{name}")
            expected = [float(value) >= cut for value in part[p]]
            assert [value in ("yes", "1") for value in part[said]] == expected
    everything = make_splits(dataset.table, dataset.target, SplitConfig(group="patient", seed=2, test=0.0))
    rows = np.flatnonzero(everything == "valid")
    scores = load_run(run.path).predict_proba(dataset)[rows]
    own = choose_threshold(dataset.target.subset(rows), scores, at=At.parse("sensitivity=0.8"))["value"]
    assert run.threshold["value"] == pytest.approx(own, abs=1e-6), "new samples: by the kept head's own"
    # Subgroups are decided by the same thresholds: taken together they are the whole.
    sites = tmp_path / "sites.csv"
    pl.DataFrame({"sample_id": table["sample_id"], "site": list("aabb") * 20}).write_csv(sites)
    found = evaluate_own(run, by="site", table=sites, bootstrap=0)
    assert found.metrics["test"]["f1_macro"] == run.metrics["test"]["f1_macro"]
    parts = [part.metrics["sensitivity"] for part in found.subgroups]
    assert min(parts) <= run.metrics["test"]["sensitivity"] <= max(parts)


def test_a_threshold_never_sees_what_it_is_judged_on_within_a_fold(store, tmp_path):
    """Settings are chosen per division from train and valid rows: the hook gets nothing else."""
    dataset = FeatureDataset(store, dataset="m", target="label")
    seen = []

    def choose(splits, called):
        seen.append((called, splits.copy()))
        return {"C": 0.1 * len(seen)}

    run = cross_validate(dataset, 3, options(tmp_path / "run"), choose=choose)
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
    dataset = FeatureDataset(store, dataset="m", target="label")
    more = {"calibrate": "isotonic", "bootstrap": 0, "images": "none", "out": tmp_path / "again"}
    again = fc.fit_head(dataset, cv=3, head="logistic", group="patient", **more)
    assert again.metrics["cv"]["roc_auc"] == json.loads((tmp_path / "run/metrics.json").read_text())["cv"]["roc_auc"]
    wrong = command(*words, "--cv", "3", "--split", "fold", "--out", tmp_path / "no")
    assert wrong.status == 2
    assert "contradict each other" in wrong.err
    with pytest.raises(InputError, match="91 splits need at least as many groups"):
        cross_validate(FeatureDataset(store, dataset="m", target="label"), 91, options(tmp_path / "no", group=None))
    assert not (tmp_path / "no").exists()


def test_what_a_fold_lacks_is_told_and_its_page_says_out_of_fold(store, tmp_path):
    rows = [{**row, "rare": int(i < 2)} for i, row in enumerate(samples(80))]  # both in patient p0, so in one fold
    write_store(tmp_path, rows=rows)
    dataset = FeatureDataset(tmp_path / "store", dataset="m", target=["l0", "rare"])
    run = cross_validate(dataset, 3, options(tmp_path / "run", at="sensitivity=0.9", calibrate="temperature"))
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
        cross_validate(alone, 3, options(tmp_path / "no"))
    with pytest.raises(InputError, match="a multiclass target has no threshold"):
        cross_validate(FeatureDataset(store, dataset="m", target="kind"), 3, options(None, at="sensitivity=0.9"))
