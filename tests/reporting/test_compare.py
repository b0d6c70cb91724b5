"""compare: ranked on validation, told apart on test; what can't be compared is refused with the reason."""

from __future__ import annotations

import json
import re

import numpy as np
import polars as pl
import pytest
from stage_two import command, quick, read_table, samples, write_store

from featurecache.dataset import FeatureDataset
from featurecache.errors import InputError
from featurecache.evaluation.bootstrap import bootstrap_intervals, paired_differences
from featurecache.evaluation.metrics import compute_metrics
from featurecache.fit import fit_head
from featurecache.reporting.compare import compare_runs
from featurecache.run import load_run
from featurecache.rundir.results import to_target

FAST = {"n_estimators": 6, "max_bin": 16, "nthread": 1}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    store = write_store(folder, 120)
    with quick():
        for name, head, settings, views, seed in (
            ("both", "logistic", {}, None, 0),
            ("trees", "xgboost", FAST, None, 0),
            ("a", "logistic", {}, ["a"], 0),
            ("other", "logistic", {}, None, 1),
        ):
            dataset = FeatureDataset(store, dataset="m", target="kind", views=views)
            fit_head(dataset, head=head, settings=settings, seed=seed, out=folder / name, bootstrap=30)
    return folder


def test_runs_are_ranked_on_validation_and_differ_as_the_paired_bootstrap_says(runs):
    opened = [load_run(runs / name) for name in ("a", "trees", "both")]
    found = compare_runs(opened, names=["a", "trees", "both"], n=50, seed=2)
    assert found.metric == "accuracy"
    valid = {name: load_run(runs / name).metrics["valid"]["accuracy"] for name in ("a", "trees", "both")}
    assert [row.run for row in found.runs] == sorted(valid, key=lambda name: (-valid[name], name))
    assert [row.valid for row in found.runs] == [valid[row.run] for row in found.runs]
    first, last = found.runs[0], found.runs[-1]
    assert first.difference is None
    assert first.words == "the first"
    a, b = (load_run(runs / row.run).arrays.of("test") for row in (last, first))
    expected = paired_differences(to_target(b), a.scores, b.scores, b.groups, n=50, seed=2)["accuracy"]
    assert (last.difference, last.low, last.high) == (expected["difference"], expected["low"], expected["high"])
    assert last.difference == pytest.approx(last.test - first.test)
    assert found.n == len(b.sample_ids)


def test_a_metric_where_low_is_good_ranks_the_lowest_first(runs):
    opened = [load_run(runs / name) for name in ("a", "trees", "both")]
    found = compare_runs(opened, metric="log_loss", n=20)
    values = [row.valid for row in found.runs]
    assert values == sorted(values)
    for row in found.runs[1:]:
        assert row.words == ("worse" if row.low > 0 else "better" if row.high < 0 else "no gain shown")


def test_a_run_that_was_calibrated_on_the_rows_that_rank_it_is_marked(runs, tmp_path):
    dataset = FeatureDataset(runs / "store", dataset="m", target="kind", views=["a"])
    with quick():
        fit_head(dataset, head="logistic", out=tmp_path / "isotonic", bootstrap=0, calibrate="isotonic")
        fitted = command(
            "fit-head", runs / "store", "--dataset", "m", "--target", "kind", "--views", "a", "--head", "logistic",
            "--set", "C=1e-8", "--calibrate", "temperature", "--bootstrap", "0", "--out", tmp_path / "temperature",
        )  # fmt: skip
    assert "note      the temperature stopped at an end of the range searched: " in fitted.out  # all near 1/3 before
    paths = [runs / "a", tmp_path / "isotonic", tmp_path / "temperature"]
    opened = [load_run(path) for path in paths]
    for metric, marked in (
        ("accuracy", {"isotonic"}), ("roc_auc", {"isotonic", "temperature"}), ("log_loss", {"isotonic", "temperature"})
    ):  # fmt: skip
        found = compare_runs(opened, names=["a", "isotonic", "temperature"], metric=metric, n=5)
        assert {row.run for row in found.runs if row.note} == marked
    # It is too good there indeed.
    assert opened[1].metrics["valid"]["log_loss"] < opened[0].metrics["valid"]["log_loss"]
    lines = command("compare", *paths, "--bootstrap", "5").out.splitlines()
    assert [line.endswith("(its calibration was fitted on these validation samples, which rank it too well)")
            for line in lines[1:4]] == ["isotonic" in line for line in lines[1:4]]  # fmt: skip


def test_a_temperature_does_not_mark_the_order_of_two_classes(runs, tmp_path):
    dataset = FeatureDataset(runs / "store", dataset="m", target="label")
    with quick():
        plain, cooled = (
            fit_head(dataset, head="logistic", out=tmp_path / str(method), bootstrap=0, calibrate=method)
            for method in (None, "temperature")
        )
    for metric, marked in (("roc_auc", False), ("balanced_accuracy", False), ("brier", True), ("ece", True)):
        if not marked:
            assert cooled.metrics["valid"][metric] == pytest.approx(plain.metrics["valid"][metric], abs=1e-9)
        found = compare_runs([plain, cooled], names=["plain", "cooled"], metric=metric, n=5)
        assert [row.run for row in found.runs if row.note] == ["cooled"] * marked


