import json
import warnings

import numpy as np
import pytest
from stage_two import metrics_from_predictions, quick, recipe, samples, write_store

from featurecache.api import load_run
from featurecache.config import FitConfig
from featurecache.crossval import fit_from_config
from featurecache.dataset import FeatureDataset
from featurecache.errors import InputError, RecipeMismatchError, RunError
from featurecache.evaluation.calibration import fit_calibration
from featurecache.fit import HeadRun, fit_head
from featurecache.progress import Silent
from featurecache.run import RunWriter
from featurecache.rundir.recorded import read_recipe, recipe_differences
from featurecache.rundir.results import to_target

FAST = {"n_estimators": 4, "max_bin": 16, "nthread": 1}


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with quick():
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("fit"))


@pytest.fixture
def dataset(store):
    return FeatureDataset(store, dataset="m", target="label")


class Heard(Silent):
    def __init__(self):
        self.told = []

    def begin(self, task, total, unit="images"):
        self.told.append((task, unit))

    def advance(self, task, n=1, *, status=""):
        self.told.append(status)


def test_a_run_records_what_it_was_made_from(dataset, tmp_path):
    heard = Heard()
    run = fit_head(dataset, head="xgboost", out=tmp_path / "run", settings=FAST, bootstrap=10, seed=4, reporter=heard)
    assert isinstance(run, HeadRun)
    record = run.record
    assert record["head"]["name"] == "xgboost"
    assert record["head"]["settings"]["max_bin"] == 16
    binding = dataset.binding
    known = {"dataset": "m", "digest": binding.digest, "manifest_digest": binding.manifest_digest}
    assert record["binding"] == known
    assert record["split"]["seed"] == 4
    assert record["target_config"] == {"target": ["label"], "task": "auto", "uncertain": {}}
    assert {view: read_recipe(entry) for view, entry in record["recipes"].items()} == dataset.recipes
    assert record["recipes"]["a"]["digest"] == dataset.recipes["a"].digest
    assert heard.told[0] == ("fit xgboost", "rounds")
    assert len(heard.told) == 5
    assert run.history.height == 4
    assert run.metrics["test"]["roc_auc"] > 0.7
    assert type(run.plot_roc()).__name__ == "RocCurveDisplay"


def test_seeds_decide_and_the_same_seed_gives_the_same_head(dataset, tmp_path):
    runs = [fit_head(dataset, head="fc", out=tmp_path / f"{n}", seed=seed, settings={"epochs": 2}, bootstrap=0)
            for n, seed in enumerate((1, 1, 2))]  # fmt: skip
    first, again, other = (run.predict_proba(dataset) for run in runs)
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()


def test_the_configuration_says_the_same_as_arguments(store, dataset, tmp_path):
    config = FitConfig.create({"store": store, "dataset": "m", "target": ["label"], "head": "logistic", "bootstrap": 0,
                               "out": tmp_path / "a", "views": ["b", "a"], "missing": "drop"})  # fmt: skip
    run = fit_from_config(config, command="featurecache fit-head ...")
    same = FeatureDataset(store, dataset="m", target="label", views=["b", "a"], missing="drop")
    by_hand = fit_head(same, head="logistic", out=tmp_path / "b", bootstrap=0)
    assert run.predict_proba(same).tobytes() == by_hand.predict_proba(same).tobytes()
    assert run.record["views"] == ["b", "a"]
    assert run.command == "featurecache fit-head ..."
    assert run.record["n_dropped"] == 80 - len(same)


def test_nothing_is_left_where_fitting_fails(store, dataset, tmp_path):
    with pytest.raises(InputError, match="the dataset has no target: give target=COLUMN"):
        fit_head(FeatureDataset(store, dataset="m"), out=tmp_path / "run")
    with pytest.raises(InputError, match=r"unknown head 'logistik'. Did you mean 'logistic'"):
        fit_head(dataset, head="logistik", out=tmp_path / "run")
    with pytest.raises(InputError, match=r"no group column 'patients'. Did you mean 'patient'"):
        fit_head(dataset, group="patients", out=tmp_path / "run")

    class Broken(Silent):
        def begin(self, task, total, unit="images"):
            raise MemoryError

    with pytest.raises(MemoryError):
        fit_head(dataset, head="logistic", out=tmp_path / "run", reporter=Broken())
    assert list(tmp_path.iterdir()) == []


def test_only_head_runs_are_loaded_as_such(tmp_path):
    with RunWriter(tmp_path / "joint", kind="joint") as writer:
        writer.publish(
            {"task": "binary", "classes": ["a", "b"], "targets": ["y"], "views": ["a"], "recipes": {}, "config": {}}
        )
    assert not isinstance(load_run(tmp_path / "joint"), HeadRun)


