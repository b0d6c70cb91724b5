import json

import numpy as np
import pytest
from stage_two import (
    FAST,
    LABELS,
    TARGETS,
    command,
    hashes,
    installed,
    metrics_from_predictions,
    quick,
    read_table,
    samples,
    write_store,
    write_table,
)

from featurecache.amounts import metric_line
from featurecache.api import load_run
from featurecache.calls import flat_metrics
from featurecache.dataset import FeatureDataset


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with quick():
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("heads"), 120)


def fit(store, out, *words, target="label", head="logistic", status=0):
    done = command(
        "fit-head", store, "--dataset", "m", "--target", target, "--head", head, "--out", out, "--bootstrap", 20,
        "--json", *FAST[head], *words,
    )  # fmt: skip
    assert done.status == status, done.err
    return done


@pytest.mark.parametrize("task", TARGETS)
@pytest.mark.parametrize("head", FAST)
def test_every_head_learns_every_task(store, tmp_path, head, task):
    done = fit(store, tmp_path / "run", target=TARGETS[task], head=head)
    run = load_run(tmp_path / "run")
    assert done.json["task"] == run.task == task
    assert done.json["outputs"] == [str(tmp_path / "run")]
    assert run.metrics == metrics_from_predictions(run.path), "metrics.json follows from predictions.csv"
    figures = run.metrics["test"]
    if task == "regression":
        assert figures["r2"] > (0.2 if head != "fc" else -1)
    else:
        assert figures["roc_auc"] > {"binary": 0.8, "multiclass": 0.6, "multilabel": 0.55}[task]
    assert figures["intervals"]["r2" if task == "regression" else "roc_auc"][0] <= done.json["test_n"]
    dataset = FeatureDataset(store, dataset="m")
    scores = run.predict_proba(dataset)
    again = load_run(run.path).predict_proba(FeatureDataset(store, dataset="m", memory=0))
    assert scores.tobytes() == again.tobytes(), "a loaded head predicts bitwise the same"
    written = [[row[name] for name in row if name.startswith("p:")] for row in read_table(run.path / "predictions.csv")]
    if task != "regression":
        np.testing.assert_array_equal(np.array(written, dtype=float), scores)


@pytest.mark.parametrize(
    "head", ["xgboost", *(pytest.param(head, marks=pytest.mark.slow) for head in ("fc", "logistic"))]
)
def test_forty_labels_of_which_some_are_unknown(store, tmp_path, head):
    words = ["--bootstrap", 0] if head != "xgboost" else []
    done = fit(store, tmp_path / "run", *words, target=",".join(f"l{k}" for k in range(LABELS)), head=head)
    assert done.json["task"] == "multilabel"
    assert done.json["skipped"] == [f"l{LABELS - 1}"]
    run = load_run(tmp_path / "run")
    rows = read_table(run.path / "predictions.csv")
    assert len([name for name in rows[0] if name.startswith("p:")]) == LABELS
    unknown = sum(row["target:l3"] == "" for row in rows)
    assert 0 < unknown < len(rows) / 2
    assert all(row[f"p:l{LABELS - 1}"] == "" for row in rows)
    test = [row for row in rows if row["split"] == "test" and row["target:l3"]]
    assert run.metrics["test"]["labels"]["l3"]["n"] == len(test)


def test_labels_that_can_not_be_trained_are_said(store, tmp_path):
    words = ["--target", "l0,l39", "--head", "logistic", "--out", tmp_path / "run", "--bootstrap", 0]
    done = command("fit-head", store, "--dataset", "m", *words)
    assert "skipped   l39: without a known positive or negative in training" in done.out


def test_a_split_that_tears_patients_is_noted(store, tmp_path):
    words = ["fit-head", store, "--dataset", "m", "--target", "kind", "--head", "logistic", "--bootstrap", 0]
    done = command(*words, "--out", tmp_path / "torn")
    (line,) = [line for line in done.out.splitlines() if line.startswith("note ")]
    assert line.startswith("note      no group was given, though column 'patient' looks like one: ")
    assert line.endswith("values are on more than one side of the split; --group patient keeps each on one")
    found = command(*words, "--out", tmp_path / "json", "--json").json
    assert found["notes"] == [line.removeprefix("note      ")]
    kept = command(*words, "--out", tmp_path / "kept", "--group", "patient", "--json")
    assert kept.json["notes"] == []


def test_one_is_one(tmp_path):
    rows = samples(60, missing=0)
    rows[5]["b"] = ""
    store = write_store(tmp_path, rows=rows, state={"b3.png": "failed"})
    words = ["fit-head", store, "--dataset", "m", "--target", "label", "--head", "logistic", "--bootstrap", 0]
    done = command(*words, "--missing", "drop", "--out", tmp_path / "run")
    assert "missing   view b of 1 sample: the image" in done.out
    assert "left out  1 sample without the views" in done.out