def test_other_splits_other_targets_and_a_single_run_are_refused(runs, tmp_path):
    both = load_run(runs / "both")
    ids = {name: load_run(runs / name).arrays.of("test").sample_ids for name in ("both", "other")}
    odd = {name: sorted(set(ids[name]) - set(ids[rest])) for name, rest in (("both", "other"), ("other", "both"))}
    said = (
        f"other: of its {len(ids['other'])} test samples, both trained or validated on {len(odd['other'])}; of the "
        f"{len(ids['both'])} test samples of both, it did on {len(odd['both'])}: {', '.join(odd['other'][:3])}"
    )
    with pytest.raises(InputError, match=re.escape(said)):
        compare_runs([both, load_run(runs / "other")], names=["both", "other"])
    with pytest.raises(InputError, match="two runs or more"):
        compare_runs([both])
    dataset = FeatureDataset(runs / "store", dataset="m", target="label")
    with quick():
        label = fit_head(dataset, head="logistic", out=tmp_path / "label", bootstrap=0)
    with pytest.raises(InputError, match="label: task binary, but both has multiclass"):
        compare_runs([both, label], names=["both", "label"])


def test_a_view_that_some_samples_lack_does_not_move_the_others_to_another_side(runs):
    """Three runs on `a`, `b` and both: the same split, measured on the test samples that all of them have."""
    with quick():
        dataset = FeatureDataset(runs / "store", dataset="m", target="kind", views=["b"])
        assert dataset.n_dropped
        b = fit_head(dataset, head="logistic", out=runs / "b", bootstrap=30)
    sides = {row["sample_id"]: row["split"] for row in read_table(runs / "both" / "splits.csv")}
    own = {row["sample_id"]: row["split"] for row in read_table(b.path / "splits.csv")}
    assert own == {sample: sides[sample] for sample in own}
    assert b.record["flow"]["samples"] == len(sides)
    left = sum(entry["samples"] for entry in b.record["flow"]["left_out"])
    assert left + sum(part["samples"] for part in b.record["flow"]["used"].values()) == len(sides)

    opened = [load_run(runs / name) for name in ("both", "b", "a")]
    found = compare_runs(opened, names=["both", "b", "a"], metric="balanced_accuracy", n=50)
    n = {side: len(b.arrays.of(side).sample_ids) for side in ("test", "valid")}
    assert (found.n, found.n_valid) == (n["test"], n["valid"])
    assert found.n < len(opened[0].arrays.of("test").sample_ids)
    for row in found.runs:
        run = opened[["both", "b", "a"].index(row.run)]
        figures = {}
        for side in ("valid", "test"):
            part = run.arrays.of(side)
            part = part.take(np.flatnonzero(np.isin(part.sample_ids, b.arrays.of(side).sample_ids)))
            figures[side] = compute_metrics(to_target(part), part.scores)["balanced_accuracy"]
        assert (row.valid, row.test) == (pytest.approx(figures["valid"]), pytest.approx(figures["test"]))
        ends = bootstrap_intervals(to_target(part), part.scores, part.groups, n=50, metrics=["balanced_accuracy"])
        if row.run != "b":  # whose own figures hold
            assert [row.test_low, row.test_high] == pytest.approx(ends["balanced_accuracy"])
    every = {side: len(opened[0].arrays.of(side).sample_ids) for side in n}
    said = (f"{n[side]} (both {every[side]}, b {n[side]}, a {every[side]})" for side in ("test", "valid"))
    start = "not all runs have the same samples; measured on those in common: "
    assert found.notes == ("{}{} for test, {} for validation".format(start, *said),)
    done = command("compare", *(run.path for run in opened), "--bootstrap", "5")
    assert done.status == 0, done.err
    assert f"note      {start}{n['test']} (" in done.out


def test_other_labels_for_the_same_samples_are_refused(runs, tmp_path):
    rows = samples(120)
    for row in rows:
        row["kind"] = {"p": "q", "q": "p"}.get(row["kind"], row["kind"])
    # Strata differ in name only where whole classes change places, so the split stays.
    turned = FeatureDataset(write_store(tmp_path, rows=rows), dataset="m", target="kind")
    with quick():
        run = fit_head(turned, head="logistic", out=tmp_path / "turned", bootstrap=0)
    with pytest.raises(InputError, match=r"turned: \d+ test samples have other labels than in both: s\d+"):
        compare_runs([load_run(runs / "both"), run], names=["both", "turned"])


def test_the_command(runs, tmp_path):
    done = command("compare", runs / "both", runs / "a", "--bootstrap", "40", "--out", tmp_path / "new/c.json")
    assert done.status == 0, done.err
    lines = done.out.splitlines()
    assert lines[0].startswith("accuracy on ")
    assert lines[1].endswith("the first")
    assert "  2  " in lines[2]
    written = json.loads((tmp_path / "new/c.json").read_text())
    asked = command("compare", runs / "both", runs / "a", "--bootstrap", "40", "--json").json
    assert asked["runs"] == written["runs"]
    assert np.isfinite(asked["runs"][1]["difference"])
    wrong = command("compare", runs / "both", runs / "other")
    assert wrong.status == 2
    assert "Fit the runs with the same --split" in wrong.err


def test_other_groups_are_refused_for_the_resamples_would_not_be_pairs(runs, tmp_path):
    for name, group in (("alone", "sample_id"), ("patients", "patient")):
        dataset = FeatureDataset(runs / "store", dataset="m", target="size")
        rows = {"split": "by", "group": group}
        table = dataset.table.with_columns(by=pl.col("patient").str.tail(1).replace_strict(
            {"0": "test", "1": "valid"}, default="train"))  # fmt: skip
        with quick(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(dataset, "table", table)
            fit_head(dataset, head="logistic", out=tmp_path / name, bootstrap=0, **rows)
    opened = [load_run(tmp_path / name) for name in ("alone", "patients")]
    with pytest.raises(InputError, match="groups its test samples otherwise than alone"):
        compare_runs(opened, names=["alone", "patients"])
