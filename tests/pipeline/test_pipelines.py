"""The recipes of pipelines/: each is valid as it stands, and runs from end to end with tiny settings."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from extract_kit import main

from featurecache.pipeline.config import read_pipeline
from featurecache.pipeline.pipeline import open_pipeline

FOLDER = Path(__file__).parents[2] / "pipelines"
RECIPES = sorted(FOLDER.glob("*.toml"))
COMMON = {"extract.image_size": 64, "extract.workers": 1, "fit.bootstrap": 20}
JOINT = {"joint.epochs": 1, "joint.freeze_epochs": 0, "joint.bootstrap": 20, "joint.workers": 1}
FC = {"fit.fc.settings.epochs": 2}
# What each recipe runs on in the test: few samples, an epoch, the same stages.
TINY = {
    "textray": {**COMMON, "data.options.n": 90, "fit.settings.epochs": 3},
    "two-step-xgboost": {**COMMON, **JOINT, "data.options.n": 80, "joint.image_size": 64,
                         "extract.frozen.image_size": 64, "fit.settings.n_estimators": 4},
    "joint": {**COMMON, **JOINT, "data.options.n": 80, "fit.settings.epochs": 2},
    "joint-detached": {**COMMON, **JOINT, "data.options.n": 80, "fit.settings.epochs": 2},
    "spatial": {**JOINT, "data.options.n": 80, "joint.image_size": 64},
    "cnn-learner": {**COMMON, **JOINT, "data.options.n": 90, "fit.settings.epochs": 2},
    "siamese": {**JOINT, "data.options.n": 24, "joint.image_size": 64},
    "bitmoji-like": {**COMMON, **JOINT, **FC, "data.options.n": 60, "joint.image_size": 64},
    "histopathology": {**{k: v for k, v in COMMON.items() if "size" not in k}, **JOINT, **FC, "data.options.n": 240},
    "tuning": {**COMMON, "data.options.n": 80, "fit.settings.epochs": 2, "tune.trials": 2, "tune.bootstrap": 20,
               "tune.fc-tuned.settings.epochs": 2},
    "lenet-digits": {**COMMON, **JOINT, "data.options.n": 200, "joint.epochs": 2, "extract.image_size": 32},
    "names-text": {**JOINT, "data.options.n": 100, "extract.with-drawing.image_size.google": 64, "fit.bootstrap": 20},
    "four-channel": {**COMMON, "data.options.n": 80},
    "out-of-the-box": {"data.options.n": 6, "classify.images": 3},
    "mimic-like": {**COMMON, "data.options.n": 90, "fit.settings.epochs": 2},
    "unet": {**COMMON, **JOINT, "data.options.n": 40, "fit.settings.epochs": 2},
}  # fmt: skip


def without(settings: dict, *words: str) -> dict:
    return {name: value for name, value in settings.items() if not any(word in name for word in words)}


TINY["names-text"] = without(TINY["names-text"])
TINY["two-step-xgboost"] = without(TINY["two-step-xgboost"], "extract.image_size")
TINY["lenet-digits"] = without(TINY["lenet-digits"], "extract.image_size")
TINY["mimic-like"] = {**without(TINY["mimic-like"], "fit.settings"), "fit.fc.settings.epochs": 2,
                      "fit.frontal-only.settings.epochs": 2, "fit.xgboost.settings.n_estimators": 4}  # fmt: skip


def test_every_recipe_has_its_tiny_settings():
    assert {path.stem for path in RECIPES} == set(TINY)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_valid_and_say_what_they_reproduce(path):
    text = path.read_text(encoding="utf-8")
    for heading in ("# Reproduces:", "# Data:", "# Source:"):
        assert heading in text
    config = read_pipeline(path)
    assert config.title
    for name in (None, *config.variants):
        opened = open_pipeline(path, Path("-"), variant=name)
        assert opened.steps
    open_pipeline(path, Path("-"), changes=TINY[path.stem])
    assert f"[{path.stem}.toml]" in (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["textray", "joint"])
def test_a_plan_of_what_was_never_run(name, tmp_path, capsys):
    status, out, err = main("pipeline", FOLDER / f"{name}.toml", "--out", tmp_path / "out", "--dry-run", capsys=capsys)
    assert status == 0, err
    assert "the data are yet to be made" in out
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_run(path, tmp_path, capsys):
    changes = [word for key, value in TINY[path.stem].items() for word in ("--set", f"{key}={json.dumps(value)}")]
    # OUT may be given, to look at the pages afterwards.
    out = Path(os.environ.get("FEATURECACHE_PIPELINES", tmp_path))
    status, text, err = main("pipeline", path, "--out", out, *changes, "--json", capsys=capsys)
    assert status == 0, f"{text}\n{err}"
    stages = json.loads(text)["stages"]
    assert {stage["state"] for stage in stages} <= {"done", "cached"}
    assert (out / path.stem / "report.html").stat().st_size > 2000
    runs = [stage for stage in stages if stage["kind"] in ("fit", "tune", "joint")]
    assert all(0 <= stage["test"] <= 1 for stage in runs)
    status, text, err = main("pipeline", path, "--out", out, *changes, "--json", capsys=capsys)
    assert {stage["state"] for stage in json.loads(text)["stages"]} == {"cached"}