@pytest.mark.parametrize("head", ["fc", "xgboost", "logistic"])
def test_what_was_kept_and_what_has_no_label_is_said(tmp_path, head):
    rows = samples(60, missing=0)
    rows[5]["label"] = rows[7]["label"] = ""
    store = write_store(tmp_path, rows=rows)
    words = ["fit-head", store, "--dataset", "m", "--target", "label", "--head", head, "--bootstrap", 0]
    done = command(*words, *FAST[head], "--out", tmp_path / "run")
    assert "left out  2 samples without a known label" in done.out
    lines = [line for line in done.out.splitlines() if line.startswith("kept ")]
    history = load_run(tmp_path / "run").history
    if head == "logistic":
        assert lines == []
        return
    unit = {"fc": "epoch", "xgboost": "round"}[head]
    best = history.sort("valid_loss", maintain_order=True).row(0, named=True)
    assert lines == [f"kept      {unit} {best[unit]} of {history.height}, valid_loss {best['valid_loss']:.4f}"]


def test_json_is_flat_but_for_lists(store, tmp_path):
    found = fit(store, tmp_path / "run").json
    assert found["schema"] == 1
    assert found["command"] == "fit-head"
    assert found["status"] == "done"
    assert found["failed"] == []
    assert found["test_roc_auc_low"] <= found["test_roc_auc"] <= found["test_roc_auc_high"]
    assert not [name for name, value in found.items() if isinstance(value, dict)]


def test_a_label_corrected_in_the_csv_is_noticed_and_rebound(tmp_path):
    store = write_store(tmp_path, 60)
    rows = read_table(tmp_path / "m.csv")
    rows[0]["label"] = "yes"
    write_table(tmp_path / "m.csv", rows)
    done = fit(store, tmp_path / "run", status=2)
    assert f"--manifest {tmp_path}/m.csv" in done.err
    assert done.json["status"] == "failed"
    assert not (tmp_path / "run").exists()
    fit(store, tmp_path / "run", "--manifest", tmp_path / "m.csv")
    assert read_table(tmp_path / "run/predictions.csv")[0]["target"] == "yes"


def test_an_interrupted_extract_is_refused_unless_partial_is_allowed(tmp_path):
    store = write_store(tmp_path, 60, state={f"b{i}.png": "pending" for i in range(50, 60)})
    assert "images are not yet extracted" in fit(store, tmp_path / "run", status=2).err
    fit(store, tmp_path / "run", "--allow-partial")
    assert read_table(tmp_path / "run/predictions.csv")[55]["views"] == "a"


def test_failed_images_count_as_missing_views_and_it_is_said(tmp_path):
    store = write_store(tmp_path, 60, missing=0, state={"b3.png": "failed", "b7.png": "failed"})
    found = fit(store, tmp_path / "run").json
    assert found["unreadable_b"] == 2
    assert found["n_failed"] == 0, "the samples are used"
    assert read_table(tmp_path / "run/predictions.csv")[3]["views"] == "a"
    text = command("fit-head", store, "--dataset", "m", "--target", "label", "--head", "logistic", "--out",
                   tmp_path / "dropped", "--missing", "drop", "--bootstrap", 0).out  # fmt: skip
    assert "missing   view b of 2 samples: the image could not be read" in text
    assert len(read_table(tmp_path / "dropped/predictions.csv")) == 58
    assert json.loads((tmp_path / "dropped/run.json").read_text())["n_failed"] == 2
    assert "--missing error refuses that" in fit(store, tmp_path / "no", "--missing", "error", status=2).err


def test_views_taps_and_recipes_are_chosen(tmp_path):
    store = write_store(tmp_path, 60, missing=0, taps=("penultimate@none", "layer4@avg"))
    assert "Choose with --tap" in fit(store, tmp_path / "none", status=2).err
    fit(store, tmp_path / "one", "--tap", "layer4", "--views", "b")
    record = json.loads((tmp_path / "one/run.json").read_text())
    assert (record["views"], record["tap"]) == (["b"], {"b": ["layer4@avg"]})
    fit(store, tmp_path / "both", "--tap", "a=layer4", "--tap", "a=penultimate", "--tap", "b=penultimate")
    record = json.loads((tmp_path / "both/run.json").read_text())
    assert record["tap"] == {"a": ["layer4@avg", "penultimate@none"], "b": ["penultimate@none"]}
    digest = record["recipes"]["a"]["digest"]
    fit(store, tmp_path / "recipe", "--tap", "layer4", "--recipe", digest[:8], "--recipe", f"b={digest}")
    assert "no recipe" in fit(store, tmp_path / "no", "--recipe", "fffff", status=2).err.lower()


