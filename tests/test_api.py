import subprocess
import sys
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from plugin_joint import write_samples
from sklearn.metrics import RocCurveDisplay

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
    monkeypatch.setattr("featurecache.results.write_report", lambda directory, record: None)
    fc.extract("samples.csv", views={"frontal": "a", "lateral": "b"}, body="plugin_joint:tiny", store="cache")
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
    with pytest.raises(InputError, match=r"unknown key 'epoch'. Did you mean 'epochs'"):
        fc.finetune_joint(tmp_path / "m.csv", epoch=3)
    with pytest.raises(InputError, match=r"unknown option 'batchsize'. Did you mean 'batch_size'"):
        fc.predict(tmp_path / "run", tmp_path / "m.csv", tmp_path / "p.csv", batchsize=3)