def test_a_pickle_disguised_as_a_head_executes_nothing(tmp_path, dataset):
    import hashlib
    import pickle

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    run = fit_head(dataset, head="logistic", out=tmp_path / "run", bootstrap=0)
    evil = pickle.dumps(Evil())
    (run.path / "head.npz").write_bytes(evil)
    with pytest.raises(RunError, match=r"head.npz has changed since the run was written"):
        load_run(run.path)
    digest = hashlib.sha256(evil).hexdigest()
    record = json.loads((run.path / "run.json").read_text())
    head = json.loads((run.path / "head.json").read_text())
    head["sha256"] = digest
    (run.path / "head.json").write_text(json.dumps(head))
    record["files"]["head.npz"] = digest
    record["files"]["head.json"] = hashlib.sha256((run.path / "head.json").read_bytes()).hexdigest()
    (run.path / "run.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match="a Python pickle, which heads never are; nothing of it was executed"):
        load_run(run.path).predict_proba(dataset)
    (run.path / "run.json").write_bytes(evil)
    with pytest.raises(RunError, match=r"run.json: not JSON. Nothing in it was executed"):
        load_run(run.path)
    assert not (tmp_path / "executed").exists()


def test_recipes_of_another_meaning_are_refused_and_rounding_is_noted(tmp_path, dataset):
    run = fit_head(dataset, head="logistic", out=tmp_path / "run", bootstrap=0)
    low = write_store(tmp_path / "low", precision="bf16", storage_dtype="float16")
    with pytest.warns(UserWarning, match="precision 'fp32' -> 'bf16', storage_dtype 'float32' -> 'float16'"):
        scores = run.predict_proba(FeatureDataset(low, dataset="m"))
    np.testing.assert_allclose(scores, run.predict_proba(dataset), atol=0.01)
    other = write_store(tmp_path / "other", preprocessing={"crop": 64})
    with pytest.raises(RecipeMismatchError, match=r"view a, b: preprocessing.crop 32 -> 64"):
        run.predict_proba(FeatureDataset(other, dataset="m"))
    taps = write_store(tmp_path / "taps", taps=("layer4@avg", "penultimate@none"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.predict_proba(FeatureDataset(taps, dataset="m", tap="penultimate"))
    with pytest.raises(RecipeMismatchError, match="the head expects a penultimate@none"):
        run.predict_proba(FeatureDataset(taps, dataset="m", tap="layer4"))


def test_differences_of_recipes():
    assert recipe_differences(recipe(), recipe(("layer4@avg", "penultimate@none"))) == ("", "")
    assert recipe_differences(recipe(), recipe(("layer4@avg",))) == ("taps penultimate@none -> layer4@avg", "")
    other = recipe(engine="openvino", body={"architecture": "a" * 64})
    serious, numeric = recipe_differences(recipe(engine="torch"), other)
    assert "body.architecture " in serious
    assert "-> aaaaaaaaaaaa..." in serious
    assert numeric == "engine 'torch' -> 'openvino'"


def test_a_decision_at_a_fixed_sensitivity_is_chosen_on_validation(dataset, tmp_path):
    run = fit_head(dataset, head="logistic", out=tmp_path / "run", bootstrap=0, at="sensitivity=0.9")
    assert run.threshold["rule"] == "sensitivity=0.9"
    assert run.metrics["valid"]["sensitivity"] >= 0.9
    assert metrics_from_predictions(run.path) == run.metrics


@pytest.mark.parametrize("method", ["temperature", "isotonic"])
def test_calibration_is_fitted_on_validation_and_goes_with_the_run(dataset, store, tmp_path, method):
    plain = fit_head(dataset, head="logistic", out=tmp_path / "plain", bootstrap=0)
    run = fit_head(dataset, head="logistic", out=tmp_path / "run", bootstrap=0, calibrate=method)
    assert run.record["calibration"]["fitted_on"] == "valid"
    assert (run.path / "head.npz").read_bytes() == (plain.path / "head.npz").read_bytes()
    valid = plain.arrays.of("valid")
    expected = fit_calibration(to_target(valid), valid.scores, method).apply(plain.arrays.scores, exclusive=True)
    np.testing.assert_allclose(run.arrays.scores, expected, atol=1e-12)
    assert run.metrics["valid"]["log_loss"] <= plain.metrics["valid"]["log_loss"] + 1e-9
    again = load_run(run.path)
    np.testing.assert_allclose(again.predict_proba(dataset), expected, atol=1e-6)
    assert metrics_from_predictions(run.path) == run.metrics


def test_what_needs_validation_rows_is_refused_where_the_column_marks_none(tmp_path):
    rows = [{**row, "by": ("train", "test")[i // 2 % 2]} for i, row in enumerate(samples(40))]
    data = FeatureDataset(write_store(tmp_path, rows=rows), dataset="m", target="label")
    for options in ({"at": "sensitivity=0.9"}, {"calibrate": "isotonic"}):
        with pytest.raises(InputError, match=r"needs validation samples, and column 'by' marks none"):
            fit_head(data, head="logistic", split="by", out=tmp_path / "run", bootstrap=0, **options)
    assert not (tmp_path / "run").exists()