def test_split_columns_groups_and_uncertain_labels(tmp_path):
    store = write_store(tmp_path, 60)
    fit(store, tmp_path / "column", "--split", "fold")
    rows = read_table(tmp_path / "column/splits.csv")
    assert [row["split"] for row in rows[:4]] == ["train", "train", "valid", "test"]
    fit(store, tmp_path / "group", "--group", "patient", "--valid", "0.2", "--test", "0.3", "--seed", 3)
    sides = {}
    for row in read_table(tmp_path / "group/splits.csv"):
        sides.setdefault(row["group"], set()).add(row["split"])
    assert all(len(found) == 1 for found in sides.values())
    assert (
        "no split column 'fould'. Did you mean 'fold'" in fit(store, tmp_path / "x", "--split", "fould", status=2).err
    )
    rows = read_table(tmp_path / "m.csv")
    rows[2]["l0"] = "-1"
    write_table(tmp_path / "m.csv", rows)
    words = ["--manifest", tmp_path / "m.csv", "--uncertain", "-1=ignore"]
    fit(store, tmp_path / "uncertain", *words, target="l0,l1")
    assert read_table(tmp_path / "uncertain/predictions.csv")[2]["target:l0"] == ""
    done = fit(store, tmp_path / "bad", "--uncertain", "-1=maybe", status=2)
    assert "maybe" in done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "c=3"], "unknown key 'c'. Did you mean 'C'?"),
        (["--set", "C"], "--set 'C': write NAME=VALUE"),
        (["--set", "C=-1"], "C: Input should be greater than 0 or 'auto' (found '-1')"),
        (["--valid", "1.5"], "fractions in (0, 1)"),
        (["--memory", "much"], "memory"),
        (["--tap", "layer5"], "has no tap 'layer5'"),
    ],
)
def test_wrong_options_are_named(store, tmp_path, words, message):
    done = fit(store, tmp_path / "run", *words, status=2)
    assert message in done.err
    assert "Traceback" not in done.err
    assert message in done.json["error"]


def test_out_that_exists_is_refused_unless_overwritten(store, tmp_path):
    fit(store, tmp_path / "run")
    before = hashes(tmp_path / "run")
    assert "already exists. Give another name to --out, or --overwrite" in fit(store, tmp_path / "run", status=2).err
    assert hashes(tmp_path / "run") == before
    fit(store, tmp_path / "run", "--overwrite", "--seed", 5)
    assert hashes(tmp_path / "run") != before


def test_runs_get_a_name_of_their_own(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["fit-head", store, "--dataset", "m", "--target", "label", "--head", "logistic", "--bootstrap", 0]
    assert command(*words, "--quiet") == (0, "runs/m-label-logistic-1\n", "")
    done = command(*words)
    assert done.out.startswith("run       runs/m-label-logistic-2 (binary, views a, b)\ntest ")
    assert "Next: open runs/m-label-logistic-2/report.html" in done.err


def test_no_absolute_path_or_host_in_the_run(store, tmp_path):
    fit(store, tmp_path / "run", "--manifest", store.parent / "m.csv")
    for path in [path for path in (tmp_path / "run").rglob("*") if path.is_file()]:
        assert str(tmp_path).encode() not in path.read_bytes(), path.name
        assert str(store.parent).encode() not in path.read_bytes(), path.name


def test_memory_streams_and_gives_the_same(store, tmp_path):
    fit(store, tmp_path / "ram")
    fit(store, tmp_path / "disk", "--memory", 0)
    solvers, predictions = [], []
    for name in ("ram", "disk"):
        solvers.append(json.loads((tmp_path / name / "head.json").read_text())["fitted"]["streamed"])
        predictions.append([float(row["p:yes"]) for row in read_table(tmp_path / name / "predictions.csv")])
    assert solvers == [False, True]
    assert predictions[0] == pytest.approx(predictions[1], abs=1e-3)  # the same optimum by another solver


def test_metric_line_and_flat_metrics():
    figures = {
        "n": 5,
        "n_groups": 4,
        "accuracy": 0.5,
        "labels": {},
        "roc_auc": None,
        "intervals": {"accuracy": [0.1, 0.9]},
    }
    assert metric_line("test", figures) == "test      n 5 in 4 groups: accuracy 0.500 [0.100, 0.900]"
    assert flat_metrics({"test": figures, "bootstrap": {"n": 1}}) == {
        "test_n": 5, "test_n_groups": 4, "test_accuracy": 0.5, "test_accuracy_low": 0.1, "test_accuracy_high": 0.9,
    }  # fmt: skip


@pytest.mark.slow
def test_as_installed(store, tmp_path):
    done = installed("fit-head", store, "--dataset", "m", "--target", "kind", "--head", "xgboost", "--out",
                     tmp_path / "run", *FAST["xgboost"], "--bootstrap", 20)  # fmt: skip
    assert done.status == 0, done.err
    assert "\x1b" not in done.out + done.err
    assert done.err.splitlines()[-1].startswith("Next: open ")
    assert (tmp_path / "run/report.html").is_file()
    assert "Traceback" not in done.err
