import csv
import json
from pathlib import Path

import numpy as np
import pytest
from stage_two import metrics_from_predictions

from featurecache.data.splits import read_splits
from featurecache.data.targets import Target
from featurecache.evaluation.metrics import compute_metrics
from featurecache.run import Run, RunWriter, load_run
from featurecache.rundir.results import finish_run, make_predictions, write_results

N = 240
RECIPE = {
    "reader": {"name": "image"},
    "preprocessing": {"resize": 256, "crop": 224, "resize_mode": "crop"},
    "body": {"architecture": "torchvision/resnet18"},
    "taps": [{"name": "penultimate@none"}],
}
IDS = [f"s{i}" for i in range(N)]
GROUPS = np.array([f"p{i // 2}" for i in range(N)])
SPLITS = np.array((["train"] * 6 + ["valid"] * 3 + ["test"] * 3 + [""] * 0) * 20)
TASKS = ("binary", "multiclass", "multilabel", "regression", "regressions")


def data(task: str) -> tuple[Target, np.ndarray]:
    """A target with unknown values, and float32 scores that know something about it."""
    rng = np.random.default_rng(3)
    if task == "binary":
        true = rng.integers(0, 2, N)
        p = (1 / (1 + np.exp(-(rng.normal(size=N) + 2 * true - 1)))).astype(np.float32)
        true[:4] = -1
        return Target("binary", ("ill",), ("no", "yes"), true), np.stack([1 - p, p], axis=1)
    if task == "multiclass":
        true = rng.integers(0, 3, N)
        raw = np.exp(rng.normal(size=(N, 3)) + 2 * np.eye(3)[true]).astype(np.float32)
        return Target("multiclass", ("kind",), ("a", "b", "<i>c</i>"), true), raw / raw.sum(axis=1, keepdims=True)
    if task == "multilabel":
        true = (rng.random((N, 3)) < 0.4).astype(np.float32)
        scores = 1 / (1 + np.exp(-(rng.normal(size=(N, 3)) + 2 * true - 1)))
        true[rng.random((N, 3)) < 0.2] = np.nan
        scores[:, 2] = np.nan
        return Target("multilabel", ("p", "q", "r"), (), true), scores
    names = ("age",) if task == "regression" else ("age", "dose")
    true = rng.normal(50, 10, (N, len(names))).astype(np.float32)
    true[0] = np.nan
    return Target("regression", names, (), true), true + rng.normal(0, 3, true.shape).astype(np.float32)


def make(directory: Path, task: str, *, bootstrap: int = 50, **record) -> Run:
    target, scores = data(task)
    with RunWriter(directory / task, kind="head") as writer:
        results = write_results(
            writer.path,
            target=target,
            scores=np.nan_to_num(scores, nan=0.0) if target.task == "regression" else scores,
            splits=SPLITS,
            groups=GROUPS,
            sample_ids=IDS,
            views=("front", "side"),
            present=np.stack([np.ones(N, bool), np.arange(N) % 5 > 0], axis=1),
            history=[{"epoch": 1, "train_loss": 0.5, "valid_loss": float("nan")}, {"epoch": 2, "train_loss": 0.25}],
            bootstrap=bootstrap,
            seed=1,
        )
        about = {
            "task": target.task,
            "classes": target.classes,
            "targets": target.names,
            "views": ("front", "side"),
            "recipes": {view: {"digest": "ab" * 32, "recipe": RECIPE} for view in ("front", "side")},
            "config": {"seed": 1},
            "threshold": results.threshold,
            "command": f"featurecache fit-head {directory}/cache --head fc",
            "head": {"name": "fc", "settings": {}},
        }
        return finish_run(writer, {**about, **record})


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Run]:
    directory = tmp_path_factory.mktemp("runs")
    return {task: make(directory, task) for task in TASKS}


def test_a_run_holds_what_the_contract_names(runs):
    for run in runs.values():
        names = {"metrics.json", "predictions.csv", "splits.csv", "history.csv", "README.md", "report.html"}
        names |= {"curves.json"} if run.task != "regression" else set()
        assert set(run.files) == names
        assert load_run(run.path).metrics == run.metrics


@pytest.mark.parametrize("task", TASKS)
def test_metrics_come_again_from_predictions(runs, task):
    assert metrics_from_predictions(runs[task].path) == runs[task].metrics


@pytest.mark.parametrize("task", TASKS)
def test_metrics_are_those_of_the_scores(runs, task):
    run = runs[task]
    target, scores = data(task)
    threshold = run.threshold["value"]
    assert list(run.metrics) == ["train", "valid", "test", "bootstrap"]
    assert run.metrics["bootstrap"] == {"unit": "group", "n": 50, "seed": 1}
    for split in ("train", "valid", "test"):
        rows = np.flatnonzero((SPLITS == split) & target.known)
        expected = compute_metrics(target.subset(rows), scores[rows], threshold=threshold)
        found = run.metrics[split]
        assert found["n"] == len(rows)
        assert found["n_groups"] == len(set(GROUPS[rows]))
        for name, value in expected.items():
            assert (
                found[name] == pytest.approx(value, abs=1e-6)
                if isinstance(value, float)
                else found[name] == value or name == "labels"
            )
        for name, (low, high) in found["intervals"].items():
            assert low <= high
            assert name in expected


def test_threshold_is_chosen_on_validation_and_used(runs):
    threshold = runs["binary"].threshold
    assert threshold["rule"] == "youden"
    assert threshold["chosen_on"] == "valid"
    table = runs["binary"].predictions
    assert ((table["p:yes"] >= threshold["value"]) == (table["prediction"] == "yes")).all()
    assert set(runs["multilabel"].threshold["value"]) == {"p", "q", "r"}
    assert runs["multiclass"].threshold["value"] is None


