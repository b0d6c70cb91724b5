"""tune: the best settings on validation become a normal run; killed or asked for more, it goes on."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time

import numpy as np
import polars as pl
import pytest
from stage_two import command, quick, read_table, samples, write_store, write_table

from featurecache.config import FitConfig
from featurecache.dataset import FeatureDataset
from featurecache.errors import DependencyError, InputError
from featurecache.fit import fit_head
from featurecache.heads.base import get_head, head_names
from featurecache.heads.space import Span
from featurecache.progress import Silent
from featurecache.tune import in_memory, tune


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with quick():
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("tune"))


def config(store, out, **options):
    values = {"store": store, "dataset": "m", "target": ("kind",), "head": "logistic", "bootstrap": 0, "out": out}
    return FitConfig.create({**values, **options})


class Counted(Silent):
    def __init__(self, stop_after: int | None = None):
        self.trials, self.stop_after, self.totals = 0, stop_after, []

    def begin(self, task, total, unit="images"):
        if unit == "trials":
            self.totals.append(total)

    def advance(self, task, n=1, *, status=""):
        if task.startswith("tune"):
            self.trials += 1
            if self.trials == self.stop_after:
                raise KeyboardInterrupt


def test_the_run_is_the_one_that_fit_head_makes_of_the_best_settings(store, tmp_path):
    run, search = tune(config(store, tmp_path / "run", seed=1), trials=6)
    trials = pl.read_csv(run.path / "trials.csv")
    assert trials.height == 6
    assert trials["state"].to_list() == ["complete"] * 6
    best = trials.sort("valid_accuracy", descending=True, maintain_order=True).row(0, named=True)
    assert run.record["head"]["settings"]["C"] == best["C"]
    assert run.metrics["valid"]["accuracy"] == pytest.approx(best["valid_accuracy"])
    dataset = FeatureDataset(store, dataset="m", target="kind")
    plain = fit_head(dataset, head="logistic", seed=1, settings={"C": best["C"]}, out=tmp_path / "plain", bootstrap=0)
    np.testing.assert_array_equal(run.arrays.scores, plain.arrays.scores)
    assert run.record["tuning"] == {"trials": 6, "metric": "accuracy", "chosen_on": "valid", "nested": False}
    assert "trials.csv" in run.files
    assert search.storage == tmp_path / "run.trials.jsonl"


def test_features_for_which_there_is_no_room_stay_where_they_are(store, monkeypatch):
    dataset = FeatureDataset(store, dataset="m", target="kind")
    assert in_memory(dataset) is not dataset.features
    monkeypatch.setattr(sys.modules[in_memory.__module__], "free_memory", lambda: 1000)
    assert in_memory(dataset) is dataset.features


def test_an_interrupted_search_goes_on_where_it_was(store, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        tune(config(store, tmp_path / "run"), trials=8, reporter=Counted(stop_after=3))
    assert not (tmp_path / "run").exists()
    seen = Counted()
    run, _ = tune(config(store, tmp_path / "run"), trials=8, reporter=seen)
    assert seen.totals == [5]
    trials = pl.read_csv(run.path / "trials.csv")
    assert trials["trial"].n_unique() == trials["C"].n_unique() == 8  # nothing proposed twice
    more = Counted()
    tune(config(store, tmp_path / "run", overwrite=True), trials=10, reporter=more)
    assert more.totals == [2]


def test_ctrl_c_ends_trials_of_several_threads(store, tmp_path):
    """They would go on for 100,000 rounds, and the interpreter would end under them."""
    fixed = {"max_bin": 16, "nthread": 1, "n_estimators": 100_000, "early_stopping_rounds": None}
    kept = tmp_path / "run.trials.jsonl"

    def press():
        while not kept.exists() or len(kept.read_bytes().splitlines()) < 40:  # a line a round, of each trial
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    presser = threading.Thread(target=press)
    presser.start()
    with pytest.raises(KeyboardInterrupt):
        tune(config(store, tmp_path / "run", head="xgboost", settings=fixed), trials=4, jobs=2)
    presser.join()
    assert not (tmp_path / "run").exists()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]


def test_trials_of_other_data_are_not_gone_on_with(store, tmp_path):
    tune(config(store, tmp_path / "run"), trials=2)
    with pytest.raises(InputError, match=r"run\.trials\.jsonl: holds trials that differ in rows"):
        tune(config(store, tmp_path / "run", overwrite=True, seed=5), trials=2)
    with pytest.raises(InputError, match="holds trials that differ in head, fixed"):
        tune(config(store, tmp_path / "run", overwrite=True, head="fc", settings={"epochs": 1}), trials=2)


def test_nested_folds_search_within_each_fold(store, tmp_path):
    run, search = tune(config(store, tmp_path / "run", cv=3), trials=2)
    assert list(search.found) == ["fold 1", "fold 2", "fold 3", "final"]
    trials = pl.read_csv(run.path / "trials.csv")
    assert trials.height == 8
    assert run.record["tuning"]["nested"] is True
    assert run.metrics["cv"]["folds"] == 3
    assert run.metrics["test"]["n"] == 80


def test_trials_that_fall_behind_are_ended(store, tmp_path):
    fixed = {"max_bin": 16, "nthread": 1, "n_estimators": 12, "early_stopping_rounds": None}
    run, _ = tune(config(store, tmp_path / "run", head="xgboost", settings=fixed), trials=16)
    states = pl.read_csv(run.path / "trials.csv")["state"].to_list()
    assert "pruned" in states
    assert states.count("complete") >= 10
    assert run.record["head"]["settings"]["max_bin"] == 16


def test_trials_at_a_time_are_all_there(store, tmp_path):
    run, _ = tune(config(store, tmp_path / "run"), trials=6, jobs=2)
    assert sorted(pl.read_csv(run.path / "trials.csv")["trial"].to_list()) == list(range(6))


def test_another_target_of_the_same_rows_is_no_reason_to_go_on(store, tmp_path):
    kept = tmp_path / "trials.jsonl"
    tune(config(store, tmp_path / "kind", split="fold"), trials=2, metric="accuracy", storage=kept)
    with pytest.raises(InputError, match=r"trials\.jsonl: holds trials that differ in target, so"):
        tune(
            config(store, tmp_path / "label", split="fold", target=("label",)),
            trials=2,
            metric="accuracy",
            storage=kept,
        )


def test_a_file_that_a_crash_cut_off_is_gone_on_with_and_any_other_is_refused(store, tmp_path):
    kept = tmp_path / "trials.jsonl"
    tune(config(store, tmp_path / "a"), trials=2, storage=kept)
    kept.write_bytes(kept.read_bytes()[:-9])
    for trials, name in ((3, "b"), (4, "c")):
        run, _ = tune(config(store, tmp_path / name), trials=trials, storage=kept)
        assert pl.read_csv(run.path / "trials.csv").height == trials
    kept.write_text("something else\n")
    with pytest.raises(InputError, match="not a file of trials"):
        tune(config(store, tmp_path / "d"), trials=2, storage=kept)
    with pytest.raises(InputError, match="a folder; trials are kept in a file"):
        tune(config(store, tmp_path / "d"), trials=2, storage=tmp_path)


def test_trials_that_another_process_adds_count(store, tmp_path):
    kept = tmp_path / "trials.jsonl"

    class Other(Silent):
        done = False

        def advance(self, task, n=1, *, status=""):
            if task.startswith("tune") and not self.done:
                self.done = True
                tune(config(store, tmp_path / "other"), trials=5, storage=kept)

    run, _ = tune(config(store, tmp_path / "run"), trials=5, storage=kept, reporter=Other())
    assert pl.read_csv(run.path / "trials.csv").height <= 6  # the one that was under way, too


def test_test_rows_decide_nothing(tmp_path):
    """With the labels of all test rows turned round, settings, threshold and calibration stay as they are."""
    found = []
    for name in ("true", "poisoned"):
        rows = [{**row, "by": ("train", "train", "valid", "test")[i // 2 % 4]} for i, row in enumerate(samples(80))]
        if name == "poisoned":
            turned = {"no": "yes", "yes": "no"}
            rows = [{**row, "label": turned[row["label"]]} if row["by"] == "test" else row for row in rows]
        store = write_store(tmp_path / name, rows=rows)
        options = {"target": ("label",), "split": "by", "calibrate": "isotonic", "at": "sensitivity=0.9"}
        run, _ = tune(config(store, tmp_path / f"{name}-run", **options), trials=3)
        trials = pl.read_csv(run.path / "trials.csv").drop("seconds")
        found.append((trials.rows(), run.record["head"], run.record["calibration"], run.threshold))
        accuracy = run.metrics["test"]["accuracy"]
        assert accuracy > 0.8 if name == "true" else accuracy < 0.2
    assert found[0] == found[1]


@pytest.mark.parametrize("name", [name for name in head_names() if get_head(name).search_space])
def test_both_ends_of_every_search_space_are_settings(name):
    head = get_head(name)
    for setting, where in head.search_space.items():
        ends = (where.low, where.high) if isinstance(where, Span) else where.values
        for value in ends:
            whole = isinstance(where, Span) and where.whole
            head({setting: int(value) if whole else value})


def test_what_can_not_be_tuned(store, tmp_path):
    with pytest.raises(InputError, match="nothing to tune: --set fixes all that could be searched"):
        tune(config(store, tmp_path / "run", settings={"C": 1.0}))
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="already exists"):
        tune(config(store, tmp_path / "there"), trials=1)


def test_without_optuna_the_extra_is_named(store, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(DependencyError, match=r"pip install 'featurecache\[tune\]'"):
        tune(config(store, tmp_path / "run"), trials=1)


def test_the_command(store, tmp_path):
    words = ["tune", store, "--dataset", "m", "--target", "label", "--head", "logistic", "--trials", "3"]
    done = command(*words, "--out", tmp_path / "run", "--bootstrap", "0", "--json")
    assert done.status == 0, done.err
    assert done.json["trials"] == 3
    assert done.json["metric"] == "roc_auc"
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert done.json["settings"] == {"C": record["head"]["settings"]["C"]}
    again = command(*words, "--out", tmp_path / "run")
    assert again.status == 2
    assert "already exists" in again.err


def test_the_command_decides_calibrates_and_takes_corrected_labels_as_fit_head_does(tmp_path):
    rows = samples(80)
    store = write_store(tmp_path, rows=rows)
    for i in range(0, 80, 8):
        rows[i]["label"] = "yes" if rows[i]["label"] == "no" else "no"
    corrected = write_table(tmp_path / "corrected.csv", rows)
    words = ["tune", store, "--dataset", "m", "--target", "label", "--head", "logistic", "--trials", "2"]
    words += ["--manifest", corrected, "--at", "sensitivity=0.9", "--calibrate", "temperature", "--images", "none"]
    done = command(*words, "--out", tmp_path / "run", "--bootstrap", "0")
    assert done.status == 0, done.err
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["threshold"]["rule"] == "sensitivity=0.9"
    assert record["calibration"]["method"] == "temperature"
    said = {row["sample_id"]: row["target"] for row in read_table(tmp_path / "run/predictions.csv")}
    assert said == {row["sample_id"]: row["label"] for row in rows}
    wrong = command(*words, "--out", tmp_path / "no", "--at", "precision=0.9")
    assert wrong.status == 2
    assert "--at precision=0.9: give sensitivity=VALUE" in wrong.err
