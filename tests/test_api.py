import re
import subprocess
import sys
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from plugin_joint import write_samples
from sklearn.metrics import RocCurveDisplay
from stage_two import write_store

import featurecache as fc
from featurecache.errors import InputError
from featurecache.fit import HeadRun

PLUGINS = str(Path(__file__).parent / "plugins")


def python(code, *, cwd):
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", textwrap.dedent(code)],
        capture_output=True, text=True, check=False, cwd=cwd, env={"PYTHONPATH": PLUGINS, "OMP_WAIT_POLICY": "passive",
                                                                   "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_of_the_documentation(tmp_path, monkeypatch):
    write_samples(tmp_path, 40)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("featurecache.rundir.results.write_report", lambda directory, record: None)
    options = {"views": {"frontal": "a", "lateral": "b"}, "body": "plugin_joint:tiny", "store": "cache"}
    planned = fc.plan_extract("samples.csv", **options)
    assert str(planned).startswith("dataset   samples: 40 samples\nview      frontal: reused 0, to compute 40")
    assert not (tmp_path / "cache").exists()
    assert fc.extract("samples.csv", **options).computed == sum(view.to_compute for view in planned.views)
    dataset = fc.FeatureDataset("cache", dataset="samples", target="label")
    x, y = dataset.numpy()
    run = fc.fit_head(dataset, head="xgboost", out="runs/xgb", settings={"n_estimators": 3, "nthread": 1})
    assert (x.shape, y.shape) == ((40, 24), (40,))
    assert 0 <= run.metrics["test"]["roc_auc"] <= 1
    assert run.predict_proba(dataset).shape == (40, 2)
    assert isinstance(run.plot_roc(), RocCurveDisplay)
    plt.close("all")
    loaded = fc.load_run("runs/xgb")
    assert isinstance(loaded, HeadRun)
    assert loaded.predict_proba(dataset).tobytes() == run.predict_proba(dataset).tobytes()


@pytest.mark.slow
def test_names_are_functions_in_a_fresh_process_whatever_is_imported_first(tmp_path):
    out = python(
        """
        import featurecache
        assert "torch" not in __import__("sys").modules
        import featurecache.extract, featurecache.predict, featurecache.evaluate
        from featurecache.predict import Scored
        print(callable(featurecache.extract), callable(featurecache.predict), callable(featurecache.evaluate))
        print(callable(featurecache.fit_head), sorted(set(featurecache.__all__) - set(dir(featurecache))))
        """,
        cwd=tmp_path,
    )
    assert out.splitlines() == ["True True True", "True []"]


def test_every_public_name_is_there():
    for name in fc.__all__:
        assert getattr(fc, name) is not None
    with pytest.raises(AttributeError, match="module 'featurecache' has no attribute 'fit'"):
        _ = fc.fitt if hasattr(fc, "fitt") else fc.__getattr__("fit")


def test_unknown_options_name_the_near_one(tmp_path):
    with pytest.raises(InputError, match=r"unknown key 'bdy'. Did you mean 'body'"):
        fc.extract(tmp_path / "m.csv", store=tmp_path / "s", bdy="x")
    with pytest.raises(InputError, match=r"unknown key 'id_column'. Did you mean 'id'\?"):
        fc.extract("m.csv", store=tmp_path / "s", id_column="study")
    with pytest.raises(InputError, match=r"unknown key 'epoch'. Did you mean 'epochs'"):
        fc.finetune_joint(tmp_path / "m.csv", epoch=3)
    with pytest.raises(InputError, match=r"unknown option 'batchsize'. Did you mean 'batch_size'"):
        fc.predict(tmp_path / "run", tmp_path / "m.csv", tmp_path / "p.csv", batchsize=3)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A store, and a run on it that is small and quickly made."""
    folder = tmp_path_factory.mktemp("api")
    store = write_store(folder, 60, missing=0.0)
    dataset = fc.FeatureDataset(store, dataset="m", target="label")
    small = {"max_iter": 50}
    run = fc.fit_head(dataset, head="logistic", out=folder / "runs" / "one", settings=small, images="none", bootstrap=0)
    return folder, dataset, run


def test_what_is_said_of_the_dataset_is_sent_there(fitted, tmp_path):
    _, dataset, _ = fitted
    with pytest.raises(InputError, match=r"fit_head: 'uncertain' is said of the dataset: give it to FeatureDataset"):
        fc.fit_head(dataset, head="logistic", out=tmp_path / "run", uncertain={"unsure": "ignore"})
    with pytest.raises(InputError, match=r"unknown key 'groups'. Did you mean 'group'"):
        fc.fit_head(dataset, head="logistic", out=tmp_path / "run", groups="patient")


def test_runs_are_compared_and_reported(fitted):
    folder, dataset, run = fitted
    other = fc.fit_head(dataset, head="logistic", out=folder / "runs" / "two", images="none", bootstrap=0)
    found = fc.compare([run, folder / "runs" / "two"], bootstrap=20)
    assert {row.run for row in found.runs} == {str(run.path), str(other.path)}
    assert re.match(r"roc_auc on \d+ test samples in \d+ groups, ranked on \d+ validation samples\n  1  /", str(found))
    about = folder / "about.toml"
    about.write_text('intended_use = "only a test"\n', encoding="utf-8")
    page = fc.report(run.path, about=about, images=False)
    assert "only a test" in page.read_text(encoding="utf-8")
    assert fc.load_run(run.path).record == run.record


def test_features_are_explored_and_exported(fitted, tmp_path):
    _, dataset, run = fitted
    made = fc.explore(dataset, tmp_path / "explore.html", run=run.path, images="none")
    assert (made.samples, made.path) == (60, tmp_path / "explore.html")
    assert "<canvas" in made.path.read_text(encoding="utf-8")
    assert str(made).startswith(f"page      {made.path}: 60 of 60 samples (")
    path = fc.export(dataset, tmp_path / "f.npz", format="npz")
    assert np.load(path)["x"].shape == (60, 12)


def test_a_dataset_says_what_it_is(fitted):
    _, dataset, _ = fitted
    assert repr(dataset) == "FeatureDataset('m': 60 samples, 12 features of a, b, target=label (binary))"


def test_store_and_name_in_the_place_of_a_dataset(tmp_path):
    said = r"export takes a FeatureDataset, which says store and dataset: export\(featurecache\.FeatureDataset\("
    with pytest.raises(InputError, match=rf"{said}'cache', dataset='m'\), \.\.\.\)"):
        fc.export("cache", tmp_path / "f.npz", dataset="m")
    with pytest.raises(InputError, match=rf"{said}'STORE', dataset='m'\)"):
        fc.export(dataset="m", out=tmp_path / "f.npz")
    with pytest.raises(InputError, match=r"fit_head takes .*'cache', dataset='NAME'\)"):
        fc.fit_head(Path("cache"), head="logistic")
    assert list(tmp_path.iterdir()) == []


def test_an_ablation(fitted):
    _, dataset, _ = fitted
    settings = {"logistic": {"max_iter": 50}}
    found = fc.ablate(dataset, seeds=1, bootstrap=20, settings=settings, device="cpu", valid=0.2, test=0.2)
    assert {arm.arm for arm in found.arms} >= {"alone:a", "alone:b", "fused", "shuffled"}
    with pytest.raises(InputError, match=r"unknown key 'tst'. Did you mean 'test'"):
        fc.ablate(dataset, tst=0.2)


@pytest.mark.slow
def test_a_search_and_heat_maps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_samples(tmp_path, 40)
    fc.extract("samples.csv", views={"a": "a", "b": "b"}, body="plugin_joint:tiny", store="cache")
    out = tmp_path / "run"
    run = fc.tune("cache", dataset="samples", target="label", trials=2, out=out, images="none", bootstrap=0)
    assert (run.path / "trials.csv").is_file()
    made = fc.explain(run, "samples.csv", method="occlusion", samples=1, body={"trust_factory": ["plugin_joint:tiny"]})
    assert len(made.samples) == 1
