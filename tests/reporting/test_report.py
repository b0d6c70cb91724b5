import json
import os
import re
import shutil
import warnings
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from featurecache.predictions import Predictions
from featurecache.reporting.report import render, write_report
from featurecache.reporting.wording import interval, metric_name, number, percent, sentence

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
    assert "from a probability of <b>0.250</b> on" in text
    assert "AUROC 0.750 (95 % interval 0.700\N{EN DASH}0.800) on 30 test samples." in text


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
    assert percent(0.125) == "12.5 %"
    assert percent(1.0) == "100 %"
    assert interval([0.1, 0.25]) == "0.100\N{EN DASH}0.250"
    assert interval([-0.1, 0.25]) == "-0.100 to 0.250"
    assert interval(None) == interval([None, 1.0]) == ""
    assert metric_name("roc_auc") == "AUROC"
    assert metric_name("some_new_one") == "some new one"
    record = {"kind": "joint", "task": "regression", "targets": ["age", "dose"], "views": ["a"]}
    assert sentence(record, {}, "test") == "Jointly fine-tuned network: regression of 2 targets from one view (a)."
