import base64
import json
import os
import re
import shutil
import warnings
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import roc_auc_score

from featurecache.reporting.report import render, write_evaluation_report, write_report
from featurecache.reporting.wording import interval, metric_name, number, percent, sentence
from featurecache.rundir.predictions import Predictions
from featurecache.rundir.results import curves_of

NASTY = "<script>alert('x')</script>"
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Collects tags and text, and complains about tags that don't match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def predictions(task: str, n: int = 120, classes: int = 3) -> Predictions:
    rng = np.random.default_rng(5)
    ids, groups = np.array([f"s{i}" for i in range(n)]), np.array([f"g{i // 3}" for i in range(n)])
    splits = np.array((["train"] * 2 + ["valid", "test"]) * (n // 4))
    views = np.array(["front", "front+side"] * (n // 2))
    if task == "binary":
        true = rng.integers(0, 2, n)
        p = rng.random(n)
        return Predictions(task, ("ill",), ("no", NASTY), true, np.stack([1 - p, p], 1), ids, groups, splits, views)
    if task == "multiclass":
        labels = (NASTY, "$a_b$", "漢字 \N{GRINNING FACE}", *[f"class {i}" for i in range(classes - 3)])
        true, raw = rng.integers(0, classes, n), rng.random((n, classes))
        return Predictions(task, ("k",), labels, true, raw / raw.sum(1, keepdims=True), ids, groups, splits, views)
    if task == "multilabel":
        true = rng.choice([0.0, 1.0, np.nan], (n, 12))
        scores = rng.random((n, 12))
        scores[:, 1] = np.nan
        names = (NASTY, *[f"label {i}" for i in range(11)])
        return Predictions(task, names, (), true, scores, ids, groups, splits, views)
    true = rng.normal(size=(n, 2))
    return Predictions("regression", ("age", NASTY), (), true, true + 0.1, ids, groups, splits, views)


def directory(
    path: Path, made: Predictions, *, history: bool = True, splits: tuple[str, ...] = ("train", "valid", "test")
) -> dict:
    """What lies in a run's directory before its report is written; returns the record."""
    path.mkdir(parents=True)
    made.table().write_csv(path / "predictions.csv")
    figures = {"n": 30, "n_groups": 10, "events": 4, "roc_auc": 0.75, "log_loss": None, "accuracy": 0.5}
    figures["intervals"] = {"roc_auc": [0.7, 0.8]}
    if made.task == "multiclass":
        figures["average_precision"] = 0.4
    if made.task == "multilabel":
        figures["labels"] = {name: {"n": 9, "roc_auc": 0.5, "brier": None} for name in made.names}
    if made.task == "regression":
        figures = {"n": 30, "n_groups": 10, "events": None, "r2": -0.5, "rmse": 12.0, "intervals": {"r2": [-0.75, 0.1]}}
    bootstrap = {"bootstrap": {"unit": "group", "n": 1000, "seed": 0}}
    (path / "metrics.json").write_text(json.dumps({**dict.fromkeys(splits, figures), **bootstrap}))
    if history:
        epochs = {
            "epoch": [1, 2, 3],
            "train_loss": [1.0, 0.5, None],
            "valid_auc": [0.5, 0.6, 0.7],
            "note": ["a", "b", NASTY],
        }
        pl.DataFrame(epochs).write_csv(path / "history.csv")
    fields = {
        "body": {"architecture": "torchvision/resnet18"}, "reader": {"name": "image", "parameters": {"channels": 1}},
        "preprocessing": {"resize": 256, "crop": 224, "resize_mode": "crop"},
        "taps": [{"name": "penultimate@none"}], "engine": "torch", "precision": "bf16",
    }  # fmt: skip
    recipe = {"digest": "0123456789abcdef" * 4, "recipe": fields}
    value = {"binary": 0.25, "multilabel": dict.fromkeys(made.names, 0.3)}.get(made.task)
    return {
        "schema": 1, "kind": "head", "featurecache": "1.2.3", "created": "2026-01-02T03:04:05+00:00",
        "task": made.task, "classes": list(made.classes), "targets": list(made.names), "views": ["front", "side"],
        "recipes": {"front": recipe, "side": recipe}, "config": {"note": NASTY}, "command": f"featurecache {NASTY}",
        "threshold": {"value": value, "rule": "youden", "chosen_on": "valid"}, "versions": {"python": "3.11"},
        "binding": {"dataset": "m", "digest": "ff" * 32}, "head": {"name": "fc"}, "n_dropped": 7,
    }  # fmt: skip


@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel", "regression"])
def test_self_contained_escaped_and_complete(tmp_path, task):
    record = directory(tmp_path / task, predictions(task))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = write_report(tmp_path / task, record).read_text(encoding="utf-8")
    page = Page(text)
    assert "<script" not in text
    assert NASTY in "".join(page.text)
    for tag, attributes in page.tags:
        assert tag not in {"link", "script", "img", "iframe", "object", "embed", "base"}
        for name in ("src", "href", "xlink:href", "action"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
    assert not re.search(r"@import|url\((?!#)", text)
    named = set(re.findall(r'\sid="([^"]+)"', text))
    assert len(named) == len(re.findall(r'\sid="', text)), "ids must be unique"
    assert set(re.findall(r'(?:url\(|href=")#([^")]+)', text)) <= named
    figures = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(figures) >= 3
    assert all(figure["role"] == "img" and len(figure["aria-label"] or "") > 20 for figure in figures)
    assert str(tmp_path) not in text
    assert os.uname().nodename not in text
    words = " ".join(" ".join(page.text).split())
    for part in (
        "256 → 224 px, 1 channel",
        "penultimate@none",
        "0123456789abcdef",
        "1,000 bootstrap resamples",
        "7 dropped",
    ):
        assert part in words, part


def test_test_comes_first_with_its_interval(tmp_path):
    record = directory(tmp_path / "r", predictions("binary"))
    text = render(tmp_path / "r", record)
    assert text.index(">test<") < text.index(">validation<") < text.index(">training<")
    assert re.search(r'AUROC</th>.*?class="first">0\.750<small>0\.700.0\.800</small>', text, re.DOTALL)
    assert "is said where its probability is <b>0.250</b> or more" in text
    assert '<p class="kind of">on ' in text, "whose figures these are"
    assert "AUROC 0.750 (95 % interval 0.700\N{EN DASH}0.800) on 30 test samples." in text


def test_what_guessing_reaches_is_said(tmp_path):
    text = render(tmp_path / "r", directory(tmp_path / "r", predictions("multiclass", n=200, classes=4)))
    assert "Average precision is 0.250 for a model that guesses: the mean prevalence of the classes." in text


def test_figures_of_several_labels_are_said_to_be_means(tmp_path):
    record = directory(tmp_path / "r", predictions("multilabel"))
    made = json.loads((tmp_path / "r/metrics.json").read_text())
    label = {"n": 10, "roc_auc": 0.5, "average_precision": 0.5}
    made["test"]["labels"] = {"a": {**label, "events": 2}, "b": {**label, "events": 4}, "c": {**label, "events": 0}}
    made["test"]["labels"]["c"]["average_precision"] = None
    made["test"] |= {"ece": 0.06, "intervals": {"ece": [0.07, 0.2]}}
    (tmp_path / "r/metrics.json").write_text(json.dumps(made))
    by = {"column": "site", "subgroups": {"x": {**made["test"], "n": 12, "events": 6, "small": ""}}}
    (tmp_path / "r/evaluations/e").mkdir(parents=True)
    (tmp_path / "r/evaluations/e/metrics.json").write_text(json.dumps({**made, "by": by}))
    (tmp_path / "r/evaluations/e/evaluation.json").write_text(json.dumps({"n": 12}))
    text = render(tmp_path / "r", record)
    assert "Figures are means over the labels for which they are defined." in text
    assert "Average precision is 0.300 for a model that guesses: the mean prevalence of these labels." in text
    assert "A calibration error can lie below its interval, since" in text
    assert "<td>6 (20\N{NO-BREAK SPACE}%)</td>" in text, "of the 30 known labels, not of the 12 samples"


def test_joint_training_shows_its_own_settings_and_whose_weights_it_kept(tmp_path):
    config = {"epochs": 2, "lr": 0.0003, "augment": {"*": ["crop"], "side": []}}
    joint = {"kind": "joint", "config": config, "best_epoch": 0}
    record = {**directory(tmp_path / "r", predictions("binary")), **joint}
    record["head"] = {"name": "fc", "settings": {"hidden": [8], "epochs": 30, "lr": 0.01}}
    words = " ".join(" ".join(Page(render(tmp_path / "r", record)).text).split())
    assert (
        "settings hidden [8], epochs 2, lr 0.0003, augment [crop], [] of side weights kept those of the start" in words
    )
    assert "No epoch had a lower validation loss than the start, whose weights were kept." in words
    later = render(tmp_path / "r", {**record, "best_epoch": 2})
    assert "those of epoch 2, with the lowest validation loss" in later
    assert "than the start" not in later


def test_learning_curve_marks_what_was_kept(tmp_path):
    record = directory(tmp_path / "r", predictions("binary"))
    history = {"epoch": [1, 2, 3], "train_loss": [1.0, 0.5, 0.1], "valid_loss": [0.9, 0.4, 0.7]}
    pl.DataFrame(history).write_csv(tmp_path / "r/history.csv")
    assert "0.7 at the end" in render(tmp_path / "r", record), "of which nobody knows what was kept"
    (tmp_path / "r/head.json").write_text(json.dumps({"fitted": {"epoch": 2}}))
    words = " ".join(" ".join(Page(render(tmp_path / "r", record)).text).split())
    assert "train loss 0.5 kept valid loss 0.4 kept The dashed line: epoch 2, which was kept." in words
    assert "weights kept those of epoch 2, with the lowest validation loss" in words
    pl.DataFrame(history).rename({"epoch": "round"}).write_csv(tmp_path / "r/history.csv")
    (tmp_path / "r/head.json").write_text(json.dumps({"fitted": {"rounds": 2}}))
    words = " ".join(" ".join(Page(render(tmp_path / "r", record)).text).split())
    assert "weights kept the first 2 of 3 rounds, with the lowest validation loss" in words
    pl.DataFrame(history).drop("valid_loss").write_csv(tmp_path / "r/history.csv")
    assert " kept" not in render(tmp_path / "r", record), "nothing was chosen without validation"


@pytest.mark.parametrize(("task", "decided"), [("binary", True), ("multiclass", False)])
def test_subgroups_say_of_which_samples(tmp_path, task, decided):
    record = directory(tmp_path / "r", predictions(task))
    metrics = json.loads((tmp_path / "r/metrics.json").read_text())
    for name, manifest in (("own", None), ("new", NASTY)):
        by = {"column": "site", "subgroups": {"x": {**metrics["test"], "small": ""}}}
        (tmp_path / "r/evaluations" / name).mkdir(parents=True)
        (tmp_path / "r/evaluations" / name / "metrics.json").write_text(json.dumps({**metrics, "by": by}))
        about = {"manifest": manifest, "n": 30}
        (tmp_path / "r/evaluations" / name / "evaluation.json").write_text(json.dumps(about))
    words = " ".join("".join(Page(render(tmp_path / "r", record)).text).split())
    more = ", with the same threshold for all" * decided
    assert f"Measured on the run\N{RIGHT SINGLE QUOTATION MARK}s own test samples{more}. A small" in words
    assert f"Measured on the samples of {NASTY}{more}. A small" in words


def test_each_of_several_classes_has_its_own_curves_with_bands(tmp_path):
    made = predictions("multiclass")
    record = directory(tmp_path / "r", made)
    bare = Page(render(tmp_path / "r", record))
    kept = curves_of(made, {"value": None}, bootstrap=20, seed=0)
    (tmp_path / "r/curves.json").write_text(json.dumps(kept))
    text = render(tmp_path / "r", record)
    page = Page(text)
    assert "<script" not in text
    more = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(more) == len([tag for tag, _ in bare.tags if tag == "svg"]) + 1 + 3 * 3, "and the reliability diagram"
    assert len(re.findall(r'd="M[^"]*Z" fill="var\(--s1\)" fill-opacity', text)) == 9
    words = " ".join("".join(page.text).split())
    assert f"{NASTY} against the rest: ROC, precision-recall and decision curve" in words
    part = made.of("test")
    area = roc_auc_score(part.true == 0, part.scores[:, 0])
    assert f"AUROC {area:.3f}. Shaded: 95 % band. The dot: where the model decides." in words
    assert "nan" not in "".join(re.findall(r' d="[^"]*"', text))
    many = curves_of(predictions("multiclass", n=240, classes=9), {"value": None}, bootstrap=0, seed=0)
    assert many["curves"] == [], "too many to look at one by one"


def test_same_bytes_every_time(tmp_path):
    record = directory(tmp_path / "r", predictions("multiclass"))
    assert render(tmp_path / "r", record) == render(tmp_path / "r", record)


def test_without_test_split_history_or_command(tmp_path):
    made = predictions("binary")
    shutil.rmtree(tmp_path / "r", ignore_errors=True)
    record = directory(tmp_path / "r", made, history=False, splits=("train", "valid"))
    text = render(tmp_path / "r", {**record, "command": "", "threshold": None, "recipes": {}, "binding": {}})
    Page(text)
    assert "on 30 validation samples" in text
    assert "Learning curve" not in text


def test_many_classes_become_a_heat_map(tmp_path):
    record = directory(tmp_path / "r", predictions("multiclass", n=400, classes=30))
    text = render(tmp_path / "r", record)
    Page(text)
    assert "Confusion matrix of 30 classes" in text
    assert '<table class="matrix' not in text
    assert re.search(r"The four best and the four worst of \d\d; the others in grey\.", text)
    assert len(text) < 400_000


def test_large_regression_stays_small(tmp_path):
    record = directory(tmp_path / "r", predictions("regression", n=8000))
    text = render(tmp_path / "r", record)
    assert "1,000 of 2,000 samples, drawn at random." in text
    assert len(text) < 800_000


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "\N{EN DASH}"),
        (0, "0"),
        (12345, "12,345"),
        (0.5, "0.500"),
        (0.00012, "0.00012"),
        (123.456, "123"),
        (0.0, "0.000"),
        (-0.25, "-0.250"),
    ],
)
def test_numbers(value, text):
    assert number(value) == text


def test_words():
    assert percent(0.125) == "12.5\N{NO-BREAK SPACE}%"
    assert percent(1.0) == "100\N{NO-BREAK SPACE}%"
    assert interval([0.1, 0.25]) == "0.100\N{EN DASH}0.250"
    assert interval([-0.1, 0.25]) == "-0.100 to 0.250"
    assert interval(None) == interval([None, 1.0]) == ""
    assert metric_name("roc_auc") == "AUROC"
    assert metric_name("some_new_one") == "some new one"
    ridge = {"kind": "head", "head": {"name": "logistic"}, "targets": ["age"], "views": ["a"]}
    assert sentence({**ridge, "task": "regression"}, {}, "test").startswith("Ridge head on cached features: regression")
    assert sentence({**ridge, "task": "binary"}, {}, "test").startswith("Logistic head on cached features: binary")
    record = {"kind": "joint", "task": "regression", "targets": ["age", "dose"], "views": ["a"]}
    assert sentence(record, {}, "test") == "Jointly fine-tuned network: regression of 2 targets from one view (a)."


def add_evidence(path: Path) -> None:
    """What later commands and a fit leave in a run, every text of it nasty."""
    picture = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    (path / "pictures").mkdir()
    (path / "pictures/a.png").write_bytes(base64.b64decode(picture))
    pictures = [{"view": NASTY, "file": "pictures/a.png", "text": ""}, {"view": "note", "file": "", "text": NASTY}]
    wrong = {"sample_id": NASTY, "group": "g", "views": "a+b", "target": "no", "prediction": NASTY, "probability": 0.9}
    both = {
        **wrong, "right": False, "view": "front", "pictures": pictures,
        "single": {"front": {"prediction": "no", "probability": 0.3}, NASTY: {"prediction": NASTY, "probability": 0.9}},
    }  # fmt: skip
    mistakes = {"schema": 1, "split": "test", "notes": [NASTY], "mistakes": [{**wrong, "pictures": pictures}]}
    (path / "mistakes.json").write_text(json.dumps({**mistakes, "one_view_right": [both]}))
    arm = {"head": NASTY, "arm": f"alone:{NASTY}", "test": 0.7, "test_low": 0.6, "test_high": 0.8, "valid": 0.7}
    arms = [{**arm, "difference": None, "low": None, "high": None, "words": "the reference"},
            {**arm, "arm": "fused", "difference": 0.01, "low": -0.1, "high": 0.1, "words": "no gain"}]  # fmt: skip
    ablation = {"metric": "roc_auc", "samples": 9, "groups": 5, "divisions": 2, "arms": arms}
    (path / "ablation").mkdir()
    (path / "ablation/ablation.json").write_text(json.dumps({**ablation, "conclusions": [f"no gain shown {NASTY}"]}))
    taps = [{"view": NASTY, "tap": "t@none", "share": 0.75}, {"view": "side", "tap": "t@none", "share": 0.25}]
    shares = {NASTY: 0.75, "side": 0.25}
    (path / "importance.json").write_text(json.dumps({"kind": "gain", "views": shares, "taps": taps, "features": []}))
    (path / "explain").mkdir()
    shutil.copy(path / "pictures/a.png", path / "explain/h.png")
    maps = [{"sample_id": NASTY, "file": "h.png", "alt": NASTY}, {"sample_id": "out", "file": "../pictures/a.txt"}]
    (path / "explain/explain.json").write_text(json.dumps({"schema": 1, "method": NASTY, "samples": maps}))
    part = {"n": 20, "n_groups": 9, "events": 4, "roc_auc": 0.7, "intervals": {"roc_auc": [0.5, 0.9]}}
    by = {"column": NASTY, "subgroups": {NASTY: {**part, "small": "9 groups"}, "south": {**part, "small": ""}}}
    (path / "evaluations/own").mkdir(parents=True)
    (path / "evaluations/own/metrics.json").write_text(json.dumps({"test": part, "by": by}))
    (path / "evaluations/own/evaluation.json").write_text(
        json.dumps({"manifest": None, "n": 20, "by": NASTY, "notes": ["seen before"]})
    )
    trials = {"division": ["final"] * 3, "trial": [0, 1, 2], "state": ["complete", "pruned", "complete"],
              "valid_roc_auc": [0.6, None, 0.8], "seconds": [1.0, 1.0, 1.0], "C": [NASTY, "b", "c"]}  # fmt: skip
    pl.DataFrame(trials).write_csv(path / "trials.csv")
    (path / "about.toml").write_text(f'intended_use = "{NASTY}"\n')


FLOW = {
    "samples": 130, "groups": 44, "incomplete": 3, "left_out": [{"why": NASTY, "samples": 10, "groups": 4}],
    "used": {"train": {"samples": 60, "groups": 20}, "test": {"samples": 30, "groups": 10}},
}  # fmt: skip
RICH = {
    "flow": FLOW, "missing": "zero", "tuning": {"trials": 3, "metric": "roc_auc", "nested": False},
    "leak_check": {"level": NASTY, "images": 200, "shared": 2, "torn_groups": 0, "torn_images": 0, "without_hash": 1},
    "split": {"split": "auto", "group": NASTY, "seed": 7, "valid": 0.15, "test": 0.15}, "seconds_fit": 1.5,
    "calibration": {"method": "temperature", "parameters": [1.25]},
    "head": {"name": "xgboost", "settings": {"class_weight": [1.0, 2.0], "min_child_weight": 3.5, "lr": 0.001}},
}  # fmt: skip


def test_everything_that_a_run_gathers_is_shown_and_escaped(tmp_path):
    record = {**directory(tmp_path / "r", predictions("binary")), **RICH}
    add_evidence(tmp_path / "r")
    text = render(tmp_path / "r", record)
    page = Page(text)
    words = " ".join(" ".join(page.text).split())
    assert "<script" not in text
    for part in (
        "130 samples in 44 groups in the manifest", "\N{MINUS SIGN} 10 in 4 groups", "2 of them belong to several",
        "No leak found", "Samples that lack a view are kept; their features count as missing", "no gain shown",
        "s gain. It says", " small 20 9 4 (20 %)", "why small", " 9 groups south 20",
        "3 trials ranked by AUROC", "1 of them ended early",
        "temperature scaling, temperature 1.250", "class weighting class_weight [1, 2] recalibration",
        "settings min_child_weight 3.5, lr 0.001", "seen before", "Most confident mistakes", "front alone",
        "Where one view alone was right", "Heat maps", "not stated", "positive class", "seed 7",
    ):  # fmt: skip
        assert part in words, part
    sources = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == 3
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert all(attributes["alt"] for tag, attributes in page.tags if tag == "img")
    headings = [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    links = [(attributes["href"] or "")[1:] for tag, attributes in page.tags if tag == "a"]
    assert links == ["content", *headings], "every section can be reached from the top"
    assert ">Subgroups</h2>" in text
    (tmp_path / "r/evaluations/own/metrics.json").write_text(json.dumps({"test": {"n": 20, "roc_auc": 0.7}}))
    assert ">Evaluations</h2>" in render(tmp_path / "r", record), "where no subgroup was measured"
    bare = render(tmp_path / "r", record, images=False)
    assert "<img" not in bare
    assert "Pictures are not shown." in bare


def test_a_file_outside_the_run_is_never_shown(tmp_path):
    record = directory(tmp_path / "r", predictions("binary"))
    add_evidence(tmp_path / "r")
    (tmp_path / "secret.png").write_bytes((tmp_path / "r/pictures/a.png").read_bytes())
    found = json.loads((tmp_path / "r/mistakes.json").read_text())
    found["mistakes"][0]["pictures"][0]["file"] = "../secret.png"
    (tmp_path / "r/mistakes.json").write_text(json.dumps(found))
    assert render(tmp_path / "r", record).count("<img") == 2


def test_torn_samples_are_a_flag(tmp_path):
    record = {**directory(tmp_path / "r", predictions("binary")), **RICH}
    record["leak_check"] = {**RICH["leak_check"], "torn_images": 2}
    assert '<p class="flag">Leak: 0 groups and 2 images are on more than one side.' in render(tmp_path / "r", record)


@pytest.mark.parametrize(
    ("likely", "said"),
    [
        (
            None,
            'class="lead">No group column was given: leaks between several samples of one patient were not checked.',
        ),
        (
            {"column": NASTY, "values": 1700, "torn": 41},
            "looks like one, and 41 of its 1,700 values are on more than one side: if these are patients, the figures",
        ),
        ({"column": NASTY, "values": 170, "torn": 0}, "looks like one; none of its 170 values is on two sides."),
    ],
)
def test_patients_that_nobody_kept_together_are_not_said_to_be(tmp_path, likely, said):
    record = {**directory(tmp_path / "r", predictions("binary")), **RICH, "split": {**RICH["split"], "group": None}}
    record["leak_check"] = {**RICH["leak_check"], "level": None, "likely": likely}
    text = render(tmp_path / "r", record)
    assert said in text
    assert "No image is on two sides." in text
    assert "No leak found" not in text
    assert ('class="flag">No group column' in text) == bool(likely and likely["torn"])
    assert "<script" not in text
    del record["leak_check"]["likely"]  # as runs of earlier versions have it
    assert "were not checked." in render(tmp_path / "r", record)


def test_folds_show_their_own_thresholds(tmp_path):
    made = predictions("binary")
    folds = np.arange(len(made.true)) % 3
    made = replace(made, splits=np.full(len(made.true), "test"), folds=folds)
    record = directory(tmp_path / "r", made, splits=("test",), history=False)
    record |= {"cv": {"folds": 3, "skipped": {}}, "split": RICH["split"]}
    record["threshold"] = {"value": 0.5, "folds": [0.0, 1.1, 0.5], "rule": "youden", "chosen_on": "valid"}
    text = render(tmp_path / "r", record)
    assert "own thresholds: 0.000, 1.100, 0.500." in " ".join(text.split())
    said = np.where(folds == 0, 1, np.where(folds == 1, 0, made.scores[:, 1] >= 0.5))
    right = int(((said == 1) & (made.true == 1)).sum())
    assert re.search(rf'class="right" style="--v:[\d.]+">{right}<', text)


def test_the_page_of_an_evaluation(tmp_path):
    record = {**directory(tmp_path / "r", predictions("binary")), **RICH}
    made = predictions("binary")
    directory(tmp_path / "e", replace(made, splits=np.full(len(made.true), "test")), splits=("test",), history=False)
    about = {"manifest": "new.csv", "n": 120, "by": None, "notes": ["9 of them were seen before"], "failed": []}
    about["threshold"] = {"value": 0.125, "rule": "sensitivity=0.9", "chosen_on": "valid"}
    one = {"samples": 1, "groups": 1}
    left = [{"why": "no known label", **one}]
    about["flow"] = {"samples": 121, "groups": 41, "left_out": left, "used": {"test": one}, "incomplete": 0}
    about["command"] = f"featurecache evaluate {NASTY}"
    (tmp_path / "e/evaluation.json").write_text(json.dumps(about))
    path = write_evaluation_report(tmp_path / "e", tmp_path / "r", record, name="r: new")
    text = path.read_text(encoding="utf-8")
    words = " ".join(" ".join(Page(text).text).split())
    for part in ("on 30 evaluated samples", "9 of them were seen before.", "new.csv", "the highest that reaches a "
                 "sensitivity of 0.9", "evaluation of a head run", "How the run was made",
                 "121 samples in 41 groups in the manifest \N{MINUS SIGN} 1 in 1 group no known label 1 in 1 group "
                 "evaluated",
                 f"How it was measured here. featurecache evaluate {NASTY}"):  # fmt: skip
        assert part in words, part
    assert "No leak found" not in words, "that is of the run's own samples"
