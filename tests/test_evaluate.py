import json
import shutil

import numpy as np
import pytest
from stage_two import TRUST, hashes, quick, read_table, write_home, write_table

import featurecache as fc
from featurecache.errors import InputError


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with quick():
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return write_home(tmp_path_factory.mktemp("home"), runs=("head", "joint"))


@pytest.mark.parametrize("run", ["head", "joint"])
def test_evaluate_measures_new_samples_and_leaves_the_run_alone(home, tmp_path, run):
    shutil.copytree(home / "runs" / run, tmp_path / "run")
    before = hashes(tmp_path / "run")
    found = fc.evaluate(tmp_path / "run", home / "new/samples.csv", bootstrap=10, **TRUST)
    assert found.path == tmp_path / "run/evaluations/samples"
    rows = read_table(found.path / "predictions.csv")
    right = np.mean([row["target"] == row["prediction"] for row in rows])
    assert found.metrics["test"]["accuracy"] == pytest.approx(right)
    assert json.loads((found.path / "metrics.json").read_text()) == found.metrics
    after = hashes(tmp_path / "run")
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {"evaluations"}
    again = fc.evaluate(fc.load_run(tmp_path / "run"), home / "new/samples.csv", bootstrap=10, **TRUST)
    assert again.metrics == found.metrics
    assert hashes(tmp_path / "run") == after


def test_evaluate_refuses_what_has_no_labels_before_computing(home, tmp_path):
    shutil.copytree(home / "new", tmp_path / "new")
    rows = read_table(tmp_path / "new/samples.csv")
    rows[3]["label"] = "perhaps"
    write_table(tmp_path / "new/samples.csv", rows)
    with pytest.raises(InputError, match=r"column 'label': not one of the classes no, yes: sample 's003'.*'perhaps'"):
        fc.evaluate(home / "runs/head", tmp_path / "new/samples.csv", store=tmp_path / "store", **TRUST)
    write_table(tmp_path / "new/samples.csv", [{"lable": row.pop("label"), **row} for row in rows])
    with pytest.raises(InputError, match=r"no column 'label'. Did you mean 'lable'"):
        fc.evaluate(home / "runs/head", tmp_path / "new/samples.csv", store=tmp_path / "store", **TRUST)
    with pytest.raises(InputError, match="labels are needed: give a manifest"):
        fc.evaluate(home / "runs/head", tmp_path / "new/images/000-a0.png", **TRUST)
    assert not (tmp_path / "store").exists()


def test_evaluate_takes_unknown_labels_for_what_they_are(home, tmp_path):
    shutil.copytree(home / "new", tmp_path / "new")
    shutil.copytree(home / "runs/head", tmp_path / "run")
    rows = read_table(tmp_path / "new/samples.csv")
    rows[3]["label"] = ""
    write_table(tmp_path / "new/samples.csv", rows)
    found = fc.evaluate(tmp_path / "run", tmp_path / "new/samples.csv", bootstrap=0, **TRUST)
    assert found.metrics["test"]["n"] == 11
    assert len(read_table(found.path / "predictions.csv")) == 12