def test_predictions_and_splits(runs):
    table = runs["multilabel"].predictions
    assert table["sample_id"].to_list() == IDS
    assert table["views"].to_list()[:2] == ["front", "front+side"]
    assert table["p:r"].null_count() == N
    assert read_splits(runs["binary"].path / "splits.csv", IDS).tolist() == SPLITS.tolist()
    with (runs["binary"].path / "history.csv").open() as file:
        assert list(csv.DictReader(file)) == [
            {"epoch": "1", "train_loss": "0.5", "valid_loss": ""},
            {"epoch": "2", "train_loss": "0.25", "valid_loss": ""},
        ]


def test_json_holds_no_nan(runs):
    def refuse(text: str) -> None:
        raise AssertionError(text)

    for run in runs.values():
        for name in ("metrics.json", "run.json"):
            json.loads((run.path / name).read_text(), parse_constant=refuse)
    assert runs["multilabel"].metrics["test"]["labels"]["r"]["roc_auc"] is None


def test_model_card_is_honest_about_what_it_does_not_know(runs):
    text = (runs["multiclass"].path / "README.md").read_text()
    assert "- **Intended use**: More information needed" in text
    assert r"\<i\>c\</i\>" in text
    assert "FC head on cached features: multiclass prediction of kind from 2 views (front, side)." in text
    assert "| accuracy |" in text
    assert "\nfeaturecache fit-head cache --head fc\n" in text, "no path of this machine"


def test_no_intervals_and_no_history(tmp_path):
    target, scores = data("binary")
    with RunWriter(tmp_path / "r", kind="head") as writer:
        results = write_results(
            writer.path, target=target, scores=scores, splits=np.where(SPLITS == "valid", "", SPLITS), groups=GROUPS,
            sample_ids=IDS, views=("a",), bootstrap=0,
        )  # fmt: skip
        assert results.threshold == {"value": 0.5, "rule": "default", "chosen_on": None}
        assert list(results.metrics) == ["train", "test", "bootstrap"]
        assert "intervals" not in results.metrics["test"]
        assert not (writer.path / "history.csv").exists()
        record = {"task": "binary", "classes": target.classes, "targets": target.names, "views": ["a"], "recipes": {}}
        run = finish_run(writer, {**record, "config": {}, "threshold": results.threshold})
    assert run.history.is_empty()
    assert "No intervals were computed." in (run.path / "report.html").read_text()


def test_predictions_without_truth():
    target = Target("binary", ("ill",), ("no", "yes"), np.full(2, -1))
    table = make_predictions(target, [[0.4, 0.6], [0.9, 0.1]], sample_ids=["a", "b"]).table()
    assert table["prediction"].to_list() == ["yes", "no"]
    assert table["target"].to_list() == [None, None]


def test_the_dot_on_the_curves_is_where_the_run_decides(runs):
    for task in ("binary", "multiclass", "multilabel"):
        run = runs[task]
        curves = json.loads((run.path / "curves.json").read_text())
        assert curves["split"] == "test"
        for curve in curves["curves"]:
            test = run.metrics["test"]
            several = {"multilabel": "labels", "multiclass": "classes"}
            figures = test[several[task]][curve["label"]] if task in several else test
            decided = curve["decided"]
            assert decided["sensitivity"] == pytest.approx(figures["sensitivity"])
            assert decided["fpr"] == pytest.approx(1 - figures["specificity"])
            assert decided["ppv"] == pytest.approx(figures["ppv"])
            assert curve["events"] == figures.get("events", figures["n"])
            assert len(curve["roc"]["low"]) == len(curve["pr"]["low"]) == 51
    assert [curve["label"] for curve in curves["curves"]] == ["p", "q"], "r was not trained"
    kinds = json.loads((runs["multiclass"].path / "curves.json").read_text())["curves"]
    assert [curve["label"] for curve in kinds] == ["a", "b", "<i>c</i>"]


def test_the_reliability_diagram_shows_the_bins_of_the_calibration_error(runs):
    for task in ("binary", "multiclass", "multilabel"):
        run = runs[task]
        kept = json.loads((run.path / "curves.json").read_text())["reliability"]
        confidence, right = run.arrays.of("test").confidences()
        assert sum(kept["count"]) == len(confidence) == len(right) > 0
        used = [n > 0 for n in kept["count"]]
        assert [value is not None for value in kept["probability"]] == used
        assert sum(n * value for n, value in zip(kept["count"], kept["frequency"], strict=True) if n) == pytest.approx(
            right.sum(), abs=0.01
        )
        if task != "multilabel":
            assert kept["gap"] == pytest.approx(run.metrics["test"]["ece"])
        assert f"Mean gap over 15 equal bins {kept['gap']:.3f}" in (run.path / "report.html").read_text()


def test_tables_of_classes_are_kept_with_intervals_for_the_test_samples(runs):
    figures = runs["multiclass"].metrics
    assert list(figures["test"]["classes"]) == ["a", "b", "<i>c</i>"]
    for label, row in figures["test"]["classes"].items():
        assert row["n"] == figures["test"]["class_counts"][label]
        assert set(row["intervals"]) >= {"sensitivity", "specificity", "ppv", "f1", "roc_auc"}
        assert "intervals" not in figures["valid"]["classes"][label]
    assert "intervals" in runs["multilabel"].metrics["test"]["labels"]["p"]
